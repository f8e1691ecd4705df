"""Reports that wait on disk for a coordinator that is away.

Each writer has a file of its own in the folder, locked as long as the writer lives: a file whose
lock is free was left behind, and belongs to whoever locks it next. A line is a JSON document: an
event, or the ids of events that are done. So a crash between the coordinator's answer and the mark
sends an event a second time, with the id that it was counted under; it counts once.

An event that fails repeatedly is set aside: it moves to its own file (`.aside`), where it waits for
a person (`holdoff spool retry`) and does not block other events.

An event is remembered with when it was written, by the clock that never steps, and by the wall
clock for a reader after the next boot: how long ago it happened is worked out when it is sent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import sys
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from google.protobuf import json_format

from holdoff import _files
from holdoff._platform import boottime_ns
from holdoff._state import state_folder
from holdoff._text import to_report
from holdoff.v1 import budget_pb2

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Warn = Callable[[str], object]

MOST_EVENTS = 10_000
"""So many may wait of one writer; more are merged with their like."""
MOST_BYTES = 10_000_000
"""So much may wait in the whole folder."""
MOST_ASIDE_BYTES = 1_000_000
"""Once this much is set aside, further reports are dropped instead."""
MOST_COUNT = 10_000
"""So often may one event have happened, as the coordinator sees it."""
_MOST_LINE = 256 * 1024
_MOST_SECONDS = 10**9
"""Ages beyond this are nobody's."""
_SUFFIX = ".jsonl"
_DRAFT = ".draft"
_DAMAGED = ".damaged"
_ASIDE = ".aside"
_LOOK_SECONDS = 1.0
"""How old what is known of other writers' files may be."""


class SpoolError(Exception):
    """A report could not be written to disk."""


@dataclass(frozen=True, slots=True)
class Moment:
    """An instant, as it can be told from another one: within a boot, or after it."""

    boot: str
    boot_ns: int
    wall_ns: int

    @classmethod
    def now(cls) -> Moment:
        """Return this instant."""
        return cls(_boot_id(), boottime_ns(), time.time_ns())

    def elapsed_ns(self, later: Moment) -> int:
        """Return how long it is from here until later: 0 where a clock went back."""
        if self.boot == later.boot:
            return max(0, later.boot_ns - self.boot_ns)
        return max(0, later.wall_ns - self.wall_ns)


