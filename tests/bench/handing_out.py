"""What streams of access tokens cost a coordinator: memory, and time and processor of a renewal.

Prints numbers with the machine's facts; asserts nothing:

    PYTHONPATH=. python tests/bench/handing_out.py

STREAMS, 10,000 by default, are spread over TOKENS, 1 by default. The clients are in this process,
the coordinator in one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import grpc

from holdoff import testing
from holdoff.v1 import custody_service_pb2, custody_service_pb2_grpc
from tests.bench.waiting import coordinator, cpu_seconds
from tests.custodian import Custodian, key_directory
from tests.integration.test_hand_out import Refreshed

STREAMS = int(os.environ.get("STREAMS", "10000"))
TOKENS = int(os.environ.get("TOKENS", "1"))
RENEWALS = 3
STREAMS_OF_A_CHANNEL = 500
say = sys.stdout.write


class Crowd:
    """Many streams, and when each had an access token last."""

    def __init__(self) -> None:
        self.missing = STREAMS
        self.all_there = asyncio.Event()

    def expect(self) -> None:
        """Wait for another access token of each stream."""
        self.missing = STREAMS
        self.all_there.clear()

    async def read(
        self, custody: custody_service_pb2_grpc.CustodyServiceAsyncStub, token: str
    ) -> None:
        """Read one stream."""
        request = custody_service_pb2.GetAccessTokenRequest(name=f"{token}/grant")
        async for response in custody.GetAccessToken(request):
            if response.HasField("access_token"):
                self.missing -= 1
                if not self.missing:
                    self.all_there.set()


def resident_kib(pid: int) -> int:
    """Return how much memory a process has."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


async def measure(address: str, pid: int, grants: list[Refreshed]) -> None:
    """Open the streams, then renew."""
    crowd, before = Crowd(), resident_kib(pid)
    async with contextlib.AsyncExitStack() as stack:
        custody = []
        for _ in range(-(-STREAMS // STREAMS_OF_A_CHANNEL)):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options))
            custody.append(custody_service_pb2_grpc.CustodyServiceStub(channel))
        began, used = time.monotonic(), cpu_seconds(pid)
        tasks = [
            asyncio.create_task(
                crowd.read(custody[number % len(custody)], grants[number % TOKENS].token)
            )
            for number in range(STREAMS)
        ]
        await crowd.all_there.wait()
        each = (resident_kib(pid) - before) / STREAMS
        say(
            f"{STREAMS} streams of {TOKENS} tokens: opened in {time.monotonic() - began:.1f} s, "
            f"{cpu_seconds(pid) - used:.1f} s of processor, {each:.1f} KiB each\n"
        )
        for _ in range(RENEWALS):
            crowd.expect()
            began, used = time.monotonic(), cpu_seconds(pid)
            for one in grants:
                await asyncio.to_thread(one.refresh)
            stored = time.monotonic() - began
            await crowd.all_there.wait()
            say(
                f"renewed: stored after {stored:.2f} s, all have it after "
                f"{time.monotonic() - began:.2f} s, {cpu_seconds(pid) - used:.2f} s of processor\n"
            )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    """Measure on a store of its own."""
    say(f"machine: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}\n")
    # The runner ends last: the operator's loop still calls gRPC's poller of this one.
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner() as runner,
        testing.valkey() as (url, _),
    ):
        keys = key_directory(Path(folder), "first")
        os.environ["HOLDOFF_CUSTODY_KEY_DIR"] = folder
        os.environ["HOLDOFF_LIMIT"] = f"access-tokens={STREAMS}"
        with Custodian(url, keys) as operator, coordinator(url) as (address, pid):
            grants = [Refreshed(operator, url) for _ in range(TOKENS)]
            for one in grants:
                one.refresh()
            runner.run(measure(address, pid, grants))


if __name__ == "__main__":
    main()
