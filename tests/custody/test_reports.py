"""What is reported of a request to a token URL: errors, and answers that block or throttle."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdoff.names import TokenName
from holdoff.policies import presets
from holdoff.v1 import budget_pb2
from holdoff_coordinator.custody.answers import Issued, Refusal, Refused, Unproven
from holdoff_coordinator.custody.outcomes import Answered, Failure, NoProof, NotSent, Received
from holdoff_coordinator.custody.reports import Requested, aged, events_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdoff_coordinator.custody.outcomes import Outcome

NAME = TokenName("a", "t")
EXACT = presets()["exact-online"]
BUSY = Refused(Refusal.BUSY, "HTTP 429")
KIND = {budget_pb2.EVENT_KIND_ERROR: "error", budget_pb2.EVENT_KIND_BLOCK: "block"}
REQUEST = Requested(uuid.uuid4().hex, "https://start.exactonline.nl/api/oauth2/token")


def answer(status: int, body: bytes = b"{}", **headers: str) -> Answered:
    """Return an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answered(Received(status, named, body), sent_us=1_000_000, last_byte_us=3_000_000)


def events(outcome: Outcome, verdict: Any = BUSY) -> Sequence[budget_pb2.Event]:
    """Return what is reported."""
    return events_of(NAME, EXACT, REQUEST, outcome, verdict, replica="one:1", epoch_seconds=1e9)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (answer(429, retry_after="30"), [("error", "", None), ("block", "too-many-calls", 30)]),
        (answer(429), [("error", "", None), ("block", "too-many-calls", None)]),
        (answer(503, retry_after="90"), [("error", "", None), ("block", "ip-blocked", 90)]),
        (answer(401), [("error", "", None)]),
        (
            answer(403, b'{"error":"app blocked"}'),
            [("error", "", None), ("block", "key-blocked", None)],
        ),
        (answer(302), []),
        (NotSent(Failure.CONNECT, "away"), []),
        (NoProof(Failure.RESET, "reset", 1, 2), []),
        (
            NoProof(Failure.RESET, "reset", 1, 2, Received(502, {}, b"")),
            [("error", "", None)],
        ),
    ],
    ids=str,
)
def test_what_is_reported(outcome: Outcome, expected: list[tuple[str, str, float | None]]) -> None:
    """By the policy's throttles; an error has the endpoint, a block does not."""
    found = events(outcome)
    assert [
        (
            KIND[one.kind],
            one.throttle,
            one.retry_after.ToSeconds() if one.HasField("retry_after") else None,
        )
        for one in found
    ] == expected
    for one in found:
        assert one.scope.token == str(NAME)
        is_error = one.kind == budget_pb2.EVENT_KIND_ERROR
        assert one.scope.endpoint == ("/api/oauth2/token" if is_error else "")
        assert uuid.UUID(one.id).version == 4
    assert len({one.id for one in found}) == len(found)
    assert [one.id for one in events(outcome)] == [one.id for one in found]


def test_when_to_come_again_needs_no_throttle_of_the_policy() -> None:
    """A policy without throttles obeys `Retry-After`, and nothing without it."""
    policy = presets()["xero"]
    for one, expected in ((answer(503, retry_after="40"), 40), (answer(503), None)):
        found = events_of(
            NAME,
            msgspec.structs.replace(policy, throttle=()),
            REQUEST,
            one,
            Unproven("HTTP 503"),
            replica="one:1",
            epoch_seconds=1e9,
        )
        blocks = [event for event in found if event.kind == budget_pb2.EVENT_KIND_BLOCK]
        assert [event.retry_after.ToSeconds() for event in blocks] == (
            [expected] if expected else []
        )


def test_a_token_that_was_issued_is_not_searched() -> None:
    """Its body is secret: it is not even decoded to be compared with patterns."""
    issued = Issued("a-secret", 600.0, "")
    assert events(answer(200, b'{"access_token": "blocked key"}'), issued) == ()


def test_ages() -> None:
    """They count from the answer's last byte, and of a block also from the request."""
    outcome = answer(429, retry_after="30")
    found = events(outcome)
    aged(found, outcome, 4_500_000)
    error, block = found
    assert (error.age.ToMilliseconds(), error.HasField("sent_age")) == (1500, False)
    assert (block.age.ToMilliseconds(), block.sent_age.ToMilliseconds()) == (1500, 3500)
