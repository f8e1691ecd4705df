"""What a run does about errors: it reports those that it sees, and is quiet when it must be."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from holdoff import _calls
from holdoff._outcome import BACKING_OFF
from holdoff._places import find_place, folded
from holdoff._recognise import Duplicates, OutputRecogniser, SeenBlock
from holdoff.durations import format_duration
from holdoff.v1 import budget_pb2, lease_service_pb2, policy_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from holdoff import HeldLease
    from holdoff._output import Source
    from holdoff._process import Guard
    from holdoff._recognise import Seen
    from holdoff._reporting import Reporter

WhenQuiet = Literal["finish", "pause", "terminate"]

"""Why the guard ended a command that had to be quiet."""

_TICK_SECONDS = 0.2
_PLACE_FOLLOWS_SECONDS = 1.0
"""So soon after an error's line the line with its place must come."""
_TOLD_WITHIN_SECONDS = 2.0
"""So soon after it knows of our errors the coordinator says if we must be quiet."""

_WORDS: Mapping[policy_pb2.WhenQuiet.ValueType, WhenQuiet] = {
    policy_pb2.WHEN_QUIET_FINISH: "finish",
    policy_pb2.WHEN_QUIET_PAUSE: "pause",
    policy_pb2.WHEN_QUIET_TERMINATE: "terminate",
}


@dataclass(slots=True)
class Rooms:
    """How many errors may still happen at each place, by our own count. Pure.

    The coordinator counts those of everybody. This one needs no round trip, and no coordinator.
    """

    policy: policy_pb2.Policy
    _left: dict[tuple[str, str], int] = field(default_factory=dict)

    def refill(self, rooms: Iterable[lease_service_pb2.ScopeRoom]) -> None:
        """Take in what the coordinator says, who knew of our errors; forget the rest."""
        self._left = {(one.scope.division, folded(one.scope.endpoint)): one.room for one in rooms}

    def take(self, place: tuple[str, str], status: int, count: int) -> str:
        """Count errors at a place; return the limit that is spent then, or ''."""
        limits = [
            limit
            for limit in self.policy.limits
            if limit.kind == budget_pb2.EVENT_KIND_ERROR
            if not status or status in limit.statuses
        ]
        if not limits:
            return ""
        tightest = min(limits, key=lambda limit: limit.most - limit.margin)
        most = tightest.most - tightest.margin
        division, endpoint = place
        where = division, folded(endpoint)
        self._left[where] = self._left.get(where, most) - count
        return "" if self._left[where] > 0 else tightest.name


