"""Who may do what: roles on apps and tokens, granted to identities by an access file. Pure.

    [[grants]]
    identities = ["credential:payroll-jobs", "uri:spiffe://corp.example/payroll/*"]
    role = "holder"
    resources = ["apps/exact-nl/tokens/payroll-*"]

What a call takes stands in `NEEDS`, by the type of its request; a call that does not stand there
is refused to everybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from holdoff import _toml
from holdoff._text import quoted
from holdoff.names import AppName, TokenName
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    custody_service_pb2,
    grant_pb2,
    lease_pb2,
    lease_service_pb2,
    policy_service_pb2,
    token_pb2,
    token_service_pb2,
)
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound="Message")


class Role(StrEnum):
    """What somebody may do with an app or a token."""

    VIEWER = "viewer"
    """See tokens, leases, queues, budgets and back-offs."""
    REPORTER = "reporter"
    """Also report events and reserve."""
    HOLDER = "holder"
    """Also take leases."""
    GATEWAY = "gateway"
    """See, report and reserve, and receive access tokens of grants in custody."""
    CUSTODIAN = "custodian"
    """See everything, create and change tokens, and put grants into custody and delete them."""
    ADMIN = "admin"
    """Everything: also break leases, reset budgets, set and end back-offs, end quarantines, read
    the audit trail."""


_INCLUDES: Mapping[Role, frozenset[Role]] = {
    Role.VIEWER: frozenset({Role.VIEWER}),
    Role.REPORTER: frozenset({Role.VIEWER, Role.REPORTER}),
    Role.HOLDER: frozenset({Role.VIEWER, Role.REPORTER, Role.HOLDER}),
    Role.GATEWAY: frozenset({Role.VIEWER, Role.REPORTER, Role.GATEWAY}),
    Role.CUSTODIAN: frozenset({Role.VIEWER, Role.CUSTODIAN}),
    Role.ADMIN: frozenset(Role),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A token, a whole app, or (without an app) everything."""

    app: str = ""
    token: str = ""

    def __str__(self) -> str:
        if not self.app:
            return "all apps"
        return str(TokenName(self.app, self.token) if self.token else AppName(self.app))


_ANY = "*"
CERTIFIED_TYPES = ("dns", "email", "ip", "uri")
"""The types of names (SAN) in a certificate."""
CERTIFIED_BY = ("uri", "dns")
"""Those that identify a client, unless an operator chooses others: services and hosts have them. An
IP address proves little, and certificates contain e-mail addresses for other purposes."""
IDENTITY_TYPES = ("credential", *CERTIFIED_TYPES)
"""An identity is its type, a colon and its name: names of two types are never the same."""


class AccessError(ValueError):
    """An access file is wrong; the message says where, and what to write."""


_Pattern = Annotated[
    str, msgspec.Meta(pattern=r"\A(\*|apps/[a-z0-9*?-]{1,63}(/tokens/[a-z0-9*?-]{1,63})?)\Z")
]


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A role for some identities on some apps or tokens; `*` and `?` stand for any characters."""

    identities: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=1000)], ...]
    """Names of credentials, or in clients' certificates, each with its type (`IDENTITY_TYPES`)."""
    role: Role
    resources: tuple[_Pattern, ...]
    """`apps/{app}` with all of its tokens, `apps/{app}/tokens/{token}`, or `*`."""

    def covers(self, place: Place) -> bool:
        """Whether all of a place is granted."""
        return any(
            fnmatchcase(place.app, app) and fnmatchcase(place.token, token)
            if place.token
            else (fnmatchcase(place.app, app) if place.app else app == _ANY) and token == _ANY
            for app, token in map(_parts, self.resources)
        )

    def touches(self, place: Place) -> bool:
        """Whether something of a place is granted."""
        return self.covers(place) or any(
            not place.token and (not place.app or fnmatchcase(place.app, app))
            for app, _ in map(_parts, self.resources)
        )


