"""schema.sql by itself: applied by many at once, rejected where it was never released, partitioned,
retired; and the ledger behind stats.
"""

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest
from postgres import connect, fresh_schema
from service import Service, running_service, wait_until

import ai_service
from ai_internal.server.database import (
    FIRST_SCHEMA_VERSION,
    SCHEMA_VERSION,
    Database,
    migrate,
    require_schema,
    schema_version,
)
from ai_internal.server.database_url import read_database_url
from ai_internal.server.requests import (
    ClaimRequest,
    Completion,
    DatabaseBusy,
    Heartbeat,
    JobFilter,
    NewJob,
    SchemaMissing,
    SchemaOutdated,
)
from ai_service import Claimed, Queue


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    """A pool on an empty schema of the test's own."""
    with fresh_schema(postgres_url) as schema:
        database = Database(read_database_url(postgres_url), schema, 4)
        yield database
        database.close()


@pytest.fixture
def queue(database: Database) -> Queue:
    migrate(database)
    return Queue(database)


def new_job(number: int = 0, **fields: object) -> NewJob:
    return NewJob("owner", "type", "profile", f"ref/{number}", "1", **fields)  # type: ignore[arg-type]


def rows(database: Database, statement: str) -> list[list[object]]:
    return database.run(statement)


def life(queue: Queue, jobs: list[NewJob]) -> list[str]:
    """Creates, claims and completes jobs; their ids."""
    ids = [made.id for made in queue.create_batch(jobs)]
    [claimed] = queue.claim([ClaimRequest("worker", limit=len(ids), claim_id=str(uuid.uuid4()))])
    assert isinstance(claimed, Claimed)
    assert queue.complete_many(ids, [Completion(claimed.claim_id, "2")] * len(ids)) == ["ok"] * len(ids)
    return ids


def ai_service_command(postgres_url: str, schema: str, name: str) -> subprocess.Popen[str]:
    """A started `ai-service` command on this schema."""
    service = Service(postgres_url, schema)
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*service.command[:-1], name], env=service.environment, text=True, **piped)


def test_four_processes_at_once_apply_the_schema_once(database: Database, postgres_url: str) -> None:
    processes = [ai_service_command(postgres_url, database.schema, "migrate") for _ in range(4)]
    ended = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [status for _, status in ended] == [0] * 4
    assert sum("schema_applied" in stderr for (_, stderr), _ in ended) == 1
    assert rows(database, "select version from schema_version") == [[SCHEMA_VERSION]]


def test_applying_the_schema_twice_changes_nothing(database: Database) -> None:
    described = (
        "select p.oid::regprocedure::text, md5(pg_get_functiondef(p.oid)) from pg_proc p "
        "where pronamespace = current_schema()::regnamespace union all "
        "select c.relname, c.relkind::text from pg_class c "
        "where relnamespace = current_schema()::regnamespace order by 1"
    )
    migrate(database)
    once = rows(database, described)
    migrate(database)
    database.run("delete from schema_version")
    migrate(database)
    assert rows(database, described) == once


def test_every_function_that_a_statement_calls_controls_its_plans(queue: Queue) -> None:
    uncontrolled = (
        "select proname from pg_proc where pronamespace = current_schema()::regnamespace "
        "and proname ~ '_v[0-9]+$' and proname <> 'uuid_v7' and proconfig is null order by 1"
    )
    # These work on whole partitions.
    partitions = ["add_partitions_v1", "clear_retired_v1", "retire_partition_v1"]
    assert [name for [name] in rows(queue.database, uncontrolled)] == partitions


def set_version(postgres_url: str, schema: str, version: int) -> None:
    """Adds a version to `schema_version`, and makes that table where it is missing."""
    table = f"{schema}.schema_version"
    with closing(connect(postgres_url)) as connection:
        connection.run(f"create schema if not exists {schema}")
        connection.run(f"create table if not exists {table} (version int primary key)")
        connection.run(f"insert into {table} (version) values ({version})")


