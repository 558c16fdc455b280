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
from ai_internal.worker.spool import Delivery, Outcome, Spool, Watch
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
MAX_BEAT_SECONDS = 30.0
# The service takes a year. A provider that asks for more than a day has most likely confused its units.
MAX_DELAY_SECONDS = float(DAY_SECONDS)

# A provider that ignores the end of its time is left to itself so long after it, and the job's attempt counted as failed.
OVERDUE_SECONDS = 30.0
# And where such runs hold all slots for so long after they were given up, the worker ends.
STUCK_SECONDS = 300.0
# A job that a provider gave back without a reason of its service's waits so long.
GIVEN_BACK_SECONDS = 2.0
# And no longer than so, however long the circuit stays open: another worker may be better off.
MAX_GIVEN_BACK_SECONDS = 600.0

T = TypeVar("T")


# ---------------------------------------------------------------- settings


def _read_folder(text: str) -> Path:
    return Path(text).expanduser()


def _read_order(text: str) -> dict[str, tuple[str, ...]]:
    """`profile=provider,provider; profile=provider`."""
    return {profile: tuple(re.split(r"\s*,\s*", names)) for profile, names in pairs(text, ";").items()}


@frozen(kw_only=True)
class Settings(ClientSettings):
    """What a worker is told by its environment."""

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
        read=_read_folder,
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


