"""The command line of operators and callers: `ai-service jobs | stats | workers | providers | pause | resume`.

Each command is a few calls of the HTTP client, made as the worker makes them, with the settings in
`ai_internal.client_settings`.

Tables are for people, `--json` for programs.

Sections: the words of a command, running one, jobs, many jobs, export, import, operation.
"""

import argparse
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, BinaryIO, Protocol, TypeVar

import attrs
import msgspec

from ai_client import (
    AIService,
    Forbidden,
    InvalidState,
    Job,
    JobFilter,
    NewJob,
    NotFound,
    NotJSON,
    RawJSON,
    ServiceError,
    ServiceUnavailable,
    Unauthorized,
    UnexpectedResponse,
    encode,
    object_text,
    parse_job,
    split_object,
)
from ai_internal.cli.terminal import Column, Progress, Table, ago, ago_text, coloured, duration_text, moment_text, print_json, print_lines
from ai_internal.client_settings import ClientSettings
from ai_internal.limits import MAX_ITEMS
from ai_internal.server.requests import UUID
from ai_internal.server.requests import WINDOWS as WINDOW_SECONDS
from ai_internal.telemetry import printable
from providers.settings import SettingsError, parse_duration, read_settings

T = TypeVar("T")
Item_co = TypeVar("Item_co", covariant=True)
Result = TypeVar("Result")

# ── The words of a command ───────────────────────────────────────────────────────────────────────────────────────────────────────

DONE, REFUSED, USAGE_ERROR, UNREACHABLE, NOT_ALLOWED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 4, 130, 141
EXIT_CODES = """exit codes:
  0    done
  1    something that was asked for was refused, failed or not found
  2    wrong use: arguments or settings
  3    the service, or its database, cannot be reached or cannot work now
  4    the token is missing, unknown or may not do this
  130  interrupted by Ctrl-C
  141  whoever read the output closed it"""
STATUSES = ("pending", "running", "completed", "failed", "cancelled")
WINDOWS = dict(zip(("1h", "1d", "7d"), WINDOW_SECONDS, strict=True))
DEFAULT_WINDOW, DEFAULT_LIMIT, WATCH_SECONDS = "1d", 50, 2.0
PAGE = 500


class UsageError(Exception):
    """Arguments that do not go together; the message says which would."""


class Commands(Protocol):
    """Where commands are added: argparse has no public name for it."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """A parser for what follows the name."""
        ...


def add_commands(commands: Commands) -> None:
    """Adds these commands to the parser of `ai-service`; each sets `act`, which `run` calls."""
    verbs = commands.add_parser("jobs", help="list, show, retry, cancel, import and export jobs").add_subparsers(dest="verb", required=True)
    _add_listing(verbs)
    _add_changes(verbs)
    _add_moving(verbs)
    _add_operation(commands)


def _add(commands: Commands, name: str, act: Callable[[AIService, argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
    described = about[0].upper() + about[1:] + "."
    parser = commands.add_parser(
        name,
        help=about.partition(";")[0].partition(".")[0],
        description=described,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(act=act)
    return parser


def _add_listing(verbs: Commands) -> None:
    listing = _add(verbs, "list", list_jobs, "list jobs, newest first")
    _add_filters(listing)
    listing.add_argument(
        "--limit", type=_whole, default=DEFAULT_LIMIT, metavar="N", help=f"at most so many; {DEFAULT_LIMIT} by default, 0 for all"
    )
    listing.add_argument("--json", action="store_true", help="a JSON object a line")
    show = _add(verbs, "show", show_job, "show one job with its whole story")
    show.add_argument("id", type=_text)
    payload = show.add_mutually_exclusive_group()
    payload.add_argument("--input", action="store_true", help="print the text of its input and nothing else")
    payload.add_argument("--result", action="store_true", help="print the text of its result and nothing else")
    payload.add_argument("--json", action="store_true", help="print the service's answer, input included")


def _add_changes(verbs: Commands) -> None:
    retry = _add(verbs, "retry", retry_jobs, "send failed and cancelled jobs back to pending; by id, or all that fit a filter")
    _add_filters(retry, ("failed", "cancelled"))
    cancel = _add(verbs, "cancel", cancel_jobs, "cancel pending and running jobs; by id, or all that fit a filter")
    cancel.add_argument("--reason", type=_text, help="why, for people")
    _add_filters(cancel, ("pending", "running"))
    for parser in (retry, cancel):
        parser.add_argument("ids", nargs="*", type=_text, metavar="ID")
        parser.add_argument("--dry-run", action="store_true", help="only tell how many fit")
        parser.add_argument("--yes", action="store_true", help="do not ask")
        parser.add_argument("--json", action="store_true", help="tell what was done as JSON")


EXPORT = """write jobs as JSON lines, newest first.

