"""Reads DATABASE_URL, a libpq URL, and opens pg8000 connections from it.

    postgresql://user:password@host:5432,host2:5433/database?sslmode=verify-full&sslrootcert=system

Read as libpq reads it (https://www.postgresql.org/docs/current/libpq-connect.html): the same places, percent-encoding, several
hosts, Unix sockets (which never use TLS), modes of TLS and kinds of server. Every parameter is honoured, or refused by name.

Where this differs from libpq:

- The URL is the only source. No PG… environment variable, ~/.pgpass, service file or file below ~/.postgresql is read, so
  `verify-ca` and `verify-full` need `sslrootcert`: a file, or `system` for the certificates the machine trusts.
- What is absent: host is `localhost`, user the account the process runs under, database the user's name. `connect_timeout` is 10
  seconds; 0, libpq's «for ever», is refused.
- Refused, where libpq goes on without a word: `sslrootcert` with a mode that does not verify, `sslcert` without TLS, a
  parameter given twice, an unencoded `@` in the name of a host or database.
- Accepted, where libpq is stricter: an unencoded `=` in the value of a parameter, white space around the URL.
"""

from __future__ import annotations

import os
import pwd
import re
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from urllib.parse import quote, unquote

import attrs
from pg8000.exceptions import DatabaseError, InterfaceError
from pg8000.native import Connection

CONNECT_TIMEOUT_SECONDS = 10
"""For each address of a host until it is reached, and from there to the open session."""

SOCKET_TIMEOUT_SECONDS = 30.0
"""How long an open connection waits for the server's next bytes."""


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class DatabaseUrlError(ValueError):
    """DATABASE_URL cannot be used; `problems` are sentences, all of them at once, and quote no value of the URL."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@attrs.frozen
class HostFailure:
    """Why one host gave no session, and the SQLSTATE if its server said one."""

    host: str
    reason: str
    sqlstate: str | None = None

    @property
    def ends_the_search(self) -> bool:
        """As in libpq: who is not let in, or finds no such database, is not sent to the next host."""
        return self.sqlstate is not None and self.sqlstate[:2] in ("28", "3D")


class DatabaseUnreachable(ConnectionError):
    """No host gave a session. The text names each one tried and why, without user or password.

    `sqlstate` is the last one that a server gave, such as 28P01 (wrong password) or 57P03 (starting up), else None.
    """

    def __init__(self, failures: Sequence[HostFailure]) -> None:
        super().__init__("; ".join(f"{failure.host}: {failure.reason}" for failure in failures))
        self.failures = tuple(failures)

    @property
    def sqlstate(self) -> str | None:
        return next((failure.sqlstate for failure in reversed(self.failures) if failure.sqlstate), None)


class _UnfitError(Exception):
    """The server, or a file, is not what the URL asks for; the message says what is the matter."""


class _NoTlsError(_UnfitError):
    """The server offers no TLS."""


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_NO_TLS = "the server offers no TLS"

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)

_VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

_WAYS = {
    "disable": (False,),
    "allow": (False, True),
    "prefer": (True, False),
    "require": (True,),
    "verify-ca": (True,),
    "verify-full": (True,),
}
"""For each sslmode whether to encrypt, in the order of the attempts."""


@attrs.frozen
class Tls:
    """How connections are encrypted and whom they trust. Files are read for every connection: certificates get renewed."""

    mode: str = "prefer"
    root_certificate: str | None = None
    certificate: str | None = None
    key: str | None = None
    key_password: str = attrs.field(default="", repr=False)
    lowest_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    highest_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3

    def context(self) -> ssl.SSLContext:
        """Settings for one connection; raises OSError or ValueError when a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version, context.maximum_version = self.lowest_version, self.highest_version
        context.check_hostname = self.mode == "verify-full"
        # As in libpq, `require` verifies the chain when it is given a root certificate.
        context.verify_mode = ssl.CERT_NONE if self.root_certificate is None else ssl.CERT_REQUIRED
        self.load_trusted(context)
        self.load_own(context)
        return context

    def load_trusted(self, context: ssl.SSLContext) -> None:
        """The authorities whose certificates are accepted."""
        if self.root_certificate == "system":
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        elif self.root_certificate is not None:
            context.load_verify_locations(self.root_certificate)

    def load_own(self, context: ssl.SSLContext) -> None:
        """The certificate that this side shows."""
        if self.certificate is not None:
            # Without a password, be it an empty one, OpenSSL would ask for it at the terminal.
            context.load_cert_chain(self.certificate, self.key, password=self.key_password)

    def encrypted(self, plain: socket.socket, host: str) -> ssl.SSLSocket:
        """Negotiates TLS on a fresh connection; `host` is the name that `verify-full` wants to see in the certificate."""
        try:
            context = self.context()
        except (OSError, ValueError) as error:
            raise _UnfitError(f"sslrootcert, sslcert or sslkey cannot be used ({_fault(error)})") from error
        plain.sendall(_SSL_REQUEST)
        # One byte, no more: what follows it in the clear must make the handshake fail (CVE-2021-23222).
        answer = plain.recv(1)
        if answer == b"N":
            raise _NoTlsError(_NO_TLS)
        if answer != b"S":
            raise _UnfitError("it does not answer as PostgreSQL does")
        return context.wrap_socket(plain, server_hostname=host)


