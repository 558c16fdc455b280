"""The worker: what it claims, what it reports, and that no finished result is lost whatever dies in between.

First with a provider of the test and the worker in a thread, then the outcomes on disk, then with real processes.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from uuid import uuid4

import attrs
import pytest
from fake_service import FakeService, answers, forwards, forwards_and, hangs, loses, problem
from fake_vllm import fake_vllm
from postgres import Sql
from service import INHERITED, MAIN, Corner, Service, wait_until

from ai_client import AIService, RawJSON, object_text
from ai_internal.worker.spool import MAX_UNDELIVERED, Delivery, Outcome, ServiceState, Spool, SpoolFull
from ai_internal.worker.worker import OVERDUE_SECONDS, Settings, Worker
from providers import GROUP, Health, InstalledProvider, Job, Never, NotNow, Result, SettingsError, Unsupported

# ---------------------------------------------------------------- a worker in a thread


class Script:
    """A provider that does what the test says, and remembers the jobs it got."""

    def __init__(self, profile: str, run: Callable[[Job], Result], name: str = "listed") -> None:
        self.name = name
        self.model_profiles = (profile,)
        self.health = Health("ok", "as new")
        self.jobs: list[Job] = []
        self.most_at_once = 0
        self._at_once = 0
        self._run = run
        self._lock = threading.Lock()

    def check(self) -> Health:
        return self.health

    def run(self, job: Job) -> Result:
        with self._lock:
            self.jobs.append(job)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._run(job)
        finally:
            with self._lock:
                self._at_once -= 1


@attrs.define
class Work:
    """Starts workers for the profile of a corner, each in a thread."""

    service: Service
    corner: Corner
    spool_dir: Path
    started: list[tuple[Worker, Future[int]]] = attrs.field(factory=list)

    def __call__(
        self, run: Callable[[Job], Result], url: str = "", fallback: Callable[[Job], Result] | None = None, **settings: Any
    ) -> tuple[Worker, Script]:
        provider = Script(self.corner.model_profile, run)
        fallbacks = [Script(self.corner.model_profile, fallback, "fallback")] if fallback else []
        known = {"url": url or url_of(self.service), "spool_dir": self.spool_dir, "drain_seconds": 0.2, **settings}
        worker = worker_of(Settings(**known), provider, *fallbacks)
        status = Future[int]()
        threading.Thread(target=lambda: status.set_result(worker.run()), daemon=True).start()
        self.started.append((worker, status))
        return worker, provider

    def status(self, worker: Worker, seconds: float = 15) -> int:
        """The exit status of a worker that ends within this time."""
        [status] = [status for one, status in self.started if one is worker]
        return status.result(seconds)


@pytest.fixture
def work(service: Service, corner: Corner, tmp_path: Path) -> Iterator[Work]:
    """Workers that are stopped at the end, and must have ended well unless the test has seen their end."""
    work = Work(service, corner, tmp_path / "spool")
    yield work
    for worker, status in work.started:
        if not status.done():
            worker.stop()
            assert work.status(worker) == 0


def worker_of(settings: Settings, *scripts: Script) -> Worker:
    """A worker whose one profile is served by these, in this order."""
    spool = Spool(settings.spool_dir, settings.url, settings.spool_max_bytes)
    spool.open()
    route = tuple(InstalledProvider(name=script.name, origin="test:Script", provider=script) for script in scripts)
    return Worker(settings, {scripts[0].model_profiles[0]: route}, spool)


def url_of(service: Service) -> str:
    return f"http://127.0.0.1:{service.api.port}"


def echo(job: Job) -> Result:
    return Result({"echo": job.input})


def until_cancelled(job: Job) -> Result:
    assert job.cancelled.wait(30)
    raise NotNow("cancelled", "stopped", burns_attempt=False)


def raises(error: BaseException) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        raise error

    return run


def ended(corner: Corner, job: Mapping[str, Any]) -> dict[str, Any]:
    """The job, once it has finished."""
    return dict(wait_until(lambda: finished(corner.look(job)), what="the end of the job"))


def finished(job: dict[str, Any]) -> dict[str, Any] | None:
    return job if job["finished_at"] else None


def status_is(corner: Corner, job: Mapping[str, Any], status: str, seconds: float = 10) -> dict[str, Any]:
    """The job, once it has this status."""
    wait_until(lambda: corner.look(job)["status"] == status, seconds, f"status {status}")
    return corner.look(job)


def test_a_job_is_claimed_run_and_completed(corner: Corner, work: Work, tmp_path: Path) -> None:
    created = corner.create(input={"n": 1.5}, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    worker, provider = work(lambda job: Result({"echo": job.input}, {"total_tokens": 7}))
    job = ended(corner, created)
    assert (job["status"], job["result"]) == ("completed", {"echo": {"n": 1.5}})
    assert job["usage"].pop("running_seconds") >= 0
    assert job["usage"] == {"total_tokens": 7, "provider": "listed"}
    assert job["worker_id"] == worker.worker_id
    [seen] = provider.jobs
    assert (seen.id, seen.attempt, seen.max_attempts) == (created["id"], 1, 3)
    assert re.fullmatch("00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-01", seen.traceparent or "")
    assert seen.traceparent != created["traceparent"]
    wait_until(lambda: not list((tmp_path / "spool").iterdir()), what="an empty spool")


def test_the_log_has_one_line_per_job_without_its_payload(corner: Corner, work: Work, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ai_service")
    created = corner.create(input={"text": "my-payload"})
    work(echo)
    ended(corner, created)
    wait_until(lambda: created["id"] in caplog.text, what="the line")
    [line] = [record.message for record in caplog.records if created["id"] in record.message]
    assert line.startswith(f"job_completed id={created['id']} task_type={corner.task_type} ")
    assert "seconds=" in line
    assert "my-payload" not in caplog.text


def test_jobs_run_side_by_side_but_never_more_than_fit(service: Service, corner: Corner, work: Work) -> None:
    created = corner.batch([{} for _ in range(10)])
    together = threading.Barrier(2)

    def run(job: Job) -> Result:
        together.wait(10)
        return Result(1)

    with FakeService(forward_to=service.api.port) as between:
        _, provider = work(run, url=between.url, concurrency=2)
        assert all(ended(corner, job)["status"] == "completed" for job in created)
        assert max(seen.json["limit"] for seen in between.asked("/jobs/claim")) == 2
    assert (provider.most_at_once, len(provider.jobs)) == (2, 10)
    assert {job.attempt for job in provider.jobs} == {1}


def test_it_claims_only_the_profiles_it_serves(corner: Corner, work: Work) -> None:
    other = corner.create(model_profile=f"{corner.model_profile}-other")
    mine = corner.create()
    _, provider = work(echo)
    ended(corner, mine)
    assert corner.look(other)["status"] == "pending"
    assert [job.id for job in provider.jobs] == [mine["id"]]


# outcome of the provider → status, category of the last error, attempts that failed
OUTCOMES = [
    (Never("invalid_input", "no audio"), "failed", "invalid_input", "no audio"),
    (NotNow("timeout", "too slow", retry_in_seconds=3600), "pending", "timeout", "too slow"),
    (NotNow("unavailable", "bad \0\ud800"), "pending", "unavailable", "bad ?"),
    (Never("invalid_input", ValueError("no audio")), "failed", "invalid_input", "no audio"),  # type: ignore[arg-type]
    (ValueError("my-payload"), "pending", "internal", "the provider raised ValueError at test_worker.py:"),
    (SystemExit("my-payload"), "pending", "internal", "the provider raised SystemExit at test_worker.py:"),
]


@pytest.mark.parametrize(("error", "status", "category", "message"), OUTCOMES)
def test_every_way_a_run_ends_is_reported(
    corner: Corner, work: Work, error: BaseException, status: str, category: str, message: str
) -> None:
    created = corner.create()
    work(raises(error))
    job = wait_until(lambda: found if (found := corner.look(created))["errors"] else None, what="the error")
    assert (job["status"], job["errors"][0]["category"], job["attempt"]) == (status, category, 1)
    assert job["errors"][0]["message"].startswith(message)
    assert "my-payload" not in job["errors"][0]["message"]


def test_the_usage_of_a_failed_attempt_is_reported(corner: Corner, work: Work) -> None:
    created = corner.create()
    work(raises(Never("truncated", "cut", usage={"total_tokens": 9})))
    usage = ended(corner, created)["errors"][0]["usage"]
    assert usage.pop("running_seconds") >= 0
    assert usage == {"total_tokens": 9, "provider": "listed"}


@pytest.mark.parametrize("value", [math.nan, {"a": object()}, "\ud800", 10**5000], ids=["nan", "object", "surrogate", "long"])
def test_a_result_that_is_no_json_is_a_failed_attempt(corner: Corner, work: Work, value: Any) -> None:
    created = corner.create(max_attempts=1)
    work(lambda job: Result(value))
    assert ended(corner, created)["error"]["category"] == "invalid_output"


def test_what_is_no_result_is_a_failed_attempt(corner: Corner, work: Work) -> None:
    created = corner.create(max_attempts=1)
    work(lambda job: {"text": "hello"})
    assert ended(corner, created)["error"]["message"].startswith("the provider raised TypeError")


@pytest.mark.parametrize("usage", [{"text": "x" * 5000}, {"cost": math.nan}, [1]])
def test_usage_that_the_service_would_refuse_does_not_cost_the_result(corner: Corner, work: Work, usage: Any) -> None:
    created = corner.create()
    work(lambda job: Result("fine", usage))
    job = ended(corner, created)
    assert (job["status"], job["result"], set(job["usage"])) == ("completed", "fine", {"provider", "running_seconds"})


def test_the_raw_usage_goes_first_where_usage_is_too_large(corner: Corner, work: Work) -> None:
    created = corner.create()
    work(lambda job: Result("fine", {"total_tokens": 9, "raw": {"long": "x" * 5000}}))
    assert set(ended(corner, created)["usage"]) == {"total_tokens", "provider", "running_seconds"}


def test_a_result_that_the_service_refuses_fails_the_job_once(corner: Corner, work: Work) -> None:
    deep: Any = 1
    for _ in range(600):
        deep = [deep]
    created = corner.create()
    _, provider = work(lambda job: Result(deep))
    job = ended(corner, created)
    assert (job["status"], job["error"]["category"]) == ("failed", "invalid_output")
    assert "too_deep" in job["error"]["message"]
    assert len(provider.jobs) == 1


def test_one_result_that_a_proxy_lets_never_through_does_not_stop_the_worker(corner: Corner, work: Work, between: FakeService) -> None:
    poison = corner.create()
    between.always(f"/{poison['id']}/complete", problem(504, "gateway_timeout"))
    work(echo, url=between.url)
    between.wait_for("/complete", 2)
    assert ended(corner, corner.create())["status"] == "completed"
    assert corner.look(poison)["status"] == "running"


def test_a_result_larger_than_the_service_takes_fails_the_job_once(
    start_service: Callable[..., Service], work: Work, corner: Corner
) -> None:
    small = start_service(MAX_BODY_BYTES="100000")
    there = Corner(small.api)
    created = there.create(model_profile=corner.model_profile)
    _, provider = work(lambda job: Result("x" * 30_000_000), url=url_of(small))
    job = ended(there, created)
    assert (job["status"], job["error"]["category"]) == ("failed", "invalid_output")
    assert len(provider.jobs) == 1


def test_an_input_that_python_refuses_fails_its_job_alone(corner: Corner, work: Work) -> None:
    poison = corner.api.post("/api/v1/jobs", body=body_with_input(corner, "7" * 5000)).json
    good = corner.create()
    work(echo)
    assert ended(corner, poison)["error"]["category"] == "invalid_input"
    assert ended(corner, good)["status"] == "completed"


def body_with_input(corner: Corner, text: str) -> bytes:
    return object_text({**corner.job(), "input": RawJSON(text)}).encode()


def test_a_provider_that_took_no_work_gives_the_job_back_and_rests(corner: Corner, work: Work) -> None:
    created = corner.create()
    gone = NotNow("unavailable", "connection refused", retry_in_seconds=1, burns_attempt=False)
    answers_of_provider = iter([gone, gone])

    def run(job: Job) -> Result:
        if error := next(answers_of_provider, None):
            raise error
        return Result("at last")

    _, provider = work(run)
    job = ended(corner, created)
    assert (job["status"], job["attempt"], job["errors"]) == ("completed", 1, [])
    assert len(provider.jobs) == 3


def test_jobs_of_a_resting_provider_stay_pending(corner: Corner, work: Work, service: Service) -> None:
    created = corner.batch([{}, {}, {}])
    with FakeService(forward_to=service.api.port) as between:
        _, provider = work(raises(NotNow("unauthorized", "wrong key", burns_attempt=False)), url=between.url, concurrency=1)
        between.wait_for("/release")
        provider.health = Health("unavailable", "wrong key")
        wait_until(lambda: {corner.look(job)["status"] for job in created} == {"pending"}, what="all pending")
    assert len(provider.jobs) == 1


def test_jobs_side_by_side_that_meet_one_outage_make_one_short_rest(corner: Corner, work: Work, between: FakeService) -> None:
    corner.batch([{} for _ in range(4)])
    together = threading.Barrier(4)

    def run(job: Job) -> Result:
        together.wait(10)
        raise NotNow("unavailable", "connection refused", burns_attempt=False)

    work(run, url=between.url)
    between.wait_for("/release", 4)
    assert all(seen.json["delay_seconds"] <= 2 for seen in between.asked("/release")[:4])


GONE = NotNow("unavailable", "connection refused", burns_attempt=False)


def test_a_job_that_the_first_provider_refuses_goes_to_the_fallback_in_the_same_attempt(corner: Corner, work: Work) -> None:
    created = corner.create()
    _, first = work(raises(GONE), fallback=lambda job: Result("from the fallback"))
    job = ended(corner, created)
    assert (job["result"], job["attempt"], job["errors"], len(first.jobs)) == ("from the fallback", 1, [], 1)
    assert job["usage"]["provider"] == "fallback"


def test_a_job_comes_back_to_the_first_provider_once_that_works_again(corner: Corner, work: Work) -> None:
    answers_of_first = iter([GONE])

    def first(job: Job) -> Result:
        if error := next(answers_of_first, None):
            raise error
        return Result("from the first")

    work(first, fallback=lambda job: Result("from the fallback"))
    assert ended(corner, corner.create())["result"] == "from the fallback"
    assert wait_until(lambda: ended(corner, corner.create())["result"] == "from the first", what="the way back")


def test_an_attempt_that_did_some_work_is_not_repeated_by_the_fallback(corner: Corner, work: Work) -> None:
    created = corner.create(max_attempts=1)
    never_asked: list[Job] = []
    work(raises(NotNow("unavailable", "the connection broke")), fallback=lambda job: Result(never_asked.append(job)))
    assert ended(corner, created)["error"]["category"] == "unavailable"
    assert never_asked == []


def test_what_one_provider_cannot_do_another_one_does(corner: Corner, work: Work) -> None:
    created = corner.create()
    work(raises(Unsupported("no tools here")), fallback=lambda job: Result("from the fallback"))
    assert ended(corner, created)["result"] == "from the fallback"


def test_what_no_provider_can_do_fails_with_its_reason(corner: Corner, work: Work) -> None:
    created = corner.create()
    work(raises(Unsupported("no tools here")), fallback=raises(Unsupported("none here either")))
    assert ended(corner, created)["error"] == {"category": "unsupported", "message": "none here either"}


def test_what_only_a_provider_in_trouble_can_do_waits_for_it(corner: Corner, work: Work, between: FakeService) -> None:
    created = corner.create()
    work(raises(GONE), fallback=raises(Unsupported("no tools here")), url=between.url)
    assert between.wait_for("/release").json["delay_seconds"] == 60
    assert status_is(corner, created, "pending")["errors"] == []


@pytest.mark.long
def test_an_open_circuit_is_seen_in_workers_and_in_the_status_of_providers(corner: Corner, work: Work) -> None:
    corner.create()
    worker, _ = work(raises(NotNow("unauthorized", "wrong key", burns_attempt=False, retry_in_seconds=600)))

    def reported(path: str) -> dict[str, Any] | None:
        workers = [one for one in corner.api.get(path).json["workers"] if one["worker_id"] == worker.worker_id]
        providers = [one for told in workers for one in told["providers"] if one["circuit"] == "open"]
        return providers[0] if providers else None

    for path in ("/api/v1/workers", "/api/v1/providers/status"):
        provider = wait_until(lambda path=path: reported(path), 40, "the report")  # type: ignore[misc]
        assert (provider["name"], provider["model_profiles"]) == ("listed", [corner.model_profile])
        assert provider["detail"] == "unauthorized: wrong key"


def test_a_provider_knows_when_its_time_is_over(corner: Corner, work: Work) -> None:
    created = corner.create()
    _, provider = work(echo, job_timeout_seconds=60)
    ended(corner, created)
    assert 50 < (provider.jobs[0].seconds_left() or 0) <= 60


def test_a_provider_that_ignores_the_end_of_its_time_is_left_to_itself(corner: Corner, work: Work) -> None:
    created = corner.create(max_attempts=1)
    ignored = threading.Event()

    def run(job: Job) -> Result:
        assert ignored.wait(30)
        return Result("far too late")

    # Overdue from the start.
    work(run, job_timeout_seconds=-OVERDUE_SECONDS, lease_seconds=5, concurrency=1)
    job = ended(corner, created)
    ignored.set()
    assert (job["status"], job["error"]["category"], job["usage"]["provider"]) == ("failed", "timeout", "listed")
    ended(corner, corner.create(max_attempts=1))  # the only slot is free again
    assert corner.look(created)["result"] is None


def test_a_worker_all_of_whose_slots_hang_for_long_ends_itself(corner: Corner, work: Work, caplog: pytest.LogCaptureFixture) -> None:
    created, may_end = corner.create(max_attempts=1), threading.Event()

    def run(job: Job) -> Result:
        assert may_end.wait(30)
        return Result("far too late")

    worker, _ = work(run, job_timeout_seconds=-OVERDUE_SECONDS, lease_seconds=5, concurrency=1)
    worker.stuck_seconds = 0.0
    assert work.status(worker) == 1
    may_end.set()
    assert "worker_stuck runs=1" in caplog.text
    assert ended(corner, created)["error"]["category"] == "timeout"


def test_the_worker_tells_of_itself(corner: Corner, work: Work, service: Service) -> None:
    created = corner.create()
    with FakeService(forward_to=service.api.port) as between:
        work(until_cancelled, url=between.url, lease_seconds=5, concurrency=3)
        status_is(corner, created, "running")
        beat = between.wait_for("/jobs/heartbeat").json
        claim = between.asked("/jobs/claim")[0].json
    provider = {"name": "listed", "status": "ok", "detail": "as new", "circuit": "closed", "model_profiles": [corner.model_profile]}
    for report, running in ((claim["worker"], 0), (beat["worker"], 1)):
        assert {name: report[name] for name in ("capacity", "running", "providers")} == {
            "capacity": 3,
            "running": running,
            "providers": [provider],
        }
        assert report["version"]


def test_heartbeats_keep_a_long_job_and_carry_its_progress(corner: Corner, work: Work, sql: Sql) -> None:
    created, may_end = corner.create(), threading.Event()

    def run(job: Job) -> Result:
        job.report_progress({"text": "x" * 5000})
        job.report_progress({"done": 3})
        assert may_end.wait(30)
        return Result(1)

    work(run, lease_seconds=5)
    started = status_is(corner, created, "running")["lease_expires_at"]
    wait_until(lambda: corner.look(created)["progress"] == {"done": 3}, what="progress")
    assert corner.look(created)["lease_expires_at"] > started
    may_end.set()
    assert ended(corner, created)["attempt"] == 1


def test_a_cancel_reaches_the_running_provider_and_nothing_is_reported(
    corner: Corner, work: Work, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    created = corner.create()
    with FakeService(forward_to=service.api.port) as between:
        _, provider = work(until_cancelled, url=between.url, lease_seconds=5)
        status_is(corner, created, "running")
        corner.done(created, "cancel")
        wait_until(lambda: provider.jobs[0].cancelled.is_set(), what="the cancellation")
        after = corner.create(input="next")
        wait_until(lambda: len(provider.jobs) == 2, what="the next job")
        assert not between.asked(f"{created['id']}/complete") + between.asked(f"{created['id']}/release")
    assert corner.look(created)["status"] == "cancelled"
    assert "code=job_cancelled" in caplog.text
    corner.done(after, "cancel")


def test_a_lost_claim_stops_the_work_and_leaves_the_new_holder_alone(corner: Corner, work: Work, sql: Sql) -> None:
    created, held_back = corner.create(), threading.Event()

    def run(job: Job) -> Result:
        assert job.cancelled.wait(30)
        assert held_back.wait(30)
        return Result("stale")

    _, provider = work(run, lease_seconds=5, concurrency=1)
    status_is(corner, created, "running")
    corner.api.post(f"/api/v1/jobs/{created['id']}/retry", {"from": ["running"]})
    [job] = wait_until(lambda: corner.claim(worker_id="another"), what="the other worker's claim")
    wait_until(lambda: provider.jobs[0].cancelled.is_set(), what="the cancellation")
    held_back.set()
    assert corner.done(job, "complete", result="fresh")["result"] == "fresh"
    assert corner.look(created)["result"] == "fresh"


# ---------------------------------------------------------------- lost answers, a service that is away


@pytest.fixture
def between(service: Service) -> Iterator[FakeService]:
    """A way to the service that can lose answers."""
    with FakeService(forward_to=service.api.port) as way:
        yield way


def test_a_lost_answer_of_complete_finishes_the_job_once(corner: Corner, work: Work, between: FakeService) -> None:
    between.behave("/complete", forwards_and(loses()), forwards_and(loses()))
    created = corner.create()
    _, provider = work(echo, url=between.url)
    job = ended(corner, created)
    between.wait_for("/complete", 3)
    assert (job["status"], job["attempt"], job["errors"], len(provider.jobs)) == ("completed", 1, [], 1)
    assert corner.look(created) == job


def test_a_lost_answer_of_a_claim_brings_its_jobs_the_next_time(corner: Corner, work: Work, between: FakeService) -> None:
    between.behave("/jobs/claim", forwards_and(loses()))
    created = corner.create()
    _, provider = work(echo, url=between.url)
    assert (ended(corner, created)["attempt"], len(provider.jobs)) == (1, 1)
    first, second = (seen.json["claim_id"] for seen in between.asked("/jobs/claim")[:2])
    assert first == second


@pytest.mark.long
def test_nothing_is_claimed_while_a_result_waits_for_the_service(corner: Corner, work: Work, between: FakeService) -> None:
    for path in ("/complete", "/readyz"):
        between.always(path, problem(503, "unavailable"))
    between.behave("/jobs/claim", forwards(), answers(200, {"claim_id": "c", "jobs": []}))
    first = corner.create()
    work(echo, url=between.url)
    between.wait_for("/complete", 2)
    second = corner.create()
    between.wait_for("/complete", 5)
    assert len(between.asked("/jobs/claim")) == 2
    for path in ("/complete", "/readyz"):
        between.always(path, forwards())
    assert [ended(corner, job)["attempt"] for job in (first, second)] == [1, 1]


def test_one_result_that_the_service_chokes_on_does_not_hold_up_the_others(corner: Corner, work: Work, between: FakeService) -> None:
    sick = corner.create(priority=5)
    between.always(f"{sick['id']}/complete", problem(500, "internal"))
    well = corner.create()
    work(echo, url=between.url, concurrency=1)
    assert ended(corner, well)["status"] == "completed"
    assert len(between.asked(f"{sick['id']}/complete")) >= 1


def test_an_empty_answer_at_once_is_no_reason_to_hurry(work: Work) -> None:
    with FakeService() as busy:
        busy.always("/jobs/claim", answers(200, {"claim_id": "c", "jobs": []}))
        work(echo, url=busy.url)
        busy.wait_for("/jobs/claim", 3)
        assert len(busy.asked("/jobs/claim")) == 3


def test_a_full_disk_loses_nothing_and_stops_the_claims(corner: Corner, work: Work, between: FakeService) -> None:
    between.always("/complete", problem(500, "internal"))
    first, second = corner.batch([{}, {}])
    _, provider = work(echo, url=between.url, concurrency=1, spool_max_bytes=0)
    between.wait_for("/complete", 3)
    assert len(provider.jobs) == 1
    between.always("/complete", forwards())
    assert [ended(corner, job)["status"] for job in (first, second)] == ["completed", "completed"]


# ---------------------------------------------------------------- drain


def test_an_idle_worker_drains_at_once_although_its_claim_waits(work: Work, between: FakeService) -> None:
    worker, _ = work(echo, url=between.url)
    between.wait_for("/jobs/claim")
    worker.stop()
    assert work.status(worker, 2) == 0


def test_a_job_that_was_claimed_while_draining_is_given_back(corner: Corner, work: Work, between: FakeService) -> None:
    between.behave("/jobs/claim", forwards_and(hangs()))
    created = corner.create()
    worker, provider = work(echo, url=between.url)
    status_is(corner, created, "running")
    worker.stop()
    job = status_is(corner, created, "pending")
    assert (job["attempt"], job["errors"], provider.jobs) == (0, [], [])


def test_what_ends_in_time_is_completed_and_the_rest_is_released(corner: Corner, work: Work) -> None:
    quick, slow = corner.create(input="quick"), corner.create(input="slow")
    draining = threading.Event()

    def run(job: Job) -> Result:
        assert (draining if job.input == "quick" else job.cancelled).wait(30)
        return Result("too late" if job.input == "slow" else "in time")

    worker, provider = work(run, drain_seconds=1.0)
    wait_until(lambda: len(provider.jobs) == 2, what="both running")
    worker.stop()
    draining.set()
    assert ended(corner, quick)["result"] == "in time"
    job = status_is(corner, slow, "pending")
    assert (job["attempt"], job["errors"]) == (0, [])


def test_a_second_stop_does_not_wait_for_running_jobs(corner: Corner, work: Work) -> None:
    created = corner.create()
    worker, provider = work(until_cancelled, drain_seconds=600)
    wait_until(lambda: provider.jobs, what="the start of the job")
    worker.stop()
    worker.stop()
    assert work.status(worker, 3) == 0
    assert corner.look(created)["status"] == "pending"


# ---------------------------------------------------------------- outcomes on disk


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "deep" / "spool", "http://here", 1 << 20)
    made.open()
    return made


def outcome(**fields: Any) -> Outcome:
    known: dict[str, Any] = {"verb": "complete", "job_id": str(uuid4()), "claim_id": "secret-claim", "attempt": 1, "seconds": 0.5}
    names = {"task_type": "t", "model_profile": "p", "provider": "script", "result": RawJSON('{"a":1.10,"b":"\\u0000ü"}')}
    return Outcome(**{**known, **names, **fields})


@pytest.mark.parametrize("fields", [{}, {"result": RawJSON("null")}, {"verb": "fail", "result": None, "message": "m", "usage": {"a": 1}}])
def test_an_outcome_comes_back_from_disk_as_it_went(spool: Spool, fields: dict[str, Any]) -> None:
    kept = outcome(**fields)
    path = spool.write(kept)
    assert spool.waiting() == [path]
    back = spool.read(path)
    assert back == kept
    spool.remove(path)
    spool.remove(path)
    assert spool.waiting() == []


def test_an_outcome_shows_no_claim_and_no_payload() -> None:
    assert "secret-claim" not in repr(outcome())
    assert "1.10" not in repr(outcome())


def test_the_spool_is_for_its_user_alone(spool: Spool, tmp_path: Path) -> None:
    path = spool.write(outcome())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o755)
    spool.open()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_spool_takes_no_more_than_it_may(tmp_path: Path) -> None:
    small = Spool(tmp_path, "http://here", 1000)
    small.open()
    small.write(outcome())
    with pytest.raises(SpoolFull):
        small.write(outcome(result=RawJSON(f'"{"x" * 1000}"')))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_outcomes_of_another_service_stay(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    path = spool.write(outcome())
    other = Spool(path.parent, "http://there", 1 << 20)
    assert other.waiting() == []
    assert "count=1" in caplog.text
    assert path.exists()


@pytest.mark.parametrize("content", [b"http://here\n{}", b"http://here\n{", b'http://here\n{"result":null,"x":1}', b"http://here"])
def test_a_damaged_file_is_put_aside_and_the_others_are_delivered(spool: Spool, content: bytes) -> None:
    damaged, good = spool.write(outcome()), spool.write(outcome())
    damaged.write_bytes(content)
    with FakeService() as fake:
        fake.always("/complete", problem(404, "job_not_found"))
        delivery = started(Delivery(AIService(fake.url, retry_seconds=0), spool, ServiceState()))
        wait_until(lambda: not good.exists(), what="the delivery")
        delivery.close()
    assert not damaged.exists()
    assert damaged.with_suffix(".damaged").exists()


def started(delivery: Delivery) -> Delivery:
    threading.Thread(target=delivery.run, daemon=True).start()
    return delivery


def test_no_more_work_is_taken_than_results_get_away(spool: Spool) -> None:
    with FakeService() as fake:
        fake.always("/complete", problem(409, "claim_lost"))
        delivery = Delivery(AIService(fake.url, retry_seconds=0), spool, ServiceState())
        for _ in range(MAX_UNDELIVERED):
            assert delivery.accepts_more()
            assert delivery.put(outcome()).is_set()
        assert not delivery.accepts_more()
        started(delivery)
        wait_until(delivery.accepts_more, what="room")
        assert delivery.flush(5) == 0
        delivery.close()


def test_a_route_that_is_not_there_is_no_reason_to_forget_a_result(spool: Spool) -> None:
    path = spool.write(outcome())
    with FakeService() as fake:
        fake.always("/complete", problem(404, "not_found"))
        delivery = started(Delivery(AIService(fake.url, retry_seconds=0), spool, ServiceState()))
        fake.wait_for("/complete", 2)
        delivery.close()
    assert path.exists()


def test_files_torn_by_a_crash_long_ago_are_removed(spool: Spool, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "spool"
    old, new = folder / "old.torn", folder / "new.torn"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    spool.open()
    assert (old.exists(), new.exists()) == (False, True)


# ---------------------------------------------------------------- settings


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    wrong = {
        "AI_SERVICE_URL": "http://me:pass-word@host",
        "AI_SERVICE_TOKEN": "two secret-words",
        "PROFILE_PROVIDERS": "text",
        "WORKER_CONCURRENCY": "0",
        "WORKER_LEASE_SECONDS": "1",
        "WORKER_JOB_TIMEOUT": "0",
        "WORKER_DRAIN_SECONDS": "soon",
        "WORKER_SPOOL_MAX_BYTES": "1.5",
    }
    with pytest.raises(SettingsError) as caught:
        Settings.read(wrong)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == list(wrong)
    assert "pass-word" not in str(caught.value)
    assert "secret-words" not in str(caught.value)


def test_settings_have_defaults_and_read_durations() -> None:
    settings = Settings.read({"HOME": "/home/me", "WORKER_DRAIN_SECONDS": "1m30s", "WORKER_LEASE_SECONDS": "90"})
    assert (settings.url, settings.token, settings.concurrency, settings.lease_seconds) == ("http://127.0.0.1:8080", None, 4, 90)
    assert (settings.drain_seconds, settings.spool_dir) == (90, Path("/home/me/.local/state/ai-service/spool"))
    ordered = Settings.read({"PROFILE_PROVIDERS": "text = vllm , openclaw;vision=vllm;"})
    assert ordered.profile_providers == {"text": ("vllm", "openclaw"), "vision": ("vllm",)}
    assert Settings.read({"XDG_STATE_HOME": "/state"}).spool_dir == Path("/state/ai-service/spool")
    assert "my-token" not in repr(Settings.read({"AI_SERVICE_TOKEN": "my-token"}))


# ---------------------------------------------------------------- real processes

PLUGIN = """
import os, time
from pathlib import Path
from providers import GROUP, Health, NotConfigured, NotNow, Result, SettingsError

