"""Where this user's programs keep what outlives a run."""

import os
from pathlib import Path


def state_folder() -> Path:
    """Return our folder below the XDG state folder; it may not exist yet.

    Raises:
        RuntimeError: There is no home directory.
    """
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():  # as the XDG specification asks
        home = Path.home() / ".local" / "state"
    return home / "holdoff"
