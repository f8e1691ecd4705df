"""What one caller may have at once, and who is served next: decisions without a coordinator."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from google.rpc import error_details_pb2

from holdoff.v1 import budget_service_pb2, lease_service_pb2, token_service_pb2
from holdoff_coordinator import limits
from holdoff_coordinator.caller import ANONYMOUS, Caller
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.limits import LIMITS, Limits, Turns

ALICE, BOB = Caller("alice", "ipv4:10.0.0.1:1"), Caller("bob", "ipv4:10.0.0.1:2")
GET = token_service_pb2.GetTokenRequest()
LIST = budget_service_pb2.ListBudgetsRequest()
WATCH = lease_service_pb2.WatchLeasesRequest()
RENEW = lease_service_pb2.RenewLeaseRequest()
RELEASE = lease_service_pb2.ReleaseLeaseRequest()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PAUSE_SECONDS", 0.0)


async def settled() -> None:
    """Let all tasks run until each waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


class Work:
    """Work of a caller that continues until `end`."""

    def __init__(self, started: list[str], caller: str, turns: Turns) -> None:
        self._started, self._caller, self._turns = started, caller, turns
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        async with self._turns.taken(self._caller):
            self._started.append(self._caller)
            await self._end.wait()

    async def end(self) -> None:
        """End it, and let the next one begin."""
        self._end.set()
        await self.task
        await settled()


async def test_callers_take_turns() -> None:
    """One caller's crowd does not come before the second caller, and has half of the turns.

    Fails when turns are given in the order in which they were asked for.
    """
    started: list[str] = []
    turns = Turns(2, 1)
    crowd = [Work(started, "alice", turns) for _ in range(10)]
    await settled()
    assert started == ["alice"]
    others = [Work(started, name, turns) for name in ("bob", "carol")]
    await settled()
    assert started == ["alice", "bob"]
    await others[0].end()
    assert started == ["alice", "bob", "carol"]
    for work in (crowd[0], *others[1:], *crowd[1:]):
        await work.end()
    assert started.count("alice") == 10


async def test_a_turn_of_a_cancelled_caller_is_passed_on() -> None:
    """A caller that is cancelled before its turn, or in the moment it gets it, costs no turn."""
    started: list[str] = []
    turns = Turns(1, 1)
    first = turns.taken("alice")
    await first.__aenter__()
    second, third = (Work(started, name, turns) for name in ("bob", "carol"))
    await settled()
    second.task.cancel()
    await settled()
    await first.__aexit__(None, None, None)  # the turn is carol's now, whose task has not run yet
    third.task.cancel()
    await settled()
    last = Work(started, "dave", turns)
    await settled()
    assert started == ["dave"]
    await last.end()


