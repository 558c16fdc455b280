"""waitress with this service's limits: problem bodies for what it refuses itself, and an end in two steps, drain then stop.

In the order of a request: the loop, which replaces waitress' own, notices what can be read and written; the parser takes the request
in, as far as there is room for its body; a task has the application answer it. The threads keep together on one core.
"""

import contextlib
import logging
import math
import os
import random
import re
import resource
import select
import selectors
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from socket import AF_INET, AF_INET6, SO_LINGER, SOL_SOCKET, create_server, socket
from typing import Any

import msgspec
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.utilities
import waitress.wasyncore

from ai_internal.telemetry import begin_request, trace_id

log = logging.getLogger("ai_service.server")
# One line for each request, where LOG_REQUESTS asks for them.
requests_log = logging.getLogger("ai_service.requests")
requests_log.setLevel(logging.WARNING)

# Beyond this, or as many as the system lets this process have, those that were silent longest are let go for new ones.
MAX_CONNECTIONS = 10_000
# Descriptors for everything but the connections of clients.
SPARE_FILES = 300
MAX_HEAD_BYTES = 1 << 16
# waitress cuts the rest of what came anew for each chunk: 128 KB of chunks of a byte took 0.25 s of the loop, in pieces of this 0.1 s.
CHUNKS_AT_ONCE_BYTES = 1 << 14
# Sizes and line ends of chunks, beyond as many as there are bytes in them: 60,000 chunks of a byte, one for each token of some JSON.
MAX_FRAMING_BYTES = 1 << 18
# The longest of these lines, and all trailers.
MAX_CHUNK_LINE_BYTES = 1 << 13
# What an honest line carries at least. 32 MB take it half an hour.
PACE_BYTES_PER_SECOND = 1 << 14
# How long a request may wait for a thread: less than the threads wait for PostgreSQL, or those behind them would do so after them.
QUEUE_SECONDS = 4.0
CHECK_SECONDS = 1.0
# Bodies and answers over this size are counted until they were handled, and sent.
LARGE_BYTES = 1 << 18
# Larger bodies are not copied for their head.
HEAD_JOINS_BYTES = 1 << 16
# What waitress calls that a socket can be read, written, or both.
POLLED = {1: select.POLLIN, 2: select.POLLOUT, 3: select.POLLIN | select.POLLOUT}
CORE_SECONDS = 2.0
# Columns of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5)).
BUSY, INTERRUPTS = (0, 1, 2, 5, 6, 7), (5, 6)
TICKS = os.sysconf("SC_CLK_TCK")
# How many connections may wait for being accepted.
BACKLOG = 1024
# After the listener closed: how long requests and answers under way may take, in seconds.
LAST_ANSWERS_SECONDS = 10.0


def listen(host: str, port: int) -> socket:
    """A listening socket. Raises OSError."""
    return create_server((host, port), family=AF_INET6 if ":" in host else AF_INET, backlog=BACKLOG)


def connection_limit() -> int:
    """How many connections this process may have; it first asks the system for as many files as it may."""
    wanted = MAX_CONNECTIONS + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(SPARE_FILES, min(MAX_CONNECTIONS, soft - SPARE_FILES))


OVER_BUDGET = "too many large bodies and answers are in hand"
NO_THREAD = "too many requests are in hand"


class Unavailable(waitress.utilities.Error):  # type: ignore[misc]
    """Later."""

    code, reason = 503, "Service Unavailable"


class Unauthorized(waitress.utilities.Error):  # type: ignore[misc]
    """Not to who showed no token that is known."""

    code, reason = 401, "Unauthorized"


def refusal(server: Any, error: Any) -> tuple[str, list[tuple[str, str]], bytes]:
    """An answer of the server's own: status, headers, body."""
    beside = {401: [("WWW-Authenticate", "Bearer")], 503: [("Retry-After", "1")]}.get(error.code, [])
    body = msgspec.json.encode(server.problem(error.code, error.reason))
    return f"{error.code} {error.reason}", [("Content-Type", "application/problem+json"), *beside], body


# What a browser is told with every answer that says nothing else of it: do not guess, do not keep, run and frame nothing, tell nobody.
GUARDS = (
    b"Cache-Control: no-store\r\n",
    b"Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\n",
    b"Referrer-Policy: no-referrer\r\n",
    b"X-Content-Type-Options: nosniff\r\n",
)
_GUARDED = [(b"\r\n" + guard.partition(b" ")[0], guard) for guard in GUARDS]


