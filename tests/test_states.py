"""What every verb does to a job in every state: the table is the specification."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import attrs
import pytest
from postgres import Sql
from service import Answer, Api, Corner, wait_until

LATER = "2999-01-01T00:00:00Z"
LOST, STATE, GONE, CANCELLED = "409 claim_lost", "409 invalid_state", "404 job_not_found", "409 job_cancelled"
DONE, SCHEDULED = "completed", "scheduled"

# Every cell is the job's status after the verb, or the refusal, which leaves the job as it was. `scheduled` is pending with a
# run_at to come. Claim verbs use the claim that I have or had; where I never had one, a claim_id that the service never saw.
# Repeats of the verb that ended the attempt are in the table too: completed × complete, failed × fail, awaiting_retry × fail.
VERBS = ("complete", "fail_retryable", "fail_final", "heartbeat", "release", "retry", "cancel", "delete")
TABLE: dict[str, tuple[str, ...]] = {
    # state            complete   fail_retryable fail_final heartbeat  release    retry      cancel       delete
    "ready":          (LOST,      LOST,          LOST,      LOST,      LOST,      "pending", "cancelled", STATE),
    "scheduled":      (LOST,      LOST,          LOST,      LOST,      LOST,      SCHEDULED, "cancelled", STATE),
    "held_by_me":     (DONE,      SCHEDULED,     "failed",  "running", "pending", "pending", "cancelled", STATE),
    "held_by_other":  (LOST,      LOST,          LOST,      LOST,      LOST,      "pending", "cancelled", STATE),
    "lease_ran_out":  (DONE,      SCHEDULED,     "failed",  "running", "pending", "pending", "cancelled", STATE),
    "taken_back":     (DONE,      LOST,          LOST,      LOST,      LOST,      "pending", "cancelled", STATE),
    "out_of_leases":  (DONE,      LOST,          LOST,      LOST,      LOST,      "pending", STATE,       "deleted"),
    "awaiting_retry": (LOST,      SCHEDULED,     SCHEDULED, LOST,      LOST,      SCHEDULED, "cancelled", STATE),
    "released":       (LOST,      LOST,          LOST,      LOST,      "pending", "pending", "cancelled", STATE),
    "retried":        (LOST,      LOST,          LOST,      LOST,      LOST,      "pending", "cancelled", STATE),
    "completed":      (DONE,      LOST,          LOST,      LOST,      LOST,      STATE,     STATE,       "deleted"),
    "failed":         (LOST,      "failed",      "failed",  LOST,      LOST,      "pending", STATE,       "deleted"),
    "cancelled":      (CANCELLED, CANCELLED,     CANCELLED, CANCELLED, CANCELLED, "pending", "cancelled", "deleted"),
    "expired":        (LOST,      LOST,          LOST,      LOST,      LOST,      "pending", STATE,       "deleted"),
    "deleted":        (GONE,      GONE,          GONE,      GONE,      GONE,      GONE,      GONE,        GONE),
    "unknown":        (GONE,      GONE,          GONE,      GONE,      GONE,      GONE,      GONE,        GONE),
}  # fmt: skip
CELLS = [
    pytest.param(state, verb, cell, id=f"{state}-{verb}") for state, row in TABLE.items() for verb, cell in zip(VERBS, row, strict=True)
]

State = Callable[[Corner, Sql], dict[str, Any]]


def ready(corner: Corner, sql: Sql) -> dict[str, Any]:
    return {**corner.create(), "claim_id": str(uuid.uuid4())}


def scheduled(corner: Corner, sql: Sql) -> dict[str, Any]:
    return {**corner.create(run_at=LATER), "claim_id": str(uuid.uuid4())}


def held_by_me(corner: Corner, sql: Sql) -> dict[str, Any]:
    return corner.take()


def held_by_other(corner: Corner, sql: Sql) -> dict[str, Any]:
    return {**corner.take(), "claim_id": str(uuid.uuid4())}


def lease_ran_out(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    let_lease_run_out(sql, job)
    return job


def awaiting_retry(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    corner.done(job, "fail", retryable=True)
    return job


def released(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    corner.done(job, "release")
    return job


def retried(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    corner.done(job, "retry")
    return job


def completed(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    corner.done(job, "complete")
    return job


def failed(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    corner.done(job, "fail")
    return job


def cancelled(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = corner.take()
    corner.done(job, "cancel")
    return job


def deleted(corner: Corner, sql: Sql) -> dict[str, Any]:
    job = completed(corner, sql)
    assert corner.api.delete(f"/api/v1/jobs/{job['id']}").status == 204
    return job


def unknown(corner: Corner, sql: Sql) -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "claim_id": str(uuid.uuid4())}


MADE_AT_ONCE = (ready, scheduled, held_by_me, held_by_other, lease_ran_out, awaiting_retry, released, retried, completed, failed)
STATES: dict[str, State] = {made.__name__: made for made in (*MADE_AT_ONCE, cancelled, deleted, unknown)}


def let_lease_run_out(sql: Sql, job: dict[str, Any]) -> None:
    sql("update held set lease_expires_at = now() - interval '1 minute' where job_id = cast(:id as uuid)", id=job["id"])


@pytest.fixture(scope="module")
def slow_states(api: Api, sql: Sql) -> dict[str, list[dict[str, Any]]]:
    """Jobs in the states that only the service's own upkeep brings about, made all at once: its turn takes up to 10 s."""
    corner = Corner(api)
    taken_back = [corner.take() for _ in VERBS]
    out_of_leases = [corner.take(max_attempts=1) for _ in VERBS]
    expired = [corner.create(owner_ref="late") for _ in VERBS]
    sql(
        "update held set lease_expires_at = now() - interval '1 minute' where job_id = any(cast(:ids as uuid[]))",
        ids=ids(taken_back, out_of_leases),
    )
    sql("update ready set expires_at = now() - interval '1 minute' where job_id = any(cast(:ids as uuid[]))", ids=ids(expired))
    wait_until(lambda: all_are(corner, taken_back, "pending"), 15, "the return of jobs whose lease ran out")
    wait_until(lambda: all_are(corner, out_of_leases, "failed"), 15, "the failure of jobs without attempts left")
    wait_until(lambda: all_are(corner, expired, "failed"), 15, "the failure of expired jobs")
    never_claimed = [{**job, "claim_id": str(uuid.uuid4())} for job in expired]
    return {"taken_back": taken_back, "out_of_leases": out_of_leases, "expired": never_claimed}