def _fault(error: Exception) -> str:
    """What went wrong with a file, in OpenSSL's or the system's words, without its path."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__


# ── Hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Host:
    """Where a server listens: a name, an address or the folder of a Unix socket; and a port."""

    name: str
    port: int

    @property
    def is_unix(self) -> bool:
        return self.name.startswith("/")

    @property
    def unix_path(self) -> str:
        return f"{self.name}/.s.PGSQL.{self.port}"

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else quote(self.name, safe="")
        return f"{name}:{self.port}"

    def reach(self, limit_seconds: float, tcp_options: Sequence[tuple[int, int, int]]) -> socket.socket:
        """A plain connection; each address of a name is tried for `limit_seconds`. Raises OSError."""
        if self.is_unix:
            return self._reach_unix(limit_seconds)
        reached = socket.create_connection((self.name, self.port), limit_seconds)
        try:
            for option in tcp_options:
                reached.setsockopt(*option)
        except OSError:
            reached.close()
            raise
        return reached

    def _reach_unix(self, limit_seconds: float) -> socket.socket:
        reached = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            reached.settimeout(limit_seconds)
            reached.connect(self.unix_path)
        except OSError:
            reached.close()
            raise
        return reached


# ── The address and its connections ──────────────────────────────────────────────────────────────────────────────────────────

_KINDS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")

_SESSION_STATE = "select pg_is_in_recovery(), current_setting('transaction_read_only')::bool"


@attrs.frozen(repr=False)
class DatabaseAddress:
    """What a DATABASE_URL says. Its repr shows as little as `shown`."""

    hosts: tuple[Host, ...]
    user: str
    password: str | None
    database: str
    kind: str
    """The value of target_session_attrs."""
    tls: Tls
    connect_timeout_seconds: int
    application_name: str | None
    options: str | None
    """Command-line options for the server's process, such as `-c statement_timeout=5s`."""
    tcp_options: tuple[tuple[int, int, int], ...]
    """Arguments of setsockopt."""

    @property
    def shown(self) -> str:
        """For logs: postgresql://host:port,host2:port/database, without user, password and parameters."""
        return f"postgresql://{','.join(map(str, self.hosts))}/{quote(self.database, safe='')}"

    def __repr__(self) -> str:
        return f"DatabaseAddress({self.shown})"

    def connect(self, *, timeout_seconds: float = SOCKET_TIMEOUT_SECONDS, application_name: str = "ai_service") -> Connection:
        """A session with the first host that gives one of the kind asked for; raises DatabaseUnreachable if none does.

        Once it is open, every wait for the server ends after `timeout_seconds`, with TimeoutError or pg8000's InterfaceError (it lets
        some OSErrors through), and the connection is of no more use. `application_name` serves when the URL has none.
        """
        failures: list[HostFailure] = []
        for kind in ("standby", "any") if self.kind == "prefer-standby" else (self.kind,):
            failures.clear()
            for host in self.hosts:
                outcome = self._try(host, kind, timeout_seconds, application_name)
                if not isinstance(outcome, HostFailure):
                    return outcome
                failures.append(outcome)
                if outcome.ends_the_search:
                    raise DatabaseUnreachable(failures)
        raise DatabaseUnreachable(failures)

    def _try(self, host: Host, kind: str, timeout_seconds: float, application_name: str) -> Connection | HostFailure:
        """With TLS, without, or one after the other, as sslmode says."""
        ways = (False,) if host.is_unix else _WAYS[self.tls.mode]
        outside = sys.exception()
        failures: dict[bool, HostFailure] = {}
        for encrypt in ways:
            try:
                return self._open(host, encrypt, kind, timeout_seconds, application_name)
            except Exception as error:  # noqa: BLE001  Where no PostgreSQL listens, pg8000 raises whatever its bytes lead to.
                chain = tuple(_chain(error, outside))
            failures[encrypt] = self._failure(host, chain)
            if not _may_lie_in_encryption(chain, failures[encrypt].sqlstate):
                break
        return _joined(failures)

    def _open(self, host: Host, encrypt: bool, kind: str, timeout_seconds: float, application_name: str) -> Connection:  # noqa: FBT001
        with ExitStack() as stack:
            reached = stack.enter_context(host.reach(self.connect_timeout_seconds, self.tcp_options))
            # Anew, because the first addresses of a name may have used up a limit each.
            deadline = time.monotonic() + self.connect_timeout_seconds
            if encrypt:
                reached = stack.enter_context(self.tls.encrypted(reached, host.name))
            reached.settimeout(_left(deadline))
            connection = stack.enter_context(self._log_in(reached, application_name))
            _check_kind(connection, kind)
            reached.settimeout(timeout_seconds)
            stack.pop_all()
        return connection

    def _log_in(self, reached: socket.socket, application_name: str) -> Connection:
        # The encoding is said, or a database in SQL_ASCII would have pg8000 refuse every letter beyond ASCII.
        parameters = {"client_encoding": "UTF8"} | ({"options": self.options} if self.options else {})
        return Connection(
            self.user,
            # With None, pg8000 fails with an AttributeError where the server asks for one; with "" the server says it: 28P01.
            password=self.password or "",
            database=self.database,
            sock=reached,
            ssl_context=False,
            application_name=self.application_name or application_name,
            startup_params=parameters,
        )

    def _failure(self, host: Host, chain: Sequence[BaseException]) -> HostFailure:
        fields = next((error.args[0] for error in chain if isinstance(error, DatabaseError)), None)
        if not isinstance(fields, dict):
            return HostFailure(str(host), _reason(chain, self.connect_timeout_seconds))
        sqlstate, message = fields.get("C"), self._without_user(fields.get("M", "the server refused"))
        hint = ", and the URL has no password" if sqlstate == "28P01" and not self.password else ""
        return HostFailure(str(host), f"{message} (SQLSTATE {sqlstate}){hint}", sqlstate)

    def _without_user(self, message: str) -> str:
        """On one line. PostgreSQL's refusals name the user, and logs are not to show user info."""
        return " ".join(re.sub(rf"(?<!\w){re.escape(self.user)}(?!\w)", "…", message).split())


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _check_kind(connection: Connection, kind: str) -> None:
    if kind == "any":
        return
    in_recovery, read_only = connection.run(_SESSION_STATE)[0]
    fits = {"read-write": not read_only, "read-only": read_only, "primary": not in_recovery, "standby": in_recovery}
    if not fits[kind]:
        found = f"{'a standby' if in_recovery else 'a primary'}, {'read-only' if read_only else 'read-write'}"
        raise _UnfitError(f"it is {found}, and target_session_attrs asks for {kind}")


