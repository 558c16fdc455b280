"""A primary and a synchronous standby of PostgreSQL that change places, and what clients write down meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgres import EmbeddedServer, connect
from service import wait_until

from ai_client import AIService, Completion, NewJob


class Member(EmbeddedServer):
    """One of the two servers: a primary of its own, or with `primary` a copy that follows it until it is promoted."""

    def __init__(self, primary: Member | None = None) -> None:
        super().__init__()
        self._primary = primary

    def crash(self) -> None:
        """SIGKILL for the server and all that it started, as when its machine dies."""
        pids = [int((self.folder / "data" / "postmaster.pid").read_text().split()[0])]
        pids += map(int, Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split())
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.folder / "data" / "postmaster.pid").unlink()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the end of all its processes")

    def promote(self) -> None:
        """Makes a standby the primary; returns when it takes writes."""
        self._run("pg_ctl", "-w", "-t", "60", "-D", "data", "promote")

    def follow(self, primary: Member) -> None:
        """Starts as a new copy of this primary, whatever it was before."""
        self._primary = primary
        shutil.rmtree(self.folder / "data")
        self._copy()
        self.start()

    def wait_for_standby(self) -> None:
        """From now on a commit is answered when the standby has it; returns when that holds for all commits so far."""
        with_all_rights = connect(self.url.replace("//plain", "//postgres"))
        try:
            with_all_rights.run("alter system set synchronous_standby_names = '*'")
            with_all_rights.run("select pg_reload_conf()")
            caught_up = "select 1 from pg_stat_replication where sync_state = 'sync' and flush_lsn >= pg_current_wal_lsn() - 1000000"
            wait_until(lambda: with_all_rights.run(caught_up), 30, "synchronous replication")
            # This commit comes after all of those and returns when the standby has it.
            with_all_rights.run("create table if not exists mark (at timestamptz)")
            with_all_rights.run("insert into mark values (now())")
        finally:
            with_all_rights.close()

    def _create(self) -> None:
        if self._primary is None:
            super()._create()
            return
        self.give_away(self.folder)
        self._programs = self._reachable_programs()
        self._copy()

    def _copy(self) -> None:
        assert self._primary is not None
        source = f"host=127.0.0.1 port={self._primary.port} user=postgres"
        self._run("pg_basebackup", "-d", source, "-D", "data", "--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(f"port={self.port}\n")


def create(url: str, number: int, folder: Path) -> None:
    """Creates jobs, some of them for the worker, until told to stop; writes down each that was acknowledged."""
    client, pause, made = AIService(url, retry_seconds=120), threading.Event(), 0
    with (folder / f"created-{number}").open("w", buffering=1) as written:
        while not (folder / "stop").exists():
            profile = "worker" if made % 5 == 0 else "claimers"
            job = NewJob(
                "owner", f"{number}/{made}", "t", profile, input={"prompt": f"{number}/{made}"}, idempotency_key=f"{number}/{made}"
            )
            written.write(f"{client.create_job(job).id}\n")
            made += 1
            pause.wait(0.01)


def claim_and_complete(url: str, number: int, folder: Path) -> None:
    """Claims and completes until told that nothing is left; writes down what each completion came to."""
    client = AIService(url, retry_seconds=120)
    with (folder / f"completed-{number}").open("w", buffering=1) as written:
        while not (folder / "drained").exists():
            claim = client.claim(f"claimer-{number}", limit=5, wait_seconds=0.5, model_profiles=["claimers"])
            results = [Completion(job.id, claim.claim_id, {"by": claim.claim_id}) for job in claim.jobs]
            for answer in client.complete_many(results) if results else ():
                written.write(f"{answer.id} {claim.claim_id} {answer.status}\n")


def written_down(folder: Path, what: str) -> list[list[str]]:
    """The lines that all clients of one kind have written so far, as words; half a line is left for later."""
    lines = [line for path in folder.glob(f"{what}-*") for line in path.read_text().splitlines(keepends=True)]
    return [line.split() for line in lines if line.endswith("\n")]


def rows(url: str, schema: str, statement: str) -> list[list[Any]]:
    """What a new connection to this server finds."""
    connection = connect(url, schema)
    try:
        return list(connection.run(statement) or [])
    finally:
        connection.close()
