"""The benchmark works: at a tiny size, where its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that a run writes."""
    written = tmp_path / "figures.json"
    command = [sys.executable, "bench/run.py", "--scale", "0.001", "--seconds", "0.3", "--json", str(written), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(written.read_text())
    assert all(row["figure"] >= 0 for row in rows)
    return rows


@pytest.mark.long
def test_the_benchmark_runs_and_judges_its_figures(tmp_path: Path) -> None:
    rows = run(tmp_path, "--cases", "lives,creates,drain,fairness")
    assert {"POST /jobs against /healthz (median of 3)", "16 workers against 4"} <= {row["name"] for row in rows if "target" in row}


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("BENCH_ALL"), reason="BENCH_ALL is not set: these take two minutes, in .ci/run too")
@pytest.mark.parametrize("cases", ["pickup,crowd", "snapshot,scheduled", "payloads", "backlog", "retention"])
def test_the_longer_cases_run_too(tmp_path: Path, cases: str) -> None:
    assert [row for row in run(tmp_path, "--cases", cases) if "target" in row]