Without --input and --result a line has no payloads. Line ends within a payload become spaces. An export that
was interrupted goes on with --cursor and the id in its last whole line. To import jobs elsewhere in their order,
export them with --input and turn the lines round: tac jobs.jsonl | ai-service jobs import -"""
IMPORT = """create jobs from JSON lines.

A line has the fields of POST /api/v1/jobs, or is one of `jobs export --input`: of that the new job takes owner_service,
owner_ref, task_type, model_profile, input, priority, run_at, expires_at, max_attempts, traceparent, labels and
idempotency_key, and nothing of what became of the old one. A line without an idempotency_key gets one: from the id of an
exported job, else from its text, so that a second import of the same lines creates nothing, and equal lines are one job.
After an interruption run the same import again"""


def _add_moving(verbs: Commands) -> None:
    export = _add(verbs, "export", export_jobs, EXPORT)
    _add_filters(export)
    export.add_argument("--input", action="store_true", help="with the inputs")
    export.add_argument("--result", action="store_true", help="with the results")
    export.add_argument("--cursor", type=_text, metavar="ID", help="go on behind this id")
    importing = _add(verbs, "import", import_jobs, IMPORT)
    importing.add_argument("file", metavar="FILE", help="a file of JSON lines, or - for standard input")
    importing.add_argument("--keep-going", action="store_true", help="pass over lines that are refused; without it the first one ends it")
    importing.add_argument("--json", action="store_true", help="the summary as JSON")


def _add_operation(commands: Commands) -> None:
    stats = _add(commands, "stats", show_stats, "show how the queue stands; what waits, runs and failed")
    stats.add_argument("--window", choices=WINDOWS, default=DEFAULT_WINDOW, help=f"how far back endings count; {DEFAULT_WINDOW} by default")
    again = f"again and again until Ctrl-C; every {WATCH_SECONDS:g} s"
    stats.add_argument("--watch", type=_interval, nargs="?", const=WATCH_SECONDS, metavar="SECONDS", help=again)
    workers = _add(commands, "workers", show_workers, "show the workers of the last five minutes")
    listed = _add(commands, "providers", show_providers, "check the providers; those of the service, and what workers report of theirs")
    pause = _add(commands, "pause", pause_jobs, "stop handing out jobs; every combination of what is named")
    pause.add_argument("--list", action="store_true", help="only show what is paused")
    resume = _add(commands, "resume", resume_jobs, "go on handing out jobs; lifts every pause within what is named")
    for parser in (pause, resume):
        for name in ("model-profile", "task-type", "owner-service"):
            parser.add_argument(f"--{name}", type=_text, action="append", metavar="NAME", help="may be repeated")
    for parser in (stats, workers, listed, pause, resume):
        parser.add_argument("--json", action="store_true", help="the service's answer as JSON")


NAME_FILTERS = ("owner_service", "owner_ref", "task_type", "model_profile", "error_category")
TIME_FILTERS = ("created_after", "created_before")


def _add_filters(parser: argparse.ArgumentParser, statuses: Sequence[str] = STATUSES) -> None:
    filters = parser.add_argument_group("filters", "a repeated one means either, different ones must all fit")
    filters.add_argument("--status", action="append", choices=statuses)
    for name in NAME_FILTERS:
        filters.add_argument(f"--{name.replace('_', '-')}", action="append", type=_text, metavar="NAME")
    filters.add_argument("--label", action="append", type=_label, metavar="KEY:VALUE", help="a label; several must all fit")
    for name in TIME_FILTERS:
        about = "a time (RFC 3339, UTC without an offset), or how long ago, as 90s, 2h or 1h30m"
        filters.add_argument(f"--{name.replace('_', '-')}", type=_time, metavar="TIME", help=about)


def _filter_of(options: argparse.Namespace) -> JobFilter:
    given = {name: getattr(options, name) for name in ("status", *NAME_FILTERS, *TIME_FILTERS)}
    return JobFilter(**{name: value for name, value in given.items() if value is not None}, labels=dict(options.label or ()))


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None
    return text


def _label(text: str) -> tuple[str, str]:
    key, colon, value = _text(text).partition(":")
    if not colon:
        raise argparse.ArgumentTypeError("it must be KEY:VALUE")
    return key, value


def _whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError("it must be a whole number")
    return int(text)


def _interval(text: str) -> float:
    with suppress(ValueError):
        if 0.1 <= float(text) <= 3600:
            return float(text)
    raise argparse.ArgumentTypeError("it must be from 0.1 to 3600 seconds")


def _time(text: str) -> datetime:
    with suppress(ValueError, OverflowError):
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("it must be a time such as 2026-11-02T09:30:00Z, or how long ago, such as 2h") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


# ── Running one ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# How long somebody at a terminal waits for a service that is away, and how long a long transfer sits out its restart.
SHORT_SECONDS, LONG_SECONDS = 2.0, 60.0


def run(options: argparse.Namespace) -> int:
    """Runs a command; its exit code. What went wrong is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        settings = read_settings(ClientSettings, os.environ)
    except SettingsError as error:
        return _print_error(f"the settings cannot be used: {'; '.join(error.problems)}", USAGE_ERROR)
    try:
        with AIService(settings.url, settings.token, retry_seconds=SHORT_SECONDS) as service:
            code: int = options.act(service, options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more: what is still buffered must not fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return _print_error("interrupted", INTERRUPTED)
    except UsageError as error:
        return _print_error(str(error), USAGE_ERROR)
    except OSError as error:
        return _print_error(f"{error.filename or 'output'}: {error.strerror or error}", REFUSED)
    except ServiceError as error:
        return _print_error(describe_error(error, settings), code_of(error))
    return code


def _print_error(message: str, code: int) -> int:
    print(printable(f"ai-service: {message}"), file=sys.stderr)
    return code


def _show(options: argparse.Namespace, value: Any, lines: Iterable[str]) -> int:
    """Prints the value with --json, else the lines."""
    if options.json:
        print_json(encode(value))
    else:
        print_lines(lines)
    sys.stdout.flush()
    return DONE


def code_of(error: ServiceError) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, Unauthorized | Forbidden):
        return NOT_ALLOWED
    is_stranger = isinstance(error, UnexpectedResponse) or error.code.startswith("http_")
    return UNREACHABLE if is_stranger or isinstance(error, ServiceUnavailable) else REFUSED


