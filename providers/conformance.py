"""What every provider must do, as tests to inherit. Needs pytest, which service and worker do not.

    from providers.conformance import ProviderConformance, closed_port, silent_server

    class TestMine(ProviderConformance):
        good_input = {"prompt": "Hello"}
        bad_input = 5

        def provider(self, environ):
            return MyProvider(environ)

        @pytest.fixture(autouse=True)
        def environments(self):
            with my_fake() as good, silent_server() as silent, closed_port() as closed:
                self.good = {"MY_URL": good.url, "MY_KEY": "test-key"}
                self.hanging = {"MY_URL": silent}
                self.unreachable = {"MY_URL": closed}
                yield

Each test makes its provider from one of the three environments. Those of `unreachable` and `hanging` are skipped where these are left
out, as are those of inputs that are. Every secret setting must be set in one of the environments: what is not there cannot show.

Sections: the suite, servers, how a run ended.
"""

import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import pytest

from providers import (
    CANCELLED,
    CHECK_LIMIT_SECONDS,
    MAX_MESSAGE_CHARACTERS,
    MAX_NOTE_BYTES,
    TIMEOUT,
    UNAVAILABLE,
    Health,
    Job,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Provider,
    Result,
    SettingsError,
    Unsupported,
    redact,
    secrets_in,
)
from providers.settings import SHORTEST_SECRET, Setting, declared, profile_name

T = TypeVar("T")

MARK = "words that no error quotes"
STRANGE_INPUTS: tuple[Any, ...] = (None, True, 5, "", [], {}, [None], {"": None}, MARK, [MARK], {"input": {MARK: MARK}})
"""What a caller may send by mistake."""


# ---------------------------------------------------------------- the suite


