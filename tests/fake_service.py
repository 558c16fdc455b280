"""Stands where the service should be: answers as told, loses answers, hangs, or forwards to a real service and then misbehaves.

with FakeService() as service:                       # or FakeService(forward_to=port)
    service.behave("/jobs/claim", loses(), answers(200, {"claim_id": "c", "jobs": []}))
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import attrs
import urllib3
from service import wait_until


@attrs.frozen
class Seen:
    """One request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body decoded."""
        return json.loads(self.body)


class FakeService(ThreadingHTTPServer):
    """The server, on a free port of 127.0.0.1 until the context is left."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, forward_to: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self.target = urllib3.HTTPConnectionPool("127.0.0.1", forward_to, maxsize=32, retries=False, timeout=90) if forward_to else None
        self._next: dict[str, deque[Behaviour]] = defaultdict(deque)
        self._always: dict[str, Behaviour] = {}
        self._lock = threading.Lock()

    def behave(self, path_end: str, *behaviours: Behaviour) -> None:
        """How the next requests to paths that end so are met, one behaviour each."""
        with self._lock:
            self._next[path_end].extend(behaviours)

    def always(self, path_end: str, behaviour: Behaviour) -> None:
        """How all further requests to paths that end so are met."""
        with self._lock:
            self._always[path_end] = behaviour

    def asked(self, path_end: str) -> list[Seen]:
        """The requests to paths that end so, so far."""
        return [seen for seen in self.seen if seen.path.partition("?")[0].endswith(path_end)]

    def wait_for(self, path_end: str, count: int = 1) -> Seen:
        """The request number `count` to such a path, once it is there."""
        wait_until(lambda: len(self.asked(path_end)) >= count, what=f"request {count} to {path_end}")
        return self.asked(path_end)[count - 1]

    def behaviour_for(self, seen: Seen) -> Behaviour:
        path = seen.path.partition("?")[0]
        with self._lock:
            self.seen.append(seen)
            for end, waiting in self._next.items():
                if path.endswith(end) and waiting:
                    return waiting.popleft()
            return next((always for end, always in self._always.items() if path.endswith(end)), forwards() if self.target else answers(404))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what these tests are about."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        if self.target:
            self.target.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeService

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = Seen(self.command, self.path, dict(self.headers), body)
        self.server.behaviour_for(seen)(self, seen)

    do_POST = do_GET  # noqa: N815 -- the name http.server calls
    do_DELETE = do_GET  # noqa: N815 -- likewise

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name http.server calls
        """Quiet: tests look at `seen`."""

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def forward(self, seen: Seen) -> urllib3.BaseHTTPResponse:
        assert self.server.target is not None
        headers = {name: value for name, value in seen.headers.items() if name in ("Content-Type", "Authorization")}
        return self.server.target.request(seen.method, seen.path, body=seen.body or None, headers=headers)


Behaviour = Callable[[_Handler, Seen], None]


def answers(status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> Behaviour:
    """This answer; `body` is a JSON value, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
    return lambda handler, seen: handler.send(status, content, headers or {})


def problem(status: int, code: str, headers: Mapping[str, str] | None = None, **more: Any) -> Behaviour:
    """A problem body."""
    return answers(status, {"status": status, "code": code, "title": code.replace("_", " "), **more}, headers)


def loses() -> Behaviour:
    """Takes the request and closes without an answer."""
    return lambda handler, seen: setattr(handler, "close_connection", True)


def hangs() -> Behaviour:
    """Takes the request and never answers."""

    def hang(handler: _Handler, seen: Seen) -> None:
        handler.server.closing.wait()
        handler.close_connection = True

    return hang


def forwards() -> Behaviour:
    """The real service's answer."""

    def forward(handler: _Handler, seen: Seen) -> None:
        real = handler.forward(seen)
        names = ("Content-Type", "Retry-After", "Location")
        handler.send(real.status, real.data, {name: real.headers[name] for name in names if name in real.headers})

    return forward


def forwards_and(then: Behaviour) -> Behaviour:
    """Lets the real service do it, and then behaves otherwise: its answer is lost."""

    def forward(handler: _Handler, seen: Seen) -> None:
        handler.forward(seen)
        then(handler, seen)

    return forward
