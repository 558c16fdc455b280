"""What callers and workers may ask, and what they are told when it is refused.

A request is an attrs class. msgspec reads one in which nothing is wrong; cattrs finds all problems of another, each with its JSON pointer.
Payloads (`RawJson`) are slices of the body's text that nobody decodes.

Sections: refusals, what a field must be, the requests, finding what is wrong, reading.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Generic, Literal, NewType, NoReturn, TypeVar, Union, cast, get_args, get_origin

import attrs
import cattrs
import msgspec
from cattrs.errors import AttributeValidationNote, IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

from ai_internal.limits import MAX_ITEMS, MAX_LEASE_SECONDS, MAX_REPORT_BYTES, MIN_LEASE_SECONDS
from ai_internal.telemetry import TRACEPARENT
from providers import MAX_NOTE_BYTES
from providers.settings import DAY_SECONDS

# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# JSON text that is passed through and never looked into.
RawJson = NewType("RawJson", str)
T = TypeVar("T")

MAX_DEPTH = 500
MAX_BATCH = 10_000
# Names in a filter, statuses, ids.
MAX_LIST = 1_000
MAX_LOOKUP = 500
MAX_PAGE = 500
# A job may be put off by a year at most: longer is a mistake of units.
MAX_DELAY_SECONDS = 366 * DAY_SECONDS
RETRYABLE = ("failed", "cancelled", "running")


class Refusal(Exception):
    """Internal error.

    A request that gets no for an answer. The first line of the docstring is its title, its name in snake case its `code`, which is stable.
    """

    code: ClassVar[str] = "internal_error"
    # Of HTTP.
    status: ClassVar[int] = 500
    # Seconds after which a repeat may succeed; None where it will not.
    retry_after: ClassVar[int | None] = None

    def __init__(self, detail: str | None = None, errors: Sequence[Mapping[str, str]] = (), reason: str | None = None) -> None:
        super().__init__(detail or self.title())
        self.detail = detail or self.title()
        self.errors = list(errors)
        # For the operator's log, not for the caller.
        self.reason = reason

    def __init_subclass__(cls) -> None:
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def title(cls) -> str:
        """A sentence that is the same for all of its kind."""
        return (cls.__doc__ or "").splitlines()[0]


class MalformedJson(Refusal):
    """The body is not valid JSON."""

    status = 400


class MalformedRequest(Refusal):
    """The request is not valid HTTP."""

    status = 400


class Unauthorized(Refusal):
    """A token is needed, as `Authorization: Bearer …`, and this is none that is known."""

    status = 401


class Forbidden(Refusal):
    """The token does not allow this."""

    status = 403


class NotFound(Refusal):
    """There is no such route."""

    status = 404


class JobNotFound(Refusal):
    """There is no such job."""

    status = 404


class MethodNotAllowed(Refusal):
    """The route has no such method."""

    status = 405


class BodyTooLarge(Refusal):
    """The body is larger than MAX_BODY_BYTES."""

    status = 413


class UnsupportedMediaType(Refusal):
    """The body must be application/json."""

    status = 415


class InvalidState(Refusal):
    """The job's status does not allow this."""

    status = 409


class ClaimLost(Refusal):
    """The claim does not hold this job any more."""

    status = 409


class JobCancelled(Refusal):
    """The job was cancelled."""

    status = 409


class ClaimIdReused(Refusal):
    """The claim_id was used by another worker."""

    status = 409


class IdempotencyKeyReused(Refusal):
    """The idempotency_key stands for another job."""

    status = 409


class ValidationFailed(Refusal):
    """The request has invalid fields."""

    status = 422


class TooDeep(Refusal):
    __doc__ = f"""JSON is nested deeper than {MAX_DEPTH} levels."""

    status = 422


class TooManyCombinations(Refusal):
    """2,000 combinations of owner_service, task_type and model_profile are in use."""

    status = 422


class DatabaseUnavailable(Refusal):
    """PostgreSQL cannot be reached or does not accept writes."""

    status = 503
    retry_after = 2


class DatabaseBusy(Refusal):
    """PostgreSQL is saturated."""

    status = 503
    retry_after = 1


