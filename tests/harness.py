"""Real coordinators for tests, and a waiter that speaks the raw API."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import queue
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import grpc
import pytest
import structlog
from click.testing import CliRunner

from holdoff._core import duration
from holdoff._status import from_rpc_error
from holdoff.testing import CoordinatorThread
from holdoff.v1 import (
    admin_service_pb2_grpc,
    budget_pb2,
    budget_service_pb2_grpc,
    custody_service_pb2_grpc,
    lease_pb2,
    lease_service_pb2,
    lease_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
)
from holdoff_coordinator import cli, hub
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import redis
    from click.testing import Result

    from holdoff.v1 import token_pb2

NO_PROXY = [("grpc.enable_http_proxy", 0)]
"""For channels of tests: a proxy that the environment names cannot reach what runs here."""
LONG = os.environ.get("HOLDOFF_TEST_LENGTH") == "long"
"""Whether tests that have a short and a long form take the long one."""


only_long = pytest.mark.skipif(not LONG, reason="only in the long tests")


def at_length(*cases: Any) -> tuple[Any, ...]:
    """Give those cases of a parametrized test that only the long tests need."""
    return cases if LONG else ()


SILENT_SECONDS = 6
"""A waiter that was not heard for so long is passed over."""

_numbers = itertools.count()


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return the condition's first true value; fail the test when there is none in time."""
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, f"never true: {condition}"
        time.sleep(0.01)
    return value


class Replica(CoordinatorThread):
    """A coordinator in a thread of its own, and the stubs to speak with it.

    By default its port is one that stays free while it is stopped, so that it can be started again.
    """

    def __init__(self, store_url: str, **options: Any) -> None:
        super().__init__(store_url, **{"listen": f"127.0.0.1:{free_port()}", **options})

    def __enter__(self) -> Self:
        super().__enter__()
        self.channel = grpc.insecure_channel(self.address, NO_PROXY)
        self.leases = lease_service_pb2_grpc.LeaseServiceStub(self.channel)
        self.tokens = token_service_pb2_grpc.TokenServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self.custody = custody_service_pb2_grpc.CustodyServiceStub(self.channel)
        self.budgets = budget_service_pb2_grpc.BudgetServiceStub(self.channel)
        return self

    def stop(self) -> None:
        """Drain and stop; a second time does nothing."""
        super().stop()
        self.channel.close()

    def create_token(
        self, interval_seconds: float | None = 0.4, *, name: str = "", **fields: Any
    ) -> str:
        """Create a token, by default of an app of its own, and return its name."""
        name = name or f"apps/{uuid.uuid4().hex[:12]}-{next(_numbers)}/tokens/t"
        refresh_at = fields.pop("refresh_at", 0)
        request = token_to_create(name, interval_seconds, **fields)
        request.token.refresh_at = refresh_at
        self.tokens.CreateToken(request)
        return name

    def acquire(self, token: str, **options: Any) -> lease_service_pb2.AcquireLeaseResponse:
        """Ask once; by default without waiting."""
        return self.leases.AcquireLease(ask(token, **{"wait": 0.0, **options}))

    def show(self, name: str) -> lease_pb2.Lease:
        """Read one lease."""
        return self.leases.GetLease(lease_service_pb2.GetLeaseRequest(name=name)).lease

    def show_token(self, name: str) -> token_pb2.Token:
        """Read one token."""
        return self.tokens.GetToken(token_service_pb2.GetTokenRequest(name=name)).token

    def hold(self, token: str, **options: Any) -> lease_service_pb2.LeaseOffer:
        """Acquire at once and accept."""
        event = self.acquire(token, **options)
        assert event.HasField("offer"), event
        self.renew(event.offer)
        return event.offer

    def renew(self, offer: lease_service_pb2.LeaseOffer, **fields: Any) -> lease_pb2.Lease:
        """Accept or prolong."""
        request = lease_service_pb2.RenewLeaseRequest(
            name=offer.lease.name, secret=offer.secret, **fields
        )
        return self.leases.RenewLease(request).lease

    def release(
        self, offer: lease_service_pb2.LeaseOffer, **fields: Any
    ) -> lease_service_pb2.ReleaseLeaseResponse:
        """End."""
        return self.leases.ReleaseLease(
            lease_service_pb2.ReleaseLeaseRequest(
                name=offer.lease.name, secret=offer.secret, **fields
            )
        )


