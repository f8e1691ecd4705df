"""Judges the history of a chaos run. Pure: events in, violations out.

What is judged is what a history can prove. A reply that never came says nothing, so that what was
asked in vain may have happened or not. An instant counts for a violation only where it is on the
safe side: a holder lives from when it was *told* of its grant until it *began* to release, was told
of the loss, or reached the deadline that it knew itself.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tests.chaos.history import Event

SLEW_SECONDS = 0.01
"""Two good clocks may part by so much in the times that are judged here (NTP: 0.05 %)."""
LOSS_REST_SECONDS = 2.0
"""For so long after a fault a coordinator may still be connected to a server that took over from
none, and whose writes are lost."""
TRAIL_KEPT = 9_000
"""An audit trail may lose its oldest entries beyond this length."""
STORY_SECONDS = 4.0
STORY_LINES = 40


@dataclass(frozen=True, slots=True)
class Rules:
    """What the run was set up with."""

    intervals: Mapping[str, float]
    """Refresh interval of each token that leases are taken on."""
    calls_most: int
    calls_window_seconds: float
    clock_tolerance_seconds: float = 0.05
    """By so much an interval or a window may be shorter once the store's clock was moved: what no
    step, nor the drift of an hour, is told from."""
    order_rest_seconds: float = 10.0
    """For so long after a fault a waiter may be passed over that was not heard because of it."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One promise that was broken."""

    rule: str
    at: float
    about: str
    """The token."""
    text: str
    ids: tuple[str, ...] = ()


@dataclass(slots=True)
class Hold:
    """One lease, or one lock of python-redis-lock, as its holder saw it."""

    id: str
    who: str
    token: str
    granted: float
    fencing: int = 0
    deadline: float = 0.0
    """The last one that the holder knew; 0 for a command, which is ended from outside."""
    ended: float = 0.0
    """When it began to release, or was told of the loss; 0 if neither was seen."""
    worked: float = 0.0
    """The last instant at which it was seen at work."""
    refreshed: float = 0.0
    """When it refreshed, if it saw every refresh and said so."""
    foreign: bool = False

    @property
    def end(self) -> float:
        """When it was over, at the earliest."""
        if self.ended:
            return min(self.ended, self.deadline) if self.deadline else self.ended
        return self.deadline or self.worked

    @property
    def may_refresh_until(self) -> float:
        """The last instant at which the token may have been refreshed under it."""
        return self.refreshed or self.end


@dataclass(slots=True)
class Wait:
    """One wish for a lease that had a position in the queue."""

    id: str
    who: str
    token: str
    asked: float
    queued: float = 0.0
    granted: float = 0.0
    given_up: float = 0.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """A fault: from when to when, and what it excuses."""

    name: str
    begin: float
    end: float
    loses: bool = False
    clock: bool = False
    disturbs: bool = True
    victims: frozenset[str] = field(default_factory=frozenset)


def judge(events: Sequence[Event], rules: Rules) -> list[Violation]:
    """Return all violations, the first one first."""
    holds, troubles = holds_of(events), troubles_of(events)
    found = [
        *exclusion(holds, troubles),
        *interval(holds, rules, troubles),
        *rising(holds),
        *order(waits_of(events), rules, troubles),
        *told_in_time(holds),
        *counted_once(events, troubles),
        *totals(events, troubles),
        *reservations(events, rules, troubles),
        *stuck(events),
        *available(events, rules),
        *audit_kept(events, troubles),
    ]
    return sorted(found, key=lambda one: one.at)


# What the events say -----------------------------------------------------------------------------


def holds_of(events: Iterable[Event]) -> list[Hold]:
    """Return all holds, in the order in which they began."""
    holds: dict[str, Hold] = {}
    for event in events:
        name = event.get("id")
        if event.what in ("granted", "locked"):
            holds[name] = Hold(
                name,
                event.who,
                event.get("token"),
                event.at,
                fencing=event.get("fencing", 0),
                deadline=event.get("deadline", 0.0),
                worked=event.at,
                foreign=event.what == "locked",
            )
        elif one := holds.get(name):
            _hear(one, event)
    return sorted(holds.values(), key=lambda one: one.granted)


def _hear(one: Hold, event: Event) -> None:
    match event.what:
        case "work" | "renewed" | "done":
            one.deadline = max(one.deadline, event.get("deadline", 0.0))
            if event.what != "renewed":
                one.worked = max(one.worked, event.at)
        case "releasing" | "lost" | "unlocking":
            one.ended = one.ended or event.at
        case "refreshed":
            one.refreshed = event.at
        case "not-released":  # so nobody was told when it refreshed
            one.refreshed = 0.0


