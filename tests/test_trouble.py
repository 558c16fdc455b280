"""Trouble that others make: no connection left, no room on the disk, strangers' locks, clocks that are a day wrong.

trouble                 creates and claims           healthz  readyz  afterwards
connections exhausted   503 database_busy            200      503     by itself
no room for tables      503 database_unavailable     200      200     by itself; what needs no room is served meanwhile
no room for the log     503 database_unavailable     200      503     once PostgreSQL runs again
a stranger's lock       503 database_busy, in time   200      200     by itself
a wrong clock           as ever: time is the database's

`make trouble` runs all of them, as CI does; some are left out of the default suite for the time they take.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import attrs
import pg8000.native
import pytest
from fake_vllm import fake_vllm
from pgbouncer import require
from postgres import EmbeddedServer, connect
from service import INHERITED, Answer, Corner, Service, running_service, wait_until

JOBS = "/api/v1/jobs"
long = pytest.mark.skipif(os.environ.get("TROUBLE_ALL") != "1", reason="make trouble")
SCHEMA = "ai_service"


def refused(answer: Answer, code: str) -> bool:
    """Whether this is a 503 of that code; asserts that it says when to come again."""
    if answer.status != 503:
        return False
    assert answer.code == code, answer
    assert 1 <= int(answer.headers["Retry-After"]) <= 5
    return True


def timed(call: Callable[[], Any]) -> float:
    """Seconds that the call took."""
    begun = monotonic()
    call()
    return monotonic() - begun


def assert_health_is_quick(service: Service) -> None:
    assert service.api.get("/healthz").status == 200
    assert max(timed(lambda: service.api.get("/healthz")) for _ in range(5)) < 1


def assert_said_once(service: Service) -> None:
    """Whether no line of the log stands there twice, but for its time; a time limit may name each of its kinds."""
    said = [line.split(" ", 2)[2] for line in service.lines if "WARNING" in line or "ERROR" in line]
    assert len(said) == len(set(said)), service.log[-3000:]
    assert 0 < len(said) <= 10, service.log[-3000:]
    assert "Traceback" not in service.log


def is_ready(service: Service) -> bool:
    return service.api.get("/readyz").status == 200


# Connections


@pytest.fixture(scope="module")
def small() -> Iterator[EmbeddedServer]:
    """A server with few connections."""
    with EmbeddedServer(settings=("max_connections=15", "superuser_reserved_connections=2", "fsync=off")).running() as server:
        yield server


@contextmanager
def all_taken(server: EmbeddedServer) -> Iterator[None]:
    """A stranger takes every connection that is to be had."""
    with ExitStack() as stack:
        with pytest.raises(pg8000.native.DatabaseError, match="53300"):
            take_connections(server, stack)
        yield


def take_connections(server: EmbeddedServer, stack: ExitStack) -> None:
    while True:
        stack.callback(connect(server.url).close)


def test_a_service_that_finds_no_connection_begins_when_there_is_one(small: EmbeddedServer) -> None:
    with ExitStack() as stack:
        with all_taken(small):
            service = stack.enter_context(running_service(small.url, "begins_later"))
            corner = Corner(service.api)
            assert refused(service.api.get("/readyz"), "database_busy")
            assert refused(service.api.post(JOBS, corner.job()), "database_busy")
            assert refused(service.api.post(f"{JOBS}/claim", corner.claiming()), "database_busy")
            assert_health_is_quick(service)
        wait_until(lambda: is_ready(service), 20)
        assert corner.take()["attempt"] == 1
        assert "sqlstate=53300" in service.log
        assert_said_once(service)


@long
def test_fewer_connections_than_wanted_are_a_503_for_some_and_a_loss_for_nobody(small: EmbeddedServer) -> None:
    with ExitStack() as stack:
        service = stack.enter_context(running_service(small.url, SCHEMA))
        operator = connect(small.url.replace("//plain", "//postgres"))
        stack.callback(operator.close)
        operator.run("alter role plain connection limit 1")
        corner = Corner(service.api)
        try:
            with ThreadPoolExecutor(16) as pool:
                looks = list(pool.map(lambda _: service.api.get(JOBS, owner_service=corner.owner_service), range(200)))
            assert {look.status for look in looks if not refused(look, "database_busy")} <= {200}
            assert any(look.status == 503 for look in looks), "the limit was felt"
            assert_health_is_quick(service)
        finally:
            operator.run("alter role plain connection limit -1")
        assert [corner.take()["attempt"] for _ in range(3)] == [1] * 3
        assert_said_once(service)


# Room


@contextmanager
def little_room(megabytes: int, owner: str | int) -> Iterator[Path]:
    """A file system of that size in memory, in a folder of its own; the test is skipped where mounting is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = Path(tempfile.mkdtemp(prefix="ai-service-tests-"))
    try:
        if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={megabytes}m".encode()) != 0:
            pytest.skip(f"mounting a file system is not permitted here: {os.strerror(ctypes.get_errno())}")
        try:
            shutil.chown(folder, owner)
            yield folder
        finally:
            # Lazily: whoever still ends in there lets go of it.
            assert libc.umount2(str(folder).encode(), 2) == 0
    finally:
        folder.rmdir()


