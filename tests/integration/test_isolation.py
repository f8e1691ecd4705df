"""No caller stops another: what a role on one token can do to the other tokens of its app."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import TYPE_CHECKING, Any

import pytest

import holdoff
from holdoff._core import duration
from holdoff._proof import lease_proof, secret_hash
from holdoff._recognise import SeenBlock
from holdoff._reporting import Reporter
from holdoff._spool import Spool
from holdoff.cli._conduct import Conduct
from holdoff.policies import presets
from holdoff.v1 import admin_service_pb2, budget_pb2, budget_service_pb2, lease_service_pb2
from holdoff_coordinator import replays
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.gate import AccessFile
from tests.harness import Replica, ask, attempt, let_pass, refusal, token_to_create, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import redis

    from tests.conftest import Server

ERROR, BLOCK = budget_pb2.EVENT_KIND_ERROR, budget_pb2.EVENT_KIND_BLOCK
CALL = budget_pb2.EVENT_KIND_CALL
COUNTED = budget_pb2.EVENT_OUTCOME_COUNTED
GRANTS = """
[[grants]]
identities = ["credential:operator"]
role = "admin"
resources = ["*"]

[[grants]]
identities = ["credential:on-a"]
role = "holder"
resources = ["apps/*/tokens/a"]

[[grants]]
identities = ["credential:on-b"]
role = "holder"
resources = ["apps/*/tokens/b"]

[[grants]]
identities = ["credential:on-app"]
role = "reporter"
resources = ["apps/*"]
"""


def credential_of(url: str, identity: str) -> str:
    """Issue a credential."""

    async def issue() -> str:
        store = connect(url)
        try:
            _, text, _ = await Credentials(store).issue(identity, 0, "a test")
        finally:
            await store.aclose()
        return text

    return asyncio.run(issue())


class As:
    """The calls of one identity."""

    def __init__(self, replica: Replica, url: str, identity: str) -> None:
        self._replica = replica
        self.credential = credential_of(url, identity)
        self._metadata = [("authorization", f"Bearer {self.credential}")]

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        """Make a call of any service by its name."""
        replica = self._replica
        for stub in (replica.leases, replica.tokens, replica.budgets, replica.admin):
            if hasattr(stub, name):
                return lambda request: getattr(stub, name)(
                    request, metadata=self._metadata, timeout=50
                )
        raise AttributeError(name)

    def report(self, *events: budget_pb2.Event) -> list[int]:
        """Report events; return the outcomes."""
        request = budget_service_pb2.RecordEventsRequest(events=events)
        return list(self.RecordEvents(request).outcomes)

    def budgets(self, app: str) -> list[budget_pb2.Budget]:
        """List the budgets of an app."""
        request = budget_service_pb2.ListBudgetsRequest(parent=app, page_size=1000)
        return list(self.ListBudgets(request).budgets)

    def back_offs(self, app: str) -> list[budget_pb2.BackOff]:
        """List the back-offs of an app."""
        request = budget_service_pb2.ListBackOffsRequest(parent=app)
        return list(self.ListBackOffs(request).back_offs)

    def explain(self, token: str, **fields: Any) -> budget_service_pb2.ExplainResponse:
        """Ask whether a token may start."""
        scope = budget_pb2.Scope(token=token, **fields)
        found: budget_service_pb2.ExplainResponse = self.Explain(
            budget_service_pb2.ExplainRequest(scope=scope)
        )
        return found

    def hold(self, token: str) -> lease_service_pb2.LeaseOffer:
        """Take a lease."""
        offer: lease_service_pb2.LeaseOffer = self.AcquireLease(ask(token, wait=0.0)).offer
        self.RenewLease(
            lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
        )
        return offer

    def reserve(self, token: str, **place: str) -> budget_pb2.Reservation:
        """Take room for a call."""
        scope = budget_pb2.Scope(token=token, **place)
        request = budget_service_pb2.ReserveRequest(
            reservation_id=str(uuid.uuid4()), scope=scope, kind=CALL, ttl=duration(30)
        )
        reservation: budget_pb2.Reservation = self.Reserve(request).reservation
        return reservation

    def commit(self, token: str, reservation: budget_pb2.Reservation, status: int) -> int:
        """Say that the call was made; return the state."""
        app = token.partition("/tokens/")[0]
        request = budget_service_pb2.CommitRequest(
            reservation_id=reservation.id, app=app, status=status
        )
        return int(self.Commit(request).reservation.state)


class App:
    """An app with the tokens a and b, and those who may call."""

    def __init__(self, replica: Replica, url: str) -> None:
        self.name = f"apps/{uuid.uuid4().hex[:12]}"
        self.shard = f"holdoff:{{{self.name.removeprefix('apps/')}}}"
        self.a, self.b = f"{self.name}/tokens/a", f"{self.name}/tokens/b"
        self.operator = As(replica, url, "operator")
        self.on_a, self.on_b = As(replica, url, "on-a"), As(replica, url, "on-b")
        self.on_app = As(replica, url, "on-app")
        for token in (self.a, self.b):
            self.create(token)

    def create(self, token: str) -> None:
        """Create a token of Exact Online."""
        self.operator.CreateToken(token_to_create(token, 0.4))


@pytest.fixture(scope="module")
def guarded(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica that lets callers do what they were granted."""
    path = tmp_path_factory.mktemp("access") / "access.toml"
    path.write_text(GRANTS)
    with Replica(valkey.url, access=AccessFile(path), policies=presets()) as replica:
        yield replica