def _parts(pattern: str) -> tuple[str, str]:
    """Split a pattern into that of an app and that of its tokens."""
    app, _, token = pattern.removeprefix("apps/").partition("/tokens/")
    return app, token or _ANY


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class Rights:
    """What one identity was granted."""

    identity: str
    grants: Sequence[Grant]

    def missing(self, need: Need) -> Place | None:
        """Return a place for which the role is missing; None if the call is allowed."""
        for place in need.places:
            if not any(
                need.role in _INCLUDES[grant.role]
                and (grant.touches(place) if need.part else grant.covers(place))
                for grant in self.grants
            ):
                return place
        return None

    def trim(self, response: MessageT) -> MessageT | None:
        """Leave out of a list what may not be seen; None if the response is about such a thing."""
        for field, value in response.ListFields():
            if field.message_type is None:
                continue
            if field.is_repeated:
                seen = [one for one in value if self._sees(one)]
                del value[:]
                value.extend(seen)
            elif not self._sees(value) or (
                isinstance(value, lease_pb2.Snapshot) and not self.trim(value)
            ):
                return None
        return response

    def sees(self, app: str, token: str) -> bool:
        """Whether a token may be seen; without one, all of an app."""
        return self.missing(Need(Role.VIEWER, (Place(app, token),))) is None

    def knows(self, app: str) -> bool:
        """Whether something of an app may be seen."""
        return self.missing(Need(Role.VIEWER, (Place(app),), part=True)) is None

    def reports_for(self, app: str) -> bool:
        """Whether reports about a whole app are allowed."""
        return self.missing(Need(Role.REPORTER, (Place(app),))) is None

    def _sees(self, message: Any) -> bool:
        """Whether a thing may be seen; what belongs to a whole app concerns each of its tokens."""
        match message:
            case lease_pb2.Lease() | token_pb2.Token() | grant_pb2.Grant():
                name = message.name.split("/")
                place = Place(name[1], name[3])
            case lease_pb2.TokenStatus():
                place = place_of_token("token", message.token)
            case lease_pb2.Change():
                place = place_of_token("token", message.status.token)
            case lease_pb2.Snapshot():
                place = Place(validation.app_name("app", message.app).app)
            case lease_pb2.Quarantine():
                place = Place(validation.app_name("app", message.app).app)
            case budget_pb2.Budget() | budget_pb2.BackOff():
                place = place_of_scope("scope", message.scope)
            case _:
                return True
        return self.missing(Need(Role.VIEWER, (place,), part=True)) is None


def read_access(path: Path) -> Sequence[Grant]:
    """Read an access file.

    Raises:
        AccessError: It is wrong.
        OSError: It cannot be read.
    """
    try:
        text = _toml.decode(path.read_bytes())
        grants = msgspec.convert(_toml.read(text), _File).grants
    except (msgspec.ValidationError, _toml.TomlError) as error:
        place = f":{error.line}" if isinstance(error, _toml.TomlError) else ""
        raise AccessError(
            f'{path}{place}: {error}; write [[grants]] with identities = ["…"], resources = '
            f'["apps/APP/tokens/TOKEN"] and a role: {", ".join(Role)}'
        ) from None
    for name in (name for grant in grants for name in grant.identities):
        if name.partition(":")[0] not in IDENTITY_TYPES:
            typed = (f'"{name}"', f"'{name}'")
            line = next(
                (
                    number
                    for number, line in enumerate(text.splitlines(), 1)
                    if any(one in line for one in typed) and not line.lstrip().startswith("#")
                ),
                1,
            )
            raise AccessError(
                f"{path}:{line}: the identity {quoted(name)} has no type: write "
                f'"credential:{quoted(name)[1:-1]}" for a credential; a name in a client '
                f"certificate begins with {', '.join(f'{one}:' for one in CERTIFIED_TYPES)}"
            )
    return grants


def rights_of(identity: str, grants: Sequence[Grant]) -> Rights:
    """Find what an identity was granted."""
    return Rights(
        identity,
        [one for one in grants if any(_fits(identity, name) for name in one.identities)],
    )


