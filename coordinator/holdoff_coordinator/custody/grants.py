"""Handlers of grants in custody: put, get, list and delete. They know nothing of gRPC."""

from __future__ import annotations

import base64
import contextlib
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import structlog

from holdoff.names import GrantName, TokenName
from holdoff.v1 import custody_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.custody import seals
from holdoff_coordinator.custody.messages import (
    authentication_word,
    grant_message,
    held_words,
    shown,
)
from holdoff_coordinator.custody.owners import Owners, TakenError
from holdoff_coordinator.custody.records import (
    DeleteGrant,
    Facts,
    PutGrant,
    ReadGrants,
    TrustGrant,
    ask,
    held_of,
    read,
)
from holdoff_coordinator.custody.rules import TAKEOVER_US
from holdoff_coordinator.custody.sealing import AccessSecrets, GrantSecrets
from holdoff_coordinator.custody.seals import binding_of
from holdoff_coordinator.failures import Failure, invalid, token_not_found
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from holdoff.policies import Policy
    from holdoff.v1 import grant_pb2
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.records import Answer, Held
    from holdoff_coordinator.custody.sealing import MasterKey
    from holdoff_coordinator.custody.seals import Seals
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

MOST_CLIENT_ID_CHARACTERS = 500
MOST_SECRET_CHARACTERS = 8_000
"""Of a refresh token, or a client secret; some of them are signed documents."""
MOST_URL_CHARACTERS = 2_000
MOST_HOST_CHARACTERS = 260
MOST_HOSTS = 20
_MOST_CHOICES_CHARACTERS = 1_000
_ETAG = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]{0,14})")


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms this replica takes grants into custody."""

    keys: Callable[[], Mapping[str, MasterKey]] = dict
    """Its master keys, by id."""
    is_closed: bool = True
    """Only callers that an access file names, or processes of this host, can reach it."""
    loopback_http: bool = False
    """Token URLs may be http:// on this host."""
    networks: tuple[str, ...] = ()
    """Networks in which token URLs may be although they are not public."""
    ca_file: Path | None = None
    """Authorities (PEM) for token URLs besides those of the system."""
    spool: Path | None = None
    """Where answers of token URLs lie until they are stored: a directory of this replica alone.
    Without it, this replica requests no access tokens."""

    def require_closed(self) -> None:
        """Refuse unauthenticated callers from the network.

        Raises:
            Failure: CUSTODY_OFF.
        """
        if not self.is_closed:
            raise seals.off(
                "it listens beyond loopback without an access file, so that any caller could use "
                "the tokens. Start it with --access-file FILE"
            )


