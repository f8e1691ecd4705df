"""Upgrades: records of an older release are brought up, those of a newer one are left alone."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import redis

from holdoff.v1 import lease_pb2, lease_service_pb2
from tests.harness import Replica, Waiter, ask, end_cooldown, refusal, request_hash, wait_until

if TYPE_CHECKING:
    from tests.conftest import StartValkey


def shard(token: str) -> str:
    """Return the first key of a token's app."""
    return f"holdoff:{{{token.split('/')[1]}}}"


def make_old(
    store: redis.Redis, token: str, request: lease_service_pb2.AcquireLeaseRequest
) -> None:
    """Take away what schema 1 did not have, at once: a sweep may upgrade at any time."""
    key = shard(token)
    with store.pipeline() as change:
        change.hdel(key, "schema", "changes")
        change.delete(f"{key}:changes", f"{key}:history:t")
        change.hdel(f"{key}:token:t", "cooling")
        change.hdel(f"{key}:request:{request_hash(request)}", "holder", "queued_us")
        change.execute()


def test_an_older_release_is_upgraded(replica: Replica, store: redis.Redis) -> None:
    """Waiters, leases and cooldowns of schema 1 live on, and are shown.

    Fails when `upgrade` of common.lua does nothing: the queue then cannot be listed.
    """
    token = replica.create_token(0.4)
    held = replica.hold(token, ttl=20.0)
    request = ask(token, job="old")
    waiter = Waiter(replica, request)
    waiter.waiting()
    make_old(store, token, request)
    waiters = replica.leases.ListWaiters(lease_service_pb2.ListWaitersRequest(parent=token)).waiters
    assert [waiter.place for waiter in waiters] == [1]
    assert store.hget(shard(token), "schema") == b"4"
    replica.release(held)
    assert waiter.offer().lease.fencing_token > held.lease.fencing_token
    waiter.vanish()


def test_the_end_of_an_old_cooldown_is_told(replica: Replica, store: redis.Redis) -> None:
    """A cooldown that began before the upgrade ends like any other."""
    token = replica.create_token(60)
    request = ask(token)
    offer = replica.leases.AcquireLease(request).offer
    replica.renew(offer)
    replica.release(offer)
    make_old(store, token, request)
    assert replica.show_token(token).HasField("cooldown")
    end_cooldown(store, token)
    wait_until(lambda: store.exists(f"{shard(token)}:changes"))
    [(_, change)] = cast("Any", store.xrange(f"{shard(token)}:changes"))
    assert change[b"kind"] == b"COOLING_ENDED"


def test_a_newer_release_is_left_alone(replica: Replica, store: redis.Redis) -> None:
    """A coordinator that runs on while a newer one upgrades the store touches nothing.

    Fails when the script header does not compare.
    """
    token = replica.create_token(0.0)
    offer = replica.hold(token)
    store.hset(shard(token), "schema", "5")
    before = {key: store.dump(key) for key in store.scan_iter(f"{shard(token)}*", count=1000)}
    assert refusal(lambda: replica.renew(offer)) == "SCHEMA_TOO_NEW"
    assert refusal(lambda: replica.acquire(token)) == "SCHEMA_TOO_NEW"
    assert before == {key: store.dump(key) for key in before}
    store.hset(shard(token), "schema", "3")
    assert replica.renew(offer).state == lease_pb2.LEASE_STATE_ACTIVE


def test_an_older_coordinator_does_not_start(start_valkey: StartValkey) -> None:
    """It says that the records are of a newer release, and what to do."""
    url = start_valkey().url
    with Replica(url) as replica, redis.Redis.from_url(url) as store:
        store.hset(shard(replica.create_token()), "schema", "5")
    command = [sys.executable, "-m", "holdoff_coordinator", "serve", "--listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [*command, "--redis-url", url], capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == 69
    assert re.search(r"schema 5, .* knows up to 4: .* upgrade this one", ended.stderr)
    assert "Traceback" not in ended.stderr
