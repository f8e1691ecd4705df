"""Stand-ins: what a job has in place of an access token and a refresh token. Pure.

A stand-in is worthless anywhere but at the gateway that issued it, and dies with its key. It says
which token it is for only to who has the key.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Final

PREFIX: Final = "holdoff-si."
_RANDOM_BYTES: Final = 16
_MOST_CHARACTERS: Final = 200


@dataclass(frozen=True, slots=True)
class StandIns:
    """Issues and recognises the stand-ins of one token and audience."""

    token: str
    audience: str
    """The upstream that they are for."""
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def issue(self) -> str:
        """Return a new one; old ones stay valid."""
        salt = secrets.token_bytes(_RANDOM_BYTES)
        return f"{PREFIX}{_text(salt)}.{_text(self._mark(salt))}"

    def is_ours(self, text: str) -> bool:
        """Tell whether a text is one that was issued with this key, in constant time."""
        salt, dot, mark = text[:_MOST_CHARACTERS].removeprefix(PREFIX).partition(".")
        if not text.startswith(PREFIX) or not dot or len(text) > _MOST_CHARACTERS:
            return False
        try:
            raw = base64.urlsafe_b64decode(f"{salt}==".encode())
            return hmac.compare_digest(_text(self._mark(raw)).encode(), mark.encode())
        except (ValueError, UnicodeEncodeError):
            return False

    def _mark(self, salt: bytes) -> bytes:
        about = f"{self.token}\0{self.audience}".encode()
        return hmac.digest(self.key, salt + about, "sha256")


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
