"""For how long a client uses an access token, and what it says when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from holdoff._core import duration
from holdoff.custody.access import Access
from holdoff.errors import GrantNotFound, NoAccessToken, Unavailable
from holdoff.v1 import custody_service_pb2, grant_pb2

TOKEN = "apps/exact-nl/tokens/finance"
SECOND = 1_000_000_000
START = 5_000 * SECOND
State = grant_pb2.GrantState


class Clock:
    """A boot clock that a test moves."""

    now_ns = START

    def __call__(self) -> int:
        """Read it."""
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += round(seconds * SECOND)


def response(
    state: State.ValueType = State.GRANT_STATE_READY,
    access_token: str = "",
    *,
    age: float = 0.0,
    has: bool = True,
    **fields: Any,
) -> custody_service_pb2.GetAccessTokenResponse:
    """What a coordinator sends."""
    given = None
    if access_token:
        defaults = {"generation": 3, "remaining": duration(600), "early_margin": duration(28)}
        given = grant_pb2.AccessToken(access_token=access_token, **{**defaults, **fields})
    return custody_service_pb2.GetAccessTokenResponse(
        status=grant_pb2.GrantStatus(state=state, message="because"),
        access_token=given,
        has_access_token=has,
        stream_age=duration(age),
    )


def opened() -> tuple[Access, Clock]:
    """Give a stream that was just opened, and its clock."""
    clock = Clock()
    access = Access(TOKEN, clock)
    assert access.request().name == f"{TOKEN}/grant"
    return access, clock


def seconds_left(access: Access) -> float:
    """Return for how long calls may begin with the access token."""
    usable = access.usable()
    assert usable
    return (usable.until_ns - access.clock()) / SECOND


def test_a_token_is_used_until_its_early_margin() -> None:
    """Fails when it is used in the last 28 s of its life."""
    access, clock = opened()
    access.received(response(access_token="a"))
    assert seconds_left(access) == 572
    clock.sleep(571)
    assert access.usable()
    clock.sleep(1)
    assert access.usable() is None


def test_a_delayed_response_counts_from_when_it_was_sent() -> None:
    """As after this machine was suspended: the stream was 10 s old when it was sent."""
    access, clock = opened()
    clock.sleep(300)
    access.received(response(access_token="a", age=10))
    assert seconds_left(access) == pytest.approx(572 - 290, abs=0.01)


def test_clocks_that_drift_apart_take_nothing_from_a_token() -> None:
    """After ten days ours is 432 s ahead of the coordinator's, at 500 ppm."""
    access, clock = opened()
    days = 10 * 24 * 3600
    clock.sleep(days)
    access.received(response(access_token="a", age=days / (1 + 500e-6)))
    assert seconds_left(access) == pytest.approx(572, abs=0.5)
    access.received(response(access_token="b", age=days * (1 + 500e-6)))
    assert seconds_left(access) == 572


def test_a_token_that_comes_again_does_not_live_longer() -> None:
    """Another connection begins with the current token."""
    access, clock = opened()
    access.received(response(access_token="a"))
    clock.sleep(100)
    access.request()
    access.received(response(access_token="a"))
    assert seconds_left(access) == 472
    access.received(response(access_token="b"))
    assert seconds_left(access) == 572


def test_a_state_alone_leaves_the_token() -> None:
    """Unless the coordinator says that there is none."""
    access, _ = opened()
    access.received(response(access_token="a"))
    access.received(response(State.GRANT_STATE_REAUTHORIZE))
    assert access.usable()
    access.received(response(State.GRANT_STATE_COOLING, has=False))
    assert access.usable() is None


def test_a_token_that_no_header_can_have_is_ignored() -> None:
    """Else it would put headers of its own into the caller's requests."""
    access, _ = opened()
    access.received(response(access_token="a"))
    access.received(response(access_token="a\r\nHost: evil"))
    assert access.usable() is None


def test_the_end_of_a_stream_withdraws_the_token() -> None:
    """It may have been revoked; a coordinator that is away has revoked nothing."""
    access, _ = opened()
    access.received(response(access_token="a"))
    assert access.failed(Unavailable("away")) > 0
    assert access.usable()
    access.ended(GrantNotFound("gone"))
    with pytest.raises(GrantNotFound):
        access.usable()


def test_a_wait_without_an_answer_ends_with_the_trouble() -> None:
    """Fails when a client that reaches no coordinator says that no answer came, and no more."""
    access, _ = opened()
    access.failed(Unavailable("nothing listens there"))
    access.must_wait(is_over=False)
    with pytest.raises(Unavailable, match="nothing listens there"):
        access.must_wait(is_over=True)


@pytest.mark.parametrize(
    ("state", "waits"),
    [
        (State.GRANT_STATE_READY, True),
        (State.GRANT_STATE_REFRESHING, True),
        (State.GRANT_STATE_COOLING, True),
        (State.GRANT_STATE_HELD, True),
        (State.GRANT_STATE_REAUTHORIZE, False),
        (State.GRANT_STATE_CONFIGURATION, False),
        (State.GRANT_STATE_KEY_MISSING, False),
        (State.GRANT_STATE_STALE, False),
        (99, True),
    ],
)
def test_it_waits_for_what_ends_by_itself(state: Any, waits: bool) -> None:
    """And says why there is none, when the wait is over or makes no sense."""
    access, _ = opened()
    access.must_wait(is_over=False)
    access.received(response(state, has=False))
    if waits:
        access.must_wait(is_over=False)
    with pytest.raises(NoAccessToken, match="no access token of apps/exact-nl") as caught:
        access.must_wait(is_over=waits)
    if state != State.GRANT_STATE_READY:
        assert "because" in str(caught.value)
    names = State.DESCRIPTOR.values_by_number
    word = names[state].name.removeprefix("GRANT_STATE_") if state in names else "99"
    assert caught.value.metadata == {"state": word}


def test_its_texts_do_not_have_the_token() -> None:
    """Promise 8."""
    access, _ = opened()
    access.received(response(access_token="a-secret"))
    assert "a-secret" not in f"{access!r} {access.usable()!r}"


def test_what_a_coordinator_gave_to_keep_is_given_back() -> None:
    """On the next connection, also if what came meanwhile has none."""
    access, _ = opened()
    access.received(response(access_token="a", sealed_copy=b"sealed"))
    access.received(response(access_token="b"))
    assert access.request().sealed_copy == b"sealed"
    assert "sealed" not in repr(access)
