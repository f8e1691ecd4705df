"""What can go wrong, as exceptions: one root, a class for every reason.

The coordinator's side of the table is `holdoff_coordinator.failures`; a test holds the two
together. `_status` turns what comes over the wire into these. This module is quick to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


class HoldoffError(Exception):
    """The root of all errors of this library."""

    REASON: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or self.REASON
        """UPPER_SNAKE, as the coordinator sent it; empty for errors of gRPC's core."""
        self.metadata = dict(metadata or {})
        """Values that belong to the reason."""
        self.retry_after_seconds = retry_after_seconds
        """When to ask again, if the coordinator said so."""


class NotGranted(HoldoffError):  # noqa: N818 - an answer, not a fault
    """No lease within the wait that was asked for."""


class LeaseHeld(NotGranted):
    """Another lease, an offer or a foreign lock holds the token."""

    REASON = "LEASE_HELD"


class TokenCooling(NotGranted):
    """The time after the last refresh has not passed yet."""

    REASON = "TOKEN_COOLING"


class TokenQueued(NotGranted):
    """The token is free, and another waiter comes first."""

    REASON = "TOKEN_QUEUED"


class QueueFull(NotGranted):
    """Too many wait for the token already."""

    REASON = "QUEUE_FULL"


class Quarantined(NotGranted):
    """The store may have forgotten something, or its clock is in doubt."""

    REASON = "QUARANTINED"


class BudgetSpent(NotGranted):
    """A budget has no room; `retry_after_seconds` says when it has, if nothing else happens."""

    REASON = "BUDGET_SPENT"


class BackingOff(BudgetSpent):
    """A scope backs off: a budget is spent, the provider blocks, or an operator paused it."""

    REASON = "BACKING_OFF"


class CountsUnknown(BudgetSpent):
    """The store may have lost what was counted; until the window has passed it counts as spent."""

    REASON = "COUNTS_UNKNOWN"


class TokenBusy(NotGranted):
    """A lease on the token lives, or it cools down: its grant in custody cannot be changed yet."""

    REASON = "TOKEN_BUSY"


class NoAccessToken(NotGranted):
    """A token in custody has no access token now: the message says why, `metadata` its `state`."""

    LASTING: ClassVar = frozenset({"REAUTHORIZE", "CONFIGURATION", "KEY_MISSING", "STALE"})
    """The states that only an operator ends."""

    @property
    def needs_operator(self) -> bool:
        """Whether it makes no sense to wait."""
        return self.metadata.get("state") in self.LASTING


class TooManyEvents(NotGranted):
    """The token has too many events to remember."""

    REASON = "TOO_MANY_EVENTS"


class LeaseLost(HoldoffError):  # noqa: N818 - what happened
    """The lease is gone: what runs under it must stop."""

    REASON = "LEASE_LOST"


class LeaseBroken(LeaseLost):
    """An operator, or a foreign lock, forbade the renewal of the lease."""

    REASON = "LEASE_BROKEN"


class LeaseEnded(LeaseLost):
    """The lease of this request was released before."""

    REASON = "LEASE_ENDED"


class OfferExpired(LeaseLost):
    """The offer was not accepted in time."""

    REASON = "OFFER_EXPIRED"


class Refused(HoldoffError):  # noqa: N818 - an answer, not a fault
    """The caller may not do this."""


class WrongSecret(Refused):
    """The secret is not that of the lease."""

    REASON = "WRONG_SECRET"


class NotAllowed(Refused):
    """It takes a role that the caller was not granted; `metadata` says which, and where."""

    REASON = "NOT_ALLOWED"


class Unauthenticated(Refused):
    """The coordinator does not know who calls."""


class CredentialMissing(Unauthenticated):
    """Neither a credential nor a certificate came with the call."""

    REASON = "CREDENTIAL_MISSING"


class CredentialRefused(Unauthenticated):
    """The coordinator does not know the credential, or no more."""

    REASON = "CREDENTIAL_REFUSED"


class CredentialExpired(Unauthenticated):
    """The credential is too old."""

    REASON = "CREDENTIAL_EXPIRED"


class NotFound(HoldoffError):  # noqa: N818 - an answer, not a fault
    """There is no such thing."""


class TokenNotFound(NotFound):
    """There is no such token."""

    REASON = "TOKEN_NOT_FOUND"


class LeaseNotFound(NotFound):
    """There is no such lease, or it ended more than an hour ago."""

    REASON = "LEASE_NOT_FOUND"


class PolicyNotFound(NotFound):
    """There is no such policy."""

    REASON = "POLICY_NOT_FOUND"


class BudgetNotFound(NotFound):
    """There is no such budget, or nothing is left in its window."""

    REASON = "BUDGET_NOT_FOUND"


class BackOffNotFound(NotFound):
    """There is no such back-off, or it is over."""

    REASON = "BACK_OFF_NOT_FOUND"


class QuarantineNotFound(NotFound):
    """The app is not in quarantine."""

    REASON = "QUARANTINE_NOT_FOUND"