_CONNECTION_ERRORS = {
    "NameResolutionError": "the name of the host is not known",
    "NewConnectionError": "nobody takes the connection",
    "ConnectTimeoutError": "no connection in time",
    "ReadTimeoutError": "no answer in time",
    "ProtocolError": "the connection was closed",
    "SSLError": "no TLS, or none that is trusted",
}


def describe_error(error: ServiceError, settings: ClientSettings) -> str:
    """An error as a person reads it."""
    if error.status is None and error.code == "no_answer":
        return f"no answer from {settings.url}: {_CONNECTION_ERRORS.get(error.detail or '', error.detail)}"
    if error.code.startswith("http_") or isinstance(error, UnexpectedResponse):
        return f"{settings.url} does not answer as AI Service does{f' ({error.status})' if error.status else ''}: is AI_SERVICE_URL right?"
    if isinstance(error, Unauthorized):
        return "the service does not know the token in AI_SERVICE_TOKEN" if settings.token else "a token is needed: set AI_SERVICE_TOKEN"
    if isinstance(error, Forbidden) and not error.errors:
        return "the role of the token in AI_SERVICE_TOKEN does not allow this"
    return describe_rejection(error)


def describe_rejection(error: ServiceError) -> str:
    """Why the service refused, in its own words."""
    problems = "; ".join(f"{each.path}: {each.message}".removeprefix(": ") for each in error.errors)
    return problems or error.detail or error.title or error.code


def _with_long_retries(service: AIService) -> AIService:
    """A client that retries for LONG_SECONDS, which outlasts a restart of the service.

    Raises ServiceUnavailable at once where the service is away from the beginning.
    """
    if not service.healthz():
        raise ServiceUnavailable(None, "no_answer", detail="nobody takes the connection")
    return service.clone(retry_seconds=LONG_SECONDS)


class _Paged(Protocol[Item_co]):
    @property
    def jobs(self) -> tuple[Item_co, ...]: ...
    @property
    def next_cursor(self) -> str | None: ...


def _pages(fetch: Callable[..., _Paged[T]], wanted: JobFilter, cursor: str | None = None, at_most: int = 0) -> Iterator[tuple[T, ...]]:
    """The pages of a list; 0 is all of it."""
    found = 0
    while True:
        page = fetch(wanted, limit=min(PAGE, at_most - found) if at_most else PAGE, cursor=cursor)
        yield page.jobs
        found, cursor = found + len(page.jobs), page.next_cursor
        if cursor is None or found == at_most:
            return


