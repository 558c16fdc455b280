"""The HTTP client: what it sends, which calls it repeats, and which errors it raises."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import Distribution, distribution
from pathlib import Path
from time import monotonic
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints
from uuid import uuid4

import attrs
import pytest
from fake_service import Behaviour, FakeService, answers, forwards_and, hangs, loses, problem
from packaging.requirements import Requirement
from service import MAIN, Api, Corner, Service, wait_until

from ai_client import (
    AIService,
    AttemptError,
    Backoff,
    Batch,
    Claim,
    ClaimedJob,
    ClaimIdReused,
    ClaimLost,
    Completion,
    CreatedJob,
    Failure,
    FieldError,
    Forbidden,
    Heartbeat,
    IdempotencyKeyReused,
    InvalidState,
    Job,
    JobCancelled,
    JobError,
    JobFilter,
    Lease,
    NewJob,
    NotFound,
    NotJSON,
    Page,
    PayloadTooLarge,
    RawJSON,
    Release,
    Retried,
    ServiceError,
    ServiceUnavailable,
    Unauthorized,
    UnexpectedResponse,
    ValidationFailed,
    encode,
)

JOB = {
    "id": "018f0000-0000-7000-8000-000000000001",
    "status": "pending",
    "owner_service": "telephony",
    "owner_ref": "call/1",
    "task_type": "transcribe",
    "model_profile": "whisperx",
}
CLAIMED = {**JOB, "claim_id": "secret-claim", "attempt": 1, "max_attempts": 3, "lease_seconds": 120, "input": {"a": 1}}


@pytest.fixture
def fake() -> Iterator[FakeService]:
    with FakeService() as server:
        yield server


@pytest.fixture
def client(fake: FakeService) -> Iterator[AIService]:
    with AIService(fake.url, retry_seconds=5) as client:
        yield client


def new_job(**fields: Any) -> NewJob:
    return NewJob(**{"owner_service": "telephony", "owner_ref": "call/1", "task_type": "t", "model_profile": "p", "input": {}, **fields})


# ---------------------------------------------------------------- repeats


def test_create_repeats_with_the_same_generated_key_after_a_lost_response(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.behave("/jobs", loses(), answers(200, JOB))
    assert client.create_job(new_job()).id == JOB["id"]
    first, second = (seen.json["idempotency_key"] for seen in fake.asked("/jobs"))
    assert first == second
    assert len(first) >= 32


def test_new_jobs_have_different_keys_and_a_given_key_is_kept() -> None:
    assert new_job().idempotency_key != new_job().idempotency_key
    assert new_job(idempotency_key="mine").idempotency_key == "mine"


def test_claim_repeats_with_the_same_random_claim_id_after_a_lost_response(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.always("/jobs/claim", answers(200, {"claim_id": "c", "jobs": [CLAIMED]}))
    fake.behave("/jobs/claim", loses())
    assert [job.input for job in client.claim("w").jobs] == [{"a": 1}]
    client.claim("w")
    first, repeat, other = (seen.json["claim_id"] for seen in fake.asked("/jobs/claim"))
    assert first == repeat != other


def test_a_503_is_repeated_after_its_retry_after(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.behave("/jobs/x", problem(503, "unavailable", {"Retry-After": "1"}, retryable=True), answers(200, JOB))
    began = monotonic()
    client.get_job("x")
    assert monotonic() - began >= 1


def test_repeats_end_after_retry_seconds(fake: FakeService) -> None:
    fake.always("/jobs/x", problem(503, "unavailable"))
    with AIService(fake.url, retry_seconds=0.5) as client, pytest.raises(ServiceUnavailable):
        client.get_job("x")
    assert 2 <= len(fake.seen) <= 6


def test_a_retry_after_beyond_retry_seconds_is_not_waited_for(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.always("/jobs/x", problem(503, "unavailable", {"Retry-After": "3600"}))
    began = monotonic()
    with pytest.raises(ServiceUnavailable) as caught:
        client.get_job("x")
    assert caught.value.retry_after_seconds == 3600
    assert monotonic() - began < 2


def test_retry_after_may_be_a_date(fake: FakeService, client: AIService) -> None:
    fake.always("/jobs/x", problem(503, "unavailable", {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}))
    with pytest.raises(ServiceUnavailable) as caught:
        client.get_job("x")
    assert (caught.value.retry_after_seconds or 0) > 1e6


def test_a_bulk_retry_is_not_repeated(fake: FakeService, client: AIService) -> None:
    fake.always("/jobs/retry", loses())
    with pytest.raises(ServiceUnavailable):
        client.retry_many(JobFilter(status=["failed"]))
    assert len(fake.seen) == 1


@pytest.mark.parametrize(("status", "code"), [(400, "malformed_json"), (409, "claim_lost"), (422, "validation_failed"), (500, "internal")])
def test_a_permanent_error_is_not_repeated(
    fake: FakeService,
    client: AIService,
    status: int,
    code: str,
) -> None:
    fake.always("/complete", problem(status, code, retryable=False))
    with pytest.raises(ServiceError):
        client.complete("x", "c", {})
    assert len(fake.seen) == 1


def test_delete_succeeds_if_an_earlier_try_deleted_the_job(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.behave("/jobs/x", loses(), problem(404, "job_not_found"))
    client.delete("x")
    assert [seen.method for seen in fake.seen] == ["DELETE", "DELETE"]


def test_retry_sends_the_status_that_the_caller_saw(fake: FakeService, client: AIService) -> None:
    fake.always("/retry", answers(200, JOB))
    known: dict[str, Any] = {name: JOB[name] for name in JOB if name != "status"}
    client.retry(Job(**known, status="failed"))
    client.retry(JOB["id"])
    client.retry(JOB["id"], ["running"])
    client.retry(Job(**known, status="completed"))
    assert [seen.json["from"] for seen in fake.seen] == [["failed"], ["failed", "cancelled"], ["running"], ["failed", "cancelled"]]


def test_pauses_grow_with_jitter_and_are_not_shorter_than_retry_after() -> None:
    backoff = Backoff(1.0, 4.0)
    assert [0.5 * step <= backoff.next_seconds() <= step for step in (1, 2, 4, 4)] == [True] * 4
    assert backoff.next_seconds(60) == 60
    backoff.reset()
    assert backoff.next_seconds() <= 1
    assert len({Backoff().next_seconds() for _ in range(20)}) > 1


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "malformed_json", ValidationFailed),
        (401, "unauthorized", Unauthorized),
        (403, "forbidden", Forbidden),
        (404, "job_not_found", NotFound),
        (409, "claim_lost", ClaimLost),
        (409, "job_cancelled", JobCancelled),
        (409, "invalid_state", InvalidState),
        (409, "claim_id_reused", ClaimIdReused),
        (409, "idempotency_key_reused", IdempotencyKeyReused),
        (413, "body_too_large", PayloadTooLarge),
        (422, "too_deep", ValidationFailed),
        (503, "draining", ServiceUnavailable),
    ],
)
def test_each_problem_raises_its_exception(
    fake: FakeService,
    status: int,
    code: str,
    kind: type[ServiceError],
) -> None:
    fake.always("/cancel", problem(status, code, detail="why", errors=[{"path": "/reason", "message": "too long"}]))
    with AIService(fake.url, retry_seconds=0) as client, pytest.raises(kind) as caught:
        client.cancel("x")
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.detail) == (status, code, "why")
    assert (error.errors[0].path, error.errors[0].message) == ("/reason", "too long")
    assert str(error).endswith("why; /reason: too long")


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"", b"[1]", b"\xff", b'{"errors": [1, {}]}'])
def test_an_error_without_a_problem_body_raises_by_its_status(
    fake: FakeService,
    body: bytes,
) -> None:
    fake.always("/jobs/x", answers(502, body))
    with AIService(fake.url, retry_seconds=0) as client, pytest.raises(ServiceUnavailable) as caught:
        client.get_job("x")
    assert (caught.value.status, caught.value.code) == (502, "http_502")


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"", b"[]", b"{}", b'{"id": 1}', b'{"id": "\xff"}', b'{"status": NaN}'])
def test_a_body_that_is_not_a_job_raises_unexpected_response(
    fake: FakeService,
    client: AIService,
    body: bytes,
) -> None:
    fake.always("/jobs/x", answers(200, body))
    with pytest.raises(UnexpectedResponse):
        client.get_job("x")


def test_redirects_are_not_followed(fake: FakeService, client: AIService) -> None:
    fake.always("/jobs/x", answers(302, headers={"Location": f"{fake.url}/elsewhere"}))
    with pytest.raises(ServiceError) as caught:
        client.get_job("x")
    assert caught.value.status == 302
    assert len(fake.seen) == 1


def test_a_refused_connection_raises_service_unavailable() -> None:
    with FakeService() as gone:
        url = gone.url
    with AIService(url, retry_seconds=0.3) as client:
        with pytest.raises(ServiceUnavailable) as caught:
            client.get_job("x")
        assert (caught.value.status, caught.value.code, caught.value.retryable) == (None, "no_answer", True)
        assert client.healthz() is False
        assert client.readyz() is False


def test_a_call_ends_after_read_seconds(fake: FakeService) -> None:
    fake.always("/jobs/x", hangs())
    with AIService(fake.url, retry_seconds=0, read_seconds=0.2) as client, pytest.raises(ServiceUnavailable):
        client.get_job("x")


def test_closing_ends_a_call_that_waits_in_another_thread(fake: FakeService) -> None:
    fake.always("/jobs/claim", hangs())
    client, caught = AIService(fake.url, retry_seconds=60), []

    def claim() -> None:
        try:
            client.claim("w", wait_seconds=60)
        except ServiceUnavailable as error:
            caught.append(error)

    thread = threading.Thread(target=claim)
    thread.start()
    fake.wait_for("/jobs/claim")
    client.close()
    thread.join(2)
    assert not thread.is_alive()
    assert len(caught) == 1


# ---------------------------------------------------------------- secrets


def test_the_token_is_in_the_header_and_in_no_message(fake: FakeService) -> None:
    fake.always("/jobs/x", problem(401, "unauthorized"))
    with AIService(fake.url, "very-secret", retry_seconds=0) as client:
        with pytest.raises(Unauthorized) as caught:
            client.get_job("x")
        assert "very-secret" not in f"{client!r}{caught.value!r}{caught.value}"
    assert fake.seen[0].headers["Authorization"] == "Bearer very-secret"


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "schlüssel"])
def test_an_invalid_token_is_rejected_without_showing_it(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        AIService("http://127.0.0.1:1", token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", "http://me:pass-word@host", "http://host/?q=1", "http://[::1"])
def test_an_invalid_url_is_rejected_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"it (must|is)") as caught:
        AIService(url)
    assert "pass-word" not in str(caught.value)


def test_no_repr_shows_a_claim_id(fake: FakeService, client: AIService) -> None:
    fake.always("/jobs/claim", answers(200, {"claim_id": "secret-claim", "jobs": [CLAIMED]}))
    claim = client.claim("w")
    shown = [claim, *claim.jobs, Completion("x", "secret-claim", 1), Failure("x", "secret-claim", "c", "m"), Heartbeat("x", "secret-claim")]
    assert "secret-claim" not in repr(shown)
    assert claim.jobs[0].claim_id == "secret-claim"


# ---------------------------------------------------------------- payloads


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}, "\ud800", {1, 2}, b"x", object(), {math.nan: 1}])
def test_a_value_that_is_not_json_is_rejected_before_sending(
    fake: FakeService,
    client: AIService,
    value: Any,
) -> None:
    with pytest.raises(NotJSON):
        client.create_job(new_job(input=value))
    assert fake.seen == []


def test_a_recursive_or_very_deep_value_is_rejected() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(NotJSON):
        encode(value)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(NotJSON):
        encode(deep)


@pytest.mark.parametrize("text", ['1, "claim_id": "x"', "", "NaN", "{", "[1,]", '"\ud800"', "{}{}"])
def test_raw_json_rejects_text_that_is_not_one_json_value(text: str) -> None:
    with pytest.raises(NotJSON):
        RawJSON(text)


def test_raw_json_is_sent_character_by_character(fake: FakeService, client: AIService) -> None:
    fake.always("/jobs", answers(201, JOB))
    client.create_job(new_job(input=RawJSON('{"b":1.10,  "a":1E400,"b":2}')))
    assert b'"input":{"b":1.10,  "a":1E400,"b":2}' in fake.seen[0].body


def test_numbers_and_text_survive_encoding_and_decoding() -> None:
    value = {"float": 0.1 + 0.2, "int": 10**40, "text": 'ü\u2028"\\\0', "none": None}
    assert RawJSON(encode(value)).decode() == value


def test_a_number_that_python_rejects_fails_only_when_it_is_decoded(
    fake: FakeService,
    client: AIService,
) -> None:
    claimed = encode(CLAIMED | {"input": 7}).replace('"input":7', f'"input":{"7" * 5000}')
    fake.always("/jobs/claim", answers(200, f'{{"claim_id":"c","jobs":[{claimed}]}}'.encode()))
    [job] = client.claim("w").jobs
    assert job.raw_input.text == "7" * 5000
    with pytest.raises(NotJSON):
        _ = job.input


def test_fields_of_a_newer_service_are_ignored(fake: FakeService, client: AIService) -> None:
    error = {"category": "timeout", "message": "slow", "hint": 1}
    fake.always("/jobs/x", answers(200, {**JOB, "error": error, "errors": [{**error, "attempt": 1, "x": 2}], "colour": "red"}))
    job = client.get_job("x")
    assert job.error is not None
    assert (job.error.category, job.errors[0].attempt) == ("timeout", 1)


def test_times_are_sent_in_utc_and_read_with_a_time_zone(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.always("/jobs", answers(201, {**JOB, "created_at": "2026-01-02T03:04:05.678901Z"}))
    at = datetime(2030, 1, 1, tzinfo=UTC)
    assert client.create_job(new_job(run_at=at)).created_at == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    assert fake.seen[0].json["run_at"] == "2030-01-01T00:00:00Z"
    with pytest.raises(ValueError, match="time zone"):
        client.create_job(new_job(run_at=datetime(2030, 1, 1)))  # noqa: DTZ001 -- the mistake itself


def test_a_null_input_is_sent_as_null(fake: FakeService, client: AIService) -> None:
    fake.always("/jobs", answers(201, JOB))
    client.create_job(new_job(input=None))
    assert fake.seen[0].json["input"] is None


# ---------------------------------------------------------------- against the service


@pytest.fixture
def real(service: Service) -> Iterator[AIService]:
    with AIService(f"http://127.0.0.1:{service.api.port}") as client:
        yield client


def in_corner(corner: Corner, **fields: Any) -> NewJob:
    place = {"owner_service": corner.owner_service, "task_type": corner.task_type, "model_profile": corner.model_profile}
    return new_job(**place, **fields)


def test_a_job_is_created_claimed_and_completed(real: AIService, corner: Corner) -> None:
    created = real.create_job(in_corner(corner, input={"n": 1.10}, priority=2, max_attempts=2))
    [job] = real.claim("w1", model_profiles=[corner.model_profile], lease_seconds=60, worker={"version": "1"}).jobs
    assert (job.id, job.input, job.attempt, job.lease_seconds, job.priority) == (created.id, {"n": 1.1}, 1, 60, 2)
    lease = real.heartbeat(job.id, job.claim_id, lease_seconds=90, progress={"done": 1})
    assert lease.lease_seconds == 90
    assert real.get_job(job.id).progress == {"done": 1}
    done = real.complete(job.id, job.claim_id, {"text": "hello"}, {"total_tokens": 3})
    assert (done.status, done.usage) == ("completed", {"total_tokens": 3})
    waited = real.wait_for_job(job.id, timeout_seconds=5)
    assert (waited.result, waited.finished) == ({"text": "hello"}, True)
    assert real.get_job(job.id, include_input=True).input == {"n": 1.1}


def test_wait_for_job_raises_timeout_error(real: AIService, corner: Corner) -> None:
    created = real.create_job(in_corner(corner))
    with pytest.raises(TimeoutError, match="pending"):
        real.wait_for_job(created.id, timeout_seconds=0.2)


def test_a_failed_job_is_retried_cancelled_and_deleted(real: AIService, corner: Corner) -> None:
    created = real.create_job(in_corner(corner))
    [job] = real.claim("w1", model_profiles=[corner.model_profile]).jobs
    failed = real.fail(job.id, job.claim_id, "invalid_input", "no audio", usage={"audio_seconds": 1})
    assert (failed.status, failed.error and failed.error.category, failed.errors[0].usage) == (
        "failed",
        "invalid_input",
        {"audio_seconds": 1},
    )
    assert real.retry(failed).status == "pending"
    assert real.cancel(created.id, "not needed").status == "cancelled"
    real.delete(created.id)
    real.delete(created.id)
    with pytest.raises(NotFound):
        real.get_job(created.id)
    assert real.get_jobs([created.id]) == (None,)


def test_wait_for_job_pauses_if_the_service_responds_at_once(
    fake: FakeService,
    client: AIService,
) -> None:
    fake.always("/jobs/x", answers(200, JOB))
    with pytest.raises(TimeoutError):
        client.wait_for_job("x", timeout_seconds=1)
    assert len(fake.seen) <= 10


def test_bulk_calls_report_each_item(real: AIService, corner: Corner) -> None:
    jobs = [in_corner(corner, owner_ref=f"call/{number}") for number in range(6)]
    batch, again = real.create_jobs(jobs), real.create_jobs(jobs)
    assert (batch.created, again.existing) == (6, 6)
    assert [item.id for item in batch.jobs] == [item.id for item in again.jobs]
    one, two, three, four, five, six = real.claim("w1", limit=6, model_profiles=[corner.model_profile]).jobs
    beats = real.heartbeat_many([Heartbeat(one.id, one.claim_id), Heartbeat(two.id, str(uuid4()))], worker={"version": "1"})
    assert [(answer.status, type(answer.error)) for answer in beats] == [(200, type(None)), (409, ClaimLost)]
    results = [Completion(one.id, one.claim_id, RawJSON('{"x":1.10}')), Completion(two.id, two.claim_id, None)]
    assert [answer.status for answer in real.complete_many(results)] == [200, 200]
    assert real.get_job(one.id).raw_result == RawJSON('{"x":1.10}')
    failures = [Failure(three.id, three.claim_id, "timeout", "slow"), Failure(four.id, four.claim_id, "timeout", "slow", retryable=True)]
    assert [answer.status for answer in real.fail_many(failures)] == [200, 200]
    assert real.release_many([Release(five.id, five.claim_id), Release(six.id, six.claim_id, 60)])[0].status == 200
    statuses = ["completed", "completed", "failed", "pending", "pending", "pending"]
    assert [job and job.status for job in real.get_jobs([item.id for item in batch.jobs])] == statuses
    assert real.retry_many(JobFilter(owner_service=[corner.owner_service], error_category=["timeout"])).retried == 1


def test_iter_jobs_fetches_all_pages(real: AIService, corner: Corner) -> None:
    batch = real.create_jobs([in_corner(corner, owner_ref=f"call/{number}") for number in range(5)])
    mine = JobFilter(owner_service=[corner.owner_service], status=["pending", "running"], created_after=datetime(2020, 1, 1, tzinfo=UTC))
    page = real.list_jobs(mine, limit=2)
    assert len(page.jobs) == 2
    assert page.next_cursor
    assert [job.id for job in real.iter_jobs(mine, page_size=2)] == [item.id for item in reversed(batch.jobs)]


def test_operator_calls(real: AIService, corner: Corner) -> None:
    real.create_job(in_corner(corner))
    real.pause(task_types=[corner.task_type])
    assert real.claim("w1", model_profiles=[corner.model_profile]).jobs == ()
    real.resume(task_types=[corner.task_type])
    assert len(real.claim(corner.worker_id, model_profiles=[corner.model_profile]).jobs) == 1
    assert real.stats(3600)["window_seconds"] == 3600
    wait_until(lambda: any(worker["worker_id"] == corner.worker_id for worker in real.workers()))
    assert "providers" in real.providers_status()
    assert real.healthz()
    assert real.readyz()


def test_lost_responses_create_claim_and_complete_once(service: Service, corner: Corner) -> None:
    lost: Behaviour = forwards_and(loses())
    with FakeService(forward_to=service.api.port) as proxy, AIService(proxy.url) as client:
        for end in ("/jobs", "/jobs/claim", "/complete"):
            proxy.behave(end, lost)
        created = client.create_job(in_corner(corner))
        [job] = client.claim("w1", model_profiles=[corner.model_profile]).jobs
        assert (job.id, job.attempt) == (created.id, 1)
        assert client.complete(job.id, job.claim_id, "first").status == "completed"
        assert len(list(client.iter_jobs(JobFilter(owner_service=[corner.owner_service])))) == 1


def test_threads_share_a_client(real: AIService, corner: Corner) -> None:
    with ThreadPoolExecutor(16) as threads:
        created = list(threads.map(lambda number: real.create_job(in_corner(corner, owner_ref=str(number))).owner_ref, range(100)))
    assert created == [str(number) for number in range(100)]


# ---------------------------------------------------------------- the types and the document

# The client's type of each schema. What it sends may be less than the schema allows, and what it
# reads may be more than the schema says.
SENT = {
    "NewJob": NewJob,
    "CompletionItem": Completion,
    "FailureItem": Failure,
    "HeartbeatItem": Heartbeat,
    "ReleaseItem": Release,
    "RetryFilter": JobFilter,
}
READ = {
    "Job": Job,
    "JobError": JobError,
    "AttemptError": AttemptError,
    "ClaimedJob": ClaimedJob,
    "Claim": Claim,
    "CreatedJob": CreatedJob,
    "Batch": Batch,
    "Page": Page,
    "Lease": Lease,
    "Retried": Retried,
    "FieldError": FieldError,
}
JSON_TYPES = {str: "string", datetime: "time", int: "integer", float: "number", bool: "boolean"}


@pytest.fixture(scope="module")
def schemas(api: Api) -> dict[str, Any]:
    return dict(api.get("/openapi.json").json["components"]["schemas"])


def types_of_schema(schemas: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    if "$ref" in schema:
        return types_of_schema(schemas, schemas[schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return set().union(*(types_of_schema(schemas, each) for each in schema["anyOf"]))
    if schema.get("format") == "date-time":
        schema = {"type": [each.replace("string", "time") for each in listed(schema["type"])]}
    return set(listed(schema.get("type", "any")))


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def types_of_hint(hint: Any) -> set[str]:
    if isinstance(hint, UnionType):
        return set().union(*map(types_of_hint, get_args(hint)))
    if hint in (Any, RawJSON):
        return {"any"}
    if hint is NoneType:
        return {"null"}
    if get_origin(hint) in (tuple, Sequence):
        return {"array"}
    return {JSON_TYPES.get(hint, "object")}


def fields_of(kind: type[Any]) -> dict[str, set[str]]:
    """The JSON types of each field of a client's type."""
    hints = get_type_hints(kind)
    names = [field.name for field in attrs.fields(kind)]
    return {name.removeprefix("raw_"): types_of_hint(hints[name]) for name in names}


