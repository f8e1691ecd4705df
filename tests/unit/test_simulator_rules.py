"""The simulated provider's rules at their edges, with time handed in."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from holdoff.simulator import Provider, Rotation, Rule, Seed
from holdoff.simulator.rules import (
    BLOCK_MS,
    CALLS_PER_MINUTE,
    DAY_MS,
    ERRORS_PER_HOUR,
    HOUR_MS,
    MINUTE_MS,
    REFRESH_TOKEN_IDLE_MS,
    SECOND_MS,
    TOKEN_CALLS_PER_DAY,
    TokenForm,
)

if TYPE_CHECKING:
    from holdoff.simulator.rules import Answer

SEED = Seed()
START_MS = 20_000 * DAY_MS  # a midnight, so that every window starts full
ACCOUNTS = "535193/crm/Accounts"
MISSING = "535193/crm/Nothing"


def provider(rotation: Rotation = Rotation.REUSE, *seeds: Seed, **more: Any) -> Provider:
    """Make a provider whose tokens are numbered."""
    numbers = count(1)
    return Provider(
        seeds or (SEED,),
        start_ms=START_MS,
        rotation=rotation,
        new_token=lambda: f"token-{next(numbers)}",
        **more,
    )


def form(refresh_token: str = SEED.refresh_token, seed: Seed = SEED) -> TokenForm:
    """Fill in a token request."""
    return TokenForm("refresh_token", seed.client_id, seed.client_secret, refresh_token)


def refresh(p: Provider, now_ms: int, fields: TokenForm | None = None) -> Answer:
    """Ask for a token, the answer leaving at once."""
    answer = p.token(fields or form(), "job/a", now_ms)
    p.sent(answer, now_ms)
    return answer


def bearer(p: Provider, now_ms: int = START_MS, seed: Seed = SEED) -> str:
    """Get an access token."""
    return str(refresh(p, now_ms, form(seed.refresh_token, seed)).body["access_token"])


def broken(p: Provider) -> dict[str, int]:
    """Count the broken rules in the report, leaving out the kept ones."""
    totals: Any = p.report(START_MS)["totals"]
    return {rule: n for rule, n in totals["by_rule"].items() if n}


def test_interval_counts_from_the_last_byte() -> None:
    """569.999 s after the last byte is too early and 570 s is not.

    Fails when the interval is counted from the request instead of its answer.
    """
    p = provider()
    first = p.token(form(), "job/a", START_MS)
    p.sent(first, START_MS + 3 * SECOND_MS)
    sent_ms = START_MS + 3 * SECOND_MS

    early = refresh(p, sent_ms + 569_999)
    assert (early.status, early.body) == (
        400,
        {
            "error": "access_denied",
            "error_description": "Rate limit exceeded: access_token not expired",
        },
    )
    assert early.headers["Reason"].startswith("TooEarlyToRefreshTokens")
    assert broken(p) == {Rule.REFRESH_INTERVAL: 1}
    assert refresh(p, sent_ms + 570_000).status == 200


def test_request_while_an_answer_is_under_way_is_too_early() -> None:
    """A second request before the first answer's last byte is refused."""
    p = provider()
    p.token(form(), "job/a", START_MS)
    assert p.token(form(), "job/b", START_MS + 600_000).status == 400


def test_refused_request_does_not_restart_the_interval() -> None:
    """Only an access token starts the 570 s, so a refusal in between changes nothing."""
    p = provider()
    refresh(p, START_MS)
    refresh(p, START_MS + 500_000)
    assert refresh(p, START_MS + 570_000).status == 200


def test_answer_carries_a_new_refresh_token_and_seconds_as_digits() -> None:
    """Every answer has another refresh token, and `expires_in` in real seconds as a string."""
    answer = refresh(provider(time_scale=120), START_MS)
    assert answer.body["refresh_token"] != SEED.refresh_token
    assert answer.body["expires_in"] == "5"


def test_reuse_takes_an_old_refresh_token_for_ever() -> None:
    """Under `reuse` the first refresh token works on, also after months."""
    p = provider()
    refresh(p, START_MS)
    assert refresh(p, START_MS + 90 * DAY_MS).status == 200
    assert broken(p) == {}


def test_strict_refuses_an_old_refresh_token() -> None:
    """Under `strict` a used token gets a 401 and is a broken rule, its successor works.

    Fails when strict rotation lets the used token through.
    """
    p = provider(Rotation.STRICT)
    fresh = str(refresh(p, START_MS).body["refresh_token"])
    old = refresh(p, START_MS + 570_000)
    assert (old.status, old.body) == (
        401,
        {"error": "unauthorized_client", "error_description": "Old refresh token used."},
    )
    assert broken(p) == {Rule.OLD_REFRESH_TOKEN: 1}
    assert refresh(p, START_MS + 570_000, form(fresh)).status == 200


