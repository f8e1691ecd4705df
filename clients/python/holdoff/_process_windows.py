"""The wrapper's side of the guard on Windows; ``_process.Guard`` is this one there.

Its pipes are read by a thread, since Windows can wait for nothing but sockets with `select`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Self

from holdoff._outcome import GUARD_LOST, Event, GuardError, Outcome, Stdio, outcome_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from holdoff._outcome import Isolate

_START_SECONDS = 30.0
# How long a signal may wait for its handler.
_LOOK_SECONDS = 0.1


class WindowsGuard:
    """A guard process, waiting for or watching over one command. See ``_process.Guard``."""

    PROGRAM: ClassVar[Sequence[str]] = (str(Path(__file__).with_name("_guard_windows.py")),)
    CAN_PAUSE: ClassVar[bool] = False
    CAN_READ_OUTPUT: ClassVar[bool] = False

    def __init__(
        self, process: subprocess.Popen[bytes], control: BinaryIO, events: BinaryIO
    ) -> None:
        self.isolated = True
        self._process = process
        self._control = control
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._launched = False
        self._outcome: Outcome | None = None
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    @classmethod
    def start(
        cls, stdio: Stdio | None = None, isolate: Isolate = "auto", passed: Sequence[int] = ()
    ) -> Self:
        """Starts a guard, which then waits for ``launch``.

        Raises:
            GuardError: It does not start.
        """
        guard = cls.spawn(stdio, isolate, passed)
        try:
            guard.await_ready()
        except BaseException:
            guard.close()
            raise
        return guard

    @classmethod
    def spawn(
        cls, stdio: Stdio | None = None, isolate: Isolate = "auto", passed: Sequence[int] = ()
    ) -> Self:
        """Does the same as ``start``, except that it leaves the wait to ``await_ready``."""
        del isolate, passed  # a job is all the isolation there is, and handles are not inherited
        stdio = stdio or Stdio()
        (control_in, control_out), (events_in, events_out) = os.pipe(), os.pipe()
        theirs = (control_in, events_out)
        try:
            process = _spawn([sys.executable, "-I", "-S", *cls.PROGRAM], theirs, stdio)
        except OSError as error:
            for fd in (control_out, events_in):
                os.close(fd)
            raise GuardError(f"the guard does not start: {error}") from error
        finally:
            for fd in theirs:
                os.close(fd)
        control = os.fdopen(control_out, "wb", buffering=0)
        events = os.fdopen(events_in, "rb")
        return cls(process, control, events)

    def reap_strangers(self) -> None:
        """Does nothing: there are no zombies here."""

    def await_ready(self) -> None:
        """Waits until the guard can launch a command.

        Raises:
            GuardError: It does not start.
        """
        try:
            message = self._events.get(timeout=_START_SECONDS) or {"failed": "it died"}
        except queue.Empty:
            self._process.kill()
            message = {"failed": f"it was not ready within {_START_SECONDS:.0f} s"}
        if "failed" in message:
            raise GuardError(f"the guard does not start: {message['failed']}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def launch(
        self,
        path: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        fence_boottime_ns: int | None,
        grace_seconds: float,
    ) -> None:
        """Runs the command; the event ``started`` confirms it.

        Raises:
            GuardError: The guard is gone.
        """
        if self._launched:
            raise GuardError("a guard launches one command")
        self._launched = True
        launch = {
            "path": path,
            "argv": list(argv),
            "env": dict(env),
            "fence_ns": fence_boottime_ns,
            "grace_ns": int(grace_seconds * 10**9),
        }
        if not self._send({"launch": launch}):
            raise GuardError("the guard is gone")

    def extend(self, fence_boottime_ns: int) -> None:
        """Moves the fence; an earlier one changes nothing."""
        self._send({"extend": fence_boottime_ns})

    def remove_at_end(self, path: Path) -> None:
        """Names a file that the guard removes at the end, or once the wrapper is gone."""
        self._send({"remove": str(path)})

    def end(self, reason: str) -> None:
        """Ends all: softly now, and without asking after the grace, but before the fence."""
        self._send({"end": reason[:200]})

    def pause(self) -> None:
        """Cannot be: see ``CAN_PAUSE``."""
        raise GuardError("a command cannot be paused on Windows")

    def resume(self) -> None:
        """Does nothing, since nothing was paused."""

    def window_changed(self) -> None:
        """Does nothing: the command has our console, which tells it."""

    def signal(self, signum: int) -> bool:
        """Interrupts the command (CTRL_BREAK) whatever the signal; SIGTERM ends it.

        Returns:
            Whether there is a command, or was.
        """
        if not self._launched:
            return False
        if signum == signal.SIGTERM:
            self.end("terminated")
        else:
            self._send({"signal": int(signum)})
        return True

    def wait(self, on_event: Callable[[Event], object] = lambda _event: None) -> Outcome:
        """Waits until the command and all that it started have ended.

        Args:
            on_event: Called in this thread with what happens meanwhile.
        """
        if not self._launched:
            raise GuardError("nothing was launched")
        while self._outcome is None:
            try:
                message = self._events.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue  # signal handlers have run meanwhile
            if message is None:  # and its job died with it
                self._outcome = Outcome(exit_code=1, ended_by=GUARD_LOST)
            elif "outcome" in message:
                self._outcome = outcome_of(**message["outcome"])
            elif "started" in message:
                on_event(Event("started", at_boottime_ns=message["started"]))
            elif "ending" in message:
                on_event(Event("ending", reason=message["ending"]))
        return self._outcome

    def close(self) -> None:
        """Lets go of the guard; a command that still runs is ended as if the wrapper had died."""
        with self._lock:
            self._control.close()
        if self._outcome is None or not self._outcome.survivors:
            self._process.wait()
            self._reader.join()

    def _send(self, message: dict[str, Any]) -> bool:
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._control.write(json.dumps(message).encode() + b"\n")
            return True
        return False

    def _read(self, events: BinaryIO) -> None:
        with events:
            for line in events:
                self._events.put(json.loads(line))
        self._events.put(None)


def _spawn(command: list[str], fds: tuple[int, ...], stdio: Stdio) -> subprocess.Popen[bytes]:
    """Start a process that gets these descriptors too, and their names as its last arguments."""
    options: dict[str, Any] = {
        "stdin": stdio.stdin,
        "stdout": stdio.stdout,
        "stderr": stdio.stderr,
    }
    if sys.platform != "win32":  # where tests run
        return subprocess.Popen([*command, *map(str, fds)], pass_fds=fds, **options)
    import msvcrt  # noqa: PLC0415 - there alone

    handles = [msvcrt.get_osfhandle(fd) for fd in fds]
    for handle in handles:
        os.set_handle_inheritable(handle, True)
    startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": handles})
    return subprocess.Popen([*command, *map(str, handles)], startupinfo=startup, **options)
