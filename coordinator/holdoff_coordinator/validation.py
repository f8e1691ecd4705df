"""Checks of what callers send. Pure; each raises a `Failure` that names the field."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from holdoff.names import AppName, LeaseName, TokenName
from holdoff_coordinator.failures import Failure, invalid

if TYPE_CHECKING:
    from google.protobuf import duration_pb2

    from holdoff.v1 import lease_pb2

LEAST_TTL_US = 1_000_000
MOST_TTL_US = 24 * 3600 * 1_000_000
MOST_DURATION_US = 366 * 24 * 3600 * 1_000_000
MOST_REASON_CHARACTERS = 200
MOST_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
UUID_VERSION = 4
_HOLDER_LIMITS = {"host": 255, "user": 100, "job": 100, "client_version": 100}


def token_name(field: str, text: str) -> TokenName:
    """Parse a token's name."""
    try:
        return TokenName.parse(text)
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
        return TokenName.parse(text) if "/tokens/" in text else AppName.parse(text)
    except ValueError as error:
        raise invalid("parent", str(error)) from None


def page_size(value: int) -> int:
    """Check a page size; 0 means the default."""
    if value < 0:
        raise invalid("page_size", "write 0 for the default, or up to 1000")
    return min(value or DEFAULT_PAGE_SIZE, MOST_PAGE_SIZE)


def page_token(text: str) -> tuple[str, str] | None:
    """Read where a listing goes on: after this (app, token); None at its beginning."""
    if not text:
        return None
    name = token_name("page_token", text)
    return name.app, name.token


def microseconds(field: str, value: duration_pb2.Duration, most_us: int = MOST_DURATION_US) -> int:
    """Read a Duration of zero up to `most_us`."""
    try:
        value.ToJsonString()  # checks the ranges and signs that protobuf promises
        result = value.ToMicroseconds()
    except ValueError:
        raise invalid(field, "is not a valid Duration") from None
    if not 0 <= result <= most_us:
        raise invalid(field, f"must be from 0 to {most_us // 1_000_000} s")
    return result


def ttl_us(value: duration_pb2.Duration) -> int:
    """Read a TTL: 1 s to 24 h."""
    result = microseconds("ttl", value)
    if not LEAST_TTL_US <= result <= MOST_TTL_US:
        raise invalid("ttl", "must be from 1 s to 24 h")
    return result


def request_id(text: str) -> str:
    """Check that a request id is a UUID of version 4 in its usual form."""
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != text or parsed.version != UUID_VERSION:
        raise invalid("request_id", "must be a random UUID (version 4), in lower case with hyphens")
    return text


def printable(field: str, text: str, most: int) -> str:
    """Check a text for people: no control characters, not too long."""
    if len(text) > most:
        raise invalid(field, f"must be at most {most} characters")
    if not text.isprintable():
        raise invalid(field, "must have no control characters")
    return text


def holder(value: lease_pb2.Holder) -> lease_pb2.Holder:
    """Check who a caller says it is, and drop what we don't know."""
    value.DiscardUnknownFields()
    for field, most in _HOLDER_LIMITS.items():
        printable(f"holder.{field}", getattr(value, field), most)
    return value


def secret(text: str) -> str:
    """Check the form of a secret only, so that an absurd one costs nothing."""
    if not text or len(text) > 128 or not text.isascii():  # noqa: PLR2004 - ours has 64
        raise Failure("WRONG_SECRET", "the secret is not that of this lease")
    return text
