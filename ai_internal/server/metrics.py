"""What the service tells Prometheus.

Two kinds of figures, and what that means for a query over several processes:

- Counters and histograms are of one process, so that `sum` over processes is right. Jobs are counted as the ledger is folded: each move is
  told to the one process that folded it, whichever process made it.
- Gauges of the queue (`ai_service_jobs`, `…_oldest_pending_seconds`, `…_paused`, `…_workers`, …) are the database's: the same from every
  process, so take `max`.

Label values are bounded: of owners, profiles, categories and providers the first 200 of each are told apart, the others are `other`.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
MAX_VALUES = 200
OTHER = "other"
# The ledger's buckets grow by 1.2 from a millisecond up; six of them make one here, so that no duration is on the wrong side of a border.
STEP, WIDTH, BORDERS = 6, 1.2, 17
# What ends a job, and what only ends an attempt, in the words of the ledger.
ENDINGS = ("completed", "failed", "cancelled")


def border(number: int) -> float:
    """The upper border of a bucket, in seconds: from 1 ms to 4 hours and beyond, each three times the one before."""
    return float(f"{WIDTH ** (STEP * number) / 1000:.3g}")


@attrs.frozen
class Move:
    """A sum of moves of the ledger: `n` of an event, with the bucket of how long it took and what was used."""

    event: str
    owner_service: str
    model_profile: str
    category: str | None
    seconds_bucket: int | None
    n: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    audio_seconds: float | None = None


@attrs.frozen
class Snapshot:
    """How the queue stands now: `GET /stats`, what workers reported, and for how long the database's oldest transaction has been open."""

    stats: Mapping[str, Any]
    workers: Sequence[Mapping[str, Any]]
    oldest_transaction_seconds: float


