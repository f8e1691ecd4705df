"""A command that notes the signals that it gets, by number and time, and lives on.

It creates its file when it listens.
"""

import os
import signal
import sys
import time

# A handler would have to wait for the next signal if its own came right before a sleep.
signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while True:
    signum = signal.sigwait(signals)
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    os.write(file, f"{int(signum)} {now}\n".encode())
