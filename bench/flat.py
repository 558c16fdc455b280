"""How flat: what claims, lives and counters cost as the backlog, the history and what else a service gathers grow.

Two states are compared on two schemas with a service process each, their calls in turns, or before and after on one. Backlogs are filled in
by SQL, as the service's own functions would leave them; jobs have 1 KB of input and, where they have finished, 1 KB of result.
"""

import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs
import clients
import pg8000.native
from ground import Bench
from peers import program

from ai_internal.server.database import Database, migrate
from ai_internal.server.database_url import read_database_url
from ai_service import Queue

PAYLOAD = '{"text": "' + "x" * 1000 + '"}'
CHUNK = 50_000
Filter = Mapping[str, Sequence[str]]
FILTERS: dict[str, Filter] = {
    "no filter": {},
    "profile": {"model_profiles": ["profile3"]},
    "task type": {"task_types": ["task1"]},
    "owner": {"owner_services": ["owner7"]},
    "owner+profile": {"owner_services": ["owner7"], "model_profiles": ["profile3"]},
}


# What the cases stand on: a schema with a service, and its filling.


@attrs.frozen
class Side:
    """One of the states compared: a connection to its service, and one to its schema."""

    client: clients.Client
    session: Any

    def claim(self, wanted: Filter, limit: int = 10) -> float:
        """Milliseconds of a claim that must get something. Its jobs are given back after it, so that a lane never runs dry."""
        claim_id = str(uuid.uuid4())
        body = json.dumps({"worker_id": "bench", "limit": limit, "claim_id": claim_id, **wanted})
        begun = time.perf_counter()
        answer = self.client.post("/api/v1/jobs/claim", body)
        taken = (time.perf_counter() - begun) * 1000
        ids = [part[:36].decode() for part in answer.split(b'{"id":"')[1:]]
        if len(ids) < limit:
            raise RuntimeError(f"a claim of {limit} got {len(ids)}")
        self._give_back(claim_id, ids)
        return taken

    def _give_back(self, claim_id: str, ids: Sequence[str]) -> None:
        self.client.post("/api/v1/jobs/release", json.dumps({"jobs": [{"id": job_id, "claim_id": claim_id} for job_id in ids]}))
        # The 101st release would end a job.
        self.session.run("update ready set releases = 0 where job_id = any (cast(:ids as uuid[])) and releases > 50", ids=ids)

    def stats(self) -> float:
        """Milliseconds of a look at the counters."""
        begun = time.perf_counter()
        self.client.get("/api/v1/stats")
        return (time.perf_counter() - begun) * 1000

    def blocks(self, statement: str) -> int:
        """How many blocks a statement touches, in memory or not, once it has run before."""
        for _ in range(2):
            [[[told]]] = self.session.run(f"explain (analyze, buffers, format json) {statement}")
        return int(told["Plan"]["Shared Hit Blocks"] + told["Plan"]["Shared Read Blocks"])


def session_on(url: str, schema: str) -> Any:
    """A session on a schema, without limits on what a statement may take."""
    session: pg8000.native.Connection = read_database_url(url).connect(timeout_seconds=3600)
    session.run(f"set search_path = {schema}; set statement_timeout = 0")
    return session


@contextmanager
def side(bench: Bench, schema: str) -> Iterator[Side]:
    """A service on the schema, which it makes where missing."""
    with bench.serving(schema) as server, closing(session_on(bench.url, schema)) as session:
        yield Side(clients.Client(server.port), session)


@contextmanager
def schemas(bench: Bench, *names: str) -> Iterator[list[Any]]:
    """Sessions on new schemas, made as a service would; they are dropped at the end."""
    for name in names:
        database = Database(read_database_url(bench.url), name, 1)
        migrate(database)
        Queue(database).prepare_partitions(timedelta(days=30))
        database.close()
    sessions = [session_on(bench.url, name) for name in names]
    yield sessions
    for name, session in zip(names, sessions, strict=True):
        session.run(f"drop schema {name} cascade")
        session.close()


