"""A command that counts in a file, as does a grandchild that left its session and its parent."""

import os
import sys
import time


def count(path: str) -> None:
    """Count for ever."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    number = 0
    while True:
        number += 1
        os.pwrite(file, str(number).encode(), 0)
        time.sleep(0.01)


if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        count(f"{sys.argv[1]}2")
    os._exit(0)
count(sys.argv[1])
