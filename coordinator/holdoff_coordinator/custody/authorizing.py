"""Authorizations by a person: the right to one, the exchange of its code, the grant that it gives.

    right, URL -> the person's browser -> code -> connection -> intent -> request -> grant stored

The right is taken, and the cooldown is over, before the URL is shown: a code lives for minutes, and
its exchange issues an access token. Until the code is sent the old grant is whole, and no other
request is made with it; a refusal leaves it as it is. The code is sent once: without an answer the
exchange counts as made at the last possible moment.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode, urlsplit

import msgspec
import structlog

from holdoff.names import GrantName, TokenName
from holdoff.v1 import custody_service_pb2, grant_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.caller import NOBODY
from holdoff_coordinator.custody import outcomes, seals
from holdoff_coordinator.custody.answers import Issued, NotSent, Refused, Unproven
from holdoff_coordinator.custody.answers import Refusal as WhyRefused
from holdoff_coordinator.custody.grants import (
    MOST_SECRET_CHARACTERS,
    MOST_URL_CHARACTERS,
    condition_of,
    refuse,
)
from holdoff_coordinator.custody.messages import authentication_value, held_words, time_message
from holdoff_coordinator.custody.outcomes import Failure as Why
from holdoff_coordinator.custody.outcomes import boottime_us
from holdoff_coordinator.custody.records import (
    NEVER,
    BeginAuthorization,
    EndAuthorization,
    IntendAuthorization,
    ReadAuthorization,
    ask,
    read,
)
from holdoff_coordinator.custody.refreshing import AUTHORIZATION, HEADERS, remove, spooling_of
from holdoff_coordinator.custody.reports import Requested
from holdoff_coordinator.custody.results import (
    reading_of,
    rules_of,
    verdict_of,
    without_secrets,
)
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US
from holdoff_coordinator.custody.sealing import (
    AccessSecrets,
    AuthorizationSecrets,
    GrantSecrets,
    SealError,
)
from holdoff_coordinator.custody.seals import binding_of
from holdoff_coordinator.custody.sending import Authentication, Request, wipe
from holdoff_coordinator.failures import Failure, invalid
from holdoff_coordinator.places import Place
from holdoff_coordinator.records import duration
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from holdoff.policies import Policy
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.answers import Verdict
    from holdoff_coordinator.custody.grants import Grants, Terms
    from holdoff_coordinator.custody.outcomes import Outcome
    from holdoff_coordinator.custody.records import Answer, Authorization, Facts, Held
    from holdoff_coordinator.custody.refreshing import Refresher
    from holdoff_coordinator.custody.sealing import Binding, Keyring
    from holdoff_coordinator.custody.seals import Seals
    from holdoff_coordinator.custody.spool import Spooled
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

VALID_US: Final = 600 * SECOND
"""How long a person has."""
MOST_SCOPES: Final = 50
MOST_SCOPE_CHARACTERS: Final = 500
MOST_ERROR_CHARACTERS: Final = 200
_SECRET_BYTES: Final = 48
_PAUSE_SECONDS: Final = 1.0
_NOT_REDIRECTED: Final = frozenset({"javascript", "data", "file", "blob", "about"})
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One exchange of a code."""

    name: TokenName
    attempt: str
    authorization: Authorization
    facts: Facts
    client_secret: str = field(repr=False)
    policy: Policy
    caller: Caller
    sent: tuple[str, ...] = field(default=(), repr=False)
    """Secrets of the request."""
    insists: bool = True
    """Whether to try to store its result as long as this process lives."""

    @property
    def binding(self) -> Binding:
        return _binding(self.name, self.authorization)


