"""The real scripts on a real Valkey against `back_off_model.py`: who must be quiet, and who goes.

The scripts run as the coordinator puts them together, with the time, and the expiries of keys,
under the test's clock. After each step all back-offs, with those who keep them in order, are
compared with the model's. `History` checks what callers were told without the model: that nobody
goes on in a quiet scope, one at a time goes first, the others a step apart, and a block is no
longer than its latest report allows.

Left out are quarantine and users of python-redis-lock, which the lease machine has, and the
bounds of an app.

`HOLDOFF_MODEL_EXAMPLES=20000` makes it a long run. A failure prints its steps, and a
`@reproduce_failure(…)` to put on `BackOffMachine`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass, field
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
from tests.model import test_budget_machine as budget_machine
from tests.model.back_off_model import (
    MINUTE,
    BackOff,
    BlockRule,
    Model,
    Place,
    Scope,
    scope,
)
from tests.model.budget_model import DAY, SECOND, Limit, Reservation
from tests.model.model import Rules
from tests.model.test_lease_machine import LIMIT_SECONDS, examples, given, of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tests.conftest import Server

BEGIN = 1_800_000_000 * SECOND
HOUR = 3600 * SECOND
TOKENS = {"main": 0, "other": 0, "third": 0, "slow": 3 * SECOND}
"""Names and refresh intervals."""
DIVISIONS, ENDPOINTS = ("1", "2"), ("crm", "sales")
PLACES = tuple(itertools.product(DIVISIONS, ENDPOINTS))
RULE = BlockRule(first=10 * SECOND, factor=2, most=45 * SECOND, forget=2 * HOUR)
ERRORS = {
    (token, place): Limit(
        f"errors-{token}-{'-'.join(place)}", "ERROR", 4, 1, 30 * SECOND, 0, (400,)
    )
    for token in TOKENS
    for place in PLACES
}
CALLS = {division: Limit(f"calls-{division}", "CALL", 5, 1, 10 * SECOND) for division in DIVISIONS}
REQUESTS = {
    token: Limit(f"requests-{token}", "TOKEN_REQUEST", 3, 1, 20 * SECOND) for token in TOKENS
}
SCOPES = {
    **{limit: scope(token, *place) for (token, place), limit in ERRORS.items()},
    **{limit: scope(division=division) for division, limit in CALLS.items()},
    **{limit: scope(token) for token, limit in REQUESTS.items()},
}


class Store(budget_machine.Store):
    """All scripts on a Valkey, with a clock that the test sets."""

    CHANGES: ClassVar = dict(itertools.islice(budget_machine.Store.CHANGES.items(), 1))
    # Who keeps each back-off, in order.
    ORDERS = """
        local found = {}
        for i, id in ipairs(redis.call('ZRANGE', KEYS[1] .. ':backoffs', 0, -1)) do
            found[i] = {id, redis.call('ZRANGE', KEYS[1] .. ':turns:' .. id, 0, -1)}
        end
        return found
    """

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client)
        self.sha = {name: client.script_load(self.source(name)) for name in scripts.SCRIPTS}
        self.orders = client.script_load(self.ORDERS)

    def state(
        self, shard: str, now: int, script: str, *args: str | int
    ) -> tuple[list[Any], dict[str, tuple[dict[str, bytes], list[str]]]]:
        """Run a script; return its answer, and the back-offs with those who keep them."""
        with self.client.pipeline(transaction=False) as pipe:
            pipe.evalsha(self.thaw, 1, shard, now)
            for name, more in ((script, args), ("read_back_offs", ("", "", ""))):
                pipe.evalsha(self.sha[name], 1, shard, "", "", "none", 0, "", "", *more)
            pipe.evalsha(self.orders, 1, shard)
            pipe.evalsha(self.freeze, 1, shard, now)
            _, answer, (_, _, _, _, status, shown), orders, _ = pipe.execute()
        assert int(answer[0]) == now
        assert status == b"OK"
        kept = {name: [caller.decode() for caller in order] for name, order in orders}
        found = [record(flat) for flat in shown]
        return answer[4:], {one["id"].decode(): (one, kept[one["id"]]) for one in found}


@dataclass(frozen=True, slots=True)
class Asker:
    """A client with a request."""

    request: str
    token: str
    ttl: int
    places: frozenset[Place]
    job: str

    @property
    def fingerprint(self) -> str:
        """What the request id is bound to."""
        return f"{self.token} {self.ttl} {sorted(self.places)} {self.job}"

    @property
    def secret(self) -> str:
        """Hash of the secret that comes with an offer."""
        return f"secret of {self.request}"

    @property
    def declared(self) -> str:
        """The places as the scripts read them."""
        return json.dumps(sorted(self.places)) if self.places else ""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that somebody was offered."""

    number: int
    asker: Asker


