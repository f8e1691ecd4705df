"""What is said of a grant, from its record and what prevents a request. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdoff.names import TokenName
from holdoff.policies import presets
from holdoff.v1 import grant_pb2
from holdoff_coordinator.custody.messages import HELD_WORDS, grant_message, shown, status_of
from holdoff_coordinator.custody.records import Facts, Held, Record
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US, Condition
from holdoff_coordinator.policies import Policies

NAME = TokenName("exact-nl", "finance")
NOW = 1_000_000 * SECOND
SOON, LATER = NOW + 5 * SECOND, NOW + 60 * SECOND
FACTS = Facts(
    client_id="c",
    token_url="https://login.example/token",
    api_hosts=("api.example",),
    client_authentication="body",
    key_id="k1",
)


def held(reason: str = "", until_us: int = 0, **changes: Any) -> Held:
    """A grant that was refreshed long ago, changed."""
    record = Record(
        chain="0" * 32,
        generation=3,
        facts=msgspec.json.encode(FACTS).decode(),
        fingerprint="f",
        condition=Condition.READY,
        created_us=NOW - 4000 * SECOND,
        since_us=NOW - 4000 * SECOND,
        refreshed_us=NOW - 3000 * SECOND,
        not_before_us=NOW - 2400 * SECOND,
        expires_us=0,
        idle_us=0,
        unproven=0,
        first_unproven_us=0,
        not_sent=0,
    )
    return Held("finance", msgspec.structs.replace(record, **changes), reason, until_us, NOW)


def state(one: Held, *, has_key: bool = True) -> tuple[str, int, str]:
    """Return the state, until when, and the message."""
    status = status_of(NAME, one, has_key=has_key)
    word = grant_pb2.GrantState.Name(status.state).removeprefix("GRANT_STATE_")
    return word, status.until_time.ToMicroseconds(), status.message


BEGUN: dict[str, Any] = {
    "attempt": "a",
    "attempt_replica": "web1",
    "attempt_begun_us": NOW - SECOND,
}
STATES: dict[str, tuple[Held, str, int, str]] = {
    "nothing in the way": (held(), "READY", 0, "may be requested"),
    "an access token": (held(expires_us=SOON), "READY", SOON, "there is"),
    "it lives through a cooldown": (
        held("COOLING", LATER, expires_us=SOON, not_before_us=LATER),
        *("READY", SOON, "there is"),
    ),
    "it lives through a quarantine": (
        held("QUARANTINED", LATER, expires_us=SOON),
        *("READY", SOON, "there is"),
    ),
    "its own pause": (held(not_before_us=SOON), "COOLING", SOON, "holdoff token show"),
    "a request that was not sent": (
        held(not_before_us=SOON, not_sent=1, attempt_outcome="not sent: refused", **BEGUN),
        *("COOLING", SOON, "failed (not sent: refused)"),
    ),
    "the cooldown of the token": (held("COOLING", LATER), "COOLING", LATER, "token show"),
    "both": (held("COOLING", SOON, not_before_us=LATER), "COOLING", LATER, "token show"),
    "a quarantine": (held("QUARANTINED", LATER), "HELD", LATER, "quarantine show apps/exact-nl"),
    "a lease": (held("LEASED", LATER), "HELD", LATER, f"holdoff watch {NAME}"),
    "a lock": (held("LOCKED", SOON), "HELD", SOON, "python-redis-lock"),
    "a back-off": (held("BACKING_OFF", LATER), "HELD", LATER, f"holdoff explain {NAME}"),
    "a request": (
        held(attempt_step="INTENDED", **BEGUN),
        *("REFRESHING", NOW - SECOND + TAKEOVER_US, "web1"),
    ),
    "a request that is over": (held(attempt_step="UNPROVEN", **BEGUN), "READY", 0, "may be"),
    "a dead refresh token": (
        held(condition=Condition.REAUTHORIZE, expires_us=SOON),
        *("REAUTHORIZE", 0, f"holdoff grant authorize {NAME}"),
    ),
    "with what the provider said": (
        held(condition=Condition.REAUTHORIZE, message="invalid_grant"),
        *("REAUTHORIZE", 0, "invalid_grant: authorize again"),
    ),
    "a wrong client": (held(condition=Condition.CONFIGURATION), "CONFIGURATION", 0, "client id"),
    "newer data was lost": (held(condition=Condition.STALE), "STALE", 0, "newer refresh token"),
}


@pytest.mark.parametrize("case", STATES)
def test_the_state_of_a_grant(case: str) -> None:
    """Each says until when, and what to do or where to look."""
    one, *expected, words = STATES[case]
    *found, message = state(one)
    assert found == expected
    assert words in message


def test_a_missing_key_comes_first() -> None:
    """Whatever else is true of the grant, nothing can be done without its key."""
    for one, *_ in STATES.values():
        word, until_us, message = state(one, has_key=False)
        assert (word, until_us) == ("KEY_MISSING", 0)
        assert "k1.key" in message


def test_everything_that_prevents_a_request_has_words() -> None:
    """Fails when a script gives a reason that nobody can read."""
    for reason in HELD_WORDS:
        assert state(held(reason, LATER))[0] in {"HELD", "COOLING"}


def test_an_access_token_that_expired_has_no_expiry() -> None:
    """Fails when a grant shows the expiry of a token that can no longer be had."""
    assert not grant_message(NAME, held(expires_us=NOW), ["k1"]).HasField("expire_time")
    assert grant_message(NAME, held(expires_us=SOON), ["k1"]).HasField("expire_time")


@pytest.mark.parametrize(
    ("policy", "reason", "changes", "is_stale"),
    [
        ("exact-online", "", {}, True),
        ("exact-online", "COOLING", {"expires_us": SOON}, True),
        ("exact-online", "QUARANTINED", {}, False),
        ("exact-online", "", {"condition": Condition.REAUTHORIZE}, False),
        ("exact-online", "", {"attempt_step": "INTENDED", **BEGUN}, False),
        ("no-such-policy", "", {}, False),
    ],
)
def test_a_grant_that_may_be_of_a_backup(
    policy: str, reason: str, changes: dict[str, Any], is_stale: bool
) -> None:
    """It is shown as stale, except while a newer one may still come."""
    one = msgspec.structs.replace(held(reason, LATER, **changes), policy=policy)
    policies = Policies(presets())
    assert shown(one, policies) is one
    restored = msgspec.structs.replace(one, restored_us=NOW - 9 * SECOND)
    assert (shown(restored, policies).record.condition is Condition.STALE) == is_stale