class Gate:
    name = "gate"
    def __init__(self, environ):
        if "GATE_PROFILE" not in environ:
            raise NotConfigured("GATE_PROFILE is not set")
        if environ["GATE_PROFILE"] == "wrong":
            raise SettingsError(["GATE_PROFILE is wrong"])
        self.model_profiles = (environ["GATE_PROFILE"],)
        self._folder = Path(environ["GATE_FOLDER"])
    def check(self):
        return Health("ok")
    def run(self, job):
        with (self._folder / "runs").open("a") as runs:
            runs.write(f"{job.id} {job.attempt}\\n")
        while not (self._folder / "open").exists():
            if job.cancelled.wait(0.05):
                raise NotNow("cancelled", "stopped")
        return Result({"done_by": os.getpid()})
"""


@attrs.define
class Process:
    """A worker process, and what it logs."""

    process: subprocess.Popen[str]
    log: Path

    def end(self, number: int, seconds: float = 15) -> int:
        """Its exit status after this signal."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def has_logged(self, text: str) -> bool:
        """Whether this stands in its log."""
        return text in self.log.read_text()


@attrs.define
class Plant:
    """Starts worker processes that have one provider, the gate: a job goes on while the gate is shut."""

    folder: Path
    environ: dict[str, str]
    processes: list[Process]

    def start(self, **environ: str) -> Process:
        log = self.folder / f"worker-{len(self.processes)}.log"
        with log.open("w") as stderr:
            command = [sys.executable, "-m", "ai_internal.worker.worker"]
            process = subprocess.Popen(command, env={**self.environ, **environ}, stderr=stderr, stdout=subprocess.DEVNULL, text=True)
        self.processes.append(Process(process, log))
        return self.processes[-1]

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def runs(self) -> list[str]:
        """A line per run: job and attempt."""
        runs = self.folder / "runs"
        return runs.read_text().splitlines() if runs.exists() else []


