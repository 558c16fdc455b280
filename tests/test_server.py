"""The server under waitress: its loop, and the core that its threads keep to."""

import os
import re
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import waitress.server
from postgres import fresh_schema
from service import Answer, Api, Corner, Service, encoded, open_files, raw_post, running_service, wait_until

from ai_internal.server.listener import Core, Loop

CORES = sorted(os.sched_getaffinity(0))
several_cores = pytest.mark.skipif(len(CORES) < 2, reason="this machine lends one core")


@pytest.fixture
def any_core() -> Iterator[None]:
    """The test may move: its threads are put back."""
    yield
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), CORES)


def cores_of(service: Service) -> set[int]:
    """Where the threads of a service may run."""
    threads = Path(f"/proc/{service.process.pid}/task").iterdir()
    return set().union(*(os.sched_getaffinity(int(thread.name)) for thread in threads))


def write_busy(stat: Path, busy: dict[int, int]) -> None:
    """The kernel's account of its cores, in ticks."""
    stat.write_text("cpu 9 9 9 9 9 9 9 9 9 9\n" + "".join(f"cpu{core} {ticks} 0 0 500 7 0 0 0 0 0\n" for core, ticks in busy.items()))


@several_cores
def test_all_threads_of_the_service_keep_to_one_core(postgres_url: str, schema: str) -> None:
    # A service of its own: one that has run for a while may be about to move to another core.
    with running_service(postgres_url, schema) as service:
        assert len(cores_of(service)) == 1


@several_cores
def test_threads_run_anywhere_where_one_core_is_not_wanted(postgres_url: str, schema: str) -> None:
    with running_service(postgres_url, schema, HTTP_ONE_CORE="false") as service:
        assert cores_of(service) == set(CORES)


@several_cores
def test_the_threads_begin_where_fewer_interrupts_are(tmp_path: Path, any_core: None) -> None:
    for quiet in CORES:
        lines = (f"cpu{core} 0 0 0 500 7 {0 if core == quiet else 30} 20 0 0 0\n" for core in CORES)
        (tmp_path / "stat").write_text("cpu 9 9 9 9 9 9 9 9 9 9\n" + "".join(lines))
        assert Core(CORES, tmp_path / "stat").number == quiet


@several_cores
def test_the_threads_leave_a_core_that_others_use(tmp_path: Path, any_core: None) -> None:
    busy = dict.fromkeys(CORES, 1000)
    write_busy(tmp_path / "stat", busy)
    core = Core(CORES, tmp_path / "stat")
    first, now = core.number, 0.0
    assert os.sched_getaffinity(0) == {first}
    core.rebalance(now)
    # Each look leaves it to chance: two services that share a core must not both leave it.
    while core.number == first and now < 400:
        busy[first] += 200
        write_busy(tmp_path / "stat", busy)
        now += 2
        core.rebalance(now)
    assert core.number != first
    assert os.sched_getaffinity(0) == {core.number}


@several_cores
def test_the_threads_stay_where_nobody_else_is(tmp_path: Path, any_core: None) -> None:
    busy = dict.fromkeys(CORES, 1000)
    write_busy(tmp_path / "stat", busy)
    core = Core(CORES, tmp_path / "stat")
    first = core.number
    for look in range(40):
        busy[first] += 10
        write_busy(tmp_path / "stat", busy)
        core.rebalance(2.0 * look)
    assert core.number == first


def test_a_hundred_idle_connections_and_requests_in_a_row_on_one(service: Service) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    address = ("127.0.0.1", service.api.port)
    idle = [socket.create_connection(address) for _ in range(100)]
    with socket.create_connection(address, timeout=20) as busy:
        # More than one at a time: the connection is not read meanwhile, and must be read again afterwards.
        busy.sendall(request * 20)
        answers = b""
        while answers.count(b'"status":"ok"') < 20:
            answers += busy.recv(65536) or pytest.fail(f"closed after {answers!r}")
        for _ in range(20):
            busy.sendall(request)
            assert b'"status":"ok"' in busy.recv(65536)
    before = len(open_files(service))
    for connection in idle:
        connection.close()
    wait_until(lambda: len(open_files(service)) <= before - 100, what="the end of the connections")


# ---------------------------------------------------------------- room for large bodies and answers


MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def narrow(postgres_url: str) -> Iterator[Service]:
    """A service with room for one large body."""
    with (
        fresh_schema(postgres_url) as schema,
        running_service(postgres_url, schema, MAX_BODY_BYTES=str(MEGABYTE), MAX_BODIES_BYTES=str(MEGABYTE)) as service,
    ):
        yield service


