"""DATABASE_URL: what is read from it, what is refused, and the connections it leads to, on real servers."""

from __future__ import annotations

import os
import pwd
import select
import shutil
import socket
import socketserver
import ssl
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key
from hypothesis import example, given
from hypothesis import strategies as st
from pg8000.exceptions import DatabaseError, InterfaceError
from pg8000.native import Connection
from postgres import EmbeddedServer

from ai_internal.server.database_url import DatabaseUnreachable, DatabaseUrlError, read_database_url

SECRET = "Pa55-word"
ME = pwd.getpwuid(os.geteuid()).pw_name

# ── What is read ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

READ: dict[str, dict[str, Any]] = {
    "postgresql://": {"hosts": [("localhost", 5432)], "user": ME, "password": None, "database": ME, "kind": "any"},
    "postgres://h": {"hosts": [("h", 5432)]},
    " postgresql://h/d\n": {"hosts": [("h", 5432)], "database": "d"},
    "postgresql://u:p@h:1/d": {"hosts": [("h", 1)], "user": "u", "password": "p", "database": "d"},
    "postgresql://u@h/": {"user": "u", "password": None, "database": "u"},
    "postgresql://:p@h/": {"user": ME, "password": "p"},
    "postgresql://u:@h/": {"password": None},
    "postgresql://u:a:b@h/": {"password": "a:b"},
    "postgresql://u:a?b@h/": {"password": "a?b"},
    "postgresql://u%40corp:%2F%3A%25%20%C3%A9@h/d%20b": {"user": "u@corp", "password": "/:% é", "database": "d b"},
    "postgresql://u:a+b@h/": {"password": "a+b"},
    "postgresql://h1:1,h2,h3:3/d": {"hosts": [("h1", 1), ("h2", 5432), ("h3", 3)]},
    "postgresql://h1,,h2/": {"hosts": [("h1", 5432), ("localhost", 5432), ("h2", 5432)]},
    "postgresql://[::1]:6000,[2001:db8::2]/d": {"hosts": [("::1", 6000), ("2001:db8::2", 5432)]},
    "postgresql://%2Frun%2Fpg:6000/d": {"hosts": [("/run/pg", 6000)]},
    "postgresql:///d?host=/run/pg&port=6000": {"hosts": [("/run/pg", 6000)], "database": "d"},
    "postgresql:///d?host=%2Frun%2Fa%20b&user=u": {"hosts": [("/run/a b", 5432)], "user": "u"},
    "postgresql://x/?host=h1,h2&port=6000": {"hosts": [("h1", 6000), ("h2", 6000)]},
    "postgresql://h1,h2/?port=1,2": {"hosts": [("h1", 1), ("h2", 2)]},
    "postgresql://h1,h2/?host=x": {"hosts": [("x", 5432)]},
    "postgresql://u:p@h/d?user=me@corp&password=q&dbname=e": {"user": "me@corp", "password": "q", "database": "e"},
    "postgresql://h?target_session_attrs=read-write&": {"kind": "read-write"},
    "postgresql://h/?application_name=a%26b": {"application_name": "a&b"},
    "postgresql://h/?fallback_application_name=f": {"application_name": "f"},
    "postgresql://h/?fallback_application_name=f&application_name=a": {"application_name": "a"},
    "postgresql://h/?options=-c%20statement_timeout%3D5s": {"options": "-c statement_timeout=5s"},
    "postgresql://h/?options=-c%20statement_timeout=5s": {"options": "-c statement_timeout=5s"},
    "postgresql://h/?connect_timeout=3": {"connect_timeout_seconds": 3},
    "postgresql://h/?gssencmode=disable&channel_binding=prefer&sslsni=1&client_encoding=UTF8": {"hosts": [("h", 5432)]},
}


@pytest.mark.parametrize("url", READ)
def test_url_is_read_as_libpq_reads_it(url: str) -> None:
    address = read_database_url(url)
    for name, expected in READ[url].items():
        found = getattr(address, name)
        assert ([(host.name, host.port) for host in found] if name == "hosts" else found) == expected, name


