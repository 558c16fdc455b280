"""The programs under examples/ do what they are shown for, as processes of their own against a real service: callers, then workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from fake_service import FakeService, forwards_and, loses
from postgres import Sql
from service import INHERITED, MAIN, Api, Corner, Service, program, wait_until

pytestmark = pytest.mark.long

EXAMPLES = MAIN.parent / "examples"
CALLERS = {
    "caller.py": [sys.executable, str(EXAMPLES / "caller" / "caller.py")],
    "caller.sh": [str(EXAMPLES / "caller" / "caller.sh")],
}
BEFORE, AFTER = ([sys.executable, str(EXAMPLES / "hand-written-worker" / name)] for name in ("before.py", "after.py"))
# What a shell, a JSON string and a query must not stumble over.
AWKWARD = "\"quoted\" 'too' \\ $(exit 9) `exit 9` & ? % {} é 🎈\n\tline two"


def url_of(place: Corner | FakeService) -> str:
    return place.url if isinstance(place, FakeService) else f"http://127.0.0.1:{place.api.port}"


def environment(place: Corner | FakeService, **settings: str) -> dict[str, str]:
    machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**machine, "PYTHONPATH": str(MAIN.parent), "AI_SERVICE_URL": url_of(place), **settings}


@contextmanager
def running(command: list[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the end if it has not ended by itself."""
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    """What an ended process wrote to its output and its error output."""
    output, errors = process.communicate(timeout=20)
    assert process.returncode == status, output + errors
    return output, errors


# ---------------------------------------------------------------- callers


@pytest.fixture(params=CALLERS)
def call(request: pytest.FixtureRequest, corner: Corner) -> Callable[..., Any]:
    """Starts a caller in this corner's profile; by its words and settings."""
    program("jq", "jq"), program("curl", "curl")
    settings = {"LLM_MODEL": corner.model_profile, "RETRY_SECONDS": "0"}
    return lambda *words, place=corner, **more: running([*CALLERS[request.param], *words], environment(place, **{**settings, **more}))


def test_a_caller_prints_the_result_and_the_second_call_finds_the_same_job(corner: Corner, call: Callable[..., Any]) -> None:
    reference = f"beeline/{corner.mark}"
    with call(reference, AWKWARD) as process:
        [job] = corner.claim(wait_seconds=20)
        corner.done(job, "complete", result={"content": AWKWARD})
        output, _ = said(process, 0)
    assert json.loads(output) == {"content": AWKWARD}
    assert (job["owner_ref"], job["input"]) == (reference, {"prompt": AWKWARD})
    with call(reference, AWKWARD) as process:
        assert said(process, 0)[0] == output
    assert corner.claim() == []


def test_a_caller_tells_why_its_job_failed(corner: Corner, call: Callable[..., Any]) -> None:
    with call(f"failing/{corner.mark}", "text") as process:
        [job] = corner.claim(wait_seconds=20)
        corner.done(job, "fail", category="invalid_input", message="no text in it")
        assert f"job {job['id']} failed: invalid_input, no text in it" in said(process, 1)[1]


def test_a_caller_tells_that_its_job_was_cancelled(corner: Corner, call: Callable[..., Any]) -> None:
    with call(f"cancelled/{corner.mark}", "text") as process:
        [job] = corner.claim(wait_seconds=20)
        corner.done(job, "cancel", reason="no longer wanted")
        assert f"job {job['id']} cancelled: cancelled, no longer wanted" in said(process, 1)[1]


def test_a_caller_whose_answer_got_lost_repeats_and_makes_one_job(corner: Corner, call: Callable[..., Any]) -> None:
    with FakeService(forward_to=corner.api.port) as between:
        between.behave("/jobs", forwards_and(loses()))
        with call(f"lost/{corner.mark}", "text", place=between, RETRY_SECONDS="20") as process:
            [job] = corner.claim(wait_seconds=20)
            corner.done(job, "complete", result=1)
            said(process, 0)
    assert len(between.asked("/jobs")) == 2
    assert corner.claim() == []


def test_a_caller_tells_trouble_by_its_exit_status(corner: Corner, call: Callable[..., Any]) -> None:
    with call("r" * 501, "text") as process:
        assert "/owner_ref" in said(process, 2)[1]
    with call(f"late/{corner.mark}", "text", TIMEOUT_SECONDS="0") as process:
        said(process, 4)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with call("reference", "text", AI_SERVICE_URL=address) as process:
        said(process, 3)
    with call("only one word") as process:
        assert "usage" in said(process, 2)[1]


