"""Which provider gets a job, and when a circuit keeps jobs away.

what a run came to                       closed becomes         half open becomes
a result, or a failure of the answer's   closed                 closed
refused, no work done                    open                   open, twice as long
an outage that cost an attempt           open at the third      open, twice as long
cancelled, bad input, not its kind       closed                 half open
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs
import pytest
from service import wait_until

from ai_internal.worker.fleet import Circuit, Fleet
from providers import Checks, Health, InstalledProvider, Job, Never, NotCompleted, NotNow, Result, Unsupported

FINE = Result("fine")
REFUSED = NotNow("unavailable", "connection refused", burns_attempt=False)
BROKE = NotNow("unavailable", "the connection broke")
CANCELLED = NotNow("cancelled", "stopped", burns_attempt=False)


@attrs.define
class Clock:
    """Seconds that pass when the test says so."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def after(clock: Clock, *outcomes: Result | NotCompleted) -> Circuit:
    """A circuit that let through jobs which ended so, one after the other."""
    circuit = Circuit("script", clock)
    for outcome in outcomes:
        let_through(circuit, outcome)
    return circuit


def let_through(circuit: Circuit, outcome: Result | NotCompleted) -> None:
    circuit.record_outcome(outcome, was_trial=circuit.start_job())


def opened_and_over(clock: Clock) -> Circuit:
    circuit = after(clock, REFUSED)
    clock.passes(2)
    assert circuit.state() == "half_open"
    return circuit


WORKED_ON = [FINE, Never("context_length_exceeded", "too long"), NotNow("invalid_output", "no JSON"), NotNow("truncated", "cut")]
SAYS_NOTHING = [
    CANCELLED,
    Unsupported("no tools here"),
    Never("invalid_input", "no audio"),
    NotNow("audio_unavailable", "gone"),
]


@pytest.mark.parametrize("outcome", SAYS_NOTHING)
def test_what_says_nothing_of_the_service_changes_nothing(clock: Clock, outcome: NotCompleted) -> None:
    assert after(clock, outcome, outcome, outcome, outcome).state() == "closed"
    assert after(clock, BROKE, BROKE, outcome, BROKE).state() == "open"


@pytest.mark.parametrize("outcome", WORKED_ON)
def test_what_was_worked_on_leaves_it_closed_and_ends_a_row(clock: Clock, outcome: Result | NotCompleted) -> None:
    assert after(clock, outcome, outcome, outcome, outcome).state() == "closed"
    assert after(clock, BROKE, BROKE, outcome, BROKE, BROKE).state() == "closed"


def test_a_refusal_opens_it_at_once(clock: Clock) -> None:
    circuit = after(clock, REFUSED)
    assert circuit.state() == "open"
    assert not circuit.allows_job()
    assert 1.5 <= circuit.seconds_left() <= 2


@pytest.mark.parametrize("category", ["unavailable", "timeout", "internal"])
def test_three_outages_in_a_row_open_it(clock: Clock, category: str) -> None:
    outage = NotNow(category, "trouble")
    assert after(clock, outage, outage).state() == "closed"
    assert after(clock, outage, outage, outage).state() == "open"


def test_it_stays_open_as_long_as_the_service_asked(clock: Clock) -> None:
    circuit = after(clock, NotNow("rate_limited", "slow down", retry_in_seconds=30, burns_attempt=False))
    clock.passes(29.9)
    assert circuit.state() == "open"
    clock.passes(0.2)
    assert circuit.state() == "half_open"


def test_nobody_may_ask_for_more_than_ten_minutes(clock: Clock) -> None:
    assert after(clock, NotNow("rate_limited", "later", retry_in_seconds=10**9, burns_attempt=False)).seconds_left() == 600


def test_half_open_it_lets_one_job_through(clock: Clock) -> None:
    circuit = opened_and_over(clock)
    assert circuit.allows_job()
    assert circuit.start_job()
    assert not circuit.allows_job()


@pytest.mark.parametrize("outcome", WORKED_ON)
def test_a_trial_that_was_worked_on_closes_it(clock: Clock, outcome: Result | NotCompleted) -> None:
    circuit = opened_and_over(clock)
    let_through(circuit, outcome)
    assert (circuit.state(), circuit.reason) == ("closed", None)


@pytest.mark.parametrize("outcome", SAYS_NOTHING)
def test_a_trial_that_says_nothing_is_followed_by_another(clock: Clock, outcome: NotCompleted) -> None:
    circuit = opened_and_over(clock)
    let_through(circuit, outcome)
    assert circuit.state() == "half_open"
    assert circuit.allows_job()


