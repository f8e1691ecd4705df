"""A child that a holder forks: it has neither the lease nor the connection, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from holdoff.v1 import lease_pb2
from tests.harness import LONG

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness import Replica

pytestmark = pytest.mark.timeout(600 if LONG else 60)

# In a process of its own: a fork of the tests' own process would copy a coordinator.
BLOCKING = """
import json, multiprocessing, os, sys, threading, uuid
import holdoff
from holdoff._calls import error_event, scope
from holdoff._reporting import Reporter
from holdoff._spool import Spool

endpoint, token, forks = sys.argv[1:]
told = {}

def away(_events):
    raise holdoff.Unavailable("it is away")

def event():
    one = error_event(scope(token, "1", "crm/Accounts"), status=404)
    one.id = str(uuid.uuid4())
    return one

def in_child(lease):
    refused = []
    for call in (lease.check, lease.wait_while_quiet):
        try:
            call()
        except holdoff.LeaseLost as error:
            refused.append(str(error))
    lease.command_started()
    lease.command_paused(paused=True)
    lease.release()
    assert len(refused) == 2 and str(os.getppid()) in refused[0], refused

def hold_locks(client, lease, locked, forked):
    with client._lock, lease._changed:
        locked.set()
        forked.wait()

reporter = Reporter(away, Spool(), warn=lambda _: None)
reporter.report(event())
with (
    holdoff.Client(endpoint) as client,
    client.acquire(token, ttl_seconds=3) as lease,
    client.budget_guard(token) as guard,
):
    watch = client.watch_leases(token)
    next(watch)
    codes = set()
    for _ in range(int(forks)):
        locked, forked = threading.Event(), threading.Event()
        holding = threading.Thread(target=hold_locks, args=[client, lease, locked, forked])
        holding.start()
        locked.wait()
        child = os.fork()
        forked.set()
        if child == 0:
            in_child(lease)
            refused = []
            for call in (lambda: client.list_waiters(token), lambda: next(watch)):
                try:
                    call()
                except holdoff.HoldoffError as error:
                    refused.append(str(error))
            if len(refused) == 2 and all("make a client here" in one for one in refused):
                reporter.report(event())
                reporter.close(60)
                sys.exit(3)  # through all of the blocks
            os._exit(4)
        holding.join()
        codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    watch.close()
    told["forks"] = list(codes)
    process = multiprocessing.get_context("fork").Process(target=in_child, args=[lease])
    process.start()
    process.join()
    told["multiprocessing"] = process.exitcode
    lease.check()
    told["state"] = client.get_lease(lease.name).state
    app = token.partition("/tokens/")[0]
    told["reserved"] = max((one.reserved for one in client.list_budgets(app)), default=0)
    told["spooled"] = [live for _, live in Spool().survey(print)]
    guard.cancel()
reporter.close(0)
print(json.dumps(told))
"""

ASYNCHRONOUS = """
import asyncio, json, multiprocessing, os, sys
import holdoff

endpoint, token, forks = sys.argv[1:]

def in_child(lease, client, guard):
    try:
        lease.check()
        sys.exit(4)
    except holdoff.LeaseLost:
        pass
    async def end():
        await guard.__aexit__(None, None, None)
        await lease.release()
        await client.close()
        holdoff.aio.Client(endpoint)
    for attempt in (lambda: asyncio.run(end()), lambda: holdoff.Client(endpoint)):
        try:
            attempt()
            sys.exit(5)
        except holdoff.HoldoffError as error:
            assert "spawn" in str(error), error

async def main():
    async with (
        holdoff.aio.Client(endpoint) as client,
        await client.acquire(token, ttl_seconds=3) as lease,
        client.budget_guard(token) as guard,
    ):
        context = multiprocessing.get_context("fork")
        codes = set()
        for _ in range(int(forks)):
            process = context.Process(target=in_child, args=[lease, client, guard])
            process.start()
            await asyncio.to_thread(process.join)
            codes.add(process.exitcode)
            lease.check()
        app = token.partition("/tokens/")[0]
        told = {
            "multiprocessing": list(codes),
            "state": (await client.get_lease(lease.name)).state,
            "reserved": max([one.reserved async for one in client.list_budgets(app)], default=0),
        }
        guard.cancel()
    print(json.dumps(told))

asyncio.run(main())
"""


def told_by(program: str, replica: Replica, folder: Path, forks: str) -> dict[str, Any]:
    """Run a program with a token of its own, and return what it found."""
    name = f"apps/forks-{folder.name.replace('_', '-')}/tokens/t"[:80]
    token = replica.create_token(0.0, name=name, token={"policy": "exact-online"})
    ended = subprocess.run(
        [sys.executable, "-c", program, replica.address, token, forks],
        env={"XDG_STATE_HOME": str(folder)},
        stdout=subprocess.PIPE,
        check=True,
    )
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def test_a_forked_child_leaves_its_parents_lease_alone(replica: Replica, tmp_path: Path) -> None:
    """Neither leaving the blocks nor a call ends what is the parent's, and the child ends at once.

    Fails when any of release, guard, reporter, watch and client does not look at who it belongs
    to, or waits for a lock that a thread of the parent held during the fork.
    """
    told = told_by(BLOCKING, replica, tmp_path, "500" if LONG else "1")
    assert (told["forks"], told["multiprocessing"]) == ([3], 0)
    assert told["state"] == lease_pb2.LEASE_STATE_ACTIVE
    assert (told["reserved"], told["spooled"]) == (1, [True])  # its writer is alive


def test_a_forked_child_leaves_its_parents_lease_alone_with_asyncio(
    replica: Replica, tmp_path: Path
) -> None:
    """The same with asyncio, where the child has an event loop of its own and no gRPC.

    Fails when gRPC starts its threads again in a child, which crashes: once in seven times.
    """
    told = told_by(ASYNCHRONOUS, replica, tmp_path, "500" if LONG else "20")
    assert told["multiprocessing"] == [0]
    assert told["state"] == lease_pb2.LEASE_STATE_ACTIVE
    assert told["reserved"] == 1
