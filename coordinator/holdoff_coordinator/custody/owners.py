"""Which token has which grant, across apps: two names for one grant would refresh it too often.

Apps are in different slots of a Cluster, so that no script sees two of them. The index therefore
has a key of its own for each grant, by its fingerprint when it was put:

    claim the key -> put the grant -> see whether the key is still ours

A key says whose it is and since when; what counts is the record of that token. A key whose token
does not have the grant is left from a put that failed or crashed, or is that of a put under way:
for `PENDING_US` it counts, after that the next claim takes it over.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from holdoff.names import TokenName
from holdoff_coordinator.custody.records import read
from holdoff_coordinator.custody.rules import SECOND
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import answered

if TYPE_CHECKING:
    from holdoff_coordinator.scripts import Scripts

PENDING_US: Final = 120 * SECOND
_TRIES: Final = 3
_CLAIM: Final = """
local known = redis.call('GET', KEYS[1]) or ''
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
if known == '' or known == ARGV[2] or known:match('^%S+') == ARGV[1] then
  known = ARGV[1] .. string.format(' %.0f', now)
  redis.call('SET', KEYS[1], known)
end
return {known, string.format('%.0f', now - tonumber(known:match(' (%d+)$') or '0'))}
"""
"""Takes a key that is free, ours, or has the value that the caller found to be left over."""
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class TakenError(Exception):
    """Another token has the grant."""

    def __init__(self, of: TokenName) -> None:
        super().__init__(str(of))
        self.of = of


class Owners:
    """Finds out whether another token has a grant."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts

    async def claim(self, fingerprint: str, name: TokenName) -> str:
        """Claim a grant for a token; return what `release` takes.

        Raises:
            TakenError: Another token has it.
            Failure: TOKEN_BUSY, if another token is being given it; STORE_….
        """
        left, age_us = "", 0
        for _ in range(_TRIES):
            known, age_us = await self._run(_CLAIM, fingerprint, str(name), left)
            other = _owner(known)
            if other == name:
                return known
            if other and await self._has(other, fingerprint):
                raise TakenError(other)
            if 0 <= age_us < PENDING_US:
                break
            left = known
        raise Failure(
            "TOKEN_BUSY",
            "this refresh token is being put under another name: try again later",
            resource=str(name),
            retry_after_seconds=max(1.0, (PENDING_US - age_us) / 1e6),
            metadata={"cause": "PUT"},
        )

    async def held(self, fingerprint: str, name: TokenName) -> str:
        """Return the claim of a token, as `release` takes it; empty if it has none."""
        found = await answered(self._scripts.redis.get(_key(fingerprint)))
        known = (found or b"").decode(errors="replace")
        return known if _owner(known) == name else ""

    async def release(self, fingerprint: str, name: TokenName, claim: str) -> None:
        """Give up a claim, unless the token has the grant, or claimed it again."""
        if not claim or await self._has(name, fingerprint):
            return
        await answered(self._scripts.redis.eval(_RELEASE, 1, _key(fingerprint), claim))
        if await self._has(name, fingerprint):  # by another put meanwhile
            with contextlib.suppress(TakenError):
                await self.claim(fingerprint, name)

    async def _has(self, name: TokenName, fingerprint: str) -> bool:
        held = await read(self._scripts, name)
        return held is not None and fingerprint in {held.record.claim, held.record.fingerprint}

    async def _run(self, script: str, fingerprint: str, *args: str) -> tuple[str, int]:
        found: Any = self._scripts.redis.eval(script, 1, _key(fingerprint), *args)
        known, age_us = await answered(found)
        return known.decode(errors="replace"), int(age_us)


def _key(fingerprint: str) -> str:
    return f"holdoff:{{{fingerprint}}}:owner"


def _owner(known: str) -> TokenName | None:
    with contextlib.suppress(ValueError):
        return TokenName.parse(known.partition(" ")[0])
    return None