# ── Why a host gave no session ───────────────────────────────────────────────────────────────────────────────────────────────


def _chain(error: BaseException, outside: BaseException | None) -> Iterator[BaseException]:
    """The error and those it hides: pg8000 covers the server's refusal when its farewell fails.

    `outside` is what the caller was busy handling, which has no part in it.
    """
    current: BaseException | None = error
    while current is not None and current is not outside:
        yield current
        current = current.__context__


def _may_lie_in_encryption(chain: Sequence[BaseException], sqlstate: str | None) -> bool:
    """Whether `allow` and `prefer` go on to the other way. 28000 is what lines of pg_hba.conf for one of the ways lead to."""
    return sqlstate == "28000" or any(isinstance(error, (ssl.SSLError, _NoTlsError)) for error in chain)


def _joined(failures: Mapping[bool, HostFailure]) -> HostFailure:
    """One of both ways. That a server has no TLS is of no interest where it may be reached without."""
    telling = {way: failure for way, failure in failures.items() if failure.reason != _NO_TLS} or failures
    *_, last = telling.values()
    if len(telling) == 1:
        return last
    reason = ", ".join(f"{'with' if way else 'without'} TLS: {failure.reason}" for way, failure in telling.items())
    return HostFailure(last.host, reason, DatabaseUnreachable([*telling.values()]).sqlstate)