class SchemaMissing(Refusal):
    """The database schema has not been applied."""

    status = 503
    retry_after = 5


class SchemaOutdated(Refusal):
    """The database schema is older than this release."""

    status = 503
    retry_after = 5


class ServiceFull(Refusal):
    """Too many claims or other requests are under way, or too many large bodies."""

    status = 503
    retry_after = 1


class Draining(Refusal):
    """The service is shutting down."""

    status = 503
    retry_after = 1


# What the queue's functions answer per job, other than 'ok'.
OUTCOMES: dict[str, type[Refusal]] = {each.code: each for each in (JobNotFound, ClaimLost, JobCancelled, InvalidState, ClaimIdReused)}


# ── What a field must be ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Check:
    """What a value must be: `kind` in words, its Python types, and `accept`, which returns a sentence where it refuses one.

    `schema` says the same as JSON Schema, for the document of the interface and for msgspec.
    """

    def __init__(self, kind: str, types: tuple[type, ...], accept: Callable[[Any], str | None], schema: Mapping[str, Any]) -> None:
        self.kind, self.types, self.accept, self.schema = kind, types, accept, schema

    @property
    def native(self) -> Any:
        """The same as a type of msgspec's; None for what it cannot say."""
        if "format" in self.schema or "additionalProperties" in self.schema:
            return None
        if "enum" in self.schema:
            return Literal[tuple(self.schema["enum"])]
        limits = {name: self.schema[word] for word, name in _LIMITS.items() if word in self.schema}
        # A dollar sign means the end in JSON Schema; in Python it stands before a last line end too.
        limits |= {"pattern": re.sub(r"\$$", r"\\Z", limits["pattern"])} if "pattern" in limits else {}
        return Union[tuple(Annotated[kind, msgspec.Meta(**limits)] for kind in self.types)]  # noqa: UP007  made of what is in a tuple

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


_LIMITS = {"pattern": "pattern", "minLength": "min_length", "maxLength": "max_length", "minimum": "ge", "maximum": "le"}


def text_of(low: int, high: int | None) -> Check:
    """A string of so many characters."""

    def accept(value: str) -> str | None:
        if "\x00" in value:
            return "must not contain a NUL character"
        return None if low <= len(value) <= (high or len(value)) else f"must have {low} to {high} characters"

    limits = {"minLength": low, "maxLength": high}
    schema = {"type": "string", "pattern": r"^[^\x00]*$", **{name: limit for name, limit in limits.items() if limit}}
    return Check("a string", (str,), accept, schema)


def matching(pattern: str) -> Check:
    """A string that the pattern describes."""
    compiled = re.compile(pattern)
    schema = {"type": "string", "pattern": f"^(?:{pattern})$"}
    return Check("a string", (str,), lambda value: None if compiled.fullmatch(value) else f"must match {pattern}", schema)


def one_of(*texts: str) -> Check:
    """One of these strings."""
    return Check(
        "a string",
        (str,),
        lambda value: None if value in texts else f"must be {' or '.join(texts)}",
        {"type": "string", "enum": list(texts)},
    )


def whole_number(low: int, high: int) -> Check:
    """A JSON number without fraction or exponent, within these."""
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Check("a whole number", (int,), lambda value: None if low <= value <= high else f"must be from {low:,} to {high:,}", schema)


def number(low: float, high: float) -> Check:
    """Any JSON number within these."""
    schema = {"type": "number", "minimum": low, "maximum": high}
    return Check("a number", (int, float), lambda value: None if low <= value <= high else f"must be from {low:,} to {high:,}", schema)


MAX_LABELS, MAX_LABEL_CHARACTERS = 16, 200
_LABEL_KEY = "[A-Za-z0-9._/-]{1,63}"


def _accept_labels(value: dict[str, Any]) -> str | None:
    if len(value) > MAX_LABELS:
        return f"must have at most {MAX_LABELS} labels"
    label = text_of(0, MAX_LABEL_CHARACTERS)
    for key, text in value.items():
        if not re.fullmatch(_LABEL_KEY, key):
            return f"must have keys that match {_LABEL_KEY}"
        if not isinstance(text, str) or label.accept(text):
            return f"must have strings of at most {MAX_LABEL_CHARACTERS} characters, without NUL, as values"
    return None


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
        if self.kind:
            read_raw(raw, self.kind)
        else:
            fields_of(raw)
        return _structure_raw(raw, str)