@pytest.mark.parametrize("outage", [REFUSED, BROKE])
def test_each_failed_trial_doubles_the_time_up_to_five_minutes(clock: Clock, outage: NotNow) -> None:
    circuit = opened_and_over(clock)
    most = 2.0
    for _ in range(10):
        let_through(circuit, outage)
        most = min(300.0, most * 2)
        assert most * 0.75 <= circuit.seconds_left() <= most
        clock.passes(most)
    let_through(circuit, FINE)
    let_through(circuit, REFUSED)
    assert circuit.seconds_left() <= 2, "after a success it begins again with the shortest time"


def test_jobs_side_by_side_that_meet_one_outage_open_it_once(clock: Clock) -> None:
    circuit = Circuit("script", clock)
    together = [circuit.start_job() for _ in range(8)]
    for was_trial in together:
        circuit.record_outcome(REFUSED, was_trial=was_trial)
    assert circuit.seconds_left() <= 2


def test_a_job_that_ends_well_closes_it_unless_the_service_asked_for_a_rest(clock: Clock) -> None:
    circuit = Circuit("script", clock)
    circuit.record_outcome(REFUSED, was_trial=False)
    circuit.record_outcome(FINE, was_trial=False)
    assert circuit.state() == "closed"
    circuit.record_outcome(NotNow("rate_limited", "later", retry_in_seconds=30, burns_attempt=False), was_trial=False)
    circuit.record_outcome(FINE, was_trial=False)
    assert circuit.state() == "open"


def test_a_bad_check_keeps_it_open_and_a_good_one_ends_that(clock: Clock) -> None:
    circuit = after(clock, REFUSED)
    circuit.record_check(is_down=True)
    clock.passes(500)
    assert circuit.state() == "open"
    circuit.record_check(is_down=False)
    assert circuit.state() == "half_open"


def test_a_check_that_recovers_ends_a_long_time_early_but_not_one_that_was_asked_for(clock: Clock) -> None:
    for outage, state in (REFUSED, "half_open"), (attrs_like(REFUSED, 60), "open"):
        circuit = after(clock, outage)
        circuit.record_check(is_down=True)
        circuit.record_check(is_down=False)
        assert circuit.state() == state


def attrs_like(refusal: NotNow, seconds: float) -> NotNow:
    return NotNow(refusal.category, refusal.message, retry_in_seconds=seconds, burns_attempt=False)


def test_a_bad_check_holds_it_twice_as_long_each_time_it_is_proved_right_but_never_for_ever(clock: Clock) -> None:
    circuit = after(clock, REFUSED)
    circuit.record_check(is_down=True)
    for seconds in (600, 1200, 2400, 3600, 3600):
        clock.passes(seconds - 1)
        assert circuit.state() == "open"
        clock.passes(1)
        assert circuit.state() == "half_open"
        let_through(circuit, REFUSED)
    circuit.record_check(is_down=False)
    assert circuit.state() == "half_open"


def test_the_end_of_a_jobs_own_time_opens_nothing(clock: Clock) -> None:
    assert after(clock, *[NotNow("timeout", "too late to begin", burns_attempt=False)] * 5).state() == "closed"


def test_a_bad_check_alone_opens_nothing(clock: Clock) -> None:
    circuit = Circuit("script", clock)
    circuit.record_check(is_down=True)
    assert circuit.state() == "closed"


# ---------------------------------------------------------------- fleet


@attrs.define(eq=False)
class Stub:
    """A provider of this health."""

    name: str
    model_profiles: tuple[str, ...]
    health: Health = attrs.field(factory=lambda: Health("ok"))

    def check(self) -> Health:
        return self.health

    def run(self, job: Job) -> Result:
        raise AssertionError("not asked here")


def listed(name: str, *profiles: str) -> InstalledProvider:
    return InstalledProvider(name=name, origin=f"test:{name}", provider=Stub(name, profiles), secrets=("hidden-word",))


@contextmanager
def turns_of(fleet: Fleet, profile: str) -> Iterator[list[str]]:
    """The names of those that get a turn when each refuses."""
    names = []
    for turn in fleet.turns(profile):
        names.append(turn.installed.name)
        turn.end(REFUSED)
    yield names


def names_of(fleet: Fleet, profile: str, outcomes: Sequence[Result | NotCompleted]) -> list[str]:
    """Who gets a turn at one job after the other, each ending so with its first provider."""
    names = []
    for outcome in outcomes:
        turn = next(fleet.turns(profile))
        names.append(turn.installed.name)
        turn.end(outcome)
    return names


