"""The interface as an OpenAPI 3.1 document: made of the types that read the requests, the refusals, and the table of operations here.

What a field must be is told by the checks that judge it, so the document cannot say anything else. Tests hold the operations to the
routes of the application, the schemas of answers to what a running service answers, and the examples to the schemas.

`answers.py` has the types of answers, the words and the examples. Sections: operations, schemas, the document.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import Annotated, Any, get_args, get_origin

import attrs

from ai_internal.server.access import ROUTES
from ai_internal.server.answers import (
    EXAMPLES,
    NEW_JOB,
    WORDS,
    Batch,
    Claim,
    Health,
    ItemAnswers,
    Job,
    JobsFound,
    Lease,
    Page,
    Paused,
    Problem,
    ProvidersStatus,
    Readiness,
    Retried,
    Stats,
    Workers,
)
from ai_internal.server.requests import (
    LENIENT,
    MAX_BATCH,
    MAX_BULK,
    MAX_LIST,
    Alternatives,
    BodyTooLarge,
    BulkRetry,
    Cancellation,
    ClaimIdReused,
    ClaimLost,
    ClaimRequest,
    Completion,
    Failure,
    Heartbeat,
    IdempotencyKeyReused,
    InvalidState,
    JobCancelled,
    JobDefaults,
    JobIds,
    JobNotFound,
    JobQuery,
    Listing,
    MalformedJson,
    MalformedRequest,
    NewJob,
    PauseRequest,
    Refusal,
    Release,
    ReportText,
    Retry,
    ServiceFull,
    SmallObject,
    StatsQuery,
    TooDeep,
    TooManyCombinations,
    UnsupportedMediaType,
    Uuid,
    ValidationFailed,
)
from ai_internal.telemetry import REQUEST_ID as REQUEST_ID_FORM

# ── Operations ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Many:
    """A body `{"jobs": […]}`: an item is a `kind` with the `id` of its job."""

    kind: type[Any]


@attrs.frozen(kw_only=True)
class Operation:
    """One method of one route.

    `answers` has a type of answer for each status, None for an empty one, or the media type of a text. `refusals` are those of its own:
    what any operation may refuse is added.
    """

    name: str
    group: str
    summary: str
    about: str = ""
    answers: Mapping[int, type[Any] | str | None]
    body: type[Any] | Many | None = None
    query: type[Any] | None = None
    refusals: tuple[type[Refusal], ...] = ()


CALLER, WORKER, OPERATOR, HEALTH, DOCUMENTS = "Jobs", "Work", "Operation", "Health", "Documents"
_HELD = (ClaimLost, JobCancelled)
_JOBS = "/api/v1/jobs"


def _verb(body: type[Any], name: str, summary: str, about: str, answer: type[Any] = Job) -> dict[tuple[str, str], Operation]:
    """A claim's verb, for one job and for many."""
    one = Operation(name=name, group=WORKER, summary=summary, about=about, body=body, answers={200: answer}, refusals=_HELD)
    many = Operation(
        name=f"{name}_many",
        group=WORKER,
        summary=f"{summary}: up to {MAX_BULK:,} jobs",
        about="Each item by itself: the answer has a status for each, and an ill item spoils no other.",
        body=Many(body),
        answers={200: ItemAnswers},
    )
    return {("POST", f"{_JOBS}/{{job_id}}/{name}"): one, ("POST", f"{_JOBS}/{name}"): many}


