"""The provider against a server in a thread: the contract by the suite to inherit, and what is this provider's own."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, Self

import pytest
from ai_service_embeddings import Embeddings

from providers import GROUP, Never, NotCompleted, NotNow, Result, SettingsError
from providers.conformance import ProviderConformance, closed_port, outcome_of, silent_server

KEY = "embeddings-test-key"


class FakeServer(ThreadingHTTPServer):
    """Embeds a text as its length and its number among the texts of its request, unless told what to answer next."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.environ = {"EMBEDDINGS_URL": f"http://127.0.0.1:{self.server_address[1]}/v1", "EMBEDDINGS_KEY": KEY}
        self.next: list[tuple[int, dict[str, str], Any]] = []
        self.asked: list[Any] = []

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, str], Any]:
        if (method, path) == ("GET", "/v1/models"):
            return 200, {}, {"object": "list", "data": [{"id": "nomic-embed-text", "object": "model"}]}
        if (method, path) != ("POST", "/v1/embeddings"):
            return 404, {}, {"error": {"message": "no such route"}}
        self.asked.append(body)
        return self.next.pop(0) if self.next else (200, {}, embedded(body["input"]))

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        allowed = self.headers["Authorization"] == f"Bearer {KEY}"
        refused = (401, {}, {"error": {"message": f"wrong key {self.headers['Authorization']}"}})
        status, headers, answer = self.server.answer(self.command, self.path, body) if allowed else refused
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_POST = do_GET  # noqa: N815 -- the name http.server calls

    def log_message(self, *_args: object) -> None:
        """Quiet: tests look at `asked`."""


def embedded(texts: list[str]) -> dict[str, Any]:
    """As llama.cpp and vLLM answer, the last text first: the API promises no order, it numbers them."""
    data = [{"object": "embedding", "index": index, "embedding": [len(text), index]} for index, text in enumerate(texts)]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts), "prompt_tokens_details": None}
    return {"object": "list", "model": "nomic-embed-text", "data": data[::-1], "usage": usage}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as started:
        yield started


class TestConformance(ProviderConformance):
    good_input = "three"
    other_inputs = ("a", "bb", ["ccc", "dddd"])
    bad_input = 5

    def provider(self, environ: Mapping[str, str]) -> Embeddings:
        return Embeddings(environ)

    @pytest.fixture(autouse=True)
    def environments(self, server: FakeServer) -> Iterator[None]:
        with silent_server() as silent, closed_port() as closed:
            self.good = server.environ
            self.hanging = {"EMBEDDINGS_URL": f"{silent}/v1", "EMBEDDINGS_KEY": KEY}
            self.unreachable = {"EMBEDDINGS_URL": closed.replace("://", "://user:hidden-password@")}
            yield


def run(server: FakeServer, given: Any, **facts: Any) -> Result | NotCompleted:
    """How a run ended, of a provider that sends two texts at a time."""
    provider = Embeddings({**server.environ, "EMBEDDINGS_BATCH": "2"})
    return outcome_of(provider, TestConformance().job(provider, input=given, **facts))


def test_it_is_found_by_its_entry_point() -> None:
    [entry] = entry_points(group=GROUP, name=Embeddings.name)
    assert entry.load() is Embeddings


def test_many_texts_go_in_several_requests_and_come_back_in_order(server: FakeServer) -> None:
    reports: list[Any] = []
    result = run(server, ["a", "bb", "ccc", "dddd", "eeeee"], report_progress=reports.append)
    assert isinstance(result, Result)
    assert result.value == {"embeddings": [[1, 0], [2, 1], [3, 0], [4, 1], [5, 0]], "model": "nomic-embed-text"}
    assert result.usage == {"prompt_tokens": 5, "total_tokens": 5, "model": "nomic-embed-text"}
    assert reports == [{"done": 2, "of": 5}, {"done": 4, "of": 5}, {"done": 5, "of": 5}]
    assert [asked["input"] for asked in server.asked] == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]


UNHARMED, BURNT = {"burns_attempt": False}, {"burns_attempt": True}

