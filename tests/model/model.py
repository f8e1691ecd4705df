"""The rules of leases once more, in plain Python: what the scripts are compared with.

Written from the promises and not from the scripts, and in one way simpler: here everything
happens at its own instant. A lease ends when it runs out, whoever looks and whenever; the
scripts find that out at the next look, and must then say the same. Only the lock of a user of
python-redis-lock is known from looks alone, since its taking and its end are not ours.

All times are µs. Answers are a status and what matters of what goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SECOND = 1_000_000
LIVE = 5 * SECOND
"""Promise 1: an offer goes to a waiter heard from within this time."""
PLACE_KEPT = 60 * SECOND
"""Promise 4: a silent waiter keeps its place this long, outages not counted."""
OUTAGE = 2 * SECOND
"""Nobody looked for longer: the coordinators were away, and waiters could not be heard."""
RECOVERY = 5 * SECOND
"""After an outage the silent ones may come back before anybody passes them."""
OFFER = 3 * SECOND
"""An offer stands this long."""
LAPSES_ALLOWED = 3
"""At every third offer that it lets lapse, a waiter goes to the end."""
FURTHEST_FENCING = 366 * 24 * 3600 * SECOND
"""A fencing number further ahead of the clock is a mistake."""
COOLDOWN_LOCK = "holdoff-cooldown"

Answer = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """A token's rules."""

    interval: int
    refresh_at: str
    access_token_life: int


@dataclass(slots=True)
class Lease:
    """An offer, and what became of it."""

    number: int
    request: str
    secret: str
    ttl: int
    rules: Rules
    expires: int
    state: str = "OFFERED"
    accepted: int = 0
    started: int | None = None
    broken: str = ""
    released: bool = False


@dataclass(slots=True)
class Request:
    """A request that waits, was offered a lease, holds it, or has ended."""

    token: str
    fingerprint: str
    state: str = "waiting"
    heard: int = 0
    heard_service: int = 0
    """In service time, which begins with the app's first token: nobody was heard before."""
    lapses: int = 0
    lease: Lease | None = None


@dataclass(slots=True)
class Token:
    """What belongs to a token."""

    rules: Rules
    updated: int
    fencing: int = 0
    last_refresh: int | None = None
    not_before: int = 0
    lease: Lease | None = None
    leases: dict[int, Lease] = field(default_factory=dict)
    queue: list[str] = field(default_factory=list)
    foreign: str = ""
    """Owner of the foreign lock that the last look found."""