def _probe(path: str, name: str, summary: str, answer: type[Any]) -> dict[tuple[str, str], Operation]:
    get = Operation(name=name, group=HEALTH, summary=summary, answers={200: answer})
    asked = {"HEAD": attrs.evolve(get, answers={200: None}), "OPTIONS": get}
    beside = {
        method: attrs.evolve(each, name=f"{name}_{method.lower()}", summary=f"The same by {method}") for method, each in asked.items()
    }
    return {(method, path): operation for method, operation in {"GET": get, **beside}.items()}


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", _JOBS): Operation(
        name="create",
        group=CALLER,
        summary="Create a job",
        about="With an `idempotency_key` that exists the answer is the job it stands for, and 200.",
        body=NewJob,
        answers={201: Job, 200: Job},
        refusals=(IdempotencyKeyReused, TooManyCombinations),
    ),
    ("POST", f"{_JOBS}/batch"): Operation(
        name="create_many",
        group=CALLER,
        summary=f"Create up to {MAX_BATCH:,} jobs, all or none",
        about="What the jobs have in common may stand in `defaults`; a field that is present in a job wins, null too. 200 if none is new.",
        body=Many(NewJob),
        answers={201: Batch, 200: Batch},
        refusals=(IdempotencyKeyReused, TooManyCombinations),
    ),
    ("GET", _JOBS): Operation(
        name="list",
        group=CALLER,
        summary="List jobs, newest first",
        about="A parameter that is repeated means either; different ones must all hold. No payloads.",
        query=Listing,
        answers={200: Page},
    ),
    ("GET", f"{_JOBS}/{{job_id}}"): Operation(
        name="get",
        group=CALLER,
        summary="Read a job and its result",
        about="With `wait_seconds` it answers when the job has finished, or earlier.",
        query=JobQuery,
        answers={200: Job},
    ),
    ("POST", f"{_JOBS}/get"): Operation(
        name="get_many", group=CALLER, summary="Read many jobs, without payloads", body=JobIds, answers={200: JobsFound}
    ),
    ("POST", f"{_JOBS}/{{job_id}}/retry"): Operation(
        name="retry",
        group=CALLER,
        summary="Put a job back to pending",
        about="Attempt 0, run now; its `errors` stay. A job that is pending already stays as it is.",
        body=Retry,
        answers={200: Job},
        refusals=(InvalidState,),
    ),
    ("POST", f"{_JOBS}/{{job_id}}/cancel"): Operation(
        name="cancel",
        group=CALLER,
        summary="Cancel a pending or running job",
        about="At once: its worker's next call is refused with `job_cancelled`.",
        body=Cancellation,
        answers={200: Job},
        refusals=(InvalidState,),
    ),
    ("DELETE", f"{_JOBS}/{{job_id}}"): Operation(
        name="delete", group=CALLER, summary="Erase a finished job and its payloads", answers={204: None}, refusals=(InvalidState,)
    ),
    ("POST", f"{_JOBS}/retry"): Operation(
        name="retry_many",
        group=CALLER,
        summary="Retry failed and cancelled jobs that fit a filter",
        about="With `dry_run` none is retried, and `matched` tells how many fit, whatever the `limit`.",
        body=BulkRetry,
        answers={200: Retried},
    ),
    ("POST", f"{_JOBS}/claim"): Operation(
        name="claim",
        group=WORKER,
        summary="Claim pending jobs",
        about="Answers as soon as there is one, and with fewer than `limit` where there are fewer. "
        "Repeated with the same `claim_id` and `worker_id`: the jobs it still holds, and no others.",
        body=ClaimRequest,
        answers={200: Claim},
        refusals=(ClaimIdReused,),
    ),
    **_verb(Heartbeat, "heartbeat", "Extend the lease", "From now. Progress is kept where none is given.", Lease),
    **_verb(Completion, "complete", "Report a result", "Accepted after the lease ran out too, while nobody has claimed the job since."),
    **_verb(
        Failure,
        "fail",
        "Report a failure",
        "A retryable one goes back to pending while attempts are left, after its delay.",
    ),
    **_verb(Release, "release", "Give a job back", "The attempt is not counted. The 101st time the job fails."),
    ("GET", "/api/v1/stats"): Operation(
        name="stats", group=OPERATOR, summary="Counters, durations, errors and usage", query=StatsQuery, answers={200: Stats}
    ),
    ("GET", "/api/v1/workers"): Operation(
        name="workers", group=OPERATOR, summary="Workers of the last five minutes", answers={200: Workers}
    ),
    ("GET", "/api/v1/providers/status"): Operation(
        name="providers_status", group=OPERATOR, summary="Check the configured providers", answers={200: ProvidersStatus}
    ),
    ("GET", "/api/v1/pause"): Operation(name="pauses", group=OPERATOR, summary="What is paused", answers={200: Paused}),
    ("POST", "/api/v1/pause"): Operation(
        name="pause",
        group=OPERATOR,
        summary="Stop handing out jobs",
        about="Every combination of what is named; a part that is not named is any, and at least one must be.",
        body=PauseRequest,
        answers={200: Paused},
    ),
    ("POST", "/api/v1/resume"): Operation(
        name="resume",
        group=OPERATOR,
        summary="Go on handing out jobs",
        about="Lifts every rule that lies within what is named.",
        body=PauseRequest,
        answers={200: Paused},
    ),
    **_probe("/healthz", "health", "Whether the process lives; it asks nobody", Health),
    **_probe("/readyz", "readiness", "Whether requests can be served", Readiness),
    ("GET", "/metrics"): Operation(name="metrics", group=OPERATOR, summary="Figures for Prometheus", answers={200: "text/plain"}),
    ("GET", "/"): Operation(name="page", group=DOCUMENTS, summary="The operator's page", answers={200: "text/html"}),
    ("GET", "/openapi.json"): Operation(name="openapi", group=DOCUMENTS, summary="This document", answers={200: "application/json"}),
    ("GET", "/docs"): Operation(name="docs", group=DOCUMENTS, summary="A page to read it", answers={200: "text/html"}),
}


