"""What the benchmarks stand on: a database of their own, service processes, and the table of figures and targets."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

import clients

MAIN = Path(__file__).parent.parent / "ai_service.py"


class Table:
    """The figures of a run, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, figure: float, unit: str, **more: Any) -> float:
        """One figure; what stands beside it are shares (floats, 0 to 1) or words."""
        self.rows.append({"name": name, "figure": round(figure, 3), "unit": unit, **more})
        beside = "  ".join(f"{key} {value:.0%}" if isinstance(value, float) else f"{key} {value}" for key, value in more.items())
        print(f"{name:58} {figure:10,.{0 if figure >= 100 else 2}f} {unit:5} {beside}", flush=True)
        return figure

    def judge(self, name: str, figure: float, target: float, *, unit: str = "x", most: bool = False) -> None:
        """A figure beside its target, which it must reach, or with `most` must not pass."""
        reached = figure <= target if most else figure >= target
        self.rows.append({"name": name, "figure": round(figure, 3), "unit": unit, "target": target, "at_most": most, "reached": reached})
        sign = "≤" if most else "≥"
        print(f"{name:58} {figure:10,.2f} {unit:5} {sign} {target:g}{'' if reached else '   NOT REACHED'}", flush=True)

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        path.write_text(json.dumps(self.rows, indent=1) + "\n")


@attrs.frozen
class Server:
    """A service process."""

    port: int
    process: psutil.Process

    def processor_seconds(self) -> float:
        """What it has used of the cores so far."""
        user, system = self.process.cpu_times()[:2]
        return float(user + system)

    def memory_mb(self) -> float:
        """What it has in memory now."""
        return float(self.process.memory_info().rss) / (1 << 20)


def database_seconds() -> float:
    """What PostgreSQL's processes, started by this one, have used of the cores so far; those that have ended not."""
    used = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            used += sum(process.cpu_times()[:2]) if process.name() == "postgres" else 0.0
    return used


@attrs.frozen
class Bench:
    """What a case gets: the database, the table, and how large and how long it may be."""

    url: str
    table: Table
    seconds: float
    scale: float

    def size(self, full: int) -> int:
        """How many of something: the number of the target at scale 1."""
        return max(200, int(full * self.scale))

    @contextmanager
    def serving(self, schema: str, **settings: str) -> Iterator[Server]:
        """A service process on a schema of this name, which it makes."""
        environ = {
            **os.environ,
            "DATABASE_URL": self.url,
            "DATABASE_SCHEMA": schema,
            "HTTP_HOST": "127.0.0.1",
            "HTTP_PORT": "0",
            "DRAIN_SECONDS": "0",
            **settings,
        }
        process = subprocess.Popen([sys.executable, str(MAIN), "serve"], env=environ, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        try:
            port = next(int(found[1]) for line in process.stderr if (found := re.search(r"service_started.*?\bport=(\d+)", line)))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Server(port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(30)

    @contextmanager
    def without_queue(self, *url: str) -> Iterator[Server]:
        """A process that reads, checks and answers creates as the service does, without a queue; with a `url` it commits each."""
        process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("floor.py")), *url], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        try:
            yield Server(int(process.stdout.readline()), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(30)

    def rate(self, name: str, server: Server, count: int, work: clients.Work, seconds: float | None = None) -> float:
        """The rate of so many client processes doing this work, and what share of the machine's cores all had."""
        before, database, begun = server.processor_seconds(), database_seconds(), time.monotonic()
        load = clients.run(server.port, count, seconds or self.seconds, work)
        cores = (os.cpu_count() or 1) * (time.monotonic() - begun)
        shares = {
            "clients": load.share,
            "service": (server.processor_seconds() - before) / cores,
            "database": max(0.0, database_seconds() - database) / cores,
        }
        return self.table.add(f"{name}, {count} clients", load.rate, "/s", **shares, memory=f"{server.memory_mb():.0f} MB")
