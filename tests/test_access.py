"""Access: what each role may call, what it sees of the queue, and how tokens are read, shown and replaced.

`TABLE` is the specification: each cell is the status of a call that would succeed for an operator, about a job of the first caller and of
the first worker's profile. `nil` is 200 with nothing of that job in the answer. What is refused has changed nothing.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import falcon
import falcon.testing
import pytest
from fake_vllm import fake_vllm
from postgres import fresh_schema
from service import MAIN, Answer, Api, Corner, Service, encoded, raw_post, running_service, wait_until, worker_process

from ai_internal.server.access import audit
from ai_service import Service as Application
from ai_service import Settings, create_app
from providers.settings import SettingsError

TABLE = """
method path                              nobody wrong own other worker elsewhere monitor operator
GET    /healthz                          200    200   200 200   200    200       200     200
HEAD   /healthz                          200    200   200 200   200    200       200     200
OPTIONS /healthz                         200    200   200 200   200    200       200     200
GET    /readyz                           200    200   200 200   200    200       200     200
HEAD   /readyz                           200    200   200 200   200    200       200     200
OPTIONS /readyz                          200    200   200 200   200    200       200     200
POST   /api/v1/jobs                      401    401   201 403   403    403       403     201
POST   /api/v1/jobs/batch                401    401   201 403   403    403       403     201
GET    /api/v1/jobs                      401    401   200 nil   403    403       403     200
POST   /api/v1/jobs/get                  401    401   200 nil   403    403       403     200
POST   /api/v1/jobs/retry                401    401   200 nil   403    403       403     200
GET    /api/v1/jobs/{job_id}             401    401   200 404   403    403       403     200
POST   /api/v1/jobs/{job_id}/retry       401    401   200 404   403    403       403     200
POST   /api/v1/jobs/{job_id}/cancel      401    401   200 404   403    403       403     200
DELETE /api/v1/jobs/{job_id}             401    401   204 404   403    403       403     204
POST   /api/v1/jobs/claim                401    401   403 403   200    nil       403     200
POST   /api/v1/jobs/{job_id}/complete    401    401   403 403   200    200       403     200
POST   /api/v1/jobs/{job_id}/fail        401    401   403 403   200    200       403     200
POST   /api/v1/jobs/{job_id}/heartbeat   401    401   403 403   200    200       403     200
POST   /api/v1/jobs/{job_id}/release     401    401   403 403   200    200       403     200
POST   /api/v1/jobs/complete             401    401   403 403   200    200       403     200
POST   /api/v1/jobs/fail                 401    401   403 403   200    200       403     200
POST   /api/v1/jobs/heartbeat            401    401   403 403   200    200       403     200
POST   /api/v1/jobs/release              401    401   403 403   200    200       403     200
GET    /api/v1/stats                     401    401   200 nil   403    403       200     200
GET    /api/v1/workers                   401    401   403 403   403    403       200     200
GET    /api/v1/providers/status          401    401   403 403   403    403       200     200
GET    /metrics                          401    401   403 403   403    403       200     200
GET    /openapi.json                     200    200   200 200   200    200       200     200
GET    /docs                             200    200   200 200   200    200       200     200
GET    /                                 200    200   200 200   200    200       200     200
GET    /api/v1/pause                     401    401   403 403   403    403       200     200
POST   /api/v1/pause                     401    401   403 403   403    403       403     200
POST   /api/v1/resume                    401    401   403 403   403    403       403     200
"""
_heads, *_rows = (line.split() for line in TABLE.strip().splitlines())
WHO = _heads[2:]
ROWS = {(method, path): dict(zip(WHO, cells, strict=True)) for method, path, *cells in _rows}

SECRETS = {
    "own": "own-0123456789abcdef",
    "own-next": "own-next-0123456789abcdef==",
    "other": "other-0123456789abcdef",
    "both": "both-0123456789abcdef",
    "worker": "worker-0123456789abcdef",
    "elsewhere": "elsewhere-0123456789abcdef",
    "anywhere": "anywhere-0123456789abcdef",
    "monitor": "monitor-0123456789abcdef",
    "operator": "operator-0123456789abcdef",
}
IN_SETTING = (
    f"own=caller:telephony={SECRETS['own']}; own-next=caller:telephony={SECRETS['own-next']}; other=caller:monitoring={SECRETS['other']};"
    f"both=caller:telephony,monitoring={SECRETS['both']}"
)
IN_FILE = f"""# workers
worker=worker:whisperx,vision={SECRETS["worker"]}
elsewhere=worker:by-hand={SECRETS["elsewhere"]}
anywhere=worker={SECRETS["anywhere"]}

