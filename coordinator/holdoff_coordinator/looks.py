"""Looks for changes of apps, for all watchers of this replica at once.

Four times a second all watched apps are read, in one round trip per node; without watchers nothing
is read. A watcher is notified only when one of its apps changed. After a look that took long the
pause is long too, so that looks take at most a tenth of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import structlog

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import Stand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdoff_coordinator.hub import Hub
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

LOOK_SECONDS = 0.25
"""How often apps are looked at."""
_PAUSE_FACTOR = 9.0


class Watcher:
    """One watch: which apps it may see, and which of them it has to read.

    Args:
        app: The only app that it watches; None for all.
        knows: Tells whether it may know of an app.
    """

    def __init__(self, app: str | None, knows: Callable[[str], bool]) -> None:
        self.app = app
        self._knows = knows
        self._known: set[str] = set()
        self._stirred = asyncio.Event()
        self._moved: set[str] = set()
        self._failure: Failure | None = None
        self.was_shown = False
        """Whether its apps were read since it joined."""

    def concerns(self, app: str) -> bool:
        """Whether it watches an app that it may see, or could see before.

        If it lost its rights, the next change of the app ends it.
        """
        if self.app not in (None, app):
            return False
        if app not in self._known and self._knows(app):
            self._known.add(app)
        return app in self._known

    def stir(self, *apps: str) -> None:
        """Make it look at some apps."""
        self._moved.update(apps)
        self._stirred.set()

    def fail(self, failure: Failure) -> None:
        """Make it end: an app cannot be read."""
        self._failure = failure
        self._stirred.set()

    async def moved(self, until: float | None) -> list[str]:
        """Wait for a change, or until an instant of the monotonic clock; return what changed.

        Raises:
            Failure: One of its apps cannot be read.
        """
        seconds = None if until is None else max(0.0, until - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stirred.wait()
        self._stirred.clear()
        if self._failure:
            raise self._failure
        moved, self._moved = sorted(self._moved), set()
        return moved


class Looks:
    """The apps that are watched at this replica, and their state at the last look."""

    def __init__(self, scripts: Scripts, hub: Hub) -> None:
        self._scripts = scripts
        self._hub = hub
        self._watchers: set[Watcher] = set()
        self.stands: dict[str, Stand] = {}
        self.began = 0.0
        """When the last look began, by the monotonic clock."""
        self._looking: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        """A watcher came."""
        self._changes: dict[tuple[str, int], asyncio.Task[Any]] = {}

    @contextlib.contextmanager
    def joined(self, watcher: Watcher) -> Iterator[None]:
        """Look at the apps of a watcher in the block; it is notified of all of them first."""
        self._watchers.add(watcher)
        self._wanted.set()
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_forever())
        try:
            yield
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._looking:
                self._looking.cancel()
                self._looking = None
                self.stands.clear()
                self._changes.clear()

    async def changes(self, app: str, after: int) -> list[tuple[int, dict[str, bytes]]] | None:
        """Return an app's changes after a number, as `Scripts.changes`; read once for all.

        Raises:
            Failure: The store did not answer.
        """
        key = app, after
        if (reading := self._changes.get(key)) is None:
            reading = self._changes[key] = asyncio.create_task(self._scripts.changes(app, after))
        try:
            return await asyncio.shield(reading)
        except Failure:
            self._changes.pop(key, None)
            raise

    async def _look_forever(self) -> None:
        while True:
            began = time.monotonic()
            self._wanted.clear()
            try:
                await self._look(began)
            except Failure as failure:
                for watcher in self._watchers:
                    watcher.fail(failure)
            except Exception:
                log.exception("a look at watched apps failed")
            took = time.monotonic() - began
            await asyncio.sleep(_PAUSE_FACTOR * took)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, LOOK_SECONDS - _PAUSE_FACTOR * took)):
                    await self._wanted.wait()

    async def _look(self, began: float) -> None:
        """Look at all apps that are watched, once.

        Raises:
            Failure: The store did not answer.
        """
        watchers = list(self._watchers)
        names: set[str] = {watcher.app for watcher in self._watchers if watcher.app is not None}
        if any(watcher.app is None for watcher in self._watchers):
            names.update(await self._scripts.apps())
        found = await self._scripts.stands(sorted(names))
        moved = {app for app, stand in found.items() if self.stands.get(app) != stand}
        self.stands = {app: one for app, one in found.items() if isinstance(one, Stand)}
        self._changes = {key: one for key, one in self._changes.items() if key[0] not in moved}
        self.began = began
        for watcher in watchers:
            news = moved if watcher.was_shown else found
            apps = [app for app in news if watcher.concerns(app)]
            for stand in map(found.get, apps):
                if isinstance(stand, Failure):
                    watcher.fail(stand)
            if apps or not watcher.was_shown or self._hub.draining:
                watcher.was_shown = True
                watcher.stir(*apps)
