"""PostgreSQL for the queue: a small pool of pg8000 connections, what its errors mean for a request, and the schema.

Every call is one prepared statement: one round trip, one durable commit. Behind a pooler it is one that is not prepared.
"""

import contextlib
import functools
import logging
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pg8000.core
import pg8000.native

from ai_internal.server.database_url import DatabaseAddress, DatabaseUnreachable
from ai_internal.server.requests import (
    DatabaseBusy,
    DatabaseUnavailable,
    IdempotencyKeyReused,
    MalformedJson,
    Refusal,
    SchemaMissing,
    SchemaOutdated,
    TooManyCombinations,
    ValidationFailed,
)

log = logging.getLogger("ai_service.database")

# ── Database ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA_VERSION = 7
# Versions 1 to 5 were never released, and nothing upgrades them.
FIRST_SCHEMA_VERSION = 6
SCHEMA_FILE = Path(__file__).parents[2] / "schema.sql"  # beside ai_service.py, in the source tree as in an installation
STATEMENT_SECONDS, LOCK_SECONDS, CONNECT_SECONDS, LEND_SECONDS = 30, 5, 5, 5

# What a session is set to unless DATABASE_URL's `options` say otherwise. A statement may not outlive the minute that `fold` looks back.
SESSION = {
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": "30s",
    "timezone": "UTC",
    "jit": "off",
    "client_min_messages": "warning",
}

# Payloads of 8 KB and more are written in half the time (30 KB of text 0.8 instead of 1.7 ms) and as small; not every server has it.
LZ4 = "from pg_settings where name = 'default_toast_compression' and source = 'default' and 'lz4' = any (enumvals)"

# 08 connection, 25006 read-only, 28 and 3D000 no such login or database, 53 resources, 57P01-57P03 shut down and starting, 58030 its disk;
# 40001 serialization, 40P01 deadlock, 53300 connections, 55P03 lock, 57014 statement timeout.
_AWAY = re.compile("08...|25006|57P0[1-3]|53[124]00|58030|28...|3D000")
_BUSY = re.compile("40001|40P01|53300|55P03|57014")
_REFUSALS = {"AIS01": IdempotencyKeyReused, "AIS02": TooManyCombinations}
_SILENT_SECONDS = 60.0
_UNREACHABLE = (DatabaseUnreachable, pg8000.native.InterfaceError, OSError)


