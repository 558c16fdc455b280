"""The log and the terminal: one line for each event, whoever had a say in its text.

What callers, model services and proxies send may stand in an event. A line end in it would forge another event, an escape sequence would
reach the terminal of who reads it: both are written as escapes, and every line of a traceback begins with a bar.
"""

import logging
from types import TracebackType
from typing import TypeAlias

_ExceptionInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def printable(text: str) -> str:
    """The text with every character that is not to be seen, but spaces, written as Python would."""
    return text if text.isprintable() else "".join(_printable(character) for character in text)


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class LineFormatter(logging.Formatter):
    """Makes of each event one line, and of its traceback lines that cannot be taken for events."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name in logging
        """The event as a line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802  the name in logging
        """The traceback, behind bars."""
        return "\n".join(f"  | {printable(line)}" for line in super().formatException(ei).splitlines())


def log_to_stderr() -> None:
    """Begins to log, from INFO on; does nothing where somebody has begun before."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
