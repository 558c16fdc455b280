"""AI Service: owns the life of AI jobs. Callers create jobs over REST, workers claim them, run them and report back.

    create ──► pending ──claim──► running ──complete──► completed
                 ▲  ▲                │ │
                 │  └── release ─────┘ ├── fail (retryable, attempts left) ──► pending, run_at later
                 │                     ├── fail (final) ──────────────────────► failed
                 │                     └── lease ran out ──► pending, or failed with no attempts left
                 └── retry ◄── failed | cancelled | running          cancel: pending | running ──► cancelled

Sections:

    Settings            what the service reads from its environment
    Queue               a job's life in PostgreSQL, in the order of that life; the functions it calls are in schema.sql
    Upkeep              the thread that applies the schema, takes back leases, and retires partitions
    Job resources       what the operations on jobs do; monitoring and documents have theirs in ai_internal/server
    Routes              one process of the service, and its WSGI application
    The command line    serve, check, migrate; the other commands are in ai_internal
"""

import argparse
import ctypes
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import falcon
import msgspec
import pg8000.native

import providers
from ai_internal.server.access import API, AccessMiddleware, Token, clashes, read_token_file, read_tokens
from ai_internal.server.database import (
    SCHEMA_VERSION,
    SEPARATOR,
    STATEMENT_SECONDS,
    Database,
    joined,
    migrate,
    require_schema,
    schema_version,
)
from ai_internal.server.database_url import DatabaseAddress, read_database_url
from ai_internal.server.documents import Documents
from ai_internal.server.group_commit import GroupCommit
from ai_internal.server.listener import Server, listen, requests_log
from ai_internal.server.metrics import Metrics, Move
from ai_internal.server.monitoring import Monitoring, ProviderBoard
from ai_internal.server.operations import PROBES
from ai_internal.server.requests import (
    MAX_LOOKUP,
    OUTCOMES,
    UUID,
    ClaimRequest,
    Completion,
    DatabaseBusy,
    DatabaseUnavailable,
    Failure,
    Filters,
    Heartbeat,
    JobFilter,
    JobNotFound,
    NewJob,
    Refusal,
    Release,
    SchemaOutdated,
    ValidationFailed,
    count_usage,
)
from ai_internal.server.waiting import FULL_PROBE_SECONDS, Claimed, WaitingClaims
from ai_internal.server.web import (
    Call,
    CountingMiddleware,
    SameSiteMiddleware,
    add_routes,
    answer_crash,
    answer_falcon_error,
    answer_refusal,
    problem_of_item,
    problem_of_server,
)
from ai_internal.telemetry import about, complain, log_crash, log_to_stderr, printable, read_log_format, read_traceparent, trace_id
from providers import MAX_MESSAGE_CHARACTERS
from providers.settings import SettingsError, duration, flag, read_settings, setting, whole

__version__ = "0.1.0"

log = logging.getLogger("ai_service")

# ── Settings ───────────────────────────────────────────────────────────────────────────────────────


