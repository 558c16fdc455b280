"""The vLLM provider against a fake server that answers as the real one was seen to; at the end, against a real one if there is one.

A real server: REAL_VLLM_URL and REAL_VLLM_KEY (and REAL_VLLM_MODEL, if it is not qwen2.5-14b) in the environment, and `pytest -m real`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import urllib3
from fake_vllm import (
    Behaviour,
    FakeVLLM,
    captured,
    chunk,
    cut_json,
    drops_connection,
    endless,
    fake_vllm,
    goes_silent,
    hangs,
    refuses,
    replays,
    says,
    slow,
    stays_open,
    streams,
    trickles,
    unframed,
)

from providers import (
    CANCELLED,
    CONTEXT_LENGTH_EXCEEDED,
    INTERNAL,
    INVALID_INPUT,
    INVALID_OUTPUT,
    RATE_LIMITED,
    TIMEOUT,
    TRUNCATED,
    UNAUTHORIZED,
    UNAVAILABLE,
    Job,
    NotCompleted,
    NotConfigured,
    NotNow,
    Result,
    SettingsError,
)
from providers.conformance import ProviderConformance, closed_port, outcome_of
from providers.exchange import MAX_ANSWER_BYTES
from providers.settings import provider_settings
from providers.vllm import VLLM, VLLMSettings

SCHEMA = {
    "type": "object",
    "properties": {"language": {"enum": ["de", "en"]}, "score": {"type": "integer"}},
    "required": ["language", "score"],
}
AS_JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}
HELLO = {"prompt": "Hello"}

# What a server does, and what becomes of the job: final (Never) or not now; whether that burns an attempt; the category.
BURNT, UNHARMED, FINAL = "not now, attempt burnt", "not now, unharmed", "final"
FAILURES: list[tuple[str, Behaviour, dict[str, Any], str, str]] = [
    ("engine busy", replays("503-busy-stream"), HELLO, UNHARMED, UNAVAILABLE),
    ("503 without a body", refuses(503), HELLO, UNHARMED, UNAVAILABLE),
    ("rate limit", refuses(429, {"Retry-After": "7"}), HELLO, UNHARMED, RATE_LIMITED),
    ("wrong key", replays("401-bad-key"), HELLO, UNHARMED, UNAUTHORIZED),
    ("forbidden", refuses(403, body={"error": {"message": "no"}}), HELLO, UNHARMED, UNAUTHORIZED),
    ("unknown model", replays("404-model"), HELLO, UNHARMED, UNAVAILABLE),
    ("no such route", replays("404-route"), HELLO, UNHARMED, UNAVAILABLE),
    ("wrong method", replays("405-method"), HELLO, UNHARMED, UNAVAILABLE),
    ("redirect", refuses(307, {"Location": "http://127.0.0.1:1/"}), HELLO, UNHARMED, UNAVAILABLE),
    ("shutting down", replays("500-shutting-down"), HELLO, UNHARMED, UNAVAILABLE),
    ("engine dead", replays("500-engine-dead"), HELLO, BURNT, INTERNAL),
    ("unknown 5xx", refuses(599), HELLO, BURNT, INTERNAL),
    ("bad gateway", refuses(502, body=b"<html><h1>502 Bad Gateway</h1></html>", content_type="text/html"), HELLO, BURNT, UNAVAILABLE),
    ("gateway timeout", refuses(504), HELLO, BURNT, TIMEOUT),
    ("request timeout", refuses(408), HELLO, BURNT, TIMEOUT),
    ("prompt too long", replays("400-prompt-too-long"), HELLO, FINAL, CONTEXT_LENGTH_EXCEEDED),
    ("max_tokens too large", replays("400-max-tokens-too-large"), HELLO, FINAL, CONTEXT_LENGTH_EXCEEDED),
    ("bad schema", replays("400-bad-schema"), HELLO, FINAL, INVALID_INPUT),
    ("bad temperature", replays("400-temperature"), HELLO, FINAL, INVALID_INPUT),
    ("too large", refuses(413), HELLO, FINAL, INVALID_INPUT),
    ("wrong type", replays("400-wrong-content-type"), HELLO, FINAL, INVALID_INPUT),
    ("unprocessable", refuses(422, body={"detail": [{"loc": ["body"], "msg": "field required"}]}), HELLO, FINAL, INVALID_INPUT),
    ("error in a stream that says done", replays("stream-error-then-done"), HELLO, BURNT, INTERNAL),
    ("busy in the middle of a stream", streams(chunk("a"), {"error": {"message": "busy", "code": 503}}), HELLO, BURNT, UNAVAILABLE),
    ("bad request in a stream", streams({"error": {"message": "bad", "code": 400}}), HELLO, FINAL, INVALID_INPUT),
    ("error without a code", streams({"error": "broken"}), HELLO, BURNT, INTERNAL),
    ("no finish chunk", streams(chunk("a")), HELLO, BURNT, UNAVAILABLE),
    ("no finish chunk, no done", streams(chunk("a"), done=False), HELLO, BURNT, UNAVAILABLE),
    ("empty stream", streams(done=False), HELLO, BURNT, UNAVAILABLE),
    ("cut event", cut_json(), HELLO, BURNT, UNAVAILABLE),
    ("no chat completion", streams({"choices": "none"}), HELLO, BURNT, UNAVAILABLE),
    ("no JSON at all", refuses(200, body=b"hello", content_type="text/plain"), HELLO, BURNT, UNAVAILABLE),
    ("connection reset midway", drops_connection(2), HELLO, BURNT, UNAVAILABLE),
    ("connection reset before a byte", drops_connection(0), HELLO, BURNT, UNAVAILABLE),
    ("given up by the server", says("x", "abort"), HELLO, BURNT, UNAVAILABLE),
    ("JSON cut at max_tokens", replays("schema-cut-at-max-tokens"), HELLO | AS_JSON, BURNT, TRUNCATED),
    ("JSON filled up with tabs", replays("schema-length"), HELLO | AS_JSON, BURNT, TRUNCATED),
    ("JSON object cut", replays("json-object-cut"), HELLO | {"response_format": {"type": "json_object"}}, BURNT, TRUNCATED),
    ("whole JSON, but cut at the length", says("{}", "length"), HELLO | AS_JSON, BURNT, TRUNCATED),
    ("cut again with the same seed", says("{", "length"), HELLO | AS_JSON | {"seed": 7}, FINAL, TRUNCATED),
    ("raw control character", replays("schema-control-character"), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("no JSON again at temperature 0", says("Sure!"), HELLO | AS_JSON | {"temperature": 0}, FINAL, INVALID_OUTPUT),
    ("fenced JSON", says("```json\n{}\n```"), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("empty answer for JSON", says(""), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("not a number", says('{"score": NaN}'), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("infinite number", says('{"score": 1e999}'), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("half a surrogate pair", says('{"language": "\\ud83d"}'), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("too deep to send on", says("[" * 450 + "]" * 450), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("too deep to read", says("[" * 100_000), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("no JSON for structured_outputs", says("no"), HELLO | {"structured_outputs": {"json": SCHEMA}}, BURNT, INVALID_OUTPUT),
]


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with fake_vllm() as running:
        yield running


def provider_of(server: FakeVLLM, **settings: str) -> VLLM:
    return VLLM(server.environ | settings)


def job_with(input_: Any, **changes: Any) -> Job:
    facts = {"owner_service": "tests", "owner_ref": "vllm", "task_type": "call_analysis", "model_profile": "qwen2.5-14b"}
    return Job(id=str(uuid.uuid4()), input=input_, **(facts | changes))


def failure_of(provider: VLLM, job: Job) -> NotCompleted:
    with pytest.raises(NotCompleted) as raised:
        provider.run(job)
    return raised.value


def class_of(outcome: NotCompleted) -> str:
    if isinstance(outcome, NotNow):
        return BURNT if outcome.burns_attempt else UNHARMED
    return FINAL


def started(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# ---------------------------------------------------------------- contract


class TestConformance(ProviderConformance):
    good_input = HELLO
    other_inputs = (HELLO | {"response_format": {"type": "json_object"}}, HELLO | AS_JSON)
    bad_input = 5

    def provider(self, environ: Mapping[str, str]) -> VLLM:
        return VLLM(environ)

    @pytest.fixture(autouse=True)
    def environments(self) -> Iterator[None]:
        with fake_vllm() as good, fake_vllm() as hanging, closed_port() as nobody:
            hanging.always(hangs())
            hanging.models_behaviour = hangs()
            self.good, self.hanging = good.environ, hanging.environ
            self.unreachable = {"LLM_BASE_URL": nobody.replace("://", "://user:hidden-password@")}
            yield


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(("behaviour", "input_", "expected", "category"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES])
def test_every_way_to_fail_has_its_class(server: FakeVLLM, behaviour: Behaviour, input_: Any, expected: str, category: str) -> None:
    server.always(behaviour)
    outcome = failure_of(provider_of(server), job_with(input_))
    assert (class_of(outcome), outcome.category) == (expected, category), outcome
    assert 0 < len(outcome.message) <= 600
    assert server.api_key is not None
    assert server.api_key not in repr(vars(outcome))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0", 0.0), ("-5", 0.0), ("1.5", 1.5), ("999999", 3600.0), ("nan", None), ("soon", None), ("", None)],
)
def test_retry_after_is_honoured_within_reason(server: FakeVLLM, header: str, seconds: float | None) -> None:
    server.always(refuses(503, {"Retry-After": header}))
    outcome = failure_of(provider_of(server), job_with(HELLO))
    assert isinstance(outcome, NotNow)
    assert outcome.retry_in_seconds == seconds


def test_retry_after_may_be_a_date(server: FakeVLLM) -> None:
    server.always(refuses(429, {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)}))
    outcome = failure_of(provider_of(server), job_with(HELLO))
    assert isinstance(outcome, NotNow)
    assert outcome.retry_in_seconds is not None
    assert 90 < outcome.retry_in_seconds <= 100


@pytest.mark.parametrize(
    ("body", "content_type", "said"),
    [
        (b'{"error":"Unauthorized"}', "application/json", "Unauthorized"),
        (b'{"error":{"message":"bad","code":400}}', "application/json", "bad"),
        (b'{"detail":"Not Found"}', "application/json", "Not Found"),
        (b'{"detail":[{"msg":"one"},{"msg":"two"}]}', "application/json", "one; two"),
        (b'{"message":"hm"}', "application/json", "hm"),
        (b"plain\ntext\x00", "text/plain", "plain text"),
        (b"<html><body>Oops</body></html>", "text/html", "Oops"),
        (b"", "application/json", "Bad Request"),
        (b"\xff\xfe", "text/plain", "��"),
        (b'{"error":"' + b"x" * 5_000 + b'"}', "application/json", "x" * 499 + "…"),
        (b"cannot open /opt/models/qwen/config.json now", "text/plain", "cannot open (path) now"),
        (b"key test-key is not http://me:secret@host/v1", "text/plain", "key [secret] is not http://host/v1"),
    ],
)
def test_what_the_server_says_is_kept_in_short(server: FakeVLLM, body: bytes, content_type: str, said: str) -> None:
    server.always(refuses(400, body=body, content_type=content_type))
    assert failure_of(provider_of(server), job_with(HELLO)).message == f"the server answered 400: {said}"


def test_nobody_listens_is_not_now_and_harmless() -> None:
    with closed_port() as address:
        outcome = failure_of(VLLM({"LLM_BASE_URL": address}), job_with(HELLO))
    assert (class_of(outcome), outcome.category) == (UNHARMED, UNAVAILABLE)
    assert outcome.message == f"cannot reach {address}: Connection refused"


def test_an_unknown_host_is_not_now_and_harmless() -> None:
    outcome = failure_of(VLLM({"LLM_BASE_URL": "http://user:pw@no-such-host.invalid"}), job_with(HELLO))
    assert (class_of(outcome), outcome.category) == (UNHARMED, UNAVAILABLE)
    assert "http://no-such-host.invalid:" in outcome.message


def test_tls_to_a_plain_server_is_not_now_and_harmless(server: FakeVLLM) -> None:
    outcome = failure_of(VLLM({"LLM_BASE_URL": server.base_url.replace("http:", "https:")}), job_with(HELLO))
    assert (class_of(outcome), outcome.category) == (UNHARMED, UNAVAILABLE)
    assert "TLS" in outcome.message


# ---------------------------------------------------------------- time and cancellation


@pytest.mark.parametrize(
    ("behaviour", "settings"),
    [
        pytest.param(hangs(), {"LLM_TIMEOUT": "0.4"}, id="not a byte"),
        pytest.param(endless(), {"LLM_TIMEOUT": "0.4"}, id="no end"),
        pytest.param(trickles(), {"LLM_TIMEOUT": "0.4"}, id="a byte at a time"),
        pytest.param(goes_silent(), {"LLM_IDLE_TIMEOUT": "0.3", "LLM_TIMEOUT": "20"}, id="silence midway"),
    ],
)
def test_time_limits_end_an_attempt(server: FakeVLLM, behaviour: Behaviour, settings: Mapping[str, str]) -> None:
    server.always(behaviour)
    began = time.monotonic()
    outcome = failure_of(provider_of(server, **settings), job_with(HELLO))
    assert time.monotonic() - began < 10
    assert (class_of(outcome), outcome.category) == (BURNT, TIMEOUT)
    server.wait_for_hang_ups(1)


def test_the_jobs_deadline_counts_when_it_is_earlier(server: FakeVLLM) -> None:
    server.always(hangs())
    outcome = failure_of(provider_of(server), job_with(HELLO, deadline=time.monotonic() + 0.4))
    assert (class_of(outcome), outcome.category) == (BURNT, TIMEOUT)


def test_a_connection_that_takes_all_the_time_there_is_counts_as_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # the kernel answers a few connections that nobody accepts, and then no more
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(address)
            outcome = failure_of(VLLM({"LLM_BASE_URL": f"http://127.0.0.1:{address[1]}", "LLM_TIMEOUT": "0.5"}), job_with(HELLO))
    assert (class_of(outcome), outcome.category) == (UNHARMED, TIMEOUT)


def test_a_passed_deadline_sends_nothing_and_burns_nothing(server: FakeVLLM) -> None:
    outcome = failure_of(provider_of(server), job_with(HELLO, deadline=time.monotonic() - 1))
    assert (class_of(outcome), outcome.category) == (UNHARMED, TIMEOUT)
    assert not server.seen


def test_the_idle_limit_does_not_count_before_the_first_piece(server: FakeVLLM) -> None:
    server.always(slow(0.6, says("late")))
    assert provider_of(server, LLM_IDLE_TIMEOUT="0.2").run(job_with(HELLO)).value["content"] == "late"


def cancelled_run(server: FakeVLLM, wait: Callable[[threading.Event], Any]) -> NotCompleted:
    """How a run ends that is cancelled once `wait`, given the event of its first progress, has returned."""
    cancelled, begun, outcomes = threading.Event(), threading.Event(), list[NotCompleted]()
    job = job_with(HELLO, cancelled=cancelled, report_progress=lambda _: begun.set())
    thread = started(lambda: outcomes.append(failure_of(provider_of(server), job)))
    wait(begun)
    cancelled_at = time.monotonic()
    cancelled.set()
    server.wait_for_hang_ups(1)
    thread.join(5)
    assert (server.seen[0].gone_at or 0) - cancelled_at < 5
    return outcomes[0]


@pytest.mark.parametrize("behaviour", [hangs(), endless(), trickles()], ids=["no byte", "no end", "trickling"])
def test_cancel_hangs_up_at_once(server: FakeVLLM, behaviour: Behaviour) -> None:
    server.always(behaviour)
    outcome = cancelled_run(server, lambda _: server.wait_for_requests(1))
    assert (class_of(outcome), outcome.category) == (UNHARMED, CANCELLED)


@pytest.mark.parametrize("behaviour", [endless(), goes_silent(), unframed()], ids=["no end", "silent", "unframed"])
def test_cancel_hangs_up_at_once_when_the_answer_has_begun(server: FakeVLLM, behaviour: Behaviour) -> None:
    server.always(behaviour)
    outcome = cancelled_run(server, lambda begun: begun.wait(5))
    assert (class_of(outcome), outcome.category) == (UNHARMED, CANCELLED)
    assert outcome.usage is not None


def test_an_answer_ends_with_done_and_not_with_its_connection(server: FakeVLLM) -> None:
    server.always(stays_open("whole"))
    began = time.monotonic()
    assert provider_of(server).run(job_with(HELLO)).value["content"] == "whole"
    assert time.monotonic() - began < 10
    server.wait_for_hang_ups(1)


def test_no_thread_outlives_its_job_for_long(server: FakeVLLM) -> None:
    provider = provider_of(server)
    for _ in range(20):
        provider.run(job_with(HELLO))
    watchers = [thread for thread in threading.enumerate() if thread.name == "exchange-watch"]
    for thread in watchers:
        thread.join(2)
    assert not any(thread.is_alive() for thread in watchers)


def test_an_answer_without_end_is_given_up_before_it_fills_the_memory(server: FakeVLLM) -> None:
    server.always(endless(0, "x" * 1_000_000))
    outcome = failure_of(provider_of(server), job_with(HELLO))
    assert (class_of(outcome), outcome.category) == (BURNT, INVALID_OUTPUT)
    assert outcome.message == f"gave up an answer of more than {MAX_ANSWER_BYTES} bytes"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with the openssl command")
def test_cancel_and_deadline_work_over_tls(server: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = {"LLM_BASE_URL": server.base_url.replace("http://127.0.0.1", "https://localhost")}
    untrusted = failure_of(provider_of(server, **address), job_with(HELLO))
    assert (class_of(untrusted), untrusted.category) == (UNHARMED, UNAVAILABLE)
    assert "TLS: self-signed certificate" in untrusted.message
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    provider = provider_of(server, **address)
    assert provider.run(job_with(HELLO)).value["content"] == "All is well."
    server.always(endless())
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    assert failure_of(provider, job_with(HELLO, cancelled=cancelled)).category == CANCELLED
    assert failure_of(provider, job_with(HELLO, deadline=time.monotonic() + 1)).category == TIMEOUT


# ---------------------------------------------------------------- profiles

VISION = {"LLM_PROFILES": "vision=qwen2.5-vl-7b, small=qwen2.5-14b"}


def test_every_profile_asks_for_its_model(server: FakeVLLM) -> None:
    provider = provider_of(server, **VISION)
    assert provider.model_profiles == ("qwen2.5-14b", "vision", "small")
    for profile in provider.model_profiles:
        provider.run(job_with(HELLO, model_profile=profile))
    assert [seen.body["model"] for seen in server.seen] == ["qwen2.5-14b", "qwen2.5-vl-7b", "qwen2.5-14b"]


@pytest.mark.parametrize("model", ["vision", "qwen2.5-vl-7b", None])
def test_an_input_may_name_its_profile_or_the_model_of_it(server: FakeVLLM, model: str | None) -> None:
    provider_of(server, **VISION).run(job_with(HELLO | {"model": model}, model_profile="vision"))
    assert server.seen[0].body["model"] == "qwen2.5-vl-7b"


def test_an_input_may_not_name_the_model_of_another_profile(server: FakeVLLM) -> None:
    outcome = failure_of(provider_of(server, **VISION), job_with(HELLO | {"model": "qwen2.5-14b"}, model_profile="vision"))
    assert (class_of(outcome), outcome.category) == (FINAL, INVALID_INPUT)
    assert outcome.message == "input asks for the model 'qwen2.5-14b', but its model_profile is served by 'qwen2.5-vl-7b'"


@pytest.mark.parametrize("profiles", ["vision", "vision=", "=m", "a b=m", "vision=m, vision=n"])
def test_profiles_that_are_no_pairs_are_refused(profiles: str) -> None:
    with pytest.raises(SettingsError, match="LLM_PROFILES"):
        VLLM({"LLM_BASE_URL": "http://host", "LLM_PROFILES": profiles})


def test_a_profile_called_like_the_model_means_the_model() -> None:
    environ = {"LLM_BASE_URL": "http://host", "LLM_MODEL": "m"}
    assert VLLM(environ | {"LLM_PROFILES": "m=m"}).model_profiles == ("m",)
    with pytest.raises(SettingsError, match="gives m another model, but that profile is LLM_MODEL and means itself"):
        VLLM(environ | {"LLM_PROFILES": "m=other"})


def test_check_names_every_model_that_is_not_served(server: FakeVLLM) -> None:
    health = provider_of(server, LLM_PROFILES="vision=a, ocr=b, small=qwen2.5-14b, eyes=a").check()
    assert (health.status, health.detail) == ("degraded", "a, b are not among the models served: qwen2.5-14b")


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("input_", "messages"),
    [
        ("Hello", [{"role": "user", "content": "Hello"}]),
        ({"prompt": "Hello"}, [{"role": "user", "content": "Hello"}]),
        ({"prompt": "Hello", "system": "Be terse"}, [{"role": "system", "content": "Be terse"}, {"role": "user", "content": "Hello"}]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        ),
    ],
    ids=["text", "prompt", "prompt and system", "messages"],
)
def test_every_form_of_input_becomes_messages(server: FakeVLLM, input_: Any, messages: Any) -> None:
    provider_of(server).run(job_with(input_))
    sent = server.seen[0].body
    assert sent == {"model": "qwen2.5-14b", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}


def test_parameters_go_along_and_streaming_stays_ours(server: FakeVLLM) -> None:
    parameters = {
        "temperature": 0.2,
        "max_tokens": 5,
        "seed": 3,
        "stop": ["x"],
        "tools": [{"type": "function"}],
        "top_k": 4,
        "n": 1,
    } | AS_JSON
    ours = {"model": "qwen2.5-14b", "stream": False, "stream_options": {"include_usage": False}}
    provider_of(server).run(job_with({"prompt": "Hello"} | parameters | ours))
    sent = server.seen[0].body
    assert parameters.items() <= sent.items()
    assert (sent["stream"], sent["stream_options"], "prompt" in sent) == (True, {"include_usage": True}, False)


@pytest.mark.parametrize(
    "input_",
    [
        None,
        5,
        [],
        {},
        "",
        {"prompt": ""},
        {"prompt": 5},
        {"prompt": None},
        {"prompt": "a", "system": 5},
        {"messages": []},
        {"messages": "a"},
        {"messages": ["a"]},
        {"messages": [{}], "prompt": "a"},
        {"messages": [{}], "system": "a"},
        {"prompt": "a", "model": "other"},
        {"prompt": "a", "n": 2},
        {"prompt": "a", "temperature": float("inf")},
        {"prompt": "a", "guided_json": {}},
    ],
    ids=str,
)
def test_bad_input_is_final_and_never_sent(server: FakeVLLM, input_: Any) -> None:
    outcome = failure_of(provider_of(server), job_with(input_))
    assert (class_of(outcome), outcome.category, outcome.usage) == (FINAL, INVALID_INPUT, None)
    assert not server.seen


def test_requests_carry_key_request_id_and_trace(server: FakeVLLM) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    job = job_with(HELLO, traceparent=trace, attempt=2)
    provider_of(server).run(job)
    headers = {name.lower(): value for name, value in server.seen[0].headers.items()}
    assert headers["authorization"] == "Bearer test-key"
    assert headers["x-request-id"].startswith(f"{job.id}-2-")
    assert headers["traceparent"] == trace


def test_a_trace_that_is_none_is_not_sent(server: FakeVLLM) -> None:
    provider_of(server).run(job_with(HELLO, traceparent="x\r\nInjected: 1"))
    assert not {"traceparent", "injected"} & {name.lower() for name in server.seen[0].headers}


# ---------------------------------------------------------------- result


def test_a_result_holds_text_reason_and_model(server: FakeVLLM) -> None:
    server.always(says("Grüße, 世界 🙂\n\x00 and more"))
    result = provider_of(server).run(job_with(HELLO))
    assert result.value == {"content": "Grüße, 世界 🙂\n\x00 and more", "finish_reason": "stop", "model": "qwen2.5-14b"}


def test_text_cut_at_max_tokens_is_a_result_that_says_so(server: FakeVLLM) -> None:
    server.always(replays("success"))
    value = provider_of(server).run(job_with(HELLO)).value
    assert (value["content"], value["finish_reason"]) == ("\n" * 16, "length")


def test_json_asked_for_comes_parsed_beside_its_text(server: FakeVLLM) -> None:
    server.always(replays("schema-success"))
    value = provider_of(server).run(job_with(HELLO | AS_JSON)).value
    assert value["json"] == json.loads(value["content"]) == {"lang": "de", "title": ":ov 012345ꁅ<", "tags": ["_ f8Ֆ"], "score": 6}


@pytest.mark.parametrize("text", ["null", "false", "[]", ' {"a": 672323234501019456834678989451} ', '{"a": "\\u0000"}'])
def test_json_of_any_kind_is_kept(server: FakeVLLM, text: str) -> None:
    server.always(says(text))
    value = provider_of(server).run(job_with(HELLO | {"structured_outputs": {"json": {}}})).value
    assert value["json"] == json.loads(text)


def test_json_not_asked_for_is_text(server: FakeVLLM) -> None:
    server.always(says('{"a": 1}'))
    assert "json" not in provider_of(server).run(job_with(HELLO)).value


def test_a_captured_stream_is_put_together(server: FakeVLLM) -> None:
    server.always(replays("stream-with-usage"))
    result = provider_of(server).run(job_with(HELLO))
    events = [json.loads(line[6:]) for line in captured("stream-with-usage")["body"].splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert (result.value["content"], result.value["finish_reason"]) == (text, "length")
    assert result.usage is not None
    assert {"prompt_tokens": 21, "total_tokens": 25, "completion_tokens": 4, "model": "qwen2.5-14b"}.items() <= result.usage.items()


def test_a_server_that_does_not_stream_is_read_too(server: FakeVLLM) -> None:
    server.always(refuses(200, body=captured("schema-success")["body"].encode()))
    result = provider_of(server).run(job_with(HELLO | AS_JSON))
    assert result.value["json"]["score"] == 6
    assert result.usage is not None
    assert result.usage["completion_tokens"] == 51


def test_comments_carriage_returns_and_split_characters_do_not_matter(server: FakeVLLM) -> None:
    event = b"data:" + json.dumps(chunk("Grüße"), ensure_ascii=False).encode() + b"\r\n\r\n"
    pieces = [b": keep-alive\n\n", b"event: message\n", *(event[at : at + 1] for at in range(len(event))), chunk("", finish_reason="stop")]
    server.always(streams(*pieces))
    assert provider_of(server).run(job_with(HELLO)).value["content"] == "Grüße"


def test_tool_calls_are_put_together(server: FakeVLLM) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return chunk(None, delta={"tool_calls": [{"index": index, "id": f"call-{index}", "type": "function", "function": function}]})

    server.always(
        streams(
            call(0, name="f", arguments=""),
            call(0, arguments='{"a"'),
            call(1, name="g", arguments="{}"),
            call(0, arguments=":1}"),
            chunk(finish_reason="tool_calls"),
        )
    )
    value = provider_of(server).run(job_with(HELLO | AS_JSON)).value
    assert (value["content"], value["finish_reason"], "json" in value) == (None, "tool_calls", False)
    assert [call["function"] for call in value["tool_calls"]] == [{"name": "f", "arguments": '{"a":1}'}, {"name": "g", "arguments": "{}"}]


def test_tool_calls_of_a_whole_answer_need_no_index(server: FakeVLLM) -> None:
    calls = [{"id": f"call-{name}", "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    message = {"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}
    server.always(refuses(200, body={"model": "m", "choices": [message]}))
    assert provider_of(server).run(job_with(HELLO)).value["tool_calls"] == calls


def test_reasoning_refusal_and_logprobs_are_kept_apart(server: FakeVLLM) -> None:
    server.always(
        streams(
            chunk(None, delta={"reasoning": "hm "}),
            chunk(None, delta={"reasoning_content": "well"}),
            chunk("yes", logprobs={"content": [{"token": "yes", "logprob": -0.5}]}),
            chunk(None, delta={"refusal": "no"}, finish_reason="stop"),
        )
    )
    value = provider_of(server).run(job_with(HELLO)).value
    assert (value["content"], value["reasoning"], value["refusal"]) == ("yes", "hm well", "no")
    assert value["logprobs"] == [{"token": "yes", "logprob": -0.5}]


# ---------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("counted", "tokens"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
        ({"input_tokens": 1, "output_tokens": 2}, {"prompt_tokens": 1, "completion_tokens": 2}),
        ({"prompt_tokens": 0, "completion_tokens": None}, {"prompt_tokens": 0}),
        ({"prompt_tokens": None, "input_tokens": 3}, {"prompt_tokens": 3}),
        ({"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}, {"prompt_tokens": 1}),
        ({"prompt_tokens": "1", "completion_tokens": 1.5, "total_tokens": True, "input_tokens": -1}, {}),
        ({}, {}),
    ],
)
def test_usage_has_our_names_and_absent_is_not_zero(server: FakeVLLM, counted: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    server.always(says("x", usage=counted))
    usage = dict(provider_of(server).run(job_with(HELLO)).usage or {})
    assert usage.pop("model") == "qwen2.5-14b"
    assert usage.pop("running_seconds") >= usage.pop("time_to_first_token_seconds") >= 0
    assert usage.pop("raw", {}) == counted
    assert usage == tokens


def test_usage_too_big_to_be_stored_keeps_its_counts_alone(server: FakeVLLM) -> None:
    server.always(says("x", usage={"prompt_tokens": 1, "junk": "ü" * 2_000}))
    usage = provider_of(server).run(job_with(HELLO)).usage
    assert usage is not None
    assert (usage["prompt_tokens"], "raw" in usage) == (1, False)


def test_a_whole_answer_does_not_tell_when_its_first_token_came(server: FakeVLLM) -> None:
    server.always(refuses(200, body=captured("schema-success")["body"].encode()))
    usage = provider_of(server).run(job_with(HELLO)).usage
    assert usage is not None
    assert "time_to_first_token_seconds" not in usage


def test_a_failed_attempt_tells_what_it_used(server: FakeVLLM) -> None:
    server.always(says("{", "length"))
    outcome = failure_of(provider_of(server), job_with(HELLO | AS_JSON))
    assert outcome.usage is not None
    assert {"prompt_tokens": 21, "completion_tokens": 1, "model": "qwen2.5-14b"}.items() <= outcome.usage.items()


def test_an_attempt_that_was_refused_has_no_usage(server: FakeVLLM) -> None:
    server.always(refuses(503))
    assert failure_of(provider_of(server), job_with(HELLO)).usage is None


def test_progress_is_reported_at_most_once_a_second(server: FakeVLLM) -> None:
    reports: list[Mapping[str, Any]] = []
    provider_of(server).run(job_with(HELLO, report_progress=reports.append))
    assert len(reports) == 1
    assert reports[0]["received_characters"] > 0


# ---------------------------------------------------------------- check


def test_check_names_models_endpoint_and_latency(server: FakeVLLM) -> None:
    health = provider_of(server).check()
    assert (health.status, health.models, health.endpoint, health.detail) == ("ok", ("qwen2.5-14b",), server.base_url, None)
    assert health.latency_ms is not None
    assert health.latency_ms > 0


def test_check_says_that_the_model_is_not_served(server: FakeVLLM) -> None:
    health = provider_of(server, LLM_MODEL="other").check()
    assert (health.status, health.detail) == ("degraded", "other is not among the models served: qwen2.5-14b")


def test_check_says_that_the_key_is_wrong(server: FakeVLLM) -> None:
    health = provider_of(server, LLM_API_KEY="wrong-key").check()
    assert (health.status, health.detail) == ("unavailable", "the server answered 401: Unauthorized (look at LLM_API_KEY)")


@pytest.mark.parametrize(
    "behaviour",
    [
        refuses(503),
        refuses(200, body=b"<html>", content_type="text/html"),
        refuses(200, body={"data": 5}),
        drops_connection(0),
    ],
    ids=["503", "html", "no list", "reset"],
)
def test_check_of_a_broken_server_is_unavailable(server: FakeVLLM, behaviour: Behaviour) -> None:
    server.models_behaviour = behaviour
    health = provider_of(server).check()
    assert health.status == "unavailable"
    assert health.detail


def test_check_of_a_silent_or_slow_server_is_unavailable_in_time() -> None:
    with fake_vllm() as silent, fake_vllm() as slow, ThreadPoolExecutor(2) as pool:
        silent.models_behaviour, slow.models_behaviour = hangs(), trickles()
        began = time.monotonic()
        looks = list(pool.map(lambda server: provider_of(server).check(), (silent, slow)))
        assert time.monotonic() - began < 10
    assert [(health.status, bool(health.detail)) for health in looks] == [("unavailable", True)] * 2


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("base_url", "endpoint"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1"),
        (" http://127.0.0.1:1/v1/ ", "http://127.0.0.1:1/v1"),
        ("https://127.0.0.1:1/llm", "https://127.0.0.1:1/llm/v1"),
        ("https://127.0.0.1:1/api/v3", "https://127.0.0.1:1/api/v3"),
        ("http://me:p%40ss@127.0.0.1:1/v1", "http://127.0.0.1:1/v1"),
        ("http://[::1]:1", "http://[::1]:1/v1"),
    ],
)
def test_base_url_is_taken_with_and_without_its_version(base_url: str, endpoint: str) -> None:
    assert VLLM({"LLM_BASE_URL": base_url}).check().endpoint == endpoint


@pytest.mark.parametrize("environ", [{}, {"LLM_BASE_URL": ""}, {"LLM_BASE_URL": "  ", "LLM_API_KEY": "k"}])
def test_without_a_base_url_it_is_not_configured(environ: Mapping[str, str]) -> None:
    with pytest.raises(NotConfigured, match="LLM_BASE_URL is not set"):
        VLLM(environ)


@pytest.mark.parametrize(
    "base_url",
    ["host:8000", "ftp://host", "http://", "://", "http://host/v1?key=secret-value", "http://host#x", "http://me:secret-value@host:x/"],
)
def test_a_base_url_that_cannot_be_used_is_refused_unseen(base_url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        VLLM({"LLM_BASE_URL": base_url})
    assert "LLM_BASE_URL" in str(refused.value)
    assert "secret-value" not in str(refused.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    wrong = {
        "LLM_BASE_URL": "host",
        "LLM_API_KEY": "two words",
        "LLM_MODEL": "a b",
        "LLM_PROFILES": "vision",
        "LLM_TIMEOUT": "soon",
        "LLM_IDLE_TIMEOUT": "0",
    }
    with pytest.raises(SettingsError) as refused:
        VLLM(wrong)
    assert [problem.split(":")[0] for problem in refused.value.problems] == list(wrong)


def test_a_key_and_user_info_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match="only one of them") as refused:
        VLLM({"LLM_BASE_URL": "http://me:secret-value@host", "LLM_API_KEY": "k"})
    assert "secret-value" not in str(refused.value)


def test_user_info_is_sent_as_basic_authentication(server: FakeVLLM) -> None:
    server.api_key = None
    VLLM({"LLM_BASE_URL": server.base_url.replace("://", "://me:p%40ss@")}).run(job_with(HELLO))
    assert server.seen[0].headers["Authorization"] == "Basic bWU6cEBzcw=="


def test_no_secret_in_repr(server: FakeVLLM) -> None:
    assert "test-key" not in f"{provider_of(server)!r}{provider_settings(VLLMSettings, server.environ)!r}"
    assert "payload" not in repr(job_with("payload"))


# ---------------------------------------------------------------- against a real server

real = pytest.mark.real
REAL_MODEL = os.environ.get("REAL_VLLM_MODEL", "qwen2.5-14b")


@pytest.fixture
def real_vllm() -> VLLM:
    if "REAL_VLLM_URL" not in os.environ:
        pytest.skip("REAL_VLLM_URL names no server")
    environ = {"LLM_BASE_URL": os.environ["REAL_VLLM_URL"], "LLM_API_KEY": os.environ.get("REAL_VLLM_KEY", ""), "LLM_MODEL": REAL_MODEL}
    return VLLM(environ)


def engine_gauges() -> dict[str, float]:
    """How many requests the real engine runs and holds in its queue."""
    url = os.environ["REAL_VLLM_URL"].removesuffix("/").removesuffix("/v1")
    lines = urllib3.request("GET", f"{url}/metrics").data.decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return {name: float(line.rsplit(" ", 1)[1]) for name in names for line in lines if line.startswith(name + "{")}


def wait_for_engine(true: Callable[[dict[str, float]], bool], within_seconds: float) -> float:
    """Seconds until the engine's gauges are so. Raises `AssertionError` when they do not become so."""
    began = time.monotonic()
    while not true(gauges := engine_gauges()):
        assert time.monotonic() - began < within_seconds, gauges
    return time.monotonic() - began


