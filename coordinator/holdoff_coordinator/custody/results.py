"""From the outcome of a request to what is stored of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from holdoff_coordinator.custody import outcomes
from holdoff_coordinator.custody.answers import (
    Answer,
    Issued,
    NotSent,
    Reading,
    Refusal,
    Refused,
    Unproven,
    Verdict,
    judge,
)
from holdoff_coordinator.custody.records import NEVER, EndRefresh
from holdoff_coordinator.custody.rules import (
    SECOND,
    Condition,
    Rotation,
    Rules,
    Standing,
    Times,
    after,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from holdoff.policies import Policy
    from holdoff_coordinator.custody.records import Record

UNKNOWN_LIFE_US: Final = 600 * SECOND
"""Life of an access token where neither the policy nor the answer says it."""
LEAST_INTERVAL_US: Final = 10 * SECOND
"""Between two requests where the provider has no rule, so that no short life causes a stream."""
_REVEALING_CHARACTERS: Final = 8
MOST_EARLY_US: Final = 60 * SECOND


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the store's clock showed between two instants of this replica's boot clock.

    An instant of the boot clock becomes one of the store's clock, as early or as late as it can
    have been.
    """

    store_us: int
    asked_us: int
    answered_us: int

    def earliest_us(self, boot_us: int) -> int:
        """Return the earliest instant of the store's clock."""
        return self.store_us + boot_us - self.answered_us

    def latest_us(self, boot_us: int) -> int:
        """Return the latest instant of the store's clock."""
        return self.store_us + boot_us - self.asked_us


