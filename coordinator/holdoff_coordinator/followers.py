"""The holders that follow their leases at this replica, told at once what they must do.

All of an app are asked for in one script call: when the store announces that something changed,
and every second, which repairs announcements that were lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from holdoff.v1 import budget_pb2, lease_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure, token_damaged
from holdoff_coordinator.leases import failure_of
from holdoff_coordinator.records import back_off_message, duration, record
from holdoff_coordinator.scripts import READ_BATCH, Reply
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from typing import Any

    from holdoff.names import LeaseName
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.hub import Hub
    from holdoff_coordinator.limits import Limits
    from holdoff_coordinator.places import Places
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

TICK_SECONDS = 1.0
STATUS_SECONDS = 15.0
"""A holder hears from us at least this often."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a holder must do, at one instant of the store's clock."""

    start_us: int | None
    """The earliest instant at which it may go on; None while it may."""
    timed: bool
    """It may go on then without being told."""
    back_offs: tuple[budget_pb2.BackOff, ...]
    pairs: tuple[tuple[str, str], ...]
    """The places that it named when it asked for the lease."""
    now_us: int

    @property
    def start_in_seconds(self) -> float:
        """Seconds from the store's instant until it may go on."""
        return 0.0 if self.start_us is None else max(0, self.start_us - self.now_us) / 1e6

    @property
    def signature(self) -> tuple[object, ...]:
        """What has to change for the holder to be told."""
        return (
            self.start_us is None,
            self.start_us if self.timed else 0,
            *((one.name, one.state, one.end_time.ToMicroseconds()) for one in self.back_offs),
        )

    def to_response(
        self, rooms: Sequence[lease_service_pb2.ScopeRoom]
    ) -> lease_service_pb2.FollowLeaseResponse:
        """The message for the holder."""
        return lease_service_pb2.FollowLeaseResponse(
            instruction=(
                lease_service_pb2.HOLDER_INSTRUCTION_RUN
                if self.start_us is None
                else lease_service_pb2.HOLDER_INSTRUCTION_BE_QUIET
            ),
            back_offs=self.back_offs,
            go_in=None if self.start_us is None else duration(max(0, self.start_us - self.now_us)),
            rooms=rooms,
        )


class Follower:
    """One holder that follows its lease."""

    def __init__(self, name: LeaseName, secret_hash: str, caller: Caller) -> None:
        self.name = name
        self.caller = caller
        self.secret_hash = secret_hash
        self.instruction: Instruction | None = None
        self.failure: Failure | None = None
        self.asked_at = 0.0
        self.stirred = asyncio.Event()

    def take(self, found: Instruction | Failure) -> None:
        """Take in what the store says."""
        if isinstance(found, Failure):
            self.failure = found
            self.stirred.set()
            return
        before, self.instruction, self.asked_at = self.instruction, found, time.monotonic()
        if before is None or before.signature != found.signature:
            self.stirred.set()

    @property
    def go_on_after_seconds(self) -> float:
        """When to ask again without being told."""
        now = self.instruction
        if now is None or now.start_us is None or not now.timed:
            return math.inf
        return self.asked_at + now.start_in_seconds - time.monotonic()


