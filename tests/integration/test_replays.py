"""Promise 6 across a loss: what the store forgot is sent again, and counts exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

import holdoff
from holdoff._reporting import Reporter
from holdoff._spool import Spool
from holdoff.policies import presets
from holdoff.v1 import budget_pb2, token_service_pb2
from tests.harness import Replica, wait_until
from tests.integration.test_budgets import COUNTED, KNOWN, Budgets, policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.conftest import Server, StartValkey

ENDPOINT = "/api/v1/535193/crm/Accounts"


@pytest.fixture
def valkey(start_valkey: StartValkey) -> Server:
    """Give a store of its own, which loses data."""
    return start_valkey()


class Past:
    """A replica of the store that lags behind: it has what the store had when this was made."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        keys = list(store.scan_iter(count=1000))
        self._records = {key: (store.dump(key), max(0, store.pttl(key))) for key in keys}

    def take_over(self) -> None:
        """Put the past in the place of the present, with the marks of a failover."""
        with self._store.pipeline() as pipeline:
            pipeline.flushall()
            for key, (value, ttl_ms) in self._records.items():
                if value:
                    pipeline.restore(key, ttl_ms, value)
            pipeline.slaveof("127.0.0.1", 1)
            pipeline.slaveof()
            pipeline.execute()


@pytest.fixture
def store(valkey: Server) -> Iterator[redis.Redis]:
    """Connect to it."""
    with redis.Redis.from_url(valkey.url) as client:
        yield client


@contextlib.contextmanager
def two_replicas(valkey: Server) -> Iterator[tuple[Replica, Replica, str]]:
    """Give two replicas and a token with limits."""
    policies = {**presets(), "ours": policy()}
    with (
        Replica(valkey.url, policies=policies) as one,
        Replica(valkey.url, policies=policies) as other,
    ):
        token = one.create_token(0.0)
        request = token_service_pb2.UpdateTokenRequest()
        request.update_mask.paths.append("policy")
        request.token.name, request.token.policy = token, "ours"
        one.tokens.UpdateToken(request)
        yield one, other, token


def acknowledged_earlier(replica: Replica, seconds: float) -> None:
    """Make what a replica acknowledged so much older."""
    for kept in replica.coordinator._replays._kept.values():
        part: Any
        for part in (kept.events, kept.reservations, kept.settled):
            for _ in range(len(part)):
                at_us, what = part.popleft()
                part.append((at_us - round(seconds * 1e6), what))


def counted_at(store: redis.Redis, token: str, event: budget_pb2.Event) -> float:
    """Return when an event counts as having happened, in seconds."""
    [log] = store.scan_iter(f"holdoff:{{{token.split('/')[1]}}}:log:errors*", count=1000)
    at_us: Any = store.zscore(log, hashlib.sha256(event.id.encode()).hexdigest())
    return float(at_us) / 1e6


def has_replayed(*replicas: Replica) -> bool:
    """Tell whether replicas have nothing left to send again."""
    return not any(one.coordinator._replays._due for one in replicas)


def test_what_a_failover_lost_counts_again(valkey: Server, store: redis.Redis) -> None:
    """Events and reservations of each replica are there again, as old as they were, and once.

    Fails when a replica keeps nothing, when it waits for a call to notice the failover, or when
    ages are left as they were first sent.
    """
    with two_replicas(valkey) as (first, second, token):
        one, other = Budgets(first, token), Budgets(second, token)
        known = [one.event() for _ in range(2)]
        one.record(*known)
        past = Past(store)
        lost = [one.event(age_seconds=100) for _ in range(2)]
        assert one.record(*lost) == [COUNTED] * 2
        assert other.record(other.event()) == [COUNTED]
        reserved = [one.reserve(ttl_seconds=600) for _ in range(3)]
        other.commit(reserved[0], 404)  # made by one replica, and settled by another one
        one.cancel(reserved[1])
        assert (one.errors().used, one.errors().reserved) == (6, 1)
        happened = counted_at(store, token, lost[0])
        acknowledged_earlier(first, 60)
        past.take_over()
        wait_until(lambda: (one.errors().used, one.errors().reserved) == (6, 1))
        wait_until(lambda: has_replayed(first, second))
        assert (one.errors().used, one.errors().reserved) == (6, 1)
        assert one.record(*known, *lost) == [KNOWN] * 4
        assert abs(happened - 60 - counted_at(store, token, lost[0])) < 30
        assert other.commit(reserved[2]) == budget_pb2.RESERVATION_STATE_COMMITTED
        wait_until(lambda: one.errors().reserved == 0)


