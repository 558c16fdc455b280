"""One HTTP request to a model service that can be called off at any moment: what the providers share.

A blocked read can look at neither a clock nor an event, and a peer that trickles bytes defeats any read timeout. So every exchange has a
connection of its own and a watcher, which shuts the socket down at the limit or on cancellation: that wakes the reader at once, and the
server sees its client go. A connection of its own also means that no idle one goes stale (vLLM closes them after 5 s). Redirects are not
followed and proxy variables are not read.
"""

import contextlib
import http.client
import json
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import urllib3.connection
import urllib3.exceptions
from urllib3.util import Url

from providers import CANCELLED, INVALID_OUTPUT, TIMEOUT, UNAVAILABLE, NotNow, redact

CONNECT_SECONDS = 5.0
"""Limit for reaching a server, its address's lookup not counted."""
MAX_ADDRESSES = 4
"""How many addresses of a host are tried, within that limit altogether."""
MESSAGE_CHARACTERS = 500
"""How much of a server's error text is kept."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Where an answer without end is given up; a result may have 32 MiB."""
MAX_ERROR_BYTES = 65_536
"""How much of an error's body is read."""


class Exchange:
    """One request and its answer, ended by its limit, its cancellation or its silence.

    A context manager: connecting and all trouble of the network inside it come out as `NotNow`. `idle_seconds` is how long an answer that
    has begun may pause; before that, only the limit counts. `addresses` are tried in this order in place of those that the host has now,
    for a caller who has looked them up and judged them; Host header and certificate remain those of the URL.
    """

    def __init__(
        self,
        url: Url,
        *,
        limit_seconds: float,
        idle_seconds: float = math.inf,
        cancelled: threading.Event | None = None,
        addresses: Sequence[str] = (),
    ) -> None:
        self._url = url
        self._addresses = addresses
        self._until = time.monotonic() + limit_seconds
        self._limit_seconds = limit_seconds
        self._idle_seconds = min(idle_seconds, limit_seconds)
        self._cancelled = cancelled or threading.Event()
        self._connection = _connection(url, min(CONNECT_SECONDS, limit_seconds))
        self._socket: socket.socket | None = None
        self._response: urllib3.HTTPResponse | None = None
        self._ended = threading.Event()
        self._cut: NotNow | None = None

    def __enter__(self) -> Self:
        self._connect()
        self._socket = self._connection.sock
        threading.Thread(target=self._watch, name="exchange-watch", daemon=True).start()
        return self

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None) -> None:
        self._ended.set()
        if self._response is not None:
            self._response.close()
        self._connection.close()
        network = isinstance(error, urllib3.exceptions.HTTPError | http.client.HTTPException | OSError)
        if self._cut and (network or isinstance(error, NotNow)):
            raise self._cut from None
        if network and error is not None:
            raise self._failure_of(error) from None

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | Iterable[bytes] | None = None) -> urllib3.HTTPResponse:
        """Send the request and wait for the head of its answer, whatever its status. A body in pieces needs a Content-Length."""
        self._allow(self._until - time.monotonic())
        if self._addresses:
            headers = {"Host": self._url._replace(auth=None).netloc or "", **headers}
        # A server may refuse a body before it has read it all: its answer says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.request(method, (self._url.path or "") + path, body, headers, preload_content=False)
        self._response = self._connection.getresponse()
        return self._response

    def blocks(self, response: urllib3.HTTPResponse, max_bytes: float = MAX_ANSWER_BYTES) -> Iterator[bytes]:
        """The body, piece by piece as it arrives."""
        size = 0
        while block := response.read1(65_536):
            self._refuse_cut()
            yield block
            self._allow(self._idle_seconds)
            size += len(block)
            if size > max_bytes:
                raise NotNow(INVALID_OUTPUT, f"gave up an answer of more than {max_bytes} bytes")
        self._refuse_cut()

    def _refuse_cut(self) -> None:
        # Our own cut looks like the end of a body whose length nobody told.
        if self._cut:
            raise self._cut

    def _connect(self) -> None:
        """Connect to the first of a few addresses that lets us. Raises `NotNow` when none does."""
        until = min(self._until, time.monotonic() + CONNECT_SECONDS)
        for address in self._addresses[:MAX_ADDRESSES] or (None,):
            if self._cancelled.is_set():
                raise NotNow(CANCELLED, "the job was cancelled before it ran", burns_attempt=False)
            self._connection = _connection(self._url, max(0.001, until - time.monotonic()), address)
            try:
                return self._connection.connect()
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
                self._connection.close()
                reason = _reason(error)
        category = TIMEOUT if time.monotonic() >= self._until else UNAVAILABLE
        origin = self._url._replace(auth=None, path=None, query=None).url
        raise NotNow(category, f"cannot reach {origin}: {reason}", burns_attempt=False)

    def limit_idle(self, idle_seconds: float) -> None:
        """From the next piece on, how long the answer may pause."""
        self._idle_seconds = min(idle_seconds, self._limit_seconds)

    def _allow(self, seconds: float) -> None:
        """How long one read or write may take. `getresponse` takes it from the connection, everything else from the socket."""
        self._connection.timeout = max(0.0, seconds) + 0.1  # the watcher knows better why a limit was reached, so it comes first
        if self._socket is not None:
            self._socket.settimeout(self._connection.timeout)

    def _watch(self) -> None:
        while not self._cancelled.wait(min(0.05, max(0.0, self._until - time.monotonic()))):
            if self._ended.is_set():
                return
            if time.monotonic() >= self._until:
                self._cut_off(NotNow(TIMEOUT, f"no complete answer within {self._limit_seconds:.3g} s"))
                return
        self._cut_off(NotNow(CANCELLED, "the job was cancelled while it ran", burns_attempt=False))

    def _cut_off(self, why: NotNow) -> None:
        self._cut = why
        if self._socket is not None and not self._ended.is_set():
            # Not SSLSocket.shutdown: it takes the TLS state away from under the thread that reads. An error means: closed already.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _failure_of(self, error: BaseException) -> NotNow:
        # The request was on its way, so the server may have worked on it, or died of it: these burn an attempt.
        if isinstance(error, TimeoutError | urllib3.exceptions.ReadTimeoutError):
            return NotNow(TIMEOUT, f"the server fell silent for {self._connection.timeout or 0:.3g} s")
        return NotNow(UNAVAILABLE, f"the connection broke before the answer was complete: {_reason(error)}")


