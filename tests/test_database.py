"""The pool: what PostgreSQL's errors become, and connections that break."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pg8000.native
import pytest
from postgres import connect, fresh_schema
from service import wait_until

from ai_internal.server.database import Database, literal, refusal_of
from ai_internal.server.database_url import read_database_url
from ai_internal.server.requests import DatabaseBusy, DatabaseUnavailable, MalformedJson, Refusal, SchemaMissing, ValidationFailed


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    with fresh_schema(postgres_url) as schema:
        database = Database(read_database_url(postgres_url), schema, 2)
        database.script(f"create schema {schema}")
        yield database
        database.close()


@pytest.mark.parametrize(
    ("states", "refusal"),
    [
        (("25006", "57P01", "57P02", "57P03", "08000", "08006", "53100", "53200", "58030", "28P01", "3D000"), DatabaseUnavailable),
        (("40001", "40P01", "53300", "55P03", "57014"), DatabaseBusy),
        (("22P02", "22P05", "22021", "54001"), MalformedJson),
        (("22003", "23514", "23505"), ValidationFailed),
        (("42P01", "3F000", "42883"), SchemaMissing),
    ],
)
def test_an_error_of_the_server_becomes_a_refusal(database: Database, states: tuple[str, ...], refusal: type[Refusal]) -> None:
    database.script(
        "create function fail_with(state text) returns void language plpgsql as 'begin raise exception ''no'' using errcode = state; end'"
    )
    for state in states:
        with pytest.raises(refusal):
            database.run("-- test\nselect fail_with(:state)", state=state)
    assert database.run("-- test\nselect 1") == [[1]], "the pool goes on"


def test_our_own_mistakes_are_no_refusal(database: Database) -> None:
    with pytest.raises(pg8000.native.DatabaseError):
        database.run("-- test\nselect nonsense")
    assert refusal_of(pg8000.native.DatabaseError("unexpected")) is None


def backends(database: Database) -> list[int]:
    with ThreadPoolExecutor(2) as threads:
        both = threading.Barrier(2)

        def own() -> int:
            with database._lent(5) as connection:
                both.wait(5)
                return int(connection.run("-- test\nselect pg_backend_pid()", {})[0][0])

        return [future.result() for future in [threads.submit(own) for _ in range(2)]]


def test_connections_that_the_server_closed_are_replaced_unseen(database: Database, postgres_url: str) -> None:
    killed = backends(database)
    stranger = connect(postgres_url, database.schema)
    for pid in killed:
        stranger.run("select pg_terminate_backend(:pid::int)", pid=pid)
    wait_until(lambda: stranger.run("select count(*) from pg_stat_activity where pid = any(:pids::int[])", pids=killed) == [[0]])
    stranger.close()
    assert database.run("-- test\nselect 1") == [[1]]
    assert not set(backends(database)) & set(killed)


def test_a_connection_that_breaks_during_a_statement_is_unavailable_and_replaced(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable):
        database.run("-- test\nselect pg_terminate_backend(pg_backend_pid())")
    assert database.run("-- test\nselect 1") == [[1]]


def test_a_silent_server_is_given_up(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable):
        database.run("-- test\nselect pg_sleep(20)", seconds=0.2)
    assert database.run("-- test\nselect 1") == [[1]]


def test_a_pool_in_full_use_says_busy(database: Database) -> None:
    with database._lent(5), database._lent(5), pytest.raises(DatabaseBusy):
        database.run("-- test\nselect 1", seconds=0.1)
    assert database.run("-- test\nselect 1") == [[1]]


def test_an_unreachable_server_is_unavailable(database: Database) -> None:
    nowhere = Database(read_database_url("postgresql://user:secret-word@127.0.0.1:1/db"), "ai_service", 2)
    with pytest.raises(DatabaseUnavailable) as refused:
        nowhere.run("-- test\nselect 1")
    assert "secret" not in str(refused.value)


def test_sessions_are_durable_and_limited_whatever_the_url_says_of_other_things(postgres_url: str) -> None:
    url = postgres_url + ("&" if "?" in postgres_url else "?") + "options=-c%20statement_timeout%3D7000%20-c%20synchronous_commit%3Doff"
    with fresh_schema(postgres_url) as schema:
        database = Database(read_database_url(url), schema, 2)
        shown = {
            name: database.run(f"-- test\nshow {name}")[0][0] for name in ("statement_timeout", "lock_timeout", "synchronous_commit", "jit")
        }
        database.close()
    assert shown == {"statement_timeout": "7s", "lock_timeout": "5s", "synchronous_commit": "on", "jit": "off"}


@pytest.mark.parametrize(("mode", "options"), [("session", ""), ("transaction", ""), ("session", "-c%20default_toast_compression%3Dpglz")])
def test_payloads_are_compressed_by_lz4_where_the_server_has_it_and_nobody_chose(postgres_url: str, mode: str, options: str) -> None:
    url = postgres_url + ("&" if "?" in postgres_url else "?") + f"options={options}" if options else postgres_url
    with fresh_schema(postgres_url) as schema:
        database = Database(read_database_url(url), schema, 2, mode)
        kinds = database.run("-- test\nselect enumvals::text from pg_settings where name = 'default_toast_compression'")
        [[shown]] = database.run("-- test\nselect current_setting('default_toast_compression', true)")
        database.close()
    has_lz4 = bool(kinds) and "lz4" in kinds[0][0]
    assert shown == ("lz4" if has_lz4 and not options else "pglz" if kinds else None)


def test_a_statement_is_prepared_once_per_connection(database: Database) -> None:
    for number in range(5):
        assert database.run("-- test.prepared\nselect :number::int", number=number) == [[number]]
    count = database.run("-- test\nselect count(*) from pg_prepared_statements where statement like '-- test.prepared%'")
    assert count == [[1]]


@pytest.mark.parametrize(
    "value",
    [[], ["a"], ['q"uote', "back\\slash", "comma,brace{}", "", " space ", "NULL", "null", "naïve 😀", "tab\tline\n"], [None, "x", None]],
)
def test_lists_of_text_arrive_as_they_are(database: Database, value: list[str | None]) -> None:
    assert database.run("-- test\nselect :value::text[]", value=value) == [[value]]


@pytest.mark.parametrize(
    ("value", "text"), [(None, None), (True, "True"), (5, "5"), ([1, None, 2.5], "{1,NULL,2.5}"), ([True, False], "{True,False}")]
)
def test_other_values_go_in_as_text(value: object, text: str | None) -> None:
    assert literal(value) == text


def test_a_nul_within_a_text_is_not_taken_for_what_parts_the_texts() -> None:
    assert literal(["a\0b", "c"]) == '{"a\0b","c"}'
    assert literal(['"', "\\", "é", ""]) == '{"\\"","\\\\","é",""}'


def test_a_connection_left_in_the_middle_of_something_is_not_lent_again(database: Database) -> None:
    with pytest.raises(KeyboardInterrupt), database._lent(5):
        raise KeyboardInterrupt
    assert database._free == []
    assert database.run("-- test\nselect 1") == [[1]]
