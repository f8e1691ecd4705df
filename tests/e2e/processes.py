"""Programs to run, and terminals to run them on, as a user would."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAMS = Path(__file__).parent / "programs"

KILL_ROOM_SECONDS = 0.1
"""So long before the fence a guard begins to send KILL."""
LATE_SECONDS = 0.5
"""So late a guard may be on a busy machine."""


def python(program: str, *arguments: object) -> list[str]:
    """A command that runs a short Python program, which has the standard library alone."""
    return [sys.executable, "-I", "-S", "-c", program, *map(str, arguments)]


def program(name: str, *arguments: object) -> list[str]:
    """A command that runs one of `programs/`, which has the standard library alone."""
    return [sys.executable, "-I", "-S", str(PROGRAMS / f"{name}.py"), *map(str, arguments)]


def library_program(name: str, *arguments: object) -> list[str]:
    """A command that runs one of `programs/` that uses the library."""
    return [sys.executable, "-I", str(PROGRAMS / f"{name}.py"), *map(str, arguments)]


def held_up(stamps: Sequence[float]) -> float:
    """Return the longest time between two stamps of a program that makes many a second."""
    return max((later - sooner for sooner, later in itertools.pairwise(stamps)), default=0.0)


def ended_before(instant: float, *programs: Sequence[float]) -> bool:
    """Tell whether none of some programs made a stamp at an instant, or later.

    It may be later by what the machine held up one of them, if that is longer than the room that a
    guard has for KILL. On a machine with more to run than processors the guard too may be held up:
    then it may be late, but by less than any grace of these tests.
    """
    longest = max(map(held_up, programs))
    allowed = longest if longest > KILL_ROOM_SECONDS else 0
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        allowed = max(allowed, LATE_SECONDS)
    return max(stamps[-1] for stamps in programs) < instant + allowed


class Terminal:
    """A pseudo-terminal with a program on it, as a user would see it."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)  # noqa: S606
        self.screen = ""

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._fd, text.encode())

    def expect(self, text: str, seconds: float = 30) -> None:
        """Wait until the text appears after what was expected before."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} not in {self.screen!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.screen, f"{text!r} not in {self.screen!r}"
        self.screen = self.screen.partition(text)[2]

    def rest(self) -> str:
        """Wait for the end of the program; return what it wrote since, without colours."""
        with contextlib.suppress(OSError):  # how a terminal says that nobody has it open
            while data := os.read(self._fd, 4096):
                self.screen += data.decode(errors="replace")
        self.close()
        return re.sub(r"\x1b\[[0-9;]*m", "", self.screen)

    def foreground(self) -> int:
        """Return the process group that the terminal's keys go to."""
        return os.tcgetpgrp(self._fd)

    def resize(self, rows: int, columns: int) -> None:
        """Drag the window to another size."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._fd)
        os.waitpid(self.pid, 0)
