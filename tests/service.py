"""Real service processes for the tests, and a small HTTP client that hides nothing of an answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlencode

import attrs
import pytest
import urllib3

MAIN = Path(__file__).parent.parent / "ai_service.py"

# What a process needs of the machine; every setting of the service itself is given by the test.
INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "VIRTUAL_ENV", "SYSTEMROOT")


def wait_until(condition: Callable[[], Any], seconds: float = 10, what: str = "the condition") -> Any:
    """The first true value of `condition`; AssertionError after `seconds`.

    Asked every 20 ms at first, then ever less often, up to every 100 ms: most conditions are a call
    of the service, and asking is what a test that waits costs.
    """
    begun, pause = monotonic(), threading.Event()
    while not (value := condition()):
        waited = monotonic() - begun
        assert waited < seconds, f"{what} did not come true within {seconds} s"
        pause.wait(min(0.1, 0.02 + waited / 20))
    return value


def program(name: str, package: str) -> str:
    """Where a program is; the test is skipped without it, but not in CI."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI") != "true":
        pytest.skip(f"{name} is not installed: apt-get install {package}")
    assert found, f"{name} is missing: .ci/run has to install {package}"
    return found


@attrs.frozen
class Answer:
    """An HTTP answer: status, headers (any case), the bytes of the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=lambda body: repr(body[:1000]))

    @property
    def json(self) -> Any:
        """The body decoded; ValueError where it is not JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The stable code of a whole and well-formed problem; None for an answer that is no error."""
        if self.status < 400:
            return None
        assert self.headers["Content-Type"].split(";")[0] == "application/problem+json", self
        problem = self.json
        assert {"type", "title", "status", "detail", "code", "retryable"} <= set(problem), problem
        assert (problem["status"], problem["retryable"]) == (self.status, self.status == 503), problem
        assert re.fullmatch("[a-z][a-z0-9_]*", problem["code"]), problem
        return str(problem["code"])

    @property
    def paths(self) -> list[str]:
        """The JSON pointers of a problem's `errors`, sorted."""
        return sorted(error["path"] for error in self.json["errors"])


class Api:
    """The HTTP interface of one service process; safe to use from many threads."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port = port
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=128, retries=False, timeout=90)

    def request(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Send exactly this; raises urllib3's errors where no answer comes."""
        response = self._pool.request(method, path, body=body, headers={**self._headers, **(headers or {})})
        return Answer(response.status, response.headers, response.data)

    def post(self, path: str, json: Any = None, body: bytes | None = None, media_type: str = "application/json") -> Answer:
        """POST `json`, or `body` as it is; nothing where neither is given."""
        sent = body if body is not None else encoded(json) if json is not None else b""
        return self.request("POST", path, sent, {"Content-Type": media_type})

    def get(self, path: str, **query: Any) -> Answer:
        """GET with a query; a list repeats its parameter."""
        return self.request("GET", path + ("?" + urlencode(query, doseq=True) if query else ""))

    def delete(self, path: str) -> Answer:
        """DELETE."""
        return self.request("DELETE", path)

    def raw(self, request: bytes, seconds: float = 30) -> bytes:
        """Everything the service sends back for these bytes until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    @contextmanager
    def unread(self, path: str, json: Any) -> Iterator[socket.socket]:
        """A whole POST whose answer nobody has read yet: hung up at the end, as by a caller whose answer gets lost."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(raw_post(path, encoded(json)))
            yield connection

    def close(self) -> None:
        """Close the kept connections."""
        self._pool.close()


def encoded(value: Any) -> bytes:
    """`value` as JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode()


def raw_post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a POST, further header lines included, after which the connection is closed."""
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Connection: close", *headers)
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


class Service:
    """One `ai_service.py serve` process on a free port, and everything it logs; another release has another `command`."""

    command: tuple[str, ...] = (sys.executable, str(MAIN), "serve")

    def __init__(self, database_url: str, schema: str, **settings: str) -> None:
        machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
        defaults = {"HTTP_HOST": "127.0.0.1", "HTTP_PORT": "0", "DRAIN_SECONDS": "0"}
        self.environment = {**machine, **defaults, "DATABASE_URL": database_url, "DATABASE_SCHEMA": schema, **settings}
        self.schema = schema
        # Words of a command that starts what follows it.
        self.before: tuple[str, ...] = ()
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False

    def start(self) -> Service:
        """Start, and return once it listens; AssertionError with its log when it does not within 30 s."""
        self.process = subprocess.Popen(
            [*self.before, *self.command], env=self.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with self._changed:
            self._changed.wait_for(lambda: self._port() or self._ended, timeout=30)
        port = self._port()
        if port is None:
            self.kill()
            raise AssertionError(f"the service did not start:\n{self.log}")
        self.api = Api(port)
        return self

    @property
    def log(self) -> str:
        """All it has logged so far."""
        return "\n".join(self.lines)

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 20) -> int:
        """The exit status, once the process has ended; subprocess.TimeoutExpired after `seconds`."""
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def kill(self) -> None:
        """SIGKILL: it can do nothing more, not even close a connection in good order."""
        self.process.kill()
        self.wait()

    def stop(self) -> None:
        """End it whatever it does, in good order if it can; harmless when it has ended."""
        if hasattr(self, "api"):
            self.api.close()
        if self.process.poll() is None:
            self.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def _port(self) -> int | None:
        found = re.search(r"service_started.*?\bport(?:=|\": )(\d+)", self.log)
        return int(found[1]) if found else None

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def open_files(service: Service) -> list[str]:
    """What the descriptors of a service stand for: a path, or `socket:[inode]`."""
    found = []
    for descriptor in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(descriptor.readlink()))
    return found


