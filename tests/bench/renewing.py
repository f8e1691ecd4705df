"""A refresh in custody: what it takes beyond the request, and 500 callers at its instant.

Prints numbers with the machine's facts; asserts nothing:

    PYTHONPATH=. python tests/bench/renewing.py

The provider, three replicas and the callers are in this process. CALLERS is 500 by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import grpc

from holdoff import testing
from holdoff.policies import presets
from holdoff.simulator import Rotation
from holdoff.v1 import custody_service_pb2, custody_service_pb2_grpc
from tests.custodian import Custodian, key_directory
from tests.integration.test_refreshing import (
    INTERVAL_SECONDS,
    PATH,
    SEED,
    World,
    policy_of,
    world,
)

CALLERS = int(os.environ.get("CALLERS", "500"))
REPLICAS = 3
TIMES = 10
say = sys.stdout.write


async def post(w: World) -> None:
    """Make the same request, on a connection of its own, as a client without custody does."""
    form = {
        "grant_type": "refresh_token",
        "refresh_token": SEED.refresh_token,
        "client_id": SEED.client_id,
        "client_secret": SEED.client_secret,
    }
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{w.provider}{PATH}", data=form) as response,
    ):
        assert "access_token" in await response.json(), response.status


async def added_time(w: World) -> None:
    """Compare a refresh, until its answer is stored, with a bare request."""
    bare, whole = [], []
    for _ in range(TIMES):
        began = time.monotonic()
        await w.refresh()
        whole.append(time.monotonic() - began)
        await w.pass_seconds(INTERVAL_SECONDS)
        began = time.monotonic()
        await post(w)
        bare.append(time.monotonic() - began)
        await w.pass_seconds(INTERVAL_SECONDS)
    issued, refused, violations = await w.report()
    assert (issued, refused, violations) == (2 * TIMES, 0, 0), (issued, refused, violations)
    one, other = statistics.median(whole) * 1000, statistics.median(bare) * 1000
    say(
        f"a refresh until it is stored: {one:.0f} ms; a bare request: {other:.1f} ms; "
        f"{one - other:.0f} ms more, {one / other:.0f} times\n"
    )


async def first_token(address: str, token: str) -> float:
    """Wait for an access token on a channel of its own; return when it came."""
    async with grpc.aio.insecure_channel(
        address, [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        custody = custody_service_pb2_grpc.CustodyServiceStub(channel)
        request = custody_service_pb2.GetAccessTokenRequest(name=f"{token}/grant")
        async for response in custody.GetAccessToken(request):
            if response.HasField("access_token"):
                return time.monotonic()
    raise AssertionError(token)


async def crowd(w: World, url: str, keys: Path, folder: Path) -> None:
    """Open all streams at the instant at which a refresh is due."""
    policy = policy_of(w.provider, Rotation.UNTIL_USED, has_interval=True)
    known = {**presets(), policy.name: policy}
    async with contextlib.AsyncExitStack() as stack:
        replicas = []
        for number in range(REPLICAS):
            spool = folder / f"spool-{number}"
            spool.mkdir(mode=0o700)
            terms = {"loopback_http": True, "spool": spool}
            one = Custodian(url, keys, terms=terms, policies=known)
            await asyncio.to_thread(one.__enter__)
            stack.push_async_callback(asyncio.to_thread, one.stop)
            replicas.append(one.address)
        began = time.monotonic()
        token = str(w.name)
        calls = (first_token(replicas[n % REPLICAS], token) for n in range(CALLERS))
        came = sorted(await asyncio.gather(*calls))
        issued, refused, violations = await w.report()
        say(
            f"{CALLERS} callers on {REPLICAS} replicas at the instant of a refresh: {issued} "
            f"issued, {refused} refused, {violations} violations; the first has the token after "
            f"{came[0] - began:.2f} s, all have it after {came[-1] - began:.2f} s\n"
        )


async def measure(url: str, keys: Path, folder: Path) -> None:
    """Measure with a new grant each."""
    async with world(url, keys, folder) as w:
        await crowd(w, url, keys, folder)
    async with world(url, keys, folder, Rotation.NONE) as w:
        await added_time(w)


def main() -> None:
    """Measure on a store of its own."""
    say(f"machine: {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as name, testing.valkey() as (url, _):
        folder = Path(name)
        (folder / "keys").mkdir()
        keys = key_directory(folder / "keys", "first")
        asyncio.run(measure(url, keys, folder))


if __name__ == "__main__":
    main()
