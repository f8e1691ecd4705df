"""The audit trail: what is in it, in what order, and that it stays bounded."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import structlog

from holdoff.v1 import (
    admin_service_pb2,
    audit_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
    token_pb2,
    token_service_pb2,
)
from holdoff_coordinator import audit
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import AUDIT_KEPT, CREDENTIAL_CHANGES, REFUSALS
from tests.harness import Replica, refusal, run_out, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import redis

    from tests.conftest import Server

T = TypeVar("T")


def trail(
    replica: Replica, parent: str, page_token: str = "", **fields: object
) -> list[audit_pb2.AuditEvent]:
    """Read the trail, the oldest first, by pages."""
    found: list[audit_pb2.AuditEvent] = []
    while True:
        request = admin_service_pb2.ListAuditEventsRequest(
            parent=parent,
            page_token=page_token,
            **fields,  # type: ignore[arg-type] # of the request
        )
        page = replica.admin.ListAuditEvents(request)
        found += page.events
        page_token = page.next_page_token
        if not page_token:
            return found[::-1]


def kinds(events: list[audit_pb2.AuditEvent]) -> list[str]:
    """Name the kinds of events."""
    return [audit_pb2.AuditKind.Name(one.kind).removeprefix("AUDIT_KIND_") for one in events]


def test_the_life_of_a_token(replica: Replica, store: redis.Redis) -> None:
    """Every grant and its end, each with who and why; what runs out by itself is nobody's doing.

    Fails when a script leaves one out, or names whoever happened to call when a lease ran out.
    """
    token = replica.create_token(0.0)
    released = replica.hold(token, job="released")
    replica.renew(released)
    replica.release(released)
    replica.release(released)  # once more, as after an answer that was lost
    lost = replica.hold(token, job="lost")
    run_out(store, lost)
    assert not replica.show_token(token).lease
    broken = replica.hold(token, job="broken")
    for _ in range(2):
        replica.admin.BreakLease(
            admin_service_pb2.BreakLeaseRequest(
                name=broken.lease.name,
                reason="maintenance",
                holder=lease_pb2.Holder(user="ann", host="pc1"),
            )
        )
    replica.release(broken)
    app = token.split("/")[1]
    lock = f"lock:holdoff:{{{app}}}:t"
    wait_until(lambda: store.set(lock, "mine", nx=True))
    replica.show_token(token)
    store.delete(lock)
    replica.show_token(token)
    replica.tokens.UpdateToken(
        token_service_pb2.UpdateTokenRequest(token=token_pb2.Token(name=token))
    )

    events = trail(replica, token)
    assert kinds(events) == [
        "TOKEN_CREATED",
        *("LEASE_GRANTED", "LEASE_RELEASED"),
        *("LEASE_GRANTED", "LEASE_LOST"),
        *("LEASE_GRANTED", "LEASE_BREAK_ORDERED", "LEASE_BROKEN"),
        *("LOCK_TAKEN", "LOCK_FREED"),
        "TOKEN_UPDATED",
    ]
    assert [one.resource for one in events[1:8]] == [
        *[released.lease.name] * 2,
        *[lost.lease.name] * 2,
        *[broken.lease.name] * 3,
    ]
    assert [one.holder.job for one in events[1:8]] == [
        *("released", "released", "lost", "lost", "broken", "", "broken")
    ]
    caller = ("anonymous", True)
    who = [(one.identity, one.peer.startswith("ipv4:127.0.0.1:")) for one in events]
    nobody = ("", False)
    assert who == [
        *[caller] * 4,
        nobody,
        *[caller] * 2,
        *[nobody] * 3,
        caller,
    ]
    assert events[4].reason == "it was not renewed in time"
    assert (events[6].reason, events[6].holder.user) == ("maintenance", "ann@pc1")
    times = [one.time.ToMicroseconds() for one in events]
    assert times == sorted(times)


def test_budgets_and_back_offs(replica: Replica) -> None:
    """A reset, and back-offs that begin or are ended, with their scope; one that moves is one.

    Fails when a back-off is told again at each error, or its end by an operator is not told.
    """
    token = replica.create_token(0.0)
    app = token.rpartition("/tokens/")[0]
    scope = budget_pb2.Scope(token=token, division="535193", endpoint="crm/accounts")

    def err() -> None:
        event = budget_pb2.Event(
            id=str(uuid.uuid4()),
            kind=budget_pb2.EVENT_KIND_ERROR,
            scope=scope,
            status=400,
        )
        event.holder.job = "nightly"
        replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))

    for _ in range(10):
        err()
    [budget] = replica.budgets.ListBudgets(
        budget_service_pb2.ListBudgetsRequest(parent=app)
    ).budgets
    set_one = admin_service_pb2.SetBackOffRequest(scope=scope, reason="the provider asked")
    set_one.length.FromSeconds(60)
    name = replica.admin.SetBackOff(set_one).back_off.name
    replica.admin.ClearBackOff(admin_service_pb2.ClearBackOffRequest(name=name, reason="they said"))
    replica.admin.ResetBudget(
        admin_service_pb2.ResetBudgetRequest(name=budget.name, reason="mended")
    )
    events = trail(replica, app)[1:]
    assert kinds(events) == [
        *("BACK_OFF_BEGAN", "BACK_OFF_BEGAN", "BACK_OFF_CLEARED", "BUDGET_RESET")
    ]
    where = f"{token} division 535193 crm/accounts"
    assert [one.reason for one in events] == [
        f"the budget 'errors' of {where} is spent",
        f"an operator paused {where}: the provider asked",
        f"they said ({where})",
        f"mended ({where})",
    ]
    assert events[0].holder.job == "nightly"
    assert {one.identity for one in events} == {"anonymous"}


def test_pages_and_kinds(replica: Replica, store: redis.Redis) -> None:
    """Small pages tell the same as a large one, over all apps; kinds and parents select.

    Fails when a page loses or repeats what lies between the pages of two apps, or has the same
    number in both.
    """
    tokens = [f"apps/audit-{uuid.uuid4().hex[:12]}/tokens/t" for _ in range(3)]
    for token in tokens:
        entry: dict[Any, Any] = {"kind": "LOCK_FREED", "resource": token}
        store.xadd(f"holdoff:{{{token.split('/')[1]}}}:audit", entry, id="1-1")
        replica.create_token(0.0, name=token)
    for _ in range(3):
        for token in tokens:
            replica.release(replica.hold(token))
    for token in tokens:
        whole = trail(replica, token, page_size=1000)
        assert len(whole) == 8
        assert trail(replica, token.rpartition("/tokens/")[0], page_size=2) == whole
        granted = trail(replica, token, kinds=[audit_pb2.AUDIT_KIND_LEASE_GRANTED], page_size=1)
        assert kinds(granted) == ["LEASE_GRANTED"] * 3
    everything = trail(replica, "", page_size=1000)
    # A lease of another test may have run out since.
    assert trail(replica, "", page_size=100)[: len(everything)] == everything
    for size in (1, 2):  # the first entries of the three apps have one id
        first = base64.urlsafe_b64encode(b"1-9/z").decode()
        assert trail(replica, "", first, page_size=size) == everything[:3]
    assert trail(replica, f"{tokens[0]}x") == []
    for wrong in ("x", "1-1/UPPER", "-1-1/a", "1-1", "\x1b[2J", "1" * 19 + "-1/a", "MS0xL2E=\n"):
        texts = (wrong, base64.urlsafe_b64encode(wrong.encode()).decode())
        request = admin_service_pb2.ListAuditEventsRequest(page_token=texts[wrong[-1] != "\n"])
        assert refusal(replica.admin.ListAuditEvents, request) == "INVALID_FIELD"


def test_a_wrong_secret_is_a_refusal(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals without the secret are in the trail: the first one, and how many followed.

    Fails when only missing roles are recorded, when each refusal is an entry, and when those that
    follow are not counted.
    """
    monkeypatch.setattr(audit, "FIRST_WINDOW_SECONDS", 0.5)
    with Replica(valkey.url) as replica:
        _refuse_wrong_secrets(replica)


