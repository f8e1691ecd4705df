"""Who calls, and whether they may: what stands before every handler."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import grpc
import structlog

from holdoff_coordinator.access import AccessError, need_of, read_access, refusal, rights_of
from holdoff_coordinator.caller import ANONYMOUS, Caller
from holdoff_coordinator.failures import STORE_TROUBLES, Failure
from holdoff_coordinator.requests import Malformed, check_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

    from holdoff_coordinator.access import Grant, Rights
    from holdoff_coordinator.audit import AuditTrail
    from holdoff_coordinator.credentials import Credentials

log = structlog.get_logger()

MessageT = TypeVar("MessageT", bound="Message")
Context = grpc.aio.ServicerContext[Any, Any]
RECHECK_SECONDS = 1.0
"""A stream ends at most this long after its caller lost the right to it."""


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

    A file that is missing or unreadable grants nothing: its grants may have been withdrawn. An
    invalid one changes nothing: a typing error must not end every job.

    Raises:
        AccessError: It is wrong.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = self._stamp()
        self._grants = read_access(path)
        self.problem: Literal["", "missing", "invalid"] = ""
        """Why the content of the file is not in effect."""
        self._reason = ""
        self.changes = 0
        """How often the grants changed."""
        self.news: list[str] = []
        """What happened to the file, for the audit trail."""

    def grants(self) -> Sequence[Grant]:
        """Return the grants of the file when it was last valid.

        Raises:
            Failure: ACCESS_FILE_MISSING.
        """
        self.look()
        if self.problem == "missing":
            raise Failure(
                "ACCESS_FILE_MISSING",
                "this coordinator cannot read its access file, and admits no caller until it can; "
                "see its log",
                retry_after_seconds=1.0,
            )
        return self._grants

    def latest_rights(self, identity: str) -> Callable[[], Rights]:
        """Return a function that returns what an identity was granted, also after a change."""
        read = self._grants
        rights = rights_of(identity, read)

        def latest() -> Rights:
            nonlocal read, rights
            if self._grants is not read:
                read = self._grants
                rights = rights_of(identity, read)
            return rights

        return latest

    def look(self) -> None:
        """Read the file again if it changed, or could not be read."""
        stamp = self._stamp()
        if stamp == self._looked_at and self.problem != "missing":
            return
        self._looked_at = stamp
        try:
            grants = read_access(self._path)
        except OSError as error:
            self._note("missing", f"{self._path}: {error.strerror}: no caller is admitted")
        except AccessError as error:
            if self.problem == "missing":  # it was replaced by one that is wrong
                self._note("missing", f"{error}: no caller is admitted")
            else:
                self._note("invalid", f"the previous grants still apply: {error}")
        else:
            self._grants = grants
            self._note("", f"{self._path}: read again")

    def _note(self, problem: Literal["", "missing", "invalid"], what: str) -> None:
        if problem and what == self._reason:
            return
        self._reason = what
        self.changes += 1
        self.problem = problem
        self.news.append(what)
        if problem:
            log.error("the access file cannot be used", problem=problem, reason=what)
        else:
            log.info("access file read again", file=str(self._path), grants=len(self._grants))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a call comes from. Read at its start: gRPC crashes if it is asked after its end."""

    peer: str
    authorizations: tuple[str, ...]
    names: Mapping[str, Iterable[bytes]]
    """Of the client certificate, by type."""

    @classmethod
    def of(cls, context: Context) -> Origin:
        """Read it."""
        metadata = context.invocation_metadata() or ()
        sent = tuple(str(value) for key, value in metadata if key == "authorization")
        return cls(context.peer(), sent, context.auth_context())

    def credential(self) -> str:
        """Return the credential that came with the call; '' if there is none.

        Raises:
            Failure: CREDENTIAL_REFUSED, if there are several.
        """
        if len(self.authorizations) > 1:
            raise Failure(
                "CREDENTIAL_REFUSED",
                f"the call has {len(self.authorizations)} authorization headers, which is "
                "ambiguous: send one",
            )
        scheme, _, credential = next(iter(self.authorizations), "").partition(" ")
        return credential.strip() if scheme.lower() == "bearer" else ""


class Stay:
    """An admitted stream, which ends when its caller loses the right to it."""

    def __init__(self, request: Message, origin: Origin, credential: str) -> None:
        self.request, self.origin, self.credential = request, origin, credential
        self._failure: Failure | None = None
        self._waiting: asyncio.Timeout | None = None

    async def next(self, responses: AsyncIterator[MessageT]) -> MessageT | None:
        """Return the next response; None at the end.

        Raises:
            Failure: The caller has lost the right to it.
        """
        if self._failure:
            raise self._failure
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await anext(responses, None)
        except TimeoutError:
            if self._failure is None:
                raise
            raise self._failure from None
        finally:
            self._waiting = None

    def end(self, failure: Failure) -> None:
        """End it, even while it waits for its next response."""
        self._failure = failure
        if self._waiting:
            self._waiting.reschedule(0)


