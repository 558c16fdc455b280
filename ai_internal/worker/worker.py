"""The worker: claims jobs over HTTP, runs them through the installed providers, and reports what became of them.

    claim ──► run ──► outcome on disk ──► complete, fail or release ──► file removed
                │                              │
                └ heartbeats meanwhile         └ tried until the service takes it or says that the claim is gone

Threads: one asks for jobs as long as there are free slots, one per job runs it, one sends heartbeats, one delivers outcomes, one looks at
the providers. What a thread of a job does cannot hold up the others. The main thread waits for SIGTERM or SIGINT and then drains.

Settings, beside those of the providers and of every client (`ai_internal.client_settings`)
    PROFILE_PROVIDERS       providers of a profile in their order, the later ones as fallback: qwen2.5-14b=vllm,openclaw; vision=vllm
    WORKER_CONCURRENCY      jobs side by side: 4
    WORKER_LEASE_SECONDS    how long a job stays this worker's without a heartbeat: 120
    WORKER_JOB_TIMEOUT      limit of one attempt, whatever its provider allows: 1h
    WORKER_DRAIN_SECONDS    how long running jobs may go on after SIGTERM: 20
    WORKER_SPOOL_DIR        where finished outcomes wait for the service: $XDG_STATE_HOME/ai-service/spool, or under ~/.local/state
    WORKER_SPOOL_MAX_BYTES  how much may wait there: 1073741824 (1 GiB)
    LOG_FORMAT              text, or json: an object on each line; text

Sections: settings, usage and progress, jobs under way, the worker, the command.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import queue
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from attrs import frozen

import providers
from ai_client import (
    AIService,
    Backoff,
    Claim,
    ClaimedJob,
    ClaimIdReused,
    Conflict,
    Heartbeat,
    NotFound,
    NotJSON,
    RawJSON,
    Release,
    ServiceError,
    ValidationFailed,
    encode,
)
from ai_internal.client_settings import ClientSettings
from ai_internal.limits import MAX_ITEMS, MAX_LEASE_SECONDS, MAX_REPORT_BYTES, MIN_LEASE_SECONDS
from ai_internal.telemetry import about, about_span, child_of, complain, log_to_stderr, read_log_format
from ai_internal.worker.fleet import UNSUPPORTED_SECONDS, Fleet
from ai_internal.worker.spool import Delivery, Outcome, ServiceState, Spool
from providers import (
    INTERNAL,
    INVALID_INPUT,
    INVALID_OUTPUT,
    MAX_NOTE_BYTES,
    TIMEOUT,
    UNAVAILABLE,
    InstalledProvider,
    Never,
    NotCompleted,
    NotNow,
    Result,
    SettingsError,
    Unsupported,
)
from providers.settings import DAY_SECONDS, duration, pairs, read_settings, setting, whole

log = logging.getLogger("ai_service.worker")

# An open claim is asked anew this often, so that the service sees the worker.
CLAIM_WAIT_SECONDS = 25.0
# And this often where nothing is claimed since every circuit is open.
REPORT_SECONDS = 10.0
MAX_HEARTBEAT_SECONDS = 30.0
# The service takes a year. A provider that asks for more than a day has most likely confused its units.
MAX_DELAY_SECONDS = float(DAY_SECONDS)

# A provider that ignores the end of its time is left to itself so long after it, and the job's attempt counted as failed.
OVERDUE_SECONDS = 30.0
# And where such runs hold all slots for so long after they were given up, the worker ends.
STUCK_SECONDS = 300.0
# A job that a provider gave back without a reason of its service's waits so long.
RELEASE_DELAY_SECONDS = 2.0
# And no longer than so, however long the circuit stays open: another worker may be better off.
MAX_RELEASE_DELAY_SECONDS = 600.0

T = TypeVar("T")


# ---------------------------------------------------------------- settings


def _read_directory(text: str) -> Path:
    return Path(text).expanduser()


def _read_order(text: str) -> dict[str, tuple[str, ...]]:
    """`profile=provider,provider; profile=provider`."""
    return {profile: tuple(re.split(r"\s*,\s*", names)) for profile, names in pairs(text, ";").items()}


@frozen(kw_only=True)
class Settings(ClientSettings):
    """The settings of a worker."""

    profile_providers: Mapping[str, tuple[str, ...]] = setting(
        "PROFILE_PROVIDERS", "providers of a profile in their order: `profile=first,fallback; …`", default="", read=_read_order
    )
    concurrency: int = setting("WORKER_CONCURRENCY", "jobs side by side", default="4", read=whole(1, MAX_ITEMS))
    lease_seconds: int = setting(
        "WORKER_LEASE_SECONDS",
        "how long a job stays this worker's without a heartbeat",
        default="120",
        read=lambda text: int(duration(MIN_LEASE_SECONDS, MAX_LEASE_SECONDS)(text)),
    )
    job_timeout_seconds: float = setting(
        "WORKER_JOB_TIMEOUT", "limit of one attempt, whatever its provider allows", default="1h", read=duration(1, 7 * DAY_SECONDS)
    )
    drain_seconds: float = setting("WORKER_DRAIN_SECONDS", "how long running jobs may go on after SIGTERM", default="20", read=duration(0))
    spool_dir: Path = setting(
        "WORKER_SPOOL_DIR",
        "where finished outcomes wait for the service; give it a volume",
        default="~/.local/state/ai-service/spool",
        read=_read_directory,
    )
    spool_max_bytes: int = setting(
        "WORKER_SPOOL_MAX_BYTES", "how much may wait there, in bytes", default=str(1 << 30), read=whole(0, 1 << 50)
    )

    log_format: str = setting("LOG_FORMAT", "`text`, or `json`: an object on each line", default="text", read=read_log_format)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """The settings in `environ`. Raises SettingsError."""
        state = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME', '')}/.local/state"
        return read_settings(cls, {**environ, "WORKER_SPOOL_DIR": environ.get("WORKER_SPOOL_DIR") or f"{state}/ai-service/spool"})


# ---------------------------------------------------------------- usage and progress


def _small_object(name: str, value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Usage or progress as the service takes it; left out, with a warning, when it would be refused: the result counts more."""
    try:
        if value is None or (isinstance(value, Mapping) and len(encode(dict(value)).encode()) <= MAX_NOTE_BYTES):
            return None if value is None else dict(value)
        log.warning("note_dropped kind=%s reason=too_large_or_no_object", name)
    except NotJSON as error:
        log.warning("note_dropped kind=%s reason=%s", name, error)
    return None


