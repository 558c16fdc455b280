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
    """What one attempt came to, as the service is to be told."""

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

    def told_to(self, service: AIService) -> str:
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

    def refused(self, error: ServiceError) -> Outcome | None:
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

    def __init__(self, folder: Path, service_url: str, max_bytes: int) -> None:
        self._folder, self._url, self._max_bytes = folder, service_url, max_bytes

    def open(self) -> None:
        """Make the folder, for this user alone. Raises OSError where that is impossible, or the folder belongs to somebody else."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{self._folder} belongs to another user")
        self._folder.chmod(0o700)
        self._remove_torn_files()

    def waiting(self) -> list[Path]:
        """The files left by an earlier process that are meant for this service."""
        found = sorted(self._folder.glob("*.outcome"))
        mine = [path for path in found if self._is_mine(path)]
        if len(mine) < len(found):
            log.warning("spool_has_outcomes_of_another_service count=%d", len(found) - len(mine))
        return mine

    def write(self, outcome: Outcome) -> Path:
        """Keep an outcome; once this returns it survives a crash of the machine. Raises SpoolFull, OSError."""
        content = f"{self._url}\n{outcome.text()}".encode()
        if self._bytes() + len(content) > self._max_bytes:
            raise SpoolFull(f"over {self._max_bytes} bytes")
        path = self._folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.outcome"
        torn = path.with_suffix(".torn")
        with open(os.open(torn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        torn.rename(path)
        self._sync_folder()
        return path

    def read(self, path: Path) -> Outcome:
        """The outcome in a file. Raises NotJSON, TypeError, KeyError for a damaged one, FileNotFoundError, OSError."""
        return Outcome.of_text(path.read_bytes().partition(b"\n")[2])

    def remove(self, path: Path) -> None:
        """Forget a delivered outcome; another worker may have been quicker."""
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path) -> None:
        """Keep a damaged file out of the way, for somebody to look at."""
        path.rename(path.with_suffix(".damaged"))

    def _is_mine(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.readline().rstrip(b"\n") == self._url.encode()
        except FileNotFoundError:
            return False

    def _bytes(self) -> int:
        return sum(_size(path) for path in self._folder.iterdir())

    def _remove_torn_files(self) -> None:
        # A file of the last hour may be one that another worker is writing.
        for path in self._folder.glob("*.torn"):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------- delivery


class Watch:
    """Whether the service answers; one line in the log when it goes and one when it comes back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._away_since: float | None = None

    def failed(self, error: ServiceError) -> None:
        """A call did not get through."""
        with self._lock:
            if self._away_since is None:
                self._away_since = time.monotonic()
                log.warning("service_went_away error=%s", error)

    def answered(self) -> None:
        """A call got through."""
        with self._lock:
            if self._away_since is not None:
                log.info("service_came_back seconds=%.1f", time.monotonic() - self._away_since)
                self._away_since = None


@attrs.define(eq=False)
class _Parcel:
    """An outcome to deliver: a file, or, where the disk did not take it, the outcome itself."""

    content: Path | Outcome
    safe: threading.Event = field(factory=threading.Event)
    backoff: Backoff = field(factory=lambda: Backoff(1.0, 300.0))
    due_at: float = 0.0


