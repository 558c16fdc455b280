"""What breaks: answers lost, processes killed, the database away, read-only or locked, a service told to end, too many waiting."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import attrs
import pytest
import urllib3
from postgres import PASSWORD, EmbeddedServer, connect, fresh_schema
from service import Answer, Api, Corner, Service, running_service, wait_until

JOBS = "/api/v1/jobs"

# Answers lost


def test_a_create_whose_answer_was_lost_is_repeated_by_its_key(corner: Corner) -> None:
    body = corner.job(idempotency_key="k")
    with corner.api.unread(JOBS, body):
        wait_until(lambda: corner.api.get(JOBS, owner_service=corner.owner_service).json["jobs"])
    again = corner.api.post(JOBS, body)
    assert again.status == 200
    assert len(corner.claim(limit=10)) == 1


def test_a_create_repeated_while_the_first_is_under_way_makes_one_job(corner: Corner) -> None:
    for number in range(10):
        body = corner.job(idempotency_key=f"k{number}")
        with corner.api.unread(JOBS, body):
            assert corner.api.post(JOBS, body).status in (200, 201)
    assert len(corner.claim(limit=100)) == 10


def test_a_claim_whose_answer_was_lost_is_repeated_by_its_id(corner: Corner) -> None:
    items = corner.batch([{} for _ in range(5)])
    claim = corner.claiming(claim_id=str(uuid.uuid4()), limit=3)
    with corner.api.unread(f"{JOBS}/claim", claim):
        wait_until(lambda: [corner.look(item)["status"] for item in items].count("running") == 3)
    again = corner.api.post(f"{JOBS}/claim", claim).json["jobs"]
    assert sorted(job["id"] for job in again) == sorted(item["id"] for item in items[:3])


def test_a_result_whose_answer_was_lost_is_repeated(corner: Corner) -> None:
    job = corner.take()
    body = {"claim_id": job["claim_id"], "result": "whole"}
    with corner.api.unread(f"{JOBS}/{job['id']}/complete", body):
        wait_until(lambda: corner.look(job)["status"] == "completed")
    assert corner.api.post(f"{JOBS}/{job['id']}/complete", body).json["result"] == "whole"


def test_a_caller_that_hung_up_while_waiting_gets_no_job(corner: Corner) -> None:
    for _ in range(3):
        with corner.api.unread(f"{JOBS}/claim", corner.claiming(wait_seconds=30)):
            assert corner.look(corner.create(task_type="other", model_profile="other"), wait_seconds=1)["status"] == "pending"
    created = corner.create()
    assert [job["id"] for job in corner.claim(worker_id="alive", wait_seconds=10)] == [created["id"]]


# Processes killed


def test_nothing_answered_is_lost_when_the_service_is_killed(start_service: Callable[..., Service]) -> None:
    service = start_service()
    corner = Corner(service.api)
    with ThreadPoolExecutor(4) as pool:
        creating = [pool.submit(create_until_it_dies, corner, number) for number in range(4)]
        wait_until(lambda: len(corner.api.get(JOBS, limit=500).json["jobs"]) > 100, 30)
        service.kill()
        answered = {key: identity for future in creating for key, identity in future.result(60).items()}
    corner.api = start_service().api
    assert len(answered) > 50
    jobs = [corner.job(idempotency_key=key) for key in answered]
    again = corner.api.post(f"{JOBS}/batch", {"jobs": jobs}).json
    assert (again["created"], [job["id"] for job in again["jobs"]]) == (0, [*answered.values()])


def create_until_it_dies(corner: Corner, number: int) -> dict[str, str]:
    """The ids of all jobs whose creation was answered, by key."""
    answered: dict[str, str] = {}
    while len(answered) < 5000:
        key = f"{number}/{len(answered)}"
        try:
            answer = corner.api.post(JOBS, corner.job(idempotency_key=key))
        except urllib3.exceptions.HTTPError:
            return answered
        assert answer.status == 201
        answered[key] = answer.json["id"]
    return answered


def test_every_job_is_finished_once_though_a_service_is_killed_in_the_middle(start_service: Callable[..., Service]) -> None:
    services = [start_service(), start_service()]
    corner = Corner(services[0].api)
    items = [item for _ in range(3) for item in corner.batch([{} for _ in range(250)])]
    corners = [corner.through(service.api) for service in services]
    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, corners[number % 2], corners[1], f"w{number}") for number in range(4)]
        wait_until(lambda: len(corners[1].api.get(JOBS, status="completed", limit=500).json["jobs"]) > 100, 30)
        services[0].kill()
        finished = [identity for future in working for identity in future.result(120)]
    assert sorted(finished) == sorted(item["id"] for item in items), "lost, or finished twice"
    seen = [
        job
        for at in range(0, 750, 500)
        for job in corners[1].api.post(f"{JOBS}/get", {"ids": [i["id"] for i in items[at : at + 500]]}).json["jobs"]
    ]
    assert {(job["status"], job["attempt"]) for job in seen} == {("completed", 1)}


def work(corner: Corner, spare: Corner, worker_id: str) -> list[str]:
    """Claim and complete until nothing is left; a call without an answer is repeated, word for word, through the spare process."""
    finished: list[str] = []
    while True:
        claim = corner.claiming(worker_id=worker_id, limit=10, claim_id=str(uuid.uuid4()))
        jobs = surely(corner, spare, f"{JOBS}/claim", claim).json["jobs"]
        if not jobs:
            return finished
        items = [{"id": job["id"], "claim_id": job["claim_id"], "result": worker_id} for job in jobs]
        done = surely(corner, spare, f"{JOBS}/complete", {"jobs": items}).json["jobs"]
        finished += [each["id"] for each in done if each["status"] == 200]


def surely(corner: Corner, spare: Corner, path: str, body: dict[str, Any]) -> Answer:
    try:
        answer = corner.api.post(path, body)
    except urllib3.exceptions.HTTPError:
        answer = spare.api.post(path, body)
    assert answer.status == 200, answer
    return answer


# The database away


@attrs.frozen
class Own:
    """A durable database server of the test's own, a service on it, and a corner there."""

    server: EmbeddedServer
    service: Service
    corner: Corner


