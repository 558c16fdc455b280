"""Real model services for the opt-in tests: `pytest -m real`, with the commands that start them in the environment.

    REAL_VLLM_COMMAND      a command that serves the model qwen2.5-14b in the foreground, with the key REAL_VLLM_KEY (test-key)
    REAL_WHISPERX_COMMAND  a WhisperX server, with the key REAL_WHISPERX_KEY (test-key)
    REAL_OPENCLAW_COMMAND  an OpenClaw gateway, with {port}, {upstream} (a base URL), {model} and {token}

The port is put in for `{port}`, or added at the end. A test without its command is skipped.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import pytest
import urllib3
from service import wait_until


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@attrs.define
class Server:
    """A model service in a process group of its own, that can be killed and started again on its port."""

    command: list[str]
    port: int
    log: Path
    environment: dict[str, str]
    ready_path: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 180) -> None:
        """Start it, and return once it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_until(self._answers, seconds, f"{self.command[0]} to answer")

    def kill(self) -> None:
        """SIGKILL to all its processes: nothing ends in good order."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        """End it in good order, as it may have processes in groups of their own; at once if it takes long."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.kill()

    def gauge(self, name: str) -> float:
        """A metric of its `/metrics`."""
        text = urllib3.request("GET", f"{self.url}/metrics", retries=False, timeout=5).data.decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended: {self.log.read_text()[-2000:]}"
        with suppress(urllib3.exceptions.HTTPError):
            return urllib3.request("GET", self.url + self.ready_path, retries=False, timeout=5).status == 200
        return False


def command_of(name: str, port: int, **fields: str) -> list[str]:
    """The words of REAL_<name>_COMMAND for this port; skips the test where it is not set."""
    command = os.environ.get(f"REAL_{name}_COMMAND") or pytest.skip(f"REAL_{name}_COMMAND names no server")
    return [*shlex.split(command.format(port=port, **fields)), *([] if "{port}" in command else [str(port)])]


@contextmanager
def real_server(name: str, folder: Path, ready_path: str, *arguments: str, **environment: str) -> Iterator[Server]:
    """The server that REAL_<name>_COMMAND starts; fields of the command in lower case, the rest of `environment` for its process."""
    port = free_port()
    words = command_of(name, port, **{field: value for field, value in environment.items() if field.islower()})
    own = {field: value for field, value in environment.items() if not field.islower()}
    server = Server([*words, *arguments], port, folder / f"{name.lower()}.log", own, ready_path)
    try:
        server.start()
        yield server
    finally:
        server.stop()
