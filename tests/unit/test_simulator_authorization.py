"""The code grant and the implicit flow of the simulated provider."""

from __future__ import annotations

import base64
import hashlib
import re
from html import unescape
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest

from holdoff.simulator import Provider, Rotation, Rule, Seed, Switches
from holdoff.simulator.api import Request
from holdoff.simulator.limits import (
    AUTHORIZATION_CODE_LIFE_MS,
    DAY_MS,
    MINUTE_MS,
    TOKEN_CALLS_PER_DAY,
)
from holdoff.simulator.oauth import TokenForm

SEED = Seed()
OTHER = Seed(user="sales@example.com", refresh_token="other")
APP: dict[str, Any] = {"client_id": SEED.client_id, "client_secret": SEED.client_secret}
CALLBACK = "https://app.example/callback?from=exact"
ASK = {
    "client_id": SEED.client_id,
    "redirect_uri": CALLBACK,
    "response_type": "code",
    "state": "a b&c",
    "user": SEED.user,
}
VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).decode()[:-1]
INTERVAL_MS = 570_000
ACCOUNTS = "/api/v1/535193/crm/Accounts"


def provider(rotation: Rotation = Rotation.UNTIL_USED, *settings: str) -> Provider:
    """Make a provider with two users of an app."""
    switches = Switches()
    for setting in settings:
        switches = switches.set(setting)
    return Provider([SEED, OTHER], rotation=rotation, switches=switches)


def allowed(p: Provider, now_ms: int = 0, **more: Any) -> dict[str, str]:
    """Let a user allow the app: the parameters at the redirect URI."""
    answer = p.authorize(ASK | more, "browser", now_ms)
    p.sent(answer, now_ms)
    assert answer.status == 302, answer
    address = answer.headers["Location"]
    assert address.startswith(CALLBACK)
    parts = urlsplit(address)
    return dict(parse_qsl(parts.fragment or parts.query))


def exchange(p: Provider, code: str, now_ms: int = 0, **more: Any) -> Any:
    """Exchange a code."""
    fields: dict[str, Any] = {"grant_type": "authorization_code", "code": code}
    fields["redirect_uri"] = CALLBACK
    answer = p.token(TokenForm(**(fields | APP | more)), "job/a", now_ms)
    p.sent(answer, now_ms)
    return answer


def refresh(p: Provider, token: str, now_ms: int) -> Any:
    """Refresh once."""
    answer = p.token(TokenForm("refresh_token", **APP, refresh_token=token), "job/a", now_ms)
    p.sent(answer, now_ms)
    return answer


def test_a_code_is_exchanged() -> None:
    """The redirect has a code and the state; the code gives both tokens, which work.

    Fails when the exchange does not start the interval.
    """
    p = provider()
    told = allowed(p)
    assert (told["state"], told["from"]) == ("a b&c", "exact")
    first = exchange(p, told["code"])
    assert first.status == 200
    assert p.call(Request(ACCOUNTS, first.body["access_token"]), 0).status == 200
    assert refresh(p, first.body["refresh_token"], INTERVAL_MS - 1).status == 400
    assert refresh(p, first.body["refresh_token"], INTERVAL_MS).status == 200
    report: Any = p.report(0)
    assert report["token_requests"]["accepted"] == 2


def test_a_code_is_exchanged_only_once() -> None:
    """The second exchange of a code is refused, also for an app that need not wait."""
    p = provider(Rotation.UNTIL_USED, "refresh-interval=exempt")
    code = allowed(p)["code"]
    assert exchange(p, code).status == 200
    again = exchange(p, code)
    assert (again.status, again.body["error"]) == (400, "invalid_grant")


def test_a_code_lives_for_three_minutes() -> None:
    """A code can be exchanged before three minutes passed, and not after."""
    for late_ms, status in ((-1, 200), (0, 400)):
        p = provider()
        code = allowed(p)["code"]
        assert exchange(p, code, AUTHORIZATION_CODE_LIFE_MS + late_ms).status == status


