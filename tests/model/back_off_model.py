"""Back-offs as plain Python has them, on top of the models of leases and of budgets.

Written from the promises and not from the scripts. Who goes first is one order for the whole app:
a caller that waits for several back-offs has the same place in each of them, so that no two can
wait for each other; and one that another back-off holds stands in nobody's way.

All times are µs. A back-off is settled by whoever looks: that a probe went on for a minute, or
that its lease ran out, counts from the look.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.model import budget_model, model
from tests.model.budget_model import DAY, Event, Limit, Reservation
from tests.model.model import LIVE, PLACE_KEPT, SECOND, Answer, Lease, Token

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

MINUTE = 60 * SECOND
STEP_LEAST, STEP_MOST, SPREAD = 60_000, 200_000, 5 * SECOND
WEEK = 7 * DAY

Place = tuple[str, str]
"""Division and endpoint of a call; '' where it is not known."""
ANYWHERE: Place = ("", "")
Scope = frozenset[tuple[str, str]]
"""Pairs of field and value."""


def scope(token: str = "", division: str = "", endpoint: str = "") -> Scope:
    """Name a scope; '' leaves a field out."""
    values = {"token": token, "division": division, "endpoint": endpoint}
    return frozenset((name, value) for name, value in values.items() if value)


@dataclass(frozen=True, slots=True)
class BlockRule:
    """How long blocks last, by the policy."""

    first: int
    factor: int
    most: int
    forget: int


@dataclass(frozen=True, slots=True)
class Wait:
    """What a caller waits for."""

    start: int
    timed: bool
    """It may go then without being told."""
    back_off: str
    holders: tuple[str, ...] = ()
    """The back-offs that hold it, whoever comes before it."""


@dataclass(slots=True, eq=False)
class BackOff:
    """A scope that is quiet, or reopens."""

    id: str
    scope: Scope
    cause: str
    since: int
    until: int
    kind: str = ""
    repeats: int = 0
    state: str = "QUIET"
    probe: str = ""
    probe_since: int = 0
    erred: int = -1
    went_first: str = ""
    in_vain: str = ""
    """The token whose probe of a shared scope erred last."""
    dropped: int = 0
    """When the last probe was given up."""
    order: dict[str, int] = field(default_factory=dict)
    """Numbers of those who keep it; the lowest came first."""
    asked: dict[str, int] = field(default_factory=dict)
    """When they asked last while nothing else held them."""
    heard: dict[str, int] = field(default_factory=dict)
    reopened: int = 0
    step: int = 0

    @property
    def probes(self) -> bool:
        """Of calls and token requests it is known when there is room."""
        return self.kind in ("", "ERROR")

    def callers(self) -> list[str]:
        """List who keeps it, in order."""
        return sorted(self.order, key=lambda caller: self.order[caller])

    def start_of(self, caller: str) -> int:
        """Return when a caller may follow; who has no place comes after all others."""
        callers = self.callers()
        rank = callers.index(caller) if caller in self.order else len(callers)
        return self.reopened + (rank + 1) * self.step


class Budgets(budget_model.Model):
    """Budgets that say when something was counted."""

    def __init__(self, counted: Callable[[Limit, int], None]) -> None:
        super().__init__()
        self._counted = counted

    def may_count(self, now: int) -> bool:
        """Tell that there is room for another id: bounds are the budget machine's."""
        del now
        return True

    def _log(self, now: int, limit: Limit, event: Event) -> None:
        super()._log(now, limit, event)
        if event.at >= now - limit.window:
            self._counted(limit, now)

    def full_until(self, limit: Limit, now: int) -> int:
        """Return when there is room for one, whatever is reserved; `now` if there is."""
        events = sorted(
            (event.at, event.count)
            for event in self.events[limit]
            if event.at >= now - limit.window and not event.forgotten
        )
        left = sum(count for _, count in events)
        until = now
        for at, count in events:
            if left < limit.most - limit.margin:
                break
            left, until = left - count, at + limit.window + 1
        return until


