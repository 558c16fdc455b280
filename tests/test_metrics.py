"""The metrics for Prometheus, and the alert rules that come with them.

The tests share a service: each looks at its own profile, or at what its calls added to a total.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from postgres import connect, fresh_schema
from prometheus_client.parser import text_string_to_metric_families
from service import Corner, Service, running_service, wait_until

from ai_internal.server.metrics import BORDERS, OTHER, Metrics, Move, border
from providers.conformance import closed_port

ROOT = Path(__file__).parent.parent
RULES = ROOT / "examples" / "prometheus" / "alerts.yml"


@pytest.fixture(scope="module")
def metered(postgres_url: str) -> Iterator[Service]:
    """A service whose metrics no other file changes."""
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema) as service:
        yield service


def figures(service: Service) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a scrape, by name and labels."""
    answer = service.api.get("/metrics")
    assert answer.status == 200, answer
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(answer.body)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def figure(service: Service, name: str, **labels: str) -> float | None:
    return figures(service).get((f"ai_service_{name}", frozenset(labels.items())))


def total(service: Service, name: str, **labels: str) -> float:
    """The same; 0 where nothing was counted yet."""
    return figure(service, name, **labels) or 0


def promtool(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("promtool")
    if program is None:
        assert not os.environ.get("CI"), "promtool is missing: the Debian package prometheus has it"
        pytest.skip("promtool is missing: the Debian package prometheus has it")
    return subprocess.run([program, *arguments], input=given, capture_output=True, timeout=60, check=False)


def worked(corner: Corner) -> None:
    """Two completed, one failed, one waiting for a retry, one given back and ready, one running."""
    corner.batch([{} for _ in range(6)])
    jobs = corner.claim(limit=6)
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "audio_seconds": 2.5}
    corner.done(jobs[0], "complete", usage=usage)
    corner.done(jobs[1], "complete")
    corner.done(jobs[2], "fail", category="timeout")
    corner.done(jobs[3], "fail", category="rate_limited", retryable=True, retry_in_seconds=1000)
    corner.done(jobs[4], "release")


def test_jobs_are_counted_by_profile_outcome_and_category(metered: Service) -> None:
    corner = Corner(metered.api)
    worked(corner)
    profile = corner.model_profile
    wait_until(
        lambda: figure(metered, "jobs_released_total", model_profile=profile) == 1,
        10,
        "the folding of the ledger",
    )
    found = figures(metered)

    def of(name: str, **labels: str) -> float | None:
        return found.get((f"ai_service_{name}", frozenset({"model_profile": profile, **labels}.items())))

    assert (of("jobs_created_total"), of("jobs_claimed_total")) == (6, 6)
    assert of("jobs_finished_total", outcome="completed", category="") == 2
    assert of("jobs_finished_total", outcome="failed", category="timeout") == 1
    assert of("attempts_failed_total", category="rate_limited") == 1
    assert [of("jobs", state=state) for state in ("pending", "scheduled", "running")] == [1, 1, 1]
    assert of("tokens_total", owner_service=corner.owner_service, kind="prompt") == 100
    assert of("tokens_total", owner_service=corner.owner_service, kind="total") is None, "absent is not zero"
    assert of("audio_seconds_total", owner_service=corner.owner_service) == 2.5
    assert of("job_waiting_seconds_count") == 6
    assert of("job_running_seconds_bucket", outcome="completed", le="+Inf") == 2
    assert (of("oldest_pending_seconds") or 0) > 0
    assert of("paused") == 0


def test_every_move_is_counted_by_one_process(metered: Service, postgres_url: str) -> None:
    with running_service(postgres_url, metered.schema) as second:
        services = [metered, second]
        corners = [Corner(service.api) for service in services]
        for corner in corners:
            corner.batch([{} for _ in range(20)])
            for job in corner.claim(limit=20):
                corner.done(job, "complete")

        def completed(corner: Corner) -> float:
            labels = {"model_profile": corner.model_profile, "outcome": "completed", "category": ""}
            return sum(total(service, "jobs_finished_total", **labels) for service in services)

        wait_until(
            lambda: [completed(corner) for corner in corners] == [20, 20],
            15,
            "one count of each completion",
        )


def test_a_lapsed_lease_and_a_lost_claim_are_counted(metered: Service, postgres_url: str) -> None:
    corner = Corner(metered.api)
    lapsed, lost = total(metered, "leases_lapsed_total"), total(metered, "problems_total", code="claim_lost")
    job = corner.take()
    with closing(connect(postgres_url, metered.schema)) as tables:
        tables.run(
            "update held set lease_expires_at = now() - interval '1 minute' where job_id = cast(:id as uuid)",
            id=job["id"],
        )
    wait_until(lambda: total(metered, "leases_lapsed_total") == lapsed + 1, 15, "the count of the lease")
    corner.claim()
    assert corner.call(job, "heartbeat").code == "claim_lost"
    [refused] = corner.api.post("/api/v1/jobs/heartbeat", {"jobs": [{"id": job["id"], "claim_id": job["claim_id"]}]}).json["jobs"]
    assert refused["code"] == "claim_lost"
    assert total(metered, "problems_total", code="claim_lost") == lost + 2


def routes_of(service: Service) -> set[str]:
    """The routes by which requests are counted."""
    return {dict(labels)["route"] for name, labels in figures(service) if name == "ai_service_http_requests_total"}