def _read_schema_name(text: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", text) or text.startswith("pg_"):
        raise ValueError("must be a lower-case SQL name of at most 63 letters, digits and underscores, not starting with pg_")
    return text


def _read_retention(text: str) -> timedelta | None:
    if text == "forever":
        return None
    days = re.fullmatch(r"(\d{1,5})d", text)
    length = timedelta(days=int(days[1])) if days else timedelta(seconds=providers.parse_duration(text))
    if length < timedelta(hours=1):
        raise ValueError("must be at least 1h, or forever")
    return length


def _read_log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
    return text.upper()


def _read_pool_mode(text: str) -> str:
    if text not in ("session", "transaction"):
        raise ValueError("must be session or transaction")
    return text


@attrs.frozen(kw_only=True)
class Settings:
    """What the service reads from its environment. Each field names its variable, what it does, and its default."""

    database_url: DatabaseAddress = setting(
        "DATABASE_URL",
        "PostgreSQL to use, as a libpq URL",
        read=read_database_url,
        required="`ai-service serve --embedded` brings its own PostgreSQL",
    )
    database_schema: str = setting(
        "DATABASE_SCHEMA", "schema that holds the service's tables", default="ai_service", read=_read_schema_name
    )
    database_connections: int = setting("DATABASE_CONNECTIONS", "most connections a process opens", default="8", read=whole(2, 100))
    database_pool_mode: str = setting(
        "DATABASE_POOL_MODE", "`transaction` behind a PgBouncer with that pool_mode", default="session", read=_read_pool_mode
    )
    migrate_on_start: bool = setting("MIGRATE_ON_START", "apply `schema.sql` on start", default="true", read=flag)
    http_host: str = setting("HTTP_HOST", "address to listen on", default="0.0.0.0")  # noqa: S104  the contract's default
    http_port: int = setting("HTTP_PORT", "port to listen on; 0 picks a free one", default="8080", read=whole(0, 65535))
    http_threads: int = setting(
        "HTTP_THREADS", "threads; all but 32 of them may hold waiting requests", default="256", read=whole(40, 2000)
    )
    http_one_core: bool = setting(
        "HTTP_ONE_CORE", "keep the threads to one core, the least busy: waking them on another costs more", default="true", read=flag
    )
    max_body_bytes: int = setting("MAX_BODY_BYTES", "largest request body, in bytes", default=str(32 << 20), read=whole(1024, 1 << 30))
    max_bodies_bytes: int = setting(
        "MAX_BODIES_BYTES",
        "bytes of all bodies and answers over 256 KB in hand at once; others get 503",
        default=str(128 << 20),
        read=whole(1024, 1 << 36),
    )
    stall_seconds: float = setting(
        "STALL_SECONDS",
        "who moves less than 16 KB a second of a request or an answer for so long is let go",
        default="30",
        read=duration(1, 3600),
    )
    drain_seconds: float = setting("DRAIN_SECONDS", "from SIGTERM to the close of the listener", default="5", read=duration(0))
    retention: timedelta | None = setting("RETENTION", "how long finished jobs are kept, or `forever`", default="30d", read=_read_retention)
    log_level: str = setting("LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR", default="INFO", read=_read_log_level)
    log_format: str = setting("LOG_FORMAT", "`text`, or `json`: an object on each line", default="text", read=read_log_format)
    log_requests: bool = setting("LOG_REQUESTS", "a line for each request", default="false", read=flag)
    api_tokens: tuple[Token, ...] | None = setting(
        "API_TOKENS", "tokens, `name=role=secret; …`; without any everybody may do everything", read=read_tokens, secret=True
    )
    api_tokens_file: tuple[Token, ...] | None = setting(
        "API_TOKENS_FILE", "a file with more of them, read at the start", read=read_token_file
    )
    environ: Mapping[str, str] = attrs.field(factory=dict, repr=False)

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Who is let in; nobody named is everybody."""
        return (self.api_tokens or ()) + (self.api_tokens_file or ())

    def problems(self) -> list[str]:
        """What the settings are wrong about together."""
        problems = [f"API_TOKENS and API_TOKENS_FILE: {problem}" for problem in clashes(self.tokens)]
        if self.database_pool_mode == "transaction" and self.database_url.options:
            problems.append("DATABASE_URL: options do not get through a pooler; set them for the role: alter role … set …")
        return problems

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Settings":
        """The settings in `environ`, which the providers read theirs from later. Raises SettingsError with all problems at once."""
        # Of tokens nothing is kept but digests, and providers are strangers' code.
        return read_settings(cls, environ, environ={name: text for name, text in environ.items() if name != "API_TOKENS"})


# ── Queue ──────────────────────────────────────────────────────────────────────────────────────────

# How long a list waits for its turn: at most half of the connections make lists.
LIST_SECONDS = 5.0
FLOOR_LAG_SECONDS = 1.0


@attrs.frozen
class JobText:
    """A job as JSON text: its facts without payloads, and the payloads as they were sent."""

    facts: str
    result: str | None = None
    input: str | None = None

    @property
    def owner_service(self) -> str:
        """Whose it is. The name needs no escapes, and nothing before it is of the caller's making."""
        return self.facts.partition('"owner_service":"')[2].partition('"')[0]

    @property
    def trace_id(self) -> str | None:
        """The id of the caller's trace, if it has one; what stands behind it may be of a worker's making."""
        value = self.facts.partition('"traceparent":')[2]
        return trace_id(value[1:56]) if value.startswith('"') else None

    @property
    def is_finished(self) -> bool:
        """Whether the job has ended. The first key of that name is the job's own: others stand in objects behind it."""
        return not self.facts.partition('"finished_at":')[2].startswith("null")

    def render(self, *, with_result: bool = True, with_input: bool = False) -> bytes:
        """The job as one JSON object. In bytes from here on: a text with one emoji takes four for each character, and a copy as many."""
        parts = [self.facts[:-1].encode()]
        if with_result:
            parts += [b',"result":', (self.result or "null").encode()]
        if with_input:
            parts += [b',"input":', (self.input or "null").encode()]
        return b"".join([*parts, b"}"])


@attrs.frozen
class Created:
    """What a create made of one job."""

    id: str
    status: str
    created: bool


@attrs.frozen
class HeartbeatAnswer:
    """The answer to one heartbeat: an outcome, and where it is 'ok' the lease's end and length."""

    outcome: str
    lease_expires_at: str | None
    lease_seconds: float | None
    worker_id: str | None


class Floors:
    """Below which seq nothing is left in a lane, as far as this process has claimed: where a probe may start.

    Under a long-held snapshot consumed index entries cannot be removed, and a probe from the lane's head would step over all of them.
    A floor follows with a lag, for creates that commit late, and every few seconds a probe goes without, for what commits later still.
    """

    def __init__(self) -> None:
        self._safe: dict[int, int] = {}
        self._fresh: dict[int, int] = {}
        self._rotated_at = time.monotonic()
        self._probed: dict[Filters, float] = {}

    def known(self, filters: Filters) -> list[int]:
        """Floors by lane id, from lane 1 on; none when a full probe with these filters is due."""
        now = time.monotonic()
        if now - self._rotated_at > FLOOR_LAG_SECONDS:
            self._safe.update(self._fresh)
            self._fresh, self._rotated_at = {}, now
        if now - self._probed.get(filters, 0.0) > FULL_PROBE_SECONDS:
            self._probed = {each: at for each, at in self._probed.items() if now - at <= FULL_PROBE_SECONDS} | {filters: now}
            return []
        return [self._safe.get(lane, 0) for lane in range(1, max(self._safe, default=0) + 1)]

    def forget_above(self, seq: int) -> None:
        """Drops floors beyond the number handed out last: the database was put back to an earlier time."""
        if any(floor > seq for floor in (*self._safe.values(), *self._fresh.values())):
            self._safe, self._fresh = {}, {}

    def raise_to(self, lanes: Iterable[int], seqs: Iterable[int]) -> None:
        """Takes note of what a claim took."""
        for lane, seq in zip(lanes, seqs, strict=True):
            self._fresh[lane] = max(seq, self._fresh.get(lane, 0), self._safe.get(lane, 0))


# What create_jobs_v2 takes of the jobs behind their lanes, in its order: the argument, and the value of its parameter.
_JOB_COLUMNS: Mapping[str, tuple[str, Callable[[Sequence[NewJob]], Any]]] = {
    "owner_refs": (":owner_refs::text[]", lambda jobs: [job.owner_ref for job in jobs]),
    "inputs": ("string_to_array(:inputs, chr(30))", lambda jobs: joined([job.input for job in jobs])),
    "sizes": (":sizes::int[]", lambda jobs: [_bytes_of(job.input) for job in jobs]),
    "max_attempts": (":max_attempts::int[]", lambda jobs: [job.max_attempts for job in jobs]),
    "run_ats": (":run_ats::timestamptz[]", lambda jobs: [job.run_at for job in jobs]),
    "expires_ats": (":expires_ats::timestamptz[]", lambda jobs: [job.expires_at for job in jobs]),
    "keys": (":keys::text[]", lambda jobs: [job.idempotency_key for job in jobs]),
    "traceparents": (":traceparents::text[]", lambda jobs: [job.traceparent for job in jobs]),
    "labels": (":labels::text[]", lambda jobs: [_json_or_null(job.labels) for job in jobs]),
}
_CREATE = (
    "create_jobs_v2(:owners::text[], :task_types::text[], :profiles::text[], :priorities::int[], :lane_nos::int[], "
    f"{', '.join(argument for argument, _ in _JOB_COLUMNS.values())})"
)
# With the claim itself comes what the buffers of a connection take, a job counted as its input, owner_ref and 768 bytes: the claim is
# committed, and its lock free, once all of it was sent. Jobs that the statement does not see came while it waited for the lock: nobody
# knows their size.
CLAIMED_AT_ONCE_BYTES = 1 << 17
_CLAIM = """-- queue.claim
with taken as materialized (
  select * from claim_jobs_v1(:profiles::text[], :task_types::text[], :owners::text[], :served::text[], :floors::bigint[],
    :claim_ids::uuid[], :worker_ids::text[], :leases::float8[], :limits::int[])
), job_claim as materialized (
  select array_agg((:claim_ids::uuid[])[t.n]) as claim_ids, array_agg(id) as job_ids from taken t, unnest(t.job_ids) id
), text as materialized (
  select t.* from (
    select * from job_claim c where (
      select count(*) = cardinality(c.job_ids) and sum(
        j.input_bytes + octet_length(j.owner_ref) + coalesce(pg_column_size(j.labels), 0) + 768) <= :at_once::int
      from job j where j.id = any (c.job_ids))) c,
    claimed_texts_v1(c.claim_ids, c.job_ids) t
)
select json_agg(json_build_array(outcome, job_ids, lane_ids, seqs, owner_order, jobs is not null) order by n)::text,
  string_agg(coalesce(jobs, ''), chr(30) order by n)
from taken left join text on claim_id = (:claim_ids::uuid[])[n]"""
_COMPLETE = (
    "complete_jobs_v1(:ids::uuid[], :claim_ids::uuid[], string_to_array(:results, chr(30)), :usages::text[], "
    ":prompts::bigint[], :completions::bigint[], :totals::bigint[], :audios::float8[])"
)
_FAIL = (
    "fail_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :categories::text[], :messages::text[], :retryables::boolean[], :delays::float8[], "
    ":usages::text[], :prompts::bigint[], :completions::bigint[], :totals::bigint[], :audios::float8[])"
)
_RELEASE = "release_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :delays::float8[])"

_CONDITIONS = {
    "status": "(('pending' = any (:status::text[]) and (exists (select from ready r where r.job_id = j.id) "
    "or exists (select from waiting w where w.job_id = j.id))) "
    "or ('running' = any (:status::text[]) and exists (select from held h where h.job_id = j.id)) "
    "or exists (select from ended e where e.job_id = j.id and e.status = any (:status::text[])))",
    "owner_service": "j.lane_id in (select id from lane where owner_service = any (:owner_service::text[]))",
    "owner_ref": "j.owner_ref = any (:owner_ref::text[])",
    "task_type": "j.lane_id in (select id from lane where task_type = any (:task_type::text[]))",
    "model_profile": "j.lane_id in (select id from lane where model_profile = any (:model_profile::text[]))",
    "error_category": "exists (select from ended e where e.job_id = j.id and e.error_category = any (:error_category::text[]))",
    "labels": "j.labels @> :labels::jsonb",
    "created_after": "j.created_at > :created_after::timestamptz",
    "created_before": "j.created_at < :created_before::timestamptz",
    "before": "j.id < :before::uuid",
}


# Texts of jobs as two values for all of them: pg8000 takes its time over each row, and JSON in JSON would be escaped.
_TEXTS = "string_agg(coalesce(t.facts, ''), chr(30) order by o.n), string_agg(coalesce(t.result, ''), chr(30) order by o.n)"


def _with_texts(call: str) -> str:
    """A statement that calls for jobs and then reads them: a job's text depends on the outcome, so it is read after."""
    return (
        f"with done as materialized (select * from {call} o) "  # noqa: S608  a constant of this module
        f"select json_agg(o.outcome order by o.n)::text, {_TEXTS} from done o left join job_texts_v1((select array_agg("
        "case when outcome = 'ok' then (:ids::uuid[])[n] end order by n) from done), true, false) t on t.n = o.n"
    )


def _parted(facts: str, results: str) -> list[JobText]:
    """Jobs of `_TEXTS`."""
    return [JobText(fact, result or None) for fact, result in zip(facts.split(SEPARATOR), results.split(SEPARATOR), strict=True)]


def _outcomes_of(call: str) -> str:
    """A statement that calls for jobs and gives their outcomes in order, as one value: pg8000 takes its time over each row."""
    return f"select json_agg(o.outcome order by o.n)::text from {call} o"  # noqa: S608  a constant of this module


class Queue:
    """A job's life in PostgreSQL, one statement each. Times are the database's. Every method raises a Refusal."""

    def __init__(self, database: Database, on_moves: Callable[[list[Move]], None] = lambda _: None) -> None:
        self.database, self._on_moves = database, on_moves
        self._floors = Floors()
        self._served: list[str] = []
        self._listing = threading.BoundedSemaphore(max(1, database.connections // 2))

    def create_batch(self, jobs: Sequence[NewJob]) -> list[Created]:
        """Creates jobs, all or none; a job whose idempotency_key exists is the one that exists."""
        statement = f"-- queue.create_batch\nselect json_agg(json_build_array(id, status, created) order by n)::text from {_CREATE}"
        return [Created(*row) for row in _array(self.database.run(statement, **_columns(jobs))[0][0])]

    def create_each(self, jobs: Sequence[NewJob]) -> list[tuple[bool, str, JobText]]:
        """Creates jobs of callers that know nothing of each other, all or none: whether each is new, its id and text."""
        statement = (
            f"-- queue.create_each\nwith made as materialized (select * from {_CREATE}) "  # noqa: S608  a constant of this module
            f"select json_agg(json_build_array(o.created, o.id) order by o.n)::text, {_TEXTS} from made o "
            "join job_texts_v1((select array_agg(id order by n) from made), true, false) t on t.n = o.n"
        )
        made, *texts = self.database.run(statement, **_columns(jobs))[0]
        return [(created, job_id, job) for (created, job_id), job in zip(_array(made), _parted(*texts), strict=True)]

    def claim(self, requests: Sequence[ClaimRequest]) -> list[Claimed | Refusal]:
        """Claims for requests with the same filters, in their order. Called by one thread: it remembers floors and turns."""
        profiles, types, owners = requests[0].filters
        rows = self.database.run(
            _CLAIM,
            profiles=profiles,
            task_types=types,
            owners=owners,
            served=self._served,
            floors=self._floors.known(requests[0].filters),
            claim_ids=[request.claim_id for request in requests],
            worker_ids=[request.worker_id for request in requests],
            leases=[request.lease_seconds for request in requests],
            limits=[request.limit for request in requests],
            at_once=CLAIMED_AT_ONCE_BYTES,
        )
        outcomes, texts = _array(rows[0][0]), rows[0][1].split(SEPARATOR)
        for _, _, lanes, seqs, order, _ in outcomes:
            self._floors.raise_to(lanes or (), seqs or ())
            self._served = [owner for owner in self._served if owner not in (order or ())] + (order or [])
        return [
            Claimed(str(request.claim_id), text, () if has_text else ids) if outcome == "ok" else OUTCOMES[outcome]()
            for request, text, (outcome, ids, *_, has_text) in zip(requests, texts, outcomes, strict=True)
        ]

    def read(self, claimed: Claimed) -> Claimed:
        """A claim with its jobs where they were unread: those that it still holds. The claim is committed meanwhile, and its lock free."""
        if not claimed.unread:
            return claimed
        rows = self.database.run(
            "-- queue.claimed_texts\nselect jobs from claimed_texts_v1(:claim_ids::uuid[], :job_ids::uuid[])",
            claim_ids=[claimed.claim_id] * len(claimed.unread),
            job_ids=claimed.unread,
        )
        return Claimed(claimed.claim_id, rows[0][0] if rows else "")

    def peek(self, job_ids: Sequence[str]) -> tuple[int, bool, list[str]]:
        """The number of the job that became ready last, whether a scheduled one is due, and which of these jobs have finished."""
        statement = "-- queue.peek\nselect seq, due, array_to_json(ended)::text from peek_v1(:job_ids::uuid[])"
        seq, due, ended = self.database.run(statement, job_ids=job_ids)[0]
        self._floors.forget_above(seq)
        return seq, due, _array(ended)

    def heartbeat(self, job_id: str, heartbeat: Heartbeat) -> str:
        """Extends one lease; its new end as JSON."""
        done = self.heartbeat_many([job_id], [heartbeat])[0]
        if done.outcome != "ok":
            raise OUTCOMES[done.outcome]
        return msgspec.json.encode({"lease_expires_at": done.lease_expires_at, "lease_seconds": done.lease_seconds}).decode()

    def heartbeat_many(self, ids: Sequence[str], heartbeats: Sequence[Heartbeat]) -> list[HeartbeatAnswer]:
        """Extends leases from now; progress is kept where none is given."""
        rows = self.database.run(
            "-- queue.heartbeat_many\n"
            "select outcome, lease_expires_at, lease_seconds, worker_id "
            "from heartbeat_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :leases::float8[], :progresses::text[])",
            ids=ids,
            claim_ids=[heartbeat.claim_id for heartbeat in heartbeats],
            leases=[heartbeat.lease_seconds for heartbeat in heartbeats],
            progresses=[heartbeat.progress for heartbeat in heartbeats],
        )
        return [HeartbeatAnswer(*row) for row in rows]

    def complete_many(self, ids: Sequence[str], completions: Sequence[Completion]) -> list[str]:
        """Completes jobs, each by itself; an outcome per job."""
        return self._outcomes(f"-- queue.complete_many\n{_outcomes_of(_COMPLETE)}", ids, _completion_columns(completions))

    def complete_each(self, items: Sequence[tuple[str, Completion]]) -> list[JobText | Refusal]:
        """Completes jobs for callers that know nothing of each other, each by itself, and returns them as they are now."""
        columns = _completion_columns([completion for _, completion in items])
        return self._ended(f"-- queue.complete_each\n{_with_texts(_COMPLETE)}", [job_id for job_id, _ in items], columns)

    def fail_many(self, ids: Sequence[str], failures: Sequence[Failure]) -> list[str]:
        """Fails attempts; a retryable one with attempts left goes back to pending after its delay or the back-off."""
        return self._outcomes(f"-- queue.fail_many\n{_outcomes_of(_FAIL)}", ids, _failure_columns(failures))

    def fail_each(self, items: Sequence[tuple[str, Failure]]) -> list[JobText | Refusal]:
        """Fails attempts for callers that know nothing of each other, and returns their jobs as they are now."""
        columns = _failure_columns([failure for _, failure in items])
        return self._ended(f"-- queue.fail_each\n{_with_texts(_FAIL)}", [job_id for job_id, _ in items], columns)

    def release_many(self, ids: Sequence[str], releases: Sequence[Release]) -> list[str]:
        """Gives jobs back, the attempt not counted."""
        return self._outcomes(f"-- queue.release_many\n{_outcomes_of(_RELEASE)}", ids, _release_columns(releases))

    def release_each(self, items: Sequence[tuple[str, Release]]) -> list[JobText | Refusal]:
        """Gives jobs back for callers that know nothing of each other, and returns them as they are now."""
        columns = _release_columns([release for _, release in items])
        return self._ended(f"-- queue.release_each\n{_with_texts(_RELEASE)}", [job_id for job_id, _ in items], columns)

    def _outcomes(self, statement: str, ids: Sequence[str], columns: Mapping[str, Any]) -> list[str]:
        return _array(self.database.run(statement, ids=ids, **columns)[0][0])

    def _finish_one(self, statement: str, job_id: str, columns: Mapping[str, Any]) -> JobText:
        job = self._ended(statement, [job_id], columns)[0]
        if isinstance(job, Refusal):
            raise job
        return job

    def _ended(self, statement: str, ids: Sequence[str], columns: Mapping[str, Any]) -> list[JobText | Refusal]:
        outcomes, *texts = self.database.run(statement, ids=ids, **columns)[0]
        return [job if outcome == "ok" else OUTCOMES[outcome]() for outcome, job in zip(_array(outcomes), _parted(*texts), strict=True)]

    def retry(self, job_id: str, statuses: Sequence[str]) -> JobText:
        """Puts a job that has one of these statuses back to pending at attempt 0 and returns it."""
        return self._finish_one(
            f"-- queue.retry\n{_with_texts('retry_jobs_v1(:ids::uuid[], :statuses::text[])')}", job_id, {"statuses": statuses}
        )

    def retry_many(self, ids: Sequence[str], statuses: Sequence[str]) -> list[str]:
        """Puts jobs back to pending; an outcome per job."""
        rows = self.database.run(
            "-- queue.retry_many\nselect outcome from retry_jobs_v1(:ids::uuid[], :statuses::text[]) order by n", ids=ids, statuses=statuses
        )
        return [row[0] for row in rows]

    def cancel(self, job_id: str, reason: str) -> JobText:
        """Cancels a pending or running job and returns it."""
        statement = "-- queue.cancel\n" + _with_texts("(select 1 as n, cancel_job_v1((:ids::uuid[])[1], :reason) as outcome)")
        return self._finish_one(statement, job_id, {"reason": reason})

    def delete(self, job_id: str) -> None:
        """Erases a finished job and its payloads."""
        outcome = self.database.run("-- queue.delete\nselect delete_job_v1(:job_id::uuid)", job_id=job_id)[0][0]
        if outcome != "ok":
            raise OUTCOMES[outcome]

    def get(self, job_id: str, *, with_input: bool = False) -> JobText:
        """One job with its result."""
        rows = self.database.run(
            "-- queue.get\nselect facts, result, input from job_texts_v1(array[:job_id::uuid], true, :with_input::boolean)",
            job_id=job_id,
            with_input=with_input,
        )
        if not rows:
            raise JobNotFound
        return JobText(*rows[0])

    def owner_of(self, job_id: str) -> str | None:
        """Whose a job is, which never changes; None where there is none."""
        rows = self.database.run(
            "-- queue.owner_of\nselect owner_service from job j join lane l on l.id = j.lane_id where j.id = :job_id::uuid", job_id=job_id
        )
        return rows[0][0] if rows else None

    def get_many(self, ids: Sequence[str | None]) -> list[JobText | None]:
        """Jobs without payloads, in order; None where there is none."""
        rows = self.database.run("-- queue.get_many\nselect n, facts from job_texts_v1(:ids::uuid[], false, false)", ids=ids)
        found = {n: JobText(facts) for n, facts in rows}
        return [found.get(n) for n in range(1, len(ids) + 1)]

    def list_ids(self, wanted: JobFilter, limit: int, before: str | None = None) -> list[str]:
        """Ids of jobs that fit, newest first."""
        values = {"before": before} if before else {}
        statement = "-- queue.list\nselect j.id::text from job j where {conditions} order by j.id desc limit :at_most::int"
        return [row[0] for row in self._run_for_filter(wanted, statement, values, at_most=limit)]

    def count(self, wanted: JobFilter) -> int:
        """How many jobs fit."""
        return int(self._run_for_filter(wanted, "-- queue.count\nselect count(*) from job j where {conditions}", {})[0][0])

    def _run_for_filter(self, wanted: JobFilter, statement: str, more: dict[str, str], **beside: int) -> list[list[Any]]:
        given = {name: getattr(wanted, name, None) for name in _CONDITIONS}
        given["labels"] = _json_or_null(given["labels"] or {})
        values = {name: value for name, value in given.items() if value is not None} | more
        conditions = " and ".join(["true", *(_CONDITIONS[name] for name in values)])
        # A filter that fits hardly any job looks at all of them: such lists leave connections to everything else.
        if not self._listing.acquire(timeout=LIST_SECONDS):
            raise DatabaseBusy("too many lists are being made")
        try:
            return self.database.run(statement.format(conditions=conditions), **values, **beside)
        finally:
            self._listing.release()

    def pauses(self) -> str:
        """The rules in force as a JSON array."""
        statement = (
            "-- queue.pauses\nselect coalesce(json_agg(rules), '[]')::text from (select owner_service, task_type, model_profile, "
            "rfc3339(paused_at) as paused_at from pause order by owner_service, task_type, model_profile) rules"
        )
        return str(self.database.run(statement)[0][0])

    def pause(self, owners: Sequence[str] | None, types: Sequence[str] | None, profiles: Sequence[str] | None) -> str:
        """Pauses what is named; returns the rules in force as a JSON array."""
        statement = "-- queue.pause\nselect pause_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[])"
        return str(self.database.run(statement, owners=owners, task_types=types, profiles=profiles)[0][0])

    def resume(self, owners: Sequence[str] | None, types: Sequence[str] | None, profiles: Sequence[str] | None) -> str:
        """Lifts the pauses within what is named; returns the rules in force as a JSON array."""
        statement = "-- queue.resume\nselect resume_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[])"
        return str(self.database.run(statement, owners=owners, task_types=types, profiles=profiles)[0][0])

    def upkeep(self, seen: Mapping[str, tuple[float, str | None]]) -> tuple[int, int, int]:
        """Rescues, expires, promotes, up to 1,000 of each; writes down workers: id → (seconds ago, report). Zeros where another is."""
        rows = self.database.run(
            "-- queue.upkeep\nselect rescued, expired, promoted from upkeep_v1(:worker_ids::text[], :reports::text[], :ages::float8[])",
            worker_ids=list(seen),
            reports=[report for _, report in seen.values()],
            ages=[age for age, _ in seen.values()],
        )
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else (0, 0, 0)

    def fold(self) -> bool:
        """Moves up to 20,000 rows of the ledger into the counters and reports them; whether more are left."""
        more, moves = self.database.run("-- queue.fold\nselect more, moves from fold_v1(20000)")[0]
        self._on_moves([Move(*move) for move in _array(moves)])
        return bool(more)

    def prepare_partitions(self, retention: timedelta | None) -> None:
        """Sees to it that the next partitions exist: about eight lie within the retention, a month each where it is forever.

        Waits for no lock longer than 100 ms: everybody who creates waits behind it.
        """
        width = max((retention or timedelta(days=240)) / 8, timedelta(days=1)).total_seconds()
        self.database.script(f"begin; set local lock_timeout = '100ms'; select add_partitions_v1(interval '{width} seconds'); commit")

    def retire(self, retention: timedelta | None) -> tuple[str | None, list[str]]:
        """Takes one partition out that is past its time; also names those that had to be left. Waits for no lock longer than 100 ms."""
        cutoff = "null" if retention is None else f"interval '{retention.total_seconds()} seconds'"
        rows = self.database.script(
            f"begin; set local lock_timeout = '100ms'; select retired, left_alone from retire_partition_v1({cutoff}); commit"  # noqa: S608
        )
        return (rows[0][0], rows[0][1]) if rows else (None, [])

    def clear_retired(self, retention: timedelta) -> bool:
        """One step of clearing what was taken out; False where nothing is left."""
        statement = "-- queue.clear_retired\nselect clear_retired_v1(:retention::interval, 5000)"
        return bool(self.database.run(statement, retention=f"{retention.total_seconds()} seconds")[0][0])


def _array(text: str | None) -> list[Any]:
    """An array that came as JSON: pg8000 takes its own arrays apart character by character, which was a third of a claim's time here."""
    return msgspec.json.decode(text) if text else []


def _columns(jobs: Sequence[NewJob]) -> dict[str, Any]:
    """Jobs as arrays, the distinct lanes apart: jobs point into them."""
    lanes: dict[tuple[str, str, str, int], int] = {}
    lane_nos = [lanes.setdefault((job.owner_service, job.task_type, job.model_profile, job.priority), len(lanes) + 1) for job in jobs]
    owners, types, profiles, priorities = zip(*lanes, strict=True)
    return {
        "owners": owners,
        "task_types": types,
        "profiles": profiles,
        "priorities": priorities,
        "lane_nos": lane_nos,
        **{name: value(jobs) for name, (_, value) in _JOB_COLUMNS.items()},
    }


def _json_or_null(value: Mapping[str, str]) -> str | None:
    return msgspec.json.encode(value).decode() if value else None


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _completion_columns(completions: Sequence[Completion]) -> dict[str, Any]:
    claims = {"claim_ids": [each.claim_id for each in completions], "results": joined([each.result for each in completions])}
    return claims | _usage_columns([each.usage for each in completions])


def _failure_columns(failures: Sequence[Failure]) -> dict[str, Any]:
    return {
        "claim_ids": [failure.claim_id for failure in failures],
        "categories": [failure.category for failure in failures],
        "messages": [failure.message[:MAX_MESSAGE_CHARACTERS] for failure in failures],
        "retryables": [failure.retryable for failure in failures],
        "delays": [failure.retry_in_seconds for failure in failures],
    } | _usage_columns([failure.usage for failure in failures])


def _release_columns(releases: Sequence[Release]) -> dict[str, Any]:
    return {"claim_ids": [release.claim_id for release in releases], "delays": [release.delay_seconds for release in releases]}


def _usage_columns(usages: Sequence[str | None]) -> dict[str, Any]:
    counted = [count_usage(usage) for usage in usages]
    return {
        "usages": usages,
        "prompts": [usage.prompt_tokens for usage in counted],
        "completions": [usage.completion_tokens for usage in counted],
        "totals": [usage.total_tokens for usage in counted],
        "audios": [usage.audio_seconds for usage in counted],
    }


def log_job(event: str, job: JobText | str, *values: object) -> None:
    """What became of a job, to be found by the id of its caller's trace."""
    if log.isEnabledFor(logging.DEBUG):
        with about(trace_id=job.trace_id if isinstance(job, JobText) else None):
            log.debug(event, *values)


# ── Upkeep ─────────────────────────────────────────────────────────────────────────────────────────

UPKEEP_SECONDS = 2.0
# The schema of an empty database is applied within; longer is a database that hangs, and health must not wait for it.
FIRST_ROUND_SECONDS = 5.0
FAILING_STEP_LOG_SECONDS = 60.0
PARTITIONS_SECONDS = 60.0
RETENTION_SECONDS = 600.0
# Between two steps of clearing what was retired: without it claims took three times as long meanwhile, at the 99th percentile.
RETIRING_PAUSE_SECONDS = 0.2


class Upkeep:
    """The thread that applies the schema, takes back lapsed leases, folds the ledger, and makes and retires partitions.

    Once the schema is there, each of these by itself: where one fails the others go on.
    """

    def __init__(self, queue: Queue, settings: Settings, waiting: WaitingClaims, metrics: Metrics) -> None:
        self._queue, self._settings, self._waiting, self._metrics = queue, settings, waiting, metrics
        self._seen: dict[str, tuple[float, str | None]] = {}
        self._lock = threading.Lock()
        self._begun, self._stopped = threading.Event(), threading.Event()
        # When a failing step is logged again.
        self._failing: dict[str, float] = {}
        self._has_schema = False
        self._next = {"partitions": 0.0, "retention": 0.0}
        self._thread = threading.Thread(target=self._work, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begins; returns after the first round or five seconds. A database that is away is waited for in the thread."""
        self._thread.start()
        self._begun.wait(FIRST_ROUND_SECONDS)

    def stop(self) -> None:
        """Ends after the round at hand."""
        self._stopped.set()
        if self._thread.ident:
            self._thread.join(timeout=STATEMENT_SECONDS)

    def worker_seen(self, worker_id: str, report: str | None) -> None:
        """Takes note of a worker; written down with the next round."""
        with self._lock:
            known = self._seen.get(worker_id)
            self._seen[worker_id] = (time.monotonic(), report or (known[1] if known else None))

    def _settle(self) -> bool:
        """Takes back, expires, promotes; writes down who was seen. True where there is more to do at once. Raises a Refusal."""
        with self._lock:
            seen, self._seen = self._seen, {}
        now = time.monotonic()
        rescued, expired, promoted = self._queue.upkeep({worker_id: (now - at, report) for worker_id, (at, report) in seen.items()})
        self._metrics.count_upkeep(rescued, expired)
        if rescued or expired or promoted:
            log.info("upkeep_done rescued=%d expired=%d promoted=%d", rescued, expired, promoted)
            self._waiting.jobs_ready()
        return max(rescued, expired, promoted) >= 1000

    def _work(self) -> None:
        busy = True
        while not self._stopped.wait(0.0 if busy else UPKEEP_SECONDS):
            busy = self._round()
            self._begun.set()

    def _round(self) -> bool:
        if not self._has_schema:
            self._try("migrate", self._find_schema)
        if not self._has_schema:
            return False
        busy = self._try("settle", self._settle)
        busy |= self._try("fold", self._queue.fold)
        self._try("partitions", self._prepare_partitions)
        return self._try("retention", self._retire) or busy

    def _try(self, name: str, act: Callable[[], bool]) -> bool:
        """Whether there is more to do at once.

        What fails is logged when it begins, every minute, and when it ends.
        """
        try:
            busy = act()
        except Refusal as refusal:
            self._log_failure(name, refusal)
            return False
        except Exception as error:  # noqa: BLE001 -- told to the log
            log_crash(log, "upkeep_failed step=%s", error, name)
            return False
        if name in self._failing:
            del self._failing[name]
            log.info("upkeep_goes_on step=%s", name)
        return busy

    def _log_failure(self, name: str, refusal: Refusal) -> None:
        now = time.monotonic()
        if now < self._failing.get(name, now):
            return
        self._failing[name] = now + FAILING_STEP_LOG_SECONDS
        # An outdated schema waits for the operator, whatever its callers may repeat.
        passes = refusal.retry_after and not isinstance(refusal, SchemaOutdated)
        level = logging.WARNING if passes else logging.ERROR
        reason = refusal.reason or refusal.detail
        log.log(level, "upkeep_waits step=%s code=%s reason=%s", name, refusal.code, reason)

    def _find_schema(self) -> bool:
        """Applies the schema, or checks that somebody has: no other step works without it."""
        find = migrate if self._settings.migrate_on_start else require_schema
        find(self._queue.database)
        self._has_schema = True
        return False

    def _is_due(self, name: str, seconds: float) -> bool:
        if time.monotonic() < self._next[name]:
            return False
        self._next[name] = time.monotonic() + seconds
        return True

    def _prepare_partitions(self) -> bool:
        if self._is_due("partitions", PARTITIONS_SECONDS):
            self._queue.prepare_partitions(self._settings.retention)
        return False

    def _retire(self) -> bool:
        """One step; the next one at once where something is left to clear."""
        if not self._is_due("retention", RETENTION_SECONDS):
            return False
        retired, left_alone = self._queue.retire(self._settings.retention)
        if retired:
            log.info("partition_retired name=%s", retired)
        if left_alone:
            log.warning("partitions_left_alone names=%s reason=too_much_in_them_lives", ",".join(left_alone))
        more = bool(retired) or (self._settings.retention is not None and self._queue.clear_retired(self._settings.retention))
        if more:
            self._next["retention"] = 0.0
            self._stopped.wait(RETIRING_PAUSE_SECONDS)
        return more


# ── Job resources ──────────────────────────────────────────────────────────────────────────────────


class Jobs:
    """The operations on jobs. Each method answers the operation of its name."""

    def __init__(self, service: "Service") -> None:
        self.service, self.queue, self.waiting = service, service.queue, service.waiting

    def create(self, call: Call) -> None:
        """POST creates a job."""
        [job] = traced([call.body], call.request)
        call.token.assert_may_create([job])
        created, job_id, text = self.service.creating.run(job, len(job.input))
        self.waiting.jobs_ready([(job.model_profile, job.task_type, job.owner_service)])
        log_job("job_created id=%s new=%s", text, job_id, created)
        call.response.location = f"/api/v1/jobs/{job_id}"
        call.answer(text.render(), 201 if created else 200)

    def create_many(self, call: Call) -> None:
        """POST creates many jobs, all or none."""
        jobs = traced(call.body, call.request)
        call.token.assert_may_create(jobs, "/jobs")
        made = self.queue.create_batch(jobs)
        lanes = {(job.model_profile, job.task_type, job.owner_service) for job in jobs}
        self.waiting.jobs_ready(list(lanes))
        new = sum(job.created for job in made)
        log.debug("jobs_created new=%d existing=%d", new, len(made) - new)
        answer = {"jobs": made, "created": new, "existing": len(made) - new}
        call.answer(msgspec.json.encode(answer), 201 if new else 200)

    def list(self, call: Call) -> None:
        """GET lists jobs, newest first."""
        wanted = call.token.limited_to_owners(call.query)
        ids = self.queue.list_ids(wanted, wanted.limit + 1, wanted.cursor)
        found = self.queue.get_many(ids[: wanted.limit])
        jobs = b",".join(job.render(with_result=False) for job in found if job)
        is_last = len(ids) <= wanted.limit
        cursor = b"null" if is_last else b'"%b"' % ids[wanted.limit - 1].encode()
        call.answer(b'{"jobs":[%b],"next_cursor":%b}' % (jobs, cursor))

    def claim(self, call: Call) -> None:
        """POST claims pending jobs, waiting for one where asked to."""
        asked = call.token.limited_to_profiles(call.body)
        asked = attrs.evolve(asked, claim_id=(asked.claim_id or str(uuid.uuid4())).lower())
        self.service.upkeep.worker_seen(asked.worker_id, asked.worker)
        client_is_gone = call.request.env.get("waitress.client_disconnected", lambda: False)
        claimed = self.waiting.claim(asked, client_is_gone)
        log.debug("jobs_claimed worker_id=%r empty=%s", asked.worker_id, not claimed.jobs)
        call.answer(f'{{"claim_id":"{claimed.claim_id}","jobs":[{claimed.jobs}]}}')

    def get_many(self, call: Call) -> None:
        """POST reads many jobs by id, without payloads."""
        ids = call.body.ids
        if len(ids) > MAX_LOOKUP:
            message = f"must have at most {MAX_LOOKUP} items"
            raise ValidationFailed(errors=[{"path": "/ids", "message": message}])
        jobs = self.queue.get_many([job_id if UUID.fullmatch(job_id) else None for job_id in ids])
        owns = call.token.owns
        rendered = (job.render(with_result=False) if job and owns(job.owner_service) else b"null" for job in jobs)
        call.answer(b'{"jobs":[%b]}' % b",".join(rendered))

    def get(self, call: Call) -> None:
        """GET reads a job, waiting for its end where asked to."""
        with_input = call.query.include == "input"
        job = self.queue.get(call.job_id, with_input=with_input)
        if call.query.wait_seconds and not job.is_finished:
            self.waiting.wait_for(call.job_id, call.query.wait_seconds)
            job = self.queue.get(call.job_id, with_input=with_input)
        call.answer(job.render(with_input=with_input))

    def delete(self, call: Call) -> None:
        """DELETE erases a finished job."""
        self.queue.delete(call.job_id)
        call.response.status = falcon.HTTP_204

    # Of one job. Ends that come at the same time share a statement.

    def complete(self, call: Call) -> None:
        """POST completes a job."""
        size = len(call.body.result)
        self._answer_changed(call, self.service.completing.run((call.job_id, call.body), size))

    def fail(self, call: Call) -> None:
        """POST fails an attempt."""
        size = len(call.body.message)
        self._answer_changed(call, self.service.failing.run((call.job_id, call.body), size))

    def release(self, call: Call) -> None:
        """POST gives a job back."""
        self._answer_changed(call, self.service.releasing.run((call.job_id, call.body), 0))

    def retry(self, call: Call) -> None:
        """POST puts a job back to pending."""
        self._answer_changed(call, self.queue.retry(call.job_id, call.body.from_))

    def cancel(self, call: Call) -> None:
        """POST cancels a job."""
        self._answer_changed(call, self.queue.cancel(call.job_id, call.body.reason))

    def heartbeat(self, call: Call) -> None:
        """POST extends a lease."""
        call.answer(self.queue.heartbeat(call.job_id, call.body))

    def _answer_changed(self, call: Call, job: JobText) -> None:
        self.service.jobs_changed([call.job_id], requeued=call.operation.requeues)
        log_job("job_called path=%r", job, call.request.path)
        call.answer(job.render())

    # Of many jobs, each by itself: an item's answer has its own status.

    def complete_many(self, call: Call) -> None:
        """POST completes jobs."""
        self._answer_each(call, self.queue.complete_many)

    def fail_many(self, call: Call) -> None:
        """POST fails attempts."""
        self._answer_each(call, self.queue.fail_many)

    def release_many(self, call: Call) -> None:
        """POST gives jobs back."""
        self._answer_each(call, self.queue.release_many)

    def heartbeat_many(self, call: Call) -> None:
        """POST extends leases."""
        self._answer_each(call, self.queue.heartbeat_many)

    def _answer_each(
        self,
        call: Call,
        act: Callable[[Sequence[str], Sequence[Any]], Sequence[str | HeartbeatAnswer]],
    ) -> None:
        entries = call.body.entries
        wanted = [(job_id, asked) for job_id, asked in entries if not isinstance(asked, Refusal)]
        ids, bodies = zip(*wanted, strict=True) if wanted else ((), ())
        outcomes = list(act(ids, bodies)) if wanted else []
        changed = [job_id for job_id, outcome in zip(ids, outcomes, strict=True) if outcome == "ok"]
        if changed:
            self.service.jobs_changed(changed, requeued=call.operation.requeues)
        log.debug("jobs_called path=%r count=%d", call.request.path, len(wanted))
        in_turn = iter(outcomes)
        report = getattr(call.body.beside, "worker", None)
        answers = [
            {"id": job_id, **(problem_of_item(asked) if isinstance(asked, Refusal) else self._item(next(in_turn), report))}
            for job_id, asked in entries
        ]
        call.answer(msgspec.json.encode({"jobs": answers}))

    def _item(self, outcome: str | HeartbeatAnswer, report: str | None) -> dict[str, Any]:
        word = outcome if isinstance(outcome, str) else outcome.outcome
        if word != "ok":
            self.service.metrics.count_refusal(word)
            return problem_of_item(OUTCOMES[word]())
        if isinstance(outcome, str):
            return {"status": 200}
        if outcome.worker_id:
            self.service.upkeep.worker_seen(outcome.worker_id, report)
        return {
            "status": 200,
            "lease_expires_at": outcome.lease_expires_at,
            "lease_seconds": outcome.lease_seconds,
        }

    def retry_many(self, call: Call) -> None:
        """POST retries failed and cancelled jobs that fit a filter, or counts them."""
        limit, statuses = call.body.limit, list(call.body.filter.status)
        wanted = call.token.limited_to_owners(call.body.filter)
        if call.body.dry_run:
            call.request.context.audited = False
            matched = self.queue.count(wanted)
            answer = {"retried": 0, "more": matched > limit, "matched": matched}
        else:
            ids = self.queue.list_ids(wanted, limit + 1)
            retried = self.queue.retry_many(ids[:limit], statuses).count("ok") if ids else 0
            self.waiting.jobs_ready()
            answer = {"retried": retried, "more": len(ids) > limit}
        call.answer(msgspec.json.encode(answer))

    # What is handed out.

    def pauses(self, call: Call) -> None:
        """GET lists what is paused."""
        call.answer(f'{{"paused":{self.queue.pauses()}}}')

    def pause(self, call: Call) -> None:
        """POST stops handing out jobs."""
        self._change_pauses(call, self.queue.pause)

    def resume(self, call: Call) -> None:
        """POST hands them out again."""
        self._change_pauses(call, self.queue.resume)

    def _change_pauses(self, call: Call, act: Callable[..., str]) -> None:
        named = call.body
        if not any(attrs.asdict(named).values()):
            message = "must name model_profiles, task_types or owner_services"
            raise ValidationFailed(errors=[{"path": "", "message": message}])
        rules = act(named.owner_services, named.task_types, named.model_profiles)
        log.info("pauses_changed path=%r rules=%s", call.request.path, rules)
        self.waiting.jobs_ready()
        call.answer(f'{{"paused":{rules}}}')


def traced(jobs: list[NewJob], request: falcon.Request) -> list[NewJob]:
    """The jobs, those without a traceparent of their own with that of the request."""
    trace = read_traceparent(request.get_header("traceparent"))
    if not trace:
        return jobs
    return [job if job.traceparent else attrs.evolve(job, traceparent=trace) for job in jobs]


# ── Routes ─────────────────────────────────────────────────────────────────────────────────────────


class Service:
    """What one process of the service is made of."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(
            settings.database_url,
            settings.database_schema,
            settings.database_connections,
            settings.database_pool_mode,
        )
        self.metrics = Metrics(__version__)
        self.queue = Queue(self.database, self.metrics.count_moves)
        self.creating = GroupCommit(self.queue.create_each)
        self.completing = GroupCommit(self.queue.complete_each)
        self.failing = GroupCommit(self.queue.fail_each)
        self.releasing = GroupCommit(self.queue.release_each)
        self.waiting = WaitingClaims(self.queue, settings.http_threads - 32)
        self.upkeep = Upkeep(self.queue, settings, self.waiting, self.metrics)
        self.access = AccessMiddleware(settings.tokens)
        self.draining = False
        self.monitoring = Monitoring(
            version=__version__,
            access="tokens" if settings.tokens else "open",
            database=self.database,
            metrics=self.metrics,
            board=ProviderBoard(settings.environ),
            waiting=self.waiting.waiting_count,
            is_draining=lambda: self.draining,
        )

    def start(self) -> None:
        """Applies the schema and begins upkeep; a database that is away is waited for in the background."""
        self.upkeep.start()

    def drain(self) -> None:
        """Answers the requests that wait, and makes `readyz` refuse; others are served as before."""
        self.draining = True
        self.waiting.close()

    def stop(self) -> None:
        """Ends the threads and closes the connections."""
        self.waiting.close()
        self.upkeep.stop()
        self.database.close()

    def jobs_changed(self, job_ids: Sequence[str], *, requeued: bool) -> None:
        """Wakes callers that wait for these jobs to finish, and claims where some may have become ready again."""
        self.waiting.jobs_finished(job_ids)
        if requeued:
            self.waiting.jobs_ready()

    def problem_of_server(self, status: int, reason: str) -> dict[str, Any]:
        """Problem details for what the server refuses before routing, counted."""
        body = problem_of_server(status, reason)
        self.metrics.count_refusal(body["code"])
        return body


def create_app(service: Service) -> "falcon.App[Any, Any]":
    """The WSGI application. Every operation of `operations.py` goes to the surface that has a method of its name."""
    middleware: list[Any] = [CountingMiddleware(service.metrics), service.access, SameSiteMiddleware()]
    app = falcon.App(middleware=middleware)
    app.req_options.keep_blank_qs_values = True
    app.add_error_handler(Exception, answer_crash)
    app.add_error_handler(falcon.HTTPError, answer_falcon_error)
    app.add_error_handler(Refusal, answer_refusal)
    surfaces = (Jobs(service), service.monitoring, Documents(__version__))
    add_routes(app, surfaces, service.settings.max_body_bytes, service.queue.owner_of)
    app.add_sink(service.access.refuse_unknown, API)
    return app


# ── The command line ───────────────────────────────────────────────────────────────────────────────


# From glibc's malloc.h.
M_MMAP_THRESHOLD = -3


def give_memory_back() -> None:
    """Has glibc map each payload by itself, so that its memory goes back to the system with it.

    Left alone it raises its threshold after the first large one, and payloads stay in the heaps of 256 threads: 2 GB after six jobs
    of 30 MB at once, 50 MB with this. Another libc has no mallopt, or its own idea of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a clean end."""
    try:
        listener = listen(settings.http_host, settings.http_port)
    except OSError as error:
        log.error("listen_failed host=%s port=%d error=%s", settings.http_host, settings.http_port, error.strerror)
        return 1
    give_memory_back()
    service = Service(settings)
    service.start()
    server = Server(
        create_app(service),
        listener,
        threads=settings.http_threads,
        max_body_bytes=settings.max_body_bytes,
        max_bodies_bytes=settings.max_bodies_bytes,
        stall_seconds=settings.stall_seconds,
        separate=PROBES,
        admits=service.access.admits,
        problem=service.problem_of_server,
        drain=service.drain,
        drain_seconds=settings.drain_seconds,
        one_core=settings.http_one_core,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.end)
    # What is here stays: no collection needs to look at it again.
    gc.collect()
    gc.freeze()
    _log_start(settings, listener.getsockname()[1])
    server.run()
    service.stop()
    log.info("service_stopped")
    return 0


def _log_start(settings: Settings, port: int) -> None:
    if settings.tokens:
        log.info("access_by_tokens tokens=%s", ", ".join(map(str, settings.tokens)))
    else:
        log.warning("access_open reason=%r", "no tokens are configured, every caller may do everything")
    log.info(
        "service_started version=%s host=%s port=%d database=%s",
        __version__,
        settings.http_host,
        port,
        settings.database_url.shown,
    )


def check(settings: Settings) -> int:
    """Prints what the service would find: database, schema, providers. 0 where it could serve."""
    service = Service(settings)
    print(f"ai-service {__version__}, database {settings.database_url.shown}, schema {settings.database_schema}")
    try:
        service.monitoring.assert_ready()
        print(f"database: ready, schema version {SCHEMA_VERSION}")
        ready = True
    except Refusal as refusal:
        print(f"database: not ready, {refusal.code}: {refusal.reason or refusal.detail}")
        ready = False
    print(f"access: by tokens, {', '.join(map(str, settings.tokens))}" if settings.tokens else "access: open, no tokens are configured")
    _print_providers(service.monitoring.board.installed)
    return 0 if ready else 1


def migrate_database(settings: Settings) -> int:
    """Applies `schema.sql`, prints from which version to which. 0 where the database has it, 1 where it refuses, 3 where it is away."""
    database = Database(settings.database_url, settings.database_schema, 1, settings.database_pool_mode)
    where = f"database {settings.database_url.shown}, schema {settings.database_schema}"
    try:
        before = schema_version(database)
        migrate(database)
        after = schema_version(database)
    except (Refusal, pg8000.native.DatabaseError) as error:
        reason = error.reason or error.detail if isinstance(error, Refusal) else error.args[0].get("M", "")
        complain(f"ai-service: {where}: {reason}")
        return 3 if isinstance(error, DatabaseUnavailable | DatabaseBusy) else 1
    finally:
        database.close()
    print(f"{where}: " + (f"version {after} was there already" if before == after else f"version {before} → {after}"))
    return 0


def check_worker(environ: Mapping[str, str]) -> int:
    """Prints what a worker would find, which has no database: the providers. 0 where a job could be run."""
    print(f"ai-service {__version__}")
    print("database: DATABASE_URL is not set, so only a worker could run here")
    listed = providers.discover(environ)
    _print_providers(listed)
    return 0 if any(one.provider for one in listed) else 1


def _print_providers(listed: Sequence[providers.InstalledProvider]) -> None:
    for one, item in zip(listed, providers.check_all(listed), strict=True):
        print(printable(f"provider {item['name']}: {item['status']}{', ' + item['detail'] if item.get('detail') else ''}"))
        for name, shown in one.settings.items():
            print(printable(f"  {name} {shown}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `ai-service`. Returns 0, 1 where it failed, or 2 for wrong usage or settings; `cli.commands.EXIT_CODES` has the rest."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="ai-service", description="Owns the life of AI jobs; settings come from the environment.")
    parser.add_argument("--version", action="version", version=f"ai-service {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the HTTP interface")
    bundled = "start a bundled PostgreSQL (needs the extra 'embedded')"
    serving.add_argument("--embedded", action="store_true", help=bundled)
    serving.add_argument("--data", type=Path, help="data directory of the bundled PostgreSQL")
    if words[:1] == ["serve"] and {"-h", "--help"} & set(words):
        from ai_internal.server.embedded import default_folder  # a service does not need it

        serving.formatter_class = argparse.RawDescriptionHelpFormatter
        serving.epilog = f"""\
With --embedded, data is stored in
  {default_folder()}
--data changes this."""
    commands.add_parser("worker", help="claim jobs and run them on the configured providers")
    commands.add_parser("check", help="check settings, database, schema and providers")
    commands.add_parser("demo", help="show jobs going in and results coming back")
    commands.add_parser("migrate", help="apply schema.sql to the database in DATABASE_URL")
    if words[:1] not in (["serve"], ["worker"]):
        from ai_internal.cli.commands import EXIT_CODES, add_commands  # processes that stay have no use for it

        add_commands(commands)
        parser.epilog, parser.formatter_class = EXIT_CODES, argparse.RawDescriptionHelpFormatter
    options = parser.parse_args(words)
    if "act" in options:
        from ai_internal.cli.commands import run

        return run(options)
    if options.command == "serve" and options.data and not options.embedded:
        parser.error("--data is the folder of the embedded PostgreSQL: it goes with --embedded")
    log_to_stderr(os.environ)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    if options.command == "worker":
        from ai_internal.worker import worker

        return worker.main(os.environ)
    if options.command == "demo":
        from ai_internal.cli import demo

        return demo.main(os.environ)
    if options.command == "serve" and options.embedded:
        return _serve_embedded(options.data)
    if options.command == "check" and not os.environ.get("DATABASE_URL", "").strip():
        return check_worker(os.environ)
    return _with_settings(os.environ, {"serve": serve, "check": check, "migrate": migrate_database}[options.command])


def _serve_embedded(folder: Path | None) -> int:
    from ai_internal.server import embedded

    try:
        with embedded.embedded_postgres(folder or embedded.default_folder()) as url:
            return _with_settings({**os.environ, "DATABASE_URL": url}, serve)
    except embedded.EmbeddedError as error:
        complain(f"ai-service: {error}")
        return 1


def _with_settings(environ: Mapping[str, str], act: Callable[[Settings], int]) -> int:
    try:
        settings = Settings.read(environ)
    except SettingsError as error:
        complain("ai-service: the settings cannot be used", error.problems)
        return 2
    # Of the tokens this process keeps digests, and nothing that runs in it can read more.
    os.environ.pop("API_TOKENS", None)
    logging.getLogger().setLevel(settings.log_level)
    requests_log.setLevel(logging.INFO if settings.log_requests else logging.WARNING)
    return act(settings)


if __name__ == "__main__":
    sys.exit(main())
