"""The provider contract: the example of its description, outcomes, jobs, health, public names."""

from __future__ import annotations

import inspect
import re
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sample_providers import a_job

import providers
import providers.settings
from providers import (
    CATEGORIES,
    GROUP,
    UNSUPPORTED,
    Health,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Provider,
    Result,
    SettingsError,
    Unsupported,
)

# ---------------------------------------------------------------- the description's own example


def described_echo() -> Callable[[Mapping[str, str]], Provider]:
    """The settings and the class printed in the modules' descriptions."""
    declaration = (inspect.getdoc(providers.settings) or "").split("\n\n")[1]
    text = inspect.getdoc(providers) or ""
    scope = vars(providers.settings) | vars(providers)
    exec(textwrap.dedent(declaration), scope)
    exec(textwrap.dedent(text[text.index("    class Echo:") : text.index("It becomes one by an entry point")]), scope)
    return scope["Echo"]  # type: ignore[no-any-return]


def test_the_described_echo_works() -> None:
    echo = described_echo()({"ECHO_URL": "http://echo.test"})
    assert (echo.check(), echo.run(a_job()).value) == (Health("ok"), {"content": "payload"})
    with pytest.raises(NotConfigured, match="ECHO_URL is not set"):
        described_echo()({})
    with pytest.raises(SettingsError, match="ECHO_TIMEOUT: 'soon' is no duration"):
        described_echo()({"ECHO_URL": "http://echo.test", "ECHO_TIMEOUT": "soon"})


def test_the_description_names_the_entry_point_group() -> None:
    assert f'[project.entry-points."{GROUP}"]' in (inspect.getdoc(providers) or "")


# ---------------------------------------------------------------- outcomes and job


def test_not_now_burns_an_attempt_by_default() -> None:
    outcome = NotNow("timeout", "too slow")
    assert (outcome.burns_attempt, outcome.retry_in_seconds, outcome.usage) == (True, None, None)
    assert (str(outcome), outcome.category, outcome.message) == ("timeout: too slow", "timeout", "too slow")


def test_outcomes_are_distinct_kinds_of_not_completed() -> None:
    kinds = (NotNow, Never, Unsupported)
    assert all(issubclass(kind, NotCompleted) for kind in kinds)
    assert not any(issubclass(one, other) for one in kinds for other in kinds if one is not other)


def test_unsupported_has_its_own_category() -> None:
    outcome = Unsupported("tools are not served here")
    assert (outcome.category, outcome.message, outcome.usage) == (UNSUPPORTED, "tools are not served here", None)


def test_every_category_is_described() -> None:
    source = inspect.getsource(providers)
    names = {name for name, value in vars(providers).items() if name.isupper() and isinstance(value, str) and value in CATEGORIES}
    assert {getattr(providers, name) for name in names} == CATEGORIES
    assert all(re.search(rf'^{name} = "\w+"\n""".+"""$', source, re.MULTILINE) for name in names)
    assert names <= set(providers.__all__)


@pytest.mark.parametrize("category", ["", "Timeout", "1st", "a b", "a" * 65, "x\n"])
def test_a_category_that_the_queue_rejects_is_rejected_here(category: str) -> None:
    with pytest.raises(ValueError, match="a category is"):
        Never(category, "message")


def test_every_listed_category_is_accepted() -> None:
    assert {Never(category, "message").category for category in CATEGORIES} == CATEGORIES


def test_a_job_does_not_show_its_input() -> None:
    assert "payload" not in repr(a_job())
    assert "payload" not in repr(Result("payload"))


def test_the_time_left_of_a_job_is_never_negative() -> None:
    assert a_job().seconds_left() is None
    assert a_job(deadline=time.monotonic() - 5).seconds_left() == 0
    assert 4 < (a_job(deadline=time.monotonic() + 5).seconds_left() or 0) <= 5


def test_jobs_do_not_share_their_cancellation() -> None:
    one, other = a_job(), a_job()
    one.cancelled.set()
    assert not other.cancelled.is_set()


def test_a_run_may_take_its_limit_or_the_time_left_and_none_after_the_deadline() -> None:
    assert a_job().seconds_allowed(60) == 60
    assert 5 < a_job(deadline=time.monotonic() + 10).seconds_allowed(60) <= 10
    cancelled = threading.Event()
    cancelled.set()
    for job, category in (a_job(deadline=time.monotonic() - 1), "timeout"), (a_job(cancelled=cancelled), "cancelled"):
        with pytest.raises(NotNow) as late:
            job.seconds_allowed(60)
        assert (late.value.category, late.value.burns_attempt) == (category, False)


def test_wrong_types_in_an_outcome_or_in_health_are_converted() -> None:
    assert Never("invalid_input", ValueError("no audio")).message == "no audio"  # type: ignore[arg-type]
    assert NotNow("unavailable", "later", retry_in_seconds="30").retry_in_seconds == 30  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="soon"):
        NotNow("unavailable", "later", retry_in_seconds="soon")  # type: ignore[arg-type]
    assert Health("unavailable", OSError("gone"), models=[1]) == Health("unavailable", "gone", models=("1",))  # type: ignore[arg-type]


def test_health_knows_four_statuses() -> None:
    with pytest.raises(ValueError, match="'status' must be in"):
        Health("fine")  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [providers, providers.settings])
def test_public_names_are_there(module: Any) -> None:
    assert all(hasattr(module, name) for name in module.__all__)