async def test_a_turn_rests_after_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time is left to others, whatever one caller asks for; short work rests not.

    Fails when a caller's next long call begins as soon as the one before has ended.
    """
    loop = asyncio.get_running_loop()
    rested: list[float] = []
    monkeypatch.setattr(loop, "call_later", lambda seconds, *_: rested.append(seconds))
    monkeypatch.setattr(limits, "LONG_SECONDS", 3600.0)
    turns = Turns(1, 1, rests=True)
    for _ in range(2):
        async with turns.taken("alice"):
            pass
    assert rested == []
    monkeypatch.setattr(limits, "LONG_SECONDS", -1.0)
    async with turns.taken("alice"):
        pass
    assert len(rested) == 1
    started: list[str] = []
    waiting = Work(started, "bob", turns)
    await settled()
    assert started == []
    waiting.task.cancel()


async def test_each_caller_has_its_own_limit() -> None:
    """The refusal says which limit, its value, who met it, and when to try again.

    Fails when callers are counted together, or what ended is still counted.
    """
    few = Limits({"watches": 2})
    refused: list[str] = []
    few.on_refusal = refused.append
    async with contextlib.AsyncExitStack() as open_streams:
        for caller in (ALICE, ALICE, BOB):
            await open_streams.enter_async_context(few.kept(WATCH, caller))
        with pytest.raises(Failure, match=r"'alice' .* 2 open watches: .*--limit watches=N") as one:
            await open_streams.enter_async_context(few.kept(WATCH, ALICE))
        assert one.value.metadata == {"limit": "watches", "value": "2", "caller": "alice"}
        details = {detail.TypeName() for detail in one.value.to_status().details}
        assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name in details
        assert refused == ["watches"]
        assert few.most_used("watches") == 2
        await open_streams.enter_async_context(few.kept(WATCH, BOB))
    assert few.most_used("watches") == 0
    async with few.kept(WATCH, ALICE):
        pass


async def test_without_an_identity_the_host_is_the_caller() -> None:
    """Two connections of a host are one caller, those of two hosts are two."""
    few = Limits({"watches": 1})
    peers = ("ipv4:10.0.0.1:7", "ipv4:10.0.0.1:8", "ipv6:[::1]:7")
    first, again, other = (Caller(ANONYMOUS, peer) for peer in peers)
    async with few.kept(WATCH, first), few.kept(WATCH, other):
        with pytest.raises(Failure):
            await few.kept(WATCH, again).__aenter__()


async def test_a_rate_has_a_burst_and_recovers() -> None:
    """Two seconds' calls may come at once; then as many a second as the limit says."""
    now = [0.0]
    few = Limits({"calls-per-second": 5}, lambda: now[0])

    async def call() -> bool:
        try:
            async with few.kept(GET, ALICE):
                return True
        except Failure:
            return False

    assert [await call() for _ in range(12)] == [True] * 10 + [False] * 2
    now[0] = 1.0
    assert [await call() for _ in range(6)] == [True] * 5 + [False]
    async with few.kept(GET, BOB):
        pass


async def test_callers_that_were_not_seen_for_long_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory for rates is bounded, and forgetting a caller gives it nothing."""
    monkeypatch.setattr(limits, "_MOST_RATES", 3)
    now = [0.0]
    few = Limits({}, lambda: now[0])
    for number in range(50):
        now[0] += 1.0
        async with few.kept(GET, Caller(str(number), "")):
            pass
        assert len(few._rates) <= 4


@pytest.mark.parametrize("request_", [RENEW, RELEASE], ids=["renewal", "release"])
async def test_renewals_wait_for_no_other_call(
    request_: lease_service_pb2.RenewLeaseRequest | lease_service_pb2.ReleaseLeaseRequest,
) -> None:
    """A caller that used up everything else still renews and releases, at once.

    Fails when a renewal is counted as a call, or shares turns with other calls.
    """
    few = Limits({"calls": 20, "calls-per-second": 20})
    forever = asyncio.Event()

    async def call(request: object) -> None:
        async with few.kept(request, ALICE):  # type: ignore[arg-type] # one or the other
            await forever.wait()

    calls = [asyncio.create_task(call(one)) for one in (GET, LIST) for _ in range(20)]
    await settled()
    assert few.most_used("calls") == 20
    for _ in range(50):
        async with asyncio.timeout(10), few.kept(request_, ALICE):
            pass
    for one in calls:
        one.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_lists_leave_room_for_other_calls() -> None:
    """A caller whose lists take long does not hold up another one's list, nor its own calls."""
    few = Limits()
    forever = asyncio.Event()

    async def read() -> None:
        async with few.kept(LIST, ALICE):
            await forever.wait()

    lists = [asyncio.create_task(read()) for _ in range(100)]
    await settled()
    async with asyncio.timeout(10), few.kept(LIST, BOB), few.kept(GET, ALICE):
        pass
    for one in lists:
        one.cancel()
    await asyncio.gather(*lists, return_exceptions=True)


def test_each_limit_can_be_changed() -> None:
    """A value that is given takes the place of the default, and of no other limit."""
    assert Limits({"calls": 7}).values == {
        **{name: limit.default for name, limit in LIMITS.items()},
        "calls": 7,
    }
