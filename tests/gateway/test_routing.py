"""What a gateway decides: where a request goes, what passes, what it answers itself."""

from __future__ import annotations

import json

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from holdoff import errors
from holdoff.gateway import answers, headers
from holdoff.gateway.answers import Reason
from holdoff.gateway.links import LinkRewriter, has_links
from holdoff.gateway.routing import Call, Places, Refusal, TokenRequest, route
from holdoff.gateway.standins import PREFIX, StandIns

SECRET = "a-secret-of-this-run"
PLACES = Places(
    "https://start.exactonline.nl", "/api/oauth2/token", ("/api/oauth2/auth",), secret=SECRET
)
HERE = {"Host": "127.0.0.1:8377"}


@pytest.mark.parametrize(
    ("method", "target", "more", "expected"),
    [
        ("GET", "/api/v1/1/crm/Accounts?%24select=ID%2CCode", {}, "same"),
        ("GET", "/a/%2e%2e/b", {}, "same"),
        ("POST", "/", {}, "same"),
        ("POST", "/api/oauth2/token", {}, TokenRequest()),
        ("POST", "/api/oauth2/%74oken/?x=1", {}, TokenRequest()),
        ("POST", "/x/../api/oauth2/token", {}, TokenRequest()),
        ("GET", "/api/oauth2/token", {}, Refusal(Reason.OAUTH)),
        ("GET", "/API/oauth2/auth?client_id=x", {}, Refusal(Reason.OAUTH)),
        ("TRACE", "/", {}, Refusal(Reason.METHOD)),
        ("GET", "/ws", {"Upgrade": "websocket"}, Refusal(Reason.UPGRADE)),
        ("GET", "/", {"Origin": "https://evil.example"}, Refusal(Reason.ORIGIN)),
        ("GET", "/", {"Origin": "null"}, Refusal(Reason.ORIGIN)),
        ("GET", "/", {"Host": "evil.example:8377"}, Refusal(Reason.HOST)),
        ("GET", "/", {"Host": "[::1"}, Refusal(Reason.HOST)),
        ("GET", "/", {"Host": ""}, Refusal(Reason.HOST)),
        ("GET", "/" + "x" * 9000, {}, Refusal(Reason.TARGET)),
    ],
)
def test_where_a_request_goes(
    method: str, target: str, more: dict[str, str], expected: object
) -> None:
    """The target is passed on exactly as it came."""
    found = route(method, f"/{SECRET}{target}", CIMultiDict({**HERE, **more}), PLACES)
    assert found == (Call(target) if expected == "same" else expected)


@pytest.mark.parametrize(
    "target",
    ["/", "/other/api", f"/{SECRET}", f"/{SECRET}x/api", f"/x/{SECRET}/api", "/\udcff/api", "//"],
)
def test_the_secret_is_required(target: str) -> None:
    """Fails when a request without it, or with a part of it, is forwarded."""
    assert route("GET", target, CIMultiDict(HERE), PLACES) == Refusal(Reason.SECRET)


@pytest.mark.parametrize("target", ["*", "http://127.0.0.1/x", "169.254.169.254:80"])
def test_only_paths_are_targets(target: str) -> None:
    """An absolute target names another host."""
    assert route("GET", target, CIMultiDict(HERE), PLACES) == Refusal(Reason.TARGET)


def test_stand_ins() -> None:
    """Only those of the same key, token and audience are recognised, also old ones."""
    ours = StandIns("apps/a/tokens/t", "https://api.example.com")
    first, second = ours.issue(), ours.issue()
    assert first != second
    assert ours.is_ours(first)
    assert ours.is_ours(second)
    others = [
        StandIns(ours.token, ours.audience),
        StandIns("apps/a/tokens/u", ours.audience, ours.key),
        StandIns(ours.token, "https://other.example.com", ours.key),
    ]
    for other in others:
        assert not ours.is_ours(other.issue())
    for text in (
        "",
        PREFIX,
        f"{PREFIX}.",
        first[:-1],
        f"{first}x",
        "ü",
        f"{PREFIX}é.é",
        "x" * 9999,
    ):
        assert not ours.is_ours(text)
    assert ours.key not in repr(ours).encode()


