"""The log and the trace. One line for each event, as text or as JSON, whoever had a say in its text; one traceparent after the other.

An event is logged as `log.info("job_lost id=%s code=%s", …)`: what happened, in the past tense, and pairs. The members of its JSON are the
pairs of the format string, so nothing that is sent makes another. What is known of the work at hand, as the id of the request, is `about`
it and comes with every event.

What callers, model services and proxies send may stand in an event. A line end in it would forge another event, an escape sequence would
reach the terminal of who reads it: both are written as escapes, and in text every line of a traceback begins with a bar.
"""

import functools
import json
import logging
import math
import os
import random
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TypeAlias

log = logging.getLogger("ai_service.process")

_ExceptionInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

TEXT, JSON = "text", "json"


def read_log_format(text: str) -> str:
    """A LOG_FORMAT. Raises ValueError."""
    if text not in (TEXT, JSON):
        raise ValueError("must be text or json")
    return text


def printable(text: str) -> str:
    """The text with every character that is not to be seen, but spaces, written as Python would."""
    return text if text.isprintable() else "".join(_printable(character) for character in text)


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


# ── What the work at hand is about ───────────────────────────────────────────────────────────────────────────────────────────────

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039  nobody changes it, it is replaced
# An id that may be shown.
REQUEST_ID = r"[A-Za-z0-9._:/@+=-]{1,128}"
_REQUEST_ID = re.compile(REQUEST_ID)


@contextmanager
def about(**facts: str | None) -> Iterator[None]:
    """Within it every event of this thread has these facts beside those it had; None is no fact."""
    before = _about.set({**_about.get(), **{name: fact for name, fact in facts.items() if fact}})
    try:
        yield
    finally:
        _about.reset(before)


def begin_request(given: str | None, **facts: str) -> str:
    """From now on this thread works for a request: the id it came with, or one that is made where it came with none that may be shown."""
    request_id = given if given and _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
    _about.set({"request_id": request_id, **facts})
    return request_id


def request_id() -> str:
    """The id of the request that this thread works for; empty for none."""
    return _about.get().get("request_id", "")


