"""A store whose memory is full ends no lease, forgets nothing, and grants nothing new."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import redis

from holdoff._core import duration
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
)
from tests import stores
from tests.harness import Replica, Waiter, ask, refusal, run_out, wait_until
from tests.integration.test_audit import kinds, trail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartValkey

FULL = "STORE_OUT_OF_MEMORY"


@pytest.fixture(params=["server", "cluster"])
def node(request: pytest.FixtureRequest, start_valkey: StartValkey) -> Iterator[tuple[str, Any]]:
    """Give the URL of a store of either kind, and a client of its only server."""
    with contextlib.ExitStack() as stack:
        if request.param == "cluster":
            cluster = stack.enter_context(stores.cluster(primaries=1))
            yield cluster.url, cluster.nodes[0].client
        else:
            url = start_valkey().url
            yield url, stack.enter_context(redis.Redis.from_url(url))


def fill(client: redis.Redis) -> None:
    """Leave the server no memory for new records."""
    client.config_set("maxmemory", 1)


def is_over(replica: Replica, token: str, kind: str) -> bool:
    """Tell whether the audit trail says how the lease of a token ended."""
    return kind in kinds(trail(replica, token))


def test_leases_go_on_and_end(node: tuple[str, Any]) -> None:
    """Renewals, releases, breaks, withdrawals, reads and the sweeper work; nothing new is granted.

    Fails when the store refuses these scripts for lack of memory, or when a coordinator that cannot
    take the sweeper's lock leaves leases that ran out as they are.
    """
    url, client = node
    with Replica(url) as replica:
        tokens = [replica.create_token(0.0) for _ in range(4)]
        kept, released, broken, lost = (replica.hold(token, ttl=60.0) for token in tokens)
        waiter = Waiter(replica, ask(tokens[0]))
        waiter.waiting()
        fill(client)
        assert replica.renew(kept).state == lease_pb2.LEASE_STATE_ACTIVE
        for _ in range(2):
            assert replica.release(released).lease.state == lease_pb2.LEASE_STATE_RELEASED
        request = admin_service_pb2.BreakLeaseRequest(name=broken.lease.name, reason="maintenance")
        replica.admin.BreakLease(request)
        replica.release(broken)
        waiter.withdraw()
        wait_until(lambda: replica.show_token(tokens[0]).queue_length == 0)
        waiter.close()
        assert replica.show(kept.lease.name).state == lease_pb2.LEASE_STATE_ACTIVE
        listed = lease_service_pb2.ListLeasesRequest(parent="")
        assert kept.lease.name in {one.name for one in replica.leases.ListLeases(listed).leases}
        assert is_over(replica, tokens[1], "LEASE_RELEASED")
        assert is_over(replica, tokens[2], "LEASE_BROKEN")
    client.config_set("maxmemory", 0)
    run_out(client, lost)
    fill(client)
    with Replica(url) as replica:  # its sweeper has no lock yet
        wait_until(lambda: is_over(replica, tokens[3], "LEASE_LOST"))
        assert refusal(replica.acquire, tokens[1]) == FULL
        client.config_set("maxmemory", 0)
        replica.release(kept)
        replica.hold(tokens[1])


def test_what_is_new_is_refused(node: tuple[str, Any]) -> None:
    """Grants, tokens, reservations, reports and back-offs fail with the reason, and leave nothing.

    A commit keeps its place. Fails when such a script begins before it is refused.
    """
    url, client = node
    with Replica(url) as replica:
        token = replica.create_token(0.0)
        scope = budget_pb2.Scope(token=token, endpoint="/api/v1/1/crm/Accounts")

        def reserve() -> budget_pb2.Reservation:
            request = budget_service_pb2.ReserveRequest(
                reservation_id=str(uuid.uuid4()),
                ttl=duration(30.0),
                scope=scope,
                kind=budget_pb2.EVENT_KIND_CALL,
            )
            return replica.budgets.Reserve(request).reservation

        def record() -> None:
            event = budget_pb2.Event(
                id=str(uuid.uuid4()), scope=scope, kind=budget_pb2.EVENT_KIND_ERROR, status=404
            )
            replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))

        def back_off() -> None:
            request = admin_service_pb2.SetBackOffRequest(
                scope=scope, length=duration(60.0), reason="a test"
            )
            replica.admin.SetBackOff(request)

        reserved = reserve()
        fill(client)
        before = client.dbsize()
        assert refusal(replica.acquire, token) == FULL
        assert refusal(replica.create_token) == FULL
        assert refusal(lambda: replica.create_token(name=f"{token}-2")) == FULL
        assert refusal(reserve) == FULL
        assert refusal(record) == FULL
        assert refusal(back_off) == FULL
        assert client.dbsize() <= before
        commit = budget_service_pb2.CommitRequest(
            app=token.partition("/tokens/")[0], reservation_id=reserved.id, status=200
        )
        replica.budgets.Commit(commit)


def test_a_quarantine_begins_and_the_audit_trail_stays(node: tuple[str, Any]) -> None:
    """What is found wrong while memory is full is recorded after what was there.

    Fails when any error of XADD is taken for a stream that is not ours.
    """
    url, client = node
    with Replica(url) as replica:
        token = replica.create_token(0.0)
        offer = replica.hold(token)
        app = token.partition("/tokens/")[0]
        before = kinds(trail(replica, app))
        with client.pipeline() as at_once:
            at_once.hset(f"holdoff:{{{app[5:]}}}", "epoch", "another")
            at_once.config_set("maxmemory", 1)
            at_once.execute()
        replica.renew(offer)
        assert kinds(trail(replica, app)) == [*before, "QUARANTINE_BEGAN"]


@pytest.mark.parametrize("stream", ["security", "changes"])
def test_only_what_is_not_ours_is_deleted(stream: str, start_valkey: StartValkey) -> None:
    """A stream whose XADD is forbidden stays; a key of another type makes way for it.

    Fails when the trail, or what watchers read, is deleted for any error.
    """
    url = start_valkey().url
    with redis.Redis.from_url(url) as client, Replica(url) as replica:
        token = replica.create_token(0.0)
        offer = replica.hold(token)
        key = f"holdoff:{{{token.split('/')[1]}}}:{stream}"
        before = client.xlen(key)
        client.acl_setuser("default", enabled=True, commands=["-xadd"])
        if stream == "security":  # the first entry of the call that finds this goes to the trail
            client.hset(key.removesuffix(":security"), "epoch", "another")
        wait_until(lambda: refusal(replica.release, offer) == "STORE_ACCESS_DENIED")
        assert client.xlen(key) == before
        client.acl_setuser("default", enabled=True, commands=["+xadd"])
        client.delete(key)
        client.rpush(key, "a list")
        replica.create_token(name=f"{token}-2")
        assert client.xlen(key) > 0
