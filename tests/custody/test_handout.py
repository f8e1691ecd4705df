"""What a stream of access tokens is told, from a grant and the time. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from holdoff.names import TokenName
from holdoff.policies import presets
from holdoff.v1 import grant_pb2
from holdoff_coordinator.custody.handout import MARGIN_US, Stand, margin_of, stand_of
from holdoff_coordinator.custody.records import Facts, Held, Record
from holdoff_coordinator.custody.rules import SECOND, Condition
from holdoff_coordinator.custody.sealing import AccessSecrets

NAME = TokenName("exact-nl", "finance")
NOW = 1_000_000 * SECOND
"""By the store's clock."""
BOOT = 500 * SECOND
"""The same instant by ours."""
MARGIN = 28 * SECOND
SECRETS = AccessSecrets("an-access-token-that-nobody-may-read")
FACTS = Facts(
    client_id="c",
    token_url="https://login.example/token",
    api_hosts=("api.example",),
    client_authentication="body",
    key_id="k1",
)


def stand(  # noqa: PLR0913 - what a look shows
    *,
    before: Stand | None = None,
    has_key: bool = True,
    reason: str = "",
    until_us: int = 0,
    now_us: int = NOW,
    looked_us: int = BOOT,
    **changes: Any,
) -> Stand:
    """How a grant stands whose access token lives for 600 s more, changed."""
    record = Record(
        chain="0" * 32,
        generation=3,
        sealed_access="c2VhbGVk",
        facts=msgspec.json.encode(FACTS).decode(),
        fingerprint="f",
        condition=Condition.READY,
        created_us=NOW - 4000 * SECOND,
        since_us=NOW - 4000 * SECOND,
        refreshed_us=NOW,
        not_before_us=NOW + 572 * SECOND,
        expires_us=NOW + 600 * SECOND,
        idle_us=0,
        unproven=0,
        first_unproven_us=0,
        not_sent=0,
    )
    held = Held("finance", msgspec.structs.replace(record, **changes), reason, until_us, now_us)
    secrets = SECRETS if has_key else None
    return stand_of(NAME, held, looked_us, MARGIN, secrets, has_key, before)


def state(one: Stand) -> str:
    """Return the word of a state."""
    return grant_pb2.GrantState.Name(one.status.state).removeprefix("GRANT_STATE_")


def test_a_token_is_handed_out_once_with_its_remaining_life() -> None:
    """The life is that at the instant of sending, by the boot clock."""
    now = BOOT + 100 * SECOND
    response = stand().response(now, None, 7 * SECOND)
    token = response.access_token
    assert token.access_token == SECRETS.access_token
    assert (token.generation, list(token.api_hosts)) == (3, ["api.example"])
    assert (token.remaining.ToSeconds(), token.early_margin.ToSeconds()) == (500, 28)
    assert (response.has_access_token, response.stream_age.ToSeconds()) == (True, 7)
    again = stand().response(now, stand().version, 8 * SECOND)
    assert (again.HasField("access_token"), again.has_access_token) == (False, True)


def test_no_token_is_handed_out_within_its_margin() -> None:
    """Neither is one that was fresh at the look; what prevents the next one is said instead."""
    end = BOOT + 572 * SECOND
    assert stand().hands_out(end - 1, None)
    assert not stand().response(end, None, 0).has_access_token
    late = stand(now_us=NOW + 580 * SECOND, looked_us=BOOT + 580 * SECOND, reason="LEASED")
    assert (state(late), late.is_usable(BOOT)) == ("HELD", False)
    assert late.secrets is None


def test_a_clock_of_the_store_that_goes_back_makes_no_token_younger() -> None:
    """Neither a current one nor one that is over."""
    first = stand()
    later = stand(before=first, looked_us=BOOT + 100 * SECOND)
    assert later.usable_until_us == first.usable_until_us
    over = stand(before=first, looked_us=BOOT + 572 * SECOND)
    assert not over.usable_until_us
    assert not stand(before=over, looked_us=BOOT + 573 * SECOND).usable_until_us
    renewed = stand(before=over, looked_us=BOOT + 573 * SECOND, generation=4)
    assert renewed.usable_until_us == BOOT + (573 + 572) * SECOND


def test_a_state_beside_a_current_token_is_news() -> None:
    """A stream learns that a person must authorize again before its token ends."""
    dead = stand(condition=Condition.REAUTHORIZE)
    assert (state(dead), dead.news == stand().news) == ("REAUTHORIZE", False)
    assert dead.response(BOOT, stand().version, 0).has_access_token
    under_way = stand(attempt="a", attempt_step="BEGUN", attempt_begun_us=NOW)
    assert (state(under_way), under_way.news == stand().news) == ("REFRESHING", False)


def test_a_restore_is_news_for_those_who_watch() -> None:
    """Others learn of it when a refresh is due, and a replica has presented what it has."""
    one = stand()
    restored = dataclasses.replace(one, held=msgspec.structs.replace(one.held, restored_us=NOW))
    assert (restored.changes == one.changes, restored.news == one.news) == (False, True)


def test_a_lease_that_is_renewed_is_no_news() -> None:
    """Fails when each of its renewals is told to each stream."""
    none: dict[str, Any] = {"expires_us": 0, "sealed_access": "", "not_before_us": NOW}
    one, other = (stand(reason="LEASED", until_us=NOW + end * SECOND, **none) for end in (30, 60))
    assert (state(one), one.news) == ("HELD", other.news)


def test_a_key_that_is_missing_hands_out_nothing() -> None:
    """Who has the token from another replica keeps it."""
    missing = stand(has_key=False)
    response = missing.response(BOOT, None, 0)
    assert (state(missing), response.HasField("access_token")) == ("KEY_MISSING", False)
    assert response.has_access_token


def test_it_looks_again_when_a_state_ends_and_never_at_once() -> None:
    """A right to a request that has passed would else be looked at without a pause."""
    assert stand().look_in_seconds == 15
    soon = stand(looked_us=BOOT + 571 * SECOND, before=stand())
    assert soon.look_in_seconds == 1
    none: dict[str, Any] = {"expires_us": 0, "sealed_access": ""}
    assert stand(**none).look_in_seconds == 2
    assert stand(not_before_us=NOW + 1, **none).look_in_seconds == 0.1
    passed: dict[str, Any] = {
        "attempt": "a",
        "attempt_step": "BEGUN",
        "attempt_begun_us": NOW - 500 * SECOND,
    }
    assert stand(**none, **passed).look_in_seconds == 2


def test_the_margin_is_the_policys() -> None:
    """Without one it is 10 s, or a tenth of a short life."""
    policy = presets()["exact-online"]
    assert margin_of(policy) == 28 * SECOND
    assert margin_of(None) == MARGIN_US
    refresh = msgspec.structs.replace(policy.refresh, early_margin=None)
    policy = msgspec.structs.replace(policy, refresh=refresh)
    assert margin_of(policy) == 10 * SECOND
    refresh = msgspec.structs.replace(refresh, access_token_life=20)
    assert margin_of(msgspec.structs.replace(policy, refresh=refresh)) == 2 * SECOND


def test_a_stand_does_not_show_its_secret() -> None:
    """Promise 8."""
    assert SECRETS.access_token not in repr(stand())
    assert SECRETS.access_token not in str(dataclasses.astuple(stand()))
