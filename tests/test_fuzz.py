"""Anything at all, for everything that reads: a value or the error that is documented, never another one, and never a secret in it.

FUZZ_EXAMPLES is how many examples each test tries (`make fuzz`); the requests at the end are twelve times as many.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from postgres import fresh_schema
from service import Answer, Api, Corner, Service, running_service

import ai_service
from ai_internal.server.database_url import DatabaseUrlError, read_database_url
from ai_internal.server.requests import ValidationFailed, count_usage
from ai_internal.worker import worker
from providers import Job, NotCompleted, NotConfigured, Result, SettingsError, declared, parse_duration, provider_settings
from providers.audio import AudioSettings, audio_of
from providers.exchange import error_text
from providers.openclaw import OpenClaw, OpenClawSettings
from providers.settings import read_settings
from providers.vllm import VLLM, VLLMSettings
from providers.whisperx import WhisperX, WhisperXSettings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
SECRET = "planted-Passw0rd"
# What a reader may need on a busy machine; what it guards against would take minutes.
QUICK_SECONDS = 10.0


def fuzzed(times: float = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, whatever the machine's speed."""
    quiet = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
    return settings(max_examples=max(1, int(times * EXAMPLES)), deadline=None, database=None, suppress_health_check=quiet)


@contextlib.contextmanager
def refused_by(*errors: type[Exception]) -> Iterator[None]:
    """Whatever is raised is one of these, comes soon and shows no secret."""
    begun = time.monotonic()
    try:
        yield
    except errors as error:
        texts = (str(error), repr(error), *map(str, getattr(error, "problems", ())))
        assert not [text for text in texts if SECRET in text]
    assert time.monotonic() - begun < QUICK_SECONDS


# ---------------------------------------------------------------- settings

# As os.environ has them: without NUL, and with half surrogates for what is no UTF-8.
ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=40)
PIECES = ["http://", "https://", "postgresql://", ":", "@", "/", "?", "#", "%", "%00", "[", "]", ",", ";", "=", "&", "..", " ", "\\",
          "0x7f.1", "::1", "%eth0", "host", "u", "1", "-1", "1e9", "99999", "999999999999999999999", "5m", "1h30m", "30d", "forever",
          "true", "nan", "qwen", "v1", "é", "\udcff", "\n", "١", f"u:{SECRET}@", f":{SECRET}@", f"{SECRET}@",
          quote(f"{SECRET}/", safe="")]  # fmt: skip
NEAR_TEXT = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
PLAIN_TEXT = NEAR_TEXT.map(lambda text: text.replace(SECRET, ""))
KINDS = (ai_service.Settings, worker.Settings, VLLMSettings, WhisperXSettings, OpenClawSettings)


def environments(kind: type) -> st.SearchStrategy[dict[str, str]]:
    """Environments for a settings class, all that is secret in it planted."""
    secret = st.builds("{}{}{}".format, st.sampled_from(["", " ", "é", "\n"]), st.just(SECRET), ANY_TEXT)
    values = {one.name: secret if one.secret else ANY_TEXT | url_or_piece() for one in declared(kind)}
    return st.fixed_dictionaries({}, optional=values)


def url_or_piece() -> st.SearchStrategy[str]:
    """Text that almost fits a setting. The password stands where passwords stand in URLs, and nowhere else."""
    address = st.builds("{}://u:{}@{}".format, st.sampled_from(["http", "https", "postgresql", "postgres"]), st.just(SECRET), PLAIN_TEXT)
    return PLAIN_TEXT | address


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
@fuzzed()
@given(st.data())
def test_any_environment_gives_settings_or_says_what_is_wrong_without_secrets(kind: type, data: st.DataObject) -> None:
    environ = data.draw(environments(kind))
    with refused_by(SettingsError, NotConfigured):
        assert SECRET not in repr(getattr(kind, "read", functools.partial(provider_settings, kind))(environ))


def test_a_password_in_the_wrong_variable_is_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"LLM_TIMEOUT: .* is no duration") as refused:
        provider_settings(VLLMSettings, {"LLM_BASE_URL": "http://h", "LLM_TIMEOUT": f"http://u:{SECRET}@h"})
    assert SECRET not in str(refused.value)


