"""The account of what clients did: who broke which rule when, and what was asked."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from holdoff.simulator.limits import HOUR_MS, SECOND_MS

if TYPE_CHECKING:
    from holdoff.simulator.faults import FaultKind

_LAST_MS = 253_402_300_799_999  # of the year 9999: a block may end later
_KEPT = 10_000  # entries of each list in the report; the totals count on


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
class Call:
    """A call that was answered. Its path has no query."""

    number: int
    """Calls are numbered from 1 in the order of their arrival."""
    method: str
    path: str
    status: int


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A call of the token endpoint; `error` is the refusal's code, where it has one."""

    time_ms: int
    method: str
    path: str
    key: str
    user: str
    agent: str
    status: int
    accepted: bool
    error: str | None
    gap_ms: int | None
    """Time since the last byte of the user's last access token; None before the first."""
    fault: FaultKind | None
    """What became of the answer on request."""


@dataclass(frozen=True, slots=True)
class Block:
    """A time in which an API key is refused."""

    key: str
    start_ms: int
    end_ms: int
    cause: Scope


@dataclass(frozen=True, slots=True)
class Injection:
    """A request that got a fault."""

    time_ms: int
    agent: str
    path: str
    fault: FaultKind


@dataclass(slots=True)
class ErrorCount:
    """The counted errors of a scope."""

    total: int = 0
    most_in_an_hour: int = 0
    """The largest number in any 60 minutes, whichever window the provider goes by."""
    _times_ms: deque[int] = field(default_factory=deque)

    def add(self, now_ms: int) -> None:
        """Count an error."""
        self._times_ms.append(now_ms)
        while self._times_ms[0] <= now_ms - HOUR_MS:
            self._times_ms.popleft()
        self.total += 1
        self.most_in_an_hour = max(self.most_in_an_hour, len(self._times_ms))

    def in_last_hour(self) -> int:
        """Errors in the 60 minutes up to the last one."""
        return len(self._times_ms)

    def in_clock_hour(self) -> int:
        """Errors in the clock's hour of the last one."""
        hour = self._times_ms[-1] // HOUR_MS
        return sum(time_ms // HOUR_MS == hour for time_ms in self._times_ms)


@dataclass(slots=True)
class AgentCounts:
    """What one client did, by its User-Agent."""

    token_requests: int = 0
    tokens_received: int = 0
    api_calls: int = 0
    api_calls_succeeded: int = 0
    errors: int = 0
    refused_while_blocked: int = 0
    faults_injected: int = 0
    violations: int = 0
    violations_by_rule: dict[Rule, int] = field(default_factory=dict)


class Ledger:
    """Keeps the account. Each of its lists holds the latest entries; the totals count everything.

    A request that got a fault instead of being acted on is in the account of
    faults alone: nothing that the provider does wrong is a client's violation.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._errors: dict[Scope, ErrorCount] = {}
        self._calls = 0
        self._violations: deque[tuple[Violation, Call]] = deque(maxlen=_KEPT)
        self._unanswered: list[Violation] = []
        """Those of the call that is being answered."""
        self._violations_by_rule: Counter[Rule] = Counter()
        self._token_requests: deque[TokenRequest] = deque(maxlen=_KEPT)
        self._token_totals: Counter[bool] = Counter()
        self._api_statuses: Counter[int] = Counter()
        self._injections: deque[Injection] = deque(maxlen=_KEPT)
        self._injected: Counter[FaultKind] = Counter()
        self._agents: dict[str, AgentCounts] = {}

    def agent(self, name: str) -> AgentCounts:
        """The counts of a client."""
        return self._agents.setdefault(name, AgentCounts())

    def errors(self, scope: Scope) -> ErrorCount:
        """The counted errors of a scope, which is the latest from now on."""
        count = self._errors[scope] = self._errors.pop(scope, ErrorCount())
        if len(self._errors) > _KEPT:
            del self._errors[next(iter(self._errors))]
        return count

    def violation(self, violation: Violation) -> None:
        """Note a rule that is broken by the call which is noted next."""
        self._unanswered.append(violation)
        self._violations_by_rule[violation.rule] += 1
        counts = self.agent(violation.agent)
        counts.violations += 1
        of_rule = counts.violations_by_rule
        of_rule[violation.rule] = of_rule.get(violation.rule, 0) + 1

    def token_request(self, request: TokenRequest, *, received: bool) -> None:
        """Note a call of the token endpoint, and whether its client gets a token by it."""
        self._answered(request.method, request.path, request.status)
        self._token_requests.append(request)
        self._token_totals[request.accepted] += 1
        counts = self.agent(request.agent)
        counts.token_requests += 1
        counts.tokens_received += received

    def api_call(self, method: str, path: str, status: int, agent: str) -> None:
        """Note a call of the API, by its path without a query."""
        self._answered(method, path, status)
        self._api_statuses[status] += 1
        counts = self.agent(agent)
        counts.api_calls += 1
        counts.api_calls_succeeded += 200 <= status < 300  # noqa: PLR2004 -- HTTP's success

    def _answered(self, method: str, path: str, status: int) -> None:
        """Number a call; the rules that were broken since the last one are its own."""
        self._calls += 1
        call = Call(self._calls, method, path, status)
        self._violations.extend((violation, call) for violation in self._unanswered)
        self._unanswered.clear()

    def injection(self, injection: Injection) -> None:
        """Note a request that got a fault."""
        self._injections.append(injection)
        self._injected[injection.fault] += 1
        self.agent(injection.agent).faults_injected += 1

    def document(self) -> dict[str, object]:
        """The account as JSON. No token value is in it."""
        by_rule = {str(rule): self._violations_by_rule[rule] for rule in Rule}
        return {
            "totals": {"violations": sum(by_rule.values()), "by_rule": by_rule},
            "violations": [
                {
                    "rule": str(v.rule),
                    "time": iso(v.time_ms),
                    "agent": v.agent,
                    "call": call.number,
                    "method": call.method,
                    "path": call.path,
                    "status": call.status,
                    **asdict(v.scope),
                    "detail": v.detail,
                }
                for v, call in self._violations
            ],
            "blocks": [
                {
                    "key": block.key,
                    "start": iso(block.start_ms),
                    "end": iso(block.end_ms),
                    "cause": asdict(block.cause),
                }
                for block in self.blocks
            ],
            "errors": [
                {
                    **asdict(scope),
                    "total": count.total,
                    "most_in_an_hour": count.most_in_an_hour,
                }
                for scope, count in sorted(
                    self._errors.items(), key=lambda item: -item[1].most_in_an_hour
                )
            ],
            "token_requests": {
                "accepted": self._token_totals[True],
                "refused": self._token_totals[False],
                "requests": [
                    {
                        "time": iso(r.time_ms),
                        "agent": r.agent,
                        "key": r.key,
                        "user": r.user,
                        "accepted": r.accepted,
                        "status": r.status,
                        "error": r.error,
                        "gap_seconds": None if r.gap_ms is None else r.gap_ms / SECOND_MS,
                        "fault": r.fault,
                    }
                    for r in self._token_requests
                ],
            },
            "api_calls": {
                "total": self._api_statuses.total(),
                "by_status": {str(s): n for s, n in sorted(self._api_statuses.items())},
            },
            "faults": {
                "injected": dict(sorted(self._injected.items())),
                "requests": [
                    {"time": iso(i.time_ms), "agent": i.agent, "path": i.path, "fault": i.fault}
                    for i in self._injections
                ],
            },
            "agents": {name: asdict(counts) for name, counts in sorted(self._agents.items())},
        }


def iso(time_ms: int) -> str:
    """A simulated time in ISO 8601, with milliseconds; at most the last date."""
    time = datetime.fromtimestamp(min(time_ms, _LAST_MS) / SECOND_MS, UTC)
    return time.isoformat(timespec="milliseconds")
