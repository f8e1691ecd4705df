"""A file with the current access token, for programs that read it before each call."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final, Self

from holdoff import _files
from holdoff._platform import boottime_ns
from holdoff._timing import SECOND
from holdoff.errors import NoAccessToken, Unavailable

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from holdoff.custody.access import Usable
    from holdoff.custody.access_tokens import AccessToken

LOOK_SECONDS: Final = 1.0
"""How soon an access token that was withdrawn is gone from the file."""


class AccessTokenFile:
    """Keeps an access token in a file that only its owner can read.

    The file is replaced whole at each renewal, and there is none while there is no access token
    that calls may begin with. Use it as a context manager: leaving it removes the file.

    Args:
        path: Of the file; one that exists is replaced.
        say: Called with the reason when there is no access token, once for each.

    Raises:
        ValueError: The path is that of a folder, link, device or FIFO.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"{path} is no regular file")
        self._path = path
        self._say = say
        self._written: Usable | None = None
        self._said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        self._written = None

    def remove_if_too_old(self) -> None:
        """Remove the file if no call may begin with what is in it."""
        if self._written and boottime_ns() >= self._written.until_ns:
            self.remove()

    def keep(self, access: AccessToken, stop: threading.Event) -> None:
        """Keep the file current until a stop.

        Raises:
            HoldoffError: The caller lost the role, the grant is gone, or `access` was closed.
            OSError: The file cannot be written.
        """
        while not stop.is_set():
            self.update(access)
            left = LOOK_SECONDS
            if self._written:
                left = min(left, (self._written.until_ns - boottime_ns()) / SECOND)
            stop.wait(max(0.0, left))

    def update(self, access: AccessToken) -> None:
        """Write the access token if it is another one; remove the file if there is none.

        Raises:
            HoldoffError: There will be none any more.
            OSError: The file cannot be written.
        """
        try:
            usable = access.usable(wait_seconds=0)
        except (NoAccessToken, Unavailable) as error:
            if str(error) != self._said:
                self._said = str(error)
                self._say(self._said)
            self.remove()
            return
        self._said = ""
        if self._written is None or usable.access_token != self._written.access_token:
            _files.write(self._path, f"{usable.access_token}\n".encode())
        self._written = usable
