"""The provider contract: outcomes, discovery of good and broken plugins, conflicts, checks, durations, secrets."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_vllm import fake_vllm
from hypothesis import given
from hypothesis import strategies as st

import providers
from providers import (
    CANCELLED,
    CATEGORIES,
    GROUP,
    INVALID_INPUT,
    TIMEOUT,
    UNAVAILABLE,
    Health,
    Job,
    Listed,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Provider,
    ProviderConflict,
    Result,
    SettingsError,
    by_profile,
    check_all,
    parse_duration,
    redact,
    secrets_in,
)
from providers.conformance import ProviderConformance

ROOT = Path(__file__).parents[1]


@attrs.frozen
class Plugin:
    """A provider whose check does what a test wants."""

    name: str = "plugin"
    model_profiles: tuple[str, ...] = ("a",)
    looks: Callable[[], Any] = lambda: Health("ok")

    def check(self) -> Health:
        return self.looks()  # type: ignore[no-any-return]

    def run(self, job: Job) -> Result:
        return Result(job.input)


def listed(*profiles: str, name: str = "plugin", looks: Callable[[], Any] | None = None, secrets: tuple[str, ...] = ()) -> Listed:
    plugin = Plugin(name, profiles, looks or (lambda: Health("ok")))
    return Listed(name=name, origin=f"{name}:Plugin", provider=plugin, secrets=secrets)


# ---------------------------------------------------------------- the description's own example


def described_echo() -> Callable[[Mapping[str, str]], Provider]:
    """The class printed in the module's description."""
    text = inspect.getdoc(providers) or ""
    source = text[text.index("    class Echo:") : text.index("It becomes one by an entry point")]
    scope = vars(providers).copy()
    exec(textwrap.dedent(source), scope)
    return scope["Echo"]  # type: ignore[no-any-return]


def test_the_described_echo_works() -> None:
    echo = described_echo()({"ECHO": "on"})
    assert (echo.check(), echo.run(a_job()).value) == (Health("ok"), {"content": "payload"})
    with pytest.raises(NotConfigured):
        described_echo()({})


def test_the_description_names_the_entry_point_group() -> None:
    assert f'[project.entry-points."{GROUP}"]' in (inspect.getdoc(providers) or "")


# ---------------------------------------------------------------- outcomes and job


def test_not_now_burns_an_attempt_unless_told_otherwise() -> None:
    outcome = NotNow("timeout", "too slow")
    assert (outcome.burns_attempt, outcome.retry_in_seconds, outcome.usage) == (True, None, None)
    assert (str(outcome), outcome.category, outcome.message) == ("timeout: too slow", "timeout", "too slow")


def test_both_outcomes_are_not_completed() -> None:
    assert issubclass(NotNow, NotCompleted)
    assert issubclass(Never, NotCompleted)
    assert not issubclass(Never, NotNow)


@pytest.mark.parametrize("category", ["", "Timeout", "1st", "a b", "a" * 65, "x\n"])
def test_a_category_the_queue_would_refuse_is_refused_here(category: str) -> None:
    with pytest.raises(ValueError, match="a category is"):
        Never(category, "message")


def test_every_listed_category_is_accepted() -> None:
    assert {Never(category, "message").category for category in CATEGORIES} == CATEGORIES


def a_job(**changes: Any) -> Job:
    return Job(id="1", owner_service="o", owner_ref="r", task_type="t", model_profile="a", input="payload", **changes)


def test_a_job_does_not_show_its_input() -> None:
    assert "payload" not in repr(a_job())
    assert "payload" not in repr(Result("payload"))


def test_a_jobs_time_left_never_goes_below_zero() -> None:
    assert a_job().seconds_left() is None
    assert a_job(deadline=time.monotonic() - 5).seconds_left() == 0
    assert 4 < (a_job(deadline=time.monotonic() + 5).seconds_left() or 0) <= 5


def test_jobs_do_not_share_their_cancellation() -> None:
    one, other = a_job(), a_job()
    one.cancelled.set()
    assert not other.cancelled.is_set()


# ---------------------------------------------------------------- discovery, with really installed packages

GOOD = """
    from providers import Health, NotConfigured, Result, SettingsError
    class Good:
        name, model_profiles = "good", ("small", "large")
        def __init__(self, environ): pass
        def check(self): return Health("ok", detail="key is hidden-value", endpoint="http://me:pw@host/")
        def run(self, job): return Result(job.input)
    def absent(environ): raise NotConfigured("GOOD_URL is not set")
    def wrong(environ): raise SettingsError(["GOOD_URL is no address", "GOOD_TIMEOUT is hidden-value"])
    def breaks(environ): raise RuntimeError("cannot use http://me:pw@host/ with hidden-value")
    def leaves(environ): raise SystemExit(3)
    def half(environ): return object()
    class Loose(Good):
        model_profiles = "small"
"""