@pytest.mark.parametrize(
    "change",
    [
        {"redirect_uri": "https://app.example/other"},
        {"code": "unknown"},
        {"client_id": "another", "client_secret": "s"},
        {"code_verifier": VERIFIER},
    ],
)
def test_a_code_is_for_one_request(change: dict[str, Any]) -> None:
    """A code is refused with another address or app, or with a verifier that was not announced."""
    app = Seed(client_id="another", client_secret="s", refresh_token="another")
    p = Provider([SEED, app])
    code = allowed(p)["code"]
    answer = exchange(p, **({"code": code} | change))
    assert (answer.status, answer.body["error"]) == (400, "invalid_grant")
    assert exchange(p, code).status == 200


@pytest.mark.parametrize(
    "proof",
    [
        {"code_challenge": CHALLENGE, "code_challenge_method": "S256"},
        {"code_challenge": VERIFIER, "code_challenge_method": "plain"},
        {"code_challenge": VERIFIER},
    ],
)
def test_a_challenge_is_checked(proof: dict[str, Any]) -> None:
    """A code with a challenge needs its verifier."""
    p = provider()
    code = allowed(p, **proof)["code"]
    for verifier in ("", "w" * 43, CHALLENGE, "\ud800" * 43):
        assert exchange(p, code, code_verifier=verifier).status == 400
    assert exchange(p, code, code_verifier=VERIFIER).status == 200


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"code_challenge": "short"}, "invalid_request"),
        ({"code_challenge": CHALLENGE, "code_challenge_method": "S512"}, "invalid_request"),
        ({"response_type": "id_token"}, "unsupported_response_type"),
        ({"user": ""}, "access_denied"),
        ({"user": "stranger@example.com"}, "access_denied"),
    ],
)
def test_an_error_is_returned_to_the_app(more: dict[str, Any], error: str) -> None:
    """The redirect has an error and the state, and no code."""
    told = allowed(provider(), **more)
    assert (told["error"], told["state"], told.get("code")) == (error, "a b&c", None)


@pytest.mark.parametrize(
    "more",
    [
        {"client_id": "unknown"},
        *({"redirect_uri": uri} for uri in ("", "/here", "https://[", "a:b#c", "a:b\r\nc", "é:é")),
    ],
)
def test_no_redirect_without_an_address(more: dict[str, Any]) -> None:
    """An unknown app or an invalid redirect URI gets a page with a 400, not a redirect."""
    answer = provider().authorize(ASK | more, "browser", 0)
    assert (answer.status, "Location" in answer.headers) == (400, False)


def test_the_page_offers_the_users() -> None:
    """Without a user there is a page with a link for each, which keeps the request's parameters.

    Fails when a parameter is not escaped in the page.
    """
    ask = {name: value for name, value in ASK.items() if name != "user"} | {"state": '"><b>'}
    p = provider()
    page = p.authorize(ask, "browser", 0)
    assert page.status == 200
    assert isinstance(page.body, str)
    assert '"><b>' not in page.body
    links = [unescape(link) for link in re.findall(r'href="\?([^"]+)"', page.body)]
    users = [parse_qs(link, keep_blank_values=True)["user"] for link in links]
    assert users == [[SEED.user], [OTHER.user], [""]]
    chosen: dict[str, Any] = dict(parse_qsl(links[1]))
    assert chosen["state"] == '"><b>'
    assert exchange(p, allowed(p, **chosen)["code"]).status == 200
    report: Any = p.report(0)
    assert report["token_requests"]["requests"][0]["user"] == OTHER.user


def test_the_page_shows_a_name_as_text() -> None:
    """Markup in the name of a user has no effect on the page."""
    p = Provider([Seed(user="<b>&amp;")])
    page = p.authorize({name: ASK[name] for name in ("client_id", "redirect_uri")}, "browser", 0)
    assert isinstance(page.body, str)
    assert "Allow as &lt;b&gt;&amp;amp;<" in page.body
    assert "&amp;user=%3Cb%3E%26amp%3B" in page.body


def test_switch_consent() -> None:
    """Where consent is automatic, the first user allows the app without a page."""
    ask = {name: value for name, value in ASK.items() if name != "user"}
    assert provider().authorize(ask, "browser", 0).status == 200
    assert provider(Rotation.UNTIL_USED, "consent=auto").authorize(ask, "b", 0).status == 302


