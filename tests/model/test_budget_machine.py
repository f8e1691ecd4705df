"""The real budget scripts on a real Valkey against `budget_model.py`.

The scripts run as the coordinator puts them together, with the time read from a key that the
test sets, and with small bounds. Expiries of keys follow the test's clock too: between two
scripts they are frozen, and a key whose time has come is deleted. So a key that lives too short
loses what it held, and one that lives too long is found at the end.

After each step all budgets are compared with the model's: exactly where the log is exact, else
within the bounds that are promised for slices. `History` checks, without the model's arithmetic,
that those who reserve never exceed a limit together.

Left out are limits that change while something is counted, and errors kept for people.

`HOLDOFF_MODEL_EXAMPLES=20000` makes it a long run. A failure prints its steps, and a
`@reproduce_failure(…)` to put on `BudgetMachine`.

Each of these breaks of the scripts was made once, and seen to fail here:
an event leaves too early or too late, counts twice, counts although it is too old, or counts as
one; its id is forgotten by a reset, too early, or never. Margin, reservations, or all budgets but
the first are ignored; a refusal leaves something; a retry reserves again, or for another request.
A reservation that expires is dropped, or counts from the look; a late commit adds an event, moves
it back or again, takes others along, or undoes a reset; a late cancel takes it out; another caller
settles it. A commit counts errors by no status, or not where none is known; it is counted before
its room was taken, or not after a cancel; room is given back in part, or by a reset. Slices count
from their beginning, or too long; logs grow without bound, or keep what left. Room is announced
too early, without reservations, or without counts. Keys expire while they hold something, one
without the other, or never. Ids have no bound. And boundaries lie 1 µs off.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from holdoff_coordinator import scripts
from holdoff_coordinator.records import record
from tests.model.budget_model import (
    DAY,
    IDS_MOST,
    LOG_MOST,
    SECOND,
    Grant,
    History,
    Limit,
    Model,
    Reservation,
)
from tests.model.test_lease_machine import LIMIT_SECONDS, examples

if TYPE_CHECKING:
    from tests.conftest import Server

BEGIN = 1_800_000_000 * SECOND
ENDPOINTS = ("a", "b", "c", "d")
CALLS = (
    Limit("calls", "CALL", most=6, margin=1, window=10 * SECOND),
    Limit("daily", "CALL", most=15, margin=2, window=20 * SECOND, grain=3 * SECOND),
)
ERRORS = {
    name: Limit(f"errors-{name}", "ERROR", 4, 1, 30 * SECOND, statuses=(400, 404))
    for name in ENDPOINTS
}
LIMITS = (*CALLS, *ERRORS.values())
LONGEST = max(limit.window for limit in LIMITS)

PLACE = ("main", json.dumps(["", ""]))
"""Token and place of a reservation, which only back-offs look at."""


class Store:
    """The scripts on a Valkey, with a clock that the test sets."""

    CHANGES: ClassVar = {
        "local time = redis.call('TIME')\n": (
            "local time = {0, redis.call('GET', SHARD .. ':test-clock')}\n"
        ),
        "local LOG_MOST = 2000 ": f"local LOG_MOST = {LOG_MOST} ",
        "local IDS_MOST = 500000 ": f"local IDS_MOST = {IDS_MOST} ",
    }
    # Sets the clock; keys live for what is left of their time, if anything is.
    THAW = """
        local deadlines = redis.call('HGETALL', KEYS[1] .. ':test-deadlines')
        redis.call('DEL', KEYS[1] .. ':test-deadlines')
        redis.call('SET', KEYS[1] .. ':test-clock', ARGV[1])
        for i = 1, #deadlines, 2 do
            local left = math.ceil((tonumber(deadlines[i + 1]) - tonumber(ARGV[1])) / 1000)
            if left > 0 then
                redis.call('PEXPIRE', deadlines[i], left)
            else
                redis.call('DEL', deadlines[i])
            end
        end
    """
    # Notes until when keys live, and lets them live until the next script.
    FREEZE = """
        for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':*')) do
            local left = redis.call('PTTL', key)
            if left >= 0 then
                local deadline = string.format('%.0f', tonumber(ARGV[1]) + left * 1000)
                redis.call('HSET', KEYS[1] .. ':test-deadlines', key, deadline)
                redis.call('PERSIST', key)
            end
        end
    """

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.sha = {name: client.script_load(self.source(name)) for name in scripts.BUDGET_SCRIPTS}
        self.thaw = client.script_load(self.THAW)
        self.freeze = client.script_load(self.FREEZE)

    def source(self, name: str) -> str:
        """Return the text of a script, with what the test changes."""
        text = scripts.source(name)
        for real, change in self.CHANGES.items():
            assert text.count(real) == 1, f"the scripts no longer say {real}"
            text = text.replace(real, change)
        return text

    def run(self, shard: str, now: int, script: str, *args: str | int) -> list[Any]:
        """Run a script at this instant."""
        with self.client.pipeline() as pipe:
            pipe.evalsha(self.thaw, 1, shard, now)
            pipe.evalsha(self.sha[script], 1, shard, "", "", "none", 0, "", "", *args)
            pipe.evalsha(self.freeze, 1, shard, now)
            _, answer, _ = pipe.execute()
        assert int(answer[0]) == now
        return list(answer[4:])

    def wait(self, shard: str, now: int) -> dict[bytes, Any]:
        """Let time pass with nobody there; return what is left."""
        self.client.evalsha(self.thaw, 1, shard, now)
        return self.keys(shard)

    def keys(self, shard: str) -> dict[bytes, Any]:
        """Return all that is kept of an app, apart from what only the test needs."""
        found: Any = self.client.keys(f"{shard}:*")
        return {key: self.client.dump(key) for key in found if b":test-" not in key}


def spec(limit: Limit) -> dict[str, Any]:
    """Describe a budget to the scripts."""
    return {
        "id": limit.id,
        "limit": limit.id,
        "kind": limit.kind,
        "most": limit.most,
        "margin": limit.margin,
        "window_us": limit.window,
        "grain_us": limit.grain,
        "statuses": limit.statuses,
        "token": "",
        "division": "",
        "endpoint": "",
    }


def specs(limits: tuple[Limit, ...]) -> list[dict[str, Any]]:
    """Describe budgets to the scripts."""
    return [spec(limit) for limit in limits]


endpoints = st.sampled_from(["a"] * 5 + ["b", "c", "d"])  # mostly one, so that much happens to it
counts = st.sampled_from([1] * 6 + [2, 3])
ages = st.sampled_from([0] * 5 + [1, SECOND, 5 * SECOND, 10 * SECOND, 10 * SECOND + 1, DAY])
statuses = st.sampled_from([400, 200, 404, 500, 0])
callers = st.sampled_from(["us"] * 6 + ["them"])
limits = st.sampled_from(LIMITS)


def of(attribute: str) -> st.SearchStrategy[Any]:
    """Draw from what the machine has made so far."""
    return st.runner().flatmap(lambda machine: st.sampled_from(getattr(machine, attribute)))


class BudgetMachine(RuleBasedStateMachine):
    """One app with two budgets of all calls, and one of errors an endpoint."""

    store: ClassVar[Store]
    apps: ClassVar = (f"budgets-{os.getpid()}-{number}" for number in itertools.count())

    def __init__(self) -> None:
        super().__init__()
        self.shard = scripts.shard_key(next(self.apps))
        self.now = BEGIN
        self.model, self.history = Model(), History()
        self.reported: list[tuple[str, tuple[Limit, ...]]] = []
        self.asked: list[tuple[str, int, int, str]] = []
        self.counter = itertools.count(1)

    def teardown(self) -> None:
        """See that those who reserved kept the limits, and that in the end nothing is left."""
        for limit in LIMITS:
            self.history.check(limit, self.now)
        self.now += 2 * DAY + 2 * LONGEST + 3600 * SECOND
        left = self.store.wait(self.shard, self.now)
        self.store.client.delete(*self.store.client.keys(f"{self.shard}:*"))
        for stream in ("audit", "security"):
            left.pop(f"{self.shard}:{stream}".encode(), None)
        assert not left, "something is kept for ever"

    def _run(self, script: str, *args: str | int) -> list[Any]:
        self.model.settle(self.now)
        for name, reservation in self.model.reservations.items():
            if reservation.state == "expired" and name in self.history.grants:
                grant = self.history.grants[name]
                if not grant.settled:
                    grant.at, grant.settled = reservation.expires, True
        return self.store.run(self.shard, self.now, script, *args)

    def _look(self) -> dict[Limit, tuple[int, int, int]]:
        """Compare all budgets with the model's; return used, reserved and when there is room."""
        status, entries = self._run("read_budgets", *(limit.id for limit in LIMITS))
        assert status == b"OK"
        shown = {name.decode(): (record(flat), int(room)) for name, flat, room in entries}
        found = {}
        for limit in LIMITS:
            flat, room_at = shown.get(limit.id, ({}, self.now))
            used, reserved = int(flat.get("used", 0)), int(flat.get("reserved", 0))
            found[limit] = used, reserved, room_at
            if flat:
                assert self.model.touched_until[limit] > self.now, f"{limit.id} is kept for ever"
            assert reserved == self.model.reserved(limit), f"{limit.id}: reserved"
            longer = self.model.slice_of(limit)
            least, most = (self.model.used(limit, self.now, more) for more in (0, longer))
            assert least <= used <= most, f"{limit.id}: used"
            room = limit.most - limit.margin - used - reserved
            assert (room_at == self.now) == (room >= 1), f"{limit.id}: room"
            if not longer:
                assert room_at == self.model.room_at(limit, self.now, 1), f"{limit.id}: room at"
        self._check_size()
        return found

    def _check_size(self) -> None:
        """See that logs stay small, and keep nothing of what left."""
        with self.store.client.pipeline() as pipe:
            for limit in LIMITS:
                pipe.zrange(f"{self.shard}:log:{limit.id}", 0, -1)
                pipe.hkeys(f"{self.shard}:weights:{limit.id}")
            answers = iter(pipe.execute())
        for limit, log, weights in zip(LIMITS, answers, answers, strict=False):
            slices = [entry for entry in log if entry.startswith(b"until:")]
            assert len(slices) <= limit.window // (limit.grain or SECOND) + 2, f"{limit.id}: slices"
            assert len(log) - len(slices) <= LOG_MOST * (not limit.grain), f"{limit.id}: log"
            assert set(weights) <= set(log), f"{limit.id}: weights"

    # Reports -----------------------------------------------------------------

    def _record(self, events: list[tuple[str, int, int, tuple[Limit, ...]]]) -> None:
        batch = [
            {
                "id": name,
                "token": PLACE[0],
                "age_us": age,
                "count": count,
                "budgets": specs(of_them),
                "shown": "",
                "cause": {},
            }
            for name, age, count, of_them in events
        ]
        status, answers = self._run("record_events", json.dumps(batch))
        assert status == b"OK"
        for (name, age, count, of_them), word in zip(events, answers, strict=True):
            expected = self.model.record(self.now, name, self.now - age, count, of_them)
            assert word.decode() == expected
        self._look()

    @rule(
        endpoint=endpoints,
        age=ages,
        count=counts,
        calls=st.booleans(),
        many=st.sampled_from([1, 1, 1, 2, 4, 12]),
    )
    def report(self, endpoint: str, age: int, count: int, calls: bool, many: int) -> None:
        """Events are reported, some late, some in bulk."""
        counting: tuple[Limit, ...] = CALLS if calls else (ERRORS[endpoint],)
        events = []
        for _ in range(many):
            self.reported.append((f"event-{next(self.counter)}", counting))
            events.append((self.reported[-1][0], age, count, counting))
        self._record(events)

    @precondition(lambda self: self.reported)
    @rule(event=of("reported"), age=ages, count=counts, twice=st.booleans())
    def report_again(
        self, event: tuple[str, tuple[Limit, ...]], age: int, count: int, twice: bool
    ) -> None:
        """A report is retried, or is twice in one batch."""
        self._record([(event[0], age, count, event[1])] * (1 + twice))

    # Reservations ------------------------------------------------------------

    @rule(
        endpoint=endpoints,
        ttl=st.sampled_from([SECOND, 5 * SECOND, 20 * SECOND, 3600 * SECOND]),
        count=counts,
        caller=callers,
        many=st.sampled_from([1, 1, 2, 3, 5]),
    )
    def reserve(self, endpoint: str, ttl: int, count: int, caller: str, many: int) -> None:
        """Room is taken, if every budget has it; what is refused leaves nothing."""
        for _ in range(many):
            self.asked.append((f"call-{next(self.counter)}", ttl, count, caller))
            self._reserve(self.asked[-1], endpoint)

    def _reserve(self, asked: tuple[str, int, int, str], endpoint: str) -> None:
        name, ttl, count, caller = asked
        counting = (*CALLS, ERRORS[endpoint])
        found = self._look()
        before = self.store.keys(self.shard)
        status, *values = self._run(
            "reserve",
            name,
            f"{caller} {ttl} {count}",
            ttl,
            count,
            json.dumps(specs(counting)),
            caller,
            *PLACE,
        )
        if status == b"OK":
            assert self.model.may_count(self.now)
            assert [values[0], int(values[1])] == [b"reserved", self.now + ttl]
            for limit in counting:
                used, reserved, _ = found[limit]
                assert used + reserved + count <= limit.most - limit.margin
            self.model.reserve(name, Reservation(caller, count, counting, self.now, self.now + ttl))
            self.history.grants[name] = Grant(self.now, count, frozenset(counting))
            self._look()
            return
        self.asked.remove(asked)
        after = self.store.keys(self.shard)
        # The index loses what is over, and back-offs that whoever looks finds to be over end.
        looked_at = re.compile(rb":(budgets|backoff.*|moved|ids:.*)$")
        for kept in (before, after):
            for key in filter(looked_at.search, list(kept)):
                del kept[key]
        assert before == after
        if status == b"TOO_MANY_EVENTS":
            assert not self.model.may_count(self.now)
        else:
            assert status == b"BUDGET_SPENT"
            spent = {entry[0].decode(): int(entry[2]) for entry in values[0]}
            for limit in counting:
                used, reserved, _ = found[limit]
                is_spent = used + reserved + count > limit.most - limit.margin
                assert is_spent == (limit.id in spent)
                if is_spent and not self.model.slice_of(limit):
                    assert spent[limit.id] == self.model.room_at(limit, self.now, count)

    def _remembered(self, name: str) -> bool:
        return self.now < self.model.reservations[name].expires + DAY

    @precondition(lambda self: self.asked)
    @rule(asked=of("asked"), endpoint=endpoints, changed=st.booleans())
    def reserve_again(self, asked: tuple[str, int, int, str], endpoint: str, changed: bool) -> None:
        """A request is retried, or its id is used for another one."""
        name, ttl, count, caller = asked
        if not self._remembered(name):
            return
        fingerprint = f"{caller} {ttl} {count}" + " other" * changed
        budgets = json.dumps(specs((*CALLS, ERRORS[endpoint])))
        answer = self._run("reserve", name, fingerprint, ttl, count, budgets, caller, *PLACE)
        reservation = self.model.reservations[name]
        if changed:
            assert answer == [b"RESERVATION_ID_REUSED"]
        else:
            assert answer[:2] == [b"OK", reservation.state.encode()]
            assert int(answer[2]) == reservation.expires
        self._look()

    @precondition(lambda self: self.asked)
    @rule(asked=of("outstanding"), age=ages, status=statuses, right=st.sampled_from([1, 1, 1, 0]))
    def commit(self, asked: tuple[str, int, int, str], age: int, status: int, right: int) -> None:
        """A call was made: once, twice, after a cancel, too late, or by somebody else."""
        name, caller = asked[0], asked[3] if right else "somebody"
        if not self._remembered(name):
            return
        answer = self._run("commit", name, caller, "1", age, status)
        reservation, grant = self.model.reservations[name], self.history.grants[name]
        before, moved = reservation.state, reservation.moved
        self._settled(answer, name, self.model.commit(self.now, name, caller, age, status))
        at = max(self.now - age, reservation.made)
        if right and before == "reserved":
            grant.at, grant.settled = at, True
            grant.limits = frozenset(limit for limit in grant.limits if limit.counts(status))
        elif right and before == "expired" and not moved:
            # A call that outlives its reservation by a window was not counted for a while.
            shortest = min(limit.window for limit in reservation.limits)
            if self.now <= reservation.expires + shortest:
                grant.at = max(grant.at, at)

    @rule(
        endpoint=endpoints,
        counts=st.lists(counts, min_size=1, max_size=3),
        late=st.sampled_from([0, 1, SECOND, 3 * SECOND, 10 * SECOND, 40 * SECOND]),
        age=ages,
        status=statuses,
    )
    def overrun(self, endpoint: str, counts: list[int], late: int, age: int, status: int) -> None:
        """Calls outlive their reservations, and one is committed late."""
        for count in counts:
            self.reserve(endpoint, SECOND, count, "us", 1)
        self.time_passes(SECOND + late)
        if self.asked:
            self.commit(self.asked[-1], age, status, right=1)

    @precondition(lambda self: self.asked)
    @rule(asked=of("outstanding"), right=st.sampled_from([1, 1, 1, 0]))
    def cancel(self, asked: tuple[str, int, int, str], right: int) -> None:
        """A call was not made; said once, twice, too late, or by somebody else."""
        name, caller = asked[0], asked[3] if right else "somebody"
        if not self._remembered(name):
            return
        answer = self._run("commit", name, caller, "0", 0, 0)
        before = self.model.reservations[name].state
        self._settled(answer, name, self.model.cancel(name, caller))
        if right and before == "reserved":
            self.history.grants[name].limits = frozenset()

    def _settled(self, answer: list[Any], name: str, expected: str) -> None:
        if expected == "RESERVATION_NOT_FOUND":
            assert answer == [expected.encode()]
        else:
            assert answer[:2] == [b"OK", expected.encode()]
            assert int(answer[2]) == self.model.reservations[name].expires
        self._look()

    @property
    def outstanding(self) -> list[tuple[str, int, int, str]]:
        """All requests, and those that hold room a few times more."""
        live = {"reserved", "expired"}
        return self.asked + 4 * [
            asked for asked in self.asked if self.model.reservations[asked[0]].state in live
        ]

    # Operators, and time -----------------------------------------------------

    @rule(limit=limits)
    def reset(self, limit: Limit) -> None:
        """An operator makes a budget forget what it counted."""
        found = self._look()
        status, *values = self._run("reset_budget", limit.id, "an operator", "it is mended")
        if status == b"BUDGET_NOT_FOUND":
            assert found[limit][:2] == (0, 0)
            return
        assert status == b"OK"
        assert record(values[0][1])["used"] == b"0"
        self.history.check(limit, self.now)
        self.history.forget(limit)
        self.model.reset(limit)
        assert self._look()[limit][0] == 0

    @rule(us=st.sampled_from([SECOND, 1, 300_000, 3 * SECOND, 10 * SECOND, 40 * SECOND, DAY]))
    def time_passes(self, us: int) -> None:
        """Time passes."""
        self.now += us
        self._look()

    @precondition(lambda self: self.model.instants(self.now))
    @rule(data=st.data(), off=st.sampled_from([0, -1, 1]))
    def time_passes_to_a_boundary(self, data: st.DataObject, off: int) -> None:
        """It is the very instant at which something changes, or 1 µs beside it."""
        instant = data.draw(st.sampled_from(self.model.instants(self.now)[:12]), label="instant")
        self.now = max(self.now, instant + off)
        self._look()

    @rule(limit=limits)
    def wait_for_room(self, limit: Limit) -> None:
        """Room appears at the instant that was told, and not before, if nothing happens."""
        if limit in self.model.overflowed:
            return
        room_at = self._look()[limit][2]
        if room_at > self.now:
            self.now = room_at - 1
            assert self._look()[limit][2] == room_at
            self.now = room_at
            assert self._look()[limit][2] == room_at


@pytest.mark.timeout(LIMIT_SECONDS)
def test_the_budget_scripts_do_what_the_model_says(valkey: Server) -> None:
    """Promise 6 holds in whatever order things happen."""
    with redis.Redis.from_url(valkey.url) as client:
        BudgetMachine.store = Store(client)
        run_state_machine_as_test(
            BudgetMachine,
            settings=settings(
                max_examples=examples(15),
                stateful_step_count=40,
                deadline=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
