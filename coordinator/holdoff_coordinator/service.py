"""The gRPC side: thin adapters from calls and streams to handlers, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as reflection_messages
from grpc_reflection.v1alpha._async import ReflectionServicer
from grpc_status import rpc_status

from holdoff.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    budget_service_pb2,
    budget_service_pb2_grpc,
    custody_service_pb2,
    custody_service_pb2_grpc,
    lease_service_pb2,
    lease_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    token_service_pb2,
    token_service_pb2_grpc,
)
from holdoff_coordinator.failures import Failure, budget_not_found, invalid
from holdoff_coordinator.gate import Origin
from holdoff_coordinator.hub import Waiter
from holdoff_coordinator.requests import Malformed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from google.protobuf.message import Message
    from google.rpc import status_pb2

    from holdoff_coordinator.audit import AuditTrail
    from holdoff_coordinator.backoffs import BackOffs
    from holdoff_coordinator.budgets import Budgets
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.authorizing import Authorizations
    from holdoff_coordinator.custody.checking import GrantChecks
    from holdoff_coordinator.custody.grants import Grants
    from holdoff_coordinator.custody.handout import HandOuts
    from holdoff_coordinator.custody.key_rotation import KeyRotation
    from holdoff_coordinator.followers import Followers
    from holdoff_coordinator.gate import Admitted, Gate
    from holdoff_coordinator.leases import Leases
    from holdoff_coordinator.limits import Limits
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.quarantines import Quarantines
    from holdoff_coordinator.tokens import Tokens
    from holdoff_coordinator.watches import BudgetWatches, Watches

log = structlog.get_logger()

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (lease_service_pb2, "LeaseService"),
        (token_service_pb2, "TokenService"),
        (budget_service_pb2, "BudgetService"),
        (custody_service_pb2, "CustodyService"),
        (policy_service_pb2, "PolicyService"),
        (admin_service_pb2, "AdminService"),
    )
)
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
FIRST_SECONDS = 60.0
"""A stream must begin with its request within this time: before, its caller is not known."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """What answers the calls, and what stands before it."""

    gate: Gate
    limits: Limits
    trail: AuditTrail
    leases: Leases
    followers: Followers
    watches: Watches
    tokens: Tokens
    grants: Grants
    authorizations: Authorizations
    grant_checks: GrantChecks
    hand_outs: HandOuts
    key_rotation: KeyRotation
    budgets: Budgets
    back_offs: BackOffs
    budget_watches: BudgetWatches
    quarantines: Quarantines
    policies: Policies


RequestT = TypeVar("RequestT", bound="Message")
ResponseT = TypeVar("ResponseT", bound="Message")
Context = grpc.aio.ServicerContext[Any, Any]


async def _abort(context: Context, status: status_pb2.Status) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError  # abort_with_status always raises


class _Adapter:
    """Admits a call, lets its handler answer, and sends failures as rich status."""

    def __init__(self, handlers: Handlers) -> None:
        self._gate = handlers.gate
        self._limits = handlers.limits
        self._handlers = handlers

    async def _answer(
        self,
        handler: Callable[[RequestT, Caller], Awaitable[ResponseT]],
        request: RequestT,
        context: Context,
    ) -> ResponseT:
        admitted = await self._admit(request, context)
        try:
            async with self._limits.kept(request, admitted.caller):
                shown = admitted.shown(await handler(request, admitted.caller))
            if shown is None:  # as if there were none: its id alone does not say whose it is
                raise budget_not_found(getattr(request, "name", ""))
            return shown
        except Failure as failure:
            await self._fail(failure, request, admitted.caller, context)

    async def _admit(
        self, request: Message | Malformed, context: Context, origin: Origin | None = None
    ) -> Admitted:
        try:
            return await self._gate.admit(request, origin or Origin.of(context))
        except Failure as failure:
            await _abort(context, failure.to_status())

    async def _stream(
        self,
        handler: Callable[[RequestT, Caller], AsyncGenerator[ResponseT, None]],
        request: RequestT,
        context: Context,
    ) -> AsyncGenerator[ResponseT, None]:
        """The same for many answers; it ends when the caller loses the right to them."""
        origin = Origin.of(context)
        admitted = await self._admit(request, context, origin)
        try:
            async with (
                self._limits.kept(request, admitted.caller),
                contextlib.aclosing(handler(request, admitted.caller)) as responses,
            ):
                with self._gate.staying(request, origin) as stay:
                    while (response := await stay.next(responses)) is not None:
                        admitted = await self._admit(request, context, origin)
                        shown = admitted.shown(response)
                        if shown is not None:
                            yield shown
        except Failure as failure:
            await self._fail(failure, request, admitted.caller, context)

    async def _fail(
        self, failure: Failure, request: Message, caller: Caller, context: Context
    ) -> NoReturn:
        if failure.reason == "WRONG_SECRET":
            await self._gate.refused(request, caller, failure)
        await _abort(context, failure.to_status())


class LeaseService(_Adapter, lease_service_pb2_grpc.LeaseServiceServicer):
    """`holdoff.v1.LeaseService`."""

    async def AcquireLease(  # noqa: N802
        self, request: lease_service_pb2.AcquireLeaseRequest, context: Context
    ) -> lease_service_pb2.AcquireLeaseResponse:
        """Answer with the first event of the conversation."""
        admitted = await self._admit(request, context)
        try:
            async with (
                self._limits.kept(request, admitted.caller),
                contextlib.aclosing(
                    self._handlers.leases.acquire(request, admitted.caller, Waiter())
                ) as events,
            ):
                event = await anext(events)
        except Failure as failure:
            await self._fail(failure, request, admitted.caller, context)
        if event.HasField("error"):
            await _abort(context, event.error)
        return event

    async def StreamAcquireLease(  # noqa: N802
        self,
        requests: AsyncIterator[lease_service_pb2.StreamAcquireLeaseRequest],
        context: Context,
    ) -> AsyncIterator[lease_service_pb2.StreamAcquireLeaseResponse]:
        """Pass on all events of the conversation."""
        first = lease_service_pb2.StreamAcquireLeaseRequest()
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                first = await anext(aiter(requests), first)
        except TimeoutError:
            silent = Failure("WAITER_SILENT", "this stream had no request for a minute")
            await _abort(context, silent.to_status())
        if isinstance(first, Malformed):
            await self._admit(first, context)
        if not first.HasField("acquire"):
            await _abort(
                context,
                invalid("acquire", "must be the first message").to_status(),
            )
        waiter = Waiter()
        listening = asyncio.create_task(_listen(requests, waiter))

        def acquire(
            request: lease_service_pb2.AcquireLeaseRequest, caller: Caller
        ) -> AsyncGenerator[lease_service_pb2.AcquireLeaseResponse, None]:
            return self._handlers.leases.acquire(request, caller, waiter)

        events = self._stream(acquire, first.acquire, context)
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield lease_service_pb2.StreamAcquireLeaseResponse(event=event)
        finally:
            listening.cancel()

    async def FollowLease(  # noqa: N802
        self, request: lease_service_pb2.FollowLeaseRequest, context: Context
    ) -> AsyncIterator[lease_service_pb2.FollowLeaseResponse]:
        """Tell the holder what to do."""
        async for response in self._stream(self._handlers.followers.follow, request, context):
            yield response

    async def RenewLease(  # noqa: N802
        self, request: lease_service_pb2.RenewLeaseRequest, context: Context
    ) -> lease_service_pb2.RenewLeaseResponse:
        """Accept or prolong."""
        return await self._answer(self._handlers.leases.renew, request, context)

    async def ReleaseLease(  # noqa: N802
        self, request: lease_service_pb2.ReleaseLeaseRequest, context: Context
    ) -> lease_service_pb2.ReleaseLeaseResponse:
        """End."""
        return await self._answer(self._handlers.leases.release, request, context)

    async def GetLease(  # noqa: N802
        self, request: lease_service_pb2.GetLeaseRequest, context: Context
    ) -> lease_service_pb2.GetLeaseResponse:
        """Show one."""
        return await self._answer(self._handlers.leases.get, request, context)

    async def ListLeases(  # noqa: N802
        self, request: lease_service_pb2.ListLeasesRequest, context: Context
    ) -> lease_service_pb2.ListLeasesResponse:
        """Show the live ones."""
        return await self._answer(self._handlers.leases.list, request, context)

    async def ListLeaseHistory(  # noqa: N802
        self, request: lease_service_pb2.ListLeaseHistoryRequest, context: Context
    ) -> lease_service_pb2.ListLeaseHistoryResponse:
        """Show the latest ones of a token."""
        return await self._answer(self._handlers.leases.history, request, context)

    async def ListWaiters(  # noqa: N802
        self, request: lease_service_pb2.ListWaitersRequest, context: Context
    ) -> lease_service_pb2.ListWaitersResponse:
        """Show who waits."""
        return await self._answer(self._handlers.leases.waiters, request, context)

    async def ListQuarantines(  # noqa: N802
        self, request: lease_service_pb2.ListQuarantinesRequest, context: Context
    ) -> lease_service_pb2.ListQuarantinesResponse:
        """Show which apps grant nothing new."""
        return await self._answer(self._handlers.quarantines.list, request, context)

    async def WatchLeases(  # noqa: N802
        self, request: lease_service_pb2.WatchLeasesRequest, context: Context
    ) -> AsyncIterator[lease_service_pb2.WatchLeasesResponse]:
        """Tell every change."""
        async for response in self._stream(self._handlers.watches.watch, request, context):
            yield response


async def _listen(
    requests: AsyncIterator[lease_service_pb2.StreamAcquireLeaseRequest], waiter: Waiter
) -> None:
    """Hear the client of a stream; the end of its messages alone says nothing."""
    async for message in requests:
        if isinstance(message, Malformed):
            waiter.fail(message.failure())
        elif message.HasField("withdraw"):
            waiter.withdraw()
        elif message.HasField("heartbeat"):
            waiter.hear()
        elif message.HasField("acquire"):
            waiter.fail(invalid("acquire", "comes once, first: open another stream for another"))


class TokenService(_Adapter, token_service_pb2_grpc.TokenServiceServicer):
    """`holdoff.v1.TokenService`."""

    async def CreateToken(  # noqa: N802
        self, request: token_service_pb2.CreateTokenRequest, context: Context
    ) -> token_service_pb2.CreateTokenResponse:
        """Create."""
        return await self._answer(self._handlers.tokens.create, request, context)

    async def UpdateToken(  # noqa: N802
        self, request: token_service_pb2.UpdateTokenRequest, context: Context
    ) -> token_service_pb2.UpdateTokenResponse:
        """Change."""
        return await self._answer(self._handlers.tokens.update, request, context)

    async def GetToken(  # noqa: N802
        self, request: token_service_pb2.GetTokenRequest, context: Context
    ) -> token_service_pb2.GetTokenResponse:
        """Show one."""
        return await self._answer(self._handlers.tokens.get, request, context)

    async def ListTokens(  # noqa: N802
        self, request: token_service_pb2.ListTokensRequest, context: Context
    ) -> token_service_pb2.ListTokensResponse:
        """Show many."""
        return await self._answer(self._handlers.tokens.list, request, context)


class CustodyService(_Adapter, custody_service_pb2_grpc.CustodyServiceServicer):
    """`holdoff.v1.CustodyService`."""

    async def PutGrant(  # noqa: N802
        self, request: custody_service_pb2.PutGrantRequest, context: Context
    ) -> custody_service_pb2.PutGrantResponse:
        """Take into custody."""
        return await self._answer(self._handlers.grants.put, request, context)

    async def BeginAuthorization(  # noqa: N802
        self, request: custody_service_pb2.BeginAuthorizationRequest, context: Context
    ) -> custody_service_pb2.BeginAuthorizationResponse:
        """Take the right to an authorization."""
        return await self._answer(self._handlers.authorizations.begin, request, context)

    async def CompleteAuthorization(  # noqa: N802
        self, request: custody_service_pb2.CompleteAuthorizationRequest, context: Context
    ) -> custody_service_pb2.CompleteAuthorizationResponse:
        """Exchange its code."""
        return await self._answer(self._handlers.authorizations.complete, request, context)

    async def GetGrant(  # noqa: N802
        self, request: custody_service_pb2.GetGrantRequest, context: Context
    ) -> custody_service_pb2.GetGrantResponse:
        """Show one."""
        return await self._answer(self._handlers.grants.get, request, context)

    async def ListGrants(  # noqa: N802
        self, request: custody_service_pb2.ListGrantsRequest, context: Context
    ) -> custody_service_pb2.ListGrantsResponse:
        """Show many."""
        return await self._answer(self._handlers.grants.list, request, context)

    async def DeleteGrant(  # noqa: N802
        self, request: custody_service_pb2.DeleteGrantRequest, context: Context
    ) -> custody_service_pb2.DeleteGrantResponse:
        """End custody."""
        return await self._answer(self._handlers.grants.delete, request, context)

    async def TrustGrant(  # noqa: N802
        self, request: custody_service_pb2.TrustGrantRequest, context: Context
    ) -> custody_service_pb2.TrustGrantResponse:
        """Take an operator's word."""
        return await self._answer(self._handlers.grants.trust, request, context)

    async def RotateKeys(  # noqa: N802
        self, request: custody_service_pb2.RotateKeysRequest, context: Context
    ) -> custody_service_pb2.RotateKeysResponse:
        """Encrypt with another key."""
        return await self._answer(self._handlers.key_rotation.rotate, request, context)

    async def WatchGrant(  # noqa: N802
        self, request: custody_service_pb2.WatchGrantRequest, context: Context
    ) -> AsyncIterator[custody_service_pb2.WatchGrantResponse]:
        """Tell every change."""
        async for response in self._stream(self._handlers.hand_outs.watch, request, context):
            yield response

    async def GetAccessToken(  # noqa: N802
        self, request: custody_service_pb2.GetAccessTokenRequest, context: Context
    ) -> AsyncIterator[custody_service_pb2.GetAccessTokenResponse]:
        """Hand out access tokens."""
        async for response in self._stream(self._handlers.hand_outs.hand_out, request, context):
            yield response

    async def CheckGrant(  # noqa: N802
        self, request: custody_service_pb2.CheckGrantRequest, context: Context
    ) -> custody_service_pb2.CheckGrantResponse:
        """Check what a refresh needs."""
        return await self._answer(self._handlers.grant_checks.check, request, context)


