"""The waiters that wait at this replica: heard in batches, woken one by one.

A tick every second tells the store which waiters were heard from and brings back what each
waits for; it repairs any wake-up that was lost. Between ticks a wake-up comes from the store's
channel, and the head of a queue sleeps exactly until its earliest start.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import structlog

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.records import Standing, lease_message, record
from holdoff_coordinator.seldom import warn
from holdoff_coordinator.wakeups import WakeUps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from holdoff.names import TokenName
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

TICK_SECONDS = 1.0
LIVE_US = 5_000_000
"""A waiter that was not heard for longer gets no offer, as common.lua says too."""
BATCH = 200
"""Waiters in one script call, so that no call holds up the store."""
STALE_SECONDS = 15.0
"""A waiter of which no tick told for so long asks by itself, and hears what is wrong."""
ANNOUNCEMENT = "*"
"""Stands for everybody of the app: what all who hold or wait may do has changed."""


class Waiter:
    """One conversation that waits for a lease; the same for a stream and a single call."""

    def __init__(self) -> None:
        self.token: TokenName | None = None
        self.request_hash = ""
        self.standing: Standing | None = None
        self.standing_at = 0.0
        self.must_ask = False
        self.withdrawn = False
        self.failure: Failure | None = None
        self.stirred = asyncio.Event()
        self._heard = time.monotonic()

    def hear(self) -> None:
        """The client itself gave a sign of life."""
        self._heard = time.monotonic()

    @property
    def heard_age_us(self) -> int:
        """Microseconds since the client was heard."""
        return round((time.monotonic() - self._heard) * 1e6)

    @property
    def ask_at(self) -> float:
        """When to ask again without being stirred, by our monotonic clock.

        That is at its earliest start, or when no tick has said for long how it stands.
        """
        start_after = self.standing.start_after_seconds if self.standing else 0.0
        return self.standing_at + min(start_after, STALE_SECONDS)

    def ask(self) -> None:
        """Make the conversation ask the store again."""
        self.must_ask = True
        self.stirred.set()

    def found(self, standing: Standing | None) -> None:
        """Take in what the store says it waits for; None if it does not wait there.

        A request does not wait when it was offered a lease, ended, or lost its place.
        """
        told, self.standing, self.standing_at = self.standing, standing, time.monotonic()
        if standing is None:
            self.ask()
        elif not standing.reason and standing.first:
            if self.heard_age_us <= LIVE_US:
                self.ask()
        elif told is None or standing.signature != told.signature:
            self.stirred.set()

    def fail(self, failure: Failure) -> None:
        """The client said something that makes no sense."""
        self.failure = failure
        self.stirred.set()

    def withdraw(self) -> None:
        """The client waits no more."""
        self.withdrawn = True
        self.stirred.set()


class Hub:
    """All waiters of this replica."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self.wake_ups = WakeUps(scripts.redis)
        self._waiters: defaultdict[str, list[Waiter]] = defaultdict(list)
        self._on_announcement: list[Callable[[str], Awaitable[None]]] = [self.tick]
        self._announced: set[str] = set()
        self._looking: dict[str, asyncio.Task[None]] = {}
        """What follows the announcements of an app, so that they hold up no other wake-up."""
        self.draining = False
        self.store_is_away = False

    def on_announcement(self, look: Callable[[str], Awaitable[None]]) -> None:
        """Have somebody look at an app too when the store announces that something changed."""
        self._on_announcement.append(look)

    @contextlib.contextmanager
    def joined(self, waiter: Waiter, token: TokenName, request_hash: str) -> Iterator[None]:
        """Keep a waiter while its conversation goes on; a request may have several of them."""
        waiter.token, waiter.request_hash = token, request_hash
        self._waiters[request_hash].append(waiter)
        try:
            with self.wake_ups.wanted(token.app):
                yield
        finally:
            self._waiters[request_hash].remove(waiter)
            if not self._waiters[request_hash]:
                del self._waiters[request_hash]

    def _all(self) -> Iterator[Waiter]:
        return itertools.chain.from_iterable(self._waiters.values())

    def check(self) -> None:
        """Say why this replica serves no waiter or follower, so that clients move to another one.

        Raises:
            Failure: DRAINING or STORE_UNAVAILABLE.
        """
        if self.draining:
            raise Failure(
                "DRAINING",
                "this coordinator is shutting down; use another one: positions are kept",
                retry_after_seconds=0.2,
            )
        if self.store_is_away:
            raise Failure(
                "STORE_UNAVAILABLE",
                "the store does not answer this coordinator; use another one: positions are kept",
                retry_after_seconds=1.0,
            )

    def drain(self) -> None:
        """Send everybody away, to another replica or to wait for this one's successor."""
        self.draining = True
        self._stir_all()

    def lose_store(self) -> None:
        """End all waits and follow streams until the store is back."""
        self.store_is_away = True
        self._stir_all()

    def _stir_all(self) -> None:
        for waiter in self._all():
            waiter.stirred.set()

    async def tick_forever(self) -> None:
        """Tick every second; a store that is away only delays the next tick."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.tick()

    async def tick(self, only_app: str | None = None) -> None:
        """Hear all waiters, or those of one app, and stir those whose standing changed."""
        by_app: defaultdict[str, list[tuple[TokenName, Waiter]]] = defaultdict(list)
        for waiter in self._all():
            if waiter.token and only_app in (None, waiter.token.app):
                by_app[waiter.token.app].append((waiter.token, waiter))
        for app, waiters in by_app.items():
            waiters.sort(key=lambda entry: entry[0].token)
            for start in range(0, len(waiters), BATCH):
                try:
                    await self._hear(app, waiters[start : start + BATCH])
                except Failure as failure:  # one app's trouble is its own
                    warn("tick failed", failure.reason, app=app)

    async def _hear(self, app: str, waiters: list[tuple[TokenName, Waiter]]) -> None:
        heard: list[str | int] = []
        for token, waiter in waiters:
            heard += token.token, waiter.request_hash, waiter.heard_age_us
        reply = await self._scripts.run("tick", app, *heard)
        tokens = {token.token: token for token, _ in waiters}
        for token_id, lease_id, flat, *standings in reply.values[0]:
            token = tokens[token_id.decode()]
            with self._scripts.sparing(app, f"tokens/{token.token}"):
                lease = (
                    lease_message(token, lease_id.decode(), record(flat), reply.now_us)
                    if lease_id
                    else None
                )
                for request_hash, found in standings:
                    standing = Standing.read(app, found, reply.now_us, lease) if found else None
                    for waiter in self._waiters.get(request_hash.decode(), ()):
                        if waiter.token == token:
                            waiter.found(standing)

    async def listen_forever(self) -> None:
        """Stir the waiters that the store's wake-ups name."""
        await self.wake_ups.listen_forever(self._woken)

    async def _woken(self, app: str, woken: str) -> None:
        if woken == ANNOUNCEMENT:
            self._announced.add(app)
            if app not in self._looking:
                self._looking[app] = asyncio.create_task(self._look(app))
        for waiter in self._waiters.get(woken, ()):
            waiter.ask()

    async def _look(self, app: str) -> None:
        """Follow the announcements of an app; those that come during a look are one."""
        try:
            while app in self._announced:
                self._announced.discard(app)
                for look in self._on_announcement:
                    await look(app)
        except Failure as failure:  # the next tick makes up for it
            warn("announcement not followed", failure.reason, app=app)
        except Exception:
            log.exception("an announcement was not followed", app=app)
        finally:
            del self._looking[app]
