"""A fleet that shares budgets through two replicas, and is treated roughly."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Self

import holdoff
from holdoff.v1 import budget_pb2
from tests.checkers import calls_of, fullest_window
from tests.e2e.programs import caller
from tests.e2e.programs.caller import Plan
from tests.e2e.service import BIN, Service
from tests.harness import LONG, only_long, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.checkers import Call
    from tests.conftest import StartValkey

SEED = 4
"""Of all choices; what the machine does in between stays its own."""

TIME_SCALE = 600
"""The simulator's fastest: its hour takes 6 s, and its access tokens live for 1 s."""
HOUR_SECONDS = 3600 / TIME_SCALE
REFRESH_SECONDS = 570 / TIME_SCALE + 0.03
ERRORS = 10
"""The simulator blocks an app with more of them in an hour in one division and endpoint."""
CALLS, CALLS_SECONDS = 30 if LONG else 16, 2.0
"""What the policy allows for each division besides: the simulator would take more."""
COUNTED = (400, 401, 403, 404)
DRIFT_SECONDS = 0.01
"""By so much windows are longer than the provider's: its clock is not the store's."""
POLICY = rf"""
name = "hasty"

[refresh]
interval = "0s"

[endpoint]
path = '/api/v1/(?P<division>[^/]+)/(?P<endpoint>.+)'

[[limit]]
name = "errors"
event = "errors"
most = {ERRORS}
window = "{HOUR_SECONDS + DRIFT_SECONDS}s"
scope = ["app", "token", "division", "endpoint"]
statuses = {list(COUNTED)}

[[limit]]
name = "calls"
event = "calls"
most = {CALLS}
window = "{CALLS_SECONDS + DRIFT_SECONDS}s"
scope = ["app", "division"]
"""
TTL_SECONDS = 3.0
"""Of a reservation: far longer than a call takes, and shorter than the window."""
ENDPOINTS = ("crm/Accounts", "crm/Contacts", "logistics/Items", "salesorder/SalesOrders")
SCOPES = tuple(product(("535193", "535194"), ENDPOINTS if LONG else ENDPOINTS[:2]))
PROCESSES, CALLERS = (16, 4) if LONG else (6, 2)

EVENTS = 480 if LONG else 96
EVENTS_A_REPORT = 3
REPORTERS = 8
COUNTED_NOW = budget_pb2.EVENT_OUTCOME_COUNTED
COUNTED_BEFORE = budget_pb2.EVENT_OUTCOME_KNOWN


