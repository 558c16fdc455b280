"""Random sequences of all calls, by several callers and workers through two service processes, against a pure model of the contract.

Every answer is compared with the model's, and after each step every job, its holder, and that it stands in one place only. Any call is sent
again later, as by a caller that lost its answer, with other calls between. Time passes by ageing rows and then asking for the service's
upkeep, which an advisory lock holds back otherwise. `make model` drives more: MODEL_EXAMPLES, MODEL_STEPS, MODEL_SEED.
"""

from __future__ import annotations

import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any

import attrs
import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from model import FINISHED, LATER, PASSED, Asked, Job, Queue, Refused
from model_steps import asked, steps
from pg8000.native import Connection
from postgres import connect, fresh_schema
from service import Answer, Api, running_service, wait_until

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "20"))
STEPS = int(os.environ.get("MODEL_STEPS", "40"))
SEED = os.environ.get("MODEL_SEED")
JOBS = "/api/v1/jobs"
# Jobs of one example, from which on none are created but by repeats.
ENOUGH = 25
TABLES = "ready, waiting, held, ended, attempt_ended, job, idempotency, claim, pause, lane_count, tally, history, worker"
NOBODYS = str(uuid.UUID(int=0))


class World:
    """Two service processes on one schema, a connection to age rows, and what was driven through them."""

    def __init__(self, apis: Sequence[Api], database: Connection) -> None:
        self.apis, self._database = apis, database
        self.driven: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self._hold_upkeep()

    def sql(self, statement: str, **parameters: Any) -> list[list[Any]]:
        """Runs one statement."""
        return list(self._database.run(statement, **parameters) or [])

    def told(self, method: str, path: str, answer: Answer) -> Answer:
        """Counts an answer to a call, ids left out of its path."""
        self.driven["calls"] += 1
        self.answers[f"{method} {re.sub('[0-9a-f-]{36}', '{id}', path)} {answer.code or answer.status}"] += 1
        return answer

    def clear(self) -> None:
        """As if nothing had ever been asked. First the processes write down which workers they saw: they would do so later."""
        last = {f"last of {api.port} before example {self.driven['examples']}" for api in self.apis}
        for api, worker_id in zip(self.apis, last, strict=True):
            assert api.post(f"{JOBS}/claim", {"worker_id": worker_id, "model_profiles": ["none"]}).status == 200
        wait_until(lambda: last <= {worker_id for [worker_id] in self.sql("select worker_id from worker")}, 10, "the workers")
        self.sql(f"truncate {TABLES}")
        self.sql("update lane set paused = false where paused")

    def after_upkeep(self, look: Callable[[Api], Any]) -> None:
        """Lets the services do upkeep, which each begins every two seconds, and waits for what is to be seen then."""
        self.sql("select pg_advisory_unlock(lock_key(3))")
        try:
            wait_until(lambda: look(self.apis[0]), 6, "the counters' agreement with the model")
        finally:
            self._hold_upkeep()

    def _hold_upkeep(self) -> None:
        """One session does upkeep at a time: while it is this one, nothing lapses, expires or falls due behind the model's back."""
        self.sql("select pg_advisory_lock(lock_key(3))")


@pytest.fixture(scope="module")
def world(postgres_url: str) -> Iterator[World]:
    """Services and a schema of this module's own."""
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema) as one, running_service(postgres_url, schema) as other:
        database = connect(postgres_url, schema)
        try:
            yield World((one.api, other.api), database)
        finally:
            database.close()


# ── What is seen ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def seen(job: dict[str, Any]) -> dict[str, Any]:
    """A job as the model shows it: times that the model does not know are there or not, a run_at is to come or not."""
    to_come = job["status"] == "pending" and datetime.fromisoformat(job["run_at"]) > datetime.now(UTC)
    times = {name: job[name] is not None for name in ("started_at", "finished_at", "lease_expires_at")} | {"run_at": to_come}
    errors = [{name: error[name] for name in error if name != "at"} for error in job["errors"]]
    return {**{name: job[name] for name in job if name not in ("result", "input", "traceparent")}, **times, "errors": errors}


def verdict(expected: object) -> tuple[int, str | None]:
    return (expected.status, expected.code) if isinstance(expected, Refused) else (200, None)


def pick(of: Sequence[Any], number: int) -> Any:
    return of[-1 - number % len(of)]