def _reason(chain: Sequence[BaseException], limit_seconds: float) -> str:
    for error in chain:
        match error:
            case _UnfitError():
                return str(error)
            case TimeoutError():
                return f"no answer within {limit_seconds} s"
            case ssl.SSLCertVerificationError():
                return f"its certificate is refused: {error.verify_message}"
            case ssl.SSLError():
                return f"TLS failed: {_fault(error)}"
            case OSError():
                return error.strerror or type(error).__name__
    # Last, because pg8000 says "network error" of all the above, and of a connection that the other side closed.
    if isinstance(chain[0], InterfaceError):
        return {"network error": "it closed the connection"}.get(str(chain[0]), str(chain[0]))
    return f"the login broke off ({type(chain[0]).__name__}): is it PostgreSQL?"


# ── Reading a URL ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# As in libpq, the user info ends at the first @ if that comes before the first slash, question mark or not.
_URL = re.compile(
    r"(?:(?P<user>[^/@:]*)(?::(?P<password>[^/@]*))?@)?(?P<hosts>[^/?]*)(?:/(?P<database>[^?]*))?(?:\?(?P<query>.*))?", re.DOTALL
)

_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^\[\]:]*))(?::(?P<port>.*))?", re.DOTALL)

# Values that say what happens anyway. Any other asks for something that cannot be done here.
_ONLY = {
    "channel_binding": ("prefer",),
    "client_encoding": ("utf8", "utf-8", "unicode", "auto"),
    "gssencmode": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
    "sslcompression": ("0",),
    "sslnegotiation": ("postgres",),
    "sslsni": ("1",),
}

# The highest values are Linux's. Absent and 0 leave what the system does.
_TCP_OPTIONS = {
    "keepalives_idle": (getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None), 32_767),
    "keepalives_interval": (getattr(socket, "TCP_KEEPINTVL", None), 32_767),
    "keepalives_count": (getattr(socket, "TCP_KEEPCNT", None), 127),
    "tcp_user_timeout": (getattr(socket, "TCP_USER_TIMEOUT", None), 2**31 - 1),
}

_LONGEST_UNIX_PATH = 103
"""Bytes: macOS has room for 103, Linux for 107."""


def read_database_url(url: str) -> DatabaseAddress:
    """Reads the URL and the certificate files it names, and connects to nothing; raises DatabaseUrlError with every problem."""
    given = _Given()
    given.read(url.strip())
    user = given.text("user") or _account(given)
    address = DatabaseAddress(
        hosts=_hosts(given),
        user=user,
        password=given.text("password"),
        database=given.text("dbname") or user,
        kind=given.choice("target_session_attrs", _KINDS, "any"),
        tls=_tls(given),
        connect_timeout_seconds=given.number("connect_timeout", CONNECT_TIMEOUT_SECONDS, 1, 86_400),
        application_name=_application_name(given),
        options=given.text("options"),
        tcp_options=_tcp_options(given),
    )
    given.refuse_the_rest()
    if given.problems:
        raise DatabaseUrlError(given.problems)
    return address