class Followers:
    """All followers of this replica."""

    def __init__(self, scripts: Scripts, hub: Hub, places: Places, limits: Limits) -> None:
        self._scripts = scripts
        self._hub = hub
        self._places = places
        self._limits = limits
        self._by_app: defaultdict[str, set[Follower]] = defaultdict(set)
        self._looking: dict[str, asyncio.Task[None]] = {}
        hub.on_announcement(self.look)

    async def follow(
        self, request: lease_service_pb2.FollowLeaseRequest, caller: Caller
    ) -> AsyncGenerator[lease_service_pb2.FollowLeaseResponse, None]:
        """Say what the holder of a lease must do, for as long as the lease lives.

        Raises:
            Failure: The lease is broken or over, or never was; DRAINING or STORE_UNAVAILABLE.
        """
        name = validation.lease_name("name", request.name)
        secret_hash = hashlib.sha256(validation.secret(request.secret).encode()).hexdigest()
        follower = Follower(name, secret_hash, caller)
        self._by_app[name.app].add(follower)
        try:
            with self._hub.wake_ups.wanted(name.app):
                async with self._limits.calling(caller):
                    await self._ask(name.app, [follower])
                async for response in self._told(follower):
                    yield response
        finally:
            self._by_app[name.app].discard(follower)

    async def _told(
        self, follower: Follower
    ) -> AsyncIterator[lease_service_pb2.FollowLeaseResponse]:
        told: tuple[object, ...] | None = None
        told_at = -math.inf
        while True:
            if follower.failure:
                raise follower.failure
            self._hub.check()
            now, instruction = time.monotonic(), follower.instruction
            due = instruction and (instruction.signature != told or now - told_at >= STATUS_SECONDS)
            if instruction and due:
                told, told_at = instruction.signature, now
                rooms = await self._places.rooms(follower.name.token_name, instruction.pairs)
                yield instruction.to_response(rooms)
                continue
            if (
                not await _sleep(
                    follower.stirred,
                    min(follower.go_on_after_seconds, told_at + STATUS_SECONDS - now),
                )
                and follower.go_on_after_seconds <= 0
            ):
                await self._ask(follower.name.app, [follower])

    async def look(self, app: str) -> None:
        """Ask what all who follow a lease of an app must do."""
        followers = sorted(self._by_app.get(app, ()), key=lambda one: str(one.name))
        for start in range(0, len(followers), READ_BATCH):
            await self._ask(app, followers[start : start + READ_BATCH])

    async def tick_forever(self) -> None:
        """Look at every app each second; a store that is away only delays the next look."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._hub.draining or self._hub.store_is_away:
                for follower in (one for app in self._by_app.values() for one in app):
                    follower.stirred.set()
            for app in [app for app, followers in self._by_app.items() if followers]:
                if app not in self._looking:
                    self._looking[app] = asyncio.create_task(self._tick(app))

    async def _tick(self, app: str) -> None:
        """Look at an app; one whose store hangs holds up no other."""
        try:
            await self.look(app)
        except Failure as failure:
            warn("followers were not looked at", failure.reason, app=app)
        except Exception:
            log.exception("followers were not looked at", app=app)
        finally:
            del self._looking[app]

    async def _ask(self, app: str, followers: Sequence[Follower]) -> None:
        arguments: list[str] = []
        for one in followers:
            arguments += one.name.token, one.name.lease, one.secret_hash
        reply = await self._scripts.run("follow", app, *arguments)
        for follower, (_, _, *answer) in zip(followers, reply.values[0], strict=True):
            found: Instruction | Failure = token_damaged(follower.name.token_name)
            with self._scripts.sparing(app, f"tokens/{follower.name.token}"):
                if answer != [b"DAMAGED"]:
                    found = _read(follower, answer, reply)
            follower.take(found)


def _read(follower: Follower, answer: Sequence[Any], reply: Reply) -> Instruction | Failure:
    name, (status, *rest) = follower.name, answer
    if status != b"OK":
        return failure_of(Reply(reply.now_us, reply.epoch, status.decode(), tuple(rest)), name)
    start, timed, declared, *back_offs = rest
    return Instruction(
        start_us=int(start) if start else None,
        timed=timed == b"1",
        back_offs=tuple(
            back_off_message(name.app, record(flat), reply.now_us, follower.caller)
            for flat in back_offs
        ),
        pairs=tuple((one[0], one[1]) for one in json.loads(declared or b"[]")),
        now_us=reply.now_us,
    )


async def _sleep(stirred: asyncio.Event, seconds: float) -> bool:
    """Sleep until stirred (True) or the time has passed (False)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if math.isinf(seconds) else max(0.0, seconds)):
            await stirred.wait()
    was = stirred.is_set()
    stirred.clear()
    return was
