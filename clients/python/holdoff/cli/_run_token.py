"""The token in custody of a run: the command starts when it has an access token."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING, Final, Self

from holdoff._core import NO_WAIT_SECONDS
from holdoff.cli._waiting import WaitDisplay
from holdoff.cli.output import NOTHING, enum_text, time_text
from holdoff.errors import HoldoffError, NoAccessToken, Unavailable
from holdoff.v1 import grant_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from holdoff import AccessToken, Client

_POLL_SECONDS: Final = 0.25


class RunToken:
    """Keeps a token in custody in use, from entering to leaving.

    Args:
        client: Where the coordinator is.
        token: `apps/{app}/tokens/{token}`.
        interruptible: Entered where it waits: a signal handler raises there, and only there.
    """

    def __init__(
        self,
        client: Client,
        token: str,
        interruptible: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._client = client
        self._token = token
        self._interruptible = interruptible
        self._news: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._access: AccessToken = stack.enter_context(
                self._client.access_token(self._token, on_renewed=self._news.put)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Open what is closed after the access token."""

    def begin(self) -> Mapping[str, str]:
        """Begin to serve the command; return what its environment has besides.

        Raises:
            HoldoffError: It cannot be served.
        """
        raise NotImplementedError

    def wait(self, wait_seconds: float | None) -> None:
        """Wait until there is an access token, and show why there is none.

        Raises:
            NoAccessToken: There is none within the wait, or only an operator can help.
            HoldoffError: There is no grant, the caller may not use it, or no coordinator answers.
        """
        began = time.monotonic()
        with WaitDisplay(self._token, self._client.endpoint) as display:
            while True:
                try:
                    self._access.usable(wait_seconds=0)
                except (NoAccessToken, Unavailable) as error:
                    waited = time.monotonic() - began
                    self._give_up(error, None if wait_seconds is None else wait_seconds - waited)
                    if isinstance(error, Unavailable):
                        display.unreachable(error)
                else:
                    return
                if self._access.status:
                    display.no_access_token(*_why(self._access.status))
                with self._interruptible(), contextlib.suppress(queue.Empty):
                    self._news.get(timeout=_POLL_SECONDS)

    def _give_up(self, error: HoldoffError, left: float | None) -> None:
        """Raise if it makes no sense to wait any longer.

        Raises:
            HoldoffError: It does not.
        """
        if isinstance(error, NoAccessToken) and error.needs_operator:
            raise error
        # Also who does not want to wait waits for an answer.
        patience = 0 if self._access.status else NO_WAIT_SECONDS
        if left is not None and left + patience <= 0:
            raise error


def _why(status: grant_pb2.GrantStatus) -> tuple[object, str]:
    """Say in which state a grant is, since when, until when and why; and what of it is news."""
    state, until = enum_text(status, "state"), time_text(status, "until_time")
    when = "".join(
        f" {word} {text}"
        for word, text in (("since", time_text(status, "since_time")), ("until", until))
        if text != NOTHING
    )
    # The end of a lease moves with each of its renewals.
    moves = status.state == grant_pb2.GRANT_STATE_HELD
    return (state, status.message, moves or until), f"{state}{when}: {status.message}"
