"""One HTTP request to a model service that can be called off at any moment: what the providers share.

A blocked read can look at neither a clock nor an event, and a peer that trickles bytes defeats any read timeout. So every exchange has a
connection of its own and a watcher, which shuts the socket down at the limit or on cancellation: that wakes the reader at once, and the
server sees its client go. A connection of its own also means that no idle one goes stale (vLLM closes them after 5 s). Redirects are not
followed and proxy variables are not read.

Sections: the exchange, requests, error responses, usage.
"""

import contextlib
import http.client
import json
import math
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import attrs
import urllib3.connection
import urllib3.exceptions
from urllib3.util import Url

from providers import (
    CANCELLED,
    CONTEXT_LENGTH_EXCEEDED,
    INTERNAL,
    INVALID_INPUT,
    INVALID_OUTPUT,
    RATE_LIMITED,
    TIMEOUT,
    UNAUTHORIZED,
    UNAVAILABLE,
    Job,
    Never,
    NotNow,
    redact,
)

CONNECT_SECONDS = 5.0
"""Limit for reaching a server, its address's lookup not counted."""
MAX_ADDRESSES = 4
"""How many addresses of a host are tried, within that limit altogether."""
MESSAGE_CHARACTERS = 500
"""How much of a server's error text is kept."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Where an answer without end is given up; a result may have 32 MiB."""
CHECK_SECONDS = 2.5
"""Limit of a check, below that of the contract, so that it can say itself why it ended."""
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
        self._deadline = time.monotonic() + limit_seconds
        self._limit_seconds = limit_seconds
        self._idle_seconds = min(idle_seconds, limit_seconds)
        self._cancelled = cancelled or threading.Event()
        self._connection = _connection(url, min(CONNECT_SECONDS, limit_seconds))
        self._socket: socket.socket | None = None
        self._response: urllib3.HTTPResponse | None = None
        self._ended = threading.Event()
        self._abort_reason: NotNow | None = None

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
        is_network_error = isinstance(error, urllib3.exceptions.HTTPError | http.client.HTTPException | OSError)
        if self._abort_reason and (is_network_error or isinstance(error, NotNow)):
            raise self._abort_reason from None
        if is_network_error and error is not None:
            raise self._network_error(error) from None

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | Iterable[bytes] | None = None) -> urllib3.HTTPResponse:
        """Send the request and wait for the head of its answer, whatever its status. A body in pieces needs a Content-Length."""
        self._set_timeout(self._deadline - time.monotonic())
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
            self._raise_if_aborted()
            yield block
            self._set_timeout(self._idle_seconds)
            size += len(block)
            if size > max_bytes:
                raise NotNow(INVALID_OUTPUT, f"gave up an answer of more than {max_bytes} bytes")
        self._raise_if_aborted()

    def _raise_if_aborted(self) -> None:
        # Our own abort looks like the end of a body that came without its length.
        if self._abort_reason:
            raise self._abort_reason

    def _connect(self) -> None:
        """Connect to the first of a few addresses that lets us. Raises `NotNow` when none does."""
        connect_deadline = min(self._deadline, time.monotonic() + CONNECT_SECONDS)
        for address in self._addresses[:MAX_ADDRESSES] or (None,):
            if self._cancelled.is_set():
                raise cancellation("before it ran")
            self._connection = _connection(self._url, seconds_until(connect_deadline), address)
            try:
                return self._connection.connect()
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
                self._connection.close()
                reason = _describe_error(error)
        category = TIMEOUT if time.monotonic() >= self._deadline else UNAVAILABLE
        origin = self._url._replace(auth=None, path=None, query=None).url
        raise NotNow(category, f"cannot reach {origin}: {reason}", burns_attempt=False)

    def set_idle_limit(self, idle_seconds: float) -> None:
        """From the next piece on, how long the answer may pause."""
        self._idle_seconds = min(idle_seconds, self._limit_seconds)

    def _set_timeout(self, seconds: float) -> None:
        """How long one read or write may take. `getresponse` takes it from the connection, everything else from the socket."""
        self._connection.timeout = max(0.0, seconds) + 0.1  # the watcher knows better why a limit was reached, so it comes first
        if self._socket is not None:
            self._socket.settimeout(self._connection.timeout)

    def _watch(self) -> None:
        while not self._cancelled.wait(min(0.05, max(0.0, self._deadline - time.monotonic()))):
            if self._ended.is_set():
                return
            if time.monotonic() >= self._deadline:
                self._abort(NotNow(TIMEOUT, f"no complete answer within {self._limit_seconds:.3g} s"))
                return
        self._abort(cancellation())

    def _abort(self, why: NotNow) -> None:
        self._abort_reason = why
        if self._socket is not None and not self._ended.is_set():
            # Not SSLSocket.shutdown: it takes the TLS state away from under the thread that reads. An error means: closed already.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _network_error(self, error: BaseException) -> NotNow:
        # The request was on its way, so the server may have worked on it, or died of it: these burn an attempt.
        if isinstance(error, TimeoutError | urllib3.exceptions.ReadTimeoutError):
            return NotNow(TIMEOUT, f"the server fell silent for {self._connection.timeout or 0:.3g} s")
        return NotNow(UNAVAILABLE, f"the connection broke before the answer was complete: {_describe_error(error)}")


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


