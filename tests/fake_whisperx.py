"""A stand-in for the servers in front of WhisperX, as a real HTTP server in a thread: it answers as the real ones were seen to.

    with fake_whisperx("whisper-asr-webservice") as server:
        os.environ["WHISPERX_URL"] = server.base_url      # the key, where there is one, is server.api_key
        server.behave(refuses(503), replays("asr-silence"))   # the next two transcriptions; later ones get the default
        server.always(hangs())                                # every transcription from now on

The kinds are `whisperx-api-server`, `whisperx-asr-service`, `whisper-asr-webservice` and `whisper-vllm`: they differ in their routes, in
what these take and where, and in the shape of the answer. By default a transcription says how many bytes it heard.
`answers/<kind>.json` holds what the real one answered; `captured(kind, case)` is one of those, `replays(case)` gives it as an answer.

Sections: kinds, server, behaviours, audio, captured answers.
"""

from __future__ import annotations

import io
import json
import select
import socket
import struct
import time
import wave
from collections.abc import Callable, Mapping
from email.parser import BytesParser
from email.policy import HTTP
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import attrs
from fake_models import FakeModelServer

ANSWERS = Path(__file__).with_name("answers")
TRANSCRIPTIONS, TRANSLATIONS, ASR = "/v1/audio/transcriptions", "/v1/audio/translations", "/asr"

# ---------------------------------------------------------------- kinds

_SPEAKERS = "diarize min_speakers max_speakers"
_ROUTES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "whisperx-api-server": {
        TRANSCRIPTIONS: (
            "",
            f"file model language prompt response_format temperature timestamp_granularities[] align {_SPEAKERS}",
            "",
        ),
        TRANSLATIONS: ("", "file model prompt response_format temperature", "file"),
    },
    "whisperx-asr-service": {
        # What it reads from the form without telling: timestamp_granularities[].
        TRANSCRIPTIONS: ("", "file model language prompt response_format temperature", "file model"),
        TRANSLATIONS: ("", "file model prompt response_format temperature", "file model"),
        ASR: (
            f"task language initial_prompt word_timestamps output_format output model num_speakers {_SPEAKERS}",
            "audio_file",
            "audio_file",
        ),
    },
    "whisper-asr-webservice": {
        # Without a token for the weights it does not tell of diarize.
        ASR: ("encode task language initial_prompt word_timestamps output min_speakers max_speakers", "audio_file", "audio_file"),
    },
    "whisper-vllm": {
        TRANSCRIPTIONS: ("", "file model language prompt response_format timestamp_granularities[] temperature", "file"),
    },
}
"""What each kind tells of each of its routes: names in the query, names in the form, names it insists on."""