class ProviderConformance:
    """Inherit it under a name that begins with `Test`, set what is declared here, and override `provider`."""

    good_input: ClassVar[Any]
    """A job's input that the model service completes."""
    other_inputs: ClassVar[Sequence[Any]] = ()
    """Further good inputs. The result of each is always the same, and none is like another: they must not mix when run side by side."""
    bad_input: ClassVar[Any] = None
    """A job's input that can never succeed, or None if there is none."""
    unsupported_input: ClassVar[Any] = None
    """A job's input that only another provider of the profile can do, or None if there is none."""
    needs_settings: ClassVar[bool] = True
    """Whether an empty environment means: not configured."""

    check_seconds: ClassVar[float] = 2 * CHECK_LIMIT_SECONDS
    """How long a check may take here: twice the contract's limit, because a busy test machine stalls."""
    soon_seconds: ClassVar[float] = 0.3
    """When a run is cancelled, or overdue, after it began."""
    prompt_seconds: ClassVar[float] = 5.0
    """How soon after that it must have ended here; the contract asks for about a second."""

    good: Mapping[str, str]
    """Settings for a model service that answers."""
    unreachable: Mapping[str, str] | None = None
    """Settings for one that nobody answers for."""
    hanging: Mapping[str, str] | None = None
    """Settings for one that takes a job and never answers."""

    def provider(self, environ: Mapping[str, str]) -> Provider:
        """Make the provider under test, as its entry point does."""
        raise NotImplementedError("override provider() to make yours")

    def declared_settings(self) -> tuple[Setting, ...]:
        """What the provider declares. Override it where `settings` is not in the provider's class but in the function that makes it."""
        kind = getattr(type(self.provider(self.good)), "settings", None)
        return () if kind is None else declared(kind)

    def job(self, provider: Provider, **changes: Any) -> Job:
        """A job for this provider, with the good input unless told otherwise."""
        facts = {"owner_service": "tests", "owner_ref": "conformance", "task_type": "conformance", "input": self.good_input}
        return Job(id="01989d3e-0000-7000-8000-000000000000", model_profile=provider.model_profiles[0], **(facts | changes))

    def soon(self) -> float:
        """A deadline that a run on a server that hangs will meet."""
        return time.monotonic() + self.soon_seconds

    def outcome_by_deadline(self, provider: Provider, given: Any) -> Result | NotCompleted:
        """How a run ended that had a deadline. How soon after it is for other tests to say."""
        job = self.job(provider, input=given, deadline=self.soon())
        [outcome] = within(self.soon_seconds + 4 * self.prompt_seconds, lambda: outcome_of(provider, job))
        return outcome

    def given(self, kind: str) -> Any:
        """What is declared under this name; a test that needs it is skipped where it is left out."""
        if getattr(self, kind) is None:
            pytest.skip(f"nothing is declared as {kind}")
        return getattr(self, kind)

    # Name and settings

    def test_it_has_a_name_and_profiles(self) -> None:
        provider = self.provider(self.good)
        assert profile_name(provider.name), "a name is written like a profile"
        assert isinstance(provider.model_profiles, tuple)
        assert provider.model_profiles, "a provider serves a profile"
        assert all(profile_name(profile) for profile in provider.model_profiles)

    def test_without_settings_it_is_not_configured(self) -> None:
        if not self.needs_settings:
            pytest.skip("this provider needs no settings")
        for environ in ({}, {one.name: " " for one in self.declared_settings()}):
            with pytest.raises(NotConfigured) as absent:
                self.provider(environ)
            assert str(absent.value), "NotConfigured says which setting is absent"

    def test_its_settings_are_declared(self) -> None:
        settings = self.declared_settings()
        assert settings or not self.needs_settings, "it needs settings: declare them, and name their class in its attribute `settings`"
        assert len({one.name for one in settings}) == len(settings), "a setting is declared once"
        for one in settings:
            assert re.fullmatch(r"[A-Z][A-Z0-9_]*", one.name), f"{one.name}: capital letters, digits and _"
            assert one.about.strip(), f"{one.name}: say what it does"
            assert one.about.isprintable(), f"{one.name}: in one line"
            assert one.default is None or not one.secret, f"{one.name}: a secret has no default"

    def test_it_reads_no_setting_that_it_does_not_declare(self) -> None:
        names = {one.name for one in self.declared_settings()}
        if self.needs_settings and not names:
            pytest.skip("no settings are declared")
        environ = _Watched({name: value for name, value in self.good.items() if name in names})
        provider = self.provider(environ)
        outcome_of(provider, self.job(provider))
        provider.check()
        assert environ.asked <= names, f"not declared: {', '.join(sorted(environ.asked - names))}"

    def test_wrong_settings_are_told_all_at_once(self) -> None:
        wrong = {one.name: f"no {'secret' if one.secret else 'value'}" for one in self.declared_settings() if _refuses_two_words(one)}
        if not wrong:
            pytest.skip("no setting can be wrong")
        with pytest.raises(SettingsError) as refused:
            self.provider({**self.good, **wrong})
        untold = [name for name in wrong if not any(name in problem for problem in refused.value.problems)]
        assert not untold, f"no problem names {', '.join(untold)}"
        assert "no secret" not in str(refused.value), "a secret shows, though a wrong one"

    # Check

    def test_check_of_a_good_server_is_ok_and_quick(self) -> None:
        [health] = within(self.check_seconds, self.provider(self.good).check)
        assert isinstance(health, Health)
        assert health.status == "ok", health.detail

    def test_check_of_an_unreachable_server_says_so_and_raises_nothing(self) -> None:
        [health] = within(self.check_seconds, self.provider(self.given("unreachable")).check)
        assert health.status == "unavailable"
        assert health.detail, "an unavailable provider says why"

    def test_checks_of_a_hanging_server_go_side_by_side_and_end(self) -> None:
        provider = self.provider(self.given("hanging"))
        looks = within(self.check_seconds, *[provider.check] * 4)
        assert all(isinstance(health, Health) for health in looks)
        self.assert_no_secret(self.given("hanging"), repr(looks))

    # Run

    def test_run_returns_json_and_small_usage(self) -> None:
        provider = self.provider(self.good)
        result = provider.run(self.job(provider))
        assert isinstance(result, Result)
        json.dumps(result.value, allow_nan=False, ensure_ascii=False).encode()
        assert_is_note(result.usage or {}, "usage")

    def test_a_run_after_a_check_is_as_good(self) -> None:
        provider = self.provider(self.good)
        provider.check()
        assert isinstance(provider.run(self.job(provider)), Result)

    def test_progress_is_small_json_objects(self) -> None:
        provider, reports = self.provider(self.good), list[Any]()
        provider.run(self.job(provider, report_progress=reports.append))
        for report in reports:
            assert_is_note(report, "progress")

    def test_runs_go_side_by_side_and_do_not_mix(self) -> None:
        provider, inputs = self.provider(self.good), [self.good_input, *self.other_inputs]
        alone = [provider.run(self.job(provider, input=one)).value for one in inputs] if self.other_inputs else []
        assert all(value not in alone[:index] for index, value in enumerate(alone)), "good_input and other_inputs need results that differ"
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda one: provider.run(self.job(provider, input=one)), 4 * inputs))
        assert all(isinstance(result, Result) for result in results)
        assert [result.value for result in results] == 4 * alone or not alone, "jobs side by side got each other's results"

    # Outcomes

    def test_bad_input_is_never(self) -> None:
        provider = self.provider(self.good)
        assert isinstance(outcome_of(provider, self.job(provider, input=self.given("bad_input"))), Never)

    def test_unsupported_input_is_left_to_another_provider(self) -> None:
        provider = self.provider(self.good)
        assert isinstance(outcome_of(provider, self.job(provider, input=self.given("unsupported_input"))), Unsupported)

    def test_strange_input_breaks_nothing_and_is_not_quoted(self) -> None:
        provider = self.provider(self.good)
        for strange in STRANGE_INPUTS:
            # Anything but an outcome ends the test here: it would cost a job all its attempts.
            outcome = outcome_of(provider, self.job(provider, input=strange, deadline=time.monotonic() + self.check_seconds))
            assert isinstance(outcome, Result) or MARK not in outcome.message, "a message quotes the job's input"

    def test_an_unreachable_server_burns_no_attempt(self) -> None:
        provider = self.provider(self.given("unreachable"))
        outcome = outcome_of(provider, self.job(provider))
        assert isinstance(outcome, NotNow)
        assert outcome.category == UNAVAILABLE
        assert not outcome.burns_attempt, "a server that was never reached did no work"

    def test_outcomes_are_well_formed(self) -> None:
        inputs = [one for one in (self.good_input, self.bad_input, self.unsupported_input) if one is not None]
        for environ in self._environments():
            provider = self.provider(environ)
            for one in inputs:
                assert_is_outcome(self.outcome_by_deadline(provider, one))

    # Time

    def test_a_run_ends_at_its_deadline(self) -> None:
        provider = self.provider(self.given("hanging"))
        job = self.job(provider, deadline=self.soon())
        [outcome] = within(self.soon_seconds + self.prompt_seconds, lambda: outcome_of(provider, job))
        assert isinstance(outcome, NotNow)
        assert outcome.category == TIMEOUT

    def test_a_job_whose_deadline_has_passed_does_not_run(self) -> None:
        provider = self.provider(self.good)
        outcome = outcome_of(provider, self.job(provider, deadline=time.monotonic() - 1))
        assert isinstance(outcome, NotNow)
        assert outcome.category == TIMEOUT
        assert not outcome.burns_attempt, "nothing was done for it"

    def test_a_cancelled_run_ends_soon(self) -> None:
        provider, cancelled = self.provider(self.given("hanging")), threading.Event()
        threading.Timer(self.soon_seconds, cancelled.set).start()
        job = self.job(provider, cancelled=cancelled)
        [outcome] = within(self.soon_seconds + self.prompt_seconds, lambda: outcome_of(provider, job))
        assert isinstance(outcome, NotCompleted)
        assert outcome.category == CANCELLED

    def test_a_job_cancelled_before_it_runs_does_not_run(self) -> None:
        cancelled = threading.Event()
        cancelled.set()
        provider = self.provider(self.good)
        outcome = outcome_of(provider, self.job(provider, cancelled=cancelled))
        assert isinstance(outcome, NotCompleted)
        assert outcome.category == CANCELLED

    # Secrets

    def test_secrets_do_not_show(self) -> None:
        settings = self.declared_settings()
        for one in settings:
            proves = not one.secret or any(len(environ.get(one.name, "")) >= SHORTEST_SECRET for environ in self._environments())
            assert proves, f"set {one.name} to {SHORTEST_SECRET} characters or more in one of the environments, or this proves nothing"
        for environ in self._environments():
            provider = self.provider(environ)
            self.assert_no_secret(environ, repr(provider), *self._ends(provider))
            if environ is not self.hanging:
                # Of that one a test of its own has seen the check, which takes its time.
                self.assert_no_secret(environ, repr(provider.check()))

    def assert_no_secret(self, environ: Mapping[str, str], *shown: str) -> None:
        """Nothing that is shown has a secret of these settings in it."""
        secrets = secrets_in(environ, self.declared_settings())
        assert all(redact(text, secrets) == text for text in shown), "a key or user info shows in repr, health, result or error"

    def _environments(self) -> list[Mapping[str, str]]:
        return [environ for environ in (self.good, self.unreachable, self.hanging) if environ is not None]

    def _ends(self, provider: Provider) -> list[str]:
        """All that jobs with good and bad input end in, as text."""
        inputs = [one for one in (self.good_input, self.bad_input) if one is not None]
        outcomes = [self.outcome_by_deadline(provider, one) for one in inputs]
        return [f"{one!r} {one.value} {one.usage}" if isinstance(one, Result) else f"{one!r} {vars(one)}" for one in outcomes]


