"""The documents are true: their commands run and print what they say, their links lead somewhere, their tables are the code's."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import attrs
import pytest
from pages import NOT_RUN, Block, blocks, documents, is_as_told, run_page
from postgres import connect, fresh_schema
from service import INHERITED, Service, program, wait_until

import providers.openclaw
import providers.vllm
import providers.whisperx
from ai_internal.server.operations import OPERATIONS
from ai_internal.worker import worker
from ai_service import Settings
from providers.settings import SettingsError, declared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()


def rows_under(heading: str) -> dict[str, tuple[str, str]]:
    """The table below a heading: name → default, what it does."""
    table = SETTINGS.split(f"## {heading}\n")[1].split("\n#")[0]
    return {
        name: (default.strip("` "), about) for name, default, about in re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*) \|$", table, re.MULTILINE)
    }


def command(name: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`python ai_service.py …` with nothing but this environment."""
    line = [sys.executable, "ai_service.py", name]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def test_every_setting_of_the_service_is_in_the_table_with_its_default() -> None:
    told = rows_under("Settings of the service")
    assert told == {each.name: (each.default or ("required" if each.required else ""), each.about) for each in declared(Settings)}


TABLES = {
    "Settings of the worker": [worker],
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


# ---------------------------------------------------------------- what a reader runs

# Blocks of which other tests do the like, by how they begin.
ELSEWHERE = {
    "make demo": "test_demo.py",
    "make test": "conftest.py",
    "python3 -m venv": "test_packaging.py",
    ".venv/bin/python -m pip install ./keywords": "test_plugin.py",
}
# The pages that are for somebody with a token: whose, and its secret. The README is for who has just begun, without any.
READERS = {
    "docs/caller.md": "the-secret-of-the-caller",
    "docs/worker.md": "the-secret-of-the-desk",
    "docs/operator.md": "the-secret-of-the-desk",
}
TOKENS = {
    "API_TOKENS": (
        "page=caller:telephony=the-secret-of-the-caller; desk=operator=the-secret-of-the-desk; gpu=worker=the-secret-of-the-worker"
    ),
    "AI_SERVICE_TOKEN": "the-secret-of-the-worker",
}


def to_run(page: str) -> list[Block]:
    """What of a page is run here."""
    return [block for block in blocks(page) if block.is_run and not block.text.startswith(tuple(ELSEWHERE)) and is_whole(block)]


def is_whole(block: Block) -> bool:
    """Python that is a program and no file to be written, which its sentence names."""
    return block.language != "python" or "class " not in block.text


@contextmanager
def all_running(database_url: str, schema: str, folder: Path, **settings: str) -> Iterator[str]:
    """What `make run` keeps running; the service's address."""
    machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
    database = {"DATABASE_URL": database_url, "DATABASE_SCHEMA": schema, "HTTP_PORT": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ai_internal.cli.demo", "run", str(folder)]
    log = folder / "run.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env={**machine, **database, **settings}, stderr=stderr)
    try:
        found = wait_until(lambda: re.search(r"listens on (\S+)", log.read_text()), 60, "the start of everything")
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)


def as_superuser(url: str) -> str:
    """The same server; the one that the tests bring has a role `plain` for them that may make no roles and databases."""
    return re.sub(r"//plain:[^@]*@", "//postgres@", url)


@contextmanager
def empty_database(url: str) -> Iterator[str]:
    """A new database on the same server, dropped at the end."""
    name = f"restored_{uuid4().hex}"
    connection = connect(as_superuser(url))
    connection.run(f"create database {name} owner {urlsplit(url).username}")
    try:
        yield urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        connection.run(f"drop database {name} with (force)")
        connection.close()


def follow(page: str, url: str, postgres_url: str, folder: Path, **settings: str) -> None:
    """Run the commands of a page."""
    for name, package in (("curl", "curl"), ("jq", "jq"), ("node", "nodejs"), ("openssl", "openssl")):
        program(name, package)
    with empty_database(postgres_url) as restore_url:
        environ = {"DATABASE_URL": postgres_url, "RESTORE_URL": restore_url, **settings}
        run_page(folder, to_run(page), url, READERS.get(page, ""), environ)


@pytest.fixture(scope="module")
def everything(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Service and worker with tokens; the service's address and schema."""
    folder = tmp_path_factory.mktemp("everything")
    with fresh_schema(postgres_url) as schema, all_running(postgres_url, schema, folder, **TOKENS) as url:
        yield url, schema


@pytest.mark.parametrize("page", READERS)
def test_every_command_of_a_page_does_what_the_page_says(page: str, everything: tuple[str, str], postgres_url: str, tmp_path: Path) -> None:
    url, schema = everything
    follow(page, url, postgres_url, tmp_path, DATABASE_SCHEMA=schema)


def test_every_command_of_the_readme_does_what_it_says(postgres_url: str, tmp_path: Path) -> None:
    place, folder = tmp_path / "place", tmp_path / "folder"
    place.mkdir(), folder.mkdir()
    with fresh_schema(postgres_url) as schema, all_running(postgres_url, schema, place) as url:
        follow("README.md", url, postgres_url, folder)


def test_the_sql_of_the_operators_page_is_taken_by_postgresql(postgres_url: str) -> None:
    [statements] = [block.text for block in blocks("docs/operator.md") if block.language == "sql"]
    connection = connect(as_superuser(postgres_url))
    connection.run("begin")
    for statement in filter(str.strip, statements.split(";")):
        connection.run(statement)
    connection.run("rollback")
    connection.close()


def test_what_no_test_runs_says_so_and_is_little() -> None:
    marked = {page: [block for block in blocks(page) if block.text.startswith(NOT_RUN)] for page in documents()}
    assert {page: len(found) for page, found in marked.items() if found} == {"docs/operator.md": 1, "docs/worker.md": 1}
    assert [str(block) for found in marked.values() for block in found if len(block.text.splitlines()[0]) < len(NOT_RUN) + 10] == []


def test_blocks_that_other_tests_run_are_there() -> None:
    texts = [block.text for page in documents() for block in blocks(page)]
    assert [start for start in ELSEWHERE if not any(text.startswith(start) for text in texts)] == []


def test_an_output_is_what_the_page_prints_but_for_what_differs_each_time() -> None:
    moment = datetime.now(UTC).isoformat()
    for printed, told in (("a 1\n b", "a1 b"), ("x 12 y", "x … y"), (f"{uuid4()} {moment}", f"{uuid4()} 2026-01-01T00:00:00Z")):
        assert is_as_told(printed, told)
        assert not is_as_told(printed + "z", told)
        assert not is_as_told(printed, told + "z")


def test_make_targets_that_the_documents_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {target for page in documents() for target in re.findall(r"\bmake ([\w-]+)`", (ROOT / page).read_text())}
    assert {"demo", "run", "bench"} <= named
    assert named - set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE)) == set()


