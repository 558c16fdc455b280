"""A small pure model of the contract: what a job is, and what each call makes of it and answers.

No clock and no chance: a job is `lapsed`, `due` or has an expiry that `PASSED` when it is told so, and `upkeep` then acts. Where the
contract leaves a choice (whose turn it is), the model does not predict: it judges what the service chose.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

LATER, PASSED = "2999-01-01T00:00:00.000000Z", "2001-01-01T00:00:00.000000Z"
FINISHED = ("completed", "failed", "cancelled")
MAX_RELEASES = 100
NOT_RUNNING: dict[str, Any] = dict.fromkeys(("worker_id", "claim_id", "lease_seconds", "progress", "result", "usage", "error"))
PAUSED_BY = ("owner_services", "task_types", "model_profiles")


@attrs.frozen
class Refused:
    """No for an answer."""

    status: int
    code: str


JOB_NOT_FOUND, INVALID_STATE = Refused(404, "job_not_found"), Refused(409, "invalid_state")
CLAIM_LOST, JOB_CANCELLED = Refused(409, "claim_lost"), Refused(409, "job_cancelled")
CLAIM_ID_REUSED, KEY_REUSED = Refused(409, "claim_id_reused"), Refused(409, "idempotency_key_reused")


@attrs.frozen
class Asked:
    """A job as its owner asked for it."""

    owner_service: str
    task_type: str
    model_profile: str
    owner_ref: str
    input: Any
    priority: int = 0
    max_attempts: int = 3
    idempotency_key: str | None = None
    run_at: str | None = None
    expires_at: str | None = None
    labels: Mapping[str, str] = attrs.Factory(dict)

    def has(self, wanted: Mapping[str, Sequence[str]]) -> bool:
        """Whether it passes a filter; what the filter does not name is any."""
        return all(getattr(self, name) in names for name, names in wanted.items())


@attrs.frozen
class Ended:
    """An attempt that did not complete, and the verb that ended it; a release is remembered but no error."""

    claim_id: str
    verb: str
    error: Mapping[str, Any]


@attrs.frozen
class Job:
    """One job. `late_claim` lapsed and may still complete; `due` tells when a scheduled job fell due."""

    id: str
    asked: Asked
    created_at: str
    expires_at: str | None
    status: str = "pending"
    attempt: int = 0
    releases: int = 0
    place: int | None = None
    due: int | None = None
    claim_id: str | None = None
    worker_id: str | None = None
    lease_seconds: float | None = None
    lapsed: bool = False
    late_claim: str | None = None
    progress: Any = None
    result: Any = None
    usage: Any = None
    error: Mapping[str, str] | None = None
    ended: tuple[Ended, ...] = ()

    @property
    def is_scheduled(self) -> bool:
        """Pending with a run_at to come."""
        return self.status == "pending" and self.place is None and self.due is None

    def ended_by(self, claim_id: str, verb: str) -> bool:
        """Whether this call was made already, so that this one is its repeat."""
        completed = verb == "complete" and self.status == "completed" and self.claim_id == claim_id
        return completed or any((each.claim_id, each.verb) == (claim_id, verb) for each in self.ended)

    def passes(self, wanted: Mapping[str, Sequence[str]]) -> bool:
        """Whether a list with this filter has it."""
        own = {"status": self.status, "error_category": (self.error or {}).get("category")}
        return all(own.get(name, getattr(self.asked, name, None)) in values for name, values in wanted.items())

    def shown(self) -> dict[str, Any]:
        """What every answer shows of it, times as whether they are there."""
        names = ("owner_service", "task_type", "model_profile", "owner_ref", "priority", "max_attempts", "idempotency_key", "labels")
        own = ("id", "status", "created_at", "expires_at", "attempt", "worker_id", "progress", "usage", "error")
        return {name: getattr(self.asked, name) for name in names} | {
            **{name: getattr(self, name) for name in own},
            "errors": [each.error for each in self.ended if each.verb != "release"],
            "started_at": self.worker_id is not None,
            "finished_at": self.status in FINISHED,
            "lease_expires_at": self.status == "running",
            "run_at": self.is_scheduled,
        }


@attrs.define
class Queue:
    """All jobs, and what is remembered beside them: keys, claims, pauses, and the endings that statistics count."""

    jobs: dict[str, Job] = attrs.Factory(dict)
    keys: dict[tuple[str, str], str] = attrs.Factory(dict)
    claims: dict[str, tuple[str, list[str]]] = attrs.Factory(dict)
    pauses: set[tuple[str | None, ...]] = attrs.Factory(set)
    endings: Counter[tuple[str, str]] = attrs.Factory(Counter)
    errors: Counter[str] = attrs.Factory(Counter)
    attempt_errors: Counter[str] = attrs.Factory(Counter)
    tokens: Counter[str] = attrs.Factory(Counter)
    clock: Any = attrs.Factory(itertools.count)

    # ── Create ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, wanted: Sequence[Asked]) -> list[str | None] | Refused:
        """All or nothing: for each the id of the job that its key stands for, None where that is still to be made."""
        first = {key: self.jobs[job_id].asked for key, job_id in self.keys.items()}
        for asked in wanted:
            earlier = first.setdefault((asked.owner_service, asked.idempotency_key), asked) if asked.idempotency_key else asked
            same = ("owner_ref", "task_type", "model_profile")
            if any(getattr(earlier, name) != getattr(asked, name) for name in same):
                return KEY_REUSED
        return [self.keys.get((asked.owner_service, asked.idempotency_key or "")) for asked in wanted]

    def add(self, asked: Asked, job_id: str, created_at: str) -> Job:
        """A new job, pending; a past run_at counts as now."""
        if asked.idempotency_key:
            self.keys[asked.owner_service, asked.idempotency_key] = job_id
        place = None if asked.run_at == LATER else next(self.clock)
        self.jobs[job_id] = Job(job_id, asked, created_at, asked.expires_at, place=place)
        return self.jobs[job_id]

    # ── Claim ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def repeated(self, claim_id: str, worker_id: str) -> list[str] | Refused | None:
        """What a claim_id that took jobs before still holds of them, and nothing else; None for a new one."""
        if claim_id not in self.claims:
            return None
        by, job_ids = self.claims[claim_id]
        return CLAIM_ID_REUSED if by != worker_id else [job_id for job_id in job_ids if self.holds(job_id, claim_id)]

    def holds(self, job_id: str, claim_id: str) -> bool:
        """Whether the claim holds the job."""
        return job_id in self.jobs and (self.jobs[job_id].status, self.jobs[job_id].claim_id) == ("running", claim_id)

    def misdealt(self, taken: Sequence[str], limit: int, wanted: Mapping[str, Sequence[str]]) -> str | None:
        """What is wrong with what a claim chose: highest priority first, within it owners in turns, each owner's first ready first."""
        open_jobs = [job for job in self.jobs.values() if self._is_claimable(job) and job.asked.has(wanted)]
        if len(set(taken)) < len(taken) or not set(taken) <= {job.id for job in open_jobs}:
            return "handed out what could not be claimed"
        if len(taken) != min(limit, len(open_jobs)):
            return f"{len(open_jobs)} could be claimed"
        chosen = [self.jobs[job_id] for job_id in taken]
        if [job.asked.priority for job in chosen] != sorted((job.asked.priority for job in open_jobs), reverse=True)[: len(chosen)]:
            return "a lower priority came before a higher one"
        for level in {job.asked.priority for job in chosen}:
            ready = [job for job in open_jobs if job.asked.priority == level]
            if wrong := _out_of_turn([job for job in chosen if job.asked.priority == level], ready):
                return wrong
        return None

    def take(self, claim_id: str, worker_id: str, job_ids: Sequence[str], lease_seconds: float) -> None:
        """The claim holds these jobs from now on. One that takes nothing leaves no trace."""
        for job_id in job_ids:
            job = self.jobs[job_id]
            self.jobs[job_id] = attrs.evolve(
                job, status="running", attempt=job.attempt + 1, place=None, late_claim=None, lapsed=False,
                claim_id=claim_id, worker_id=worker_id, lease_seconds=lease_seconds,
            )  # fmt: skip
        if job_ids:
            self.claims[claim_id] = (worker_id, list(job_ids))

    def is_paused(self, asked: Asked) -> bool:
        """Whether a rule matches it: all that the rule names."""
        facts = (asked.owner_service, asked.task_type, asked.model_profile)
        return any(all(part in (None, fact) for part, fact in zip(rule, facts, strict=True)) for rule in self.pauses)

    def _is_claimable(self, job: Job) -> bool:
        return job.place is not None and job.expires_at != PASSED and not self.is_paused(job.asked)

    # ── The holder's verbs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, verb: str, job_id: str, claim_id: str, body: Mapping[str, Any]) -> Job | Refused:
        """Complete, fail, heartbeat or release: the job as it is then. Only the claim that holds the job may, until it is taken back."""
        job = self.jobs.get(job_id)
        if job is None:
            return JOB_NOT_FOUND
        if self.holds(job_id, claim_id):
            act = {"complete": self._complete, "fail": self._fail, "heartbeat": self._beat, "release": self._release}[verb]
            self.jobs[job_id] = act(job, body)
        elif verb == "complete" and job.late_claim == claim_id and job.status in ("pending", "failed"):
            self.jobs[job_id] = self._complete_late(job, body)
        elif not job.ended_by(claim_id, verb):
            return JOB_CANCELLED if job.status == "cancelled" else CLAIM_LOST
        return self.jobs[job_id]

    def _complete(self, job: Job, body: Mapping[str, Any]) -> Job:
        self._count(job, "completed", body)
        return attrs.evolve(job, status="completed", result=body["result"], usage=body.get("usage"))

    def _complete_late(self, job: Job, body: Mapping[str, Any]) -> Job:
        [lapse] = [each for each in job.ended if (each.claim_id, each.verb) == (job.late_claim, "lapse")]
        ended = tuple(each for each in job.ended if each != lapse)
        held = attrs.evolve(
            job, claim_id=lapse.claim_id, attempt=lapse.error["attempt"], worker_id=lapse.error["worker_id"], ended=ended,
            place=None, due=None, late_claim=None, progress=None, error=None,
        )  # fmt: skip
        return self._complete(held, body)

    def _fail(self, job: Job, body: Mapping[str, Any]) -> Job:
        usage, again = body.get("usage"), bool(body.get("retryable")) and job.attempt < job.asked.max_attempts
        job = _with_end(job, "fail", body["category"], body["message"], usage)
        if again:
            self.attempt_errors[body["category"]] += 1
            self._count_tokens(job, body)
            return self._back(job, now=body.get("retry_in_seconds") == 0)
        return attrs.evolve(self._failed(job, body["category"], body["message"], body), usage=usage)

    def _beat(self, job: Job, body: Mapping[str, Any]) -> Job:
        lease, progress = body.get("lease_seconds") or job.lease_seconds, body.get("progress")
        return attrs.evolve(job, lease_seconds=lease, lapsed=False, progress=job.progress if progress is None else progress)

    def _release(self, job: Job, body: Mapping[str, Any]) -> Job:
        job = _with_end(job, "release", "released", "given back by its worker")
        if job.releases >= MAX_RELEASES:
            return self._failed(job, "released_too_often", "given back by its worker")
        back = self._back(job, now=not body.get("delay_seconds"))
        return attrs.evolve(back, attempt=job.attempt - 1, releases=job.releases + 1)

    # ── The owner's and the operator's verbs ────────────────────────────────────────────────────────────────────────────────────

    def retry(self, job_id: str, statuses: Iterable[str]) -> Job | Refused:
        """Attempt 0, run now, errors kept. Already pending: nothing changes."""
        job = self.jobs.get(job_id)
        if job is None or job.status == "pending":
            return job or JOB_NOT_FOUND
        if job.status == "completed" or job.status not in statuses:
            return INVALID_STATE
        if job.status == "running":
            job = _with_end(job, "retry", "aborted", "taken back by a retry")
        expires_at = None if job.expires_at == PASSED else job.expires_at
        self.jobs[job_id] = attrs.evolve(self._back(job, now=True), attempt=0, releases=0, expires_at=expires_at)
        return self.jobs[job_id]

    def cancel(self, job_id: str, reason: str) -> Job | Refused:
        """At once, pending or running."""
        job = self.jobs.get(job_id)
        if job is None or job.status == "cancelled":
            return job or JOB_NOT_FOUND
        if job.status in FINISHED:
            return INVALID_STATE
        if job.status == "running":
            job = _with_end(job, "cancel", "cancelled", reason)
        self._count(job, "cancelled")
        error = {"category": "cancelled", "message": reason}
        self.jobs[job_id] = attrs.evolve(job, status="cancelled", place=None, due=None, error=error)
        return self.jobs[job_id]

    def delete(self, job_id: str) -> Refused | None:
        """A finished job is gone, and its key is free."""
        job = self.jobs.get(job_id)
        if job is None or job.status not in FINISHED:
            return INVALID_STATE if job else JOB_NOT_FOUND
        del self.jobs[job_id]
        self.keys = {key: of_job for key, of_job in self.keys.items() if of_job != job_id}
        return None

    def pause(self, named: Mapping[str, Sequence[str]]) -> None:
        """Every combination of what is named; a part that is not named is any."""
        parts: list[Sequence[str | None]] = [named.get(part, [None]) for part in PAUSED_BY]
        self.pauses |= set(itertools.product(*parts))

    def resume(self, named: Mapping[str, Sequence[str]]) -> None:
        """Lifts the rules that lie within what is named."""
        parts = [named.get(part) for part in PAUSED_BY]
        self.pauses = {r for r in self.pauses if not all(names is None or part in names for part, names in zip(r, parts, strict=True))}

    def listed(self, wanted: Mapping[str, Sequence[str]]) -> list[Job]:
        """Jobs that pass a filter, newest first."""
        newest = sorted(self.jobs.values(), key=lambda job: job.id, reverse=True)
        return [job for job in newest if job.passes(wanted)]

    def counts(self, owner: str) -> dict[str, int]:
        """An owner's counters: jobs where they stand now, endings as events."""
        own = [job for job in self.jobs.values() if job.asked.owner_service == owner]
        return {
            "pending": sum(job.place is not None for job in own),
            "scheduled": sum(job.status == "pending" and job.place is None for job in own),
            "running": sum(job.status == "running" for job in own),
            **{status: self.endings[owner, status] for status in FINISHED},
        }

    # ── Time ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def promote(self) -> None:
        """Jobs that fell due join the queue, the first to fall due first; at upkeep, and before any claim."""
        for job in sorted((job for job in self.jobs.values() if job.due is not None), key=lambda job: job.due or 0):
            self.jobs[job.id] = attrs.evolve(job, due=None, place=next(self.clock))

    def upkeep(self) -> None:
        """What the service does by itself: takes back lapsed leases, ends what expired, promotes what is due."""
        for job in sorted(self.jobs.values(), key=lambda job: job.id):
            if job.status == "running" and job.lapsed:
                self.jobs[job.id] = self._lapse(job)
        for job in list(self.jobs.values()):
            if job.status == "pending" and job.expires_at == PASSED:
                late = attrs.evolve(job, worker_id=None)
                self.jobs[job.id] = self._failed(late, "expired", "not claimed before expires_at")
        self.promote()

    def _lapse(self, job: Job) -> Job:
        told = ("lease_expired", "the lease ran out without a heartbeat")
        back = attrs.evolve(_with_end(job, "lapse", *told), late_claim=job.claim_id)
        if job.attempt >= job.asked.max_attempts:
            return self._failed(back, *told)
        self.attempt_errors[told[0]] += 1
        return self._back(back, now=True)

    def _back(self, job: Job, *, now: bool) -> Job:
        return attrs.evolve(job, status="pending", place=next(self.clock) if now else None, **NOT_RUNNING)

    def _failed(self, job: Job, category: str, message: str, body: Mapping[str, Any] | None = None) -> Job:
        self.errors[category] += 1
        self._count(job, "failed", body)
        return attrs.evolve(job, status="failed", place=None, due=None, error={"category": category, "message": message})

    def _count(self, job: Job, event: str, body: Mapping[str, Any] | None = None) -> None:
        self.endings[job.asked.owner_service, event] += 1
        self._count_tokens(job, body)

    def _count_tokens(self, job: Job, body: Mapping[str, Any] | None) -> None:
        self.tokens[job.asked.owner_service] += ((body or {}).get("usage") or {}).get("total_tokens", 0)


def _with_end(job: Job, verb: str, category: str, message: str, usage: Any = None) -> Job:
    told = {"attempt": job.attempt, "worker_id": job.worker_id, "category": category, "message": message, "usage": usage}
    return attrs.evolve(job, ended=(*job.ended, Ended(str(job.claim_id), verb, told)))


def _out_of_turn(chosen: Sequence[Job], ready: Sequence[Job]) -> str | None:
    """What is wrong with the jobs chosen of one priority: owners in turns as long as they have any, each owner's first ready first."""
    turns: dict[str, list[str]] = {}
    for job in chosen:
        turns.setdefault(job.asked.owner_service, []).append(job.id)
    queues: dict[str, list[str]] = {}
    for job in sorted(ready, key=lambda job: job.place or 0):
        queues.setdefault(job.asked.owner_service, []).append(job.id)
    if any(queues[owner][: len(taken)] != taken for owner, taken in turns.items()):
        return "a job came before one of its owner that was ready earlier"
    most = max(map(len, turns.values()))
    if any(len(turns.get(owner, [])) < min(most - 1, len(waiting)) for owner, waiting in queues.items()):
        return "an owner was passed over"
    return None