class Alternatives:
    """A filter as a JSON object, where a single value may stand for a list of one. `kind` is all of it, and none may be empty."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def structure(self, raw: msgspec.Raw) -> Any:
        """The filter. Raises ValueError, or cattrs' errors."""
        fields = fields_of(raw)
        listed = {name: _listed(each) if _is_list(self.kind, name) else each for name, each in fields.items()}
        wanted = read_raw(msgspec.json.encode(listed), self.kind)
        if all(bytes(each).strip(b"[]{} \t\r\n") in (b"", b"null") for each in listed.values()):
            raise ValueError("must not be empty")
        return wanted


Name = Annotated[str, matching(r"[A-Za-z0-9._:/@+-]{1,100}")]
OwnerRef = Annotated[str, text_of(1, 500)]
WorkerId = Annotated[str, text_of(1, 200)]
Message = Annotated[str, text_of(0, None)]
Key = Annotated[str, text_of(1, 500)]
UUID = re.compile("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
Uuid = Annotated[str, matching(UUID.pattern)]
# An item of a bulk call is answered by itself where its id is the id of no job.
ItemId = Annotated[str, text_of(0, 200)]
Category = Annotated[str, matching("[a-z][a-z0-9_]{0,63}")]
Traceparent = Annotated[str, matching(TRACEPARENT)]
Moment = Annotated[str, Check("a string", (str,), _accept_time, {"type": "string", "format": "date-time"})]
Labels = Annotated[
    dict[str, str],
    Check(
        "an object",
        (dict,),
        _accept_labels,
        {
            "type": "object",
            "maxProperties": MAX_LABELS,
            "propertyNames": {"pattern": f"^{_LABEL_KEY}$"},
            "additionalProperties": text_of(0, MAX_LABEL_CHARACTERS).schema,
        },
    ),
]
LabelPair = Annotated[str, matching(f"{_LABEL_KEY}:[^\\x00]{{0,{MAX_LABEL_CHARACTERS}}}")]
Flag = Annotated[bool, Check("true or false", (bool,), lambda _: None, {"type": "boolean"})]
Priority = Annotated[int, whole_number(-10, 10)]
MaxAttempts = Annotated[int, whole_number(1, 100)]
ClaimLimit = Annotated[int, whole_number(1, MAX_ITEMS)]
Lease = Annotated[float, number(MIN_LEASE_SECONDS, MAX_LEASE_SECONDS)]
Wait = Annotated[float, number(0, 60)]
Delay = Annotated[float, number(0, MAX_DELAY_SECONDS)]
Count = Annotated[int, whole_number(0, 10**15)]
Seconds = Annotated[float, number(0, 10**12)]


# ── The requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _field_like(field: "attrs.Attribute[Any]", **changed: Any) -> Any:
    same = {name: getattr(field, name) for name in ("type", "default", "metadata")}
    return attrs.field(**same | changed)


def optional(default: Any, description: str = "") -> Any:
    """A field that may be absent. Where it is read, null and an empty list or object mean the default too."""
    return attrs.field(default=default, metadata={"description": description} if description else {})


@attrs.frozen
class NewJob:
    """A job to create. Times are RFC 3339; a `run_at` in the past counts as now."""

    owner_service: Name
    task_type: Name
    model_profile: Name
    owner_ref: OwnerRef
    input: RawJson
    priority: Priority = optional(0)
    run_at: Moment | None = None
    expires_at: Moment | None = None
    max_attempts: MaxAttempts = optional(3)
    idempotency_key: Key | None = None
    traceparent: Traceparent | None = None
    labels: Labels = optional({}, "Pairs of text by which the owner finds its jobs. Claims carry them.")


# What the jobs of a batch may have in common: all but what tells one from the other.
JobDefaults: Any = attrs.make_class(
    "JobDefaults",
    {
        field.name: _field_like(field, type=cast(Any, field.type) | None, default=None)
        for field in attrs.fields(NewJob)
        if field.name not in ("owner_ref", "idempotency_key")
    },
    frozen=True,
)
JobDefaults.__doc__ = "What the jobs of a batch may have in common."


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

    name: Annotated[str, text_of(1, 100)]
    status: Annotated[str, text_of(1, 100)]
    circuit: Annotated[str, text_of(0, 100)] | None = None
    model_profiles: list[Name] | None = None
    detail: Annotated[str, text_of(0, 2000)] | None = None


@attrs.frozen
class WorkerReport:
    """What a worker says of itself."""

    version: Annotated[str, text_of(1, 100)] | None = None
    capacity: Count | None = None
    running: Count | None = None
    providers: list[ProviderReport] | None = None


# Read leniently: a newer worker may say more than this release knows.
LENIENT = (Usage, ProviderReport, WorkerReport)
UsageText = Annotated[str, SmallObject(MAX_NOTE_BYTES, Usage)]
ProgressText = Annotated[str, SmallObject(MAX_NOTE_BYTES)]
ReportText = Annotated[str, SmallObject(MAX_REPORT_BYTES, WorkerReport)]


# Profiles, types, owners: what a claim may take; None is any.
Filters = tuple[tuple[str, ...] | None, ...]


@attrs.frozen
class ClaimRequest:
    """A wish for pending jobs; an absent filter is any. Lease and wait in seconds."""

    worker_id: WorkerId
    limit: ClaimLimit = optional(1)
    model_profiles: list[Name] | None = None
    task_types: list[Name] | None = None
    owner_services: list[Name] | None = None
    lease_seconds: Lease = optional(900)
    wait_seconds: Wait = optional(0)
    claim_id: Uuid | None = None
    worker: ReportText | None = None

    @property
    def filters(self) -> Filters:
        """Sorted, so that requests with the same ones are claimed for together."""
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
    retryable: Flag = optional(False)  # noqa: FBT003
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
    delay_seconds: Delay = optional(0)


Retryable = Annotated[str, one_of(*RETRYABLE)]


@attrs.frozen
class Retry:
    from_: list[Retryable] = optional(RETRYABLE)


@attrs.frozen
class Cancellation:
    reason: Message = optional("")


@attrs.frozen
class JobIds:
    ids: list[Annotated[str, text_of(0, 100)]] = attrs.field(metadata={"maxItems": MAX_LOOKUP})


Status = Annotated[str, one_of("pending", "running", "completed", "failed", "cancelled")]


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
    label: list[LabelPair] | None = attrs.field(
        default=None, metadata={"description": "A label that the jobs have, as `key:value`. Several must all fit."}
    )
    limit: Annotated[int, whole_number(1, MAX_PAGE)] = optional(50)
    cursor: Uuid | None = None

    @property
    def labels(self) -> dict[str, str]:
        """The labels that a job must have. Raises ValidationFailed for two values of one, which no job has."""
        pairs = [pair.split(":", 1) for pair in dict.fromkeys(self.label or ())]
        labels = dict(pairs)
        if len(labels) < len(pairs):
            raise ValidationFailed(errors=[{"path": "?label", "message": "must have one value for each key"}])
        return labels


@attrs.frozen
class BulkHeartbeat:
    worker: ReportText | None = None


@attrs.frozen
class RetryFilter(JobFilter):
    """Which jobs to retry: the same, but a single value may stand without its list, and running jobs are left alone."""

    status: list[Annotated[str, one_of("failed", "cancelled")]] = optional(("failed", "cancelled"))
    labels: Labels = optional({}, "Labels that the jobs have. Several must all fit.")


@attrs.frozen
class BulkRetry:
    filter: Annotated[RetryFilter, Alternatives(RetryFilter)]
    limit: Annotated[int, whole_number(1, MAX_ITEMS)] = optional(MAX_ITEMS)
    dry_run: Flag = optional(False)  # noqa: FBT003


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
    include: Annotated[str, one_of("input")] | None = None
    wait_seconds: Wait = optional(0)


WINDOWS = (3600, DAY_SECONDS, 7 * DAY_SECONDS)
Window = Annotated[
    int,
    Check(
        "a whole number",
        (int,),
        lambda value: None if value in WINDOWS else f"must be {WINDOWS[0]}, {WINDOWS[1]} or {WINDOWS[2]}",
        {"type": "integer", "enum": list(WINDOWS)},
    ),
]


@attrs.frozen
class StatsQuery:
    window_seconds: Window = optional(DAY_SECONDS)


# ── Finding what is wrong ────────────────────────────────────────────────────────────────────────────────────────────────────────

_converter = cattrs.Converter(detailed_validation=True)


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def _structure_raw(raw: msgspec.Raw, _: Any) -> str:
    text = bytes(raw)
    # So many opening brackets; to take them out is six times faster than to count them (0.25 µs for 2 KB).
    if len(text) - len(text.replace(b"[", b"").replace(b"{", b"")) > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise TooDeep
    return text.decode()


def _depth(text: bytes) -> int:
    """How deep JSON is nested: what is no bracket and what stands in strings is taken out first."""
    bare = re.sub(rb'"[^"]*"', b"", re.sub(rb"\\.", b"", text))
    steps = (1 if byte in b"[{" else -1 for byte in re.sub(rb"[^\[\]{}]", b"", bare))
    return max(itertools.accumulate(steps), default=0)


def _structure_leaf(annotated: Any) -> Callable[[msgspec.Raw, Any], Any]:
    check: Check | SmallObject | Alternatives = get_args(annotated)[1]
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
        parts = decoded(list[msgspec.Raw], raw, "a list")
        if len(parts) > MAX_LIST:
            raise ValueError(f"must have at most {MAX_LIST:,} items")
        for position, item in enumerate(parts):
            try:
                items.append(structure(item, part))
            except Exception as error:  # noqa: BLE001  collected: all problems of a body are reported at once
                error.add_note(IterableValidationNote("", position, part))
                errors.append(error)
        if errors:
            raise IterableValidationError("", errors, kind)
        return items

    return read


def _structure_object(kind: Any) -> Callable[[Any, Any], Any]:
    sent: Any = {
        field.name: cattrs.override(rename=field.name.rstrip("_"), struct_hook=_converter.get_structure_hook(sendable(field)))
        for field in attrs.fields(kind)
    }
    structure = make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=kind not in LENIENT, **sent)
    return lambda raw, _: structure(raw if isinstance(raw, dict) else fields_of(raw), kind)


