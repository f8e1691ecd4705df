"""From the outcome of a request to what is stored of it."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from holdoff.policies import Policy, Refresh, Seconds, presets
from holdoff_coordinator.custody import outcomes
from holdoff_coordinator.custody.answers import (
    Issued,
    NotSent,
    Refusal,
    Refused,
    Unproven,
    Verdict,
)
from holdoff_coordinator.custody.outcomes import Answered, Failure, NoProof, Received
from holdoff_coordinator.custody.records import NEVER, Record
from holdoff_coordinator.custody.results import (
    LEAST_INTERVAL_US,
    UNKNOWN_LIFE_US,
    Anchor,
    Attempt,
    has_secrets,
    reading_of,
    rules_of,
    verdict_of,
    without_secrets,
)
from holdoff_coordinator.custody.rules import SECOND, Condition, Rotation, Rules, Times

EXACT = presets()["exact-online"]
READING = reading_of(EXACT)
NOW = 10_000 * SECOND
RULES = Rules(Rotation.UNTIL_USED, 572 * SECOND, 600 * SECOND, idle_life_us=9 * SECOND)


def attempt(rules: Rules = RULES) -> Attempt:
    """Return a request that began 20 s ago."""
    record = Record(
        chain="c",
        generation=7,
        facts="{}",
        fingerprint="f",
        condition=Condition.READY,
        created_us=1,
        since_us=1,
        refreshed_us=1,
        not_before_us=1,
        expires_us=NOW + 5 * SECOND,
        idle_us=0,
        unproven=0,
        first_unproven_us=0,
        not_sent=0,
        attempt="a",
        attempt_begun_us=NOW - 20 * SECOND,
    )
    return Attempt("t", "a", record, rules)


def received(status: int, body: object) -> Received:
    """Return an answer."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Received(status, {}, bytearray(text))


REFUSALS = [
    ("access_denied", "Rate limit exceeded: access_token not expired", Refusal.TOO_EARLY),
    ("unauthorized_client", "Old refresh token used.", Refusal.DEAD),
    ("invalid_request", "The refresh token expired at 1/2/2026 3:04:05 AM", Refusal.DEAD),
    ("invalid_request", "client_id is repeated.", Refusal.OTHER),
    ("invalid_grant", "", Refusal.DEAD),
    ("invalid_client", "", Refusal.CLIENT),
]


@pytest.mark.parametrize(("error", "description", "why"), REFUSALS)
def test_how_exact_online_refuses(error: str, description: str, why: Refusal) -> None:
    """Its documented refusals are known by their words."""
    answer = received(400, {"error": error, "error_description": description})
    verdict = verdict_of(Answered(answer, 1, 2), READING)
    assert isinstance(verdict, Refused)
    assert verdict.why is why


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (None, Unproven),
        (received(200, b'{"access_token":"t","expi'), Unproven),
        (received(200, {"access_token": "t"}), Issued),
        (received(429, b"slow do"), Refused),
        (received(400, b'{"error":"invalid_gr'), Unproven),
        (received(503, {"refresh_token": "r"}), Unproven),
    ],
)
def test_a_part_of_an_answer(part: Received | None, kind: type) -> None:
    """It proves something if its status does, or if its document is complete."""
    outcome = NoProof(Failure.CLOSED, "the provider ended the connection", 1, 2, part)
    verdict = verdict_of(outcome, READING)
    assert isinstance(verdict, kind)
    if isinstance(verdict, Unproven):
        assert verdict.reason == "closed: the provider ended the connection"
        assert verdict.refresh_token == ("r" if part and part.status == 503 else "")


def test_nothing_was_sent() -> None:
    """It is said why."""
    verdict = verdict_of(outcomes.NotSent(Failure.TLS, "certificate: expired"), READING)
    assert verdict == NotSent("tls: certificate: expired")


def test_rules_of_policies() -> None:
    """Exact's window is 572 s to 600 s; elsewhere an access token is replaced before its end."""
    exact = rules_of(EXACT, 572 * SECOND)
    assert (exact.interval_us, exact.life_us, exact.early_us) == (
        572 * SECOND,
        600 * SECOND,
        28 * SECOND,
    )
    for policy in presets().values():
        rules = rules_of(policy, 0)
        assert rules.interval_us == LEAST_INTERVAL_US
        assert 0 < rules.early_us < rules.life_us
        if not policy.refresh.access_token_life:
            assert rules.life_us == UNKNOWN_LIFE_US


SENT, LAST = NOW - 15 * SECOND, NOW - 10 * SECOND


