"""The HTTP client of AI Service, for callers that create jobs and for workers that run them.

    service = AIService("http://127.0.0.1:8080")
    new = NewJob("telephony", "beeline/17", "call_analysis", "qwen2.5-14b", input={"prompt": "Hi"})
    job = service.wait_for_job(service.create_job(new).id, timeout_seconds=600)
    print(job.status, job.result)

Sections: JSON, requests, errors, responses, pauses, connections, calls.

A call is repeated when its response is lost and a repeat is safe: a create carries an idempotency
key, a claim a claim_id, a retry the statuses that the caller saw. Unknown fields of a response are
ignored, so that an older client works with a newer service.

This file can be copied into another project. It needs the packages attrs, msgspec and urllib3.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, cast, get_args, get_origin, get_type_hints
from urllib.parse import quote, urlencode

import attrs
import msgspec
import urllib3
from attrs import field, frozen
from urllib3.connection import HTTPConnection

FINISHED = frozenset({"completed", "failed", "cancelled"})
RETRYABLE = frozenset({"failed", "cancelled", "running"})

# The service holds a request for a job, or a claim, for at most this long.
MAX_WAIT_SECONDS = 60.0

T = TypeVar("T")


# ---------------------------------------------------------------- JSON


class NotJSON(ValueError):
    """The value or text is not JSON that the service accepts. The message never has the value."""


def encode(value: Any) -> str:
    """The JSON text of a Python value, or of RawJSON. Floats and integers of any size are exact.

    Raises NotJSON for NaN, infinity, unpaired surrogates, and other types.
    """
    if isinstance(value, RawJSON):
        return value.text
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:
        raise NotJSON("text with an unpaired surrogate has no UTF-8") from None
    except RecursionError:
        raise NotJSON("nested too deeply, or within itself") from None
    except (TypeError, ValueError) as error:
        # Only the message for a float shows the value, which is NaN or infinite then.
        raise NotJSON(f"not JSON: {error}") from None
    return text


def _check_json(_: object, __: object, text: str) -> None:
    try:
        msgspec.json.decode(text.encode(), type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise NotJSON(f"not JSON text: {type(error).__name__}") from None


@frozen
class RawJSON:
    """JSON text that is sent or was received, character by character. Raises NotJSON."""

    text: str = field(repr=False, validator=_check_json)

    def decode(self) -> Any:
        """The Python value.

        Raises NotJSON for an integer of more than 4,300 digits and for extreme nesting.
        """
        try:
            return json.loads(self.text)
        except RecursionError:
            raise NotJSON("nested too deeply for Python") from None
        except ValueError:
            raise NotJSON("holds a number that Python refuses") from None


def object_text(fields: Mapping[str, Any]) -> str:
    """The JSON text of an object whose values are Python values or RawJSON. Raises NotJSON."""
    return "{" + ",".join(f"{encode(name)}:{encode(value)}" for name, value in fields.items()) + "}"


def split_object(text: bytes | msgspec.Raw) -> dict[str, RawJSON]:
    """The fields of a JSON object, each as the text it has. Raises NotJSON."""
    return {name: _raw(value) for name, value in _slices(text, dict[str, msgspec.Raw]).items()}


def _slices(text: bytes | msgspec.Raw, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=shape)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NotJSON(f"not the JSON expected: {type(error).__name__}") from None


def _raw(text: bytes | msgspec.Raw) -> RawJSON:
    try:
        return RawJSON(bytes(text).decode())
    except UnicodeDecodeError:
        raise NotJSON("not UTF-8") from None


@cache
def _json_fields(kind: Any) -> dict[str, tuple[str, Any]]:
    """The attribute and the type of each JSON field; `raw_input` is the text of `input`."""
    # The hints alone are not the fields: attrs adds those of cached properties.
    names, hints = [each.name for each in attrs.fields(kind)], get_type_hints(kind)
    return {name.removeprefix("raw_"): (name, hints[name]) for name in names}


def _request_fields(item: Any) -> dict[str, Any]:
    """The JSON fields of a request. None is left out, except in a payload: it means the default."""
    fields = {}
    for name, (attribute, hint) in _json_fields(item.__class__).items():
        value = getattr(item, attribute)
        if hint is Any or value is not None:
            fields[name] = _time_text(value) if datetime in get_args(hint) else value
    return fields


def _time_text(at: datetime) -> str:
    if at.tzinfo is None:
        raise ValueError("a time needs a time zone")
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _array_text(objects: Iterable[Mapping[str, Any]]) -> RawJSON:
    return RawJSON("[" + ",".join(map(object_text, objects)) + "]")


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# Other values may hold any number, which json reads at any size and msgspec does not.
_PLAIN = {each for kind in (str, int, float, bool, datetime) for each in (kind, kind | None)}


def _decode(text: bytes | msgspec.Raw, kind: Any) -> Any:
    """The value of type `kind` in a JSON text, in which RawJSON keeps its text."""
    if kind in _PLAIN:
        return msgspec.json.decode(text, type=kind)
    if get_origin(kind) is tuple:
        [item, _] = get_args(kind)
        return tuple(_decode(each, item) for each in _slices(text, list[msgspec.Raw]))
    if RawJSON in (kind, *get_args(kind)):
        return _raw(text)
    if attrs.has(kind):
        given = _slices(text, dict[str, msgspec.Raw])
        fields = _json_fields(kind)
        names = fields.keys() & given.keys()
        return kind(**{fields[name][0]: _decode(given[name], fields[name][1]) for name in names})
    if type(None) in get_args(kind):
        return None if bytes(text) == b"null" else _decode(text, get_args(kind)[0])
    return msgspec.convert(_raw(text).decode(), kind)


def _read(text: bytes, kind: type[T]) -> T:
    try:
        return cast(T, _decode(text, kind))
    except (ValueError, TypeError, msgspec.MsgspecError) as error:
        title, detail = "not a response of this service", f"{kind.__name__}: {error}"
        raise UnexpectedResponse(None, "unexpected_answer", title, detail) from None


# ---------------------------------------------------------------- requests


@frozen
class JobFields:
    """What the caller of a job decides: these fields are in NewJob, Job and ClaimedJob."""

    owner_service: str
    owner_ref: str
    task_type: str
    model_profile: str
    priority: int | None = None
    run_at: datetime | None = None
    expires_at: datetime | None = None
    max_attempts: int | None = None
    traceparent: str | None = None
    labels: Mapping[str, str] = field(factory=dict)


@frozen
class NewJob(JobFields):
    """A job to create. `input` is any JSON value, or RawJSON. None means the service's default.

    Without an idempotency key one is made here: creating the same object twice makes one job.
    """

    input: Any = field(kw_only=True, repr=False)
    idempotency_key: str = field(kw_only=True, factory=lambda: str(uuid.uuid4()))


@frozen
class Completion:
    """One result of a bulk call. `result` is any JSON value, or RawJSON."""

    id: str
    claim_id: str = field(repr=False)
    result: Any = field(repr=False)
    usage: Mapping[str, Any] | None = None


@frozen
class Failure:
    """One failed attempt of a bulk call."""

    id: str
    claim_id: str = field(repr=False)
    category: str
    message: str
    retryable: bool = False
    retry_in_seconds: float | None = None
    usage: Mapping[str, Any] | None = None


@frozen
class Heartbeat:
    """One heartbeat of a bulk call."""

    id: str
    claim_id: str = field(repr=False)
    lease_seconds: float | None = None
    progress: Mapping[str, Any] | None = None


@frozen
class Release:
    """One job of a bulk call that goes back to pending; its attempt is not counted."""

    id: str
    claim_id: str = field(repr=False)
    delay_seconds: float | None = None


@frozen(kw_only=True)
class JobFilter:
    """Which jobs. A field has one value or several alternatives; all given fields, and all labels, must match."""

    status: Sequence[str] = ()
    owner_service: Sequence[str] = ()
    owner_ref: Sequence[str] = ()
    task_type: Sequence[str] = ()
    model_profile: Sequence[str] = ()
    error_category: Sequence[str] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None
    labels: Mapping[str, str] = field(factory=dict)


def _filter_fields(jobs: JobFilter) -> dict[str, Any]:
    return {name: value for name, value in _request_fields(jobs).items() if value}


def _claim_filters(
    model_profiles: Sequence[str] | None,
    task_types: Sequence[str] | None,
    owner_services: Sequence[str] | None,
) -> dict[str, Any]:
    names = {"model_profiles": model_profiles, "task_types": task_types}
    given = _given(**names, owner_services=owner_services)
    return {name: [each] if isinstance(each, str) else list(each) for name, each in given.items()}


# ---------------------------------------------------------------- errors


@frozen
class FieldError:
    """One problem of a request: a JSON pointer to the field, and what is wrong there."""

    path: str
    message: str


@attrs.define(eq=False)
class ServiceError(Exception):
    """The service rejected a call, or could not be reached; then `status` is None.

    `retryable` means that the same call may succeed later, after `retry_after_seconds` if the
    service gave them. The service logs the call under `request_id`.
    """

    status: int | None
    code: str
    title: str = ""
    detail: str | None = None
    errors: tuple[FieldError, ...] = ()
    retryable: bool = False
    retry_after_seconds: float | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        status = f"{self.status} {self.code}" if self.status else self.code
        problems = (f"{error.path}: {error.message}" for error in self.errors)
        request = self.request_id and f"request {self.request_id}"
        return "; ".join(filter(None, (status, self.title, self.detail, *problems, request)))


class ServiceUnavailable(ServiceError):
    """No response, or the service cannot work right now; the same call may succeed later."""


class Unauthorized(ServiceError):
    """The token is missing or wrong."""


class Forbidden(ServiceError):
    """The token's role does not allow this call."""