def waits_of(events: Iterable[Event]) -> list[Wait]:
    """Return all waits that had a position, in the order in which they asked."""
    waits: dict[str, Wait] = {}
    for event in events:
        if event.what == "asked":
            waits[event.get("id")] = Wait(event.get("id"), event.who, event.get("token"), event.at)
        elif one := waits.get(event.get("id")):
            match event.what:
                case "queued":
                    one.queued = event.at
                case "granted":
                    one.granted = event.at
                case "not-granted":
                    one.given_up = event.at
    return list(waits.values())


def troubles_of(events: Sequence[Event]) -> list[Trouble]:
    """Return the faults, and the times in which the machine itself stood still."""
    last = events[-1].at if events else 0.0
    open_: list[Event] = []
    victims: set[str] = set()
    found = []
    for event in events:
        match event.what:
            case "fault":
                open_.append(event)
                victims = set()
            case "victim":
                victims.add(event.get("name"))
            case "healed":
                found.append(_trouble(open_.pop(), event.at, victims))
            case "stall":
                found.append(Trouble("stall", event.get("since"), event.at))
    return [*found, *(_trouble(one, last, victims) for one in open_)]


def _trouble(fault: Event, end: float, victims: Iterable[str]) -> Trouble:
    flags = {flag: bool(fault.get(flag, False)) for flag in ("loses", "clock", "disturbs")}
    return Trouble(fault.get("name"), fault.at, end, victims=frozenset(victims), **flags)


def _before(troubles: Iterable[Trouble], at: float, flag: str) -> bool:
    return any(one.begin < at and getattr(one, flag) for one in troubles)


def _by_token(holds: Iterable[Hold]) -> dict[str, list[Hold]]:
    found: defaultdict[str, list[Hold]] = defaultdict(list)
    for one in holds:
        found[one.token].append(one)
    return found


# Rules -------------------------------------------------------------------------------------------


def exclusion(holds: Iterable[Hold], troubles: Sequence[Trouble]) -> Iterator[Violation]:
    """No two holders: a lease is granted only after the one before it has ended.

    A lock of python-redis-lock is a key of the store and no more: what moves the store's clock, or
    loses its data, ends it.
    """
    for token, those in _by_token(holds).items():
        last: Hold | None = None
        for one in those:
            excused = (
                last is not None
                and (last.foreign or one.foreign)
                and (
                    _before(troubles, one.granted, "loses")
                    or _before(troubles, one.granted, "clock")
                )
            )
            if last and not excused and one.granted < last.end:
                yield Violation(
                    "exclusion",
                    one.granted,
                    token,
                    f"{one.who} was granted {_name(one)} {last.end - one.granted:.3f} s before "
                    f"the end of {_name(last)} of {last.who}",
                    (last.id, one.id),
                )
            if last is None or one.end > last.end:
                last = one


def _name(one: Hold) -> str:
    return "the lock" if one.foreign else f"lease {one.fencing}"


def interval(
    holds: Iterable[Hold], rules: Rules, troubles: Sequence[Trouble]
) -> Iterator[Violation]:
    """Between two moments at which a token may be refreshed lies the refresh interval.

    What a user of python-redis-lock does counts only if somebody saw it.
    """
    for token, those in _by_token(one for one in holds if not one.foreign).items():
        last: Hold | None = None
        for one in those:
            expected = rules.intervals.get(token, 0.0)
            least = expected - SLEW_SECONDS
            if _before(troubles, one.granted, "clock"):
                least -= rules.clock_tolerance_seconds
            # One that begins before the other ends is a matter of exclusion.
            if last and last.end <= one.granted < last.may_refresh_until + least:
                passed = one.granted - last.may_refresh_until
                yield Violation(
                    "interval",
                    one.granted,
                    token,
                    f"{one.who} may refresh {passed:.3f} s after {last.who} may have refreshed: "
                    f"the interval is {expected:g} s",
                    (last.id, one.id),
                )
            if last is None or one.may_refresh_until > last.may_refresh_until:
                last = one


def rising(holds: Iterable[Hold]) -> Iterator[Violation]:
    """The fencing number of a later lease is higher."""
    for token, those in _by_token(one for one in holds if not one.foreign).items():
        for before, one in itertools.pairwise(those):
            if one.fencing <= before.fencing and one.id != before.id:
                yield Violation(
                    "rising",
                    one.granted,
                    token,
                    f"fencing number {one.fencing} came after {before.fencing}",
                    (before.id, one.id),
                )


