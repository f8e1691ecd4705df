"""The one duty that a single replica does: settling tokens whose time has come.

Waiters look after their own tokens. The sweeper is for what nobody waits for here: it wakes
users of python-redis-lock when a cooldown ends, mirrors locks, and ends leases that ran out.
python-redis-lock itself decides who sweeps, for efficiency only: two sweepers do no harm.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import redis_lock
import structlog
from redis.exceptions import OutOfMemoryError, RedisError

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdoff_coordinator.cluster import StoreClient
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

# The library warns whenever another replica sweeps, which is as it should be.
logging.getLogger(redis_lock.logger_for_acquire.name).setLevel(logging.ERROR)

PERIOD_SECONDS = 0.5
LOCK_NAME = "{holdoff:sweeper}"
"""The lock and its signal are two keys, which a Cluster must have in one slot."""
LOCK_EXPIRE_SECONDS = 3
TOKENS_A_CALL = 100


class _Blocking:
    """The store's one client, for a library that blocks: its calls run in the event loop.

    So the library meets every kind of store, and there is one way to open it.
    """

    def __init__(self, store: StoreClient, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop

    def __getattr__(self, command: str) -> Callable[..., Any]:
        async def run(*args: Any, **options: Any) -> Any:
            return await getattr(self._store, command)(*args, **options)

        def call(*args: Any, **options: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(run(*args, **options), self._loop).result()

        return call


def _evaluates(script: bytes) -> Callable[..., Any]:
    def evaluate(*, client: _Blocking, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return client.eval(script, len(keys), *keys, *args)

    return staticmethod(evaluate)


class _Lock(redis_lock.Lock):  # type: ignore[misc] # the library has no types
    """The library's lock, with its scripts for our client instead of for the first one it saw."""

    unlock_script = _evaluates(redis_lock.UNLOCK_SCRIPT)
    extend_script = _evaluates(redis_lock.EXTEND_SCRIPT)

    @classmethod
    def register_scripts(cls, _: _Blocking) -> None:
        """They are registered."""


class Sweeper:
    """Sweeps while it holds the lock, which it prolongs itself at each round.

    Make it in the event loop in which it is to sweep.
    """

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        client = _Blocking(scripts.redis, asyncio.get_running_loop())
        self._asked: asyncio.Task[bool] | None = None
        self._lock = _Lock(client, LOCK_NAME, expire=LOCK_EXPIRE_SECONDS, strict=False)

    async def sweep_forever(self) -> None:
        """Sweep every half second; a store that is away only delays the next round."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                self._asked = asyncio.create_task(asyncio.to_thread(self._is_mine))
                if await asyncio.shield(self._asked):
                    await self.sweep()
            except (Failure, RedisError) as error:
                warn("sweep failed", type(error).__name__)

    def _is_mine(self) -> bool:
        try:
            self._lock.extend()
        except redis_lock.NotAcquired:
            try:
                return bool(self._lock.acquire(blocking=False))
            except OutOfMemoryError:  # leases that ran out must end all the same
                return True
        return True

    async def sweep(self) -> None:
        """Settle what is due in all apps that are not idle; one app's trouble is its own."""
        await self._scripts.run_each(await self._scripts.busy_apps(), "sweep", TOKENS_A_CALL)

    async def stop(self) -> None:
        """Let another replica sweep at once."""
        if self._asked is not None:  # a thread cannot be cancelled
            await asyncio.gather(self._asked, return_exceptions=True)
        try:
            await asyncio.to_thread(self._lock.release)
        except (redis_lock.NotAcquired, RedisError):
            log.debug("sweeper's lock was not held")