@pytest.mark.parametrize("use", [migrate, require_schema, schema_version])
@pytest.mark.parametrize("version", range(1, FIRST_SCHEMA_VERSION))
def test_an_unreleased_version_is_rejected_and_not_changed(
    database: Database, postgres_url: str, version: int, use: Callable[[Database], object]
) -> None:
    set_version(postgres_url, database.schema, version)
    message = f'"{database.schema}" has version {version}, .*: drop the schema, or set DATABASE_'
    with pytest.raises(SchemaOutdated, match=message):
        use(database)
    tables = "select tablename from pg_tables where schemaname = current_schema()"
    assert rows(database, tables) == [["schema_version"]]


def test_an_unreleased_version_is_rejected_if_it_appears_while_migrate_waits(database: Database, postgres_url: str) -> None:
    key = f"hashtextextended('ai_service schema {database.schema}', 0)"
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    with closing(connect(postgres_url)) as other, ThreadPoolExecutor(1) as threads:
        other.run("begin")
        other.run(f"select pg_advisory_xact_lock({key})")
        migrating = threads.submit(migrate, database)
        wait_until(lambda: other.run(waiting) != [[0]])
        set_version(postgres_url, database.schema, FIRST_SCHEMA_VERSION - 1)
        other.run("commit")
        with pytest.raises(SchemaOutdated):
            migrating.result(10)


@pytest.mark.parametrize("migrate_on_start", ["true", "false"])
def test_a_service_on_an_unreleased_version_says_so_until_the_schema_is_dropped(
    database: Database, postgres_url: str, migrate_on_start: str
) -> None:
    set_version(postgres_url, database.schema, FIRST_SCHEMA_VERSION - 1)
    settings = {"MIGRATE_ON_START": migrate_on_start}
    with running_service(postgres_url, database.schema, **settings) as service:
        answer = service.api.get("/readyz")
        assert (answer.status, answer.code) == (503, "schema_outdated")
        assert "drop the schema" in answer.json["detail"]
        [line] = [line for line in service.lines if "upkeep_waits" in line]
        assert "ERROR" in line
        assert "step=migrate code=schema_outdated" in line
        assert answer.json["detail"] in line
        assert "upkeep_failed" not in service.log
        database.run(f"drop schema {database.schema} cascade")
        if migrate_on_start == "false":
            migrate(database)
        wait_until(lambda: "upkeep_goes_on step=migrate" in service.log)
        assert service.api.get("/readyz").status == 200


def test_commands_on_an_unreleased_version_fail_with_what_to_do(postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        set_version(postgres_url, schema, FIRST_SCHEMA_VERSION - 1)
        sentence = f'schema "{schema}" has version {FIRST_SCHEMA_VERSION - 1}, which was never'
        migrating = ai_service_command(postgres_url, schema, "migrate")
        checking = ai_service_command(postgres_url, schema, "check")
        stdout, stderr = migrating.communicate(timeout=60)
        assert (migrating.returncode, stdout) == (1, "")
        assert sentence in stderr
        stdout, _ = checking.communicate(timeout=60)
        assert checking.returncode == 1
        assert f"database: not ready, schema_outdated: {sentence}" in stdout


def test_a_schema_newer_than_this_release_is_served_and_not_changed(queue: Queue, postgres_url: str) -> None:
    set_version(postgres_url, queue.database.schema, SCHEMA_VERSION + 1)
    migrate(queue.database)
    require_schema(queue.database)
    assert schema_version(queue.database) == SCHEMA_VERSION + 1
    assert queue.create_batch([new_job()])[0].created


def test_applying_the_schema_again_keeps_the_jobs_and_lets_claims_go_on(queue: Queue) -> None:
    [made] = queue.create_batch([new_job()])
    queue.database.run("delete from schema_version")
    migrate(queue.database)
    [claimed] = queue.claim([ClaimRequest("worker", claim_id=str(uuid.uuid4()))])
    assert isinstance(claimed, Claimed)
    assert made.id in claimed.jobs


def test_an_empty_schema_has_version_0_and_says_so(database: Database) -> None:
    assert schema_version(database) == 0
    with pytest.raises(SchemaMissing):
        Queue(database).create_batch([new_job()])


def test_a_service_that_may_not_migrate_waits_for_the_schema(postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema, MIGRATE_ON_START="false") as service:
        answer = service.api.get("/readyz")
        assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "schema_missing", "5")
        pool = Database(read_database_url(postgres_url), schema, 2)
        migrate(pool)
        assert service.api.get("/readyz").status == 200
        pool.run("delete from schema_version")
        assert service.api.get("/readyz").code == "schema_missing"
        pool.close()


