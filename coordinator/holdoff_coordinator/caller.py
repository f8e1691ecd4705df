"""Who calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ANONYMOUS = "anonymous"


def _everything(*_: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Without a certificate everybody is `anonymous`."""

    identity: str
    peer: str
    sees: Callable[[str, str], bool] = _everything
    """Whether it may know of a token of an app; its lists omit other tokens. An empty token means
    all tokens of the app."""
    knows: Callable[[str], bool] = _everything
    """Whether it may see something of an app."""
    speaks_for: Callable[[str], bool] = _everything
    """Whether its reports may stop a whole app, and not only one token."""

    def sees_scope(self, app: str, token: str, *, is_whole: bool, users: Iterable[str]) -> bool:
        """Whether it may know of a scope: of a token, of a whole app, or one that tokens share.

        A shared scope is visible to callers that may see one of the tokens that use it.
        """
        if token:
            return self.sees(app, token)
        if is_whole:
            return self.knows(app)
        return self.sees(app, "") or any(self.sees(app, user) for user in users)

    @property
    def account(self) -> str:
        """The name under which its use is counted: the identity, or without one the host."""
        return self.peer.rpartition(":")[0] if self.identity == ANONYMOUS else self.identity


def _nothing(*_: str) -> bool:
    return False


ANYONE = Caller("", "", _nothing)
"""For texts that all callers share: it sees only what every caller may see."""
NOBODY = Caller(identity="", peer="")
"""Calls for what a coordinator does by itself."""
