"""Promise 2: between two moments at which a holder may refresh lies at least the interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdoff._core import duration
from holdoff.v1 import lease_service_pb2, token_pb2, token_service_pb2
from tests.harness import Replica, Waiter, ask, lease_key, refusal, run_out, wait_until

if TYPE_CHECKING:
    import redis

INTERVAL_US = 600_000
INTERVAL = INTERVAL_US / 1e6


def next_start_us(replica: Replica, token: str) -> int:
    """Wait for the next lease and return when it was offered, by the store's clock."""
    waiter = Waiter(replica, ask(token))
    started = waiter.offer().lease.create_time.ToMicroseconds()
    waiter.withdraw()
    return started


@pytest.fixture
def token(replica: Replica) -> str:
    """Give a token with an interval of 0.6 s."""
    return replica.create_token(INTERVAL)


def test_after_a_release_the_interval_counts_from_the_end(replica: Replica, token: str) -> None:
    """Promise 2: a run may have refreshed at its last instant.

    Fails when `finish` cools nothing down.
    """
    offer = replica.hold(token)
    ended = replica.release(offer).lease.end_time.ToMicroseconds()
    late_us = next_start_us(replica, token) - ended - INTERVAL_US
    assert late_us >= 0


def test_a_lost_lease_counts_as_refreshed_at_its_expiry(
    replica: Replica, store: redis.Redis
) -> None:
    """Promise 2: a holder that vanished may have refreshed until its lease ran out.

    Fails when `settle` finishes an expired lease with its start as the refresh, or with none.
    """
    token = replica.create_token(2.0)
    expired_us = run_out(store, replica.hold(token))
    assert next_start_us(replica, token) >= expired_us + 2_000_000


def test_only_a_full_report_shortens_the_cooldown(replica: Replica, store: redis.Redis) -> None:
    """The age of the last refresh counts with the flag, and within the time of the lease.

    Fails when release.lua takes `reported` without looking at the flag or at `accepted_us`.
    """

    def cooled_from_end_us(age_seconds: float, *, saw_every: bool) -> int:
        token = replica.create_token(5)
        offer = replica.hold(token)
        store.hincrby(lease_key(offer.lease.name), "accepted_us", -1_000_000)
        report = lease_service_pb2.RefreshReport(
            last_refresh_age=duration(age_seconds), saw_every_refresh=saw_every
        )
        released = replica.release(offer, refresh=report)
        ended = released.lease.end_time.ToMicroseconds()
        return released.not_before_time.ToMicroseconds() - ended

    assert cooled_from_end_us(0.2, saw_every=True) == 4_800_000
    assert cooled_from_end_us(0.2, saw_every=False) == 5_000_000
    assert cooled_from_end_us(3600, saw_every=True) == 5_000_000


def test_refresh_at_start_counts_from_the_confirmed_start(replica: Replica) -> None:
    """Where runs refresh at their start, the interval counts from there once it is confirmed.

    Fails when release.lua takes `accepted_us` for an unconfirmed start, or renew.lua notes the
    start again.
    """
    token = replica.create_token(5, refresh_at=token_pb2.REFRESH_AT_START)
    offer = replica.hold(token)
    released = replica.release(offer)
    unconfirmed = released.not_before_time.ToMicroseconds()
    assert unconfirmed == released.lease.end_time.ToMicroseconds() + 5_000_000

    token = replica.create_token(5, refresh_at=token_pb2.REFRESH_AT_START)
    offer = replica.hold(token)
    started = replica.renew(offer, command_started=True).command_start_time.ToMicroseconds()
    replica.renew(offer, command_started=True)
    released = replica.release(offer)
    assert released.not_before_time.ToMicroseconds() == started + 5_000_000


def test_a_run_that_outlasts_the_access_token_counts_to_its_end(
    replica: Replica, store: redis.Redis
) -> None:
    """A long run refreshed again, whatever `refresh_at` says (domain.md: 600 s of life).

    Fails when release.lua does not compare the run with the access token's life.
    """
    token = replica.create_token(5, refresh_at=token_pb2.REFRESH_AT_START)
    offer = replica.hold(token, ttl=30.0)
    replica.renew(offer, command_started=True)
    store.hincrby(lease_key(offer.lease.name), "started_us", -601_000_000)
    released = replica.release(offer)
    cooled = released.not_before_time.ToMicroseconds() - released.lease.end_time.ToMicroseconds()
    assert cooled == 5_000_000


