"""Two service processes on one database, and calls that meet: every job once, every pair of calls with one outcome."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Event
from time import monotonic
from typing import Any

import pytest
from postgres import Sql, connect
from service import Answer, Corner, Service, wait_until

ROUNDS = 40


@pytest.fixture
def pair(corner: Corner, another_service: Service) -> tuple[Corner, Corner]:
    """One corner of the queue, seen through either of two processes on one schema."""
    return corner, corner.through(another_service.api)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls give, made at the same moment, each in a thread of its own."""
    barrier = Barrier(len(calls))

    def at_once(call: Callable[[], Any]) -> Any:
        barrier.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(at_once, calls))


def verdicts(*answers: Answer) -> tuple[str, ...]:
    return tuple(answer.code or str(answer.status) for answer in answers)


def meet(pair: tuple[Corner, Corner], jobs: list[dict[str, Any]], one: str, other: str) -> Counter[tuple[str, str, str]]:
    """How often each outcome (answer to one, answer to the other, status after) came about."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for job in jobs:
        first, second = together(partial(pair[0].call, job, one), partial(pair[1].call, job, other))
        seen[(*verdicts(first, second), pair[0].look(job)["status"])] += 1
    return seen


def held(pair: tuple[Corner, Corner], count: int = ROUNDS) -> list[dict[str, Any]]:
    pair[0].batch([{} for _ in range(count)])
    return pair[0].claim(limit=count)


def test_eight_workers_claim_every_job_exactly_once(pair: tuple[Corner, Corner]) -> None:
    total = 4000
    items = [item for _ in range(4) for item in pair[0].batch([{} for _ in range(total // 4)])]
    claimed = together(*(partial(drain, pair[number % 2], f"w{number}") for number in range(8)))
    everything = [identity for part in claimed for identity in part]
    assert len(everything) == total
    assert sorted(everything) == sorted(item["id"] for item in items)


def drain(corner: Corner, worker_id: str) -> list[str]:
    """Claim and complete until nothing comes any more."""
    taken: list[str] = []
    while jobs := corner.claim(worker_id=worker_id, limit=25):
        taken += [job["id"] for job in jobs]
        items = [{"id": job["id"], "claim_id": job["claim_id"], "result": worker_id} for job in jobs]
        done = corner.api.post("/api/v1/jobs/complete", {"jobs": items})
        assert {each["status"] for each in done.json["jobs"]} == {200}
    return taken


def test_eight_waiting_claims_get_every_job_exactly_once(pair: tuple[Corner, Corner]) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(pair[number % 2].claim, worker_id=f"w{number}", wait_seconds=20, limit=3) for number in range(8)]
        items = [pair[0].create() for _ in range(24)]
        got = [job["id"] for future in waiting for job in future.result(40)]
    rest = pair[0].claim(limit=100)
    assert sorted(got + [job["id"] for job in rest]) == sorted(item["id"] for item in items)


def test_no_job_is_passed_over_while_others_are_created_and_claimed(pair: tuple[Corner, Corner]) -> None:
    with ThreadPoolExecutor(8) as pool:
        creating = [pool.submit(create_in_pieces, pair[number % 2], number) for number in range(4)]
        wanted = 4 * 60 * 3
        claiming = [pool.submit(claim_until_nothing_comes, pair[number % 2], f"w{number}") for number in range(4)]
        created = [identity for future in creating for identity in future.result(60)]
        claimed = [identity for future in claiming for identity in future.result(60)]
    assert len(created) == wanted
    assert sorted(claimed) == sorted(created)


def test_a_job_whose_readiness_is_committed_late_is_not_passed_over(corner: Corner, service: Service, postgres_url: str) -> None:
    late = corner.create(run_at="2999-01-01T00:00:00Z")
    connection = connect(postgres_url, service.schema)
    columns = "lane_id, job_id, expires_at, attempt, releases, input_bytes"
    moved = f"with due as (delete from waiting where job_id = cast(:id as uuid) returning {columns})"
    connection.run("begin")
    connection.run(f"{moved} insert into ready ({columns}, run_at) select {columns}, now() from due", id=late["id"])
    claimed, pause = 0, Event()
    deadline = monotonic() + 3
    while monotonic() < deadline:  # Long enough for the service to take for granted that nothing older is left.
        corner.create()
        claimed += len(corner.claim(limit=2))
        pause.wait(0.02)
    connection.run("commit")
    connection.close()
    assert claimed > 10
    assert late["id"] in [job["id"] for job in wait_until(lambda: corner.claim(limit=100), 12, "the late job")]


def create_in_pieces(corner: Corner, number: int) -> list[str]:
    """The ids of 60 batches of three jobs, all of one owner, type and profile."""
    return [item["id"] for _ in range(60) for item in corner.batch([{"owner_ref": f"{number}"}] * 3)]


def claim_until_nothing_comes(corner: Corner, worker_id: str) -> list[str]:
    """Waits for jobs, and ends when none has come for 3 s."""
    taken: list[str] = []
    while jobs := corner.claim(worker_id=worker_id, limit=7, wait_seconds=3):
        taken += [job["id"] for job in jobs]
    return taken


def test_one_claim_made_twice_at_once_takes_its_jobs_once(pair: tuple[Corner, Corner]) -> None:
    pair[0].batch([{} for _ in range(100)])
    for _ in range(10):
        claim_id = str(uuid.uuid4())
        answers = together(*(partial(corner.claim, claim_id=claim_id, limit=3) for corner in pair))
        mine = {job["id"] for jobs in answers for job in jobs}
        assert len(mine) == 3
        assert {job["id"] for job in pair[0].claim(claim_id=claim_id, limit=3)} == mine


def test_cancel_and_complete_leave_one_winner(pair: tuple[Corner, Corner]) -> None:
    seen = meet(pair, held(pair), "cancel", "complete")
    assert set(seen) <= {("200", "job_cancelled", "cancelled"), ("invalid_state", "200", "completed")}, seen


def test_retry_and_complete_leave_one_winner(pair: tuple[Corner, Corner]) -> None:
    seen = meet(pair, held(pair), "retry", "complete")
    assert set(seen) <= {("200", "claim_lost", "pending"), ("invalid_state", "200", "completed")}, seen


def test_release_and_cancel_always_end_in_cancelled(pair: tuple[Corner, Corner]) -> None:
    seen = meet(pair, held(pair), "release", "cancel")
    assert set(seen) <= {("job_cancelled", "200", "cancelled"), ("200", "200", "cancelled")}, seen


def test_fail_and_complete_of_one_claim_leave_one_winner(pair: tuple[Corner, Corner]) -> None:
    seen = meet(pair, held(pair), "fail", "complete")
    assert set(seen) <= {("200", "claim_lost", "failed"), ("claim_lost", "200", "completed")}, seen


def test_two_cancels_agree(pair: tuple[Corner, Corner]) -> None:
    assert set(meet(pair, held(pair), "cancel", "cancel")) == {("200", "200", "cancelled")}


def test_two_completes_of_one_claim_agree_on_the_first_result(pair: tuple[Corner, Corner]) -> None:
    for job in held(pair):
        answers = together(*(partial(corner.call, job, "complete", result=number) for number, corner in enumerate(pair)))
        assert [answer.status for answer in answers] == [200, 200]
        assert {answer.json["result"] for answer in answers} == {pair[0].look(job)["result"]}


def test_cancel_and_claim_leave_no_job_with_a_worker_that_may_finish_it(pair: tuple[Corner, Corner]) -> None:
    for _ in range(ROUNDS):
        job = pair[0].create()
        cancelled, claimed = together(partial(pair[0].call, job, "cancel"), pair[1].claim)
        assert cancelled.status == 200
        assert pair[0].look(job)["status"] == "cancelled"
        assert [pair[1].call(each, "complete").code for each in claimed] == ["job_cancelled"] * len(claimed)


def test_two_creates_of_one_key_make_one_job(pair: tuple[Corner, Corner]) -> None:
    for number in range(ROUNDS):
        body = pair[0].job(idempotency_key=f"key-{number}")
        answers = together(*(partial(corner.api.post, "/api/v1/jobs", body) for corner in pair))
        assert sorted(answer.status for answer in answers) == [200, 201]
        assert len({answer.json["id"] for answer in answers}) == 1


def test_retry_and_delete_leave_one_winner(pair: tuple[Corner, Corner]) -> None:
    for job in held(pair):
        pair[0].done(job, "fail")
        path = f"/api/v1/jobs/{job['id']}"
        retried, deleted = together(partial(pair[0].call, job, "retry"), partial(pair[1].api.delete, path))
        after = pair[0].api.get(path).status
        assert (retried.status, deleted.status, after) in {(200, 409, 200), (404, 204, 404)}


def test_a_pause_holds_for_a_combination_first_seen_at_the_same_moment(pair: tuple[Corner, Corner]) -> None:
    for number in range(ROUNDS):
        profile = f"{pair[0].model_profile}-{number}"
        paused, created = together(
            partial(pair[0].api.post, "/api/v1/pause", {"model_profiles": [profile]}), partial(pair[1].create, model_profile=profile)
        )
        assert (paused.status, created["status"]) == (200, "pending")
        assert [corner.claim(model_profiles=[profile]) for corner in pair] == [[], []]


def test_batches_that_bring_the_same_new_combinations_do_not_deadlock(pair: tuple[Corner, Corner]) -> None:
    for number in range(8):
        jobs = [pair[0].job(task_type=f"{number}-{kind}", priority=kind % 3) for kind in range(20)]
        answers = together(
            partial(pair[0].api.post, "/api/v1/jobs/batch", {"jobs": jobs}),
            partial(pair[1].api.post, "/api/v1/jobs/batch", {"jobs": jobs[::-1]}),
        )
        assert [answer.status for answer in answers] == [201, 201]
    assert len(pair[0].claim(limit=1000)) == 320


def test_batches_that_share_keys_in_opposite_order_do_not_deadlock(pair: tuple[Corner, Corner]) -> None:
    for number in range(8):
        jobs = [pair[0].job(owner_ref=f"r{n}", idempotency_key=f"{number}/{n}") for n in range(300)]
        first, second = together(
            partial(pair[0].api.post, "/api/v1/jobs/batch", {"jobs": jobs}),
            partial(pair[1].api.post, "/api/v1/jobs/batch", {"jobs": jobs[::-1]}),
        )
        assert {first.status, second.status} <= {200, 201}, (first, second)
        assert first.json["created"] + second.json["created"] == 300
        assert [item["id"] for item in first.json["jobs"]] == [item["id"] for item in second.json["jobs"]][::-1]


def test_calls_for_many_in_opposite_order_do_not_deadlock(pair: tuple[Corner, Corner]) -> None:
    for verb, fields in {"heartbeat": {}, "complete": {"result": 1}}.items():
        jobs = held(pair, 400)
        items = [{"id": job["id"], "claim_id": job["claim_id"], **fields} for job in jobs]
        answers = together(
            partial(pair[0].api.post, f"/api/v1/jobs/{verb}", {"jobs": items}),
            partial(pair[1].api.post, f"/api/v1/jobs/{verb}", {"jobs": items[::-1]}),
        )
        assert [{each["status"] for each in answer.json["jobs"]} for answer in answers] == [{200}, {200}]


def test_a_late_complete_and_the_return_of_a_job_never_both_count(pair: tuple[Corner, Corner], sql: Sql) -> None:
    jobs = held(pair, 30)
    sql("update held set lease_expires_at = now() where job_id = any(cast(:ids as uuid[]))", ids=[job["id"] for job in jobs])
    taken = {job["id"]: job for job in wait_until(lambda: pair[1].claim(worker_id="second", limit=10), 15, "the first returns")}
    late = together(
        lambda: [pair[0].call(job, "complete", result="late") for job in jobs], lambda: pair[1].claim(worker_id="third", limit=10)
    )
    taken.update({job["id"]: job for job in late[1]})
    for job, answer in zip(jobs, late[0], strict=True):
        assert answer.code == ("claim_lost" if job["id"] in taken else None), "finished late, or given to another: never both"
    for job in taken.values():
        assert pair[1].done(job, "complete", result="second")["result"] == "second"
    assert pair[0].claim(limit=100) == []


def test_many_processes_may_start_at_once_on_an_empty_database(start_service: Callable[..., Service]) -> None:
    services = together(*(start_service for _ in range(4)))
    assert [service.api.get("/readyz").status for service in services] == [200] * 4
    corners = [Corner(service.api) for service in services]
    assert {corner.create()["status"] for corner in corners} == {"pending"}
