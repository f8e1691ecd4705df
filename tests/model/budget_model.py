"""Budgets as plain Python has them: lists of events, and a clock that only the test moves."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

SECOND = 1_000_000
DAY = 24 * 3600 * SECOND
LOG_MOST = 8
"""Entries of their own a budget; the scripts' number, made small by the test."""
IDS_MOST = 30
IDS_SHARE = 4
"""Of the ids that are free, so many times as many may be one token's."""
IDS_SLICE = 3 * 3600 * SECOND


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget as the policy says; times in µs."""

    id: str
    kind: str
    most: int
    margin: int
    window: int
    grain: int = 0
    statuses: tuple[int, ...] = ()

    def counts(self, status: int) -> bool:
        """Tell whether a call with this status counts here; 0 is one that is not known."""
        return self.kind != "ERROR" or status == 0 or status in self.statuses


@dataclass(slots=True, eq=False)
class Event:
    """So many things that happened at one instant."""

    at: int
    count: int
    forgotten: bool = False


@dataclass(slots=True)
class Reservation:
    """Room that was taken, and what became of it."""

    caller: str
    count: int
    limits: tuple[Limit, ...]
    made: int
    expires: int
    state: str = "reserved"
    events: list[tuple[Limit, Event]] = field(default_factory=list)
    moved: bool = False


class Model:
    """One app's budgets. Each method is one script, run at the instant `now`."""

    def __init__(self) -> None:
        self.events: dict[Limit, list[Event]] = defaultdict(list)
        self.known: dict[str, int] = {}
        self.noted: dict[int, int] = defaultdict(int)
        """How many ids of the token are kept until the end of a slice."""
        self.reservations: dict[str, Reservation] = {}
        self.touched_until: dict[Limit, int] = defaultdict(int)
        self.overflowed: set[Limit] = set()

    def settle(self, now: int) -> None:
        """Bring everything up to this instant."""
        self.known = {event: until for event, until in self.known.items() if until > now}
        for name, reservation in self.reservations.items():
            if reservation.state == "reserved" and reservation.expires <= now:
                reservation.state = "expired"
                limits = reservation.limits
                reservation.events = self._count(
                    now, name, reservation.expires, reservation.count, limits
                )

    def used(self, limit: Limit, now: int, longer: int = 0) -> int:
        """Count the events in the window, or in one that is so much longer."""
        first = now - limit.window - longer
        return sum(
            event.count for event in self.events[limit] if event.at >= first and not event.forgotten
        )

    def reserved(self, limit: Limit) -> int:
        """Count what is reserved."""
        return sum(reservation.count for reservation in self._outstanding(limit))

    def _outstanding(self, limit: Limit) -> list[Reservation]:
        return [
            reservation
            for reservation in self.reservations.values()
            if reservation.state == "reserved" and limit in reservation.limits
        ]

    def slice_of(self, limit: Limit) -> int:
        """So much longer than the window an event may count."""
        return limit.grain or (SECOND if limit in self.overflowed else 0)

    def room_at(self, limit: Limit, now: int, count: int) -> int:
        """Find the first instant with so much room, if nothing else happens."""
        leaving = [
            (event.at, event.count)
            for event in self.events[limit]
            if event.at >= now - limit.window and not event.forgotten
        ]
        leaving += [(held.expires, held.count) for held in self._outstanding(limit)]
        left = sum(n for _, n in leaving)
        allowed = limit.most - limit.margin - count
        for at, n in sorted(leaving):
            if left <= allowed:
                break
            now, left = at + limit.window + 1, left - n
        return now

    def instants(self, now: int) -> list[int]:
        """List when something changes by itself."""
        found = {
            event.at + limit.window
            for limit, events in self.events.items()
            for event in events
            if not event.forgotten
        }
        found |= {r.expires for r in self.reservations.values() if r.state == "reserved"}
        found |= set(self.known.values())
        return sorted(instant for instant in found if instant > now)

    def may_count(self, now: int) -> bool:
        """Tell whether there is room for another id of the only token."""
        reserved = [r for r in self.reservations.values() if r.state == "reserved"]
        free = IDS_MOST - len(self.known) - len(reserved)
        return sum(n for until, n in self.noted.items() if until > now) < IDS_SHARE * free

    def _note_id(self, until: int) -> None:
        self.noted[(until // IDS_SLICE + 1) * IDS_SLICE] += 1

    def record(self, now: int, event: str, at: int, count: int, limits: tuple[Limit, ...]) -> str:
        """Count a reported event once."""
        if event in self.known:
            return "KNOWN"
        if not self.may_count(now):
            return "TOO_MANY_EVENTS"
        self._count(now, event, at, count, limits)
        self._note_id(self.known[event])
        return "COUNTED"

    def _count(
        self, now: int, event: str, at: int, count: int, limits: tuple[Limit, ...]
    ) -> list[tuple[Limit, Event]]:
        made = [(limit, Event(at, count)) for limit in limits]
        for limit, one in made:
            self._log(now, limit, one)
        self.known[event] = now + DAY + max((limit.window for limit in limits), default=0)
        return made

    def _log(self, now: int, limit: Limit, event: Event) -> None:
        if event.at < now - limit.window:
            return
        there = [e for e in self.events[limit] if e.at >= now - limit.window and not e.forgotten]
        if len(there) >= LOG_MOST - 1:
            self.overflowed.add(limit)
        if event not in self.events[limit]:
            self.events[limit].append(event)
        self._touch(limit, event.at)

    def _touch(self, limit: Limit, at: int) -> None:
        until = at + limit.window + max(limit.grain, SECOND) + 1
        self.touched_until[limit] = max(self.touched_until[limit], until)

    def reserve(self, name: str, reservation: Reservation) -> None:
        """Take room that there is."""
        self.reservations[name] = reservation
        longest = max((limit.window for limit in reservation.limits), default=0)
        self._note_id(reservation.expires + longest + DAY)
        for limit in reservation.limits:
            self._touch(limit, reservation.expires)

    def commit(self, now: int, name: str, caller: str, age: int, status: int) -> str:
        """Say that a call was made; no earlier than its room was taken."""
        reservation = self.reservations.get(name)
        if reservation is None or reservation.caller != caller:
            return "RESERVATION_NOT_FOUND"
        at = max(now - age, reservation.made)
        if reservation.state in ("reserved", "cancelled"):
            reservation.state = "committed"
            counting = tuple(limit for limit in reservation.limits if limit.counts(status))
            self._count(now, name, at, reservation.count, counting)
        elif reservation.state == "expired" and not reservation.moved:
            reservation.moved = True
            for limit, event in reservation.events:
                if at > event.at and not event.forgotten:
                    event.at = at
                    self._log(now, limit, event)
        return reservation.state

    def cancel(self, name: str, caller: str) -> str:
        """Say that a call was not made."""
        reservation = self.reservations.get(name)
        if reservation is None or reservation.caller != caller:
            return "RESERVATION_NOT_FOUND"
        if reservation.state == "reserved":
            reservation.state = "cancelled"
        return reservation.state

    def reset(self, limit: Limit) -> None:
        """Forget what a budget counted so far."""
        for event in self.events[limit]:
            event.forgotten = True
        for reservation in self.reservations.values():
            for one, event in reservation.events:
                if one == limit:
                    event.forgotten = True
        self.events[limit].clear()


@dataclass(slots=True)
class Grant:
    """A call by somebody who reserves, as the history has it."""

    at: int
    count: int
    limits: frozenset[Limit]
    settled: bool = False


class History:
    """What callers who reserve did, and whether they exceeded a limit together."""

    def __init__(self) -> None:
        self.grants: dict[str, Grant] = {}

    def check(self, limit: Limit, now: int) -> None:
        """See that no window of the limit's length has more calls than the limit allows.

        A call that is reserved may happen at any instant: the last one is the worst.
        """
        calls = sorted(
            (max(now, grant.at) if not grant.settled else grant.at, grant.count)
            for grant in self.grants.values()
            if limit in grant.limits
        )
        for at, _ in calls:
            inside = sum(n for other, n in calls if at - limit.window <= other <= at)
            assert inside <= limit.most - limit.margin, f"{limit.id}: {inside} calls in a window"

    def forget(self, limit: Limit) -> None:
        """Leave out what a reset forgot."""
        for grant in self.grants.values():
            if grant.settled:
                grant.limits -= {limit}