class Names:
    """The values of a label: the first 200, then `other`."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def bounded(self, name: str) -> str:
        """The value to show."""
        if name not in self._known and len(self._known) >= MAX_VALUES:
            return OTHER
        self._known.add(name)
        return name


class Requests(Collector):
    """A counter for what every request passes: prometheus-client's own takes ten times as long."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._described = (name, documentation, labels)
        self._counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._lock = threading.Lock()
        registry.register(self)

    def add(self, labels: tuple[str, ...]) -> None:
        """Counts one."""
        with self._lock:
            self._counts[labels] += 1

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Called by the registry."""
        name, documentation, labels = self._described
        family = CounterMetricFamily(name, documentation, labels=labels)
        for values, count in list(self._counts.items()):
            family.add_metric(values, count)
        yield family


class Durations(Collector):
    """A histogram that takes counts of the ledger's buckets; its sum is that of the buckets' middles, within 10 %."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._described = (name, documentation, labels)
        self._counts: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * (BORDERS + 1))
        self._sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
        registry.register(self)

    def add(self, labels: tuple[str, ...], bucket: int, n: int) -> None:
        """Counts n durations."""
        self._counts[labels][min(bucket // STEP + 1, BORDERS)] += n
        self._sums[labels] += n * WIDTH ** (bucket + 0.5) / 1000

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Called by the registry."""
        name, documentation, labels = self._described
        family = HistogramMetricFamily(name, documentation, labels=labels)
        for values, counts in list(self._counts.items()):
            borders = [*(str(border(number)) for number in range(BORDERS)), "+Inf"]
            up_to = [sum(counts[: number + 1]) for number in range(BORDERS + 1)]
            family.add_metric(values, list(zip(borders, up_to, strict=True)), self._sums[values])
        yield family


class Metrics:
    """The figures of one process. Safe for threads."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._owners, self._profiles, self._categories, self._providers = Names(), Names(), Names(), Names()
        self._make_process_figures(version)
        self._make_job_figures()
        self._make_queue_figures()

    def _make_process_figures(self, version: str) -> None:
        ProcessCollector(registry=self._registry)
        self._gauge("ai_service_info", "The release that serves.", "version").labels(version).set(1)
        self._requests = Requests("ai_service_http_requests", "Requests answered.", ["method", "route", "status"], self._registry)
        self._problems = self._counter("ai_service_problems", "Refusals by code, items of bulk calls too.", "code")
        self._parked = self._gauge("ai_service_requests_waiting", "Requests that wait for a job or for its end.")
        self._lent = self._gauge("ai_service_database_connections_in_use", "Connections of the pool that are in use.")
        self._places = self._gauge("ai_service_database_connections_max", "Connections that the pool may open.")
        self._lapsed = self._counter("ai_service_leases_lapsed", "Jobs taken back when their lease ran out.")
        self._expired = self._counter("ai_service_jobs_expired", "Jobs that expired before anybody claimed them.")

    def _make_job_figures(self) -> None:
        self._created = self._counter("ai_service_jobs_created", "Jobs created.", "model_profile")
        self._claimed = self._counter("ai_service_jobs_claimed", "Jobs handed out to a worker.", "model_profile")
        self._released = self._counter("ai_service_jobs_released", "Jobs given back by their worker.", "model_profile")
        self._finished = self._counter("ai_service_jobs_finished", "Jobs that ended.", "model_profile", "outcome", "category")
        self._attempts = self._counter(
            "ai_service_attempts_failed", "Attempts that failed and are tried again.", "model_profile", "category"
        )
        self._tokens = self._counter("ai_service_tokens", "Tokens that workers reported.", "owner_service", "model_profile", "kind")
        self._audio = self._counter(
            "ai_service_audio_seconds", "Audio that workers reported, in seconds.", "owner_service", "model_profile"
        )
        self._waited = Durations("ai_service_job_waiting_seconds", "From ready to claimed.", ["model_profile"], self._registry)
        self._ran = Durations("ai_service_job_running_seconds", "From claimed to ended.", ["model_profile", "outcome"], self._registry)

    def _make_queue_figures(self) -> None:
        self._up = self._gauge("ai_service_database_up", "Whether the database answered this scrape.")
        self._jobs = self._gauge("ai_service_jobs", "Jobs that have not ended.", "model_profile", "state")
        self._oldest = self._gauge("ai_service_oldest_pending_seconds", "How long the oldest ready job has been waiting.", "model_profile")
        self._paused = self._gauge("ai_service_paused", "Whether all of a profile's jobs are held back.", "model_profile")
        self._transaction = self._gauge(
            "ai_service_database_oldest_transaction_seconds", "Age of the oldest open transaction that this role may see."
        )
        self._workers = self._gauge("ai_service_workers", "Workers seen in the last five minutes.")
        self._capacity = self._gauge("ai_service_workers_capacity", "Jobs that these workers can run side by side.")
        self._providers_seen = self._gauge(
            "ai_service_worker_providers", "Providers as workers report them.", "provider", "status", "circuit"
        )

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(name, documentation, labels, registry=self._registry)

    # What happens

    def count_request(self, method: str, route: str, status: str) -> None:
        """Counts a request; `route` is the template, not the path."""
        self._requests.add((method, route, status))

    def count_refusal(self, code: str) -> None:
        """Counts a refusal, of a request or of an item."""
        self._problems.labels(code).inc()

    def count_upkeep(self, rescued: int, expired: int) -> None:
        """Counts what upkeep took back and let expire."""
        self._lapsed.inc(rescued)
        self._expired.inc(expired)

    def count_moves(self, moves: Iterable[Move]) -> None:
        """Counts what was folded."""
        with self._lock:
            for move in moves:
                self._count(move, self._profiles.bounded(move.model_profile))
                self._count_usage(move, self._owners.bounded(move.owner_service), self._profiles.bounded(move.model_profile))

    def _count(self, move: Move, profile: str) -> None:
        category = self._categories.bounded(move.category) if move.category else ""
        plain = {"created": self._created, "claimed": self._claimed, "released": self._released}
        if move.event in plain:
            plain[move.event].labels(profile).inc(move.n)
        elif move.event in ENDINGS:
            self._finished.labels(profile, move.event, category).inc(move.n)
        elif move.event == "attempt_failed":
            self._attempts.labels(profile, category).inc(move.n)
        if move.seconds_bucket is None:
            return
        if move.event == "claimed":
            self._waited.add((profile,), move.seconds_bucket, move.n)
        else:
            self._ran.add((profile, move.event), move.seconds_bucket, move.n)

    def _count_usage(self, move: Move, owner: str, profile: str) -> None:
        for kind in ("prompt", "completion", "total"):
            if count := getattr(move, f"{kind}_tokens"):
                self._tokens.labels(owner, profile, kind).inc(count)
        if move.audio_seconds:
            self._audio.labels(owner, profile).inc(move.audio_seconds)

    # What is

    def text(self, snapshot: Snapshot | None, *, waiting: int, in_use: int, connections: int) -> bytes:
        """Everything in Prometheus' text format; without a snapshot the database is down and its gauges are left out."""
        with self._lock:
            self._parked.set(waiting)
            self._lent.set(in_use)
            self._places.set(connections)
            self._up.set(snapshot is not None)
            self._show(snapshot or Snapshot({}, (), float("nan")))
            return prometheus_client.generate_latest(self._registry)

    def _show(self, snapshot: Snapshot) -> None:
        for gauge in (self._jobs, self._oldest, self._paused, self._providers_seen):
            gauge.clear()
        oldest: dict[str, float] = {}
        for row in snapshot.stats.get("by_model_profile", ()):
            profile = self._profiles.bounded(row["model_profile"])
            for state in ("pending", "scheduled", "running"):
                self._jobs.labels(profile, state).inc(row[state])
            oldest[profile] = max(oldest.get(profile, 0), row["oldest_pending_seconds"] or 0)
            self._oldest.labels(profile).set(oldest[profile])
            self._paused.labels(profile).set(row["paused"])
        self._transaction.set(snapshot.oldest_transaction_seconds)
        self._show_workers(snapshot.workers)

    def _show_workers(self, workers: Sequence[Mapping[str, Any]]) -> None:
        self._workers.set(len(workers))
        self._capacity.set(sum(worker.get("capacity") or 0 for worker in workers))
        for provider in (provider for worker in workers for provider in worker.get("providers") or ()):
            shown = (self._providers.bounded(str(provider.get(name) or "")) for name in ("name", "status", "circuit"))
            self._providers_seen.labels(*shown).inc()
