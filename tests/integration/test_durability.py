"""With --wait-replicas nothing is acknowledged of which the store has too few copies."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

import holdoff
from holdoff._core import duration
from holdoff.names import LeaseName
from holdoff.v1 import (
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
    lease_service_pb2_grpc,
)
from holdoff_coordinator import store as fitness
from holdoff_coordinator.durability import Durability
from holdoff_coordinator.store import StoreError
from tests import stores
from tests.e2e.service import Service
from tests.harness import NO_PROXY, Replica, Waiter, ask, lease_key, refusal, wait_until
from tests.integration.test_audit import kinds, trail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import StartValkey
    from tests.stores import Store

SHORT = "STORE_NOT_REPLICATED"
ONE = Durability(replicas=1)
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture(params=["sentinel", "cluster"], scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Give a primary with one replica, of either kind of store."""
    kinds = {
        "sentinel": lambda: stores.watched(replicas=1),
        "cluster": lambda: stores.cluster(primaries=1, replicas=1),
    }
    with kinds[request.param]() as store:
        yield store


@pytest.fixture
def replica(pair: Store) -> Iterator[Replica]:
    """Give a coordinator that waits for one replica."""
    with Replica(pair.url, durability=ONE) as one:
        yield one


@contextlib.contextmanager
def stopped(pair: Store) -> Iterator[None]:
    """Stop the replica in the block."""
    process = pair.nodes[1].process
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def done(call: Callable[[], object]) -> bool:
    """Tell whether a call succeeds; on a busy machine a replica may be late."""
    try:
        call()
    except grpc.RpcError:
        return False
    return True


def held(replica: Replica, token: str, **options: float) -> lease_service_pb2.LeaseOffer:
    """Hold a lease as soon as the replicas follow."""
    offers = []

    def hold() -> None:
        offers.append(replica.acquire(token, **options).offer)
        replica.renew(offers[-1])

    wait_until(lambda: done(hold))
    return offers[-1]


def test_a_grant_is_withheld_and_undone(pair: Store, replica: Replica) -> None:
    """No lease begins, and no cooldown, while the replica is away; then it is granted.

    Fails when the script is not followed by WAIT on its connection, or when an acceptance that was
    not acknowledged stays.
    """
    token = replica.create_token(3600.0)
    with stopped(pair):
        offer = replica.acquire(token).offer
        assert refusal(replica.renew, offer) == SHORT
        shown = replica.show_token(token)
        assert not shown.lease
        assert not shown.HasField("not_before_time")
        assert refusal(replica.renew, offer) == "OFFER_EXPIRED"
    again = held(replica, token)
    assert again.lease.fencing_token > offer.lease.fencing_token
    told = kinds(trail(replica, token))
    assert told[:3] == ["TOKEN_CREATED", "LEASE_GRANTED", "LEASE_RELEASED"]
    assert told[-1] == "LEASE_GRANTED"
    replica.release(again, unused=True)


def test_a_caller_that_gives_up_holds_nothing(pair: Store, replica: Replica) -> None:
    """An acceptance is taken back also when its caller has gone before the replicas were missed.

    Fails when the end of the call ends the wait for copies.
    """
    token = replica.create_token(3600.0)
    with stopped(pair):
        offer = replica.acquire(token).offer
        request = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
        call = replica.leases.RenewLease.future(request)
        wait_until(lambda: "LEASE_GRANTED" in kinds(trail(replica, token)))
        call.cancel()
        wait_until(lambda: "LEASE_RELEASED" in kinds(trail(replica, token)))
        assert not replica.show_token(token).lease


def test_a_client_gets_its_lease_later(pair: Store, replica: Replica) -> None:
    """Our client waits on while its grants are withheld, and gets the lease once it may."""
    token = replica.create_token(3600.0)
    with ThreadPoolExecutor() as pool, holdoff.Client(replica.address) as client:
        with stopped(pair):
            acquiring = pool.submit(client.acquire, token, wait_seconds=120.0)
            wait_until(lambda: "LEASE_GRANTED" in kinds(trail(replica, token)))
            assert not acquiring.done()
        lease = acquiring.result(90)
        lease.check()
        assert replica.show_token(token).lease.endswith(str(lease.fencing_token))
        lease.release(unused=True)


def test_a_waiter_keeps_its_position(pair: Store, replica: Replica) -> None:
    """A grant that was taken back leaves the queue as it was."""
    token = replica.create_token(0.0)
    current = held(replica, token)
    waiters = []
    for job in ("first", "second"):
        waiters.append(Waiter(replica, ask(token, job=job)))
        waiters[-1].waiting()

    def queue() -> list[str]:
        request = lease_service_pb2.ListWaitersRequest(parent=token)
        return [one.holder.job for one in replica.leases.ListWaiters(request).waiters]

    wait_until(lambda: done(lambda: replica.release(current)))
    with stopped(pair):
        assert refusal(replica.renew, waiters[0].offer()) == SHORT
        assert queue() == ["first", "second"]
    for waiter in waiters:
        waiter.vanish()


