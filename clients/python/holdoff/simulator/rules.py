"""The rules of the simulated provider, without sockets and without a clock.

`Provider` decides what Exact Online would answer. Time is handed in as simulated
milliseconds since the epoch. Where the provider's behaviour is published it is
marked *official*, where its users report it *field*; where sources disagree or
are silent it is *open* and a switch (`holdoff.simulator.switches`).
"""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from holdoff.simulator.accounting import (
    Block,
    Injection,
    Ledger,
    Rule,
    Scope,
    TokenRequest,
    Violation,
    iso,
)
from holdoff.simulator.faults import Fault, FaultKind, Faults
from holdoff.simulator.limits import (
    ACCESS_TOKEN_LIFE_MS,
    BLOCK_MS,
    CALLS_PER_DAY,
    CALLS_PER_MINUTE,
    COUNTED_STATUSES,
    DAY_MS,
    ERRORS_PER_HOUR,
    MINUTE_MS,
    REFRESH_INTERVAL_MS,
    REFRESH_TOKEN_IDLE_MS,
    SECOND_MS,
    TOKEN_CALLS_PER_DAY,
)
from holdoff.simulator.seeds import Seed
from holdoff.simulator.switches import (
    DEFAULTS,
    BlockAnswer,
    BlockSchedule,
    EarlyRefresh,
    ErrorWindow,
    ExpiresIn,
    OldTokenDies,
    Switches,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TOKEN_ENDPOINT = "oauth2/token"  # noqa: S105 -- a path
_ME = "current/Me"  # the one endpoint that belongs to no company
ENDPOINTS = frozenset(
    {
        "crm/Accounts",
        "crm/Contacts",
        "financial/GLAccounts",
        "financialtransaction/TransactionLines",
        "logistics/Items",
        "salesinvoice/SalesInvoices",
        "salesorder/SalesOrders",
    }
)
"""The endpoints of a company that exist; any other answers 404."""

_LITERAL = r"(?:(?:guid|datetime)?'(?:[^']|'')*+'|-?\d++(?:\.\d+)?[mLdf]?|true|false|null)"
_COMPARISON = rf"[A-Za-z_][\w/]*+\s++(?:eq|ne|gt|ge|lt|le)\s++{_LITERAL}"
_FUNCTION = r"(?:substringof|startswith|endswith)\([^()]++\)(?:\s+eq\s+(?:true|false))?"
_TERM = rf"(?:{_COMPARISON}|{_FUNCTION})"
_FILTER = re.compile(rf"\s*+{_TERM}(?:\s++(?:and|or)\s++{_TERM})*+\s*+")
"""As much of OData's `$filter` as jobs use; anything else is answered with 400."""


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


@dataclass(frozen=True, slots=True)
class Answer:
    """What the provider answers."""

    status: int
    body: Mapping[str, object] | str
    """JSON, or the text of a page."""
    headers: Mapping[str, str] = field(default_factory=dict)
    issued_to: _Grant | None = None
    """Set when the body carries an access token: `Provider.sent` must follow."""


@dataclass(slots=True)
class _Grant:
    """A seed's state. Its refresh tokens are numbered in the order of their issue."""

    seed: Seed
    newest: int = 0
    """Number of the latest refresh token."""
    newest_received: int = 0
    """Number of the latest one whose answer was not lost on request."""
    oldest_alive: int = 0
    """Under strict rotation the tokens before this one are dead."""
    last_sent_ms: int | None = None
    """When the last byte of the last access token left."""
    sending: bool = False

    def gap_ms(self, now_ms: int) -> int | None:
        if self.sending:
            return 0
        return None if self.last_sent_ms is None else now_ms - self.last_sent_ms


@dataclass(frozen=True, slots=True)
class _RefreshToken:
    grant: _Grant
    number: int
    issue_ms: int


@dataclass(frozen=True, slots=True)
class _AccessToken:
    grant: _Grant
    number: int
    """Number of the refresh token that was issued with it."""
    expiry_ms: int


@dataclass(slots=True)
class _Window:
    """Counts in a fixed window of the clock."""

    length_ms: int
    limit: int
    index: int = -1
    count: int = 0

    def take(self, now_ms: int) -> bool:
        """Count one more if there is room."""
        self._turn(now_ms)
        if self.count >= self.limit:
            return False
        self.count += 1
        return True

    def end_ms(self, now_ms: int) -> int:
        return (now_ms // self.length_ms + 1) * self.length_ms

    def headers(self, name: str, now_ms: int) -> dict[str, str]:
        """The limit's headers; the reset is in epoch milliseconds (field)."""
        self._turn(now_ms)
        return {
            f"{name}-Limit": str(self.limit),
            f"{name}-Remaining": str(self.limit - self.count),
            f"{name}-Reset": str(self.end_ms(now_ms)),
        }

    def _turn(self, now_ms: int) -> None:
        index = now_ms // self.length_ms
        if index != self.index:
            self.index, self.count = index, 0


class Provider:
    """Exact Online as its clients see it.

    Args:
        seeds: the grants that exist.
        start_ms: simulated time at which the seeds' refresh tokens were issued.
        time_scale: simulated seconds in a real one. It only turns simulated
            time into the real seconds of `expires_in` and `Retry-After`.
        rotation: what becomes of a used refresh token.
        switches: the behaviours where the real one is not known.
        new_token: makes the value of a token.
    """

    def __init__(  # noqa: PLR0913 -- each can be left out
        self,
        seeds: Iterable[Seed] = (Seed(),),
        *,
        start_ms: int = 0,
        time_scale: float = 1.0,
        rotation: Rotation = Rotation.REUSE,
        switches: Switches = DEFAULTS,
        new_token: Callable[[], str] = secrets.token_urlsafe,
    ) -> None:
        self.seeds = tuple(seeds)
        self.time_scale = time_scale
        self.rotation = rotation
        self.switches = switches
        self.faults = Faults()
        self._new_token = new_token
        self._secrets = {seed.client_id: seed.client_secret for seed in self.seeds}
        self._refresh_tokens = {
            seed.refresh_token: _RefreshToken(_Grant(seed), 0, start_ms) for seed in self.seeds
        }
        self._access_tokens: dict[str, _AccessToken] = {}
        self._token_days: dict[tuple[str, str], _Window] = {}
        self._minutes: dict[tuple[str, str], _Window] = {}
        self._days: dict[tuple[str, str], _Window] = {}
        self._ledger = Ledger()

    def fault(self, path: str, agent: str, now_ms: int) -> Fault | None:
        """Tell which fault, if any, was asked for a request that just came.

        Unless the fault is one that is `acted_on`, the request goes no further.
        """
        fault = self.faults.take(path)
        if fault is not None:
            self._ledger.injection(Injection(now_ms, agent, path, fault.kind))
        return fault

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

        if self._blocked(scope.key, agent, now_ms):
            answer = self._block_answer()
        else:
            answer = self._decide_token(form, token, scope, agent, now_ms)
            self._count_error(answer.status, scope, agent, now_ms)

        lost = fault is FaultKind.LOST_ANSWER
        if token and token.grant.newest > newest and not lost:
            token.grant.newest_received = token.grant.newest
        accepted = answer.issued_to is not None
        error = None if isinstance(answer.body, str) else answer.body.get("error")
        self._ledger.token_request(
            TokenRequest(
                now_ms,
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

    def call(
        self, path: str, odata_filter: str | None, bearer: str, agent: str, now_ms: int
    ) -> Answer:
        """Answer a GET of the REST API.

        Args:
            path: what follows `/api/v1/`, for example `535193/crm/Accounts`.
            odata_filter: the `$filter` of the query, if there is one.
            bearer: the access token that was sent, empty when none was.
            agent: who calls, by its User-Agent.
            now_ms: simulated time.
        """
        access = self._access_tokens.get(bearer)
        if access is None:
            answer = _UNAUTHORIZED  # belongs to no key, so nobody's errors are counted
        else:
            answer = self._call_with(access, path, odata_filter, agent, now_ms)
        self._ledger.api_call(answer.status, agent)
        return answer

    def report(self, now_ms: int) -> dict[str, object]:
        """Tell who broke which rule when, and what was asked, as a JSON document."""
        return {
            "time": iso(now_ms),
            "time_scale": self.time_scale,
            "rotation": str(self.rotation),
            "switches": self.switches.document(),
            **self._ledger.document(),
        }

    def _decide_token(  # noqa: PLR0911 -- one return for each answer of the provider
        self,
        form: TokenForm,
        token: _RefreshToken | None,
        scope: Scope,
        agent: str,
        now_ms: int,
    ) -> Answer:
        day = self._token_days.setdefault(
            (scope.key, scope.user), _Window(DAY_MS, TOKEN_CALLS_PER_DAY)
        )
        if not day.take(now_ms):
            detail = f"more than {TOKEN_CALLS_PER_DAY} token requests in a day"
            self._violate(Rule.TOKEN_CALLS_PER_DAY, scope, agent, now_ms, detail)
            status = int(self.switches.daily_token_status)
            headers = {"Retry-After": self._retry_after(day, now_ms)}
            return _oauth_error(status, "access_denied", "Rate limit exceeded", headers)
        if form.client_secret != self._secrets.get(form.client_id):
            return _oauth_error(401, "invalid_client", "Unknown client or wrong secret.")
        if form.grant_type != "refresh_token":
            return _oauth_error(400, "unsupported_grant_type", "Only refresh_token is simulated.")
        if token is None:
            return _oauth_error(400, "invalid_grant", "Unknown refresh token.")
        if self.rotation is Rotation.STRICT:
            refusal = self._refuse_if_dead(token, scope, agent, now_ms)
            if refusal is not None:
                return refusal
        grant = token.grant
        gap_ms = grant.gap_ms(now_ms)
        if gap_ms is not None and gap_ms < REFRESH_INTERVAL_MS:
            detail = f"{gap_ms / SECOND_MS:.3f} s after the last access token, not 570 s"
            self._violate(Rule.REFRESH_INTERVAL, scope, agent, now_ms, detail)
            return self._too_early(grant, now_ms)
        if self.switches.old_token_dies is OldTokenDies.FIRST_REFRESH:
            self._kill_before(token.number, grant)
        return self._issue(grant, now_ms)

    def _refuse_if_dead(
        self, token: _RefreshToken, scope: Scope, agent: str, now_ms: int
    ) -> Answer | None:
        """Refuse a refresh token that was replaced, or not used for too long."""
        if token.number < token.grant.oldest_alive:
            # Who never got a newer one because of a fault of ours could not know better.
            if token.number < token.grant.newest_received:
                self._violate(Rule.OLD_REFRESH_TOKEN, scope, agent, now_ms, "it was replaced")
            status = int(self.switches.old_token_status)
            return _oauth_error(status, "unauthorized_client", "Old refresh token used.")
        expiry_ms = token.issue_ms + REFRESH_TOKEN_IDLE_MS
        if now_ms >= expiry_ms:
            description = (
                f"The refresh token expired at {_american(expiry_ms)}"
                f" and it is now {_american(now_ms)}."
            )
            return _oauth_error(400, "invalid_request", description)
        return None

    def _too_early(self, grant: _Grant, now_ms: int) -> Answer:
        body = {
            "error": "access_denied",
            "error_description": "Rate limit exceeded: access_token not expired",
        }
        if self.switches.early_refresh is EarlyRefresh.NEW_TOKEN:
            body["refresh_token"] = self._new_refresh_token(grant, now_ms)
        # How the header's real value goes on is not known.
        return Answer(400, body, {"Reason": "TooEarlyToRefreshTokens"})

    def _issue(self, grant: _Grant, now_ms: int) -> Answer:
        access_token, refresh_token = self._new_token(), self._new_refresh_token(grant, now_ms)
        expiry_ms = now_ms + ACCESS_TOKEN_LIFE_MS
        self._access_tokens[access_token] = _AccessToken(grant, grant.newest, expiry_ms)
        grant.sending = True
        # Rounded down, so that nobody trusts it too long.
        life_seconds = math.floor(self._real_seconds(ACCESS_TOKEN_LIFE_MS))
        digits = self.switches.expires_in is ExpiresIn.STRING
        body = {
            "access_token": access_token,
            "token_type": "bearer",
            "expires_in": str(life_seconds) if digits else life_seconds,
            "refresh_token": refresh_token,
        }
        return Answer(200, body, {"Cache-Control": "no-store"}, issued_to=grant)

    def _new_refresh_token(self, grant: _Grant, now_ms: int) -> str:
        value = self._new_token()
        grant.newest += 1
        self._refresh_tokens[value] = _RefreshToken(grant, grant.newest, now_ms)
        if self.switches.old_token_dies is OldTokenDies.ISSUE:
            self._kill_before(grant.newest, grant)
        return value

    def _kill_before(self, number: int, grant: _Grant) -> None:
        grant.oldest_alive = max(grant.oldest_alive, number)

    def _call_with(
        self, access: _AccessToken, path: str, odata_filter: str | None, agent: str, now_ms: int
    ) -> Answer:
        seed = access.grant.seed
        if path == _ME:
            scope = Scope(seed.client_id, seed.user, "", path)
        else:
            division, _, rest = path.partition("/")
            # Accounts(guid'…') is one of Accounts.
            endpoint = rest.partition("(")[0] if rest.endswith(")") else rest
            scope = Scope(seed.client_id, seed.user, division, endpoint)

        if self._blocked(scope.key, agent, now_ms):
            return self._block_answer()
        if now_ms >= access.expiry_ms:
            answer = _UNAUTHORIZED
        else:
            if self.switches.old_token_dies is OldTokenDies.FIRST_CALL:
                self._kill_before(access.number, access.grant)
            limits = self._take_call(scope, agent, now_ms)
            if isinstance(limits, Answer):
                return limits
            status, body = _read(scope, seed.divisions, odata_filter)
            answer = Answer(status, body, limits)
        self._count_error(answer.status, scope, agent, now_ms)
        return answer

    def _take_call(self, scope: Scope, agent: str, now_ms: int) -> Answer | dict[str, str]:
        """Count a call in the day and the minute: the limits' headers, or a 429.

        A 429 carries the headers of the limit that tripped and no others (field).
        """
        company = scope.key, scope.division
        day = self._days.setdefault(company, _Window(DAY_MS, CALLS_PER_DAY))
        minute = self._minutes.setdefault(company, _Window(MINUTE_MS, CALLS_PER_MINUTE))
        headers: dict[str, str] = {}
        for rule, window, name in (
            (Rule.CALLS_PER_MINUTE, minute, "X-RateLimit-Minutely"),
            (Rule.CALLS_PER_DAY, day, "X-RateLimit"),
        ):
            admitted = window.take(now_ms)
            own = window.headers(name, now_ms)
            if not admitted:
                detail = f"more than {window.limit} calls"
                self._violate(rule, scope, agent, now_ms, detail)
                own["Retry-After"] = self._retry_after(window, now_ms)
                return Answer(429, _message("Too many requests"), own)
            headers |= own
        return headers

    def _count_error(self, status: int, scope: Scope, agent: str, now_ms: int) -> None:
        """Count an answer that is an error in its hour; above the limit, block the key."""
        if status not in COUNTED_STATUSES:
            return
        self._ledger.agent(agent).errors += 1
        if scope.key not in self._secrets:
            return  # there is no such app to block
        errors = self._ledger.errors(scope)
        errors.add(now_ms)
        sliding = self.switches.error_window is ErrorWindow.SLIDING
        count = errors.in_last_hour() if sliding else errors.in_clock_hour()
        if count > ERRORS_PER_HOUR:
            length_ms = self._next_block_ms(scope.key)
            self._ledger.blocks.append(Block(scope.key, now_ms, now_ms + length_ms, scope))
            detail = f"{count} errors in an hour: key blocked for {length_ms // MINUTE_MS} min"
            self._violate(Rule.ERROR_LIMIT, scope, agent, now_ms, detail)

    def _next_block_ms(self, key: str) -> int:
        """How long the next block of a key will be."""
        repeats = sum(block.key == key for block in self._ledger.blocks)
        match self.switches.block_schedule:
            case BlockSchedule.FIXED:
                return BLOCK_MS
            case BlockSchedule.DOUBLING_TO_A_DAY:
                return min(BLOCK_MS << repeats, DAY_MS)
            case BlockSchedule.DOUBLING:
                return BLOCK_MS << repeats

    def _blocked(self, key: str, agent: str, now_ms: int) -> bool:
        """Whether the key is refused now; what is refused so counts as nothing else."""
        blocked = any(block.key == key and now_ms < block.end_ms for block in self._ledger.blocks)
        self._ledger.agent(agent).refused_while_blocked += blocked
        return blocked

    def _block_answer(self) -> Answer:
        if self.switches.block_answer is BlockAnswer.HTML_503:
            return _BLOCKED_PAGE
        return _BLOCKED

    def _violate(self, rule: Rule, scope: Scope, agent: str, now_ms: int, detail: str) -> None:
        self._ledger.violation(Violation(rule, now_ms, scope, agent, detail))

    def _real_seconds(self, simulated_ms: int) -> float:
        return simulated_ms / SECOND_MS / self.time_scale

    def _retry_after(self, window: _Window, now_ms: int) -> str:
        """Real seconds until the window ends, rounded up so that a retry is not too early."""
        return str(math.ceil(self._real_seconds(window.end_ms(now_ms) - now_ms)))


def _read(
    scope: Scope, divisions: tuple[int, ...], odata_filter: str | None
) -> tuple[int, dict[str, object]]:
    """Status and body of an admitted call."""
    if scope.endpoint == _ME:
        return 200, _rows({"UserName": scope.user, "CurrentDivision": divisions[0]})
    if scope.division not in map(str, divisions):
        return 403, _message(f"Forbidden: no access to division {scope.division}")
    if scope.endpoint not in ENDPOINTS:
        return 404, _message(f"Resource not found for the segment '{scope.endpoint}'")
    if odata_filter is not None and not _FILTER.fullmatch(odata_filter):
        return 400, _message("Bad Request: syntax error in $filter")
    return 200, _rows({"Code": "1", "Division": int(scope.division)})


def _rows(*rows: dict[str, object]) -> dict[str, object]:
    """Rows in OData's form."""
    return {"d": {"results": list(rows)}}


def _message(text: str) -> dict[str, object]:
    """An error of the REST API in OData's form."""
    return {"error": {"code": "", "message": {"lang": "", "value": text}}}


def _oauth_error(
    status: int, error: str, description: str, headers: Mapping[str, str] | None = None
) -> Answer:
    return Answer(status, {"error": error, "error_description": description}, headers or {})


MALFORMED = _oauth_error(400, "invalid_request", "The request cannot be read.")
"""For a form that is invalid, too long, or in an unknown encoding."""
_BLOCKED = _oauth_error(403, "access_denied", "The API key is blocked.")
_BLOCKED_PAGE = Answer(
    503,
    "<!DOCTYPE html><html><head><title>Service Unavailable</title></head>"
    "<body><h1>Service Unavailable</h1></body></html>",
)
_UNAUTHORIZED = Answer(
    401, _message("Unauthorized: unknown or expired access token"), {"WWW-Authenticate": "Bearer"}
)


def _american(time_ms: int) -> str:
    """As the provider writes a time in its error texts: `10/11/2022 9:18:20 PM`."""
    t = datetime.fromtimestamp(time_ms / SECOND_MS, UTC)
    return f"{t.month}/{t.day}/{t.year} {int(t.strftime('%I'))}:{t.strftime('%M:%S %p')}"
