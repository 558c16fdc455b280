"""Listing jobs: newest first, by every filter, page after page without a gap or a double."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from service import Api, Corner


def ids(jobs: list[dict[str, Any]]) -> list[str]:
    return [job["id"] for job in jobs]


def listed(corner: Corner, **query: Any) -> list[dict[str, Any]]:
    """One page, of this corner's owner unless asked otherwise."""
    answer = corner.api.get("/api/v1/jobs", **{"owner_service": corner.owner_service, **query})
    assert answer.status == 200, answer
    assert set(answer.json) == {"jobs", "next_cursor"}
    return list(answer.json["jobs"])


def pages(corner: Corner, **query: Any) -> list[list[dict[str, Any]]]:
    """Every page, the cursor of each leading to the next."""
    found: list[list[dict[str, Any]]] = []
    cursor: dict[str, str] = {}
    while True:
        page = corner.api.get("/api/v1/jobs", owner_service=corner.owner_service, **query, **cursor).json
        found.append(page["jobs"])
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


def one_of_each(corner: Corner) -> dict[str, dict[str, Any]]:
    """A job of every status."""
    corner.batch([{} for _ in range(4)])
    completed, failed, cancelled, running = corner.claim(limit=4)
    corner.done(completed, "complete")
    corner.done(failed, "fail", category="timeout")
    corner.done(cancelled, "cancel")
    return {"completed": completed, "failed": failed, "cancelled": cancelled, "running": running, "pending": corner.create()}


def test_jobs_are_listed_newest_first(corner: Corner) -> None:
    created = [corner.create() for _ in range(5)]
    assert ids(listed(corner)) == ids(created)[::-1]


def test_a_listed_job_is_the_job_without_its_payloads(corner: Corner) -> None:
    job = corner.take(input="rare-input-word")
    corner.done(job, "complete", result="rare-result-word")
    answer = corner.api.get("/api/v1/jobs", owner_service=corner.owner_service)
    assert b"rare-input-word" not in answer.body
    assert b"rare-result-word" not in answer.body
    [shown] = answer.json["jobs"]
    alone = corner.look(job)
    assert {name: shown[name] for name in shown if name != "result"} == {name: alone[name] for name in shown if name != "result"}
    assert set(alone) - set(shown) <= {"input", "result"}


@pytest.mark.parametrize("status", ["pending", "running", "completed", "failed", "cancelled"])
def test_jobs_are_listed_by_status(corner: Corner, status: str) -> None:
    jobs = one_of_each(corner)
    assert ids(listed(corner, status=status)) == [jobs[status]["id"]]


def test_a_scheduled_job_is_listed_as_pending(corner: Corner) -> None:
    job = corner.create(run_at="2999-01-01T00:00:00Z")
    assert ids(listed(corner, status="pending")) == [job["id"]]


def test_a_repeated_filter_means_either(corner: Corner) -> None:
    jobs = one_of_each(corner)
    wanted = ("pending", "failed", "cancelled")
    assert sorted(ids(listed(corner, status=list(wanted)))) == sorted(jobs[status]["id"] for status in wanted)


@pytest.mark.parametrize("field", ["owner_service", "owner_ref", "task_type", "model_profile"])
def test_jobs_are_listed_by_what_they_are(corner: Corner, field: str) -> None:
    names = [f"{corner.mark}-{letter}" for letter in "abc"]
    jobs = [corner.create(**{field: name}) for name in names]
    query = {"owner_service": [corner.owner_service], field: names[:2]}
    assert ids(listed(corner, **query)) == ids(jobs)[:2][::-1]


def test_jobs_are_listed_by_the_category_of_their_error(corner: Corner) -> None:
    corner.batch([{} for _ in range(3)])
    for job, category in zip(jobs := corner.claim(limit=3), ("timeout", "internal", "truncated"), strict=True):
        corner.done(job, "fail", category=category)
    assert ids(listed(corner, error_category="internal")) == [jobs[1]["id"]]
    assert sorted(ids(listed(corner, error_category=["timeout", "truncated"]))) == sorted([jobs[0]["id"], jobs[2]["id"]])


def test_different_filters_must_all_hold(corner: Corner) -> None:
    jobs = one_of_each(corner)
    assert ids(listed(corner, status="failed", error_category="timeout", task_type=corner.task_type)) == [jobs["failed"]["id"]]
    assert listed(corner, status="completed", error_category="timeout") == []
    assert listed(corner, status="failed", task_type="another") == []


def test_jobs_are_listed_by_the_time_of_their_creation(corner: Corner) -> None:
    jobs = [corner.create() for _ in range(3)]
    at = datetime.fromisoformat(jobs[1]["created_at"])
    before, after = ((at + timedelta(microseconds=difference)).isoformat() for difference in (-5, 5))
    assert ids(listed(corner, created_after=before, created_before=after)) == [jobs[1]["id"]]
    assert ids(listed(corner, created_after=after)) == [jobs[2]["id"]]
    assert ids(listed(corner, created_before=before)) == [jobs[0]["id"]]


def test_pages_have_neither_gap_nor_double(corner: Corner) -> None:
    items = corner.batch([{} for _ in range(23)])
    found = pages(corner, limit=5)
    assert [len(page) for page in found if page] == [5, 5, 5, 5, 3]
    flat = [identity for page in found for identity in ids(page)]
    assert flat == sorted(ids(items), reverse=True)


@pytest.mark.parametrize(
    "query", [{"status": ["completed", "failed", "pending"]}, {"error_category": "timeout"}, {"task_type": "rare"}], ids=str
)
def test_pages_of_a_filtered_list_have_neither_gap_nor_double(corner: Corner, query: dict[str, Any]) -> None:
    corner.batch([{"task_type": "rare" if number % 3 == 0 else "common"} for number in range(30)])
    for number, job in enumerate(corner.claim(limit=20)):
        corner.done(job, "complete" if number % 2 else "fail")
    whole = ids(listed(corner, limit=500, **query))
    assert len(whole) >= 7
    assert [identity for page in pages(corner, limit=3, **query) for identity in ids(page)] == whole


def test_jobs_created_or_finished_between_two_pages_disturb_nothing(corner: Corner) -> None:
    items = corner.batch([{} for _ in range(10)])
    first = corner.api.get("/api/v1/jobs", owner_service=corner.owner_service, limit=4).json
    corner.batch([{} for _ in range(5)])
    for job in corner.claim(limit=15):
        corner.done(job, "complete")
    second = corner.api.get("/api/v1/jobs", owner_service=corner.owner_service, limit=100, cursor=first["next_cursor"]).json
    assert ids(first["jobs"] + second["jobs"]) == sorted(ids(items), reverse=True)
    assert second["next_cursor"] is None


def test_the_longest_page_has_500_jobs(corner: Corner) -> None:
    corner.batch([{} for _ in range(501)])
    assert [len(page) for page in pages(corner, limit=500) if page] == [500, 1]


def test_nothing_found_is_an_empty_page(corner: Corner) -> None:
    answer = corner.api.get("/api/v1/jobs", owner_service="nobody-has-this-name")
    assert answer.json == {"jobs": [], "next_cursor": None}


def test_a_list_without_any_filter_is_answered(api: Api, corner: Corner) -> None:
    job = corner.create()
    newest = api.get("/api/v1/jobs", limit=500).json["jobs"]
    assert newest[0]["id"] == job["id"]
    assert ids(newest) == sorted(ids(newest), reverse=True)
