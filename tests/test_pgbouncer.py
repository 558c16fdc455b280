"""Behind PgBouncer in transaction pooling, where each transaction may get another session of PostgreSQL.

These are a few words in the default suite; `make pgbouncer` runs the contract's tests through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pgbouncer import pgbouncer
from postgres import connect, fresh_schema
from service import Corner, running_service, wait_until

from ai_internal.server.database import SCHEMA_VERSION, SESSION, Database, migrate, schema_version
from ai_internal.server.database_url import read_database_url
from ai_internal.server.requests import DatabaseBusy, MalformedJson
from ai_service import Queue, Settings
from providers.settings import SettingsError


@pytest.fixture(scope="module")
def pooled_url(postgres_url: str) -> Iterator[str]:
    with pgbouncer(postgres_url) as url:
        yield url


@pytest.fixture
def database(postgres_url: str, pooled_url: str) -> Iterator[Database]:
    with fresh_schema(postgres_url) as schema:
        database = Database(read_database_url(pooled_url), schema, 8, "transaction")
        yield database
        database.close()


def test_jobs_live_their_lives_with_more_connections_than_sessions(postgres_url: str, pooled_url: str) -> None:
    with (
        fresh_schema(postgres_url) as schema,
        running_service(pooled_url, schema, DATABASE_POOL_MODE="transaction") as one,
        running_service(pooled_url, schema, DATABASE_POOL_MODE="transaction") as other,
        ThreadPoolExecutor(16) as pool,
    ):
        corner = Corner(one.api)
        corners = [corner, corner.through(other.api)]
        created = list(pool.map(lambda number: corners[number % 2].create(input=number), range(100)))
        assert {job["status"] for job in pool.map(corners[1].look, created)} == {"pending"}
        claimed = [job for jobs in pool.map(lambda number: corners[number % 2].claim(limit=20), range(10)) for job in jobs]
        done = list(pool.map(lambda job: corners[job["input"] % 2].done(job, "complete", result=job["input"]), claimed))
        assert sorted(job["id"] for job in done) == sorted(job["id"] for job in created)
        assert one.api.get("/readyz").status == 200
        assert "ERROR" not in one.log + other.log


def test_every_statement_finds_its_settings_and_leaves_none(database: Database) -> None:
    database.script(f"create schema {database.schema}")
    names = ("search_path", "statement_timeout", "lock_timeout", "jit", "timezone")
    shown = "-- test\nselect " + ", ".join(f"current_setting('{name}')" for name in names)
    for _ in range(10):
        assert database.run(shown) == [[database.schema, "30s", "5s", "off", "UTC"]]
    stranger = connect(f"postgresql://postgres:x@127.0.0.1:{database.address.hosts[0].port}/{database.address.database}")
    try:
        assert {tuple(stranger.run(shown)[0])[:2] for _ in range(10)} == {('"$user", public', "0")}
    finally:
        stranger.close()


def test_a_statement_is_stopped_by_its_own_limits(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SESSION, "statement_timeout", "200ms")
    with pytest.raises(DatabaseBusy):
        database.run("-- test\nselect pg_sleep(20)")
    assert database.run("-- test\nselect 1") == [[1]]


def test_commits_are_durable_where_the_database_says_they_need_not_be(postgres_url: str) -> None:
    with pgbouncer(postgres_url, first="set synchronous_commit = off") as url:
        database = Database(read_database_url(url), "public", 2, "transaction")
        stranger = connect(url)
        assert stranger.run("show synchronous_commit") == [["off"]]
        assert database.run("-- test\nselect current_setting('synchronous_commit')") == [["on"]]
        assert stranger.run("show synchronous_commit") == [["off"]]
        stranger.close()
        database.close()


def test_a_refused_statement_leaves_the_connection_whole(database: Database) -> None:
    with pytest.raises(MalformedJson):
        database.run("-- test\nselect :text::json", text="{")
    assert database.run("-- test\nselect :text::json::text", text="{}") == [["{}"]]
    assert len(database._free) == 1


def test_the_schema_is_applied_and_partitions_come_and_go(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [database] * 4))
    assert schema_version(database) == SCHEMA_VERSION
    queue = Queue(database)
    queue.prepare_partitions(None)
    assert database.run("-- test\nselect count(*) from partition_borders('job')") == [[1]]
    assert queue.retire(None) == (None, [])


def test_options_that_would_not_get_through_are_refused() -> None:
    url = "postgresql://user@127.0.0.1/db?options=-c%20statement_timeout%3D5s"
    with pytest.raises(SettingsError, match="options do not get through"):
        Settings.read({"DATABASE_URL": url, "DATABASE_POOL_MODE": "transaction"})
    assert Settings.read({"DATABASE_URL": url}).database_pool_mode == "session"


def test_sessions_that_end_behind_the_pooler_are_a_passing_matter(postgres_url: str, pooled_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        named = f"{pooled_url}?application_name={schema}"
        with running_service(named, schema, DATABASE_POOL_MODE="transaction") as service:
            corner = Corner(service.api)
            kept = corner.create(idempotency_key="k")
            stranger = connect(postgres_url)
            ended = stranger.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = :name", name=schema)
            stranger.close()
            assert [True] in ended
            wait_until(lambda: corner.api.post("/api/v1/jobs", corner.job(idempotency_key="k")).status == 200)
            assert corner.look(kept)["status"] == "pending"


def test_what_a_script_sets_for_its_transaction_holds_in_the_next(database: Database) -> None:
    with database.session() as session:
        session.script("begin; set local statement_timeout = 0")
        assert session.script("select current_setting('statement_timeout')") == [["0"]]
        session.script("commit")
        assert session.script("select current_setting('statement_timeout')") == [["30s"]]
