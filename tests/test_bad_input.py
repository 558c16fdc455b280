"""Bad input: a clear problem of the right status, never a 500, never a partial write."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
from postgres import fresh_schema
from service import Answer, Api, Corner, Service, encoded, raw_post, running_service, wait_until

CREATE, BATCH, CLAIM = "/api/v1/jobs", "/api/v1/jobs/batch", "/api/v1/jobs/claim"
FOR_ALL = (CREATE, BATCH, CLAIM, "/api/v1/jobs/get", "/api/v1/jobs/retry", "/api/v1/pause", "/api/v1/resume")
FOR_MANY = tuple(f"/api/v1/jobs/{verb}" for verb in ("complete", "fail", "heartbeat", "release"))
FOR_ONE = ("complete", "fail", "heartbeat", "release", "retry", "cancel")

MALFORMED = {
    "nothing closed": b'{"a": 1',
    "two values": b"{} {}",
    "not JSON": b"owner_service=telephony",
    "single quotes": b"{'a': 1}",
    "a comment": b'{"a": 1} // done',
    "a comma too many": b'{"a": 1,}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a leading zero": b'{"a": 01}',
    "a raw line feed in a string": b'{"a": "\n"}',
    "bad UTF-8": b'{"a": "\xff\xfe"}',
    "an overlong encoding": b'{"a": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "an unpaired surrogate escape": rb'{"a": "\ud800"}',
    "a low surrogate alone": rb'{"a": "\udc00x"}',
    "an escape of nothing": rb'{"a": "\x41"}',
}


def is_problem(answer: Answer, status: int, code: str | None = None) -> bool:
    """Asserts status and form of a problem, and its code where the contract names one."""
    assert answer.status == status, answer
    assert code is None or answer.code == code
    return answer.code is not None


def outcomes(api: Api, path: str, bodies: Mapping[str, bytes]) -> dict[str, tuple[int, str | None]]:
    """Status and code of the response to each body, by its name."""
    answers = {name: api.post(path, body=body) for name, body in bodies.items()}
    return {name: (answer.status, answer.code) for name, answer in answers.items()}


@pytest.mark.parametrize("path", [*FOR_ALL, *FOR_MANY])
def test_what_is_not_json_is_refused_everywhere(api: Api, path: str) -> None:
    assert outcomes(api, path, MALFORMED) == dict.fromkeys(MALFORMED, (400, "malformed_json"))


@pytest.mark.parametrize("verb", FOR_ONE)
def test_what_is_not_json_is_refused_for_one_job(corner: Corner, verb: str) -> None:
    job = corner.take()
    for body in MALFORMED.values():
        assert is_problem(corner.api.post(f"/api/v1/jobs/{job['id']}/{verb}", body=body), 400, "malformed_json")
    assert corner.look(job)["status"] == "running"


@pytest.mark.parametrize("text", [body[6:-1] for body in MALFORMED.values() if body.startswith(b'{"a": ') and body.endswith(b"}")])
def test_what_is_not_json_is_refused_inside_a_payload_too(corner: Corner, text: bytes) -> None:
    if text.endswith(b","):
        text = b"[1,]"
    fields = encoded({key: value for key, value in corner.job().items() if key != "input"})[:-1]
    for payload in (text, b'{"deeper": [%s]}' % text):
        body = fields + b', "input": ' + payload + b"}"
        assert is_problem(corner.api.post(CREATE, body=body), 400, "malformed_json")
        assert is_problem(corner.api.post(BATCH, body=b'{"jobs": [%s, %s]}' % (encoded(corner.job()), body)), 400, "malformed_json")
    assert corner.claim(limit=10) == []
    job = corner.take()
    body = b'{"claim_id": "%s", "result": %s}' % (job["claim_id"].encode(), text)
    assert is_problem(corner.api.post(f"/api/v1/jobs/{job['id']}/complete", body=body), 400, "malformed_json")
    assert corner.look(job)["status"] == "running"


@pytest.mark.parametrize("path", [*FOR_ALL, *FOR_MANY])
def test_a_body_that_is_no_object_is_refused(api: Api, path: str) -> None:
    bodies = {text: text.encode() for text in ("[]", '"text"', "7", "null", "true")}
    assert outcomes(api, path, bodies) == dict.fromkeys(bodies, (422, "validation_failed"))


@pytest.mark.parametrize("path", [*FOR_ALL, *FOR_MANY])
def test_an_empty_body_lacks_what_is_required(api: Api, path: str) -> None:
    assert is_problem(api.post(path, body=b""), 422, "validation_failed")


@pytest.mark.parametrize(("verb", "status"), [("retry", "pending"), ("cancel", "cancelled")])
def test_an_empty_body_is_an_empty_object_where_nothing_is_required(corner: Corner, verb: str, status: str) -> None:
    answer = corner.api.post(f"/api/v1/jobs/{corner.take()['id']}/{verb}", body=b"")
    assert (answer.status, answer.json["status"]) == (200, status)


# Depth


DEEP = {"arrays": b"[" * 100_000 + b"]" * 100_000, "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000}


@pytest.mark.parametrize("deep", DEEP.values(), ids=DEEP)
def test_100_000_levels_are_too_deep_wherever_they_stand(corner: Corner, deep: bytes) -> None:
    fields = encoded({key: value for key, value in corner.job().items() if key != "input"})[:-1]
    job = fields + b', "input": ' + deep + b"}"
    assert is_problem(corner.api.post(CREATE, body=job), 422, "too_deep")
    assert is_problem(corner.api.post(BATCH, body=b'{"jobs": [%s, %s]}' % (encoded(corner.job()), job)), 422, "too_deep")
    assert is_problem(corner.api.post(CREATE, body=fields + b', "priority": ' + deep + b"}"), 422)
    assert is_problem(corner.api.post(CLAIM, body=b'{"worker_id": "w", "worker": ' + deep + b"}"), 422)
    assert corner.claim(limit=10) == []
    running = corner.take()
    claim = b'{"claim_id": "%s", "result": %s}' % (running["claim_id"].encode(), deep)
    assert is_problem(corner.api.post(f"/api/v1/jobs/{running['id']}/complete", body=claim), 422, "too_deep")
    assert corner.look(running)["status"] == "running"


def test_a_deep_result_is_its_own_422_among_many(corner: Corner) -> None:
    corner.batch([{}, {}])
    good, bad = corner.claim(limit=2)
    items = (b'{"id":"%s","claim_id":"%s","result":%s}' % (job["id"].encode(), job["claim_id"].encode(), result)
             for job, result in ((good, b"1"), (bad, b"[" * 600 + b"]" * 600)))  # fmt: skip
    answer = corner.api.post("/api/v1/jobs/complete", body=b'{"jobs":[%s]}' % b",".join(items))
    assert answer.status == 200
    assert [each["status"] for each in answer.json["jobs"]] == [200, 422]
    assert [corner.look(job)["status"] for job in (good, bad)] == ["completed", "running"]


def test_100_000_open_brackets_are_refused(api: Api) -> None:
    answer = api.post(CREATE, body=b"[" * 100_000)
    assert answer.status in (400, 422)
    assert answer.code in ("malformed_json", "too_deep")


# Types and numbers


HUGE = ["1e400", "-1e400", "1e308", "1" + "0" * 400, "1" + "0" * 5000, "-1" + "0" * 5000, "0.1e-400"]


@pytest.mark.parametrize("number", HUGE, ids=lambda number: number[:8] + f"_{len(number)}")
def test_huge_numbers_are_out_of_range(corner: Corner, number: str) -> None:
    if number != "0.1e-400":
        assert is_problem(with_number(corner, CREATE, corner.job(), "priority", number), 422, "validation_failed")
        assert is_problem(with_number(corner, CREATE, corner.job(), "max_attempts", number), 422, "validation_failed")
    for field in ("limit", "lease_seconds"):
        assert is_problem(with_number(corner, CLAIM, corner.claiming(), field, number), 422, "validation_failed")
    assert corner.claim(limit=10) == []


@pytest.mark.parametrize("number", [number for number in HUGE if number != "0.1e-400"], ids=lambda number: number[:8] + f"_{len(number)}")
def test_huge_delays_are_out_of_range(corner: Corner, number: str) -> None:
    job = corner.take()
    path, claim = f"/api/v1/jobs/{job['id']}", {"claim_id": job["claim_id"]}
    failing = {**claim, "category": "timeout", "message": "m", "retryable": True}
    assert is_problem(with_number(corner, f"{path}/fail", failing, "retry_in_seconds", number), 422, "validation_failed")
    assert is_problem(with_number(corner, f"{path}/release", claim, "delay_seconds", number), 422, "validation_failed")
    assert is_problem(with_number(corner, f"{path}/heartbeat", claim, "lease_seconds", number), 422, "validation_failed")
    assert corner.look(job)["status"] == "running"


def with_number(corner: Corner, path: str, body: dict[str, Any], field: str, number: str) -> Answer:
    """POST `body` with a field that json.dumps could not spell."""
    return corner.api.post(path, body=encoded(body)[:-1] + f', "{field}": {number}}}'.encode())


@pytest.mark.parametrize("field", ["run_at", "expires_at"])
@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00", "9999-12-31T23:59:60Z"])
def test_times_at_the_edge_of_the_calendar_are_taken_or_refused(corner: Corner, field: str, time: str) -> None:
    answer = corner.api.post(CREATE, corner.job(**{field: time}))
    assert answer.status == 201 or answer.paths == [f"/{field}"]


WRONG = [7, 1.5, True, None, "text", [], {}, ["a"], {"a": 1}]
FIELDS = {
    "owner_service": (str,),
    "owner_ref": (str,),
    "priority": (int,),
    "max_attempts": (int,),
    "run_at": (type(None),),
    "expires_at": (type(None),),
    "idempotency_key": (str, type(None)),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_type_is_refused_by_its_path(corner: Corner, field: str) -> None:
    for value in WRONG:
        if type(value) in FIELDS[field] or (value is None and field in ("priority", "max_attempts")):
            continue
        answer = corner.api.post(CREATE, corner.job(**{field: value}))
        assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", [f"/{field}"]), value


@pytest.mark.parametrize("path", [BATCH, *FOR_MANY])
def test_what_is_no_list_of_jobs_is_refused(api: Api, path: str) -> None:
    for value in (7, "text", {}, None, [7], ["text"], [None], [[]]):
        answer = api.post(path, {"jobs": value})
        if path == BATCH or not isinstance(value, list):
            assert is_problem(answer, 422, "validation_failed"), value
            assert all(found.startswith("/jobs") for found in answer.paths), value
        else:
            assert [each["status"] for each in answer.json["jobs"]] == [422], value


@pytest.mark.parametrize("value", [7, "text", {}, None, [7], [None], [[]]])
def test_a_list_of_ids_that_is_none_is_refused(api: Api, value: Any) -> None:
    answer = api.post("/api/v1/jobs/get", {"ids": value})
    assert is_problem(answer, 422, "validation_failed")
    assert all(path.startswith("/ids") for path in answer.paths)


def test_an_empty_batch_is_refused(api: Api) -> None:
    answer = api.post(BATCH, {"jobs": []})
    assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", ["/jobs"])


# Several problems, and where they are


def test_all_problems_are_told_at_once_each_with_its_path(corner: Corner) -> None:
    jobs = [corner.job(priority=11, colour="red", owner_ref=""), 7, {"task_type": "t", "input": 1}, corner.job(run_at="soon")]
    answer = corner.api.post(BATCH, {"jobs": jobs, "extra": 1})
    assert (answer.status, answer.code) == (422, "validation_failed")
    first = ["/jobs/0/colour", "/jobs/0/owner_ref", "/jobs/0/priority"]
    third = ["/jobs/2/model_profile", "/jobs/2/owner_ref", "/jobs/2/owner_service"]
    assert answer.paths == ["/extra", *first, "/jobs/1", *third, "/jobs/3/run_at"]
    assert all(error["message"] for error in answer.json["errors"])
    assert corner.claim(limit=10) == []


def test_a_path_is_a_json_pointer_even_for_odd_names(corner: Corner) -> None:
    assert corner.api.post(CREATE, corner.job(**{"a/b~c": 1})).paths == ["/a~1b~0c"]


BODIES: dict[str, dict[str, Any]] = {
    CREATE: {"owner_service": "o", "owner_ref": "r", "task_type": "t", "model_profile": "m", "input": 1},
    CLAIM: {"worker_id": "w"},
    "/api/v1/jobs/get": {"ids": []},
    "/api/v1/jobs/retry": {"filter": {"owner_service": "nobody"}},
    "/api/v1/pause": {"task_types": ["nobody"]},
    "/api/v1/resume": {"task_types": ["nobody"]},
}


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_field_is_refused(api: Api, path: str) -> None:
    answer = api.post(path, {**BODIES[path], "colour": "red"})
    assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", ["/colour"])


@pytest.mark.parametrize("verb", FOR_ONE)
def test_an_unknown_field_is_refused_for_one_job(corner: Corner, verb: str) -> None:
    job = corner.take()
    answer = corner.call(job, verb, colour="red")
    assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", ["/colour"])
    assert corner.look(job)["status"] == "running"


def test_of_duplicate_keys_the_last_wins(corner: Corner) -> None:
    body = encoded(corner.job(priority=1))[:-1] + b', "priority": 2}'
    assert corner.api.post(CREATE, body=body).json["priority"] == 2
    body = encoded(corner.job(priority=11))[:-1] + b', "input": "last", "priority": -3}'
    created = corner.api.post(CREATE, body=body)
    assert (created.status, created.json["priority"]) == (201, -3)
    assert corner.look(created.json, include="input")["input"] == "last"


# Queries


QUERIES = [
    "/api/v1/jobs?colour=red",
    "/api/v1/jobs?limit=0",
    "/api/v1/jobs?limit=501",
    "/api/v1/jobs?limit=many",
    "/api/v1/jobs?limit=1e400",
    "/api/v1/jobs?limit=99999999999999999999999",
    "/api/v1/jobs?status=done",
    "/api/v1/jobs?created_after=yesterday",
    "/api/v1/jobs?created_before=99999-01-01T00:00:00Z",
    "/api/v1/jobs?cursor=not-a-cursor",
    "/api/v1/jobs?cursor=%00",
    "/api/v1/jobs?owner_ref=%00",
    "/api/v1/stats?window_seconds=7",
    "/api/v1/stats?window_seconds=99999999999999999999",
    "/api/v1/stats?colour=red",
    "/api/v1/workers?colour=red",
    "/api/v1/providers/status?colour=red",
]


@pytest.mark.parametrize("path", QUERIES)
def test_an_ill_query_is_refused(api: Api, path: str) -> None:
    assert is_problem(api.get(path), 422, "validation_failed")


@pytest.mark.parametrize(
    "query", ["includes=input", "include=everything", "wait_seconds=soon", "wait_seconds=-1", "wait_seconds=1e400", "wait_seconds=nan"]
)
def test_an_ill_query_of_one_job_is_refused(corner: Corner, query: str) -> None:
    assert is_problem(corner.api.get(f"/api/v1/jobs/{corner.create()['id']}?{query}"), 422, "validation_failed")


@pytest.mark.parametrize("path", [CREATE, CLAIM, BATCH])
def test_a_query_where_none_is_known_is_refused(corner: Corner, path: str) -> None:
    body = {CREATE: corner.job(), CLAIM: corner.claiming(), BATCH: {"jobs": [corner.job()]}}[path]
    assert is_problem(corner.api.post(f"{path}?dry_run=1", body), 422, "validation_failed")
    assert corner.claim(limit=10) == []


@pytest.mark.parametrize("path", ["/api/v1/jobs?owner_ref=%ff", "/api/v1/jobs?%ff=1", "/api/v1/jobs/%ff", "/%ff", "/api/v1/jobs/%00"])
def test_bytes_that_are_no_text_in_an_address_are_refused(api: Api, path: str) -> None:
    answer = api.get(path)
    assert answer.status in (400, 404, 422) or (answer.status == 200 and answer.json["jobs"] == [])


# Text


ILL_TEXT = ["a\u0000b", "\u0000"]


@pytest.mark.parametrize("text", ILL_TEXT)
@pytest.mark.parametrize("field", ["owner_service", "owner_ref", "task_type", "model_profile", "idempotency_key", "traceparent"])
def test_a_nul_in_a_text_field_is_refused(corner: Corner, field: str, text: str) -> None:
    answer = corner.api.post(CREATE, corner.job(**{field: text}))
    assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", [f"/{field}"])


def test_a_nul_in_the_text_of_a_claim_is_refused(corner: Corner) -> None:
    assert corner.api.post(CLAIM, corner.claiming(worker_id="a\u0000")).paths == ["/worker_id"]
    for field in ("owner_services", "task_types", "model_profiles"):
        answer = corner.api.post(CLAIM, corner.claiming(**{field: ["fine", "a\u0000"]}))
        assert is_problem(answer, 422, "validation_failed")
        assert all(path.startswith(f"/{field}") for path in answer.paths)


@pytest.mark.parametrize(("verb", "field"), [("fail", "message"), ("fail", "category"), ("cancel", "reason"), ("complete", "claim_id")])
def test_a_nul_in_the_text_of_a_call_is_refused(corner: Corner, verb: str, field: str) -> None:
    job = corner.take()
    answer = corner.call(job, verb, **{field: "a\u0000b"})
    assert (answer.status, answer.paths) == (422, [f"/{field}"])
    assert corner.look(job)["status"] == "running"


@pytest.mark.parametrize("verb", ["heartbeat", "complete"])
def test_a_nul_in_progress_or_usage_is_no_500(corner: Corner, verb: str) -> None:
    field = "progress" if verb == "heartbeat" else "usage"
    answer = corner.call(corner.take(), verb, **{field: {"note\u0000": "a\u0000b"}})
    assert answer.status in (200, 422)
    assert answer.status == 200 or answer.code == "validation_failed"


def test_a_nul_in_a_worker_report_is_no_500(corner: Corner) -> None:
    answer = corner.api.post(CLAIM, corner.claiming(worker={"version": "a\u0000b"}))
    assert answer.status in (200, 422)
    assert corner.api.get("/api/v1/workers").status == 200


# Addresses and methods


@pytest.mark.parametrize("identity", ["1", "claims", "not-a-uuid", "00000000-0000-0000-0000-00000000000g", "%20", "é", "a" * 5000])
def test_an_id_that_is_no_uuid_is_an_unknown_job(api: Api, identity: str) -> None:
    path = f"/api/v1/jobs/{identity}".encode().decode("latin-1")
    assert is_problem(api.get(path), 404, "job_not_found")
    assert is_problem(api.delete(path), 404, "job_not_found")
    assert is_problem(api.post(f"{path}/cancel"), 404, "job_not_found")
    assert is_problem(api.post(f"{path}/heartbeat", {"claim_id": str(uuid.uuid4())}), 404, "job_not_found")


def test_an_id_is_found_in_any_spelling_of_a_uuid_or_in_none(corner: Corner) -> None:
    job = corner.create()
    for spelling in (job["id"].upper(), job["id"].replace("-", ""), "{" + job["id"] + "}"):
        assert corner.api.get(f"/api/v1/jobs/{spelling}").status in (200, 404)


@pytest.mark.parametrize("path", ["/api/v1", "/api/v2/jobs", "/api/v1/job", "/nothing", "/api/v1/jobs/x/y/z", "/../etc/passwd"])
def test_an_unknown_address_is_not_found(api: Api, path: str) -> None:
    assert is_problem(api.get(path), 404, "not_found")
    assert is_problem(api.post(path, {}), 404, "not_found")


UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057"
METHODS = [
    ("PUT", "/api/v1/jobs", {"GET", "POST"}),
    ("DELETE", "/api/v1/jobs", {"GET", "POST"}),
    ("PATCH", f"/api/v1/jobs/{UNKNOWN}", {"GET", "DELETE"}),
    ("GET", "/api/v1/jobs/claim", {"POST"}),
    ("GET", "/api/v1/jobs/batch", {"POST"}),
    ("DELETE", "/api/v1/jobs/complete", {"POST"}),
    *(("GET", f"/api/v1/jobs/{UNKNOWN}/{verb}", {"POST"}) for verb in FOR_ONE),
    ("POST", "/api/v1/stats", {"GET"}),
    ("POST", "/api/v1/workers", {"GET"}),
    ("GET", "/api/v1/resume", {"POST"}),
    ("POST", "/healthz", {"GET"}),
    ("DELETE", "/readyz", {"GET"}),
    ("PUT", "/api/v1/stats?window_seconds=3600", {"GET"}),
]


@pytest.mark.parametrize(("method", "path", "allowed"), METHODS)
def test_a_wrong_method_is_told_the_right_ones(api: Api, method: str, path: str, allowed: set[str]) -> None:
    answer = api.request(method, path, b"{}", {"Content-Type": "application/json"})
    assert is_problem(answer, 405)
    assert set(re.split(r"\s*,\s*", answer.headers["Allow"])) - {"HEAD", "OPTIONS"} == allowed


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "multipart/form-data; boundary=x", "json", ";;;"]
)
def test_another_media_type_is_refused(corner: Corner, media_type: str) -> None:
    assert is_problem(corner.api.post(CREATE, corner.job(), media_type=media_type), 415)
    assert corner.claim() == []


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_spelling_is_taken(corner: Corner, media_type: str) -> None:
    assert corner.api.post(CREATE, corner.job(), media_type=media_type).status == 201


# Size


LIMIT = 100_000


@pytest.fixture(scope="module")
def small(postgres_url: str) -> Iterator[Service]:
    """A service that takes bodies of 100,000 bytes."""
    with ExitStack() as stack:
        schema = stack.enter_context(fresh_schema(postgres_url))
        yield stack.enter_context(running_service(postgres_url, schema, MAX_BODY_BYTES=str(LIMIT)))


def sized(corner: Corner, size: int) -> bytes:
    """The body of a create of exactly this many bytes."""
    body = encoded(corner.job(input=""))
    filled = body.replace(b'"input": ""', b'"input": "' + b"x" * (size - len(body)) + b'"')
    assert len(filled) == size
    return filled


def test_a_body_of_just_the_limit_is_taken(small: Service) -> None:
    corner = Corner(small.api)
    assert corner.api.post(CREATE, body=sized(corner, LIMIT)).status == 201


def test_a_chunked_body_within_the_limit_is_taken(small: Service) -> None:
    """By less than the limit: it may count the frames of the chunks too."""
    corner = Corner(small.api)
    assert parsed(small.api.raw(chunked(sized(corner, LIMIT - 1000)))).status == 201


def test_a_body_over_the_limit_is_refused(small: Service) -> None:
    corner = Corner(small.api)
    assert is_problem(parsed(surely_answered(small.api, raw_post(CREATE, sized(corner, LIMIT + 1)))), 413)
    assert corner.claim() == []


def test_a_chunked_body_over_the_limit_is_refused(small: Service) -> None:
    corner = Corner(small.api)
    assert is_problem(parsed(surely_answered(small.api, chunked(sized(corner, LIMIT + 1)))), 413)
    assert corner.claim() == []


def test_a_body_announced_far_too_long_is_refused_before_it_comes(small: Service) -> None:
    head = raw_post(CREATE, b"").replace(b"Content-Length: 0", b"Content-Length: 100000000000")
    assert is_problem(parsed(small.api.raw(head)), 413)


def test_32_mb_and_one_byte_are_too_much_unless_set_otherwise(corner: Corner) -> None:
    size = 32 << 20
    head = raw_post(CREATE, b"").replace(b"Content-Length: 0", b"Content-Length: %d" % (size + 1))
    assert is_problem(parsed(corner.api.raw(head)), 413)
    answer = corner.api.post(CREATE, body=sized(corner, size))
    assert answer.status == 201


def chunked(body: bytes, size: int = 30_000) -> bytes:
    """A create whose body comes in chunks, without a length."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[at : at + size] for at in range(0, len(body), size)))
    head = raw_post(CREATE, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + chunks + b"0\r\n\r\n"


def parsed(received: bytes) -> Answer:
    """The one answer in what came over a connection."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().title(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
    return Answer(int(lines[0].split()[1]), headers, body)


# What fails before routing may be plain text, and must not hurt


BROKEN: dict[str, Callable[[], bytes]] = {
    "no HTTP": lambda: b"hello there\r\n\r\n",
    "a header bomb": lambda: raw_post(CREATE, b"{}", *(f"X-Bomb-{number}: {'x' * 1000}" for number in range(2000))),
    "one endless header": lambda: raw_post(CREATE, b"{}", "X-Bomb: " + "x" * 2_000_000),
    "a length that is no number": lambda: raw_post(CREATE, b"").replace(b"Content-Length: 0", b"Content-Length: many"),
    "a negative length": lambda: raw_post(CREATE, b"").replace(b"Content-Length: 0", b"Content-Length: -1"),
    "a chunk of no size": lambda: chunked(b"{}").replace(b"2\r\n{}", b"zz\r\n{}"),
    "a header without a colon": lambda: raw_post(CREATE, b"{}", "NoColonHere"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_request_is_refused_and_hurts_nobody(corner: Corner, name: str) -> None:
    received = answered(corner.api, BROKEN[name]())
    assert received == b"" or 400 <= parsed(received).status < 500, received[:500]
    assert corner.create()["status"] == "pending"


def answered(api: Api, request: bytes) -> bytes:
    """What comes back; nothing where the service hung up while the request was still being sent."""
    try:
        return api.raw(request)
    except (ConnectionResetError, BrokenPipeError):
        return b""


def surely_answered(api: Api, request: bytes) -> bytes:
    """What comes back, sent again where the answer was overtaken by the closing of a connection not read to its end."""
    return bytes(wait_until(lambda: answered(api, request), 10, "an answer"))


def test_no_refusal_ever_told_of_an_error_in_the_service(service: Service) -> None:
    """Last in this file: none of the above left a stack trace in the log."""
    assert "Traceback" not in service.log, service.log[-4000:]


def test_a_problem_does_not_repeat_what_it_was_sent(corner: Corner) -> None:
    answer = corner.api.post(CREATE, {**corner.job(input="a-rare-secret-word"), "colour": "red"})
    assert answer.status == 422
    assert "a-rare-secret-word" not in json.dumps(answer.json)


def test_a_filter_of_more_names_than_anybody_needs_is_refused(api: Api) -> None:
    names = [f"profile-{number}" for number in range(1001)]
    answer = api.post("/api/v1/jobs/claim", {"worker_id": "w", "model_profiles": names})
    assert (answer.status, answer.paths) == (422, ["/model_profiles"])
    assert api.post("/api/v1/jobs/claim", {"worker_id": "w", "model_profiles": names[:1000]}).status == 200