@pytest.mark.parametrize(
    ("query", "mode"),
    [("", "prefer"), ("?ssl=true", "require"), ("?sslmode=allow", "allow"), ("?sslrootcert=system", "verify-full")],
)
def test_sslmode_has_the_default_of_libpq(query: str, mode: str) -> None:
    assert read_database_url(f"postgresql://h/{query}").tls.mode == mode


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "": "must begin with",
    "host=h dbname=d": "must begin with",
    "postgresql+psycopg://h/d": "must begin with",
    "POSTGRES://h": "must begin with",
    "postgresql://h:0/": "port of host 1",
    "postgresql://h:65536/": "port of host 1",
    "postgresql://h,h:x/": "port of host 2",
    "postgresql://::1/": "port of host 1",
    "postgresql://[::1/": "host 1 has a bracket",
    "postgresql://h]/": "host 1 has a bracket",
    "postgresql://a..b/": "host 1 is no name",
    "postgresql://h1,h2,h3/?port=1,2": "3 hosts have 2 ports",
    f"postgresql:///?host=/{'x' * 100}": "too long for a Unix socket",
    "postgresql:///?host=%40abstract": "host 1 has an @",
    f"postgresql://u:a@{SECRET}@h/": "host 1 has an @",
    f"postgresql://u:1/{SECRET}@h/d": "behind the first /",
    f"postgresql://u:{SECRET}/x@h/d": "port of host 1",
    f"postgresql://u:%{SECRET}@h/d": "password is not percent-encoded",
    "postgresql://u:%00@h/": "password is not percent-encoded",
    "postgresql://%ff@h/": "user is not percent-encoded",
    "postgresql://h/\0": "characters that no URL can have",
    "postgresql://h/\udcff": "characters that no URL can have",
    f"postgresql://h/?password=x&{SECRET}": "query parameter 2 has no =",
    f"postgresql://h/?password=x&{SECRET}=y": "may be a part of a password",
    "postgresql://h/?colour=red": "not supported: colour (supported are application_name, ",
    "postgresql://h/?passfile=/x&service=s": "not supported: passfile, service",
    "postgresql://h/?hostaddr=127.0.0.1": "not supported: hostaddr",
    "postgresql://h/?sslcrl=/x": "not supported: sslcrl",
    "postgresql://h/?require_auth=scram-sha-256": "not supported: require_auth",
    "postgresql://h/?ssl=false": "not supported: ssl ",
    "postgresql://h/?user=a&user=b": "user is given twice",
    "postgresql://h/?gssencmode=require": "gssencmode can only be disable or prefer",
    "postgresql://h/?channel_binding=require": "channel_binding can only be prefer",
    "postgresql://h/?sslnegotiation=direct": "sslnegotiation can only be postgres",
    "postgresql://h/?load_balance_hosts=random": "load_balance_hosts can only be disable",
    "postgresql://h/?client_encoding=latin1": "client_encoding can only be",
    "postgresql://h/?target_session_attrs=master": "target_session_attrs must be one of any, read-write,",
    "postgresql://h/?sslmode=verify": "sslmode must be one of disable, allow, prefer,",
    "postgresql://h/?sslmode=": "sslmode must be one of",
    "postgresql://h/?connect_timeout=0": "connect_timeout must be a whole number from 1",
    "postgresql://h/?connect_timeout=5s": "connect_timeout must be a whole number from 1",
    "postgresql://h/?keepalives_idle=-1": "keepalives_idle must be a whole number",
    "postgresql://h/?sslmode=verify-full": "sslmode=verify-full needs sslrootcert",
    "postgresql://h/?sslmode=verify-ca": "sslmode=verify-ca needs sslrootcert",
    "postgresql://h/?sslmode=require&sslrootcert=system": "sslrootcert=system needs sslmode=verify-full",
    "postgresql://h/?sslrootcert=/x": "sslrootcert needs sslmode=verify-full, verify-ca or require",
    "postgresql://h/?sslmode=verify-ca&sslrootcert=/no/such": "sslrootcert cannot be used (No such file",
    "postgresql://h/?sslcert=/x": "sslcert and sslkey need each other",
    "postgresql://h/?sslpassword=x": "sslpassword needs sslkey",
    "postgresql://h/?sslmode=disable&sslcert=/x&sslkey=/x": "sslmode=disable has none",
    "postgresql://h/?ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2": "is above",
    "postgresql://h/?ssl_min_protocol_version=TLSv1": "ssl_min_protocol_version must be one of TLSv1.2, TLSv1.3",
}