def _fits(identity: str, pattern: str) -> bool:
    return fnmatchcase(identity, pattern.replace("[", "[[]"))  # only * and ? have a meaning


@dataclass(frozen=True, slots=True)
class Need:
    """What a call takes: a role on some places, or (`part`) on something of them."""

    role: Role
    places: tuple[Place, ...]
    part: bool = False


def need_of(request: Message) -> Need:
    """Say what a call takes.

    Raises:
        Failure: INVALID_FIELD, if the request does not say which token or app it is about.
    """
    role, part, places = NEEDS[type(request)]
    return Need(role, places(request), part)


def refusal(identity: str, role: Role, place: Place) -> Failure:
    """Say what was missing, and nothing of what there is."""
    return Failure(
        "NOT_ALLOWED",
        f"{identity!r} lacks the role {role} on {place}: an administrator can grant that in the "
        "coordinator's access file",
        metadata={"role": role, "resource": str(place), "identity": identity},
    )


def place_of_token(field: str, name: str) -> Place:
    """Return the place of a token's name."""
    token = validation.token_name(field, name)
    return Place(token.app, token.token)


def place_of_scope(field: str, scope: budget_pb2.Scope) -> Place:
    """Return the place of a scope, whose app need not be given when the token is."""
    if scope.token:
        return place_of_token(f"{field}.token", scope.token)
    return Place(validation.app_name(f"{field}.app", scope.app).app)


def _token(request: Any) -> tuple[Place, ...]:
    return (place_of_token("token", request.token),)


def _new_token(request: Any) -> tuple[Place, ...]:
    return (place_of_token("token.name", request.token.name),)


def _name_of_token(request: Any) -> tuple[Place, ...]:
    return (place_of_token("name", request.name),)


def _new_grant(request: Any) -> tuple[Place, ...]:
    grant = validation.grant_name("grant.name", request.grant.name)
    return (Place(grant.app, grant.token),)


def _name_of_grant(request: Any) -> tuple[Place, ...]:
    grant = validation.grant_name("name", request.name)
    return (Place(grant.app, grant.token),)


def _name_of_lease(request: Any) -> tuple[Place, ...]:
    lease = validation.lease_name("name", request.name)
    return (Place(lease.app, lease.token),)


def _name_of_budget(request: Any) -> tuple[Place, ...]:
    return (Place(validation.budget_name("name", request.name).app),)


def _name_of_back_off(request: Any) -> tuple[Place, ...]:
    return (Place(validation.back_off_name("name", request.name).app),)


def _app(request: Any) -> tuple[Place, ...]:
    return (Place(validation.app_name("app", request.app).app),)


def _parent(request: Any) -> tuple[Place, ...]:
    match validation.parent(request.parent):
        case TokenName(app, token):
            return (Place(app, token),)
        case AppName(app):
            return (Place(app),)
        case _:
            return (Place(),)


def _scope(request: Any) -> tuple[Place, ...]:
    return (place_of_scope("scope", request.scope),)


def _events(request: Any) -> tuple[Place, ...]:
    return tuple({place_of_scope("events.scope", event.scope): None for event in request.events})


def _everything(_: Any) -> tuple[Place, ...]:
    return (Place(),)


