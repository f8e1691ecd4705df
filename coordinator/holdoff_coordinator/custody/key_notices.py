"""Notices of the master keys that each live replica has, in the store.

A notice ends by the store's clock unless its replica renews it. A key encrypts only if all notices
have it. Replicas without keys open nothing anyway, and give no notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import answered
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from holdoff_coordinator.custody.sealing import MasterKey
    from holdoff_coordinator.scripts import Scripts

NOTICES: Final = "{holdoff}:custody-keys"
"""By a random id of the replica: until when, and the notice."""
GIVEN_SECONDS: Final = 10.0
KEPT_SECONDS: Final = 45
_WITHDRAW_SECONDS: Final = 1.0
_EXCHANGE: Final = """#!lua flags=allow-oom
local now, kept = tonumber(redis.call('TIME')[1]), tonumber(ARGV[3])
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f ', now + kept) .. ARGV[2])
end
local others, flat = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local ends, notice = flat[i + 1]:match('^(%d+) (.*)$')
  ends = tonumber(ends or '0')
  if ends <= now or ends > now + kept then
    redis.call('HDEL', KEYS[1], flat[i])
  elseif flat[i] ~= ARGV[1] then
    others[#others + 1] = notice
  end
end
return others
"""
"""Gives a notice, or with an empty one takes it back; returns those of the others."""


class Notice(msgspec.Struct, frozen=True):
    """The keys of a replica."""

    replica: str
    """Its name, for people."""
    checks: dict[str, str]
    """Ids of its keys, with the `check` of each."""


class KeyNotices:
    """Gives the notice of this replica, and reads those of the others.

    Args:
        scripts: The store.
        keys: Returns the keys of this replica by id.
        replica: The name of this replica, for people.
    """

    def __init__(
        self, scripts: Scripts, keys: Callable[[], Mapping[str, MasterKey]], replica: str
    ) -> None:
        self._scripts = scripts
        self._keys = keys
        self._replica = replica
        self._id = uuid.uuid4().hex

    async def exchange(self) -> Sequence[Notice]:
        """Tell which keys we have, and return what the other live replicas told.

        Raises:
            Failure: STORE_….
        """
        checks = {key.id: key.check for key in self._keys().values()}
        notice = msgspec.json.encode(Notice(self._replica, checks)) if checks else b""
        return [msgspec.json.decode(one, type=Notice) for one in await self._run(notice)]

    async def withdraw(self) -> None:
        """Count as live no more."""
        with contextlib.suppress(Failure, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                await self._run(b"")

    async def give_forever(self) -> None:
        """Renew the notice."""
        while True:
            try:
                await self.exchange()
            except Failure as failure:
                warn(
                    "the notice of the custody keys was not renewed",
                    failure.reason,
                    remedy="check the store; keys cannot be rotated until it answers",
                )
            await asyncio.sleep(GIVEN_SECONDS)

    async def _run(self, notice: bytes) -> Sequence[bytes]:
        arguments: Any = (self._id, notice, KEPT_SECONDS)
        found: Sequence[bytes] = await answered(
            self._scripts.redis.eval(_EXCHANGE, 1, NOTICES, *arguments)
        )
        return found
