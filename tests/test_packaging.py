"""What is installed is complete: a wheel, put where no source tree is, has its command, its schema, its jobs and its providers."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, WHEEL = PYPROJECT["project"], PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel in it."""
    return environment(tmp_path_factory.mktemp("installed"), str(wheel))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with an editable installation of the source tree in it."""
    options = ("--no-build-isolation", "--no-index", "--editable", str(ROOT))
    return environment(tmp_path_factory.mktemp("editable"), *options)


def environment(folder: Path, *what: str) -> Path:
    """A new environment with that installed; its bin folder.

    The packages it needs are those of this environment.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    # A plain path: .pth files below it, such as that of an editable install, are not read.
    (site / "packages.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    # Else pip would remove what the path above leads to.
    options = ["--quiet", "--no-deps", "--ignore-installed", "--disable-pip-version-check"]
    install = [*pip, "install", *options, *what]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(command: list[str], cwd: Path) -> str:
    """What the command prints, run where no source tree is."""
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")}
    ended = subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_wheel_holds_every_module_of_the_project_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.name for path in ROOT.glob("*.py")}
    assert {Path(name).parts[0] for name in names} == {
        *modules,
        "ai_internal",
        "providers",
        "schema.sql",
        f"ai_service-{PROJECT['version']}.dist-info",
    }
    for folder in ("ai_internal", "providers"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if path.is_file() and path.suffix != ".pyc"}
        assert files == {name for name in names if name.startswith(f"{folder}/")}


def test_installed_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    assert PROJECT["version"] in run([str(installed / "ai-service"), "--version"], tmp_path)


def files_found(python: Path, cwd: Path) -> tuple[Path, dict[str, bool]]:
    """The folder of the modules, and which of the files that they read are there."""
    program = (
        "import ai_service, json, pathlib; from ai_internal.cli import demo;"
        "from ai_internal.server import database;"
        "folder = pathlib.Path(ai_service.__file__).parent;"
        "pages = folder / 'ai_internal' / 'server' / 'pages';"
        "files = [database.SCHEMA_FILE, demo.JOBS, pages / 'operator.html', pages / 'docs.html'];"
        "print(json.dumps([str(folder), {str(file): file.is_file() for file in files}]))"
    )
    folder, files = json.loads(run([str(python), "-c", program], cwd))
    assert len(files) == 4
    assert str(Path(folder) / "schema.sql") in files
    return Path(folder), files


def test_modules_of_a_wheel_find_their_files(installed: Path, tmp_path: Path) -> None:
    folder, files = files_found(installed / "python", tmp_path)
    assert folder.is_relative_to(installed.parent)
    assert all(files.values()), files


def test_modules_of_an_editable_install_find_their_files(editable: Path, tmp_path: Path) -> None:
    folder, files = files_found(editable / "python", tmp_path)
    assert folder == ROOT
    assert all(files.values()), files


def test_installed_providers_are_found_and_load(installed: Path, tmp_path: Path) -> None:
    program = "from importlib.metadata import entry_points as e; print([p.load().name for p in e(group='ai_service.providers')])"
    assert "vllm" in run([str(installed / "python"), "-c", program], tmp_path)


def test_installed_command_without_a_database_names_the_remedy(installed: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [str(installed / "ai-service"), "serve"], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode != 0
    assert "DATABASE_URL" in ended.stderr
    assert "ai-service serve --embedded" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_image_is_built_from_all_that_the_wheel_has() -> None:
    packed = {pattern.lstrip("/") for pattern in WHEEL["include"]}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert packed <= sent
