"""Every operation of the HTTP interface, once: method, path, request, answers, and who may call it.

The application routes by this table, access is granted by it, and the OpenAPI document and the README's table of the API are
made of it. Nothing serves by the types of answers: a test compares real answers with them.

Sections: answers, operations.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, get_args

import attrs

from ai_internal.limits import MAX_ITEMS
from ai_internal.server.access import CALLER, MONITOR, OPERATOR, WORKER, Role
from ai_internal.server.requests import (
    MAX_BATCH,
    BatchBody,
    Body,
    BulkBody,
    BulkHeartbeat,
    BulkRetry,
    Cancellation,
    Category,
    Check,
    ClaimIdReused,
    ClaimLost,
    ClaimRequest,
    Completion,
    Failure,
    Flag,
    Heartbeat,
    IdempotencyKeyReused,
    InvalidState,
    JobCancelled,
    JobIds,
    JobQuery,
    Listing,
    Message,
    Moment,
    Name,
    NewJob,
    Nothing,
    PauseRequest,
    ProgressText,
    RawJson,
    Refusal,
    Release,
    Retry,
    StatsQuery,
    Status,
    TooManyCombinations,
    UsageText,
    Uuid,
    Window,
    WorkerId,
    WorkerReport,
    one_of,
    whole_number,
)

# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# A client must put up with fields that are not listed here.
ABSENT: Any = None  # the default of a field that is not in every answer
Text = Annotated[str, Check("a string", (str,), lambda _: None, {"type": "string"})]
# No upper limits: some are sums.
Total = Annotated[int, Check("a whole number", (int,), lambda _: None, {"type": "integer", "minimum": 0})]
Duration = Annotated[float, Check("a number", (int, float), lambda _: None, {"type": "number", "minimum": 0})]
HttpStatus = Annotated[int, whole_number(200, 599)]


@attrs.frozen
class JobError:
    """Why a job failed, or was cancelled."""

    category: Category
    message: Message


@attrs.frozen
class AttemptError:
    """An attempt that did not complete."""

    attempt: Total
    worker_id: WorkerId | None
    category: Category
    message: Message
    usage: UsageText | None
    at: Moment


def _stated(*but: str) -> Any:
    """The fields of a new job as an answer has them: all of them, and null only where nothing was stated."""
    return attrs.make_class(
        "Stated",
        {
            field.name: attrs.field(type=_answered(field), metadata=field.metadata)
            for field in attrs.fields(NewJob)
            if field.name not in but
        },
        frozen=True,
    )


def _answered(field: "attrs.Attribute[Any]") -> Any:
    # Without a run_at a job runs from its creation on.
    return get_args(field.type)[0] if field.name == "run_at" else field.type


@attrs.frozen
class JobFacts(_stated("input")):  # type: ignore[misc]
    """A job without its payloads."""

    id: Uuid
    status: Status
    attempt: Total
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    worker_id: WorkerId | None
    lease_expires_at: Moment | None
    progress: ProgressText | None
    usage: UsageText | None
    error: JobError | None
    errors: list[AttemptError]


@attrs.frozen
class Job(JobFacts):
    """A job with its result, and with its input where it was asked for."""

    result: RawJson
    input: RawJson = ABSENT


@attrs.frozen
class CreatedJob:
    """What a batch made of one of its jobs."""

    id: Uuid
    status: Status
    created: Flag


@attrs.frozen
class Batch:
    """What a batch made of its jobs, in their order."""

    jobs: list[CreatedJob]
    created: Total
    existing: Total


@attrs.frozen
class ClaimedJob(_stated("idempotency_key")):  # type: ignore[misc]
    """A job that a claim holds, with what its worker needs."""

    id: Uuid
    claim_id: Uuid
    attempt: Total
    created_at: Moment
    lease_expires_at: Moment
    lease_seconds: Duration


@attrs.frozen
class Claim:
    """The jobs that were handed out; none is an answer too."""

    claim_id: Uuid
    jobs: list[ClaimedJob]


@attrs.frozen
class Lease:
    """How long the claim now holds the job."""

    lease_expires_at: Moment
    lease_seconds: Duration


@attrs.frozen
class JobsFound:
    """Jobs in the order of the ids asked for, null where there is none."""

    jobs: list[JobFacts | None]


@attrs.frozen
class Page:
    """Jobs, newest first."""

    jobs: list[JobFacts]
    next_cursor: Uuid | None


@attrs.frozen
class FieldError:
    """What is wrong with one field."""

    path: Text
    message: Message


@attrs.frozen
class ItemAnswer:
    """The answer to one item of a bulk call: a status of its own, and with a refusal what a problem says."""

    id: Text | None
    status: HttpStatus
    lease_expires_at: Moment = ABSENT
    lease_seconds: Duration = ABSENT
    code: Category = ABSENT
    detail: Message = ABSENT
    errors: list[FieldError] = ABSENT


@attrs.frozen
class ItemAnswers:
    """The answers to the items, in their order."""

    jobs: list[ItemAnswer]


@attrs.frozen
class Retried:
    """How many jobs were put back, and whether more fit the filter."""

    retried: Total
    more: Flag
    matched: Total = ABSENT


@attrs.frozen
class PauseRule:
    """Pending jobs that fit all of these are not handed out; null is any."""

    owner_service: Name | None
    task_type: Name | None
    model_profile: Name | None
    paused_at: Moment


@attrs.frozen
class Paused:
    """The rules now in force."""

    paused: list[PauseRule]


@attrs.frozen
class JobCounts:
    """Pending, scheduled and running are now; the others are endings within the window."""

    pending: Total
    scheduled: Total
    running: Total
    completed: Total
    failed: Total
    cancelled: Total


@attrs.frozen
class ErrorCount:
    """How often a category came up within the window."""

    category: Category
    count: Total
    last_at: Moment


@attrs.frozen
class Percentiles:
    """Seconds of the last hour, exact to a tenth; null where nothing happened."""

    p50: Duration | None
    p95: Duration | None


@attrs.frozen
class GroupCounts(JobCounts):
    """The counters of one model profile, task type or owner."""

    oldest_pending_seconds: Duration | None
    paused: Flag
    last_claimed_at: Moment | None
    waiting_seconds: Percentiles
    running_seconds: Percentiles


@attrs.frozen(kw_only=True)
class ProfileCounts(GroupCounts):
    model_profile: Name


@attrs.frozen(kw_only=True)
class TypeCounts(GroupCounts):
    task_type: Name


@attrs.frozen(kw_only=True)
class OwnerCounts(GroupCounts):
    owner_service: Name


@attrs.frozen
class UsageSum:
    """What an owner's jobs of one profile used within the window; null where nothing of the kind was reported."""

    owner_service: Name
    model_profile: Name
    prompt_tokens: Total | None
    completion_tokens: Total | None
    total_tokens: Total | None
    audio_seconds: Duration | None


