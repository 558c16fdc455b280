"""The provider contract: outcomes, discovery of good and broken plugins, the conformance suite, routes, checks, settings, secrets."""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import pytest
from fake_vllm import fake_vllm
from hypothesis import given
from hypothesis import strategies as st
from urllib3.util import Url

import providers
import providers.settings
from providers import (
    CANCELLED,
    CATEGORIES,
    GROUP,
    INTERNAL,
    INVALID_INPUT,
    TIMEOUT,
    UNAVAILABLE,
    UNSUPPORTED,
    Health,
    Job,
    Listed,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Provider,
    Result,
    SettingsError,
    Unsupported,
    by_profile,
    check_all,
    parse_duration,
    provider_settings,
    redact,
    secrets_in,
    setting,
)
from providers.conformance import ProviderConformance, closed_port, silent_server
from providers.settings import (
    SHORTEST_SECRET,
    authorization,
    declared,
    duration,
    flag,
    header_word,
    pairs,
    profile_name,
    read_settings,
    shown_settings,
    web_address,
    whole,
)

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


def test_not_now_burns_an_attempt_unless_told_otherwise() -> None:
    outcome = NotNow("timeout", "too slow")
    assert (outcome.burns_attempt, outcome.retry_in_seconds, outcome.usage) == (True, None, None)
    assert (str(outcome), outcome.category, outcome.message) == ("timeout: too slow", "timeout", "too slow")


def test_the_outcomes_are_not_completed_and_none_is_another() -> None:
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
    class Spaced(Good):
        model_profiles = ("two words",)
"""

DECLARING = """
    import attrs
    from providers import Health, Result, provider_settings, setting
    from providers.settings import duration, header_word, web_address
    @attrs.frozen(kw_only=True)
    class Settings:
        url: object = setting("DECLARED_URL", "where it is", read=web_address, required=True)
        pin: str = setting("DECLARED_PIN", "what lets it in", read=header_word, secret=True)
        timeout: float = setting("DECLARED_TIMEOUT", "its limit", default="30s", read=duration())
    class Declaring:
        name, model_profiles, settings = "declaring", ("small",), Settings
        def __init__(self, environ):
            self._environ, self._settings = environ, provider_settings(Settings, environ)
        def check(self): return Health("degraded", detail=f"refused {self._settings.pin}", endpoint=self._environ["DECLARED_URL"])
        def run(self, job): return Result(job.input)
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
print(json.dumps({{one.name: [bool(one.provider), one.health and [one.health.status, one.health.detail], one.problems, one.model_profiles,
                             dict(one.settings)] for one in listed}}))
"""
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=paths | environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "hidden-value" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_installed_providers_are_found_by_name(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", GOOD, zebra="one_plugin:Good", ant="one_plugin:Good")
    assert list(discovered(tmp_path)) == ["ant", "zebra"]
    assert discovered(tmp_path)["ant"] == [True, None, [], ["small", "large"], {}]


def test_a_broken_plugin_is_listed_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    targets = {name: f"one_plugin:{name}" for name in ("absent", "wrong", "breaks", "leaves", "half")}
    install(
        tmp_path,
        "one_plugin",
        GOOD,
        good="one_plugin:Good",
        loose="one_plugin:Loose",
        spaced="one_plugin:Spaced",
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
        "spaced": ["unavailable", "ValueError: 'two words' cannot be a model profile: 1 to 100 letters, digits or . _ : / @ + -"],
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


def test_declared_settings_are_listed_without_secrets(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", DECLARING, declaring="one_plugin:Declaring")
    shows = """item = check_all(listed)[0]
assert (item["detail"], item["endpoint"]) == ("refused [secret]", "http://host/"), item"""
    environ = {"DECLARED_URL": "http://me:hidden-value@host/", "DECLARED_PIN": "hidden-value-too"}
    made, health, problems, profiles, settings = discovered(tmp_path, shows, **environ)["declaring"]
    assert (made, health, problems, profiles) == (True, None, [], ["small"])
    assert settings == {"DECLARED_URL": "http://host/", "DECLARED_PIN": "(set)", "DECLARED_TIMEOUT": "30s (default)"}


def test_declared_settings_are_listed_where_they_are_absent_or_wrong_too(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", DECLARING, declaring="one_plugin:Declaring")
    _, health, _, _, settings = discovered(tmp_path)["declaring"]
    assert health == ["not_configured", "DECLARED_URL is not set"]
    assert settings == {"DECLARED_URL": "(not set)", "DECLARED_PIN": "(not set)", "DECLARED_TIMEOUT": "30s (default)"}
    wrong = {"DECLARED_URL": "ftp://host", "DECLARED_PIN": "hidden-value with spaces", "DECLARED_TIMEOUT": "hidden-value with spaces"}
    _, health, problems, _, settings = discovered(tmp_path, **wrong)["declaring"]
    assert [problem.partition(":")[0] for problem in problems] == ["DECLARED_URL", "DECLARED_PIN", "DECLARED_TIMEOUT"]
    assert health == ["unavailable", "; ".join(problems)]
    assert settings == {"DECLARED_URL": "ftp://host", "DECLARED_PIN": "(set)", "DECLARED_TIMEOUT": "[secret]"}


def test_two_plugins_for_one_profile_need_an_order(tmp_path: Path) -> None:
    install(tmp_path, "one_plugin", GOOD, first="one_plugin:Good")
    install(tmp_path, "two_plugin", GOOD, second="two_plugin:Good")
    routes = """
