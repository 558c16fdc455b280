"""Requests are read in one go where nothing is wrong with them; what is wrong is found in a second look. Both must mean the same."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Callable
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai_internal.server import requests
from ai_internal.server.requests import (
    UNCLEAR,
    BatchReader,
    BulkRetry,
    Cancellation,
    ClaimRequest,
    Completion,
    Failure,
    Heartbeat,
    ItemsReader,
    JobIds,
    NewJob,
    PauseRequest,
    Refusal,
    Release,
    Retry,
    Usage,
    WorkerReport,
    read_object,
    reader_of,
    structure,
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


def agree(at_once: Callable[[], Any], explained: Callable[[], Any]) -> bool:
    """Whether it was read at once; asserts that the second look would have taken it for the same."""
    try:
        read = at_once()
    except UNCLEAR:
        return False
    assert read == explained()
    return True


def often(times: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, whatever the machine's speed."""
    return settings(max_examples=times * EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@often(3)
@given(data=st.data())
def test_what_is_read_at_once_would_be_taken_for_the_same_at_a_second_look(kind: type[Any], data: st.DataObject) -> None:
    body = data.draw(objects(kind)).encode()
    agree(lambda: reader_of(kind).read(body), lambda: structure(read_object(body), kind))


@often(3)
@given(defaults=st.none() | objects(requests.JobDefaults), jobs=st.lists(objects(NewJob), max_size=3))
def test_a_batch_read_at_once_would_be_taken_for_the_same_at_a_second_look(defaults: str | None, jobs: list[str]) -> None:
    given_defaults = "" if defaults is None else f'"defaults": {defaults}, '
    body = f'{{{given_defaults}"jobs": [{", ".join(jobs)}]}}'.encode()
    agree(lambda: BatchReader().read(body), lambda: requests._structure_batch(body))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_text_in_every_field_means_the_same_at_once_and_at_a_second_look(kind: type[Any]) -> None:
    for field in attrs.fields(kind):
        name = "from" if field.name == "from_" else field.name
        others = ", ".join(f'"{other}": {json.dumps(value)}' for other, value in GOOD[kind].items() if other != name)
        for text in TEXTS:
            body = f'{{"{name}": {text}{", " if others else ""}{others}}}'.encode()
            agree(functools.partial(reader_of(kind).read, body), lambda: structure(read_object(body), kind))  # noqa: B023  called at once


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(NewJob)])
def test_a_default_read_at_once_means_what_it_means_at_a_second_look(name: str) -> None:
    facts = {"owner_service": '"a"', "task_type": '"a"', "model_profile": '"a"', "owner_ref": '"a"', "input": "1"}
    job = ", ".join(f'"{each}": {value}' for each, value in facts.items() if each != name)
    for text in TEXTS:
        body = f'{{"defaults": {{"{name}": {text}}}, "jobs": [{{{job}}}, {{{job}, "{name}": null}}]}}'.encode()
        agree(functools.partial(BatchReader().read, body), functools.partial(requests._structure_batch, body))


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_a_request_in_which_nothing_is_wrong_needs_no_second_look(kind: type[Any]) -> None:
    body = msgspec.json.encode(GOOD[kind])
    assert agree(lambda: reader_of(kind).read(body), lambda: structure(read_object(body), kind))


def test_a_batch_in_which_nothing_is_wrong_needs_no_second_look() -> None:
    defaults = {"owner_service": "a", "task_type": "b", "model_profile": "c", "input": 1, "priority": 3, "run_at": "2026-01-01T00:00:00Z"}
    jobs = [{"owner_ref": "d"}, {"owner_ref": "e", "priority": None, "input": None}, GOOD[NewJob]]
    body = msgspec.json.encode({"defaults": defaults, "jobs": jobs})
    assert agree(lambda: BatchReader().read(body), lambda: requests._structure_batch(body))
    first, second, third = BatchReader().read(body)
    assert (first.priority, first.input, first.run_at) == (3, "1", "2026-01-01T00:00:00Z")
    assert (second.priority, second.input) == (None, "null")
    assert third.owner_ref == "d"


@pytest.mark.parametrize("kind", [Completion, Failure, Heartbeat, Release], ids=lambda kind: kind.__name__)
def test_items_in_which_nothing_is_wrong_need_no_second_look(kind: type[Any]) -> None:
    body = msgspec.json.encode({"jobs": [{"id": UUID.upper(), **GOOD[kind]}], "worker": {"capacity": 1}})
    [(job_id, item)], beside = ItemsReader(kind, ["worker"]).read(body)
    assert (job_id, bytes(beside["worker"])) == (UUID, b'{"capacity":1}')
    assert item == structure(msgspec.Raw(msgspec.json.encode(GOOD[kind])), kind)


@pytest.mark.parametrize("ill", ['"id": "no uuid"', '"id": null', '"other": 1', ""])
def test_an_ill_item_takes_the_second_look(ill: str) -> None:
    told = ", ".join(filter(None, [ill, f'"claim_id": "{UUID}"', '"result": 1']))
    with pytest.raises(UNCLEAR):
        ItemsReader(Completion, []).read(f'{{"jobs": [{{{told}}}]}}'.encode())


def test_only_the_second_look_explains() -> None:
    with pytest.raises(Refusal) as refused:
        requests.read_body(b'{"worker_id": "", "limit": 0, "other": 1}', ClaimRequest)
    assert sorted(error["path"] for error in refused.value.errors) == ["/limit", "/other", "/worker_id"]
