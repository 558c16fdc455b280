"""What a claim costs, by backlog, filters, priorities, a held snapshot and the number of clients, on the queue's own statements.

    python bench/claim.py [--jobs 1000000] [--cases backlog,snapshot,fairness,clients]

Starts an embedded PostgreSQL of its own with durable commits, without autovacuum and without ANALYZE: the planner knows nothing. Prints one
line per figure; milliseconds are median / 99th percentile of claim calls from one client unless a line says otherwise.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

import pg8000.native

import ai_embedded
from ai_database_url import read_database_url
from ai_service import Claimed, ClaimRequest, Completion, Database, NewJob, Queue, Release, migrate

T = TypeVar("T")
INPUT = '{"messages": [{"role": "user", "content": "' + "x" * 900 + '"}]}'
RESULT = '{"content": "' + "y" * 1900 + '"}'


def queue_on(url: str, schema: str) -> Queue:
    """A queue on a schema, made where missing."""
    database = Database(read_database_url(url), schema, 4)
    migrate(database)
    return Queue(database)


def fill(queue: Queue, pending: int, finished: int, combinations: int, priorities: int) -> None:
    """Jobs in bulk: as many owners as a tenth of the combinations, ten profiles each; the finished ones before the pending."""
    queue.prepare_partitions(None)
    queue.database.script(f"""
        begin; set local statement_timeout = 0;
        insert into lane (owner_service, task_type, model_profile, priority)
        select 'owner' || c / 10, 'call_analysis', 'profile' || c % 10, p
        from generate_series(0, {combinations} - 1) c, generate_series(0, {priorities} - 1) p on conflict do nothing;
        create temporary table fresh on commit drop as
        select uuid_v7(now() - interval '1 second' + i * interval '1 microsecond') as id, l.id as lane_id, i
        from generate_series(1, {pending + finished}) i
        join (select id, row_number() over (order by id) - 1 as n, count(*) over () as lanes from lane) l
          on l.n = i % l.lanes;
        insert into job (id, lane_id, owner_ref, created_at, run_at, max_attempts, input_bytes, input)
        select id, lane_id, 'ref/' || i, now(), now(), 3, 100, '{{"text": "{"x" * 80}"}}' from fresh;
        insert into ended (job_id, status, attempt, finished_at, result)
        select id, 'completed', 1, now(), '1' from fresh where i <= {finished};
        insert into ready (lane_id, job_id, run_at, attempt, releases, input_bytes)
        select lane_id, id, now(), 0, 0, 100 from fresh where i > {finished} order by i;
        commit""")


def timed(calls: int, act: Callable[[], T], undo: Callable[[T], object] = lambda done: done) -> str:
    """Median / 99th percentile in milliseconds of calls, after ten to warm up; what undoes a call is not counted."""
    taken = []
    for _ in range(calls + 10):
        start = time.perf_counter()
        done = act()
        taken.append((time.perf_counter() - start) * 1000)
        undo(done)
    taken = sorted(taken[10:])
    return f"{statistics.median(taken):7.2f} / {taken[int(len(taken) * 0.99)]:7.2f} ms"


def claim(queue: Queue, limit: int = 10, **filters: list[str]) -> Claimed:
    """One claim that must get something."""
    answer = queue.claim([ClaimRequest(worker_id="bench", limit=limit, claim_id=str(uuid.uuid4()), **filters)])[0]
    if not isinstance(answer, Claimed) or not answer.jobs:
        raise SystemExit(f"a claim came back empty: {answer}")
    return answer


def give_back(queue: Queue, claimed: Claimed) -> None:
    """Undoes a claim: the jobs join the end of their lanes."""
    ids = ids_of(claimed)
    queue.release(ids, [Release(claimed.claim_id)] * len(ids))
    queue.database.run("-- bench.forget\nupdate ready set releases = 0 where releases > 50")


def ids_of(claimed: Claimed) -> list[str]:
    """The ids of the jobs of a claim."""
    return [part[:36] for part in claimed.jobs.split('{"id":"')[1:]]


FILTERS: dict[str, dict[str, list[str]]] = {
    "no filter": {},
    "profile": {"model_profiles": ["profile3"]},
    "owner+profile": {"owner_services": ["owner7"], "model_profiles": ["profile3"]},
}


def backlog(url: str, jobs: int) -> None:
    """Claims of ten at a small and at a large backlog, 200 combinations, one and three priorities."""
    for priorities in (1, 3):
        for pending in (3000, jobs):
            queue = queue_on(url, f"backlog_{priorities}_{pending}")
            fill(queue, pending, 0 if pending == 3000 else jobs, 200, priorities)
            for name, filters in FILTERS.items():
                figure = timed(
                    200, lambda filters=filters, queue=queue: claim(queue, **filters), lambda done, queue=queue: give_back(queue, done)
                )
                print(f"claim of 10, {200 * priorities} lanes, {pending:>9,} pending, {name:14} {figure}", flush=True)
            queue.database.script(f"drop schema backlog_{priorities}_{pending} cascade")


@contextmanager
def held_snapshot(url: str) -> Iterator[None]:
    """A stranger's transaction that keeps everything dead from being removed."""
    stranger: pg8000.native.Connection = read_database_url(url).connect()
    stranger.run("begin isolation level repeatable read; select count(*) from pg_class")
    try:
        yield
    finally:
        stranger.close()


