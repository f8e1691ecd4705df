"""Clients leave a coordinator that is of no use to them, before anything is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import holdoff
from holdoff import errors
from holdoff._aio_lease import Conversation
from holdoff._platform import boottime_ns
from holdoff.testing import valkey
from holdoff.v1 import lease_pb2
from holdoff_coordinator import scripts, sweeper
from tests.cable import Cable
from tests.e2e.service import Service
from tests.harness import LONG, NO_PROXY, Replica, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.timeout(180)

TTL_SECONDS = 15.0
SHORT_TTL_SECONDS = 8.0
"""Short, and long enough for a machine that is busy with other tests."""
HEALTHY = Path(__file__).parents[2] / "deploy" / "healthy.py"
SERVING = health_pb2.HealthCheckResponse.SERVING


def starts_at(client: holdoff.Client | holdoff.aio.Client, address: str) -> bool:
    """Tell whether a client's connection began with an address."""
    return client._route.target(0).startswith(f"ipv4:{address}")


def sync_at(first: str, *others: str) -> holdoff.Client:
    """Give a client of several coordinators that begins with the first one."""
    while not starts_at(client := holdoff.Client(",".join((first, *others))), first):
        client.close()
    return client


async def aio_at(first: str, *others: str) -> holdoff.aio.Client:
    """Give one for asyncio."""
    while not starts_at(client := holdoff.aio.Client(",".join((first, *others))), first):
        await client.close()
    return client


def health(address: str, service: str = "") -> int:
    """Ask a coordinator how it is."""
    with grpc.insecure_channel(address, NO_PROXY) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)


def open_files() -> int:
    """Count the files and sockets of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def renewed_since(lease: holdoff.HeldLease | holdoff.aio.HeldLease, instant_ns: int) -> bool:
    """Tell whether a lease, which must not be lost, was renewed some seconds after an instant."""
    lease.check()
    return lease.deadline_ns > instant_ns + (TTL_SECONDS + 2) * 1e9


@pytest.fixture
def store() -> Iterator[str]:
    """Give the path of a store's socket."""
    with valkey() as (url, _):
        yield url.removeprefix("unix://")


@pytest.fixture
def to_store(store: str) -> Iterator[Cable]:
    """Give a coordinator's connection to the store."""
    with Cable(store) as cable:
        yield cable


@pytest.fixture
def cut_off(to_store: Cable) -> Iterator[Replica]:
    """Give a coordinator whose connection to the store a test may cut."""
    with Replica(f"redis://{to_store.address}/0") as replica:
        yield replica


@pytest.fixture
def healthy(store: str) -> Iterator[Replica]:
    """Give another coordinator on the same store."""
    with Replica(f"unix://{store}") as replica:
        yield replica


# A coordinator that hangs ----------------------------------------------------------------------


async def test_holders_leave_a_frozen_coordinator(
    two_replicas: tuple[Service, Service],
) -> None:
    """A coordinator under SIGSTOP costs no lease of some seconds: its holders go on at the next.

    Fails when renewals have no short deadline, or stay on the channel that gives no answer.
    """
    frozen, healthy = two_replicas
    names = [frozen.create_token(f"frozen-{number}") for number in range(2)]
    with sync_at(frozen.address, healthy.address) as client:
        async with await aio_at(frozen.address, healthy.address) as aio_client:
            lease = await asyncio.to_thread(client.acquire, names[0], ttl_seconds=SHORT_TTL_SECONDS)
            aio_lease = await aio_client.acquire(names[1], ttl_seconds=SHORT_TTL_SECONDS)
            os.kill(frozen.process.pid, signal.SIGSTOP)
            try:
                stopped_ns = boottime_ns()

                for one in (lease, aio_lease):
                    await asyncio.to_thread(wait_until, lambda: renewed_since(one, stopped_ns), 60)  # noqa: B023
                await asyncio.to_thread(lease.release)
                await aio_lease.release()
            finally:
                os.kill(frozen.process.pid, signal.SIGCONT)


# A coordinator without its store ---------------------------------------------------------------