@functools.cache
def _boot_id() -> str:
    """Name this boot of the host; where it has no name, it is good for this process alone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return str(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class Waiting:
    """An event that waits to be reported."""

    event: budget_pb2.Event
    """With its ages as they were when it was written."""
    written: Moment
    failures: int = 0
    """How often the coordinator failed with it, or with its batch."""
    reason: str = ""
    """Why it was set aside."""

    @classmethod
    def since_now(cls, event: budget_pb2.Event) -> Waiting:
        """Take an event that is to wait from now on, without what may be a secret in its URL."""
        own = budget_pb2.Event()
        own.CopyFrom(event)
        own.scope.endpoint = to_report(event.scope.endpoint)
        return cls(own, Moment.now())

    def age_ns(self, now: Moment) -> int:
        """Return how long ago it happened."""
        return self.event.age.ToNanoseconds() + self.written.elapsed_ns(now)

    def due(self, now: Moment) -> budget_pb2.Event:
        """Return the event to send now."""
        event = budget_pb2.Event()
        event.CopyFrom(self.event)
        event.age.FromNanoseconds(self.age_ns(now))
        if event.HasField("sent_age"):
            sent_ns = event.sent_age.ToNanoseconds()
            event.sent_age.FromNanoseconds(sent_ns + self.written.elapsed_ns(now))
        return event

    def likeness(self) -> bytes:
        """Return what it has in common with those that may be counted together with it."""
        event = budget_pb2.Event()
        event.CopyFrom(self.event)
        for field in ("id", "lease_proof", "count", "age", "sent_age"):
            event.ClearField(field)
        return event.SerializeToString(deterministic=True)

    def with_another(self, other: Waiting) -> Waiting | None:
        """Count another one in, as if all had happened at the later time; None if too many."""
        event = other.due(other.written)
        event.id, event.lease_proof = self.event.id, self.event.lease_proof
        if event.kind != budget_pb2.EVENT_KIND_BLOCK:  # of which the latest says it all
            event.count = (self.event.count or 1) + (event.count or 1)
        if event.count > MOST_COUNT:
            return None
        if self.age_ns(other.written) < other.age_ns(other.written):
            mine = self.due(other.written)
            event.age.CopyFrom(mine.age)
            if mine.HasField("sent_age"):
                event.sent_age.CopyFrom(mine.sent_age)
        return Waiting(event, other.written)

    def line(self) -> bytes:
        """Return how it is written."""
        document: dict[str, object] = {
            "event": json_format.MessageToDict(self.event, preserving_proto_field_name=True),
            "boot": self.written.boot,
            "boot_ns": self.written.boot_ns,
            "wall_ns": self.written.wall_ns,
        }
        optional = {"failures": self.failures, "reason": self.reason}
        return _line(document | {name: value for name, value in optional.items() if value})


def _line(document: dict[str, object]) -> bytes:
    # It begins with a newline too, so that a torn line before it costs no more than itself.
    return b"\n" + json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n"


def _parse(line: bytes) -> Waiting | list[str]:
    """Read a line: an event, or the ids of those that are done.

    Raises:
        ValueError: It is none of ours.
    """
    try:
        document = json.loads(line)
        # Half a surrogate pair is refused here: in a field's name it would make protobuf fail.
        json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    match document:
        case {"done": [*ids]} if all(isinstance(one, str) for one in ids):
            return ids
        case {"event": dict(fields), "boot": str(boot), "boot_ns": int(ns), "wall_ns": int(wall)}:
            try:
                event = json_format.ParseDict(
                    fields, budget_pb2.Event(), ignore_unknown_fields=True
                )
            except json_format.Error as error:
                raise ValueError(str(error)) from None
            ages = (event.age.seconds, event.sent_age.seconds)
            if event.id and all(0 <= one <= _MOST_SECONDS for one in ages):
                failures, reason = document.get("failures", 0), document.get("reason", "")
                return Waiting(
                    event,
                    Moment(boot, _clock(ns), _clock(wall)),
                    failures if type(failures) is int else 0,
                    reason if isinstance(reason, str) else "",
                )
    raise ValueError("no event")


def _clock(nanoseconds: int) -> int:
    if not 0 <= nanoseconds < 2**63:
        raise ValueError("no clock shows that")
    return nanoseconds


class Spool:
    """The folder, and in it the file of one writer. Any thread may use it.

    Its file is made with the first event. Closed, it may be used again, with a new file.

    Args:
        folder: By default `$XDG_STATE_HOME/holdoff/spool`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # without a home directory nothing is kept
            folder = folder or state_folder() / "spool"
        self.folder = folder
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._waiting: dict[str, Waiting] = {}
        self._unwritten: set[str] = set()
        self._alike: dict[bytes, str] = {}
        """Ids of events that were never sent, so that others may be counted in."""
        self._others = (0, -_LOOK_SECONDS)
        self._tidy_above = _MOST_LINE

    # What the writer does

    def append(self, *events: budget_pb2.Event) -> None:
        """Write events, and return when they would survive a crash of the host.

        Where no more may wait, they are counted in with their like.

        Raises:
            SpoolError: The disk is full or cannot be written, or too many wait already. Nothing
                of them is kept.
        """
        arrived = [Waiting.since_now(event) for event in events]
        lines = [one.line() for one in arrived]
        if any(len(line) > _MOST_LINE for line in lines):
            raise SpoolError("a report is too long to be stored")
        with self._lock:
            size = sum(map(len, lines))
            merged = [] if self._has_room(len(arrived), size) else self._merged(arrived)
            new = merged or arrived
            try:
                if self._file is None:
                    self._file = _File.create(self._usable_folder())
                self._file.append(b"".join(one.line() for one in merged) or b"".join(lines))
                self._file.sync()
            except OSError as error:
                self._refuse(error.strerror or str(error))
            self._take_in(new)
            for one in new:
                self._unwritten.discard(one.event.id)
            self._tidy()

    def hold(self, *events: budget_pb2.Event) -> int:
        """Keep in memory what could not be written. Return how many of them are lost.

        Where no more may wait, they are counted in with their like.
        """
        lost = 0
        with self._lock:
            for event in events:
                new = [Waiting.since_now(event)]
                if len(self._waiting) >= MOST_EVENTS:
                    try:
                        new = self._merged(new)
                    except SpoolError:
                        lost += 1
                        continue
                self._take_in(new)
                self._unwritten.update(one.event.id for one in new)
        return lost

    def waiting(self) -> list[Waiting]:
        """Return what waits, in the order in which it came."""
        with self._lock:
            return list(self._waiting.values())

    def begin(self, ids: Sequence[str]) -> list[Waiting]:
        """Return what waits under these ids, to be sent: it is not changed any more."""
        with self._lock:
            begun = [self._waiting[one] for one in ids if one in self._waiting]
            for one in begun:
                likeness = one.likeness()
                if self._alike.get(likeness) == one.event.id:
                    del self._alike[likeness]
            return begun

    def done(self, ids: Sequence[str]) -> None:
        """Take away what was counted, or never can be."""
        with self._lock:
            for one in ids:
                self._waiting.pop(one, None)
                self._unwritten.discard(one)
            if self._file is None:
                return
            with contextlib.suppress(OSError):  # sent again it counts once
                if len(self._waiting) > len(self._unwritten):
                    self._file.append(_line({"done": list(ids)}))
                    self._tidy()
                else:
                    self._file.clear()

    def failed(self, ids: Sequence[str]) -> list[Waiting]:
        """Note that the coordinator failed with these; return them."""
        with self._lock:
            found = [
                replace(self._waiting[one], failures=self._waiting[one].failures + 1)
                for one in ids
                if one in self._waiting
            ]
            self._waiting.update((one.event.id, one) for one in found)
            written = [one.line() for one in found if one.event.id not in self._unwritten]
            if self._file is not None:
                with contextlib.suppress(OSError):  # it is noted the next time
                    self._file.append(b"".join(written))
            return found

    def set_aside(self, ids: Sequence[str], reason: str) -> Path | None:
        """Move events to a file where they wait for a person; return it.

        They are dropped, and None is returned, if too much is there already or the disk is full.
        """
        with self._lock:
            moved = [
                replace(self._waiting[one], failures=0, reason=reason)
                for one in ids
                if one in self._waiting
            ]
        path: Path | None = None
        with contextlib.suppress(OSError, SpoolError):
            if self._size(_ASIDE) < MOST_ASIDE_BYTES:
                with contextlib.closing(_File.create(self._usable_folder(), _ASIDE)) as file:
                    file.append(b"".join(one.line() for one in moved))
                    file.sync()
                    path = file.path
        self.done(ids)
        return path

    def close(self) -> tuple[int, int]:
        """Leave the file to whoever sends it. Return how many it holds, and how many are lost."""
        with self._lock:
            lost = len(self._unwritten)
            left = len(self._waiting) - lost
            if self._file:
                self._file.close(remove=not left)
            self._file = None
            self._waiting.clear()
            self._unwritten.clear()
            self._alike.clear()
            return left, lost

    # What there is of all writers

    def leftovers(self, warn: Warn) -> Iterator[Spool]:
        """Yield what writers left behind who are gone, each closed when the next one is asked for.

        Args:
            warn: Called with what is wrong with a file that is skipped, or not whole.
        """
        for file in self._files(warn):
            with contextlib.closing(file):
                if not file.lock():
                    continue
                leftover = Spool(self.folder)
                leftover._waiting = file.read(warn)
                leftover._file = file
                with contextlib.closing(leftover):
                    yield leftover

    def survey(self, warn: Warn) -> Iterator[tuple[Waiting, bool]]:
        """Yield all that waits on this host, and whether its writer is alive and will send it.

        Args:
            warn: Called with what is wrong with a file that is skipped, or not whole.
        """
        for file in self._files(warn):
            with contextlib.closing(file):
                live = not file.lock(shared=True)
                file.unlock()  # at once: it must not look as if its writer were alive
                for one in file.read(None if live else warn).values():
                    yield one, live

    def survey_aside(self, warn: Warn) -> Iterator[tuple[Waiting, Path]]:
        """Yield all that was set aside on this host, and where.

        Args:
            warn: Called with what is wrong with a file that is skipped, or not whole.
        """
        for file in self._files(warn, _ASIDE):
            with contextlib.closing(file):
                for one in file.read(warn).values():
                    yield one, file.path

    def take_back(self, warn: Warn) -> None:
        """Make everything that was set aside wait to be sent again.

        Args:
            warn: Called with what is wrong with a file that is skipped.
        """
        for file in self._files(warn, _ASIDE):
            with contextlib.closing(file):
                if not file.lock():
                    continue  # it is being written
                try:
                    file.path.rename(file.path.with_name(f"{uuid.uuid4().hex}{_SUFFIX}"))
                except OSError as error:
                    warn(f"{file.path} is skipped: {error.strerror}")

    def _files(self, warn: Warn, *suffixes: str) -> Iterator[_File]:
        try:
            names = sorted(os.listdir(self.folder)) if self.folder else []  # noqa: PTH208 - names
        except FileNotFoundError:
            return
        except OSError as error:
            warn(f"the reports in {self.folder} cannot be read: {error.strerror}")
            return
        for name in names:
            path = Path(str(self.folder), name)
            if path.suffix not in (suffixes or (_SUFFIX, _DRAFT)):
                continue
            try:
                file = _File.open(path)
            except FileNotFoundError:
                continue  # sent by another process meanwhile
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                warn(f"{path} is skipped: {reason}")
                continue
            yield file

    # Inside

    def _usable_folder(self) -> Path:
        if sys.platform == "win32":
            self._refuse("reports cannot be stored on Windows yet")
        if self.folder is None:
            self._refuse("there is no home directory")
        for one in reversed((self.folder, *self.folder.parents)):
            if not one.is_dir():
                one.mkdir(mode=0o700, exist_ok=True)
                _files.sync_folder(one.parent)
        if self.folder.stat().st_uid != os.geteuid():
            self._refuse("it belongs to another user")
        return self.folder

    def _refuse(self, reason: str) -> NoReturn:
        raise SpoolError(
            f"{self.folder or 'the folder for reports'}: {reason}. Free space, or set "
            "XDG_STATE_HOME to a folder of your own that has space"
        ) from None

    def _has_room(self, count: int, size: int) -> bool:
        others, looked = self._others
        if time.monotonic() >= looked + _LOOK_SECONDS:
            others = max(0, self._size(_SUFFIX) - (self._file.size if self._file else 0))
            self._others = (others, time.monotonic())
        own = self._file.size if self._file else 0
        return len(self._waiting) + count <= MOST_EVENTS and own + others + size <= MOST_BYTES

    def _size(self, suffix: str) -> int:
        size = 0
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder) if self.folder else ():
                if entry.name.endswith(suffix):
                    with contextlib.suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
        return size

    def _merged(self, arrived: Sequence[Waiting]) -> list[Waiting]:
        """Return what waits already, with what arrived counted in.

        Raises:
            SpoolError: Nothing waits that is like it, and was not sent yet.
        """
        found: dict[str, Waiting] = {}
        for one in arrived:
            alike = self._alike.get(one.likeness(), "")
            earlier = found.get(alike) or self._waiting.get(alike)
            merged = earlier and earlier.with_another(one)
            if merged is None:
                raise SpoolError(
                    f"too many reports are stored in {self.folder}: when the coordinator can be "
                    "reached again, send them with: holdoff spool flush"
                )
            found[alike] = merged
        return list(found.values())

    def _take_in(self, new: Sequence[Waiting]) -> None:
        for one in new:
            self._waiting[one.event.id] = one
            self._alike[one.likeness()] = one.event.id

    def _tidy(self) -> None:
        """Write the file anew once most of it is over and done with."""
        if self._file is None or self._file.size <= self._tidy_above:
            return
        lines = [one.line() for one in self._waiting.values()]
        size = sum(map(len, lines))
        self._tidy_above = max(_MOST_LINE, 2 * size)
        if self._file.size > self._tidy_above:
            with contextlib.suppress(OSError):  # as it is it serves too
                self._file = self._file.rewritten(lines)
                self._unwritten.clear()