def test_which_headers_pass() -> None:
    """Neither those of one connection nor the job's own authorization; cookies do."""
    came = CIMultiDictProxy(
        CIMultiDict(
            [
                *(("Host", "127.0.0.1"), ("Connection", "close, X-Hop"), ("X-Hop", "1")),
                *(("Transfer-Encoding", "chunked"), ("Upgrade", "h2c"), ("TE", "trailers")),
                *(("Proxy-Authorization", "Basic x"), ("Authorization", "Bearer stand-in")),
                *(("Cookie", "a=1"), ("Content-Length", "3"), ("accept", "text/plain")),
                *(("X-Many", "1"), ("X-Many", "2"), ("Accept-Encoding", "gzip")),
            ]
        )
    )
    sent = headers.to_upstream(came, "Bearer real")
    assert list(sent.items()) == [
        *(("Cookie", "a=1"), ("Content-Length", "3"), ("accept", "text/plain")),
        *(("X-Many", "1"), ("X-Many", "2"), ("Accept-Encoding", "gzip")),
        ("Authorization", "Bearer real"),
    ]
    read = headers.to_upstream(came, "Bearer real", is_read=True)
    assert read["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("error", "status", "seconds"),
    [
        (errors.BackingOff("it backs off", retry_after_seconds=12.3), 429, "13"),
        (errors.BudgetSpent("spent", retry_after_seconds=0.0), 429, "1"),
        (errors.NoAccessToken("cooling"), 503, "5"),
        (errors.Unavailable("away"), 503, "5"),
    ],
)
def test_what_is_not_sent(error: errors.HoldoffError, status: int, seconds: str) -> None:
    """Says why, and when to try again in whole seconds."""
    local = answers.not_now(error)
    assert local.status == status
    assert local.headers["Retry-After"] == seconds
    assert local.headers["Holdoff-Reason"]
    assert str(error) in json.loads(local.body)["error"]["message"]


@pytest.mark.parametrize(
    ("grant_type", "status"),
    [
        *(("refresh_token", 200), ("authorization_code", 200), ("password", 400)),
        *(("urn:ietf:params:oauth:grant-type:device_code", 400), ("", 400)),
    ],
)
def test_the_token_endpoint(grant_type: str, status: int) -> None:
    """It issues stand-ins, whose life is a string of digits above 0."""
    stand_ins = StandIns("apps/a/tokens/t", "https://api.example.com")
    local = answers.token_answer({"grant_type": grant_type}, stand_ins)
    assert local.status == status
    document = json.loads(local.body)
    if status == 200:
        assert document["expires_in"].isdigit()
        assert int(document["expires_in"]) > 86_400
        assert stand_ins.is_ours(document["access_token"])
    else:
        assert document["error"] == "unsupported_grant_type"


BASE = "http://127.0.0.1:8377/s"
UPSTREAM = "https://start.exactonline.nl"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"d":{"__next":"https://start.exactonline.nl/api?x=1"}}', '"__next":"{}/api?x=1"'),
        ('"__next" : "https:\\/\\/start.exactonline.nl\\/api"', '"__next" : "{}\\/api"'),
        ('"@odata.nextLink":"https://start.exactonline.nl:443/a"', '"@odata.nextLink":"{}/a"'),
        ('<link rel="next" href="https://start.exactonline.nl/a"/>', 'href="{}/a"'),
        ('<link href="https://start.exactonline.nl/a" rel="next"/>', 'href="{}/a"'),
        ('<link rel="self" href="https://start.exactonline.nl/a"/>', None),
        ('"uri":"https://start.exactonline.nl/a"', None),
        ('"__next":"https://start.exactonline.nl.evil.example/a"', None),
        ('"Note":"see https://start.exactonline.nl/a"', None),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_links_to_the_next_page(body: str, expected: str | None, size: int) -> None:
    """They are rewritten however the body is divided; nothing else is changed."""
    whole = "x" * 2_000 + body + "y" * 2_000
    rewriter = LinkRewriter(UPSTREAM, BASE)
    data = whole.encode()
    parts = [rewriter.part(data[at : at + size]) for at in range(0, len(data), size)]
    found = b"".join([*parts, rewriter.end()]).decode()
    assert expected is None or expected.format(BASE) in found
    origins = (f"{UPSTREAM}:443", "https:\\/\\/start.exactonline.nl", UPSTREAM)
    assert whole in {found, *(found.replace(BASE, origin) for origin in origins)}
    assert (found == whole) == (expected is None)


def test_links_in_headers_and_which_bodies_have_them() -> None:
    """`Link` may have several; a compressed body is not read."""
    rewriter = LinkRewriter(UPSTREAM, BASE)
    link = f'<{UPSTREAM}/a?page=2>; rel="next", <https://other.example/>; rel="x"'
    assert (
        rewriter.header(link) == f'<{BASE}/a?page=2>; rel="next", <https://other.example/>; rel="x"'
    )
    assert has_links({"Content-Type": "application/atom+xml;type=feed"})
    assert has_links({"Content-Type": "application/json"})
    assert not has_links({"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert not has_links({"Content-Type": "application/octet-stream"})
