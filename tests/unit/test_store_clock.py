"""The comparison of the store's clock with the boot clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdoff_coordinator.clock import StoreClock

SECOND = 1_000_000


def measured(offset_us: int) -> StoreClock:
    """Give a clock that has one good measurement."""
    clock = StoreClock()
    assert clock.observe(0, 1000, 500 + offset_us) == 0
    return clock


def test_no_estimate_before_a_measurement() -> None:
    """Nothing is known at first, so that nothing is in doubt."""
    assert StoreClock().estimate_us(5) is None


def test_the_estimate_follows_the_offset() -> None:
    """The store's time is the boot clock plus the measured difference."""
    assert measured(7 * SECOND).estimate_us(10 * SECOND) == 17 * SECOND


@given(st.integers(0, 60 * SECOND), st.integers(0, 30 * SECOND))
def test_a_slow_answer_is_no_jump(after_us: int, delay_us: int) -> None:
    """However long an answer takes, a store that kept time is not accused."""
    sent = 1000 + after_us
    assert (
        measured(5 * SECOND).observe(sent, sent + delay_us, sent + delay_us // 2 + 5 * SECOND) == 0
    )


@given(st.sampled_from([-1, 1]), st.integers(1_100_000, 10**12))
def test_a_jump_of_more_than_a_second_is_seen(sign: int, jump_us: int) -> None:
    """In both directions, and its size is told.

    Fails when `observe` keeps the widened bounds after a jump.
    """
    clock = measured(0)
    seen = clock.observe(10 * SECOND, 10 * SECOND + 100, 10 * SECOND + 50 + sign * jump_us)
    assert abs(seen - sign * jump_us) < SECOND
    later = 20 * SECOND
    assert clock.observe(later, later + 100, later + 50 + sign * jump_us) == 0


@given(st.floats(-450e-6, 450e-6))
def test_drift_is_no_jump(drift: float) -> None:
    """NTP slews a clock by at most 0.05 %: an hour of it makes 1.8 s, and no alarm."""
    clock = measured(0)
    for minute in range(1, 61):
        at = minute * 60 * SECOND
        assert clock.observe(at, at + 100, round(at * (1 + drift))) == 0
