"""Checks of what callers send. Pure; each raises a `Failure` that names the field."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

from holdoff._text import quoted
from holdoff.durations import format_duration
from holdoff.names import AppName, BackOffName, BudgetName, GrantName, LeaseName, TokenName
from holdoff_coordinator.failures import Failure, invalid

if TYPE_CHECKING:
    from google.protobuf import duration_pb2, timestamp_pb2

    from holdoff.v1 import budget_pb2, lease_pb2

LEAST_TTL_US = 1_000_000
MOST_TTL_US = 24 * 3600 * 1_000_000
MOST_DURATION_US = 366 * 24 * 3600 * 1_000_000
MOST_REASON_CHARACTERS = 200
MOST_ENDPOINT_CHARACTERS = 2000
MOST_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
UUID_VERSION = 4
MOST_DIVISION_CHARACTERS = 100
HOLDER_LIMITS = {"host": 255, "user": 100, "job": 100, "client_version": 100}
MOST_LABELS = 16
_MOST_LABEL_CHARACTERS = 200
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")


def app_name(field: str, text: str) -> AppName:
    """Parse an app's name."""
    try:
        return AppName.parse(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def budget_name(field: str, text: str) -> BudgetName:
    """Parse a budget's name."""
    try:
        return BudgetName.parse(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def back_off_name(field: str, text: str) -> BackOffName:
    """Parse a back-off's name."""
    try:
        return BackOffName.parse(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def token_name(field: str, text: str) -> TokenName:
    """Parse a token's name."""
    try:
        return TokenName.parse(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def grant_name(field: str, text: str) -> GrantName:
    """Parse a grant's name."""
    try:
        return GrantName.parse(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def lease_name(field: str, text: str) -> LeaseName:
    """Parse a lease's name."""
    try:
        return LeaseName.parse(text)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def parent(text: str) -> AppName | TokenName | None:
    """Parse the parent of a listing: '' (all), an app or a token."""
    if not text:
        return None
    try:
        return TokenName.parse(text) if text.count("/") > 1 else AppName.parse(text)
    except ValueError as error:
        raise invalid("parent", f"{error}; or leave it out, for all") from None


def app_parent(text: str, field: str = "parent") -> AppName | None:
    """Parse which apps a listing is of: '' (all) or one."""
    try:
        return AppName.parse(text) if text else None
    except ValueError as error:
        raise invalid(field, f"{error}; or leave it out, for all") from None


def page_size(value: int) -> int:
    """Check a page size; 0 means the default."""
    if value < 0:
        raise invalid("page_size", "write 0 for the default, or up to 1000")
    return min(value or DEFAULT_PAGE_SIZE, MOST_PAGE_SIZE)


def page_token(text: str) -> tuple[str, str] | None:
    """Read where a listing goes on: after this (app, token); None at its beginning."""
    if not text:
        return None
    try:
        name = TokenName.parse(text)
    except ValueError:
        raise unknown_page_token(text) from None
    return name.app, name.token


def unknown_page_token(text: str) -> Failure:
    """Say that a page token is not one that we gave."""
    return invalid(
        "page_token",
        f"{quoted(text)} is none of ours: write the next_page_token of the page before, "
        "or leave it out to begin",
    )


def microseconds(
    field: str,
    value: duration_pb2.Duration,
    most_us: int = MOST_DURATION_US,
    *,
    least_us: int = 0,
) -> int:
    """Read a Duration of `least_us` up to `most_us`."""
    try:
        value.ToJsonString()  # checks the ranges and signs that protobuf promises
    except ValueError:
        raise invalid(
            field,
            "is not a valid Duration: nanos must be from 0 to 999999999, with the sign of seconds",
        ) from None
    result = value.ToMicroseconds()
    # A negative time below a microsecond would become zero, which may mean something.
    if value.nanos < 0 or not least_us <= result <= most_us:
        limits = [format_duration(limit_us / 1e6) for limit_us in (least_us, most_us)]
        raise invalid(field, f"must be from {limits[0]} to {limits[1]}")
    return result


def timestamp_us(field: str, value: timestamp_pb2.Timestamp) -> int:
    """Read a Timestamp."""
    try:
        value.ToJsonString()  # checks the ranges that protobuf promises
    except ValueError:
        raise invalid(field, "is not a valid Timestamp: the years 1 to 9999") from None
    return value.ToMicroseconds()


def ttl_us(value: duration_pb2.Duration) -> int:
    """Read a TTL: 1 s to 24 h."""
    return microseconds("ttl", value, MOST_TTL_US, least_us=LEAST_TTL_US)


def request_id(text: str, field: str = "request_id") -> str:
    """Check that an id is a UUID of version 4 in its usual form."""
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != text or parsed.version != UUID_VERSION:
        raise invalid(
            field,
            "must be a random UUID (version 4), in lower case with hyphens, and a new one for each "
            f"{'request' if field == 'request_id' else 'event'}",
        )
    return text


def printable(field: str, text: str, most: int) -> str:
    """Check a text for people: no control characters, not too long."""
    if len(text) > most:
        raise invalid(field, f"must be at most {most} characters")
    if not text.isprintable():
        raise invalid(
            field, "must be one line of printable characters: no control or format characters"
        )
    return text


def oauth(field: str, text: str, most: int) -> str:
    """Check a client id or a secret of OAuth (RFC 6749, appendix A), and never repeat it."""
    if not 1 <= len(text) <= most or not (text.isascii() and text.isprintable()):
        raise invalid(field, f"must be 1 to {most} printable ASCII characters")
    return text


def reason(text: str) -> str:
    """Check why an operator does something."""
    printable("reason", text, MOST_REASON_CHARACTERS)
    if not text.strip():
        raise invalid("reason", "give a reason: it is shown to those affected")
    return text


def holder(value: lease_pb2.Holder) -> lease_pb2.Holder:
    """Check who a caller says it is, and drop what we don't know."""
    value.DiscardUnknownFields()
    for field, most in HOLDER_LIMITS.items():
        printable(f"holder.{field}", getattr(value, field), most)
    if value.pid < 0:
        raise invalid("holder.pid", "must not be negative; leave it out if there is none")
    for key, text in value.labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise invalid(
                "holder.labels",
                f"{quoted(key)} is not a key: write 1 to 63 characters of a-z, 0-9, '.', '_', '/' "
                "and '-', with a letter or digit at both ends",
            )
        printable(f"holder.labels.{key}", text, _MOST_LABEL_CHARACTERS)
    return value


def place(field: str, scope: budget_pb2.Scope) -> None:
    """Check the division and the endpoint of a scope."""
    printable(f"{field}.division", scope.division, MOST_DIVISION_CHARACTERS)
    printable(f"{field}.endpoint", scope.endpoint, MOST_ENDPOINT_CHARACTERS)


def secret(text: str) -> str:
    """Check the form of a secret only, so that an absurd one costs nothing."""
    if not text or len(text) > 128 or not text.isascii():  # noqa: PLR2004 - ours has 64
        raise Failure(
            "WRONG_SECRET", "the secret is not that of this lease: send the one that its offer had"
        )
    return text