def _describe_error(error: BaseException) -> str:
    """What went wrong, in a few words: the innermost error says it best."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:MESSAGE_CHARACTERS]


# ---------------------------------------------------------------- requests


def request_headers(accept: str, authorization: str | None, job: Job | None = None) -> dict[str, str]:
    """The headers of every request to a model service: its credentials, and the trace of the attempt."""
    headers = {"Accept": accept, "Accept-Encoding": "identity", "User-Agent": "ai-service"}
    if authorization:
        headers["Authorization"] = authorization
    if job and job.traceparent and re.fullmatch(r"[0-9a-f-]{1,200}", job.traceparent):
        headers["traceparent"] = job.traceparent
    return headers


def request_id(job: Job) -> str:
    """An id for one request. Unique, because an attempt that was released has the same number again."""
    return f"{job.id}-{job.attempt}-{secrets.token_hex(4)}"


def deadline_after(job: Job, seconds: float) -> float:
    """When these seconds are over or the job's deadline comes, on `time.monotonic()`'s clock."""
    return min(time.monotonic() + seconds, math.inf if job.deadline is None else job.deadline)


def seconds_until(moment: float) -> float:
    """The seconds until then, never 0: a timeout of 0 would mean not to block."""
    return max(0.001, moment - time.monotonic())


def cancellation(when: str = "while it ran") -> NotNow:
    """The outcome of a cancelled job. Its attempt is not counted."""
    return NotNow(CANCELLED, f"the job was cancelled {when}", burns_attempt=False)


# ---------------------------------------------------------------- error responses


@attrs.frozen(kw_only=True)
class ErrorResponse:
    """What a server says instead of an answer, or in the middle of one."""

    status: int | None
    """Of HTTP; in a stream the `code` of the error, None if it has none."""
    text: str
    """What it says, cleaned and in short."""
    kind: str | None = None
    """The error's `type`."""
    body: bytes = attrs.field(default=b"", repr=False)
    """All that it says, up to MAX_ERROR_BYTES, as it came."""
    retry_in_seconds: float | None = None
    in_stream: bool = False
    """Whether it came in a stream of status 200."""
    has_output: bool = False
    """Whether some of the answer had come before it."""

    @property
    def message(self) -> str:
        """It as a sentence."""
        if self.status is None:
            return f"the server gave up: {self.text or 'no reason given'}"
        return f"the server answered {self.status}: {self.text or http.client.responses.get(self.status, 'no reason given')}"


