"""The rules of the simulated provider, without sockets and without a clock.

`Provider` decides what Exact Online would answer and keeps the account of who
broke which rule. Time is handed in as simulated milliseconds since the epoch.
Where the provider's behaviour is published it is marked *official*, where its
users report it *field*; where sources disagree or are silent, *open*, and the
strictest reading is taken, since jobs are tested against it.
"""

from __future__ import annotations

import math
import re
import secrets
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

REFRESH_INTERVAL_MS = 570 * SECOND_MS
"""Least time from the last byte of one access token to the next request (official)."""
ACCESS_TOKEN_LIFE_MS = 600 * SECOND_MS
"""Life of an access token (official)."""
REFRESH_TOKEN_IDLE_MS = 30 * DAY_MS
"""Life of an unused refresh token where old ones are refused (official)."""
TOKEN_CALLS_PER_DAY = 200
"""Token endpoint calls per key, user and day (official in 2021)."""
CALLS_PER_MINUTE = 60
"""API calls per app and company in a clock minute (official)."""
CALLS_PER_DAY = 5_000
"""API calls per app and company in a day (official)."""
ERRORS_PER_HOUR = 10
"""Errors per key, user, company and endpoint in a sliding hour (official; the window is open)."""
COUNTED_STATUSES = frozenset({400, 401, 403, 404})
"""Statuses that count as errors (official)."""
BLOCK_MS = HOUR_MS
"""Length of a key's first block; each repeat doubles it (official: longer; schedule open)."""
LONGEST_BLOCK_MS = DAY_MS
"""No block is longer (open)."""

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

_KEPT = 10_000  # entries of each list in the report; the totals count on

_LITERAL = r"(?:(?:guid|datetime)?'(?:[^']|'')*'|-?\d+(?:\.\d+)?[mLdf]?|true|false|null)"
_COMPARISON = rf"[A-Za-z_][\w/]*\s+(?:eq|ne|gt|ge|lt|le)\s+{_LITERAL}"
_FUNCTION = r"(?:substringof|startswith|endswith)\([^()]+\)(?:\s+eq\s+(?:true|false))?"
_TERM = rf"(?:{_COMPARISON}|{_FUNCTION})"
_FILTER = re.compile(rf"\s*{_TERM}(?:\s+(?:and|or)\s+{_TERM})*\s*")
"""As much of OData's `$filter` as jobs use; anything else is answered with 400."""


class Rotation(StrEnum):
    """What becomes of a refresh token once it was used."""

    REUSE = "reuse"
    """Old ones work on and never expire, as Exact Online allows some apps."""
    STRICT = "strict"
    """Each refresh kills the token it used."""


class Rule(StrEnum):
    """The rules that a client can break."""

    REFRESH_INTERVAL = "refresh_interval"
    OLD_REFRESH_TOKEN = "old_refresh_token"  # noqa: S105 -- a rule's name
    TOKEN_CALLS_PER_DAY = "token_calls_per_day"  # noqa: S105 -- a rule's name
    CALLS_PER_MINUTE = "calls_per_minute"
    CALLS_PER_DAY = "calls_per_day"
    ERROR_LIMIT = "error_limit"
    """More errors than allowed; the key is blocked."""


@dataclass(frozen=True, slots=True)
class Seed:
    """One user's grant to an app, known to the provider from the start.

    Two seeds with the same `client_id` are two users of one app.
    """

    client_id: str = "00000000-0000-4000-8000-000000000570"
    client_secret: str = "simulated-client-secret"  # noqa: S105 -- opens nothing
    user: str = "finance@example.com"
    refresh_token: str = "simulated-refresh-token-0"  # noqa: S105 -- opens nothing
    divisions: tuple[int, ...] = (535193, 535194)


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
    body: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)
    issued_to: _Grant | None = None
    """Set when the body carries an access token: `Provider.sent` must follow."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What errors are counted for, and where a rule was broken."""

    key: str
    user: str
    division: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule; `agent` is who broke it, by its User-Agent."""

    rule: Rule
    time_ms: int
    scope: Scope
    agent: str
    detail: str


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A call of the token endpoint; `error` is the refusal's code, empty when accepted."""

    time_ms: int
    key: str
    user: str
    agent: str
    status: int
    error: str
    gap_ms: int | None
    """Time since the last byte of the user's last access token; None before the first."""


