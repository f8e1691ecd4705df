"""The state of each grant, and the tokens that were issued by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdoff.simulator.seeds import Seed


@dataclass(slots=True)
class Grant:
    """A seed's state. Its refresh tokens are numbered in the order of their issue."""

    seed: Seed
    issued_ms: list[int] = field(default_factory=list)
    """When each refresh token was issued, by its number."""
    newest_received: int = 0
    """Number of the latest one whose answer was not lost on request."""
    first_used_ms: dict[int, int] = field(default_factory=dict)
    """When each one that was used was used first, by its number."""
    newest_used: int = 0
    first_of_chain: int = 0
    """Number of the one that the latest authorization issued."""
    oldest_valid: int = 0
    """The chain up to this token was revoked, with its access tokens."""
    last_sent_ms: int | None = None
    """When the last byte of the last access token left."""
    sending: bool = False

    @property
    def newest(self) -> int:
        """Number of the latest refresh token."""
        return len(self.issued_ms) - 1

    def use(self, number: int, now_ms: int) -> None:
        """Note that a refresh token, or the access token that came with it, was used."""
        self.first_used_ms.setdefault(number, now_ms)
        self.newest_used = max(self.newest_used, number)

    def revoke(self) -> None:
        """Revoke all tokens of the chain."""
        self.oldest_valid = self.newest + 1

    def gap_ms(self, now_ms: int) -> int | None:
        """Time since the last byte of the last access token; None before the first."""
        if self.sending:
            return 0
        return None if self.last_sent_ms is None else now_ms - self.last_sent_ms


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token that was issued."""

    grant: Grant
    number: int


@dataclass(frozen=True, slots=True)
class AccessToken:
    """An access token that was issued."""

    grant: Grant
    number: int
    """Number of the newest refresh token at its issue."""
    expiry_ms: int
    implicit: bool = False
    """Whether it came without a refresh token."""

    def valid(self, now_ms: int) -> bool:
        """Whether it is neither expired nor revoked."""
        return now_ms < self.expiry_ms and self.number >= self.grant.oldest_valid