def _concurrently(call: Callable[[T], Result], items: Iterable[T], slots: int = 4) -> Iterator[Result]:
    """The results of so many calls at a time, in order: no more of them are held than that."""
    with ThreadPoolExecutor(slots) as pool:
        futures: deque[Future[Result]] = deque()
        try:
            for item in items:
                futures.append(pool.submit(call, item))
                if len(futures) >= slots:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# ── Jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Jobs as a table, or as the service answered them."""
    wanted = _filter_of(options)
    if options.json:
        for texts in _pages(service.list_texts, wanted, at_most=options.limit):
            for text in texts:
                print_json(_line(text))
        return DONE
    table = Table(
        Column("ID", whole=True),
        Column("STATUS", whole=True),
        Column("OWNER", drop_order=1),
        Column("REFERENCE"),
        Column("TYPE", drop_order=3),
        Column("PROFILE", drop_order=2),
        Column("TRY", right=True, drop_order=4),
        Column("AGE", right=True),
        Column("ERROR"),
    )
    found = 0
    for jobs in _pages(service.list_jobs, wanted, at_most=options.limit):
        found += len(jobs)
        print_lines(table.lines(map(_row, jobs)))
    if found == options.limit:
        print(f"The newest {found:,}; --limit shows more.", file=sys.stderr)
    return DONE


def _row(job: Job) -> Sequence[str]:
    error = job.error.category if job.error else job.errors[-1].category if job.errors and job.status != "completed" else ""
    lane = (job.owner_service, job.owner_ref, job.task_type, job.model_profile)
    return (job.id, job.status, *lane, f"{job.attempt}/{job.max_attempts}", ago(job.created_at), error)


def show_job(service: AIService, options: argparse.Namespace) -> int:
    """One job as a person reads it, as the service answered it, or one of its payloads."""
    try:
        text = service.get_text(options.id, include_input=options.input or options.json)
    except NotFound as error:
        return _no_job(options.id, error)
    if options.json:
        print_json(text.text)
        return DONE
    if options.input or options.result:
        return _show_payload(split_object(text.text.encode()), "input" if options.input else "result")
    print_lines(_job_lines(text))
    return DONE


def _no_job(job_id: str, error: NotFound) -> int:
    if not UUID.fullmatch(job_id):
        return _print_error(f"{job_id}: is not the id of a job, which is a UUID", REFUSED)
    if error.code != "job_not_found":
        raise error
    return _print_error(f"{job_id}: there is no such job", REFUSED)


def _show_payload(fields: Mapping[str, RawJSON], name: str) -> int:
    status = fields["status"].decode()
    if name == "result" and status != "completed":
        return _print_error(f"{fields['id'].decode()} has no result: it is {status}", REFUSED)
    print_json(fields[name].text, end="\n" if sys.stdout.isatty() else "")
    return DONE


_PLAIN = (
    "id",
    "status",
    "owner_service",
    "owner_ref",
    "task_type",
    "model_profile",
    "priority",
    "idempotency_key",
    "traceparent",
    "worker_id",
)
_DATED = ("created_at", "run_at", "expires_at", "started_at", "lease_expires_at", "finished_at")


def _job_lines(text: RawJSON) -> Iterator[str]:
    job = parse_job(text)
    facts = {name: str(value) for name in _PLAIN if (value := getattr(job, name)) is not None}
    facts["attempt"] = f"{job.attempt} of {job.max_attempts}"
    facts |= {name: f"{moment_text(at)}{_duration_note(job, name)}" for name in _DATED if (at := getattr(job, name))}
    facts |= {name: _object_text(value) for name in ("labels", "progress", "usage") if (value := getattr(job, name))}
    if job.error:
        facts["error"] = f"{job.error.category}: {job.error.message}"
    if job.status == "completed" and job.raw_result:
        facts["result"] = f"{len(job.raw_result.text.encode()):,} bytes; --result prints it"
    for name, value in facts.items():
        yield f"{name:<18}{coloured(value) if name == 'status' else printable(value)}"
    for error in job.errors:
        yield printable(f"attempt {error.attempt:<10}{moment_text(error.at)}  {error.category}  {error.worker_id or ''}")
        yield printable(f"{'':<18}{error.message}")
        if error.usage:
            yield printable(f"{'':<18}{_object_text(error.usage)}")


def _duration_note(job: Job, name: str) -> str:
    """How long it took to come so far."""
    if name == "started_at" and job.started_at and job.created_at:
        return f"  {duration_text((job.started_at - job.created_at).total_seconds())} after it was created"
    if name == "finished_at" and job.finished_at and job.started_at:
        return f"  {duration_text((job.finished_at - job.started_at).total_seconds())} after it was started"
    return ""


def _object_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, str) else encode(value)}" for name, value in values.items())


# ── Many jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def retry_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Retries the jobs named, or all that fit."""
    if _names_jobs(options):
        return _change_each(options, service.retry)
    wanted = _filter_of(options)
    matched = service.retry_many(wanted, dry_run=True).matched or 0
    if not _is_confirmed(options, "retry", matched):
        return _print_counts(options, retried=0, matched=matched)
    with _counting(options, "retried", matched) as progress:
        # No further than what was counted: a job that fails again at once fits again.
        while progress.done < matched:
            answer = service.retry_many(wanted, limit=min(MAX_ITEMS, matched - progress.done))
            progress.update(progress.done + answer.retried)
            if not answer.retried or not answer.more:
                break
    return DONE


