"""The providers of one worker at work: which of them gets a job, and a circuit for each that keeps jobs away from a service in trouble.

    closed ──refused, or three outages in a row──► open ──its time is over, or its check is good again──► half_open
       ▲                                             ▲                                                        │
       └──────────── the trial job was worked on ────┼────────────────────────────────────────────────────────┤
                                                     └──────── the trial job met the outage again ◄───────────┘

A job goes to the first provider of its profile whose circuit lets it through. One that refuses it without having done any work
(`NotNow(..., burns_attempt=False)`, `Unsupported`) is followed by the next one, within the same attempt. Profiles that no circuit lets
through are not claimed for: their jobs stay pending and lose nothing.

What opens a circuit: a refusal, at once, for as long as the service asked, else for 2 s, because asking again would only cost jobs their
releases; and three outages in a row that did cost an attempt (a connection that broke, a time-out, a failure inside the service), where
one may be the job's own fault. Each further opening lasts twice as long, up to five minutes. Half open, one job at a time is let through.

Sections: circuit, fleet.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from providers import (
    CONTEXT_LENGTH_EXCEEDED,
    INTERNAL,
    INVALID_OUTPUT,
    RATE_LIMITED,
    TIMEOUT,
    TRUNCATED,
    UNAUTHORIZED,
    UNAVAILABLE,
    Checks,
    InstalledProvider,
    NotCompleted,
    NotNow,
    Result,
    redact,
)

log = logging.getLogger("ai_service.providers")

OUTAGES = frozenset({UNAVAILABLE, TIMEOUT, RATE_LIMITED, UNAUTHORIZED, INTERNAL})
"""Categories that speak of the model service rather than of the job."""
WORKED_ON = frozenset({TRUNCATED, INVALID_OUTPUT, CONTEXT_LENGTH_EXCEEDED})
"""Categories that only a model service which works can give. The others say nothing: a bad input may never have reached it."""
OUTAGES_TO_OPEN = 3
FIRST_OPEN_SECONDS = 2.0
MAX_OPEN_SECONDS = 300.0
MAX_REQUESTED_SECONDS = 600.0
"""The longest rest that a service may ask for."""
DOWN_SECONDS = 600.0
"""How long a bad check alone keeps a circuit open; doubled by each trial that proves it right, since each costs a job one of its hundred
releases, up to an hour: a check can be wrong."""
MAX_DOWN_SECONDS = 3600.0
CHECK_INTERVAL_SECONDS = 30.0
OPEN_CHECK_INTERVAL_SECONDS = 5.0
UNSUPPORTED_SECONDS = 60.0
"""How long a job waits that only a provider with an open circuit might do."""

State = Literal["closed", "open", "half_open"]


# ---------------------------------------------------------------- circuit


@attrs.define(eq=False)
class Circuit:
    """Whether one provider is given jobs. Not for several threads at once: the fleet has the lock."""

    name: str
    _clock: Callable[[], float] = time.monotonic
    reason: str | None = attrs.field(default=None, init=False)
    """What opened it; None when it is closed."""
    _open_until: float = attrs.field(default=0.0, init=False)
    _openings: int = attrs.field(default=0, init=False)
    _outages: int = attrs.field(default=0, init=False)
    _on_trial: bool = attrs.field(default=False, init=False)
    _is_delay_requested: bool = attrs.field(default=False, init=False)
    _is_down: bool = attrs.field(default=False, init=False)
    _failed_trials: int = attrs.field(default=0, init=False)
    _down_until: float = attrs.field(default=0.0, init=False)

    def state(self) -> State:
        """Closed: all jobs; open: none; half open: one, to see."""
        if self.reason is None:
            return "closed"
        return "open" if self.seconds_left() > 0 else "half_open"

    def seconds_left(self) -> float:
        """How long it will be open still, as far as is known now."""
        now = self._clock()
        until = max(self._open_until, self._down_until) if self._is_down else self._open_until
        return max(0.0, until - now) if self.reason is not None else 0.0

    def allows_job(self) -> bool:
        """Whether a job may go to the provider now."""
        return self.state() == "closed" or (self.state() == "half_open" and not self._on_trial)

    def start_job(self) -> bool:
        """Let a job through; whether it is the trial."""
        self._on_trial = self.state() == "half_open"
        return self._on_trial

    def record_check(self, *, is_down: bool) -> None:
        """What the provider's check says. It opens nothing by itself: a busy service may have no time for it."""
        recovered = self._is_down and not is_down
        self._is_down = is_down
        if recovered and not self._is_delay_requested:
            self._open_until = 0.0

    def record_outcome(self, outcome: Result | NotCompleted, *, was_trial: bool) -> None:
        """How a job ended that it had let through."""
        if was_trial:
            self._on_trial = False
        if isinstance(outcome, NotNow) and outcome.category in OUTAGES and (outcome.burns_attempt or outcome.category != TIMEOUT):
            # A time-out that did no work is the end of the job's own time.
            self._record_outage(outcome, was_trial=was_trial)
        elif isinstance(outcome, Result) or outcome.category in WORKED_ON:
            self._record_work(was_trial=was_trial)

    def _record_outage(self, outage: NotNow, *, was_trial: bool) -> None:
        self._outages += 1
        if outage.burns_attempt and not was_trial and self._outages < OUTAGES_TO_OPEN:
            return
        if self.reason is not None and not was_trial and outage.retry_in_seconds is None:
            # Jobs that ran side by side met the same outage: it counts once.
            return
        self._open(outage, was_trial=was_trial)

    def _open(self, outage: NotNow, *, was_trial: bool) -> None:
        if self.reason is None or was_trial:
            self._openings += 1
        requested = outage.retry_in_seconds
        # Jitter, so that the workers of one service do not all come back at once.
        backoff = min(MAX_OPEN_SECONDS, FIRST_OPEN_SECONDS * 2.0 ** min(self._openings - 1, 30)) * random.uniform(0.75, 1.0)
        seconds = backoff if requested is None else min(max(requested, 0.0), MAX_REQUESTED_SECONDS)
        self._is_delay_requested, self._open_until = requested is not None, self._clock() + seconds
        self._failed_trials = self._failed_trials + 1 if was_trial and self._is_down else 0
        self._down_until = self._clock() + min(MAX_DOWN_SECONDS, DOWN_SECONDS * 2.0 ** min(self._failed_trials, 10))
        self.reason = f"{outage.category}: {outage.message}"
        log.warning("circuit_opened provider=%s category=%s seconds=%.1f openings=%d", self.name, outage.category, seconds, self._openings)

    def _record_work(self, *, was_trial: bool) -> None:
        self._outages = 0
        if self._is_delay_requested and self.state() == "open" and not was_trial:
            # Begun before the service asked for a rest, so it says nothing about that.
            return
        if self.reason is not None:
            log.info("circuit_closed provider=%s openings=%d", self.name, self._openings)
        self.reason, self._openings, self._down_until = None, 0, 0.0


