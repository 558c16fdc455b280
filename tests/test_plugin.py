"""A provider of one's own: the page's section as a stranger follows it, and the example as a package that is really installed.

What is installed goes into an environment made for this file, with AI Service in it as a package and not as a source tree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_service import FakeService, answers
from service import INHERITED, Corner, Service, wait_until

from providers import Provider
from providers.conformance import ProviderConformance

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plugin"
PAGE = ROOT / "docs" / "worker.md"

# A plain `pip install ./folder` with these builds with the hatchling that is here and asks no package index. (That false turns isolation
# off is no slip: of an option that begins with "no", pip takes the value as that of its opposite.)
PIP = {"PIP_NO_BUILD_ISOLATION": "false", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
KEY = "hidden-embeddings-key"


# ---------------------------------------------------------------- an environment, and what runs in it


@attrs.frozen
class Desk:
    """A folder with an environment `.venv`, as `make` leaves it, and a home of its own."""

    folder: Path

    @property
    def python(self) -> str:
        """The environment's interpreter."""
        return str(self.folder / ".venv" / "bin" / "python")

    @property
    def packages(self) -> Path:
        """Where the environment's packages are."""
        (site,) = self.folder.glob(".venv/lib/python3*/site-packages")
        return site

    def environ(self, **more: str) -> dict[str, str]:
        """What a process here gets to see."""
        machine = {name: os.environ[name] for name in INHERITED if name in os.environ and name != "VIRTUAL_ENV"}
        return {**machine, "HOME": str(self.folder), **PIP, **more}

    def run(self, *command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        given = self.environ(**environ)
        return subprocess.run(command, cwd=cwd or self.folder, env=given, capture_output=True, text=True, timeout=120, check=False)

    def output(self, *command: str, cwd: Path | None = None, **environ: str) -> str:
        """What a command prints that ends well."""
        done = self.run(*command, cwd=cwd, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def running(self, *command: str, log: Path, **environ: str) -> Iterator[Callable[[], str]]:
        """A command that goes on until the block is left, and then ends well on SIGTERM; gives what it has logged so far."""
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environ(**environ), stderr=stderr, stdout=subprocess.DEVNULL, start_new_session=True
            )
        try:
            yield log.read_text
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(20) in (0, -signal.SIGTERM), log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """AI Service installed, not editable; the packages it needs are those of this environment."""
    desk = Desk(tmp_path_factory.mktemp("desk"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(desk.folder / ".venv")], check=True)
    # A plain path: the .pth files of this environment, that of an editable install too, are not read through it.
    (desk.packages / "packages.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    desk.output(desk.python, "-m", "pip", "install", "--quiet", "--ignore-installed", "--no-deps", str(ROOT))
    return desk


def url_of(service: Service) -> str:
    return f"http://127.0.0.1:{service.api.port}"


# ---------------------------------------------------------------- the page's section


def section() -> str:
    """The section of the page for workers that this is about."""
    return PAGE.read_text().split("\n## Write a provider\n")[1].split("\n## ")[0]


def files() -> dict[str, str]:
    """The files it prints: a path in the sentence before each."""
    printed = re.findall(r"`([\w-]+/[\w.-]+)`[^`]*:\n\n```(?:python|toml)\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL)
    return dict(printed)


def commands() -> str:
    """The block of commands it prints."""
    [block] = re.findall(r"^```bash\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_provider_of_the_page_is_written_installed_found_and_does_a_job(desk: Desk, service: Service, tmp_path: Path) -> None:
    for path, text in files().items():
        (desk.folder / path).parent.mkdir(exist_ok=True)
        (desk.folder / path).write_text(text)
    here = commands().replace("localhost:8080", f"127.0.0.1:{service.api.port}")
    place = {"AI_SERVICE_URL": url_of(service), "WORKER_SPOOL_DIR": str(tmp_path / "spool")}
    # Whatever goes wrong, the worker that it leaves in the background ends with it.
    guard = "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n"
    output = desk.output("bash", "-euo", "pipefail", "-c", guard + here, **place)
    assert "provider keywords: ok" in output
    assert "KEYWORDS_COUNT 2" in output
    told = re.search(r'`("result":.*?)`', section())
    assert told is not None
    assert told[1] in output
    assert '"status":"completed"' in output
    assert '"words":6' in output


class TestConformanceOfTheProviderOfThePage(ProviderConformance):
    good_input = "many words, many more words"
    other_inputs = ("another", "text is refused never, and repeated never")
    bad_input = 5
    needs_settings = False
    good: Mapping[str, str] = {"KEYWORDS_COUNT": "2"}

    def provider(self, environ: Mapping[str, str]) -> Provider:
        scope: dict[str, Any] = {}
        exec(next(text for path, text in files().items() if path.endswith(".py")), scope)
        return scope["Keywords"](environ)  # type: ignore[no-any-return]


def test_the_section_can_be_followed_in_five_minutes() -> None:
    assert len(section().splitlines()) <= 70


# ---------------------------------------------------------------- the example


@pytest.fixture(scope="module")
def example(desk: Desk) -> Desk:
    """The environment with the example installed in it, from a copy, so that no build leaves anything in the source tree."""
    copy = desk.folder / "example"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    desk.output(desk.python, "-m", "pip", "install", "--quiet", str(copy))
    # Whatever is imported from now on is what was installed.
    (copy / "ai_service_embeddings.py").unlink()
    return desk


@attrs.frozen
class Embedder:
    """A server that embeds whatever it is sent as 1, 2, 3, and the settings that lead to it."""

    server: FakeService
    model: str
    environ: dict[str, str]


@pytest.fixture
def embedder(corner: Corner) -> Iterator[Embedder]:
    model = corner.model_profile
    with FakeService() as server:
        server.always("/v1/models", answers(200, {"data": [{"id": model}]}))
        vector = {"index": 0, "embedding": [1, 2, 3]}
        server.always("/v1/embeddings", answers(200, {"data": [vector], "usage": {"prompt_tokens": 2, "total_tokens": 2}}))
        yield Embedder(server, model, {"EMBEDDINGS_URL": f"{server.url}/v1", "EMBEDDINGS_KEY": KEY, "EMBEDDINGS_MODEL": model})


LISTING = """
import json, os
from providers import check_all, discover
listed = {one.name: one for one in discover(os.environ)}
one = listed["embeddings"]
print(json.dumps({"names": list(listed), "origin": one.origin, "settings": one.settings, "check": check_all([one])[0], "repr": repr(one)}))
"""


def test_the_example_is_found_and_its_settings_are_listed_without_the_key(example: Desk, embedder: Embedder) -> None:
    output = example.output(example.python, "-c", LISTING, **embedder.environ)
    listing = json.loads(output)
    assert (listing["origin"], "vllm" in listing["names"]) == ("ai_service_embeddings:Embeddings", True)
    assert listing["settings"] == {
        "EMBEDDINGS_URL": embedder.environ["EMBEDDINGS_URL"],
        "EMBEDDINGS_KEY": "(set)",
        "EMBEDDINGS_MODEL": embedder.model,
        "EMBEDDINGS_BATCH": "32 (default)",
        "EMBEDDINGS_TIMEOUT": "5m (default)",
    }
    assert (listing["check"]["status"], listing["check"]["models"]) == ("ok", [embedder.model])
    assert embedder.server.asked("/models")[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in output


def test_the_examples_readme_has_its_settings(example: Desk) -> None:
    told = re.findall(r"^\| `(EMBEDDINGS_\w+)` \| (.*?) ?\| (.*) \|$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    program = (
        "import json; from ai_service_embeddings import Settings; from providers.settings import declared;"
        "print(json.dumps([[one.name, 'required' if one.required else one.default, one.about] for one in declared(Settings)]))"
    )
    declared = json.loads(example.output(example.python, "-c", program))
    assert [[name, default.strip("` ") or None, about] for name, default, about in told] == declared


@pytest.mark.long
def test_the_examples_own_tests_pass_where_it_is_installed(example: Desk) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-W", "error")
    output = example.output(example.python, "-m", "pytest", *options, cwd=example.folder / "example")
    passed, skipped = (int(number) for number in re.findall(r"(\d+) passed, (\d+) skipped", output)[0])
    assert passed > 30
    assert skipped <= 2


def test_a_worker_runs_a_job_of_the_example_and_the_service_shows_its_health(
    example: Desk, embedder: Embedder, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(PYTHONPATH=str(example.packages), **embedder.environ)
    corner = Corner(service.api)
    created = corner.create(model_profile=embedder.model, input="two words")
    place = {"AI_SERVICE_URL": url_of(service), "WORKER_SPOOL_DIR": str(tmp_path / "spool")}
    with example.running(".venv/bin/ai-service", "worker", log=tmp_path / "worker.log", **place, **embedder.environ) as log:
        job = wait_until(lambda: found if (found := corner.look(created))["finished_at"] else None, 20, "the end of the job")
        # Workers are written down with the next upkeep.
        wait_until(lambda: "embeddings" in json.dumps(service.api.get("/api/v1/workers").json), what="the worker's report")
        status = service.api.get("/api/v1/providers/status")
    assert (job["status"], job["result"]) == ("completed", {"embeddings": [[1, 2, 3]], "model": embedder.model})
    assert job["usage"].items() >= {"prompt_tokens": 2, "total_tokens": 2, "model": embedder.model}.items()
    [shown] = [item for item in status.json["providers"] if item["name"] == "embeddings"]
    assert (shown["status"], shown["endpoint"], shown["model_profiles"]) == ("ok", embedder.environ["EMBEDDINGS_URL"], [embedder.model])
    assert KEY not in status.body.decode() + service.log + log()


def test_a_worker_with_wrong_settings_of_the_example_tells_them_all_and_does_not_start(example: Desk, tmp_path: Path) -> None:
    wrong = {"EMBEDDINGS_URL": "host", "EMBEDDINGS_KEY": f"{KEY} and more", "EMBEDDINGS_TIMEOUT": "soon", "EMBEDDINGS_BATCH": "0"}
    done = example.run(".venv/bin/ai-service", "worker", WORKER_SPOOL_DIR=str(tmp_path / "spool"), **wrong)
    assert done.returncode == 2
    assert all(f"embeddings: {name}: " in done.stderr for name in wrong)
    assert KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