@attrs.frozen
class Stats:
    """Counters, at most five seconds old."""

    window_seconds: Window
    jobs: JobCounts
    errors: list[ErrorCount]
    attempt_errors: list[ErrorCount]
    oldest_pending_seconds: Duration | None
    by_model_profile: list[ProfileCounts]
    by_task_type: list[TypeCounts]
    by_owner_service: list[OwnerCounts]
    usage: list[UsageSum]


@attrs.frozen(kw_only=True)
class Worker(WorkerReport):
    """A worker that was seen within the last five minutes, and what it reported of itself."""

    worker_id: WorkerId
    seen_at: Moment


@attrs.frozen
class Workers:
    """Latest first."""

    workers: list[Worker]


@attrs.frozen
class ProviderHealth:
    """What a provider's model service says of itself."""

    name: Message
    status: Annotated[str, one_of("ok", "degraded", "unavailable", "not_configured")]
    model_profiles: list[Name]
    checked_at: Moment
    models: list[Message] = ABSENT
    endpoint: Message = ABSENT
    latency_ms: Duration = ABSENT
    detail: Message = ABSENT


@attrs.frozen
class ProvidersStatus:
    """The providers that the service is configured with, and the workers with theirs."""

    providers: list[ProviderHealth]
    workers: list[Worker]


@attrs.frozen
class Health:
    """The process lives."""

    status: Annotated[str, one_of("ok")]
    version: Message


@attrs.frozen
class Readiness:
    """Requests can be served."""

    status: Annotated[str, one_of("ready")]
    version: Message
    schema_version: Total
    access: Annotated[str, one_of("open", "tokens")]


@attrs.frozen
class Problem:
    """A refusal, as RFC 9457 describes it."""

    type: Message
    title: Message
    status: HttpStatus
    detail: Message
    code: Category
    retryable: Flag
    errors: list[FieldError] = ABSENT


# ── Operations ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


Request = Body[Any] | BatchBody | BulkBody


def _as_request(kind: Any) -> Request | None:
    return Body(kind) if isinstance(kind, type) and attrs.has(kind) else kind


