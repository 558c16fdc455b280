"""Outcomes on their way to the service: on disk first, then delivered, oldest first.

    outcome ──► file ──► complete, fail or release ──► file removed
                           │
                           └ repeated until the service takes it or says that the claim is gone

An outcome on disk survives the end of the worker and the absence of the service. The next worker with the same directory delivers it.

Sections: outcomes, the spool, delivery.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from ai_client import (
    AIService,
    Backoff,
    Conflict,
    NotFound,
    NotJSON,
    PayloadTooLarge,
    RawJSON,
    ServiceError,
    ServiceUnavailable,
    ValidationFailed,
    object_text,
    split_object,
)
from ai_internal.telemetry import about_span
from providers import INTERNAL, INVALID_OUTPUT

log = logging.getLogger("ai_service.worker")

# An outcome that waits has no heartbeat: no more of them than a busy service takes within the shortest lease.
MAX_UNDELIVERED = 100


# ---------------------------------------------------------------- outcomes


@frozen(kw_only=True)
class Outcome:
    """What one attempt came to, as it is reported to the service."""

    verb: Literal["complete", "fail", "release"]
    job_id: str
    claim_id: str = field(repr=False)
    task_type: str
    model_profile: str
    provider: str
    attempt: int
    seconds: float
    result: RawJSON | None = field(default=None, repr=False)
    usage: Mapping[str, Any] | None = None
    category: str = INTERNAL
    message: str = field(default="", repr=False)
    retryable: bool = False
    delay_seconds: float | None = None
    traceparent: str | None = None

    def text(self) -> str:
        """Its JSON; the result as the text it has."""
        return object_text({attribute.name: getattr(self, attribute.name) for attribute in attrs.fields(Outcome)})

    @classmethod
    def of_text(cls, text: bytes) -> Outcome:
        """The outcome of such JSON. Raises NotJSON or TypeError."""
        fields = split_object(text)
        raw = fields.pop("result")
        known = cls(**{name: value.decode() for name, value in fields.items()})
        return attrs.evolve(known, result=raw) if known.verb == "complete" else known

    def report_to(self, service: AIService) -> str:
        """Report it; the job's status after that. Raises ServiceError."""
        if self.verb == "complete":
            return service.complete(self.job_id, self.claim_id, self.result, self.usage).status
        if self.verb == "release":
            return service.release(self.job_id, self.claim_id, self.delay_seconds).status
        return service.fail(
            self.job_id,
            self.claim_id,
            self.category,
            self.message,
            retryable=self.retryable,
            retry_in_seconds=self.delay_seconds,
            usage=self.usage,
        ).status

    def rejected_by(self, error: ServiceError) -> Outcome | None:
        """The failure that takes the place of a result which the service will not have; None when this is a failure already."""
        if self.verb == "fail":
            return None
        message = f"the service refused the {'result' if self.verb == 'complete' else 'release'}: {error}"
        return attrs.evolve(
            self, verb="fail", result=None, usage=None, category=INVALID_OUTPUT, message=message, retryable=False, delay_seconds=None
        )


# ---------------------------------------------------------------- the spool


class SpoolFull(OSError):
    """The folder holds as much as it may."""


