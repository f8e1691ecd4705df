"""Keeps the memory of a process with secrets out of dumps and away from other processes."""

from __future__ import annotations

import ctypes
import resource
import sys

import structlog

log = structlog.get_logger()

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def protect() -> None:
    """Leave no core dump; on Linux also let no other process of this user read our memory.

    A handler of crashes that the kernel pipes dumps into ignores the limit on their size, but not
    that a process is not dumpable.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        log.warning(
            "a core dump of this process may be written, with secrets",
            remedy="limit core dumps of the coordinator's user, as with LimitCORE=0",
        )
