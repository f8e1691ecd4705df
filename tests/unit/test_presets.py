"""The presets: each recognises its provider's throttle from the documented answer, and no other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from holdoff._recognise import recognise_answer
from holdoff.policies import presets
from holdoff_coordinator.policies import policy_message

if TYPE_CHECKING:
    from collections.abc import Mapping

NOW = 1_800_000_000.0
HOUR, DAY = 3_600, 86_400
APP, TOKEN = ("app",), ("app", "token")
DIVISION, ENDPOINT = ("app", "division"), ("app", "endpoint")


@dataclass(frozen=True)
class Answer:
    """An answer that throttles, with where it is documented, and what it must be read as."""

    preset: str
    source: str
    status: int
    throttle: str
    seconds: float
    """How long the pause lasts."""
    scope: tuple[str, ...]
    """What pauses."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""


ZOHO = "Zoho CRM, token validity; Kaizen 43, tokens and limitations"
ZOHO_BODY = (
    '{"error_description":"You have made too many requests continuously. Please try again after'
    ' some time.","error":"Access Denied","status":"failure"}'
)
EXACT = "reports of users of the API"
XERO = "Xero, OAuth 2.0 API limits"
NETSUITE = "NetSuite Help, errors related to concurrency violations"
QUICKBOOKS = "QuickBooks Online, API call limits and throttles; a report to the provider's library"
QUICKBOOKS_BODY = (
    '<IntuitResponse xmlns="http://schema.intuit.com/finance/v3"><Fault type="SERVICE">'
    '<Error code="3001"><Message>message=ThrottleExceeded; errorCode=003001; statusCode={}'
    "</Message><Detail>The request limit was reached.  Try again later</Detail></Error></Fault>"
    "</IntuitResponse>"
)
HUBSPOT = "HubSpot, API usage guidelines"
HUBSPOT_BODY = (
    '{{"status":"error","message":"You have reached your {} limit.","errorType":"RATE_LIMIT",'
    '"correlationId":"00000000-0000-4000-8000-000000000000","policyName":"{}"}}'
)
SALESFORCE = "Salesforce, API request limits and allocations; reports of users of the API"
SHOPIFY_BODY = (
    '{"errors":[{"message":"Throttled","extensions":{"code":"THROTTLED"}}],'
    '"extensions":{"cost":{"requestedQueryCost":202,"actualQueryCost":null}}}'
)