_WHOLE, _PART = False, True
NEEDS: Mapping[type[Message], tuple[Role, bool, Callable[[Any], tuple[Place, ...]]]] = {
    lease_service_pb2.AcquireLeaseRequest: (Role.HOLDER, _WHOLE, _token),
    lease_service_pb2.RenewLeaseRequest: (Role.HOLDER, _WHOLE, _name_of_lease),
    lease_service_pb2.FollowLeaseRequest: (Role.HOLDER, _WHOLE, _name_of_lease),
    lease_service_pb2.ReleaseLeaseRequest: (Role.HOLDER, _WHOLE, _name_of_lease),
    lease_service_pb2.GetLeaseRequest: (Role.VIEWER, _WHOLE, _name_of_lease),
    lease_service_pb2.ListLeasesRequest: (Role.VIEWER, _PART, _parent),
    lease_service_pb2.ListLeaseHistoryRequest: (Role.VIEWER, _WHOLE, _parent),
    lease_service_pb2.ListWaitersRequest: (Role.VIEWER, _WHOLE, _parent),
    lease_service_pb2.ListQuarantinesRequest: (Role.VIEWER, _PART, _parent),
    lease_service_pb2.WatchLeasesRequest: (Role.VIEWER, _PART, _parent),
    token_service_pb2.CreateTokenRequest: (Role.CUSTODIAN, _WHOLE, _new_token),
    token_service_pb2.UpdateTokenRequest: (Role.CUSTODIAN, _WHOLE, _new_token),
    token_service_pb2.GetTokenRequest: (Role.VIEWER, _WHOLE, _name_of_token),
    token_service_pb2.ListTokensRequest: (Role.VIEWER, _PART, _parent),
    custody_service_pb2.PutGrantRequest: (Role.CUSTODIAN, _WHOLE, _new_grant),
    custody_service_pb2.BeginAuthorizationRequest: (Role.CUSTODIAN, _WHOLE, _new_grant),
    custody_service_pb2.CompleteAuthorizationRequest: (Role.CUSTODIAN, _WHOLE, _name_of_grant),
    custody_service_pb2.GetGrantRequest: (Role.VIEWER, _WHOLE, _name_of_grant),
    custody_service_pb2.ListGrantsRequest: (Role.VIEWER, _PART, _parent),
    custody_service_pb2.WatchGrantRequest: (Role.VIEWER, _WHOLE, _name_of_grant),
    custody_service_pb2.DeleteGrantRequest: (Role.CUSTODIAN, _WHOLE, _name_of_grant),
    custody_service_pb2.CheckGrantRequest: (Role.CUSTODIAN, _WHOLE, _name_of_grant),
    custody_service_pb2.TrustGrantRequest: (Role.CUSTODIAN, _WHOLE, _name_of_grant),
    custody_service_pb2.RotateKeysRequest: (Role.CUSTODIAN, _WHOLE, _everything),
    custody_service_pb2.GetAccessTokenRequest: (Role.GATEWAY, _WHOLE, _name_of_grant),
    budget_service_pb2.RecordEventsRequest: (Role.REPORTER, _WHOLE, _events),
    budget_service_pb2.ReserveRequest: (Role.REPORTER, _WHOLE, _scope),
    # Their ids are secrets of the caller who reserved; the store compares its identity.
    budget_service_pb2.CommitRequest: (Role.REPORTER, _PART, _app),
    budget_service_pb2.CancelRequest: (Role.REPORTER, _PART, _app),
    # The name does not tell the token.
    budget_service_pb2.GetBudgetRequest: (Role.VIEWER, _PART, _name_of_budget),
    budget_service_pb2.ListBudgetsRequest: (Role.VIEWER, _PART, _parent),
    budget_service_pb2.ListBackOffsRequest: (Role.VIEWER, _PART, _parent),
    budget_service_pb2.WatchBudgetsRequest: (Role.VIEWER, _PART, _parent),
    budget_service_pb2.ExplainRequest: (Role.VIEWER, _WHOLE, _scope),
    policy_service_pb2.GetPolicyRequest: (Role.VIEWER, _PART, _everything),
    policy_service_pb2.ListPoliciesRequest: (Role.VIEWER, _PART, _everything),
    admin_service_pb2.BreakLeaseRequest: (Role.ADMIN, _WHOLE, _name_of_lease),
    admin_service_pb2.ResetBudgetRequest: (Role.ADMIN, _WHOLE, _name_of_budget),
    admin_service_pb2.SetBackOffRequest: (Role.ADMIN, _WHOLE, _scope),
    admin_service_pb2.ClearBackOffRequest: (Role.ADMIN, _WHOLE, _name_of_back_off),
    admin_service_pb2.EndQuarantineRequest: (Role.ADMIN, _WHOLE, _app),
    admin_service_pb2.ListAuditEventsRequest: (Role.ADMIN, _WHOLE, _parent),
}