class Database:
    """A small pool of connections, handed out last in, first out. Each call is one prepared statement, one round trip and one commit.

    A connection that breaks is dropped and replaced; what the server says by SQLSTATE becomes a Refusal. Safe for threads.
    `pool_mode` is that of the pooler in front of the database: `session`, also where there is none, or `transaction`.
    """

    def __init__(self, address: DatabaseAddress, schema: str, connections: int, pool_mode: str = "session") -> None:
        self.address, self.schema = address, schema
        self._connection = PooledConnection if pool_mode == "transaction" else Connection
        self._free: list[Connection] = []
        self._logged_at: dict[str, float] = {}
        self.connections = connections
        self._places = threading.Semaphore(connections)

    def run(self, statement: str, seconds: float = STATEMENT_SECONDS + 5, **values: Any) -> list[list[Any]]:
        """The rows of a statement with named parameters, which go in as text; the socket may be silent for so many `seconds`.

        Raises a Refusal, or pg8000's DatabaseError for our own mistakes.
        """
        with self._lent(seconds) as connection:
            return connection.run(statement, {name: literal(value) for name, value in values.items()})

    @contextlib.contextmanager
    def session(self) -> Iterator["Connection"]:
        """A connection of one's own, closed at the end; what it left open is rolled back. Raises like `run`."""
        with self._translated(), contextlib.closing(self._connection(self.address, self.schema)) as connection:
            yield connection

    def script(self, text: str) -> list[list[Any]]:
        """Runs statements without parameters in a session of their own; the rows of the last that has any. Raises like `run`."""
        with self.session() as session:
            return session.script(text)

    @property
    def in_use(self) -> int:
        """How many connections are lent out."""
        return self.connections - self._places._value  # noqa: SLF001  threading has no public name for it

    def close(self) -> None:
        """Closes the connections that are not in use."""
        while self._free:
            self._free.pop().close()

    @contextlib.contextmanager
    def _lent(self, seconds: float) -> Iterator["Connection"]:
        if not self._places.acquire(timeout=min(seconds, LEND_SECONDS)):
            raise DatabaseBusy("all database connections are in use")
        try:
            with self._translated():
                connection = self._alive() or self._connection(self.address, self.schema, min(seconds, CONNECT_SECONDS))
                with self._returned(connection):
                    connection.limit(seconds)
                    yield connection
        finally:
            self._places.release()

    def _alive(self) -> "Connection | None":
        with contextlib.suppress(IndexError):
            while True:
                connection = self._free.pop()
                if connection.is_quiet():
                    return connection
                connection.close()
        return None

    @contextlib.contextmanager
    def _returned(self, connection: "Connection") -> Iterator[None]:
        """Takes a connection back, unless it broke or was left in the middle of something."""
        is_usable = False
        try:
            yield
            is_usable = True
        except pg8000.native.DatabaseError as error:
            is_usable = not isinstance(refusal_of(error), DatabaseUnavailable)
            raise
        finally:
            if is_usable:
                self._free.append(connection)
            else:
                connection.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except pg8000.native.DatabaseError as error:
            refusal = refusal_of(error)
            if isinstance(refusal, DatabaseUnavailable | DatabaseBusy):
                self._log_refused(error.args[0]["C"], error.args[0].get("M", ""))
            raise refusal or error from None
        except _UNREACHABLE as error:
            state = getattr(error, "sqlstate", None) or ""
            reason = str(error) if isinstance(error, DatabaseUnreachable) else type(error).__name__
            log.debug("database_unreachable sqlstate=%s reason=%s", state, reason)
            if state:
                self._log_refused(state, reason)
            raise (DatabaseBusy if _BUSY.fullmatch(state) else DatabaseUnavailable)(reason=reason) from None

    def _log_refused(self, state: str, message: str) -> None:
        """Logs what the server refuses, each kind once a minute: of a full disk nobody else would tell the operator."""
        now = time.monotonic()
        if now >= self._logged_at.get(state, now):
            self._logged_at[state] = now + _SILENT_SECONDS
            log.warning("database_refused sqlstate=%s message=%s", state, " ".join(message.split()))


class _WithoutFlush:
    """The stream of a session without pg8000's wishes to flush after each message.

    With them the server answers a statement in three packets, before it runs, before its commit and after it, and each wakes this process.
    """

    def __init__(self, stream: Any) -> None:
        self._write = stream.write
        self.read, self.flush, self.close = stream.read, stream.flush, stream.close

    def write(self, message: bytes) -> None:
        """Passes on what is no such wish: a Sync follows each statement and flushes too."""
        if message is not pg8000.core.FLUSH_MSG:
            self._write(message)


class Connection:
    """One session of PostgreSQL with its prepared statements."""

    def __init__(self, address: DatabaseAddress, schema: str, seconds: float = CONNECT_SECONDS) -> None:
        self._session = address.connect(timeout_seconds=seconds)
        self._session._sock = _WithoutFlush(self._session._sock)  # noqa: SLF001
        self._prepared: dict[str, pg8000.native.PreparedStatement] = {}
        self._set(schema)

    def _set(self, schema: str) -> None:
        """Sets the session to what its statements need."""
        wanted = ", ".join(f"('{name}', '{value}')" for name, value in SESSION.items())
        self._session.run(
            f"set search_path = {schema}; "  # noqa: S608  the name was checked when the settings were read
            f"select set_config(s.name, w.value, false) from (values {wanted}) w (name, value) join pg_settings s on s.name = w.name "
            "where s.source <> 'client'; "
            "select set_config('synchronous_commit', 'on', false) from pg_settings where name = 'synchronous_commit' and setting = 'off'; "
            f"select set_config('default_toast_compression', 'lz4', false) {LZ4}"
        )

    def run(self, statement: str, values: Mapping[str, str | None]) -> list[list[Any]]:
        """The rows of a prepared statement."""
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = self._session.prepare(statement)
        try:
            return list(prepared.run(**values) or ())
        finally:
            # pg8000 would keep the rows, payloads of many megabytes among them, until the statement runs again.
            prepared._context = None  # noqa: SLF001

    def script(self, text: str) -> list[list[Any]]:
        """The rows of the last of some statements."""
        self.limit(600)
        return list(self._session.run(text) or ())

    def limit(self, seconds: float) -> None:
        """How long the socket may stay silent."""
        self._session._usock.settimeout(seconds)  # noqa: SLF001  pg8000 has no public name for it

    def is_quiet(self) -> bool:
        """Whether nothing has come unasked: a server that went away says so, or closes, on an idle connection."""
        watch = select.poll()
        watch.register(self._session._usock, select.POLLIN)  # noqa: SLF001
        return not watch.poll(0)

    def close(self) -> None:
        """Closes the session; one that broke is closed already."""
        with contextlib.suppress(*_UNREACHABLE):
            self._session.close()


