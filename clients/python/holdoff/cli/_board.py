"""What `holdoff watch` shows: how every token stands, worked out from messages alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from holdoff.cli.output import NOTHING, enum_text, holder_text, lease_state_text, state_text
from holdoff.durations import format_duration
from holdoff.v1 import lease_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.timestamp_pb2 import Timestamp

    from holdoff.v1 import lease_service_pb2

MOST_CHANGES = 5
"""How many of the last changes are shown."""

_LIVE = (
    lease_pb2.LEASE_STATE_OFFERED,
    lease_pb2.LEASE_STATE_ACTIVE,
    lease_pb2.LEASE_STATE_BREAKING,
)


@dataclass(frozen=True, slots=True)
class Row:
    """How one token stands, as text for people."""

    token: str
    state: str
    holder: str
    held: str
    """For how long the live lease has been held."""
    left: str
    """What is left of the cooldown, or of a lease that nobody may renew."""
    waiters: str


@dataclass(frozen=True, slots=True)
class View:
    """What fits on a screen."""

    rows: Sequence[Row]
    more: int
    """How many tokens did not fit."""
    changes: Sequence[tuple[str, str, str, str]]
    """The last changes, the newest first: local time, kind, token, details."""


class Board:
    """How all tokens stand.

    The store's clock is not ours, and changes that were missed arrive late. So times are those of
    the store, and its clock is taken to be where the quickest message so far says it is.
    """

    def __init__(self) -> None:
        self._apps: dict[str, dict[str, lease_pb2.TokenStatus]] = {}
        self._changes: deque[lease_pb2.Change] = deque(maxlen=MOST_CHANGES)
        self._behind_ns: int | None = None
        """Our clock less the store's, and the time that the quickest message took."""
        self._is_another = False
        """Whether it may be of another store: the next instant replaces it."""

    def take(self, response: lease_service_pb2.WatchLeasesResponse, now_ns: int) -> None:
        """Take in a message.

        Args:
            response: The message.
            now_ns: When it came, by any clock that runs steadily.
        """
        match response.WhichOneof("event"):
            case "snapshot":
                snapshot = response.snapshot
                if snapshot.first:
                    self._apps[snapshot.app] = {}
                    self._is_another = True  # it may be another store's clock from here
                known = self._apps.setdefault(snapshot.app, {})
                for status in snapshot.tokens:
                    self._tune(_instant_ns(status), now_ns)
                    known[status.token] = status
            case "change":
                change = response.change
                self._tune(change.time.ToNanoseconds(), now_ns)
                app = change.status.token.partition("/tokens/")[0]
                self._apps.setdefault(app, {})[change.status.token] = change.status
                self._changes.appendleft(change)
            case _:  # it only says that we are connected again
                pass

    def _tune(self, store_ns: int | None, now_ns: int) -> None:
        if store_ns is not None:
            behind_ns = now_ns - store_ns
            if self._behind_ns is not None and not self._is_another:
                behind_ns = min(behind_ns, self._behind_ns)
            self._behind_ns, self._is_another = behind_ns, False

    def view(self, height: int, now_ns: int) -> View:
        """Return what fits into so many lines: tokens in use first, then by name.

        Args:
            height: Lines for tokens, changes, and what stands around them.
            now_ns: The time, by the clock of `take`.
        """
        statuses = sorted(
            (status for tokens in self._apps.values() for status in tokens.values()),
            key=lambda status: (_is_idle(status), status.token),
        )
        # The heading takes a line, an empty one comes before the changes, and the last line is
        # the cursor's. Changes may have up to a third.
        changes = list(self._changes)[: max(0, (height - 3) // 3)]
        room = max(1, height - 2 - (len(changes) + 1 if changes else 0))
        fit = statuses if len(statuses) <= room else statuses[: max(1, room - 1)]
        return View(
            rows=[self._row(status, now_ns) for status in fit],
            more=len(statuses) - len(fit),
            changes=[_change_texts(change) for change in changes],
        )

    def _row(self, status: lease_pb2.TokenStatus, now_ns: int) -> Row:
        is_alone = status.lease.state in _LIVE and not status.shared_lease_count
        lease = status.lease if is_alone else None
        return Row(
            token=status.token,
            state=_state(status),
            holder=_holder(status),
            held=self._span(now_ns, since=lease.accept_time)
            if lease and lease.HasField("accept_time")
            else NOTHING,
            left=self._left(status, now_ns),
            waiters=str(status.queue_length or NOTHING),
        )

    def _left(self, status: lease_pb2.TokenStatus, now_ns: int) -> str:
        # Renewals are not told, so that nothing is known of what is left of an active lease.
        if status.lease.state == lease_pb2.LEASE_STATE_BREAKING:
            return self._span(now_ns, until=status.lease.expire_time)
        if status.HasField("cooldown") and status.lease.state not in _LIVE:
            return self._span(now_ns, until=status.not_before_time)
        return NOTHING

    def _span(
        self, now_ns: int, *, since: Timestamp | None = None, until: Timestamp | None = None
    ) -> str:
        if self._behind_ns is None:
            return NOTHING
        store_ns = now_ns - self._behind_ns
        span_ns = store_ns - since.ToNanoseconds() if since else 0
        span_ns += until.ToNanoseconds() - store_ns if until else 0
        return format_duration(max(0, span_ns // 10**9))


def _change_texts(change: lease_pb2.Change) -> tuple[str, str, str, str]:
    local: datetime = change.time.ToDatetime(UTC).astimezone()
    status = change.status
    if change.kind == lease_pb2.CHANGE_KIND_QUEUE_MOVED:
        details = f"{status.queue_length or 'none'} waiting"
    else:
        lease = status.lease
        activity = lease_state_text(lease) if lease.activity else ""
        parts = (_holder(status, also_ended=True), activity, lease.break_reason)
        details = ": ".join(part for part in parts if part not in {"", "active"})
    return f"{local:%H:%M:%S}", enum_text(change, "kind"), status.token, details


def _state(status: lease_pb2.TokenStatus) -> str:
    if status.shared_lease_count:
        return f"{status.shared_lease_count} running"
    if status.wait_reason == lease_pb2.WAIT_REASON_HELD and status.HasField("lease"):
        state = lease_state_text(status.lease)
        return state if state != "active" and status.lease.state in _LIVE else "held"
    return state_text(status)


def _holder(status: lease_pb2.TokenStatus, *, also_ended: bool = False) -> str:
    if status.shared_lease_count and not also_ended:
        return NOTHING  # `holdoff lease list` lists them
    if status.HasField("lease") and (also_ended or status.lease.state in _LIVE):
        return holder_text(status.lease.holder)
    if status.wait_reason == lease_pb2.WAIT_REASON_HELD:
        return "a user of python-redis-lock"
    return NOTHING


def _is_idle(status: lease_pb2.TokenStatus) -> bool:
    is_free = status.wait_reason == lease_pb2.WAIT_REASON_UNSPECIFIED
    return is_free and not status.queue_length and not status.shared_lease_count


def _instant_ns(status: lease_pb2.TokenStatus) -> int | None:
    """When a status was read, by the store's clock; None where nothing in it says so."""
    if status.lease.HasField("remaining"):
        return status.lease.expire_time.ToNanoseconds() - status.lease.remaining.ToNanoseconds()
    if status.HasField("cooldown"):
        return status.not_before_time.ToNanoseconds() - status.cooldown.ToNanoseconds()
    return None
