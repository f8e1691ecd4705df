"""The judge of chaos runs, on short histories written by hand."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import pytest

from tests.chaos.history import Event, Recorder, read
from tests.chaos.judge import Rules, Violation, judge, story, unavailability

if TYPE_CHECKING:
    from pathlib import Path

RULES = Rules(intervals={"t": 1.0}, calls_most=2, calls_window_seconds=5.0)
"""An interval of a second, and two calls in any five."""


def happened(*lines: tuple[float, str, str, dict[str, object]]) -> list[Event]:
    """Return events: when, who, what, and the facts."""
    return [Event(*line) for line in lines]


def lease(who: str, fencing: int, granted: float, **ends: float) -> list[Event]:
    """Return what a holder records: its grant, and what of `worked` and `released` is given."""
    deadline = ends.get("deadline", granted + 3)
    facts: dict[str, object] = {"id": who, "token": "t", "fencing": fencing, "deadline": deadline}
    found = [Event(granted, who, "granted", facts)]
    if "worked" in ends:
        found.append(Event(ends["worked"], who, "work", {"id": who}))
    told = [what for what in ("lost", "releasing") if what in ends]
    return [*found, *(Event(ends[what], who, what, {"id": who}) for what in told)]


def fault(begin: float, end: float, name: str = "a", **flags: object) -> list[Event]:
    """Return the events of a fault."""
    facts = {"name": name, "loses": False, "clock": False, "disturbs": True, **flags}
    healed = Event(end, "chaos", "healed", {"name": name})
    return [Event(begin, "chaos", "fault", facts), healed]


def broken(*parts: list[Event]) -> list[str]:
    """Return the rules that a history breaks."""
    return [one.rule for one in violations(*parts)]


def violations(*parts: list[Event]) -> list[Violation]:
    """Judge a history that is put together of parts."""
    return judge(merged(*parts), RULES)


def merged(*parts: list[Event]) -> list[Event]:
    """Put parts of a history together."""
    return sorted(chain.from_iterable(parts), key=lambda event: event.at)


def test_turns_are_fine() -> None:
    """Two holders by turns, an interval apart, break nothing."""
    assert broken(lease("a", 1, 0, releasing=1), lease("b", 2, 2, releasing=3)) == []


def test_two_holders() -> None:
    """A lease that is granted before the one before it is given back breaks exclusion."""
    assert broken(lease("a", 1, 0, releasing=2), lease("b", 2, 1.5, releasing=3)) == ["exclusion"]


def test_dead_holder_holds_until_its_deadline() -> None:
    """Who was killed has the lease until the deadline that it knew."""
    dead = lease("a", 1, 0, deadline=3, worked=0.5)
    assert broken(dead, lease("b", 2, 2.9, releasing=3)) == ["exclusion"]
    assert broken(dead, lease("b", 2, 4.5, releasing=5)) == []


def test_renewal_moves_the_deadline() -> None:
    """A renewal that was heard of makes a holder live longer."""
    renewed = [Event(1, "a", "renewed", {"id": "a", "deadline": 6.0})]
    assert broken(lease("a", 1, 0), renewed, lease("b", 2, 4, releasing=5)) == ["exclusion"]


def test_long_hold_covers_a_short_one() -> None:
    """A hold is compared with all before it, not only with the one just before."""
    long, short = lease("a", 1, 0, deadline=9), lease("b", 2, 1, releasing=1.2)
    assert broken(long, short, lease("c", 3, 5, releasing=6)) == ["exclusion", "exclusion"]


def test_who_was_told_of_the_loss_holds_no_more() -> None:
    """A lease is over for its holder when it is told so, also before the deadline."""
    assert broken(lease("a", 1, 0, lost=1), lease("b", 2, 2.5, releasing=3)) == []


def test_interval() -> None:
    """The next lease begins an interval after the last moment of a possible refresh."""
    assert broken(lease("a", 1, 0, releasing=1), lease("b", 2, 1.5, releasing=2)) == ["interval"]


def test_reported_refresh_counts() -> None:
    """Who saw every refresh ends its interval from there, unless the release may be unheard."""
    refreshed = [Event(0.1, "a", "refreshed", {"id": "a"})]
    hold, later = lease("a", 1, 0, releasing=1), lease("b", 2, 1.5, releasing=2)
    assert broken(hold, refreshed, later) == []
    unheard = [Event(1.2, "a", "not-released", {"id": "a"})]
    assert broken(hold, refreshed, unheard, later) == ["interval"]


def test_interval_after_the_clock_was_moved() -> None:
    """An interval may be shorter by the tolerance after a fault of the clock, no more."""
    moved = fault(0.2, 0.3, clock=True)
    assert broken(lease("a", 1, 0, releasing=1), moved, lease("b", 2, 1.96, releasing=2)) == []


def test_fencing_numbers_rise() -> None:
    """A later lease with a lower number breaks the promise, also with an equal one."""
    assert broken(lease("a", 5, 0, releasing=1), lease("b", 5, 3, releasing=4)) == ["rising"]


def wait(who: str, asked: float, queued: float, granted: float) -> list[Event]:
    """Return what a waiter records that is served and gives the lease back at once."""
    number = round(granted * 1000)
    ask: dict[str, object] = {"id": who, "token": "t"}
    return [
        Event(asked, who, "asked", ask),
        Event(queued, who, "queued", {"id": who}),
        *lease(who, number, granted, releasing=granted + 0.01),
    ]


def test_order() -> None:
    """Who asked after another was in the queue may not be served before it."""
    assert broken(wait("a", 0, 0.1, 4), wait("b", 0.2, 0.3, 2)) == ["order"]
    assert broken(wait("a", 0, 0.1, 2), wait("b", 0.2, 0.3, 4)) == []


def test_order_of_those_who_ask_at_once() -> None:
    """Nothing is known of the order of two whose questions were under way together."""
    assert broken(wait("a", 0, 0.3, 4), wait("b", 0.2, 0.4, 2)) == []


def test_order_is_excused_by_a_disturbance() -> None:
    """Who may be unheard because of a fault may be passed over."""
    both = [*wait("a", 0, 0.1, 4), *wait("b", 0.2, 0.3, 2)]
    assert broken(both, fault(1, 1.5)) == []
    assert broken(both, fault(1, 1.5, disturbs=False)) == ["order"]
    victim = [Event(1.2, "chaos", "victim", {"name": "a"})]
    assert broken(both, fault(1, 1.5, disturbs=False), victim) == []


def test_told_in_time() -> None:
    """Who works beyond its deadline, or after the next grant, was told too late."""
    assert broken(lease("a", 1, 0, deadline=2, worked=2.1)) == ["told-in-time"]
    late = lease("a", 1, 0, deadline=9, worked=3.5, releasing=4)
    assert broken(late, lease("b", 2, 3, releasing=5)) == ["exclusion", "told-in-time"]


def test_lock_of_the_library() -> None:
    """A lock of python-redis-lock excludes leases, until the store loses data or time."""
    facts = {"id": "f", "token": "t", "deadline": 9.0}
    lock = happened((0, "f", "locked", facts), (2, "f", "unlocking", {"id": "f"}))
    assert broken(lock, lease("a", 1, 1, releasing=3)) == ["exclusion"]
    assert broken(fault(0.1, 0.2, loses=True), lock, lease("a", 1, 1, releasing=3)) == []


def reported(at: float, name: str, outcome: str) -> list[Event]:
    """Return what one reports, and the answer; an empty one was lost."""
    facts = {"id": name, "token": "c", "division": "d"}
    end = {"outcome": outcome} if outcome else {}
    what = "reported" if outcome else "report-unknown"
    return [Event(at, "r", "reporting", facts), Event(at + 0.1, "r", what, {"id": name, **end})]


def test_counted_twice() -> None:
    """An event that counts twice breaks the promise, unless the store lost it in between."""
    twice = [*reported(0, "e", "COUNTED"), *reported(1, "e", "COUNTED")]
    assert broken(twice) == ["counted-once"]
    assert broken(twice, fault(0.5, 0.6, loses=True)) == []
    assert broken(reported(0, "e", "COUNTED"), reported(1, "e", "KNOWN")) == []


@pytest.mark.parametrize(("used", "rules"), [(0, ["totals"]), (1, []), (2, []), (3, ["totals"])])
def test_totals(used: int, rules: list[str]) -> None:
    """What is counted at the end lies between what was acknowledged and what was reported."""
    counts = [Event(9, "chaos", "counts", {"token": "c", "used": {"d": used}})]
    assert broken(reported(0, "e", "KNOWN"), reported(1, "f", ""), counts) == rules


def test_totals_after_a_loss() -> None:
    """What a store lost may be missing, and nothing may be added."""
    counts = [Event(9, "chaos", "counts", {"token": "c", "used": {}})]
    assert broken(reported(0, "e", "COUNTED"), fault(2, 3, loses=True), counts) == []


def test_reservations() -> None:
    """More calls than the limit in any window break the promise."""
    calls = [Event(at, "r", "called", {"id": str(at), "token": "l"}) for at in (0, 4, 4.5, 9)]
    [violation] = violations(calls)
    assert violation.rule == "reservations"
    assert "3 calls within 4.50 s" in violation.text
    assert broken(calls[:2]) == []


def test_stuck_process() -> None:
    """A process that does not end is reported."""
    assert broken([Event(1, "chaos", "stuck", {"command": "holdoff run"})]) == ["stuck"]


def test_never_available_again() -> None:
    """A token that is not granted after the last fault is reported."""
    settle, closed = Event(5, "chaos", "settle"), Event(50, "chaos", "closed")
    assert broken([settle, closed]) == ["available"]
    assert broken([settle, closed], lease("a", 1, 9, releasing=10)) == []


def test_audit_trail_is_kept() -> None:
    """A trail that becomes shorter without a loss is reported."""
    trail = [Event(at, "chaos", "trail", {"app": "a", "length": 9 - at}) for at in (1, 3)]
    assert broken(trail) == ["audit"]
    assert broken(trail, fault(1.5, 2, loses=True)) == []


def test_unavailability() -> None:
    """The time to the next grant counts from the begin of a fault."""
    assert unavailability(merged(fault(1, 2, "cut"), lease("a", 1, 4)), RULES) == {"cut": [3]}


def test_story_is_short() -> None:
    """A story has the faults, and what its holders did, without all the work in between."""
    works = [Event(1 + n / 100, "a", "work", {"id": "a"}) for n in range(50)]
    both = [*lease("a", 1, 0, releasing=2), *lease("b", 2, 1.5, releasing=3)]
    events = merged(fault(0.5, 0.6), works, both)
    [violation] = [one for one in judge(events, RULES) if one.rule == "exclusion"]
    told = story(events, violation, 0)
    assert [line.split()[1:3] for line in told] == [
        ["a", "granted"],
        ["chaos", "fault"],
        ["chaos", "healed"],
        ["a", "work"],
        ["b", "granted"],
        ["a", "releasing"],
    ]


def test_history_survives_a_kill(tmp_path: Path) -> None:
    """A last line that is not whole is left out."""
    with Recorder(tmp_path, "a") as record:
        record("granted", id="x")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"at": 1, "who')
    assert [event.what for event in read(tmp_path)] == ["granted"]
