"""What goes on and on is written down once in a while, with how often it came meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Hashable

log = structlog.get_logger()

SECONDS = 60.0
_MOST = 1_000


class Seldom:
    """Knows what was written down when; the same key is due once in `SECONDS`."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[float, int]] = {}

    def due(self, key: Hashable) -> int | None:
        """Return how often the key came since it was due, or None while it is not due again."""
        now = time.monotonic()
        at, more = self._known.get(key, (now - SECONDS, 0))
        if now - at < SECONDS:
            self._known[key] = at, more + 1
            return None
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = now, 0
        return more


_warnings = Seldom()


def warn(event: str, kind: str, **facts: Any) -> None:
    """Log a warning, once in `SECONDS` for each event and kind of it."""
    more = _warnings.due((event, kind))
    if more is not None:
        log.warning(event, kind=kind, **facts, **({"more_like_it": more} if more else {}))
