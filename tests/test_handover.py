"""The handover: what each mode does, that mirroring delays no call, that a remote call always ends.

Mirroring and remote calls run against a real service, and against one that hangs, is unreachable or
rejects them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from time import monotonic, perf_counter
from typing import Any

import pytest
from fake_service import Behaviour, FakeService, forwards, hangs, loses, problem
from service import INHERITED, MAIN, Corner, Service, wait_until

from ai_client import (
    AIService,
    ClaimedJob,
    Job,
    JobFilter,
    NewJob,
    NotJSON,
    ServiceError,
    ServiceUnavailable,
    ValidationFailed,
)
from ai_handover import Comparison, Handover, JobFailed, ModesError, read_modes


@pytest.fixture
def fake() -> Iterator[FakeService]:
    with FakeService() as server:
        yield server


@pytest.fixture
def proxy(service: Service) -> Iterator[FakeService]:
    """Forwards everything to the real service, except what the test changes."""
    with FakeService(forward_to=service.api.port) as server:
        yield server


@pytest.fixture
def client(service: Service) -> Iterator[AIService]:
    with AIService(url_of(service)) as client:
        yield client


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    wait_until(lambda: not handover_threads(), what="the end of all threads")


def handover_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ai-service-")]


def url_of(service: Service) -> str:
    return f"http://127.0.0.1:{service.api.port}"


def job_in(corner: Corner, **fields: Any) -> NewJob:
    place = {"owner_service": corner.owner_service, "task_type": corner.task_type, "model_profile": corner.model_profile}
    return NewJob(**{**place, "owner_ref": "call/1", "input": {"text": "hello"}, **fields})


def some_job(**fields: Any) -> NewJob:
    return NewJob(**{"owner_service": "telephony", "owner_ref": "call/1", "task_type": "t", "model_profile": "p", "input": {}, **fields})


def jobs_of(client: AIService, corner: Corner) -> list[Job]:
    """The jobs of the corner, oldest first."""
    return list(client.iter_jobs(JobFilter(owner_service=[corner.owner_service])))[::-1]


@contextmanager
def worker(url: str, profile: str, answer: Callable[[ClaimedJob], Any]) -> Iterator[None]:
    """A worker of this profile: it completes a job with what `answer` returns, and fails it for a ValueError."""

    def run(job: ClaimedJob) -> None:
        try:
            client.complete(job.id, job.claim_id, answer(job))
        except ValueError:
            client.fail(job.id, job.claim_id, "invalid_input", "no")

    def work() -> None:
        with suppress(ServiceUnavailable):  # this is how the end of the test reaches it
            while True:
                for job in client.claim("worker", limit=10, model_profiles=[profile], wait_seconds=30).jobs:
                    run(job)

    with AIService(url, retry_seconds=0) as client:
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            client.close()
            thread.join(10)


def echo(job: ClaimedJob) -> Any:
    return {"echo": job.input}


def never_here() -> Any:
    raise AssertionError("ran locally")


def raises(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any) -> Any:
        raise error

    return run


# ---------------------------------------------------------------- modes


def test_read_modes_reads_the_environment() -> None:
    assert read_modes({}) == {}
    assert read_modes({"AI_SERVICE_MODES": " "}) == {}
    named = read_modes({"AI_SERVICE_MODES": "call_analysis=mirror, transcribe = remote,*=off,"})
    assert named == {"call_analysis": "mirror", "transcribe": "remote", "*": "off"}
    assert read_modes({"MODES": "a=remote"}, "MODES") == {"a": "remote"}


def test_modes_error_lists_all_problems() -> None:
    wrong = "call_analysis=mirrored, transcribe, =remote, two words=off, a=Remote, b=off, b=mirror"
    with pytest.raises(ModesError) as caught:
        read_modes({"AI_SERVICE_MODES": wrong})
    assert len(caught.value.problems) == 6
    assert all(problem.startswith("AI_SERVICE_MODES: ") for problem in caught.value.problems)
    names = ("call_analysis", "mirrored", "transcribe", "", "two words", "Remote", "b")
    assert all(repr(name) in str(caught.value) for name in names)


def test_modes_change_at_run_time(fake: FakeService) -> None:
    with AIService(fake.url) as service, Handover(service, {"a": "remote", "*": "mirror"}) as work:
        work.set_mode("a", "off")
        assert work.modes == {"a": "off", "*": "mirror"}
        work.set_modes(read_modes({"AI_SERVICE_MODES": "b=off"}))
        assert work.modes == {"b": "off"}
        for wrong in ("on", "", "Mirror"):
            with pytest.raises(ModesError, match="'a'"):
                work.set_mode("a", wrong)
        with pytest.raises(ModesError):
            work.set_modes({"a": "remote", "b": "on"})
        assert work.modes == {"b": "off"}
        assert work.run(some_job(task_type="a"), lambda: "local") == "local"
    assert fake.seen == []
    with AIService(fake.url) as service, pytest.raises(ModesError):
        Handover(service, {"a": "on"})


def test_other_task_types_have_the_mode_of_the_star(fake: FakeService) -> None:
    fake.always("/batch", problem(503, "draining"))
    with AIService(fake.url) as service, Handover(service, {"a": "off", "*": "mirror"}) as work:
        for task_type in ("a", "b", "c"):
            work.run(some_job(task_type=task_type), lambda: None)
        assert (work.stats().off, work.stats().mirrored) == (1, 2)
        assert (work.stats("a").off, work.stats("a").mirrored) == (1, 0)
        assert work.stats("b").waiting == 1
        work.close(0)


def test_off_sends_nothing_and_starts_nothing(fake: FakeService) -> None:
    before = threading.active_count()
    with AIService(fake.url) as service, Handover(service) as work:
        assert work.run(some_job(), lambda: {"text": "local"}) == {"text": "local"}
        with pytest.raises(KeyError):
            work.run(some_job(), raises(KeyError("x")))
        assert threading.active_count() == before
        assert work.stats().off == 2
    assert fake.seen == []


# ---------------------------------------------------------------- mirror


class Hook:
    """A comparison hook that keeps what it got."""

    def __init__(self) -> None:
        self.seen: list[Comparison] = []
        self.threads: set[str] = set()

    def __call__(self, both: Comparison) -> None:
        self.threads.add(threading.current_thread().name)
        self.seen.append(both)

    def wait(self, count: int = 1) -> list[Comparison]:
        """The comparisons, once there are `count`."""
        wait_until(lambda: len(self.seen) >= count, what=f"comparison {count}")
        return self.seen


def test_a_mirrored_call_returns_the_local_value_and_the_hook_gets_both_results(
    client: AIService, service: Service, corner: Corner
) -> None:
    hook, value = Hook(), {"text": "local"}
    with Handover(client, {corner.task_type: "mirror"}, compare=hook) as work, worker(url_of(service), corner.model_profile, echo):
        assert work.run(job_in(corner, owner_ref="call/7"), lambda: value) is value
        [both] = hook.wait()
    assert (both.local, both.local_error, both.remote, both.remote_error) == (value, None, {"echo": {"text": "hello"}}, None)
    assert (both.job.owner_ref, both.job.status, both.job.result) == ("call/7", "completed", both.remote)
    assert 0 <= both.local_seconds < 10
    assert hook.threads == {"ai-service-mirror"}
    assert (work.stats().mirrored, work.stats().sent, work.stats().compared) == (1, 1, 1)


def test_the_local_function_runs_in_the_callers_thread_and_only_once(
    client: AIService,
    corner: Corner,
) -> None:
    ran = []
    with Handover(client, {corner.task_type: "mirror"}) as work:
        work.run(job_in(corner), lambda: ran.append(threading.current_thread()))
    assert ran == [threading.current_thread()]


@pytest.mark.parametrize("error", [ValueError("no speech"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_the_caller_gets_the_local_exception_itself(
    client: AIService,
    service: Service,
    corner: Corner,
    error: BaseException,
) -> None:
    hook = Hook()
    with Handover(client, {corner.task_type: "mirror"}, compare=hook) as work, worker(url_of(service), corner.model_profile, echo):
        with pytest.raises(type(error)) as caught:
            work.run(job_in(corner), raises(error))
        [both] = hook.wait()
    assert caught.value is error
    assert (error.__context__, error.__cause__) == (None, None)
    assert caught.traceback[-1].name == "run"
    assert both.local_error == f"{type(error).__name__}: {error}"
    assert (both.local, both.remote) == (None, {"echo": {"text": "hello"}})


def test_a_mirrored_job_has_low_priority_one_attempt_and_an_expiry(
    client: AIService,
    corner: Corner,
) -> None:
    with Handover(client, {"*": "mirror"}, mirror_seconds=300) as work:
        work.run(job_in(corner, priority=5, max_attempts=7, idempotency_key="call/1"), lambda: None)
    [job] = jobs_of(client, corner)
    assert (job.priority, job.max_attempts, job.idempotency_key) == (-10, 1, "mirror/call/1")
    assert job.expires_at is not None
    assert 300 < (job.expires_at - datetime.now(UTC)).total_seconds() <= 360


def test_the_mirrored_input_is_that_before_the_local_run(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    hook, given = Hook(), {"calls": [1], "text": "as it was"}

    def changes_its_input() -> dict[str, Any]:
        given["calls"].append(2)  # type: ignore[attr-defined]
        given["lock"] = threading.Lock()  # type: ignore[assignment]
        return {"topic": "invoice"}

    with Handover(client, {"*": "mirror"}, compare=hook) as work, worker(url_of(service), corner.model_profile, echo):
        result = work.run(job_in(corner, input=given), changes_its_input)
        result["topic"] = given["text"] = "changed"
        [both] = hook.wait()
    assert both.remote == {"echo": {"calls": [1], "text": "as it was"}}
    assert both.local == {"topic": "invoice"}


def test_failed_jobs_and_unreadable_results_are_compared_too(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    hook = Hook()

    def answer(job: ClaimedJob) -> Any:
        if job.owner_ref == "fails":
            raise ValueError
        return {"other": "shape"}

    with Handover(client, {"*": "mirror"}, compare=hook) as work, worker(url_of(service), corner.model_profile, answer):
        for owner_ref in ("fails", "unreadable"):
            work.run(job_in(corner, owner_ref=owner_ref), lambda: "local", read=lambda job: str(job.result["text"]))
        one, other = sorted(hook.wait(2), key=lambda both: both.job.owner_ref)
    assert isinstance(one.remote_error, JobFailed)
    assert (one.remote_error.job.status, str(one.remote_error)) == ("failed", f"job {one.job.id} is failed: invalid_input")
    assert isinstance(other.remote_error, KeyError)
    assert (one.local, one.remote, other.local, other.remote) == ("local", None, "local", None)
    assert "shape" not in repr(other)


def timed(work: Handover, task_type: str, count: int) -> tuple[float, float]:
    """The seconds of `count` calls in total, and of the slowest one."""
    seconds = []
    for _ in range(count):
        began = perf_counter()
        assert work.run(some_job(task_type=task_type, input={"text": "x" * 10_000}), lambda: 1) == 1
        seconds.append(perf_counter() - began)
    return sum(seconds), max(seconds)


@pytest.mark.parametrize("trouble", ["hangs", "away", "refuses", "loses"])
def test_an_unusable_service_delays_no_local_call_and_drops_are_exact(trouble: str) -> None:
    behaviours = {"hangs": hangs(), "away": None, "refuses": problem(503, "draining", {"Retry-After": "60"}), "loses": loses()}
    with FakeService() as fake:
        fake.always("/batch", behaviours[trouble] or hangs())
        url = fake.url if behaviours[trouble] else "http://127.0.0.1:1"
        with AIService(url) as service, Handover(service, {"mirrored": "mirror"}, compare=print, max_mirrored=600) as work:
            off, _ = timed(work, "off", 1000)
            mirrored, slowest = timed(work, "mirrored", 1000)
            stats = work.stats()
            assert (stats.off, stats.mirrored, stats.sent, stats.waiting, dict(stats.dropped)) == (1000, 1000, 0, 600, {"full": 400})
            assert mirrored < off + 1.0, "a millisecond each, where a few microseconds are usual"
            assert slowest < 2, "no call waits for the service, on a busy machine either"
            began = monotonic()
            work.close(0.1)
            assert monotonic() - began < 2
    assert dict(work.stats().dropped) == {"full": 400, "closed": 600}
    assert work.stats().waiting == 0


def test_the_buffer_is_limited_in_bytes(fake: FakeService) -> None:
    fake.always("/batch", hangs())
    with AIService(fake.url) as service:
        work = Handover(service, {"*": "mirror"}, max_mirrored_bytes=10_000)
        for size in (4000, 4000, 4000, 1000, 20_000):
            work.run(some_job(input="x" * size), lambda: None)
        assert (work.stats().waiting, dict(work.stats().dropped)) == (3, {"full": 2})
        work.close(0)


@pytest.mark.parametrize("compare", [None, lambda both: None], ids=["sent", "compared"])
def test_the_buffer_is_free_again_after_jobs_are_sent_or_compared(
    client: AIService, service: Service, corner: Corner, compare: Any
) -> None:
    done = "compared" if compare else "sent"
    with (
        worker(url_of(service), corner.model_profile, echo),
        Handover(client, {"*": "mirror"}, compare=compare, max_mirrored=1, max_mirrored_bytes=1000) as work,
    ):
        for count in (1, 2, 3):
            work.run(job_in(corner, input="x" * 900), lambda: None)
            wait_until(lambda count=count: getattr(work.stats(), done) == count, what="free space")
        assert work.stats().dropped == {}


class Uncopied:
    """Its copy cannot be made."""

    def __reduce__(self) -> Any:
        raise RuntimeError("my-payload")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, "not_json"), ({1, 2}, "not_json"), (b"x", "not_json"), (Uncopied(), "not_copied"), ("\ud800", "not_json")],
)
def test_an_input_that_is_not_json_drops_only_its_own_job(
    client: AIService, corner: Corner, caplog: pytest.LogCaptureFixture, value: Any, reason: str
) -> None:
    with Handover(client, {"*": "mirror"}) as work:
        for given in ("first", value, "last"):
            assert work.run(job_in(corner, input={"text": given}), lambda: "local") == "local"
    assert (work.stats().sent, work.stats().dropped) == (2, {reason: 1})
    assert [client.get_job(job.id, include_input=True).input for job in jobs_of(client, corner)] == [{"text": "first"}, {"text": "last"}]
    assert f"handover_dropped reason={reason}" in caplog.text
    assert "my-payload" not in caplog.text


def test_a_local_value_that_cannot_be_copied_is_still_returned(
    client: AIService,
    corner: Corner,
) -> None:
    with Handover(client, {"*": "mirror"}, compare=print) as work:
        lock = threading.Lock()
        assert work.run(job_in(corner), lambda: lock) is lock
    assert work.stats().dropped == {"not_copied": 1}


def test_a_rejected_job_does_not_block_the_others_of_its_batch(
    proxy: FakeService,
    client: AIService,
    corner: Corner,
) -> None:
    gate = threading.Event()
    proxy.behave("/batch", after(gate, problem(503, "draining")))
    refs = ["1", "", "2", "x" * 501, "3", "\ud800", "4"]
    with AIService(proxy.url) as service, Handover(service, {"*": "mirror"}) as work:
        for owner_ref in refs:
            work.run(job_in(corner, owner_ref=owner_ref), lambda: None)
        work.run(job_in(corner, owner_ref="naive", run_at=datetime(2030, 1, 1)), lambda: None)  # noqa: DTZ001 -- the mistake itself
        gate.set()
    assert (work.stats().sent, work.stats().dropped) == (4, {"refused": 4})
    assert [job.owner_ref for job in jobs_of(client, corner)] == ["1", "2", "3", "4"]


def after(gate: threading.Event, then: Behaviour) -> Behaviour:
    """Behaves so once the gate is open."""

    def wait(handler: Any, seen: Any) -> None:
        gate.wait(30)
        then(handler, seen)

    return wait


def test_an_outage_delays_mirrored_jobs_and_duplicates_none(
    proxy: FakeService,
    client: AIService,
    corner: Corner,
) -> None:
    def does_it_and_loses_the_answer(handler: Any, seen: Any) -> None:
        handler.forward(seen)
        handler.close_connection = True

    proxy.behave("/batch", problem(503, "draining"), does_it_and_loses_the_answer)
    with AIService(proxy.url) as service, Handover(service, {"*": "mirror"}) as work:
        began = monotonic()
        for number in range(5):
            work.run(job_in(corner, owner_ref=str(number)), lambda: None)
        wait_until(lambda: work.stats().sent == 5, what="the copies")
        assert monotonic() - began >= 0.75, "the pauses are 0.5 and 1 s, with jitter at least half"
    assert work.stats().paused == {"ServiceUnavailable": 2}
    assert [job.owner_ref for job in jobs_of(client, corner)] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("error", [RuntimeError("my-payload"), SystemExit("my-payload")], ids=repr)
def test_a_hook_that_raises_is_counted_and_the_next_is_called(
    client: AIService, service: Service, corner: Corner, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    hook = Hook()

    def compare(both: Comparison) -> None:
        if both.job.owner_ref == "raises":
            raise error
        hook(both)

    with Handover(client, {"*": "mirror"}, compare=compare) as work, worker(url_of(service), corner.model_profile, echo):
        for owner_ref in ("raises", "fine"):
            work.run(job_in(corner, owner_ref=owner_ref), lambda: None)
        hook.wait()
        wait_until(lambda: work.stats().uncompared, what="the counter")
    assert (work.stats().compared, work.stats().uncompared) == (1, {"hook_failed": 1})
    assert f"error={type(error).__name__} at test_handover.py:" in caplog.text
    assert "my-payload" not in caplog.text


def test_a_hanging_hook_delays_no_call(client: AIService, service: Service, corner: Corner) -> None:
    entered, gate = threading.Event(), threading.Event()

    def hang(_: Comparison) -> None:
        entered.set()
        gate.wait(30)

    with Handover(client, {"*": "mirror"}, compare=hang, max_mirrored=5) as work, worker(url_of(service), corner.model_profile, echo):
        work.run(job_in(corner), lambda: None)
        assert entered.wait(10)
        began = monotonic()
        for _ in range(10):
            work.run(job_in(corner), lambda: None)
        assert monotonic() - began < 1
        assert work.stats().dropped == {"full": 6}
        work.close(0)
        gate.set()
    assert (work.stats().uncompared, work.stats().dropped, work.stats().compared) == ({"closed": 1}, {"full": 6, "closed": 4}, 0)


def test_a_comparison_is_given_up_after_mirror_seconds(client: AIService, corner: Corner) -> None:
    with Handover(client, {"*": "mirror"}, compare=print, mirror_seconds=0.1) as work:
        work.run(job_in(corner), lambda: None)
        wait_until(lambda: work.stats().uncompared == {"timeout": 1}, what="the timeout")
        assert (work.stats().sent, work.stats().compared) == (1, 0)


def test_a_deleted_job_is_not_waited_for(client: AIService, corner: Corner) -> None:
    with Handover(client, {"*": "mirror"}, compare=print) as work:
        work.run(job_in(corner), lambda: None)
        [job] = wait_until(lambda: jobs_of(client, corner), what="the copy")
        client.cancel(job.id)
        client.delete(job.id)
        wait_until(lambda: work.stats().compared or work.stats().uncompared, what="the end")
    # Between cancelling and erasing it may have been seen as cancelled.
    assert work.stats().uncompared == {"unknown": 1} or work.stats().compared == 1


def test_many_threads_mirror_many_calls_and_all_are_compared(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    hook = Hook()
    with Handover(client, {"*": "mirror"}, compare=hook) as work, worker(url_of(service), corner.model_profile, echo):

        def call(first: int) -> None:
            for number in range(first, first + 25):
                assert work.run(job_in(corner, input=number), lambda number=number: number) == number

        threads = [threading.Thread(target=call, args=(first,)) for first in range(0, 200, 25)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        hook.wait(200)
    assert all(both.remote == {"echo": both.local} for both in hook.seen)
    assert sorted(both.local for both in hook.seen) == list(range(200))
    assert (work.stats().sent, work.stats().compared, work.stats().dropped) == (200, 200, {})


def test_close_sends_buffered_jobs_and_ends_the_thread(client: AIService, corner: Corner) -> None:
    work = Handover(client, {"*": "mirror"})
    for number in range(120):
        work.run(job_in(corner, owner_ref=str(number)), lambda: None)
    work.close(20)
    assert handover_threads() == []
    assert work.stats().sent == len(jobs_of(client, corner)) == 120
    assert work.run(job_in(corner), lambda: "local") == "local"
    assert work.stats().dropped == {"closed": 1}
    work.close()
    assert client.healthz(), "the caller's own client is not closed with it"


def test_close_waits_for_comparisons_up_to_its_timeout(client: AIService, corner: Corner) -> None:
    work = Handover(client, {"*": "mirror"}, compare=print)
    work.run(job_in(corner), lambda: None)
    began = monotonic()
    work.close(0.5)
    assert 0.4 < monotonic() - began < 2
    assert work.stats().uncompared == {"closed": 1}


def test_drops_are_logged_once_per_interval_without_payloads(
    fake: FakeService,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "ai_service")
    fake.always("/batch", hangs())
    with AIService(fake.url) as service:
        work = Handover(service, {"*": "mirror"}, compare=print, max_mirrored=1)
        for _ in range(500):
            work.run(some_job(input={"text": "my-payload"}), lambda: "my-payload")
        work.close(0)
    lines = [record.message for record in caplog.records if record.name == "ai_service.handover"]
    assert lines.count("handover_dropped reason=full task_type=t error=-") == 1
    assert len(lines) <= 4
    assert "my-payload" not in caplog.text


# ---------------------------------------------------------------- remote


def test_a_remote_call_returns_the_result_of_the_job(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    with Handover(client, {corner.task_type: "remote"}) as work, worker(url_of(service), corner.model_profile, echo):
        assert work.run(job_in(corner, priority=3, max_attempts=2), never_here) == {"echo": {"text": "hello"}}
        assert work.run(job_in(corner), lambda: "", read=lambda job: str(job.result["echo"]["text"])) == "hello"
    assert (work.stats().remote, work.stats().fell_back, work.stats().failed) == (2, {}, {})
    first = jobs_of(client, corner)[0]
    assert (first.priority, first.max_attempts) == (3, 2)


def test_a_remote_error_runs_the_local_function(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    def unreadable(job: Job) -> str:
        raise KeyError(job.id)

    with Handover(client, {"*": "remote"}) as work, worker(url_of(service), corner.model_profile, raises(ValueError())):
        assert work.run(job_in(corner), lambda: "local") == "local"
        assert work.run(job_in(corner, input=math.nan), lambda: "local") == "local"
        assert work.run(job_in(corner, owner_ref=""), lambda: "local") == "local"
        with pytest.raises(ZeroDivisionError) as caught:
            work.run(job_in(corner), lambda: 1 // 0)
        assert caught.value.__context__ is None
    with Handover(client, {"*": "remote"}) as reading, worker(url_of(service), corner.model_profile, echo):
        assert reading.run(job_in(corner), lambda: "local", read=unreadable) == "local"
    assert work.stats().fell_back == {"JobFailed": 2, "NotJSON": 1, "ValidationFailed": 1}
    assert reading.stats().fell_back == {"KeyError": 1}


def test_without_a_fallback_the_error_is_raised(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    with (
        Handover(client, {"*": "remote"}, fallback=False) as work,
        worker(url_of(service), corner.model_profile, raises(ValueError())),
    ):
        with pytest.raises(JobFailed) as caught:
            work.run(job_in(corner), never_here)
        assert caught.value.job.error is not None
        with pytest.raises(NotJSON):
            work.run(job_in(corner, input=math.nan), never_here)
        with pytest.raises(ValidationFailed):
            work.run(job_in(corner, owner_ref=""), never_here)
        assert work.run(job_in(corner), lambda: "local", fallback=True) == "local"
    assert work.stats().failed == {"JobFailed": 1, "NotJSON": 1, "ValidationFailed": 1}


def test_a_late_job_is_cancelled_and_the_local_function_runs_at_the_deadline(
    client: AIService,
    corner: Corner,
) -> None:
    with Handover(client, {"*": "remote"}) as work:
        began = monotonic()
        assert 0.5 <= work.run(job_in(corner), monotonic, timeout_seconds=0.5) - began < 1.5
    [job] = jobs_of(client, corner)
    assert job.status == "cancelled"
    assert job.expires_at is not None
    assert (job.expires_at - datetime.now(UTC)).total_seconds() < 62
    assert work.stats().fell_back == {"TimeoutError": 1}


def test_a_late_job_without_a_fallback_stays_and_is_found_again(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    job = job_in(corner, idempotency_key="call/17")
    with Handover(client, {"*": "remote"}, fallback=False, timeout_seconds=0.3) as work:
        with pytest.raises(TimeoutError):
            work.run(job, never_here)
        with worker(url_of(service), corner.model_profile, echo):
            assert work.run(job, never_here, timeout_seconds=20) == {"echo": {"text": "hello"}}
    [only] = jobs_of(client, corner)
    assert (only.status, only.expires_at) == ("completed", None)


def says_a_little_and_hangs(handler: Any, seen: Any) -> None:
    """A body that begins and never ends."""
    handler.wfile.write(b'HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"id"')
    handler.server.closing.wait(30)
    handler.close_connection = True


def drips(handler: Any, seen: Any) -> None:
    """A header that comes byte by byte and has no end."""
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 201 Created\r\nX-Drip: ")
        while not handler.server.closing.wait(0.05):
            handler.wfile.write(b"x")
    handler.close_connection = True


@pytest.mark.parametrize("behaviour", [hangs(), says_a_little_and_hangs, drips, loses(), problem(503, "draining")])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_remote_call_ends_at_its_deadline_whatever_the_service_does(
    fake: FakeService,
    behaviour: Behaviour,
    fallback: bool,
) -> None:
    fake.always("/jobs", behaviour)
    with AIService(fake.url, retry_seconds=3600) as service, Handover(service, {"*": "remote"}, fallback=fallback) as work:
        began = monotonic()
        if fallback:
            assert work.run(some_job(), lambda: "local", timeout_seconds=0.25) == "local"
        else:
            with pytest.raises(TimeoutError):
                work.run(some_job(), never_here, timeout_seconds=0.25)
        assert 0.2 < monotonic() - began < 1.25
        work.close(0)


def test_an_unreachable_service_is_given_up_after_retry_seconds() -> None:
    with AIService("http://127.0.0.1:1", retry_seconds=0) as service, Handover(service, {"*": "remote"}, timeout_seconds=60) as work:
        began = monotonic()
        assert work.run(some_job(), lambda: "local") == "local"
        with pytest.raises(ServiceUnavailable):
            work.run(some_job(), never_here, fallback=False)
        assert monotonic() - began < 5
    assert (work.stats().fell_back, work.stats().failed) == ({"ServiceUnavailable": 1}, {"ServiceUnavailable": 1})


def test_a_job_created_after_its_deadline_is_cancelled_too(
    proxy: FakeService,
    client: AIService,
    corner: Corner,
) -> None:
    gate = threading.Event()
    proxy.behave("/jobs", after(gate, forwards()))
    with AIService(proxy.url) as service, Handover(service, {"*": "remote"}) as work:
        assert work.run(job_in(corner), lambda: "local", timeout_seconds=0.3) == "local"
        gate.set()
        [job] = wait_until(lambda: jobs_of(client, corner), what="the job")
        wait_until(lambda: client.get_job(job.id).status == "cancelled", what="the cancellation")


def test_a_mode_change_does_not_affect_a_running_remote_call(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    results: list[Any] = []
    with Handover(client, {"*": "remote"}) as work:
        call = threading.Thread(target=lambda: results.append(work.run(job_in(corner), never_here)))
        call.start()
        wait_until(lambda: jobs_of(client, corner), what="the remote call")
        work.set_mode(corner.task_type, "off")
        assert work.run(job_in(corner), lambda: "local") == "local"
        work.set_mode(corner.task_type, "mirror")
        assert work.run(job_in(corner, priority=1), lambda: "local") == "local"
        with worker(url_of(service), corner.model_profile, echo):
            call.join(20)
            work.set_mode(corner.task_type, "remote")
            assert work.run(job_in(corner), never_here) == {"echo": {"text": "hello"}}
    assert results == [{"echo": {"text": "hello"}}]
    assert (work.stats().remote, work.stats().off, work.stats().mirrored) == (2, 1, 1)


def test_close_ends_a_remote_call_which_falls_back(fake: FakeService) -> None:
    fake.always("/jobs", hangs())
    results: list[str] = []
    with AIService(fake.url, retry_seconds=60) as service:
        work = Handover(service, {"*": "remote"})
        call = threading.Thread(target=lambda: results.append(work.run(some_job(), lambda: "local")))
        call.start()
        fake.wait_for("/jobs")
        work.close(0)
        call.join(5)
    assert results == ["local"]


class Interrupted(Exception):
    """As a time limit of the caller's own raises it, from a signal handler."""


