"""How both clients read to a user. Type-checked by mypy and pyright, never run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import assert_type

import holdoff
from holdoff._client import BudgetGuard
from holdoff.v1 import (
    budget_pb2,
    budget_service_pb2,
    grant_pb2,
    lease_pb2,
    lease_service_pb2,
    policy_pb2,
    token_pb2,
)

TOKEN = "apps/exact-nl/tokens/finance"


def refresh_and_work() -> None:
    """What a job does."""


def said(status: lease_pb2.WaitStatus) -> None:
    """What a wait may tell."""
    assert_type(status.message, str)


def gone(error: holdoff.LeaseLost) -> None:
    """What a loss may tell."""
    assert_type(error.reason, str)


def away(error: holdoff.Unavailable) -> None:
    """What an outage may tell."""
    assert_type(error.retry_after_seconds, float | None)


def heard(notice: lease_service_pb2.FollowLeaseResponse) -> None:
    """What a holder may be told."""
    assert_type(notice.instruction, lease_service_pb2.HolderInstruction.ValueType)


def hold() -> None:
    """A job under a lease."""
    deadlines_ns: list[int] = []
    with holdoff.Client("coordinator:50051", timeout_seconds=5) as client:
        assert_type(client, holdoff.Client)
        with client.acquire(
            TOKEN,
            wait_seconds=7200,
            ttl_seconds=120,
            grace_seconds=10,
            job="nightly",
            labels={"run": "4711"},
            scopes=[("535193", "crm/Accounts")],
            on_waiting=said,
            on_unreachable=away,
            on_renewed=deadlines_ns.append,
            on_lost=gone,
            on_notice=heard,
        ) as lease:
            assert_type(lease, holdoff.HeldLease)
            assert_type(lease.fencing_token, int)
            assert_type(lease.deadline_ns, int)
            assert_type(lease.remaining_seconds, float)
            assert_type(lease.policy, policy_pb2.Policy)
            assert_type(lease.rooms, list[lease_service_pb2.ScopeRoom])
            assert_type(lease.notice, lease_service_pb2.FollowLeaseResponse | None)
            assert_type(lease.wait_while_quiet(60), bool)
            lease.command_started()
            refresh_and_work()
            lease.check()
            lease.release(last_refresh_age_seconds=3, saw_every_refresh=True)


async def hold_in_a_loop() -> None:
    """The same for asyncio."""
    deadlines_ns: list[int] = []
    async with holdoff.aio.Client("coordinator:50051", timeout_seconds=5) as client:
        assert_type(client, holdoff.aio.Client)
        async with await client.acquire(
            TOKEN,
            wait_seconds=7200,
            ttl_seconds=120,
            grace_seconds=10,
            job="nightly",
            labels={"run": "4711"},
            scopes=[("535193", "crm/Accounts")],
            on_waiting=said,
            on_unreachable=away,
            on_renewed=deadlines_ns.append,
            on_lost=gone,
            on_notice=heard,
        ) as lease:
            assert_type(lease, holdoff.aio.HeldLease)
            assert_type(lease.fencing_token, int)
            assert_type(lease.deadline_ns, int)
            assert_type(lease.remaining_seconds, float)
            assert_type(lease.policy, policy_pb2.Policy)
            assert_type(lease.rooms, list[lease_service_pb2.ScopeRoom])
            assert_type(lease.notice, lease_service_pb2.FollowLeaseResponse | None)
            assert_type(await lease.wait_while_quiet(60), bool)
            lease.command_started()
            refresh_and_work()
            lease.check()
            await lease.release(last_refresh_age_seconds=3, saw_every_refresh=True)


def ask(client: holdoff.Client) -> None:
    """What an operator asks."""
    assert_type(client.list_leases("apps/exact-nl"), Iterator[lease_pb2.Lease])
    assert_type(client.get_lease(f"{TOKEN}/leases/1"), lease_pb2.Lease)
    assert_type(client.break_lease(f"{TOKEN}/leases/1", "stuck"), lease_pb2.Lease)
    assert_type(client.list_waiters(TOKEN), list[lease_pb2.Waiter])
    assert_type(client.list_lease_history(TOKEN, at=datetime.now(UTC)), list[lease_pb2.Lease])
    assert_type(client.create_token(TOKEN, last_refreshed=30.0), token_pb2.Token)
    assert_type(client.update_token(TOKEN, refresh_at="start"), token_pb2.Token)
    assert_type(client.get_token(TOKEN), token_pb2.Token)
    assert_type(client.list_tokens(), Iterator[token_pb2.Token])
    assert_type(client.list_back_offs("apps/exact-nl"), list[budget_pb2.BackOff])
    assert_type(client.set_back_off(TOKEN, 60, "x", division="1"), budget_pb2.BackOff)
    assert_type(client.clear_back_off("apps/exact-nl/backOffs/b", "x"), budget_pb2.BackOff)
    assert_type(client.explain(TOKEN, job="nightly"), budget_service_pb2.ExplainResponse)
    with contextlib.closing(client.watch_budgets("apps/exact-nl", token=TOKEN)) as changes:
        for change in changes:
            assert_type(change, budget_service_pb2.WatchBudgetsResponse)
    with contextlib.closing(client.watch_leases(TOKEN, resume_token="")) as responses:
        for response in responses:
            assert_type(response, lease_service_pb2.WatchLeasesResponse)


async def ask_in_a_loop(client: holdoff.aio.Client) -> None:
    """The same for asyncio."""
    assert_type(client.list_leases("apps/exact-nl"), AsyncIterator[lease_pb2.Lease])
    assert_type(await client.get_lease(f"{TOKEN}/leases/1"), lease_pb2.Lease)
    assert_type(await client.break_lease(f"{TOKEN}/leases/1", "stuck"), lease_pb2.Lease)
    assert_type(await client.list_waiters(TOKEN), list[lease_pb2.Waiter])
    history = await client.list_lease_history(TOKEN, at=datetime.now(UTC))
    assert_type(history, list[lease_pb2.Lease])
    assert_type(await client.create_token(TOKEN, last_refreshed=30.0), token_pb2.Token)
    assert_type(await client.update_token(TOKEN, refresh_at="start"), token_pb2.Token)
    assert_type(await client.get_token(TOKEN), token_pb2.Token)
    assert_type(client.list_tokens(), AsyncIterator[token_pb2.Token])
    assert_type(await client.list_back_offs("apps/exact-nl"), list[budget_pb2.BackOff])
    assert_type(await client.set_back_off(TOKEN, 60, "x", division="1"), budget_pb2.BackOff)
    assert_type(await client.clear_back_off("apps/exact-nl/backOffs/b", "x"), budget_pb2.BackOff)
    assert_type(await client.explain(TOKEN, job="nightly"), budget_service_pb2.ExplainResponse)
    async with contextlib.aclosing(client.watch_budgets("apps/exact-nl", token=TOKEN)) as changes:
        async for change in changes:
            assert_type(change, budget_service_pb2.WatchBudgetsResponse)
    async with contextlib.aclosing(client.watch_leases(TOKEN, resume_token="")) as responses:
        async for response in responses:
            assert_type(response, lease_service_pb2.WatchLeasesResponse)


def keep(client: holdoff.Client) -> None:
    """What an operator does with custody."""
    put = client.grants.put(
        TOKEN, client_id="c", refresh_token="r", client_authentication="body", replace=True
    )
    assert_type(put, grant_pb2.Grant)
    assert_type(client.grants.get(TOKEN), grant_pb2.Grant)
    assert_type(client.grants.list(), Iterator[grant_pb2.Grant])
    client.grants.delete(TOKEN, etag=put.etag)


async def keep_in_a_loop(client: holdoff.aio.Client) -> None:
    """The same for asyncio."""
    put = await client.grants.put(TOKEN, client_id="c", refresh_token="r", api_hosts=["a", "b"])
    assert_type(put, grant_pb2.Grant)
    assert_type(await client.grants.get(TOKEN), grant_pb2.Grant)
    assert_type(client.grants.list(), AsyncIterator[grant_pb2.Grant])
    await client.grants.delete(TOKEN, etag=put.etag)


def count(client: holdoff.Client) -> None:
    """What a job does before and after its calls."""
    assert_type(client.list_budgets("apps/exact-nl", state="spent"), Iterator[budget_pb2.Budget])
    assert_type(client.get_budget("apps/exact-nl/budgets/errors-1"), budget_pb2.Budget)
    assert_type(client.reset_budget("apps/exact-nl/budgets/errors-1", "x"), budget_pb2.Budget)
    assert_type(
        client.record_error(TOKEN, endpoint="crm/Accounts", status=400, job="nightly"),
        budget_pb2.EventOutcome.ValueType,
    )
    assert_type(client.record_events([budget_pb2.Event()]), list[budget_pb2.EventOutcome.ValueType])
    assert_type(
        client.record_block(TOKEN, status=429, retry_after_seconds=30, throttle="minute"),
        budget_pb2.EventOutcome.ValueType,
    )
    reservation = client.reserve(TOKEN, kind="token_request", wait_seconds=60)
    assert_type(reservation, budget_pb2.Reservation)
    assert_type(client.commit(TOKEN, reservation.id, status=200), budget_pb2.Reservation)
    assert_type(client.cancel(TOKEN, reservation.id), budget_pb2.Reservation)
    with client.budget_guard(TOKEN, division="1", endpoint="crm/Accounts") as guard:
        assert_type(guard, BudgetGuard)
        guard.status = 200
        guard.cancel()

    @client.budget_guard(TOKEN, endpoint="crm/Accounts")
    def accounts(guard: BudgetGuard, page: int, *, size: int = 60) -> str:
        guard.status = 200
        return f"{page} {size}"

    assert_type(accounts(1, size=2), str)
    accounts("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def count_in_a_loop(client: holdoff.aio.Client) -> None:
    """The same for asyncio."""
    budgets = client.list_budgets("apps/exact-nl", state="spent")
    assert_type(budgets, AsyncIterator[budget_pb2.Budget])
    assert_type(await client.get_budget("apps/exact-nl/budgets/errors-1"), budget_pb2.Budget)
    assert_type(
        await client.record_error(TOKEN, endpoint="crm/Accounts", status=400),
        budget_pb2.EventOutcome.ValueType,
    )
    assert_type(
        await client.record_block(TOKEN, status=429, sent_age_seconds=2),
        budget_pb2.EventOutcome.ValueType,
    )
    reservation = await client.reserve(TOKEN, kind="token_request", wait_seconds=60)
    assert_type(await client.commit(TOKEN, reservation.id, status=200), budget_pb2.Reservation)
    assert_type(await client.cancel(TOKEN, reservation.id), budget_pb2.Reservation)
    async with client.budget_guard(TOKEN, division="1", endpoint="crm/Accounts") as guard:
        assert_type(guard, holdoff.aio.BudgetGuard)
        guard.status = 200

    @client.budget_guard(TOKEN, endpoint="crm/Accounts")
    async def accounts(guard: holdoff.aio.BudgetGuard, page: int) -> str:
        guard.status = 200
        return str(page)

    assert_type(await accounts(1), str)


def tell_apart(client: holdoff.Client) -> float | None:
    """What can go wrong: broad classes at the top, one for every reason in `holdoff.errors`."""
    try:
        client.acquire(TOKEN, wait_seconds=0)
    except holdoff.errors.TokenCooling as error:
        return assert_type(error.retry_after_seconds, float | None)
    except holdoff.NotGranted as error:
        assert_type(error.metadata, dict[str, str])
    except (holdoff.Unavailable, holdoff.NotFound, holdoff.HoldoffError) as error:
        assert_type(error.reason, str)
    return None


def refused(client: holdoff.Client, loop: holdoff.aio.Client) -> None:
    """What a type checker must refuse; an ignore that is not needed is an error itself."""
    client.acquire(TOKEN, 60)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.acquire(TOKEN, wait=60)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.acquire(TOKEN, on_lost=said)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with loop.acquire(TOKEN):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    holdoff.Nothing  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
