"""Moves the work of a caller into AI Service, one task type at a time, first mirrored and then for real.

    handover = Handover(service, modes_of(os.environ))  # AI_SERVICE_MODES="call_analysis=mirror, *=off"
    job = NewJob("telephony", "beeline/17", "call_analysis", "qwen2.5-14b", input={"prompt": "Hello"})
    handover.run(job, local=analyse_it_here)

The local function keeps running until its task type is switched to `remote`.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import pickle
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast, get_args

import attrs
from attrs import field, frozen

from ai_client import AIService, Backoff, Job, NewJob, RawJSON, ServiceError, ServiceUnavailable, encode

log = logging.getLogger("ai_service.handover")

T = TypeVar("T")

Mode = Literal["off", "mirror", "remote"]

_TASK_TYPE = re.compile(r"\*|[A-Za-z0-9._:/@+-]{1,100}")

# One kind of trouble is logged this often; the counters have the rest.
_LOG_SECONDS = 60.0
# The clocks of caller and database may differ by so much before a job expires too early.
_CLOCK_SECONDS = 60.0


class ModesError(ValueError):
    """Modes that are none: all problems at once, a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def modes_of(environ: Mapping[str, str], name: str = "AI_SERVICE_MODES") -> dict[str, Mode]:
    """The modes in a setting such as `call_analysis=mirror, transcribe=remote, *=off`; none where it is absent. Raises ModesError."""
    items = (item.partition("=") for item in environ.get(name, "").split(",") if item.strip())
    return _checked([(task_type.strip(), mode.strip()) for task_type, _, mode in items], f"{name}: ")


def _checked(modes: Sequence[tuple[str, str]], where: str = "") -> dict[str, Mode]:
    problems = [f"{task_type!r} is no task type" for task_type, _ in modes if not _TASK_TYPE.fullmatch(task_type)]
    problems += [f"{task_type!r} may be off, mirror or remote, not {mode!r}" for task_type, mode in modes if mode not in get_args(Mode)]
    problems += [f"{task_type!r} is named {times} times" for task_type, times in Counter(name for name, _ in modes).items() if times > 1]
    if problems:
        raise ModesError([where + problem for problem in problems])
    return {task_type: cast(Mode, mode) for task_type, mode in modes}


@attrs.define(eq=False)
class JobFailed(Exception):
    """A job ended without a result: it failed, or somebody cancelled it."""

    job: Job

    def __str__(self) -> str:
        return f"job {self.job.id} is {self.job.status}" + (f": {self.job.error.category}" if self.job.error else "")


@frozen(kw_only=True)
class Comparison:
    """Both results of a mirrored call: a copy of what `local` returned, and what `read` made of the finished job.

    `local_error` tells what `local` raised, such as `ValueError: no speech`; the exception itself would keep alive all it went through.
    `remote_error` is JobFailed, or what `read` raised.
    """

    job: Job
    local: Any = field(repr=False)
    local_error: str | None = field(repr=False)
    local_seconds: float
    remote: Any = field(repr=False)
    remote_error: Exception | None = field(repr=False)


@frozen(kw_only=True)
class HandoverStats:
    """What became of the calls of one process.

    Of the calls `mirrored` each is `sent`, `dropped` (full, not_copied, not_json, refused, closed) or waiting; of those sent each is
    `compared`, `uncompared` (timeout, unknown, hook_failed, closed) or not yet. In mode remote a call is answered by the service: `remote`,
    or it `fell_back` to the local function, or it `failed`: by the name of the exception, as are the rests of the mirror when it `paused`.
    """

    off: int = 0
    mirrored: int = 0
    sent: int = 0
    compared: int = 0
    remote: int = 0
    dropped: Mapping[str, int] = field(factory=dict)
    uncompared: Mapping[str, int] = field(factory=dict)
    fell_back: Mapping[str, int] = field(factory=dict)
    failed: Mapping[str, int] = field(factory=dict)
    paused: Mapping[str, int] = field(factory=dict)

    @property
    def waiting(self) -> int:
        """Mirrored calls that are neither sent nor dropped so far."""
        return self.mirrored - self.sent - sum(self.dropped.values())


