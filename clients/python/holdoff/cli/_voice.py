"""What the wrapper itself has to say, on stderr."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Self

import click

from holdoff._text import printable, printable_lines


def say(message: str) -> None:
    """Write one line of the wrapper's own to stderr."""
    write_line(f"holdoff: {message}")


def write_line(line: str) -> None:
    """Write a line to stderr. One that cannot be written is no reason to do anything else."""
    with contextlib.suppress(OSError):  # its reader has gone, or the disk is full
        click.echo(printable(line), err=True)


def confirm(question: str) -> bool:
    """Ask on stderr whether to continue."""
    return click.confirm(printable_lines(question), err=True)


class Voice:
    """Says what a run has to say in a thread of its own: who reads our stderr may block.

    Nothing waits for that but the end of the run, as `cat` would in our place.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="voice", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.put(None)
        self._thread.join()

    def say(self, message: str) -> None:
        """Say a line, soon."""
        self._lines.put(message)

    def _work(self) -> None:
        for line in iter(self._lines.get, None):
            say(line)