monitor = monitor = {SECRETS["monitor"]}
operator = operator = {SECRETS["operator"]}
"""


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(IN_FILE)
    return path


@pytest.fixture(scope="module")
def guarded(postgres_url: str, token_file: Path) -> Iterator[Service]:
    """A service with tokens in its setting and in a file."""
    with fresh_schema(postgres_url) as schema:
        settings = {"API_TOKENS": IN_SETTING, "API_TOKENS_FILE": str(token_file), "LOG_LEVEL": "DEBUG"}
        with running_service(postgres_url, schema, **settings) as service:
            yield service


@pytest.fixture(scope="module")
def by(guarded: Service) -> Iterator[Mapping[str, Api]]:
    """The interface as each of them sees it."""
    secrets: dict[str, str | None] = {**SECRETS, "nobody": None, "wrong": "wrong-0123456789abcdef"}
    apis = {name: Api(guarded.api.port, secret) for name, secret in secrets.items()}
    yield apis
    for api in apis.values():
        api.close()


@pytest.fixture
def desk(by: Mapping[str, Api]) -> Corner:
    """A corner of telephony's and whisperx's jobs, told from others by its task_type, in the operator's hands."""
    return corner_of(by["operator"], "telephony")


def corner_of(api: Api, owner_service: str, model_profile: str = "whisperx") -> Corner:
    corner = Corner(api)
    corner.owner_service, corner.model_profile = owner_service, model_profile
    return corner


def claimed(corner: Corner, **fields: Any) -> dict[str, Any]:
    """A new job of the corner, held by a claim."""
    created = corner.create(**fields)
    [job] = corner.claim(task_types=[corner.task_type])
    assert job["id"] == created["id"]
    return job


def cancelled(corner: Corner) -> dict[str, Any]:
    return corner.done(corner.create(), "cancel")


# ---------------------------------------------------------------- the table


