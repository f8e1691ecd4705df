"""What a guard is asked for and tells, on all platforms."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from holdoff.errors import HoldoffError

Isolate = Literal["auto", "always", "never"]

GUARD_LOST = "guard lost"
"""``Outcome.ended_by`` when the guard itself was killed, and its tree with it."""

BACKING_OFF = "backing off"
"""``Outcome.ended_by`` when a scope of the command had to back off."""

NOT_FOUND, NOT_EXECUTABLE = 127, 126


class GuardError(HoldoffError):
    """The guard did not start, or was gone before it could launch the command."""


class GuardLostError(GuardError):
    """The guard was killed before it could launch the command: nothing ran."""


class CannotRunError(HoldoffError):
    """A command cannot be run.

    Attributes:
        exit_code: 127 when it was not found, 126 when it is there but cannot be executed.
    """

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Stdio:
    """The three descriptors that a command gets: the one seam for its input and output."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the command while it runs."""

    kind: Literal["started", "stopped", "ending"]
    at_boottime_ns: int | None = None
    """When the command was started."""
    signal: int | None = None
    """What stopped the command."""
    reason: str | None = None
    """Why its tree gets TERM now: ``fence``, or what was passed to ``Guard.end``."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended.

    Exactly one of exit_code, signal and cannot_run is set, or none when the guard refused to
    launch because the fence had passed or an end was asked for.
    """

    exit_code: int | None = None
    signal: int | None = None
    cannot_run: CannotRunError | None = None
    ended_by: str | None = None
    """Why the guard ended it: ``fence``, ``guard lost``, ``interrupted while paused``, or the
    reason passed to ``end``."""
    survivors: int = 0
    """How many processes survived KILL: in uninterruptible sleep, or no longer ours."""

    @property
    def status(self) -> int | None:
        """The outcome as an exit status of a shell: N, 128 + signal, 126 or 127."""
        if self.cannot_run is not None:
            return self.cannot_run.exit_code
        return self.exit_code if self.signal is None else 128 + self.signal


def outcome_of(
    status: int | None, cannot_run: tuple[int, str] | None, ended_by: str | None, survivors: int
) -> Outcome:
    """An outcome as the guard reports it: ``status`` is negative for a signal."""
    if cannot_run is not None:
        number, message = cannot_run
        code = NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE
        return Outcome(cannot_run=CannotRunError(code, message))
    return Outcome(
        exit_code=status if status is not None and status >= 0 else None,
        signal=-status if status is not None and status < 0 else None,
        ended_by=ended_by,
        survivors=survivors,
    )
