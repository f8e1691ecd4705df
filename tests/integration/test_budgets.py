"""Promise 6: every reported event is counted once, and reservations never exceed a limit."""

from __future__ import annotations

import json
import threading
import uuid
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
import redis
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from holdoff._core import duration
from holdoff.policies import Policy, Seconds, presets
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    budget_service_pb2_grpc,
    token_service_pb2,
)
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.scripts import Scripts, shard_key
from tests.harness import Replica, let_pass, refusal, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Server, StartValkey

COUNTED, KNOWN, NOT_LIMITED = 1, 2, 3
ACCOUNTS = "/api/v1/535193/crm/Accounts"


WINDOW = 600
"""Seconds in which errors count; a test that needs their end makes them older."""


def policy() -> Policy:
    """Exact Online with other windows, and with fewer token requests."""
    exact = presets()["exact-online"]
    errors = msgspec.structs.replace(exact.limit[0], window=Seconds(WINDOW))
    calls = msgspec.structs.replace(exact.limit[3], name="calls", most=5000, window=Seconds(WINDOW))
    few = msgspec.structs.replace(exact.limit[1], most=3, window=Seconds(WINDOW))
    return msgspec.structs.replace(exact, name="ours", limit=(errors, few, calls))


@pytest.fixture(scope="module")
def replicas(valkey: Server) -> Iterator[list[Replica]]:
    """Two replicas that know the policy."""
    policies = {**presets(), "ours": policy()}
    with (
        Replica(valkey.url, policies=policies) as first,
        Replica(valkey.url, policies=policies) as second,
    ):
        yield [first, second]


@pytest.fixture
def replica(replicas: list[Replica]) -> Replica:
    """Give one of them."""
    return replicas[0]


class Budgets:
    """The budget service of a replica, in short."""

    def __init__(self, replica: Replica, token: str) -> None:
        self.token = token
        self.stub = budget_service_pb2_grpc.BudgetServiceStub(replica.channel)
        self.admin = replica.admin

    def scope(self, endpoint: str = ACCOUNTS, division: str = "") -> budget_pb2.Scope:
        """Where."""
        return budget_pb2.Scope(token=self.token, endpoint=endpoint, division=division)

    def event(self, **fields: Any) -> budget_pb2.Event:
        """An error 400 unless told otherwise."""
        fields = {
            "id": str(uuid.uuid4()),
            "kind": budget_pb2.EVENT_KIND_ERROR,
            "scope": self.scope(),
            "status": 400,
            **fields,
        }
        age = fields.pop("age_seconds", 0.0)
        return budget_pb2.Event(age=duration(age), **fields)

    def record(self, *events: budget_pb2.Event) -> list[int]:
        """Report; return the outcomes."""
        request = budget_service_pb2.RecordEventsRequest(events=events)
        return list(self.stub.RecordEvents(request).outcomes)

    def reserve(self, **fields: Any) -> budget_pb2.Reservation:
        """Take room for a call."""
        fields = {
            "reservation_id": str(uuid.uuid4()),
            "scope": self.scope(),
            "kind": budget_pb2.EVENT_KIND_CALL,
            **fields,
        }
        ttl = fields.pop("ttl_seconds", 30.0)
        request = budget_service_pb2.ReserveRequest(ttl=duration(ttl), **fields)
        return self.stub.Reserve(request).reservation

    def commit(self, reservation: budget_pb2.Reservation, status: int = 200) -> int:
        """Say that the call was made; return the state."""
        app = self.token.partition("/tokens/")[0]
        request = budget_service_pb2.CommitRequest(
            reservation_id=reservation.id, app=app, status=status
        )
        return self.stub.Commit(request).reservation.state

    def cancel(self, reservation: budget_pb2.Reservation) -> int:
        """Say that it was not; return the state."""
        app = self.token.partition("/tokens/")[0]
        request = budget_service_pb2.CancelRequest(reservation_id=reservation.id, app=app)
        return self.stub.Cancel(request).reservation.state

    def list(self, **fields: Any) -> list[budget_pb2.Budget]:
        """List the budgets of the app."""
        request = budget_service_pb2.ListBudgetsRequest(
            parent=self.token.partition("/tokens/")[0], **fields
        )
        return list(self.stub.ListBudgets(request).budgets)

    def errors(self) -> budget_pb2.Budget:
        """The one budget of errors."""
        [budget] = [budget for budget in self.list() if budget.limit == "errors"]
        return budget


