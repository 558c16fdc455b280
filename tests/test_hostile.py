"""Hostile and heavy traffic on raw sockets: one request is one request, nobody holds what others need, and health answers quickly."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from postgres import connect, fresh_schema
from service import Answer, Api, Corner, Service, encoded, open_files, raw_post, running_service, wait_until

CREATE, CLAIM = "/api/v1/jobs", "/api/v1/jobs/claim"
MEGABYTE = 1 << 20
STALL_SECONDS = 1.0
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
# A turn of the loop and a busy machine; what it guards against takes seconds.
QUICK_SECONDS = 2.0


@pytest.fixture(scope="module")
def besieged(postgres_url: str) -> Iterator[Service]:
    """A service with little of everything: 48 threads, 16 of them for those who wait, and room for one large body."""
    limits = {"MAX_BODY_BYTES": str(8 * MEGABYTE), "MAX_BODIES_BYTES": str(8 * MEGABYTE), "HTTP_THREADS": "48"}
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema, STALL_SECONDS=str(STALL_SECONDS), **limits) as service:
        yield service


@pytest.fixture
def siege(besieged: Service) -> Corner:
    """A corner of the besieged service."""
    return Corner(besieged.api)


@contextmanager
def connected(api: Api, *sent: bytes) -> Iterator[socket.socket]:
    """A connection on which this was sent."""
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection:
        for part in sent:
            connection.sendall(part)
        yield connection


def health_seconds(api: Api) -> float:
    """How long a balancer waits for the answer on a new connection."""
    begun = time.monotonic()
    assert api.raw(HEALTH).startswith(b"HTTP/1.1 200 ")
    return time.monotonic() - begun


def memory_of(service: Service) -> int:
    """The resident bytes of a service."""
    with open(f"/proc/{service.process.pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def other_end(connection: socket.socket) -> str:
    """The service's end of a connection over IPv4, as `open_files` has it."""
    ports = [f":{port:04X}" for _, port in (connection.getpeername(), connection.getsockname())]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, *_, inode = line.split()[:10]
        if here.endswith(ports[0]) and there.endswith(ports[1]):
            return f"socket:[{inode}]"
    raise AssertionError("a connection without an other end")


def answers_in(received: bytes) -> list[Answer]:
    """All answers that came over a connection, in their order."""
    answers = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.title(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("Content-Length", "0"))
        answers.append(Answer(int(first.split()[1]), headers, rest[:length]))
        received = rest[length:]
    return answers