def required_of(kind: type[Any]) -> set[str]:
    fields = attrs.fields(kind)
    return {each.name.removeprefix("raw_") for each in fields if each.default is attrs.NOTHING}


@pytest.mark.parametrize("name", [*SENT, *READ])
def test_a_type_of_the_client_has_every_field_of_its_schema(
    schemas: dict[str, Any],
    name: str,
) -> None:
    assert set(fields_of({**SENT, **READ}[name])) == set(schemas[name]["properties"])


@pytest.mark.parametrize("name", SENT)
def test_the_service_accepts_what_a_type_of_the_client_holds(
    schemas: dict[str, Any],
    name: str,
) -> None:
    for field, types in fields_of(SENT[name]).items():
        allowed = types_of_schema(schemas, schemas[name]["properties"][field])
        # None is not sent: the field is left out.
        assert types - {"null"} <= allowed, field
    assert set(schemas[name].get("required", ())) <= required_of(SENT[name])


@pytest.mark.parametrize("name", READ)
def test_a_type_of_the_client_holds_what_the_service_sends(
    schemas: dict[str, Any],
    name: str,
) -> None:
    for field, types in fields_of(READ[name]).items():
        sent = types_of_schema(schemas, schemas[name]["properties"][field])
        assert sent <= types, field
    assert required_of(READ[name]) <= set(schemas[name]["required"])


