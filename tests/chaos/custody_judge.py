"""Judges what a chaos run saw of a token in custody. Pure: an account in, broken promises out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff.simulator import Rotation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

EARLY, OLD_TOKEN = "refresh_interval", "old_refresh_token"
"""Rules of the simulated provider."""


@dataclass(frozen=True, slots=True)
class Account:
    """What happened to the token of one rotation rule, by our own and by the provider's count."""

    rotation: Rotation
    accepted: int
    """Requests that the provider acted on."""
    refused: int
    violations: Mapping[str, int]
    """Rules of the provider that were broken, and how often."""
    lost: int
    """Strikes that may have lost the answer to a request: its sender was killed or frozen."""
    outlasted: int
    """Others that held an answer back for longer than the right to the request lasted."""
    deaths: int
    """How often no access token could be had any more without a person."""
    restored_after: float | None
    """Seconds from the end of the last fault to an access token; None for none in time."""


def excused(one: Account) -> int:
    """Return how often the table of cases lets an old refresh token be sent, and be refused.

    Where an old refresh token stays valid until its successor is used: never.
    """
    is_single = one.rotation in {Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES}
    return one.lost + one.outlasted if is_single else 0


def may_die(one: Account) -> int:
    """Return how often the table of cases lets a person be needed.

    An answer that comes late makes good a refusal, unless that revoked the grant.
    """
    return one.lost if one.rotation is Rotation.SINGLE_USE else excused(one)


def broken(one: Account, bound_seconds: float) -> Iterator[str]:
    """Tell which promises were broken.

    Args:
        one: What happened.
        bound_seconds: How long after the last fault there is an access token at the latest.
    """
    if not one.accepted:
        yield "no request was acted on: nothing is proved"
    if early := one.violations.get(EARLY, 0):
        yield f"{early} requests were too early"
    excuses = excused(one)
    if one.violations.get(OLD_TOKEN, 0) > excuses:
        yield (
            f"{one.violations[OLD_TOKEN]} requests with an old refresh token; the table allows "
            f"{excuses}"
        )
    for rule, times in one.violations.items():
        if times and rule not in {EARLY, OLD_TOKEN}:
            yield f"{times} times {rule}"
    if one.refused > excuses + early:
        yield f"{one.refused} requests were refused; the table allows {excuses}"
    if one.deaths > may_die(one):
        yield f"{one.deaths} times only a person could help; the table allows {may_die(one)}"
    if one.restored_after is None or one.restored_after > bound_seconds:
        yield f"no access token within {bound_seconds:.0f} s after the last fault"
