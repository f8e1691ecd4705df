"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Without a certificate everybody is `anonymous`."""

    identity: str
    peer: str


NOBODY = Caller(identity="", peer="")
"""Calls for what a coordinator does by itself."""
