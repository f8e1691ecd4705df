"""Endpoints are compared without case, and shown as they were spelled first."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest
from structlog.testing import capture_logs

from holdoff._core import duration
from holdoff.policies import presets
from holdoff.v1 import (
    admin_service_pb2,
    audit_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
)
from tests.harness import Replica, ask, refusal

if TYPE_CHECKING:
    import redis
    from google.protobuf.message import Message

    from tests.conftest import Server

DIVISION = "535193"
FIRST, LATER, LAST = "crm/Accounts", "CRM/accounts", "/api/v1/535193/crm/ACCOUNTS(guid'1')"


def scope(token: str, endpoint: str) -> budget_pb2.Scope:
    """Where calls go."""
    return budget_pb2.Scope(token=token, division=DIVISION, endpoint=endpoint)


def report(
    replica: Replica, token: str, endpoint: str, division: str = DIVISION, **fields: Any
) -> None:
    """Report an error there."""
    event = budget_pb2.Event(
        id=str(uuid.uuid4()),
        kind=budget_pb2.EVENT_KIND_ERROR,
        scope=budget_pb2.Scope(token=token, division=division, endpoint=endpoint),
        status=400,
        **fields,
    )
    replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))


def spelled(*answers: Message | str) -> set[str]:
    """Return all spellings of the endpoint in answers."""
    found = [re.findall('crm/accounts[^ "\\\\]*', str(one), re.IGNORECASE) for one in answers]
    assert all(found), [one for one, there in zip(answers, found, strict=True) if not there]
    return {one.rstrip(":;)") for there in found for one in there}


def of_token(replica: Replica, token: str, endpoint: str) -> budget_pb2.Budget:
    """Return the budget of errors of an endpoint."""
    request = budget_service_pb2.ListBudgetsRequest(scope=scope(token, endpoint))
    [budget] = replica.budgets.ListBudgets(request).budgets
    return budget


def test_every_answer_shows_the_spelling_seen_first(replica: Replica) -> None:
    """Lists, watches, explanations, refusals, waits and the audit trail agree on one spelling.

    Fails when something is compared with case: a filter, a back-off and what a job declared, or
    the places where it caused errors.
    """
    token = replica.create_token(0.0)
    app = token.partition("/tokens/")[0]
    report(replica, token, FIRST)
    held = replica.hold(token, scopes=[(DIVISION, "Crm/Accounts"), (DIVISION, "crm/Contacts")])
    job = lease_pb2.Holder(job="nightly")
    report(replica, token, LATER, count=7, holder=job)
    set_one = admin_service_pb2.SetBackOffRequest(
        scope=scope(token, LAST), reason="a test", length=duration(60.0)
    )
    paused = replica.admin.SetBackOff(set_one).back_off
    budgets = budget_service_pb2.ListBudgetsRequest(scope=scope(token, LATER))
    back_offs = budget_service_pb2.ListBackOffsRequest(parent=app)
    explain = budget_service_pb2.ExplainRequest(scope=scope(token, LATER))
    by_job = budget_service_pb2.ExplainRequest(scope=budget_pb2.Scope(token=token), job="nightly")
    watch = replica.budgets.WatchBudgets(
        budget_service_pb2.WatchBudgetsRequest(parent=app, scope=scope(token, LATER))
    )
    seen: list[budget_service_pb2.WatchBudgetsResponse] = []
    for response in watch:
        if response.snapshot_end:
            break
        seen.append(response)
    watch.cancel()
    reserve = budget_service_pb2.ReserveRequest(
        reservation_id=str(uuid.uuid4()),
        scope=scope(token, LATER),
        kind=budget_pb2.EVENT_KIND_CALL,
        ttl=duration(30.0),
    )
    with pytest.raises(grpc.RpcError) as refused:
        replica.budgets.Reserve(reserve)
    answers: list[Any] = [
        paused,
        *replica.budgets.ListBudgets(budgets).budgets,
        *replica.budgets.ListBackOffs(back_offs).back_offs,
        replica.budgets.Explain(explain),
        replica.budgets.Explain(by_job),
        *seen,
        replica.show(held.lease.name),
        refused.value.details(),
    ]
    assert spelled(*answers) == {FIRST}
    assert {bool(one.budgets) for one in seen} == {True, False}
    explained = replica.budgets.Explain(explain)
    assert (len(explained.errors), len(explained.budgets)) == (2, 1)
    assert len(replica.budgets.ListBackOffs(back_offs).back_offs) == 2

    replica.release(held, unused=True)
    with pytest.raises(grpc.RpcError) as refused:
        replica.acquire(token, scopes=[(DIVISION, LATER)])
    assert spelled(str(refused.value.details())) == {FIRST}
    clear = admin_service_pb2.ClearBackOffRequest(name=paused.name, reason="it is over")
    reset = admin_service_pb2.ResetBudgetRequest(
        name=of_token(replica, token, LATER).name, reason="the bug is fixed"
    )
    assert spelled(replica.admin.ClearBackOff(clear), replica.admin.ResetBudget(reset)) == {FIRST}
    offer = replica.acquire(token, scopes=[(DIVISION, LATER)]).offer
    assert spelled(*offer.rooms) == {FIRST}
    trail = replica.admin.ListAuditEvents(
        admin_service_pb2.ListAuditEventsRequest(parent=app)
    ).events
    kinds = audit_pb2.AuditKind
    about = {kinds.AUDIT_KIND_BACK_OFF_BEGAN, kinds.AUDIT_KIND_BACK_OFF_CLEARED}
    about.add(kinds.AUDIT_KIND_BUDGET_RESET)
    told_of = [one.reason for one in trail if one.kind in about]
    assert len(told_of) == 4
    assert spelled(*told_of) == {FIRST}


def test_all_divisions_of_a_token_show_one_spelling(replica: Replica) -> None:
    """Another budget of the same endpoint is opened under the spelling that is known."""
    token = replica.create_token(0.0)
    report(replica, token, FIRST)
    report(replica, token, LATER, division=f" {DIVISION} ")
    report(replica, token, "/api/v1/9/CRM/ACCOUNTS", division="")
    request = budget_service_pb2.ListBudgetsRequest(parent=token.partition("/tokens/")[0])
    found = replica.budgets.ListBudgets(request).budgets
    assert [one.scope.endpoint for one in found] == [FIRST, FIRST]


def test_a_tokens_spelling_says_nothing_of_another(replica: Replica) -> None:
    """Two tokens of an app that spell an endpoint differently each see their own."""
    app = f"apps/{uuid.uuid4().hex[:12]}"
    one, other = (replica.create_token(0.0, name=f"{app}/tokens/{name}") for name in "ab")
    report(replica, one, FIRST)
    report(replica, other, LATER)
    report(replica, one, LATER)
    assert of_token(replica, one, LATER).scope.endpoint == FIRST
    assert of_token(replica, other, FIRST).scope.endpoint == LATER


def test_spellings_are_bounded(replica: Replica, store: redis.Redis) -> None:
    """A token that has called very many endpoints forgets spellings; what is open keeps its own."""
    token = replica.create_token(0.0)
    key = f"holdoff:{{{token.split('/')[1]}}}:spellings:t"
    report(replica, token, FIRST)
    assert 0 < store.ttl(key) <= 7 * 24 * 3600 + 1
    store.hset(key, mapping={f"e{number}": f"E{number}" for number in range(999)})
    report(replica, token, "crm/Other")
    assert store.hgetall(key) == {b"crm/other": b"crm/Other"}
    report(replica, token, LATER)
    assert of_token(replica, token, LATER).scope.endpoint == FIRST
    assert store.hget(key, "crm/accounts") == FIRST.encode()


def test_what_the_release_before_wrote_gets_a_spelling(
    replica: Replica, store: redis.Redis
) -> None:
    """A budget without a spelling is shown in lower case until the next call of its endpoint."""
    token = replica.create_token(0.0)
    shard = f"holdoff:{{{token.split('/')[1]}}}"
    report(replica, token, FIRST)
    name = of_token(replica, token, FIRST).name
    store.hdel(f"{shard}:budget:{name.rpartition('/')[2]}", "spelled")
    store.delete(f"{shard}:spellings:t")
    assert of_token(replica, token, FIRST).scope.endpoint == "crm/accounts"
    report(replica, token, FIRST)
    budget = of_token(replica, token, FIRST)
    assert (budget.name, budget.used, budget.scope.endpoint) == (name, 2, FIRST)


def test_a_damaged_spelling_refuses_nothing(replica: Replica, store: redis.Redis) -> None:
    """Fails when an event is not counted because a record that is only for people is damaged."""
    token = replica.create_token(0.0)
    store.set(f"holdoff:{{{token.split('/')[1]}}}:spellings:t", "damaged")
    report(replica, token, FIRST)
    assert of_token(replica, token, LATER).scope.endpoint == FIRST


def test_a_waiter_waits_for_a_back_off_in_another_spelling(replica: Replica) -> None:
    """What a job declares is compared without case with what backs off."""
    token = replica.create_token(0.0)
    report(replica, token, FIRST, count=8)
    asked = ask(token, wait=0.0, scopes=[(DIVISION, "CRM/ACCOUNTS")])
    assert refusal(replica.leases.AcquireLease, asked) == "BACKING_OFF"
    assert replica.acquire(token, scopes=[(DIVISION, "crm/Account")]).HasField("offer")


def test_a_throttle_of_an_endpoint_shows_the_spelling_seen_first(valkey: Server) -> None:
    """Where a policy throttles endpoints, calls of two tokens in two spellings are one back-off."""
    exact = presets()["exact-online"]
    throttle = msgspec.structs.replace(exact.throttle[0], scope=("app", "endpoint"))
    policy = msgspec.structs.replace(exact, throttle=(throttle,))
    app = f"apps/{uuid.uuid4().hex[:12]}"
    with Replica(valkey.url, policies={**presets(), policy.name: policy}) as replica:
        for name, spelling in (("a", FIRST), ("b", LATER)):
            token = replica.create_token(0.0, name=f"{app}/tokens/{name}")
            event = budget_pb2.Event(
                id=str(uuid.uuid4()),
                kind=budget_pb2.EVENT_KIND_BLOCK,
                scope=scope(token, spelling),
                throttle=throttle.name,
            )
            replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))
        request = budget_service_pb2.ListBackOffsRequest(parent=app)
        [back_off] = replica.budgets.ListBackOffs(request).back_offs
    assert (back_off.scope.token, back_off.scope.endpoint) == ("", FIRST)


def test_a_filter_with_a_token_reads_its_app_alone(replica: Replica, store: redis.Redis) -> None:
    """Fails when such a list walks the budgets of all apps: then it finds a damaged one."""
    token, other = replica.create_token(0.0), replica.create_token(0.0)
    report(replica, token, FIRST)
    app = other.split("/")[1]
    store.set(f"holdoff:{{{app}}}:budgets", "damaged")
    with capture_logs() as logs:
        assert of_token(replica, token, FIRST).used == 1
    assert app not in str(logs)
    for wrong in (budget_pb2.Scope(token="t"), budget_pb2.Scope(app="apps/UPPER")):
        request = budget_service_pb2.ListBudgetsRequest(scope=wrong)
        assert refusal(replica.budgets.ListBudgets, request) == "INVALID_FIELD"
    store.delete(f"holdoff:{{{app}}}:budgets")
