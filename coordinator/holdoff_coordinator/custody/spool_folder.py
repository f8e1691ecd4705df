"""The directory of a replica's spool: made, checked, and held against a second replica."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK: Final = ".lock"
"""Hidden, so that it is no answer."""
_PATIENCE_SECONDS: Final = 2.0
"""How long a coordinator that ends may still hold the directory."""
_POLL_SECONDS: Final = 0.05
_OPTION: Final = "--custody-spool-dir"


class SpoolFolderError(Exception):
    """The directory cannot be used; the message says why, and what to do."""


class SpoolInUseError(SpoolFolderError):
    """Another coordinator uses the directory."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create a directory if needed, and keep other coordinators out of it inside the block.

    Raises:
        SpoolFolderError: It cannot be used.
        SpoolInUseError: Another coordinator uses it.
    """
    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(folder)
        lock = _locked(folder)
    except OSError as error:
        raise SpoolFolderError(_explained(folder, error)) from error
    try:
        yield
    finally:
        os.close(lock)


def _require_private(folder: Path) -> None:
    """Refuse a directory in which another user could replace or remove answers.

    Root may own it, and our own group may write to it: so Kubernetes provides volumes.
    """
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise SpoolFolderError(
            f"{folder} belongs to user {found.st_uid}, who could change what is in it: give it to "
            f"user {os.geteuid()}, or choose another with {_OPTION}"
        )
    if found.st_mode & 0o002 or (found.st_mode & 0o020 and found.st_gid != os.getegid()):
        raise SpoolFolderError(
            f"other users may write to {folder}, and remove what is in it: chmod go-w {folder}, "
            f"or choose another with {_OPTION}"
        )


def _locked(folder: Path) -> int:
    """Return a descriptor that holds the lock file; this also shows that we may write."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(folder / _LOCK, flags, 0o600)
    try:
        _lock(folder, lock)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _lock(folder: Path, lock: int) -> None:
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                break
            time.sleep(_POLL_SECONDS)
        else:
            return
    pid = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
    raise SpoolInUseError(
        f"{folder} is the spool of another coordinator (process {pid}): give each replica a "
        f"directory of its own with {_OPTION}"
    )


def _explained(folder: Path, error: OSError) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            remedy = f"give it to user {os.geteuid()}, or choose another with {_OPTION}"
        case errno.ENOTDIR | errno.EEXIST | errno.EISDIR | errno.ELOOP:
            remedy = f"something else is there: move it away, or choose another with {_OPTION}"
        case errno.ENOSPC | errno.EDQUOT:
            remedy = f"free space on its disk, or choose another with {_OPTION}"
        case _:
            remedy = f"choose a local directory with {_OPTION}"
    return f"cannot use {error.filename or folder} ({error.strerror}): {remedy}"
