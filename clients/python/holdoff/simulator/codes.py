"""Authorization codes: what each one was issued for, and who may exchange it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from holdoff.simulator.limits import AUTHORIZATION_CODE_LIFE_MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdoff.simulator.grants import Grant

_CHALLENGE = re.compile(r"[A-Za-z0-9._~-]{43,128}")


class ChallengeMethod(StrEnum):
    """How a code verifier becomes its challenge (RFC 7636)."""

    PLAIN = "plain"
    S256 = "S256"


@dataclass(frozen=True, slots=True)
class Challenge:
    """What the verifier of a code must match.

    Raises:
        ValueError: it is not a challenge as RFC 7636 defines it.
    """

    value: str
    method: ChallengeMethod = ChallengeMethod.PLAIN

    def __post_init__(self) -> None:
        if not _CHALLENGE.fullmatch(self.value):
            raise ValueError("code_challenge: expected 43 to 128 unreserved characters")

    def met_by(self, verifier: str) -> bool:
        """Whether this is the challenge of a verifier."""
        if self.method is ChallengeMethod.S256:
            digest = hashlib.sha256(verifier.encode(errors="surrogatepass")).digest()
            verifier = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        return verifier == self.value


@dataclass(frozen=True, slots=True)
class _Code:
    grant: Grant
    redirect_uri: str
    challenge: Challenge | None
    expiry_ms: int


class Codes:
    """The codes that were issued and not yet exchanged."""

    def __init__(self, new_code: Callable[[], str]) -> None:
        self._new_code = new_code
        self._codes: dict[str, _Code] = {}

    def issue(
        self, grant: Grant, redirect_uri: str, challenge: Challenge | None, now_ms: int
    ) -> str:
        """Issue a code, valid for three minutes and one exchange."""
        value = self._new_code()
        expiry_ms = now_ms + AUTHORIZATION_CODE_LIFE_MS
        self._codes[value] = _Code(grant, redirect_uri, challenge, expiry_ms)
        return value

    def grant(self, value: str) -> Grant | None:
        """Find the grant of a code."""
        code = self._codes.get(value)
        return code.grant if code else None

    def valid(self, value: str, redirect_uri: str, verifier: str, now_ms: int) -> bool:
        """Whether a code may be exchanged: in time, for the same address, with its verifier."""
        code = self._codes.get(value)
        if code is None or now_ms >= code.expiry_ms or redirect_uri != code.redirect_uri:
            return False
        if code.challenge is None:  # a verifier without a challenge hides a downgrade (RFC 9700)
            return not verifier
        return code.challenge.met_by(verifier)

    def exchanged(self, value: str) -> None:
        """Forget a code that was exchanged."""
        del self._codes[value]