# ── Schemas ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

Schema = dict[str, Any]


class Schemas:
    """JSON Schemas of types; `named` has those of classes, which the others point at."""

    def __init__(self) -> None:
        self.named: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """The schema of an annotated type."""
        if isinstance(kind, Many):
            return self._many(kind.kind)
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
        fields = attrs.fields_dict(kind)
        return {name.rstrip("_"): {**self.of(field.type), **field.metadata, **_word(kind, name)} for name, field in fields.items()}

    def _object(self, kind: type[Any]) -> Schema:
        schema = {"type": "object", **_text(inspect.cleandoc(kind.__doc__ or "")), "properties": self.properties(kind)}
        required = [name for name, field in attrs.fields_dict(kind).items() if field.default is attrs.NOTHING]
        return schema | ({"required": required} if required else {}) | _closing(kind)

    def _filter(self, kind: type[Any]) -> Schema:
        schema = self._object(kind) | {"minProperties": 1}
        listed = {name: each for name, each in schema["properties"].items() if "items" in each}
        either = {name: {**_word(kind, name), "anyOf": [each["items"], _without(each, "description")]} for name, each in listed.items()}
        return schema | {"properties": schema["properties"] | either}

    def _many(self, kind: type[Any]) -> Schema:
        return self._named(f"{kind.__name__}s", lambda: self._batch() if kind is NewJob else self._bulk(kind))

    def _batch(self) -> Schema:
        item = self._object(NewJob)
        item["required"] = [name for name in item["required"] if name not in attrs.fields_dict(JobDefaults)]
        item["description"] = "A job to create. What stands in neither it nor the defaults is missing."
        return _jobs(self._named("NewJobItem", lambda: item), MAX_BATCH, defaults={**self.of(JobDefaults), **_word(Many, "defaults")})

    def _bulk(self, kind: type[Any]) -> Schema:
        item = self._object(kind)
        item["properties"] = {"id": {"type": "string", "maxLength": 200, **_word(kind, "id")}, **item["properties"]}
        item["required"] = ["id", *item["required"]]
        worker = {"worker": {**self.of(ReportText | None), **_word(Many, "worker")}} if kind is Heartbeat else {}
        many = _jobs(self._named(f"{kind.__name__}Item", lambda: item), MAX_BULK, **worker)
        return many | {"examples": [{"jobs": [{"id": EXAMPLES["JobIds"]["ids"][0], **EXAMPLES[kind.__name__]}]}]}


def _jobs(item: Schema, high: int, **beside: Schema) -> Schema:
    jobs = {"type": "array", "items": item, "minItems": 1, "maxItems": high, **_word(Many, "jobs")}
    return {"type": "object", "properties": {**beside, "jobs": jobs}, "required": ["jobs"], "additionalProperties": False}


