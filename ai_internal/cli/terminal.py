"""What the command line shows: tables, times, JSON, and how far something is.

What callers wrote reaches a terminal as printable text; JSON keeps its meaning there, with every character that is not to be seen written
as an escape, and goes as it is into a file or a pipe.

Sections: tables, numbers and times, output, progress.
"""

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TextIO

import attrs

from ai_internal.telemetry import printable, printable_json

# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

MIN_WIDTH = 8


@attrs.frozen
class Column:
    """A column of a table: what stands over it, and how it is laid out. Numbers stand on the right, and are never cut.

    Where the terminal is too narrow, the columns with the highest `drop_order` are left out first, those without it never.
    """

    head: str
    right: bool = attrs.field(default=False, kw_only=True)
    whole: bool = attrs.field(default=attrs.Factory(lambda self: self.right, takes_self=True), kw_only=True)
    drop_order: int = attrs.field(default=0, kw_only=True)


class Table:
    """Rows as aligned lines, cut to the width of the terminal where they go to one; further rows may follow, and widen it."""

    def __init__(self, *columns: Column) -> None:
        self._columns, self._widths = columns, [_width(column.head) for column in columns]
        self._indexes: Sequence[int] = ()

    def lines(self, rows: Iterable[Sequence[str]]) -> Iterator[str]:
        """The lines of the head, once, and of the rows."""
        cells = [[printable(cell) for cell in row] for row in rows]
        for row in cells:
            self._widths = [max(width, _width(cell)) for width, cell in zip(self._widths, row, strict=True)]
        available = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        has_head, self._indexes = bool(self._indexes), self._indexes or self._visible(available)
        widths = self._fit(available)
        if not has_head:
            yield self._line([column.head for column in self._columns], widths)
        yield from (self._line(row, widths) for row in cells)

    def _visible(self, available: int | None) -> Sequence[int]:
        """The indexes of the columns that fit."""
        indexes = list(range(len(self._columns)))
        while available is not None and sum(self._min_width(index) + 2 for index in indexes) - 2 > available:
            first = max(indexes, key=lambda index: self._columns[index].drop_order)
            if not self._columns[first].drop_order:
                break
            indexes.remove(first)
        return indexes

    def _min_width(self, index: int) -> int:
        return self._widths[index] if self._columns[index].whole else min(self._widths[index], MIN_WIDTH)

    def _fit(self, available: int | None) -> Mapping[int, int]:
        widths = {index: self._widths[index] for index in self._indexes}
        while available is not None and sum(widths.values()) + 2 * (len(widths) - 1) > available:
            wide = [index for index in widths if widths[index] > self._min_width(index)]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
        return widths

    def _line(self, cells: Sequence[str], widths: Mapping[int, int]) -> str:
        return "  ".join(_aligned(cells[index], width, self._columns[index]) for index, width in widths.items()).rstrip()


def _aligned(cell: str, width: int, column: Column) -> str:
    cut = cell if _width(cell) <= width else _truncate(cell, width - 1) + "…"
    space = " " * (width - _width(cut))
    shown = coloured(cut) if column.head == "STATUS" else cut
    return space + shown if column.right else shown + space


def _width(text: str) -> int:
    """How many columns a terminal takes for it."""
    return len(text) if text.isascii() else sum(map(_width_of, text))


def _width_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _truncate(text: str, width: int) -> str:
    taken, used = "", 0
    for character in text:
        used += _width_of(character)
        if used > width:
            break
        taken += character
    return taken


# ── Numbers and times ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def duration_text(seconds: float | None) -> str:
    """A duration as short as can be: 3.2s, 47s, 12m, 5h, 9d."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    for below, unit_seconds, unit in ((120, 1, "s"), (3_600, 60, "m"), (2 * 86_400, 3_600, "h")):
        if seconds < below:
            return f"{seconds / unit_seconds:.0f}{unit}"
    return f"{seconds / 86_400:.0f}d"


def ago(at: datetime | None) -> str:
    # Another clock wrote it, which may be ahead of this one.
    return duration_text(max(0.0, (datetime.now(UTC) - at).total_seconds())) if at else "-"


def ago_text(text: str) -> str:
    return ago(datetime.fromisoformat(text))


def moment_text(at: datetime | None) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if at else "-"


# ── Output ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

COLOURS = {"failed": 31, "unavailable": 31, "completed": 32, "ok": 32, "degraded": 33, "running": 36, "cancelled": 2}


def coloured(status: str) -> str:
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{COLOURS[status]}m{status}\x1b[0m" if is_coloured and status in COLOURS else printable(status)


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def print_json(text: str, end: str = "\n") -> None:
    sys.stdout.write((printable_json(text) if sys.stdout.isatty() else text) + end)


# ── Progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Progress:
    """How far something is, on a terminal: a line on stderr that is drawn anew. `total` is what `at` counts up to, None where unknown."""

    def __init__(self, total: int | None, unit: str, output: TextIO | None = None) -> None:
        # Where the output goes to the same terminal, it would stand between the lines.
        self._is_shown = sys.stderr.isatty() and not (output and output.isatty())
        self._total, self._unit = total, unit
        self.done = 0
        self._began_at = time.monotonic()
        self._drawn_at = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def update(self, done: int, note: str = "") -> None:
        """Draws it, ten times a second at most."""
        self.done, now = done, time.monotonic()
        if not self._is_shown or now - self._drawn_at < 0.1:
            return
        self._drawn_at = now
        rate = done / max(now - self._began_at, 0.001)
        shown = f"{note or f'{done:,} {self._unit}, {rate:,.0f}/s'}"
        self._write(f"\r{self._bar(done)}{shown}\x1b[K")

    def print_line(self, line: str) -> None:
        """A line for good, above it."""
        self.clear()
        print(printable(line), file=sys.stderr)

    def clear(self) -> None:
        """Takes it away."""
        if self._is_shown and self._drawn_at:
            self._write("\r\x1b[K")

    def _bar(self, done: int) -> str:
        if not self._total:
            return ""
        share = min(1.0, done / self._total)
        return f"[{'#' * int(30 * share):<30}] {share:4.0%}  "

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
