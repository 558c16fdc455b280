"""Owners and workers that never repeat a call, and a ledger of all that they were answered."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from service import Answer, Api, Corner
from urllib3.exceptions import HTTPError


class LostError(Exception):
    """A call that was not answered as it should be; it stands in the ledger already."""


class Load:
    """Clients of one corner of the queue until the end of the block; each call goes to any of the `sides`, which may change meanwhile.

    Owners create a job and wait for its result; workers wait for a claim, send a heartbeat and complete.
    """

    def __init__(self, sides: Sequence[Api], owners: int = 4, workers: int = 4) -> None:
        self.sides = list(sides)
        self.calls: Counter[tuple[str, int]] = Counter()
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self.created: list[str] = []
        self.completed: list[str] = []
        self.seen: list[str] = []
        self._corner = Corner(self.sides[0])
        self._owners_end, self._workers_end = threading.Event(), threading.Event()
        self._owners = [self._thread(self._own, self._owners_end) for _ in range(owners)]
        self._workers = [self._thread(self._work, self._workers_end) for _ in range(workers)]

    def __enter__(self) -> Load:
        for thread in (*self._owners, *self._workers):
            thread.start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for end, threads in ((self._owners_end, self._owners), (self._workers_end, self._workers)):
            end.set()
            for thread in threads:
                thread.join(60)
                if thread.is_alive():
                    self.failures.append("a client is still waiting a minute after the end")

    def assert_whole(self) -> None:
        """No call failed; every job that was created was completed once and its owner was told."""
        assert not self.failures, self.failures[:5]
        assert Counter(self.completed) == Counter(self.created) == Counter(self.seen)
        assert set(Counter(self.created).values()) == {1}

    def ledger(self) -> str:
        """Calls by route and status, one a line, and the jobs."""
        calls = [f"{route:<40} {status} {count:>8}" for (route, status), count in sorted(self.calls.items())]
        jobs = f"jobs created {len(self.created)}, completed {len(self.completed)}, results seen {len(self.seen)}"
        return "\n".join([*calls, f"{sum(self.calls.values())} calls, {len(self.failures)} failed", *self.failures[:5], jobs])

    @staticmethod
    def _thread(turn: Callable[[], None], end: threading.Event) -> threading.Thread:
        def turns() -> None:
            while not end.is_set():
                try:
                    turn()
                except LostError:
                    # What has failed once may do so at once again.
                    end.wait(0.1)

        return threading.Thread(target=turns, daemon=True)

    def _own(self) -> None:
        job = self._call("POST /api/v1/jobs", 201, "/api/v1/jobs", self._corner.job()).json
        self.created.append(job["id"])
        deadline = time.monotonic() + 60
        while job["status"] != "completed":
            if time.monotonic() > deadline:
                raise self._lost(f"{job['id']} was not completed within a minute: {job}")
            job = self._call("GET /api/v1/jobs/{id}?wait_seconds=5", 200, f"/api/v1/jobs/{job['id']}?wait_seconds=5").json
        self.seen.append(job["id"])

    def _work(self) -> None:
        for job in self._call("POST /api/v1/jobs/claim", 200, "/api/v1/jobs/claim", self._corner.claiming(wait_seconds=1)).json["jobs"]:
            path, claim = f"/api/v1/jobs/{job['id']}", {"claim_id": job["claim_id"]}
            self._call("POST /api/v1/jobs/{id}/heartbeat", 200, f"{path}/heartbeat", claim)
            self._call("POST /api/v1/jobs/{id}/complete", 200, f"{path}/complete", {**claim, "result": {"ok": True}})
            self.completed.append(job["id"])

    def _call(self, route: str, expected: int, path: str, body: Any = None) -> Answer:
        api = random.choice(self.sides)
        try:
            answer = api.get(path) if body is None else api.post(path, body)
        except HTTPError as error:
            self._count(route, 0)
            raise self._lost(f"{route}: {type(error).__name__} {error}") from error
        self._count(route, answer.status)
        if answer.status != expected:
            raise self._lost(f"{route}: {answer}")
        return answer

    def _count(self, route: str, status: int) -> None:
        with self._lock:
            self.calls[route, status] += 1

    def _lost(self, failure: str) -> LostError:
        self.failures.append(failure)
        return LostError(failure)
