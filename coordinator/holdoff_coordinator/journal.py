"""How severe a line on standard error is, for the journal of systemd.

A line may begin with `<N>`, N being a priority of syslog (sd-daemon(3)). The journal takes it off
and keeps it, so that `journalctl --priority err` finds the line.
"""

from __future__ import annotations

import os

_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}


def with_priority(level: str, text: str) -> str:
    """Begin each line with its priority where the journal reads it."""
    if not _is_read_by_the_journal():
        return text
    return "\n".join(f"<{_PRIORITIES[level]}>{line}" for line in text.split("\n"))


def _is_read_by_the_journal() -> bool:
    """Tell whether standard error is the stream that systemd connected to it (systemd.exec(5))."""
    try:
        stream = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