def order(waits: Iterable[Wait], rules: Rules, troubles: Sequence[Trouble]) -> Iterator[Violation]:
    """Who was in the queue before another even asked is served before it.

    Unless it may have been unheard meanwhile, since it was disturbed, or so was everybody.
    """
    by_token: defaultdict[str, list[Wait]] = defaultdict(list)
    for one in waits:
        by_token[one.token].append(one)
    for token, those in by_token.items():
        queued = [one for one in those if one.queued]
        for one in those:
            if not one.granted:
                continue
            for first in queued:
                over = first.granted or first.given_up
                if first.queued < one.asked and over > one.granted:
                    if _disturbed(first, one, rules, troubles):
                        continue
                    yield Violation(
                        "order",
                        one.granted,
                        token,
                        f"{one.who} asked after {first.who} was in the queue, and was served first",
                        (first.id, one.id),
                    )
                    break


def _disturbed(first: Wait, one: Wait, rules: Rules, troubles: Iterable[Trouble]) -> bool:
    return any(
        trouble.begin < one.granted
        and trouble.end + rules.order_rest_seconds > first.queued
        and (trouble.disturbs or first.who in trouble.victims)
        for trouble in troubles
    )


def told_in_time(holds: Iterable[Hold]) -> Iterator[Violation]:
    """Who lost a lease knows it, or has fenced itself, before another has it.

    Stricter than exclusion in one thing: it is seen at work.
    """
    for token, those in _by_token(holds).items():
        for number, one in enumerate(those):
            if one.deadline and one.worked > one.deadline:
                yield Violation(
                    "told-in-time",
                    one.worked,
                    token,
                    f"{one.who} worked {one.worked - one.deadline:.3f} s beyond its deadline",
                    (one.id,),
                )
            later = next((other for other in those[number + 1 :] if not other.foreign), None)
            if later and not one.foreign and one.worked > later.granted:
                yield Violation(
                    "told-in-time",
                    later.granted,
                    token,
                    f"{one.who} still worked {one.worked - later.granted:.3f} s after {later.who} "
                    "was granted the next lease",
                    (one.id, later.id),
                )


def counted_once(events: Iterable[Event], troubles: Sequence[Trouble]) -> Iterator[Violation]:
    """Nobody is told twice that an event counts, unless its first count may be lost."""
    tokens: dict[str, str] = {}
    counted: dict[str, float] = {}
    for event in events:
        name = event.get("id")
        if event.what == "reporting":
            tokens[name] = event.get("token")
        elif event.what == "reported" and event.get("outcome") == "COUNTED":
            since = counted.setdefault(name, event.at)
            lost = any(
                one.loses and one.end + LOSS_REST_SECONDS > since and one.begin < event.at
                for one in troubles
            )
            if since < event.at and not lost:
                text = f"event {name} was counted twice"
                yield Violation("counted-once", event.at, tokens[name], text, (name,))


def totals(events: Iterable[Event], troubles: Sequence[Trouble]) -> Iterator[Violation]:
    """At the end the budgets have what was acknowledged, and nothing that was not reported."""
    divisions: dict[str, str] = {}
    acknowledged: set[str] = set()
    for event in events:
        if event.what == "reporting":
            divisions[event.get("id")] = event.get("division")
        elif event.what == "reported":
            acknowledged.add(event.get("id"))
        elif event.what == "counts":
            reported = Counter(divisions.values())
            known = Counter(divisions[name] for name in acknowledged)
            kept = not any(one.loses or one.clock for one in troubles)
            used: Mapping[str, int] = event.get("used")
            for division in sorted(reported | Counter(used)):
                count = used.get(division, 0)
                if count > reported[division] or (kept and count < known[division]):
                    text = (
                        f"{division}: {count} events are counted; {reported[division]} were "
                        f"reported, and {known[division]} acknowledged"
                    )
                    yield Violation("totals", event.at, event.get("token"), text)


