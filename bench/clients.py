"""The load of the benchmarks: client processes that speak HTTP to a service as callers and workers do, as cheaply as Python can.

Each client is a process of its own with one kept connection. What they do is counted in jobs; how much of the two cores they take
themselves is measured with it, since on a small machine they compete with what they measure.
"""

import functools
import json
import multiprocessing
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

import attrs

INPUT = '{"messages": [{"role": "user", "content": "' + "x" * 950 + '"}]}'
RESULT = '{"content": "' + "y" * 1900 + '"}'


class Client:
    """One kept connection to a service. What is no 2xx is a reason to stop: a benchmark of errors measures nothing.

    Written on the bare socket: `http.client` took a third of a two-core machine from what was to be measured.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, path: str, body: str) -> bytes:
        """The body of the answer."""
        sent = body.encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        self._socket.sendall(head.encode() + sent)
        return self._read()

    def get(self, path: str) -> bytes:
        """The body of the answer."""
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        return self._read()

    def _read(self) -> bytes:
        head, body = b"", b""
        while not body:
            head += self._received()
            head, parted, body = head.partition(b"\r\n\r\n")
            body = parted + body
        parts = [body[4:]]
        missing = int(re.findall(rb"(?i)content-length: (\d+)", head)[0]) - len(parts[0])
        while missing > 0:
            parts.append(self._received())
            missing -= len(parts[-1])
        if head[9:10] != b"2":
            raise RuntimeError(f"{head[9:12].decode()}: {parts[0][:300]!r}")
        return b"".join(parts)

    def _received(self) -> bytes:
        part = self._socket.recv(1 << 17)
        if not part:
            raise RuntimeError("the service closed the connection")
        return part

    # A job's life

    def create(self, profile: str, count: int, **facts: Any) -> list[str]:
        """Creates so many jobs in one call; their ids."""
        defaults = {"owner_service": "bench", "task_type": "call_analysis", "model_profile": profile, **facts}
        answer = self.post("/api/v1/jobs/batch", f'{{"defaults":{json.dumps(defaults)},"jobs":[{_jobs(count)}]}}')
        return [job["id"] for job in json.loads(answer)["jobs"]]

    def create_one(self, profile: str) -> bytes:
        """Creates one job."""
        facts = f'"owner_service":"bench","task_type":"call_analysis","model_profile":"{profile}","owner_ref":"ref/1"'
        return self.post("/api/v1/jobs", f'{{{facts},"input":{INPUT}}}')

    def claim(self, profile: str, limit: int, wait_seconds: float = 0) -> tuple[str, list[str]]:
        """Claims up to so many; the claim_id and the ids. Taken from the text, not parsed: a real worker spends its time otherwise."""
        claim_id = str(uuid.uuid4())
        facts = {"worker_id": f"bench-{os.getpid()}", "model_profiles": [profile], "limit": limit, "claim_id": claim_id}
        answer = self.post("/api/v1/jobs/claim", json.dumps(facts | ({"wait_seconds": wait_seconds} if wait_seconds else {})))
        return claim_id, [part[:36].decode() for part in answer.split(b'{"id":"')[1:]]

    def complete(self, claim_id: str, ids: Sequence[str]) -> None:
        """Completes them in one call, each with a result of 2 KB."""
        items = ",".join(f'{{"id":"{job_id}","claim_id":"{claim_id}","result":{RESULT}}}' for job_id in ids)
        self.post("/api/v1/jobs/complete", f'{{"jobs":[{items}]}}')

    def complete_one(self, claim_id: str, job_id: str) -> None:
        """Completes one by its own call."""
        self.post(f"/api/v1/jobs/{job_id}/complete", f'{{"claim_id":"{claim_id}","result":{RESULT}}}')


@functools.cache
def _jobs(count: int) -> str:
    return ",".join(f'{{"owner_ref":"ref/{number}","input":{INPUT}}}' for number in range(count))


@attrs.frozen
class Load:
    """What some clients did together."""

    done: int
    seconds: float
    processor_seconds: float

    @property
    def rate(self) -> float:
        """Per second."""
        return self.done / self.seconds

    @property
    def share(self) -> float:
        """How much of the machine's cores the clients took themselves, 0 to 1."""
        return self.processor_seconds / self.seconds / (os.cpu_count() or 1)


Work = Callable[[Client, float], int]


def run(port: int, clients: int, seconds: float, work: Work) -> Load:
    """Lets so many processes do `work` for so long, all beginning at once."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(clients), context.Queue()
    processes = [context.Process(target=_client, args=(port, seconds, work, barrier, results)) for _ in range(clients)]
    for process in processes:
        process.start()
    told = list(_answers(results, processes))
    for process in processes:
        process.join()
    done, begun, ended, used = zip(*told, strict=True)
    return Load(sum(done), max(ended) - min(begun), sum(used))


def _answers(results: Any, processes: Sequence[Any]) -> Iterator[tuple[int, float, float, float]]:
    for _ in processes:
        answer = results.get(timeout=600)
        if isinstance(answer, str):
            raise SystemExit(f"a client failed: {answer}")
        yield answer


def _client(port: int, seconds: float, work: Work, barrier: Barrier, results: Any) -> None:
    try:
        client = Client(port)
        client.get("/healthz")
        barrier.wait(60)
        begun, used = time.monotonic(), time.process_time()
        done = work(client, begun + seconds)
        results.put((done, begun, time.monotonic(), time.process_time() - used))
    except Exception as error:  # noqa: BLE001 -- told to the parent, which stops
        results.put(f"{type(error).__name__}: {error}")


# What a client does until its time is over; how many jobs, or calls, it got through.


def lives(client: Client, until: float) -> int:
    """Whole lives in batches of 100: create, claim, complete, by profile of its own."""
    profile, done = f"life-{os.getpid()}", 0
    while time.monotonic() < until:
        client.create(profile, 100)
        claim_id, ids = client.claim(profile, 100)
        client.complete(claim_id, ids)
        done += len(ids)
    return done


def single_lives(client: Client, until: float) -> int:
    """Lives one by one: three calls each."""
    profile, done = "single", 0
    while time.monotonic() < until:
        client.create_one(profile)
        claim_id, ids = client.claim(profile, 1)
        for job_id in ids:
            client.complete_one(claim_id, job_id)
        done += len(ids)
    return done


def creates(client: Client, until: float) -> int:
    """Creates one by one."""
    return _again(lambda: client.create_one("create"), until)


def health(client: Client, until: float) -> int:
    """Asks for the health of the process."""
    return _again(lambda: client.get("/healthz"), until)


def _again(call: Callable[[], object], until: float) -> int:
    done = 0
    while time.monotonic() < until:
        call()
        done += 1
    return done


def drain(client: Client, until: float) -> int:
    """A worker that does one job at a time until there is none left: claim one, complete it."""
    done = 0
    while time.monotonic() < until:
        claim_id, ids = client.claim("drain", 1)
        if not ids:
            break
        client.complete_one(claim_id, ids[0])
        done += 1
    return done
