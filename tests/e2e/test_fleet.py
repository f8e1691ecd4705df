"""A fleet on two hosts shares one token through two replicas, and is treated roughly."""

from __future__ import annotations

import itertools
import json
import signal
import time
from typing import TYPE_CHECKING, Any

import grpc

import holdoff
from holdoff.v1 import lease_pb2, lease_service_pb2, lease_service_pb2_grpc
from tests.e2e.processes import program
from tests.e2e.service import host_named
from tests.harness import LONG, NO_PROXY, only_long, wait_until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.e2e.service import Service

RUNS = range(10 if LONG else 8)
GONE_HOLDERS = (2, 6)
GONE_WAITER = 5
BUSY = (0, 4)
"""Runs that hold the lease until the test lets them end; the rest are short."""
TTL_SECONDS = 3.5
INTERVAL_SECONDS = 0.4


class Fleet:
    """Some wrappers, and the file to which their jobs append what they do."""

    def __init__(self, folder: Path, replicas: tuple[Service, Service]) -> None:
        self._folder = folder
        self._diary = folder / "diary"
        self._diary.touch()
        self._replicas = replicas
        self._hosts = {name: host_named(name) for name in ("web1", "web2")}
        self.token = replicas[0].create_token("fleet", f"{INTERVAL_SECONDS}s")
        self.wrappers: dict[int, subprocess.Popen[str]] = {}

    def start(self, run: int) -> None:
        """Start a wrapper: the even ones on one host, which prefers one of the replicas."""
        near, far = self._replicas if run % 2 == 0 else reversed(self._replicas)
        environment = {
            **near.environment,
            "HOLDOFF_ENDPOINT": f"{near.address},{far.address}",
        }
        options = ("--token", self.token, "--ttl", f"{TTL_SECONDS}s", "--job", str(run))
        job = program("fleet_job", run, self._diary, self._gate(run))
        self.wrappers[run] = near.start_holdoff(
            *("run", *options, "--", *job), host=self._hosts[self.host_of(run)], env=environment
        )
        if run not in (*BUSY, *GONE_HOLDERS):
            self.let_end(run)

    def host_of(self, run: int) -> str:
        """Return on which host a run is."""
        return "web1" if run % 2 == 0 else "web2"

    @property
    def has_hosts(self) -> bool:
        """Tell whether hosts have names of their own here."""
        return all(self._hosts.values())

    def _gate(self, run: int) -> Path:
        return self._folder / f"{run}-may-end"

    def let_end(self, run: int) -> None:
        """Let the job of a run come to its end."""
        self._gate(run).touch()

    def notes(self, *whats: str) -> list[dict[str, Any]]:
        """Return what the jobs have noted so far, in order."""
        lines = self._diary.read_text().splitlines()
        return [note for note in map(json.loads, lines) if note["what"] in whats]

    def wait_for_start(self, run: int) -> str:
        """Wait until a run's job has started; return its lease."""
        lease: str = wait_until(
            lambda: next((note["lease"] for note in self.notes("start") if note["run"] == run), "")
        )
        return lease


def microseconds(seconds: float) -> int:
    """Return seconds as the store counts time."""
    return round(seconds * 1e6)


def kill_replica(replica: Service, survivor: holdoff.Client, lease: str) -> None:
    """Kill a replica, and wait until the lease was renewed after that, through the other one."""
    replica.end(signal.SIGKILL)
    renewed_after = microseconds(time.time() + TTL_SECONDS)
    wait_until(lambda: survivor.get_lease(lease).expire_time.ToMicroseconds() > renewed_after)


