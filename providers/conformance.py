"""What every provider must do, as tests to inherit. Needs pytest, which service and worker do not.

    from providers.conformance import ProviderConformance

    class TestMine(ProviderConformance):
        good_input = {"prompt": "Hello"}
        bad_input = 5

        def provider(self, environ):
            return MyProvider(environ)

        @pytest.fixture(autouse=True)
        def environments(self):
            with my_fake() as good, my_hanging_fake() as hanging:
                self.good, self.hanging = good.environ, hanging.environ
                self.unreachable = {"MY_URL": "http://127.0.0.1:1"}
                yield

Each test builds its provider from one of the three environments. `unreachable` and `hanging` may be
left out: their tests are then skipped.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import pytest

from providers import (
    CANCELLED,
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
    redact,
    secrets_in,
)

T = TypeVar("T")


class ProviderConformance:
    """Inherit it under a name that begins with `Test`, set what is declared here, and override `provider`."""

    good_input: ClassVar[Any]
    """A job's input that the model service completes."""
    bad_input: ClassVar[Any] = None
    """A job's input that can never succeed, or None if there is none."""
    needs_settings: ClassVar[bool] = True
    """Whether an empty environment means: not configured."""

    check_seconds: ClassVar[float] = 6.0
    """How long a check may take here: twice the contract's limit, because a busy test machine stalls."""
    prompt_seconds: ClassVar[float] = 5.0
    """How soon a cancelled or overdue run must have ended here; the contract asks for about a second."""

    good: Mapping[str, str]
    """Settings for a model service that answers."""
    unreachable: Mapping[str, str] | None = None
    """Settings for one that nobody answers for."""
    hanging: Mapping[str, str] | None = None
    """Settings for one that takes a job and never answers."""

    def job(self, provider: Provider, **changes: Any) -> Job:
        """A job for this provider, with the good input unless told otherwise."""
        facts = {"owner_service": "tests", "owner_ref": "conformance", "task_type": "conformance", "input": self.good_input}
        return Job(id="01989d3e-0000-7000-8000-000000000000", model_profile=provider.model_profiles[0], **(facts | changes))

    def provider(self, environ: Mapping[str, str]) -> Provider:
        """Make the provider under test, as its entry point does."""
        raise NotImplementedError("override provider() to make yours")

    def given(self, kind: str) -> Mapping[str, str]:
        """The settings declared as `unreachable` or `hanging`; a test that needs them is skipped if there are none."""
        environ: Mapping[str, str] | None = getattr(self, kind)
        if environ is None:
            pytest.skip(f"no settings are declared as {kind}")
        return environ

    def test_it_has_a_name_and_profiles(self) -> None:
        provider = self.provider(self.good)
        assert provider.name, "a provider has a name"
        assert isinstance(provider.name, str)
        assert isinstance(provider.model_profiles, tuple)
        assert provider.model_profiles, "a provider serves a profile"
        assert all(isinstance(profile, str) and profile for profile in provider.model_profiles)

    def test_without_settings_it_is_not_configured(self) -> None:
        if not self.needs_settings:
            pytest.skip("this provider needs no settings")
        with pytest.raises(NotConfigured) as absent:
            self.provider({})
        assert str(absent.value), "NotConfigured says which setting is absent"

    def test_check_of_a_good_server_is_ok_and_quick(self) -> None:
        health, seconds = timed(self.provider(self.good).check)
        assert isinstance(health, Health)
        assert health.status == "ok", health.detail
        assert seconds <= self.check_seconds

    def test_check_of_an_unreachable_server_says_so_and_raises_nothing(self) -> None:
        health, seconds = timed(self.provider(self.given("unreachable")).check)
        assert health.status == "unavailable"
        assert health.detail, "an unavailable provider says why"
        assert seconds <= self.check_seconds

    def test_run_returns_json_and_small_usage(self) -> None:
        provider = self.provider(self.good)
        result = provider.run(self.job(provider))
        assert isinstance(result, Result)
        json.dumps(result.value, allow_nan=False, ensure_ascii=False).encode()
        assert len(json.dumps(dict(result.usage or {}), allow_nan=False)) <= 4_096, "usage is at most 4 KB"

    def test_runs_go_side_by_side(self) -> None:
        provider = self.provider(self.good)
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda _: provider.run(self.job(provider)), range(8)))
        assert all(isinstance(result, Result) for result in results)

    def test_bad_input_is_never(self) -> None:
        if self.bad_input is None:
            pytest.skip("no input is bad for this provider")
        provider = self.provider(self.good)
        assert isinstance(outcome_of(provider, self.job(provider, input=self.bad_input)), Never)

    def test_an_unreachable_server_burns_no_attempt(self) -> None:
        provider = self.provider(self.given("unreachable"))
        outcome = outcome_of(provider, self.job(provider))
        assert isinstance(outcome, NotNow)
        assert outcome.category == UNAVAILABLE
        assert not outcome.burns_attempt, "a server that was never reached did no work"

    def test_a_run_ends_at_its_deadline(self) -> None:
        provider = self.provider(self.given("hanging"))
        outcome, seconds = timed(lambda: outcome_of(provider, self.job(provider, deadline=time.monotonic() + 0.3)))
        assert isinstance(outcome, NotNow)
        assert outcome.category == TIMEOUT
        assert seconds <= 0.3 + self.prompt_seconds

    def test_a_cancelled_run_ends_soon(self) -> None:
        provider, cancelled = self.provider(self.given("hanging")), threading.Event()
        threading.Timer(0.3, cancelled.set).start()
        outcome, seconds = timed(lambda: outcome_of(provider, self.job(provider, cancelled=cancelled)))
        assert isinstance(outcome, NotCompleted)
        assert outcome.category == CANCELLED
        assert seconds <= 0.3 + self.prompt_seconds

    def test_a_job_cancelled_before_it_runs_does_not_run(self) -> None:
        cancelled = threading.Event()
        cancelled.set()
        provider = self.provider(self.good)
        outcome = outcome_of(provider, self.job(provider, cancelled=cancelled))
        assert isinstance(outcome, NotCompleted)
        assert outcome.category == CANCELLED

    def test_secrets_do_not_show(self) -> None:
        for environ in (self.good, self.unreachable):
            if environ is None:
                continue
            provider = self.provider(environ)
            outcome = outcome_of(provider, self.job(provider, input=self.good_input if self.bad_input is None else self.bad_input))
            shown = f"{provider!r} {provider.check()!r} {outcome!r} {getattr(outcome, '__dict__', '')}"
            assert redact(shown, secrets_in(environ)) == shown, "a key or user info shows in repr, health or error"


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and how many seconds it took."""
    started = time.monotonic()
    return call(), time.monotonic() - started


def outcome_of(provider: Provider, job: Job) -> Result | NotCompleted:
    """How a run ended, the raised outcomes as values."""
    try:
        return provider.run(job)
    except NotCompleted as outcome:
        return outcome