def installed(folder: Path, name: str, target: str) -> None:
    """Makes a folder on the path an installed package that has this one provider."""
    info = folder / f"plugin_{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[ai_service.providers]\n{name} = {target}\n")


@pytest.fixture
def plant(tmp_path: Path, service: Service, corner: Corner) -> Iterator[Plant]:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "gate.py").write_text(PLUGIN)
    installed(tmp_path / "path", "gate", "gate:Gate")
    own = {"PYTHONPATH": str(tmp_path / "path"), "GATE_FOLDER": str(tmp_path), "GATE_PROFILE": corner.model_profile}
    worker = {"AI_SERVICE_URL": url_of(service), "WORKER_SPOOL_DIR": str(tmp_path / "spool"), "WORKER_DRAIN_SECONDS": "5"}
    plant = Plant(tmp_path, {**{name: os.environ[name] for name in INHERITED if name in os.environ}, **own, **worker}, [])
    yield plant
    for process in plant.processes:
        process.process.kill()
        process.process.wait()


def test_a_worker_killed_between_result_and_report_delivers_it_when_it_is_back(
    corner: Corner, plant: Plant, between: FakeService, tmp_path: Path
) -> None:
    between.behave("/complete", hangs())
    plant.open_gate()
    created = corner.create()
    first = plant.start(AI_SERVICE_URL=between.url)
    between.wait_for("/complete")
    first.end(signal.SIGKILL)
    assert corner.look(created)["status"] == "running"
    plant.start(AI_SERVICE_URL=between.url)
    job = ended(corner, created)
    assert (job["status"], job["attempt"], job["result"]) == ("completed", 1, {"done_by": first.process.pid})
    assert plant.runs() == [f"{created['id']} 1"]
    wait_until(lambda: not list((tmp_path / "spool").iterdir()), what="an empty spool")