def test_a_secret_that_is_no_utf_8_is_refused_like_any_other() -> None:
    with pytest.raises(SettingsError, match="LLM_API_KEY: must be printable ASCII"):
        provider_settings(VLLMSettings, {"LLM_BASE_URL": "http://h", "LLM_API_KEY": f"{SECRET}\udcff"})


@fuzzed(4)
@given(ANY_TEXT | PLAIN_TEXT | st.text("0123456789.hdms ", max_size=12) | st.integers(0).map(str))
def test_any_text_is_a_finite_duration_or_refused(text: str) -> None:
    with refused_by(ValueError):
        assert 0 <= parse_duration(text) < float("inf")


@fuzzed(4)
@given(
    NEAR_TEXT | ANY_TEXT, NEAR_TEXT, st.sampled_from([SECRET, f"{SECRET}%zz", f"{SECRET}:x", f"{SECRET}/x", f"{SECRET}?x", f"[{SECRET}"])
)
def test_any_database_url_is_read_or_refused_and_never_shows_its_password(host: str, rest: str, password: str) -> None:
    for url in (f"postgresql://u:{password}@{host}/{rest}", f"postgres://{host}/{rest}?password={password}", f"{host}{rest}"):
        with refused_by(DatabaseUrlError):
            address = read_database_url(url)
            assert address.hosts
            assert SECRET in host + rest or SECRET not in address.shown + repr(address) + str(address)


# ---------------------------------------------------------------- audio


def job_with(input_: Any, profile: str) -> Job:
    """A job of one attempt."""
    return Job(id=str(uuid.uuid4()), owner_service="o", owner_ref="r", task_type="t", model_profile=profile, input=input_, attempt=2)


SPELLINGS = """
    127.0.0.1 2130706433 0x7f000001 017700000001 127.1 0 [::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [64:ff9b::7f00:1]
    [64:ff9b:1::7f00:1] [2002:7f00:1::] [2001:0:7f00:1::] [fe80::1%25lo] [fe80::1%lo] [::127.0.0.1] [fd00:ec2::254] [ff02::1]
    169.254.169.254 0xa9fea9fe 10.0.0.1 0x7f.0.0.0x1 127.0.0.1. １２７.0.0.1 [fec0::1] [100::1] [::ffff:0:127.0.0.1] 192.168.0.1
    100.64.0.1 0.0.0.0 255.255.255.255 224.0.0.1
""".split()  # noqa: SIM905  in quotes it would be twice as long
ADDRESSES = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "file://", "//", ""]),
    st.sampled_from(["", f"u:{SECRET}@", "example.org@", "example.org#@", "example.org\\@"]),
    st.sampled_from(SPELLINGS),
    st.sampled_from(["", ":80", ":0", ":99999", ":-1", ":", ":80:80"]),
    st.sampled_from(["", "/", "/a?b#c", "\\@example.org/", "?", "#", "/\0", "/ä", "@example.org", "%00"]),
)
AUDIO_INPUTS = st.dictionaries(
    st.sampled_from(["audio_url", "audio_base64", "audio_path", "language", "task", "diarize", "min_speakers", "filename", "é"]),
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | NEAR_TEXT | st.binary(max_size=40).map(lambda text: text.hex()),
    max_size=3,
)


@fuzzed(2)
@given(AUDIO_INPUTS.filter(lambda given: not isinstance(given.get("audio_url"), str)) | ADDRESSES.map(lambda url: {"audio_url": url}))
def test_any_input_is_audio_or_refused_and_reaches_no_private_address(tmp_path: Path, input_: dict[str, Any]) -> None:
    settings_ = read_settings(AudioSettings, {"AUDIO_FOLDER": str(tmp_path), "AUDIO_URL_TIMEOUT": "1"})
    with refused_by(NotCompleted), audio_of(job_with(input_, "whisperx"), settings_) as audio:
        assert input_.get("audio_url") is None
        assert b"".join(audio.blocks()) or True


# ---------------------------------------------------------------- model answers


