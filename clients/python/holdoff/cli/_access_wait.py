"""Waits for the access token of a token in custody, and shows why there is none."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from holdoff._core import NO_WAIT_SECONDS
from holdoff.cli._waiting import WaitDisplay
from holdoff.cli.output import NOTHING, enum_text, time_text
from holdoff.errors import HoldoffError, NoAccessToken, Unavailable
from holdoff.v1 import grant_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdoff import AccessToken

POLL_SECONDS: Final = 0.25
"""A pause is at most so long."""


def wait_for_access_token(
    access: AccessToken, endpoint: str, wait_seconds: float | None, pause: Callable[[], None]
) -> None:
    """Wait until there is an access token, and show why there is none.

    Args:
        access: What is waited for.
        endpoint: Of the coordinator.
        wait_seconds: How long to wait; None waits without limit.
        pause: Returns as soon as there is one, or after `POLL_SECONDS`.

    Raises:
        NoAccessToken: There is none within the wait, or only an operator can help.
        HoldoffError: There is no grant, the caller may not use it, or no coordinator answers.
    """
    began = time.monotonic()
    with WaitDisplay(access.token, endpoint) as display:
        while True:
            try:
                access.usable(wait_seconds=0)
            except (NoAccessToken, Unavailable) as error:
                waited = time.monotonic() - began
                _give_up(access, error, None if wait_seconds is None else wait_seconds - waited)
                if isinstance(error, Unavailable):
                    display.unreachable(error)
            else:
                return
            if access.status:
                _show(display, access.status)
            pause()


def _give_up(access: AccessToken, error: HoldoffError, left: float | None) -> None:
    """Raise if it makes no sense to wait any longer.

    Raises:
        HoldoffError: It does not.
    """
    if isinstance(error, NoAccessToken) and error.needs_operator:
        raise error
    # Also who does not want to wait waits for an answer.
    patience = 0 if access.status else NO_WAIT_SECONDS
    if left is not None and left + patience <= 0:
        raise error


def _show(display: WaitDisplay, status: grant_pb2.GrantStatus) -> None:
    """Show in which state a grant is, since when, until when and why."""
    state, until = enum_text(status, "state"), time_text(status, "until_time")
    when = "".join(
        f" {word} {text}"
        for word, text in (("since", time_text(status, "since_time")), ("until", until))
        if text != NOTHING
    )
    # The end of a lease moves with each of its renewals.
    moves = status.state == grant_pb2.GRANT_STATE_HELD
    ends_in = None
    if status.HasField("until_time"):
        ends_in = status.until_time.ToNanoseconds() / 1e9 - time.time()
    display.no_access_token(
        (state, status.message, moves or until),
        f"{state}: {status.message}",
        f"{state}{when}: {status.message}",
        ends_in,
    )