ANSWERS = [
    Answer(
        preset="exact-online",
        source=EXACT,
        status=429,
        throttle="too-many-calls",
        seconds=40,
        scope=DIVISION,
        headers={"X-RateLimit-Minutely-Reset": f"{(NOW + 40) * 1000:.0f}"},
    ),
    Answer("exact-online", EXACT, 429, "too-many-calls", 60, DIVISION),
    Answer("exact-online", EXACT, 503, "ip-blocked", 60, APP, body="<h1>Service Unavailable</h1>"),
    Answer("exact-online-exempt", EXACT, 429, "too-many-calls", 60, DIVISION),
    Answer(
        "bullhorn", "Bullhorn, issue 257 of sdk-rest", 429, "too-many-calls", 10, APP, body="{}"
    ),
    Answer(
        preset="eve-esi",
        source="EVE Online, ESI rate limiting",
        status=429,
        throttle="too-many-calls",
        seconds=125,
        scope=TOKEN,
        headers={
            "Retry-After": "125",
            "X-Ratelimit-Group": "fittings",
            "X-Ratelimit-Limit": "150/15m",
            "X-Ratelimit-Remaining": "0",
            "X-Ratelimit-Used": "5",
        },
    ),
    Answer("eve-esi", "EVE Online, ESI rate limiting", 429, "too-many-calls", 60, TOKEN),
    Answer(
        preset="eve-esi",
        source="EVE Online, ESI best practices",
        status=420,
        throttle="error-limited",
        seconds=17,
        scope=APP,
        headers={"X-ESI-Error-Limit-Remain": "0", "X-ESI-Error-Limit-Reset": "17"},
        body='{"error":"This software has exceeded the error limit for ESI."}',
    ),
    Answer(
        preset="hubspot",
        source=HUBSPOT,
        status=429,
        throttle="daily-calls",
        seconds=60,
        scope=TOKEN,
        body=HUBSPOT_BODY.format("daily", "DAILY"),
    ),
    Answer(
        preset="hubspot",
        source=HUBSPOT,
        status=429,
        throttle="too-many-calls",
        seconds=10,
        scope=TOKEN,
        body=HUBSPOT_BODY.format("ten_secondly_rolling", "TEN_SECONDLY_ROLLING"),
    ),
    Answer(
        preset="quickbooks",
        source=QUICKBOOKS,
        status=429,
        throttle="too-many-calls",
        seconds=60,
        scope=DIVISION,
        body=QUICKBOOKS_BODY.format(429),
    ),
    Answer(
        preset="quickbooks",
        source=QUICKBOOKS,
        status=403,
        throttle="too-many-calls-403",
        seconds=60,
        scope=DIVISION,
        body=QUICKBOOKS_BODY.format(403),
    ),
    Answer(
        preset="salesforce",
        source=SALESFORCE,
        status=403,
        throttle="too-many-calls",
        seconds=60,
        scope=APP,
        body='[{"message":"TotalRequests Limit exceeded.","errorCode":"REQUEST_LIMIT_EXCEEDED"}]',
    ),
    Answer(
        preset="salesforce",
        source=SALESFORCE,
        status=500,
        throttle="too-many-soap-calls",
        seconds=60,
        scope=APP,
        body="<soapenv:Fault><faultcode>sf:REQUEST_LIMIT_EXCEEDED</faultcode><faultstring>"
        "REQUEST_LIMIT_EXCEEDED: ConcurrentRequests (Concurrent API Requests) Limit exceeded."
        "</faultstring></soapenv:Fault>",
    ),
    Answer(
        preset="twinfield",
        source="Twinfield, fair use policy",
        status=429,
        throttle="too-many-calls",
        seconds=21,
        scope=APP,
        headers={"Retry-After": "21"},
    ),
    Answer("twinfield-uncertified", "Twinfield, fair use policy", 429, "too-many-calls", 60, APP),
    Answer(
        preset="visma-eaccounting",
        source="Visma, rate limits",
        status=429,
        throttle="quota-exceeded",
        seconds=55,
        scope=ENDPOINT,
        headers={"Content-Type": "application/json;charset=UTF-8"},
        body='{\n    "ErrorCode": 4010,\n    "DeveloperErrorMessage": "API calls quota exceeded! '
        'maximum admitted 600 per Minute. Try again in 55 seconds.",\n    "ErrorId": '
        '"00000000-0000-4000-8000-000000000000"\n}',
    ),
    Answer("visma-eaccounting", "Visma, rate limits", 429, "too-many-calls", 60, ENDPOINT),
    Answer(
        preset="xero",
        source=XERO,
        status=429,
        throttle="too-many-calls",
        seconds=41_000,
        scope=DIVISION,
        headers={"Retry-After": "41000", "X-Rate-Limit-Problem": "day"},
    ),
    Answer(
        preset="xero",
        source=XERO,
        status=429,
        throttle="too-many-calls-of-the-app",
        seconds=12,
        scope=APP,
        headers={"Retry-After": "12", "X-Rate-Limit-Problem": "appminute"},
    ),
    Answer(
        preset="xero-starter",
        source=XERO,
        status=429,
        throttle="too-many-calls",
        seconds=60,
        scope=DIVISION,
        headers={"X-Rate-Limit-Problem": "concurrent"},
    ),
    Answer("zoho", ZOHO, 400, "access-denied", 600, TOKEN, body=ZOHO_BODY),
    Answer("zoho", ZOHO, 200, "access-denied", 600, TOKEN, body=ZOHO_BODY),
    Answer("zoho", "Zoho Books, API call limit", 429, "too-many-calls", 60, APP),
    Answer(
        preset="shopify",
        source="Shopify, REST Admin API rate limits",
        status=429,
        throttle="too-many-calls",
        seconds=2,
        scope=TOKEN,
        headers={"Retry-After": "2.0", "X-Shopify-Shop-Api-Call-Limit": "40/40"},
        body='{"errors":"Exceeded 2 calls per second for api client."}',
    ),
    Answer(
        preset="shopify",
        source="Shopify, GraphQL Admin API",
        status=200,
        throttle="too-expensive-queries",
        seconds=20,
        scope=TOKEN,
        body=SHOPIFY_BODY,
    ),
    Answer("fortnox", "Fortnox, rate limits", 429, "too-many-calls", 5, TOKEN),
    Answer("sage-accounting", "reports of users", 429, "too-many-calls", 60, DIVISION),
    Answer(
        preset="netsuite",
        source=NETSUITE,
        status=400,
        throttle="restlet-calls-at-a-time",
        seconds=10,
        scope=APP,
        body='{"error":{"code":"SSS_REQUEST_LIMIT_EXCEEDED","message":"Request limit exceeded"}}',
    ),
    Answer(
        preset="netsuite",
        source=NETSUITE,
        status=500,
        throttle="soap-calls-at-a-time",
        seconds=10,
        scope=APP,
        body="<platformFaults:exceededConcurrentRequestLimitFault><platformFaults:code>"
        "WS_REQUEST_BLOCKED</platformFaults:code>",
    ),
    Answer("netsuite", "reports of users", 429, "too-many-calls", 10, APP),
    Answer(
        preset="ebay",
        source="eBay, API call limits",
        status=429,
        throttle="too-many-calls",
        seconds=60,
        scope=APP,
        body='{"errors":[{"errorId":2001,"domain":"ACCESS","category":"REQUEST",'
        '"message":"Too many requests."}]}',
    ),
    Answer(
        preset="fitbit",
        source="Fitbit Web API, rate limits",
        status=429,
        throttle="too-many-calls",
        seconds=1_478,
        scope=TOKEN,
        headers={"Fitbit-Rate-Limit-Limit": "150", "Fitbit-Rate-Limit-Reset": "1478"},
        body='{"errors":[{"errorType":"system","fieldName":"n/a","message":"Too Many Requests"}]}',
    ),
    Answer("fitbit", "Fitbit Web API, rate limits", 429, "too-many-calls", HOUR, TOKEN),
    Answer(
        "breezeway", "Breezeway, refresh tokens", 429, "too-many-token-requests", 60, APP, body="{}"
    ),
]