@only_long  # the short chaos run has such a fleet, too
def test_wrappers_on_two_hosts_under_fire(
    tmp_path: Path, two_replicas: tuple[Service, Service]
) -> None:
    """Promises 1 to 5 and 9: deaths of wrappers, a waiter and both replicas cost nobody a turn.

    Fails when an expired lease leaves no cooldown, when a client that connects again comes with a
    new request id, or when the guard does not end a command whose wrapper was killed.
    """
    first, second = two_replicas
    fleet = Fleet(tmp_path, two_replicas)
    with holdoff.Client(first.address) as via_first, holdoff.Client(second.address) as via_second:
        for run in RUNS:
            fleet.start(run)
            if run == 0:
                fleet.wait_for_start(0)
            # The order of arrival is known: each is in the queue before the next one starts.
            wait_until(lambda: via_second.get_token(fleet.token).queue_length == run)  # noqa: B023

        kill_replica(first, via_second, fleet.wait_for_start(0))
        first.start()
        fleet.wrappers[GONE_WAITER].kill()
        fleet.let_end(0)

        fleet.wait_for_start(2)
        fleet.wrappers[2].kill()

        # By now everybody has been served by the second replica alone.
        kill_replica(second, via_first, fleet.wait_for_start(4))
        fleet.let_end(4)

        fleet.wait_for_start(6)
        fleet.wrappers[6].kill()

        said = {run: wrapper.communicate(timeout=60) for run, wrapper in fleet.wrappers.items()}
        starts, ends = fleet.notes("start"), fleet.notes("end")
    with grpc.insecure_channel(first.address, NO_PROXY) as channel:
        store = lease_service_pb2_grpc.LeaseServiceStub(channel)
        history = lease_service_pb2.ListLeaseHistoryRequest(parent=fleet.token)
        leases = list(reversed(store.ListLeaseHistory(history).leases))
        queue = lease_service_pb2.ListWaitersRequest(parent=fleet.token)
        waiters = store.ListWaiters(queue).waiters

    # The store's record has the leases of the jobs that ran, and no others.
    assert [lease.name for lease in leases] == [note["lease"] for note in starts]
    # First come, first served: who died while waiting is passed over, nobody else is.
    assert [note["run"] for note in starts] == [run for run in RUNS if run != GONE_WAITER]
    # Every death is accounted for: a wrapper ended well, or by our signal.
    killed = {*GONE_HOLDERS, GONE_WAITER}
    codes = {run: wrapper.returncode for run, wrapper in fleet.wrappers.items()}
    assert codes == {run: -signal.SIGKILL if run in killed else 0 for run in RUNS}
    # What the wrapper could not give back ran out; everything else was given back.
    lost, back = lease_pb2.LEASE_STATE_EXPIRED, lease_pb2.LEASE_STATE_RELEASED
    assert [lease.state for lease in leases] == [
        lost if note["run"] in GONE_HOLDERS else back for note in starts
    ]
    # A replica's death is noticed by no job: each that was not killed came to its own end …
    assert [note["run"] for note in ends] == [run for run in RUNS if run not in killed]
    # … and no wrapper had anything to say but why it was waiting.
    talk = [line for out, err in said.values() for line in (out + err).splitlines()]
    assert [line for line in talk if not line.startswith("holdoff: waiting for ")] == []
    # Each lease was of one holder, on the host and for the job that asked for it.
    assert [lease.holder.job for lease in leases] == [str(note["run"]) for note in starts]
    assert [lease.holder.host for lease in leases] == [note["host"] for note in starts]
    if fleet.has_hosts:
        assert [note["host"] for note in starts] == [fleet.host_of(note["run"]) for note in starts]
    # Fencing tokens rise strictly; the job's is its lease's.
    numbers = [lease.fencing_token for lease in leases]
    assert numbers == sorted(set(numbers)) == [note["fencing"] for note in starts]
    # By the store's record no lease begins earlier than the interval after the last possible
    # refresh before it, which is the moment at which the lease before it was released or ran out.
    interval_us = microseconds(INTERVAL_SECONDS)
    for before, after in itertools.pairwise(leases):
        assert after.create_time.ToMicroseconds() - before.end_time.ToMicroseconds() >= interval_us
    # By the jobs' own notes neither; and none worked on when its lease had ended, so the guards
    # ended the commands of killed wrappers in time.
    last_work = {note["run"]: note["at"] for note in fleet.notes("start", "works", "end")}
    for note, following in itertools.pairwise(starts):
        assert following["at"] - last_work[note["run"]] >= INTERVAL_SECONDS
    for note, lease in zip(starts, leases, strict=True):
        assert microseconds(last_work[note["run"]]) < lease.end_time.ToMicroseconds()
    # Nobody is left in the queue but the dead waiter, silent since; its place is kept for a minute.
    assert [waiter.holder.job for waiter in waiters] == [str(GONE_WAITER)]
    assert waiters[0].heard_age.ToSeconds() >= 5
