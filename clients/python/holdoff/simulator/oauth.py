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
from holdoff.simulator.faults import TOKEN_PATH, FaultKind
from holdoff.simulator.grants import AccessToken, Grant, RefreshToken
from holdoff.simulator.limits import (
    ACCESS_TOKEN_LIFE_MS,
    DAY_MS,
    REFRESH_INTERVAL_MS,
    REFRESH_TOKEN_IDLE_MS,
    SECOND_MS,
    TOKEN_CALLS_PER_DAY,
)
from holdoff.simulator.switches import EarlyRefresh, ExpiresIn, OldTokenDies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from holdoff.simulator.seeds import Seed

TOKEN_ENDPOINT = "oauth2/token"  # noqa: S105 -- a path


class Rotation(StrEnum):
    """What becomes of a refresh token once it was used: a permission that an app has or not."""

    REUSE = "reuse"
    """Old ones work on and never expire, as Exact Online allows some apps."""
    STRICT = "strict"
    """Each refresh kills the token it used."""


@dataclass(frozen=True, slots=True)
class TokenForm:
    """The fields of a token request; what was not sent is empty."""

    grant_type: str = ""
    client_id: str = ""
    client_secret: str = ""
    refresh_token: str = ""


class TokenEndpoint:
    """Issues tokens to clients, and knows those that were issued.

    Args:
        seeds: the grants that exist.
        start_ms: simulated time at which the seeds' refresh tokens were issued.
        rotation: what becomes of a used refresh token.
        new_token: makes the value of a token.
        enforcement: what holds for every call.
    """

    def __init__(
        self,
        seeds: Iterable[Seed],
        *,
        start_ms: int,
        rotation: Rotation,
        new_token: Callable[[], str],
        enforcement: Enforcement,
    ) -> None:
        seeds = tuple(seeds)
        self._rotation = rotation
        self._new_token = new_token
        self._enforcement = enforcement
        self._switches = enforcement.switches
        self._secrets = {seed.client_id: seed.client_secret for seed in seeds}
        self._refresh_tokens = {
            seed.refresh_token: RefreshToken(Grant(seed), 0, start_ms) for seed in seeds
        }
        self._access_tokens: dict[str, AccessToken] = {}
        self._token_days: dict[tuple[str, str], Window] = {}

    def token(
        self, form: TokenForm, agent: str, now_ms: int, fault: FaultKind | None = None
    ) -> Answer:
        """Answer a call of the token endpoint.

        When the answer carries an access token, every further request of that
        user is too early until `sent` was called and the interval has passed.

        Args:
            form: what was sent.
            agent: who asks, by its User-Agent.
            now_ms: simulated time.
            fault: what will become of the answer.
        """
        token = self._refresh_tokens.get(form.refresh_token)
        if token is not None and token.grant.seed.client_id != form.client_id:
            token = None  # another app's token tells its user to nobody
        user = token.grant.seed.user if token else ""
        scope = Scope(form.client_id, user, "", TOKEN_ENDPOINT)
        gap_ms = token.grant.gap_ms(now_ms) if token else None
        newest = token.grant.newest if token else 0

        if self._enforcement.blocked(scope.key, agent, now_ms):
            answer = self._enforcement.block_answer()
        else:
            answer = self._decide_token(form, token, scope, agent, now_ms)
            self._enforcement.count_error(answer.status, scope, agent, now_ms)

        lost = fault is FaultKind.LOST_ANSWER
        if token and token.grant.newest > newest and not lost:
            token.grant.newest_received = token.grant.newest
        accepted = answer.issued_to is not None
        error = None if isinstance(answer.body, str) else answer.body.get("error")
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
                None if error is None else str(error),
                gap_ms,
                fault,
            ),
            received=accepted and not lost,
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

    def used(self, access: AccessToken) -> None:
        """Note that a valid access token came with a call of the API."""
        if self._switches.old_token_dies is OldTokenDies.FIRST_CALL:
            self._kill_before(access.number, access.grant)

    def _decide_token(  # noqa: PLR0911 -- one return for each answer of the provider
        self,
        form: TokenForm,
        token: RefreshToken | None,
        scope: Scope,
        agent: str,
        now_ms: int,
    ) -> Answer:
        day = self._token_days.setdefault(
            (scope.key, scope.user), Window(DAY_MS, TOKEN_CALLS_PER_DAY)
        )
        if not day.take(now_ms):
            detail = f"more than {TOKEN_CALLS_PER_DAY} token requests in a day"
            self._enforcement.violate(Rule.TOKEN_CALLS_PER_DAY, scope, agent, now_ms, detail)
            status = int(self._switches.daily_token_status)
            headers = {"Retry-After": self._enforcement.retry_after(day, now_ms)}
            return oauth_error(status, "access_denied", "Rate limit exceeded", headers)
        if form.client_secret != self._secrets.get(form.client_id):
            return oauth_error(401, "invalid_client", "Unknown client or wrong secret.")
        if form.grant_type != "refresh_token":
            return oauth_error(400, "unsupported_grant_type", "Only refresh_token is simulated.")
        if token is None:
            return oauth_error(400, "invalid_grant", "Unknown refresh token.")
        if self._rotation is Rotation.STRICT:
            refusal = self._refuse_if_dead(token, scope, agent, now_ms)
            if refusal is not None:
                return refusal
        grant = token.grant
        gap_ms = grant.gap_ms(now_ms)
        if gap_ms is not None and gap_ms < REFRESH_INTERVAL_MS:
            detail = f"{gap_ms / SECOND_MS:.3f} s after the last access token, not 570 s"
            self._enforcement.violate(Rule.REFRESH_INTERVAL, scope, agent, now_ms, detail)
            return self._too_early(grant, now_ms)
        if self._switches.old_token_dies is OldTokenDies.FIRST_REFRESH:
            self._kill_before(token.number, grant)
        return self._issue(grant, now_ms)

    def _refuse_if_dead(
        self, token: RefreshToken, scope: Scope, agent: str, now_ms: int
    ) -> Answer | None:
        """Refuse a refresh token that was replaced, or not used for too long."""
        if token.number < token.grant.oldest_alive:
            # Who never got a newer one because of a fault of ours could not know better.
            if token.number < token.grant.newest_received:
                self._enforcement.violate(
                    Rule.OLD_REFRESH_TOKEN, scope, agent, now_ms, "it was replaced"
                )
            status = int(self._switches.old_token_status)
            return oauth_error(status, "unauthorized_client", "Old refresh token used.")
        expiry_ms = token.issue_ms + REFRESH_TOKEN_IDLE_MS
        if now_ms >= expiry_ms:
            description = (
                f"The refresh token expired at {_american(expiry_ms)}"
                f" and it is now {_american(now_ms)}."
            )
            return oauth_error(400, "invalid_request", description)
        return None

    def _too_early(self, grant: Grant, now_ms: int) -> Answer:
        body = {
            "error": "access_denied",
            "error_description": "Rate limit exceeded: access_token not expired",
        }
        if self._switches.early_refresh is EarlyRefresh.NEW_TOKEN:
            body["refresh_token"] = self._new_refresh_token(grant, now_ms)
        # How the header's real value goes on is not known.
        return Answer(400, body, {"Reason": "TooEarlyToRefreshTokens"})

    def _issue(self, grant: Grant, now_ms: int) -> Answer:
        access_token, refresh_token = self._new_token(), self._new_refresh_token(grant, now_ms)
        expiry_ms = now_ms + ACCESS_TOKEN_LIFE_MS
        self._access_tokens[access_token] = AccessToken(grant, grant.newest, expiry_ms)
        grant.sending = True
        # Rounded down, so that nobody trusts it too long.
        life_seconds = math.floor(self._enforcement.real_seconds(ACCESS_TOKEN_LIFE_MS))
        digits = self._switches.expires_in is ExpiresIn.STRING
        body = {
            "access_token": access_token,
            "token_type": "bearer",
            "expires_in": str(life_seconds) if digits else life_seconds,
            "refresh_token": refresh_token,
        }
        return Answer(200, body, {"Cache-Control": "no-store"}, issued_to=grant)

    def _new_refresh_token(self, grant: Grant, now_ms: int) -> str:
        value = self._new_token()
        grant.newest += 1
        self._refresh_tokens[value] = RefreshToken(grant, grant.newest, now_ms)
        if self._switches.old_token_dies is OldTokenDies.ISSUE:
            self._kill_before(grant.newest, grant)
        return value

    def _kill_before(self, number: int, grant: Grant) -> None:
        grant.oldest_alive = max(grant.oldest_alive, number)


def _american(time_ms: int) -> str:
    """As the provider writes a time in its error texts: `10/11/2022 9:18:20 PM`."""
    t = datetime.fromtimestamp(time_ms / SECOND_MS, UTC)
    return f"{t.month}/{t.day}/{t.year} {int(t.strftime('%I'))}:{t.strftime('%M:%S %p')}"