def fields_of(raw: msgspec.Raw | bytes) -> dict[str, msgspec.Raw]:
    """The members of a JSON object, unread. Raises ValueError."""
    return decoded(dict[str, msgspec.Raw], raw, "an object")


def decoded(kind: type[T], raw: msgspec.Raw | bytes, called: str) -> T:
    """JSON as a `kind`, its members unread. Raises ValueError that says what it must be, by the words in `called`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        raise ValueError(f"must be {called}") from None


_converter.register_structure_hook_func(lambda kind: kind is RawJson, _structure_raw)
_converter.register_structure_hook_factory(attrs.has, _structure_object)
_converter.register_structure_hook_factory(lambda kind: _origin(kind) is list, _structure_list)
_converter.register_structure_hook_factory(lambda kind: _origin(kind) is Annotated, _structure_leaf)
_converter.register_structure_hook_factory(lambda kind: type(None) in get_args(kind), _structure_optional)


def sendable(field: "attrs.Attribute[Any]") -> Any:
    """The type of what may be sent as a field: null too where it has a default."""
    return field.type if field.default in (attrs.NOTHING, None) else Union[field.type, None]  # noqa: UP007


def explain(fields: Mapping[str, msgspec.Raw], kind: type[Any]) -> None:
    """Raises cattrs' errors or a ValueError where something is wrong with the members of an object."""
    _converter.structure(fields, kind)