def read_to_the_end(connection: socket.socket) -> bytes:
    """What comes until the other side closes, in whatever way."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            received += part
    return received


# ---------------------------------------------------------------- request smuggling


def chunk(data: bytes, size: bytes | None = None, behind: bytes = b"", end: bytes = b"\r\n") -> bytes:
    """One chunk, its size in another spelling or with something behind it where wanted."""
    return (b"%x" % len(data) if size is None else size) + behind + b"\r\n" + data + end


# A request that a proxy would not have let through, in the place of <H>; its length in decimal as <N>, in hexadecimal as <X>.
CHUNKED, LAST = "Transfer-Encoding: chunked", b"0\r\n\r\n"
REFUSED: dict[str, tuple[list[str], bytes]] = {
    "a length and chunks": (["Content-Length: <N>", CHUNKED], LAST + b"<H>"),
    "chunks and a length": ([CHUNKED, "Content-Length: 5"], LAST + b"<H>"),
    "two lengths that differ": (["Content-Length: 0", "Content-Length: <N>"], b"<H>"),
    "two lengths alike": (["Content-Length: <N>", "Content-Length: <N>"], b"<H>"),
    "two lengths in one line": (["Content-Length: 0, <N>"], b"<H>"),
    "a negative length": (["Content-Length: -1"], b"<H>"),
    "a signed length": (["Content-Length: +0"], b"<H>"),
    "a hexadecimal length": (["Content-Length: 0x0"], b"<H>"),
    "a length with a fraction": (["Content-Length: 0.0"], b"<H>"),
    "an empty length": (["Content-Length: "], b"<H>"),
    "a length in other digits": (["Content-Length: \u00b9"], b"<H>"),
    "a length with a vertical tab": (["Content-Length: \x0b0"], b"<H>"),
    "a length of 5,000 digits": (["Content-Length: " + "0" * 4999 + "1"], b"<H>"),
    "an encoding almost chunked": (["Transfer-Encoding: xchunked"], LAST + b"<H>"),
    "chunked in quotes": (['Transfer-Encoding: "chunked"'], LAST + b"<H>"),
    "chunked with a parameter": (["Transfer-Encoding: chunked;q=1"], LAST + b"<H>"),
    "chunked with a vertical tab": (["Transfer-Encoding: \x0bchunked"], LAST + b"<H>"),
    "chunked, then identity": (["Transfer-Encoding: chunked, identity"], LAST + b"<H>"),
    "chunked in one of two lines": (["Transfer-Encoding: gzip", CHUNKED], LAST + b"<H>"),
    "a space before the colon": (["Transfer-Encoding : chunked"], LAST + b"<H>"),
    "a length with a space before the colon": (["Content-Length : <N>"], b"<H>"),
    "a bare line feed": (["X-Bare: a\nContent-Length: <N>"], b"<H>"),
    "a bare carriage return": (["X-Bare: a\rContent-Length: <N>"], b"<H>"),
    "a NUL": (["X-Bare: a\0", "Content-Length: <N>"], b"<H>"),
    "a header without a colon": (["Content-Length <N>"], b"<H>"),
    "a chunk size with a sign": ([CHUNKED], chunk(b"", b"+0") + b"<H>"),
    "a negative chunk size": ([CHUNKED], chunk(b"<H>", b"-1") + LAST),
    "a chunk size with a prefix": ([CHUNKED], chunk(b"", b"0x0") + b"<H>"),
    "a chunk size that is no number": ([CHUNKED], chunk(b"<H>", b"zz") + LAST),
    "a chunk size with a blank before it": ([CHUNKED], chunk(b"<H>", b" <X>") + LAST),
    "a chunk size with an underscore": ([CHUNKED], chunk(b"<H>", b"0_0") + LAST),
    "a chunk longer than its size": ([CHUNKED], chunk(b"ab<H>", b"2") + LAST),
    "a chunk without its line end": ([CHUNKED], chunk(b"ab", end=b"") + LAST + b"<H>"),
    "chunks parted by line feeds": ([CHUNKED], b"2\nab\n0\n\n<H>"),
    "an ill chunk extension": ([CHUNKED], chunk(b"ab", behind=b";\x00=\n") + LAST + b"<H>"),
    "a chunk extension with a bare line feed": ([CHUNKED], chunk(b"ab", behind=b";a\n0\n\n<H>") + LAST),
}
ONE: dict[str, tuple[list[str], bytes]] = {
    "hidden in a body": (["Content-Length: <N>"], b"<H>"),
    "hidden in a chunk": ([CHUNKED], chunk(b"<H>", b"<X>") + LAST),
    "hidden in a chunk's extension": ([CHUNKED], chunk(b"ab", behind=b';a="POST /api/v1/jobs HTTP/1.1"') + LAST),
    "hidden in a trailer": ([CHUNKED], b"0\r\nX-Trailer: a\r\n<H>"),
    "a length by an underscore": (["Content-Length: <N>", "Content_Length: 0"], b"<H>"),
    "an encoding by an underscore": (["Content-Length: <N>", "Transfer_Encoding: chunked"], b"<H>"),
    "an encoding nobody knows yet": (["Content-Length: <N>", "X-Transfer-Encoding: chunked"], b"<H>"),
    "a length folded into the line before": (["X-Folded: a", " Content-Length: 0", "Content-Length: <N>"], b"<H>"),
    "chunked folded into the next line": (["Transfer-Encoding:", " chunked"], chunk(b"<H>", b"<X>") + LAST),
    "chunked in capitals": (["Transfer-Encoding: CHUNKED"], chunk(b"<H>", b"<X>") + LAST),
    "a length with zeros before it": (["Content-Length: 000<N>"], b"<H>"),
    "a chunk size with zeros before it": ([CHUNKED], chunk(b"<H>", b"000<X>") + LAST),
}


def smuggler(corner: Corner, lines: list[str], body: bytes, version: str = "1.1") -> bytes:
    """A request with these header lines and another one hidden behind or in it: to create a job in this corner."""
    hidden = raw_post(CREATE, encoded(corner.job(owner_ref="hidden")))
    head = "\r\n".join((f"POST {CREATE} HTTP/{version}", "Host: x", "Content-Type: application/json", *lines, "", ""))
    return head.replace("<N>", str(len(hidden))).encode("latin-1") + body.replace(b"<X>", b"%x" % len(hidden)).replace(b"<H>", hidden)


def hidden_jobs(corner: Corner) -> int:
    """How many jobs the hidden requests have made."""
    return len(corner.api.get(CREATE, owner_service=corner.owner_service).json["jobs"])


@pytest.mark.parametrize("shape", REFUSED)
def test_a_request_of_doubtful_length_is_refused_and_nothing_behind_it_heard(siege: Corner, shape: str) -> None:
    with connected(siege.api, smuggler(siege, *REFUSED[shape])) as connection:
        [answer] = answers_in(read_to_the_end(connection))
    assert answer.status in (400, 501)
    assert answer.code == "malformed_request"
    assert hidden_jobs(siege) == 0


@pytest.mark.parametrize("version", ["1.0", "1.2", "0.9", "2.0"])
@pytest.mark.parametrize("kept", [[], ["Connection: keep-alive"]])
def test_chunks_in_another_version_than_1_1_are_refused(siege: Corner, version: str, kept: list[str]) -> None:
    for shape in (REFUSED["a length and chunks"], ONE["hidden in a chunk"], ([CHUNKED], b"H")):
        with connected(siege.api, smuggler(siege, [*kept, *shape[0]], shape[1], version)) as connection:
            [answer] = answers_in(read_to_the_end(connection))
        assert answer.status in (400, 501)
    assert hidden_jobs(siege) == 0


@pytest.mark.parametrize("shape", ONE)
def test_a_request_in_another_ones_body_is_never_answered(siege: Corner, shape: str) -> None:
    with connected(siege.api, smuggler(siege, *ONE[shape])) as connection:
        first = connection.recv(1 << 16)
        with contextlib.suppress(OSError):
            connection.sendall(HEALTH)
        answers = answers_in(first + read_to_the_end(connection))
    assert 400 <= answers[0].status < 500
    assert [answer.status for answer in answers[1:]] in ([200], [400])
    assert hidden_jobs(siege) == 0


def test_the_hidden_request_would_make_a_job_were_it_heard(siege: Corner) -> None:
    """Or the tests above could not fail."""
    with connected(siege.api, smuggler(siege, ["Content-Length: 2"], b"{}<H>")) as connection:
        assert [answer.status for answer in answers_in(read_to_the_end(connection))] == [422, 201]
    assert hidden_jobs(siege) == 1


# ---------------------------------------------------------------- endless heads and bodies


HEAD = f"POST {CREATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "a request line": (b"GET /", b"a" * 1000, 431),
    "a header line": (HEAD + b"X-Endless: ", b"a" * 1000, 431),
    "header lines": (HEAD, b"X-Header: 1\r\n" * 100, 431),
    "the same header line": (HEAD, b"a:b\r\n" * 1000, 431),
    "folded lines": (HEAD + b"X-Folded: 1\r\n", b" 2\r\n" * 1000, 431),
    "a chunk's size": (CHUNKS, b"0" * 1000, 400),
    "a chunk's extension": (CHUNKS + b"2;a=", b"a" * 1000, 400),
    "a trailer": (CHUNKS + b"0\r\nX-Trailer: ", b"a" * 1000, 400),
    "trailers": (CHUNKS + b"0\r\n", b"X-Trailer: 1\r\n" * 100, 400),
    "chunks of one byte": (CHUNKS, b"1\r\n \r\n" * 20_000, 400),
    "chunks": (CHUNKS, b"10000\r\n" + b" " * 65_536 + b"\r\n", 413),
}


def sent_until_refused(api: Api, head: bytes, more: bytes) -> tuple[int, bytes]:
    """How many bytes a client gets rid of that sends on and on, and what it was answered; nothing where the closing overtook that."""
    with connected(api, head) as connection:
        sent = 0
        try:
            while sent < 64 * MEGABYTE:
                sent += connection.send(more)
                if select_readable(connection):
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
        return sent, read_to_the_end(connection)


def select_readable(connection: socket.socket) -> bool:
    """Whether something has come."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(30)


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_refused_and_holds_up_nobody(besieged: Service, name: str) -> None:
    head, more, status = ENDLESS[name]
    before = memory_of(besieged)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sent_until_refused, besieged.api, head, more)
        assert health_seconds(besieged.api) < QUICK_SECONDS
        sent, received = sending.result(timeout=60)
    # What the kernel takes at once comes to some megabytes.
    assert sent < 32 * MEGABYTE
    assert memory_of(besieged) - before < 40 * MEGABYTE
    assert not received or answers_in(received)[0].status == status


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_request_that_pauses_at_its_limit_gets_its_refusal(besieged: Service, name: str) -> None:
    head, more, status = ENDLESS[name]
    enough = 9 * MEGABYTE if status == 413 else 600_000 if name == "chunks of one byte" else 200_000
    with connected(besieged.api, head) as connection, contextlib.suppress(ConnectionError):
        connection.sendall((more * (enough // len(more) + 1))[:enough])
        answer = answers_in(read_to_the_end(connection))
        assert [each.status for each in answer] in ([status], [])


def test_a_job_in_chunks_of_a_byte_is_taken(siege: Corner) -> None:
    """As a client writes it that hands on its JSON token by token."""
    body = b"".join(chunk(b"%c" % byte) for byte in encoded(siege.job(input="x" * 20_000)))
    with connected(siege.api, CHUNKS, body, LAST) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 201 ")


def test_ten_thousand_headers_are_refused(siege: Corner) -> None:
    with connected(siege.api, HEAD, b"".join(b"X-%d: 1\r\n" % number for number in range(10_000)), b"\r\n") as connection:
        received = read_to_the_end(connection)
    assert not received or answers_in(received)[0].status == 431


def test_a_thousand_headers_are_fine(siege: Corner) -> None:
    answer = siege.api.request("GET", "/healthz", headers={f"X-{number}": "1" for number in range(1000)})
    assert answer.status == 200


# ---------------------------------------------------------------- who sends or reads too slowly


def large_job(corner: Corner) -> bytes:
    """The body of a create that leaves no room for another one."""
    return encoded(corner.job(input="x" * (7 * MEGABYTE)))


def half_of(request: bytes) -> bytes:
    """Its first half."""
    return request[: len(request) // 2]


def closed_within(connection: socket.socket, seconds: float, drip: bytes = b"") -> float:
    """Seconds until the other side closes, a byte of `drip` sent ten times a second meanwhile; AssertionError after so many."""
    begun = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - begun < seconds:
        try:
            connection.sendall(drip)
            if not connection.recv(1 << 16):
                return time.monotonic() - begun
        except TimeoutError:
            continue
        except ConnectionError:
            return time.monotonic() - begun
    raise AssertionError(f"still open after {seconds} s")


SLOW = {"a head": HEAD + b"X-Slow: ", "a small body": half_of(raw_post(CREATE, b" " * 1000)), "a chunked body": CHUNKS + b"ffff\r\n"}


def test_a_request_that_does_not_come_whole_is_given_up(besieged: Service) -> None:
    def seconds(begun: bytes, drip: bytes) -> float:
        with connected(besieged.api, begun) as connection:
            return closed_within(connection, 10 * STALL_SECONDS, drip)

    with ThreadPoolExecutor(2 * len(SLOW)) as pool:
        given = list(pool.map(seconds, [*SLOW.values()] * 2, [b""] * len(SLOW) + [b"a"] * len(SLOW)))
    assert min(given) > STALL_SECONDS / 2


def test_half_a_body_does_not_hold_its_room_by_a_byte_now_and_then(siege: Corner) -> None:
    body = large_job(siege)
    with connected(siege.api, half_of(raw_post(CREATE, body))) as connection:
        wait_until(lambda: siege.api.post(CREATE, body=body).status == 503, what="the room to be taken")
        closed_within(connection, 10 * STALL_SECONDS, b"a")
        assert siege.api.post(CREATE, body=body).status == 201


def test_half_a_body_makes_no_job_and_leaves_no_room_taken(siege: Corner) -> None:
    body = large_job(siege)
    for _ in range(5):
        with connected(siege.api, half_of(raw_post(CREATE, body))):
            pass
    wait_until(lambda: siege.api.post(CREATE, body=body).status == 201, what="a create")
    assert hidden_jobs(siege) == 1


def test_a_slow_upload_at_an_honest_pace_arrives(siege: Corner) -> None:
    request = raw_post(CREATE, encoded(siege.job(input="x" * 70_000)))
    pause = threading.Event()
    with connected(siege.api) as connection:
        # 40 KB a second for almost two: longer than a silent one is given.
        for start in range(0, len(request), 4000):
            connection.sendall(request[start : start + 4000])
            pause.wait(0.1)
        assert answers_in(read_to_the_end(connection))[0].status == 201


def test_a_connection_that_asks_again_and_again_at_leisure_is_kept(siege: Corner) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    pause = threading.Event()
    with connected(siege.api) as connection:
        # Most of the time one of them is half here.
        for _ in range(7):
            connection.sendall(request[:20])
            pause.wait(STALL_SECONDS / 4)
            connection.sendall(request[20:])
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_parked_claim_is_no_stalled_request(siege: Corner) -> None:
    begun = time.monotonic()
    assert siege.claim(wait_seconds=1.7 * STALL_SECONDS) == []
    assert time.monotonic() - begun > 1.5 * STALL_SECONDS


def test_who_hardly_reads_an_answer_is_let_go_with_its_room(besieged: Service, siege: Corner) -> None:
    job = siege.take()
    siege.done(job, "complete", result="y" * (7 * MEGABYTE))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", besieged.api.port))
        connection.sendall(f"GET {CREATE}/{job['id']} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(1) == b"H"
        end = other_end(connection)
        assert end in open_files(besieged)
        body = large_job(siege)
        wait_until(lambda: siege.api.post(CREATE, body=body).status == 503, what="the room to be taken")

        def is_let_go() -> bool:
            connection.recv(1000)
            return siege.api.post(CREATE, body=body).status == 201

        wait_until(is_let_go, 10 * STALL_SECONDS, "room again")
        wait_until(lambda: end not in open_files(besieged), what="its descriptor to be closed")


# ---------------------------------------------------------------- too many


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may have 5,000 files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(5000, hard) if hard != resource.RLIM_INFINITY else 5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_thousand_idle_connections_leave_health_quick_and_memory_small(besieged: Service, siege: Corner, many_files: None) -> None:
    before = memory_of(besieged)
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(besieged.api)) for _ in range(2000)]
        wait_until(lambda: len(open_files(besieged)) > 2000, what="all to be accepted")
        assert min(health_seconds(besieged.api) for _ in range(3)) < 0.1
        assert siege.take()["attempt"] == 1
        assert memory_of(besieged) - before < 40 * MEGABYTE
        # None of them was let go for it, and each is served.
        for connection in idle[::100]:
            connection.sendall(HEALTH)
            assert read_to_the_end(connection).startswith(b"HTTP/1.1 200 ")


def test_at_the_limit_of_connections_a_new_one_is_served(postgres_url: str) -> None:
    """700 files, 400 connections: those that were silent longest make place."""
    with ExitStack() as stack:
        service = Service(postgres_url, stack.enter_context(fresh_schema(postgres_url)))
        service.before = ("sh", "-c", 'ulimit -n 700 && exec "$@"', "sh")
        stack.callback(service.stop)
        service.start()
        for _ in range(500):
            stack.enter_context(connected(service.api, HEAD[:10]))
        # Two minutes, were they left alone.
        assert health_seconds(service.api) < 20
        assert "Too many open files" not in service.log


def test_claims_beyond_the_places_are_refused_or_answered_and_health_is_quick(siege: Corner) -> None:
    with ThreadPoolExecutor(60) as pool:
        claims = [pool.submit(siege.api.post, CLAIM, siege.claiming(wait_seconds=1)) for _ in range(60)]
        seconds = [health_seconds(siege.api) for _ in range(10)]
        answers = [claim.result() for claim in claims]
    assert max(seconds) < QUICK_SECONDS
    assert all(answer.status == 200 or (answer.code, answer.headers["Retry-After"]) == ("service_full", "1") for answer in answers)


def test_bodies_beyond_the_room_are_refused_and_health_is_quick(besieged: Service, siege: Corner) -> None:
    body, before = large_job(siege), memory_of(besieged)
    with ThreadPoolExecutor(20) as pool:
        creates = [pool.submit(siege.api.post, CREATE, None, body) for _ in range(20)]
        seconds, memory = [], []
        while not all(create.done() for create in creates):
            seconds.append(health_seconds(siege.api))
            memory.append(memory_of(besieged) - before)
        answers = [create.result() for create in creates]
    assert max(seconds) < QUICK_SECONDS
    assert max(memory) < 12 * len(body)
    assert {answer.status for answer in answers} == {201, 503}
    assert {(answer.code, answer.headers["Retry-After"]) for answer in answers if answer.status == 503} == {("service_full", "1")}


@contextmanager
def locked(url: str, service: Service, table: str) -> Iterator[None]:
    """A stranger's lock on a table, in a transaction of its own."""
    connection = connect(url, service.schema)
    try:
        connection.run("begin")
        connection.run(f"lock table {table} in access exclusive mode")
        yield
        connection.run("rollback")
    finally:
        connection.close()


def test_with_all_threads_behind_a_strangers_lock_health_is_quick_and_the_others_get_503(
    besieged: Service, siege: Corner, postgres_url: str
) -> None:
    job = siege.create()
    answers: list[Answer] = []
    with ThreadPoolExecutor(150) as pool, locked(postgres_url, besieged, "job"):
        for _ in range(150):
            pool.submit(lambda: answers.append(siege.api.get(f"{CREATE}/{job['id']}")))
        seconds: list[float] = []

        def are_answered() -> bool:
            seconds.append(health_seconds(siege.api))
            return len(answers) >= 120

        # 48 threads, each 5 s behind the lock or for a connection: one after the other 120 would have taken 15 s.
        wait_until(are_answered, 12, "120 answers")
        refused = list(answers)
    assert max(seconds) < QUICK_SECONDS
    assert {(answer.status, answer.code) for answer in refused} == {(503, "database_busy"), (503, "service_full")}
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert siege.look(job)["status"] == "pending"


# ---------------------------------------------------------------- clients that vanish


def close(connection: socket.socket) -> None:
    """In good order."""
    connection.close()


def reset(connection: socket.socket) -> None:
    """As a process that was killed with data unread, or a firewall: RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Says that nothing more will be sent. On the wire that is the same as closing, so it counts as that."""
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("vanish", [close, reset, half_close], ids=["closed", "reset", "half-closed"])
def test_the_claims_of_200_clients_that_vanished_take_no_job(corner: Corner, vanish: Callable[[socket.socket], None]) -> None:
    with ExitStack() as stack:
        waiting = []
        for number in range(200):
            claim = corner.claiming(worker_id=f"{corner.worker_id}-{number}", wait_seconds=60, limit=10)
            waiting.append(stack.enter_context(connected(corner.api, raw_post(CLAIM, encoded(claim)))))
        wait_until(lambda: seen_workers(corner) == 200, what="all claims to be waiting")
        for connection in waiting:
            vanish(connection)
        # An answer to the second was asked for in a later turn of the server's loop than those that saw them go.
        assert [corner.api.get("/healthz").status for _ in range(2)] == [200, 200]
        created = {job["id"] for job in corner.batch([{} for _ in range(50)])}
        alive = [job for _ in range(5) for job in corner.claim(limit=10)]
    assert {job["id"] for job in alive} == created
    assert {job["worker_id"] for job in (corner.look(job) for job in alive)} == {corner.worker_id}


def seen_workers(corner: Corner) -> int:
    """How many workers of this corner have asked for jobs."""
    return sum(worker["worker_id"].startswith(corner.worker_id) for worker in corner.api.get("/api/v1/workers").json["workers"])