class Authorizations:
    """Begin and complete authorizations.

    Args:
        scripts: The store.
        grants: What stores a grant.
        seals: What opens and seals secrets.
        terms: On what terms this replica takes grants into custody.
        refresher: What makes requests; None where this replica makes none.
    """

    def __init__(
        self,
        scripts: Scripts,
        grants: Grants,
        seals: Seals,
        terms: Terms,
        refresher: Refresher | None,
    ) -> None:
        self._scripts = scripts
        self._grants = grants
        self._seals = seals
        self._terms = terms
        self._refresher = refresher
        if refresher:
            refresher.adopt_authorization = self._adopt

    # The right --------------------------------------------------------------------------------

    async def begin(
        self, request: custody_service_pb2.BeginAuthorizationRequest, caller: Caller
    ) -> custody_service_pb2.BeginAuthorizationResponse:
        """Take the right, and return the URL for a person's browser."""
        name = validation.grant_name("grant.name", request.grant.name).token_name
        self._terms.require_closed()
        self._seals.require()
        self._require_refresher()
        condition = condition_of(request.WhichOneof("condition") or "", request)
        redirect_uri = _redirect_uri(request.redirect_uri)
        ring, _ = await self._seals.unlocked()
        policy = await self._grants.policy(name)
        wanted, client_secret = _completed(
            request, await read(self._scripts, name, sealed=True), ring
        )
        facts = self._grants.facts(wanted, policy)
        url = _authorization_url(policy, facts.token_url)
        scopes = _scopes(request.scopes) or policy.oauth.scopes
        chain = uuid.uuid4().hex
        opened = AuthorizationSecrets(
            secrets.token_urlsafe(_SECRET_BYTES),
            secrets.token_urlsafe(_SECRET_BYTES),
            redirect_uri,
            client_secret,
        )
        facts = msgspec.structs.replace(facts, key_id=ring.primary)
        sealed = ring.seal(opened, binding_of(name, chain, AUTHORIZATION, facts))
        wish = BeginAuthorization(
            token=name.token,
            chain=chain,
            facts=msgspec.json.encode(facts).decode(),
            sealed=base64.b64encode(sealed).decode(),
            state_hash=_hash(opened.state),
            valid_us=VALID_US,
            takeover_us=TAKEOVER_US,
            budgets=Place(name, policy, "", "").specs("token_requests"),
            **condition,
        )
        answer = await ask(self._scripts, name.app, wish, caller)
        if answer.status != "OK":
            refuse(name, answer, caller)
        query = {
            "response_type": "code",
            "client_id": facts.client_id,
            "redirect_uri": redirect_uri,
            **({"scope": " ".join(scopes)} if scopes else {}),
            "state": opened.state,
            "code_challenge": _challenge(opened.verifier),
            "code_challenge_method": "S256",
        }
        return custody_service_pb2.BeginAuthorizationResponse(
            authorization_url=f"{url}{'&' if '?' in url else '?'}{urlencode(query)}",
            state=opened.state,
            expire_time=time_message(answer.until_us),
            valid_for=duration(answer.until_us - answer.now_us),
        )

    # The code ---------------------------------------------------------------------------------

    async def complete(
        self, request: custody_service_pb2.CompleteAuthorizationRequest, caller: Caller
    ) -> custody_service_pb2.CompleteAuthorizationResponse:
        """Exchange the code, or end the authorization."""
        name = validation.grant_name("name", request.name).token_name
        self._terms.require_closed()
        refresher = self._require_refresher()
        state = validation.oauth("state", request.state, MOST_SECRET_CHARACTERS)
        code = error = ""
        if request.WhichOneof("result") == "error":
            error = validation.oauth("error", request.error, MOST_ERROR_CHARACTERS)
        else:
            code = validation.oauth("code", request.code, MOST_SECRET_CHARACTERS)
        authorization = await self._authorization(name)
        if authorization is None:
            raise _not_found(name)
        if not hmac.compare_digest(_hash(state), authorization.state_hash):
            raise invalid("state", "is not the one of the authorization that was begun last")
        if authorization.step == "DONE":  # the same request, sent again
            return custody_service_pb2.CompleteAuthorizationResponse(
                grant=await self._grants.read(name)
            )
        if authorization.step != "PENDING":
            raise _busy(name, "REFRESHING", _PAUSE_SECONDS)
        if error:
            ended = await self._end(name, authorization, "CANCELLED", error, caller)
            if ended.status != "OK":  # its code was sent meanwhile
                raise _busy(name, "REFRESHING", _PAUSE_SECONDS)
            held = await read(self._scripts, name)
            return custody_service_pb2.CompleteAuthorizationResponse(
                grant=await self._grants.read(name) if held else None
            )
        policy = await self._grants.policy(name)
        ring, _ = await self._seals.usable()
        opened = _opened(name, authorization, ring)
        exchange = _Exchange(
            name,
            uuid.uuid4().hex,
            authorization,
            authorization.public,
            opened.client_secret,
            policy,
            caller,
            sent=(code, opened.verifier),
        )
        task = asyncio.create_task(self._exchange(exchange, opened, code, ring))
        refresher.requests.add(task)
        task.add_done_callback(refresher.requests.discard)
        task.add_done_callback(_retrieved)
        await asyncio.shield(task)  # to its end, also if the caller has gone
        return custody_service_pb2.CompleteAuthorizationResponse(
            grant=await self._grants.read(name)
        )

    async def _exchange(
        self, exchange: _Exchange, opened: AuthorizationSecrets, code: str, ring: Keyring
    ) -> None:
        """Send the code, and store what comes of it.

        Raises:
            Failure: No grant came of it; the message says why.
        """
        refresher = self._require_refresher()
        facts, attempt = exchange.facts, exchange.attempt
        path = f"{refresher.folder}/{attempt}" if refresher.folder else ""
        refresher.under_way.add(attempt)
        held: list[Failure] = []
        try:
            secret = bytearray(opened.client_secret.encode()) if opened.client_secret else None
            try:
                request = Request(
                    facts.token_url,
                    facts.client_id,
                    secret,
                    {
                        "code": bytearray(code.encode()),
                        "code_verifier": bytearray(opened.verifier.encode()),
                    },
                    {"grant_type": "authorization_code", "redirect_uri": opened.redirect_uri},
                    HEADERS,
                    Authentication(facts.client_authentication),
                )
                spooling = spooling_of(ring, exchange.binding, 0, path) if path else None
                sending = refresher.send(request, spooling=spooling)
            except (ValueError, SealError) as error:
                wipe(secret)
                raise _unreachable(exchange.name, str(error)) from None
            outcome = await refresher.sent(sending, partial(self._intend, exchange, held))
            if held:
                raise held[0]
            if outcomes.is_mute(outcome):  # the authorization stays, for an answer in the spool
                raise _failed(exchange.name, "it is not known what the provider answered")
            try:
                await self._finish(exchange, outcome)
            except Failure:
                remove(path)
                raise
            remove(path)  # else what comes next adopts it
        finally:
            refresher.under_way.discard(attempt)

    async def _intend(self, exchange: _Exchange, held: list[Failure]) -> outcomes.NotSent | None:
        """Store the intent; return why the code may not be sent, or None."""
        name, attempt = exchange.name, exchange.attempt
        request = IntendAuthorization(
            token=name.token,
            chain=exchange.authorization.chain,
            attempt=attempt,
            takeover_us=TAKEOVER_US,
            event=attempt,
            budgets=Place(name, exchange.policy, "", "").specs("token_requests"),
        )
        try:
            answer = await ask(self._scripts, name.app, request)
        except Failure as failure:
            return outcomes.NotSent(Why.ABANDONED, f"the intent was not stored: {failure.reason}")
        match answer.status:
            case "OK":
                return None
            case "WAIT":
                seconds = max(0, answer.until_us - answer.now_us) / SECOND
                held.append(_busy(name, answer.reason, seconds))
            case _:
                held.append(_not_found(name))
        return outcomes.NotSent(Why.ABANDONED, "it may not be sent now")

    async def _finish(self, exchange: _Exchange, outcome: Outcome) -> None:
        """Store what came of an exchange, and count it.

        Raises:
            Failure: No grant came of it; the message says why.
        """
        refresher = self._require_refresher()
        name, policy = exchange.name, exchange.policy
        verdict = without_secrets(
            verdict_of(outcome, reading_of(policy)), exchange.client_secret, *exchange.sent
        )
        request = Requested(exchange.attempt, exchange.facts.token_url)
        events = refresher.events(name, policy, request, outcome, verdict)
        received = outcomes.body_holder(outcome)
        if received is not None and isinstance(received.body, bytearray):
            wipe(received.body)
        try:
            await self._keep(exchange, outcome, verdict)
        finally:
            await refresher.record(name, events, outcome)

    async def _keep(self, exchange: _Exchange, outcome: Outcome, verdict: Verdict) -> None:
        name = exchange.name
        match verdict:
            case Issued(refresh_token=""):
                await self._fail(exchange, "ISSUED", "no refresh token was issued", outcome)
                raise _failed(
                    name,
                    "the provider issued no refresh token; ask for the scope that it needs for "
                    "one, often `offline_access`",
                )
            case Issued():
                await self._store(exchange, outcome, verdict)
            case Refused(why, error):
                counts = outcome if why is WhyRefused.TOO_EARLY else None
                await self._fail(exchange, "REFUSED", f"refused ({why}): {error}", counts)
                raise _failed(name, f"the provider refused the code: {error} ({why})")
            case NotSent(reason):
                await self._fail(exchange, "NOT_SENT", reason)
                raise _unreachable(name, reason)
            case Unproven(reason):
                await self._fail(exchange, "UNPROVEN", reason)
                raise _failed(name, f"the provider did not answer as it should: {reason}")

    async def _store(self, exchange: _Exchange, outcome: Outcome, verdict: Issued) -> None:
        """Store the grant; try as long as this process lives."""
        name, policy = exchange.name, exchange.policy
        life_us = rules_of(policy, 0).life_us
        if verdict.life_seconds is not None:
            life_us = round(verdict.life_seconds * SECOND)
        while True:
            age_us, sent_age_us = _ages(outcome)
            try:
                await self._grants.store(
                    name,
                    GrantSecrets(verdict.refresh_token, exchange.client_secret),
                    exchange.facts,
                    exchange.caller,
                    policy,
                    chain=exchange.authorization.chain,
                    access=AccessSecrets(verdict.access_token),
                    attempt=exchange.attempt,
                    age_us=age_us,
                    expires_in_us=max(0, life_us - sent_age_us),
                )
            except Failure as failure:
                if not _is_passing(failure):
                    await self._fail(exchange, "ISSUED", failure.reason, outcome)
                    raise
                if not exchange.insists:
                    raise
                warn(
                    "a grant that a person authorized is not stored yet",
                    failure.reason,
                    token=str(name),
                    remedy=failure.message,
                )
            else:
                log.info("a person authorized the app", token=str(name))
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _fail(
        self, exchange: _Exchange, result: str, outcome: str, issued: Outcome | None = None
    ) -> None:
        """End an authorization without a grant; try as long as this process lives."""
        log.warning(
            "an authorization failed",
            token=str(exchange.name),
            result=result,
            outcome=outcome,
            remedy=f"holdoff grant authorize {exchange.name}",
        )
        authorization = msgspec.structs.replace(exchange.authorization, attempt=exchange.attempt)
        while True:
            age_us = _ages(issued)[0] if issued else NEVER
            try:
                await self._end(
                    exchange.name, authorization, result, outcome, exchange.caller, age_us=age_us
                )
            except Failure as failure:
                if not exchange.insists:
                    raise
                warn(
                    "the end of an authorization is not stored yet",
                    failure.reason,
                    token=str(exchange.name),
                    remedy=failure.message,
                )
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                return

    async def _end(  # noqa: PLR0913 - what is stored
        self,
        name: TokenName,
        authorization: Authorization,
        result: str,
        outcome: str,
        caller: Caller,
        *,
        age_us: int = NEVER,
    ) -> Answer:
        request = EndAuthorization(
            token=name.token,
            chain=authorization.chain,
            attempt=authorization.attempt,
            result=result,
            outcome=outcome,
            refreshed_age_us=age_us,
        )
        return await ask(self._scripts, name.app, request, caller)

    # The spool --------------------------------------------------------------------------------

    async def _adopt(self, name: TokenName, attempt: str, found: Spooled) -> None:
        """Store the answer that a crash left in the spool."""
        authorization = await self._authorization(name)
        is_ours = authorization is not None and authorization.attempt == attempt
        if authorization is None or not is_ours or authorization.step != "INTENDED":
            log.warning(
                "a late answer to an authorization is dropped: another one was stored",
                token=str(name),
                remedy=f"nothing, while holdoff grant show {name} is ready",
            )
            return
        ring, _ = await self._seals.usable()
        opened = _opened(name, authorization, ring)
        outcome = found.outcome
        if not found.of_this_boot() and isinstance(outcome, outcomes.Answered):
            # Its instants are of another clock: it was received now at the latest, and the access
            # token counts as expired.
            outcome = outcomes.Answered(outcome.received, 0, boottime_us())
        exchange = _Exchange(
            name,
            attempt,
            authorization,
            authorization.public,
            opened.client_secret,
            await self._grants.policy(name),
            NOBODY,
            insists=False,
        )
        try:
            await self._finish(exchange, outcome)
        except Failure as failure:
            if _is_passing(failure):
                raise
            # Otherwise that it failed is stored.

    async def _authorization(self, name: TokenName) -> Authorization | None:
        answer = await ask(self._scripts, name.app, ReadAuthorization(token=name.token))
        return answer.authorization

    def _require_refresher(self) -> Refresher:
        """Return what makes requests.

        Raises:
            Failure: CUSTODY_OFF.
        """
        if self._refresher is None:
            raise seals.off(
                "it requests no access tokens. Start it with --data-dir DIR, or with "
                "--custody-spool-dir DIR"
            )
        return self._refresher