def test_a_reservation_is_restored_where_there_is_no_room(
    valkey: Server, store: redis.Redis
) -> None:
    """Room that was promised is taken again although others have used it up meanwhile."""
    with two_replicas(valkey) as (first, second, token):
        one, other = Budgets(first, token), Budgets(second, token)
        past = Past(store)
        one.reserve(ttl_seconds=600)
        past.take_over()
        other.record(*(other.event() for _ in range(8)))
        wait_until(lambda: (one.errors().used, one.errors().reserved) == (8, 1))


def test_a_commit_brings_its_reservation_along(valkey: Server, store: redis.Redis) -> None:
    """A call counts again although the replica that reserved its room is gone.

    Fails when a commit is given up whose reservation the store has lost.
    """
    with two_replicas(valkey) as (first, second, token):
        one, other = Budgets(first, token), Budgets(second, token)
        past = Past(store)
        other.commit(one.reserve(ttl_seconds=600), 404)
        assert (other.errors().used, other.errors().reserved) == (1, 0)
        first.stop()
        past.take_over()

        def used() -> list[tuple[int, int]]:
            return [(budget.used, budget.reserved) for budget in other.list()]

        wait_until(lambda: used() == [(1, 0)] * 2)
        wait_until(lambda: has_replayed(second))
        assert used() == [(1, 0)] * 2


def test_what_a_store_that_lost_everything_counted(valkey: Server, store: redis.Redis) -> None:
    """Events count again in an app that was made anew, also when another replica made it.

    Fails when a replica compares histories alone, which this loss does not change.
    """
    with two_replicas(valkey) as (first, second, token):
        one, other = Budgets(first, token), Budgets(second, token)
        one.record(*(one.event() for _ in range(3)))
        store.flushall()
        second.create_token(0.0, name=token)
        wait_until(lambda: [budget.used for budget in other.list()] == [3])


def test_nothing_is_sent_again_while_nothing_changes(valkey: Server) -> None:
    """Neither a new token nor a look each second is taken for another life of the store."""
    with two_replicas(valkey) as (first, second, token):
        budgets = Budgets(first, token)
        budgets.record(budgets.event())
        scripts = first.coordinator.scripts
        looks: list[list[str]] = []
        ran: list[str] = []
        look = scripts.changed

        async def counted(apps: Iterable[str]) -> list[str]:
            looks.append(await look(apps))
            return looks[-1]

        scripts.changed = counted  # type: ignore[method-assign]
        scripts.on_run = lambda name, _: ran.append(name)
        wait_until(lambda: len(looks) > 2)
        assert looks[:3] == [[]] * 3
        assert has_replayed(first, second)
        assert "record_events" not in ran


def report(endpoint: str, token: str, between: Callable[[], None]) -> None:
    """Report three errors, and one more after something else happened."""
    with holdoff.Client(endpoint) as client:
        for _ in range(3):
            client.record_error(token, endpoint=ENDPOINT, status=400)
        between()
        client.record_error(token, endpoint=ENDPOINT, status=400)


def report_in_a_loop(endpoint: str, token: str, between: Callable[[], None]) -> None:
    """Do the same with asyncio."""

    async def run() -> None:
        async with holdoff.aio.Client(endpoint) as client:
            for _ in range(3):
                await client.record_error(token, endpoint=ENDPOINT, status=400)
            await asyncio.to_thread(between)
            await client.record_error(token, endpoint=ENDPOINT, status=400)

    asyncio.run(run())


def report_as_a_run_does(endpoint: str, token: str, between: Callable[[], None]) -> None:
    """Do the same as `holdoff run`, by way of its spool."""

    def error() -> budget_pb2.Event:
        scope = budget_pb2.Scope(token=token, endpoint=ENDPOINT)
        kind = budget_pb2.EVENT_KIND_ERROR
        return budget_pb2.Event(id=str(uuid.uuid4()), kind=kind, scope=scope, status=400)

    with (
        holdoff.Client(endpoint) as client,
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Spool(Path(folder, "spool"))) as spool,
    ):
        reporter = Reporter(client.record_events, spool)
        reporter.report(*(error() for _ in range(3)))
        wait_until(lambda: reporter.idle_since)
        between()
        reporter.report(error())
        wait_until(lambda: reporter.idle_since)
        assert reporter.close(10) == 0


@pytest.mark.parametrize("reports", [report, report_in_a_loop, report_as_a_run_does])
def test_a_client_sends_again_what_coordinator_and_store_lost(
    valkey: Server, store: redis.Redis, reports: Callable[[str, str, Callable[[], None]], None]
) -> None:
    """Although the coordinator that counted them is gone, a client's events count again.

    Fails when the client forgets what was counted, or does not look at the life of the store.
    """
    with two_replicas(valkey) as (first, second, token):
        past = Past(store)

        def lose() -> None:
            assert Budgets(first, token).errors().used == 3
            first.stop()
            past.take_over()

        reports(f"{first.address},{second.address}", token, lose)
        assert Budgets(second, token).errors().used == 4
