"""What happened in a chaos run: one file of JSON lines a process, on one clock for all.

CLOCK_BOOTTIME is the same in every process of a machine, also in a PID namespace, and nothing steps
it. A line is written with one call, so that a process that is killed leaves at most one that is not
whole.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path


def boot() -> float:
    """Return the time, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a process did, asked or was told."""

    at: float
    who: str
    what: str
    facts: dict[str, Any] = field(default_factory=dict)

    def get(self, fact: str, default: Any = "") -> Any:
        """Return a fact."""
        return self.facts.get(fact, default)

    def __str__(self) -> str:
        told = " ".join(f"{key}={value}" for key, value in self.facts.items())
        return f"{self.who} {self.what} {told}"


class Recorder:
    """Writes the events of one process."""

    def __init__(self, folder: Path, who: str) -> None:
        self.who = who
        self._file = os.open(
            folder / f"{who}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )

    def __call__(self, what: str, *, at: float | None = None, **facts: Any) -> None:
        """Write that something happened, by default now."""
        line = {"at": boot() if at is None else at, "who": self.who, "what": what, **facts}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def read(folder: Path) -> list[Event]:
    """Return what all processes wrote, in order."""
    events = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                facts = json.loads(line)
            except ValueError:
                continue  # its process was killed in the middle
            events.append(Event(facts.pop("at"), facts.pop("who"), facts.pop("what"), facts))
    return sorted(events, key=lambda event: event.at)