@real
def test_real_check_is_ok(real_vllm: VLLM) -> None:
    health = real_vllm.check()
    assert health.status == "ok"
    assert REAL_MODEL in health.models


@real
def test_real_text_and_usage(real_vllm: VLLM) -> None:
    result = real_vllm.run(job_with({"prompt": "Hello", "system": "Be terse", "max_tokens": 16}, model_profile=REAL_MODEL))
    assert result.usage is not None
    assert result.usage["total_tokens"] == result.usage["prompt_tokens"] + result.usage["completion_tokens"]
    assert result.value["finish_reason"] in ("stop", "length")


@real
def test_real_json_by_schema(real_vllm: VLLM) -> None:
    result = real_vllm.run(job_with(HELLO | AS_JSON | {"max_tokens": 200}, model_profile=REAL_MODEL))
    assert set(result.value["json"]) >= {"language", "score"}


@real
@pytest.mark.parametrize(
    ("input_", "expected", "category"),
    [
        (HELLO | {"max_tokens": 1, "response_format": {"type": "json_object"}}, BURNT, TRUNCATED),
        ({"prompt": "the quick brown fox " * 100_000}, FINAL, CONTEXT_LENGTH_EXCEEDED),
        (HELLO | {"max_tokens": 10_000_000}, FINAL, CONTEXT_LENGTH_EXCEEDED),
        (HELLO | {"temperature": -1}, FINAL, INVALID_INPUT),
        (HELLO | {"max_tokens": 0}, FINAL, INVALID_INPUT),
    ],
    ids=["truncated", "prompt too long", "max_tokens too large", "temperature", "max_tokens"],
)
def test_real_failures_have_their_class(real_vllm: VLLM, input_: Any, expected: str, category: str) -> None:
    outcome = failure_of(real_vllm, job_with(input_, model_profile=REAL_MODEL))
    assert (class_of(outcome), outcome.category) == (expected, category), outcome


@real
def test_real_cancel_frees_the_engine(real_vllm: VLLM) -> None:
    cancelled = threading.Event()
    long = {"prompt": "Hello", "max_tokens": 450, "min_tokens": 450, "ignore_eos": True}

    def run_until_cancelled(_: int) -> NotCompleted:
        while isinstance(outcome := outcome_of(real_vllm, job_with(long, model_profile=REAL_MODEL, cancelled=cancelled)), Result):
            pass  # A quick model comes to its end; the engine has to be full when the cancellation comes.
        return outcome

    with ThreadPoolExecutor(10) as threads:
        runs = [threads.submit(run_until_cancelled, number) for number in range(10)]
        wait_for_engine(lambda gauges: sum(gauges.values()) >= 8, 20)
        busy = engine_gauges()
        cancelled.set()
        seconds = wait_for_engine(lambda gauges: sum(gauges.values()) == 0, 2)
        outcomes = [one.result(5) for one in runs]
    print(f"the engine had {busy}, and was free {seconds:.3f} s after the cancellation")
    assert {outcome.category for outcome in outcomes} == {CANCELLED}
