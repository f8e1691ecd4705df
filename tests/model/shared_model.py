"""The rules of shared leases once more, in plain Python: of one token in custody.

As in `model.py`, everything happens at its own instant. Times are µs; somebody looks at least every
`OUTAGE`, and at the instant of each operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.model.model import LAPSES_ALLOWED, LIVE, OFFER, PLACE_KEPT, Answer


@dataclass(slots=True)
class Run:
    """A shared lease, from its offer on."""

    number: int
    request: str
    ttl: int
    expires: int
    state: str = "OFFERED"
    is_broken: bool = False
    is_released: bool = False

    @property
    def is_live(self) -> bool:
        """Whether it counts as one of those that the policy allows."""
        return self.state in {"OFFERED", "ACTIVE"}


@dataclass(slots=True)
class Waiter:
    """A request."""

    heard: int
    last_heard: int
    """The same, also if an offer to it was taken back since."""
    lapses: int = 0
    run: Run | None = None


@dataclass(slots=True)
class SharedModel:
    """A token in custody, with its queue and its runs."""

    most: int
    now: int
    fencing: int = 0
    queue: list[str] = field(default_factory=list)
    requests: dict[str, Waiter] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def live(self) -> dict[int, int]:
        """Say when each live lease ends."""
        return {one.number: one.expires for one in self.runs.values() if one.is_live}

    def look(self, now: int) -> None:
        """Go on to an instant: end what has run out, and forget who was not heard for long."""
        self.now = now
        over = [one for one in self.runs.values() if one.is_live and one.expires <= now]
        for run in sorted(over, key=lambda one: (one.expires, one.number)):
            if run.state == "OFFERED":
                self._take_back(run, lapsed=True)
            else:
                run.state = "BROKEN" if run.is_broken else "EXPIRED"
        for name in list(self.queue):
            waiter = self.requests[name]
            if waiter.run is None and now - waiter.last_heard > PLACE_KEPT:
                self.queue.remove(name)
                del self.requests[name]

    def hear(self, name: str) -> None:
        """Hear a waiter."""
        waiter = self.requests.get(name)
        if waiter and waiter.run is None:
            waiter.heard = waiter.last_heard = self.now

    def _take_back(self, run: Run, *, lapsed: bool = False) -> None:
        run.state = "WITHDRAWN"
        if run.request not in self.queue:
            del self.requests[run.request]
            return
        waiter = self.requests[run.request]
        waiter.run, waiter.heard = None, 0
        waiter.lapses += lapsed
        if lapsed and waiter.lapses % LAPSES_ALLOWED == 0:
            self.queue.remove(run.request)
            self.queue.append(run.request)

    def _waits(self, name: str) -> str:
        """Say what a request waits for."""
        if len(self.live) >= self.most:
            return "FULL"
        ahead = self.queue[: self.queue.index(name)] if name in self.queue else self.queue
        before = (self.requests[other] for other in ahead)
        is_first = all(one.run or self.now - one.heard > LIVE for one in before)
        return "" if is_first else "QUEUED"

    def acquire(self, name: str, ttl: int, *, queue: bool) -> Answer:
        """Answer a request."""
        waiter = self.requests.get(name)
        if waiter and waiter.run:
            is_over = not waiter.run.is_live
            return "LEASE_ENDED" if is_over else "OFFER", waiter.run.number
        if waiter is None and queue:
            self.requests[name] = Waiter(self.now, self.now)
            self.queue.append(name)
        self.hear(name)
        if why := self._waits(name):
            return "WAITING", why
        self.fencing = max(self.fencing + 1, self.now)
        run = Run(self.fencing, name, ttl, self.now + OFFER)
        self.runs[run.number] = run
        self.requests.setdefault(name, Waiter(self.now, self.now)).run = run
        return "OFFER", run.number

    def withdraw(self, name: str) -> None:
        """Give up a place, and an offer with it."""
        waiter = self.requests.get(name)
        if waiter is None or (waiter.run and waiter.run.state != "OFFERED"):
            return
        if name in self.queue:
            self.queue.remove(name)
        if waiter.run:
            self._take_back(waiter.run)
        self.requests.pop(name, None)

    def renew(self, number: int) -> Answer:
        """Accept an offer, or prolong a lease."""
        run = self.runs[number]
        if not run.is_live:
            return "LEASE_OVER", run.state
        if run.is_broken:
            return ("LEASE_BROKEN",)
        if run.state == "OFFERED":
            run.state = "ACTIVE"
            if run.request in self.queue:
                self.queue.remove(run.request)
        run.expires = self.now + run.ttl
        return "OK", run.state

    def release(self, number: int) -> Answer:
        """End a lease, or turn down an offer; again gives the same answer."""
        run = self.runs[number]
        if not run.is_live:
            return ("OK", run.state) if run.is_released else ("LEASE_OVER", run.state)
        run.is_released = True
        if run.state == "OFFERED":
            if run.request in self.queue:
                self.queue.remove(run.request)
            self._take_back(run)
        else:
            run.state = "BROKEN" if run.is_broken else "RELEASED"
        return "OK", run.state

    def break_(self, number: int) -> Answer:
        """Forbid the renewal of a lease; an offer is taken back."""
        run = self.runs[number]
        if not run.is_live:
            return "LEASE_OVER", run.state
        if run.state == "OFFERED":
            self._take_back(run)
        else:
            run.is_broken = True
        return "OK", run.state
