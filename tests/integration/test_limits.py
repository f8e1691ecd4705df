"""No caller stops another: each attack is counted in calls of the store, or in refusals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis

import holdoff
from holdoff._core import duration
from holdoff._status import from_rpc_error
from holdoff.errors import LimitReached
from holdoff.v1 import (
    budget_pb2,
    budget_service_pb2,
    lease_service_pb2,
)
from holdoff_coordinator import limits, looks, server
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.gate import AccessFile
from holdoff_coordinator.scripts import shard_key
from holdoff_coordinator.store import connect
from tests.harness import Replica, Waiter, ask, refusal, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.conftest import Server, StartValkey

Metadata = tuple[tuple[str, str], ...]
WATCH = lease_service_pb2.WatchLeasesRequest


@pytest.fixture(autouse=True)
def _refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PAUSE_SECONDS", 0.0)


class Guarded:
    """A coordinator that knows its callers: a holder of app A, and one of app B."""

    def __init__(self, replica: Replica, apps: Sequence[str], headers: Sequence[Metadata]) -> None:
        self.replica = replica
        self.app_a, self.app_b = apps
        self.a, self.b = headers

    def hold(self, app: str, headers: Metadata) -> lease_service_pb2.RenewLeaseRequest:
        """Take a lease; return what renews it."""
        request = ask(f"apps/{app}/tokens/t", wait=0.0)
        offer = self.replica.leases.AcquireLease(request, metadata=headers).offer
        renewal = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
        self.replica.leases.RenewLease(renewal, metadata=headers)
        return renewal

    def run(self, work: Any) -> Any:
        """Do something in the event loop of the coordinator."""

        async def call() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.replica._loop).result(30)


def issued(url: str, identity: str) -> Metadata:
    """Issue a credential; return the header that carries it."""

    async def issue() -> str:
        client = connect(url)
        try:
            return (await Credentials(client).issue(identity, 600, "test"))[1]
        finally:
            await client.aclose()

    return (("authorization", f"Bearer {asyncio.run(issue())}"),)


@pytest.fixture
def guarded(valkey: Server, replica: Replica, tmp_path: Path) -> Iterator[Guarded]:
    """Give a coordinator with two callers, each with a role on an app of its own."""
    apps = [replica.create_token().split("/")[1] for _ in range(2)]
    names = [f"{app}-holder" for app in apps]
    access = tmp_path / "access.toml"
    access.write_text(
        "".join(
            f'[[grants]]\nidentities = ["credential:{name}"]\nrole = "holder"\n'
            f'resources = ["apps/{app}"]\n'
            for name, app in zip(names, apps, strict=True)
        ),
        encoding="utf-8",
    )
    headers = [issued(valkey.url, name) for name in names]
    few = {"watches": 3, "calls": 4}
    with Replica(valkey.url, access=AccessFile(access), limits=few) as one:
        yield Guarded(one, apps, headers)


def open_watch(stub: Any, request: Any, headers: Metadata = ()) -> Any:
    """Open a watch, and wait until it has begun."""
    stream = stub(request, metadata=headers)
    next(stream)
    return stream


def reason(call: Any) -> LimitReached:
    """Return the refusal that a call ends with."""
    try:
        list(call)
    except grpc.RpcError as error:
        found = from_rpc_error(error, "test")
        assert isinstance(found, LimitReached), found
        return found
    raise AssertionError("it was not refused")


def test_watches_of_a_viewer_are_limited(guarded: Guarded) -> None:
    """The fourth watch is refused in words; another caller, and a renewal, notice nothing.

    Fails when watches are not counted, are counted for all callers together, or for ever.
    """
    renewal = guarded.hold(guarded.app_b, guarded.b)
    leases, budgets = guarded.replica.leases, guarded.replica.budgets
    watches = [open_watch(leases.WatchLeases, WATCH(), guarded.a) for _ in range(2)]
    request = budget_service_pb2.WatchBudgetsRequest()
    watches.append(open_watch(budgets.WatchBudgets, request, guarded.a))
    refused = reason(leases.WatchLeases(WATCH(), metadata=guarded.a))
    assert refused.metadata["limit"] == "watches"
    assert refused.metadata["value"] == "3"
    assert refused.metadata["caller"] == f"credential:{guarded.app_a}-holder"
    assert refused.retry_after_seconds
    open_watch(leases.WatchLeases, WATCH(), guarded.b).cancel()
    leases.RenewLease(renewal, metadata=guarded.b)
    watches[0].cancel()
    wait_until(lambda: guarded.replica.coordinator.limits.most_used("watches") <= 2)
    open_watch(leases.WatchLeases, WATCH(), guarded.a).cancel()
    for watch in watches:
        watch.cancel()


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> list[looks.Looks]:
    """Give the `Looks` of coordinators that start in the test, which look often."""
    made: list[looks.Looks] = []

    def make(*args: Any) -> looks.Looks:
        made.append(looks.Looks(*args))
        return made[-1]

    monkeypatch.setattr(looks, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(server, "Looks", make)
    return made


def test_watchers_share_one_look(
    looking: list[looks.Looks], valkey: Server, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty watchers cost the store one look and one reading of a change, and nothing afterwards.

    Fails when each watcher looks, or reads, by itself.
    """
    token = replica.create_token(0.0)
    app = token.rpartition("/tokens/")[0]
    with Replica(valkey.url) as own:
        scripts, [looks_] = own.coordinator.scripts, looking
        most, read = [0], list[int]()
        stands, changes = scripts.stands, scripts.changes

        async def look(apps: Any) -> Any:
            most.append(len(looks_._watchers))
            return await stands(apps)

        async def read_changes(name: str, after: int) -> Any:
            read.append(after)
            return await changes(name, after)

        monkeypatch.setattr(scripts, "stands", look)
        monkeypatch.setattr(scripts, "changes", read_changes)
        streams = [open_watch(own.leases.WatchLeases, WATCH(parent=app)) for _ in range(40)]
        wait_until(lambda: most[-3:] == [40] * 3)  # that many looks, by all of them together
        replica.hold(token)
        assert all(next(stream).HasField("change") for stream in streams)
        assert len(read) == len(set(read))
        for stream in streams:
            stream.cancel()
        wait_until(lambda: looks_._looking is None)


