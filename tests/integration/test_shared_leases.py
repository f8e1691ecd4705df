"""Leases on a token in custody: several at a time, and none tells of a refresh."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis_lock
from click.testing import CliRunner

from holdoff.cli import main
from holdoff.policies import presets
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
)
from tests.custodian import Custodian, key_directory, refused
from tests.harness import Waiter, ask, end_cooldown, token_to_create, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartValkey

SHARED = lease_pb2.LEASE_MODE_SHARED
EXCLUSIVE = lease_pb2.LEASE_MODE_EXCLUSIVE
MOST = 2
HOST = "start.exactonline.nl"
INTERVAL_SECONDS = 600.0


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def custodian(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Custodian]:
    """Give a coordinator with keys, and a policy that allows two runs at a time."""
    keys: Path = key_directory(tmp_path_factory.mktemp("keys"), "first")
    xero = presets()["xero"]
    known = {**presets(), "two": type(xero)(**{**_fields(xero), "name": "two", "most_runs": MOST})}
    with Custodian(url, keys, policies=known) as one:
        yield one


def _fields(policy: Any) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in policy.__struct_fields__}


@pytest.fixture
def store(url: str) -> Iterator[redis.Redis]:
    """Give a plain client of the store."""
    with redis.Redis.from_url(url) as client:
        yield client


@pytest.fixture
def token(custodian: Custodian) -> str:
    """Give a token in custody."""
    name = in_policy(custodian)
    custodian.put(name)
    return name


def in_policy(custodian: Custodian, policy: str = "two") -> str:
    """Create a token with a policy, and an interval."""
    name = f"apps/{uuid.uuid4().hex}/tokens/t"
    request = token_to_create(name, INTERVAL_SECONDS)
    request.token.policy = policy
    custodian.tokens.CreateToken(request)
    return name


def shard(token: str) -> str:
    """Return the key of the token's app."""
    return f"holdoff:{{{token.split('/')[1]}}}"


def instants(custodian: Custodian, token: str) -> tuple[Any, ...]:
    """Return what a lease must not move."""
    one = custodian.show_token(token)
    grant = custodian.grant(token)
    return (one.last_refresh_time, one.not_before_time, grant.refresh_time, grant.not_before_time)


def listed(custodian: Custodian, parent: str) -> list[str]:
    """List the names of live leases."""
    request = lease_service_pb2.ListLeasesRequest(parent=parent)
    return [one.name for one in custodian.leases.ListLeases(request).leases]


def explain(custodian: Custodian, token: str) -> budget_service_pb2.ExplainResponse:
    """Explain whether a job may start."""
    scope = budget_pb2.Scope(token=token)
    return custodian.budgets.Explain(budget_service_pb2.ExplainRequest(scope=scope))


@contextlib.contextmanager
def waiting(custodian: Custodian, token: str) -> Iterator[Waiter]:
    """Wait for a lease in the block."""
    one = Waiter(custodian, ask(token))
    try:
        wait_until(lambda: one.last)
        yield one
    finally:
        one.vanish()


