"""Promises 4 and 5: first come, first served among the live; a waiter knows what it waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff.v1 import lease_pb2, lease_service_pb2
from tests.harness import Replica, Waiter, ask, refusal, request_hash, wait_until

if TYPE_CHECKING:
    from tests.conftest import Server


def queue_up(replicas: list[Replica], token: str, count: int) -> list[Waiter]:
    """Start waiters one after the other, each queued before the next comes."""
    waiters = []
    for number in range(count):
        waiter = Waiter(replicas[number % len(replicas)], ask(token, job=f"job-{number}"))
        waiter.waiting()
        waiters.append(waiter)
    return waiters


def run_and_release(replica: Replica, waiter: Waiter) -> None:
    """Accept the offer and end the lease."""
    replica.renew(waiter.offer())
    replica.release(waiter.offer())
    waiter.vanish()


def test_first_come_first_served_through_two_replicas(
    replica: Replica, second_replica: Replica
) -> None:
    """Promise 4: leases start in the order of arrival, whichever replica a waiter waits at.

    Fails when places are not numbered by arrival.
    """
    token = replica.create_token(0.05)
    held = replica.hold(token)
    waiters = queue_up([replica, second_replica], token, 6)
    assert [waiter.events[0].waiting.place for waiter in waiters] == [1, 2, 3, 4, 5, 6]
    replica.release(held)
    fencing_tokens = []
    for waiter in waiters:
        fencing_tokens.append(waiter.offer().lease.fencing_token)
        run_and_release(replica, waiter)
    assert fencing_tokens == sorted(fencing_tokens)


def test_one_that_reconnects_keeps_its_place(replica: Replica, second_replica: Replica) -> None:
    """Promise 4: a broken stream resumed with the same request id is where it was.

    Fails when acquire.lua queues every request anew.
    """
    token = replica.create_token(0.05)
    held = replica.hold(token)
    first, second = queue_up([replica], token, 2)
    first.vanish()
    wait_until(lambda: request_hash(first.request) not in replica.coordinator.hub._waiters)
    back = Waiter(second_replica, first.request)
    assert back.waiting().place == 1
    replica.release(held)
    assert back.offer().lease.fencing_token < _after(replica, back, second)


def _after(replica: Replica, first: Waiter, second: Waiter) -> int:
    run_and_release(replica, first)
    fencing_token = second.offer().lease.fencing_token
    second.vanish()
    return fencing_token


def test_one_that_withdraws_gives_up_its_place_at_once(replica: Replica) -> None:
    """The next in line moves up when a waiter waits no more."""
    token = replica.create_token()
    replica.hold(token, ttl=30.0)
    first, second = queue_up([replica], token, 2)
    first.withdraw()
    wait_until(lambda: second.last and second.last.waiting.place == 1)
    wait_until(lambda: first.ended)
    second.vanish()


def test_a_wait_of_zero_answers_at_once_and_does_not_queue(replica: Replica) -> None:
    """Nobody is behind a request that did not want to wait; it says when to come back."""
    token = replica.create_token()
    replica.hold(token, ttl=30.0)
    assert refusal(lambda: replica.acquire(token)) == "LEASE_HELD"
    assert replica.show_token(token).queue_length == 0


def test_a_wait_of_zero_does_not_jump_the_queue(replica: Replica) -> None:
    """Promise 4: a token that is free belongs to the first live waiter.

    Fails when `standing` takes a request without a place for the first.
    """
    token = replica.create_token(0)
    held = replica.hold(token)
    first = ask(token)
    assert replica.leases.AcquireLease(first).waiting.place == 1
    replica.release(held)
    assert refusal(lambda: replica.acquire(token)) == "TOKEN_QUEUED"
    assert replica.leases.AcquireLease(first).HasField("offer")


def test_who_asks_out_of_turn_is_told_to_wait(replica: Replica, second_replica: Replica) -> None:
    """Promise 4: a free token goes to the first live waiter, also if a later one asks sooner.

    Fails when `queue_of` calls every place the first.
    """
    token = replica.create_token(0)
    held = replica.hold(token)
    first, second = ask(token), ask(token)
    assert replica.leases.AcquireLease(first).waiting.place == 1
    assert second_replica.leases.AcquireLease(second).waiting.place == 2
    replica.release(held)
    early = second_replica.leases.AcquireLease(second).waiting
    assert (early.reason, early.place) == (lease_pb2.WAIT_REASON_QUEUED, 2)
    assert replica.leases.AcquireLease(first).HasField("offer")


def test_the_limit_of_a_wait_is_kept(replica: Replica) -> None:
    """At its limit a wait ends with the reason, and leaves the queue."""
    token = replica.create_token()
    replica.hold(token, ttl=30.0)
    waiter = Waiter(replica, ask(token, wait=0.3))
    wait_until(lambda: waiter.last and waiter.last.HasField("error"))
    assert waiter.last is not None
    assert "LEASE_HELD" in str(waiter.last.error)
    assert replica.show_token(token).queue_length == 0
    waiter.close()


def test_a_waiter_is_told_why_and_when(replica: Replica) -> None:
    """Promise 5: held, then cooling, with the place and the earliest start.

    Fails when `Waiter.found` does not compare signatures.
    """
    token = replica.create_token(60.0)
    held = replica.hold(token, job="nightly")
    first, second = queue_up([replica], token, 2)
    status = second.waiting()
    assert (status.reason, status.place) == (lease_pb2.WAIT_REASON_HELD, 2)
    assert "nightly" in status.message
    assert 90 <= status.earliest_start_in.ToSeconds() <= 120
    released = replica.release(held)
    for waiter in (first, second):
        wait_until(waiter.is_cooling)
    assert first.last is not None
    assert first.last.waiting.earliest_start_time == released.not_before_time
    first.vanish()
    second.vanish()


def test_a_single_call_asked_again_keeps_its_place(replica: Replica) -> None:
    """Who cannot stream asks every few seconds with the same request id, and is served in turn."""
    token = replica.create_token(0.05)
    held = replica.hold(token)
    request = ask(token)
    assert replica.leases.AcquireLease(request).waiting.place == 1
    behind = Waiter(replica, ask(token))
    assert behind.waiting().place == 2
    replica.release(held)
    event = wait_until(
        lambda: (event := replica.leases.AcquireLease(request)).HasField("offer") and event
    )
    replica.renew(event.offer)
    behind.vanish()


def test_a_lost_wake_up_is_repaired(replica: Replica) -> None:
    """A hand-over whose wake-up got lost happens at the next tick, not at a time-out.

    Fails when `Waiter.found` does not ask when nothing stands in the way.
    """
    hub = replica.coordinator.hub
    token = replica.create_token(0)
    held = replica.hold(token)
    (waiter,) = queue_up([replica], token, 1)
    (asleep,) = (one for one in hub._all() if str(one.token) == token)
    lost: list[bool] = []
    asleep.ask = lambda: lost.append(True)  # type: ignore[method-assign]
    replica.release(held)
    wait_until(lambda: lost)
    assert not waiter.last or not waiter.last.HasField("offer")
    del asleep.ask
    waiter.offer()
    waiter.vanish()


def test_a_replica_that_drains_sends_its_waiters_away(valkey: Server, replica: Replica) -> None:
    """Waiters of a stopping replica are told to reconnect, and keep their places elsewhere.

    Fails when `Hub.drain` does not stir the waiters.
    """
    token = replica.create_token(0.05)
    held = replica.hold(token, ttl=30.0)
    with Replica(valkey.url, drain_seconds=10.0) as leaving:
        first = Waiter(leaving, ask(token))
        first.waiting()
        second = Waiter(replica, ask(token))
        second.waiting()
        leaving.stop()
        wait_until(lambda: first.last and "DRAINING" in str(first.last.error))
    back = Waiter(replica, first.request)
    assert back.waiting().place == 1
    replica.release(held)
    back.offer()
    assert not second.last or not second.last.HasField("offer")
    back.vanish()
    second.vanish()


def test_a_stream_that_does_not_begin_with_acquire_is_refused(replica: Replica) -> None:
    """The first message says what is asked for."""
    request = lease_service_pb2.StreamAcquireLeaseRequest(heartbeat=lease_service_pb2.Heartbeat())
    reason = refusal(lambda: list(replica.leases.StreamAcquireLease(iter([request]))))
    assert reason == "INVALID_FIELD"