def test_ids_are_version_7_in_the_order_of_creation(queue: Queue) -> None:
    ids = [made.id for made in queue.create_batch([new_job(n) for n in range(500)])]
    ids += [made.id for made in queue.create_batch([new_job(n) for n in range(5)])]
    assert ids == sorted(ids)
    assert {each[14] for each in ids} == {"7"}
    assert {each[19] for each in ids} <= set("89ab")
    [[apart]] = rows(
        queue.database,
        "select max(abs(extract(epoch from created_at) * 1000 - "
        "('x' || substr(replace(id::text, '-', ''), 1, 12))::bit(48)::bigint))::float8 from job",
    )
    assert apart <= 1


def test_a_job_stands_in_one_partition_made_for_its_time(queue: Queue) -> None:
    queue.prepare_partitions(timedelta(days=30))
    life(queue, [new_job()])
    [[name]] = rows(queue.database, "select tableoid::regclass::text from job")
    [[ended_name]] = rows(queue.database, "select tableoid::regclass::text from ended")
    assert str(name).startswith("job_1")
    assert ended_name == str(name).replace("job_", "ended_")


def test_preparing_partitions_again_and_again_adds_none(queue: Queue) -> None:
    for _ in range(3):
        queue.prepare_partitions(timedelta(days=30))
    assert rows(queue.database, "select count(*) from pg_inherits where inhparent = 'job'::regclass") == [[2]]


def short_partition(queue: Queue) -> None:
    """A partition that ends in two seconds, so that it can be retired within a test."""
    queue.database.run("select add_partition(array['job', 'ended', 'attempt_ended'], interval '2 seconds')")


def retired(queue: Queue) -> str | None:
    return queue.retire(timedelta(milliseconds=1))[0]


def test_retention_drops_a_whole_partition_and_frees_its_keys(queue: Queue) -> None:
    short_partition(queue)
    ids = life(queue, [new_job(n, idempotency_key=f"key-{n}") for n in range(20)])
    wait_until(lambda: retired(queue), 20)
    assert queue.get_many(ids) == [None] * 20
    assert queue.create_batch([new_job(0, idempotency_key="key-0")])[0].created, "the key of a job that has left is free"
    while queue.clear_retired(timedelta(milliseconds=1)):
        pass
    assert rows(queue.database, "select key from idempotency") == [["key-0"]]
    assert rows(
        queue.database, f"select count(*) from pg_tables where schemaname = '{queue.database.schema}' and tablename like 'retired%'"
    ) == [[0]]


def test_retention_keeps_what_still_lives(queue: Queue) -> None:
    short_partition(queue)
    pending, running, scheduled, finished = (
        made.id for made in queue.create_batch([new_job(n, idempotency_key=f"key-{n}") for n in range(4)])
    )
    queue.database.run(
        "insert into waiting (job_id, lane_id, run_at, attempt, releases, input_bytes) "
        "select job_id, lane_id, now() + interval '1 day', 0, 0, 1 from ready where job_id = :id::uuid",
        id=scheduled,
    )
    queue.database.run("delete from ready where job_id = :id::uuid", id=scheduled)
    queue.database.run(
        "insert into held (job_id, lane_id, claim_id, worker_id, attempt, releases, run_at, started_at, lease_seconds, lease_expires_at) "
        "select job_id, lane_id, job_id, 'w', 1, 0, now(), now(), 900, now() + interval '1 hour' from ready where job_id = :id::uuid",
        id=running,
    )
    queue.database.run("delete from ready where job_id = :id::uuid", id=running)
    queue.cancel(finished, "")
    wait_until(lambda: retired(queue), 20)
    kept = queue.get_many([pending, running, scheduled, finished])
    assert [job is not None for job in kept] == [True, True, True, False]
    while queue.clear_retired(timedelta(milliseconds=1)):
        pass
    assert [made.created for made in queue.create_batch([new_job(n, idempotency_key=f"key-{n}") for n in range(4)])] == [
        False,
        False,
        False,
        True,
    ]


