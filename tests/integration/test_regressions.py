"""Faults that were found once, each with the test that shows it."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import redis_lock

import holdoff
import holdoff.aio
from holdoff import _core
from holdoff.v1 import admin_service_pb2, lease_pb2, token_service_pb2
from holdoff.v1.lease_service_pb2 import LeaseOffer
from holdoff_coordinator.scripts import boottime_us
from tests.harness import (
    Replica,
    Waiter,
    ask,
    refusal,
    request_hash,
    silent_waiter,
    wait_until,
    wake,
)

if TYPE_CHECKING:
    import redis

    from tests.conftest import Server, StartValkey


def test_no_library_user_gets_in_between_expiry_and_cooldown(
    replica: Replica, store: redis.Redis
) -> None:
    """The lock's key outlasts the cooldown that follows an expiry nobody saw at once.

    Fails when `mirror` lets the key end with the lease.
    """
    token = replica.create_token(1.0)
    offer = replica.hold(token)
    expires_us = replica.show(offer.lease.name).expire_time.ToMicroseconds()
    ends_ms = store.pexpiretime(f"lock:{replica.show_token(token).lock_name}")
    assert ends_ms >= expires_us / 1000 + 900  # the server rounds its time for keys


def test_a_cooldown_that_an_update_began_wakes_library_users(
    replica: Replica, store: redis.Redis
) -> None:
    """Whatever makes a token busy, the sweeper ends it.

    Fails when `mirror` does not put the token into the sweeper's view.
    """
    token = replica.create_token(0.1)
    replica.release(replica.hold(token))
    wait_until(lambda: not replica.show_token(token).HasField("cooldown"))
    longer = token_service_pb2.UpdateTokenRequest()
    longer.token.name = token
    longer.token.refresh_interval.FromMilliseconds(1500)
    replica.tokens.UpdateToken(longer)
    lock = redis_lock.Lock(store, replica.show_token(token).lock_name)
    thread = threading.Thread(target=lock.acquire, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_the_place_of_a_dead_waiter_is_not_kept_for_ever(
    replica: Replica, store: redis.Redis
) -> None:
    """An app that is otherwise idle forgets its dead waiters, so that nobody defers to ghosts.

    Fails when a queue alone does not keep its token in the sweeper's view.
    """
    token = replica.create_token(0)
    held = replica.hold(token)
    ghost = ask(token)
    assert replica.leases.AcquireLease(ghost).waiting.place == 1
    key = f"holdoff:{{{token.split('/')[1]}}}:request:{request_hash(ghost)}"
    store.hincrby(key, "heard_us", -6_000_000)
    replica.release(held)
    assert store.exists(key)
    store.hincrby(key, "heard_service_us", -61_000_000)
    wait_until(lambda: not store.exists(key))  # asks the store: a look at the token cleans up


def test_a_silent_head_of_a_queue_does_not_spin(
    replica: Replica, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended client costs a few calls a second, not thousands.

    Fails when `start_after_seconds` counts for a request that nothing stands in the way of.
    """
    token = replica.create_token(0)
    held = replica.hold(token)
    silent = silent_waiter(replica, ask(token))
    replica.release(held)
    wake(store, silent.request)
    wait_until(lambda: silent.last and silent.last.waiting.reason != lease_pb2.WAIT_REASON_HELD)
    ran: list[str] = []
    monkeypatch.setattr(replica.coordinator.scripts, "on_run", lambda name, _: ran.append(name))
    wait_until(lambda: ran.count("tick") > 2)
    assert ran.count("acquire") < 20
    silent.vanish()


def test_quarantine_lasts_for_a_ttl_and_an_interval(valkey: Server) -> None:
    """A holder may refresh until its lease runs out, and the interval counts from there.

    Fails when `longest_hold` takes the longer of the two.
    """
    with Replica(valkey.url, quarantine_seconds=0.0) as replica:
        token = replica.create_token(100)
        replica.hold(token, ttl=50.0)
        app = token.split("/")[1]
        replica.coordinator.scripts._epochs[app] = "another"  # as after a change of the store
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
        waiter = Waiter(replica, ask(token))
        assert 110 < waiter.waiting().earliest_start_in.ToSeconds() <= 150
        waiter.vanish()


def test_an_app_not_met_before_a_jump_is_doubted_too(start_valkey: StartValkey) -> None:
    """The jump of the store's clock concerns every app.

    Fails when `Scripts` doubts only the apps it has seen.
    """
    valkey, step = start_valkey(), [0]
    with (
        Replica(valkey.url) as other,
        Replica(
            valkey.url, boot_us=lambda: boottime_us() + step[0], quarantine_seconds=1.0
        ) as replica,
    ):
        unknown, known = other.create_token(0), replica.create_token(0)
        replica.hold(known)
        replica.coordinator.scripts._epochs.clear()
        step[0] = -60_000_000
        assert refusal(lambda: replica.acquire(known)) in ("QUARANTINED", "LEASE_HELD")
        assert refusal(lambda: replica.acquire(unknown)) == "QUARANTINED"


def test_a_single_call_beside_a_stream_leaves_it_alive(replica: Replica) -> None:
    """A stream is heard and woken also after its request was polled once.

    Fails when `Hub.joined` forgets the first conversation of a request.
    """
    token = replica.create_token(0)
    held = replica.hold(token)
    waiter = Waiter(replica, ask(token))
    waiter.waiting()
    replica.leases.AcquireLease(waiter.request)
    replica.release(held)
    waiter.offer()
    waiter.vanish()


