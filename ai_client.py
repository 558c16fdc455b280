"""The HTTP client of AI Service, for callers that own jobs and for workers that run them.

    service = AIService("http://127.0.0.1:8080")
    job = service.create_job(NewJob("telephony", "beeline/17", "call_analysis", "qwen2.5-14b", input={"prompt": "Hello"}))
    job = service.wait_for_job(job.id, timeout_seconds=600)
    print(job.status, job.result)

Sections: JSON, what the service answers, what it is told, errors, pauses, connections, the calls.

Every call that the service lets be repeated is repeated here when its answer is lost: creating always carries an idempotency key,
claiming a claim_id, a retry the states it was decided upon. Fields that this version does not know are ignored, so that an older client
works with a newer service.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote, urlencode

import attrs
import cattrs
import msgspec
import urllib3
from attrs import field, frozen
from cattrs.gen import make_dict_structure_fn, override
from urllib3.connection import HTTPConnection

FINISHED = frozenset({"completed", "failed", "cancelled"})
RETRYABLE = frozenset({"failed", "cancelled", "running"})

# A look at a job may be parked by the service for so long; a claim too.
MAX_WAIT_SECONDS = 60.0

T = TypeVar("T")


# ---------------------------------------------------------------- JSON


class NotJSON(ValueError):
    """The value or text is no JSON that the service would take; says why, and never shows the value."""


def encode(value: Any) -> str:
    """The JSON text of a Python value; numbers keep their spelling. Raises NotJSON (NaN, infinity, unpaired surrogates, other types)."""
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
        raise NotJSON(_reason(error)) from None
    return text


def _reason(error: Exception) -> str:
    # The only message of json.dumps that could show a value is that of a float, and then the value is NaN or infinite.
    return f"not JSON: {error}"


def _check_json(_: object, __: object, text: str) -> None:
    try:
        msgspec.json.decode(text.encode(), type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise NotJSON(f"not JSON text: {type(error).__name__}") from None


@frozen
class RawJSON:
    """JSON text that goes to the service, or came from it, character by character. Raises NotJSON for any other text."""

    text: str = field(repr=False, validator=_check_json)

    def decode(self) -> Any:
        """The Python value. Raises NotJSON for what Python cannot hold (an integer of over 4,300 digits, extreme nesting)."""
        try:
            return json.loads(self.text)
        except RecursionError:
            raise NotJSON("nested too deeply for Python") from None
        except ValueError:
            raise NotJSON("holds a number that Python refuses") from None


def object_text(fields: Mapping[str, Any]) -> str:
    """The JSON text of an object whose values are Python values or RawJSON. Raises NotJSON."""
    return "{" + ",".join(f"{encode(name)}:{encode(value)}" for name, value in fields.items()) + "}"


def _array_text(objects: Sequence[Mapping[str, Any]]) -> RawJSON:
    return RawJSON("[" + ",".join(map(object_text, objects)) + "]")


def split_object(text: bytes | msgspec.Raw) -> dict[str, RawJSON]:
    """The fields of a JSON object, each as the text it has. Raises NotJSON."""
    return {name: _raw(value) for name, value in _slices(text, dict[str, msgspec.Raw]).items()}


def _split_array(text: RawJSON) -> list[bytes]:
    return [bytes(item) for item in _slices(text.text.encode(), list[msgspec.Raw])]


def _slices(text: bytes | msgspec.Raw, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=shape)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NotJSON(f"not the JSON expected: {type(error).__name__}") from None


def _raw(value: msgspec.Raw) -> RawJSON:
    try:
        return RawJSON(bytes(value).decode())
    except UnicodeDecodeError:
        raise NotJSON("not UTF-8") from None


def _given(**fields: Any) -> dict[str, Any]:
    """What a caller gave: an absent field leaves the service its default."""
    return {name: value for name, value in fields.items() if value is not None}


def _time_text(at: datetime | None) -> str | None:
    if at is None:
        return None
    if at.tzinfo is None:
        raise ValueError("a time needs a time zone")
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


# ---------------------------------------------------------------- what the service answers


@frozen
class JobError:
    """How a job ended that failed."""

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
class Job:
    """A job as the service knows it. Lists and batches come without the payloads."""

    id: str
    status: str
    owner_service: str
    owner_ref: str
    task_type: str
    model_profile: str
    priority: int = 0
    attempt: int = 0
    max_attempts: int = 1
    run_at: datetime | None = None
    expires_at: datetime | None = None
    idempotency_key: str | None = None
    traceparent: str | None = None
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
        """The input; None where the answer carries none. Raises NotJSON (see RawJSON.decode)."""
        return self.raw_input.decode() if self.raw_input else None

    @cached_property
    def result(self) -> Any:
        """The result; None where there is none. Raises NotJSON (see RawJSON.decode)."""
        return self.raw_result.decode() if self.raw_result else None


@frozen(kw_only=True)
class ClaimedJob:
    """A job that a claim took, with what its worker needs."""

    id: str
    claim_id: str = field(repr=False)
    owner_service: str
    owner_ref: str
    task_type: str
    model_profile: str
    attempt: int
    max_attempts: int
    lease_seconds: int
    raw_input: RawJSON = field(repr=False)
    priority: int = 0
    created_at: datetime | None = None
    expires_at: datetime | None = None
    lease_expires_at: datetime | None = None
    traceparent: str | None = None

    @cached_property
    def input(self) -> Any:
        """The input. Raises NotJSON (see RawJSON.decode)."""
        return self.raw_input.decode()


@frozen
class Claim:
    """One taking of jobs."""

    claim_id: str = field(repr=False)
    jobs: tuple[ClaimedJob, ...]


@frozen
class Created:
    """One item of a batch: `created` is false where the idempotency key was known."""

    id: str
    status: str
    created: bool


@frozen
class Batch:
    """What became of a batch, in its order."""

    jobs: tuple[Created, ...]
    created: int
    existing: int


@frozen
class Page:
    """Some jobs of a list, newest first; `next_cursor` is None on the last page."""

    jobs: tuple[Job, ...]
    next_cursor: str | None = None


@frozen
class TextPage:
    """The same as the texts that the service answered, each a JSON object."""

    jobs: tuple[RawJSON, ...]
    next_cursor: str | None = None


@frozen
class Lease:
    """A lease as a heartbeat left it."""

    lease_expires_at: datetime
    lease_seconds: int


@frozen
class Retried:
    """How many jobs a bulk retry sent back to pending, and whether more match; `matched` is how many do, counted by a dry run only."""

    retried: int
    more: bool
    matched: int | None = None


@frozen
class ItemAnswer:
    """What became of one item of a bulk call; `error` is None where it succeeded."""

    id: str
    status: int
    error: ServiceError | None = None


_converter = cattrs.Converter()
_converter.register_structure_hook(datetime, lambda text, _: datetime.fromisoformat(text))
_converter.register_structure_hook(RawJSON, lambda value, _: value)
_payloads = {"raw_input": override(rename="input"), "raw_result": override(rename="result")}
for _kind in (Job, ClaimedJob):
    _names = {name: rule for name, rule in _payloads.items() if name in attrs.fields_dict(_kind)}
    _converter.register_structure_hook(_kind, make_dict_structure_fn(_kind, _converter, **_names))  # type: ignore[arg-type]


def _structure(fields: Mapping[str, RawJSON], kind: type[T]) -> T:
    """An attrs object of `fields`; `input` and `result` stay text, unknown fields are ignored. Raises NotJSON."""
    values = {name: raw if name in ("input", "result") else raw.decode() for name, raw in fields.items()}
    try:
        return _converter.structure(values, kind)
    except (cattrs.BaseValidationError, TypeError, ValueError, KeyError) as error:
        raise NotJSON(f"not a {kind.__name__}: {type(error).__name__}") from None


def job_of(text: RawJSON) -> Job:
    """The job that a text of the service describes. Raises UnexpectedAnswer."""
    return _parsed(lambda: _structure(split_object(text.text.encode()), Job))


# ---------------------------------------------------------------- what the service is told


@frozen
class NewJob:
    """A job to create. `input` is any JSON value, or RawJSON.

    The idempotency key is made here when none is given: creating this same object twice makes one job.
    """

    owner_service: str
    owner_ref: str
    task_type: str
    model_profile: str
    input: Any = field(repr=False)
    priority: int | None = None
    run_at: datetime | None = None
    expires_at: datetime | None = None
    max_attempts: int | None = None
    traceparent: str | None = None
    idempotency_key: str = field(factory=lambda: str(uuid.uuid4()))

    def _fields(self) -> dict[str, Any]:
        fields = {attribute.name: getattr(self, attribute.name) for attribute in attrs.fields(NewJob)}
        times = {"run_at": _time_text(self.run_at), "expires_at": _time_text(self.expires_at)}
        return {**_given(**{**fields, **times}), "input": self.input}


@frozen
class Completion:
    """One result of a bulk call. `result` is any JSON value, or RawJSON."""

    id: str
    claim_id: str = field(repr=False)
    result: Any = field(repr=False)
    usage: Mapping[str, Any] | None = None

    def _fields(self) -> dict[str, Any]:
        return {**_given(id=self.id, claim_id=self.claim_id, usage=self.usage), "result": self.result}


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

    def _fields(self) -> dict[str, Any]:
        return _given(**attrs.asdict(self))


@frozen
class Beat:
    """One heartbeat of a bulk call."""

    id: str
    claim_id: str = field(repr=False)
    lease_seconds: int | None = None
    progress: Mapping[str, Any] | None = None

    def _fields(self) -> dict[str, Any]:
        return _given(**attrs.asdict(self))


@frozen
class Release:
    """One job of a bulk call that goes back to pending, its attempt not counted."""

    id: str
    claim_id: str = field(repr=False)
    delay_seconds: float | None = None

    def _fields(self) -> dict[str, Any]:
        return _given(**attrs.asdict(self))


@frozen(kw_only=True)
class JobFilter:
    """Which jobs; every field is a choice of alternatives, all given fields must match."""

    status: Sequence[str] = ()
    owner_service: Sequence[str] = ()
    owner_ref: Sequence[str] = ()
    task_type: Sequence[str] = ()
    model_profile: Sequence[str] = ()
    error_category: Sequence[str] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None

    def _fields(self) -> dict[str, Any]:
        names = ("status", "owner_service", "owner_ref", "task_type", "model_profile", "error_category")
        chosen = {name: _alternatives(getattr(self, name)) for name in names if getattr(self, name)}
        return chosen | _given(created_after=_time_text(self.created_after), created_before=_time_text(self.created_before))


def _alternatives(values: Sequence[str]) -> list[str]:
    return [values] if isinstance(values, str) else list(values)


# ---------------------------------------------------------------- errors


@frozen
class FieldError:
    """One problem of a request: a JSON pointer, and what is wrong there."""

    path: str
    message: str


@attrs.define(eq=False)
class ServiceError(Exception):
    """The service refused a call or could not be reached; `status` is None where no answer came.

    `retryable` tells whether the same call may succeed later, `retry_after_seconds` when, if the service said so. By `request_id` the
    service's log tells of the call.
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
        status = [str(self.status)] if self.status else []
        problems = [f"{error.path}: {error.message}" for error in self.errors]
        request = [f"request {self.request_id}"] if self.request_id else []
        return "; ".join([" ".join([*status, self.code]), *filter(None, (self.title, self.detail)), *problems, *request])