# ---------------------------------------------------------------- copied into another project

COPIED = """
import sys
from ai_client import AIService, NewJob

url, owner_service, task_type, model_profile = sys.argv[1:]
with AIService(url) as service:
    new = NewJob(owner_service, "copied/1", task_type, model_profile, input={"prompt": "Hi"})
    job = service.get_job(service.create_job(new).id, include_input=True)
    print(job.status, job.owner_ref, job.input)
"""


def with_requirements(names: Iterable[str]) -> Iterator[Distribution]:
    """The distributions of these names, and those that they need."""
    for name in names:
        yield distribution(name)
        needed = map(Requirement, distribution(name).requires or ())
        without_extras = [each for each in needed if not each.marker or each.marker.evaluate()]
        yield from with_requirements(each.name for each in without_extras)


def install(environment: Path, names: Iterable[str]) -> None:
    """Put these packages, as they are installed here, and no others into a virtual environment."""
    [site] = environment.glob("lib/python3*/site-packages")
    for package in with_requirements(names):
        tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
        for top in tops:
            (site / top).symlink_to(str(package.locate_file(top)))


def test_ai_client_works_in_another_project_with_the_packages_that_its_page_names(
    service: Service,
    corner: Corner,
    tmp_path: Path,
) -> None:
    page = (MAIN.parent / "docs" / "caller.md").read_text()
    [packages] = re.findall(r"`pip install ([^`]+)`", page)
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    install(environment, packages.split())
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(MAIN.parent / "ai_client.py", project)
    (project / "main.py").write_text(COPIED)
    command = [environment / "bin" / "python", "-B", "-W", "error", "main.py"]
    place = [corner.owner_service, corner.task_type, corner.model_profile]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{service.api.port}", *place],
        cwd=project,
        env={},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("pending copied/1 {'prompt': 'Hi'}\n", "")
