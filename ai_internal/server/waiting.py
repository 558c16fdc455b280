"""The requests that wait: claims for a job, and callers for a job's end.

Sections: the queue as it is used here, claims that wait.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import attrs

from ai_internal.server.group_commit import taken_lock
from ai_internal.server.requests import ClaimRequest, Filters, Refusal, ServiceFull
from ai_internal.telemetry import about, log_crash, request_id

log = logging.getLogger("ai_service")

# Between two claims that look at everything: the queue remembers where nothing was left.
FULL_PROBE_SECONDS = 5.0
PEEK_SECONDS = 0.35
# After something became ready, the claims look again for this long: the number was handed out before the commit.
LATE_COMMIT_SECONDS = 1.0
MAX_REQUESTS_PER_CLAIM = 16
# Claims that may be under way while all places are taken by waiting ones. The threads left over serve everything else.
BEYOND_PLACES = 24


@attrs.frozen
class Claimed:
    """The answer to one claim: the jobs as the inside of a JSON array, or the ids of those still to be read; neither without one."""

    claim_id: str
    jobs: str = ""
    unread: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there was no job."""
        return not self.jobs and not self.unread


class Queue(Protocol):
    """What is asked of the queue here. Every method raises a Refusal."""

    def claim(self, requests: Sequence[ClaimRequest]) -> list[Claimed | Refusal]:
        """Claims for requests with the same filters, in their order."""

    def read(self, claimed: Claimed) -> Claimed:
        """A claim with its jobs where they were unread."""

    def peek(self, job_ids: Sequence[str]) -> tuple[int, bool, list[str]]:
        """The number of the job that became ready last, whether a scheduled one is due, and which of these jobs have finished."""


@attrs.define(eq=False)
class PendingClaim:
    """A claim on its way: done when it has its answer."""

    request: ClaimRequest
    client_is_gone: Callable[[], bool]
    deadline: float
    filters: Filters = attrs.field(init=False)
    answer: Claimed | Refusal | None = None
    # Released once, with the answer.
    answered: threading.Lock = attrs.field(factory=taken_lock)
    parked: bool = False
    request_id: str = attrs.field(factory=request_id)

    def __attrs_post_init__(self) -> None:
        self.filters = self.request.filters

    @property
    def nothing(self) -> Claimed:
        """The answer without a job."""
        return Claimed(str(self.request.claim_id))

    def deliver(self, answer: Claimed | Refusal) -> None:
        """Gives the request its answer."""
        self.answer = answer
        self.answered.release()

    def fits(self, lanes: Iterable[tuple[str, str, str]]) -> bool:
        """Whether one of these (profile, type, owner) passes the request's filters."""
        return any(all(names is None or name in names for names, name in zip(self.filters, lane, strict=True)) for lane in lanes)


