"""When a holder renews its lease, and when it must have stopped."""

from __future__ import annotations

from dataclasses import dataclass

SECOND = 1_000_000_000
MOST_WAIT_SECONDS = 366 * 24 * 3600
"""The coordinator's limit of a wait; gRPC cannot count much longer ones."""
DEFAULT_TTL_SECONDS = 120.0


def margin_seconds(ttl_seconds: float) -> float:
    """By how much a holder stops before the store lets the lease run out.

    5 % of the TTL, at most 1 s, for the last instants of killing; and 0.1 % of it, for two
    clocks that run at different speeds (NTP slews by 0.05 % at most).
    """
    return min(1.0, ttl_seconds * 0.05) + ttl_seconds * 0.001


def default_grace_seconds(ttl_seconds: float) -> float:
    """The default time between TERM and KILL."""
    return min(10.0, ttl_seconds / 3)


@dataclass(frozen=True, slots=True)
class Timing:
    """When a holder renews, and when it must have stopped."""

    ttl_seconds: float
    grace_seconds: float
    """Time between TERM and KILL; cut to three quarters of the TTL, so that renewals fit in."""

    @classmethod
    def of(cls, ttl_seconds: float, grace_seconds: float | None = None) -> Timing:
        """Work out the timing of a lease.

        Raises:
            ValueError: If an explicit grace is not shorter than the TTL.
        """
        if grace_seconds is None:
            grace_seconds = default_grace_seconds(ttl_seconds)
        if grace_seconds >= ttl_seconds:
            raise ValueError(
                f"the grace ({grace_seconds:g} s) must be shorter than the TTL ({ttl_seconds:g} s)"
            )
        return cls(ttl_seconds, min(grace_seconds, ttl_seconds * 0.75))

    def deadline_ns(self, sent_ns: int) -> int:
        """When everything must have stopped, if the last good renewal was *sent* then."""
        return sent_ns + round((self.ttl_seconds - margin_seconds(self.ttl_seconds)) * SECOND)

    @property
    def renew_after_seconds(self) -> float:
        """Time between renewals: three fit in before TERM."""
        usable = self.ttl_seconds - margin_seconds(self.ttl_seconds) - self.grace_seconds
        return usable / 3

    @property
    def call_seconds(self) -> float:
        """How long one renewal may take before it is tried again: two fit in between two."""
        return min(3.0, max(0.2, self.renew_after_seconds / 2))