def install(folder: Path, name: str, source: str, **entries: str) -> None:
    """What an installed package leaves: a module and its metadata."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {target}" for entry, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))


def discovered(folder: Path, then: str = "", **environ: str) -> dict[str, Any]:
    """What a process with these packages installed lists, by name, without the built-in ones."""
    program = f"""
import json, os, sys
from providers import by_profile, check_all, discover
listed = [one for one in discover(os.environ) if not one.origin.startswith("providers.")]
{then}
print(json.dumps({{one.name: [bool(one.provider), one.health and [one.health.status, one.health.detail], one.problems, one.model_profiles]
                  for one in listed}}))
"""
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=paths | environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "hidden-value" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_installed_providers_are_found_by_name(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", GOOD, zebra="one_plugin:Good", ant="one_plugin:Good")
    assert list(discovered(tmp_path)) == ["ant", "zebra"]
    assert discovered(tmp_path)["ant"] == [True, None, [], ["small", "large"]]


def test_a_broken_plugin_is_listed_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    targets = {name: f"one_plugin:{name}" for name in ("absent", "wrong", "breaks", "leaves", "half")}
    install(
        tmp_path,
        "one_plugin",
        GOOD,
        good="one_plugin:Good",
        loose="one_plugin:Loose",
        gone="one_plugin:Gone",
        nowhere="nowhere:X",
        **targets,
    )
    install(tmp_path, "two_plugin", "this is no Python", syntax="two_plugin:X")
    found = discovered(tmp_path, SOME_API_KEY="hidden-value")
    assert {name: entry[1] for name, entry in found.items()} == {
        "good": None,
        "absent": ["not_configured", "GOOD_URL is not set"],
        "wrong": ["unavailable", "GOOD_URL is no address; GOOD_TIMEOUT is [secret]"],
        "breaks": ["unavailable", "RuntimeError: cannot use http://host/ with [secret]"],
        "leaves": ["unavailable", "SystemExit: 3"],
        "half": ["unavailable", "TypeError: object is no provider: it has no name, model_profiles, check, run"],
        "loose": ["unavailable", "TypeError: Loose.model_profiles must be a tuple of names"],
        "gone": ["unavailable", "AttributeError: module 'one_plugin' has no attribute 'Gone'"],
        "nowhere": ["unavailable", "ModuleNotFoundError: No module named 'nowhere'"],
        "syntax": ["unavailable", "SyntaxError: invalid syntax (two_plugin.py, line 1)"],
    }
    assert found["wrong"][2] == ["GOOD_URL is no address", "GOOD_TIMEOUT is [secret]"]
    assert [name for name, entry in found.items() if entry[0]] == ["good"]


def test_a_check_of_a_found_plugin_hides_the_environments_secrets(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", GOOD, good="one_plugin:Good")
    shows = 'item = check_all(listed)[0]; assert (item["detail"], item["endpoint"]) == ("key is [secret]", "http://host/"), item'
    discovered(tmp_path, shows, SOME_API_KEY="hidden-value")


def test_two_plugins_for_one_profile_are_a_conflict_that_names_both(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", GOOD, first="one_plugin:Good")
    install(tmp_path, "two_plugin", GOOD, second="two_plugin:Good")
    conflicts = """
from providers import ProviderConflict
try:
    by_profile(listed)
except ProviderConflict as conflict:
    for word in ("'small'", "first (one_plugin:Good)", "second (two_plugin:Good)"):
        assert word in str(conflict), conflict
else:
    raise SystemExit("no conflict")
"""
    discovered(tmp_path, conflicts)


def test_making_and_checking_the_built_in_provider_imports_nothing_heavy() -> None:
    program = """