# status, headers, what the server says → not now or never, category, and what else the outcome has
REFUSALS: list[tuple[int, dict[str, str], Any, type[NotCompleted], str, dict[str, Any]]] = [
    (401, {}, {"error": {"message": "bad key"}}, NotNow, "unauthorized", UNHARMED),
    (404, {}, {"error": {"message": "no such model"}}, NotNow, "unavailable", UNHARMED),
    (429, {"Retry-After": "7"}, {}, NotNow, "rate_limited", {**UNHARMED, "retry_in_seconds": 7}),
    (503, {}, {"error": {"message": "Loading model"}}, NotNow, "unavailable", UNHARMED),
    (307, {"Location": "http://127.0.0.1:1/"}, {}, NotNow, "unavailable", UNHARMED),
    (500, {}, {"error": "out of memory"}, NotNow, "internal", BURNT),
    (400, {}, {"error": {"message": "bad encoding_format"}}, Never, "invalid_input", {}),
    (400, {}, {"error": {"message": "the input length exceeds the context length"}}, Never, "context_length_exceeded", {}),
    (500, {}, {"error": {"message": "input is too large to process"}}, Never, "context_length_exceeded", {}),
    (200, {}, {"data": [{"index": 0, "embedding": [None]}]}, NotNow, "invalid_output", BURNT),
    (200, {}, {"data": []}, NotNow, "invalid_output", BURNT),
]


@pytest.mark.parametrize(("status", "headers", "says", "kind", "category", "facts"), REFUSALS)
def test_every_refusal_has_its_outcome(
    server: FakeServer, status: int, headers: dict[str, str], says: Any, kind: type[NotCompleted], category: str, facts: dict[str, Any]
) -> None:
    server.next = [(status, headers, says)]
    outcome = run(server, "text")
    assert isinstance(outcome, kind)
    assert outcome.category == category
    assert {name: getattr(outcome, name) for name in facts} == facts


def test_a_refusal_after_the_first_request_burns_the_attempt_and_tells_its_usage(server: FakeServer) -> None:
    server.next = [(200, {}, embedded(["a", "bb"])), (503, {}, {"error": "busy"})]
    outcome = run(server, ["a", "bb", "ccc"])
    assert isinstance(outcome, NotNow)
    assert outcome.burns_attempt
    assert outcome.usage == {"prompt_tokens": 2, "total_tokens": 2, "model": "nomic-embed-text"}


def test_a_job_cancelled_between_two_requests_sends_no_other(server: FakeServer) -> None:
    cancelled = threading.Event()
    outcome = run(server, ["a", "bb", "ccc"], cancelled=cancelled, report_progress=lambda _report: cancelled.set())
    assert isinstance(outcome, NotNow)
    assert (outcome.category, len(server.asked)) == ("cancelled", 1)


def test_a_model_that_the_server_does_not_list_is_degraded(server: FakeServer) -> None:
    health = Embeddings({**server.environ, "EMBEDDINGS_MODEL": "other"}).check()
    assert (health.status, health.models) == ("degraded", ("nomic-embed-text",))


def test_a_wrong_key_is_told_without_the_key(server: FakeServer) -> None:
    health = Embeddings({**server.environ, "EMBEDDINGS_KEY": "another-key"}).check()
    assert (health.status, health.detail) == ("unavailable", "the server answered 401: wrong key Bearer [secret] (look at EMBEDDINGS_KEY)")


def test_a_key_beside_user_info_is_refused() -> None:
    with pytest.raises(SettingsError, match="only one of them"):
        Embeddings({"EMBEDDINGS_URL": "http://user:hidden-password@127.0.0.1/v1", "EMBEDDINGS_KEY": KEY})


@pytest.mark.skipif("REAL_EMBEDDINGS_URL" not in os.environ, reason="needs a server, whose address REAL_EMBEDDINGS_URL names")
def test_a_real_server_embeds() -> None:
    provider = Embeddings({name.removeprefix("REAL_"): value for name, value in os.environ.items() if name.startswith("REAL_EMBEDDINGS_")})
    result = provider.run(TestConformance().job(provider, input=["one", "two"]))
    first, second = result.value["embeddings"]
    assert len(first) == len(second)
    assert first != second