# ---------------------------------------------------------------- fleet


@attrs.frozen
class Turn:
    """One provider's turn at a job; `end` it with what came of it."""

    installed: InstalledProvider
    _fleet: "Fleet"
    _was_trial: bool

    def end(self, outcome: Result | NotCompleted) -> None:
        """Tell the circuit."""
        self._fleet.record_outcome(self.installed.name, outcome, was_trial=self._was_trial)


class Fleet:
    """The providers of this worker, how they are, and which of them may be given jobs. Safe to use from several threads at once."""

    def __init__(self, routes: Mapping[str, Sequence[InstalledProvider]], clock: Callable[[], float] = time.monotonic) -> None:
        """`routes` are the providers of each profile, the first choice first, as `by_profile` gives them."""
        self._routes = routes
        self._installed = list({one.name: one for route in routes.values() for one in route}.values())
        self._circuits = {one.name: Circuit(one.name, clock) for one in self._installed}
        self._checks = Checks(self._installed)
        self._health: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    @property
    def model_profiles(self) -> tuple[str, ...]:
        """All the profiles that this worker can serve."""
        return tuple(self._routes)

    def provider_count(self, model_profile: str) -> int:
        """How many providers the profile has."""
        return len(self._routes[model_profile])

    def check(self) -> None:
        """Look at all providers; up to 3 seconds."""
        health = {item["name"]: item for item in self._checks.look()}
        with self._lock:
            self._health = health
            for name, circuit in self._circuits.items():
                circuit.record_check(is_down=health[name]["status"] == "unavailable")

    def seconds_to_next_check(self) -> float:
        """Sooner while a circuit is not closed, to find its service back."""
        with self._lock:
            all_closed = all(circuit.state() == "closed" for circuit in self._circuits.values())
        return CHECK_INTERVAL_SECONDS if all_closed else OPEN_CHECK_INTERVAL_SECONDS

    def claimable_profiles(self) -> list[str]:
        """The profiles to claim now: those that have a provider whose circuit lets a job through."""
        with self._lock:
            return [profile for profile, route in self._routes.items() if any(self._circuits[one.name].allows_job() for one in route)]

    def claim_limit(self, free_slots: int) -> int:
        """How many of `free_slots` jobs to claim: one, while there is a profile that depends on a trial."""
        with self._lock:
            return 1 if any(self._needs_trial(route) for route in self._routes.values()) else free_slots

    def has_open_circuit(self) -> bool:
        """Whether a circuit is not closed, so that a claim should not wait long."""
        with self._lock:
            return any(circuit.state() != "closed" for circuit in self._circuits.values())

    def turns(self, model_profile: str) -> Iterator[Turn]:
        """The providers that may try a job of this profile now, in their order."""
        for one in self._routes[model_profile]:
            with self._lock:
                circuit = self._circuits[one.name]
                if not circuit.allows_job():
                    continue
                was_trial = circuit.start_job()
            yield Turn(one, self, was_trial)

    def record_outcome(self, name: str, outcome: Result | NotCompleted, *, was_trial: bool) -> None:
        """How one provider's turn ended."""
        with self._lock:
            self._circuits[name].record_outcome(outcome, was_trial=was_trial)

    def seconds_until_retry(self, model_profile: str) -> float:
        """When a job of this profile may be tried again: 0 for now."""
        with self._lock:
            return min(self._circuits[one.name].seconds_left() for one in self._routes[model_profile])

    def report(self) -> list[dict[str, Any]]:
        """The providers as a worker reports them."""
        with self._lock:
            return [self._describe(one) for one in self._installed]

    def _describe(self, one: InstalledProvider) -> dict[str, Any]:
        circuit, health = self._circuits[one.name], self._health.get(one.name, {})
        served = [profile for profile, route in self._routes.items() if one in route]
        detail = circuit.reason or health.get("detail") or ""
        description = {"name": one.name, "status": health.get("status", "degraded"), "circuit": circuit.state(), "model_profiles": served}
        return {**description, "detail": redact(detail, one.secrets)[:200] or None}

    def _needs_trial(self, route: Sequence[InstalledProvider]) -> bool:
        states = {self._circuits[one.name].state() for one in route}
        return "half_open" in states and "closed" not in states
