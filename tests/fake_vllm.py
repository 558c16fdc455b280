"""A stand-in for a vLLM server, as a real HTTP server in a thread: it answers as the real one was seen to, or misbehaves on request.

    with fake_vllm() as server:
        os.environ["LLM_BASE_URL"] = server.base_url      # the key is server.api_key
        server.behave(refuses(429, {"Retry-After": "7"}), says("Hello"))   # the next two chat requests; later ones get the default
        server.always(hangs())                                             # every chat request from now on

By default it says something that fits: an example of the JSON schema asked for, else a sentence. `answers/vllm.json` holds what a real
vLLM 0.32.0 answered; `captured("503-busy")` is one of those, `replays("503-busy")` gives it as an answer.
"""

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import attrs
from fake_models import FakeModelServer

JSON = "application/json"
ANSWERS = Path(__file__).with_name("answers") / "vllm.json"

# ---------------------------------------------------------------- server


@attrs.define
class Seen:
    """One chat request as it came in."""

    headers: dict[str, str]
    body: dict[str, Any]
    arrived_at: float
    gone_at: float | None = None
    """When its client was seen to hang up before the answer was complete, on `time.monotonic()`'s clock."""


class FakeVLLM(FakeModelServer):
    """The server. A context manager that listens on a free port of 127.0.0.1 until it is left."""

    def __init__(self, api_key: str | None = "test-key", model: str = "qwen2.5-14b", models: tuple[str, ...] | None = None) -> None:
        super().__init__(self.handler(), fits())
        self.api_key = api_key
        self.models = models or (model,)
        self.models_behaviour: Behaviour | None = None

    def handler(self) -> type["Handler"]:
        """What meets the requests."""
        return Handler

    @property
    def base_url(self) -> str:
        """The address to put into LLM_BASE_URL."""
        return f"{self.origin}/v1"

    @property
    def environ(self) -> dict[str, str]:
        """The provider's settings for this server."""
        key = {"LLM_API_KEY": self.api_key} if self.api_key else {}
        return {"LLM_BASE_URL": self.base_url, "LLM_MODEL": self.models[0]} | key


fake_vllm = FakeVLLM


class Handler(BaseHTTPRequestHandler):
    """Routes, key and the pieces behaviours are made of."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeVLLM
    seen: Seen

    def do_GET(self) -> None:
        if self.path in ("/health", "/ping"):
            self.send_whole(200, b"")
        elif not self.key_is_right():
            self.refuse_key()
        elif self.path == "/v1/models" and self.server.models_behaviour:
            self.meet(self.server.models_behaviour, Seen(dict(self.headers), {}, time.monotonic()))
        elif self.path == "/v1/models":
            models = [{"id": name, "object": "model", "owned_by": "vllm", "max_model_len": 512} for name in self.server.models]
            self.send_json(200, {"object": "list", "data": models})
        else:
            self.send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if not self.key_is_right():
            self.refuse_key()
        elif self.path != "/v1/chat/completions":
            self.send_json(404, {"detail": "Not Found"})
        else:
            seen = Seen(dict(self.headers), json.loads(body), time.monotonic())
            self.meet(self.server.behaviour_for(seen), seen)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name http.server calls
        """Quiet: tests look at `seen`."""

    def meet(self, behaviour: "Behaviour", seen: Seen) -> None:
        self.seen = seen
        try:
            behaviour(self)
        except OSError:
            self.server.client_gone(seen)
            self.close_connection = True

    def refuse_key(self) -> None:
        self.send_whole(401, b'{"error":"Unauthorized"}')

    def key_is_right(self) -> bool:
        return self.server.api_key is None or self.headers.get("authorization") == f"Bearer {self.server.api_key}"

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send_whole(status, json.dumps(value).encode(), headers)

    def send_whole(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, content_type: str = "application/json"
    ) -> None:
        self.send_response(status)
        all_headers = {"Content-Type": content_type, "Content-Length": str(len(body))} | dict(headers or {})
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_piece(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def send_event(self, value: Any) -> None:
        self.send_piece(b"data: " + json.dumps(value).encode() + b"\n\n")

    def end_stream(self) -> None:
        self.send_piece(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def wait(self, seconds: float) -> None:
        """Wait as a busy server does. Raises `ConnectionError` when the client has hung up or the server is closed."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            readable, _, _ = select.select([self.connection], [], [], min(0.02, left))
            if self.server.closing.is_set() or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
                raise ConnectionError

    def reset(self) -> None:
        """Break the connection the hard way, as a killed process or a firewall does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()


# ---------------------------------------------------------------- behaviours

Behaviour = Callable[[Handler], None]


def chunk(text: str | None = None, **choice: Any) -> dict[str, Any]:
    """One chunk of a stream."""
    delta = {} if text is None else {"content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": "qwen2.5-14b",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None} | choice],
    }


def usage_of(text: str) -> dict[str, Any]:
    """A usage that depends on the text alone."""
    return {"prompt_tokens": 21, "total_tokens": 21 + len(text), "completion_tokens": len(text)}


def says(text: str, finish_reason: str = "stop", usage: Mapping[str, Any] | None = None, between_seconds: float = 0.0) -> Behaviour:
    """A good answer, streamed in pieces when that is asked for."""

    def stream(handler: Handler) -> None:
        handler.begin_stream()
        for start in range(0, len(text), max(1, len(text) // 4)):
            handler.send_event(chunk(text[start : start + max(1, len(text) // 4)]))
            handler.wait(between_seconds)
        handler.send_event(chunk("", finish_reason=finish_reason))
        handler.send_event({**chunk(), "choices": [], "usage": usage_of(text) if usage is None else dict(usage)})
        handler.end_stream()

    def behave(handler: Handler) -> None:
        if handler.seen.body.get("stream"):
            return stream(handler)
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        counted = usage_of(text) if usage is None else dict(usage)
        return handler.send_json(200, {"object": "chat.completion", "model": "qwen2.5-14b", "choices": [message], "usage": counted})

    return behave


def fits() -> Behaviour:
    """What fits the request: an example of its JSON schema, an empty object, or a sentence."""

    def behave(handler: Handler) -> None:
        response_format = handler.seen.body.get("response_format") or {}
        schema = (response_format.get("json_schema") or {}).get("schema")
        if response_format.get("type") in ("json_schema", "json_object"):
            return says(json.dumps(example_of(schema or {"type": "object"})))(handler)
        return says("All is well.")(handler)

    return behave


def example_of(schema: Mapping[str, Any]) -> Any:
    """A value that fits a simple JSON schema."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: example_of(member) for name, member in schema.get("properties", {}).items()}
    if kind == "array":
        return [example_of(schema.get("items", {}))]
    return {"integer": 1, "number": 0.5, "boolean": True, "null": None}.get(str(kind), "text")