from providers import SettingsError
try:
    by_profile(listed)
except SettingsError as wrong:
    assert [problem.partition(":")[0] for problem in wrong.problems] == [
        f"{profile} is served by first (one_plugin" for profile in ("small", "large")], wrong
    assert "PROFILE_PROVIDERS=small=first,second" in wrong.problems[0], wrong
else:
    raise SystemExit("no conflict")
routes = by_profile(listed, {"small": ["second", "first"], "large": ["first"]})
assert [one.name for one in routes["small"]] == ["second", "first"]
assert [one.name for one in routes["large"]] == ["first"]
"""
    discovered(tmp_path, routes)


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


@attrs.frozen(kw_only=True)
class WellSettings:
    url: Url = setting("WELL_URL", "where it is", read=web_address, required=True)
    key: str | None = setting("WELL_PIN", "what lets it in", read=header_word, secret=True)
    timeout_seconds: float = setting("WELL_TIMEOUT", "limit of one attempt", default="30s", read=duration())


class Well:
    """A provider as it should be; the host in its settings says how its model service does."""

    name = "well"
    model_profiles: tuple[str, ...] = ("a",)
    settings: Any = WellSettings

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.told = provider_settings(WellSettings, environ)
        self.host = self.told.url.host

    def check(self) -> Health:
        return Health("unavailable", "nobody there") if self.host == "away.test" else Health("ok")

    def run(self, job: Job) -> Result:
        if job.cancelled.is_set():
            raise self.cancelled()
        if job.seconds_left() == 0:
            raise self.late()
        return self.work(job)

    def work(self, job: Job) -> Result:
        if job.input == "unsupported":
            raise Unsupported("not here")
        if not isinstance(job.input, str):
            raise self.bad(job)
        if self.host == "away.test":
            raise self.away()
        if self.host == "hangs.test":
            raise self.hangs(job)
        job.report_progress({"done": 1})
        return Result({"content": job.input}, {"total_tokens": 1})

    def cancelled(self) -> NotCompleted:
        return NotNow(CANCELLED, "cancelled", burns_attempt=False)

    def late(self) -> NotCompleted:
        return NotNow(TIMEOUT, "too late", burns_attempt=False)

    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "a text is wanted")

    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there", burns_attempt=False)

    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(CANCELLED, "ended") if job.cancelled.wait(job.seconds_left()) else NotNow(TIMEOUT, "ended")


class OfWell(ProviderConformance):
    good_input = "good"
    other_inputs = ("other",)
    bad_input = 5
    unsupported_input = "unsupported"
    check_seconds = prompt_seconds = 1.0
    soon_seconds = 0.02
    good: Mapping[str, str] = {"WELL_URL": "http://good.test", "WELL_PIN": "hidden-value"}
    unreachable: Mapping[str, str] | None = {"WELL_URL": "http://away.test", "WELL_OTHER": "hidden-too"}
    hanging: Mapping[str, str] | None = {"WELL_URL": "http://hangs.test"}
    misbehaves: type[Well] = Well

    def provider(self, environ: Mapping[str, str]) -> Provider:
        return self.misbehaves(environ)


class TestConformanceOfWell(OfWell):
    """The suite passes what is as it should be."""


class Nameless(Well):
    name = ""


class ServesTwoWords(Well):
    model_profiles = ("two words",)


class ServesAList(Well):
    model_profiles: Any = ["a"]  # noqa: RUF012 -- that is what is wrong with it


class SaysNothingOfWhatIsAbsent(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        try:
            super().__init__(environ)
        except NotConfigured:
            raise NotConfigured from None


class NeedsNothing(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__({"WELL_URL": "http://good.test"} if not environ.get("WELL_URL", "").strip() else environ)


class TakesABlankForASetting(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__({"WELL_URL": "http://good.test"} if environ.get("WELL_URL") == " " else environ)


class DeclaresNothing(Well):
    settings = None


def declares(one: Any) -> type[Well]:
    """A provider that declares this as well."""
    return type("Declares", (Well,), {"settings": attrs.make_class("Declared", {"other": one}, bases=(WellSettings,), kw_only=True)})


class ReadsInSecret(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        self.hidden = environ.get("WELL_HIDDEN")


class TellsOneProblemAtATime(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        try:
            super().__init__(environ)
        except SettingsError as wrong:
            raise SettingsError(wrong.problems[:1]) from None


class TellsTheWrongSecret(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        try:
            super().__init__(environ)
        except SettingsError as wrong:
            raise SettingsError([*wrong.problems, f"not with {environ['WELL_PIN']}"]) from None


class AlwaysAway(Well):
    def check(self) -> Health:
        return Health("unavailable", "nobody there")


class AlwaysFine(Well):
    def check(self) -> Health:
        return Health("ok", "as ever")


class AwayInSilence(Well):
    def check(self) -> Health:
        return attrs.evolve(super().check(), detail=None)


class ChecksNothing(Well):
    def check(self) -> Health:
        return None if self.host == "hangs.test" else super().check()  # type: ignore[return-value]


class ChecksForEver(Well):
    def check(self) -> Health:
        if self.host == "hangs.test":
            threading.Event().wait(1.1)
        return super().check()


class ChecksAlone(Well):
    at_once = 0

    def check(self) -> Health:
        if self.at_once:
            raise RuntimeError("somebody else is looking")
        self.at_once += 1
        threading.Event().wait(0.02)
        self.at_once -= 1
        return super().check()


class ReturnsNoJson(Well):
    def work(self, job: Job) -> Result:
        return Result({**super().work(job).value, "score": float("inf")})


class CountsAtLength(Well):
    def work(self, job: Job) -> Result:
        # Well formed where the outcomes are looked at: those jobs have a deadline.
        return Result(super().work(job).value, {"words": ["x" * 5000] if job.deadline is None else []})


class RunsBeforeItsCheckOnly(Well):
    is_checked = False

    def check(self) -> Health:
        self.is_checked = True
        return super().check()

    def work(self, job: Job) -> Result:
        if self.is_checked:
            raise RuntimeError("closed")
        return super().work(job)


class ReportsAtLength(Well):
    def work(self, job: Job) -> Result:
        job.report_progress({"text": "x" * 5000})
        return super().work(job)


class ReportsAList(Well):
    def work(self, job: Job) -> Result:
        job.report_progress([1, 2])  # type: ignore[arg-type]
        return super().work(job)


class RunsAlone(Well):
    at_once = 0

    def work(self, job: Job) -> Result:
        if self.at_once:
            raise RuntimeError("somebody else runs")
        self.at_once += 1
        try:
            job.cancelled.wait(0.01)
            return super().work(job)
        finally:
            self.at_once -= 1


class MixesUp(Well):
    def work(self, job: Job) -> Result:
        self.input = job.input
        job.cancelled.wait(0.01)
        return super().work(attrs.evolve(job, input=self.input))


class TakesAnything(Well):
    def work(self, job: Job) -> Result:
        return super().work(job if isinstance(job.input, str) else attrs.evolve(job, input="anything"))


class NeverDoesIt(Well):
    def work(self, job: Job) -> Result:
        if job.input == "unsupported":
            raise Never(INVALID_INPUT, "not here")
        return super().work(job)


class BreaksOnAnObject(Well):
    def work(self, job: Job) -> Result:
        if isinstance(job.input, dict):
            raise KeyError("text")
        return super().work(job)


class QuotesItsInput(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, f"{job.input} is no text")


class BurnsAlways(Well):
    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there")


class CallsAnAbsenceInternal(Well):
    def away(self) -> NotCompleted:
        return NotNow(INTERNAL, "nobody there", burns_attempt=False)


class SpeaksInLines(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "a text\nis wanted")


class SaysNothing(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "")


class SaysTooMuch(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "x" * 5000)


class NamesNoCategory(Well):
    def bad(self, job: Job) -> NotCompleted:
        outcome = Never(INVALID_INPUT, "a text is wanted")
        outcome.category = "Invalid input"
        return outcome


class CountsTooMuch(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "a text is wanted", usage={"words": ["x" * 5000]})


class AsksForEver(Well):
    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there", burns_attempt=False, retry_in_seconds=float("inf"))


class AsksForThePast(Well):
    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there", burns_attempt=False, retry_in_seconds=-1)


class RaisesTheBaseClass(Well):
    def work(self, job: Job) -> Result:
        # The test of unsupported input alone gives no deadline.
        if job.input == "unsupported" and job.deadline is not None:
            raise NotCompleted(INVALID_INPUT, "not here")
        return super().work(job)


class IgnoresItsDeadline(Well):
    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(CANCELLED if job.cancelled.wait(1.1) else TIMEOUT, "ended")


class CallsItsDeadlineInternal(Well):
    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(CANCELLED if job.cancelled.wait(job.seconds_left()) else INTERNAL, "ended")


class IgnoresThePast(Well):
    def run(self, job: Job) -> Result:
        return super().run(attrs.evolve(job, deadline=None) if job.seconds_left() == 0 else job)


class CallsThePastInternal(Well):
    def late(self) -> NotCompleted:
        return NotNow(INTERNAL, "too late", burns_attempt=False)


class BurnsThePast(Well):
    def late(self) -> NotCompleted:
        return NotNow(TIMEOUT, "too late")


class IgnoresACancellation(Well):
    def hangs(self, job: Job) -> NotCompleted:
        left = job.seconds_left()
        threading.Event().wait(1.1 if left is None else left)
        return NotNow(CANCELLED if job.cancelled.is_set() else TIMEOUT, "ended")


class CallsACancellationInternal(Well):
    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(INTERNAL if job.cancelled.wait(job.seconds_left()) else TIMEOUT, "ended")


class BeginsWhatWasCancelled(Well):
    def run(self, job: Job) -> Result:
        return self.work(job) if job.cancelled.is_set() else super().run(job)


class CallsAnEarlyCancellationInternal(Well):
    def cancelled(self) -> NotCompleted:
        return NotNow(INTERNAL, "cancelled", burns_attempt=False)


class ShowsItsSettings(Well):
    def __repr__(self) -> str:
        return f"ShowsItsSettings(key={self.told.key})"


class ChecksWithItsKey(Well):
    def check(self) -> Health:
        return attrs.evolve(super().check(), detail=f"asked with {self.told.key}")


class TellsItsKey(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, f"not with {self.told.key}")


class ReturnsItsKey(Well):
    def work(self, job: Job) -> Result:
        return Result({**super().work(job).value, "headers": {"Authorization": f"Bearer {self.told.key}"}})


BAD: dict[str, list[type[Well]]] = {
    "test_it_has_a_name_and_profiles": [Nameless, ServesTwoWords, ServesAList],
    "test_without_settings_it_is_not_configured": [NeedsNothing, TakesABlankForASetting, SaysNothingOfWhatIsAbsent],
    "test_its_settings_are_declared": [
        DeclaresNothing,
        declares(setting("WELL_OTHER", "")),
        declares(setting("WELL_OTHER", "a\nb")),
        declares(setting("well_other", "something")),
        declares(setting("WELL_URL", "where it is, again", required=True)),
        declares(setting("WELL_OTHER", "lets others in", default="0000", secret=True)),
    ],
    "test_it_reads_no_setting_that_it_does_not_declare": [ReadsInSecret],
    "test_wrong_settings_are_told_all_at_once": [TellsOneProblemAtATime, TellsTheWrongSecret],
    "test_check_of_a_good_server_is_ok_and_quick": [AlwaysAway],
    "test_check_of_an_unreachable_server_says_so_and_raises_nothing": [AlwaysFine, AwayInSilence],
    "test_checks_of_a_hanging_server_go_side_by_side_and_end": [ChecksForEver, ChecksAlone, ChecksNothing],
    "test_run_returns_json_and_small_usage": [ReturnsNoJson, CountsAtLength],
    "test_a_run_after_a_check_is_as_good": [RunsBeforeItsCheckOnly],
    "test_progress_is_small_json_objects": [ReportsAtLength, ReportsAList],
    "test_runs_go_side_by_side_and_do_not_mix": [RunsAlone, MixesUp],
    "test_bad_input_is_never": [TakesAnything],
    "test_unsupported_input_is_left_to_another_provider": [NeverDoesIt],
    "test_strange_input_breaks_nothing_and_is_not_quoted": [BreaksOnAnObject, QuotesItsInput],
    "test_an_unreachable_server_burns_no_attempt": [BurnsAlways, CallsAnAbsenceInternal],
    "test_outcomes_are_well_formed": [
        SpeaksInLines,
        SaysNothing,
        SaysTooMuch,
        NamesNoCategory,
        CountsTooMuch,
        AsksForEver,
        AsksForThePast,
        RaisesTheBaseClass,
    ],
    "test_a_run_ends_at_its_deadline": [IgnoresItsDeadline, CallsItsDeadlineInternal],
    "test_a_job_whose_deadline_has_passed_does_not_run": [IgnoresThePast, CallsThePastInternal, BurnsThePast],
    "test_a_cancelled_run_ends_soon": [IgnoresACancellation, CallsACancellationInternal],
    "test_a_job_cancelled_before_it_runs_does_not_run": [BeginsWhatWasCancelled, CallsAnEarlyCancellationInternal],
    "test_secrets_do_not_show": [ShowsItsSettings, ChecksWithItsKey, TellsItsKey, ReturnsItsKey],
}
ROWS = [(misbehaves, check) for check, kinds in BAD.items() for misbehaves in kinds]
EVERY_CHECK = [name for name in dir(ProviderConformance) if name.startswith("test_")]


def ending_of(test: Callable[[], None]) -> BaseException | None:
    """What a test of the suite ended with, None when it passed."""
    try:
        test()
    except (Exception, pytest.skip.Exception, pytest.fail.Exception) as ending:  # noqa: BLE001 -- whatever a bad provider raises
        return ending
    return None


def endings(suite: ProviderConformance) -> dict[str, BaseException]:
    """The tests of the suite that did not pass."""
    ended = {name: ending_of(getattr(suite, name)) for name in EVERY_CHECK}
    return {name: ending for name, ending in ended.items() if ending is not None}


def caught_by(suite: ProviderConformance) -> list[str]:
    """The tests of the suite that fail."""
    return [name for name, ending in endings(suite).items() if not isinstance(ending, pytest.skip.Exception)]


@pytest.mark.parametrize(("misbehaves", "check"), ROWS, ids=[misbehaves.__name__ for misbehaves, _ in ROWS])
def test_what_is_wrong_with_a_provider_fails_its_own_test_and_no_other(misbehaves: type[Well], check: str) -> None:
    suite = OfWell()
    suite.misbehaves = misbehaves
    assert caught_by(suite) == [check]


def test_every_test_of_the_conformance_suite_is_proven_to_fail() -> None:
    assert set(BAD) == set(EVERY_CHECK)


def test_a_provider_that_serves_no_profile_is_caught() -> None:
    suite = OfWell()
    suite.misbehaves = type("ServesNothing", (Well,), {"model_profiles": ()})
    with pytest.raises(AssertionError, match="a provider serves a profile"):
        suite.test_it_has_a_name_and_profiles()


def test_every_check_has_its_limit() -> None:
    suite, ever = OfWell(), threading.Event()
    suite.misbehaves = type("ChecksLong", (Well,), {"check": lambda self: ever.wait(10) and Well.check(self)})
    suite.check_seconds = 0.05
    for check in (check for check in EVERY_CHECK if check.startswith("test_check")):
        with pytest.raises(pytest.fail.Exception, match=r"it went on for more than 0\.05 s"):
            getattr(suite, check)()
    ever.set()


def test_a_secret_that_no_environment_sets_is_not_taken_for_hidden() -> None:
    suite = OfWell()
    suite.good = {"WELL_URL": "http://good.test", "WELL_PIN": "short"}
    with pytest.raises(AssertionError, match="set WELL_PIN to 6 characters or more"):
        suite.test_secrets_do_not_show()


@pytest.mark.parametrize(
    ("left_out", "skipped"),
    [("unreachable", 2), ("hanging", 3), ("bad_input", 1), ("unsupported_input", 1)],
)
def test_what_a_suite_leaves_out_is_skipped_and_nothing_else(left_out: str, skipped: int) -> None:
    suite = OfWell()
    setattr(suite, left_out, None)
    assert [str(ending) for ending in endings(suite).values()] == [f"nothing is declared as {left_out}"] * skipped


def test_a_suite_without_other_inputs_still_runs_jobs_side_by_side() -> None:
    suite = OfWell()
    suite.other_inputs, suite.misbehaves = (), RunsAlone
    assert caught_by(suite) == ["test_runs_go_side_by_side_and_do_not_mix"]


def test_other_inputs_whose_results_are_alike_are_refused() -> None:
    suite = OfWell()
    suite.other_inputs = ("other", "other")
    with pytest.raises(AssertionError, match="need results that differ"):
        suite.test_runs_go_side_by_side_and_do_not_mix()


def test_a_silent_server_takes_a_connection_and_a_closed_port_does_not() -> None:
    with silent_server() as silent, closed_port() as closed:
        with socket.create_connection(address_of(silent), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address_of(closed), timeout=5)


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


# ---------------------------------------------------------------- profiles


def test_profiles_lead_to_their_providers() -> None:
    one, other = listed("a", "b", name="one"), listed("c", name="other")
    away = Listed(name="away", origin="x:Y", health=Health("not_configured"))
    assert by_profile([one, away, other]) == {"a": (one,), "b": (one,), "c": (other,)}


def test_a_provider_may_name_a_profile_twice() -> None:
    one = listed("a", "a")
    assert by_profile([one]) == {"a": (one,)}


def test_an_order_says_who_runs_a_profile_and_in_which_turn() -> None:
    one, other, third = listed("a", "b", name="one"), listed("a", "b", name="other"), listed("a", name="third")
    routes = by_profile([one, other, third], {"a": ["third", "one"], "b": ["other"]})
    assert routes == {"a": (third, one), "b": (other,)}


def test_an_order_passes_over_a_provider_that_could_not_be_made() -> None:
    one = listed("a", name="one")
    away = Listed(name="away", origin="x:Y", health=Health("not_configured"))
    assert by_profile([one, away], {"a": ["away", "one"]}) == {"a": (one,)}


def test_all_that_is_wrong_with_the_routes_is_told_at_once() -> None:
    one, other = listed("a", "b", name="one"), listed("b", "c", name="other")
    away = Listed(name="away", origin="x:Y", health=Health("not_configured"))
    with pytest.raises(SettingsError) as wrong:
        by_profile([one, other, away], {"a": ["other", "nobody"], "d": ["away"]})
    assert wrong.value.problems == (
        "a is to be served by nobody, which is not installed",
        "a is to be served by other, which does not serve it",
        "d is to be served by away: none of them is set up",
        "b is served by one (one:Plugin) and other (other:Plugin): name their order, as in PROFILE_PROVIDERS=b=one,other",
    )


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


# ---------------------------------------------------------------- settings: declaration and reading


class TwoProblems(ValueError):
    problems = ("one thing is wrong", "so is another")


def raises_two(_text: str) -> None:
    raise TwoProblems


@attrs.frozen(kw_only=True)
class Sample:
    """A setting of each kind, and a field that is none."""

    url: Url = setting("SAMPLE_URL", "where it is", read=web_address, required="look into the manual")
    owner: str = setting("SAMPLE_OWNER", "whose it is", required=True)
    pin: str | None = setting("SAMPLE_PIN", "what lets it in", read=header_word, secret=True)
    _wait_seconds: float = setting("SAMPLE_WAIT", "how long it waits", default="1m", read=duration(1, 600))
    most: int = setting("SAMPLE_MOST", "how many", default="4", read=whole(1, 10))
    mark: str = "no setting"

    def problems(self) -> Iterator[str]:
        if self.owner == "nobody" and self.pin:
            yield "SAMPLE_OWNER is nobody, and SAMPLE_PIN is set"
            yield "nobody needs no pin"


SAMPLE = {"SAMPLE_URL": "http://host", "SAMPLE_OWNER": "me"}


def test_settings_are_declared_in_their_order_with_all_that_a_table_needs() -> None:
    assert [one.name for one in declared(Sample)] == ["SAMPLE_URL", "SAMPLE_OWNER", "SAMPLE_PIN", "SAMPLE_WAIT", "SAMPLE_MOST"]
    url, owner, pin, wait, _ = declared(Sample)
    assert (wait.about, wait.default, wait.secret, wait.required) == ("how long it waits", "1m", False, None)
    assert (url.required, owner.required) == ("SAMPLE_URL is not set; look into the manual", "SAMPLE_OWNER is not set")
    assert (pin.secret, pin.default, pin.required) == (True, None, None)


def test_settings_are_read_and_defaults_go_through_the_same_reader() -> None:
    read = read_settings(Sample, {**SAMPLE, "SAMPLE_PIN": " 1234 ", "SAMPLE_MOST": "7", "OTHER": "x"}, mark="mine")
    assert (read.url.url, read.owner, read.pin, read.most, read.mark) == ("http://host", "me", "1234", 7, "mine")
    assert read._wait_seconds == 60


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_variable_counts_as_not_set(blank: str) -> None:
    read = read_settings(Sample, {**SAMPLE, "SAMPLE_MOST": blank, "SAMPLE_PIN": blank})
    assert (read.most, read.pin) == (4, None)
    with pytest.raises(NotConfigured):
        provider_settings(Sample, {**SAMPLE, "SAMPLE_URL": blank})


def test_settings_made_by_hand_have_the_same_defaults_and_need_what_is_required() -> None:
    made = Sample(url=web_address("http://host"), owner="me")
    assert made == read_settings(Sample, SAMPLE)
    with pytest.raises(TypeError, match="owner"):
        Sample(url=made.url)  # type: ignore[call-arg]


def test_no_setting_shows_in_repr_for_an_address_may_hold_a_password() -> None:
    shown = repr(read_settings(Sample, {**SAMPLE, "SAMPLE_PIN": "hidden-value", "SAMPLE_URL": "http://me:pass-word@host"}))
    assert "hidden-value" not in shown
    assert "pass-word" not in shown


def test_a_run_is_allowed_its_limit_or_what_is_left_and_nothing_when_it_is_too_late() -> None:
    assert a_job().seconds_allowed(60) == 60
    assert 5 < a_job(deadline=time.monotonic() + 10).seconds_allowed(60) <= 10
    cancelled = threading.Event()
    cancelled.set()
    for job, category in (a_job(deadline=time.monotonic() - 1), "timeout"), (a_job(cancelled=cancelled), "cancelled"):
        with pytest.raises(NotNow) as late:
            job.seconds_allowed(60)
        assert (late.value.category, late.value.burns_attempt) == (category, False)


def test_slips_in_an_outcome_or_in_health_break_nothing_further_on() -> None:
    assert Never("invalid_input", ValueError("no audio")).message == "no audio"  # type: ignore[arg-type]
    assert NotNow("unavailable", "later", retry_in_seconds="30").retry_in_seconds == 30  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="soon"):
        NotNow("unavailable", "later", retry_in_seconds="soon")  # type: ignore[arg-type]
    assert Health("unavailable", OSError("gone"), models=[1]) == Health("unavailable", "gone", models=("1",))  # type: ignore[arg-type]


def test_two_providers_of_one_name_are_refused() -> None:
    with pytest.raises(SettingsError, match="same is the name of several providers"):
        by_profile([listed("a", name="same"), listed("b", name="same")])


def test_all_wrong_settings_are_told_at_once_in_their_order() -> None:
    with pytest.raises(SettingsError) as wrong:
        read_settings(Sample, {"SAMPLE_URL": "host", "SAMPLE_PIN": "two words", "SAMPLE_WAIT": "1h", "SAMPLE_MOST": "11"})
    assert wrong.value.problems == (
        "SAMPLE_URL: must be an address that begins with http:// or https:// and names a host",
        "SAMPLE_OWNER is not set",
        "SAMPLE_PIN: must be printable ASCII without spaces",
        "SAMPLE_WAIT: must be from 1 to 600 seconds",
        "SAMPLE_MOST: must be a whole number from 1 to 10",
    )


def test_a_reader_may_have_several_things_to_say() -> None:
    kind = attrs.make_class("Kind", {"both": setting("SAMPLE_BOTH", "two things", read=raises_two)})
    with pytest.raises(SettingsError) as wrong:
        read_settings(kind, {"SAMPLE_BOTH": "x"})
    assert wrong.value.problems == ("SAMPLE_BOTH: one thing is wrong", "SAMPLE_BOTH: so is another")


def test_what_is_absent_is_not_configured_and_the_hint_says_what_to_do() -> None:
    with pytest.raises(NotConfigured) as absent:
        provider_settings(Sample, {"SAMPLE_MOST": "wrong"})
    assert str(absent.value) == "SAMPLE_URL is not set; look into the manual; SAMPLE_OWNER is not set"


def test_what_is_there_and_wrong_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"^SAMPLE_MOST: must be"):
        provider_settings(Sample, {**SAMPLE, "SAMPLE_MOST": "wrong"})
    assert provider_settings(Sample, SAMPLE).most == 4


def test_settings_that_contradict_each_other_are_told_once_each_is_right() -> None:
    at_odds = {**SAMPLE, "SAMPLE_OWNER": "nobody", "SAMPLE_PIN": "1234"}
    with pytest.raises(SettingsError) as wrong:
        read_settings(Sample, at_odds)
    assert wrong.value.problems == ("SAMPLE_OWNER is nobody, and SAMPLE_PIN is set", "nobody needs no pin")
    with pytest.raises(SettingsError, match=r"^SAMPLE_MOST: must be") as wrong:
        read_settings(Sample, {**at_odds, "SAMPLE_MOST": "0"})
    assert len(wrong.value.problems) == 1


def test_settings_errors_hold_every_problem() -> None:
    error = SettingsError(["A is wrong", "B is wrong"])
    assert (error.problems, str(error)) == (("A is wrong", "B is wrong"), "A is wrong; B is wrong")


@given(st.dictionaries(st.sampled_from([one.name for one in declared(Sample)]), st.text(max_size=20)))
def test_any_environment_is_read_or_refused_with_sentences_that_name_the_setting(environ: dict[str, str]) -> None:
    problems: tuple[str, ...] = ()
    try:
        read_settings(Sample, environ)
    except SettingsError as wrong:
        problems = wrong.problems
    untold = [problem for problem in problems if not re.match(r"SAMPLE_[A-Z]+( |: )", problem)]
    assert untold in ([], ["nobody needs no pin"])
    assert problems or {"SAMPLE_URL", "SAMPLE_OWNER"} <= set(environ)


# ---------------------------------------------------------------- settings: readers


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


@pytest.mark.parametrize(("text", "fits"), [("1s", True), ("10m", True), ("0.999", False), ("601", False), ("0", False)])
def test_durations_have_bounds_that_belong_to_them(text: str, fits: bool) -> None:
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="must be from 1 to 600 seconds"):
        assert duration(1, 600)(text) == parse_duration(text)


@pytest.mark.parametrize("text", ["0", "25h"])
def test_a_duration_is_more_than_nothing_and_at_most_a_day_unless_told_otherwise(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be from 0\.001 to 86400 seconds"):
        duration()(text)


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on", "On"])
def test_flags_that_are_set(text: str) -> None:
    assert flag(text) is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off"])
def test_flags_that_are_not_set(text: str) -> None:
    assert flag(text) is False


@pytest.mark.parametrize("text", ["perhaps", "2", "", "y", "none"])
def test_what_is_no_flag_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be true or false"):
        flag(text)


@given(st.integers(0, 10**20), st.integers(0, 1000), st.integers(0, 1000))
def test_a_whole_number_is_read_within_its_bounds_and_refused_outside(number: int, low: int, width: int) -> None:
    reader, high = whole(low, low + width), low + width
    with contextlib.nullcontext() if low <= number <= high else pytest.raises(ValueError, match=f"from {low} to {high}$"):
        assert reader(str(number)) == number


def test_a_whole_number_may_be_long() -> None:
    assert whole(0, 1 << 50)(str(1 << 50)) == 1 << 50
    assert whole(0, 1 << 50)("007") == 7


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e1", "0x1", "1_0", "١", "1 ", "1\n", "9" * 5_000])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 0 to 99"):
        whole(0, 99)(text)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1))
def test_a_key_may_hold_all_that_a_header_can(text: str) -> None:
    assert header_word(text) == text


@pytest.mark.parametrize("text", ["", "two words", "line\nbreak", "line\n", "tab\t", "ключ", "nul\0"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be printable ASCII without spaces$"):
        header_word(text)


@given(st.from_regex(r"[A-Za-z0-9._:/@+-]{1,100}", fullmatch=True))
def test_a_profile_name_is_what_the_service_takes(text: str) -> None:
    assert profile_name(text) == text


@pytest.mark.parametrize("text", ["", "two words", "a" * 101, "a,b", "a;b", "a=b", "профиль", "a\n"])
def test_what_is_no_profile_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 100 letters"):
        profile_name(text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        (" a = 1 , b=x=y,", {"a": "1", "b": "x=y"}),
        ("qwen/2.5:14b=http://host/v1", {"qwen/2.5:14b": "http://host/v1"}),
    ],
)
def test_pairs_are_read(text: str, read: dict[str, str]) -> None:
    assert pairs(text) == read


def test_pairs_may_be_separated_by_something_else() -> None:
    assert pairs("a=1,2; b=3", ";") == {"a": "1,2", "b": "3"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a", "'a' is not of the form profile=value"),
        ("a=", "'a=' is not of the form"),
        ("=1", "must be 1 to 100 letters"),
        ("two words=1", "must be 1 to 100 letters"),
        ("a=1,a=2", "'a' is named twice"),
    ],
)
def test_what_are_no_pairs_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        pairs(text)


NAMES = st.from_regex(r"[A-Za-z0-9._:/@+-]{1,20}", fullmatch=True)


@given(st.dictionaries(NAMES, st.from_regex(r"[a-z=/.]{1,20}", fullmatch=True), max_size=5))
def test_pairs_come_back_as_they_were_written(written: dict[str, str]) -> None:
    assert pairs(", ".join(f"{name}={value}" for name, value in written.items())) == written


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("http://host", "http://host"),
        ("https://host:8443/", "https://host:8443"),
        ("HTTP://Host/v1//", "http://host/v1"),
        ("http://me:pw@host/a/b", "http://me:pw@host/a/b"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_addresses_are_read_without_a_closing_slash(text: str, read: str) -> None:
    assert web_address(text).url == read


@pytest.mark.parametrize(
    "text",
    ["host", "host:80", "/v1", "ftp://host", "http://", "http:///v1", "http://host:port", "http://host?a=1", "http://host/#a", "//h"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        web_address(text)


@given(st.text(max_size=20))
def test_any_text_is_an_address_or_refused_without_being_repeated(text: str) -> None:
    try:
        said = web_address(f"http://user:hidden-value@{text}")._replace(auth=None).url
    except ValueError as error:
        said = str(error)
    assert "hidden-value" not in said


def test_a_key_is_sent_as_a_bearer_token_and_user_info_as_basic_authentication() -> None:
    plain, with_user = web_address("http://host"), web_address("http://me:p%40ss@host")
    assert authorization(None, plain) is None
    assert authorization("", plain) is None
    assert authorization("key", plain) == authorization("key", with_user) == "Bearer key"
    assert authorization(None, with_user) == f"Basic {base64.b64encode(b'me:p@ss').decode()}"


# ---------------------------------------------------------------- settings: what is shown


def test_settings_are_shown_with_what_counts_and_without_secrets() -> None:
    assert shown_settings(Sample, {}) == {
        "SAMPLE_URL": "(not set)",
        "SAMPLE_OWNER": "(not set)",
        "SAMPLE_PIN": "(not set)",
        "SAMPLE_WAIT": "1m (default)",
        "SAMPLE_MOST": "4 (default)",
    }
    environ = {
        "SAMPLE_URL": "http://me:hidden-value@host",
        "SAMPLE_OWNER": "me with 0000-0000",
        "SAMPLE_PIN": "0000-0000",
        "SAMPLE_WAIT": " 90s ",
        "SAMPLE_MOST": "not a number",
        "OTHER_KEY": "90s",
    }
    assert shown_settings(Sample, environ) == {
        "SAMPLE_URL": "http://host",
        "SAMPLE_OWNER": "me with [secret]",
        "SAMPLE_PIN": "(set)",
        "SAMPLE_WAIT": "90s",
        "SAMPLE_MOST": "not a number",
    }


def test_a_secret_is_shown_as_set_however_short_it_is() -> None:
    assert shown_settings(Sample, {"SAMPLE_PIN": "1"})["SAMPLE_PIN"] == "(set)"


def test_secrets_are_known_by_the_names_of_their_settings() -> None:
    environ = {"LLM_API_KEY": "long-secret", "a_token": "other-secret", "DB_PASSWORD": "short", "LLM_MODEL": "qwen2.5-14b", "X_SECRET": ""}
    assert {"other-secret", "long-secret"} <= set(secrets_in(environ))
    assert not [form for form in secrets_in(environ) if "qwen" in form or form == "short"]


def test_a_declared_secret_is_known_whatever_its_name() -> None:
    environ = {"SAMPLE_PIN": "0000-0000", "SAMPLE_OWNER": "somebody"}
    assert "0000-0000" not in secrets_in(environ)
    assert "0000-0000" in secrets_in(environ, declared(Sample))
    assert "somebody" not in secrets_in(environ, declared(Sample))


FORMS: list[tuple[str, Callable[[str], str]]] = [
    ("as it is", str),
    ("percent-encoded", lambda secret: quote(secret, safe="")),
    ("in base64", lambda secret: base64.b64encode(secret.encode()).decode()),
]


@pytest.mark.parametrize("form", [form for _, form in FORMS], ids=[name for name, _ in FORMS])
@pytest.mark.parametrize("secret", ["hidden-value", "sl/ash+plus=", "p@ss:wörd"])
def test_a_secret_is_taken_out_in_every_form(secret: str, form: Callable[[str], str]) -> None:
    found = secrets_in({"SAMPLE_PIN": secret}, declared(Sample))
    assert redact(f"refused <{form(secret)}>", found) == "refused <[secret]>"


USER_INFO: list[tuple[str, str]] = [
    ("the password", "p@ss:word"),
    ("the password as in the URL", "p%40ss:word"),
    ("both as in the URL", "me:p%40ss:word"),
    ("as basic authentication sends it", base64.b64encode(b"me:p@ss:word").decode()),
    ("the password in base64", base64.b64encode(b"p@ss:word").decode()),
]


@pytest.mark.parametrize("form", [form for _, form in USER_INFO], ids=[name for name, _ in USER_INFO])
def test_the_password_in_an_address_is_taken_out_in_every_form(form: str) -> None:
    found = secrets_in({"SAMPLE_URL": "http://me:p%40ss:word@host/v1"})
    assert redact(f"refused <{form}>", found) == "refused <[secret]>"


def test_secrets_come_longest_first_so_that_none_hides_in_another() -> None:
    found = secrets_in({"A_KEY": "abcdef", "B_KEY": "abcdef-and-more"})
    assert [len(form) for form in found] == sorted(map(len, found), reverse=True)
    assert redact("abcdef-and-more, abcdef", found) == "[secret], [secret]"


def test_what_is_too_short_to_be_a_secret_is_left_in_texts() -> None:
    assert all(len(form) >= SHORTEST_SECRET for form in secrets_in({"A_KEY": "a", "SAMPLE_URL": "http://a:b@host"}))
    assert redact("a cat", secrets_in({"A_KEY": "cat"})) == "a cat"


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), st.from_regex(r"[A-Z0-9+/%:@=]{6,20}", fullmatch=True))
def test_no_secret_is_left_in_any_text(before: str, after: str, secret: str) -> None:
    found = secrets_in({"SAMPLE_PIN": secret}, declared(Sample))
    for _, form in FORMS:
        assert secret not in redact(f"{before}{form(secret)}{after}", found)


@given(st.dictionaries(st.sampled_from(["A_KEY", "SAMPLE_URL", "SAMPLE_PIN"]), st.text(max_size=30)))
def test_any_environment_has_secrets_that_can_be_taken_out(environ: dict[str, str]) -> None:
    found = secrets_in(environ, declared(Sample))
    assert all(form and form in f"<{form}>" for form in found)
    assert redact("a text", ()) == "a text"


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


@pytest.mark.parametrize("module", [providers, providers.settings])
def test_public_names_are_there(module: Any) -> None:
    assert all(hasattr(module, name) for name in module.__all__)
