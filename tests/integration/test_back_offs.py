"""Promise 7: when a scope must be quiet everybody is told, one goes first, the rest follow."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest

from holdoff._core import duration
from holdoff.policies import Block, Policy, Seconds, presets
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
)
from holdoff_coordinator import followers as followers_
from tests.harness import Follower, Replica, Waiter, ask, attempt, refusal, run_out, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from tests.conftest import Server

CRM, SALES = ("535193", "crm/accounts"), ("535193", "salesorder/orders")
QUIET, PROBING = budget_pb2.BACK_OFF_STATE_QUIET, budget_pb2.BACK_OFF_STATE_PROBING
REOPENING = budget_pb2.BACK_OFF_STATE_REOPENING
BACKING_OFF = lease_pb2.WAIT_REASON_BACKING_OFF


def policy(name: str, window_seconds: float, block_seconds: float) -> Policy:
    """Exact Online's errors in a window of another length, and blocks of some length."""
    exact = presets()["exact-online"]
    errors = msgspec.structs.replace(exact.limit[0], window=Seconds(window_seconds))
    block = Block(
        first=Seconds(block_seconds),
        factor=2,
        most=Seconds(5 * block_seconds),
        forget_after=Seconds(100 * block_seconds),
    )
    return msgspec.structs.replace(exact, name=name, limit=(errors,), block=block)


POLICIES = {
    **presets(),
    "slow": policy("slow", 600, 600),  # what comes to an end is ended by `App.end_quiet`
    "quick": policy("quick", 3, 0.6),
}


@pytest.fixture(scope="module")
def replicas(valkey: Server) -> Iterator[list[Replica]]:
    """Two replicas that know the policies of these tests."""
    with (
        Replica(valkey.url, policies=POLICIES) as first,
        Replica(valkey.url, policies=POLICIES) as second,
    ):
        yield [first, second]


class App:
    """An app of its own for a test: its tokens, and what happens at its provider."""

    def __init__(
        self, replicas: list[Replica], store: redis.Redis, stack: contextlib.ExitStack
    ) -> None:
        self.replicas = replicas
        self.store = store
        self.name = f"apps/back-off-{uuid.uuid4().hex[:12]}"
        self._stack = stack

    @property
    def shard(self) -> str:
        """The first key of the app."""
        return f"holdoff:{{{self.name.removeprefix('apps/')}}}"

    def token(self, name: str = "t", policy: str = "slow") -> str:
        """Make a token that may be refreshed again at once."""
        token = f"{self.name}/tokens/{name}"
        return self.replicas[0].create_token(0.001, name=token, token={"policy": policy})

    def report(
        self, token: str, place: tuple[str, str] = CRM, *, many: int = 1, **fields: Any
    ) -> None:
        """Report errors, or whatever the fields say."""
        fields = {"kind": budget_pb2.EVENT_KIND_ERROR, "status": 400, **fields}
        scope = budget_pb2.Scope(token=token, division=place[0], endpoint=place[1])
        for name in ("age", "sent_age", "retry_after"):
            if name in fields:
                fields[name] = duration(fields[name])
        events = [
            budget_pb2.Event(id=str(uuid.uuid4()), scope=scope, **fields) for _ in range(many)
        ]
        self.replicas[1].budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=events))

    def block(self, token: str, **fields: Any) -> None:
        """Report that the provider blocks."""
        self.report(token, kind=budget_pb2.EVENT_KIND_BLOCK, **{"status": 403, **fields})

    def back_offs(self) -> list[budget_pb2.BackOff]:
        """List the back-offs."""
        request = budget_service_pb2.ListBackOffsRequest(parent=self.name)
        return list(self.replicas[0].budgets.ListBackOffs(request).back_offs)

    def only(self) -> budget_pb2.BackOff:
        """Return the only back-off."""
        [one] = self.back_offs()
        return one

    def end_quiet(self) -> None:
        """Let the quiet time of the only back-off have been over for a second."""
        seconds, microseconds = self.store.time()
        key = f"{self.shard}:backoff:{self.only().name.rpartition('/')[2]}"
        self.store.hset(key, "until_us", (seconds - 1) * 1_000_000 + microseconds)

    def wait(self, token: str, replica: int = 0, **options: Any) -> Waiter:
        """Wait for a lease."""
        waiter = Waiter(self.replicas[replica], ask(token, **options))
        self._stack.callback(waiter.vanish)
        return waiter

    def follow(self, offer: lease_service_pb2.LeaseOffer, replica: int = 0) -> Follower:
        """Follow a lease."""
        follower = Follower(self.replicas[replica], offer)
        self._stack.callback(follower.close)
        return follower

    def explain(self, job: str = "", **scope: str) -> budget_service_pb2.ExplainResponse:
        """Ask what stands in the way."""
        request = budget_service_pb2.ExplainRequest(scope=budget_pb2.Scope(**scope), job=job)
        return self.replicas[0].budgets.Explain(request)


