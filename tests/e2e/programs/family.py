"""A command of three generations, the last in a session of its own and with no parent left.

Each appends to a diary: at its start, and then fifty times a second, its generation, the time and
"lives"; and "TERM" when it gets that signal, which with a second argument it does not obey.
"""

import os
import signal
import sys
import time


def note(word: str) -> None:
    """Append a line, whole or not at all."""
    os.write(diary, f"{generation} {time.time():.6f} {word}\n".encode())


def told(*_: object) -> None:
    """Note that it is to end."""
    note("TERM")
    if not stubborn:
        os._exit(0)


stubborn = len(sys.argv) > 2
signal.signal(signal.SIGTERM, told)
diary = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
generation = 1
if os.fork() == 0:
    generation = 2
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        generation = 3
while True:
    note("lives")
    time.sleep(0.02)
