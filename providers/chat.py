"""What servers with the OpenAI chat API have in common: a job's request, the answer as it streams in, what it used, what a refusal says.

`providers.vllm` and `providers.openclaw` are made of this, and differ in what they send and in what they make of a refusal.

A job's input
    "text"                                       one user message
    {"prompt": "text", "system"?: "text", ...}   a user message after a system message
    {"messages": [...], ...}                     the messages as they are: a whole chat-completions body fits
    `stream` and `stream_options` are ours and dropped; `n` other than 1 is refused, one job is one answer. What becomes of the other
    members (temperature, max_tokens, response_format, seed, ...) is the provider's to say.

The result
    content         the model's text as received; null when it only called tools
    finish_reason   `stop`; `length` when text was cut at max_tokens; `tool_calls`; or what else the server says
    model           the model the server says it used
    json            the parsed text: present if and only if JSON was asked for (`response_format`, or vLLM's `structured_outputs`).
                    For the exact spelling of its numbers see `content`.
    tool_calls, reasoning, refusal, logprobs     only when the server sent them

Usage: `prompt_tokens`, `completion_tokens`, `total_tokens` (also where the server says `input_tokens`, `output_tokens`), `model`,
`time_to_first_token_seconds`, `running_seconds`; `raw` is what the server counted, as it came, unless that is too big to be stored. What is
not known is left out. Failed attempts have it as far as it is known.

JSON asked for and not delivered is a failure, whatever the status says: cut at a length it is `truncated`, else not valid JSON (no NaN, no
raw control characters, no half surrogates) `invalid_output`.

Sections: request, exchange, error responses, answer, result.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import attrs
import msgspec
import urllib3
from urllib3.util import Url

from providers import (
    INVALID_INPUT,
    INVALID_OUTPUT,
    TRUNCATED,
    UNAVAILABLE,
    Health,
    Job,
    Never,
    NotCompleted,
    NotNow,
)
from providers.exchange import (
    CHECK_SECONDS,
    ErrorResponse,
    Exchange,
    error_text,
    raw_usage,
    read_error,
    request_headers,
    request_id,
    token_counts,
)

MAX_JSON_DEPTH = 400
"""The service takes 500 levels, and the parsed text stands some levels down in what the worker sends."""
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
"""What is asked of a server beside the job's request."""

ACCEPT = "text/event-stream, application/json"

T = TypeVar("T")

# ---------------------------------------------------------------- request


def parse_input(input_: Any) -> dict[str, Any]:
    """The members of a chat-completions body that a job's input asks for. Raises `Never` when it is none of the forms described above."""
    given = {"prompt": input_} if isinstance(input_, str) else input_
    if not isinstance(given, dict):
        raise Never(INVALID_INPUT, "input must be a text, or an object with messages or prompt")
    if problems := "; ".join(_input_problems(given)):
        raise Never(INVALID_INPUT, problems)
    return {name: value for name, value in given.items() if name not in ("prompt", "system")} | {"messages": _messages(given)}


def _input_problems(given: Mapping[str, Any]) -> Iterator[str]:
    if ("messages" in given) == ("prompt" in given):
        yield "input must have either messages or prompt"
    if "system" in given and "messages" in given:
        yield "system goes with prompt; among messages, make it the first one"
    if given.get("n") not in (None, 1):
        yield "n must be 1: one job is one answer, create more jobs for more"