@pytest.fixture(scope="module")
def own() -> Iterator[Own]:
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer().running())
        service = stack.enter_context(running_service(server.url, "ai_service"))
        yield Own(server, service, Corner(service.api))


def unavailable(answer: Answer) -> bool:
    """A 503 that says when to come again; asserts its form."""
    if answer.status != 503:
        return False
    assert answer.code is not None
    assert answer.json["retryable"] is True
    assert int(answer.headers["Retry-After"]) >= 0
    return True


def ready(own: Own) -> bool:
    return own.service.api.get("/readyz").status == 200


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_that_goes_away_is_a_503_and_nothing_answered_is_lost(own: Own, mode: str) -> None:
    corner = Corner(own.service.api)
    kept = corner.create(idempotency_key="kept")
    [running] = corner.claim()
    own.server.stop(mode)
    try:
        calls: tuple[Callable[[], Answer], ...] = (
            lambda: corner.api.post(JOBS, corner.job(idempotency_key="new")),
            lambda: corner.api.post(f"{JOBS}/claim", corner.claiming()),
            lambda: corner.call(running, "complete", result="whole"),
            lambda: corner.api.get(f"{JOBS}/{kept['id']}"),
            lambda: corner.api.get(JOBS),
        )
        assert all(unavailable(call()) for call in calls)
        assert own.service.api.get("/readyz").status == 503
        assert own.service.api.get("/healthz").status == 200
    finally:
        own.server.start()
    wait_until(lambda: ready(own), 20, "readiness after the database came back")
    assert corner.done(running, "complete", result="whole")["result"] == "whole"
    assert corner.api.post(JOBS, corner.job(idempotency_key="kept")).json["id"] == kept["id"]
    new = [corner.api.post(JOBS, corner.job(idempotency_key="new")) for _ in range(2)]
    assert [answer.status for answer in new] == [201, 200]
    assert PASSWORD not in own.service.log


@pytest.mark.parametrize("call", ["create", "complete"])
def test_what_was_answered_survives_a_crash_of_the_database_in_the_next_moment(own: Own, call: str) -> None:
    corner = Corner(own.service.api)
    job = corner.create() if call == "create" else corner.take()
    if call == "complete":
        corner.done(job, "complete", result="whole")
    own.server.stop("immediate")
    own.server.start()
    wait_until(lambda: ready(own), 20)
    seen = corner.look(job)
    assert (seen["status"], seen["result"]) == (("pending", None) if call == "create" else ("completed", "whole"))


