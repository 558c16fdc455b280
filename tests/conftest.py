"""One PostgreSQL for the whole run, shared by all pytest-xdist workers; one schema and one service process for each of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import attrs
import hypothesis
import pytest
from pgbouncer import pgbouncer
from postgres import Database, NoDatabaseError, Sql, connect, find_database, fresh_schema
from service import Api, Corner, Service, running_service

# The same examples each time: a change is judged by itself. New ones are looked for by `make fuzz`.
hypothesis.settings.register_profile("same", derandomize=True)
if "FUZZ_EXAMPLES" not in os.environ:
    hypothesis.settings.load_profile("same")

database_key = pytest.StashKey[Database]()
cleanup_key = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    # Ended by a time limit, the run cleans up as after Ctrl-C: otherwise servers would stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell starts what stands in the background deaf to Ctrl-C, and what it starts too: the programs under test would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str | list[str]:
    if hasattr(config, "workerinput"):  # A worker is asked too, though nobody reads its answer.
        return []
    if config.option.collectonly:
        return "PostgreSQL: not started, tests are only collected"
    database = _database(config)
    return f"PostgreSQL: {database.version} ({database.source})"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hands the one database to a pytest-xdist worker."""
    if not node.config.option.collectonly:
        node.workerinput["database"] = attrs.asdict(_database(node.config))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash.get(cleanup_key, ExitStack()).close()


def _database(config: pytest.Config) -> Database:
    if database_key not in config.stash:
        stack = config.stash[cleanup_key] = ExitStack()
        try:
            config.stash[database_key] = stack.enter_context(find_database(os.environ))
        except NoDatabaseError as error:
            pytest.exit(f"no test can run: {error}", returncode=pytest.ExitCode.INTERNAL_ERROR)
    return config.stash[database_key]


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> str:
    """The libpq URL of the database of this run."""
    given = getattr(pytestconfig, "workerinput", None)
    return str(given["database"]["url"]) if given else _database(pytestconfig).url


@pytest.fixture(scope="session")
def reached(postgres_url: str) -> Iterator[dict[str, str]]:
    """The settings by which services reach the database: by its URL, or through a PgBouncer where TEST_POOL_MODE=transaction."""
    mode = os.environ.get("TEST_POOL_MODE", "session")
    with ExitStack() as stack:
        url = stack.enter_context(pgbouncer(postgres_url)) if mode == "transaction" else postgres_url
        yield {"DATABASE_URL": url, "DATABASE_POOL_MODE": mode}


@pytest.fixture(scope="session")
def schema(postgres_url: str) -> Iterator[str]:
    """The schema of the shared service; dropped at the end."""
    with fresh_schema(postgres_url) as name:
        yield name


@pytest.fixture(scope="session")
def service(postgres_url: str, reached: dict[str, str], schema: str) -> Iterator[Service]:
    """A service process that tests share; each uses a corner of its own."""
    with running_service(postgres_url, schema, **reached) as started:
        yield started


@pytest.fixture(scope="session")
def api(service: Service) -> Api:
    """The HTTP interface of the shared service."""
    return service.api


@pytest.fixture
def corner(api: Api) -> Corner:
    """A corner of the shared queue that no other test uses."""
    return Corner(api)


@pytest.fixture(scope="session")
def sql(service: Service, postgres_url: str) -> Iterator[Sql]:
    """Statements on the tables of the shared service."""
    connection = connect(postgres_url, service.schema)
    yield lambda statement, **parameters: list(connection.run(statement, **parameters) or [])
    connection.close()


@pytest.fixture(scope="module")
def another_service(service: Service, postgres_url: str, reached: dict[str, str]) -> Iterator[Service]:
    """A second service process on the schema of the shared one."""
    with running_service(postgres_url, service.schema, **reached) as started:
        yield started


@pytest.fixture
def start_service(postgres_url: str, reached: dict[str, str]) -> Iterator[Callable[..., Service]]:
    """Starts services of this test's own, on one schema of this test's own; settings by name."""
    with ExitStack() as stack:
        schema = stack.enter_context(fresh_schema(postgres_url))
        yield lambda **settings: stack.enter_context(running_service(postgres_url, schema, **reached, **settings))
