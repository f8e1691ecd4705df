"""The real scripts on a real Valkey against `model.py`, in sequences that Hypothesis makes up.

The scripts run as the coordinator puts them together, with one line changed: the time comes
from a key that the test sets, so that a minute passes at once and a boundary is met to the µs.
After each step the answer, every lease ever made, the queue, the cooldown, the fencing number
and python-redis-lock's key are compared with the model's, and `History` checks promises 1 to 3
over what holders were told, without the model.

Expiries of keys run in real time. That of the lock matters, so the test compares it, takes it
off, and deletes the key when its time has come in the model. That records are forgotten after
an hour is left out, and so are wake-ups, signals and what watchers are told.

`HOLDOFF_MODEL_EXAMPLES=20000` makes it a long run. A failure prints its steps, and a
`@reproduce_failure(…)` to put on `LeaseMachine`.

Each of these breaks of the scripts was made once, and seen to fail here:
release counts from the acceptance, or from a start that is unconfirmed by the present rules, lies
an access token's life back, or was noted twice; believes a report that is incomplete, older than
the lease, or of a broken lease; is repeated. An expired lease counts from its acceptance, or from
the look; its own interval or the token's new one is forgotten; a later cooldown shortens an
earlier one; an update shortens, does not lengthen, or overwrites a newer one. Offers go to the
silent, not past the silent, past those who return after an outage, or to who jumps the queue;
they cool down when withdrawn, keep a waiter live, lapse for ever, or count wrongly; a place is
lost at a reconnect, too early, or by an outage. Fencing numbers repeat, ignore the clock, the
number before, or the client's. A retry gets another lease, an ended request a new one; secrets and
fingerprints are not compared; a broken lease is renewed, or ends at once. A foreign lock is not
seen, does not end an offer, does not break a lease, or leaves no cooldown; ours ends too early,
stays too long, or is not put back. Quarantine is ignored, too short, or does not follow a loss of
data. The sweeper misses a token. And each boundary lies 1 µs off.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from holdoff_coordinator import scripts
from holdoff_coordinator.records import record
from tests.harness import LONG
from tests.model.model import (
    COOLDOWN_LOCK,
    FURTHEST_FENCING,
    LIVE,
    OFFER,
    OUTAGE,
    PLACE_KEPT,
    RECOVERY,
    SECOND,
    Answer,
    History,
    Hold,
    Model,
    Rules,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Server

EXAMPLES = os.environ.get("HOLDOFF_MODEL_EXAMPLES", "")
LIMIT_SECONDS = 0 if EXAMPLES else 600
"""Making a failure small takes a few minutes."""
BEGIN = 1_800_000_000 * SECOND
LONGEST_STEP = 65 * SECOND
QUARANTINE = 5 * SECOND
NAMES = ("main", "other")


def examples(short: int) -> int:
    """Return how many sequences to make up, given how many they are in the short form."""
    return int(EXAMPLES or (17 * short if LONG else short))


class Store:
    """The scripts on a Valkey, with a clock that the test sets."""

    REAL_TIME = "local time = redis.call('TIME')\n"
    TEST_TIME = "local time = {0, redis.call('GET', SHARD .. ':test-clock')}\n"

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.sha = {name: client.script_load(self.source(name)) for name in scripts.SCRIPTS}

    def source(self, name: str) -> str:
        """Return the text of a script, with the test's clock."""
        text = scripts.source(name)
        assert text.count(self.REAL_TIME) == 1, "the scripts read the time elsewhere"
        return text.replace(self.REAL_TIME, self.TEST_TIME)


@dataclass(frozen=True, slots=True)
class Asker:
    """A client with a request id."""

    request: str
    token: str
    ttl: int

    @property
    def fingerprint(self) -> str:
        """What the request id is bound to."""
        return f"{self.token} for {self.ttl}"

    @property
    def secret(self) -> str:
        """Hash of the secret that comes with an offer."""
        return f"secret of {self.request}"


