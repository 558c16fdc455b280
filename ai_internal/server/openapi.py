"""The interface as an OpenAPI 3.1 document: made of the table of operations, the types that read requests, and the refusals.

What a field must be comes from the checks that judge it, so the document cannot differ. Tests compare the schemas of answers with
what a running service answers, and the examples with the schemas.

Sections: words, examples, schemas, the document.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, get_args, get_origin

import attrs

from ai_internal.limits import MAX_ITEMS, MAX_REPORT_BYTES
from ai_internal.server.database import SCHEMA_VERSION
from ai_internal.server.operations import DOCUMENTS, HEALTH, JOBS, OPERATION, OPERATIONS, WORK, Job, Operation, Problem, Request
from ai_internal.server.requests import (
    LENIENT,
    MAX_BATCH,
    MAX_LIST,
    Alternatives,
    BatchBody,
    Body,
    BodyTooLarge,
    BulkBody,
    JobDefaults,
    JobNotFound,
    MalformedJson,
    MalformedRequest,
    NewJob,
    Refusal,
    ServiceFull,
    SmallObject,
    TooDeep,
    UnsupportedMediaType,
    Uuid,
    ValidationFailed,
    sendable,
)
from ai_internal.telemetry import REQUEST_ID as REQUEST_ID_FORM
from providers import MAX_MESSAGE_CHARACTERS, MAX_NOTE_BYTES
from providers.settings import DAY_SECONDS

# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# One word per thing: a field means the same wherever it stands. `Type.field` where there is more to say.
WORDS: Mapping[str, str] = {
    "at": "When the attempt ended.",
    "attempt": "Counted from 1 at the claim; 0 before the first.",
    "attempt_errors": "Failures that were retried, within the window.",
    "audio_seconds": "Seconds of audio worked on.",
    "by_model_profile": "The counters of each model profile.",
    "by_owner_service": "The counters of each owner.",
    "by_task_type": "The counters of each task type.",
    "cancelled": "Cancelled within the window.",
    "capacity": "How many jobs it runs side by side.",
    "category": "The kind of error, for programs.",
    "checked_at": "When it was looked at.",
    "circuit": "Whether jobs go to the provider: closed, open, half_open.",
    "claim_id": "The claim that holds the job.",
    "ClaimRequest.claim_id": "Random, and serves one claim: send one, and the claim may be repeated. Made by the service where absent.",
    "code": "Which refusal this is; stable.",
    "completed": "Completed within the window.",
    "completion_tokens": "Tokens that the model wrote.",
    "count": "How often.",
    "created": "Whether the job is new.",
    "Batch.created": "How many are new.",
    "created_after": "Only jobs created after this time.",
    "created_at": "When the job was created.",
    "created_before": "Only jobs created before this time.",
    "cursor": "`next_cursor` of the page before.",
    "defaults": "What the jobs have in common.",
    "delay_seconds": "How long the job is not handed out again.",
    "detail": "What is to be said of it, for people.",
    "endpoint": "Its address, without user info.",
    "dry_run": "Whether to count the jobs that fit, and to retry none.",
    "error": "Why the job failed or was cancelled; null otherwise.",
    "error_category": "The category of the final error.",
    "errors": "One for each attempt that did not complete; a retry keeps them.",
    "Problem.errors": "Every field that is wrong.",
    "ItemAnswer.errors": "Every field that is wrong.",
    "Stats.errors": "Final failures within the window.",
    "existing": "How many their idempotency_key had created before.",
    "expires_at": "A job that has not been claimed by then fails (`expired`).",
    "failed": "Failed for good within the window.",
    "filter": "Which jobs; must not be empty.",
    "finished_at": "When the job completed, failed or was cancelled.",
    "from": "Which statuses may be put back. Send what you saw, so that a repeat cannot abort a new attempt.",
    "id": "The job's id, a UUIDv7.",
    "idempotency_key": "Unique within its owner_service: a create that is repeated with it creates nothing.",
    "ids": "Ids of jobs.",
    "include": "`input`: with the input.",
    "input": "What is to be done: any JSON, which the service never looks into.",
    "jobs": "The jobs.",
    "Stats.jobs": "The counters of all jobs.",
    "last_at": "The last time.",
    "last_claimed_at": "When a job of it was claimed last.",
    "latency_ms": "How long the look took, in milliseconds.",
    "lease_expires_at": "When the lease ends; the job is taken back within 10 seconds of it.",
    "lease_seconds": "How long the lease is.",
    "Heartbeat.lease_seconds": "A new length; as before where absent.",
    "limit": "The most jobs to take.",
    "matched": "How many jobs fit, whatever the limit; only with `dry_run`.",
    "max_attempts": "How many attempts may fail.",
    "message": f"What went wrong, for people. The first {MAX_MESSAGE_CHARACTERS:,} characters are kept.",
    "FieldError.message": "What the value must be.",
    "model_profile": "The runtime profile that must serve the job.",
    "model_profiles": "Model profiles; any where absent.",
    "ProviderReport.model_profiles": "The profiles it serves.",
    "ProviderHealth.model_profiles": "The profiles it serves.",
    "models": "The models it has.",
    "more": "Whether more jobs fit.",
    "name": "The provider's name.",
    "next_cursor": "`cursor` for the next page; null on the last one.",
    "oldest_pending_seconds": "How long the oldest pending job has waited; null where none is.",
    "owner_ref": "The caller's stable reference.",
    "owner_service": "Who asked.",
    "owner_services": "Owners; any where absent.",
    "p50": "Half took at most so long.",
    "p95": "All but a twentieth took at most so long.",
    "path": "JSON pointer into the body, or `?` and a query parameter.",
    "paused": "Whether all of it is paused.",
    "Paused.paused": "The rules now in force.",
    "paused_at": "Since when.",
    "pending": "Ready to be claimed now.",
    "priority": "Higher first.",
    "progress": f"What the worker reported last of a running job, at most {MAX_NOTE_BYTES:,} bytes.",
    "prompt_tokens": "Tokens that the model read.",
    "providers": "Its providers.",
    "ProvidersStatus.providers": "The providers that the service is configured with.",
    "reason": "Why, for people.",
    "result": "What came of it: any JSON, which the service never looks into.",
    "retried": "How many jobs were put back.",
    "retry_in_seconds": "When to try again; min(3600, 10·2^(attempt−1)) ± 20 % where absent.",
    "retryable": "Whether a repeat may succeed.",
    "Failure.retryable": "Whether another attempt may succeed.",
    "run_at": "Not handed out before; a past time counts as now.",
    "running": "Running now.",
    "running_seconds": "How long attempts took.",
    "scheduled": "Pending with `run_at` in the future.",
    "schema_version": "The version of the database schema.",
    "seen_at": "When it called last.",
    "started_at": "When the latest attempt was claimed.",
    "status": "Where the job stands.",
    "ItemAnswer.status": "The HTTP status that this item would have had alone.",
    "Problem.status": "The HTTP status.",
    "ProviderHealth.status": "How it is doing.",
    "ProviderReport.status": "How it is doing.",
    "Health.status": "Always ok.",
    "Readiness.status": "Always ready.",
    "Readiness.access": "Whether tokens are asked for, or the service is open to all who reach it.",
    "task_type": "The technical class of task.",
    "task_types": "Task types; any where absent.",
    "title": "The same sentence for all refusals of this code.",
    "total_tokens": "Tokens in all.",
    "traceparent": "The caller's W3C trace context; that of the request's header where a job comes without.",
    "type": "The code as a URN.",
    "usage": f"What the attempt used, at most {MAX_NOTE_BYTES:,} bytes; other members are kept as they are. Absent is not zero.",
    "Stats.usage": "What was used within the window.",
    "version": "The release.",
    "wait_seconds": "How long to wait for something to answer with: an upper bound.",
    "waiting_seconds": "How long jobs waited from when they were ready to their claim.",
    "window_seconds": "How far back it counts: an hour, a day or a week.",
    "worker": f"What the worker reports of itself, at most {MAX_REPORT_BYTES:,} bytes.",
    "worker_id": "The worker's name.",
    "workers": "The workers, latest first.",
}

# ── Examples ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_ID, _CLAIM_ID = "01a2044e-1ac3-776c-a127-d7fd86f56c6f", "7d3f1c0a-5b0e-4b4e-9a2f-0c6f5d1e8a11"
_LANE = {"owner_service": "telephony", "task_type": "call_analysis", "model_profile": "qwen2.5-14b"}
_INPUT = {"prompt": "Summarise: the caller asks for the invoice of last month."}
_USAGE = {"prompt_tokens": 412, "completion_tokens": 63, "total_tokens": 475, "model": "qwen2.5-14b"}
_RESULT = {"content": "The caller wants last month's invoice."}
_FACTS = {
    "id": _ID,
    "status": "completed",
    **_LANE,
    "owner_ref": "beeline/7c1f",
    "priority": 0,
    "attempt": 2,
    "max_attempts": 3,
    "created_at": "2026-11-02T09:30:00.000000Z",
    "run_at": "2026-11-02T09:30:00.000000Z",
    "expires_at": None,
    "started_at": "2026-11-02T09:31:12.480112Z",
    "finished_at": "2026-11-02T09:31:15.902331Z",
    "worker_id": "gpu-1",
    "lease_expires_at": None,
    "idempotency_key": "beeline/7c1f#1",
    "traceparent": None,
    "labels": {"call": "7c1f"},
    "progress": None,
    "usage": _USAGE,
    "error": None,
    "errors": [
        {
            "attempt": 1,
            "worker_id": "gpu-1",
            "category": "timeout",
            "message": "no answer within 300 s",
            "usage": None,
            "at": "2026-11-02T09:31:02.118044Z",
        }
    ],
}
_CLAIMED = {
    name: _FACTS[name] for name in ("id", *_LANE, "owner_ref", "priority", "max_attempts", "created_at", "run_at", "expires_at", "labels")
} | {
    "claim_id": _CLAIM_ID,
    "attempt": 1,
    "lease_expires_at": "2026-11-02T09:32:00.350000Z",
    "lease_seconds": 120,
    "traceparent": None,
    "input": _INPUT,
}
_COUNTS = {"pending": 12, "scheduled": 1, "running": 4, "completed": 1830, "failed": 3, "cancelled": 0}
_GROUP = _COUNTS | {
    "oldest_pending_seconds": 2.31,
    "paused": False,
    "last_claimed_at": "2026-11-02T09:31:12.480112Z",
    "waiting_seconds": {"p50": 0.9, "p95": 4.1},
    "running_seconds": {"p50": 3.2, "p95": 11.7},
}
_REPORT = {
    "version": "0.1.0",
    "capacity": 4,
    "running": 1,
    "providers": [{"name": "vllm", "status": "ok", "circuit": "closed", "model_profiles": ["qwen2.5-14b"]}],
}
_WORKER = {"worker_id": "gpu-1", "seen_at": "2026-11-02T09:31:15.902331Z", **_REPORT}

NEW_JOB: Mapping[str, Any] = {
    **_FACTS,
    "status": "pending",
    "attempt": 0,
    **dict.fromkeys(("started_at", "finished_at", "worker_id", "usage", "result")),
    "errors": [],
}
EXAMPLES: Mapping[str, Any] = {
    "NewJob": {**_LANE, "owner_ref": "beeline/7c1f", "input": _INPUT, "idempotency_key": "beeline/7c1f#1"},
    "NewJobs": {
        "defaults": {**_LANE, "priority": 5},
        "jobs": [{"owner_ref": "beeline/7c1f", "input": _INPUT}, {"owner_ref": "beeline/7c20", "input": _INPUT}],
    },
    "JobIds": {"ids": [_ID]},
    "Retry": {"from": ["failed"]},
    "Cancellation": {"reason": "the customer withdrew"},
    "BulkRetry": {"filter": {"owner_service": "telephony", "error_category": ["timeout", "unavailable"]}, "limit": 100},
    "ClaimRequest": {"worker_id": "gpu-1", "model_profiles": ["qwen2.5-14b"], "limit": 4, "lease_seconds": 120, "wait_seconds": 30},
    "Completion": {"claim_id": _CLAIM_ID, "result": _RESULT, "usage": _USAGE},
    "Failure": {"claim_id": _CLAIM_ID, "category": "timeout", "message": "no answer within 300 s", "retryable": True},
    "Heartbeat": {"claim_id": _CLAIM_ID, "progress": {"percent": 40}},
    "Release": {"claim_id": _CLAIM_ID, "delay_seconds": 30},
    "PauseRequest": {"model_profiles": ["whisperx"]},
    "Job": {**_FACTS, "result": _RESULT},
    "Batch": {"jobs": [{"id": _ID, "status": "pending", "created": True}], "created": 1, "existing": 0},
    "JobsFound": {"jobs": [_FACTS, None]},
    "Page": {"jobs": [_FACTS], "next_cursor": _ID},
    "Claim": {"claim_id": _CLAIM_ID, "jobs": [_CLAIMED]},
    "Lease": {"lease_expires_at": "2026-11-02T09:33:12.480112Z", "lease_seconds": 120},
    "ItemAnswers": {
        "jobs": [
            {"id": _ID, "status": 200},
            {
                "id": "01a2044e-1ac3-776c-a127-d7fd86f56c70",
                "status": 409,
                "code": "claim_lost",
                "detail": "The claim does not hold this job any more.",
            },
        ]
    },
    "Retried": {"retried": 100, "more": True},
    "Paused": {
        "paused": [{"owner_service": None, "task_type": None, "model_profile": "whisperx", "paused_at": "2026-11-02T09:40:00.000000Z"}]
    },
    "Stats": {
        "window_seconds": DAY_SECONDS,
        "jobs": _COUNTS,
        "errors": [{"category": "context_too_long", "count": 3, "last_at": "2026-11-02T08:12:44.100000Z"}],
        "attempt_errors": [{"category": "timeout", "count": 21, "last_at": "2026-11-02T09:31:02.118044Z"}],
        "oldest_pending_seconds": 2.31,
        "by_model_profile": [{"model_profile": "qwen2.5-14b", **_GROUP}],
        "by_task_type": [{"task_type": "call_analysis", **_GROUP}],
        "by_owner_service": [{"owner_service": "telephony", **_GROUP}],
        "usage": [
            {
                "owner_service": "telephony",
                "model_profile": "qwen2.5-14b",
                "prompt_tokens": 753_960,
                "completion_tokens": 115_290,
                "total_tokens": 869_250,
                "audio_seconds": None,
            }
        ],
    },
    "Workers": {"workers": [_WORKER]},
    "ProvidersStatus": {
        "providers": [
            {
                "name": "vllm",
                "status": "ok",
                "model_profiles": ["qwen2.5-14b"],
                "models": ["qwen2.5-14b"],
                "endpoint": "http://10.0.0.7:8000",
                "latency_ms": 3.4,
                "checked_at": "2026-11-02T09:31:15.902Z",
            }
        ],
        "workers": [_WORKER],
    },
    "Health": {"status": "ok", "version": "0.1.0"},
    "Readiness": {"status": "ready", "version": "0.1.0", "schema_version": SCHEMA_VERSION, "access": "tokens"},
    "Problem": {
        "type": "urn:ai-service:problem:validation_failed",
        "title": "The request has invalid fields.",
        "status": 422,
        "detail": "The request has invalid fields.",
        "code": "validation_failed",
        "retryable": False,
        "errors": [{"path": "/jobs/3/priority", "message": "must be from -10 to 10"}],
    },
}
# ── Schemas ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

Schema = dict[str, Any]


class Schemas:
    """JSON Schemas of types; `named` has those of classes, which the others point at."""

    def __init__(self) -> None:
        self.named: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """The schema of an annotated type."""
        if attrs.has(kind):
            return self._named(kind.__name__, lambda: self._object(kind))
        if get_origin(kind) is Annotated:
            return self._checked(get_args(kind)[1])
        if get_origin(kind) is list:
            return {"type": "array", "items": self.of(get_args(kind)[0]), "maxItems": MAX_LIST}
        if type(None) in get_args(kind):
            return _nullable(self.of(next(part for part in get_args(kind) if part is not type(None))))
        return {}  # any JSON

    def _named(self, name: str, make: Callable[[], Schema]) -> Schema:
        if name not in self.named:
            self.named[name] = {}  # it may point at itself
            self.named[name] = {**make(), **({"examples": [EXAMPLES[name]]} if name in EXAMPLES else {})}
        return {"$ref": f"#/components/schemas/{name}"}

    def _checked(self, check: Any) -> Schema:
        if isinstance(check, Alternatives):
            return self._named(check.kind.__name__, lambda: self._filter(check.kind))
        if isinstance(check, SmallObject):
            return self.of(check.kind) if check.kind else {"type": "object"}
        return dict(check.schema)

    def properties(self, kind: type[Any]) -> dict[str, Schema]:
        """The fields of a class by the names they have in JSON."""
        return {
            field.name.rstrip("_"): {**self.of(sendable(field)), **_word(kind, field.name), **_default(field), **field.metadata}
            for field in attrs.fields(kind)
        }

    def _object(self, kind: type[Any]) -> Schema:
        schema = {"type": "object", **_text(inspect.cleandoc(kind.__doc__ or "")), "properties": self.properties(kind)}
        required = [name for name, field in attrs.fields_dict(kind).items() if field.default is attrs.NOTHING]
        return schema | ({"required": required} if required else {}) | _closing(kind)

    def _filter(self, kind: type[Any]) -> Schema:
        schema = self._object(kind) | {"minProperties": 1}
        listed = {name: each for name, each in schema["properties"].items() if "items" in each}
        beside = ("description", "default")
        either = {name: {**_only(each, *beside), "anyOf": [each["items"], _without(each, *beside)]} for name, each in listed.items()}
        return schema | {"properties": schema["properties"] | either}

    def of_request(self, request: Request) -> Schema:
        """The schema of a body."""
        if isinstance(request, Body):
            return self.of(request.kind)
        if isinstance(request, BatchBody):
            return self._named("NewJobs", self._batch)
        return self._named(f"{request.kind.__name__}s", lambda: self._bulk(request))

    def _batch(self) -> Schema:
        item = self._object(NewJob)
        item["required"] = [name for name in item["required"] if name not in attrs.fields_dict(JobDefaults)]
        item["description"] = "A job to create. What stands in neither it nor the defaults is missing."
        return _jobs(self._named("NewJobItem", lambda: item), MAX_BATCH, defaults={**self.of(JobDefaults), **_word(BatchBody, "defaults")})

    def _bulk(self, request: BulkBody) -> Schema:
        many = _jobs(self.of(request.item), MAX_ITEMS, **self.properties(request.beside))
        return many | {"examples": [{"jobs": [{"id": EXAMPLES["JobIds"]["ids"][0], **EXAMPLES[request.kind.__name__]}]}]}


def _jobs(item: Schema, high: int, **beside: Schema) -> Schema:
    jobs = {"type": "array", "items": item, "minItems": 1, "maxItems": high, **_word(BatchBody, "jobs")}
    return {"type": "object", "properties": {**beside, "jobs": jobs}, "required": ["jobs"], "additionalProperties": False}


def _nullable(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def _closing(kind: type[Any]) -> Schema:
    """Requests have no other fields than these; answers, and what is read leniently, may."""
    return {"additionalProperties": False} if kind.__module__ == NewJob.__module__ and kind not in LENIENT else {}


def _default(field: "attrs.Attribute[Any]") -> Schema:
    if field.default in (attrs.NOTHING, None):
        return {}
    return {"default": list(field.default) if isinstance(field.default, tuple) else field.default}


def _word(kind: type[Any], name: str) -> Schema:
    """What a field is. A class that extends another has its words."""
    plain = name.rstrip("_")
    keys = [*(f"{each.__name__}.{plain}" for each in inspect.getmro(kind)), plain]
    return _text(next((WORDS[key] for key in keys if key in WORDS), ""))


def _text(text: str) -> Schema:
    return {"description": text} if text else {}


def _only(schema: Schema, *names: str) -> Schema:
    return {name: schema[name] for name in names if name in schema}


def _without(schema: Schema, *names: str) -> Schema:
    return {name: value for name, value in schema.items() if name not in names}


# ── The document ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


GROUPS: Mapping[str, str] = {
    JOBS: "What callers do: create, read, cancel, retry and delete jobs.",
    WORK: "What workers do: claim jobs, keep the lease, report.",
    OPERATION: "What operators look at, and stop.",
    HEALTH: "For balancers and orchestrators; no token is asked for.",
    DOCUMENTS: "What you are reading; no token is asked for.",
}
TOKENS = "A token of the service, where it is set up with any; otherwise it is open to all."
ABOUT = """A durable queue for AI work. Callers create jobs, workers claim them, run them on a model service and report back.