def test_strict_refresh_token_expires_unused() -> None:
    """Under `strict` a refresh token dies after 30 days unused, with both times in the text."""
    expiry_ms = START_MS + REFRESH_TOKEN_IDLE_MS
    assert refresh(provider(Rotation.STRICT), expiry_ms - 1).status == 200
    answer = refresh(provider(Rotation.STRICT), expiry_ms)
    assert answer.status == 400
    assert answer.body == {
        "error": "invalid_request",
        "error_description": "The refresh token expired at 11/3/2024 12:00:00 AM"
        " and it is now 11/3/2024 12:00:00 AM.",
    }


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        (TokenForm("refresh_token", SEED.client_id, "no", "x"), 401, "invalid_client"),
        (TokenForm("refresh_token", "nobody", "", "x"), 401, "invalid_client"),
        (replace(form(), grant_type="password"), 400, "unsupported_grant_type"),
        (form("unheard-of"), 400, "invalid_grant"),
    ],
)
def test_bad_token_requests(fields: TokenForm, status: int, error: str) -> None:
    """A request with a wrong field is refused as OAuth has it."""
    answer = refresh(provider(), START_MS, fields)
    assert (answer.status, answer.body["error"]) == (status, error)


def test_tenth_error_is_allowed_and_the_eleventh_blocks() -> None:
    """Ten errors on an endpoint pass; the eleventh blocks the key for everything.

    Fails when the limit is off by one in either direction.
    """
    p = provider()
    access = bearer(p)
    for _ in range(ERRORS_PER_HOUR):
        assert p.call(MISSING, None, access, "job/a", START_MS).status == 404
    assert broken(p) == {}
    assert p.call(ACCOUNTS, None, access, "job/a", START_MS).status == 200

    assert p.call(MISSING, None, access, "job/guilty", START_MS).status == 404
    assert broken(p) == {Rule.ERROR_LIMIT: 1}
    assert p.call(ACCOUNTS, None, access, "job/a", START_MS).status == 403
    assert refresh(p, START_MS + 570_000).status == 403

    report: Any = p.report(START_MS)
    [violation] = report["violations"]
    assert violation["agent"] == "job/guilty"
    assert violation["endpoint"] == "crm/Nothing"
    assert violation["division"] == "535193"
    assert report["agents"]["job/a"]["refused_while_blocked"] == 2


def test_error_hour_slides() -> None:
    """An error leaves its window exactly an hour later, not at the clock's hour.

    Fails when errors are counted per clock hour, or a millisecond too long.
    """
    first_ms = START_MS + 59 * MINUTE_MS  # the clock's hour ends a minute later
    for last_ms, blocked in ((first_ms + HOUR_MS - 1, True), (first_ms + HOUR_MS, False)):
        p = provider()
        access = bearer(p, first_ms)
        for _ in range(ERRORS_PER_HOUR):
            p.call(MISSING, None, access, "job/a", first_ms)
        access = bearer(p, last_ms)
        p.call(MISSING, None, access, "job/a", last_ms)
        assert (broken(p) == {Rule.ERROR_LIMIT: 1}) is blocked


def test_errors_are_counted_apart_by_endpoint_division_and_user() -> None:
    """Ten errors on each of several scopes block nobody."""
    other = Seed(user="sales@example.com", refresh_token="other")
    p = provider(Rotation.REUSE, SEED, other)
    mine, theirs = bearer(p), bearer(p, seed=other)
    minutes = count()
    for access, path in (
        (mine, MISSING),
        (mine, "535194/crm/Nothing"),
        (mine, "535193/hrm/Nothing"),
        (theirs, MISSING),
    ):
        now_ms = START_MS + next(minutes) * MINUTE_MS
        for _ in range(ERRORS_PER_HOUR):
            assert p.call(path, None, access, "job/a", now_ms).status == 404
    assert broken(p) == {}


def test_refused_refreshes_are_errors_too() -> None:
    """Eleven refusals by the token endpoint block the key as well."""
    p = provider()
    refresh(p, START_MS)
    for _ in range(ERRORS_PER_HOUR + 1):
        refresh(p, START_MS)
    assert broken(p) == {Rule.REFRESH_INTERVAL: 11, Rule.ERROR_LIMIT: 1}