class PooledConnection(Connection):
    """A connection through a pooler that lends out a session of PostgreSQL for one transaction at a time, as PgBouncer does.

    What is prepared or set for a session is another caller's the next moment. So a statement is sent whole each time, behind one that sets
    what it needs until the end of their transaction, which is the same: nothing but the Sync after both ends it. One round trip as ever.
    """

    def _set(self, schema: str) -> None:
        wanted = {"search_path": schema, **SESSION}
        if self._session.run(f"select {LZ4}"):
            wanted["default_toast_compression"] = "lz4"
        settings = " or ".join(f"set_config('{name}', '{value}', true) is null" for name, value in wanted.items())
        durable = "current_setting('synchronous_commit') = 'off' and set_config('synchronous_commit', 'on', true) is null"
        # Gives no row, and each part is asked: none of them is null.
        self._settings = f"select where {settings} or {durable}"

    def run(self, statement: str, values: Mapping[str, str | None]) -> list[list[Any]]:
        """The rows of a statement."""
        text, in_order = _lexed(statement)
        session, context = self._session, pg8000.core.Context(statement)
        self._send(self._settings, ())
        self._send(text, in_order(values))
        session._sock.write(pg8000.core.SYNC_MSG)  # noqa: SLF001
        session._sock.flush()  # noqa: SLF001
        session.handle_messages(context)
        return context.rows or []

    def script(self, text: str) -> list[list[Any]]:
        """The rows of the last of some statements; a transaction that they leave open goes on with the next script."""
        is_open = self._session._transaction_status == pg8000.core.IN_TRANSACTION  # noqa: SLF001
        return super().script(text if is_open else f"{self._settings};\n{text}")

    def _send(self, text: str, values: Sequence[str | None]) -> None:
        self._session.send_PARSE(pg8000.core.NULL_BYTE, text)
        self._session.send_BIND(pg8000.core.NULL_BYTE, values)
        self._session._send_message(pg8000.core.DESCRIBE, pg8000.core.PORTAL + pg8000.core.NULL_BYTE)  # noqa: SLF001
        self._session.send_EXECUTE()


# There are as many statements as methods that run one.
@functools.cache
def _lexed(statement: str) -> tuple[str, Callable[[Mapping[str, str | None]], tuple[str | None, ...]]]:
    """A statement with PostgreSQL's own placeholders, and what puts values into their order: a tenth of a millisecond each time."""
    text, in_order = pg8000.native.to_statement(statement)
    return text, in_order


def refusal_of(error: pg8000.native.DatabaseError) -> Refusal | None:
    """What an error of PostgreSQL means for the request; None where it is our own mistake."""
    fields = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    state = fields.get("C", "")
    if state in _REFUSALS:
        return _REFUSALS[state]()
    if _BUSY.fullmatch(state):
        return DatabaseBusy()
    if _AWAY.fullmatch(state):
        return DatabaseUnavailable()
    if state in ("42P01", "3F000", "42883"):
        return SchemaMissing()
    if state in ("22P02", "22P05", "22021", "54001"):
        return MalformedJson("PostgreSQL does not accept the JSON in this request")
    if state.startswith(("22", "23")):
        return ValidationFailed(errors=[{"path": "", "message": "PostgreSQL does not accept a value of this request"}])
    return None


