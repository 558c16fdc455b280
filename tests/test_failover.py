"""A primary that dies under load and a synchronous standby that takes its place: nothing acknowledged is lost or done twice.

`make failover` runs 20 rounds, in which the servers change places again and again, and prints how long it took from the kill to the first
create that was answered 201 and to `readyz`'s 200. CI runs one round. Without FAILOVER_ROUNDS these are skipped: a pair takes its time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import attrs
import pytest
import urllib3
from failover import Member, claim_and_complete, create, rows, written_down
from fake_vllm import fake_vllm
from service import INHERITED, Api, Corner, Service, running_service, wait_until

from ai_internal.server.database import Database, migrate
from ai_internal.server.database_url import read_database_url
from ai_internal.server.requests import DatabaseUnavailable

ROUNDS = int(os.environ.get("FAILOVER_ROUNDS", "0"))
pytestmark = pytest.mark.skipif(ROUNDS == 0, reason="make failover")
SCHEMA = "ai_service"


@attrs.define
class Pair:
    """The server that is the primary now, and its standby."""

    primary: Member
    standby: Member
    url: str = ""

    def __attrs_post_init__(self) -> None:
        hosts = f"127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}"
        self.url = self.primary.url.replace(f"127.0.0.1:{self.primary.port}", hosts) + "?target_session_attrs=read-write"

    def promote(self) -> None:
        """The standby becomes the primary at once, as by whoever watches over them."""
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def rebuild(self) -> None:
        """Makes the one that died the standby."""
        self.standby.follow(self.primary)
        self.primary.wait_for_standby()


@contextmanager
def a_pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        primary = stack.enter_context(Member().running())
        standby = stack.enter_context(Member(primary).running())
        primary.wait_for_standby()
        yield Pair(primary, standby)


@contextmanager
def load(service: Service, folder: Path) -> Iterator[list[BaseProcess]]:
    """Processes that create, claim and complete, and a worker with a model server, until everything is done."""
    url, spawn = f"http://127.0.0.1:{service.api.port}", multiprocessing.get_context("spawn")
    acts = (create, create, claim_and_complete, claim_and_complete)
    processes = [spawn.Process(target=act, args=(url, number, folder)) for number, act in enumerate(acts)]
    with worker(url, folder):
        try:
            for process in processes:
                process.start()
            yield processes
            (folder / "stop").touch()
            for process in processes[:2]:
                process.join(130)
            wait_until(lambda: nothing_left(service.api), 120, "the end of all jobs")
            (folder / "drained").touch()
            for process in processes:
                process.join(130)
            assert [process.exitcode for process in processes] == [0, 0, 0, 0]
        finally:
            for process in processes:
                process.kill()


@contextmanager
def worker(url: str, folder: Path) -> Iterator[None]:
    environ = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environ |= {"AI_SERVICE_URL": url, "WORKER_SPOOL_DIR": str(folder / "spool")}
    with fake_vllm(model="worker") as model, (folder / "worker.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "ai_internal.worker.worker"], env={**environ, **model.environ}, stderr=log)
        try:
            yield
            assert process.poll() is None, "the worker has lived through it"
        finally:
            process.terminate()
            process.wait(30)


def nothing_left(api: Api) -> bool:
    answer = api.get("/api/v1/stats")
    jobs = answer.json["jobs"] if answer.status == 200 else {}
    return [jobs.get(state) for state in ("pending", "scheduled", "running")] == [0, 0, 0]


def seconds_since(kill: float, call: Callable[[], bool]) -> float:
    """From the kill to the end of the first call that comes off."""
    wait_until(lambda: comes_off(call), 60, "service after the failover")
    return monotonic() - kill


def comes_off(call: Callable[[], bool]) -> bool:
    try:
        return call()
    except urllib3.exceptions.HTTPError:
        return False


def one_round(pair: Pair, api: Api, folder: Path, key: str) -> tuple[float, float]:
    """Seconds from the kill to the first acknowledged create, and to readiness."""
    body = Corner(api).job(model_profile="claimers", idempotency_key=key)
    with ThreadPoolExecutor(2) as pool, (folder / "created-by-test").open("a") as written:
        kill = monotonic()
        pair.primary.crash()
        created = pool.submit(seconds_since, kill, lambda: api.post("/api/v1/jobs", body).status in (200, 201))
        ready = pool.submit(seconds_since, kill, lambda: api.get("/readyz").status == 200)
        pair.promote()
        times = created.result(90), ready.result(90)
        written.write(f"{api.post('/api/v1/jobs', body).json['id']}\n")
    return times


def test_nothing_acknowledged_is_lost_or_done_twice_when_the_primary_dies(tmp_path: Path) -> None:
    chance, times = random.Random(7), []
    with a_pair() as pair, running_service(pair.url, SCHEMA) as service:
        with load(service, tmp_path):
            for number in range(ROUNDS):
                before = len(written_down(tmp_path, "completed"))
                wait_until(lambda before=before: len(written_down(tmp_path, "completed")) > before + 50, 60, "load")
                threading.Event().wait(chance.uniform(0, 0.3))
                times.append(one_round(pair, service.api, tmp_path, f"round/{number}"))
                if number < ROUNDS - 1:
                    pair.rebuild()
        assert_the_ledger_is_right(pair.primary.url, tmp_path)
        assert "Traceback" not in service.log
    for name, seconds in zip(("create", "readyz"), zip(*times, strict=True), strict=True):
        print(f"{name}: min {min(seconds):.2f}, median {statistics.median(seconds):.2f}, max {max(seconds):.2f} s of", end=" ")
        print(*(f"{each:.2f}" for each in sorted(seconds)))


def assert_the_ledger_is_right(url: str, folder: Path) -> None:
    created = [identity for (identity,) in written_down(folder, "created")]
    completed = written_down(folder, "completed")
    kept = {str(row[0]): row[1:] for row in rows(url, SCHEMA, "select job_id, claim_id::text, status, attempt, result::text from ended")}
    assert set(created) <= set(kept), "a job was lost"
    assert {status for _, status, *_ in kept.values()} == {"completed"}
    assert {attempt for _, _, attempt, _ in kept.values()} == {1}
    assert {status for _, _, status in completed} == {"200"}
    assert set(Counter(identity for identity, *_ in completed).values()) == {1}, "finished twice"
    for identity, claim_id, _ in completed:
        assert kept[identity][0] == claim_id
        assert kept[identity][3] == f'{{"by":"{claim_id}"}}', "another result"
    by_worker = rows(url, SCHEMA, "select count(*) from ended where worker_id not like 'claimer-%'")
    assert by_worker[0][0] > 0
    print(f"{len(created)} creates, {len(completed)} completions acknowledged, {by_worker[0][0]} by the worker")


def test_a_stale_primary_acknowledges_nothing() -> None:
    insert = "-- test\ninsert into pause (task_type) values ('written-to-the-stale-one') returning 1"
    with a_pair() as pair:
        database = Database(read_database_url(pair.url), SCHEMA, 2)
        migrate(database)
        database.close()
        pair.primary.crash()
        pair.promote()
        stale = pair.standby
        stale.start()  # Nobody fenced it: it believes to be the primary, and comes first in DATABASE_URL.
        with pytest.raises(DatabaseUnavailable):
            database.run(insert, seconds=2)
        database.close()
        assert rows(pair.primary.url, SCHEMA, "select count(*) from pause") == [[0]]
        # Also to others on the stale server it does not exist: its commit is still waiting for the standby.
        assert rows(stale.url, SCHEMA, "select count(*) from pause") == [[0]]
