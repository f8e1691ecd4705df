"""A command that reads lines from its terminal, and says so when it gets SIGINT."""

import os
import signal
import sys
import threading


def read() -> None:
    """Say what comes, up to an empty line."""
    while word := sys.stdin.readline().strip():
        say(f"got {word}")
    os._exit(0)


def say(text: str) -> None:
    """Write a line."""
    os.write(1, f"{text}\n".encode())


# A handler would have to wait for the end of a read that began in the instant before the signal.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
say("front" if os.tcgetpgrp(0) == os.getpgrp() else "back")
threading.Thread(target=read, daemon=True).start()
signal.sigwait([signal.SIGINT])
say("interrupted")
os._exit(9)
