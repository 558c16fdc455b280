"""The set-up by make: which packages a target installs and when, and how it fails.

The Python is a script that records its arguments, so that nothing is installed.
"""

import os
import subprocess
from pathlib import Path
from time import time
from typing import Any

import attrs
import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
PYTHON = """#!/bin/sh
echo "$*" >> '{log}'
for last; do :; done
case "$*" in
  *'-m venv --clear'*) rm -rf "$last" && mkdir -p "$last/bin" && cp "$0" "$last/bin/python" \\
    && cp "$0" "$last/bin/ai-service" ;;
  *sys.version*) echo '{version}' ;;
  *'-m pip --python'*) {pip} ;;
esac
"""
PYENV_ERROR = "pyenv: version `3.99.0' is not installed (set by PYENV_VERSION environment variable)"


@attrs.frozen
class Project:
    """A folder with a pyproject.toml in which make runs, and the Pythons of its machine."""

    folder: Path

    def add_python(self, name: str, version: str, pip: str = "exit 0") -> None:
        """Puts a Python of this version on the PATH; `pip` is what its own pip does."""
        text = PYTHON.format(log=self.folder / "log", version=version, pip=pip)
        self.add_program(name, text)

    def add_program(self, name: str, text: str) -> None:
        program = self.folder / "bin" / name
        program.write_text(text)
        program.chmod(0o755)

    def make(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs make to its end; the log begins anew."""
        (self.folder / "log").write_text("")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        command = ["make", "-f", str(MAKEFILE), *words]
        pipes: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
        given = {"PATH": path, **environ}
        return subprocess.run(command, cwd=self.folder, env=given, check=False, **pipes)

    def made(self, *words: str, **environ: str) -> list[str]:
        """What a run of make does that ends well: `new` environments and the extras installed."""
        done = self.make(*words, **environ)
        assert done.returncode == 0, done.stderr
        lines = (self.folder / "log").read_text().splitlines()
        steps = [line for line in lines if "-m venv" in line or "-m pip install" in line]
        return ["new" if "-m venv" in line else line.split(".[")[1].rstrip("]") for line in steps]

    def age(self) -> None:
        """Makes all files older, by the same time."""
        for path in (self.folder / "pyproject.toml", *self.folder.glob(".venv/.*")):
            os.utime(path, (time() - 1000, path.stat().st_mtime - 1000))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "pyproject.toml").touch()
    project.add_python("python3", "3.11.1")
    return project


@pytest.mark.parametrize(("pip", "runs"), [("exit 0", False), ("exit 1", True)])
def test_ensurepip_runs_only_if_python_has_no_pip(project: Project, pip: str, runs: bool) -> None:
    project.add_python("python3", "3.11.1", pip)
    assert project.made("demo") == ["new", "embedded"]
    assert ("-m ensurepip" in (project.folder / "log").read_text()) == runs


@pytest.mark.parametrize("target", ["demo", "run"])
def test_a_demo_installs_no_package_of_the_tests(project: Project, target: str) -> None:
    assert project.made(target) == ["new", "embedded"]
    assert project.made(target) == []


def test_tests_after_a_demo_install_the_rest_in_the_same_environment(project: Project) -> None:
    assert project.made("demo") == ["new", "embedded"]
    assert project.made("test") == ["test"]
    assert project.made("test") == []


def test_a_demo_after_the_tests_installs_nothing(project: Project) -> None:
    assert project.made("test") == ["new", "test"]
    assert project.made("demo") == []


def test_a_changed_pyproject_installs_again_and_keeps_the_environment(project: Project) -> None:
    project.made("test")
    project.age()
    (project.folder / "pyproject.toml").touch()
    assert project.made("demo") == ["embedded"]
    assert project.made("demo") == []
    assert project.made("test") == ["test"]


def test_an_environment_of_which_the_python_is_gone_is_made_anew(project: Project) -> None:
    project.made("test")
    (project.folder / ".venv" / "bin" / "python").unlink()
    assert project.made("demo") == ["new", "embedded"]
    assert project.made("test") == ["test"]


def test_a_given_python_of_another_version_makes_the_environment_anew(project: Project) -> None:
    project.add_python("python3.12", "3.12.1")
    project.add_python("python3.13", "3.13.1")
    project.made("test")
    assert project.made("test", "PYTHON=python3.12") == ["new", "test"]
    assert project.made("test", "PYTHON=python3.12") == []
    assert project.made("demo", PYTHON="python3.13") == ["new", "embedded"]
    assert project.made("demo", PYTHON="python3.13") == []


def test_an_environment_of_a_given_python_is_kept_when_none_is_given(project: Project) -> None:
    project.add_python("python3", "False")
    project.add_python("python3.12", "3.12.1")
    assert project.made("demo", "PYTHON=python3.12") == ["new", "embedded"]
    assert project.made("demo") == []


def test_a_python_that_does_not_run_shows_its_own_error(project: Project) -> None:
    project.add_program("python3", f"#!/bin/sh\ncat >&2 <<'END'\n{PYENV_ERROR}\nEND\nexit 1\n")
    done = project.make("demo")
    assert done.returncode == 2
    assert PYENV_ERROR in done.stderr
    assert "python3 does not run" in done.stderr
    assert "PYTHON=" in done.stderr
    assert "or newer" not in done.stderr


def test_a_python_that_is_too_old_is_reported_as_such(project: Project) -> None:
    project.add_python("python3", "False")  # what such a Python prints
    done = project.make("demo")
    assert done.returncode == 2
    assert "AI Service needs Python 3.11 or newer; python3 is not: make PYTHON=" in done.stderr
    assert "does not run" not in done.stderr