class NotFound(ServiceError):
    """The job does not exist, or it belongs to another owner."""


class Conflict(ServiceError):
    """The job's state does not allow the call."""


class InvalidState(Conflict):
    """The job's status does not allow the call."""


class ClaimLost(Conflict):
    """The claim no longer holds the job; what its worker still reports has no effect."""


class JobCancelled(Conflict):
    """The job was cancelled while it ran."""


class ClaimIdReused(Conflict):
    """Another worker used the claim_id."""


class IdempotencyKeyReused(Conflict):
    """The idempotency key belongs to a job with another owner_ref, task_type or model_profile."""


class ValidationFailed(ServiceError):
    """The request is invalid; `errors` lists all problems."""


class PayloadTooLarge(ServiceError):
    """The body is larger than the service accepts."""


class UnexpectedResponse(ServiceError):
    """A response that this service does not send; a proxy or another program may have sent it."""


_by_code: dict[str, type[ServiceError]] = {
    "claim_lost": ClaimLost,
    "job_cancelled": JobCancelled,
    "invalid_state": InvalidState,
    "claim_id_reused": ClaimIdReused,
    "idempotency_key_reused": IdempotencyKeyReused,
}
_by_status: dict[int, type[ServiceError]] = {
    400: ValidationFailed,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    422: ValidationFailed,
    429: ServiceUnavailable,
    502: ServiceUnavailable,
    503: ServiceUnavailable,
    504: ServiceUnavailable,
}