def test_what_was_kept_leaves_once_it_has_finished_and_aged(queue: Queue) -> None:
    [made] = queue.create_batch([new_job(idempotency_key="key")])
    queue.cancel(made.id, "")
    queue.database.run("update ended set finished_at = now() - interval '2 days'")
    queue.clear_retired(timedelta(days=1))
    assert queue.get_many([made.id]) == [None]
    assert rows(queue.database, "select count(*) from idempotency") == [[0]]


def test_a_partition_with_much_that_lives_is_left_for_later(queue: Queue) -> None:
    short_partition(queue)
    queue.create_batch([new_job(n) for n in range(5001)])
    wait_until(lambda: rows(queue.database, "select bool_and(border < now()) from partition_borders('job')") == [[True]], 10)
    assert retired(queue) is None


def test_the_time_the_service_was_away_lies_in_the_default_partition(queue: Queue) -> None:
    short_partition(queue)
    wait_until(lambda: rows(queue.database, "select bool_and(border < now()) from partition_borders('job')") == [[True]], 10)
    [stray] = life(queue, [new_job()])
    short_partition(queue)
    assert rows(queue.database, "select tableoid::regclass::text from job") == [["job_default"]]
    assert rows(queue.database, "select count(*) from partition_borders('job')") == [[2]]
    assert queue.get(stray).is_finished


def test_the_ledger_is_empty_after_a_fold_and_counts_what_is_there(queue: Queue) -> None:
    life(queue, [new_job(n) for n in range(7)])
    queue.create_batch([new_job(n) for n in range(3)])
    queue.fold()
    assert rows(queue.database, "select count(*) from tally") == [[0]]
    assert rows(queue.database, "select ready, scheduled, running from lane_count") == [[3, 0, 0]]
    assert rows(queue.database, "select span_seconds, event, sum(n)::int from history group by 1, 2 order by 1, 2") == [
        [300, "completed", 7],
        [900, "claimed", 7],
        [900, "completed", 7],
        [3600, "completed", 7],
        [21600, "completed", 7],
    ]


def test_a_ledger_row_that_becomes_visible_late_is_counted(queue: Queue) -> None:
    queue.create_batch([new_job()])
    queue.fold()
    queue.database.run("insert into tally (at, lane_id, event, n, ready) values (now() - interval '40 seconds', 1, 'created', 1, 1)")
    queue.fold()
    assert rows(queue.database, "select ready from lane_count") == [[2]]


def test_lanes_without_a_job_fall_idle_and_wake_with_the_next(queue: Queue) -> None:
    life(queue, [new_job()])
    queue.fold()
    queue.database.run("update lane_count set moved_at = now() - interval '1 hour'")
    queue.upkeep({})
    assert rows(queue.database, "select idle from lane") == [[True]]
    life(queue, [new_job()])
    assert rows(queue.database, "select idle from lane") == [[False]]


def test_a_retry_wakes_an_idle_lane(queue: Queue) -> None:
    [made] = queue.create_batch([new_job()])
    queue.cancel(made.id, "")
    queue.fold()
    queue.database.run("update lane_count set moved_at = now() - interval '1 hour'")
    queue.upkeep({})
    queue.retry(made.id, ["cancelled"])
    [claimed] = queue.claim([ClaimRequest("worker", claim_id=str(uuid.uuid4()))])
    assert isinstance(claimed, Claimed)
    assert made.id in claimed.jobs


