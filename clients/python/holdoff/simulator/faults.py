"""Faults of the provider on request: which are asked for, and which request gets one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    HTML = "html"
    """A maintenance page with status 200; the request is not acted on."""
    SLOW_BODY = "slow-body"
    """The right answer, its body in small pieces."""
    LATE_ANSWER = "late-answer"
    """The right answer after some time, also if the client did not wait for it."""
    PARTIAL_ANSWER = "partial-answer"
    """The request is acted on, and fields are left out of the answer."""
    LOST_ANSWER = "lost-answer"
    """The request is acted on, a token issued, and the connection reset instead of the answer."""
    HUNG_ANSWER = "hung-answer"
    """The request is acted on; silence instead of the answer, then the connection ends."""
    ERROR_ANSWER = "error-answer"
    """The request is acted on; a 5xx instead of the answer."""
    HTML_ANSWER = "html-answer"
    """The request is acted on; a maintenance page with status 200 instead of the answer."""


_NOT_ACTED_ON = {FaultKind.ERROR, FaultKind.HANG, FaultKind.RESET, FaultKind.HTML}
_IN_TIME = {FaultKind.SLOW_BODY, FaultKind.PARTIAL_ANSWER}
"""With these an answer reaches a client that waits for it."""
_OF_THE_API = _NOT_ACTED_ON - {FaultKind.HTML} | {FaultKind.SLOW_BODY}
_DEFAULT_SECONDS = {
    FaultKind.HANG: 600.0,
    FaultKind.SLOW_BODY: 30.0,
    FaultKind.LATE_ANSWER: 30.0,
    FaultKind.HUNG_ANSWER: 600.0,
}
_DEFAULT_STATUS = {FaultKind.ERROR: 500, FaultKind.ERROR_ANSWER: 500}
_DEFAULT_WITHOUT = {FaultKind.PARTIAL_ANSWER: ["access_token"]}
_MOST_FIELDS = 10
_STATUSES = {*range(300, 400), *range(500, 600)}
"""Redirects, and errors of a server."""
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
    """Simulated seconds that the fault lasts; None for those without a duration."""
    status: int | None = None
    """Status of an error; None for the others."""
    without: tuple[str, ...] | None = None
    """Fields that are missing in a partial answer; None for the others."""

    @classmethod
    def parse(cls, document: object) -> Fault:
        """Read a request for a fault: `{"fault": …}` and optional fields of the same names.

        Raises:
            ValueError: a field is wrong; the message names it and says what it may be.
        """
        if not isinstance(document, dict):
            raise ValueError("expected a JSON object with a field 'fault'")  # noqa: TRY004
        known = ("fault", "path", "count", "seconds", "status", "without")
        if unknown := sorted(map(str, document.keys() - set(known))):
            raise ValueError(f"{unknown[0]}: unknown; the fields are {', '.join(known)}")
        if document.get("fault") not in list(FaultKind):
            raise ValueError(f"fault: expected one of {', '.join(FaultKind)}")
        kind = FaultKind(document["fault"])

        path = document.get("path", _default_path(kind))
        if not isinstance(path, str) or not (path == "/" or path.startswith(("/api", "/docs"))):
            raise ValueError(f"path: expected a beginning such as {TOKEN_PATH}")
        count = document.get("count", 1)
        if type(count) is not int or not 1 <= count <= _MOST:
            raise ValueError(f"count: expected a whole number from 1 to {_MOST}")
        seconds = _option(document, "seconds", kind, _DEFAULT_SECONDS)
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds <= _MOST):
            raise ValueError(f"seconds: expected a number above 0, at most {_MOST}")
        status = _option(document, "status", kind, _DEFAULT_STATUS)
        if status is not None and (type(status) is not int or status not in _STATUSES):
            raise ValueError("status: expected 300 to 399, or 500 to 599")
        without = _option(document, "without", kind, _DEFAULT_WITHOUT)
        if without is not None and not _are_names(without):
            raise ValueError(f"without: expected a list of 1 to {_MOST_FIELDS} names of fields")
        return cls(kind, path, count, seconds, status, None if without is None else tuple(without))

    @property
    def acted_on(self) -> bool:
        """Whether the request is acted on all the same."""
        return self.kind not in _NOT_ACTED_ON

    def delivers(self, name: str) -> bool:
        """Whether a client is sure to get a field of the answer."""
        return self.kind in _IN_TIME and name not in (self.without or ())

    def document(self) -> dict[str, object]:
        """The fault as `parse` reads it."""
        fault = {name: value for name, value in asdict(self).items() if value is not None}
        if self.without is not None:
            fault["without"] = list(self.without)
        return {"fault": str(fault.pop("kind")), **fault}


def _default_path(kind: FaultKind) -> str:
    """The page for any path, what is done to an answer for token requests, the rest for the API."""
    if kind is FaultKind.HTML:
        return "/"
    return _API_PATH if kind in _OF_THE_API else TOKEN_PATH


def _option(
    document: Mapping[str, Any], name: str, kind: FaultKind, defaults: Mapping[FaultKind, object]
) -> Any:
    """A field that only some kinds have: what was asked for, or the default of the kind."""
    if name in document and kind not in defaults:
        raise ValueError(f"{name}: {kind} has none; {', '.join(defaults)} do")
    return document.get(name, defaults.get(kind))


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= _MOST_FIELDS
        and all(isinstance(name, str) and name for name in value)
    )


OWN_PATH = "/_simulator/"
"""Below it are the simulator's own pages, which get no faults."""


class Faults:
    """The faults that were asked for and not yet met."""

    def __init__(self) -> None:
        self._pending: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Ask for a fault, after those that were asked for before."""
        self._pending.append(fault)

    def take(self, path: str) -> Fault | None:
        """Take the first fault that fits a request's path, if there is one."""
        if path.startswith(OWN_PATH):
            return None
        for n, fault in enumerate(self._pending):
            if path.lower().startswith(fault.path.lower()):
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
