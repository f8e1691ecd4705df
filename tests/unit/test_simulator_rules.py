"""The simulated provider's rules at their edges, with time handed in."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime, timedelta
from functools import reduce
from itertools import count
from typing import Any

import pytest

from holdoff.simulator import (
    Fault,
    FaultKind,
    Provider,
    Rotation,
    Rule,
    Seed,
    Switches,
    accounting,
)
from holdoff.simulator.api import Request
from holdoff.simulator.limits import (
    BLOCK_MS,
    CALLS_PER_DAY,
    CALLS_PER_MINUTE,
    DAY_MS,
    ERRORS_PER_HOUR,
    HOUR_MS,
    MINUTE_MS,
    REFRESH_TOKEN_IDLE_MS,
    SECOND_MS,
    TOKEN_CALLS_PER_DAY,
)
from holdoff.simulator.oauth import TokenForm

SEED = Seed()
START_MS = 20_000 * DAY_MS  # a midnight, so that every window starts full
ACCOUNTS = "535193/crm/Accounts"
MISSING = "535193/crm/Nothing"


def provider(rotation: Rotation = Rotation.REUSABLE, *seeds: Seed, **more: Any) -> Provider:
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


def refresh(
    p: Provider, now_ms: int, fields: TokenForm | None = None, fault: Fault | None = None
) -> Any:
    """Ask for a token, the answer leaving at once."""
    answer = p.token(fields or form(), "job/a", now_ms, fault)
    p.sent(answer, now_ms)
    return answer


def bearer(p: Provider, now_ms: int = START_MS, seed: Seed = SEED) -> str:
    """Get an access token."""
    return str(refresh(p, now_ms, form(seed.refresh_token, seed)).body["access_token"])


def call(  # noqa: PLR0913, PLR0917 -- what was asked, by whom and when
    p: Provider, path: str, access: str, agent: str, now_ms: int, odata_filter: str | None = None
) -> Any:
    """Call the REST API for an entity."""
    query = (("$top", "1"), ("$filter", odata_filter or ""))
    return p.call(Request(f"/api/v1/{path}", access, agent, query), now_ms)


def switched(*settings: str, rotation: Rotation = Rotation.REUSABLE) -> Provider:
    """Make a provider with some switches set."""
    return provider(rotation, switches=reduce(Switches.set, settings, Switches()))


def offend(p: Provider, now_ms: int, fields: TokenForm | None = None) -> None:
    """Get a token and make one error more than an hour allows."""
    access = str(refresh(p, now_ms, fields).body["access_token"])
    for _ in range(ERRORS_PER_HOUR + 1):
        assert call(p, MISSING, access, "job/a", now_ms).status == 404


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
    reason = "TooEarlyToRefreshTokens: Rate limit exceeded: access_token not expired"
    assert early.headers["Reason"] == reason
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


@pytest.mark.parametrize("rotation", [Rotation.NONE, Rotation.REUSABLE])
def test_rotations_without_an_end(rotation: Rotation) -> None:
    """Under `none` and `reusable` the first refresh token remains valid, also after months."""
    p = provider(rotation)
    for now_ms in (START_MS, START_MS + DAY_MS, START_MS + 90 * DAY_MS):
        answer = refresh(p, now_ms)
        assert answer.status == 200
        assert ("refresh_token" in answer.body) == (rotation is Rotation.REUSABLE)
    assert broken(p) == {}


SECOND_REFRESH_MS = START_MS + 570_000
THIRD_REFRESH_MS = SECOND_REFRESH_MS + 570_000
GRACE_S = 600


def refreshed(
    rotation: Rotation = Rotation.UNTIL_USED, *settings: str, **more: Any
) -> tuple[Provider, str, str]:
    """Refresh once: the provider, the new refresh token and the access token."""
    p = provider(rotation, switches=reduce(Switches.set, settings, Switches()), **more)
    body = refresh(p, START_MS).body
    return p, body["refresh_token"], body["access_token"]


@pytest.mark.parametrize("rotation", [Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES])
def test_single_use_refuses_an_old_refresh_token(rotation: Rotation) -> None:
    """A used token gets a 401 and breaks a rule.

    Fails when a single-use token is accepted twice.
    """
    p, _, _ = refreshed(rotation)
    old = refresh(p, SECOND_REFRESH_MS)
    assert (old.status, old.body) == (
        401,
        {"error": "unauthorized_client", "error_description": "Old refresh token used."},
    )
    assert broken(p) == {Rule.OLD_REFRESH_TOKEN: 1}


def test_single_use_leaves_the_chain() -> None:
    """After the use of an old token the newest one and its access token are valid."""
    p, fresh, access = refreshed(Rotation.SINGLE_USE)
    assert refresh(p, START_MS).status == 401
    assert call(p, ACCOUNTS, access, "job/a", START_MS).status == 200
    assert refresh(p, SECOND_REFRESH_MS, form(fresh)).status == 200


def test_single_use_revokes_the_chain() -> None:
    """The use of an old token revokes the newest one and all access tokens, of this chain only.

    Fails when anything of the chain still works, or when another user's tokens are revoked too.
    """
    other = Seed(user="sales@example.com", refresh_token="other")
    p = provider(Rotation.SINGLE_USE_REVOKES, SEED, other)
    first = refresh(p, START_MS).body
    theirs = bearer(p, START_MS, other)
    second = refresh(p, SECOND_REFRESH_MS, form(first["refresh_token"])).body
    assert call(p, ACCOUNTS, first["access_token"], "job/a", SECOND_REFRESH_MS).status == 200

    assert refresh(p, THIRD_REFRESH_MS).status == 401
    revoked = refresh(p, THIRD_REFRESH_MS, form(second["refresh_token"]))
    assert (revoked.status, revoked.body["error"]) == (400, "invalid_grant")
    for access in (first["access_token"], second["access_token"]):
        assert call(p, ACCOUNTS, access, "job/a", SECOND_REFRESH_MS).status == 401
    assert call(p, ACCOUNTS, theirs, "job/a", SECOND_REFRESH_MS).status == 200
    assert broken(p) == {Rule.OLD_REFRESH_TOKEN: 1}


def test_calls_with_a_revoked_token_are_errors_of_its_app() -> None:
    """A job that repeats a call with a revoked access token gets its key blocked, as when expired.

    Fails when the errors are not counted because the token is not known any more.
    """
    p = provider(Rotation.SINGLE_USE_REVOKES)
    access = refresh(p, START_MS).body["access_token"]
    assert refresh(p, SECOND_REFRESH_MS).status == 401
    for _ in range(ERRORS_PER_HOUR + 1):
        assert call(p, ACCOUNTS, access, "job/a", SECOND_REFRESH_MS).status == 401
    assert call(p, ACCOUNTS, access, "job/a", SECOND_REFRESH_MS).status == 403
    assert broken(p)[Rule.ERROR_LIMIT] == 1


def test_until_used_ends_at_a_refresh() -> None:
    """An old token is valid until a newer one was used for a refresh.

    Fails when it is refused earlier, or accepted later.
    """
    for setting in ("used-at=refresh-or-call", "used-at=refresh"):
        p, fresh, _ = refreshed(Rotation.UNTIL_USED, setting)
        assert refresh(p, SECOND_REFRESH_MS).status == 200

        p, fresh, _ = refreshed(Rotation.UNTIL_USED, setting)
        assert refresh(p, SECOND_REFRESH_MS, form(fresh)).status == 200
        assert refresh(p, THIRD_REFRESH_MS).status == 401
        assert broken(p) == {Rule.OLD_REFRESH_TOKEN: 1}


@pytest.mark.parametrize(("used_at", "status"), [("refresh-or-call", 401), ("refresh", 200)])
def test_switch_used_at(used_at: str, status: int) -> None:
    """A call with the new access token ends the old refresh token, or does not."""
    p, fresh, access = refreshed(Rotation.UNTIL_USED, f"used-at={used_at}")
    call(p, ACCOUNTS, access, "job/a", START_MS)
    assert refresh(p, SECOND_REFRESH_MS).status == status
    assert refresh(p, THIRD_REFRESH_MS, form(fresh)).status == 200


def test_grace_ends_after_its_period() -> None:
    """An old token is valid for the period after its first use, to the millisecond."""
    for late_ms, status in ((-1, 200), (0, 401)):
        p, fresh, access = refreshed(Rotation.GRACE, grace_ms=GRACE_S * SECOND_MS)
        call(p, ACCOUNTS, access, "job/a", START_MS)
        assert refresh(p, START_MS + GRACE_S * SECOND_MS + late_ms).status == status
        assert refresh(p, START_MS + DAY_MS, form(fresh)).status == 200


@pytest.mark.parametrize("rotation", sorted(set(Rotation) - {Rotation.NONE, Rotation.REUSABLE}))
def test_refresh_token_expires_unused(rotation: Rotation) -> None:
    """A refresh token expires after 30 days without use, with both times in the text."""
    expiry_ms = START_MS + REFRESH_TOKEN_IDLE_MS
    assert refresh(provider(rotation), expiry_ms - 1).status == 200
    answer = refresh(provider(rotation), expiry_ms)
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
        assert call(p, MISSING, access, "job/a", START_MS).status == 404
    assert broken(p) == {}
    assert call(p, ACCOUNTS, access, "job/a", START_MS).status == 200

    assert call(p, MISSING, access, "job/guilty", START_MS).status == 404
    assert broken(p) == {Rule.ERROR_LIMIT: 1}
    assert call(p, ACCOUNTS, access, "job/a", START_MS).status == 403
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
            call(p, MISSING, access, "job/a", first_ms)
        access = bearer(p, last_ms)
        call(p, MISSING, access, "job/a", last_ms)
        assert (broken(p) == {Rule.ERROR_LIMIT: 1}) is blocked


def test_errors_are_counted_apart_by_endpoint_division_and_user() -> None:
    """Ten errors on each of several scopes block nobody."""
    other = Seed(user="sales@example.com", refresh_token="other")
    p = provider(Rotation.REUSABLE, SEED, other)
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
            assert call(p, path, access, "job/a", now_ms).status == 404
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
    offend(p, START_MS)
    lifted_ms = START_MS + BLOCK_MS
    for now_ms in range(START_MS, lifted_ms, 5 * MINUTE_MS):
        assert refresh(p, now_ms).status == 403
    assert refresh(p, lifted_ms - 1).status == 403
    offend(p, lifted_ms)
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
        answer = call(p, ACCOUNTS, access, "job/a", now_ms)
        assert answer.status == 200
        assert answer.headers["X-RateLimit-Minutely-Remaining"] == str(left)
    assert answer.headers["X-RateLimit-Remaining"] == "4940"
    assert answer.headers["X-RateLimit-Reset"] == str(START_MS + DAY_MS)

    refused = call(p, ACCOUNTS, access, "job/a", now_ms)
    assert refused.status == 429
    assert refused.headers == {
        "X-RateLimit-Minutely-Limit": "60",
        "X-RateLimit-Minutely-Remaining": "0",
        "X-RateLimit-Minutely-Reset": str(START_MS + MINUTE_MS),
        "Retry-After": "2",  # 45 simulated seconds, in real ones, rounded up
    }
    assert broken(p) == {Rule.CALLS_PER_MINUTE: 1}
    assert call(p, "535194/crm/Accounts", access, "job/a", now_ms).status == 200
    assert call(p, ACCOUNTS, access, "job/a", START_MS + MINUTE_MS).status == 200


def test_token_requests_of_a_day() -> None:
    """The 201st token request of a day breaks a rule, the next day is new."""
    users = tuple(Seed(user=f"{n}@example.com", refresh_token=f"r{n}") for n in range(2))
    p = provider(Rotation.REUSABLE, *users)
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
        (ACCOUNTS, "Code eq", 400),
        ("999/crm/Accounts", None, 403),
        (MISSING, None, 404),
    ],
)
def test_api_answers(path: str, odata_filter: str | None, status: int) -> None:
    """A job can provoke a 400, a 403 and a 404, and each counts as an error."""
    p = provider()
    assert call(p, path, bearer(p), "job/a", START_MS, odata_filter).status == status
    report: Any = p.report(START_MS)
    assert report["agents"]["job/a"]["errors"] == (status != 200)


def test_access_token_lives_600_seconds() -> None:
    """An access token works until 600 s after its issue; an expired one is an error, counted."""
    p = provider()
    access = bearer(p)
    assert call(p, ACCOUNTS, access, "job/a", START_MS + 599_999).status == 200
    assert call(p, ACCOUNTS, access, "job/a", START_MS + 600_000).status == 401
    report: Any = p.report(START_MS)
    assert report["agents"]["job/a"]["errors"] == 1


def test_unknown_access_token_is_nobodys_error() -> None:
    """A bearer that belongs to no key gets a 401 and can block no key."""
    p = provider()
    for _ in range(ERRORS_PER_HOUR + 1):
        assert call(p, ACCOUNTS, "made-up", "job/a", START_MS).status == 401
    assert broken(p) == {}


def test_calls_of_a_day() -> None:
    """The 5,001st call of a day gets a 429 with the day's headers only, the next day is new.

    Fails when the limit is off by one, or counted per user instead of per app and company.
    """
    other = Seed(user="sales@example.com", refresh_token="other")
    p = provider(Rotation.REUSABLE, SEED, other)
    now_ms = START_MS
    for n in range(CALLS_PER_DAY):
        now_ms = START_MS + n // CALLS_PER_MINUTE * MINUTE_MS
        if n % (10 * CALLS_PER_MINUTE) == 0:  # a token lives ten minutes
            accesses = bearer(p, now_ms), bearer(p, now_ms, other)
        assert call(p, ACCOUNTS, accesses[n % 2], "job/a", now_ms).status == 200

    now_ms += MINUTE_MS
    refused = call(p, ACCOUNTS, accesses[0], "job/a", now_ms)
    assert refused.status == 429
    assert refused.headers == {
        "X-RateLimit-Limit": "5000",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": str(START_MS + DAY_MS),
        "Retry-After": str((START_MS + DAY_MS - now_ms) // SECOND_MS),
    }
    assert broken(p) == {Rule.CALLS_PER_DAY: 1}
    assert call(p, "535194/crm/Accounts", accesses[0], "job/a", now_ms).status == 200
    now_ms = START_MS + DAY_MS
    assert call(p, ACCOUNTS, bearer(p, now_ms), "job/a", now_ms).status == 200


def test_report_tells_the_most_errors_of_any_hour() -> None:
    """Each scope with errors has their number, and the largest of any 60 minutes.

    Fails when the peak forgets errors that a later hour no longer holds, or goes by the clock.
    """
    p = switched("error-window=clock-hour")
    access = bearer(p)
    half_past_ms = START_MS + 30 * MINUTE_MS
    for at_ms, errors in ((half_past_ms, 4), (half_past_ms + 40 * MINUTE_MS, 5)):
        access = bearer(p, at_ms)
        for _ in range(errors):
            call(p, MISSING, access, "job/a", at_ms)
    late_ms = START_MS + 5 * HOUR_MS
    call(p, MISSING, bearer(p, late_ms), "job/a", late_ms)
    report: Any = p.report(late_ms)
    assert report["errors"] == [
        {
            "key": SEED.client_id,
            "user": SEED.user,
            "division": "535193",
            "endpoint": "crm/Nothing",
            "total": 10,
            "most_in_an_hour": 9,
        }
    ]


def test_report_tells_who_broke_which_rule() -> None:
    """Each client's broken rules are counted by rule."""
    p = provider()
    for agent in ("job/a", "job/b", "job/b"):
        p.sent(p.token(form(), agent, START_MS), START_MS)
    report: Any = p.report(START_MS)
    assert [(v["call"], v["method"], v["path"], v["status"]) for v in report["violations"]] == [
        (n, "POST", "/api/oauth2/token", 400) for n in (2, 3)
    ]
    assert report["agents"]["job/a"]["violations_by_rule"] == {}
    assert report["agents"]["job/b"]["violations_by_rule"] == {Rule.REFRESH_INTERVAL: 2}