def test_2000_combinations_are_enough_and_idle_ones_do_not_count(queue: Queue) -> None:
    queue.database.run(
        "insert into lane (owner_service, task_type, model_profile, priority, idle) "
        "select 'owner' || i, 't', 'm', 0, i > 1999 from generate_series(1, 5000) i"
    )
    assert queue.create_batch([new_job()])[0].created
    with pytest.raises(Exception, match="2,000 combinations"):
        queue.create_batch([NewJob("one-more", "type", "profile", "ref", "1")])
    assert queue.create_batch([new_job()])[0].created


def test_rescue_is_bounded_per_call(queue: Queue) -> None:
    queue.create_batch([new_job(n) for n in range(1500)])
    for _ in range(2):
        queue.claim([ClaimRequest("worker", limit=1000, claim_id=str(uuid.uuid4()))])
    queue.database.run("update held set lease_expires_at = now() - interval '1 second'")
    assert [queue.upkeep({})[0] for _ in range(3)] == [1000, 500, 0]


def test_a_reader_that_holds_the_tables_stops_neither_upkeep_nor_creates(queue: Queue, postgres_url: str) -> None:
    life(queue, [new_job()])
    with closing(connect(postgres_url, queue.database.schema)) as reader:
        reader.run("begin")
        reader.run("select count(*) from job, ended, attempt_ended, claim")
        start = time.monotonic()
        with pytest.raises(DatabaseBusy):
            queue.prepare_partitions(timedelta(days=30))
        assert time.monotonic() - start < 2
        assert queue.create_batch([new_job()])[0].created
    queue.prepare_partitions(timedelta(days=30))


def test_what_comes_back_to_life_while_a_partition_is_retired_is_kept(queue: Queue, postgres_url: str) -> None:
    """A retry that was answered before the partition left, and one that had to wait for it."""
    short_partition(queue)
    ids = [made.id for made in queue.create_batch([new_job(n) for n in range(3)])]
    for each in ids:
        queue.cancel(each, "")
    wait_until(lambda: rows(queue.database, "select bool_and(border < now()) from partition_borders('job')") == [[True]], 10)
    queue.retry(ids[0], ["cancelled"])
    with closing(connect(postgres_url, queue.database.schema)) as other, ThreadPoolExecutor(1) as threads:
        other.run("begin")
        other.run("select retired from retire_partition_v1(interval '1 millisecond')")
        retried = threads.submit(queue.retry_many, [ids[1]], ["cancelled"])
        wait_until(lambda: other.run("select count(*) from pg_locks where not granted") != [[0]])
        other.run("commit")
        assert retried.result(10) == ["job_not_found"], "it waited, and the job had left by then"
    assert [job is not None for job in queue.get_many(ids)] == [True, False, False]
    [claimed] = queue.claim([ClaimRequest("worker", limit=5, claim_id=str(uuid.uuid4()))])
    assert isinstance(claimed, Claimed)
    assert claimed.jobs.count('"id"') == 1
    assert rows(queue.database, "select count(*) from held") == [[1]]


def test_one_full_partition_does_not_keep_the_next_from_leaving(queue: Queue) -> None:
    short_partition(queue)
    queue.create_batch([new_job(n) for n in range(5001)])
    wait_until(lambda: rows(queue.database, "select bool_and(border < now()) from partition_borders('job')") == [[True]], 10)
    short_partition(queue)
    wait_until(lambda: rows(queue.database, "select bool_and(border < now()) from partition_borders('job')") == [[True]], 10)
    retired_one, left_alone = queue.retire(timedelta(milliseconds=1))
    assert retired_one
    assert len(left_alone) == 1
    assert retired_one != left_alone[0]


