"""Creating jobs, one and many: what is taken, what is filled in, what a key makes of a repeat."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from postgres import Sql
from service import Api, Corner, Service, wait_until

LATER = "2999-01-01T00:00:00Z"
ASKED = {"owner_service", "owner_ref", "task_type", "model_profile", "priority", "run_at", "expires_at", "max_attempts", "idempotency_key"}
FOUND = {"id", "status", "attempt", "created_at", "started_at", "finished_at", "worker_id", "lease_expires_at", "progress", "result"}
JOB_FIELDS = ASKED | FOUND | {"traceparent", "labels", "usage", "error", "errors"}


def test_a_created_job_has_every_field_of_a_job(corner: Corner) -> None:
    answer = corner.api.post("/api/v1/jobs", corner.job())
    assert answer.status == 201
    assert set(answer.json) - {"input"} == JOB_FIELDS


def test_a_created_job_has_a_location_where_it_is_found(corner: Corner) -> None:
    answer = corner.api.post("/api/v1/jobs", corner.job())
    path = answer.headers["Location"].removeprefix(f"http://127.0.0.1:{corner.api.port}")
    assert path == f"/api/v1/jobs/{answer.json['id']}"
    assert corner.api.get(path).json["id"] == answer.json["id"]


def test_what_is_left_out_gets_the_defaults_of_the_contract(corner: Corner) -> None:
    job = corner.create()
    assert (job["status"], job["priority"], job["max_attempts"], job["attempt"]) == ("pending", 0, 3, 0)
    empty = ("expires_at", "idempotency_key", "traceparent", "started_at", "finished_at", "worker_id", "lease_expires_at")
    assert [job[name] for name in (*empty, "progress", "result", "usage", "error")] == [None] * 11
    assert (job["errors"], job["labels"]) == ([], {})


def test_what_is_given_comes_back(corner: Corner) -> None:
    given: dict[str, Any] = {
        "owner_ref": "beeline/7 ☎ «ё»",
        "priority": -10,
        "run_at": "2999-01-01T03:00:00.123456+03:00",
        "expires_at": "2999-01-02T00:00:00Z",
        "max_attempts": 100,
        "idempotency_key": "key \t ☎",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    }
    job = corner.create(**given)
    assert {name: job[name] for name in given if name not in ("run_at", "expires_at")} == {
        name: value for name, value in given.items() if name not in ("run_at", "expires_at")
    }
    assert moment(job["run_at"]) == moment("2999-01-01T00:00:00.123456Z")
    assert moment(job["expires_at"]) == moment("2999-01-02T00:00:00Z")
    assert job["run_at"].endswith("Z"), "times are told in UTC"


def test_an_id_is_a_uuid_version_7_of_now(corner: Corner) -> None:
    identity = uuid.UUID(corner.create()["id"])
    assert identity.version == 7
    made_at = datetime.fromtimestamp((identity.int >> 80) / 1000, UTC)
    assert abs(made_at - datetime.now(UTC)) < timedelta(seconds=30)


@pytest.mark.parametrize(
    "fields",
    [
        {"owner_service": "a" * 100},
        {"task_type": "Az09._:/@+-"},
        {"model_profile": "q"},
        {"owner_ref": "r" * 500},
        {"owner_ref": "😀" * 500},
        {"idempotency_key": "k" * 500},
        {"priority": 10},
        {"priority": -10},
        {"max_attempts": 1},
        {"max_attempts": 100},
        {"run_at": None, "expires_at": None, "idempotency_key": None, "traceparent": None},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_the_outermost_allowed_values_are_taken(corner: Corner, fields: dict[str, Any]) -> None:
    assert corner.api.post("/api/v1/jobs", corner.job(**fields)).status == 201


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("owner_service", ""),
        ("owner_service", "a" * 101),
        ("owner_service", "two words"),
        ("owner_service", "ё"),
        ("task_type", "a\n"),
        ("model_profile", "a" * 101),
        ("model_profile", "#"),
        ("owner_ref", ""),
        ("owner_ref", "r" * 501),
        ("idempotency_key", "k" * 501),
        ("priority", 11),
        ("priority", -11),
        ("priority", 1.5),
        ("priority", True),
        ("priority", "1"),
        ("max_attempts", 0),
        ("max_attempts", 101),
        ("run_at", "tomorrow"),
        ("run_at", 1700000000),
        ("run_at", "2999-02-30T00:00:00Z"),
        ("run_at", "2999-01-01T00:00:00"),
        ("expires_at", "2999-01-01"),
        ("owner_ref", None),
        ("owner_service", None),
        ("owner_ref", 7),
        ("traceparent", 7),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_path(corner: Corner, field: str, value: Any) -> None:
    answer = corner.api.post("/api/v1/jobs", corner.job(**{field: value}))
    assert (answer.status, answer.code) == (422, "validation_failed")
    assert answer.paths == [f"/{field}"]


@pytest.mark.parametrize("field", ["owner_service", "task_type", "model_profile", "owner_ref", "input"])
def test_a_required_field_left_out_is_named(corner: Corner, field: str) -> None:
    body = corner.job()
    del body[field]
    answer = corner.api.post("/api/v1/jobs", body)
    assert (answer.status, answer.paths) == (422, [f"/{field}"])


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False, "text"])
def test_any_json_is_an_input(corner: Corner, value: Any) -> None:
    job = corner.create(input=value)
    assert corner.look(job, include="input")["input"] == value


def test_the_input_is_told_only_where_it_is_asked_for(corner: Corner) -> None:
    job = corner.create(input="a-very-rare-word")
    assert b"a-very-rare-word" not in corner.api.get(f"/api/v1/jobs/{job['id']}").body
    assert b"a-very-rare-word" in corner.api.get(f"/api/v1/jobs/{job['id']}", include="input").body


# Idempotency


def test_the_same_key_gives_the_same_job_and_200(corner: Corner) -> None:
    first = corner.create(idempotency_key="k")
    again = corner.api.post("/api/v1/jobs", corner.job(idempotency_key="k"))
    assert again.status == 200
    assert again.json["id"] == first["id"]


def test_the_first_body_of_a_key_stands(corner: Corner) -> None:
    first = corner.create(idempotency_key="k", input="first", priority=1)
    again = corner.api.post("/api/v1/jobs", corner.job(idempotency_key="k", input="second", priority=2, max_attempts=9))
    assert (again.status, again.json["priority"], again.json["max_attempts"]) == (200, 1, 3)
    assert corner.look(first, include="input")["input"] == "first"


@pytest.mark.parametrize("field", ["owner_ref", "task_type", "model_profile"])
def test_the_same_key_for_something_else_is_refused(corner: Corner, field: str) -> None:
    corner.create(idempotency_key="k")
    answer = corner.api.post("/api/v1/jobs", corner.job(idempotency_key="k", **{field: "other"}))
    assert (answer.status, answer.code) == (409, "idempotency_key_reused")


def test_a_key_belongs_to_its_owner(corner: Corner) -> None:
    mine = corner.create(idempotency_key="k")
    theirs = corner.create(idempotency_key="k", owner_service=f"{corner.owner_service}-2")
    assert mine["id"] != theirs["id"]


def test_a_key_still_holds_when_its_job_has_finished(corner: Corner) -> None:
    job = corner.take(idempotency_key="k")
    corner.done(job, "complete")
    again = corner.api.post("/api/v1/jobs", corner.job(idempotency_key="k"))
    assert (again.status, again.json["id"], again.json["status"]) == (200, job["id"], "completed")


def test_without_a_key_every_create_makes_a_job(corner: Corner) -> None:
    assert corner.create()["id"] != corner.create()["id"]


# Batches


def test_a_batch_answers_in_the_order_it_was_sent(corner: Corner) -> None:
    items = corner.batch([{"owner_ref": f"ref-{number}"} for number in range(50)])
    found = corner.api.post("/api/v1/jobs/get", {"ids": [item["id"] for item in items]}).json["jobs"]
    assert [job["owner_ref"] for job in found] == [f"ref-{number}" for number in range(50)]
    assert [(item["status"], item["created"]) for item in items] == [("pending", True)] * 50


def test_a_batch_counts_what_it_created_and_what_it_found(corner: Corner) -> None:
    first = corner.batch([{"idempotency_key": "a"}])
    answer = corner.api.post(
        "/api/v1/jobs/batch",
        {"jobs": [corner.job(owner_ref="call/0", idempotency_key="a"), corner.job(idempotency_key="b"), corner.job()]},
    )
    assert (answer.status, answer.json["created"], answer.json["existing"]) == (201, 2, 1)
    assert [item["created"] for item in answer.json["jobs"]] == [False, True, True]
    assert answer.json["jobs"][0]["id"] == first[0]["id"]


def test_a_batch_in_which_nothing_is_new_answers_200(corner: Corner) -> None:
    jobs = [{"idempotency_key": "a"}, {"idempotency_key": "b"}]
    first, again = corner.batch(jobs), corner.batch(jobs, status=200)
    assert [item["id"] for item in again] == [item["id"] for item in first]


def test_one_key_twice_in_a_batch_makes_one_job(corner: Corner) -> None:
    first, second = corner.batch([{"owner_ref": "r", "idempotency_key": "a"}, {"owner_ref": "r", "idempotency_key": "a"}])
    assert first["id"] == second["id"]
    assert (first["created"], second["created"]) == (True, False)
    assert len(corner.claim(limit=10)) == 1


def test_a_field_of_the_job_wins_over_the_default(corner: Corner) -> None:
    body = {
        "defaults": corner.job(priority=5, input={"a": 1, "b": 2}),
        "jobs": [{"owner_ref": "r", "priority": 7, "input": {"a": 3}}, {"owner_ref": "r"}],
    }
    del body["defaults"]["owner_ref"]  # type: ignore[attr-defined]
    items = corner.api.post("/api/v1/jobs/batch", body).json["jobs"]
    own, default = (corner.look(item, include="input") for item in items)
    assert (own["priority"], own["input"]) == (7, {"a": 3}), "a default must not be merged into what the job says itself"
    assert (default["priority"], default["input"]) == (5, {"a": 1, "b": 2})


def test_null_in_the_job_wins_over_the_default(corner: Corner) -> None:
    defaults = {key: value for key, value in corner.job(expires_at=LATER).items() if key != "owner_ref"}
    body = {"defaults": defaults, "jobs": [{"owner_ref": "r", "input": None, "expires_at": None}]}
    [item] = corner.api.post("/api/v1/jobs/batch", body).json["jobs"]
    job = corner.look(item, include="input")
    assert (job["input"], job["expires_at"]) == (None, None)


@pytest.mark.parametrize("field", ["owner_ref", "idempotency_key", "colour"])
def test_the_defaults_take_only_what_many_jobs_can_share(corner: Corner, field: str) -> None:
    answer = corner.api.post("/api/v1/jobs/batch", {"defaults": {field: "x"}, "jobs": [corner.job()]})
    assert (answer.status, answer.paths) == (422, [f"/defaults/{field}"])


def test_one_ill_job_keeps_the_whole_batch_out(corner: Corner) -> None:
    answer = corner.api.post("/api/v1/jobs/batch", {"jobs": [corner.job(), corner.job(priority=11), corner.job(owner_ref="")]})
    assert (answer.status, answer.paths) == (422, ["/jobs/1/priority", "/jobs/2/owner_ref"])
    assert corner.claim(limit=10) == []


def test_one_key_of_something_else_keeps_the_whole_batch_out(corner: Corner) -> None:
    corner.claim(limit=10)
    taken = corner.take(owner_ref="first", idempotency_key="k")
    answer = corner.api.post("/api/v1/jobs/batch", {"jobs": [corner.job(), corner.job(owner_ref="second", idempotency_key="k")]})
    assert (answer.status, answer.code) == (409, "idempotency_key_reused")
    assert corner.claim(limit=10) == []
    assert corner.look(taken)["owner_ref"] == "first"


def test_two_different_jobs_of_one_key_in_a_batch_are_refused(corner: Corner) -> None:
    jobs = [corner.job(owner_ref="a", idempotency_key="k"), corner.job(owner_ref="b", idempotency_key="k")]
    answer = corner.api.post("/api/v1/jobs/batch", {"jobs": jobs})
    assert (answer.status, answer.code) == (409, "idempotency_key_reused")
    assert corner.claim(limit=10) == []


def test_ten_thousand_jobs_are_one_batch(corner: Corner) -> None:
    items = corner.batch([{}] * 10_000)
    assert len({item["id"] for item in items}) == 10_000


def test_ten_thousand_and_one_are_too_many(corner: Corner) -> None:
    answer = corner.api.post("/api/v1/jobs/batch", {"jobs": [corner.job()] * 10_001})
    assert (answer.status, answer.code, answer.paths) == (422, "validation_failed", ["/jobs"])
    assert corner.claim(limit=10) == []


def test_more_than_2000_live_combinations_are_refused_whole(start_service: Callable[..., Service]) -> None:
    corner = Corner(start_service().api)
    corner.batch([{"model_profile": f"profile-{number}"} for number in range(2000)])
    answer = corner.api.post("/api/v1/jobs/batch", {"jobs": [corner.job(model_profile="profile-1"), corner.job(model_profile="one-more")]})
    assert (answer.status, answer.code) == (422, "too_many_combinations")
    assert len(corner.claim(model_profiles=["profile-1"], limit=10)) == 1, "the refused batch left a job behind"
    assert corner.api.post("/api/v1/jobs", corner.job(model_profile="profile-2")).status == 201


# Time


def test_a_scheduled_job_is_pending_and_not_handed_out(corner: Corner) -> None:
    job = corner.create(run_at=LATER)
    assert job["status"] == "pending"
    assert corner.claim() == []


def test_a_scheduled_job_is_handed_out_when_it_is_due(corner: Corner, sql: Sql) -> None:
    job = corner.create(run_at=LATER)
    sql("update waiting set run_at = now() where job_id = cast(:id as uuid)", id=job["id"])
    [claimed] = wait_until(corner.claim, 15, "the turn of a due job")
    assert claimed["id"] == job["id"]


def test_a_past_run_at_is_now(corner: Corner) -> None:
    job = corner.create(run_at="2001-01-01T00:00:00Z")
    assert [claimed["id"] for claimed in corner.claim()] == [job["id"]]


def test_times_are_the_database_clock_in_utc(corner: Corner, sql: Sql) -> None:
    [[before]] = sql("select clock_timestamp()")
    job = corner.create()
    [[after]] = sql("select clock_timestamp()")
    assert job["created_at"].endswith("Z")
    assert before - timedelta(milliseconds=1) <= moment(job["created_at"]) <= after


# Many at once


def test_get_many_answers_in_order_with_null_for_the_unknown(api: Api, corner: Corner) -> None:
    first, second = corner.create(input="rare-word"), corner.create()
    answer = api.post("/api/v1/jobs/get", {"ids": [second["id"], str(uuid.uuid4()), first["id"], "no-uuid"]})
    assert answer.status == 200
    assert [job and job["id"] for job in answer.json["jobs"]] == [second["id"], None, first["id"], None]
    assert b"rare-word" not in answer.body


def test_get_many_takes_500_and_no_more(api: Api) -> None:
    unknown = [str(uuid.uuid4()) for _ in range(501)]
    assert api.post("/api/v1/jobs/get", {"ids": unknown[:500]}).json["jobs"] == [None] * 500
    refused = api.post("/api/v1/jobs/get", {"ids": unknown})
    assert (refused.status, refused.paths) == (422, ["/ids"])


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