class Spool:
    """Outcomes on disk, one file each, oldest first by name. Several workers of one service may share a folder.

    A file's first line names the service it is meant for, so that the same folder used for another one loses nothing.
    """

    def __init__(self, directory: Path, service_url: str, max_bytes: int) -> None:
        self._directory, self._url, self._max_bytes = directory, service_url, max_bytes

    def open(self) -> None:
        """Make the folder, for this user alone. Raises OSError where that is impossible, or the folder belongs to somebody else."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._directory.stat().st_uid != os.geteuid():
            raise PermissionError(f"{self._directory} belongs to another user")
        self._directory.chmod(0o700)
        self._remove_partial_files()

    def waiting(self) -> list[Path]:
        """The files left by an earlier process that are meant for this service."""
        found = sorted(self._directory.glob("*.outcome"))
        ours = [path for path in found if self._is_for_this_service(path)]
        if len(ours) < len(found):
            log.warning("spool_has_outcomes_of_another_service count=%d", len(found) - len(ours))
        return ours

    def write(self, outcome: Outcome) -> Path:
        """Keep an outcome; once this returns it survives a crash of the machine. Raises SpoolFull, OSError."""
        content = f"{self._url}\n{outcome.text()}".encode()
        if self._bytes() + len(content) > self._max_bytes:
            raise SpoolFull(f"over {self._max_bytes} bytes")
        path = self._directory / f"{time.time_ns():020d}-{secrets.token_hex(4)}.outcome"
        partial = path.with_suffix(".torn")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        self._sync_directory()
        return path

    def read(self, path: Path) -> Outcome:
        """The outcome in a file. Raises NotJSON, TypeError, KeyError for a damaged one, FileNotFoundError, OSError."""
        return Outcome.of_text(path.read_bytes().partition(b"\n")[2])

    def remove(self, path: Path) -> None:
        """Forget a delivered outcome; another worker may have been quicker."""
        path.unlink(missing_ok=True)

    def quarantine(self, path: Path) -> None:
        """Keep a damaged file out of the way, for somebody to look at."""
        path.rename(path.with_suffix(".damaged"))

    def _is_for_this_service(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.readline().rstrip(b"\n") == self._url.encode()
        except FileNotFoundError:
            return False

    def _bytes(self) -> int:
        return sum(_size(path) for path in self._directory.iterdir())

    def _remove_partial_files(self) -> None:
        # A file of the last hour may be one that another worker is writing.
        for path in self._directory.glob("*.torn"):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)

    def _sync_directory(self) -> None:
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------- delivery


class ServiceState:
    """Whether the service answers; one line in the log when it goes and one when it comes back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unavailable_since: float | None = None

    def failed(self, error: ServiceError) -> None:
        """A call did not get through."""
        with self._lock:
            if self._unavailable_since is None:
                self._unavailable_since = time.monotonic()
                log.warning("service_went_away error=%s", error)

    def answered(self) -> None:
        """A call got through."""
        with self._lock:
            if self._unavailable_since is not None:
                log.info("service_came_back seconds=%.1f", time.monotonic() - self._unavailable_since)
                self._unavailable_since = None


@attrs.define(eq=False)
class _PendingOutcome:
    """An outcome to deliver: a file, or, where the disk did not take it, the outcome itself."""

    content: Path | Outcome
    safe: threading.Event = field(factory=threading.Event)
    backoff: Backoff = field(factory=lambda: Backoff(1.0, 300.0))
    due_at: float = 0.0


