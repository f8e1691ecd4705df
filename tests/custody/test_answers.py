"""What answers of token URLs prove."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff_coordinator.custody.answers import (
    Answer,
    Issued,
    Reading,
    Refusal,
    Refused,
    Unproven,
    Verdict,
    judge,
)

EXACT = Reading(
    too_early=(("access_denied", "access_token not expired"),),
    dead=(("unauthorized_client", "old refresh token"), ("invalid_request", "expired")),
)


def answer(status: int, body: object) -> Verdict:
    """Return what an answer with a JSON body, or these bytes, proves at Exact."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return judge(Answer(status, {}, data), EXACT)


def refused(why: Refusal, error: str, rotated: str = "") -> Refused:
    """Return a refusal."""
    return Refused(why, error, rotated)


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (
            200,
            {"access_token": "a", "expires_in": "600", "refresh_token": "r"},
            Issued("a", 600, "r"),
        ),
        (200, {"access_token": "a", "expires_in": 600}, Issued("a", 600, "")),
        (200, {"access_token": "a", "expires_in": "soon"}, Issued("a", None, "")),
        (200, {"access_token": "a", "expires_in": -1}, Issued("a", None, "")),
        (200, {"access_token": "a", "expires_in": True}, Issued("a", None, "")),
        # `domain.md`, token endpoint errors.
        (
            400,
            {
                "error": "access_denied",
                "error_description": "Rate limit exceeded: access_token not expired",
            },
            refused(Refusal.TOO_EARLY, "access_denied"),
        ),
        (
            401,
            {"error": "unauthorized_client", "error_description": "Old refresh token used."},
            refused(Refusal.DEAD, "unauthorized_client"),
        ),
        (
            400,
            {"error": "invalid_request", "error_description": "The refresh token expired at 1/2"},
            refused(Refusal.DEAD, "invalid_request"),
        ),
        (400, {"error": "invalid_request"}, refused(Refusal.OTHER, "invalid_request")),
        (400, {"error": "invalid_grant"}, refused(Refusal.DEAD, "invalid_grant")),
        (401, {"error": "invalid_client"}, refused(Refusal.CLIENT, "invalid_client")),
        (403, {"error": "access_denied"}, refused(Refusal.OTHER, "access_denied")),
        (
            400,
            {"error": "invalid_grant", "refresh_token": "new"},
            refused(Refusal.DEAD, "invalid_grant", "new"),
        ),
        (429, b"slow down", refused(Refusal.BUSY, "HTTP 429")),
    ],
)
def test_answers(status: int, body: object, verdict: Verdict) -> None:
    """Each documented answer has one reading."""
    assert answer(status, body) == verdict


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>maintenance</html>"),
        (200, {}),
        (200, {"access_token": ""}),
        (200, {"access_token": 7}),
        (200, []),
        (200, {"error": "invalid_grant"}),
        (302, b""),
        (400, b"<html>"),
        (400, {"error": 7}),
        (500, {"error": "invalid_grant"}),
        (502, b""),
        (503, b""),
        (504, b""),
    ],
)
def test_no_proof(status: int, body: object) -> None:
    """Fails when such an answer is taken for a refusal: the token may have been issued."""
    assert isinstance(answer(status, body), Unproven)


def test_unavailable_is_proof_where_the_policy_says_so() -> None:
    """Status 503 is a refusal only then."""
    verdict = judge(Answer(503, {}, b""), Reading(unavailable_is_proof=True))
    assert verdict == refused(Refusal.BUSY, "HTTP 503")


@given(
    st.integers(100, 599),
    st.binary(max_size=200)
    | st.builds(
        lambda value: json.dumps(value).encode(),
        st.recursive(
            st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["error", "access_token", "refresh_token", "expires_in", "x"]),
                    inner,
                    max_size=4,
                )
            ),
        ),
    ),
)
def test_any_answer_has_a_reading_without_secrets(status: int, body: bytes) -> None:
    """Nothing raises, and no text of a verdict has a token."""
    verdict = judge(Answer(status, {}, body), EXACT)
    if isinstance(verdict, Issued):
        assert status == 200
        assert verdict.access_token not in repr(verdict) or len(verdict.access_token) < 10