class _Given:
    """The parameters of a URL, taken out one by one. Every problem is noted and reading goes on.

    A problem names a parameter and never quotes a value: where a password was not encoded, any value may be a part of it.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._values: dict[str, str] = {}
        self._taken: set[str] = set()
        self._doubtful: set[str] = set()

    def read(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        if scheme not in ("postgresql", "postgres"):
            self.problems.append("it must begin with postgresql:// or postgres://")
        elif "\0" in url or not _is_encodable(url):
            self.problems.append("it has characters that no URL can have")
        elif match := _URL.fullmatch(rest):
            self._read_parts(**match.groupdict(default=""))

    def _read_parts(self, user: str, password: str, hosts: str, database: str, query: str) -> None:
        if "@" in database:
            self.problems.append("an @ stands behind the first /: in a user name or password, / is written %2F and @ is written %40")
        self._read_hosts(hosts.split(","))
        for name, value in (("user", user), ("password", password), ("dbname", database)):
            self._keep(name, value)
        self._read_query([part for part in query.split("&") if part])

    def _read_hosts(self, parts: list[str]) -> None:
        matches = [_HOST.fullmatch(part) for part in parts]
        for number, match in enumerate(matches, 1):
            if match is None:
                self.problems.append(f"host {number} has a bracket too many or too few: they enclose an IPv6 address")
        found = [match for match in matches if match]
        self._keep("host", ",".join(match["address"] or match["name"] or "" for match in found))
        if any(match["port"] for match in found):
            self._keep("port", ",".join(match["port"] or "" for match in found))

    def _read_query(self, parts: list[str]) -> None:
        seen: set[str] = set()
        before = ""
        for number, part in enumerate(parts, 1):
            name, equals, value = part.partition("=")
            if not equals:
                self.problems.append(f"query parameter {number} has no =")
                continue
            if (name, value) == ("ssl", "true"):  # JDBC's way, which libpq knows
                name, value = "sslmode", "require"
            if "password" in before or "@" in "".join(parts) or not re.fullmatch("[a-z_]{1,40}", name):
                self._doubtful.add(name)
            if name in seen:
                self.problems.append(f"{self._named(name)} is given twice")
            seen.add(name)
            self._keep(name, value)
            before = name

    def _named(self, name: str) -> str:
        """An & or @ that is not encoded cuts a password in two, and its end looks like a parameter."""
        return "a parameter whose name may be a part of a password" if name in self._doubtful else name

    def _keep(self, name: str, value: str) -> None:
        decoded = _decoded(value)
        if decoded is None:
            self.problems.append(f"{self._named(name)} is not percent-encoded UTF-8: a % itself is written %25")
        self._values[name] = decoded or ""

    def text(self, name: str) -> str | None:
        """None if absent or empty, which libpq takes for the same."""
        self._taken.add(name)
        return self._values.get(name) or None

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        self._taken.add(name)
        value = self._values.get(name, default)
        if value in allowed:
            return value
        self.problems.append(f"{name} must be one of {', '.join(allowed)}")
        return default

    def number(self, name: str, default: int, lowest: int, highest: int) -> int:
        self._taken.add(name)
        number = _number(self._values.get(name, str(default)), lowest, highest)
        if number is None:
            self.problems.append(f"{name} must be a whole number from {lowest} to {highest}")
        return default if number is None else number

    def refuse_the_rest(self) -> None:
        for name, allowed in _ONLY.items():
            if self._values.get(name, allowed[0]).lower() not in allowed:
                self.problems.append(f"{name} can only be {' or '.join(allowed)} here")
        unknown = sorted({self._named(name) for name in self._values.keys() - self._taken - _ONLY.keys()})
        if unknown:
            honoured = ", ".join(sorted(self._taken | _ONLY.keys()))
            self.problems.append(f"not supported: {', '.join(unknown)} (supported are {honoured})")


def _decoded(text: str) -> str | None:
    if re.search("%(?![0-9A-Fa-f]{2})|%00", text):
        return None
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return None


def _is_encodable(text: str) -> bool:
    """Not so where the environment held bytes that are no UTF-8."""
    return not re.search("[\ud800-\udfff]", text)


def _number(text: str, lowest: int, highest: int) -> int | None:
    if not re.fullmatch("[0-9]{1,10}", text):
        return None
    return int(text) if lowest <= int(text) <= highest else None


def _account(given: _Given) -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        given.problems.append("it names no user, and the account this process runs under has no name either")
        return ""


def _hosts(given: _Given) -> tuple[Host, ...]:
    names = (given.text("host") or "").split(",")
    ports = (given.text("port") or "").split(",")
    if len(ports) == 1:
        ports *= len(names)
    if len(ports) != len(names):
        given.problems.append(f"{len(names)} hosts have {len(ports)} ports: give one for all, or one for each")
    return tuple(
        _host(given, number, name or "localhost", port or "5432") for number, (name, port) in enumerate(zip(names, ports, strict=False), 1)
    )


def _host(given: _Given, number: int, name: str, port_text: str) -> Host:
    port = _number(port_text, 1, 65_535)
    if port is None:
        given.problems.append(f"the port of host {number} must be a whole number from 1 to 65535")
    host = Host(name, port or 5432)
    if "@" in name:
        given.problems.append(f"host {number} has an @: in a user name or password it is written %40")
    elif host.is_unix and len(os.fsencode(host.unix_path)) > _LONGEST_UNIX_PATH:
        given.problems.append(f"host {number} is too long for a Unix socket: {_LONGEST_UNIX_PATH} bytes with /.s.PGSQL.{host.port}")
    elif not host.is_unix and not _is_host_name(name):
        given.problems.append(f"host {number} is no name of a host")
    return host


def _is_host_name(name: str) -> bool:
    """Whether the resolver can be asked for it at all; that it knows the answer is another matter."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


