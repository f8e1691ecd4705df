"""Clocks of the store that drift and jump, and stores that lose what they had."""

from __future__ import annotations

import contextlib
import functools
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis
from google.protobuf import duration_pb2
from redis.crc import key_slot

from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    token_service_pb2,
)
from holdoff_coordinator.scripts import shard_key
from holdoff_coordinator.store_watch import APPS_A_STEP
from tests import stores
from tests.harness import Replica, Waiter, ask, let_pass, refusal, wait_until
from tests.integration.test_quarantine import SteppedClock
from tests.integration.test_stores import app_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Server, StartValkey
    from tests.stores import Store

HOUR_US = 3_600_000_000
_INSTANT = re.compile(rb"1\d{15}(?:\.0)?")

POLICY = """
name = "five-seconds"
refresh = { interval = "0s" }
[[limit]]
name = "calls"
event = "calls"
most = 6
window = "5s"
scope = ["app"]
[[limit]]
name = "many-calls"
event = "calls"
most = 1000
window = "1h"
scope = ["app"]
"""


@pytest.fixture(scope="module")
def valkey(start_shared_valkey: StartValkey) -> Server:
    """Give a store of its own: a jump concerns all apps of a store."""
    return start_shared_valkey()


@pytest.fixture
def plain(valkey: Server) -> Iterator[redis.Redis]:
    """Give a plain client of the store."""
    with stores.client_of(valkey.url) as client:
        yield client


def now_us(store: redis.Redis) -> int:
    """Read the store's clock."""
    seconds, microseconds = store.time()
    return int(seconds) * 1_000_000 + int(microseconds)


def shard_of(token: str) -> str:
    """Return the first key of a token's app."""
    return shard_key(token.split("/")[1])


def go_back(store: redis.Redis, token: str, by_us: int) -> None:
    """Leave the records of a token's app as if the clock had gone back since they were written."""

    def later(value: bytes) -> bytes:
        return b"%d" % (int(float(value)) + by_us) if _INSTANT.fullmatch(value) else value

    fixed = {b"lease", b"fencing", b"epoch", b"mirror"}
    shard = shard_of(token)
    for key in store.scan_iter(f"{shard}*", count=1000):
        if store.type(key) == b"hash":
            flat: dict[bytes, bytes] = store.hgetall(key)  # type: ignore[assignment]
            moved = {field: later(value) for field, value in flat.items() if field not in fixed}
            store.hset(key, mapping=moved)  # type: ignore[arg-type]
        elif store.type(key) == b"zset":
            entries: Any = store.zrange(key, 0, -1, withscores=True)
            for entry, score in entries:
                if score > HOUR_US * 1000:
                    store.zadd(key, {entry: score + by_us})


def lost_at_us(store: redis.Redis, token: str) -> int:
    """Return when a token's lease was lost, by the audit trail."""
    entries: Any = store.xrange(f"{shard_of(token)}:audit")
    [at] = [entry_id for entry_id, fields in entries if fields[b"kind"] == b"LEASE_LOST"]
    return int(at.partition(b"-")[0]) * 1000


# Drift and small steps ----------------------------------------------------------


def test_small_steps_shorten_no_lease(valkey: Server, plain: redis.Redis) -> None:
    """Steps of 0.9 s, each too small to be a jump, end a lease not before its holder's deadline.

    Fails when `settle` compares with the store's clock alone.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=60.0) as replica:
        token = replica.create_token(0)
        held = replica.hold(token, ttl=3.0)
        expires_us = replica.show(held.lease.name).expire_time.ToMicroseconds()
        clock.step_us = -900_000
        wait_until(lambda: replica.show(held.lease.name).state == lease_pb2.LEASE_STATE_EXPIRED)
        assert lost_at_us(plain, token) >= expires_us + 890_000


def test_small_steps_shorten_no_cooldown(valkey: Server) -> None:
    """The interval passes by both clocks before the next lease begins.

    Fails when `cools` compares with the store's clock alone.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock) as replica:
        token = replica.create_token(1.0)
        released = replica.release(replica.hold(token))
        clock.step_us = -900_000
        waiter = Waiter(replica, ask(token))
        offer = waiter.offer()
        assert offer.lease.fencing_token >= released.not_before_time.ToMicroseconds() + 890_000, (
            "the fencing number is when the lease was made"
        )
        waiter.vanish()


