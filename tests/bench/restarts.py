"""A rolling restart under 50 waiters and 5 holders, and a coordinator that hangs.

Prints numbers; asserts nothing. Once the clients have the addresses with commas, and once a host
name, which a DNS server of ours answers with the coordinators that serve. Run it with
`PYTHONPATH=. python tests/bench/restarts.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import holdoff
from holdoff.testing import valkey
from tests.e2e.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

HOLDERS = 5
WAITERS_EACH = 10
TTL_SECONDS = 5.0
say = sys.stdout.write


@contextlib.contextmanager
def dns_server(hosts: Callable[[], list[str]]) -> Iterator[int]:
    """Answer every question for an IPv4 address with some hosts; give the port."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            query, client = sock.recvfrom(512)
            if not query:
                return
            end = query.index(b"\0", 12) + 5
            is_a = query[end - 4 : end - 2] == b"\0\1"
            found = hosts() if is_a else []
            answers = b"".join(
                b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(host)
                for host in found
            )
            head = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(found), 0, 0)
            sock.sendto(head + query[12:end] + answers, client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(sock.getsockname()[1])
    finally:
        sock.sendto(b"", sock.getsockname())
        thread.join(5)
        sock.close()


class Crowd:
    """Holders and waiters of some tokens, each with a client of its own."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self.lost: list[str] = []
        self.order: dict[str, list[int]] = {}
        self.away_since: dict[str, float] = {}
        self.gaps: list[float] = []
        self.renewed: dict[str, float] = {}
        self.renewal_gaps: list[float] = []

    async def take_turn(self, client: holdoff.aio.Client, token: str, number: int) -> None:
        """Wait for a lease, hold it for a moment and give it back."""
        who = f"{token} {number}"

        def unreachable(_: object) -> None:
            self.away_since.setdefault(who, time.monotonic())

        def reached(_: object = None) -> None:
            if since := self.away_since.pop(who, None):
                self.gaps.append(time.monotonic() - since)

        lease = await client.acquire(
            token,
            ttl_seconds=TTL_SECONDS,
            on_waiting=reached,
            on_unreachable=unreachable,
            on_lost=lambda error: self.lost.append(str(error)),
        )
        reached()
        self.order[token].append(number)
        await lease.release()

    async def hold(self, client: holdoff.aio.Client, token: str) -> holdoff.aio.HeldLease:
        """Take a lease, and note how long each renewal was in coming."""

        def renewed(_: int) -> None:
            now = time.monotonic()
            self.renewal_gaps.append(now - self.renewed.get(token, now))
            self.renewed[token] = now

        self.order[token] = []
        return await client.acquire(
            token,
            ttl_seconds=TTL_SECONDS,
            on_renewed=renewed,
            on_lost=lambda error: self.lost.append(str(error)),
        )

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[holdoff.aio.Client]:
        """Give a client."""
        async with holdoff.aio.Client(self._endpoint) as client:
            yield client


def spread(services: list[Service]) -> str:
    """Count the connections of this process to each coordinator."""
    remotes = {}
    for service in services:
        host, _, port = service.address.rpartition(":")
        remotes[f"{socket.inet_aton(host)[::-1].hex().upper()}:{int(port):04X}"] = service.address
    # gRPC has sockets of IPv6 for addresses of IPv4 too, which end in the same way.
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    found = Counter(remotes.get(line[2][-13:]) for line in lines if line[3] == "01")
    return ", ".join(f"{found[one]} at {one}" for one in sorted(remotes.values()))


async def restart_all(name: str, endpoint: str, services: list[Service], up: set[int]) -> None:
    """Restart one coordinator after the other under the crowd, and print what it met."""
    crowd = Crowd(endpoint)
    async with contextlib.AsyncExitStack() as stack:
        tokens = [services[0].create_token(f"{name}-{number}", "0s") for number in range(HOLDERS)]
        held, turns = [], []
        for token in tokens:
            held.append(await crowd.hold(await stack.enter_async_context(crowd.client()), token))
            admin = await stack.enter_async_context(holdoff.aio.Client(endpoint))
            for number in range(WAITERS_EACH):
                client = await stack.enter_async_context(crowd.client())
                turns.append(asyncio.create_task(crowd.take_turn(client, token, number)))
                while (await admin.get_token(token)).queue_length <= number:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await admin.close()
        say(f"{name}: before: {spread(services)}\n")
        for number, service in enumerate(services):
            up.discard(number)
            await asyncio.to_thread(service.end, signal.SIGTERM)
            await asyncio.sleep(1)
            await asyncio.to_thread(service.start)
            up.add(number)
            await asyncio.sleep(1)
        await asyncio.sleep(TTL_SECONDS)
        say(f"{name}: after: {spread(services)}\n")
        for lease in held:
            await lease.release()
        await asyncio.gather(*turns)
    await asyncio.sleep(1)  # gRPC's connections end with it
    in_order = sum(order == sorted(order) for order in crowd.order.values())
    say(
        f"{name}: leases lost {len(crowd.lost)}; queues in order {in_order} of {HOLDERS}; waiters "
        f"without a coordinator {len(crowd.gaps)} times, median "
        f"{statistics.median(crowd.gaps or [0]):.2f} s, longest {max(crowd.gaps or [0]):.2f} s; "
        f"longest time between two renewals {max(crowd.renewal_gaps):.2f} s\n"
    )


async def freeze(services: list[Service]) -> None:
    """Stop a coordinator, and see when a holder renews elsewhere, and a waiter waits elsewhere."""
    frozen, other = services
    endpoint = f"{frozen.address},{other.address}"
    renewals: dict[str, list[float]] = {}
    lost: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        for number in range(10):
            client = await stack.enter_async_context(holdoff.aio.Client(endpoint))
            token = other.create_token(f"frozen-{number}", "0s")
            times = renewals[token] = []
            await client.acquire(
                token,
                ttl_seconds=TTL_SECONDS,
                on_renewed=lambda _, times=times: times.append(time.monotonic()),  # type: ignore[misc]
                on_lost=lambda error: lost.append(str(error)),
            )
        await asyncio.sleep(TTL_SECONDS)
        say(f"frozen: before: {spread(services)}\n")
        os.kill(frozen.process.pid, signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            await asyncio.sleep(3 * TTL_SECONDS)
            gaps = [
                min(at for at in times if at > stopped) - max(at for at in times if at <= stopped)
                for times in renewals.values()
            ]
            say(f"frozen: after: {spread(services)}\n")
        finally:
            os.kill(frozen.process.pid, signal.SIGCONT)
    moved = [f"{gap:.2f}" for gap in sorted(gaps) if gap > TTL_SECONDS / 4]
    say(
        f"frozen: TTL {TTL_SECONDS:g} s; {len(moved)} of {len(gaps)} holders moved, "
        f"{len(lost)} lost; "
        f"time between the renewals before and after: {', '.join(moved)} s\n"
    )


def main() -> None:
    """Measure on a store of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdoff-")))
        url, _ = stack.enter_context(valkey())
        services = [Service(folder / name, url) for name in ("first", "second")]
        services[0].start()
        port = services[0].address.rpartition(":")[2]
        services[1].address = f"127.0.0.2:{port}"
        services[1].start()
        stack.callback(services[0].end, signal.SIGTERM)
        stack.callback(services[1].end, signal.SIGTERM)
        up = {0, 1}
        hosts = ("127.0.0.1", "127.0.0.2")
        server = stack.enter_context(dns_server(lambda: [hosts[number] for number in sorted(up)]))
        addresses = ",".join(service.address for service in services)
        asyncio.run(restart_all("commas", addresses, services, up))
        named = f"dns://127.0.0.1:{server}/coordinator.test:{port}"
        asyncio.run(restart_all("dns", named, services, up))
        asyncio.run(freeze(services))


if __name__ == "__main__":
    main()
