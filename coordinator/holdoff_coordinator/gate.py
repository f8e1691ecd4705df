"""Who calls, and whether they may: what stands before every handler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import structlog

from holdoff_coordinator.access import AccessError, need_of, read_access, refusal, rights_of
from holdoff_coordinator.caller import ANONYMOUS, Caller
from holdoff_coordinator.failures import STORE_TROUBLES, Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

    from holdoff_coordinator.access import Grant, Rights
    from holdoff_coordinator.audit import AuditTrail
    from holdoff_coordinator.credentials import Credentials

log = structlog.get_logger()

MessageT = TypeVar("MessageT", bound="Message")
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A caller that may make its call."""

    caller: Caller
    _sight: Rights | None = None

    def shown(self, response: MessageT) -> MessageT | None:
        """Leave out what the caller may not see; None if nothing is left."""
        return self._sight.trim(response) if self._sight else response


class AccessFile:
    """The grants of an access file, read again when it changes.

    Raises:
        AccessError: It is wrong.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = self._stamp()
        self._grants = read_access(path)

    def grants(self) -> Sequence[Grant]:
        """Return what the file said when it last made sense."""
        stamp = self._stamp()
        if stamp != self._looked_at:
            self._looked_at = stamp
            try:
                self._grants = read_access(self._path)
            except (AccessError, OSError) as error:
                log.warning("access stays as it was", reason=str(error))
            else:
                log.info("access file read again", file=str(self._path), grants=len(self._grants))
        return self._grants

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns


class Gate:
    """Admits calls. Without an access file everybody who can connect may do everything."""

    def __init__(
        self, credentials: Credentials, access: AccessFile | None, trail: AuditTrail
    ) -> None:
        self._credentials = credentials
        self._access = access
        self._trail = trail
        self.refusal: Failure | None = None
        """What every caller hears while this replica cannot serve; None while it can."""

    async def admit(self, request: Message, context: Context) -> Admitted:
        """Find out who calls, and whether it may.

        Raises:
            Failure: CREDENTIAL_…, NOT_ALLOWED, STORE_…, or INVALID_FIELD when the
                request does not say what it is about.
        """
        if self.refusal:
            raise self.refusal
        peer = context.peer()
        if self._access is None:
            return Admitted(Caller(_certified(context) or ANONYMOUS, peer))
        identity = ANONYMOUS
        try:
            identity = await self._identity(context)
            need = need_of(request)
            rights = rights_of(identity, self._access.grants())
            if place := rights.missing(need):
                raise refusal(identity, need.role, place)
        except Failure as failure:
            if failure.reason in (*STORE_TROUBLES, "INVALID_FIELD"):
                raise
            await self.refused(request, Caller(identity, peer), failure)
            raise
        if not need.part:
            return Admitted(Caller(identity, peer))
        return Admitted(Caller(identity, peer, rights.sees, self._knower(identity)), rights)

    def _knower(self, identity: str) -> Callable[[str], bool]:
        """Return what tells whether an identity may know of an app, also later."""

        def knows(app: str) -> bool:
            return not self._access or rights_of(identity, self._access.grants()).knows(app)

        return knows

    async def refused(self, request: Message, caller: Caller, failure: Failure) -> None:
        """Put a refusal into the audit trail."""
        await self._trail.refused(
            caller,
            type(request).__name__.removesuffix("Request"),
            failure.metadata.get("resource", failure.resource),
            failure.reason,
        )

    async def _identity(self, context: Context) -> str:
        """Say who calls: by the credential that came with the call, or else its certificate."""
        metadata = dict(context.invocation_metadata() or ())
        scheme, _, credential = str(metadata.get("authorization", "")).partition(" ")
        if credential and scheme.lower() == "bearer":
            return await self._credentials.verify(credential.strip())
        if identity := _certified(context):
            return identity
        raise Failure(
            "CREDENTIAL_MISSING",
            "this coordinator authenticates callers: send a credential (HOLDOFF_CREDENTIAL_FILE; "
            "grpcurl -H 'authorization: Bearer …') or show a client certificate",
        )


def _certified(context: Context) -> str | None:
    """The first name (SAN) of the caller's certificate, where it had to show one."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    name = next(iter(names), None)
    return None if name is None else name.decode(errors="replace")