# What time does to jobs of a kind: in which tables, and what of it the model has; of a job that falls due it has when that was.
AGEING: dict[str, tuple[Callable[[Job], bool], dict[str, str], dict[str, Any]]] = {
    "lease": (
        lambda job: job.status == "running",
        {"held": "lease_expires_at = now() - interval '1 minute'"},
        {"lapsed": True},
    ),
    "due": (lambda job: job.is_scheduled, dict.fromkeys(("job", "waiting"), "run_at = now()"), {}),
    "expiry": (
        lambda job: job.expires_at == LATER,
        dict.fromkeys(("job", "ready", "waiting"), f"expires_at = '{PASSED}'"),
        {"expires_at": PASSED},
    ),
    "released": (lambda job: job.status == "running", {"held": "releases = 100"}, {"releases": 100}),
}


class Machine(RuleBasedStateMachine):
    """Every rule draws a call; `drive` makes it, and remembers it for its repeat."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.model = world, Queue()
        self.made: list[Callable[[], None]] = []
        self.tickets: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.claims: list[str] = []
        self.workers: set[str] = set()
        self.agreed = False
        world.clear()
        world.driven["examples"] += 1

    @property
    def api(self) -> Api:
        """Every third step goes through the second process."""
        return self.world.apis[len(self.made) % 3 == 2]

    def drive(self, call: Callable[[], None]) -> None:
        self.agreed = False
        self.made.append(call)
        self.world.driven["steps"] += 1
        call()

    def post(self, path: str, body: Any) -> Answer:
        return self.world.told("POST", path, self.api.post(path, body))

    def get(self, path: str, **query: Any) -> Answer:
        return self.world.told("GET", path, self.api.get(path, **query))

    def agree(self, answer: Answer, expected: Job | Refused) -> None:
        """The answer is the job as the model has it, or the refusal that it foresaw."""
        assert (answer.status, answer.code) == verdict(expected), answer
        if isinstance(expected, Job):
            assert seen(answer.json) == expected.shown()
            assert answer.json["result"] == expected.result

    @rule(step=steps)
    def step(self, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(*step[1:])

    @initialize(jobs=st.lists(asked, min_size=2, max_size=8))
    def begin(self, jobs: list[Asked]) -> None:
        self.create_many(jobs, None)

    # ── Repeats ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send_again(self, number: int) -> None:
        self.world.driven["repeats"] += 1
        self.drive(pick(self.made, number))

    # ── Create ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, job: Asked) -> None:
        if len(self.ids) < ENOUGH:
            self.drive(partial(self._create, job))

    def create_with_a_used_key(self, number: int, changes: dict[str, Any]) -> None:
        keyed = [job.asked for job in self.model.jobs.values() if job.asked.idempotency_key]
        if keyed:
            self.drive(partial(self._create, attrs.evolve(pick(keyed, number), **changes)))

    def _create(self, job: Asked) -> None:
        expected = self.model.create([job])
        answer = self.post(JOBS, attrs.asdict(job))
        if isinstance(expected, Refused):
            return self.agree(answer, expected)
        assert answer.status == (200 if expected[0] else 201)
        assert answer.headers["Location"] == f"{JOBS}/{answer.json['id']}"
        if expected[0] is None:
            self._add(job, answer.json)
        assert seen(answer.json) == self.model.jobs[expected[0] or answer.json["id"]].shown()
        return None

    def _add(self, job: Asked, shown: Mapping[str, Any]) -> None:
        assert shown["id"] not in self.ids
        self.ids.append(shown["id"])
        self.model.add(job, shown["id"], shown["created_at"])

    def create_many(self, jobs: list[Asked], priority: int | None) -> None:
        if len(self.ids) < ENOUGH:
            self.drive(partial(self._create_many, jobs, priority))

    def _create_many(self, jobs: list[Asked], priority: int | None) -> None:
        """The default priority is that of the jobs that bring none of their own."""
        items = [{name: value for name, value in attrs.asdict(job).items() if name != "priority" or priority is None} for job in jobs]
        jobs = [attrs.evolve(job, priority=priority) for job in jobs] if priority else jobs
        expected = self.model.create(jobs)
        answer = self.post(f"{JOBS}/batch", {"defaults": {"priority": priority} if priority else {}, "jobs": items})
        if isinstance(expected, Refused):
            return self.agree(answer, expected)
        made = answer.json["jobs"]
        shown = {job["id"]: job for job in self.post(f"{JOBS}/get", {"ids": [each["id"] for each in made]}).json["jobs"]}
        for job, item, known in zip(jobs, made, expected, strict=True):
            is_new = known is None and item["id"] not in self.model.jobs
            if is_new:
                self._add(job, shown[item["id"]])
            assert item == {"id": known or item["id"], "status": self.model.jobs[item["id"]].status, "created": is_new}
            assert self.model.keys.get((job.owner_service, job.idempotency_key or ""), item["id"]) == item["id"]
        created = sum(item["created"] for item in made)
        assert (answer.status, answer.json["created"], answer.json["existing"]) == (201 if created else 200, created, len(made) - created)
        return None

    # ── Claim ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, worker: str, limit: int, wanted: dict[str, list[str]], wait: float | None) -> None:
        claim_id = str(uuid.UUID(int=len(self.claims) + 1))
        self.claims.append(claim_id)
        self.drive(partial(self._claim, claim_id, worker, limit, wanted, wait))

    def claim_without_an_id_or_with_a_used_one(self, worker: str, limit: int, number: int | None) -> None:
        claim_id = pick(self.claims, number) if self.claims and number is not None else None
        self.drive(partial(self._claim, claim_id, worker, limit, {}, None))

    def _claim(self, claim_id: str | None, worker: str, limit: int, wanted: dict[str, list[str]], wait: float | None) -> None:
        self.workers.add(worker)
        self.model.promote()
        held = self.model.repeated(claim_id, worker) if claim_id else None
        answer = self.post(f"{JOBS}/claim", {"worker_id": worker, "limit": limit, "claim_id": claim_id, "wait_seconds": wait, **wanted})
        assert (answer.status, answer.code) == verdict(held), answer
        if isinstance(held, Refused):
            return
        taken, claim_id = [job["id"] for job in answer.json["jobs"]], answer.json["claim_id"]
        if held is None:
            assert not self.model.misdealt(taken, limit, {name[:-1]: names for name, names in wanted.items()})
            self.model.take(claim_id, worker, taken, 900)
            self.tickets += [(job_id, claim_id) for job_id in taken]
        else:
            assert taken == held
        for job in answer.json["jobs"]:
            self._agree_on_claimed(job, claim_id)

    def _agree_on_claimed(self, job: dict[str, Any], claim_id: str) -> None:
        ours = self.model.jobs[job["id"]]
        told = ("attempt", "lease_seconds", "expires_at", "created_at")
        assert {name: job[name] for name in told} == {name: getattr(ours, name) for name in told}
        asked = ("owner_service", "task_type", "model_profile", "owner_ref", "priority", "max_attempts", "input")
        assert {name: job[name] for name in asked} == {name: getattr(ours.asked, name) for name in asked}
        assert job["claim_id"] == claim_id

    # ── The holder's verbs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def held(self) -> list[tuple[str, str]]:
        """Jobs that run, each with the claim that holds it."""
        return [ticket for ticket in self.tickets if self.model.holds(*ticket)]

    def finish(self, call: tuple[str, dict[str, Any]], number: int) -> None:
        if self.held():
            self.drive(partial(self._finish, call[0], *pick(self.held(), number), call[1]))

    def finish_late(self, call: tuple[str, dict[str, Any]], number: int) -> None:
        """With a claim whose lease ran out, every other time of a job that another claim has taken since."""
        late = [(job.id, each.claim_id) for job in self.model.jobs.values() for each in job.ended if each.verb == "lapse"]
        taken = [ticket for ticket in late if self.model.jobs[ticket[0]].status == "running"]
        if of := (number % 2 and taken) or late:
            self.drive(partial(self._finish, call[0], *pick(of, number // 2), call[1]))

    def finish_with_any_claim(self, call: tuple[str, dict[str, Any]], number: int, other: int | None) -> None:
        """With one that had the job, that had another one, or that never was."""
        if not self.tickets:
            return
        job_id, claim_id = pick(self.tickets, number)
        claim_id = claim_id if other is None else pick([NOBODYS, *(each for _, each in self.tickets)], other)
        self.drive(partial(self._finish, call[0], job_id, claim_id, call[1]))

    def _finish(self, verb: str, job_id: str, claim_id: str, body: dict[str, Any]) -> None:
        expected = self.model.finish(verb, job_id, claim_id, body)
        answer = self.post(f"{JOBS}/{job_id}/{verb}", {"claim_id": claim_id, **body})
        if verb == "heartbeat" and isinstance(expected, Job):
            assert (answer.status, answer.json["lease_seconds"]) == (200, expected.lease_seconds)
        else:
            self.agree(answer, expected)
        self._put_off_back_off()

    def finish_many(self, call: tuple[str, list[tuple[int, dict[str, Any]]]], ill: bool, held: bool) -> None:
        of = (held and self.held()) or self.tickets
        if of:
            self.drive(partial(self._finish_many, call[0], {pick(of, number): body for number, body in call[1]}, ill))

    def _finish_many(self, verb: str, items: dict[tuple[str, str], dict[str, Any]], ill: bool) -> None:
        expected = [(job_id, *verdict(self.model.finish(verb, job_id, claim_id, body))) for (job_id, claim_id), body in items.items()]
        sent = [{"id": job_id, "claim_id": claim_id, **body} for (job_id, claim_id), body in items.items()]
        if ill:
            sent, expected = [{"id": NOBODYS}, *sent], [(NOBODYS, 422, "validation_failed"), *expected]
        answer = self.post(f"{JOBS}/{verb}", {"jobs": sent})
        assert [(item["id"], item["status"], item.get("code")) for item in answer.json["jobs"]] == expected
        self._put_off_back_off()

    def _put_off_back_off(self) -> None:
        """A slow machine must not see a back-off of seconds pass."""
        self.world.sql("update waiting set run_at = run_at + interval '1 day' where run_at between now() and now() + interval '1 hour'")

    # ── The owner's and the operator's verbs ────────────────────────────────────────────────────────────────────────────────────

    def decide(self, number: int, verb: str, *given: Any) -> None:
        act = {"retry": self._retry, "cancel": self._cancel, "delete": self._delete}[verb]
        self.drive(partial(act, pick(self.ids or [NOBODYS], number), *given))

    def _retry(self, job_id: str, statuses: list[str] | None) -> None:
        expected = self.model.retry(job_id, statuses or ["failed", "cancelled", "running"])
        self.agree(self.post(f"{JOBS}/{job_id}/retry", {"from": statuses}), expected)

    def retry_many(self, wanted: dict[str, list[str]], limit: int) -> None:
        self.drive(partial(self._retry_many, wanted, limit))

    def _retry_many(self, wanted: dict[str, list[str]], limit: int) -> None:
        answer = self.post(f"{JOBS}/retry", {"filter": wanted, "limit": limit})
        if not wanted:
            return self.agree(answer, Refused(422, "validation_failed"))
        found = self.model.listed({"status": ["failed", "cancelled"], **wanted})
        assert answer.json == {"retried": min(limit, len(found)), "more": len(found) > limit}
        for job in reversed(found[:limit]):
            self.model.retry(job.id, [job.status])
        return None

    def _cancel(self, job_id: str, reason: str | None) -> None:
        expected = self.model.cancel(job_id, reason or "")
        self.agree(self.post(f"{JOBS}/{job_id}/cancel", {"reason": reason}), expected)

    def _delete(self, job_id: str) -> None:
        expected = self.model.delete(job_id)
        answer = self.world.told("DELETE", JOBS, self.api.delete(f"{JOBS}/{job_id}"))
        assert (answer.status, answer.code) == (verdict(expected) if expected else (204, None))

    def pause_or_resume(self, verb: str, part: dict[str, list[str]]) -> None:
        self.drive(partial(self._pause_or_resume, verb, part))

    def _pause_or_resume(self, verb: str, part: dict[str, list[str]]) -> None:
        (self.model.pause if verb == "pause" else self.model.resume)(part)
        rules = self.post(f"/api/v1/{verb}", part).json["paused"]
        assert len(rules) == len(self.model.pauses)
        assert {(each["owner_service"], each["task_type"], each["model_profile"]) for each in rules} == self.model.pauses

    # ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, number: int, wait: float | None) -> None:
        self.drive(partial(self._read, pick(self.ids or [NOBODYS], number), wait))

    def _read(self, job_id: str, wait: float | None) -> None:
        answer = self.get(f"{JOBS}/{job_id}", include="input", **({"wait_seconds": wait} if wait else {}))
        self.agree(answer, self.model.jobs.get(job_id, Refused(404, "job_not_found")))
        assert answer.status == 404 or answer.json["input"] == self.model.jobs[job_id].asked.input

    def list_pages(self, wanted: dict[str, list[str]], limit: int) -> None:
        self.drive(partial(self._list_pages, wanted, limit))

    def _list_pages(self, wanted: dict[str, list[str]], limit: int) -> None:
        cursor: dict[str, str] = {}
        expected = self.model.listed(wanted)
        for start in range(0, max(len(expected), 1), limit):
            page = self.get(JOBS, **wanted, **cursor, limit=limit).json
            assert [seen(job) for job in page["jobs"]] == [job.shown() for job in expected[start : start + limit]]
            last = start + limit >= len(expected)
            assert page["next_cursor"] == (None if last else expected[start + limit - 1].id)
            cursor = {"cursor": page["next_cursor"]}

    def look_after(self, path: str) -> None:
        self.drive(partial(self._look_after, path))

    def _look_after(self, path: str) -> None:
        assert self.get(path).status == 200

    # ── Time ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def time_passes(self, number: int, kind: str, seen_to: bool) -> None:
        """For a job of a kind; the service may not have seen to it yet."""
        fits, table_and_changes, changes = AGEING[kind]
        jobs = sorted((job for job in self.model.jobs.values() if fits(job)), key=lambda job: job.id)
        if jobs:
            self.agreed = False
            self.world.driven["steps"] += 1
            self._age(pick(jobs, number), table_and_changes, changes)
            if seen_to:
                self.upkeep()

    def _age(self, job: Job, table_and_changes: Mapping[str, str], changes: Mapping[str, Any]) -> None:
        """A job made older in the database and in the model."""
        for table, change in table_and_changes.items():
            self.world.sql(f"update {table} set {change} where {'id' if table == 'job' else 'job_id'} = :id::uuid", id=job.id)
        self.model.jobs[job.id] = attrs.evolve(job, **changes or {"due": next(self.model.clock)})

    def upkeep(self) -> None:
        self.world.driven["upkeeps"] += 1
        self.model.upkeep()
        self.world.after_upkeep(self._counters_agree)

    def _counters_agree(self, api: Api) -> bool:
        found = api.get("/api/v1/stats").json
        rows = {row["owner_service"]: row for row in found["by_owner_service"]}
        for owner in ("ann", "ben"):
            counts = self.model.counts(owner)
            if counts != {name: rows.get(owner, {}).get(name, 0) for name in counts}:
                return False
        tokens = Counter({row["owner_service"]: 0 for row in found["usage"]})
        for row in found["usage"]:
            tokens[row["owner_service"]] += row["total_tokens"] or 0
        errors, attempt_errors = (
            Counter({row["category"]: row["count"] for row in found[name]}) for name in ("errors", "attempt_errors")
        )  # fmt: skip
        seen_workers = {worker["worker_id"] for worker in api.get("/api/v1/workers").json["workers"]}
        return (errors, attempt_errors, +tokens, seen_workers) == (
            self.model.errors, self.model.attempt_errors, +self.model.tokens, self.workers,
        )  # fmt: skip

    # ── What always holds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def service_and_model_agree(self) -> None:
        if self.ids:
            found = self.post(f"{JOBS}/get", {"ids": self.ids}).json["jobs"]
            known = [self.model.jobs.get(job_id) for job_id in self.ids]
            assert [job and seen(job) for job in found] == [job and job.shown() for job in known]
        self.agreed = True

    @invariant()
    def no_job_is_held_twice_or_stands_in_two_places(self) -> None:
        places = " union all ".join(f"select job_id::text from {table}" for table in ("ready", "waiting", "held", "ended"))
        assert sorted(row[0] for row in self.world.sql(places)) == sorted(self.model.jobs)
        held = {(job.id, job.claim_id) for job in self.model.jobs.values() if job.status == "running"}
        assert {tuple(row) for row in self.world.sql("select job_id::text, claim_id::text from held")} == held

    def teardown(self) -> None:
        """Nothing is lost: each claim still gives what it holds; then whatever lives is handed out, once, and completed."""
        if not self.agreed:
            return
        for claim_id, (worker, _) in list(self.model.claims.items()):
            self._claim(claim_id, worker, 1, {}, None)
        self._pause_or_resume("resume", {"owner_services": ["ann", "ben"]})
        self._pause_or_resume("resume", {"task_types": ["talk", "sum"]})
        self._pause_or_resume("resume", {"model_profiles": ["big", "small"]})
        while any(job.is_scheduled for job in self.model.jobs.values()):
            self.time_passes(0, "due", False)
        self.upkeep()
        self._claim(None, "w1", 1000, {}, None)
        self._finish_many("complete", {ticket: {"result": "done"} for ticket in [*self.held(), (NOBODYS, NOBODYS)]}, False)
        assert all(job.status in FINISHED for job in self.model.jobs.values())
        self.service_and_model_agree()
        self.upkeep()


@pytest.mark.long
def test_the_service_does_what_the_model_of_the_contract_does(world: World) -> None:
    def machine() -> Machine:
        return Machine(world)

    if SEED:
        machine = hypothesis.seed(int(SEED))(machine)
    begun = monotonic()
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize="MODEL_EXAMPLES" not in os.environ,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        print(f"\n{dict(world.driven)} in {monotonic() - begun:.0f} s")
        print(*sorted(f"{number:6} {name}" for name, number in world.answers.items()), sep="\n")
    assert world.driven["examples"] >= EXAMPLES