class ServiceUnavailable(ServiceError):
    """Nobody answered, or the service cannot work right now; the same call may succeed later."""


class Unauthorized(ServiceError):
    """No token, or a wrong one."""


class Forbidden(ServiceError):
    """The token's role may not use this call."""


class NotFound(ServiceError):
    """There is no such job, or it belongs to another owner."""


class Conflict(ServiceError):
    """The job's state does not allow the call."""


class InvalidState(Conflict):
    """The verb does not fit the job's status."""


class ClaimLost(Conflict):
    """The claim no longer holds the job; whatever its worker still does changes nothing."""


class JobCancelled(Conflict):
    """The job was cancelled while it ran."""


class ClaimIdReused(Conflict):
    """The claim_id was used by another worker."""


class IdempotencyKeyReused(Conflict):
    """The idempotency key belongs to a job with another owner_ref, task_type or model_profile."""


class ValidationFailed(ServiceError):
    """The request is ill; `errors` lists all its problems."""


class PayloadTooLarge(ServiceError):
    """The body is larger than the service takes."""


class UnexpectedAnswer(ServiceError):
    """An answer that is none of this service's, as a proxy or another program gives it."""


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


def service_error(status: int, body: Mapping[str, Any], retry_after_seconds: float | None = None) -> ServiceError:
    """The error that a problem body stands for; an empty mapping where the body was none."""
    code = str(body.get("code") or f"http_{status}")
    kind = _by_code.get(code) or _by_status.get(status, ServiceError)
    detail = body.get("detail")
    return kind(
        status=status,
        code=code,
        title=str(body.get("title") or ""),
        detail=None if detail is None else str(detail),
        errors=_field_errors(body.get("errors")),
        retryable=bool(body.get("retryable", kind is ServiceUnavailable)),
        retry_after_seconds=retry_after_seconds,
    )


