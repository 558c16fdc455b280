"""What the hot statements read, with a planner that knows nothing or the wrong thing: no table scanned, few rows touched.

PostgreSQL counts a transaction's own scans in pg_stat_xact_user_tables: the plan shows in what was read, on every version alike.
"""

import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from pg8000.native import Connection
from postgres import connect, fresh_schema

from ai_internal.server.database import Database, migrate
from ai_internal.server.database_url import read_database_url

PENDING, LANES = 12_000, 60
BIG = ("ready", "job", "held", "ended", "waiting")
CLAIM = (
    """select n from claim_jobs_v1(:profiles::text[], null, :owners::text[], '{}', '{}', array[:claim_id::uuid], '{w}', '{900}', '{10}')"""
)

FILL = f"""
insert into lane (owner_service, task_type, model_profile, priority)
  select 'owner' || i / 6, 'type', 'profile' || i % 6, i % 3 from generate_series(0, {LANES} - 1) i;
create temporary table fresh as
  select uuid_v7(now() + i * interval '1 microsecond') as id, i % {LANES} + 1 as lane_id, i from generate_series(1, {4 * PENDING}) i;
insert into job (id, lane_id, owner_ref, created_at, run_at, max_attempts, input_bytes, input)
  select id, lane_id, 'ref/' || i, now(), now(), 3, 1, '1' from fresh;
insert into ready (lane_id, job_id, run_at, attempt, releases, input_bytes)
  select lane_id, id, now(), 0, 0, 1 from fresh where i <= {PENDING};
insert into ended (job_id, status, attempt, finished_at, result) select id, 'completed', 1, now(), '1' from fresh where i > 2 * {PENDING};
insert into held (job_id, lane_id, claim_id, worker_id, attempt, releases, run_at, started_at, lease_seconds, lease_expires_at)
  select id, lane_id, id, 'w', 1, 0, now(), now(), 900, now() + interval '1 hour'
  from fresh where i between {PENDING} + 1 and {PENDING} + 10000;
insert into waiting (job_id, lane_id, run_at, attempt, releases, input_bytes)
  select id, lane_id, now() + interval '1 day', 0, 0, 1 from fresh where i between {PENDING} + 10001 and 2 * {PENDING};
drop table fresh
"""


