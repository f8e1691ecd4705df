"""Credentials: bearer tokens that name an identity. The store holds their hashes alone.

A credential reads `holdoff_ID_SECRET`, so that scanners for secrets can find one that leaked. Its
secret has 256 bits, for which one round of SHA-256 is as good as many (RFC 6819, 5.1.4.1.3).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec
from redis.exceptions import RedisError

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import (
    AUDIT_KEPT,
    CREDENTIAL_CHANGES,
    READ_BATCH,
    store_failure,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from holdoff_coordinator.cluster import StoreClient

KEY = "{holdoff}:credentials"
"""A hash of all credentials by id; it belongs to no app."""
LOOK_AGAIN_SECONDS = 5.0
"""A credential that was revoked is refused so much later, at most."""
_CACHE_MOST = 10_000
_PREFIX = "holdoff_"
_READ = "return {redis.call('HMGET', KEYS[1], unpack(ARGV)), redis.call('TIME')[1]}"
_AUDIT = """
local function audit(kind, identity, by, kept)
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', kept, '*', 'kind', kind, 'identity', by,
    'resource', 'credentials/' .. ARGV[1], 'reason', "of '" .. identity .. "'")
end
"""
_ISSUE = f"""{_AUDIT}
local id, by, kept, identity, digest, life = unpack(ARGV)
local now = tonumber(redis.call('TIME')[1])
local expires = tonumber(life) > 0 and now + tonumber(life) or 0
audit('CREDENTIAL_ISSUED', identity, by, kept)
redis.call('HSET', KEYS[1], id, cjson.encode({{
  identity = identity, digest = digest, issued = now, expires = expires,
}}))
return expires
"""
_REVOKE = f"""{_AUDIT}
local id, by, kept = unpack(ARGV)
local found = redis.call('HGET', KEYS[1], id)
if not found then return nil end
audit('CREDENTIAL_REVOKED', cjson.decode(found).identity, by, kept)
redis.call('HDEL', KEYS[1], id)
return found
"""


class Credential(msgspec.Struct, frozen=True):
    """What the store knows of one; times in s since the epoch, of the store's clock."""

    identity: str
    digest: str
    """SHA-256 of its secret, in hexadecimal."""
    issued: int
    expires: int
    """0 for never."""


class Credentials:
    """Issues, revokes, lists and verifies credentials.

    All methods raise `Failure` (STORE_UNAVAILABLE) when the store does not answer.
    """

    def __init__(self, redis: StoreClient) -> None:
        self._redis = redis
        self._known: dict[bytes, tuple[float, Credential | None, int]] = {}

    async def issue(self, identity: str, life_seconds: int, by: str) -> tuple[str, str, int]:
        """Make one, and note who did.

        Returns:
            Its id; the text to send, which is nowhere kept; and when it expires, in s since the
            epoch, 0 for never.
        """
        # The id has no `_`, which parts the text; the secret may.
        credential_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        try:
            expires = await self._change(_ISSUE, credential_id, by, identity, digest, life_seconds)
        except RedisError as error:
            raise store_failure(error) from error
        return credential_id, f"{_PREFIX}{credential_id}_{secret}", int(expires)

    async def revoke(self, credential_id: str, by: str) -> str | None:
        """Forget one; return whose it was, None if there is none such."""
        try:
            found = await self._change(_REVOKE, credential_id, by)
        except RedisError as error:
            raise store_failure(error) from error
        return _read(found).identity if found else None

    async def _change(self, script: str, credential_id: str, by: str, *facts: str | int) -> Any:
        keys = (KEY, CREDENTIAL_CHANGES)
        return await self._redis.eval(script, 2, *keys, credential_id, by, AUDIT_KEPT, *facts)

    async def list(self) -> list[tuple[str, Credential]]:
        """Return all of them with their ids, by identity."""
        try:
            found = await self._redis.hgetall(KEY)
        except RedisError as error:
            raise store_failure(error) from error
        known = [(_text(credential_id), _read(text)) for credential_id, text in found.items()]
        return sorted(known, key=lambda one: (one[1].identity, one[1].issued, one[0]))

    async def look_again(self, texts: Iterable[str]) -> None:
        """Look up credentials that are in use, to notice at once when one was revoked."""
        keys = [_key(text) for text in texts]
        for start in range(0, len(keys), READ_BATCH):
            batch = keys[start : start + READ_BATCH]
            found, now = await self._look([credential_id for _, credential_id in batch])
            for (key, _), credential in zip(batch, found, strict=True):
                self._known[key] = time.monotonic(), credential, now

    async def verify(self, text: str) -> str:
        """Return the identity of the caller with this credential.

        Raises:
            Failure: CREDENTIAL_REFUSED, CREDENTIAL_EXPIRED or STORE_UNAVAILABLE.
        """
        secret = text.removeprefix(_PREFIX).partition("_")[2]
        digest = hashlib.sha256(secret.encode(errors="replace")).hexdigest()
        key, credential_id = _key(text)
        looked_at, credential, now = self._known.get(key, (0.0, None, 0))
        if not looked_at or time.monotonic() - looked_at > LOOK_AGAIN_SECONDS:
            (credential,), now = await self._look([credential_id])
            if len(self._known) >= _CACHE_MOST:
                self._known.clear()
            self._known[key] = time.monotonic(), credential, now
        if (
            credential is None
            or not text.startswith(_PREFIX)
            or not hmac.compare_digest(credential.digest, digest)
        ):
            raise Failure(
                "CREDENTIAL_REFUSED",
                "this credential is not known here: it was revoked or mistyped, or another "
                "coordinator issued it; an administrator issues one with: "
                "holdoff-coordinator token issue IDENTITY",
            )
        identity = f"credential:{credential.identity}"
        if 0 < credential.expires <= now:
            raise Failure(
                "CREDENTIAL_EXPIRED",
                f"this credential of {credential.identity!r} has expired; an administrator issues "
                f"another with: holdoff-coordinator token issue {credential.identity}",
                metadata={"identity": identity},
            )
        return identity

    async def _look(self, ids: Sequence[str]) -> tuple[tuple[Credential | None, ...], int]:
        try:
            found, now = await self._redis.eval(_READ, 1, KEY, *ids)
        except RedisError as error:
            raise store_failure(error) from error
        return tuple(_read(one) if one else None for one in found), int(now)


def _key(text: str) -> tuple[bytes, str]:
    """Return the key of a credential in our cache, and its id."""
    credential_id = text.removeprefix(_PREFIX).partition("_")[0]
    # No id is that long: the lookup of a longer one finds nothing.
    return hashlib.sha256(text.encode(errors="replace")).digest(), credential_id[:80]


def _read(text: bytes | str) -> Credential:
    return msgspec.json.decode(text, type=Credential)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
