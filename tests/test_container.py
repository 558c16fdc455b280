"""The image: what the Containerfile promises, and the image really built and run with no rights at all.

The latter takes an engine and a base image: CONTAINER_BASE_IMAGE (python:3.13-slim, or another with Python 3.11 and venv), where wanted
CONTAINER_ENGINE (a command; podman or docker without it) and CONTAINER_BUILD_OPTIONS.
"""

import os
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import free_port, fresh_schema
from service import Corner, Service

ROOT = Path(__file__).parent.parent
CONTAINERFILE = (ROOT / "Containerfile").read_text()
BASE_IMAGE = os.environ.get("CONTAINER_BASE_IMAGE", "")
ENGINE = shlex.split(os.environ.get("CONTAINER_ENGINE", "") or next(filter(None, map(shutil.which, ("podman", "docker"))), ""))

# Some engines may not raise the limits that they were started with.
LIMITS = ("--ulimit", "nofile=1024:4096", "--ulimit", "nproc=1024:4096")
NO_RIGHTS = ("--read-only", "--cap-drop=all", "--security-opt", "no-new-privileges")


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name}\s+(.*)$", CONTAINERFILE, re.MULTILINE)


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    user, group = instructions("USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_the_image_stands_on_a_base_of_a_fixed_release() -> None:
    assert {base.split()[0] for base in instructions("FROM")} == {"${BASE_IMAGE}"}
    [base] = [argument.removeprefix("BASE_IMAGE=") for argument in instructions("ARG") if argument.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"python:3\.\d+-slim", base)
    assert "latest" not in CONTAINERFILE


def test_the_image_takes_packages_only_by_their_hashes() -> None:
    installs = re.findall(r"pip\"? install (?:[^&|;\\]|\\\n)*", CONTAINERFILE)
    assert len(installs) == 2
    for install in installs:
        assert "--require-hashes --only-binary :all: -r" in install or "--no-index --no-deps /dist/" in install


def run(*arguments: str) -> str:
    done = subprocess.run([*ENGINE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The name of the image, built from this source tree and removed at the end."""
    if not BASE_IMAGE or not ENGINE:
        pytest.skip("CONTAINER_BASE_IMAGE is not set, or there is no container engine")
    name = f"localhost/ai-service-test:{uuid.uuid4().hex[:12]}"
    options = shlex.split(os.environ.get("CONTAINER_BUILD_OPTIONS", ""))
    run("build", "--network", "host", *options, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", "-f", "Containerfile", "-t", name, ".")
    try:
        yield name
    finally:
        run("rmi", "--force", name)


class Container(Service):
    """The service in a container: nothing writable, no capability, no way to get one."""

    def __init__(self, image: str, database_url: str, schema: str) -> None:
        super().__init__(database_url, schema, HTTP_PORT=str(free_port()))
        self.name = f"ai-service-test-{uuid.uuid4().hex[:12]}"
        given = [f"--env={name}" for name in self.environment if name.startswith(("HTTP_", "DATABASE_", "DRAIN_"))]
        self.command = (*ENGINE, "run", "--rm", "--name", self.name, "--network", "host", *LIMITS, *NO_RIGHTS, *given, image)


@pytest.fixture
def container(image: str, postgres_url: str) -> Iterator[Container]:
    with fresh_schema(postgres_url) as schema:
        made = Container(image, postgres_url, schema)
        try:
            yield made
        finally:
            made.stop()
            run("rm", "--force", "--ignore" if "podman" in ENGINE[0] else "--volumes", made.name)


@pytest.mark.docker
def test_the_image_serves_without_any_rights_and_ends_in_good_order(container: Container) -> None:
    corner = Corner(container.start().api)
    assert corner.api.get("/readyz").status == 200
    job = corner.take()
    assert corner.done(job, "complete")["status"] == "completed"
    assert corner.look(job)["result"] == {"ok": True}
    status = run("exec", container.name, "python3", "-c", "print(open('/proc/1/status').read())")
    said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert said["Uid"].split() == ["10001"] * 4
    assert {int(said[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert said["NoNewPrivs"] == "1"
    refused = run("exec", container.name, "python3", "-c", "try: open('written', 'w')\nexcept OSError as error: print(error.errno)")
    assert refused.strip() == "30", "the file system can be written to"
    container.terminate()
    assert container.wait() == 0
    assert "service_stopped" in container.log
