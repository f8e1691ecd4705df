"""How much of this replica one caller may use at once, and which call is next.

A caller is an identity, or without one a host. A call beyond its limits is refused. Calls within
them take turns, a few at a time, one caller after another, so that many calls of one caller delay
only its own.

Renewals and releases are never refused, and have separate turns: they never wait for other kinds of
call.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff.v1 import (
    admin_service_pb2,
    budget_service_pb2,
    custody_service_pb2,
    lease_service_pb2,
    policy_service_pb2,
    token_service_pb2,
)
from holdoff_coordinator.failures import Failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Mapping
    from typing import NoReturn

    from google.protobuf.message import Message

    from holdoff_coordinator.caller import Caller

RETRY_SECONDS = 1.0
"""When to retry after a refusal."""
PAUSE_SECONDS = 0.5
"""A refusal is sent after about this time, which slows down callers that retry at once."""
LONG_SECONDS = 0.02
"""Work that takes longer is long."""
_BURST_SECONDS = 2.0
"""A burst may have the calls of this many seconds."""
_MOST_RATES = 1_000


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: its default, what it limits, and what a caller that meets it can do."""

    default: int
    what: str
    remedy: str


LIMITS: Mapping[str, Limit] = {
    "watches": Limit(50, "open watches", "end one, or share one"),
    "waits": Limit(10_000, "waits for a lease at a time", "start fewer jobs at a time"),
    "follows": Limit(10_000, "leases followed at a time", "start fewer jobs at a time"),
    "access-tokens": Limit(10_000, "streams of access tokens", "share one among jobs of a host"),
    "calls": Limit(200, "calls in progress", "wait for answers before the next call"),
    "calls-per-second": Limit(500, "calls a second", "call less often"),
    "reservations": Limit(
        10_000, "reservations that are neither committed nor cancelled", "commit or cancel some"
    ),
    "scope-bytes": Limit(
        128 * 1024,
        "bytes of scopes declared by all waiters",
        "declare fewer scopes, or leave out the endpoint",
    ),
    "connections": Limit(20_000, "connections of all callers", "close some"),
    "streams": Limit(2_000, "calls and streams on one connection", "use another connection"),
}
"""All limits, by name. gRPC enforces the last two without an error: it closes a connection beyond
the limit, and the client's gRPC delays a call beyond it."""

COUNTED = ("watches", "waits", "follows", "access-tokens", "calls")
"""Limits on what a caller has at once at this replica."""

_STREAMS: Mapping[type[Message], str] = {
    lease_service_pb2.WatchLeasesRequest: "watches",
    budget_service_pb2.WatchBudgetsRequest: "watches",
    custody_service_pb2.WatchGrantRequest: "watches",
    lease_service_pb2.AcquireLeaseRequest: "waits",
    lease_service_pb2.FollowLeaseRequest: "follows",
    custody_service_pb2.GetAccessTokenRequest: "access-tokens",
}
_OF_LEASES = (lease_service_pb2.RenewLeaseRequest, lease_service_pb2.ReleaseLeaseRequest)
_LONG = (
    lease_service_pb2.ListLeasesRequest,
    lease_service_pb2.ListLeaseHistoryRequest,
    lease_service_pb2.ListWaitersRequest,
    lease_service_pb2.ListQuarantinesRequest,
    token_service_pb2.ListTokensRequest,
    custody_service_pb2.ListGrantsRequest,
    budget_service_pb2.ListBudgetsRequest,
    budget_service_pb2.ListBackOffsRequest,
    budget_service_pb2.ExplainRequest,
    policy_service_pb2.ListPoliciesRequest,
    admin_service_pb2.ListAuditEventsRequest,
)
"""Calls that read much."""


class Turns:
    """Lets only a few calls work at once, and of each caller even fewer, one caller after another.

    Args:
        most: How many work at once.
        most_each: How many of them are of one caller.
        rests: After long work a turn pauses for as long as the work took, so that callers that take
            all turns leave half of the time for calls of other kinds.
    """

    def __init__(self, most: int, most_each: int, *, rests: bool = False) -> None:
        self._most = most
        self._most_each = most_each
        self._rests = rests
        self._working: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        """Calls that wait, by caller; the next caller first."""

    @contextlib.asynccontextmanager
    async def taken(self, caller: Hashable) -> AsyncIterator[None]:
        """Work in the block."""
        loop = asyncio.get_running_loop()
        turn, began = loop.create_future(), math.inf
        self._waiting.setdefault(caller, deque()).append(turn)
        self._next()
        try:
            await turn
            began = loop.time()
            yield
        finally:
            took = loop.time() - began
            if self._rests and took > LONG_SECONDS:
                loop.call_later(took, self._leave, caller)
            elif not turn.cancelled():  # it was given
                self._leave(caller)

    def _leave(self, caller: Hashable) -> None:
        self._working[caller] -= 1
        if not self._working[caller]:
            del self._working[caller]
        self._next()

    def _next(self) -> None:
        """Give away the turns that are free."""
        while self._working.total() < self._most:
            for caller in self._waiting:
                if self._working[caller] < self._most_each:
                    break
            else:
                return
            queue = self._waiting.pop(caller)
            turn = queue.popleft()
            if queue:
                self._waiting[caller] = queue  # behind all others
            if not turn.done():
                self._working[caller] += 1
                turn.set_result(None)


