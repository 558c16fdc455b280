"""Eight claiming processes against two service processes, left alone and killed with SIGKILL again and again.

`make chaos` runs it with CHAOS_JOBS=20000; the default is a short form. Every job must be handed out exactly once: a claim whose answer was
lost is repeated with its claim_id and gets the same jobs, so that even a killed service costs no attempt.
"""

import multiprocessing
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from postgres import connect, fresh_schema
from service import Service

from ai_client import AIService, Completion, NewJob

JOBS = int(os.environ.get("CHAOS_JOBS", "3000"))
CLAIMERS = 8


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def drain(url: str, number: int, total: int, shared: Path, limit: int) -> None:
    """Claims and completes until all jobs are done; writes down each job it was handed, and what the service said of its completion."""
    client = AIService(url, retry_seconds=120)
    with (shared / f"claimer-{number}").open("w") as written:
        while True:
            claim = client.claim(f"claimer-{number}", limit=limit, wait_seconds=0.2)
            results = [Completion(job.id, claim.claim_id, {"by": number}) for job in claim.jobs]
            for answer in client.complete_many(results) if results else ():
                written.write(f"{answer.id} {answer.status}\n")
            if not results and client.stats()["jobs"]["completed"] >= total:
                return


@contextmanager
def two_services(postgres_url: str, schema: str) -> Iterator[list[Service]]:
    services = [Service(postgres_url, schema, HTTP_PORT=str(port)) for port in free_ports(2)]
    try:
        for service in services:
            service.start()
        yield services
    finally:
        for service in services:
            service.stop()


def submit(url: str, total: int) -> list[str]:
    with AIService(url) as client:
        new = [
            NewJob(owner_service=f"owner{n % 7}", owner_ref=f"ref/{n}", task_type="t", model_profile=f"m{n % 3}", input=n)
            for n in range(total)
        ]
        return [job.id for start in range(0, total, 1000) for job in client.create_jobs(new[start : start + 1000]).jobs]


def claimers(services: list[Service], total: int, shared: Path, limit: int = 20) -> list[multiprocessing.process.BaseProcess]:
    spawn = multiprocessing.get_context("spawn")
    urls = [f"http://127.0.0.1:{service.api.port}" for service in services]
    processes = [spawn.Process(target=drain, args=(urls[n % 2], n, total, shared, limit)) for n in range(CLAIMERS)]
    for process in processes:
        process.start()
    return processes


def assert_each_was_done_once(ids: list[str], shared: Path, postgres_url: str, schema: str) -> None:
    lines = [line.split() for path in shared.iterdir() for line in path.read_text().splitlines()]
    handed_out = Counter(job_id for job_id, _ in lines)
    assert set(handed_out) == set(ids), "every job was handed out"
    assert set(handed_out.values()) == {1}, "and none twice"
    assert {status for _, status in lines} == {"200"}
    connection = connect(postgres_url, schema)
    assert connection.run("select status, attempt, count(*) from ended group by 1, 2") == [["completed", 1, len(ids)]]
    assert connection.run("select (select count(*) from ready) + (select count(*) from waiting) + (select count(*) from held)") == [[0]]
    assert connection.run("select count(*) from attempt_ended") == [[0]]
    connection.close()


@pytest.mark.long
def test_eight_processes_claim_every_job_once_through_two_services(postgres_url: str, tmp_path: Path) -> None:
    with fresh_schema(postgres_url) as schema, two_services(postgres_url, schema) as services:
        ids = submit(f"http://127.0.0.1:{services[0].api.port}", JOBS)
        processes = claimers(services, JOBS, tmp_path)
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * CLAIMERS
        assert_each_was_done_once(ids, tmp_path, postgres_url, schema)


@pytest.mark.long
def test_service_processes_killed_again_and_again_lose_and_repeat_nothing(postgres_url: str, tmp_path: Path) -> None:
    with fresh_schema(postgres_url) as schema, two_services(postgres_url, schema) as services:
        ids = submit(f"http://127.0.0.1:{services[0].api.port}", JOBS)
        processes = claimers(services, JOBS, tmp_path, limit=4)
        kills = 0
        chance = random.Random(7)  # the moments differ anyway: the machine decides
        while any(process.is_alive() for process in processes):
            threading.Event().wait(chance.uniform(0.05, 0.5))
            victim = services[kills % 2]
            victim.kill()
            services[kills % 2] = Service(postgres_url, schema, HTTP_PORT=str(victim.api.port)).start()
            kills += 1
            assert kills < 2000
        assert [process.exitcode for process in processes] == [0] * CLAIMERS
        assert kills >= 2
        print(f"{JOBS} jobs, {kills} kills")
        assert_each_was_done_once(ids, tmp_path, postgres_url, schema)