def _note(name: str, value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Usage or progress as the service takes it; left out, with a warning, when it would be refused: the result counts more."""
    try:
        if value is None or (isinstance(value, Mapping) and len(encode(dict(value)).encode()) <= MAX_NOTE_BYTES):
            return None if value is None else dict(value)
        log.warning("note_dropped kind=%s reason=too_large_or_no_object", name)
    except NotJSON as error:
        log.warning("note_dropped kind=%s reason=%s", name, error)
    return None


def _usage(given: Mapping[str, Any] | None, provider: str, seconds: float) -> Mapping[str, Any]:
    """Usage with what the worker knows. Where it is too much for the service, what the model service counted itself goes first."""
    known = {"provider": provider, "running_seconds": round(seconds, 3)}
    if not isinstance(given, Mapping):
        _note("usage", given)
        return known
    named = {**known, **given, "provider": provider}
    return _note("usage", named) or _note("usage", {name: value for name, value in named.items() if name != "raw"}) or known


def _delay(seconds: float | None) -> float | None:
    # A NaN compares false with everything and so becomes 0.
    return None if seconds is None else min(MAX_DELAY_SECONDS, max(0.0, seconds))


def _plain(text: str) -> str:
    """Text that any JSON reader and PostgreSQL take: no NUL, no half surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


# ---------------------------------------------------------------- jobs under way


class Running:
    """One job that is being executed. Exactly one of its end, the loss of its claim, and the drain decides what becomes of it."""

    def __init__(self, job: ClaimedJob, fleet: Fleet, timeout_seconds: float) -> None:
        self.job, self._fleet = job, fleet
        self.cancelled = threading.Event()
        self.progress: Mapping[str, Any] | None = None
        self.given_up_at: float | None = None
        # Of this attempt: a span of its own under the caller's.
        self.traceparent = child_of(job.traceparent)
        self._provider = "none"
        self._started = time.monotonic()
        self._deadline = self._started + timeout_seconds
        self._undecided = threading.Lock()

    def decide(self) -> bool:
        """True for the first who asks: what becomes of the job is then up to them."""
        return self._undecided.acquire(blocking=False)

    def lose(self, code: str) -> None:
        """The claim no longer holds the job: stop the work, report nothing."""
        if self.decide():
            with about_span(self.traceparent):
                log.warning("job_lost id=%s task_type=%s provider=%s code=%s", self.job.id, self.job.task_type, self._provider, code)
        self.give_up()

    def give_up(self) -> None:
        """Stop the work; nothing waits for it any more."""
        self.given_up_at = self.given_up_at or time.monotonic()
        self.cancelled.set()

    def overdue(self) -> Outcome | None:
        """The end of an attempt whose provider went on after its deadline; None for any other."""
        if time.monotonic() < self._deadline + OVERDUE_SECONDS or not self.decide():
            return None
        with about_span(self.traceparent):
            log.error("job_overdue id=%s provider=%s", self.job.id, self._provider)
        return self._failed(NotNow(TIMEOUT, "the provider went on after its deadline and was left to itself"), retryable=True)

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
                return self._tried()
        except Exception as error:  # noqa: BLE001 -- what a stranger's code made of its outcome
            return self._failed(self._broken(error), retryable=True)

    def _tried(self) -> Outcome:
        try:
            job = self._job()
        except Never as unreadable:
            return self._outcome_of(unreadable)
        refusals: list[NotNow | Unsupported] = []
        for turn in self._fleet.turns(self.job.model_profile):
            self._provider = turn.listed.name
            ended = self._attempt(turn.listed, job)
            turn.end(ended)
            if not isinstance(ended, NotNow | Unsupported) or (isinstance(ended, NotNow) and ended.burns_attempt):
                return self._outcome_of(ended)
            refusals.append(ended)
            if self.cancelled.is_set():
                break
        return self._refused(refusals)

    def _attempt(self, listed: InstalledProvider, job: providers.Job) -> Result | NotCompleted:
        try:
            assert listed.provider is not None, "only providers that were made are claimed for"
            result = listed.provider.run(job)
        except NotCompleted as outcome:
            return outcome
        except BaseException as error:  # noqa: BLE001 -- a stranger's code, which may even call sys.exit
            return self._broken(error)
        return result if isinstance(result, Result) else self._broken(TypeError("not a Result"))

    def _job(self) -> providers.Job:
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
        self.progress = _note("progress", progress)

    def _outcome_of(self, ended: Result | NotCompleted) -> Outcome:
        if isinstance(ended, Result):
            return self._completed(ended)
        if isinstance(ended, NotNow):
            return self._failed(ended, retryable=True, delay_seconds=_delay(ended.retry_in_seconds))
        return self._failed(ended, retryable=False)

    def _refused(self, refusals: Sequence[NotNow | Unsupported]) -> Outcome:
        """Nobody did any work: the job goes back unharmed, unless all providers of its profile say that they never will."""
        not_now = [refusal for refusal in refusals if isinstance(refusal, NotNow)]
        if not not_now and len(refusals) == self._fleet.count(self.job.model_profile):
            return self._failed(refusals[-1], retryable=False)
        category = not_now[0].category if not_now else UNAVAILABLE
        return self.outcome("release", category=category, delay_seconds=_delay(self._pause(refusals, not_now)))

    def _pause(self, refusals: Sequence[NotNow | Unsupported], not_now: Sequence[NotNow]) -> float:
        asked = [refusal.retry_in_seconds for refusal in not_now if refusal.retry_in_seconds is not None]
        if asked:
            return min(asked)
        # A job that only a provider behind an open circuit may do would otherwise come back to those that cannot.
        least = UNSUPPORTED_SECONDS if len(refusals) > len(not_now) else GIVEN_BACK_SECONDS
        return min(MAX_GIVEN_BACK_SECONDS, max(least, self._fleet.seconds_until_open(self.job.model_profile)))

    def _completed(self, result: Result) -> Outcome:
        try:
            text = RawJSON(encode(result.value))
        except NotJSON as error:
            return self._failed(NotNow(INVALID_OUTPUT, f"the provider's result is {error}", usage=result.usage), retryable=True)
        return self.outcome("complete", result=text, usage=_usage(result.usage, self._provider, self._seconds()))

    def _failed(self, error: NotCompleted, **fields: Any) -> Outcome:
        usage = _usage(error.usage, self._provider, self._seconds())
        return self.outcome("fail", category=error.category, message=_plain(error.message), usage=usage, **fields)

    def _broken(self, error: BaseException) -> NotNow:
        # The exception's text may hold a piece of the payload: its type and place must do.
        place = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-1:])
        log.error("provider_broke id=%s provider=%s error=%s", self.job.id, self._provider, f"{type(error).__name__}{place}")
        return NotNow(INTERNAL, f"the provider raised {type(error).__name__}{place}")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)


