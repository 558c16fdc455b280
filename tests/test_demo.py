"""`ai-service demo` and what `make run` runs, as processes: what they show, how they end, and that nothing is left of them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from postgres import free_port
from service import wait_until

from ai_client import AIService, NewJob, ServiceError
from ai_internal.cli import demo

ROOT = Path(demo.__file__).parents[2]
TASK_TYPES = ("transcribe", "call_analysis", "tg_analysis", "pf_competitor_analysis")


class Refusing(demo.StubChatServer):
    """A chat server that refuses every completion, and remembers the keys it was shown."""

    keys: ClassVar[list[str]] = []

    def do_POST(self) -> None:  # noqa: N802 -- the name is the library's
        self.keys.append(self.headers.get("Authorization", ""))
        self.close_connection = True
        self.send_error(400, "no")


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine without any setting, whose temporary folder can be looked at afterwards."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
    (tmp_path / "tmp").mkdir()
    return {**inherited, "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


@contextmanager
def started(arguments: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        # One that says nothing for so long would keep a test waiting for its next line for ever.
        limit = threading.Timer(180, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            kill(family(process.pid))


def family(pid: int) -> list[psutil.Process]:
    """The process and all that it started."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"it ended without saying {pattern!r}:\n{said}")


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_jobs_are_of_the_four_task_types_and_of_more_than_one_alphabet() -> None:
    jobs = demo.read_jobs("some-model")
    assert {job.task_type for job in jobs} == set(TASK_TYPES)
    assert {job.model_profile for job in jobs} == {"whisperx", "some-model"}
    assert len({(job.owner_service, job.owner_ref, job.task_type) for job in jobs}) == len(jobs)
    assert {"Д", "海", "🥶", "ö"} <= set(demo.JOBS.read_text(encoding="utf-8"))


def test_stand_in_fits_every_schema_of_the_jobs() -> None:
    for line in demo.JOBS.read_text(encoding="utf-8").splitlines():
        request = json.loads(line)["input"]
        if "response_format" in request:
            schema = request["response_format"]["json_schema"]["schema"]
            answer = json.loads(demo.stub_answer(request))
            assert list(answer) == schema["required"]
            assert re.match(schema["properties"]["summary"]["pattern"], answer["summary"])
            assert "stand-in" in answer["summary"]


def test_demo_brings_every_job_to_its_end_and_says_that_no_model_ran(environ: dict[str, str]) -> None:
    with started(["-m", "ai_service", "demo"], environ) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "12 jobs: 12 completed" in said
    assert "a local stand-in: no model runs" in said
    assert "a local stand-in: no audio is heard" in said
    for task_type in TASK_TYPES:
        assert re.search(rf"^{task_type} .* completed +[\d.]+ +[–\d]+  .*A stand-in wrote this", said, re.MULTILINE), said
    assert list(Path(environ["TMPDIR"]).iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing_behind(environ: dict[str, str], how: signal.Signals) -> None:
    with started(["-m", "ai_service", "demo"], environ) as process:
        read_until(process, "jobs were sent")
        everything = family(process.pid)
        assert len(everything) > 4
        process.send_signal(how)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "Traceback" not in said
        assert all(is_gone(each) for each in everything)
    assert list(Path(environ["TMPDIR"]).iterdir()) == []


def test_demo_uses_the_server_it_is_given_and_fails_with_its_jobs(environ: dict[str, str], refusing: str) -> None:
    settings = {"LLM_BASE_URL": refusing, "LLM_API_KEY": "sk-demo-key", "LLM_MODEL": "qwen2.5-14b"}
    with started(["-m", "ai_service", "demo"], environ | settings) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "12 jobs: 3 completed, 9 failed" in said
    assert set(Refusing.keys) == {"Bearer sk-demo-key"}
    assert "sk-demo-key" not in said
    assert "no model runs" not in said


def test_demo_whose_service_cannot_start_says_why(environ: dict[str, str]) -> None:
    with started(["-m", "ai_service", "demo"], environ | {"MAX_BODY_BYTES": "plenty"}) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the service does not start" in said
    assert "MAX_BODY_BYTES" in said
    assert list(Path(environ["TMPDIR"]).iterdir()) == []


@pytest.mark.long
def test_run_killed_altogether_comes_back_with_nothing_lost(environ: dict[str, str], tmp_path: Path) -> None:
    environ |= {"HTTP_PORT": str(free_port())}
    command = ["-m", "ai_internal.cli.demo", "run", str(tmp_path / "data")]
    with AIService(f"http://127.0.0.1:{environ['HTTP_PORT']}") as service:
        with started(command, environ) as process:
            read_until(process, "AI Service listens on")
            kept = service.create_job(NewJob("telephony", "beeline/1", "call_analysis", "nobody-serves-this", input={"text": "Привет"}))
            answered = service.create_job(NewJob("telephony", "beeline/2", "call_analysis", "qwen2.5-14b", input="Hello"))
            assert service.wait_for_job(answered.id, 30).status == "completed"
            everything = family(process.pid)
            kill(everything)
            wait_until(lambda: all(is_gone(each) for each in everything))
        with started(command, environ) as process:
            read_until(process, "AI Service listens on")
            assert service.get_job(kept.id, include_input=True).input == {"text": "Привет"}
            assert service.get_job(answered.id).status == "completed"
            process.terminate()
            assert process.wait(60) == 0


@pytest.mark.long
def test_run_starts_again_what_dies(environ: dict[str, str], tmp_path: Path) -> None:
    environ |= {"HTTP_PORT": str(free_port())}
    with (
        AIService(f"http://127.0.0.1:{environ['HTTP_PORT']}") as service,
        started(["-m", "ai_internal.cli.demo", "run", str(tmp_path / "data")], environ) as process,
    ):
        read_until(process, "NO MODEL RUNS")
        [served] = [each for each in family(process.pid) if each.cmdline()[-1:] == ["serve"]]
        served.kill()
        read_until(process, "ai-service serve ended with status -9; starting it again")
        wait_until(lambda: ready(service), seconds=30)
        audio = json.loads(demo.JOBS.read_text(encoding="utf-8").splitlines()[0])["input"]
        job = service.create_job(NewJob("telephony", "beeline/3", "transcribe", "whisperx", input=audio))
        assert service.wait_for_job(job.id, 60).result["text"] == "A stand-in wrote this, no audio was heard."
        process.terminate()
        assert process.wait(60) == 0


def ready(service: AIService) -> bool:
    try:
        return service.readyz()
    except ServiceError:
        return False