def reservations(
    events: Iterable[Event], rules: Rules, troubles: Sequence[Trouble]
) -> Iterator[Violation]:
    """Calls with a reservation never exceed the limit in any window."""
    calls: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.what == "called":
            calls[event.get("token")].append(event)
    for token, those in calls.items():
        reported = 0.0
        for first, last in zip(those, those[rules.calls_most :], strict=False):
            least = rules.calls_window_seconds - SLEW_SECONDS
            if _before(troubles, last.at, "clock"):
                least -= rules.clock_tolerance_seconds
            if last.at - first.at < least and first.at >= reported:
                reported = last.at
                inside = [one for one in those if first.at <= one.at < first.at + least]
                yield Violation(
                    "reservations",
                    last.at,
                    token,
                    f"{len(inside)} calls within {inside[-1].at - inside[0].at:.2f} s: the limit "
                    f"is {rules.calls_most} in {rules.calls_window_seconds:g} s",
                    tuple(one.get("id") for one in inside),
                )


def stuck(events: Iterable[Event]) -> Iterator[Violation]:
    """Every process ends in time after the run."""
    for event in events:
        if event.what == "stuck":
            yield Violation(
                "stuck", event.at, "", f"still runs after the end: {event.get('command')}"
            )


def available(events: Sequence[Event], rules: Rules) -> Iterator[Violation]:
    """When all faults are over, every token is granted again in time."""
    settled = next((event for event in events if event.what == "settle"), None)
    closed = next((event for event in events if event.what == "closed"), None)
    if settled and closed:
        granted = {
            event.get("token")
            for event in events
            if event.what == "granted" and event.at > settled.at
        }
        for token in sorted(rules.intervals.keys() - granted):
            yield Violation(
                "available",
                closed.at,
                token,
                f"no lease for {closed.at - settled.at:.0f} s after the last fault was over",
            )


def audit_kept(events: Iterable[Event], troubles: Sequence[Trouble]) -> Iterator[Violation]:
    """The audit trail does not become shorter than what is kept of it."""
    longest: dict[str, Event] = {}
    for event in events:
        if event.what == "trail":
            app, length = event.get("app"), event.get("length")
            before = longest.get(app)
            if before and length < min(before.get("length"), TRAIL_KEPT):
                lost = any(
                    one.loses and one.begin < event.at and one.end + LOSS_REST_SECONDS > before.at
                    for one in troubles
                )
                if not lost:
                    yield Violation(
                        "audit",
                        event.at,
                        f"apps/{app}",
                        f"the audit trail has {length} entries, and had {before.get('length')}",
                    )
            longest[app] = event


# What it says to people --------------------------------------------------------------------------


def unavailability(events: Sequence[Event], rules: Rules) -> dict[str, list[float]]:
    """Return, by kind of fault, how long after its begin each token was granted again."""
    grants: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.what == "granted":
            grants[event.get("token")].append(event.at)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for trouble in troubles_of(events):
        for token in rules.intervals:
            after = [at for at in grants[token] if at > trouble.begin]
            if after:
                found[trouble.name].append(after[0] - trouble.begin)
    return dict(found)


def ordinary_gap(events: Sequence[Event], rules: Rules) -> float:
    """Return the median time between two grants of a token, for comparison."""
    gaps: list[float] = []
    last: dict[str, float] = {}
    for event in events:
        token = event.get("token")
        if event.what == "granted" and token in rules.intervals:
            if token in last:
                gaps.append(event.at - last[token])
            last[token] = event.at
    return statistics.median(gaps) if gaps else 0.0


def story(events: Sequence[Event], violation: Violation, zero: float) -> list[str]:
    """Tell, in few lines, what led to a violation: faults, and what its holders did."""
    mine = [event for event in events if event.get("id") in violation.ids]
    begin = min((event.at for event in mine), default=violation.at) - STORY_SECONDS
    end = violation.at + 1
    told: list[Event] = []
    for event in events:
        is_fault = event.what in ("fault", "healed", "note", "victim", "stall")
        if begin <= event.at <= end and (is_fault or event in mine):
            if told and told[-1].what == event.what == "work" and told[-1].who == event.who:
                told.pop()  # of many in a row the last one is enough
            told.append(event)
    return [_line(event, zero) for event in told[-STORY_LINES:]]


def _line(event: Event, zero: float) -> str:
    facts = {key: value for key, value in event.facts.items() if key not in _DULL}
    for key in ("deadline", "since"):
        if facts.get(key):
            facts[key] = f"{facts[key] - zero:.3f}"
    text = " ".join(f"{key}={value}" for key, value in facts.items())
    return f"{event.at - zero:9.3f}  {event.who:<14} {event.what} {text}".rstrip()


_DULL = ("id", "token", "lease", "loses", "clock", "disturbs", "reports")
