"""The token in custody of a run: the command starts when it has an access token."""

from __future__ import annotations

import contextlib
import queue
from typing import TYPE_CHECKING, Self

from holdoff.cli._access_wait import POLL_SECONDS, wait_for_access_token

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from holdoff import AccessToken, Client


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
        wait_for_access_token(self._access, self._client.endpoint, wait_seconds, self._pause)

    def _pause(self) -> None:
        with self._interruptible(), contextlib.suppress(queue.Empty):
            self._news.get(timeout=POLL_SECONDS)