@dataclass(slots=True)
class Shown:
    """A back-off as the store has it."""

    state: str
    until: int
    probe: str
    reopened: int
    step: int
    order: list[str]

    @classmethod
    def read(cls, flat: dict[str, bytes], order: list[str]) -> Shown:
        """Read a record."""
        return cls(
            flat["state"].decode(),
            int(flat["until_us"]),
            flat.get("probe", b"").decode(),
            int(flat.get("reopened_us", 0)),
            int(flat.get("step_us", 0)),
            order,
        )


@dataclass(slots=True)
class History:
    """What callers were told, and whether all of it is as promised."""

    shown: dict[str, Shown] = field(default_factory=dict)
    went: dict[str, tuple[int, frozenset[str]]] = field(default_factory=dict)
    """When callers were let go last, and what they were subject to."""
    starts: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    """By back-off and reopening, when callers were told to follow."""
    latest: dict[str, int] = field(default_factory=dict)
    """By block, the latest end that a report allows."""

    def goes(self, now: int, caller: str, subject: Iterable[str]) -> None:
        """A caller was let go: nothing that it is subject to is quiet."""
        names = frozenset(subject)
        for name in names & self.shown.keys():
            assert self.shown[name].state != "QUIET", f"{caller} goes while {name} is quiet"
            if self.shown[name].state == "PROBING":
                assert self.shown[name].probe == caller, f"{caller} goes beside the probe of {name}"
        self.went[caller] = now, names

    def waits(self, caller: str, name: str, start: int) -> None:
        """A caller was told to wait; of those who have a place nobody follows within a step.

        Who waits longer than that, for a cooldown of its token, may go beside another one.
        """
        self.went.pop(caller, None)
        one = self.shown.get(name)
        if not one or one.state != "REOPENING" or caller not in one.order:
            return
        if start == one.reopened + (one.order.index(caller) + 1) * one.step:
            starts = self.starts.setdefault((name, one.reopened), {})
            for other, at in starts.items():
                assert other == caller or abs(at - start) >= one.step, f"{caller} follows {other}"
            starts[caller] = start

    def check(self, alive: set[str]) -> None:
        """See that at most one goes first, and that blocks end in time."""
        for name, one in self.shown.items():
            if one.state == "PROBING":
                first = [
                    caller
                    for caller, (at, names) in self.went.items()
                    if caller in alive and name in names and at >= one.until
                ]
                assert len(first) <= 1, f"{first} go first after {name}"
            if name in self.latest:
                assert one.until <= self.latest[name], f"{name} lasts too long"


def specs(limits: Iterable[Limit]) -> list[dict[str, Any]]:
    """Describe budgets to the scripts."""
    return [{**budget_machine.spec(limit), **dict(SCOPES[limit])} for limit in limits]


names = st.sampled_from(["main", "main", *TOKENS])
places = st.sampled_from([("1", "crm")] * 3 + list(PLACES))
declared = st.sampled_from(
    [(), (), (("1", "crm"),), (("1", ""),), (("1", "sales"),), (("1", "crm"), ("2", "sales"))]
).map(frozenset)
jobs = st.sampled_from(["", "", "nightly", "weekly"])
rather = st.sampled_from([True, True, True, False])
ages = st.sampled_from([0] * 6 + [1, SECOND, 5 * SECOND, 12 * SECOND, 40 * SECOND])
scopes = st.sampled_from(
    [
        *[scope()] * 3,
        scope("main"),
        scope("other"),
        scope(division="1"),
        scope(endpoint="crm"),
        scope("main", "1", "crm"),
    ]
)
steps = st.sampled_from(
    [SECOND, 60_000, 200_000, 1, 2 * SECOND, 5 * SECOND, 10 * SECOND, 30 * SECOND, MINUTE]
)


