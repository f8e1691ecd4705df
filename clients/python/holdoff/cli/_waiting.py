"""What a waiting command shows: a live line on a terminal, a line a change in a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import TYPE_CHECKING, Self

from holdoff._text import printable
from holdoff.cli._voice import say
from holdoff.durations import format_duration

if TYPE_CHECKING:
    from rich.text import Text

    from holdoff import Unavailable
    from holdoff.v1 import lease_pb2


class WaitDisplay:
    """Shows what a request waits for until it is left."""

    def __init__(self, token: str, endpoint: str) -> None:
        self._token = token
        self._endpoint = endpoint
        self._began = time.monotonic()
        self._said: object = None
        self._what = "asking the coordinator"
        self._start_at: float | None = None
        self._until = ""
        self._stack = contextlib.ExitStack()
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Self:
        if self._live:
            from rich.console import Console  # noqa: PLC0415 - only a terminal pays for it
            from rich.live import Live  # noqa: PLC0415

            live = Live(
                get_renderable=self._line,
                console=Console(stderr=True),
                transient=True,
                refresh_per_second=4,
            )
            self._stack.enter_context(live)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def waiting(self, status: lease_pb2.WaitStatus) -> None:
        """Show what the coordinator said."""
        position = f"position {status.place} of {status.queue_length}: " if status.place else ""
        self._what = f"{position}{status.message}"
        if status.blocking_back_off:
            self._what += f" (more: holdoff explain {self._token})"
        self._start_at, self._until, start = None, "earliest start in {}", ""
        if status.HasField("earliest_start_in"):
            start_in = status.earliest_start_in.ToMicroseconds() / 1e6
            self._start_at = time.monotonic() + start_in
            start = f"; earliest start in {format_duration(round(start_in, 1))}"
        change = (
            *(status.reason, status.place),
            *(status.blocking_lease.name, status.blocking_lease.activity),
            *(status.blocking_lease.activity_message, status.blocking_back_off),
        )
        self._tell(change, f"{self._what}{start}")

    def no_access_token(self, change: object, why: str, in_log: str, ends_in: float | None) -> None:
        """Show why there is no access token yet.

        Args:
            change: In a log it is shown only when this is another one.
            why: The state and the reason.
            in_log: The same, with instants.
            ends_in: After how many seconds the state ends, if that is known.
        """
        self._what, self._until = f"no access token: {why}", "{} left"
        self._start_at = None if ends_in is None else time.monotonic() + ends_in
        self._tell(change, f"no access token: {in_log}")

    def unreachable(self, error: Unavailable) -> None:
        """Show that no coordinator answers."""
        what = error if error.reason else f"no answer from {self._endpoint}"
        self._what, self._start_at = f"{what}, retrying", None
        self._tell((type(error), error.reason), f"{error}; retrying")

    def _tell(self, change: object, text: str) -> None:
        if not self._live and change != self._said:
            say(f"waiting for {self._token}, {text}")
        self._said = change

    def _line(self) -> Text:
        from rich.text import Text  # noqa: PLC0415 - only a terminal pays for it

        waited = format_duration(int(time.monotonic() - self._began))
        line = f"holdoff: waited {waited}"
        if self._start_at is not None:
            left = max(0, math.ceil(self._start_at - time.monotonic()))
            line += f", {self._until.format(format_duration(left))}"
        # What changes stands first: a narrow terminal cuts the end.
        return Text(printable(f"{line}; {self._what}"), overflow="ellipsis", no_wrap=True)
