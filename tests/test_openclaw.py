"""The OpenClaw provider against a fake gateway that answers as the real one was seen to; at the end, against a real one if there is one.

A real gateway: REAL_OPENCLAW_URL and REAL_OPENCLAW_TOKEN (and REAL_OPENCLAW_AGENT, if it is not `default`) in the environment, and
`pytest -m real`. REAL_OPENCLAW_ORDERS=1 beside them says that the model server behind it obeys words in the last user message:
`SAY=<base64>` (that text), `STATUS=503:<message>`, `LENGTH` (cut off), `NOUSAGE`, `SLOW=5` (seconds of silence first), anything else: PONG.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_openclaw import FakeOpenClaw, captured, chat_cases, fake_openclaw, replays, text_of
from fake_vllm import Behaviour, chunk, endless, fake_vllm, goes_silent, hangs, refuses, says, slow, streams, trickles

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
    UNSUPPORTED,
    Job,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Result,
    SettingsError,
)
from providers.conformance import ProviderConformance, closed_port, outcome_of, silent_server, timed
from providers.openclaw import OpenClaw
from providers.vllm import VLLM

HELLO = {"prompt": "Hello"}
AS_JSON = {"response_format": {"type": "json_object"}}
BURNT, UNHARMED, FINAL, LEFT = "not now, attempt burnt", "not now, unharmed", "final", "left to another provider"

# Each captured answer, and what becomes of a job that gets it: completed with this text, or not, with this category.
OUTCOMES: dict[str, tuple[str, str]] = {
    "success": ("completed", "PONG"),
    "success-stream-with-usage": ("completed", "PONG"),
    "success-json-object": ("completed", '{"a": 1}'),
    "stream-json-object": ("completed", '{"a": 1}'),
    "draining-in-flight-finishes": ("completed", "PONG"),
    "usage-zero": ("completed", "PONG"),
    "stream-usage-zero": ("completed", "PONG"),
    # The token, the address, the agent: nothing a job can help
    "401-no-token": (UNHARMED, UNAUTHORIZED),
    "401-bad-token": (UNHARMED, UNAUTHORIZED),
    "401-token-in-x-api-key": (UNHARMED, UNAUTHORIZED),
    "stream-401-bad-token": (UNHARMED, UNAUTHORIZED),
    "429-lockout": (UNHARMED, RATE_LIMITED),
    "403-forwarded-for": (UNHARMED, UNAUTHORIZED),
    "400-model": (UNHARMED, UNAVAILABLE),
    "400-unknown-agent": (UNHARMED, UNAVAILABLE),
    "stream-unknown-agent": (UNHARMED, UNAVAILABLE),
    "404-unknown-provider-in-header": (UNHARMED, UNAVAILABLE),
    "405-get": (UNHARMED, UNAVAILABLE),
    "503-draining": (UNHARMED, UNAVAILABLE),
    # What the gateway refuses, and another provider may take
    "400-no-user-message": (LEFT, UNSUPPORTED),
    "400-malformed-json": (LEFT, UNSUPPORTED),
    "400-temperature": (LEFT, UNSUPPORTED),
    "400-max-tokens": (LEFT, UNSUPPORTED),
    "413-body-over-20-MiB": (LEFT, UNSUPPORTED),
    # What the model server refuses
    "upstream-400": (FINAL, INVALID_INPUT),
    "stream-upstream-400": (FINAL, INVALID_INPUT),
    "upstream-422": (FINAL, INVALID_INPUT),
    "stream-upstream-422": (FINAL, INVALID_INPUT),
    "upstream-401": (UNHARMED, UNAUTHORIZED),
    "stream-upstream-401": (UNHARMED, UNAUTHORIZED),
    "stream-key-put-aside-after-upstream-401": (UNHARMED, UNAUTHORIZED),
    "upstream-402": (UNHARMED, UNAVAILABLE),
    "stream-upstream-402": (UNHARMED, UNAVAILABLE),
    "stream-key-put-aside-after-upstream-402": (UNHARMED, UNAUTHORIZED),
    "upstream-403": (UNHARMED, UNAUTHORIZED),
    "stream-upstream-403": (UNHARMED, UNAUTHORIZED),
    "stream-key-put-aside-after-upstream-403": (UNHARMED, UNAUTHORIZED),
    "upstream-404": (UNHARMED, UNAVAILABLE),
    "stream-upstream-404": (UNHARMED, UNAVAILABLE),
    "upstream-429": (UNHARMED, RATE_LIMITED),
    "stream-upstream-429": (UNHARMED, RATE_LIMITED),
    # The model server in trouble, or away
    "upstream-500": (BURNT, UNAVAILABLE),
    "upstream-500-default-retries": (BURNT, UNAVAILABLE),
    "stream-error-then-done-upstream-500": (BURNT, UNAVAILABLE),
    "stream-upstream-500": (BURNT, UNAVAILABLE),
    "stream-upstream-error-midway": (BURNT, UNAVAILABLE),
    "upstream-503": (UNHARMED, UNAVAILABLE),
    "upstream-503-default-retries": (UNHARMED, UNAVAILABLE),
    "stream-upstream-503": (UNHARMED, UNAVAILABLE),
    "upstream-503-busy-vllm": (BURNT, UNAVAILABLE),
    "stream-upstream-503-busy-vllm": (BURNT, UNAVAILABLE),
    "upstream-504": (BURNT, TIMEOUT),
    "stream-upstream-504": (UNHARMED, UNAVAILABLE),
    "408-upstream-down": (UNHARMED, UNAVAILABLE),
    "408-upstream-down-default-retries": (UNHARMED, UNAVAILABLE),
    "stream-error-then-done-upstream-down": (UNHARMED, UNAVAILABLE),
    "stream-upstream-resets": (UNHARMED, UNAVAILABLE),
    "upstream-breaks-off": (UNHARMED, UNAVAILABLE),
    "stream-upstream-breaks-off": (BURNT, UNAVAILABLE),
    "stream-upstream-falls-silent": (BURNT, UNAVAILABLE),
    # Ambiguous, so some attempts and then no more
    "upstream-413": (BURNT, INTERNAL),
    "stream-upstream-413": (BURNT, INTERNAL),
    "500-internal-error-context-overflow": (BURNT, INTERNAL),
    "stream-context-overflow": (BURNT, INTERNAL),
    "500-internal-error-after-upstream-403": (BURNT, INTERNAL),
    "500-internal-error-after-upstream-401": (BURNT, INTERNAL),
    "500-internal-error-agent-timeout": (BURNT, INTERNAL),
    "stream-agent-timeout": (BURNT, INTERNAL),
    "stream-upstream-is-silent": (BURNT, INTERNAL),
    "stream-empty-always": (BURNT, INTERNAL),
    # Altered: seen where the gateway contradicts itself or adds to the text, and not where it takes away
    "length": (BURNT, TRUNCATED),
    "stream-length": ("completed", "PONG"),
    "stream-altered-tool-call-text": (BURNT, INVALID_OUTPUT),
    "altered-tool-call-text": ("completed", "after"),
    "empty-upstream-answer": ("completed", "PONG"),
    "stream-empty-upstream-answer": ("completed", "PONG"),
    "altered-trimmed": ("completed", "text"),
    "stream-altered-trimmed": ("completed", "text"),
    "altered-media-alone": ("completed", "MEDIA:https://x/a.png"),
    "altered-media-line": ("completed", "first\nlast"),
    "stream-altered-media-line": ("completed", "first\nlast"),
    "altered-reply-tag-in-json": ("completed", '{"s": " hi"}'),
    "stream-altered-reply-tag-in-json": ("completed", '{"s": " hi"}'),
    "altered-think": ("completed", "answer"),
    "stream-altered-think": ("completed", "answer"),
    "stream-altered-think-in-json": ("completed", '{\n "a": 1,\n "b": "x  z"\n}'),
    "altered-final": ("completed", "x"),
    "stream-altered-final": ("completed", "x"),
    "altered-no-reply": ("completed", "PONG"),
    "stream-altered-no-reply": ("completed", "PONG"),
    "altered-unchanged-json-fence": ("completed", '```json\n{"a": [1, 2]}\n```'),
}

NOTICE = text_of("length")
FAILURES: list[tuple[str, Behaviour, dict[str, Any], str, str]] = [
    ("no endpoint", replays("404-endpoint-disabled"), HELLO, UNHARMED, UNAVAILABLE),
    ("nothing to say", says("No response from OpenClaw."), HELLO, BURNT, INVALID_OUTPUT),
    ("no answer of the agent", says("⚠️ Agent couldn't generate a response. Please try again."), HELLO, BURNT, INVALID_OUTPUT),
    ("a sentence after the text", says("yes\n\n⚠️ Turn yielded without a continuation source. Send …"), HELLO, BURNT, INVALID_OUTPUT),
    ("a notice after the text", says(NOTICE, "length"), HELLO, BURNT, TRUNCATED),
    ("a notice, though it says stop", says(NOTICE), HELLO, BURNT, TRUNCATED),
    ("JSON cut at a length", replays("stream-length"), HELLO | AS_JSON, BURNT, TRUNCATED),
    ("cut again with the same seed", says("{", "length"), HELLO | AS_JSON | {"seed": 7}, BURNT, TRUNCATED),
    ("text for JSON", replays("success"), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("fenced JSON", replays("altered-unchanged-json-fence"), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("a placeholder for JSON", says("No response from OpenClaw."), HELLO | AS_JSON, BURNT, INVALID_OUTPUT),
    ("no finish chunk", streams(chunk("a")), HELLO, BURNT, UNAVAILABLE),
    ("error without a type", streams({"error": {"message": "hm"}}), HELLO, BURNT, INTERNAL),
    ("error that is a text", streams({"error": "hm"}), HELLO, BURNT, INTERNAL),
    ("unknown type", streams({"error": {"message": "hm", "type": "new_error"}}), HELLO, BURNT, INTERNAL),
    ("rate limit midway", streams(chunk("a"), {"error": {"message": "429", "type": "rate_limit_error"}}), HELLO, BURNT, RATE_LIMITED),
    ("too long, in the upstream's words", refuses(400, body={"error": {"message": "400 maximum context length", "type":
        "invalid_request_error"}}), HELLO, FINAL, CONTEXT_LENGTH_EXCEEDED),
    ("a proxy's 502", refuses(502, body=b"<html>Bad Gateway</html>", content_type="text/html"), HELLO, BURNT, UNAVAILABLE),
    ("a proxy's 401", refuses(401), HELLO, UNHARMED, UNAUTHORIZED),
    ("a redirect", refuses(302, {"Location": "http://127.0.0.1:1/"}), HELLO, UNHARMED, UNAVAILABLE),
]  # fmt: skip


@pytest.fixture
def gateway() -> Iterator[FakeOpenClaw]:
    with fake_openclaw() as running:
        yield running


def provider_of(gateway: FakeOpenClaw, **settings: str) -> OpenClaw:
    return OpenClaw(gateway.environ | settings)


def job_with(input_: Any, **changes: Any) -> Job:
    facts = {"owner_service": "tests", "owner_ref": "openclaw", "task_type": "call_analysis", "model_profile": "openclaw"}
    return Job(id=str(uuid.uuid4()), input=input_, **(facts | changes))


def run(provider: OpenClaw, input_: Any, **changes: Any) -> Result:
    return provider.run(job_with(input_, **changes))


def failure_of(provider: OpenClaw, job: Job) -> NotCompleted:
    with pytest.raises(NotCompleted) as raised:
        provider.run(job)
    return raised.value


def became(outcome: Result | NotCompleted) -> tuple[str, str]:
    if isinstance(outcome, Result):
        return "completed", outcome.value["content"]
    if isinstance(outcome, NotNow):
        return BURNT if outcome.burns_attempt else UNHARMED, outcome.category
    return FINAL if isinstance(outcome, Never) else LEFT, outcome.category


# ---------------------------------------------------------------- contract


class TestConformance(ProviderConformance):
    good_input = HELLO
    other_inputs = (HELLO | AS_JSON,)
    bad_input = 5
    unsupported_input = HELLO | {"tools": [{"type": "function", "function": {"name": "f"}}]}

    def provider(self, environ: Mapping[str, str]) -> OpenClaw:
        return OpenClaw(environ)

    @pytest.fixture(autouse=True)
    def environments(self) -> Iterator[None]:
        with fake_openclaw() as good, silent_server() as silent, closed_port() as nobody:
            self.good = good.environ
            self.hanging = {"OPENCLAW_URL": silent, "OPENCLAW_TOKEN": "hidden-token"}
            self.unreachable = {"OPENCLAW_URL": nobody, "OPENCLAW_TOKEN": "hidden-token"}
            yield


# ---------------------------------------------------------------- outcomes


def test_every_captured_answer_has_its_place_in_the_table() -> None:
    assert set(OUTCOMES) == set(chat_cases())


@pytest.mark.parametrize(("case", "expected"), OUTCOMES.items(), ids=list(OUTCOMES))
def test_every_captured_answer_has_its_outcome(gateway: FakeOpenClaw, case: str, expected: tuple[str, str]) -> None:
    gateway.always(replays(case))
    assert became(outcome_of(provider_of(gateway), job_with(HELLO))) == expected


@pytest.mark.parametrize(("behaviour", "input_", "expected", "category"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES])
def test_every_way_to_fail_has_its_class(gateway: FakeOpenClaw, behaviour: Behaviour, input_: Any, expected: str, category: str) -> None:
    gateway.always(behaviour)
    outcome = failure_of(provider_of(gateway), job_with(input_))
    assert became(outcome) == (expected, category), outcome
    assert 0 < len(outcome.message) <= 700
    assert gateway.token not in repr(vars(outcome))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("401-bad-token", "look at OPENCLAW_TOKEN"),
        ("429-lockout", "look at OPENCLAW_TOKEN"),
        ("upstream-401", "look at the keys in the gateway's own configuration"),
        ("stream-upstream-403", "look at the keys in the gateway's own configuration"),
        ("400-unknown-agent", "look at OPENCLAW_AGENT"),
        ("404-endpoint-disabled", "http.endpoints.chatCompletions"),
        ("403-forwarded-for", "look at OPENCLAW_URL"),
        ("upstream-404", "look at the models in the gateway's own configuration"),
    ],
)
def test_a_refusal_says_where_to_look(gateway: FakeOpenClaw, case: str, words: str) -> None:
    gateway.always(replays(case))
    assert words in failure_of(provider_of(gateway), job_with(HELLO)).message


@pytest.mark.parametrize(("case", "seconds"), [("503-draining", 1.0), ("429-lockout", 5.0), ("upstream-503", None)])
def test_retry_after_is_honoured(gateway: FakeOpenClaw, case: str, seconds: float | None) -> None:
    gateway.always(replays(case))
    outcome = failure_of(provider_of(gateway), job_with(HELLO))
    assert isinstance(outcome, NotNow)
    assert outcome.retry_in_seconds == seconds


# ---------------------------------------------------------------- a wrong token


def test_a_token_that_was_refused_is_not_tried_again_for_a_while(gateway: FakeOpenClaw) -> None:
    provider = provider_of(gateway, OPENCLAW_TOKEN="wrong-token")
    assert provider.check().detail == "the server answered 401: Unauthorized (look at OPENCLAW_TOKEN)"
    again = failure_of(provider, job_with(HELLO))
    assert became(again) == (UNHARMED, UNAUTHORIZED)
    assert isinstance(again, NotNow)
    assert 50 < (again.retry_in_seconds or 0) <= 60
    health = provider.check()
    assert (health.status, "look at OPENCLAW_TOKEN" in (health.detail or "")) == ("unavailable", True)
    assert gateway.refused == 1


def test_a_key_the_model_server_refuses_is_tried_again(gateway: FakeOpenClaw) -> None:
    gateway.behave(replays("upstream-401"), replays("success"))
    provider = provider_of(gateway)
    failure_of(provider, job_with(HELLO))
    assert provider.run(job_with(HELLO)).value["content"] == "PONG"


# ---------------------------------------------------------------- time and cancellation


@pytest.mark.parametrize(
    ("behaviour", "settings"),
    [
        pytest.param(hangs(), {"OPENCLAW_TIMEOUT": "0.4"}, id="not a byte"),
        pytest.param(endless(), {"OPENCLAW_TIMEOUT": "0.4"}, id="no end"),
        pytest.param(trickles(), {"OPENCLAW_TIMEOUT": "0.4"}, id="a byte at a time"),
        pytest.param(goes_silent(), {"OPENCLAW_IDLE_TIMEOUT": "0.3", "OPENCLAW_TIMEOUT": "20"}, id="silence midway"),
    ],
)
def test_time_limits_end_an_attempt(gateway: FakeOpenClaw, behaviour: Behaviour, settings: Mapping[str, str]) -> None:
    gateway.always(behaviour)
    outcome, seconds = timed(lambda: failure_of(provider_of(gateway, **settings), job_with(HELLO)))
    assert seconds < 10
    assert became(outcome) == (BURNT, TIMEOUT)
    gateway.wait_for_hang_ups(1)


def opens_at_once(then: Behaviour) -> Behaviour:
    """As the real one does: the stream begins before the model was asked."""

    def behave(handler: Any) -> None:
        handler.begin_stream()
        handler.send_event(chunk(None, delta={"role": "assistant"}))
        handler.begin_stream = lambda: None
        then(handler)

    return behave


def test_the_idle_limit_does_not_count_before_the_models_first_word(gateway: FakeOpenClaw) -> None:
    gateway.always(opens_at_once(slow(0.6, says("late"))))
    assert run(provider_of(gateway, OPENCLAW_IDLE_TIMEOUT="0.2"), HELLO).value["content"] == "late"


@pytest.mark.parametrize("behaviour", [hangs(), opens_at_once(hangs()), endless()], ids=["no byte", "no word", "no end"])
def test_cancel_hangs_up_at_once(gateway: FakeOpenClaw, behaviour: Behaviour) -> None:
    gateway.always(behaviour)
    cancelled, outcomes = threading.Event(), list[NotCompleted]()
    thread = threading.Thread(target=lambda: outcomes.append(failure_of(provider_of(gateway), job_with(HELLO, cancelled=cancelled))))
    thread.start()
    gateway.wait_for_requests(1)
    cancelled_at = time.monotonic()
    cancelled.set()
    gateway.wait_for_hang_ups(1)
    thread.join(5)
    assert (gateway.seen[0].gone_at or 0) - cancelled_at < 5
    assert became(outcomes[0]) == (UNHARMED, CANCELLED)


# ---------------------------------------------------------------- request


def test_a_request_has_what_the_gateway_passes_on_and_asks_an_agent(gateway: FakeOpenClaw) -> None:
    passed = {
        "temperature": 0.2,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x"],
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
    } | AS_JSON
    ours = {"model": "openclaw", "n": 1, "stream": False, "stream_options": None, "user": "anna", "top_k": None}
    run(provider_of(gateway), {"prompt": "Hello", "system": "Be terse"} | passed | ours)
    messages = [{"role": "system", "content": "Be terse"}, {"role": "user", "content": "Hello"}]
    streamed = {"model": "openclaw/default", "stream": True, "stream_options": {"include_usage": True}}
    assert gateway.seen[0].body == passed | streamed | {"messages": messages}


def test_a_request_is_not_joined_to_others_and_not_forwarded_for_anybody(gateway: FakeOpenClaw) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    run(provider_of(gateway), {"prompt": "Hello", "user": "anna"}, traceparent=trace)
    headers = {name.lower(): value for name, value in gateway.seen[0].headers.items()}
    usual = {"host", "accept", "accept-encoding", "user-agent", "authorization", "content-type", "content-length"}
    assert set(headers) == usual | {"x-request-id", "traceparent"}
    assert headers["authorization"] == f"Bearer {gateway.token}"
    assert "user" not in gateway.seen[0].body


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}


@pytest.mark.parametrize(
    ("input_", "words"),
    [
        (HELLO | {"tools": [], "top_k": 4}, "OpenClaw does not pass on tools, top_k"),
        (HELLO | {"structured_outputs": {"json": {}}}, "OpenClaw does not pass on structured_outputs"),
        (HELLO | {"chat_template_kwargs": {"enable_thinking": False}}, "OpenClaw does not pass on chat_template_kwargs"),
        (HELLO | {"logprobs": True}, "OpenClaw does not pass on logprobs"),
        (HELLO | {"A secret of the caller's": 1}, "OpenClaw does not pass on what else is asked for"),
        (HELLO | {"model": "qwen2.5-vl-7b"}, "but its model_profile is served by 'openclaw/default'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]}, "of these only text"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1", "content": "y"}]}, "of these only text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}, {"role": "user", "content": "y"}]}, "of these only text"),
        ({"messages": [{"role": "user", "content": None}]}, "of these only text"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "of these only text"),
        ({"messages": [{}]}, "of these only text"),
    ],
    ids=str,
)
def test_what_the_gateway_would_drop_is_left_to_another_provider(gateway: FakeOpenClaw, input_: Any, words: str) -> None:
    outcome = failure_of(provider_of(gateway), job_with(input_))
    assert became(outcome) == (LEFT, UNSUPPORTED)
    assert words in outcome.message
    assert not gateway.seen


def test_texts_in_parts_and_turns_are_passed_on(gateway: FakeOpenClaw) -> None:
    turns = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}], "name": None},
        {"role": "assistant", "content": "c", "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    run(provider_of(gateway), {"messages": turns})
    assert gateway.seen[0].body["messages"] == turns


def test_a_fallback_takes_a_job_of_its_profile_as_vllm_does(gateway: FakeOpenClaw) -> None:
    job = job_with(HELLO | AS_JSON | {"model": "qwen2.5-14b", "seed": 1}, model_profile="qwen2.5-14b")
    with fake_vllm() as server:
        direct = VLLM(server.environ).run(job)
    fallback = provider_of(gateway, OPENCLAW_PROFILES="qwen2.5-14b").run(job)
    assert direct.value.keys() == fallback.value.keys()
    assert direct.value["json"] == fallback.value["json"]


# ---------------------------------------------------------------- result and usage


def test_a_result_is_like_vllms_and_names_the_agent(gateway: FakeOpenClaw) -> None:
    gateway.always(replays("stream-json-object"))
    value = run(provider_of(gateway), HELLO | AS_JSON).value
    assert value == {"content": '{"a": 1}', "finish_reason": "stop", "model": "openclaw/default", "json": {"a": 1}}


def test_text_cut_at_max_tokens_is_a_result_that_says_so(gateway: FakeOpenClaw) -> None:
    gateway.always(replays("stream-length"))
    value = run(provider_of(gateway), HELLO).value
    assert (value["content"], value["finish_reason"]) == ("PONG", "length")


def test_usage_counts_tokens_and_names_no_model(gateway: FakeOpenClaw) -> None:
    gateway.always(replays("success-stream-with-usage"))
    usage = dict(run(provider_of(gateway), HELLO).usage or {})
    assert usage.pop("running_seconds") >= usage.pop("time_to_first_token_seconds") >= 0
    counted = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    assert usage == counted | {"agent": "openclaw/default", "raw": counted}


def test_usage_of_nothing_but_zeros_is_unknown(gateway: FakeOpenClaw) -> None:
    gateway.always(replays("stream-usage-zero"))
    usage = dict(run(provider_of(gateway), HELLO).usage or {})
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert (usage["raw"], usage.keys() & zeros.keys()) == (zeros, set())


def test_a_failed_attempt_tells_what_it_used(gateway: FakeOpenClaw) -> None:
    gateway.always(replays("stream-length"))
    outcome = failure_of(provider_of(gateway), job_with(HELLO | AS_JSON))
    assert outcome.usage is not None
    assert {"completion_tokens": 7, "agent": "openclaw/default"}.items() <= outcome.usage.items()


def test_an_attempt_that_was_refused_has_no_usage(gateway: FakeOpenClaw) -> None:
    gateway.always(replays("503-draining"))
    assert failure_of(provider_of(gateway), job_with(HELLO)).usage is None


# ---------------------------------------------------------------- check


def test_check_asks_for_readiness_and_agents(gateway: FakeOpenClaw) -> None:
    health = provider_of(gateway).check()
    assert (health.status, health.detail, health.endpoint) == ("ok", None, f"{gateway.url}/v1")
    assert health.models == ("openclaw", "openclaw/default", "openclaw/main")
    assert gateway.looks == ["/readyz", "/v1/models"]


def test_check_names_the_agents_that_are_missing(gateway: FakeOpenClaw) -> None:
    health = provider_of(gateway, OPENCLAW_AGENT="main", OPENCLAW_PROFILES="a, b=seer, c=seer").check()
    assert (health.status, (health.detail or "").split(":")[0]) == ("degraded", "openclaw/seer is not among the models served")


def test_check_of_a_draining_gateway_says_why(gateway: FakeOpenClaw) -> None:
    gateway.readiness = "ready-draining"
    health = provider_of(gateway).check()
    assert (health.status, health.detail) == ("unavailable", "the gateway is not ready: gateway-draining")


def test_check_of_something_else_than_a_gateway_is_unavailable() -> None:
    with fake_vllm(api_key=None) as server:
        health = OpenClaw({"OPENCLAW_URL": server.base_url, "OPENCLAW_TOKEN": "test-token"}).check()
    assert (health.status, "look at OPENCLAW_URL" in (health.detail or "")) == ("unavailable", True)


@pytest.mark.parametrize("behaviour", [refuses(503), refuses(200, body={"data": 5})], ids=["503", "5"])
def test_check_of_a_broken_gateway_is_unavailable(gateway: FakeOpenClaw, behaviour: Behaviour) -> None:
    gateway.models_behaviour = behaviour
    assert provider_of(gateway).check().status == "unavailable"


def test_check_of_a_silent_or_slow_gateway_is_unavailable_in_time() -> None:
    with fake_openclaw() as silent, fake_openclaw() as slow, ThreadPoolExecutor(2) as pool:
        silent.models_behaviour, slow.models_behaviour = hangs(), trickles()
        looks = list(pool.map(lambda gateway: timed(provider_of(gateway).check), (silent, slow)))
    assert [(health.status, seconds < 10) for health, seconds in looks] == [("unavailable", True)] * 2


# ---------------------------------------------------------------- settings

SET = {"OPENCLAW_URL": "http://host:18789", "OPENCLAW_TOKEN": "test-token"}


@pytest.mark.parametrize("absent", ["OPENCLAW_URL", "OPENCLAW_TOKEN"])
def test_without_address_or_token_it_is_off(absent: str) -> None:
    with pytest.raises(NotConfigured, match=f"{absent} is not set"):
        OpenClaw(SET | {absent: ""})


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/", "http://127.0.0.1:1/v1"),
        ("http://127.0.0.1:1/v1/", "http://127.0.0.1:1/v1"),
        ("https://127.0.0.1:1/claw", "https://127.0.0.1:1/claw/v1"),
    ],
)
def test_the_address_is_taken_with_and_without_its_version(url: str, endpoint: str) -> None:
    assert OpenClaw(SET | {"OPENCLAW_URL": url}).check().endpoint == endpoint


@pytest.mark.parametrize(
    ("settings", "models"),
    [
        ({}, {"openclaw": "openclaw/default"}),
        ({"OPENCLAW_AGENT": "plain"}, {"openclaw": "openclaw/plain"}),
        (
            {"OPENCLAW_PROFILES": "qwen2.5-14b, vision=seer", "OPENCLAW_AGENT": "plain"},
            {"qwen2.5-14b": "openclaw/plain", "vision": "openclaw/seer"},
        ),
        ({"OPENCLAW_PROFILES": "a=default", "OPENCLAW_AGENT": "plain"}, {"a": "openclaw/default"}),
    ],
)
def test_every_profile_has_its_agent(gateway: FakeOpenClaw, settings: Mapping[str, str], models: Mapping[str, str]) -> None:
    provider = provider_of(gateway, **settings)
    assert set(provider.model_profiles) == set(models)
    for profile in models:
        run(provider, HELLO, model_profile=profile)
    assert [seen.body["model"] for seen in gateway.seen] == list(models.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"OPENCLAW_URL": "host"},
        {"OPENCLAW_URL": "http://me:secret-value@host"},
        {"OPENCLAW_TOKEN": "two secret-value"},
        {"OPENCLAW_AGENT": "openclaw/main"},
        {"OPENCLAW_PROFILES": ","},
        {"OPENCLAW_PROFILES": "a, a=b"},
        {"OPENCLAW_PROFILES": "a b"},
        {"OPENCLAW_PROFILES": "a=b c"},
        {"OPENCLAW_TIMEOUT": "soon"},
        {"OPENCLAW_IDLE_TIMEOUT": "0"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused_unseen(wrong: Mapping[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))) as refused:
        OpenClaw({**SET, **wrong})
    assert "secret-value" not in str(refused.value)


# ---------------------------------------------------------------- against a real gateway

real = pytest.mark.real


@pytest.fixture
def real_settings() -> dict[str, str]:
    if "REAL_OPENCLAW_URL" not in os.environ:
        pytest.skip("REAL_OPENCLAW_URL names no gateway")
    agent = os.environ.get("REAL_OPENCLAW_AGENT", "default")
    return {"OPENCLAW_URL": os.environ["REAL_OPENCLAW_URL"], "OPENCLAW_TOKEN": os.environ["REAL_OPENCLAW_TOKEN"], "OPENCLAW_AGENT": agent}


@pytest.fixture
def real_openclaw(real_settings: dict[str, str]) -> OpenClaw:
    return OpenClaw(real_settings)


@pytest.fixture
def orders(real_openclaw: OpenClaw) -> OpenClaw:
    if os.environ.get("REAL_OPENCLAW_ORDERS") != "1":
        pytest.skip("REAL_OPENCLAW_ORDERS=1 does not say that the model server behind the gateway obeys")
    return real_openclaw


def say(text: str) -> dict[str, Any]:
    return {"prompt": "SAY=" + base64.b64encode(text.encode()).decode()}


@real
def test_real_check_is_ok(real_openclaw: OpenClaw) -> None:
    health = real_openclaw.check()
    assert (health.status, "openclaw/default" in health.models) == ("ok", True)


@real
def test_real_text_and_usage(real_openclaw: OpenClaw) -> None:
    result = run(real_openclaw, {"prompt": "ping", "system": "Be terse", "max_tokens": 64})
    assert result.value["content"]
    assert result.usage is not None
    assert result.usage["total_tokens"] == result.usage["prompt_tokens"] + result.usage["completion_tokens"] > 0


@real
def test_real_wrong_token_is_unauthorized_and_tried_once(real_settings: dict[str, str]) -> None:
    provider = OpenClaw(real_settings | {"OPENCLAW_TOKEN": "certainly-wrong"})
    assert became(outcome_of(provider, job_with(HELLO))) == (UNHARMED, UNAUTHORIZED)
    health, seconds = timed(provider.check)
    assert (health.status, seconds < 0.01) == ("unavailable", True)


@real
def test_real_unknown_agent_is_configuration(real_settings: dict[str, str]) -> None:
    provider = OpenClaw(real_settings | {"OPENCLAW_AGENT": "certainly-nobody"})
    assert became(outcome_of(provider, job_with(HELLO))) == (UNHARMED, UNAVAILABLE)
    assert provider.check().status == "degraded"


@real
@pytest.mark.parametrize("more", [{"temperature": 3}, {"max_tokens": 0}, {"stop": ["a"] * 5}], ids=str)
def test_real_refusals_of_the_gateway_are_left_to_others(real_openclaw: OpenClaw, more: dict[str, Any]) -> None:
    assert became(outcome_of(real_openclaw, job_with(HELLO | more))) == (LEFT, UNSUPPORTED)


# What the model server is told to do, and what becomes of the job. Nothing here makes the gateway put its key aside (401, 402, 403).
ORDERS: list[tuple[dict[str, Any], str, str]] = [
    (say('{"a": 1}') | AS_JSON, "completed", '{"a": 1}'),
    (say("Sure!") | AS_JSON, BURNT, INVALID_OUTPUT),
    (say("No response from OpenClaw."), BURNT, INVALID_OUTPUT),
    ({"prompt": "LENGTH"}, "completed", "PONG"),
    ({"prompt": "LENGTH"} | AS_JSON, BURNT, TRUNCATED),
    ({"prompt": "NOUSAGE"}, "completed", "PONG"),
    (say("  text \n\n"), "completed", "text"),
    (say("first\nMEDIA:some/file.txt\nlast"), "completed", "first\nlast"),
    (say("<think>why</think>answer"), "completed", "answer"),
    (say('{"s": "[[reply_to_current]] hi"}') | AS_JSON, "completed", '{"s": " hi"}'),
    (say('<tool_call>{"name":"exec"}</tool_call> after'), BURNT, INVALID_OUTPUT),
    ({"prompt": "STATUS=400:guided_json invalid grammar"}, FINAL, INVALID_INPUT),
    ({"prompt": "STATUS=404:The model does not exist."}, UNHARMED, UNAVAILABLE),
    ({"prompt": "STATUS=422:unprocessable"}, FINAL, INVALID_INPUT),
    ({"prompt": "STATUS=429:slow down"}, UNHARMED, RATE_LIMITED),
    ({"prompt": "STATUS=500:exploded"}, BURNT, UNAVAILABLE),
    ({"prompt": "STATUS=503:overloaded"}, UNHARMED, UNAVAILABLE),
    ({"prompt": "STATUS=413:too big"}, BURNT, INTERNAL),
    ({"prompt": "STATUS=400:This model's maximum context length is 32768 tokens."}, BURNT, INTERNAL),
]


@real
@pytest.mark.parametrize(("input_", "expected", "said"), ORDERS, ids=[json.dumps(order[0])[:60] for order in ORDERS])
def test_real_gateway_does_as_captured(orders: OpenClaw, input_: dict[str, Any], expected: str, said: str) -> None:
    assert became(outcome_of(orders, job_with(input_))) == (expected, said)


@real
def test_real_usage_of_zeros_is_unknown(orders: OpenClaw) -> None:
    usage = run(orders, {"prompt": "NOUSAGE"}).usage or {}
    assert "prompt_tokens" not in usage
    assert usage["raw"]["prompt_tokens"] == 0


@real
def test_real_cancel_and_deadline_end_a_run(orders: OpenClaw) -> None:
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    outcome, seconds = timed(lambda: outcome_of(orders, job_with({"prompt": "SLOW=5"}, cancelled=cancelled)))
    assert (became(outcome), seconds < 2) == ((UNHARMED, CANCELLED), True)
    outcome, seconds = timed(lambda: outcome_of(orders, job_with({"prompt": "SLOW=5"}, deadline=time.monotonic() + 0.5)))
    assert (became(outcome), seconds < 2) == ((BURNT, TIMEOUT), True)


def test_the_captured_answers_name_no_secret_and_no_path() -> None:
    text = json.dumps([captured(case) for case in chat_cases()])
    assert "Bearer <the token>" in text
    assert not [word for word in ("some-token", "/home/", "/tmp/", "/root/") if word in text]