def test_a_cooldown_outlives_the_lease_and_an_update(replica: Replica) -> None:
    """Promise 2: no update shortens a cooldown that runs, or that of the lease that lives.

    Fails when update_token.lua sets `not_before_us` afresh, or `finish` uses the token's interval.
    """
    token = replica.create_token(60)
    shorter = token_service_pb2.UpdateTokenRequest()
    shorter.token.name = token
    shorter.token.refresh_interval.FromMilliseconds(1)
    offer = replica.hold(token)
    replica.tokens.UpdateToken(shorter)
    released = replica.release(offer)
    cooled = released.not_before_time.ToMicroseconds() - released.lease.end_time.ToMicroseconds()
    assert cooled == 60_000_000
    replica.tokens.UpdateToken(shorter)
    assert replica.show_token(token).not_before_time == released.not_before_time
    assert refusal(lambda: replica.acquire(token)) == "TOKEN_COOLING"


def test_a_longer_interval_prolongs_a_running_cooldown(replica: Replica, token: str) -> None:
    """An update that asks for more is heeded at once."""
    released = replica.release(replica.hold(token))
    longer = token_service_pb2.UpdateTokenRequest()
    longer.token.name = token
    longer.token.refresh_interval.FromSeconds(60)
    cooldown = replica.tokens.UpdateToken(longer).token.cooldown
    assert cooldown.ToSeconds() > 30
    assert released.not_before_time != replica.show_token(token).not_before_time


def test_the_preset_has_a_margin_and_an_explicit_interval_has_none(replica: Replica) -> None:
    """`exact-online` waits 570 s and 2 s more (domain.md: counted from when it was received)."""
    preset = replica.show_token(replica.create_token(None)).rules
    assert preset.refresh_interval.ToMilliseconds() == 572_000
    assert preset.refresh_at == token_pb2.REFRESH_AT_END
    exact = replica.show_token(replica.create_token(570)).rules
    assert exact.refresh_interval.ToMilliseconds() == 570_000


@pytest.mark.parametrize(
    ("last_refreshed", "least_ms", "most_ms"),
    [
        ({}, 0, 0),
        ({"last_refresh_unknown": True}, 900_000, 1_000_000),
        ({"last_refresh_age": duration(400)}, 500_000, 600_000),
        ({"last_refresh_age": duration(4000)}, 0, 0),
    ],
)
def test_a_new_token_cools_down_from_what_is_known(
    replica: Replica, last_refreshed: dict[str, Any], least_ms: int, most_ms: int
) -> None:
    """`never` starts no cooldown, `unknown` a full one, an age the rest of one."""
    token = replica.show_token(replica.create_token(1000, **last_refreshed))
    assert least_ms <= token.cooldown.ToMilliseconds() <= most_ms


def test_three_runs_in_a_row_start_an_interval_apart(replica: Replica, token: str) -> None:
    """No start is earlier than the interval after the end before it, by the store's clock."""
    waiters = [Waiter(replica, ask(token, job=str(number))) for number in range(3)]
    not_before = 0
    for waiter in waiters:
        offer = waiter.offer()
        assert offer.lease.create_time.ToMicroseconds() >= not_before
        replica.renew(offer)
        not_before = replica.release(offer).not_before_time.ToMicroseconds()
        waiter.vanish()


def test_a_lost_acquire_after_the_cooldown_key_is_gone(replica: Replica, token: str) -> None:
    """The cooldown is in the token's record: deleting the lock's key shortens nothing."""
    released = replica.release(replica.hold(token))
    wait_until(lambda: replica.show_token(token).cooldown.ToMilliseconds() < 500)
    assert next_start_us(replica, token) >= released.not_before_time.ToMicroseconds()


def test_an_unused_lease_costs_no_cooldown(replica: Replica) -> None:
    """A lease under which nothing ran starts no cooldown.

    Fails when release.lua does not look at `unused`.
    """
    token = replica.create_token(5.0)
    released = replica.release(replica.hold(token), unused=True)
    assert not released.HasField("not_before_time")
    used = replica.release(replica.hold(token))
    assert used.not_before_time.ToMicroseconds() == used.lease.end_time.ToMicroseconds() + 5_000_000