def test_a_waiting_claim_outlives_a_restart_of_the_database(own: Own) -> None:
    corner = Corner(own.service.api)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(corner.api.post, f"{JOBS}/claim", corner.claiming(wait_seconds=30, claim_id=str(uuid.uuid4())))
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        own.server.stop("fast")
        own.server.start()
        wait_until(lambda: ready(own), 20)
        created = corner.create()
        answer = waiting.result(40)
    assert unavailable(answer) or [job["id"] for job in answer.json["jobs"]] in ([], [created["id"]])


def test_connections_cut_by_the_database_are_replaced(own: Own) -> None:
    corner = Corner(own.service.api)
    connection = connect(own.server.url)
    connection.run("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'plain' and pid <> pg_backend_pid()")
    connection.close()
    wait_until(lambda: corner.api.post(JOBS, corner.job(idempotency_key="k")).status in (200, 201), 10)
    assert len(corner.claim(limit=10)) == 1
    assert ready(own)


def test_a_read_only_database_is_a_503_and_not_ready(own: Own) -> None:
    corner = Corner(own.service.api)
    set_read_only(own, "on")
    try:
        wait_until(lambda: own.service.api.get("/readyz").status == 503, 20)
        assert unavailable(corner.api.post(JOBS, corner.job()))
    finally:
        set_read_only(own, "off")
    wait_until(lambda: ready(own), 20)
    assert corner.create()["status"] == "pending"


def set_read_only(own: Own, value: str) -> None:
    """As after a failover: new sessions are read-only, old ones end."""
    connection = connect(own.server.url)
    connection.run("set default_transaction_read_only = off")
    connection.run(f"alter database tests set default_transaction_read_only = {value}")
    connection.run("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'plain' and pid <> pg_backend_pid()")
    connection.close()


def test_a_locked_table_is_a_503_in_time_and_health_stays_quick(own: Own) -> None:
    corner = Corner(own.service.api)
    connection = connect(own.server.url, "ai_service")
    connection.run("begin")
    connection.run("lock table job in access exclusive mode")
    try:
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(corner.api.post, JOBS, corner.job())
            assert timed(lambda: own.service.api.get("/healthz")) < 1
            assert unavailable(stuck.result(45))
    finally:
        connection.run("rollback")
        connection.close()
    wait_until(lambda: corner.api.post(JOBS, corner.job()).status == 201, 15)


def timed(call: Callable[[], Any]) -> float:
    """Seconds that the call took."""
    begun = monotonic()
    call()
    return monotonic() - begun


# Told to end


def test_sigterm_answers_those_who_wait_then_ends_with_0(start_service: Callable[..., Service]) -> None:
    service = start_service(DRAIN_SECONDS="3")
    corner = Corner(service.api)
    running = corner.take()
    with ThreadPoolExecutor(6) as pool:
        claims = [pool.submit(corner.api.post, f"{JOBS}/claim", corner.claiming(wait_seconds=60)) for _ in range(4)]
        reader = pool.submit(corner.api.get, f"{JOBS}/{running['id']}", wait_seconds=60)
        with pytest.raises(TimeoutError):
            claims[0].result(0.5)
        begun = monotonic()
        service.terminate()
        answers = [claim.result(20) for claim in claims]
        assert [(answer.status, answer.json.get("jobs")) for answer in answers] == [(200, [])] * 4, service.log[-3000:]
        assert reader.result(20).json["status"] == "running"
    assert service.api.get("/readyz").status == 503
    assert service.wait(20) == 0
    assert monotonic() - begun < 15


def test_a_request_under_way_at_sigterm_is_finished(start_service: Callable[..., Service]) -> None:
    service = start_service(DRAIN_SECONDS="1")
    corner = Corner(service.api)
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(corner.api.post, f"{JOBS}/batch", {"jobs": [corner.job(idempotency_key=str(n)) for n in range(5000)]})
        service.terminate()
        try:
            answer = creating.result(30)
        except urllib3.exceptions.HTTPError:
            answer = None
    assert service.wait(20) == 0
    corner.api = start_service().api
    found = len(corner.claim(limit=1000))
    assert found == (1000 if answer is not None and answer.status == 201 else found)
    assert found in (0, 1000), "a batch is all or nothing"


