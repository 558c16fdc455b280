"""Every call repeated after a lost answer: the row of the contract's table that names it, and what must not happen twice."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from service import Corner, wait_until

FINISHES: dict[str, dict[str, Any]] = {
    "complete": {"result": "first", "usage": {"total_tokens": 1}},
    "fail": {"category": "internal", "message": "first", "retryable": False},
    "release": {},
}
OTHER_BODY: dict[str, dict[str, Any]] = {
    "complete": {"result": "second", "usage": None},
    "fail": {"category": "timeout", "message": "second", "retryable": True},
    "release": {"delay_seconds": 100},
}


@pytest.mark.parametrize("verb", FINISHES)
def test_a_repeated_finish_answers_the_job_and_changes_nothing(corner: Corner, verb: str) -> None:
    job = corner.take()
    first = corner.done(job, verb, **FINISHES[verb])
    assert corner.done(job, verb, **FINISHES[verb]) == first
    assert corner.look(job) == corner.look(job) | {name: first[name] for name in ("status", "result", "error", "errors", "run_at")}


@pytest.mark.parametrize("verb", FINISHES)
def test_the_first_body_of_a_finish_stands(corner: Corner, verb: str) -> None:
    job = corner.take()
    first = corner.done(job, verb, **FINISHES[verb])
    assert corner.done(job, verb, **OTHER_BODY[verb]) == first


def test_a_repeated_retryable_failure_makes_no_second_error(corner: Corner) -> None:
    job = corner.take()
    first = corner.done(job, "fail", retryable=True)
    again = corner.done(job, "fail", retryable=True)
    assert again == first
    assert len(again["errors"]) == 1


@pytest.mark.parametrize("verb", ["fail", "release"])
def test_a_repeat_answers_the_job_as_it_is_now_and_leaves_its_new_holder_alone(corner: Corner, verb: str) -> None:
    old = corner.take()
    corner.done(old, verb, **({"retryable": True, "retry_in_seconds": 0} if verb == "fail" else {}))
    [new] = wait_until(lambda: corner.claim(worker_id="second"), 15)
    again = corner.done(old, verb)
    assert (again["status"], again["worker_id"]) == ("running", "second")
    assert corner.done(new, "complete", result="second's")["result"] == "second's"


@pytest.mark.parametrize("first", FINISHES)
@pytest.mark.parametrize("second", FINISHES)
def test_another_verb_of_the_same_claim_is_lost(corner: Corner, first: str, second: str) -> None:
    job = corner.take()
    before = corner.done(job, first, **FINISHES[first])
    answer = corner.call(job, second, **FINISHES[second])
    if first == second:
        assert answer.status == 200
    else:
        assert (answer.status, answer.code) == (409, "claim_lost")
    assert corner.look(job)["status"] == before["status"]


@pytest.mark.parametrize("verb", FINISHES)
def test_a_finish_is_repeated_in_a_call_for_many_and_the_other_way_round(corner: Corner, verb: str) -> None:
    corner.batch([{}, {}])
    one, other = corner.claim(limit=2)
    items = [{"id": job["id"], "claim_id": job["claim_id"], **FINISHES[verb]} for job in (one, other)]
    corner.done(one, verb, **FINISHES[verb])
    both = corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": items})
    assert [each["status"] for each in both.json["jobs"]] == [200, 200]
    assert corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": items}).body == both.body
    assert corner.call(other, verb, **OTHER_BODY[verb]).status == 200
    assert corner.look(other)["result"] == ("first" if verb == "complete" else None)


def test_an_old_failure_repeated_after_a_second_failure_is_still_known(corner: Corner) -> None:
    first = corner.take()
    corner.done(first, "fail", category="first_failure")
    corner.done(first, "retry")
    [second] = corner.claim()
    corner.done(second, "fail", category="second_failure")
    again = corner.done(first, "fail", category="first_failure")
    assert [error["category"] for error in again["errors"]] == ["first_failure", "second_failure"]


def test_a_repeated_heartbeat_is_harmless(corner: Corner) -> None:
    job = corner.take()
    assert [corner.call(job, "heartbeat").status for _ in range(3)] == [200] * 3


def test_a_repeated_retry_changes_nothing(corner: Corner) -> None:
    job = corner.take()
    corner.done(job, "fail")
    first = corner.done(job, "retry", **{"from": ["failed"]})
    assert corner.done(job, "retry", **{"from": ["failed"]}) == first


def test_a_repeated_retry_cannot_abort_the_new_attempt(corner: Corner) -> None:
    job = corner.take()
    corner.done(job, "fail")
    corner.done(job, "retry", **{"from": ["failed"]})
    [new] = corner.claim()
    answer = corner.call(job, "retry", **{"from": ["failed"]})
    assert (answer.status, answer.code) == (409, "invalid_state")
    assert corner.done(new, "complete")["status"] == "completed"


def test_a_repeated_cancel_keeps_the_first_reason(corner: Corner) -> None:
    job = corner.create()
    first = corner.done(job, "cancel", reason="first")
    assert corner.done(job, "cancel", reason="second") == first


def test_a_repeated_delete_finds_nothing(corner: Corner) -> None:
    job = corner.take()
    corner.done(job, "complete")
    path = f"/api/v1/jobs/{job['id']}"
    assert [corner.api.delete(path).status for _ in range(2)] == [204, 404]


def test_a_claim_id_serves_one_claim_even_across_a_release(corner: Corner) -> None:
    corner.create()
    claim_id = str(uuid.uuid4())
    [job] = corner.claim(claim_id=claim_id)
    corner.done(job, "release")
    assert corner.claim(claim_id=claim_id) == [], "a late repeat would take the job again, behind its caller's back"
    assert len(corner.claim()) == 1