@frozen
class _Problem:
    """The body of an error response; without fields where a proxy sent something else."""

    code: str | None = None
    title: str | None = None
    detail: str | None = None
    errors: tuple[FieldError, ...] = ()
    retryable: bool | None = None

    def as_error(self, status: int) -> ServiceError:
        code = self.code or f"http_{status}"
        kind = _by_code.get(code) or _by_status.get(status, ServiceError)
        retryable = kind is ServiceUnavailable if self.retryable is None else self.retryable
        return kind(status, code, self.title or "", self.detail, self.errors, retryable)


def _error_of(response: urllib3.BaseHTTPResponse) -> ServiceError:
    try:
        problem = _read(response.data, _Problem)
    except UnexpectedResponse:
        problem = _Problem()
    error = problem.as_error(response.status)
    error.retry_after_seconds = _retry_after(response.headers.get("Retry-After", ""))
    error.request_id = response.headers.get("X-Request-ID")
    return error


def _retry_after(header: str) -> float | None:
    with suppress(TypeError, ValueError):
        if header.strip().isdigit():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return None


# ---------------------------------------------------------------- responses


@frozen
class JobError:
    """Why a job failed or was cancelled."""

    category: str
    message: str


@frozen
class AttemptError:
    """One attempt that did not complete."""

    attempt: int
    category: str
    message: str
    worker_id: str | None = None
    usage: Mapping[str, Any] | None = None
    at: datetime | None = None