def test_claim_partitions_leave_even_where_jobs_stay_for_ever(queue: Queue) -> None:
    queue.database.run("select add_partition(array['claim'], interval '1 day')")
    [[name]] = rows(queue.database, "select name from partition_borders('claim')")
    queue.database.run(f"alter table {name} rename to claim_1000000000")
    assert queue.retire(None) == ("claim_1000000000", [])


def test_a_key_that_is_freed_while_it_is_looked_up_stands_for_the_new_job(queue: Queue, postgres_url: str) -> None:
    [old] = queue.create_batch([new_job(idempotency_key="key")])
    queue.cancel(old.id, "")
    with closing(connect(postgres_url, queue.database.schema)) as other, ThreadPoolExecutor(1) as threads:
        other.run("begin")
        other.run("select delete_job_v1(:id::uuid)", id=old.id)
        creating = threads.submit(queue.create_batch, [new_job(idempotency_key="key")])
        wait_until(lambda: other.run("select count(*) from pg_locks where not granted") != [[0]])
        other.run("commit")
        [made] = creating.result(10)
    assert made.created
    assert queue.create_batch([new_job(idempotency_key="key")])[0].id == made.id


def test_many_creates_with_the_key_of_a_job_that_has_left_make_one(queue: Queue) -> None:
    for number in range(20):
        queue.database.run(
            "insert into idempotency (owner_service, key, job_id) values ('owner', :key, gen_random_uuid())", key=f"key-{number}"
        )
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(lambda _, n=number: queue.create_batch([new_job(idempotency_key=f"key-{n}")])[0], range(4)))
        assert len({each.id for each in made}) == 1
        assert [each.created for each in made].count(True) == 1


def test_absurd_usage_does_not_stop_the_counting(queue: Queue) -> None:
    queue.create_batch([new_job()])
    queue.database.run(
        "insert into tally (lane_id, event, n, prompt_tokens, audio_seconds) "
        "select 1, 'completed', 1, 1e15, 1e12 from generate_series(1, 20000)"
    )
    while queue.fold():
        pass
    [[stats]] = queue.database.run("select stats_v1(3600, null)")
    assert '"prompt_tokens" : 20000000000000000000' in stats


def test_the_ledger_is_folded_in_portions(queue: Queue) -> None:
    queue.create_batch([new_job()])
    queue.database.run("insert into tally (lane_id, event, n, ready) select 1, 'queued', 1, 1 from generate_series(1, 45000)")
    assert [queue.fold() for _ in range(4)] == [True, True, False, False]
    assert rows(queue.database, "select ready from lane_count") == [[45001]]


def test_applying_the_schema_again_waits_for_no_writer(queue: Queue, postgres_url: str) -> None:
    with closing(connect(postgres_url, queue.database.schema)) as writer:
        writer.run("begin")
        writer.run("lock table lane, job, ready, waiting, held, ended, attempt_ended, idempotency, claim, tally in row exclusive mode")
        queue.database.run("delete from schema_version")
        migrate(queue.database)
    assert schema_version(queue.database) == SCHEMA_VERSION


def test_a_pause_between_two_looks_at_the_lanes_leaves_the_claim_empty(queue: Queue) -> None:
    queue.create_batch([new_job()])
    with ThreadPoolExecutor(1) as threads:
        pausing = threads.submit(lambda: [(queue.pause(["owner"], None, None), queue.resume(["owner"], None, None)) for _ in range(100)])
        while not pausing.done():
            assert isinstance(queue.claim([ClaimRequest("worker", claim_id=str(uuid.uuid4()))])[0], Claimed)
            queue.create_batch([new_job()])


def test_lists_that_take_long_leave_connections_to_everything_else(
    queue: Queue, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ai_service, "LIST_SECONDS", 0.2)
    waiting = "select count(*) from pg_locks where not granted and relation = 'ended'::regclass"
    with closing(connect(postgres_url, queue.database.schema)) as other, ThreadPoolExecutor(2) as threads:
        other.run("begin")
        other.run("lock table ended in access exclusive mode")
        slow = [threads.submit(queue.list_ids, JobFilter(status=["failed"]), 10) for _ in range(2)]
        wait_until(lambda: other.run(waiting) == [[2]])
        with pytest.raises(DatabaseBusy):
            queue.list_ids(JobFilter(), 10)
        assert queue.pauses() == "[]"
        assert not any(each.done() for each in slow)
        other.run("commit")
        assert [each.result(10) for each in slow] == [[], []]


