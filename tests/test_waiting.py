"""The waiting long_poll: many waiting requests, few statements; who is woken, by what, and who must get nothing."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from postgres import connect, fresh_schema
from service import wait_until

from ai_internal.server.database import Database, migrate
from ai_internal.server.database_url import read_database_url
from ai_internal.server.requests import ClaimRequest, NewJob
from ai_internal.server.waiting import Claimed, WaitingClaims
from ai_service import CLAIMED_AT_ONCE_BYTES, Queue

LATE_CREATE = (
    "select id from create_jobs_v2('{owner}', '{type}', '{profile}', '{0}', '{1}', '{ref}', '{1}', '{1}', '{3}', "
    "'{NULL}', '{NULL}', '{NULL}', '{NULL}', '{NULL}')"
)


class CountingDatabase(Database):
    """Counts the statements that went to the database, by name; those named in `held_back` wait for their turn."""

    calls: Counter[str]
    held_back: dict[str, threading.Event]

    def run(self, statement: str, *args: Any, **values: Any) -> list[list[Any]]:
        name = statement.splitlines()[0]
        self.calls[name] += 1
        if name in self.held_back:
            assert self.held_back[name].wait(20)
        return super().run(statement, *args, **values)


@pytest.fixture
def database(postgres_url: str) -> Iterator[CountingDatabase]:
    with fresh_schema(postgres_url) as schema:
        database = CountingDatabase(read_database_url(postgres_url), schema, 4)
        database.calls, database.held_back = Counter(), {}
        migrate(database)
        yield database
        database.close()


@pytest.fixture
def queue(database: Database) -> Queue:
    return Queue(database)


@pytest.fixture
def long_poll(queue: Queue) -> Iterator[WaitingClaims]:
    long_poll = WaitingClaims(queue, places=100)
    yield long_poll
    long_poll.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(100) as threads:
        yield threads


def wish(profile: str = "profile", wait_seconds: float = 20, **fields: Any) -> ClaimRequest:
    fields = {"claim_id": str(uuid.uuid4()), "worker_id": uuid.uuid4().hex} | fields
    return ClaimRequest(model_profiles=[profile], wait_seconds=wait_seconds, **fields)


def present() -> bool:
    return False


def parked(long_poll: WaitingClaims, threads: ThreadPoolExecutor, wishes: list[ClaimRequest]) -> list[Future[Claimed]]:
    """Claims that wait."""
    before = long_poll.waiting_count()
    futures = [threads.submit(long_poll.claim, each, present) for each in wishes]
    wait_until(lambda: long_poll.waiting_count() == before + len(wishes))
    return futures


def new_job(profile: str = "profile", **fields: Any) -> NewJob:
    return NewJob("owner", "type", profile, "ref", "1", **fields)


def test_60_waiting_claims_cost_a_few_statements_a_second(
    long_poll: WaitingClaims, database: CountingDatabase, threads: ThreadPoolExecutor
) -> None:
    assert long_poll.claim(wish(wait_seconds=1.5), present).jobs == "", "the first look around is behind us"
    waiting = parked(long_poll, threads, [wish(wait_seconds=3) for _ in range(60)])
    database.calls.clear()
    assert [claimed.result().jobs for claimed in waiting] == [""] * 60
    assert database.calls["-- queue.peek"] <= 14
    assert database.calls["-- queue.claim"] <= 1, "once every few seconds, to be sure"
    assert database.calls.total() == database.calls["-- queue.peek"] + database.calls["-- queue.claim"]


def test_a_process_where_nobody_waits_asks_nothing(
    long_poll: WaitingClaims, database: CountingDatabase, threads: ThreadPoolExecutor
) -> None:
    assert long_poll.claim(wish(wait_seconds=0), present).jobs == ""
    long_poll.jobs_ready()
    assert long_poll.claim(wish(wait_seconds=0), present).jobs == ""
    assert database.calls.keys() == {"-- database.schema_version", "-- queue.claim"}


def test_claims_that_come_together_share_a_statement(
    long_poll: WaitingClaims, queue: Queue, database: CountingDatabase, threads: ThreadPoolExecutor
) -> None:
    waiting = parked(long_poll, threads, [wish() for _ in range(16)])
    queue.create_batch([new_job() for _ in range(16)])
    database.calls.clear()
    long_poll.jobs_ready()
    assert all(claimed.result().jobs for claimed in waiting)
    assert database.calls["-- queue.claim"] == 1


def test_a_job_wakes_only_the_claims_that_it_fits(long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor) -> None:
    [other] = parked(long_poll, threads, [wish("other")])
    [fitting] = parked(long_poll, threads, [wish("profile")])
    queue.create_batch([new_job()])
    long_poll.jobs_ready([("profile", "type", "owner")])
    assert fitting.result(2).jobs
    assert not other.done()
    long_poll.close()
    assert other.result(2).jobs == ""


def test_one_job_goes_to_the_one_who_waits_longest(long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor) -> None:
    [first] = parked(long_poll, threads, [wish()])
    [second] = parked(long_poll, threads, [wish()])
    queue.create_batch([new_job()])
    long_poll.jobs_ready()
    assert first.result(2).jobs
    assert not second.done()
    long_poll.close()


def test_a_job_created_through_another_process_is_found(long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor) -> None:
    [waiting] = parked(long_poll, threads, [wish()])
    queue.create_batch([new_job()])
    assert waiting.result(2).jobs


def test_a_scheduled_job_is_handed_out_when_it_is_due(
    long_poll: WaitingClaims, queue: Queue, database: Database, threads: ThreadPoolExecutor
) -> None:
    queue.create_batch([new_job(run_at="2999-01-01T00:00:00Z")])
    [waiting] = parked(long_poll, threads, [wish()])
    database.run("-- test\nupdate waiting set run_at = now()")
    assert waiting.result(2).jobs


@pytest.mark.parametrize("seconds", [0.5, 2.0], ids=["a moment", "two seconds"])
def test_a_create_that_commits_late_is_found(
    long_poll: WaitingClaims, queue: Queue, database: Database, postgres_url: str, threads: ThreadPoolExecutor, seconds: float
) -> None:
    queue.create_batch([new_job("first")])
    [waiting] = parked(long_poll, threads, [wish()])
    late = connect(postgres_url, database.schema)
    late.run("begin")
    late.run(LATE_CREATE)
    [made] = parked(long_poll, threads, [wish("nobody", wait_seconds=seconds)])
    made.result()
    late.run("commit")
    late.close()
    assert waiting.result(10).jobs


def test_a_job_below_the_floor_is_found_whoever_else_waits(
    long_poll: WaitingClaims, queue: Queue, database: Database, postgres_url: str, threads: ThreadPoolExecutor
) -> None:
    queue.create_batch([new_job()])
    assert long_poll.claim(wish(), present).jobs, "the lane is there"
    late = connect(postgres_url, database.schema)
    late.run("begin")
    late.run(LATE_CREATE)
    queue.create_batch([new_job()])
    assert long_poll.claim(wish(), present).jobs, "a later job of the lane: the late one is below the floor now"
    others = parked(long_poll, threads, [wish(f"another-{number}") for number in range(3)])
    [waiting] = parked(long_poll, threads, [wish()])
    threads.submit(long_poll.claim, wish("nobody", wait_seconds=2.5), present).result()
    late.run("commit")
    late.close()
    assert waiting.result(15).jobs
    long_poll.close()
    assert [each.result(2).jobs for each in others] == [""] * 3


def test_a_client_that_hung_up_takes_no_job(long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor) -> None:
    gone = threading.Event()
    deserter = threads.submit(long_poll.claim, wish(), gone.is_set)
    wait_until(lambda: long_poll.waiting_count() == 1)
    [patient] = parked(long_poll, threads, [wish()])
    gone.set()
    queue.create_batch([new_job()])
    long_poll.jobs_ready()
    assert patient.result(2).jobs
    assert deserter.result(2).jobs == ""


def test_beyond_its_places_a_claim_is_answered_at_once(queue: Queue, threads: ThreadPoolExecutor) -> None:
    small = WaitingClaims(queue, places=2)
    waiting = parked(small, threads, [wish() for _ in range(2)])
    assert small.claim(wish(), present).jobs == ""
    assert not any(claimed.done() for claimed in waiting)
    small.close()
    assert [claimed.result(2).jobs for claimed in waiting] == ["", ""]


def test_a_repeat_takes_the_place_of_the_claim_that_still_waits(
    long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor
) -> None:
    same = wish()
    [given_up] = parked(long_poll, threads, [same])
    repeat = threads.submit(long_poll.claim, same, present)
    assert given_up.result(2).jobs == ""
    queue.create_batch([new_job(), new_job()])
    long_poll.jobs_ready()
    assert repeat.result(5).jobs.count('"id"') == 1


def test_the_same_claim_twice_at_once_gets_the_same_job(long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor) -> None:
    for _ in range(20):
        queue.create_batch([new_job(), new_job()])
        same = wish(wait_seconds=0)
        both = [threads.submit(long_poll.claim, same, present) for _ in range(2)]
        assert len({claimed.result(5).jobs for claimed in both}) == 1


def test_who_reads_many_jobs_holds_up_no_other_claim(
    long_poll: WaitingClaims, queue: Queue, database: CountingDatabase, threads: ThreadPoolExecutor
) -> None:
    large = NewJob("owner", "type", "large", "ref", '"' + "x" * CLAIMED_AT_ONCE_BYTES + '"')
    queue.create_batch([large, large, new_job()])
    turn = database.held_back["-- queue.claimed_texts"] = threading.Event()
    reading = threads.submit(long_poll.claim, wish("large", wait_seconds=0, limit=2), present)
    wait_until(lambda: database.calls["-- queue.claimed_texts"] == 1)
    assert long_poll.claim(wish(wait_seconds=0), present).jobs
    assert not reading.done()
    turn.set()
    assert reading.result(5).jobs.count('"id"') == 2


def test_a_repeat_of_a_claim_whose_jobs_have_ended_waits_for_no_others(long_poll: WaitingClaims, queue: Queue) -> None:
    [made] = queue.create_batch([new_job()])
    same = wish(wait_seconds=20)
    assert long_poll.claim(same, present).jobs
    queue.cancel(made.id, "")
    begun = time.monotonic()
    assert long_poll.claim(same, present).jobs == ""
    assert time.monotonic() - begun < 10


def test_who_waits_for_a_job_is_told_when_another_process_finishes_it(
    long_poll: WaitingClaims, queue: Queue, threads: ThreadPoolExecutor
) -> None:
    [made] = queue.create_batch([new_job()])
    told = threads.submit(long_poll.wait_for, made.id, 20)
    wait_until(lambda: long_poll.waiting_count() == 1)
    queue.cancel(made.id, "")
    told.result(2)
