"""Runs of a command, each of which gets SIGTERM at another line of ours after its grant.

Its arguments are the coordinator's address and `long` or `short`: whether it tries every line each
time that it runs, or once each line that handles the lease. It prints a JSON object: how many tries
there are, and the first one after which neither nothing had run nor the signal had reached the
command, whose command started after the signal, or whose lease is still active.
"""

import json
import signal
import sys
import uuid
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import holdoff
from holdoff._process import Guard, which
from holdoff._timing import Timing
from holdoff.cli._account import Account, Interrupted, Order
from holdoff.cli._running import Run
from holdoff.cli._voice import Voice

PACKAGE = str(Path(holdoff.__file__).parent)
HANDLING = tuple(f"{PACKAGE}/{name}" for name in ("_client.py", "cli/_running.py"))
Where = tuple[str, int, int]
"""A file, a line of it, and how often it has run."""


class Spy:
    """A guard; the lines after its launch are not counted, since the signal is the command's."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guard, name)

    def launch(self, *words: Any, **more: Any) -> None:
        """Launch, and count no more."""
        self._guard.launch(*words, **more)
        sys.settrace(None)


class Lines:
    """Notes the lines of ours that run from the acceptance on, and gives us the signal at one."""

    def __init__(self, at: Where | None) -> None:
        self._at = at
        self._times: Counter[tuple[str, int]] = Counter()
        self._functions: set[str] = set()
        self.seen: list[Where] = []
        self.is_early = False
        """The signal came before the launch began."""

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """Do so; for `sys.settrace`."""
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) and "contextlib" not in name:
            return None
        if event == "line" and (self.seen or frame.f_code.co_name == "_accept"):
            line = name, frame.f_lineno
            self._times[line] += 1
            self._functions.add(frame.f_code.co_name)
            self.seen.append((*line, self._times[line]))
            if self.seen[-1] == self._at:
                self.is_early = "_launch" not in self._functions
                signal.raise_signal(signal.SIGTERM)
        return self.trace


def once(client: holdoff.Client, at: Where | None = None) -> tuple[list[Where], list[Any]]:
    """Run once with the signal at a line; return the lines that ran, and what was wrong."""
    token = f"apps/s{uuid.uuid4().hex}/tokens/t"
    client.create_token(token, refresh_interval_seconds=3600)
    account, lines = Account(token=token, job="", labels={}), Lines(at)
    command = ["sleep", "30"] if at else ["true"]
    with (
        Voice() as voice,
        Guard.start(isolate="never") as guard,
        Run(client, guard, voice, account, order) as run,
    ):
        run._guard = Spy(guard)  # type: ignore[assignment]
        sys.settrace(lines.trace)
        try:
            run.run(which(command[0]), command, None, break_glass=False)
            ended: str = account.outcome
        except Interrupted:
            ended = "interrupted"
        finally:
            sys.settrace(None)
    used = client.get_token(token).HasField("not_before_time")
    live = list(client.list_leases(token))
    if ended == "interrupted":
        good = not used and not live
    else:
        good = used and not live and not lines.is_early
        good = good and ended == ("signaled" if at else "exited")
    return lines.seen, [] if good else [at, ended, used, len(live)]


endpoint, is_long = sys.argv[1], sys.argv[2] == "long"
order = Order(endpoint, Timing.of(30, None), [], None, "never", None, False, False)
with holdoff.Client(endpoint) as asked:
    seen, first = once(asked)
    places = [one for one in seen if is_long or (one[0] in HANDLING and one[2] == 1)]
    tries = (once(asked, place)[1] for place in places)
    wrong = first or next((one for one in tries if one), [])
sys.stdout.write(json.dumps({"tries": len(places), "wrong": wrong}))