@attrs.frozen(kw_only=True)
class Operation:
    """One method of one route.

    `request` is what its body must be, a class for a single object. `answers` has a type of answer for each status, None for an empty
    one, or the media type of a text. `refusals` are those of its own: what any operation may refuse is added. `roles` may call it;
    without any it is public. Calls of an `audited` one by operators are logged. One that `requeues` may make jobs ready.
    `responder` is the name of the method that answers.
    """

    name: str
    group: str
    summary: str
    about: str = ""
    answers: Mapping[int, type[Any] | str | None]
    request: Request | None = attrs.field(default=None, converter=_as_request)
    query: type[Any] = Nothing
    refusals: tuple[type[Refusal], ...] = ()
    roles: tuple[Role, ...] = ()
    audited: bool = False
    requeues: bool = False
    responder: str = attrs.field(default=attrs.Factory(lambda self: self.name, takes_self=True))


JOBS, WORK, OPERATION, HEALTH, DOCUMENTS = "Jobs", "Work", "Operation", "Health", "Documents"
_CALLERS: tuple[Role, ...] = (CALLER, OPERATOR)
_WORKERS: tuple[Role, ...] = (WORKER, OPERATOR)
_MONITORS: tuple[Role, ...] = (MONITOR, OPERATOR)
_OPERATORS: tuple[Role, ...] = (OPERATOR,)
_HELD = (ClaimLost, JobCancelled)
_JOBS = "/api/v1/jobs"


Table = dict[tuple[str, str], Operation]


def _verb(
    kind: type[Any], name: str, summary: str, about: str, *, answer: type[Any] = Job, beside: type[Any] = Nothing, requeues: bool = False
) -> Table:
    """A claim's verb, for one job and for many."""
    common = functools.partial(Operation, group=WORK, roles=_WORKERS, audited=True, requeues=requeues)
    one = common(name=name, summary=summary, about=about, request=kind, answers={200: answer}, refusals=_HELD)
    many = common(
        name=f"{name}_many",
        summary=f"{summary}: up to {MAX_ITEMS:,} jobs",
        about="Each item by itself: the answer has a status for each, and an invalid item does not affect the others.",
        request=BulkBody(kind, beside),
        answers={200: ItemAnswers},
    )
    return {("POST", f"{_JOBS}/{{job_id}}/{name}"): one, ("POST", f"{_JOBS}/{name}"): many}


def _probe(path: str, name: str, summary: str, answer: type[Any]) -> Table:
    get = Operation(name=name, group=HEALTH, summary=summary, answers={200: answer})
    asked = {"HEAD": attrs.evolve(get, answers={200: None}), "OPTIONS": get}
    beside = {
        method: attrs.evolve(each, name=f"{name}_{method.lower()}", summary=f"The same by {method}") for method, each in asked.items()
    }
    return {(method, path): operation for method, operation in {"GET": get, **beside}.items()}