@pytest.fixture
def app(guarded: Replica, valkey: Server) -> App:
    """Give an app of its own."""
    return App(guarded, valkey.url)


def event(
    token: str, kind: budget_pb2.EventKind.ValueType = ERROR, **fields: Any
) -> budget_pb2.Event:
    """An event of a token."""
    division, endpoint = fields.pop("division", ""), fields.pop("endpoint", "")
    scope = budget_pb2.Scope(token=token, division=division, endpoint=endpoint)
    return budget_pb2.Event(id=str(uuid.uuid4()), kind=kind, scope=scope, **fields)


def used_of(budgets: list[budget_pb2.Budget], limit: str = "errors") -> dict[tuple[str, str], int]:
    """Return what is counted of a limit, by division and endpoint."""
    return {
        (one.scope.division, one.scope.endpoint): one.used for one in budgets if one.limit == limit
    }


def share_of(identity: str) -> str:
    """Return under what name a caller's shares are kept."""
    return "@" + hashlib.sha1(f"credential:{identity}".encode()).hexdigest()  # noqa: S324 - no secret


def open_scopes(store: redis.Redis, app: App, who: str, count: int) -> None:
    """Let a token or a caller have so many scopes with an event in their window."""
    seconds, _ = store.time()
    many = {f"errors-{who}-{number}": (seconds + 600) * 1_000_000 for number in range(count)}
    for key in ("budgets", f"scopes:{who}"):
        store.zadd(f"{app.shard}:{key}", many)


# Shared stores --------------------------------------------------------------


def test_a_reporter_that_fills_the_scopes_of_its_app_backs_off_alone(
    app: App, store: redis.Redis
) -> None:
    """100 requests with 10,000 scopes: all is counted, and another token's errors in their own."""
    for first in range(0, 10_000, 100):
        numbers = range(first, first + 100)
        assert (
            app.on_a.report(
                *(event(app.a, status=400, endpoint=f"e/{number}") for number in numbers)
            )
            == [COUNTED] * 100
        )
    for number in range(20):
        assert app.on_b.report(event(app.b, status=400, endpoint=f"own/{number}")) == [COUNTED]
    assert used_of(app.on_b.budgets(app.name)) == {("", f"own/{number}"): 1 for number in range(20)}
    assert not app.on_b.explain(app.b).must_wait
    explained = app.on_a.explain(app.a)
    assert explained.must_wait
    assert "too many scopes" in explained.message
    whole = explained.budgets[0]
    assert (whole.scope.endpoint, whole.most, whole.room) == ("", 10, 0)
    assert whole.used + store.zcard(f"{app.shard}:scopes:a") - 1 == 10_000