def test_report_tells_which_call_broke_a_rule() -> None:
    """A violation has the number, method, path and status of its call, and none of another."""
    p = provider()
    access = bearer(p)
    for _ in range(ERRORS_PER_HOUR + 1):
        call(p, MISSING, access, "job/a", START_MS)
    refresh(p, START_MS + BLOCK_MS)
    refresh(p, START_MS + BLOCK_MS)
    report: Any = p.report(START_MS)
    assert [
        (v["rule"], v["call"], v["method"], v["path"], v["status"]) for v in report["violations"]
    ] == [
        (Rule.ERROR_LIMIT, 12, "GET", f"/api/v1/{MISSING}", 404),
        (Rule.REFRESH_INTERVAL, 14, "POST", "/api/oauth2/token", 400),
    ]


# Switches


@pytest.mark.parametrize(("window", "blocked"), [("sliding", True), ("clock-hour", False)])
def test_switch_error_window(window: str, *, blocked: bool) -> None:
    """Eleven errors within an hour that a clock's hour divides block, or don't."""
    p = switched(f"error-window={window}")
    before_ms = START_MS + HOUR_MS - MINUTE_MS
    access = bearer(p, before_ms)
    for n in range(ERRORS_PER_HOUR + 1):
        now_ms = before_ms + n // 5 * MINUTE_MS
        assert call(p, MISSING, access, "job/a", now_ms).status == 404
    assert broken(p) == ({Rule.ERROR_LIMIT: 1} if blocked else {})
    for _ in range(ERRORS_PER_HOUR):  # and a clock's hour allows ten, not more
        call(p, MISSING, access, "job/a", now_ms)
    assert broken(p) == {Rule.ERROR_LIMIT: 1}


