"""msgspec reads requests, and cattrs explains what it refused: each refusal has an explanation, and nothing else has one."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from typing import Any

import attrs
import cattrs
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai_internal.server import requests
from ai_internal.server.requests import (
    BatchBody,
    Body,
    BulkBody,
    BulkHeartbeat,
    BulkRetry,
    Cancellation,
    ClaimRequest,
    Completion,
    Failure,
    Heartbeat,
    JobIds,
    NewJob,
    PauseRequest,
    Refusal,
    Release,
    Retry,
    Usage,
    WorkerReport,
    explain,
    read_object,
    reader_of,
    validation_refusal,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
UUID = str(uuid.UUID(int=7))

WHERE = {"owner_service": "a", "task_type": "b", "model_profile": "c"}
TIMES = {"run_at": "2026-01-01T00:00:00Z", "expires_at": "2026-01-01T00:00:00+01:00"}
MARKS = {"idempotency_key": "f", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
LIMITS = {"limit": 3, "lease_seconds": 5, "wait_seconds": 0.5}
GOOD: dict[type[Any], dict[str, Any]] = {
    NewJob: {**WHERE, "owner_ref": "d", "input": {"e": [1]}, "priority": 3, "max_attempts": 2, **TIMES, **MARKS},
    ClaimRequest: {"worker_id": "w", "model_profiles": ["a"], "claim_id": UUID, "worker": {"capacity": 1}, **LIMITS},
    Completion: {"claim_id": UUID, "result": None, "usage": {"prompt_tokens": 1, "model": "m"}},
    Failure: {"claim_id": UUID, "category": "a", "message": "", "retryable": True, "retry_in_seconds": 3},
    Heartbeat: {"claim_id": UUID, "lease_seconds": 5.5, "progress": {"done": 1}},
    Release: {"claim_id": UUID, "delay_seconds": 0},
    Retry: {"from": ["failed"]},
    BulkRetry: {"filter": {"status": "failed"}, "limit": 3},
    Cancellation: {"reason": "a"},
    JobIds: {"ids": ["a"]},
    PauseRequest: {"model_profiles": ["a"]},
    Usage: {"prompt_tokens": 1, "model": "m"},
    WorkerReport: {"version": "1", "providers": [{"name": "vllm", "status": "ok"}], "more": 1},
}
KINDS = tuple(GOOD)

# JSON texts as somebody may send them, at the borders of what a field takes.
TEXTS = [
    *(
        "null",
        "true",
        "false",
        "0",
        "1",
        "-0",
        "10",
        "11",
        "-10",
        "5",
        "4.9",
        "5.0",
        "1e1",
        "1.5",
        "100",
        "101",
        "1000",
        "1001",
        "60.5",
        "86400",
    ),
    *("1e400", "1000000000000000", "1000000000000001", "99999999999999999999999", "nul"),
    *(f'"{text}"' for text in ("", "a", "a\\n", "a\\u0000", "a/b@c+d.e_f-1", "ä", "\\ud800", "\\ud83d\\ude00", "x" * 100, "x" * 101)),
    *(f'"{text}"' for text in ("€" * 500, "€" * 501, UUID, UUID.upper(), f"{UUID}\\n", "[" * 600, f"00-{'a' * 32}-{'b' * 16}-01")),
    *(
        f'"{text}"'
        for text in ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00", "9999-12-31T23:59:59+23:59", "failed", "running", "timed_out")
    ),
    *("[]", '["a"]', '["failed"]', '["a", 1]', "[null]"),
    *(f"[{','.join([text] * count)}]" for text, count in (("1", 1001), ('"a"', 1000), ('"a"', 1001))),
    *("[" * depth + "]" * depth for depth in (500, 501)),
    *("{}", '{"prompt_tokens": 1}', '{"prompt_tokens": -1}', '{"prompt_tokens": "1", "prompt_tokens": 2}', f'{{"a": "{"x" * 5000}"}}'),
    *(
        '{"version": "1", "providers": []}',
        '{"version": 1}',
        '{"providers": [{"name": "vllm", "status": "ok"}]}',
        '{"providers": [{"name": "v"}]}',
    ),
    *('{"status": "failed"}', '{"owner_service": []}', "1 2", ""),
]


def members(kind: type[Any]) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Members of an object: mostly what the kind has, at times twice, at times what it has not."""
    names = [field.name.rstrip("_") for field in attrs.fields(kind)]
    likely = st.sampled_from([*names, *names, *names, "id", "other"])
    required = [field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING]
    right = st.tuples(*(st.tuples(st.just(name), st.sampled_from([f'"{UUID}"', '["a"]', '"a"'])) for name in required))
    return st.builds(lambda first, rest: [*first, *rest], right, st.lists(st.tuples(likely, st.sampled_from(TEXTS)), max_size=4))


