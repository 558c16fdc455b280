"""What large payloads cost: the memory of a process for one of 16 MB, and for many at once."""

import base64
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import attrs
import clients
from ground import Bench, Server
from waiting import drop

T = TypeVar("T")
MB = 1 << 20
CLIENTS = (8, 32, 64)
HUNG_SECONDS = 120.0
CALM_SECONDS = 2.0


def payloads(bench: Bench) -> None:
    """One job with a large input and a large result, then many clients at once that send one or read one."""
    size = max(1, min(16, round(160 * bench.scale))) * MB
    # With one emoji in it Python keeps each character of a text in four bytes.
    kinds = {"ASCII": text(size), "an emoji": text(size).replace("\\n", "😀", 1)}
    for kind, payload in kinds.items():
        single(bench, kind, payload)
    counts = sorted({max(2, int(count * bench.scale)) for count in CLIENTS})
    for way, crowd in (("sent", senders), ("read", readers)):
        for kind, payload in kinds.items():
            for count in counts if kind == "ASCII" else counts[-1:]:
                peak = crowd(bench, count, f"{count} × {size // MB} MB {way} at once, {kind}", payload)
            bench.table.judge(f"peak of {count} × {size // MB} MB {way} at once, {kind}", peak, 1500, unit="MB", most=True)


# ── One ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def single(bench: Bench, kind: str, payload: str) -> None:
    """Each step in the life of a job: the process's peak above its idle memory, in multiples of the payload.

    Of a small one, as small scales have it, most is what the process needs for its first requests.
    """
    with bench.serving("payloads") as server:
        time.sleep(CALM_SECONDS)
        idle, peaks = server.memory_mb(), life(server, payload)
        time.sleep(CALM_SECONDS)
        left = server.memory_mb() - idle
    drop(bench, "payloads")
    size = len(payload) / MB
    for step, peak in peaks.items():
        bench.table.add(f"{step} of {size:.0f} MB, {kind}: peak above idle", (peak - idle) / size, "x", idle=f"{idle:.0f} MB")
    bench.table.add(f"{kind}: still there afterwards", left, "MB")
    bench.table.judge(f"peak of one payload, {kind}, the dearest step", (max(peaks.values()) - idle) / size, 12, most=True)


def life(server: Server, payload: str) -> dict[str, float]:
    """The peak of each step, in MB. What went in must come back."""
    client, jobs = clients.Client(server.port), "/api/v1/jobs"
    _, creating = peak_of(server, lambda: client.post(jobs, job(payload)))
    claimed, claiming = peak_of(server, lambda: client.post(f"{jobs}/claim", '{"worker_id":"bench"}'))
    job_id, completion = held(claimed, payload)
    _, completing = peak_of(server, lambda: client.post(f"{jobs}/{job_id}/complete", completion))
    read, reading = peak_of(server, lambda: client.get(f"{jobs}/{job_id}"))
    for answer in (claimed, read):
        assert payload.encode() in answer, "a payload did not come back as it was sent"
    return {"create": creating, "claim": claiming, "complete": completing, "read": reading}