class Grants:
    """Put, get, list, trust and delete grants."""

    def __init__(self, scripts: Scripts, policies: Policies, terms: Terms, seals: Seals) -> None:
        self._scripts = scripts
        self._policies = policies
        self._terms = terms
        self._seals = seals
        self._owners = Owners(scripts)

    async def put(
        self, request: custody_service_pb2.PutGrantRequest, caller: Caller
    ) -> custody_service_pb2.PutGrantResponse:
        """Take a grant into custody: its secrets are sealed at once, and nowhere kept."""
        name = validation.grant_name("grant.name", request.grant.name).token_name
        self._terms.require_closed()
        condition = condition_of(request.WhichOneof("condition") or "", request)
        chain = uuid.uuid4().hex
        if request.request_id:
            chain = uuid.UUID(validation.request_id(request.request_id)).hex
        age_us = 0
        if request.HasField("last_refresh_age"):
            age_us = validation.microseconds("last_refresh_age", request.last_refresh_age)
        secrets = _secrets(request)
        self._seals.require()
        policy = await self.policy(name)
        await self.store(
            name,
            secrets,
            self.facts(request.grant, policy),
            caller,
            policy,
            chain=chain,
            age_us=age_us,
            **condition,
        )
        return custody_service_pb2.PutGrantResponse(grant=await self.read(name))

    async def store(  # noqa: PLR0913 - what belongs to a grant
        self,
        name: TokenName,
        secrets: GrantSecrets,
        facts: Facts,
        caller: Caller,
        policy: Policy,
        *,
        chain: str,
        access: AccessSecrets | None = None,
        **fields: Any,
    ) -> None:
        """Seal a grant, and put it; `fields` are those of `PutGrant` that say how.

        Raises:
            Failure: GRANT_…, TOKEN_…, QUARANTINED, CUSTODY_KEY_MISSING or STORE_….
        """
        ring, fingerprints = await self._seals.unlocked()
        fingerprint = fingerprints.fingerprint(
            facts.token_url, facts.client_id, secrets.refresh_token
        )
        before = await read(self._scripts, name)
        claim = await self._claim(fingerprint, name, caller)
        generation = 1
        while True:  # each time only because another change of the grant succeeded
            binding = binding_of(name, chain, generation, facts)
            request = PutGrant(
                token=name.token,
                chain=chain,
                generation=generation,
                sealed_grant=_text(ring.seal(secrets, binding)),
                sealed_access=_text(ring.seal(access, binding)) if access else "",
                facts=msgspec.json.encode(
                    msgspec.structs.replace(facts, key_id=ring.primary)
                ).decode(),
                fingerprint=fingerprint,
                idle_us=round((policy.refresh.idle_life or 0) * 1e6),
                takeover_us=TAKEOVER_US,
                **fields,
            )
            answer = await ask(self._scripts, name.app, request, caller)
            if answer.status != "MOVED":
                break
            generation = answer.generation
        if answer.status != "OK":
            await self._release(fingerprint, name, claim)
            refuse(name, answer, caller)
        await self._confirm(fingerprint, name, f"{chain}.{generation}", caller)
        if before and before.record.claim:
            old = before.record.claim
            await self._release(old, name, await self._owners.held(old, name))

    async def get(
        self, request: custody_service_pb2.GetGrantRequest, _: Caller
    ) -> custody_service_pb2.GetGrantResponse:
        """Return one grant."""
        name = validation.grant_name("name", request.name).token_name
        return custody_service_pb2.GetGrantResponse(grant=await self.read(name))

    async def list(
        self, request: custody_service_pb2.ListGrantsRequest, caller: Caller
    ) -> custody_service_pb2.ListGrantsResponse:
        """List grants by name."""
        parent = validation.app_parent(request.parent)
        size = validation.page_size(request.page_size)
        after = validation.page_token(request.page_token) or ("", "")
        apps = [parent.app] if parent else await self._scripts.apps_with("grants")
        found: list[grant_pb2.Grant] = []
        key_ids, last = self._seals.ids(), ""
        for app in apps:
            if app < after[0]:
                continue
            first = after[1] if app == after[0] else ""
            async for held in self._held(app, first, caller):
                if len(found) == size:
                    return custody_service_pb2.ListGrantsResponse(
                        grants=found, next_page_token=last
                    )
                name = TokenName(app, held.token)
                found.append(grant_message(name, shown(held, self._policies), key_ids))
                last = str(name)
        return custody_service_pb2.ListGrantsResponse(grants=found)

    async def delete(
        self, request: custody_service_pb2.DeleteGrantRequest, caller: Caller
    ) -> custody_service_pb2.DeleteGrantResponse:
        """End custody of a token."""
        name = validation.grant_name("name", request.name).token_name
        self._terms.require_closed()
        condition = condition_of("etag" if request.etag else "", request)
        wanted = DeleteGrant(token=name.token, takeover_us=TAKEOVER_US, **condition)
        before = await read(self._scripts, name)
        fingerprint = before.record.claim if before else ""
        claim = await self._owners.held(fingerprint, name) if fingerprint else ""
        answer = await ask(self._scripts, name.app, wanted, caller)
        if answer.status != "OK":
            refuse(name, answer, caller)
        await self._release(fingerprint, name, claim)
        return custody_service_pb2.DeleteGrantResponse()

    async def trust(
        self, request: custody_service_pb2.TrustGrantRequest, caller: Caller
    ) -> custody_service_pb2.TrustGrantResponse:
        """Take the caller's word that a grant has the newest refresh token."""
        name = validation.grant_name("name", request.name).token_name
        self._terms.require_closed()
        condition = condition_of("etag" if request.etag else "", request)
        answer = await ask(
            self._scripts, name.app, TrustGrant(token=name.token, **condition), caller
        )
        if answer.status != "OK":
            refuse(name, answer, caller)
        return custody_service_pb2.TrustGrantResponse(grant=await self.read(name))

    async def _claim(self, fingerprint: str, name: TokenName, caller: Caller) -> str:
        """Claim a grant for a token, before it is put.

        Raises:
            Failure: GRANT_DUPLICATE, TOKEN_BUSY or STORE_….
        """
        try:
            return await self._owners.claim(fingerprint, name)
        except TakenError as taken:
            raise _duplicate(name, taken.of, caller) from None

    async def _confirm(self, fingerprint: str, name: TokenName, etag: str, caller: Caller) -> None:
        """See that the claim is still ours; undo the put if another token's was faster.

        That happens only if this replica was stopped for minutes between claim and put.

        Raises:
            Failure: GRANT_DUPLICATE, TOKEN_BUSY or STORE_….
        """
        if await self._owners.held(fingerprint, name):
            return
        try:
            await self._claim(fingerprint, name, caller)
        except Failure as failure:
            if failure.reason in {"GRANT_DUPLICATE", "TOKEN_BUSY"}:
                chain, _, generation = etag.partition(".")
                undo = DeleteGrant(
                    token=name.token,
                    takeover_us=TAKEOVER_US,
                    etag_chain=chain,
                    etag_generation=int(generation),
                )
                undone = await ask(self._scripts, name.app, undo, caller)
                log.error(  # noqa: TRY400 - its traceback tells nothing
                    "two tokens had one grant",
                    token=str(name),
                    undone=undone.status,
                    remedy="put this token's own grant: holdoff grant put",
                )
            raise

    async def _release(self, fingerprint: str, name: TokenName, claim: str) -> None:
        """Give up a claim; one that stays because the store is away is taken over when needed."""
        with contextlib.suppress(Failure):
            await self._owners.release(fingerprint, name, claim)

    async def policy(self, name: TokenName) -> Policy:
        """Return the policy of a token.

        Raises:
            Failure: TOKEN_NOT_FOUND, POLICY_NOT_FOUND or STORE_….
        """
        policy = await self._scripts.policy(name.app, name.token)
        if policy is None:
            raise token_not_found(name)
        return self._policies.find("the token's policy", policy)

    def facts(self, grant: grant_pb2.Grant, policy: Policy) -> Facts:
        """Check what is not secret, and put in what only the policy says.

        Raises:
            Failure: INVALID_FIELD.
        """
        oauth = policy.oauth
        urls = _allowed("grant.token_url", [grant.token_url], oauth.token_urls, policy)
        hosts = _allowed("grant.api_hosts", grant.api_hosts, oauth.hosts, policy)
        if urls[0].startswith("http:") and not self._terms.loopback_http:
            raise invalid(
                "grant.token_url",
                "secrets are not sent over http; to try a simulator on this host, start the "
                "coordinator with --custody-loopback-http",
            )
        try:
            word = authentication_word(grant.client_authentication)
        except ValueError:
            word = "unknown"
        ways: Sequence[str] = oauth.client_authentication
        if (word or ways[0]) not in ways:
            choices = ", ".join(f"CLIENT_AUTHENTICATION_{one.upper()}" for one in ways)
            raise invalid(
                "grant.client_authentication",
                f"write one that the policy {policy.name!r} has, or none: {choices}",
            )
        return Facts(
            client_id=validation.oauth(
                "grant.client_id", grant.client_id, MOST_CLIENT_ID_CHARACTERS
            ),
            token_url=urls[0],
            api_hosts=hosts,
            client_authentication=word or ways[0],
            key_id="",
        )

    async def read(self, name: TokenName) -> grant_pb2.Grant:
        """Return the grant of a token.

        Raises:
            Failure: GRANT_NOT_FOUND or STORE_….
        """
        held = await read(self._scripts, name)
        if held is None:
            raise grant_not_found(name)
        return grant_message(name, shown(held, self._policies), self._seals.ids())

    async def _held(self, app: str, last: str, caller: Caller) -> AsyncIterator[Held]:
        """Read the grants of an app that a caller may see, after one token."""
        while tokens := await self._scripts.tokens(app, last, READ_BATCH, "grants"):
            last = tokens[-1]
            seen = tuple(token for token in tokens if caller.sees(app, token))
            answer = await ask(self._scripts, app, ReadGrants(tokens=seen))
            for held in self._scripts.readable(app, "tokens", answer.grants, held_of):
                yield held