@pytest.mark.parametrize("url", REFUSED)
def test_url_is_refused_with_the_reason_and_no_secret(url: str) -> None:
    with pytest.raises(DatabaseUrlError) as refused:
        read_database_url(url)
    assert REFUSED[url] in str(refused.value)
    assert SECRET not in str(refused.value)


def test_every_problem_is_said_at_once() -> None:
    with pytest.raises(DatabaseUrlError) as refused:
        read_database_url("postgresql://u:%zz@h:x/?sslmode=on&connect_timeout=soon&colour=red&gssencmode=require")
    assert len(refused.value.problems) == 6
    assert str(refused.value) == "; ".join(refused.value.problems)


@given(st.text() | st.text(alphabet="postgresql:/?@&=%[],.-_ah01", max_size=60).map("postgresql://".__add__))
@example("postgresql://[]/")
@example("postgresql://.a/")
@example("postgresql://h/?sslcert=&sslkey=%00")
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with suppress(DatabaseUrlError):
        assert read_database_url(text).hosts


@given(user=st.text(min_size=1), password=st.text(min_size=1), database=st.text(min_size=1))
def test_percent_encoding_carries_any_text(user: str, password: str, database: str) -> None:
    if "\0" in user + password + database:
        return
    address = read_database_url(f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@h/{quote(database, safe='')}")
    assert (address.user, address.password, address.database) == (user, password, database)


def test_an_address_shows_hosts_and_database_only() -> None:
    url = f"postgresql://somebody:{SECRET}@h1,[::1]:2,%2Frun%2Fpg:3/d%2Fb?options=-chidden.x=1&sslpassword=&application_name=hidden"
    address = read_database_url(url)
    assert address.shown == "postgresql://h1:5432,[::1]:2,%2Frun%2Fpg:3/d%2Fb"
    assert repr(address) == str(address) == f"DatabaseAddress({address.shown})"


# ── Servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

HBA = """
hostssl   all certified 127.0.0.1/32 cert
hostssl   all encrypted 127.0.0.1/32 trust
hostnossl all encrypted 127.0.0.1/32 reject
hostssl   all clear     127.0.0.1/32 reject
hostnossl all clear     127.0.0.1/32 trust
host      all scram     127.0.0.1/32 scram-sha-256
host      all md5       127.0.0.1/32 md5
host      all all       127.0.0.1/32 trust
"""

ROLES = f"""
create role certified login; create role encrypted login; create role clear login;
create role scram login password '{SECRET}';
set password_encryption = md5;
create role md5 login password '{SECRET}';
"""


class NativeServer(EmbeddedServer):
    """A server of the PostgreSQL that the machine has: the embedded one is built without TLS."""

    def _program(self, name: str) -> Path:
        return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))


def put(server: EmbeddedServer, name: str, content: str) -> str:
    """A file in the folder of the server that it alone may read; gives its path."""
    path = server.folder / name
    path.write_text(content)
    path.chmod(0o600)
    server.give_away(path)
    return str(path)


@pytest.fixture(scope="session")
def primary() -> Iterator[int]:
    """The port of an ordinary server without TLS."""
    with EmbeddedServer(settings=("fsync=off",)).running() as server:
        yield server.port