def described(routes: Mapping[str, tuple[str, str, str]], *, looks_up: bool = False) -> dict[str, Any]:
    """An `/openapi.json` as FastAPI writes it: forms under a reference."""
    paths: dict[str, Any] = {"/health": {"get": {}}}
    schemas: dict[str, Any] = {}
    for path, (query, form, required) in routes.items():
        name = f"Body_{path.strip('/').replace('/', '_')}"
        schemas[name] = {"type": "object", "properties": {field: {} for field in form.split()}, "required": required.split()}
        parameters = [{"name": field, "in": "query"} for field in query.split()] + [{"name": "model", "in": "header"}]
        body = {"content": {"multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
        paths[path] = {"post": {"parameters": parameters, "requestBody": body}}
    if looks_up:
        paths |= {f"{TRANSCRIPTIONS}/{{request_id}}/{what}": {"get": {}} for what in ("status", "result")}
    return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": schemas}}


# ---------------------------------------------------------------- server


@attrs.define
class Seen:
    """One transcription as it was asked for."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]
    form: list[tuple[str, str]]
    """The fields in their order, the file apart."""
    file_field: str
    file_name: str
    file: bytes
    gone_at: float | None = None
    """When its client was seen to hang up before the answer was complete, on `time.monotonic()`'s clock."""

    @property
    def options(self) -> dict[str, str]:
        """All that was asked for, wherever it stood; of a field that came several times, the values between commas."""
        options = dict(self.query)
        for name, value in self.form:
            options[name] = f"{options[name]},{value}" if name in options else value
        return options


class FakeWhisperX(FakeModelServer):
    """The server. A context manager that listens on a free port of 127.0.0.1 until it is left."""

    def __init__(self, kind: str = "whisperx-api-server", api_key: str | None = None) -> None:
        super().__init__(_Handler, hears())
        self.kind = kind
        self.api_key = "test-key" if api_key is None and kind in ("whisperx-api-server", "whisper-vllm") else api_key
        self.looks_up = kind == "whisperx-api-server"
        self.description: Any = described(_ROUTES[kind], looks_up=self.looks_up)
        self.looks = 0
        """How often the description was asked for."""
        self.asked_for: list[str] = []
        """The paths of all requests, in their order."""
        self.kept: dict[str, tuple[str, bytes]] = {}
        """State and answer of each request that named itself, where the kind keeps these."""
        self.description_behaviour: Behaviour | None = None

    @property
    def base_url(self) -> str:
        """The address to put into WHISPERX_URL."""
        return self.origin

    @property
    def environ(self) -> dict[str, str]:
        """The provider's settings for this server."""
        return {"WHISPERX_URL": self.base_url} | ({"WHISPERX_API_KEY": self.api_key} if self.api_key else {})

    @property
    def routes(self) -> Mapping[str, Any]:
        """The paths that it has and tells of."""
        return self.description.get("paths", {}) if isinstance(self.description, dict) else {}

    def keep(self, request_id: str, state: str, answer: bytes = b"") -> None:
        """What is known from now on of the request of this name."""
        with self._changed:
            self.kept[request_id] = (state, answer)
            self._changed.notify_all()

    def note(self, path: str) -> None:
        with self._changed:
            self.asked_for.append(path)
            self.looks += path == "/openapi.json"
            self._changed.notify_all()


fake_whisperx = FakeWhisperX


class _Handler(BaseHTTPRequestHandler):
    """Routes, key and the pieces behaviours are made of."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeWhisperX
    seen: Seen

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.note(path)
        if path == "/openapi.json":
            self._meet(self.server.description_behaviour or (lambda handler: handler.send_json(200, handler.server.description)))
        elif not self._key_is_right():
            self.send_json(401, {"detail": "Not authenticated"})
        elif self.server.looks_up and path.startswith(TRANSCRIPTIONS):
            self._tell_of_kept(*path.removeprefix(f"{TRANSCRIPTIONS}/").split("/"))
        else:
            self.send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.server.note(path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if path not in self.server.routes:
            self.send_json(404, {"detail": "Not Found"})
        elif not self._key_is_right():
            no_key = "authorization" not in self.headers
            self.send_json(401 if no_key else 403, {"detail": "Not authenticated" if no_key else "Invalid API Key"})
        elif not body:
            self.send_json(422, {"detail": [{"type": "missing", "loc": ["body", "file"], "msg": "Field required"}]})
        else:
            self.seen = self._as_seen(body)
            self._meet(self.server.behaviour_for(self.seen))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name http.server calls
        """Quiet: tests look at `seen`."""

    def _as_seen(self, body: bytes) -> Seen:
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        parts = [(part, part.get_payload(decode=True)) for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()]
        named = [(part.get_param("name", header="content-disposition"), part.get_filename(), content) for part, content in parts]
        file_field, file_name, file = next(one for one in named if one[1] is not None)
        form = [(name, content.decode()) for name, is_file, content in named if is_file is None]
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        return Seen(url.path, query, dict(self.headers), form, file_field, file_name, file)

    def _meet(self, behaviour: Behaviour) -> None:
        try:
            behaviour(self)
        except OSError:
            if hasattr(self, "seen"):
                self.server.client_gone(self.seen)
            self.close_connection = True

    def _key_is_right(self) -> bool:
        return self.server.api_key is None or self.headers.get("authorization") == f"Bearer {self.server.api_key}"

    def _tell_of_kept(self, request_id: str, what: str) -> None:
        state, answer = self.server.kept.get(request_id, (None, b""))
        if state is None or (what == "result" and not answer):
            self.send_json(404, {"detail": "Request not tracked (unknown, expired, or never received)."})
        elif what == "result":
            self.send_whole(200, answer)
        else:
            self.send_json(200, {"request_id": request_id, "status": state, "stage": "transcribe" if state == "in_progress" else state})

    def send_json(self, status: int, value: Any) -> None:
        self.send_whole(status, json.dumps(value).encode())

    def send_whole(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, content_type: str = "application/json"
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": content_type, "Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

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

Behaviour = Callable[[_Handler], None]


def hears() -> Behaviour:
    """A transcription that says how many bytes there were, in two sentences, in the shape of its kind."""
    return lambda handler: says(f"I heard {len(handler.seen.file)} bytes.", "All is well.")(handler)


def says(*sentences: str) -> Behaviour:
    """A transcription of these sentences, a second each, in the shape of its kind."""

    def behave(handler: _Handler) -> None:
        as_text = handler.server.kind == "whisper-asr-webservice"
        body = shape_of(handler.server.kind, handler.seen.path, sentences)
        handler.send_whole(200, json.dumps(body).encode(), content_type="text/plain; charset=utf-8" if as_text else "application/json")

    return behave


def shape_of(kind: str, path: str, sentences: tuple[str, ...]) -> dict[str, Any]:
    """What a server of this kind makes of these sentences."""
    segments = [{"start": float(at), "end": at + 1.0, "text": f" {text}", "words": words_of(at, text)} for at, text in enumerate(sentences)]
    words = [word for segment in segments for word in segment["words"]]
    plain = [{name: value for name, value in segment.items() if name != "words"} for segment in segments]
    if path == ASR:
        answer = {"segments": segments, "word_segments": words, "language": "en"}
        return answer if kind == "whisper-asr-webservice" else {"text": segments, **answer}
    if kind == "whisperx-api-server":
        return {"segments": {"segments": segments, "word_segments": words}, "language": "en", "text": "\n".join(sentences)}
    told = {"task": "transcribe", "language": "en", "duration": float(len(sentences)), "text": " ".join(sentences), "segments": plain}
    return told | {"words": words if kind == "whisperx-asr-service" else None}


def words_of(at: int, text: str) -> list[dict[str, Any]]:
    """The words of a sentence that takes the second from `at`."""
    words = text.split()
    step = 1 / len(words)
    return [{"word": word, "start": at + n * step, "end": at + (n + 0.5) * step, "score": 0.5} for n, word in enumerate(words)]


def refuses(status: int, headers: Mapping[str, str] | None = None, body: Any = b"", content_type: str = "application/json") -> Behaviour:
    """This status and body: bytes as they are, anything else as JSON."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.send_whole(status, text, headers, content_type)


def slow(seconds: float, then: Behaviour | None = None) -> Behaviour:
    """Silence, as while others are served, and then another behaviour."""

    def behave(handler: _Handler) -> None:
        handler.wait(seconds)
        (then or hears())(handler)

    return behave


def hangs() -> Behaviour:
    """Not a byte, until the client gives up."""
    return slow(3600)


def works_on() -> Behaviour:
    """A server that keeps what it works on under the name of the request, and works on when the client is gone."""

    def behave(handler: _Handler) -> None:
        handler.server.keep(handler.seen.headers["X-Request-ID"], "in_progress")
        handler.wait(3600)

    return behave


def drops_connection() -> Behaviour:
    """A hard break before the first byte, as of a server that is killed in the middle of a file."""
    return lambda handler: handler.reset()


def trickles() -> Behaviour:
    """One byte at a time, for ever: always something to read, never anything whole."""

    def behave(handler: _Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n{")
        while True:
            handler.wfile.write(b" ")
            handler.wait(0.02)

    return behave


# ---------------------------------------------------------------- audio


def silence(seconds: float = 1.0, rate: int = 16_000) -> bytes:
    """A WAV file in which nobody speaks."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(bytes(2 * round(seconds * rate)))
    return file.getvalue()


# ---------------------------------------------------------------- captured answers


@cache
def captured_answers(kind: str) -> Mapping[str, dict[str, Any]]:
    """What the real server of this kind answered, by case."""
    return {answer["case"]: answer for answer in json.loads((ANSWERS / f"{kind}.json").read_text("utf-8"))["answers"]}


def captured(kind: str, case: str) -> dict[str, Any]:
    """One captured answer: `request`, `status`, `headers`, `body` as text, `seconds`."""
    return captured_answers(kind)[case]


def replays(case: str, kind: str | None = None) -> Behaviour:
    """A captured answer of the server's own kind, or of another."""

    def behave(handler: _Handler) -> None:
        answer = captured(kind or handler.server.kind, case)
        kept = {name: value for name, value in answer["headers"].items() if name in ("retry-after", "asr-engine", "content-disposition")}
        handler.send_whole(answer["status"], answer["body"].encode(), kept, answer["headers"]["content-type"])

    return behave
