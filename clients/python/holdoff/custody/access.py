"""What is known of an access token from its stream, and for how long it may be used.

Both clients keep it. No sockets and threads (sans-I/O).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from holdoff._core import Listening
from holdoff._log import log
from holdoff._platform import boottime_ns
from holdoff._text import printable
from holdoff.errors import HoldoffError, NoAccessToken
from holdoff.v1 import custody_service_pb2, grant_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

_DRIFT: Final = 500e-6  # what NTP may slew at most: 500 ppm
_STATES = grant_pb2.GrantState


@dataclass(frozen=True, slots=True)
class Usable:
    """An access token, and until when calls may begin with it."""

    access_token: str = field(repr=False)
    generation: int
    until_ns: int
    """No call begins with it from then on (CLOCK_BOOTTIME)."""
    api_hosts: tuple[str, ...]
    """Hosts that it may be sent to."""


@dataclass(slots=True)
class Access(Listening[custody_service_pb2.GetAccessTokenResponse]):
    """The stream of one access token, over as many connections as it takes."""

    token: str
    clock: Callable[[], int] = boottime_ns
    status: grant_pb2.GrantStatus | None = field(init=False, default=None)
    """What the coordinator said last; None before the first time."""
    final: HoldoffError | None = field(init=False, default=None)
    """Why the stream has ended for good."""
    _trouble: HoldoffError | None = field(init=False, default=None)
    """Why the last connection ended, until a response comes."""
    _last: Usable | None = field(init=False, default=None)
    _opened_ns: int = field(init=False, default=0)
    _sealed_copy: bytes = field(init=False, default=b"", repr=False)
    """What to give back to a coordinator, whose store may have lost it."""

    def request(self) -> custody_service_pb2.GetAccessTokenRequest:
        """What to send on a new connection."""
        self._opened_ns = self.clock()
        return custody_service_pb2.GetAccessTokenRequest(
            name=f"{self.token}/grant", sealed_copy=self._sealed_copy
        )

    def received(
        self, response: custody_service_pb2.GetAccessTokenResponse
    ) -> custody_service_pb2.GetAccessTokenResponse:
        """Take in a message; return it."""
        self._failures, self._trouble = 0, None
        if response.HasField("access_token"):
            self._take(response.access_token, response.stream_age.ToNanoseconds())
        elif not response.has_access_token:
            self._last = None
        self.status = response.status
        return response

    def failed(self, error: HoldoffError) -> float:
        """Return after how many seconds to connect again; there is no limit.

        Raises:
            HoldoffError: The error, if it is final.
        """
        self._trouble = error
        return Listening.failed(self, error)

    def _take(self, given: grant_pb2.AccessToken, age_ns: int) -> None:
        """Keep an access token.

        Its time counts from when it was sent, as far as that is known: a response may have been
        delayed, as while this machine was suspended. The two boot clocks may drift apart.
        """
        self._sealed_copy = given.sealed_copy or self._sealed_copy
        if not (given.access_token.isascii() and given.access_token.isprintable()):
            log.warning("ignored an access token of %s that no HTTP header can have", self.token)
            self._last = None
            return
        sent_ns = min(self.clock(), self._opened_ns + age_ns + round(age_ns * _DRIFT))
        usable_ns = given.remaining.ToNanoseconds() - given.early_margin.ToNanoseconds()
        until_ns = sent_ns + usable_ns
        last = self._last
        if last and last.access_token == given.access_token:
            until_ns = min(until_ns, last.until_ns)
        self._last = Usable(given.access_token, given.generation, until_ns, tuple(given.api_hosts))

    def ended(self, error: HoldoffError) -> None:
        """The stream has ended for good: what was handed out may have been revoked."""
        self.final, self._last = error, None

    def usable(self, newer_than: int = 0) -> Usable | None:
        """Return the access token if calls may begin with it now.

        Args:
            newer_than: Only one of a later generation.

        Raises:
            HoldoffError: The stream has ended for good.
        """
        if self.final:
            raise self.final
        last = self._last
        if last is None or last.generation <= newer_than:
            return None
        return last if self.clock() < last.until_ns else None

    def must_wait(self, *, is_over: bool) -> None:
        """Raise if it makes no sense to wait any longer for an access token.

        Args:
            is_over: The time of the wait has passed.

        Raises:
            NoAccessToken: It does not.
            Unavailable: No coordinator answers.
        """
        status = self.status
        if status is None:
            if is_over and self._trouble:
                raise self._trouble
            if is_over:
                raise NoAccessToken(f"no answer about the access token of {self.token} came yet")
            return
        state = _STATES.DESCRIPTOR.values_by_number.get(status.state)
        word = state.name.removeprefix("GRANT_STATE_") if state else str(status.state)
        if not is_over and word not in NoAccessToken.LASTING:
            return
        why = status.message
        if status.state == _STATES.GRANT_STATE_READY:
            why = "none came from the coordinator yet, and the last one is too old"
        seconds = None
        if status.HasField("until_time"):
            seconds = max(0.0, status.until_time.ToNanoseconds() / 1e9 - time.time())
        raise NoAccessToken(
            f"there is no access token of {self.token}: {printable(why)}",
            metadata={"state": word},
            retry_after_seconds=seconds,
        )