def rules_of(policy: Policy, interval_us: int) -> Rules:
    """Return the rules of a token with an interval, its margin included."""
    refresh = policy.refresh
    life_us = round(refresh.access_token_life * SECOND) or UNKNOWN_LIFE_US
    early = refresh.early_margin
    return Rules(
        Rotation(refresh.rotation),
        max(interval_us, LEAST_INTERVAL_US),
        life_us,
        # A repeat at once would break an interval that the provider has.
        grace_us=0 if interval_us else round((refresh.grace or 0) * SECOND),
        idle_life_us=round((refresh.idle_life or 0) * SECOND),
        early_us=min(MOST_EARLY_US, life_us // 10) if early is None else round(early * SECOND),
    )


def reading_of(policy: Policy) -> Reading:
    """Return how a provider words its refusals."""

    def worded(means: str) -> tuple[tuple[str, str], ...]:
        return tuple(
            (one.error.casefold(), one.description.casefold())
            for one in policy.refusal
            if one.means == means
        )

    return Reading(too_early=worded("too-early"), dead=worded("dead"))


def verdict_of(outcome: outcomes.Outcome, reading: Reading) -> Verdict:
    """Tell what an outcome proves.

    Also a part of an answer may prove something: its status, or a document that is complete.
    """
    if isinstance(outcome, outcomes.NotSent):
        return NotSent(f"{outcome.why}: {outcome.detail}")
    received = outcome.received
    verdict: Verdict | None = None
    if received is not None:
        verdict = judge(Answer(received.status, received.headers, received.body), reading)
    if isinstance(outcome, outcomes.Answered) and verdict is not None:
        return verdict
    if verdict is None or isinstance(verdict, Unproven):
        reason = f"{outcome.why}: {outcome.detail}" if isinstance(outcome, outcomes.NoProof) else ""
        return Unproven(reason, verdict.refresh_token if verdict else "")
    return verdict


def without_secrets(verdict: Verdict, *secrets: str) -> Verdict:
    """Return a verdict whose error does not repeat a part of a secret that was sent."""
    if isinstance(verdict, Refused) and _reveals(verdict.error, secrets):
        return replace(verdict, error="an error that repeats what was sent")
    return verdict


def _reveals(text: str, secrets: Iterable[str]) -> bool:
    for secret in filter(None, secrets):
        size = min(len(secret), _REVEALING_CHARACTERS)
        parts = (secret[at : at + size] for at in range(len(secret) - size + 1))
        if any(part in text for part in parts):
            return True
    return False


def has_secrets(verdict: Verdict) -> bool:
    """Tell whether there is something to seal, which becomes the next generation."""
    match verdict:
        case Issued():
            return True
        case Refused(refresh_token=rotated) | Unproven(refresh_token=rotated):
            return rotated != ""
    return False


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request for an access token."""

    token: str
    id: str
    record: Record
    """The grant that it was made with."""
    rules: Rules

    def is_settled(self, verdict: Verdict, times: Times) -> bool:
        """Tell whether a verdict is stored at once.

        Without proof the attempt stays as it is, so that it counts at the end of its right, as
        after a crash; but within a proved grace period it is repeated at once.
        """
        if not isinstance(verdict, Unproven) or has_secrets(verdict):
            return True
        standing = after(self.record.standing, self.rules, verdict, times).standing
        return standing.not_before_us <= times.now_us

    def end(
        self, verdict: Verdict, times: Times, sealed: Mapping[str, str] = {}
    ) -> tuple[EndRefresh, str]:
        """Return what to store, as of `times.now_us`, and an alert; empty for none.

        Args:
            verdict: What the outcome proves.
            times: Its instants.
            sealed: The fields of `EndRefresh` for a new generation.
        """
        outcome = after(self._before(verdict), self.rules, verdict, times)
        standing = outcome.standing
        age_us, expires_in_us, idle_us = NEVER, NEVER, NEVER
        # A repeat within a grace period must not wait for the token's cooldown.
        waits = standing.not_before_us >= times.last_us + self.rules.interval_us
        match verdict:
            case Issued():
                age_us = max(0, times.now_us - times.last_us)
                expires_in_us = max(0, standing.expires_us - times.now_us)
                idle_us = self.rules.idle_life_us
            case Refused(why=Refusal.TOO_EARLY):
                age_us = max(0, times.now_us - times.last_us)
            case Unproven() if waits:
                age_us = max(0, times.now_us - times.last_us)
        lasts = standing.condition is not Condition.READY
        ended = self._end(
            standing,
            *_described(verdict),
            message=(outcome.alert or self.record.message) if lasts else "",
            refreshed_age_us=age_us,
            not_before_in_us=standing.not_before_us - times.now_us,
            expires_in_us=expires_in_us,
            idle_us=idle_us,
            **sealed,
        )
        return ended, outcome.alert

    def _before(self, verdict: Verdict) -> Standing:
        """Return how the grant stands, without the pause of a probe that a late answer ends.

        The store decides likewise, by what it has then.
        """
        standing, record = self.record.standing, self.record
        is_dead = standing.condition is Condition.REAUTHORIZE and not standing.not_sent
        if isinstance(verdict, Issued) and is_dead and record.attempt_step == "NOT_ISSUED":
            interval_over_us = record.refreshed_us + self.rules.interval_us
            return replace(standing, not_before_us=interval_over_us)
        return standing

    def note(self, verdict: Unproven) -> EndRefresh:
        """Return what to store of a request that is not settled yet: why there is no proof."""
        return self._end(
            self.record.standing, "INTENDED", "", verdict.reason, message=self.record.message
        )

    def _end(
        self, standing: Standing, step: str, result: str, outcome: str, **fields: Any
    ) -> EndRefresh:
        nothing = {
            "refreshed_age_us": NEVER,
            "not_before_in_us": 0,
            "expires_in_us": NEVER,
            "idle_us": NEVER,
        }
        return EndRefresh(
            token=self.token,
            chain=self.record.chain,
            from_generation=self.record.generation,
            attempt=self.id,
            step=step,
            result=result,
            outcome=outcome,
            condition=standing.condition,
            generation=standing.generation,
            unproven=standing.unproven,
            first_unproven_us=standing.first_unproven_us,
            not_sent=standing.not_sent,
            **{**nothing, **fields},
        )


def _described(verdict: Verdict) -> tuple[str, str, str]:
    """Say how far a request got, and what came of it: in a word, and for people."""
    match verdict:
        case Issued(refresh_token=""):
            return "STORED", "ISSUED", "an access token"
        case Issued():
            return "STORED", "ISSUED", "an access token and a new refresh token"
        case Refused(why, error):
            return "NOT_ISSUED", "REFUSED", f"refused ({why}): {error}"
        case NotSent(reason):
            return "NOT_ISSUED", "NOT_SENT", f"not sent: {reason}"
        case Unproven(reason):
            return "UNPROVEN", "UNPROVEN", reason