def _text(sealed: bytes) -> str:
    return base64.b64encode(sealed).decode()


def _secrets(request: custody_service_pb2.PutGrantRequest) -> GrantSecrets:
    refresh_token = validation.oauth("refresh_token", request.refresh_token, MOST_SECRET_CHARACTERS)
    if request.client_secret:
        validation.oauth("client_secret", request.client_secret, MOST_SECRET_CHARACTERS)
    return GrantSecrets(refresh_token, request.client_secret)


def condition_of(
    kind: str,
    request: custody_service_pb2.PutGrantRequest
    | custody_service_pb2.BeginAuthorizationRequest
    | custody_service_pb2.DeleteGrantRequest
    | custody_service_pb2.TrustGrantRequest,
) -> dict[str, Any]:
    """Read what may be replaced or deleted, as the scripts take it."""
    if kind != "etag":
        return {"replace": True} if getattr(request, "replace", False) else {}
    match = _ETAG.fullmatch(request.etag)
    if match is None:
        raise invalid("etag", "write the etag of GetGrant, or leave it out")
    return {"etag_chain": match[1], "etag_generation": int(match[2])}


def _allowed(
    field: str, wanted: Sequence[str], known: Sequence[str], policy: Policy
) -> tuple[str, ...]:
    """Return those of a policy that are wanted, or the only one that there is."""
    if not known:
        part = "token_urls" if "url" in field else "hosts"
        raise invalid(
            field,
            f"the policy {policy.name!r} has none: the provider has another one for each account. "
            f'Write a policy file with `like = "{policy.name}"` and `{part}` in `[oauth]`, give '
            "its directory to the coordinator (--policy-dir), and the policy to the token",
        )
    wanted = tuple(filter(None, wanted)) or (known if len(known) == 1 else ())
    if not wanted or not set(wanted) <= set(known) or len(set(wanted)) != len(wanted):
        choices = ", ".join(known)
        if len(choices) > _MOST_CHOICES_CHARACTERS:
            choices = f"{choices[:_MOST_CHOICES_CHARACTERS]}..."
        raise invalid(field, f"write what the policy {policy.name!r} allows: {choices}")
    return tuple(wanted)


