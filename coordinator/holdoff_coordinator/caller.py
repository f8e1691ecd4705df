"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Without a certificate everybody is `anonymous`."""

    identity: str
    peer: str
