"""Moves a caller's work to AI Service: each task type runs locally, mirrored, or remotely.

    handover = Handover(service, read_modes(os.environ))  # call_analysis=mirror, *=off
    new = NewJob("telephony", "beeline/17", "call_analysis", "qwen2.5-14b", input={"prompt": "Hi"})
    handover.run(new, local=analyse)

Sections: modes, results, the handover, the state of a process.
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

from ai_client import (
    AIService,
    Backoff,
    Job,
    NewJob,
    RawJSON,
    ServiceError,
    ServiceUnavailable,
    encode,
)

log = logging.getLogger("ai_service.handover")

T = TypeVar("T")

# The same event for the same reason is logged at most this often; the counters are complete.
LOG_SECONDS = 60.0
# Added to expires_at: the clocks of caller and database may differ by this much.
CLOCK_SECONDS = 60.0
# Encoding a job blocks the other threads, which run between two jobs; so batches are small.
BATCH_JOBS = 50
POLL_JOBS = 500


# ---------------------------------------------------------------- modes

Mode = Literal["off", "mirror", "remote"]

_TASK_TYPE = re.compile(r"\*|[A-Za-z0-9._:/@+-]{1,100}")


class ModesError(ValueError):
    """The modes are invalid; `problems` lists all problems."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def read_modes(environ: Mapping[str, str], name: str = "AI_SERVICE_MODES") -> dict[str, Mode]:
    """The modes in a setting such as `call_analysis=mirror, transcribe=remote, *=off`.

    Empty if the setting is absent. Raises ModesError.
    """
    items = (item.partition("=") for item in environ.get(name, "").split(",") if item.strip())
    return _check_modes([(key.strip(), mode.strip()) for key, _, mode in items], f"{name}: ")


def _check_modes(modes: Sequence[tuple[str, str]], prefix: str = "") -> dict[str, Mode]:
    problems = [f"{key!r} is not a task type" for key, _ in modes if not _TASK_TYPE.fullmatch(key)]
    wrong = [item for item in modes if item[1] not in get_args(Mode)]
    problems += [f"{key!r} may be off, mirror or remote, not {mode!r}" for key, mode in wrong]
    counts = Counter(key for key, _ in modes)
    problems += [f"{key!r} has {count} modes" for key, count in counts.items() if count > 1]
    if problems:
        raise ModesError([prefix + problem for problem in problems])
    return cast(dict[str, Mode], dict(modes))


# ---------------------------------------------------------------- results


@attrs.define(eq=False)
class JobFailed(Exception):
    """A job ended without a result: it failed or was cancelled."""

    job: Job

    def __str__(self) -> str:
        category = f": {self.job.error.category}" if self.job.error else ""
        return f"job {self.job.id} is {self.job.status}{category}"