def _full_usage(given: Mapping[str, Any] | None, provider: str, seconds: float) -> Mapping[str, Any]:
    """Usage with what the worker knows. Where it is too much for the service, what the model service counted itself goes first."""
    known = {"provider": provider, "running_seconds": round(seconds, 3)}
    if not isinstance(given, Mapping):
        _small_object("usage", given)
        return known
    named = {**known, **given, "provider": provider}
    return _small_object("usage", named) or _small_object("usage", {name: value for name, value in named.items() if name != "raw"}) or known


def _bounded_delay(seconds: float | None) -> float | None:
    # A NaN compares false with everything and so becomes 0.
    return None if seconds is None else min(MAX_DELAY_SECONDS, max(0.0, seconds))


def _storable_text(text: str) -> str:
    """Text that any JSON reader and PostgreSQL take: no NUL, no half surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


# ---------------------------------------------------------------- jobs under way


class RunningJob:
    """One job that is being executed. Exactly one of its end, the loss of its claim, and the drain decides what becomes of it."""

    def __init__(self, job: ClaimedJob, fleet: Fleet, timeout_seconds: float) -> None:
        self.job, self._fleet = job, fleet
        self.cancelled = threading.Event()
        self.progress: Mapping[str, Any] | None = None
        self.abandoned_at: float | None = None
        # Of this attempt: a span of its own under the caller's.
        self.traceparent = child_of(job.traceparent)
        self._provider = "none"
        self._started = time.monotonic()
        self._deadline = self._started + timeout_seconds
        self._undecided = threading.Lock()

    def decide(self) -> bool:
        """True for the first who asks: what becomes of the job is then up to them."""
        return self._undecided.acquire(blocking=False)

    def lose_claim(self, code: str) -> None:
        """The claim no longer holds the job: stop the work, report nothing."""
        if self.decide():
            with about_span(self.traceparent):
                log.warning("job_lost id=%s task_type=%s provider=%s code=%s", self.job.id, self.job.task_type, self._provider, code)
        self.abandon()

    def abandon(self) -> None:
        """Stop the work; nothing waits for it any more."""
        self.abandoned_at = self.abandoned_at or time.monotonic()
        self.cancelled.set()

    def overdue_outcome(self) -> Outcome | None:
        """The end of an attempt whose provider went on after its deadline; None for any other."""
        if time.monotonic() < self._deadline + OVERDUE_SECONDS or not self.decide():
            return None
        with about_span(self.traceparent):
            log.error("job_overdue id=%s provider=%s", self.job.id, self._provider)
        return self._failed_outcome(NotNow(TIMEOUT, "the provider went on after its deadline and was left to itself"), retryable=True)

    def outcome(self, verb: Literal["complete", "fail", "release"], **fields: Any) -> Outcome:
        """An outcome of this attempt."""
        job = self.job
        known: dict[str, Any] = {"job_id": job.id, "claim_id": job.claim_id, "task_type": job.task_type, "model_profile": job.model_profile}
        known |= {"provider": self._provider, "attempt": job.attempt, "seconds": self._seconds(), "traceparent": self.traceparent}
        return Outcome(verb=verb, **known, **fields)

    def execute(self) -> Outcome:
        """Let the providers of the profile try it in turn, until one has done some work. Whatever they do, this attempt has an outcome."""
        try:
            with about(job_id=self.job.id), about_span(self.traceparent):
                return self._try_providers()
        except Exception as error:  # noqa: BLE001 -- what a stranger's code made of its outcome
            return self._failed_outcome(self._provider_error(error), retryable=True)

    def _try_providers(self) -> Outcome:
        try:
            job = self._provider_job()
        except Never as unreadable:
            return self._outcome_of(unreadable)
        rejections: list[NotNow | Unsupported] = []
        for turn in self._fleet.turns(self.job.model_profile):
            self._provider = turn.installed.name
            ended = self._run_provider(turn.installed, job)
            turn.end(ended)
            if not isinstance(ended, NotNow | Unsupported) or (isinstance(ended, NotNow) and ended.burns_attempt):
                return self._outcome_of(ended)
            rejections.append(ended)
            if self.cancelled.is_set():
                break
        return self._release_or_fail(rejections)

    def _run_provider(self, installed: InstalledProvider, job: providers.Job) -> Result | NotCompleted:
        try:
            assert installed.provider is not None, "only providers that were made are claimed for"
            result = installed.provider.run(job)
        except NotCompleted as outcome:
            return outcome
        except BaseException as error:  # noqa: BLE001 -- a stranger's code, which may even call sys.exit
            return self._provider_error(error)
        return result if isinstance(result, Result) else self._provider_error(TypeError("not a Result"))

    def _provider_job(self) -> providers.Job:
        names = ("id", "owner_service", "owner_ref", "task_type", "model_profile", "attempt", "max_attempts")
        fields = {"traceparent": self.traceparent, **{name: getattr(self.job, name) for name in names}}
        given: dict[str, Any] = {"deadline": self._deadline, "cancelled": self.cancelled, "report_progress": self._report_progress}
        return providers.Job(input=self._input(), **given, **fields)

    def _input(self) -> Any:
        try:
            return self.job.input
        except NotJSON as error:
            raise Never(INVALID_INPUT, f"the input {error}") from None

    def _report_progress(self, progress: Mapping[str, Any]) -> None:
        self.progress = _small_object("progress", progress)

    def _outcome_of(self, ended: Result | NotCompleted) -> Outcome:
        if isinstance(ended, Result):
            return self._completed_outcome(ended)
        if isinstance(ended, NotNow):
            return self._failed_outcome(ended, retryable=True, delay_seconds=_bounded_delay(ended.retry_in_seconds))
        return self._failed_outcome(ended, retryable=False)

    def _release_or_fail(self, rejections: Sequence[NotNow | Unsupported]) -> Outcome:
        """Nobody did any work: the job goes back unharmed, unless all providers of its profile say that they never will."""
        not_now = [rejection for rejection in rejections if isinstance(rejection, NotNow)]
        if not not_now and len(rejections) == self._fleet.provider_count(self.job.model_profile):
            return self._failed_outcome(rejections[-1], retryable=False)
        category = not_now[0].category if not_now else UNAVAILABLE
        return self.outcome("release", category=category, delay_seconds=_bounded_delay(self._pause(rejections, not_now)))

    def _pause(self, rejections: Sequence[NotNow | Unsupported], not_now: Sequence[NotNow]) -> float:
        asked = [rejection.retry_in_seconds for rejection in not_now if rejection.retry_in_seconds is not None]
        if asked:
            return min(asked)
        # A job that only a provider behind an open circuit may do would otherwise come back to those that cannot.
        least = UNSUPPORTED_SECONDS if len(rejections) > len(not_now) else RELEASE_DELAY_SECONDS
        return min(MAX_RELEASE_DELAY_SECONDS, max(least, self._fleet.seconds_until_retry(self.job.model_profile)))

    def _completed_outcome(self, result: Result) -> Outcome:
        try:
            text = RawJSON(encode(result.value))
        except NotJSON as error:
            return self._failed_outcome(NotNow(INVALID_OUTPUT, f"the provider's result is {error}", usage=result.usage), retryable=True)
        return self.outcome("complete", result=text, usage=_full_usage(result.usage, self._provider, self._seconds()))

    def _failed_outcome(self, error: NotCompleted, **fields: Any) -> Outcome:
        usage = _full_usage(error.usage, self._provider, self._seconds())
        return self.outcome("fail", category=error.category, message=_storable_text(error.message), usage=usage, **fields)

    def _provider_error(self, error: BaseException) -> NotNow:
        # The exception's text may hold a piece of the payload: its type and place must do.
        location = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-1:])
        log.error("provider_broke id=%s provider=%s error=%s", self.job.id, self._provider, f"{type(error).__name__}{location}")
        return NotNow(INTERNAL, f"the provider raised {type(error).__name__}{location}")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)


def _bounded_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report that the service takes, whatever the providers have to say."""
    if len(encode(report).encode()) <= MAX_REPORT_BYTES:
        return report
    return {**report, "providers": [{"name": item["name"][:100], "status": item["status"]} for item in report["providers"][:50]]}


