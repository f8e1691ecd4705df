"""A process full of waiters that take leases by turns over real streams, and remember it all."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from holdoff._core import HEARTBEAT_SECONDS, duration
from holdoff.v1 import lease_pb2, lease_service_pb2, lease_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from multiprocessing.queues import SimpleQueue
    from multiprocessing.synchronize import Barrier

    from holdoff.v1.lease_service_pb2_grpc import LeaseServiceAsyncStub as Stub

TTL_SECONDS = 10.0
PROBE_SECONDS = 0.25
STALL_SECONDS = 2.0
"""A waiter is passed over after 5 s of silence; its heartbeats and the ticks take 2.5 s of them."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a waiter sits: at which token, and which replica it asks."""

    token: str
    replica: str
    leaves: bool
    """It withdraws at the end of the load; the others wait until they had a last turn."""


@dataclass(frozen=True, slots=True)
class Load:
    """What all waiters do."""

    seconds: float
    """After these nobody queues any more."""
    hold_seconds: float
    patience_seconds: float
    """How much later than that everybody must be done."""


@dataclass(slots=True)
class Turn:
    """One lease: the times marked `_us` are of the store's clock, the others of CLOCK_MONOTONIC."""

    token: str
    asked_at: float
    """Before this the request was not in the queue."""
    queued_at: float
    """At this it was."""
    served_at: float = 0.0
    fencing: int = 0
    offered_us: int = 0
    accepted_us: int = 0
    ended_us: int = 0
    not_before_us: int = 0
    passed_over: bool = False
    """It did not accept an offer in time, and so may have lost its place."""


@dataclass(slots=True)
class Log:
    """All that the waiters of a process saw."""

    turns: list[Turn] = field(default_factory=list)
    withdrawn: int = 0
    places_rose: int = 0
    stuck: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    """The longest that a plain question took, our own delay included."""
    stalls: list[tuple[float, float]] = field(default_factory=list)
    """From when to when it took so long that waiters may have gone unheard (CLOCK_MONOTONIC)."""


def run(seats: Sequence[Seat], load: Load, ready: Barrier, logs: SimpleQueue[Log]) -> None:
    """Begin when all are ready, take turns until the load stops, and send the log."""
    logs.put(asyncio.run(_run(seats, load, ready)))


async def _run(seats: Sequence[Seat], load: Load, ready: Barrier) -> Log:
    log = Log()
    async with contextlib.AsyncExitStack() as stack:
        stubs: dict[str, Stub] = {}
        for replica in {seat.replica for seat in seats}:
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(replica, [("grpc.enable_http_proxy", 0)])
            )
            await channel.channel_ready()
            stubs[replica] = lease_service_pb2_grpc.LeaseServiceStub(channel)
        await asyncio.to_thread(ready.wait)
        stop_at = time.monotonic() + load.seconds
        waiters = [
            _Waiter(seat, stubs[seat.replica], stop_at, load.hold_seconds, log) for seat in seats
        ]
        tasks = {asyncio.create_task(waiter.take_turns()): waiter for waiter in waiters}
        probes = [asyncio.create_task(_probe(stub, seats[0].token, log)) for stub in stubs.values()]
        done, late = await asyncio.wait(tasks, timeout=load.seconds + load.patience_seconds)
        for task in done:
            task.result()
        for probe in probes:
            probe.cancel()
        for task in late:
            log.stuck.append(f"{tasks[task].seat.token}: {tasks[task].last_said}")
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    return log


async def _probe(stub: Stub, token: str, log: Log) -> None:
    """Ask a replica for what its store knows, again and again, and note how long that takes."""
    request = lease_service_pb2.ListLeasesRequest(parent=token)
    while True:
        due = time.monotonic() + PROBE_SECONDS
        await asyncio.sleep(PROBE_SECONDS)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.ListLeases(request)
        seconds = time.monotonic() - due
        log.slowest_seconds = max(log.slowest_seconds, seconds)
        if seconds > STALL_SECONDS:
            log.stalls.append((due, due + seconds))