def _of_claim(corner: Corner, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    job = claimed(corner)
    needed = {"complete": {"result": 1}, "fail": {"category": "timeout", "message": "slow"}}.get(path.rpartition("/")[2], {})
    item = {"claim_id": job["claim_id"], **needed}
    return job, item if "{job_id}" in path else {"jobs": [{"id": job["id"], **item}]}


def prepared(corner: Corner, method: str, path: str) -> tuple[dict[str, Any], Any]:
    """A job in the state in which the call would succeed, and the call's body."""
    verb = path.rpartition("/")[2]
    if verb in ("complete", "fail", "heartbeat", "release"):
        return _of_claim(corner, path)
    job = cancelled(corner) if verb == "retry" or method == "DELETE" else corner.create()
    bodies: dict[str, Any] = {
        "jobs": corner.job(),
        "batch": {"jobs": [corner.job(), corner.job(owner_ref="call/2")]},
        "get": {"ids": [job["id"]]},
        "claim": {"worker_id": "w", "task_types": [corner.task_type]},
        "pause": {"task_types": [corner.task_type]},
        "resume": {"task_types": [corner.task_type]},
    }
    if path == "/api/v1/jobs/retry":
        return job, {"filter": {"task_type": corner.task_type}}
    return job, None if method == "GET" else bodies.get(verb, {})


def called(api: Api, method: str, path: str, job: Mapping[str, Any], body: Any) -> Answer:
    filled = path.replace("{job_id}", str(job["id"]))
    return api.post(filled, body) if method == "POST" else api.request(method, filled)


def cell(answer: Answer, corner: Corner, job: Mapping[str, Any], may_be_nil: bool) -> str:
    """The answer as a cell of the table has it."""
    told = answer.body.decode()
    is_seen = any(mark in told for mark in (corner.mark, str(job["id"]), '"retried":1'))
    return "nil" if may_be_nil and answer.status == 200 and not is_seen else str(answer.status)


@pytest.mark.parametrize(("method", "path"), ROWS)
def test_each_role_may_do_on_each_route_what_the_table_says(by: Mapping[str, Api], desk: Corner, method: str, path: str) -> None:
    found = {}
    for who in WHO:
        corner = corner_of(by["operator"], "telephony")
        job, body = prepared(corner, method, path)
        before = corner.look(job)
        answer = called(by[who], method, path, job, body)
        found[who] = cell(answer, corner, job, "nil" in ROWS[method, path].values())
        if answer.status >= 400:
            assert answer.code == {401: "unauthorized", 403: "forbidden", 404: "job_not_found"}[answer.status]
            assert corner.look(job) == before
            assert [each["id"] for each in by["operator"].get("/api/v1/jobs", task_type=corner.task_type).json["jobs"]] == [job["id"]]
    assert found == ROWS[method, path]


def test_every_route_of_the_application_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    routes: set[tuple[str, str]] = set()
    add_route = falcon.App.add_route

    def noted(app: Any, path: str, resource: object, **options: Any) -> None:
        routes.update((method, path) for method in falcon.HTTP_METHODS if hasattr(resource, f"on_{method.lower()}"))
        add_route(app, path, resource, **options)

    monkeypatch.setattr(falcon.App, "add_route", noted)
    create_app(Application(Settings.read({"DATABASE_URL": "postgresql://127.0.0.1:1/none", "API_TOKENS": IN_SETTING})))
    assert routes == set(ROWS)


def may(cells: Mapping[str, str], one: str, another: str, limit: str) -> str:
    """What a role may do, in the words of SECURITY.md."""
    if cells[one] in ("401", "403"):
        return "no"
    return "yes" if cells[another] == cells[one] else limit


def test_the_table_of_roles_in_the_security_policy_is_this_one() -> None:
    written = re.findall(
        r"^\| `(\w+) (/\S*)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", (MAIN.parent / "SECURITY.md").read_text(), re.MULTILINE
    )
    assert {(method, path): tuple(cells) for method, path, *cells in written} == {
        row: (
            "yes" if cells["nobody"] == "200" else "no",
            may(cells, "own", "other", "its own jobs"),
            may(cells, "worker", "elsewhere", "its profiles"),
            may(cells, "monitor", "monitor", ""),
            may(cells, "operator", "operator", ""),
        )
        for row, cells in ROWS.items()
        if row[0] not in ("HEAD", "OPTIONS")
    }


# ---------------------------------------------------------------- at the door

UNKNOWN = "/api/v1/jobs/01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.mark.parametrize(
    "path", ["/api", "/api/", "/api/v1/nothing", "//api/v1/nothing", "/api/v2/jobs", "/%61pi/v1/nothing", "//api/v1/jobs"]
)
def test_nobody_learns_without_a_token_which_routes_there_are(by: Mapping[str, Api], path: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD"):
        assert by["nobody"].request(method, path).status == 401
    assert path == "//api/v1/jobs" or by["own"].get(path).code == "not_found"


def test_a_method_that_a_route_does_not_have_is_told_to_those_with_a_token(by: Mapping[str, Api]) -> None:
    for who, status in {"nobody": 401, "wrong": 401, "own": 405, "worker": 405, "operator": 405}.items():
        assert by[who].request("PATCH", "/api/v1/jobs").status == status
        assert by[who].request("PUT", UNKNOWN).status == status


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[]", b"", b'{"nothing": 1}'])
def test_neither_body_nor_query_is_looked_at_before_the_token(by: Mapping[str, Api], body: bytes) -> None:
    assert by["nobody"].post("/api/v1/jobs?nothing=1", body=body, media_type="text/plain").code == "unauthorized"
    assert by["worker"].post("/api/v1/jobs?nothing=1", body=body, media_type="text/plain").code == "forbidden"
    assert by["own"].post("/api/v1/jobs?nothing=1", body=body, media_type="text/plain").code == "validation_failed"


SHOWN = {
    "Bearer {}": 200, "bearer {}": 200, "BEARER   {}": 200,
    "{}": 401, "Basic {}": 401, "Bearer": 401, "Bearer ": 401, "Bearer {}x": 401, "Bearer {} x": 401, "Bearer {}, Bearer {}": 401,
    "Bearer\t{}": 401, "Token {}": 401, "Bearer {}\u00e4": 401, "Bearer " + "a" * 5000: 401,
}  # fmt: skip


@pytest.mark.parametrize("shown", SHOWN)
def test_a_token_is_taken_as_a_bearer_and_in_no_other_way(by: Mapping[str, Api], shown: str) -> None:
    header = shown.format(SECRETS["own"], SECRETS["own"])
    answer = by["nobody"].request("GET", "/api/v1/stats", headers={"Authorization": header})
    assert answer.status == SHOWN[shown]
    if answer.status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_in_the_query_or_twice_in_the_head_is_none(by: Mapping[str, Api]) -> None:
    assert by["nobody"].get("/api/v1/stats", access_token=SECRETS["operator"]).status == 401
    line = f"Authorization: Bearer {SECRETS['operator']}"
    assert by["nobody"].raw(raw_post("/api/v1/jobs/get", b'{"ids": []}', line)).startswith(b"HTTP/1.1 200")
    assert by["nobody"].raw(raw_post("/api/v1/jobs/get", b'{"ids": []}', line, line)).startswith(b"HTTP/1.1 401")


GUARDS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def test_every_answer_carries_the_security_headers(by: Mapping[str, Api], desk: Corner) -> None:
    erased = by["operator"].delete(f"/api/v1/jobs/{cancelled(desk)['id']}")
    answers = [
        erased,
        by["nobody"].get("/healthz"),
        by["nobody"].get("/nowhere"),
        by["nobody"].get("/api/v1/stats"),
        by["own"].get("/api/v1/stats"),
    ]
    assert [answer.status for answer in answers] == [204, 200, 404, 401, 200]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in GUARDS} == GUARDS
        assert "Server" not in answer.headers


