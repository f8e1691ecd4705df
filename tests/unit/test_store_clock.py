"""The comparison of the store's clock with the boot clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdoff_coordinator.clock import Reading, StoreClock

SECOND = 1_000_000
KEEP = 900 * SECOND


def measured(offset_us: int) -> StoreClock:
    """Give a clock that has one good measurement."""
    clock = StoreClock(KEEP)
    assert clock.observe(0, 1000, 500 + offset_us) == 0
    return clock


def test_no_estimate_before_a_measurement() -> None:
    """Nothing is known at first, so that nothing is in doubt."""
    assert StoreClock(KEEP).read(5, KEEP) is None


def test_the_estimate_follows_the_offset() -> None:
    """The store's time is the boot clock plus the measured difference."""
    assert measured(7 * SECOND).read(10 * SECOND, KEEP) == Reading(
        17 * SECOND, 17 * SECOND - 500, 0, KEEP + KEEP // 1000 + 1000 - 10 * SECOND
    )


@given(st.integers(0, 60 * SECOND), st.integers(0, 30 * SECOND))
def test_a_slow_answer_is_no_jump(after_us: int, delay_us: int) -> None:
    """However long an answer takes, a store that kept time is not accused."""
    sent = 1000 + after_us
    store = sent + delay_us // 2 + 5 * SECOND
    assert measured(5 * SECOND).observe(sent, sent + delay_us, store) == 0


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


def stepped(clock: StoreClock, at_s: float, offset_us: int) -> int:
    """Let a clock make one good measurement."""
    at = round(at_s * SECOND)
    return clock.observe(at, at + 100, at + 50 + offset_us)


def test_small_steps_add_up_to_a_jump() -> None:
    """Seven steps of 0.9 s are seen as jumps, and the floor follows none of them.

    Fails when each small step becomes the base of the next comparison.
    """
    clock = measured(0)
    jumps = [stepped(clock, 10 * step, 900_000 * step) for step in range(1, 8)]
    assert [jump > SECOND for jump in jumps] == [False, True, False, True, False, True, False]
    reading = clock.read(70 * SECOND, KEEP)
    assert reading is not None
    assert reading.floor_us <= 70 * SECOND
    assert abs(reading.gain_us - 6_300_000) < 2000
    assert abs(reading.estimate_us - 76_300_000) < 2000


def test_a_fast_clock_is_a_jump() -> None:
    """A clock that is 10 % fast is noticed once it gained a second."""
    clock = measured(0)
    jumps = [stepped(clock, at, at * SECOND // 10) for at in range(1, 13)]
    assert [bool(jump) for jump in jumps] == [False] * 10 + [True, False]


def test_what_was_gained_before_the_window_is_forgotten() -> None:
    """Nothing that was counted from so long ago is left, so that the floor may follow.

    Fails when `observe` drops nothing from the left.
    """
    clock = measured(0)
    for at in range(1, 2000, 10):
        stepped(clock, at, 900_000)
    reading = clock.read(2000 * SECOND, KEEP)
    assert reading is not None
    assert reading.gain_us == 0
    assert reading.estimate_us - reading.floor_us < 20_000


@given(st.lists(st.integers(-SECOND, SECOND), min_size=2, max_size=80))
def test_the_floor_is_never_above_what_the_clock_showed(steps: list[int]) -> None:
    """Whatever the clock did within the window, the floor counts from its slowest instant.

    That instant is known as exactly as the answers were quick: here to 100 µs.
    """
    clock, offset, slowest = StoreClock(KEEP), 0, 0
    for at, step in enumerate(steps):
        offset += step
        slowest = min(slowest, offset) if at else offset
        stepped(clock, at, offset)
    reading = clock.read(0, KEEP)
    assert reading is not None
    assert reading.floor_us <= slowest + 100


def test_only_the_window_that_matters_counts() -> None:
    """One app has leases of a day, and another of a minute: a step delays the other for a minute.

    Fails when `read` looks as far back as any app needs.
    """
    clock = StoreClock(60 * SECOND)
    for at in range(300):
        clock.observe(
            at * SECOND,
            at * SECOND + 100,
            at * SECOND + 50 + (900_000 if at > 100 else 0),
            86_400 * SECOND,
        )
    short, long = clock.read(300 * SECOND, 60 * SECOND), clock.read(300 * SECOND, 86_400 * SECOND)
    assert short is not None
    assert long is not None
    assert (short.gain_us, long.gain_us > 890_000) == (0, True)
