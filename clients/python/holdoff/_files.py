"""Writes and reads files that another user may have tampered with.

A file is written under a new random name, and renamed: whole or not at all, and never through a
planted link. A device or a FIFO is written to, and never replaced. Nothing here waits for another
process.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def create(path: Path, flags: int = os.O_WRONLY, mode: int = 0o600) -> int:
    """Create a file that does not exist; return its descriptor.

    Raises:
        OSError: It exists, also as a link, or cannot be created.
    """
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC | _BINARY, mode)


def write(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace a file whole or not at all, also where a link is; a device or FIFO is written to.

    Args:
        path: The file.
        data: Its new content.
        mode: Its permissions, less the umask.
        durable: When this returns it is on the disk.

    Raises:
        OSError: It cannot be written, or the FIFO has no reader.
    """
    if _is_written_in_place(path):
        _write_in_place(path, data)
        return
    draft = path.with_name(f".holdoff-{secrets.token_hex(8)}")
    fd = create(draft, mode=mode)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(data)
            file.flush()
            if durable:
                os.fsync(fd)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def read(path: Path, most_bytes: int) -> bytes:
    """Read the beginning of a regular file, and of nothing else.

    Raises:
        OSError: It cannot be read.
        ValueError: It is a FIFO, a device or a folder.
    """
    fd = os.open(path, os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _CLOEXEC | _BINARY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no regular file")
        return os.read(fd, most_bytes)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Return when what was created, renamed or removed in a folder would survive a crash."""
    fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_written_in_place(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    return _is_the_systems(path) or not (stat.S_ISREG(mode) or stat.S_ISLNK(mode))


def _is_the_systems(path: Path) -> bool:
    """Whether it lies in /dev or /proc, where names such as /dev/stdout are links."""
    if sys.platform == "win32":
        return False
    folder = Path(os.path.realpath(path.parent))
    roots = [Path("/dev"), Path("/proc")]
    return any(folder.is_relative_to(root) for root in roots) and not folder.is_relative_to(
        "/dev/shm"  # noqa: S108 - the one folder there for files of all users
    )


def _write_in_place(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | _NONBLOCK | _CLOEXEC | getattr(os, "O_NOCTTY", 0)
    fd = os.open(path, flags if _is_the_systems(path) else flags | _NOFOLLOW)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)