class Parrot:
    """A model server that answers every request with what it is told, and closes."""

    def __init__(self) -> None:
        self.status, self.media_type, self.body = 200, "application/json", b""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Parrot:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(65_536) or b"\r\n\r\n"
        head, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += connection.recv(65_536)
        described = head.startswith(b"GET /openapi.json")
        status, answer = (404, b"") if described and self.status == 200 and b"paths" not in self.body else (self.status, self.body)
        connection.sendall(b"HTTP/1.1 %d OK\r\nContent-Type: %b\r\nRetry-After: %b\r\nConnection: close\r\n\r\n%b" % (
            status, self.media_type.encode(), self.later, answer))  # fmt: skip

    later = b"1"


@pytest.fixture(scope="module")
def parrot() -> Iterator[Parrot]:
    """A model server without a mind of its own."""
    with Parrot() as server:
        yield server


PROVIDERS: dict[str, Callable[[str], Any]] = {
    "vllm": lambda origin: VLLM({"LLM_BASE_URL": f"{origin}/v1", "LLM_API_KEY": SECRET, "LLM_TIMEOUT": "5"}),
    "openclaw": lambda origin: OpenClaw({"OPENCLAW_URL": origin, "OPENCLAW_TOKEN": SECRET, "OPENCLAW_TIMEOUT": "5"}),
    "whisperx": lambda origin: WhisperX({"WHISPERX_URL": origin, "WHISPERX_API_KEY": SECRET, "WHISPERX_DIALECT": "openai"}),
}
NAMES = """
    choices delta message content finish_reason model usage error code type tool_calls index function arguments name logprobs
    reasoning refusal prompt_tokens total_tokens input_tokens completion_tokens segments words word word_segments text start
    end score speaker language duration detail data id seconds paths /v1/audio/transcriptions post parameters requestBody
    properties required allOf $ref ready failing stage status
""".split()  # noqa: SIM905  in quotes it would be twice as long
# JSON text, not values: what no Python value is written as belongs to it.
LEAVES = st.sampled_from(["null", "true", "0", "1", "-1", "7.5", "1e400", "-1e999", "NaN", "Infinity", "1" * 18, "1" * 25, "9" * 5000, '""',
                          '"stop"', '"length"', '"error"', '"duration"', '"hello"', r'"\ud800"',
                          r'"\u0000"', '"\\n{\\"a\\": 1}"', f'"{SECRET}"',
                          f'"http://u:{SECRET}@h/"', '"7"', '"0x"', "[" * 300 + "]" * 300, "[" * 995 + "]" * 995,
                          "[" * 2000 + "]" * 2000, "[" * 2000, '"#/a/b"', '"completed"'])  # fmt: skip


