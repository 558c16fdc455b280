"""The log and the terminal: whatever callers, model services and proxies send, an event is one line of printable text."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_service import FakeService, problem
from fake_vllm import fake_vllm
from pg8000.native import DatabaseError
from postgres import EmbeddedServer, connect
from service import MAIN, Api, Corner, Service, running_service, wait_until, worker_process

from ai_client import Job, JobError, RawJSON
from ai_internal.cli import demo
from ai_internal.telemetry import JsonFormatter, LineFormatter, about, event_pattern, log_crash, printable

ROOT = Path(__file__).parent.parent
FORGED = "\n2026-01-01 00:00:00,000 ERROR ai_service forged \x1b]0;title\x07\x1b[2J\x9b31m\u202egnp\u2028\r\x08"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
EVENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+ .*|  \| .*")


def ill_lines(log: str) -> list[str]:
    """Lines of a log that are neither an event nor part of a traceback, that somebody else made up, or that hold what is not to be seen."""

    def is_good(line: str) -> bool:
        return EVENT.fullmatch(line) is not None and line.isprintable() and "ai_service forged" not in line[:50]

    return [line for line in log.split("\n") if line and not is_good(line)]


def ill_json_lines(log: str) -> list[str]:
    """Lines of a log that are no JSON object of an event or a message, or hold what is not to be seen."""

    def is_good(line: str) -> bool:
        try:
            members = json.loads(line)
        except ValueError:
            return False
        known = isinstance(members, dict) and {"time", "level", "logger"} <= set(members) and ("event" in members) != ("message" in members)
        return known and line.isprintable() and TIME.fullmatch(members["time"]) is not None and members["logger"] != "forged"

    return [line for line in log.split("\n") if line and not is_good(line)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31m\x9b\x00\x7f", r"\x1b[31m\x9b\x00\x7f"),
        ("\u202e\u2028\u200b\ufeff", r"\u202e\u2028\u200b\ufeff"),
        ("\ud800", r"\ud800"),
        ("Привет, 世界 – ok \\n", "Привет, 世界 – ok \\n"),
    ],
)
def test_what_is_not_to_be_seen_is_written_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_exception_cannot_pass_for_an_event() -> None:
    try:
        raise ValueError(f"rubbish{FORGED}")  # noqa: TRY301
    except ValueError:
        record = logging.LogRecord("ai_service", logging.ERROR, __file__, 1, "failed with %s", (FORGED,), sys.exc_info())
    lines = LineFormatter("2026-01-01 00:00:00,000 %(levelname)s %(name)s %(message)s").format(record).split("\n")
    assert lines[0].startswith("2026-01-01 00:00:00,000 ERROR ai_service failed with \\n2026")
    assert [line for line in lines[1:] if not line.startswith("  | ")] == []
    assert ill_lines("\n".join(lines[1:])) == []
    assert any("ValueError: rubbish" in line for line in lines)


def as_json(message: Any, *values: Any, error: BaseException | None = None) -> dict[str, Any]:
    """What the JSON of such an event says, beside when and by whom."""
    error_info = (type(error), error, error.__traceback__) if error else None
    record = logging.getLogger("a.logger").makeRecord("a.logger", logging.WARNING, __file__, 1, message, values, error_info)
    line = JsonFormatter().format(record)
    assert line.isprintable()
    members = dict(json.loads(line))
    assert TIME.fullmatch(members.pop("time"))
    assert (members.pop("level"), members.pop("logger")) == ("WARNING", "a.logger")
    return members


def test_the_json_of_an_event_has_its_pairs_as_members() -> None:
    said = as_json("job_ended id=%s n=%d seconds=%.2f path=%r new=%s gone=%s why=tired", "7", 5, 0.12345, "/a b", True, None)
    expected = {"id": "7", "n": 5, "seconds": 0.12, "path": "/a b", "new": True, "gone": None, "why": "tired"}
    assert said == {"event": "job_ended"} | expected
    assert as_json("service_stopped") == {"event": "service_stopped"}
    assert as_json("some_named names=%s other=%s", ["a", "b"], {1: 2}) == {"event": "some_named", "names": ["a", "b"], "other": "{1: 2}"}
    assert as_json("it_took seconds=%.1f", float("inf")) == {"event": "it_took", "seconds": "inf"}
    assert as_json("it_had facts=%s", {"a": 1}) == {"event": "it_had", "facts": "{'a': 1}"}


def test_other_words_than_an_event_s_are_a_message() -> None:
    assert as_json("Task queue depth is %d", 7) == {"message": "Task queue depth is 7"}
    assert as_json("job_lost because of %s", "x") == {"message": "job_lost because of x"}
    assert as_json("two_things a=%s b=%s", "only one") == {"message": "two_things a=%s b=%s"}
    assert as_json(ValueError("an object")) == {"message": "an object"}


def test_nothing_that_is_sent_makes_or_changes_a_member_of_the_json() -> None:
    forged = f'x level=DEBUG", "level": "DEBUG", "logger": "forged {FORGED}'
    assert as_json("event_came text=%s other=%r", forged, forged) == {"event": "event_came", "text": forged, "other": forged}
    assert as_json("a level=%s time=%s event=%s logger=%s", 1, 2, 3, 4) == {"event": "a"}
    with about(id="of the work", request_id="r"):
        assert as_json("event_came id=%s", "7") == {"event": "event_came", "id": "7", "request_id": "r"}
    assert as_json("event_came text=%s", "\ud800\x7f\U000e0001") == {"event": "event_came", "text": "\\ud800\x7f\U000e0001"}


def test_an_exception_is_one_member_of_the_json() -> None:
    try:
        raise ValueError(f"rubbish{FORGED}")  # noqa: TRY301
    except ValueError as error:
        said = as_json("work_failed", error=error)
    assert said["exception"].startswith("Traceback (most recent call last):\n")
    assert said["exception"].endswith(f"ValueError: rubbish{FORGED}")


def log_calls() -> Iterator[tuple[str, str]]:
    """Where events are logged in the source, and the words of each."""
    for path in (*ROOT.glob("ai_*.py"), *ROOT.glob("ai_internal/**/*.py"), *ROOT.glob("providers/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            words = [each.value for each in getattr(node, "args", ()) if isinstance(each, ast.Constant)] if is_log_call(node) else []
            yield from ((f"{path.name}:{node.lineno}", text) for text in words[:1] if isinstance(text, str))


def is_log_call(node: ast.AST) -> bool:
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return re.fullmatch(r"(log|audit|requests_log)\.(?!isEnabledFor|setLevel)\w+|log_crash|log_job", called) is not None


def test_every_event_of_the_source_has_a_name_and_pairs_and_no_reserved_member() -> None:
    calls = list(log_calls())
    ill = [
        (at, words) for at, words in calls if not (pattern := event_pattern(words)) or {"time", "level", "logger"} & dict(pattern[1]).keys()
    ]
    assert ill == []
    assert len(calls) > 40


@pytest.mark.parametrize(("log_format", "ill"), [("text", ill_lines), ("json", ill_json_lines)])
def test_nothing_that_a_caller_sends_makes_a_line_of_the_service_s_log(
    postgres_url: str, start_service: Callable[..., Service], log_format: str, ill: Callable[[str], list[str]]
) -> None:
    token = "desk-0123456789abcdef"
    service = start_service(LOG_FORMAT=log_format, LOG_LEVEL="DEBUG", LOG_REQUESTS="true", API_TOKENS=f"desk=operator={token}")
    api = Api(service.api.port, token)
    corner = Corner(api)
    job = corner.create(owner_ref=FORGED.replace("\x00", ""), input=FORGED)
    api.post("/api/v1/jobs/claim", corner.claiming(worker_id=FORGED, worker={"version": FORGED}))
    quoted = "%0a2026-01-01%2000:00:00,000%20ERROR%20ai_service%20forged%1b%5b2J"
    for path in (f"/{quoted}", f"/api/v1/jobs/{quoted}/cancel", f"/api/v1/jobs/{quoted}"):
        api.post(path, {})
        api.delete(path)
    # Our own mistake, in whose message a caller's text stands.
    database = connect(postgres_url, service.schema)
    database.run(
        "create or replace function cancel_job_v1(of_job uuid, reason text) returns text language plpgsql as "
        "$$ begin raise exception 'broken by %', reason; end $$"
    )
    database.close()
    assert api.post(f"/api/v1/jobs/{job['id']}/cancel", {"reason": FORGED}).code == "internal_error"
    api.raw(f"{quoted} {FORGED}\r\nX-Request-ID: {quoted}\r\n\r\n".encode())
    service.terminate()
    service.wait()
    assert ill(service.log) == []
    assert "request_failed" in service.log
    assert "request_answered" in service.log
    assert service.log.count("forged") >= 4


@pytest.mark.parametrize(("log_format", "ill"), [("text", ill_lines), ("json", ill_json_lines)])
def test_nothing_that_the_service_or_a_proxy_answers_makes_a_line_of_the_worker_s_log(
    tmp_path: Path, log_format: str, ill: Callable[[str], list[str]]
) -> None:
    with FakeService() as service, fake_vllm() as model:
        service.always("/claim", problem(503, "service_full", title=FORGED, detail=FORGED))
        with worker_process(int(service.url.rpartition(":")[2]), tmp_path, LOG_FORMAT=log_format, **model.environ) as log:
            wait_until(lambda: "service_went_away" in log.read_text(), 20)
        assert "forged" in log.read_text()
        assert ill(log.read_text()) == []


@pytest.mark.long
def test_every_line_of_a_service_is_json_though_its_database_crashes_and_until_its_end() -> None:
    with EmbeddedServer().running() as server, running_service(server.url, "ai_service", LOG_FORMAT="json", DRAIN_SECONDS="0.1") as service:
        corner = Corner(service.api)
        corner.create()
        service.api.post("/api/v1/jobs", body=b"{")
        server.stop("immediate")
        wait_until(lambda: corner.api.post("/api/v1/jobs", corner.job()).status == 503)
        wait_until(lambda: "upkeep_waits" in service.log)
        service.terminate()
        assert service.wait() == 0
        assert ill_json_lines(service.log) == []
        events = [json.loads(line)["event"] for line in service.lines]
    assert events[:3] == ["schema_applied", "access_open", "service_started"]
    assert events[-2:] == ["service_draining", "service_stopped"]


def test_every_line_of_a_worker_is_json_until_its_end(tmp_path: Path) -> None:
    with FakeService() as service, fake_vllm() as model:
        own = {"AI_SERVICE_URL": service.url, "WORKER_SPOOL_DIR": str(tmp_path), "LOG_FORMAT": "json", "WORKER_DRAIN_SECONDS": "0"}
        process = subprocess.Popen([sys.executable, str(MAIN), "worker"], env={**model.environ, **own}, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: service.seen, 20, "a claim")
        process.terminate()
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 0
    assert ill_json_lines(said) == []
    events = [json.loads(line)["event"] for line in said.splitlines()]
    assert (events[0], events[-1]) == ("worker_started", "worker_stopped")


def ended_with(status: int, *arguments: str, **environ: str) -> str:
    """What a command says on stderr that ends with this status."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["serve", "check", "worker"])