def _bounded(report: dict[str, Any]) -> dict[str, Any]:
    """A report that the service takes, whatever the providers have to say."""
    if len(encode(report).encode()) <= MAX_REPORT_BYTES:
        return report
    return {**report, "providers": [{"name": item["name"][:100], "status": item["status"]} for item in report["providers"][:50]]}


# ---------------------------------------------------------------- the worker


class Worker:
    """Claims, runs and reports until `stop`. `run` blocks; a second `stop` cuts the drain short."""

    def __init__(self, settings: Settings, routes: Mapping[str, Sequence[InstalledProvider]], spool: Spool) -> None:
        self.worker_id = f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._settings, self._fleet, self._watch = settings, Fleet(routes), Watch()
        self._beat_seconds = min(settings.lease_seconds / 3, MAX_BEAT_SECONDS)
        # Three clients: closing the first ends an open claim and nothing else, a hung heartbeat must not eat up the lease.
        self._claims = self._client(read_seconds=10.0)
        self._beats = self._client(read_seconds=max(2.0, self._beat_seconds / 2))
        self._delivery = Delivery(self._client(read_seconds=60.0), spool, self._watch)
        self._claim_id = str(uuid.uuid4())
        self._asked_at = time.monotonic()
        self._changed = threading.Condition()
        # By claim as well: a job whose claim was lost may come back before its first run has ended.
        self._running: dict[tuple[str, str], Running] = {}
        self._draining, self._ended, self._beat_soon = threading.Event(), threading.Event(), threading.Event()
        self._stops: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_broken = False

    def run(self) -> int:
        """Work until `stop`, then drain; 0, or 1 when a part of the worker broke."""
        self._fleet.check()
        profiles = ",".join(self._fleet.model_profiles)
        log.info("worker_started worker_id=%s concurrency=%d profiles=%s", self.worker_id, self._settings.concurrency, profiles)
        for name, loop in (("delivery", self._delivery.run), ("heartbeats", self._beat_forever), ("checks", self._check_forever)):
            self._thread(name, loop)
        claiming = self._thread("claims", self._claim_forever)
        log.info("worker_draining reason=%s", self._stops.get())
        self._drain(claiming)
        return 1 if self._is_broken else 0

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
            self._is_broken = True
            self.stop("broken")

    # Claims

    def _claim_forever(self) -> None:
        backoff = Backoff(0.5, 30.0)
        while (room := self._room()) > 0:
            asked_at = self._asked_at = time.monotonic()
            try:
                claim = self._claim(room)
            except ServiceError as error:
                self._claim_failed(error, backoff)
                continue
            self._watch.answered()
            self._accept(claim)
            if backoff.failures:
                # The answer may repeat a lost one, with leases that are not fresh.
                self._beat_soon.set()
            backoff.reset()
            if not claim.jobs:
                # A service that drains, or has too many waiting, answers an empty claim at once.
                self._draining.wait(max(0.0, 1.0 - (time.monotonic() - asked_at)))
        self._settle_claim()

    def _room(self) -> int:
        """How many jobs may be claimed, as soon as it is one at least; 0 when draining.

        While all circuits are open a claim is made all the same now and then, for a profile nobody has: the service hears how they are.
        """
        with self._changed:
            while not self._draining.is_set():
                room = self._settings.concurrency - len(self._running)
                is_quiet = time.monotonic() - self._asked_at > REPORT_SECONDS
                if room > 0 and self._delivery.takes_more() and (self._fleet.open_profiles() or is_quiet):
                    return room
                self._changed.wait(0.5)
        return 0

    def _claim(self, room: int) -> Claim:
        return self._claims.claim(
            self.worker_id,
            limit=self._fleet.may_claim(room),
            model_profiles=self._fleet.open_profiles() or [self._claim_id],
            lease_seconds=self._settings.lease_seconds,
            # A worker that freezes while it waits loses a job that it was just given: not for long after it wakes.
            wait_seconds=min(2.0 if self._fleet.is_in_trouble() else CLAIM_WAIT_SECONDS, self._settings.lease_seconds / 2),
            claim_id=self._claim_id,
            worker=self._report(),
        )

    def _claim_failed(self, error: ServiceError, backoff: Backoff) -> None:
        """Wait a while. The claim_id stays, so that the repeat brings what a lost answer held; unless the service refuses it."""
        if self._draining.is_set():
            return
        if isinstance(error, ClaimIdReused):
            self._claim_id = str(uuid.uuid4())
        self._watch.failed(error)
        self._draining.wait(backoff.next_seconds(error.retry_after_seconds and min(error.retry_after_seconds, 60.0)))

    def _accept(self, claim: Claim) -> None:
        self._claim_id = str(uuid.uuid4())
        refused = [job for job in claim.jobs if not self._start(job)]
        self._give_back(refused)

    def _settle_claim(self) -> None:
        """Give back what the last claim took while its connection was shut down.

        A repeat returns what a claim holds, whatever it filters by; should the claim never have got there, the made-up profile takes
        nothing. Asked twice, because the service may notice the closed connection a moment late.
        """
        with self._client(read_seconds=2.0) as service:
            for pause in (0.0, 0.5):
                self._ended.wait(pause)
                held = self._held_by_last_claim(service)
                self._give_back(held, service)

    def _held_by_last_claim(self, service: AIService) -> tuple[ClaimedJob, ...]:
        try:
            return service.claim(self.worker_id, limit=MAX_ITEMS, model_profiles=[self._claim_id], claim_id=self._claim_id).jobs
        except ServiceError as error:
            self._watch.failed(error)
            return ()

    def _give_back(self, jobs: Iterable[ClaimedJob], service: AIService | None = None) -> None:
        releases = [Release(job.id, job.claim_id) for job in jobs]
        if not releases:
            return
        try:
            (service or self._beats).release_many(releases)
            log.info("jobs_given_back count=%d", len(releases))
        except ServiceError as error:
            self._watch.failed(error)

    # Jobs

    def _start(self, job: ClaimedJob) -> bool:
        """Whether it was started; not once the worker drains."""
        running = Running(job, self._fleet, self._settings.job_timeout_seconds)
        with self._changed:
            if self._draining.is_set():
                return False
            self._running[job.id, job.claim_id] = running
        threading.Thread(target=self._guarded, args=("job", lambda: self._execute(running)), name=f"job-{job.id}", daemon=True).start()
        return True

    def _execute(self, running: Running) -> None:
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
        return _bounded({**state, "providers": self._fleet.report()})

    def _beat_forever(self) -> None:
        backoff, pause = Backoff(0.5, self._beat_seconds), self._beat_seconds
        while not self._ended.is_set():
            self._beat_soon.wait(pause)
            self._beat_soon.clear()
            started = time.monotonic()
            try:
                self._beat()
            except ServiceError as error:
                self._watch.failed(error)
                pause = backoff.next_seconds()
            else:
                backoff.reset()
                pause = max(0.1, self._beat_seconds - (time.monotonic() - started))

    def _beat(self) -> None:
        with self._changed:
            everything = list(self._running.values())
        running = [one for one in everything if one.given_up_at is None]
        self._give_up_overdue(running)
        self._stop_when_stuck(everything)
        for start in range(0, len(running), MAX_ITEMS):
            self._beat_for(running[start : start + MAX_ITEMS])

    def _give_up_overdue(self, running: Iterable[Running]) -> None:
        for one in running:
            if outcome := one.overdue():
                one.give_up()
                # Not here: a disk that hangs must not hold up the heartbeats.
                threading.Thread(target=self._delivery.put, args=(outcome,), daemon=True).start()

    def _stop_when_stuck(self, everything: Sequence[Running]) -> None:
        """A worker all of whose slots are held by runs that will not end does nothing: better to be started again."""
        ended = time.monotonic() - STUCK_SECONDS
        stuck = [one for one in everything if one.given_up_at is not None and one.given_up_at < ended]
        if len(stuck) >= self._settings.concurrency and not self._draining.is_set():
            log.error("worker_stuck runs=%d", len(stuck))
            self._is_broken = True
            self.stop("stuck")

    def _beat_for(self, running: Sequence[Running]) -> None:
        lease = self._settings.lease_seconds
        beats = [Heartbeat(one.job.id, one.job.claim_id, lease, one.progress) for one in running]
        answers = self._beats.heartbeat_many(beats, worker=self._report())
        self._watch.answered()
        for one, answer in zip(running, answers, strict=False):
            if isinstance(answer.error, (Conflict, NotFound)):
                one.lose(answer.error.code)
            elif isinstance(answer.error, ValidationFailed):
                # Only the progress can be at fault, and the lease matters more.
                one.progress = None

    def _check_forever(self) -> None:
        while not self._ended.wait(self._fleet.seconds_to_next_check()):
            self._fleet.check()

    # Drain

    def _drain(self, claiming: threading.Thread) -> None:
        """Finish what ends in time, give the rest back, deliver what can be delivered."""
        with self._changed:
            self._draining.set()
        self._claims.close()
        in_time = self._wait_for_jobs(self._settings.drain_seconds)
        self._release_the_rest()
        claiming.join(2.0 if in_time else 1.0)
        left = self._delivery.flush(5.0 if in_time else 1.0)
        self._ended.set()
        self._beat_soon.set()
        self._delivery.close()
        self._beats.close()
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
        worker = _made(environ)
    except SettingsError as wrong:
        complain("the worker cannot start", wrong.problems)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: worker.stop(signal.Signals(received).name))
    return worker.run()