# From the kernel: after 30 s of silence a probe every 10 s, three of them, so that a host that vanished does not look like a long queue.
_SOCKET_OPTIONS: list[tuple[int, int, int | bytes]] = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]


def _connection(url: Url, connect_seconds: float, address: str | None = None) -> urllib3.connection.HTTPConnection:
    host = (url.host or "").strip("[]")
    options: dict[str, Any] = {"timeout": connect_seconds, "socket_options": _SOCKET_OPTIONS}
    if url.scheme == "https":
        return urllib3.connection.HTTPSConnection(address or host, url.port, server_hostname=host, **options)
    return urllib3.connection.HTTPConnection(address or host, url.port, **options)


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words: the innermost error says it best."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:MESSAGE_CHARACTERS]


# ---------------------------------------------------------------- what a refusal says


def retry_after(response: urllib3.HTTPResponse) -> float | None:
    """Seconds, at most an hour, of a Retry-After header in either of its forms; None if there is none that can be read."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):  # a date before the first or after the last there is
            return None
    return min(3600.0, max(0.0, seconds)) if math.isfinite(seconds) else None


def said(body: bytes, content_type: str, secrets: tuple[str, ...] = ()) -> str:
    """What a server says is wrong, on one line, limited, without secrets or paths of its own; empty if it says nothing."""
    text = body.decode(errors="replace")
    if "html" in content_type:
        text = re.sub(r"<[^>]*>", " ", text)
    # What is no JSON is plain text, and the message itself.
    with contextlib.suppress(ValueError, RecursionError):
        text = message_in(json.loads(text)) or text
    text = re.sub(r"(?<![\w.:/])(?:/[\w.@+~-]+){3,}", "(path)", redact(text, secrets))
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…"


def message_in(answer: Any) -> str:
    """The message in any of the shapes met: a string; `error` or `detail` as string, object or list; a `message`."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list):
        return "; ".join(filter(None, map(message_in, answer)))
    if not isinstance(answer, dict):
        return ""
    return next(filter(None, (message_in(answer.get(name)) for name in ("error", "detail", "message", "msg"))), "")