def validation_refusal(error: Exception, at: str) -> Refusal:
    """The refusal with every problem in what was raised, as JSON pointers below `at`."""
    causes = list(_causes(error, at))
    too_deep = any(isinstance(cause, TooDeep) for _, cause in causes)
    problems = [problem for path, cause in causes for problem in problems_of(path, cause)]
    return (TooDeep if too_deep else ValidationFailed)(errors=problems)


def _causes(error: BaseException, at: str) -> Iterator[tuple[str, BaseException]]:
    """What went wrong in the leaves of cattrs' tree of exceptions, each with its JSON pointer."""
    if not isinstance(error, cattrs.BaseValidationError):
        yield at, error
        return
    for part in error.exceptions:
        notes = (note for note in getattr(part, "__notes__", ()) if isinstance(note, AttributeValidationNote | IterableValidationNote))
        step = "".join(f"/{_pointer(getattr(note, 'name', getattr(note, 'index', '')))}" for note in notes)
        yield from _causes(part, at + step)


def problems_of(at: str, cause: BaseException) -> list[dict[str, str]]:
    """What a cause tells the caller, as members of a problem's `errors`."""
    if isinstance(cause, cattrs.ForbiddenExtraKeysError):
        return [{"path": f"{at}/{_pointer(name)}", "message": "is not a field of this request"} for name in sorted(cause.extra_fields)]
    return [{"path": at, "message": "is required" if isinstance(cause, KeyError) else str(cause)}]


