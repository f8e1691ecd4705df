"""Upgrades of what real coordinators of each schema left: nobody loses a place, a lease or a count.

The stores are kept in `tests/fixtures`; `schemas.py` there says how they were made.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import redis

from holdoff.v1 import budget_pb2, budget_service_pb2, lease_pb2, lease_service_pb2
from holdoff_coordinator.scripts import source
from tests.fixtures import schemas
from tests.harness import Replica, Waiter, refusal, wait_until

if TYPE_CHECKING:
    from tests.conftest import StartValkey

KEPT = sorted(int(path.stem.removeprefix("schema-")) for path in schemas.FOLDER.glob("*.json"))


def test_every_schema_is_kept() -> None:
    """Fails when the schema rises and the store of the one before is not in `tests/fixtures`."""
    found = re.search(r"local SCHEMA = (\d+)", source("upgrade"))
    assert found
    assert list(range(1, int(found[1]) + 1)) == KEPT


@pytest.mark.parametrize("schema", KEPT)
def test_clients_of_each_schema_go_on(schema: int, start_valkey: StartValkey) -> None:
    """Holder, waiters, cooldown, errors and back-offs of an older coordinator are all still there.

    Fails when the fingerprint of a request changes for the same request: its waiters then hear
    REQUEST_ID_REUSED.
    """
    url = start_valkey().url
    with redis.Redis.from_url(url) as store:
        known = schemas.restore(store, schema)
    holder = lease_service_pb2.RenewLeaseRequest(
        name=known["holder"]["name"], secret=known["holder"]["secret"]
    )
    with Replica(url) as replica:
        assert replica.leases.RenewLease(holder).lease.state == lease_pb2.LEASE_STATE_ACTIVE
        waiters = [Waiter(replica, request) for request in known["waiters"]]
        places = [waiter.waiting(20.0).place for waiter in waiters]
        assert places == list(range(1, len(waiters) + 1))
        cooling = replica.show_token(schemas.COOLING)
        assert abs(cooling.not_before_time.ToMicroseconds() - known["not_before_us"]) < 2
        budgets = replica.budgets.ListBudgets(
            budget_service_pb2.ListBudgetsRequest(parent=schemas.APP)
        ).budgets
        assert sum(one.used for one in budgets if one.limit == "errors") == known["errors"]
        listed = replica.budgets.ListBackOffs(
            budget_service_pb2.ListBackOffsRequest(parent=schemas.APP)
        ).back_offs
        states = [one.state for one in listed]
        assert states == [budget_pb2.BACK_OFF_STATE_QUIET] * known["back_offs"]
        replica.leases.ReleaseLease(
            lease_service_pb2.ReleaseLeaseRequest(name=holder.name, secret=holder.secret)
        )
        for waiter in waiters:  # in order
            replica.release(_accepted(replica, waiter))


@pytest.mark.parametrize("schema", KEPT)
def test_waiters_of_each_schema_may_leave(schema: int, start_valkey: StartValkey) -> None:
    """A waiter of an older coordinator gives its place up; one with another TTL is another request.

    Fails when `withdraw.lua` knows only the fingerprint of this release.
    """
    url = start_valkey().url
    with redis.Redis.from_url(url) as store:
        known = schemas.restore(store, schema)
    with Replica(url) as replica:
        first, second, *_ = known["waiters"]
        second.ttl.seconds += 1
        assert refusal(replica.leases.AcquireLease, second) == "REQUEST_ID_REUSED"
        waiter = Waiter(replica, first)
        waiter.waiting(20.0)
        waiter.withdraw()
        request = lease_service_pb2.ListWaitersRequest(parent=schemas.HELD)
        left = len(known["waiters"]) - 1
        wait_until(lambda: len(replica.leases.ListWaiters(request).waiters) == left, 20.0)
        waiter.close()


def test_a_damaged_token_does_not_prevent_an_upgrade(start_valkey: StartValkey) -> None:
    """The other tokens of its app are upgraded. Fails when `upgrade` ends at one it cannot read."""
    url = start_valkey().url
    with redis.Redis.from_url(url) as store:
        known = schemas.restore(store, 1)
        key = "holdoff:{kept}:token:" + schemas.COOLING.rpartition("/")[2]
        store.delete(key)
        store.rpush(key, "a list")
    with Replica(url) as replica:
        waiter = Waiter(replica, known["waiters"][0])
        assert waiter.waiting(20.0).place == 1
        waiter.vanish()


def _accepted(replica: Replica, waiter: Waiter) -> lease_service_pb2.LeaseOffer:
    offer = waiter.offer(30.0)
    replica.renew(offer)
    waiter.vanish()
    return offer