class BudgetService(_Adapter, budget_service_pb2_grpc.BudgetServiceServicer):
    """`holdoff.v1.BudgetService`."""

    async def RecordEvents(  # noqa: N802
        self, request: budget_service_pb2.RecordEventsRequest, context: Context
    ) -> budget_service_pb2.RecordEventsResponse:
        """Count."""
        return await self._answer(self._handlers.budgets.record_events, request, context)

    async def Reserve(  # noqa: N802
        self, request: budget_service_pb2.ReserveRequest, context: Context
    ) -> budget_service_pb2.ReserveResponse:
        """Take room."""
        return await self._answer(self._handlers.budgets.reserve, request, context)

    async def Commit(  # noqa: N802
        self, request: budget_service_pb2.CommitRequest, context: Context
    ) -> budget_service_pb2.CommitResponse:
        """Use the room."""
        return await self._answer(self._handlers.budgets.commit, request, context)

    async def Cancel(  # noqa: N802
        self, request: budget_service_pb2.CancelRequest, context: Context
    ) -> budget_service_pb2.CancelResponse:
        """Give the room back."""
        return await self._answer(self._handlers.budgets.cancel, request, context)

    async def GetBudget(  # noqa: N802
        self, request: budget_service_pb2.GetBudgetRequest, context: Context
    ) -> budget_service_pb2.GetBudgetResponse:
        """Show one."""
        return await self._answer(self._handlers.budgets.get, request, context)

    async def ListBudgets(  # noqa: N802
        self, request: budget_service_pb2.ListBudgetsRequest, context: Context
    ) -> budget_service_pb2.ListBudgetsResponse:
        """Show many."""
        return await self._answer(self._handlers.budgets.list, request, context)

    async def ListBackOffs(  # noqa: N802
        self, request: budget_service_pb2.ListBackOffsRequest, context: Context
    ) -> budget_service_pb2.ListBackOffsResponse:
        """Show who must be quiet."""
        return await self._answer(self._handlers.back_offs.list_all, request, context)

    async def WatchBudgets(  # noqa: N802
        self, request: budget_service_pb2.WatchBudgetsRequest, context: Context
    ) -> AsyncIterator[budget_service_pb2.WatchBudgetsResponse]:
        """Tell every change."""
        async for response in self._stream(self._handlers.budget_watches.watch, request, context):
            yield response

    async def Explain(  # noqa: N802
        self, request: budget_service_pb2.ExplainRequest, context: Context
    ) -> budget_service_pb2.ExplainResponse:
        """Say what stands in the way."""
        return await self._answer(self._handlers.back_offs.explain, request, context)