def _pointer(name: Any) -> str:
    return "from" if name == "from_" else str(name).replace("~", "~0").replace("/", "~1")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# What a reader raises: it is for cattrs to say what is wrong.
UNCLEAR = (ValueError, RecursionError, Refusal, cattrs.BaseValidationError)


class Reader(Generic[T]):
    """Reads JSON objects as a kind of request.

    msgspec checks names, types and limits, which come from the same checks as the OpenAPI document; the hook of a field
    looks at what msgspec cannot judge.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        kinds = [sendable(field) for field in attrs.fields(cast(Any, kind))]
        left = [(position, each) for position, each in enumerate(kinds) if each is RawJson or _native(each) is None]
        self._hooks = [(position, each, _converter.get_structure_hook(each)) for position, each in left]
        defaults = [field.default for field in attrs.fields(cast(Any, kind))]
        self._defaults = [(position, each) for position, each in enumerate(defaults) if each not in (attrs.NOTHING, None)]
        struct = _struct(kind)
        self._decode = msgspec.json.Decoder(struct).decode
        self._decode_list = msgspec.json.Decoder(list[struct]).decode  # type: ignore[valid-type]

    def read(self, raw: msgspec.Raw | bytes) -> T:
        """The request. Raises one of `UNCLEAR`."""
        return self._made(self._decode(raw))

    def read_list(self, raw: msgspec.Raw | bytes) -> list[T]:
        """A list of requests at once: half the time that it takes one by one. Raises one of `UNCLEAR`."""
        return list(map(self._made, self._decode_list(raw)))

    def _made(self, struct: msgspec.Struct) -> T:
        values = list(msgspec.structs.astuple(struct))
        for position, kind, hook in self._hooks:
            if isinstance(values[position], msgspec.Raw):
                values[position] = hook(values[position], kind)
        for position, default in self._defaults:
            values[position] = values[position] or default
        return self._kind(*values)


def _struct(kind: Any) -> type[msgspec.Struct]:
    """A kind of request as msgspec reads it."""
    fields: list[Any] = []
    for field in attrs.fields(kind):
        default = () if field.default is attrs.NOTHING else (field.default,)
        fields.append((field.name, _native(sendable(field)) or msgspec.Raw, *default))
    return msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=kind not in LENIENT, rename={"from_": "from"}.get)


def _native(kind: Any) -> Any:
    """What msgspec can check of a field by itself; None where cattrs' hook has to look at it."""
    parts = get_args(kind)
    if kind is RawJson:
        return msgspec.Raw
    if _origin(kind) is Annotated:
        return parts[1].native if isinstance(parts[1], Check) else None
    if _origin(kind) is list:
        part = _native(parts[0])
        return part and Annotated[list[part], msgspec.Meta(max_length=MAX_LIST)]  # type: ignore[valid-type]
    if type(None) in parts and RawJson not in parts:
        present = _native(parts[0])
        return present and present | None
    return None


# Made at its first use.
reader_of: Callable[[Any], Reader[Any]] = functools.cache(Reader)


def read_raw(raw: msgspec.Raw | bytes, kind: type[T]) -> T:
    """JSON as `kind`. Raises ValueError, or cattrs' errors, which say what is wrong."""
    try:
        return cast(T, reader_of(kind).read(raw))
    except UNCLEAR:
        # Without the earlier ones of a name that comes twice: the last counts.
        fields = fields_of(raw)
        explain(fields, kind)
        return cast(T, reader_of(kind).read(msgspec.json.encode(fields)))


