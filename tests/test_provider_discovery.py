"""Discovery of installed plugins, the providers of a profile, and their checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import fake_vllm
from sample_providers import listed

from providers import (
    GROUP,
    Health,
    InstalledProvider,
    SettingsError,
    by_profile,
    check_all,
)

ROOT = Path(__file__).parents[1]

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


# ---------------------------------------------------------------- profiles


def test_profiles_lead_to_their_providers() -> None:
    one, other = listed("a", "b", name="one"), listed("c", name="other")
    away = InstalledProvider(name="away", origin="x:Y", health=Health("not_configured"))
    assert by_profile([one, away, other]) == {"a": (one,), "b": (one,), "c": (other,)}


def test_a_provider_may_name_a_profile_twice() -> None:
    one = listed("a", "a")
    assert by_profile([one]) == {"a": (one,)}


def test_an_order_names_the_providers_of_a_profile_by_turn() -> None:
    one, other, third = listed("a", "b", name="one"), listed("a", "b", name="other"), listed("a", name="third")
    routes = by_profile([one, other, third], {"a": ["third", "one"], "b": ["other"]})
    assert routes == {"a": (third, one), "b": (other,)}


def test_an_order_skips_a_provider_that_is_unavailable() -> None:
    one = listed("a", name="one")
    away = InstalledProvider(name="away", origin="x:Y", health=Health("not_configured"))
    assert by_profile([one, away], {"a": ["away", "one"]}) == {"a": (one,)}


def test_all_problems_of_the_routes_are_reported_at_once() -> None:
    one, other = listed("a", "b", name="one"), listed("b", "c", name="other")
    away = InstalledProvider(name="away", origin="x:Y", health=Health("not_configured"))
    with pytest.raises(SettingsError) as wrong:
        by_profile([one, other, away], {"a": ["other", "nobody"], "d": ["away"]})
    assert wrong.value.problems == (
        "a is to be served by nobody, which is not installed",
        "a is to be served by other, which does not serve it",
        "d is to be served by away: none of them is set up",
        "b is served by one (one:Plugin) and other (other:Plugin): name their order, as in PROFILE_PROVIDERS=b=one,other",
    )


def test_two_providers_with_one_name_are_rejected() -> None:
    with pytest.raises(SettingsError, match="same is the name of several providers"):
        by_profile([listed("a", name="same"), listed("b", name="same")])


# ---------------------------------------------------------------- checks


def test_check_items_have_what_is_known_and_nothing_else() -> None:
    full = Health("degraded", "hm", models=("m",), endpoint="http://host/v1", latency_ms=1.234)
    away = InstalledProvider(name="away", origin="x:Y", health=Health("not_configured", "AWAY_URL is not set"))
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


def test_checks_run_concurrently_and_one_that_hangs_times_out() -> None:
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


def test_a_check_that_raises_is_reported_as_unavailable() -> None:
    def breaks() -> Health:
        raise RuntimeError("http://me:pw@host/ refused hidden-value")

    item = check_all([listed("a", looks=breaks, secrets=("hidden-value",))])[0]
    assert (item["status"], item["detail"]) == ("unavailable", "its check failed with RuntimeError: http://host/ refused [secret]")


def test_a_check_that_returns_no_health_is_reported_as_unavailable() -> None:
    item = check_all([listed("a", looks=lambda: "ok")])[0]
    assert (item["status"], item["detail"]) == ("unavailable", "its check returned str, not Health")
