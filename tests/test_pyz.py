"""The single file of `make pyz`, run by a Python without packages, with a home and nothing else."""

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_vllm import fake_vllm
from postgres import fresh_schema
from service import Corner, Service, wait_until

ROOT = Path(__file__).parent.parent
FINDS_ITS_FILES = (
    "import ai_service, json, pathlib; from ai_internal.server import database;"
    "folder = pathlib.Path(ai_service.__file__).parent;"
    "print(json.dumps([str(database.SCHEMA_FILE), str(folder), database.SCHEMA_FILE.is_file()]))"
)

# Building it takes ten seconds and packages from the index.
pytestmark = pytest.mark.long


@attrs.frozen
class Pyz:
    """The file, a Python without packages, and a home."""

    file: Path
    python: Path
    home: Path

    def run(self, folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs the file to its end, in a folder and with nothing but HOME in its environment."""
        pipes: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
        line, given = self.line(*words), {"HOME": str(self.home), **environ}
        return subprocess.run(line, cwd=folder, env=given, check=False, **pipes)

    def output(self, folder: Path, *words: str, **environ: str) -> str:
        """What the file prints that ends well."""
        done = self.run(folder, *words, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def line(self, *words: str) -> tuple[str, ...]:
        """The command line."""
        return (str(self.python), str(self.file), *words)


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Pyz:
    """The file is built once for all processes of pytest-xdist."""
    shared, own = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("pyz")
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    file = shared / "ai-service.pyz"
    with (shared / "pyz.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            build(own / file.name).rename(file)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", own / "python"], check=True)
    (own / "home").mkdir()
    return Pyz(file, own / "python" / "bin" / "python", own / "home")


def build(file: Path) -> Path:
    """Runs `make pyz`, with a plugin, in the environment of the tests: shiv is there."""
    of_make = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environ = {name: value for name, value in os.environ.items() if name not in of_make}
    variables = [f"VENV={sys.prefix}", f"PYZ={file}", "PLUGINS=./examples/plugin"]
    line = ["make", "pyz", *variables, f"--old-file={sys.prefix}/.pyz"]
    pipes: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(line, cwd=ROOT, env=environ, check=False, **pipes)
    assert done.returncode == 0, done.stdout + done.stderr
    return file


def test_the_file_reports_its_version(pyz: Pyz, tmp_path: Path) -> None:
    assert pyz.output(tmp_path, "--version").startswith("ai-service ")
    assert list(tmp_path.iterdir()) == []


def test_the_file_finds_its_schema_beside_its_modules(pyz: Pyz, tmp_path: Path) -> None:
    printed = pyz.output(tmp_path, "-c", FINDS_ITS_FILES, SHIV_INTERPRETER="1")
    schema, folder, is_file = json.loads(printed)
    assert is_file
    assert Path(schema).parent == Path(folder)
    assert Path(folder).is_relative_to(pyz.home)


def test_the_file_finds_built_in_providers_and_plugins(pyz: Pyz, tmp_path: Path) -> None:
    listed = pyz.run(tmp_path, "check").stdout
    found = re.findall(r"^provider (\w+): not_configured", listed, re.MULTILINE)
    assert found == ["embeddings", "openclaw", "vllm", "whisperx"]


@contextmanager
def serving(pyz: Pyz, database_url: str, schema: str) -> Iterator[Service]:
    service = Service(database_url, schema)
    service.command = pyz.line("serve")
    names = ("DATABASE_URL", "DATABASE_SCHEMA", "HTTP_HOST", "HTTP_PORT")
    given = {name: service.environment[name] for name in names}
    service.environment = {"HOME": str(pyz.home), **given}
    try:
        yield service.start()
    finally:
        service.stop()


@contextmanager
def working(pyz: Pyz, folder: Path, **environ: str) -> Iterator[None]:
    given = {"HOME": str(pyz.home), **environ}
    with (
        (folder / "worker.log").open("w") as log,
        subprocess.Popen(pyz.line("worker"), cwd=folder, env=given, stderr=log) as process,
    ):
        try:
            yield
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_the_file_serves_and_works(pyz: Pyz, tmp_path: Path, postgres_url: str) -> None:
    with (
        fresh_schema(postgres_url) as schema,
        fake_vllm() as model,
        serving(pyz, postgres_url, schema) as service,
    ):
        assert service.api.get("/readyz").status == 200
        assert b"<html" in service.api.get("/").body
        assert service.api.get("/openapi.json").json["openapi"].startswith("3.1")
        corner = Corner(service.api)
        corner.model_profile = "qwen2.5-14b"
        job = corner.create(input={"prompt": "Hello"})
        address = {"AI_SERVICE_URL": f"http://127.0.0.1:{service.api.port}"}
        with working(pyz, tmp_path, **model.environ, **address):
            wait_until(lambda: corner.look(job)["status"] == "completed", 30, "the job's end")


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


# Root passes every check of permissions, so no mode makes a home read-only for it.
@pytest.mark.parametrize("home", [__file__, "/proc", "/nonexistent"])
def test_an_unwritable_home_means_a_private_folder(pyz: Pyz, temporary: Path, home: str) -> None:
    assert pyz.output(Path("/"), "--version", HOME=home, TMPDIR=str(temporary))
    [folder] = temporary.iterdir()
    found = folder.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), 0o700)
    assert not Path("/nonexistent").exists()


@pytest.mark.parametrize("trap", ["open to others", "a link"])
def test_no_code_is_loaded_from_a_folder_of_others(pyz: Pyz, tmp_path: Path, trap: str) -> None:
    folder = tmp_path / f"ai-service-pyz-{os.geteuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    done = pyz.run(tmp_path, "--version", HOME="/proc", TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "set SHIV_ROOT to a directory of this user" in done.stderr
    assert list(folder.iterdir()) == []


def test_the_file_names_no_folder_of_the_machine_that_built_it(pyz: Pyz) -> None:
    with zipfile.ZipFile(pyz.file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    naming = [name for name, content in contents.items() if str(ROOT).encode() in content]
    assert naming == []