class CrampedServer(EmbeddedServer):
    """A server whose tables, or whose write-ahead log, lie in a little room."""

    def __init__(self, room: Path, what: str) -> None:
        super().__init__(settings=("max_wal_size=32MB", "min_wal_size=32MB"))
        self._room, self._what = room, what

    def _create(self) -> None:
        super()._create()
        if self._what == "log":
            log = self.folder / "data" / "pg_wal"
            subprocess.run(["cp", "-a", str(log), str(self._room)], check=True)
            shutil.rmtree(log)
            log.symlink_to(self._room / "pg_wal")

    def start(self) -> None:
        """Also has the tables of the tests in the room."""
        super().start()
        if self._what == "tables" and not list(self._room.iterdir()):
            operator = connect(self.url.replace("//plain", "//postgres").replace("/tests", "/postgres"))
            operator.run(f"create tablespace room location '{self._room}'")
            operator.run("alter database tests set tablespace room")
            operator.close()

    def fill(self) -> None:
        """Takes all the room there is."""
        with (self._room / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(b"x" * 65536)

    def make_room(self) -> None:
        """Gives it back, and starts the server where it ended for want of it."""
        (self._room / "filler").unlink()
        wait_until(lambda: self._answers() or self._has_ended(), 60, "the server's recovery or end")
        if self._has_ended():
            self.start()

    def _has_ended(self) -> bool:
        return not (self.folder / "data" / "postmaster.pid").exists()

    def _answers(self) -> bool:
        try:
            connect(self.url).close()
        except (pg8000.native.DatabaseError, pg8000.native.InterfaceError):
            return False
        return True


@long
@pytest.mark.parametrize("what", ["tables", "log"])
def test_a_full_disk_is_a_503_and_costs_nothing_that_was_answered(what: str) -> None:
    with ExitStack() as stack:
        room = stack.enter_context(little_room(60, "nobody" if os.geteuid() == 0 else os.geteuid()))
        server = CrampedServer(room, what)
        stack.enter_context(server.running())
        service = stack.enter_context(running_service(server.url, SCHEMA))
        corner = Corner(service.api)
        answered = [corner.create(input="kept")["id"]]
        server.fill()
        answered += create_until_refused(corner)
        if what == "tables":
            assert is_ready(service)
            assert corner.look({"id": answered[0]})["status"] == "pending", "what needs no room goes on"
            assert "database_refused sqlstate=53100" in service.log
        else:
            wait_until(lambda: not is_ready(service), 20, "that it says so")
        assert refused(service.api.post(JOBS, big(corner)), "database_unavailable")
        assert_health_is_quick(service)
        server.make_room()
        wait_until(lambda: is_ready(service), 20)
        wait_until(lambda: service.api.post(JOBS, big(corner)).status == 201, 30)
        assert all(corner.look({"id": identity})["id"] == identity for identity in answered)
        assert "Traceback" not in service.log
        if what == "tables":
            assert_said_once(service)


def big(corner: Corner) -> dict[str, Any]:
    # What cannot be compressed needs the room it seems to.
    return corner.job(input=os.urandom(400_000).hex())


def create_until_refused(corner: Corner) -> list[str]:
    """The ids of what was answered 201."""
    made: list[str] = []
    while not refused(answer := corner.api.post(JOBS, big(corner)), "database_unavailable"):
        assert answer.status == 201
        made.append(answer.json["id"])
        assert len(made) < 500
    return made


# Locks


@attrs.frozen
class Held:
    """What a stranger may hold, and the call that waits for it."""

    lock: str
    call: Callable[[Corner], Answer]


def create(corner: Corner) -> Answer:
    return corner.api.post(JOBS, corner.job())


def claim(corner: Corner) -> Answer:
    return corner.api.post(f"{JOBS}/claim", corner.claiming())


HELD = {
    "job": Held("lock table job in access exclusive mode", create),
    "ready": Held("lock table ready in access exclusive mode", create),
    "held": Held("lock table held in access exclusive mode", claim),
    "ended": Held("lock table ended in access exclusive mode", lambda corner: corner.api.get(JOBS, status="completed")),
    "advisory": Held("select pg_advisory_xact_lock(lock_key(n)) from generate_series(1, 5) n", create),
}


@long
@pytest.mark.parametrize("name", HELD)
def test_a_strangers_lock_is_a_503_in_time_and_passes(small: EmbeddedServer, name: str) -> None:
    with running_service(small.url, f"locked_{name}") as service, ThreadPoolExecutor(4) as pool:
        corner = Corner(service.api)
        kept = corner.create()
        stranger = connect(small.url, f"locked_{name}")
        stranger.run("begin")
        stranger.run(HELD[name].lock)
        try:
            begun = monotonic()
            stuck = [pool.submit(HELD[name].call, corner) for _ in range(4)]
            assert_health_is_quick(service)
            assert is_ready(service), "it serves what does not need the lock"
            assert all(refused(each.result(45), "database_busy") for each in stuck)
            assert monotonic() - begun < 30
        finally:
            stranger.run("rollback")
            stranger.close()
        wait_until(lambda: HELD[name].call(corner).status in (200, 201), 15)
        assert Corner(service.api).take()["attempt"] == 1
        assert corner.look(kept)["status"] == ("running" if name == "held" else "pending")
        assert_said_once(service)


@long
def test_a_stranger_who_holds_the_lock_of_the_schema_delays_the_start_only(small: EmbeddedServer) -> None:
    stranger = connect(small.url)
    stranger.run("begin")
    stranger.run("select pg_advisory_xact_lock(hashtextextended('ai_service schema started_late', 0))")
    with ExitStack() as stack:
        try:
            service = stack.enter_context(running_service(small.url, "started_late"))
            assert refused(service.api.get("/readyz"), "schema_missing")
            assert refused(create(Corner(service.api)), "schema_missing")
            assert_health_is_quick(service)
        finally:
            stranger.run("rollback")
            stranger.close()
        wait_until(lambda: is_ready(service), 20)
        assert Corner(service.api).take()["attempt"] == 1


# Clocks


@pytest.fixture(scope="session")
def clock() -> Callable[[str], dict[str, str]]:
    """The settings of a process whose clock is wrong by so much."""
    require("faketime", "faketime")
    [library] = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    # Else its own idea of the monotonic clock makes every wait of a thread too long.
    return lambda offset: {
        "LD_PRELOAD": str(library),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",
    }


@pytest.mark.parametrize("offset", [pytest.param("+1d", marks=long), "-1d"])
def test_a_service_whose_clock_is_a_day_wrong_keeps_the_databases_time(
    start_service: Callable[..., Service], clock: Callable[[str], dict[str, str]], offset: str
) -> None:
    service = start_service(**clock(offset))
    corner = Corner(service.api)
    now = datetime.now(UTC)
    assert abs(datetime.fromisoformat(service.lines[0].split(",")[0]).replace(tzinfo=UTC) - now) > timedelta(hours=12), "its clock is wrong"
    soon = (now + timedelta(seconds=2)).isoformat()
    later = corner.create(run_at=soon, model_profile="later", expires_at=(now + timedelta(minutes=5)).isoformat())
    job = corner.take(expires_at=(now + timedelta(minutes=5)).isoformat())
    assert abs(datetime.fromisoformat(job["created_at"]) - now) < timedelta(seconds=30)
    lease = datetime.fromisoformat(job["lease_expires_at"]) - datetime.now(UTC)
    assert abs(lease - timedelta(seconds=job["lease_seconds"])) < timedelta(seconds=30)
    assert 0.9 < timed(lambda: corner.claim(wait_seconds=1)) < 5
    assert corner.done(job, "complete", result=1)["status"] == "completed"
    [due] = corner.claim(model_profiles=["later"], wait_seconds=10)
    assert due["id"] == later["id"]
    assert datetime.now(UTC) >= datetime.fromisoformat(soon)
    assert service.api.get("/api/v1/stats").json["jobs"]["completed"] == 1
    assert [worker["worker_id"] for worker in service.api.get("/api/v1/workers").json["workers"]] == [corner.worker_id]


@pytest.mark.parametrize("offset", ["+1d", pytest.param("-1d", marks=long)])
def test_a_worker_whose_clock_is_a_day_wrong_does_its_work(
    corner: Corner, tmp_path: Path, clock: Callable[[str], dict[str, str]], offset: str
) -> None:
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    jobs = [corner.create(input={"prompt": "hello"}, expires_at=soon) for _ in range(3)]
    environ = {name: os.environ[name] for name in INHERITED if name in os.environ} | clock(offset)
    environ |= {"AI_SERVICE_URL": f"http://127.0.0.1:{corner.api.port}", "WORKER_SPOOL_DIR": str(tmp_path / "spool")}
    log = tmp_path / "log"
    with fake_vllm(model=corner.model_profile) as model, log.open("w") as written:
        command = [sys.executable, "-m", "ai_internal.worker.worker"]
        worker = subprocess.Popen(command, env={**environ, **model.environ}, stderr=written)
        try:
            wait_until(lambda: all(corner.look(job)["status"] == "completed" for job in jobs), 30)
        finally:
            worker.terminate()
            worker.wait(30)
    assert {corner.look(job)["attempt"] for job in jobs} == {1}
    today = datetime.now(UTC).date().isoformat()
    assert today not in log.read_text(), "its clock was wrong"