class _Watched(Mapping[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self._environ[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._environ)

    def __len__(self) -> int:
        return len(self._environ)


def _refuses_two_words(one: Setting) -> bool:
    try:
        one.read("two words")
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------- servers


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        # The kernel completes the connections that nobody accepts.
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def closed_port() -> Iterator[str]:
    """An address where nobody listens, and nobody else will meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


# ---------------------------------------------------------------- how a run ended


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and how many seconds it took."""
    started = time.monotonic()
    return call(), time.monotonic() - started


def within(seconds: float, *calls: Callable[[], T]) -> list[T]:
    """What these calls return, made side by side. The test fails when one has not ended within so many seconds; it is left to itself."""
    until = time.monotonic() + seconds
    ends = [Future[T]() for _ in calls]
    for end, call in zip(ends, calls, strict=True):
        threading.Thread(target=_end, args=(end, call), daemon=True).start()
    wait(ends, max(0.0, until - time.monotonic()))
    if not all(end.done() for end in ends):
        pytest.fail(f"it went on for more than {seconds:g} s")
    return [end.result() for end in ends]


def _end(end: "Future[T]", call: Callable[[], T]) -> None:
    try:
        end.set_result(call())
    except BaseException as error:  # noqa: BLE001 -- raised again where its result is asked for
        end.set_exception(error)


def outcome_of(provider: Provider, job: Job) -> Result | NotCompleted:
    """How a run ended, the raised outcomes as values."""
    try:
        return provider.run(job)
    except NotCompleted as outcome:
        return outcome


def assert_is_note(note: object, kind: str) -> None:
    """Usage and progress are small JSON objects."""
    assert isinstance(note, Mapping), f"{kind} is an object"
    size = len(json.dumps(dict(note), allow_nan=False, ensure_ascii=False).encode())
    assert size <= MAX_NOTE_BYTES, f"{kind} is at most {MAX_NOTE_BYTES} bytes, this has {size} bytes"


def assert_is_outcome(outcome: object) -> None:
    """An outcome has all that worker and service expect of it."""
    assert isinstance(outcome, Result | NotNow | Never | Unsupported), f"a run returns a Result or raises an outcome, not {outcome!r}"
    assert_is_note(outcome.usage or {}, "usage")
    if isinstance(outcome, NotCompleted):
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,63}", outcome.category), outcome.category
        assert 0 < len(outcome.message) <= MAX_MESSAGE_CHARACTERS, "a message says what went wrong"
        assert outcome.message.isprintable(), "a message is one line of readable text"
    if isinstance(outcome, NotNow) and outcome.retry_in_seconds is not None:
        assert math.isfinite(outcome.retry_in_seconds), "a delay has an end"
        assert outcome.retry_in_seconds >= 0, "a delay is not in the past"