def _messages(given: Mapping[str, Any]) -> list[Any]:
    if "messages" in given:
        messages = given["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise Never(INVALID_INPUT, "messages must be a list of at least one object")
        return messages
    contents = {role: given[name] for role, name in (("system", "system"), ("user", "prompt")) if given.get(name) is not None}
    if not given["prompt"] or not all(isinstance(text, str) for text in contents.values()):
        raise Never(INVALID_INPUT, "prompt must be a text that is not empty, and system a text")
    return [{"role": role, "content": text} for role, text in contents.items()]


def model_problems(request: Mapping[str, Any], ours: str, profile: str) -> Iterator[str]:
    """A sentence if the request names another model than the one that will answer; its profile's name is as good."""
    if request.get("model") not in (None, ours, profile):
        yield f"input asks for the model {str(request['model'])[:100]!r}, but its model_profile is served by {ours!r}"


def asks_for_json(body: Mapping[str, Any]) -> bool:
    """Whether the answer must be JSON."""
    response_format, structured = body.get("response_format"), body.get("structured_outputs")
    if isinstance(response_format, dict) and response_format.get("type") in ("json_object", "json_schema"):
        return True
    return isinstance(structured, dict) and any(structured.get(name) not in (None, False) for name in ("json", "json_object"))


# ---------------------------------------------------------------- exchange


@attrs.frozen(kw_only=True)
class Server:
    """Where requests go, how long they may take, and what a refusal means there."""

    url: Url = attrs.field(repr=False)
    """Up to and with its version, such as `/v1`."""
    authorization: str | None = attrs.field(repr=False)
    secrets: tuple[str, ...] = attrs.field(repr=False)
    """Taken out of what the server says."""
    timeout_seconds: float
    idle_seconds: float
    outcome_of: "Callable[[ErrorResponse], NotCompleted]" = attrs.field(repr=False)

    @property
    def endpoint(self) -> str:
        """Its address, without user info."""
        return self.url._replace(auth=None).url


def stream_completion(server: Server, job: Job, body: Mapping[str, Any], completion: "Completion") -> None:
    """Fill the answer from the stream until its end. Raises what the failure means; the answer then holds what had come."""
    limit_seconds, text = job.seconds_allowed(server.timeout_seconds), _encoded(body)
    with Exchange(server.url, limit_seconds=limit_seconds, cancelled=job.cancelled) as exchange:
        headers = request_headers(ACCEPT, server.authorization, job)
        # vLLM names the request after its id, and two of one name at the same time would collide.
        headers |= {"Content-Type": "application/json", "X-Request-Id": request_id(job)}
        response = exchange.send("POST", "/chat/completions", headers, text)
        _raise_for_status(response, server)
        for event in _event_data(response, exchange.blocks(response)):
            completion.add(_chunk(event, server, completion))
            completion.report(job)
            if completion.characters or completion.tool_calls:
                # Not before: a server may open its stream at once, and then queue the request.
                exchange.set_idle_limit(server.idle_seconds)
        if completion.finish_reason is None:
            raise NotNow(UNAVAILABLE, "the answer broke off before its end")


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError:
        # 1e999 is JSON that Python reads as infinity.
        raise Never(INVALID_INPUT, "input holds a number that is too large") from None


def _event_data(response: urllib3.HTTPResponse, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, up to `[DONE]`; of a server that does not stream, the whole body as one.

    An event stands on one line, as vLLM and OpenClaw write it. Comments and other fields are passed over.
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


def get_json(server: Server, path: str, kind: type[T], *, limit_seconds: float, accepted_statuses: tuple[int, ...] = (HTTPStatus.OK,)) -> T:
    """What a GET answers, as this type. Raises what the refusal means when the status is none of these."""
    with Exchange(server.url, limit_seconds=limit_seconds) as exchange:
        response = exchange.send("GET", path, request_headers(ACCEPT, server.authorization))
        _raise_for_status(response, server, accepted_statuses)
        text = b"".join(exchange.blocks(response))
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise NotNow(UNAVAILABLE, f"GET {path} was answered with something else than was expected") from None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def served_models(server: Server, *, limit_seconds: float = CHECK_SECONDS) -> tuple[str, ...]:
    """The names in the server's list of models."""
    return tuple(model.id for model in get_json(server, "/models", _Models, limit_seconds=limit_seconds).data)


def check_models(server: Server, wanted: Iterable[str], ask: Callable[[], tuple[str, ...]]) -> Health:
    """How a server is that is asked for its models: `degraded` when one of those wanted is not among them."""
    started_at = time.monotonic()
    try:
        models = ask()
    except NotCompleted as trouble:
        return Health("unavailable", trouble.message, endpoint=server.endpoint)
    absent = _describe_missing(wanted, models)
    latency_ms = (time.monotonic() - started_at) * 1000
    return Health("degraded" if absent else "ok", absent, models=models, endpoint=server.endpoint, latency_ms=latency_ms)


def _describe_missing(wanted: Iterable[str], models: tuple[str, ...]) -> str | None:
    """A sentence that names those that are not served; None if all are."""
    absent = [name for name in dict.fromkeys(wanted) if name not in models]
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not among the models served: {', '.join(models) or 'none'}" if absent else None


# ---------------------------------------------------------------- error responses


def _raise_for_status(response: urllib3.HTTPResponse, server: Server, accepted_statuses: tuple[int, ...] = (HTTPStatus.OK,)) -> None:
    if response.status not in accepted_statuses:
        error = read_error(response, server.secrets)
        raise server.outcome_of(attrs.evolve(error, kind=_error_type_and_code(error.body)[0]))


def _error_type_and_code(body: bytes) -> tuple[str | None, int | None]:
    """`type` of the `error` in a JSON body, and its `code` where that is a status."""
    try:
        error = msgspec.json.decode(body, type=_Chunk).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, None
    members = error if isinstance(error, dict) else {}
    kind, code = members.get("type"), members.get("code")
    return kind if isinstance(kind, str) else None, code if type(code) is int and code >= 400 else None


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


def _chunk(event: bytes, server: Server, completion: "Completion") -> _Chunk:
    try:
        chunk = msgspec.json.decode(event, type=_Chunk)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise NotNow(UNAVAILABLE, "the answer broke off, or is no chat completion") from None
    if chunk.error is not None:
        # Both servers report their failure in a stream of status 200, and end it with [DONE] as if nothing were wrong.
        kind, code = _error_type_and_code(event)
        text = error_text(event, "application/json", server.secrets)
        has_output = bool(completion.characters or completion.tool_calls)
        raise server.outcome_of(ErrorResponse(status=code, kind=kind, text=text, in_stream=True, has_output=has_output))
    return chunk


@attrs.define
class Completion:
    """What has arrived so far."""

    content: list[str] = attrs.field(factory=list)
    reasoning: list[str] = attrs.field(factory=list)
    refusal: list[str] = attrs.field(factory=list)
    tool_calls: dict[int, dict[str, Any]] = attrs.field(factory=dict)
    logprobs: list[Any] = attrs.field(factory=list)
    finish_reason: str | None = None
    model: str | None = None
    reported_usage: Mapping[str, Any] = attrs.field(factory=dict)
    started_at: float = attrs.field(factory=time.monotonic)
    first_output_at: float | None = None
    """When the first piece of a stream came."""
    characters: int = 0
    progress_reported_at: float = -math.inf

    def add(self, chunk: _Chunk) -> None:
        """Take in one event."""
        self.model = chunk.model or self.model
        self.reported_usage = chunk.usage or self.reported_usage
        for choice in chunk.choices or ():
            self._add_delta(choice.delta or choice.message or _Delta())
            self.logprobs += (choice.logprobs and choice.logprobs.content) or []
            self.finish_reason = choice.finish_reason or self.finish_reason
            if self.first_output_at is None and choice.delta and (self.characters or self.tool_calls):
                self.first_output_at = time.monotonic()

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

    def _add_tool_call(self, index: int, call: _ToolCall) -> None:
        whole = self.tool_calls.setdefault(index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        whole["id"] = call.id or whole["id"]
        if call.function:
            whole["function"]["name"] += call.function.name or ""
            whole["function"]["arguments"] += call.function.arguments or ""

    def report(self, job: Job) -> None:
        """Show how far the answer is, at most once a second."""
        if time.monotonic() - self.progress_reported_at >= 1:
            self.progress_reported_at = time.monotonic()
            job.report_progress({"received_characters": self.characters})

    def usage(self) -> dict[str, Any] | None:
        """Usage as far as it is known; None when nothing had arrived."""
        if self.model is None and self.first_output_at is None:
            return None
        usage: dict[str, Any] = {"model": self.model[:200]} if self.model else {}
        usage |= token_counts(self.reported_usage)
        usage["running_seconds"] = round(time.monotonic() - self.started_at, 3)
        if self.first_output_at is not None:
            usage["time_to_first_token_seconds"] = round(self.first_output_at - self.started_at, 3)
        return usage | raw_usage(self.reported_usage)


# ---------------------------------------------------------------- result


def result_value(completion: Completion, body: Mapping[str, Any], *, is_deterministic: bool) -> dict[str, Any]:
    """The result. Raises `NotNow` when the answer is not what was asked for; `Never` if the same request gets the same answer again."""
    if completion.finish_reason in ("abort", "error"):
        raise NotNow(UNAVAILABLE, f"the server gave the request up: finish_reason {completion.finish_reason}")
    value: dict[str, Any] = {
        "content": "".join(completion.content) if completion.content or not completion.tool_calls else None,
        "finish_reason": completion.finish_reason,
        "model": completion.model or body["model"],
    }
    if asks_for_json(body) and not (completion.tool_calls and not completion.content):
        value["json"] = _requested_json(value["content"], completion, Never if is_deterministic else NotNow)
    extras = {
        "tool_calls": [call for _, call in sorted(completion.tool_calls.items())],
        "reasoning": "".join(completion.reasoning),
        "refusal": "".join(completion.refusal),
        "logprobs": completion.logprobs,
    }
    return value | {name: extra for name, extra in extras.items() if extra}


def _requested_json(content: str, completion: Completion, failure: type[NotNow | Never]) -> Any:
    if completion.finish_reason == "length":
        raise failure(TRUNCATED, f"the JSON asked for was cut off after {completion.reported_usage.get('completion_tokens', '?')} tokens")
    try:
        return _parse_strict(content)
    except (ValueError, RecursionError) as error:
        raise failure(INVALID_OUTPUT, f"the model's answer is not the JSON asked for: {_describe_parse_error(error)}") from None


def _parse_strict(content: str) -> Any:
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


def _describe_parse_error(error: Exception) -> str:
    """What is wrong with the text, without quoting it: an encoding error's own message would."""
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
