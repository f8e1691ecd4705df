"""Every error that a handler raises, as one table: reason, gRPC code, details.

The client's side of the table is `holdoff.errors`; a test holds the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

    from holdoff.names import TokenName

DOMAIN = "holdoff"

CODES: Mapping[str, int] = {
    # Not now: ask again.
    "LEASE_HELD": code_pb2.ABORTED,
    "TOKEN_COOLING": code_pb2.ABORTED,
    "TOKEN_QUEUED": code_pb2.ABORTED,
    "TOKEN_BUSY": code_pb2.ABORTED,
    "QUEUE_FULL": code_pb2.RESOURCE_EXHAUSTED,
    "QUARANTINED": code_pb2.UNAVAILABLE,
    "STORE_UNAVAILABLE": code_pb2.UNAVAILABLE,
    "STORE_OUT_OF_MEMORY": code_pb2.UNAVAILABLE,
    "STORE_READ_ONLY": code_pb2.UNAVAILABLE,
    "STORE_NOT_WRITABLE": code_pb2.UNAVAILABLE,
    "STORE_NOT_REPLICATED": code_pb2.UNAVAILABLE,
    "STORE_ACCESS_DENIED": code_pb2.UNAVAILABLE,
    "SCHEMA_TOO_NEW": code_pb2.UNAVAILABLE,
    "TOKEN_URL_UNREACHABLE": code_pb2.UNAVAILABLE,
    "DRAINING": code_pb2.UNAVAILABLE,
    "BUDGET_SPENT": code_pb2.RESOURCE_EXHAUSTED,
    "BACKING_OFF": code_pb2.RESOURCE_EXHAUSTED,
    "COUNTS_UNKNOWN": code_pb2.RESOURCE_EXHAUSTED,
    "TOO_MANY_EVENTS": code_pb2.RESOURCE_EXHAUSTED,
    "LIMIT_REACHED": code_pb2.RESOURCE_EXHAUSTED,
    # The lease is not what the caller thinks.
    "LEASE_LOST": code_pb2.FAILED_PRECONDITION,
    "LEASE_BROKEN": code_pb2.FAILED_PRECONDITION,
    "LEASE_ENDED": code_pb2.FAILED_PRECONDITION,
    "OFFER_EXPIRED": code_pb2.FAILED_PRECONDITION,
    "WRONG_SECRET": code_pb2.PERMISSION_DENIED,
    # Who calls, and what they may do.
    "CREDENTIAL_MISSING": code_pb2.UNAUTHENTICATED,
    "CREDENTIAL_REFUSED": code_pb2.UNAUTHENTICATED,
    "CREDENTIAL_EXPIRED": code_pb2.UNAUTHENTICATED,
    "NOT_ALLOWED": code_pb2.PERMISSION_DENIED,
    "ACCESS_FILE_MISSING": code_pb2.UNAVAILABLE,
    # No such thing, or one too many.
    "TOKEN_NOT_FOUND": code_pb2.NOT_FOUND,
    "LEASE_NOT_FOUND": code_pb2.NOT_FOUND,
    "POLICY_NOT_FOUND": code_pb2.NOT_FOUND,
    "BUDGET_NOT_FOUND": code_pb2.NOT_FOUND,
    "BACK_OFF_NOT_FOUND": code_pb2.NOT_FOUND,
    "QUARANTINE_NOT_FOUND": code_pb2.NOT_FOUND,
    "RESERVATION_NOT_FOUND": code_pb2.NOT_FOUND,
    "GRANT_NOT_FOUND": code_pb2.NOT_FOUND,
    "AUTHORIZATION_NOT_FOUND": code_pb2.NOT_FOUND,
    "TOKEN_EXISTS": code_pb2.ALREADY_EXISTS,
    "GRANT_EXISTS": code_pb2.ALREADY_EXISTS,
    "GRANT_DUPLICATE": code_pb2.ALREADY_EXISTS,
    "GRANT_CHANGED": code_pb2.ABORTED,
    "AUTHORIZATION_FAILED": code_pb2.FAILED_PRECONDITION,
    # This coordinator cannot do it.
    "CUSTODY_OFF": code_pb2.FAILED_PRECONDITION,
    "CUSTODY_KEY_MISSING": code_pb2.FAILED_PRECONDITION,
    # The request is wrong.
    "INVALID_FIELD": code_pb2.INVALID_ARGUMENT,
    "REQUEST_ID_REUSED": code_pb2.INVALID_ARGUMENT,
    "EVENT_TOO_OLD": code_pb2.INVALID_ARGUMENT,
    "WAITER_SILENT": code_pb2.CANCELLED,
    "STORE_DAMAGED": code_pb2.INTERNAL,
    "INTERNAL": code_pb2.INTERNAL,
}


class Failure(Exception):  # noqa: N818 - the word of the domain; "Error" would say less
    """An answer that says no, with everything the wire needs."""

    def __init__(  # noqa: PLR0913 - one argument a detail of google.rpc
        self,
        reason: str,
        message: str,
        *,
        resource: str = "",
        field: str = "",
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.resource = resource
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata = dict(metadata or {})

    def to_status(self) -> status_pb2.Status:
        """Build the google.rpc.Status: ErrorInfo always, the rest by code."""
        code = CODES[self.reason]
        details: list[Message] = [
            error_details_pb2.ErrorInfo(domain=DOMAIN, reason=self.reason, metadata=self.metadata)
        ]
        if self.retry_after_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromMicroseconds(max(0, round(self.retry_after_seconds * 1e6)))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if code == code_pb2.FAILED_PRECONDITION:
            violation = error_details_pb2.PreconditionFailure.Violation(
                type=self.reason, subject=self.resource, description=self.message
            )
            details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
        elif self.reason in ("BUDGET_SPENT", "BACKING_OFF", "COUNTS_UNKNOWN", "LIMIT_REACHED"):
            quota = error_details_pb2.QuotaFailure.Violation(
                subject=self.resource, description=self.message
            )
            details.append(error_details_pb2.QuotaFailure(violations=[quota]))
        elif self.field:
            wrong = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[wrong]))
        elif self.resource:
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type=_resource_type(self.resource), resource_name=self.resource
                )
            )
        status = status_pb2.Status(code=code, message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


def _resource_type(name: str) -> str:
    """Say what a resource is by its name: `apps/{app}/budgets/{budget}` is a budget."""
    collections = name.split("/")[::2] if "/" in name else [""]
    return f"holdoff/{collections[-1].removesuffix('s')}"


STORE_TROUBLES: Mapping[str, str] = {
    "STORE_UNAVAILABLE": "the store does not answer",
    "STORE_OUT_OF_MEMORY": "the store is out of memory and accepts no writes",
    "STORE_READ_ONLY": "the store is read-only: a replica, or a primary that was replaced",
    "STORE_NOT_WRITABLE": "the store accepts no writes: a full disk, or too few replicas",
    "STORE_NOT_REPLICATED": "the store has fewer copies of the change than --wait-replicas and "
    "--wait-fsync ask for",
    "STORE_ACCESS_DENIED": "the store refuses our user or password, a command or a key",
    "STORE_DAMAGED": "a record in the store is damaged",
    "INTERNAL": "a script failed in the store",
}
"""What is wrong with the store, by the reason that callers hear."""


def store_trouble(reason: str) -> Failure:
    """Say what is wrong with the store; what can pass by itself may be tried again."""
    passes = CODES[reason] == code_pb2.UNAVAILABLE
    advice = "nothing is lost, try again" if passes else "see the coordinator's log"
    return Failure(
        reason,
        f"{STORE_TROUBLES[reason]}; {advice}",
        retry_after_seconds=1.0 if passes else None,
    )


def token_damaged(name: TokenName) -> Failure:
    """Say that the records of a token cannot be used."""
    return Failure(
        "STORE_DAMAGED",
        f"the records of {name} in the store are damaged; see the coordinator's log",
        resource=str(name),
    )


def token_not_found(name: TokenName) -> Failure:
    """Say that there is no such token."""
    return Failure(
        "TOKEN_NOT_FOUND",
        f"there is no token {name}; create it with: holdoff token create {name}",
        resource=str(name),
    )


def budget_not_found(name: str) -> Failure:
    """Say that there is no such budget."""
    return Failure(
        "BUDGET_NOT_FOUND",
        f"there is no budget {name}, or nothing is left in its window",
        resource=name,
    )


def invalid(field: str, message: str) -> Failure:
    """A field of the request is wrong."""
    return Failure("INVALID_FIELD", f"{field}: {message}", field=field)
