"""Resume tokens: the encrypted positions of a watcher in the changes of each app.

They contain names, epochs and counters, which reveal more than the watcher may see. All replicas
share one key, which is in the store. The cipher is AES-SIV, which needs no nonce.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from holdoff_coordinator.failures import invalid
from holdoff_coordinator.scripts import Position

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdoff_coordinator.scripts import Scripts

_FORMAT = b"holdoff resume token 1"
_LEAST_BYTES = 17
"""Of a resume token: the tag has 16, and it is not empty."""


def sealed_of(text: str) -> bytes:
    """Return the resume token that a caller sent, still encrypted.

    Raises:
        Failure: INVALID_FIELD.
    """
    try:
        sealed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        sealed = b"?"
    if text and len(sealed) < _LEAST_BYTES:
        raise invalid(
            "resume_token", "is not a resume token of this service; omit it to start a new watch"
        )
    return sealed


class ResumeTokens:
    """Writes and reads resume tokens with one key."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESSIV(key)

    @classmethod
    async def of_store(cls, scripts: Scripts) -> ResumeTokens:
        """Take the key that the replicas of a store share; the first one makes it.

        Raises:
            Failure: STORE_UNAVAILABLE.
        """
        return cls(await scripts.shared_key("resume-key", AESSIV.generate_key(512)))

    def write(self, positions: Iterable[tuple[str, Position]]) -> str:
        """Encrypt the positions of a watcher."""
        text = ",".join(f"{app}:{at.epoch}:{at.number}" for app, at in positions)
        if not text:
            return ""
        sealed = self._cipher.encrypt(text.encode(), [_FORMAT])
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def read(self, sealed: bytes) -> dict[str, Position]:
        """Decrypt the positions of a watcher: none, if there is no token or it has another key."""
        try:
            positions = self._cipher.decrypt(sealed, [_FORMAT]).decode()
        except InvalidTag:  # or nothing was sealed
            return {}
        parts = (part.split(":") for part in positions.split(","))
        return {app: Position(epoch, int(number)) for app, epoch, number in parts}