class BackOffMachine(RuleBasedStateMachine):
    """One app with three tokens, those who wait for them or hold them, and calls."""

    store: ClassVar[Store]
    apps: ClassVar = (f"back-offs-{os.getpid()}-{number}" for number in itertools.count())

    def __init__(self) -> None:
        super().__init__()
        self.app = next(self.apps)
        self.shard = scripts.shard_key(self.app)
        self.now = BEGIN
        self.model, self.history = Model(self.now, SCOPES), History()
        self.askers: list[Asker] = []
        self.connected: list[Asker] = []
        self.held: list[Held] = []
        self.followed: list[Held] = []
        self.reserved: list[str] = []
        self.blocks: dict[str, int] = {}
        self.counter = itertools.count(1)

    @initialize()
    def begin(self) -> None:
        """There are tokens."""
        for name, interval in TOKENS.items():
            rules = Rules(interval, "END", 600 * SECOND)
            status, *_ = self._run("create_token", name, "policy", "", "", interval, "END", 0, "")
            self.model.create_token(name, rules, None, known_epoch=False, quarantine=0)
            assert status == b"OK"

    def teardown(self) -> None:
        """See that in the end nothing is left but tokens, and the leases that they keep."""
        for _ in range(4):
            self.now += 4 * DAY
            self._run("sweep", 100)
        left = self.store.wait(self.shard, self.now + 8 * DAY)
        self.store.client.delete(*self.store.client.keys(f"*{{{self.app}}}*"))
        kept = re.compile(rb":(tokens|changes|audit|security|(token|history|lease):.*)$")
        assert not [key for key in left if not kept.search(key)], "something is kept for ever"

    # Running a script --------------------------------------------------------

    def _run(self, script: str, *args: str | int) -> list[Any]:
        """Run a script now; who lost a place, or what ran out, was seen by somebody before."""
        ends = [
            r.expires for r in self.model.budgets.reservations.values() if r.state == "reserved"
        ]
        ends += [token.lease.expires for token in self.model.tokens.values() if token.lease]
        due = any(end <= self.now for end in ends)
        if self.model.look(self.now) or self.model.lapsed or due:
            self._call("sweep", 100)
            self._call("read", *TOKENS)
            for name in TOKENS:
                self.model._seen(name)
        return self._call(script, *args)

    def _call(self, script: str, *args: str | int) -> list[Any]:
        answer, found = self.store.state(self.shard, self.now, script, *args)
        self.records = {name: one for name, (one, _) in found.items()}
        self.history.shown = {name: Shown.read(*one) for name, one in found.items()}
        return answer

    def _check(self) -> None:
        """Compare all back-offs with the model's."""
        self.model.settle_all()
        expected = {one.id: self._expected(one) for one in self.model.live()}
        shown = {
            name: (
                *(one.state, one.until, one.probe, self._asking(name, one.order)),
                int(self.records[name].get("since_us", 0)),
                (one.reopened, one.step) if one.state == "REOPENING" else (),
                int(self.records[name].get("repeats", 0)),
                self.records[name]["cause"].decode(),
            )
            for name, one in self.history.shown.items()
        }
        assert shown == expected
        self.history.check({caller for caller in self.history.went if self.model.alive(caller)})

    def _asking(self, name: str, order: list[str]) -> list[str]:
        """Leave out who did not ask for a day: the script may have forgotten it."""
        heard = self.model.back_offs[name].heard if name in self.model.back_offs else {}
        return [one for one in order if self.now - heard.get(one, self.now) < DAY - SECOND]

    def _expected(self, one: BackOff) -> tuple[Any, ...]:
        return (
            *(one.state, one.until, one.probe, self._asking(one.id, one.callers()), one.since),
            (one.reopened, one.step) if one.state == "REOPENING" else (),
            one.repeats,
            one.cause,
        )

    # Waiters -----------------------------------------------------------------

    def _standing(self, asker: Asker, flat: list[Any]) -> tuple[Any, ...]:
        reason, place, length, start, first, shown = flat
        back_off = record(shown)["id"].decode() if shown else ""
        if back_off:
            self.history.waits(asker.request, back_off, int(start))
        start = int(start) if reason == b"BACKING_OFF" else 0
        return reason.decode(), int(place), int(length), int(first), back_off, start

    def _acquire(self, asker: Asker, *, queue: bool = True, age: int = 0) -> Held | None:
        known = self.model.requests.get(asker.request)
        had = bool(known and known.lease)
        status, *values = self._run(
            "acquire",
            *(asker.token, asker.request, asker.fingerprint, "1" if queue else "0", asker.ttl),
            *(f"holder of {asker.request}", asker.secret, age, 0, asker.declared, asker.job),
        )
        self.model.asks[asker.request] = asker.places, asker.job
        ahead = self._eligible_ahead(asker)
        expected = self.model.acquire(
            *(asker.token, asker.request, asker.fingerprint),
            queue=queue,
            ttl=asker.ttl,
            secret=asker.secret,
            age=age,
            known=0,
        )
        answer: tuple[Any, ...] = (status.decode(),)
        held = None
        if status == b"WAITING":
            answer += self._standing(asker, values[0])
        elif status == b"OFFER":
            held = Held(int(values[0]), asker)
            lease = record(values[1])
            answer += held.number, lease["state"].decode(), int(lease["expires_us"])
            if not had:
                assert not ahead, f"{asker.request} passes {ahead}"
                subject = self.model.subject_of(asker.request)
                self.history.goes(self.now, asker.request, [one.id for one in subject])
                self.held.append(held)
        elif status == b"LEASE_ENDED":
            answer += (int(values[0]),)
        assert answer == expected
        self._check()
        return held

    def _eligible_ahead(self, asker: Asker) -> list[str]:
        """List who came before, is there, and has nothing to be quiet for."""
        queue = self.model.tokens[asker.token].queue
        place = queue.index(asker.request) if asker.request in queue else len(queue)
        return [
            other
            for other in queue[:place]
            if self.model._is_live(other) and not self.model.subject_of(other)
        ]

    @rule(
        token=names,
        places=declared,
        job=jobs,
        ttl=st.sampled_from([30 * SECOND, 5 * SECOND, 200 * SECOND]),
        queue=rather,
        accepts=rather,
    )
    def ask(  # noqa: PLR0913 - as many things may differ
        self,
        *,
        token: str,
        places: frozenset[Place],
        job: str,
        ttl: int,
        queue: bool,
        accepts: bool,
    ) -> None:
        """A new client asks for a lease, to run or to wait."""
        asker = Asker(f"r{next(self.counter)}", token, ttl, places, job)
        self.askers.append(asker)
        self.connected.append(asker)
        held = self._acquire(asker, queue=queue)
        if held and accepts:
            self._renew(held)

    @rule(
        whom=st.lists(st.tuples(st.sampled_from([*TOKENS]), declared, jobs), min_size=2, max_size=6)
    )
    def gather(self, whom: list[tuple[str, frozenset[Place], str]]) -> None:
        """Several clients come, to run for long."""
        for token, where, job in whom:
            self.ask(token=token, places=where, job=job, ttl=200 * SECOND, queue=True, accepts=True)

    @property
    def waiting(self) -> list[Asker]:
        """Those that wait, or were offered a lease."""
        requests = self.model.requests
        waits = {name for name, request in requests.items() if request.state != "ended"}
        return [asker for asker in self.askers if asker.request in waits]

    @given("waiting")
    @rule(asker=of("waiting"), age=st.sampled_from([0, 0, 0, 5 * SECOND + 1]), accepts=rather)
    def ask_again(self, asker: Asker, age: int, accepts: bool) -> None:
        """A client polls, or is back."""
        if asker not in self.connected:
            self.connected.append(asker)
        held = self._acquire(asker, age=age)
        if held and accepts:
            self._renew(held)

    @given("waiting")
    @rule(asker=of("waiting"), silently=st.booleans())
    def leave(self, asker: Asker, silently: bool) -> None:
        """A client waits no more; who goes silently and holds a lease lets it run out."""
        if silently:
            self._vanish(asker)
        else:
            self._withdraw(asker)

    def _vanish(self, asker: Asker) -> None:
        self.connected = [other for other in self.connected if other != asker]
        self.followed = [held for held in self.followed if held.asker != asker]

    def _withdraw(self, asker: Asker) -> None:
        [status] = self._run("withdraw", asker.token, asker.request, asker.fingerprint)
        expected = self.model.withdraw(asker.token, asker.request, asker.fingerprint)
        assert (status.decode(),) == expected
        self._check()

    def _tick(self) -> list[Asker]:
        """A replica hears its waiters; return who may go."""
        requests = self.model.requests
        heard = sorted(
            (asker.token, asker.request, asker)
            for asker in self.connected
            if asker.request in requests and requests[asker.request].state == "waiting"
        )
        if not heard:
            return []
        args = [arg for token, request, _ in heard for arg in (token, request, 0)]
        status, groups = self._run("tick", *args)
        assert status == b"OK"
        found = {hash_.decode(): flat for _, _, _, *group in groups for hash_, flat in group}
        answers = [
            self._standing(asker, found[request]) if found[request] else ()
            for _, request, asker in heard
        ]
        assert answers == self.model.tick([(token, request, 0) for token, request, _ in heard])
        self._check()
        return [
            asker
            for (*_, asker), answer in zip(heard, answers, strict=True)
            if answer and not answer[0]
        ]

    # Holders -----------------------------------------------------------------

    def _spoken(self, script: str, held: Held, *args: str | int) -> tuple[Any, ...]:
        reply = self._run(script, held.asker.token, held.number, held.asker.secret, *args)
        answer: tuple[Any, ...] = (reply[0].decode(),)
        if reply[0] == b"OK":
            lease = record(reply[1])
            answer += lease["state"].decode(), int(lease["expires_us"])
        elif reply[0] == b"LEASE_OVER":
            answer += (reply[1].decode(),)
        elif reply[0] == b"LEASE_BROKEN":
            answer += (int(reply[2]),)
        return answer

    @property
    def live(self) -> list[Held]:
        """Those whose lease or offer lives, as far as anybody looked."""
        return [held for held in self.held if self._lease(held)]

    def _lease(self, held: Held) -> bool:
        lease = self.model.tokens[held.asker.token].lease
        return lease is not None and lease.number == held.number

    def _renew(self, held: Held) -> None:
        answer = self._spoken("renew", held, "1", "")
        name = held.asker.token
        assert answer == self.model.renew(name, held.number, held.asker.secret, started=True)
        if answer[0] == "OK" and held not in self.followed:
            self.followed.append(held)
        self._check()

    @given("live")
    @rule(held=of("live"), how=st.sampled_from(["release", "release", "renew", "break"]))
    def hold_on_or_end(self, held: Held, how: str) -> None:
        """A holder accepts or prolongs; its run ends; an operator takes the lease away."""
        if how == "renew":
            self._renew(held)
        elif how == "break":
            self._break(held)
        else:
            self._release(held)

    def _release(self, held: Held) -> None:
        answer = self._spoken("release", held, "0", "")
        assert answer == self.model.release(
            held.asker.token, held.number, held.asker.secret, saw_every=False, age=None
        )
        self._check()

    def _break(self, held: Held) -> None:
        status, *_ = self._run("break", held.asker.token, held.number, "broken")
        assert status.decode() == self.model.break_(held.asker.token, held.number)[0]
        self._check()

    @given("held")
    @rule(held=of("held"))
    def follow(self, held: Held) -> None:
        """A holder asks what it must do; it may be over since long."""
        self._follow([held])

    def _follow(self, followers: list[Held]) -> None:
        if not followers:
            return
        args: list[str | int] = []
        for held in followers:
            args += held.asker.token, held.number, held.asker.secret
        status, answers = self._run("follow", *args)
        assert status == b"OK"
        for held, (_, _, word, *rest) in zip(followers, answers, strict=True):
            name, request = held.asker.token, held.asker.request
            offered = self._lease(held) and self.model.requests[request].state == "offered"
            expected, subject = self.model.follow(name, held.number, held.asker.secret)
            answer: tuple[Any, ...] = (word.decode(),)
            if word == b"OK":
                start, timed, places, *shown = rest
                answer += int(start or 0), int(timed)
                assert places.decode() == held.asker.declared
                assert tuple(record(flat)["id"].decode() for flat in shown) == subject
                if start:
                    self.history.went.pop(request, None)
                elif not offered:
                    self.history.goes(self.now, request, subject)
            elif word == b"LEASE_OVER":
                answer += (rest[0].decode(),)
            elif word == b"LEASE_NOT_FOUND":  # an offer that was taken back is kept an hour
                answer = "LEASE_OVER", "WITHDRAWN"
            assert answer == expected
        self._check()

    def _everybody(self) -> None:
        """All are heard; those that may have a lease take it."""
        for asker in self._tick():
            held = self._acquire(asker)
            if held:
                self._renew(held)
        self._follow(self.followed)

    @rule(us=steps, many=st.sampled_from([1, 1, 2, 5]))
    def attended(self, us: int, many: int) -> None:
        """Time passes while all are heard, and holders prolong their leases."""
        self._attended(us, many)

    def _attended(self, us: int, many: int = 1) -> None:
        for _ in range(many):
            self.now += us
            for held in [held for held in self.followed if self._lease(held)]:
                self._renew(held)
            self._everybody()
        self._somebody_goes()

    def _somebody_goes(self) -> None:
        """See that nobody waits for the mere order of those who could go first.

        While those who were there before a restart are given time to come back, some do.
        """
        if self.now < self.model.recovery_until:
            return
        for name, one in self.history.shown.items():
            if one.state != "PROBING" or one.probe:
                continue
            for held in self.followed:
                lease = self.model.tokens[held.asker.token].lease
                if lease and lease.number == held.number and lease.state == "ACTIVE":
                    subject = self.model.subject_of_lease(held.asker.token, lease)
                    open_ = all(other.state == "PROBING" and not other.probe for other in subject)
                    mine = name in {other.id for other in subject}
                    assert not (mine and open_ and not lease.broken), f"nobody goes first: {name}"

    # Events ------------------------------------------------------------------

    def _record(
        self, event: dict[str, Any], limits: tuple[Limit, ...], token: str = next(iter(TOKENS))
    ) -> str:
        name = f"event-{next(self.counter)}"
        cause = {"job": "a job", "host": "web1", "user": "", "status": 400}
        entry = {
            "id": name,
            "token": token,
            "age_us": 0,
            "count": 1,
            "budgets": specs(limits),
            "shown": "",
            "cause": cause,
            **event,
        }
        status, [word] = self._run("record_events", json.dumps([entry]))
        assert (status, word) == (b"OK", b"COUNTED")
        return name

    @rule(
        token=names,
        place=places,
        count=st.sampled_from([1, 1, 2, 3, 5]),
        age=ages,
        job=jobs,
    )
    def err(self, token: str, place: Place, count: int, age: int, job: str) -> None:
        """A call met an error; it may be told late."""
        self._err(token, place, count, age, [job] if job else [])

    @given("live")
    @rule(held=of("live"), place=places, count=st.sampled_from([1, 3]), age=ages)
    def holder_errs(self, held: Held, place: Place, count: int, age: int) -> None:
        """A call of a holder met an error."""
        job = [held.asker.job] if held.asker.job else []
        token = held.asker.token
        self._err(token, place, count, age, [*job, str(held.number)])

    def _err(
        self, token: str, place: Place, count: int = 1, age: int = 0, touched: Collection[str] = ()
    ) -> None:
        limits = (ERRORS[token, place],)
        error = {"place": place, "touched": list(touched)}
        name = self._record({"age_us": age, "count": count, "error": error}, limits, token)
        at, known = self.now - age, [f"{token}:{who}" for who in touched]
        self.model.record(name, at, count, limits, token, place, known, error=True)
        self._check()

    @rule(token=names, place=places, count=st.sampled_from([1, 2, 4]), age=ages, call=rather)
    def count(self, token: str, place: Place, count: int, age: int, call: bool) -> None:
        """Calls, or requests for access tokens, are counted."""
        limits = (CALLS[place[0]],) if call else (REQUESTS[token],)
        name = self._record({"age_us": age, "count": count}, limits)
        self.model.record(name, self.now - age, count, limits, error=False)
        self._check()

    @rule(
        where=scopes,
        age=ages,
        retry_after=st.sampled_from([None, None, 0, SECOND, 15 * SECOND, DAY]),
        sent_age=st.sampled_from([None, None, 0, SECOND, 8 * SECOND, MINUTE]),
    )
    def block(self, where: Scope, age: int, retry_after: int | None, sent_age: int | None) -> None:
        """The provider blocks; it may name the end, and the call may have begun long ago."""
        self._block(where, age, retry_after, sent_age)

    def _block(
        self,
        where: Scope,
        age: int = 0,
        retry_after: int | None = None,
        sent_age: int | None = None,
    ) -> str:
        at = self.now - age
        name = f"block-{'-'.join(value for _, value in sorted(where))}"
        fields = {"token": "", "division": "", "endpoint": ""} | dict(where)
        told = {
            **fields,
            "id": name,
            "reason": "",
            "retry_after_us": -1 if retry_after is None else retry_after,
            "sent_age_us": -1 if sent_age is None else sent_age,
            "first_us": RULE.first,
            "factor": RULE.factor,
            "most_us": RULE.most,
            "forget_us": RULE.forget,
            "by": "main",
            "for_app": True,
        }
        event = self._record({"age_us": age, "block": told}, ())
        self.model.record(event, at, 1, (), error=False)
        sent = at if sent_age is None else self.now - sent_age
        self.model.block(name, where, at, sent, retry_after, RULE)
        latest = max(self.history.latest.get(name, 0), at + RULE.most)
        self.history.latest[name] = latest
        self._check()
        return name

    # Reservations ------------------------------------------------------------

    @rule(token=names, place=places, ttl=st.sampled_from([5 * SECOND, SECOND, 2 * MINUTE]))
    def reserve(self, token: str, place: Place, ttl: int) -> None:
        """Somebody takes room before a call."""
        name = f"call-{next(self.counter)}"
        limits = (CALLS[place[0]], ERRORS[token, place])
        budgets, caller = json.dumps(specs(limits)), "somebody"
        status, *values = self._run(
            "reserve", name, name, ttl, 1, budgets, caller, token, json.dumps(place)
        )
        reservation = Reservation(caller, 1, limits, self.now, self.now + ttl)
        expected, wait = self.model.reserve(name, reservation, token, place)
        assert status.decode() == expected
        if wait:
            assert (int(values[0]), record(values[1])["id"].decode()) == (wait.start, wait.back_off)
        if expected == "OK":
            self.reserved.append(name)
            subject = self.model.subject_to(token, [place])
            kept = [one.id for one in subject if one.cause != "SPENT"]
            self.history.goes(self.now, f"reservation:{name}", kept)
        self._check()

    @rule(
        token=names, place=places, many=st.sampled_from([1, 3, 4]), off=st.sampled_from([0, -1, 9])
    )
    def overrun(self, token: str, place: Place, many: int, off: int) -> None:
        """Calls outlive their reservations, and count as errors; somebody asks just then."""
        for _ in range(many):
            self.reserve(token, place, 2 * SECOND)
        self.now += 2 * SECOND + off
        self.ask(
            token=token, places=frozenset([place]), job="", ttl=5 * SECOND, queue=True, accepts=True
        )

    @property
    def outstanding(self) -> list[str]:
        """All reservations, and those that hold room a few times more."""
        states = self.model.budgets.reservations
        return self.reserved[-5:] + 3 * [r for r in self.reserved if states[r].state == "reserved"]

    @given("outstanding")
    @rule(name=of("outstanding"), age=ages, status=st.sampled_from([200, 200, 400, 0]), made=rather)
    def commit(self, name: str, age: int, status: int, made: bool) -> None:
        """The call was made, well or not; or it was not."""
        if self.now > self.model.budgets.reservations[name].expires + DAY:
            return
        args = ("1", age, status) if made else ("0", 0, 0)
        word, state, *_ = self._run("commit", name, "somebody", *args)
        expected = self.model.commit(name, age, status) if made else self.model.cancel(name)
        assert (word, state.decode()) == (b"OK", expected)
        self._check()

    # Operators, and time -----------------------------------------------------

    @rule(where=scopes, length=st.sampled_from([10 * SECOND, SECOND, MINUTE, HOUR]))
    def set_back_off(self, where: Scope, length: int) -> None:
        """An operator makes a scope quiet."""
        self._set(where, length)

    def _set(self, where: Scope, length: int) -> str:
        name = f"operator-{'-'.join(value for _, value in sorted(where))}"
        fields = {"token": "", "division": "", "endpoint": ""} | dict(where)
        facts = {**fields, "reason": "because", "user": "ann", "host": "", "job": ""}
        status, _ = self._run("set_back_off", name, length, json.dumps(facts))
        assert status == b"OK"
        self.model.set(name, where, length)
        self._check()
        return name

    @property
    def back_offs(self) -> list[str]:
        """All back-offs that there were."""
        return sorted(self.model.back_offs)

    @given("back_offs")
    @rule(name=of("back_offs"))
    def clear(self, name: str) -> None:
        """An operator ends a back-off, or makes its budget forget what it counted."""
        limit = next((limit for limit in SCOPES if limit.id == name), None)
        if limit and self._reset(limit):
            return
        status, *_ = self._run("clear_back_off", name, "because", "ann")
        assert status.decode() == self.model.clear(name)
        self._check()

    def _reset(self, limit: Limit) -> bool:
        status, *_ = self._run("reset_budget", limit.id, "ann", "because")
        if status == b"OK":
            self.model.reset(limit)
        else:
            assert not self.model.budgets.used(limit, self.now)
        self._check()
        return bool(status == b"OK")

    @rule(us=steps | st.sampled_from([HOUR, DAY, 7 * DAY]))
    def time_passes(self, us: int) -> None:
        """Time passes with nobody there, and the sweeper comes by; for days nobody waits."""
        for asker in self.waiting if us >= HOUR else []:
            self._withdraw(asker)
        self.now += us
        self._sweep()

    def _sweep(self) -> None:
        assert self._run("sweep", 100) == [b"OK"]
        self._check()

    @precondition(lambda self: self.model.instants(self.now))
    @rule(data=st.data(), off=st.sampled_from([0, -1, 1]), everybody=st.booleans())
    def time_passes_to_a_boundary(self, data: st.DataObject, off: int, everybody: bool) -> None:
        """It is the very instant at which something changes, or 1 µs beside it."""
        instant = data.draw(st.sampled_from(self.model.instants(self.now)[:16]), label="instant")
        for asker in self.waiting if instant - self.now > HOUR else []:
            self._withdraw(asker)
        self.now = max(self.now, instant + off)
        if everybody:
            self._everybody()
        else:
            self._sweep()

    # A back-off from its beginning to its end ---------------------------------

    @rule(
        begins=st.sampled_from(["blocked", "blocked", "spent", "set", "as it is"]),
        where=scopes,
        meets=st.lists(
            st.sampled_from(
                ["an error", "an older error", "an error elsewhere", "a minute", "another back-off"]
            ),
            max_size=2,
        ),
        ends=st.sampled_from(["well", "well", "a minute", "silently", "broken", "cleared"]),
        returns=st.booleans(),
    )
    def live_through(
        self, *, begins: str, where: Scope, meets: list[str], ends: str, returns: bool
    ) -> None:
        """All keep a back-off; one goes first; the others follow, each at its instant."""
        name = self._begin(begins, where)
        self._everybody()
        if one := self.history.shown.get(name):
            self.now = max(self.now, one.until)
            self._attended(0)
            for _ in range(1 + returns):
                self._probe(name, meets, ends)
                self._attended(SECOND)
            self._reopen(name)

    def _begin(self, begins: str, where: Scope) -> str:
        if begins == "spent":
            token = dict(where).get("token", "main")
            self._err(token, ("1", "crm"), count=3)
            return ERRORS[token, ("1", "crm")].id
        if begins == "as it is":
            return next(iter(self.history.shown), "")
        if begins == "set":
            return self._set(where, 10 * SECOND)
        return self._block(where)

    def _probe(self, name: str, meets: list[str], ends: str) -> None:
        """Let who goes first meet something, and end."""
        one = self.history.shown.get(name)
        first = [held for held in self.live if one and held.asker.request == one.probe]
        if not one or not first:
            return
        token = first[0].asker.token
        for what in meets:
            self._attended(SECOND)
            if what == "a minute":
                self._attended(30 * SECOND, 1)
            elif what == "another back-off":
                self._set(scope(token), SECOND)
            elif what == "an error elsewhere":
                self._err(token, ("2", "sales"))
            else:
                self._err(token, ("1", "crm"), age=SECOND if "older" in what else 0)
        if ends == "well":
            self._release(first[0])
        elif ends == "a minute":
            self._attended(20 * SECOND, 3)
        elif ends == "silently":
            self._vanish(first[0].asker)
            self.now += first[0].asker.ttl
        elif ends == "broken":
            self._break(first[0])
            self._release(first[0])
        else:
            self.clear(name)

    def _reopen(self, name: str) -> None:
        """Those who follow ask at their starts, and go one by one."""
        steps_ = 0
        while (one := self.history.shown.get(name)) and one.state == "REOPENING":
            steps_ += 1
            if steps_ > len(one.order) + 1:
                break
            before = dict(self.history.went)
            self.now = max(self.now, one.reopened + steps_ * one.step)
            self._everybody()
            self._sweep()
            new = [
                caller
                for caller, (_, names_) in self.history.went.items()
                if caller not in before and name in names_
            ]
            assert len(new) <= 1, f"{new} go on within a step"


@pytest.mark.timeout(LIMIT_SECONDS)
def test_the_back_off_scripts_do_what_the_model_says(valkey: Server) -> None:
    """Promise 7 holds in whatever order things happen."""
    with redis.Redis.from_url(valkey.url) as client:
        BackOffMachine.store = Store(client)
        run_state_machine_as_test(
            BackOffMachine,
            settings=settings(
                max_examples=examples(15),
                stateful_step_count=40,
                deadline=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
