"""The state of each grant, and the tokens that were issued by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdoff.simulator.seeds import Seed


@dataclass(slots=True)
class Grant:
    """A seed's state. Its refresh tokens are numbered in the order of their issue."""

    seed: Seed
    newest: int = 0
    """Number of the latest refresh token."""
    newest_received: int = 0
    """Number of the latest one whose answer was not lost on request."""
    oldest_alive: int = 0
    """Under strict rotation the tokens before this one are dead."""
    last_sent_ms: int | None = None
    """When the last byte of the last access token left."""
    sending: bool = False

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
    issue_ms: int


@dataclass(frozen=True, slots=True)
class AccessToken:
    """An access token that was issued."""

    grant: Grant
    number: int
    """Number of the refresh token that was issued with it."""
    expiry_ms: int
