"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Everybody is `anonymous` until there is authentication."""

    identity: str
    peer: str
