"""Finding out: who holds, who waits, and who held before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2

from holdoff.v1 import admin_service_pb2, lease_pb2, lease_service_pb2
from tests.harness import Replica, Waiter, ask, refusal, run_out, silent_waiter, wait_until

if TYPE_CHECKING:
    import redis


def history(replica: Replica, token: str, at_us: int | None = None) -> list[lease_pb2.Lease]:
    """Read the latest leases of a token."""
    request = lease_service_pb2.ListLeaseHistoryRequest(parent=token)
    if at_us is not None:
        request.at_time.CopyFrom(timestamp_pb2.Timestamp())
        request.at_time.FromMicroseconds(at_us)
    return list(replica.leases.ListLeaseHistory(request).leases)


def waiters(replica: Replica, token: str) -> list[lease_pb2.Waiter]:
    """Read who waits for a token."""
    request = lease_service_pb2.ListWaitersRequest(parent=token)
    return list(replica.leases.ListWaiters(request).waiters)


def test_how_each_hold_ended(replica: Replica, store: redis.Redis) -> None:
    """The history tells who held, from when to when, and how it ended; the newest comes first."""
    token = replica.create_token(0.0)
    replica.release(replica.hold(token, job="released"))
    run_out(store, replica.hold(token, job="expired"))
    broken = replica.hold(token, job="broken")
    replica.admin.BreakLease(
        admin_service_pb2.BreakLeaseRequest(name=broken.lease.name, reason="maintenance")
    )
    replica.release(broken)
    run_out(store, replica.acquire(token, job="never accepted").offer)
    replica.hold(token, job="live")
    found = [(lease.holder.job, lease.state) for lease in history(replica, token)]
    assert found == [
        ("live", lease_pb2.LEASE_STATE_ACTIVE),
        ("broken", lease_pb2.LEASE_STATE_BROKEN),
        ("expired", lease_pb2.LEASE_STATE_EXPIRED),
        ("released", lease_pb2.LEASE_STATE_RELEASED),
    ]
    assert history(replica, token)[1].break_reason == "maintenance"


def test_who_ran_then(replica: Replica) -> None:
    """A time selects the lease that lived at it, the live one too, and nothing in between."""
    token = replica.create_token(0.05)
    first = replica.hold(token, job="first")
    replica.release(first)
    wait_until(lambda: not replica.show_token(token).wait_reason)
    replica.hold(token, job="second")
    second, ended = history(replica, token)
    accepted_us, ended_us = (time.ToMicroseconds() for time in (ended.accept_time, ended.end_time))

    def jobs(at_us: int) -> list[str]:
        return [lease.holder.job for lease in history(replica, token, at_us)]

    assert jobs(accepted_us - 1) == []
    assert jobs(accepted_us) == ["first"]
    assert jobs(ended_us) == ["first"]
    assert jobs(ended_us + 1) == []
    assert jobs(second.accept_time.ToMicroseconds()) == ["second"]
    assert jobs(time.time_ns() // 1000 + 3_600_000_000) == []


def test_the_last_hundred(replica: Replica, store: redis.Redis) -> None:
    """A token remembers 100 ended leases, and the store keeps nothing of the others.

    Fails when records of forgotten leases stay.
    """
    token = replica.create_token(0.0)
    names = []
    for _ in range(103):
        offer = replica.hold(token)
        names.append(offer.lease.name)
        replica.release(offer)
    assert [lease.name for lease in history(replica, token)] == names[:2:-1]
    assert refusal(replica.show, names[2]) == "LEASE_NOT_FOUND"
    assert replica.show(names[3]).state == lease_pb2.LEASE_STATE_RELEASED
    app = token.split("/")[1]
    records = list(store.scan_iter(f"holdoff:{{{app}}}:lease:*", count=1000))
    assert len(records) == 100
    assert {store.pttl(record) for record in records} == {-1}  # a restart keeps them too


def test_the_queue_in_order(replica: Replica, second_replica: Replica) -> None:
    """Waiters are listed by place with what they said of themselves, whichever replica has them."""
    token = replica.create_token(0.0)
    held = replica.hold(token)
    requests = [ask(token, job=f"job-{number}") for number in range(3)]
    requests[0].holder.labels["run"] = "4711"
    queue = [silent_waiter(replica, requests[0])]
    for number, request in enumerate(requests[1:], start=1):
        queue.append(Waiter([replica, second_replica][number % 2], request))
        queue[-1].waiting()
    found = waiters(second_replica, token)
    assert [(w.place, w.holder.job) for w in found] == [(1, "job-0"), (2, "job-1"), (3, "job-2")]
    assert dict(found[0].holder.labels) == {"run": "4711"}
    assert found[0].queue_time.ToMicroseconds() < found[1].queue_time.ToMicroseconds()
    assert 0 < found[2].waited.ToMicroseconds() <= found[0].waited.ToMicroseconds() < 60_000_000
    assert not any(waiter.offered for waiter in found)

    def is_live(place: int) -> bool:
        return waiters(replica, token)[place].heard_age.ToMilliseconds() < 5000

    assert not is_live(0)
    assert is_live(1)
    queue[0].silent = False
    wait_until(lambda: is_live(0))
    replica.release(held)
    queue[0].offer()
    assert [waiter.offered for waiter in waiters(replica, token)] == [True, False, False]
    for waiter in queue:
        waiter.withdraw()
        waiter.close()


def test_labels_of_a_holder(replica: Replica) -> None:
    """What a holder says of itself stands in the lease, labels included."""
    token = replica.create_token(0.0)
    request = ask(token, wait=0.0)
    request.holder.labels["team"] = "finance"
    offer = replica.leases.AcquireLease(request).offer
    assert dict(replica.show(offer.lease.name).holder.labels) == {"team": "finance"}
    assert replica.leases.AcquireLease(request).offer.secret == offer.secret  # the same request


def test_unknown_tokens(replica: Replica) -> None:
    """Both listings say that there is no such token."""
    token = "apps/a/tokens/none"
    assert refusal(lambda: history(replica, token)) == "TOKEN_NOT_FOUND"
    assert refusal(lambda: waiters(replica, token)) == "TOKEN_NOT_FOUND"