@pytest.fixture(scope="session")
def socket_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sockets ", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def read_only(socket_folder: Path) -> Iterator[int]:
    """The port of a server whose sessions are read-only; it listens on a Unix socket too."""
    settings = ("fsync=off", "default_transaction_read_only=on", f"unix_socket_directories='\"{socket_folder}\"'")
    with EmbeddedServer(settings=settings).running() as server:
        yield server.port


@pytest.fixture(scope="session")
def standby() -> Iterator[int]:
    """The port of a server in recovery, as a standby is that has lost its primary."""
    with EmbeddedServer(settings=("fsync=off",)).running() as server:
        server.stop()
        put(server, "data/standby.signal", "")
        server.start()
        yield server.port


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, its certificates for the server `localhost` and the client `certified`, and another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "stranger.pem"))
    for name, issued in (("server", authority.issue_cert("localhost")), ("client", authority.issue_cert(common_name="certified"))):
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        (folder / f"{name}.pem").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    key = load_pem_private_key((folder / "client.key").read_bytes(), None)
    (folder / "client.locked").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"k3y")))
    return folder


@pytest.fixture(scope="session")
def native_tls(certificates: Path) -> Iterator[int]:
    """The port of a server with TLS and the rules of HBA."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("this machine has no PostgreSQL with TLS: apt-get install postgresql")
    server = NativeServer()
    settings = {f"ssl_{name}_file": put(server, name, (certificates / file).read_text()) for name, file in SERVER_FILES.items()}
    # Only now, because the files lie in the folder that the server has.
    server.settings = ("fsync=off", "ssl=on", *(f"{name}='{path}'" for name, path in settings.items()))
    with server.running():
        with closing(Connection("postgres", port=server.port, database="postgres", timeout=30)) as connection:
            connection.run(ROLES)
        (server.folder / "data" / "pg_hba.conf").write_text(HBA)
        server.stop()
        server.start()
        yield server.port


SERVER_FILES = {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"}


@pytest.fixture(scope="session")
def front_tls(primary: int, certificates: Path) -> Iterator[int]:
    """The port of a front that ends TLS and passes on to a PostgreSQL without it, as poolers do."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")

    def serve(client: socket.socket) -> None:
        if client.recv(8) == struct.pack("!ii", 8, 80877103):
            client.sendall(b"S")
            address = ("127.0.0.1", primary)
            # A client that refuses the certificate is no error of the front.
            with suppress(OSError), context.wrap_socket(client, server_side=True) as encrypted, socket.create_connection(address) as server:
                pass_on(encrypted, server)

    with listening(serve) as port:
        yield port


