"""Grant records in the store: the scripts of custody, each with a typed request and answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from holdoff.names import TokenName
from holdoff_coordinator.caller import NOBODY
from holdoff_coordinator.custody.rules import Condition, Standing
from holdoff_coordinator.failures import token_damaged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.scripts import Scripts

NEVER: Final = -1
"""An age or a time that there is not."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What may be read of a grant besides its state."""

    client_id: str
    token_url: str
    api_hosts: tuple[str, ...]
    client_authentication: str
    key_id: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A grant as the store has it; instants are µs of the store's clock, 0 for none."""

    chain: str
    generation: int
    sealed_grant: str = ""
    """`GrantSecrets`, in base64; empty if the secrets were not asked for."""
    sealed_access: str = ""
    """`AccessSecrets`, in base64; empty also if there is no access token."""
    facts: str
    fingerprint: str
    claim: str = ""
    """The fingerprint by which other apps find it: that of the refresh token that was put."""
    condition: Condition
    message: str = ""
    created_us: int
    since_us: int
    refreshed_us: int
    not_before_us: int
    expires_us: int
    idle_us: int
    unproven: int
    first_unproven_us: int
    not_sent: int
    confirmed_us: int = 0
    """When a replica last presented this generation as the newest that it knows."""
    evidence_us: int = 0
    """When an answer was stored, or an operator said that this is the newest generation."""
    attempt: str = ""
    attempt_replica: str = ""
    attempt_begun_us: int = 0
    attempt_step: str = ""
    attempt_outcome: str = ""

    @property
    def standing(self) -> Standing:
        """What the rules decide on."""
        return Standing(
            self.condition,
            self.generation,
            not_before_us=self.not_before_us,
            expires_us=self.expires_us,
            unproven=self.unproven,
            first_unproven_us=self.first_unproven_us,
            not_sent=self.not_sent,
        )

    @property
    def public(self) -> Facts:
        """What was written with the secrets."""
        return msgspec.json.decode(self.facts, type=Facts)

    @property
    def etag(self) -> str:
        """Names this state of the secrets, for those who replace or delete them."""
        return f"{self.chain}.{self.generation}"

    @property
    def under_way(self) -> bool:
        """Whether a replica has the right to a request, or had it, and no result is known."""
        return self.attempt_step in {"BEGUN", "INTENDED"}


class PutGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for `put_grant.lua`."""

    token: str
    chain: str
    generation: int
    sealed_grant: str
    facts: str
    fingerprint: str
    age_us: int
    idle_us: int
    takeover_us: int
    replace: bool = False
    etag_chain: str | None = None
    etag_generation: int | None = None
    attempt: str | None = None
    """Of the exchange that completes an authorization."""
    sealed_access: str = ""
    expires_in_us: int = 0


class BeginAuthorization(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for `begin_authorization.lua`."""

    token: str
    chain: str
    facts: str
    sealed: str
    """`AuthorizationSecrets`, in base64."""
    state_hash: str
    """SHA-256 of the parameter `state`."""
    valid_us: int
    takeover_us: int
    budgets: Sequence[dict[str, Any]]
    replace: bool = False
    etag_chain: str | None = None
    etag_generation: int | None = None