def test_small_steps_add_up_to_a_quarantine(valkey: Server) -> None:
    """Two steps of 0.9 s are more than a second of unexplained time.

    Fails when a small step becomes the base of the next comparison.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=60.0) as replica:
        token = replica.create_token(0)
        for _ in range(2):
            replica.release(replica.hold(token))
            clock.step_us -= 900_000
            replica.show_token(token)  # measures
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"


def test_a_new_replica_knows_what_was_gained_before(valkey: Server, plain: redis.Redis) -> None:
    """A replica that started after a small step honours it, since another one saw it.

    Fails when `note_gain` writes nothing.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=60.0) as replica:
        token = replica.create_token(0)
        held = replica.hold(token, ttl=3.0)
        expires_us = replica.show(held.lease.name).expire_time.ToMicroseconds()
        clock.step_us = -900_000
        for _ in range(2):
            replica.show_token(token)  # measures, then tells
    with Replica(valkey.url) as fresh:
        waiter = Waiter(fresh, ask(token))
        waiter.offer()
        assert lost_at_us(plain, token) >= expires_us + 850_000
        waiter.vanish()


def test_a_gain_is_noted_once(valkey: Server, plain: redis.Redis) -> None:
    """What the clock gained matters for one hold after the step, and no longer.

    Fails when each note of the same gain lasts for a whole hold.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=2.0) as replica:
        token = replica.create_token(0)
        replica.release(replica.hold(token, ttl=1.0))
        clock.step_us = -5_000_000

        def noted_until_us() -> int:
            replica.show_token(token)  # measures, then tells
            return int(plain.hget(shard_of(token), "gain_until_us") or 0)

        first_us = wait_until(noted_until_us)
        wait_until(lambda: noted_until_us() and now_us(plain) > first_us + 500_000)
        assert noted_until_us() - first_us < 1_000_000  # another hold is 2 s


def test_a_replica_that_never_met_an_app_sees_its_clock_jump(three_nodes: Store) -> None:
    """Each replica looks at the clock of every node each second, whatever it is asked.

    Fails when a clock is first looked at for the first caller of an app.
    """
    app = app_in(three_nodes.nodes[1])
    clock = SteppedClock()
    with (
        Replica(three_nodes.url) as other,
        Replica(three_nodes.url, boot_us=clock, quarantine_seconds=60.0) as replica,
    ):
        token = other.create_token(0, name=f"apps/{app}/tokens/t")
        other.hold(token)
        known = replica.coordinator.scripts._nodes
        wait_until(lambda: len(known) >= len(three_nodes.nodes))
        clock.step_us = -5_000_000
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"


# Back ---------------------------------------------------------------------------


def test_forward_and_back_shuts_an_app_for_no_longer_than_is_safe(
    valkey: Server, plain: redis.Redis
) -> None:
    """What was to last from a time that has not come lasts from now.

    Fails when `go_back` or `stay_in_the_past` changes nothing: all is shut for an hour.
    """
    with Replica(valkey.url, quarantine_seconds=2.0) as replica:
        token = replica.create_token(0.5)
        held = replica.hold(token, ttl=1.0)
        replica.release(held)
        plain.hset(
            shard_of(token),
            mapping={
                # It began before the clock went forward, and was extended since.
                "quarantine_since_us": now_us(plain) - 10 * HOUR_US,
                "quarantine_until_us": now_us(plain) + 1_000_000,
                "quarantine_for_us": 1_000_000,
                "quarantine_reason": "a test",
            },
        )
        go_back(plain, token, HOUR_US)
        waiter = Waiter(replica, ask(token))
        status = waiter.waiting()
        assert status.reason == lease_pb2.WAIT_REASON_QUARANTINED
        assert status.earliest_start_in.ToSeconds() < 60
        offer = waiter.offer()
        assert offer.lease.fencing_token > held.lease.fencing_token
        waiter.vanish()


def test_a_lease_from_the_future_lasts_its_ttl(valkey: Server, plain: redis.Redis) -> None:
    """Its holder is gone, and the next waiter gets the token after the TTL, not after an hour."""
    with Replica(valkey.url, quarantine_seconds=0.5) as replica:
        token = replica.create_token(0)
        replica.hold(token, ttl=2.0)
        go_back(plain, token, HOUR_US)
        waiter = Waiter(replica, ask(token))
        waiter.offer()
        waiter.vanish()


def test_counts_from_the_future_leave_their_window(
    valkey: Server, plain: redis.Redis, tmp_path: Path
) -> None:
    """A budget is spent for its window, and a reservation lasts its TTL, and no longer.

    Fails when `leave` or `expire_reservations` believes instants that have not come.
    """
    with limited(valkey.url, tmp_path) as replica:
        token = create(replica, "five-seconds")
        for _ in range(6):
            commit(replica, token, reserve(replica, token))
        go_back(plain, token, HOUR_US)
        assert refusal(lambda: reserve(replica, token)) in ("BUDGET_SPENT", "COUNTS_UNKNOWN")
        wait_until(lambda: is_reserved(replica, token))


def test_a_high_fencing_number_of_the_future_is_known_again(
    valkey: Server, plain: redis.Redis
) -> None:
    """A client hands in the number that it got before the clock went back by more than a year.

    Fails when acquire.lua bounds it by the clock alone: FENCING_TOKEN_TOO_LARGE.
    """
    with Replica(valkey.url) as replica:
        token = replica.create_token(0)
        replica.release(replica.hold(token))
        high = now_us(plain) + 2 * 366 * 24 * HOUR_US
        plain.hset(f"{shard_of(token)}:token:t", "fencing", high)
        request = ask(token)
        request.last_fencing_token = high
        assert replica.leases.AcquireLease(request).offer.lease.fencing_token == high + 1


# Counting -----------------------------------------------------------------------


def limited(url: str, folder: Path, **options: Any) -> Replica:
    """Give a replica with a policy of 6 calls in 5 seconds and 1000 an hour."""
    from holdoff.policies import presets, read_policy  # noqa: PLC0415 - for this alone

    path = folder / "five-seconds.toml"
    path.write_text(POLICY, encoding="utf-8")
    policy = read_policy(path)
    return Replica(url, policies={**presets(), policy.name: policy}, **options)


def create(replica: Replica, policy: str) -> str:
    """Create a token with a policy, in an app of its own."""
    name = f"apps/{uuid.uuid4().hex[:12]}/tokens/t"
    request = token_service_pb2.CreateTokenRequest()
    request.token.name, request.token.policy = name, policy
    replica.tokens.CreateToken(request)
    return name


def reserve(replica: Replica, token: str) -> str:
    """Reserve one call, and return the id."""
    request = budget_service_pb2.ReserveRequest(
        reservation_id=str(uuid.uuid4()),
        kind=budget_pb2.EVENT_KIND_CALL,
        ttl=duration_pb2.Duration(seconds=1),
    )
    request.scope.token = token
    replica.budgets.Reserve(request)
    return request.reservation_id


def commit(replica: Replica, token: str, reservation: str) -> None:
    """Say that the call was made."""
    app = token.rpartition("/tokens/")[0]
    replica.budgets.Commit(
        budget_service_pb2.CommitRequest(app=app, reservation_id=reservation, status=200)
    )


def is_reserved(replica: Replica, token: str) -> bool:
    """Try to reserve one call."""
    try:
        reserve(replica, token)
    except Exception:  # noqa: BLE001 - any refusal
        return False
    return True


def test_a_step_forward_gives_no_room(valkey: Server, plain: redis.Redis, tmp_path: Path) -> None:
    """Calls of the last 5 seconds stay in the window, though the store's clock says otherwise.

    Fails when events leave their window by the store's clock alone.
    """
    clock = SteppedClock()
    with limited(valkey.url, tmp_path, boot_us=clock, quarantine_seconds=4.0) as replica:
        token = create(replica, "five-seconds")
        began = time.monotonic()
        for _ in range(6):
            commit(replica, token, reserve(replica, token))
        # As if the store's clock had stepped: what it counted is older, and we are behind.
        let_pass(plain, token, 5.5)
        clock.step_us = -5_500_000
        wait_until(lambda: is_reserved(replica, token))
        assert time.monotonic() - began > 4.9


def test_small_steps_shorten_no_window(valkey: Server, plain: redis.Redis, tmp_path: Path) -> None:
    """A step of 0.9 s frees no room in the very call that finds it.

    Fails when events leave their window by the store's clock alone.
    """
    clock = SteppedClock()
    with limited(valkey.url, tmp_path, boot_us=clock) as replica:
        token = create(replica, "five-seconds")
        for _ in range(6):
            commit(replica, token, reserve(replica, token))
        let_pass(plain, token, 5.1)  # 4.2 s, by the boot clock
        clock.step_us = -900_000
        assert refusal(lambda: reserve(replica, token)) == "BUDGET_SPENT"


def test_a_step_frees_no_room_after_the_quarantine(
    valkey: Server, plain: redis.Redis, tmp_path: Path
) -> None:
    """What was counted before a step stays in its window when the step itself is forgotten.

    Fails when `leave` moves no entry: the window would be shorter by the step.
    """
    clock = SteppedClock()
    with limited(valkey.url, tmp_path, boot_us=clock, quarantine_seconds=0.5) as replica:
        token = create(replica, "five-seconds")
        began = time.monotonic()
        for _ in range(6):
            commit(replica, token, reserve(replica, token))
        let_pass(plain, token, 4.0)
        clock.step_us = -4_000_000
        replica.show_token(token)  # measures
        wait_until(lambda: is_reserved(replica, token))
        assert time.monotonic() - began > 4.9


def test_a_step_ends_no_back_off_early(valkey: Server, plain: redis.Redis) -> None:
    """A pause of four seconds lasts as long, though the clock stepped and the step is forgotten.

    Fails when `settle_back_off` moves no end.
    """
    clock = SteppedClock()
    with Replica(valkey.url, boot_us=clock, quarantine_seconds=0.5) as replica:
        token = replica.create_token(0)
        began = time.monotonic()
        request = admin_service_pb2.SetBackOffRequest(
            length=duration_pb2.Duration(seconds=4), reason="a test"
        )
        request.scope.token = token
        back_off = replica.admin.SetBackOff(request).back_off.name.rpartition("/")[2]
        plain.hincrby(f"{shard_of(token)}:backoff:{back_off}", "until_us", -3_000_000)
        clock.step_us = -3_000_000
        waiter = Waiter(replica, ask(token))
        waiter.offer()
        assert time.monotonic() - began > 3.9
        waiter.vanish()


def test_what_is_unknown_counts_as_spent(
    valkey: Server, plain: redis.Redis, tmp_path: Path
) -> None:
    """After a loss of data nothing is reserved until the window has passed.

    Fails when reserve.lua does not ask `counts_known_at`.
    """
    with limited(valkey.url, tmp_path, quarantine_seconds=60.0) as replica:
        token = create(replica, "five-seconds")
        commit(replica, token, reserve(replica, token))
        plain.hset(shard_of(token), "epoch", "another")
        assert refusal(lambda: reserve(replica, token)) == "COUNTS_UNKNOWN"
        plain.hset(shard_of(token), "data_lost_us", now_us(plain) - HOUR_US - 1_000_000)
        assert is_reserved(replica, token)


def test_after_a_failover_reservations_open_again_soon(
    valkey: Server, plain: redis.Redis, tmp_path: Path
) -> None:
    """Only the last writes can be missing, and replicas report those again within ten seconds."""
    with limited(valkey.url, tmp_path, quarantine_seconds=60.0) as replica:
        token = create(replica, "five-seconds")
        plain.hset(shard_of(token), "writes_lost_us", now_us(plain))
        assert refusal(lambda: reserve(replica, token)) == "COUNTS_UNKNOWN"
        plain.hset(shard_of(token), "writes_lost_us", now_us(plain) - 11_000_000)
        assert is_reserved(replica, token)


# Loss ---------------------------------------------------------------------------


def test_a_flushed_store_is_seen_by_a_replica_that_never_met_the_app(
    start_valkey: StartValkey,
) -> None:
    """A token made again after FLUSHALL is not granted, at whichever replica.

    Fails when nothing compares the epoch before a token is made.
    """
    valkey = start_valkey()
    with (
        Replica(valkey.url, quarantine_seconds=60.0) as one,
        Replica(valkey.url, quarantine_seconds=60.0) as other,
        redis.Redis.from_url(valkey.url) as store,
    ):
        token = one.create_token(0)
        one.hold(token)
        store.flushall()
        other.create_token(0, name=token)
        assert refusal(lambda: other.acquire(token)) == "QUARANTINED"


def test_a_flushed_node_of_a_cluster_is_seen_too() -> None:
    """The index of apps is on another node, and still names the app.

    Fails when `Tokens.create` does not look for records of an app that the index names.
    """
    with stores.cluster() as cluster:
        keys = ("holdoff:apps", "holdoff:epoch")
        node = next(one for one in cluster.nodes if not any(holds(one, key) for key in keys))
        token = f"apps/{app_in(node)}/tokens/t"
        with (
            Replica(cluster.url, quarantine_seconds=60.0) as one,
            Replica(cluster.url, quarantine_seconds=60.0) as other,
        ):
            one.create_token(0, name=token)
            one.hold(token)
            node.client.flushall()
            other.create_token(0, name=token)
            assert refusal(lambda: other.acquire(token)) == "QUARANTINED"


def holds(node: stores.Node, key: str) -> bool:
    """Tell whether a node serves the slot of a key."""
    try:
        node.client.exists(key)
    except redis.exceptions.MovedError:
        return False
    return True


def test_a_lost_epoch_quarantines_apps_that_are_there(start_valkey: StartValkey) -> None:
    """Every replica polls the epoch: gone, all apps are held back within seconds.

    Fails when `StoreWatch.look` does not compare.
    """
    valkey = start_valkey()
    with (
        Replica(valkey.url, quarantine_seconds=60.0) as replica,
        redis.Redis.from_url(valkey.url) as store,
    ):
        token = replica.create_token(0)
        store.delete("holdoff:epoch")
        wait_until(lambda: store.hget(shard_of(token), "data_lost_us"))
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"


def wrong_types(store: redis.Redis) -> int:
    """How often a store was asked for something that is damaged."""
    errors: dict[str, dict[str, int]] = store.info("errorstats")
    return errors.get("errorstat_WRONGTYPE", {"count": 0})["count"]


def test_a_loss_is_remembered_until_all_apps_are_held_back(start_valkey: StartValkey) -> None:
    """The index of apps cannot be read just after a loss: idle apps are held back afterwards.

    Fails when the new epoch is known before it is known what is to be held back.
    """
    valkey = start_valkey()
    with (
        Replica(valkey.url, quarantine_seconds=60.0) as replica,
        redis.Redis.from_url(valkey.url) as store,
    ):
        token = replica.create_token(0)
        store.rename("holdoff:apps", "set-aside")
        store.set("holdoff:apps", "not a set")
        store.delete("holdoff:epoch")
        wait_until(lambda: wrong_types(store) > 10)
        store.rename("set-aside", "holdoff:apps")
        wait_until(lambda: store.hget(shard_of(token), "data_lost_us"))


def test_a_new_server_is_met_by_an_app_that_failed_at_first(start_valkey: StartValkey) -> None:
    """The first script of an idle app on another server fails: the sweeper runs one later.

    Fails when the sweeper takes an app for met although no script ran for it.
    """
    valkey = start_valkey("--enable-debug-command", "yes")
    with Replica(valkey.url) as replica, redis.Redis.from_url(valkey.url) as store:
        key = shard_of(replica.create_token(0))
        wait_until(lambda: store.get("lock:{holdoff:sweeper}"))
        store.rename(key, "set-aside")
        store.set(key, "not a hash")
        store.execute_command("DEBUG", "CHANGE-REPL-ID")
        wait_until(lambda: wrong_types(store) > 0)
        store.rename("set-aside", key)
        history = store.info("replication")["master_replid"].encode()
        wait_until(lambda: store.hget(key, "history") == history)


def test_apps_that_fail_keep_no_other_from_being_held_back(start_valkey: StartValkey) -> None:
    """More apps than one step has are damaged: those after them are held back all the same.

    Fails when each look begins with the apps that failed at the last one.
    """
    valkey = start_valkey()
    with (
        Replica(valkey.url, quarantine_seconds=60.0) as replica,
        redis.Redis.from_url(valkey.url) as store,
    ):
        token = replica.create_token(0, name="apps/z/tokens/t")
        damaged = [f"a{number}" for number in range(APPS_A_STEP)]
        store.sadd("holdoff:apps", *damaged)
        store.mset({shard_key(app): "not a hash" for app in damaged})
        store.delete("holdoff:epoch")
        wait_until(lambda: store.hget(shard_of(token), "data_lost_us"))


def test_two_failovers_between_two_looks(start_valkey: StartValkey) -> None:
    """The server in charge continues a history that nobody here knows: that is a failover too.

    Fails when only the history before (`master_replid2`) is compared.
    """
    del start_valkey
    with stores.node() as first, stores.node() as second, stores.node() as third:
        with Replica(url(first)) as replica:
            token = replica.create_token(0)
            replica.release(replica.hold(token))
        for old, new in ((first, second), (second, third)):
            new.run("REPLICAOF", "127.0.0.1", old.port)
            wait_until(functools.partial(is_linked, new))
            new.run("REPLICAOF", "NO", "ONE")
        with Replica(url(third), quarantine_seconds=60.0) as replica:
            assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"


def test_an_app_that_moved_to_a_server_that_was_once_promoted() -> None:
    """It came with all of its records: that is no failover, and grants continue.

    Fails when only the histories are compared, and not the shards.
    """
    with stores.cluster(replicas=1) as cluster:
        replica_of_first = next(one for one in cluster.nodes if one.role() == "slave")
        app = app_in(next(one for one in cluster.nodes[1:] if one.role() == "master"))
        key = shard_key(app)
        with Replica(cluster.url, quarantine_seconds=60.0) as replica:
            token = replica.create_token(0, name=f"apps/{app}/tokens/t")
            replica.release(replica.hold(token))
            replica_of_first.run("CLUSTER", "FAILOVER", "TAKEOVER")
            wait_until(lambda: replica_of_first.role() == "master")
            source = next(one for one in cluster.nodes if holds(one, key))
            move(cluster, key, source, replica_of_first)
            wait_until(lambda: is_granted(replica, token))
            home = replica_of_first.run("CLUSTER", "MYSHARDID")
            assert replica_of_first.client.hget(key, "home") == home


def move(cluster: Store, key: str, source: stores.Node, target: stores.Node) -> None:
    """Move the slot of a key with all that is in it."""
    slot, ids = key_slot(key.encode()), [one.run("CLUSTER", "MYID") for one in (source, target)]
    target.run("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    source.run("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    while keys := source.run("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.run("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
    for one in (target, source, *cluster.nodes):
        with contextlib.suppress(redis.RedisError):  # a replica is told by its primary
            one.run("CLUSTER", "SETSLOT", slot, "NODE", ids[1])


def is_granted(replica: Replica, token: str) -> bool:
    """Try to get a lease, while the slot of its app may be on its way."""
    try:
        offered = replica.acquire(token).HasField("offer")
    except grpc.RpcError as error:
        if "quarantine" in str(error):
            pytest.fail(str(error))
        return False
    return offered


def is_linked(node: stores.Node) -> bool:
    """Tell whether a replica has what its primary has."""
    return bool(node.client.info("replication")["master_link_status"] == "up")


def url(node: stores.Node) -> str:
    """Return the URL of one server."""
    return f"redis://127.0.0.1:{node.port}"


# Quarantine ---------------------------------------------------------------------


def quarantine_length_us(store: redis.Redis, token: str, replica: Replica) -> int:
    """Start a quarantine, and return how long it lasts."""
    store.hset(shard_of(token), "epoch", "another")
    assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
    until_us = int(store.hget(shard_of(token), "quarantine_until_us") or 0)
    return until_us - now_us(store)


def test_an_offer_that_nobody_accepted_lengthens_no_quarantine(
    valkey: Server, plain: redis.Redis
) -> None:
    """Nor does a long interval of a token that nobody used.

    Fails when acquire.lua or create_token.lua notes a hold.
    """
    with Replica(valkey.url, quarantine_seconds=5.0) as replica:
        token = replica.create_token(31 * 24 * 3600)
        app = token.split("/")[1]
        other = replica.create_token(0, name=f"apps/{app}/tokens/other")
        replica.leases.AcquireLease(ask(token, ttl=24 * 3600))
        assert quarantine_length_us(plain, other, replica) <= 5_000_000


def test_a_long_hold_is_forgotten_after_it_cannot_matter(
    valkey: Server, plain: redis.Redis
) -> None:
    """An hour's lease lengthens the quarantine while it may matter, and for no more than as long.

    Fails when `note_hold` never begins another period.
    """
    with Replica(valkey.url, quarantine_seconds=5.0) as replica:
        token = replica.create_token(0)
        shard = shard_of(token)
        replica.release(replica.hold(token, ttl=3600))
        for _ in range(2):
            plain.hset(shard, "hold_until_us", now_us(plain) - 1_000_000)
            replica.release(replica.hold(token, ttl=2))
        assert plain.hget(shard, "hold_us") == b"2000000"
        assert plain.hget(shard, "hold_before_us") == b"2000000"
    with Replica(valkey.url, quarantine_seconds=5.0) as fresh:
        fresh.show_token(token)
        assert quarantine_length_us(plain, token, fresh) <= 5_000_000


def test_a_policy_caps_the_ttl(valkey: Server, tmp_path: Path) -> None:
    """A TTL beyond it is refused, with the longest that it allows.

    Fails when `Leases.acquire` does not ask `Places.check_ttl`.
    """
    from holdoff.policies import presets, read_policy  # noqa: PLC0415 - for this alone

    path = tmp_path / "short.toml"
    path.write_text('name = "short"\nlongest_ttl = "10m"\nrefresh = { interval = "0s" }\n')
    policies = {**presets(), "short": read_policy(path)}
    with Replica(valkey.url, policies=policies) as replica:
        token = create(replica, "short")
        assert refusal(lambda: replica.hold(token, ttl=601)) == "INVALID_FIELD"
        replica.release(replica.hold(token, ttl=600))
        replica.hold(replica.create_token(0), ttl=3600)
