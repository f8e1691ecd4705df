"""Holding the store's clock against this machine's boot clock. Pure: no I/O, no clock.

Leases and cooldowns are counted by the store's TIME. If that clock jumps forward, leases
expire while their holders go on; if it jumps back, cooldowns last too long. The boot clock
(CLOCK_BOOTTIME) never jumps, so that a change of the difference between the two beyond
`TOLERANCE_US` is a jump of the store's clock.
"""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE_US = 1_000_000
DRIFT = 500e-6  # what NTP may slew at most: 500 ppm


@dataclass(frozen=True, slots=True)
class Offset:
    """Bounds of (store clock - boot clock) in µs, and when they were measured (boot µs)."""

    low_us: int
    high_us: int
    at_us: int


class StoreClock:
    """What this replica knows about the store's clock."""

    def __init__(self) -> None:
        self._offset: Offset | None = None

    def estimate_us(self, boot_us: int) -> int | None:
        """Estimate the store's time at `boot_us`; None before the first measurement."""
        if self._offset is None:
            return None
        return boot_us + (self._offset.low_us + self._offset.high_us) // 2

    def observe(self, sent_us: int, received_us: int, store_us: int) -> int:
        """Take in one answer of the store; return by how many µs its clock jumped, or 0.

        The store read its clock somewhere between `sent_us` and `received_us` (boot clock), so
        that an answer that was slow says little, and never raises a false alarm.
        """
        low, high = store_us - received_us, store_us - sent_us
        known, self._offset = self._offset, Offset(low, high, received_us)
        if known is None:
            return 0
        slack = round((received_us - known.at_us) * DRIFT)
        known_low, known_high = known.low_us - slack, known.high_us + slack
        if low <= known_high and high >= known_low:
            self._offset = Offset(max(low, known_low), min(high, known_high), received_us)
            return 0
        jump = low - known_high if low > known_high else high - known_low
        return jump if abs(jump) > TOLERANCE_US else 0