def streams(*events: Any, done: bool = True) -> Behaviour:
    """These events, bytes as they are; then the end of the stream, with `[DONE]` unless told otherwise."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        for event in events:
            handler.send_piece(event) if isinstance(event, bytes) else handler.send_event(event)
        handler.end_stream() if done else handler.wfile.write(b"0\r\n\r\n")

    return behave


def refuses(status: int, headers: Mapping[str, str] | None = None, body: Any = b"", content_type: str = "application/json") -> Behaviour:
    """This status and body: bytes as they are, anything else as JSON."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.send_whole(status, text, headers, content_type)


def slow(first_seconds: float, then: Behaviour | None = None) -> Behaviour:
    """Silence, as in vLLM's queue, and then another behaviour."""

    def behave(handler: Handler) -> None:
        handler.wait(first_seconds)
        (then or fits())(handler)

    return behave


def hangs() -> Behaviour:
    """Not a byte, until the client gives up: vLLM after SIGTERM with a slow request in flight."""
    return slow(3600)


def goes_silent(pieces: int = 2) -> Behaviour:
    """An answer that begins, and then nothing more, with the connection open."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        for _ in range(pieces):
            handler.send_event(chunk("word "))
        handler.wait(3600)

    return behave


def unframed() -> Behaviour:
    """An answer without length or chunks, as old proxies send it: the end of the connection looks like its proper end."""

    def behave(handler: Handler) -> None:
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"data: " + json.dumps(chunk("word ")).encode() + b"\n\n")
        handler.wait(3600)

    return behave


def stays_open(text: str) -> Behaviour:
    """A good answer whose `[DONE]` is not followed by the end of the body."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        handler.send_event(chunk(text, finish_reason="stop"))
        handler.send_piece(b"data: [DONE]\n\n")
        handler.wait(3600)

    return behave


def trickles() -> Behaviour:
    """One byte of a chunk at a time, for ever: always something to read, never anything whole."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        handler.wfile.write(b"ffff\r\ndata: ")
        while True:
            handler.wfile.write(b" ")
            handler.wait(0.02)

    return behave


def endless(between_seconds: float = 0.01, text: str = "more ") -> Behaviour:
    """An answer that never comes to its end."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        while True:
            handler.send_event(chunk(text))
            handler.wait(between_seconds)

    return behave


def drops_connection(after_pieces: int = 2) -> Behaviour:
    """A hard break in the middle of a stream; with 0 pieces, before the first byte."""

    def behave(handler: Handler) -> None:
        if after_pieces:
            handler.begin_stream()
        for _ in range(after_pieces):
            handler.send_event(chunk("word "))
        handler.reset()

    return behave


def cut_json() -> Behaviour:
    """A stream that ends in the middle of an event, as if it were complete."""
    return streams(chunk("word "), b'data: {"id":"chatcmpl-1","choices":[{"index":0,"del\n\n', done=False)


# ---------------------------------------------------------------- captured answers


@cache
def captured_answers(file: Path = ANSWERS) -> Mapping[str, dict[str, Any]]:
    """What a real server answered, by case."""
    return {answer["case"]: answer for answer in json.loads(file.read_text("utf-8"))["answers"]}


def captured(case: str) -> dict[str, Any]:
    """One captured answer of a real vLLM: `request`, `status`, `headers`, `body` as text, `seconds`."""
    return captured_answers()[case]


def replays(case: str) -> Behaviour:
    """A captured answer. One that was captured whole is streamed when that is asked for, its text in pieces."""

    def behave(handler: Handler) -> None:
        answer = captured(case)
        if answer["status"] == 200 and handler.seen.body.get("stream") and not is_stream(answer):
            whole = json.loads(answer["body"])
            choice = whole["choices"][0]
            return says(choice["message"]["content"], choice["finish_reason"], whole["usage"])(handler)
        return as_captured(answer)(handler)

    return behave


def as_captured(answer: Mapping[str, Any]) -> Behaviour:
    """A captured answer as it came, whole or as a stream."""
    headers = answer["headers"] or {"content-type": JSON}
    if is_stream(answer):
        return streams(answer["body"].rstrip().removesuffix("data: [DONE]").encode())
    sent = {name: value for name, value in headers.items() if name == "retry-after"}
    return refuses(answer["status"], sent, answer["body"].encode(), headers["content-type"])


def is_stream(answer: Mapping[str, Any]) -> bool:
    """Whether it was captured as a stream."""
    return str((answer["headers"] or {}).get("content-type")).startswith("text/event-stream")
