"""A real PgBouncer in front of the tests' database, lending out its sessions for a transaction at a time."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from pg8000.exceptions import DatabaseError, InterfaceError
from postgres import connect, free_port
from service import wait_until

# Fewer than the connections of one service, so that each is lent other sessions all the time.
POOL_SIZE = 3

CONFIGURATION = """
[databases]
{name} = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 500
query_wait_timeout = 10
server_login_retry = 1
ignore_startup_parameters = extra_float_digits
logfile = {folder}/log
"""


def require(program: str, package: str) -> str:
    """The path of a program of a Debian package; without it the test is skipped, but in CI it fails."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        assert os.environ.get("CI") != "true", f"{program} is missing: .ci/run has to install {package}"
        pytest.skip(f"{program} is not installed (Debian's package {package})")
    return path


@contextmanager
def pgbouncer(url: str, first: str = "") -> Iterator[str]:
    """The libpq URL of the database of `url` behind a PgBouncer, ended and erased at the end. Each session begins with `first`."""
    program = require("pgbouncer", "pgbouncer")
    account = "nobody" if os.geteuid() == 0 else None  # It refuses root.
    folder, port = Path(tempfile.mkdtemp(prefix="ai-service-tests-")), free_port()
    process = None
    try:
        (folder / "pgbouncer.ini").write_text(
            CONFIGURATION.format(name=_database(url), target=_target(url, first), port=port, size=POOL_SIZE, folder=folder)
        )
        if account:
            shutil.chown(folder, account)
        identity = {"user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []} if account else {}
        process = subprocess.Popen(
            [program, "-q", str(folder / "pgbouncer.ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **identity
        )
        pooled = f"postgresql://{urlsplit(url).username or 'postgres'}:x@127.0.0.1:{port}/{_database(url)}"
        wait_until(lambda: _answers(pooled), 20, "an answer through PgBouncer")
        yield pooled
    finally:
        if process:
            process.kill()
            process.wait()
        shutil.rmtree(folder)


def _database(url: str) -> str:
    return urlsplit(url).path.lstrip("/") or "postgres"


def _target(url: str, first: str) -> str:
    parts = urlsplit(url)
    host = parse_qs(parts.query).get("host", [parts.hostname or "127.0.0.1"])[0]
    given = {
        "host": host,
        "port": parts.port or 5432,
        "dbname": _database(url),
        "user": unquote(parts.username or "postgres"),
        "password": unquote(parts.password or "x"),
    }
    return " ".join(f"{name}={value}" for name, value in given.items()) + (f" connect_query='{first}'" if first else "")


def _answers(url: str) -> bool:
    try:
        connect(url).close()
    except (InterfaceError, DatabaseError, OSError):
        return False
    return True