def _completed(
    request: custody_service_pb2.BeginAuthorizationRequest, held: Held | None, ring: Keyring
) -> tuple[grant_pb2.Grant, str]:
    """Complete the grant to come, and its client secret, from the one in custody."""
    grant, client_secret = request.grant, request.client_secret
    if client_secret:
        validation.oauth("client_secret", client_secret, MOST_SECRET_CHARACTERS)
    if held is None and not grant.client_id:
        raise invalid(
            "grant.client_id",
            "is missing: the first grant of a token needs it, and the client secret: --client-id "
            "ID --client-secret-file FILE",
        )
    if held is None or (grant.client_id and grant.client_id != held.record.public.client_id):
        return grant, client_secret
    public = held.record.public
    known = grant_pb2.Grant(
        client_id=public.client_id,
        token_url=grant.token_url or public.token_url,
        api_hosts=grant.api_hosts or public.api_hosts,
        client_authentication=grant.client_authentication
        or authentication_value(public.client_authentication),
    )
    if not client_secret and known.token_url == public.token_url:
        name = TokenName.parse(request.grant.name.removesuffix("/grant"))
        binding = binding_of(name, held.record.chain, held.record.generation, public)
        sealed = base64.b64decode(held.record.sealed_grant)
        try:
            client_secret = ring.open(sealed, binding, GrantSecrets).client_secret
        except SealError as error:
            raise Failure(
                "CUSTODY_KEY_MISSING", f"the client secret in custody cannot be read: {error}"
            ) from None
    return known, client_secret


