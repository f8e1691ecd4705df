"""A store in trouble says which, and one damaged record harms nothing but itself."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import grpc
import pytest
import redis
import structlog

from holdoff._core import duration
from holdoff._status import from_rpc_error
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
    token_service_pb2,
)
from holdoff_coordinator import hub, leases, seldom, sweeper
from tests.harness import (
    Follower,
    Replica,
    Waiter,
    ask,
    end_cooldown,
    refusal,
    request_hash,
    token_to_create,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdoff import HoldoffError
    from tests.conftest import StartValkey

ENDPOINT = "/api/v1/1/crm/Accounts"


@pytest.fixture
def server(start_valkey: StartValkey) -> Iterator[tuple[Replica, redis.Redis]]:
    """Give a coordinator with metrics, on a store that the test may break."""
    url = start_valkey().url
    with redis.Redis.from_url(url) as store, Replica(url, metrics_listen="127.0.0.1:0") as replica:
        yield replica, store


def metrics(replica: Replica) -> dict[str, float]:
    """Return what the coordinator counted, by name and labels."""
    with urlopen(f"http://{replica.coordinator.metrics_address}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }


def shard(token: str) -> str:
    """Return the first key of a token's app."""
    return f"holdoff:{{{token.split('/')[1]}}}"


TROUBLES: list[tuple[str, str, Callable[[redis.Redis, str], Any]]] = [
    ("STORE_OUT_OF_MEMORY", "out of memory", lambda store, _: store.config_set("maxmemory", 1)),
    ("STORE_READ_ONLY", "read-only", lambda store, _: store.replicaof("127.0.0.1", 1)),
    (
        "STORE_NOT_WRITABLE",
        "too few replicas",
        lambda store, _: store.config_set("min-replicas-to-write", 1),
    ),
    (
        "STORE_ACCESS_DENIED",
        "refuses our user",
        lambda store, _: store.acl_setuser("default", enabled=True, commands=["-evalsha"]),
    ),
    (  # which it says in other words
        "STORE_ACCESS_DENIED",
        "refuses our user",
        lambda store, _: store.acl_setuser("default", enabled=True, commands=["-hset"]),
    ),
    (
        "STORE_DAMAGED",
        "is damaged",
        lambda store, token: (store.delete(shard(token)), store.set(shard(token), "a text")),
    ),
    (
        "INTERNAL",
        "a script failed",
        lambda store, token: store.hset(shard(token), "tick_us", "garbage"),
    ),
]


