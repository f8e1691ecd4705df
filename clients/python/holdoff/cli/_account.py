"""What a run was asked for, and what happened in it."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from holdoff import _files
from holdoff.cli import exits
from holdoff.cli._voice import say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from holdoff._outcome import Isolate
    from holdoff._timing import Timing
    from holdoff.cli._conduct import WhenQuiet


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal ended the wait."""

    def __init__(self, signum: int) -> None:
        # Of the real-time signals only the first and the last have a name.
        known = signum in signal.Signals.__members__.values()
        name = signal.Signals(signum).name if known else f"signal {signum}"
        super().__init__(f"ended by {name} while waiting")
        self.signum = signum


@dataclass(frozen=True, slots=True)
class Order:
    """How a command is to run."""

    coordinator: str
    """The endpoint."""
    timing: Timing
    scopes: Sequence[tuple[str, str]]
    """Where the command will call: pairs of a division and an endpoint."""
    when_quiet: WhenQuiet | None
    isolate: Isolate
    log_file: Path | None
    read_output: bool
    trust_output: bool
    """Whether markers in the output count without the key of the run."""
    access_token_file: Path | None = None
    """Where the command finds the access token of its token, which is in custody."""
    gateway: bool = False
    """Whether the command calls the API through a gateway of its own."""


@dataclass(slots=True)
class Account:
    """What happened, for `--result-file`: a child may itself exit with 75 or 79."""

    token: str
    job: str
    labels: Mapping[str, str]
    outcome: Literal[
        "exited",
        "signaled",
        "lease_lost",
        "backed_off",
        "not_granted",
        "unreachable",
        "refused",
        "cannot_run",
        "interrupted",
        "failed",
    ] = "failed"
    exit_code: int = exits.INTERNAL
    """The exit code of `holdoff run`."""
    child_exit_code: int | None = None
    child_signal: int | None = None
    lease: str | None = None
    """Name of the lease; absent when the command ran without one, or did not run."""
    lease_mode: Literal["exclusive", "shared"] | None = None
    fencing_token: int | None = None
    reason: str = ""
    """Why there was no lease, why it was lost, or why the command had to be quiet."""
    errors_seen: int = 0
    """Errors and blocks seen in what the command wrote."""
    requested_at: str = ""
    started_at: str | None = None
    ended_at: str | None = None
    waited_seconds: float | None = None

    def write(self, path: Path) -> None:
        """Write the account whole or not at all; a failure is reported and changes nothing."""
        try:
            _files.write(path, json.dumps(asdict(self), indent=2).encode() + b"\n", mode=0o666)
        except (OSError, ValueError) as error:
            say(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


def now() -> str:
    """Return the time of day, as the account gives it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