class Limits:
    """What each caller uses of this replica.

    Args:
        values: Limits that are not the default, by name.
        now: A clock that never jumps.
    """

    def __init__(
        self, values: Mapping[str, int] | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.values = {**{name: limit.default for name, limit in LIMITS.items()}, **(values or {})}
        self.on_refusal: Callable[[str], None] = lambda _: None
        """Called with the name of a limit whenever a caller reaches it."""
        self._now = now
        self._used: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._rates: dict[str, tuple[float, float]] = {}
        """By caller: how many calls it may make at once, and when that was."""
        # Together fewer than the connections to the store. With `wait_replicas` each may take as
        # long as `wait_seconds`; renewals of many jobs with one identity must continue then.
        self._leases, self._calls, self._reads = (
            Turns(64, 64),
            Turns(32, 16),
            Turns(2, 1, rests=True),
        )

    def most_used(self, name: str) -> int:
        """Return the highest use of something by any one caller."""
        return max(self._used[name].values(), default=0)

    @contextlib.asynccontextmanager
    async def kept(self, request: Message, caller: Caller) -> AsyncIterator[None]:
        """Carry out a call in the block.

        Raises:
            Failure: LIMIT_REACHED.
        """
        kind = type(request)
        if kind in _OF_LEASES:
            async with self._leases.taken(caller.account):
                yield
        elif stream := _STREAMS.get(kind):
            if stream == "watches":
                await self._spend(caller)
            async with self._taken(stream, caller):
                yield
        else:
            await self._spend(caller)
            turns = self._reads if kind in _LONG else self._calls
            async with self._taken("calls", caller), turns.taken(caller.account):
                yield

    def calling(self, caller: Caller) -> contextlib.AbstractAsyncContextManager[None]:
        """Call the store in the block, for a stream, as one of the calls that read little."""
        return self._calls.taken(caller.account)

    def reading(self, caller: Caller) -> contextlib.AbstractAsyncContextManager[None]:
        """Read much in the block, for a stream, as one of the calls that do so."""
        return self._reads.taken(caller.account)

    @contextlib.asynccontextmanager
    async def _taken(self, name: str, caller: Caller) -> AsyncIterator[None]:
        used, account = self._used[name], caller.account
        if used[account] >= self.values[name]:
            await self._refuse(name, caller)
        used[account] += 1
        try:
            yield
        finally:
            used[account] -= 1
            if not used[account]:
                del used[account]

    async def _spend(self, caller: Caller) -> None:
        """Count a call against the rate of its caller."""
        rate, now = self.values["calls-per-second"], self._now()
        most = max(1.0, rate * _BURST_SECONDS)
        left, at = self._rates.get(caller.account, (most, now))
        left = min(most, left + (now - at) * rate)
        if left < 1:
            await self._refuse("calls-per-second", caller)
        if len(self._rates) >= _MOST_RATES:  # a caller that was idle for a while has its full burst
            self._rates = {
                one: known for one, known in self._rates.items() if now - known[1] < _BURST_SECONDS
            }
        self._rates[caller.account] = left - 1, now

    async def _refuse(self, name: str, caller: Caller) -> NoReturn:
        failure = self.refusal(name, caller)
        # Not all in the same instant: answering thousands of them takes a while.
        await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
        raise failure

    def refusal(self, name: str, caller: Caller, where: str = "") -> Failure:
        """Return the error that says which limit a caller has reached, and what to do.

        Args:
            name: Of the limit.
            caller: The caller, which alone gets this error.
            where: The app or token, if the limit is not on everything that the caller does.
        """
        self.on_refusal(name)
        limit, value = LIMITS[name], self.values[name]
        return Failure(
            "LIMIT_REACHED",
            f"{caller.account!r} has reached the limit of {value} {limit.what}{where}: "
            f"{limit.remedy}, or ask the operator to raise the limit (--limit {name}=N)",
            retry_after_seconds=RETRY_SECONDS,
            resource=caller.account,
            metadata={"limit": name, "value": str(value), "caller": caller.account},
        )