class Delivery:
    """Tells the service the outcomes, oldest first, until it takes them or says that the claim is gone."""

    def __init__(self, service: AIService, spool: Spool, service_state: ServiceState) -> None:
        self._service, self._spool, self._service_state = service, spool, service_state
        self._changed = threading.Condition()
        self._pending: deque[_PendingOutcome] = deque(_PendingOutcome(path) for path in spool.waiting())
        self._in_progress = 0
        self._closed = threading.Event()
        # The service is away, or what an earlier process left has yet to be tried.
        self._is_blocked = bool(self._pending)

    def accepts_more(self) -> bool:
        """Whether outcomes get away, so that more work makes sense: once the service is back, they race against its rescue of leases."""
        return not self._is_blocked and self._count() < MAX_UNDELIVERED

    def put(self, outcome: Outcome) -> threading.Event:
        """Take over an outcome. The event is set when it is safe: at once on disk, and where the disk refuses it, when it is delivered."""
        pending = _PendingOutcome(self._store(outcome))
        if isinstance(pending.content, Path):
            pending.safe.set()
        with self._changed:
            self._pending.append(pending)
            self._changed.notify_all()
        return pending.safe

    def run(self) -> None:
        """Deliver until closed."""
        backoff = Backoff(0.5, 5.0)
        while (pending := self._next()) is not None:
            try:
                self._deliver(pending)
            except (ServiceError, OSError) as error:
                is_unavailable = isinstance(error, ServiceUnavailable) and not self._service_answers()
                self._postpone(pending, error, is_unavailable=is_unavailable)
                if is_unavailable:
                    self._closed.wait(backoff.next_seconds(getattr(error, "retry_after_seconds", None)))
            else:
                backoff.reset()
                self._finish(pending)

    def flush(self, seconds: float) -> int:
        """Wait until everything is delivered, the service is away, or the time is over; how many outcomes are left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_blocked or not self._count(), timeout=seconds)
            return self._count()

    def close(self) -> None:
        """Stop delivering; what is on disk stays there."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._service.close()

    def _store(self, outcome: Outcome) -> Path | Outcome:
        try:
            return self._spool.write(outcome)
        except OSError as error:
            log.error("outcome_kept_in_memory id=%s error=%s", outcome.job_id, error)
            return outcome

    def _count(self) -> int:
        return len(self._pending) + self._in_progress

    def _next(self) -> _PendingOutcome | None:
        with self._changed:
            while not self._closed.is_set():
                due = next((pending for pending in self._pending if pending.due_at <= time.monotonic()), None)
                if due:
                    self._pending.remove(due)
                    self._in_progress = 1
                    return due
                at = min((pending.due_at for pending in self._pending), default=None)
                self._changed.wait(None if at is None else max(0.0, at - time.monotonic()))
        return None

    def _service_answers(self) -> bool:
        """Whether it is ready, so that the trouble lies with the one outcome: a proxy may not let it through."""
        try:
            return self._service.readyz()
        except ServiceError:
            return True

    def _postpone(self, pending: _PendingOutcome, error: ServiceError | OSError, *, is_unavailable: bool) -> None:
        # To the end and, where the trouble is its own, for a while: it must not hold up the others.
        if not is_unavailable:
            pending.due_at = time.monotonic() + pending.backoff.next_seconds()
        with self._changed:
            self._pending.append(pending)
            self._in_progress = 0
            self._is_blocked = is_unavailable
            self._changed.notify_all()
        if is_unavailable and isinstance(error, ServiceError):
            self._service_state.failed(error)
        else:
            log.error("outcome_put_off error=%s", error)

    def _finish(self, pending: _PendingOutcome) -> None:
        pending.safe.set()
        with self._changed:
            self._in_progress = 0
            self._is_blocked = False
            self._changed.notify_all()

    def _deliver(self, pending: _PendingOutcome) -> None:
        outcome = self._load(pending.content)
        if outcome is not None:
            with about_span(outcome.traceparent):
                self._report(outcome)
        if isinstance(pending.content, Path):
            self._spool.remove(pending.content)

    def _load(self, content: Path | Outcome) -> Outcome | None:
        """The outcome to tell; None where another worker was quicker, or the file is damaged."""
        if isinstance(content, Outcome):
            return content
        try:
            return self._spool.read(content)
        except FileNotFoundError:
            return None
        except (NotJSON, TypeError, KeyError) as error:
            log.error("spool_file_damaged file=%s error=%s", content.name, type(error).__name__)
            self._spool.quarantine(content)
            return None

    def _report(self, outcome: Outcome) -> None:
        try:
            status = outcome.report_to(self._service)
        except (ValidationFailed, PayloadTooLarge) as error:
            self._report_rejection(outcome, error)
        except (Conflict, NotFound) as error:
            if isinstance(error, NotFound) and error.code != "job_not_found":
                raise
            known = (outcome.job_id, outcome.verb, error.code, error.request_id)
            log.warning("outcome_came_too_late id=%s verb=%s code=%s request_id=%s", *known)
        else:
            _log_outcome(outcome, status)
        self._service_state.answered()

    def _report_rejection(self, outcome: Outcome, error: ServiceError) -> None:
        log.error("outcome_refused id=%s verb=%s error=%s", outcome.job_id, outcome.verb, error)
        failure = outcome.rejected_by(error)
        if failure is not None:
            self._report(failure)


_FIELDS = " id=%s task_type=%s model_profile=%s provider=%s attempt=%d seconds=%.3f status=%s"
_EVENTS = {
    "complete": f"job_completed{_FIELDS}",
    "fail": f"job_failed{_FIELDS} category=%s",
    "release": f"job_released{_FIELDS} category=%s",
}


def _log_outcome(outcome: Outcome, status: str) -> None:
    why = () if outcome.verb == "complete" else (outcome.category,)
    what = (outcome.job_id, outcome.task_type, outcome.model_profile, outcome.provider, outcome.attempt, outcome.seconds)
    log.info(_EVENTS[outcome.verb], *what, status, *why)
