"""What waiting costs others: their calls, and the processors, while many wait at one coordinator.

Prints numbers with the machine's facts; asserts nothing:

    PYTHONPATH=. python tests/bench/waiting.py one-token     # 1,000 waiters come at once
    PYTHONPATH=. python tests/bench/waiting.py many-tokens   # 5,000, on 1,000 tokens of one app
    PYTHONPATH=. python tests/bench/waiting.py passers-by    # 12 ask with a wait, and leave

The bystander renews a lease of another app, in a process of its own: its delays are not those
of the process that waits. SECONDS, 40 by default, is for how long.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from holdoff import testing
from holdoff._core import HEARTBEAT_SECONDS
from holdoff.v1 import lease_service_pb2, lease_service_pb2_grpc, token_service_pb2_grpc
from tests.harness import ask, token_to_create

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from holdoff.v1.lease_service_pb2_grpc import LeaseServiceAsyncStub as Leases

SECONDS = float(os.environ.get("SECONDS", "40"))
PAUSE_SECONDS = 0.05
CALLERS = 12
CROWDS = {"one-token": (1, 1_000), "many-tokens": (1_000, 5_000), "passers-by": (1, 0)}
"""How many tokens, and how many waiters, by the kind of the crowd."""
say = sys.stdout.write


@contextlib.contextmanager
def coordinator(store_url: str) -> Iterator[tuple[str, int]]:
    """Run a coordinator as a process; give its address and process id."""
    command = [sys.executable, "-m", "holdoff_coordinator", "serve", "--log-format", "json"]
    options = ["--listen", "127.0.0.1:0", "--redis-url", store_url]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        line = next(line for line in process.stderr if '"serving"' in line)
        # It logs each grant: without a reader the pipe would fill, and it would block.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield json.loads(line)["address"], process.pid
    finally:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def renew_again_and_again(address: str) -> None:
    """Be the bystander: say when it is ready, then how long each renewal took in ms."""
    took: list[float] = []
    failed = 0
    with grpc.insecure_channel(address) as channel:
        leases = lease_service_pb2_grpc.LeaseServiceStub(channel)
        name = "apps/bystander/tokens/t"
        token_service_pb2_grpc.TokenServiceStub(channel).CreateToken(token_to_create(name, 1.0))
        offer = leases.AcquireLease(ask(name, wait=0.0, ttl=600.0)).offer
        renewal = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
        leases.RenewLease(renewal)
        say("ready\n")
        sys.stdout.flush()
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            called = time.monotonic()
            try:
                leases.RenewLease(renewal)
            except grpc.RpcError:
                failed += 1
            took.append((time.monotonic() - called) * 1e3)
            time.sleep(PAUSE_SECONDS)
    say(json.dumps([sorted(took), failed]))


async def wait(leases: Leases, token: str) -> None:
    """Wait for a token as a client does."""

    async def messages() -> AsyncIterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        yield lease_service_pb2.StreamAcquireLeaseRequest(acquire=ask(token, ttl=600.0))
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            yield lease_service_pb2.StreamAcquireLeaseRequest(
                heartbeat=lease_service_pb2.Heartbeat()
            )

    async for _ in leases.StreamAcquireLease(messages()):
        pass


async def ask_and_leave(leases: Leases, token: str) -> None:
    """Ask with a wait, and go away after the first answer, for ever."""
    while True:
        with contextlib.suppress(grpc.RpcError):
            await leases.AcquireLease(ask(token, wait=60.0, ttl=600.0))


async def crowd(kind: str, address: str, pids: dict[str, int]) -> None:
    """Let many come at once, and the bystander renew meanwhile."""
    tokens, waiters = CROWDS[kind]
    names = [f"apps/crowd/tokens/t{number}" for number in range(tokens)]
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(16)
        ]
        stubs = itertools.cycle([lease_service_pb2_grpc.LeaseServiceStub(one) for one in channels])
        creating = token_service_pb2_grpc.TokenServiceStub(channels[0])
        for name in names:
            await creating.CreateToken(token_to_create(name, 1.0))
            offer = (await next(stubs).AcquireLease(ask(name, wait=0.0, ttl=600.0))).offer
            await next(stubs).RenewLease(
                lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
            )
        bystander = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "bystander", address), stdout=subprocess.PIPE
        )
        assert bystander.stdout
        await bystander.stdout.readline()
        before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
        work = [asyncio.create_task(wait(next(stubs), names[n % tokens])) for n in range(waiters)]
        if kind == "passers-by":
            callers = (ask_and_leave(next(stubs), names[0]) for _ in range(CALLERS))
            work = [asyncio.create_task(caller) for caller in callers]
        took, failed = json.loads((await bystander.communicate())[0])
        whole = time.monotonic() - began
        used = {name: (cpu_seconds(pid) - before[name]) / whole for name, pid in pids.items()}
        there = sum(not task.done() for task in work)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    share = ", ".join(f"{name} {seconds:.0%}" for name, seconds in used.items())
    say(
        f"{kind}: {there} of {len(work)} still there; {len(took)} renewals of another app, "
        f"{failed} failed, p50 {took[len(took) // 2]:.1f} ms, "
        f"p99 {took[int(len(took) * 0.99)]:.1f} ms, longest {took[-1]:.1f} ms; processor: {share}\n"
    )


def main() -> None:
    """Measure on a store of its own."""
    if sys.argv[1:2] == ["bystander"]:
        renew_again_and_again(sys.argv[2])
        return
    say(f"machine: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}\n")
    for kind in sys.argv[1:] or CROWDS:
        with testing.valkey() as (url, pid), coordinator(url) as (address, own):
            asyncio.run(crowd(kind, address, {"Valkey": pid, "coordinator": own}))


if __name__ == "__main__":
    main()
