"""The highest fencing token this host has seen for each token.

It is handed in with the next request, so that the numbers rise even after the store lost its
data. Losing this memory does no harm, so that no error here is ever raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff import _files
from holdoff._state import state_folder
from holdoff.names import TokenName

if TYPE_CHECKING:
    from pathlib import Path

_MOST_BYTES = 100


def _path(token: str) -> Path:
    name = TokenName.parse(token)
    return state_folder() / "fencing" / f"{name.app}.{name.token}"


def last_fencing_token(token: str) -> int:
    """Return the highest fencing token seen, or 0."""
    try:
        return max(0, int(_files.read(_path(token), _MOST_BYTES)))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return 0


def remember_fencing_token(token: str, fencing_token: int) -> None:
    """Keep a fencing token if it can be kept."""
    try:
        path = _path(token)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _files.write(path, f"{fencing_token}\n".encode("ascii"))
    except (OSError, RuntimeError):
        return
