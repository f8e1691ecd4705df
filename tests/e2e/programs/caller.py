"""Callers of a provider that reserve before they call, some of which crash: run by tests.

A plan says how many processes there are and how many callers, threads, each has. What they do is
noted in a file to which all of them append, so that it outlives them. The callers of half of the
processes crash: one of them kills its process, with SIGKILL, in the middle of a call, and another
process takes its place. All choices come from the plan's seed.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING
from urllib.parse import quote

import holdoff
from holdoff._platform import boottime_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

SENT = "sent"
RESERVED = "reserved"
ANSWERED = "answered"
CRASHED = "crashed"
POINTS = (RESERVED, SENT, ANSWERED)
"""Where a caller crashes: with its room taken, with its call sent, with its answer read."""
MOST_CALLS = 2
"""A caller that crashes does so in one of its first calls."""
WAIT_SECONDS = 1.0
ERRS = 0.7
"""Share of the calls that are wrong."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the callers are to do."""

    replicas: Sequence[str]
    """The two coordinators, each preferred by half of the processes."""
    token: str
    ttl_seconds: float
    """Of a reservation."""
    provider: str
    """Its address."""
    scopes: Sequence[tuple[str, str]]
    """Pairs of a division and an endpoint."""
    access_token_file: str
    history: str
    stop_file: str
    """They end when it exists."""
    seed: int
    processes: int
    callers: int
    """In each of them."""


class Crew:
    """The callers of a process: what they share."""

    def __init__(self, plan: Plan, number: int, life: int) -> None:
        self.plan = plan
        self.name = f"{number}.{life}"
        random = Random(f"{plan.seed}.{self.name}")  # noqa: S311 - to be repeated
        self._history = os.open(plan.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._stop_file = Path(plan.stop_file)
        self._parent = os.getppid()
        near, far = plan.replicas if number % 2 else reversed(plan.replicas)
        self.client = holdoff.Client(f"{near},{far}")
        # Every second one of those that prefer the same replica.
        crashes = number // 2 % 2 == 1
        self._crasher = random.randrange(plan.callers) if crashes else None

    def run(self) -> None:
        """Call until it is time to stop."""
        with ThreadPoolExecutor(self.plan.callers) as pool:
            callers = [
                Caller(self, number, crashes=number == self._crasher)
                for number in range(self.plan.callers)
            ]
            for run in [pool.submit(caller.run) for caller in callers]:
                run.result()

    def is_over(self) -> bool:
        """Whether to stop: also when nobody is there any more who would say so."""
        return self._stop_file.exists() or os.getppid() != self._parent

    def note(self, call: str, what: str, **more: object) -> None:
        """Append to the history; a note is written whole or not at all."""
        facts = {"call": call, "what": what, "at_ns": boottime_ns(), **more}
        os.write(self._history, json.dumps(facts).encode() + b"\n")


class Caller:
    """One that calls, one call after another."""

    def __init__(self, crew: Crew, number: int, *, crashes: bool) -> None:
        self._crew = crew
        self._plan = crew.plan
        self._name = f"{crew.name}.{number}"
        self._random = Random(f"{self._plan.seed}.{self._name}")  # noqa: S311 - to be repeated
        self._crash = (self._random.randrange(MOST_CALLS), self._random.choice(POINTS))
        self._crashes = crashes

    def run(self) -> None:
        """Call until it is time to stop, or to crash."""
        number = 0
        while not self._crew.is_over():
            scope = self._random.choice(self._plan.scopes)
            asked_ns = boottime_ns()
            guard = self._crew.client.budget_guard(
                self._plan.token,
                endpoint=f"/api/v1/{'/'.join(scope)}",
                ttl_seconds=self._plan.ttl_seconds,
                wait_seconds=WAIT_SECONDS,
            )
            try:
                with guard:
                    # It stands so long at least, since it was made after it was asked for.
                    until_ns = asked_ns + int(self._plan.ttl_seconds * 1e9)
                    if boottime_ns() > (asked_ns + until_ns) // 2:
                        guard.cancel()  # too late for a call that may take a while
                        continue
                    guard.status = self._call(number, scope, until_ns)
                    number += 1
            except holdoff.BudgetSpent:
                continue

    def _call(self, number: int, scope: tuple[str, str], until_ns: int) -> int:
        name = f"{self._name}.{number}"
        self._maybe_crash(number, RESERVED)
        path = "/".join(("/api/v1", *scope))
        if self._random.random() < ERRS:
            path += f"?$filter={quote('is no filter')}"
        access_token = Path(self._plan.access_token_file).read_text()
        connection = http.client.HTTPConnection(self._plan.provider)
        try:
            self._crew.note(name, SENT, scope=scope, until_ns=until_ns)
            connection.request("GET", path, headers={"Authorization": f"Bearer {access_token}"})
            self._maybe_crash(number, SENT)
            status = connection.getresponse().status
            self._crew.note(name, ANSWERED, status=status)
        finally:
            connection.close()
        self._maybe_crash(number, ANSWERED)
        return status

    def _maybe_crash(self, number: int, point: str) -> None:
        if self._crashes and self._crash == (number, point):
            self._crew.note(f"{self._name}.{number}", CRASHED, point=point)
            os.kill(os.getpid(), signal.SIGKILL)


def main(plan: Plan) -> None:
    """Keep the processes running until it is time to stop."""
    lives = {number: itertools.count() for number in range(plan.processes)}
    running: dict[int, int] = {}

    def start(number: int) -> None:
        life = next(lives[number])
        # A fork costs little, and gRPC bears it as long as nobody has used it.
        if pid := os.fork():
            running[pid] = number
        else:
            Crew(plan, number, life).run()
            sys.exit()

    for number in lives:
        start(number)
    while running:
        pid, status = os.wait()
        number = running.pop(pid)
        if status == signal.SIGKILL:
            if not Path(plan.stop_file).exists():
                start(number)
        elif status:
            sys.exit(f"process {number} ended with {status}")


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])))