class ReadAuthorization(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `read_authorization.lua`."""

    token: str


class IntendAuthorization(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `intend_authorization.lua`."""

    token: str
    chain: str
    attempt: str
    takeover_us: int
    event: str
    budgets: Sequence[dict[str, Any]]


class EndAuthorization(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `end_authorization.lua`."""

    token: str
    chain: str
    attempt: str
    result: str
    outcome: str
    refreshed_age_us: int = NEVER


class ReadGrants(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `read_grants.lua`."""

    tokens: tuple[str, ...]
    sealed: bool = False


class BeginRefresh(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `begin_refresh.lua`."""

    token: str
    chain: str
    generation: int
    attempt: str
    replica: str
    takeover_us: int
    quarantine: str
    """As `Held` has it: in this one there is evidence; empty for none."""
    fears: str
    """After which loss the refresh token must not be sent: DATA, WRITES, or empty for none."""
    event: str
    budgets: Sequence[dict[str, Any]]


class IntendRefresh(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `intend_refresh.lua`."""

    token: str
    chain: str
    generation: int
    attempt: str


class EndRefresh(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `end_refresh.lua`; ages and times are µs, `NEVER` for none."""

    token: str
    chain: str
    from_generation: int
    attempt: str
    step: str
    result: str
    """A value of `RefreshResult` without its prefix; empty while one may still come."""
    outcome: str
    condition: Condition
    message: str
    generation: int
    unproven: int
    first_unproven_us: int
    not_sent: int
    refreshed_age_us: int
    not_before_in_us: int
    expires_in_us: int
    idle_us: int
    sealed_grant: str = ""
    sealed_access: str = ""
    fingerprint: str = ""
    facts: str = ""
    restores: bool = False
    """It was stored before; the store may have lost it, and those before it."""
    confirms: bool = True
    """No newer one is known to a replica."""

    def later(self, by_us: int) -> EndRefresh:
        """Return what to ask for some time after this was made."""

        def moved(us: int, by_us: int) -> int:
            return us if us == NEVER else max(0, us + by_us)

        return msgspec.structs.replace(
            self,
            refreshed_age_us=moved(self.refreshed_age_us, by_us),
            expires_in_us=moved(self.expires_in_us, -by_us),
            not_before_in_us=self.not_before_in_us - by_us,
        )


class ClaimIdle(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `claim_idle.lua`."""

    most: int
    again_us: int


class DeleteGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for `delete_grant.lua`."""

    token: str
    takeover_us: int
    etag_chain: str | None = None
    etag_generation: int | None = None


class TrustGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for `trust_grant.lua`."""

    token: str
    etag_chain: str | None = None
    etag_generation: int | None = None


class ResealGrant(msgspec.Struct, frozen=True, kw_only=True):
    """Asks for `reseal_grant.lua`."""

    token: str
    chain: str
    generation: int
    sealed_grant: str
    sealed_access: str
    facts: str


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A grant, and what prevents its next request besides itself."""

    token: str
    record: Record
    reason: str
    until_us: int
    now_us: int
    interval_us: int = 0
    """Of the token."""
    policy: str = ""
    """Of the token."""
    quarantine: str = ""
    """When the quarantine began and what may be lost; empty if there is none, or a clock is in
    doubt."""
    restored_us: int = 0
    """When the store was restored, if the grant may be that of a backup; 0 else."""


class Authorization(msgspec.Struct, frozen=True, kw_only=True):
    """An authorization as the store has it; instants are µs of the store's clock."""

    chain: str
    facts: str
    sealed: str = ""
    """`AuthorizationSecrets`, in base64; empty when it is done."""
    state_hash: str
    step: str
    attempt: str
    begun_us: int

    @property
    def public(self) -> Facts:
        """What was written with the secrets."""
        return msgspec.json.decode(self.facts, type=Facts)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a script of custody answers; what it does not name is absent."""

    status: str
    now_us: int = 0
    grant: Record | None = None
    authorization: Authorization | None = None
    reason: str = ""
    until_us: int = 0
    over_us: int = 0
    of: str = ""
    generation: int = 0
    tokens: tuple[str, ...] = ()
    grants: tuple[msgspec.Raw, ...] = ()
    """For `held_of`: a record that is damaged affects no other one."""
    is_damaged: bool = False
    """Something was left out because its record is damaged."""


Request = (
    PutGrant
    | BeginAuthorization
    | ReadAuthorization
    | IntendAuthorization
    | EndAuthorization
    | ReadGrants
    | BeginRefresh
    | IntendRefresh
    | EndRefresh
    | ClaimIdle
    | DeleteGrant
    | TrustGrant
    | ResealGrant
)
RequestT = TypeVar("RequestT", bound=Request)

_SCRIPTS: Final = {
    PutGrant: "put_grant",
    BeginAuthorization: "begin_authorization",
    ReadAuthorization: "read_authorization",
    IntendAuthorization: "intend_authorization",
    EndAuthorization: "end_authorization",
    ReadGrants: "read_grants",
    BeginRefresh: "begin_refresh",
    IntendRefresh: "intend_refresh",
    EndRefresh: "end_refresh",
    ClaimIdle: "claim_idle",
    DeleteGrant: "delete_grant",
    TrustGrant: "trust_grant",
    ResealGrant: "reseal_grant",
}


async def ask(scripts: Scripts, app: str, request: Request, caller: Caller = NOBODY) -> Answer:
    """Run the script of a request on the shard of an app.

    Raises:
        Failure: STORE_UNAVAILABLE, STORE_DAMAGED or STORE_NOT_REPLICATED.
    """
    payload = msgspec.msgpack.encode(request)
    run = (
        scripts.run
        if isinstance(request, ReadGrants | ReadAuthorization | ClaimIdle)
        else scripts.run_lasting
    )
    reply = await run(_SCRIPTS[type(request)], app, payload, caller=caller)
    try:
        answer = msgspec.msgpack.decode(reply.values[0], type=Answer, strict=False)
    except msgspec.ValidationError as error:
        raise token_damaged(TokenName(app, getattr(request, "token", ""))) from error
    return msgspec.structs.replace(answer, now_us=reply.now_us, is_damaged=bool(reply.damaged))


def held_of(raw: msgspec.Raw) -> Held:
    """Read one of the grants of an answer.

    Raises:
        ValueError: It is damaged.
    """
    try:
        held = msgspec.msgpack.decode(raw, type=Held, strict=False)
        held.record.public  # noqa: B018 - whether it can be read
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    return held


async def read(scripts: Scripts, name: TokenName, *, sealed: bool = False) -> Held | None:
    """Read the grant of a token; None if it has none.

    Raises:
        Failure: STORE_UNAVAILABLE or STORE_DAMAGED.
    """
    request = ReadGrants(tokens=(name.token,), sealed=sealed)
    answer = await ask(scripts, name.app, request)
    found = scripts.readable(name.app, "tokens", answer.grants, held_of)
    if len(found) < len(answer.grants) or answer.is_damaged:
        raise token_damaged(name)
    return found[0] if found else None