def _refuse_wrong_secrets(replica: Replica) -> None:
    token = replica.create_token(0.0)
    offer = replica.hold(token)
    wrong = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret="0" * 64)
    for _ in range(30):
        assert refusal(replica.leases.RenewLease, wrong) == "WRONG_SECRET"
    follow = lease_service_pb2.FollowLeaseRequest(name=offer.lease.name, secret="0" * 64)
    assert refusal(next, replica.leases.FollowLease(follow)) == "WRONG_SECRET"
    refused = [audit_pb2.AUDIT_KIND_CALL_REFUSED]

    def events() -> list[audit_pb2.AuditEvent]:
        found = trail(replica, token, kinds=refused)
        return found if sum(max(1, one.count) for one in found) == 31 else []

    first, second, *more = wait_until(events)
    assert (first.resource, first.reason) == (offer.lease.name, "RenewLease: WRONG_SECRET")
    assert (first.count, first.HasField("first_time")) == (0, False)
    # On a slow machine the calls take longer than one window.
    counted = [one for one in (second, *more) if one.count]
    assert 1 <= len(counted) <= len(more) < 15
    assert all(one.first_time.ToNanoseconds() > 0 for one in counted)
    assert "FollowLease: WRONG_SECRET" in {one.reason for one in (second, *more)}
    assert wrong.secret not in str(more)