def token_to_create(
    name: str, interval_seconds: float | None, **fields: Any
) -> token_service_pb2.CreateTokenRequest:
    """Build a request for a new token."""
    request = token_service_pb2.CreateTokenRequest(**fields)
    request.token.name = name
    if interval_seconds is not None:
        request.token.refresh_interval.CopyFrom(duration(interval_seconds))
    return request


def ask(  # noqa: PLR0913 - the fields of the request
    token: str,
    *,
    wait: float | None = None,
    ttl: float = 30.0,
    request_id: str | None = None,
    job: str = "",
    last_fencing_token: int = 0,
    scopes: Sequence[tuple[str, str]] = (),
    mode: lease_pb2.LeaseMode.ValueType = lease_pb2.LEASE_MODE_UNSPECIFIED,
) -> lease_service_pb2.AcquireLeaseRequest:
    """Build a request for a lease."""
    request = lease_service_pb2.AcquireLeaseRequest(
        token=token,
        request_id=request_id or str(uuid.uuid4()),
        ttl=duration(ttl),
        wait=None if wait is None else duration(wait),
        last_fencing_token=last_fencing_token,
        mode=mode,
        scopes=[
            budget_pb2.Scope(division=division, endpoint=endpoint) for division, endpoint in scopes
        ],
    )
    request.holder.job = job
    return request


def coordinator_command(*arguments: str, **variables: str) -> Result:
    """Run a command of `holdoff-coordinator` in this process, with these variables of its own."""
    ours = {name: None for name in os.environ if name.startswith("HOLDOFF_")}
    logs = structlog.get_config() if structlog.is_configured() else None
    try:
        return CliRunner(env={**ours, **variables}).invoke(cli.main, arguments)
    finally:
        structlog.reset_defaults()
        if logs:
            structlog.configure(**logs)


def request_hash(request: lease_service_pb2.AcquireLeaseRequest) -> str:
    """Return how the store names a request."""
    return hashlib.sha256(request.request_id.encode()).hexdigest()


def wake(store: redis.Redis, request: lease_service_pb2.AcquireLeaseRequest) -> None:
    """Wake the conversations of a request, as the store's scripts do."""
    app = request.token.split("/")[1]
    store.spublish(f"holdoff:{{{app}}}:wake", request_hash(request))


def lease_key(name: str) -> str:
    """Return the key of a lease's record."""
    _, app, _, token, _, lease = name.split("/")
    return f"holdoff:{{{app}}}:lease:{token}:{lease}"


def run_out(store: redis.Redis, offer: lease_service_pb2.LeaseOffer) -> int:
    """Let a lease, or an offer that was not accepted, have run out a second ago; return when (µs).

    Its record says so: whoever looks next settles it.
    """
    seconds, microseconds = store.time()
    ended_us: int = seconds * 1_000_000 + microseconds - 1_000_000
    store.hset(lease_key(offer.lease.name), "expires_us", str(ended_us))
    return ended_us


def end_cooldown(store: redis.Redis, token: str) -> None:
    """Let the cooldown of a token have been over for a second."""
    _, app, _, token_id = token.split("/")
    seconds, microseconds = store.time()
    now_us = seconds * 1_000_000 + microseconds
    store.hset(f"holdoff:{{{app}}}:token:{token_id}", "not_before_us", str(now_us - 1_000_000))


def let_pass(store: redis.Redis, token: str, seconds: float) -> None:
    """Make what was counted or reserved for a token's app so much older."""
    shard = f"holdoff:{{{token.split('/')[1]}}}"
    past_us = round(seconds * 1e6)
    entry: Any
    for entry in store.zrange(f"{shard}:reservations", 0, -1):
        store.hincrby(f"{shard}:reservation:{entry.decode()}", "expires_us", -past_us)
    keys = [f"{shard}:reservations", f"{shard}:budgets"]
    for key in (*keys, *store.scan_iter(f"{shard}:log:*", count=1000)):
        for entry in store.zrange(key, 0, -1):
            store.zincrby(key, -past_us, entry)


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """Return the reason with which a call is refused."""
    try:
        call(*arguments)
    except grpc.RpcError as error:
        return from_rpc_error(error, "test").reason
    raise AssertionError("the call was not refused")


def attempt(call: Callable[[], Any]) -> Any:
    """Return what a call answers; None if it is refused."""
    try:
        return call()
    except grpc.RpcError:
        return None