def life(queue: Queue, size: int = 100) -> None:
    """A batch of jobs from creation to completion."""
    queue.create([NewJob("telephony", "call_analysis", "qwen2.5-14b", f"ref/{n}", INPUT) for n in range(size)])
    claimed = claim(queue, size)
    ids = ids_of(claimed)
    outcomes = queue.complete(ids, [Completion(claimed.claim_id, RESULT)] * len(ids))
    if outcomes.count("ok") != size:
        raise SystemExit(f"of {size} jobs {outcomes.count('ok')} were completed")


def snapshot(url: str, jobs: int) -> None:
    """Lives of 100 while another session holds a snapshot, at the start and after `jobs / 10` went through."""
    queue = queue_on(url, "snapshot")
    with held_snapshot(url):
        for _ in range(20):
            life(queue)
        print(f"life of 100, held snapshot, at the start          {timed(50, lambda: life(queue))}", flush=True)
        for _ in range(jobs // 1000):
            life(queue)
        print(f"life of 100, held snapshot, after {jobs // 10:>9,} jobs   {timed(50, lambda: life(queue))}", flush=True)


def fairness(url: str, jobs: int) -> None:
    """One owner has a tenth of `jobs` pending; another adds ten."""
    queue = queue_on(url, "fairness")
    many = jobs // 10
    for start in range(0, many, 5000):
        queue.create([NewJob("many", "t", "m", f"{n}", "1") for n in range(start, min(start + 5000, many))])
    for _ in range(5):
        claim(queue, 1)
    queue.create([NewJob("few", "t", "m", f"{n}", "1") for n in range(10)])
    owners = [("few" if '"few"' in claim(queue, 1).jobs else "many") for _ in range(20)]
    print(f"of 20 claims of one, {many:,} of one owner against 10 of another: {owners.count('few')} for the other", flush=True)


def _lives(url: str, seconds: float, size: int, counted: "multiprocessing.Queue[int]") -> None:
    queue, end, done = queue_on(url, "clients"), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        life(queue, size)
        done += size
    counted.put(done)


def clients(url: str, _jobs: int) -> None:
    """Lives per second from several client processes at once, each with its own connection: what the one lock for claims costs."""
    queue_on(url, "clients")
    for size in (100, 1):
        for number in (1, 2, 4, 8):
            counted: multiprocessing.Queue[int] = multiprocessing.Queue()
            workers = [multiprocessing.Process(target=_lives, args=(url, 5, size, counted)) for _ in range(number)]
            for worker in workers:
                worker.start()
            total = sum(counted.get() for _ in workers)
            for worker in workers:
                worker.join()
            print(f"lives in batches of {size:>3}, {number} client processes: {total / 5:>8,.0f} per second", flush=True)


CASES = {"backlog": backlog, "snapshot": snapshot, "fairness": fairness, "clients": clients}


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ai_embedded.embedded_postgres(Path(folder)) as url:
        queue_on(url, "settings").database.run("-- bench.version\nselect version()")
        settings = read_database_url(url).connect()
        settings.run("alter system set autovacuum = off")
        settings.run("select pg_reload_conf()")
        print(settings.run("show server_version")[0][0], "synchronous_commit", settings.run("show synchronous_commit")[0][0], flush=True)
        settings.close()
        for case in options.cases.split(","):
            CASES[case](url, options.jobs)


if __name__ == "__main__":
    main()
