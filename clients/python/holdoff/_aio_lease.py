"""The conversation that asks for a lease, and the lease that is held, in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import grpc

from holdoff import _calls
from holdoff._core import (
    HEARTBEAT_SECONDS,
    WITHDRAWAL_SECONDS,
    Listening,
)
from holdoff._held import Held, pause_seconds
from holdoff._log import log
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.errors import HoldoffError, LeaseLost, LeaseNotFound, Unavailable
from holdoff.v1 import lease_pb2, lease_service_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from holdoff._aio_connection import Connection
    from holdoff._core import Acquisition, Renewals
    from holdoff._held import Callbacks
    from holdoff._recognise import Headers


_Event = lease_pb2.WaitStatus | lease_service_pb2.LeaseOffer


class Conversation:
    """One stream of an acquisition. Leaving it without a lease gives up the place."""

    def __init__(self, client: Connection, acquisition: Acquisition) -> None:
        self._client = client
        self._route = client._route  # noqa: SLF001
        self._acquisition = acquisition
        self._outbox: asyncio.Queue[lease_service_pb2.StreamAcquireLeaseRequest | None] = (
            asyncio.Queue()
        )
        self._reading: asyncio.Task[_Event] | None = None

    async def __aenter__(self) -> Self:
        now_ns = boottime_ns()
        first = self._acquisition.request(now_ns)
        self._outbox.put_nowait(lease_service_pb2.StreamAcquireLeaseRequest(acquire=first))
        self._line = await self._client._line()  # noqa: SLF001
        with self._route.watched(self._line.number):
            self._stream = self._line.leases.StreamAcquireLease(
                self._requests(),
                timeout=self._acquisition.stream_timeout_seconds(now_ns),
                metadata=self._client._metadata(),  # noqa: SLF001
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None and not isinstance(error, HoldoffError):
                await self._client._unhindered(self._withdraw)  # noqa: SLF001
        finally:
            if self._reading:
                self._reading.cancel()
            self._outbox.put_nowait(None)
            self._stream.cancel()

    async def _withdraw(self) -> None:
        """Give up the place, and give the coordinator a moment to hear of it."""
        withdrawal = lease_service_pb2.Withdrawal()
        self._outbox.put_nowait(lease_service_pb2.StreamAcquireLeaseRequest(withdraw=withdrawal))
        with contextlib.suppress(TimeoutError, HoldoffError):
            async with asyncio.timeout(WITHDRAWAL_SECONDS):
                while True:
                    await self.receive()

    async def _requests(self) -> AsyncIterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        heartbeat = lease_service_pb2.StreamAcquireLeaseRequest(
            heartbeat=lease_service_pb2.Heartbeat()
        )
        while True:
            message: lease_service_pb2.StreamAcquireLeaseRequest | None = heartbeat
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    message = await self._outbox.get()
            if message is None:
                return
            yield message

    async def receive(self) -> _Event:
        """Return the next event.

        Raises:
            HoldoffError: The request failed, or the conversation did.
        """
        # In a task of its own: a read that is cancelled cancels its stream, which is then of no
        # use for a withdrawal.
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        await asyncio.wait([self._reading])
        reading, self._reading = self._reading, None
        try:
            return reading.result()
        finally:
            del reading  # or its error holds it, by this frame, and with it the connection

    async def _read(self) -> _Event:
        with self._route.watched(self._line.number):
            response = await self._stream.read()
            if response is not grpc.aio.EOF:
                self._route.answered(self._line.number)
                answer = cast("lease_service_pb2.StreamAcquireLeaseResponse", response)
                return self._acquisition.received(answer.event)
        raise Unavailable("the coordinator ended the conversation")


class HeldLease(Held):
    """A lease that this process holds, renewed in the background until it is released.

    Use it as an async context manager: leaving it releases the lease, and raises LeaseLost if it
    was lost in the meantime.
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
        self._changed = asyncio.Event()
        self._heard = asyncio.Event()
        self._task = client._start(self._renew_on())  # noqa: SLF001
        self._following = client._start(self._follow_on())  # noqa: SLF001

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.release()
            return
        with contextlib.suppress(HoldoffError):
            await self.release()

    def command_started(self) -> None:
        """Tell the coordinator, soon, that the command under the lease has started.

        Where the policy's `refresh_at` is START, that instant counts as the refresh.
        """
        super().command_started()
        self._changed.set()

    def command_paused(self, *, paused: bool) -> None:
        """Tell the coordinator, soon, whether the command under the lease is paused.

        It shows where leases are listed.
        """
        super().command_paused(paused=paused)
        self._changed.set()

    async def release(
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
        call = _calls.release_lease(
            self._offer,
            last_refresh_age_seconds,
            saw_every_refresh=saw_every_refresh,
            unused=unused,
        )
        await self._client._unhindered(lambda: self._end(call))  # noqa: SLF001

    async def _end(self, release: _calls.Call[Any, lease_pb2.Lease]) -> None:
        """Stop the renewals and release the lease; a second call continues the first."""
        await self._stop()
        patience = self._renewals.release_patience(boottime_ns())
        try:
            # Also when it was broken: that confirms that nothing runs under it any more.
            await self._client._insist(release, patience)  # noqa: SLF001
        except LeaseNotFound as error:  # a failover of the store lost it
            raise LeaseLost(str(error)) from error
        except HoldoffError:
            if self._renewals.lost is None:
                raise
        if self._renewals.lost is not None:
            raise self._renewals.lost

    async def wait_while_quiet(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the holder may make calls: return at once unless it must back off.

        A job that makes calls in a loop asks before each of them::

            for account in accounts:
                await lease.wait_while_quiet()
                await update(account)

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
        while self._must_be_quiet():
            pause = pause_seconds(give_up_ns)
            if pause <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._heard.wait()
        return True

    async def answered(
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
        await self._client._report([event])  # noqa: SLF001
        return True

    async def _stop(self) -> None:
        self._stopped = True
        self._wake()
        for task in (self._task, self._following):
            task.cancel()
        await asyncio.wait([self._task, self._following])

    def _wake(self) -> None:
        """Wake all who wait for news."""
        self._heard.set()
        self._heard = asyncio.Event()

    def _give_up(self, error: LeaseLost) -> None:
        """Stop all that is done for a lease that is gone, and tell it once."""
        if self._lose(error):
            self._wake()
            for task in {self._task, self._following} - {asyncio.current_task()}:
                task.cancel()
            self._tell_lost(error)

    async def _follow_on(self) -> None:
        request = _calls.follow_lease(self._offer)
        listening = Listening[lease_service_pb2.FollowLeaseResponse]()
        notices = self._client._listen(  # noqa: SLF001
            listening,
            lambda line: line.leases.FollowLease(
                request,
                metadata=self._client._metadata(),  # noqa: SLF001
            ),
        )
        try:
            async with contextlib.aclosing(notices):
                async for notice in notices:
                    self._noticed(notice)
                    self._wake()
                    self._pass_on(notice)
        except LeaseLost as error:
            self._give_up(error)
        except Exception as error:  # noqa: BLE001 - an older coordinator, a channel closed under us
            self._unfollowed(error)
            self._wake()

    async def _renew_on(self) -> None:
        try:
            while self._owner.is_here:
                await self._sleep_until_due()
                await self._renew()
        except LeaseLost as error:
            self._give_up(error)
        except Exception as error:  # what a callback raised, or a channel closed under us
            log.exception("renewals of %s ended", self.name)
            self._give_up(LeaseLost(f"its renewals ended: {error}"))

    async def _sleep_until_due(self) -> None:
        """Sleep until the next renewal."""
        while (pause := self._renewals.pause_seconds(boottime_ns())) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            self._changed.clear()

    async def _renew(self) -> None:
        renewal = self._renewals.begin(boottime_ns())
        try:
            await self._client._call(self._renewal_call(renewal))  # noqa: SLF001
        except HoldoffError as error:
            self._not_renewed(error)
            return
        self._renewals.succeeded(renewal)
        self._tell_renewed()
