"""Jobs through service, worker and real model services, which are killed, started again, cancelled and kept waiting.

Needs the commands that real_servers.py describes; then `pytest -m real -s tests/test_real.py`, which prints what it measured.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from real_servers import Server, real_server
from service import INHERITED, Corner, Service, wait_until

pytestmark = pytest.mark.real

KEY = os.environ.get("REAL_VLLM_KEY", "test-key")
LONG = {"prompt": "Tell me a long story", "max_tokens": 400, "ignore_eos": True}
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def worker(service: Service, corner: Corner, tmp_path: Path) -> Iterator[Start]:
    """Starts worker processes with these settings; what they logged is shown when a test fails."""
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "worker.log"

    def start(**settings: str) -> subprocess.Popen[str]:
        machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
        url = f"http://127.0.0.1:{service.api.port}"
        own = {"AI_SERVICE_URL": url, "WORKER_SPOOL_DIR": str(tmp_path / "spool"), "WORKER_LEASE_SECONDS": "15"}
        with log.open("a") as stderr:
            command = [sys.executable, "-m", "ai_internal.worker.worker"]
            started.append(subprocess.Popen(command, env={**machine, **own, **settings}, stderr=stderr, text=True))
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(40)
    print(log.read_text()[-6000:] if log.exists() else "no worker was started")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def vllm(folder: Path) -> Iterator[Server]:
    """The fast model."""
    with real_server("VLLM", folder, "/health") as server:
        yield server


@pytest.fixture(scope="module")
def slow_vllm(folder: Path) -> Iterator[Server]:
    """The slow model, ten requests at a time."""
    with real_server("VLLM", folder, "/health", "--max-num-seqs", "10", MODEL="slow") as server:
        yield server


def settings_of(server: Server, corner: Corner, **more: str) -> dict[str, str]:
    profiles = f"{corner.model_profile}=qwen2.5-14b"
    return {"LLM_BASE_URL": server.url, "LLM_API_KEY": KEY, "LLM_PROFILES": profiles, "WORKER_CONCURRENCY": "8", **more}


def all_ended(corner: Corner, jobs: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """The jobs, once the last of them has finished."""

    def unfinished() -> int:
        found = corner.api.post("/api/v1/jobs/get", {"ids": [job["id"] for job in jobs]}).json["jobs"]
        return sum(not job["finished_at"] for job in found)

    wait_until(lambda: unfinished() == 0, seconds, "the end of all jobs")
    return [corner.look(job) for job in jobs]


def test_200_jobs_side_by_side_are_completed_once_each(vllm: Server, corner: Corner, worker: Start) -> None:
    created = corner.batch([{"input": {"prompt": f"Say {number}", "max_tokens": 40}} for number in range(200)])
    before = monotonic()
    worker(**settings_of(vllm, corner))
    jobs = all_ended(corner, created, 300)
    seconds = monotonic() - before
    assert {(job["status"], job["attempt"]) for job in jobs} == {("completed", 1)}
    tokens = sum(job["usage"]["completion_tokens"] for job in jobs)
    assert all(job["usage"]["model"] == "qwen2.5-14b" and job["usage"]["raw"]["prompt_tokens"] > 0 for job in jobs)
    # A model of noise may end before its first visible token.
    first = sorted(job["usage"].get("time_to_first_token_seconds", 0) for job in jobs)
    print(f"\n200 jobs: {seconds:.1f} s, {tokens} tokens, first token after {first[100]:.3f} s, at worst {first[-1]:.3f} s")


def test_cancelling_ten_running_jobs_frees_the_engine(slow_vllm: Server, corner: Corner, worker: Start) -> None:
    created = corner.batch([{"input": LONG} for _ in range(10)])
    worker(**settings_of(slow_vllm, corner, WORKER_CONCURRENCY="10"))
    wait_until(lambda: slow_vllm.gauge("vllm:num_requests_running") == 10, 60, "ten running requests")
    before = monotonic()
    for job in created:
        assert corner.call(job, "cancel").status == 200
    answered = monotonic() - before
    wait_until(lambda: slow_vllm.gauge("vllm:num_requests_running") == 0, 20, "a free engine")
    print(
        f"\ncancelled in {answered:.3f} s, the engine was free {monotonic() - before:.2f} s after the first (a third of the lease is 5 s)"
    )
    assert {corner.look(job)["status"] for job in created} == {"cancelled"}


def test_a_model_slower_than_its_limit_times_out_and_is_freed(slow_vllm: Server, corner: Corner, worker: Start) -> None:
    created = corner.create(input=LONG, max_attempts=2)
    worker(**settings_of(slow_vllm, corner, LLM_TIMEOUT="2s"))
    [job] = all_ended(corner, [created], 90)
    assert (job["status"], job["attempt"], job["error"]["category"]) == ("failed", 2, "timeout")
    assert [error["category"] for error in job["errors"]] == ["timeout", "timeout"]
    assert all(1.9 < error["usage"]["running_seconds"] < 4 for error in job["errors"])
    assert all("prompt_tokens" not in error["usage"] for error in job["errors"]), "vLLM counts at the end only: absent is not zero"
    wait_until(lambda: slow_vllm.gauge("vllm:num_requests_running") == 0, 5, "a free engine")


def test_an_engine_killed_in_the_middle_costs_no_job(folder: Path, corner: Corner, worker: Start) -> None:
    with real_server("VLLM", folder, "/health", MODEL="slow") as engine:
        created = corner.batch([{"input": {"prompt": f"Say {number}", "max_tokens": 60}, "max_attempts": 3} for number in range(40)])
        worker(**settings_of(engine, corner))
        wait_until(lambda: sum(corner.look(job)["status"] == "completed" for job in created[:12]) >= 6, 120, "some results")
        engine.kill()
        before = monotonic()
        engine.start()
        back = monotonic() - before
        jobs = all_ended(corner, created, 300)
    attempts = Counter(job["attempt"] for job in jobs)
    categories = Counter(error["category"] for job in jobs for error in job["errors"])
    print(f"\nengine back after {back:.0f} s, all completed {monotonic() - before:.0f} s after the kill; attempts {attempts}, {categories}")
    assert {job["status"] for job in jobs} == {"completed"}
    assert all(len(job["errors"]) == job["attempt"] - 1 for job in jobs)
    assert sum(count for attempt, count in attempts.items() if attempt > 1) <= 8, "only what was running has lost an attempt"
    assert max(attempts) == 2
    assert set(categories) <= {"unavailable", "internal"}


def test_a_dead_vllm_is_replaced_by_openclaw_and_comes_back(folder: Path, corner: Corner, worker: Start) -> None:
    room = ("--max-model-len", "16384")
    with (
        real_server("VLLM", folder, "/health", *room) as upstream,
        gateway(folder, upstream) as openclaw,
        real_server("VLLM", folder, "/health", *room) as direct,
    ):
        direct.kill()
        worker(
            **settings_of(direct, corner),
            OPENCLAW_URL=openclaw.url,
            OPENCLAW_TOKEN="some-token",
            OPENCLAW_PROFILES=f"{corner.model_profile}=default",
            PROFILE_PROVIDERS=f"{corner.model_profile}=vllm,openclaw",
        )
        asked = {"prompt": "ping", "max_tokens": 16}
        first = all_ended(corner, corner.batch([{"input": asked} for _ in range(10)]), 120)
        print("\nvLLM away:", Counter((job["status"], job["attempt"], job["usage"]["provider"]) for job in first))
        assert {(job["status"], job["attempt"], job["usage"]["provider"]) for job in first} == {("completed", 1, "openclaw")}
        direct.start()
        before = monotonic()
        wait_until(lambda: served_by(corner, asked) == "vllm", 90, "the way back")
        print(f"vLLM there again: it got jobs {monotonic() - before:.1f} s after it answered")


def served_by(corner: Corner, asked: dict[str, Any]) -> str:
    [job] = all_ended(corner, [corner.create(input=asked)], 60)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    return str(job["usage"]["provider"])


def gateway(folder: Path, upstream: Server) -> Any:
    base = f"{upstream.url}/v1"
    return real_server("OPENCLAW", folder, "/readyz", upstream=base, model="qwen2.5-14b", token="some-token", UPSTREAM_API_KEY=KEY)


def test_a_whisperx_killed_in_the_middle_of_a_file_costs_one_attempt(folder: Path, corner: Corner, worker: Start) -> None:
    recordings = os.environ.get("REAL_FIXTURES") or pytest.skip("REAL_FIXTURES names no folder with en.wav")
    with real_server("WHISPERX", folder, "/openapi.json") as server:
        worker(
            WHISPERX_URL=server.url,
            WHISPERX_API_KEY=os.environ.get("REAL_WHISPERX_KEY", "test-key"),
            WHISPERX_PROFILES=corner.model_profile,
            AUDIO_FOLDER=recordings,
            WORKER_CONCURRENCY="2",
        )
        created = corner.batch([{"input": {"audio_path": "en.wav", "language": "en"}} for _ in range(6)])
        wait_until(lambda: any(corner.look(job)["status"] == "completed" for job in created), 60, "a first result")
        server.kill()
        server.start()
        jobs = all_ended(corner, created, 120)
    print("\n", Counter((job["status"], job["attempt"], *[error["category"] for error in job["errors"]]) for job in jobs))
    assert {job["result"]["text"] for job in jobs} == {
        "The meeting starts at nine in the morning. Please send the report before Friday. Our server room is too hot today."
    }
    assert max(job["attempt"] for job in jobs) == 2
    assert sum(job["attempt"] == 2 for job in jobs) <= 2
