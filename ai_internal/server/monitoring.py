"""What operators and monitoring look at: counters, workers, providers, metrics, health and readiness."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import msgspec

import providers
from ai_internal.server.database import SCHEMA_VERSION, Database, require_schema
from ai_internal.server.metrics import CONTENT_TYPE, Metrics, Snapshot
from ai_internal.server.requests import (
    DatabaseUnavailable,
    Draining,
    Refusal,
)
from ai_internal.server.web import Call

log = logging.getLogger("ai_service")

PROVIDER_CHECK_SECONDS = 5.0
METRICS_WINDOW_SECONDS = 3600


class ProviderBoard:
    """What the configured providers report of themselves, asked at most every five seconds."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._lock = threading.Lock()
        self._checked_at, self._checked = -1e9, "[]"

    @functools.cached_property
    def installed(self) -> Sequence[providers.InstalledProvider]:
        """The installed providers, found when first asked for."""
        return providers.discover(self._environ)

    @functools.cached_property
    def _checks(self) -> providers.Checks:
        return providers.Checks(self.installed)

    def checked(self) -> str:
        """The providers' health as a JSON array."""
        with self._lock:
            if time.monotonic() - self._checked_at > PROVIDER_CHECK_SECONDS:
                self._checked = msgspec.json.encode(self._checks.look()).decode()
                self._checked_at = time.monotonic()
            return self._checked


@attrs.frozen(eq=False)
class Monitoring:
    """The operations that only look: none of them writes. `waiting` counts the requests that wait."""

    version: str
    access: str
    database: Database
    _metrics: Metrics
    board: ProviderBoard
    waiting: Callable[[], int]
    is_draining: Callable[[], bool]

    def stats(self, call: Call) -> None:
        """GET counts jobs, errors, durations and usage, as of the last upkeep."""
        call.answer(self._stats(call.query.window_seconds, call.token.owner_services))

    def workers(self, call: Call) -> None:
        """GET lists the workers of the last five minutes."""
        call.answer(f'{{"workers":{self._workers_json()}}}')

    def providers_status(self, call: Call) -> None:
        """GET checks the configured providers and shows what workers report of theirs."""
        call.answer(f'{{"providers":{self.board.checked()},"workers":{self._workers_json()}}}')

    def metrics(self, call: Call) -> None:
        """GET gives Prometheus what this process counted and how the queue stands; without the database only the former."""
        call.response.content_type = CONTENT_TYPE
        call.response.data = self._metrics.text(
            self._snapshot(),
            waiting=self.waiting(),
            in_use=self.database.in_use,
            connections=self.database.connections,
        )

    def health(self, call: Call) -> None:
        """GET, HEAD and OPTIONS answer while the process lives; nothing else is asked or waited for."""
        call.answer(f'{{"status":"ok","version":"{self.version}"}}')

    def readiness(self, call: Call) -> None:
        """GET, HEAD and OPTIONS answer whether requests can be served."""
        self.assert_ready()
        call.answer(f'{{"status":"ready","version":"{self.version}","schema_version":{SCHEMA_VERSION},"access":"{self.access}"}}')

    def assert_ready(self) -> None:
        """Raises the Refusal that keeps the service from serving."""
        if self.is_draining():
            raise Draining
        require_schema(self.database)
        rows = self.database.run(
            "-- monitoring.assert_ready\nselect pg_is_in_recovery() or current_setting('transaction_read_only')::boolean",
            seconds=3,
        )
        if rows[0][0]:
            raise DatabaseUnavailable("PostgreSQL is read-only")

    def _stats(self, window_seconds: int, owners: Sequence[str] | None = None) -> str:
        """Counters as one JSON object, of these owners where they are named."""
        statement = "-- monitoring.stats\nselect stats_v1(:window::int, :owners::text[])"
        return str(self.database.run(statement, window=window_seconds, owners=owners)[0][0])

    def _workers(self) -> list[list[Any]]:
        """Workers of the last five minutes, latest first: id, when seen, and what it reported as JSON text."""
        return self.database.run(
            "-- monitoring.workers\nselect worker_id, rfc3339(seen_at), report::text from worker "
            "where seen_at > now() - interval '5 minutes' order by seen_at desc, worker_id"
        )

    def _workers_json(self) -> str:
        """The workers as a JSON array, each with what it reported."""
        return f"[{','.join(_worker_json(*row) for row in self._workers())}]"

    def _oldest_transaction_seconds(self) -> float:
        """For how long the oldest transaction has been open that this role may see; dead rows stay as long. 0 without any."""
        rows = self.database.run(
            "-- monitoring.oldest_transaction\nselect coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8 "
            "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
        return float(rows[0][0])

    def _snapshot(self) -> Snapshot | None:
        try:
            return Snapshot(
                msgspec.json.decode(self._stats(METRICS_WINDOW_SECONDS)),
                [_decoded_report(report) for _, _, report in self._workers()],
                self._oldest_transaction_seconds(),
            )
        except Refusal as refusal:
            log.debug("metrics_without_database code=%s", refusal.code)
            return None


def _worker_json(worker_id: str, seen_at: str, report: str | None) -> str:
    # What is known comes last, and of a name that is there twice the last counts: nobody reports as another.
    head = report.strip()[:-1] + "," if report and report.strip("{} \t\r\n") else "{"
    return head + msgspec.json.encode({"worker_id": worker_id, "seen_at": seen_at}).decode()[1:]


def _decoded_report(report: str | None) -> Mapping[str, Any]:
    """What a worker reported; nothing where Python cannot read what PostgreSQL keeps, as numbers beyond all bounds."""
    try:
        decoded = msgspec.json.decode(report or "{}")
    except (msgspec.DecodeError, ValueError):
        return {}
    return decoded if isinstance(decoded, dict) else {}