def test_16_mb_are_bytes_not_characters(queue: Queue) -> None:
    big = '"' + "я" * (3 << 20) + '"'
    queue.create_batch([NewJob("owner", "type", "profile", f"ref/{n}", big) for n in range(4)])  # type: ignore[arg-type]
    [claimed] = queue.claim([ClaimRequest("worker", limit=4, claim_id=str(uuid.uuid4()))])
    assert isinstance(claimed, Claimed)
    assert len(claimed.unread) == queue.read(claimed).jobs.count('"id"') == 2


def lapsed_job(queue: Queue) -> tuple[str, str]:
    """A job whose lease ran out, and the claim that had it."""
    [made] = queue.create_batch([new_job()])
    claim_id = str(uuid.uuid4())
    queue.claim([ClaimRequest("worker", claim_id=claim_id)])
    queue.database.run("update held set lease_expires_at = now() - interval '1 second'")
    assert queue.upkeep({})[0] == 1
    return made.id, claim_id


def test_a_late_completion_counts_after_a_cancel_and_a_retry_and_keeps_its_start(queue: Queue) -> None:
    job_id, claim_id = lapsed_job(queue)
    queue.cancel(job_id, "")
    assert queue.complete_many([job_id], [Completion(claim_id, "1")]) == ["job_cancelled"]
    queue.retry(job_id, ["cancelled"])
    assert queue.complete_many([job_id], [Completion(claim_id, "1")]) == ["ok"]
    facts = queue.get(job_id).facts
    assert '"status":"completed"' in facts
    assert '"started_at":null' not in facts
    assert '"errors":[]' in facts


def test_late_completions_in_opposite_order_do_not_deadlock(queue: Queue) -> None:
    for _ in range(5):
        ids = [made.id for made in queue.create_batch([new_job(n) for n in range(6)])]
        claim_id = str(uuid.uuid4())
        queue.claim([ClaimRequest("worker", limit=6, claim_id=claim_id)])
        queue.database.run("update held set lease_expires_at = now() - interval '1 second'")
        assert queue.upkeep({})[0] == 6
        completions = [Completion(claim_id, "1")] * 6
        with ThreadPoolExecutor(2) as threads:
            both = [
                threads.submit(queue.complete_many, ids, completions),
                threads.submit(queue.complete_many, ids[::-1], completions[::-1]),
            ]
            assert [each.result(20) for each in both] == [["ok"] * 6] * 2


def test_the_same_job_twice_in_one_heartbeat_is_held_twice(queue: Queue) -> None:
    [made] = queue.create_batch([new_job()])
    claim_id = str(uuid.uuid4())
    queue.claim([ClaimRequest("worker", claim_id=claim_id)])
    assert [beat.outcome for beat in queue.heartbeat_many([made.id] * 2, [Heartbeat(claim_id)] * 2)] == ["ok", "ok"]


def test_a_claim_beside_a_cancel_takes_the_next_job(queue: Queue, postgres_url: str) -> None:
    first, second = queue.create_batch([new_job(1), new_job(2)])
    with closing(connect(postgres_url, queue.database.schema)) as other, ThreadPoolExecutor(1) as threads:
        other.run("begin")
        other.run("select cancel_job_v1(:id::uuid, '')", id=first.id)
        claiming = threads.submit(queue.claim, [ClaimRequest("worker", claim_id=str(uuid.uuid4()))])
        wait_until(lambda: other.run("select count(*) from pg_locks where not granted") != [[0]])
        other.run("commit")
        [claimed] = claiming.result(10)
    assert isinstance(claimed, Claimed)
    assert second.id in claimed.jobs
