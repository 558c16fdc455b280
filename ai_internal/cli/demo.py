"""`ai-service demo`: the whole of AI Service at work on one machine. `python -m ai_internal.cli.demo` has two more commands:

    run [FOLDER]     what `make run` keeps running
    chat-stub PORT   the chat server below by itself, on all addresses, for the demo of compose.yaml

Both start a database, the service and a worker, each a process of its own as in production. The demo sends the jobs of
demo_jobs.jsonl, shows what becomes of them and takes everything down again; `run` goes on until it is told to stop.

Where no model service is configured, a stub replaces it. It runs no model, and says so in every answer:

    LLM_BASE_URL not set    a chat server, `StubChatServer`, speaks the part of the OpenAI API that the vLLM provider uses
    WHISPERX_URL not set    a transcription server, `StubWhisperXServer`, the part that the WhisperX provider uses

Sections: stubs, processes, everything together, the demo, run.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ai_client import AIService, Job, NewJob, NotJSON, ServiceError
from ai_internal.cli.terminal import Column, Table, print_lines
from ai_internal.server.embedded import EmbeddedError, bound_to_this_process, embedded_postgres
from ai_internal.telemetry import printable
from providers.vllm import DEFAULT_MODEL

__all__ = ["DemoFailed", "StubChatServer", "StubWhisperXServer", "main", "run", "run_stub"]

JOBS = Path(__file__).with_name("demo_jobs.jsonl")

STUB_TEXT = "A stand-in wrote this, no model ran."

START_SECONDS = 60.0
"""How long the service may take until it listens."""

STOP_SECONDS = 20.0
"""How long a process may take to end what it is doing."""

DEMO_SECONDS = 900.0
"""How long the demo waits for its jobs; a slow model on a small machine needs minutes."""


class DemoFailed(Exception):
    """The demo, or `run`, cannot go on; the message is for the terminal."""


# ── Stubs ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class StubServer(BaseHTTPRequestHandler):
    """A server that answers one request per connection, in the place of a model service."""

    protocol_version = "HTTP/1.1"
    model = ""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name is the library's
        """Nothing: the worker's log tells of its requests."""

    def _send(self, body: str) -> None:
        self._begin("application/json")
        self.wfile.write(body.encode())

    def _begin(self, media_type: str) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Connection", "close")
        self.end_headers()


class StubChatServer(StubServer):
    """What the vLLM provider asks of a chat server: the list of models, and a completion as a stream of events."""

    piece_seconds = 0.04

    def do_GET(self) -> None:
        """The list of models."""
        self._send(json.dumps({"object": "list", "data": [{"id": self.model, "object": "model"}]}))

    def do_POST(self) -> None:
        """One completion, word by word."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._begin("text/event-stream")
        for event in _completion_events(request, self.model):
            self.wfile.write(f"data: {event}\n\n".encode())
            time.sleep(self.piece_seconds)


def _completion_events(request: Mapping[str, Any], model: str) -> Iterator[str]:
    words = re.findall(r"\S+\s*", stub_answer(request))
    chunk = {"id": "chatcmpl-stand-in", "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    for delta in ({"role": "assistant", "content": ""}, *({"content": word} for word in words)):
        yield json.dumps(chunk | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield json.dumps(chunk | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    prompt = sum(len(str(message.get("content")).split()) for message in request["messages"])
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
    yield json.dumps(chunk | {"choices": [], "usage": usage})
    yield "[DONE]"


def stub_answer(request: Mapping[str, Any]) -> str:
    """The text of a completion, in the format that the request asks for."""
    form = request.get("response_format") or {}
    if form.get("type") == "json_schema":
        return json.dumps(_minimal_value(form["json_schema"]["schema"]))
    return json.dumps({"stand_in": True}) if form.get("type") == "json_object" else STUB_TEXT


def _minimal_value(schema: Mapping[str, Any]) -> Any:
    """The least value that fits a plain JSON schema: no more is needed to show the way of a job."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: _minimal_value(kind) for name, kind in schema.get("properties", {}).items()}
        case "array":
            return [_minimal_value(schema.get("items", {}))] * schema.get("minItems", 0)
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case _:
            return STUB_TEXT