def lanes(session: Any, owners: int, profiles: int) -> None:
    """So many owners with so many profiles each, of two types of task."""
    session.run(f"""
        insert into lane (owner_service, task_type, model_profile, priority)
        select 'owner' || o, 'task' || p % 2, 'profile' || p, 0
        from generate_series(0, {owners} - 1) o, generate_series(0, {profiles} - 1) p""")


READY = """
    counted as (insert into tally (lane_id, event, n, ready) select lane_id, 'created', count(*), count(*) from fresh group by lane_id)
    insert into ready (lane_id, job_id, run_at, attempt, releases, input_bytes)
    select lane_id, id, now(), 0, 0, 1000 from fresh order by i"""
TOMORROW = """
    counted as (insert into tally (lane_id, event, n, scheduled) select lane_id, 'created', count(*), count(*) from fresh group by lane_id)
    insert into waiting (lane_id, job_id, run_at, attempt, releases, input_bytes)
    select lane_id, id, now() + interval '1 day', 0, 0, 1000 from fresh"""
ENDED = f"""
    counted as (insert into tally (lane_id, event, n) select lane_id, 'created', count(*) from fresh group by lane_id)
    insert into ended (job_id, status, attempt, worker_id, claim_id, run_at, started_at, finished_at, result)
    select id, 'completed', 1, 'bench', id, at, at, at, '{PAYLOAD}' from fresh"""


def fill(session: Any, state: str, count: int, at: str = "now()", of_lanes: str = "true") -> None:
    """So many jobs in this state, in turns over the lanes that fit, each with a key of its own."""
    for first in range(0, count, CHUNK):
        session.run(f"""
            with numbered as (
              select *, row_number() over (order by id) - 1 as number, count(*) over () as lanes from lane where {of_lanes}),
            fresh as materialized (
              select uuid_v7({at} + i * interval '1 microsecond') as id, {at} as at, l.id as lane_id, l.owner_service, i,
                gen_random_uuid()::text as key
              from generate_series({first}, {min(first + CHUNK, count) - 1}) i join numbered l on l.number = i % l.lanes),
            facts as (
              insert into job (id, lane_id, owner_ref, idempotency_key, created_at, run_at, max_attempts, input_bytes, input)
              select id, lane_id, 'ref/' || i, key, at, at, 3, 1000, '{PAYLOAD}' from fresh),
            keys as (insert into idempotency (owner_service, key, job_id) select owner_service, key, id from fresh), {state}""")


def day_of_counters(session: Any) -> None:
    """The counters of a day in which every lane was served every five minutes, with four durations each time: 47,200 rows for 200 lanes.

    They go through the ledger, with upkeep locked out until they stand there. Durations are kept for two hours, before those there are only
    sums by the hour.
    """
    session.run("""
        begin; select pg_advisory_xact_lock(lock_key(3)); update upkeep_state set folded_at = now() - interval '25 hours';
        insert into tally (at, lane_id, event, n, seconds_bucket)
        select now() - span * interval '5 minutes', id, event, 4, bucket
        from lane, unnest(array['claimed', 'completed']) event, generate_series(0, 287) span, generate_series(40, 43) bucket
        where span < 24 or (span % 12 = 0 and bucket = 40);
        commit""")
    while session.run("select exists (select from tally)")[0][0]:
        session.run("select fold_v1(20000)")


def autovacuum(session: Any, *, on: bool) -> None:
    """Switches it for the tables of the schema."""
    for name in tables(session):
        session.run(f"alter table {name} set (autovacuum_enabled = {on})")


def analyze(session: Any) -> None:
    """Leaves the schema as autovacuum does when nothing more comes."""
    for name in tables(session):
        session.run(f"vacuum analyze {name}")


def tables(session: Any) -> list[str]:
    """The tables of the schema that hold rows: partitions, not what they are partitions of."""
    rows = session.run("select relname from pg_class where relnamespace = current_schema()::regnamespace and relkind = 'r'")
    return [name for (name,) in rows]


# How it is measured.


