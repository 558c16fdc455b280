"""Claims: what is handed out, in which order, to whom, for how long; pause, rescue and expiry."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import pytest
from postgres import Sql
from service import Answer, Api, Corner, Service, wait_until

MEGABYTE = 1 << 20


def ids(jobs: list[dict[str, Any]]) -> list[str]:
    return [job["id"] for job in jobs]


# What a claim gives


def test_a_claimed_job_carries_what_a_worker_needs(corner: Corner) -> None:
    created = corner.create(
        input={"n": 1}, expires_at="2999-01-01T00:00:00Z", traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    )
    answer = corner.api.post("/api/v1/jobs/claim", corner.claiming(lease_seconds=60))
    [job] = answer.json["jobs"]
    assert job["claim_id"] == answer.json["claim_id"]
    assert (job["input"], job["attempt"], job["max_attempts"], job["lease_seconds"]) == ({"n": 1}, 1, 3, 60)
    asked = ("id", "owner_service", "owner_ref", "task_type", "model_profile", "created_at", "expires_at", "traceparent")
    assert {name: job[name] for name in asked} == {name: created[name] for name in asked}


def test_a_lease_lasts_as_long_as_asked_by_the_database_clock(corner: Corner, sql: Sql) -> None:
    corner.create()
    [[before]] = sql("select clock_timestamp()")
    [job] = corner.claim(lease_seconds=600)
    [[after]] = sql("select clock_timestamp()")
    ends = datetime.fromisoformat(job["lease_expires_at"])
    assert before <= ends - timedelta(seconds=600) <= after


def test_a_lease_lasts_900_seconds_unless_asked_otherwise(corner: Corner) -> None:
    assert corner.take()["lease_seconds"] == 900


def test_a_claimed_job_shows_who_runs_it_but_never_by_which_claim(corner: Corner, service: Service) -> None:
    job = corner.take()
    seen = corner.api.get(f"/api/v1/jobs/{job['id']}", include="input")
    assert (seen.json["status"], seen.json["worker_id"], seen.json["attempt"]) == ("running", corner.worker_id, 1)
    assert seen.json["started_at"] is not None
    assert seen.json["lease_expires_at"] == job["lease_expires_at"]
    listed = corner.api.get("/api/v1/jobs", owner_service=corner.owner_service)
    assert job["claim_id"].encode() not in seen.body + listed.body
    assert job["claim_id"] not in service.log


def test_a_claim_takes_one_job_unless_asked_for_more(corner: Corner) -> None:
    corner.batch([{}] * 3)
    assert len(corner.claim()) == 1
    assert len(corner.claim(limit=1000)) == 2


def test_a_claim_skips_a_job_held_by_another_worker(corner: Corner) -> None:
    corner.take()
    assert corner.claim(worker_id="another", limit=10) == []


def test_an_empty_claim_answers_at_once_with_a_claim_id(corner: Corner) -> None:
    begun = monotonic()
    answer = corner.api.post("/api/v1/jobs/claim", corner.claiming())
    assert (answer.status, answer.json["jobs"]) == (200, [])
    assert uuid.UUID(answer.json["claim_id"])
    assert monotonic() - begun < 5


@pytest.mark.parametrize(
    "fields",
    [
        {"limit": 1},
        {"limit": 1000},
        {"lease_seconds": 5},
        {"lease_seconds": 86_400},
        {"wait_seconds": 0},
        {"wait_seconds": 0.2},
        {"worker": {"version": "1"}},
    ],
    ids=str,
)
def test_the_outermost_allowed_values_are_taken(corner: Corner, fields: dict[str, Any]) -> None:
    assert corner.api.post("/api/v1/jobs/claim", corner.claiming(**fields)).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("limit", 0),
        ("limit", 1001),
        ("limit", True),
        ("lease_seconds", 4),
        ("lease_seconds", 86_401),
        ("wait_seconds", -1),
        ("wait_seconds", 61),
        ("worker_id", None),
        ("worker_id", ""),
        ("model_profiles", "one"),
        ("task_types", {"a": 1}),
        ("claim_id", 7),
        ("colour", "red"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_path(corner: Corner, field: str, value: Any) -> None:
    answer = corner.api.post("/api/v1/jobs/claim", corner.claiming(**{field: value}))
    assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", [f"/{field}"])


def test_a_worker_report_of_more_than_8_kb_is_refused(corner: Corner) -> None:
    report = {"version": "1", "providers": [{"name": "vllm", "status": "ok", "detail": "x" * 9000}]}
    answer = corner.api.post("/api/v1/jobs/claim", corner.claiming(worker=report))
    assert answer.status == 422
    assert all(path.startswith("/worker") for path in answer.paths)


def test_a_claim_without_worker_id_is_refused(corner: Corner) -> None:
    assert corner.api.post("/api/v1/jobs/claim", {}).paths == ["/worker_id"]


# Filters


def test_every_combination_of_filters_hands_out_what_matches(start_service: Callable[..., Service]) -> None:
    corner = Corner(start_service().api)
    names = list(itertools.product(("owner-a", "owner-b"), ("type-a", "type-b"), ("profile-a", "profile-b")))
    corner.batch(
        [{"owner_service": owner, "task_type": kind, "model_profile": profile, "owner_ref": "r"} for owner, kind, profile in names]
    )
    for filters in itertools.product((None, ["owner-a"]), (None, ["type-b"]), (None, ["profile-a", "profile-b"], ["profile-b"])):
        jobs = claimed(corner, dict(zip(("owner_services", "task_types", "model_profiles"), filters, strict=True)))
        expected = [name for name in names if all(values is None or part in values for part, values in zip(name, filters, strict=True))]
        assert sorted((job["owner_service"], job["task_type"], job["model_profile"]) for job in jobs) == sorted(expected)
        released = [{"id": job["id"], "claim_id": job["claim_id"]} for job in jobs]
        assert corner.api.post("/api/v1/jobs/release", {"jobs": released}).status == 200


def claimed(corner: Corner, filters: dict[str, list[str] | None]) -> list[dict[str, Any]]:
    given = {name: values for name, values in filters.items() if values is not None}
    return list(corner.api.post("/api/v1/jobs/claim", {"worker_id": "w", "limit": 100, **given}).json["jobs"])


def test_a_filter_of_a_name_nobody_has_hands_out_nothing(corner: Corner) -> None:
    corner.create()
    assert corner.claim(task_types=["nobody-has-this"]) == []
    assert corner.claim(owner_services=["nobody-has-this"]) == []


# Order


def test_the_highest_priority_comes_first(corner: Corner) -> None:
    given = [0, 10, -10, 5, -1]
    items = corner.batch([{"priority": priority} for priority in given])
    expected = [item["id"] for _, item in sorted(zip(given, items, strict=True), key=lambda pair: -pair[0])]
    assert [ids(corner.claim())[0] for _ in given] == expected


def test_priority_goes_before_an_owners_turn(corner: Corner) -> None:
    a, b = f"{corner.owner_service}-a", f"{corner.owner_service}-b"
    corner.batch([{"owner_service": a, "priority": 1}] * 3 + [{"owner_service": b, "priority": 0}])
    assert [corner.claim()[0]["owner_service"] for _ in range(4)] == [a, a, a, b]


def test_within_an_owner_the_earliest_ready_comes_first(corner: Corner) -> None:
    items = corner.batch([{} for _ in range(20)])
    assert ids([corner.claim()[0] for _ in range(20)]) == ids(items)


def test_one_claim_hands_out_in_the_same_order(corner: Corner) -> None:
    items = corner.batch([{} for _ in range(20)])
    assert ids(corner.claim(limit=12)) == ids(items)[:12]
    assert ids(corner.claim(limit=12)) == ids(items)[12:]


def test_the_order_within_an_owner_holds_across_task_types_and_profiles(corner: Corner) -> None:
    kinds = [{"task_type": f"type-{number % 3}", "model_profile": f"{corner.model_profile}-{number % 2}"} for number in range(12)]
    items = [corner.create(**kind) for kind in kinds]
    profiles = [f"{corner.model_profile}-0", f"{corner.model_profile}-1"]
    assert ids([corner.claim(model_profiles=profiles)[0] for _ in items]) == ids(items)


def test_owners_take_turns(corner: Corner) -> None:
    a, b = f"{corner.owner_service}-a", f"{corner.owner_service}-b"
    corner.batch([{"owner_service": a}] * 6 + [{"owner_service": b}] * 3)
    owners = [corner.claim()[0]["owner_service"] for _ in range(9)]
    assert [set(owners[:2]), set(owners[2:4]), set(owners[4:6]), set(owners[6:])] == [{a, b}, {a, b}, {a, b}, {a}]


def test_owners_take_turns_within_one_claim(corner: Corner) -> None:
    a, b, c = (f"{corner.owner_service}-{letter}" for letter in "abc")
    corner.batch([{"owner_service": a}] * 50 + [{"owner_service": b}] * 50 + [{"owner_service": c}] * 2)
    owners = [job["owner_service"] for job in corner.claim(limit=12)]
    assert {owner: owners.count(owner) for owner in (a, b, c)} == {a: 5, b: 5, c: 2}


def test_the_least_recently_served_owner_comes_first(corner: Corner) -> None:
    a, b, c = (f"{corner.owner_service}-{letter}" for letter in "abc")
    corner.batch([{"owner_service": owner} for owner in (a, b) * 3])
    first, second = (corner.claim()[0]["owner_service"] for _ in range(2))
    corner.batch([{"owner_service": c}] * 2)
    assert [corner.claim()[0]["owner_service"] for _ in range(3)] == [c, first, second], "an owner never served waits longest"


def test_ten_jobs_of_one_owner_do_not_wait_behind_a_thousand_of_another(corner: Corner) -> None:
    small = f"{corner.owner_service}-small"
    corner.batch([{} for _ in range(1000)])
    corner.batch([{"owner_service": small} for _ in range(10)])
    served = [corner.claim()[0]["owner_service"] for _ in range(21)]
    assert served.count(small) == 10


def test_a_released_job_joins_at_the_end(corner: Corner) -> None:
    first, second, third = corner.batch([{}, {}, {}])
    [job] = corner.claim()
    corner.done(job, "release")
    assert ids(corner.claim(limit=3)) == ids([second, third, first])


def test_a_retried_job_joins_at_the_end(corner: Corner) -> None:
    first, second = corner.batch([{}, {}])
    [job] = corner.claim()
    corner.done(job, "fail")
    corner.done(job, "retry")
    assert ids(corner.claim(limit=2)) == ids([second, first])


def test_a_job_that_became_due_stands_behind_those_that_were_ready(corner: Corner, sql: Sql) -> None:
    late, early = corner.create(run_at="2999-01-01T00:00:00Z"), corner.create()
    sql("update waiting set run_at = now() where job_id = cast(:id as uuid)", id=late["id"])
    marker = corner.create(task_type="marker", run_at="2999-01-01T00:00:00Z")
    sql("update waiting set run_at = now() where job_id = cast(:id as uuid)", id=marker["id"])
    assert wait_until(lambda: ids(corner.claim(task_types=["marker"])), 15) == [marker["id"]]
    assert ids(corner.claim(limit=2)) == ids([early, late])


# Size


def test_a_claim_hands_out_no_more_than_16_mb_of_input_after_the_first(corner: Corner) -> None:
    items = [corner.create(input="x" * (5 * MEGABYTE)) for _ in range(5)]
    jobs = corner.claim(limit=5)
    assert len(jobs) >= 1
    assert sum(len(job["input"]) for job in jobs[1:]) <= 16 * MEGABYTE
    assert len(jobs) < len(items)
    rest = [job for _ in items if len(jobs) < len(items) for job in corner.claim(limit=5)]
    assert sorted(ids(jobs + rest)) == sorted(ids(items)), "what did not fit is still there"


def test_a_job_larger_than_16_mb_is_handed_out(corner: Corner) -> None:
    job = corner.create(input="x" * (20 * MEGABYTE))
    corner.create()
    assert ids(corner.claim(limit=2))[0] == job["id"]


# Waiting


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def parked(corner: Corner, **fields: Any) -> Callable[[], tuple[Answer, float]]:
    def claim() -> tuple[Answer, float]:
        answer = corner.api.post("/api/v1/jobs/claim", corner.claiming(wait_seconds=30, **fields))
        return answer, monotonic()

    return claim


def test_a_waiting_claim_answers_at_the_first_job(corner: Corner, pool: ThreadPoolExecutor) -> None:
    waiting = pool.submit(parked(corner, limit=10))
    assert_still_waits(waiting)
    created, at = corner.create(), monotonic()
    answer, answered = waiting.result(30)
    assert ids(answer.json["jobs"]) == [created["id"]], "it must not wait for a full batch"
    assert answered - at < 5


def test_a_waiting_claim_answers_at_once_where_a_job_is_ready(corner: Corner) -> None:
    corner.create()
    begun = monotonic()
    assert len(corner.claim(wait_seconds=30, limit=10)) == 1
    assert monotonic() - begun < 5


def test_a_waiting_claim_ends_empty_when_its_time_is_over(corner: Corner) -> None:
    begun = monotonic()
    assert corner.claim(wait_seconds=1) == []
    assert monotonic() - begun < 6


@pytest.mark.parametrize("wake", ["release", "retry", "resume"])
def test_a_waiting_claim_is_woken_by_whatever_makes_a_job_ready(corner: Corner, pool: ThreadPoolExecutor, wake: str) -> None:
    job = corner.take()
    if wake == "retry":
        corner.done(job, "fail")
    if wake == "resume":
        assert corner.api.post("/api/v1/pause", {"model_profiles": [corner.model_profile]}).status == 200
        corner.done(job, "release")
    waiting = pool.submit(parked(corner, worker_id="another"))
    assert_still_waits(waiting)
    if wake == "resume":
        assert corner.api.post("/api/v1/resume", {"model_profiles": [corner.model_profile]}).status == 200
    else:
        corner.done(job, wake)
    begun = monotonic()
    answer, answered = waiting.result(30)
    assert ids(answer.json["jobs"]) == [job["id"]]
    assert answered - begun < 5


def test_a_waiting_claim_sees_a_job_made_through_another_process(
    corner: Corner, pool: ThreadPoolExecutor, another_service: Service
) -> None:
    waiting = pool.submit(parked(corner))
    assert_still_waits(waiting)
    created = another_service.api.post("/api/v1/jobs", corner.job()).json
    begun = monotonic()
    answer, answered = waiting.result(30)
    assert ids(answer.json["jobs"]) == [created["id"]]
    assert answered - begun < 8


def test_several_waiting_claims_share_what_comes(corner: Corner, pool: ThreadPoolExecutor) -> None:
    waiting = [pool.submit(parked(corner, worker_id=f"w{number}", limit=1)) for number in range(4)]
    items = corner.batch([{}] * 4)
    got = [job["id"] for future in waiting for job in future.result(30)[0].json["jobs"]]
    assert sorted(got) == sorted(ids(items))


def assert_still_waits(waiting: Any) -> None:
    """It has not answered within a moment: it waits for real."""
    with pytest.raises(TimeoutError):
        waiting.result(0.3)


# Repeats of a claim


def test_a_repeated_claim_gives_the_jobs_it_holds_and_no_others(corner: Corner) -> None:
    corner.batch([{"input": number} for number in range(4)])
    claim_id = str(uuid.uuid4())
    first = corner.claim(claim_id=claim_id, limit=2)
    again = corner.claim(claim_id=claim_id, limit=4)
    assert [job["claim_id"] for job in first] == [claim_id] * 2
    steady = ("id", "claim_id", "input", "attempt", "lease_seconds", "created_at")
    assert [[job[name] for name in steady] for job in again] == [[job[name] for name in steady] for job in first]


def test_a_repeated_claim_leaves_out_what_it_no_longer_holds(corner: Corner) -> None:
    corner.batch([{} for _ in range(5)])
    claim_id = str(uuid.uuid4())
    completed, failed, released, cancelled, kept = corner.claim(claim_id=claim_id, limit=5)
    corner.done(completed, "complete")
    corner.done(failed, "fail")
    corner.done(released, "release")
    corner.done(cancelled, "cancel")
    assert ids(corner.claim(claim_id=claim_id, limit=5)) == [kept["id"]]


def test_a_claim_that_holds_nothing_any_more_gets_nothing_new(corner: Corner) -> None:
    corner.create()
    claim_id = str(uuid.uuid4())
    [job] = corner.claim(claim_id=claim_id)
    corner.done(job, "complete")
    corner.create()
    assert corner.claim(claim_id=claim_id) == []


def test_a_repeated_claim_burns_no_attempt(corner: Corner) -> None:
    corner.create()
    claim_id = str(uuid.uuid4())
    corner.claim(claim_id=claim_id)
    assert corner.claim(claim_id=claim_id)[0]["attempt"] == 1


def test_a_claim_id_of_another_worker_is_refused(corner: Corner) -> None:
    corner.create()
    claim_id = str(uuid.uuid4())
    corner.claim(claim_id=claim_id)
    answer = corner.api.post("/api/v1/jobs/claim", corner.claiming(claim_id=claim_id, worker_id="another"))
    assert (answer.status, answer.code) == (409, "claim_id_reused")


def test_a_claim_is_repeated_through_another_process(corner: Corner, another_service: Service) -> None:
    corner.create()
    claim_id = str(uuid.uuid4())
    [job] = corner.claim(claim_id=claim_id)
    again = another_service.api.post("/api/v1/jobs/claim", corner.claiming(claim_id=claim_id))
    assert ids(again.json["jobs"]) == [job["id"]]


# Pause


PAUSES = ("model_profiles", "task_types", "owner_services")


@pytest.mark.parametrize("by", PAUSES)
def test_paused_jobs_are_not_handed_out_until_resumed(corner: Corner, by: str) -> None:
    job = corner.create()
    names = {by: [getattr(corner, by.removesuffix("s"))]}
    assert corner.api.post("/api/v1/pause", names).status == 200
    assert corner.claim() == []
    assert corner.look(job)["status"] == "pending"
    assert corner.api.post("/api/v1/resume", names).status == 200
    assert ids(corner.claim()) == [job["id"]]


def test_what_is_paused_is_listed_where_there_are_no_jobs_too(corner: Corner) -> None:
    def mine() -> list[dict[str, Any]]:
        return [rule for rule in corner.api.get("/api/v1/pause").json["paused"] if corner.mark in str(rule)]

    assert mine() == []
    names = {"model_profiles": [corner.model_profile], "owner_services": [corner.owner_service]}
    corner.api.post("/api/v1/pause", names)
    [rule] = mine()
    assert rule.pop("paused_at").endswith("Z")
    assert rule == {"owner_service": corner.owner_service, "task_type": None, "model_profile": corner.model_profile}
    corner.api.post("/api/v1/resume", names)
    assert mine() == []


@pytest.mark.parametrize("by", PAUSES)
def test_a_pause_holds_for_combinations_first_seen_after_it(corner: Corner, by: str) -> None:
    names = {by: [getattr(corner, by.removesuffix("s"))]}
    corner.api.post("/api/v1/pause", names)
    corner.create(priority=3)
    assert corner.claim() == []
    corner.api.post("/api/v1/resume", names)
    assert len(corner.claim()) == 1


def test_a_pause_of_several_names_holds_only_what_matches_all(corner: Corner) -> None:
    corner.api.post("/api/v1/pause", {"model_profiles": [corner.model_profile], "owner_services": [corner.owner_service]})
    corner.create()
    other = corner.create(owner_service=f"{corner.owner_service}-2")
    assert ids(corner.claim(limit=10)) == [other["id"]]


def test_a_pause_holds_in_every_process(corner: Corner, another_service: Service) -> None:
    corner.create()
    corner.api.post("/api/v1/pause", {"model_profiles": [corner.model_profile]})
    assert another_service.api.post("/api/v1/jobs/claim", corner.claiming()).json["jobs"] == []


def test_a_pause_repeated_is_undone_by_one_resume(corner: Corner) -> None:
    corner.create()
    for verb in ("pause", "pause", "resume", "resume"):
        assert corner.api.post(f"/api/v1/{verb}", {"task_types": [corner.task_type]}).status == 200
    assert len(corner.claim()) == 1


def test_a_running_job_of_a_paused_profile_is_finished_as_ever(corner: Corner) -> None:
    job = corner.take()
    corner.api.post("/api/v1/pause", {"model_profiles": [corner.model_profile]})
    corner.done(job, "heartbeat")
    assert corner.done(job, "complete")["status"] == "completed"


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_a_pause_of_nothing_named_is_refused(api: Api, verb: str) -> None:
    answer = api.post(f"/api/v1/{verb}", {})
    assert (answer.status, answer.code) == (422, "validation_failed")


# Leases and expiry


def test_a_job_whose_lease_ran_out_goes_to_another_worker_and_the_old_claim_is_lost(corner: Corner, sql: Sql) -> None:
    old = corner.take()
    run_out(sql, old)
    [new] = wait_until(lambda: corner.claim(worker_id="second"), 15, "the return of a job whose lease ran out")
    assert (new["id"], new["attempt"]) == (old["id"], 2)
    refused = corner.call(old, "complete", result="stale")
    assert (refused.status, refused.code) == (409, "claim_lost")
    seen = corner.look(old)
    assert (seen["status"], seen["worker_id"], seen["result"]) == ("running", "second", None)
    [error] = seen["errors"]
    assert (error["category"], error["attempt"], error["worker_id"]) == ("lease_expired", 1, corner.worker_id)
    assert corner.done(new, "complete", result="fresh")["result"] == "fresh"


def test_a_job_whose_last_lease_ran_out_has_failed(corner: Corner, sql: Sql) -> None:
    job = corner.take(max_attempts=1)
    run_out(sql, job)
    failed = wait_until(lambda: (seen := corner.look(job))["status"] == "failed" and seen, 15, "the failure")
    assert failed["error"]["category"] == "lease_expired"
    assert failed["finished_at"] is not None
    assert [error["category"] for error in failed["errors"]] == ["lease_expired"]


def test_a_late_result_is_taken_while_nobody_has_claimed_the_job_since(corner: Corner, sql: Sql) -> None:
    job = corner.take()
    run_out(sql, job)
    wait_until(lambda: corner.look(job)["status"] == "pending", 15, "the return of a job whose lease ran out")
    done = corner.done(job, "complete", result="late but whole")
    assert (done["status"], done["result"]) == ("completed", "late but whole")
    assert corner.claim() == [], "a job that is done must not be handed out"
    assert corner.done(job, "complete", result="again")["result"] == "late but whole"


def test_a_late_result_is_refused_once_another_worker_had_the_job_even_if_it_gave_it_back(corner: Corner, sql: Sql) -> None:
    job = corner.take()
    run_out(sql, job)
    [new] = wait_until(lambda: corner.claim(worker_id="second"), 15, "the return of a job whose lease ran out")
    corner.done(new, "release")
    assert corner.call(job, "complete").code == "claim_lost"
    assert corner.look(job)["status"] == "pending"


def test_a_late_result_of_a_cancelled_job_is_answered_job_cancelled(corner: Corner, sql: Sql) -> None:
    job = corner.take()
    run_out(sql, job)
    wait_until(lambda: corner.look(job)["status"] == "pending", 15, "the return of a job whose lease ran out")
    corner.done(job, "cancel")
    assert corner.call(job, "complete").code == "job_cancelled"
    assert corner.look(job)["status"] == "cancelled"


def test_a_scheduled_job_expires_too(corner: Corner, sql: Sql) -> None:
    job = corner.create(run_at="2999-01-01T00:00:00Z", expires_at="2999-01-02T00:00:00Z")
    sql("update waiting set expires_at = now() - interval '1 second' where job_id = cast(:id as uuid)", id=job["id"])
    sql("update job set expires_at = now() - interval '1 second' where id = cast(:id as uuid)", id=job["id"])
    failed = wait_until(lambda: (seen := corner.look(job))["status"] == "failed" and seen, 15, "the expiry")
    assert (failed["error"]["category"], failed["attempt"], failed["errors"]) == ("expired", 0, [])


def test_an_expired_job_is_never_handed_out_and_fails(corner: Corner, sql: Sql) -> None:
    job = corner.create(expires_at="2999-01-01T00:00:00Z")
    expire(sql, [job])
    assert corner.claim() == []
    failed = wait_until(lambda: (seen := corner.look(job))["status"] == "failed" and seen, 15, "the expiry")
    assert failed["error"]["category"] == "expired"
    assert corner.claim() == []


def test_an_expired_job_does_not_hide_those_behind_it(corner: Corner, sql: Sql) -> None:
    items = corner.batch([{"expires_at": "2999-01-01T00:00:00Z"} for _ in range(30)])
    live = corner.create()
    expire(sql, items)
    assert ids(corner.claim()) == [live["id"]]


def test_expiry_bounds_the_start_only(corner: Corner, sql: Sql) -> None:
    job = corner.take(expires_at="2999-01-01T00:00:00Z")
    sql("update job set expires_at = now() - interval '1 hour' where id = cast(:id as uuid)", id=job["id"])
    assert corner.done(job, "heartbeat")["lease_seconds"] == 900
    assert corner.done(job, "complete")["status"] == "completed"


def run_out(sql: Sql, job: dict[str, Any]) -> None:
    sql("update held set lease_expires_at = now() - interval '1 minute' where job_id = cast(:id as uuid)", id=job["id"])


def expire(sql: Sql, jobs: list[dict[str, Any]]) -> None:
    for table, key in (("ready", "job_id"), ("job", "id")):
        sql(f"update {table} set expires_at = now() - interval '1 second' where {key} = any(cast(:ids as uuid[]))", ids=ids(jobs))