class WaitingClaims:
    """The claims of this process, and the callers that wait for a job to finish.

    One thread claims for all: requests that came together share a statement, and waiting ones hold no connection. While somebody waits it
    asks a few times a second, once for all of them, whether anything became ready or finished through another process.
    """

    def __init__(self, queue: Queue, places: int) -> None:
        self._queue, self._places = queue, places
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._claims: dict[PendingClaim, None] = {}
        self._woken: dict[PendingClaim, None] = {}
        self._finishing: dict[str, list[threading.Event]] = {}
        self._closed = False
        self._seq, self._hot_until, self._peek_at, self._sweep_at = 0, 0.0, 0.0, 0.0
        self._thread = threading.Thread(target=self._work, name="claims", daemon=True)
        self._thread.start()

    def claim(self, request: ClaimRequest, client_is_gone: Callable[[], bool]) -> Claimed:
        """The answer to a claim, after waiting for a job as long as it wished and there is room to wait. Raises a Refusal."""
        claim = PendingClaim(request, client_is_gone, time.monotonic() + (request.wait_seconds or 0))
        with self._lock:
            if len(self._claims) + sum(map(len, self._finishing.values())) >= self._places + BEYOND_PLACES:
                raise ServiceFull
            earlier = [other for other in self._claims if other.parked and other.request.claim_id == request.claim_id]
            self._claims[claim] = self._woken[claim] = None
            self._changed.notify()
        # A repeat while the first still waits: the caller gave that one up.
        for other in earlier:
            self._leave(other, other.nothing)
        claim.answered.acquire()
        if isinstance(claim.answer, Refusal):
            raise claim.answer
        assert claim.answer is not None
        return self._queue.read(claim.answer)

    def wait_for(self, job_id: str, seconds: float) -> None:
        """Returns when the job may have finished, or after so many seconds, or at once where there is no room to wait."""
        finished = threading.Event()
        with self._lock:
            if self._closed or self.waiting_count() >= self._places:
                return
            self._finishing.setdefault(job_id, []).append(finished)
            self._changed.notify()
        finished.wait(seconds)
        with self._lock:
            waiters = self._finishing.get(job_id, [])
            if finished in waiters:
                waiters.remove(finished)
            if not waiters:
                self._finishing.pop(job_id, None)

    def jobs_ready(self, lanes: Sequence[tuple[str, str, str]] | None = None) -> None:
        """Wakes the claims that such (profile, type, owner) fit; all without any. One that is being claimed for is looked at again."""
        with self._lock:
            woken = {claim: None for claim in self._claims if lanes is None or claim.fits(lanes)}
            if woken:
                self._woken |= woken
                self._changed.notify()

    def jobs_finished(self, job_ids: Iterable[str]) -> None:
        """Wakes who waits for these jobs."""
        with self._lock:
            for job_id in job_ids:
                for waiter in self._finishing.pop(job_id.lower(), ()):
                    waiter.set()

    def waiting_count(self) -> int:
        """How many requests are parked; each keeps a thread."""
        return sum(claim.parked for claim in list(self._claims)) + sum(map(len, list(self._finishing.values())))

    def close(self) -> None:
        """From now on nobody waits: who does is answered."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        self.jobs_finished(list(self._finishing))

    def _work(self) -> None:
        while True:
            self._round()

    def _round(self) -> None:
        """Waits for claims and sees to them. What it had in hand, payloads among it, is let go at its end."""
        with self._lock:
            if not self._woken:
                self._changed.wait(self._pause())
            woken, self._woken = list(self._woken), {}
        try:
            self._claim_for(woken)
            self._check_others()
        except Refusal as refusal:
            self._answer_all(refusal)
        except Exception as error:  # noqa: BLE001 -- told to the log
            with about(request_id=_ids_of(list(self._claims))):
                log_crash(log, "claims_failed", error)
            self._answer_all(Refusal())

    def _pause(self) -> float | None:
        """How long nothing is due, with the lock held; None where nobody waits."""
        if not self._claims and not self._finishing:
            return None
        due = min([self._peek_at, *(claim.deadline for claim in self._claims)])
        return 0.0 if self._closed else max(0.0, due - time.monotonic())

    def _claim_for(self, claims: Sequence[PendingClaim]) -> None:
        """Claims for claims, those with the same filters together; who gets nothing is parked or answered."""
        waiting = [claim for claim in claims if not self._is_dismissed(claim)]
        waiting.sort(key=lambda claim: [(names is not None, names or ()) for names in claim.filters])
        for _, group in itertools.groupby(waiting, key=lambda claim: claim.filters):
            nothing_left = False
            for batch in _batches(list(group)):
                if not nothing_left or not all(claim.parked for claim in batch):
                    nothing_left = self._claim_for_batch(batch)

    def _claim_for_batch(self, batch: Sequence[PendingClaim]) -> bool:
        """One statement for claims with the same filters; whether the last of them found nothing. Raises a Refusal that will pass."""
        try:
            with about(request_id=_ids_of(batch)):
                answers = self._queue.claim([claim.request for claim in batch])
        except Refusal as refusal:
            if refusal.retry_after:
                raise
            answers = [refusal] * len(batch)
        for claim, answer in zip(batch, answers, strict=True):
            self._answer_or_park(claim, answer)
        return isinstance(answers[-1], Claimed) and answers[-1].is_empty

    def _answer_or_park(self, claim: PendingClaim, answer: Claimed | Refusal) -> None:
        may_wait = isinstance(answer, Claimed) and answer.is_empty and claim.deadline > time.monotonic() and not self._closed
        if may_wait and (claim.parked or self.waiting_count() < self._places):
            claim.parked = True
            return
        self._leave(claim, answer)

    def _leave(self, claim: PendingClaim, answer: Claimed | Refusal) -> None:
        with self._lock:
            if claim in self._claims:
                del self._claims[claim]
                claim.deliver(answer)

    def _is_dismissed(self, claim: PendingClaim) -> bool:
        """Whether a claim was dropped since its client hung up: it must take no job."""
        if claim.answer is not None:
            return True
        if not claim.client_is_gone():
            return False
        self._leave(claim, claim.nothing)
        return True

    def _check_others(self) -> None:
        """Answers who waited long enough; asks, when it is time, what other processes made ready or finished."""
        now = time.monotonic()
        parked = [claim for claim in list(self._claims) if claim.parked]
        for claim in (claim for claim in parked if self._closed or claim.deadline <= now):
            self._leave(claim, claim.nothing)
        if now < self._peek_at or not (self._finishing or parked):
            return
        self._peek_at = now + PEEK_SECONDS
        seq, due, ended = self._queue.peek(list(self._finishing))
        self.jobs_finished(ended)
        if seq != self._seq or due:
            self._seq, self._hot_until = seq, now + LATE_COMMIT_SECONDS
        if now < self._hot_until or now > self._sweep_at:
            self._sweep_at = now + FULL_PROBE_SECONDS
            self._claim_for(parked)

    def _answer_all(self, refusal: Refusal) -> None:
        for claim in list(self._claims):
            self._leave(claim, refusal)


def _ids_of(claims: Iterable[PendingClaim]) -> str:
    """The ids of their requests, for the log."""
    return ",".join(claim.request_id for claim in claims)


def _batches(claims: list[PendingClaim]) -> Iterator[list[PendingClaim]]:
    """PendingClaims in the order they came, few per statement, and never one claim_id twice in one: the second gets what the first took."""
    while claims:
        batch: list[PendingClaim] = []
        for claim in claims:
            if len(batch) < MAX_REQUESTS_PER_CLAIM and claim.request.claim_id not in [other.request.claim_id for other in batch]:
                batch.append(claim)
        claims = [claim for claim in claims if claim not in batch]
        yield batch
