"""A job of the fleet: notes its start, its work and its end, until it finds that it may end.

Its arguments are its number, a diary to which all jobs append, and the file that lets it end.
"""

import json
import os
import sys
import time

number, diary, may_end = int(sys.argv[1]), sys.argv[2], sys.argv[3]
file = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(what: str) -> None:
    """Append a line, whole or not at all."""
    facts = {
        "run": number,
        "what": what,
        "at": time.time(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "lease": os.environ["HOLDOFF_LEASE"],
        "fencing": int(os.environ["HOLDOFF_FENCING_TOKEN"]),
    }
    os.write(file, json.dumps(facts).encode() + b"\n")


note("start")
while not os.path.exists(may_end):  # noqa: PTH110 - pathlib loads slowly
    time.sleep(0.01)
    note("works")
note("end")