class Delivery:
    """Tells the service the outcomes, oldest first, until it takes them or says that the claim is gone."""

    def __init__(self, service: AIService, spool: Spool, watch: Watch) -> None:
        self._service, self._spool, self._watch = service, spool, watch
        self._changed = threading.Condition()
        self._parcels: deque[_Parcel] = deque(_Parcel(path) for path in spool.waiting())
        self._in_hand = 0
        self._closed = threading.Event()
        # The service is away, or what an earlier process left has yet to be tried.
        self._is_stuck = bool(self._parcels)

    def takes_more(self) -> bool:
        """Whether outcomes get away, so that more work makes sense: once the service is back, they race against its rescue of leases."""
        return not self._is_stuck and self._count() < MAX_UNDELIVERED

    def put(self, outcome: Outcome) -> threading.Event:
        """Take over an outcome. The event is set when it is safe: at once on disk, and where the disk refuses it, when it is delivered."""
        parcel = _Parcel(self._kept(outcome))
        if isinstance(parcel.content, Path):
            parcel.safe.set()
        with self._changed:
            self._parcels.append(parcel)
            self._changed.notify_all()
        return parcel.safe

    def run(self) -> None:
        """Deliver until closed."""
        backoff = Backoff(0.5, 5.0)
        while (parcel := self._next()) is not None:
            try:
                self._deliver(parcel)
            except (ServiceError, OSError) as error:
                is_away = isinstance(error, ServiceUnavailable) and not self._service_answers()
                self._put_off(parcel, error, is_away=is_away)
                if is_away:
                    self._closed.wait(backoff.next_seconds(getattr(error, "retry_after_seconds", None)))
            else:
                backoff.reset()
                self._finish(parcel)

    def flush(self, seconds: float) -> int:
        """Wait until everything is delivered, the service is away, or the time is over; how many outcomes are left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stuck or not self._count(), timeout=seconds)
            return self._count()

    def close(self) -> None:
        """Stop delivering; what is on disk stays there."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._service.close()

    def _kept(self, outcome: Outcome) -> Path | Outcome:
        try:
            return self._spool.write(outcome)
        except OSError as error:
            log.error("outcome_kept_in_memory id=%s error=%s", outcome.job_id, error)
            return outcome

    def _count(self) -> int:
        return len(self._parcels) + self._in_hand

    def _next(self) -> _Parcel | None:
        with self._changed:
            while not self._closed.is_set():
                due = next((parcel for parcel in self._parcels if parcel.due_at <= time.monotonic()), None)
                if due:
                    self._parcels.remove(due)
                    self._in_hand = 1
                    return due
                at = min((parcel.due_at for parcel in self._parcels), default=None)
                self._changed.wait(None if at is None else max(0.0, at - time.monotonic()))
        return None

    def _service_answers(self) -> bool:
        """Whether it is ready, so that the trouble lies with the one outcome: a proxy may not let it through."""
        try:
            return self._service.readyz()
        except ServiceError:
            return True

    def _put_off(self, parcel: _Parcel, error: ServiceError | OSError, *, is_away: bool) -> None:
        # To the end and, where the trouble is its own, for a while: it must not hold up the others.
        if not is_away:
            parcel.due_at = time.monotonic() + parcel.backoff.next_seconds()
        with self._changed:
            self._parcels.append(parcel)
            self._in_hand = 0
            self._is_stuck = is_away
            self._changed.notify_all()
        if is_away and isinstance(error, ServiceError):
            self._watch.failed(error)
        else:
            log.error("outcome_put_off error=%s", error)

    def _finish(self, parcel: _Parcel) -> None:
        parcel.safe.set()
        with self._changed:
            self._in_hand = 0
            self._is_stuck = False
            self._changed.notify_all()

    def _deliver(self, parcel: _Parcel) -> None:
        outcome = self._opened(parcel.content)
        if outcome is not None:
            with about_span(outcome.traceparent):
                self._tell(outcome)
        if isinstance(parcel.content, Path):
            self._spool.remove(parcel.content)

    def _opened(self, content: Path | Outcome) -> Outcome | None:
        """The outcome to tell; None where another worker was quicker, or the file is damaged."""
        if isinstance(content, Outcome):
            return content
        try:
            return self._spool.read(content)
        except FileNotFoundError:
            return None
        except (NotJSON, TypeError, KeyError) as error:
            log.error("spool_file_damaged file=%s error=%s", content.name, type(error).__name__)
            self._spool.set_aside(content)
            return None

    def _tell(self, outcome: Outcome) -> None:
        try:
            status = outcome.told_to(self._service)
        except (ValidationFailed, PayloadTooLarge) as error:
            self._tell_refusal(outcome, error)
        except (Conflict, NotFound) as error:
            if isinstance(error, NotFound) and error.code != "job_not_found":
                raise
            known = (outcome.job_id, outcome.verb, error.code, error.request_id)
            log.warning("outcome_came_too_late id=%s verb=%s code=%s request_id=%s", *known)
        else:
            _log_outcome(outcome, status)
        self._watch.answered()

    def _tell_refusal(self, outcome: Outcome, error: ServiceError) -> None:
        log.error("outcome_refused id=%s verb=%s error=%s", outcome.job_id, outcome.verb, error)
        failure = outcome.refused(error)
        if failure is not None:
            self._tell(failure)


_ENDED = " id=%s task_type=%s model_profile=%s provider=%s attempt=%d seconds=%.3f status=%s"
_ENDINGS = {
    "complete": f"job_completed{_ENDED}",
    "fail": f"job_failed{_ENDED} category=%s",
    "release": f"job_released{_ENDED} category=%s",
}


def _log_outcome(outcome: Outcome, status: str) -> None:
    why = () if outcome.verb == "complete" else (outcome.category,)
    what = (outcome.job_id, outcome.task_type, outcome.model_profile, outcome.provider, outcome.attempt, outcome.seconds)
    log.info(_ENDINGS[outcome.verb], *what, status, *why)