import os, sys
from providers.vllm import VLLM
assert VLLM(os.environ).check().status == "ok"
print(sorted({"torch", "numpy", "transformers", "vllm", "openai", "falcon", "pg8000", "pytest", "ai_service"} & set(sys.modules)))
"""
    with fake_vllm() as server:
        environ = server.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# ---------------------------------------------------------------- the conformance suite


@attrs.define
class Well:
    """A provider as it should be; its environment says how it misbehaves."""

    environ: Mapping[str, str]
    name: str = "well"
    model_profiles: tuple[str, ...] = ("a",)

    def __attrs_post_init__(self) -> None:
        if not self.environ:
            raise NotConfigured("WELL is not set")

    def __repr__(self) -> str:
        return "Well()"

    def check(self) -> Health:
        return Health("unavailable", "nobody there") if "away" in self.environ else Health("ok")

    def run(self, job: Job) -> Result:
        if job.input == "bad":
            raise Never(INVALID_INPUT, "bad")
        if "away" in self.environ:
            raise NotNow(UNAVAILABLE, "nobody there", burns_attempt=False)
        if job.cancelled.wait(job.seconds_left() if "hangs" in self.environ else 0):
            raise NotNow(CANCELLED, "cancelled", burns_attempt=False)
        if "hangs" in self.environ:
            raise NotNow(TIMEOUT, "too slow")
        return Result({"content": "fine"}, {"total_tokens": 1})


class OfWell(ProviderConformance):
    good_input = "good"
    bad_input = "bad"
    prompt_seconds = 1.5
    good: Mapping[str, str] = {"WELL_API_KEY": "hidden-value"}
    unreachable: Mapping[str, str] | None = {"away": "yes"}
    hanging: Mapping[str, str] | None = {"hangs": "yes"}
    misbehaves: type[Well] = Well

    def provider(self, environ: Mapping[str, str]) -> Provider:
        return self.misbehaves(environ)


class TestConformanceOfWell(OfWell):
    """The suite passes what is as it should be."""


class Nameless(Well):
    def __attrs_post_init__(self) -> None:
        self.name = ""


class NeedsNothing(Well):
    def __attrs_post_init__(self) -> None:
        pass


class AlwaysAway(Well):
    def check(self) -> Health:
        return Health("unavailable", "nobody there")


class AlwaysFine(Well):
    def check(self) -> Health:
        return Health("ok")


class ReturnsNoJson(Well):
    def run(self, job: Job) -> Result:
        return Result({"content": float("nan")})


class ReturnsNothing(Well):
    def run(self, job: Job) -> Result:
        return None  # type: ignore[return-value]


class TakesAnything(Well):
    def run(self, job: Job) -> Result:
        return Result("fine")


class BurnsAlways(Well):
    def run(self, job: Job) -> Result:
        raise NotNow(UNAVAILABLE, "nobody there")


class NeverStops(Well):
    def run(self, job: Job) -> Result:
        threading.Event().wait(2.5)
        raise NotNow(CANCELLED if job.cancelled.is_set() else TIMEOUT, "too late", burns_attempt=False)


class TellsAll(Well):
    def run(self, job: Job) -> Result:
        raise Never(INVALID_INPUT, f"not with {self.environ.get('WELL_API_KEY')}")


@pytest.mark.parametrize(
    ("misbehaves", "caught_by"),
    [
        (Nameless, "test_it_has_a_name_and_profiles"),
        (NeedsNothing, "test_without_settings_it_is_not_configured"),
        (AlwaysAway, "test_check_of_a_good_server_is_ok_and_quick"),
        (AlwaysFine, "test_check_of_an_unreachable_server_says_so_and_raises_nothing"),
        (ReturnsNoJson, "test_run_returns_json_and_small_usage"),
        (ReturnsNothing, "test_runs_go_side_by_side"),
        (TakesAnything, "test_bad_input_is_never"),
        (BurnsAlways, "test_an_unreachable_server_burns_no_attempt"),
        (NeverStops, "test_a_run_ends_at_its_deadline"),
        (NeverStops, "test_a_cancelled_run_ends_soon"),
        (TakesAnything, "test_a_job_cancelled_before_it_runs_does_not_run"),
        (TellsAll, "test_secrets_do_not_show"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_conformance_suite_catches_what_is_wrong(misbehaves: type[Well], caught_by: str) -> None:
    suite = OfWell()
    suite.misbehaves = misbehaves
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        getattr(suite, caught_by)()


def test_every_test_of_the_conformance_suite_is_proven_to_fail() -> None:
    proven = test_the_conformance_suite_catches_what_is_wrong.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name in dir(ProviderConformance) if name.startswith("test_")} == {caught_by for _, caught_by in proven}


# ---------------------------------------------------------------- profiles


def test_profiles_lead_to_their_providers() -> None:
    one, other = listed("a", "b", name="one"), listed("c", name="other")
    away = Listed(name="away", origin="x:Y", health=Health("not_configured"))
    assert by_profile([one, away, other]) == {"a": one.provider, "b": one.provider, "c": other.provider}


def test_a_provider_may_name_a_profile_twice() -> None:
    assert list(by_profile([listed("a", "a")])) == ["a"]


def test_a_conflict_knows_the_profile_and_the_names() -> None:
    with pytest.raises(ProviderConflict) as conflict:
        by_profile([listed("a", "b", name="one"), listed("b", name="other")])
    assert (conflict.value.profile, conflict.value.names) == ("b", ("one", "other"))


# ---------------------------------------------------------------- checks


def test_check_items_have_what_is_known_and_nothing_else() -> None:
    full = Health("degraded", "hm", models=("m",), endpoint="http://host/v1", latency_ms=1.234)
    away = Listed(name="away", origin="x:Y", health=Health("not_configured", "AWAY_URL is not set"))
    items = check_all([listed("a", looks=lambda: full), listed("b"), away])
    times = [datetime.fromisoformat(item.pop("checked_at")) for item in items]
    assert items == [
        {
            "name": "plugin",
            "status": "degraded",
            "model_profiles": ["a"],
            "models": ["m"],
            "endpoint": "http://host/v1",
            "latency_ms": 1.2,
            "detail": "hm",
        },
        {"name": "plugin", "status": "ok", "model_profiles": ["b"]},
        {"name": "away", "status": "not_configured", "model_profiles": [], "detail": "AWAY_URL is not set"},
    ]
    assert all(abs((datetime.now(UTC) - at).total_seconds()) < 60 for at in times)


def test_checked_at_is_utc_with_a_z() -> None:
    assert check_all([listed("a")])[0]["checked_at"].endswith("Z")


def test_checks_run_side_by_side_and_one_that_hangs_is_given_up() -> None:
    together, ever = threading.Barrier(2, timeout=5), threading.Event()

    def meets() -> Health:
        together.wait()
        return Health("ok")

    began = time.monotonic()
    items = check_all([listed("a", looks=ever.wait), listed("b", looks=meets), listed("c", looks=meets)], limit_seconds=0.5)
    ever.set()
    assert time.monotonic() - began < 10
    assert [item["status"] for item in items] == ["unavailable", "ok", "ok"]
    assert items[0]["detail"] == "did not answer within 0.5 s"


def test_a_check_that_raises_is_a_finding() -> None:
    def breaks() -> Health:
        raise RuntimeError("http://me:pw@host/ refused hidden-value")

    item = check_all([listed("a", looks=breaks, secrets=("hidden-value",))])[0]
    assert (item["status"], item["detail"]) == ("unavailable", "its check failed with RuntimeError: http://host/ refused [secret]")


def test_a_check_that_returns_something_else_is_a_finding() -> None:
    item = check_all([listed("a", looks=lambda: "ok")])[0]
    assert (item["status"], item["detail"]) == ("unavailable", "its check returned str, not Health")


def test_health_knows_four_statuses() -> None:
    with pytest.raises(ValueError, match="'status' must be in"):
        Health("fine")  # type: ignore[arg-type]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("90s", 90),
        ("1h30m", 5_400),
        ("2d", 172_800),
        ("1d2h3m4s", 93_784),
        ("30", 30),
        ("0.5", 0.5),
        ("1.5h", 5_400),
        (" 5m ", 300),
        ("0", 0),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "m5", "5 m", "5M", "-5", "5m1h", "1h30", "1e3", "nan", "inf", "forever", "5ms", "٥m", "5m\n5m", "1_0", ".5", "9" * 400],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.integers(0, 999), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_durations_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration(text) >= 0


def test_secrets_are_known_by_the_names_of_their_settings() -> None:
    environ = {"LLM_API_KEY": "long-secret", "a_token": "other-secret", "DB_PASSWORD": "short", "LLM_MODEL": "qwen2.5-14b", "X_SECRET": ""}
    assert secrets_in(environ) == ("other-secret", "long-secret")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host/v1", "http://host/v1"),
        ("see postgres://me:p@ss@host:5/x and https://k@h", "see postgres://host:5/x and https://h"),
        ("mail me@host", "mail me@host"),
        ("key abc-secret, abc-secret-long", "key [secret], [secret]"),
    ],
)
def test_redacted_text_has_no_secrets_and_no_user_info(text: str, shown: str) -> None:
    assert redact(text, ("abc-secret-long", "abc-secret")) == shown


def test_settings_errors_hold_every_problem() -> None:
    error = SettingsError(["A is wrong", "B is wrong"])
    assert (error.problems, str(error)) == (("A is wrong", "B is wrong"), "A is wrong; B is wrong")


def test_public_names_are_there() -> None:
    assert all(hasattr(providers, name) for name in providers.__all__)
