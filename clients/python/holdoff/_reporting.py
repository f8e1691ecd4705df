"""Reports events for a run that must not wait for the coordinator, nor fail with it.

What is reported is on disk (`holdoff._spool`) before it is sent, and leaves the disk when the
coordinator has counted it: exactly once, whatever crashes in between. A report that is refused, or
fails three times while others succeed, is set aside, so that it does not block others.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff._core import retry_delay_seconds
from holdoff._forks import Owner
from holdoff._log import log
from holdoff._spool import Moment, Spool, SpoolError
from holdoff.errors import (
    EventTooOld,
    HoldoffError,
    InvalidRequest,
    NotFound,
    TimedOut,
    Unavailable,
    UnexpectedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdoff._spool import Waiting, Warn
    from holdoff.v1 import budget_pb2

    Send = Callable[[Sequence[budget_pb2.Event]], object]
    """Reports events of one app, at most 100, and raises a `HoldoffError` if that fails:
    `Client.record_events` is one."""
    Probe = Callable[[], object]
    """Asks the coordinator something cheap, and raises `Unavailable` if it is away."""


_MOST_EVENTS = 100
"""So many may be in one request."""
_MOST_AGE_NS = 24 * 3600 * 10**9
"""What is older is not counted any more."""
_MOST_FAILURES = 3
"""A report that failed this often is set aside."""
_LATER_SECONDS = 30.0
"""When to ask again after an answer that says neither when, nor that it is final."""


class _Delivery:
    """Sends what waits in spools, and counts how it went."""

    def __init__(
        self,
        send: Send,
        warn: Warn,
        *,
        keep_unknown: bool = False,
        probe: Probe | None = None,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.sent = 0
        self.dropped = 0
        self.set_aside = 0
        self._send = send
        self._warn = warn
        self._keep_unknown = keep_unknown
        self._on_progress = on_progress
        self._warned: set[type[HoldoffError]] = set()
        self._probe = probe
        self._answers = False
        """Whether the coordinator answered its last call."""

    def deliver(self, spool: Spool) -> HoldoffError | None:
        """Send what waits; return why some of it still waits, if it does."""
        # A batch is of one token: if that is unknown, all of the batch is refused. Reports that
        # failed before are sent last, each alone, so that they do not block others.
        tokens: dict[tuple[bool, str], list[str]] = {}
        for one in spool.waiting():
            key = (True, one.event.id) if one.failures else (False, one.event.scope.token)
            tokens.setdefault(key, []).append(one.event.id)
        kept: HoldoffError | None = None
        self._answers = False
        for (alone, _), ids in sorted(tokens.items(), key=lambda item: item[0][0]):
            try:
                for first in range(0, len(ids), _MOST_EVENTS):
                    some = ids[first : first + _MOST_EVENTS]
                    kept = self._try_batch(spool, some, alone=alone) or kept
            except Unavailable as error:
                return error
            except HoldoffError as error:
                kept = error
        return kept

    def _try_batch(self, spool: Spool, ids: Sequence[str], *, alone: bool) -> HoldoffError | None:
        """Send some of one token; return the error if the coordinator failed with them.

        Raises:
            HoldoffError: They remain stored, and so do the others of this token.
        """
        if alone:  # so that an outage does not count as a failure of this report
            self._ask_whether_it_answers()
        try:
            self._deliver_batch(spool, ids)
        except TimedOut as error:
            if self._probe is None:
                raise
            self._answers = False
            self._failed(spool, ids, error)
            self._ask_whether_it_answers()
            return UnexpectedError(
                f"the coordinator does not answer this report, but others: {error}"
            )
        except UnexpectedError as error:
            self._answers = True
            self._failed(spool, ids, error)
            return error
        return None

    def _ask_whether_it_answers(self) -> None:
        """Make another call to the coordinator, unless it has just answered one.

        Raises:
            Unavailable: It does not answer.
        """
        if self._probe is None or self._answers:
            return
        try:
            self._probe()
        except ValueError as error:
            raise Unavailable(f"the connection was closed: {error}") from error
        except Unavailable:
            raise
        except HoldoffError:
            pass  # is an answer
        self._answers = True

    def _failed(self, spool: Spool, ids: Sequence[str], error: HoldoffError) -> None:
        """Note that the coordinator failed with some: the next time each is sent alone."""
        failed = spool.failed(ids)
        if len(failed) == 1 and failed[0].failures >= _MOST_FAILURES:
            self._set_aside(spool, failed, error)

    def _deliver_batch(self, spool: Spool, ids: Sequence[str]) -> None:
        """Send some of one token.

        Raises:
            HoldoffError: They wait on.
        """
        now = Moment.now()
        batch = spool.begin(ids)
        young = [one for one in batch if one.age_ns(now) <= _MOST_AGE_NS]
        if len(young) < len(batch):
            old = [one for one in batch if one not in young]
            self._drop(spool, old, EventTooOld("it happened more than a day ago"))
        if not young:
            return
        sent = [one.event.id for one in young]
        try:
            self._send([one.due(now) for one in young])
            self._answers = True
        except ValueError as error:
            raise Unavailable(f"the connection was closed: {error}") from error
        except (InvalidRequest, NotFound) as error:
            self._answers = True
            unknown = isinstance(error, NotFound)
            if unknown and self._keep_unknown:
                raise
            if unknown or (len(young) == 1 and isinstance(error, EventTooOld)):
                self._drop(spool, young, error)
            elif len(young) == 1:
                self._set_aside(spool, young, error)
            else:
                middle = len(sent) // 2
                self._deliver_batch(spool, sent[:middle])
                self._deliver_batch(spool, sent[middle:])
            return
        spool.done(sent)
        self.sent += len(sent)
        self._on_progress(len(sent))

    def _set_aside(self, spool: Spool, bad: Sequence[Waiting], error: HoldoffError) -> None:
        path = spool.set_aside([one.event.id for one in bad], str(error))
        if path is None:
            self._drop(spool, bad, error)
            return
        self._say_once(
            bad,
            error,
            f"set aside in {path}",
            "; when the cause is fixed, send it again with: holdoff spool retry",
        )
        self.set_aside += len(bad)
        self._on_progress(len(bad))

    def _drop(self, spool: Spool, refused: Sequence[Waiting], error: HoldoffError) -> None:
        self._say_once(refused, error, "dropped")
        spool.done([one.event.id for one in refused])
        self.dropped += len(refused)
        self._on_progress(len(refused))

    def _say_once(
        self, bad: Sequence[Waiting], error: HoldoffError, what: str, remedy: str = ""
    ) -> None:
        if type(error) not in self._warned:
            self._warned.add(type(error))
            scope = bad[0].event.scope
            place = " ".join(filter(None, (scope.token, scope.division, scope.endpoint)))
            self._warn(f"a report about {place} is {what}, like all similar ones: {error}{remedy}")


class Reporter:
    """Reports what a run sees, in a thread of its own that starts with the first report.

    Nothing of it ever raises into the run. In a forked child it does nothing.

    Args:
        send: Reports events of one app, such as `Client.record_events`.
        spool: Where they wait; the reporter is its only user, and closes it.
        warn: Called with one line about what is lost, or may be. Any thread may call it.
        probe: Shows whether the coordinator answers other calls when a report gets no answer.
            Without it, such a report is never set aside.
    """

    def __init__(
        self,
        send: Send,
        spool: Spool,
        warn: Warn = log.warning,
        *,
        probe: Probe | None = None,
    ) -> None:
        self._spool = spool
        self._warn = warn
        self._delivery = _Delivery(send, warn, probe=probe)
        self._owner = Owner()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._lost = 0
        self._warned = False
        self._news = threading.Event()
        self._closing = threading.Event()
        self._over = threading.Event()
        self.idle_since: float | None = time.monotonic()
        """Since when all that was reported is counted; None while some of it waits."""

    def report(self, *events: budget_pb2.Event) -> None:
        """Take events, each with an id of its own: they are on disk when this returns.

        Where the disk does not take them they are sent all the same, if this process lives.
        """
        if not self._owner.is_here:
            return
        self.idle_since = None
        try:
            self._spool.append(*events)
        except SpoolError as error:
            lost = self._spool.hold(*events)
            with self._lock:
                self._lost += lost
                warned, self._warned = self._warned, True
            if not warned:
                self._warn(
                    f"reports are sent but not stored, and lost if this process ends: {error}"
                )
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(
                    target=self._work, name="holdoff-reports", daemon=True
                )
                self._thread.start()
        self._news.set()

    def close(self, timeout_seconds: float) -> int:
        """Try for so long to send the rest, and leave what remains on disk; return how many.

        They are sent by the next `holdoff run` on this host, or by `holdoff spool flush`.
        """
        if not self._owner.is_here:
            return 0
        self._closing.set()
        self._news.set()
        with self._lock:
            thread = self._thread
        if thread:
            thread.join(timeout_seconds)
        self._over.set()
        left, unwritten = self._spool.close()
        with self._lock:
            lost = self._lost + unwritten
        if left:
            self._warn(
                f"{left} reports could not be sent and are kept: the next `holdoff run` on this "
                "host sends them, or: holdoff spool flush"
            )
        if lost:
            self._warn(f"{lost} reports could be neither sent nor stored, and are lost")
        return left

    def _work(self) -> None:
        failures = 0
        while not self._over.is_set():
            error = self._delivery.deliver(self._spool)
            if error is None:
                failures = 0
                if self._closing.is_set() and not self._spool.waiting():
                    return
                if not self._spool.waiting():
                    self.idle_since = time.monotonic()
                self._news.wait()
                self._news.clear()
                continue
            away = isinstance(error, Unavailable)
            if self._closing.is_set() and not away:
                return  # it has answered, and will not change its mind so soon
            pause_seconds = error.retry_after_seconds
            if pause_seconds is None:
                pause_seconds = retry_delay_seconds(failures) if away else _LATER_SECONDS
            failures += 1
            # A close ends the first pause early, and its end the last one.
            (self._over if self._closing.is_set() else self._closing).wait(pause_seconds)


@dataclass(frozen=True, slots=True)
class Flushed:
    """What became of the reports that others left behind."""

    sent: int
    dropped: int
    set_aside: int
    error: HoldoffError | None
    """Why some still wait; None when none does."""


def flush_leftovers(
    spool: Spool,
    send: Send,
    *,
    warn: Warn = log.warning,
    probe: Probe | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Flushed:
    """Send what was left behind by writers that are gone.

    Several processes may do so at the same time. Reports of a token that this coordinator does
    not know stay, since another one may, until they are a day old.

    Args:
        spool: Its folder is looked through.
        send: Reports events of one app, such as `Client.record_events`.
        warn: Called with one line about what is skipped or dropped.
        probe: Shows whether the coordinator answers other calls when a report gets no answer.
        on_progress: Called with how many more are over and done with.
    """
    delivery = _Delivery(send, warn, keep_unknown=True, probe=probe, on_progress=on_progress)
    kept: HoldoffError | None = None
    for leftover in spool.leftovers(warn):
        error = delivery.deliver(leftover)
        kept = error or kept
        if isinstance(error, Unavailable):
            break
    return Flushed(delivery.sent, delivery.dropped, delivery.set_aside, kept)
