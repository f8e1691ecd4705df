"""What an answer of a token URL proves. Pure.

Only these prove that nothing was issued: a request that was not sent, status 429, an error of
OAuth (RFC 6749, section 5.2), and status 503 where the policy says so. An access token proves that
one was. Everything else proves nothing: a time-out, a reset, 302, 5xx, a page with status 200.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TOKEN_CHARACTERS: Final = 16_384
MOST_SECONDS: Final = 366 * 24 * 3600
_OK, _TOO_MANY, _UNAVAILABLE = 200, 429, 503
_REFUSING: Final = range(400, 500)


class Refusal(StrEnum):
    """Why nothing was issued."""

    TOO_EARLY = "too early"
    """The interval has not passed, as the provider counts it."""
    DEAD = "dead"
    """The refresh token is used, revoked or expired."""
    CLIENT = "client"
    """The client id, its secret, or the way to authenticate is wrong."""
    BUSY = "busy"
    """The provider throttles, or is away."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray = field(repr=False)


@dataclass(frozen=True, slots=True)
class Issued:
    """An access token was issued."""

    access_token: str = field(repr=False)
    life_seconds: float | None
    """As the provider says; None where it does not."""
    refresh_token: str = field(repr=False)
    """The one to use next; empty where the old one stays."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was issued."""

    why: Refusal
    error: str
    """The provider's code, such as `invalid_grant`, or the HTTP status."""
    refresh_token: str = field(default="", repr=False)
    """A refused answer may still rotate the refresh token (`domain.md`, quirks)."""


@dataclass(frozen=True, slots=True)
class NotSent:
    """Nothing left this machine."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unproven:
    """An access token may have been issued."""

    reason: str
    refresh_token: str = field(default="", repr=False)
    """An answer without an access token may still rotate the refresh token."""


Verdict = Issued | Refused | NotSent | Unproven


@dataclass(frozen=True, slots=True)
class Reading:
    """How a provider words its refusals, by its policy."""

    unavailable_is_proof: bool = False
    """Whether status 503 proves that nothing was issued."""
    too_early: tuple[tuple[str, str], ...] = ()
    """Pairs of an error code and a text in its description, both in lower case."""
    dead: tuple[tuple[str, str], ...] = ()


def judge(answer: Answer, reading: Reading) -> Issued | Refused | Unproven:
    """Tell what an answer proves."""
    document = _document(answer.body)
    if answer.status == _OK:
        return _issued(document)
    rotated = _token(document, "refresh_token")
    if answer.status == _TOO_MANY:
        return Refused(Refusal.BUSY, "HTTP 429", rotated)
    if answer.status == _UNAVAILABLE and reading.unavailable_is_proof:
        return Refused(Refusal.BUSY, "HTTP 503", rotated)
    error = document.get("error")
    if answer.status in _REFUSING and isinstance(error, str) and error:
        return Refused(_why(error, document, reading), _short(error), rotated)
    return Unproven(f"HTTP {answer.status}, which does not say whether a token was issued", rotated)


def _issued(document: Mapping[str, Any]) -> Issued | Unproven:
    access_token = _token(document, "access_token")
    rotated = _token(document, "refresh_token")
    if not access_token:
        return Unproven("HTTP 200 without an access token", rotated)
    return Issued(access_token, _seconds(document.get("expires_in")), rotated)


def _why(error: str, document: Mapping[str, Any], reading: Reading) -> Refusal:
    described = document.get("error_description")
    description = described.casefold() if isinstance(described, str) else ""
    code = error.casefold()
    if any(code == one and text in description for one, text in reading.too_early):
        return Refusal.TOO_EARLY
    if code == "invalid_grant" or any(
        code == one and text in description for one, text in reading.dead
    ):
        return Refusal.DEAD
    return Refusal.CLIENT if code == "invalid_client" else Refusal.OTHER


def _document(body: bytes | bytearray) -> Mapping[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _token(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    fits = isinstance(value, str) and len(value) <= MOST_TOKEN_CHARACTERS and value.isprintable()
    return value if fits and isinstance(value, str) else ""


def _seconds(value: object) -> float | None:
    """Read `expires_in`: a number, or a string of digits (`domain.md`)."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:  # noqa: PLR2004
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value <= MOST_SECONDS else None


def _short(text: str) -> str:
    return "".join(filter(str.isprintable, text))[:64]
