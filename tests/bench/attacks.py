"""What one caller that floods a coordinator costs a bystander: its renewals, and its lease.

Prints numbers with the machine's facts; asserts nothing:

    PYTHONPATH=. python tests/bench/attacks.py watches       # 4,000 WatchLeases streams of a viewer
    PYTHONPATH=. python tests/bench/attacks.py calls         # ListBudgets, 300 times a second
    PYTHONPATH=. python tests/bench/attacks.py scopes        # 61 waiters with 100 scopes each
    PYTHONPATH=. python tests/bench/attacks.py connections   # 2,000 connections that say nothing

The bystander is another identity, which renews a lease of another app, in a process of its own.
It renews alone first, then beside the attack, in the same run: the ratio is what counts. SECONDS,
10 by default, is the length of each half.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import redis.asyncio

from holdoff import testing
from holdoff._core import HEARTBEAT_SECONDS, duration
from holdoff.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    budget_pb2,
    budget_service_pb2,
    budget_service_pb2_grpc,
    lease_service_pb2,
    lease_service_pb2_grpc,
    token_service_pb2_grpc,
)
from holdoff_coordinator.credentials import Credentials
from tests.harness import ask, token_to_create

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator
    from typing import Any

    Metadata = tuple[tuple[str, str], ...]

SECONDS = float(os.environ.get("SECONDS", "10"))
PAUSE_SECONDS = 0.05
TTL_SECONDS = 5.0
APPS = 20
WATCHES, CALLS_A_SECOND, WAITERS, SCOPES, SILENT = 4_000, 300, 61, 100, 2_000
TOKEN = "apps/attacked/tokens/t"
ACCESS = """
[[grants]]
identities = ["credential:admin"]
role = "admin"
resources = ["*"]
[[grants]]
identities = ["credential:bystander"]
role = "holder"
resources = ["apps/bystander"]
[[grants]]
identities = ["credential:attacker"]
role = "holder"
resources = ["apps/attacked"]
"""
say = sys.stdout.write


@contextlib.contextmanager
def coordinator(store_url: str, access: Path) -> Iterator[str]:
    """Run a coordinator as a process; give its address."""
    command = [sys.executable, "-m", "holdoff_coordinator", "serve", "--log-format", "json"]
    options = ["--listen", "127.0.0.1:0", "--redis-url", store_url, "--access-file", str(access)]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        line = next(line for line in process.stderr if '"serving"' in line)
        # It logs each grant: without a reader the pipe would fill, and it would block.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield json.loads(line)["address"]
    finally:
        process.kill()
        process.wait()


async def credentials(store_url: str) -> dict[str, Metadata]:
    """Issue a credential for each identity; give the headers that carry it."""
    async with redis.asyncio.Redis.from_url(store_url) as client:
        known = Credentials(client)
        return {
            name: (("authorization", f"Bearer {(await known.issue(name, 0, 'bench'))[1]}"),)
            for name in ("admin", "bystander", "attacker")
        }


def renew_again_and_again(address: str) -> None:
    """Be the bystander: for each line of input renew for SECONDS, and print how long it took.

    The first line is its credential.
    """
    headers = (("authorization", sys.stdin.readline().strip()),)
    with grpc.insecure_channel(address) as channel:
        leases = lease_service_pb2_grpc.LeaseServiceStub(channel)
        request = ask("apps/bystander/tokens/t", wait=0.0, ttl=TTL_SECONDS)
        offer = leases.AcquireLease(request, metadata=headers).offer
        renewal = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
        leases.RenewLease(renewal, metadata=headers)
        say("ready\n")
        sys.stdout.flush()

        def renew(took: list[float], failed: list[str]) -> None:
            called = time.monotonic()
            try:
                leases.RenewLease(renewal, metadata=headers, timeout=TTL_SECONDS)
            except grpc.RpcError as error:
                failed.append(error.details() or "")
            took.append((time.monotonic() - called) * 1e3)
            time.sleep(PAUSE_SECONDS)

        ended = threading.Event()
        measuring: list[tuple[list[float], list[str]]] = [([], [])]

        def work() -> None:
            while not ended.is_set():
                renew(*measuring[0])

        thread = threading.Thread(target=work)
        thread.start()
        for _ in sys.stdin:
            took, failed = list[float](), list[str]()
            measuring[0] = took, failed
            time.sleep(SECONDS)
            measuring[0] = ([], [])
            say(json.dumps([sorted(took), failed]) + "\n")
            sys.stdout.flush()
        ended.set()
        thread.join()


class Attack:
    """What the attacker has: channels, and its credential."""

    def __init__(self, address: str, headers: dict[str, Metadata]) -> None:
        self.address = address
        self.headers = headers["attacker"]
        self.admin = headers["admin"]
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channels = [grpc.aio.insecure_channel(address, options) for _ in range(8)]
        self.refused: dict[str, int] = {}
        self.answered = 0

    async def watch(self, number: int) -> None:
        """Watch all that may be seen; when refused, once more after a second."""
        leases = lease_service_pb2_grpc.LeaseServiceStub(self.channels[number % 8])
        while True:
            request = lease_service_pb2.WatchLeasesRequest()
            await self._tried(self._read(leases.WatchLeases(request, metadata=self.headers)))
            await asyncio.sleep(1)

    async def _read(self, stream: Any) -> None:
        async for _ in stream:
            self.answered += 1

    async def _tried(self, call: Any) -> None:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            name = f"{error.code().name}: {(error.details() or '')[:90]}"
            self.refused[name] = self.refused.get(name, 0) + 1

    async def prepare(self, kind: str) -> None:
        """Fill what the attack reads: budgets, or a back-off to compare scopes with."""
        tokens = token_service_pb2_grpc.TokenServiceStub(self.channels[0])
        names = ["apps/bystander/tokens/t", TOKEN]
        names += [f"apps/other-{number}/tokens/t" for number in range(APPS)]
        for name in names:
            await tokens.CreateToken(token_to_create(name, 1.0), metadata=self.admin)
        if kind == "calls":
            budgets = budget_service_pb2_grpc.BudgetServiceStub(self.channels[0])
            for first in range(10):
                events = [
                    budget_pb2.Event(
                        id=str(uuid.uuid4()),
                        kind=budget_pb2.EVENT_KIND_ERROR,
                        scope=budget_pb2.Scope(token=TOKEN, endpoint=f"crm/E{first}x{number}"),
                        status=400,
                    )
                    for number in range(100)
                ]
                request = budget_service_pb2.RecordEventsRequest(events=events)
                await budgets.RecordEvents(request, metadata=self.admin)
        if kind == "scopes":
            admin = admin_service_pb2_grpc.AdminServiceStub(self.channels[0])
            scope = budget_pb2.Scope(token=TOKEN, endpoint="crm/Other")
            await admin.SetBackOff(
                admin_service_pb2.SetBackOffRequest(
                    scope=scope, length=duration(600), reason="bench"
                ),
                metadata=self.admin,
            )
            leases = lease_service_pb2_grpc.LeaseServiceStub(self.channels[0])
            offer = (
                await leases.AcquireLease(ask(TOKEN, wait=0.0, ttl=600.0), metadata=self.admin)
            ).offer
            renewal = lease_service_pb2.RenewLeaseRequest(
                name=offer.lease.name, secret=offer.secret
            )
            await leases.RenewLease(renewal, metadata=self.admin)

    async def call_often(self) -> None:
        """Call as often as is meant, however slow the answers are."""
        stubs = [budget_service_pb2_grpc.BudgetServiceStub(one) for one in self.channels]
        calls: set[asyncio.Task[None]] = set()
        began, sent = time.monotonic(), 0
        request = budget_service_pb2.ListBudgetsRequest(parent="apps/attacked", page_size=1000)

        async def call(number: int) -> None:
            await self._tried(stubs[number % 8].ListBudgets(request, metadata=self.headers))
            self.answered += 1

        while True:
            while sent < (time.monotonic() - began) * CALLS_A_SECOND:
                if len(calls) < 5_000:
                    task = asyncio.create_task(call(sent))
                    calls.add(task)
                    task.add_done_callback(calls.discard)
                sent += 1
            await asyncio.sleep(0.01)

    async def wait(self, number: int) -> None:
        """Wait with as many scopes as a request may have."""
        leases = lease_service_pb2_grpc.LeaseServiceStub(self.channels[number % 8])
        scopes = [("535193", f"crm/W{number}x{one}") for one in range(SCOPES)]

        async def messages() -> AsyncIterator[lease_service_pb2.StreamAcquireLeaseRequest]:
            request = ask(TOKEN, ttl=600.0, scopes=scopes)
            yield lease_service_pb2.StreamAcquireLeaseRequest(acquire=request)
            while True:
                await asyncio.sleep(HEARTBEAT_SECONDS)
                yield lease_service_pb2.StreamAcquireLeaseRequest(
                    heartbeat=lease_service_pb2.Heartbeat()
                )

        while True:
            stream = leases.StreamAcquireLease(messages(), metadata=self.headers)
            await self._tried(self._read(stream))
            await asyncio.sleep(1)

    async def be_silent(self) -> None:
        """Open connections that say nothing, and open those that are closed again."""
        host, _, port = self.address.rpartition(":")
        loop = asyncio.get_running_loop()

        async def hold() -> None:
            while True:
                with socket.socket() as one, contextlib.suppress(OSError):
                    one.setblocking(False)
                    await loop.sock_connect(one, (host, int(port)))
                    self.answered += 1
                    while await loop.sock_recv(one, 4096):  # what gRPC says first
                        pass
                self.refused["closed"] = self.refused.get("closed", 0) + 1
                await asyncio.sleep(1)

        await asyncio.gather(*(hold() for _ in range(SILENT)))

    def work(self, kind: str) -> list[Coroutine[Any, Any, None]]:
        """Return what to do at the same time."""
        match kind:
            case "watches":
                return [self.watch(number) for number in range(WATCHES)]
            case "calls":
                return [self.call_often()]
            case "scopes":
                return [self.wait(number) for number in range(WAITERS)]
            case _:
                return [self.be_silent()]


async def measure(kind: str, store_url: str, access: Path) -> None:
    """Let the bystander renew alone, then beside the attack."""
    headers = await credentials(store_url)
    with coordinator(store_url, access) as address:
        attack = Attack(address, headers)
        await attack.prepare(kind)
        bystander = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "bystander", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=2**24,
        )
        assert bystander.stdin
        assert bystander.stdout
        bystander.stdin.write(f"{headers['bystander'][0][1]}\n".encode())
        assert await bystander.stdout.readline()

        async def half() -> tuple[float, float, float, int, list[str]]:
            assert bystander.stdin
            assert bystander.stdout
            bystander.stdin.write(b"\n")
            took, failed = json.loads(await bystander.stdout.readline())
            if not took:
                return SECONDS * 1e3, SECONDS * 1e3, SECONDS * 1e3, 0, failed
            return took[len(took) // 2], took[int(len(took) * 0.99)], took[-1], len(took), failed

        alone = await half()
        work = [asyncio.create_task(one) for one in attack.work(kind)]
        await asyncio.sleep(3)
        beside = await half()
        for task in work:
            task.cancel()
        bystander.kill()
        await bystander.wait()
    for name, (p50, p99, longest, count, failed) in (("alone", alone), ("beside", beside)):
        lost = "LOST its lease" if any("ran out" in one for one in failed) else "kept its lease"
        say(
            f"{kind}: bystander {name}: {count} renewals, {len(failed)} failed, p50 {p50:.1f} ms, "
            f"p99 {p99:.1f} ms, longest {longest:.0f} ms; it {lost}\n"
        )
    say(
        f"{kind}: ratio p50 {beside[0] / alone[0]:.1f}, p99 {beside[1] / alone[1]:.1f}; the "
        f"attacker had {attack.answered} answers, and refusals {attack.refused}\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Measure each attack on a store of its own."""
    if sys.argv[1:2] == ["bystander"]:
        renew_again_and_again(sys.argv[2])
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    say(f"machine: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}\n")
    for kind in sys.argv[1:] or ("watches", "calls", "scopes", "connections"):
        with testing.valkey() as (url, _), tempfile.TemporaryDirectory() as folder:
            access = Path(folder, "access.toml")
            access.write_text(ACCESS, encoding="utf-8")
            asyncio.run(measure(kind, url, access))


if __name__ == "__main__":
    main()