def peak_of(server: Server, act: Callable[[], T]) -> tuple[T, float]:
    """What came of it, and the most that the process had in memory meanwhile, in MB."""
    folder = Path(f"/proc/{server.process.pid}")
    # Has Linux forget the highest mark (proc(5)).
    (folder / "clear_refs").write_text("5")
    done = act()
    [mark] = re.findall(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
    return done, int(mark) / 1024


def text(size: int) -> str:
    """A JSON text of about so many bytes: lines of noise, which compress badly and have something to escape."""
    return '{"content": "' + base64.encodebytes(os.urandom(size * 8 // 11)).decode().replace("\n", "\\n") + '"}'


def job(payload: str) -> str:
    """A job with this input."""
    return f'{{"owner_service":"bench","task_type":"call_analysis","model_profile":"large","owner_ref":"ref/1","input":{payload}}}'


def held(claimed: bytes, result: str) -> tuple[str, str]:
    """The id of the job in the answer to a claim, and the body that completes it."""
    # Not in the payloads: they have no quotes inside.
    found = {name: claimed.split(f'"{name}":"'.encode())[1][:36].decode() for name in ("id", "claim_id")}
    return found["id"], f'{{"claim_id":"{found["claim_id"]}","result":{result}}}'


# ── Many ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Answer:
    """How a call ended: its HTTP status, or what happened instead; whether it says when to come again; after so many seconds."""

    status: str
    retry_after: bool
    seconds: float

    @property
    def is_proper(self) -> bool:
        """Whether a client knows what to do with it."""
        return self.status[0] == "2" or self.status == "413" or (self.status == "503" and self.retry_after)


def senders(bench: Bench, count: int, name: str, payload: str) -> float:
    """So many clients create a job at once; the peak in MB."""
    body = job(payload).encode()
    with bench.serving("payloads") as server:
        time.sleep(CALM_SECONDS)
        peak = at_once(bench, server, name, count, "POST /api/v1/jobs", body)
    drop(bench, "payloads")
    return peak


def readers(bench: Bench, count: int, name: str, payload: str) -> float:
    """So many clients read the same result at once; the peak in MB."""
    with bench.serving("payloads") as server:
        client = clients.Client(server.port)
        client.post("/api/v1/jobs", job("1"))
        job_id, completion = held(client.post("/api/v1/jobs/claim", '{"worker_id":"bench"}'), payload)
        client.post(f"/api/v1/jobs/{job_id}/complete", completion)
        time.sleep(CALM_SECONDS)
        peak = at_once(bench, server, name, count, f"GET /api/v1/jobs/{job_id}", b"")
    drop(bench, "payloads")
    return peak


def at_once(bench: Bench, server: Server, name: str, count: int, line: str, body: bytes) -> float:
    """The same call from so many connections; the peak in MB. All must be answered properly."""
    with ThreadPoolExecutor(count) as pool:
        answers, peak = peak_of(server, lambda: list(pool.map(lambda _: ask(server.port, line, body), range(count))))
    kinds = " ".join(f"{times}×{status}" for status, times in sorted(Counter(answer.status for answer in answers).items()))
    bench.table.add(name, peak, "MB", answers=kinds, longest=f"{max(answer.seconds for answer in answers):.1f} s")
    bench.table.judge(f"{name}: improper answers", sum(not answer.is_proper for answer in answers), 0, unit="", most=True)
    return peak


def ask(port: int, line: str, body: bytes) -> Answer:
    """One call on a connection of its own, without keeping what comes."""
    begun = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=HUNG_SECONDS) as connection:
            head = _exchanged(connection, f"{line} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n".encode(), body)
        status, retry_after = head[9:12].decode(), b"retry-after:" in head.lower()
    except (OSError, EOFError) as error:
        status, retry_after = type(error).__name__, False
    return Answer(status, retry_after, time.monotonic() - begun)


def _exchanged(connection: socket.socket, head: bytes, body: bytes) -> bytes:
    """The head of the answer, after all of its body was received. Raises EOFError where it ends early."""
    try:
        connection.sendall(head)
        connection.sendall(body)
    except (BrokenPipeError, ConnectionResetError):
        # Who is refused early is answered early: as urllib3 does, the answer is read all the same.
        pass
    buffer, answer = bytearray(1 << 18), b""
    while b"\r\n\r\n" not in answer:
        answer += _received(connection, buffer)
    answered, _, begun = answer.partition(b"\r\n\r\n")
    missing = int(re.findall(rb"(?i)content-length: (\d+)", answered)[0]) - len(begun)
    while missing > 0:
        missing -= len(_received(connection, buffer))
    return answered


def _received(connection: socket.socket, buffer: bytearray) -> memoryview:
    count = connection.recv_into(buffer)
    if not count:
        raise EOFError
    return memoryview(buffer)[:count]


CASES: dict[str, Callable[[Bench], None]] = {"payloads": payloads}
