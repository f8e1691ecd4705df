"""What the gateway itself answers, and why. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from holdoff.errors import BudgetSpent, NoAccessToken

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdoff.errors import HoldoffError
    from holdoff.gateway.standins import StandIns

STAND_IN_SECONDS: Final = 30 * 86_400
"""The life of a stand-in, as clients see it: so long that none is renewed during a job."""
_LEAST_RETRY_SECONDS: Final = 1
_UNAUTHORIZED, _AWAY = 401, 503
_UNKNOWN_RETRY_SECONDS: Final = 5


class Reason(StrEnum):
    """Why the gateway answers by itself: the header `Holdoff-Reason`."""

    METHOD = "method"
    TARGET = "target"
    HOST = "host"
    ORIGIN = "origin"
    SECRET = "secret"  # noqa: S105 - a word
    UPGRADE = "upgrade"
    OAUTH = "oauth"
    GRANT_TYPE = "grant-type"
    FOREIGN_TOKEN = "foreign-token"  # noqa: S105
    BUDGET = "budget"
    NO_ACCESS_TOKEN = "no-access-token"  # noqa: S105
    COORDINATOR = "coordinator"
    TOO_MANY_HELD = "too-many-held"
    DRAINING = "draining"
    UPSTREAM = "upstream"
    TOKEN = "token"  # noqa: S105


_REFUSALS: Final[Mapping[Reason, tuple[int, str]]] = {
    Reason.METHOD: (405, "this method is not forwarded"),
    Reason.TARGET: (400, "the target of the request must be a path that begins with /"),
    Reason.HOST: (421, "the header Host does not name this gateway"),
    Reason.ORIGIN: (403, "the gateway serves no web pages"),
    Reason.SECRET: (403, "the path must begin with the secret of this gateway"),
    Reason.UPGRADE: (501, "the gateway forwards no websockets"),
    Reason.OAUTH: (403, "the gateway holds the token: nothing has to be authorized here"),
    Reason.FOREIGN_TOKEN: (
        401,
        (
            "the access token is not one that this gateway issued: get one at its token endpoint, "
            "or send none"
        ),
    ),
    Reason.TOO_MANY_HELD: (503, "too many calls wait already"),
    Reason.DRAINING: (503, "the gateway ends: call another one, or try again"),
}


@dataclass(frozen=True, slots=True)
class Local:
    """An answer of the gateway itself."""

    status: int
    reason: Reason
    body: str
    retry_after_seconds: int | None = None
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """Its headers. `Retry-After` is in whole seconds: an HTTP date breaks some clients."""
        found = {
            "Content-Type": "application/json",
            "Cache-Control": "no-store",
            "Holdoff-Reason": str(self.reason),
            **self.more,
        }
        if self.retry_after_seconds is not None:
            found["Retry-After"] = str(self.retry_after_seconds)
        return found


def refused(reason: Reason) -> Local:
    """Refuse a request."""
    status, message = _REFUSALS[reason]
    retry = _UNKNOWN_RETRY_SECONDS if status == _AWAY else None
    challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    more = challenge if status == _UNAUTHORIZED else {}
    return Local(status, reason, _document(reason, message), retry, more)


def not_now(error: HoldoffError) -> Local:
    """Say why a call was not made: 429 where its scope has no room, else 503."""
    seconds = getattr(error, "retry_after_seconds", None)
    retry = _UNKNOWN_RETRY_SECONDS
    if seconds is not None:
        retry = max(_LEAST_RETRY_SECONDS, math.ceil(seconds))
    match error:
        case BudgetSpent():
            return Local(429, Reason.BUDGET, _document(Reason.BUDGET, str(error)), retry)
        case NoAccessToken():
            reason = Reason.NO_ACCESS_TOKEN
        case _:
            reason = Reason.COORDINATOR
    return Local(503, reason, _document(reason, str(error)), retry)


def upstream_failed(what: str) -> Local:
    """Say that the provider did not answer."""
    return Local(502, Reason.UPSTREAM, _document(Reason.UPSTREAM, f"the provider: {what}"))


def token_answer(form: Mapping[str, str], stand_ins: StandIns) -> Local:
    """Answer a request for an access token with stand-ins.

    Any code or refresh token will do: who asks has the secret of the gateway already.
    `expires_in` is a string of digits, which all clients take.
    """
    if form.get("grant_type") not in {"refresh_token", "authorization_code"}:
        body = {
            "error": "unsupported_grant_type",
            "error_description": "the gateway knows refresh_token and authorization_code",
        }
        return Local(400, Reason.GRANT_TYPE, json.dumps(body))
    body = {
        "access_token": stand_ins.issue(),
        "token_type": "bearer",
        "expires_in": str(STAND_IN_SECONDS),
        "refresh_token": stand_ins.issue(),
    }
    return Local(200, Reason.TOKEN, json.dumps(body))


def _document(reason: Reason, message: str) -> str:
    return json.dumps({"error": {"code": f"holdoff-{reason}", "message": message}})
