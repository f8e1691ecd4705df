"""Which grants this replica refreshes, and when.

Those that something uses here, whenever they are due; and those that nothing uses, once most of
the idle life of their refresh token is over. All replicas do so, and the store gives one the right.
While nothing is used and nothing is due, this costs one read for each app a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import structlog

from holdoff.names import TokenName
from holdoff_coordinator.custody.records import ClaimIdle, ask
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US, earliest_us
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterator

    from holdoff_coordinator.custody.refreshing import Next, Refresher
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

LOOK_AGAIN_SECONDS: Final = 60.0
"""How often a grant in use is looked at, at least: it may be replaced."""
UNDER_WAY_SECONDS: Final = 2.0
"""The same while another replica refreshes it."""
HELD_SECONDS: Final = 1.0
"""How seldom, at least, while something else holds it: that may end at no certain time."""
TROUBLE_SECONDS: Final = 5.0
IDLE_SECONDS: Final = 60.0
IDLE_AT_ONCE: Final = 10
"""Grants that nothing uses, refreshed in one round of an app, one after the other."""
IDLE_AGAIN_US: Final = 600 * SECOND
SPOOL_SECONDS: Final = 5.0
STORE_SECONDS: Final = 5.0
"""How long a coordinator that stops tries to store an answer."""
_REPORT: Final = "a fault of Holdoff: report it"


def is_held(found: Next) -> bool:
    """Tell whether something besides the grant itself prevents a request."""
    return found.wait_us is not None and found.why not in {"DUE", "COOLING", "REFRESHING"}


def pause_after(found: Next) -> float:
    """Return after how many seconds to look again."""
    if found.wait_us is None:
        return LOOK_AGAIN_SECONDS
    seconds = found.wait_us / SECOND
    match found.why:
        case "DUE" | "COOLING":
            return min(seconds, LOOK_AGAIN_SECONDS)
        case "REFRESHING":
            return min(seconds, UNDER_WAY_SECONDS)
    return min(max(seconds, HELD_SECONDS), LOOK_AGAIN_SECONDS)


async def _ended(tasks: Collection[asyncio.Task[Any]], seconds: float) -> None:
    """Wait for tasks, but not for long."""
    if tasks:
        await asyncio.wait([*tasks], timeout=seconds)


class Duty:
    """Refreshes what is due, by a `Refresher`."""

    def __init__(self, scripts: Scripts, refresher: Refresher) -> None:
        self._scripts = scripts
        self._refresher = refresher
        self._users: Counter[TokenName] = Counter()
        self._keepers: dict[TokenName, asyncio.Task[None]] = {}
        self._wake: dict[TokenName, asyncio.Event] = {}
        self._held: set[TokenName] = set()
        """Those in use that something else held when they were looked at."""
        self._refreshing: set[asyncio.Task[float]] = set()
        self._restoring: set[asyncio.Task[None]] = set()
        self._presenting: set[TokenName] = set()
        self._is_draining = False

    @contextlib.contextmanager
    def in_use(self, name: TokenName) -> Iterator[None]:
        """Keep a token's access token fresh inside the block."""
        self._users[name] += 1
        self._keep(name)
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self.look(name)

    def look(self, name: TokenName) -> None:
        """Look at a token now, since something about it changed."""
        if name in self._wake:
            self._wake[name].set()

    def look_at_held(self, app: str) -> None:
        """Look at the tokens of an app that something else held: it may have ended."""
        for name in self._held:
            if name.app == app:
                self.look(name)

    def present(self, name: TokenName, sealed: bytes) -> None:
        """Take in what a client kept of a grant; one at a time for each token."""
        if name not in self._presenting and not self._is_draining:
            self._presenting.add(name)
            task = asyncio.create_task(self._present(name, sealed))
            self._restoring.add(task)
            task.add_done_callback(self._restoring.discard)

    async def _present(self, name: TokenName, sealed: bytes) -> None:
        try:
            await self._refresher.take(name, sealed)
        except Failure as failure:
            warn(
                "what a client kept of a grant was not presented",
                failure.reason,
                token=str(name),
                remedy=failure.message,
            )
        except Exception:
            log.exception(
                "what a client kept of a grant was not presented", token=str(name), remedy=_REPORT
            )
        finally:
            self._presenting.discard(name)

    def new_life(self, app: str) -> None:
        """Present our answers to a store that may have lost some of an app."""
        task = asyncio.create_task(self._refresher.restore(app))
        self._restoring.add(task)
        task.add_done_callback(self._restoring.discard)

    async def drain(self, seconds: float) -> None:
        """Finish the refreshes that are under way, and start none.

        A request ends within its right, however short `seconds` is. Its answer is in the spool, and
        does not wait for a store that is away.
        """
        self._is_draining = True
        self._refresher.start_none()
        for name in self._wake:
            self.look(name)
        await asyncio.gather(
            _ended(self._refreshing, seconds),
            _ended(self._refresher.requests, TAKEOVER_US / SECOND),
        )
        await _ended(self._refreshing, STORE_SECONDS)
        for task in (*self._keepers.values(), *self._refreshing, *self._restoring):
            task.cancel()  # what is left of a request goes on in its sender

    def _keep(self, name: TokenName) -> None:
        if name not in self._keepers and not self._is_draining:
            self._wake[name] = asyncio.Event()
            self._keepers[name] = asyncio.create_task(self._keep_fresh(name))

    async def _keep_fresh(self, name: TokenName) -> None:
        """Refresh a token whenever it is due, while something uses it."""
        wake = self._wake[name]
        try:
            while name in self._users and not self._is_draining:
                wake.clear()
                seconds = await self._begin(self._refresh(name))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await wake.wait()
        finally:
            del self._keepers[name], self._wake[name]
            self._held.discard(name)

    async def _begin(self, refresh: Coroutine[None, None, float]) -> float:
        """Refresh, to the end also if this task is cancelled."""
        task = asyncio.create_task(refresh)
        self._refreshing.add(task)
        task.add_done_callback(self._refreshing.discard)
        return await asyncio.shield(task)

    async def _refresh(self, name: TokenName, *, idle: bool = False) -> float:
        """Refresh a token if it is due; return after how many seconds to look again."""
        try:
            found = await (
                self._refresher.refresh(name, earliest_us)
                if idle
                else self._refresher.refresh(name)
            )
        except Failure as failure:
            warn("a refresh failed", failure.reason, token=str(name), remedy=failure.message)
            return TROUBLE_SECONDS
        except Exception:
            log.exception("a refresh failed", token=str(name), remedy=_REPORT)
            return LOOK_AGAIN_SECONDS
        if is_held(found) and name in self._keepers:
            self._held.add(name)
        else:
            self._held.discard(name)
        return pause_after(found)

    async def refresh_idle_forever(self) -> None:
        """Refresh the grants that nothing uses and whose refresh token would expire."""
        while True:
            await asyncio.sleep(IDLE_SECONDS)
            if not self._is_draining:
                with contextlib.suppress(Failure):  # which was reported
                    await self.refresh_idle()
                    await self._refresher.reseal()

    async def refresh_idle(self) -> None:
        """Do one round of it.

        Raises:
            Failure: The store does not answer.
        """
        for app in await self._scripts.apps_due("idling"):
            claim = ClaimIdle(most=IDLE_AT_ONCE, again_us=IDLE_AGAIN_US)
            for token in (await ask(self._scripts, app, claim)).tokens:
                name = TokenName(app, token)
                if name not in self._users and not self._is_draining:
                    await self._begin(self._refresh(name, idle=True))

    async def adopt_forever(self) -> None:
        """Store the answers in the spool, also of senders that outlived a coordinator."""
        looks_us = 0
        while True:
            is_left = True
            try:
                is_left = await self._refresher.adopt()
            except Failure as failure:
                warn(
                    "answers in the spool are not stored yet",
                    failure.reason,
                    remedy=failure.message,
                )
            # A sender that was started before this coordinator ends within that time.
            looks_us += round(SPOOL_SECONDS * SECOND)
            is_soon = is_left or looks_us <= TAKEOVER_US
            await asyncio.sleep(SPOOL_SECONDS if is_soon else LOOK_AGAIN_SECONDS)