def test_a_result_that_waited_past_its_lease_still_counts_if_nobody_took_the_job(
    corner: Corner, plant: Plant, between: FakeService, sql: Sql
) -> None:
    between.behave("/complete", hangs())
    # The worker's next claim must not wait in the middle, where it would outlive the worker and take the job.
    between.behave("/jobs/claim", forwards())
    between.always("/jobs/claim", hangs())
    plant.open_gate()
    created = corner.create()
    first = plant.start(AI_SERVICE_URL=between.url)
    between.wait_for("/complete")
    first.end(signal.SIGKILL)
    sql("update held set lease_expires_at = now() - interval '1 minute' where job_id = cast(:id as uuid)", id=created["id"])
    status_is(corner, created, "pending", 20)
    plant.start(AI_SERVICE_URL=between.url)
    assert ended(corner, created)["status"] == "completed"
    assert len(plant.runs()) == 1


def test_a_frozen_worker_that_wakes_changes_nothing(corner: Corner, plant: Plant, sql: Sql) -> None:
    created = corner.create()
    worker = plant.start(WORKER_CONCURRENCY="1")
    wait_until(plant.runs, what="the start of the job")
    worker.process.send_signal(signal.SIGSTOP)
    sql("update held set lease_expires_at = now() - interval '1 minute' where job_id = cast(:id as uuid)", id=created["id"])
    [job] = wait_until(lambda: corner.claim(worker_id="another"), 20, "the other worker's claim")
    corner.done(job, "complete", result="fresh")
    plant.open_gate()
    worker.process.send_signal(signal.SIGCONT)
    wait_until(lambda: worker.has_logged("code=claim_lost"), what="the refusal")
    assert (corner.look(created)["result"], corner.look(created)["attempt"]) == ("fresh", 2)
    assert ended(corner, corner.create())["status"] == "completed"