def calls(bench: Bench, full: int) -> int:
    """How many calls make a figure: fewer on a smaller scale, by its root, as a few calls say little."""
    return max(20, int(full * bench.scale**0.5))


def in_turns(count: int, *acts: Callable[[], float]) -> list[list[float]]:
    """What each act returned in so many turns, after ten to warm up; sorted."""
    taken = [[act() for act in acts] for _ in range(count + 10)][10:]
    return [sorted(figures) for figures in zip(*taken, strict=True)]


def tail(taken: Sequence[float]) -> float:
    """The 99th percentile of sorted figures."""
    return taken[int(len(taken) * 0.99)]


def claims(bench: Bench, name: str, small: Side, large: Side, wanted: Filter, count: int) -> tuple[float, float]:
    """Prints what claims of ten cost on either side; by how much the large one's median and 99th percentile are larger."""
    few, many = in_turns(count, lambda: small.claim(wanted), lambda: large.claim(wanted))
    for which, taken in (("small", few), ("large", many)):
        bench.table.add(f"{name}: {which}", statistics.median(taken), "ms", p99=f"{tail(taken):.2f} ms")
    return statistics.median(many) / statistics.median(few), tail(many) / tail(few)


# The cases.


def backlog(bench: Bench) -> None:
    """Claims at a million pending and a million finished against 3,000, with statistics that mislead and with good ones; and the counters.

    200 combinations: 20 owners with ten profiles each. First the tables were analyzed while empty and never again, then they come from
    a dump, which has no statistics, then they are as autovacuum leaves them. The counters are read as these claims left them, then with a
    whole day in them.
    """
    with schemas(bench, "backlog_small", "backlog") as (small, large):
        for session in (small, large):
            lanes(session, 20, 10)
        autovacuum(large, on=False)
        analyze(large)
        begun = time.monotonic()
        fill(large, ENDED, bench.size(1_000_000))
        fill(large, READY, max(3000, bench.size(1_000_000)))
        fill(small, READY, 3000)
        bench.table.add("backlog: filled", time.monotonic() - begun, "s")
        analyze(small)
        misled(bench, "statistics of empty tables", bench)
        with restored(bench, "backlog") as copy:
            misled(bench, "right after a restore", copy)
        analyze(large)
        autovacuum(large, on=True)
        with side(bench, "backlog_small") as few, side(bench, "backlog") as many:
            for name, wanted in FILTERS.items():
                middle, worst = claims(bench, f"backlog, {name}", few, many, wanted, calls(bench, 300))
                bench.table.judge(f"backlog, {name}: ratio of medians", middle, 1.5, most=True)
                bench.table.judge(f"backlog, {name}: ratio of p99s", worst, 2, most=True)
            stats(bench, "first counters", few, many)
            for session in (small, large):
                day_of_counters(session)
                analyze(session)
            stats(bench, "a day's counters", few, many)


def misled(bench: Bench, name: str, large: Bench) -> None:
    """Claims on the small schema and on the large one of a database whose planner knows nothing of it."""
    with side(bench, "backlog_small") as few, side(large, "backlog") as many:
        for label in ("no filter", "profile", "owner+profile"):
            middle, _ = claims(bench, f"{name}, {label}", few, many, FILTERS[label], calls(bench, 300))
            bench.table.judge(f"{name}, {label}: ratio of medians", middle, 2, most=True)


@contextmanager
def restored(bench: Bench, schema: str) -> Iterator[Bench]:
    """A database with this schema alone, played in from a dump. What the dump says of autovacuum holds there too: off."""
    environ = {**os.environ, "PGHOST": parse_qs(urlsplit(bench.url).query)["host"][0], "PGUSER": "postgres"}
    with closing(session_on(bench.url, "public")) as session:
        session.run("create database flat_restored")
        with subprocess.Popen([program("pg_dump"), "-n", schema, "postgres"], stdout=subprocess.PIPE, env=environ) as dump:
            command = [program("psql"), "-q", "-v", "ON_ERROR_STOP=1", "flat_restored"]
            subprocess.run(command, stdin=dump.stdout, stdout=subprocess.DEVNULL, env=environ, check=True)
        there = attrs.evolve(bench, url=bench.url.replace("/postgres?", "/flat_restored?"))
        with closing(session_on(there.url, schema)) as copy:
            [[known]] = copy.run("select count(*) from pg_stats where schemaname = current_schema()")
        if dump.returncode or known:
            raise RuntimeError(f"pg_dump ended with {dump.returncode}, and the copy has statistics of {known} columns")
        yield there
        session.run("drop database flat_restored with (force)")


