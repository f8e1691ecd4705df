"""Safeguards that no other test missed when a mutant took them out (`make mutants`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.harness import Replica, Waiter, ask, refusal, request_hash, wait_until

if TYPE_CHECKING:
    import redis

    from tests.conftest import Server


def test_half_a_minute_of_silence_keeps_the_position(replica: Replica, store: redis.Redis) -> None:
    """A waiter that was silent for thirty seconds is still before one that came after it."""
    token = replica.create_token()
    replica.hold(token)
    first = Waiter(replica, ask(token))
    assert first.waiting().place == 1
    first.vanish()
    name = request_hash(first.request)
    wait_until(lambda: name not in replica.coordinator.hub._waiters)
    key = f"holdoff:{{{token.split('/')[1]}}}:request:{name}"
    store.hincrby(key, "heard_us", -30_000_000)
    store.hincrby(key, "heard_service_us", -30_000_000)
    second = Waiter(replica, ask(token))
    assert second.waiting().place == 2
    back = Waiter(replica, first.request)
    assert back.waiting().place == 1
    for waiter in (second, back):
        waiter.vanish()


def test_a_clock_that_went_back_before_a_coordinator_came(
    replica: Replica, valkey: Server, store: redis.Redis
) -> None:
    """A coordinator that has no estimate of the clock sees by the records that it went back."""
    token = replica.create_token(0)
    shard = f"holdoff:{{{token.split('/')[1]}}}"
    store.hincrby(shard, "high_water_us", 5_000_000)
    with Replica(valkey.url) as stranger:
        assert stranger.show_token(token).wait_reason
        assert store.hget(shard, "quarantine_reason") == b"the clock of the store went back"
        assert refusal(stranger.acquire, token) == "QUARANTINED"