# ---------------------------------------------------------------- the worker


class Worker:
    """Claims, runs and reports until `stop`. `run` blocks; a second `stop` cuts the drain short."""

    stuck_seconds = STUCK_SECONDS

    def __init__(self, settings: Settings, routes: Mapping[str, Sequence[InstalledProvider]], spool: Spool) -> None:
        self.worker_id = f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._settings, self._fleet, self._service_state = settings, Fleet(routes), ServiceState()
        self._heartbeat_seconds = min(settings.lease_seconds / 3, MAX_HEARTBEAT_SECONDS)
        # Three clients: closing the first ends an open claim and nothing else, a hung heartbeat must not eat up the lease.
        self._claim_client = self._client(read_seconds=10.0)
        self._heartbeat_client = self._client(read_seconds=max(2.0, self._heartbeat_seconds / 2))
        self._delivery = Delivery(self._client(read_seconds=60.0), spool, self._service_state)
        self._claim_id = str(uuid.uuid4())
        self._last_claim_at = time.monotonic()
        self._changed = threading.Condition()
        # By claim as well: a job whose claim was lost may come back before its first run has ended.
        self._running: dict[tuple[str, str], RunningJob] = {}
        self._draining, self._ended, self._heartbeat_soon = threading.Event(), threading.Event(), threading.Event()
        self._stops: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._has_failed = False

    def run(self) -> int:
        """Work until `stop`, then drain; 0, or 1 when a part of the worker broke."""
        self._fleet.check()
        profiles = ",".join(self._fleet.model_profiles)
        log.info("worker_started worker_id=%s concurrency=%d profiles=%s", self.worker_id, self._settings.concurrency, profiles)
        for name, loop in (("delivery", self._delivery.run), ("heartbeats", self._heartbeat_loop), ("checks", self._check_loop)):
            self._thread(name, loop)
        claiming = self._thread("claims", self._claim_loop)
        log.info("worker_draining reason=%s", self._stops.get())
        self._drain(claiming)
        return 1 if self._has_failed else 0

    def stop(self, reason: str = "stop") -> None:
        """Begin to drain; the second time, drain quickly. May be called from a signal handler: a simple queue is made for that."""
        self._stops.put(reason)

    def _client(self, read_seconds: float) -> AIService:
        # The loops here repeat for ever; the client's own repeats would only hide from them how things are.
        return AIService(self._settings.url, self._settings.token, retry_seconds=0.0, read_seconds=read_seconds, pool_size=2)

    def _thread(self, name: str, loop: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(name, loop), name=name, daemon=True)
        thread.start()
        return thread

    def _guarded(self, name: str, loop: Callable[[], None]) -> None:
        # A worker with a dead thread would look alive and do nothing: better to drain, and to be started again.
        try:
            loop()
        except BaseException:
            log.exception("worker_broke thread=%s", name)
            self._has_failed = True
            self.stop("broken")

    # Claims

    def _claim_loop(self) -> None:
        backoff = Backoff(0.5, 30.0)
        while (free_slots := self._wait_for_free_slots()) > 0:
            claimed_at = self._last_claim_at = time.monotonic()
            try:
                claim = self._claim(free_slots)
            except ServiceError as error:
                self._claim_failed(error, backoff)
                continue
            self._service_state.answered()
            self._start_all(claim)
            if backoff.failures:
                # The answer may repeat a lost one, with leases that are not fresh.
                self._heartbeat_soon.set()
            backoff.reset()
            if not claim.jobs:
                # A service that drains, or has too many waiting, answers an empty claim at once.
                self._draining.wait(max(0.0, 1.0 - (time.monotonic() - claimed_at)))
        self._release_last_claim()

    def _wait_for_free_slots(self) -> int:
        """How many jobs may be claimed, as soon as it is one at least; 0 when draining.

        While all circuits are open a claim is made all the same now and then, for a profile nobody has: the service hears how they are.
        """
        with self._changed:
            while not self._draining.is_set():
                free_slots = self._settings.concurrency - len(self._running)
                is_quiet = time.monotonic() - self._last_claim_at > REPORT_SECONDS
                if free_slots > 0 and self._delivery.accepts_more() and (self._fleet.claimable_profiles() or is_quiet):
                    return free_slots
                self._changed.wait(0.5)
        return 0

    def _claim(self, free_slots: int) -> Claim:
        return self._claim_client.claim(
            self.worker_id,
            limit=self._fleet.claim_limit(free_slots),
            model_profiles=self._fleet.claimable_profiles() or [self._claim_id],
            lease_seconds=self._settings.lease_seconds,
            # A worker that freezes while it waits loses a job that it was just given: not for long after it wakes.
            wait_seconds=min(2.0 if self._fleet.has_open_circuit() else CLAIM_WAIT_SECONDS, self._settings.lease_seconds / 2),
            claim_id=self._claim_id,
            worker=self._report(),
        )

    def _claim_failed(self, error: ServiceError, backoff: Backoff) -> None:
        """Wait a while. The claim_id stays, so that the repeat brings what a lost answer held; unless the service refuses it."""
        if self._draining.is_set():
            return
        if isinstance(error, ClaimIdReused):
            self._claim_id = str(uuid.uuid4())
        self._service_state.failed(error)
        self._draining.wait(backoff.next_seconds(error.retry_after_seconds and min(error.retry_after_seconds, 60.0)))

    def _start_all(self, claim: Claim) -> None:
        self._claim_id = str(uuid.uuid4())
        not_started = [job for job in claim.jobs if not self._start(job)]
        self._release_jobs(not_started)

    def _release_last_claim(self) -> None:
        """Give back what the last claim took while its connection was shut down.

        A repeat returns what a claim holds, whatever it filters by; should the claim never have got there, the made-up profile takes
        nothing. Asked twice, because the service may notice the closed connection a moment late.
        """
        with self._client(read_seconds=2.0) as service:
            for pause in (0.0, 0.5):
                self._ended.wait(pause)
                held = self._held_by_last_claim(service)
                self._release_jobs(held, service)

    def _held_by_last_claim(self, service: AIService) -> tuple[ClaimedJob, ...]:
        try:
            return service.claim(self.worker_id, limit=MAX_ITEMS, model_profiles=[self._claim_id], claim_id=self._claim_id).jobs
        except ServiceError as error:
            self._service_state.failed(error)
            return ()

    def _release_jobs(self, jobs: Iterable[ClaimedJob], service: AIService | None = None) -> None:
        releases = [Release(job.id, job.claim_id) for job in jobs]
        if not releases:
            return
        try:
            (service or self._heartbeat_client).release_many(releases)
            log.info("jobs_given_back count=%d", len(releases))
        except ServiceError as error:
            self._service_state.failed(error)

    # Jobs

    def _start(self, job: ClaimedJob) -> bool:
        """Whether it was started; not once the worker drains."""
        running = RunningJob(job, self._fleet, self._settings.job_timeout_seconds)
        with self._changed:
            if self._draining.is_set():
                return False
            self._running[job.id, job.claim_id] = running
        threading.Thread(target=self._guarded, args=("job", lambda: self._execute(running)), name=f"job-{job.id}", daemon=True).start()
        return True

    def _execute(self, running: RunningJob) -> None:
        try:
            outcome = running.execute()
            if running.decide():
                self._delivery.put(outcome).wait()
        finally:
            with self._changed:
                del self._running[running.job.id, running.job.claim_id]
                self._changed.notify_all()

    # Heartbeats and checks

    def _report(self) -> dict[str, Any]:
        state = {"version": _version(), "capacity": self._settings.concurrency, "running": len(self._running)}
        return _bounded_report({**state, "providers": self._fleet.report()})

    def _heartbeat_loop(self) -> None:
        backoff, pause = Backoff(0.5, self._heartbeat_seconds), self._heartbeat_seconds
        while not self._ended.is_set():
            self._heartbeat_soon.wait(pause)
            self._heartbeat_soon.clear()
            started = time.monotonic()
            try:
                self._send_heartbeats()
            except ServiceError as error:
                self._service_state.failed(error)
                pause = backoff.next_seconds()
            else:
                backoff.reset()
                pause = max(0.1, self._heartbeat_seconds - (time.monotonic() - started))

    def _send_heartbeats(self) -> None:
        with self._changed:
            everything = list(self._running.values())
        running = [one for one in everything if one.abandoned_at is None]
        self._abandon_overdue(running)
        self._stop_when_stuck(everything)
        for start in range(0, len(running), MAX_ITEMS):
            self._send_heartbeats_for(running[start : start + MAX_ITEMS])

    def _abandon_overdue(self, running: Iterable[RunningJob]) -> None:
        for one in running:
            if outcome := one.overdue_outcome():
                one.abandon()
                # Not here: a disk that hangs must not hold up the heartbeats.
                threading.Thread(target=self._delivery.put, args=(outcome,), daemon=True).start()

    def _stop_when_stuck(self, everything: Sequence[RunningJob]) -> None:
        """A worker all of whose slots are held by runs that will not end does nothing: better to be started again."""
        ended = time.monotonic() - self.stuck_seconds
        stuck = [one for one in everything if one.abandoned_at is not None and one.abandoned_at < ended]
        if len(stuck) >= self._settings.concurrency and not self._draining.is_set():
            log.error("worker_stuck runs=%d", len(stuck))
            self._has_failed = True
            self.stop("stuck")

    def _send_heartbeats_for(self, running: Sequence[RunningJob]) -> None:
        heartbeats = [Heartbeat(one.job.id, one.job.claim_id, self._settings.lease_seconds, one.progress) for one in running]
        answers = self._heartbeat_client.heartbeat_many(heartbeats, worker=self._report())
        self._service_state.answered()
        for one, answer in zip(running, answers, strict=False):
            if isinstance(answer.error, (Conflict, NotFound)):
                one.lose_claim(answer.error.code)
            elif isinstance(answer.error, ValidationFailed):
                # Only the progress can be at fault, and the lease matters more.
                one.progress = None

    def _check_loop(self) -> None:
        while not self._ended.wait(self._fleet.seconds_to_next_check()):
            self._fleet.check()

    # Drain

    def _drain(self, claiming: threading.Thread) -> None:
        """Finish what ends in time, give the rest back, deliver what can be delivered."""
        with self._changed:
            self._draining.set()
        self._claim_client.close()
        in_time = self._wait_for_jobs(self._settings.drain_seconds)
        self._release_the_rest()
        claiming.join(2.0 if in_time else 1.0)
        left = self._delivery.flush(5.0 if in_time else 1.0)
        self._ended.set()
        self._heartbeat_soon.set()
        self._delivery.close()
        self._heartbeat_client.close()
        log.info("worker_stopped worker_id=%s outcomes_left=%d", self.worker_id, left)

    def _wait_for_jobs(self, seconds: float) -> bool:
        """Whether the running jobs ended, or had their time, without a second stop."""
        deadline = time.monotonic() + seconds
        while self._running and time.monotonic() < deadline:
            try:
                self._stops.get(timeout=0.1)
            except queue.Empty:
                continue
            return False
        return True

    def _release_the_rest(self) -> None:
        with self._changed:
            running = list(self._running.values())
        for one in running:
            if one.decide():
                self._delivery.put(one.outcome("release", category="draining"))
            one.cancelled.set()


