"""The provider contract: what a model service's code promises, and how the installed providers are found.

A provider is the code that talks to one model service. It is a class with four members; a worker calls `run`, worker and service
call `check`. It never sees the queue, a lease or an HTTP request of this service. The smallest one:

    class Echo:
        name = "echo"
        model_profiles = ("echo",)
        settings = EchoSettings

        def __init__(self, environ: Mapping[str, str]) -> None:
            self._settings = provider_settings(EchoSettings, environ)

        def check(self) -> Health:
            return Health("ok")

        def run(self, job: Job) -> Result:
            return Result({"content": job.input})

It becomes one by an entry point of its package; the built-in providers use the same:

    [project.entry-points."ai_service.providers"]
    echo = "my_package:Echo"

The entry point names a class, or any callable, that takes the environment and returns the provider. It raises `NotConfigured` when its
settings are absent and `SettingsError` when they are wrong. Importing it, making it and `check()` import no heavy package.

Its settings are declared as an attrs class of fields made by `setting(...)` (see `providers.settings`), and named in the attribute
`settings` of what the entry point names. That is all it takes to have them read, their problems told at once, listed by
`ai-service check`, and their secrets taken out of every text that leaves. A provider without settings leaves the attribute out.

A run ends in one of five ways:

    return Result(value, usage)     the job is completed
    raise NotNow(category, ...)     this attempt failed, a later one may succeed
    raise Never(category, ...)      no attempt will ever succeed, whoever makes it: the job fails
    raise Unsupported(...)          this provider cannot do this job, another one of its profile may; if there is none, the job fails
    anything else raised            this attempt failed with the category `internal`; a later one may succeed

A run is called from several threads of the worker at once, on the one provider object of the process, and so is `check()`.

`providers.conformance` holds the tests that every provider must pass, to be inherited by its own. `providers.exchange` is an HTTP request
that can be called off, as `cancelled` and `deadline` ask for; the built-in providers use it.

Sections: outcomes, job and health, the protocol, discovery, checks.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol

import attrs

from providers.settings import (
    NotConfigured,
    SettingsError,
    declared,
    is_profile_name,
    parse_duration,
    provider_settings,
    redact,
    secrets_in,
    setting,
    shown_settings,
)

__all__ = [
    "CANCELLED",
    "CATEGORIES",
    "CHECK_LIMIT_SECONDS",
    "CONTEXT_LENGTH_EXCEEDED",
    "GROUP",
    "INTERNAL",
    "INVALID_INPUT",
    "INVALID_OUTPUT",
    "MAX_MESSAGE_CHARACTERS",
    "MAX_NOTE_BYTES",
    "RATE_LIMITED",
    "TIMEOUT",
    "TRUNCATED",
    "UNAUTHORIZED",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "Checks",
    "Health",
    "InstalledProvider",
    "Job",
    "Never",
    "NotCompleted",
    "NotConfigured",
    "NotNow",
    "Provider",
    "Result",
    "SettingsError",
    "Unsupported",
    "by_profile",
    "check_all",
    "discover",
    "parse_duration",
    "provider_settings",
    "redact",
    "secrets_in",
    "setting",
]

log = logging.getLogger("ai_service.providers")

GROUP = "ai_service.providers"
"""The entry-point group under which providers are found."""

# ---------------------------------------------------------------- outcomes

TIMEOUT = "timeout"
"""No complete answer within the time allowed."""
RATE_LIMITED = "rate_limited"
"""The model service asked for fewer requests."""
UNAVAILABLE = "unavailable"
"""The model service cannot be reached, does not take requests now, or broke off."""
UNAUTHORIZED = "unauthorized"
"""The model service refuses the key it was given."""
INVALID_INPUT = "invalid_input"
"""The job's input cannot be processed, by this attempt or any other."""
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""The job's input, or the answer it asks for, is longer than the model can hold."""
TRUNCATED = "truncated"
"""The answer was cut off at a length limit and is of no use."""
INVALID_OUTPUT = "invalid_output"
"""The model answered, but not in the form that was asked for."""
UNSUPPORTED = "unsupported"
"""The job asks for something that no provider of its profile can do."""
CANCELLED = "cancelled"
"""The job was cancelled, or its worker gave it up, while it ran."""
INTERNAL = "internal"
"""The model service or the provider itself failed in a way that has no better name."""

