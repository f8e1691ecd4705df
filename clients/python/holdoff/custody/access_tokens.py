"""An access token that is kept current, for the synchronous client."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from holdoff._connection import Subscription
from holdoff._core import LONGEST_SLEEP_SECONDS
from holdoff._forks import Owner
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.custody import calls
from holdoff.custody.access import Access
from holdoff.errors import HoldoffError
from holdoff.v1 import custody_service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdoff._connection import Connection
    from holdoff.custody.access import Usable
    from holdoff.errors import Unavailable
    from holdoff.v1 import grant_pb2


class AccessToken:
    """The access token of a token in custody, renewed in the background until it is closed.

    Use it as a context manager, or call `close`. While it is open the token counts as used, so
    that the coordinator refreshes it.
    """

    def __init__(
        self,
        client: Connection,
        token: str,
        on_renewed: Callable[[Usable], None] | None,
        on_unreachable: Callable[[Unavailable], None] | None,
    ) -> None:
        calls.require_private(client._is_private)  # noqa: SLF001
        self.token = token
        """`apps/{app}/tokens/{token}`."""
        self._access = Access(token)
        self._on_renewed = on_renewed
        self._changed = threading.Condition()
        self._owner = Owner()
        self._closed = False
        self._responses = Subscription[custody_service_pb2.GetAccessTokenResponse](
            client,
            self._access,
            lambda line: line.custody.GetAccessToken(
                self._access.request(),
                metadata=client._metadata(),  # noqa: SLF001
            ),
            on_unreachable,
        )
        self._thread = threading.Thread(
            target=self._listen_on, name="holdoff-access-token", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> grant_pb2.GrantStatus | None:
        """Whether an access token can be had, since when, until when, and why; None at first."""
        return self._access.status

    def current(self, wait_seconds: float | None = None) -> str:
        """Return the access token; call it anew for each call of the provider.

        It is never one that is too old: the coordinator says how long it lives, and the policy how
        long before its end no call begins with it any more. Without one it waits, unless only an
        operator can help.

        Args:
            wait_seconds: How long to wait; 0 answers at once, None waits without limit.

        Raises:
            NoAccessToken: There is none within the wait; the message says why.
            Unavailable: No coordinator answered within the wait.
            GrantNotFound: No grant of the token is in custody, or not any more.
            Refused: This caller lacks the role `gateway` on the token.
            HoldoffError: It was closed, or the stream failed for good.
        """
        return self.usable(wait_seconds).access_token

    def usable(self, wait_seconds: float | None = None, *, newer_than: int = 0) -> Usable:
        """Return the access token as `current` does, with its generation, end and hosts.

        Args:
            wait_seconds: How long to wait; 0 answers at once, None waits without limit.
            newer_than: Only one of a later generation, as when the provider refuses this one.
        """
        give_up_ns = None
        if wait_seconds is not None:
            give_up_ns = boottime_ns() + round(wait_seconds * SECOND)
        self._owner.check()  # before the lock, which in a forked child may be held for ever
        with self._changed:
            while True:
                if self._closed:
                    raise HoldoffError(f"the access token of {self.token} was closed")
                if usable := self._access.usable(newer_than):
                    return usable
                left = LONGEST_SLEEP_SECONDS
                if give_up_ns is not None:
                    left = min(left, (give_up_ns - boottime_ns()) / SECOND)
                self._access.must_wait(is_over=left <= 0)
                self._changed.wait(left)

    def close(self) -> None:
        """End it. In a forked child it does nothing."""
        if not self._owner.is_here:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._responses.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _listen_on(self) -> None:
        try:
            for response in self._responses:
                with self._changed:
                    self._changed.notify_all()
                if self._on_renewed and response.HasField("access_token"):
                    usable = self._access.usable()
                    if usable:
                        self._on_renewed(usable)
        except HoldoffError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - what a callback raised, or a channel closed
            self._end(HoldoffError(f"the stream of {self.token} ended: {error}"))

    def _end(self, error: HoldoffError) -> None:
        with self._changed:
            self._access.ended(error)
            self._changed.notify_all()