@pytest.mark.parametrize(
    ("verdict", "step", "age_us", "not_before_in_us", "expires_in_us"),
    [
        (Issued("t", None, "r"), "STORED", 10, 562, 585),
        (Issued("t", 12.0, ""), "STORED", 10, 562, 0),
        (Refused(Refusal.TOO_EARLY, "access_denied"), "NOT_ISSUED", 10, 562, None),
        (Refused(Refusal.BUSY, "HTTP 429"), "NOT_ISSUED", None, 60, None),
        (Refused(Refusal.DEAD, "invalid_grant"), "NOT_ISSUED", None, 3600, None),
        (NotSent("tls"), "NOT_ISSUED", None, 1, None),
        (Unproven("time-out"), "UNPROVEN", 10, 562, None),
        (Unproven("HTTP 200", "r"), "UNPROVEN", 10, 562, None),
    ],
)
def test_what_is_stored(
    verdict: Verdict,
    step: str,
    age_us: int | None,
    not_before_in_us: int,
    expires_in_us: int | None,
) -> None:
    """Ages count from the last byte, the life from the request; what is unknown stays as it is."""
    request, _ = attempt().end(verdict, Times(NOW, SENT, LAST))
    assert request.step == step
    assert request.refreshed_age_us == (NEVER if age_us is None else age_us * SECOND)
    assert request.not_before_in_us == not_before_in_us * SECOND
    assert request.expires_in_us == (NEVER if expires_in_us is None else expires_in_us * SECOND)
    assert request.idle_us == (9 * SECOND if step == "STORED" else NEVER)
    assert (request.from_generation, request.generation) == (7, 7 + has_secrets(verdict))
    assert bool(request.message) == (request.condition is not Condition.READY)
    later = request.later(5 * SECOND)
    assert later.not_before_in_us == request.not_before_in_us - 5 * SECOND
    if age_us is not None:
        assert later.refreshed_age_us == (age_us + 5) * SECOND
    if expires_in_us is not None:
        assert later.expires_in_us == max(0, expires_in_us - 5) * SECOND
    else:
        assert later.expires_in_us == NEVER


@pytest.mark.parametrize(
    ("condition", "step", "not_sent", "ends"),
    [
        (Condition.REAUTHORIZE, "NOT_ISSUED", 0, True),
        (Condition.REAUTHORIZE, "NOT_ISSUED", 1, False),
        (Condition.REAUTHORIZE, "UNPROVEN", 0, False),
        (Condition.REAUTHORIZE, "INTENDED", 0, False),
        (Condition.READY, "NOT_ISSUED", 0, False),
    ],
)
def test_the_pause_of_a_refused_probe(
    condition: Condition, step: str, not_sent: int, ends: bool
) -> None:
    """A late answer ends it; any other pause, and the interval after the last refresh, hold."""
    one = attempt()
    refreshed_us, paused_us = NOW - 5 * SECOND, NOW + 3600 * SECOND
    record = msgspec.structs.replace(
        one.record,
        condition=condition,
        attempt_step=step,
        not_sent=not_sent,
        refreshed_us=refreshed_us,
        not_before_us=paused_us,
    )
    late = replace(one, record=record)
    times = Times(NOW, SENT, LAST)
    until_us = refreshed_us + RULES.interval_us if ends else paused_us
    request, _ = late.end(Issued("t", None, "r"), times)
    assert request.not_before_in_us == until_us - NOW
    request, _ = late.end(Refused(Refusal.TOO_EARLY, "access_denied"), times)
    assert request.not_before_in_us == paused_us - NOW


@pytest.mark.parametrize("rotation", Rotation)
def test_when_a_request_without_proof_is_settled(rotation: Rotation) -> None:
    """At the end of its right, but at once within a proved grace period; both are counted."""
    rules = Rules(rotation, 572 * SECOND, 600 * SECOND, grace_us=60 * SECOND)
    one = attempt(rules)
    over_us = NOW + 80 * SECOND
    at_once = one.is_settled(Unproven("x"), Times(NOW, SENT, over_us))
    assert at_once == (rotation is Rotation.GRACE)
    request, _ = one.end(Unproven("x"), Times(NOW, SENT, over_us))
    assert request.unproven == 1
    if at_once:
        assert (request.not_before_in_us, request.refreshed_age_us) == (0, NEVER)
    noted = one.note(Unproven("x"))
    assert (noted.step, noted.unproven, noted.refreshed_age_us) == ("INTENDED", 0, NEVER)


def test_instants_of_two_clocks() -> None:
    """An instant of the boot clock is as early, or as late, as it can have been."""
    anchor = Anchor(store_us=1_000, asked_us=10, answered_us=14)
    assert (anchor.earliest_us(20), anchor.latest_us(20)) == (1_006, 1_010)


def test_a_grace_period_breaks_no_interval() -> None:
    """A provider with an interval may refuse a repeat at once, and count it as an error."""
    policy = Policy(
        name="mine",
        refresh=Refresh(interval=Seconds(570), rotation="grace", grace=Seconds(60)),
    )
    assert rules_of(policy, 0).grace_us == 60 * SECOND
    assert rules_of(policy, 572 * SECOND).grace_us == 0


@pytest.mark.parametrize(
    ("error", "is_shown"),
    [
        ("invalid_grant", True),
        ("code a-refresh-token-that-is-secret is used", False),
        ("sh-token", False),
        ("a-refresh-token-that-is-sec", False),
        ("the client s3cr3t is wrong", False),
    ],
)
def test_an_error_that_repeats_a_secret(error: str, is_shown: bool) -> None:
    """A part of one is enough; other errors stay as they are."""
    refused = Refused(Refusal.DEAD, error)
    found = without_secrets(refused, "a-refresh-token-that-is-secret", "s3cr3t", "")
    assert isinstance(found, Refused)
    assert (found.error == error) == is_shown
    assert found.why is Refusal.DEAD