@dataclass(frozen=True, slots=True)
class Offer:
    """A lease that somebody was offered."""

    number: int
    asker: Asker
    rules: Rules


@dataclass(frozen=True, slots=True)
class Found:
    """A token as the store has it after a script."""

    lock: str
    token: Answer
    queue: list[str]
    states: dict[int, str]


def of(attribute: str) -> st.SearchStrategy[Any]:
    """Draw from what the machine has made so far."""
    return st.runner().flatmap(lambda machine: st.sampled_from(getattr(machine, attribute)))


def given(attribute: str) -> Callable[..., Any]:
    """Run the rule only when there is something to draw."""
    return precondition(lambda machine: bool(getattr(machine, attribute)))


names = st.sampled_from(["main"] * 5 + ["other"])  # mostly one, so that much happens to it
rather = st.sampled_from([True, True, True, False])
rules = st.builds(
    Rules,
    interval=st.sampled_from([5 * SECOND, 8 * SECOND, 700_001, 0]),
    refresh_at=st.sampled_from(["END", "START"]),
    access_token_life=st.sampled_from([600 * SECOND, 3 * SECOND]),
)
ages = st.sampled_from([0] * 6 + [SECOND, LIVE, LIVE + 1, 20 * SECOND])
reports = st.tuples(
    st.booleans(),  # it saw every refresh
    st.sampled_from([None, 0, 1, SECOND, SECOND + 1, 3 * SECOND, 3 * SECOND + 1]),
    st.sampled_from([False, False, True]),  # nothing ran under it
)


