"""The one duty that a single replica does: settling tokens whose time has come.

Waiters look after their own tokens. The sweeper is for what nobody waits for here: it wakes
users of python-redis-lock when a cooldown ends, mirrors locks, and ends leases that ran out.
python-redis-lock itself decides who sweeps, for efficiency only: two sweepers do no harm.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import redis_lock
import structlog
from redis.exceptions import RedisError

from holdoff_coordinator.failures import Failure

if TYPE_CHECKING:
    from redis import Redis

    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

# The library warns whenever another replica sweeps, which is as it should be.
logging.getLogger(redis_lock.logger_for_acquire.name).setLevel(logging.ERROR)

PERIOD_SECONDS = 0.5
LOCK_NAME = "holdoff:sweeper"
LOCK_EXPIRE_SECONDS = 3
TOKENS_A_CALL = 100


class Sweeper:
    """Sweeps while it holds the lock, which it prolongs itself at each round."""

    def __init__(self, scripts: Scripts, lock_client: Redis) -> None:
        self._scripts = scripts
        self._lock = redis_lock.Lock(lock_client, LOCK_NAME, expire=LOCK_EXPIRE_SECONDS)

    async def sweep_forever(self) -> None:
        """Sweep every half second; a store that is away only delays the next round."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                if await asyncio.to_thread(self._is_mine):
                    await self.sweep()
            except (Failure, RedisError) as error:
                log.warning("sweep failed", error=type(error).__name__)

    def _is_mine(self) -> bool:
        try:
            self._lock.extend()
        except redis_lock.NotAcquired:
            return bool(self._lock.acquire(blocking=False))
        return True

    async def sweep(self) -> None:
        """Settle what is due in all apps that are not idle; one app's trouble is its own."""
        for app in await self._scripts.busy_apps():
            try:
                await self._scripts.run("sweep", app, TOKENS_A_CALL)
            except Failure as failure:
                log.warning("sweep failed", app=app, reason=failure.reason)

    def stop(self) -> None:
        """Let another replica sweep at once."""
        try:
            self._lock.release()
        except (redis_lock.NotAcquired, RedisError):
            log.debug("sweeper's lock was not held")
