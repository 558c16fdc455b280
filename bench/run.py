"""How fast the service is over HTTP and how flat as it grows, beside what a user would pick instead, in one run on one machine.

    python bench/run.py [--scale 0.1] [--seconds 5] [--jobs 20000] [--cases lives,creates,…] [--peers pgbench,graphile,…] [--json FILE]

Starts an embedded PostgreSQL with durable commits and service processes of its own. The load comes from processes of its own
(bench/clients.py); the share of the cores that they and the service take stands beside each rate. Jobs have 1 KB of input and 2 KB of
result. At `--scale 1` the numbers of jobs are those of the targets.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import flat
import payloads
import peers
import speed
import waiting
from ground import Bench, Table

from ai_internal.server import embedded

CASES: dict[str, Callable[[Bench], float | None]] = {
    "lives": speed.lives,
    "creates": speed.creates,
    "drain": speed.drain,
    **waiting.CASES,
    **flat.CASES,
    **payloads.CASES,
}


def main() -> None:
    """Reads the command line, runs the cases, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.1, help="1 is the full size of the targets")
    parser.add_argument("--seconds", type=float, default=5.0, help="per rate")
    parser.add_argument("--jobs", type=int, default=20_000, help="per peer")
    parser.add_argument("--cases", default=",".join(CASES), help="all unless told: %(default)s")
    parser.add_argument("--peers", default="", help=f"any of {','.join(peers.PEERS)}; installed at first use")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as folder, embedded.embedded_postgres(Path(folder)) as url:
        try:
            run(Bench(url, table, options.seconds, options.scale), _names(options.cases), _names(options.peers), options.jobs)
        finally:
            if options.json:
                table.write(options.json)
    missed = [row["name"] for row in table.rows if not row.get("reached", True)]
    print(f"{sum('reached' in row for row in table.rows)} targets, {len(missed)} not reached{': ' if missed else ''}{'; '.join(missed)}")


def run(bench: Bench, cases: list[str], names: list[str], jobs: int) -> None:
    """The cases in their order, and the peers after those that are compared with them: what is compared is measured close together."""
    reached: dict[str, float | None] = {}
    for case in cases:
        begun = time.monotonic()
        reached[case] = CASES[case](bench)
        print(f"-- {case} took {time.monotonic() - begun:.0f} s", flush=True)
        if [case] == [each for each in cases if each in ("lives", "drain")][-1:]:
            speed.compare(bench, names, jobs, reached.get("lives"), reached.get("drain"))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
