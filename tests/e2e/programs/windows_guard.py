"""The guard for Windows with a stand-in for the Job Object: this platform's own means."""

import contextlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdoff import _guard_windows, _platform
else:
    # A guard is started without site-packages; here the first argument names its folder.
    sys.path.insert(0, sys.argv.pop(1))
    import _guard_windows
    import _platform


class Job:
    """All that descends from this process."""

    def __init__(self) -> None:
        _platform.become_subreaper()

    def others(self) -> list[int]:
        """Return the processes in it but this one."""
        found = []
        for pid in _platform.signal_descendants(os.getpid(), ()):
            with (
                contextlib.suppress(FileNotFoundError, ProcessLookupError),  # it ended
                open(f"/proc/{pid}/stat") as file,  # noqa: PTH123 - pathlib loads slowly
            ):
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    found.append(pid)
        return found


_guard_windows.main(Job)  # type: ignore[arg-type] # it is none