Times are RFC 3339 in UTC; durations are numbers in fields that end in `_seconds`. Payloads (`input`, `result`) come back as the same JSON \
text, 500 levels deep at most. Every call may be repeated after a lost answer: create by `idempotency_key`, claim and finish by `claim_id`.

Every answer has an `X-Request-ID`, by which the log tells of the request: the one that it came with, or one that was made.

What is refused is answered with a problem: `code` is stable, `retryable` says whether a repeat may succeed, and `errors` names every \
field that is wrong. Unknown fields and query parameters are refused."""


_REQUEST_ID_SCHEMA: Schema = {"type": "string", "pattern": f"^{REQUEST_ID_FORM}$"}
REQUEST_ID = {"name": "X-Request-ID", "in": "header", "description": "Comes back if its form is right.", "schema": {"type": "string"}}
REQUEST_ID_SENT = {"description": "By which the log tells of the request.", "required": True, "schema": _REQUEST_ID_SCHEMA}
TRACE = {
    "name": "traceparent",
    "in": "header",
    "description": "A W3C trace context for the jobs that come without one of their own; ignored if it is none.",
    "schema": {"type": "string"},
}


# Every refusal there is; the base is our own mistake.
REFUSALS: Sequence[type[Refusal]] = sorted(Refusal.__subclasses__(), key=lambda refusal: refusal.status)


def document(version: str) -> dict[str, Any]:
    """The OpenAPI document."""
    return _Document().render(version)


class _Document:
    def __init__(self) -> None:
        self._schemas = Schemas()

    def render(self, version: str) -> dict[str, Any]:
        paths: dict[str, dict[str, Any]] = {}
        for (method, path), operation in OPERATIONS.items():
            paths.setdefault(path, {})[method.lower()] = self._operation(path, operation)
        self._schemas.of(Problem)
        self._schemas.named["Problem"]["properties"]["code"] = self._codes()
        return {
            "openapi": "3.1.0",
            "info": {"title": "AI Service", "version": version, "description": ABOUT},
            "servers": [{"url": "/"}],
            "tags": [{"name": name, "description": text} for name, text in GROUPS.items()],
            "security": [{"bearerAuth": []}, {}],
            "paths": paths,
            "components": {
                "schemas": dict(sorted(self._schemas.named.items())),
                "parameters": {"RequestId": REQUEST_ID, "Trace": TRACE},
                "headers": {"RequestId": REQUEST_ID_SENT},
                "securitySchemes": {"bearerAuth": {"type": "http", "scheme": "bearer", "description": TOKENS}},
            },
        }

    def _operation(self, path: str, operation: Operation) -> dict[str, Any]:
        answers = {str(status): self._answer(status, kind) for status, kind in operation.answers.items()}
        parameters = [*self._path_parameters(path), *self._query_parameters(operation), *_header_parameters(operation)]
        return {
            "operationId": operation.name,
            "tags": [operation.group],
            "summary": operation.summary,
            **_text(operation.about),
            "parameters": parameters,
            **({"requestBody": self._body(operation.request)} if operation.request else {}),
            "responses": answers | self._refused(path, operation),
            **({} if operation.roles else {"security": []}),
        }

    def _path_parameters(self, path: str) -> list[dict[str, Any]]:
        schema = self._schemas.of(Uuid)
        return [
            {"name": name, "in": "path", "required": True, "schema": schema, **_text(WORDS["id"])}
            for name in re.findall(r"\{(\w+)\}", path)
        ]

    def _query_parameters(self, operation: Operation) -> list[dict[str, Any]]:
        fields = self._schemas.properties(operation.query)
        return [
            {"name": name, "in": "query", **_text(schema.get("description", "")), "schema": _present(_without(schema, "description"))}
            for name, schema in fields.items()
        ]

    def _body(self, request: Request) -> dict[str, Any]:
        schema = self._schemas.of_request(request)
        required = bool(self._schemas.named[schema["$ref"].rpartition("/")[2]].get("required"))
        return {"required": required, "content": {"application/json": {"schema": schema}}}

    def _answer(self, status: int, kind: type[Any] | str | None) -> dict[str, Any]:
        answer: dict[str, Any] = {"description": HTTPStatus(status).phrase, "headers": dict(_ANSWERED)}
        if isinstance(kind, str):
            answer["content"] = {kind: {"schema": {"type": "object" if kind == "application/json" else "string"}}}
        elif kind is not None:
            answer["content"] = {"application/json": {"schema": self._schemas.of(kind)}}
        if (status, kind) == (201, Job):
            answer["headers"]["Location"] = {"description": "The path of the job.", "required": True, "schema": {"type": "string"}}
            answer["content"]["application/json"]["example"] = NEW_JOB
        return answer

    def _refused(self, path: str, operation: Operation) -> dict[str, Any]:
        by_status: dict[int, list[type[Refusal]]] = {}
        for refusal in REFUSALS:
            if refusal in operation.refusals or _may_refuse(path, operation, refusal):
                by_status.setdefault(refusal.status, []).append(refusal)
        return {str(status): self._problem(status, refusals) for status, refusals in sorted(by_status.items())}

    def _problem(self, status: int, refusals: Collection[type[Refusal]]) -> dict[str, Any]:
        codes = {"properties": {"status": {"const": status}, "code": {"enum": [refusal.code for refusal in refusals]}}}
        schema = {"allOf": [self._schemas.of(Problem), codes]}
        retry_after = {"Retry-After": {"description": "Seconds after which to try again.", "required": True, "schema": {"type": "integer"}}}
        return {
            "description": "\n".join(f"`{refusal.code}`: {refusal.title()}" for refusal in refusals),
            "headers": _ANSWERED | (retry_after if status == 503 else {}),
            "content": {"application/problem+json": {"schema": schema}},
        }

    def _codes(self) -> Schema:
        """Every code with its title and status: those of no operation come from unknown routes and methods, and from our own mistakes."""
        known: Sequence[type[Refusal]] = [*REFUSALS, Refusal]
        codes = [{"const": each.code, "title": each.title(), "description": str(each.status)} for each in known]
        return {"type": "string", **_word(Problem, "code"), "oneOf": codes}


_ANSWERED = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}


def _header_parameters(operation: Operation) -> list[dict[str, Any]]:
    names = ["RequestId", *(["Trace"] if operation.name in ("create", "create_many") else [])]
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def _may_refuse(path: str, operation: Operation, refusal: type[Refusal]) -> bool:
    """Whether an operation may refuse for reasons that are not its own."""
    if refusal.status in (401, 403):
        return bool(operation.roles)
    if refusal.retry_after:
        return refusal is ServiceFull or path.startswith("/api/") or operation.responder == "readiness"
    if refusal in (MalformedJson, BodyTooLarge, UnsupportedMediaType, TooDeep):
        return operation.request is not None
    return refusal in (MalformedRequest, ValidationFailed) or (refusal is JobNotFound and "{job_id}" in path)


def _present(schema: Schema) -> Schema:
    """The schema without null, which a query cannot say."""
    if "anyOf" in schema:
        return dict(schema["anyOf"][0])
    return {**schema, "type": next(each for each in schema["type"] if each != "null")}