def test_sigterm_lets_a_running_job_end(corner: Corner, plant: Plant) -> None:
    created = corner.create()
    worker = plant.start()
    wait_until(plant.runs, what="the start of the job")
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: worker.has_logged("worker_draining reason=SIGTERM"), what="the drain")
    late = corner.create()
    plant.open_gate()
    assert worker.process.wait(15) == 0
    assert corner.look(created)["status"] == "completed"
    assert corner.look(late)["status"] == "pending"
    assert worker.has_logged(f"job_completed id={created['id']}")


def test_sigterm_gives_back_what_does_not_end(corner: Corner, plant: Plant) -> None:
    created = corner.create()
    worker = plant.start(WORKER_DRAIN_SECONDS="0.5")
    wait_until(plant.runs, what="the start of the job")
    assert worker.end(signal.SIGTERM) == 0
    job = corner.look(created)
    assert (job["status"], job["attempt"], job["errors"]) == ("pending", 0, [])


def test_a_second_sigterm_is_quick(corner: Corner, plant: Plant) -> None:
    created = corner.create()
    worker = plant.start(WORKER_DRAIN_SECONDS="600")
    wait_until(plant.runs, what="the start of the job")
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: worker.has_logged("worker_draining"), what="the drain")
    assert worker.end(signal.SIGTERM, 4) == 0
    assert corner.look(created)["status"] == "pending"