def complete_head(head: bytes, request_id: str) -> bytes:
    """The head of an answer with what is missing of the guards, and with the id of its request.

    Done in bytes: waitress takes 2 µs for each header it is given.
    """
    guards = [guard for name, guard in _GUARDED if name not in head]
    return b"".join([head[:-2], *guards, b"X-Request-ID: ", request_id.encode(), b"\r\n\r\n"])


# waitress has no types.
class ProblemTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """What waitress refuses before the application sees it, as a problem body."""

    def build_response_header(self) -> bytes:
        """The head of the answer, completed."""
        self.channel.status = self.status
        return complete_head(super().build_response_header(), self.channel.request_id)

    def execute(self) -> None:
        """Writes the answer and closes the connection."""
        self.status, headers, body = refusal(self.channel.server, self.request.error)
        self.response_headers += [*headers, ("Connection", "close")]
        self.content_length = len(body)
        self.close_on_finish = True
        self.write(body)


class ByteBudget:
    """How many bytes of large bodies and answers may be in hand at once: each is several times in memory while it is handled."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = self._left = limit_bytes
        self._lock = threading.Lock()

    def take(self, count: int, *, must: bool = False) -> bool:
        """Whether there was room for so many bytes, or they `must` find it; they are taken then. Alone anything finds room."""
        with self._lock:
            if count > self._left < self._limit and not must:
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        """Gives so many bytes back."""
        with self._lock:
            self._left += count


class Task(waitress.task.WSGITask):  # type: ignore[misc]
    """A request for the application; while the server drains its connection is not kept."""

    taken = 0

    def service(self) -> None:
        """Answers; what room a large answer has it keeps until its client has read it."""
        try:
            super().service()
        finally:
            self.channel.hold(self.taken)

    def build_response_header(self) -> None:
        """Leaves the head of the answer with the channel: it goes out with what is written next."""
        if self.channel.server.draining:
            self.request.headers["CONNECTION"] = "close"
        self.channel.status = self.status
        self.channel.head = complete_head(super().build_response_header(), self.channel.request_id)

    def write(self, data: bytes) -> None:
        """Sends a part of the body, or the head alone where there is none. A large one that finds no room becomes a refusal."""
        if len(data) > LARGE_BYTES and not self.wrote_header and not self._fits_budget(len(data)):
            self.status, headers, data = refusal(self.channel.server, Unavailable(OVER_BUDGET))
            self.response_headers, self.content_length = headers, len(data)
        super().write(data)
        self.channel.write_soon(b"")

    def _fits_budget(self, size: int) -> bool:
        """The room of the request's body serves for its answer. What has changed something is told in any case."""
        more = max(0, size - self.request.taken)
        fits: bool = self.channel.server.adj.budget.take(more, must=self.request.command not in ("GET", "HEAD"))
        if fits:
            self.taken, self.request.taken = self.request.taken + more, 0
        return fits


