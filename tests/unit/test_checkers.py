"""The judges themselves: what breaks a limit is found, and nothing else is."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.checkers import Call, calls_of, fullest_window

WINDOW = 10


def at(*instants: int) -> list[Call]:
    """Return calls of which it is known when they arrived."""
    return [Call(("x",), instant, instant) for instant in instants]


def most(calls: list[Call]) -> int:
    """Return how many the fullest window has."""
    return len(fullest_window(calls, WINDOW))


def test_a_window_slides() -> None:
    """Three in the last instants of one window of the clock and three in the first of the next.

    Fails when the windows are those of the clock, or overlap at both ends.
    """
    assert most(at(7, 8, 9, 10, 11, 12)) == 6
    assert most(at(0, 5, 9)) == 3
    assert most(at(0, 5, 10)) == 2
    assert most([]) == 0


def test_a_call_counts_wherever_it_may_have_arrived() -> None:
    """Fails when only the instant counts at which a call was sent, or only that of its answer."""
    slow = Call(("x",), 0, 20)
    assert most([slow, *at(0)]) == most([slow, *at(25)]) == 2
    assert most([slow, *at(30)]) == most([slow, *at(0), *at(25)]) - 1 == 1


spans = st.tuples(st.integers(0, 40), st.integers(0, 8))


@given(st.lists(spans, max_size=8))
def test_it_agrees_with_looking_everywhere(spans: list[tuple[int, int]]) -> None:
    """Every window is tried, for every call at every instant.

    Fails when an instant at which a call may have arrived is left out at either end.
    """
    calls = [Call(("x",), begin, begin + length) for begin, length in spans]
    tried = (
        sum(
            any(
                end - WINDOW < instant <= end
                for instant in range(one.earliest_ns, one.latest_ns + 1)
            )
            for one in calls
        )
        for end in range(60)
    )
    assert most(calls) == max(tried)


@given(st.lists(st.integers(0, 40), max_size=8))
def test_it_agrees_with_all_pairs(instants: list[int]) -> None:
    """A window with more than the limit lies between two calls, less than its length apart."""
    instants.sort()
    pairs = itertools.combinations_with_replacement(range(len(instants)), 2)
    counts = (
        last - first + 1 for first, last in pairs if instants[last] - instants[first] < WINDOW
    )
    assert most(at(*instants)) == max(counts, default=0)


def test_what_callers_noted() -> None:
    """An answer ends a call; without one it may have arrived until its reservation ran out.

    Fails when a call without an answer is left out, or taken for one that went well.
    """
    sent = {"what": "sent", "scope": ["1", "crm"], "until_ns": 9}
    notes = [
        {"call": "b", "what": "answered", "at_ns": 4, "status": 404},
        {"call": "a", "at_ns": 1, **sent},
        {"call": "b", "at_ns": 3, **sent},
        {"call": "a", "what": "crashed", "at_ns": 2, "point": "sent"},
    ]
    assert calls_of(notes) == [Call(("1", "crm"), 1, 9), Call(("1", "crm"), 3, 4, 404)]
