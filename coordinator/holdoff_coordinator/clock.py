"""Comparing the store's clock with this machine's boot clock. Pure: no I/O, no clock.

Leases, cooldowns and windows are counted by the store's TIME. Where that clock runs fast or is set
forward, they would end too early. The boot clock (CLOCK_BOOTTIME) is never set, so that the
difference between the two shows how much the store's clock gained. A script takes something for
over only when both clocks say so (`sure` in common.lua), and more than `TOLERANCE_US` gained within
the longest hold starts the quarantine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from copy import deepcopy
from dataclasses import dataclass

TOLERANCE_US = 1_000_000
SLACK_US = 3_600_000_000
"""A step forward of more than this may have made the store drop keys that matter, since it expires
them by its own clock."""
DRIFT = 500e-6  # what NTP may slew at most: 500 ppm
_STEPS = 1000
"""So many offsets are kept at most."""


@dataclass(frozen=True, slots=True)
class Offset:
    """Bounds of (store clock - boot clock) in µs, and when they were measured (boot µs)."""

    low_us: int
    high_us: int
    at_us: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a replica makes of the store's time at one instant, in µs."""

    estimate_us: int
    """What the store's clock shows."""
    floor_us: int
    """What it would show at least, if it had gained nothing within the window."""
    gain_us: int
    """How much it certainly gained within the window."""
    gain_for_us: int
    """For how long that stays within the window."""

    def __str__(self) -> str:
        """Return it as the scripts read it."""
        return f"{self.estimate_us} {self.floor_us} {self.gain_us} {self.gain_for_us}"


class StoreClock:
    """What this replica knows about one clock of the store.

    Args:
        alert_us: So far back a gain of more than the tolerance is a jump.
    """

    def __init__(self, alert_us: int) -> None:
        self._alert_us = self._keep_us = alert_us
        self._offset: Offset | None = None
        self._slowest: deque[Offset] = deque()
        """Each was the slowest since the one before; older ones were slower still."""
        self._declared_us = 0

    def copy(self) -> StoreClock:
        """Return another clock with the same past."""
        return deepcopy(self)

    def read(self, boot_us: int, window_us: int) -> Reading | None:
        """Return what the clock shows at `boot_us`; None before the first measurement.

        Args:
            boot_us: Our clock.
            window_us: So far back it matters what the clock gained.
        """
        if self._offset is None:
            return None
        offset, slowest = self._offset, self._since(boot_us - window_us)
        return Reading(
            boot_us + (offset.low_us + offset.high_us) // 2,
            boot_us + slowest.low_us,
            max(0, offset.low_us - slowest.high_us),
            max(0, slowest.at_us + self._step_us + window_us - boot_us),
        )

    def observe(self, sent_us: int, received_us: int, store_us: int, keep_us: int = 0) -> int:
        """Take in one answer of the store; return by how many µs its clock jumped, or 0.

        The store read its clock somewhere between `sent_us` and `received_us` (boot clock), so
        that a slow answer says little, and never raises a false alarm. What it gained in small
        steps, or by drifting, is a jump too, once it adds up to more than the tolerance.

        Args:
            sent_us: When it was asked.
            received_us: When it answered.
            store_us: What it answered.
            keep_us: How far back `read` may look, where that is longer than for jumps.
        """
        self._keep_us = max(keep_us, self._alert_us)
        known, seen = self._offset, Offset(store_us - received_us, store_us - sent_us, received_us)
        self._offset = offset = seen if known is None else _refined(known, seen)
        lost_us = known.low_us - offset.high_us if known else 0
        while self._slowest and self._slowest[-1].low_us >= offset.low_us:
            self._slowest.pop()
        while (
            self._slowest and self._slowest[0].at_us < received_us - self._keep_us - self._step_us
        ):
            self._slowest.popleft()
        if not self._slowest or received_us - self._slowest[-1].at_us >= self._step_us:
            self._slowest.append(offset)
        gain_us = max(0, offset.low_us - self._since(received_us - self._alert_us).high_us)
        self._declared_us = min(self._declared_us, gain_us)
        if gain_us - self._declared_us > TOLERANCE_US:
            self._declared_us = gain_us
            return gain_us
        return -lost_us if lost_us > TOLERANCE_US else 0

    @property
    def _step_us(self) -> int:
        return self._keep_us // _STEPS

    def _since(self, at_us: int) -> Offset:
        """Return the slowest that the clock was since an instant."""
        first = bisect_left(self._slowest, at_us - self._step_us, key=lambda one: one.at_us)
        return self._slowest[min(first, len(self._slowest) - 1)]


def _refined(known: Offset, seen: Offset) -> Offset:
    """Narrow what was seen by what was known, where the two agree."""
    slack = round((seen.at_us - known.at_us) * DRIFT)
    low, high = known.low_us - slack, known.high_us + slack
    if seen.low_us > high or seen.high_us < low:
        return seen
    return Offset(max(seen.low_us, low), min(seen.high_us, high), seen.at_us)
