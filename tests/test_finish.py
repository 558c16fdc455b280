"""Complete, fail, heartbeat, release, retry, cancel and delete: what each leaves behind, for one job and for many."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest
from postgres import Sql
from service import Corner, wait_until

LATER = "2999-01-01T00:00:00Z"


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def delay(job: dict[str, Any]) -> float:
    """Seconds until the job may run."""
    return (moment(job["run_at"]) - datetime.now(UTC)).total_seconds()


# Complete


def test_a_completed_job_keeps_its_result_and_usage(corner: Corner) -> None:
    job = corner.take()
    usage = {"prompt_tokens": 10, "completion_tokens": 0, "model": "qwen2.5-14b", "extra": [1]}
    corner.done(job, "complete", result={"summary": "fine"}, usage=usage)
    seen = corner.look(job)
    assert (seen["status"], seen["result"], seen["usage"], seen["error"], seen["errors"]) == (
        "completed",
        {"summary": "fine"},
        usage,
        None,
        [],
    )
    assert moment(seen["created_at"]) <= moment(seen["started_at"]) <= moment(seen["finished_at"])
    assert (seen["worker_id"], seen["lease_expires_at"]) == (corner.worker_id, None)


@pytest.mark.parametrize("result", [None, 0, "", [], {}, False])
def test_any_json_is_a_result(corner: Corner, result: Any) -> None:
    job = corner.take()
    assert corner.done(job, "complete", result=result)["status"] == "completed"
    assert corner.look(job)["result"] == result


def test_absent_usage_is_null_not_zero(corner: Corner) -> None:
    job = corner.take()
    assert corner.done(job, "complete")["usage"] is None


@pytest.mark.parametrize("missing", ["claim_id", "result"])
def test_complete_needs_claim_id_and_result(corner: Corner, missing: str) -> None:
    job = corner.take()
    body = {"claim_id": job["claim_id"], "result": 1}
    del body[missing]
    answer = corner.api.post(f"/api/v1/jobs/{job['id']}/complete", body)
    assert (answer.status, answer.paths) == (422, [f"/{missing}"])
    assert corner.look(job)["status"] == "running"


@pytest.mark.parametrize("verb", ["complete", "fail"])
@pytest.mark.parametrize("usage", [{"note": "x" * 4096}, 7, [1], {"prompt_tokens": -1}, {"prompt_tokens": "many"}], ids=str)
def test_usage_is_a_small_object_of_numbers_that_count_something(corner: Corner, verb: str, usage: Any) -> None:
    job = corner.take()
    answer = corner.call(job, verb, usage=usage)
    assert answer.status == 422
    assert all(path.startswith("/usage") for path in answer.paths)
    assert corner.look(job)["status"] == "running"


def test_a_reader_that_waits_hears_of_the_end_at_once(corner: Corner) -> None:
    job = corner.take()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(corner.look, job, wait_seconds=30)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        corner.done(job, "complete")
        begun = monotonic()
        assert waiting.result(30)["status"] == "completed"
        assert monotonic() - begun < 5


def test_a_reader_that_waits_is_answered_when_its_time_is_over(corner: Corner) -> None:
    begun = monotonic()
    assert corner.look(corner.create(), wait_seconds=1)["status"] == "pending"
    assert monotonic() - begun < 6


def test_a_reader_of_a_finished_job_does_not_wait(corner: Corner) -> None:
    job = corner.take()
    corner.done(job, "fail")
    begun = monotonic()
    assert corner.look(job, wait_seconds=30)["status"] == "failed"
    assert monotonic() - begun < 5


# Fail


def test_a_failure_is_final_unless_called_retryable(corner: Corner) -> None:
    job = corner.take()
    failed = corner.done(job, "fail", category="invalid_output", message="no JSON in it", usage={"total_tokens": 5})
    assert (failed["status"], failed["error"]) == ("failed", {"category": "invalid_output", "message": "no JSON in it"})
    [error] = failed["errors"]
    at = error.pop("at")
    assert moment(failed["started_at"]) <= moment(at) <= moment(failed["finished_at"])
    told = {"worker_id": corner.worker_id, "category": "invalid_output", "message": "no JSON in it", "usage": {"total_tokens": 5}}
    assert error == {"attempt": 1, **told}


def test_a_retryable_failure_waits_and_keeps_its_error(corner: Corner) -> None:
    job = corner.take()
    waiting = corner.done(job, "fail", retryable=True, category="rate_limited", message="429")
    assert (waiting["status"], waiting["attempt"], waiting["finished_at"], waiting["lease_expires_at"]) == ("pending", 1, None, None)
    assert [error["category"] for error in waiting["errors"]] == ["rate_limited"]
    assert corner.claim() == []


def test_the_last_attempt_fails_for_good_however_retryable(corner: Corner) -> None:
    job = corner.take(max_attempts=2)
    corner.done(job, "fail", retryable=True, retry_in_seconds=0)
    [again] = wait_until(corner.claim, 15)
    failed = corner.done(again, "fail", retryable=True, category="unavailable")
    assert (failed["status"], failed["attempt"], failed["error"]["category"]) == ("failed", 2, "unavailable")
    assert [(error["attempt"], error["category"]) for error in failed["errors"]] == [(1, "timeout"), (2, "unavailable")]


@pytest.mark.parametrize(("attempt", "base"), [(1, 10), (2, 20), (3, 40), (9, 2560), (10, 3600), (40, 3600), (99, 3600)])
def test_back_off_doubles_up_to_an_hour(corner: Corner, sql: Sql, attempt: int, base: float) -> None:
    job = corner.take(max_attempts=100)
    sql("update held set attempt = cast(:attempt as int) where job_id = cast(:id as uuid)", attempt=attempt, id=job["id"])
    waiting = corner.done(job, "fail", retryable=True)
    assert base * 0.8 - 10 <= delay(waiting) <= base * 1.2 + 1


def test_back_off_is_spread_by_chance(corner: Corner) -> None:
    corner.batch([{} for _ in range(40)])
    jobs = corner.claim(limit=40)
    delays = [delay(corner.done(job, "fail", retryable=True)) for job in jobs]
    assert max(delays) - min(delays) > 1, "40 jobs that fail together must not come back together"


@pytest.mark.parametrize("seconds", [0.5, 120, 100_000])
def test_retry_in_seconds_is_kept_as_asked(corner: Corner, seconds: float) -> None:
    waiting = corner.done(corner.take(), "fail", retryable=True, retry_in_seconds=seconds)
    assert seconds - 10 <= delay(waiting) <= seconds + 1


def test_a_long_message_is_cut_not_refused(corner: Corner) -> None:
    failed = corner.done(corner.take(), "fail", message="😀" * 5000)
    assert failed["error"]["message"].startswith("😀" * 3990)
    assert len(failed["error"]["message"]) <= 4000


@pytest.mark.parametrize("category", ["Timeout", "", "9lives", "with space", "a" * 65, None, 7])
def test_an_ill_category_is_refused(corner: Corner, category: Any) -> None:
    job = corner.take()
    answer = corner.call(job, "fail", category=category)
    assert (answer.status, answer.paths) == (422, ["/category"])
    assert corner.look(job)["status"] == "running"


def test_any_wellformed_category_is_taken(corner: Corner) -> None:
    name = "a" + "_9" * 31 + "z"
    assert corner.done(corner.take(), "fail", category=name)["error"]["category"] == name


# Heartbeat


def test_a_heartbeat_extends_the_lease_by_its_length_from_now(corner: Corner, sql: Sql) -> None:
    corner.create()
    [job] = corner.claim(lease_seconds=60)
    sql("update held set lease_expires_at = now() + interval '5 seconds' where job_id = cast(:id as uuid)", id=job["id"])
    beat = corner.done(job, "heartbeat")
    assert beat["lease_seconds"] == 60
    left = (moment(beat["lease_expires_at"]) - datetime.now(UTC)).total_seconds()
    assert 50 < left <= 61


def test_a_heartbeat_may_ask_for_another_length(corner: Corner) -> None:
    beat = corner.done(corner.take(), "heartbeat", lease_seconds=3600)
    assert beat["lease_seconds"] == 3600
    assert 3590 < (moment(beat["lease_expires_at"]) - datetime.now(UTC)).total_seconds() <= 3601


@pytest.mark.parametrize("seconds", [4, 86_401, "60", None])
def test_a_lease_length_out_of_range_is_refused(corner: Corner, seconds: Any) -> None:
    answer = corner.call(corner.take(), "heartbeat", lease_seconds=seconds)
    if seconds is None:
        assert answer.status in (200, 422)
    else:
        assert (answer.status, answer.paths) == (422, ["/lease_seconds"])


def test_progress_is_seen_while_the_job_runs_and_the_last_one_stands(corner: Corner) -> None:
    job = corner.take()
    corner.done(job, "heartbeat", progress={"step": "transcribing", "percent": 10})
    corner.done(job, "heartbeat", progress={"step": "aligning", "percent": 60})
    assert corner.look(job)["progress"] == {"step": "aligning", "percent": 60}
    corner.done(job, "heartbeat")
    assert corner.look(job)["progress"] == {"step": "aligning", "percent": 60}, "a beat without progress says nothing of it"


def test_progress_of_more_than_4_kb_is_refused(corner: Corner) -> None:
    answer = corner.call(corner.take(), "heartbeat", progress={"note": "x" * 4096})
    assert answer.status == 422
    assert all(path.startswith("/progress") for path in answer.paths)


# Release


def test_a_released_attempt_is_not_counted(corner: Corner) -> None:
    job = corner.take()
    released = corner.done(job, "release")
    assert (released["status"], released["attempt"], released["error"]) == ("pending", 0, None)
    assert corner.claim()[0]["attempt"] == 1


def test_a_release_may_ask_for_a_delay(corner: Corner) -> None:
    released = corner.done(corner.take(), "release", delay_seconds=300)
    assert 290 < delay(released) <= 301
    assert corner.claim() == []


def test_the_101st_release_fails_the_job(corner: Corner) -> None:
    job = corner.take()
    for _ in range(100):
        assert corner.done(job, "release")["status"] == "pending"
        [job] = corner.claim()
    failed = corner.done(job, "release")
    assert (failed["status"], failed["error"]["category"]) == ("failed", "released_too_often")


# Retry


def test_a_retry_starts_afresh_and_keeps_the_errors(corner: Corner) -> None:
    job = corner.take(max_attempts=1)
    corner.done(job, "heartbeat", progress={"percent": 50})
    corner.done(job, "fail", category="invalid_output", usage={"total_tokens": 3})
    retried = corner.done(job, "retry")
    assert (retried["status"], retried["attempt"]) == ("pending", 0)
    cleared = ("result", "error", "usage", "progress", "finished_at", "lease_expires_at")
    assert [retried[name] for name in cleared] == [None] * len(cleared)
    assert [error["category"] for error in retried["errors"]] == ["invalid_output"]
    [again] = corner.claim()
    assert (again["id"], again["attempt"]) == (job["id"], 1)
    assert corner.done(again, "complete")["status"] == "completed"


def test_a_retry_clears_an_expiry_that_has_passed(corner: Corner, sql: Sql) -> None:
    job = corner.take(expires_at=LATER)
    corner.done(job, "cancel")
    sql("update job set expires_at = now() - interval '1 hour' where id = cast(:id as uuid)", id=job["id"])
    assert corner.done(job, "retry")["expires_at"] is None
    assert [claimed["id"] for claimed in corner.claim()] == [job["id"]]


def test_a_retry_keeps_an_expiry_to_come(corner: Corner) -> None:
    job = corner.take(expires_at=LATER)
    corner.done(job, "fail")
    assert moment(corner.done(job, "retry")["expires_at"]) == moment(LATER)


def test_a_retry_of_a_running_job_takes_it_from_its_worker(corner: Corner) -> None:
    old = corner.take()
    assert corner.done(old, "retry")["status"] == "pending"
    [new] = corner.claim(worker_id="second")
    assert new["attempt"] == 1
    assert corner.call(old, "complete").code == "claim_lost"
    assert corner.done(new, "complete", result="second")["result"] == "second"


def test_a_retry_from_another_state_than_seen_is_refused(corner: Corner) -> None:
    job = corner.take()
    answer = corner.call(job, "retry", **{"from": ["failed", "cancelled"]})
    assert (answer.status, answer.code) == (409, "invalid_state")
    assert corner.look(job)["status"] == "running"
    assert corner.done(job, "retry", **{"from": ["running"]})["status"] == "pending"


@pytest.mark.parametrize("given", [["completed"], ["pending"], ["unheard-of"], "failed"])
def test_a_retry_from_what_cannot_be_retried_is_refused(corner: Corner, given: Any) -> None:
    job = corner.take()
    answer = corner.call(job, "retry", **{"from": given})
    assert answer.status == 422
    assert all(path.startswith("/from") for path in answer.paths)
    assert corner.look(job)["status"] == "running"


def test_a_retry_of_many_takes_those_that_match(corner: Corner) -> None:
    corner.batch([{} for _ in range(6)])
    timeouts, others, running = (corner.claim(limit=2) for _ in range(3))
    for job in timeouts:
        corner.done(job, "fail", category="timeout")
    for job in others:
        corner.done(job, "fail", category="internal")
    answer = retry_many(corner, {"owner_service": corner.owner_service, "error_category": "timeout"})
    assert answer == {"retried": 2, "more": False}
    assert sorted(job["id"] for job in corner.claim(limit=10)) == sorted(job["id"] for job in timeouts)
    assert [corner.look(job)["status"] for job in (*others, *running)] == ["failed", "failed", "running", "running"]


def test_a_dry_run_of_many_tells_how_many_match_and_changes_nothing(corner: Corner) -> None:
    corner.batch([{} for _ in range(4)])
    *failing, cancelled = corner.claim(limit=4)
    for job in failing:
        corner.done(job, "fail", category="timeout")
    corner.done(cancelled, "cancel")
    asked = {"filter": {"owner_service": corner.owner_service}, "limit": 2, "dry_run": True}
    for _ in range(2):
        assert corner.api.post("/api/v1/jobs/retry", asked).json == {"retried": 0, "more": True, "matched": 4}
    asked = {"filter": {"owner_service": corner.owner_service, "error_category": "timeout"}, "dry_run": True}
    assert corner.api.post("/api/v1/jobs/retry", asked).json == {"retried": 0, "more": False, "matched": 3}
    assert corner.claim(limit=10) == []


def test_a_retry_of_many_says_whether_more_are_left(corner: Corner) -> None:
    corner.batch([{} for _ in range(5)])
    for job in corner.claim(limit=5):
        corner.done(job, "fail")
    filters = {"task_type": corner.task_type, "status": "failed"}
    assert [retry_many(corner, filters, limit=2) for _ in range(3)] == [
        {"retried": 2, "more": True},
        {"retried": 2, "more": True},
        {"retried": 1, "more": False},
    ]
    assert retry_many(corner, filters) == {"retried": 0, "more": False}


@pytest.mark.parametrize(
    "body", [{"filter": {}}, {}, {"filter": {"colour": "red"}}, {"filter": {"owner_service": "x"}, "limit": 1001}], ids=str
)
def test_a_retry_of_many_needs_a_filter_and_a_limit_in_range(corner: Corner, body: dict[str, Any]) -> None:
    answer = corner.api.post("/api/v1/jobs/retry", body)
    assert (answer.status, answer.code) == (422, "validation_failed")


def retry_many(corner: Corner, filters: dict[str, Any], **more: Any) -> Any:
    answer = corner.api.post("/api/v1/jobs/retry", {"filter": filters, **more})
    assert answer.status == 200, answer
    return answer.json


# Cancel and delete


def test_a_cancelled_job_is_told_to_its_worker_at_its_next_call(corner: Corner) -> None:
    job = corner.take()
    cancelled = corner.done(job, "cancel", reason="the caller hung up")
    assert (cancelled["status"], cancelled["lease_expires_at"]) == ("cancelled", None)
    assert cancelled["finished_at"] is not None
    assert "the caller hung up" in str(cancelled["error"])
    assert corner.call(job, "heartbeat").code == "job_cancelled"
    beats = corner.api.post("/api/v1/jobs/heartbeat", {"jobs": [{"id": job["id"], "claim_id": job["claim_id"]}]})
    assert (beats.json["jobs"][0]["status"], beats.json["jobs"][0]["code"]) == (409, "job_cancelled")


def test_a_cancelled_pending_job_is_never_handed_out(corner: Corner) -> None:
    job, later = corner.create(), corner.create(run_at=LATER)
    corner.done(job, "cancel")
    corner.done(later, "cancel")
    assert corner.claim(limit=10) == []
    assert [corner.look(each)["status"] for each in (job, later)] == ["cancelled"] * 2


def test_a_deleted_job_is_gone_with_its_payloads(corner: Corner, sql: Sql) -> None:
    job = corner.take(input="a-secret-word-of-the-input", idempotency_key="k")
    corner.done(job, "complete", result="a-secret-word-of-the-result")
    answer = corner.api.delete(f"/api/v1/jobs/{job['id']}")
    assert (answer.status, answer.body) == (204, b"")
    assert corner.api.get(f"/api/v1/jobs/{job['id']}").code == "job_not_found"
    assert corner.api.get("/api/v1/jobs", owner_service=corner.owner_service).json["jobs"] == []
    assert sql("select 1 from job where id = cast(:id as uuid)", id=job["id"]) == []
    assert sql("select 1 from ended where job_id = cast(:id as uuid)", id=job["id"]) == []


def test_a_key_of_a_deleted_job_is_free_again(corner: Corner) -> None:
    job = corner.take(idempotency_key="k")
    corner.done(job, "complete")
    corner.api.delete(f"/api/v1/jobs/{job['id']}")
    assert corner.create(idempotency_key="k")["id"] != job["id"]


# Many at once


MANY: dict[str, dict[str, Any]] = {
    "complete": {"result": {"n": 1}},
    "fail": {"category": "timeout", "message": "m"},
    "heartbeat": {},
    "release": {},
}
AFTER = {"complete": "completed", "fail": "failed", "heartbeat": "running", "release": "pending"}


def three(corner: Corner) -> list[dict[str, Any]]:
    corner.batch([{} for _ in range(3)])
    return corner.claim(limit=3)


def item(job: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": job["id"], "claim_id": job["claim_id"], **fields}


@pytest.mark.parametrize("verb", MANY)
def test_many_are_decided_each_by_itself_in_order(corner: Corner, verb: str) -> None:
    first, stale, last = three(corner)
    unknown = {"id": str(uuid.uuid4()), "claim_id": first["claim_id"]}
    sent = [
        item(last, **MANY[verb]),
        item({**stale, "claim_id": str(uuid.uuid4())}, **MANY[verb]),
        {**unknown, **MANY[verb]},
        item(first, **MANY[verb]),
    ]
    answer = corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": sent})
    assert answer.status == 200
    assert [(each["id"], each["status"]) for each in answer.json["jobs"]] == [
        (last["id"], 200),
        (stale["id"], 409),
        (unknown["id"], 404),
        (first["id"], 200),
    ]
    assert [each.get("code") for each in answer.json["jobs"]][1:3] == ["claim_lost", "job_not_found"]
    assert [corner.look(job)["status"] for job in (first, stale, last)] == [AFTER[verb], "running", AFTER[verb]]


ILL: list[Callable[[dict[str, Any]], Any]] = [
    lambda good: {key: value for key, value in good.items() if key != "claim_id"},
    lambda good: {key: value for key, value in good.items() if key != "id"},
    lambda good: {**good, "colour": "red"},
    lambda good: {**good, "claim_id": 7},
    lambda good: 7,
    lambda good: None,
    lambda good: [],
]


@pytest.mark.parametrize("verb", MANY)
def test_an_ill_item_is_its_own_422_and_holds_up_nobody(corner: Corner, verb: str) -> None:
    first, ill, last = three(corner)
    for make in ILL:
        sent = [item(first, **MANY[verb]), make(item(ill, **MANY[verb])), item(last, **MANY[verb])]
        answer = corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": sent})
        assert answer.status == 200
        assert [each["status"] for each in answer.json["jobs"]] == [200, 422, 200]
        assert answer.json["jobs"][1]["code"] == "validation_failed"
    assert [corner.look(job)["status"] for job in (first, ill, last)] == [AFTER[verb], "running", AFTER[verb]]


def test_many_results_are_stored_each_with_its_job(corner: Corner) -> None:
    corner.batch([{} for _ in range(200)])
    jobs = corner.claim(limit=200)
    sent = [item(job, result={"of": job["id"]}, usage={"total_tokens": number}) for number, job in enumerate(jobs)]
    answer = corner.api.post("/api/v1/jobs/complete", {"jobs": sent})
    assert {each["status"] for each in answer.json["jobs"]} == {200}
    assert [(corner.look(job)["result"], corner.look(job)["usage"]) for job in jobs[::40]] == [
        ({"of": job["id"]}, {"total_tokens": number}) for number, job in list(enumerate(jobs))[::40]
    ]


def test_one_job_twice_in_a_call_is_decided_once(corner: Corner) -> None:
    job = corner.take()
    sent = [item(job, result="first"), item(job, result="second")]
    answer = corner.api.post("/api/v1/jobs/complete", {"jobs": sent})
    assert [each["status"] for each in answer.json["jobs"]] == [200, 200]
    assert corner.look(job)["result"] == "first"


def test_many_failures_are_retried_or_final_each_by_itself(corner: Corner) -> None:
    retryable, final, delayed = three(corner)
    told = {"category": "timeout", "message": "m"}
    sent = [item(retryable, **told, retryable=True), item(final, **told), item(delayed, **told, retryable=True, retry_in_seconds=1000)]
    assert {each["status"] for each in corner.api.post("/api/v1/jobs/fail", {"jobs": sent}).json["jobs"]} == {200}
    seen = [corner.look(job) for job in (retryable, final, delayed)]
    assert [job["status"] for job in seen] == ["pending", "failed", "pending"]
    assert 7 < delay(seen[0]) <= 12
    assert 990 < delay(seen[2]) <= 1001


def test_many_heartbeats_extend_each_lease_by_its_own_length(corner: Corner) -> None:
    corner.batch([{} for _ in range(2)])
    first, second = corner.claim(limit=2, lease_seconds=60)
    answer = corner.api.post("/api/v1/jobs/heartbeat", {"jobs": [item(first), item(second, lease_seconds=7200, progress={"p": 1})]})
    left = [moment(corner.look(job)["lease_expires_at"]) - datetime.now(UTC) for job in (first, second)]
    assert [each["status"] for each in answer.json["jobs"]] == [200, 200]
    assert timedelta(seconds=50) < left[0] <= timedelta(seconds=61)
    assert timedelta(seconds=7190) < left[1] <= timedelta(seconds=7201)
    assert corner.look(second)["progress"] == {"p": 1}


@pytest.mark.parametrize("verb", MANY)
def test_a_thousand_are_one_call_and_one_more_is_refused(corner: Corner, verb: str) -> None:
    unknown = [{"id": str(uuid.uuid4()), "claim_id": str(uuid.uuid4()), **MANY[verb]} for _ in range(1001)]
    answer = corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": unknown[:1000]})
    assert (answer.status, {each["status"] for each in answer.json["jobs"]}) == (200, {404})
    refused = corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": unknown})
    assert (refused.status, refused.paths) == (422, ["/jobs"])