def _field_errors(errors: object) -> tuple[FieldError, ...]:
    listed = errors if isinstance(errors, list) else []
    return tuple(FieldError(str(item.get("path", "")), str(item.get("message", ""))) for item in listed if isinstance(item, dict))


def _error_of(response: urllib3.BaseHTTPResponse) -> ServiceError:
    error = service_error(response.status, _problem(response.data), _retry_after(response.headers.get("Retry-After")))
    error.request_id = response.headers.get("X-Request-ID")
    return error


def _problem(body: bytes) -> Mapping[str, Any]:
    """The problem body; empty where a proxy, or a failure before routing, answered with something else."""
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _retry_after(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        return float(header) if header.strip().isdigit() else max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _no_answer(error: Exception) -> ServiceUnavailable:
    # The class says it all; urllib3's text repeats the address and goes on for lines.
    return ServiceUnavailable(None, "no_answer", "no answer from the service", type(error).__name__, retryable=True)


# ---------------------------------------------------------------- pauses


class Backoff:
    """Growing pauses with jitter: half to all of `first_seconds`, doubled each time up to `max_seconds`. `failures` counts them."""

    def __init__(self, first_seconds: float = 0.2, max_seconds: float = 5.0) -> None:
        self._first, self._max = first_seconds, max_seconds
        self.failures = 0

    def next_seconds(self, retry_after_seconds: float | None = None) -> float:
        """The pause before the next try, never shorter than the service asked for."""
        ceiling = min(self._max, self._first * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return max(retry_after_seconds or 0.0, ceiling * random.uniform(0.5, 1.0))

    def reset(self) -> None:
        """Begin again with the first pause."""
        self.failures = 0


# ---------------------------------------------------------------- connections


class _OpenConnections:
    """The open connections of one client, so that `close` reaches those that wait for an answer."""

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
    # A close from another thread would leave the waiting one waiting; a shutdown ends its read.
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _pool(base_url: str, size: int, opened: _OpenConnections) -> urllib3.HTTPConnectionPool:
    pool = urllib3.connection_from_url(base_url, maxsize=size, block=False)

    class Connection(pool.ConnectionCls):  # type: ignore[name-defined, misc]
        def connect(self) -> None:
            super().connect()
            opened.add(self)

    pool.ConnectionCls = Connection
    return pool


def check_base_url(text: str) -> str:
    """The URL without a final slash. Raises ValueError for what is no plain http(s) URL; the message never repeats it."""
    try:
        url = urllib3.util.parse_url(text)
    except urllib3.exceptions.LocationParseError:
        raise ValueError("it is not a URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("it must begin with http:// or https:// and name a host")
    if url.auth is not None:
        raise ValueError("it must not carry a user name or password; the token has a setting of its own")
    if url.query is not None or url.fragment is not None:
        raise ValueError("it must end before any ? or #")
    return text.rstrip("/")


def check_token(token: str) -> str:
    """The token. Raises ValueError for one that no HTTP header can carry; the message never repeats it."""
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("a token consists of printable ASCII characters without spaces")
    return token


@frozen
class _Request:
    method: str
    path: str
    body: bytes | None
    repeatable: bool
    read_seconds: float


# ---------------------------------------------------------------- the calls


class AIService:
    """The service at `base_url`; may be used from any number of threads at once.

    A lost answer, 429, 502, 503 and 504 are met by repeating the call for up to `retry_seconds`, wherever a repeat does no harm.
    An answer may take `read_seconds` longer than the wait that was asked for. Every call raises ServiceError or one of its subclasses.
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
        self._made_with: dict[str, Any] = {"base_url": base_url, "token": token, "pool_size": pool_size}
        self._made_with |= {"retry_seconds": retry_seconds, "connect_seconds": connect_seconds, "read_seconds": read_seconds}
        url = urllib3.util.parse_url(check_base_url(base_url))
        self._prefix = (url.path or "").rstrip("/")
        self._headers = {"Accept": "application/json", "User-Agent": "ai-service-client"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {check_token(token)}"
        self._retry_seconds, self._connect_seconds, self._read_seconds = retry_seconds, connect_seconds, read_seconds
        self._closed = threading.Event()
        self._opened = _OpenConnections()
        self._pool = _pool(base_url, pool_size, self._opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls under way, in other threads, end with ServiceUnavailable at once."""
        self._closed.set()
        self._opened.shut_down()
        self._pool.close()

    def another(self, **settings: Any) -> AIService:
        """A client of the same service with connections of its own; `settings` replace what this one was made with."""
        return AIService(**{**self._made_with, **settings})

    # Owners

    def create_job(self, job: NewJob) -> Job:
        """Create a job, or find the one that has its idempotency key. Raises NotJSON for an input that is no JSON."""
        return self._job(self._post("/api/v1/jobs", job._fields()))

    def create_jobs(self, jobs: Sequence[NewJob]) -> Batch:
        """Create up to 10,000 jobs, all or none. Raises NotJSON for an input that is no JSON."""
        return self._create_many([job._fields() for job in jobs])

    def create_from(self, jobs: Sequence[Mapping[str, Any]]) -> Batch:
        """The same of fields as the service reads them, Python values or RawJSON. Raises ValueError for a job without idempotency_key."""
        if not all("idempotency_key" in job for job in jobs):
            raise ValueError("each job needs an idempotency_key: the call is repeated when its answer is lost")
        return self._create_many(jobs)

    def get_job(self, job_id: str, *, wait_seconds: float = 0.0, include_input: bool = False) -> Job:
        """The job as it is; with `wait_seconds` (60 at most) once it has finished, or earlier."""
        query = _given(wait_seconds=wait_seconds or None, include="input" if include_input else None)
        return self._job(self._get(_job_path(job_id), query, wait_seconds))

    def get_text(self, job_id: str, *, include_input: bool = False) -> RawJSON:
        """The job as it is, as the text that the service answered."""
        return _text(self._get(_job_path(job_id), _given(include="input" if include_input else None)))

    def wait_for_job(self, job_id: str, timeout_seconds: float) -> Job:
        """The job once it has finished. Raises TimeoutError when it has not within `timeout_seconds`."""
        deadline, backoff = time.monotonic() + timeout_seconds, Backoff(0.1, 2.0)
        while True:
            asked_at = time.monotonic()
            job = self.get_job(job_id, wait_seconds=_wait_until(deadline))
            if job.finished:
                return job
            if time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_seconds:g} s")
            if time.monotonic() - asked_at < 1.0:
                # A service that drains, or has too many waiting, answers at once.
                self._closed.wait(min(backoff.next_seconds(), _wait_until(deadline)))

    def get_jobs(self, job_ids: Sequence[str]) -> tuple[Job | None, ...]:
        """Up to 500 jobs without their payloads, in order; None where unknown."""
        answer = self._post("/api/v1/jobs/get", {"ids": list(job_ids)})
        return tuple(None if item == b"null" else self._job(item) for item in _items(answer, "jobs"))

    def list_jobs(self, jobs: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> Page:
        """One page of up to 500 jobs, newest first, without their payloads."""
        answer = self._listed(jobs, limit, cursor)
        return Page(tuple(map(self._job, _items(answer, "jobs"))), _field(answer, "next_cursor"))

    def list_texts(self, jobs: JobFilter | None = None, *, limit: int = 100, cursor: str | None = None) -> TextPage:
        """The same page as texts."""
        answer = self._listed(jobs, limit, cursor)
        return TextPage(tuple(map(_text, _items(answer, "jobs"))), _field(answer, "next_cursor"))

    def iter_jobs(self, jobs: JobFilter | None = None, *, page_size: int = 500) -> Iterator[Job]:
        """All jobs that match, newest first, fetched page by page."""
        page = self.list_jobs(jobs, limit=page_size)
        yield from page.jobs
        while page.next_cursor is not None:
            page = self.list_jobs(jobs, limit=page_size, cursor=page.next_cursor)
            yield from page.jobs

    def retry(self, job: Job | str, seen: Sequence[str] | None = None) -> Job:
        """Send a finished job back to pending; `seen` are the states it may be in: that of the Job given, else failed or cancelled."""
        states = seen or ([job.status] if isinstance(job, Job) else ["failed", "cancelled"])
        # What else a job may be needs no move or allows none, and the service says so.
        wanted = [state for state in states if state in RETRYABLE] or ["failed", "cancelled"]
        job_id = job.id if isinstance(job, Job) else job
        return self._job(self._post(_job_path(job_id, "retry"), {"from": wanted}))

    def retry_many(self, jobs: JobFilter, *, limit: int = 1000, dry_run: bool = False) -> Retried:
        """Send up to 1,000 jobs that match back to pending, or count them all. Not repeated by itself when its answer is lost."""
        body = {"filter": jobs._fields(), "limit": limit, **_given(dry_run=dry_run or None)}
        return self._read(self._post("/api/v1/jobs/retry", body, repeatable=dry_run), Retried)

    def cancel(self, job_id: str, reason: str | None = None) -> Job:
        """Cancel a pending or running job. Raises InvalidState when it has completed or failed."""
        return self._job(self._post(_job_path(job_id, "cancel"), _given(reason=reason)))

    def delete(self, job_id: str) -> None:
        """Erase a finished job and its payloads; one that is unknown, or was erased before, is no error."""
        # A repeat after a lost answer finds nothing either.
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
        lease_seconds: int | None = None,
        wait_seconds: float = 0.0,
        claim_id: str | None = None,
        worker: Mapping[str, Any] | None = None,
    ) -> Claim:
        """Take up to `limit` pending jobs, waiting up to `wait_seconds` (60 at most) for the first.

        The claim_id is made here when none is given; a caller that gives its own can ask again for what a lost answer held.
        """
        chosen = _chosen(model_profiles, task_types, owner_services)
        options = _given(lease_seconds=lease_seconds, wait_seconds=wait_seconds or None, worker=worker)
        identity = {"worker_id": worker_id, "claim_id": claim_id or str(uuid.uuid4()), "limit": limit}
        return self._claim(self._post("/api/v1/jobs/claim", {**identity, **chosen, **options}, wait_seconds=wait_seconds))

    def complete(self, job_id: str, claim_id: str, result: Any, usage: Mapping[str, Any] | None = None) -> Job:
        """Finish a job with its result (any JSON value, or RawJSON). Raises ClaimLost, JobCancelled, and NotJSON for no JSON."""
        return self._finish(job_id, "complete", Completion(job_id, claim_id, result, usage)._fields())

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
        """End an attempt without a result; `retryable` gives the job another one if any are left. Raises ClaimLost, JobCancelled."""
        failure = Failure(job_id, claim_id, category, message, retryable, retry_in_seconds, usage)
        return self._finish(job_id, "fail", failure._fields())

    def release(self, job_id: str, claim_id: str, delay_seconds: float | None = None) -> Job:
        """Give a job back, its attempt not counted. Raises ClaimLost, JobCancelled."""
        return self._finish(job_id, "release", Release(job_id, claim_id, delay_seconds)._fields())

    def heartbeat(
        self, job_id: str, claim_id: str, *, lease_seconds: int | None = None, progress: Mapping[str, Any] | None = None
    ) -> Lease:
        """Extend the lease and tell how far the work is. Raises ClaimLost, JobCancelled."""
        fields = Beat(job_id, claim_id, lease_seconds, progress)._fields()
        return self._read(self._post(_job_path(job_id, "heartbeat"), _without_id(fields)), Lease)

    def complete_many(self, results: Sequence[Completion]) -> tuple[ItemAnswer, ...]:
        """Up to 1,000 results, each by itself; answers in order."""
        return self._many("complete", [result._fields() for result in results])

    def fail_many(self, failures: Sequence[Failure]) -> tuple[ItemAnswer, ...]:
        """Up to 1,000 failed attempts, each by itself; answers in order."""
        return self._many("fail", [failure._fields() for failure in failures])

    def heartbeat_many(self, beats: Sequence[Beat], *, worker: Mapping[str, Any] | None = None) -> tuple[ItemAnswer, ...]:
        """Up to 1,000 heartbeats, each by itself; answers in order. `worker` is what the worker tells of itself."""
        return self._many("heartbeat", [beat._fields() for beat in beats], worker=worker)

    def release_many(self, releases: Sequence[Release]) -> tuple[ItemAnswer, ...]:
        """Up to 1,000 jobs to give back, each by itself; answers in order."""
        return self._many("release", [release._fields() for release in releases])

    # Operators

    def pause(
        self,
        *,
        model_profiles: Sequence[str] | None = None,
        task_types: Sequence[str] | None = None,
        owner_services: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Stop handing out pending jobs of these; at least one argument is needed."""
        return self._decoded(self._post("/api/v1/pause", _chosen(model_profiles, task_types, owner_services)))

    def resume(
        self,
        *,
        model_profiles: Sequence[str] | None = None,
        task_types: Sequence[str] | None = None,
        owner_services: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Undo a pause; the same arguments."""
        return self._decoded(self._post("/api/v1/resume", _chosen(model_profiles, task_types, owner_services)))

    def pauses(self) -> list[dict[str, Any]]:
        """What is paused, as rules; null in one is any."""
        return list(self._decoded(self._get("/api/v1/pause"))["paused"])

    def stats(self, window_seconds: int | None = None) -> dict[str, Any]:
        """Queue and error counters; the window is 3600, 86400 (default) or 604800."""
        return self._decoded(self._get("/api/v1/stats", _given(window_seconds=window_seconds)))

    def workers(self) -> list[dict[str, Any]]:
        """The workers seen in the last five minutes."""
        return list(self._decoded(self._get("/api/v1/workers"))["workers"])

    def providers_status(self) -> dict[str, Any]:
        """The providers as the service and the workers see them."""
        return self._decoded(self._get("/api/v1/providers/status"))

    def healthz(self) -> bool:
        """Whether the process answers; asked once."""
        return self._answers("/healthz")

    def readyz(self) -> bool:
        """Whether the service and its database can work; asked once."""
        return self._answers("/readyz")

    # Requests and answers

    def _answers(self, path: str) -> bool:
        try:
            self._call("GET", path, repeatable=False)
        except ServiceUnavailable:
            return False
        return True

    def _get(self, path: str, query: Mapping[str, Any] | None = None, wait_seconds: float = 0.0) -> bytes:
        return self._call("GET", path + ("?" + urlencode(query, doseq=True) if query else ""), wait_seconds=wait_seconds)

    def _create_many(self, jobs: Sequence[Mapping[str, Any]]) -> Batch:
        return self._read(self._post("/api/v1/jobs/batch", {"jobs": _array_text(jobs)}), Batch)

    def _listed(self, jobs: JobFilter | None, limit: int, cursor: str | None) -> bytes:
        return self._get("/api/v1/jobs", {**(jobs or JobFilter())._fields(), "limit": limit, **_given(cursor=cursor)})

    def _post(self, path: str, fields: Mapping[str, Any], *, repeatable: bool = True, wait_seconds: float = 0.0) -> bytes:
        return self._call("POST", path, object_text(fields).encode(), repeatable=repeatable, wait_seconds=wait_seconds)

    def _finish(self, job_id: str, verb: str, fields: Mapping[str, Any]) -> Job:
        return self._job(self._post(_job_path(job_id, verb), _without_id(fields)))

    def _many(self, verb: str, items: Sequence[Mapping[str, Any]], **more: Any) -> tuple[ItemAnswer, ...]:
        answer = self._post(f"/api/v1/jobs/{verb}", {"jobs": _array_text(items), **_given(**more)})
        return _parsed(lambda: tuple(_item_answer(self._decoded(item)) for item in _items(answer, "jobs")))

    def _claim(self, answer: bytes) -> Claim:
        jobs = tuple(self._read(item, ClaimedJob) for item in _items(answer, "jobs"))
        return Claim(str(_field(answer, "claim_id")), jobs)

    def _job(self, answer: bytes) -> Job:
        return self._read(answer, Job)

    def _read(self, answer: bytes, kind: type[T]) -> T:
        return _parsed(lambda: _structure(split_object(answer), kind))

    def _decoded(self, answer: bytes) -> dict[str, Any]:
        return _parsed(lambda: {name: value.decode() for name, value in split_object(answer).items()})

    def _call(self, method: str, path: str, body: bytes | None = None, *, repeatable: bool = True, wait_seconds: float = 0.0) -> bytes:
        """The body of a 2xx answer; repeats the call where that is safe, and no longer than `retry_seconds`."""
        request = _Request(method, self._prefix + path, body, repeatable, wait_seconds + self._read_seconds)
        backoff, deadline = Backoff(), None
        while True:
            try:
                return self._send(request)
            except ServiceError as error:
                deadline = deadline or time.monotonic() + self._retry_seconds
                pause = backoff.next_seconds(error.retry_after_seconds)
                if not (repeatable and _may_pass(error)) or time.monotonic() + pause > deadline or self._closed.wait(pause):
                    raise

    def _send(self, request: _Request) -> bytes:
        headers = self._headers | ({"Content-Type": "application/json"} if request.body is not None else {})
        limits = urllib3.Timeout(connect=self._connect_seconds, read=request.read_seconds)
        try:
            response = self._pool.request(
                request.method, request.path, body=request.body, headers=headers, timeout=limits, retries=False, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _no_answer(error) from error
        if response.status // 100 != 2:
            raise _error_of(response)
        return response.data


def _may_pass(error: ServiceError) -> bool:
    return isinstance(error, ServiceUnavailable) or (error.retryable and (error.status or 500) >= 500)


def _wait_until(deadline: float) -> float:
    return min(MAX_WAIT_SECONDS, max(0.0, deadline - time.monotonic()))


def _job_path(job_id: str, verb: str | None = None) -> str:
    return f"/api/v1/jobs/{quote(job_id, safe='')}" + (f"/{verb}" if verb else "")


def _chosen(
    model_profiles: Sequence[str] | None, task_types: Sequence[str] | None, owner_services: Sequence[str] | None
) -> dict[str, list[str]]:
    given = _given(model_profiles=model_profiles, task_types=task_types, owner_services=owner_services)
    return {name: _alternatives(values) for name, values in given.items()}


def _without_id(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "id"}


def _parsed(parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (NotJSON, KeyError) as error:
        raise UnexpectedAnswer(None, "unexpected_answer", "not an answer of this service", str(error)) from None


def _text(answer: bytes) -> RawJSON:
    return _parsed(lambda: _raw(msgspec.Raw(answer)))


def _items(answer: bytes, name: str) -> list[bytes]:
    return _parsed(lambda: _split_array(split_object(answer)[name]))


def _field(answer: bytes, name: str) -> Any:
    return _parsed(lambda: split_object(answer)[name].decode())  # noqa: PLW0108 -- the split may fail as well


def _item_answer(item: Mapping[str, Any]) -> ItemAnswer:
    status = int(item["status"])
    error = None if status < 300 else service_error(status, cast(Mapping[str, Any], item.get("error") or item))
    return ItemAnswer(str(item["id"]), status, error)
