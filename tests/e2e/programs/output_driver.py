"""The wrapper's part in tests of the passage: runs a command through one, and reports what it sees.

Its one argument is a JSON object with `argv` and `report`, a file to which it appends a JSON object
for each thing that happens, and with what is to be special about this run. What was written it
reports as hashes.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from holdoff import _output
from holdoff._process import Guard, boottime_ns, caught_signals, which

options: dict[str, Any] = json.loads(sys.argv[1])
seen = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}


def report(**what: object) -> None:
    """Append to the report."""
    with Path(options["report"]).open("a") as file:
        file.write(json.dumps(what) + "\n")


def on_data(stream: _output.Source, data: bytes) -> None:
    """Take in what the command wrote."""
    if options.get("fail"):
        raise ValueError("the refresh token is 4711")
    seen[stream].update(data)


def leak(stdout: int) -> None:
    """Keep the passage open, as a process that nobody may signal would."""
    while options["leak"] == "chatter":
        os.write(stdout, b"x" * 1000)
        time.sleep(0.001)
    signal.pause()


def fence() -> int | None:
    """When all must have ended, if that is `fence` seconds from now."""
    return boottime_ns() + int(options["fence"] * 10**9) if "fence" in options else None


def renew(guard: Guard) -> None:
    """Move the fence ten times a second."""
    while until := fence():
        guard.extend(until)
        report(renewed=True)
        time.sleep(0.1)


def finish_twice(passage: _output.Passage) -> None:
    """Have another thread finish, and the caller when that one waits."""
    streams = passage._streams
    threading.Thread(target=passage.finish, daemon=True).start()
    while streams[0]._give_up_at > time.monotonic() + options["patience"]:
        time.sleep(0.001)
    passage.finish()


options.setdefault("patience", 5)
_output._PATIENCE_SECONDS = options["patience"]
with (
    _output.Passage() as passage,
    Guard.start(passage.stdio, isolate="never") as guard,
):
    if "leak" in options and os.fork() == 0:
        leak(passage.stdio.stdout)
    passage.start(guard, on_data, lambda text: report(warning=text))
    with caught_signals(guard.signal):
        guard.launch(
            which(options["argv"][0]),
            options["argv"],
            os.environ,
            fence_boottime_ns=fence(),
            grace_seconds=1,
        )
        threading.Thread(target=renew, args=[guard], daemon=True).start()
        outcome = guard.wait(lambda event: report(event=event.kind))
        report(ended=outcome.status)
    if options.get("twice"):
        finish_twice(passage)
    passage.finish()
report(seen={stream: hash_.hexdigest() for stream, hash_ in seen.items()})
sys.stdout.flush()
os._exit(outcome.status or 0)
