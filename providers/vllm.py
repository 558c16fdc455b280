"""vLLM, through its OpenAI-compatible chat API. Written against vLLM 0.32.0.

Remote API: `POST /v1/chat/completions`, always as a stream with usage; `GET /v1/models` for the check.

Settings
    LLM_BASE_URL      http(s)://host[:port][/path], with or without the closing `/v1` (any `/v<digit>…` at the end is kept as it is).
                      `user:password@` is sent as basic authentication and never shown. Certificates are checked against the system's
                      store, or the file that SSL_CERT_FILE names.
    LLM_API_KEY       the key, sent as a bearer token
    LLM_MODEL         the model to ask for, and the one model profile served: qwen2.5-14b
    LLM_TIMEOUT       limit of one attempt from its start to its last token: 5m
    LLM_IDLE_TIMEOUT  limit between two pieces of an answer that has begun: 60s. Before the first piece a request may stand in vLLM's queue
                      in silence, so only LLM_TIMEOUT and the job's deadline count there.

A job's input
    "text"                                       one user message
    {"prompt": "text", "system"?: "text", ...}   a user message after a system message
    {"messages": [...], ...}                     the messages as they are: a whole chat-completions body fits
    Every other member goes along as it is (temperature, max_tokens, response_format, seed, stop, tools, ...), but: `model` is ours, and
    refused when it names another; `stream` and `stream_options` are ours and dropped; `n` other than 1 is refused, one job is one answer;
    `guided_json` and its like are refused, because vLLM ignores them and answers as if nothing had been asked.

The result
    content         the model's text as received; null when it only called tools
    finish_reason   `stop`; `length` when text was cut at max_tokens; `tool_calls`; or what else the server says
    model           the model the server says it used
    json            the parsed text: present if and only if JSON was asked for (`response_format`, or vLLM's `structured_outputs`).
                    For the exact spelling of its numbers see `content`.
    tool_calls, reasoning, refusal, logprobs     only when the server sent them

Usage: `prompt_tokens`, `completion_tokens`, `total_tokens` (also where the server says `input_tokens`, `output_tokens`), `model`,
`time_to_first_token_seconds`, `running_seconds`, and what else the server counted. Failed attempts have it as far as it is known.

JSON asked for and not delivered is a failure, whatever the status says: cut at a length it is `truncated`, else not valid JSON (no NaN, no
raw control characters, no half surrogates) `invalid_output`. Sampling is random, so a later attempt may succeed, unless the request pins it
down (`seed`, or temperature 0): then the failure is final.
"""

import http.client
import json
import math
import re
import secrets
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import attrs
import msgspec
import urllib3
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

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
    Health,
    Job,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Result,
    SettingsError,
    parse_duration,
)
from providers.exchange import MAX_ERROR_BYTES, Exchange, retry_after, said

CHECK_SECONDS = 2.5
"""Limit of a check, below the 3 s of the contract."""
MAX_JSON_DEPTH = 400
"""The service takes 500 levels, and the parsed text stands some levels down in what the worker sends."""


class VLLM:
    """Runs chat completions on one vLLM server. Safe to use from several threads at once."""

    name = "vllm"

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises `NotConfigured` without LLM_BASE_URL and `SettingsError` with all problems of the settings."""
        self._settings = _settings(environ)
        self.model_profiles = (self._settings.model,)

    def check(self) -> Health:
        """Ask for the list of models, with the key. `degraded` when LLM_MODEL is not among them."""
        started = time.monotonic()
        try:
            models = _served_models(self._settings)
        except NotCompleted as trouble:
            return Health("unavailable", trouble.message, endpoint=self._settings.endpoint)
        known = self._settings.model in models
        return Health(
            "ok" if known else "degraded",
            None if known else f"{self._settings.model} is not among the models served: {', '.join(models) or 'none'}",
            models=models,
            endpoint=self._settings.endpoint,
            latency_ms=(time.monotonic() - started) * 1000,
        )

    def run(self, job: Job) -> Result:
        """Run one chat completion, abandoned at the job's deadline, at LLM_TIMEOUT or when the job is cancelled."""
        body = _request_body(job, self._settings.model)
        answer = _Answer()
        try:
            _receive(self._settings, job, body, answer)
            return Result(_value(answer, body), answer.usage())
        except NotCompleted as outcome:
            outcome.usage = answer.usage()
            raise