@frozen(kw_only=True)
class Comparison:
    """Both results of a mirrored call.

    `local` is a copy of what the local function returned, `remote` what `read` returned for the
    finished job. `local_error` describes what the local function raised, such as `ValueError: no
    speech`: the exception itself would keep all its frames alive. `remote_error` is JobFailed, or
    what `read` raised.
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

    A `mirrored` call is `sent`, `dropped` (full, not_copied, not_json, refused, closed) or waiting;
    one that was sent is `compared`, `uncompared` (timeout, unknown, hook_failed, closed) or not
    yet. In mode remote the service returned the result (`remote`), or the local function did
    (`fell_back`), or the call `failed`; the latter two are counted by the name of the exception, as
    are the pauses of the mirror after an error (`paused`).
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


def _read_result(job: Job, read: Callable[[Job], T]) -> tuple[T | None, Exception | None]:
    """What `read` returns for a completed job, or an error."""
    if job.status != "completed":
        return None, JobFailed(job)
    try:
        return read(job), None
    except Exception as error:  # noqa: BLE001 -- the caller's code
        return None, error


# ---------------------------------------------------------------- the handover


class Handover:
    """Runs work that a caller has a function for in one of three modes for each task type.

    `off`: the local function runs, nothing is sent.
    `mirror`: the local function runs in the caller's thread, and its outcome is the caller's. A
    copy of the job goes to the service in another thread, with `mirror_priority` and one attempt;
    `compare` is called there with both results if they come within `mirror_seconds`. Jobs beyond
    `max_mirrored` or `max_mirrored_bytes` at a time are dropped and counted.
    `remote`: the service runs the job; the caller waits for up to `timeout_seconds`. Without a
    result by then the job is cancelled and the local function runs. With `fallback=False` the error
    is raised instead, and the job stays, to be found by its idempotency key. An unavailable service
    is tried for the `retry_seconds` of the client, after the deadline in the background, so that
    the job is cancelled.

    Any number of threads and forked processes may use it: each process has its own counters, thread
    and connections, made on first use.
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
        self._new_state = partial(
            _ProcessState,
            service,
            compare,
            seconds=mirror_seconds,
            priority=mirror_priority,
            max_jobs=max_mirrored,
            max_bytes=max_mirrored_bytes,
        )
        self._states: dict[int, _ProcessState] = {}
        self.set_modes(modes or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def modes(self) -> dict[str, Mode]:
        """The current modes; `*` is the mode of all other task types."""
        return dict(self._modes)

    def set_mode(self, task_type: str, mode: str) -> None:
        """Set the mode of one task type, or of `*`. Raises ModesError.

        Calls that have begun end in the mode in which they began.
        """
        self._modes |= _check_modes([(task_type, mode)])
        log.info("handover_mode_set task_type=%s mode=%s", task_type, mode)

    def set_modes(self, modes: Mapping[str, str]) -> None:
        """Set the modes of all task types: without `*` all others are off.

        Raises ModesError, and then changes nothing.
        """
        self._modes = _check_modes(list(modes.items()))
        log.info("handover_modes_set modes=%s", ",".join(map("=".join, modes.items())))

    def run(
        self,
        job: NewJob,
        local: Callable[[], T],
        *,
        read: Callable[[Job], T] = attrgetter("result"),
        timeout_seconds: float | None = None,
        fallback: bool | None = None,
    ) -> T:
        """What `local` returns, or what `read` returns for the completed job, by the mode.

        Raises what `local` raises; without a fallback also ServiceError, TimeoutError, JobFailed,
        NotJSON, and what `read` raises.
        """
        mode = self._modes.get(job.task_type) or self._modes.get("*", "off")
        if mode == "mirror":
            return self._run_mirrored(job, local, read)
        if mode == "remote":
            seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
            fallback = self._fallback if fallback is None else fallback
            return self._run_remote(job, local, read, seconds=seconds, fallback=fallback)
        self._state.count(job.task_type, "off")
        return local()

    def stats(self, task_type: str | None = None) -> HandoverStats:
        """What became of this process's calls so far, of one task type or of all."""
        return self._state.stats(task_type)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Wait up to `timeout_seconds` for buffered jobs and remote calls, then end them.

        Later calls run locally; without a fallback they fail.
        """
        self._state.close(timeout_seconds)

    @property
    def _state(self) -> _ProcessState:
        # A thread, lock or connection does not survive a fork. setdefault makes threads agree.
        pid = os.getpid()
        return self._states.get(pid) or self._states.setdefault(pid, self._new_state())

    def _run_mirrored(
        self,
        job: NewJob,
        local: Callable[[], T],
        read: Callable[[Job], T],
    ) -> T:
        state = self._state
        mirrored, start = state.copy_job(job, read), time.perf_counter()
        try:
            value = local()
        except BaseException as error:
            state.buffer(mirrored, time.perf_counter() - start, error=error)
            raise
        state.buffer(mirrored, time.perf_counter() - start, value)
        return value

    def _run_remote(
        self,
        job: NewJob,
        local: Callable[[], T],
        read: Callable[[Job], T],
        *,
        seconds: float,
        fallback: bool,
    ) -> T:
        ended = self._wait_for_job(job, seconds, cancels=fallback)
        value, error = _read_result(ended, read) if isinstance(ended, Job) else (None, ended)
        if error is None:
            self._state.count(job.task_type, "remote")
            return cast(T, value)
        event = "fell_back" if fallback else "failed"
        self._state.count(job.task_type, event, type(error).__name__, error)
        if not fallback:
            raise error
        return local()

    def _wait_for_job(self, job: NewJob, seconds: float, *, cancels: bool) -> Job | Exception:
        """The finished job, or an error.

        Another thread asks for it, so that the deadline holds whatever the network does.
        """
        if cancels:
            job = attrs.evolve(job, expires_at=job.expires_at or _expires_at(seconds))
        outcome: SimpleQueue[Job | Exception] = SimpleQueue()
        deadline = time.monotonic() + seconds
        attempt = partial(self._state.run_remote, job, deadline, outcome, cancels=cancels)
        try:
            threading.Thread(target=attempt, name="ai-service-remote", daemon=True).start()
            return outcome.get(timeout=seconds)
        except RuntimeError as error:  # the system has no thread left
            return error
        except Empty:
            return TimeoutError(f"no result within {seconds:g} s")


def _expires_at(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds + CLOCK_SECONDS)


# ---------------------------------------------------------------- the state of a process


@attrs.define(eq=False)
class _MirroredJob:
    """A job that runs locally and is sent to the service too; the bytes are pickles."""

    job: NewJob
    read: Callable[[Job], Any]
    input: bytes
    local_result: bytes = b""
    local_seconds: float = 0.0
    job_id: str = ""
    deadline: float = 0.0

    @property
    def size(self) -> int:
        return len(self.input) + len(self.local_result)


class _ProcessState:
    """What belongs to one process: connections, counters, mirrored jobs, and threads.

    The caller's thread pickles inputs and results: the fastest copy that later changes do not
    affect, of a known size. The mirror thread encodes them as JSON.
    """

    def __init__(
        self,
        service: AIService,
        compare: Callable[[Comparison], None] | None,
        *,
        seconds: float,
        priority: int,
        max_jobs: int,
        max_bytes: int,
    ) -> None:
        self._remote = service.clone()
        # The mirror thread repeats failed calls itself, and does its other work meanwhile.
        self._service = service.clone(retry_seconds=0)
        self._compare, self._seconds, self._priority = compare, seconds, priority
        self._max_jobs, self._max_bytes = max_jobs, max_bytes
        self._changed = threading.Condition()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._next_log_at: dict[tuple[str, str], float] = {}
        # Ordered sets, oldest first; the values are not used.
        self._buffered: dict[_MirroredJob, None] = {}
        self._sent: dict[_MirroredJob, None] = {}
        self._bytes = 0
        self._mirror_thread: threading.Thread | None = None
        self._remote_threads: set[threading.Thread] = set()
        self._close_by = math.inf
        self._pauses, self._paused_until = Backoff(0.5, 30.0), 0.0
        self._polls, self._poll_at = Backoff(0.5, 5.0), 0.0

    # Counters

    def count(
        self,
        task_type: str,
        event: str,
        reason: str = "",
        error: BaseException | None = None,
    ) -> None:
        """Count an event; one with a reason is logged, at most once per LOG_SECONDS."""
        now = time.monotonic()
        with self._changed:
            self._counts[task_type, event, reason] += 1
            if not reason or self._next_log_at.get((event, reason), 0.0) > now:
                return
            self._next_log_at[event, reason] = now + LOG_SECONDS
        message = f"handover_{event} reason=%s task_type=%s error=%s"
        log.warning(message, reason, task_type, _describe_error(error))

    def stats(self, task_type: str | None) -> HandoverStats:
        """The counters of one task type, or of all."""
        by_reason = [each.name for each in attrs.fields(HandoverStats) if each.default != 0]
        found: dict[str, Any] = {event: Counter() for event in by_reason}
        with self._changed:
            for (counted_type, event, reason), number in self._counts.items():
                if task_type in (None, counted_type):
                    counter, key = (found[event], reason) if reason else (found, event)
                    counter[key] = counter.get(key, 0) + number
        return HandoverStats(**found)

    # The caller's thread

    def copy_job(self, job: NewJob, read: Callable[[Job], Any]) -> _MirroredJob | None:
        """The job as it is before its local run; None if it is dropped."""
        self.count(job.task_type, "mirrored")
        if reason := self._reason_to_drop(0):
            self.count(job.task_type, "dropped", reason)
            return None
        try:
            copy = pickle.dumps(job.input, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # noqa: BLE001 -- the caller's objects may raise anything
            self.count(job.task_type, "dropped", "not_copied", error)
            return None
        return _MirroredJob(attrs.evolve(job, input=None), read, copy)

    def buffer(
        self,
        mirrored: _MirroredJob | None,
        local_seconds: float,
        value: object = None,
        error: BaseException | None = None,
    ) -> None:
        """Buffer a job after its local run, or drop it."""
        if mirrored is None:
            return
        task_type, mirrored.local_seconds = mirrored.job.task_type, local_seconds
        result = (value, None if error is None else f"{type(error).__name__}: {error}")
        try:
            if self._compare:
                mirrored.local_result = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        except Exception as problem:  # noqa: BLE001 -- the caller's objects may raise anything
            self.count(task_type, "dropped", "not_copied", problem)
            return
        with self._changed:
            if not (reason := self._reason_to_drop(mirrored.size)):
                self._buffered[mirrored] = None
                self._bytes += mirrored.size
                self._wake_mirror()
        if reason:
            self.count(task_type, "dropped", reason)

    def close(self, seconds: float) -> None:
        """Go on for up to `seconds`, then end the threads and drop what is left."""
        with self._changed:
            self._close_by = time.monotonic() + seconds
            self._changed.notify()
        known = (self._mirror_thread, *self._remote_threads)
        threads = [each for each in known if each and each is not threading.current_thread()]
        _join(threads, self._close_by)
        # Calls end at once; only the comparison hook can go on.
        self._service.close()
        self._remote.close()
        _join(threads, time.monotonic() + 1.0)
        for mirrored in [*self._buffered]:
            self._remove(mirrored, "dropped", "closed")
        for mirrored in [*self._sent]:
            self._remove(mirrored, "uncompared", "closed")

    def _reason_to_drop(self, size: int) -> str:
        if self._close_by < math.inf:
            return "closed"
        is_full = len(self._buffered) + len(self._sent) >= self._max_jobs
        return "full" if is_full or self._bytes + size > self._max_bytes else ""

    def _wake_mirror(self) -> None:
        if self._mirror_thread is None or not self._mirror_thread.is_alive():
            thread = threading.Thread(target=self._mirror, name="ai-service-mirror", daemon=True)
            with suppress(RuntimeError):  # the system has no thread left; the next call tries again
                thread.start()
                self._mirror_thread = thread
        self._changed.notify()

    # The thread of a remote call

    def run_remote(
        self,
        job: NewJob,
        deadline: float,
        outcome: SimpleQueue[Job | Exception],
        *,
        cancels: bool,
    ) -> None:
        """Create a job and wait for its end; if that fails and `cancels`, cancel it."""
        self._remote_threads.add(threading.current_thread())
        job_id = ""
        try:
            job_id = self._remote.create_job(job).id
            outcome.put(self._remote.wait_for_job(job_id, deadline - time.monotonic()))
        except Exception as error:  # noqa: BLE001 -- the caller's thread handles it
            outcome.put(error)
            if cancels and job_id:
                with suppress(ServiceError):
                    self._remote.cancel(job_id, "its caller no longer waits")
        self._remote_threads.discard(threading.current_thread())

    # The mirror thread

    def _mirror(self) -> None:
        while self._wait_for_work():
            try:
                self._give_up_overdue()
                self._send(self._next_batch())
                self._poll_sent()
                self._pauses.reset()
            except Exception as error:  # noqa: BLE001 -- all jobs are kept and tried again
                wanted = error.retry_after_seconds if isinstance(error, ServiceError) else None
                self._paused_until = time.monotonic() + self._pauses.next_seconds(wanted)
                self.count("-", "paused", type(error).__name__, error)

    def _wait_for_work(self) -> bool:
        """True once there is work, False once this is closed."""
        with self._changed:
            while not (closed := self._is_closed()) and (seconds := self._idle_seconds()) > 0:
                self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
            return not closed

    def _idle_seconds(self) -> float:
        work_at = 0.0 if self._buffered else self._poll_at if self._sent else math.inf
        return min(max(work_at, self._paused_until), self._close_by) - time.monotonic()

    def _is_closed(self) -> bool:
        is_done = not (self._buffered or self._sent) or time.monotonic() >= self._close_by
        return self._close_by < math.inf and is_done

    def _give_up_overdue(self) -> None:
        now = time.monotonic()
        for mirrored in [each for each in self._sent if each.deadline < now]:
            self._remove(mirrored, "uncompared", "timeout")

    def _next_batch(self) -> list[tuple[_MirroredJob, NewJob]]:
        with self._changed:
            oldest = list(itertools.islice(self._buffered, BATCH_JOBS))
        return [(mirrored, job) for mirrored in oldest if (job := self._new_job(mirrored))]

    def _new_job(self, mirrored: _MirroredJob) -> NewJob | None:
        try:
            # S301: this process pickled it.
            text = RawJSON(encode(pickle.loads(mirrored.input)))  # noqa: S301
        except Exception as error:  # noqa: BLE001 -- the caller's objects may raise anything
            self._remove(mirrored, "dropped", "not_json", error)
            return None
        return attrs.evolve(
            mirrored.job,
            input=text,
            # With the caller's key, a later remote call would find this job instead of making one.
            idempotency_key=f"mirror/{mirrored.job.idempotency_key}",
            priority=self._priority,
            max_attempts=1,
            expires_at=_expires_at(self._seconds),
        )

    def _send(self, batch: Sequence[tuple[_MirroredJob, NewJob]]) -> None:
        try:
            created = self._service.create_jobs([job for _, job in batch]).jobs if batch else ()
            for (mirrored, _), job in zip(batch, created, strict=True):
                self._mark_sent(mirrored, job.id)
        except ServiceUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 -- a rejected job must not block the others
            if len(batch) == 1:
                self._remove(batch[0][0], "dropped", "refused", error)
                return
            # A batch is created whole or not at all: one by one shows which jobs are rejected.
            for item in batch:
                self._send([item])

    def _mark_sent(self, mirrored: _MirroredJob, job_id: str) -> None:
        with self._changed:
            if mirrored not in self._buffered:  # closed meanwhile
                return
            del self._buffered[mirrored]
            mirrored.job_id = job_id
            mirrored.deadline = time.monotonic() + self._seconds
            if not self._sent:
                self._polls.reset()
            self._sent[mirrored] = None
        self.count(mirrored.job.task_type, "sent")
        if not self._compare:
            self._remove(mirrored)

    def _poll_sent(self) -> None:
        if not self._sent or time.monotonic() < self._poll_at:
            return
        sent = [*self._sent]
        for start in range(0, len(sent), POLL_JOBS):
            some = sent[start : start + POLL_JOBS]
            jobs = self._service.get_jobs([mirrored.job_id for mirrored in some])
            for mirrored, job in zip(some, jobs, strict=True):
                if job is None:
                    self._remove(mirrored, "uncompared", "unknown")
                elif job.finished:
                    self._polls.reset()
                    self._run_hook(mirrored, self._service.get_job(job.id))
        self._poll_at = time.monotonic() + self._polls.next_seconds()

    def _run_hook(self, mirrored: _MirroredJob, job: Job) -> None:
        assert self._compare, "without a hook no job waits for its result"
        try:
            remote, remote_error = _read_result(job, mirrored.read)
            # S301: this process pickled it.
            local, local_error = pickle.loads(mirrored.local_result)  # noqa: S301
            self._compare(
                Comparison(
                    job=job,
                    local=local,
                    local_error=local_error,
                    local_seconds=mirrored.local_seconds,
                    remote=remote,
                    remote_error=remote_error,
                )
            )
        except BaseException as error:  # noqa: BLE001 -- the caller's code may even call sys.exit
            self._remove(mirrored, "uncompared", "hook_failed", error)
        else:
            self._remove(mirrored, "compared")

    def _remove(
        self,
        mirrored: _MirroredJob,
        event: str = "",
        reason: str = "",
        error: BaseException | None = None,
    ) -> None:
        with self._changed:
            if mirrored not in self._buffered and mirrored not in self._sent:
                return
            self._buffered.pop(mirrored, None)
            self._sent.pop(mirrored, None)
            self._bytes -= mirrored.size
        if event:
            self.count(mirrored.job.task_type, event, reason, error)


def _join(threads: Sequence[threading.Thread], until: float) -> None:
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _describe_error(error: BaseException | None) -> str:
    """The kind of an error and where it was raised; not its text, which may have a payload."""
    if error is None:
        return "-"
    if isinstance(error, ServiceError):
        return error.code
    if isinstance(error, JobFailed) and error.job.error:
        return error.job.error.category
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return type(error).__name__ + place