CATEGORIES = frozenset(
    {
        TIMEOUT,
        RATE_LIMITED,
        UNAVAILABLE,
        UNAUTHORIZED,
        INVALID_INPUT,
        CONTEXT_LENGTH_EXCEEDED,
        TRUNCATED,
        INVALID_OUTPUT,
        UNSUPPORTED,
        CANCELLED,
        INTERNAL,
    }
)
"""The categories with a fixed meaning. A provider may use its own as well: lower case, digits and `_`, at most 64 characters."""

MAX_NOTE_BYTES = 4_096
"""How long the JSON of usage or progress may be, in UTF-8. The service refuses more."""
MAX_MESSAGE_CHARACTERS = 4_000
"""Where the service cuts the message of a failure."""
CHECK_LIMIT_SECONDS = 3.0
"""How long a check may take. A provider that has not answered by then counts as unavailable."""

_CATEGORY = re.compile(r"[a-z][a-z0-9_]{0,63}")


class NotCompleted(Exception):
    """A run that ended without a result. Raise `NotNow` or `Never`; catch this to meet both.

    `category` is one of `CATEGORIES` or a name of the provider's own; `message` is a sentence for the caller and the operator, without
    secrets and payloads; `usage` is what the attempt consumed, as in `Result`, or None if that is unknown.
    """

    def __init__(self, category: str, message: str, *, usage: Mapping[str, Any] | None = None) -> None:
        if not _CATEGORY.fullmatch(category):
            raise ValueError(f"a category is lower case letters, digits and _, at most 64 of them: {category!r}")
        super().__init__(f"{category}: {message}")
        self.category = category
        # An exception in its place is a natural slip.
        self.message = str(message)
        self.usage = usage