@dataclass(frozen=True, slots=True)
class Block:
    """A time in which an API key is refused."""

    key: str
    start_ms: int
    end_ms: int
    cause: Scope


@dataclass(slots=True)
class AgentCounts:
    """What one client did, by its User-Agent."""

    token_requests: int = 0
    tokens_received: int = 0
    api_calls: int = 0
    api_calls_succeeded: int = 0
    errors: int = 0
    refused_while_blocked: int = 0
    violations: int = 0


@dataclass(slots=True)
class _Grant:
    """A seed's state: its current refresh token and the last access token given."""

    seed: Seed
    refresh_token: str
    refresh_token_time_ms: int
    last_sent_ms: int | None = None
    sending: bool = False

    def gap_ms(self, now_ms: int) -> int | None:
        if self.sending:
            return 0
        return None if self.last_sent_ms is None else now_ms - self.last_sent_ms


@dataclass(frozen=True, slots=True)
class _Access:
    """An access token."""

    grant: _Grant
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
        new_token: makes the value of a token.
    """

    def __init__(
        self,
        seeds: Iterable[Seed] = (Seed(),),
        *,
        start_ms: int = 0,
        time_scale: float = 1.0,
        rotation: Rotation = Rotation.REUSE,
        new_token: Callable[[], str] = secrets.token_urlsafe,
    ) -> None:
        self.seeds = tuple(seeds)
        self.time_scale = time_scale
        self.rotation = rotation
        self._new_token = new_token
        self._secrets = {seed.client_id: seed.client_secret for seed in self.seeds}
        self._refresh_tokens = {
            seed.refresh_token: _Grant(seed, seed.refresh_token, start_ms) for seed in self.seeds
        }
        self._access_tokens: dict[str, _Access] = {}
        self._errors: dict[Scope, deque[int]] = {}
        self._blocks: list[Block] = []
        self._token_days: dict[tuple[str, str], _Window] = {}
        self._minutes: dict[tuple[str, str], _Window] = {}
        self._days: dict[tuple[str, str], _Window] = {}

        self._violations: deque[Violation] = deque(maxlen=_KEPT)
        self._violations_by_rule: Counter[Rule] = Counter()
        self._token_requests: deque[TokenRequest] = deque(maxlen=_KEPT)
        self._token_totals: Counter[str] = Counter()
        self._api_statuses: Counter[int] = Counter()
        self._agents: dict[str, AgentCounts] = {}

    def token(self, form: TokenForm, agent: str, now_ms: int) -> Answer:
        """Answer a call of the token endpoint.

        When the answer carries an access token, every further request of that
        user is too early until `sent` was called and the interval has passed.
        """
        grant = self._refresh_tokens.get(form.refresh_token)
        if grant is not None and grant.seed.client_id != form.client_id:
            grant = None  # another app's token tells its user to nobody
        user = grant.seed.user if grant else ""
        scope = Scope(form.client_id, user, "", TOKEN_ENDPOINT)
        gap_ms = grant.gap_ms(now_ms) if grant else None

        answer = self._refuse_at_the_door(scope, agent, now_ms)
        if answer is None:
            answer = self._decide_token(form, grant, scope, agent, now_ms)
            self._count_error(answer.status, scope, agent, now_ms)

        error = str(answer.body.get("error", ""))
        counts = self._agent(agent)
        counts.token_requests += 1
        counts.tokens_received += answer.issued_to is not None
        self._token_totals["refused" if error else "accepted"] += 1
        self._token_requests.append(
            TokenRequest(now_ms, form.client_id, user, agent, answer.status, error, gap_ms)
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
        counts = self._agent(agent)
        counts.api_calls += 1
        counts.api_calls_succeeded += answer.status == 200  # noqa: PLR2004 -- HTTP's OK
        self._api_statuses[answer.status] += 1
        return answer

    def report(self, now_ms: int) -> dict[str, object]:
        """Tell who broke which rule when, and what was asked, as a JSON document.

        Each list holds its latest entries; the totals count everything. No
        token value is in it.
        """
        by_rule = {str(rule): self._violations_by_rule[rule] for rule in Rule}
        return {
            "time": _iso(now_ms),
            "time_scale": self.time_scale,
            "rotation": str(self.rotation),
            "totals": {"violations": sum(by_rule.values()), "by_rule": by_rule},
            "violations": [
                {
                    "rule": str(v.rule),
                    "time": _iso(v.time_ms),
                    "agent": v.agent,
                    **asdict(v.scope),
                    "detail": v.detail,
                }
                for v in self._violations
            ],
            "blocks": [
                {
                    "key": block.key,
                    "start": _iso(block.start_ms),
                    "end": _iso(block.end_ms),
                    "cause": asdict(block.cause),
                }
                for block in self._blocks
            ],
            "token_requests": {
                "accepted": self._token_totals["accepted"],
                "refused": self._token_totals["refused"],
                "requests": [
                    {
                        "time": _iso(r.time_ms),
                        "agent": r.agent,
                        "key": r.key,
                        "user": r.user,
                        "accepted": not r.error,
                        "status": r.status,
                        "error": r.error or None,
                        "gap_seconds": None if r.gap_ms is None else r.gap_ms / SECOND_MS,
                    }
                    for r in self._token_requests
                ],
            },
            "api_calls": {
                "total": self._api_statuses.total(),
                "by_status": {str(s): n for s, n in sorted(self._api_statuses.items())},
            },
            "agents": {name: asdict(counts) for name, counts in sorted(self._agents.items())},
        }

    def _refuse_at_the_door(self, scope: Scope, agent: str, now_ms: int) -> Answer | None:
        """Refuse a token request for what was asked before it."""
        if self._blocked(scope.key, agent, now_ms):
            return _BLOCKED
        day = self._token_days.setdefault(
            (scope.key, scope.user), _Window(DAY_MS, TOKEN_CALLS_PER_DAY)
        )
        if day.take(now_ms):
            return None
        detail = f"more than {TOKEN_CALLS_PER_DAY} token requests in a day"
        self._violate(Rule.TOKEN_CALLS_PER_DAY, scope, agent, now_ms, detail)
        headers = {"Retry-After": self._retry_after(day, now_ms)}
        return _oauth_error(429, "access_denied", "Rate limit exceeded", headers)  # open

    def _decide_token(  # noqa: PLR0911 -- one return for each answer of the provider
        self, form: TokenForm, grant: _Grant | None, scope: Scope, agent: str, now_ms: int
    ) -> Answer:
        if form.client_secret != self._secrets.get(form.client_id):
            return _oauth_error(401, "invalid_client", "Unknown client or wrong secret.")
        if form.grant_type != "refresh_token":
            return _oauth_error(400, "unsupported_grant_type", "Only refresh_token is simulated.")
        if grant is None:
            return _oauth_error(400, "invalid_grant", "Unknown refresh token.")
        if self.rotation is Rotation.STRICT:
            if form.refresh_token != grant.refresh_token:
                self._violate(Rule.OLD_REFRESH_TOKEN, scope, agent, now_ms, "it was used before")
                return _oauth_error(401, "unauthorized_client", "Old refresh token used.")
            expiry_ms = grant.refresh_token_time_ms + REFRESH_TOKEN_IDLE_MS
            if now_ms >= expiry_ms:
                description = (
                    f"The refresh token expired at {_american(expiry_ms)}"
                    f" and it is now {_american(now_ms)}."
                )
                return _oauth_error(400, "invalid_request", description)
        gap_ms = grant.gap_ms(now_ms)
        if gap_ms is not None and gap_ms < REFRESH_INTERVAL_MS:
            detail = f"{gap_ms / SECOND_MS:.3f} s after the last access token, not 570 s"
            self._violate(Rule.REFRESH_INTERVAL, scope, agent, now_ms, detail)
            return _oauth_error(
                400,
                "access_denied",
                "Rate limit exceeded: access_token not expired",
                {"Reason": "TooEarlyToRefreshTokens"},  # how the real value goes on is not known
            )
        return self._issue(grant, now_ms)

    def _issue(self, grant: _Grant, now_ms: int) -> Answer:
        access_token, refresh_token = self._new_token(), self._new_token()
        self._access_tokens[access_token] = _Access(grant, now_ms + ACCESS_TOKEN_LIFE_MS)
        self._refresh_tokens[refresh_token] = grant
        grant.refresh_token, grant.refresh_token_time_ms = refresh_token, now_ms
        grant.sending = True
        body = {
            "access_token": access_token,
            "token_type": "bearer",
            # Digits in a string (official); rounded down, so that nobody trusts it too long.
            "expires_in": str(math.floor(self._real_seconds(ACCESS_TOKEN_LIFE_MS))),
            "refresh_token": refresh_token,
        }
        return Answer(200, body, {"Cache-Control": "no-store"}, issued_to=grant)

    def _call_with(
        self, access: _Access, path: str, odata_filter: str | None, agent: str, now_ms: int
    ) -> Answer:
        seed = access.grant.seed
        if path == _ME:
            scope = Scope(seed.client_id, seed.user, "", path)
        else:
            division, _, rest = path.partition("/")
            endpoint = re.sub(r"\(.*\)$", "", rest)  # Accounts(guid'…') is one of Accounts
            scope = Scope(seed.client_id, seed.user, division, endpoint)

        if self._blocked(scope.key, agent, now_ms):
            return _BLOCKED
        if now_ms >= access.expiry_ms:
            answer = _UNAUTHORIZED
        else:
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
        self._agent(agent).errors += 1
        if scope.key not in self._secrets:
            return  # there is no such app to block
        errors = self._errors.setdefault(scope, deque())
        errors.append(now_ms)
        while errors[0] <= now_ms - HOUR_MS:
            errors.popleft()
        if len(errors) > ERRORS_PER_HOUR:
            repeats = sum(block.key == scope.key for block in self._blocks)
            length_ms = min(BLOCK_MS * 2**repeats, LONGEST_BLOCK_MS)
            self._blocks.append(Block(scope.key, now_ms, now_ms + length_ms, scope))
            detail = (
                f"{len(errors)} errors in an hour: key blocked for {length_ms // MINUTE_MS} min"
            )
            self._violate(Rule.ERROR_LIMIT, scope, agent, now_ms, detail)

    def _blocked(self, key: str, agent: str, now_ms: int) -> bool:
        """Whether the key is refused now; what is refused so counts as nothing else."""
        blocked = any(block.key == key and now_ms < block.end_ms for block in self._blocks)
        self._agent(agent).refused_while_blocked += blocked
        return blocked

    def _violate(self, rule: Rule, scope: Scope, agent: str, now_ms: int, detail: str) -> None:
        self._violations.append(Violation(rule, now_ms, scope, agent, detail))
        self._violations_by_rule[rule] += 1
        self._agent(agent).violations += 1

    def _agent(self, agent: str) -> AgentCounts:
        return self._agents.setdefault(agent, AgentCounts())

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


_BLOCKED = _oauth_error(403, "access_denied", "The API key is blocked.")  # the body is open
_UNAUTHORIZED = Answer(
    401, _message("Unauthorized: unknown or expired access token"), {"WWW-Authenticate": "Bearer"}
)


def _iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / SECOND_MS, UTC).isoformat(timespec="milliseconds")


def _american(time_ms: int) -> str:
    """As the provider writes a time in its error texts: `10/11/2022 9:18:20 PM`."""
    t = datetime.fromtimestamp(time_ms / SECOND_MS, UTC)
    return f"{t.month}/{t.day}/{t.year} {int(t.strftime('%I'))}:{t.strftime('%M:%S %p')}"