FIRST, SECOND = listed("first", "text"), listed("second", "text", "other")


def test_turns_go_in_the_order_of_the_route(clock: Clock) -> None:
    for route in ((FIRST, SECOND), (SECOND, FIRST)):
        with turns_of(Fleet({"text": route}, clock), "text") as names:
            assert names == [one.name for one in route]


def test_a_provider_behind_an_open_circuit_gets_no_turn_until_its_trial(clock: Clock) -> None:
    fleet = Fleet({"text": (FIRST, SECOND)}, clock)
    assert names_of(fleet, "text", [FINE, REFUSED, FINE, FINE]) == ["first", "first", "second", "second"]
    clock.passes(2)
    trial = next(fleet.turns("text"))
    assert trial.installed.name == "first"
    assert names_of(fleet, "text", [FINE]) == ["second"], "one trial at a time"
    trial.end(FINE)
    assert names_of(fleet, "text", [FINE]) == ["first"]


def test_only_profiles_that_somebody_may_run_are_claimed(clock: Clock) -> None:
    fleet = Fleet({"text": (FIRST,), "other": (SECOND,), "both": (FIRST, SECOND)}, clock)
    assert fleet.claimable_profiles() == ["text", "other", "both"]
    next(fleet.turns("text")).end(REFUSED)
    assert fleet.claimable_profiles() == ["other", "both"]
    assert fleet.seconds_until_retry("text") > 0
    assert fleet.seconds_until_retry("both") == 0


def test_one_job_is_claimed_where_a_profile_depends_on_a_trial(clock: Clock) -> None:
    alone, backed = Fleet({"text": (FIRST,)}, clock), Fleet({"text": (FIRST, SECOND)}, clock)
    for fleet in (alone, backed):
        next(fleet.turns("text")).end(REFUSED)
        clock.passes(2)
    assert (alone.claim_limit(8), backed.claim_limit(8)) == (1, 8)
    next(alone.turns("text")).end(FINE)
    assert alone.claim_limit(8) == 8


def test_checks_come_sooner_in_trouble(clock: Clock) -> None:
    fleet = Fleet({"text": (FIRST,)}, clock)
    assert (fleet.seconds_to_next_check(), fleet.has_open_circuit()) == (30, False)
    next(fleet.turns("text")).end(REFUSED)
    assert (fleet.seconds_to_next_check(), fleet.has_open_circuit()) == (5, True)


def test_the_report_says_which_circuit_is_open_and_why_without_a_secret(clock: Clock) -> None:
    fleet = Fleet({"text": (FIRST, SECOND), "other": (SECOND,)}, clock)
    fleet.check()
    next(fleet.turns("text")).end(NotNow("unauthorized", "it said hidden-word is wrong \ud800\0" + "x" * 500, burns_attempt=False))
    first, second = fleet.report()
    assert (first["name"], first["status"], first["circuit"], first["model_profiles"]) == ("first", "ok", "open", ["text"])
    assert first["detail"].startswith("unauthorized: it said [secret] is wrong")
    assert len(first["detail"].encode()) <= 200
    assert "\0" not in first["detail"]
    assert (second["circuit"], second["model_profiles"], second["detail"]) == ("closed", ["text", "other"], None)


def test_a_check_reaches_the_circuits(clock: Clock) -> None:
    first = listed("first", "text")
    fleet = Fleet({"text": (first,)}, clock)
    next(fleet.turns("text")).end(REFUSED)
    assert isinstance(first.provider, Stub)
    first.provider.health = Health("unavailable", "gone")
    fleet.check()
    assert fleet.seconds_until_retry("text") > 60
    first.provider.health = Health("ok")
    fleet.check()
    assert fleet.seconds_until_retry("text") == 0


def test_a_provider_whose_check_hangs_is_not_asked_again_meanwhile() -> None:
    asked, released = [], threading.Event()

    class Hanging(Stub):
        def check(self) -> Health:
            asked.append(self.name)
            released.wait(30)
            return Health("ok")

    one = InstalledProvider(name="hanging", origin="test:Hanging", provider=Hanging("hanging", ("text",)))
    checks = Checks([one])
    for _ in range(3):
        [item] = checks.look(limit_seconds=0.05)
        assert (item["status"], item["detail"]) == ("unavailable", "did not answer within 0.05 s")
    assert asked == ["hanging"]
    released.set()
    wait_until(lambda: checks.look()[0]["status"] == "ok" and len(asked) == 2, what="a new look")