@pytest.fixture
def app(replicas: list[Replica], store: redis.Redis) -> Iterator[App]:
    """Give an app, and let go of its streams in the end."""
    with contextlib.ExitStack() as stack:
        yield App(replicas, store, stack)


def test_a_spent_scope_is_waited_for_and_others_pass(app: App) -> None:
    """Who declared the spent endpoint waits for it, keeps its place, and is passed over.

    Fails when the queue's head stands for the whole queue, or the grant does not look at budgets.
    """
    token = app.token()
    app.report(token, CRM, many=8)
    waits = app.wait(token, scopes=[CRM])
    assert waits.waiting().reason == BACKING_OFF
    assert waits.waiting().place == 1
    assert 500 < waits.waiting().earliest_start_in.ToSeconds() <= 600
    assert waits.waiting().blocking_back_off == app.only().name
    passes = app.wait(token, replica=1, scopes=[SALES])
    offer = passes.offer()
    app.replicas[1].renew(offer)
    app.replicas[1].release(offer)
    # Meanwhile it may have heard that the token was held.
    wait_until(lambda: waits.last and waits.last.waiting.reason == BACKING_OFF)
    app.end_quiet()
    assert waits.offer()


def test_what_is_not_declared_is_what_the_job_touched(app: App) -> None:
    """A job that names nothing waits for the endpoints that its name erred at, and for no others.

    Fails when the name of the job is not remembered with its errors.
    """
    token = app.token()
    app.report(token, CRM, many=8, holder=lease_pb2.Holder(job="buggy"))
    replica = app.replicas[0]
    assert refusal(lambda: replica.acquire(token, job="buggy")) == "BACKING_OFF"
    assert replica.acquire(token, job="healthy").HasField("offer")