def composed(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Objects of known names, and lists."""
    members = st.lists(st.tuples(st.sampled_from(NAMES), children), max_size=5)
    objects = members.map(lambda pairs: "{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}")
    return objects | st.lists(children, max_size=3).map(lambda items: f"[{', '.join(items)}]")


JSON_TEXT = st.recursive(LEAVES, composed, max_leaves=12)
CHAT = st.builds(
    '{{"choices": [{{"delta": {{"content": {}, "tool_calls": {}}}, "finish_reason": {}, "logprobs": {}}}], '
    '"model": {}, "usage": {}}}'.format,
    *[LEAVES | JSON_TEXT] * 6,
)
SPOKEN = st.builds(
    '{{"text": {}, "language": {}, "duration": {}, "segments": [{{"text": {}, "start": {}, "speaker": {}, "words": {}}}], "model": {}, '
    '"usage": {}}}'.format,
    *[LEAVES | JSON_TEXT] * 9,
)
CALM = st.sampled_from(["null", '"hello"', "0"])
NEAR_CHAT = st.builds(
    '{{"choices": [{{"delta": {{"content": "hello"}}, "finish_reason": "stop", "logprobs": {}}}], "model": {}, '
    '"usage": {{"prompt_tokens": {}, "completion_tokens": {}, "total_tokens": {}, "other": {}}}}}'.format,
    *[CALM | LEAVES] * 6,
)
NEAR_SPOKEN = st.builds(
    '{{"text": "hello", "language": "de", "duration": {}, "segments": [{{"text": "hello", "start": {}, "end": {}, "speaker": {}, '
    '"words": [{{"word": "hello", "start": {}}}]}}], "model": {}, "usage": {{"type": "duration", "seconds": {}, "total_tokens": {}, '
    '"other": {}}}}}'.format,
    *[CALM | LEAVES] * 9,
)
ANSWERS = st.one_of(
    st.binary(max_size=60), *[text.map(lambda text: text.encode()) for text in (JSON_TEXT, CHAT, SPOKEN, NEAR_CHAT, NEAR_SPOKEN)]
)
STREAMS = st.lists(ANSWERS, max_size=3).map(lambda events: b"".join(b"data: %b\n\n" % event for event in events) + b"data: [DONE]\n\n")
MEDIA_TYPES = st.sampled_from(["application/json", "text/event-stream", "text/plain; charset=utf-8", "text/html", ""])
LATER = st.sampled_from([b"1", b"-1", b"nan", b"1e999", b"1_0", b"Mon, 01 Jan 0001 00:00:00 +1400", b"Fri, 31 Dec 9999 23:59:59 -2359",
                         b"Mon, 99 Jan 2026", b"\xff", b"9" * 500, b""])  # fmt: skip
SPEECH = {"audio_base64": "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQQAAAAAAAAA"}
INPUTS = {"vllm": "Hello", "openclaw": "Hello", "whisperx": SPEECH}
AS_JSON = {"prompt": "Hello", "response_format": {"type": "json_object"}}


def is_told(result: Result) -> bool:
    """Whether the service would take this result; a worker could do nothing about it if not."""
    text = json.dumps(result.value, allow_nan=False, ensure_ascii=False).encode()
    usage = json.dumps(result.usage, allow_nan=False, ensure_ascii=False) if result.usage else None
    with contextlib.suppress(ValidationFailed):
        count_usage(usage)
        return bool(text) and len((usage or "").encode()) <= 4096
    return False


@pytest.mark.parametrize("name", PROVIDERS)
@fuzzed(2)
@given(
    st.sampled_from([200, 200, 200, 200, 204, 302, 400, 401, 404, 422, 429, 500, 503, 599]),
    MEDIA_TYPES,
    ANSWERS | STREAMS,
    LATER,
    st.booleans(),
)
@example(200, "text/event-stream", b'data: {"choices": ' + b"[" * 2000, b"1", False)
@example(500, "application/json", b'{"error": ' + b"[" * 2000 + b"]" * 2000 + b"}", b"1", False)
@example(503, "application/json", b"", b"Fri, 31 Dec 9999 23:59:59 -2359", False)
@example(200, "application/json", b'{"text": "a", "duration": -5, "usage": {"total_tokens": -1}}', b"1", False)
@example(
    200, "application/json", b'{"text": "a", "usage": {"type": "duration", "seconds": -1, "total_tokens": 9999999999999999}}', b"1", False
)
def test_any_answer_of_a_model_server_is_a_result_that_can_be_told_or_no_result(
    parrot: Parrot, name: str, status: int, media_type: str, body: bytes, later: bytes, as_json: bool
) -> None:
    parrot.status, parrot.media_type, parrot.body, parrot.later = status, media_type, body, later
    provider = PROVIDERS[name](parrot.origin)
    input_ = AS_JSON if as_json and name != "whisperx" else INPUTS[name]
    with refused_by(NotCompleted):
        try:
            assert is_told(provider.run(job_with(input_, provider.model_profiles[0])))
        except NotCompleted as outcome:
            # A failed attempt is told with its usage.
            assert is_told(Result(None, outcome.usage))  # noqa: PT017
            raise


@pytest.mark.parametrize("name", PROVIDERS)
@fuzzed()
@given(st.sampled_from([200, 200, 302, 401, 500]), ANSWERS)
def test_any_answer_to_a_check_is_a_health_without_secrets(parrot: Parrot, name: str, status: int, body: bytes) -> None:
    parrot.status, parrot.media_type, parrot.body, parrot.later = status, "application/json", body, b"1"
    with refused_by():
        health = PROVIDERS[name](parrot.origin).check()
    assert health.status in ("ok", "degraded", "unavailable", "not_configured")
    assert SECRET not in repr(health.detail)


@fuzzed()
@given(ANSWERS, MEDIA_TYPES)
def test_whatever_a_server_says_is_shown_on_one_short_line_without_secrets(body: bytes, media_type: str) -> None:
    shown = error_text(body, media_type, (SECRET,))
    assert SECRET not in shown
    assert len(shown) <= 500
    assert not shown or (shown.isprintable() and shown.encode())


# ---------------------------------------------------------------- requests

JOBS = "/api/v1/jobs"
ANYWHERE = {
    400: {"malformed_json", "malformed_request"},
    413: {"body_too_large"},
    415: {"unsupported_media_type"},
    422: {"validation_failed", "too_deep"},
    # Of the documented kinds, those that a service with its database at hand can have.
    503: {"database_busy", "service_full"},
}
HELD = {404: {"job_not_found"}, 409: {"claim_lost", "job_cancelled", "invalid_state", "claim_id_reused"}}
MOVED = {404: {"job_not_found"}, 409: {"invalid_state"}}
NEW = {409: {"idempotency_key_reused"}, 422: {"too_many_combinations"}}
NEED: dict[str, dict[str, Any]] = {
    "complete": {"result": {"ok": True}, "usage": {"total_tokens": 3}},
    "fail": {"category": "timeout", "message": "m", "retryable": True, "retry_in_seconds": 0, "usage": {}},
    "heartbeat": {"lease_seconds": 60, "progress": {"part": 1}},
    "release": {"delay_seconds": 0},
}


@attrs.frozen
class Route:
    """A route as the contract has it: its method, its path, a body that fits, the statuses it may answer, its query parameters."""

    method: str
    path: str
    body: dict[str, Any] | None
    fine: frozenset[int]
    refused: Mapping[int, set[str]] = attrs.field(factory=dict)
    query: tuple[str, ...] = ()


FILTERS = ("status", "owner_service", "owner_ref", "task_type", "model_profile", "error_category", "created_after", "created_before")
OK, NAME = frozenset({200}), "fuzz"
JOB = {"owner_service": NAME, "task_type": NAME, "model_profile": NAME, "owner_ref": "r", "input": {"a": 1}}
WHOLE_JOB = {**JOB, "priority": 1, "run_at": "2026-01-01T00:00:00Z", "expires_at": None, "max_attempts": 2, "idempotency_key": None,
             "traceparent": None}  # fmt: skip
CLAIM = {"worker_id": "w", "limit": 2, "model_profiles": [NAME], "task_types": None, "owner_services": [NAME], "lease_seconds": 60,
         "wait_seconds": 0, "claim_id": None, "worker": {"version": "1", "providers": []}}  # fmt: skip
ROUTES = [
    Route("POST", JOBS, WHOLE_JOB, frozenset({200, 201}), NEW),
    Route(
        "POST",
        f"{JOBS}/batch",
        {"defaults": {**JOB, "owner_ref": None}, "jobs": [{**WHOLE_JOB, "idempotency_key": "k"}, JOB]},
        frozenset({200, 201}),
        NEW,
    ),
    Route("POST", f"{JOBS}/claim", CLAIM, OK, {409: {"claim_id_reused"}}),
    Route("GET", f"{JOBS}/ID", None, OK, {404: {"job_not_found"}}, ("include", "wait_seconds")),
    Route("POST", f"{JOBS}/get", {"ids": ["ID"]}, OK),
    *(Route("POST", f"{JOBS}/ID/{verb}", {"claim_id": "CLAIM", **fields}, OK, HELD) for verb, fields in NEED.items()),
    Route("POST", f"{JOBS}/ID/retry", {"from": ["failed"]}, OK, MOVED),
    Route("POST", f"{JOBS}/ID/cancel", {"reason": "r"}, OK, MOVED),
    Route("DELETE", f"{JOBS}/ID", None, frozenset({204}), MOVED),
    *(Route("POST", f"{JOBS}/{verb}", {"jobs": [{"id": "ID", "claim_id": "CLAIM", **fields}]}, OK) for verb, fields in NEED.items()),
    Route("POST", f"{JOBS}/retry", {"filter": {"owner_service": NAME}, "limit": 5, "dry_run": True}, OK),
    Route("GET", JOBS, None, OK, {}, (*FILTERS, "limit", "cursor")),
    Route("GET", "/api/v1/pause", None, OK),
    Route("POST", "/api/v1/pause", {"task_types": ["paused"]}, OK),
    Route("POST", "/api/v1/resume", {"task_types": ["paused"]}, OK),
    Route("GET", "/api/v1/stats", None, OK, {}, ("window_seconds",)),
    Route("GET", "/api/v1/workers", None, OK),
    Route("GET", "/api/v1/providers/status", None, OK),
    Route("GET", "/healthz", None, OK),
    Route("GET", "/readyz", None, OK),
]
# As JSON text. None of them is a wait that would take long.
ODD = [
    *(
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-1",
        "0.01",
        "1e-999",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "2147483648",
        "9" * 30,
        "1" * 5000,
        "01",
    ),
    *('""', '" "', '"x"', '"fuzz"', '"ID"', '"CLAIM"', r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', '"\x00"', '"\x1e"', '"\x7f"', '"💥"'),
    *(
        '"' + "x" * 501 + '"',
        '"' + "é" * 5000 + '"',
        '"2026-02-30T00:00:00Z"',
        '"9999-12-31T23:59:59-23:59"',
        '"0001-01-01T00:00:00+14:00"',
    ),
    *('"2026-01-01T00:00:00Z"', '"\' or 1=1 --"', '"{}"', '"%s"', '"../../etc/passwd"', '"<script>"', '"pending"', '"running"', '"failed"'),
    *("[]", "[[]]", "[null]", '["fuzz"]', '["x", "x"]', "{}", '{"a": 1, "a": 2}', '{"": {}}', "[" * 501 + "]" * 501, "[" * 9000, "{" * 10),
    *('{"jobs": []}', '{"id": "ID"}', '{"owner_service": "fuzz"}', '{"version": 7}', '{"total_tokens": -1}', "\xff", "'x'", "", ",", "}"),
]
MEDIA = [*["application/json"] * 12, "text/plain", "", ";", "application/json; charset=utf-16", "application/vnd.api+json", "é"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]
IDS = ["ID", "ID", "ID", "ID", str(uuid.UUID(int=0)), "0", "not-an-id", "%00", "%ff", "..", "ID%0a", "ID'", "%F0%9F%92%A5", "x" * 3000]


def written(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The members of an object, each as JSON text."""
    return [(name, json.dumps(value)) for name, value in fields.items()]


@st.composite
def bodies(draw: st.DrawFn, fields: Mapping[str, Any]) -> str:
    """A body that fits, or with a few members odd, missing, unknown or twice; or none at all of that."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(ODD) | st.text(max_size=30))
    members = written(fields)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        change = draw(st.sampled_from(["odd", "odd", "odd", "deeper", "missing", "unknown", "twice"]))
        at = draw(st.integers(0, len(members) - 1)) if members else 0
        odd = draw(st.sampled_from(ODD))
        if not members or change == "unknown":
            members.append((draw(st.sampled_from(["colour", "id", "jobs", "from", "", "a/b~c", r"\ud800"])), odd))
        elif change == "missing":
            del members[at]
        elif change == "deeper":
            members[at] = (members[at][0], draw(deeper(members[at][1])))
        else:
            members[at : at + (change == "odd")] = [(members[at][0], odd)]
    return "{" + ", ".join(f'"{name}": {value}' for name, value in members) + "}"


def deeper(text: str) -> st.SearchStrategy[str]:
    """A member of a member changed, where it has any."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return st.sampled_from(ODD)
    if isinstance(value, dict) and value:
        return bodies(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return st.lists(bodies(value[0]), max_size=3).map(lambda items: f"[{', '.join(items)}]")
    return st.sampled_from(ODD)


@st.composite
def queries(draw: st.DrawFn, known: tuple[str, ...]) -> str:
    """A query: mostly none, known parameters with odd values, or unknown ones."""
    names = st.sampled_from([*known, *known, "colour", "", "%00", "%ff"])
    values = st.sampled_from([*ODD[:60], "1", "input", "3600", "0.01"]).map(lambda text: quote(text.strip('"'), safe="")) | st.just("%ff")
    pairs = draw(st.lists(st.tuples(names, values), max_size=3 if known else draw(st.sampled_from([0, 0, 0, 1]))))
    return "?" + "&".join(f"{name}={value}" for name, value in pairs if (name, value) != ("wait_seconds", "1")) if pairs else ""


@attrs.frozen
class Request:
    """What is sent, to a route."""

    route: Route
    method: str
    path: str
    media_type: str
    body: str


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request that the contract describes, nearly does, or does not."""
    route = draw(st.sampled_from(ROUTES))
    method = draw(st.sampled_from([*[route.method] * 15, *METHODS]))
    body = draw(bodies(route.body)) if route.body is not None else draw(st.sampled_from(["", "", "", "{}", "x"]))
    path = route.path.replace("ID", draw(st.sampled_from(IDS)))
    return Request(route, method, path + draw(queries(route.query)), draw(st.sampled_from(MEDIA)), body)


@attrs.define
class Target:
    """A service of this file's own, a job to aim at, and what became of the requests."""

    api: Api
    job_id: str = ""
    claim_id: str = ""
    answers: Counter[int] = attrs.field(factory=Counter)
    failures: int = 0

    def aim(self) -> None:
        """Takes a new job now and then: the last one may have ended."""
        if not self.job_id or sum(self.answers.values()) % 10 == 0:
            corner = Corner(self.api)
            job = corner.take()
            self.job_id, self.claim_id = job["id"], job["claim_id"]

    def send(self, request: Request) -> Answer:
        """The answer to a request, this job's and this claim's ids put into it."""
        path, body = (text.replace("ID", self.job_id).replace("CLAIM", self.claim_id) for text in (request.path, request.body))
        return self.api.request(request.method, path, body.encode("utf-8", "surrogatepass"), {"Content-Type": request.media_type})


@pytest.fixture(scope="module")
def target(postgres_url: str) -> Iterator[Target]:
    """Something to aim at; says at the end how it went."""
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema, MAX_BODY_BYTES="20000") as service:
        target = Target(service.api)
        yield target
        print(f"\n{sum(target.answers.values())} requests fuzzed, {target.failures} failed; answers {dict(sorted(target.answers.items()))}")
        assert no_crash(service)


def no_crash(service: Service) -> bool:
    """Whether the log has neither a stack trace nor a request that failed, nor any line that a caller has broken."""
    broken = [line for line in service.lines if not re.match(r"\d{4}-\d\d-\d\d |$", line) or "request_failed" in line]
    assert not broken, broken[:20]
    return True


KNOWN_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}


