"""The life of one lease: offered, accepted, renewed, ended; promises 1, 3, 5 and 8."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from structlog.testing import capture_logs

from holdoff._status import from_rpc_error
from holdoff.v1 import admin_service_pb2, lease_pb2, lease_service_pb2
from tests.harness import (
    Replica,
    Waiter,
    ask,
    refusal,
    run_out,
    silent_waiter,
    wait_until,
    wake,
)

if TYPE_CHECKING:
    import redis


def test_a_new_token_is_granted_at_once(replica: Replica) -> None:
    """A token that was never refreshed has no cooldown."""
    event = replica.acquire(replica.create_token())
    assert event.offer.lease.state == lease_pb2.LEASE_STATE_OFFERED
    assert 0 < event.offer.accept_within.ToMilliseconds() <= 3000


def test_one_holder(replica: Replica, second_replica: Replica) -> None:
    """Promise 1: of many who ask at once, through two replicas, one holds the token.

    Fails when `standing` does not look at the live lease.
    """
    token = replica.create_token()
    replicas = [replica, second_replica] * 8

    def attempt(one: Replica) -> bool:
        try:
            return one.acquire(token).HasField("offer")
        except grpc.RpcError as error:
            assert from_rpc_error(error, "test").reason in ("LEASE_HELD", "TOKEN_QUEUED")  # noqa: PT017
            return False

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(attempt, replicas)).count(True) == 1


def test_an_offer_to_a_waiter_not_heard_from_is_not_made(
    replica: Replica, store: redis.Redis
) -> None:
    """Promise 1: a grant is an offer to a waiter heard from within five seconds.

    Fails when `walk_queue` counts every waiter as live, or acquire.lua does not look at
    `heard_age`.
    """
    token = replica.create_token(interval_seconds=0)
    held = replica.hold(token)
    silent = silent_waiter(replica, ask(token, job="silent"))
    replica.release(held)
    wake(store, silent.request)  # one that comes late makes its conversation ask
    wait_until(lambda: silent.last and silent.last.waiting.reason != lease_pb2.WAIT_REASON_HELD)
    assert silent.last is not None
    assert not silent.last.HasField("offer")
    second = Waiter(replica, ask(token, job="second"))
    assert second.offer().lease.holder.job == "second"
    assert not silent.last.HasField("offer")
    silent.vanish()
    second.vanish()


def test_an_offer_not_accepted_is_withdrawn_without_a_cooldown(
    replica: Replica, store: redis.Redis
) -> None:
    """An offer ends after 3 s; accepting it later is refused, and no cooldown follows.

    Fails when `withdraw_offer` cools the token down, or renew.lua accepts a withdrawn offer.
    """
    token = replica.create_token(interval_seconds=60)
    offer = replica.acquire(token).offer
    assert offer.accept_within.ToMilliseconds() <= 3000
    run_out(store, offer)
    assert replica.show(offer.lease.name).state == lease_pb2.LEASE_STATE_WITHDRAWN
    assert refusal(replica.renew, offer) == "OFFER_EXPIRED"
    assert replica.acquire(token).HasField("offer")


def test_a_waiter_that_missed_an_offer_gets_another(replica: Replica, store: redis.Redis) -> None:
    """A live waiter keeps its place when it did not accept in time."""
    token = replica.create_token()
    waiter = Waiter(replica, ask(token))
    first = waiter.offer()
    run_out(store, first)
    wait_until(lambda: waiter.offer().lease.name != first.lease.name)
    replica.renew(waiter.offer())
    waiter.vanish()


def test_a_lost_reply_gives_the_same_lease(replica: Replica, second_replica: Replica) -> None:
    """An acquire that is retried with its request id returns the same lease, through any replica.

    Fails when acquire.lua does not look at `request.lease` first.
    """
    token, request_id = replica.create_token(), str(uuid.uuid4())
    first = replica.acquire(token, request_id=request_id).offer
    replica.renew(first)
    again = second_replica.acquire(token, request_id=request_id).offer
    assert (again.lease.name, again.secret) == (first.lease.name, first.secret)
    assert again.lease.state == lease_pb2.LEASE_STATE_ACTIVE


def test_after_its_lease_a_request_id_does_not_queue_anew(replica: Replica) -> None:
    """A request id whose lease ended answers LEASE_ENDED.

    Fails when acquire.lua drops its look at `request.state == 'ended'`.
    """
    token, request_id = replica.create_token(interval_seconds=0), str(uuid.uuid4())
    offer = replica.acquire(token, request_id=request_id).offer
    replica.renew(offer)
    replica.release(offer)
    assert refusal(lambda: replica.acquire(token, request_id=request_id)) == "LEASE_ENDED"


def test_a_request_id_is_bound_to_its_parameters(replica: Replica) -> None:
    """The same id for another token, TTL or holder is refused, and changes nothing."""
    token, request_id = replica.create_token(), str(uuid.uuid4())
    offer = replica.acquire(token, request_id=request_id).offer
    for options in ({"ttl": 3.0}, {"job": "another"}):
        reason = refusal(
            lambda options=options: replica.acquire(token, request_id=request_id, **options)
        )
        assert reason == "REQUEST_ID_REUSED"
    assert replica.show(offer.lease.name).state == lease_pb2.LEASE_STATE_OFFERED


def test_releasing_twice_gives_the_same_answer(replica: Replica) -> None:
    """A release whose reply was lost may be repeated."""
    offer = replica.hold(replica.create_token())
    assert replica.release(offer) == replica.release(offer)


def test_only_the_secret_proves_ownership(replica: Replica) -> None:
    """Renew and release with another secret are refused and change nothing.

    Fails when `owned_lease` does not compare the hash.
    """
    offer = replica.hold(replica.create_token())
    before = replica.show(offer.lease.name)
    stranger = lease_service_pb2.LeaseOffer(lease=offer.lease, secret="0" * 64)
    assert refusal(replica.renew, stranger) == "WRONG_SECRET"
    assert refusal(replica.release, stranger) == "WRONG_SECRET"
    after = replica.show(offer.lease.name)
    assert (after.state, after.expire_time) == (before.state, before.expire_time)


def test_a_lease_that_is_not_renewed_expires(replica: Replica) -> None:
    """Without renewals the TTL ends a lease, and its holder is told so."""
    offer = replica.hold(replica.create_token(), ttl=1.0)
    wait_until(lambda: replica.show(offer.lease.name).state == lease_pb2.LEASE_STATE_EXPIRED)
    assert refusal(replica.renew, offer) == "LEASE_LOST"
    assert refusal(replica.release, offer) == "LEASE_LOST"


def test_break_forbids_renewal_and_ends_nothing_early(replica: Replica, store: redis.Redis) -> None:
    """Promise 5: a broken lease lives to its last acknowledged expiry; its holder is told why.

    Fails when break.lua finishes the lease at once, or renew.lua ignores `break_reason`.
    """
    token = replica.create_token(interval_seconds=0.5)
    offer = replica.hold(token)
    expires = replica.show(offer.lease.name).expire_time
    request = admin_service_pb2.BreakLeaseRequest(name=offer.lease.name, reason="wrong file")
    broken = replica.admin.BreakLease(request).lease
    assert (broken.state, broken.expire_time) == (lease_pb2.LEASE_STATE_BREAKING, expires)
    with pytest.raises(grpc.RpcError) as caught:
        replica.renew(offer)
    assert "wrong file" in str(from_rpc_error(caught.value, "test"))
    assert refusal(lambda: replica.acquire(token)) == "LEASE_HELD"
    waiter = Waiter(replica, ask(token))
    expired_us = run_out(store, offer)
    started_us = waiter.offer().lease.create_time.ToMicroseconds()
    assert started_us >= expired_us + 500_000
    assert replica.show(offer.lease.name).state == lease_pb2.LEASE_STATE_BROKEN
    waiter.vanish()


def test_a_holder_confirms_a_break_by_its_release(replica: Replica) -> None:
    """The cooldown of a broken lease counts from the confirmation, whatever refresh is claimed."""
    offer = replica.hold(replica.create_token(interval_seconds=5), ttl=60.0)
    request = admin_service_pb2.BreakLeaseRequest(name=offer.lease.name, reason="stop")
    replica.admin.BreakLease(request)
    report = lease_service_pb2.RefreshReport(saw_every_refresh=True)
    report.last_refresh_age.FromMilliseconds(1)
    released = replica.release(offer, refresh=report)
    assert released.lease.state == lease_pb2.LEASE_STATE_BROKEN
    cooled = released.not_before_time.ToMicroseconds() - released.lease.end_time.ToMicroseconds()
    assert cooled == 5_000_000


def test_fencing_tokens_rise_over_data_loss(replica: Replica, store: redis.Redis) -> None:
    """Promise 3: fencing tokens strictly rise, also when the store forgot the token.

    Fails when acquire.lua counts from `token.fencing + 1` alone.
    """
    token = replica.create_token(interval_seconds=0)
    seen = []
    for _ in range(3):
        offer = replica.hold(token)
        seen.append(offer.lease.fencing_token)
        replica.release(offer)
    app = token.split("/")[1]
    for key in store.scan_iter(f"*{{{app}}}*token:*"):
        store.delete(key)
    replica.create_token(0, name=token)
    seen.append(replica.hold(token).lease.fencing_token)
    assert seen == sorted(set(seen))


def test_the_store_raises_to_the_fencing_token_a_client_knows(replica: Replica) -> None:
    """Promise 3: a client's last number is never reached again, also with a clock set back.

    Fails when acquire.lua does not heed `known`, or offers with `now` alone.
    """
    token = replica.create_token(interval_seconds=0)
    ahead = round((time.time() + 3600) * 1e6)
    offer = replica.hold(token, last_fencing_token=ahead)
    assert offer.lease.fencing_token == ahead + 1
    replica.release(offer)
    assert replica.hold(token).lease.fencing_token == ahead + 2


def test_an_absurd_fencing_token_is_refused(replica: Replica) -> None:
    """A number that would leave no room is refused and changes nothing."""
    token = replica.create_token()
    assert refusal(lambda: replica.acquire(token, last_fencing_token=2**63)) == "INVALID_FIELD"
    assert replica.hold(token).lease.fencing_token < 2**53


def test_no_listing_shows_a_secret(replica: Replica, store: redis.Redis) -> None:
    """Promise 8: no listing, log, error or key holds a lease's secret or a request id.

    Fails when the scripts are given one of them itself, or a log or an error tells it.
    """
    token, request_id = replica.create_token(), str(uuid.uuid4())
    with capture_logs() as logged:
        offer = replica.acquire(token, request_id=request_id).offer
        replica.renew(offer)
        with pytest.raises(grpc.RpcError) as refused:
            replica.acquire(token, request_id=request_id, job="another")
    listed = replica.leases.ListLeases(lease_service_pb2.ListLeasesRequest(parent=token))
    assert any(offer.lease.name in str(entry) for entry in logged)
    shown = f"{listed} {logged} {refused.value}"
    for key in store.scan_iter("*", count=10_000):
        shown += str(key)
        if store.type(key) == b"hash":
            shown += str(store.hgetall(key))
    assert offer.secret not in shown
    assert request_id not in shown


def test_list_shows_live_leases_only_in_pages(replica: Replica) -> None:
    """Ended leases are not listed; pages follow one another without a gap."""
    first = replica.create_token()
    app = first.rpartition("/tokens/")[0]
    names = [f"{app}/tokens/x{i}" for i in range(5)]
    for name in names:
        replica.create_token(0, name=name)
    offers = [replica.hold(name, ttl=30.0) for name in names]
    replica.release(offers[0])
    found, page_token = [], ""
    while True:
        page = replica.leases.ListLeases(
            lease_service_pb2.ListLeasesRequest(parent=app, page_size=2, page_token=page_token)
        )
        found += [lease.name for lease in page.leases]
        if not (page_token := page.next_page_token):
            break
    assert found == [offer.lease.name for offer in offers[1:]]
