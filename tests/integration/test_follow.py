"""A held lease follows itself: what its coordinator says reaches its holder at once.

Both clients, against a coordinator that says what a test wants, behind a real gRPC server; and
against a real one.
"""

# ruff: noqa: D102, N802 - the methods of a servicer are named and described by the service

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest
from grpc_status import rpc_status

import holdoff
from holdoff import _held, errors
from holdoff._core import duration
from holdoff.v1 import budget_pb2, lease_pb2, lease_service_pb2, lease_service_pb2_grpc, policy_pb2
from holdoff_coordinator.failures import Failure
from tests.harness import Replica, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FINANCE = "apps/exact-nl/tokens/finance"
NAME = f"{FINANCE}/leases/7"
SCOPES = [("535193", "crm/Accounts"), ("535193", "")]
RUN = lease_service_pb2.HOLDER_INSTRUCTION_RUN
BE_QUIET = lease_service_pb2.HOLDER_INSTRUCTION_BE_QUIET
BROKEN = Failure("LEASE_BROKEN", "the lease was broken: enough", resource=NAME)
ENDED = Failure("LEASE_ENDED", "the lease was released", resource=NAME)
DRAINING = Failure("DRAINING", "shutting down", retry_after_seconds=0.01)
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


def room(left: int) -> lease_service_pb2.ScopeRoom:
    """How much room a scope has."""
    where = budget_pb2.Scope(division="535193", endpoint="crm/accounts")
    return lease_service_pb2.ScopeRoom(scope=where, room=left)


def notice(
    instruction: lease_service_pb2.HolderInstruction.ValueType, *rooms: lease_service_pb2.ScopeRoom
) -> lease_service_pb2.FollowLeaseResponse:
    """What a holder must do."""
    return lease_service_pb2.FollowLeaseResponse(instruction=instruction, rooms=rooms)