def _redirect_uri(text: str) -> str:
    """Check where the code may go: over TLS, to this host, or to an app of the person's device."""
    validation.oauth("redirect_uri", text, MOST_URL_CHARACTERS)
    if not _is_redirect_uri(text):
        raise invalid(
            "redirect_uri",
            "must be the URI that is registered for the app: https://, or http:// on this host, "
            "and without a fragment",
        )
    return text


def _is_redirect_uri(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if parts.fragment or any(one in text for one in " \\") or parts.scheme in _NOT_REDIRECTED:
        return False
    if parts.scheme in {"https", "http"}:
        return bool(host) and port != 0 and (parts.scheme == "https" or host in _LOOPBACK)
    return bool(parts.scheme)  # an app on the person's device


def _scopes(wanted: Any) -> tuple[str, ...]:
    for one in wanted:
        validation.oauth("scopes", one, MOST_SCOPE_CHARACTERS)
        if " " in one:
            raise invalid("scopes", "write each one by itself, without spaces")
    return tuple(wanted)


def _authorization_url(policy: Policy, token_url: str) -> str:
    """Return the policy's URL that belongs to a token URL.

    Raises:
        Failure: INVALID_FIELD.
    """
    urls = policy.oauth.authorization_urls
    host = urlsplit(token_url).hostname
    found = [one for one in urls if urlsplit(one).hostname == host]
    if len(found) == 1:
        return found[0]
    if len(urls) == 1:
        return urls[0]
    raise invalid(
        "grant.token_url",
        f"the policy {policy.name!r} has no authorization URL for it. Write a policy file with "
        f'`like = "{policy.name}"` and `authorization_urls` in `[oauth]`',
    )


def _hash(state: str) -> str:
    return hashlib.sha256(state.encode()).hexdigest()


def _challenge(verifier: str) -> str:
    """Return the code challenge of PKCE (RFC 7636, section 4.2)."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _binding(name: TokenName, authorization: Authorization) -> Binding:
    return binding_of(name, authorization.chain, AUTHORIZATION, authorization.public)


def _opened(name: TokenName, authorization: Authorization, ring: Keyring) -> AuthorizationSecrets:
    """Open what completes an authorization.

    Raises:
        Failure: CUSTODY_KEY_MISSING.
    """
    sealed = base64.b64decode(authorization.sealed)
    try:
        return ring.open(sealed, _binding(name, authorization), AuthorizationSecrets)
    except SealError as error:
        raise Failure(
            "CUSTODY_KEY_MISSING", f"the authorization of {name} cannot be read: {error}"
        ) from None


def _ages(outcome: Outcome) -> tuple[int, int]:
    """Return how long ago an answer was received, and its request sent, in µs."""
    now_us = boottime_us()
    if not isinstance(outcome, outcomes.Answered):
        return 0, now_us
    return max(0, now_us - outcome.last_byte_us), max(0, now_us - outcome.sent_us)


def _is_passing(failure: Failure) -> bool:
    """Tell whether a result can be stored later."""
    return failure.reason.startswith(("STORE_", "CUSTODY_"))


def _retrieved(task: asyncio.Task[None]) -> None:
    """Retrieve the error of a task whose caller has gone; it was logged."""
    if not task.cancelled():
        task.exception()


def _resource(name: TokenName) -> str:
    return str(GrantName(name.app, name.token))


def _not_found(name: TokenName) -> Failure:
    return Failure(
        "AUTHORIZATION_NOT_FOUND",
        f"no authorization of {name} can be completed: it took too long, ended, or its grant was "
        f"changed meanwhile; begin again: holdoff grant authorize {name}",
        resource=_resource(name),
    )


def _busy(name: TokenName, reason: str, seconds: float) -> Failure:
    return Failure(
        "QUARANTINED" if reason == "QUARANTINED" else "TOKEN_BUSY",
        f"the code cannot be sent now, and was not: {held_words(reason, name)}",
        resource=str(name),
        retry_after_seconds=seconds,
        metadata={"cause": reason},
    )


def _failed(name: TokenName, why: str) -> Failure:
    return Failure(
        "AUTHORIZATION_FAILED",
        f"{why}; the grant of {name} was not changed: begin again: holdoff grant authorize {name}",
        resource=_resource(name),
    )


def _unreachable(name: TokenName, why: str) -> Failure:
    return Failure(
        "TOKEN_URL_UNREACHABLE",
        f"the code was not sent ({why}), and can be sent again",
        resource=str(name),
        retry_after_seconds=_PAUSE_SECONDS,
    )