@pytest.fixture
def budgets(replica: Replica) -> Budgets:
    """Budgets of a token that nobody else knows."""
    token = replica.create_token(0.0)
    request = token_service_pb2.UpdateTokenRequest()
    request.update_mask.paths.append("policy")
    request.token.name, request.token.policy = token, "ours"
    replica.tokens.UpdateToken(request)
    return Budgets(replica, token)


def test_an_event_counts_once(budgets: Budgets) -> None:
    """A report that is retried counts once; one that no limit counts is told so.

    Fails when ids are not remembered.
    """
    event = budgets.event()
    assert budgets.record(event) == [COUNTED]
    assert budgets.record(event, budgets.event(), budgets.event(status=500)) == [
        KNOWN,
        COUNTED,
        NOT_LIMITED,
    ]
    budget = budgets.errors()
    assert (budget.used, budget.room, budget.state) == (2, 6, budget_pb2.BUDGET_STATE_OPEN)
    assert budget.scope.division == "535193"
    assert budget.scope.endpoint == "crm/Accounts"
    assert budget.scope.token == budgets.token


def test_states_and_the_window(budgets: Budgets, store: redis.Redis) -> None:
    """A budget is low within its margin, spent without room, and has room when events leave.

    Fails when an event stays longer, or leaves sooner, than the window.
    """
    budgets.record(*(budgets.event() for _ in range(6)))
    assert budgets.errors().state == budget_pb2.BUDGET_STATE_LOW
    budgets.record(*(budgets.event() for _ in range(6)))  # above the limit: it happened
    spent = budgets.errors()
    assert (spent.used, spent.room, spent.state) == (12, 0, budget_pb2.BUDGET_STATE_SPENT)
    assert 0 < spent.room_in.ToMicroseconds() <= WINDOW * 1_000_000 + 1
    assert budgets.list(state=budget_pb2.BUDGET_STATE_SPENT)[0].name == spent.name
    last_us = spent.last_event_time.ToMicroseconds()
    assert spent.room_time.ToMicroseconds() <= last_us + WINDOW * 1_000_000 + 1
    let_pass(store, budgets.token, WINDOW - 60)
    assert budgets.errors().used == 12
    let_pass(store, budgets.token, 60)
    wait_until(lambda: not budgets.list())  # by the slower of two clocks


def test_an_event_of_the_past(budgets: Budgets, store: redis.Redis) -> None:
    """A late report counts from when the event happened, and not at all after the window."""
    ages = (WINDOW / 2, WINDOW * 2)
    budgets.record(*(budgets.event(age_seconds=age) for age in ages))
    assert budgets.errors().used == 1
    let_pass(store, budgets.token, WINDOW / 2)
    wait_until(lambda: not budgets.list())  # by the slower of two clocks


def test_one_endpoint_has_one_budget(budgets: Budgets) -> None:
    """However an endpoint is written, by URL or by path, it is the same budget."""
    ways = [
        budgets.scope(),
        budgets.scope("https://start.exactonline.nl/api/v1/535193/crm/accounts(guid'1')?$top=1"),
        budgets.scope("CRM/Accounts/", division="535193"),
    ]
    ways[1].endpoint = ways[1].endpoint.replace("(guid'1')", "")
    budgets.record(*(budgets.event(scope=scope) for scope in ways))
    assert budgets.errors().used == 3
    assert [b.used for b in budgets.list(scope=budget_pb2.Scope(endpoint="CRM/accounts"))] == [3]
    assert not budgets.list(scope=budget_pb2.Scope(division="1"))