def read_error(response: urllib3.HTTPResponse, secrets: tuple[str, ...]) -> ErrorResponse:
    """Read the refusal in a response whose status is one."""
    body = response.read(MAX_ERROR_BYTES)
    text = error_text(body, response.headers.get("content-type", ""), secrets)
    return ErrorResponse(status=response.status, text=text, body=body, retry_in_seconds=retry_after(response))


_OUTCOMES_BY_STATUS = {
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


def outcome_by_status(error: ErrorResponse, settings_by_status: Mapping[int, str]) -> NotNow | Never:
    """What a refusal means by its status alone, which says nothing in a stream without one: internal.

    `settings_by_status` names the settings to look at for a status, or for all that begin with a
    digit. In a stream, work has been done: an attempt is burnt.
    """
    status = error.status or 500
    setting = settings_by_status.get(status) or settings_by_status.get(status // 100)
    message = f"{error.message} (look at {setting})" if setting else error.message
    if 400 <= status < 500 and status not in _OUTCOMES_BY_STATUS:
        too_long = re.search(r"maximum context length|max_model_len|context_length_exceeded", error.text)
        return Never(CONTEXT_LENGTH_EXCEEDED if too_long else INVALID_INPUT, message)
    category, burns = _OUTCOMES_BY_STATUS.get(status, (INTERNAL, True) if status >= 500 else (UNAVAILABLE, False))
    return NotNow(category, message, retry_in_seconds=error.retry_in_seconds, burns_attempt=burns or error.in_stream)


MAX_RETRY_AFTER_SECONDS = 3_600.0


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
    return min(MAX_RETRY_AFTER_SECONDS, max(0.0, seconds)) if math.isfinite(seconds) else None


def error_text(body: bytes, content_type: str, secrets: tuple[str, ...] = ()) -> str:
    """What a server says is wrong, on one line, limited, without secrets or paths of its own; empty if it says nothing."""
    text = body.decode(errors="replace")
    if "html" in content_type:
        text = re.sub(r"<[^>]*>", " ", text)
    # What is no JSON is plain text, and the message itself.
    with contextlib.suppress(ValueError, RecursionError):
        text = error_message(json.loads(text)) or text
    text = re.sub(r"(?<![\w.:/])(?:/[\w.@+~-]+){3,}", "(path)", redact(text, secrets))
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…"


def error_message(answer: Any) -> str:
    """The message in any of the shapes met: a string; `error` or `detail` as string, object or list; a `message`."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list):
        return "; ".join(filter(None, map(error_message, answer)))
    if not isinstance(answer, dict):
        return ""
    return next(filter(None, (error_message(answer.get(name)) for name in ("error", "detail", "message", "msg"))), "")


# ---------------------------------------------------------------- usage

TOKEN_COUNTS = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
"""The token counts of usage: our name, and the other one servers use."""
MAX_TOKEN_COUNT = 10**15
"""The service takes no larger one, and refuses a result with it."""
MAX_RAW_BYTES = 3_000
"""Usage may have MAX_NOTE_BYTES, with our own members and the worker's."""


def token_counts(reported: Mapping[str, Any]) -> dict[str, int]:
    """The usable token counts in what a server counted, under our names; ours win over theirs."""
    given = [(ours, reported.get(name)) for ours, theirs in TOKEN_COUNTS.items() for name in (theirs, ours)]
    return {name: count for name, count in given if type(count) is int and 0 <= count <= MAX_TOKEN_COUNT}


def raw_usage(reported: Mapping[str, Any]) -> dict[str, Any]:
    """What a server counted as the member `raw`; nothing where it is empty, too big to be stored, or no JSON."""
    try:
        fits = len(reported) > 0 and len(json.dumps(reported, allow_nan=False, ensure_ascii=False).encode()) <= MAX_RAW_BYTES
    except ValueError:
        return {}
    return {"raw": reported} if fits else {}