def stats(bench: Bench, name: str, small: Side, large: Side) -> None:
    """The counters: how long they take, and how many blocks their two statements touch, with few jobs and with millions."""
    few, many = in_turns(calls(bench, 300), small.stats, large.stats)
    bench.table.add(f"GET /stats, {name}: small", statistics.median(few), "ms", p99=f"{tail(few):.2f} ms")
    bench.table.judge(f"GET /stats, {name}: large, median", statistics.median(many), 20, unit="ms", most=True)
    touched = [sum(each.blocks(f"select {call}") for call in ("fold_v1(20000)", "stats_v1(86400, null)")) for each in (small, large)]
    bench.table.add(f"GET /stats, {name}, blocks: small", touched[0], "")
    bench.table.judge(f"GET /stats, {name}, blocks: large against small", touched[1] / touched[0], 1.5, most=True)


def snapshot(bench: Bench) -> None:
    """Lives while another session holds a snapshot, so that nothing dead can be removed: at its start and after 200,000 jobs.

    At full scale it is held for ten minutes. In that time the machine changes more than the lives: so the end is judged against a schema
    that is as new then as this one was at its start, side by side.
    """
    seconds = 600.0 if bench.scale >= 1 else 100 * bench.scale
    lives = bench.size(200_000) // 100 // 12 + 1
    with (
        schemas(bench, "snapshot", "snapshot_new"),
        bench.serving("snapshot") as server,
        bench.serving("snapshot_new") as beside,
        closing(session_on(bench.url, "snapshot")) as stranger,
    ):
        stranger.run("begin isolation level repeatable read; select count(*) from lane")
        at_start = steps(calls(bench, 200), clients.Client(server.port))
        # In parts: who waits for the clients waits ten minutes at most.
        done = sum(clients.run(server.port, 2, 0, functools.partial(paced, lives, seconds / 6)).done for _ in range(6))
        # New connections: the service lets silent ones go after two minutes.
        at_end = steps(calls(bench, 200), clients.Client(server.port), clients.Client(beside.port))
    for number, verb in enumerate(("create", "claim", "complete")):
        start, end, fresh = (statistics.median(taken) for taken in (at_start[number], at_end[number], at_end[number + 3]))
        bench.table.add(f"snapshot, {verb} 100: at its start", start, "ms")
        bench.table.add(
            f"snapshot, {verb} 100: after {done:,} jobs", end, "ms", longest=f"{max(at_end[number]):.1f} ms", new=f"{fresh:.2f} ms"
        )
        bench.table.judge(f"snapshot, {verb} 100: ratio of medians", end / fresh, 1.5, most=True)


def steps(count: int, *sides: clients.Client) -> list[list[float]]:
    """Milliseconds of create, claim and complete in so many lives of 100 and at least 50, side by side, after ten to warm up."""
    taken = [[milliseconds for client in sides for milliseconds in life(client, "snapshot", 100)] for _ in range(max(50, count) + 10)]
    return [list(column) for column in zip(*taken[10:], strict=True)]


def life(client: clients.Client, profile: str, size: int) -> tuple[float, float, float]:
    """Milliseconds of create, claim and complete of so many jobs."""
    clock = [time.perf_counter()]
    client.create(profile, size)
    clock.append(time.perf_counter())
    claim_id, ids = client.claim(profile, size)
    clock.append(time.perf_counter())
    client.complete(claim_id, ids)
    clock.append(time.perf_counter())
    if len(ids) < size:
        raise RuntimeError(f"a claim of {size} got {len(ids)}")
    return (clock[1] - clock[0]) * 1000, (clock[2] - clock[1]) * 1000, (clock[3] - clock[2]) * 1000


