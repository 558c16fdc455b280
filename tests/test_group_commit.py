"""Calls that come at the same time share a statement, and none of them notices the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from service import Corner, wait_until

from ai_internal.server.group_commit import MAX_ITEMS, GroupCommit
from ai_internal.server.requests import Refusal, ServiceFull

# ---------------------------------------------------------------- by itself


class Slow:
    """An act that goes on once the test lets it, and remembers what it was given together."""

    def __init__(self, answer: Callable[[Any], Any] = lambda item: item * 10) -> None:
        self.batches: list[list[Any]] = []
        self.may_go_on = threading.Semaphore(0)
        self._answer = answer

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        self.batches.append(list(items))
        assert self.may_go_on.acquire(timeout=20)
        return [self._answer(item) for item in items]


@contextmanager
def calls(act: Slow, items: Sequence[int], size: int = 1) -> Iterator[list[Any]]:
    """One call after the other comes while the first is under way; inside, all wait. What each got is there afterwards."""
    commits, got = GroupCommit(act), []
    with ThreadPoolExecutor(len(items)) as threads:
        futures = []
        for item in items:
            futures.append(threads.submit(commits.run, item, size))
            wait_until(lambda: act.batches and len(commits._waiting) == len(futures) - 1, what="the call to wait")
        yield got
    got += [future.exception() or future.result() for future in futures]


def test_who_comes_first_goes_alone_and_the_others_together() -> None:
    act = Slow()
    with calls(act, [1, 2, 3, 4]) as got:
        act.may_go_on.release(2)
    assert act.batches == [[1], [2, 3, 4]]
    assert got == [10, 20, 30, 40]


def test_a_statement_takes_so_many_calls_and_so_many_bytes() -> None:
    act = Slow()
    with calls(act, range(5), size=3 << 20):
        act.may_go_on.release(5)
    assert [len(batch) for batch in act.batches] == [1, 1, 1, 1, 1]
    assert MAX_ITEMS == 100


def test_an_ill_item_fails_alone() -> None:
    def answer(item: int) -> int:
        if item == 3:
            raise ValueError("ill")
        return item * 10

    act = Slow(answer)
    with calls(act, [1, 2, 3, 4]) as got:
        act.may_go_on.release(5)
    assert act.batches == [[1], [2, 3, 4], [2], [3], [4]]
    assert [str(each) for each in got] == ["10", "20", "ill", "40"]


def test_a_refusal_that_passes_is_everybodys_and_is_not_tried_again() -> None:
    def answer(item: int) -> int:
        if item > 1:
            raise ServiceFull
        return item * 10

    act = Slow(answer)
    with calls(act, [1, 2, 3]) as got:
        act.may_go_on.release(2)
    assert act.batches == [[1], [2, 3]]
    assert [type(each) for each in got] == [int, ServiceFull, ServiceFull]


def test_an_answer_that_is_a_refusal_is_raised() -> None:
    act = Slow(lambda item: Refusal() if item == 2 else item)
    with calls(act, [1, 2, 3]) as got:
        act.may_go_on.release(2)
    assert [type(each) for each in got] == [int, Refusal, int]


# ---------------------------------------------------------------- through the service


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    together = threading.Barrier(count)

    def run(number: int) -> Any:
        together.wait(20)
        return act(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def test_jobs_created_at_once_are_each_their_callers(corner: Corner) -> None:
    answers = at_once(24, lambda number: corner.api.post("/api/v1/jobs", corner.job(owner_ref=f"ref/{number}", input={"n": number})))
    assert {answer.status for answer in answers} == {201}
    assert [answer.json["owner_ref"] for answer in answers] == [f"ref/{number}" for number in range(24)]
    assert [corner.look(answer.json, include="input")["input"] for answer in answers] == [{"n": number} for number in range(24)]


def test_one_key_created_at_once_makes_one_job(corner: Corner) -> None:
    answers = at_once(24, lambda number: corner.api.post("/api/v1/jobs", corner.job(idempotency_key="same")))
    assert sorted(answer.status for answer in answers) == [200] * 23 + [201]
    assert len({answer.json["id"] for answer in answers}) == 1


def test_a_key_that_stands_for_another_job_refuses_its_own_call_alone(corner: Corner) -> None:
    corner.create(idempotency_key="taken")
    answers = at_once(
        24,
        lambda number: corner.api.post(
            "/api/v1/jobs", corner.job(owner_ref=f"ref/{number}", **({"idempotency_key": "taken"} if number % 8 == 0 else {}))
        ),
    )
    assert [answer.status for answer in answers] == [409 if number % 8 == 0 else 201 for number in range(24)]
    assert {answer.code for answer in answers} == {None, "idempotency_key_reused"}


@pytest.mark.parametrize("round_", range(3))
def test_jobs_completed_at_once_are_each_judged_by_their_own_claim(corner: Corner, round_: int) -> None:
    corner.batch([{} for _ in range(24)])
    jobs = corner.claim(limit=24)
    for job in jobs[::6]:
        job["claim_id"] = jobs[0]["claim_id"][::-1].translate(str.maketrans("-", "0"))[:8] + jobs[0]["claim_id"][8:]
    answers = at_once(24, lambda number: corner.call(jobs[number], "complete", result={"n": number}))
    assert [answer.status for answer in answers] == [409 if number % 6 == 0 else 200 for number in range(24)]
    assert all(answer.json["result"] == {"n": number} for number, answer in enumerate(answers) if number % 6)
    assert {answer.code for answer in answers} == {None, "claim_lost"}


def test_jobs_failed_and_released_at_once_are_each_judged_by_their_own_claim(corner: Corner) -> None:
    corner.batch([{} for _ in range(24)])
    jobs = corner.claim(limit=24)
    corner.done(jobs[0], "complete", result=1)
    corner.done(jobs[1], "complete", result=1)

    def end(number: int) -> Any:
        if number % 2:
            return corner.call(jobs[number], "release")
        return corner.call(jobs[number], "fail", category="timeout", message=f"slow {number}", retryable=False)

    answers = at_once(24, end)
    assert [answer.status for answer in answers] == [409, 409] + [200] * 22
    assert [answer.json["status"] for answer in answers[2:]] == ["failed", "pending"] * 11
    assert [answer.json["error"]["message"] for answer in answers[2::2]] == [f"slow {number}" for number in range(2, 24, 2)]
