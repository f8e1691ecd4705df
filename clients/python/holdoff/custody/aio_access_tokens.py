"""An access token that is kept current, for the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from holdoff._core import LONGEST_SLEEP_SECONDS
from holdoff._forks import Owner
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.custody import calls
from holdoff.custody.access import Access
from holdoff.errors import HoldoffError

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdoff._aio_connection import Connection
    from holdoff.custody.access import Usable
    from holdoff.errors import Unavailable
    from holdoff.v1 import grant_pb2


class AccessToken:
    """The access token of a token in custody, renewed in the background until it is closed.

    Use it as an async context manager, or call `close`. While it is open the token counts as
    used, so that the coordinator refreshes it.
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
        self._client = client
        self._access = Access(token)
        self._on_renewed = on_renewed
        self._on_unreachable = on_unreachable
        self._changed = asyncio.Event()
        self._owner = Owner()
        self._closed = False
        self._task = client._start(self._listen_on())  # noqa: SLF001

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def status(self) -> grant_pb2.GrantStatus | None:
        """Whether an access token can be had, since when, until when, and why; None at first."""
        return self._access.status

    async def current(self, wait_seconds: float | None = None) -> str:
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
        return (await self.usable(wait_seconds)).access_token

    async def usable(self, wait_seconds: float | None = None, *, newer_than: int = 0) -> Usable:
        """Return the access token as `current` does, with its generation, end and hosts.

        Args:
            wait_seconds: How long to wait; 0 answers at once, None waits without limit.
            newer_than: Only one of a later generation, as when the provider refuses this one.
        """
        give_up_ns = None
        if wait_seconds is not None:
            give_up_ns = boottime_ns() + round(wait_seconds * SECOND)
        self._owner.check()
        while True:
            changed = self._changed
            if self._closed or self._task.cancelled():
                raise HoldoffError(f"the access token of {self.token} was closed")
            if usable := self._access.usable(newer_than):
                return usable
            left = LONGEST_SLEEP_SECONDS
            if give_up_ns is not None:
                left = min(left, (give_up_ns - boottime_ns()) / SECOND)
            self._access.must_wait(is_over=left <= 0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()

    async def close(self) -> None:
        """End it. In a forked child it does nothing."""
        if not self._owner.is_here:
            return
        self._closed = True
        self._wake()
        if self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.wait([self._task])

    def _wake(self) -> None:
        """Wake all who wait for news."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _listen_on(self) -> None:
        responses = self._client._listen(  # noqa: SLF001
            self._access,
            lambda line: line.custody.GetAccessToken(
                self._access.request(),
                metadata=self._client._metadata(),  # noqa: SLF001
            ),
            self._on_unreachable,
        )
        try:
            async with contextlib.aclosing(responses):
                async for response in responses:
                    self._wake()
                    if self._on_renewed and response.HasField("access_token"):
                        usable = self._access.usable()
                        if usable:
                            self._on_renewed(usable)
        except HoldoffError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - what a callback raised, or a channel closed
            self._end(HoldoffError(f"the stream of {self.token} ended: {error}"))
        finally:
            self._wake()

    def _end(self, error: HoldoffError) -> None:
        self._access.ended(error)
        self._wake()
