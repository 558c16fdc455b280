"""The benchmark works: at a tiny size, where its figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = [sys.executable, "bench/run.py", "--seconds", "0.3", "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(written.read_text())
    assert {row["name"].partition(",")[0] for row in rows if "figure" in row} == {
        "life in batches of 100",
        "GET /healthz",
        "POST /jobs one by one",
        "claim 1",
    }
    assert all(row["figure"] > 0 for row in rows if "figure" in row)