def test_requests_are_counted_by_route_and_not_by_path(metered: Service) -> None:
    counters = [
        ("http_requests_total", {"method": "GET", "route": "/api/v1/jobs/{job_id}", "status": "404"}),
        ("http_requests_total", {"method": "GET", "route": "", "status": "404"}),
        ("problems_total", {"code": "job_not_found"}),
    ]
    routes, before = routes_of(metered), [total(metered, name, **labels) for name, labels in counters]
    for number in range(3):
        metered.api.get(f"/api/v1/jobs/{number}")
        metered.api.get(f"/nowhere/{number}")
    metered.api.request("BREW", "/api/v1/jobs")
    assert routes_of(metered) - routes <= {"/api/v1/jobs/{job_id}", "", "/api/v1/jobs", "/metrics"}
    assert [total(metered, name, **labels) for name, labels in counters] == [count + 3 for count in before]


def seen(metered: Service, worker_id: str, report: dict[str, Any] | None = None) -> None:
    """Has upkeep write down a worker, and with it those that were seen before."""
    metered.api.post("/api/v1/jobs/claim", {"worker_id": worker_id, "worker": report})
    wait_until(lambda: worker_id in [each["worker_id"] for each in metered.api.get("/api/v1/workers").json["workers"]])


def test_workers_and_what_they_report_of_their_providers(metered: Service) -> None:
    seen(metered, "before")
    before = [total(metered, name) for name in ("workers", "workers_capacity")]
    report = {
        "capacity": 4,
        "running": 1,
        "providers": [{"name": "vllm", "status": "ok", "circuit": "open"}],
    }
    seen(metered, "with a report", report)
    after = [total(metered, name) for name in ("workers", "workers_capacity")]
    assert after == [before[0] + 1, before[1] + 4]
    assert figure(metered, "worker_providers", provider="vllm", status="ok", circuit="open") == 1


def test_without_the_database_the_metrics_of_the_process_remain() -> None:
    with closed_port() as nobody, running_service(nobody.replace("http://", "postgresql://nobody@") + "/none", "tests_none") as service:
        found = figures(service)
    assert found["ai_service_database_up", frozenset()] == 0
    assert not [name for name, _ in found if name == "ai_service_jobs"]
    assert found["process_resident_memory_bytes", frozenset()] > 0


def test_label_values_are_bounded() -> None:
    metrics = Metrics("0")
    metrics.count_moves([Move("created", "owner", f"profile-{number}", None, None, 1) for number in range(500)])
    found = samples(metrics.text(None, waiting=0, in_use=0, connections=0))
    created = {dict(labels)["model_profile"]: value for (name, labels), value in found.items() if name == "ai_service_jobs_created_total"}
    assert len(created) == 201
    assert created[OTHER] == 300


def test_a_duration_is_counted_below_the_border_that_it_is_below() -> None:
    metrics = Metrics("0")
    # Bucket 0 of the ledger reaches from 1.0 to 1.2 ms, bucket 6 from 2.99 to 3.58 ms.
    metrics.count_moves([Move("claimed", "owner", "profile", None, 0, 3), Move("claimed", "owner", "profile", None, 6, 2)])
    found = samples(metrics.text(None, waiting=0, in_use=0, connections=0))
    name = "ai_service_job_waiting_seconds_bucket"
    up_to = [found[name, frozenset({"model_profile": "profile", "le": str(border(number))}.items())] for number in range(3)]
    assert up_to == [0, 3, 5]
    assert border(BORDERS - 1) > 4 * 3600


def test_promtool_finds_nothing_wrong_with_the_metrics(metered: Service) -> None:
    corner = Corner(metered.api)
    worked(corner)
    wait_until(
        lambda: figure(metered, "jobs_released_total", model_profile=corner.model_profile) == 1,
        10,
        "the folding of the ledger",
    )
    checked = promtool("check", "metrics", given=metered.api.get("/metrics").body)
    # process_cpu_seconds_total and the like are prometheus-client's own.
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_the_alert_rules_hold_and_name_existing_metrics(metered: Service) -> None:
    checked = promtool("check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    named = set(re.findall(r"\bai_service_\w+", RULES.read_text()))
    text = metered.api.get("/metrics").body.decode()
    declared = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    assert named
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in named} <= declared


def test_a_report_that_python_cannot_read_spoils_no_scrape(metered: Service) -> None:
    seen(metered, "before these")
    before = [total(metered, name) for name in ("workers", "workers_capacity")]
    for number, report in enumerate((b'{"capacity": 4, "more": 1e999}', b'{"capacity": 3}')):
        body = b'{"worker_id": "unreadable-%d", "worker": %b}' % (number, report)
        answer = metered.api.post("/api/v1/jobs/claim", body=body)
        assert answer.status == 200, answer
    seen(metered, "after these")
    after = [total(metered, name) for name in ("workers", "workers_capacity")]
    assert after == [before[0] + 3, before[1] + 3]


def test_requests_that_the_server_itself_rejects_are_counted(metered: Service) -> None:
    before = total(metered, "problems_total", code="malformed_request")
    metered.api.raw(b"rubbish\r\n\r\n")
    assert total(metered, "problems_total", code="malformed_request") == before + 1