class _File:
    """An open file of the folder; the one who has locked it is its writer."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._damaged = 0

    @classmethod
    def create(cls, folder: Path, suffix: str = _SUFFIX) -> Self:
        """Make a file, and lock it."""
        while True:
            path = folder / f"{uuid.uuid4().hex}{suffix}"
            fd = _files.create(path, os.O_RDWR | os.O_APPEND)
            file = cls(path, fd)
            try:
                # Another process may have taken it for a leftover before it was locked.
                if file.lock():
                    _files.sync_folder(folder)
                    return file
                file.close()
            except OSError:
                file.close(remove=True)
                raise

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file that may be anything.

        Raises:
            OSError: It cannot be opened.
            ValueError: It is none of ours.
        """
        if stat.S_ISLNK(path.lstat().st_mode):
            raise ValueError("it is a link")
        # A pipe does not block then, and has no reader.
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _require_ours(os.fstat(fd))
        except ValueError:
            os.close(fd)
            raise
        return cls(path, fd)

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return os.fstat(self._fd).st_size

    def lock(self, *, shared: bool = False) -> bool:
        """Lock it if nobody else has, and it is still there."""
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return os.fstat(self._fd).st_nlink > 0

    def unlock(self) -> None:
        """Let others lock it."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def append(self, data: bytes) -> None:
        """Add something at its end."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def sync(self) -> None:
        """Return when all of it would survive a crash."""
        os.fsync(self._fd)

    def clear(self) -> None:
        """Make it empty."""
        os.ftruncate(self._fd, 0)

    def rewritten(self, lines: Sequence[bytes]) -> Self:
        """Put a new file in its place, and return that."""
        draft = self.create(self.path.parent, _DRAFT)
        try:
            draft.append(b"".join(lines))
            draft.sync()
            draft.path.replace(self.path)
        except OSError:
            draft.close(remove=True)
            raise
        with contextlib.suppress(OSError):
            _files.sync_folder(self.path.parent)
        self.close()
        draft.path = self.path
        return draft

    def read(self, warn: Warn | None) -> dict[str, Waiting]:
        """Return the events in it that are not done.

        A later line of an event takes the place of an earlier one.
        """
        waiting: dict[str, Waiting] = {}
        if self.path.suffix == _DRAFT:  # whose original is there, and whole
            return waiting
        with os.fdopen(os.dup(self._fd), "rb") as stream:
            stream.seek(0)
            while line := stream.readline(_MOST_LINE):
                if line.isspace() or (line[-1:] != b"\n" and len(line) < _MOST_LINE):
                    continue  # cut off at its end: whoever wrote it never heard that it is kept
                try:
                    found = _parse(line)
                except ValueError:
                    self._damaged += 1
                    while line[-1:] != b"\n" and (line := stream.readline(_MOST_LINE)):
                        pass
                    continue
                if isinstance(found, Waiting):
                    waiting[found.event.id] = found
                else:
                    for one in found:
                        waiting.pop(one, None)
        if self._damaged and warn:
            aside = self.path.with_suffix(_DAMAGED)
            warn(f"{self.path}: {self._damaged} damaged lines; it will be set aside as {aside}")
        return waiting

    def close(self, *, remove: bool = False) -> None:
        """Unlock it; remove it before if nothing waits in it. A second time does nothing."""
        if self._fd < 0:
            return
        if remove:
            with contextlib.suppress(OSError):
                if self._damaged:
                    self.path.rename(self.path.with_suffix(_DAMAGED))
                else:
                    self.path.unlink()
        # A child process may have the file open still, and with it the lock.
        self.unlock()
        os.close(self._fd)
        self._fd = -1


def _require_ours(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a file")
    if found.st_uid != os.geteuid():
        raise ValueError("it belongs to another user")
    if found.st_size > 3 * MOST_BYTES:
        raise ValueError("it is too large to be ours")
