"""Looks at the store each second: does it answer, does its clock keep time, has it its data?

So every replica knows the clock of every node, and the store's epoch, also before it serves its
first caller of an app.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from redis.exceptions import RedisError

from holdoff_coordinator.cluster import Cluster
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import answered
from holdoff_coordinator.seldom import warn
from holdoff_coordinator.store import EPOCH_KEY, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

    from holdoff_coordinator.scripts import Scripts
    from holdoff_coordinator.store import Epoch

log = structlog.get_logger()

_ANSWER_SECONDS: Final = 2.0
APPS_A_STEP: Final = 64


class StoreWatch:
    """What this replica knows of the store, beside its records.

    Args:
        scripts: What runs on the store.
        open_store: Checks the store, and returns its epoch.
    """

    def __init__(self, scripts: Scripts, open_store: Callable[[], Awaitable[Epoch]]) -> None:
        self._scripts = scripts
        self._open_store = open_store
        self._epoch: bytes | None = None
        self._reported: bytes | None = None
        """The epoch of the last loss in the log."""
        self._comparing = asyncio.Lock()
        self._jumps = 0
        self._due: dict[str, tuple[str, ...]] = {}
        """What to run for which apps, since something happened to the store."""

    async def open(self) -> None:
        """Open the store.

        Raises:
            StoreError: It cannot be used.
            Failure: It did not answer.
        """
        epoch = await self._open_store()
        if epoch.lost:
            self._scripts.data_is_lost()
        self._epoch = await answered(self._scripts.redis.get(EPOCH_KEY))

    async def look(self) -> bool:
        """Look at the clocks and at the epoch; tell whether the store answers.

        Of a Cluster it is enough that one node answers.
        """
        store = self._scripts.redis
        nodes = store.known_nodes() if isinstance(store, Cluster) else [store]
        answers = await asyncio.gather(*map(self._look_at_clock, nodes))
        if any(answers):
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self.compare_epoch()
                    await self._declare_jumps()
            except (Failure, RedisError, StoreError, TimeoutError) as error:
                warn("the store was not looked at", type(error).__name__, why=str(error))
        return any(answers)

    async def compare_epoch(self) -> None:
        """Hold back the leases of all apps where the store is not the one that it was.

        Raises:
            Failure: The store did not answer.
            StoreError: It cannot be used.
        """
        async with self._comparing:
            found = await answered(self._scripts.redis.get(EPOCH_KEY))
            if found == self._epoch:
                return
            if found is None or found != self._reported:
                log.error("the store lost its data: no new leases at first", epoch=repr(found))
                self._reported = found
            self._scripts.data_is_lost()
            held = "quarantine", "the store lost its data", "DATA"
            # Before the new epoch is known: a look that ends here is repeated.
            self._due.update(dict.fromkeys(await self._scripts.apps(), held))
            await self.open()
            await self._catch_up()

    async def _declare_jumps(self) -> None:
        """Hold back the leases of all apps after a clock jumped, before they are asked for."""
        jumps = self._scripts.jumps
        if jumps != self._jumps:
            self._due = dict.fromkeys(await self._scripts.apps(), ("upgrade",)) | self._due
            self._jumps = jumps
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Run what is due, some apps at a time; the next look does the rest."""
        while self._due:
            due = dict(list(self._due.items())[:APPS_A_STEP])
            for app in due:  # behind all others, should it fail
                self._due[app] = self._due.pop(app)
            failed: list[str] = []
            for name, *args in {*due.values()}:
                some = [app for app in due if due[app] == (name, *args)]
                failed += await self._scripts.run_each(some, name, *args)
            for app in due.keys() - failed:
                if self._due.get(app) == due[app]:  # else something else happened meanwhile
                    del self._due[app]
            if failed:
                return

    async def _look_at_clock(self, node: Redis) -> bool:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._scripts.look_at_clock(node)
        except (Failure, TimeoutError):
            return False
        return True