@contextmanager
def running_service(database_url: str, schema: str, **settings: str) -> Iterator[Service]:
    """A started service, stopped at the end."""
    service = Service(database_url, schema, **settings)
    try:
        yield service.start()
    finally:
        service.stop()


@contextmanager
def worker_process(port: int, folder: Path, **settings: str) -> Iterator[Path]:
    """`ai_service.py worker` for the service on this port, killed at the end; gives its log, which lies in `folder` beside its spool."""
    machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
    own = {"AI_SERVICE_URL": f"http://127.0.0.1:{port}", "WORKER_SPOOL_DIR": str(folder / "spool")}
    log = folder / "worker.log"
    with log.open("w") as stderr:
        process = subprocess.Popen([sys.executable, str(MAIN), "worker"], env={**machine, **own, **settings}, stderr=stderr)
    try:
        yield log
    finally:
        process.kill()
        process.wait()


NEEDED: dict[str, dict[str, Any]] = {"complete": {"result": {"ok": True}}, "fail": {"category": "timeout", "message": "too slow"}}


class Corner:
    """One test's own corner of the queue: an owner, a task type, a model profile and a worker that no other test uses."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.mark = uuid.uuid4().hex[:12]
        self.owner_service = f"owner-{self.mark}"
        self.task_type = f"type-{self.mark}"
        self.model_profile = f"profile-{self.mark}"
        self.worker_id = f"worker-{self.mark}"

    def through(self, api: Api) -> Corner:
        """The same corner, seen through another process."""
        same = Corner(api)
        same.__dict__.update({**self.__dict__, "api": api})
        return same

    def job(self, **fields: Any) -> dict[str, Any]:
        """The body of a job to create."""
        own = {"owner_service": self.owner_service, "task_type": self.task_type, "model_profile": self.model_profile}
        return {**own, "owner_ref": "call/1", "input": {"text": "hello"}, **fields}

    def create(self, **fields: Any) -> dict[str, Any]:
        """A new job, as the service answered it."""
        answer = self.api.post("/api/v1/jobs", self.job(**fields))
        assert answer.status == 201, answer
        return dict(answer.json)

    def batch(self, jobs: list[dict[str, Any]], status: int = 201) -> list[dict[str, Any]]:
        """The items of a batch with this corner's defaults."""
        defaults = {key: value for key, value in self.job().items() if key != "owner_ref"}
        given = [{"owner_ref": f"call/{number}", **job} for number, job in enumerate(jobs)]
        answer = self.api.post("/api/v1/jobs/batch", {"defaults": defaults, "jobs": given})
        assert answer.status == status, answer
        return list(answer.json["jobs"])

    def claiming(self, **fields: Any) -> dict[str, Any]:
        """The body of a claim in this corner."""
        return {"worker_id": self.worker_id, "model_profiles": [self.model_profile], **fields}

    def claim(self, **fields: Any) -> list[dict[str, Any]]:
        """The jobs handed out."""
        answer = self.api.post("/api/v1/jobs/claim", self.claiming(**fields))
        assert answer.status == 200, answer
        return list(answer.json["jobs"])

    def take(self, **fields: Any) -> dict[str, Any]:
        """A new job, already claimed, as the claim handed it out."""
        created = self.create(**fields)
        [job] = self.claim()
        assert job["id"] == created["id"]
        return job

    def call(self, job: Mapping[str, Any], verb: str, **fields: Any) -> Answer:
        """POST …/{id}/{verb} with what the verb needs; the job's claim_id where the verb takes one."""
        claim: dict[str, Any] = {} if verb in ("retry", "cancel") else {"claim_id": job["claim_id"]}
        return self.api.post(f"/api/v1/jobs/{job['id']}/{verb}", {**claim, **NEEDED.get(verb, {}), **fields})

    def done(self, job: Mapping[str, Any], verb: str, **fields: Any) -> dict[str, Any]:
        """The same, asserting success; the JSON answered."""
        answer = self.call(job, verb, **fields)
        assert answer.status == 200, answer
        return dict(answer.json)

    def look(self, job: Mapping[str, Any], **query: Any) -> dict[str, Any]:
        """The job as it is now."""
        answer = self.api.get(f"/api/v1/jobs/{job['id']}", **query)
        assert answer.status == 200, answer
        return dict(answer.json)