class NotNow(NotCompleted):
    """This attempt failed, a later one may succeed.

    `retry_in_seconds` is the delay the model service asked for; None if it named none, and then the queue's own back-off applies.
    `burns_attempt` is False when the model service did no work for this job (it was away, full, or refused the key): the job goes back
    unharmed, its attempt not counted. Leave it True once the request may have been worked on, or a job that kills its server never ends.
    """

    def __init__(
        self,
        category: str,
        message: str,
        *,
        retry_in_seconds: float | None = None,
        burns_attempt: bool = True,
        usage: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(category, message, usage=usage)
        self.retry_in_seconds = None if retry_in_seconds is None else float(retry_in_seconds)
        self.burns_attempt = burns_attempt


class Never(NotCompleted):
    """No attempt will succeed with this input: the job fails now, whatever attempts it has left."""


class Unsupported(NotCompleted):
    """This provider cannot do what the job asks for, and has done nothing; another one of the profile may. The job fails if none can."""

    def __init__(self, message: str) -> None:
        super().__init__(UNSUPPORTED, message)


# ---------------------------------------------------------------- job and health


def _ignore_progress(_progress: Mapping[str, Any]) -> None:
    """The report of a job nobody watches."""


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """One attempt at a job, as a provider sees it. Its input does not show in `repr`."""

    id: str
    """The job's UUID."""
    owner_service: str
    """Who asked, for example `telephony`."""
    owner_ref: str
    """The caller's own reference."""
    task_type: str
    """The technical class of task, for example `call_analysis`."""
    model_profile: str
    """The profile asked for: one of the provider's `model_profiles`."""
    input: Any = attrs.field(repr=False)
    """The decoded JSON of the caller."""
    attempt: int = 1
    """Which attempt this is, from 1."""
    max_attempts: int = 1
    """How many attempts the job may use."""
    traceparent: str | None = None
    """W3C trace context of this attempt, a span of its own in the caller's trace; None without one.

    Send it to the model service as the header `traceparent` as it is: the spans there then belong to this attempt.
    """
    deadline: float | None = None
    """When the run must have ended, on `time.monotonic()`'s clock; None = only the provider's own limit."""
    cancelled: threading.Event = attrs.field(factory=threading.Event, repr=False)
    """Set when the result is no longer wanted. A provider stops soon after (a second is good) and raises `NotNow(CANCELLED, ...)`."""
    report_progress: Callable[[Mapping[str, Any]], None] = attrs.field(default=_ignore_progress, repr=False)
    """Call it with a JSON object of up to MAX_NOTE_BYTES to show how far the job is.

    It is cheap and may be called often; only the latest report is kept.
    """

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed, None when there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def seconds_allowed(self, limit_seconds: float) -> float:
        """How long a run may take that has a limit of its own. Raises `NotNow` when it is too late to begin; the attempt is not burnt."""
        left = self.seconds_left()
        if self.cancelled.is_set():
            raise NotNow(CANCELLED, "the job was cancelled before it ran", burns_attempt=False)
        if left == 0:
            raise NotNow(TIMEOUT, "the job's deadline had passed before it ran", burns_attempt=False)
        return limit_seconds if left is None else min(limit_seconds, left)


@attrs.frozen
class Result:
    """What a completed job returns: `value` is any JSON, `usage` a small JSON object (up to MAX_NOTE_BYTES) or None.

    Usual names in `usage`: `prompt_tokens`, `completion_tokens`, `total_tokens`, `audio_seconds`, `model`. Leave out what is not known:
    absent is not zero.
    """

    value: Any = attrs.field(repr=False)
    usage: Mapping[str, Any] | None = None


Status = Literal["ok", "degraded", "unavailable", "not_configured"]


def _names(names: Iterable[object]) -> tuple[str, ...]:
    return tuple(map(str, names))


@attrs.frozen
class Health:
    """How a provider's model service is doing.

    `ok`: it would take a job. `degraded`: it answers, but something needs a look. `unavailable`: it would not take a job.
    `not_configured`: nothing is set for it. `detail` says why in a sentence; `endpoint` is the address without user info;
    `latency_ms` is how long the look took, in milliseconds.
    """

    status: Status = attrs.field(validator=attrs.validators.in_(("ok", "degraded", "unavailable", "not_configured")))
    detail: str | None = attrs.field(default=None, converter=attrs.converters.optional(str))
    models: tuple[str, ...] = attrs.field(default=(), converter=_names)
    endpoint: str | None = attrs.field(default=None, converter=attrs.converters.optional(str))
    latency_ms: float | None = attrs.field(default=None, converter=attrs.converters.optional(float))


# ---------------------------------------------------------------- the protocol


class Provider(Protocol):
    """The code that talks to one model service. One object serves the whole process: both methods may run in several threads at once."""

    @property
    def name(self) -> str:
        """How it is called in status, logs and messages: the name of its entry point."""

    @property
    def model_profiles(self) -> tuple[str, ...]:
        """The profiles it serves: jobs of these are claimed for it."""

    def check(self) -> Health:
        """Take a quick look at the model service, within CHECK_LIMIT_SECONDS. Raises nothing: trouble is a `Health` too."""

    def run(self, job: Job) -> Result:
        """Do the job and return its result, within the job's deadline; raise `NotNow` or `Never` if there is none."""


# ---------------------------------------------------------------- discovery


@attrs.frozen(kw_only=True)
class InstalledProvider:
    """One installed provider: made, or the reason why it could not be."""

    name: str
    origin: str
    """Where it comes from: the entry point's `module:object`."""
    provider: Provider | None = attrs.field(default=None, repr=False)
    health: Health | None = None
    """Set when there is no provider: `not_configured`, or `unavailable` with the reason."""
    problems: tuple[str, ...] = ()
    """The wrong settings, a sentence each. A process that runs jobs refuses to start on them."""
    secrets: tuple[str, ...] = attrs.field(default=(), repr=False)
    """Secret values that never leave in a detail or an endpoint."""
    settings: Mapping[str, str] = attrs.field(factory=dict)
    """What its declared settings stand at, for an operator to read: secrets only as `(set)`."""

    @property
    def model_profiles(self) -> tuple[str, ...]:
        """The profiles it serves, none when it could not be made."""
        return () if self.provider is None else tuple(self.provider.model_profiles)


def discover(environ: Mapping[str, str]) -> tuple[InstalledProvider, ...]:
    """Make every installed provider from the environment, in the order of their names. Raises nothing.

    One that has no settings, or cannot be imported or made, is listed with the reason in its `health`; the others go on.
    """
    entries = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    return tuple(_load_provider(entry, environ) for entry in entries)


def by_profile(
    installed: Sequence[InstalledProvider], order: Mapping[str, Sequence[str]] | None = None
) -> dict[str, tuple[InstalledProvider, ...]]:
    """The providers that run the jobs of each profile, the first choice first.

    `order` names providers for a profile: those and no others run it, in that order. A profile it leaves out must be served by one provider
    only. Raises `SettingsError` with all that contradicts this; a provider in the order that could not be made is passed over.
    """
    problems = _duplicate_names(installed)
    orders = order or {}
    served = dict.fromkeys(profile for one in installed for profile in one.model_profiles)
    routes = {profile: _in_order(profile, orders[profile], installed, problems) for profile in orders}
    routes |= {profile: _sole_provider(profile, installed, problems) for profile in served if profile not in orders}
    if problems:
        raise SettingsError(problems)
    return routes


def _duplicate_names(installed: Sequence[InstalledProvider]) -> list[str]:
    """Orders, circuits and reports go by name."""
    made = [one for one in installed if one.provider is not None]
    twice = {one.name: [other.origin for other in made if other.name == one.name] for one in made}
    return [f"{name} is the name of several providers, {', '.join(origins)}" for name, origins in twice.items() if len(origins) > 1]


def _in_order(
    profile: str, names: Sequence[str], installed: Sequence[InstalledProvider], problems: list[str]
) -> tuple[InstalledProvider, ...]:
    known = {one.name: one for one in installed}
    unknown = [name for name in names if name not in known]
    problems += [f"{profile} is to be served by {name}, which is not installed" for name in unknown]
    made = [known[name] for name in names if name in known and known[name].provider is not None]
    problems += [f"{profile} is to be served by {one.name}, which does not serve it" for one in made if profile not in one.model_profiles]
    if not made and not unknown:
        problems.append(f"{profile} is to be served by {', '.join(names)}: none of them is set up")
    return tuple(made)


def _sole_provider(profile: str, installed: Sequence[InstalledProvider], problems: list[str]) -> tuple[InstalledProvider, ...]:
    serving = tuple(one for one in installed if profile in one.model_profiles)
    if len(serving) > 1:
        names = " and ".join(f"{one.name} ({one.origin})" for one in serving)
        problems.append(
            f"{profile} is served by {names}: name their order, as in PROFILE_PROVIDERS={profile}={serving[0].name},{serving[1].name}"
        )
    return serving


def _load_provider(entry: EntryPoint, environ: Mapping[str, str]) -> InstalledProvider:
    """The provider of one entry point, or why there is none."""
    facts: dict[str, Any] = {"name": entry.name, "origin": entry.value}
    secrets = secrets_in(environ)
    try:
        maker = entry.load()
        if (kind := getattr(maker, "settings", None)) is not None:
            facts["settings"] = shown_settings(kind, environ)
            secrets = secrets_in(environ, declared(kind))
        provider: Provider = maker(environ)
        _check_protocol(provider)
    except NotConfigured as absent:
        return InstalledProvider(**facts, health=Health("not_configured", redact(str(absent), secrets)))
    except SettingsError as wrong:
        problems = tuple(redact(problem, secrets) for problem in wrong.problems)
        log.warning("provider_settings_refused name=%s problems=%s", entry.name, "; ".join(problems))
        return InstalledProvider(**facts, health=Health("unavailable", "; ".join(problems)), problems=problems)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- a stranger's code; whatever it does, the others go on
        reason = redact(f"{type(error).__name__}: {error}", secrets)
        log.warning("provider_skipped name=%s origin=%s reason=%s", entry.name, entry.value, reason)
        return InstalledProvider(**facts, health=Health("unavailable", reason))
    return InstalledProvider(**facts, provider=provider, secrets=secrets)


def _check_protocol(provider: object) -> None:
    missing = [member for member in ("name", "model_profiles", "check", "run") if not hasattr(provider, member)]
    if missing:
        raise TypeError(f"{type(provider).__name__} is no provider: it has no {', '.join(missing)}")
    profiles = getattr(provider, "model_profiles", None)
    if not isinstance(profiles, tuple) or not all(isinstance(profile, str) for profile in profiles):
        raise TypeError(f"{type(provider).__name__}.model_profiles must be a tuple of names")
    bad = [profile for profile in profiles if not is_profile_name(profile)]
    if bad:
        raise ValueError(f"{bad[0][:100]!r} cannot be a model profile: 1 to 100 letters, digits or . _ : / @ + -")


# ---------------------------------------------------------------- checks


class Checks:
    """Looks at the same providers again and again. One whose last check has not returned yet is not asked meanwhile."""

    def __init__(self, installed: Sequence[InstalledProvider]) -> None:
        self._checks = [_Check(one) for one in installed]

    def look(self, limit_seconds: float = CHECK_LIMIT_SECONDS) -> list[dict[str, Any]]:
        """How all of them are, looked at at once, in their order, after at most `limit_seconds`. Raises nothing. For one thread at a time.

        Each item has `name`, `status`, `model_profiles`, `checked_at` (RFC 3339, UTC) and, where known, `models`, `endpoint`, `latency_ms`
        and `detail`. A provider that has not answered in time is `unavailable`. Secrets and user info are taken out of every text.
        """
        until = time.monotonic() + limit_seconds
        self._checks = [check if check.is_alive() else check.restarted() for check in self._checks]
        for check in self._checks:
            check.join(max(0.0, until - time.monotonic()))
        late = Health("unavailable", f"did not answer within {limit_seconds:g} s")
        return [_describe_health(check.installed, late if check.is_alive() else check.health or late) for check in self._checks]


def check_all(installed: Sequence[InstalledProvider], limit_seconds: float = CHECK_LIMIT_SECONDS) -> list[dict[str, Any]]:
    """One look at all providers, as `Checks.look` does it."""
    return Checks(installed).look(limit_seconds)


class _Check(threading.Thread):
    """One provider's check. A daemon, so that one that never returns cannot hold up the process's end."""

    def __init__(self, installed: InstalledProvider) -> None:
        super().__init__(name=f"check-{installed.name}", daemon=True)
        self.installed = installed
        self.health = installed.health

    def restarted(self) -> "_Check":
        """Another look at the same provider, under way."""
        another = _Check(self.installed)
        another.start()
        return another

    def run(self) -> None:
        if self.installed.provider is not None:
            self.health = _run_check(self.installed.provider)


def _run_check(provider: Provider) -> Health:
    try:
        health = provider.check()
    except Exception as error:  # noqa: BLE001 -- a stranger's code; a check that breaks is a finding, not the end of the page
        return Health("unavailable", f"its check failed with {type(error).__name__}: {error}")
    return health if isinstance(health, Health) else Health("unavailable", f"its check returned {type(health).__name__}, not Health")


def _describe_health(installed: InstalledProvider, health: Health) -> dict[str, Any]:
    known = {
        "models": list(health.models) or None,
        "endpoint": redact(health.endpoint or "", installed.secrets) or None,
        "latency_ms": None if health.latency_ms is None else round(health.latency_ms, 1),
        "detail": redact(health.detail or "", installed.secrets) or None,
    }
    return {
        "name": installed.name,
        "status": health.status,
        "model_profiles": list(installed.model_profiles),
        **{name: value for name, value in known.items() if value is not None},
        "checked_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
