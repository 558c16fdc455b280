"""What the service answers, and what the fields of answers and requests mean.

The types are not read by anything that serves: a test holds the real answers to them. Sections: answers, words, examples.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import attrs

from ai_internal.server.requests import (
    Category,
    Check,
    Flag,
    Key,
    MaxAttempts,
    Message,
    Moment,
    Name,
    OwnerRef,
    Priority,
    ProgressText,
    RawJson,
    Status,
    Traceparent,
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


@attrs.frozen
class JobFacts:
    """A job without its payloads."""

    id: Uuid
    status: Status
    owner_service: Name
    owner_ref: OwnerRef
    task_type: Name
    model_profile: Name
    priority: Priority
    attempt: Total
    max_attempts: MaxAttempts
    created_at: Moment
    run_at: Moment
    expires_at: Moment | None
    started_at: Moment | None
    finished_at: Moment | None
    worker_id: WorkerId | None
    lease_expires_at: Moment | None
    idempotency_key: Key | None
    traceparent: Traceparent | None
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
class ClaimedJob:
    """A job that a claim holds, with what its worker needs."""

    id: Uuid
    owner_service: Name
    owner_ref: OwnerRef
    task_type: Name
    model_profile: Name
    priority: Priority
    claim_id: Uuid
    attempt: Total
    max_attempts: MaxAttempts
    created_at: Moment
    run_at: Moment
    expires_at: Moment | None
    lease_expires_at: Moment
    lease_seconds: Duration
    traceparent: Traceparent | None
    input: RawJson


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
    "delay_seconds": "How long the job is not handed out again; 0 by default.",
    "detail": "What is to be said of it, for people.",
    "endpoint": "Its address, without user info.",
    "dry_run": "Whether to tell how many fit, and to retry none; false by default.",
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
    "from": "Which statuses may be put back; all three by default. Send what you saw, so that a repeat cannot abort a new attempt.",
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
    "lease_seconds": "How long the lease is; 900 by default.",
    "Heartbeat.lease_seconds": "A new length; as before where absent.",
    "ClaimRequest.limit": "At most so many jobs; 1 by default.",
    "Listing.limit": "At most so many jobs; 50 by default.",
    "BulkRetry.limit": "At most so many jobs; 1,000 by default.",
    "matched": "How many jobs fit, whatever the limit; only with `dry_run`.",
    "max_attempts": "How many attempts may fail; 3 by default.",
    "message": "What went wrong, for people. Of more than 4,000 characters the first are kept.",
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
    "priority": "Higher first; 0 by default.",
    "progress": "What the worker told last of a running job, at most 4,096 bytes.",
    "prompt_tokens": "Tokens that the model read.",
    "providers": "Its providers.",
    "ProvidersStatus.providers": "The providers that the service is configured with.",
    "reason": "Why, for people.",
    "result": "What came of it: any JSON, which the service never looks into.",
    "retried": "How many jobs were put back.",
    "retry_in_seconds": "When to try again; min(3600, 10·2^(attempt−1)) ± 20 % where absent.",
    "retryable": "Whether a repeat may succeed.",
    "Failure.retryable": "Whether another attempt may succeed; false by default.",
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
    "usage": "What the attempt used, at most 4,096 bytes; other members are kept as they are. Absent is not zero.",
    "Stats.usage": "What was used within the window.",
    "version": "The release.",
    "wait_seconds": "How long to wait for something to answer with; 0 by default, and an upper bound.",
    "waiting_seconds": "How long jobs waited from when they were ready to their claim.",
    "window_seconds": "How far back it counts: an hour, a day (by default) or a week.",
    "worker": "What the worker says of itself, at most 8,192 bytes.",
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
    name: _FACTS[name] for name in ("id", *_LANE, "owner_ref", "priority", "max_attempts", "created_at", "run_at", "expires_at")
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
        "window_seconds": 86_400,
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
    "Readiness": {"status": "ready", "version": "0.1.0", "schema_version": 6, "access": "tokens"},
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