def test_as_many_as_the_policy_allows(custodian: Custodian, token: str) -> None:
    """Two live at the same time, the third waits for the end of one. Fails without the limit."""
    first, second = custodian.hold(token), custodian.hold(token)
    assert first.lease.mode == second.lease.mode == SHARED
    assert second.lease.fencing_token > first.lease.fencing_token
    assert sorted(listed(custodian, token)) == sorted([first.lease.name, second.lease.name])
    assert custodian.show_token(token).shared_lease_count == MOST
    assert "as many runs as its policy allows" in str(refused(custodian.acquire, token))
    with waiting(custodian, token) as third, waiting(custodian, token) as fourth:
        wait_until(lambda: fourth.last and fourth.last.waiting.place == 2)
        explained = explain(custodian, token)
        assert (explained.grant.shared_lease_count, explained.grant.most_runs) == (MOST, MOST)
        full, queued = explained.obstacles
        assert "2 runs share the token in custody, as many as its policy allows" in full.message
        assert explained.message.endswith(full.message)
        assert queued.reason == lease_pb2.WAIT_REASON_QUEUED
        custodian.release(first)
        offer = third.offer()
        custodian.renew(offer)
        assert not any(event.HasField("offer") for event in fourth.events)
        custodian.release(second)
        custodian.renew(fourth.offer())
    history = custodian.leases.ListLeaseHistory(
        lease_service_pb2.ListLeaseHistoryRequest(parent=token)
    ).leases
    assert [one.state for one in history] == [
        *(lease_pb2.LEASE_STATE_ACTIVE, lease_pb2.LEASE_STATE_ACTIVE),
        *(lease_pb2.LEASE_STATE_RELEASED, lease_pb2.LEASE_STATE_RELEASED),
    ]


def test_offers_are_made_at_once(custodian: Custodian, token: str) -> None:
    """Two who wait are offered a lease without the first one having accepted."""
    holders = [custodian.hold(token) for _ in range(MOST)]
    with waiting(custodian, token) as one, waiting(custodian, token) as other:
        wait_until(lambda: other.last and other.last.waiting.place == 2)
        for holder in holders:
            custodian.release(holder)
        wait_until(lambda: len(listed(custodian, token)) == MOST, 10)
        assert one.offer().lease.name != other.offer().lease.name


def test_no_end_begins_a_cooldown(custodian: Custodian, token: str, store: redis.Redis) -> None:
    """A release, a loss and a break move neither the last refresh nor the earliest next one."""
    before = instants(custodian, token)
    hold_before = store.hget(shard(token), "hold_us")
    custodian.release(custodian.hold(token))
    custodian.hold(token, ttl=1.0)
    wait_until(lambda: not listed(custodian, token))
    offer = custodian.hold(token)
    broken = admin_service_pb2.BreakLeaseRequest(name=offer.lease.name, reason="runs wild")
    custodian.admin.BreakLease(broken)
    assert custodian.show(offer.lease.name).state == lease_pb2.LEASE_STATE_BREAKING
    assert refused(custodian.renew, offer).reason == "LEASE_BROKEN"
    custodian.release(offer)
    assert custodian.show(offer.lease.name).state == lease_pb2.LEASE_STATE_BROKEN
    assert instants(custodian, token) == before
    assert store.hget(shard(token), "hold_us") == hold_before


def test_a_cooldown_holds_up_no_run(custodian: Custodian) -> None:
    """The token was refreshed a moment ago, by the coordinator: a job may start."""
    token = in_policy(custodian)
    custodian.put(token, last_refresh_age=None)
    assert custodian.show_token(token).HasField("cooldown")
    assert not explain(custodian, token).must_wait
    assert custodian.hold(token).lease.mode == SHARED
    explained = explain(custodian, token)
    assert (explained.grant.shared_lease_count, explained.must_wait) == (1, False)
    shown = CliRunner().invoke(main, ["--endpoint", custodian.address, "explain", token])
    assert re.search("runs +1 of at most 2 share the token in custody", shown.output)


def test_a_quarantine_holds_up_no_run(custodian: Custodian, token: str, store: redis.Redis) -> None:
    """But it holds those of a token that was put since it began. Fails if it stops all jobs."""
    now_us = round(time.time() * 1e6)
    store.hset(shard(token), "quarantine_since_us", str(now_us))
    store.hset(shard(token), "quarantine_until_us", str(now_us + 600_000_000))
    assert not explain(custodian, token).must_wait
    assert custodian.hold(token).lease.mode == SHARED
    store.hset(f"{shard(token)}:token:{token.split('/')[3]}", "custody_us", str(now_us + 1))
    assert refused(custodian.acquire, token).reason == "QUARANTINED"
    assert explain(custodian, token).must_wait


