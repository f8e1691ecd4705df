"""What follows from a request for an access token, under each rule of rotation. Pure.

This is the protocol's table of cases: one function for each of its events. Instants are µs of the
store's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from holdoff_coordinator.custody.answers import Issued, NotSent, Refusal, Refused, Unproven, Verdict

SECOND: Final = 1_000_000
INTENT_US: Final = 30 * SECOND
"""How long after its right began the intent to send a request is stored at the latest."""
SEND_US: Final = 5 * SECOND
"""How long after the intent the request is sent at the latest."""
UNACKNOWLEDGED_US: Final = 20 * SECOND
"""How long what was sent may go unacknowledged."""
ANSWER_US: Final = 30 * SECOND
"""How long after the request its answer ends at the latest."""
TAKEOVER_US: Final = INTENT_US + SEND_US + UNACKNOWLEDGED_US + ANSWER_US + 15 * SECOND
"""How long the right to a request lasts: until its answer would have come, and a margin. A request
whose result is not known counts as answered then."""
STALE_PRIMARY_US: Final = 30 * SECOND
"""How long after another server of the store took over the old one may still accept an intent."""
FIRST_PAUSE_US: Final = 1 * SECOND
LONGEST_PAUSE_US: Final = 60 * SECOND
"""After a request that was not sent: a pause, twice as long with each."""
FIRST_REFUSED_US: Final = 60 * SECOND
LONGEST_REFUSED_US: Final = 3600 * SECOND
"""Likewise after one that was refused, since providers limit errors: six in the first hour."""
PROBE_US: Final = 3600 * SECOND
"""At most one request an hour with a refresh token that is taken for dead."""


class Rotation(StrEnum):
    """What becomes of a used refresh token."""

    NONE = "none"
    REUSABLE = "reusable"
    UNTIL_USED = "until-used"
    GRACE = "grace"
    SINGLE_USE = "single-use"
    SINGLE_USE_REVOKES = "single-use-revokes"


_REPEATABLE: Final = (Rotation.NONE, Rotation.REUSABLE, Rotation.UNTIL_USED)
"""Here the same refresh token may be sent as often as the interval allows."""
LASTING: Final = (Rotation.NONE, Rotation.REUSABLE)
"""Here no use of a refresh token ends an older one: one from a backup does no harm."""
_NEVER_PROBED: Final = (Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES)


class Condition(StrEnum):
    """What is stored of a grant's state; the rest follows from the time and the last attempt."""

    READY = "READY"
    REAUTHORIZE = "REAUTHORIZE"
    CONFIGURATION = "CONFIGURATION"
    STALE = "STALE"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a policy says of a token's refreshes."""

    rotation: Rotation
    interval_us: int
    """With its margin."""
    life_us: int
    """Of an access token, where an answer does not say it."""
    grace_us: int = 0
    """For how long a repeat of a used refresh token is proved to be answered."""
    idle_life_us: int = 0
    """Of a refresh token; 0 where it is not known."""
    early_us: int = 0
    """How long before its end an access token is replaced while it is used."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A grant before or after a request."""

    condition: Condition
    generation: int
    not_before_us: int
    """The earliest next request."""
    expires_us: int = 0
    """When the current access token expires; 0 for none."""
    unproven: int = 0
    """How many requests with the current refresh token ended without proof."""
    first_unproven_us: int = 0
    """When the first of them was sent."""
    not_sent: int = 0
    """How many in a row were not sent, or refused for a reason that passes."""


@dataclass(frozen=True, slots=True)
class Times:
    """Instants of a request."""

    now_us: int
    sent_us: int
    """When it was sent: an access token lives from then on. `now_us` if it was not."""
    last_us: int
    """When the last byte of its answer came, or the last instant at which it may have been
    answered: the interval begins then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to store after a request."""

    standing: Standing
    alert: str = ""
    """What an operator should know; empty for nothing."""


def after(standing: Standing, rules: Rules, verdict: Verdict, times: Times) -> Outcome:
    """Return what a verdict on a request makes of a grant, as it was when the request was sent."""
    match verdict:
        case Issued():
            return _issued(standing, rules, verdict, times)
        case NotSent():
            return _paused(standing, times, FIRST_PAUSE_US, LONGEST_PAUSE_US)
        case Unproven(refresh_token=rotated) if rotated:
            # Nothing was sent with this one yet.
            renewed = replace(standing, generation=standing.generation + 1, unproven=0, not_sent=0)
            return Outcome(_no_sooner(renewed, times.last_us + rules.interval_us))
        case Unproven():
            return _unproven(standing, rules, times)
        case Refused(refresh_token=rotated) if rotated:
            # Whatever else it says, the chain continues with this one.
            renewed = replace(standing, generation=standing.generation + 1, unproven=0)
            return _refused(renewed, rules, replace(verdict, refresh_token=""), times)
        case Refused():
            return _refused(standing, rules, verdict, times)


def _issued(standing: Standing, rules: Rules, verdict: Issued, times: Times) -> Outcome:
    life_us = rules.life_us
    if verdict.life_seconds is not None:
        life_us = round(verdict.life_seconds * SECOND)
    issued = Standing(
        Condition.READY,
        standing.generation + 1,
        not_before_us=max(standing.not_before_us, times.last_us + rules.interval_us),
        expires_us=times.sent_us + life_us,
    )
    return Outcome(issued)


def _paused(standing: Standing, times: Times, first_us: int, longest_us: int) -> Outcome:
    pause_us = min(first_us << min(standing.not_sent, 16), longest_us)
    until_us = max(standing.not_before_us, times.now_us + pause_us)
    return Outcome(replace(standing, not_before_us=until_us, not_sent=standing.not_sent + 1))