def cancel_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Cancels the jobs named, or all that fit."""
    if _names_jobs(options):
        return _change_each(options, lambda job_id: service.cancel(job_id, options.reason))
    options.status = options.status or ["pending", "running"]
    matched, newest = _counted(service, _filter_of(options))
    if not _is_confirmed(options, "cancel", matched):
        return _print_counts(options, cancelled=0, matched=matched)
    # What was created since it was counted is left alone; ids are in the order of their creation.
    listed = (_id_of(text) for page in _pages(service.list_texts, _filter_of(options)) for text in page)
    ids = (job_id for job_id in listed if job_id <= newest)
    with _counting(options, "cancelled", matched) as progress:
        for is_cancelled in _concurrently(partial(_cancelled, service, options.reason), ids):
            progress.update(progress.done + is_cancelled)
    return DONE


def _counted(service: AIService, wanted: JobFilter) -> tuple[int, str]:
    """How many jobs fit, and the id of the newest."""
    matched, newest = 0, ""
    with Progress(None, "jobs counted") as progress:
        for texts in _pages(service.list_texts, wanted):
            newest = newest or (_id_of(texts[0]) if texts else "")
            matched += len(texts)
            progress.update(matched)
    return matched, newest


def _cancelled(service: AIService, reason: str | None, job_id: str) -> bool:
    # It may have ended, or left, since it was listed.
    with suppress(InvalidState, NotFound):
        service.cancel(job_id, reason)
        return True
    return False


@contextmanager
def _counting(options: argparse.Namespace, done: str, matched: int) -> Iterator[Progress]:
    """Shows how far a change is, and tells it however it ends."""
    with Progress(matched, "jobs") as progress:
        try:
            yield progress
        finally:
            progress.clear()
            _print_counts(options, **{done: progress.done, "matched": matched})


def _names_jobs(options: argparse.Namespace) -> bool:
    is_filtered = any(getattr(options, name) for name in ("status", *NAME_FILTERS, *TIME_FILTERS))
    if bool(options.ids) == is_filtered:
        raise UsageError("name the jobs by their ids, or by a filter such as --owner-service; not both")
    if options.ids and options.dry_run:
        raise UsageError("--dry-run goes with a filter")
    return bool(options.ids)


def _change_each(options: argparse.Namespace, change: Callable[[str], Job]) -> int:
    return max([_change_one(options, job_id, change) for job_id in options.ids])


def _change_one(options: argparse.Namespace, job_id: str, change: Callable[[str], Job]) -> int:
    try:
        job = change(job_id)
    except NotFound as error:
        return _no_job(job_id, error)
    except InvalidState as error:
        return _print_error(f"{job_id}: {describe_rejection(error)}", REFUSED)
    return _show(options, {"id": job.id, "status": job.status}, [printable(f"{job.id} {job.status}")])


def _is_confirmed(options: argparse.Namespace, verb: str, matched: int) -> bool:
    """Whether to go on with so many jobs. Raises WrongUse where nobody can be asked."""
    if options.dry_run or options.yes or not matched:
        return matched > 0 and not options.dry_run
    if not sys.stdin.isatty():
        raise UsageError(f"{_job_count(matched)} to {verb}: --yes is needed where nobody can be asked")
    print(f"{verb.capitalize()} {_job_count(matched)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _job_count(count: int) -> str:
    return f"{count:,} job{'' if count == 1 else 's'}"


def _print_counts(options: argparse.Namespace, **counts: int) -> int:
    return _show(options, counts, [", ".join(f"{name} {count:,}" for name, count in counts.items())])


# ── Export ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Jobs as JSON lines; tells where to go on when it is interrupted."""
    last, exported = options.cursor, 0
    try:
        with _with_long_retries(service) as client, Progress(None, "jobs", output=sys.stdout) as progress:
            for job_id, line in _exported(client, options):
                print_json(line)
                last, exported = job_id, exported + 1
                progress.update(exported)
    except (ServiceError, KeyboardInterrupt):
        if exported:
            _print_error(f"{_job_count(exported)} exported; to go on: --cursor {last}", DONE)
        raise
    return DONE