class LeaseMachine(RuleBasedStateMachine):
    """One app with two tokens, its clients, and users of python-redis-lock."""

    store: ClassVar[Store]
    apps: ClassVar = (f"model-{os.getpid()}-{number}" for number in itertools.count())

    def __init__(self) -> None:
        super().__init__()
        self.app = next(self.apps)
        self.shard = scripts.shard_key(self.app)
        self.now = BEGIN
        self.model = Model(self.now)
        self.history = History()
        self.epoch, self.longest_hold = "", 0
        self.askers: list[Asker] = []
        self.connected: list[Asker] = []
        self.offers: list[Offer] = []
        self.started: dict[Offer, int] = {}
        self.lock_until: dict[str, int] = {}
        self.lock_seen: set[str] = set()
        self.lock_doubtful: set[str] = set()
        self.found: dict[str, Found] = {}
        self.counter = itertools.count(1)

    def teardown(self) -> None:
        """See that every lease ever made is where it should be, and clean up."""
        self._sweep()
        for offer in self.offers:
            self._read_lease(offer)
        self._delete_keys()

    def _delete_keys(self) -> None:
        if keys := self.store.client.keys(f"*{{{self.app}}}*"):
            self.store.client.delete(*keys)

    # Running a script --------------------------------------------------------

    def _run(self, script: str, *args: str | int, settled: bool = False) -> list[Any]:
        """Run a script now.

        Two things are settled by a look at the token and not before: who has lost its place may
        keep it until somebody walks the queue, and a request whose offer lapsed counts as offered.
        The first never, the second seldom does harm; the model takes both at their instant. So
        somebody looks first.
        """
        if self.model.look(self.now) or (settled and self.model.lapsed):
            self._look_at_all()
        return self._call(script, *args)

    def _call(self, script: str, *args: str | int) -> list[Any]:
        self._expire_locks()
        header = (self.now, self.epoch, f"epoch-{next(self.counter)}", self._quarantine(), "", "")
        with self.store.client.pipeline() as pipe:
            pipe.set(f"{self.shard}:test-clock", self.now)
            pipe.evalsha(self.store.sha[script], 1, self.shard, *header, *args)
            for name in NAMES:
                lock = self._lock(name)
                pipe.get(lock)
                pipe.pttl(lock)
                pipe.persist(lock)
                fields = ("lease", "fencing", "last_refresh_us", "not_before_us", "foreign")
                pipe.hmget(f"{self.shard}:token:{name}", fields)
                pipe.zrange(f"{self.shard}:queue:{name}", 0, -1)
                for number in self._numbers(name):
                    pipe.hget(f"{self.shard}:lease:{name}:{number}", "state")
            _, reply, *answers = pipe.execute()
        answer = iter(answers)
        for name in NAMES:
            owner, milliseconds, _ = next(answer), next(answer), next(answer)
            if milliseconds >= 0:
                self.lock_until[name] = self.now + milliseconds * 1000
            lease, fencing, last, not_before, foreign = next(answer)
            self.found[name] = Found(
                lock=(owner or b"").decode(),
                token=(
                    *(int(lease or 0), int(fencing or 0), int(last or 0), int(not_before or 0)),
                    (foreign or b"").decode(),
                ),
                queue=[entry.decode() for entry in next(answer)],
                states={n: (next(answer) or b"").decode() for n in self._numbers(name)},
            )
        assert int(reply[0]) == self.now
        self.epoch = reply[1].decode() or self.epoch
        self.longest_hold = max(self.longest_hold, int(reply[2]))
        return list(reply[4:])

    def _quarantine(self) -> int:
        return max(QUARANTINE, self.longest_hold)

    def _numbers(self, name: str) -> list[int]:
        return [offer.number for offer in self.offers if offer.asker.token == name]

    def _check(self, name: str) -> None:
        """Compare a token that was looked at with the model's."""
        token, found = self.model.tokens.get(name), self.found[name]
        if token is None:
            assert found.token == (0, 0, 0, 0, "")
            return
        number = token.lease.number if token.lease else 0
        refreshed = token.last_refresh or 0
        assert found.token == (number, token.fencing, refreshed, token.not_before, token.foreign)
        assert found.queue == token.queue
        self._check_states(name)
        expected = token.foreign or (str(number) if number else "")
        if not expected and self.now < token.not_before:
            expected = COOLDOWN_LOCK
        assert found.lock == expected
        if expected and not token.foreign:
            late = self.lock_until[name] - self.model.blocked_until(name)
            assert 0 <= late < 1000, f"the lock ends {late} µs after what it stands for"
        self.lock_doubtful.discard(name)
        if token.foreign:
            self.lock_seen.add(name)

    def _check_states(self, name: str) -> None:
        leases = self.model.tokens[name].leases
        for number, state in self.found[name].states.items():
            # Leases from before a loss of data are unknown to both.
            assert state == (leases[number].state if number in leases else "")

    def _look_at_all(self) -> None:
        self.model.look(self.now)
        status, tokens, *_ = self._call("read", *NAMES)
        assert status == b"OK"
        answers = {
            name.decode(): (int(lease or 0), int(length), reason.decode())
            for name, _, lease, _, length, reason, *_ in tokens
        }
        assert answers == {
            name: self.model.read(name) for name in NAMES if name in self.model.tokens
        }
        for name in NAMES:
            self._check(name)

    # Waiters -----------------------------------------------------------------

    @initialize(rules=rules)
    def begin(self, rules: Rules) -> None:
        """There is a token."""
        self.create("main", rules, None)

    def _standing(self, name: str, flat: list[bytes]) -> Answer:
        reason, place, length, start, first, *_ = flat
        not_before = self.model.tokens[name].not_before
        assert int(start) >= max(self.now, not_before), "told to start too early"
        if reason == b"COOLING" and int(place) <= 1:
            assert int(start) == not_before
        return reason.decode(), int(place), int(length), int(first)

    def _acquire(
        self, asker: Asker, *, known: int, queue: bool = True, age: int = 0, reused: bool = False
    ) -> Offer | None:
        """Ask for a lease; return what was offered, be it for the first time or again."""
        reply = self._run(
            "acquire",
            *(asker.token, asker.request, asker.fingerprint, "1" if queue else "0"),
            *(asker.ttl, f"holder of {asker.request}", asker.secret, age, known),
            *("", ""),  # neither places nor a job: no back-offs here
            settled=reused,
        )
        expected = self.model.acquire(
            *(asker.token, asker.request, asker.fingerprint),
            queue=queue,
            ttl=asker.ttl,
            secret=asker.secret,
            age=age,
            known=known,
        )
        answer: Answer = (reply[0].decode(),)
        offer = None
        if answer == ("WAITING",):
            answer += self._standing(asker.token, reply[1])
        elif answer == ("OFFER",):
            lease, number = record(reply[2]), int(reply[1])
            answer += number, lease["state"].decode(), int(lease["expires_us"])
            assert int(lease["fencing"]) == number
            assert lease["secret_hash"].decode() == asker.secret
            self.history.offered(asker.token, number, asker.request)
            if number not in self._numbers(asker.token):
                self.offers.append(Offer(number, asker, self.model.tokens[asker.token].rules))
            offer = next(o for o in self.offers if (o.number, o.asker) == (number, asker))
        elif answer == ("LEASE_ENDED",):
            answer += (int(reply[1]),)
        assert answer == expected
        self._check(asker.token)
        return offer

    @rule(
        name=names,
        ttl=st.sampled_from([4 * SECOND, 10 * SECOND, SECOND]),
        queue=rather,
        ahead=st.sampled_from([0] * 8 + [1, 3600 * SECOND, FURTHEST_FENCING + 1]),
        age=ages,
        vanishes=st.booleans(),
    )
    def ask(  # noqa: PLR0913 - as many things may differ
        self, *, name: str, ttl: int, queue: bool, ahead: int, age: int, vanishes: bool
    ) -> None:
        """A new client asks; it may know of a fencing number that the store does not."""
        known = self._known(name)
        if ahead:
            known = max(known, self.now) + ahead
        asker = self._new_asker(name, ttl)
        self._acquire(asker, queue=queue, age=age, known=known)
        if vanishes:
            self.connected.remove(asker)

    def _known(self, name: str) -> int:
        """Return a fencing number that the store may have lost, and could not raise by itself."""
        highest = self.history.highest(name)
        return highest if highest >= self.now else 0

    def _new_asker(self, name: str, ttl: int) -> Asker:
        asker = Asker(f"r{next(self.counter)}", name, ttl)
        self.askers.append(asker)
        self.connected.append(asker)
        return asker

    @property
    def waiting(self) -> list[Asker]:
        """Those that wait, or were offered a lease."""
        requests = self.model.requests.items()
        waiting = {name for name, request in requests if request.state in ("waiting", "offered")}
        return [asker for asker in self.askers if asker.request in waiting]

    @property
    def returning(self) -> list[Asker]:
        """All that ever asked, and those that wait a few times more."""
        return self.askers + self.waiting * 4

    @given("askers")
    @rule(asker=of("returning"), queue=rather, age=ages, accept=rather)
    def ask_again(self, asker: Asker, queue: bool, age: int, accept: bool) -> None:
        """A client polls, retries, or is back after it vanished; most accept an offer at once."""
        if asker not in self.connected:
            self.connected.append(asker)
        offer = self._acquire(asker, known=self._known(asker.token), queue=queue, age=age)
        if offer and accept:
            self._renew(offer, started=False, secret=asker.secret)

    @rule(
        name=names,
        patient=rather,
        started=st.booleans(),
        us=st.sampled_from([SECOND, 3 * SECOND, 3 * SECOND - 1, 4 * SECOND - 1, 4 * SECOND]),
        report=reports,
        meanwhile=st.sampled_from(["", "broken", "locked", "gone"]) | rules,
        renewed=st.booleans(),
    )
    def run_a_job(  # noqa: PLR0913 - as many things may differ
        self,
        *,
        name: str,
        patient: bool,
        started: bool,
        us: int,
        report: tuple[bool, int | None, bool],
        meanwhile: str | Rules,
        renewed: bool,
    ) -> None:
        """The next in line, or a new client, runs and releases; most come when they may start.

        Meanwhile the lease may be broken, its lock taken, or the token's rules changed; or the
        job is gone, and the sweeper finds that first.
        """
        asker = self._next_in_line(name, patient=patient)
        offer = self._acquire(asker, known=self._known(name))
        if offer:
            self._renew(offer, started=started, secret=asker.secret)
            self._pass(us // 2, attended=False)
            if isinstance(meanwhile, Rules):
                self._update(name, meanwhile)
            elif meanwhile == "broken":
                self._break(offer)
            elif meanwhile == "locked":
                self._delete_lock(name)
                self._take_lock(name, 2)
            elif meanwhile == "gone":
                self._pass(asker.ttl, attended=False)
                self._sweep()
            if renewed:
                self._renew(offer, started=started, secret=asker.secret)
            self._pass(us - us // 2, attended=False)
            self._release(offer, report, asker.secret)

    def _next_in_line(self, name: str, *, patient: bool) -> Asker:
        """Return the first of the queue, or a new client; the patient come when it may start."""
        if token := self.model.tokens.get(name):
            if patient:
                free = max(self.model.blocked_until(name), self.model.quarantine_until)
                self._pass(max(0, free - self.now), attended=False)
            for asker in self.askers:
                if asker.request in token.queue[:1]:
                    return asker
        return self._new_asker(name, 4 * SECOND)

    @rule(
        name=names,
        ends=st.lists(
            st.sampled_from(["lapse", "lapse", "break", "lock", "no"]), min_size=2, max_size=5
        ),
    )
    def miss_offers(self, name: str, ends: list[str]) -> None:
        """A waiter does not accept what it is offered, several times; or it is taken back."""
        asker = self._next_in_line(name, patient=True)
        for end in ends:
            offer = self._acquire(asker, known=self._known(name))
            if offer and end == "break":
                self._break(offer)
            elif offer and end == "lock":
                self._delete_lock(name)
                self._take_lock(name, 2)
            elif offer and end == "no":
                self._release(offer, (False, None, False), asker.secret)
            elif offer:
                self._pass(OFFER, attended=False)

    @given("askers")
    @rule(asker=of("returning"), name=names, ttl=st.sampled_from([4 * SECOND, 7 * SECOND]))
    def reuse_a_request(self, asker: Asker, name: str, ttl: int) -> None:
        """A request id comes with another token or TTL: refused, unless it was forgotten."""
        other = Asker(asker.request, name, ttl)
        if other != asker and asker.request in self.model.requests:
            self._acquire(other, known=self._known(name), reused=True)

    @given("askers")
    @rule(asker=of("returning"), right=rather)
    def withdraw(self, asker: Asker, right: bool) -> None:
        """A client waits no more; one that does not know what was asked changes nothing."""
        fingerprint = asker.fingerprint if right else "other"
        status, *_ = self._run("withdraw", asker.token, asker.request, fingerprint)
        assert (status.decode(),) == self.model.withdraw(asker.token, asker.request, fingerprint)
        self._check(asker.token)

    @given("connected")
    @rule(asker=of("connected"), vanishes=st.booleans(), age=ages)
    def tick(self, asker: Asker, vanishes: bool, age: int) -> None:
        """A replica hears all its waiters at once; one may be gone without a word."""
        if vanishes:
            self.connected.remove(asker)
        self._tick(age)

    def _tick(self, age: int) -> None:
        if not self.connected:
            self._look_at_all()
            return
        heard = [(asker.token, asker.request, age) for asker in self.connected]
        heard.sort()
        args = [arg for entry in heard for arg in entry]
        status, groups, *_ = self._run("tick", *args, settled=True)
        assert status == b"OK"
        expected = self.model.tick(heard)
        answers = []
        for name, lease, _, *waiters in groups:
            token = self.model.tokens.get(name.decode())
            assert int(lease or 0) == (token.lease.number if token and token.lease else 0)
            answers += [
                self._standing(name.decode(), flat) if flat else () for _, flat, *_ in waiters
            ]
        assert answers == expected
        for name in {name for name, *_ in heard}:
            self._check(name)

    # Holders -----------------------------------------------------------------

    def _spoken(self, script: str, offer: Offer, *args: str | int) -> Answer:
        reply = self._run(script, offer.asker.token, offer.number, *args)
        answer: Answer = (reply[0].decode(),)
        if answer == ("OK",):
            lease = record(reply[1])
            answer += lease["state"].decode(), int(lease["expires_us"])
        elif answer == ("LEASE_OVER",):
            answer += (reply[1].decode(),)
        elif answer == ("LEASE_BROKEN",):
            answer += (int(reply[2]),)
        return answer

    @property
    def leases(self) -> list[Offer]:
        """All that were ever offered, and those that live a few times more."""
        tokens = self.model.tokens.items()
        live = {(name, token.lease.number) for name, token in tokens if token.lease}
        return self.offers + 4 * [
            offer for offer in self.offers if (offer.asker.token, offer.number) in live
        ]

    @given("offers")
    @rule(offer=of("leases"), started=st.booleans(), right=rather)
    def renew(self, offer: Offer, started: bool, right: bool) -> None:
        """A holder accepts or prolongs; it may be late, or have a wrong secret."""
        self._renew(offer, started=started, secret=offer.asker.secret if right else "wrong")

    def _renew(self, offer: Offer, *, started: bool, secret: str) -> None:
        name = offer.asker.token
        answer = self._spoken("renew", offer, secret, "1" if started else "0", "")
        assert answer == self.model.renew(name, offer.number, secret, started=started)
        self._check(name)
        if answer[0] != "OK":
            return
        assert name not in self.model.locks, "renewed under a foreign lock"
        until = self.now + offer.asker.ttl
        hold = self.history.find(name, offer.number)
        if hold is None:
            interval = offer.rules.interval
            self.history.begin(Hold(name, offer.number, self.now, until, until, interval))
        else:
            assert self.now < hold.until, "renewed after it had run out"
            hold.until = hold.refreshed = until
        if offer.asker in self.connected:
            self.connected.remove(offer.asker)
        if started:
            self.started.setdefault(offer, self.now)

    @given("offers")
    @rule(offer=of("leases"), report=reports, right=rather)
    def release(self, offer: Offer, report: tuple[bool, int | None, bool], right: bool) -> None:
        """A holder ends its lease or turns down an offer; perhaps again, or too late."""
        self._release(offer, report, offer.asker.secret if right else "wrong")

    def _release(self, offer: Offer, report: tuple[bool, int | None, bool], secret: str) -> None:
        name = offer.asker.token
        saw_every, age, unused = report
        words = ["1" if one else "0" for one in (saw_every, unused)]
        args = (secret, words[0], "" if age is None else age, words[1])
        current = self.model.tokens[name].rules if name in self.model.tokens else offer.rules
        answer = self._spoken("release", offer, *args)
        assert answer == self.model.release(
            name, offer.number, secret, saw_every=saw_every, age=age, unused=unused
        )
        self._check(name)
        hold = self.history.find(name, offer.number)
        if answer[0] != "OK" or hold is None or hold.until <= self.now:
            return
        hold.until = hold.refreshed = self.now
        started = self.started.get(offer)
        if unused:
            hold.refreshed = 0
        elif saw_every and age is not None and self.now - age >= hold.begun:
            hold.refreshed = self.now - age
        elif started is not None and all(
            rules.refresh_at == "START" and self.now - started < rules.access_token_life
            for rules in (offer.rules, current)
        ):
            hold.refreshed = started

    @given("offers")
    @rule(offer=of("leases"))
    def break_lease(self, offer: Offer) -> None:
        """An operator takes a lease away."""
        self._break(offer)

    def _break(self, offer: Offer) -> None:
        assert self._spoken("break", offer, "broken") == self.model.break_(
            offer.asker.token, offer.number
        )
        self._check(offer.asker.token)

    def _read_lease(self, offer: Offer) -> None:
        answer = self._spoken("read_lease", offer)
        assert answer == self.model.read_lease(offer.asker.token, offer.number)
        self._check(offer.asker.token)

    # Time, and those who only look -------------------------------------------

    def _pass(self, us: int, *, attended: bool) -> None:
        """Let time pass; while a coordinator is there, somebody looks every two seconds."""
        end = self.now + min(us, LONGEST_STEP)
        while attended and end - self.now > OUTAGE:
            self.now += OUTAGE
            self._tick(0)
        self.now = end

    @rule(
        us=st.sampled_from([SECOND, 2 * SECOND, 1, 300_000, 5 * SECOND, 30 * SECOND, PLACE_KEPT]),
        attended=st.booleans(),
    )
    def time_passes(self, us: int, attended: bool) -> None:
        """Time passes, with or without a coordinator."""
        self._pass(us, attended=attended)

    @precondition(lambda self: bool(self.model.instants(self.now)))
    @rule(data=st.data(), off=st.sampled_from([0, -1, 1]), attended=st.booleans())
    def time_passes_to_a_boundary(self, data: st.DataObject, off: int, attended: bool) -> None:
        """It is the very instant at which something changes, or 1 µs beside it."""
        instant = data.draw(st.sampled_from(self.model.instants(self.now)), label="instant")
        self._pass(max(0, instant + off - self.now), attended=attended)

    @given("waiting")
    @rule(asker=of("waiting"), place=st.booleans(), off=st.sampled_from([0, 1, -SECOND]))
    def stay_away(self, asker: Asker, place: bool, off: int) -> None:
        """A waiter is not heard until it is live no more, or about to lose its place.

        Before the end it may ask once more, with no wish to wait.
        """
        if asker not in self.connected:
            self.connected.append(asker)
        self._pass(RECOVERY + SECOND, attended=True)
        self._tick(0)
        self.connected.remove(asker)
        self._pass((PLACE_KEPT if place else LIVE) + off, attended=True)
        self._look_at_all()
        if off < 0:
            self._acquire(asker, known=self._known(asker.token), queue=False)
            self._pass(OUTAGE, attended=False)
            self._look_at_all()

    @rule(off=st.sampled_from([0, -1]))
    def wait_for_those_who_return(self, off: int) -> None:
        """The coordinators were away, and then they look until the silent had time to come back."""
        self._pass(10 * SECOND, attended=False)
        self._look_at_all()
        while (left := self.model.recovery_until + off - self.now) > 0:
            self._pass(min(left, OUTAGE), attended=False)
            self._look_at_all()

    def _sweep(self) -> None:
        """The sweeper settles what has run out, also where nobody waits."""
        assert self._run("sweep", 100) == [b"OK"]
        for name, token in self.model.tokens.items():
            if self.model.locks.get(name, "") == token.foreign:
                self._check_states(name)
        self._look_at_all()

    # Tokens and the store ----------------------------------------------------

    @precondition(lambda self: len(self.model.tokens) < len(NAMES))
    @rule(name=st.sampled_from(NAMES), rules=rules, age=st.none() | ages)
    def create(self, name: str, rules: Rules, age: int | None) -> None:
        """A token is created, and knows of a refresh or not."""
        args = *_rule_args(rules), "" if age is None else age
        known, quarantine = bool(self.epoch), self._quarantine()
        status, *_ = self._run("create_token", name, *args)
        assert (status.decode(),) == self.model.create_token(
            name, rules, age, known_epoch=known, quarantine=quarantine
        )
        if status == b"OK":
            self._check(name)

    @rule(name=names, rules=rules, stale=st.sampled_from([False, False, True]))
    def update(self, name: str, rules: Rules, stale: bool) -> None:
        """A token's rules change, unless they were worked out from older ones."""
        self._update(name, rules, stale=stale)

    def _update(self, name: str, rules: Rules, *, stale: bool = False) -> None:
        token = self.model.tokens.get(name)
        updated = (token.updated if token else 0) - stale
        status, *_ = self._run("update_token", name, *_rule_args(rules), updated)
        assert (status.decode(),) == self.model.update_token(name, rules, updated)
        self._check(name)

    @rule(trouble=st.sampled_from(["", "", "", "", "a jump", "a loss"]), rules=rules)
    def come_by(self, trouble: str, rules: Rules) -> None:
        """The sweeper comes by; a replica sees the clock jump; the store loses everything."""
        if trouble == "a loss":
            self._lose_data()
            self.create("main", rules, None)
        elif trouble:
            status, until, *_ = self._run("quarantine", "the clock jumped")
            self.model.quarantine(self._quarantine())
            assert (status, int(until)) == (b"OK", self.model.quarantine_until)
        else:
            self._sweep()

    def _lose_data(self) -> None:
        """The store loses everything; holders know nothing of it."""
        for name in list(self.model.locks):
            self._freed(name, self.now)
        self._delete_keys()
        self.lock_until.clear()
        self.model = Model(self.now)

    # Users of python-redis-lock ----------------------------------------------

    def _lock(self, name: str) -> str:
        return f"lock:{scripts.lock_name(self.app, name)}"

    def _expire_locks(self) -> None:
        for name, until in list(self.lock_until.items()):
            if until <= self.now:
                self.store.client.delete(self._lock(name))
                del self.lock_until[name]
                if name in self.model.locks:
                    self._freed(name, until)

    def _freed(self, name: str, end: int) -> None:
        """A foreign lock is over; whatever it did counts if anybody saw it."""
        del self.model.locks[name]
        self.lock_doubtful.add(name)
        if name in self.lock_seen:
            self.lock_seen.remove(name)
            interval = self.model.tokens[name].rules.interval
            self.history.holds.append(Hold(name, 0, end, end, end, interval))

    @rule(name=names, seconds=st.sampled_from([2, 10]), take=st.booleans())
    def lock(self, name: str, seconds: int, take: bool) -> None:
        """A script takes the lock by itself, or releases it; or somebody resets what is there."""
        if take:
            self._take_lock(name, seconds)
        else:
            self._delete_lock(name)

    def _take_lock(self, name: str, seconds: int) -> None:
        if name not in self.model.tokens:
            return
        self._expire_locks()
        owner = f"script-{next(self.counter)}"
        taken = self.store.client.set(self._lock(name), owner, nx=True)
        blocked_until = self.model.blocked_until(name)
        if taken:
            assert name in self.lock_doubtful or blocked_until <= self.now
            self.model.locks[name] = owner
            self.lock_until[name] = self.now + seconds * SECOND
        else:
            assert name in self.model.locks or self.now < blocked_until + 1000

    def _delete_lock(self, name: str) -> None:
        self.store.client.delete(self._lock(name))
        self.lock_until.pop(name, None)
        self.lock_doubtful.add(name)
        if name in self.model.locks:
            self._freed(name, self.now)


def _rule_args(rules: Rules) -> tuple[str | int, ...]:
    return ("policy", "", "", rules.interval, rules.refresh_at, rules.access_token_life)


@pytest.mark.timeout(LIMIT_SECONDS)
def test_the_scripts_do_what_the_model_says(valkey: Server) -> None:
    """Promises 1 to 5 and 9 hold in whatever order things happen."""
    with redis.Redis.from_url(valkey.url) as client:
        LeaseMachine.store = Store(client)
        run_state_machine_as_test(
            LeaseMachine,
            settings=settings(
                max_examples=examples(25),
                stateful_step_count=50,
                deadline=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