def begin_back_offs(replica: Replica, token: str, number: int) -> None:
    """Have the provider block a token for a millisecond, again and again."""
    for _ in range(number):
        event = budget_pb2.Event(
            id=str(uuid.uuid4()),
            kind=budget_pb2.EVENT_KIND_BLOCK,
            scope=budget_pb2.Scope(token=token),
            status=429,
        )
        event.retry_after.FromMilliseconds(1)
        replica.budgets.RecordEvents(budget_service_pb2.RecordEventsRequest(events=[event]))


def test_machines_push_no_operator_out(replica: Replica, store: redis.Redis) -> None:
    """Blocks of a millisecond become an entry with a count, beside what operators did.

    Fails when each is an entry of its own, when the count does not say how many there were, and
    when both are in one stream.
    """
    token = replica.create_token(0.0)
    app = token.rpartition("/tokens/")[0]
    began, blocks = [audit_pb2.AUDIT_KIND_BACK_OFF_BEGAN], 0

    def more() -> list[audit_pb2.AuditEvent]:
        nonlocal blocks
        # Those that come while the one before lasts are the same.
        begin_back_offs(replica, token, 130)
        blocks += 130
        return [one for one in trail(replica, app, kinds=began) if one.count]

    with structlog.testing.capture_logs() as lines:
        counted = wait_until(more)
    events = trail(replica, app, kinds=began)
    assert len(events) <= 2 * 31  # the minute may end meanwhile
    assert 1 <= len(counted) <= 2
    for one in counted:
        assert 0 < one.first_time.ToMicroseconds() <= one.time.ToMicroseconds()
    assert len(events) < sum(max(1, one.count) for one in events) <= blocks
    assert len([line for line in lines if line.get("audit") == "BACK_OFF_BEGAN"]) <= 2 * 33
    machines = f"holdoff:{{{app.removeprefix('apps/')}}}:audit"
    assert store.xlen(machines) == len(events)
    store.delete(machines)
    assert kinds(trail(replica, app)) == ["TOKEN_CREATED"]


def test_one_operator_pushes_no_other_out(replica: Replica) -> None:
    """What one caller does to one token again and again becomes an entry for each kind.

    Fails when the stream of operators' actions takes any number of entries from one of them.
    """
    token = replica.create_token(0.0)
    for _ in range(40):
        request = admin_service_pb2.SetBackOffRequest(
            scope=budget_pb2.Scope(token=token), reason="again"
        )
        request.length.FromSeconds(60)
        name = replica.admin.SetBackOff(request).back_off.name
        replica.admin.ClearBackOff(admin_service_pb2.ClearBackOffRequest(name=name, reason="over"))
    events = trail(replica, token.rpartition("/tokens/")[0])
    assert len(events) <= 2 * 62  # the hour may end meanwhile
    assert sum(max(1, one.count) for one in events) == 81
    many = [one for one in events if one.count]
    assert {one.reason for one in many} <= {
        f"an operator paused {token}: again",
        "over",
    }