class DiscardBuffer:
    """Where a body goes that is refused on its way: a client that is still sending would not see the answer."""

    def append(self, data: bytes) -> None:
        """Forgets it."""

    def close(self) -> None:
        """Nothing was kept."""

    def __len__(self) -> int:
        return 0


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """Refuses a body over the limit as soon as it is announced or has arrived; waitress would count the framing of chunks too.

    A large body takes its share of the server's room as it arrives: what is only announced keeps nobody out. One that does not come with
    its head is kept for those only whom the application would hear.
    """

    error: Any = None
    taken = 0
    refused: Any = None
    admitted = False

    def received(self, data: bytes) -> int:
        """Takes in what came and returns how much of it was used."""
        if self.chunked:
            data = data[:CHUNKS_AT_ONCE_BYTES]
        try:
            used: int = super().received(data)
        except ValueError:  # waitress lets some through: a broken IPv6 address as host, a length of 5,000 digits
            self.error, self.completed = waitress.utilities.BadRequest("the request line or a header cannot be read"), True
            return len(data)
        if not self.error and (framing_error := self._framing_error()):
            self.error, self.completed = waitress.utilities.BadRequest(framing_error), True
        limit = self.adj.body_limit_bytes
        if not self.error and (self.content_length > limit or (self.body_rcv is not None and len(self.body_rcv) > limit)):
            self.error, self.completed = waitress.utilities.RequestEntityTooLarge("the body is too large"), True
        if self.body_rcv is not None and not self.error:
            self._check_body()
        if self.error:
            # Or waitress would ask for the body all the same.
            self.expect_continue = False
        return used

    def _framing_error(self) -> str | None:
        """What is wrong with the ways in which a body can tell its length. A proxy before us may have believed another one."""
        if "TRANSFER_ENCODING" in self.headers:  # waitress leaves it there where it has not heeded it (RFC 9112, 6.1)
            return "only HTTP/1.1 has Transfer-Encoding"
        if not self.chunked or self.completed:
            return None
        if "CONTENT_LENGTH" in self.headers:
            return "Content-Length and Transfer-Encoding exclude each other"
        if max(len(self.body_rcv.control_line), len(self.body_rcv.trailer)) > MAX_CHUNK_LINE_BYTES:
            return "a chunk's first line, or what follows the last one, is too long"
        framing = self.body_bytes_received - len(self.body_rcv)
        return "the chunks are too small" if framing > len(self.body_rcv) + MAX_FRAMING_BYTES and not self.refused else None

    def _check_body(self) -> None:
        if not (self.completed or self.admitted or self.refused):
            self.admitted = self.adj.admits(self.headers.get("AUTHORIZATION"))
            self._refuse_unless(self.admitted, Unauthorized("unknown"))
        size = len(self.body_rcv)
        if size > max(self.taken, LARGE_BYTES) and not self.refused:
            self._refuse_unless(self.adj.budget.take(size - self.taken), Unavailable(OVER_BUDGET))
            self.taken = 0 if self.refused else size
        if self.refused and self.completed:
            self.error = self.refused

    def _refuse_unless(self, may_come: bool, error: Any) -> None:  # noqa: FBT001  what was found out
        """What comes of a refused body is let go as it comes."""
        if not may_come:
            self.refused = error
            self.close()
            self.body_rcv.buf = DiscardBuffer()

    def close(self) -> None:
        """Forgets the body."""
        super().close()
        self.adj.budget.give_back(self.taken)
        self.taken = 0


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection. It tells the loop itself what it waits for: waitress would ask all of them before each turn."""

    task_class = Task
    error_task_class = ProblemTask
    parser_class = Parser
    head = b""
    held = 0
    # Bytes that came and went; requests that came whole, and answers that were written.
    bytes_moved = ended = 0
    queued_at = 0.0
    # Of the request that is being answered; no status before the head of its answer.
    request_id = status = ""

    def __init__(self, server: Any, *arguments: Any, **named: Any) -> None:
        self.loop = server.loop
        self._seen = (0, 0, time.monotonic())
        super().__init__(server, *arguments, **named)
        self.server = _Waker(server, self)

    def add_channel(self, map: Any = None) -> None:  # noqa: A002  waitress' own name
        """Begins to be watched. waitress calls this before the socket is known to be one."""
        super().add_channel(map)
        self.loop.changed.append(self)

    def del_channel(self, map: Any = None) -> None:  # noqa: A002  waitress' own name
        """Is watched no more."""
        self.loop.forget(self._fileno)
        super().del_channel(map)
        # No circle is left behind that would keep the payloads.
        if isinstance(self.server, _Waker):
            self.server = self.server.server

    def received(self, data: bytes) -> bool:
        """Takes in what came."""
        self.bytes_moved += len(data)
        taken: bool = super().received(data)
        self.ended += self.request is None
        return taken

    def send(self, data: bytes, do_close: bool = True) -> int:  # noqa: FBT001, FBT002  waitress' own name
        """Hands over to the system, and returns how much it took."""
        sent: int = super().send(data, do_close=do_close)
        self.bytes_moved += sent
        return sent

    def is_stalled(self, now: float) -> bool:
        """Whether a request has been on its way in, or an answer out, for long and at less than the pace. Asked now and then."""
        ended, bytes_moved, since = self._seen
        under_way = self.total_outbufs_len or (self.request is not None and self.readable())
        if not under_way or self.ended != ended or self.bytes_moved - bytes_moved >= self.adj.stall_seconds * PACE_BYTES_PER_SECOND:
            self._seen = (self.ended, self.bytes_moved, since := now)
        return bool(now - since > self.adj.stall_seconds)

    def drop(self) -> None:
        """Closes the connection at once, with all that the system still holds for it. Called by the loop."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.handle_close()

    def service(self) -> None:
        """Answers a request, with a refusal where it waited long; those behind it are forgotten when the client has gone."""
        request, queued_at, self.status = self.requests[0], self.queued_at, ""
        trace = request.headers.get("TRACEPARENT")
        facts = {"trace_id": known} if trace and (known := trace_id(trace)) else {}
        self.request_id = begin_request(request.headers.get("X_REQUEST_ID"), **facts)
        if time.monotonic() - queued_at > QUEUE_SECONDS and not request.error:
            request.error = Unavailable(NO_THREAD)
        super().service()
        self.ended += 1
        if requests_log.isEnabledFor(logging.INFO):
            self._log_answer(request, time.monotonic() - queued_at)
        if not self.connected:
            with self.requests_lock:
                for request in self.requests:
                    request.close()
                self.requests.clear()

    def _log_answer(self, request: Any, seconds: float) -> None:
        # A request line that cannot be read has neither; a client that had gone gets no status.
        method, path = getattr(request, "command", None), getattr(request, "path", "")
        status = int(self.status[:3]) if self.status else None
        requests_log.info(
            "request_answered method=%s path=%r status=%s seconds=%.3f client=%s", method, path, status, seconds, self.addr[0]
        )

    def hold(self, count: int) -> None:
        """Keeps the room of an answer until its last byte was sent."""
        with self.outbuf_lock:
            self.held += count
            self._return_budget()

    def handle_write(self) -> None:
        """Sends more of what waits."""
        super().handle_write()
        with self.outbuf_lock:
            self._return_budget()

    def handle_close(self) -> None:
        """The client has gone, or is let go; a request that has not come whole will not."""
        if self.request is not None:
            self.request.close()
        super().handle_close()
        with self.outbuf_lock:
            self._return_budget()

    def _return_budget(self) -> None:
        if self.held and not self.total_outbufs_len:
            self.adj.budget.give_back(self.held)
            self.held = 0

    def write_soon(self, data: bytes | None) -> int:
        """Sends what is written, after the head where that is still held back: one call of the system, one packet."""
        if data is None:
            return 0
        head, self.head = self.head, b""
        if head and len(data) > HEAD_JOINS_BYTES:
            super().write_soon(head)
            head = b""
        return int(super().write_soon(head + data if head else data))