@pytest.mark.parametrize("status", [401, 400])
def test_switch_old_token_status(status: int) -> None:
    """A dead refresh token is refused with either status, and the same text."""
    p, _, _ = refreshed(Rotation.SINGLE_USE, f"old-token-status={status}")
    old = refresh(p, SECOND_REFRESH_MS)
    assert (old.status, old.body["error_description"]) == (status, "Old refresh token used.")


def test_switch_early_refresh() -> None:
    """A refusal brings no refresh token, or one that replaces the one it refused.

    Fails when the token in a refused answer does not work, or the old one goes on to.
    """
    p, fresh, _ = refreshed(Rotation.SINGLE_USE, "early-refresh=error-only")
    assert "refresh_token" not in refresh(p, START_MS, form(fresh)).body
    assert refresh(p, SECOND_REFRESH_MS, form(fresh)).status == 200

    p, fresh, _ = refreshed(Rotation.SINGLE_USE, "early-refresh=new-token")
    early = refresh(p, START_MS, form(fresh))
    assert (early.status, early.body["error"]) == (400, "access_denied")
    assert "access_token" not in early.body
    assert refresh(p, SECOND_REFRESH_MS, form(fresh)).status == 401
    assert refresh(p, SECOND_REFRESH_MS, form(early.body["refresh_token"])).status == 200