WORDS = (
    "Access Denied, Throttled, quota exceeded! Try again in 55 seconds. RATE_LIMIT DAILY "
    "REQUEST_LIMIT_EXCEEDED SSS_REQUEST_LIMIT_EXCEEDED WS_REQUEST_BLOCKED ThrottleExceeded"
)
ORDINARY = [
    (200, f'{{"data":[{{"note":"{WORDS}"}},{{"error":"Access Denied"}}]}}'),
    (200, f'{{"id":"1","note":"{WORDS}","errors":[]}}'),
    (200, '[{"error":"Access Denied"}]'),
    (200, '{"data":{"shop":{"name":"Throttled"}},"errors":[{"message":"Field is deprecated"}]}'),
    (200, "<html>down for maintenance</html>"),
    (204, ""),
    (400, '{"error":"invalid_grant","error_description":"The refresh token expired."}'),
    (400, '{"error":"invalid_request","status":"failure"}'),
    (400, '{"errorCode":"MALFORMED_QUERY"}'),
    (401, '{"error":"unauthorized_client","error_description":"Old refresh token used."}'),
    (401, '[{"errorCode":"INVALID_SESSION_ID","message":"Session expired or invalid"}]'),
    (403, '{"message":"Forbidden: no access to division 7"}'),
    (404, '{"message":"not found"}'),
    (500, "<faultcode>sf:UNKNOWN_EXCEPTION</faultcode>"),
]
"""Answers of another kind, also with words of those that throttle in their data."""


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda one: f"{one.preset}-{one.status}")
def test_a_throttle_is_recognised_from_its_documented_answer(answer: Answer) -> None:
    """Fails when another throttle matches, lasts another time, or pauses another scope."""
    policy = presets()[answer.preset]
    found = recognise_answer(
        policy_message(policy),
        answer.status,
        answer.headers,
        answer.body.encode(),
        now_epoch_seconds=NOW,
    )
    assert found is not None, "it is not recognised"
    assert found.throttle == answer.throttle
    throttle = next(one for one in policy.throttle if one.name == found.throttle)
    assert throttle.scope == answer.scope
    default = policy.block.first if throttle.length is None else throttle.length
    seconds = default if found.retry_after_seconds is None else found.retry_after_seconds
    assert seconds == pytest.approx(answer.seconds)
    assert seconds <= policy.block.most, "the coordinator shortens it"


