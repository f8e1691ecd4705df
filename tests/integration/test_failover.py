"""A primary that dies under load: how soon its replica is followed, and what was lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING

import pytest
import redis

import holdoff
from holdoff_coordinator.scripts import shard_key
from tests import stores
from tests.harness import LONG, Replica, wait_until
from tests.integration.test_stores import app_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from tests.stores import Store

WORKERS = 4 if LONG else 2
TTL_SECONDS = 5.0 if LONG else 3.0
PAUSE_SECONDS = 0.0 if LONG else 0.05
"""Between two leases of a worker."""
FEW = 20 if LONG else 5
FOLLOWED_SECONDS = 30.0
"""A second of silence, the vote, and what our clients wait between two tries; with room."""


class Worker:
    """Takes and gives back the lease of one token, and reports an error each time."""

    def __init__(self, endpoint: str, token: str) -> None:
        self.token = token
        self.numbers: list[int] = []
        self.reported = 0
        self.ended_at: list[float] = [time.monotonic()]
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(endpoint,), daemon=True)
        self.thread.start()

    def _work(self, endpoint: str) -> None:
        with holdoff.Client(endpoint) as client:
            while not self.stop.is_set():
                try:
                    with client.acquire(
                        self.token, ttl_seconds=TTL_SECONDS, wait_seconds=60
                    ) as lease:
                        self.numbers.append(lease.fencing_token)
                        self._report(client)
                except (holdoff.LeaseLost, holdoff.Unavailable):
                    continue
                self.ended_at.append(time.monotonic())
                self.stop.wait(PAUSE_SECONDS)

    def _report(self, client: holdoff.Client) -> None:
        event = str(uuid.uuid4())
        while True:  # the client gives up after some seconds, and `holdoff run` would spool it
            with contextlib.suppress(holdoff.Unavailable):
                client.record_error(self.token, endpoint=f"e{event}", status=400, event_id=event)
                self.reported += 1
                return

    @property
    def longest_gap(self) -> float:
        """The longest time without a finished lease."""
        times = [*self.ended_at, time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


def wait_until_all_go_on(workers: Sequence[Worker], seconds: float) -> None:
    """Wait until each did some more from now on."""
    enough = [len(worker.numbers) + FEW for worker in workers]
    wait_until(
        lambda: all(len(one.numbers) > many for one, many in zip(workers, enough, strict=True)),
        seconds,
    )


def took_over(store: Store, token: str) -> bool:
    """Tell whether the replicas of the primary know that nothing was granted because of them."""
    shard = shard_key(token.split("/")[1])
    reasons = []
    for one in store.nodes[1:]:
        with contextlib.suppress(redis.exceptions.MovedError):
            reasons += one.client.hmget(shard, "quarantine_reason")
    return any(b"took over" in (reason or b"") for reason in reasons)


def watched() -> AbstractContextManager[Store]:
    """A primary that Sentinels watch."""
    return stores.watched("--appendonly", "yes", silence_ms=stores.SHORT_SILENCE_MS)


def clustered() -> AbstractContextManager[Store]:
    """A Cluster of which one primary has a replica."""
    options = ("--appendonly", "yes", "--cluster-require-full-coverage", "no")
    return stores.cluster(*options, replicas=1, silence_ms=stores.SHORT_SILENCE_MS)


def dies(primary: stores.Node) -> None:
    """End without a word."""
    primary.kill()


def hangs(primary: stores.Node) -> None:
    """Stop answering, with all connections open."""
    os.kill(primary.process.pid, signal.SIGSTOP)


WAYS = [(watched, dies), (clustered, hangs)]
"""The long version adds the other two pairs."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("start", "fails"), [*WAYS, (watched, hangs), (clustered, dies)] if LONG else WAYS
)
def test_a_failover_under_load(
    start: Callable[[], AbstractContextManager[Store]],
    fails: Callable[[stores.Node], None],
    record_property: Callable[[str, object], None],
) -> None:
    """The replica is followed within seconds; no two hold at once, and numbers go on rising.

    What the primary acknowledged and had not sent on yet may be gone. The coordinators send again
    what they acknowledged, so that each report counts once (promise 6). Nothing new is granted
    while a lease may live that the replica knows nothing of (promise 9), and that begins for all
    apps at once, also for those that nobody asks for.

    Fails when a client of the store keeps the address of the primary; when the scripts do not look
    whose history of writes the server goes on with, as nobody then waits for the TTL; when the
    sweeper leaves out the apps that are idle; or when nothing is sent again.
    """
    with start() as store:
        primary = store.nodes[0]
        with Replica(store.url) as one, Replica(store.url) as other:
            endpoint = f"{one.address},{other.address}"
            apps = [app_in(primary) for _ in range(WORKERS)]
            tokens = [one.create_token(0, name=f"apps/{app}/tokens/t") for app in apps]
            held_token = one.create_token(0, name=f"apps/{app_in(primary)}/tokens/held")
            idle_token = one.create_token(0, name=f"apps/{app_in(primary)}/tokens/idle")
            with holdoff.Client(endpoint) as client:
                client.acquire(idle_token, ttl_seconds=TTL_SECONDS).release()
                held = client.acquire(held_token, ttl_seconds=60)
                workers = [Worker(endpoint, token) for token in tokens]
                wait_until_all_go_on(workers, 20)
                fails(primary)
                wait_until_all_go_on(workers, FOLLOWED_SECONDS + TTL_SECONDS)
                everything = (*tokens, held_token, idle_token)
                wait_until(lambda: all(took_over(store, one) for one in everything), 20)
                client.acquire(idle_token, wait_seconds=20).release()
                if fails is hangs:  # it comes back, and still takes itself for the primary
                    os.kill(primary.process.pid, signal.SIGCONT)
                    wait_until(lambda: primary.role() == "slave", 20)
                    wait_until_all_go_on(workers, 20)
                for worker in workers:
                    worker.stop.set()
                for worker in workers:
                    worker.thread.join(30)
                held.check()
                held.release()
                reported = [worker.reported for worker in workers]

                def counted() -> list[int]:
                    return [
                        sum(
                            budget.used
                            for budget in client.list_budgets(token.partition("/tokens/")[0])
                            if budget.limit == "errors"
                        )
                        for token in tokens
                    ]

                wait_until(lambda: counted() == reported, 20)
    gaps = [worker.longest_gap for worker in workers]
    told = f"all went on after {max(gaps):.1f} s; {sum(reported)} acknowledged reports, none lost"
    record_property("failover", told)
    sys.stderr.write(f"{told}\n")
    assert min(gaps) > TTL_SECONDS - 1
    assert max(gaps) < FOLLOWED_SECONDS + TTL_SECONDS
    for worker in workers:
        assert worker.numbers == sorted(set(worker.numbers))


def test_reports_that_no_replica_had() -> None:
    """What a primary alone acknowledged before it died counts again, and once.

    Fails when the coordinator does not send again what it acknowledged.
    """
    options = {"replicas": 1, "silence_ms": stores.SHORT_SILENCE_MS}
    with stores.watched("--appendonly", "yes", **options) as store:
        primary, follower = store.nodes
        with Replica(store.url) as replica, holdoff.Client(replica.address) as client:
            token = replica.create_token(0)
            app = token.partition("/tokens/")[0]

            def report(count: int) -> None:
                for _ in range(count):
                    client.record_error(token, endpoint="crm/Accounts", status=400)

            def used() -> int:
                with contextlib.suppress(holdoff.Unavailable):
                    return sum(budget.used for budget in client.list_budgets(app))
                return 0

            report(2)
            assert primary.client.wait(1, 30_000) == 1
            os.kill(follower.process.pid, signal.SIGSTOP)
            primary.client.client_kill_filter(_type="replica")
            report(3)
            primary.kill()
            os.kill(follower.process.pid, signal.SIGCONT)
            wait_until(lambda: used() == 5, 60)
            report(1)
            assert used() == 6