class Waiter:
    """A stream that waits for a lease, with heartbeats that a test can stop."""

    def __init__(
        self,
        replica: Replica,
        request: lease_service_pb2.AcquireLeaseRequest,
        *,
        silent: bool = False,
    ) -> None:
        self.request = request
        self.silent = silent
        self.events: list[lease_service_pb2.AcquireLeaseResponse] = []
        self.ended: grpc.RpcError | str | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(acquire=request))
        self._stream = replica.leases.StreamAcquireLease(self._requests())
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _requests(self) -> Iterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        heartbeat = lease_service_pb2.StreamAcquireLeaseRequest(
            heartbeat=lease_service_pb2.Heartbeat()
        )
        while True:
            try:
                message = self._outbox.get(timeout=0.5)
            except queue.Empty:
                if self.silent:
                    continue
                message = heartbeat
            if message is None:
                return
            yield message

    def _listen(self) -> None:
        try:
            for response in self._stream:
                self.events.append(response.event)
            self.ended = "by the coordinator"
        except grpc.RpcError as error:
            self.ended = error

    @property
    def last(self) -> lease_service_pb2.AcquireLeaseResponse | None:
        """The latest event."""
        return self.events[-1] if self.events else None

    def waiting(self, seconds: float = 5.0) -> lease_pb2.WaitStatus:
        """Return the first status."""
        wait_until(lambda: self.events, seconds)
        assert self.events[0].HasField("waiting"), self.events[0]
        return self.events[0].waiting

    def offer(self, seconds: float = 10.0) -> lease_service_pb2.LeaseOffer:
        """Return the latest offer once there is one."""
        wait_until(lambda: self.last is not None and self.last.HasField("offer"), seconds)
        assert self.last is not None
        return self.last.offer

    def is_cooling(self) -> bool:
        """Tell whether the latest status says that the token cools down."""
        cooling = lease_pb2.WAIT_REASON_COOLING
        return self.last is not None and self.last.waiting.reason == cooling

    def withdraw(self) -> None:
        """Give up the place."""
        self._outbox.put(
            lease_service_pb2.StreamAcquireLeaseRequest(withdraw=lease_service_pb2.Withdrawal())
        )

    def vanish(self) -> None:
        """Break the stream without a word."""
        self._stream.cancel()
        self.close()

    def close(self) -> None:
        """Let go of the stream."""
        self._outbox.put(None)
        with contextlib.suppress(RuntimeError):
            self._thread.join(timeout=5)


def silent_waiter(replica: Replica, request: lease_service_pb2.AcquireLeaseRequest) -> Waiter:
    """Start a waiter whose replica heard it for the last time six seconds ago."""
    with mock.patch.object(hub.Waiter, "heard_age_us", SILENT_SECONDS * 1_000_000):
        waiter = Waiter(replica, request, silent=True)
        waiter.waiting()
        for conversation in replica.coordinator.hub._waiters[request_hash(request)]:
            conversation._heard -= SILENT_SECONDS
    return waiter


class Follower:
    """A holder that follows its lease, and notes when it was told what."""

    def __init__(self, replica: Replica, offer: lease_service_pb2.LeaseOffer) -> None:
        self.offer = offer
        self.told: list[tuple[float, lease_service_pb2.FollowLeaseResponse]] = []
        self.ended: grpc.RpcError | None = None
        request = lease_service_pb2.FollowLeaseRequest(name=offer.lease.name, secret=offer.secret)
        self._stream = replica.leases.FollowLease(request)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        wait_until(lambda: self.told or self.ended)

    def _listen(self) -> None:
        try:
            for response in self._stream:
                self.told.append((time.monotonic(), response))
        except grpc.RpcError as error:
            self.ended = error

    @property
    def last(self) -> lease_service_pb2.FollowLeaseResponse:
        """The latest instruction."""
        return self.told[-1][1]

    @property
    def runs(self) -> bool:
        """Whether the holder may go on."""
        return self.last.instruction == lease_service_pb2.HOLDER_INSTRUCTION_RUN

    def went_on_at(self, after: float) -> float | None:
        """When it was first told to go on, after an instant of the monotonic clock."""
        run = lease_service_pb2.HOLDER_INSTRUCTION_RUN
        return next((at for at, one in self.told if at > after and one.instruction == run), None)

    def close(self) -> None:
        """Stop following."""
        self._stream.cancel()
        self._thread.join(timeout=5)