def test_every_throttle_of_every_preset_has_a_documented_answer() -> None:
    """All but one: what Exact Online answers when it has blocked a key is not known."""
    tested = {(answer.preset, answer.throttle) for answer in ANSWERS}
    alike = {
        name: policy.throttle
        for name, policy in presets().items()
        if name in {"exact-online-exempt", "xero-starter", "twinfield-uncertified"}
    }
    for name, throttles in alike.items():
        assert throttles == presets()[name.rpartition("-")[0]].throttle
        tested |= {(name, one.name) for one in throttles}
    known = {(name, one.name) for name, policy in presets().items() for one in policy.throttle}
    assert known - tested == {("exact-online", "key-blocked")}
    assert set(presets()) <= {name for name, _ in tested}


@pytest.mark.parametrize(("status", "body"), ORDINARY)
@pytest.mark.parametrize("name", sorted(presets()))
def test_an_ordinary_answer_is_no_throttle(name: str, status: int, body: str) -> None:
    """Fails when words in data, or another error, pause an app."""
    message = policy_message(presets()[name])
    assert recognise_answer(message, status, {}, body.encode(), now_epoch_seconds=NOW) is None


def test_what_the_exemption_changes() -> None:
    """Only the interval, and what depends on it: calls and errors stay limited."""
    exact, exempt = (presets()[name] for name in ("exact-online", "exact-online-exempt"))
    assert not exempt.refresh.interval + exempt.refresh.margin
    assert (exempt.limit, exempt.output, exempt.endpoint) == (
        exact.limit,
        exact.output,
        exact.endpoint,
    )
    assert (exempt.oauth, exempt.block) == (exact.oauth, exact.block)


def test_the_tiers() -> None:
    """Xero's Starter tier has a fifth of the calls a day, an uncertified Twinfield app 5 %."""

    def most(name: str) -> dict[str, int]:
        return {limit.name: limit.most for limit in presets()[name].limit}

    assert most("xero-starter") == most("xero") | {"calls-a-day": 1_000}
    assert most("twinfield")["credits-a-minute"] == 1_000
    assert most("twinfield-uncertified") == {"credits-a-minute": 50}


def test_a_renewal_never_breaks_the_interval() -> None:
    """Every preset with a known life of its access tokens leaves room to renew them in time."""
    for policy in presets().values():
        refresh = policy.refresh
        if refresh.access_token_life:
            assert refresh.early_margin, policy.name
            window = refresh.access_token_life - refresh.interval - refresh.margin
            assert 0 < refresh.early_margin <= window
    exact = presets()["exact-online"].refresh
    assert exact.early_margin is not None
    assert exact.interval + exact.margin == 572
    assert exact.access_token_life - exact.early_margin == 572
