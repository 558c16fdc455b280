"""Finding a request and a job again: the id of each request, and one trace through caller, queue, worker and model server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_service import FakeService, problem
from fake_vllm import fake_vllm, refuses, says
from postgres import connect
from service import Answer, Api, Corner, Service, encoded, raw_post, wait_until, worker_process

from ai_client import AIService, NotFound, ServiceError
from ai_internal.server.group_commit import GroupCommit, _Waiter
from ai_internal.telemetry import about, begin_request, child_of, read_traceparent, request_id, span_id, trace_id

JOBS = "/api/v1/jobs"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
ANOTHER = f"00-{'a' * 32}-{'b' * 16}-00"
MADE = re.compile("[0-9a-f]{16}")

# ---------------------------------------------------------------- the id of a request


def with_id(api: Api, given: str, method: str = "GET", path: str = JOBS, body: bytes | None = None) -> Answer:
    return api.request(method, path, body, {"X-Request-ID": given, "Content-Type": "application/json"})


@pytest.mark.parametrize("given", ["a", "A-b_c.d:e/f@g+h=", "x" * 128, "4bf92f3577b34da6"])
def test_a_request_keeps_the_id_that_it_came_with(api: Api, given: str) -> None:
    assert with_id(api, given).headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a,b", "é", "<script>", 'a"b', "a;b", "a%0a"])
def test_an_id_that_may_not_be_shown_is_replaced(api: Api, given: str) -> None:
    assert MADE.fullmatch(with_id(api, given).headers["X-Request-ID"])


def test_each_request_without_an_id_gets_one_of_its_own(api: Api) -> None:
    made = [api.get("/healthz").headers["X-Request-ID"] for _ in range(20)]
    assert len(set(made)) == 20
    assert all(map(MADE.fullmatch, made))


def test_every_refusal_has_the_id_of_its_request(start_service: Callable[..., Service]) -> None:
    api = start_service(MAX_BODY_BYTES="2048").api
    asked = {
        400: ("POST", JOBS, b"{"),
        404: ("GET", "/nowhere", None),
        405: ("DELETE", "/api/v1/stats", None),
        413: ("POST", JOBS, b" " * 3000),
        422: ("POST", JOBS, b"{}"),
    }
    answers = [with_id(api, f"mine-{status}", *request) for status, request in asked.items()]
    assert [answer.status for answer in answers] == list(asked)
    assert [answer.headers["X-Request-ID"] for answer in answers] == [f"mine-{status}" for status in asked]


def test_what_the_server_refuses_before_any_route_has_an_id_too(start_service: Callable[..., Service]) -> None:
    api = start_service(API_TOKENS="desk=operator=desk-0123456789abcdef").api
    large = raw_post(JOBS, b"", "X-Request-ID: mine").replace(b"Content-Length: 0", b"Content-Length: 99999999")
    for request in (large, raw_post(JOBS, b"{}", "X-Request-ID: mine")):
        assert b"\r\nX-Request-ID: mine\r\n" in api.raw(request)
    assert re.search(rb"HTTP/1.. 400 .*\r\nX-Request-ID: [0-9a-f]{16}\r\n", api.raw(b"rubbish\r\n\r\n"), re.DOTALL)


def test_the_log_names_the_request_in_each_event_of_it(postgres_url: str, start_service: Callable[..., Service]) -> None:
    service = start_service(LOG_FORMAT="json", API_TOKENS="desk=operator=desk-0123456789abcdef")
    api = Api(service.api.port, "desk-0123456789abcdef")
    job = Corner(api).create()
    database = connect(postgres_url, service.schema)
    database.run(
        "create or replace function cancel_job_v1(of_job uuid, reason text) returns text language plpgsql as "
        "$$ begin raise exception 'broken'; end $$"
    )
    database.close()
    assert api.request("POST", f"{JOBS}/{job['id']}/cancel", b"", {"X-Request-ID": "broken", "traceparent": PARENT}).status == 500
    service.terminate()
    service.wait()
    told = [each for each in map(json.loads, service.lines) if each.get("request_id") == "broken"]
    assert [each["event"] for each in told] == ["request_failed", "operator_action"]
    assert [each["trace_id"] for each in told] == [TRACE, TRACE]
    assert [each for each in map(json.loads, service.lines) if each["event"] == "service_stopped" and "request_id" in each] == []


@pytest.mark.parametrize("wanted", [True, False])
def test_requests_are_logged_where_it_is_asked_for(start_service: Callable[..., Service], wanted: bool) -> None:
    service = start_service(LOG_FORMAT="json", LOG_REQUESTS=str(wanted).lower())
    with_id(service.api, "one", path=f"{JOBS}?limit=1")
    with_id(service.api, "two", "POST", f"{JOBS}/nothing", b"{")
    service.api.raw(b"GET / HTTP/1.1\r\nX-Request-ID: three\r\nContent-Length: x\r\n\r\n")
    service.terminate()
    service.wait()
    told = {each["request_id"]: each for each in map(json.loads, service.lines) if each.get("event") == "request_answered"}
    assert set(told) == ({"one", "two", "three"} if wanted else set())
    if wanted:
        assert [told[name]["status"] for name in ("one", "two", "three")] == [200, 405, 400]
        assert {name: told["one"][name] for name in ("method", "path", "client")} == {"method": "GET", "path": JOBS, "client": "127.0.0.1"}
        assert 0 <= told["one"]["seconds"] < 10


def test_a_statement_for_one_call_has_its_id_though_another_thread_makes_it() -> None:
    seen: list[str] = []

    def act(items: Sequence[Any]) -> Sequence[Any]:
        seen.append(request_id())
        raise ValueError(items)

    commits = GroupCommit(act)
    begin_request("mine")
    with suppress(ValueError):
        commits.run("item", 1)
    with about(request_id="of the leader"):
        mine, other = (make_call(each) for each in ("first", "second"))
        commits._answer([mine, other])
    assert seen == ["mine", "first,second", "first", "second"]


def make_call(name: str) -> Any:
    """A call that waits, of a request with this id."""
    with about(request_id=name):
        return _Waiter(name, 1)


def test_the_client_shows_the_id_of_a_refused_request(service: Service) -> None:
    with AIService(f"http://127.0.0.1:{service.api.port}") as client, pytest.raises(NotFound) as refused:
        client.get_job("01890a5d-ac96-774b-bcce-b302099a8057")
    assert MADE.fullmatch(refused.value.request_id or "")
    assert str(refused.value).endswith(f"; request {refused.value.request_id}")


def test_a_service_that_gives_no_id_leaves_none_in_the_error() -> None:
    with FakeService() as service, AIService(service.url, retry_seconds=0) as client:
        service.always("/stats", problem(503, "service_full"))
        with pytest.raises(ServiceError) as refused:
            client.stats()
    assert refused.value.request_id is None
    assert "request" not in str(refused.value).partition("service_full")[2]


# ---------------------------------------------------------------- traces

ILL = [
    "",
    "rubbish",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}",
    f"{PARENT}, {PARENT}",
]


@pytest.mark.parametrize("header", ILL)
def test_a_header_that_is_no_trace_is_ignored(corner: Corner, header: str) -> None:
    assert read_traceparent(header) is None
    assert child_of(header) is None
    answer = corner.api.request("POST", JOBS, encoded(corner.job()), {"traceparent": header, "Content-Type": "application/json"})
    assert (answer.status, answer.json["traceparent"]) == (201, None)


@pytest.mark.parametrize("field", [*ILL[1:], f"01-{TRACE}-{SPAN}-01-more"])
def test_a_field_that_is_no_trace_is_refused(corner: Corner, field: str) -> None:
    assert corner.api.post(JOBS, corner.job(traceparent=field)).paths == ["/traceparent"]


def test_a_later_version_of_the_header_is_read_as_far_as_it_is_known() -> None:
    assert read_traceparent(f"cc-{TRACE}-{SPAN}-01-what-ever") == PARENT
    assert (trace_id(PARENT), span_id(PARENT)) == (TRACE, SPAN)


@pytest.mark.parametrize(("flags", "kept"), [("00", "00"), ("01", "01"), ("03", "03"), ("ff", "03"), ("fe", "02")])
def test_a_span_below_another_keeps_the_trace_and_the_flags_that_are_known(flags: str, kept: str) -> None:
    made = [child_of(f"00-{TRACE}-{SPAN}-{flags}") for _ in range(20)]
    assert len(set(made)) == 20
    assert all(re.fullmatch(f"00-{TRACE}-(?!0{{16}}|{SPAN})[0-9a-f]{{16}}-{kept}", each or "") for each in made)


def test_a_job_has_the_trace_of_its_field_and_else_of_the_request(corner: Corner) -> None:
    def created(body: Any, path: str = JOBS) -> Any:
        return corner.api.request("POST", path, encoded(body), {"traceparent": PARENT, "Content-Type": "application/json"}).json

    assert created(corner.job())["traceparent"] == PARENT
    assert created(corner.job(traceparent=ANOTHER))["traceparent"] == ANOTHER
    many = created({"jobs": [corner.job(), corner.job(traceparent=ANOTHER)]}, f"{JOBS}/batch")["jobs"]
    assert [corner.look(job)["traceparent"] for job in many] == [PARENT, ANOTHER]
    many = created({"defaults": {"traceparent": ANOTHER}, "jobs": [corner.job()]}, f"{JOBS}/batch")["jobs"]
    assert [corner.look(job)["traceparent"] for job in many] == [ANOTHER]


def test_one_trace_spans_caller_queue_worker_and_model_server(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service(LOG_FORMAT="json", LOG_LEVEL="DEBUG")
    corner = Corner(service.api)
    with fake_vllm(model=corner.model_profile) as model:
        model.behave(refuses(400), says("Hello"))
        with worker_process(service.api.port, tmp_path, LOG_FORMAT="json", **model.environ) as log:
            headers = {"traceparent": PARENT, "Content-Type": "application/json"}
            job = service.api.request("POST", JOBS, encoded(corner.job(input={"prompt": "Hi"})), headers).json
            assert corner.look(job, wait_seconds=30)["status"] == "failed"
            corner.done(job, "retry")
            assert corner.look(job, wait_seconds=30)["status"] == "completed"
            wait_until(lambda: "job_completed" in log.read_text())
        sent = [{name.lower(): value for name, value in seen.headers.items()}["traceparent"] for seen in model.seen]
    worker = [json.loads(line) for line in log.read_text().splitlines()]
    assert corner.look(job)["traceparent"] == PARENT
    assert len(sent) == 2
    assert all(re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", each) for each in sent)
    assert len({SPAN, *(each.split("-")[2] for each in sent)}) == 3
    ends = [each for each in worker if each["event"] in ("job_failed", "job_completed")]
    assert [(each["trace_id"], each["span_id"]) for each in ends] == [(TRACE, each.split("-")[2]) for each in sent]
    transitions = [each["event"] for each in map(json.loads, service.lines) if each.get("trace_id") == TRACE]
    assert transitions == ["job_created", "job_called", "job_called", "job_called"]
