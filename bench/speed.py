"""How fast: whole lives in batches, creates and workers one by one, and what the peers and the database by itself reach."""

import clients
import peers
from ground import Bench


def lives(bench: Bench) -> float:
    """Whole lives in batches of 100; the best of a few numbers of clients."""
    with bench.serving("lives") as server:
        return max(bench.rate("life in batches of 100", server, count, clients.lives) for count in (2, 4, 8, 12))


def creates(bench: Bench) -> None:
    """Creates one by one against the health route, in turns; and what of it they would reach without a queue behind them."""
    ratios: dict[str, list[float]] = {}
    with bench.serving("creates") as server, bench.without_queue() as floor, bench.without_queue(bench.url) as committing:
        kinds = {"POST /jobs": server, "POST /jobs without queue": floor, "POST /jobs with a commit alone": committing}
        for _ in range(3):
            health = bench.rate("GET /healthz", server, 16, clients.health, bench.seconds / 2)
            for name, its in kinds.items():
                ratios.setdefault(name, []).append(bench.rate(name, its, 16, clients.creates, bench.seconds / 2) / health)
    for name in list(kinds)[1:]:
        bench.table.add(f"{name} against /healthz (median of 3)", sorted(ratios[name])[1], "x")
    bench.table.judge("POST /jobs against /healthz (median of 3)", sorted(ratios["POST /jobs"])[1], 0.6)


def drain(bench: Bench) -> float:
    """Workers that do one job at a time."""
    rates = {}
    with bench.serving("drain") as server:
        filler = clients.Client(server.port)
        for count in (4, 16):
            for _ in range(int(bench.seconds * 20)):
                filler.create("drain", 100)
            rates[count] = bench.rate("claim 1, complete 1", server, count, clients.drain)
            while (claimed := filler.claim("drain", 1000))[1]:
                filler.complete(*claimed)
    bench.table.judge("16 workers against 4", rates[16] / rates[4], 1.0)
    return rates[16]


def compare(bench: Bench, names: list[str], jobs: int, life: float | None, drained: float | None) -> None:
    """The peers, and what of theirs is reached."""
    rates: dict[str, dict[str, float]] = {}
    for name in names:
        rates[name] = peers.run(name, bench.url, f"bench_{name}", jobs)
        for what, rate in rates[name].items():
            bench.table.add(f"{name} {what}", rate, "/s")
    for name in rates if life else ():
        bench.table.judge(f"life against {name}'s", (life or 0) / rates[name]["life"], 0.6 if name == "pgbench" else 1.0)
    if "procrastinate" in rates and drained:
        bench.table.judge("16 workers against procrastinate's drain", drained / rates["procrastinate"]["drain"], 5.0)
