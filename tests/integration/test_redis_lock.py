"""python-redis-lock and leases exclude each other, with the plain library on the same store."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import redis_lock

from holdoff.v1 import lease_pb2
from tests.harness import Replica, Waiter, ask, refusal, run_out, wait_until

if TYPE_CHECKING:
    import redis

SLACK_US = 50_000
"""The server ends a key by a clock that it rounds, and looks at before a script runs."""


def lock_of(replica: Replica, store: redis.Redis, token: str, **options: object) -> redis_lock.Lock:
    """Make the library's lock of a token, as its user would."""
    return redis_lock.Lock(store, replica.show_token(token).lock_name, **options)


def test_a_lease_keeps_the_lock_from_being_taken(replica: Replica, store: redis.Redis) -> None:
    """While a lease lives, or is offered, the library cannot acquire its lock.

    Fails when `mirror` does not set the key.
    """
    token = replica.create_token()
    offer = replica.acquire(token).offer
    lock = lock_of(replica, store, token)
    assert not lock.acquire(blocking=False)
    replica.renew(offer)
    assert not lock.acquire(blocking=False)
    assert lock.get_owner_id() == offer.lease.name.rpartition("/")[2]


def test_the_lock_keeps_a_lease_from_being_granted(replica: Replica, store: redis.Redis) -> None:
    """While the library holds its lock no lease is granted; its end counts as a refresh.

    Fails when `settle` does not look at the lock's owner, or cools nothing down at its end.
    """
    token = replica.create_token(1.5)
    lock = lock_of(replica, store, token, expire=30)
    assert lock.acquire(blocking=False)
    assert refusal(lambda: replica.acquire(token)) == "LEASE_HELD"
    waiter = Waiter(replica, ask(token))
    assert waiter.waiting().reason == lease_pb2.WAIT_REASON_HELD
    assert "python-redis-lock" in waiter.waiting().message
    held_us = time.time_ns() // 1000
    lock.release()
    assert refusal(lambda: replica.acquire(token)) == "TOKEN_COOLING"
    assert waiter.offer().lease.create_time.ToMicroseconds() >= held_us + 1_500_000
    waiter.vanish()


def test_a_foreign_lock_that_expires_counts_too(replica: Replica, store: redis.Redis) -> None:
    """A script that died with its lock is noticed when the lock runs out."""
    token = replica.create_token(0.3)
    assert lock_of(replica, store, token, expire=60).acquire(blocking=False)
    waiter = Waiter(replica, ask(token))
    assert waiter.waiting().reason == lease_pb2.WAIT_REASON_HELD
    assert store.pexpire(f"lock:{replica.show_token(token).lock_name}", 1)
    waiter.offer()
    waiter.vanish()


def test_the_lock_stays_taken_while_cooling(replica: Replica, store: redis.Redis) -> None:
    """The library's users keep the interval too.

    Fails when `mirror` deletes the key as soon as no lease lives.
    """
    token = replica.create_token(1.5)
    released = replica.release(replica.hold(token))
    lock = lock_of(replica, store, token)
    assert not lock.acquire(blocking=False)
    wait_until(lambda: lock.acquire(blocking=False))
    assert time.time_ns() // 1000 >= released.not_before_time.ToMicroseconds() - SLACK_US
    lock.release()


def sleeper(lock: redis_lock.Lock, store: redis.Redis) -> tuple[threading.Thread, list[float]]:
    """Acquire without a time-out, in a thread: it sleeps until somebody signals."""
    woken: list[float] = []
    before = store.info("clients")["blocked_clients"]

    def acquire() -> None:
        lock.acquire()
        woken.append(time.time())
        lock.release()

    thread = threading.Thread(target=acquire, daemon=True)
    thread.start()
    wait_until(lambda: store.info("clients")["blocked_clients"] > before)
    return thread, woken


def test_a_blocked_user_is_woken_when_the_cooldown_ends(
    replica: Replica, store: redis.Redis
) -> None:
    """A blocking acquire without a time-out wakes after a release and its cooldown.

    Fails when `mirror` pushes no signal (the library would then sleep for ever).
    """
    token = replica.create_token(0.5)
    offer = replica.hold(token)
    thread, woken = sleeper(lock_of(replica, store, token), store)
    released = replica.release(offer)
    thread.join(timeout=20)
    assert woken
    assert woken[0] * 1e6 >= released.not_before_time.ToMicroseconds() - SLACK_US


def test_a_blocked_user_is_woken_when_a_lease_expires(replica: Replica, store: redis.Redis) -> None:
    """The sweeper ends a lease that ran out, and then its cooldown, with nobody else waiting."""
    token = replica.create_token(0.3)
    offer = replica.hold(token)
    thread, woken = sleeper(lock_of(replica, store, token), store)
    expired_us = run_out(store, offer)
    thread.join(timeout=20)
    assert woken
    assert woken[0] * 1e6 >= expired_us + 300_000 - SLACK_US


def test_reset_does_no_harm(replica: Replica, store: redis.Redis) -> None:
    """`reset()` deletes keys it does not own: the lease stays, and its key comes back.

    Fails when `settle` believes the key instead of the record, or `mirror` does not put it back.
    """
    token = replica.create_token(5)
    offer = replica.hold(token)
    lock = lock_of(replica, store, token)
    lock.reset()
    assert refusal(lambda: replica.acquire(token)) == "LEASE_HELD"
    replica.renew(offer)
    assert not lock.acquire(blocking=False)
    replica.release(offer)
    redis_lock.reset_all(store)
    assert refusal(lambda: replica.acquire(token)) == "TOKEN_COOLING"
    assert not lock.acquire(blocking=False)


def test_a_lease_whose_lock_was_taken_is_lost(replica: Replica, store: redis.Redis) -> None:
    """A lock taken after a reset breaks the lease; nobody is granted one until it is over.

    Fails when `settle` overwrites a foreign owner.
    """
    token = replica.create_token(0.3)
    offer = replica.hold(token)
    lock = lock_of(replica, store, token, expire=30)
    # What a reset and a lock right after it leave, before any look at the token.
    store.set(f"lock:{replica.show_token(token).lock_name}", lock.id, px=30_000)
    assert refusal(replica.renew, offer) == "LEASE_BROKEN"
    lock.release()
    waiter = Waiter(replica, ask(token))
    assert waiter.waiting().reason == lease_pb2.WAIT_REASON_HELD
    expired_us = run_out(store, offer)
    assert waiter.offer().lease.create_time.ToMicroseconds() >= expired_us + 300_000
    waiter.vanish()


def test_the_sweepers_lock_is_the_librarys(replica: Replica, store: redis.Redis) -> None:
    """One replica sweeps, guarded by the library itself."""
    wait_until(lambda: store.get("lock:{holdoff:sweeper}"))
    assert not redis_lock.Lock(store, "{holdoff:sweeper}").acquire(blocking=False)
    del replica
