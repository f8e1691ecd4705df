"""A process that reports errors as `holdoff run` does, and dies when it is told to.

Its arguments are the token, how many errors it reports, and when it dies by SIGKILL: `unsent` when
they are kept, `before` it sends them, `after` they were counted, or never. Then it reports one by
one, and prints "kept" after each.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import TextIO

import holdoff
from holdoff import _calls
from holdoff._reporting import Reporter
from holdoff._spool import Spool
from holdoff.v1 import budget_pb2

token, count, dies = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def die() -> None:
    """End at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def send(events: Sequence[budget_pb2.Event]) -> None:
    """Report to the coordinator."""
    if dies == "before":
        die()
    client.record_events(events)
    if dies == "after":
        die()


def say(text: str, stream: TextIO = sys.stdout) -> None:
    """Print a line, at once."""
    stream.write(f"{text}\n")
    stream.flush()


def event() -> budget_pb2.Event:
    """Return an error of its own."""
    return _calls.error_event(
        _calls.scope(token, "1", "crm/accounts"), status=400, count=1, job="nightly"
    )


client = holdoff.Client()
spool = Spool()
if dies == "unsent":
    spool.append(*(event() for _ in range(count)))
    die()
reporter = Reporter(send, spool, warn=lambda text: say(text, sys.stderr))
if dies == "never":
    for _ in range(count):
        reporter.report(event())
        say("kept")
else:
    reporter.report(*(event() for _ in range(count)))
reporter.close(20)