def paced(lives: int, seconds: float, client: clients.Client, _until: float) -> int:
    """So many lives of 100, spread over so many seconds at least; how many jobs."""
    begun = time.monotonic()
    for number in range(lives):
        time.sleep(max(0.0, begun + number * seconds / lives - time.monotonic()))
        life(client, "snapshot", 100)
    return lives * 100


def scheduled(bench: Bench) -> None:
    """Claims beside 100,000 jobs for tomorrow and 100,000 of a profile that nobody claims, against claims without them."""
    with schemas(bench, "scheduled_small", "scheduled") as (small, large):
        for session in (small, large):
            lanes(session, 1, 2)
            fill(session, READY, 2000, of_lanes="model_profile = 'profile0'")
        fill(large, TOMORROW, bench.size(100_000))
        fill(large, READY, bench.size(100_000), of_lanes="model_profile = 'profile1'")
        for session in (small, large):
            analyze(session)
        with side(bench, "scheduled_small") as few, side(bench, "scheduled") as many:
            middle, _ = claims(bench, "scheduled and unclaimed", few, many, {"model_profiles": ["profile0"]}, calls(bench, 1000))
            bench.table.judge("scheduled and unclaimed: ratio of medians", middle, 1.1, most=True)


def fairness(bench: Bench) -> None:
    """One owner has 100,000 pending, another adds ten at the same priority: of the next 20 claims of one every second is the other's."""
    many = bench.size(100_000)
    with schemas(bench, "fairness"), bench.serving("fairness") as server:
        client = clients.Client(server.port)
        for first in range(0, many, 1000):
            client.create("fairness", min(1000, many - first), owner_service="many")
        one = json.dumps({"worker_id": "bench", "model_profiles": ["fairness"]})
        for _ in range(5):
            client.post("/api/v1/jobs/claim", one)
        client.create("fairness", 10, owner_service="few")
        answers = [client.post("/api/v1/jobs/claim", one) for _ in range(20)]
    for_few = sum(b'"owner_service":"few"' in answer for answer in answers)
    bench.table.judge(f"fairness: of 20 claims beside {many:,} of one owner", for_few, 10, unit="jobs")


def retention(bench: Bench) -> None:
    """A million finished jobs leave by retention while others are worked on: what calls feel of it, and what is left behind.

    The jobs lie in a partition of their own, two hours old. A first service serves and keeps everything; beside it a second one is started
    for either measurement, which keeps everything too or, the other time, nothing older than an hour. What is left is looked at
    after a vacuum of the keys, for which autovacuum would take its minute.
    """
    with schemas(bench, "retention") as (session,):
        lanes(session, 20, 10)
        sizes = {"empty": megabytes_beside_the_living(session)}
        old = old_partition(session)
        fill(session, ENDED, bench.size(1_000_000), at="(now() - interval '150 minutes')")
        sizes["filled"] = megabytes_beside_the_living(session)
        with bench.serving("retention", RETENTION="forever") as server:
            with living(server.port) as before, bench.serving("retention", RETENTION="forever"):
                time.sleep(bench.seconds * 2)
            with living(server.port) as during, bench.serving("retention", RETENTION="1h"):
                taken = wait_until_gone(session, f"job_{old}$")
                # As long as before at least, so that the start of a process weighs the same.
                time.sleep(max(0.0, bench.seconds * 2 - taken))
        session.run("vacuum idempotency")
        sizes["left behind"] = megabytes_beside_the_living(session)
    bench.table.add(f"retention: {bench.size(1_000_000):,} jobs gone", taken, "s")
    compare_felt(bench, before, during)
    for name, size in sizes.items():
        bench.table.add(f"retention, beside the living: {name}", size, "MB")
    # A twentieth of what the jobs took: the index of their keys keeps its pages for the keys to come, some 95 bytes a job. And the tables
    # of a schema at work take some megabytes whatever the number of jobs.
    most = max(16.0, (sizes["filled"] - sizes["empty"]) / 20)
    bench.table.judge("retention: left behind", sizes["left behind"] - sizes["empty"], most, unit="MB", most=True)