def test_settings_that_cannot_be_used_are_told_in_the_format_that_was_asked_for(command: str) -> None:
    environ = {
        "DATABASE_URL": "postgresql://user@127.0.0.1:1/none",
        "HTTP_PORT": "x",
        "WORKER_CONCURRENCY": "x",
        "LLM_BASE_URL": "http://x",
    }
    [line] = ended_with(2, str(MAIN), command, **environ, LOG_FORMAT="json").splitlines()
    refused = json.loads(line)
    assert ill_json_lines(line) == []
    assert (refused["event"], refused["level"]) == ("command_refused", "ERROR")
    [problem] = refused["problems"]
    told = ended_with(2, str(MAIN), command, **environ).splitlines()
    assert told == [refused["reason"] + ":", f"  - {problem}"]


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_format_of_the_log_that_is_none_stops_the_start(command: str) -> None:
    environ = {"DATABASE_URL": "postgresql://user@127.0.0.1:1/none", "LLM_BASE_URL": "http://x", "LOG_FORMAT": "xml"}
    assert ended_with(2, str(MAIN), command, **environ).splitlines()[1:] == ["  - LOG_FORMAT: must be text or json"]


def test_what_ends_a_process_or_a_thread_and_warnings_are_events() -> None:
    script = """
        import threading, warnings, logging
        from ai_internal import telemetry
        telemetry.log_to_stderr()
        warnings.warn("something\\nis old")
        thread = threading.Thread(target=lambda: 1 / 0, name="poor")
        thread.start()
        thread.join()
        logging.getLogger("waitress").warning("Task queue depth is %d", 3)
        raise OSError("all over\\nforged")
    """
    said = ended_with(1, "-c", textwrap.dedent(script), LOG_FORMAT="json")
    assert ill_json_lines(said) == []
    told = [json.loads(line) for line in said.splitlines()]
    assert [each.get("event", each["logger"]) for each in told] == ["py.warnings", "thread_broke", "waitress", "process_broke"]
    assert told[1]["thread"] == "poor"
    assert "ZeroDivisionError" in told[1]["exception"]
    assert told[3]["exception"].endswith("OSError: all over\nforged")
    assert ill_lines(ended_with(1, "-c", textwrap.dedent(script))) == []


