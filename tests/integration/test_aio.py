"""The asyncio client against a real coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

import holdoff
from holdoff import _held, errors
from holdoff._platform import boottime_ns
from holdoff.v1 import lease_pb2
from tests.harness import LONG, Replica, Waiter, ask, end_cooldown, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import redis

    from tests.conftest import Server


@pytest.fixture
async def client(replica: Replica) -> AsyncIterator[holdoff.aio.Client]:
    """Give a client of the shared replica; no task may be left of it."""
    async with holdoff.aio.Client(replica.address) as one:
        yield one
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def until(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]], seconds: float = 10.0
) -> Any:
    """Return the condition's first true value; fail the test when there is none in time."""
    give_up = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < give_up, f"never true: {condition}"
        await asyncio.sleep(0.01)


async def start_waiting(
    client: holdoff.aio.Client, token: str, **options: Any
) -> asyncio.Task[holdoff.aio.HeldLease]:
    """Give a task that waits in the queue of a token."""
    before = await client.list_waiters(token)
    waiting = asyncio.create_task(client.acquire(token, **options))

    async def joined() -> bool:
        return len(await client.list_waiters(token)) > len(before)

    await until(joined)
    return waiting


async def until_waiters(client: holdoff.aio.Client, token: str, count: int) -> None:
    """Wait until so many wait for a token; a client waits for its withdrawal for a second only."""

    async def there_are() -> bool:
        return len(await client.list_waiters(token)) == count

    await until(there_are)


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_lease_is_renewed_until_it_is_released(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """A hold outlasts its TTL, and ends as released.

    Fails when `_renew_on` renews only once.
    """
    token = replica.create_token(0.2)
    renewed: list[int] = []
    labels = {"run": "4711"}
    async with await client.acquire(
        token, ttl_seconds=2.0, labels=labels, on_renewed=renewed.append
    ) as lease:
        first_deadline = lease.deadline_ns
        await until(lambda: boottime_ns() > first_deadline)
        lease.check()
        assert len(renewed) > 1
        assert renewed == sorted(renewed)
        assert lease.deadline_ns == renewed[-1] > first_deadline
        assert 0 < lease.remaining_seconds < 2.0
    ended = await client.get_lease(lease.name)
    assert ended.state == lease_pb2.LEASE_STATE_RELEASED
    assert ended.holder.labels == labels


async def test_what_the_client_ends_itself_moves_it_nowhere(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """Releases, and waits that end or are cancelled, say nothing about the coordinator.

    Fails when the end of a conversation that the client withdrew counts as a broken connection.
    """
    token = replica.create_token(0.1)
    async with await client.acquire(token):
        with pytest.raises(errors.LeaseHeld):
            await client.acquire(token, wait_seconds=0.1)
        told = asyncio.Event()
        waiting = asyncio.create_task(client.acquire(token, on_waiting=lambda _: told.set()))
        await told.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert client._route.number == 0


async def test_waiting_is_told_and_ends_with_the_lease(
    client: holdoff.aio.Client, replica: Replica, store: redis.Redis
) -> None:
    """The callback hears what is waited for; the lease comes when it may."""
    token = replica.create_token(60)
    heard: list[lease_pb2.WaitStatus] = []

    def hear(status: lease_pb2.WaitStatus) -> None:
        heard.append(status)
        end_cooldown(store, token)

    await (await client.acquire(token)).release()
    async with await client.acquire(token, on_waiting=hear):
        pass
    assert heard[0].reason == lease_pb2.WAIT_REASON_COOLING


async def test_without_a_wait_the_reason_is_an_exception(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """Held, cooling, unknown: each has its own class, as in the synchronous client.

    Fails when `from_rpc_error` does not know the errors of `grpc.aio`.
    """
    token = replica.create_token(5)
    async with await client.acquire(token):
        with pytest.raises(errors.LeaseHeld):
            await client.acquire(token, wait_seconds=0)
    with pytest.raises(errors.TokenCooling) as caught:
        await client.acquire(token, wait_seconds=0)
    assert caught.value.retry_after_seconds
    with pytest.raises(errors.TokenNotFound, match="holdoff token create"):
        await client.acquire("apps/a/tokens/none", wait_seconds=0)
    with pytest.raises(errors.TokenNotFound):
        await client.get_token("apps/a/tokens/none")


async def test_a_cancelled_wait_gives_up_its_place_at_once(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """The next one is granted as soon as the token is free, with no ghost before it.

    Fails when `_Conversation.__aexit__` sends no withdrawal, or when `receive` awaits the read
    itself, whose cancellation ends the stream: the ghost keeps its place for a minute.
    """
    token = replica.create_token(0)
    held = await client.acquire(token)
    first = await start_waiting(client, token)
    second = await start_waiting(client, token)
    await cancel(first)
    await until_waiters(client, token, 1)
    await held.release()
    await (await second).release()


async def test_a_timeout_around_the_wait_gives_up_its_place(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """`asyncio.timeout` is a cancellation too, and its TimeoutError arrives."""
    token = replica.create_token(0)
    async with await client.acquire(token):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.acquire(token)
        await until_waiters(client, token, 0)


async def test_a_callback_that_raises_gives_up_the_place(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """What it raised arrives."""
    token = replica.create_token(0)

    def refuse(_: lease_pb2.WaitStatus) -> None:
        raise ZeroDivisionError

    async with await client.acquire(token):
        with pytest.raises(ZeroDivisionError):
            await client.acquire(token, on_waiting=refuse)
        await until_waiters(client, token, 0)


async def test_cancelled_while_it_accepts_it_gives_the_lease_back(
    client: holdoff.aio.Client, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease was accepted, its answer is on the way, and the caller is cancelled.

    Fails when `_accept` does not release, or not in spite of the cancellation: the token would
    be held for a whole TTL.
    """
    token = replica.create_token(0)
    accepted = asyncio.Event()
    answer = client._call

    async def hold_up(call: Any) -> Any:
        result = await answer(call)
        if call.method.endswith("/RenewLease"):
            accepted.set()
            await asyncio.sleep(60)
        return result

    monkeypatch.setattr(client, "_call", hold_up)
    acquiring = asyncio.create_task(client.acquire(token))
    await accepted.wait()
    (lease,) = [one async for one in client.list_leases(token)]
    await cancel(acquiring)
    assert (await client.get_lease(lease.name)).state == lease_pb2.LEASE_STATE_RELEASED


@pytest.mark.parametrize("after_ms", range(0, 30, 2))
async def test_a_cancellation_at_any_moment_leaves_nothing(
    client: holdoff.aio.Client, replica: Replica, after_ms: int
) -> None:
    """Whether it hits the connection, the request, the offer or its acceptance.

    One that comes too late finds a lease, which the caller then gives back.
    """
    token = replica.create_token(0)
    acquiring = asyncio.create_task(client.acquire(token))
    await asyncio.sleep(after_ms / 1000)
    acquiring.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await (await acquiring).release()

    async def is_free() -> bool:
        return not (await client.get_token(token)).lease

    await until(is_free, 2.5)  # an offer that was left would stand for three seconds
    await until_waiters(client, token, 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
async def test_cancelled_while_it_releases_it_gives_the_lease_back(
    replica: Replica, steps: int
) -> None:
    """A task that is cancelled in its release releases all the same, and is cancelled after that.

    Twice, and with its client closed at once. Fails when `_unhindered` does not wait for its work.
    """
    token = replica.create_token(0.0)

    async def work(held: asyncio.Future[str]) -> None:
        async with holdoff.aio.Client(replica.address) as client:
            lease = await client.acquire(token)
            held.set_result(lease.name)
            await lease.release()

    for _ in range(100 if LONG else 1):
        held: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(work(held))
        name = await held
        for _ in range(steps):
            await asyncio.sleep(0)
        for one in asyncio.all_tasks() - {asyncio.current_task()}:  # as many programs end
            one.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert replica.show(name).state == lease_pb2.LEASE_STATE_RELEASED


async def test_a_broken_lease_is_told(client: holdoff.aio.Client, replica: Replica) -> None:
    """Promise 5: a holder learns of a lost lease, by callback and by exception.

    Fails when `_renew_on` does not call `_lose`.
    """
    told: list[errors.LeaseLost] = []
    lease = await client.acquire(replica.create_token(), ttl_seconds=6.0, on_lost=told.append)
    await client.break_lease(lease.name, "enough")
    await until(lambda: told)
    with pytest.raises(errors.LeaseBroken, match="enough"):
        lease.check()
    with pytest.raises(errors.LeaseBroken):
        await lease.release()
    assert (await client.get_lease(lease.name)).state == lease_pb2.LEASE_STATE_BROKEN


async def test_a_holder_fences_itself_when_nobody_answers(valkey: Server, replica: Replica) -> None:
    """Promise 5: without a coordinator the lease counts as lost before it runs out.

    Fails when `Renewals.failed` does not look at the deadline.
    """
    told = asyncio.Event()
    with Replica(valkey.url) as leaving:
        client = holdoff.aio.Client(leaving.address)
        lease = await client.acquire(
            leaving.create_token(), ttl_seconds=1.5, on_lost=lambda _: told.set()
        )
        await asyncio.to_thread(leaving.stop)
    deadline_us = (time.time_ns() + lease.deadline_ns - boottime_ns()) // 1000
    assert deadline_us < replica.show(lease.name).expire_time.ToMicroseconds()
    async with asyncio.timeout(20):
        await told.wait()
    assert lease.remaining_seconds <= 0
    with pytest.raises(errors.LeaseLost):
        lease.check()
    with pytest.raises(errors.LeaseLost):
        await lease.release()
    await client.close()


async def test_a_blocked_event_loop_loses_its_lease_in_time(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """`check` says so before anything else of the loop has run; by then another may hold it.

    Fails when `check` only looks at what the renewals found out.
    """
    token = replica.create_token(0)
    lease = await client.acquire(token, ttl_seconds=1.0)
    waiter = Waiter(replica, ask(token))
    waiter.waiting()
    waiter.offer()  # this waits, and blocks the loop
    with pytest.raises(errors.LeaseLost):
        lease.check()
    with pytest.raises(errors.LeaseLost):
        await lease.release()
    waiter.vanish()


async def test_many_leases_share_a_loop_and_a_connection(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """Thirty tokens at once: all granted, renewed, and released."""
    app = replica.create_token().rpartition("/tokens/")[0]
    names = [f"{app}/tokens/n{number:03}" for number in range(30)]
    await asyncio.gather(*(client.create_token(name, refresh_interval_seconds=0) for name in names))
    leases = await asyncio.gather(*(client.acquire(name, ttl_seconds=15.0) for name in names))
    deadlines = [lease.deadline_ns for lease in leases]
    assert sorted([lease.name async for lease in client.list_leases(app)]) == sorted(
        lease.name for lease in leases
    )
    await until(
        lambda: all(
            lease.deadline_ns > deadline for lease, deadline in zip(leases, deadlines, strict=True)
        )
    )
    for lease in leases:
        lease.check()
    await asyncio.gather(*(lease.release() for lease in leases))
    assert [lease async for lease in client.list_leases(app)] == []


async def test_closing_the_client_ends_its_renewals(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task ends; the lease is not given back, and `check` fails at its deadline."""
    client = holdoff.aio.Client(replica.address)
    lease = await client.acquire(replica.create_token())
    await client.close()
    assert lease._task.done()
    lease.check()
    monkeypatch.setattr(_held, "boottime_ns", lambda: lease.deadline_ns)
    with pytest.raises(errors.LeaseLost):
        lease.check()


async def test_closing_the_client_under_a_wait_is_an_error_and_no_cancellation(
    client: holdoff.aio.Client, replica: Replica
) -> None:
    """What gRPC tells as CancelledError would end a task group of the caller's in silence.

    Fails when `_answer` passes it on.
    """
    token = replica.create_token(0)
    async with await client.acquire(token):
        leaving = holdoff.aio.Client(replica.address)
        waiting = await start_waiting(leaving, token)
        await leaving.close()
        with pytest.raises(holdoff.HoldoffError, match="closed"):
            await waiting


async def test_a_wait_survives_its_coordinator(valkey: Server, replica: Replica) -> None:
    """A client whose replica goes away asks again with the same request id."""
    token = replica.create_token(0.1)
    unreachable: list[errors.Unavailable] = []
    async with holdoff.aio.Client(replica.address) as other:
        held = await other.acquire(token)
        with Replica(valkey.url) as leaving:
            client = holdoff.aio.Client(leaving.address)
            waiting = await start_waiting(client, token, on_unreachable=unreachable.append)
            await asyncio.to_thread(leaving.stop)
        await until(lambda: unreachable)
        with Replica(valkey.url, listen=leaving.address) as back:
            await held.release()
            await (await waiting).release()
            await client.close()
            await asyncio.to_thread(back.stop)


async def test_a_started_command_is_told(client: holdoff.aio.Client, replica: Replica) -> None:
    """`command_started` reaches the coordinator long before the next renewal is due."""
    async with await client.acquire(replica.create_token()) as lease:

        async def told() -> bool:
            return (await client.get_lease(lease.name)).HasField("command_start_time")

        lease.command_started()
        await until(told)


async def test_waiters_and_history_are_listed(client: holdoff.aio.Client, replica: Replica) -> None:
    """Who waits, by place, and who ran."""
    token = replica.create_token(0)
    async with await client.acquire(token, job="one") as lease:
        waiting = await start_waiting(client, token, job="two")
        (waiter,) = await client.list_waiters(token)
        assert (waiter.place, waiter.holder.job) == (1, "two")
        await cancel(waiting)
        held_at = (await client.get_lease(lease.name)).accept_time.ToDatetime(tzinfo=None)
    (ran,) = await client.list_lease_history(token)
    assert ran.name == lease.name
    with pytest.raises(ValueError, match="time zone"):
        await client.list_lease_history(token, at=held_at)


async def test_lists_follow_their_pages(client: holdoff.aio.Client, replica: Replica) -> None:
    """More than a page of tokens comes whole, in order."""
    app = replica.create_token().rpartition("/tokens/")[0]
    names = [f"{app}/tokens/n{number:03}" for number in range(130)]
    for name in names:
        replica.create_token(name=name)
    assert [token.name async for token in client.list_tokens(app)] == [*names, f"{app}/tokens/t"]


async def test_a_watch_misses_nothing_while_its_coordinator_is_away(
    valkey: Server, replica: Replica
) -> None:
    """A lease that came and went between two connections is told, in order, without a snapshot.

    Fails when `Watching.request` leaves out the resume token.
    """
    token = replica.create_token(0)
    kinds: list[int] = []
    snapshots = 0
    unreachable = asyncio.Event()

    async def watch(client: holdoff.aio.Client) -> None:
        nonlocal snapshots
        watching = client.watch_leases(token, on_unreachable=lambda _: unreachable.set())
        async with contextlib.aclosing(watching) as responses:
            async for response in responses:
                snapshots += response.HasField("snapshot")
                if response.HasField("change"):
                    kinds.append(response.change.kind)

    with Replica(valkey.url) as leaving:
        client = holdoff.aio.Client(leaving.address)
        watching = asyncio.create_task(watch(client))
        await until(lambda: snapshots)
        await asyncio.to_thread(leaving.stop)
    async with asyncio.timeout(20):
        await unreachable.wait()
    offer = await asyncio.to_thread(replica.hold, token)
    await asyncio.to_thread(replica.release, offer)
    with Replica(valkey.url, listen=leaving.address) as back:
        await until(lambda: lease_pb2.CHANGE_KIND_RELEASED in kinds)
        await cancel(watching)
        await client.close()
        await asyncio.to_thread(back.stop)
    assert snapshots == 1
    assert kinds.index(lease_pb2.CHANGE_KIND_GRANTED) < kinds.index(lease_pb2.CHANGE_KIND_RELEASED)


async def test_a_watch_of_nothing_is_refused(client: holdoff.aio.Client) -> None:
    """An error that is final is not tried again."""
    with pytest.raises(errors.TokenNotFound):
        await anext(client.watch_leases("apps/a/tokens/none"))
    with pytest.raises(errors.InvalidField):
        await anext(client.watch_leases(resume_token="?"))


def test_a_client_wants_a_running_loop() -> None:
    """Made outside of one it would hang later."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        holdoff.aio.Client()


async def test_a_mute_coordinator_does_not_hold_up_a_cancellation() -> None:
    """One that takes connections and never answers is given a second.

    Fails when `_withdraw` waits without a limit.
    """
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with holdoff.aio.Client(f"127.0.0.1:{mute.getsockname()[1]}") as client:
            waiting = asyncio.create_task(client.acquire("apps/a/tokens/t"))
            connection, _ = await asyncio.to_thread(mute.accept)
            async with asyncio.timeout(20):
                await cancel(waiting)
            connection.close()


def test_ctrl_c_ends_the_loop_and_the_wait(replica: Replica) -> None:
    """As `asyncio.run` does it: the main task is cancelled, and then all that is left.

    Fails when `_Conversation.__aexit__` sends no withdrawal.
    """
    token = replica.create_token(0)
    held = replica.hold(token)
    places: list[int] = []

    async def main() -> None:
        task = asyncio.current_task()
        assert task
        async with holdoff.aio.Client(replica.address) as client:

            def interrupt(status: lease_pb2.WaitStatus) -> None:
                places.append(status.place)
                task.cancel()

            await client.acquire(token, on_waiting=interrupt)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert places == [1]
    wait_until(lambda: replica.show_token(token).queue_length == 0)
    replica.release(held)
