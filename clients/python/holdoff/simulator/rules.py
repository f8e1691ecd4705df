"""The rules of the simulated provider, without sockets and without a clock.

`Provider` decides what Exact Online would answer. Time is handed in as simulated
milliseconds since the epoch. Where the provider's behaviour is published it is
marked *official*, where its users report it *field*; where sources disagree or
are silent it is *open* and a switch (`holdoff.simulator.switches`).
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from holdoff.simulator.accounting import Injection, Rule, Scope, iso
from holdoff.simulator.answers import Answer, message
from holdoff.simulator.authorization import AuthorizationEndpoint
from holdoff.simulator.codes import Codes
from holdoff.simulator.enforcement import Enforcement, Window
from holdoff.simulator.faults import Fault, Faults
from holdoff.simulator.limits import CALLS_PER_DAY, CALLS_PER_MINUTE, DAY_MS, GRACE_MS, MINUTE_MS
from holdoff.simulator.oauth import Rotation, TokenEndpoint, TokenForm
from holdoff.simulator.seeds import Seed
from holdoff.simulator.switches import DEFAULTS, Switches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from holdoff.simulator.grants import AccessToken

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


class Provider:
    """Exact Online as its clients see it.

    Args:
        seeds: the grants that exist.
        start_ms: simulated time at which the seeds' refresh tokens were issued.
        time_scale: simulated seconds in a real one. It only turns simulated
            time into the real seconds of `expires_in` and `Retry-After`.
        rotation: what happens to a refresh token when it is used.
        grace_ms: how long a used refresh token remains valid under `Rotation.GRACE`.
        switches: the behaviours where the real one is not known.
        new_token: makes the value of a token.
    """

    def __init__(  # noqa: PLR0913 -- each can be left out
        self,
        seeds: Iterable[Seed] = (Seed(),),
        *,
        start_ms: int = 0,
        time_scale: float = 1.0,
        rotation: Rotation = Rotation.UNTIL_USED,
        grace_ms: int = GRACE_MS,
        switches: Switches = DEFAULTS,
        new_token: Callable[[], str] = secrets.token_urlsafe,
    ) -> None:
        self.seeds = tuple(seeds)
        self.time_scale = time_scale
        self.rotation = rotation
        self.switches = switches
        self.faults = Faults()
        self._enforcement = Enforcement(
            (seed.client_id for seed in self.seeds), switches, time_scale
        )
        codes = Codes(new_token)
        self._tokens = TokenEndpoint(
            self.seeds,
            start_ms=start_ms,
            rotation=rotation,
            grace_ms=grace_ms,
            new_token=new_token,
            codes=codes,
            enforcement=self._enforcement,
        )
        self._authorization = AuthorizationEndpoint(self._tokens, codes, self._enforcement)
        self._minutes: dict[tuple[str, str], Window] = {}
        self._days: dict[tuple[str, str], Window] = {}

    def fault(self, path: str, agent: str, now_ms: int) -> Fault | None:
        """Tell which fault, if any, was asked for a request that just came.

        Unless the fault is one that is `acted_on`, the request goes no further.
        """
        fault = self.faults.take(path)
        if fault is not None:
            self._enforcement.ledger.injection(Injection(now_ms, agent, path, fault.kind))
        return fault

    def token(self, form: TokenForm, agent: str, now_ms: int, fault: Fault | None = None) -> Answer:
        """Answer a call of the token endpoint; see `TokenEndpoint.token`."""
        return self._tokens.token(form, agent, now_ms, fault)

    def authorize(self, query: Mapping[str, str], agent: str, now_ms: int) -> Answer:
        """Answer the authorization endpoint; see `AuthorizationEndpoint.authorize`."""
        return self._authorization.authorize(query, agent, now_ms)

    def sent(self, answer: Answer, now_ms: int) -> None:
        """Note that the last byte of an answer with an access token left: 570 s start here."""
        self._tokens.sent(answer, now_ms)

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
        access = self._tokens.access(bearer)
        if access is None:
            answer = _UNAUTHORIZED  # belongs to no key, so nobody's errors are counted
        else:
            answer = self._call_with(access, path, odata_filter, agent, now_ms)
        self._enforcement.ledger.api_call("GET", f"/api/v1/{path}", answer.status, agent)
        return answer

    def report(self, now_ms: int) -> dict[str, object]:
        """Tell who broke which rule when, and what was asked, as a JSON document."""
        return {
            "time": iso(now_ms),
            "time_scale": self.time_scale,
            "rotation": str(self.rotation),
            "switches": self.switches.document(),
            **self._enforcement.ledger.document(),
        }

    def _call_with(
        self, access: AccessToken, path: str, odata_filter: str | None, agent: str, now_ms: int
    ) -> Answer:
        seed = access.grant.seed
        if path == _ME:
            scope = Scope(seed.client_id, seed.user, "", path)
        else:
            division, _, rest = path.partition("/")
            # Accounts(guid'…') is one of Accounts.
            endpoint = rest.partition("(")[0] if rest.endswith(")") else rest
            scope = Scope(seed.client_id, seed.user, division, endpoint)

        if self._enforcement.blocked(scope.key, agent, now_ms):
            return self._enforcement.block_answer()
        if now_ms >= access.expiry_ms:
            answer = _UNAUTHORIZED
        else:
            self._tokens.used(access, now_ms)
            limits = self._take_call(scope, agent, now_ms)
            if isinstance(limits, Answer):
                return limits
            status, body = _read(scope, seed.divisions, odata_filter)
            answer = Answer(status, body, limits)
        self._enforcement.count_error(answer.status, scope, agent, now_ms)
        return answer

    def _take_call(self, scope: Scope, agent: str, now_ms: int) -> Answer | dict[str, str]:
        """Count a call in the day and the minute: the limits' headers, or a 429.

        A 429 carries the headers of the limit that tripped and no others (field).
        """
        company = scope.key, scope.division
        day = self._days.setdefault(company, Window(DAY_MS, CALLS_PER_DAY))
        minute = self._minutes.setdefault(company, Window(MINUTE_MS, CALLS_PER_MINUTE))
        headers: dict[str, str] = {}
        for rule, window, name in (
            (Rule.CALLS_PER_MINUTE, minute, "X-RateLimit-Minutely"),
            (Rule.CALLS_PER_DAY, day, "X-RateLimit"),
        ):
            admitted = window.take(now_ms)
            own = window.headers(name, now_ms)
            if not admitted:
                detail = f"more than {window.limit} calls"
                self._enforcement.violate(rule, scope, agent, now_ms, detail)
                own["Retry-After"] = self._enforcement.retry_after(window, now_ms)
                return Answer(429, message("Too many requests"), own)
            headers |= own
        return headers


def _read(
    scope: Scope, divisions: tuple[int, ...], odata_filter: str | None
) -> tuple[int, dict[str, object]]:
    """Status and body of an admitted call."""
    if scope.endpoint == _ME:
        return 200, _rows({"UserName": scope.user, "CurrentDivision": divisions[0]})
    if scope.division not in map(str, divisions):
        return 403, message(f"Forbidden: no access to division {scope.division}")
    if scope.endpoint not in ENDPOINTS:
        return 404, message(f"Resource not found for the segment '{scope.endpoint}'")
    if odata_filter is not None and not _FILTER.fullmatch(odata_filter):
        return 400, message("Bad Request: syntax error in $filter")
    return 200, _rows({"Code": "1", "Division": int(scope.division)})


def _rows(*rows: dict[str, object]) -> dict[str, object]:
    """Rows in OData's form."""
    return {"d": {"results": list(rows)}}


_UNAUTHORIZED = Answer(
    401, message("Unauthorized: unknown or expired access token"), {"WWW-Authenticate": "Bearer"}
)