def test_what_has_no_room_counts_in_the_division_then_in_the_token(
    app: App, store: redis.Redis
) -> None:
    """A narrow scope that may not be opened counts without its endpoint, then as the token."""
    place: dict[str, Any] = {"division": "1", "endpoint": "x"}
    app.on_a.report(event(app.a, status=400, **place))
    open_scopes(store, app, "a", 7_000)
    app.on_a.report(event(app.a, status=400, **place))
    app.on_a.report(event(app.a, status=400, division="1", endpoint="y"))
    assert used_of(app.on_a.budgets(app.name)) == {("1", "x"): 2, ("1", ""): 1}
    open_scopes(store, app, "a", 9_000)
    app.on_a.report(event(app.a, status=400, division="2", endpoint="x"))
    app.on_a.report(event(app.a, status=400, division="1", endpoint="z"))
    expected = {("1", "x"): 2, ("1", ""): 2, ("", ""): 1}
    assert used_of(app.on_a.budgets(app.name)) == expected
    app.on_a.report(event(app.a, CALL, division="7"))  # whose limits the app shares
    [minute] = [one for one in app.on_a.budgets(app.name) if one.limit == "calls-a-minute"]
    assert (minute.scope.token, minute.scope.division) == (app.a, "")


def test_what_counts_coarser_does_so_until_nothing_is_left_of_it(
    app: App, store: redis.Redis
) -> None:
    """No scope has events of its window in two budgets: a narrow one is opened after them."""
    open_scopes(store, app, "a", 9_000)
    app.on_a.report(event(app.a, status=400, endpoint="x"))
    store.delete(f"{app.shard}:scopes:a", f"{app.shard}:budgets")
    app.on_a.report(event(app.a, status=400, endpoint="x"), event(app.a, status=400, endpoint="y"))
    assert used_of(app.on_a.budgets(app.name)) == {("", ""): 3}
    let_pass(store, app.a, 3_700)
    store.zremrangebyscore(f"{app.shard}:coarse", 0, "+inf")
    app.on_a.report(event(app.a, status=400, endpoint="x"))
    assert used_of(app.on_a.budgets(app.name)) == {("", "x"): 1}


def test_reservations_take_room_where_their_calls_are_counted(app: App, store: redis.Redis) -> None:
    """Reserve, commit and the rooms of a lease agree with where errors are counted."""
    open_scopes(store, app, "a", 9_000)
    for number in range(6):
        app.on_a.report(event(app.a, status=400, endpoint=f"e/{number}"))
    first, second = (app.on_a.reserve(app.a, endpoint="new") for _ in range(2))
    assert refusal(lambda: app.on_a.reserve(app.a, endpoint="other")) == "BUDGET_SPENT"
    app.on_a.commit(app.a, second, 200)
    offer = app.on_a.AcquireLease(ask(app.a, wait=0.0, scopes=[("", "new")])).offer
    assert offer.rooms[0].room == 1
    app.on_a.commit(app.a, first, 400)
    assert used_of(app.on_a.budgets(app.name)) == {("", ""): 7}
    assert app.on_b.reserve(app.b, endpoint="new").state == budget_pb2.RESERVATION_STATE_RESERVED


def test_a_token_with_too_many_events_is_refused_alone(app: App, store: redis.Redis) -> None:
    """Ids of one token leave room for those of others."""
    seconds, _ = store.time()
    # More than four times as many as all tokens may have.
    store.hset(f"{app.shard}:ids:a", str((seconds + 3_600) * 1_000_000), 2_000_000)
    assert refusal(lambda: app.on_a.report(event(app.a, status=400))) == "TOO_MANY_EVENTS"
    assert refusal(lambda: app.on_a.reserve(app.a)) == "TOO_MANY_EVENTS"
    assert app.on_b.report(event(app.b, status=400)) == [COUNTED]
    assert app.on_b.reserve(app.b).state == budget_pb2.RESERVATION_STATE_RESERVED