class Model:
    """One app. Every operation but `look` happens at the instant of the last look."""

    def __init__(self, now: int) -> None:
        self.tokens: dict[str, Token] = {}
        self.requests: dict[str, Request] = {}
        self.locks: dict[str, str] = {}
        """Foreign locks as they are, by token, seen or not."""
        self.lapsed: set[str] = set()
        """Tokens of which an offer has lapsed since they were last looked at."""
        self.begun = False
        """A store that has no token of the app, or lost them all, knows no time either."""
        self.now = now
        self.service = self.recovery_until = 0
        self.quarantine_until = self.hold = self.hold_before = self.hold_until = 0

    # Time --------------------------------------------------------------------

    def look(self, now: int) -> bool:
        """Go on to the instant of a script; tell whether a place was lost."""
        if not self.begun:
            self.now = now
            return False
        gap, self.now = now - self.now, now
        if gap > OUTAGE:
            self.recovery_until = now + RECOVERY
        else:
            self.service += gap
        for name in self.tokens:
            self._run_out(name)
        lost = [name for name, request in self.requests.items() if self._lost_its_place(request)]
        for name in lost:
            self._leave(name)
            del self.requests[name]
        return bool(lost)

    def _lost_its_place(self, request: Request) -> bool:
        return request.state == "waiting" and self.service - request.heard_service > PLACE_KEPT

    def _run_out(self, name: str) -> None:
        token = self.tokens[name]
        lease = token.lease
        if lease is None or self.now < lease.expires:
            return
        if lease.state == "OFFERED":
            self._take_back(token, lapsed=True)
            self.lapsed.add(name)
        else:
            # Its holder may have refreshed up to this very instant.
            self._end(token, "BROKEN" if lease.broken else "EXPIRED", lease.expires)

    def blocked_until(self, name: str) -> int:
        """Return until when a user of python-redis-lock finds the lock taken."""
        token = self.tokens[name]
        lease = token.lease
        if lease is None:
            return token.not_before
        if lease.state == "OFFERED":
            return lease.expires
        return lease.expires + max(lease.rules.interval, token.rules.interval)

    def instants(self, now: int) -> list[int]:
        """List the instants from now on at which something changes."""
        found = {self.now + OUTAGE, self.recovery_until, self.quarantine_until}
        for token in self.tokens.values():
            found.add(token.not_before)
            if token.lease:
                found.add(token.lease.expires)
                found.add(token.lease.expires + token.lease.rules.interval)
                if token.lease.started is not None:
                    found.add(token.lease.started + token.lease.rules.access_token_life)
        for request in self.requests.values():
            if request.state == "waiting":
                found.add(request.heard + LIVE)
                found.add(self.now + request.heard_service + PLACE_KEPT - self.service)
        return sorted(instant for instant in found if instant >= now)

    # What ends a lease or an offer -------------------------------------------

    def _cool(self, token: Token, refreshed: int, interval: int) -> None:
        token.last_refresh = max(token.last_refresh or 0, refreshed)
        token.not_before = max(token.not_before, refreshed + interval)
        self._note_hold(interval)

    def _note_hold(self, span: int) -> None:
        """Somebody may refresh for so long; the longest counts, until it cannot matter any more."""
        if self.now >= self.hold_until:
            self.hold_until = self.now + max(span, self.hold)
            self.hold_before, self.hold = self.hold, span
        elif span > self.hold:
            self.hold, self.hold_until = span, max(self.hold_until, self.now + span)

    def _end(self, token: Token, state: str, refreshed: int | None) -> None:
        lease = token.lease
        assert lease
        lease.state, token.lease = state, None
        if refreshed is not None:
            self._cool(token, refreshed, max(lease.rules.interval, token.rules.interval))
        self.requests[lease.request].state = "ended"

    def _take_back(self, token: Token, *, lapsed: bool = False) -> None:
        """End an offer: no cooldown, and a waiter in the queue is silent until heard again."""
        lease = token.lease
        assert lease
        lease.state, token.lease = "WITHDRAWN", None
        request = self.requests[lease.request]
        if lease.request not in token.queue:
            del self.requests[lease.request]
            return
        request.state, request.heard, request.lease = "waiting", 0, None
        request.lapses += lapsed
        if lapsed and request.lapses % LAPSES_ALLOWED == 0:
            token.queue.remove(lease.request)
            token.queue.append(lease.request)

    def _leave(self, name: str) -> None:
        queue = self.tokens[self.requests[name].token].queue
        if name in queue:
            queue.remove(name)

    def _seen(self, name: str) -> Token | None:
        """Look at a token, and at its lock."""
        token = self.tokens.get(name)
        if token is None:
            return None
        self.lapsed.discard(name)
        if owner := self.locks.get(name, ""):
            self._note_hold(token.rules.interval)
            if token.lease and token.lease.state == "OFFERED":
                self._take_back(token)
            elif token.lease:
                token.lease.broken = token.lease.broken or "foreign"
        elif token.foreign:
            # It may have been used for a refresh until just before this look.
            self._cool(token, self.now, token.rules.interval)
        token.foreign = owner
        return token

    # Waiting -----------------------------------------------------------------

    def standing(self, name: str, request: str) -> Answer:
        """Say what a request waits for: reason, place, queue length, whether it comes first."""
        token = self.tokens[name]
        place = token.queue.index(request) + 1 if request in token.queue else 0
        ahead = token.queue[: place - 1] if place else token.queue
        live = [other for other in ahead if self.now - self.requests[other].heard <= LIVE]
        returning = len(live) < len(ahead) and self.now < self.recovery_until
        reason = ""
        if self.now < self.quarantine_until:
            reason = "QUARANTINED"
        elif token.lease or token.foreign:
            reason = "HELD"
        elif self.now < token.not_before:
            reason = "COOLING"
        elif live or returning:
            reason = "QUEUED"
        return reason, place, len(token.queue), int(not live)

    def _hear(self, request: Request, age: int) -> None:
        request.heard = max(request.heard, self.now - age)
        request.heard_service = max(request.heard_service, self.service - age)

    def acquire(  # noqa: PLR0911, PLR0913 - an answer each, and the arguments of the script
        self,
        name: str,
        request_name: str,
        fingerprint: str,
        *,
        queue: bool,
        ttl: int,
        secret: str,
        age: int,
        known: int,
    ) -> Answer:
        """Answer a request: promises 1 to 5 in one place."""
        token = self._seen(name)
        if token is None:
            return ("TOKEN_NOT_FOUND",)
        request = self.requests.get(request_name)
        if request and request.fingerprint != fingerprint:
            return ("REQUEST_ID_REUSED",)
        if request and request.lease:
            lease = request.lease
            if request.state == "ended":
                return "LEASE_ENDED", lease.number
            return "OFFER", lease.number, lease.state, lease.expires
        if known > max(token.fencing, self.now + FURTHEST_FENCING):
            return ("FENCING_TOKEN_TOO_LARGE",)
        token.fencing = max(token.fencing, known)
        if request is None and queue:
            request = self.requests[request_name] = Request(name, fingerprint)
            token.queue.append(request_name)
        if request:
            self._hear(request, age)
        standing = self.standing(name, request_name)
        if standing[0] or age > LIVE:
            return "WAITING", *standing
        token.fencing = max(token.fencing + 1, self.now)
        lease = Lease(
            token.fencing, request_name, secret, ttl, token.rules, expires=self.now + OFFER
        )
        request = self.requests.setdefault(request_name, Request(name, fingerprint))
        request.state, request.lease = "offered", lease
        token.lease = token.leases[lease.number] = lease
        return "OFFER", lease.number, lease.state, lease.expires

    def tick(self, heard: list[tuple[str, str, int]]) -> list[Answer]:
        """Hear (token, request, age) all at once, then say what each waits for; () for nothing."""
        for _, request_name, age in heard:
            request = self.requests.get(request_name)
            if request and request.state == "waiting":
                self._hear(request, age)
        for name in dict.fromkeys(name for name, *_ in heard):
            self._seen(name)
        waiting = (
            request_name in self.requests and self.requests[request_name].state == "waiting"
            for _, request_name, _ in heard
        )
        return [
            self.standing(name, request) if waits else ()
            for waits, (name, request, _) in zip(waiting, heard, strict=True)
        ]

    def withdraw(self, name: str, request_name: str, fingerprint: str) -> Answer:
        """Give up a place, and an offer with it."""
        token = self._seen(name)
        if token is None:
            return ("TOKEN_NOT_FOUND",)
        request = self.requests.get(request_name)
        if request and request.fingerprint == fingerprint and request.state in _NOT_HELD:
            self._leave(request_name)
            if request.lease:
                self._take_back(token)
            self.requests.pop(request_name, None)
        return ("OK",)

    # Holding -----------------------------------------------------------------

    def _lease(self, name: str, number: int, secret: str | None) -> Lease | Answer:
        token = self._seen(name)
        if token is None:
            return ("TOKEN_NOT_FOUND",)
        lease = token.leases.get(number)
        if lease is None:
            return ("LEASE_NOT_FOUND",)
        if secret is not None and secret != lease.secret:
            return ("WRONG_SECRET",)
        return lease

    def renew(self, name: str, number: int, secret: str, *, started: bool) -> Answer:
        """Accept an offer, or prolong a lease."""
        lease = self._lease(name, number, secret)
        if isinstance(lease, tuple):
            return lease
        if lease.state not in _LIVE:
            return "LEASE_OVER", lease.state
        if lease.broken:
            return "LEASE_BROKEN", lease.expires
        if lease.state == "OFFERED":
            lease.state, lease.accepted = "ACTIVE", self.now
            self._leave(lease.request)
            self.requests[lease.request].state = "held"
        if started and lease.started is None:
            lease.started = self.now
        lease.expires = self.now + lease.ttl
        token = self.tokens[name]
        self._note_hold(lease.ttl + max(lease.rules.interval, token.rules.interval))
        return _state(lease)

    def release(  # noqa: PLR0913 - what a release says
        self,
        name: str,
        number: int,
        secret: str,
        *,
        saw_every: bool,
        age: int | None,
        unused: bool = False,
    ) -> Answer:
        """End a lease; again gives the same answer."""
        lease = self._lease(name, number, secret)
        if isinstance(lease, tuple):
            return lease
        if lease.state not in _LIVE:
            return _state(lease) if lease.released else ("LEASE_OVER", lease.state)
        token = self.tokens[name]
        lease.released = True
        if lease.state == "OFFERED":
            self._leave(lease.request)
            self._take_back(token)
            return _state(lease)
        refreshed: int | None = self.now
        if not lease.broken:
            at_start = {lease.rules.refresh_at, token.rules.refresh_at} == {"START"}
            life = min(lease.rules.access_token_life, token.rules.access_token_life)
            if unused:
                refreshed = None
            elif saw_every and age is not None and self.now - age >= lease.accepted:
                refreshed = self.now - age
            elif at_start and lease.started is not None and self.now - lease.started < life:
                refreshed = lease.started
        self._end(token, "BROKEN" if lease.broken else "RELEASED", refreshed)
        return _state(lease)

    def break_(self, name: str, number: int) -> Answer:
        """Forbid the renewal of a lease; an offer is taken back."""
        lease = self._lease(name, number, None)
        if isinstance(lease, tuple):
            return lease
        if lease.state not in _LIVE:
            return "LEASE_OVER", lease.state
        if lease.state == "OFFERED":
            self._take_back(self.tokens[name])
        else:
            lease.broken = lease.broken or "broken"
        return _state(lease)

    def read_lease(self, name: str, number: int) -> Answer:
        """Say where a lease is in its life."""
        lease = self._lease(name, number, None)
        return lease if isinstance(lease, tuple) else _state(lease)

    # Tokens ------------------------------------------------------------------

    def create_token(
        self, name: str, rules: Rules, age: int | None, *, known_epoch: bool, quarantine: int
    ) -> Answer:
        """Create a token; if its app is known to have been there, the store has lost it."""
        if not self.begun:
            self.begun = True
            if known_epoch:
                self.quarantine(quarantine)
        if name in self.tokens:
            return ("TOKEN_EXISTS",)
        self.tokens[name] = token = Token(rules, self.now)
        if age is not None:
            self._cool(token, self.now - age, rules.interval)
        self._seen(name)
        return ("OK",)

    def update_token(self, name: str, rules: Rules, updated: int) -> Answer:
        """Change the rules; a longer interval counts at once, a shorter one from the next lease."""
        token = self._seen(name)
        if token is None:
            return ("TOKEN_NOT_FOUND",)
        if updated != token.updated:
            return ("TOKEN_CHANGED",)
        token.rules, token.updated = rules, self.now
        if token.last_refresh is not None:
            self._cool(token, token.last_refresh, rules.interval)
        held = token.lease and token.lease.state == "ACTIVE"
        if held or token.foreign:
            self._note_hold((token.lease.ttl if held and token.lease else 0) + rules.interval)
        return ("OK",)

    def read(self, name: str) -> Answer:
        """Read a token: its live lease or 0, the queue's length, why it gives out no lease."""
        token = self._seen(name)
        assert token
        reason, _, length, _ = self.standing(name, "")
        return token.lease.number if token.lease else 0, length, reason

    def quarantine(self, at_least: int) -> None:
        """Hold back grants until every lease that may be forgotten has ended, and cooled."""
        safe = max(at_least, self.hold, self.hold_before)
        self.quarantine_until = max(self.quarantine_until, self.now + safe)


