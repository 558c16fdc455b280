"""The documents, as a reader meets them: their blocks of commands run in order in one shell, what is printed is held to what they print.

    ```bash          runs, with the shell's variables of the blocks before; not where its first line is `# Not run by a test: <reason>`
    ```python        runs too, in a process of its own with the shell's environment
    ```json, text    right below one of these is what it prints: white space, ids and times aside, and … stands for anything

In commands 127.0.0.1:8080 and localhost:8080 are the service, and '<secret>' a token.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import attrs
from service import INHERITED

from ai_internal.server import embedded

ROOT = Path(__file__).parent.parent
NOT_RUN = "# Not run by a test: "
RUN_SECONDS = 120


@attrs.frozen
class Block:
    """One fenced block; `told` is the output that the page prints below it, None where it prints none."""

    page: str
    line: int
    language: str
    text: str
    told: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether it is for a reader to run, and can be run here."""
        return self.language in ("bash", "python") and not self.text.startswith(NOT_RUN)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def documents() -> list[str]:
    """Every document of the project, by its path."""
    folders = (ROOT, ROOT / "docs", *(path for path in (ROOT / "examples").iterdir() if path.is_dir()))
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("*.md"))


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = (ROOT / page).read_text()
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    outputs = {
        above.start(): below[2]
        for above, below in pairwise(found)
        if below[1] in ("json", "text") and not text[above.end() : below.start()].strip()
    }
    return [Block(page, text.count("\n", 0, each.start()) + 1, each[1], each[2], outputs.get(each.start())) for each in found]


def plain(text: str) -> str:
    """Text without what differs from run to run, and without white space."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<id>", text)
    return re.sub(r"\s+", "", re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "<time>", text))


def is_as_told(printed: str, told: str) -> bool:
    """Whether that is what the page says will be printed."""
    return re.fullmatch(".*?".join(map(re.escape, plain(told).split("…"))), plain(printed), re.DOTALL) is not None


def run_page(folder: Path, some: list[Block], url: str, token: str, environ: Mapping[str, str]) -> None:
    """Run these blocks of a page. AssertionError names the one that fails, or prints something else than the page does."""
    for entry in ROOT.iterdir():
        if entry.name != ".git":
            (folder / entry.name).symlink_to(entry)
    results = folder / "results"
    results.mkdir()
    machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
    # pg_dump must not be older than the server; the one that comes with the embedded server is its age.
    path = os.pathsep.join((str(Path(sys.executable).parent), str(embedded._programs()), machine["PATH"]))
    line = ["bash", "-euo", "pipefail", "-c", _script(some, results, _replaced(url, token))]
    given = {**machine, "PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT), **environ}
    status, errors = _ended(line, folder, given)
    printed = {number: (results / str(number)).read_text() for number in range(len(some)) if (results / str(number)).exists()}
    assert status == 0, f"{some[max(printed)]} ended with {status}:\n{printed[max(printed)]}{errors}"
    for number, block in enumerate(some):
        assert block.told is None or is_as_told(printed[number], block.told), f"{block} prints\n{printed[number]}{errors}"


def _ended(line: list[str], folder: Path, environ: Mapping[str, str]) -> tuple[int, str]:
    """The exit status and the error output of a shell; what it started ends with it."""
    with (folder / "errors").open("w+") as errors:
        shell = subprocess.Popen(line, cwd=folder, env=environ, stdout=errors, stderr=errors, start_new_session=True)
        try:
            status = shell.wait(RUN_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
        errors.seek(0)
        return status, errors.read()


def _replaced(url: str, token: str) -> Callable[[str], str]:
    address = url.partition("//")[2]
    return lambda text: re.sub(r"(127\.0\.0\.1|localhost):8080", address, text).replace("'<secret>'", f"'{token}'")


def _script(some: list[Block], results: Path, replaced: Callable[[str], str]) -> str:
    parts = []
    for number, block in enumerate(some):
        text = replaced(block.text)
        program = f"python <<'END OF BLOCK'\n{text}END OF BLOCK\n" if block.language == "python" else text
        parts.append(f"{{\n{program}}} > {results / str(number)}")
    return "\n".join(parts)
