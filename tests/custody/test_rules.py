"""The protocol's table of cases, cell by cell, and what holds in each."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff_coordinator.custody.answers import Issued, NotSent, Refusal, Refused, Unproven, Verdict
from holdoff_coordinator.custody.rules import (
    PROBE_US,
    SECOND,
    STALE_PRIMARY_US,
    TAKEOVER_US,
    Condition,
    Loss,
    Quarantine,
    Rotation,
    Rules,
    Standing,
    Times,
    adopts,
    after,
    continues,
    continues_anyway_us,
    due_us,
    earliest_us,
    may_request,
)

INTERVAL, LIFE, GRACE = 572 * SECOND, 600 * SECOND, 30 * SECOND
SENT = 10_000 * SECOND
LAST = SENT + 20 * SECOND
BEFORE = Standing(Condition.READY, 7, not_before_us=SENT, expires_us=SENT + 28 * SECOND)
REPEATABLE = (Rotation.NONE, Rotation.REUSABLE, Rotation.UNTIL_USED)
SINGLE = (Rotation.GRACE, Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES)


def rules(rotation: Rotation) -> Rules:
    """Return Exact's numbers under a rule of rotation."""
    return Rules(rotation, INTERVAL, LIFE, GRACE if rotation is Rotation.GRACE else 0)


def step(rotation: Rotation, verdict: Verdict, before: Standing = BEFORE) -> Standing:
    """Return a grant after a request that was answered, or given up, 20 s after it was sent."""
    return after(before, rules(rotation), verdict, Times(LAST, SENT, LAST)).standing


@pytest.mark.parametrize("rotation", Rotation)
def test_not_sent(rotation: Rotation) -> None:
    """The attempt is cleared and repeated after a pause, which grows."""
    once = step(rotation, NotSent("refused"))
    assert (once.condition, once.generation, once.unproven) == (Condition.READY, 7, 0)
    assert once.not_before_us == LAST + 1 * SECOND
    twice = step(rotation, NotSent("refused"), once)
    assert twice.not_before_us == LAST + 2 * SECOND
    assert step(rotation, NotSent(""), Standing(Condition.READY, 7, 0, not_sent=99)) == Standing(
        Condition.READY, 7, LAST + 60 * SECOND, not_sent=100
    )


@pytest.mark.parametrize("rotation", REPEATABLE)
def test_no_proof_where_old_tokens_work(rotation: Rotation) -> None:
    """The same token is sent an interval after the last possible moment, as often as needed."""
    standing = BEFORE
    for _ in range(5):
        standing = step(rotation, Unproven("time-out"), standing)
        assert standing.condition is Condition.READY
        assert standing.not_before_us == LAST + INTERVAL


def test_no_proof_with_a_grace_period() -> None:
    """The token is repeated once, at once while the grace is proved; then a person is asked."""
    rule = rules(Rotation.GRACE)
    soon = Times(SENT + 20 * SECOND, SENT, SENT + 20 * SECOND)
    late = Times(SENT + 30 * SECOND, SENT, SENT + 30 * SECOND)
    assert after(BEFORE, rule, Unproven(""), soon).standing.not_before_us == soon.now_us
    assert after(BEFORE, rule, Unproven(""), late).standing.not_before_us == late.now_us + INTERVAL
    once = after(BEFORE, rule, Unproven(""), soon).standing
    assert once.condition is Condition.READY
    twice = after(once, rule, Unproven(""), late)
    assert twice.standing.condition is Condition.REAUTHORIZE
    assert twice.alert


def test_a_repeat_that_missed_the_grace_period() -> None:
    """It waits for an interval after the last moment at which the first may have been answered.

    Fails when a repeat that was due at once is made after the period, for example when its pauses
    lasted longer.
    """
    rule = rules(Rotation.GRACE)
    soon = Times(SENT + 20 * SECOND, SENT, SENT + TAKEOVER_US)
    once = after(BEFORE, rule, Unproven(""), soon).standing
    assert may_request(once, rule, SENT + GRACE - 1)
    late = SENT + TAKEOVER_US + INTERVAL
    assert not may_request(once, rule, SENT + GRACE)
    assert not may_request(once, rule, late - 1)
    assert may_request(once, rule, late)


@pytest.mark.parametrize("why", [Refusal.BUSY, Refusal.OTHER])
def test_refused_for_a_while(why: Refusal) -> None:
    """Pauses grow, so that no more than ten requests are refused in an hour."""
    standing, now, refusals = BEFORE, SENT, 0
    while now < SENT + 3600 * SECOND:
        refusals += 1
        standing = after(
            standing, rules(Rotation.NONE), Refused(why, "e"), Times(now, now, now)
        ).standing
        assert (standing.condition, standing.generation) == (Condition.READY, 7)
        now = standing.not_before_us
    assert 3 <= refusals < 10