@frozen(kw_only=True)
class Job(JobFields):
    """A job as the service knows it. Lists and batches have no payloads."""

    id: str
    status: str
    priority: int = 0
    attempt: int = 0
    max_attempts: int = 1
    idempotency_key: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker_id: str | None = None
    lease_expires_at: datetime | None = None
    progress: Mapping[str, Any] | None = field(default=None, repr=False)
    usage: Mapping[str, Any] | None = None
    error: JobError | None = None
    errors: tuple[AttemptError, ...] = ()
    raw_input: RawJSON | None = field(default=None, repr=False)
    raw_result: RawJSON | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether it completed, failed or was cancelled."""
        return self.status in FINISHED

    @cached_property
    def input(self) -> Any:
        """The input; None where the response has none. Raises NotJSON (see RawJSON.decode)."""
        return self.raw_input.decode() if self.raw_input else None

    @cached_property
    def result(self) -> Any:
        """The result; None where there is none. Raises NotJSON (see RawJSON.decode)."""
        return self.raw_result.decode() if self.raw_result else None


@frozen(kw_only=True)
class ClaimedJob(JobFields):
    """A job that a claim took, with what its worker needs."""

    id: str
    claim_id: str = field(repr=False)
    priority: int = 0
    attempt: int
    max_attempts: int
    lease_seconds: float
    created_at: datetime | None = None
    lease_expires_at: datetime | None = None
    raw_input: RawJSON = field(repr=False)

    @cached_property
    def input(self) -> Any:
        """The input. Raises NotJSON (see RawJSON.decode)."""
        return self.raw_input.decode()


@frozen
class Claim:
    """The jobs that one claim took; there may be none."""

    claim_id: str = field(repr=False)
    jobs: tuple[ClaimedJob, ...]


@frozen
class CreatedJob:
    """One job of a batch; `created` is false where its idempotency key existed."""

    id: str
    status: str
    created: bool


@frozen
class Batch:
    """The jobs of a batch, in its order."""

    jobs: tuple[CreatedJob, ...]
    created: int
    existing: int


@frozen
class Page:
    """Some jobs of a list, newest first; `next_cursor` is None on the last page."""

    jobs: tuple[Job, ...]
    next_cursor: str | None = None


@frozen
class TextPage:
    """The same page; each job is the JSON object that the service sent."""

    jobs: tuple[RawJSON, ...]
    next_cursor: str | None = None


@frozen
class _JobsFound:
    jobs: tuple[Job | None, ...]


@frozen
class Lease:
    """A lease after a heartbeat."""

    lease_expires_at: datetime
    lease_seconds: float


@frozen
class Retried:
    """How many jobs a bulk retry put back to pending, and whether more match.

    `matched` is how many jobs match; only a dry run counts them.
    """

    retried: int
    more: bool
    matched: int | None = None


@frozen(kw_only=True)
class ItemResponse(_Problem):
    """The response for one item of a bulk call; `status` is an HTTP status."""

    id: str | None
    status: int

    @property
    def error(self) -> ServiceError | None:
        """Why the service rejected the item; None where it succeeded."""
        return self.as_error(self.status) if self.status >= 300 else None


@frozen
class _ItemResponses:
    jobs: tuple[ItemResponse, ...]


@frozen
class _Paused:
    paused: list[dict[str, Any]]


@frozen
class _Workers:
    workers: list[dict[str, Any]]


def parse_job(text: RawJSON) -> Job:
    """The job in a text that the service sent. Raises UnexpectedResponse."""
    return _read(text.text.encode(), Job)


# ---------------------------------------------------------------- pauses


class Backoff:
    """Growing pauses with jitter: half to all of `first_seconds`, doubled up to `max_seconds`.

    `failures` counts the pauses since the last reset.
    """

    def __init__(self, first_seconds: float = 0.2, max_seconds: float = 5.0) -> None:
        self._first, self._max = first_seconds, max_seconds
        self.failures = 0

    def next_seconds(self, retry_after_seconds: float | None = None) -> float:
        """The pause before the next try, never shorter than the service asked for."""
        ceiling = min(self._max, self._first * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return max(retry_after_seconds or 0.0, ceiling * random.uniform(0.5, 1.0))

    def reset(self) -> None:
        """Start again with the first pause."""
        self.failures = 0


# ---------------------------------------------------------------- connections


class _OpenConnections:
    """The open connections of one client: `shut_down` ends calls that wait for a response."""

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._connections: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()

    def add(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._connections.add(connection)
            if self._closed:
                _shut_down(connection)

    def shut_down(self) -> None:
        with self._lock:
            self._closed = True
            for connection in list(self._connections):
                _shut_down(connection)


def _shut_down(connection: HTTPConnection) -> None:
    # close() would leave the thread that reads waiting; a shutdown ends its read.
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _pool(base_url: str, size: int, connections: _OpenConnections) -> urllib3.HTTPConnectionPool:
    pool = urllib3.connection_from_url(base_url, maxsize=size, block=False)

    class Connection(pool.ConnectionCls):  # type: ignore[name-defined, misc]
        def connect(self) -> None:
            super().connect()
            connections.add(self)

    pool.ConnectionCls = Connection
    return pool


def check_base_url(text: str) -> str:
    """The URL without a final slash.

    Raises ValueError for anything but a plain http(s) URL; the message never has the URL.
    """
    try:
        url = urllib3.util.parse_url(text)
    except urllib3.exceptions.LocationParseError:
        raise ValueError("it is not a URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("it must begin with http:// or https:// and name a host")
    if url.auth is not None:
        raise ValueError("it must not have a user name or password; the token has its own setting")
    if url.query is not None or url.fragment is not None:
        raise ValueError("it must end before any ? or #")
    return text.rstrip("/")


def check_token(token: str) -> str:
    """The token.

    Raises ValueError for one that an HTTP header cannot carry; the message never has the token.
    """
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("a token consists of printable ASCII characters without spaces")
    return token


# ---------------------------------------------------------------- calls


class AIService:
    """The service at `base_url`; any number of threads may share one client.

    A call is repeated for up to `retry_seconds` after a lost response, 429, 502, 503 or 504, if a
    repeat is safe. A response may take `read_seconds` longer than the wait that was asked for.
    Every call raises ServiceError or one of its subclasses.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        retry_seconds: float = 30.0,
        connect_seconds: float = 5.0,
        read_seconds: float = 30.0,
        pool_size: int = 16,
    ) -> None:
        self._settings: dict[str, Any] = {
            "base_url": base_url,
            "token": token,
            "retry_seconds": retry_seconds,
            "connect_seconds": connect_seconds,
            "read_seconds": read_seconds,
            "pool_size": pool_size,
        }
        self._prefix = (urllib3.util.parse_url(check_base_url(base_url)).path or "").rstrip("/")
        self._headers = {"Accept": "application/json", "User-Agent": "ai-service-client"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {check_token(token)}"
        self._retry_seconds, self._read_seconds = retry_seconds, read_seconds
        self._connect_seconds = connect_seconds
        self._closed = threading.Event()
        self._connections = _OpenConnections()
        self._pool = _pool(base_url, pool_size, self._connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls in other threads end with ServiceUnavailable at once."""
        self._closed.set()
        self._connections.shut_down()
        self._pool.close()

    def clone(self, **settings: Any) -> AIService:
        """A client of the same service with its own connections; `settings` replace this one's."""
        return AIService(**{**self._settings, **settings})

    # Owners

    def create_job(self, job: NewJob) -> Job:
        """Create a job, or return the job that has its idempotency key. Raises NotJSON."""
        return self._post("/api/v1/jobs", _request_fields(job), Job)

    def create_jobs(self, jobs: Sequence[NewJob]) -> Batch:
        """Create up to 10,000 jobs, all or none. Raises NotJSON."""
        return self._create_batch(map(_request_fields, jobs))

    def create_from(self, jobs: Sequence[Mapping[str, Any]]) -> Batch:
        """Create jobs from their JSON fields, which are Python values or RawJSON.

        Raises ValueError for a job without idempotency_key, and NotJSON.
        """
        if not all("idempotency_key" in job for job in jobs):
            raise ValueError("each job needs an idempotency_key, so that a repeat is safe")
        return self._create_batch(jobs)

    def get_job(
        self,
        job_id: str,
        *,
        wait_seconds: float = 0.0,
        include_input: bool = False,
    ) -> Job:
        """The job as it is; with `wait_seconds` (at most 60) once it has finished, or earlier."""
        include = "input" if include_input else None
        return self._get(_job_path(job_id), Job, include=include, wait_seconds=wait_seconds or None)

    def get_text(self, job_id: str, *, include_input: bool = False) -> RawJSON:
        """The job as it is, as the text that the service sent."""
        include = "input" if include_input else None
        return self._get(_job_path(job_id), RawJSON, include=include)

    def wait_for_job(self, job_id: str, timeout_seconds: float) -> Job:
        """The job once it has finished. Raises TimeoutError after `timeout_seconds`."""
        deadline, backoff = time.monotonic() + timeout_seconds, Backoff(0.1, 2.0)
        while True:
            asked_at = time.monotonic()
            job = self.get_job(job_id, wait_seconds=_wait_until(deadline))
            if job.finished:
                return job
            if time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_seconds:g} s")
            if time.monotonic() - asked_at < 1.0:
                # A service that drains, or holds too many requests, responds at once.
                self._closed.wait(min(backoff.next_seconds(), _wait_until(deadline)))

    def get_jobs(self, job_ids: Sequence[str]) -> tuple[Job | None, ...]:
        """Up to 500 jobs without their payloads, in order; None for an unknown id."""
        return self._post("/api/v1/jobs/get", {"ids": list(job_ids)}, _JobsFound).jobs

    def list_jobs(
        self,
        jobs: JobFilter | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page:
        """One page of up to 500 jobs, newest first, without their payloads."""
        return self._list(Page, jobs, limit, cursor)

    def list_texts(
        self,
        jobs: JobFilter | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
    ) -> TextPage:
        """The same page as texts."""
        return self._list(TextPage, jobs, limit, cursor)

    def iter_jobs(self, jobs: JobFilter | None = None, *, page_size: int = 500) -> Iterator[Job]:
        """All jobs that match, newest first, fetched page by page."""
        page = self.list_jobs(jobs, limit=page_size)
        yield from page.jobs
        while page.next_cursor is not None:
            page = self.list_jobs(jobs, limit=page_size, cursor=page.next_cursor)
            yield from page.jobs

    def retry(self, job: Job | str, statuses: Sequence[str] = ()) -> Job:
        """Put a job back to pending if it still has one of `statuses`.

        By default these are the status of the Job given, or for an id failed and cancelled.
        """
        job_id, known = (job.id, [job.status]) if isinstance(job, Job) else (job, [])
        # A job with any other status needs no retry or allows none; the service says which.
        wanted = [status for status in statuses or known if status in RETRYABLE]
        body = {"from": wanted or ["failed", "cancelled"]}
        return self._post(_job_path(job_id, "retry"), body, Job)

    def retry_many(self, jobs: JobFilter, *, limit: int = 1000, dry_run: bool = False) -> Retried:
        """Put up to 1,000 matching jobs back to pending; a dry run only counts all of them.

        Only a dry run is repeated when its response is lost.
        """
        body = {"filter": _filter_fields(jobs), "limit": limit, **_given(dry_run=dry_run or None)}
        return self._post("/api/v1/jobs/retry", body, Retried, repeatable=dry_run)

    def cancel(self, job_id: str, reason: str | None = None) -> Job:
        """Cancel a pending or running job. Raises InvalidState for a completed or failed one."""
        return self._post(_job_path(job_id, "cancel"), _given(reason=reason), Job)

    def delete(self, job_id: str) -> None:
        """Delete a finished job and its payloads; it is not an error if the job is unknown."""
        # A repeat after a lost response finds no job either.
        with suppress(NotFound):
            self._call("DELETE", _job_path(job_id))

    # Workers

    def claim(
        self,
        worker_id: str,
        *,
        limit: int = 1,
        model_profiles: Sequence[str] | None = None,
        task_types: Sequence[str] | None = None,
        owner_services: Sequence[str] | None = None,
        lease_seconds: float | None = None,
        wait_seconds: float = 0.0,
        claim_id: str | None = None,
        worker: Mapping[str, Any] | None = None,
    ) -> Claim:
        """Take up to `limit` pending jobs; wait up to `wait_seconds` (at most 60) for the first.

        Without a claim_id one is made here. Calling again with the same claim_id returns the jobs
        that it still holds.
        """
        body = {
            "worker_id": worker_id,
            "claim_id": claim_id or str(uuid.uuid4()),
            "limit": limit,
            **_claim_filters(model_profiles, task_types, owner_services),
            **_given(lease_seconds=lease_seconds, wait_seconds=wait_seconds or None, worker=worker),
        }
        return self._post("/api/v1/jobs/claim", body, Claim)

    def complete(
        self,
        job_id: str,
        claim_id: str,
        result: Any,
        usage: Mapping[str, Any] | None = None,
    ) -> Job:
        """Finish a job with its result: any JSON value, or RawJSON.

        Raises ClaimLost, JobCancelled and NotJSON.
        """
        return self._report("complete", Completion(job_id, claim_id, result, usage), Job)

    def fail(
        self,
        job_id: str,
        claim_id: str,
        category: str,
        message: str,
        *,
        retryable: bool = False,
        retry_in_seconds: float | None = None,
        usage: Mapping[str, Any] | None = None,
    ) -> Job:
        """End an attempt without a result; a `retryable` one is repeated if attempts are left.

        Raises ClaimLost and JobCancelled.
        """
        return self._report(
            "fail",
            Failure(job_id, claim_id, category, message, retryable, retry_in_seconds, usage),
            Job,
        )

    def release(self, job_id: str, claim_id: str, delay_seconds: float | None = None) -> Job:
        """Put a job back to pending; the attempt is not counted. Raises ClaimLost, JobCancelled."""
        return self._report("release", Release(job_id, claim_id, delay_seconds), Job)

    def heartbeat(
        self,
        job_id: str,
        claim_id: str,
        *,
        lease_seconds: float | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> Lease:
        """Extend the lease and report progress. Raises ClaimLost and JobCancelled."""
        return self._report(
            "heartbeat",
            Heartbeat(job_id, claim_id, lease_seconds, progress),
            Lease,
        )

    def complete_many(self, results: Sequence[Completion]) -> tuple[ItemResponse, ...]:
        """Up to 1,000 results, each independent of the others; the responses are in order."""
        return self._report_many("complete", results)

    def fail_many(self, failures: Sequence[Failure]) -> tuple[ItemResponse, ...]:
        """Up to 1,000 failed attempts, each independent of the others."""
        return self._report_many("fail", failures)

    def heartbeat_many(
        self,
        heartbeats: Sequence[Heartbeat],
        *,
        worker: Mapping[str, Any] | None = None,
    ) -> tuple[ItemResponse, ...]:
        """Up to 1,000 heartbeats, each independent of the others; `worker` describes the worker."""
        return self._report_many("heartbeat", heartbeats, worker=worker)

    def release_many(self, releases: Sequence[Release]) -> tuple[ItemResponse, ...]:
        """Up to 1,000 jobs to release, each independent of the others."""
        return self._report_many("release", releases)

    # Operators

    def pause(
        self,
        *,
        model_profiles: Sequence[str] | None = None,
        task_types: Sequence[str] | None = None,
        owner_services: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Stop dispatching the pending jobs that match; at least one argument is needed."""
        return self._post(
            "/api/v1/pause",
            _claim_filters(model_profiles, task_types, owner_services),
            dict[str, Any],
        )

    def resume(
        self,
        *,
        model_profiles: Sequence[str] | None = None,
        task_types: Sequence[str] | None = None,
        owner_services: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Undo a pause; the arguments are those of `pause`."""
        return self._post(
            "/api/v1/resume",
            _claim_filters(model_profiles, task_types, owner_services),
            dict[str, Any],
        )

    def pauses(self) -> list[dict[str, Any]]:
        """The pause rules; null in a rule matches anything."""
        return self._get("/api/v1/pause", _Paused).paused

    def stats(self, window_seconds: int | None = None) -> dict[str, Any]:
        """Queue and error counters; the window is 3600, 86400 (default) or 604800 seconds."""
        return self._get("/api/v1/stats", dict[str, Any], window_seconds=window_seconds)

    def workers(self) -> list[dict[str, Any]]:
        """The workers seen in the last five minutes."""
        return self._get("/api/v1/workers", _Workers).workers

    def providers_status(self) -> dict[str, Any]:
        """The providers as the service and the workers see them."""
        return self._get("/api/v1/providers/status", dict[str, Any])

    def healthz(self) -> bool:
        """Whether the process responds; never repeated."""
        return self._is_up("/healthz")

    def readyz(self) -> bool:
        """Whether the service and its database can work; never repeated."""
        return self._is_up("/readyz")

    # Requests and responses

    def _is_up(self, path: str) -> bool:
        try:
            self._call("GET", path, repeatable=False)
        except ServiceUnavailable:
            return False
        return True

    def _create_batch(self, jobs: Iterable[Mapping[str, Any]]) -> Batch:
        return self._post("/api/v1/jobs/batch", {"jobs": _array_text(jobs)}, Batch)

    def _list(self, kind: type[T], jobs: JobFilter | None, limit: int, cursor: str | None) -> T:
        fields = _filter_fields(jobs or JobFilter())
        fields["label"] = [f"{key}:{value}" for key, value in fields.pop("labels", {}).items()]
        return self._get("/api/v1/jobs", kind, **fields, limit=limit, cursor=cursor)

    def _report(
        self,
        verb: str,
        item: Completion | Failure | Heartbeat | Release,
        kind: type[T],
    ) -> T:
        fields = _request_fields(item)
        return self._post(_job_path(fields.pop("id"), verb), fields, kind)

    def _report_many(
        self,
        verb: str,
        items: Sequence[object],
        **more: Any,
    ) -> tuple[ItemResponse, ...]:
        body = {"jobs": _array_text(map(_request_fields, items)), **_given(**more)}
        return self._post(f"/api/v1/jobs/{verb}", body, _ItemResponses).jobs

    def _get(self, path: str, kind: type[T], **query: Any) -> T:
        given = _given(**query)
        url = path + ("?" + urlencode(given, doseq=True) if given else "")
        return _read(self._call("GET", url, wait_seconds=given.get("wait_seconds", 0.0)), kind)

    def _post(
        self,
        path: str,
        fields: Mapping[str, Any],
        kind: type[T],
        *,
        repeatable: bool = True,
    ) -> T:
        body, wait_seconds = object_text(fields).encode(), fields.get("wait_seconds", 0.0)
        response = self._call("POST", path, body, repeatable=repeatable, wait_seconds=wait_seconds)
        return _read(response, kind)

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        repeatable: bool = True,
        wait_seconds: float = 0.0,
    ) -> bytes:
        """The body of a 2xx response; a safe call is repeated for up to `retry_seconds`."""
        backoff, deadline = Backoff(), None
        while True:
            try:
                return self._send(method, path, body, wait_seconds + self._read_seconds)
            except ServiceUnavailable as error:
                deadline = deadline or time.monotonic() + self._retry_seconds
                pause = backoff.next_seconds(error.retry_after_seconds)
                is_late = time.monotonic() + pause > deadline
                if not repeatable or is_late or self._closed.wait(pause):
                    raise

    def _send(self, method: str, path: str, body: bytes | None, read_seconds: float) -> bytes:
        content = {"Content-Type": "application/json"} if body is not None else {}
        try:
            response = self._pool.request(
                method,
                self._prefix + path,
                body=body,
                headers=self._headers | content,
                timeout=urllib3.Timeout(connect=self._connect_seconds, read=read_seconds),
                retries=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # The class is enough; urllib3's text repeats the address and takes several lines.
            kind, title = type(error).__name__, "no response from the service"
            raise ServiceUnavailable(None, "no_answer", title, kind, retryable=True) from error
        if response.status // 100 != 2:
            raise _error_of(response)
        return response.data


def _wait_until(deadline: float) -> float:
    return min(MAX_WAIT_SECONDS, max(0.0, deadline - time.monotonic()))


def _job_path(job_id: str, verb: str | None = None) -> str:
    return f"/api/v1/jobs/{quote(job_id, safe='')}" + (f"/{verb}" if verb else "")