# ---------------------------------------------------------------- settings


@attrs.frozen(kw_only=True)
class _Settings:
    url: Url = attrs.field(repr=False)
    endpoint: str
    model: str
    timeout_seconds: float
    idle_seconds: float
    authorization: str | None = attrs.field(repr=False)
    secrets: tuple[str, ...] = attrs.field(repr=False)


def _settings(environ: Mapping[str, str]) -> _Settings:
    set_ = {name: value.strip() for name, value in environ.items() if name.startswith("LLM_") and value.strip()}
    if "LLM_BASE_URL" not in set_:
        raise NotConfigured("LLM_BASE_URL is not set")
    problems: list[str] = []
    url = _base_url(set_["LLM_BASE_URL"], problems)
    timeout_seconds = _positive_duration(set_, "LLM_TIMEOUT", "5m", problems)
    idle_seconds = _positive_duration(set_, "LLM_IDLE_TIMEOUT", "60s", problems)
    key = set_.get("LLM_API_KEY")
    model = set_.get("LLM_MODEL", "qwen2.5-14b")
    problems += _problems_of_names(key, model, url)
    if problems:
        raise SettingsError(problems)
    return _Settings(
        url=url,
        endpoint=url._replace(auth=None).url,
        model=model,
        timeout_seconds=timeout_seconds,
        idle_seconds=idle_seconds,
        authorization=_authorization(key, url.auth),
        secrets=tuple(part for part in (key, *(unquote(url.auth or "").split(":", 1)[1:])) if part),
    )


def _base_url(text: str, problems: list[str]) -> Url:
    """The URL up to and with its version. Messages leave the text out: it may hold a password."""
    try:
        url = parse_url(text)
    except LocationParseError:
        url = Url()
    if url.scheme not in ("http", "https") or not url.host:
        problems.append("LLM_BASE_URL must be an address that begins with http:// or https:// and names a host")
    if url.query or url.fragment:
        problems.append("LLM_BASE_URL must have neither ? nor #")
    path = (url.path or "").rstrip("/")
    return url._replace(path=path if re.search(r"/v[0-9]\w*$", path) else f"{path}/v1")


def _positive_duration(set_: Mapping[str, str], name: str, default: str, problems: list[str]) -> float:
    try:
        seconds = parse_duration(set_.get(name, default))
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return 1.0
    if not 0 < seconds <= 86_400:
        problems.append(f"{name} must be more than 0 and at most a day")
    return seconds


def _problems_of_names(key: str | None, model: str, url: Url) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9._:/@+-]{1,100}", model):
        yield "LLM_MODEL must be 1 to 100 letters, digits or . _ : / @ + -, because it is a model profile too"
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        yield "LLM_API_KEY must be printable ASCII without spaces"
    if key and url.auth:
        yield "LLM_BASE_URL has user info and LLM_API_KEY is set: the server can be sent only one of them"


def _authorization(key: str | None, user_info: str | None) -> str | None:
    if key:
        return f"Bearer {key}"
    return f"Basic {b64encode(unquote(user_info).encode()).decode()}" if user_info else None