@pytest.mark.parametrize(
    "request_", [b"rubbish\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"], ids=["400", "413"]
)
def test_what_the_server_refuses_itself_carries_them_too(by: Mapping[str, Api], request_: bytes) -> None:
    head = by["nobody"].raw(request_).partition(b"\r\n\r\n")[0].decode()
    assert [f"{name}: {text}" for name, text in GUARDS.items() if f"{name}: {text}" not in head] == []
    assert "Server:" not in head


# ---------------------------------------------------------------- callers


def test_a_batch_with_a_job_of_another_owner_creates_none(by: Mapping[str, Api], desk: Corner) -> None:
    jobs = [desk.job(), desk.job(owner_service="monitoring"), desk.job(owner_service="lab")]
    refused = by["own"].post("/api/v1/jobs/batch", {"jobs": jobs})
    assert (refused.code, refused.paths) == ("forbidden", ["/jobs/1/owner_service", "/jobs/2/owner_service"])
    assert by["own"].post("/api/v1/jobs/batch", {"defaults": {"owner_service": "lab"}, "jobs": jobs}).code == "forbidden"
    assert by["operator"].get("/api/v1/jobs", task_type=desk.task_type).json["jobs"] == []
    assert by["both"].post("/api/v1/jobs/batch", {"jobs": jobs[:2]}).status == 201