def _made(environ: Mapping[str, str]) -> Worker:
    """The worker of these settings. Raises SettingsError with all that is wrong."""
    problems: list[str] = []
    listed = providers.discover(environ)
    problems += [f"{one.name}: {problem}" for one in listed for problem in one.problems]
    settings = _noted(problems, lambda: Settings.read(environ))
    order = settings.profile_providers if settings else {}
    routes = _noted(problems, lambda: _routes(listed, order, may_be_none=bool(problems)))
    if settings and routes is not None and not problems:
        spool = Spool(settings.spool_dir, settings.url, settings.spool_max_bytes)
        _noted(problems, lambda: _opened(spool, settings.spool_dir))
    if problems or not settings or routes is None:
        raise SettingsError(problems)
    return Worker(settings, routes, spool)


def _noted(problems: list[str], read: Callable[[], T]) -> T | None:
    """What is read, or None and its problems noted."""
    try:
        return read()
    except SettingsError as wrong:
        problems += wrong.problems
        return None


def _opened(spool: Spool, folder: Path) -> None:
    try:
        spool.open()
    except OSError as error:
        raise SettingsError([f"WORKER_SPOOL_DIR: {folder} cannot be used: {error.strerror or error}"]) from None


def _routes(
    listed: Sequence[InstalledProvider], order: Mapping[str, Sequence[str]], *, may_be_none: bool
) -> dict[str, tuple[InstalledProvider, ...]]:
    """The providers of each profile in their order. Raises SettingsError."""
    routes = providers.by_profile(listed, order)
    if not routes and not may_be_none:
        raise SettingsError(["no provider is set up, so there is nothing to work for" + "".join(f"; {_why_absent(one)}" for one in listed)])
    return routes


def _why_absent(listed: InstalledProvider) -> str:
    return f"{listed.name}: {(listed.health and listed.health.detail) or 'serves no model profile'}"


if __name__ == "__main__":
    sys.exit(main(os.environ))