def _state(lease: Lease) -> Answer:
    return "OK", lease.state, lease.expires


_LIVE = ("OFFERED", "ACTIVE")
_NOT_HELD = ("waiting", "offered")


@dataclass(slots=True)
class Hold:
    """One holder, or a user of python-redis-lock, as it sees itself."""

    token: str
    number: int
    begun: int
    until: int
    refreshed: int
    """The last instant at which it may have refreshed."""
    interval: int
    """As it was when the lease was offered."""


class History:
    """Promises 1 to 3 over what holders were told, without the model."""

    def __init__(self) -> None:
        self.offers: dict[str, list[tuple[int, str]]] = {}
        self.holds: list[Hold] = []

    def offered(self, token: str, number: int, request: str) -> None:
        """Promise 3: fencing numbers rise; an offer may be told again while none came after it."""
        offers = self.offers.setdefault(token, [])
        if offers[-1:] != [(number, request)]:
            assert number > self.highest(token), f"{number} does not rise: {offers}"
            offers.append((number, request))

    def highest(self, token: str) -> int:
        """Return the highest fencing number that anybody was told."""
        return max((number for number, _ in self.offers.get(token, ())), default=0)

    def begin(self, new: Hold) -> None:
        """Promises 1 and 2: no other lives, and an interval has passed since each refresh."""
        for earlier in self.holds:
            if earlier.token == new.token:
                assert earlier.until <= new.begun, f"{earlier} still lives at {new.begun}"
                cooled = earlier.refreshed + earlier.interval
                assert cooled <= new.begun, f"{earlier} cools until {cooled}, not {new.begun}"
        self.holds.append(new)

    def find(self, token: str, number: int) -> Hold | None:
        """Find the hold of a lease; none if it was not accepted."""
        found = (hold for hold in self.holds if (hold.token, hold.number) == (token, number))
        return next(found, None)