# ---------------------------------------------------------------- a worker in Node


@pytest.fixture
def start_worker(corner: Corner) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Node workers of this corner's profile, with the shortest lease."""
    command = [program("node", "nodejs"), str(EXAMPLES / "worker-node" / "worker.mjs")]
    settings = {"MODEL_PROFILES": corner.model_profile, "LEASE_SECONDS": "5", "WAIT_SECONDS": "1"}
    with ExitStack() as stack:
        yield lambda place=corner, **more: stack.enter_context(running(command, environment(place, **{**settings, **more})))


def ended(corner: Corner, job: Mapping[str, Any], seconds: float = 20) -> dict[str, Any]:
    """The job once it has finished."""
    return dict(wait_until(lambda: found if (found := corner.look(job))["finished_at"] else None, seconds, "the end of the job"))


def started(corner: Corner, job: Mapping[str, Any], attempt: int = 1) -> None:
    wait_until(lambda: corner.look(job)["attempt"] == attempt and corner.look(job)["status"] == "running", 20, f"attempt {attempt}")


def test_the_node_worker_runs_jobs_side_by_side_and_fails_ill_ones(corner: Corner, start_worker: Callable[..., Any]) -> None:
    jobs = corner.batch([{"input": {"text": f"job {number}", "milliseconds": 400}} for number in range(4)] + [{"input": None}])
    start_worker(CONCURRENCY="5")
    *done, ill = [ended(corner, job) for job in jobs]
    assert [job["result"] for job in done] == [{"text": f"JOB {number}"} for number in range(4)]
    assert max(job["started_at"] for job in done) < min(job["finished_at"] for job in done)
    assert (ill["status"], ill["attempt"], ill["error"]["category"]) == ("failed", 1, "invalid_input")


def test_the_node_worker_stops_a_cancelled_job_and_takes_the_next(corner: Corner, start_worker: Callable[..., Any]) -> None:
    long = corner.create(input={"text": "long", "milliseconds": 60_000})
    process = start_worker(CONCURRENCY="1")
    started(corner, long)
    corner.done(long, "cancel")
    assert ended(corner, corner.create(input={"text": "next"}))["result"] == {"text": "NEXT"}
    process.terminate()
    assert f"job {long['id']} attempt 1: job_cancelled" in said(process, 0)[1]


def test_the_node_worker_keeps_a_lease_alive_while_it_works(corner: Corner, start_worker: Callable[..., Any]) -> None:
    job = corner.create(input={"text": "long", "milliseconds": 60_000})
    start_worker()
    started(corner, job)
    first = corner.look(job)["lease_expires_at"]
    wait_until(lambda: corner.look(job)["lease_expires_at"] > first, 4, "an extended lease")
    assert corner.look(job)["attempt"] == 1


def test_the_node_worker_gives_its_jobs_back_on_sigterm(corner: Corner, start_worker: Callable[..., Any]) -> None:
    job = corner.create(input={"text": "long", "milliseconds": 60_000})
    process = start_worker(CONCURRENCY="1")
    started(corner, job)
    process.terminate()
    said(process, 0)
    given_back = corner.look(job)
    assert (given_back["status"], given_back["attempt"], given_back["errors"]) == ("pending", 0, [])


def test_a_job_of_a_node_worker_that_was_killed_has_a_second_attempt(corner: Corner, start_worker: Callable[..., Any], sql: Sql) -> None:
    job = corner.create(input={"text": "again", "milliseconds": 600})
    process = start_worker()
    started(corner, job)
    process.kill()
    said(process, -signal.SIGKILL)
    sql("update held set lease_expires_at = now() where job_id = cast(:id as uuid)", id=job["id"])
    start_worker()
    done = ended(corner, job, 30)
    assert (done["attempt"], done["result"]) == (2, {"text": "AGAIN"})
    assert [error["category"] for error in done["errors"]] == ["lease_expired"]