def is_documented(request: Request, answer: Answer) -> bool:
    """Whether the contract has this answer to this request."""
    if request.method not in KNOWN_METHODS:
        return answer.code in ("malformed_request", "not_found", "validation_failed")
    # A path may be that of several routes, by method or since an id can be anything.
    path = request.path.partition("?")[0]
    routes = [route for route in ROUTES if route.method == request.method and fits(route, path)] or [request.route]
    if request.method in ("HEAD", "OPTIONS"):
        return answer.status in {200, 204, 400, 404, 405, 422}
    if answer.status < 300:
        return any(route.method == request.method and answer.status in route.fine for route in routes)
    refused = [ANYWHERE, {404: {"not_found"}, 405: {"method_not_allowed"}}, *(route.refused for route in routes)]
    return answer.code in {code for each in refused for code in each.get(answer.status, ())}


def fits(route: Route, path: str) -> bool:
    """Whether a route has this path."""
    return re.fullmatch(route.path.replace("ID", "[^/]*"), path) is not None


@fuzzed(12)
@given(request=requests())
def test_any_request_gets_an_answer_of_the_contract(target: Target, request: Request) -> None:
    target.aim()
    answer = target.send(request)
    target.answers[answer.status] += 1
    target.failures += 1
    if request.method != "HEAD":
        assert answer.status < 400 or answer.code
    assert answer.status != 405 or answer.headers["Allow"]
    assert answer.status != 503 or answer.headers["Retry-After"]
    assert is_documented(request, answer), (answer, request.method, request.path)
    target.failures -= 1