OPERATIONS: Table = {
    ("POST", _JOBS): Operation(
        name="create",
        roles=_CALLERS,
        audited=True,
        group=JOBS,
        summary="Create a job",
        about="With an `idempotency_key` that exists the answer is the job it stands for, and 200.",
        request=NewJob,
        answers={201: Job, 200: Job},
        refusals=(IdempotencyKeyReused, TooManyCombinations),
    ),
    ("POST", f"{_JOBS}/batch"): Operation(
        name="create_many",
        roles=_CALLERS,
        audited=True,
        group=JOBS,
        summary=f"Create up to {MAX_BATCH:,} jobs, all or none",
        about="What the jobs have in common may stand in `defaults`; a field that is present in a job wins, null too. 200 if none is new.",
        request=BatchBody(),
        answers={201: Batch, 200: Batch},
        refusals=(IdempotencyKeyReused, TooManyCombinations),
    ),
    ("GET", _JOBS): Operation(
        name="list",
        roles=_CALLERS,
        group=JOBS,
        summary="List jobs, newest first",
        about="A parameter that is repeated means either; different ones must all hold. No payloads.",
        query=Listing,
        answers={200: Page},
    ),
    ("GET", f"{_JOBS}/{{job_id}}"): Operation(
        name="get",
        roles=_CALLERS,
        group=JOBS,
        summary="Read a job and its result",
        about="With `wait_seconds` it answers when the job has finished, or earlier.",
        query=JobQuery,
        answers={200: Job},
    ),
    ("POST", f"{_JOBS}/get"): Operation(
        name="get_many",
        roles=_CALLERS,
        group=JOBS,
        summary="Read many jobs, without payloads",
        request=JobIds,
        answers={200: JobsFound},
    ),
    ("POST", f"{_JOBS}/{{job_id}}/retry"): Operation(
        name="retry",
        roles=_CALLERS,
        audited=True,
        requeues=True,
        group=JOBS,
        summary="Put a job back to pending",
        about="Attempt 0, run now; its `errors` stay. A job that is pending already stays as it is.",
        request=Retry,
        answers={200: Job},
        refusals=(InvalidState,),
    ),
    ("POST", f"{_JOBS}/{{job_id}}/cancel"): Operation(
        name="cancel",
        roles=_CALLERS,
        audited=True,
        group=JOBS,
        summary="Cancel a pending or running job",
        about="At once: its worker's next call is refused with `job_cancelled`.",
        request=Cancellation,
        answers={200: Job},
        refusals=(InvalidState,),
    ),
    ("DELETE", f"{_JOBS}/{{job_id}}"): Operation(
        name="delete",
        roles=_CALLERS,
        audited=True,
        group=JOBS,
        summary="Erase a finished job and its payloads",
        answers={204: None},
        refusals=(InvalidState,),
    ),
    ("POST", f"{_JOBS}/retry"): Operation(
        name="retry_many",
        roles=_CALLERS,
        audited=True,
        requeues=True,
        group=JOBS,
        summary="Retry failed and cancelled jobs that fit a filter",
        about="With `dry_run` none is retried, and `matched` tells how many fit, whatever the `limit`.",
        request=BulkRetry,
        answers={200: Retried},
    ),
    ("POST", f"{_JOBS}/claim"): Operation(
        name="claim",
        roles=_WORKERS,
        audited=True,
        group=WORK,
        summary="Claim pending jobs",
        about="Answers as soon as there is one, and with fewer than `limit` where there are fewer. "
        "Repeated with the same `claim_id` and `worker_id`: the jobs it still holds, and no others.",
        request=ClaimRequest,
        answers={200: Claim},
        refusals=(ClaimIdReused,),
    ),
    **_verb(
        Heartbeat, "heartbeat", "Extend the lease", "From now. Progress is kept where none is given.", answer=Lease, beside=BulkHeartbeat
    ),
    **_verb(
        Completion,
        "complete",
        "Report a result",
        "Accepted after the lease ran out too, while nobody has claimed the job since.",
    ),
    **_verb(
        Failure,
        "fail",
        "Report a failure",
        "A retryable one goes back to pending while attempts are left, after its delay.",
        requeues=True,
    ),
    **_verb(
        Release,
        "release",
        "Give a job back",
        "The attempt is not counted. The 101st time the job fails.",
        requeues=True,
    ),
    ("GET", "/api/v1/stats"): Operation(
        name="stats",
        roles=(*_CALLERS, MONITOR),
        group=OPERATION,
        summary="Counters, durations, errors and usage",
        query=StatsQuery,
        answers={200: Stats},
    ),
    ("GET", "/api/v1/workers"): Operation(
        name="workers",
        roles=_MONITORS,
        group=OPERATION,
        summary="Workers of the last five minutes",
        answers={200: Workers},
    ),
    ("GET", "/api/v1/providers/status"): Operation(
        name="providers_status",
        roles=_MONITORS,
        group=OPERATION,
        summary="Check the configured providers",
        answers={200: ProvidersStatus},
    ),
    ("GET", "/api/v1/pause"): Operation(
        name="pauses",
        roles=_MONITORS,
        group=OPERATION,
        summary="What is paused",
        answers={200: Paused},
    ),
    ("POST", "/api/v1/pause"): Operation(
        name="pause",
        roles=_OPERATORS,
        audited=True,
        requeues=True,
        group=OPERATION,
        summary="Stop handing out jobs",
        about="Every combination of what is named; a part that is not named is any, and at least one must be.",
        request=PauseRequest,
        answers={200: Paused},
    ),
    ("POST", "/api/v1/resume"): Operation(
        name="resume",
        roles=_OPERATORS,
        audited=True,
        requeues=True,
        group=OPERATION,
        summary="Go on handing out jobs",
        about="Lifts every rule that lies within what is named.",
        request=PauseRequest,
        answers={200: Paused},
    ),
    **_probe("/healthz", "health", "Whether the process lives", Health),
    **_probe("/readyz", "readiness", "Whether requests can be served", Readiness),
    ("GET", "/metrics"): Operation(
        name="metrics",
        roles=_MONITORS,
        group=OPERATION,
        summary="Figures for Prometheus",
        answers={200: "text/plain"},
    ),
    ("GET", "/"): Operation(
        name="page",
        group=DOCUMENTS,
        summary="The operator's page",
        answers={200: "text/html"},
    ),
    ("GET", "/openapi.json"): Operation(
        name="openapi",
        group=DOCUMENTS,
        summary="The OpenAPI document of this interface",
        answers={200: "application/json"},
    ),
    ("GET", "/docs"): Operation(
        name="docs",
        group=DOCUMENTS,
        summary="A page that shows the OpenAPI document",
        answers={200: "text/html"},
    ),
}

PROBES = tuple({path: None for (_, path), operation in OPERATIONS.items() if operation.group == HEALTH})
