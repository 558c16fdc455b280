"""waitress with this service's limits: problem bodies for what it refuses itself, and an end in two steps, drain then stop."""

import logging
import math
import time
from collections.abc import Callable
from socket import AF_INET, AF_INET6, create_server, socket
from typing import Any

import msgspec
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.utilities
import waitress.wasyncore

log = logging.getLogger("ai_service.server")

# Idle connections beyond this are not accepted until others close.
MAX_CONNECTIONS = 10_000
# After the listener closed: how long answers under way may take, in seconds.
LAST_ANSWERS_SECONDS = 10.0


def listen(host: str, port: int) -> socket:
    """A listening socket. Raises OSError."""
    return create_server((host, port), family=AF_INET6 if ":" in host else AF_INET, backlog=1024)


# waitress has no types.
class ProblemTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """What waitress refuses before the application sees it, as a problem body."""

    def execute(self) -> None:
        """Writes the answer and closes the connection."""
        body = msgspec.json.encode(self.channel.server.problem(self.request.error.code, self.request.error.reason))
        self.status = f"{self.request.error.code} {self.request.error.reason}"
        self.response_headers += [("Content-Type", "application/problem+json"), ("Connection", "close")]
        self.content_length = len(body)
        self.close_on_finish = True
        self.write(body)


class Task(waitress.task.WSGITask):  # type: ignore[misc]
    """A request for the application; while the server drains its connection is not kept."""

    def build_response_header(self) -> bytes:
        """The head of the answer."""
        if self.channel.server.draining:
            self.request.headers["CONNECTION"] = "close"
        head: bytes = super().build_response_header()
        return head


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """Refuses a body over the limit as soon as it is announced or has arrived; waitress would count the framing of chunks too."""

    error: Any = None

    def received(self, data: bytes) -> int:
        """Takes in what came and returns how much of it was used."""
        try:
            used: int = super().received(data)
        except ValueError:  # waitress lets some through: a broken IPv6 address as host, a length of 5,000 digits
            self.error, self.completed = waitress.utilities.BadRequest("the request line or a header cannot be read"), True
            return len(data)
        if self.chunked and "CONTENT_LENGTH" in self.headers and not self.completed:
            # Two lengths: a proxy before us may have believed the other one (RFC 9112, 6.1).
            self.error, self.completed = waitress.utilities.BadRequest("Content-Length and Transfer-Encoding exclude each other"), True
        limit = self.adj.body_limit_bytes
        if not self.error and (self.content_length > limit or (self.body_rcv is not None and len(self.body_rcv) > limit)):
            self.error, self.completed = waitress.utilities.RequestEntityTooLarge("the body is too large"), True
        return used


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection."""

    task_class = Task
    error_task_class = ProblemTask
    parser_class = Parser


class Server:
    """Serves a WSGI application on a listening socket until it is told to end.

    `problem` makes the body for an HTTP status that waitress answers itself. `max_body_bytes` holds for chunked bodies too.
    `drain` is called once, when the end begins; the listener closes `drain_seconds` later.
    """

    def __init__(
        self,
        app: Any,
        listener: socket,
        *,
        threads: int,
        max_body_bytes: int,
        problem: Callable[[int, str], dict[str, object]],
        drain: Callable[[], None],
        drain_seconds: float,
    ) -> None:
        self._drain, self._drain_seconds = drain, drain_seconds
        self._times_told, self._closes_at = 0, math.inf
        # A client that hangs up is only noticed while its connection is read: hence one request of look-ahead.
        self._waitress = waitress.server.create_server(
            app,
            sockets=[listener],
            threads=threads,
            connection_limit=MAX_CONNECTIONS,
            asyncore_use_poll=True,
            channel_request_lookahead=1,
            # By default 8 KB: a batch of 100 jobs came in 14 turns of the loop.
            recv_bytes=1 << 17,
            max_request_body_size=2 * max_body_bytes + (1 << 20),
            ident=None,
        )
        self._waitress.channel_class = Channel
        self._waitress.adj.body_limit_bytes = max_body_bytes
        self._waitress.problem = problem
        self._waitress.draining = False

    def end(self, *_signal: object) -> None:
        """Told once, the server drains; told again, it closes now. A signal handler: it may interrupt anything, so it only leaves word."""
        self._times_told += 1
        self._waitress.pull_trigger()

    def run(self) -> None:
        """Returns when the listener has closed and what was being answered has been."""
        while (left := self._closes_at - time.monotonic()) > 0:
            self._heed()
            self._loop_once(min(1.0, left))
        waitress.wasyncore.dispatcher.close(self._waitress)
        deadline = time.monotonic() + LAST_ANSWERS_SECONDS
        while self._is_busy() and time.monotonic() < deadline:
            self._loop_once(0.1)
        self._waitress.task_dispatcher.shutdown()

    def _heed(self) -> None:
        if self._times_told > 1:
            self._closes_at = 0.0
        if self._times_told and not self._waitress.draining:
            self._waitress.draining = True
            log.info("service_draining seconds=%g", self._drain_seconds)
            self._drain()
            self._closes_at = min(self._closes_at, time.monotonic() + self._drain_seconds)

    def _loop_once(self, seconds: float) -> None:
        waitress.wasyncore.loop(timeout=seconds, map=self._waitress._map, use_poll=True, count=1)  # noqa: SLF001  waitress' own never ends

    def _is_busy(self) -> bool:
        return any(channel.requests or channel.total_outbufs_len for channel in list(self._waitress.active_channels.values()))