class Model(model.Model):
    """One app: its tokens and leases, its budgets, and its back-offs."""

    def __init__(self, now: int, scopes: dict[Limit, Scope]) -> None:
        super().__init__(now)
        self.budgets = Budgets(self._counted)
        self.scopes = scopes
        self.back_offs: dict[str, BackOff] = {}
        """Also those that are over: they are remembered."""
        self.asks: dict[str, tuple[frozenset[Place], str]] = {}
        """What requests declared, and the names of their jobs."""
        self.touched: dict[str, dict[Place, int]] = defaultdict(dict)
        self.places: dict[str, tuple[str, Place]] = {}
        """Token and place of reservations."""
        self._numbers = itertools.count()
        self._in_tick = False
        self._walks: dict[str, dict[str, tuple[list[str], Wait | None]]] = {}
        """During a tick, of the queues of tokens."""

    # Time --------------------------------------------------------------------

    def look(self, now: int) -> bool:
        """Go on to the instant of a script; tell whether a place was lost."""
        lost = super().look(now)
        self.settle_all()
        self.budgets.settle(now)
        self.settle_all()
        return lost

    def settle_all(self) -> None:
        """Bring all back-offs up to this instant."""
        for one in self.live():
            self._settle(one)

    def live(self) -> list[BackOff]:
        """List the back-offs that are not over."""
        return [one for _, one in sorted(self.back_offs.items()) if one.state != "OVER"]

    def instants(self, now: int) -> list[int]:
        """List the instants from now on at which something changes."""
        found = set(super().instants(now)) | set(self.budgets.instants(now))
        for one in self.live():
            found |= {one.until, one.until + DAY}
            if one.probe:
                found |= {
                    one.probe_since + MINUTE,
                    one.probe_since + 3 * MINUTE,
                    one.erred + MINUTE,
                }
            found.add(one.dropped + LIVE)
            if one.state == "REOPENING":
                found |= {one.reopened + n * one.step for n in range(1, len(one.order) + 2)}
        return sorted(instant for instant in found if instant >= now)

    def _settle(self, one: BackOff) -> None:
        if self.now < one.until:
            return
        if not one.probes:
            self._end_back_off(one)
            return
        if one.state == "QUIET":
            one.state = "PROBING"
        if one.state == "PROBING":
            if one.probe and not self.alive(one.probe):
                self._drop_probe(one)
            if one.probe:
                self._settle_probe(one)
            elif self.now - one.until > DAY:
                self._end_back_off(one)
        if one.state == "REOPENING" and self.now >= one.start_of(""):
            self._end_back_off(one)

    def _settle_probe(self, one: BackOff) -> None:
        if self.now - max(one.probe_since, one.erred) >= MINUTE:
            self._reopen(one)
        elif self.now - one.probe_since >= 3 * MINUTE:
            self._drop_probe(one)

    def alive(self, caller: str) -> bool:
        """Tell whether a caller that went on may still run."""
        kind, _, reservation = caller.partition(":")
        if kind == "reservation":
            found = self.budgets.reservations[reservation]
            return found.state == "reserved" and found.expires > self.now
        request = self.requests.get(caller)
        lease = request.lease if request else None
        return bool(lease and lease.state in model._LIVE and lease.expires > self.now)

    # States ------------------------------------------------------------------

    def _be_quiet(self, new: BackOff) -> None:
        old = self.back_offs.get(new.id)
        if old and old.state != "OVER":
            if (old.state, old.until) == ("QUIET", new.until):
                return
            if old.probe:
                self._forget_turn(old.probe)
            new.order, new.asked, new.heard = old.order, old.asked, old.heard
        self.back_offs[new.id] = new

    def _forget_turn(self, caller: str) -> None:
        """A caller that is gone, or went first in vain, comes after the others next time."""
        for one in self.live():
            if one.state != "REOPENING":
                one.order.pop(caller, None)

    def _drop_probe(self, one: BackOff) -> None:
        self._forget_turn(one.probe)
        is_shared = "token" not in dict(one.scope)
        erred = one.erred >= one.probe_since
        one.in_vain = self._token_of(one.probe) if is_shared and erred else ""
        one.dropped = self.now
        one.probe = ""

    def _end_back_off(self, one: BackOff) -> None:
        one.state, one.probe, one.went_first = "OVER", "", ""
        one.order.clear()
        one.asked.clear()
        one.heard.clear()

    def _reopen(self, one: BackOff) -> None:
        one.order.pop(one.probe, None)
        for caller in list(one.order):
            if self.now - one.heard[caller] > PLACE_KEPT:
                del one.order[caller]
        one.went_first, one.probe = one.probe, ""
        if not one.order:
            self._end_back_off(one)
            return
        one.state, one.reopened = "REOPENING", self.now
        one.step = max(STEP_LEAST, min(STEP_MOST, SPREAD // len(one.order)))

    def _caller_ended(self, caller: str, *, well: bool) -> None:
        for one in self.live():
            if one.probe == caller:
                if well and one.erred < one.probe_since:
                    self._reopen(one)
                else:
                    self._drop_probe(one)
        self._forget_turn(caller)

    def _probes_err(self, token: str, place: Place, at: int) -> None:
        for one in self.subject_to(token, [place]):
            if one.probe and at >= one.probe_since and self._token_of(one.probe) == token:
                one.erred = max(one.erred, at)

    def _token_of(self, caller: str) -> str:
        kind, _, reservation = caller.partition(":")
        if kind == "reservation":
            return self.places[reservation][0]
        return self.requests[caller].token

    def _end(self, token: Token, state: str, refreshed: int | None) -> None:
        assert token.lease
        self.settle_all()  # what is due at this instant too comes first
        self._caller_ended(token.lease.request, well=state == "RELEASED")
        super()._end(token, state, refreshed)

    def _take_back(self, token: Token, *, lapsed: bool = False) -> None:
        assert token.lease
        self.settle_all()
        self._caller_ended(token.lease.request, well=False)
        super()._take_back(token, lapsed=lapsed)

    # Callers -----------------------------------------------------------------

    def places_of(self, token: str, request: str) -> set[Place]:
        """Return where the calls of a request go, as far as anybody knows."""
        declared, job = self.asks.get(request, (frozenset(), ""))
        found = {ANYWHERE, *declared}
        who = f"{token}:{job}" if job else ""
        for known in declared or {ANYWHERE}:
            if "" in known:
                found |= {
                    place
                    for place in self.recently(who)
                    if all(mine in ("", its) for mine, its in zip(known, place, strict=True))
                }
        return found

    def recently(self, who: str) -> set[Place]:
        """Return where a job or a lease erred in the last week."""
        touched = self.touched[who] if who else {}
        return {place for place, at in touched.items() if self.now - at <= WEEK}

    def subject_to(self, token: str, places: Iterable[Place]) -> list[BackOff]:
        """List the back-offs whose pairs calls at these places contain."""
        pairs = [scope(token, *place) for place in places]
        return [one for one in self.live() if any(one.scope <= call for call in pairs)]

    def subject_of(self, request: str) -> list[BackOff]:
        """List what a waiter is subject to."""
        token = self.requests[request].token
        return self.subject_to(token, self.places_of(token, request))

    def _hold(self, one: BackOff, caller: str) -> Wait | None:
        """Say how long a back-off holds a caller, whoever comes before it."""
        if one.state == "QUIET":
            return Wait(one.until, timed=True, back_off=one.id)
        if one.state == "PROBING" and one.probe not in ("", caller):
            return Wait(self.now, timed=False, back_off=one.id)
        if one.state == "REOPENING" and caller != one.went_first:
            start = one.start_of(caller)
            if self.now < start:
                return Wait(start, timed=True, back_off=one.id)
        return None

    def _take_place(self, caller: str, subject: list[BackOff]) -> None:
        ordered = [one for one in subject if one.probes and one.state != "REOPENING"]
        numbers = [one.order[caller] for one in ordered if caller in one.order]
        new = min(numbers) if numbers else next(self._numbers)
        for one in subject:
            if one.probes and caller not in (one.probe, one.went_first):
                if caller not in one.order:
                    one.order[caller] = new if one in ordered else next(self._numbers)
                one.heard[caller] = self.now

    def wait_of(self, caller: str, subject: list[BackOff], *, asks: bool) -> Wait | None:
        """Say what a caller waits for; who asks has a place among those who follow."""
        if asks:
            self._take_place(caller, subject)
        waits = {one.id: wait for one in subject if (wait := self._hold(one, caller))}
        holders = tuple(waits)
        for one in subject:
            if asks and caller in one.order:
                one.asked.pop(caller, None)
                if not set(holders) - {one.id}:
                    one.asked[caller] = self.now
            if one.state == "PROBING" and not one.probe and not self._is_next(one, caller):
                waits[one.id] = Wait(self.now, timed=False, back_off=one.id)
        if not waits:
            return None
        latest = max(wait.start for wait in waits.values())
        first = next(id_ for id_ in sorted(waits) if waits[id_].start == latest)
        return Wait(latest, waits[first].timed, first, holders)

    def _is_next(self, one: BackOff, caller: str) -> bool:
        for other in one.callers():
            if other == caller:
                return True
            if self.now - one.asked.get(other, self.now - LIVE - 1) <= LIVE:
                return False
        return True

    def _go(self, caller: str, subject: list[BackOff]) -> None:
        for one in subject:
            if one.state == "PROBING" and not one.probe:
                one.probe, one.probe_since = caller, self.now

    # Waiters -----------------------------------------------------------------

    def standing(self, name: str, request: str) -> Answer:
        """Say what a request waits for; '' is somebody who only looks.

        That is the reason, place, queue length, whether it may go at the start without being
        told, the back-off in its way, and for back-offs the earliest start.
        """
        token = self.tokens[name]
        reason = ""
        if token.lease:
            reason = "HELD"
        elif self.now < token.not_before:
            reason = "COOLING"
        walk = self._walks.get(name) or self._walk(token, asks=bool(request) and not reason)
        if self._in_tick:
            self._walks[name] = walk
        place = token.queue.index(request) + 1 if request in token.queue else 0
        ahead, wait = walk[request if place else ""]
        if not place:
            places = self.places_of(name, request)
            wait = self.wait_of(request, self.subject_to(name, places), asks=False)
        first = not any(map(self._is_live, ahead))
        returning = not all(map(self._is_live, ahead)) and self.now < self.recovery_until
        start = max(self.now, token.not_before)
        if not reason and (not first or returning):
            reason = "QUEUED"
            start = max(start, self.recovery_until) if returning else start
        start += len(ahead) * token.rules.interval if place else 0
        ends_last = wait is not None and reason == "COOLING" and wait.start > start
        if not wait or (reason not in ("", "QUEUED") and not ends_last):
            # Also who waits for something else is told of a back-off.
            back_off = wait.back_off if wait else ""
            return reason, place, len(token.queue), int(first), back_off, 0
        start = max(start, wait.start)
        return "BACKING_OFF", place, len(token.queue), int(wait.timed), wait.back_off, start

    def _walk(self, token: Token, *, asks: bool) -> dict[str, tuple[list[str], Wait | None]]:
        """Say of all who wait who comes before them, and for what they must be quiet.

        '' is somebody who comes after all. Only the first who must be quiet for a back-off asks.
        """
        eligible: list[str] = []
        asked: set[str] = set()
        found = {}
        for one in token.queue:
            live = self._is_live(one)
            subject = self.subject_of(one)
            names = {back_off.id for back_off in subject}
            is_first = live and not any(map(self._is_live, eligible)) and not asked & names
            wait = self.wait_of(one, subject, asks=asks and is_first)
            holders = set(wait.holders) if wait else set()
            if live:
                asked |= {name for name in names if not holders - {name}}
            found[one] = list(eligible), wait
            if not wait:
                eligible.append(one)
        return {**found, "": (eligible, None)}

    def tick(self, heard: list[tuple[str, str, int]]) -> list[Answer]:
        """Hear many waiters; each queue is walked once."""
        self._in_tick = True
        answers = super().tick(heard)
        self._in_tick = False
        self._walks.clear()
        return answers

    def _is_live(self, request: str) -> bool:
        return self.now - self.requests[request].heard <= LIVE

    def acquire(self, name: str, request_name: str, fingerprint: str, **more: object) -> Answer:
        """Answer a request; who is offered a lease may be the one that goes first."""
        before = self.requests.get(request_name)
        had = before.lease if before else None
        answer = super().acquire(name, request_name, fingerprint, **more)  # type: ignore[arg-type]
        if answer[0] == "OFFER" and not had:
            self._go(request_name, self.subject_of(request_name))
        return answer

    def withdraw(self, name: str, request_name: str, fingerprint: str) -> Answer:
        """Give up a place, also among those who keep a back-off."""
        request = self.requests.get(request_name)
        waits = request and request.fingerprint == fingerprint and request.state in model._NOT_HELD
        answer = super().withdraw(name, request_name, fingerprint)
        if waits:
            self._caller_ended(request_name, well=False)
        return answer

    # Holders -----------------------------------------------------------------

    def follow(self, name: str, number: int, secret: str) -> tuple[Answer, tuple[str, ...]]:
        """Say what a holder must do, and for which back-offs."""
        lease = self.tokens[name].leases[number]
        if lease.secret != secret:
            return ("WRONG_SECRET",), ()
        if lease.state not in model._LIVE:
            return ("LEASE_OVER", lease.state), ()
        if lease.broken:
            return ("LEASE_BROKEN",), ()
        subject = self.subject_of_lease(name, lease)
        names = tuple(one.id for one in subject)
        if lease.state == "OFFERED":
            return ("OK", 0, 0), names
        wait = self.wait_of(lease.request, subject, asks=True)
        if wait:
            for one in subject:
                if one.probe == lease.request:
                    self._drop_probe(one)
            return ("OK", wait.start, int(wait.timed)), names
        self._go(lease.request, subject)
        return ("OK", 0, 0), names

    def subject_of_lease(self, name: str, lease: Lease) -> list[BackOff]:
        """List what a holder is subject to; it has asked for its access token already."""
        places = self.places_of(name, lease.request) | self.recently(f"{name}:{lease.number}")
        return [one for one in self.subject_to(name, places) if one.kind != "TOKEN_REQUEST"]

    # Events ------------------------------------------------------------------

    def _counted(self, limit: Limit, now: int) -> None:
        """A scope is spent until enough has left its window for one more."""
        until = self.budgets.full_until(limit, now)
        if until == now:
            return
        old = self.back_offs.get(limit.id)
        since = old.since if old and old.state == "QUIET" else now
        self._be_quiet(BackOff(limit.id, self.scopes[limit], "SPENT", since, until, limit.kind))

    def record(  # noqa: PLR0913, PLR0917 - as much is told of an event
        self,
        event: str,
        at: int,
        count: int,
        limits: tuple[Limit, ...],
        token: str = "",
        place: Place = ANYWHERE,
        touched: Collection[str] = (),
        *,
        error: bool,
    ) -> str:
        """Count an event once; an error counts against those who probe its place."""
        word = self.budgets.record(self.now, event, at, count, limits)
        if word == "COUNTED" and error:
            self._probes_err(token, place, at)
            for who in touched:
                self.touched[who][place] = self.now
        return word

    def block(  # noqa: PLR0913, PLR0917 - as much is told of a block
        self,
        name: str,
        where: Scope,
        at: int,
        sent: int,
        retry_after: int | None,
        rule: BlockRule,
    ) -> None:
        """Take in that the provider blocks."""
        old = self.back_offs.get(name)
        named = None if retry_after is None else at + min(retry_after, rule.most)
        if old and min(at, sent) < old.until:
            # One episode: it lasts at most until the instant that is named.
            if named is None or named <= old.until:
                return
            since, until, repeats = old.since, named, old.repeats
        else:
            again = old is not None and at - old.until <= rule.forget
            since, repeats = at, old.repeats + 1 if old and again else 1
            length = min(rule.most, rule.first * rule.factor ** (repeats - 1))
            until = at + length if named is None else named
        new = BackOff(name, where, "BLOCKED", since, until, repeats=repeats)
        if until > self.now:
            self._be_quiet(new)
        elif old:
            old.since, old.until, old.repeats = since, until, repeats
        else:
            new.state = "OVER"
            self.back_offs[name] = new

    def reserve(
        self, name: str, reservation: Reservation, token: str, place: Place
    ) -> tuple[str, Wait | None]:
        """Take room before a call, if nobody must be quiet there; a spent budget decides itself."""
        subject = [one for one in self.subject_to(token, [place]) if one.cause != "SPENT"]
        caller = f"reservation:{name}"
        if wait := self.wait_of(caller, subject, asks=False):
            return "BACKING_OFF", wait
        for one in sorted(subject, key=lambda one: one.id):
            start = one.dropped + LIVE
            if (one.state, one.in_vain) == ("PROBING", token) and self.now < start:
                wait = Wait(start, timed=False, back_off=one.id)
        if wait:
            return "BACKING_OFF", wait
        for limit in reservation.limits:
            taken = self.budgets.used(limit, self.now) + self.budgets.reserved(limit)
            if taken + reservation.count > limit.most - limit.margin:
                return "BUDGET_SPENT", None
        self.budgets.reserve(name, reservation)
        self.places[name] = token, place
        self._go(caller, subject)
        return "OK", None

    def commit(self, name: str, age: int, status: int) -> str:
        """Say that a call was made."""
        reservation = self.budgets.reservations[name]
        before = reservation.state
        state = self.budgets.commit(self.now, name, reservation.caller, age, status)
        errors = [limit for limit in reservation.limits if limit.kind == "ERROR"]
        if before in ("reserved", "cancelled") and any(limit.counts(status) for limit in errors):
            self._probes_err(*self.places[name], self.now)
        self._caller_ended(f"reservation:{name}", well=state == "committed")
        return state

    def cancel(self, name: str) -> str:
        """Say that a call was not made."""
        state = self.budgets.cancel(name, self.budgets.reservations[name].caller)
        self._caller_ended(f"reservation:{name}", well=False)
        return state

    # Operators ---------------------------------------------------------------

    def set(self, name: str, where: Scope, length: int) -> None:
        """Make a scope quiet."""
        self._be_quiet(BackOff(name, where, "OPERATOR", self.now, self.now + length))

    def clear(self, name: str) -> str:
        """End a back-off; those who kept it follow."""
        one = self.back_offs.get(name)
        if not one or one.state == "OVER":
            return "BACK_OFF_NOT_FOUND"
        one.until = min(one.until, self.now)
        if one.state != "REOPENING":
            self._reopen(one)
        return "OK"

    def reset(self, limit: Limit) -> None:
        """Make a budget forget what it counted."""
        self.budgets.reset(limit)
        self.clear(limit.id)