def test_an_idle_worker_ends_quickly_on_sigint(plant: Plant) -> None:
    worker = plant.start()
    wait_until(lambda: worker.has_logged("worker_started"), what="the start")
    assert worker.end(signal.SIGINT, 4) == 0


# Longer by hand: AWAY_SECONDS=60 pytest -k time_without_service
AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "0"))


@pytest.mark.long
def test_a_worker_works_through_a_time_without_service(start_service: Callable[..., Service], plant: Plant, corner: Corner) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    first = start_service(HTTP_PORT=port)
    there = Corner(first.api)
    created = there.create(model_profile=corner.model_profile)
    worker = plant.start(AI_SERVICE_URL=url_of(first))
    wait_until(plant.runs, what="the start of the job")
    first.kill()
    plant.open_gate()
    wait_until(lambda: worker.has_logged("service_went_away"), what="the loss to be noticed")
    wait_until(lambda: list((plant.folder / "spool").glob("*.outcome")), what="the result on disk")
    threading.Event().wait(AWAY_SECONDS)
    again = Corner(start_service(HTTP_PORT=port).api)
    assert ended(again, created)["status"] == "completed"
    another = again.create(model_profile=corner.model_profile)
    wait_until(lambda: finished(again.look(another)), 40, "the next job")
    assert worker.has_logged("service_came_back")
    assert plant.runs() == [f"{created['id']} 1", f"{another['id']} 1"]