def literal(value: Any) -> str | None:
    """A value as PostgreSQL reads it from text; a list becomes an array."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        # Most fields of most jobs are absent.
        if value and value.count(None) == len(value):
            return "{NULL" + ",NULL" * (len(value) - 1) + "}"
        return _texts(value) if value and all(type(each) is str for each in value) else _elements(value)
    return str(value)


def _texts(texts: Sequence[str]) -> str:
    """An array of texts, escaped all at once. A NUL parts them meanwhile; PostgreSQL refuses a text that has one itself."""
    text = "\0".join(texts)
    if text.count("\0") >= len(texts):
        return _elements(texts)
    return '{"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","') + '"}'


def _elements(values: Sequence[Any]) -> str:
    return "{" + ",".join(map(_element, values)) + "}"


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


# ASCII's record separator. JSON has no control characters but for line ends and tabs.
SEPARATOR = "\x1e"


def joined(texts: Sequence[str]) -> str:
    """JSON texts as one, which SQL parts with string_to_array: an array of text takes PostgreSQL three times as long to read.

    For 1 KB 12 against 5 µs, the escaping here included. Raises MalformedJson where one is no JSON.
    """
    text = SEPARATOR.join(texts)
    if text.count(SEPARATOR) != len(texts) - 1:
        raise MalformedJson("a control character in a string must be escaped")
    return text


def migrate(database: Database) -> None:
    """Applies `schema.sql` where the database has an older version.

    In one transaction, one process at a time. Raises a Refusal; SchemaOutdated where that version
    was never released.
    """
    if schema_version(database) >= SCHEMA_VERSION:
        return
    name = database.schema
    with database.session() as session:
        session.script(
            "begin; set local statement_timeout = 0; set local lock_timeout = '2min'; "
            f"select pg_advisory_xact_lock(hashtextextended('ai_service schema {name}', 0)); set local lock_timeout = '5s'"
        )
        # Another process may have been quicker.
        [[exists]] = session.script(f"select to_regclass('{name}.schema_version') is not null")
        if exists and _released(session.script(_VERSION), name) >= SCHEMA_VERSION:
            return
        [[schema_exists]] = session.script(f"select to_regnamespace('{name}') is not null")
        session.script(("" if schema_exists else f"create schema {name};\n") + SCHEMA_FILE.read_text())
        session.script(f"insert into schema_version (version) values ({SCHEMA_VERSION}) on conflict do nothing; commit")  # noqa: S608  a number
    log.info("schema_applied version=%d schema=%s", SCHEMA_VERSION, name)


_VERSION = "select coalesce(max(version), 0) from schema_version"


def schema_version(database: Database) -> int:
    """The version of the schema in the database; 0 without one.

    Raises a Refusal; SchemaOutdated where that version was never released.
    """
    try:
        rows = database.run(f"-- database.schema_version\n{_VERSION}", seconds=3)
    except SchemaMissing:
        return 0
    return _released(rows, database.schema)


def _released(rows: list[list[Any]], schema: str) -> int:
    version = int(rows[0][0])
    if version and version < FIRST_SCHEMA_VERSION:
        raise SchemaOutdated(
            f'schema "{schema}" has version {version}, which was never released and cannot be '
            "upgraded: drop the schema, or set DATABASE_SCHEMA to an empty one"
        )
    return version


def require_schema(database: Database) -> None:
    """Raises a Refusal: SchemaMissing or SchemaOutdated if this release cannot use the schema."""
    version = schema_version(database)
    if not version:
        raise SchemaMissing
    if version < SCHEMA_VERSION:
        needed = f"this release needs {SCHEMA_VERSION}: run `ai-service migrate`"
        raise SchemaOutdated(f'schema "{database.schema}" has version {version}, {needed}')