# ---------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """What a link into a page may name: its headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def links(page: str) -> list[str]:
    """The targets of a page's links."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", documents())
def test_every_link_leads_somewhere(page: str) -> None:
    broken = []
    for target in (target for target in links(page) if not target.startswith("https://")):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if not there.exists() or (anchor and anchor not in anchors(str(there.resolve().relative_to(ROOT)))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", documents())
def test_every_file_that_a_document_names_exists(page: str) -> None:
    named = re.findall(r"`((?:examples|docs|providers|bench|tests)/[\w./-]+)(?:::\w+)?`", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_within_reach_of_one_reading() -> None:
    assert len(README.split()) < 2000
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(links("README.md"))


# ---------------------------------------------------------------- settings

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


# ── The table of the API


def api_table() -> str:
    """The table in the README, made of the operations."""
    rows = [
        f"| `{method} {path.replace('{job_id}', '{id}')}` | {operation.summary} | {', '.join(operation.roles) or 'everybody'} |"
        for (method, path), operation in OPERATIONS.items()
        if method not in ("HEAD", "OPTIONS")
    ]
    return "\n".join(["| method and path | does | roles |", "| --- | --- | --- |", *rows])


def test_the_table_of_the_api_in_the_readme_is_that_of_the_operations() -> None:
    assert api_table() in README, f"the table in README.md should be:\n\n{api_table()}"
