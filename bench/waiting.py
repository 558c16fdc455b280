"""What waiting costs: how soon a waiting claim hears of a job, and what a process does while 200 workers wait."""

import json
import random
import re
import selectors
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import clients
import pg8000.native
from ground import Bench

from ai_internal.server.database_url import read_database_url

WORKERS = 200
# A claim that is sent is parked a few milliseconds later; on a machine with other work it may take some tens of them.
PARKED_SECONDS = 0.1
# Twice what a process goes on looking after the last thing that happened.
CALM_SECONDS = 2.0


# ── How soon ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pickup(bench: Bench) -> None:
    """From before a create is sent until a waiting claim has its answer: through one process, and across two."""
    rounds = max(20, int(200 * bench.scale))
    with bench.serving("pickup") as here, bench.serving("pickup") as there, waiter([here.port, there.port]) as worker:
        caller = clients.Client(here.port)
        found = [picked_up(caller, worker, at) for _ in range(rounds) for at in (0, 1)]
    drop(bench, "pickup")
    bench.table.add("create of one job, its own answer, median", statistics.median(answered for answered, _ in found) * 1000, "ms")
    for at, (name, target) in enumerate({"through one process": 10, "across two processes": 250}.items()):
        taken = sorted(heard * 1000 for _, heard in found[at::2])
        bench.table.add(f"create to claim {name}, p99 of {rounds}", taken[int(rounds * 0.99)], "ms")
        bench.table.judge(f"create to claim {name}, median", statistics.median(taken), target, unit="ms", most=True)


def picked_up(caller: clients.Client, worker: Connection, at: int) -> tuple[float, float]:
    """Seconds from the create of a job to its answer, and to the answer of the claim that waits at that service of the worker's."""
    worker.send(at)
    # By chance, so that the moments fall evenly between two looks of the process at the database.
    time.sleep(PARKED_SECONDS + random.random() * 0.25)
    assert not worker.poll(), "a claim was answered before there was a job"
    begun = time.monotonic()
    caller.create_one("pickup")
    answered_at = time.monotonic()
    # The clock is the system's, the same for both processes.
    return answered_at - begun, worker.recv() - begun


@contextmanager
def waiter(ports: Sequence[int]) -> Iterator[Connection]:
    """A process that is told at which of these services to wait for a job, and tells when it had one; None ends it."""
    context = get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=_wait, args=(its, ports), daemon=True)
    process.start()
    its.close()
    try:
        yield ours
        ours.send(None)
        process.join(30)
    finally:
        process.kill()


def _wait(told: Connection, ports: Sequence[int]) -> None:
    services = [clients.Client(port) for port in ports]
    while (at := told.recv()) is not None:
        claim_id, ids = services[at].claim("pickup", 1, wait_seconds=30)
        heard_at = time.monotonic()
        services[at].complete(claim_id, ids)
        told.send(heard_at)


# ── What it costs ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def crowd(bench: Bench) -> None:
    """What a process does while 200 workers wait: statements, time on a core, memory."""
    seconds = max(3, round(10 * bench.scale))
    log = StatementLog(bench.url)
    with bench.serving("crowd", DATABASE_URL=log.url) as server:
        time.sleep(CALM_SECONDS)
        bench.table.judge("memory of a fresh service", server.memory_mb(), 80, unit="MB", most=True)
        with crowd_at(server.port) as answered:
            time.sleep(CALM_SECONDS)
            begun, used = time.monotonic(), server.processor_seconds()
            statements = [log.of_a_second() for _ in range(seconds)]
            share = (server.processor_seconds() - used) / (time.monotonic() - begun)
            memory = server.memory_mb()
            assert not answered(0), "a claim was answered before there was a job"
            clients.Client(server.port).create("rare", 1)
            assert answered(10) == 1, "one job was for one of those who wait"
    _judge_crowd(bench, statements, share, memory)
    drop(bench, "crowd")


def _judge_crowd(bench: Bench, statements: Sequence[Sequence[str]], share: float, memory: float) -> None:
    kinds = Counter(name for names in statements for name in names)
    among = " ".join(f"{count}×{name}" for name, count in kinds.most_common())
    bench.table.add(f"{WORKERS} wait: statements, mean of {len(statements)} s", kinds.total() / len(statements), "/s", among=among)
    median = statistics.median(map(len, statements))
    bench.table.judge(f"{WORKERS} wait: statements, median of {len(statements)} s", median, 4.9, unit="/s", most=True)
    bench.table.judge(f"{WORKERS} wait: of one core", share * 100, 3, unit="%", most=True)
    bench.table.judge(f"{WORKERS} wait: memory", memory, 80, unit="MB", most=True)


@contextmanager
def crowd_at(port: int) -> Iterator[Callable[[float], int]]:
    """Connections with a claim each that waits, half of them for a profile; gives what counts those answered within so many seconds."""
    with selectors.DefaultSelector() as answers:
        for number in range(WORKERS):
            worker = socket.create_connection(("127.0.0.1", port), timeout=30)
            answers.register(worker, selectors.EVENT_READ)
            wish = {"worker_id": f"bench-{number}", "wait_seconds": 60} | ({"model_profiles": ["rare"]} if number % 2 else {})
            body = json.dumps(wish)
            worker.sendall(f"POST /api/v1/jobs/claim HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        try:
            yield lambda seconds: len(answers.select(seconds))
        finally:
            for key in list(answers.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()


class StatementLog:
    """What PostgreSQL notes of each statement of the sessions that come by `url`.

    The counters of pg_stat_database would not do: an idle session hands its own in up to ten seconds late, and they count everybody's.
    """

    def __init__(self, url: str) -> None:
        self.url = f"{url}{'&' if '?' in url else '?'}options=-c%20log_statement%3Dall"
        connection = read_database_url(url).connect()
        # Beside the data is where ai_embedded lets it write.
        self._log = Path(connection.run("show data_directory")[0][0]).with_name("postgresql.log")
        connection.close()

    def of_a_second(self) -> list[str]:
        """The statements of the next second, by the name in their comment."""
        begun = self._log.stat().st_size
        time.sleep(1)
        with self._log.open("rb") as log:
            log.seek(begun)
            return re.findall(r"LOG:  (?:execute|statement)[^:]*: (?:-- )?(\S+)", log.read().decode(errors="replace"))


# ── Words that the cases share ───────────────────────────────────────────────────────────────────────────────────────────────────


def drop(bench: Bench, schema: str) -> None:
    """Removes a case's schema."""
    connection: pg8000.native.Connection = read_database_url(bench.url).connect()
    connection.run(f"drop schema {schema} cascade")
    connection.close()


CASES: dict[str, Callable[[Bench], None]] = {"pickup": pickup, "crowd": crowd}