# ── An event as a line ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class LineFormatter(logging.Formatter):
    """Makes of each event one line, and of its traceback lines that cannot be taken for events."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name in logging
        """The event as a line."""
        facts = "".join(f" {name}={fact}" for name, fact in _about.get().items())
        return printable(super().formatMessage(record) + facts)

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802  the name in logging
        """The traceback, behind bars."""
        return "\n".join(f"  | {printable(line)}" for line in super().formatException(ei).splitlines())


_PAIR = re.compile(r" (\w+)=(%[-+ #0]*\d*(?:\.\d+)?[sdrfg]|[^\s%=]+)")
_EVENT = re.compile(rf"([a-z][a-z0-9_]*)((?:{_PAIR.pattern})*)")


class JsonFormatter(logging.Formatter):
    """Makes of each event one JSON object on one line.

    It has `time`, `level`, `logger`, `event` and its pairs, numbers as numbers; what others log in their own words has a `message`
    instead. A traceback is the member `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The event as a line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"time": at, "level": record.levelname, "logger": record.name}
        members = _members(record)
        members |= {name: fact for name, fact in _about.get().items() if name not in members}
        members |= {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return json_line(head | {name: value for name, value in members.items() if name not in head})


def json_line(value: Mapping[str, Any]) -> str:
    """JSON of printable text; half a surrogate pair, which no JSON can say, is the text of one."""
    return printable_json(json.dumps(value, ensure_ascii=False, allow_nan=False))


def printable_json(text: str) -> str:
    """The same JSON without characters that are not to be seen: outside of strings there are none but line ends and tabs, which stay."""
    return text if text.isprintable() else re.sub(r"[^\n\t -~]", lambda found: _json_escape(found[0]), text)


def _json_escape(character: str) -> str:
    if character.isprintable():
        return character
    if "\ud800" <= character <= "\udfff":
        return f"\\\\u{ord(character):04x}"
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[offset]:02x}{units[offset + 1]:02x}" for offset in range(0, len(units), 2))


@functools.lru_cache(maxsize=1024)
def event_pattern(message: str) -> tuple[str, list[tuple[str, str]]] | None:
    """The name of an event, and its pairs as name and conversion; None for other words."""
    match = _EVENT.fullmatch(message)
    return (match[1], _PAIR.findall(match[2])) if match else None


def _members(record: logging.LogRecord) -> dict[str, Any]:
    """What an event tells. A stranger's whose arguments do not fit its words has its words only."""
    pattern = event_pattern(record.msg) if isinstance(record.msg, str) else None
    try:
        return _pairs(*pattern, record) if pattern else {"message": record.getMessage()}
    except Exception:  # noqa: BLE001  it may raise anything, and the event must be told
        return {"message": str(record.msg)}


def _pairs(event: str, pairs: Sequence[tuple[str, str]], record: logging.LogRecord) -> dict[str, Any]:
    arguments = iter(record.args if isinstance(record.args, tuple) else (record.args,))
    values = {name: _value(conversion, next(arguments)) if conversion.startswith("%") else conversion for name, conversion in pairs}
    return {"event": event} | values | {"event": event}


def _value(conversion: str, value: Any) -> Any:
    """A value as JSON has it: what the text would round is rounded, what it would quote stands as it is."""
    if isinstance(value, float) and math.isfinite(value):
        return float(conversion % value) if conversion[-1] in "fg" else value
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return list(value)
    return conversion % (value,)


# ── Logging to stderr ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def log_to_stderr(environ: Mapping[str, str] = os.environ) -> None:
    """Begins to log, from INFO on, in the LOG_FORMAT of these settings; does nothing where somebody has begun before.

    A format that is none is text here: the settings say what is wrong with it. Warnings of Python, and what ends a thread or the process,
    are events too.
    """
    if logging.getLogger().handlers:
        return
    is_json = environ.get("LOG_FORMAT", "").strip() == JSON
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if is_json else LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(capture=True)
    sys.excepthook, threading.excepthook = _log_uncaught, _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("process_broke", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value and not isinstance(failed.exc_value, SystemExit):
        log.critical("thread_broke thread=%s", failed.thread and failed.thread.name, exc_info=failed.exc_value)


def log_crash(logger: logging.Logger, event: str, error: Exception, *values: object) -> None:
    """Logs a mistake of our own with its stack: an event and the values of its pairs.

    The error of a database, whose first argument is a dict of the fields of PostgreSQL's protocol,
    shows its SQLSTATE and message only: its details may quote a row.
    """
    fields = error.args[0] if error.args else None
    if isinstance(fields, dict) and {"C", "M"} <= fields.keys():
        logger.error(f"{event} sqlstate=%s error=%r", *values, fields["C"], fields["M"])  # noqa: G004  a format
    else:
        logger.error(event, *values, exc_info=error)


def complain(title: str, problems: Sequence[str] = ()) -> None:
    """Tells on stderr why a command cannot go on: people in words and lines, programs that read LOG_FORMAT=json in an event."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.error("command_refused reason=%s problems=%s", title, list(problems))
    else:
        print("\n  - ".join(map(printable, [f"{title}:" if problems else title, *problems])), file=sys.stderr)


# ── The trace ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# W3C trace context, level 2: a trace spans the caller, the queue, each attempt and the model server by one `traceparent` after the other.
# A traceparent is `00-<trace id>-<span id>-<flags>`. The caller's is kept with its job. Each attempt is a span of its own under it, which
# the model server is told of. `tracestate`, which only makers of tracing systems read, is not kept: the standard lets anybody drop it.

# No version ff, and no id of zeros.
TRACEPARENT = "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_HEADER = re.compile(f"({TRACEPARENT})(-.*)?")
_KNOWN_FLAGS = 0x03  # sampled, and a random trace id


def read_traceparent(header: str | None) -> str | None:
    """A traceparent header as a job keeps it; None for one that the standard has one ignore."""
    match = _HEADER.fullmatch(header) if header else None
    # A later version may say more behind it; of any this much is known, and known as version 00.
    return f"00{match[1][2:]}" if match and not (match[2] and match[1].startswith("00")) else None


def child_of(traceparent: str | None) -> str | None:
    """A new span of the same trace below this one; None without a trace."""
    parent = read_traceparent(traceparent)
    if not parent:
        return None
    flags = int(parent[-2:], 16) & _KNOWN_FLAGS
    return f"{parent[:36]}{random.getrandbits(64) or 1:016x}-{flags:02x}"


def trace_id(traceparent: str | None) -> str | None:
    """The id of the trace, for the log."""
    parent = read_traceparent(traceparent)
    return parent and parent[3:35]


def span_id(traceparent: str | None) -> str | None:
    """The id of the span, for the log."""
    parent = read_traceparent(traceparent)
    return parent and parent[36:52]


def about_span(traceparent: str | None) -> AbstractContextManager[None]:
    """Within it every event has the ids of an attempt's trace and span, where it is part of one."""
    return about(trace_id=trace_id(traceparent), span_id=span_id(traceparent))