def _nullable(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def _closing(kind: type[Any]) -> Schema:
    """Requests have no other fields than these; answers, and what is read leniently, may."""
    return {"additionalProperties": False} if kind.__module__ == NewJob.__module__ and kind not in LENIENT else {}


def _word(kind: type[Any], name: str) -> Schema:
    """What a field is. A class that extends another has its words."""
    plain = name.rstrip("_")
    keys = [*(f"{each.__name__}.{plain}" for each in inspect.getmro(kind)), plain]
    return _text(next((WORDS[key] for key in keys if key in WORDS), ""))


def _text(text: str) -> Schema:
    return {"description": text} if text else {}


def _without(schema: Schema, *names: str) -> Schema:
    return {name: value for name, value in schema.items() if name not in names}


# ── The document ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


GROUPS: Mapping[str, str] = {
    CALLER: "What callers do: create, read, cancel, retry and delete jobs.",
    WORKER: "What workers do: claim jobs, keep the lease, report.",
    OPERATOR: "What operators look at, and stop.",
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


_NOTED: Schema = {"type": "string", "pattern": f"^{REQUEST_ID_FORM}$"}
REQUEST_ID = {"name": "X-Request-ID", "in": "header", "description": "Comes back if its form is right.", "schema": {"type": "string"}}
REQUEST_ID_SENT = {"description": "By which the log tells of the request.", "required": True, "schema": _NOTED}
TRACE = {
    "name": "traceparent",
    "in": "header",
    "description": "A W3C trace context for the jobs that come without one of their own; ignored if it is none.",
    "schema": {"type": "string"},
}


def document(version: str, status_of: Mapping[type[Refusal], int]) -> dict[str, Any]:
    """The OpenAPI document. `status_of` has the HTTP status of each refusal there is."""
    return _Document(status_of).made(version)


class _Document:
    def __init__(self, status_of: Mapping[type[Refusal], int]) -> None:
        self._status_of, self._schemas = status_of, Schemas()

    def made(self, version: str) -> dict[str, Any]:
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
            **({"requestBody": self._body(operation.body)} if operation.body else {}),
            "responses": answers | self._refused(path, operation),
            **({} if _is_guarded(path) else {"security": []}),
        }

    def _path_parameters(self, path: str) -> list[dict[str, Any]]:
        schema = self._schemas.of(Uuid)
        return [
            {"name": name, "in": "path", "required": True, "schema": schema, **_text(WORDS["id"])}
            for name in re.findall(r"\{(\w+)\}", path)
        ]

    def _query_parameters(self, operation: Operation) -> list[dict[str, Any]]:
        fields = self._schemas.properties(operation.query) if operation.query else {}
        return [
            {"name": name, "in": "query", **_text(schema.get("description", "")), "schema": _present(_without(schema, "description"))}
            for name, schema in fields.items()
        ]

    def _body(self, body: type[Any] | Many) -> dict[str, Any]:
        schema = self._schemas.of(body)
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
        for refusal, status in self._status_of.items():
            if refusal in operation.refusals or _may_refuse(path, operation, refusal, status):
                by_status.setdefault(status, []).append(refusal)
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
        known: dict[type[Refusal], int] = {**self._status_of, Refusal: 500}
        codes = [{"const": refusal.code, "title": refusal.title(), "description": str(status)} for refusal, status in known.items()]
        return {"type": "string", **_word(Problem, "code"), "oneOf": codes}


_ANSWERED = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}


def _header_parameters(operation: Operation) -> list[dict[str, Any]]:
    names = ["RequestId", *(["Trace"] if operation.body in (NewJob, Many(NewJob)) else [])]
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def _is_guarded(path: str) -> bool:
    """Whether a token is asked for, where there are any."""
    return any(roles for (_, at), roles in ROUTES.items() if at == path)


def _may_refuse(path: str, operation: Operation, refusal: type[Refusal], status: int) -> bool:
    """Whether an operation may refuse for reasons that are not its own."""
    if status in (401, 403):
        return _is_guarded(path)
    if status == 503:
        return refusal is ServiceFull or path.startswith("/api/") or path == "/readyz"
    if refusal in (MalformedJson, BodyTooLarge, UnsupportedMediaType, TooDeep):
        return operation.body is not None
    return refusal in (MalformedRequest, ValidationFailed) or (refusal is JobNotFound and "{job_id}" in path)


def _present(schema: Schema) -> Schema:
    """The schema without null, which a query cannot say."""
    if "anyOf" in schema:
        return dict(schema["anyOf"][0])
    return {**schema, "type": next(each for each in schema["type"] if each != "null")}