def test_reservations_never_exceed_a_limit(replicas: list[Replica], budgets: Budgets) -> None:
    """64 callers at once through two replicas get 8 of 10 errors' room, two being kept in hand.

    Fails when outstanding reservations are not looked at.
    """
    both = [budgets, Budgets(replicas[1], budgets.token)]
    granted: list[budget_pb2.Reservation] = []
    refused: list[str] = []

    def call(number: int) -> None:
        try:
            granted.append(both[number % 2].reserve())
        except Exception as error:  # noqa: BLE001 - looked at below
            refused.append(str(error))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(granted), len(refused)) == (8, 56)
    assert all("no room" in text for text in refused)
    assert budgets.errors().reserved == 8
    for reservation in granted[:4]:
        assert budgets.commit(reservation) == budget_pb2.RESERVATION_STATE_COMMITTED
    for reservation in granted[4:]:
        assert budgets.cancel(reservation) == budget_pb2.RESERVATION_STATE_CANCELLED
    after = {budget.limit: (budget.used, budget.reserved) for budget in budgets.list()}
    assert after["calls"] == (4, 0)  # answered with 200, so no errors
    assert after["errors"] == (0, 0)


def test_what_became_of_a_reservation(budgets: Budgets) -> None:
    """A commit twice counts once, with its error; a cancel after it changes nothing."""
    failed = budgets.reserve()
    for _ in range(2):
        assert budgets.commit(failed, 404) == budget_pb2.RESERVATION_STATE_COMMITTED
    assert budgets.cancel(failed) == budget_pb2.RESERVATION_STATE_COMMITTED
    assert (budgets.errors().used, budgets.errors().reserved) == (1, 0)


async def test_reservations_that_expire_together_hold_up_no_call(start_valkey: StartValkey) -> None:
    """Each script settles some of them: thousands at once would stop the store for seconds.

    Fails when one script settles all.
    """
    url = start_valkey().url
    with Replica(url, policies=presets()) as replica:
        token = replica.create_token(0)
        budgets = Budgets(replica, token)
        for division in range(30):
            for _ in range(4):
                budgets.reserve(scope=budgets.scope(f"e{division}", str(division)))
    app = token.split("/")[1]
    client = connect(url)
    with redis.Redis.from_url(url) as store:
        left = [store.zcard(f"{shard_key(app)}:reservations")]
        let_pass(store, token, 60)
        while left[-1]:
            await Scripts(client, quarantine_us=0).run("read_budgets", app)
            left.append(store.zcard(f"{shard_key(app)}:reservations"))
    await client.aclose()
    assert left == [120, 20, 0]


def test_an_expired_reservation_counts(budgets: Budgets, store: redis.Redis) -> None:
    """One that nobody settles becomes an event at its expiry; a late commit moves it, once.

    Fails when expired reservations are dropped, or a late commit adds an event.
    """
    lost = budgets.reserve(ttl_seconds=60.0)
    let_pass(store, budgets.token, 60)
    wait_until(lambda: budgets.errors().used == 1)
    expired_us = budgets.errors().last_event_time.ToMicroseconds()
    assert expired_us == lost.expire_time.ToMicroseconds() - 60_000_000
    assert budgets.cancel(lost) == budget_pb2.RESERVATION_STATE_EXPIRED
    assert budgets.commit(lost, 400) == budget_pb2.RESERVATION_STATE_EXPIRED
    budget = budgets.errors()
    assert (budget.used, budget.reserved) == (1, 0)
    assert budget.last_event_time.ToMicroseconds() > expired_us


def test_a_refusal_says_when_there_is_room(budgets: Budgets) -> None:
    """RESOURCE_EXHAUSTED carries which budget is spent and when to come back."""
    budgets.record(*(budgets.event() for _ in range(9)))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - looked at below
        budgets.reserve()
    status = rpc_status.from_call(caught.value)
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    retry, quota = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    for detail in status.details:
        detail.Unpack(retry)
        detail.Unpack(quota)
    assert 0 < retry.retry_delay.ToMicroseconds() <= WINDOW * 1_000_000 + 1
    assert quota.violations[0].subject == budgets.errors().name
    assert budgets.errors().reserved == 0