@contextmanager
def half_sent(service: Service, body: bytes) -> Iterator[socket.socket]:
    """A create whose body has not come whole."""
    with socket.create_connection(("127.0.0.1", service.api.port), timeout=20) as connection:
        connection.sendall(raw_post("/api/v1/jobs", body).replace(b"Connection: close\r\n", b"")[: -len(body) // 2])
        turn(service)
        yield connection


def turn(service: Service) -> None:
    """Lets the server's loop turn more often than it needs to take in what was sent, 128 KB in a turn."""
    assert {service.api.get("/healthz").status for _ in range(16)} == {200}


def large_job(corner: Corner) -> dict[str, Any]:
    return corner.job(input={"text": "x" * 700_000})


def create_until(service: Service, job: dict[str, Any], status: int) -> Answer:
    """The answer once it has this status: what another connection does is noticed a little later."""
    answers: list[Answer] = []

    def answered() -> bool:
        answers.append(service.api.post("/api/v1/jobs", job))
        return answers[-1].status == status

    wait_until(answered, what=f"an answer with {status}")
    return answers[-1]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_without_room_is_refused_after_it_was_sent(narrow: Service, is_chunked: bool) -> None:
    corner = Corner(narrow.api)
    body = encoded(large_job(corner))
    with half_sent(narrow, body):
        refused = create_until(narrow, large_job(corner), 503)
        assert (refused.code, refused.headers["Retry-After"]) == ("service_full", "1")
        if is_chunked:
            answer = narrow.api.raw(raw_post("/api/v1/jobs", b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
                                    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))  # fmt: skip
            assert answer.startswith(b"HTTP/1.1 503 ")
        # A small one needs no room.
        assert corner.create()["status"] == "pending"
    assert create_until(narrow, large_job(corner), 201)


def test_a_large_answer_without_room_is_refused_until_the_other_is_read(narrow: Service) -> None:
    corner = Corner(narrow.api)
    job = corner.take()
    corner.done(job, "complete", result={"text": "y" * 900_000})
    with half_sent(narrow, encoded(large_job(corner))):
        refused = wait_until(lambda: (answer := narrow.api.get(f"/api/v1/jobs/{job['id']}")).status == 503 and answer, what="a refusal")
        assert (refused.code, refused.headers["Retry-After"]) == ("service_full", "1")
    # Room comes back when the other has gone, and after each answer.
    for _ in range(3):
        wait_until(lambda: narrow.api.get(f"/api/v1/jobs/{job['id']}").status == 200, what="the answer")
    assert corner.look(job)["result"] == {"text": "y" * 900_000}


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    return answer


def test_a_connection_that_is_not_kept_is_closed_at_once(narrow: Service) -> None:
    taken = []
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", narrow.api.port), timeout=20) as connection:
            begun = time.monotonic()
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer_of(connection).endswith(b"}")
            taken.append(time.monotonic() - begun)
    # A turn of the loop that nobody ends lasts a second.
    assert min(taken) < 0.5


def test_waking_the_loop_more_often_than_it_listens_blocks_nobody() -> None:
    server = waitress.server.create_server(lambda *_: [], listen="127.0.0.1:0", threads=1)
    try:
        loop = Loop(server)
        for _ in range(70_000):
            loop.wake()
        # The pipe is emptied turn by turn, and then nothing is left to do.
        for _ in range(20):
            loop.run_once(0)
        assert not select.select([server.trigger._fds[0]], [], [], 0)[0]
    finally:
        server.task_dispatcher.shutdown()
        server.close()


@contextmanager
def stalled(service: Service, job: dict[str, Any], behind: bytes = b"") -> Iterator[socket.socket]:
    """A client that asked for a job with a large result, and something `behind` it, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with connection:
        connection.connect(("127.0.0.1", service.api.port))
        connection.sendall(f"GET /api/v1/jobs/{job['id']} HTTP/1.1\r\nHost: x\r\n\r\n".encode() + behind)
        yield connection


@pytest.mark.long
def test_a_client_that_hangs_up_leaves_no_room_taken(postgres_url: str, schema: str) -> None:
    with running_service(postgres_url, schema, MAX_BODY_BYTES=str(8 * MEGABYTE), MAX_BODIES_BYTES=str(8 * MEGABYTE)) as service:
        corner = Corner(service.api)
        job = corner.take()
        corner.done(job, "complete", result={"text": "y" * 7_000_000})
        body = encoded(large_job(corner))
        for _ in range(12):
            with stalled(service, job, raw_post("/api/v1/jobs", body).replace(b"Connection: close\r\n", b"")) as connection:
                connection.recv(100)
        assert create_until(service, corner.job(input={"text": "x" * 7_900_000}), 201)


def test_a_claim_is_answered_even_without_room(narrow: Service) -> None:
    corner = Corner(narrow.api)
    for _ in range(3):
        create_until(narrow, corner.job(input={"text": "x" * 300_000}), 201)
    with half_sent(narrow, encoded(corner.job(input={"text": "x" * 1_000_000}))):
        create_until(narrow, large_job(corner), 503)
        assert len(corner.claim(limit=3)) == 3


RIGHT = "right-0123456789abcdef"


@pytest.fixture(scope="module")
def guarded(postgres_url: str) -> Iterator[Service]:
    """A service with a token, and with room for one large body."""
    room = {"MAX_BODY_BYTES": str(MEGABYTE), "MAX_BODIES_BYTES": str(MEGABYTE)}
    with (
        fresh_schema(postgres_url) as schema,
        running_service(postgres_url, schema, **room, API_TOKENS=f"right=operator={RIGHT}") as service,
    ):
        yield service


def parts(body: bytes, token: str | None, is_chunked: bool) -> tuple[bytes, bytes]:
    """A create in two parts, the second of which begins in the middle of its body."""
    lines = [*([f"Authorization: Bearer {token}"] if token else []), *(["Transfer-Encoding: chunked"] if is_chunked else [])]
    request = raw_post("/api/v1/jobs", body, *lines)
    if is_chunked:
        head = re.sub(rb"Content-Length: \d+\r\n", b"", request[: -len(body)])
        request = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return request[: -len(body) // 2], request[-len(body) // 2 :]


@pytest.mark.parametrize("token", [None, "wrong-0123456789abcdef", RIGHT])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_only_who_shows_a_token_takes_room(guarded: Service, is_chunked: bool, token: str | None) -> None:
    right = Api(guarded.api.port, RIGHT)
    job = large_job(Corner(right))
    first, rest = parts(encoded(job), token, is_chunked)
    with socket.create_connection(("127.0.0.1", guarded.api.port), timeout=20) as connection, closing(right):
        connection.sendall(first)
        turn(guarded)
        if token == RIGHT:
            wait_until(lambda: right.post("/api/v1/jobs", job).status == 503, what="a refusal for want of room")
        else:
            # The room of one body is free again a moment after its response.
            for _ in range(10):
                wait_until(lambda: right.post("/api/v1/jobs", job).status == 201, what="room")
        connection.sendall(rest)
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 201 " if token == RIGHT else b"HTTP/1.1 401 ")
    assert (b"www-authenticate: bearer" in answer.lower() and b'"code":"unauthorized"' in answer) == (token != RIGHT)


def test_a_body_that_is_announced_too_large_is_not_asked_for(narrow: Service) -> None:
    head = raw_post("/api/v1/jobs", b"", "Expect: 100-continue").replace(b"Content-Length: 0", b"Content-Length: 100000000")
    assert narrow.api.raw(head).startswith(b"HTTP/1.1 413 ")


# ---------------------------------------------------------------- the end


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def stopped_in_its_tracks(service: Service) -> Iterator[None]:
    """The process does nothing meanwhile; at the end it goes on, and finds all that has come and that it is to end."""
    os.kill(service.process.pid, signal.SIGSTOP)
    try:
        yield
        service.terminate()
    finally:
        os.kill(service.process.pid, signal.SIGCONT)


def test_requests_that_came_before_the_listener_closes_are_answered(postgres_url: str, schema: str) -> None:
    with running_service(postgres_url, schema) as service, ExitStack() as stack:
        address = ("127.0.0.1", service.api.port)
        kept = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(20)]
        for connection in kept:
            connection.sendall(HEALTH)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        with stopped_in_its_tracks(service):
            waiting = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(20)]
            for connection in kept + waiting:
                connection.sendall(HEALTH)
        for connection in kept + waiting:
            assert answer_of(connection).startswith(b"HTTP/1.1 200 ")
        assert service.wait() == 0


def test_a_body_under_way_when_the_listener_closes_is_taken_in(postgres_url: str, schema: str) -> None:
    with running_service(postgres_url, schema) as service:
        corner = Corner(service.api)
        body = encoded(corner.job())
        with half_sent(service, body) as connection:
            service.terminate()
            wait_until(lambda: not listens(service), what="the close of the listener")
            connection.sendall(body[-len(body) // 2 :])
            assert connection.recv(65536).startswith(b"HTTP/1.1 201 ")
        assert service.wait() == 0


def listens(service: Service) -> bool:
    """Whether connections are taken."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", service.api.port)) == 0