def test_a_stranger_cannot_withdraw_anothers_request(replica: Replica) -> None:
    """Withdrawing is bound to the request's parameters, as asking again is."""
    token = replica.create_token()
    replica.hold(token, ttl=30.0)
    waiter = Waiter(replica, ask(token, job="mine"))
    waiter.waiting()
    stranger = Waiter(replica, ask(token, job="other", request_id=waiter.request.request_id))
    stranger.withdraw()
    wait_until(lambda: stranger.ended)
    assert replica.show_token(token).queue_length == 1
    waiter.vanish()


@pytest.mark.parametrize("wait_seconds", [0.0, 0.3])
def test_a_mute_coordinator_does_not_hold_up_a_limited_wait(
    wait_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that accepts connections and says nothing is unreachable when the wait is over.

    Without a wait that is after some seconds. Fails, by never ending, when the stream has no
    time-out.
    """
    assert _core.NO_WAIT_SECONDS + _core.GRACE_FOR_ANSWER_SECONDS < 5.0  # as the README says
    monkeypatch.setattr(_core, "NO_WAIT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = holdoff.Client(f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(holdoff.Unavailable):
            client.acquire("apps/a/tokens/t", wait_seconds=wait_seconds)
        client.close()


def test_unknown_fields_are_not_stored(replica: Replica) -> None:
    """What we don't know of a holder is dropped, so that no listing grows with it."""
    request = ask(replica.create_token(), wait=0.0)
    unknown = b"\xa2\x06\x84\x80\x01" + b"x" * 16_388  # field 100
    request.holder.MergeFromString(unknown)
    offer = replica.leases.AcquireLease(request).offer
    assert offer.lease.ByteSize() < 1000


def test_the_queue_has_a_limit(replica: Replica, store: redis.Redis) -> None:
    """A token takes a thousand waiters, and refuses more clearly.

    Fails when acquire.lua does not look at QUEUE_LIMIT.
    """
    token = replica.create_token()
    replica.hold(token, ttl=30.0)
    app = token.split("/")[1]
    places: dict[str, float] = {f"place-{number}": number for number in range(1000)}
    store.zadd(f"holdoff:{{{app}}}:queue:t", places)  # as so many waiters would
    assert refusal(lambda: replica.acquire(token, wait=None)) == "QUEUE_FULL"


def test_a_second_break_tells_the_first_reason(replica: Replica) -> None:
    """A lease that is over says why it was broken."""
    offer = replica.hold(replica.create_token(), ttl=30.0)
    request = admin_service_pb2.BreakLeaseRequest(name=offer.lease.name, reason="first")
    replica.admin.BreakLease(request)
    replica.release(offer)
    with pytest.raises(Exception, match="first"):
        replica.renew(offer)


def state_of(store: redis.Redis, token: str) -> dict[bytes, bytes]:
    """Return all that the store knows of a token's app."""
    shard = f"holdoff:{{{token.split('/')[1]}}}"
    keys = list(store.scan_iter(f"*{shard}*", count=1000))
    with store.pipeline(transaction=True) as step:
        for key in keys:
            step.dump(key)
        return {key: dumped for key, dumped in zip(keys, step.execute(), strict=True) if dumped}


def lose_what_came_since(store: redis.Redis, token: str, before: dict[bytes, bytes]) -> None:
    """Put an app back to how it was, as a failover does to a replica that lags.

    That is one step: the sweeper comes by at any time, and must not find half of it.
    """
    with store.pipeline(transaction=True) as step:
        step.delete(*state_of(store, token))
        for key, dumped in before.items():
            step.restore(key, 0, dumped)
        step.execute()


def test_what_a_failover_lost(
    replica: Replica, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds that the store knows nothing of its offer waits on, and gets a lease.

    And a lease that the store forgot is lost. Fails when the client takes LEASE_NOT_FOUND for the
    end of its request, or raises it where a lease is given back.
    """
    token = replica.create_token(0.0)
    before, offers = state_of(store, token), list[LeaseOffer]()
    accept = holdoff.Client._accept

    def accept_later(
        client: holdoff.Client, offer: LeaseOffer, *how: Any
    ) -> holdoff.HeldLease | None:
        offers.append(offer)
        if len(offers) == 1:
            lose_what_came_since(store, token, before)
        return accept(client, offer, *how)

    monkeypatch.setattr(holdoff.Client, "_accept", accept_later)
    with holdoff.Client(replica.address) as client:
        lease = client.acquire(token, wait_seconds=20)
        lease.check()
        lose_what_came_since(store, token, before)
        with pytest.raises(holdoff.LeaseLost):
            lease.release()


async def test_what_a_failover_lost_with_asyncio(
    replica: Replica, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with asyncio. Fails when only the synchronous client waits on."""
    token = replica.create_token(0.0)
    before, offers = state_of(store, token), list[LeaseOffer]()
    accept = holdoff.aio.Client._accept

    async def accept_later(
        client: holdoff.aio.Client, offer: LeaseOffer, *how: Any
    ) -> holdoff.aio.HeldLease | None:
        offers.append(offer)
        if len(offers) == 1:
            lose_what_came_since(store, token, before)
        return await accept(client, offer, *how)

    monkeypatch.setattr(holdoff.aio.Client, "_accept", accept_later)
    async with holdoff.aio.Client(replica.address) as client:
        lease = await client.acquire(token, wait_seconds=20)
        lease.check()
        lose_what_came_since(store, token, before)
        with pytest.raises(holdoff.LeaseLost):
            await lease.release()