class _Waiter:
    """Queues, holds the lease for a moment, gives it back and queues again."""

    def __init__(
        self, seat: Seat, stub: Stub, stop_at: float, hold_seconds: float, log: Log
    ) -> None:
        self.seat = seat
        self.last_said = "nothing"
        self._stub = stub
        self._stop_at = stop_at
        self._hold_seconds = hold_seconds
        self._log = log

    async def take_turns(self) -> None:
        """Go on until the load stops."""
        while time.monotonic() < self._stop_at:
            request = lease_service_pb2.AcquireLeaseRequest(
                token=self.seat.token, request_id=str(uuid.uuid4()), ttl=duration(TTL_SECONDS)
            )
            try:
                while not await self._take_turn(request):
                    pass
            except grpc.aio.AioRpcError as error:
                self._log.errors[f"{error.code().name}: {error.details()}"] += 1
                await asyncio.sleep(0.1)

    async def _take_turn(self, request: lease_service_pb2.AcquireLeaseRequest) -> bool:
        """Return whether the request came to its end; else it has to be sent again."""
        turn, place = Turn(self.seat.token, asked_at=time.monotonic(), queued_at=0.0), 0
        stream = self._stub.StreamAcquireLease(self._requests(request))
        async for response in stream:
            turn.queued_at = turn.queued_at or time.monotonic()
            event = response.event
            if event.HasField("waiting"):
                self.last_said = event.waiting.message
                if place and event.waiting.place > place and not turn.passed_over:
                    self._log.places_rose += 1
                place = event.waiting.place
            elif event.HasField("offer"):
                turn.served_at = time.monotonic()
                if await self._hold(turn, event.offer):
                    stream.cancel()
                    return True
                turn.passed_over = True
            else:
                self._log.errors[event.error.message] += 1
                return True
        if time.monotonic() < self._stop_at:
            return False
        self._log.withdrawn += 1
        return True

    async def _requests(
        self, request: lease_service_pb2.AcquireLeaseRequest
    ) -> AsyncIterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        yield lease_service_pb2.StreamAcquireLeaseRequest(acquire=request)
        heartbeat = lease_service_pb2.Heartbeat()
        leave_at = self._stop_at if self.seat.leaves else math.inf
        while (left_seconds := leave_at - time.monotonic()) > 0:
            await asyncio.sleep(min(HEARTBEAT_SECONDS, left_seconds))
            yield lease_service_pb2.StreamAcquireLeaseRequest(heartbeat=heartbeat)
        withdrawal = lease_service_pb2.Withdrawal()
        yield lease_service_pb2.StreamAcquireLeaseRequest(withdraw=withdrawal)

    async def _hold(self, turn: Turn, offer: lease_service_pb2.LeaseOffer) -> bool:
        """Accept, hold and give back; return False if the offer had run out."""
        name, secret = offer.lease.name, offer.secret
        try:
            await self._stub.RenewLease(
                lease_service_pb2.RenewLeaseRequest(name=name, secret=secret)
            )
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                raise
            if time.monotonic() < self._stop_at or not self.seat.leaves:
                self._log.errors["an offer was not accepted in time"] += 1
            return False
        await asyncio.sleep(self._hold_seconds)
        released = await self._stub.ReleaseLease(
            lease_service_pb2.ReleaseLeaseRequest(name=name, secret=secret)
        )
        _record(turn, released)
        self._log.turns.append(turn)
        return True


def _record(turn: Turn, released: lease_service_pb2.ReleaseLeaseResponse) -> None:
    lease: lease_pb2.Lease = released.lease
    turn.fencing = lease.fencing_token
    turn.offered_us = lease.create_time.ToMicroseconds()
    turn.accepted_us = lease.accept_time.ToMicroseconds()
    turn.ended_us = lease.end_time.ToMicroseconds()
    turn.not_before_us = released.not_before_time.ToMicroseconds()
