"""A command that looks into its guard, and into the init between them, by /proc.

It writes down for each how many of its descriptors it could open, and whether it could read its
memory.
"""

import json
import os
import sys
from pathlib import Path


def parent_of(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def look_into(pid: int) -> dict[str, object]:
    """Try to reach what a process has."""
    opened, memory = 0, False
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            entry.readlink()
            opened += 1
    except PermissionError:
        pass
    try:
        with Path(f"/proc/{pid}/mem").open("rb"):
            memory = True
    except PermissionError:
        pass
    return {"opened": opened, "memory": memory}


init = os.getppid()
found = {"init": look_into(init), "guard": look_into(parent_of(init))}
draft = Path(f"{sys.argv[1]}.draft")
draft.write_text(json.dumps(found))
draft.replace(sys.argv[1])
