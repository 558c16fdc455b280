"""Labels of jobs: sent with a job, carried by its claim, and found by them again."""

import json
from typing import Any

import pytest
from service import Api, Corner

from ai_client import AIService, JobFilter, NewJob
from ai_service import main

LABELS = {"call": "7c1f", "crm/deal.id": "№ 42: yes", "empty": ""}
JOBS = "/api/v1/jobs"


def listed(corner: Corner, *labels: str, **query: Any) -> list[str]:
    """The references of the jobs that a list with these labels has, oldest first."""
    pairs = {"label": list(labels)} if labels else {}
    answer = corner.api.get(JOBS, owner_service=corner.owner_service, **pairs, **query)
    assert answer.status == 200, answer
    return [job["owner_ref"] for job in answer.json["jobs"]][::-1]


def test_every_answer_about_a_job_has_its_labels(corner: Corner) -> None:
    job = corner.create(labels=LABELS)
    [claimed] = corner.claim()
    read = corner.look(job)
    [found] = corner.api.get(JOBS, owner_service=corner.owner_service).json["jobs"]
    [looked_up] = corner.api.post(f"{JOBS}/get", {"ids": [job["id"]]}).json["jobs"]
    done = corner.api.post(f"{JOBS}/{job['id']}/complete", {"claim_id": claimed["claim_id"], "result": 1})
    answers = (job, claimed, read, found, looked_up, done.json)
    assert [each["labels"] for each in answers] == [LABELS] * 6


@pytest.mark.parametrize("labels", [{}, None])
def test_a_job_without_labels_has_none(corner: Corner, labels: Any) -> None:
    job = corner.create(labels=labels)
    assert (job["labels"], corner.claim()[0]["labels"]) == ({}, {})


def test_a_job_of_a_batch_has_its_own_labels_or_those_of_the_defaults(corner: Corner) -> None:
    jobs = [corner.job(owner_ref="default"), corner.job(owner_ref="own", labels={"b": "2"}), corner.job(owner_ref="none", labels=None)]
    assert corner.api.post(f"{JOBS}/batch", {"defaults": {"labels": {"a": "1"}}, "jobs": jobs}).status == 201
    assert [listed(corner, label) for label in ("a:1", "b:2")] == [["default"], ["own"]]


def test_a_list_has_the_jobs_with_all_of_its_labels(corner: Corner) -> None:
    for ref, labels in {"one": {"a": "1"}, "both": {"a": "1", "b": "x:y"}, "other": {"a": "2"}, "none": {}}.items():
        corner.create(owner_ref=ref, labels=labels)
    assert listed(corner, "a:1") == ["one", "both"]
    assert listed(corner, "a:1", "b:x:y") == listed(corner, "b:x:y", "a:1", "a:1") == ["both"]
    assert listed(corner, "b:x") == listed(corner, "a:1", "b:2") == []
    assert listed(corner, "a:1", limit=1) == ["both"]
    assert listed(corner, "a:1", status="completed") == []


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("label=a", "?label/0"),
        ("label=:b", "?label/0"),
        ("label=a%20b:c", "?label/0"),
        (f"label=a:{'v' * 201}", "?label/0"),
        ("label=a:1&label=a:2", "?label"),
        ("labels=a:1", "?labels"),
    ],
)
def test_a_label_that_no_job_can_have_is_refused(api: Api, query: str, path: str) -> None:
    answer = api.get(f"{JOBS}?{query}")
    assert (answer.status, [error["path"] for error in answer.json["errors"]]) == (422, [path])


@pytest.mark.parametrize(
    "labels",
    [
        *([], "a:b", {"a": 1}, {"a": None}, {"": "b"}, {"a b": "c"}, {"k": "\0"}),
        *({"k" * 64: "v"}, {"k": "v" * 201}, {str(number): "v" for number in range(17)}),
    ],
    ids=repr,
)
def test_labels_beyond_the_limits_are_refused(corner: Corner, labels: Any) -> None:
    answer = corner.api.post(JOBS, corner.job(labels=labels))
    assert (answer.status, [error["path"] for error in answer.json["errors"]]) == (422, ["/labels"])


def test_labels_at_their_limits_come_back(corner: Corner) -> None:
    labels = {f"{number:0>63}": "🥶" * 200 for number in range(16)}
    job = corner.create(labels=labels)
    assert (corner.look(job)["labels"], corner.claim()[0]["labels"]) == (labels, labels)


def test_a_bulk_retry_takes_the_jobs_with_all_of_its_labels(corner: Corner) -> None:
    made = [corner.create(labels=labels) for labels in ({"a": "1", "b": "2"}, {"a": "1"}, {})]
    for job in made:
        corner.api.post(f"{JOBS}/{job['id']}/cancel", {})
    chosen = {"owner_service": corner.owner_service, "labels": {"a": "1"}}
    dry = corner.api.post(f"{JOBS}/retry", {"filter": chosen, "dry_run": True}).json
    assert (dry["matched"], dry["retried"]) == (2, 0)
    both = {**chosen, "labels": {"b": "2", "a": "1"}}
    assert corner.api.post(f"{JOBS}/retry", {"filter": both}).json["retried"] == 1
    assert [corner.look(job)["status"] for job in made] == ["pending", "cancelled", "cancelled"]


@pytest.mark.parametrize("labels", [{}, None])
def test_a_bulk_retry_of_no_labels_alone_is_refused(api: Api, labels: Any) -> None:
    answer = api.post(f"{JOBS}/retry", {"filter": {"labels": labels}})
    assert (answer.status, answer.json["errors"][0]["path"]) == (422, "/filter")


def test_the_client_sends_reads_and_finds_labels(corner: Corner) -> None:
    with AIService(f"http://127.0.0.1:{corner.api.port}") as client:
        lane = {"owner_service": corner.owner_service, "task_type": corner.task_type, "model_profile": corner.model_profile}
        made = client.create_job(NewJob(**lane, owner_ref="labelled", input=1, labels=LABELS))
        client.create_job(NewJob(**lane, owner_ref="plain", input=1))
        assert made.labels == LABELS
        wanted = JobFilter(owner_service=[corner.owner_service], labels=LABELS)
        assert [job.id for job in client.iter_jobs(wanted)] == [made.id]
        client.cancel(made.id)
        assert client.retry_many(wanted, dry_run=True).matched == 1
        claimed = {job.owner_ref: job.labels for job in client.claim("w", model_profiles=[corner.model_profile], limit=2).jobs}
        assert claimed == {"plain": {}}


def test_the_command_line_finds_and_shows_labels(
    corner: Corner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AI_SERVICE_URL", f"http://127.0.0.1:{corner.api.port}")
    job = corner.create(labels=LABELS)
    corner.create()
    mine = ("--owner-service", corner.owner_service)
    assert main(["jobs", "export", *mine, "--label", "crm/deal.id:№ 42: yes", "--label", "empty:"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert (json.loads(line)["id"], json.loads(line)["labels"]) == (job["id"], LABELS)
    assert main(["jobs", "show", job["id"]]) == 0
    assert "labels            call 7c1f" in capsys.readouterr().out
    with pytest.raises(SystemExit) as wrong:
        main(["jobs", "list", "--label", "call"])
    assert wrong.value.code == 2
    assert "it must be KEY:VALUE" in capsys.readouterr().err