class PolicyService(_Adapter, policy_service_pb2_grpc.PolicyServiceServicer):
    """`holdoff.v1.PolicyService`."""

    async def GetPolicy(  # noqa: N802
        self, request: policy_service_pb2.GetPolicyRequest, context: Context
    ) -> policy_service_pb2.GetPolicyResponse:
        """Show one."""
        return await self._answer(self._handlers.policies.get, request, context)

    async def ListPolicies(  # noqa: N802
        self, request: policy_service_pb2.ListPoliciesRequest, context: Context
    ) -> policy_service_pb2.ListPoliciesResponse:
        """Show all."""
        return await self._answer(self._handlers.policies.list, request, context)


class AdminService(_Adapter, admin_service_pb2_grpc.AdminServiceServicer):
    """`holdoff.v1.AdminService`."""

    async def ResetBudget(  # noqa: N802
        self, request: admin_service_pb2.ResetBudgetRequest, context: Context
    ) -> admin_service_pb2.ResetBudgetResponse:
        """Forget what was counted."""
        return await self._answer(self._handlers.budgets.reset, request, context)

    async def SetBackOff(  # noqa: N802
        self, request: admin_service_pb2.SetBackOffRequest, context: Context
    ) -> admin_service_pb2.SetBackOffResponse:
        """Make quiet."""
        return await self._answer(self._handlers.back_offs.set, request, context)

    async def ClearBackOff(  # noqa: N802
        self, request: admin_service_pb2.ClearBackOffRequest, context: Context
    ) -> admin_service_pb2.ClearBackOffResponse:
        """Let go on."""
        return await self._answer(self._handlers.back_offs.clear, request, context)

    async def BreakLease(  # noqa: N802
        self, request: admin_service_pb2.BreakLeaseRequest, context: Context
    ) -> admin_service_pb2.BreakLeaseResponse:
        """Forbid a renewal."""
        return await self._answer(self._handlers.leases.break_, request, context)

    async def EndQuarantine(  # noqa: N802
        self, request: admin_service_pb2.EndQuarantineRequest, context: Context
    ) -> admin_service_pb2.EndQuarantineResponse:
        """Grant again."""
        return await self._answer(self._handlers.quarantines.end, request, context)

    async def ListAuditEvents(  # noqa: N802
        self, request: admin_service_pb2.ListAuditEventsRequest, context: Context
    ) -> admin_service_pb2.ListAuditEventsResponse:
        """Show who did what."""
        return await self._answer(self._handlers.trail.list, request, context)