def test_a_worker_without_providers_says_so(plant: Plant) -> None:
    environ = {name: value for name, value in plant.environ.items() if name != "GATE_PROFILE"}
    command = [sys.executable, "-m", "ai_internal.worker.worker"]
    ended_process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20, check=False)
    assert ended_process.returncode == 2
    assert "no provider is set up" in ended_process.stderr
    assert "gate: GATE_PROFILE is not set" in ended_process.stderr


def test_a_worker_with_wrong_settings_names_them_all(plant: Plant) -> None:
    (plant.folder / "file").touch()
    wrong = {"WORKER_CONCURRENCY": "many", "GATE_PROFILE": "wrong", "AI_SERVICE_URL": "nowhere"}
    worker = plant.start(**wrong)
    assert worker.process.wait(20) == 2
    assert all(worker.has_logged(text) for text in ("WORKER_CONCURRENCY: ", "AI_SERVICE_URL: ", "gate: GATE_PROFILE is wrong"))
    worker = plant.start(WORKER_SPOOL_DIR=str(plant.folder / "file" / "spool"))
    assert worker.process.wait(20) == 2
    assert worker.has_logged("WORKER_SPOOL_DIR: ")


def test_two_providers_of_one_profile_need_an_order(plant: Plant) -> None:
    installed(plant.folder / "path", "second", "gate:Gate")
    worker = plant.start()
    assert worker.process.wait(20) == 2
    profile = plant.environ["GATE_PROFILE"]
    assert worker.has_logged(f"{profile} is served by gate (gate:Gate) and second (gate:Gate): name their order")
    worker = plant.start(PROFILE_PROVIDERS=f"{profile}=second,third")
    assert worker.process.wait(20) == 2
    assert worker.has_logged(f"{profile} is to be served by third, which is not installed")
    worker = plant.start(PROFILE_PROVIDERS=f"{profile}=second,gate")
    wait_until(lambda: worker.has_logged("worker_started"), what="the start")


