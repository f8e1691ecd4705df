"""A process with secrets leaves no dump of its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from holdoff_coordinator.custody.memory import protect

protect()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))
"""
"""Prints what PR_GET_DUMPABLE gives, and the limits of a dump."""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has prctl")
def test_no_dump() -> None:
    """Fails when another process of the user may read the memory, or a crash writes it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "0", "0"]
