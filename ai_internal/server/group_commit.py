"""Calls of one kind that come while one is under way share the next statement."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from ai_internal.server.requests import Refusal
from ai_internal.telemetry import about, request_id

MAX_ITEMS = 100
MAX_BYTES = 4 << 20


def taken_lock() -> threading.Lock:
    """A lock that is taken: whoever takes it again waits for its release. Half the work of an Event."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@attrs.define(eq=False)
class _Waiter:
    """One caller's part of a statement."""

    item: Any
    size: int
    answer: Any = None
    is_next: bool = False
    request_id: str = attrs.field(factory=request_id)
    # Released once, when the answer is there or this caller runs the next batch.
    woken: threading.Lock = attrs.field(factory=taken_lock)


class GroupCommit:
    """Shares one statement, and so its round trip and its commit, between concurrent calls.

    Nobody waits for company: a call that finds none under way runs at once, alone. Those that come meanwhile
    form the next batch. Where a statement for several fails, each is tried by itself, so that an invalid item
    fails none of the others.
    """

    def __init__(self, act: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._act = act
        self._lock = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._is_busy = False

    def run(self, item: Any, size: int) -> Any:
        """The answer for one item of `size` bytes. Raises a Refusal, or what the statement raised."""
        mine = _Waiter(item, size)
        with self._lock:
            self._waiting.append(mine)
            is_first, self._is_busy = not self._is_busy, True
        if not is_first:
            mine.woken.acquire()
        if is_first or mine.is_next:
            self._run_batch()
        if isinstance(mine.answer, BaseException):
            raise mine.answer
        return mine.answer

    def _run_batch(self) -> None:
        """Acts for those who wait, the calling thread's own item first, and wakes them and the next."""
        with self._lock:
            batch = self._next_batch()
        try:
            self._answer(batch)
        finally:
            with self._lock:
                self._wake_next()
            for waiter in batch[1:]:
                waiter.woken.release()

    def _next_batch(self) -> list[_Waiter]:
        batch = [self._waiting.popleft()]
        size = batch[0].size
        while self._waiting and len(batch) < MAX_ITEMS and size + self._waiting[0].size <= MAX_BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    def _wake_next(self) -> None:
        self._is_busy = bool(self._waiting)
        if self._waiting:
            self._waiting[0].is_next = True
            self._waiting[0].woken.release()

    def _answer(self, batch: Sequence[_Waiter]) -> None:
        try:
            with about(request_id=",".join(waiter.request_id for waiter in batch)):
                answers = self._act([waiter.item for waiter in batch])
            for waiter, answer in zip(batch, answers, strict=True):
                waiter.answer = answer
        except BaseException as error:  # noqa: BLE001 -- each caller gets it
            if len(batch) == 1 or (isinstance(error, Refusal) and error.retry_after):
                for waiter in batch:
                    waiter.answer = error
            else:
                for waiter in batch:
                    self._answer([waiter])