def add_services(server: grpc.aio.Server, handlers: Handlers) -> health.aio.HealthServicer:
    """Register everything on a server; return the health servicer."""
    lease_service_pb2_grpc.add_LeaseServiceServicer_to_server(LeaseService(handlers), server)
    token_service_pb2_grpc.add_TokenServiceServicer_to_server(TokenService(handlers), server)
    budget_service_pb2_grpc.add_BudgetServiceServicer_to_server(BudgetService(handlers), server)
    custody_service_pb2_grpc.add_CustodyServiceServicer_to_server(CustodyService(handlers), server)
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(handlers), server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(handlers), server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    _add_reflection(server, (*SERVICES, health.SERVICE_NAME))
    return health_servicer


class _Reflection(ReflectionServicer):  # type: ignore[misc]
    """Answers for a method with its service: the descriptor pool does not find it (grpc #34743)."""

    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        service = fully_qualified_name.rpartition(".")[0]
        name = service if service in SERVICES else fully_qualified_name
        return super()._file_containing_symbol(request, name)


def _add_reflection(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """Register reflection under both names; grpcio-reflection ships v1alpha only.

    The messages of v1 and v1alpha are the same on the wire.
    """
    names = (*services, reflection.SERVICE_NAME, REFLECTION_V1)
    servicer = _Reflection(names)
    for service in (reflection.SERVICE_NAME, REFLECTION_V1):
        method = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_messages.ServerReflectionRequest.FromString,
            response_serializer=reflection_messages.ServerReflectionResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))
