"""The client's decisions, without sockets, threads or clocks (sans-I/O).

Times are nanoseconds of one clock that never jumps and counts suspended time; the shells read
it and hand it in.
"""

from __future__ import annotations

import getpass
import os
import random
import socket
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from google.protobuf import duration_pb2

from holdoff._status import from_status
from holdoff._text import MOST_JOB_CHARACTERS, MOST_LABEL_CHARACTERS, described
from holdoff._timing import MOST_WAIT_SECONDS, SECOND, Timing
from holdoff._version import VERSION
from holdoff.errors import (
    BudgetSpent,
    HoldoffError,
    InvalidRequest,
    LeaseLost,
    LimitReached,
    TimedOut,
    Unavailable,
    UnexpectedError,
)
from holdoff.v1 import budget_pb2, budget_service_pb2, lease_pb2, lease_service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ResponseT = TypeVar("ResponseT")
KnownT = TypeVar("KnownT", budget_pb2.Budget, budget_pb2.BackOff)

HEARTBEAT_SECONDS = 1.5
"""A waiter is passed over after 5 s of silence; this leaves room for two lost heartbeats."""
NO_WAIT_SECONDS = 3.5
"""How long a request that does not wait tries to reach a coordinator."""
GRACE_FOR_ANSWER_SECONDS = 0.5
"""The coordinator ends a wait at its limit; its answer is on the way then."""
FIRST_RETRY_SECONDS = 0.1
MOST_RETRY_SECONDS = 1.0
"""So short that a waiter is back, after a restart, before it is passed over."""
WITHDRAWAL_SECONDS = 1.0
"""How long one who gives up its place waits for the coordinator to hear of it."""
RELEASE_SECONDS = 10.0
"""How long a release is tried while the coordinator is away; then the lease runs out."""
REPORT_SECONDS = 5.0
"""How long a report of what happened at the provider is tried while the coordinator is away."""
KEPT_SECONDS = 300.0
"""How long events are kept that were counted, in case the store loses them."""
MOST_KEPT = 5000
"""So many are kept of an app; of more, the oldest are left out."""
MOST_ROOM_RETRY_SECONDS = 5.0
"""Room may come back at any time, when another caller's call ends without an error."""
LONGEST_SLEEP_SECONDS = 1.0
"""Sleeps are short, since a wait on the monotonic clock sleeps through a suspend."""


def retry_delay_seconds(attempt: int, random_: Callable[[], float] = random.random) -> float:
    """Exponential back-off with jitter, from 0.1 s to 1 s, for attempts from 0.

    Full jitter over the upper half, so that many clients don't come back as one.
    """
    most: float = min(MOST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(attempt, 10))
    return most * (0.5 + random_() / 2)