def test_a_create_for_another_owner_is_told_its_path(by: Mapping[str, Api], desk: Corner) -> None:
    refused = by["own"].post("/api/v1/jobs", desk.job(owner_service="monitoring"))
    assert (refused.status, refused.code, refused.paths) == (403, "forbidden", ["/owner_service"])


def test_the_idempotency_key_of_another_owner_is_free(by: Mapping[str, Api], desk: Corner) -> None:
    key = {"idempotency_key": desk.mark}
    mine = by["own"].post("/api/v1/jobs", desk.job(**key))
    theirs = by["other"].post("/api/v1/jobs", desk.job(owner_service="monitoring", **key))
    assert (mine.status, theirs.status) == (201, 201)
    assert mine.json["id"] != theirs.json["id"]


@pytest.fixture
def two(by: Mapping[str, Api], desk: Corner) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cancelled job of each caller, in one corner."""
    theirs = desk.done(desk.create(owner_service="monitoring"), "cancel")
    return cancelled(desk), theirs


def test_lists_and_look_ups_are_cut_to_the_owners_of_the_token(by: Mapping[str, Api], desk: Corner, two: tuple[Any, Any]) -> None:
    def listed(who: str, **query: Any) -> list[str]:
        return [job["id"] for job in by[who].get("/api/v1/jobs", task_type=desk.task_type, **query).json["jobs"]]

    mine, theirs = (job["id"] for job in two)
    assert (listed("own"), listed("other"), listed("both"), listed("operator")) == ([mine], [theirs], [mine, theirs], [mine, theirs])
    assert listed("own", owner_service="monitoring") == []
    assert listed("own", owner_service=["monitoring", "telephony"]) == [mine]
    assert listed("own", cursor="ffffffff-ffff-7fff-bfff-ffffffffffff") == [mine]
    assert listed("own", cursor=mine) == []
    looked_up = by["own"].post("/api/v1/jobs/get", {"ids": [theirs, mine, theirs.upper()]}).json["jobs"]
    assert [job and job["id"] for job in looked_up] == [None, mine, None]


def test_a_bulk_retry_does_not_reach_past_the_owners_of_the_token(by: Mapping[str, Api], desk: Corner, two: tuple[Any, Any]) -> None:
    def retried(**wanted: Any) -> int:
        return int(by["own"].post("/api/v1/jobs/retry", {"filter": {"task_type": desk.task_type, **wanted}}).json["retried"])

    dry = {"filter": {"task_type": desk.task_type}, "dry_run": True}
    assert [by[who].post("/api/v1/jobs/retry", dry).json["matched"] for who in ("own", "other", "operator")] == [1, 1, 2]
    assert retried(owner_service="monitoring") == 0
    assert retried(owner_service=["monitoring", "telephony"]) == 1
    assert [desk.look(job)["status"] for job in two] == ["pending", "cancelled"]
    assert by["own"].post("/api/v1/jobs/retry", {"filter": {}}).status == 422


def test_a_job_of_another_owner_looks_like_none_and_nobody_waits_for_it(by: Mapping[str, Api], desk: Corner) -> None:
    job = desk.create()
    theirs = by["other"].get(f"/api/v1/jobs/{job['id']}", wait_seconds=30, include="input")
    nothing = by["other"].get(UNKNOWN, wait_seconds=30, include="input")
    assert (theirs.status, theirs.body) == (404, nothing.body)
    for verb in ("cancel", "retry"):
        bodies = {by["other"].post(f"{path}/{verb}", {}).body for path in (f"/api/v1/jobs/{job['id']}", UNKNOWN)}
        assert bodies == {nothing.body}


def test_stats_count_the_jobs_of_the_token_only(by: Mapping[str, Api], desk: Corner) -> None:
    for owner in ("telephony", "monitoring", "monitoring"):
        desk.create(owner_service=owner)

    def pending(who: str) -> int:
        return sum(row["pending"] for row in by[who].get("/api/v1/stats").json["by_task_type"] if row["task_type"] == desk.task_type)

    # The counters follow with the next upkeep.
    wait_until(lambda: pending("operator") == 3)
    assert [pending(who) for who in ("own", "other", "both", "operator")] == [1, 2, 3, 3]
    assert {row["owner_service"] for row in by["own"].get("/api/v1/stats").json["by_owner_service"]} == {"telephony"}


# ---------------------------------------------------------------- workers


def profiles(by: Mapping[str, Api], who: str, corner: Corner, **fields: Any) -> set[str]:
    """The profiles of what a claim hands out; all of it is given back."""
    wish = {"worker_id": who, "limit": 10, "task_types": [corner.task_type], **fields}
    jobs = by[who].post("/api/v1/jobs/claim", wish).json["jobs"]
    for job in jobs:
        assert by[who].post(f"/api/v1/jobs/{job['id']}/release", {"claim_id": job["claim_id"]}).status == 200
    return {job["model_profile"] for job in jobs}


def test_a_claim_takes_jobs_of_the_profiles_of_the_token_only(by: Mapping[str, Api], desk: Corner) -> None:
    for profile in ("whisperx", "vision", "by-hand", "qwen"):
        desk.create(model_profile=profile)
    assert profiles(by, "anywhere", desk) == {"whisperx", "vision", "by-hand", "qwen"}
    assert profiles(by, "worker", desk) == {"whisperx", "vision"}
    assert profiles(by, "worker", desk, model_profiles=["vision", "qwen"]) == {"vision"}
    assert profiles(by, "worker", desk, model_profiles=["qwen"]) == set()
    assert profiles(by, "elsewhere", desk) == {"by-hand"}


def test_a_repeated_claim_gets_what_it_holds_whatever_profile_it_names(by: Mapping[str, Api], desk: Corner) -> None:
    created, claim_id = desk.create(), "11111111-2222-4333-8444-" + desk.mark
    wish = {"worker_id": "w", "task_types": [desk.task_type], "claim_id": claim_id}
    for names in (["whisperx"], ["made-up"]):
        [job] = by["worker"].post("/api/v1/jobs/claim", {**wish, "model_profiles": names}).json["jobs"]
        assert job["id"] == created["id"]


def test_a_worker_process_works_with_its_token_and_not_with_a_wrong_one(
    guarded: Service, by: Mapping[str, Api], desk: Corner, tmp_path: Path
) -> None:
    job = desk.create(input={"prompt": "hello"})
    with fake_vllm(model="whisperx") as model:
        with worker_process(guarded.api.port, tmp_path, **model.environ, AI_SERVICE_TOKEN="wrong-0123456789abcdef") as log:
            wait_until(lambda: "service_went_away error=401 unauthorized" in log.read_text(), 20)
        assert "wrong-0123456789abcdef" not in log.read_text()
        assert desk.look(job)["attempt"] == 0
        with worker_process(guarded.api.port, tmp_path, **model.environ, AI_SERVICE_TOKEN=SECRETS["worker"]) as log:
            wait_until(lambda: desk.look(job)["status"] == "completed", 20)
            # Workers are written down with the next upkeep.
            wait_until(lambda: any(each.get("providers") for each in by["operator"].get("/api/v1/workers").json["workers"]))
        assert "service_went_away" not in log.read_text()


# ---------------------------------------------------------------- operators


def test_each_operator_action_leaves_one_line(guarded: Service, by: Mapping[str, Api], desk: Corner) -> None:
    at = f"/api/v1/jobs/{desk.create()['id']}"
    by["operator"].post(f"{at}/cancel", {})
    by["operator"].post(f"{at}/retry", {})
    by["operator"].post("/api/v1/pause", {"task_types": [desk.task_type]})
    by["operator"].post("/api/v1/resume", {"task_types": [desk.task_type]})
    by["operator"].post("/api/v1/jobs/retry", {"filter": {"task_type": desk.task_type}, "dry_run": True})
    by["operator"].post("/api/v1/jobs/retry", {"filter": {"task_type": desk.task_type}})
    by["operator"].post("/api/v1/jobs", desk.job(input="never-to-be-logged"))
    by["operator"].delete(at)
    by["operator"].get(at)
    by["operator"].post("/api/v1/jobs/get", {"ids": []})
    by["own"].post(f"{at}/cancel", {})
    by["operator"].post(f"{at}/cancel", {})
    wait_until(lambda: len(audited(guarded, at)) >= 8)
    assert audited(guarded, at) == [
        f"POST '{at}/cancel' 200",
        f"POST '{at}/retry' 200",
        "POST '/api/v1/pause' 200",
        "POST '/api/v1/resume' 200",
        "POST '/api/v1/jobs/retry' 200",
        "POST '/api/v1/jobs' 201",
        f"DELETE '{at}' 409",
        f"POST '{at}/cancel' 200",
    ]
    assert "never-to-be-logged" not in guarded.log


def audited(service: Service, path: str) -> list[str]:
    """Method, path and status of the audit lines from the first with this path on; each names the operator's token and the address."""
    lines = [line.partition("operator_action ")[2] for line in service.lines if "operator_action" in line]
    found = [
        re.fullmatch(r"token=operator client=127\.0\.0\.1 method=(\w+) path=(\S+) status=(\d+) request_id=\w+", line) for line in lines
    ]
    told = [" ".join(each.groups()) for each in found if each]
    assert len(told) == len(lines), lines
    return told[next((number for number, line in enumerate(told) if path in line), len(told)) :]


