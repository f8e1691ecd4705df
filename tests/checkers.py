"""Judges of recorded histories: plain functions, without clocks and without I/O."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was made, or may have been, at some instant from the earliest to the latest."""

    scope: tuple[str, ...]
    earliest_ns: int
    latest_ns: int
    status: int | None = None
    """None where the caller did not live to see the answer."""


def calls_of(notes: Iterable[Mapping[str, Any]]) -> list[Call]:
    """Make calls of what their callers noted, in any order.

    Of a call that was sent and never answered is taken that it may have arrived at any instant
    until its reservation ran out.

    Args:
        notes: Each with `what` was done by a `call`: "sent", with `at_ns`, `until_ns` and `scope`,
            or "answered", with `at_ns` and `status`. Others are passed over.
    """
    notes = list(notes)
    answers = {note["call"]: note for note in notes if note["what"] == "answered"}
    calls = []
    for note in notes:
        if note["what"] != "sent":
            continue
        answer = answers.get(note["call"], {})
        latest_ns = answer.get("at_ns", max(note["at_ns"], note["until_ns"]))
        calls.append(Call(tuple(note["scope"]), note["at_ns"], latest_ns, answer.get("status")))
    return calls


def fullest_window(calls: Sequence[Call], window_ns: int) -> list[Call]:
    """Return the calls that the provider may have seen in one window, where they are most.

    Each call may have arrived at any of its instants, whatever the others did. A window reaches
    back from an instant, which belongs to it, to one that does not; the fullest ends where a call
    may first have arrived.
    """
    begins = sorted(call.earliest_ns for call in calls)
    ends = sorted(call.latest_ns for call in calls)

    def seen(at_ns: int) -> int:
        return bisect_right(begins, at_ns) - bisect_right(ends, at_ns - window_ns)

    end_ns = max(begins, key=seen, default=0)
    return [
        call for call in calls if call.earliest_ns <= end_ns and call.latest_ns > end_ns - window_ns
    ]