def test_the_sync_client_leaves_a_coordinator_without_its_store(
    to_store: Cable, cut_off: Replica, healthy: Replica
) -> None:
    """Holder, waiter, watch and a single call all go on at the next coordinator.

    Fails when a client stays where its connection is good, or when the coordinator leaves those
    alone that wait at it.
    """
    token, other = cut_off.create_token(0.1), cut_off.create_token(0.1)
    blocker = healthy.hold(other, ttl=60)
    both = cut_off.address, healthy.address
    with (
        sync_at(*both) as holding,
        sync_at(*both) as waiting,
        sync_at(*both) as watching,
        sync_at(*both) as asking,
    ):
        lease = holding.acquire(token, ttl_seconds=TTL_SECONDS)
        got: list[holdoff.HeldLease] = []
        waiter = threading.Thread(
            target=lambda: got.append(waiting.acquire(other, ttl_seconds=TTL_SECONDS))
        )
        waiter.start()
        watch = watching.watch_leases(other)
        next(watch)
        asking.get_token(other)
        wait_until(lambda: asking.get_token(other).queue_length == 1)
        to_store.cut()
        cut_ns = boottime_ns()
        assert asking.get_token(other).queue_length == 1
        healthy.release(blocker)
        waiter.join(60)
        assert got[0].name == healthy.show_token(other).lease
        wait_until(lambda: renewed_since(lease, cut_ns), 60)
        lease.release()
        got[0].release()
        assert any(response.change.status.lease.name == got[0].name for response in watch)
        watch.close()


async def test_the_client_for_asyncio_leaves_a_coordinator_without_its_store(
    to_store: Cable, cut_off: Replica, healthy: Replica
) -> None:
    """The same in an event loop.

    Fails when a client stays where its connection is good.
    """
    token, other = cut_off.create_token(0.1), cut_off.create_token(0.1)
    blocker = healthy.hold(other, ttl=60)
    both = cut_off.address, healthy.address
    async with contextlib.AsyncExitStack() as stack:
        holding, waiting, watching, asking = [
            await stack.enter_async_context(await aio_at(*both)) for _ in range(4)
        ]
        lease = await holding.acquire(token, ttl_seconds=TTL_SECONDS)
        waiter = asyncio.create_task(waiting.acquire(other, ttl_seconds=TTL_SECONDS))
        watch = watching.watch_leases(other)
        await anext(watch)
        await until_queued(healthy, other, 1)
        to_store.cut()
        cut_ns = boottime_ns()
        assert (await asking.get_token(other)).queue_length == 1
        healthy.release(blocker)
        got = await asyncio.wait_for(waiter, 60)
        await asyncio.to_thread(wait_until, lambda: renewed_since(lease, cut_ns), 60)
        await lease.release()
        await got.release()
        async with asyncio.timeout(60):
            async for response in watch:
                if response.change.status.lease.name == got.name:
                    break
        await watch.aclose()


def test_a_holder_hears_notices_though_its_coordinator_lost_the_store(
    to_store: Cable, cut_off: Replica, healthy: Replica
) -> None:
    """It follows its lease at the next coordinator, long before its next renewal is due.

    Fails when the coordinator leaves its followers alone.
    """
    token = cut_off.create_token(0.1)
    notices: list[Any] = []
    with (
        sync_at(cut_off.address, healthy.address) as client,
        client.acquire(token, ttl_seconds=3600, on_notice=notices.append) as lease,
    ):
        wait_until(lambda: notices)
        to_store.cut()
        wait_until(lambda: health(cut_off.address) != SERVING, 60)
        with holdoff.Client(healthy.address) as operator:
            operator.set_back_off(token, 60, "a test")
        wait_until(lambda: notices[-1].back_offs, 60)
        lease.check()


def test_health_follows_the_store(to_store: Cable, cut_off: Replica) -> None:
    """NOT_SERVING while the store is away, and SERVING when it is back; the process lives.

    Meanwhile it refuses all calls without asking the store, which may take seconds to fail.
    Fails when the coordinator reports that it serves whatever its store does, or answers calls.
    """
    assert health(cut_off.address) == SERVING
    to_store.cut()
    wait_until(lambda: health(cut_off.address) != SERVING, 60)
    assert health(cut_off.address, "liveness") == SERVING
    with holdoff.Client(cut_off.address) as client, pytest.raises(errors.StoreUnavailable):
        client.list_policies()
    to_store.mend()
    wait_until(lambda: health(cut_off.address) == SERVING, 60)
    cut_off.hold(cut_off.create_token(0.1))


def test_leaving_leaks_nothing(cut_off: Replica, healthy: Replica) -> None:
    """Channels that were left are closed, with their threads and connections.

    Fails when a channel is replaced and not closed.
    """
    token = cut_off.create_token(0.1)
    with sync_at(cut_off.address, healthy.address) as client:
        lease = client.acquire(token, ttl_seconds=TTL_SECONDS)

        def leave() -> None:
            before = client._route.number
            client._route.failed(before, errors.Draining("x"), boottime_ns())
            client.get_token(token)
            assert client._route.number > before

        leave()
        gc.collect()
        threads, files = threading.active_count(), open_files()
        for _ in range(10):
            client._route._moves_left = 6.0
            leave()
        lease.check()
        # A stream restarts in its own time. Ten channels that stay are ten threads and 20 sockets.
        wait_until(lambda: threading.active_count() < threads + 10)
        wait_until(lambda: open_files() < files + 20)
        lease.release()