def test_what_operators_did_is_logged_at_every_level(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        logging.getLogger("ai_service").info("not this")
        audit.info("but this")
    finally:
        logging.getLogger().setLevel(before)
    assert caplog.messages == ["but this"]


# ---------------------------------------------------------------- rotation and settings


def test_a_token_is_replaced_by_its_successor_without_a_gap(postgres_url: str, by: Mapping[str, Api], desk: Corner) -> None:
    job = desk.create()
    assert [by[who].get(f"/api/v1/jobs/{job['id']}").status for who in ("own", "own-next")] == [200, 200]
    with ExitStack() as stack:
        schema = stack.enter_context(fresh_schema(postgres_url))
        later = stack.enter_context(running_service(postgres_url, schema, API_TOKENS=f"own-next=caller:telephony={SECRETS['own-next']}"))
        statuses = []
        for who in ("own", "own-next", "operator"):
            api = Api(later.api.port, SECRETS[who])
            stack.callback(api.close)
            statuses.append(api.get("/api/v1/jobs").status)
    assert statuses == [401, 200, 401]


def test_a_service_says_who_may_come_in(guarded: Service, service: Service) -> None:
    assert [each.api.get("/readyz").json["access"] for each in (guarded, service)] == ["tokens", "open"]
    assert service.log.count("access_open") == 1
    assert "access_open" not in guarded.log
    assert "access_by_tokens tokens=own (caller of telephony)" in guarded.log
    check = subprocess.run(
        [sys.executable, str(MAIN), "check"], env=guarded.environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "access: by tokens, own (caller of telephony), " in check.stdout
    assert (
        "worker (worker of whisperx, vision), elsewhere (worker of by-hand), anywhere (worker), monitor (monitor), operator (operator)"
        in check.stdout
    )
    shown = [name for name, secret in SECRETS.items() if secret in guarded.log + check.stdout + check.stderr]
    assert shown == []


GOOD = "sixteen-letters0"
WRONG = {
    GOOD: "entry 1 must have one of the roles",
    f"name={GOOD}": "entry 1 must have one of the roles",
    f"name=admin={GOOD}": "entry 1 must have one of the roles",
    f"name=caller={GOOD}": "entry 1 must have one of the roles",
    f"name=operator:lab={GOOD}": "entry 1 must have one of the roles",
    f"name=caller:={GOOD}": "entry 1 names an owner_service or a model profile",
    f"name=worker:a b={GOOD}": "entry 1 names an owner_service or a model profile",
    f"na me=operator={GOOD}": "entry 1 must be name=role=secret",
    f"=operator={GOOD}": "entry 1 must be name=role=secret",
    f"name=operator={GOOD[1:]}": "entry 1 must have a secret of 16 to 512 letters",
    f"name=operator={'x' * 513}": "entry 1 must have a secret of 16 to 512 letters",
    f"name=operator={GOOD}\u00e4": "entry 1 must have a secret of 16 to 512 letters",
    f"name=operator={GOOD} {GOOD}": "entry 1 must have a secret of 16 to 512 letters",
    f"one=operator={GOOD}; one=worker={GOOD}1": "two tokens are called one",
    f"one=operator={GOOD}; two=worker={GOOD}": "the tokens one and two have the same secret",
    f"one=operator={GOOD};;two={GOOD}": "entry 2 must have one of the roles",
    ";": "names no token",
    "# nobody yet": "names no token",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_token_is_told_by_its_place_and_never_shown(text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.read({"DATABASE_URL": "postgresql://127.0.0.1/db", "API_TOKENS": text})
    [problem] = refused.value.problems
    assert problem.startswith(f"API_TOKENS: {WRONG[text]}")
    assert GOOD[1:] not in problem


def read(tmp_path: Path, setting: str, file: bytes | None) -> Settings:
    if file is not None:
        (tmp_path / "file").write_bytes(file)
    return Settings.read({"DATABASE_URL": "postgresql://127.0.0.1/db", "API_TOKENS": setting, "API_TOKENS_FILE": str(tmp_path / "file")})


def test_every_wrong_token_is_told_at_once_and_the_file_too(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, f"a=b={GOOD};ok=operator={GOOD};c=operator=short", f"x=caller={GOOD}\n".encode())
    assert [re.match(r"\w+: \w+ \d", problem)[0] for problem in refused.value.problems] == [  # type: ignore[index]
        "API_TOKENS: entry 1",
        "API_TOKENS: entry 3",
        "API_TOKENS_FILE: entry 1",
    ]


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (None, "API_TOKENS_FILE: the file cannot be read: No such file or directory"),
        (b"", "API_TOKENS_FILE: names no token"),
        (b"\xff", "API_TOKENS_FILE: the file holds other characters than ASCII"),
        (b"ok=worker=another-secret-of-its-own", "API_TOKENS and API_TOKENS_FILE: two tokens are called ok"),
        (f"two=worker={GOOD}".encode(), "API_TOKENS and API_TOKENS_FILE: the tokens ok and two have the same secret"),
    ],
)
def test_a_token_file_that_cannot_be_used_stops_the_start(tmp_path: Path, file: bytes | None, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, f"ok=operator={GOOD}", file)
    assert list(refused.value.problems) == [problem]


def test_settings_hold_no_token_but_its_digest(tmp_path: Path) -> None:
    settings = read(tmp_path, f"one=operator={GOOD}", f"two=worker:vision=another-{GOOD}".encode())
    assert [token.name for token in settings.tokens] == ["one", "two"]
    held = f"{settings!r} {[(each, each.digest) for each in settings.tokens]} {dict(settings.environ)}"
    assert GOOD not in held


# ---------------------------------------------------------------- other people's pages

ABROAD = {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}


def test_a_page_of_another_site_can_change_nothing_not_even_where_the_service_is_open(corner: Corner) -> None:
    body = encoded(corner.job())
    assert corner.api.request("POST", "/api/v1/jobs", body, ABROAD).code == "forbidden"
    assert corner.api.request("DELETE", UNKNOWN, None, ABROAD).code == "forbidden"
    assert corner.api.get("/api/v1/jobs", owner_service=corner.owner_service).json["jobs"] == []
    for site in ("same-origin", "none"):
        assert corner.api.request("POST", "/api/v1/jobs", body, {**ABROAD, "Sec-Fetch-Site": site}).status == 201