def test_what_a_holder_reports_is_sent_again(pair: Store, replica: Replica) -> None:
    """A refresh, a release, reports and reservations fail meanwhile; again, they count once.

    A renewal that nobody can take for an acceptance succeeds. Fails when such a script is missing
    from LASTING, or when renewals of old leases wait for replicas.
    """
    token = replica.create_token(0.0)
    offer = held(replica, token, ttl=60.0)
    app = token.partition("/tokens/")[0]
    scope = budget_pb2.Scope(token=token, endpoint="/api/v1/1/crm/Accounts")
    event = budget_pb2.Event(
        id=str(uuid.uuid4()), scope=scope, kind=budget_pb2.EVENT_KIND_ERROR, status=404
    )
    reserve = budget_service_pb2.ReserveRequest(
        reservation_id=str(uuid.uuid4()),
        ttl=duration(600.0),
        scope=scope,
        kind=budget_pb2.EVENT_KIND_CALL,
    )
    commit = budget_service_pb2.CommitRequest(
        app=app, reservation_id=reserve.reservation_id, status=200
    )
    refreshed = lease_service_pb2.RefreshReport(last_refresh_age=duration(0.0))
    calls: list[Callable[[], object]] = [
        lambda: replica.budgets.RecordEvents(
            budget_service_pb2.RecordEventsRequest(events=[event])
        ),
        lambda: replica.budgets.Reserve(reserve),
        lambda: replica.budgets.Commit(commit),
        lambda: replica.renew(offer, refresh=refreshed),
        lambda: replica.release(offer),
    ]
    with stopped(pair):
        assert refusal(replica.renew, offer) == SHORT  # it may be an acceptance again
        key = lease_key(offer.lease.name)
        accepted = pair.nodes[0].client.hget(key, "accepted_us")
        assert isinstance(accepted, bytes)
        pair.nodes[0].client.hset(key, "accepted_us", int(accepted) - 61_000_000)
        assert replica.renew(offer).state == lease_pb2.LEASE_STATE_ACTIVE
        for call in calls:
            assert refusal(call) == SHORT
    for call in calls[:3] + calls[4:]:
        wait_until(functools.partial(done, call))
    budgets = replica.budgets.ListBudgets(budget_service_pb2.ListBudgetsRequest(parent=app)).budgets
    assert {one.limit: one.used for one in budgets}["errors"] == 1
    assert all(not one.reserved for one in budgets)


def test_a_disk_is_waited_for(start_valkey: StartValkey) -> None:
    """With --wait-fsync a grant needs the append-only file on the disk, and is else withheld.

    Fails when WAITAOF is not sent, or when its refusal counts as success.
    """
    fsync = Durability(fsync=True)
    with Replica(start_valkey(*DURABLE).url, durability=fsync) as replica:
        held(replica, replica.create_token(0.0))
    with Replica(start_valkey().url, durability=fsync) as replica:
        offer = replica.acquire(replica.create_token(0.0)).offer
        assert refusal(replica.renew, offer) == SHORT


def test_only_an_acceptance_is_taken_back(start_valkey: StartValkey) -> None:
    """A lease that was renewed since, by a holder who tried again elsewhere, stays.

    Fails when `withhold` ends whatever it finds.
    """
    with Replica(start_valkey().url) as replica:
        token = replica.create_token(0.0)
        offer = replica.acquire(token).offer
        name = LeaseName.parse(offer.lease.name)
        store = replica.coordinator.scripts

        def withhold(expires_us: int) -> None:
            secret_hash = hashlib.sha256(offer.secret.encode()).hexdigest()
            lease = name.app, name.token, name.lease
            taking = store.run("withhold", *lease, secret_hash, expires_us)
            asyncio.run_coroutine_threadsafe(taking, replica._loop).result(30)

        accepted = replica.renew(offer).expire_time.ToMicroseconds()
        renewed = replica.renew(offer).expire_time.ToMicroseconds()
        assert renewed > accepted
        withhold(accepted)
        assert replica.renew(offer).state == lease_pb2.LEASE_STATE_ACTIVE
        withhold(replica.renew(offer).expire_time.ToMicroseconds())
        assert refusal(replica.renew, offer) == "OFFER_EXPIRED"


def test_the_options_reach_the_store(start_valkey: StartValkey, tmp_path: Path) -> None:
    """A coordinator that waits for a replica that is not there says so, and grants nothing."""
    with Service(tmp_path, start_valkey(*DURABLE).url) as service:
        token = service.create_token("t")
        service.end(signal.SIGTERM)
        service.environment |= {"HOLDOFF_WAIT_REPLICAS": "1", "HOLDOFF_WAIT_SECONDS": "0.2"}
        service.start()
        assert any("0 of the 1 replicas" in line for line in service.log)
        with grpc.insecure_channel(service.address, NO_PROXY) as channel:
            leases = lease_service_pb2_grpc.LeaseServiceStub(channel)
            offer = leases.AcquireLease(ask(token, wait=0.0)).offer
            renewal = lease_service_pb2.RenewLeaseRequest(
                name=offer.lease.name, secret=offer.secret
            )
            assert refusal(leases.RenewLease, renewal) == SHORT


async def test_the_check_counts_replicas_and_tries_the_command(start_valkey: StartValkey) -> None:
    """A start warns of replicas that are missing, and refuses what can never be."""
    client = fitness.connect(start_valkey(*DURABLE).url)
    assert await fitness.check(client, durability=Durability(fsync=True)) == []
    (warning,) = await fitness.check(client, durability=Durability(replicas=2))
    assert "0 of the 2 replicas that --wait-replicas asks for" in warning
    await client.acl_setuser("default", enabled=True, commands=["-wait", "-waitaof"])
    for durability, lacks in ((ONE, "+wait;"), (Durability(fsync=True), "+waitaof;")):
        with pytest.raises(StoreError, match=rf"lacks for our user: \{lacks}"):
            await fitness.check(client, durability=durability)
    await client.aclose()
    client = fitness.connect(start_valkey().url)
    with pytest.raises(StoreError, match="set appendonly yes"):
        await fitness.check(client, durability=Durability(fsync=True))
    await client.aclose()