# ---------------------------------------------------------------- check


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _served_models(settings: _Settings) -> tuple[str, ...]:
    with Exchange(settings.url, limit_seconds=CHECK_SECONDS) as exchange:
        response = exchange.send("GET", "/models", _headers(settings))
        _refuse_bad_status(response, settings)
        text = b"".join(exchange.blocks(response))
    try:
        return tuple(model.id for model in msgspec.json.decode(text, type=_Models).data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise NotNow(UNAVAILABLE, "GET /models was answered with something else than a list of models") from None


# ---------------------------------------------------------------- request


def _request_body(job: Job, model: str) -> dict[str, Any]:
    """The body to send. Raises `Never` when the input is none of the forms in this module's description."""
    given = {"prompt": job.input} if isinstance(job.input, str) else job.input
    if not isinstance(given, dict):
        raise Never(INVALID_INPUT, "input must be a text, or an object with messages or prompt")
    if problems := "; ".join(_refusals(given, model)):
        raise Never(INVALID_INPUT, problems)
    ours = {"model": model, "messages": _messages(given), "stream": True, "stream_options": {"include_usage": True}}
    return {name: value for name, value in given.items() if name not in ("prompt", "system")} | ours


def _refusals(given: Mapping[str, Any], model: str) -> Iterator[str]:
    """Why vLLM cannot do what this input asks for, or would quietly do something else."""
    if ("messages" in given) == ("prompt" in given):
        yield "input must have either messages or prompt"
    if "system" in given and "messages" in given:
        yield "system goes with prompt; among messages, make it the first one"
    if given.get("model") not in (None, model):
        yield f"input asks for the model {str(given['model'])[:100]!r}, but its model_profile is served by {model!r}"
    if given.get("n") not in (None, 1):
        yield "n must be 1: one job is one answer, create more jobs for more"
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if given.get(name) is not None:
            yield f"vLLM ignores {name}: use response_format or structured_outputs"


def _messages(given: Mapping[str, Any]) -> list[Any]:
    if "messages" in given:
        messages = given["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise Never(INVALID_INPUT, "messages must be a list of at least one object")
        return messages
    texts = {role: given[name] for role, name in (("system", "system"), ("user", "prompt")) if given.get(name) is not None}
    if not given["prompt"] or not all(isinstance(text, str) for text in texts.values()):
        raise Never(INVALID_INPUT, "prompt must be a text that is not empty, and system a text")
    return [{"role": role, "content": text} for role, text in texts.items()]


def _asks_for_json(body: Mapping[str, Any]) -> bool:
    response_format, structured = body.get("response_format"), body.get("structured_outputs")
    if isinstance(response_format, dict) and response_format.get("type") in ("json_object", "json_schema"):
        return True
    return isinstance(structured, dict) and any(structured.get(name) not in (None, False) for name in ("json", "json_object"))


def _gives_the_same_again(body: Mapping[str, Any]) -> bool:
    return body.get("seed") is not None or body.get("temperature") == 0


def _headers(settings: _Settings, job: Job | None = None) -> dict[str, str]:
    headers = {"Accept": "text/event-stream, application/json", "Accept-Encoding": "identity", "User-Agent": "ai-service"}
    if settings.authorization:
        headers["Authorization"] = settings.authorization
    if job:
        # vLLM names the request after this, and two of one name at the same time would collide: an attempt given back has its number again.
        headers |= {"Content-Type": "application/json", "X-Request-Id": f"{job.id}-{job.attempt}-{secrets.token_hex(4)}"}
    if job and job.traceparent and re.fullmatch(r"[0-9a-f-]{1,200}", job.traceparent):
        headers["traceparent"] = job.traceparent
    return headers


# ---------------------------------------------------------------- answer


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Logprobs(msgspec.Struct):
    content: list[Any] | None = None


class _Choice(msgspec.Struct):
    """One choice of a chunk; `message` instead of `delta` when a server answers whole instead of in a stream."""

    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    model: str | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


@attrs.define
class _Answer:
    """What has arrived so far."""

    content: list[str] = attrs.field(factory=list)
    reasoning: list[str] = attrs.field(factory=list)
    refusal: list[str] = attrs.field(factory=list)
    tool_calls: dict[int, dict[str, Any]] = attrs.field(factory=dict)
    logprobs: list[Any] = attrs.field(factory=list)
    finish_reason: str | None = None
    model: str | None = None
    counted: Mapping[str, Any] = attrs.field(factory=dict)
    started: float = attrs.field(factory=time.monotonic)
    begun: float | None = None
    """When the first piece came."""
    characters: int = 0
    reported: float = -math.inf

    def add(self, chunk: _Chunk) -> None:
        self.model = chunk.model or self.model
        self.counted = chunk.usage or self.counted
        for choice in chunk.choices or ():
            self._add_delta(choice.delta or choice.message or _Delta())
            self.logprobs += (choice.logprobs and choice.logprobs.content) or []
            self.finish_reason = choice.finish_reason or self.finish_reason

    def _add_delta(self, delta: _Delta) -> None:
        for parts, piece in (
            (self.content, delta.content),
            (self.reasoning, delta.reasoning or delta.reasoning_content),
            (self.refusal, delta.refusal),
        ):
            if piece:
                parts.append(piece)
                self.characters += len(piece)
        for position, call in enumerate(delta.tool_calls or ()):
            self._add_tool_call(position if call.index is None else call.index, call)
        if self.begun is None and (self.characters or self.tool_calls):
            self.begun = time.monotonic()

    def _add_tool_call(self, index: int, call: _ToolCall) -> None:
        whole = self.tool_calls.setdefault(index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        whole["id"] = call.id or whole["id"]
        if call.function:
            whole["function"]["name"] += call.function.name or ""
            whole["function"]["arguments"] += call.function.arguments or ""

    def report(self, job: Job) -> None:
        """Show how far the answer is, at most once a second."""
        if time.monotonic() - self.reported >= 1:
            self.reported = time.monotonic()
            job.report_progress({"received_characters": self.characters})

    def usage(self) -> dict[str, Any] | None:
        """Usage as far as it is known; None when nothing had arrived."""
        if self.model is None and self.begun is None:
            return None
        times = {"running_seconds": round(time.monotonic() - self.started, 3)}
        if self.begun is not None:
            times["time_to_first_token_seconds"] = round(self.begun - self.started, 3)
        return _normalised(self.counted) | ({"model": self.model} if self.model else {}) | times


_COUNTS = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}


def _normalised(counted: Mapping[str, Any]) -> dict[str, Any]:
    """The server's usage without nulls, its counts under our names as well. Only the counts if it is too big to be stored (4 KB)."""
    named = {ours: counted.get(ours, counted.get(theirs)) for ours, theirs in _COUNTS.items()}
    counts = {name: value for name, value in named.items() if type(value) is int}
    rest = {name: value for name, value in counted.items() if value is not None}
    return (rest if len(json.dumps(rest)) < 3_000 else {}) | counts


def _receive(settings: _Settings, job: Job, body: Mapping[str, Any], answer: _Answer) -> None:
    """Fill the answer from the stream until its end. Raises `NotNow` or `Never`; the answer then holds what had come."""
    left = job.seconds_left()
    limit_seconds = settings.timeout_seconds if left is None else min(settings.timeout_seconds, left)
    if job.cancelled.is_set():
        raise NotNow(CANCELLED, "the job was cancelled before it ran", burns_attempt=False)
    if limit_seconds <= 0:
        raise NotNow(TIMEOUT, "the job's deadline had passed before it ran", burns_attempt=False)
    with Exchange(settings.url, limit_seconds=limit_seconds, idle_seconds=settings.idle_seconds, cancelled=job.cancelled) as exchange:
        response = exchange.send("POST", "/chat/completions", _headers(settings, job), json.dumps(body, allow_nan=False).encode())
        _refuse_bad_status(response, settings)
        for event in _events(response, exchange.blocks(response)):
            answer.add(_chunk(event, settings))
            answer.report(job)
        if answer.finish_reason is None:
            raise NotNow(UNAVAILABLE, "the answer broke off before its end")


def _events(response: urllib3.HTTPResponse, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, up to `[DONE]`; of a server that does not stream, the whole body as one.

    vLLM puts an event on one line. Comments and other fields are passed over.
    """
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        yield b"".join(blocks)
        return
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if data and line.startswith(b"data:"):
                yield data


def _chunk(event: bytes, settings: _Settings) -> _Chunk:
    try:
        chunk = msgspec.json.decode(event, type=_Chunk)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise NotNow(UNAVAILABLE, "the answer broke off, or is no chat completion") from None
    if chunk.error is not None:
        # vLLM reports the death of its engine in a stream of status 200, and ends it with [DONE] as if nothing were wrong.
        code = chunk.error.get("code") if isinstance(chunk.error, dict) else None
        raise _refused_midway(code if isinstance(code, int) else 500, said(event, "application/json", settings.secrets))
    return chunk


# ---------------------------------------------------------------- result


def _value(answer: _Answer, body: Mapping[str, Any]) -> dict[str, Any]:
    """The result. Raises `NotNow` or `Never` when the answer is not what was asked for."""
    if answer.finish_reason in ("abort", "error"):
        raise NotNow(UNAVAILABLE, f"the server gave the request up: finish_reason {answer.finish_reason}")
    value: dict[str, Any] = {
        "content": "".join(answer.content) if answer.content or not answer.tool_calls else None,
        "finish_reason": answer.finish_reason,
        "model": answer.model or body["model"],
    }
    if _asks_for_json(body) and not (answer.tool_calls and not answer.content):
        value["json"] = _asked_json(value["content"], answer, body)
    extras = {
        "tool_calls": [call for _, call in sorted(answer.tool_calls.items())],
        "reasoning": "".join(answer.reasoning),
        "refusal": "".join(answer.refusal),
        "logprobs": answer.logprobs,
    }
    return value | {name: extra for name, extra in extras.items() if extra}


def _asked_json(content: str, answer: _Answer, body: Mapping[str, Any]) -> Any:
    failure = Never if _gives_the_same_again(body) else NotNow
    if answer.finish_reason == "length":
        raise failure(TRUNCATED, f"the JSON asked for was cut off after {answer.counted.get('completion_tokens', '?')} tokens")
    try:
        return _parsed(content)
    except (ValueError, RecursionError) as error:
        raise failure(INVALID_OUTPUT, f"the model's answer is not the JSON asked for: {_without_text(error)}") from None


def _parsed(content: str) -> Any:
    """Strict JSON that survives being sent on: `json.loads` alone lets NaN, 1e999 and half surrogates through, encoding does not."""
    value = json.loads(content)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    level, depth = [value], 0
    while level:
        level = [child for node in level for child in _children(node)]
        depth += 1
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")
    return value


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _without_text(error: Exception) -> str:
    """What is wrong with the text, without quoting it: an encoding error's own message would."""
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


# ---------------------------------------------------------------- refusals

_NOT_NOW = {
    401: (UNAUTHORIZED, False),
    402: (UNAVAILABLE, False),
    403: (UNAUTHORIZED, False),
    404: (UNAVAILABLE, False),
    405: (UNAVAILABLE, False),
    408: (TIMEOUT, True),
    409: (UNAVAILABLE, True),
    425: (UNAVAILABLE, False),
    429: (RATE_LIMITED, False),
    502: (UNAVAILABLE, True),
    503: (UNAVAILABLE, False),
    504: (TIMEOUT, True),
}
"""Status: category, and whether it burns an attempt. Missing are 3xx (settings), other 4xx (the input's fault) and 5xx (internal)."""

_SETTINGS_STATUSES = {401: "LLM_API_KEY", 403: "LLM_API_KEY", 404: "LLM_BASE_URL and LLM_MODEL", 405: "LLM_BASE_URL"}


def _refuse_bad_status(response: urllib3.HTTPResponse, settings: _Settings) -> None:
    """Raises `NotNow` or `Never` for any status but 200."""
    if response.status != HTTPStatus.OK:
        text = said(response.read(MAX_ERROR_BYTES), response.headers.get("content-type", ""), settings.secrets)
        raise _refused(response.status, text, retry_after(response))


def _refused(status: int, text: str, retry_in_seconds: float | None = None) -> NotNow | Never:
    """The outcome for a status other than 200 and what the server says about it."""
    message = f"the server answered {status}: {text or _phrase(status)}"
    if status in _SETTINGS_STATUSES:
        message += f" (look at {_SETTINGS_STATUSES[status]})"
    if status < 400:
        return NotNow(UNAVAILABLE, f"{message} (redirects are not followed: look at LLM_BASE_URL)", burns_attempt=False)
    if status in _NOT_NOW:
        category, burns = _NOT_NOW[status]
        return NotNow(category, message, retry_in_seconds=retry_in_seconds, burns_attempt=burns)
    if status >= 500:
        # A vLLM that is shutting down refuses new work in these words, with 500 instead of 503.
        refused_unread = "after shutdown" in text
        category = UNAVAILABLE if refused_unread else INTERNAL
        return NotNow(category, message, retry_in_seconds=retry_in_seconds, burns_attempt=not refused_unread)
    too_long = re.search(r"maximum context length|max_model_len|context_length_exceeded", text)
    return Never(CONTEXT_LENGTH_EXCEEDED if too_long else INVALID_INPUT, message)


def _refused_midway(status: int, text: str) -> NotNow | Never:
    """The outcome for an error inside a stream: as for the status, but work has been done, so an attempt is burnt."""
    outcome = _refused(status if status >= 400 else 500, text)
    if isinstance(outcome, NotNow):
        outcome.burns_attempt = True
    return outcome


def _phrase(status: int) -> str:
    return http.client.responses.get(status, "no reason given")