@pytest.mark.parametrize("status", [400, 401])
def test_switch_early_status(status: int) -> None:
    """A refresh that is too early is refused with either status, and counts as an error."""
    p = switched(f"early-status={status}")
    refresh(p, START_MS)
    assert refresh(p, START_MS).status == status
    report: Any = p.report(START_MS)
    assert report["agents"]["job/a"]["errors"] == 1


def test_switch_refresh_interval() -> None:
    """An app that is exempt may refresh at any time."""
    p = switched("refresh-interval=exempt")
    assert [refresh(p, START_MS).status for _ in range(3)] == [200] * 3
    assert broken(p) == {}


@pytest.mark.parametrize(("kind", "value"), [("string", "600"), ("number", 600)])
def test_switch_expires_in(kind: str, value: object) -> None:
    """The life of an access token is digits in a string, or a number."""
    assert refresh(switched(f"expires-in={kind}"), START_MS).body["expires_in"] == value


@pytest.mark.parametrize(("status", "errors"), [(429, 0), (400, 1)])
def test_switch_daily_token_status(status: int, errors: int) -> None:
    """The request above the day's limit gets either status, and 400 counts as an error."""
    p = switched(f"daily-token-status={status}")
    for n in range(TOKEN_CALLS_PER_DAY):
        refresh(p, START_MS + n * 7 * MINUTE_MS)
    before: Any = p.report(START_MS)
    last_ms = START_MS + DAY_MS - 1
    refused = refresh(p, last_ms)
    assert (refused.status, refused.body["error"]) == (status, "access_denied")
    after: Any = p.report(START_MS)
    assert after["errors"][0]["total"] - before["errors"][0]["total"] == errors
    assert after["agents"]["job/a"]["errors"] - before["agents"]["job/a"]["errors"] == errors
    assert broken(p)[Rule.TOKEN_CALLS_PER_DAY] == 1