def compare_felt(bench: Bench, before: Mapping[str, Sequence[float]], during: Mapping[str, Sequence[float]]) -> None:
    """What calls took before jobs left and meanwhile. The longest call bounds what anybody can have waited for a lock."""
    for name, felt in (("before", before), ("meanwhile", during)):
        for verb, taken in felt.items():
            bench.table.add(f"retention, {verb} 10: p99 {name}", tail(taken), "ms", longest=f"{taken[-1]:.0f} ms", calls=len(taken))
    bench.table.judge("retention, claim 10: ratio of p99s", tail(during["claim"]) / tail(before["claim"]), 2, most=True)
    bench.table.judge("retention: longest call meanwhile", max(taken[-1] for taken in during.values()), 250, unit="ms", most=True)


def wait_until_gone(session: Any, pattern: str) -> float:
    """The seconds until no table of the schema has such a name. A service clears 5,000 jobs every two seconds."""
    begun = time.monotonic()
    while session.run("select from pg_tables where schemaname = current_schema() and tablename ~ :pattern", pattern=pattern):
        time.sleep(0.2)
        if time.monotonic() - begun > 1800:
            raise RuntimeError(f"tables like {pattern} are still there")
    return time.monotonic() - begun


def old_partition(session: Any) -> int:
    """Makes a partition that ended two hours ago, as the service would have; the border its tables are named after."""
    [[border]] = session.run("select extract(epoch from date_trunc('second', now() - interval '2 hours'))::bigint")
    for parent in ("job", "ended", "attempt_ended"):
        session.run(f"""do $$ begin execute format('create table {parent}_{border} partition of {parent} for values from (%L) to (%L)',
            uuid_v7_floor(to_timestamp({border - 3600})), uuid_v7_floor(to_timestamp({border}))); end $$""")
    return int(border)


def megabytes_beside_the_living(session: Any) -> float:
    """What the schema takes on disk, without the partitions of the present, in which jobs go on gathering."""
    [[size]] = session.run("""
        select sum(pg_total_relation_size(c.oid)) from pg_class c where c.relnamespace = current_schema()::regnamespace and c.relkind = 'r'
        and coalesce(substring(c.relname from '_(\\d+)$')::bigint, 0) < extract(epoch from now())""")
    return float(size) / (1 << 20)


@contextmanager
def living(port: int) -> Iterator[dict[str, list[float]]]:
    """Two processes do 20 lives of ten jobs a second each; what their calls took in milliseconds, sorted, is there at the end."""
    context = multiprocessing.get_context("fork")
    stop, results = context.Event(), context.Queue()
    processes = [context.Process(target=_live, args=(port, f"living-{number}", stop, results)) for number in range(2)]
    for process in processes:
        process.start()
    felt: dict[str, list[float]] = {"create": [], "claim": [], "complete": []}
    try:
        yield felt
    finally:
        stop.set()
        told = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
    for answer in told:
        if isinstance(answer, str):
            raise SystemExit(f"a client failed: {answer}")
        for verb, taken in zip(felt, zip(*answer, strict=True), strict=True):
            felt[verb] = sorted([*felt[verb], *taken])


def _live(port: int, profile: str, stop: Any, results: Any) -> None:
    try:
        client, begun = clients.Client(port), time.monotonic()
        taken: list[tuple[float, float, float]] = []
        while not stop.wait(max(0.0, begun + len(taken) / 20 - time.monotonic())):
            taken.append(life(client, profile, 10))
        results.put(taken)
    except Exception as error:  # noqa: BLE001 -- told to the parent, which stops
        results.put(f"{type(error).__name__}: {error}")


CASES: dict[str, Callable[[Bench], None]] = {
    "backlog": backlog,
    "snapshot": snapshot,
    "scheduled": scheduled,
    "fairness": fairness,
    "retention": retention,
}
