"""The log and the terminal: whatever callers, model services and proxies send, an event is one line of printable text."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from fake_service import FakeService, problem
from fake_vllm import fake_vllm
from postgres import connect
from service import MAIN, Corner, Service, wait_until, worker_process

import ai_demo
from ai_client import Job, JobError, RawJSON
from ai_log import LineFormatter, printable

FORGED = "\n2026-01-01 00:00:00,000 ERROR ai_service forged \x1b]0;title\x07\x1b[2J\x9b31m\u202egnp\u2028\r\x08"
EVENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+ .*|  \| .*")


def ill_lines(log: str) -> list[str]:
    """Lines of a log that are neither an event nor part of a traceback, that somebody else made up, or that hold what is not to be seen."""

    def is_good(line: str) -> bool:
        return EVENT.fullmatch(line) is not None and line.isprintable() and "ai_service forged" not in line[:50]

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


def test_nothing_that_a_caller_sends_makes_a_line_of_the_service_s_log(postgres_url: str, start_service: Callable[..., Service]) -> None:
    service = start_service(LOG_LEVEL="DEBUG", API_TOKENS="desk=operator=desk-0123456789abcdef")
    service.api._headers["Authorization"] = "Bearer desk-0123456789abcdef"
    corner, api = Corner(service.api), service.api
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
    service.terminate()
    service.wait()
    assert ill_lines(service.log) == []
    assert "request_failed" in service.log
    assert service.log.count("forged") >= 4


def test_nothing_that_the_service_or_a_proxy_answers_makes_a_line_of_the_worker_s_log(tmp_path: Path) -> None:
    with FakeService() as service, fake_vllm() as model:
        service.always("/claim", problem(503, "service_full", title=FORGED, detail=FORGED))
        with worker_process(int(service.url.rpartition(":")[2]), tmp_path, **model.environ) as log:
            wait_until(lambda: "service_went_away" in log.read_text(), 20)
        assert "forged" in log.read_text()
        assert ill_lines(log.read_text()) == []


def test_nothing_that_a_model_service_answers_reaches_the_terminal_of_check_as_it_is() -> None:
    with fake_vllm(models=(f"other{FORGED}",)) as model:
        environ = {**model.environ, "LLM_MODEL": "ours"}
        check = subprocess.run([sys.executable, str(MAIN), "check"], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert "degraded" in check.stdout
    assert [line for line in check.stdout.split("\n") if not line.isprintable()] == []


def test_what_a_model_says_reaches_the_terminal_of_the_demo_as_printable_text(capsys: pytest.CaptureFixture[str]) -> None:
    error = JobError("internal", FORGED)
    job = Job(id="1", status="failed", owner_service="demo", owner_ref=f"ref{FORGED}", task_type="chat", model_profile="any", error=error)
    ai_demo._print_change(job, 1.0)
    ai_demo._print_table([job, attrs.evolve(job, error=None, raw_result=RawJSON('{"content": "a\\u001b[2Jb"}'))])
    shown = capsys.readouterr().out
    assert shown.count("forged") >= 3
    assert [line for line in shown.split("\n") if not line.isprintable()] == []