class StubWhisperXServer(StubServer):
    """What the WhisperX provider asks of a transcription server: its routes, and a transcript, which says that nothing was heard."""

    def do_GET(self) -> None:
        """The one route, and what it takes."""
        form = {"type": "object", "properties": {name: {} for name in ("file", "model", "language", "response_format")}}
        takes = {"requestBody": {"content": {"multipart/form-data": {"schema": form}}}}
        self._send(json.dumps({"openapi": "3.1.0", "paths": {"/v1/audio/transcriptions": {"post": takes}}}))

    def do_POST(self) -> None:
        """Half a second later, a transcript."""
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.5)
        text = "A stand-in wrote this, no audio was heard."
        self._send(json.dumps({"text": text, "language": "en", "segments": [{"start": 0.0, "end": 0.1, "text": text}]}))


def _stub_server(address: tuple[str, int], handler: type[StubServer], model: str) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(address, type(handler.__name__, (handler,), {"model": model}))
    server.daemon_threads = True
    return server


def run_stub(environ: Mapping[str, str], port: int) -> int:
    """Answers as a chat server with the model LLM_MODEL until Ctrl-C or SIGTERM. Returns the exit status."""
    with suppress(KeyboardInterrupt), _stopped_by_signals(), _stub_server(("", port), StubChatServer, _model(environ)) as server:
        print(f"a stand-in answers on port {server.server_address[1]}: NO MODEL RUNS", file=sys.stderr, flush=True)
        server.serve_forever()
    return 0


