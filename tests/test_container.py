"""The image and compose.yaml: what they promise, and both really built and run, with no rights at all.

The latter takes an engine and a base image, which `make test-image` brings: CONTAINER_BASE_IMAGE (python:3.13-slim, or another with Python
3.11 and venv), where wanted CONTAINER_ENGINE (a command; podman or docker without it) and CONTAINER_BUILD_OPTIONS. compose.yaml runs on
Docker, with POSTGRES_IMAGE and HAPROXY_IMAGE if they are set.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from load import Load
from postgres import compose_command, free_port, fresh_schema
from pytest_docker.plugin import Services
from service import Api, Corner, Service, wait_until

import ai_service
import providers.vllm
from ai_internal.worker import worker
from providers.settings import declared

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
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


OURS = ("service", "service-two", "worker", "models", "balancer")


@pytest.mark.parametrize("name", OURS)
def test_compose_gives_our_containers_no_rights(name: str) -> None:
    container = COMPOSE["services"][name]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in container


def test_compose_waits_for_a_drain_before_it_kills() -> None:
    drains = {"service": "DRAIN_SECONDS", "service-two": "DRAIN_SECONDS", "worker": "WORKER_DRAIN_SECONDS"}
    for name, setting in drains.items():
        container = COMPOSE["services"][name]
        assert int(container["stop_grace_period"].removesuffix("s")) >= 15 + int(container["environment"][setting])


def test_compose_has_no_secret_of_its_own_and_publishes_to_this_machine_only() -> None:
    text = (ROOT / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w*(?:PASSWORD|TOKEN|KEY))(:[?-])", text)) == {
        ("POSTGRES_PASSWORD", ":?"), ("WORKER_TOKEN", ":?"), ("LLM_API_KEY", ":-"),
    }  # fmt: skip
    published = [port for container in COMPOSE["services"].values() for port in container.get("ports", [])]
    assert all(re.fullmatch(r"\$\{\w+:-127\.0\.0\.1:\d+\}:8080", port) for port in published)
    assert len(published) == 2


def test_compose_names_only_settings_that_exist() -> None:
    known = {each.name for kind in (ai_service.Settings, worker.Settings, providers.vllm.VLLM.settings) for each in declared(kind)}
    assert [name for each in ("service", "worker") for name in COMPOSE["services"][each]["environment"] if name not in known] == []


def run(*arguments: str) -> str:
    done = subprocess.run([*ENGINE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    """The name of the image, built from this source tree and removed at the end."""
    if not BASE_IMAGE or not ENGINE:
        pytest.skip("CONTAINER_BASE_IMAGE is not set, or there is no container engine")
    name = f"localhost/ai-service-test:{uuid.uuid4().hex[:12]}"
    options = shlex.split(os.environ.get("CONTAINER_BUILD_OPTIONS", ""))
    options += ["--format", "docker"] if "podman" in ENGINE[0] else []
    run("build", "--network", "host", *options, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", "-f", "Containerfile", "-t", name, ".")
    try:
        yield name
    finally:
        run("rmi", "--force", name)


class Container(Service):
    """The service in a container: nothing writable, no capability, no way to get one."""

    def __init__(self, image: str, database_url: str, schema: str) -> None:
        super().__init__(database_url, schema, HTTP_PORT=str(free_port()))
        # Where the engine listens.
        self.environment |= {name: os.environ[name] for name in ("DOCKER_HOST",) if name in os.environ}
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


@pytest.mark.docker
def test_a_large_body_needs_no_disk(container: Container) -> None:
    corner = Corner(container.start().api)
    text = "x" * 20_000_000
    [job] = [corner.take(input=text)]
    corner.done(job, "complete", result=text)
    assert corner.look(job)["result"] == text


def health(name: str) -> int:
    """The exit status of the image's own check, carried out in this container."""
    [described] = json.loads(run("inspect", name))
    kind, *check = described["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    return subprocess.run([*ENGINE, "exec", name, *check], capture_output=True, timeout=30, check=False).returncode


@pytest.mark.docker
def test_the_image_says_whether_its_service_answers(container: Container) -> None:
    container.start()
    assert health(container.name) == 0
    run("kill", "--signal", "STOP", container.name)
    try:
        assert health(container.name) == 1
    finally:
        run("kill", "--signal", "CONT", container.name)
    wait_until(lambda: health(container.name) == 0, 30, what="health of a service that goes on")


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `make .env` writes, and where."""
    folder = tmp_path_factory.mktemp("compose")
    subprocess.run(["make", "--silent", "-f", str(ROOT / "Makefile"), ".env"], cwd=folder, check=True)
    written = dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines() if "=" in line and line[0] != "#")
    return {**written, "folder": str(folder)}


def test_make_writes_secrets_that_nobody_else_can_read(secrets: dict[str, str]) -> None:
    folder = Path(secrets["folder"])
    assert [(folder / name).stat().st_mode & 0o77 for name in (".env", "secrets")] == [0, 0]
    tokens = (folder / "secrets" / "api_tokens").read_text()
    assert tokens == f"operator=operator={secrets['OPERATOR_TOKEN']}\nworker=worker={secrets['WORKER_TOKEN']}\n"
    given = [secrets[name] for name in ("POSTGRES_PASSWORD", "OPERATOR_TOKEN", "WORKER_TOKEN")]
    assert len(set(given)) == 3
    assert all(re.fullmatch("[0-9a-f]{48}", each) for each in given)


@pytest.fixture(scope="session")
def docker_compose_file() -> str:
    return str(ROOT / "compose.yaml")


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    return f"ai-service-test-{os.getpid()}"


@pytest.fixture(scope="session")
def docker_compose_command(image: str, secrets: dict[str, str]) -> str:
    if "docker" not in ENGINE[0]:
        pytest.skip("compose.yaml is tried on Docker only")
    settings = {
        "AI_SERVICE_IMAGE": image,
        "API_TOKENS_FILE": f"{secrets['folder']}/secrets/api_tokens",
        "COMPOSE_PROFILES": "demo,balancer",
        "AI_SERVICE_URL": "http://balancer:8080",
        "AI_SERVICE_PORT": "127.0.0.1:",
        "BALANCER_PORT": "127.0.0.1:",
    }
    return shlex.join(["env", *map("=".join, settings.items()), *compose_command().split(), "--env-file", f"{secrets['folder']}/.env"])


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    return ["up --no-build --detach"]


class Composed:
    """The project as compose.yaml brings it up, with the operator's token."""

    def __init__(self, services: Services, token: str) -> None:
        self.token = token
        self.execute = services._docker_compose.execute
        self.api = Api(services.port_for("balancer", 8080), token)

    def name(self, service: str) -> str:
        """The name of the service's container."""
        return str(self.execute(f"ps -q {service}").decode().strip())

    def described(self, service: str) -> dict[str, Any]:
        """What the engine says of the container."""
        [described] = json.loads(run("inspect", self.name(service)))
        return dict(described)

    def is_healthy(self, service: str) -> bool:
        return bool(self.described(service)["State"]["Health"]["Status"] == "healthy")

    def claims(self, service: str) -> float:
        """How many claims this service has answered since its start."""
        program = (
            "import sys, urllib.request as http; request = http.Request('http://127.0.0.1:8080/metrics');"
            "request.add_header('Authorization', 'Bearer ' + sys.argv[1]); print(http.urlopen(request).read().decode())"
        )
        figures = run("exec", self.name(service), "python3", "-c", program, self.token)
        found = re.findall(r'^ai_service_http_requests_total\{[^}]*route="/api/v1/jobs/claim"[^}]*\} (\S+)', figures, re.MULTILINE)
        return sum(map(float, found))


@pytest.fixture(scope="session")
def composed(docker_services: Services, secrets: dict[str, str]) -> Iterator[Composed]:
    made = Composed(docker_services, secrets["OPERATOR_TOKEN"])
    wait_until(lambda: made.api.get("/readyz").status == 200, 60, what="an answer through the balancer")
    yield made
    made.api.close()


@pytest.mark.docker
def test_the_worker_of_compose_ends_a_job(composed: Composed) -> None:
    corner = Corner(composed.api)
    job = corner.create(model_profile="qwen2.5-14b", input={"prompt": "Who wrote this?"})
    ended = corner.look(job, wait_seconds=30)
    assert (ended["status"], ended["result"]["content"]) == ("completed", "A stand-in wrote this, no model ran.")


@pytest.mark.docker
def test_the_service_of_compose_knows_its_tokens(composed: Composed) -> None:
    assert Api(composed.api.port).get("/api/v1/stats").status == 401
    assert Api(composed.api.port, "a" * 48).get("/api/v1/stats").status == 401
    assert composed.api.get("/api/v1/stats").status == 200


@pytest.mark.docker
@pytest.mark.parametrize("service", OURS)
def test_a_container_of_compose_has_no_rights(composed: Composed, service: str) -> None:
    said = composed.described(service)["HostConfig"]
    assert said["ReadonlyRootfs"] is True
    assert said["CapDrop"] == ["ALL"]
    assert said["SecurityOpt"] == ["no-new-privileges:true"]
    assert said["Memory"] > 0


@pytest.mark.docker
@pytest.mark.parametrize("service", ["postgres", "service", "service-two", "worker"])
def test_a_container_of_compose_is_found_healthy(composed: Composed, service: str) -> None:
    wait_until(lambda: composed.is_healthy(service), 30, what=f"health of {service}")


@pytest.mark.docker
def test_clients_notice_no_restart_of_a_container_behind_the_balancer(composed: Composed) -> None:
    with Load([composed.api]) as load:
        for service in ("service", "service-two"):
            wait_until(lambda name=service: composed.claims(name) > 0, 30, what=f"claims at {service}")
            before = composed.described(service)["State"]["StartedAt"]
            composed.execute(f"restart {service}")
            assert composed.described(service)["State"]["StartedAt"] > before
            wait_until(lambda name=service: composed.claims(name) > 0, 30, what=f"claims at {service} after its restart")
    print(f"\n{load.ledger()}")
    load.assert_whole()


@pytest.mark.docker
@pytest.mark.parametrize(("service", "farewell"), [("worker", "worker_stopped"), ("service-two", "service_stopped")])
def test_a_container_of_compose_ends_in_good_order(composed: Composed, service: str, farewell: str) -> None:
    container = composed.name(service)
    composed.execute(f"stop {service}")
    [said] = json.loads(run("inspect", container))
    assert (said["State"]["ExitCode"], said["State"]["OOMKilled"]) == (0, False)
    logged = subprocess.run(
        [*ENGINE, "logs", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=True
    )
    assert farewell in logged.stdout


@pytest.mark.docker
def test_a_container_of_compose_ends_while_it_is_starting(composed: Composed) -> None:
    composed.execute("start service-two")
    began = time.monotonic()
    composed.execute("stop service-two")
    assert time.monotonic() - began < 30, "it was killed at the end of its stop_grace_period"