def _exported(service: AIService, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    texts = (text for page in _pages(service.list_texts, _filter_of(options), options.cursor) for text in page)
    if not (options.input or options.result):
        yield from ((_id_of(text), _line(text)) for text in texts)
        return
    left_out = {name for name in ("input", "result") if not getattr(options, name)}
    read = partial(_with_payloads, service, include_input=options.input, left_out=left_out)
    yield from (each for each in _concurrently(read, map(_id_of, texts)) if each)


def _with_payloads(service: AIService, job_id: str, *, include_input: bool, left_out: set[str]) -> tuple[str, str] | None:
    """A job's id and line; None where it was erased since it was listed."""
    try:
        fields = split_object(service.get_text(job_id, include_input=include_input).text.encode())
    except NotFound:
        return None
    return job_id, _line(RawJSON(object_text({name: value for name, value in fields.items() if name not in left_out})))


def _id_of(text: RawJSON) -> str:
    return str(split_object(text.text.encode())["id"].decode())


def _line(text: RawJSON) -> str:
    # Between the tokens of JSON a line end is a space like another; within a string none can stand.
    return text.text.replace("\r", " ").replace("\n", " ")


# ── Import ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# So much is in hand at a time; a line has a job's whole input in it, of which no service takes more than its MAX_BODY_BYTES.
BATCH_LINES, BATCH_BYTES, LINE_BYTES = 500, 4 << 20, 64 << 20
COPIED_FIELDS = tuple(field.name for field in attrs.fields(NewJob))


@attrs.frozen
class Line:
    """A line of a file: the fields of the job in it, or what is wrong with it."""

    number: int
    size: int
    fields: Mapping[str, RawJSON] = attrs.field(factory=dict)
    problem: str = ""


class ImportStopped(Exception):
    """A line was refused, and nothing behind it is to be created."""


def import_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Creates the jobs of a file; tells of each line that was refused."""
    source = sys.stdin.buffer if options.file == "-" else open(options.file, "rb")  # noqa: SIM115  closed below
    with source, _with_long_retries(service) as client, Progress(_size_of(source), "lines") as progress:
        importing = Import(client, progress, keep_going=options.keep_going)
        try:
            importing.import_all(_lines(source))
        except ImportStopped:
            _print_error(f"stopped before line {importing.ended_at:,}; --keep-going passes over what is refused", REFUSED)
        except (ServiceError, KeyboardInterrupt):
            progress.clear()
            _print_counts(options, **importing.counts)
            _print_error("not finished; run the same import again to go on", REFUSED)
            raise
        progress.clear()
    _print_counts(options, **importing.counts)
    return REFUSED if importing.refused else DONE


def _size_of(source: BinaryIO) -> int | None:
    """How many bytes there are to read; None where nobody knows."""
    with suppress(OSError, ValueError):
        status = os.fstat(source.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


def _lines(source: BinaryIO) -> Iterator[Line]:
    number = 0
    while text := source.readline(LINE_BYTES + 1):
        number += 1
        if len(text) > LINE_BYTES:
            yield Line(number, len(text) + _skip_line(source), problem=f"is longer than {LINE_BYTES >> 20} MiB")
        elif text.strip():
            yield _read_line(number, text)


def _skip_line(source: BinaryIO) -> int:
    skipped = 0
    while rest := source.readline(1 << 20):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _read_line(number: int, text: bytes) -> Line:
    bare = text.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        bare.decode()
        fields = split_object(msgspec.json.decode(bare, type=msgspec.Raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Line(number, len(text), problem=f"is not JSON: {error}")
    except NotJSON:
        return Line(number, len(text), problem="is no JSON object that can be a job")
    is_exported = {"id", "status"} <= fields.keys()
    if is_exported and "input" not in fields:
        return Line(number, len(text), problem="has no input: export with --input")
    return Line(number, len(text), _copied_fields(fields) if is_exported else _with_key(fields, bare))


def _copied_fields(fields: Mapping[str, RawJSON]) -> Mapping[str, RawJSON]:
    """What a new job takes of an exported one; the key is that of the old job, whatever becomes of it between two exports."""
    return _with_key({name: fields[name] for name in COPIED_FIELDS if name in fields}, fields["id"].text.encode())


def _with_key(fields: Mapping[str, RawJSON], source: bytes) -> Mapping[str, RawJSON]:
    if fields.get("idempotency_key", RawJSON("null")).text != "null":
        return fields
    return {**fields, "idempotency_key": RawJSON(f'"import/{hashlib.sha256(source).hexdigest()[:40]}"')}


class Import:
    """One import: creates in batches, and finds out which lines the service refuses."""

    def __init__(self, service: AIService, progress: Progress, *, keep_going: bool) -> None:
        self._service, self._progress, self._keep_going = service, progress, keep_going
        self.created = self.existing = self.refused = self.ended_at = 0
        self._done = 0

    def import_all(self, lines: Iterator[Line]) -> None:
        """Creates the jobs of all lines. Raises Stopped, and ServiceError where no line is to blame."""
        for batch in _batches(lines):
            self._import_lines(batch)
            self._done += sum(line.size for line in batch)
            self._progress.update(self._done, f"line {batch[-1].number:,}")

    @property
    def counts(self) -> dict[str, int]:
        """The summary."""
        return {"created": self.created, "existing": self.existing, "refused": self.refused}

    def _import_lines(self, lines: Sequence[Line]) -> None:
        if not lines:
            return
        problems = {line.number: line.problem for line in lines if line.problem} or self._create(lines)
        if not problems:
            return
        last = max(problems) if self._keep_going else min(problems)
        self._import_lines([line for line in lines if line.number not in problems and (self._keep_going or line.number < last)])
        for number in sorted(problems) if self._keep_going else [last]:
            self._report_rejected(number, problems[number])

    def _create(self, lines: Sequence[Line]) -> Mapping[int, str]:
        """What is wrong with which lines; nothing once their jobs are there."""
        try:
            batch = self._service.create_from([line.fields for line in lines])
        except ServiceError as error:
            return self._find_problems(lines, error)
        self.created, self.existing = self.created + batch.created, self.existing + batch.existing
        return {}

    def _find_problems(self, lines: Sequence[Line], error: ServiceError) -> Mapping[int, str]:
        """Which lines an error is about; where it does not say, each half is tried by itself. Raises it where none is."""
        if code_of(error) == UNREACHABLE or (code_of(error) == NOT_ALLOWED and not error.errors) or error.status == 500:
            raise error
        if problems := _problems_by_line(lines, error):
            return problems
        if len(lines) == 1:
            return {lines[0].number: describe_rejection(error)}
        self._import_lines(lines[: len(lines) // 2])
        self._import_lines(lines[len(lines) // 2 :])
        return {}

    def _report_rejected(self, number: int, problem: str) -> None:
        self.refused += 1
        self._progress.print_line(f"line {number:,}: {problem}")
        if not self._keep_going:
            self.ended_at = number
            raise ImportStopped


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        if batch and (len(batch) >= BATCH_LINES or size + line.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += line.size
    if batch:
        yield batch


def _problems_by_line(lines: Sequence[Line], error: ServiceError) -> Mapping[int, str]:
    problems: dict[int, list[str]] = {}
    for each in error.errors:
        if found := re.fullmatch(r"/jobs/(\d+)(/.*)?", each.path, re.DOTALL):
            problems.setdefault(lines[int(found[1])].number, []).append(f"{found[2] or 'job'} {each.message}")
    return {number: "; ".join(messages) for number, messages in problems.items()}


# ── Operation ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def show_stats(service: AIService, options: argparse.Namespace) -> int:
    """How the queue stands, once or again and again."""
    if options.watch is None:
        return _print_stats(service, options)
    with suppress(KeyboardInterrupt):
        while True:
            _watch_once(service, options)
            time.sleep(options.watch)
    return DONE


def _print_stats(service: AIService, options: argparse.Namespace) -> int:
    stats = service.stats(WINDOWS[options.window])
    return _show(options, stats, _stats_lines(service, stats, options.window))


def _watch_once(service: AIService, options: argparse.Namespace) -> None:
    if options.json or not sys.stdout.isatty():
        _print_stats(service, options)
        return
    try:
        lines = list(_stats_lines(service, service.stats(WINDOWS[options.window]), options.window))
    except ServiceUnavailable as error:
        lines = [printable(f"The service is away: {describe_rejection(error)}")]
    head = f"{moment_text(datetime.now(UTC))}  every {options.watch:g} s, Ctrl-C ends it"
    lines = [head, "", *lines][: shutil.get_terminal_size().lines - 1]
    # Over what stands there, line by line: to clear it first would flicker.
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


GROUPS = {"model_profile": "PROFILE", "owner_service": "OWNER", "task_type": "TYPE"}


def _stats_lines(service: AIService, stats: Mapping[str, Any], window: str) -> Iterator[str]:
    jobs = stats["jobs"]
    yield f"now        pending {jobs['pending']:,}   scheduled {jobs['scheduled']:,}   running {jobs['running']:,}" + (
        f"   oldest pending {duration_text(stats['oldest_pending_seconds'])}" if stats["oldest_pending_seconds"] is not None else ""
    )
    yield f"last {window}    completed {jobs['completed']:,}   failed {jobs['failed']:,}   cancelled {jobs['cancelled']:,}"
    for name, head in GROUPS.items():
        yield from _section(_group_table(head), (_group_row(row, name) for row in stats[f"by_{name}"]))
    for name, head in {"errors": "FAILED WITH", "attempt_errors": "RETRIED AFTER"}.items():
        table = Table(Column(head), Column("COUNT", right=True), Column("LAST", right=True))
        yield from _section(table, ((row["category"], f"{row['count']:,}", ago_text(row["last_at"])) for row in stats[name]))
    # Callers see their jobs, and not what operators did.
    with suppress(Forbidden):
        yield from _section(_pause_table(), map(_pause_row, service.pauses()))


def _section(table: Table, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    if listed := list(rows):
        yield ""
        yield from table.lines(listed)


def _group_table(head: str) -> Table:
    drop_order = {"CANCELLED": 1, "SCHEDULED": 2, "RUN p50/p95": 3, "WAIT p50/p95": 3}
    counts = ("PENDING", "SCHEDULED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "OLDEST", "WAIT p50/p95", "RUN p50/p95")
    return Table(Column(head), *(Column(each, right=True, drop_order=drop_order.get(each, 0)) for each in counts), Column(""))


def _group_row(row: Mapping[str, Any], name: str) -> Sequence[str]:
    counts = [f"{row[each]:,}" for each in ("pending", "scheduled", "running", "completed", "failed", "cancelled")]
    spans = ["/".join(duration_text(row[each][part]) for part in ("p50", "p95")) for each in ("waiting_seconds", "running_seconds")]
    return (row[name], *counts, duration_text(row["oldest_pending_seconds"]), *spans, "paused" if row["paused"] else "")


def show_workers(service: AIService, options: argparse.Namespace) -> int:
    """Who works."""
    workers = service.workers()
    table = Table(Column("WORKER"), Column("SEEN", right=True), Column("RUNNING", right=True), Column("VERSION"), Column("PROVIDERS"))
    return _show(options, {"workers": workers}, table.lines(map(_worker_row, workers)))


def _worker_row(worker: Mapping[str, Any]) -> Sequence[str]:
    running = f"{worker.get('running', '-')}/{worker.get('capacity', '-')}"
    providers = ", ".join(f"{each['name']} {each['status']}{_circuit(each)}" for each in worker.get("providers") or ())
    return worker["worker_id"], ago_text(worker["seen_at"]), running, str(worker.get("version") or ""), providers


def _circuit(provider: Mapping[str, Any]) -> str:
    circuit = provider.get("circuit") or "closed"
    return "" if circuit == "closed" else f" ({circuit})"


def show_providers(service: AIService, options: argparse.Namespace) -> int:
    """How model services are doing, seen from the service and from each worker."""
    status = service.providers_status()
    seen = [("service", each) for each in status["providers"]]
    seen += [(worker["worker_id"], each) for worker in status["workers"] for each in worker.get("providers") or ()]
    table = Table(Column("SEEN BY"), Column("PROVIDER"), Column("STATUS"), Column("CIRCUIT"), Column("PROFILES"), Column("DETAIL"))
    return _show(options, status, table.lines(_provider_row(where, each) for where, each in seen))


def _provider_row(where: str, each: Mapping[str, Any]) -> Sequence[str]:
    latency = f"{each['latency_ms']:g} ms" if each.get("latency_ms") is not None else ""
    detail = ", ".join(filter(None, (each.get("endpoint"), latency, each.get("detail"))))
    return where, each["name"], each["status"], each.get("circuit") or "", ", ".join(each.get("model_profiles") or ()), detail


def pause_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Pauses what is named, or shows what is paused."""
    if options.list and not any(_selected_names(options).values()):
        return _show_pauses(service.pauses(), options)
    if options.list:
        raise UsageError("--list shows everything that is paused; it goes with no name")
    return _show_pauses(service.pause(**_required_names(options))["paused"], options)


def resume_jobs(service: AIService, options: argparse.Namespace) -> int:
    """Lifts pauses."""
    return _show_pauses(service.resume(**_required_names(options))["paused"], options)


def _selected_names(options: argparse.Namespace) -> dict[str, list[str] | None]:
    return {f"{name}s": getattr(options, name) for name in GROUPS}


def _required_names(options: argparse.Namespace) -> dict[str, list[str] | None]:
    named = _selected_names(options)
    if not any(named.values()):
        raise UsageError("name a --model-profile, a --task-type or an --owner-service")
    return named


def _show_pauses(rules: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> int:
    lines = _pause_table().lines(map(_pause_row, rules)) if rules else ["Nothing is paused."]
    return _show(options, {"paused": rules}, lines)


def _pause_table() -> Table:
    return Table(Column("PAUSED PROFILE"), Column("TYPE"), Column("OWNER"), Column("SINCE", right=True))


def _pause_row(rule: Mapping[str, Any]) -> Sequence[str]:
    return (*(rule[name] or "any" for name in ("model_profile", "task_type", "owner_service")), ago_text(rule["paused_at"]))