@contextmanager
def _running_stub(handler: type[StubServer], model: str = "") -> Iterator[str]:
    """The address of a stub on a free port of this machine."""
    with _stub_server(("127.0.0.1", 0), handler, model) as server:
        thread = threading.Thread(target=server.serve_forever, name=handler.__name__, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Process:
    """`ai-service <command>` as a process of its own. Its log is read by a thread: passed on, or its end kept for when it fails."""

    def __init__(self, command: str, environ: Mapping[str, str], *, quiet: bool) -> None:
        self.command, self.environ = command, environ
        self._quiet = quiet
        self.start()

    def start(self) -> None:
        """Starts it, for the first time or again."""
        self._log_tail: deque[str] = deque(maxlen=30)
        self._port: str | None = None
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            bound_to_this_process([sys.executable, "-m", "ai_service", self.command], "TERM"),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the whole, which ends its parts in order
        )
        self._reader = threading.Thread(target=self._read, name=f"log-of-{self.command}", daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        """Whether it has ended, by whatever cause."""
        return self._process.poll() is not None

    @property
    def exit_report(self) -> str:
        """How it ended, and the end of its log where that has not been passed on."""
        status = self._process.wait()
        self._reader.join()
        log = "".join(self._log_tail) if self._quiet else ""
        return f"ai-service {self.command} ended with status {status}\n{log}".rstrip()

    def port(self) -> str:
        """The port the service says it listens on. Raises DemoFailed when it ends, or says none within START_SECONDS."""
        with self._changed:
            self._changed.wait_for(lambda: self._port or self.ended, timeout=START_SECONDS)
        if self._port is None:
            self.stop()
            raise DemoFailed(f"the service does not start: {self.exit_report}")
        return self._port

    def stop(self) -> None:
        """Ends it: in good order within STOP_SECONDS, else at once."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stderr
        with self._process.stderr as log:
            for line in log:
                self._log_tail.append(line)
                if not self._quiet:
                    sys.stderr.write(line)
                if found := re.search(r"service_started.*?\bport=(\d+)", line):
                    self._set_port(found[1])
        self._process.wait()  # it closes its log a moment before it has ended
        self._set_port(self._port)

    def _set_port(self, port: str | None) -> None:
        with self._changed:
            self._port = port
            self._changed.notify_all()


# ── Everything together ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _service_and_worker(environ: Mapping[str, str], *, quiet: bool) -> Iterator[tuple[_Process, _Process]]:
    """The service, and a worker that talks to it, until the block ends; the worker stops first."""
    with ExitStack() as stack:
        service = _Process("serve", environ, quiet=quiet)
        stack.callback(service.stop)
        port = service.port()
        # Should the service be started again, it is to come back where the worker looks for it.
        service.environ = {**service.environ, "HTTP_PORT": port}
        worker = _Process("worker", {**environ, "AI_SERVICE_URL": f"http://127.0.0.1:{port}"}, quiet=quiet)
        stack.callback(worker.stop)
        yield service, worker


@contextmanager
def _model_settings(environ: Mapping[str, str], *, transcriber: bool) -> Iterator[dict[str, str]]:
    """The settings under which the processes find model services: the ones configured, and stubs for the others."""
    with ExitStack() as stack:
        settings = dict(environ)
        if not environ.get("LLM_BASE_URL"):
            # A key is for the server it was given for.
            settings.pop("LLM_API_KEY", None)
            settings["LLM_BASE_URL"] = stack.enter_context(_running_stub(StubChatServer, _model(environ)))
        if transcriber and not environ.get("WHISPERX_URL"):
            settings.pop("WHISPERX_API_KEY", None)
            settings["WHISPERX_URL"] = stack.enter_context(_running_stub(StubWhisperXServer))
        paths = [str(Path(__file__).parents[2]), *filter(None, [environ.get("PYTHONPATH")])]
        yield {**settings, "PYTHONPATH": os.pathsep.join(paths)}


def _model(environ: Mapping[str, str]) -> str:
    return environ.get("LLM_MODEL") or DEFAULT_MODEL


@contextmanager
def _database(environ: Mapping[str, str], folder: Path) -> Iterator[str]:
    if environ.get("DATABASE_URL"):
        yield environ["DATABASE_URL"]
        return
    with embedded_postgres(folder) as url:
        yield url


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does; the first signal counts, further ones do not disturb the taking down."""

    def stop(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ── The demo ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(environ: Mapping[str, str]) -> int:
    """Runs the demo. Returns the exit status: 0 when every job completed, 1 when one did not, 130 when it was interrupted."""
    logging.getLogger("ai_service").setLevel(logging.WARNING)
    try:
        with _stopped_by_signals():
            return _demo(environ)
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running.")
        return 130
    except (DemoFailed, EmbeddedError, ServiceError) as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
        return 1


def _demo(environ: Mapping[str, str]) -> int:
    jobs = read_jobs(_model(environ))
    _print_setup(environ, jobs)
    with tempfile.TemporaryDirectory(prefix="ai-service-demo-") as folder, ExitStack() as stack:
        settings = stack.enter_context(_model_settings(environ, transcriber=True))
        settings["DATABASE_URL"] = stack.enter_context(_database(environ, Path(folder)))
        settings |= {"HTTP_HOST": "127.0.0.1", "HTTP_PORT": "0", "DRAIN_SECONDS": "0", "WORKER_SPOOL_DIR": f"{folder}/spool"}
        settings.setdefault("DATABASE_SCHEMA", "ai_service_demo")
        processes = stack.enter_context(_service_and_worker(settings, quiet=True))
        url = processes[1].environ["AI_SERVICE_URL"]
        print(f"The service listens on {url}, a worker has started.\n")
        service = stack.enter_context(AIService(url, environ.get("AI_SERVICE_TOKEN")))
        batch = service.create_jobs(jobs)
        print(f"{batch.created} jobs were sent.")
        ended = _follow(service, [job.id for job in batch.jobs], processes)
    print_results(ended)
    print(_describe_authors(environ))
    return 0 if all(job.status == "completed" for job in ended) else 1


def read_jobs(model: str) -> list[NewJob]:
    """The jobs of the file. The profile a chat worker serves bears the name of its model, so LLM_MODEL replaces it here too."""
    bodies = [json.loads(line) for line in JOBS.read_text(encoding="utf-8").splitlines()]
    return [NewJob(**(body if body["model_profile"] == "whisperx" else body | {"model_profile": model})) for body in bodies]


def _print_setup(environ: Mapping[str, str], jobs: Sequence[NewJob]) -> None:
    audio_jobs = sum(job.model_profile == "whisperx" for job in jobs)
    chat = f"the server at LLM_BASE_URL, {_model(environ)}" if environ.get("LLM_BASE_URL") else "a local stand-in: no model runs"
    place = "DATABASE_URL, schema " + environ.get("DATABASE_SCHEMA", "ai_service_demo")
    print("AI Service: jobs over REST, through a queue in PostgreSQL and a worker, to a model and back.\n")
    print(f"  database     {place if environ.get('DATABASE_URL') else 'embedded PostgreSQL, in a temporary folder'}")
    print(f"  chat         {chat}" + ("" if environ.get("LLM_BASE_URL") else " (set LLM_BASE_URL for a real one)"))
    transcriber = "the server at WHISPERX_URL" if environ.get("WHISPERX_URL") else "a local stand-in: no audio is heard"
    print(f"  transcribe   {transcriber} ({audio_jobs} of the {len(jobs)} jobs)\n", flush=True)


def _describe_authors(environ: Mapping[str, str]) -> str:
    stand_ins = [kind for name, kind in (("LLM_BASE_URL", "chat"), ("WHISPERX_URL", "transcribe")) if not environ.get(name)]
    if len(stand_ins) == 2:
        return "Stand-ins wrote all of these results; the tokens are words."
    return f"A stand-in wrote the results of {stand_ins[0]}." if stand_ins else "Model servers wrote all of these results."


def _follow(service: AIService, ids: Sequence[str], processes: Iterable[_Process]) -> list[Job]:
    """Shows each change of each job until all have ended. Raises DemoFailed when a process ends, or the time is up."""
    started = time.monotonic()
    seen: dict[str, tuple[str, int]] = {}
    while True:
        jobs = [job for job in service.get_jobs(ids) if job]
        for job in jobs:
            if seen.get(job.id, ("pending", 0)) != (job.status, job.attempt):
                seen[job.id] = (job.status, job.attempt)
                print_change(job, time.monotonic() - started)
        _print_counts(jobs)
        if all(job.finished for job in jobs):
            return [service.get_job(job_id) for job_id in ids]
        _check_progress(processes, time.monotonic() - started)
        time.sleep(0.1)


def _check_progress(processes: Iterable[_Process], seconds: float) -> None:
    for process in processes:
        if process.ended:
            raise DemoFailed(process.exit_report)
    if seconds > DEMO_SECONDS:
        raise DemoFailed(f"the jobs have not ended within {DEMO_SECONDS:.0f} s")


def print_change(job: Job, seconds: float) -> None:
    """A line that says what a job has become, these seconds after the start."""
    again = f" (attempt {job.attempt})" if job.attempt > 1 else ""
    error = job.error or (job.errors[-1] if job.errors and job.status == "pending" else None)
    why = f": {error.category}, {error.message}" if error else ""
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(clear + printable(f"{seconds:6.1f} s  {job.status:9}  {job.task_type:22}  {job.owner_ref}{again}{why}"), flush=True)


def _print_counts(jobs: Iterable[Job]) -> None:
    """The last line of a terminal, always the same one; nothing where the output goes to a file."""
    if sys.stdout.isatty():
        counts = Counter(job.status for job in jobs)
        print("\r\x1b[K" + " · ".join(f"{count} {status}" for status, count in sorted(counts.items())), end="", flush=True)


def print_results(jobs: Sequence[Job]) -> None:
    """A table of all jobs and what became of them."""
    print("\r\x1b[K" if sys.stdout.isatty() else "")
    numbers = [Column("seconds", right=True), Column("tokens", right=True)]
    table = Table(Column("task type"), Column("owner_ref"), Column("status"), *numbers, Column("result"))
    print_lines(table.lines(map(_row, jobs)))
    counts = Counter(job.status for job in jobs)
    print(f"\n{len(jobs)} jobs: " + ", ".join(f"{count} {status}" for status, count in counts.items()))


def _row(job: Job) -> tuple[str, ...]:
    seconds = f"{(job.finished_at - job.started_at).total_seconds():.2f}" if job.finished_at and job.started_at else ""
    tokens = (job.usage or {}).get("total_tokens")
    shown = f"{job.error.category}: {job.error.message}" if job.error else _result_text(job)
    return (job.task_type, job.owner_ref, job.status, seconds, "–" if tokens is None else str(tokens), shown)


def _result_text(job: Job) -> str:
    try:
        result = job.result
    except NotJSON as error:
        return f"({error})"
    text = result.get("content") or result.get("text") if isinstance(result, dict) else None
    return " ".join((text if isinstance(text, str) else json.dumps(result, ensure_ascii=False)).split())


# ── Run ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(environ: Mapping[str, str], folder: Path) -> int:
    """Keeps database, service and worker running until Ctrl-C or SIGTERM; what dies is started again. Returns the exit status.

    The data stays in `folder`. The service listens where HTTP_HOST and HTTP_PORT say, on 127.0.0.1:8080 if they are not set.
    """
    try:
        with _stopped_by_signals():
            return _run(environ, folder)
    except KeyboardInterrupt:
        print("Stopped; the data stays where it is.", file=sys.stderr)
        return 0
    except (DemoFailed, EmbeddedError) as error:
        print(f"{error}", file=sys.stderr)
        return 1


def _run(environ: Mapping[str, str], folder: Path) -> int:
    is_real = bool(environ.get("LLM_BASE_URL"))
    with ExitStack() as stack:
        settings = {
            "HTTP_HOST": "127.0.0.1",
            "DRAIN_SECONDS": "0",
            "WORKER_SPOOL_DIR": str(folder / "spool"),
            **stack.enter_context(_model_settings(environ, transcriber=not is_real)),
        }
        settings["DATABASE_URL"] = stack.enter_context(_database(environ, folder))
        processes = stack.enter_context(_service_and_worker(settings, quiet=False))
        print(f"\n  AI Service listens on {processes[1].environ['AI_SERVICE_URL']}", file=sys.stderr)
        print(f"  data         {'DATABASE_URL' if environ.get('DATABASE_URL') else folder.absolute()}", file=sys.stderr)
        print(f"  the worker   {_describe_models(environ)}\n", file=sys.stderr)
        while True:
            _restart_ended(processes)
            time.sleep(0.5)


def _describe_models(environ: Mapping[str, str]) -> str:
    """What the worker of `run` has for each profile."""
    served = {_model(environ): "LLM_BASE_URL", "whisperx": "WHISPERX_URL"}
    real = [f"{profile} on the server at {name}" for profile, name in served.items() if environ.get(name)]
    missing = [] if environ.get("LLM_BASE_URL") else [profile for profile, name in served.items() if not environ.get(name)]
    stubs = f"answers {' and '.join(missing)} by stand-ins, NO MODEL RUNS: set LLM_BASE_URL for a real one" if missing else ""
    return "; ".join(filter(None, ["runs " + ", ".join(real) if real else "", stubs]))


def _restart_ended(processes: Iterable[_Process]) -> None:
    for process in processes:
        if process.ended:
            print(f"{process.exit_report}; starting it again", file=sys.stderr)
            time.sleep(1.0)
            process.start()


def _command(arguments: Sequence[str]) -> int:
    match arguments:
        case ["run", *folder] if len(folder) < 2:
            return run(os.environ, Path(folder[0] if folder else ".data"))
        case ["chat-stub", port] if port.isdecimal():
            return run_stub(os.environ, int(port))
        case _:
            raise SystemExit("usage: python -m ai_internal.cli.demo run [FOLDER] | chat-stub PORT       (the demo itself: ai-service demo)")


if __name__ == "__main__":
    raise SystemExit(_command(sys.argv[1:]))