async def test_leaving_leaks_nothing_in_asyncio(cut_off: Replica, healthy: Replica) -> None:
    """Conversations and their connections end at once, and not at the next garbage collection.

    Fails when an error refers, by its traceback, to a frame that refers to the error or its task.
    """
    token, queue = cut_off.create_token(0.1), cut_off.create_token(0.1)
    cut_off.hold(queue, ttl=60)

    async def leave_often() -> None:
        async with await aio_at(cut_off.address, healthy.address) as client:
            lease = await client.acquire(token, ttl_seconds=TTL_SECONDS)
            waiting = asyncio.create_task(client.acquire(queue, ttl_seconds=TTL_SECONDS))
            for _ in range(5):
                await until_queued(healthy, queue, 1)
                client._route.failed(client._route.number, errors.Draining("x"), boottime_ns())
                await client.get_token(token)
            assert client._route.number == 5
            lease.check()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await lease.release()

    def conversations() -> list[object]:
        return [one for one in gc.get_objects() if isinstance(one, Conversation)]

    await leave_often()
    gc.collect()
    gc.disable()
    try:
        await leave_often()
        await asyncio.to_thread(wait_until, lambda: not conversations())
    finally:
        gc.enable()


# A coordinator that is older than the records --------------------------------------------------


@pytest.fixture
def newer(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    """Give a coordinator of the next release, as far as the store's schema goes."""
    before = scripts.source
    known = "local SCHEMA = 4 "
    assert known in before("renew")
    with monkeypatch.context() as patch:
        newer_one = known.replace("4", "5")
        patch.setattr(scripts, "source", lambda name: before(name).replace(known, newer_one))
        # These would bring up the records before the older one has clients.
        patch.setattr(scripts.Scripts, "upgrade", lambda _: asyncio.sleep(0))
        patch.setattr(sweeper.Sweeper, "sweep", lambda _: asyncio.sleep(0))
        replica = Replica(f"unix://{store}")
        with replica:
            yield replica


def test_clients_go_on_at_the_newer_coordinator(store: str, newer: Replica, tmp_path: Path) -> None:
    """The older one drains and ends by itself; its holder and its waiter go on at the newer one.

    Fails when the older one stays, or its clients do.
    """
    with Service(tmp_path, f"unix://{store}") as older:
        token, other = older.create_token("upgraded", "0.1s"), older.create_token("queue", "0.1s")
        both = older.address, newer.address
        with sync_at(*both) as holding, sync_at(*both) as waiting:
            lease = holding.acquire(token, ttl_seconds=TTL_SECONDS)
            blocker = holding.acquire(other, ttl_seconds=TTL_SECONDS)
            got: list[holdoff.HeldLease] = []
            waiter = threading.Thread(
                target=lambda: got.append(waiting.acquire(other, ttl_seconds=TTL_SECONDS))
            )
            waiter.start()
            # A client that moved early, on a busy machine, has brought up the records already.
            with contextlib.suppress(holdoff.Unavailable):
                older.wait_for_queue(other, 1)
            seen_ns = boottime_ns()
            newer.show_token(token)  # which brings up the records of their app
            assert older.process.wait(60) == 69
            wait_until(lambda: renewed_since(lease, seen_ns), 60)
            blocker.release()
            waiter.join(60)
            for one in (lease, got[0]):
                assert newer.show(one.name).state == lease_pb2.LEASE_STATE_ACTIVE
                one.release()
        assert any("upgrade this one" in line for line in older.log)


# Answers that are lost -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
async def test_a_lease_that_was_lost_before_it_was_heard_of_is_asked_for_anew(
    healthy: Replica, kind: str
) -> None:
    """The answer to an acceptance is lost for longer than the TTL, and the wait goes on.

    Fails when the LeaseLost that the repeated acceptance gets ends the wait.
    """
    token, lost = healthy.create_token(0.1), [lease_pb2.LEASE_STATE_EXPIRED]
    with Cable(healthy.address) as cable:

        def hold_answers(data: bytes) -> None:
            if b"RenewLease" in data:
                cable.flows.clear()

        cable.on_request = hold_answers

        def let_go() -> None:
            wait_until(lambda: not cable.flows.is_set())
            cable.on_request = lambda _: None
            with holdoff.Client(healthy.address) as operator:
                wait_until(
                    lambda: [one.state for one in operator.list_lease_history(token)] == lost
                )
            cable.flows.set()

        held = threading.Thread(target=let_go)
        held.start()
        if kind == "sync":
            with holdoff.Client(cable.address) as client:
                lease = await asyncio.to_thread(client.acquire, token, ttl_seconds=1)
                lease.check()
        else:
            async with holdoff.aio.Client(cable.address) as aio_client:
                (await aio_client.acquire(token, ttl_seconds=1)).check()
        held.join()


async def test_a_connection_that_breaks_during_a_heartbeat_ends_no_wait(
    healthy: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiters go on, whatever gRPC makes of a connection that ends under their messages.

    Fails when `Internal error from Core` counts as a fault.
    """
    monkeypatch.setattr("holdoff._aio_lease.HEARTBEAT_SECONDS", 0.005)
    token = healthy.create_token(0.1)
    blocker = healthy.hold(token, ttl=60)
    with Cable(healthy.address) as cable:
        async with clients(cable.address, 10) as waiting:
            waits = [asyncio.create_task(one.acquire(token, ttl_seconds=5)) for one in waiting]
            for _ in range(50 if LONG else 8):
                await until_queued(healthy, token, len(waits))
                for one in waits:
                    assert not one.done(), one.exception()
                made = cable.connections
                cable.break_all()
                expected = made + len(waits)
                await asyncio.to_thread(wait_until, lambda: cable.connections >= expected, 60)  # noqa: B023
            for one in waits:
                assert not one.done(), one.exception()
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
    healthy.release(blocker)


@contextlib.asynccontextmanager
async def clients(address: str, number: int) -> AsyncIterator[list[holdoff.aio.Client]]:
    """Give clients, each with a connection of its own."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(holdoff.aio.Client(address)) for _ in range(number)]


async def until_queued(replica: Replica, token: str, number: int) -> None:
    """Wait until so many are in the queue."""
    is_long = lambda: replica.show_token(token).queue_length >= number  # noqa: E731
    await asyncio.to_thread(wait_until, is_long, 60)


# Proxies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_no_call_goes_through_a_proxy(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Neither of the clients, nor of `holdoff run`, nor of the probe: a proxy hears nothing.

    Fails when gRPC may take the proxy of the environment, which then reads the credential.
    """
    token = service.create_token(f"proxy-{variable.replace('_', '-')}", "0s")
    (tmp_path / "credential").write_text("0123456789ab.secret\n")
    (tmp_path / "credential").chmod(0o600)
    with Cable(service.address) as proxy:
        for one in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(one, raising=False)
        monkeypatch.setenv(variable, f"http://{proxy.address}")
        monkeypatch.setenv("HOLDOFF_CREDENTIAL_FILE", str(tmp_path / "credential"))
        with holdoff.Client(service.address) as client, client.acquire(token, ttl_seconds=30):
            client.get_token(token)
        async with (
            holdoff.aio.Client(service.address) as aio_client,
            await aio_client.acquire(token, ttl_seconds=30),
        ):
            await aio_client.get_token(token)
        environment = {**os.environ, **service.environment, variable: f"http://{proxy.address}"}
        ran = service.holdoff("run", "--token", token, "--", "true", env=environment)
        assert (ran.returncode, ran.stderr) == (0, "")
        probe = await asyncio.create_subprocess_exec(sys.executable, str(HEALTHY), service.address)
        assert await probe.wait() == 0
        assert (proxy.connections, proxy.received) == (0, b"")


# Addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["127.0.0.1", "http://127.0.0.1:50051", "dns:", "ipv6:::1"])
def test_what_is_no_endpoint_is_refused_at_once(service: Service, endpoint: str) -> None:
    """Exit code 64 with what to write, instead of a search without end.

    Fails when it is left to gRPC to find out.
    """
    run = service.holdoff("--endpoint", endpoint, "run", "--token", "apps/a/tokens/t", "--", "true")
    assert run.returncode == 64
    assert "write host:port" in run.stderr
    with pytest.raises(ValueError, match="write host:port"):
        holdoff.Client(endpoint)


def test_clients_start_at_different_addresses(healthy: Replica, store: str) -> None:
    """Of many clients some begin with each of two coordinators, which both serve.

    Fails when all begin with the first one.
    """
    with (
        Replica(f"unix://{store}") as second,
        Cable(healthy.address) as one,
        Cable(second.address) as other,
    ):
        for _ in range(20):
            with holdoff.Client(f"{one.address},{other.address}") as client:
                list(client.list_tokens())
        assert one.connections
        assert other.connections
