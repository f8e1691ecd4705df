"""The synchronous client against a real coordinator."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
import time
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING

import pytest

import holdoff
from holdoff import errors
from holdoff._platform import boottime_ns
from holdoff.v1 import lease_pb2, lease_service_pb2
from tests.cable import Cable
from tests.harness import Replica, Waiter, ask, end_cooldown, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    import redis
    from _typeshed import TraceFunction

    from tests.conftest import Server


@pytest.fixture
def client(replica: Replica) -> Iterator[holdoff.Client]:
    """Give a client of the shared replica."""
    with holdoff.Client(replica.address) as one:
        yield one


def test_a_lease_is_renewed_until_it_is_released(client: holdoff.Client, replica: Replica) -> None:
    """A hold outlasts its TTL, and ends as released."""
    token = replica.create_token(0.2)
    with client.acquire(token, ttl_seconds=2.0) as lease:
        first_deadline = lease.deadline_ns
        wait_until(lambda: boottime_ns() > first_deadline)
        lease.check()
    assert client.get_lease(lease.name).state == lease_pb2.LEASE_STATE_RELEASED


def test_what_the_client_ends_itself_moves_it_nowhere(
    client: holdoff.Client, replica: Replica
) -> None:
    """Releases, waits that end and watches that are closed say nothing about the coordinator.

    Fails when the end of a stream that the client cancelled counts as a broken connection.
    """
    token = replica.create_token(0.1)
    for _ in range(3):
        with client.acquire(token) as lease:
            wait_until(partial(getattr, lease, "notice"))  # it follows
            with pytest.raises(errors.LeaseHeld):
                client.acquire(token, wait_seconds=0.1)
    watch = client.watch_leases(token)
    next(watch)
    watch.close()
    assert client._route.number == 0


def test_waiting_is_told_and_ends_with_the_lease(
    client: holdoff.Client, replica: Replica, store: redis.Redis
) -> None:
    """The callback hears what is waited for; the lease comes when it may."""
    token = replica.create_token(60)
    heard: list[lease_pb2.WaitStatus] = []

    def hear(status: lease_pb2.WaitStatus) -> None:
        heard.append(status)
        end_cooldown(store, token)

    client.acquire(token).release()
    with client.acquire(token, on_waiting=hear):
        pass
    assert heard[0].reason == lease_pb2.WAIT_REASON_COOLING


def test_without_a_wait_the_reason_is_an_exception(
    client: holdoff.Client, replica: Replica
) -> None:
    """Held, cooling, unknown: each has its own class."""
    token = replica.create_token(5)
    with client.acquire(token):
        with pytest.raises(errors.LeaseHeld) as caught:
            client.acquire(token, wait_seconds=0)
        assert caught.value.retry_after_seconds
    with pytest.raises(errors.TokenCooling):
        client.acquire(token, wait_seconds=0)
    with pytest.raises(errors.TokenNotFound, match="holdoff token create"):
        client.acquire("apps/a/tokens/none", wait_seconds=0)


def test_a_broken_lease_is_told(client: holdoff.Client, replica: Replica) -> None:
    """Promise 5: a holder learns of a lost lease, by callback and by exception.

    Fails when `_renew_on` does not call `_lose`.
    """
    told: list[errors.LeaseLost] = []
    lease = client.acquire(replica.create_token(), ttl_seconds=6.0, on_lost=told.append)
    client.break_lease(lease.name, "enough")
    wait_until(lambda: told)
    assert isinstance(told[0], errors.LeaseBroken)
    with pytest.raises(errors.LeaseBroken, match="enough"):
        lease.check()
    with pytest.raises(errors.LeaseBroken):
        lease.release()
    assert client.get_lease(lease.name).state == lease_pb2.LEASE_STATE_BROKEN


def test_a_holder_fences_itself_when_nobody_answers(valkey: Server, replica: Replica) -> None:
    """Promise 5: without a coordinator the lease counts as lost before it runs out.

    Fails when `Renewals.failed` does not look at the deadline.
    """
    told = threading.Event()
    with Replica(valkey.url) as leaving:
        client = holdoff.Client(leaving.address)
        token = leaving.create_token()
        lease = client.acquire(token, ttl_seconds=1.5, on_lost=lambda _: told.set())
    deadline_us = (time.time_ns() + lease.deadline_ns - boottime_ns()) // 1000
    assert deadline_us < replica.show(lease.name).expire_time.ToMicroseconds()
    assert told.wait(20)
    assert lease.remaining_seconds <= 0
    with pytest.raises(errors.LeaseLost):
        lease.check()
    with pytest.raises(errors.LeaseLost):
        lease.release()
    client.close()


def test_an_interrupted_wait_gives_up_its_place(client: holdoff.Client, replica: Replica) -> None:
    """Ctrl-C leaves no ghost in the queue.

    Fails when `_Conversation.__exit__` sends no withdrawal.
    """
    token = replica.create_token()

    def interrupt(_: lease_pb2.WaitStatus) -> None:
        raise KeyboardInterrupt

    with client.acquire(token):
        with pytest.raises(KeyboardInterrupt):
            client.acquire(token, on_waiting=interrupt)
        wait_until(lambda: replica.show_token(token).queue_length == 0)


class _SignalError(Exception):
    """What a signal handler raises."""


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Collect no garbage meanwhile."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_wait_can_be_interrupted_at_any_instant(replica: Replica) -> None:
    """Wherever in the wait a signal handler raises, the request ends and the client closes.

    Fails when that is inside of gRPC, where a lock stays taken: the client never closes then.
    """
    token, waited, closed = replica.create_token(), list[int](), list[int]()

    def interrupted_at(instant: int) -> None:
        """Raise before that bytecode instruction, or, if there are fewer, when the wait ends."""
        reached = 0

        def trace(frame: FrameType, event: str, _: object) -> TraceFunction:
            nonlocal reached
            frame.f_trace_opcodes = True
            reached += event == "opcode"
            if reached == instant:
                sys.settrace(None)
                raise _SignalError
            return trace

        @contextlib.contextmanager
        def interruptible() -> Iterator[None]:
            sys.settrace(trace)
            try:
                yield
            finally:
                sys.settrace(None)

        def end(_: lease_pb2.WaitStatus) -> None:
            waited.append(instant)
            raise _SignalError

        with holdoff.Client(replica.address) as client:
            client._interruptible = interruptible
            with pytest.raises(_SignalError):
                client.acquire(token, on_waiting=end)
        closed.append(instant)

    with (
        without_collector(),  # whose callbacks would be interrupted, too, and say so as a warning
        holdoff.Client(replica.address) as holder,
        holder.acquire(token),
    ):
        for instant in itertools.count(1):
            waiting = threading.Thread(target=interrupted_at, args=[instant], daemon=True)
            waiting.start()
            waiting.join(30)
            assert instant in closed
            if waited:
                break
        wait_until(lambda: replica.show_token(token).queue_length == 0)


def test_interrupted_while_it_accepts_it_gives_the_lease_back(replica: Replica) -> None:
    """The lease was accepted, its answer is on the way, and Ctrl-C comes.

    Fails when `_accept` does not release it, or as one under which something ran.
    """
    token = replica.create_token(600)
    with Cable(replica.address) as cable, holdoff.Client(cable.address) as client:

        def hold_answer(data: bytes) -> None:
            if b"RenewLease" in data:
                cable.flows.clear()

        def interrupt() -> None:
            wait_until(lambda: not cable.flows.is_set())
            lease = replica.show_token(token).lease
            wait_until(lambda: replica.show(lease).state == lease_pb2.LEASE_STATE_ACTIVE)
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: not replica.show_token(token).lease)
            cable.flows.set()

        cable.on_request = hold_answer
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            client.acquire(token)
        interrupting.join()
    shown = replica.show_token(token)
    assert (shown.lease, shown.HasField("not_before_time")) == ("", False)


def test_a_wait_survives_its_coordinator(valkey: Server, replica: Replica) -> None:
    """A client whose replica goes away asks again with the same request id."""
    token = replica.create_token(0.1)
    leaving = Replica(valkey.url)
    with leaving:
        client = holdoff.Client(leaving.address)
        unreachable: list[errors.Unavailable] = []
        held = holdoff.Client(replica.address).acquire(token)
        got: list[holdoff.HeldLease] = []
        thread = threading.Thread(
            target=lambda: got.append(client.acquire(token, on_unreachable=unreachable.append))
        )
        thread.start()
        wait_until(lambda: replica.show_token(token).queue_length == 1)
    wait_until(lambda: unreachable)
    with Replica(valkey.url, listen=leaving.address):
        held.release()
        thread.join(timeout=20)
        assert got
        got[0].release()
        client.close()


def test_waiters_and_history_are_listed(client: holdoff.Client, replica: Replica) -> None:
    """Who waits, by place; who ran, the newest first, and who ran at a given time."""
    token = replica.create_token(0)
    with client.acquire(token, job="one", labels={"run": "4711"}) as first:
        waiter = Waiter(replica, ask(token, job="two"))
        waiter.waiting()
        (listed,) = client.list_waiters(token)
        assert (listed.place, listed.holder.job) == (1, "two")
        waiter.withdraw()
        wait_until(lambda: waiter.ended)
        waiter.close()
    with client.acquire(token, job="three") as second:
        pass
    history = client.list_lease_history(token)
    assert [lease.name for lease in history] == [second.name, first.name]
    assert history[1].holder.labels == {"run": "4711"}
    at = history[1].accept_time.ToDatetime(tzinfo=UTC)
    assert [lease.name for lease in client.list_lease_history(token, at=at)] == [first.name]
    with pytest.raises(ValueError, match="time zone"):
        client.list_lease_history(token, at=at.replace(tzinfo=None))


def test_a_watch_misses_nothing_while_its_coordinator_is_away(
    valkey: Server, replica: Replica
) -> None:
    """A lease that came and went between two connections is told, in order, without a snapshot.

    Fails when `Watching.request` leaves out the resume token.
    """
    token = replica.create_token(0)
    unreachable = threading.Event()
    heard: list[lease_service_pb2.WatchLeasesResponse] = []

    def kinds() -> list[int]:
        return [one.change.kind for one in heard if one.HasField("change")]

    def watch(client: holdoff.Client) -> None:
        watching = client.watch_leases(token, on_unreachable=lambda _: unreachable.set())
        with contextlib.closing(watching) as responses:
            for response in responses:
                heard.append(response)
                if lease_pb2.CHANGE_KIND_RELEASED in kinds():
                    return

    with Replica(valkey.url) as leaving:
        client = holdoff.Client(leaving.address)
        thread = threading.Thread(target=watch, args=[client], daemon=True)
        thread.start()
        wait_until(lambda: heard)
    assert unreachable.wait(20)
    replica.release(replica.hold(token))
    with Replica(valkey.url, listen=leaving.address):
        thread.join(timeout=20)
        assert not thread.is_alive()
        client.close()
    assert sum(one.HasField("snapshot") for one in heard) == 1
    order = kinds()
    assert order.index(lease_pb2.CHANGE_KIND_GRANTED) < order.index(lease_pb2.CHANGE_KIND_RELEASED)


def test_a_watch_of_nothing_is_refused(client: holdoff.Client) -> None:
    """An error that is final is not tried again."""
    with pytest.raises(errors.TokenNotFound):
        next(client.watch_leases("apps/a/tokens/none"))
    with pytest.raises(errors.InvalidField):
        next(client.watch_leases(resume_token="?"))


def test_update_leaves_what_is_not_named(client: holdoff.Client, replica: Replica) -> None:
    """Only the settings that are given change."""
    token = replica.create_token(5)
    changed = client.update_token(token, refresh_at="start")
    assert changed.refresh_interval.ToMilliseconds() == 5000
    assert client.update_token(token) == client.get_token(token)


def test_lists_follow_their_pages(client: holdoff.Client, replica: Replica) -> None:
    """More than a page of tokens comes whole, in order."""
    app = replica.create_token().rpartition("/tokens/")[0]
    names = [f"{app}/tokens/n{number:03}" for number in range(130)]
    for name in names:
        replica.create_token(name=name)
    assert [token.name for token in client.list_tokens(app)] == [*names, f"{app}/tokens/t"]


def test_a_wait_beyond_every_limit_is_refused_at_once(client: holdoff.Client) -> None:
    """A call by gRPC would never return. Fails when `Acquisition` takes any number."""
    for wait_seconds in (367 * 24 * 3600, 8.64e9, float("inf"), float("nan")):
        with pytest.raises(holdoff.InvalidRequest, match="366 days"):
            client.acquire("apps/a/tokens/t", wait_seconds=wait_seconds)
