"""Become another program that the kernel kills as soon as the starting process is gone.

Run as `python die_with_parent.py PARENT_PID PROGRAM ARG…`; it execs, so no process is left
between. A program of its own, because `preexec_fn` is unsafe in a process with threads (gRPC has
many). The kernel acts when the *thread* that started us ends: start it from the main thread.
Elsewhere than on Linux it only execs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Arm the parent-death signal, then exec; exit 1 when the parent is gone already."""
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # A parent that died before the call above sends no signal any more.
        if os.getppid() != int(parent):
            sys.exit("the starting process is gone")
    os.execv(program, [program, *arguments])  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main()
