"""What the image is pinned to, requirements.lock and requirements-build.lock, and how CI reads the audit of it."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = {"requirements.lock": PROJECT["project"]["dependencies"], "requirements-build.lock": PROJECT["build-system"]["requires"]}
both_locks = pytest.mark.parametrize("lock", NEEDED)


def pinned(lock: str) -> dict[str, tuple[str, list[str]]]:
    """Name → version and SHA-256 sums."""
    text = (ROOT / lock).read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if not line.lstrip().startswith("#")]
    pins = [(words[0].split("=="), [word for word in words[1:] if word.startswith("--hash=sha256:")]) for words in lines if words]
    return {canonicalize_name(name): (version, hashes) for (name, version), hashes in pins}


def unmet(needed: list[str], lock: str, seen: set[str]) -> list[str]:
    """Requirements, and those of what they bring, that a lock does not satisfy; what is not installed here is not followed."""
    pins, missing = pinned(lock), []
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in pins or pins[name][0] not in requirement.specifier:
            missing.append(str(requirement))
        elif name not in seen:
            seen.add(name)
            missing += unmet(importlib.metadata.requires(name) or [], lock, seen)
    return missing


@both_locks
def test_a_lock_satisfies_what_the_project_asks_for(lock: str) -> None:
    assert unmet(NEEDED[lock], lock, set()) == []


@both_locks
def test_every_pin_has_hashes_of_more_than_one_file(lock: str) -> None:
    for name, (version, hashes) in pinned(lock).items():
        # The source distribution and at least one wheel.
        assert len(set(hashes)) >= 2, (name, version)
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes)


@both_locks
def test_a_lock_names_no_place_to_fetch_from(lock: str) -> None:
    assert not re.search(r"://|--(?:extra-)?index|--find-links|--trusted-host", (ROOT / lock).read_text())


CLEAN = {"name": "attrs", "version": "1", "vulns": []}
SKIPPED = {"name": "attrs", "skip_reason": "not found"}
VULNERABLE = {"name": "attrs", "version": "1", "vulns": [{"id": "CVE-1"}]}


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        (json.dumps({"dependencies": [CLEAN]}) + "\nNo known vulnerabilities found", 0, "1 packages, no known vulnerability"),
        (json.dumps({"dependencies": [SKIPPED, CLEAN]}), 0, "NOT AUDITED 1 of 2 packages: not found"),
        (json.dumps({"dependencies": [SKIPPED, VULNERABLE]}), 1, "attrs 1 has known vulnerabilities"),
        ("Traceback\nConnectionError: no network", 0, "NOT AUDITED any of its packages: ConnectionError: no network"),
        ("", 0, "NOT AUDITED any of its packages: pip-audit said nothing"),
    ],
)
def test_the_audit_never_passes_without_a_word(output: str, status: int, said: str) -> None:
    command = [sys.executable, str(ROOT / ".ci" / "read_audit.py"), "some.lock"]
    done = subprocess.run(command, input=output, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == status
    assert said in done.stdout
