"""Makes the standard streams usable, however the process was started."""

from __future__ import annotations

import io
import os
import sys

from holdoff._platform import occupy_standard_descriptors


def prepare() -> None:
    """Open what is closed of stdin, stdout and stderr, and let stdout take any text.

    The first thing that a command does: a descriptor that gRPC opens must not become one of them.
    """
    occupy_standard_descriptors()
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.fdopen(fd, mode, encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name, null)
    # Text that the locale has no letters for: a question mark, and no traceback.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