class Gate:
    """Admits calls. Without an access file everybody who can connect may do everything."""

    def __init__(
        self,
        credentials: Credentials,
        access: AccessFile | None,
        trail: AuditTrail,
        certified_by: Sequence[str],
    ) -> None:
        self._credentials = credentials
        self._access = access
        self._trail = trail
        self._certified_by = certified_by
        self._stays: set[Stay] = set()
        self.refusal: Failure | None = None
        """What every caller hears while this replica cannot serve; None while it can."""

    async def admit(self, request: Message | Malformed, origin: Origin) -> Admitted:
        """Find out who calls, and whether it may.

        Raises:
            Failure: CREDENTIAL_…, NOT_ALLOWED, STORE_…, ACCESS_FILE_MISSING, or INVALID_FIELD when
                the request is damaged or too large, or does not say what it is about.
        """
        if self.refusal:
            raise self.refusal
        peer, identity = origin.peer, ANONYMOUS
        try:
            if self._access is None:
                identity = self._certified(origin) or ANONYMOUS
                check_request(request)
                return Admitted(Caller(identity, peer))
            identity = await self._identity(origin)
            need = need_of(check_request(request))
            rights = rights_of(identity, self._access.grants())
            if place := rights.missing(need):
                raise refusal(identity, need.role, place)
        except Failure as failure:
            if failure.reason not in (*STORE_TROUBLES, "INVALID_FIELD", "ACCESS_FILE_MISSING"):
                identity = failure.metadata.get("identity", identity)
                await self.refused(request, Caller(identity, peer), failure)
            raise
        latest = self._access.latest_rights(identity)
        caller = Caller(
            identity,
            peer,
            lambda app, token: latest().sees(app, token),
            lambda app: latest().knows(app),
            rights.reports_for,
        )
        return Admitted(caller, rights if need.part else None)

    @contextlib.contextmanager
    def staying(self, request: Message, origin: Origin) -> Iterator[Stay]:
        """End the stream of the block when its caller loses the right to it."""
        stay = Stay(request, origin, origin.credential() if self._access else "")
        self._stays.add(stay)
        try:
            yield stay
        finally:
            self._stays.discard(stay)

    async def recheck_forever(self) -> None:
        """Each second end the streams whose credential or role was revoked."""
        changes = 0
        while self._access:
            await asyncio.sleep(RECHECK_SECONDS)
            self._access.look()
            while self._access.news:
                await self._trail.access_changed(self._access.news.pop(0))
            gone, known = await self._gone(), self._access.changes
            if known != changes:
                changed = list(self._stays)
            else:
                changed = [stay for stay in self._stays if stay.credential in gone] if gone else []
            for stay in changed:
                await self._recheck(stay)
                await asyncio.sleep(0)
            changes = known

    async def _gone(self) -> set[str]:
        """Return the credentials of open streams that are no longer valid."""
        used = {stay.credential for stay in self._stays if stay.credential}
        gone: set[str] = set()
        try:
            await self._credentials.look_again(used)
        except Failure:  # of the store, without which all streams end anyway
            return gone
        for credential in used:
            try:
                await self._credentials.verify(credential)
            except Failure as failure:
                if failure.reason not in STORE_TROUBLES:
                    gone.add(credential)
        return gone

    async def _recheck(self, stay: Stay) -> None:
        try:
            await self.admit(stay.request, stay.origin)
        except Failure as failure:
            if failure.reason not in STORE_TROUBLES:
                stay.end(failure)

    async def refused(self, request: Message | Malformed, caller: Caller, failure: Failure) -> None:
        """Put a refusal into the audit trail."""
        await self._trail.refused(
            caller,
            _call(request),
            failure.metadata.get("resource", failure.resource),
            failure.reason,
        )

    async def _identity(self, origin: Origin) -> str:
        """Say who calls: by the credential that came with the call, or else its certificate."""
        if credential := origin.credential():
            return await self._credentials.verify(credential)
        if identity := self._certified(origin):
            return identity
        raise Failure(
            "CREDENTIAL_MISSING",
            "this coordinator authenticates callers: send a credential (HOLDOFF_CREDENTIAL_FILE; "
            "grpcurl -H 'authorization: Bearer …') or show a client certificate with a name of "
            f"type {' or '.join(self._certified_by)}",
        )

    def _certified(self, origin: Origin) -> str | None:
        """Return the name in the caller's certificate, of the first type that it has.

        Raises:
            Failure: CREDENTIAL_REFUSED, if it has several of that type.
        """
        for kind in self._certified_by:
            names = tuple(origin.names.get(f"peer_{kind}", ()))
            if len(names) > 1:
                raise Failure(
                    "CREDENTIAL_REFUSED",
                    f"the client certificate has {len(names)} names (SAN) of type {kind}, which is "
                    "ambiguous: use one with a single name of that type, or another "
                    "--client-identity for the coordinator",
                )
            if names:
                return f"{kind}:{names[0].decode(errors='backslashreplace')}"
        return None


def _call(request: Message | Malformed) -> str:
    if isinstance(request, Malformed):
        return request.method.rpartition("/")[2]
    return type(request).__name__.removesuffix("Request")
