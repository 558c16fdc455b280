"""The README is true: its commands run, its tables are the code's, its plugin works."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
from service import Service

import ai_worker
import providers.openclaw
import providers.vllm
import providers.whisperx
from ai_service import Settings
from providers.settings import SettingsError, declared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def rows_under(heading: str) -> dict[str, tuple[str, str]]:
    """The table below a heading: name → default, what it does."""
    table = README.split(f"### {heading}\n")[1].split("\n#")[0]
    return {
        name: (default.strip("` "), about) for name, default, about in re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*) \|$", table, re.MULTILINE)
    }


def run(script: str, **environment: str) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(name: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`python ai_service.py …` with nothing but this environment."""
    line = [sys.executable, "ai_service.py", name]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def test_every_setting_of_the_service_is_in_the_table_with_its_default() -> None:
    told = rows_under("Settings of the service")
    assert told == {each.name: (each.default or ("required" if each.required else ""), each.about) for each in declared(Settings)}


TABLES = {
    "Settings of the worker": [ai_worker],
    "Settings of the providers": [providers.vllm, providers.whisperx, providers.openclaw],
}


@pytest.mark.parametrize("heading", TABLES)
def test_every_setting_of_worker_and_providers_is_in_the_table_with_its_default(heading: str) -> None:
    kinds = {module: kind for module in TABLES[heading] for kind in vars(module).values() if is_settings(kind, module)}
    assert list(kinds) == TABLES[heading]
    assert rows_under(heading) == {
        each.name: (each.default or ("required" if each.required else ""), each.about) for kind in kinds.values() for each in declared(kind)
    }
    for kind in kinds.values():
        described = "".join(sys.modules[base.__module__].__doc__ or "" for base in kind.__mro__)
        assert [each.name for each in declared(kind) if each.name not in described] == []


def is_settings(kind: object, module: ModuleType) -> bool:
    return attrs.has(kind) and kind.__module__ == module.__name__ and bool(declared(kind)) if isinstance(kind, type) else False


def test_the_commands_of_the_story_run_as_they_stand(service: Service) -> None:
    [by_hand] = [block for block in blocks("bash") if "by-hand" in block]
    output = run(by_hand.replace("localhost:8080", f"127.0.0.1:{service.api.port}"))
    assert '"status":"completed"' in output
    assert '"result":{"label": "greeting"}' in output


def test_a_job_is_sent_and_waited_for_as_the_story_says(service: Service) -> None:
    [sending] = [block for block in blocks("bash") if "JOB=$(curl" in block and "by-hand" not in block]
    output = run(sending.replace("localhost:8080", f"127.0.0.1:{service.api.port}").replace("wait_seconds=30", "wait_seconds=0"))
    assert '"owner_ref":"beeline/7c1f"' in output


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "run", "test"} <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)`", README)) <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def test_every_other_command_of_the_readme_is_known_here() -> None:
    known = (
        "make demo",
        "make test",
        "python bench/run.py --help",
        "python3 -m venv /tmp/ai-service",
        ".venv/bin/python -m pip install ./keywords",
        "curl",
        "JOB=$(curl",
    )
    assert [block for block in blocks("bash") if not block.startswith(known)] == []


def test_the_benchmark_explains_itself() -> None:
    assert "backlog" in run(f"{sys.executable} bench/run.py --help")


RIGHT = {"DATABASE_URL": "postgresql://user:hidden-word@127.0.0.1/db"}


def test_with_a_database_url_alone_everything_has_its_default() -> None:
    settings = Settings.read(RIGHT)
    assert (settings.http_host, settings.http_port, settings.database_schema, settings.migrate_on_start) == (
        "0.0.0.0",
        8080,
        "ai_service",
        True,
    )
    assert "hidden-word" not in repr(settings)


WRONG: list[dict[str, Any]] = [
    {"HTTP_PORT": "eighty"}, {"HTTP_PORT": "65536"}, {"MIGRATE_ON_START": "perhaps"}, {"DATABASE_SCHEMA": "Drop Table"},
    {"RETENTION": "soon"}, {"RETENTION": "5s"}, {"DRAIN_SECONDS": "-1"}, {"MAX_BODY_BYTES": "1"}, {"LOG_LEVEL": "LOUD"},
    {"DATABASE_URL": "mysql://user:hidden-word@host/db"}, {"DATABASE_URL": ""}, {"HTTP_THREADS": "3"}, {"DATABASE_CONNECTIONS": "0"},
    {"DATABASE_POOL_MODE": "statement"},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_setting_is_named_and_its_secret_is_not(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.read(RIGHT | wrong)
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(next(iter(wrong)))
    assert "hidden-word" not in str(refused.value)


def test_all_wrong_settings_are_told_in_one_message() -> None:
    wrong = {name: value for each in WRONG for name, value in each.items()}
    with pytest.raises(SettingsError) as refused:
        Settings.read(wrong)
    assert len(refused.value.problems) == len(wrong)


def test_serve_without_a_database_says_how_to_bring_one() -> None:
    done = command("serve", {})
    assert done.returncode == 2
    assert "DATABASE_URL is not set" in done.stderr
    assert "ai-service serve --embedded" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("database_url", ["postgresql://user:hidden-word@127.0.0.1:1/db"])
def test_check_says_what_is_missing(database_url: str) -> None:
    done = command("check", {"DATABASE_URL": database_url})
    assert done.returncode == 1
    assert "database_unavailable" in done.stdout
    assert "access: open" in done.stdout
    assert "hidden-word" not in done.stdout + done.stderr


def test_check_is_content_with_a_running_service(service: Service) -> None:
    done = command("check", service.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready, schema version" in done.stdout
