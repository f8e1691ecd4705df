"""Faults of the provider on request: which are asked for, and which request gets one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum

TOKEN_PATH = "/api/oauth2/token"  # noqa: S105 -- a path
AUTH_PATH = "/api/oauth2/auth"
_API_PATH = "/api/"


class FaultKind(StrEnum):
    """What goes wrong."""

    ERROR = "error"
    """A 5xx instead of an answer; the request is not acted on."""
    HANG = "hang"
    """Silence, then the connection ends; the request is not acted on."""
    RESET = "reset"
    """The connection is reset at once; the request is not acted on."""
    SLOW_BODY = "slow-body"
    """The right answer, its body in driblets."""
    LOST_ANSWER = "lost-answer"
    """The request is acted on, a token issued, and the connection reset instead of the answer."""


_DEFAULT_SECONDS = {FaultKind.HANG: 600.0, FaultKind.SLOW_BODY: 30.0}
_STATUSES = range(500, 600)
_MOST = 10**9
"""The largest count of requests and the largest number of seconds."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault for the next requests below a path."""

    kind: FaultKind
    path: str = _API_PATH
    """What a request's path must begin with."""
    count: int = 1
    """How many requests get it."""
    seconds: float | None = None
    """Simulated seconds that a hang or a slow body lasts; None for the others."""
    status: int | None = None
    """Status of an error; None for the others."""

    @classmethod
    def parse(cls, document: object) -> Fault:
        """Read a request for a fault: `{"fault": …}` and optional path, count, seconds, status.

        Raises:
            ValueError: a field is wrong; the message names it and says what it may be.
        """
        if not isinstance(document, dict):
            raise ValueError("expected a JSON object with a field 'fault'")  # noqa: TRY004
        known = ("fault", "path", "count", "seconds", "status")
        if unknown := sorted(map(str, document.keys() - set(known))):
            raise ValueError(f"{unknown[0]}: unknown; the fields are {', '.join(known)}")
        if document.get("fault") not in list(FaultKind):
            raise ValueError(f"fault: expected one of {', '.join(FaultKind)}")
        kind = FaultKind(document["fault"])

        default_path = TOKEN_PATH if kind is FaultKind.LOST_ANSWER else _API_PATH
        path = document.get("path", default_path)
        if not isinstance(path, str) or not path.startswith("/api"):
            raise ValueError(f"path: expected a beginning such as {TOKEN_PATH}")
        count = document.get("count", 1)
        if type(count) is not int or not 1 <= count <= _MOST:
            raise ValueError(f"count: expected a whole number from 1 to {_MOST}")
        if "seconds" in document and kind not in _DEFAULT_SECONDS:
            raise ValueError(f"seconds: {kind} takes no time; {', '.join(_DEFAULT_SECONDS)} do")
        seconds = document.get("seconds", _DEFAULT_SECONDS.get(kind))
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds <= _MOST):
            raise ValueError(f"seconds: expected a number above 0, at most {_MOST}")
        if "status" in document and kind is not FaultKind.ERROR:
            raise ValueError(f"status: only {FaultKind.ERROR} has one")
        status = document.get("status", 500 if kind is FaultKind.ERROR else None)
        if status is not None and (type(status) is not int or status not in _STATUSES):
            raise ValueError("status: expected 500 to 599")
        return cls(kind, path, count, seconds, status)

    @property
    def acted_on(self) -> bool:
        """Whether the request is acted on all the same."""
        return self.kind in (FaultKind.SLOW_BODY, FaultKind.LOST_ANSWER)

    def document(self) -> dict[str, object]:
        """The fault as `parse` reads it."""
        fault = {name: value for name, value in asdict(self).items() if value is not None}
        return {"fault": str(fault.pop("kind")), **fault}


class Faults:
    """The faults that were asked for and not yet met."""

    def __init__(self) -> None:
        self._pending: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Ask for a fault, after those that were asked for before."""
        self._pending.append(fault)

    def take(self, path: str) -> Fault | None:
        """Take the first fault that fits a request's path, if there is one."""
        for n, fault in enumerate(self._pending):
            if path.startswith(fault.path):
                left = [replace(fault, count=fault.count - 1)] if fault.count > 1 else []
                self._pending[n : n + 1] = left
                return fault
        return None

    def clear(self) -> None:
        """Forget all that are pending."""
        self._pending.clear()

    def pending(self) -> list[dict[str, object]]:
        """List what is pending, next first."""
        return [fault.document() for fault in self._pending]
