"""The rules of the token endpoint, without sockets and without a clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from holdoff.simulator.accounting import Rule, Scope, TokenRequest
from holdoff.simulator.answers import Answer, oauth_error
from holdoff.simulator.enforcement import Enforcement, Window
from holdoff.simulator.faults import AUTH_PATH, TOKEN_PATH, Fault
from holdoff.simulator.grants import AccessToken, Grant, RefreshToken
from holdoff.simulator.limits import (
    ACCESS_TOKEN_LIFE_MS,
    DAY_MS,
    REFRESH_INTERVAL_MS,
    REFRESH_TOKEN_IDLE_MS,
    SECOND_MS,
    TOKEN_CALLS_PER_DAY,
)
from holdoff.simulator.switches import EarlyRefresh, ExpiresIn, RefreshInterval, UsedAt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from holdoff.simulator.codes import Codes
    from holdoff.simulator.seeds import Seed

AUTH_ENDPOINT = "oauth2/auth"
TOKEN_ENDPOINT = "oauth2/token"  # noqa: S105 -- a path
ASK_FOR_BASIC = {"WWW-Authenticate": 'Basic realm="token"'}


class Rotation(StrEnum):
    """What happens to a refresh token when it is used.

    An old token is one that was replaced: a newer one was issued.
    """

    NONE = "none"
    """A refresh returns no refresh token; the first one remains valid."""
    REUSABLE = "reusable"
    """Old ones remain valid and never expire: Exact Online allows some apps to reuse them."""
    UNTIL_USED = "until-used"
    """An old one is valid until a newer one is used: Exact Online, without that permission."""
    GRACE = "grace"
    """An old one is valid for a period after its first use."""
    SINGLE_USE = "single-use"
    """An old one is not valid."""
    SINGLE_USE_REVOKES = "single-use-revokes"
    """An old one is not valid; its use revokes all tokens of the chain."""


@dataclass(frozen=True, slots=True)
class TokenForm:
    """The fields of a token request; what was not sent is empty."""

    grant_type: str = ""
    client_id: str = ""
    client_secret: str = ""
    refresh_token: str = ""
    code: str = ""
    redirect_uri: str = ""
    code_verifier: str = ""
    basic_secret: str | None = None
    """The secret as it was sent in a Basic header, if the client authenticates that way."""
    refusal: Answer | None = None
    """The answer to a request that breaks a rule of OAuth by its form alone."""


class TokenEndpoint:
    """Issues tokens to clients, and knows those that were issued.

    Args:
        seeds: the grants that exist.
        start_ms: simulated time at which the seeds' refresh tokens were issued.
        rotation: what happens to a refresh token when it is used.
        grace_ms: how long a used refresh token remains valid under `Rotation.GRACE`.
        new_token: makes the value of a token.
        codes: the authorization codes that can be exchanged.
        enforcement: what holds for every call.
    """

    def __init__(  # noqa: PLR0913 -- each by its name
        self,
        seeds: Iterable[Seed],
        *,
        start_ms: int,
        rotation: Rotation,
        grace_ms: int,
        new_token: Callable[[], str],
        codes: Codes,
        enforcement: Enforcement,
    ) -> None:
        seeds = tuple(seeds)
        self._rotation = rotation
        self._grace_ms = grace_ms
        self._new_token = new_token
        self._codes = codes
        self._enforcement = enforcement
        self._switches = enforcement.switches
        self._secrets = {seed.client_id: seed.client_secret for seed in seeds}
        self._grants = [Grant(seed, [start_ms]) for seed in seeds]
        self._refresh_tokens = {
            grant.seed.refresh_token: RefreshToken(grant, 0) for grant in self._grants
        }
        self._access_tokens: dict[str, AccessToken] = {}
        self._token_days: dict[tuple[str, str], Window] = {}

    def grants(self, client_id: str) -> list[Grant]:
        """All grants to an app."""
        return [grant for grant in self._grants if grant.seed.client_id == client_id]

    def token(self, form: TokenForm, agent: str, now_ms: int, fault: Fault | None = None) -> Answer:
        """Answer a call of the token endpoint.

        When the answer carries an access token, every further request of that
        user is too early until `sent` was called and the interval has passed.

        Args:
            form: what was sent.
            agent: who asks, by its User-Agent.
            now_ms: simulated time.
            fault: what will become of the answer.
        """
        grant = self._grant_of(form)
        user = grant.seed.user if grant else ""
        scope = Scope(form.client_id, user, "", TOKEN_ENDPOINT)
        gap_ms = grant.gap_ms(now_ms) if grant else None
        newest = grant.newest if grant else 0

        if self._enforcement.blocked(scope.key, agent, now_ms):
            answer = self._enforcement.block_answer()
        else:
            answer = self._decide_token(form, grant, scope, agent, now_ms)
            self._enforcement.count_error(answer.status, scope, agent, now_ms)

        if grant and grant.newest > newest and (not fault or fault.delivers("refresh_token")):
            grant.newest_received = grant.newest
        accepted = answer.issued_to is not None
        self._enforcement.ledger.token_request(
            TokenRequest(
                now_ms,
                "POST",
                TOKEN_PATH,
                form.client_id,
                user,
                agent,
                answer.status,
                accepted,
                _error_of(answer),
                gap_ms,
                fault.kind if fault else None,
            ),
            received=accepted and (not fault or fault.delivers("access_token")),
        )
        return answer

    def log_on(self, grant: Grant, agent: str, now_ms: int) -> Answer:
        """Answer a log-on by the implicit flow as the token endpoint would.

        It counts in the day's limit (field). Whether the interval applies is
        open: here it starts the 570 s, and is never too early.
        """
        seed = grant.seed
        scope = Scope(seed.client_id, seed.user, "", AUTH_ENDPOINT)
        gap_ms = grant.gap_ms(now_ms)
        answer = self._count_in_day(scope, agent, now_ms)
        if answer is None:
            answer = self._issue(grant, now_ms, {})
        accepted = answer.issued_to is not None
        self._enforcement.ledger.token_request(
            TokenRequest(
                now_ms,
                "GET",
                AUTH_PATH,
                seed.client_id,
                seed.user,
                agent,
                302,
                accepted,
                _error_of(answer),
                gap_ms,
                None,
            ),
            received=accepted,
        )
        return answer

    def sent(self, answer: Answer, now_ms: int) -> None:
        """Note that the last byte of an answer with an access token left: 570 s start here."""
        if answer.issued_to is not None:
            answer.issued_to.sending = False
            answer.issued_to.last_sent_ms = now_ms

    def access(self, bearer: str) -> AccessToken | None:
        """Find an access token by its value."""
        return self._access_tokens.get(bearer)

    def used(self, access: AccessToken, now_ms: int) -> None:
        """Note that a valid access token came with a call of the API."""
        until_used = self._rotation is Rotation.UNTIL_USED and not access.implicit
        if until_used and self._switches.used_at is UsedAt.REFRESH_OR_CALL:
            access.grant.use(access.number, now_ms)

    def _grant_of(self, form: TokenForm) -> Grant | None:
        """The grant of a refresh token or code, unless it is another app's."""
        if form.grant_type == "authorization_code":
            grant = self._codes.grant(form.code)
        else:
            token = self._refresh_tokens.get(form.refresh_token)
            grant = token.grant if token else None
        return grant if grant and grant.seed.client_id == form.client_id else None

    def _decide_token(
        self,
        form: TokenForm,
        grant: Grant | None,
        scope: Scope,
        agent: str,
        now_ms: int,
    ) -> Answer:
        refusal = self._count_in_day(scope, agent, now_ms) or form.refusal
        if refusal is not None:
            return refusal
        secret = self._secrets.get(form.client_id)
        if secret is None or secret not in (form.client_secret, form.basic_secret):
            headers = {} if form.basic_secret is None else ASK_FOR_BASIC
            return oauth_error(401, "invalid_client", "Unknown client or wrong secret.", headers)
        match form.grant_type:
            case "refresh_token":
                return self._refresh(form, grant, scope, agent, now_ms)
            case "authorization_code":
                return self._exchange(form, grant, scope, agent, now_ms)
        description = "Only refresh_token and authorization_code are simulated."
        return oauth_error(400, "unsupported_grant_type", description)

    def _refresh(
        self, form: TokenForm, grant: Grant | None, scope: Scope, agent: str, now_ms: int
    ) -> Answer:
        if grant is None:
            return oauth_error(400, "invalid_grant", "Unknown refresh token.")
        token = self._refresh_tokens[form.refresh_token]
        refusal = self._refuse_if_invalid(token, scope, agent, now_ms)
        refusal = refusal or self._refuse_if_early(grant, scope, agent, now_ms)
        if refusal is not None:
            return refusal
        grant.use(token.number, now_ms)
        rotates = self._rotation is not Rotation.NONE
        return self._issue(grant, now_ms, self._new_refresh_token(grant, now_ms) if rotates else {})

    def _exchange(
        self, form: TokenForm, grant: Grant | None, scope: Scope, agent: str, now_ms: int
    ) -> Answer:
        """Exchange a code. It stays valid if the request is refused."""
        if grant is None or not self._codes.valid(
            form.code, form.redirect_uri, form.code_verifier, now_ms
        ):
            description = "The authorization code is unknown, expired, or not for this request."
            return oauth_error(400, "invalid_grant", description)
        refusal = self._refuse_if_early(grant, scope, agent, now_ms)
        if refusal is not None:
            return refusal
        self._codes.exchanged(form.code)
        fresh = self._new_refresh_token(grant, now_ms)
        grant.first_of_chain = grant.newest
        return self._issue(grant, now_ms, fresh)

    def _count_in_day(self, scope: Scope, agent: str, now_ms: int) -> Answer | None:
        """Count a token request or a log-on; refuse it above the limit of a day."""
        user = scope.key, scope.user
        if scope.key not in self._secrets:
            return None  # there is no such app
        day = self._token_days.setdefault(user, Window(DAY_MS, TOKEN_CALLS_PER_DAY))
        if day.take(now_ms):
            return None
        detail = f"more than {TOKEN_CALLS_PER_DAY} token requests in a day"
        self._enforcement.violate(Rule.TOKEN_CALLS_PER_DAY, scope, agent, now_ms, detail)
        status = int(self._switches.daily_token_status)
        headers = {"Retry-After": self._enforcement.retry_after(day, now_ms)}
        return oauth_error(status, "access_denied", "Rate limit exceeded", headers)

    def _refuse_if_early(
        self, grant: Grant, scope: Scope, agent: str, now_ms: int
    ) -> Answer | None:
        """Refuse a request that does not keep the interval."""
        gap_ms = grant.gap_ms(now_ms)
        exempt = self._switches.refresh_interval is RefreshInterval.EXEMPT
        if exempt or gap_ms is None or gap_ms >= REFRESH_INTERVAL_MS:
            return None
        detail = f"{gap_ms / SECOND_MS:.3f} s after the last access token, not 570 s"
        self._enforcement.violate(Rule.REFRESH_INTERVAL, scope, agent, now_ms, detail)
        return self._too_early(grant, now_ms)

    def _refuse_if_invalid(
        self, token: RefreshToken, scope: Scope, agent: str, now_ms: int
    ) -> Answer | None:
        """Refuse a refresh token that is old, was revoked, or was not used for too long."""
        grant, number = token.grant, token.number
        if self._is_old(token, now_ms):
            # A client that never got a newer one because of an injected fault is not to blame.
            if number < grant.newest_received:
                self._enforcement.violate(
                    Rule.OLD_REFRESH_TOKEN, scope, agent, now_ms, "it was replaced"
                )
            revokes = self._rotation is Rotation.SINGLE_USE_REVOKES
            if revokes and number >= grant.first_of_chain:
                grant.revoke()
            status = int(self._switches.old_token_status)
            return oauth_error(status, "unauthorized_client", "Old refresh token used.")
        if number < grant.oldest_valid:
            return oauth_error(400, "invalid_grant", "The refresh token was revoked.")
        expiry_ms = grant.issued_ms[number] + REFRESH_TOKEN_IDLE_MS
        if self._rotation not in (Rotation.NONE, Rotation.REUSABLE) and now_ms >= expiry_ms:
            description = (
                f"The refresh token expired at {_american(expiry_ms)}"
                f" and it is now {_american(now_ms)}."
            )
            return oauth_error(400, "invalid_request", description)
        return None

    def _is_old(self, token: RefreshToken, now_ms: int) -> bool:
        """Whether a newer token ended the validity of this one."""
        grant, number = token.grant, token.number
        if number == grant.newest:
            return False
        match self._rotation:
            case Rotation.NONE | Rotation.REUSABLE:
                return False
            case Rotation.UNTIL_USED:
                return number < grant.newest_used
            case Rotation.GRACE:
                used_ms = grant.first_used_ms.get(number)
                return used_ms is not None and now_ms >= used_ms + self._grace_ms
            case Rotation.SINGLE_USE | Rotation.SINGLE_USE_REVOKES:
                return True

    def _too_early(self, grant: Grant, now_ms: int) -> Answer:
        description = "Rate limit exceeded: access_token not expired"
        body = {"error": "access_denied", "error_description": description}
        new_token = self._switches.early_refresh is EarlyRefresh.NEW_TOKEN
        if new_token and self._rotation is not Rotation.NONE:
            body |= self._new_refresh_token(grant, now_ms)
        reason = {"Reason": f"TooEarlyToRefreshTokens: {description}"}
        return Answer(int(self._switches.early_status), body, reason)

    def _issue(self, grant: Grant, now_ms: int, fresh: dict[str, str]) -> Answer:
        """Issue an access token, with the field of a fresh refresh token if there is one."""
        value, expiry_ms = self._new_token(), now_ms + ACCESS_TOKEN_LIFE_MS
        self._access_tokens[value] = AccessToken(grant, grant.newest, expiry_ms, not fresh)
        grant.sending = True
        # Rounded down, so that no client uses it for too long.
        life_seconds = math.floor(self._enforcement.real_seconds(ACCESS_TOKEN_LIFE_MS))
        digits = self._switches.expires_in is ExpiresIn.STRING
        body = {
            "access_token": value,
            "token_type": "bearer",
            "expires_in": str(life_seconds) if digits else life_seconds,
            **fresh,
        }
        return Answer(200, body, {"Cache-Control": "no-store"}, issued_to=grant)

    def _new_refresh_token(self, grant: Grant, now_ms: int) -> dict[str, str]:
        """Issue a refresh token, as a field of an answer."""
        value = self._new_token()
        grant.issued_ms.append(now_ms)
        self._refresh_tokens[value] = RefreshToken(grant, grant.newest)
        return {"refresh_token": value}


def _error_of(answer: Answer) -> str | None:
    error = None if isinstance(answer.body, str) else answer.body.get("error")
    return None if error is None else str(error)


def _american(time_ms: int) -> str:
    """As the provider writes a time in its error texts: `10/11/2022 9:18:20 PM`."""
    t = datetime.fromtimestamp(time_ms / SECOND_MS, UTC)
    return f"{t.month}/{t.day}/{t.year} {int(t.strftime('%I'))}:{t.strftime('%M:%S %p')}"
