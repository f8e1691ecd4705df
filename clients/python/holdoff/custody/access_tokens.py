"""An access token that is kept current, for the synchronous client."""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Self

from holdoff._connection import Subscription
from holdoff._core import LONGEST_SLEEP_SECONDS
from holdoff._forks import Owner
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.custody import calls
from holdoff.custody.access import Access
from holdoff.errors import HoldoffError
from holdoff.v1 import custody_service_pb2, grant_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdoff._connection import Connection
    from holdoff.custody.access import Usable
    from holdoff.errors import Unavailable


class _Shared:
    """The stream of one access token, for all of one client that use it."""

    def __init__(self, client: Connection, token: str) -> None:
        self.access = Access(token)
        self.changed = threading.Condition()
        self.users: list[AccessToken] = []
        self._token = token
        self._responses = Subscription[custody_service_pb2.GetAccessTokenResponse](
            client,
            self.access,
            lambda line: line.custody.GetAccessToken(
                self.access.request(),
                metadata=client._metadata(),  # noqa: SLF001
            ),
            self._unreachable,
        )
        self._thread = threading.Thread(
            target=self._listen_on, name="holdoff-access-token", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._responses.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _listen_on(self) -> None:
        try:
            for response in self._responses:
                with self.changed:
                    self.changed.notify_all()
                usable = self.access.usable() if response.HasField("access_token") else None
                for user in list(self.users):
                    user._renewed(usable)  # noqa: SLF001 - its other half
        except HoldoffError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - a channel closed under us
            self._end(HoldoffError(f"the stream of {self._token} ended: {error}"))

    def _unreachable(self, error: Unavailable) -> None:
        for user in list(self.users):
            user._unreachable(error)  # noqa: SLF001 - its other half

    def _end(self, error: HoldoffError) -> None:
        with self.changed:
            self.access.ended(error)
            self.changed.notify_all()


class Streams:
    """The streams of access tokens of one client: one for each token that is in use."""

    def __init__(self, client: Connection) -> None:
        self.client = client
        self._lock = threading.Lock()
        self._by_token: dict[str, _Shared] = {}
        self._owner = Owner()

    def join(self, user: AccessToken) -> None:
        """Give a user the stream of its token."""
        self._owner.check()  # before the lock, which in a forked child may be held for ever
        with self._lock:
            shared = self._by_token.get(user.token)
            if shared is None or shared.access.final:
                shared = self._by_token[user.token] = _Shared(self.client, user.token)
            user._shared = shared  # noqa: SLF001 - its other half
            shared.users.append(user)

    def leave(self, user: AccessToken) -> None:
        """Take a user away; the last one ends the stream."""
        shared = user._shared  # noqa: SLF001 - its other half
        with self._lock:
            if user not in shared.users:
                return
            shared.users.remove(user)
            if shared.users:
                return
            if self._by_token.get(user.token) is shared:
                del self._by_token[user.token]
        shared.close()


class AccessToken:
    """The access token of a token in custody, renewed in the background until it is closed.

    Use it as a context manager, or call `close`. While it is open the token counts as used, so
    that the coordinator refreshes it.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> grant_pb2.GrantStatus | None:
        """Whether an access token can be had, since when, until when, and why; None at first."""
        return self._shared.access.status

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
        access, changed = self._shared.access, self._shared.changed
        with changed:
            while True:
                if self._closed:
                    raise HoldoffError(f"the access token of {self.token} was closed")
                if self._failed:
                    raise self._failed
                if usable := access.usable(newer_than):
                    return usable
                left = LONGEST_SLEEP_SECONDS
                if give_up_ns is not None:
                    left = min(left, (give_up_ns - boottime_ns()) / SECOND)
                access.must_wait(is_over=left <= 0)
                changed.wait(left)

    def close(self) -> None:
        """End it. In a forked child it does nothing."""
        if not self._owner.is_here:
            return
        with self._shared.changed:
            self._closed = True
            self._shared.changed.notify_all()
        self._streams.leave(self)

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
            with self._shared.changed:
                self._failed = HoldoffError(f"a callback of {self.token} raised: {error!r}")
                self._shared.changed.notify_all()
