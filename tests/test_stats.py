"""Statistics, workers, providers and health: what an operator sees.

Most tests share a service and look at the row of their own owner or profile; totals and lists of
errors belong to the whole queue, so those tests have a queue of their own (`lone`, `lively`).
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from postgres import Sql, connect, fresh_schema
from service import Api, Corner, Service, running_service, wait_until

LATER = "2999-01-01T00:00:00Z"
COUNTERS = ("pending", "scheduled", "running", "completed", "failed", "cancelled")
GROUPS = {"by_owner_service": "owner_service", "by_task_type": "task_type", "by_model_profile": "model_profile"}


@contextmanager
def queue(postgres_url: str) -> Iterator[tuple[Api, Sql]]:
    """A service on a schema of its own, and its tables."""
    with ExitStack() as stack:
        schema = stack.enter_context(fresh_schema(postgres_url))
        service = stack.enter_context(running_service(postgres_url, schema))
        connection = connect(postgres_url, schema)
        stack.callback(connection.close)
        yield service.api, lambda statement, **given: list(connection.run(statement, **given) or [])


@pytest.fixture
def lone(postgres_url: str) -> Iterator[tuple[Corner, Sql]]:
    """A corner that is the whole queue of its service, and its tables."""
    with queue(postgres_url) as (api, sql):
        yield Corner(api), sql


@pytest.fixture(scope="module")
def shared(postgres_url: str) -> Iterator[tuple[Api, Sql]]:
    """A queue of this file, and its tables."""
    with queue(postgres_url) as found:
        yield found


@pytest.fixture
def own(shared: tuple[Api, Sql]) -> tuple[Corner, Sql]:
    """A corner of the queue of this file, and its tables."""
    return Corner(shared[0]), shared[1]


@pytest.fixture(scope="module")
def lively(postgres_url: str) -> Iterator[Corner]:
    """A corner that is the whole queue of its service, after `live`; its tests only look."""
    with queue(postgres_url) as (api, _):
        corner = Corner(api)
        live(corner)
        yield corner


def stats(corner: Corner, **query: Any) -> dict[str, Any]:
    answer = corner.api.get("/api/v1/stats", **query)
    assert answer.status == 200, answer
    return dict(answer.json)


def counted(found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(found[name] for name in COUNTERS)


def expect(corner: Corner, *numbers: int) -> dict[str, Any]:
    """The statistics once they count these jobs; they may be 5 s old."""
    wait_until(lambda: counted(stats(corner)["jobs"]) == numbers, 10, f"{COUNTERS} = {numbers}, now {counted(stats(corner)['jobs'])},")
    return stats(corner)


def expect_row(corner: Corner, *numbers: int) -> dict[str, Any]:
    """The statistics once the row of the corner's owner counts these jobs."""

    def counts() -> tuple[int, ...]:
        owners = [each["owner_service"] for each in stats(corner)["by_owner_service"]]
        if corner.owner_service not in owners:
            return (0,) * len(COUNTERS)
        return counted(row(stats(corner), "by_owner_service", corner.owner_service))

    wait_until(lambda: counts() == numbers, 10, f"{COUNTERS} = {numbers}, now {counts()},")
    return stats(corner)


def row(found: dict[str, Any], group: str, name: str) -> dict[str, Any]:
    [wanted] = [each for each in found[group] if each[GROUPS[group]] == name]
    return dict(wanted)