def _version() -> str:
    try:
        return importlib.metadata.version("ai-service")
    except importlib.metadata.PackageNotFoundError:
        return "source"


# ---------------------------------------------------------------- the command


def main(environ: Mapping[str, str]) -> int:
    """Run a worker until SIGTERM or SIGINT. 0 after a drain, 1 when it broke, 2 when its settings are wrong or no provider is set up."""
    log_to_stderr(environ)
    try:
        worker = _build_worker(environ)
    except SettingsError as wrong:
        complain("the worker cannot start", wrong.problems)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: worker.stop(signal.Signals(received).name))
    return worker.run()


def _build_worker(environ: Mapping[str, str]) -> Worker:
    """The worker of these settings. Raises SettingsError with all that is wrong."""
    problems: list[str] = []
    installed = providers.discover(environ)
    problems += [f"{one.name}: {problem}" for one in installed for problem in one.problems]
    settings = _collect_problems(problems, lambda: Settings.read(environ))
    order = settings.profile_providers if settings else {}
    routes = _collect_problems(problems, lambda: _routes(installed, order, allow_none=bool(problems)))
    if settings and routes is not None and not problems:
        spool = Spool(settings.spool_dir, settings.url, settings.spool_max_bytes)
        _collect_problems(problems, lambda: _open_spool(spool, settings.spool_dir))
    if problems or not settings or routes is None:
        raise SettingsError(problems)
    return Worker(settings, routes, spool)


def _collect_problems(problems: list[str], read: Callable[[], T]) -> T | None:
    """What is read, or None and its problems noted."""
    try:
        return read()
    except SettingsError as wrong:
        problems += wrong.problems
        return None


def _open_spool(spool: Spool, directory: Path) -> None:
    try:
        spool.open()
    except OSError as error:
        raise SettingsError([f"WORKER_SPOOL_DIR: {directory} cannot be used: {error.strerror or error}"]) from None


def _routes(
    installed: Sequence[InstalledProvider], order: Mapping[str, Sequence[str]], *, allow_none: bool
) -> dict[str, tuple[InstalledProvider, ...]]:
    """The providers of each profile in their order. Raises SettingsError."""
    routes = providers.by_profile(installed, order)
    if not routes and not allow_none:
        absent = "".join(f"; {_describe_absence(one)}" for one in installed)
        raise SettingsError([f"no provider is set up, so there is nothing to work for{absent}"])
    return routes


def _describe_absence(installed: InstalledProvider) -> str:
    return f"{installed.name}: {(installed.health and installed.health.detail) or 'serves no model profile'}"


if __name__ == "__main__":
    sys.exit(main(os.environ))
