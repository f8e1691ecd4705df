"""The scripts on a real Valkey against `shared_model.py`: leases on a token in custody.

As in `test_lease_machine.py`, with a clock that the test sets. After each step the answer, the live
leases with their ends, the state of every lease, the queue, and everything that a lease must not
move are compared: the last refresh and not-before of the token and of its grant, and the lock.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from holdoff_coordinator import scripts
from holdoff_coordinator.custody.records import PutGrant
from holdoff_coordinator.records import record
from tests.model.model import LIVE, OFFER, OUTAGE, PLACE_KEPT, SECOND, Answer
from tests.model.shared_model import SharedModel
from tests.model.test_lease_machine import (
    BEGIN,
    LIMIT_SECONDS,
    QUARANTINE,
    Store,
    examples,
    given,
    of,
    rather,
)

if TYPE_CHECKING:
    from tests.conftest import Server

INTERVAL = 3600 * SECOND
TTLS = (4 * SECOND, 10 * SECOND, SECOND)
NAME = "main"


class SharedMachine(RuleBasedStateMachine):
    """A token in custody, and its clients."""

    store: ClassVar[Store]
    apps: ClassVar = (f"shared-{os.getpid()}-{number}" for number in itertools.count())

    def __init__(self) -> None:
        super().__init__()
        self.app = next(self.apps)
        self.shard = scripts.shard_key(self.app)
        self.now = BEGIN
        self.epoch = ""
        self.askers: dict[str, int] = {}
        """All requests, and the TTL of each."""
        self.connected: set[str] = set()
        self.fixed: Any = None
        self.counter = itertools.count(1)

    def teardown(self) -> None:
        """Clean up."""
        if keys := self.store.client.keys(f"*{{{self.app}}}*"):
            self.store.client.delete(*keys)

    # Running a script --------------------------------------------------------

    def _call(self, script: str, *args: str | int | bytes) -> list[Any]:
        header = (self.now, self.epoch, f"epoch-{next(self.counter)}", QUARANTINE, "", "")
        self.store.client.set(f"{self.shard}:test-clock", self.now)
        reply: Any = self.store.client.evalsha(
            self.store.sha[script], 1, self.shard, *header, *args
        )
        self.epoch = reply[1].decode() or self.epoch
        return list(reply[4:])

    def _kept(self) -> list[Any]:
        """Read what no lease may move."""
        with self.store.client.pipeline() as pipe:
            for kind in ("token", "grant"):
                pipe.hmget(
                    f"{self.shard}:{kind}:{NAME}",
                    ["last_refresh_us", "not_before_us", "refreshed_us", "lease"],
                )
            pipe.hget(self.shard, "hold_us")
            pipe.get(f"lock:{scripts.lock_name(self.app, NAME)}")
            return list(pipe.execute())

    def _check(self) -> None:
        model = self.model
        with self.store.client.pipeline() as pipe:
            pipe.zrange(f"{self.shard}:shared:{NAME}", 0, -1, withscores=True)
            pipe.zrange(f"{self.shard}:queue:{NAME}", 0, -1)
            for number in model.runs:
                pipe.hget(f"{self.shard}:lease:{NAME}:{number}", "state")
            live, queue, *states = pipe.execute()
        assert {int(one): int(end) for one, end in live} == model.live
        assert len(live) <= model.most
        assert [one.decode() for one in queue] == model.queue
        assert [one.decode() for one in states] == [one.state for one in model.runs.values()]
        assert self._kept() == self.fixed

    # Clients -----------------------------------------------------------------

    @initialize(most=st.sampled_from([1, 2, 3]))
    def begin(self, most: int) -> None:
        """There is a token in custody."""
        self.model = SharedModel(most, self.now)
        rules = ("policy", "", "", INTERVAL, "END", 600 * SECOND, "")
        assert self._call("create_token", NAME, *rules) == [b"OK"]
        grant = PutGrant(
            token=NAME,
            chain="c",
            generation=1,
            sealed_grant="sealed",
            facts="{}",
            fingerprint="f",
            age_us=0,
            idle_us=0,
            takeover_us=1,
        )
        self._call("put_grant", msgspec.msgpack.encode(grant))
        self.fixed = self._kept()

    def _acquire(self, name: str, *, queue: bool = True) -> Answer:
        ttl = self.askers[name]
        reply = self._call(
            "acquire",
            *(NAME, name, name, "1" if queue else "0", ttl, "holder", f"secret of {name}", 0, 0),
            *("", "", 10_000, "", self.model.most),
        )
        answer: Answer = (reply[0].decode(),)
        if answer == ("WAITING",):
            answer += (reply[1][0].decode(),)
        else:
            answer += (int(reply[1]),)
        fencing = self.model.fencing
        assert answer == self.model.acquire(name, ttl, queue=queue)
        if self.model.fencing > fencing:
            assert record(reply[2])["mode"] == b"SHARED"
        self._check()
        return answer

    @rule(ttl=st.sampled_from(TTLS), queue=rather, vanishes=st.booleans(), accept=rather)
    def ask(self, ttl: int, queue: bool, vanishes: bool, accept: bool) -> None:
        """A new client asks; most accept an offer at once."""
        self._ask(ttl, queue=queue, vanishes=vanishes, accept=accept)

    def _ask(self, ttl: int, *, accept: bool, queue: bool = True, vanishes: bool = False) -> None:
        name = f"r{next(self.counter)}"
        self.askers[name] = ttl
        if not vanishes:
            self.connected.add(name)
        answer = self._acquire(name, queue=queue)
        if answer[0] == "OFFER" and accept:
            self._renew(int(answer[1]))

    @rule(accepted=st.lists(st.booleans(), min_size=2, max_size=4))
    def crowd(self, accepted: list[bool]) -> None:
        """Several clients ask at the same instant."""
        for accept in accepted:
            self._ask(10 * SECOND, accept=accept)

    @given("askers")
    @rule(name=of("names"), queue=rather, accept=rather)
    def ask_again(self, name: str, queue: bool, accept: bool) -> None:
        """A client polls, retries, or is back after it vanished."""
        self.connected.add(name)
        answer = self._acquire(name, queue=queue)
        if answer[0] == "OFFER" and accept:
            self._renew(int(answer[1]))

    @property
    def names(self) -> list[str]:
        """All that ever asked, and those that wait a few times more."""
        return list(self.askers) + self.model.queue * 4

    @given("askers")
    @rule(name=of("names"))
    def withdraw(self, name: str) -> None:
        """A client waits no more."""
        assert self._call("withdraw", NAME, name, name) == [b"OK"]
        self.model.withdraw(name)
        self._check()

    @property
    def numbers(self) -> list[int]:
        """All leases, and those that live a few times more."""
        return list(self.model.runs) + list(self.model.live) * 4 if hasattr(self, "model") else []

    def _spoken(self, script: str, number: int, *args: str | int) -> Answer:
        status, *facts = self._call(script, NAME, number, *args)
        answer: Answer = (status.decode(),)
        if answer == ("OK",):
            answer += (record(facts[0])["state"].decode(),)
        elif answer == ("LEASE_OVER",):
            answer += (facts[0].decode(),)
        return answer

    def _secret(self, number: int) -> str:
        return f"secret of {self.model.runs[number].request}"

    def _renew(self, number: int) -> None:
        answer = self._spoken("renew", number, self._secret(number), "1", 0, "")
        assert answer == self.model.renew(number)
        if answer[0] == "OK":
            self.connected.discard(self.model.runs[number].request)
        self._check()

    @given("numbers")
    @rule(number=of("numbers"))
    def renew(self, number: int) -> None:
        """A holder accepts or prolongs; it reports a refresh, which counts for nothing."""
        self._renew(number)

    @given("numbers")
    @rule(number=of("numbers"), unused=st.booleans())
    def release(self, number: int, unused: bool) -> None:
        """A holder ends its lease or turns down an offer; it reports a refresh, too."""
        words = (self._secret(number), "1", 0, "1" if unused else "0")
        assert self._spoken("release", number, *words) == self.model.release(number)
        self._check()

    @given("numbers")
    @rule(number=of("numbers"))
    def break_lease(self, number: int) -> None:
        """An operator takes a lease away."""
        answer = self._spoken("break", number, "broken", "operator")
        assert answer == self.model.break_(number)
        self._check()

    # Time --------------------------------------------------------------------

    def _look(self) -> None:
        self._call("read", NAME)
        self.model.look(self.now)

    def _pass(self, us: int) -> None:
        """Let time pass; somebody looks every two seconds, and hears who is connected."""
        end = self.now + us
        while self.now < end:
            self.now = min(end, self.now + OUTAGE)
            self._look()
            heard = sorted(self.connected & self.model.requests.keys())
            if heard:
                self._call("tick", *(word for name in heard for word in (NAME, name, 0)))
            for name in heard:
                self.model.hear(name)
        self._check()

    @rule(us=st.sampled_from([1, 300_000, SECOND, OFFER - 1, OFFER, LIVE, LIVE + 1, PLACE_KEPT]))
    def time_passes(self, us: int) -> None:
        """Offers lapse, leases expire, silent waiters are passed over."""
        self._pass(us)

    @given("numbers")
    @rule(number=of("numbers"), off=st.sampled_from([0, -1, 1]))
    def time_passes_to_an_end(self, number: int, off: int) -> None:
        """It is the very instant at which a lease runs out, or 1 µs beside it."""
        self._pass(max(0, self.model.runs[number].expires + off - self.now))


@pytest.mark.timeout(LIMIT_SECONDS)
def test_shared_leases_do_what_the_model_says(valkey: Server) -> None:
    """As many as the policy allows, first come, first served; none moves an instant of the token.

    Fails when a lease too many is offered, a waiter is passed by a later one, a place in the number
    is not given back, or an end begins a cooldown.
    """
    with redis.Redis.from_url(valkey.url) as client:
        SharedMachine.store = Store(client)
        run_state_machine_as_test(
            SharedMachine,
            settings=settings(
                max_examples=examples(10),
                stateful_step_count=40,
                deadline=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
