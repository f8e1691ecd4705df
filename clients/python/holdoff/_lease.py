"""The synchronous conversation that asks for a lease, and the lease that is held."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from holdoff import _calls
from holdoff._connection import Subscription
from holdoff._core import (
    HEARTBEAT_SECONDS,
    WITHDRAWAL_SECONDS,
    Listening,
)
from holdoff._forks import leave_to_parent
from holdoff._held import Held, pause_seconds
from holdoff._log import log
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.errors import HoldoffError, LeaseLost, LeaseNotFound, Unavailable
from holdoff.v1 import lease_pb2, lease_service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType

    from holdoff._connection import Connection
    from holdoff._core import Acquisition, Renewals
    from holdoff._held import Callbacks
    from holdoff._recognise import Headers


class Conversation:
    """One stream of an acquisition. Leaving it without a lease gives up the position.

    Args:
        client: Where the coordinator is.
        acquisition: What is asked for.
        interruptible: Entered while it waits; an exception that is raised then does no harm.
    """

    def __init__(
        self,
        client: Connection,
        acquisition: Acquisition,
        interruptible: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._client = client
        self._interruptible = interruptible
        self._route = client._route  # noqa: SLF001
        self._acquisition = acquisition
        self._outbox: queue.SimpleQueue[lease_service_pb2.StreamAcquireLeaseRequest | None] = (
            queue.SimpleQueue()
        )
        self._inbox: queue.SimpleQueue[
            lease_service_pb2.StreamAcquireLeaseResponse | Exception | None
        ] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        now_ns = boottime_ns()
        first = self._acquisition.request(now_ns)
        self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(acquire=first))
        self._line = self._client._line()  # noqa: SLF001
        with self._route.watched(self._line.number):
            self._stream = self._line.leases.StreamAcquireLease(
                self._requests(),
                timeout=self._acquisition.stream_timeout_seconds(now_ns),
                metadata=self._client._metadata(),  # noqa: SLF001
            )
        leave_to_parent(self._stream)
        threading.Thread(target=self._read, name="holdoff-waiting", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, HoldoffError):
            self._withdraw()
        self._outbox.put(None)
        self._stream.cancel()

    def _withdraw(self) -> None:
        """Give up the place, and give the coordinator a moment to hear of it."""
        withdrawal = lease_service_pb2.Withdrawal()
        self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(withdraw=withdrawal))
        give_up_ns = boottime_ns() + round(WITHDRAWAL_SECONDS * SECOND)
        while self._stream.is_active() and boottime_ns() < give_up_ns:
            time.sleep(0.01)

    def _requests(self) -> Iterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        heartbeat = lease_service_pb2.StreamAcquireLeaseRequest(
            heartbeat=lease_service_pb2.Heartbeat()
        )
        while True:
            try:
                message = self._outbox.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                message = heartbeat
            if message is None:
                return
            yield message

    def _read(self) -> None:
        """Read the stream in a thread of its own.

        A signal handler that raises an exception inside gRPC leaves locks taken, and closing the
        channel then waits for ever. A simple queue can be interrupted anywhere.
        """
        try:
            for response in self._stream:
                self._inbox.put(response)
            self._inbox.put(None)
        except Exception as error:  # noqa: BLE001 - `receive` raises it
            self._inbox.put(error)

    def receive(self) -> lease_pb2.WaitStatus | lease_service_pb2.LeaseOffer:
        """Return the next event.

        Raises:
            HoldoffError: The request failed, or the conversation did.
        """
        with self._interruptible():
            response = self._inbox.get()
        with self._route.watched(self._line.number):
            if isinstance(response, Exception):
                raise response
            if response is not None:
                self._route.answered(self._line.number)
                return self._acquisition.received(response.event)
        raise Unavailable("the coordinator ended the conversation")


class HeldLease(Held):
    """A lease that this process holds, renewed in the background until it is released.

    Use it as a context manager: leaving it releases the lease, and raises LeaseLost if it was
    lost in the meantime.
    """

    def __init__(
        self,
        client: Connection,
        offer: lease_service_pb2.LeaseOffer,
        renewals: Renewals,
        callbacks: Callbacks,
    ) -> None:
        super().__init__(offer, renewals, callbacks)
        self._client = client
        self._changed = threading.Condition()
        following = _calls.follow_lease(offer)
        self._notices = Subscription[lease_service_pb2.FollowLeaseResponse](
            client,
            Listening(),
            lambda line: line.leases.FollowLease(
                following,
                metadata=client._metadata(),  # noqa: SLF001
            ),
        )
        self._threads = [
            threading.Thread(target=work, name=f"holdoff-{name}", daemon=True)
            for name, work in (("renewal", self._renew_on), ("following", self._follow_on))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.release()
            return
        with contextlib.suppress(HoldoffError):
            self.release()

    def command_started(self) -> None:
        """Tell the coordinator, soon, that the command under the lease has started.

        Where the policy's `refresh_at` is START, that instant counts as the refresh.
        """
        if not self._owner.is_here:
            return
        with self._changed:
            super().command_started()
            self._changed.notify_all()

    def command_paused(self, *, paused: bool) -> None:
        """Tell the coordinator, soon, whether the command under the lease is paused.

        It shows where leases are listed.
        """
        if not self._owner.is_here:
            return
        with self._changed:
            super().command_paused(paused=paused)
            self._changed.notify_all()

    def wait_while_quiet(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the holder may make calls: return at once unless it must back off.

        A job that makes calls in a loop asks before each of them::

            for account in accounts:
                lease.wait_while_quiet()
                update(account)

        Args:
            timeout_seconds: How long to wait at most; None waits without limit.

        Returns:
            Whether it may make calls; False after the timeout.

        Raises:
            LeaseLost: The lease was lost, or released.
        """
        give_up_ns = None
        if timeout_seconds is not None:
            give_up_ns = boottime_ns() + round(timeout_seconds * SECOND)
        self.check()  # before the lock, which in a forked child may be held for ever
        with self._changed:
            while self._must_be_quiet():
                pause = pause_seconds(give_up_ns)
                if pause <= 0:
                    return False
                self._changed.wait(pause)
            return True

    def answered(
        self,
        url: str,
        status: int,
        headers: Headers = MappingProxyType({}),
        body: bytes | None = b"",
    ) -> bool:
        """Report an answer of the provider if its policy counts it as an error, or it blocks.

        The holder is told to back off when it must, and so are all others in the scope.

        Args:
            url: What was called, with its query: that is cut off.
            status: HTTP status of the answer.
            headers: Its headers, as a dict or as a library for HTTP has them: some say how long
                a block lasts.
            body: Its body, if it has one: some providers block with status 200.

        Returns:
            Whether it was reported.

        Raises:
            Unavailable: The coordinator could not be told for some seconds.
            TooManyEvents: The token has too many events to remember.
        """
        event = self._event_of(url, status, headers, body)
        if event is None:
            return False
        self._client._report([event])  # noqa: SLF001
        return True

    def release(
        self,
        *,
        last_refresh_age_seconds: float | None = None,
        saw_every_refresh: bool = False,
        unused: bool = False,
    ) -> None:
        """End the lease. In a forked child it does nothing: the lease is its parent's.

        Args:
            last_refresh_age_seconds: Time since the last refresh under this lease.
            saw_every_refresh: The caller saw *every* refresh that was made under this lease;
                without it the end of the lease counts as the last one.
            unused: Nothing ran under this lease, so that no cooldown begins.

        Raises:
            LeaseLost: The lease was lost before.
            Unavailable: The coordinator could not be told; the lease runs out by itself.
        """
        if not self._owner.is_here:
            return
        self._stop()
        call = _calls.release_lease(
            self._offer,
            last_refresh_age_seconds,
            saw_every_refresh=saw_every_refresh,
            unused=unused,
        )
        try:
            # Also when it was broken: that confirms that nothing runs under it any more.
            self._client._insist(call, self._renewals.release_patience(boottime_ns()))  # noqa: SLF001
        except LeaseNotFound as error:  # a failover of the store lost it
            raise LeaseLost(str(error)) from error
        except HoldoffError:
            if self._renewals.lost is None:
                raise
        if self._renewals.lost is not None:
            raise self._renewals.lost

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._notices.close()
        for thread in self._threads:
            thread.join()

    def _give_up(self, error: LeaseLost) -> None:
        """Stop all that is done for a lease that is gone, and tell it once."""
        with self._changed:
            is_news = self._lose(error)
            self._changed.notify_all()
        self._notices.close()
        if is_news:
            self._tell_lost(error)

    def _follow_on(self) -> None:
        try:
            for notice in self._notices:
                with self._changed:
                    self._noticed(notice)
                    self._changed.notify_all()
                self._pass_on(notice)
        except LeaseLost as error:
            self._give_up(error)
        except Exception as error:  # noqa: BLE001 - an older coordinator, a channel closed under us
            with self._changed:
                self._unfollowed(error)
                self._changed.notify_all()

    def _renew_on(self) -> None:
        try:
            while self._sleep_until_due():
                self._renew()
        except LeaseLost as error:
            self._give_up(error)
        except Exception as error:  # what a callback raised, or a channel closed under us
            log.exception("renewals of %s ended", self.name)
            self._give_up(LeaseLost(f"its renewals ended: {error}"))

    def _sleep_until_due(self) -> bool:
        """Sleep until the next renewal (True), or until there is none any more (False)."""
        with self._changed:
            while not self._stopped and self._renewals.lost is None:
                pause = self._renewals.pause_seconds(boottime_ns())
                if pause <= 0:
                    return True
                self._changed.wait(pause)
            return False

    def _renew(self) -> None:
        with self._changed:
            renewal = self._renewals.begin(boottime_ns())
        try:
            self._client._call(self._renewal_call(renewal))  # noqa: SLF001
        except HoldoffError as error:
            with self._changed:
                self._not_renewed(error)
            return
        with self._changed:
            self._renewals.succeeded(renewal)
        self._tell_renewed()