@dataclass
class Coordinator(lease_service_pb2_grpc.LeaseServiceServicer):
    """Gives a lease to whoever asks, and says to its follower what a test puts into `says`."""

    says: queue.SimpleQueue[lease_service_pb2.FollowLeaseResponse | Failure | grpc.StatusCode] = (
        field(default_factory=queue.SimpleQueue)
    )
    asked: list[lease_service_pb2.AcquireLeaseRequest] = field(default_factory=list)
    followed: list[lease_service_pb2.FollowLeaseRequest] = field(default_factory=list)
    following: int = 0
    """How many streams are open."""
    renewed: int = 0
    released: int = 0
    refuse_first: bool = False
    """Break the first conversation."""
    refuse_renewals: Failure | None = None

    def StreamAcquireLease(
        self,
        request_iterator: Iterator[lease_service_pb2.StreamAcquireLeaseRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[lease_service_pb2.StreamAcquireLeaseResponse]:
        self.asked.append(next(iter(request_iterator)).acquire)
        if self.refuse_first:
            self.refuse_first = False
            context.abort_with_status(rpc_status.to_status(DRAINING.to_status()))
        offer = lease_service_pb2.LeaseOffer(
            lease=lease_pb2.Lease(name=NAME, fencing_token=7),
            secret="s",
            accept_within=duration(3),
            policy=policy_pb2.Policy(name="exact-online"),
            rooms=[room(8)],
        )
        event = lease_service_pb2.AcquireLeaseResponse(offer=offer)
        yield lease_service_pb2.StreamAcquireLeaseResponse(event=event)

    def RenewLease(
        self, request: lease_service_pb2.RenewLeaseRequest, context: grpc.ServicerContext
    ) -> lease_service_pb2.RenewLeaseResponse:
        del request
        self.renewed += 1
        if self.refuse_renewals:
            context.abort_with_status(rpc_status.to_status(self.refuse_renewals.to_status()))
        return lease_service_pb2.RenewLeaseResponse()

    def ReleaseLease(
        self, request: lease_service_pb2.ReleaseLeaseRequest, context: grpc.ServicerContext
    ) -> lease_service_pb2.ReleaseLeaseResponse:
        del request, context
        self.released += 1
        return lease_service_pb2.ReleaseLeaseResponse()

    def FollowLease(
        self, request: lease_service_pb2.FollowLeaseRequest, context: grpc.ServicerContext
    ) -> Iterator[lease_service_pb2.FollowLeaseResponse]:
        self.followed.append(request)
        self.following += 1
        try:
            while context.is_active():
                with contextlib.suppress(queue.Empty):
                    said = self.says.get(timeout=0.02)
                    if isinstance(said, Failure):
                        context.abort_with_status(rpc_status.to_status(said.to_status()))
                    elif isinstance(said, grpc.StatusCode):
                        context.abort(said, "no")
                    yield said
        finally:
            self.following -= 1


@pytest.fixture
def coordinator() -> Coordinator:
    """A coordinator that says nothing yet."""
    return Coordinator()  # type: ignore[abstract] # nothing else is asked


@pytest.fixture
def endpoint(coordinator: Coordinator) -> Iterator[str]:
    """Where it listens."""
    server = grpc.server(ThreadPoolExecutor(8))
    lease_service_pb2_grpc.add_LeaseServiceServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


class Threads:
    """A synchronous client, and what is left of it."""

    def __init__(self, endpoint: str) -> None:
        self._client = holdoff.Client(endpoint)

    def acquire(self, token: str = FINANCE, **options: Any) -> Any:
        return self._client.acquire(token, **{"ttl_seconds": 120.0, **options})

    def left(self) -> int:
        """Count what runs for a lease."""
        names = [thread.name for thread in threading.enumerate()]
        return names.count("holdoff-renewal") + names.count("holdoff-following")

    def close(self) -> None:
        self._client.close()


class Loop:
    """A client for asyncio, whose loop runs in a thread, behind plain functions."""

    def __init__(self, endpoint: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client: holdoff.aio.Client = self._run(self._make(endpoint))

    @staticmethod
    async def _make(endpoint: str) -> holdoff.aio.Client:
        return holdoff.aio.Client(endpoint)

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def acquire(self, token: str = FINANCE, **options: Any) -> Any:
        acquiring = self._client.acquire(token, **{"ttl_seconds": 120.0, **options})
        return self.Lease(self, self._run(acquiring))

    class Lease:
        """A lease whose coroutines are plain functions."""

        def __init__(self, loop: Loop, lease: holdoff.aio.HeldLease) -> None:
            self._loop, self._lease = loop, lease

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None:
            self._loop._run(self._lease.__aexit__(*error))  # type: ignore[arg-type] # handed on

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._lease, name)
            if not asyncio.iscoroutinefunction(found):
                return found
            return lambda *args, **kwargs: self._loop._run(found(*args, **kwargs))

    def left(self) -> int:
        """Count what runs for a lease."""

        async def tasks() -> int:
            return len(asyncio.all_tasks()) - 1

        count: int = self._run(tasks())
        return count

    def close(self) -> None:
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


Client = Threads | Loop


@pytest.fixture(params=[Threads, Loop], ids=["threads", "asyncio"])
def client(endpoint: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of each kind; nothing may be left of it."""
    one = request.param(endpoint)
    before = one.left()
    try:
        yield one
        wait_until(lambda: one.left() <= before)
    finally:
        one.close()


def test_what_is_said_is_kept_and_passed_on(client: Client, coordinator: Coordinator) -> None:
    """The latest notice, and the rooms as last heard: those of the offer at first.

    Fails when a notice without rooms makes those forgotten that are known.
    """
    heard: list[lease_service_pb2.FollowLeaseResponse] = []
    with client.acquire(scopes=SCOPES, on_notice=heard.append) as lease:
        assert (lease.notice, lease.rooms) == (None, [room(8)])
        assert lease.policy.name == "exact-online"
        coordinator.says.put(notice(BE_QUIET, room(2)))
        wait_until(lambda: heard)
        assert (lease.notice, lease.rooms) == (notice(BE_QUIET, room(2)), [room(2)])
        coordinator.says.put(notice(RUN))
        wait_until(lambda: len(heard) == 2)
        assert (lease.notice, lease.rooms) == (notice(RUN), [room(2)])
    (followed,) = coordinator.followed
    assert followed == lease_service_pb2.FollowLeaseRequest(name=NAME, secret="s")


def test_scopes_are_asked_for_on_each_connection(client: Client, coordinator: Coordinator) -> None:
    """A request that is repeated is the same request."""
    coordinator.refuse_first = True
    client.acquire(scopes=SCOPES).release()
    first, second = coordinator.asked
    assert [(one.division, one.endpoint) for one in first.scopes] == SCOPES
    assert (first.scopes, first.request_id) == (second.scopes, second.request_id)


def test_a_break_is_told_at_once(client: Client, coordinator: Coordinator) -> None:
    """Long before the next renewal of a long lease: once, by callback and by exception.

    Fails when `_follow_on` does not give up the lease.
    """
    told: list[errors.LeaseLost] = []
    lease = client.acquire(on_lost=told.append)
    coordinator.says.put(BROKEN)
    wait_until(lambda: told)
    with pytest.raises(errors.LeaseBroken, match="enough"):
        lease.check()
    wait_until(lambda: client.left() == 0)  # nobody renews it either
    with pytest.raises(errors.LeaseBroken):
        lease.release()
    assert (len(told), coordinator.renewed, coordinator.released) == (1, 1, 1)


@pytest.mark.parametrize("_", range(5))
def test_two_ways_of_losing_tell_once(client: Client, coordinator: Coordinator, _: int) -> None:
    """The stream and the renewal say so at the same time.

    Fails when `_lose` does not look whether the lease is lost already.
    """
    told: list[errors.LeaseLost] = []
    lease = client.acquire(on_lost=told.append)
    wait_until(lambda: coordinator.following == 1)
    coordinator.refuse_renewals = BROKEN
    coordinator.says.put(BROKEN)
    lease.command_started()  # a renewal is due now
    wait_until(lambda: told)
    with pytest.raises(errors.LeaseBroken):
        lease.release()
    assert len(told) == 1


def test_a_release_of_our_own_is_no_loss(client: Client, coordinator: Coordinator) -> None:
    """The stream is ended at once, before the release; that the lease ends is no news then.

    Fails when `_stop` does not end the stream: the join, or the task, is never over.
    """
    told: list[errors.LeaseLost] = []
    lease = client.acquire(on_lost=told.append)
    wait_until(lambda: coordinator.following == 1)
    lease.release()
    assert client.left() == 0
    wait_until(lambda: coordinator.following == 0)
    coordinator.says.put(ENDED)
    assert (told, coordinator.released, len(coordinator.followed)) == ([], 1, 1)


def test_a_mute_coordinator_does_not_hold_up_a_release(client: Client) -> None:
    """It took the request to follow, and says nothing."""
    lease = client.acquire()
    lease.release()  # Fails, by never ending, when it waits for a word.
    assert lease.notice is None


def test_following_goes_on_at_another_connection(client: Client, coordinator: Coordinator) -> None:
    """While a coordinator restarts, nothing is lost, and its word is heard again.

    Fails when an Unavailable ends the following.
    """
    told: list[errors.LeaseLost] = []
    with client.acquire(on_lost=told.append) as lease:
        coordinator.says.put(DRAINING)
        coordinator.says.put(grpc.StatusCode.UNAVAILABLE)
        coordinator.says.put(notice(RUN))
        wait_until(lambda: lease.notice)
        lease.check()
    assert (told, len(coordinator.followed)) == ([], 3)


def test_an_older_coordinator_is_not_followed(client: Client, coordinator: Coordinator) -> None:
    """It does not know how: the lease is kept and renewed all the same, and it is asked once.

    Fails when UNIMPLEMENTED is taken for a loss, or asked again.
    """
    told: list[errors.LeaseLost] = []
    with client.acquire(on_lost=told.append, ttl_seconds=3) as lease:
        coordinator.says.put(UNIMPLEMENTED)
        before = coordinator.renewed
        wait_until(lambda: coordinator.renewed > before + 1)
        lease.check()
        assert lease.wait_while_quiet(0)
    assert (told, len(coordinator.followed)) == ([], 1)


@pytest.fixture
def long_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep until woken: otherwise one who waits looks every second anyway."""
    monkeypatch.setattr(_held, "LONGEST_SLEEP_SECONDS", 60.0)


@pytest.mark.usefixtures("long_sleeps")
def test_a_job_waits_while_it_must_be_quiet(client: Client, coordinator: Coordinator) -> None:
    """At once where nothing is known or nothing stands in the way, else when it may go on.

    Fails when a notice does not wake who waits.
    """
    with client.acquire() as lease:
        assert lease.wait_while_quiet()
        coordinator.says.put(notice(BE_QUIET))
        wait_until(lambda: lease.notice)
        assert not lease.wait_while_quiet(0)
        assert not lease.wait_while_quiet(0.05)
        waiting = start(lease.wait_while_quiet)
        coordinator.says.put(notice(RUN))
        assert waiting() is True
        assert lease.wait_while_quiet(0)


@pytest.mark.usefixtures("long_sleeps")
def test_a_job_that_waits_hears_of_a_loss(client: Client, coordinator: Coordinator) -> None:
    """A lost lease, or one that is given back by somebody else, ends the wait.

    Fails when a loss, or a release, does not wake who waits.
    """
    lease = client.acquire()
    coordinator.says.put(notice(BE_QUIET))
    wait_until(lambda: lease.notice)
    waiting = start(lease.wait_while_quiet)
    coordinator.says.put(BROKEN)
    with pytest.raises(errors.LeaseBroken):
        waiting()
    with pytest.raises(errors.LeaseBroken):
        lease.release()

    lease = client.acquire()
    coordinator.says.put(notice(BE_QUIET))
    wait_until(lambda: lease.notice)
    waiting = start(lease.wait_while_quiet)
    lease.release()
    with pytest.raises(errors.LeaseEnded):
        waiting()


def test_a_callback_that_raises_is_called_again(
    client: Client, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs neither the lease nor the following; the log has it."""
    heard: list[lease_service_pb2.FollowLeaseResponse] = []

    def refuse(said: lease_service_pb2.FollowLeaseResponse) -> None:
        heard.append(said)
        raise ZeroDivisionError

    with client.acquire(on_notice=refuse) as lease:
        coordinator.says.put(notice(BE_QUIET))
        coordinator.says.put(notice(RUN))
        wait_until(lambda: len(heard) == 2)
        lease.check()
    assert "ZeroDivisionError" in caplog.text


def start(function: Callable[[], bool]) -> Callable[[], bool]:
    """Call a function that waits, in a thread; return how to get its result, or what it raised."""
    future: Future[bool] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except errors.HoldoffError as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return lambda: future.result(20)


# Against a real coordinator


@pytest.fixture(params=[Threads, Loop], ids=["threads", "asyncio"])
def real(replica: Replica, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of each kind of a real coordinator."""
    one = request.param(replica.address)
    yield one
    one.close()


def test_a_real_break_is_pushed(real: Client, replica: Replica) -> None:
    """Promise 5, by push: the holder of a long lease knows within seconds."""
    told: list[errors.LeaseLost] = []
    lease = real.acquire(replica.create_token(), on_lost=told.append)
    with holdoff.Client(replica.address) as operator:
        operator.break_lease(lease.name, "enough")
    wait_until(lambda: told)
    with pytest.raises(errors.LeaseBroken, match="enough"):
        lease.release()


def test_a_real_back_off_is_pushed(real: Client, replica: Replica) -> None:
    """Promise 7: a holder is quiet soon after an operator wished it, and goes on when it ends."""
    token = replica.create_token(0)
    with real.acquire(token) as lease, holdoff.Client(replica.address) as operator:
        wait_until(lambda: lease.notice)
        assert lease.wait_while_quiet(0)
        back_off = operator.set_back_off(token, 60, "quiet please")
        assert back_off.caused_by.user
        wait_until(lambda: lease.notice.instruction == BE_QUIET)
        assert [one.name for one in lease.notice.back_offs] == [back_off.name]
        assert [one.name for one in operator.list_back_offs(token.partition("/tokens/")[0])] == [
            back_off.name
        ]
        assert operator.explain(token).must_wait
        operator.clear_back_off(back_off.name, "that will do")
        assert lease.wait_while_quiet(20)
