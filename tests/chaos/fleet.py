"""The fleet of a chaos run: processes that hold, wait, run, reserve, report, and lock.

Run as `python -m tests.chaos.fleet ROLE NAME FOLDER ENDPOINT REDIS_URL SEED`. A process works until
the file `stop` is in the folder, and records all that it asks and is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
import redis_lock

import holdoff
from holdoff import aio
from holdoff._calls import error_event, scope
from holdoff.v1 import budget_pb2
from tests import stores
from tests.chaos.history import Recorder, boot
from tests.chaos.scene import (
    BIN,
    COUNTED,
    LEASED,
    LIMITED,
    LONG_TTL_SECONDS,
    SHARED,
    TTL_SECONDS,
    WRAPPED,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdoff.v1 import lease_pb2

PLACES = [*LEASED, *LEASED, SHARED]
"""Where holders go. Users of python-redis-lock get their turn when nobody of ours waits."""
WORK_SECONDS = 0.05
"""Between two looks at the lease."""
LOCK_SECONDS = 10.0
"""How long a lock of python-redis-lock lives."""
RESERVATION_SECONDS = 2.0
EVENTS_A_DIVISION = 200
"""Fewer than the limit, so that no scope has to be quiet."""


class Member:
    """What every role needs."""

    def __init__(self, name: str, folder: Path, endpoint: str, redis_url: str, seed: str) -> None:
        self.name = name
        self.folder = folder
        self.endpoint = endpoint
        self.redis_url = redis_url
        self.chance = random.Random(f"{seed}/{name}")  # noqa: S311 - to repeat a run
        self.record = Recorder(folder, name)
        self._parent = os.getppid()

    def goes_on(self) -> bool:
        """Tell whether to work on."""
        return not (self.folder / "stop").exists() and os.getppid() == self._parent


class Hold:
    """One wish for a lease, and what came of it; shared by both clients."""

    def __init__(self, member: Member, token: str) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.token = token
        self._chance = member.chance
        self._record = member.record
        self._queued = False
        patient = self._chance.random() < 0.7
        self.options: dict[str, Any] = {
            "ttl_seconds": self._chance.choice([TTL_SECONDS, LONG_TTL_SECONDS]),
            "wait_seconds": 8.0 if patient else self._chance.uniform(0, 3),
            "on_waiting": self._waiting,
            "on_lost": lambda error: self.note("lost", why=str(error)),
            "on_renewed": lambda ns: self.note("renewed", deadline=ns / 1e9),
        }
        self.hold_seconds = self._chance.choice([0.0, 0.3, 0.3, 1.0, LONG_TTL_SECONDS])
        self._reports = self._chance.random() < 0.3
        self._refreshed_at = 0.0
        self.note("asked", token=token)

    def note(self, what: str, *, at: float | None = None, **facts: Any) -> None:
        """Record something about it."""
        self._record(what, at=at, id=self.id, **facts)

    def _waiting(self, status: lease_pb2.WaitStatus) -> None:
        if status.place and not self._queued:
            self._queued = True
            self.note("queued", place=status.place)

    def granted(self, lease: Any) -> None:
        """Record the lease."""
        self.note(
            "granted",
            token=self.token,
            fencing=lease.fencing_token,
            lease=lease.name,
            deadline=lease.deadline_ns / 1e9,
        )
        self._refreshed_at = boot()
        if self._reports:
            self.note("refreshed", at=self._refreshed_at)

    def works(self, lease: Any) -> None:
        """Record that the lease could be used at an instant.

        Raises:
            LeaseLost: It cannot be used any more.
        """
        at, deadline = boot(), lease.deadline_ns / 1e9
        lease.check()
        self.note("work", at=at, deadline=deadline)

    def releasing(self) -> dict[str, Any]:
        """Record that the holder ends its work; return what to release with."""
        self.note("releasing", reports=self._reports)
        if not self._reports:
            return {}
        age = boot() - self._refreshed_at
        return {"last_refresh_age_seconds": age, "saw_every_refresh": True}


def hold(member: Member, client: holdoff.Client, token: str) -> None:
    """Take a lease, work for a while, and give it back."""
    one = Hold(member, token)
    try:
        lease = client.acquire(token, **one.options)
    except holdoff.HoldoffError as error:
        one.note("not-granted", why=type(error).__name__)
        return
    one.granted(lease)
    try:
        end = boot() + one.hold_seconds
        while boot() < end:
            one.works(lease)
            time.sleep(WORK_SECONDS)
        lease.check()
        lease.release(**one.releasing())
        one.note("released")
    except holdoff.LeaseLost as error:
        one.note("lost", why=str(error))
        with contextlib.suppress(holdoff.HoldoffError):
            lease.release()  # ends its threads
    except holdoff.HoldoffError as error:
        one.note("not-released", why=type(error).__name__)


async def hold_async(member: Member, client: aio.Client, token: str) -> None:
    """Do the same with asyncio; some are cancelled while they wait."""
    one = Hold(member, token)
    patience = member.chance.choice([None, None, None, 2.0])
    try:
        async with asyncio.timeout(patience):
            lease = await client.acquire(token, **one.options)
    except (holdoff.HoldoffError, TimeoutError) as error:
        one.note("not-granted", why=type(error).__name__)
        return
    one.granted(lease)
    try:
        end = boot() + one.hold_seconds
        while boot() < end:
            one.works(lease)
            await asyncio.sleep(WORK_SECONDS)
        lease.check()
        await lease.release(**one.releasing())
        one.note("released")
    except holdoff.LeaseLost as error:
        one.note("lost", why=str(error))
        with contextlib.suppress(holdoff.HoldoffError):
            await lease.release()
    except holdoff.HoldoffError as error:
        one.note("not-released", why=type(error).__name__)


def side_by_side(*works: Callable[[], None]) -> None:
    """Do some things in threads until all have ended."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def be_sync(member: Member) -> None:
    """Three holders with the plain client."""

    def turns() -> None:
        with holdoff.Client(member.endpoint) as client:
            while member.goes_on():
                hold(member, client, member.chance.choice(PLACES))
                time.sleep(member.chance.uniform(0, 0.3))

    side_by_side(turns, turns, turns)


