"""The outcomes of a request to a token URL: facts, without their meaning.

All instants are µs of the boot clock (CLOCK_BOOTTIME) of the machine that sent the request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

TYPE_CHECKING = False  # `typing` would cost the sender time
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime_us() -> int:
    """Read the clock that is never set and also counts while the machine is suspended."""
    return time.clock_gettime_ns(_CLOCK) // 1000


class Failure(StrEnum):
    """What went wrong."""

    REQUEST = "request"
    """The request cannot be expressed in HTTP/1.1, or is too large."""
    RESOLVE = "resolve"
    """The host has no address."""
    ADDRESS = "address"
    """Every address of the host is refused."""
    CONNECT = "connect"
    TLS = "tls"
    SPOOL = "spool"
    """The spool cannot take the answer."""
    ABANDONED = "abandoned"
    """The coordinator withdrew the request, or ended."""
    DEADLINE = "deadline"
    """The instant passed until which the request might be sent."""
    TIMEOUT = "time-out"
    CLOSED = "closed"
    """The provider ended the connection."""
    RESET = "reset"
    HTTP = "http"
    """What came is no HTTP/1.1."""
    TOO_LARGE = "too large"
    SENDER = "sender"
    """The sending process ended or does not report."""


@dataclass(frozen=True, slots=True)
class Received:
    """An HTTP answer, or the part of one that was received."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    """Names in lower case; without cookies."""
    body: bytes | bytearray = field(repr=False)


@dataclass(frozen=True, slots=True)
class NotSent:
    """No byte of the request left this machine."""

    why: Failure
    detail: str
    """For people; contains no secret."""


@dataclass(frozen=True, slots=True)
class NoProof:
    """The request was sent, or may have been, and no whole answer came."""

    why: Failure
    detail: str
    """For people; contains no secret."""
    sent_us: int | None
    """Just before it was sent; None where that was not reported."""
    ended_us: int
    """When the connection was reset, or the wait for the sender ended."""
    received: Received | None = None
    """What came of an answer, if at least its status and headers did."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A whole answer came."""

    received: Received
    sent_us: int
    """Just before the request was sent."""
    last_byte_us: int
    """Just after the last byte was received."""


Outcome = NotSent | NoProof | Answered


def is_mute(outcome: Outcome) -> bool:
    """Tell whether the sender did not report: it may still receive an answer."""
    return isinstance(outcome, NoProof) and outcome.why is Failure.SENDER


def document(outcome: Outcome) -> dict[str, Any]:
    """Express an outcome in JSON, except for the body."""
    fields = {
        name: getattr(outcome, name)
        for name in outcome.__slots__
        if name not in ("received", "why")
    }
    if not isinstance(outcome, Answered):
        fields["why"] = outcome.why.value
    received = body_holder(outcome)
    if received is not None:
        fields |= {"status": received.status, "headers": dict(received.headers)}
    return {type(outcome).__name__: fields}


def parse(message: Mapping[str, Any], body: bytes | bytearray) -> Outcome:
    """Read what `document` made, and the body."""
    ((kind, found),) = message.items()
    fields = dict(found)
    received = None
    if "status" in fields:
        received = Received(fields.pop("status"), fields.pop("headers"), body)
    if kind == "Answered":
        if received is None:
            raise ValueError("an answer without a status")
        return Answered(received, **fields)
    fields["why"] = Failure(fields["why"])
    return NotSent(**fields) if kind == "NotSent" else NoProof(**fields, received=received)


def body_holder(outcome: Outcome) -> Received | None:
    """Return what holds the body of an outcome that has one."""
    return None if isinstance(outcome, NotSent) else outcome.received