def _application_name(given: _Given) -> str | None:
    name, fallback = given.text("application_name"), given.text("fallback_application_name")
    return name or fallback


def _tls(given: _Given) -> Tls:
    root = given.text("sslrootcert")
    tls = Tls(
        mode=given.choice("sslmode", tuple(_WAYS), "verify-full" if root == "system" else "prefer"),
        root_certificate=root,
        certificate=given.text("sslcert"),
        key=given.text("sslkey"),
        key_password=given.text("sslpassword") or "",
        lowest_version=_VERSIONS[given.choice("ssl_min_protocol_version", tuple(_VERSIONS), "TLSv1.2")],
        highest_version=_VERSIONS[given.choice("ssl_max_protocol_version", tuple(_VERSIONS), "TLSv1.3")],
    )
    given.problems += [*_contradictions(tls), *_unusable_files(tls)]
    return tls


def _contradictions(tls: Tls) -> Iterator[str]:
    verifies = tls.mode.startswith("verify-")
    if verifies and tls.root_certificate is None:
        yield f"sslmode={tls.mode} needs sslrootcert: a file, or system for the certificates this machine trusts"
    if tls.root_certificate == "system" and tls.mode != "verify-full":
        yield "sslrootcert=system needs sslmode=verify-full: anybody can have a certificate that the machine trusts"
    elif tls.root_certificate is not None and not verifies and tls.mode != "require":
        yield "sslrootcert needs sslmode=verify-full, verify-ca or require: no other verifies"
    if (tls.certificate is None) != (tls.key is None):
        yield "sslcert and sslkey need each other"
    if tls.key_password and tls.key is None:
        yield "sslpassword needs sslkey"
    if tls.mode == "disable" and (tls.certificate or tls.key):
        yield "sslcert and sslkey need TLS, and sslmode=disable has none"
    if tls.lowest_version > tls.highest_version:
        yield "ssl_min_protocol_version is above ssl_max_protocol_version"


def _unusable_files(tls: Tls) -> Iterator[str]:
    for names, load in (("sslrootcert", tls.load_trusted), ("sslcert with sslkey and sslpassword", tls.load_own)):
        try:
            load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        except (OSError, ValueError) as error:
            yield f"{names} cannot be used ({_fault(error)})"


def _tcp_options(given: _Given) -> tuple[tuple[int, int, int], ...]:
    """Without TCP_NODELAY, a statement that pg8000 sends in two pieces would wait for the server's acknowledgement."""
    on = given.number("keepalives", 1, 0, 2**31 - 1) > 0
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(on))]
    for name, (option, highest) in _TCP_OPTIONS.items():
        value = given.number(name, 0, 0, highest)
        if option is not None and value:
            options.append((socket.IPPROTO_TCP, option, value))
        elif value:
            given.problems.append(f"{name} cannot be set on this system")
    return tuple(options)