class Conduct:
    """Watches one command: what it writes, and what the coordinator says about its scopes.

    Args:
        reporter: Reports what is seen.
        token: Where it happens.
        job: Its name.
        when_quiet: What to do then; None does what the policy says.
        say: Called with a line for people, in threads that others wait for: it must not block.
        report_key: The key of the command's own reports in its output.
        trust_output: Whether reports without a key count too.
        renews_token: Whether the command always finds an access token that has not expired.
    """

    def __init__(  # noqa: PLR0913 - all of them differ from run to run
        self,
        reporter: Reporter,
        token: str,
        job: str,
        when_quiet: WhenQuiet | None,
        say: Callable[[str], object],
        *,
        report_key: str = "",
        trust_output: bool = False,
        renews_token: bool = False,
    ) -> None:
        self._renews_token = renews_token
        self._reporter = reporter
        self._say = say
        self._token = token
        self._job = job
        self._when_quiet = when_quiet
        self._report_key = report_key
        self._trust_output = trust_output
        self._warned_of_markers = False
        self._guard: Guard | None = None
        self._lease: HeldLease | None = None
        self._lock = threading.RLock()
        self._recognisers: dict[Source, OutputRecogniser] = {}
        self._seen_at: dict[Source, float] = {}
        self._duplicates = Duplicates()
        self._rooms = Rooms(policy_pb2.Policy())
        self._notice: lease_service_pb2.FollowLeaseResponse | None = None
        self._own_count_at: float | None = None
        """When our own count found no room; None while it finds some."""
        self._own_words = ""
        self._said: object = None
        """What was said last about the pause."""
        self._quiet_since: float | None = None
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="holdoff-conduct", daemon=True)
        self.errors = 0
        """How many errors were seen."""
        self.reason = ""
        """Why the command had to be quiet, the last time it had to."""

    def begin(self, guard: Guard, lease: HeldLease | None) -> None:
        """The command is about to start, under a lease or without one."""
        policy = lease.policy if lease else policy_pb2.Policy()
        with self._lock:
            self._guard, self._rooms = guard, Rooms(policy)
            if lease:
                self._lease = lease
                self._rooms.refill(lease.rooms)
            self._began = time.monotonic()
            self._when_quiet = self._when_quiet or _WORDS.get(policy.when_quiet, "pause")
            if self._when_quiet == "pause" and not guard.CAN_PAUSE:
                self._when_quiet = "terminate"
            self._judge()
        self._thread.start()

    def on_data(self, source: Source, data: bytes) -> None:
        """Look for errors in what the command wrote."""
        with self._lock:
            recogniser = self._recognisers.get(source)
            if recogniser is None:
                recogniser = OutputRecogniser(
                    self._rooms.policy, self._report_key, trust_output=self._trust_output
                )
                self._recognisers[source] = recogniser
            self._seen_at[source] = time.monotonic()
            self._report(source, recogniser.feed(data))
            self._warn_of_markers(recogniser)

    def on_notice(self, notice: lease_service_pb2.FollowLeaseResponse) -> None:
        """Do what the coordinator says."""
        with self._lock:
            self._notice = notice
            if notice.rooms:
                self._rooms.refill(notice.rooms)
            self._judge()

    def finish(self) -> None:
        """The command has ended, and all that it wrote was seen."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            for source, recogniser in self._recognisers.items():
                self._report(source, recogniser.finish())
                self._warn_of_markers(recogniser)

    def _warn_of_markers(self, recogniser: OutputRecogniser) -> None:
        if recogniser.ignored_markers and not self._warned_of_markers:
            self._warned_of_markers = True
            self._say(
                "lines that begin with HOLDOFF-ERROR or HOLDOFF-BLOCKED did not count, because "
                "they have no key: write key=$HOLDOFF_REPORT_KEY as their first field, or use "
                "--trust-output if the command prints no data from others"
            )

    def _report(self, source: Source, seen: Iterable[Seen]) -> None:
        events: list[budget_pb2.Event] = []
        now = time.monotonic()
        for one in seen:
            if not self._duplicates.is_new(source, one, now):
                continue
            where = _calls.scope(self._token, one.division, one.endpoint)
            if isinstance(one, SeenBlock):
                event = _calls.block_event(
                    where,
                    status=one.status,
                    retry_after_seconds=one.retry_after_seconds,
                    throttle=one.throttle,
                    job=self._job,
                )
                self.errors += 1
                how = f" with HTTP {one.status}" if one.status else ""
                spent = f"the provider refuses calls of {_where(where)}{how}"
            else:
                event = _calls.error_event(where, status=one.status, count=one.count, job=self._job)
                self.errors += one.count
                # Its division was found with it: the query is cut off by now.
                endpoint = find_place(self._rooms.policy.endpoint_path, one.endpoint)[1]
                place = (one.division, endpoint)
                limit, spent = self._rooms.take(place, one.status, one.count), ""
                if limit:
                    scope = budget_pb2.Scope(
                        token=self._token, division=place[0], endpoint=place[1]
                    )
                    spent = f"the budget {limit!r} of {_where(scope)} is spent"
            if self._lease:
                self._lease._vouch(event)  # noqa: SLF001 - one package
            events.append(event)
            if spent and self._own_count_at is None:
                self._own_count_at, self._own_words = time.monotonic(), spent
        if events:
            self._judge()  # first: the report may take the time of an fsync
            self._reporter.report(*events)

    def _tick(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            with self._lock:
                for source, recogniser in self._recognisers.items():
                    late = time.monotonic() - self._seen_at[source] > _PLACE_FOLLOWS_SECONDS
                    if recogniser.pending and late:
                        self._report(source, recogniser.flush())
                self._judge()

    def _judge(self) -> None:
        """Decide whether the command may run, from all that is known."""
        if self._guard is None:
            return
        now = time.monotonic()
        self._trust_coordinator(now)
        told = self._notice is not None and (
            self._notice.instruction == lease_service_pb2.HOLDER_INSTRUCTION_BE_QUIET
        )
        must_be_quiet = told or self._own_count_at is not None
        if must_be_quiet and self._quiet_since is None:
            self._quiet_since = now
            self._be_quiet(self._guard, now)
        elif not must_be_quiet and self._quiet_since is not None:
            if self._when_quiet == "pause":
                if self._said is None:
                    self._say_paused(now, at_last=True)
                self._say("the command resumes")
                self._guard.resume()
                self._tell_paused(paused=False)
            self._quiet_since = self._said = None
        elif must_be_quiet and self._when_quiet == "pause":
            self._say_paused(now)
        if self._quiet_since is not None and self._when_quiet == "pause":
            left = self._token_left_seconds(self._quiet_since)
            if left is not None and now - self._quiet_since >= left:
                if self._said is None:
                    self._say_paused(now, at_last=True)
                self._when_quiet = "terminate"
                self._say("its access token has expired: ending the command")
                self._guard.end(BACKING_OFF)

    def _trust_coordinator(self, now: float) -> None:
        """Give up our own count once the coordinator knows of our errors and says nothing."""
        idle_since = self._reporter.idle_since
        if self._own_count_at is None or idle_since is None:
            return
        if now - max(self._own_count_at, idle_since) >= _TOLD_WITHIN_SECONDS:
            self._own_count_at = None
            self._rooms.refill(())

    def _be_quiet(self, guard: Guard, now: float) -> None:
        self.reason = self._words()
        match self._when_quiet:
            case "finish":
                self._say(f"{self.reason}; the command may finish")
            case "terminate":
                self._say(f"{self.reason}: ending the command")
                guard.end(BACKING_OFF)
            case _:
                guard.pause()
                self._tell_paused(paused=True)
                self._say_paused(now)

    def _say_paused(self, now: float, *, at_last: bool = False) -> None:
        """Say why the command is paused and for how long, when that is news.

        The coordinator knows the length, and is soon heard where our own count was first.
        """
        quiet_seconds = 0.0 if self._quiet_since is None else now - self._quiet_since
        back_off, self.reason = self._back_off(), self._words()
        if not (back_off or at_last or quiet_seconds >= _TOLD_WITHIN_SECONDS):
            return
        said = self.reason, back_off.end_time.ToMicroseconds() if back_off else None
        if said == self._said:
            return
        how = "is" if self._said is None else "stays"
        self._said = said
        go_in, left, length = math.inf, self._token_left_seconds(now - quiet_seconds), ""
        if self._notice is not None and self._notice.HasField("go_in"):
            go_in = self._notice.go_in.ToMicroseconds() / 1e6
            length = f" for at least {_text(go_in)}"
        if left is not None and left - quiet_seconds < go_in:
            ends_in = _text(max(0.0, left - quiet_seconds))
            length += f"; it is ended in {ends_in}, when its access token expires"
        self._say(f"{self.reason}: the command {how} paused{length}")

    def _tell_paused(self, *, paused: bool) -> None:
        if self._lease:
            self._lease.command_paused(paused=paused)

    def _back_off(self) -> budget_pb2.BackOff | None:
        """The back-off that ends last, of those that the coordinator told."""
        told = self._notice.back_offs if self._notice is not None else ()
        return max(told, key=lambda one: one.end_time.ToMicroseconds(), default=None)

    def _words(self) -> str:
        back_off = self._back_off()
        return back_off.reason if back_off else self._own_words

    def _token_left_seconds(self, now: float) -> float | None:
        """How long the access token lives on, if it was got at the start and whenever it ran out.

        None where the policy does not say how long one lives, or the command gets new ones.
        """
        if self._renews_token:
            return None
        life = self._rooms.policy.refresh.access_token_life.ToMicroseconds() / 1e6
        return life - (now - self._began) % life if life else None


def _where(scope: budget_pb2.Scope) -> str:
    """A scope for people, as the coordinator words it."""
    division = f"division {scope.division}" if scope.division else ""
    return " ".join(filter(None, (scope.token, division, scope.endpoint)))


def _text(seconds: float) -> str:
    return format_duration(math.ceil(seconds))