def objects(kind: type[Any]) -> st.SearchStrategy[str]:
    """JSON objects that are nearly a request."""
    return members(kind).map(lambda told: "{" + ", ".join(f'"{name}": {text}' for name, text in told) + "}")


def fields(body: bytes) -> dict[str, msgspec.Raw] | None:
    """The members of a body; None where it is not a JSON object."""
    with contextlib.suppress(Refusal):
        return read_object(body)
    return None


def is_read_or_explained(body: bytes, kind: type[Any]) -> bool:
    """Whether a body is read; asserts that what is refused is what an explanation is found for."""
    members = fields(body)
    if members is None:
        with pytest.raises(Refusal):
            Body(kind).read(body)
        return False
    try:
        explain(members, kind)
    except (ValueError, cattrs.BaseValidationError) as error:
        wrong = validation_refusal(error, "")
    else:
        assert isinstance(Body(kind).read(body), kind)
        return True
    with pytest.raises(type(wrong)) as refused:
        Body(kind).read(body)
    assert refused.value.errors == wrong.errors
    assert wrong.errors
    return False


def often(times: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, whatever the machine's speed."""
    return settings(max_examples=times * EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@often(3)
@given(data=st.data())
def test_a_body_is_read_or_its_refusal_is_explained(kind: type[Any], data: st.DataObject) -> None:
    is_read_or_explained(data.draw(objects(kind)).encode(), kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_text_in_every_field_is_read_or_its_refusal_is_explained(kind: type[Any]) -> None:
    for field in attrs.fields(kind):
        name = "from" if field.name == "from_" else field.name
        others = ", ".join(f'"{other}": {json.dumps(value)}' for other, value in GOOD[kind].items() if other != name)
        for text in TEXTS:
            is_read_or_explained(f'{{"{name}": {text}{", " if others else ""}{others}}}'.encode(), kind)


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_a_right_request_needs_no_explanation(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "explain", None)
    assert reader_of(kind).read(msgspec.json.encode(GOOD[kind])) == Body(kind).read(msgspec.json.encode(GOOD[kind]))


@often(3)
@given(defaults=st.none() | objects(requests.JobDefaults), jobs=st.lists(objects(NewJob), max_size=3))
def test_a_job_of_a_batch_is_read_as_alone_with_the_defaults_it_does_not_have(defaults: str | None, jobs: list[str]) -> None:
    given_defaults = "" if defaults is None else f'"defaults": {defaults}, '
    body = f'{{{given_defaults}"jobs": [{", ".join(jobs)}]}}'.encode()
    try:
        made = BatchBody().read(body)
    except Refusal:
        return
    common = read_object((defaults or "{}").encode())
    assert made == [Body(NewJob).read(msgspec.json.encode({**common, **read_object(job.encode())})) for job in jobs]


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(NewJob)])
def test_a_default_is_read_as_the_field_of_a_job(name: str) -> None:
    facts = {"owner_service": '"a"', "task_type": '"a"', "model_profile": '"a"', "owner_ref": '"a"', "input": "1"}
    job = ", ".join(f'"{each}": {value}' for each, value in facts.items() if each != name)
    for text in TEXTS:
        alone = f'{{{job}, "{name}": {text}}}'.encode()
        batch = f'{{"defaults": {{"{name}": {text}}}, "jobs": [{{{job}}}]}}'.encode()
        if name in ("owner_ref", "idempotency_key") or not is_read_or_explained(alone, NewJob):
            with pytest.raises(Refusal):
                BatchBody().read(batch)
        else:
            assert BatchBody().read(batch) == [Body(NewJob).read(alone)]


def test_a_field_that_is_present_in_the_job_wins_over_the_default_null_too() -> None:
    defaults = {"owner_service": "a", "task_type": "b", "model_profile": "c", "input": 1, "priority": 3, "run_at": "2026-01-01T00:00:00Z"}
    jobs = [{"owner_ref": "d"}, {"owner_ref": "e", "priority": None, "input": None}, GOOD[NewJob]]
    first, second, third = BatchBody().read(msgspec.json.encode({"defaults": defaults, "jobs": jobs}))
    assert (first.priority, first.input, first.run_at) == (3, "1", "2026-01-01T00:00:00Z")
    assert (second.priority, second.input) == (0, "null")
    assert third.owner_ref == "d"


@pytest.mark.parametrize("text", ["{}", "{ }", "null", '{"defaults": {}, "jobs": [{ }]}'])
def test_an_empty_job_over_defaults_lacks_its_own_fields(text: str) -> None:
    defaults = msgspec.json.encode({"owner_service": "a", "task_type": "b", "model_profile": "c", "input": 1})
    with pytest.raises(Refusal) as refused:
        BatchBody().read(b'{"defaults": %b, "jobs": [%b]}' % (defaults, text.encode()))
    assert refused.value.errors


@pytest.mark.parametrize("kind", [Completion, Failure, Heartbeat, Release], ids=lambda kind: kind.__name__)
def test_an_item_is_read_as_the_request_for_one_job(kind: type[Any]) -> None:
    body = msgspec.json.encode({"jobs": [{"id": UUID.upper(), **GOOD[kind]}], "worker": {"capacity": 1}})
    items = BulkBody(kind, BulkHeartbeat).read(body)
    [(job_id, item)] = items.entries
    assert (job_id, items.beside.worker) == (UUID, '{"capacity":1}')
    alone = Body(kind).read(msgspec.json.encode(GOOD[kind]))
    assert {field.name: getattr(item, field.name) for field in attrs.fields(kind)} == attrs.asdict(alone, recurse=False)


@pytest.mark.parametrize(
    ("wrong", "job_id", "errors"),
    [
        ('"id": "no uuid"', "no uuid", []),
        ('"id": null', None, ["/jobs/1/id"]),
        (f'"id": "{UUID}", "other": 1', UUID, ["/jobs/1/other"]),
        ("", None, ["/jobs/1/id"]),
    ],
)
def test_an_invalid_item_does_not_affect_the_others(wrong: str, job_id: str | None, errors: list[str]) -> None:
    right = f'{{"id": "{UUID}", "claim_id": "{UUID}", "result": 1}}'
    members = ", ".join(filter(None, [wrong, f'"claim_id": "{UUID}"', '"result": 1']))
    first, (found, refusal), third = BulkBody(Completion).read(f'{{"jobs": [{right}, {{{members}}}, {right}]}}'.encode()).entries
    assert (found, [error["path"] for error in refusal.errors]) == (job_id, errors)
    assert first == third
    assert first[1].result == "1"


def test_an_explanation_names_every_problem() -> None:
    with pytest.raises(Refusal) as refused:
        Body(ClaimRequest).read(b'{"worker_id": "", "limit": 0, "other": 1}')
    assert sorted(error["path"] for error in refused.value.errors) == ["/limit", "/other", "/worker_id"]


def test_of_a_name_that_comes_twice_the_last_counts() -> None:
    assert Body(ClaimRequest).read(b'{"worker_id": "", "limit": "x", "limit": 3, "worker_id": "w"}').limit == 3
