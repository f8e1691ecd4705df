"""How late a lease starts after its interval, and what a lease costs beside a plain lock.

Prints numbers with the machine's facts; asserts nothing. Run it with `make bench`.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis
import redis_lock
import structlog

import holdoff
from holdoff_coordinator.embedded import command
from tests.harness import Replica, Waiter, ask

RUNS = 20
INTERVAL_SECONDS = 0.57
OPERATIONS = 300


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def lateness_ms(replica: Replica, second: Replica) -> list[float]:
    """Start runs one after the other, waiting at two replicas by turns; by the store's clock."""
    token = replica.create_token(INTERVAL_SECONDS)
    not_before = replica.release(replica.hold(token)).not_before_time.ToMicroseconds()
    late, waiters = [], [Waiter(replica, ask(token))]
    for number in range(RUNS):
        waiter = waiters[-1]
        offer = waiter.offer()
        accepted = replica.renew(offer).accept_time.ToMicroseconds()
        late.append((accepted - not_before) / 1e3)
        waiters.append(Waiter((second, replica)[number % 2], ask(token)))
        not_before = replica.release(offer).not_before_time.ToMicroseconds()
    for waiter in waiters:
        waiter.vanish()
    return late


def leases_per_second(address: str, replica: Replica) -> float:
    """Acquire, accept and release without contention, with the client that users have."""
    token = replica.create_token(0)
    with holdoff.Client(address) as client:
        began = time.perf_counter()
        for _ in range(OPERATIONS):
            client.acquire(token, wait_seconds=0).release()
        return OPERATIONS / (time.perf_counter() - began)


def locks_per_second(url: str) -> float:
    """Acquire and release python-redis-lock's lock without contention on the same store."""
    with redis.Redis.from_url(url) as store:
        began = time.perf_counter()
        for _ in range(OPERATIONS):
            with redis_lock.Lock(store, "bench", expire=10):
                pass
        return OPERATIONS / (time.perf_counter() - began)


def main() -> None:
    """Measure on a store that fsyncs every write."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="holdoff-") as folder:
        durable = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
        options = ("--port", "0", "--unixsocket", "v.sock", *durable)
        server = subprocess.Popen(
            command(*options), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            url = f"unix://{folder}/v.sock"
            while not Path(folder, "v.sock").exists():
                time.sleep(0.01)
            with Replica(url) as replica, Replica(url) as second:
                late = lateness_ms(replica, second)
                leases, locks = leases_per_second(replica.address, replica), locks_per_second(url)
        finally:
            server.terminate()
            server.wait()
    say = sys.stdout.write
    say(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {sys.version.split()[0]}\n")
    say(
        f"start after the interval of {INTERVAL_SECONDS} s, {RUNS} runs, two replicas: "
        f"earliest {min(late):.1f} ms, p50 {statistics.median(late):.1f} ms, "
        f"p99 {percentile(late, 0.99):.1f} ms late\n"
    )
    say(
        f"uncontended: {leases:.0f} leases/s, {locks:.0f} python-redis-lock locks/s, "
        f"ratio {leases / locks:.2f}\n"
    )


if __name__ == "__main__":
    main()