def test_the_worker_needs_neither_the_service_nor_a_database(plant: Plant) -> None:
    code = "import sys, ai_internal.worker.worker; print(sorted({'ai_service', 'pg8000', 'falcon', 'waitress'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=MAIN.parent, env=plant.environ, capture_output=True, text=True, timeout=20, check=True)
    assert told.stdout.strip() == "[]"


def test_vllm_jobs_go_through_a_worker_process(corner: Corner, plant: Plant, tmp_path: Path) -> None:
    if not entry_points(group=GROUP, name="vllm"):
        installed(tmp_path / "vllm", "vllm", "providers.vllm:VLLM")
    created = [corner.create(input={"prompt": f"Say {number}"}) for number in range(5)]
    with without_gate(plant, str(tmp_path / "vllm")), fake_vllm(model=corner.model_profile) as model:
        plant.start(**model.environ)
        jobs = [ended(corner, job) for job in created]
        assert {job["status"] for job in jobs} == {"completed"}
        assert all(job["result"]["content"] and job["usage"]["total_tokens"] for job in jobs)
        assert len(model.seen) == 5
        model.always(lambda handler: handler.wait(30))
        slow = corner.create(input={"prompt": "slow"})
        model.wait_for_requests(6)
        plant.processes[-1].end(signal.SIGTERM)
        assert corner.look(slow)["attempt"] == 0


@contextmanager
def without_gate(plant: Plant, path: str) -> Iterator[None]:
    """Workers that have the vLLM provider instead, the installed one or the one found on this path."""
    gate = plant.environ.pop("GATE_PROFILE")
    plant.environ["PYTHONPATH"] = path
    yield
    plant.environ["GATE_PROFILE"] = gate