def test_nothing_that_a_model_service_answers_reaches_the_terminal_of_check_as_it_is() -> None:
    with fake_vllm(models=(f"other{FORGED}",)) as model:
        environ = {**model.environ, "LLM_MODEL": "ours"}
        check = subprocess.run([sys.executable, str(MAIN), "check"], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert "degraded" in check.stdout
    assert [line for line in check.stdout.split("\n") if not line.isprintable()] == []


def test_what_a_model_says_reaches_the_terminal_of_the_demo_as_printable_text(capsys: pytest.CaptureFixture[str]) -> None:
    error = JobError("internal", FORGED)
    job = Job(id="1", status="failed", owner_service="demo", owner_ref=f"ref{FORGED}", task_type="chat", model_profile="any", error=error)
    demo.print_change(job, 1.0)
    demo.print_results([job, attrs.evolve(job, error=None, raw_result=RawJSON('{"content": "a\\u001b[2Jb"}'))])
    shown = capsys.readouterr().out
    assert shown.count("forged") >= 3
    assert [line for line in shown.split("\n") if not line.isprintable()] == []


def test_a_crash_in_the_database_shows_no_row_and_any_other_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"S": "ERROR", "C": "23505", "M": "duplicate key", "D": "Key (input)=(my-payload) already exists."}
    for error in (DatabaseError(fields), ZeroDivisionError("by 0"), ValueError()):
        log_crash(logging.getLogger("ai_service"), "upkeep_failed step=%s", error, "fold")
    in_database, elsewhere, without_words = caplog.records
    assert in_database.getMessage() == "upkeep_failed step=fold sqlstate=23505 error='duplicate key'"
    assert in_database.exc_info is None
    assert [record.getMessage() for record in (elsewhere, without_words)] == 2 * ["upkeep_failed step=fold"]
    assert elsewhere.exc_info is not None
    assert elsewhere.exc_info[1] is not None
    assert "my-payload" not in caplog.text
