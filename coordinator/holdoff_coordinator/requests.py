"""Decodes requests, and refuses those that cannot be decoded or are too large before they are used.

gRPC decodes a request before a handler can authenticate the caller, and logs a traceback for each
that it cannot decode. So such a request reaches its handler as `Malformed`, and is refused there,
after the caller is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError, Message

from holdoff_coordinator import validation
from holdoff_coordinator.budgets import MOST_EVENTS
from holdoff_coordinator.custody import authorizing, grants
from holdoff_coordinator.custody.copies import MOST_SEALED_BYTES
from holdoff_coordinator.failures import Failure, invalid
from holdoff_coordinator.places import MOST_SCOPES
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MOST_ENTRIES = {
    "google.protobuf.FieldMask.paths": 20,
    "holdoff.v1.AcquireLeaseRequest.scopes": MOST_SCOPES,
    "holdoff.v1.BeginAuthorizationRequest.scopes": authorizing.MOST_SCOPES,
    "holdoff.v1.Grant.api_hosts": grants.MOST_HOSTS,
    "holdoff.v1.Holder.labels": validation.MOST_LABELS,
    "holdoff.v1.ListAuditEventsRequest.kinds": 100,
    "holdoff.v1.RecordEventsRequest.events": MOST_EVENTS,
}
"""How many entries a list or a map of a request may have; any other may have none."""
MOST_CHARACTERS = 1_000
"""Characters of a text without its own limit. No name, id or secret is that long."""
TEXTS = {
    **{f"holdoff.v1.Holder.{field}": most for field, most in validation.HOLDER_LIMITS.items()},
    "holdoff.v1.BeginAuthorizationRequest.client_secret": grants.MOST_SECRET_CHARACTERS,
    "holdoff.v1.BeginAuthorizationRequest.redirect_uri": grants.MOST_URL_CHARACTERS,
    "holdoff.v1.BeginAuthorizationRequest.scopes": authorizing.MOST_SCOPE_CHARACTERS,
    "holdoff.v1.CompleteAuthorizationRequest.code": grants.MOST_SECRET_CHARACTERS,
    "holdoff.v1.CompleteAuthorizationRequest.error": authorizing.MOST_ERROR_CHARACTERS,
    "holdoff.v1.BreakLeaseRequest.reason": validation.MOST_REASON_CHARACTERS,
    "holdoff.v1.ClearBackOffRequest.reason": validation.MOST_REASON_CHARACTERS,
    "holdoff.v1.EndQuarantineRequest.reason": validation.MOST_REASON_CHARACTERS,
    "holdoff.v1.GetAccessTokenRequest.sealed_copy": MOST_SEALED_BYTES,
    "holdoff.v1.Grant.api_hosts": grants.MOST_HOST_CHARACTERS,
    "holdoff.v1.Grant.client_id": grants.MOST_CLIENT_ID_CHARACTERS,
    "holdoff.v1.Grant.token_url": grants.MOST_URL_CHARACTERS,
    "holdoff.v1.PutGrantRequest.client_secret": grants.MOST_SECRET_CHARACTERS,
    "holdoff.v1.PutGrantRequest.refresh_token": grants.MOST_SECRET_CHARACTERS,
    "holdoff.v1.ResetBudgetRequest.reason": validation.MOST_REASON_CHARACTERS,
    "holdoff.v1.Scope.division": validation.MOST_DIVISION_CHARACTERS,
    "holdoff.v1.Scope.endpoint": validation.MOST_ENDPOINT_CHARACTERS,
    "holdoff.v1.SetBackOffRequest.reason": validation.MOST_REASON_CHARACTERS,
    # It has a part for each app.
    "holdoff.v1.WatchLeasesRequest.resume_token": 250_000,
}


@dataclass(frozen=True, slots=True)
class Malformed:
    """Replaces a request that cannot be decoded."""

    method: str

    def failure(self) -> Failure:
        """Return the error for the caller."""
        return Failure(
            "INVALID_FIELD",
            f"the request of {self.method} cannot be decoded: the client may be of another "
            "release, or for another service",
        )


def check_request(request: Message | Malformed) -> Message:
    """Return a request that was decoded, and whose lists, maps and texts are not too long.

    Raises:
        Failure: INVALID_FIELD.
    """
    if isinstance(request, Malformed):
        raise request.failure()
    _check_size(request)
    return request


def _check_size(message: Message, where: str = "") -> None:
    for field, value in message.ListFields():
        path = f"{where}{field.name}"
        if not field.is_repeated:
            _check_value(field, path, value)
            continue
        most = MOST_ENTRIES.get(field.full_name, 0)
        if len(value) > most:
            raise invalid(path, f"must be at most {most}")
        ones = chain(*value.items()) if isinstance(value, Mapping) else value
        for one in ones:
            _check_value(field, path, one)


def _check_value(field: Any, path: str, value: Any) -> None:
    if isinstance(value, str | bytes):
        most = TEXTS.get(field.full_name, MOST_CHARACTERS)
        if len(value) > most:
            raise invalid(path, f"must be at most {most} characters")
    elif isinstance(value, Message):
        _check_size(value, f"{path}.")


class Reading(grpc.aio.ServerInterceptor):
    """Replaces requests that cannot be decoded by `Malformed`; refuses those of open services.

    Args:
        passed_on: Services whose handlers take `Malformed` themselves.
    """

    def __init__(self, passed_on: tuple[str, ...]) -> None:
        self._passed_on = passed_on
        self.on_malformed: Callable[[], None] = lambda: None
        """Called for each request that cannot be decoded."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the decoder of a method, if the method exists."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/")
        read = self._reader(method, handler.request_deserializer)
        kind = "_".join(
            "stream" if streams else "unary"
            for streams in (handler.request_streaming, handler.response_streaming)
        )
        behaviour = getattr(handler, kind)
        if method.partition("/")[0] not in self._passed_on:
            behaviour = _refusing(behaviour, streams=handler.request_streaming)
        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        return wrap(behaviour, read, handler.response_serializer)

    def _reader(self, method: str, read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def message_or_malformed(raw: bytes) -> Any:
            try:
                return read(raw)
            except DecodeError:
                self.on_malformed()
                warn("a request cannot be decoded", method)
                return Malformed(method)

        return message_or_malformed


def _refusing(behaviour: Any, *, streams: bool) -> Any:
    """Refuse requests that cannot be decoded, of health and reflection."""

    async def check(request: Any, context: Any) -> Any:
        try:
            return check_request(request)
        except Failure as failure:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, failure.message)

    async def checked(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield await check(request, context)

    async def answer(request: Any, context: Any) -> Any:
        return await behaviour(await check(request, context), context)

    async def answers(request: Any, context: Any) -> AsyncIterator[Any]:
        asked = checked(request, context) if streams else await check(request, context)
        async for response in behaviour(asked, context):
            yield response

    return answers if inspect.isasyncgenfunction(behaviour) else answer
