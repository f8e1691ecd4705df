"""What a command writes: passed on unchanged, with a copy for whoever looks for errors in it.

::

    with Passage() as passage, Guard.start(passage.stdio) as guard:
        passage.start(guard, on_data, warn)
        guard.launch(…)
        outcome = guard.wait()
        passage.finish()                             # now on_data has seen everything

``LogTail`` gives the same for a log file that the command writes.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import math
import os
import select
import stat
import threading
import time
from typing import TYPE_CHECKING, Literal, Self

from holdoff import _platform
from holdoff._process import (
    GuardError,
    Stdio,
    is_pipe,
    require_supported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from holdoff._process import Guard

__all__ = ["LogTail", "OnData", "Passage", "Source"]

Source = Literal["stdout", "stderr", "log"]

if TYPE_CHECKING:
    OnData = Callable[[Source, bytes], object]
    Warn = Callable[[str], object]

_CHUNK_BYTES = _platform.PIPE_BYTES
# How soon a change of the window, or that nobody will write any more, is noticed.
_TICK_SECONDS = 0.1
# After the end: for output that is still on its way, and for what survivors hold open.
_PATIENCE_SECONDS = 5.0

# The byte order marks that a log file may begin with, and what has to be decoded.
_MARKS = {
    codecs.BOM_UTF8: None,
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LONGEST_MARK = len(codecs.BOM_UTF8)
# By so much of what was read last it is seen that a file has been rewritten.
_REMEMBERED_BYTES = 256


class _Listener:
    """Hands data to ``on_data`` until that fails."""

    def __init__(self, on_data: OnData, warn: Warn) -> None:
        self._on_data: OnData | None = on_data
        self._warn = warn

    def tell(self, source: Source, data: bytes) -> None:
        if self._on_data is None:
            return
        try:
            self._on_data(source, data)
        except Exception as error:  # noqa: BLE001 - whatever it is, the output goes on
            self._on_data = None
            # Its text may hold what the command wrote, and that a secret.
            kind = type(error).__name__
            self.warn(f"errors in the command's output are no longer seen: {kind} in reading it")

    def warn(self, message: str) -> None:
        with contextlib.suppress(OSError):  # our own stderr may be what is broken
            self._warn(message)


class Passage:
    """Passes what a command writes to our own stdout and stderr: at once, byte for byte, in order.

    Where ours is a terminal the command gets a terminal there, else a pipe; where both of ours are
    the same, so are both of the command's, and all of it counts as ``stdout``. Stdin and the
    controlling terminal (``/dev/tty``) are the wrapper's own. Each stream has a thread, so a reader
    that blocks holds up its own stream alone: the command waits in its write as soon as pipe
    and passage are full (half a MiB at most), while renewals and the guard go on.

    ``on_data`` gets each chunk after it was passed on, in the thread of its stream. The command is
    never ahead by more than a pipe, so one that takes longer than the reader slows the command
    down. One that raises is not called again.

    What differs from a command that writes to our descriptors itself:

    * A reader that goes away closes the pipe, so the command gets SIGPIPE or EPIPE, though what
      was on its way is lost. Of any other failure to write (a full disk) it gets the same, since
      an errno cannot be passed on; it is told as a warning.
    * A file becomes a pipe: no seeking, no truncating, and a pipe's buffering by the C library,
      which is that of a file. ENOSPC comes to us.
    * A terminal becomes another one. ``isatty``, the window's size and colours are the same,
      and what is written is processed by the real terminal alone. But settings made with
      ``tcsetattr`` on stdout or stderr stay there, and reading from these gives nothing: a program
      has to use stdin or ``/dev/tty``, as shells, pagers, ssh and prompts for a password do; one
      that fills the screen by way of stdout alone (curses) echoes its keys. ``ttyname`` and
      ``tcgetpgrp`` of stdout differ from those of stdin. The window's new size is there
      a tenth of a second after the window's SIGWINCH, and a second SIGWINCH tells of it.
      ``stty tostop`` has no effect on the output.
    * Bytes of two small writes may be passed on in one, and a wrapper that is killed loses what is
      on its way.
    """

    def __init__(self) -> None:
        """Opens what the command will write to; ``stdio`` is for ``Guard.start``.

        Raises:
            GuardError: This is a platform without a guard, or out of pipes or terminals.
        """
        require_supported()
        self._streams: list[_Stream] = []
        try:
            self._streams.append(_Stream("stdout", 1))
            if not os.path.samestat(os.fstat(1), os.fstat(2)):
                self._streams.append(_Stream("stderr", 2))
        except OSError as error:
            raise GuardError(f"cannot read the command's output: {error.strerror}") from error
        self.stdio = Stdio(stdout=self._streams[0].entrance, stderr=self._streams[-1].entrance)
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish()

    def start(self, guard: Guard, on_data: OnData, warn: Warn) -> None:
        """Begins to pass on; after ``Guard.start``, which has inherited ``stdio``.

        Args:
            guard: The guard, which a new size of the window is passed to.
            on_data: Called with ``stdout`` or ``stderr`` and a chunk, cut anywhere; from one
                thread for each stream, so perhaps for both at once.
            warn: Called with what a person should know, from the same threads.
        """
        self._started = True
        listener = _Listener(on_data, warn)
        for stream in self._streams:
            stream.start(guard, listener)

    def finish(self) -> None:
        """Returns when all that the command wrote has been passed on; after ``Guard.wait``.

        What survivors write later than some seconds from now is not the run's. A reader of ours
        that blocks is waited for, as ``cat`` would in our place, so give a lease back before. A
        signal may interrupt the wait. It may be called from several threads, and again.
        """
        for stream in self._streams:
            stream.finish(started=self._started)
        self._streams = []


class _Stream:
    """One stream on its way from the command to a descriptor of ours."""

    def __init__(self, name: Source, sink: int) -> None:
        self._name = name
        self._sink = sink
        self._is_terminal = os.isatty(sink)
        self._source, self.entrance = (
            _platform.open_raw_terminal(sink) if self._is_terminal else _platform.open_wide_pipe()
        )
        self._give_up_at = math.inf
        self._late_bytes = 0

    def start(self, guard: Guard, listener: _Listener) -> None:
        os.close(self.entrance)  # the guard has it, so that its end is the end of the output
        self._guard = guard
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def finish(self, *, started: bool) -> None:
        if started:
            self._give_up_at = min(self._give_up_at, time.monotonic() + _PATIENCE_SECONDS)
            self._thread.join()
        else:
            os.close(self.entrance)
            os.close(self._source)

    def _run(self) -> None:
        # Signals are the main thread's. And with SIGTTOU blocked no write to the terminal, which
        # is lent to the command, can stop us.
        _platform.block_signals()
        try:
            self._pass_on()
        except OSError as error:
            # When the reader is gone, or the terminal hung up, that is the command's to notice.
            if error.errno not in {errno.EPIPE, errno.ECONNRESET, errno.EIO}:
                self._listener.warn(f"cannot write {self._name}, so it ends: {error.strerror}")
        finally:
            os.close(self._source)

    def _pass_on(self) -> None:
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        if is_pipe(self._sink):
            poll.register(self._sink, 0)  # tells when its reader is gone, and nothing else
        while True:
            ready = [fd for fd, _events in poll.poll(_TICK_SECONDS * 1000)]
            if self._is_terminal and _platform.copy_window_size(self._sink, self._source):
                self._guard.window_changed()
            if self._sink in ready:
                return
            if ready:
                data = self._read()
                if not data:
                    return
                self._write(data)
                self._listener.tell(self._name, data)
            if time.monotonic() > self._give_up_at:
                # What the command wrote itself is in the pipe, so that no more than that is due.
                self._late_bytes += len(data) if ready else _CHUNK_BYTES
                if self._late_bytes >= _CHUNK_BYTES:
                    return

    def _read(self) -> bytes:
        try:
            return os.read(self._source, _CHUNK_BYTES)
        except OSError as error:
            if error.errno == errno.EIO:  # how a terminal says that nobody has it open
                return b""
            raise

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._sink, rest) :]
            except BlockingIOError:  # somebody who shares it has made it so
                select.select([], [self._sink], [])


class LogTail:
    """Follows a log file that the command writes, with all that comes after ``start``.

    The file need not be there yet, and may be truncated, rewritten or replaced, of which the old
    one is read to its end first. UTF-16 with a byte order mark comes as UTF-8. It is looked at ten
    times a second, so of several files that replace each other faster only the last is seen.
    """

    def __init__(self, path: Path, on_data: OnData, warn: Warn) -> None:
        """Looks whether this may be a log file, and opens nothing yet.

        Args:
            path: The file.
            on_data: Called with ``log`` and a chunk, cut anywhere, from a thread of its own.
            warn: Called with what a person should know.

        Raises:
            ValueError: It is no regular file, or cannot be read.
        """
        self._path = path
        self._listener = _Listener(on_data, warn)
        self._file: _LogFile | None = None
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        with contextlib.suppress(FileNotFoundError):
            _LogFile(path).close()

    def start(self) -> None:
        """Begins to follow; right before ``Guard.launch``. What the file holds now is old."""
        self._switch(from_end=True)
        self._thread.start()

    def finish(self) -> None:
        """Returns when all has been read, or a file system does not answer for some seconds."""
        self._over.set()
        if self._thread.ident is None:
            return  # never started
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._listener.warn(f"the log file {self._path} could not be read to its end in time")
        elif self._file is None and not self._failed:
            self._listener.warn(f"the log file {self._path} was never there, so nothing was read")

    def _run(self) -> None:
        _platform.block_signals()
        try:
            while not self._over.wait(_TICK_SECONDS):
                self._look()
            self._look(final=True)
        except OSError as error:
            self._fail(f"the log file {self._path} cannot be read any more: {error.strerror}")

    def _look(self, *, final: bool = False) -> None:
        old = self._file
        if self._switch() and old is not None:
            self._tell(old, final=True)
            old.close()
        if self._file is not None:
            self._tell(self._file, final=final)

    def _switch(self, *, from_end: bool = False) -> bool:
        """Opens what is there under the path now. Returns whether it is another file."""
        try:
            if self._file is not None and self._file.is_at(self._path):
                return False
            self._file = _LogFile(self._path, from_end=from_end)
        except FileNotFoundError:
            return False  # not yet, or on its way to be replaced
        except (OSError, ValueError) as error:
            self._fail(str(error))
            return False
        return True

    def _tell(self, file: _LogFile, *, final: bool) -> None:
        for data in file.new_data(final=final):
            self._listener.tell("log", data)

    def _fail(self, message: str) -> None:
        if not self._failed:
            self._failed = True
            self._listener.warn(message)


class _LogFile:
    """An open log file, and how far it has been read."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        try:
            # Looked at before it is opened, since opening a FIFO has consequences for its writer.
            regular = stat.S_ISREG(path.stat().st_mode)
            self._fd = os.open(path, _platform.READ_LOG) if regular else -1
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(
                f"the log file {path} cannot be read ({error.strerror}): "
                "name a file that this user may read"
            ) from error
        if not regular:
            raise ValueError(f"{path} is no regular file: name the log file itself")
        self._status = os.fstat(self._fd)
        self._restart()
        if from_end and self._status.st_size:
            self._recognise()
            self._position = self._status.st_size
            if self._decoder is not None:
                self._position -= self._position % 2  # half a unit of UTF-16 belongs to what comes
            start = max(self._position - _REMEMBERED_BYTES, 0)
            self._last = _platform.read_at(self._fd, self._position - start, start)

    def close(self) -> None:
        os.close(self._fd)

    def is_at(self, path: Path) -> bool:
        """Whether the path still leads here."""
        return os.path.samestat(path.stat(), self._status)

    def new_data(self, *, final: bool) -> Iterator[bytes]:
        """What has been appended, up to the size that the file has now.

        Args:
            final: Nothing more will be asked for.
        """
        size = os.fstat(self._fd).st_size
        if size < self._position or self._is_rewritten():
            self._restart()
        if not self._recognised:
            if size < _LONGEST_MARK and not final:
                return  # it may become a mark
            self._position = self._recognise()
        while self._position < size:
            wanted = min(_CHUNK_BYTES, size - self._position)
            data = _platform.read_at(self._fd, wanted, self._position)
            if not data:
                return  # truncated in this moment
            self._position += len(data)
            self._last = (self._last + data)[-_REMEMBERED_BYTES:]
            yield data if self._decoder is None else self._decoder.decode(data).encode()

    def _restart(self) -> None:
        self._position = 0
        self._last = b""
        self._recognised = False
        self._decoder: codecs.IncrementalDecoder | None = None

    def _recognise(self) -> int:
        """Finds out the encoding. Returns how long the mark is that tells it."""
        head = _platform.read_at(self._fd, _LONGEST_MARK, 0)
        mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
        if encoding := _MARKS.get(mark):
            self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self._recognised = True
        return len(mark)

    def _is_rewritten(self) -> bool:
        """Whether it was truncated and has grown beyond our position since."""
        last = _platform.read_at(self._fd, len(self._last), self._position - len(self._last))
        return last != self._last