class _Waker:
    """The server as a channel sees it: it wakes the loop only for what changes what the channel waits for.

    waitress would wake it after every answer, though the connection is watched for the next request already.
    """

    def __init__(self, server: Any, channel: Channel) -> None:
        self.server, self._channel = server, channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def add_task(self, channel: Channel) -> None:
        """Queues the next request of a channel. What is refused, and what `separate` names, waits for no other kind."""
        request, channel.queued_at = channel.requests[0], time.monotonic()
        threads = self.server.refusing if request.error else self.server.separate.get(request.path, self.server.task_dispatcher)
        threads.add_task(channel)

    def pull_trigger(self) -> None:
        """Called by the thread that answers."""
        if self._channel.writable() or not self._channel.loop.reads(self._channel):
            self._channel.loop.changed.append(self._channel)
            self._channel.loop.wake()


class Loop:
    """Waits for all sockets of a server at once. A turn costs what happens in it, however many connections are idle."""

    def __init__(self, server: Any) -> None:
        self._server, self._selector = server, selectors.DefaultSelector()
        self._watched: dict[int, int] = {}
        self.changed: deque[Any] = deque([server.trigger])
        self._check_at = 0.0
        # A signal handler writes to it: it must not wait for the loop it interrupts.
        os.set_blocking(server.trigger.trigger, False)

    def run_once(self, seconds: float) -> None:
        """Serves what is ready, after so many seconds at most."""
        self._watch(self._server)
        while self.changed:
            self._watch(self.changed.popleft())
        for key, ready in self._selector.select(seconds):
            each = self._server._map.get(key.fd)  # noqa: SLF001  waitress has no public name for it
            if each is not None:
                waitress.wasyncore.readwrite(each, POLLED[ready])
                self._watch(each)
        # After what came was read: that nobody looked for a while is not the clients' fault.
        if (now := time.monotonic()) >= self._check_at:
            self._check_at = now + CHECK_SECONDS
            self._check_channels(now)

    def wake(self) -> None:
        """Ends a turn that waits. Called by other threads and by signals."""
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            self._server.trigger.pull_trigger()

    def reads(self, channel: Channel) -> bool:
        """Whether the next request on a connection would be noticed."""
        return bool(self._watched.get(channel._fileno, 0) & selectors.EVENT_READ)  # noqa: SLF001

    def forget(self, fd: int) -> None:
        """Stops watching a socket, which is still open."""
        if self._watched.pop(fd, 0):
            self._selector.unregister(fd)

    def _check_channels(self, now: float) -> None:
        """Lets go who moves too little, and at the limit the half that was silent longest; refuses what waited long for a thread."""
        channels = list(self._server.active_channels.values())
        leaving = [channel for channel in channels if channel.is_stalled(now)]
        if self._server.in_connection_overflow:
            silent = sorted((channel for channel in channels if not channel.requests), key=lambda channel: channel.last_activity)
            leaving += silent[: len(channels) // 2]
        for channel in set(leaving):
            channel.drop()
        # waitress marks those that were silent for two minutes.
        self.changed.extend(channel for channel in channels if channel.will_close)
        for channel in self._take_late(now - QUEUE_SECONDS):
            self._server.refusing.add_task(channel)

    def _take_late(self, queued_before: float) -> list[Channel]:
        """Channels that no thread has come to, out of the queue."""
        dispatcher, late = self._server.task_dispatcher, []
        with dispatcher.lock:
            while dispatcher.queue and dispatcher.queue[0].queued_at < queued_before:
                late.append(dispatcher.queue.popleft())
        return late

    def _watch(self, each: Any) -> None:
        fd = each._fileno  # noqa: SLF001
        if fd is None:
            return
        wanted = selectors.EVENT_READ * bool(each.readable()) | selectors.EVENT_WRITE * bool(each.writable() and not each.accepting)
        if wanted == self._watched.get(fd, 0):
            return
        with contextlib.suppress(OSError, KeyError):  # closed by another thread just now
            self.forget(fd)
            if wanted:
                self._selector.register(fd, wanted)
                self._watched[fd] = wanted


class Core:
    """Keeps the threads of this process to one core, and moves them when another has less to do.

    Python runs one of them at a time, so a second core brings it little, and waking a thread on another core costs: 40 µs on a virtual
    machine of two cores against 3 µs on the same one, several times for each request. With it one process answered 1.8 times as many.
    """

    def __init__(self, cores: Collection[int], stat: Path = Path("/proc/stat")) -> None:
        self._cores, self._stat = sorted(cores), stat
        self._busy, self._own, self._rebalance_at = self._ticks(BUSY), time.process_time(), 0.0
        # Where a disk or a network card interrupts, a fifth less is done.
        interrupted = self._ticks(INTERRUPTS)
        self.number = min(self._cores, key=lambda core: interrupted.get(core, 0))
        self._pin_threads()

    def rebalance(self, now: float) -> None:
        """Every two seconds: whether what others run here is more than elsewhere, and a move by chance if so: others may do the same."""
        if now < self._rebalance_at:
            return
        self._rebalance_at = now + CORE_SECONDS
        busy, own = self._ticks(BUSY), time.process_time()
        load: dict[int, float] = {core: busy[core] - self._busy.get(core, 0) for core in self._cores if core in busy}
        if self.number in load:
            load[self.number] -= (own - self._own) * TICKS
            best = min(load, key=lambda core: load[core])
            if load[self.number] - load[best] > CORE_SECONDS * TICKS / 4 and random.random() < 0.5:
                self.number = best
                self._pin_threads()
        self._busy, self._own = busy, own

    def _ticks(self, columns: Sequence[int]) -> dict[int, int]:
        """How long each core has done these things since the system started."""
        try:
            text = self._stat.read_text()
        except OSError:
            return {}
        lines = (line.split() for line in text.splitlines() if re.match(r"cpu\d", line))
        return {int(name[3:]): sum(int(fields[column]) for column in columns) for name, *fields in lines}

    def _pin_threads(self) -> None:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # one that has just ended
                os.sched_setaffinity(int(thread.name), {self.number})


def _waitress_server(app: Any, listener: socket, threads: int, max_body_bytes: int) -> Any:
    server = waitress.server.create_server(
        app,
        sockets=[listener],
        threads=threads,
        connection_limit=connection_limit(),
        max_request_header_size=MAX_HEAD_BYTES,
        # A client that hangs up is only noticed while its connection is read: hence one request of look-ahead.
        channel_request_lookahead=1,
        # By default 8 KB: a batch of 100 jobs came in 14 turns of the loop.
        recv_bytes=1 << 17,
        max_request_body_size=2 * max_body_bytes + (1 << 20),
        # What is counted as memory is memory: no files on the way, for which a container may have no place.
        inbuf_overflow=2 * max_body_bytes,
        outbuf_overflow=1 << 40,
        ident=None,
    )
    server.channel_class = Channel
    server.adj.body_limit_bytes = max_body_bytes
    server.draining = False
    return server


class Server:
    """Serves a WSGI application on a listening socket until it is told to end.

    `problem` makes the body for an HTTP status that waitress answers itself. `max_body_bytes` holds for chunked bodies too,
    `max_bodies_bytes` for all large ones in hand together, answers too. Who moves less than 16 KB a second of a request or an answer for
    `stall_seconds` is let go. Each path in `separate` has two threads of its own, so that its requests wait for no others.
    `drain` is called once, when the end begins; the listener closes `drain_seconds` later. With `one_core` its threads, and those started
    later, stay together on a core.
    """

    def __init__(
        self,
        app: Any,
        listener: socket,
        *,
        threads: int,
        max_body_bytes: int,
        max_bodies_bytes: int,
        stall_seconds: float,
        separate: Collection[str],
        admits: Callable[[str | None], bool],
        problem: Callable[[int, str], dict[str, object]],
        drain: Callable[[], None],
        drain_seconds: float,
        one_core: bool,
    ) -> None:
        self._drain, self._drain_seconds = drain, drain_seconds
        cores = os.sched_getaffinity(0) if one_core and hasattr(os, "sched_getaffinity") else ()
        self._core = Core(cores) if len(cores) > 1 else None
        self._end_calls, self._closes_at = 0, math.inf
        self._waitress = _waitress_server(app, listener, threads, max_body_bytes)
        self._waitress.loop = self._loop = Loop(self._waitress)
        self._waitress.adj.budget = ByteBudget(max(max_bodies_bytes, max_body_bytes))
        self._waitress.adj.stall_seconds = stall_seconds
        self._waitress.adj.admits = admits
        self._waitress.refusing = self._threads(2)
        self._waitress.separate = {path: self._threads(2) for path in separate}
        self._waitress.problem = problem

    @staticmethod
    def _threads(count: int) -> Any:
        dispatcher = waitress.task.ThreadedTaskDispatcher()
        dispatcher.set_thread_count(count)
        return dispatcher

    def end(self, *_signal: object) -> None:
        """Called once, the server drains; called again, it closes now. A signal handler: it may interrupt anything, so it only counts."""
        self._end_calls += 1
        self._loop.wake()

    def run(self) -> None:
        """Returns when the listener has closed and what was being answered has been."""
        while True:
            self._follow_signals()
            if self._core:
                self._core.rebalance(time.monotonic())
            left = self._closes_at - time.monotonic()
            if left <= 0:
                break
            self._loop.run_once(min(1.0, left))
        self._close_listener()
        deadline = time.monotonic() + LAST_ANSWERS_SECONDS
        # What has come by now is read before anybody asks whether there is something left to do.
        self._loop.run_once(0.1)
        while self._is_busy() and time.monotonic() < deadline:
            self._loop.run_once(0.1)
        self._waitress.task_dispatcher.shutdown()
        for threads in (self._waitress.refusing, *self._waitress.separate.values()):
            threads.shutdown()

    def _follow_signals(self) -> None:
        if self._end_calls > 1:
            self._closes_at = 0.0
        if self._end_calls and not self._waitress.draining:
            self._waitress.draining = True
            log.info("service_draining seconds=%g", self._drain_seconds)
            self._drain()
            self._closes_at = min(self._closes_at, time.monotonic() + self._drain_seconds)

    def _close_listener(self) -> None:
        """Connections that wait are accepted first: the close would reset them, and the requests that they have sent."""
        for _ in range(BACKLOG):
            self._waitress.handle_accept()
        waitress.wasyncore.dispatcher.close(self._waitress)

    def _is_busy(self) -> bool:
        channels = list(self._waitress.active_channels.values())
        return any(channel.requests or channel.request or channel.total_outbufs_len for channel in channels)