def test_an_exchange_can_be_too_early() -> None:
    """An exchange in the interval is refused; the code remains valid."""
    p = provider()
    assert refresh(p, SEED.refresh_token, 0).status == 200
    code = allowed(p, INTERVAL_MS - 1)["code"]
    early = exchange(p, code, INTERVAL_MS - 1)
    assert early.headers["Reason"].startswith("TooEarlyToRefreshTokens")
    assert exchange(p, code, INTERVAL_MS).status == 200
    report: Any = p.report(0)
    assert report["totals"]["by_rule"][Rule.REFRESH_INTERVAL] == 1


@pytest.mark.parametrize(
    ("rotation", "status"),
    [
        (Rotation.NONE, 200),
        (Rotation.REUSABLE, 200),
        (Rotation.UNTIL_USED, 401),
        (Rotation.SINGLE_USE, 401),
        (Rotation.SINGLE_USE_REVOKES, 401),
    ],
)
def test_a_new_chain_ends_the_old_one(rotation: Rotation, status: int) -> None:
    """Two chains of one user and app end each other where old tokens become invalid.

    Fails when the old chain's token revokes the new chain.
    """
    p = provider(rotation)
    fresh = exchange(p, allowed(p)["code"]).body["refresh_token"]
    assert refresh(p, fresh, INTERVAL_MS).status == 200
    newest = exchange(p, allowed(p, 2 * INTERVAL_MS)["code"], 2 * INTERVAL_MS)
    p.call(Request(ACCOUNTS, newest.body["access_token"]), 2 * INTERVAL_MS)
    assert refresh(p, fresh, 3 * INTERVAL_MS).status == status
    assert refresh(p, newest.body["refresh_token"], 4 * INTERVAL_MS).status == 200


def test_a_revoked_chain_is_replaced_by_an_authorization() -> None:
    """After a revocation a new authorization works."""
    p = provider(Rotation.SINGLE_USE_REVOKES)
    refresh(p, SEED.refresh_token, 0)
    assert refresh(p, SEED.refresh_token, INTERVAL_MS).status == 401
    answer = exchange(p, allowed(p, INTERVAL_MS)["code"], INTERVAL_MS)
    access = answer.body["access_token"]
    assert p.call(Request(ACCOUNTS, access), INTERVAL_MS).status == 200
    assert refresh(p, answer.body["refresh_token"], 2 * INTERVAL_MS).status == 200


# The implicit flow


def test_the_implicit_flow_answers_in_the_fragment() -> None:
    """The fragment has an access token that works, its life and the state; no refresh token.

    Fails when its use counts as that of a refresh token, or when it does not start the interval.
    """
    p = provider()
    first = refresh(p, SEED.refresh_token, 0)
    told = allowed(p, 1, response_type="token")
    assert sorted(told) == ["access_token", "expires_in", "state", "token_type"]
    assert told["expires_in"] == "600"
    assert p.call(Request(ACCOUNTS, told["access_token"]), 1).status == 200
    assert refresh(p, SEED.refresh_token, INTERVAL_MS).status == 400
    assert refresh(p, SEED.refresh_token, INTERVAL_MS + 1).status == 200
    assert refresh(p, first.body["refresh_token"], 2 * INTERVAL_MS + 1).status == 200


def test_implicit_log_ons_count_in_the_day() -> None:
    """The 201st log-on of a day gets an error in the fragment, and breaks a rule."""
    p = provider()
    for n in range(TOKEN_CALLS_PER_DAY - 1):
        assert "access_token" in allowed(p, n * MINUTE_MS, response_type="token")
    late_ms = DAY_MS - 1
    assert refresh(p, SEED.refresh_token, late_ms).status == 200
    told = allowed(p, late_ms, response_type="token")
    assert (told["error"], "access_token" in told) == ("access_denied", False)
    report: Any = p.report(0)
    [violation] = report["violations"]
    assert violation["rule"] == Rule.TOKEN_CALLS_PER_DAY
    assert (violation["method"], violation["path"]) == ("GET", "/api/oauth2/auth")
    assert violation["agent"] == "browser"