def test_a_caller_fills_no_app_with_several_tokens(app: App, store: redis.Redis) -> None:
    """What one caller does with all of its tokens takes no more than one share.

    Fails when only tokens have shares: with three tokens a caller leaves a ninth to the others.
    """
    open_scopes(store, app, share_of("on-app"), 7_000)
    app.on_b.report(event(app.b, status=400, endpoint="x"))
    app.on_app.report(event(app.b, status=400, endpoint="y"))
    assert used_of(app.on_b.budgets(app.name)) == {("", "x"): 1, ("", ""): 1}
    assert store.zcard(f"{app.shard}:scopes:{share_of('on-b')}") == 1
    seconds, _ = store.time()
    ids = f"{app.shard}:ids:{share_of('on-app')}"
    assert sum(map(int, store.hvals(ids))) == 1
    store.hset(ids, str((seconds + 3_600) * 1_000_000), 2_000_000)
    assert refusal(lambda: app.on_app.report(event(app.b, status=400))) == "TOO_MANY_EVENTS"
    assert refusal(lambda: app.on_app.reserve(app.b)) == "TOO_MANY_EVENTS"
    assert app.on_b.reserve(app.b).state == budget_pb2.RESERVATION_STATE_RESERVED


def test_ids_are_counted_for_their_token(app: App, store: redis.Redis) -> None:
    """Each event and each reservation counts once, whatever becomes of it."""
    app.on_a.report(one := event(app.a, status=400))
    app.on_a.report(one)
    app.on_a.commit(app.a, app.on_a.reserve(app.a), 400)
    assert sum(map(int, store.hvals(f"{app.shard}:ids:a"))) == 2
    assert not store.hvals(f"{app.shard}:ids:b")


def test_back_offs_of_one_token_leave_room_for_others(app: App, store: redis.Redis) -> None:
    """Beyond its share of back-offs a token backs off as a whole, and another one's are narrow."""
    scopes = [f"e/{number}" for number in range(668)]
    for first in range(0, len(scopes), 100):
        app.on_a.report(
            *(
                event(app.a, status=400, count=9, endpoint=endpoint)
                for endpoint in scopes[first : first + 100]
            )
        )
    app.on_b.report(event(app.b, status=400, count=9, endpoint="own"))
    assert [one.scope.endpoint for one in app.on_b.back_offs(app.name)] == ["own"]
    assert not app.on_b.explain(app.b).must_wait
    assert app.on_a.explain(app.a).must_wait
    assert store.zcard(f"{app.shard}:backoffs") < 700


