"""What holds for every call: the limits' windows, the counted errors and the blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff.simulator.accounting import Block, Ledger, Rule, Scope, Violation
from holdoff.simulator.answers import Answer, oauth_error
from holdoff.simulator.limits import (
    BLOCK_MS,
    COUNTED_STATUSES,
    DAY_MS,
    ERRORS_PER_HOUR,
    MINUTE_MS,
    SECOND_MS,
)
from holdoff.simulator.switches import BlockAnswer, BlockSchedule, ErrorWindow, Switches

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(slots=True)
class Window:
    """Counts in a fixed window of the clock."""

    length_ms: int
    limit: int
    index: int = -1
    count: int = 0

    def take(self, now_ms: int) -> bool:
        """Count one more if there is room."""
        self._turn(now_ms)
        if self.count >= self.limit:
            return False
        self.count += 1
        return True

    def end_ms(self, now_ms: int) -> int:
        """When the window ends."""
        return (now_ms // self.length_ms + 1) * self.length_ms

    def headers(self, name: str, now_ms: int) -> dict[str, str]:
        """The limit's headers; the reset is in epoch milliseconds (field)."""
        self._turn(now_ms)
        return {
            f"{name}-Limit": str(self.limit),
            f"{name}-Remaining": str(self.limit - self.count),
            f"{name}-Reset": str(self.end_ms(now_ms)),
        }

    def _turn(self, now_ms: int) -> None:
        index = now_ms // self.length_ms
        if index != self.index:
            self.index, self.count = index, 0


class Enforcement:
    """Counts errors, blocks keys and notes broken rules, for all parts of the provider.

    Args:
        keys: the client ids of the apps that exist.
        switches: the behaviours where the real one is not known.
        time_scale: simulated seconds in a real one.
    """

    def __init__(self, keys: Iterable[str], switches: Switches, time_scale: float) -> None:
        self.ledger = Ledger()
        self.switches = switches
        self._keys = frozenset(keys)
        self._time_scale = time_scale

    def count_error(self, status: int, scope: Scope, agent: str, now_ms: int) -> None:
        """Count an answer that is an error in its hour; above the limit, block the key."""
        if status not in COUNTED_STATUSES:
            return
        self.ledger.agent(agent).errors += 1
        if scope.key not in self._keys:
            return  # there is no such app to block
        errors = self.ledger.errors(scope)
        errors.add(now_ms)
        sliding = self.switches.error_window is ErrorWindow.SLIDING
        count = errors.in_last_hour() if sliding else errors.in_clock_hour()
        if count > ERRORS_PER_HOUR:
            length_ms = self._next_block_ms(scope.key)
            self.ledger.blocks.append(Block(scope.key, now_ms, now_ms + length_ms, scope))
            detail = f"{count} errors in an hour: key blocked for {length_ms // MINUTE_MS} min"
            self.violate(Rule.ERROR_LIMIT, scope, agent, now_ms, detail)

    def _next_block_ms(self, key: str) -> int:
        """How long the next block of a key will be."""
        repeats = sum(block.key == key for block in self.ledger.blocks)
        match self.switches.block_schedule:
            case BlockSchedule.FIXED:
                return BLOCK_MS
            case BlockSchedule.DOUBLING_TO_A_DAY:
                return min(BLOCK_MS << repeats, DAY_MS)
            case BlockSchedule.DOUBLING:
                return BLOCK_MS << repeats

    def blocked(self, key: str, agent: str, now_ms: int) -> bool:
        """Whether the key is refused now; what is refused so counts as nothing else."""
        blocked = any(block.key == key and now_ms < block.end_ms for block in self.ledger.blocks)
        self.ledger.agent(agent).refused_while_blocked += blocked
        return blocked

    def block_answer(self) -> Answer:
        """The answer to a key that is blocked."""
        if self.switches.block_answer is BlockAnswer.HTML_503:
            return _BLOCKED_PAGE
        return _BLOCKED

    def violate(self, rule: Rule, scope: Scope, agent: str, now_ms: int, detail: str) -> None:
        """Note that the call which is being answered broke a rule."""
        self.ledger.violation(Violation(rule, now_ms, scope, agent, detail))

    def real_seconds(self, simulated_ms: int) -> float:
        """How long a simulated time takes."""
        return simulated_ms / SECOND_MS / self._time_scale

    def retry_after(self, window: Window, now_ms: int) -> str:
        """Real seconds until the window ends, rounded up so that a retry is not too early."""
        return str(math.ceil(self.real_seconds(window.end_ms(now_ms) - now_ms)))


_BLOCKED = oauth_error(403, "access_denied", "The API key is blocked.")
_BLOCKED_PAGE = Answer(
    503,
    "<!DOCTYPE html><html><head><title>Service Unavailable</title></head>"
    "<body><h1>Service Unavailable</h1></body></html>",
)