def live(corner: Corner) -> list[dict[str, Any]]:
    """Two completed, one failed, one waiting for a retry, one cancelled, one running, three ready, one scheduled."""
    corner.batch([{} for _ in range(9)])
    jobs = corner.claim(limit=6)
    corner.done(jobs[0], "complete", usage={"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107})
    corner.done(jobs[1], "complete", usage={"prompt_tokens": 11})
    corner.done(jobs[2], "fail", category="timeout")
    corner.done(jobs[3], "fail", category="rate_limited", retryable=True, retry_in_seconds=1000)
    corner.done(jobs[4], "cancel")
    corner.create(run_at=LATER)
    return jobs


def test_an_empty_queue_counts_nothing(lone: tuple[Corner, Sql]) -> None:
    corner, _ = lone
    found = stats(corner)
    wanted = {"window_seconds", "jobs", "errors", "attempt_errors", "oldest_pending_seconds", *GROUPS, "usage"}
    assert wanted <= set(found)
    assert (counted(found["jobs"]), found["errors"], found["attempt_errors"], found["window_seconds"]) == ((0,) * 6, [], [], 86_400)
    assert not found["oldest_pending_seconds"]


def test_every_job_is_counted_where_it_stands(lively: Corner) -> None:
    corner, now = lively, datetime.now(UTC)
    found = expect(corner, 3, 2, 1, 2, 1, 1)
    assert [(error["category"], error["count"]) for error in found["errors"]] == [("timeout", 1)]
    assert [(error["category"], error["count"]) for error in found["attempt_errors"]] == [("rate_limited", 1)]
    for error in found["errors"] + found["attempt_errors"]:
        assert abs(datetime.fromisoformat(error["last_at"]) - now) < timedelta(minutes=5)
    for group in GROUPS:
        assert counted(row(found, group, getattr(corner, GROUPS[group]))) == (3, 2, 1, 2, 1, 1)


def test_each_group_counts_its_own(own: tuple[Corner, Sql]) -> None:
    corner, _ = own
    a, x, y = (f"{corner.mark}-{letter}" for letter in "axy")
    kinds = [(a, x), (a, x), (corner.owner_service, x), (corner.owner_service, y)]
    corner.batch([{"owner_service": owner, "task_type": kind} for owner, kind in kinds])
    [job] = corner.claim(owner_services=[corner.owner_service], task_types=[y])
    corner.done(job, "fail")
    found = expect_row(corner, 1, 0, 0, 0, 1, 0)
    assert counted(row(found, "by_owner_service", a)) == (2, 0, 0, 0, 0, 0)
    types = [counted(row(found, "by_task_type", kind)) for kind in (x, y)]
    assert types == [(3, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0)]
    assert counted(row(found, "by_model_profile", corner.model_profile)) == (3, 0, 0, 0, 1, 0)


def test_endings_are_events_that_a_retry_or_a_delete_does_not_undo(own: tuple[Corner, Sql]) -> None:
    corner, _ = own
    jobs = live(corner)
    corner.done(jobs[2], "retry")
    assert corner.api.delete(f"/api/v1/jobs/{jobs[0]['id']}").status == 204
    expect_row(corner, 4, 2, 1, 2, 1, 1)


def test_a_released_and_a_taken_back_job_are_counted_once(lone: tuple[Corner, Sql]) -> None:
    corner, sql = lone
    released, taken_back = corner.take(), corner.take()
    corner.done(released, "release")
    sql("update held set lease_expires_at = now() - interval '1 minute' where job_id = cast(:id as uuid)", id=taken_back["id"])
    wait_until(lambda: corner.look(taken_back)["status"] == "pending", 15)
    found = expect(corner, 2, 0, 0, 0, 0, 0)
    assert [error["category"] for error in found["attempt_errors"]] == ["lease_expired"]


def test_jobs_that_the_service_itself_fails_are_counted_with_their_category(lone: tuple[Corner, Sql]) -> None:
    corner, sql = lone
    corner.create(expires_at=LATER, priority=-1)
    corner.take(max_attempts=1)
    sql("update held set lease_expires_at = now() - interval '1 minute'")
    sql("update ready set expires_at = now() - interval '1 minute'")
    sql("update job set expires_at = now() - interval '1 minute' where expires_at is not null")
    wait_until(lambda: counted(stats(corner)["jobs"]) == (0, 0, 0, 0, 2, 0), 20)
    assert {(error["category"], error["count"]) for error in stats(corner)["errors"]} == {("expired", 1), ("lease_expired", 1)}


@pytest.mark.parametrize("seed", range(3))
def test_the_counters_agree_with_the_jobs_after_any_calls(own: tuple[Corner, Sql], seed: int) -> None:
    corner, _ = own
    walk = Walk(corner, random.Random(seed))
    for _ in range(250):
        walk.step()
    assert {"completed", "failed", "cancelled"} <= set(walk.endings), "the walk went nowhere"
    expect_row(corner, *walk.standing(), *(walk.endings[status] for status in ("completed", "failed", "cancelled")))


class Walk:
    """Calls at random on the jobs of one corner, and the endings that they brought about."""

    def __init__(self, corner: Corner, chance: random.Random) -> None:
        self.corner = corner
        self.chance = chance
        self.jobs: dict[str, dict[str, Any]] = {}
        self.endings: Counter[str] = Counter()

    def step(self) -> None:
        """One call; a refusal is as good as any."""
        verb = self.chance.choice(("create", "batch", "claim", "complete", "complete", "fail", "release", "retry", "cancel", "delete"))
        if verb in ("create", "batch", "claim"):
            getattr(self, verb)()
        elif self.jobs:
            self.call(self.chance.choice(list(self.jobs.values())), verb)

    def create(self) -> None:
        job = self.corner.create(priority=self.chance.randrange(3), **self.chance.choice(({}, {}, {"run_at": LATER})))
        self.jobs[job["id"]] = job

    def batch(self) -> None:
        keys = [str(self.chance.randrange(40)) for _ in range(5)]
        answer = self.corner.api.post("/api/v1/jobs/batch", {"jobs": [self.corner.job(idempotency_key=key) for key in keys]})
        assert answer.status in (200, 201)
        self.jobs.update({job["id"]: {**job, **self.jobs.get(job["id"], {})} for job in answer.json["jobs"]})

    def claim(self) -> None:
        self.jobs.update({job["id"]: job for job in self.corner.claim(limit=self.chance.randrange(1, 5))})

    def call(self, job: dict[str, Any], verb: str) -> None:
        given = {"claim_id": str(uuid.uuid4()), **job}
        if verb == "delete":
            if self.corner.api.delete(f"/api/v1/jobs/{job['id']}").status == 204:
                del self.jobs[job["id"]]
            return
        before = self.corner.look(job)["status"]
        fields = {"retryable": self.chance.random() < 0.5} if verb == "fail" else {}
        answer = self.corner.call(given, verb, **fields)
        if answer.status == 200 and answer.json["status"] != before:
            self.endings[answer.json["status"]] += 1

    def standing(self) -> tuple[int, int, int]:
        """How many jobs are ready, scheduled and running now, by looking at every one."""
        seen = [self.corner.look(job) for job in self.jobs.values()]
        pending = [job for job in seen if job["status"] == "pending"]
        later = [job for job in pending if job["run_at"] and datetime.fromisoformat(job["run_at"]) > datetime.now(UTC)]
        return len(pending) - len(later), len(later), sum(job["status"] == "running" for job in seen)


def test_a_due_job_moves_from_scheduled_to_pending(own: tuple[Corner, Sql]) -> None:
    corner, sql = own
    job = corner.create(run_at=LATER)
    expect_row(corner, 0, 1, 0, 0, 0, 0)
    sql("update waiting set run_at = now() where job_id = cast(:id as uuid)", id=job["id"])
    expect_row(corner, 1, 0, 0, 0, 0, 0)


def test_the_oldest_pending_job_is_as_old_as_it_has_been_ready(lone: tuple[Corner, Sql]) -> None:
    corner, sql = lone
    job = corner.create()
    corner.create(run_at=LATER)
    age(sql, job, 100)
    found = wait_until(lambda: (seen := stats(corner))["oldest_pending_seconds"] and seen["oldest_pending_seconds"] > 50 and seen, 10)
    assert 100 <= found["oldest_pending_seconds"] < 150
    assert 100 <= row(found, "by_model_profile", corner.model_profile)["oldest_pending_seconds"] < 150
    corner.claim()
    wait_until(lambda: not stats(corner)["oldest_pending_seconds"], 10)


def test_percentiles_of_waiting_and_running_times(own: tuple[Corner, Sql]) -> None:
    corner, sql = own
    for job in [corner.create() for _ in range(20)]:
        age(sql, job, 50)
    jobs = corner.claim(limit=20)
    sql(
        "update held set started_at = now() - interval '200 seconds' where job_id = any(cast(:ids as uuid[]))",
        ids=[job["id"] for job in jobs],
    )
    for job in jobs:
        corner.done(job, "complete")
    found = expect_row(corner, 0, 0, 0, 20, 0, 0)
    found = row(found, "by_model_profile", corner.model_profile)
    assert {name for name, seconds in percentiles(found, "wait").items() if not 44 <= seconds <= 58} == set()
    assert {name for name, seconds in percentiles(found, "run").items() if not 178 <= seconds <= 224} == set()


def percentiles(found: dict[str, Any], what: str) -> dict[str, float]:
    """The p50 and p95 of a group row, however the row nests and names them."""
    flat = {name: value for name, value in flattened(found).items() if what in name and ("p50" in name or "p95" in name)}
    assert len(flat) == 2, found
    assert all(name.split(".")[0].endswith("_seconds") or name.endswith("_seconds") for name in flat), "durations end in _seconds"
    return flat


def flattened(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat.update(flattened(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner})
    return flat


def test_a_group_has_its_last_claim_and_whether_it_is_paused(own: tuple[Corner, Sql]) -> None:
    corner, _ = own
    other = f"{corner.mark}-other"
    corner.batch([{}, {"model_profile": other}])
    corner.claim()
    corner.api.post("/api/v1/pause", {"model_profiles": [other]})
    expect_row(corner, 1, 0, 1, 0, 0, 0)
    wait_until(lambda: row(stats(corner), "by_model_profile", other)["paused"], 10)
    found = stats(corner)
    claimed, never = (row(found, "by_model_profile", name) for name in (corner.model_profile, other))
    assert abs(datetime.fromisoformat(claimed["last_claimed_at"]) - datetime.now(UTC)) < timedelta(seconds=60)
    assert (never["last_claimed_at"], claimed["paused"], never["paused"]) == (None, False, True)
    corner.api.post("/api/v1/resume", {"model_profiles": [other]})
    wait_until(lambda: row(stats(corner), "by_model_profile", other)["paused"] is False, 10)


def test_usage_is_added_up_and_absent_is_not_zero(lively: Corner) -> None:
    usage = expect(lively, 3, 2, 1, 2, 1, 1)["usage"]
    assert sum(each.get("prompt_tokens") or 0 for each in usage) == 111
    assert sum(each.get("completion_tokens") or 0 for each in usage) == 7
    assert all(each.get("audio_seconds") is None for each in usage), "nobody measured audio"


@pytest.mark.parametrize("window", [3600, 86_400, 604_800])
def test_each_window_is_answered_with_what_ended_within_it(lively: Corner, window: int) -> None:
    counts = (3, 2, 1, 2, 1, 1)
    wait_until(lambda: counted(stats(lively, window_seconds=window)["jobs"]) == counts, 10)
    assert stats(lively, window_seconds=window)["window_seconds"] == window


def test_what_ended_before_the_window_is_not_counted_in_it(lone: tuple[Corner, Sql]) -> None:
    corner, sql = lone
    live(corner)
    expect(corner, 3, 2, 1, 2, 1, 1)
    sql("update tally set at = at - interval '3 hours'")
    sql("update history set start_at = start_at - interval '3 hours', last_at = last_at - interval '3 hours'")
    wait_until(lambda: counted(stats(corner, window_seconds=3600)["jobs"]) == (3, 2, 1, 0, 0, 0), 15)
    assert stats(corner, window_seconds=3600)["errors"] == []
    assert counted(stats(corner, window_seconds=86_400)["jobs"]) == (3, 2, 1, 2, 1, 1)


def age(sql: Sql, job: dict[str, Any], seconds: int) -> None:
    """The job was created and became ready this many seconds earlier than it did."""
    sql("update ready set run_at = run_at - :seconds * interval '1 second' where job_id = cast(:id as uuid)", seconds=seconds, id=job["id"])
    shift = "created_at = created_at - :seconds * interval '1 second', run_at = run_at - :seconds * interval '1 second'"
    sql(f"update job set {shift} where id = cast(:id as uuid)", seconds=seconds, id=job["id"])


# Workers


REPORT = {
    "version": "1.2.3",
    "capacity": 4,
    "running": 1,
    "providers": [{"name": "vllm", "status": "ok", "circuit": "closed", "model_profiles": ["qwen2.5-14b"], "detail": None}],
}


def workers(corner: Corner) -> list[dict[str, Any]]:
    answer = corner.api.get("/api/v1/workers")
    assert answer.status == 200
    return [each for each in answer.json["workers"] if each["worker_id"] == corner.worker_id]


def test_a_worker_is_seen_with_what_it_reported(corner: Corner) -> None:
    corner.claim(worker=REPORT)
    [seen] = wait_until(lambda: workers(corner), 10)
    told = {**seen, **seen.get("worker", {})}
    assert {name: told[name] for name in REPORT} == REPORT


def test_a_worker_cannot_report_as_another(corner: Corner) -> None:
    corner.claim(worker={**REPORT, "worker_id": "another", "seen_at": 5})
    [seen] = wait_until(lambda: workers(corner), 10)
    assert seen["seen_at"].endswith("Z")


def test_a_worker_that_reports_nothing_of_itself_is_seen_all_the_same(corner: Corner) -> None:
    corner.claim()
    assert wait_until(lambda: workers(corner), 10)


def test_a_bulk_heartbeat_renews_a_workers_report(corner: Corner) -> None:
    corner.create()
    [job] = corner.claim(worker=REPORT)
    beat = {"jobs": [{"id": job["id"], "claim_id": job["claim_id"]}], "worker": {**REPORT, "running": 3}}
    assert corner.api.post("/api/v1/jobs/heartbeat", beat).status == 200
    wait_until(lambda: any({**seen, **seen.get("worker", {})}["running"] == 3 for seen in workers(corner)), 10)


def test_a_worker_not_seen_for_5_minutes_is_left_out(corner: Corner, sql: Sql) -> None:
    corner.claim(worker=REPORT)
    wait_until(lambda: workers(corner), 10)
    sql("update worker set seen_at = now() - interval '6 minutes' where worker_id = :id", id=corner.worker_id)
    wait_until(lambda: not workers(corner), 10)


def test_what_workers_report_of_their_providers_is_shown(corner: Corner) -> None:
    corner.claim(worker={**REPORT, "providers": [{**REPORT["providers"][0], "detail": corner.mark}]})  # type: ignore[index]
    wait_until(lambda: corner.mark in str(corner.api.get("/api/v1/providers/status").json["workers"]), 10)


# Providers


def test_an_unreachable_provider_is_unavailable_and_its_secrets_stay_secret(start_service: Callable[..., Service]) -> None:
    service = start_service(LLM_BASE_URL="http://someone:hidden-word@127.0.0.1:9/v1", LLM_API_KEY="hidden-key", LLM_MODEL="some-model")
    answer = service.api.get("/api/v1/providers/status")
    assert answer.status == 200
    [vllm] = [each for each in answer.json["providers"] if each["name"] == "vllm"]
    assert vllm["status"] == "unavailable"
    assert abs(datetime.fromisoformat(vllm["checked_at"]) - datetime.now(UTC)) < timedelta(seconds=60)
    assert isinstance(vllm["model_profiles"], list)
    for text in (answer.body.decode(), service.log):
        assert "hidden" not in text


def test_a_provider_without_settings_is_not_configured(api: Api) -> None:
    answer = api.get("/api/v1/providers/status")
    assert answer.status == 200
    assert {each["name"]: each["status"] for each in answer.json["providers"]}["vllm"] == "not_configured"


# Health


def test_a_service_in_order_is_healthy_and_ready(api: Api) -> None:
    assert [api.get(path).status for path in ("/healthz", "/readyz")] == [200, 200]


def test_a_service_without_its_tables_is_healthy_but_not_ready(start_service: Callable[..., Service]) -> None:
    api = start_service(MIGRATE_ON_START="false").api
    assert [api.get(path).status for path in ("/healthz", "/readyz")] == [200, 503]
