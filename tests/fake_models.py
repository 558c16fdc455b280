"""What the fake model servers have in common: behaviours that a test sets, and conditions that it waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class FakeModelServer(ThreadingHTTPServer):
    """A context manager that listens on a free port of 127.0.0.1 until it is left. What it sees has a `gone_at`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler], default: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.seen: list[Any] = []
        self.closing = threading.Event()
        self._next: deque[Any] = deque()
        self._default = default
        self._changed = threading.Condition()

    @property
    def origin(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def behave(self, *behaviours: Any) -> None:
        """How the next requests for work are met, one behaviour each."""
        self._next.extend(behaviours)

    def always(self, behaviour: Any) -> None:
        """How requests for work are met when nothing else is set for them."""
        self._default = behaviour

    def wait_until(self, true: Callable[[], bool], within_seconds: float = 10.0) -> None:
        """Wait for something the server sees. Raises `AssertionError` when it does not come."""
        with self._changed:
            assert self._changed.wait_for(true, within_seconds), f"not within {within_seconds} s; seen: {len(self.seen)} requests"

    def wait_for_requests(self, count: int, within_seconds: float = 10.0) -> None:
        """Wait until so many requests for work have arrived."""
        self.wait_until(lambda: len(self.seen) >= count, within_seconds)

    def wait_for_hang_ups(self, count: int, within_seconds: float = 10.0) -> None:
        """Wait until so many clients have hung up on their requests."""
        self.wait_until(lambda: sum(seen.gone_at is not None for seen in self.seen) >= count, within_seconds)

    def behaviour_for(self, seen: Any) -> Any:
        """Take note of a request for work; how it is to be met."""
        with self._changed:
            self.seen.append(seen)
            self._changed.notify_all()
            return self._next.popleft() if self._next else self._default

    def client_gone(self, seen: Any) -> None:
        """Take note of a client that hung up."""
        with self._changed:
            seen.gone_at = time.monotonic()
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what these tests are about, not an error to print."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, name="fake-models", daemon=True).start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
