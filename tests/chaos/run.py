"""Lets a fleet work on a store while faults happen, and judges what it saw. See CONTRIBUTING.md.

Ends with code 1 if a promise was broken. `make chaos` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import redis

import holdoff
from tests.chaos import judge
from tests.chaos.faults import FAULTS
from tests.chaos.history import Event, Recorder, boot, read
from tests.chaos.scene import (
    CALLS_MOST,
    CALLS_WINDOW_SECONDS,
    COUNTED,
    INTERVALS,
    QUARANTINE_SECONDS,
    START_SECONDS,
    Scene,
    make_tokens,
    scene,
    until,
)

if TYPE_CHECKING:
    from tests.chaos.faults import Fault

KINDS = ("embedded", "server", "sentinel", "cluster")
ROLES = ("sync", "async", "wrapper", "wrapper", "foreign", "counter")
WARM_UP_SECONDS = 4.0
STALL_SECONDS = 1.5
SETTLE_SECONDS = 3 * QUARANTINE_SECONDS + 15
END_SECONDS = 60.0
STORIES = 3

RULES = judge.Rules(
    intervals=INTERVALS,
    calls_most=CALLS_MOST,
    calls_window_seconds=CALLS_WINDOW_SECONDS,
)


def say(line: str = "") -> None:
    """Write a line of the report."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Fleet:
    """The processes of the fleet; what dies is replaced."""

    def __init__(self, stage: Scene, seed: str, environment: dict[str, str]) -> None:
        self._stage = stage
        self._seed = seed
        self._environment = environment
        self._members: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
        self._born = 0
        for role in ROLES:
            self._start(role)

    def _start(self, role: str) -> None:
        self._born += 1
        name = f"{role}-{self._born}"
        arguments = [role, name, str(self._stage.folder), self._stage.endpoint]
        with (self._stage.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.chaos.fleet", *arguments),
                    *(self._stage.redis_url, self._seed),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
            )
        self._members[name] = (role, process)

    def victim(self, role: str) -> int:
        """Return a process of a role, and record that it is hit."""
        name, pid = next(
            (name, process.pid) for name, (of, process) in self._members.items() if of == role
        )
        self._stage.record("victim", name=name)
        return pid

    def kill(self, role: str) -> None:
        """Kill a process of a role without a word; another takes its place after the fault."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.victim(role), signal.SIGKILL)

    def replace_dead(self) -> None:
        """Start another one for each that died."""
        for name, (role, process) in list(self._members.items()):
            if process.poll() is not None:
                self._stage.record("ended", name=name, code=process.returncode)
                del self._members[name]
                self._start(role)

    def wrappers(self, part: str) -> list[int]:
        """Return the processes of `holdoff run`: those of its part `run`, or `guard`."""
        mark = {"run": "/holdoff\0run\0", "guard": "_guard.py"}[part]
        return sorted(
            pid for pid, command in processes(self._stage.folder).items() if mark in command
        )

    def end(self) -> None:
        """Let all come to an end; record what does not."""
        (self._stage.folder / "stop").touch()
        give_up = time.monotonic() + END_SECONDS
        for _, process in self._members.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, give_up - time.monotonic()))
        mine = {os.getpid(), *(one.process.pid for one in self._stage.coordinators if one.process)}

        def left() -> dict[int, str]:
            return {
                pid: command
                for pid, command in processes(self._stage.folder).items()
                if pid not in mine and "valkey-server" not in command
            }

        while left() and time.monotonic() < give_up:
            time.sleep(0.2)
        for pid, command in left().items():
            self._stage.record("stuck", command=command.replace("\0", " ")[:200])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes(folder: Path) -> dict[int, str]:
    """Return the commands of all processes of a run, which have its folder in their environment."""
    mark = f"HOLDOFF_CHAOS={folder}".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
    return found


class Run:
    """One run on one kind of store."""

    def __init__(self, kind: str, seed: str, names: list[str], folder: Path) -> None:
        self.kind = kind
        self.chance = random.Random(f"{seed}/{kind}")  # noqa: S311 - to repeat a run
        self._seed = seed
        self._folder = folder
        self._names = names
        self.record = Recorder(folder, "chaos")

    def plan(self) -> list[Fault]:
        """Return the faults for this store in a drawn order; say which are left out."""
        for name in self._names:
            if name not in FAULTS:
                raise SystemExit(f"no such fault: {name}; there are {', '.join(FAULTS)}")
        found = [FAULTS[name] for name in self._names or FAULTS]
        found = [one for one in found if self.kind in one.kinds]
        for why in {one.missing() for one in found} - {""}:
            names = ", ".join(one.name for one in found if one.missing() == why)
            say(f"SKIPPED {names}: {why}")
        found = [one for one in found if not one.missing()]
        if not found:
            say(f"SKIPPED {self.kind}: none of these faults happens there")
        if not self._names:
            self.chance.shuffle(found)
        return found

    def go(self, seconds: float) -> None:
        """Let faults happen for so long, and each that is named at least once."""
        environment = {"HOLDOFF_CHAOS": str(self._folder), "GRPC_VERBOSITY": "NONE"}
        with scene(self.kind, self._folder, self.record, environment) as stage:
            stage.fleet = fleet = Fleet(stage, self._seed, environment)
            try:
                self._watch(stage, WARM_UP_SECONDS)
                until(lambda: _works(read(self._folder)), START_SECONDS)
                end, faults = boot() + seconds, self.plan()
                for number in range(1000):
                    if not faults or (boot() > end and number >= len(self._names)):
                        break
                    self._hit(stage, faults[number % len(faults)])
                    self._watch(stage, self.chance.uniform(1, 5))
                self._settle(stage)
            finally:
                fleet.end()
            self._count(stage)

    def _hit(self, stage: Scene, fault: Fault) -> None:
        self.record("fault", name=fault.name, **fault.flags(self.kind))
        try:
            fault.act(stage, self.chance)
        except (redis.RedisError, holdoff.HoldoffError, OSError) as error:
            stage.note(f"the fault failed: {error!r}")
        stage.heal()
        if fault.loses:
            make_tokens(stage.endpoint, START_SECONDS)
        self.record("healed", name=fault.name)

    def _watch(self, stage: Scene, seconds: float) -> None:
        """Let time pass; note what the machine itself holds up, and the length of the trail."""
        end = boot() + seconds
        while (began := boot()) < end:
            time.sleep(0.25)
            if boot() - began > STALL_SECONDS:
                self.record("stall", since=began)
            stage.fleet.replace_dead()
        stage.record_trails()

    def _settle(self, stage: Scene) -> None:
        """Wait until each token was granted once more."""
        self.record("settle")
        since, give_up = boot(), boot() + SETTLE_SECONDS
        while boot() < give_up:
            self._watch(stage, 1)
            events = read(self._folder)
            if not list(judge.available([*events, _closed()], RULES)) and boot() > since + 2:
                break
        self.record("closed")

    def _count(self, stage: Scene) -> None:
        with contextlib.suppress(holdoff.HoldoffError), holdoff.Client(stage.endpoint) as client:
            used = {
                one.scope.division: one.used
                for one in client.list_budgets(COUNTED)
                if one.limit == "errors" and one.scope.division
            }
            self.record("counts", token=COUNTED, used=used)


def _works(events: list[Event]) -> bool:
    """Tell whether the whole fleet has begun."""
    done = {event.what for event in events}
    return {"released", "ran", "locked", "reported", "called"} <= done


def _closed() -> Event:
    return Event(boot(), "chaos", "closed")


def report(kind: str, events: list[Event]) -> list[judge.Violation]:
    """Say what happened, and return what promises were broken."""
    broken = judge.judge(events, RULES)
    zero = events[0].at
    done = Counter(event.what for event in events)
    faults = Counter(event.get("name") for event in events if event.what == "fault")
    say(
        f"{kind}: {done['granted']} leases, {done['not-granted']} not granted, "
        f"{done['lost']} lost, {done['ran']} runs, {done['locked']} locks, "
        f"{done['reported']} reports, {done['called']} reserved calls; "
        f"{faults.total()} faults; {len(broken)} violations"
    )
    failed = [event for event in events if "the fault failed" in str(event.get("text"))]
    for event in failed:
        say(f"  {event.get('text')}")
    times = judge.unavailability(events, RULES)
    say(f"  {'time to the next grant of a token':<34} times  median   worst")
    say(f"  {'(between two grants)':<34}        {judge.ordinary_gap(events, RULES):5.1f} s")
    for name, found in sorted(times.items()):
        count = faults.get(name, 0) or len(found)
        say(f"  {name:<34} {count:5}  {statistics.median(found):5.1f} s  {max(found):5.1f} s")
    for rule, count in Counter(one.rule for one in broken).items():
        say(f"  VIOLATED {rule}: {count} times")
    for one in broken[:STORIES]:
        say(f"  {one.rule} of {one.about or 'the fleet'} at {one.at - zero:.3f}: {one.text}")
        for line in judge.story(events, one, zero):
            say(f"    {line}")
    return broken


def main() -> int:
    """Run on one kind of store or on all, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for all kinds together")
    parser.add_argument("--store", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--seed", default=str(random.randrange(10**6)))  # noqa: S311
    parser.add_argument("--faults", default="", help="only these, in this order; with commas")
    parser.add_argument("--keep", type=Path, help="folder to keep the histories in")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left
    logging.disable()  # of the clients of faults
    kinds = KINDS if options.store == "all" else (options.store,)
    names = [name for name in options.faults.split(",") if name]
    say(f"seed {options.seed}, load {os.getloadavg()[0]:.1f}")
    failed = []
    for kind in kinds:
        with contextlib.ExitStack() as stack:
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=options.keep.absolute()))
                say(f"its history: {folder}")
            else:
                removed = tempfile.TemporaryDirectory(
                    prefix="holdoff-chaos-", ignore_cleanup_errors=True
                )
                folder = Path(stack.enter_context(removed))
            Run(kind, options.seed, names, folder).go(options.seconds / len(kinds))
            if report(kind, read(folder)):
                failed.append(kind)
    for kind in failed:
        faults = f" FAULTS={options.faults}" if names else ""
        seconds = f"{options.seconds / len(kinds):g}"
        say(f"repeat it: make chaos STORE={kind} SECONDS={seconds} SEED={options.seed}{faults}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
