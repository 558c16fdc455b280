"""The command line: what each command does with a real service, what a person and what a program gets to see, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_service import FakeService, answers, forwards, problem
from postgres import connect, fresh_schema
from service import INHERITED, MAIN, Api, Corner, Service, running_service, wait_until
from terminal import Terminal, terminal

import ai_service
from ai_internal.cli.commands import EXIT_CODES
from ai_internal.cli.terminal import Column, Table, duration_text
from ai_internal.server.requests import JobFilter

PROGRAM = (sys.executable, str(MAIN))
SECRETS = {"own": "own-0123456789abcdef", "worker": "worker-0123456789abcdef", "operator": "operator-0123456789abcdef"}
UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057"


@attrs.frozen
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """What stands on stdout as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


class Cli:
    """The command line for one service: in this process, as a process of its own, or at a terminal."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.environment = {name: os.environ[name] for name in INHERITED if name in os.environ} | {"AI_SERVICE_URL": url}
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str, **environment: str) -> Ended:
        """Within this process: most of a second faster."""
        with self._monkeypatch.context() as patch:
            patch.setattr(os, "environ", {**self.environment, **environment})
            try:
                code = ai_service.main(words)
            except SystemExit as exit_:
                code = int(str(exit_.code))
        return Ended(code, *self._capsys.readouterr())

    def process(self, *words: str, sent: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
        """As a process: its bytes, and its exit code."""
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if sent is None else {"input": sent}
        return subprocess.run(
            [*PROGRAM, *words], capture_output=True, env={**self.environment, **environment}, timeout=60, check=False, **given
        )

    def at_terminal(self, *words: str, **size: int) -> AbstractContextManager[Terminal]:
        """As a process at a terminal of 80 columns, or others."""
        return terminal([*PROGRAM, *words], self.environment, **size)


@pytest.fixture
def cli(service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """For the service that tests share."""
    return Cli(f"http://127.0.0.1:{service.api.port}", monkeypatch, capsys)


@pytest.fixture
def fake(api: Api) -> Iterator[FakeService]:
    """A stranger between the command line and the real service."""
    with FakeService(forward_to=api.port) as server:
        yield server


@pytest.fixture
def past(fake: FakeService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """For the service, past the stranger."""
    return Cli(fake.url, monkeypatch, capsys)


@pytest.fixture(scope="module")
def guarded(postgres_url: str) -> Iterator[Service]:
    """A service with tokens."""
    tokens = f"own=caller:telephony={SECRETS['own']}; worker=worker={SECRETS['worker']}; desk=operator={SECRETS['operator']}"
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema, API_TOKENS=tokens) as service:
        yield service


@pytest.fixture
def with_tokens(guarded: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """For the service with tokens; each command names its own."""
    return Cli(f"http://127.0.0.1:{guarded.api.port}", monkeypatch, capsys)


@pytest.fixture
def mine(corner: Corner) -> tuple[str, str]:
    """The filter that fits the jobs of this test."""
    return ("--owner-service", corner.owner_service)


def failing(corner: Corner, count: int, category: str = "timeout") -> list[str]:
    """The ids of new jobs that failed."""
    jobs = [job for some in [corner.batch([{} for _ in range(count)])] for job in some]
    for start in range(0, count, 1000):
        claimed = corner.claim(limit=min(1000, count - start))
        ends = [{"id": job["id"], "claim_id": job["claim_id"], "category": category, "message": "too slow"} for job in claimed]
        assert {each["status"] for each in corner.api.post("/api/v1/jobs/fail", {"jobs": ends}).json["jobs"]} == {200}
    return [job["id"] for job in jobs]


def statuses(corner: Corner) -> list[str]:
    return sorted(job["status"] for job in corner.api.get("/api/v1/jobs", owner_service=corner.owner_service, limit=500).json["jobs"])


# ---------------------------------------------------------------- list


def test_the_list_takes_every_filter_of_the_interface(cli: Cli, corner: Corner) -> None:
    old = corner.create(owner_ref="old", task_type="another", model_profile="elsewhere")
    [failed] = failing(corner, 1)
    new = corner.create(owner_ref="new")
    fits: dict[str, tuple[list[str], list[str]]] = {
        "--status": (["failed"], [failed]),
        "--owner-service": ([corner.owner_service], [new["id"], failed, old["id"]]),
        "--owner-ref": (["old", "new"], [new["id"], old["id"]]),
        "--task-type": (["another"], [old["id"]]),
        "--model-profile": (["elsewhere", corner.model_profile], [new["id"], failed, old["id"]]),
        "--error-category": (["timeout"], [failed]),
        "--created-after": ([old["created_at"]], [new["id"], failed]),
        "--created-before": ([new["created_at"]], [failed, old["id"]]),
    }
    assert {word[2:].replace("-", "_") for word in fits} == {field.name for field in attrs.fields(JobFilter)}
    for word, (values, ids) in fits.items():
        given = [part for value in values for part in (word, value)]
        own = () if word == "--owner-service" else ("--owner-service", corner.owner_service)
        assert [job["id"] for job in cli("jobs", "list", "--json", *own, *given).lines] == ids, word


def test_a_time_may_be_told_as_how_long_ago(cli: Cli, corner: Corner, mine: tuple[str, str]) -> None:
    job = corner.create()
    assert cli("jobs", "list", *mine, "--created-before", "1h").out.count(job["id"]) == 0
    assert cli("jobs", "list", *mine, "--created-after", "1h").out.count(job["id"]) == 1


def test_the_list_follows_the_pages_up_to_its_limit(cli: Cli, corner: Corner, mine: tuple[str, str]) -> None:
    items = corner.batch([{} for _ in range(1003)])
    ids = sorted((item["id"] for item in items), reverse=True)
    assert [job["id"] for job in cli("jobs", "list", *mine, "--json", "--limit", "0").lines] == ids
    assert [job["id"] for job in cli("jobs", "list", *mine, "--json", "--limit", "502").lines] == ids[:502]
    table = cli("jobs", "list", *mine, "--limit", "1002")
    assert [line.split()[0] for line in table.out.splitlines()] == ["ID", *ids[:1002]]
    assert "newest 1,002" in table.err
    assert len(cli("jobs", "list", *mine).out.splitlines()) == 51


def test_json_of_the_list_is_the_text_of_the_service_on_a_line_each(cli: Cli, corner: Corner, mine: tuple[str, str]) -> None:
    job = corner.take()
    body = b'{"claim_id":"%b","progress":{"share":  1.50,\n"step":"\xc3\xa9"}}' % job["claim_id"].encode()
    assert corner.api.post(f"/api/v1/jobs/{job['id']}/heartbeat", body=body).status == 200
    answered = corner.api.get("/api/v1/jobs", owner_service=corner.owner_service).body.decode()
    [line] = cli("jobs", "list", *mine, "--json").out.splitlines()
    assert f'{{"jobs":[{line}],"next_cursor":null}}' == answered.replace("\n", " ")
    assert '"share":  1.50, "step":"é"' in line


def test_a_table_on_a_terminal_shows_whole_ids_within_its_width_and_nothing_of_what_a_caller_draws(cli: Cli, corner: Corner) -> None:
    evil = "\x1b[2J\x9b31m\u202e日本"
    job = corner.create(owner_ref=evil + "x" * 300)
    with cli.at_terminal("jobs", "list", "--owner-service", corner.owner_service, columns=100) as shown:
        assert shown.ended() == 0
    [head, row] = shown.text.splitlines()
    assert head.startswith("ID ")
    assert row.startswith(job["id"])
    assert "…" in row
    assert max(len(head), len(row)) <= 100
    assert not re.search("[\x9b\u202e]|\x1b\\[2J", shown.drawn)
    piped = cli("jobs", "list", "--owner-service", corner.owner_service).out
    assert "x" * 300 in piped
    assert r"\x1b[2J\x9b31m\u202e日本" in piped


def test_json_on_a_terminal_means_the_same_and_draws_nothing(cli: Cli, corner: Corner) -> None:
    corner.create(owner_ref="\x9b31m\u202e\U000e0001日本")
    with cli.at_terminal("jobs", "list", "--json", "--owner-service", corner.owner_service) as shown:
        assert shown.ended() == 0
    assert r'"owner_ref":"\u009b31m\u202e\udb40\udc01日本"' in shown.drawn
    assert json.loads(shown.drawn)["owner_ref"] == "\x9b31m\u202e\U000e0001日本"


def test_a_pipe_that_is_closed_ends_a_list_quietly(cli: Cli, corner: Corner) -> None:
    corner.batch([{"owner_ref": "r" * 400} for _ in range(600)])
    words = [*PROGRAM, "jobs", "list", "--json", "--limit", "0", "--owner-service", corner.owner_service]
    with subprocess.Popen(words, env=cli.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["owner_service"] == corner.owner_service
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""


# ---------------------------------------------------------------- show


def test_show_tells_the_whole_story_of_a_job(cli: Cli, corner: Corner) -> None:
    job = corner.take(priority=3, idempotency_key="k-1", max_attempts=4)
    corner.done(job, "fail", message="the GPU\x1b[31m fell\nover", category="unavailable", retryable=True, retry_in_seconds=0)
    [again] = corner.claim()
    corner.done(again, "complete", usage={"prompt_tokens": 12, "model": "qwen"}, result={"text": "done"})
    shown = cli("jobs", "show", job["id"])
    facts = dict(re.split(r" {2,}", line, maxsplit=1) for line in shown.out.splitlines() if not line.startswith(("attempt ", " ")))
    own = {"owner_service": corner.owner_service, "task_type": corner.task_type, "model_profile": corner.model_profile}
    expected = {"id": job["id"], "status": "completed", "priority": "3", "idempotency_key": "k-1", "worker_id": corner.worker_id, **own}
    assert {name: facts[name] for name in expected} == expected
    assert facts["usage"] == "prompt_tokens 12, model qwen"
    assert facts["result"] == "16 bytes; --result prints it"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  \d\.\ds after it was started", facts["finished_at"])
    assert "attempt           2 of 4" in shown.out
    assert re.search(rf"^attempt 1 .*Z  unavailable  {corner.worker_id}\n +the GPU\\x1b\[31m fell\\nover$", shown.out, re.MULTILINE)
    assert again["claim_id"] not in shown.out + cli("jobs", "show", job["id"], "--json").out


def test_show_tells_why_a_job_failed(cli: Cli, corner: Corner) -> None:
    corner.done(job := corner.take(), "fail")
    assert re.search("^error +timeout: too slow$", cli("jobs", "show", job["id"]).out, re.MULTILINE)


def test_input_and_result_are_printed_character_by_character_and_alone(cli: Cli, corner: Corner) -> None:
    texts = {"input": '{"n": 1.50,\r\n "n":\t"\\u0000é" }', "result": "[1e400,\n  -0.0]"}
    body = json.dumps(corner.job()).replace('{"text": "hello"}', texts["input"])
    created = corner.api.post("/api/v1/jobs", body=body.encode()).json
    [job] = corner.claim()
    done = f'{{"claim_id": "{job["claim_id"]}", "result": {texts["result"]}}}'
    assert corner.api.post(f"/api/v1/jobs/{created['id']}/complete", body=done.encode()).status == 200
    for name, text in texts.items():
        ended = cli.process("jobs", "show", created["id"], f"--{name}")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, text.encode(), b"")
    assert (
        cli("jobs", "show", created["id"], "--json").out
        == corner.api.get(f"/api/v1/jobs/{created['id']}", include="input").body.decode() + "\n"
    )


def test_a_job_without_a_result_says_so(cli: Cli, corner: Corner) -> None:
    ended = cli("jobs", "show", corner.create()["id"], "--result")
    assert (ended.code, ended.out) == (1, "")
    assert "has no result: it is pending" in ended.err


# ---------------------------------------------------------------- retry and cancel


def test_jobs_are_retried_by_their_ids_and_those_that_cannot_be_are_told(cli: Cli, corner: Corner) -> None:
    one, two = failing(corner, 2)
    corner.done(completed := corner.take(), "complete")
    ended = cli("jobs", "retry", one, UNKNOWN, completed["id"], "call/1", two)
    assert ended.code == 1
    assert ended.out.splitlines() == [f"{one} pending", f"{two} pending"]
    told = ended.err.splitlines()
    assert [line.split(": ")[1] for line in told] == [UNKNOWN, completed["id"], "call/1"]
    assert "no such job" in told[0]
    assert "is a UUID" in told[2]


def test_a_retry_by_filter_asks_at_a_terminal_and_takes_no_for_an_answer(cli: Cli, corner: Corner, mine: tuple[str, str]) -> None:
    failing(corner, 3)
    for answer, left in (("\n", ["failed"] * 3), ("y\n", ["pending"] * 3)):
        with cli.at_terminal("jobs", "retry", *mine, "--error-category", "timeout") as shown:
            shown.wait_for("Retry 3 jobs? [y/N] ")
            shown.type(answer)
            assert shown.ended() == 0
        assert statuses(corner) == left
    assert "retried 3, matched 3" in shown.text


@pytest.mark.parametrize("verb", ["retry", "cancel"])
def test_a_change_by_filter_needs_a_yes_where_nobody_can_be_asked(cli: Cli, corner: Corner, mine: tuple[str, str], verb: str) -> None:
    failing(corner, 2)
    corner.create()
    corner.create()
    before = statuses(corner)
    ended = cli.process("jobs", verb, *mine)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert f"2 jobs to {verb}: --yes is needed" in ended.stderr.decode()
    done = "retried" if verb == "retry" else "cancelled"
    assert cli("jobs", verb, *mine, "--dry-run", "--json").lines == [{done: 0, "matched": 2}]
    assert statuses(corner) == before
    assert cli("jobs", verb, *mine, "--yes").out == f"{done} 2, matched 2\n"
    assert statuses(corner) != before


def test_a_retry_takes_more_jobs_than_one_call_does(cli: Cli, corner: Corner, mine: tuple[str, str]) -> None:
    failing(corner, 1004)
    assert cli("jobs", "retry", *mine, "--yes", "--json").lines == [{"retried": 1004, "matched": 1004}]
    assert cli("jobs", "list", *mine, "--status", "failed", "--json").out == ""


def test_a_retry_of_jobs_that_fail_again_at_once_comes_to_an_end(past: Cli, fake: FakeService) -> None:
    fake.behave("/jobs/retry", answers(200, {"retried": 0, "more": True, "matched": 2500}))
    fake.always("/jobs/retry", lambda handler, seen: answers(200, {"retried": seen.json["limit"], "more": True})(handler, seen))
    assert past("jobs", "retry", "--owner-service", "o", "--yes").out == "retried 2,500, matched 2,500\n"
    assert [seen.json.get("limit") for seen in fake.asked("/jobs/retry")[1:]] == [1000, 1000, 500]


def test_jobs_are_cancelled_by_their_ids_with_a_reason(cli: Cli, corner: Corner) -> None:
    job = corner.create()
    assert cli("jobs", "cancel", job["id"], "--reason", "sold out", "--json").lines == [{"id": job["id"], "status": "cancelled"}]
    assert corner.look(job)["error"]["message"] == "sold out"


def test_a_cancel_by_filter_takes_what_pends_and_runs_and_was_there_when_it_was_counted(
    past: Cli, fake: FakeService, corner: Corner, mine: tuple[str, str]
) -> None:
    corner.done(corner.take(), "complete")
    running = corner.take()
    corner.batch([{} for _ in range(5)])
    later: list[str] = []

    def forward_and_create(handler: Any, seen: Any) -> None:
        later.append(corner.create()["id"])
        forwards()(handler, seen)

    fake.behave("/api/v1/jobs", forwards(), forward_and_create)
    assert past("jobs", "cancel", *mine, "--yes").out == "cancelled 6, matched 6\n"
    assert statuses(corner) == ["cancelled"] * 6 + ["completed", "pending"]
    assert corner.look({"id": later[0]})["status"] == "pending"
    assert corner.look(running)["status"] == "cancelled"


@pytest.mark.parametrize(
    "words", [("retry",), ("cancel",), ("retry", UNKNOWN, "--status", "failed"), ("cancel", UNKNOWN, "--dry-run")], ids=" ".join
)
def test_jobs_to_change_are_named_or_filtered(cli: Cli, words: tuple[str, ...]) -> None:
    ended = cli("jobs", *words)
    assert (ended.code, ended.out) == (2, "")
    assert "filter" in ended.err


# ---------------------------------------------------------------- export and import


def imported(cli: Cli, tmp_path: Path, *lines: Any, words: tuple[str, ...] = ()) -> Ended:
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return cli("jobs", "import", str(file), "--json", *words)


def counts(created: int, existing: int, refused: int) -> dict[str, int]:
    return {"created": created, "existing": existing, "refused": refused}


def test_an_export_can_be_imported_once_and_in_its_order(cli: Cli, corner: Corner, mine: tuple[str, str], tmp_path: Path) -> None:
    texts = ['{"n": 1.50,\n "n": 2}', "null", '"é\\u0000"']
    given = {"priority": 2, "max_attempts": 7, "traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "expires_at": "2999-01-01T00:00:00Z"}
    for number, text in enumerate(texts):
        body = json.dumps(corner.job(owner_ref=f"r/{number}", **given)).replace('{"text": "hello"}', text)
        assert corner.api.post("/api/v1/jobs", body=body.encode()).status == 201
    old = [job["id"] for job in corner.claim(limit=3)]
    exported = cli("jobs", "export", *mine, "--input").out.splitlines()
    assert [json.loads(line)["owner_ref"] for line in exported] == ["r/2", "r/1", "r/0"]
    assert all('"result":' not in line for line in exported)
    for expected in (counts(3, 0, 0), counts(0, 3, 0)):
        assert imported(cli, tmp_path, *reversed(exported)).lines == [expected]
    new = corner.claim(limit=10)
    assert not {job["id"] for job in new} & set(old)
    assert [job["owner_ref"] for job in new] == ["r/0", "r/1", "r/2"]
    assert {(job["priority"], job["max_attempts"], job["traceparent"]) for job in new} == {(2, 7, given["traceparent"])}
    for job, text in zip(new, texts, strict=True):
        assert (
            corner.api.get(f"/api/v1/jobs/{job['id']}", include="input").body.decode().endswith(f',"input":{text.replace(chr(10), " ")}}}')
        )


def test_an_export_has_the_payloads_that_are_asked_for_on_one_line_each(cli: Cli, corner: Corner, mine: tuple[str, str]) -> None:
    corner.done(corner.take(), "complete", result={"text": "done"})
    corner.create()
    words = {(): set(), ("--input",): {"input"}, ("--result",): {"result"}, ("--input", "--result"): {"input", "result"}}
    for word, fields in words.items():
        lines = cli("jobs", "export", *mine, *word).lines
        assert [set(job) & {"input", "result"} for job in lines] == [fields, fields]
    assert [job["result"] for job in lines] == [None, {"text": "done"}]
    assert lines[1]["input"] == {"text": "hello"}


def test_an_export_that_was_interrupted_goes_on_where_it_ended(past: Cli, fake: FakeService, corner: Corner, mine: tuple[str, str]) -> None:
    ids = sorted((job["id"] for job in corner.batch([{} for _ in range(1003)])), reverse=True)
    fake.behave("/api/v1/jobs", forwards(), problem(500, "internal_error", retryable=False))
    first = past("jobs", "export", *mine)
    assert first.code == 1
    [cursor] = re.findall(r"500 jobs exported; to go on: --cursor (\S+)", first.err)
    rest = past("jobs", "export", *mine, "--cursor", cursor)
    assert [job["id"] for job in first.lines + rest.lines] == ids


def test_a_job_erased_while_it_is_exported_is_left_out(past: Cli, fake: FakeService, corner: Corner, mine: tuple[str, str]) -> None:
    gone, stays = corner.create(), corner.create()
    fake.always(gone["id"], problem(404, "job_not_found"))
    assert [job["id"] for job in past("jobs", "export", *mine, "--input").lines] == [stays["id"]]


def test_an_import_passes_over_ill_lines_and_says_which_and_why(cli: Cli, corner: Corner, tmp_path: Path) -> None:
    lines = [
        corner.job(owner_ref="first"),
        "",
        corner.job(priority=99, colour="red"),
        '{"owner_service": ',
        "[1]",
        '{"input": "\xff'.encode().decode("latin-1"),
        corner.job(id=UNKNOWN, status="pending") | {"input": None},
        {name: value for name, value in corner.job(id=UNKNOWN, status="pending").items() if name != "input"},
        corner.job(owner_ref="last"),
    ]
    ended = imported(cli, tmp_path, *lines, words=("--keep-going",))
    assert ended.lines == [counts(3, 0, 5)]
    assert ended.code == 1
    told = dict(line.removeprefix("line ").split(": ", 1) for line in ended.err.splitlines())
    assert list(told) == ["3", "4", "5", "6", "8"]
    assert told["3"] == "/priority must be from -10 to 10; /colour is not a field of this request"
    assert [told[number].partition(":")[0] for number in ("4", "5", "6")] == [
        "is not JSON",
        "is no JSON object that can be a job",
        "is not JSON",
    ]
    assert "export with --input" in told["8"]
    assert imported(cli, tmp_path, *lines, words=("--keep-going",)).lines == [counts(0, 3, 5)]
    assert sorted(job["owner_ref"] for job in corner.claim(limit=10)) == ["call/1", "first", "last"]


def test_an_import_stops_before_the_first_ill_line(cli: Cli, corner: Corner, tmp_path: Path) -> None:
    lines = [corner.job(owner_ref=str(number)) for number in range(6)]
    lines[4]["priority"] = lines[3]["priority"] = 99
    ended = imported(cli, tmp_path, *lines)
    assert (ended.code, ended.lines) == (1, [counts(3, 0, 1)])
    assert [line.partition(":")[0] for line in ended.err.splitlines()] == ["line 4", "ai-service"]
    assert "stopped before line 4" in ended.err
    assert sorted(job["owner_ref"] for job in corner.claim(limit=10)) == ["0", "1", "2"]
    lines[4]["priority"] = lines[3]["priority"] = 9
    assert imported(cli, tmp_path, *lines).lines == [counts(3, 3, 0)]


def test_equal_lines_are_one_job_and_keys_that_are_given_are_kept(cli: Cli, corner: Corner, tmp_path: Path) -> None:
    keyed = corner.job(owner_ref="keyed", idempotency_key="mine")
    assert imported(cli, tmp_path, corner.job(), corner.job(), {**corner.job(), "idempotency_key": None}, keyed).lines == [counts(3, 1, 0)]
    assert corner.api.post("/api/v1/jobs", keyed).status == 200


def test_a_line_whose_refusal_names_no_line_is_found_among_the_others(cli: Cli, corner: Corner, tmp_path: Path) -> None:
    corner.create(idempotency_key="taken")
    lines = [corner.job(owner_ref=f"r/{number}") for number in range(40)]
    lines[17] |= {"idempotency_key": "taken", "owner_ref": "another"}
    ended = imported(cli, tmp_path, *lines, words=("--keep-going",))
    assert ended.lines == [counts(39, 0, 1)]
    assert ended.err == "line 18: The idempotency_key stands for another job.\n"


@pytest.mark.long
def test_a_line_that_is_too_long_for_anything_is_refused_and_the_next_one_read(cli: Cli, corner: Corner) -> None:
    endless = b'{"input":"' + b"x" * (65 << 20) + b'"}\n'
    large = json.dumps(corner.job(input="x" * (33 << 20))).encode() + b"\n"
    sent = endless + large + json.dumps(corner.job()).encode()
    ended = cli.process("jobs", "import", "-", "--keep-going", "--json", sent=sent)
    assert json.loads(ended.stdout) == counts(1, 0, 2)
    assert ended.stderr.decode().splitlines() == ["line 1: is longer than 64 MiB", "line 2: The body is larger than MAX_BODY_BYTES."]


def test_an_import_that_was_interrupted_goes_on_when_it_is_run_again(
    cli: Cli, corner: Corner, mine: tuple[str, str], tmp_path: Path
) -> None:
    lines = [json.dumps(corner.job(owner_ref=str(number))) for number in range(700)]
    words = [*PROGRAM, "jobs", "import", "-"]
    with subprocess.Popen(words, env=cli.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write("".join(f"{line}\n" for line in lines[:501]).encode())
        process.stdin.flush()
        wait_until(lambda: len(statuses(corner)) == 500, what="the first 500 jobs")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    # The answer to the 500 may have been on its way.
    assert re.fullmatch(rb"created (500|0), existing 0, refused 0\n", out)
    assert b"run the same import again" in err
    assert imported(cli, tmp_path, *lines).lines == [counts(200, 500, 0)]


@pytest.mark.long
def test_how_far_an_import_is_stands_on_a_terminal_and_nowhere_else(cli: Cli, corner: Corner, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join(json.dumps(corner.job(owner_ref=str(number))) + "\n" for number in range(1000)))
    with cli.at_terminal("jobs", "import", str(file)) as shown:
        assert shown.ended() == 0
    assert re.search(r"\r\[##############\s+\]  50%  line 500\x1b\[K", shown.drawn)
    assert shown.drawn.endswith("\x1b[Kcreated 1,000, existing 0, refused 0\n")
    piped = cli.process("jobs", "import", str(file))
    assert (piped.stdout, piped.stderr) == (b"created 0, existing 1,000, refused 0\n", b"")


@pytest.mark.long
def test_an_import_of_a_large_file_takes_no_more_memory_than_one_of_a_small(cli: Cli, corner: Corner, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as lines:
            for number in range(count):
                lines.write(json.dumps(corner.job(owner_ref=f"{count}/{number}", input={"text": "x" * 1000})) + "\n")
        # Not getrusage: its peak is also that of the process that this one was made from.
        program = (
            "import sys, ai_service; ai_service.main(sys.argv[1:]); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        words = [sys.executable, "-c", program, "jobs", "import", str(file)]
        done = subprocess.run(words, env=cli.environment, cwd=MAIN.parent, capture_output=True, text=True, timeout=120, check=False)
        assert f"created {count:,}" in done.stdout, done.stderr
        return int(done.stdout.splitlines()[-1])

    small, large = peak(1000), peak(50_000)
    assert large < small + 12_000, f"{small} KB for 1 MB, {large} KB for 57 MB"


# ---------------------------------------------------------------- operation


def test_stats_show_what_waits_runs_and_failed(cli: Cli, corner: Corner) -> None:
    failing(corner, 2, category="gpu_on_fire")
    corner.take()
    corner.batch([{} for _ in range(3)])
    row_of = lambda out: re.search(rf"^{corner.owner_service} .*", out, re.MULTILINE)  # noqa: E731
    wait_until(lambda: (row := row_of(cli("stats").out)) and row[0].split()[5] == "2", what="the counters")
    out = cli("stats").out
    for name in (corner.model_profile, corner.owner_service, corner.task_type):
        [row] = [line.split() for line in out.splitlines() if line.startswith(f"{name} ")]
        assert row[1:7] == ["3", "0", "1", "0", "2", "0"]
    assert re.search(r"^gpu_on_fire +2 ", out, re.MULTILINE)
    assert re.search(r"^now +pending [\d,]+ ", out)
    assert cli("stats", "--json", "--window", "7d").lines[0]["window_seconds"] == 604_800


def test_what_is_paused_is_shown_until_it_is_resumed(cli: Cli, corner: Corner) -> None:
    named = ("--model-profile", corner.model_profile, "--owner-service", corner.owner_service)
    row = re.compile(rf"^{corner.model_profile} +any +{corner.owner_service} ", re.MULTILINE)
    assert row.search(cli("pause", *named).out)
    corner.create()
    assert corner.claim() == []
    assert row.search(cli("pause", "--list").out)
    assert row.search(cli("stats").out)
    assert not row.search(cli("resume", *named).out)
    assert [rule for rule in cli("pause", "--list", "--json").lines[0]["paused"] if rule["model_profile"] == corner.model_profile] == []
    assert len(corner.claim()) == 1
    for wrong in (("pause",), ("resume",), ("pause", "--list", "--task-type", "t")):
        assert cli(*wrong).code == 2


def test_workers_and_providers_are_shown_with_their_circuits(cli: Cli, corner: Corner) -> None:
    provider = {"name": "vllm", "status": "degraded", "circuit": "open", "model_profiles": ["m", "n"], "detail": "bad\x1b[31m"}
    corner.claim(worker={"version": "9.9", "capacity": 4, "running": 1, "providers": [provider]})
    [row] = wait_until(lambda: [line for line in cli("workers").out.splitlines() if line.startswith(corner.worker_id)])
    assert re.fullmatch(rf"{corner.worker_id} +\d\.\ds +1/4  9\.9 +vllm degraded \(open\)", row)
    listed = cli("providers").out.splitlines()
    assert [re.split(" {2,}", line) for line in listed if line.startswith(corner.worker_id)] == [
        [corner.worker_id, "vllm", "degraded", "open", "m, n", r"bad\x1b[31m"]
    ]
    assert any(re.match(r"service +vllm +not_configured .*LLM_BASE_URL is not set", line) for line in listed)
    assert corner.worker_id in [worker["worker_id"] for worker in cli("workers", "--json").lines[0]["workers"]]
    assert cli("providers", "--json").lines[0]["providers"]


def test_a_watch_draws_anew_within_the_terminal_and_ends_well_on_ctrl_c(cli: Cli, corner: Corner) -> None:
    corner.batch([{"task_type": f"{corner.task_type}-{number}"} for number in range(40)])
    with cli.at_terminal("stats", "--watch", "0.2", rows=20) as shown:
        wait_until(lambda: shown.drawn.count("\x1b[H") >= 3, 20, "the third frame")
        shown.process.send_signal(signal.SIGINT)
        assert shown.ended() == 0
    first = shown.drawn.split("\x1b[H")[1]
    assert "every 0.2 s" in first
    assert len(first.splitlines()) <= 20
    assert max(len(line) for line in re.sub(r"\x1b\[\S", "", first).splitlines()) <= 80
    assert "Traceback" not in shown.text


@pytest.mark.long
def test_a_watch_outlasts_a_service_that_is_away(cli: Cli, start_service: Callable[..., Service]) -> None:
    service = start_service()
    cli.environment["AI_SERVICE_URL"] = f"http://127.0.0.1:{service.api.port}"
    with cli.at_terminal("stats", "--watch", "0.1") as shown:
        shown.wait_for("last 1d")
        service.kill()
        shown.wait_for("The service is away")
        service.environment["HTTP_PORT"] = str(service.api.port)
        service.lines.clear()
        service._ended = False
        service.start()
        count = shown.text.count("last 1d")
        wait_until(lambda: shown.text.count("last 1d") > count, 20, "another frame")


# ---------------------------------------------------------------- tokens


def test_each_role_may_do_by_command_what_it_may_do_by_http(with_tokens: Cli, guarded: Service, tmp_path: Path) -> None:
    by = {name: partial(with_tokens, AI_SERVICE_TOKEN=secret) for name, secret in SECRETS.items()}
    foreign = {"owner_service": "monitoring", "owner_ref": "r", "task_type": "t", "model_profile": "m", "input": 1}
    file = tmp_path / "jobs.jsonl"
    file.write_text(json.dumps({**foreign, "owner_service": "telephony"}) + "\n" + json.dumps(foreign))
    ended = by["own"]("jobs", "import", str(file), "--keep-going")
    assert (ended.code, ended.out) == (1, "created 1, existing 0, refused 1\n")
    assert ended.err == "line 2: /owner_service is none that this token may create jobs for\n"
    assert by["operator"]("jobs", "import", str(file)).out == "created 1, existing 1, refused 0\n"
    assert [len(by[who]("jobs", "list", "--json").lines) for who in ("own", "operator")] == [1, 2]
    assert "monitoring" not in by["own"]("stats").out
    assert "monitoring" in by["operator"]("stats").out
    [theirs] = by["operator"]("jobs", "list", "--owner-service", "monitoring", "--json").lines
    assert by["own"]("jobs", "show", theirs["id"]).code == 1
    assert by["own"]("jobs", "cancel", "--owner-service", "monitoring", "--yes").out == "cancelled 0, matched 0\n"
    refused = [("own", "workers"), ("own", "pause", "--task-type", "t"), ("own", "providers"), ("worker", "jobs", "list")]
    for who, *words in refused:
        assert by[who](*words).code == 4
        assert by["operator"](*words).code == 0
    by["operator"]("resume", "--task-type", "t")


def test_a_token_that_is_missing_or_wrong_is_told_and_never_shown(with_tokens: Cli, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"owner_service":"o","owner_ref":"r","task_type":"t","model_profile":"m","input":1}')
    for words in (("stats",), ("jobs", "list"), ("jobs", "import", str(tmp_path / "jobs.jsonl")), ("jobs", "cancel", UNKNOWN)):
        missing, wrong = with_tokens(*words), with_tokens(*words, AI_SERVICE_TOKEN="wrong-0123456789abcdef")
        assert (missing.code, wrong.code) == (4, 4)
        assert "a token is needed: set AI_SERVICE_TOKEN" in missing.err
        assert "does not know the token in AI_SERVICE_TOKEN" in wrong.err
        assert "wrong-0123" not in wrong.out + wrong.err


# ---------------------------------------------------------------- exit codes and bad input


WRONG: list[tuple[int, tuple[str, ...], dict[str, str], str]] = [
    (3, ("stats",), {"AI_SERVICE_URL": "http://127.0.0.1:1"}, "no answer from http://127.0.0.1:1: nobody takes the connection"),
    (3, ("jobs", "export"), {"AI_SERVICE_URL": "http://127.0.0.1:1"}, "nobody takes the connection"),
    (3, ("jobs", "list"), {"AI_SERVICE_URL": "http://no-such-host.invalid"}, "the name of the host is not known"),
    (2, ("jobs", "list"), {"AI_SERVICE_URL": "ftp://me:hidden@host"}, "AI_SERVICE_URL: it must begin with http://"),
    (2, ("stats",), {"AI_SERVICE_TOKEN": "hidden word"}, "AI_SERVICE_TOKEN: a token consists of printable ASCII"),
    (1, ("jobs", "import", "/nowhere/jobs.jsonl"), {}, "/nowhere/jobs.jsonl: No such file or directory"),
    (1, ("jobs", "import", "/"), {}, "Is a directory"),
    (1, ("jobs", "show", "call/1"), {}, "call/1: is not the id of a job, which is a UUID"),
    (1, ("jobs", "show", UNKNOWN), {}, f"{UNKNOWN}: there is no such job"),
    (1, ("jobs", "list", "--owner-service", "a b"), {}, "?owner_service/0: must match"),
    (1, ("jobs", "export", "--cursor", "x\x1b[2J"), {}, "?cursor: must match"),
    (2, ("jobs", "list", "--created-after", "yesterday"), {}, "it must be a time such as"),
    (2, ("jobs", "list", "--status", "done"), {}, "invalid choice: 'done'"),
    (2, ("jobs", "list", "--limit", "-1"), {}, "it must be a whole number"),
    (2, ("jobs", "list", "--owner-ref", "\udcff"), {}, "it is not UTF-8"),
    (2, ("stats", "--watch", "0"), {}, "from 0.1 to 3600 seconds"),
    (2, ("stats", "--window", "2d"), {}, "invalid choice: '2d'"),
    (2, ("jobs",), {}, "required: verb"),
    (2, ("nothing",), {}, "invalid choice: 'nothing'"),
]


@pytest.mark.parametrize(("code", "words", "environment", "told"), WRONG, ids=lambda part: str(part) if isinstance(part, int) else "")
def test_what_is_wrong_is_told_in_a_line_with_its_exit_code(
    cli: Cli, code: int, words: tuple[str, ...], environment: dict[str, str], told: str
) -> None:
    ended = cli(*words, **environment)
    assert (ended.code, ended.out) == (code, "")
    *usage, last = ended.err.splitlines()
    assert told in last
    assert all(line.startswith(("usage:", " ")) for line in usage)
    assert not re.search("hidden|Traceback|\x1b", ended.err)


@pytest.mark.parametrize("answer", [answers(200, b"<html>"), answers(404, b"<html>"), answers(301), answers(200, {"jobs": 1})])
def test_another_program_at_the_address_is_not_taken_for_the_service(past: Cli, fake: FakeService, answer: Any) -> None:
    fake.always("/api/v1/jobs", answer)
    ended = past("jobs", "list")
    assert (ended.code, ended.out) == (3, "")
    assert "is AI_SERVICE_URL right?" in ended.err


def test_a_service_without_its_database_is_told_as_one_that_cannot_work_now(cli: Cli) -> None:
    with running_service("postgresql://user@127.0.0.1:1/none", "tests_none") as away:
        ended = cli("jobs", "list", AI_SERVICE_URL=f"http://127.0.0.1:{away.api.port}")
    assert (ended.code, ended.err) == (3, "ai-service: PostgreSQL cannot be reached or does not accept writes.\n")


def test_the_exit_codes_stand_in_the_help_of_each_command_and_in_the_readme(cli: Cli) -> None:
    for words in ((), ("jobs", "list"), ("jobs", "import"), ("stats",), ("pause",)):
        assert EXIT_CODES in cli(*words, "--help").out
    told = re.findall(r"^ +(\d+) +(.*)$", EXIT_CODES, re.MULTILINE)
    assert [code for code, _ in told] == ["0", "1", "2", "3", "4", "130", "141"]
    assert {(code, about) for code, about in told} <= set(
        re.findall(r"^\| `(\d+)` \| (.*?) \|$", (MAIN.parent / "README.md").read_text(), re.MULTILINE)
    )


def test_every_command_stands_in_the_readme(cli: Cli) -> None:
    help_of = {words: cli(*words, "--help").out for words in ((), ("jobs",))}
    listed = {words: re.search(r"\{([a-z,]+)\}", text) for words, text in help_of.items()}
    readme = (MAIN.parent / "README.md").read_text()
    for words, found in listed.items():
        assert found
        names = found[1].split(",")
        assert len(names) >= 6
        assert [name for name in names if not re.search(rf"\bai-service {' '.join([*words, name])}\b|\| `{name}", readme)] == []


# ---------------------------------------------------------------- migrate


@pytest.mark.long
def test_migrate_says_from_which_version_to_which_and_a_second_time_does_nothing(cli: Cli, postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema:
        given = {"DATABASE_URL": postgres_url, "DATABASE_SCHEMA": schema}
        first, second = (cli.process("migrate", **given) for _ in range(2))
        assert (first.returncode, second.returncode) == (0, 0), first.stderr
        assert re.search(rf"schema {schema}: version 0 → {ai_service.SCHEMA_VERSION}$", first.stdout.decode().strip())
        assert re.search(rf"schema {schema}: version {ai_service.SCHEMA_VERSION} was there already$", second.stdout.decode().strip())
        with running_service(postgres_url, schema, MIGRATE_ON_START="false") as service:
            assert service.api.get("/readyz").status == 200


def test_migrate_tells_what_it_cannot_reach_or_use(cli: Cli) -> None:
    away = cli("migrate", DATABASE_URL="postgresql://user:hidden-word@127.0.0.1:1/db")
    assert (away.code, away.out) == (3, "")
    assert cli("migrate").code == 2
    assert "DATABASE_URL is not set" in cli("migrate").err
    assert "hidden-word" not in away.err


def test_migrate_in_a_schema_that_holds_tables_of_others_says_so(cli: Cli, postgres_url: str) -> None:
    with fresh_schema(postgres_url) as schema, closing(connect(postgres_url)) as connection:
        connection.run(f"create schema {schema}; create table {schema}.job (colour text)")
        ended = cli("migrate", DATABASE_URL=postgres_url, DATABASE_SCHEMA=schema)
        assert connection.run(f"select count(*) from pg_tables where schemaname = '{schema}'") == [[1]]
    assert (ended.code, ended.out) == (1, "")
    [line] = ended.err.splitlines()
    assert 'relation "job" already exists' in line


# ---------------------------------------------------------------- tables


def test_a_table_counts_wide_characters_twice_and_marks_none(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(Column("A"), Column("N", right=True), Column("B"))
    assert list(table.lines([("日本", "1", "x"), ("e\u0301", "1,000", "y")])) == [
        "A         N  B",
        "日本      1  x",
        "e\u0301     1,000  y",
    ]
    assert list(table.lines([("longer", "2", "z")])) == ["longer      2  z"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0.0s"), (3.21, "3.2s"), (9.99, "10.0s"), (47.4, "47s"), (119, "119s"), (125, "2m"), (7200, "2h"), (400_000, "5d")],
)
def test_a_duration_is_short(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text
