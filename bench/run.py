"""How fast the service is over HTTP, beside what a user would pick instead, in one run on one machine.

    python bench/run.py [--seconds 8] [--jobs 20000] [--cases lives,creates,drain] [--peers pgbench,graphile,procrastinate] [--json FILE]

Starts an embedded PostgreSQL with durable commits and one service process. The load comes from processes of its own (bench/clients.py);
the share of the cores that they and the service take stands beside each figure. Jobs have 1 KB of input and 2 KB of result.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import clients
import peers
import psutil

import ai_embedded

MAIN = Path(__file__).parent.parent / "ai_service.py"


class Table:
    """The figures of a run, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, figure: float, unit: str, **more: Any) -> float:
        """One line."""
        self.rows.append({"name": name, "figure": round(figure, 2), "unit": unit, **more})
        beside = "  ".join(f"{key} {value:.0%}" if isinstance(value, float) else f"{key} {value}" for key, value in more.items())
        print(f"{name:44} {figure:10,.0f} {unit:6} {beside}", flush=True)
        return figure

    def judge(self, name: str, ratio: float, target: float) -> None:
        """A ratio beside its target."""
        self.rows.append({"name": name, "ratio": round(ratio, 3), "target": target, "reached": ratio >= target})
        print(f"{name:44} {ratio:10.2f} x      target {target:g}{'' if ratio >= target else '  NOT REACHED'}", flush=True)


@contextmanager
def serving(url: str) -> Iterator[tuple[int, psutil.Process]]:
    """A service process on this database: its port, and the process."""
    environ = {
        **os.environ,
        "DATABASE_URL": url,
        "DATABASE_SCHEMA": "bench",
        "HTTP_HOST": "127.0.0.1",
        "HTTP_PORT": "0",
        "DRAIN_SECONDS": "0",
    }
    process = subprocess.Popen([sys.executable, str(MAIN), "serve"], env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"service_started.*?\bport=(\d+)", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def measured(table: Table, name: str, server: tuple[int, psutil.Process], count: int, seconds: float, work: clients.Work) -> float:
    """The rate of so many clients doing this work."""
    port, process = server
    before = sum(process.cpu_times()[:2])
    load = clients.run(port, count, seconds, work)
    share = (sum(process.cpu_times()[:2]) - before) / load.seconds / (os.cpu_count() or 1)
    memory = f"{process.memory_info().rss >> 20} MB"
    return table.add(f"{name}, {count} clients", load.rate, "/s", clients=load.share, service=share, memory=memory)


def lives(table: Table, server: tuple[int, psutil.Process], seconds: float, found: dict[str, float]) -> None:
    """Whole lives in batches of 100."""
    found["life"] = max(measured(table, "life in batches of 100", server, count, seconds, clients.lives) for count in (1, 2, 4))


def creates(table: Table, server: tuple[int, psutil.Process], seconds: float, found: dict[str, float]) -> None:
    """Creates one by one against the health route, in turns."""
    ratios = []
    for _ in range(3):
        health = measured(table, "GET /healthz", server, 16, seconds / 2, clients.health)
        ratios.append(measured(table, "POST /jobs one by one", server, 16, seconds / 2, clients.creates) / health)
    found["create"] = sorted(ratios)[1]
    table.judge("POST /jobs against /healthz (median of 3)", found["create"], 0.6)


def drain(table: Table, server: tuple[int, psutil.Process], seconds: float, found: dict[str, float]) -> None:
    """Workers that do one job at a time."""
    filler = clients.Client(server[0])
    for count in (4, 16):
        for _ in range(int(seconds * 15)):
            filler.create("drain", 100)
        found[f"drain {count}"] = measured(table, "claim 1, complete 1", server, count, seconds, clients.drain)
        while (claimed := filler.claim("drain", 1000))[1]:
            filler.complete(*claimed)
    table.judge("16 workers against 4", found["drain 16"] / found["drain 4"], 1.0)


CASES = {"lives": lives, "creates": creates, "drain": drain}


def compare(table: Table, url: str, names: list[str], jobs: int, found: dict[str, float]) -> None:
    """The peers, and what of theirs is reached."""
    rates = {}
    for name in names:
        rates[name] = peers.run(name, url, f"bench_{name}", jobs)
        for what, rate in rates[name].items():
            table.add(f"{name} {what}", rate, "/s")
    for name, what, target in (("graphile", "life", 1.0), ("pgbench", "life", 0.6)):
        if name in rates and "life" in found:
            table.judge(f"life against {name}'s", found["life"] / rates[name][what], target)
    if "procrastinate" in rates and "drain 16" in found:
        table.judge("16 workers against procrastinate's drain", found["drain 16"] / rates["procrastinate"]["drain"], 5.0)


def main() -> None:
    """Reads the command line, runs the cases, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="per figure")
    parser.add_argument("--jobs", type=int, default=20_000, help="per peer")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default="", help=f"any of {','.join(peers.PEERS)}; installed at first use")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    table, found = Table(), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder, ai_embedded.embedded_postgres(Path(folder)) as url:
        with serving(url) as server:
            for name in filter(None, options.cases.split(",")):
                CASES[name](table, server, options.seconds, found)
        compare(table, url, [name for name in options.peers.split(",") if name], options.jobs, found)
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
