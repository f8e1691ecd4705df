"""The rules of providers, as presets. Pure data and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_POLICY = "exact-online"


class RefreshAt(StrEnum):
    """When a run is taken to refresh its access token."""

    END = "END"
    START = "START"


@dataclass(frozen=True, slots=True)
class Policy:
    """What a provider asks of those who refresh."""

    name: str
    refresh_interval_seconds: float
    """Least time between two refreshes."""
    margin_seconds: float
    """Added to the interval unless a token sets an interval of its own."""
    refresh_at: RefreshAt
    access_token_life_seconds: float


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one token, after its policy and its own settings were put together."""

    interval_us: int
    refresh_at: RefreshAt
    access_token_life_us: int


PRESETS = {
    policy.name: policy
    for policy in (
        # Exact Online, official: no new access token within 570 s after the last one was
        # *received*, and a life of 600 s. The margin covers the way of the answer.
        Policy(
            name="exact-online",
            refresh_interval_seconds=570,
            margin_seconds=2,
            refresh_at=RefreshAt.END,
            access_token_life_seconds=600,
        ),
    )
}


def rules(policy: Policy, own_interval_us: int | None, own_refresh_at: RefreshAt | None) -> Rules:
    """Put a token's own settings over its policy; an explicit interval is taken exactly."""
    from_policy = round((policy.refresh_interval_seconds + policy.margin_seconds) * 1e6)
    return Rules(
        interval_us=from_policy if own_interval_us is None else own_interval_us,
        refresh_at=own_refresh_at or policy.refresh_at,
        access_token_life_us=round(policy.access_token_life_seconds * 1e6),
    )
