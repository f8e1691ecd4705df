"""Grant records in the store: the scripts of custody, each with a typed request and answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from holdoff_coordinator.caller import NOBODY
from holdoff_coordinator.custody.rules import Condition, Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdoff.names import TokenName
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.scripts import Scripts

NEVER: Final = -1
"""An age or a time that there is not."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What may be read of a grant besides its state; all of it is bound to the sealed secrets."""

    client_id: str
    token_url: str
    api_hosts: tuple[str, ...]
    client_authentication: str
    key_id: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A grant as the store has it; instants are µs of the store's clock, 0 for none."""

    chain: str
    generation: int
    sealed: str = ""
    """Base64; empty where it was not asked for."""
    facts: str
    fingerprint: str
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


class PutGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for `put_grant.lua`."""

    token: str
    chain: str
    sealed: str
    facts: str
    fingerprint: str
    age_us: int
    interval_us: int
    idle_us: int
    replace: bool = False
    etag_chain: str | None = None
    etag_generation: int | None = None


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
    has_evidence: bool
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
    sealed: str = ""
    fingerprint: str = ""


class DeleteGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for `delete_grant.lua`."""

    token: str
    etag_chain: str | None = None
    etag_generation: int | None = None


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A grant, and what holds its next request besides itself."""

    token: str
    record: Record
    reason: str
    until_us: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a script of custody answers; what it does not name is absent."""

    status: str
    now_us: int = 0
    grant: Record | None = None
    reason: str = ""
    until_us: int = 0
    over_us: int = 0
    of: str = ""
    grants: tuple[Held, ...] = ()


Request = PutGrant | ReadGrants | BeginRefresh | IntendRefresh | EndRefresh | DeleteGrant
RequestT = TypeVar("RequestT", bound=Request)

_SCRIPTS: Final = {
    PutGrant: "put_grant",
    ReadGrants: "read_grants",
    BeginRefresh: "begin_refresh",
    IntendRefresh: "intend_refresh",
    EndRefresh: "end_refresh",
    DeleteGrant: "delete_grant",
}


async def ask(scripts: Scripts, app: str, request: Request, caller: Caller = NOBODY) -> Answer:
    """Run the script of a request on the shard of an app.

    Raises:
        Failure: STORE_UNAVAILABLE, STORE_DAMAGED or STORE_NOT_REPLICATED.
    """
    payload = msgspec.msgpack.encode(request)
    run = scripts.run if isinstance(request, ReadGrants) else scripts.run_lasting
    reply = await run(_SCRIPTS[type(request)], app, payload, caller=caller)
    answer = msgspec.msgpack.decode(reply.values[0], type=Answer, strict=False)
    return msgspec.structs.replace(answer, now_us=reply.now_us)


async def read(scripts: Scripts, name: TokenName, *, sealed: bool = False) -> Held | None:
    """Read the grant of a token; None if it has none."""
    answer = await ask(scripts, name.app, ReadGrants(tokens=(name.token,), sealed=sealed))
    return answer.grants[0] if answer.grants else None