class Handover:
    """Moves work that its caller does with a function of its own over to the service, in one of three modes for each task type.

    `off`: the local function runs, nothing is sent.
    `mirror`: the local function runs in the caller's thread, and what it returns or raises is what the caller gets. The job, as it was
    before, goes to the service from a thread of its own, at `mirror_priority` and for one attempt; there `compare` is called with both
    results if they come within `mirror_seconds`. Jobs beyond `max_mirrored` or `max_mirrored_bytes` at a time are dropped and counted.
    `remote`: the service runs the job; the caller waits for `timeout_seconds` at most. Without a result by then the job is cancelled and
    the local function runs after all. With `fallback=False` the error is raised, and the job stays, to be found by its idempotency key.
    A service that is away is tried for the `retry_seconds` of the client; beyond the deadline in the background, so as to cancel the job.

    For any number of threads, and for processes that fork: each has counters, a thread and connections of its own, made on first use.
    """

    def __init__(
        self,
        service: AIService,
        modes: Mapping[str, str] | None = None,
        *,
        compare: Callable[[Comparison], None] | None = None,
        fallback: bool = True,
        timeout_seconds: float = 60.0,
        mirror_seconds: float = 600.0,
        mirror_priority: int = -10,
        max_mirrored: int = 1000,
        max_mirrored_bytes: int = 32 << 20,
    ) -> None:
        self._fallback, self._timeout_seconds = fallback, timeout_seconds
        self._new_here = partial(_Here, service, compare, mirror_seconds, mirror_priority, max_mirrored, max_mirrored_bytes)
        self._by_process: dict[int, _Here] = {}
        self.set_modes(modes or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def modes(self) -> dict[str, Mode]:
        """The modes as they are; `*` is that of the task types not named."""
        return dict(self._modes)

    def set_mode(self, task_type: str, mode: str) -> None:
        """Switch one task type, or `*`; calls under way end in the mode they began in. Raises ModesError."""
        self._modes |= _checked([(task_type, mode)])
        log.info("handover_mode_set task_type=%s mode=%s", task_type, mode)

    def set_modes(self, modes: Mapping[str, str]) -> None:
        """Switch all task types: those not named to the mode of `*`, or off. Raises ModesError, and then nothing has changed."""
        self._modes = _checked(list(modes.items()))
        log.info("handover_modes_set modes=%s", ",".join(f"{task_type}={mode}" for task_type, mode in modes.items()))

    def run(
        self,
        job: NewJob,
        local: Callable[[], T],
        *,
        read: Callable[[Job], T] = attrgetter("result"),
        timeout_seconds: float | None = None,
        fallback: bool | None = None,
    ) -> T:
        """What `local` returns, or what `read` makes of the completed job, as the mode of the job's task type has it.

        Raises what `local` raises; without a fallback also ServiceError, TimeoutError, JobFailed, NotJSON and what `read` raises.
        """
        mode = self._modes.get(job.task_type) or self._modes.get("*", "off")
        if mode == "mirror":
            return self._run_mirrored(job, local, read)
        if mode == "remote":
            seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
            return self._run_remote(job, local, read, seconds=seconds, fallback=self._fallback if fallback is None else fallback)
        self._here.count(job.task_type, "off")
        return local()

    def stats(self, task_type: str | None = None) -> HandoverStats:
        """What became of the calls of this process so far, of one task type or of all."""
        return self._here.stats(task_type)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Let what is held or under way end, for so long at most, then end it. Later calls run locally; without a fallback they fail."""
        self._here.close(timeout_seconds)

    @property
    def _here(self) -> _Here:
        # No thread, lock or connection survives a fork. Where two threads come first, setdefault lets one win.
        return self._by_process.get(os.getpid()) or self._by_process.setdefault(os.getpid(), self._new_here())

    def _run_mirrored(self, job: NewJob, local: Callable[[], T], read: Callable[[Job], T]) -> T:
        here = self._here
        mirrored, began = here.copied(job, read), time.perf_counter()
        try:
            value = local()
        except BaseException as error:
            here.hold(mirrored, time.perf_counter() - began, error=error)
            raise
        here.hold(mirrored, time.perf_counter() - began, value)
        return value

    def _run_remote(self, job: NewJob, local: Callable[[], T], read: Callable[[Job], T], *, seconds: float, fallback: bool) -> T:
        ended = self._ended(job, seconds, cancels=fallback)
        value, trouble = _read(ended, read) if isinstance(ended, Job) else (None, ended)
        if trouble is None:
            self._here.count(job.task_type, "remote")
            return cast(T, value)
        self._here.count(job.task_type, "fell_back" if fallback else "failed", type(trouble).__name__, trouble)
        if not fallback:
            raise trouble
        return local()

    def _ended(self, job: NewJob, seconds: float, *, cancels: bool) -> Job | Exception:
        """The finished job, or why there is none. A thread of its own asks for it: so the deadline holds whatever the network does."""
        if cancels:
            job = attrs.evolve(job, expires_at=job.expires_at or _expiry(seconds))
        answer: SimpleQueue[Job | Exception] = SimpleQueue()
        attempt = partial(self._here.attempt, job, time.monotonic() + seconds, answer, cancels=cancels)
        try:
            threading.Thread(target=attempt, name="ai-service-remote", daemon=True).start()
        except RuntimeError as error:  # no thread to be had
            return error
        try:
            return answer.get(timeout=seconds)
        except Empty:
            return TimeoutError(f"no result within {seconds:g} s")


def _read(job: Job, read: Callable[[Job], T]) -> tuple[T | None, Exception | None]:
    """What `read` makes of a completed job, or why there is nothing."""
    if job.status != "completed":
        return None, JobFailed(job)
    try:
        return read(job), None
    except Exception as error:  # noqa: BLE001 -- a stranger's code
        return None, error


def _join(threads: Sequence[threading.Thread], until: float) -> None:
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _expiry(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds + _CLOCK_SECONDS)


@attrs.define(eq=False)
class _Mirrored:
    """A job that runs locally and is to go to the service too; `input` and `both` are pickles."""

    job: NewJob
    read: Callable[[Job], Any]
    input: bytes
    both: bytes = b""
    local_seconds: float = 0.0
    job_id: str = ""
    give_up_at: float = 0.0

    @property
    def size(self) -> int:
        return len(self.input) + len(self.both)


class _Here:
    """What each process has of its own: connections, counters, mirrored jobs, and the threads.

    The caller's thread makes pickles: they are the quickest copies nobody can change, and of a known size. The mirror's makes JSON of them.
    """

    def __init__(
        self, service: AIService, compare: Callable[[Comparison], None] | None, seconds: float, priority: int, max_jobs: int, max_bytes: int
    ) -> None:
        self._remote = service.another()
        self._attempts: set[threading.Thread] = set()
        # The mirror's thread repeats what failed; a client that did so too would keep it from its other work.
        self._service = service.another(retry_seconds=0)
        self._compare, self._seconds, self._priority, self._max_jobs, self._max_bytes = compare, seconds, priority, max_jobs, max_bytes
        self._changed = threading.Condition()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._quiet_until: dict[tuple[str, str], float] = {}
        # In order of arrival; the values mean nothing.
        self._buffered: dict[_Mirrored, None] = {}
        self._sent: dict[_Mirrored, None] = {}
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._close_by = math.inf
        self._rests, self._rest_until = Backoff(0.5, 30.0), 0.0
        self._looks, self._look_at = Backoff(0.5, 5.0), 0.0

    # Counters

    def count(self, task_type: str, what: str, reason: str = "", error: BaseException | None = None) -> None:
        """One more; where there is a reason it is logged, now and then."""
        with self._changed:
            self._counts[task_type, what, reason] += 1
            if not reason or self._quiet_until.get((what, reason), 0.0) > time.monotonic():
                return
            self._quiet_until[what, reason] = time.monotonic() + _LOG_SECONDS
        event = f"handover_{what} reason=%s task_type=%s error=%s"
        log.warning(event, reason, task_type, _kind_of(error))

    def stats(self, task_type: str | None) -> HandoverStats:
        """The counters of one task type, or of all."""
        found: dict[str, Any] = {what: Counter() for what in ("dropped", "uncompared", "fell_back", "failed", "paused")}
        with self._changed:
            for (counted_type, what, reason), number in self._counts.items():
                if task_type in (None, counted_type):
                    within, name = (found[what], reason) if reason else (found, what)
                    within[name] = within.get(name, 0) + number
        return HandoverStats(**found)

    # The caller's thread

    def copied(self, job: NewJob, read: Callable[[Job], Any]) -> _Mirrored | None:
        """The job as it is before its local run; None where it is dropped."""
        self.count(job.task_type, "mirrored")
        if why := self._no_room(0):
            self.count(job.task_type, "dropped", why)
            return None
        try:
            return _Mirrored(attrs.evolve(job, input=None), read, pickle.dumps(job.input, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # noqa: BLE001 -- a stranger's object may do anything
            self.count(job.task_type, "dropped", "not_copied", error)
            return None

    def hold(self, mirrored: _Mirrored | None, local_seconds: float, value: object = None, error: BaseException | None = None) -> None:
        """Buffer a job after its local run, or drop it."""
        if mirrored is None:
            return
        try:
            both = (value, None if error is None else f"{type(error).__name__}: {error}")
            mirrored.both = pickle.dumps(both, pickle.HIGHEST_PROTOCOL) if self._compare else b""
        except Exception as problem:  # noqa: BLE001 -- likewise
            self.count(mirrored.job.task_type, "dropped", "not_copied", problem)
            return
        mirrored.local_seconds = local_seconds
        with self._changed:
            if not (why := self._no_room(mirrored.size)):
                self._buffered[mirrored] = None
                self._bytes += mirrored.size
                self._wake()
        if why:
            self.count(mirrored.job.task_type, "dropped", why)

    def close(self, seconds: float) -> None:
        """Go on for so long at most, then end the threads and drop what is left."""
        with self._changed:
            self._close_by = time.monotonic() + seconds
            self._changed.notify()
        threads = [thread for thread in (self._thread, *self._attempts) if thread and thread is not threading.current_thread()]
        _join(threads, self._close_by)
        # Calls under way end at once; only a hook could go on.
        self._service.close()
        self._remote.close()
        _join(threads, time.monotonic() + 1.0)
        for mirrored in [*self._buffered]:
            self._leave(mirrored, "dropped", "closed")
        for mirrored in [*self._sent]:
            self._leave(mirrored, "uncompared", "closed")

    def _no_room(self, size: int) -> str:
        if self._close_by < math.inf:
            return "closed"
        full = len(self._buffered) + len(self._sent) >= self._max_jobs or self._bytes + size > self._max_bytes
        return "full" if full else ""

    def _wake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._work, name="ai-service-mirror", daemon=True)
            with suppress(RuntimeError):  # no thread to be had; the next call tries again
                thread.start()
                self._thread = thread
        self._changed.notify()

    # The thread of a remote call

    def attempt(self, job: NewJob, deadline: float, answer: SimpleQueue[Job | Exception], *, cancels: bool) -> None:
        """Create a job and wait for its end; it `cancels` one whose result nobody waits for any more."""
        self._attempts.add(threading.current_thread())
        job_id = ""
        ended: Job | Exception
        try:
            job_id = self._remote.create_job(job).id
            ended = self._remote.wait_for_job(job_id, deadline - time.monotonic())
        except Exception as error:  # noqa: BLE001 -- an answer too
            ended = error
        answer.put(ended)
        if cancels and job_id and isinstance(ended, Exception):
            with suppress(ServiceError):
                self._remote.cancel(job_id, "its caller no longer waits")
        self._attempts.discard(threading.current_thread())

    # The mirror's thread

    def _work(self) -> None:
        while self._awaits_work():
            try:
                self._give_up()
                self._send(self._next_batch())
                self._look_at_sent()
                self._rests.reset()
            except Exception as error:  # noqa: BLE001 -- whatever it was, what is held is tried again
                wanted = error.retry_after_seconds if isinstance(error, ServiceError) else None
                self._rest_until = time.monotonic() + self._rests.next_seconds(wanted)
                self.count("-", "paused", type(error).__name__, error)

    def _awaits_work(self) -> bool:
        """True once there is something to do, False once this is closed."""
        with self._changed:
            while not (over := self._is_over()) and (seconds := self._due_at() - time.monotonic()) > 0:
                self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
            return not over

    def _due_at(self) -> float:
        due_at = 0.0 if self._buffered else self._look_at if self._sent else math.inf
        return min(max(due_at, self._rest_until), self._close_by)

    def _is_over(self) -> bool:
        return self._close_by < math.inf and (not (self._buffered or self._sent) or time.monotonic() >= self._close_by)

    def _give_up(self) -> None:
        for mirrored in [mirrored for mirrored in self._sent if mirrored.give_up_at < time.monotonic()]:
            self._leave(mirrored, "uncompared", "timeout")

    def _next_batch(self) -> list[tuple[_Mirrored, NewJob]]:
        # A batch is small: making one job JSON stops the other threads, and between two of them they have their turn.
        with self._changed:
            first = list(itertools.islice(self._buffered, 50))
        return [(mirrored, job) for mirrored in first if (job := self._to_send(mirrored))]

    def _to_send(self, mirrored: _Mirrored) -> NewJob | None:
        try:
            text = RawJSON(encode(pickle.loads(mirrored.input)))  # noqa: S301 -- this process wrote it
        except Exception as error:  # noqa: BLE001 -- a stranger's object may do anything
            self._leave(mirrored, "dropped", "not_json", error)
            return None
        # A key of its own: by the caller's, a remote call would later find this job in place of one that counts.
        key = f"mirror/{mirrored.job.idempotency_key}"
        expires_at = _expiry(self._seconds)
        return attrs.evolve(mirrored.job, input=text, idempotency_key=key, priority=self._priority, max_attempts=1, expires_at=expires_at)

    def _send(self, batch: Sequence[tuple[_Mirrored, NewJob]]) -> None:
        try:
            created = self._service.create_jobs([job for _, job in batch]).jobs if batch else ()
            for (mirrored, _), job in zip(batch, created, strict=True):
                self._was_sent(mirrored, job.id)
        except ServiceUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 -- what cannot be sent must not stay in the way of the rest
            if len(batch) == 1:
                self._leave(batch[0][0], "dropped", "refused", error)
                return
            # A batch is taken whole or not at all: one by one shows which of its jobs is refused.
            for item in batch:
                self._send([item])

    def _was_sent(self, mirrored: _Mirrored, job_id: str) -> None:
        with self._changed:
            if mirrored not in self._buffered:  # closed meanwhile
                return
            del self._buffered[mirrored]
            mirrored.job_id, mirrored.give_up_at = job_id, time.monotonic() + self._seconds
            if not self._sent:
                self._looks.reset()
            self._sent[mirrored] = None
        self.count(mirrored.job.task_type, "sent")
        if not self._compare:
            self._leave(mirrored)

    def _look_at_sent(self) -> None:
        if not self._sent or time.monotonic() < self._look_at:
            return
        sent = [*self._sent]
        for some in (sent[start : start + 500] for start in range(0, len(sent), 500)):
            for mirrored, job in zip(some, self._service.get_jobs([mirrored.job_id for mirrored in some]), strict=True):
                if job is None:
                    self._leave(mirrored, "uncompared", "unknown")
                elif job.finished:
                    self._looks.reset()
                    self._show(mirrored, self._service.get_job(job.id))
        self._look_at = time.monotonic() + self._looks.next_seconds()

    def _show(self, mirrored: _Mirrored, job: Job) -> None:
        assert self._compare, "without a hook nothing waits for its result"
        try:
            remote, trouble = _read(job, mirrored.read)
            local, error = pickle.loads(mirrored.both)  # noqa: S301 -- this process wrote it
            results = {"local": local, "local_error": error, "remote": remote, "remote_error": trouble}
            self._compare(Comparison(job=job, local_seconds=mirrored.local_seconds, **results))
        except BaseException as error:  # noqa: BLE001 -- a stranger's code, which may even call sys.exit
            self._leave(mirrored, "uncompared", "hook_failed", error)
        else:
            self._leave(mirrored, "compared")

    def _leave(self, mirrored: _Mirrored, what: str = "", reason: str = "", error: BaseException | None = None) -> None:
        with self._changed:
            if mirrored not in self._buffered and mirrored not in self._sent:
                return
            self._buffered.pop(mirrored, None)
            self._sent.pop(mirrored, None)
            self._bytes -= mirrored.size
        if what:
            self.count(mirrored.job.task_type, what, reason, error)


def _kind_of(error: BaseException | None) -> str:
    """What kind of error it is and where it arose; not its text, which may hold a payload."""
    if isinstance(error, ServiceError):
        return error.code
    if isinstance(error, JobFailed) and error.job.error:
        return error.job.error.category
    places = traceback.extract_tb(error.__traceback__)[-1:] if error else ()
    return "".join([type(error).__name__ if error else "-", *(f" at {Path(place.filename).name}:{place.lineno}" for place in places)])
