"""How fast the service is over HTTP and how flat as it grows, beside what a user would pick instead, in one run on one machine.

    python bench/run.py [--scale 0.1] [--seconds 5] [--jobs 20000] [--cases lives,creates,…] [--peers pgbench,graphile,…] [--json FILE]

Starts an embedded PostgreSQL with durable commits and service processes of its own. The load comes from processes of its own
(bench/clients.py); the share of the cores that they and the service take stands beside each rate. Jobs have 1 KB of input and 2 KB of
result. At `--scale 1` the numbers of jobs are those of the targets.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import flat
import payloads
import peers
import speed
import waiting
from ground import Bench, Table

import ai_embedded

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
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default="", help=f"any of {','.join(peers.PEERS)}; installed at first use")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    table, found = Table(), dict[str, float | None]()
    with tempfile.TemporaryDirectory() as folder, ai_embedded.embedded_postgres(Path(folder)) as url:
        bench = Bench(url, table, options.seconds, options.scale)
        # Beside each other: what is compared in one run is measured close together.
        for name in filter(None, options.cases.split(",")):
            found[name] = CASES[name](bench)
            if name == "drain" or (name == "lives" and "drain" not in options.cases):
                speed.compare(
                    bench, [peer for peer in options.peers.split(",") if peer], options.jobs, found.get("lives"), found.get("drain")
                )
    if options.json:
        table.write(options.json)


if __name__ == "__main__":
    main()