def test_the_node_worker_survives_lost_answers_without_a_second_attempt(corner: Corner, start_worker: Callable[..., Any]) -> None:
    jobs = corner.batch([{"input": {"text": "one"}}, {"input": {"text": "two"}}])
    with FakeService(forward_to=corner.api.port) as between:
        between.behave("/jobs/claim", forwards_and(loses()))
        between.behave("/complete", forwards_and(loses()), loses())
        start_worker(place=between)
        done = [ended(corner, job) for job in jobs]
        wait_until(lambda: len(between.asked("/complete")) >= 4, what="the repeats")
    assert [(job["attempt"], job["status"], job["errors"]) for job in done] == [(1, "completed", [])] * 2
    first, second, *_ = (seen.json["claim_id"] for seen in between.asked("/jobs/claim"))
    assert first == second


def test_the_node_worker_goes_on_after_a_restart_of_the_service(
    start_service: Callable[..., Service], start_worker: Callable[..., Any]
) -> None:
    service = start_service()
    corner = Corner(service.api)
    job = corner.create(input={"text": "patient", "milliseconds": 1000})
    process = start_worker(place=corner, MODEL_PROFILES=corner.model_profile)
    started(corner, job)
    service.kill()
    again = corner.through(start_service(HTTP_PORT=str(service.api.port)).api)
    done = ended(again, job)
    assert (done["attempt"], done["result"]) == (1, {"text": "PATIENT"})
    assert ended(again, again.create(input={"text": "next"}))["result"] == {"text": "NEXT"}
    process.terminate()
    said(process, 0)


def test_the_node_worker_ends_with_a_word_where_it_may_not_claim(
    start_service: Callable[..., Service], start_worker: Callable[..., Any]
) -> None:
    service = start_service(API_TOKENS="gpu=worker=the-secret-of-the-worker; desk=operator=the-secret-of-the-desk")
    corner = Corner(Api(service.api.port, "the-secret-of-the-desk"))
    process = start_worker(place=corner, AI_SERVICE_TOKEN="some-other-secret-word")
    assert "no claim: 401 unauthorized" in said(process, 1)[1]
    start_worker(place=corner, AI_SERVICE_TOKEN="the-secret-of-the-worker", MODEL_PROFILES=corner.model_profile)
    assert ended(corner, corner.create(input={"text": "allowed"}))["result"] == {"text": "ALLOWED"}
    corner.api.close()


# ---------------------------------------------------------------- from a hand-written worker to a claim


def test_a_worker_that_completes_without_a_claim_is_told_what_it_lacks(corner: Corner) -> None:
    job = corner.create(input={"text": "hello"})
    with running([*BEFORE, corner.model_profile], environment(corner)) as process:
        errors = said(process, 1)[1]
    assert errors.startswith("422: ")
    assert {"path": "/claim_id", "message": "is required"} in json.loads(errors.removeprefix("422: "))["errors"]
    assert (corner.look(job)["status"], corner.look(job)["result"]) == ("pending", None)


def test_two_of_the_workers_with_a_claim_share_the_work(corner: Corner) -> None:
    jobs = corner.batch([{"input": {"text": "x" * number, "seconds": 0.2}} for number in range(6)] + [{"input": {}}])
    command, environ = [*AFTER, corner.model_profile], environment(corner)
    with running(command, environ), running(command, environ):
        done = [ended(corner, job) for job in jobs[:6]]
        wait_until(lambda: corner.look(jobs[6])["errors"], what="the failure of the ill job")
    assert [(job["attempt"], job["result"]) for job in done] == [(1, {"length": number}) for number in range(6)]
    assert len({job["worker_id"] for job in done}) == 2
    assert corner.look(jobs[6])["errors"][0]["message"].startswith("KeyError: ")


def test_the_worker_with_a_claim_keeps_its_lease_and_ends_with_its_job_on_sigterm(corner: Corner) -> None:
    job = corner.create(input={"text": "long", "seconds": 3})
    with running([*AFTER, corner.model_profile], environment(corner, LEASE_SECONDS="5")) as process:
        started(corner, job)
        first = corner.look(job)["lease_expires_at"]
        wait_until(lambda: corner.look(job)["lease_expires_at"] > first, 4, "an extended lease")
        process.terminate()
        said(process, 0)
    assert (corner.look(job)["status"], corner.look(job)["attempt"]) == ("completed", 1)


def test_the_worker_with_a_claim_hears_that_its_job_was_cancelled(corner: Corner) -> None:
    job = corner.create(input={"text": "long", "seconds": 1})
    with running([*AFTER, corner.model_profile], environment(corner)) as process:
        started(corner, job)
        corner.done(job, "cancel")
        process.terminate()
        assert f"job {job['id']}: job_cancelled" in said(process, 0)[1]