@pytest.mark.long
def test_a_service_told_to_end_in_its_first_moment_ends(postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        assert [status_of_a_short_life(postgres_url, schema) for _ in range(8)] == [0] * 8


def status_of_a_short_life(postgres_url: str, schema: str) -> int:
    """SIGTERM the moment it says that it has started; its exit status."""
    with running_service(postgres_url, schema) as service:
        service.terminate()
        return service.wait(10)


# Told nonsense


def test_wrong_settings_stop_the_start_with_every_problem_in_one_message(postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        service = Service(postgres_url, schema, RETENTION="soon", MAX_BODY_BYTES="many", DRAIN_SECONDS="-1", HTTP_PORT="99999")
        with pytest.raises(AssertionError, match="did not start") as refused:
            service.start()
    assert service.process.returncode != 0
    for name in ("RETENTION", "MAX_BODY_BYTES", "DRAIN_SECONDS", "HTTP_PORT"):
        assert name in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_without_a_database_url_the_start_is_refused_with_a_way_out() -> None:
    service = Service("", "ai_service")
    del service.environment["DATABASE_URL"]
    with pytest.raises(AssertionError, match=r"serve --embedded"):
        service.start()
    assert service.process.returncode != 0


# Many waiting


def test_sixty_waiting_claims_leave_health_and_create_quick(start_service: Callable[..., Service]) -> None:
    service = start_service()
    corner = Corner(service.api)
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(corner.claim, worker_id=f"w{number}", wait_seconds=15) for number in range(60)]
        with pytest.raises(TimeoutError):
            waiting[-1].result(1)
        health = max(timed(lambda: corner.api.get("/healthz")) for _ in range(20))
        create = max(timed(lambda: corner.create(model_profile="nobody-waits-for-this")) for _ in range(20))
        items = corner.batch([{} for _ in range(60)])
        got = [job["id"] for future in waiting for job in future.result(40)]
    assert (health < 1, create < 1) == (True, True), (health, create)
    rest = [job["id"] for job in corner.claim(limit=100)]
    assert sorted(got + rest) == sorted(item["id"] for item in items)
    assert len(got) >= 50, "those who waited were woken by the jobs"


def test_more_waiting_claims_than_there_is_room_for_are_all_answered(start_service: Callable[..., Service]) -> None:
    service = start_service()
    corner = Corner(service.api)
    with ExitStack() as stack:
        body = corner.claiming(wait_seconds=3)
        waiting = [stack.enter_context(corner.api.unread(f"{JOBS}/claim", body)) for _ in range(400)]
        health = max(timed(lambda: corner.api.get("/healthz")) for _ in range(10))
        create = max(timed(lambda: corner.create(model_profile="nobody-waits-for-this")) for _ in range(10))
        answers = [connection.recv(65536) for connection in waiting]
    assert (health < 1, create < 1) == (True, True), (health, create)
    told = Counter(answer.split(b"\r\n")[0] for answer in answers)
    assert set(told) <= {b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"}
    assert told[b"HTTP/1.1 200 OK"] >= 224, "as many as may wait"
    assert all(b"Retry-After: 1" in answer for answer in answers if b" 503 " in answer)


@pytest.mark.long
def test_big_payloads_leave_no_memory_behind(start_service: Callable[..., Service]) -> None:
    service = start_service()
    corner = Corner(service.api)
    big = "x" * (20 << 20)
    for _ in range(3):
        job = corner.take(input=big)
        corner.done(job, "complete", result=big)
        assert corner.look(job, include="input")["input"] == big
    wait_until(lambda: resident_mb(service.process.pid) < 200, 20)


def resident_mb(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_a_load_balancer_may_probe_with_get_head_or_options(
    start_service: Callable[..., Service],
) -> None:
    service = start_service(DRAIN_SECONDS="20")

    def statuses(path: str) -> list[int]:
        return [service.api.request(method, path).status for method in ("GET", "HEAD", "OPTIONS")]

    assert statuses("/readyz") == [200] * 3
    service.terminate()
    wait_until(lambda: 200 not in statuses("/readyz"), what="the end of readiness")
    assert (statuses("/readyz"), statuses("/healthz")) == ([503] * 3, [200] * 3)
    service.terminate()
    service.wait(10)


@pytest.mark.parametrize(
    "head",
    ["GET http://[::1/healthz HTTP/1.1\r\nHost: x", f"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: {'9' * 5000}"],
    ids=["host", "length"],
)
def test_what_cannot_be_read_as_http_is_answered(api: Api, head: str) -> None:
    assert b" 400 " in api.raw(f"{head}\r\n\r\n".encode())[:20]


def test_two_lengths_are_refused(api: Api) -> None:
    request = b"POST /api/v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert b" 400 " in api.raw(request)[:20]
