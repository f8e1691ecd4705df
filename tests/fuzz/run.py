"""Looks for inputs that break the code. See CONTRIBUTING.md.

Ends with code 1 if one was found. `make fuzz` runs it. Each target runs in a process of its own, so
that one that crashes or hangs tells its input too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.engine import HANG_SECONDS, Target, keep, limited

if TYPE_CHECKING:
    from tests.fuzz.engine import Check

TARGETS = {
    "requests": "tests.fuzz.requests",
    "policies": "tests.fuzz.documents",
    "access": "tests.fuzz.documents",
    "keys": "tests.fuzz.documents",
    "seeds": "tests.fuzz.documents",
    "spool": "tests.fuzz.documents",
    "output": "tests.fuzz.output",
    "answers": "tests.fuzz.output",
    "texts": "tests.fuzz.texts",
    "simulator": "tests.fuzz.simulator",
    "simulator-api": "tests.fuzz.simulator_api",
    "commands": "tests.fuzz.commands",
}
"""Targets, and the modules that have them in a dictionary `TARGETS`."""

SHARES = {"requests": 6}
"""Parts of the time for all; of targets that are not named, one."""
ROUNDS, ROUND = 8, 50
"""So many rounds between two preparations of a target, of so many inputs. Hypothesis varies within
a round what it drew, and begins anew with each."""
_FOUND = 3
_INPUT = Path("build/fuzz").absolute()


def target(name: str) -> Target:
    """Return a target by its name."""
    found: Target = import_module(TARGETS[name]).TARGETS[name]
    return found


def say(line: str = "") -> None:
    """Write a line of the report."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Hunt:
    """Tries inputs on one target for a while."""

    def __init__(self, name: str, seconds: float) -> None:
        self._target = target(name)
        self._path = _INPUT / name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._end = time.monotonic() + seconds
        self.tried = 0
        self.last = b""
        """The input that was tried last: the smallest one of a failure when Hypothesis ends."""

    def go(self, number: str) -> Exception | None:
        """Try inputs that a seed draws; return the failure of the last one, if any."""
        for turn in itertools.count():
            if time.monotonic() > self._end:
                return None
            try:
                with self._target.opened() as check:
                    for part in range(ROUNDS):
                        if time.monotonic() < self._end:
                            self._round(f"{number}/{turn}/{part}", check)
            except Exception as error:  # noqa: BLE001 - whatever an input did
                return error
        return None

    def _round(self, number: str, check: Check) -> None:
        @seed(random.Random(number).getrandbits(64))  # noqa: S311 - to repeat a run
        @settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(self._target.inputs)
        def one(data: bytes) -> None:
            if time.monotonic() > self._end:
                return
            self.last = data
            self._path.write_bytes(data)
            self.tried += 1
            with limited(data):
                check(data)

        one()


def hunt(name: str, seconds: float, number: str) -> int:
    """Try inputs on one target in this process, and report."""
    one, began = Hunt(name, seconds), time.monotonic()
    error = one.go(number)
    rate = one.tried / (time.monotonic() - began)
    say(f"{name:<10} {one.tried:7} inputs, {rate:7.1f} a second")
    if error is None:
        return 0
    traceback.print_exception(error)
    say_kept(name, keep(name, one.last), number, seconds)
    return _FOUND


def say_kept(name: str, path: Path, number: str, seconds: float) -> None:
    """Say where an input is, and how to repeat what it does."""
    say(f"FAILED {name}: the input is in {path.relative_to(Path.cwd())}; commit it with the fix")
    say(f"repeat it: .venv/bin/pytest 'tests/fuzz/test_corpus.py::test_kept[{name}-{path.name}]'")
    say(f"repeat the run: make fuzz TARGET={name} SECONDS={seconds:g} SEED={number}")


def supervise(name: str, seconds: float, number: str) -> bool:
    """Try inputs on one target in a process; return whether all passed."""
    arguments = ["--alone", "--target", name, "--seconds", str(seconds), "--seed", number]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.run", *arguments],
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        stdin=subprocess.DEVNULL,
    )
    try:
        # It shrinks what it found for five minutes at most.
        code = process.wait(seconds + 300 + 2 * HANG_SECONDS)
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        process.kill()
        process.wait()
    if code not in (0, _FOUND):
        say(f"{name}: its process hung or ended with code {code}")
        say_kept(name, keep(name, (_INPUT / name).read_bytes()), number, seconds)
    return code == 0


def main() -> int:
    """Run one target, or all in turn, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seed", default=str(random.randrange(10**6)))  # noqa: S311
    parser.add_argument("--alone", action="store_true", help="in this process")
    options = parser.parse_args()
    if options.alone:
        return hunt(options.target, options.seconds, options.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    say(f"seed {options.seed}, load {os.getloadavg()[0]:.1f}")
    names = list(TARGETS) if options.target == "all" else [options.target]
    shares = {name: SHARES.get(name, 1) for name in names}
    part = options.seconds / sum(shares.values())
    passed = [supervise(name, part * shares[name], options.seed) for name in names]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