def test_it_is_bounded(replica: Replica, store: redis.Redis) -> None:
    """Of an app some 10,000 entries are kept, the newest; a key of another kind is no obstacle.

    Fails without MAXLEN, and when a script ends because the key is no stream.
    """
    token = replica.create_token(0.0)
    key = f"holdoff:{{{token.split('/')[1]}}}:audit"
    with store.pipeline(transaction=False) as pipeline:
        for _ in range(10_300):
            pipeline.xadd(key, {"kind": "LOCK_FREED", "resource": token})
        pipeline.execute()
    replica.release(replica.hold(token))
    assert 10_000 <= store.xlen(key) < 10_200
    store.delete(key)
    store.set(key, "somebody else's")
    replica.release(replica.hold(token))
    found = kinds(trail(replica, token))
    assert found == ["TOKEN_CREATED", "LEASE_GRANTED", "LEASE_RELEASED"]


def test_it_is_the_log_too(replica: Replica) -> None:
    """Each entry is a line of the log, by the replica that added it.

    Fails when scripts do not give back what they added.
    """
    with structlog.testing.capture_logs() as lines:
        token = replica.create_token(0.0)
        offer = replica.hold(token, job="nightly")
        replica.release(offer)
    told = [line for line in lines if line.get("resource", "").startswith(token)]
    assert [line["audit"] for line in told] == ["TOKEN_CREATED", "LEASE_GRANTED", "LEASE_RELEASED"]
    assert told[1]["event"] == "lease granted"
    assert (told[1]["job"], told[1]["identity"]) == ("nightly", "anonymous")
    assert offer.secret not in json.dumps(lines, default=str)


def with_credentials(valkey: Server, work: Callable[[Credentials], Awaitable[T]]) -> T:
    """Work on the credentials of a store."""

    async def run() -> T:
        client = connect(valkey.url)
        try:
            return await work(Credentials(client))
        finally:
            await client.aclose()

    return asyncio.run(run())


def test_refusals_push_nothing_else_out(
    replica: Replica, store: redis.Redis, valkey: Server
) -> None:
    """However often a caller is refused, of ever other things, changes of credentials stay.

    Fails when refusals are in the stream of credentials.
    """
    who = f"jobs-{uuid.uuid4().hex[:12]}"
    one, *_ = with_credentials(valkey, lambda them: them.issue(who, 60, "admin@x"))
    try:
        with store.pipeline(transaction=False) as pipeline:
            for number in range(10_300):
                refused: dict[Any, Any] = {"kind": "CALL_REFUSED", "resource": f"apps/a{number}"}
                pipeline.xadd(REFUSALS, refused, maxlen=AUDIT_KEPT)
            pipeline.execute()
        issued = trail(replica, "", kinds=[audit_pb2.AUDIT_KIND_CREDENTIAL_ISSUED], page_size=1000)
    finally:
        store.delete(REFUSALS)
    assert (f"credentials/{one}", f"of '{who}'") in {(it.resource, it.reason) for it in issued}


def test_no_credential_without_its_entry(store: redis.Redis, valkey: Server) -> None:
    """What cannot be recorded is not done: neither is a credential issued, nor revoked.

    Fails when the change comes before its entry, and when they are two commands.
    """
    one, *_ = with_credentials(valkey, lambda them: them.issue("jobs", 60, "admin@x"))
    before = with_credentials(valkey, lambda them: them.list())
    kept: Any = store.dump(CREDENTIAL_CHANGES)
    store.set(CREDENTIAL_CHANGES, "no stream")
    try:
        for change in (
            lambda them: them.issue("jobs", 60, "admin@x"),
            lambda them: them.revoke(one, "admin@x"),
        ):
            with pytest.raises(Failure):
                with_credentials(valkey, change)
        assert with_credentials(valkey, lambda them: them.list()) == before
    finally:
        store.restore(CREDENTIAL_CHANGES, 0, kept, replace=True)
    assert with_credentials(valkey, lambda them: them.revoke(one, "admin@x")) == "jobs"
