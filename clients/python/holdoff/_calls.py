"""The calls of the API: what to ask, and how to read the answer. No sockets (sans-I/O).

Both clients carry out what these functions describe, so that each request is written down once.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from holdoff._core import WITHDRAWAL_SECONDS, duration, here
from holdoff._text import MOST_JOB_CHARACTERS, described, to_report
from holdoff.v1 import (
    admin_service_pb2,
    audit_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
    policy_pb2,
    policy_service_pb2,
    token_pb2,
    token_service_pb2,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from holdoff._core import Renewal

_LEASES = "/holdoff.v1.LeaseService"
_TOKENS = "/holdoff.v1.TokenService"
_POLICIES = "/holdoff.v1.PolicyService"
_BUDGETS = "/holdoff.v1.BudgetService"
_ADMIN = "/holdoff.v1.AdminService"

_ACCEPTANCE_SECONDS = 1.0
_RELEASE_SECONDS = 3.0
_BUDGET_SECONDS = 3.0
_MOST_EVENTS = 100
"""So many may be in one request."""

CallKind = Literal["call", "token_request"]
"""What room is reserved for: a call of the API, or one of the token endpoint."""
BudgetState = Literal["open", "low", "spent"]

ItemT = TypeVar("ItemT")
ResponseT = TypeVar("ResponseT", bound=Message)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Call(Generic[ResponseT, ResultT]):
    """One call with one answer."""

    method: str
    """Path of the method, as gRPC wants it."""
    request: Message
    response: type[ResponseT]
    read: Callable[[ResponseT], ResultT]
    """Turns the response into what the caller asked for."""
    timeout_seconds: float | None = None
    """How long it may take; None for what the client says."""


@dataclass(frozen=True, slots=True)
class Page(Generic[ItemT]):
    """Part of a listing."""

    items: Sequence[ItemT]
    following: Call[Any, Page[ItemT]] | None
    """Asks for the next part; None on the last one."""


def renew_lease(
    offer: lease_service_pb2.LeaseOffer, renewal: Renewal | None = None
) -> Call[Any, lease_pb2.Lease]:
    """Prolong a lease, or accept the offer of it when there is no renewal yet."""
    return Call(
        f"{_LEASES}/RenewLease",
        lease_service_pb2.RenewLeaseRequest(
            name=offer.lease.name,
            secret=offer.secret,
            command_started=renewal is not None and renewal.command_started,
            command_paused=renewal is not None and renewal.command_paused,
        ),
        lease_service_pb2.RenewLeaseResponse,
        lambda response: response.lease,
        renewal.timeout_seconds if renewal else _ACCEPTANCE_SECONDS,
    )


def release_lease(
    offer: lease_service_pb2.LeaseOffer,
    last_refresh_age_seconds: float | None = None,
    *,
    saw_every_refresh: bool = False,
    unused: bool = False,
) -> Call[Any, lease_pb2.Lease]:
    """End a lease."""
    age = None if last_refresh_age_seconds is None else duration(last_refresh_age_seconds)
    report = lease_service_pb2.RefreshReport(
        last_refresh_age=age, saw_every_refresh=saw_every_refresh
    )
    return Call(
        f"{_LEASES}/ReleaseLease",
        lease_service_pb2.ReleaseLeaseRequest(
            name=offer.lease.name, secret=offer.secret, refresh=report, unused=unused
        ),
        lease_service_pb2.ReleaseLeaseResponse,
        lambda response: response.lease,
        _RELEASE_SECONDS,
    )


def get_lease(name: str) -> Call[Any, lease_pb2.Lease]:
    """Read one lease."""
    return Call(
        f"{_LEASES}/GetLease",
        lease_service_pb2.GetLeaseRequest(name=name),
        lease_service_pb2.GetLeaseResponse,
        lambda response: response.lease,
    )


def list_leases(parent: str, page_token: str = "") -> Call[Any, Page[lease_pb2.Lease]]:
    """Read a page of live leases."""

    def read(response: lease_service_pb2.ListLeasesResponse) -> Page[lease_pb2.Lease]:
        token = response.next_page_token
        return Page(response.leases, list_leases(parent, token) if token else None)

    return Call(
        f"{_LEASES}/ListLeases",
        lease_service_pb2.ListLeasesRequest(parent=parent, page_token=page_token),
        lease_service_pb2.ListLeasesResponse,
        read,
    )


def list_lease_history(token: str, at: datetime | None) -> Call[Any, list[lease_pb2.Lease]]:
    """Read the latest leases of a token.

    Raises:
        ValueError: `at` has no time zone.
    """
    at_time = None
    if at is not None:
        if at.utcoffset() is None:
            raise ValueError("`at` needs a time zone, such as datetime.now(UTC) has")
        at_time = timestamp_pb2.Timestamp()
        at_time.FromDatetime(at)
    return Call(
        f"{_LEASES}/ListLeaseHistory",
        lease_service_pb2.ListLeaseHistoryRequest(parent=token, at_time=at_time),
        lease_service_pb2.ListLeaseHistoryResponse,
        lambda response: list(response.leases),
    )


def list_waiters(token: str) -> Call[Any, list[lease_pb2.Waiter]]:
    """Read who waits for a token."""
    return Call(
        f"{_LEASES}/ListWaiters",
        lease_service_pb2.ListWaitersRequest(parent=token),
        lease_service_pb2.ListWaitersResponse,
        lambda response: list(response.waiters),
    )


def break_lease(name: str, reason: str) -> Call[Any, lease_pb2.Lease]:
    """Forbid the renewal of a lease."""
    return Call(
        f"{_ADMIN}/BreakLease",
        admin_service_pb2.BreakLeaseRequest(name=name, reason=reason, holder=here()),
        admin_service_pb2.BreakLeaseResponse,
        lambda response: response.lease,
    )


def parts(events: Sequence[budget_pb2.Event]) -> list[Sequence[budget_pb2.Event]]:
    """Split events into as many parts as it takes calls to report them."""
    return [events[first : first + _MOST_EVENTS] for first in range(0, len(events), _MOST_EVENTS)]


def record_events(
    events: Sequence[budget_pb2.Event],
) -> Call[Any, budget_service_pb2.RecordEventsResponse]:
    """Report what happened; a part of `parts`."""
    return Call(
        f"{_BUDGETS}/RecordEvents",
        budget_service_pb2.RecordEventsRequest(events=events),
        budget_service_pb2.RecordEventsResponse,
        lambda response: response,
    )


def scope(token: str, division: str, endpoint: str) -> budget_pb2.Scope:
    """Say where something happens; an empty text means any."""
    return budget_pb2.Scope(token=token, division=division, endpoint=to_report(endpoint))


def scope_of(token_or_app: str, division: str, endpoint: str) -> budget_pb2.Scope:
    """Say for whom something stands: a token, or a whole app."""
    app, tokens, _ = token_or_app.partition("/tokens/")
    return budget_pb2.Scope(
        app=app,
        token=token_or_app if tokens else "",
        division=division,
        endpoint=to_report(endpoint),
    )


def error_event(  # noqa: PLR0913 - each is part of the event
    where: budget_pb2.Scope,
    *,
    status: int = 0,
    count: int = 1,
    job: str = "",
    age_seconds: float = 0.0,
    event_id: str | None = None,
) -> budget_pb2.Event:
    """Describe an answer that is an error, by default with an id of its own.

    Raises:
        ValueError: `count` is not positive.
    """
    return budget_pb2.Event(
        id=event_id or str(uuid.uuid4()),
        kind=budget_pb2.EVENT_KIND_ERROR,
        scope=where,
        count=_positive(count),
        status=status,
        age=duration(age_seconds),
        holder=here(job),
    )


def block_event(  # noqa: PLR0913 - each is part of the event
    where: budget_pb2.Scope,
    *,
    status: int = 0,
    retry_after_seconds: float | None = None,
    throttle: str = "",
    job: str = "",
    age_seconds: float = 0.0,
    sent_age_seconds: float | None = None,
    event_id: str | None = None,
) -> budget_pb2.Event:
    """Describe an answer that blocks or throttles, by default with an id of its own."""
    return budget_pb2.Event(
        id=event_id or str(uuid.uuid4()),
        kind=budget_pb2.EVENT_KIND_BLOCK,
        scope=where,
        status=status,
        age=duration(age_seconds),
        holder=here(job),
        retry_after=None if retry_after_seconds is None else duration(retry_after_seconds),
        sent_age=None if sent_age_seconds is None else duration(sent_age_seconds),
        throttle=throttle,
    )


def reserve_request(
    where: budget_pb2.Scope, kind: CallKind, count: int, ttl_seconds: float
) -> budget_service_pb2.ReserveRequest:
    """Describe the room that is wanted; it gets its id from who asks.

    Raises:
        ValueError: `kind` is neither "call" nor "token_request", or `count` is not positive.
    """
    if kind not in ("call", "token_request"):
        raise ValueError('kind must be "call" or "token_request"')
    return budget_service_pb2.ReserveRequest(
        scope=where,
        kind=budget_pb2.EventKind.Value(f"EVENT_KIND_{kind.upper()}"),
        count=_positive(count),
        ttl=duration(ttl_seconds),
    )


def reserve(request: budget_service_pb2.ReserveRequest) -> Call[Any, budget_pb2.Reservation]:
    """Take room before a call."""
    return Call(
        f"{_BUDGETS}/Reserve",
        request,
        budget_service_pb2.ReserveResponse,
        lambda response: response.reservation,
        _BUDGET_SECONDS,
    )


def commit(
    token: str, reservation_id: str, status: int, age_seconds: float = 0.0
) -> Call[Any, budget_pb2.Reservation]:
    """Say that a call was made."""
    return Call(
        f"{_BUDGETS}/Commit",
        budget_service_pb2.CommitRequest(
            reservation_id=reservation_id,
            app=_app_of(token),
            status=status,
            age=duration(age_seconds),
        ),
        budget_service_pb2.CommitResponse,
        lambda response: response.reservation,
        _BUDGET_SECONDS,
    )


def cancel(token: str, reservation_id: str) -> Call[Any, budget_pb2.Reservation]:
    """Say that a call was not made."""
    return Call(
        f"{_BUDGETS}/Cancel",
        budget_service_pb2.CancelRequest(reservation_id=reservation_id, app=_app_of(token)),
        budget_service_pb2.CancelResponse,
        lambda response: response.reservation,
        _BUDGET_SECONDS,
    )


def give_up(request: budget_service_pb2.ReserveRequest) -> Call[Any, budget_pb2.Reservation]:
    """Cancel a reservation of which it is not known whether it was made."""
    call = cancel(request.scope.token, request.reservation_id)
    return replace(call, timeout_seconds=WITHDRAWAL_SECONDS)


def get_budget(name: str) -> Call[Any, budget_pb2.Budget]:
    """Read one budget."""
    return Call(
        f"{_BUDGETS}/GetBudget",
        budget_service_pb2.GetBudgetRequest(name=name),
        budget_service_pb2.GetBudgetResponse,
        lambda response: response.budget,
    )


def list_budgets(
    parent: str, where: budget_pb2.Scope, state: BudgetState | None, page_token: str = ""
) -> Call[Any, Page[budget_pb2.Budget]]:
    """Read a page of budgets.

    Raises:
        ValueError: `state` is none of a budget.
    """
    if state not in (None, "open", "low", "spent"):
        raise ValueError('state must be "open", "low" or "spent"')

    def read(response: budget_service_pb2.ListBudgetsResponse) -> Page[budget_pb2.Budget]:
        token = response.next_page_token
        return Page(response.budgets, list_budgets(parent, where, state, token) if token else None)

    return Call(
        f"{_BUDGETS}/ListBudgets",
        budget_service_pb2.ListBudgetsRequest(
            parent=parent,
            scope=where,
            state=budget_pb2.BudgetState.Value(f"BUDGET_STATE_{(state or 'unspecified').upper()}"),
            page_token=page_token,
        ),
        budget_service_pb2.ListBudgetsResponse,
        read,
    )


def reset_budget(name: str, reason: str) -> Call[Any, budget_pb2.Budget]:
    """Make a budget forget what it counted."""
    return Call(
        f"{_ADMIN}/ResetBudget",
        admin_service_pb2.ResetBudgetRequest(name=name, reason=reason, holder=here()),
        admin_service_pb2.ResetBudgetResponse,
        lambda response: response.budget,
    )


def list_audit_events(
    parent: str, kinds: Sequence[audit_pb2.AuditKind.ValueType] = (), page_token: str = ""
) -> Call[Any, Page[audit_pb2.AuditEvent]]:
    """Read a page of the audit trail."""

    def read(response: admin_service_pb2.ListAuditEventsResponse) -> Page[audit_pb2.AuditEvent]:
        token = response.next_page_token
        return Page(response.events, list_audit_events(parent, kinds, token) if token else None)

    return Call(
        f"{_ADMIN}/ListAuditEvents",
        admin_service_pb2.ListAuditEventsRequest(parent=parent, kinds=kinds, page_token=page_token),
        admin_service_pb2.ListAuditEventsResponse,
        read,
    )


def list_back_offs(parent: str) -> Call[Any, list[budget_pb2.BackOff]]:
    """Read the back-offs that are not over."""
    return Call(
        f"{_BUDGETS}/ListBackOffs",
        budget_service_pb2.ListBackOffsRequest(parent=parent),
        budget_service_pb2.ListBackOffsResponse,
        lambda response: list(response.back_offs),
    )


def set_back_off(
    where: budget_pb2.Scope, length_seconds: float, reason: str
) -> Call[Any, budget_pb2.BackOff]:
    """Make everybody in a scope quiet."""
    return Call(
        f"{_ADMIN}/SetBackOff",
        admin_service_pb2.SetBackOffRequest(
            scope=where, length=duration(length_seconds), reason=reason, holder=here()
        ),
        admin_service_pb2.SetBackOffResponse,
        lambda response: response.back_off,
    )


def clear_back_off(name: str, reason: str) -> Call[Any, budget_pb2.BackOff]:
    """End a back-off."""
    return Call(
        f"{_ADMIN}/ClearBackOff",
        admin_service_pb2.ClearBackOffRequest(name=name, reason=reason, holder=here()),
        admin_service_pb2.ClearBackOffResponse,
        lambda response: response.back_off,
    )


def list_quarantines(parent: str) -> Call[Any, list[lease_pb2.Quarantine]]:
    """Read which apps are in quarantine."""
    return Call(
        f"{_LEASES}/ListQuarantines",
        lease_service_pb2.ListQuarantinesRequest(parent=parent),
        lease_service_pb2.ListQuarantinesResponse,
        lambda response: list(response.quarantines),
    )


def end_quarantine(app: str, reason: str) -> Call[Any, lease_pb2.Quarantine]:
    """End the quarantine of an app."""
    return Call(
        f"{_ADMIN}/EndQuarantine",
        admin_service_pb2.EndQuarantineRequest(app=app, reason=reason, holder=here()),
        admin_service_pb2.EndQuarantineResponse,
        lambda response: response.quarantine,
    )


def explain(where: budget_pb2.Scope, job: str) -> Call[Any, budget_service_pb2.ExplainResponse]:
    """Ask whether something may go on now."""
    return Call(
        f"{_BUDGETS}/Explain",
        budget_service_pb2.ExplainRequest(scope=where, job=described(job, MOST_JOB_CHARACTERS)),
        budget_service_pb2.ExplainResponse,
        lambda response: response,
    )


def follow_lease(
    offer: lease_service_pb2.LeaseOffer,
) -> lease_service_pb2.FollowLeaseRequest:
    """Ask to be told what the holder of a lease must do."""
    return lease_service_pb2.FollowLeaseRequest(name=offer.lease.name, secret=offer.secret)


def create_token(
    name: str,
    policy: str,
    refresh_interval_seconds: float | None,
    refresh_at: str | None,
    last_refreshed: str | float,
) -> Call[Any, token_pb2.Token]:
    """Create a token.

    Raises:
        ValueError: `refresh_at` or `last_refreshed` is not one of the words it may be.
    """
    request = token_service_pb2.CreateTokenRequest(
        token=_token(name, policy, refresh_interval_seconds, refresh_at)
    )
    if isinstance(last_refreshed, str):
        if last_refreshed not in ("never", "unknown"):
            raise ValueError('last_refreshed must be "never", "unknown" or an age in seconds')
        if last_refreshed == "unknown":
            request.last_refresh_unknown = True
    else:
        request.last_refresh_age.CopyFrom(duration(last_refreshed))
    return Call(
        f"{_TOKENS}/CreateToken",
        request,
        token_service_pb2.CreateTokenResponse,
        lambda response: response.token,
    )


def update_token(
    name: str,
    policy: str | None,
    refresh_interval_seconds: float | Literal["policy"] | None,
    refresh_at: str | None,
) -> Call[Any, token_pb2.Token]:
    """Change what is not None of a token; only read it if there is nothing to change.

    Raises:
        ValueError: `refresh_at` is not one of the words it may be.
    """
    request = token_service_pb2.UpdateTokenRequest(
        token=_token(
            name,
            policy or "",
            None if refresh_interval_seconds == "policy" else refresh_interval_seconds,
            None if refresh_at == "policy" else refresh_at,
        )
    )
    for field, value in (
        ("policy", policy),
        ("refresh_interval", refresh_interval_seconds),
        ("refresh_at", refresh_at),
    ):
        if value is not None:
            request.update_mask.paths.append(field)
    if not request.update_mask.paths:
        return get_token(name)
    return Call(
        f"{_TOKENS}/UpdateToken",
        request,
        token_service_pb2.UpdateTokenResponse,
        lambda response: response.token,
    )


def get_token(name: str) -> Call[Any, token_pb2.Token]:
    """Read one token."""
    return Call(
        f"{_TOKENS}/GetToken",
        token_service_pb2.GetTokenRequest(name=name),
        token_service_pb2.GetTokenResponse,
        lambda response: response.token,
    )


def list_tokens(parent: str, page_token: str = "") -> Call[Any, Page[token_pb2.Token]]:
    """Read a page of tokens."""

    def read(response: token_service_pb2.ListTokensResponse) -> Page[token_pb2.Token]:
        token = response.next_page_token
        return Page(response.tokens, list_tokens(parent, token) if token else None)

    return Call(
        f"{_TOKENS}/ListTokens",
        token_service_pb2.ListTokensRequest(parent=parent, page_token=page_token),
        token_service_pb2.ListTokensResponse,
        read,
    )


def get_policy(name: str) -> Call[Any, policy_pb2.Policy]:
    """Read one policy."""
    return Call(
        f"{_POLICIES}/GetPolicy",
        policy_service_pb2.GetPolicyRequest(name=name),
        policy_service_pb2.GetPolicyResponse,
        lambda response: response.policy,
    )


def list_policies() -> Call[Any, list[policy_pb2.Policy]]:
    """Read all policies."""
    return Call(
        f"{_POLICIES}/ListPolicies",
        policy_service_pb2.ListPoliciesRequest(),
        policy_service_pb2.ListPoliciesResponse,
        lambda response: list(response.policies),
    )


def _app_of(token: str) -> str:
    """Return the app of a token; what is no name of one is refused by the coordinator."""
    return token.partition("/tokens/")[0]


def _positive(count: int) -> int:
    if count < 1:  # on the wire 0 means 1
        raise ValueError("count must be at least 1")
    return count


def _token(
    name: str, policy: str, refresh_interval_seconds: float | None, refresh_at: str | None
) -> token_pb2.Token:
    if refresh_at not in (None, "end", "start"):
        raise ValueError('refresh_at must be "end" or "start"')
    interval = None if refresh_interval_seconds is None else duration(refresh_interval_seconds)
    return token_pb2.Token(
        name=name,
        policy=policy,
        refresh_interval=interval,
        refresh_at=token_pb2.RefreshAt.Value(f"REFRESH_AT_{(refresh_at or 'unspecified').upper()}"),
    )
