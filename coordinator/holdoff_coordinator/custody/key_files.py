"""Master keys in files: a directory with one file for each key, `ID.key`.

Such a file has 32 random bytes in base64, on a line of its own; lines that begin with # are
comments. Only its owner may read it, who is our user or root. The group may read a file of root's:
that is how Kubernetes mounts a Secret for a container, and systemd a credential for a service.
Links are followed, because a mounted Secret consists of them.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import structlog

from holdoff._files import create, sync_folder
from holdoff._text import quoted
from holdoff_coordinator.custody.sealing import KEY_BYTES, MasterKey, is_key_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

log = structlog.get_logger()

MOST_KEYS: Final = 100
_MOST_BYTES: Final = 4096
_SUFFIX: Final = ".key"
_CREATED: Final = re.compile(rb"# created: ([0-9]{4}(?:-[0-9]{2}){2}T[0-9]{2}(?::[0-9]{2}){2}Z)")
_HEAD: Final = """\
# A master key of Holdoff. Keep it secret, and keep a copy apart from the store's backups:
# what it encrypted cannot be read without it.
# created: {created}
"""


class KeyFileError(ValueError):
    """A key, or the directory of keys, cannot be used; the message says which one, and why."""


def read_keys(folder: Path) -> Mapping[str, MasterKey]:
    """Read all keys of a directory, by id.

    Raises:
        KeyFileError: The directory or a key in it cannot be used, or there is none.
    """
    keys = {key.id: key for key in map(read_key, key_paths(folder))}
    if not keys:
        raise KeyFileError(
            f"{folder} has no key: holdoff-coordinator key generate --key-dir {folder}"
        )
    return keys


def key_paths(folder: Path) -> Sequence[Path]:
    """Return the files of a directory that should be keys. Hidden files are none of ours.

    Raises:
        KeyFileError: The directory cannot be read, others can change it, or it has too many.
    """
    try:
        found = folder.stat()
        paths = [path for path in sorted(folder.iterdir()) if path.suffix == _SUFFIX]
    except OSError as error:
        raise KeyFileError(f"cannot read {folder}: {error.strerror}") from None
    _require_ours(folder, found)
    # In a directory with the sticky bit, as Kubernetes mounts it, nobody replaces others' files.
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise KeyFileError(f"other users can change the keys in {folder}: chmod go-w {folder}")
    if len(paths) > MOST_KEYS:
        raise KeyFileError(f"{folder} has more than {MOST_KEYS} keys: move old ones away")
    return [path for path in paths if not path.name.startswith(".")]


def read_key(path: Path) -> MasterKey:
    """Read one key.

    Raises:
        KeyFileError: It cannot be read, others can read it, or it is not a key.
    """
    if not is_key_id(path.stem):
        raise KeyFileError(
            f"{path.parent}/{quoted(path.name)[1:-1]}: rename it to ID{_SUFFIX}, with an ID of 1 "
            "to 63 of a-z, 0-9 and -"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from None
    try:
        _require_private(path, os.fstat(descriptor))
        key = _parse(path.stem, os.read(descriptor, _MOST_BYTES + 1))
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if key is None:
        raise KeyFileError(
            f"{path} is not a key, which is a line of {KEY_BYTES} random bytes in base64, after "
            "lines that begin with #: restore it, or move it away"
        )
    return key


def _require_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise KeyFileError(f"{path} is not a regular file")
    _require_ours(path, found)
    if found.st_mode & (0o037 if found.st_uid == 0 else 0o077):
        raise KeyFileError(f"other users can read or change the key {path}: chmod 600 {path}")


def _require_ours(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(
            f"{path} belongs to user {found.st_uid}, who can change it: give it to user "
            f"{os.geteuid()}{', or to root' if os.geteuid() else ''}"
        )


def _parse(key_id: str, raw: bytes) -> MasterKey | None:
    """Read the content of a file; None if that is not a key."""
    lines = [line.strip() for line in raw.split(b"\n") if line.strip()]
    texts = [line for line in lines if not line.startswith(b"#")]
    if len(texts) != 1 or len(raw) > _MOST_BYTES:
        return None
    try:
        secret = base64.b64decode(texts[0], validate=True)
    except binascii.Error:
        return None
    created = next((match[1].decode() for line in lines if (match := _CREATED.fullmatch(line))), "")
    return MasterKey(key_id, secret, created) if len(secret) == KEY_BYTES else None


def create_key(folder: Path, key_id: str | None = None) -> MasterKey:
    """Write a new random key, which then survives a crash. Nothing is overwritten.

    Args:
        folder: Where; created if needed.
        key_id: Its id; None for one that says when it was created.

    Raises:
        KeyFileError: The id is wrong or there is such a key, or the file cannot be written.
    """
    now = datetime.now(UTC)
    key_id = now.strftime("%Y%m%d-%H%M%S") if key_id is None else key_id
    if not is_key_id(key_id):
        raise KeyFileError("the id of a key has 1 to 63 of a-z, 0-9 and -")
    key = MasterKey(key_id, secrets.token_bytes(KEY_BYTES), now.strftime("%Y-%m-%dT%H:%M:%SZ"))
    path = folder / f"{key_id}{_SUFFIX}"
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700)
            sync_folder(folder.parent)
        if len(key_paths(folder)) >= MOST_KEYS:
            raise KeyFileError(f"{folder} has {MOST_KEYS} keys already: move old ones away")
        _write(path, key)
    except FileExistsError:
        raise KeyFileError(f"{path} exists, and is not overwritten: choose another id") from None
    except OSError as error:
        raise KeyFileError(f"cannot create {path}: {error.strerror}") from None
    return key


def _write(path: Path, key: MasterKey) -> None:
    """Write a file whole or not at all, under a name that nothing has yet."""
    draft = path.with_name(f".holdoff-{secrets.token_hex(8)}")
    descriptor = create(draft)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_HEAD.format(created=key.created).encode())
            file.write(base64.b64encode(key.secret) + b"\n")
            file.flush()
            os.fsync(descriptor)
        path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


class KeyDirectory:
    """The keys of a directory, read again when it changes.

    A change that is wrong changes nothing: keys that are in use do not vanish by a typing error. A
    key whose file was removed is forgotten. A file with an id that is in use must not get another
    key, because nothing could be opened any more that the first one sealed.

    Raises:
        KeyFileError: It cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked_at = self._stamp()
        self._keys = read_keys(folder)
        self.problem = ""
        """Why the content of the directory is not in effect."""

    def keys(self) -> Mapping[str, MasterKey]:
        """Return the keys of the directory when it was last valid, by id."""
        self.look()
        return self._keys

    def look(self) -> None:
        """Read the directory again if it changed, or could not be read."""
        stamp = self._stamp()
        if stamp == self._looked_at and not self.problem:
            return
        self._looked_at = stamp
        problem = self._read_again()
        if not problem:
            log.info("custody keys read again", folder=str(self._folder), keys=sorted(self._keys))
        elif problem != self.problem:
            log.error(
                "the custody keys stay as they were",
                reason=problem,
                remedy="correct the file that the reason names; it is read again within a second",
            )
        self.problem = problem

    def _read_again(self) -> str:
        """Take the keys as they are now; return why not, if so."""
        try:
            keys = read_keys(self._folder)
        except KeyFileError as error:
            return str(error)
        for key_id in sorted(keys.keys() & self._keys.keys()):
            if keys[key_id].secret != self._keys[key_id].secret:
                return (
                    f"{self._folder}/{key_id}{_SUFFIX} has another key than before: give a new key "
                    "a new id"
                )
        self._keys = keys
        return ""

    def _stamp(self) -> tuple[tuple[str | int, ...], ...] | None:
        try:
            paths = (self._folder, *key_paths(self._folder))
            found = [(path.name, path.stat()) for path in paths]
        except (OSError, KeyFileError):
            return None
        return tuple(
            (name, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in found
        )