def test_a_watcher_costs_only_what_it_may_see(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch of everything reads no app that its caller has no role on.

    Fails when apps are filtered after they were read.
    """
    scripts, read = guarded.replica.coordinator.scripts, set[str]()
    run = scripts.run

    async def counted(name: str, app: str, *args: Any, **options: Any) -> Any:
        if name in ("read", "read_back_offs", "read_budgets"):
            read.add(app)
        return await run(name, app, *args, **options)

    monkeypatch.setattr(scripts, "run", counted)
    for app, headers in ((guarded.app_a, guarded.a), (guarded.app_b, guarded.b)):
        read.clear()
        stream = open_watch(guarded.replica.leases.WatchLeases, WATCH(), headers)
        request = budget_service_pb2.WatchBudgetsRequest()
        budgets = open_watch(guarded.replica.budgets.WatchBudgets, request, headers)
        assert read == {app}
        stream.cancel()
        budgets.cancel()


def test_announcements_that_come_together_are_followed_together(start_valkey: StartValkey) -> None:
    """A thousand of one app, as a reporter can cause, cost a few looks at its waiters.

    Fails when each of them is followed for itself: other wake-ups come after all of that.
    """
    valkey = start_valkey()
    with Replica(valkey.url) as replica, redis.Redis.from_url(valkey.url) as store:
        token = replica.create_token(0)
        replica.hold(token)
        waiter = Waiter(replica, ask(token))
        waiter.waiting()
        before = scripts_run(store)
        with store.pipeline(transaction=False) as pipeline:
            for _ in range(1000):
                pipeline.execute_command("SPUBLISH", f"{shard_key(token.split('/')[1])}:wake", "*")
            pipeline.execute()
        wait_until(lambda: is_calm(store))
        assert scripts_run(store) - before < 300
        waiter.vanish()


def is_calm(store: redis.Redis) -> bool:
    """Whether a store runs no more scripts than while nothing happens, some three a second."""
    before = scripts_run(store)
    time.sleep(0.3)
    return scripts_run(store) - before < 10


def scripts_run(store: redis.Redis) -> int:
    """How many scripts a store has run."""
    calls: int = store.info("commandstats")["cmdstat_evalsha"]["calls"]
    return calls


def test_slow_lists_delay_no_other_call(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one caller's lists hang, it renews, others list, and its fifth list is refused.

    Fails when lists of one caller take all turns, or a renewal waits behind them.
    """
    scripts = guarded.replica.coordinator.scripts
    run, release = scripts.run, guarded.run(asyncio.Event)
    begun = list[str]()

    async def slow(name: str, app: str, *args: Any, **options: Any) -> Any:
        if app == guarded.app_a and name == "read_back_offs":
            begun.append(app)
            await release.wait()
        return await run(name, app, *args, **options)

    renewals = {app: guarded.hold(app, to) for app, to in guarded_pairs(guarded)}
    monkeypatch.setattr(scripts, "run", slow)
    stub = guarded.replica.budgets
    request = budget_service_pb2.ListBackOffsRequest(parent=f"apps/{guarded.app_a}")
    hanging = [stub.ListBackOffs.future(request, metadata=guarded.a) for _ in range(4)]
    limits_ = guarded.replica.coordinator.limits
    wait_until(lambda: limits_.most_used("calls") == 4 and begun)
    with pytest.raises(grpc.RpcError) as refused:
        stub.ListBackOffs(request, metadata=guarded.a)
    assert from_rpc_error(refused.value, "test").metadata["limit"] == "calls"
    for app, headers in guarded_pairs(guarded):
        guarded.replica.leases.RenewLease(renewals[app], metadata=headers, timeout=30)
    other = budget_service_pb2.ListBackOffsRequest(parent=f"apps/{guarded.app_b}")
    stub.ListBackOffs(other, metadata=guarded.b, timeout=30)
    assert len(begun) == 1
    guarded.run(release.set)
    for call in hanging:
        call.result(30)


def guarded_pairs(guarded: Guarded) -> list[tuple[str, Metadata]]:
    """Return each app with the headers of its holder."""
    return [(guarded.app_a, guarded.a), (guarded.app_b, guarded.b)]


def test_scopes_of_all_waiters_are_limited(valkey: Server, replica: Replica) -> None:
    """What all waiters of a token declare is bounded, since each poll of its queue reads that.

    Fails when only the scopes of one request are counted.
    """
    token = replica.create_token(0.0)
    replica.hold(token)
    scopes = [("535193", f"crm/E{number}") for number in range(10)]
    with Replica(valkey.url, limits={"scope-bytes": 600}) as own, contextlib.ExitStack() as ended:
        for _ in range(2):
            waiter = Waiter(own, ask(token, scopes=scopes))
            ended.callback(waiter.close)
            ended.callback(waiter.withdraw)
            waiter.waiting()
        assert refusal(lambda: own.acquire(token, wait=None, scopes=scopes)) == "LIMIT_REACHED"
        assert own.acquire(token, wait=None).HasField("waiting")
        assert refusal(lambda: own.acquire(token, scopes=scopes)) == "LEASE_HELD"


def test_reservations_of_a_caller_are_limited(valkey: Server, replica: Replica) -> None:
    """A reservation beyond the limit waits until one is committed or cancelled.

    Fails when reservations that are over still count, or callers are counted together.
    """
    token = replica.create_token(0.0)

    def request() -> budget_service_pb2.ReserveRequest:
        return budget_service_pb2.ReserveRequest(
            reservation_id=str(uuid.uuid4()),
            scope=budget_pb2.Scope(token=token, endpoint="crm/Accounts"),
            kind=budget_pb2.EVENT_KIND_CALL,
            ttl=duration(60),
        )

    with Replica(valkey.url, limits={"reservations": 2}) as own:
        first, second = request(), request()
        own.budgets.Reserve(first)
        own.budgets.Reserve(second)
        own.budgets.Reserve(second)  # again is no other one
        assert refusal(own.budgets.Reserve, request()) == "LIMIT_REACHED"
        app = token.rpartition("/tokens/")[0]
        own.budgets.Cancel(
            budget_service_pb2.CancelRequest(app=app, reservation_id=first.reservation_id)
        )
        own.budgets.Reserve(request())
        own.budgets.Commit(
            budget_service_pb2.CommitRequest(app=app, reservation_id=second.reservation_id)
        )
        own.budgets.Reserve(request())
        assert refusal(own.budgets.Reserve, request()) == "LIMIT_REACHED"


def test_a_connection_that_says_nothing_is_closed(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that never speak gRPC end by themselves, and those in use go on.

    Fails when gRPC's own limit of two minutes applies.
    """
    options = dict(server._OPTIONS) | {"grpc.server_handshake_timeout_ms": 200}
    assert dict(server._OPTIONS)["grpc.server_handshake_timeout_ms"] <= 10_000
    monkeypatch.setattr(server, "_OPTIONS", tuple(options.items()))
    with Replica(valkey.url) as own, contextlib.ExitStack() as stack:
        host, _, port = own.address.rpartition(":")
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)), 30)) for _ in range(50)
        ]
        for one in silent:
            while one.recv(4096):
                pass
        own.create_token()


def test_connections_are_limited(valkey: Server) -> None:
    """One connection too many is closed; those that are there are served.

    Fails when a caller can take all file descriptors of the coordinator.
    """
    with Replica(valkey.url, limits={"connections": 5}) as own, contextlib.ExitStack() as stack:
        own.create_token()
        host, _, port = own.address.rpartition(":")
        ended = 0
        for _ in range(10):
            one = stack.enter_context(socket.create_connection((host, int(port)), 30))
            with contextlib.suppress(ConnectionError):
                ended += not one.recv(1)
        assert ended == 6
        own.create_token()


def test_a_wait_without_limit_outlasts_a_refusal(valkey: Server, replica: Replica) -> None:
    """`acquire` retries after the pause that a refusal names, until it gets its lease.

    Fails when the client takes the refusal for final.
    """
    token = replica.create_token(0.0)
    offer = replica.hold(token)
    with Replica(valkey.url, limits={"waits": 1}) as own, holdoff.Client(own.address) as client:
        first = Waiter(own, ask(token))
        first.waiting()
        told = list[str]()

        def acquire() -> bool:
            with client.acquire(token, on_unreachable=lambda one: told.append(one.reason)):
                return True

        with ThreadPoolExecutor(1) as pool:
            acquired = pool.submit(acquire)
            wait_until(lambda: told)
            first.withdraw()
            replica.release(offer)
            assert acquired.result(60)
        assert set(told) == {"LIMIT_REACHED"}
        first.close()


def test_the_glass_is_not_broken_by_a_limit(
    valkey: Server, replica: Replica, tmp_path: Path
) -> None:
    """--if-unreachable run is for a coordinator that is away: one that refuses is there.

    Fails when a limit makes a command run without a lease.
    """
    token = replica.create_token(0.0)
    replica.hold(token)
    ran = tmp_path / "ran"
    program = str(Path(sys.executable).with_name("holdoff"))
    options = ("--token", token, "--no-wait", "--if-unreachable", "run", "--", "touch", str(ran))
    with Replica(valkey.url, limits={"waits": 1}) as own:
        first = Waiter(own, ask(token))
        first.waiting()
        refused = subprocess.run(
            [program, "run", *options],
            env={**os.environ, "HOLDOFF_ENDPOINT": own.address, "XDG_STATE_HOME": str(tmp_path)},
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert refused.returncode == 75
        assert "1 waits for a lease at a time" in refused.stderr
        assert not ran.exists()
        first.vanish()


def test_a_watch_says_once_that_a_limit_is_reached(valkey: Server, replica: Replica) -> None:
    """`holdoff watch` says it in one line, retries, and shows what there is when it may.

    Fails when it ends, or says so at each attempt.
    """
    app = replica.create_token(0.0).rpartition("/tokens/")[0]
    program = str(Path(sys.executable).with_name("holdoff"))
    with Replica(valkey.url, limits={"watches": 1}) as own:
        watch = open_watch(own.leases.WatchLeases, WATCH(parent=app))
        refused = list[str]()
        own.coordinator.limits.on_refusal = refused.append
        with subprocess.Popen(
            [program, "watch", app, "--output", "json"],
            env={**os.environ, "HOLDOFF_ENDPOINT": own.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as command:
            wait_until(lambda: len(refused) >= 2)
            watch.cancel()
            assert command.stdout
            assert command.stderr
            assert f'"{app}/tokens/t"' in command.stdout.readline()
            command.terminate()
            [said] = command.stderr.readlines()
            assert "1 open watches: end one, or share one" in said
            assert said.endswith("; retrying\n")


def test_a_stream_that_asks_nothing_is_ended(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream without a first message is of no caller that could be counted, and ends soon."""
    from holdoff_coordinator import service  # noqa: PLC0415

    monkeypatch.setattr(service, "FIRST_SECONDS", 0.1)
    never = threading.Event()

    def silent() -> Iterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        never.wait()
        yield lease_service_pb2.StreamAcquireLeaseRequest()

    with pytest.raises(grpc.RpcError) as error:
        next(replica.leases.StreamAcquireLease(silent()))
    assert from_rpc_error(error.value, "test").reason == "WAITER_SILENT"
    never.set()
