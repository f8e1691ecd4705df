"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ANONYMOUS = "anonymous"


def _everything(_app: str, _token: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Without a certificate everybody is `anonymous`."""

    identity: str
    peer: str
    sees: Callable[[str, str], bool] = _everything
    """Whether it may know of a token of an app: what it may not is no part of its lists' pages."""
    knows: Callable[[str], bool] = lambda _: True
    """Whether it may know of an app, or of a token of it; as the access file says now."""

    @property
    def account(self) -> str:
        """Whose use of a coordinator is counted together: the identity, or without one the host."""
        return self.peer.rpartition(":")[0] if self.identity == ANONYMOUS else self.identity


NOBODY = Caller(identity="", peer="")
"""Calls for what a coordinator does by itself."""