def test_what_one_token_reports_displaces_nothing_that_may_be_sent_again(
    app: App, guarded: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator keeps what it acknowledged of a token, however much another one reports."""
    monkeypatch.setattr(replays, "MOST_KEPT", 3)
    app.on_b.report(event(app.b, status=400))
    app.on_a.report(*(event(app.a, status=400) for _ in range(5)))
    kept = guarded.coordinator._replays._kept
    name = app.name.removeprefix("apps/")
    assert [len(kept[name, token].events) for token in ("a", "b")] == [3, 1]


def test_errors_of_one_token_push_out_no_others(app: App) -> None:
    """The list of recent errors is a token's own."""
    app.on_b.report(event(app.b, status=404, endpoint="own"))
    for _ in range(12):
        app.on_a.report(*(event(app.a, status=400, endpoint="e") for _ in range(100)))
    assert [one.status for one in app.on_b.explain(app.b).errors] == [404]
    scope = budget_pb2.Scope(app=app.name)
    everything = app.operator.Explain(budget_service_pb2.ExplainRequest(scope=scope)).errors
    assert len(everything) == 20


def test_a_report_under_a_jobs_name_is_about_its_own_token(app: App) -> None:
    """Where a job of A errs says nothing about the job of the same name of B."""
    app.on_b.report(event(app.b, status=400, count=9, endpoint="x"))
    app.on_a.report(event(app.a, status=400, endpoint="x", holder={"job": "nightly"}))
    assert app.on_b.AcquireLease(ask(app.b, wait=0.0, job="nightly")).HasField("offer")


# What tokens share --------------------------------------------------------------


def test_a_shared_back_off_names_nobody_to_other_tokens(app: App) -> None:
    """The fact and the length are shown; job, host and user to those that see their token."""
    holder = {"job": "payroll", "host": "web-b", "user": "ann"}
    app.operator.report(event(app.b, BLOCK, retry_after=duration(3_600), holder=holder))
    [ours], [theirs] = app.on_b.back_offs(app.name), app.on_a.back_offs(app.name)
    assert (ours.caused_by.job, ours.caused_by.host, ours.caused_by.user) == tuple(holder.values())
    assert theirs.caused_by == type(theirs.caused_by)()
    assert theirs.end_time == ours.end_time
    [obstacle] = app.on_a.explain(app.a).obstacles
    assert not any(word in str(obstacle) for word in holder.values())


def test_a_shared_scope_is_shown_to_those_that_use_it(app: App) -> None:
    """The division of a scope that tokens share is a name of the tokens that called it."""
    app.on_b.report(event(app.b, CALL, division="payroll"))
    [minute, day] = app.on_b.budgets(app.name)
    assert minute.scope.division == day.scope.division == "payroll"
    assert not app.on_a.budgets(app.name)
    request = budget_service_pb2.GetBudgetRequest(name=minute.name)
    assert refusal(lambda: app.on_a.GetBudget(request)) == "BUDGET_NOT_FOUND"
    app.on_a.report(event(app.a, CALL, division="payroll"))
    assert [one.used for one in app.on_a.budgets(app.name)] == [2, 2]


def test_a_watch_shows_nothing_shared_of_a_token_whose_role_is_gone(
    valkey: Server, tmp_path: Path
) -> None:
    """Only the role on A is left: the divisions that B calls are hidden from the open stream."""
    path = tmp_path / "access.toml"
    path.write_text(GRANTS.replace("tokens/a", "tokens/*"))
    with Replica(valkey.url, access=AccessFile(path), policies=presets()) as replica:
        app = App(replica, valkey.url)
        request = budget_service_pb2.WatchBudgetsRequest(parent=app.name)
        stream = app.on_a.WatchBudgets(request)
        assert next(stream).snapshot_end
        path.write_text(GRANTS)
        app.on_b.report(event(app.b, CALL, division="payroll"))
        app.on_a.report(event(app.a, CALL, division="sales"))
        divisions: set[str] = set()
        while "sales" not in divisions:
            divisions |= {one.scope.division for one in next(stream).budgets}
        stream.cancel()
    assert divisions == {"sales"}


def pause(app: App) -> None:
    """Let the app back off for a second."""
    back_off = admin_service_pb2.SetBackOffRequest(length=duration(1), reason="a test")
    back_off.scope.app = app.name
    app.operator.SetBackOff(back_off)


def runs(stream: Any) -> bool:
    """Wait until a holder may go on."""
    run = lease_service_pb2.HOLDER_INSTRUCTION_RUN
    return any(told.instruction == run for told in stream)


def test_errors_of_one_token_say_nothing_of_the_probe_of_another(app: App) -> None:
    """A reporter of A cannot keep B's job from showing that a back-off of the app is over."""
    offer = app.on_b.hold(app.b)
    key: dict[str, Any] = {"name": offer.lease.name, "secret": offer.secret}
    pause(app)
    stream = app.on_b.FollowLease(lease_service_pb2.FollowLeaseRequest(**key))
    assert runs(stream)  # it is the probe
    app.on_a.report(event(app.a, status=400))
    app.on_b.ReleaseLease(lease_service_pb2.ReleaseLeaseRequest(**key))
    stream.cancel()
    assert not app.on_b.back_offs(app.name)


def test_a_probe_that_errs_for_three_minutes_gives_way(app: App, store: redis.Redis) -> None:
    """A job of A that errs and errs cannot keep B's from going first."""
    offers = app.on_a.hold(app.a), app.on_b.hold(app.b)
    pause(app)
    follow = [
        lease_service_pb2.FollowLeaseRequest(name=one.lease.name, secret=one.secret)
        for one in offers
    ]
    first = app.on_a.FollowLease(follow[0])
    assert runs(first)
    second = app.on_b.FollowLease(follow[1])
    assert next(second).instruction == lease_service_pb2.HOLDER_INSTRUCTION_BE_QUIET
    [name] = [one.name for one in app.on_b.back_offs(app.name)]
    app.on_a.report(event(app.a, status=400))
    store.hincrby(f"{app.shard}:backoff:{name.rpartition('/')[2]}", "probe_us", -200_000_000)
    assert runs(second)
    first.cancel()
    second.cancel()


def test_a_call_that_erred_lets_those_of_others_go_first(app: App) -> None:
    """A caller of A that reserves again at once cannot keep B's calls from showing that it is over.

    Fails when A may send the next probe as soon as it gave up one that erred.
    """
    pause(app)
    mine = wait_until(lambda: attempt(lambda: app.on_a.reserve(app.a)))
    app.on_a.report(event(app.a, status=400))
    app.on_a.commit(app.a, mine, 400)
    assert refusal(lambda: app.on_a.reserve(app.a)) == "BACKING_OFF"
    app.on_b.commit(app.b, app.on_b.reserve(app.b), 200)
    assert not app.on_b.back_offs(app.name)


# Blocks of the app ------------------------------------------------------------


def block_of(
    app: App, offer: lease_service_pb2.LeaseOffer | None, **fields: Any
) -> budget_pb2.Event:
    """A block of a day that is met under a lease, with the proof of its holder."""
    token = offer.lease.name.partition("/leases/")[0] if offer else app.a
    told = event(token, BLOCK, status=403, retry_after=duration(86_400), **fields)
    if offer:
        told.lease = offer.lease.name
        told.lease_proof = lease_proof(secret_hash(offer.secret), told.id)
    return told


def waits(caller: As, token: str) -> float:
    """How long a token must wait, in seconds."""
    return caller.explain(token).go_in.ToTimedelta().total_seconds()


def test_a_reporter_of_a_token_blocks_that_token_alone(app: App) -> None:
    """A block that anybody with a role on A reports holds A, for as long as it says."""
    app.on_a.report(block_of(app, None))
    assert waits(app.on_a, app.a) > 86_000
    assert not app.on_b.explain(app.b).must_wait


def test_a_holder_blocks_the_app_for_minutes(app: App) -> None:
    """What the holder of a lease of A reports holds A for as long as it says, and B shortly."""
    app.on_a.report(block_of(app, app.on_a.hold(app.a)))
    assert waits(app.on_a, app.a) > 86_000
    assert 200 < waits(app.on_b, app.b) <= 300
    assert "only one of its tokens" in app.on_b.explain(app.b).message


def test_a_client_proves_its_lease(app: App, guarded: Replica, tmp_path: Path) -> None:
    """A block that the Python client finds in an answer pauses the other tokens, too."""
    credential = tmp_path / "credential"
    credential.write_text(app.on_a.credential)
    credential.chmod(0o600)
    with (
        holdoff.Client(guarded.address, credential_file=credential) as client,
        client.acquire(app.a) as lease,
    ):
        assert lease.answered("/api/v1/1/crm/x", 403, {}, b"This key is blocked")
        assert 200 < waits(app.on_b, app.b) <= 300


def test_the_wrapper_proves_its_lease(app: App, guarded: Replica, tmp_path: Path) -> None:
    """So does a block that `holdoff run` sees in the output of its command."""
    credential = tmp_path / "credential"
    credential.write_text(app.on_a.credential)
    credential.chmod(0o600)
    with (
        holdoff.Client(guarded.address, credential_file=credential) as client,
        client.acquire(app.a) as lease,
    ):
        reporter = Reporter(client.record_events, Spool(tmp_path / "spool"))
        conduct = Conduct(reporter, app.a, "nightly", "finish", print)
        conduct._lease = lease
        conduct._report("stdout", [SeenBlock(403)])
        assert reporter.close(30) == 0
        assert 200 < waits(app.on_b, app.b) <= 300


def test_a_holder_alone_blocks_the_app_once(app: App, store: redis.Redis) -> None:
    """Until another token confirms it, a token cannot prolong or repeat a block of the app."""
    offer = app.on_a.hold(app.a)
    app.on_a.report(block_of(app, offer))
    [name] = [one.name for one in app.on_b.back_offs(app.name)]
    app.on_a.report(block_of(app, offer))
    assert waits(app.on_b, app.b) <= 300
    record = f"{app.shard}:backoff:{name.rpartition('/')[2]}"
    until_us = int(store.hget(record, "until_us")) - 300_000_000  # type: ignore[arg-type]
    store.hset(record, "until_us", until_us)
    app.on_a.report(block_of(app, offer))
    assert int(store.hget(record, "until_us")) == until_us  # type: ignore[arg-type]


def test_a_second_token_confirms_a_block_of_the_app(app: App) -> None:
    """When the holder of B meets it too, the app backs off for as long as the provider says."""
    on_a, on_b = app.on_a.hold(app.a), app.on_b.hold(app.b)
    app.on_a.report(block_of(app, on_a))
    app.on_b.report(block_of(app, on_b))
    app.create(f"{app.name}/tokens/c")
    assert waits(app.operator, f"{app.name}/tokens/c") > 86_000
    assert "only one" not in app.on_b.explain(app.b).message


def test_a_claim_that_is_over_confirms_nothing(app: App, store: redis.Redis) -> None:
    """The holder of B alone stops the app no longer because the holder of A did so before."""
    on_a, on_b = app.on_a.hold(app.a), app.on_b.hold(app.b)
    app.on_a.report(block_of(app, on_a))
    [name] = [one.name for one in app.on_b.back_offs(app.name)]
    store.hset(f"{app.shard}:backoff:{name.rpartition('/')[2]}", "claim_until_us", "1")
    app.on_b.report(block_of(app, on_b))
    app.create(f"{app.name}/tokens/c")
    assert 200 < waits(app.operator, f"{app.name}/tokens/c") <= 300


def test_a_confirmation_that_names_no_time_lasts_as_long_as_the_policy_says(app: App) -> None:
    """A second report during the claim makes it a block of the policy's length: an hour."""
    on_a, on_b = app.on_a.hold(app.a), app.on_b.hold(app.b)
    app.on_a.report(block_of(app, on_a))
    told = block_of(app, on_b)
    told.ClearField("retry_after")
    app.on_b.report(told)
    app.create(f"{app.name}/tokens/c")
    assert 3_500 < waits(app.operator, f"{app.name}/tokens/c") <= 3_600


def test_who_may_report_for_the_app_blocks_it(app: App) -> None:
    """The role on the whole app is enough."""
    app.on_app.report(block_of(app, None))
    assert waits(app.on_b, app.b) > 86_000


@pytest.mark.parametrize("spoiled", ["proof", "id", "token", "lease", "ended"])
def test_a_proof_belongs_to_one_event_and_a_live_lease(app: App, spoiled: str) -> None:
    """A proof that is made up, of another event or lease, or of one that ended before, is none."""
    offer = app.on_a.hold(app.a)
    told = block_of(app, offer)
    if spoiled == "proof":
        told.lease_proof = lease_proof(secret_hash("guess"), told.id)
    elif spoiled == "id":
        told.id = str(uuid.uuid4())
    elif spoiled == "token":
        told.lease_proof = lease_proof("", told.id)
        told.lease = f"{app.a}/leases/1"
    elif spoiled == "lease":
        told.lease = ""
    else:
        app.on_a.ReleaseLease(
            lease_service_pb2.ReleaseLeaseRequest(name=offer.lease.name, secret=offer.secret)
        )
        told = block_of(app, offer)
    app.on_a.report(told)
    assert app.on_a.explain(app.a).must_wait
    assert not app.on_b.explain(app.b).must_wait
