"""The calls of the API: what to ask, and how to read the answer. No sockets (sans-I/O).

Both clients carry out what these functions describe, so that each request is written down once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from holdoff._core import duration
from holdoff.v1 import (
    admin_service_pb2,
    lease_pb2,
    lease_service_pb2,
    token_pb2,
    token_service_pb2,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from holdoff._core import Renewal

_LEASES = "/holdoff.v1.LeaseService"
_TOKENS = "/holdoff.v1.TokenService"
_ADMIN = "/holdoff.v1.AdminService"

_ACCEPTANCE_SECONDS = 1.0
_RELEASE_SECONDS = 3.0

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
) -> Call[Any, lease_pb2.Lease]:
    """End a lease."""
    age = None if last_refresh_age_seconds is None else duration(last_refresh_age_seconds)
    report = lease_service_pb2.RefreshReport(
        last_refresh_age=age, saw_every_refresh=saw_every_refresh
    )
    return Call(
        f"{_LEASES}/ReleaseLease",
        lease_service_pb2.ReleaseLeaseRequest(
            name=offer.lease.name, secret=offer.secret, refresh=report
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
        admin_service_pb2.BreakLeaseRequest(name=name, reason=reason),
        admin_service_pb2.BreakLeaseResponse,
        lambda response: response.lease,
    )


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
