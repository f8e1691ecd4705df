"""The spool: answers on disk, sealed, until they are stored.

The sender writes an answer here before it reports it, so that the answer outlives a crash of the
coordinator. A file has a key of its own, which only the coordinator's keys can open.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field

from holdoff_coordinator.custody import outcomes

TYPE_CHECKING = False  # `typing` would cost the sender time
if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_MAGIC = b"holdoff-answer-1\n"
_NONCE_BYTES = 12
_SIZE_BYTES = 4
_SUFFIX = ".draft"
_ABANDONED_SECONDS = 3600
"""No sender lives as long."""
_ROOM = 64 * 1024
"""For all but the body."""


@dataclass(frozen=True, slots=True)
class Spooling:
    """Where one answer goes, and how it is sealed."""

    path: str
    """Its file, in a directory that exists."""
    key: bytearray = field(repr=False)
    """32 random bytes, for this answer only."""
    wrapped_key: bytes = field(repr=False)
    """The same, sealed by the coordinator's keys; stands in the file."""


@dataclass(frozen=True, slots=True)
class Spooled:
    """An answer from the spool."""

    outcome: outcomes.Outcome
    boot_id: str

    def of_this_boot(self) -> bool:
        """Tell whether its instants are of the clock that runs now; False where it is not known."""
        return self.boot_id != "" and self.boot_id == boot_id()


class Draft:
    """A file of the spool that is being written.

    Its room is taken before the request is sent, so that a full disk is noticed in time.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(self, spooling: Spooling, body_bytes: int) -> None:
        self._spooling = spooling
        folder, name = os.path.split(spooling.path)
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name, self._draft = name, f".{name}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._draft, flags, 0o600, dir_fd=self._folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, body_bytes + _ROOM)
        except OSError:
            self.discard()
            raise

    def load(self) -> None:
        """Load what seals, which takes a while."""
        with suppress(ImportError):
            _cipher(bytes(self._spooling.key))

    def discard(self) -> None:
        """Remove it."""
        with suppress(OSError):
            os.unlink(self._draft, dir_fd=self._folder)

    def keep(self, outcome: outcomes.Outcome) -> None:
        """Write an outcome; return when it is on the disk.

        Raises:
            OSError: It cannot be written.
        """
        data = memoryview(_seal(self._spooling, outcome))
        size = len(data)
        while data:
            data = data[os.write(self._file, data) :]
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        os.rename(self._draft, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.fsync(self._folder)


def discard_draft(path: str) -> None:
    """Remove the draft that a killed sender left for an answer, if there is one."""
    folder, name = os.path.split(path)
    with suppress(OSError):
        os.unlink(f"{folder}/.{name}{_SUFFIX}")  # noqa: PTH108 -- pathlib loads slowly


def answers(folder: str) -> list[str]:
    """Return the paths of the answers in a folder; remove what killed senders left."""
    found = []
    for entry in os.scandir(folder):
        if not entry.name.startswith("."):
            found.append(entry.path)
        elif not entry.name.endswith(_SUFFIX):
            continue
        elif time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
            os.unlink(entry.path)  # noqa: PTH108 -- pathlib loads slowly
    return sorted(found)


def read(data: bytes, unwrap: Callable[[bytes], bytes]) -> Spooled:
    """Open a file of the spool.

    Args:
        data: What is in it.
        unwrap: Opens `Spooling.wrapped_key`; what it raises passes through.

    Raises:
        ValueError: It is no file of the spool, or it was changed.
    """
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 -- slow, as below

    start = len(_MAGIC) + _SIZE_BYTES
    size = int.from_bytes(data[len(_MAGIC) : start], "big")
    nonce_at = start + size
    sealed_at = nonce_at + _NONCE_BYTES
    if not data.startswith(_MAGIC) or len(data) < sealed_at:
        raise ValueError("this is no file of the spool")
    cipher = _cipher(unwrap(data[start:nonce_at]))
    try:
        plain = cipher.decrypt(data[nonce_at:sealed_at], data[sealed_at:], data[:nonce_at])
    except InvalidTag as error:
        raise ValueError("this file of the spool was changed") from error
    head, _, body = plain.partition(b"\n")
    fields = json.loads(head)
    return Spooled(outcomes.parse(fields["outcome"], body), fields["boot_id"])


def boot_id() -> str:
    """Return the id of this boot of the machine; empty where there is none to read."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return ""


def _seal(spooling: Spooling, outcome: outcomes.Outcome) -> bytes:
    received = outcomes.body_holder(outcome)
    head = {"outcome": outcomes.document(outcome), "boot_id": boot_id()}
    plain = json.dumps(head).encode() + b"\n" + bytes(received.body if received else b"")
    size = len(spooling.wrapped_key).to_bytes(_SIZE_BYTES, "big")
    outside = _MAGIC + size + spooling.wrapped_key
    nonce = os.urandom(_NONCE_BYTES)
    return outside + nonce + _cipher(bytes(spooling.key)).encrypt(nonce, plain, outside)


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

    return AESGCM(key)