@pytest.mark.parametrize(("reason", "words", "cause"), TROUBLES)
def test_each_trouble_has_its_reason(
    reason: str,
    words: str,
    cause: Callable[[redis.Redis, str], Any],
    server: tuple[Replica, redis.Redis],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Callers, metrics and the log name the kind of trouble, the log once for many calls.

    Fails when all kinds are "the store does not answer", when each call is a line of the log, or
    when a caller is to retry what does not pass by itself.
    """
    replica, store = server
    token = replica.create_token(0.0)
    key = f'holdoff_store_errors_total{{reason="{reason.lower()}"}}'
    assert metrics(replica)[key] == 0
    monkeypatch.setattr(seldom, "_warnings", seldom.Seldom())
    told: list[tuple[grpc.StatusCode, HoldoffError]] = []
    with structlog.testing.capture_logs() as logs:
        cause(store, token)
        for _ in range(10):
            with pytest.raises(grpc.RpcError) as refused:
                replica.acquire(token)
            told.append((refused.value.code(), from_rpc_error(refused.value, "test")))
    calls = [(code, failure) for code, failure in told if failure.reason == reason]
    assert len(calls) > 1  # on a slow machine one may be late instead
    passes = reason not in ("STORE_DAMAGED", "INTERNAL")
    for code, failure in calls:
        assert words in str(failure)
        assert ("nothing is lost" in str(failure)) == passes
        assert code == (grpc.StatusCode.UNAVAILABLE if passes else grpc.StatusCode.INTERNAL)
    kinds = [one["kind"] for one in logs if one["event"] == "store call failed"]
    assert kinds.count(reason) == 1
    assert metrics(replica)[key] >= len(calls)


def test_each_kind_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the log says how often it came meanwhile. Fails when one kind hides another."""
    clock = [0.0]
    monkeypatch.setattr(seldom, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(seldom, "_warnings", seldom.Seldom())
    with structlog.testing.capture_logs() as logs:
        for clock[0] in range(121):
            seldom.warn("store call failed", "INTERNAL")
            seldom.warn("store call failed", "STORE_READ_ONLY")
    for kind in ("INTERNAL", "STORE_READ_ONLY"):
        lines = [one.get("more_like_it", 0) for one in logs if one["kind"] == kind]
        assert lines == [0, 59, 59]


def test_a_password_that_changed_is_told(server: tuple[Replica, redis.Redis]) -> None:
    """New connections, which the server does not take, are refused by their reason too.

    Fails when redis-py's wrapping of the server's answer hides it.
    """
    replica, store = server
    token = replica.create_token(0.0)
    store.acl_setuser("default", enabled=False)
    store.client_kill_filter(skipme=False)
    assert wait_until(lambda: refusal(lambda: replica.acquire(token)) == "STORE_ACCESS_DENIED")


class App:
    """An app with a good and a bad token."""

    def __init__(self, replica: Replica, store: redis.Redis) -> None:
        self.replica, self.store = replica, store
        name = f"apps/{uuid.uuid4().hex[:12]}"
        self.good, self.bad = f"{name}/tokens/good", f"{name}/tokens/bad"
        self.key, self.name = shard(self.good), name
        self.offers = {}
        for token in (self.bad, self.good):
            request = token_to_create(token, 0.2)
            request.token.policy = "exact-online"
            replica.tokens.CreateToken(request)
            self.offers[token] = replica.hold(token, ttl=60.0)

    def lease_key(self) -> str:
        """Return the key of the bad token's lease."""
        lease = self.offers[self.bad].lease.name.rpartition("/")[2]
        return f"{self.key}:lease:bad:{lease}"

    def spoil(self, key: str) -> None:
        """Make a key a list."""
        self.store.delete(key)
        self.store.rpush(key, "a list")

    def listed(self) -> list[str]:
        """Return the names of the tokens that a list of them has."""
        request = token_service_pb2.ListTokensRequest(parent=self.name)
        return [one.name for one in self.replica.tokens.ListTokens(request).tokens]


DAMAGES: dict[str, Callable[[App], Any]] = {
    "token is a list": lambda app: app.spoil(f"{app.key}:token:bad"),
    "token's cooldown is garbage": lambda app: (
        app.store.hdel(f"{app.key}:token:bad", "lease"),
        app.store.hset(f"{app.key}:token:bad", "not_before_us", "soon"),
    ),
    "token's creation is garbage": lambda app: app.store.hset(
        f"{app.key}:token:bad", "created_us", "once"
    ),
    "lease is a list": lambda app: app.spoil(app.lease_key()),
    "lease's end is garbage": lambda app: app.store.hset(app.lease_key(), "expires_us", "late"),
    "lease's holder is garbage": lambda app: app.store.hset(app.lease_key(), "holder", b"\xff"),
    "queue is a list": lambda app: app.spoil(f"{app.key}:queue:bad"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_token_harms_no_other(
    damage: str, server: tuple[Replica, redis.Redis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweep, ticks, watch, lists, followers and metrics of its app go on, and the damage is told.

    Fails when a script, or what reads its answer, gives up at the first damaged token, and when the
    sweeper comes to a damaged token again before the others.
    """
    monkeypatch.setattr(sweeper, "TOKENS_A_CALL", 1)
    for module, name in ((hub, "STALE_SECONDS"), (leases, "STATUS_SECONDS")):
        monkeypatch.setattr(module, name, 3600.0)  # waiters depend on ticks
    replica, store = server
    app = App(replica, store)
    of_bad, follower = (Follower(replica, app.offers[token]) for token in (app.bad, app.good))
    waiters = [Waiter(replica, ask(token)) for token in (app.bad, app.good)]
    for one in waiters:
        one.waiting()
    DAMAGES[damage](app)
    store.zadd(f"{app.key}:due", {"bad": 0})  # first in line for the sweeper
    counted = "holdoff_damaged_records_total{app="
    wait_until(
        lambda: (
            app.good in app.listed()
            and [one for one in metrics(replica) if one.startswith(counted)]
        )
    )
    held = f'holdoff_lease_held{{app="{app.name[5:]}",token="good"}}'
    wait_until(lambda: metrics(replica).get(held) == 1, 20.0)
    watch = replica.leases.WatchLeases(lease_service_pb2.WatchLeasesRequest(parent=app.name))
    for response in watch:
        if response.snapshot.last:
            assert app.good in {one.token for one in response.snapshot.tokens}
            break
    watch.cancel()
    quiet = admin_service_pb2.SetBackOffRequest(
        scope=budget_pb2.Scope(app=app.name), length=duration(60.0), reason="a test"
    )
    back_off = replica.admin.SetBackOff(quiet).back_off.name
    wait_until(lambda: not follower.runs)
    wait_until(lambda: "a test" in waiters[1].last.waiting.message)  # type: ignore[union-attr]
    replica.admin.ClearBackOff(
        admin_service_pb2.ClearBackOffRequest(name=back_off, reason="a test")
    )
    assert not follower.ended
    listed = replica.leases.ListLeases(lease_service_pb2.ListLeasesRequest(parent=app.name)).leases
    assert app.offers[app.good].lease.name in {one.name for one in listed}
    replica.release(app.offers[app.good])
    replica.renew(waiters[1].offer(20.0))
    # The sweeper comes to what stands behind it.
    swept = replica.create_token(0.2, name=f"{app.name}/tokens/swept")
    waiters.append(Waiter(replica, ask(swept)))  # those who kept the back-off follow one by one
    offer = waiters[-1].offer(20.0)
    replica.renew(offer)
    replica.release(offer)
    wait_until(lambda: store.zscore(f"{app.key}:due", "swept") is None, 20.0)
    for waiter in waiters:
        waiter.vanish()
    for stream in (of_bad, follower):
        stream.close()


def test_a_damaged_lease_leaves_the_history(server: tuple[Replica, redis.Redis]) -> None:
    """Its other leases are listed. Fails when one that cannot be read ends the list."""
    replica, store = server
    app = App(replica, store)
    replica.release(app.offers[app.bad])
    app.spoil(app.lease_key())
    end_cooldown(store, app.bad)
    later = replica.hold(app.bad)
    request = lease_service_pb2.ListLeaseHistoryRequest(parent=app.bad)
    history = replica.leases.ListLeaseHistory(request).leases
    assert [one.name for one in history] == [later.lease.name]


def test_a_damaged_token_says_so(server: tuple[Replica, redis.Redis]) -> None:
    """Who asks for the token itself hears that it is damaged, not that there is none."""
    replica, store = server
    app = App(replica, store)
    app.spoil(f"{app.key}:token:bad")
    assert refusal(lambda: replica.show_token(app.bad)) == "STORE_DAMAGED"
    assert refusal(lambda: replica.acquire(app.bad)) == "STORE_DAMAGED"
    offer = app.offers[app.bad]
    request = lease_service_pb2.FollowLeaseRequest(name=offer.lease.name, secret=offer.secret)
    app.spoil(app.lease_key())
    assert refusal(lambda: next(replica.leases.FollowLease(request))) == "STORE_DAMAGED"


def test_a_damaged_waiter_leaves_the_queue(server: tuple[Replica, redis.Redis]) -> None:
    """Whose request is damaged queues up again; the others keep their order."""
    replica, store = server
    token = replica.create_token(0.0)
    held = replica.hold(token, ttl=60.0)
    requests = [ask(token) for _ in range(3)]
    waiters = []
    for place, request in enumerate(requests, start=1):
        waiters.append(Waiter(replica, request))
        assert waiters[-1].waiting().place == place
    key = f"{shard(token)}:request:{request_hash(requests[0])}"
    store.delete(key)
    store.rpush(key, "a list")

    def last_places() -> list[int]:
        return [one.last.waiting.place for one in waiters if one.last]

    wait_until(lambda: last_places() == [3, 1, 2])
    replica.release(held)
    for waiter in (waiters[1], waiters[2], waiters[0]):
        offer = waiter.offer()
        replica.renew(offer)
        replica.release(offer)
        waiter.vanish()


def error(token: str, endpoint: str) -> budget_pb2.Event:
    """Build a report of an error."""
    return budget_pb2.Event(
        id=str(uuid.uuid4()),
        scope=budget_pb2.Scope(token=token, endpoint=endpoint),
        kind=budget_pb2.EVENT_KIND_ERROR,
        status=404,
    )


@pytest.mark.parametrize("damage", ["hash", "log", "field"])
def test_a_damaged_budget_harms_no_other(damage: str, server: tuple[Replica, redis.Redis]) -> None:
    """Errors elsewhere are counted, and those budgets are listed; the same report does not fail.

    Fails when one budget that cannot be counted in makes the whole report fail for ever.
    """
    replica, store = server
    app = App(replica, store)
    endpoints = [ENDPOINT, "/api/v1/1/crm/Contacts"]

    def report() -> None:
        events = [error(app.good, endpoint) for endpoint in endpoints]
        replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=events))

    def used() -> list[int]:
        request = budget_service_pb2.ListBudgetsRequest(parent=app.name)
        return sorted(one.used for one in replica.budgets.ListBudgets(request).budgets)

    report()
    assert used() == [1, 1]
    [first, _] = sorted(store.scan_iter(f"{app.key}:budget:*"))
    if damage == "field":
        store.hset(first, "used", "many")
    else:
        kind = b":budget:" if damage == "hash" else b":log:"
        app.spoil(first.replace(b":budget:", kind).decode())
    report()
    assert used() == [2]
    key = f'holdoff_damaged_records_total{{app="{app.name[5:]}",kind="budgets"}}'
    assert metrics(replica)[key] > 0


@pytest.mark.parametrize("damage", ["errors:good", "reservation:damaged"])
def test_damage_beside_a_budget_fails_no_report(
    damage: str, server: tuple[Replica, redis.Redis]
) -> None:
    """Errors are counted though their list, or a reservation that is due, cannot be read.

    Fails when what else a report does ends it.
    """
    replica, store = server
    app = App(replica, store)
    app.spoil(f"{app.key}:{damage}")
    store.zadd(f"{app.key}:reservations", {"damaged": 0})
    event = error(app.good, ENDPOINT)
    request = budget_service_pb2.RecordEventsRequest(events=[event])
    assert replica.budgets.RecordEvents(request).outcomes == [budget_pb2.EVENT_OUTCOME_COUNTED]
    kind = "events" if damage.startswith("errors") else "reservations"
    key = f'holdoff_damaged_records_total{{app="{app.name[5:]}",kind="{kind}"}}'
    assert metrics(replica)[key] > 0


@pytest.mark.parametrize("damage", ["backoff", "turns", "callers", "field"])
def test_a_damaged_back_off_harms_no_other(
    damage: str, server: tuple[Replica, redis.Redis]
) -> None:
    """The app's other back-offs are kept and listed, and its leases go on."""
    replica, store = server
    app = App(replica, store)
    for scope in (
        budget_pb2.Scope(token=app.bad),
        budget_pb2.Scope(app=app.name, endpoint=ENDPOINT),
    ):
        request = admin_service_pb2.SetBackOffRequest(
            scope=scope, length=duration(60.0), reason="a test"
        )
        name = replica.admin.SetBackOff(request).back_off.name
    spoiled = name.rpartition("/")[2]
    if damage == "field":
        store.hset(f"{app.key}:backoff:{spoiled}", "until_us", "later")
    else:
        app.spoil(f"{app.key}:{damage}:{spoiled}")
    listed = replica.budgets.ListBackOffs(
        budget_service_pb2.ListBackOffsRequest(parent=app.name)
    ).back_offs
    assert [one.scope.token for one in listed] == [app.bad]
    replica.release(app.offers[app.good])
    waiter = Waiter(replica, ask(app.good))
    assert replica.renew(waiter.offer()).state == lease_pb2.LEASE_STATE_ACTIVE
    waiter.vanish()
