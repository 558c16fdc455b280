"""A program at a terminal: what it draws there, and what somebody types."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from service import wait_until


class Terminal:
    """A pseudo-terminal with a program in it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, columns: int = 80, rows: int = 24) -> None:
        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm", **environment}, start_new_session=True
        )
        os.close(theirs)
        self._drawn = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Linux tells by EIO that nobody has the other end any more.
        try:
            while some := os.read(self._own, 65536):
                self._drawn += some
        except OSError:
            return

    @property
    def drawn(self) -> str:
        """All that came so far, as it came."""
        return self._drawn.decode().replace("\r\n", "\n")

    @property
    def text(self) -> str:
        """The same without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.drawn)

    def wait_for(self, text: str) -> None:
        """Returns once it stands there; AssertionError after a while."""
        wait_until(lambda: text in self.text, 20, f"{text!r} on the terminal, where {self.text!r} is,")

    def type(self, text: str) -> None:
        """Somebody types this."""
        os.write(self._own, text.encode())

    def ended(self) -> int:
        """The exit code, once all that the program wrote is here."""
        code = self.process.wait(20)
        self._reader.join(20)
        return code

    def close(self) -> None:
        """Ends the program."""
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        os.close(self._own)


@contextmanager
def terminal(command: Sequence[str], environment: Mapping[str, str], **size: int) -> Iterator[Terminal]:
    """A program at a terminal, ended at the end."""
    opened = Terminal(command, environment, **size)
    try:
        yield opened
    finally:
        opened.close()
