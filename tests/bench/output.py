"""What it costs that a command's output passes through the wrapper, and that it is searched.

Prints numbers with the machine's facts; asserts nothing. Run it with `make bench`.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

from holdoff._output import Passage
from holdoff._process import Guard, which
from holdoff._recognise import OutputRecogniser
from holdoff.policies import presets
from holdoff_coordinator.policies import policy_message

RUNS = 7
MEGABYTES = 200
ROUND_TRIPS = 2000
MIB = 1 << 20

COMMANDS = {
    "zeroes in writes of 64 KiB": f"dd if=/dev/zero bs=64k count={MEGABYTES * 16} status=none",
    "text in writes of 8 KiB": f"yes 'a line as a job may print it' | head -c {MEGABYTES}M",
}
LINES = {
    "a line without interest": b"a line as a job may print it\n",
    "a line with a call": b"GET https://start.exactonline.nl/api/v1/535193/crm/Accounts 200\n",
    "an error and its URL": b"The remote server returned an error: (404) Not Found.\n"
    b"https://start.exactonline.nl/api/v1/535193/crm/Accounts\n",
}


def wrapper(how: str, command: str) -> None:
    """Run a shell's command under a guard, with its output passed on or connected directly."""
    size = 0

    def on_data(_source: str, data: bytes) -> None:
        nonlocal size
        size += len(data)

    passage = Passage() if how == "passage" else None
    with Guard.start(passage.stdio if passage else None, isolate="never") as guard:
        if passage:
            passage.start(guard, on_data, print)
        argv = ["sh", "-c", command]
        guard.launch(which("sh"), argv, os.environ, fence_boottime_ns=None, grace_seconds=1)
        guard.wait()
        if passage:
            passage.finish()


def start(how: str, command: str, **streams: Any) -> subprocess.Popen[bytes]:
    """Start the wrapper, or with `bare` the command alone."""
    argv = ["sh", "-c", command]
    if how != "bare":
        argv = [sys.executable, __file__, how, command]
    return subprocess.Popen(argv, bufsize=0, **streams)


def seconds(how: str, command: str) -> float:
    """Read all that a command writes, from the first byte to the last."""
    with start(how, command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        left = MEGABYTES * MIB - len(process.stdout.read(1))
        began = time.perf_counter()
        while left:
            left -= len(process.stdout.read(MIB))
        return time.perf_counter() - began


def round_trip_us(how: str) -> float:
    """Send a line to `cat` and wait for it, again and again; the median."""
    with start(how, "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        took = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            process.stdin.write(b"line\n")
            process.stdout.read(5)
            took.append((time.perf_counter() - began) * 1e6)
        process.stdin.close()
        return statistics.median(took)


def searched_mib_per_second(line: bytes) -> float:
    """Search a MiB of lines for errors, in the chunks in which output comes; the best of some."""
    chunk = line * (65_536 // len(line))
    recogniser = OutputRecogniser(policy_message(presets()["exact-online"]))
    took = []
    for _ in range(RUNS):
        began = time.process_time()
        for _ in range(16):
            recogniser.feed(chunk)
        took.append(time.process_time() - began)
    return 16 * len(chunk) / MIB / min(took)


def main() -> None:
    """Measure both by turns, so that noise meets both."""
    say = sys.stdout.write
    say(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {sys.version.split()[0]}\n")
    for name, command in COMMANDS.items():
        took: dict[str, list[float]] = {"bare": [], "direct": [], "passage": []}
        for _ in range(RUNS):
            for how, times in took.items():
                times.append(seconds(how, command))
        bare, direct, passed = map(statistics.median, took.values())
        say(
            f"{MEGABYTES} MiB of {name}: bare {MEGABYTES / bare:.0f} MiB/s, "
            f"under a guard {MEGABYTES / direct:.0f} MiB/s, "
            f"passed on {MEGABYTES / passed:.0f} MiB/s, ratio to bare {bare / passed:.2f}\n"
        )
    for name, line in LINES.items():
        say(f"{name}, repeated: searched at {searched_mib_per_second(line):.0f} MiB/s\n")
    bare, passed = round_trip_us("bare"), round_trip_us("passage")
    say(f"round trip of a line through cat: bare {bare:.0f} us, passed on {passed:.0f} us\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        wrapper(*sys.argv[1:])
    else:
        main()
