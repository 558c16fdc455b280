"""HAProxy with examples/haproxy/haproxy.cfg in front of two services that are restarted in turn under load: no client may notice.

`make rolling` restarts them 60 times; the default is a short form. The clients repeat nothing, and HAProxy repeats only what it could not
send.
"""

import csv
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from load import Load
from postgres import free_port, fresh_schema
from service import Api, Service, wait_until
from test_chaos import free_ports

CONFIGURATION = Path(__file__).parent.parent / "examples" / "haproxy" / "haproxy.cfg"
RESTARTS = int(os.environ.get("ROLLING_RESTARTS", "3"))
# The example's checks see a drain within 2.7 s, however slow the answers are; see the comment there.
DRAIN_SECONDS = "3"

pytestmark = pytest.mark.skipif(
    shutil.which("haproxy") is None and os.environ.get("CI") != "true", reason="haproxy is not installed (Debian's package of that name)"
)


class Site:
    """Two services, and a real HAProxy with the example's configuration in front of them; `folder` has a short path, for a socket in it."""

    names = ("one", "two")

    def __init__(self, postgres_url: str, schema: str, folder: Path) -> None:
        self._database = postgres_url, schema
        self._socket = folder / "stats"
        self._ports = dict(zip(self.names, free_ports(2), strict=True))
        self.port = free_port()
        self.services: dict[str, Service] = {}

    def start(self) -> None:
        """Returns once HAProxy has found both services ready."""
        for name in self.names:
            self._start_service(name)
        addresses = {f"AI_SERVICE_{name.upper()}": f"127.0.0.1:{port}" for name, port in self._ports.items()}
        variables = {"AI_SERVICE_BIND": f"127.0.0.1:{self.port}", "AI_SERVICE_SOCKET": str(self._socket), **addresses}
        command = ["haproxy", "-db", "-f", str(CONFIGURATION)]
        self._haproxy = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._listens, 30, what="HAProxy's start")
        for name in self.names:
            self._wait_for(name)

    def restart(self, name: str) -> None:
        """SIGTERM, a clean end, a new process on the same port, and the balancer hands it requests again."""
        self.services[name].terminate()
        assert self.services[name].wait() == 0
        self.services[name].stop()
        self._start_service(name)
        self._wait_for(name)

    def row(self, name: str) -> dict[str, str]:
        """What HAProxy says of a service."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(self._socket))
            asked.sendall(b"show stat\n")
            text = b"".join(iter(lambda: asked.recv(65536), b"")).decode()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return next(row for row in rows if (row["pxname"], row["svname"]) == ("services", name))

    def stop(self) -> None:
        """Ends all that was started."""
        if hasattr(self, "_haproxy"):
            self._haproxy.kill()
            self._haproxy.wait(10)
        for service in self.services.values():
            service.stop()

    def _start_service(self, name: str) -> None:
        self.services[name] = Service(*self._database, HTTP_PORT=str(self._ports[name]), DRAIN_SECONDS=DRAIN_SECONDS).start()

    def _wait_for(self, name: str) -> None:
        wait_until(lambda: self._is_up(self.row(name)), 30, what=f"service {name} in HAProxy")

    @staticmethod
    def _is_up(row: dict[str, str]) -> bool:
        return (row["status"], row["check_status"]) == ("UP", "L7OK")

    def _listens(self) -> bool:
        assert self._haproxy.poll() is None, "HAProxy ended"
        with socket.socket() as probe, socket.socket(socket.AF_UNIX) as asked:
            return probe.connect_ex(("127.0.0.1", self.port)) == asked.connect_ex(str(self._socket)) == 0


@pytest.fixture
def site(postgres_url: str) -> Iterator[Site]:
    # Not pytest's folder: its path would be too long for a socket's.
    with fresh_schema(postgres_url) as schema, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        made = Site(postgres_url, schema, Path(folder))
        stack.callback(made.stop)
        made.start()
        yield made


@pytest.mark.long
def test_clients_notice_no_restart_behind_a_balancer(site: Site) -> None:
    api = Api(site.port)
    with Load([api]) as load:
        for number in range(RESTARTS):
            site.restart(site.names[number % 2])
    api.close()
    print(f"\n{load.ledger()}\n{RESTARTS} restarts")
    for name in site.names:
        print(f"HAProxy, service {name}: { ({key: site.row(name)[key] for key in ('hrsp_2xx', 'wretr', 'wredis', 'econ', 'eresp')}) }")
    load.assert_whole()
    assert min(int(site.row(name)["hrsp_2xx"]) for name in site.names) > 100, "both took part"
