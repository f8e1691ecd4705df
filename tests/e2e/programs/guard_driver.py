"""The wrapper's part in tests of the guard: runs a command under one, and reports what it sees.

Its one argument is a JSON object with `argv` and `report`, a file to which it appends a JSON object
for each thing that happens, and with what is to be special about this run.
"""

import ctypes
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from holdoff._outcome import Event
from holdoff._process import Guard, boottime_ns, caught_signals, which

options: dict[str, Any] = json.loads(sys.argv[1])


def report(**what: object) -> None:
    """Append to the report."""
    with Path(options["report"]).open("a") as file:
        file.write(json.dumps(what) + "\n")


def fence() -> int | None:
    """When all must have ended, if that is `fence` seconds from now."""
    seconds = options.get("fence")
    return None if seconds is None else boottime_ns() + int(seconds * 10**9)


def renew(guard: Guard) -> None:
    """Move the fence each `renew` seconds."""
    while True:
        time.sleep(options["renew"])
        until = fence()
        assert until is not None
        guard.extend(until)
        report(fence=until)


def obey(guard: Guard) -> None:
    """Call the guard's methods that are ordered, each as a JSON list with its arguments."""
    while True:
        with Path(options["orders"]).open() as orders:
            for order in orders:
                method, *arguments = json.loads(order)
                getattr(guard, method)(*arguments)
                report(obeyed=method)


def pass_on(guard: Guard, signum: int) -> None:
    """Give the command a signal that we got."""
    guard.signal(signum)
    report(passed_on=signum)


def tell(event: Event) -> None:
    """Report what happens to the command."""
    report(event=event.kind, reason=event.reason, signal=event.signal)


def in_thread(call: Any, guard: Guard) -> None:
    """Do it beside the rest."""
    threading.Thread(target=call, args=[guard], daemon=True).start()


def main(guard: Guard) -> int:
    """Run the command; return our exit code."""
    if options.get("leak") and os.fork() == 0:
        # Somebody else who keeps the pipe to the guard open.
        report(leak=os.getpid())
        threading.Event().wait()
    with caught_signals(lambda signum: pass_on(guard, signum)):
        first = fence()
        report(wrapper=os.getpid(), guard=guard.pid, isolated=guard.isolated, fence=first)
        if options.get("never_launch"):
            report(signalled=guard.signal(15))
            threading.Event().wait()
        if "pause_at_once" in options:
            guard.pause()
        if "end_at_once" in options:
            guard.end(options["end_at_once"])
        guard.launch(
            which(options["argv"][0]),
            options["argv"],
            {**os.environ, "MARK": options["mark"], "FILLER": "x" * options.get("filler", 0)},
            fence_boottime_ns=first,
            grace_seconds=options.get("grace", 1),
        )
        report(launched=True)
        if options.get("abandon"):
            return 3
        if "signal_at_once" in options:
            guard.signal(options["signal_at_once"])
        if "renew" in options:
            in_thread(renew, guard)
        if "orders" in options:
            in_thread(obey, guard)
        outcome = guard.wait(tell)
    at = boottime_ns()
    report(
        outcome={
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "ended_by": outcome.ended_by,
            "cannot_run": outcome.cannot_run and str(outcome.cannot_run),
            "status": outcome.status,
            "survivors": outcome.survivors,
            "at": at,
        }
    )
    return 0 if outcome.status is None else outcome.status


if options.get("unprivileged"):
    ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)  # drops CAP_SYS_ADMIN from the bounding set
if options.get("no_tracing"):
    ctypes.CDLL(None).prctl(24, 19, 0, 0, 0)  # the same with CAP_SYS_PTRACE
with Guard.start(isolate=options["isolate"]) as started:
    status = main(started)
sys.exit(status)