def here(job: str = "", labels: Mapping[str, str] | None = None) -> lease_pb2.Holder:
    """Describe this process as a holder, whatever its surroundings call it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry for our uid, as in many containers
        user = str(os.getuid())
    return lease_pb2.Holder(
        host=described(socket.gethostname(), 255),
        pid=os.getpid(),
        user=described(user, 100),
        job=described(job, MOST_JOB_CHARACTERS),
        client_version=f"holdoff/{VERSION}",
        labels={
            key: described(text, MOST_LABEL_CHARACTERS) for key, text in (labels or {}).items()
        },
    )


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a Duration, to the microsecond."""
    message = duration_pb2.Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with a call that is unavailable, and how long to pause in between."""

    until_ns: int
    pause_seconds: float

    def failed(self, error: HoldoffError, now_ns: int) -> float:
        """Return after how many seconds to call again.

        Raises:
            HoldoffError: The error, if it is final or the patience is at its end.
        """
        if not isinstance(error, Unavailable) or now_ns >= self.until_ns:
            raise error
        return self.pause_seconds


def acceptance_patience(offer: lease_service_pb2.LeaseOffer, now_ns: int) -> Patience:
    """How long to try to accept an offer: as long as it stands, and a second for the answer."""
    stands_ns = offer.accept_within.ToNanoseconds()
    return Patience(until_ns=now_ns + stands_ns + SECOND, pause_seconds=0.05)


def report_patience(now_ns: int) -> Patience:
    """How long to try to report what happened; a report that arrives late counts from then."""
    return Patience(until_ns=now_ns + round(REPORT_SECONDS * SECOND), pause_seconds=0.2)


def withdrawal_patience(now_ns: int) -> Patience:
    """How long to try to give back what may have been granted."""
    return Patience(until_ns=now_ns + round(WITHDRAWAL_SECONDS * SECOND), pause_seconds=0.05)


class Counted:
    """Events that were counted recently, to be sent again if the store loses them.

    Ids tell it what it still has, so that each counts once. Any thread may use it.
    """

    def __init__(self) -> None:
        self._lives: dict[str, str] = {}
        self._kept: dict[str, deque[tuple[int, bytes]]] = {}

    def keep(self, events: Sequence[budget_pb2.Event], sent_ns: int) -> None:
        """Keep events of one app that were counted."""
        kept = self._kept.setdefault(_app_of(events), deque(maxlen=MOST_KEPT))
        kept.extend((sent_ns, event.SerializeToString()) for event in events)

    def lost(
        self, events: Sequence[budget_pb2.Event], life: str, now_ns: int
    ) -> list[list[budget_pb2.Event]]:
        """Return what the app's store may have lost, by token; each event as old as it is now.

        Args:
            events: They were counted just now.
            life: The `store_life` of the answer.
            now_ns: The clock.
        """
        app = _app_of(events)
        if life in ("", self._lives.setdefault(app, life) or life):
            return []
        found: dict[str, list[budget_pb2.Event]] = {}
        for sent_ns, text in list(self._kept.get(app, ())):
            if now_ns - sent_ns <= KEPT_SECONDS * SECOND:
                event = budget_pb2.Event.FromString(text)
                _grow_older(event, now_ns - sent_ns)
                found.setdefault(event.scope.token, []).append(event)
        return list(found.values())

    def learned(self, events: Sequence[budget_pb2.Event], life: str) -> None:
        """Take the life for known: what may have been lost with the one before is sent again."""
        if life:
            self._lives[_app_of(events)] = life


def _app_of(events: Sequence[budget_pb2.Event]) -> str:
    scope = events[0].scope
    return scope.token.partition("/tokens/")[0] or scope.app


def _grow_older(event: budget_pb2.Event, by_ns: int) -> None:
    event.age.FromNanoseconds(event.age.ToNanoseconds() + by_ns)
    if event.HasField("sent_age"):
        event.sent_age.FromNanoseconds(event.sent_age.ToNanoseconds() + by_ns)


@dataclass(slots=True)
class Reserving:
    """One wish for room before a call, over as many requests as it takes."""

    request: budget_service_pb2.ReserveRequest
    """What to send: always with the same id, so that it takes room once."""
    wait_seconds: float
    began_ns: int
    _refusals: int = 0
    _failures: int = 0

    def __post_init__(self) -> None:
        self.request.reservation_id = str(uuid.uuid4())

    def received(self, reservation: budget_pb2.Reservation) -> budget_pb2.Reservation:
        """Take in an answer.

        Raises:
            Unavailable: The reservation was made by an earlier request, of which nothing was
                heard, and has run out since; another one is asked for.
        """
        if reservation.state == budget_pb2.RESERVATION_STATE_RESERVED:
            return reservation
        self.request.reservation_id = str(uuid.uuid4())
        raise Unavailable("the reservation ran out before its answer arrived")

    def failed(self, error: HoldoffError, now_ns: int) -> float:
        """Return after how many seconds to ask again.

        Raises:
            HoldoffError: The error, if it is final or the wait is over.
        """
        waited_seconds = (now_ns - self.began_ns) / SECOND
        if isinstance(error, BudgetSpent):
            left = self.wait_seconds - waited_seconds
            # When there will be room *if nothing else happens*: look now and then, sooner.
            delay = min(
                error.retry_after_seconds or MOST_ROOM_RETRY_SECONDS,
                MOST_ROOM_RETRY_SECONDS * retry_delay_seconds(self._refusals),
            )
            self._refusals += 1
        elif isinstance(error, Unavailable):
            left = max(self.wait_seconds, NO_WAIT_SECONDS) - waited_seconds
            delay = error.retry_after_seconds or retry_delay_seconds(self._failures)
            self._failures += 1
        else:
            raise error
        if left <= 0:
            raise error
        return min(delay, left)

    @staticmethod
    def may_stand(error: BaseException) -> bool:
        """Whether room may have been taken although the attempt ended with this error."""
        return isinstance(error, Unavailable) or not isinstance(error, HoldoffError)


@dataclass(slots=True)
class Acquisition:
    """One request for a lease, over as many connections as it takes."""

    token: str
    ttl_seconds: float
    wait_seconds: float | None
    holder: lease_pb2.Holder
    last_fencing_token: int
    began_ns: int
    scopes: Sequence[tuple[str, str]] = ()
    """Where the job will call: pairs of a division and an endpoint."""
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    _failures: int = 0
    _limit: str = ""
    """What the last error said, if it was a limit; the error itself would keep frames alive."""

    def __post_init__(self) -> None:
        if self.wait_seconds is not None and not self.wait_seconds <= MOST_WAIT_SECONDS:
            raise InvalidRequest("wait_seconds is at most 366 days; None waits without limit")

    def request(self, now_ns: int) -> lease_service_pb2.AcquireLeaseRequest:
        """What to send on a new connection: the wait that is left, and the rest as before."""
        left = self.wait_left_seconds(now_ns)
        return lease_service_pb2.AcquireLeaseRequest(
            token=self.token,
            request_id=self.request_id,
            wait=None if left is None else duration(left),
            ttl=duration(self.ttl_seconds),
            holder=self.holder,
            last_fencing_token=self.last_fencing_token,
            scopes=[
                budget_pb2.Scope(division=division, endpoint=endpoint)
                for division, endpoint in self.scopes
            ],
        )

    def wait_left_seconds(self, now_ns: int) -> float | None:
        """Time left of the wait; None without limit."""
        if self.wait_seconds is None:
            return None
        return max(0.0, self.wait_seconds - (now_ns - self.began_ns) / SECOND)

    def _patience_seconds(self, now_ns: int) -> float:
        """How long to go on trying; a request that does not wait tries for some seconds too."""
        most = self.wait_seconds or NO_WAIT_SECONDS
        return most + GRACE_FOR_ANSWER_SECONDS - (now_ns - self.began_ns) / SECOND

    def stream_timeout_seconds(self, now_ns: int) -> float | None:
        """How long one connection may take; the coordinator itself ends a wait in time.

        It bounds a coordinator that accepts connections and is mute. Without a limit of the wait
        keepalive alone finds that out.
        """
        if self.wait_seconds is None:
            return None
        return max(0.1, self._patience_seconds(now_ns))

    def received(
        self, event: lease_service_pb2.AcquireLeaseResponse
    ) -> lease_pb2.WaitStatus | lease_service_pb2.LeaseOffer:
        """Take in an event.

        Raises:
            HoldoffError: The request failed; `failed` says whether to go on.
        """
        self._failures = 0
        match event.WhichOneof("event"):
            case "waiting":
                return event.waiting
            case "offer":
                return event.offer
            case "error":
                raise from_status(event.error)
            case _:
                raise HoldoffError("the coordinator sent an event that this client does not know")

    def failed(self, error: HoldoffError, now_ns: int) -> float:
        """Return after how many seconds to connect again, with the same request id.

        A lease that was lost before we had it is asked for anew.

        Raises:
            HoldoffError: The error, if it is final or the wait is over. If the wait ended in the
                middle of a call, and the coordinator had just refused one because of a limit, that
                limit is the reason.
        """
        if isinstance(error, LeaseLost):
            # It was accepted, of which we heard nothing for as long as it lived.
            self.request_id = str(uuid.uuid4())
        elif not isinstance(error, Unavailable):
            raise error
        left = None if self.wait_seconds is None else self._patience_seconds(now_ns)
        if left is not None and left <= 0:
            if self._limit and isinstance(error, TimedOut):
                raise LimitReached(self._limit) from error
            raise error
        self._limit = str(error) if isinstance(error, LimitReached) else ""
        delay = error.retry_after_seconds or retry_delay_seconds(self._failures)
        self._failures += 1
        return delay if left is None else min(delay, left)


@dataclass(slots=True)
class Listening(Generic[ResponseT]):
    """One stream of responses, over as many connections as it takes."""

    _failures: int = field(init=False, default=0)

    def received(self, response: ResponseT) -> ResponseT:
        """Take in a message; return what to hand on."""
        self._failures = 0
        return response

    def failed(self, error: HoldoffError) -> float:
        """Return after how many seconds to connect again; there is no limit.

        Raises:
            HoldoffError: The error, if it is final.
        """
        if not isinstance(error, Unavailable):
            raise error
        delay = error.retry_after_seconds or retry_delay_seconds(self._failures)
        self._failures += 1
        return delay


@dataclass(slots=True)
class Watching(Listening[lease_service_pb2.WatchLeasesResponse]):
    """A watch of leases: no change is missed between its connections."""

    parent: str
    resume_token: str = ""
    """Where to go on: the last one that came, which the middle of a snapshot does not have."""

    def request(self) -> lease_service_pb2.WatchLeasesRequest:
        """What to send on a new connection."""
        return lease_service_pb2.WatchLeasesRequest(
            parent=self.parent, resume_token=self.resume_token
        )

    def received(
        self, response: lease_service_pb2.WatchLeasesResponse
    ) -> lease_service_pb2.WatchLeasesResponse:
        """Take in a message; return it."""
        self._failures = 0
        self.resume_token = response.resume_token or self.resume_token
        return response


@dataclass(slots=True)
class BudgetWatching(Listening[budget_service_pb2.WatchBudgetsResponse]):
    """A watch of budgets and back-offs.

    A new connection begins with all that stands, and cannot say what went away in between: that
    is added here.
    """

    parent: str
    scope: budget_pb2.Scope
    _budgets: dict[str, budget_pb2.Budget] = field(init=False, default_factory=dict)
    _back_offs: dict[str, budget_pb2.BackOff] = field(init=False, default_factory=dict)
    _unseen: set[str] = field(init=False, default_factory=set)
    """Names of what stood on the last connection, and has not come on this one."""

    def request(self) -> budget_service_pb2.WatchBudgetsRequest:
        """What to send on a new connection."""
        self._unseen = {*self._budgets, *self._back_offs}
        return budget_service_pb2.WatchBudgetsRequest(parent=self.parent, scope=self.scope)

    def received(
        self, response: budget_service_pb2.WatchBudgetsResponse
    ) -> budget_service_pb2.WatchBudgetsResponse:
        """Take in a message; return it, at the end of a snapshot with what is over."""
        self._failures = 0
        for budget in response.budgets:
            self._note(self._budgets, budget, stands=bool(budget.used or budget.reserved))
        for back_off in response.back_offs:
            self._note(self._back_offs, back_off, stands=bool(back_off.state))
        if response.snapshot_end:
            for name in sorted(self._unseen & self._budgets.keys()):
                response.budgets.append(_emptied(self._budgets.pop(name)))
            for name in sorted(self._unseen & self._back_offs.keys()):
                response.back_offs.append(_over(self._back_offs.pop(name)))
            self._unseen.clear()
        return response

    def _note(self, known: dict[str, KnownT], one: KnownT, *, stands: bool) -> None:
        self._unseen.discard(one.name)
        if stands:
            known[one.name] = one
        else:
            known.pop(one.name, None)


def _emptied(budget: budget_pb2.Budget) -> budget_pb2.Budget:
    """A budget with nothing left in its window."""
    return budget_pb2.Budget(
        name=budget.name,
        limit=budget.limit,
        kind=budget.kind,
        scope=budget.scope,
        state=budget_pb2.BUDGET_STATE_OPEN,
        most=budget.most,
        margin=budget.margin,
        room=budget.most - budget.margin,
        window=budget.window,
    )


def _over(back_off: budget_pb2.BackOff) -> budget_pb2.BackOff:
    """A back-off that is over."""
    return budget_pb2.BackOff(name=back_off.name, scope=back_off.scope, cause=back_off.cause)


@dataclass(frozen=True, slots=True)
class Renewal:
    """One renewal to send."""

    sent_ns: int
    timeout_seconds: float
    command_started: bool
    command_paused: bool


@dataclass(slots=True)
class Renewals:
    """The life of one accepted lease: when to send the next renewal, and when it is lost."""

    timing: Timing
    accepted_sent_ns: int
    deadline_ns: int = field(init=False)
    """When everything that runs under the lease must have stopped."""
    next_ns: int = field(init=False)
    """When to send the next renewal."""
    lost: LeaseLost | None = field(init=False, default=None)
    """Why the lease was lost, once it was."""
    _command_started: bool = field(init=False, default=False)
    _command_paused: bool = field(init=False, default=False)
    _failures: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._granted(self.accepted_sent_ns)

    def _granted(self, sent_ns: int) -> None:
        self.deadline_ns = self.timing.deadline_ns(sent_ns)
        self.next_ns = sent_ns + round(self.timing.renew_after_seconds * SECOND)
        self._failures = 0

    def command_started(self) -> None:
        """The next renewal says that the command has started, and it is due now."""
        self._command_started = True
        self.next_ns = 0

    def command_paused(self, *, paused: bool) -> None:
        """The next renewal says whether the command is paused, and it is due now."""
        self._command_paused = paused
        self.next_ns = 0

    def pause_seconds(self, now_ns: int) -> float:
        """How long to sleep before looking again; 0 or less when a renewal is due."""
        return min((self.next_ns - now_ns) / SECOND, LONGEST_SLEEP_SECONDS)

    def begin(self, now_ns: int) -> Renewal:
        """Return what to send now."""
        left_seconds = max(0.05, (self.deadline_ns - now_ns) / SECOND)
        # Another coordinator is looked for after two; from then on what is slow gets more time.
        call_seconds = self.timing.call_seconds * 2 ** min(max(0, self._failures - 1), 10)
        return Renewal(
            now_ns,
            min(call_seconds, left_seconds),
            self._command_started,
            self._command_paused,
        )

    def succeeded(self, renewal: Renewal) -> None:
        """A renewal was granted."""
        self._granted(renewal.sent_ns)
        told = renewal.command_started, renewal.command_paused
        if told != (self._command_started, self._command_paused):
            self.next_ns = 0

    def failed(self, error: HoldoffError, now_ns: int) -> None:
        """Take in a renewal that failed; a time-out or a fault says nothing about the lease.

        Raises:
            LeaseLost: The coordinator says that the lease is gone, or the deadline has passed.
        """
        if not isinstance(error, (Unavailable, UnexpectedError)):
            if isinstance(error, LeaseLost):
                raise error
            raise LeaseLost(f"the renewal was refused: {error}") from error
        self.check(now_ns)
        delay = min(retry_delay_seconds(self._failures), self.timing.renew_after_seconds)
        self._failures += 1
        self.next_ns = now_ns + round(delay * SECOND)

    def check(self, now_ns: int) -> None:
        """Raise LeaseLost if the lease was lost, or once the deadline has passed."""
        if self.lost is not None:
            raise self.lost
        if now_ns >= self.deadline_ns:
            raise LeaseLost("no renewal succeeded before the deadline: the lease counts as lost")

    def release_patience(self, now_ns: int) -> Patience:
        """How long to try to give the lease back: not beyond its end, and never for long."""
        until_ns = min(self.deadline_ns, now_ns + round(RELEASE_SECONDS * SECOND))
        return Patience(until_ns=until_ns, pause_seconds=0.2)