def test_when_a_grant_in_use_is_due() -> None:
    """Before its access token expires, never before it may be, and at once if it has none."""
    rule = Rules(Rotation.NONE, 10 * SECOND, LIFE, early_us=60 * SECOND)
    standing = Standing(Condition.READY, 7, not_before_us=SENT, expires_us=SENT + LIFE)
    assert due_us(standing, rule, SENT) == SENT + LIFE - 60 * SECOND
    assert earliest_us(standing, rule, SENT) == SENT
    late = Standing(Condition.READY, 7, not_before_us=SENT + LIFE, expires_us=SENT + LIFE)
    assert due_us(late, rule, SENT) == SENT + LIFE
    assert due_us(Standing(Condition.READY, 7, not_before_us=SENT), rule, SENT) == SENT
    assert due_us(Standing(Condition.STALE, 7, not_before_us=SENT), rule, SENT) is None


def test_no_proof_of_a_single_use() -> None:
    """The token is repeated once, an interval after the last possible moment."""
    once = step(Rotation.SINGLE_USE, Unproven(""))
    assert (once.condition, once.not_before_us) == (Condition.READY, LAST + INTERVAL)
    assert step(Rotation.SINGLE_USE, Unproven(""), once).condition is Condition.REAUTHORIZE


def test_no_proof_where_a_repeat_revokes() -> None:
    """The repeat waits until no access token lives that it could revoke."""
    once = step(Rotation.SINGLE_USE_REVOKES, Unproven(""))
    assert once.condition is Condition.READY
    assert once.not_before_us == max(LAST + INTERVAL, SENT + LIFE)
    assert step(Rotation.SINGLE_USE_REVOKES, Unproven(""), once).condition is Condition.REAUTHORIZE


@pytest.mark.parametrize("rotation", Rotation)
def test_refused_as_dead(rotation: Rotation) -> None:
    """A person must authorize; one probe an hour is made where it can do no harm.

    Where none is made, there is no pause that would last on after a late answer.
    """
    dead = step(rotation, Refused(Refusal.DEAD, "invalid_grant"))
    assert dead.condition is Condition.REAUTHORIZE
    assert dead.generation == 7
    due = LAST + PROBE_US
    assert not may_request(dead, rules(rotation), due - 1)
    harmless = rotation not in (Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES)
    assert may_request(dead, rules(rotation), due) == harmless
    assert dead.not_before_us == (due if harmless else LAST + INTERVAL)


@pytest.mark.parametrize("rotation", Rotation)
def test_rotated_in_a_refusal(rotation: Rotation) -> None:
    """The new refresh token is the next generation, and nothing is known against it."""
    once = step(rotation, Unproven(""))
    refused = Refused(Refusal.TOO_EARLY, "access_denied", "new")
    standing = step(rotation, refused, once)
    assert (standing.condition, standing.generation) == (Condition.READY, 8)
    assert standing.unproven == 0
    assert standing.not_before_us >= LAST + INTERVAL


@pytest.mark.parametrize("rotation", Rotation)
def test_rotated_without_proof(rotation: Rotation) -> None:
    """A refresh token that came without an access token continues the chain; it was never sent."""
    standing = step(rotation, Unproven("HTTP 200", "new"), step(rotation, Unproven("")))
    assert (standing.condition, standing.generation) == (Condition.READY, 8)
    assert standing.unproven == 0
    assert standing.not_before_us >= LAST + INTERVAL


@pytest.mark.parametrize("rotation", Rotation)
def test_refused_client(rotation: Rotation) -> None:
    """Nothing is sent until the client id or secret is put right; the chain stays."""
    standing = step(rotation, Refused(Refusal.CLIENT, "invalid_client"))
    assert (standing.condition, standing.generation) == (Condition.CONFIGURATION, 7)
    assert not may_request(standing, rules(rotation), SENT * 100)


@pytest.mark.parametrize("rotation", Rotation)
def test_issued(rotation: Rotation) -> None:
    """The interval begins with the answer's last byte, the life with the request."""
    once = step(rotation, Unproven(""))
    for before in (BEFORE, once, Standing(Condition.REAUTHORIZE, 7, 0)):
        standing = step(rotation, Issued("a", None, "r"), before)
        assert (standing.condition, standing.generation) == (Condition.READY, 8)
        assert standing.not_before_us >= LAST + INTERVAL
        assert standing.expires_us == SENT + LIFE
        assert (standing.unproven, standing.not_sent) == (0, 0)
    assert step(rotation, Issued("a", 60.0, "")).expires_us == SENT + 60 * SECOND


