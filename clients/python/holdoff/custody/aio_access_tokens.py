"""An access token that is kept current, for the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
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


class _Shared:
    """The stream of one access token, for all of one client that use it."""

    def __init__(self, client: Connection, token: str) -> None:
        self.access = Access(token)
        self.changed = asyncio.Event()
        """Set once: the next change has another one."""
        self.users: list[AccessToken] = []
        self._client = client
        self._token = token
        self.task = client._start(self._listen_on())  # noqa: SLF001

    def wake(self) -> None:
        """Wake all who wait for news."""
        self.changed.set()
        self.changed = asyncio.Event()

    async def close(self) -> None:
        """End it."""
        if self.task is not asyncio.current_task():
            self.task.cancel()
            await asyncio.wait([self.task])

    async def _listen_on(self) -> None:
        responses = self._client._listen(  # noqa: SLF001
            self.access,
            lambda line: line.custody.GetAccessToken(
                self.access.request(),
                metadata=self._client._metadata(),  # noqa: SLF001
            ),
            self._unreachable,
        )
        try:
            async with contextlib.aclosing(responses):
                async for response in responses:
                    self.wake()
                    usable = self.access.usable() if response.HasField("access_token") else None
                    for user in list(self.users):
                        user._renewed(usable)  # noqa: SLF001 - its other half
        except HoldoffError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - a channel closed under us
            self._end(HoldoffError(f"the stream of {self._token} ended: {error}"))
        finally:
            self.wake()

    def _unreachable(self, error: Unavailable) -> None:
        for user in list(self.users):
            user._unreachable(error)  # noqa: SLF001 - its other half

    def _end(self, error: HoldoffError) -> None:
        self.access.ended(error)
        self.wake()


class Streams:
    """The streams of access tokens of one client: one for each token that is in use."""

    def __init__(self, client: Connection) -> None:
        self.client = client
        self._by_token: dict[str, _Shared] = {}
        self._owner = Owner()

    def join(self, user: AccessToken) -> None:
        """Give a user the stream of its token."""
        self._owner.check()
        shared = self._by_token.get(user.token)
        if shared is None or shared.access.final or shared.task.done():
            shared = self._by_token[user.token] = _Shared(self.client, user.token)
        user._shared = shared  # noqa: SLF001 - its other half
        shared.users.append(user)

    async def leave(self, user: AccessToken) -> None:
        """Take a user away; the last one ends the stream."""
        shared = user._shared  # noqa: SLF001 - its other half
        if user not in shared.users:
            return
        shared.users.remove(user)
        if shared.users:
            return
        if self._by_token.get(user.token) is shared:
            del self._by_token[user.token]
        await shared.close()


class AccessToken:
    """The access token of a token in custody, renewed in the background until it is closed.

    Use it as an async context manager, or call `close`. While it is open the token counts as
    used, so that the coordinator refreshes it.
    """

    def __init__(
        self,
        streams: Streams,
        token: str,
        on_renewed: Callable[[Usable], None] | None,
        on_unreachable: Callable[[Unavailable], None] | None,
    ) -> None:
        calls.require_private(streams.client._is_private)  # noqa: SLF001
        self.token = token
        """`apps/{app}/tokens/{token}`."""
        self._on_renewed = on_renewed
        self._on_unreachable = on_unreachable
        self._owner = Owner()
        self._closed = False
        self._failed: HoldoffError | None = None
        self._heard: Usable | None = None
        self._streams = streams
        self._shared: _Shared
        streams.join(self)
        with contextlib.suppress(HoldoffError):
            self._renewed(self._shared.access.usable())  # what an earlier user heard

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def status(self) -> grant_pb2.GrantStatus | None:
        """Whether an access token can be had, since when, until when, and why; None at first."""
        return self._shared.access.status

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
        access = self._shared.access
        while True:
            changed = self._shared.changed
            if self._closed or self._shared.task.cancelled():
                raise HoldoffError(f"the access token of {self.token} was closed")
            if self._failed:
                raise self._failed
            if usable := access.usable(newer_than):
                return usable
            left = LONGEST_SLEEP_SECONDS
            if give_up_ns is not None:
                left = min(left, (give_up_ns - boottime_ns()) / SECOND)
            access.must_wait(is_over=left <= 0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()

    async def close(self) -> None:
        """End it. In a forked child it does nothing."""
        if not self._owner.is_here:
            return
        self._closed = True
        self._shared.wake()
        await self._streams.leave(self)

    def _renewed(self, usable: Usable | None) -> None:
        """Tell of an access token, once."""
        if usable is None or usable == self._heard or self._failed or self._on_renewed is None:
            return
        self._heard = usable
        self._call(partial(self._on_renewed, usable))

    def _unreachable(self, error: Unavailable) -> None:
        if self._on_unreachable:
            self._call(partial(self._on_unreachable, error))

    def _call(self, callback: Callable[[], None]) -> None:
        """Call what a user gave; what it raises ends this one alone."""
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - it is theirs
            self._failed = HoldoffError(f"a callback of {self.token} raised: {error!r}")
            self._shared.wake()