def ids(*lists: list[dict[str, Any]]) -> list[str]:
    return [job["id"] for jobs in lists for job in jobs]


def all_are(corner: Corner, jobs: list[dict[str, Any]], status: str) -> bool:
    found = corner.api.post("/api/v1/jobs/get", {"ids": ids(jobs)}).json["jobs"]
    return all(job["status"] == status for job in found)


def act(corner: Corner, job: dict[str, Any], verb: str) -> Answer:
    if verb == "delete":
        return corner.api.delete(f"/api/v1/jobs/{job['id']}")
    if verb.startswith("fail_"):
        return corner.call(job, "fail", retryable=verb == "fail_retryable")
    return corner.call(job, verb)


def seen(corner: Corner, job: dict[str, Any]) -> dict[str, Any] | None:
    answer = corner.api.get(f"/api/v1/jobs/{job['id']}")
    if answer.status == 404:
        return None
    found = dict(answer.json)
    if found["status"] == "pending" and found["run_at"] and datetime.fromisoformat(found["run_at"]) > datetime.now(UTC):
        found["status"] = SCHEDULED
    return found


def was_taken_back(job: dict[str, Any] | None) -> bool:
    return job is not None and any(error["category"] == "lease_expired" for error in job["errors"])


def outcome(answer: Answer, after: dict[str, Any] | None) -> str:
    if answer.status >= 400:
        return f"{answer.status} {answer.code}"
    return after["status"] if after else "deleted"


@attrs.frozen
class Try:
    """A verb tried on a job: the job's text before, the answer, the job's text and content after."""

    before: bytes
    answer: Answer
    text: bytes
    after: dict[str, Any] | None


def tried(corner: Corner, job: dict[str, Any], verb: str) -> Try:
    path = f"/api/v1/jobs/{job['id']}"
    before = corner.api.get(path).body
    answer = act(corner, job, verb)
    return Try(before, answer, corner.api.get(path).body, seen(corner, job))


def tried_before_the_service_takes_it_back(corner: Corner, sql: Sql, verb: str) -> Try:
    """Once more where the service's own upkeep came between the two calls: in a corner where no job is pending."""
    while was_taken_back((result := tried(corner, lease_ran_out(corner, sql), verb)).after):
        corner = Corner(corner.api)
    return result


@pytest.mark.parametrize(("state", "verb", "expected"), CELLS)
def test_a_verb_moves_a_job_or_is_refused(
    state: str, verb: str, expected: str, corner: Corner, sql: Sql, request: pytest.FixtureRequest
) -> None:
    if state == "lease_ran_out":
        result = tried_before_the_service_takes_it_back(corner, sql, verb)
    elif state in STATES:
        result = tried(corner, STATES[state](corner, sql), verb)
    else:
        result = tried(corner, request.getfixturevalue("slow_states")[state].pop(), verb)
    if result.answer.status >= 400:
        assert result.text == result.before, "a refusal changed the job"
    assert outcome(result.answer, result.after) == expected


CLAIM_VERBS: dict[str, dict[str, Any]] = {
    "complete": {"result": 1},
    "fail": {"category": "timeout", "message": "too slow", "retryable": False},
    "heartbeat": {},
    "release": {},
}


@pytest.mark.parametrize("verb", CLAIM_VERBS)
@pytest.mark.parametrize("state", [state for state in STATES if state != "lease_ran_out"])
def test_the_call_for_many_decides_each_job_as_the_call_for_one(state: str, verb: str, corner: Corner, sql: Sql) -> None:
    job = STATES[state](corner, sql)
    cell = TABLE[state][VERBS.index("fail_final" if verb == "fail" else verb)]
    item = {"id": job["id"], "claim_id": job["claim_id"], **CLAIM_VERBS[verb]}
    answer = corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": [item]})
    assert answer.status == 200
    [decided] = answer.json["jobs"]
    assert decided["id"] == job["id"]
    assert decided["status"] == (int(cell[:3]) if cell[:3].isdigit() else 200)
    assert outcome_of_item(decided, cell) == cell


def outcome_of_item(decided: dict[str, Any], cell: str) -> str:
    return f"{decided['status']} {decided['code']}" if decided["status"] >= 400 else cell


def test_every_state_of_the_table_can_be_made() -> None:
    assert set(TABLE) == set(STATES) | {"taken_back", "out_of_leases", "expired"}