def test_switch_block_answer() -> None:
    """A blocked key gets a 403 in JSON or a 503 with a page, at the token endpoint and the API."""
    for setting, status, kind in (("403-json", 403, dict), ("503-html", 503, str)):
        p = switched(f"block-answer={setting}")
        access = bearer(p)
        for _ in range(ERRORS_PER_HOUR + 1):
            call(p, MISSING, access, "job/a", START_MS)
        for answer in (
            call(p, ACCOUNTS, access, "job/a", START_MS),
            refresh(p, SECOND_REFRESH_MS),
        ):
            assert answer.status == status
            assert isinstance(answer.body, kind)
        report: Any = p.report(START_MS)
        assert report["token_requests"]["refused"] == 1
        assert report["agents"]["job/a"]["refused_while_blocked"] == 2


@pytest.mark.parametrize(
    ("schedule", "hours"),
    [
        ("doubling", [1, 2, 4, 8, 16, 32]),
        ("doubling-to-a-day", [1, 2, 4, 8, 16, 24]),
        ("fixed", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_switch_block_schedule(schedule: str, hours: list[int]) -> None:
    """Each repeat's block is as long as the schedule says, to the millisecond; apps are apart."""
    app = Seed(client_id="other", client_secret="s", refresh_token="other")
    p = provider(
        Rotation.REUSABLE, SEED, app, switches=Switches().set(f"block-schedule={schedule}")
    )
    now_ms = START_MS
    for length in hours:
        offend(p, now_ms)
        now_ms += length * HOUR_MS
        assert refresh(p, now_ms - 1).status == 403
    assert refresh(p, now_ms).status == 200
    assert refresh(p, now_ms, form("other", app)).status == 200
    offend(p, now_ms + HOUR_MS, form("other", app))
    report: Any = p.report(now_ms)
    first_of_other = report["blocks"][-1]
    assert first_of_other["key"] == "other"
    assert datetime.fromisoformat(first_of_other["end"]) - datetime.fromisoformat(
        first_of_other["start"]
    ) == timedelta(hours=1)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("error-windows=sliding", "error-window, used-at"),
        ("error-window=hour", "error-window is one of sliding, clock-hour, not 'hour'"),
        ("error-window", "sliding, clock-hour"),
        ("old-token-dies=issue", "--rotation single-use"),
        ("", "none of the switches"),
    ],
)
def test_unknown_switches_are_refused(setting: str, says: str) -> None:
    """What is no switch, or no value of one, is refused with a list of those there are."""
    with pytest.raises(ValueError, match=re.escape(says)):
        Switches().set(setting)


def test_report_tells_the_switches() -> None:
    """The report says by which behaviours it came about."""
    report: Any = switched("expires-in=number").report(START_MS)
    assert report["switches"]["expires-in"] == "number"
    assert report["switches"]["error-window"] == "sliding"


# Faults


@pytest.mark.parametrize(
    "kind", ["lost-answer", "hung-answer", "error-answer", "html-answer", "late-answer"]
)
def test_lost_token_is_issued_and_its_client_not_to_blame(kind: str) -> None:
    """A lost answer ends the old token; its client cannot know the new one, and broke no rule.

    Fails when the token of a lost answer is not issued, or its interval not kept, or when the
    refusal of the old one counts as a violation.
    """
    p = provider(Rotation.SINGLE_USE)
    lost = refresh(p, START_MS, fault=Fault(FaultKind(kind)))
    for _ in range(2):
        assert refresh(p, SECOND_REFRESH_MS).status == 401
    assert broken(p) == {}
    report: Any = p.report(START_MS)
    assert report["token_requests"]["accepted"] == 1
    assert report["token_requests"]["requests"][0]["fault"] == kind
    assert report["agents"]["job/a"]["tokens_received"] == 0
    assert report["agents"]["job/a"]["errors"] == 2

    assert refresh(p, SECOND_REFRESH_MS - 1, form(lost.body["refresh_token"])).status == 400
    assert refresh(p, SECOND_REFRESH_MS, form(lost.body["refresh_token"])).status == 200
    assert refresh(p, SECOND_REFRESH_MS).status == 401
    assert broken(p) == {Rule.REFRESH_INTERVAL: 1, Rule.OLD_REFRESH_TOKEN: 1}


@pytest.mark.parametrize(("missing", "violations"), [("access_token", 1), ("refresh_token", 0)])
def test_only_a_client_that_got_a_refresh_token_is_to_blame(missing: str, violations: int) -> None:
    """An answer without its refresh token leaves the client with an old one, and no blame."""
    p = provider(Rotation.SINGLE_USE)
    refresh(p, START_MS, fault=Fault(FaultKind.PARTIAL_ANSWER, without=(missing,)))
    assert refresh(p, SECOND_REFRESH_MS).status == 401
    assert broken(p).get(Rule.OLD_REFRESH_TOKEN, 0) == violations
    report: Any = p.report(START_MS)
    assert report["agents"]["job/a"]["tokens_received"] == (missing != "access_token")


def test_a_block_can_end_after_the_last_date() -> None:
    """The report shows a block that ends after the year 9999.

    Fails when the report cannot be written because of it.
    """
    now_ms = START_MS + 7_940 * 365 * DAY_MS
    p = switched("block-schedule=doubling", "refresh-interval=exempt")
    for n in range(20):
        offend(p, now_ms)
        now_ms += BLOCK_MS << n
    report: Any = p.report(START_MS)
    assert report["blocks"][-1]["end"].startswith("9999-12-31T23:59:59")


def test_requests_of_an_unknown_app_are_not_counted_in_a_day() -> None:
    """More token requests than a day allows, of an app that does not exist, break no rule.

    Fails when the simulator keeps a window for each name that a client makes up.
    """
    p = provider()
    unknown = replace(form(), client_id="unknown")
    for _ in range(TOKEN_CALLS_PER_DAY + 1):
        assert refresh(p, START_MS, unknown).status == 401
    assert broken(p) == {}


def test_the_report_keeps_the_scopes_of_the_latest_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when errors at ever new paths fill the memory, or when a repeated one is forgotten."""
    monkeypatch.setattr(accounting, "_KEPT", 3)
    p = provider()
    access = bearer(p)
    for name in ("a", "b", "c", "a", "d", "e"):
        assert call(p, f"535193/{name}", access, "job/a", START_MS).status == 404
    report: Any = p.report(START_MS)
    assert {e["endpoint"]: e["total"] for e in report["errors"]} == {"a": 2, "d": 1, "e": 1}