@pytest.fixture(scope="module", params=["never analysed", "analysed while empty"])
def session(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[Connection]:
    """A connection to a schema full of jobs, its statistics useless."""
    with fresh_schema(postgres_url) as schema:
        pool = Database(read_database_url(postgres_url), schema, 2)
        migrate(pool)
        pool.close()
        connection = connect(postgres_url, schema)
        connection.run("; ".join(f"alter table {name} set (autovacuum_enabled = off)" for name in ("ready", "held", "waiting", "lane")))
        if request.param == "analysed while empty":
            connection.run("analyze lane, job, ready, held, waiting, ended")
        connection.run(FILL)
        yield connection
        connection.close()


def read_by(session: Connection, statement: str, **parameters: Any) -> dict[str, tuple[int, int]]:
    """Per table: rows read by scanning it, rows fetched through an index. The transaction is rolled back."""
    session.run("begin")
    try:
        before = counted(session)
        session.run(statement, **parameters)
        return {name: (scanned - before[name][0], fetched - before[name][1]) for name, (scanned, fetched) in counted(session).items()}
    finally:
        session.run("rollback")


def counted(session: Connection) -> dict[str, tuple[int, int]]:
    """What was read and not yet added to the server's statistics: of this transaction, and of those just before it."""
    rows = session.run(
        "select split_part(relname, '_default', 1), sum(seq_tup_read)::int, sum(coalesce(idx_tup_fetch, 0))::int "
        "from pg_stat_xact_user_tables where schemaname = current_schema() group by 1"
    )
    return {name: (scanned, fetched) for name, scanned, fetched in rows}


def running(session: Connection, count: int) -> list[str]:
    return [row[0] for row in session.run("select job_id::text from held limit :count", count=count)]


@pytest.mark.parametrize("profiles", [None, "{profile3}"])
@pytest.mark.parametrize("owners", [None, "{owner3}"])
def test_a_claim_of_ten_touches_a_few_rows_of_each_lane_and_scans_no_table(
    session: Connection, profiles: str | None, owners: str | None
) -> None:
    for _ in range(8):  # beyond the custom plans that PostgreSQL tries first
        read = read_by(session, CLAIM, profiles=profiles, owners=owners, claim_id=str(uuid.uuid4()))
        assert [read[name][0] for name in BIG] == [0] * len(BIG)
        assert read["ready"][1] <= 10 * LANES + 20
        assert read["job"][1] == 0, "its facts are read afterwards"


@pytest.mark.parametrize(
    "statement",
    [
        "select outcome from complete_jobs_v1(:ids::uuid[], :ids::uuid[], :values::text[], :none::text[], null, null, null, null)",
        (
            "select outcome from fail_jobs_v1(:ids::uuid[], :ids::uuid[], :values::text[], :values::text[], null, null, :none::text[], "
            "null, null, null, null)"
        ),
        "select outcome from release_jobs_v1(:ids::uuid[], :ids::uuid[], null)",
        "select outcome from heartbeat_jobs_v1(:ids::uuid[], :ids::uuid[], null, :none::text[])",
        "select jobs from claimed_texts_v1(:ids::uuid[], :ids::uuid[])",
        "select facts from job_texts_v1(:ids::uuid[], true, true)",
        "select seq from peek_v1(:ids::uuid[])",
        "select outcome from retry_jobs_v1(:ids::uuid[], '{running}')",
    ],
)
@pytest.mark.parametrize("count", [1, 100])
def test_a_call_for_some_jobs_reads_just_those(session: Connection, statement: str, count: int) -> None:
    ids = running(session, count)
    given = {"ids": ids, "values": ["1"] * count, "none": [None] * count}
    for _ in range(8):
        read = read_by(session, statement, **{name: value for name, value in given.items() if f":{name}:" in statement})
        assert [read.get(name, (0, 0))[0] for name in BIG] == [0] * len(BIG)
        assert all(read.get(name, (0, 0))[1] <= 3 * count + 1 for name in BIG)


def test_a_create_reads_no_job(session: Connection) -> None:
    read = read_by(
        session,
        "select id from create_jobs_v2('{owner1}', '{type}', '{profile1}', '{1}', '{1,1}', '{a,b}', '{1,2}', '{1,1}', '{3,3}', "
        "'{NULL,NULL}', '{NULL,NULL}', '{x,y}', '{NULL,NULL}', '{NULL,NULL}')",
    )
    assert [read.get(name, (0, 0)) for name in BIG] == [(0, 0)] * len(BIG)


def test_stats_cost_nothing_per_job(session: Connection) -> None:
    read = read_by(session, "select stats_v1(86400, null)")
    assert read.get("job", (0, 0)) == read.get("ended", (0, 0)) == read.get("held", (0, 0)) == (0, 0)
    assert read.get("ready", (0, 0))[0] == 0


def test_dead_rows_under_a_held_snapshot_are_not_stepped_over(postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        pool = Database(read_database_url(postgres_url), schema, 2)
        migrate(pool)
        pool.close()
        stranger, session = connect(postgres_url, schema), connect(postgres_url, schema)
        session.run("alter table held set (autovacuum_enabled = off)")
        stranger.run("begin isolation level repeatable read; select count(*) from lane")
        hold = """insert into held
              (job_id, lane_id, claim_id, worker_id, attempt, releases, run_at, started_at, lease_seconds, lease_expires_at)
            select gen_random_uuid(), 1, gen_random_uuid(), 'w', 1, 0, now(), now(), 900, now() from generate_series(1, :count::int)
            returning job_id::text, claim_id::text"""
        session.run(hold, count=5000)
        session.run("delete from held")
        session.run("analyze held")
        held = session.run(hold, count=10)
        jobs, claims = ([row[column] for row in held] for column in (0, 1))
        for call in (
            "heartbeat_jobs_v1(:jobs::uuid[], :claims::uuid[], array_fill(900::float8, array[10]), array_fill(null::text, array[10]))",
            "claimed_texts_v1(:claims::uuid[], :jobs::uuid[])",
            "release_jobs_v1(:jobs::uuid[], :claims::uuid[], array_fill(0::float8, array[10]))",
        ):
            plan = session.run(f"explain (analyze, buffers, format json) select * from {call}", jobs=jobs, claims=claims)[0][0][0]["Plan"]
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 3000, call
        session.close()
        stranger.close()


def test_a_list_by_a_rare_label_reads_the_jobs_that_have_it(postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        pool = Database(read_database_url(postgres_url), schema, 2)
        migrate(pool)
        pool.close()
        with closing(connect(postgres_url, schema)) as session:
            session.run(FILL)
            session.run("update job set labels = json_build_object('env', 'prod', 'call', right(owner_ref, 4)) where lane_id % 2 = 0")
            # Autovacuum does both within a minute of so many changes.
            session.run("vacuum analyze job")
            labels = """'{"call": "1235", "env": "prod"}'"""
            read = read_by(session, f"select id from job j where j.labels @> {labels} order by j.id desc limit 51")
    assert read["job"][0] == 0
    assert 0 < read["job"][1] <= 20