def test_the_mode_that_is_asked_for(custodian: Custodian, token: str) -> None:
    """One that the token does not give is refused, with what to do."""
    assert "its leases are shared" in str(refused(custodian.acquire, token, mode=EXCLUSIVE))
    assert custodian.acquire(token, mode=SHARED).offer.lease.mode == SHARED
    other = in_policy(custodian)
    assert "put its grant" in str(refused(custodian.acquire, other, mode=SHARED))
    assert custodian.acquire(other, mode=EXCLUSIVE).offer.lease.mode == EXCLUSIVE


def test_the_way_changes_when_no_lease_lives(custodian: Custodian, store: redis.Redis) -> None:
    """A grant is put when no exclusive lease lives, and deleted when no shared one does."""
    token = in_policy(custodian)
    exclusive = custodian.hold(token)
    assert "lease" in str(refused(custodian.put, token))
    custodian.release(exclusive)
    end_cooldown(store, token)
    custodian.put(token)
    shared = custodian.hold(token)
    assert "lease" in str(refused(custodian.delete, token))
    custodian.release(shared)
    custodian.delete(token)
    assert custodian.show_token(token).shared_lease_count == 0
    end_cooldown(store, token)
    assert custodian.hold(token).lease.mode == EXCLUSIVE


def test_python_redis_lock_is_kept_out(
    custodian: Custodian, token: str, store: redis.Redis
) -> None:
    """Its lock is held while the token is in custody; a forced one stops requests, not jobs."""
    name = custodian.show_token(token).lock_name
    lock = redis_lock.Lock(store, name, expire=60)
    assert not lock.acquire(blocking=False)
    assert store.ttl(f"lock:{name}") == -1
    holder = custodian.hold(token)
    store.set(f"lock:{name}", "foreign", px=60_000)
    assert custodian.grant(token).status.state == 4
    custodian.renew(holder)
    custodian.release(custodian.hold(token))
    store.delete(f"lock:{name}")
    wait_until(lambda: store.get(f"lock:{name}") == b"holdoff-custody")
    assert custodian.show_token(token).HasField("cooldown")
    custodian.renew(holder)


def test_a_clock_that_went_back_keeps_no_dead_lease(
    custodian: Custodian, token: str, store: redis.Redis
) -> None:
    """Fails when the lease of a holder that is gone lives for as long as the step."""
    offer = custodian.hold(token, ttl=1.0)
    lease_id = offer.lease.name.rpartition("/")[2]
    ahead_us = round((time.time() + 3600) * 1e6)
    store.hset(f"{shard(token)}:lease:t:{lease_id}", "expires_us", str(ahead_us))
    store.zadd(f"{shard(token)}:shared:t", {lease_id: ahead_us})
    store.hset(shard(token), "high_water_us", str(ahead_us))
    wait_until(lambda: not listed(custodian, token))
    assert custodian.show(offer.lease.name).state == lease_pb2.LEASE_STATE_EXPIRED


def test_back_offs_of_token_requests_hold_no_run(custodian: Custodian) -> None:
    """Those of its calls do. Fails when a spent budget of token requests stops all jobs."""
    token = in_policy(custodian, "exact-online")
    where = {"token_url": f"https://{HOST}/api/oauth2/token", "api_hosts": [HOST]}
    custodian.put(token, grant=where)
    event = budget_pb2.Event(
        kind=budget_pb2.EVENT_KIND_TOKEN_REQUEST, count=1000, id=str(uuid.uuid4())
    )
    event.scope.token = token
    custodian.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))
    assert custodian.hold(token).lease.mode == SHARED


def test_a_waiter_withdraws_its_offer(custodian: Custodian, token: str) -> None:
    """Its room is free again at once."""
    with waiting(custodian, token) as one:
        one.offer()
        one.withdraw()
        wait_until(lambda: not listed(custodian, token))
    assert custodian.hold(token)