@pytest.fixture
def app_without_ticks(
    valkey: Server, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> Iterator[App]:
    """Give an app behind two replicas whose holders hear of announcements and of nothing else."""
    monkeypatch.setattr(followers_, "TICK_SECONDS", 3600.0)
    with (
        Replica(valkey.url, policies=POLICIES) as first,
        Replica(valkey.url, policies=POLICIES) as second,
        contextlib.ExitStack() as stack,
    ):
        yield App([first, second], store, stack)


def test_a_block_quiets_all_holders_and_they_follow_one_by_one(app_without_ticks: App) -> None:
    """All are told at once; one goes on, and when it is done the rest, 200 ms apart.

    Fails when an announcement is not heard, two probe at once, or the rest go on at once.
    """
    app = app_without_ticks
    tokens = [app.token(f"t{number}") for number in range(8)]
    offers = [app.replicas[number % 2].hold(token, ttl=30) for number, token in enumerate(tokens)]
    followers = [app.follow(offer, number % 2) for number, offer in enumerate(offers)]
    assert all(one.runs for one in followers)
    app.block(tokens[0])
    wait_until(lambda: not any(one.runs for one in followers))
    assert followers[0].last.back_offs[0].cause == budget_pb2.BACK_OFF_CAUSE_BLOCKED

    app.end_quiet()
    wait_until(lambda: any(one.runs for one in followers))
    [probe] = [one for one in followers if one.runs]
    wait_until(lambda: app.only().state == PROBING)
    assert not [one for one in followers if one.runs and one is not probe]
    ended = time.monotonic()
    app.replicas[0].release(probe.offer)
    rest = [one for one in followers if one is not probe]
    wait_until(lambda: all(one.runs for one in rest))
    times = sorted(one.went_on_at(ended) or 0 for one in rest)
    for number, went_on in enumerate(times, start=1):
        assert went_on - ended >= number * 0.2
    wait_until(lambda: not app.back_offs())


def test_a_probe_that_errs_or_dies_is_replaced(app: App) -> None:
    """An error under a probe sends the next one; so does its end without a word.

    Fails when any end of a probe lets everybody go on.
    """
    token, other, third = (app.token(name, "quick") for name in ("t", "u", "v"))
    app.block(token)
    waiters = [app.wait(one) for one in (token, other, third)]
    wait_until(lambda: any(one.last and one.last.HasField("offer") for one in waiters))
    [first] = [one for one in waiters if one.last and one.last.HasField("offer")]
    offer = first.offer()
    app.replicas[0].renew(offer)
    app.report(offer.lease.name.partition("/leases/")[0])
    app.replicas[0].release(offer)
    rest = [one for one in waiters if one is not first]
    wait_until(lambda: any(one.last and one.last.HasField("offer") for one in rest))
    [second] = [one for one in rest if one.last and one.last.HasField("offer")]
    app.replicas[0].renew(second.offer())
    [last] = [one for one in rest if one is not second]
    assert last.last is not None
    assert last.last.waiting.reason == BACKING_OFF
    run_out(app.store, second.offer())
    wait_until(lambda: last.last is not None and last.last.HasField("offer"))


def test_what_was_met_before_the_probe_is_not_held_against_it(app: App) -> None:
    """A report that comes late tells of the time before the block: the others follow all the same.

    Fails when any error that comes while a probe runs counts against it.
    """
    tokens = [app.token(name, "quick") for name in ("t", "u")]
    app.block(tokens[0])
    waiters = [app.wait(token) for token in tokens]
    wait_until(lambda: any(one.last and one.last.HasField("offer") for one in waiters))
    [probe] = [one for one in waiters if one.last and one.last.HasField("offer")]
    [other] = [one for one in waiters if one is not probe]
    offer = probe.offer()
    app.replicas[0].renew(offer)
    app.report(offer.lease.name.partition("/leases/")[0], age=30.0)
    app.replicas[0].release(offer)
    assert {one.state for one in app.back_offs()} <= {REOPENING}
    assert other.offer()


def test_who_is_gone_holds_nobody_up(app: App) -> None:
    """Of those who keep a block all but one end, or wait no more: that one goes first at once.

    Fails when the place of a caller that is gone is kept until it is silent, for five seconds.
    """
    tokens = [app.token(f"t{number}") for number in range(5)]
    offers = [app.replicas[0].hold(token, ttl=30) for token in tokens[:4]]
    followers = [app.follow(offer) for offer in offers]
    app.block(tokens[0])
    waits = app.wait(tokens[4])
    wait_until(lambda: not any(one.runs for one in followers))
    assert waits.waiting().reason == BACKING_OFF
    waits.withdraw()
    for offer in offers[:3]:
        app.replicas[0].release(offer)
    turns = f"{app.shard}:turns:{app.only().name.rpartition('/')[2]}"
    wait_until(lambda: app.store.zcard(turns) == 1)
    app.end_quiet()
    wait_until(lambda: followers[3].runs)


def test_blocks_double_only_when_met_after_the_last_one_ended(app: App) -> None:
    """What is met during a block, or was sent before it ended, prolongs it only as named.

    Fails when every report doubles, or a report names an end beyond the policy's most.
    """
    token = app.token()
    app.block(token)
    first = app.only()
    app.block(token)
    app.block(token, retry_after=100)
    assert (app.only().end_time, app.only().repeats) == (first.end_time, 1)
    app.block(token, retry_after=1000)
    longer = app.only()
    assert longer.end_time.ToMicroseconds() > first.end_time.ToMicroseconds()
    assert longer.repeats == 1
    app.block(token, retry_after=365 * 24 * 3600.0)
    end = app.only().end_time.ToMicroseconds() - first.start_time.ToMicroseconds()
    assert end <= 3060e6
    clear(app, app.only().name)
    app.block(token, sent_age=60)
    assert not app.back_offs()
    app.block(token)
    assert app.only().repeats == 2
    length = app.only().end_time.ToMicroseconds() - app.only().start_time.ToMicroseconds()
    assert length == 1200e6


def clear(app: App, name: str) -> budget_pb2.BackOff:
    """End a back-off."""
    request = admin_service_pb2.ClearBackOffRequest(name=name, reason="test")
    return app.replicas[0].admin.ClearBackOff(request).back_off


def test_reservations_keep_blocks_and_the_first_is_the_probe(app: App) -> None:
    """Nothing is reserved while blocked; then one at a time until one succeeded.

    Fails when a reservation does not look at back-offs.
    """
    token = app.token()
    app.block(token)

    def reserve() -> budget_pb2.Reservation:
        request = budget_service_pb2.ReserveRequest(
            reservation_id=str(uuid.uuid4()),
            scope=budget_pb2.Scope(token=token, endpoint=SALES[1], division=SALES[0]),
            kind=budget_pb2.EVENT_KIND_CALL,
            ttl=duration(60),
        )
        return app.replicas[0].budgets.Reserve(request).reservation

    def commit(reservation: budget_pb2.Reservation, status: int) -> None:
        request = budget_service_pb2.CommitRequest(
            reservation_id=reservation.id, app=app.name, status=status
        )
        app.replicas[1].budgets.Commit(request)

    assert refusal(reserve) == "BACKING_OFF"
    app.end_quiet()
    assert app.only().state == PROBING
    first = reserve()
    assert refusal(reserve) == "BACKING_OFF"
    commit(first, 404)
    second = wait_until(lambda: attempt(reserve))
    assert refusal(reserve) == "BACKING_OFF"
    commit(second, 200)
    assert not app.back_offs()
    assert reserve().state


def test_an_operator_quiets_and_frees_a_scope(app: App) -> None:
    """Set for an app, it holds for all tokens; cleared, they go on; who and why is told.

    Fails when the scope of an app does not hold for its tokens.
    """
    token = app.token()
    offer = app.replicas[0].hold(token, ttl=30)
    follower = app.follow(offer)
    request = admin_service_pb2.SetBackOffRequest(
        scope=budget_pb2.Scope(app=app.name),
        length=duration(3600),
        reason="the provider is down",
        holder=lease_pb2.Holder(user="ann", host="web1"),
    )
    set_ = app.replicas[1].admin.SetBackOff(request).back_off
    wait_until(lambda: not follower.runs)
    [told] = follower.last.back_offs
    assert told.name == set_.name
    assert (told.caused_by.user, told.caused_by.host) == ("ann", "web1")
    assert "ann paused" in told.reason
    assert "the provider is down" in told.reason
    explained = app.explain(token=token)
    assert explained.must_wait
    assert [one.reason for one in explained.obstacles] == [
        BACKING_OFF,
        lease_pb2.WAIT_REASON_HELD,
    ]
    assert explained.obstacles[0].caused_by.user == "ann"
    clear(app, set_.name)
    wait_until(lambda: follower.runs)
    wait_until(lambda: not app.back_offs())
    assert refusal(clear, app, set_.name) == "BACK_OFF_NOT_FOUND"


def test_an_explanation_names_who_erred_and_narrower_scopes(app: App) -> None:
    """A spent endpoint stands in the way of calls there; of the token it is shown beside.

    Fails when the errors of a scope are not those that people are shown.
    """
    token = app.token()
    app.report(token, CRM, many=8, holder=lease_pb2.Holder(job="buggy", host="web3"))
    for explained in (
        app.explain(token=token, division=CRM[0], endpoint=CRM[1]),
        app.explain(token=token, job="buggy"),
    ):
        [obstacle] = explained.obstacles
        assert obstacle.back_off.cause == budget_pb2.BACK_OFF_CAUSE_SPENT
        assert obstacle.caused_by.job == "buggy"
        assert explained.go_in.ToMicroseconds() > 0
        assert explained.must_wait
    explained = app.explain(token=token)
    assert not explained.must_wait
    assert [one.scope.endpoint for one in explained.narrower] == [CRM[1]]
    assert explained.budgets[0].state == budget_pb2.BUDGET_STATE_SPENT
    assert len(explained.errors) == 8
    latest = explained.errors[0]
    assert (latest.holder.job, latest.holder.host, latest.status) == ("buggy", "web3", 400)
    assert not app.explain(token=app.token("other")).narrower


@contextlib.contextmanager
def watching(app: App) -> Iterator[list[str]]:
    """Watch the budgets and back-offs of an app; give what is told."""
    request = budget_service_pb2.WatchBudgetsRequest(parent=app.name)
    stream = app.replicas[1].budgets.WatchBudgets(request)
    seen: list[str] = []

    def listen() -> None:
        with contextlib.suppress(grpc.RpcError):
            for response in stream:
                seen.extend(
                    f"{budget_pb2.BudgetState.Name(one.state)[13:]} {one.used}"
                    for one in response.budgets
                )
                seen.extend(
                    f"back-off {budget_pb2.BackOffState.Name(one.state)[15:]}"
                    for one in response.back_offs
                )
                seen.extend(["all told"] * response.snapshot_end)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    yield seen
    stream.cancel()
    thread.join()


def test_watchers_of_budgets_see_every_state(app: App) -> None:
    """First how things stand, then what changes, the end of a window and of a back-off too.

    Fails when what time alone changes is not told.
    """
    token = app.token(policy="quick")
    app.report(token, CRM, many=3)
    with watching(app) as seen:
        wait_until(lambda: seen == ["OPEN 3", "all told"])
        app.report(token, CRM, many=5)
        wait_until(lambda: {"SPENT 8", "back-off QUIET"} <= set(seen))
        wait_until(lambda: "back-off PROBING" in seen)
        wait_until(lambda: "OPEN 0" in seen)
        clear(app, app.only().name)
        wait_until(lambda: "back-off UNSPECIFIED" in seen)


def test_watchers_of_budgets_see_an_open_one_empty(app: App) -> None:
    """Where there was room all the time the end of the window is told too.

    Fails when a watch looks again only at budgets without room.
    """
    app.report(app.token(policy="quick"), CRM, many=3)
    with watching(app) as seen:
        wait_until(lambda: seen == ["OPEN 3", "all told"])
        wait_until(lambda: seen[-1] == "OPEN 0")


def test_a_break_is_told_at_once(app: App) -> None:
    """The holder need not wait for its next renewal. Fails when nobody is told of breaks."""
    offer = app.replicas[0].hold(app.token(), ttl=60)
    follower = app.follow(offer, 1)
    request = admin_service_pb2.BreakLeaseRequest(name=offer.lease.name, reason="runs wild")
    app.replicas[0].admin.BreakLease(request)
    wait_until(lambda: follower.ended)
    assert refusal(lambda: (_ for _ in ()).throw(follower.ended)) == "LEASE_BROKEN"  # type: ignore[arg-type]


def test_an_offer_and_a_notice_say_how_much_room_is_left(app: App) -> None:
    """So that a wrapper can stop by its own count. Fails when rooms forget what was used."""
    token = app.token()
    app.report(token, CRM, many=3)
    offer = app.replicas[0].hold(token, ttl=30, scopes=[CRM, SALES, ("7", "")])
    rooms = {(one.scope.division, one.scope.endpoint): one.room for one in offer.rooms}
    assert rooms == {CRM: 5, SALES: 8}
    assert offer.policy.name == "slow"
    assert app.follow(offer).last.rooms == offer.rooms


def test_a_holder_is_told_of_places_where_it_erred(app: App) -> None:
    """Also when it declared none and has no job name. Fails when events forget their lease."""
    token = app.token()
    offer = app.replicas[0].hold(token, ttl=30)
    follower = app.follow(offer)
    app.report(token, CRM, many=8, lease=offer.lease.name)
    wait_until(lambda: not follower.runs)