def test_an_interrupted_remote_call_cancels_its_job_and_does_not_run_locally(
    client: AIService,
    corner: Corner,
) -> None:
    def interrupt() -> None:
        wait_until(lambda: jobs_of(client, corner), what="the job")
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, raises(Interrupted()))
    thread = threading.Thread(target=interrupt)
    try:
        with Handover(client, {"*": "remote"}) as work:
            thread.start()
            with pytest.raises(Interrupted):
                work.run(job_in(corner), never_here, timeout_seconds=0.5)
    finally:
        thread.join(10)
        signal.signal(signal.SIGALRM, before)
    assert [job.status for job in jobs_of(client, corner)] == ["cancelled"]


def test_a_remote_call_does_not_find_the_mirrored_job_of_its_key(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    job = job_in(corner, idempotency_key="call/17")
    with Handover(client, {"*": "mirror"}) as work:
        work.run(job, lambda: None)
        wait_until(lambda: work.stats().sent == 1, what="the copy")
        [copy] = jobs_of(client, corner)
        client.cancel(copy.id)
        work.set_modes({"*": "remote"})
        with worker(url_of(service), corner.model_profile, echo):
            assert work.run(job, never_here) == {"echo": {"text": "hello"}}


def test_a_clone_has_the_same_settings_and_its_own_connections(fake: FakeService) -> None:
    fake.always("/cancel", problem(401, "unauthorized"))
    with AIService(fake.url, "very-secret", retry_seconds=0) as first:
        second = first.clone()
        first.close()
        with second, pytest.raises(ServiceError):
            second.cancel("x")
    assert fake.seen[0].headers["Authorization"] == "Bearer very-secret"
    fake.always("/cancel", problem(503, "draining"))
    with AIService(fake.url, retry_seconds=60).clone(retry_seconds=0) as impatient, pytest.raises(ServiceUnavailable):
        impatient.cancel("x")


# ---------------------------------------------------------------- what the worker loads


def test_importing_the_worker_does_not_load_the_handover() -> None:
    program = "import sys, ai_internal.worker.worker; print({'ai_client', 'ai_handover'} & set(sys.modules))"
    assert python(["-c", program]) == "{'ai_client'}\n"


# ---------------------------------------------------------------- processes

PREFORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads: that is what this is about
from ai_client import AIService, NewJob
from ai_handover import Handover

owner, profile = sys.argv[1:]
work = Handover(AIService(os.environ["AI_SERVICE_URL"]), {"*": "mirror"})

def call(name):
    return work.run(NewJob(owner, name, "prefork", profile, input={}), lambda: name)

call("parent")
children = []
for number in range(3):
    if (child := os.fork()) == 0:
        assert work.stats().mirrored == 0, "the counters are the process's own"
        call(f"child-{number}")
        work.close(20)
        os._exit(0 if work.stats().sent == 1 else 1)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
call("parent-again")
work.close(20)
print(statuses, work.stats().sent)
"""


def python(arguments: list[str], **environ: str) -> str:
    """What this prints, run with the modules of the project."""
    machine = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environ = {**machine, "PYTHONPATH": str(MAIN.parent), **environ}
    done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_forked_processes_have_their_own_threads_and_counters(
    client: AIService,
    service: Service,
    corner: Corner,
) -> None:
    place = [corner.owner_service, corner.model_profile]
    output = python(["-c", PREFORK, *place], AI_SERVICE_URL=url_of(service))
    assert output == "[0, 0, 0] 2\n"
    names = {job.owner_ref for job in jobs_of(client, corner)}
    assert names == {"parent", "parent-again", "child-0", "child-1", "child-2"}


def test_the_example_mirrors_compares_and_switches(service: Service, corner: Corner) -> None:
    def answer(job: ClaimedJob) -> Any:
        return {"content": "", "json": {"topic": "fault" if "tone" in job.input["prompt"] else "invoice"}}

    with worker(url_of(service), corner.model_profile, answer):
        example = str(MAIN.parent / "examples/caller/handover.py")
        output = python([example], AI_SERVICE_URL=url_of(service), LLM_MODEL=corner.model_profile)
    _, *parts = re.split("modes: |comparisons:|counters:", output)
    mirrored, compared, remote, off, counters = parts
    assert mirrored.startswith("{'call_analysis': 'mirror'}\n  beeline/1: Analysis(topic='invoice')\n  beeline/2: Analysis(topic='other')")
    assert "beeline/1: agree, local Analysis(topic='invoice'), remote Analysis(topic='invoice')" in compared
    assert "beeline/2: differ, local Analysis(topic='other'), remote Analysis(topic='fault')" in compared
    assert remote == "{'call_analysis': 'remote'}\n  beeline/1: Analysis(topic='invoice')\n  beeline/2: Analysis(topic='fault')\n"
    assert off == "{'call_analysis': 'off'}\n  beeline/1: Analysis(topic='invoice')\n  beeline/2: Analysis(topic='other')\n"
    assert counters.startswith("\n  off: 2\n  mirrored: 4\n  sent: 4\n  compared: 4\n  remote: 2\n  dropped: {}\n")