def pass_on(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Until one of them closes."""
    while True:
        ready = [client] if client.pending() else select.select([client, server], [], [], 30)[0]
        for source, target in ((client, server), (server, client)):
            if source in ready:
                data = source.recv(65536)
                if not data:
                    return
                target.sendall(data)


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server of `serve`, which gets each connection in a thread; yields its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            serve(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


@pytest.fixture(params=["native_tls", "front_tls"])
def tls(request: pytest.FixtureRequest) -> int:
    """The port of a server with TLS and a certificate for `localhost`."""
    return int(request.getfixturevalue(request.param))


@contextmanager
def session(url: str, **arguments: Any) -> Iterator[Connection]:
    with closing(read_database_url(url).connect(**arguments)) as connection:
        yield connection


def failure(url: str, **arguments: Any) -> DatabaseUnreachable:
    with pytest.raises(DatabaseUnreachable) as raised:
        read_database_url(url).connect(**arguments)
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    return raised.value


def show(connection: Connection, setting: str) -> Any:
    return connection.run("select current_setting(:setting)", setting=setting)[0][0]


def refusing(sqlstate: str, message: str = "no") -> Callable[[socket.socket], None]:
    """A server that answers every start with this error."""
    fields = b"".join(f"{name}{value}\0".encode() for name, value in {"S": "FATAL", "C": sqlstate, "M": message}.items()) + b"\0"

    def serve(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)

    return serve


# ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_reach_the_session(primary: int) -> None:
    options = quote('-c statement_timeout=1234ms -c search_path="a\\ b"')
    with session(f"postgresql://plain@127.0.0.1:{primary}/tests?options={options}&application_name=%C3%A9") as connection:
        assert connection.run("select current_user, current_database()") == [["plain", "tests"]]
        assert show(connection, "statement_timeout") == "1234ms"
        assert show(connection, "search_path") == '"a b"'
        assert show(connection, "application_name") in ("é", "\\xc3\\xa9")
        assert show(connection, "client_encoding") == "UTF8"


def test_application_name_of_the_url_goes_before_the_callers(primary: int) -> None:
    url = f"postgresql://plain@127.0.0.1:{primary}/tests?sslmode=disable"
    for given_url, arguments, expected in (
        (url, {}, "ai_service"),
        (url, {"application_name": "check"}, "check"),
        (f"{url}&application_name=mine", {"application_name": "check"}, "mine"),
    ):
        with session(given_url, **arguments) as connection:
            assert show(connection, "application_name") == expected


@pytest.mark.parametrize("form", ["postgresql://postgres@{}:{}/", "postgresql://postgres@/?host={}&port={}&sslmode=require"])
def test_unix_socket_serves_without_tls(read_only: int, socket_folder: Path, form: str) -> None:
    with session(form.format(quote(str(socket_folder), safe=""), read_only)) as connection:
        assert connection.run("select inet_client_addr()") == [[None]]


def test_text_beyond_ascii_passes_in_a_database_without_encoding(primary: int) -> None:
    url = f"postgresql://postgres@127.0.0.1:{primary}"
    with session(f"{url}/postgres") as connection:
        connection.run("create database bytes encoding 'SQL_ASCII' template template0")
    with session(f"{url}/bytes") as connection:
        assert connection.run("select :text::text", text="Füße €") == [["Füße €"]]


def test_keepalive_is_set_as_asked(primary: int) -> None:
    query = "keepalives_idle=7&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=9000"
    expected = {"TCP_KEEPIDLE": 7, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 9000, "TCP_NODELAY": 1}
    with session(f"postgresql://plain@127.0.0.1:{primary}/tests?{query}") as connection:
        for name, value in expected.items():
            assert connection._usock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name


@pytest.mark.parametrize(("query", "expected"), [("", 1), ("?keepalives=1", 1), ("?keepalives=0", 0)])
def test_keepalive_is_on_unless_switched_off(primary: int, query: str, expected: int) -> None:
    with session(f"postgresql://plain@127.0.0.1:{primary}/tests{query}") as connection:
        assert connection._usock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == expected


def test_open_connection_does_not_wait_for_ever(primary: int) -> None:
    with session(f"postgresql://plain@127.0.0.1:{primary}/tests", timeout_seconds=0.2) as connection:
        started = time.monotonic()
        with pytest.raises((TimeoutError, InterfaceError)):
            connection.run("select pg_sleep(20)")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("role", ["scram", "md5"])
@pytest.mark.parametrize("sslmode", ["require", "disable"])
def test_password_lets_in(native_tls: int, role: str, sslmode: str) -> None:
    with session(f"postgresql://{role}:{SECRET}@localhost:{native_tls}/postgres?sslmode={sslmode}") as connection:
        assert connection.run("select current_user::text") == [[role]]


# ── Hosts that give no session ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("user", "hint"), [(f"scram:{SECRET}x", False), ("scram", True), ("md5", True)])
def test_wrong_password_is_told_by_its_sqlstate(native_tls: int, user: str, hint: bool) -> None:
    failed = failure(f"postgresql://{user}@127.0.0.1:{native_tls},127.0.0.1:1/postgres")
    assert failed.sqlstate == "28P01"
    assert len(failed.failures) == 1, "the next host is not tried"
    assert "scram" not in str(failed), "the user is not named"
    assert ("the URL has no password" in str(failed)) == hint


def test_database_that_is_not_there_is_told_by_its_sqlstate(primary: int) -> None:
    assert failure(f"postgresql://plain@127.0.0.1:{primary}/nowhere").sqlstate == "3D000"


def test_every_host_is_named_with_its_reason(primary: int) -> None:
    unknown_kind = "target_session_attrs=standby"
    failed = failure(f"postgresql://plain:{SECRET}@127.0.0.1:1,127.0.0.1:{primary},%2Fnowhere/tests?{unknown_kind}")
    reasons = {each.host: each.reason for each in failed.failures}
    assert list(reasons) == ["127.0.0.1:1", f"127.0.0.1:{primary}", "%2Fnowhere:5432"]
    assert reasons["127.0.0.1:1"] == "Connection refused"
    assert reasons["%2Fnowhere:5432"] == "No such file or directory"
    assert reasons[f"127.0.0.1:{primary}"] == "it is a primary, read-write, and target_session_attrs asks for standby"
    assert all(f"{host}: {reason}" in str(failed) for host, reason in reasons.items())


def test_host_that_is_away_is_passed_over(primary: int) -> None:
    with session(f"postgresql://plain@127.0.0.1:1,127.0.0.1:{primary}/tests") as connection:
        assert show(connection, "port") == str(primary)


@pytest.mark.parametrize(("sqlstate", "passed_over"), [("57P03", True), ("53300", True), ("28000", False), ("28P01", False)])
def test_host_that_cannot_serve_now_is_passed_over(primary: int, sqlstate: str, passed_over: bool) -> None:
    with listening(refusing(sqlstate)) as port:
        url = f"postgresql://plain@127.0.0.1:{port},127.0.0.1:{primary}/tests?sslmode=disable"
        if passed_over:
            with session(url) as connection:
                assert show(connection, "port") == str(primary)
        else:
            assert failure(url).sqlstate == sqlstate


def test_user_is_left_out_of_what_a_server_says() -> None:
    with listening(refusing("28000", 'role "bob.b" is not permitted, not even as bob.b; bob.bo is')) as port:
        failed = failure(f"postgresql://bob.b@127.0.0.1:{port}/d?sslmode=disable")
    assert 'role "…" is not permitted, not even as …; bob.bo is (SQLSTATE 28000)' in str(failed)


@pytest.mark.parametrize("sslmode", ["disable", "prefer", "require"])
def test_server_that_never_answers_is_given_up(sslmode: str) -> None:
    over = threading.Event()

    def serve(client: socket.socket) -> None:
        over.wait(30)

    with listening(serve) as port:
        started = time.monotonic()
        failed = failure(f"postgresql://u:{SECRET}@127.0.0.1:{port}/d?connect_timeout=1&sslmode={sslmode}")
        over.set()
    assert "no answer within 1 s" in str(failed)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("sslmode", ["disable", "prefer"])
@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"R\0\0\0\x08\0\0\0\x0b", b"v\0\0\0\x04", b"D\0\0\0\x06\0\1", b"N\0", b"S\0\0"]
)
def test_server_that_is_no_postgresql_is_a_failure_like_others(sslmode: str, answer: bytes) -> None:
    def serve(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(answer)

    with listening(serve) as port:
        failed = failure(f"postgresql://u:{SECRET}@127.0.0.1:{port}/d?connect_timeout=5&sslmode={sslmode}")
    assert failed.sqlstate is None
    assert failed.failures[0].reason


def test_error_that_the_caller_was_handling_has_no_part_in_the_failure(primary: int) -> None:
    with session(f"postgresql://plain@127.0.0.1:{primary}/tests") as connection:
        try:
            connection.run("select 1/0")
        except DatabaseError:
            failed = failure("postgresql://plain@127.0.0.1:1/tests")
    assert (failed.sqlstate, failed.failures[0].reason) == (None, "Connection refused")


# ── target_session_attrs ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "hosts", "chosen"),
    [
        ("any", ["standby", "primary"], "standby"),
        ("read-write", ["standby", "read_only", "primary"], "primary"),
        ("read-write", ["primary", "standby"], "primary"),
        ("read-write", ["standby", "read_only"], None),
        ("read-only", ["primary", "read_only", "standby"], "read_only"),
        ("read-only", ["primary", "standby", "read_only"], "standby"),
        ("read-only", ["primary"], None),
        ("primary", ["standby", "read_only", "primary"], "read_only"),
        ("primary", ["standby"], None),
        ("standby", ["primary", "read_only", "standby"], "standby"),
        ("standby", ["primary", "read_only"], None),
        ("prefer-standby", ["primary", "standby"], "standby"),
        ("prefer-standby", ["read_only", "primary"], "read_only"),
    ],
)
def test_first_host_of_the_kind_is_chosen(request: pytest.FixtureRequest, kind: str, hosts: list[str], chosen: str | None) -> None:
    ports = {name: request.getfixturevalue(name) for name in hosts}
    listed = ",".join(f"127.0.0.1:{port}" for port in ports.values())
    url = f"postgresql://postgres@{listed}/postgres?target_session_attrs={kind}"
    if chosen is None:
        assert [each.host for each in failure(url).failures] == listed.split(",")
    else:
        with session(url) as connection:
            assert show(connection, "port") == str(ports[chosen])


def test_prefer_standby_names_each_host_once() -> None:
    assert len(failure("postgresql://127.0.0.1:1/d?target_session_attrs=prefer-standby").failures) == 1


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

ENCRYPTED, CLEAR, REFUSED_CERTIFICATE = "encrypted", "clear", "certificate is refused"


@pytest.mark.parametrize(
    ("host", "query", "expected"),
    [
        ("localhost", "sslmode=verify-full&sslrootcert={}/ca.pem", ENCRYPTED),
        ("127.0.0.1", "sslmode=verify-full&sslrootcert={}/ca.pem", REFUSED_CERTIFICATE),
        ("localhost", "sslmode=verify-full&sslrootcert={}/stranger.pem", REFUSED_CERTIFICATE),
        ("localhost", "sslrootcert=system", REFUSED_CERTIFICATE),
        ("localhost", "sslmode=verify-ca&sslrootcert={}/ca.pem", ENCRYPTED),
        ("127.0.0.1", "sslmode=verify-ca&sslrootcert={}/ca.pem", ENCRYPTED),
        ("localhost", "sslmode=verify-ca&sslrootcert={}/stranger.pem", REFUSED_CERTIFICATE),
        ("127.0.0.1", "sslmode=require", ENCRYPTED),
        ("127.0.0.1", "sslmode=require&sslrootcert={}/ca.pem", ENCRYPTED),
        ("localhost", "sslmode=require&sslrootcert={}/stranger.pem", REFUSED_CERTIFICATE),
        ("127.0.0.1", "ssl=true", ENCRYPTED),
        ("127.0.0.1", "sslmode=prefer", ENCRYPTED),
        ("127.0.0.1", "", ENCRYPTED),
        ("localhost", "sslmode=require&ssl_max_protocol_version=TLSv1.2", ENCRYPTED),
        ("localhost", "sslmode=require&ssl_min_protocol_version=TLSv1.3", ENCRYPTED),
    ],
)
def test_sslmode_with_a_server_that_has_tls(tls: int, certificates: Path, host: str, query: str, expected: str) -> None:
    url = f"postgresql://postgres@{host}:{tls}/postgres?{query.format(certificates)}"
    if expected == ENCRYPTED:
        with session(url) as connection:
            assert connection._usock.version().startswith("TLSv1.")
            assert connection.run("select 1") == [[1]]
    else:
        assert expected in str(failure(url))


def test_system_means_the_certificates_the_machine_trusts(tls: int, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    with session(f"postgresql://postgres@localhost:{tls}/postgres?sslrootcert=system") as connection:
        assert connection.run("select 1") == [[1]]
    assert "certificate is refused" in str(failure(f"postgresql://postgres@127.0.0.1:{tls}/postgres?sslrootcert=system"))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", CLEAR),
        ("sslmode=prefer", CLEAR),
        ("sslmode=allow", CLEAR),
        ("sslmode=disable", CLEAR),
        ("sslmode=require", "the server offers no TLS"),
        ("sslmode=verify-ca&sslrootcert={}/ca.pem", "the server offers no TLS"),
        ("sslmode=verify-full&sslrootcert={}/ca.pem", "the server offers no TLS"),
    ],
)
def test_sslmode_with_a_server_that_has_no_tls(primary: int, certificates: Path, query: str, expected: str) -> None:
    url = f"postgresql://plain@localhost:{primary}/tests?{query.format(certificates)}"
    if expected == CLEAR:
        with session(url) as connection:
            assert connection.run("select 1") == [[1]]
    else:
        assert expected in str(failure(url))


@pytest.mark.parametrize(
    ("role", "sslmode", "encrypted"),
    [
        ("postgres", "disable", False),
        ("postgres", "allow", False),
        ("postgres", "prefer", True),
        ("encrypted", "allow", True),
        ("clear", "prefer", False),
    ],
)
def test_the_other_way_is_taken_where_the_server_refuses_one(native_tls: int, role: str, sslmode: str, encrypted: bool) -> None:
    with session(f"postgresql://{role}@localhost:{native_tls}/postgres?sslmode={sslmode}") as connection:
        assert connection.run("select ssl from pg_stat_ssl where pid = pg_backend_pid()") == [[encrypted]]


@pytest.mark.parametrize(("role", "sslmode"), [("encrypted", "disable"), ("clear", "require")])
def test_no_other_way_is_taken_than_sslmode_allows(native_tls: int, role: str, sslmode: str) -> None:
    assert failure(f"postgresql://{role}@localhost:{native_tls}/postgres?sslmode={sslmode}").sqlstate == "28000"


def test_both_ways_that_failed_are_explained(native_tls: int) -> None:
    failed = failure(f"postgresql://certified@localhost:{native_tls}/elsewhere?sslmode=prefer")
    assert "with TLS: " in str(failed)
    assert "without TLS: " in str(failed)


@pytest.mark.parametrize("key", ["client.key", "client.locked&sslpassword=k3y"])
def test_client_certificate_lets_in(native_tls: int, certificates: Path, key: str) -> None:
    query = f"sslmode=verify-full&sslrootcert={certificates}/ca.pem&sslcert={certificates}/client.pem&sslkey={certificates}/{key}"
    with session(f"postgresql://certified@localhost:{native_tls}/postgres?{query}") as connection:
        assert connection.run("select current_user::text") == [["certified"]]


@pytest.mark.parametrize("key", ["client.locked", "client.locked&sslpassword=wrong", "server.key", "ca.pem"])
def test_key_that_cannot_be_used_is_refused(certificates: Path, key: str) -> None:
    with pytest.raises(DatabaseUrlError, match="sslcert with sslkey and sslpassword cannot be used"):
        read_database_url(f"postgresql://h/?sslcert={certificates}/client.pem&sslkey={certificates}/{key}")


def test_renewed_certificate_is_taken_up_and_a_missing_one_explained(front_tls: int, certificates: Path, tmp_path: Path) -> None:
    root = tmp_path / "root.pem"
    shutil.copy(certificates / "stranger.pem", root)
    address = read_database_url(f"postgresql://plain@localhost:{front_tls}/tests?sslmode=verify-full&sslrootcert={root}")
    with pytest.raises(DatabaseUnreachable, match="certificate is refused"):
        address.connect()
    shutil.copy(certificates / "ca.pem", root)
    address.connect().close()
    root.unlink()
    with pytest.raises(DatabaseUnreachable, match=r"sslrootcert, sslcert or sslkey cannot be used \(No such file"):
        address.connect()
