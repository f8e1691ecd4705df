"""Which coordinator a client speaks to, and when it goes to another one.

Both clients keep one channel. They number it as the route does, open a fresh one when the route's
number rises, and close the one before, so that all that went on there begins again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from typing import TYPE_CHECKING

import grpc

from holdoff._endpoint import Endpoint
from holdoff._platform import boottime_ns
from holdoff._status import from_rpc_error
from holdoff._timing import SECOND
from holdoff.errors import (
    Draining,
    HoldoffError,
    SchemaTooNew,
    StoreUnavailable,
    TimedOut,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPTIONS = (
    ("grpc.enable_retries", 0),  # what may be repeated is decided here
    # Each channel has connections of its own, or a fresh one would go on with those of the last.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy would read the credential, and can hardly reach a loopback address.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Find out about dead connections. gRPC takes the time limit of a ping for that of a keepalive.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # without a limit: a holder sends little
)
_SHUFFLED = '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'

MOST_SILENCES = 2
"""So many calls in a row without an answer, and another coordinator is looked for."""
MOST_MOVES = 6
"""So many fresh channels may be opened in a row; then one for each pause."""
MOVE_PAUSE_SECONDS = 5.0
_TRIES_OF_A_NAME = 3
"""How many addresses a name may have is not known here."""
_OF_NO_USE = (StoreUnavailable, SchemaTooNew, Draining)


class Route:
    """The way to a coordinator; any thread may use it.

    Args:
        endpoint: Where the coordinators are.
        random_: Says with which of several addresses to begin.

    Raises:
        ValueError: That is no endpoint.
    """

    def __init__(self, endpoint: str, random_: Callable[[], float] = random.random) -> None:
        self.endpoint = endpoint
        self.number = 0
        """Of the channel to use."""
        self.closed = False
        """The client was closed."""
        self._where = Endpoint.parse(endpoint)
        self._first = int(random_() * len(self._where.addresses))
        self._lock = threading.Lock()
        self._silences = 0
        self._is_proven = False
        self._moves_left = float(MOST_MOVES)
        self._counted_ns = 0

    @property
    def tries(self) -> int:
        """At how many coordinators to try a call that is made once."""
        return _TRIES_OF_A_NAME if self._where.is_name else max(2, len(self._where.addresses))

    def target(self, number: int) -> str:
        """Return where the channel of a number goes; each begins with another address."""
        return self._where.target((self._first + number) % len(self._where.addresses))

    def options(self) -> list[tuple[str, int | str]]:
        """Return the channel's options."""
        options: list[tuple[str, int | str]] = list(_OPTIONS)
        if self._where.is_name:
            # gRPC looks the name up, so the order is left to it.
            options.append(("grpc.service_config", _SHUFFLED))
        if authority := self._where.authority:
            options.append(("grpc.default_authority", authority))
        return options

    def answered(self, number: int) -> None:
        """Take in that something came through a channel."""
        with self._lock:
            if number == self.number:
                self._silences, self._is_proven = 0, True

    def failed(self, number: int, error: HoldoffError, now_ns: int) -> None:
        """Take in that a call through a channel failed, and perhaps go to another coordinator.

        That is when the connection broke, or the coordinator says that it cannot serve now; a
        time-out counts when it is the second in a row, or nothing ever came through the channel.
        """
        if not isinstance(error, Unavailable) or (
            error.reason and not isinstance(error, _OF_NO_USE)
        ):
            self.answered(number)
            return
        with self._lock:
            if number != self.number:
                return
            if isinstance(error, TimedOut):
                self._silences += 1
                if self._is_proven and self._silences < MOST_SILENCES:
                    return
            self._move(now_ns)

    def _move(self, now_ns: int) -> None:
        """Go on to the next coordinator, unless all were tried not long ago."""
        since_seconds = (now_ns - self._counted_ns) / SECOND
        self._counted_ns = now_ns
        left = self._moves_left + since_seconds / MOVE_PAUSE_SECONDS
        self._moves_left = min(left, float(MOST_MOVES))
        if self._moves_left >= 1:
            self._moves_left -= 1
            self.number += 1
            self._silences, self._is_proven = 0, False

    def is_worth_another_try(self, number: int, error: Unavailable, tries_left: int) -> bool:
        """Whether a call that failed on a channel may do better, at once, on the one after it."""
        return number != self.number and not isinstance(error, TimedOut) and tries_left > 0

    @contextlib.contextmanager
    def watched(self, number: int) -> Iterator[None]:
        """Turn what gRPC raises into our errors, and take in that a call failed."""
        try:
            yield
        except HoldoffError as error:
            self.failed(number, error, boottime_ns())
            raise
        except grpc.RpcError as error:
            raise self._learned(number, from_rpc_error(error, self.endpoint)) from None
        except (ValueError, asyncio.InvalidStateError, grpc.aio.BaseError) as error:
            # So gRPC refuses to use a channel that another call closed, and a call that broke.
            if isinstance(error, ValueError) and number == self.number and not self.closed:
                raise
            raise self._learned(number, Unavailable(f"the connection broke: {error}")) from None
        except asyncio.CancelledError:
            # It is what gRPC raises, too, when a channel was closed, or broke, under a call.
            if _is_cancelled():
                raise
            raise self._learned(number, Unavailable("the connection broke")) from None

    def _learned(self, number: int, error: HoldoffError) -> HoldoffError:
        if self.closed:
            return HoldoffError("the client was closed during a call")
        self.failed(number, error, boottime_ns())
        return error

    def check(self) -> None:
        """Raise HoldoffError if the client was closed."""
        if self.closed:
            raise HoldoffError("the client is closed")


def _is_cancelled() -> bool:
    """Whether the current task was cancelled."""
    # Not in the frame of the error, which the task will hold: both would be kept alive.
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
