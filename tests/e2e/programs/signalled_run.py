"""Runs of `true`, each of which gets SIGTERM at another line of ours after its lease was granted.

Its arguments are the coordinator's address and how many lines to try. It prints a JSON object: how
many lines there are, and the tries after which neither nothing had run nor the signal had reached
the command, or whose lease lives on.
"""

import json
import signal
import sys
import uuid
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
    """Counts lines of ours from the acceptance on, and gives us the signal at one of them."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.count = 0

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """Do so; for `sys.settrace`."""
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) and "contextlib" not in name:
            return None
        if event == "line" and (self.count or frame.f_code.co_name == "_accept"):
            self.count += 1
            if self.count == self._at:
                signal.raise_signal(signal.SIGTERM)
        return self.trace


def once(client: holdoff.Client, at: int) -> tuple[int, list[Any]]:
    """Run once with the signal at a line; return how many there were, and what was wrong."""
    token = f"apps/s{uuid.uuid4().hex}/tokens/t"
    client.create_token(token, refresh_interval_seconds=3600)
    account, lines = Account(token=token, job="", labels={}), Lines(at)
    with (
        Voice() as voice,
        Guard.start(isolate="never") as guard,
        Run(client, guard, voice, account, order) as run,
    ):
        run._guard = Spy(guard)  # type: ignore[assignment]
        sys.settrace(lines.trace)
        try:
            run.run(which("true"), ["true"], None, break_glass=False)
            ended: str = account.outcome
        except Interrupted:
            ended = "interrupted"
        finally:
            sys.settrace(None)
    used = client.get_token(token).HasField("not_before_time")
    live = list(client.list_leases(token))
    good = (ended == "interrupted") != used and not live
    return lines.count, [] if good else [at, ended, used, len(live)]


endpoint, tries = sys.argv[1], int(sys.argv[2])
order = Order(endpoint, Timing.of(30, None), [], None, "never", None, False)
with holdoff.Client(endpoint) as asked:
    most, first = once(asked, 0)
    rest = [once(asked, line)[1] for line in range(1, most + 1, max(1, most // tries))]
sys.stdout.write(json.dumps({"lines": most, "wrong": [one for one in (first, *rest) if one]}))