class Provider:
    """A simulator, in a process of its own, and a file with an access token that works."""

    def __init__(self, folder: Path) -> None:
        self.access_token_file = folder / "access-token"
        self._over = threading.Event()

    def __enter__(self) -> Self:
        command = [str(BIN / "holdoff"), "simulator", "serve", "--time-scale", str(TIME_SCALE)]
        command += ["--rotation", "reusable"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        match = re.search(r"http://(\S+)", self._process.stdout.readline())
        assert match
        self.address = match[1]
        [self._seed] = self._ask("/_simulator/seed")["seeds"]
        self._refresh()
        self._refresher = threading.Thread(target=self._keep_fresh)
        self._refresher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._refresher.join()
        self._process.terminate()
        self._process.communicate(timeout=40)

    def _ask(self, path: str, form: dict[str, str] | None = None) -> Any:
        data = urllib.parse.urlencode(form).encode() if form else None
        with urllib.request.urlopen(f"http://{self.address}{path}", data, timeout=40) as answer:
            return json.load(answer)

    def _refresh(self) -> None:
        form = {name: self._seed[name] for name in ("client_id", "client_secret", "refresh_token")}
        answer = self._ask("/api/oauth2/token", {"grant_type": "refresh_token", **form})
        fresh = self.access_token_file.with_suffix(".new")
        fresh.write_text(answer["access_token"])
        fresh.replace(self.access_token_file)

    def _keep_fresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            # It may find that too early: it counts from when it was done with the last answer.
            # Callers go on with what they have, and err once that has expired.
            with contextlib.suppress(urllib.error.HTTPError):
                self._refresh()

    def report(self) -> Any:
        """Return what it tells of its clients."""
        return self._ask("/_simulator/report")


class Judge:
    """Looks at what the provider counted, and at what the callers noted."""

    def __init__(self, provider: Provider, history: Path) -> None:
        self.report = provider.report()
        self.errors = {
            (one["division"], one["endpoint"]): (one["total"], one["most_in_an_hour"])
            for one in self.report["errors"]
        }
        # What follows the last line's end is being written.
        lines = history.read_text().rpartition("\n")[0].splitlines()
        notes = [json.loads(line) for line in lines]
        self.crashes = Counter(note["point"] for note in notes if note["what"] == caller.CRASHED)
        calls = calls_of(notes)
        self.calls = _by_scope(calls, 1)
        # Who did not live to see an answer may have got an error.
        self.failed = _by_scope([one for one in calls if one.status in (None, *COUNTED)], 2)

    def breaches(self) -> list[str]:
        """Say which limits were exceeded, and according to whom."""
        told = [f"the provider blocked: {one}" for one in self.report["blocks"]]
        told += [
            f"the provider saw {most} errors of {scope} in an hour"
            for scope, (_, most) in self.errors.items()
            if most > ERRORS
        ]
        for what, groups, limit, window_seconds in (
            ("errors", self.failed, ERRORS, HOUR_SECONDS),
            ("calls", self.calls, CALLS, CALLS_SECONDS),
        ):
            told += [
                f"by the history {len(fullest)} {what} of {scope} in {window_seconds} s"
                for scope, fullest in _fullest(groups, window_seconds).items()
                if len(fullest) > limit
            ]
        return told

    def has_seen_enough(self) -> bool:
        """Whether every sort of crash was met, and all room given out more than once."""
        totals = [total for total, _ in self.errors.values()]
        return (
            all(self.crashes[point] >= 3 for point in caller.POINTS)
            and len(totals) == len(SCOPES)
            and min(totals) > 1.5 * ERRORS
            and max(most for _, most in self.errors.values()) >= ERRORS
            and min(map(len, _fullest(self.calls, CALLS_SECONDS).values())) > 0.75 * CALLS
        )


def _by_scope(calls: Iterable[Call], fields: int) -> dict[tuple[str, ...], list[Call]]:
    """Group calls by the first fields of their scope."""
    groups = defaultdict(list)
    for call in calls:
        groups[call.scope[:fields]].append(call)
    return groups


def _fullest(
    groups: dict[tuple[str, ...], list[Call]], window_seconds: float
) -> dict[tuple[str, ...], list[Call]]:
    window_ns = int(window_seconds * 1e9)
    return {scope: fullest_window(calls, window_ns) for scope, calls in groups.items()}


@contextlib.contextmanager
def calling(plan: Plan) -> Iterator[None]:
    """Let callers call, and wait until the last of them has stopped."""
    command = [sys.executable, caller.__file__, json.dumps(asdict(plan))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield
            Path(plan.stop_file).touch()
            _, said = process.communicate(timeout=40)
        finally:
            process.kill()  # its callers end when it is gone
    assert (process.returncode, said) == (0, "")


@only_long  # the short chaos run has such a fleet, too
def test_callers_that_crash_never_exceed_a_limit(tmp_path: Path, start_valkey: StartValkey) -> None:
    """Promise 6, with reservations: many callers over two replicas, half of which crash.

    Callers err in most of their calls. Two judges look at it: the simulated provider, which blocks
    at the first error too many, and the history, which the callers write before and after each
    call and which survives them. For the history a call has happened at any instant between, and
    one whose caller crashed at any instant until its reservation ran out, with an error: no choice
    of these instants may show more than the limit in any window. It is worth something only if the
    room is used: of every scope it is given out more than once, and used up to the limit.

    What the promise needs of a caller and its provider, and what the test therefore does:

    - The provider counts the call *while the reservation stands*. So the TTL is longer than the
      call takes, and who hears late of a reservation gives it back (`caller.py`). A call that is
      counted after its reservation ran out may find its room given to others a window later.
    - The provider counts the call *before the instant that is committed*: so the commit follows the
      answer, and its age, 0 with a guard, is not too long.
    - How long it takes from the reservation to the call and on to the commit costs room, not
      safety: room is taken before the call, and the window begins after it. A crash costs one
      place for the TTL and a window.
    - A window of the store's clock is not shorter than the provider's. Here these are the system's
      clock, which may be slewed by 0.05 %, and a process' monotonic one: the policy's windows are
      10 ms longer than those of the judges.

    The TTL is shorter than the window: otherwise room that comes back by a mistake when a
    reservation expires would have come back anyway.

    Fails when `reserve` does not look at what is reserved, leaves out the limit of calls, or takes
    room for one too many; when an expired reservation gives its room back, or counts as of its
    beginning; when a commit does not count, or as of the reservation; when events leave a window
    half a percent too early.
    """
    url = start_valkey().url
    with (
        Service(tmp_path / "first", url, {"hasty": POLICY}) as first,
        Service(tmp_path / "second", url, {"hasty": POLICY}) as second,
        Provider(tmp_path) as provider,
    ):
        token = f"apps/{uuid.uuid4()}/tokens/t"
        with holdoff.Client(first.address) as client:
            client.create_token(token, policy="hasty")
        history = tmp_path / "history"
        history.touch()
        plan = Plan(
            replicas=(first.address, second.address),
            token=token,
            ttl_seconds=TTL_SECONDS,
            provider=provider.address,
            scopes=SCOPES,
            access_token_file=str(provider.access_token_file),
            history=str(history),
            stop_file=str(tmp_path / "stop"),
            seed=SEED,
            processes=PROCESSES,
            callers=CALLERS,
        )

        def is_over() -> bool:
            time.sleep(0.2)  # a look is work for the provider too
            judge = Judge(provider, history)
            return bool(judge.breaches()) or judge.has_seen_enough()

        with calling(plan):
            wait_until(is_over, 90)
        judge = Judge(provider, history)

    assert judge.breaches() == []
    # Both judges saw the same: what was noted was counted, and what was counted was noted.
    for scope in SCOPES:
        known = sum(call.status is not None for call in judge.failed[scope])
        assert known <= judge.errors[scope][0] <= len(judge.failed[scope])


class Reporters:
    """Those who report the same events by turns, each over a connection of its own."""

    def __init__(self, replicas: Sequence[Service], token: str) -> None:
        self._replicas = replicas
        self._random = Random(SEED)  # noqa: S311 - to be repeated
        self._answers = 0  # roughly: only that it grows is of interest
        self._half_time = threading.Barrier(REPORTERS + 1, timeout=30)
        self.events = [
            budget_pb2.Event(
                id=str(uuid.UUID(int=self._random.getrandbits(128), version=4)),
                kind=budget_pb2.EVENT_KIND_ERROR,
                scope=budget_pb2.Scope(token=token, division=division, endpoint=endpoint),
                status=self._random.choice(COUNTED),
            )
            for division, endpoint in self._random.choices(SCOPES, k=EVENTS)
        ]

    def report(
        self, turn: int, victims: Sequence[Service]
    ) -> list[budget_pb2.EventOutcome.ValueType]:
        """Report each event once, by another one than in the last turn; return the outcomes.

        In the middle, while all of them report, the victims are killed, and then started again.
        """
        with ThreadPoolExecutor(REPORTERS) as pool:
            parts = [
                self.events[(turn + number) % REPORTERS :: REPORTERS] for number in range(REPORTERS)
            ]
            reports = [pool.submit(self._report, number, part) for number, part in enumerate(parts)]
            self._half_time.wait()
            heard = self._answers
            wait_until(lambda: self._answers > heard)
            for victim in victims:
                victim.end(signal.SIGKILL)
            for victim in victims:
                victim.start()
            return [outcome for report in reports for outcome in report.result()]

    def _report(
        self, number: int, events: list[budget_pb2.Event]
    ) -> list[budget_pb2.EventOutcome.ValueType]:
        outcomes = []
        addresses = [replica.address for replica in self._replicas[:: (-1) ** number]]
        with holdoff.Client(",".join(addresses)) as client:
            for start in range(0, len(events), EVENTS_A_REPORT):
                if start == len(events) // 2:
                    self._half_time.wait()
                outcomes += insist(client, events[start : start + EVENTS_A_REPORT])
                self._answers += 1
        return outcomes


def insist(
    client: holdoff.Client, events: Sequence[budget_pb2.Event]
) -> list[budget_pb2.EventOutcome.ValueType]:
    """Report until somebody answers, as a spool does."""
    for _ in range(10):
        with contextlib.suppress(holdoff.Unavailable):
            return client.record_events(events)
    raise AssertionError("nobody is there")


def test_reports_that_are_retried_count_once(two_replicas: tuple[Service, Service]) -> None:
    """Promise 6: reports count once, also above the limit, whoever repeats them and whoever dies.

    Each event is reported three times, by three of eight reporters, half of which prefer either
    replica; in each turn coordinators are killed while all report: both, one, the other. What the
    store has executed and nobody heard of is repeated at once, and everything in the next turn.

    It needs an id of the event's own, a store that keeps what it executed (it fsyncs every write),
    and a last report while the id is kept: for the window and a day.

    Fails when counted ids are not remembered, or by each coordinator for itself; when a report is
    answered before it is counted; when nothing is counted above the limit.
    """
    first, second = two_replicas
    token = first.create_token("reported")
    reporters = Reporters(two_replicas, token)
    expected = Counter((one.scope.division, one.scope.endpoint) for one in reporters.events)
    told: Counter[budget_pb2.EventOutcome.ValueType] = Counter()
    for turn, victims in enumerate(((first, second), (first,), (second,))):
        told.update(reporters.report(turn, victims))
        for replica in two_replicas:
            with holdoff.Client(replica.address) as client:
                budgets = list(client.list_budgets(token=token))
            used = {(one.scope.division, one.scope.endpoint): one.used for one in budgets}
            assert used == expected
    assert told.keys() == {COUNTED_NOW, COUNTED_BEFORE}
    assert told.total() == 3 * EVENTS
    # Of some that count nobody heard so.
    assert told[COUNTED_NOW] <= EVENTS