def read_one(raw: msgspec.Raw | bytes, kind: type[T], at: str = "") -> T:
    """A JSON object as `kind`. Raises ValidationFailed or TooDeep with every problem, as JSON pointers below `at`."""
    try:
        return read_raw(raw, kind)
    except UNCLEAR as error:
        raise validation_refusal(error, at) from None


# Jobs that are read together: what is joined stays small enough for malloc to keep its memory.
CHUNK = 16


def read_each(texts: Sequence[msgspec.Raw | bytes], kind: type[T]) -> list[T | Refusal]:
    """The objects in `/jobs` as `kind`; in the place of one that is wrong stands its refusal."""
    try:
        read = reader_of(kind).read_list
        chunks = (texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK))
        return [each for chunk in chunks for each in read(b"[%b]" % b",".join(chunk))]
    except UNCLEAR:
        return [_read_or_refuse(text, kind, f"/jobs/{position}") for position, text in enumerate(texts)]


def _read_or_refuse(raw: msgspec.Raw | bytes, kind: type[T], at: str) -> T | Refusal:
    try:
        return read_one(raw, kind, at)
    except Refusal as refusal:
        return refusal


def read_object(body: bytes) -> dict[str, msgspec.Raw]:
    """The members of the JSON object in a request's body, unread; an empty body is `{}`. Of duplicate keys the last wins."""
    try:
        body.decode()
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw]) if body.strip() else {}
    except msgspec.ValidationError:
        return _refuse_what_is_no_object(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedJson(str(error)) from None
    except RecursionError:
        raise TooDeep from None


def _refuse_what_is_no_object(body: bytes) -> NoReturn:
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        raise MalformedJson(str(error)) from None
    except RecursionError:
        raise TooDeep from None
    raise ValidationFailed(errors=[{"path": "", "message": "must be an object"}])


def read_items(fields: Mapping[str, msgspec.Raw], high: int, beside: Sequence[str]) -> tuple[list[msgspec.Raw], list[Refusal]]:
    """The unread members of `jobs`, and what is wrong with them or with the names beside; 1 to `high` members are right."""
    unknown = [
        {"path": f"/{_pointer(name)}", "message": "is not a field of this request"} for name in fields if name not in ("jobs", *beside)
    ]
    refusals: list[Refusal] = [ValidationFailed(errors=unknown)] if unknown else []
    try:
        items = decoded(list[msgspec.Raw], fields["jobs"], "a list")
    except (KeyError, ValueError) as error:
        return [], [*refusals, ValidationFailed(errors=problems_of("/jobs", error))]
    if not 1 <= len(items) <= high:
        refusals.append(ValidationFailed(errors=[{"path": "/jobs", "message": f"must have 1 to {high:,} items"}]))
    return items[:high], refusals


def raise_all(refusals: Sequence[Refusal]) -> None:
    """Raises what is wrong with a body as one refusal; nothing where nothing is."""
    if refusals:
        too_deep = any(isinstance(refusal, TooDeep) for refusal in refusals)
        raise (TooDeep if too_deep else ValidationFailed)(errors=[problem for refusal in refusals for problem in refusal.errors])


class Body(Generic[T]):
    """A request's body that is one object."""

    def __init__(self, kind: type[T]) -> None:
        self.kind = kind

    def read(self, body: bytes) -> T:
        """The request. Raises MalformedJson, TooDeep or ValidationFailed."""
        try:
            # msgspec does not look into what it passes through.
            body.decode()
            return cast(T, reader_of(self.kind).read(body))
        except UNCLEAR:
            return read_fields(read_object(body), self.kind)


class BatchBody:
    """A body of many new jobs, all or none, over their defaults."""

    def read(self, body: bytes) -> list[NewJob]:
        """The jobs with the defaults filled in: a field that is present in the job wins, null too. Raises like `Body.read`."""
        fields = read_object(body)
        items, refusals = read_items(fields, MAX_BATCH, ["defaults"])
        defaults = b""
        try:
            if "defaults" in fields:
                read_one(fields["defaults"], JobDefaults, "/defaults")
                defaults = msgspec.json.encode(fields_of(fields["defaults"]))[1:-1]
        except Refusal as refusal:
            raise_all([*refusals, refusal])
        jobs = read_each([_overlaid(item, defaults) for item in items] if defaults else items, NewJob)
        raise_all([*refusals, *(job for job in jobs if isinstance(job, Refusal))])
        return cast(list[NewJob], jobs)


_EMPTY = re.compile(rb"\{\s*\}")


def _overlaid(item: msgspec.Raw, members: bytes) -> msgspec.Raw | bytes:
    """An object over these members of another: of a name that comes twice the last counts."""
    if _EMPTY.fullmatch(item):
        return b"{%b}" % members
    view = memoryview(item)
    return b"".join((b"{", members, b",", view[1:])) if bytes(view[:1]) == b"{" else item


@attrs.frozen
class Items:
    """What a bulk call asks: for each item its id, None where it has none that is a string, and its request or the refusal."""

    entries: list[tuple[str | None, Any]]
    beside: Any


class BulkBody:
    """A body of many items, each by itself: a `kind` with the `id` of its job. Beside them stand the fields of `beside`."""

    def __init__(self, kind: type[Any], beside: type[Any] = Nothing) -> None:
        fields = {field.name: _field_like(field) for field in attrs.fields(kind)}
        self.item = attrs.make_class(f"{kind.__name__}Item", {"id": attrs.field(type=cast(Any, ItemId)), **fields}, frozen=True)
        self.kind, self.beside = kind, beside

    def read(self, body: bytes) -> Items:
        """The items. Raises like `Body.read`, but not for what is wrong within an item."""
        names = [field.name for field in attrs.fields(self.beside)]
        fields = read_object(body)
        entries = self._read_all(fields) if fields.keys() <= {"jobs", *names} else None
        if entries is None:
            items, refusals = read_items(fields, MAX_ITEMS, names)
            raise_all(refusals)
            entries = [self._entry(asked, item) for item, asked in zip(items, read_each(items, self.item), strict=True)]
        return Items(entries, read_fields({name: fields[name] for name in names if name in fields}, self.beside))

    def _read_all(self, fields: Mapping[str, msgspec.Raw]) -> list[tuple[str | None, Any]] | None:
        """The items where nothing is wrong with any of them."""
        try:
            asked = reader_of(self.item).read_list(fields["jobs"])
        except (KeyError, *UNCLEAR):
            return None
        return list(map(self._entry, asked)) if 1 <= len(asked) <= MAX_ITEMS else None

    def _entry(self, asked: Any, item: msgspec.Raw | None = None) -> tuple[str | None, Any]:
        if isinstance(asked, Refusal):
            return _id_of(item) if item is not None else None, asked
        try:
            return known_id(asked.id), asked
        except JobNotFound as refusal:
            return asked.id, refusal


def _id_of(item: msgspec.Raw) -> str | None:
    with contextlib.suppress(KeyError, *UNCLEAR):
        return str(_converter.structure(fields_of(item)["id"], ItemId))
    return None


def known_id(job_id: str) -> str:
    """An id in lower case. Raises JobNotFound: an id that is not a UUID matches no job."""
    if not UUID.fullmatch(job_id):
        raise JobNotFound
    return job_id.lower()


def read_fields(fields: Mapping[str, msgspec.Raw], kind: type[T]) -> T:
    """Members of an object as `kind`. Raises like `read_one`."""
    return read_one(msgspec.json.encode(fields), kind)


_NO_USAGE = Usage()


def count_usage(usage: str | None) -> Usage:
    """What of a usage is counted; absent is not zero."""
    if usage is None:
        return _NO_USAGE
    return read_raw(usage.encode(), Usage)


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
        return read_fields(fields, kind)
    except ValidationFailed as refusal:
        raise ValidationFailed(errors=[{**problem, "path": "?" + problem["path"][1:]} for problem in refusal.errors]) from None


def _is_list(kind: type[Any], name: str) -> bool:
    field = attrs.fields_dict(kind).get(name)
    return field is not None and any(get_origin(part) is list for part in get_args(sendable(field)))
