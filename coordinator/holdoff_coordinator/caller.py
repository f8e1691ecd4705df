"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def _everything(_app: str, _token: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Without a certificate everybody is `anonymous`."""

    identity: str
    peer: str
    sees: Callable[[str, str], bool] = _everything
    """Whether it may know of a token of an app: what it may not is no part of its lists' pages."""


NOBODY = Caller(identity="", peer="")
"""Calls for what a coordinator does by itself."""