def be_async(member: Member) -> None:
    """Five holders with asyncio."""

    async def turns(client: aio.Client) -> None:
        while member.goes_on():
            await hold_async(member, client, member.chance.choice(PLACES))
            await asyncio.sleep(member.chance.uniform(0, 0.3))

    async def all_turns() -> None:
        async with aio.Client(member.endpoint) as client:
            works: list[Awaitable[None]] = [turns(client) for _ in range(5)]
            await asyncio.gather(*works)

    asyncio.run(all_turns())


def be_wrapper(member: Member) -> None:
    """Run a tiny command under `holdoff run`, over and over."""
    job = Path(__file__).with_name("job.py")
    number = 0
    while member.goes_on():
        number += 1
        who = f"{member.name}-job"
        seconds = member.chance.choice([0.2, 1.0, 1.5 * TTL_SECONDS])
        command = [sys.executable, "-I", "-S", str(job), str(member.folder / f"{who}.jsonl"), who]
        done = subprocess.run(
            [
                *(str(BIN / "holdoff"), "run", "--token", WRAPPED, "--wait", "10s"),
                *("--ttl", f"{TTL_SECONDS}s", "--", *command, str(seconds)),
            ],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOLDOFF_ENDPOINT": member.endpoint},
        )
        member.record("ran", number=number, code=done.returncode)


def be_foreign(member: Member) -> None:
    """Take a token's lock with python-redis-lock, knowing nothing of leases."""
    app, token = SHARED.split("/")[1::2]
    with stores.client_of(member.redis_url) as client:
        while member.goes_on():
            one = uuid.uuid4().hex[:12]
            asked_at = boot()
            try:
                lock = redis_lock.Lock(
                    client, f"holdoff:{{{app}}}:{token}", expire=round(LOCK_SECONDS), strict=False
                )
                if lock.acquire(blocking=True, timeout=3):
                    expires = asked_at + LOCK_SECONDS
                    member.record("locked", id=one, token=SHARED, deadline=expires)
                    time.sleep(member.chance.uniform(0, 0.5))
                    member.record("unlocking", id=one)
                    lock.release()
                else:
                    member.record("not-locked", id=one)
            except (redis.RedisError, redis_lock.NotAcquired, OSError) as error:
                member.record("unlocked-badly", id=one, why=type(error).__name__)
            time.sleep(member.chance.uniform(0.5, 2))


def report(member: Member, client: holdoff.Client) -> None:
    """Report errors, each twice, as one does whose first answer was lost."""
    number = 0
    while member.goes_on():
        division = f"{member.name}-{number // EVENTS_A_DIVISION}"
        number += 1
        event = error_event(scope(COUNTED, division, "accounts"), status=400)
        for _ in range(2):
            member.record("reporting", id=event.id, token=COUNTED, division=division)
            try:
                [outcome] = client.record_events([event])
            except holdoff.HoldoffError as error:
                member.record("report-unknown", id=event.id, why=type(error).__name__)
            else:
                name = budget_pb2.EventOutcome.Name(outcome).removeprefix("EVENT_OUTCOME_")
                member.record("reported", id=event.id, outcome=name)
        time.sleep(member.chance.uniform(0.05, 0.3))


def reserve(member: Member, client: holdoff.Client) -> None:
    """Take room for a call, make it at once, and say so; some forget to."""
    while member.goes_on():
        asked_at = boot()
        try:
            reservation = client.reserve(LIMITED, ttl_seconds=RESERVATION_SECONDS)
        except holdoff.HoldoffError as error:
            member.record("no-room", why=type(error).__name__)
            time.sleep(member.chance.uniform(0.1, 0.5))
            continue
        called_at = boot()
        # As with a lease: what was held up for too long must not call any more.
        if boot() >= asked_at + 0.9 * RESERVATION_SECONDS:
            continue
        member.record("called", at=called_at, id=reservation.id, token=LIMITED)
        if member.chance.random() < 0.9:
            with contextlib.suppress(holdoff.HoldoffError):
                client.commit(LIMITED, reservation.id, status=200, age_seconds=boot() - called_at)
        time.sleep(member.chance.uniform(0, 0.2))


def be_counter(member: Member) -> None:
    """Report and reserve."""

    def work(what: Callable[[Member, holdoff.Client], None]) -> Callable[[], None]:
        def run() -> None:
            with holdoff.Client(member.endpoint) as client:
                what(member, client)

        return run

    side_by_side(work(report), work(reserve), work(reserve))


ROLES = {
    "sync": be_sync,
    "async": be_async,
    "wrapper": be_wrapper,
    "foreign": be_foreign,
    "counter": be_counter,
}


def main() -> None:
    """Play one role until told to stop."""
    logging.disable()
    role, name, folder, endpoint, redis_url, seed = sys.argv[1:]
    ROLES[role](Member(name, Path(folder), endpoint, redis_url, seed))


if __name__ == "__main__":
    main()