def _unproven(standing: Standing, rules: Rules, times: Times) -> Outcome:
    first_us = standing.first_unproven_us if standing.unproven else times.sent_us
    waited = times.last_us + rules.interval_us
    alert, condition = "", standing.condition
    if rules.rotation is Rotation.GRACE and not standing.unproven:
        if times.now_us < first_us + rules.grace_us:
            waited = times.now_us
    elif rules.rotation is Rotation.SINGLE_USE_REVOKES:
        waited = max(waited, standing.expires_us, times.sent_us + rules.life_us)
    if standing.unproven and rules.rotation not in _REPEATABLE:
        condition = Condition.REAUTHORIZE  # it was repeated once
        alert = "two requests for an access token ended without an answer that says what happened"
    if condition is Condition.REAUTHORIZE:
        waited = max(waited, times.now_us + _probe_us(rules))
    return Outcome(
        replace(
            standing,
            condition=condition,
            not_before_us=max(standing.not_before_us, waited),
            unproven=standing.unproven + 1,
            first_unproven_us=first_us,
            not_sent=0,
        ),
        alert,
    )


def _refused(standing: Standing, rules: Rules, verdict: Refused, times: Times) -> Outcome:
    settled = replace(standing, not_sent=0)
    match verdict.why:
        case Refusal.TOO_EARLY:
            # Somebody had a token issued, at the latest now.
            waited = times.last_us + rules.interval_us
            alert = "the provider calls the request too early: another program refreshes this token"
            return Outcome(_no_sooner(settled, waited), alert)
        case Refusal.DEAD:
            return _dead(settled, rules, times)
        case Refusal.CLIENT:
            alert = "the provider refuses the client id or its secret"
            return Outcome(replace(settled, condition=Condition.CONFIGURATION), alert)
        case Refusal.BUSY | Refusal.OTHER:
            return _paused(standing, times, FIRST_REFUSED_US, LONGEST_REFUSED_US)


def _dead(standing: Standing, rules: Rules, times: Times) -> Outcome:
    alert = "the provider calls the refresh token dead: a person must authorize again"
    dead = replace(standing, condition=Condition.REAUTHORIZE)
    waited = times.now_us + max(_probe_us(rules), rules.interval_us)
    return Outcome(_no_sooner(dead, waited), alert)


def _probe_us(rules: Rules) -> int:
    """Return the pause before a refresh token that is taken for dead is sent again.

    None where it never is: a late answer would have to wait for the end of that pause, too.
    """
    return 0 if rules.rotation in _NEVER_PROBED else PROBE_US


def _no_sooner(standing: Standing, until_us: int) -> Standing:
    return replace(standing, not_before_us=max(standing.not_before_us, until_us))


def earliest_us(standing: Standing, rules: Rules, now_us: int) -> int | None:
    """Return the earliest next request, as far as the grant itself says; None for never."""
    if standing.condition is Condition.REAUTHORIZE:
        if rules.rotation in _NEVER_PROBED:
            return None
        # A probe: the provider may have been wrong.
    elif standing.condition is not Condition.READY:
        return None
    if rules.rotation is Rotation.GRACE and standing.unproven:
        first_us = standing.first_unproven_us
        if now_us >= first_us + rules.grace_us:  # too late to repeat it at once
            return max(standing.not_before_us, first_us + TAKEOVER_US + rules.interval_us)
    return standing.not_before_us


def due_us(standing: Standing, rules: Rules, now_us: int) -> int | None:
    """Return when to request an access token for those who use one; None for never."""
    earliest = earliest_us(standing, rules, now_us)
    return None if earliest is None else max(earliest, standing.expires_us - rules.early_us)


def may_request(standing: Standing, rules: Rules, now_us: int) -> bool:
    """Tell whether an access token may be requested now, as far as the grant itself says."""
    earliest = earliest_us(standing, rules, now_us)
    return earliest is not None and now_us >= earliest


def adopts(known: Standing, generation: int) -> bool:
    """Tell whether a late answer to a request of a generation is still to be stored."""
    return known.generation == generation


class Loss(StrEnum):
    """What a quarantine began for."""

    DATA = "DATA"
    """The store may have lost anything."""
    WRITES = "WRITES"
    """Another server took over, which may lack the last writes."""
    CLOCK = "CLOCK"
    """The store's clock is doubtful."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A quarantine, as a replica knows it."""

    began_us: int
    """By the store's clock: when it began, or the last loss in it was found."""
    loss: Loss
    """The worst one in it."""
    seen_us: int
    """By the boot clock of this replica: it began at this instant at the latest."""


def continues(
    quarantine: Quarantine, interval_over_us: int | None, now_us: int, *, is_copied: bool
) -> bool:
    """Tell whether there is evidence that a refresh in quarantine is no second one.

    Args:
        quarantine: What the store may have lost.
        interval_over_us: When the interval after the newest known answer is over, by the boot clock
            of the replica that received it; None if this replica is another one.
        now_us: The same clock, now.
        is_copied: Whether servers that may be promoted have every intent and answer.
    """
    if is_copied and quarantine.loss is Loss.WRITES:
        return True
    if interval_over_us is None:
        return False
    # An intent after that answer could be stored only when the interval was over.
    is_last = quarantine.seen_us + STALE_PRIMARY_US <= interval_over_us
    return is_last and interval_over_us <= now_us


def continues_anyway_us(quarantine: Quarantine, rules: Rules) -> int:
    """Return when a refresh continues without evidence, by the store's clock.

    A request may have been made on the last right that a server which was replaced has given.
    """
    last_right_us = quarantine.began_us + STALE_PRIMARY_US
    return last_right_us + TAKEOVER_US + rules.interval_us