def test_a_reset(budgets: Budgets) -> None:
    """An operator can make a budget forget; a report that is retried still counts once.

    Fails when ids are forgotten with the events.
    """
    event = budgets.event()
    budgets.record(event, *(budgets.event() for _ in range(8)))
    name = budgets.errors().name
    request = admin_service_pb2.ResetBudgetRequest(name=name, reason="the job is fixed")
    reset = budgets.admin.ResetBudget(request).budget
    assert (reset.used, reset.reset_reason) == (0, "the job is fixed")
    assert budgets.record(event) == [KNOWN]
    assert refusal(budgets.admin.ResetBudget, admin_service_pb2.ResetBudgetRequest(name=name)) == (
        "INVALID_FIELD"
    )


def test_a_large_limit_is_counted_in_slices(budgets: Budgets, store: redis.Redis) -> None:
    """Thousands of calls cost a few entries, are never undercounted, and leave in time.

    Fails when slices count from their beginning, or stay for good.
    """
    seconds, microseconds = store.time()
    for _ in range(40):
        kind = budget_pb2.EVENT_KIND_CALL
        budgets.record(*(budgets.event(kind=kind, count=10, status=0) for _ in range(10)))
    [calls] = budgets.list()
    assert calls.used == 4000
    app = budgets.token.split("/")[1]
    log = f"holdoff:{{{app}}}:log:{calls.name.rpartition('/')[2]}"
    slices: Any = store.zrange(log, 0, -1, withscores=True)
    assert len(slices) <= 240
    assert min(end_us for _, end_us in slices) > seconds * 1_000_000 + microseconds
    let_pass(store, budgets.token, WINDOW * 241 / 240)
    wait_until(lambda: not budgets.list())  # by the slower of two clocks
    assert not list(store.scan_iter(f"holdoff:{{{app}}}:weights:*"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"id": "x"}, "INVALID_FIELD"),
        ({"kind": 0}, "INVALID_FIELD"),
        ({"kind": 9}, "INVALID_FIELD"),
        ({"count": 10_001}, "INVALID_FIELD"),
        ({"status": -1}, "INVALID_FIELD"),
        ({"age_seconds": -1.0}, "INVALID_FIELD"),
        ({"age_seconds": 86_401.0}, "EVENT_TOO_OLD"),
        ({"scope": budget_pb2.Scope(token="apps/a/tokens/none")}, "TOKEN_NOT_FOUND"),
        ({"scope": budget_pb2.Scope(app="apps/a")}, "INVALID_FIELD"),
    ],
)
def test_bad_events(budgets: Budgets, fields: dict[str, Any], reason: str) -> None:
    """What makes no sense is refused, and nothing of the batch counts."""
    events = [budgets.event(), budgets.event(**fields)]
    request = budget_service_pb2.RecordEventsRequest(events=events)
    assert refusal(budgets.stub.RecordEvents, request) == reason
    wait_until(lambda: not budgets.list())  # by the slower of two clocks


def test_pages(budgets: Budgets) -> None:
    """The tightest budgets come first, page by page, each once."""
    for number in range(5):
        scope = budgets.scope(f"/api/v1/1/crm/E{number}")
        budgets.record(*(budgets.event(scope=scope) for _ in range(5 - number)))
    seen: list[int] = []
    request = budget_service_pb2.ListBudgetsRequest(
        parent=budgets.token.partition("/tokens/")[0], page_size=2
    )
    while True:
        page = budgets.stub.ListBudgets(request)
        seen += [budget.used for budget in page.budgets]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == [5, 4, 3, 2, 1]


def test_errors_are_kept_for_people(budgets: Budgets, store: redis.Redis) -> None:
    """Who caused an error is kept with it, and no id that would let another report it."""
    event = budgets.event()
    event.holder.job = "nightly"
    budgets.record(event)
    app = budgets.token.split("/")[1]
    [(_, kept)] = cast("Any", store.xrange(f"holdoff:{{{app}}}:errors:t"))
    shown = json.loads(kept[b"event"])
    assert (shown["job"], shown["status"], shown["endpoint"]) == ("nightly", 400, "crm/Accounts")
