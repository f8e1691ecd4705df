"""What comes over the wire when a call fails, as exceptions of `errors`.

Errors that gRPC's core makes carry no reason and are mapped by their code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from holdoff._text import printable_lines
from holdoff.errors import (
    BY_REASON,
    AlreadyExists,
    HoldoffError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    NotGranted,
    Refused,
    TimedOut,
    Unauthenticated,
    Unavailable,
    UnexpectedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.rpc import status_pb2

_BY_CODE: Mapping[int, type[HoldoffError]] = {
    code_pb2.UNAVAILABLE: Unavailable,
    code_pb2.DEADLINE_EXCEEDED: TimedOut,
    code_pb2.CANCELLED: Unavailable,  # the server went away in the middle of a call
    code_pb2.INVALID_ARGUMENT: InvalidRequest,
    code_pb2.RESOURCE_EXHAUSTED: InvalidRequest,  # a message over the limit
    code_pb2.NOT_FOUND: NotFound,
    code_pb2.ALREADY_EXISTS: AlreadyExists,
    code_pb2.PERMISSION_DENIED: Refused,
    code_pb2.UNAUTHENTICATED: Unauthenticated,
    code_pb2.ABORTED: NotGranted,
    code_pb2.FAILED_PRECONDITION: LeaseLost,
}

_NO_ANSWER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # Of gRPC's core, when the connection breaks in the middle of a message; ours has a reason.
    grpc.StatusCode.INTERNAL,
)


def from_status(status: status_pb2.Status) -> HoldoffError:
    """Turn a google.rpc.Status into its exception."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_seconds = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after_seconds = retry.retry_delay.ToMicroseconds() / 1e6
    by_code = _BY_CODE.get(status.code, UnexpectedError)
    return BY_REASON.get(info.reason, by_code)(
        printable_lines(status.message),
        reason=info.reason,
        metadata=info.metadata,
        retry_after_seconds=retry_after_seconds,
    )


def from_rpc_error(error: grpc.RpcError, endpoint: str) -> HoldoffError:
    """Turn a failed call into its exception."""
    if not isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return UnexpectedError(str(error))
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    code, details = error.code(), printable_lines(error.details() or "no details")
    number, name = code.value
    if code in _NO_ANSWER:
        kind = _BY_CODE.get(number, Unavailable)
        return kind(f"no answer from the coordinator at {endpoint} ({details})")
    return _BY_CODE.get(number, UnexpectedError)(f"{name}: {details}")