def test_block_lifts_after_an_hour_and_the_next_is_longer() -> None:
    """A block ends exactly an hour later; a repeat lasts two.

    Fails when refusals during a block count as errors and prolong it.
    """
    p = provider()

    def offend(now_ms: int) -> None:
        access = bearer(p, now_ms)
        for _ in range(ERRORS_PER_HOUR + 1):
            p.call(MISSING, None, access, "job/a", now_ms)

    offend(START_MS)
    lifted_ms = START_MS + BLOCK_MS
    for now_ms in range(START_MS, lifted_ms, 5 * MINUTE_MS):
        assert refresh(p, now_ms).status == 403
    assert refresh(p, lifted_ms - 1).status == 403
    offend(lifted_ms)
    assert refresh(p, lifted_ms + 2 * BLOCK_MS - 1).status == 403
    assert refresh(p, lifted_ms + 2 * BLOCK_MS).status == 200
    assert broken(p) == {Rule.ERROR_LIMIT: 2}


def test_sixty_first_call_of_a_minute_gets_429() -> None:
    """The 61st call in a clock minute gets the minute's headers only, the next minute is new.

    Fails when the day's headers come along or the limit is off by one.
    """
    p = provider(time_scale=30)
    access = bearer(p)
    now_ms = START_MS + 15 * SECOND_MS
    for left in reversed(range(CALLS_PER_MINUTE)):
        answer = p.call(ACCOUNTS, None, access, "job/a", now_ms)
        assert answer.status == 200
        assert answer.headers["X-RateLimit-Minutely-Remaining"] == str(left)
    assert answer.headers["X-RateLimit-Remaining"] == "4940"
    assert answer.headers["X-RateLimit-Reset"] == str(START_MS + DAY_MS)

    refused = p.call(ACCOUNTS, None, access, "job/a", now_ms)
    assert refused.status == 429
    assert refused.headers == {
        "X-RateLimit-Minutely-Limit": "60",
        "X-RateLimit-Minutely-Remaining": "0",
        "X-RateLimit-Minutely-Reset": str(START_MS + MINUTE_MS),
        "Retry-After": "2",  # 45 simulated seconds, in real ones, rounded up
    }
    assert broken(p) == {Rule.CALLS_PER_MINUTE: 1}
    assert p.call("535194/crm/Accounts", None, access, "job/a", now_ms).status == 200
    assert p.call(ACCOUNTS, None, access, "job/a", START_MS + MINUTE_MS).status == 200


def test_token_requests_of_a_day() -> None:
    """The 201st token request of a day breaks a rule, the next day is new."""
    users = tuple(Seed(user=f"{n}@example.com", refresh_token=f"r{n}") for n in range(2))
    p = provider(Rotation.REUSE, *users)
    first, second = (form(seed.refresh_token) for seed in users)
    # A key may make ten errors an hour, so 200 requests take most of the day.
    for n in range(TOKEN_CALLS_PER_DAY):
        refresh(p, START_MS + n * 7 * MINUTE_MS, first)
    last_ms = START_MS + (TOKEN_CALLS_PER_DAY - 1) * 7 * MINUTE_MS
    assert Rule.TOKEN_CALLS_PER_DAY not in broken(p)
    assert refresh(p, last_ms, first).status == 429
    assert broken(p)[Rule.TOKEN_CALLS_PER_DAY] == 1
    assert refresh(p, last_ms, second).status == 200
    assert refresh(p, START_MS + DAY_MS, first).status == 200


@pytest.mark.parametrize(
    ("path", "odata_filter", "status"),
    [
        ("current/Me", None, 200),
        (ACCOUNTS, "Code eq 'X' and Modified gt datetime'2026-01-01'", 200),
        (ACCOUNTS, "substringof('x',Name) eq true", 200),
        ("535193/crm/Accounts(guid'0')", None, 200),
        (ACCOUNTS, "Code eq", 400),
        ("999/crm/Accounts", None, 403),
        (MISSING, None, 404),
    ],
)
def test_api_answers(path: str, odata_filter: str | None, status: int) -> None:
    """A job can provoke a 400, a 403 and a 404, and each counts as an error."""
    p = provider()
    assert p.call(path, odata_filter, bearer(p), "job/a", START_MS).status == status
    report: Any = p.report(START_MS)
    assert report["agents"]["job/a"]["errors"] == (status != 200)


def test_access_token_lives_600_seconds() -> None:
    """An access token works until 600 s after its issue; an expired one is an error, counted."""
    p = provider()
    access = bearer(p)
    assert p.call(ACCOUNTS, None, access, "job/a", START_MS + 599_999).status == 200
    assert p.call(ACCOUNTS, None, access, "job/a", START_MS + 600_000).status == 401
    report: Any = p.report(START_MS)
    assert report["agents"]["job/a"]["errors"] == 1


def test_unknown_access_token_is_nobodys_error() -> None:
    """A bearer that belongs to no key gets a 401 and can block no key."""
    p = provider()
    for _ in range(ERRORS_PER_HOUR + 1):
        assert p.call(ACCOUNTS, None, "made-up", "job/a", START_MS).status == 401
    assert broken(p) == {}