class GrantNotFound(NotFound):
    """The token has no grant in custody."""

    REASON = "GRANT_NOT_FOUND"


class ReservationNotFound(NotFound):
    """There is no such reservation of this caller, or it is long over."""

    REASON = "RESERVATION_NOT_FOUND"


class AlreadyExists(HoldoffError):  # noqa: N818 - an answer, not a fault
    """There is such a thing already."""


class TokenExists(AlreadyExists):
    """There is such a token already."""

    REASON = "TOKEN_EXISTS"


class GrantExists(AlreadyExists):
    """The token has a grant in custody already."""

    REASON = "GRANT_EXISTS"


class GrantChanged(AlreadyExists):
    """The token's grant in custody is not the one that the etag names."""

    REASON = "GRANT_CHANGED"


class GrantDuplicate(AlreadyExists):
    """Another token has this refresh token in custody already."""

    REASON = "GRANT_DUPLICATE"


class AuthorizationNotFound(NotFound):
    """No authorization of the token can be completed: it took too long, or ended."""

    REASON = "AUTHORIZATION_NOT_FOUND"


class AuthorizationFailed(HoldoffError):  # noqa: N818 - an answer, not a fault
    """The provider issued nothing for the code, and the grant in custody is as it was."""

    REASON = "AUTHORIZATION_FAILED"


class CustodyOff(HoldoffError):  # noqa: N818 - a state
    """The coordinator takes nothing into custody; the message says why."""

    REASON = "CUSTODY_OFF"


class CustodyKeyMissing(CustodyOff):
    """The coordinator does not have the master key that encrypts what is in custody."""

    REASON = "CUSTODY_KEY_MISSING"


class InvalidRequest(HoldoffError):  # noqa: N818 - an answer, not a fault
    """The request is wrong, and wrong again if repeated."""


class InvalidField(InvalidRequest):
    """A field of the request is wrong."""

    REASON = "INVALID_FIELD"


class RequestIdReused(InvalidRequest):
    """The request id belongs to a request with other parameters."""

    REASON = "REQUEST_ID_REUSED"


class EventTooOld(InvalidRequest):
    """An event was reported more than a day late."""

    REASON = "EVENT_TOO_OLD"


class Unavailable(HoldoffError):  # noqa: N818 - a state
    """The coordinator cannot answer now; whether it acted is unknown. Ask again."""


class TimedOut(Unavailable):
    """No answer came within the time of the call."""


class TokenUrlUnreachable(Unavailable):
    """The coordinator cannot reach the provider's token URL."""

    REASON = "TOKEN_URL_UNREACHABLE"


class StoreUnavailable(Unavailable):
    """The coordinator's store does not answer."""

    REASON = "STORE_UNAVAILABLE"


class StoreOutOfMemory(StoreUnavailable):
    """The coordinator's store has no memory left and takes no writes."""

    REASON = "STORE_OUT_OF_MEMORY"


class StoreReadOnly(StoreUnavailable):
    """The coordinator's store is a replica, or a primary that was replaced."""

    REASON = "STORE_READ_ONLY"


class StoreNotWritable(StoreUnavailable):
    """The coordinator's store takes no writes: its disk, or too few replicas."""

    REASON = "STORE_NOT_WRITABLE"


class StoreNotReplicated(StoreUnavailable):
    """The coordinator's store has too few copies of the change: are its replicas down?"""

    REASON = "STORE_NOT_REPLICATED"


class StoreAccessDenied(StoreUnavailable):
    """The coordinator's store refuses its user or password, a command or a key."""

    REASON = "STORE_ACCESS_DENIED"


class SchemaTooNew(Unavailable):
    """The coordinator is older than the records in its store; others of its kind may not be."""

    REASON = "SCHEMA_TOO_NEW"


class AccessFileMissing(Unavailable):
    """The coordinator cannot read its access file, and admits no caller."""

    REASON = "ACCESS_FILE_MISSING"


class Draining(Unavailable):
    """The coordinator is shutting down; positions in queues are kept."""

    REASON = "DRAINING"


class LimitReached(Unavailable):
    """This caller has reached a limit of the coordinator; `metadata` says which."""

    REASON = "LIMIT_REACHED"


class WaiterSilent(Unavailable):
    """This waiter was not heard from for a minute and lost its position."""

    REASON = "WAITER_SILENT"


class UnexpectedError(HoldoffError):
    """Nothing that should happen."""

    REASON = "INTERNAL"


class StoreDamaged(UnexpectedError):  # noqa: N818 - a state
    """A record in the coordinator's store is not what it has to be."""

    REASON = "STORE_DAMAGED"


def _leaves(cls: type[HoldoffError]) -> list[type[HoldoffError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _leaves(child))]


BY_REASON: Mapping[str, type[HoldoffError]] = {
    cls.REASON: cls for cls in _leaves(HoldoffError) if "REASON" in vars(cls) and cls.REASON
}