@pytest.mark.parametrize(("rotation", "moved"), [*product(Rotation, (0, 1))])
def test_late_answer(rotation: Rotation, moved: int) -> None:
    """It is adopted, also from REAUTHORIZE, unless another answer was stored meanwhile."""
    known = Standing(Condition.REAUTHORIZE, 7 + moved, 0)
    assert adopts(known, 7) == (moved == 0)
    assert step(rotation, Issued("a", None, "r"), known).condition is Condition.READY


VERDICTS: st.SearchStrategy[Verdict] = st.one_of(
    st.builds(Issued, st.just("a"), st.none() | st.floats(1, 3600), st.sampled_from(["", "r"])),
    st.builds(Refused, st.sampled_from(Refusal), st.just("e"), st.sampled_from(["", "r"])),
    st.builds(NotSent, st.just("")),
    st.builds(Unproven, st.just("")),
)


@given(st.sampled_from(Rotation), st.lists(st.tuples(VERDICTS, st.integers(0, 200)), max_size=12))
def test_no_two_requests_within_an_interval(
    rotation: Rotation, story: list[tuple[Verdict, int]]
) -> None:
    """Promise 2: after anything that may have issued a token, the next request waits an interval.

    The proved grace period is the exception. Generations never fall, and a request after a second
    one without proof is made only where old refresh tokens work, or as a probe an hour later.
    """
    rule, now = rules(rotation), SENT
    standing = Standing(Condition.READY, 0, now)
    issued_at: int | None = None
    repeats = 0
    for verdict, seconds in story:
        now = max(now, standing.not_before_us)
        if not may_request(standing, rule, now):
            break
        if issued_at is not None and not (rotation is Rotation.GRACE and repeats):
            assert now >= issued_at + INTERVAL
        probes = standing.condition is Condition.REAUTHORIZE
        assert rotation in REPEATABLE or repeats <= 1 or probes
        if probes and issued_at is not None and repeats:
            assert now >= issued_at + PROBE_US
        last = now + seconds * SECOND
        following = after(standing, rule, verdict, Times(last, now, last)).standing
        assert following.generation >= standing.generation
        assert following.not_before_us >= standing.not_before_us
        rotated = following.generation > standing.generation
        if isinstance(verdict, Issued | Unproven):
            issued_at = last
        repeats = 0 if rotated else repeats + isinstance(verdict, Unproven)
        standing, now = following, last


@pytest.mark.parametrize(
    ("loss", "is_copied", "seen", "over", "now", "goes_on"),
    [
        (Loss.WRITES, True, 0, None, 0, True),  # every intent is there
        (Loss.DATA, True, 0, None, 0, False),  # but not in a backup
        (Loss.CLOCK, True, 0, None, 0, False),
        (Loss.WRITES, False, 0, None, 900, False),  # another replica's answer
        (Loss.WRITES, False, 0, 500, 500, True),  # ours; nobody could begin before 500
        (Loss.DATA, False, 0, 500, 500, True),
        (Loss.CLOCK, False, 0, 500, 500, True),
        (Loss.WRITES, False, 0, 500, 499, False),  # too early by our own clock
        (Loss.WRITES, False, 470, 500, 500, True),
        (Loss.WRITES, False, 471, 500, 900, False),  # an intent may have been lost with the server
    ],
)
def test_evidence_in_quarantine(  # noqa: PLR0913, PLR0917 - a table
    loss: Loss, is_copied: bool, seen: int, over: int | None, now: int, goes_on: bool
) -> None:
    """Either all intents were copied, or nobody but us could have made one since our answer."""
    quarantine = Quarantine(0, loss, seen * SECOND)
    over_us = None if over is None else over * SECOND
    assert continues(quarantine, over_us, now * SECOND, is_copied=is_copied) is goes_on


def test_without_evidence_in_quarantine() -> None:
    """The last refresh counts as made on the last right that a replaced server may have given."""
    rules = Rules(Rotation.UNTIL_USED, 572 * SECOND, 600 * SECOND)
    quarantine = Quarantine(1000 * SECOND, Loss.DATA, 0)
    expected = 1000 * SECOND + STALE_PRIMARY_US + TAKEOVER_US + 572 * SECOND
    assert continues_anyway_us(quarantine, rules) == expected