def grant_not_found(name: TokenName) -> Failure:
    """Say that a token has no grant."""
    return Failure(
        "GRANT_NOT_FOUND",
        f"no grant of {name} is in custody; to put one: holdoff grant put {name}, "
        f"or holdoff grant authorize {name}",
        resource=str(GrantName(name.app, name.token)),
    )


def _duplicate(name: TokenName, of: TokenName, caller: Caller) -> Failure:
    """Say that another token has a grant, and which one, if the caller may see it."""
    other = str(of) if caller.sees(of.app, of.token) else "another token"
    return Failure(
        "GRANT_DUPLICATE",
        f"{other} has this refresh token in custody already: two names for one grant would refresh "
        "it too often",
        resource=str(GrantName(name.app, name.token)),
    )


def refuse(name: TokenName, answer: Answer, caller: Caller) -> NoReturn:
    """Say why a grant was not changed."""
    resource = str(GrantName(name.app, name.token))
    match answer.status:
        case "TOKEN_NOT_FOUND":
            raise token_not_found(name)
        case "GONE":
            raise grant_not_found(name)
        case "EXISTS":
            raise Failure(
                "GRANT_EXISTS",
                f"a grant of {name} is in custody already: to replace it, send its etag or "
                "`replace`",
                resource=resource,
            )
        case "CHANGED":
            raise Failure(
                "GRANT_CHANGED",
                f"the grant of {name} is not the one with this etag: read it again, and decide "
                "again",
                resource=resource,
            )
        case "DUPLICATE":
            raise _duplicate(name, TokenName(name.app, answer.of), caller)
        case "WAIT":
            raise Failure(
                "QUARANTINED" if answer.reason == "QUARANTINED" else "TOKEN_BUSY",
                f"the grant of {name} cannot be changed now: {held_words(answer.reason, name)}",
                resource=str(name),
                retry_after_seconds=max(0, answer.until_us - answer.now_us) / 1e6,
                metadata={"cause": answer.reason},
            )
    raise AssertionError(answer.status)
