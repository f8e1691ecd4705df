"""The wrapper's side of the guard: runs a command under a deadline that outlives the wrapper.

::

    with Guard.start() as guard:                     # in the main thread, before the lease
        ...                                          # wait for the lease and accept it
        with caught_signals(guard.signal):
            guard.launch(which("datahub"), argv, env, fence_boottime_ns=…, grace_seconds=10)
            outcome = guard.wait()                   # renewals in another thread: guard.extend(…)

What the guard does, and what it cannot promise, is told in ``_guard``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from holdoff import _platform
from holdoff._outcome import (
    GUARD_LOST,
    NOT_EXECUTABLE,
    NOT_FOUND,
    CannotRunError,
    Event,
    GuardError,
    GuardLostError,
    Outcome,
    Stdio,
    outcome_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import FrameType, TracebackType

    from holdoff._outcome import Isolate

__all__ = [
    "CannotRunError",
    "Event",
    "Guard",
    "GuardError",
    "Outcome",
    "Stdio",
    "boottime_ns",
    "caught_signals",
    "which",
]

boottime_ns = _platform.boottime_ns

_START_SECONDS = 30.0
_LONGEST_WAIT_SECONDS = 0.1
# Who has survived KILL for this long is reported instead of waited for.
_GIVE_UP_SECONDS = 5.0


def _signals(*names: str) -> frozenset[int]:
    """Those of these signals that the platform has."""
    return frozenset(int(getattr(signal, name)) for name in names if hasattr(signal, name))


# A read from the terminal, or a change of it, in the background stops a command with one of these.
_ASKING_FOR_TERMINAL = _signals("SIGTTIN", "SIGTTOU")
# And Ctrl-Z. SIGSTOP is not among them: who sends it by hand will send SIGCONT by hand.
_JOB_CONTROL_STOPS = _ASKING_FOR_TERMINAL | _signals("SIGTSTP")

# Not passed on: what cannot be caught, what tells of the wrapper's own faults, limits and children,
# and the stops of a background group (the wrapper has to be able to stop itself).
_NOT_FORWARDED = _signals(
    *("SIGKILL", "SIGSTOP", "SIGCHLD", "SIGTTIN", "SIGTTOU", "SIGPIPE", "SIGXCPU", "SIGXFSZ"),
    *("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS", "SIGABRT"),
    *("SIGPROF", "SIGVTALRM"),
)


def require_supported() -> None:
    """Refuses a platform without a guard.

    Raises:
        GuardError: This is one.
    """
    try:
        _platform.require_supported()
    except _platform.UnsupportedPlatformError as error:
        raise GuardError(str(error)) from error


def which(command: str) -> str:
    """The path of a command, found as ``execvp`` would, but told beforehand.

    Raises:
        CannotRunError: It was not found (127), or it may not be executed (126).
    """
    if sys.platform == "win32":  # which looks in the current folder too, and adds .exe or .cmd
        found = shutil.which(command)
        if found is None:
            raise CannotRunError(NOT_FOUND, f"{command}: command not found")
        return found
    typed_path = os.sep in command
    refused = ""
    for folder in [""] if typed_path else os.get_exec_path():
        # An empty entry of PATH is the current folder; one that may not be searched has nothing.
        path = os.path.join(folder, command)  # noqa: PTH118 - keeps `./`
        if os.path.isfile(path) and os.access(path, os.X_OK):  # noqa: PTH113 - never raises
            return command if typed_path else str(Path(path).absolute())
        if os.path.isfile(path) or (typed_path and _is_there(path)):  # noqa: PTH113 - likewise
            refused = refused or path
    if refused:
        raise CannotRunError(NOT_EXECUTABLE, f"{refused}: cannot be executed")
    raise CannotRunError(NOT_FOUND, f"{command}: command not found")


def _is_there(path: str) -> bool:
    """Whether there is something, or may be: in a folder that may not be searched."""
    try:
        os.stat(path)  # noqa: PTH116 - no path of ours
    except PermissionError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def caught_signals(handler: Callable[[int], object]) -> Iterator[None]:
    """Calls ``handler`` for every signal that is to reach the command, instead of its default.

    A signal that is ignored (``nohup``) stays ignored. To be used in the main thread.
    """

    def call(signum: int, _frame: FrameType | None) -> None:
        handler(signum)

    before = {
        signum: disposition
        for signum in signal.valid_signals() - _NOT_FORWARDED
        if (disposition := signal.getsignal(signum)) not in (signal.SIG_IGN, None)
    }
    try:
        for signum in before:
            signal.signal(signum, call)
        yield
    finally:
        for signum, disposition in before.items():
            signal.signal(signum, disposition)


class _Terminal:
    """The controlling terminal, which the wrapper lends to the command."""

    def __init__(self, *, wanted: bool) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        self.wanted = wanted
        self.lent = False

    @property
    def exists(self) -> bool:
        return self._fd is not None

    def is_ours(self) -> bool:
        """Whether the wrapper's group is the foreground group."""
        try:
            return self._fd is not None and os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False  # hung up

    def lend(self) -> bool:
        """Decides whether the command gets the terminal now; the caller then hands it over."""
        self.lent = self.wanted and self.is_ours()
        return self.lent

    def take_back(self) -> None:
        if self._fd is None or not self.lent:
            return
        self.lent = False
        # Asking for it from the background would stop us.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        with contextlib.suppress(OSError):
            os.tcsetpgrp(self._fd, os.getpgrp())
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclass(eq=False, slots=True)
class PosixGuard:
    """A guard process, waiting for or watching over one command. See ``start``.

    There can be one at a time in a process, and it makes the process a child subreaper. ``extend``,
    ``end``, ``pause`` and ``resume`` may be called from any thread, ``signal`` from the main thread
    or a signal handler, all else from the main thread.
    """

    CAN_PAUSE: ClassVar[bool] = True
    CAN_READ_OUTPUT: ClassVar[bool] = True
    """Whether `_output` can pass on what the command writes."""

    _process: subprocess.Popen[bytes]
    _launch_fd: int
    _control_fd: int
    _events: Any
    _spare: frozenset[int]
    _mask: frozenset[int]
    _terminal: _Terminal
    isolated: bool = False
    """Whether the command runs in a PID namespace of its own; known once the guard is ready."""
    _launched: bool = False
    _paused: bool = False
    _resumed: bool = False
    _outcome: Outcome | None = None

    @classmethod
    def start(
        cls, stdio: Stdio | None = None, isolate: Isolate = "auto", passed: Sequence[int] = ()
    ) -> Self:
        """Starts a guard, which then waits for ``launch``; best before a lease is asked for.

        The command will have the signal mask and the ignored signals that the wrapper has now.

        Args:
            stdio: What the command reads and writes; the wrapper's own if not given.
            isolate: Whether it gets a PID namespace: where possible, always or never.
            passed: Descriptors beyond the three that the command gets too.

        Raises:
            GuardError: It does not start, ``always`` is not possible, or this is a platform
                without a guard.
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
        require_supported()
        if threading.current_thread() is not threading.main_thread():
            # The guard's parent-death signal fires when the thread that forked it ends.
            raise GuardError("a guard must be started from the main thread")
        if not sys.executable:
            raise GuardError("the Python interpreter that runs the guard is not known")
        _platform.occupy_standard_descriptors()
        stdio = stdio or Stdio()
        spare = frozenset(_platform.children(os.getpid()))
        _platform.become_subreaper()
        (launch_in, launch_out), (control_in, control_out) = os.pipe(), os.pipe()
        events_in, events_out = os.pipe()
        inherited = (launch_in, control_in, events_out)
        program = str(Path(__file__).with_name("_guard.py"))
        arguments = [*map(str, inherited), str(os.getpid()), isolate, *map(str, passed)]
        # Nothing may end the guard before it is ready to be ended by nothing: it unblocks what it
        # wants. Ctrl-C, for one, reaches it as long as it is in our session.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", program, *arguments],
                stdin=stdio.stdin,
                stdout=stdio.stdout,
                stderr=stdio.stderr,
                pass_fds=(*inherited, *passed),
            )
        except OSError as error:
            for fd in (launch_out, control_out, events_in):
                os.close(fd)
            raise GuardError(f"the guard does not start: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for fd in inherited:
                os.close(fd)
        os.set_blocking(control_out, False)
        return cls(
            _process=process,
            _launch_fd=launch_out,
            _control_fd=control_out,
            # Unbuffered: what `select` sees is all there is.
            _events=open(events_in, "rb", buffering=0),  # noqa: PTH123 - close() closes
            _spare=spare,
            _mask=frozenset(mask),
            # In a pipeline somebody else in our group may be reading the terminal (`… | less`):
            # there the command gets it when it asks, by stopping with SIGTTIN or SIGTTOU. Our own
            # descriptors tell, whatever the command gets.
            _terminal=_Terminal(wanted=not (is_pipe(0) or is_pipe(1))),
        )

    def await_ready(self) -> None:
        """Waits until the guard can launch a command.

        Raises:
            GuardError: It does not start, or ``always`` is not possible.
        """
        if not select.select([self._events], [], [], _START_SECONDS)[0]:
            self._process.kill()
            raise GuardError(f"the guard was not ready within {_START_SECONDS:.0f} s")
        message = self._next_message() or {"failed": "it died"}
        if "failed" in message:
            raise GuardError(f"the guard does not start: {message['failed']}")
        self.isolated = message["ready"]["isolated"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

        Args:
            path: The program, as ``which`` found it.
            argv: Its arguments, from its name on.
            env: Its whole environment.
            fence_boottime_ns: When all of it must have ended, in nanoseconds of ``boottime_ns``;
                None runs without a fence.
            grace_seconds: The time between TERM and KILL. It is cut where the fence is too near.

        Raises:
            GuardLostError: The guard was killed.
        """
        if self._launch_fd < 0:
            raise GuardError("a guard launches one command")
        launch = {
            "path": _exec_text(path),
            "argv": [_exec_text(word) for word in argv],
            "env": {_exec_text(name): _exec_text(value) for name, value in env.items()},
            "mask": sorted(self._mask),
            "foreground": self._terminal.lend(),
            "fence_ns": fence_boottime_ns,
            "grace_ns": int(grace_seconds * 10**9),
        }
        try:
            with open(self._launch_fd, "wb") as pipe:  # noqa: PTH123 - a descriptor
                pipe.write(json.dumps({"launch": launch}).encode() + b"\n")
        except BrokenPipeError:
            raise GuardLostError(
                "the guard was killed before it could start the command: nothing ran"
            ) from None
        finally:
            self._launch_fd = -1
        # Only now, so that no signal is passed on to a command that is not there yet.
        self._launched = True

    def extend(self, fence_boottime_ns: int) -> None:
        """Moves the fence, in nanoseconds of ``boottime_ns``; an earlier one changes nothing."""
        self._send({"extend": fence_boottime_ns})

    def remove_at_end(self, path: Path) -> None:
        """Names a file that the guard removes at the end, or once the wrapper is gone.

        To be called before ``launch``, once.
        """
        self._send({"remove": _exec_text(str(path))})

    def end(self, reason: str) -> None:
        """Ends the tree: TERM now, KILL after the grace but before the fence.

        Before ``launch`` it has the guard refuse to launch. A second call changes nothing.
        """
        self._send({"end": reason[:200]})

    def pause(self) -> None:
        """Stops the command and all that it started, until ``resume``; before ``launch`` it waits.

        It returns at once; who runs is stopped milliseconds later. The fence stays where it is:
        extend it, or the tree is ended there. Meanwhile

        * SIGCONT to the wrapper (a shell's ``fg``) continues nothing, and of other signals those
          that end a job (HUP, INT, QUIT, TERM) do so, as ``end`` does; the rest wait for
          ``resume``;
        * the wrapper takes the terminal back, so that Ctrl-C and Ctrl-Z reach it;
        * what the command reads or is sent waits: connections may run into time-outs.

        A process that was stopped otherwise before goes on with ``resume`` as well.
        """
        self._paused = True
        self._send({"pause": True})

    def resume(self) -> None:
        """Continues what ``pause`` stopped, or starts what it kept from starting."""
        self._paused = False
        self._send({"pause": False})

    def window_changed(self) -> None:
        """Tells the command that its terminal has another size. From any thread."""
        with contextlib.suppress(OSError):  # by `close`: there is nobody left to tell
            self._send({"signal": int(signal.SIGWINCH)})

    def signal(self, signum: int) -> bool:
        """Passes a signal on to the command's process group.

        Returns:
            Whether there is a command, or was; before ``launch`` only job control is heeded.
        """
        if signum == signal.SIGCONT:
            self._resume()
        elif signum == signal.SIGTSTP and (self._paused or not self._launched):
            _stop_own_group(signum)
        elif self._launched:
            self._send({"signal": int(signum)})
        else:
            return False
        return True

    def wait(self, on_event: Callable[[Event], object] = lambda _event: None) -> Outcome:
        """Waits until the command and all that it started have ended.

        With a terminal, a command that was stopped by it stops the wrapper too, as a shell
        expects; the wrapper goes on with the command when it is continued. Meanwhile it cannot
        renew, so a job that stays stopped is ended at its fence.

        Args:
            on_event: Called in this thread with what happens meanwhile.
        """
        if not self._launched:
            raise GuardError("nothing was launched")
        while self._outcome is None:
            message = self._next_message()
            if message is None:
                self._outcome = Outcome(
                    signal=signal.SIGKILL, ended_by=GUARD_LOST, survivors=self._end_orphans()
                )
            elif "outcome" in message:
                self._outcome = outcome_of(**message["outcome"])
            elif "started" in message:
                on_event(Event("started", at_boottime_ns=message["started"]))
            elif "ending" in message:
                on_event(Event("ending", reason=message["ending"]))
            elif "stopped" in message:
                on_event(Event("stopped", signal=message["stopped"]))
                self._suspend(message["stopped"])
            elif message["paused"]:
                self._terminal.take_back()
            else:
                # Nobody goes on before the terminal is lent, lest it stops by asking for it.
                self._send({"resume": self._terminal.lend()})
        self._terminal.take_back()
        return self._outcome

    def close(self) -> None:
        """Lets go of the guard; a command that still runs is ended as if the wrapper had died.

        Nothing may call ``extend``, ``end``, ``pause`` or ``resume`` from then on.
        """
        for fd in (self._launch_fd, self._control_fd):
            if fd >= 0:
                os.close(fd)
        self._launch_fd = self._control_fd = -1
        # With survivors the guard stays behind and keeps trying.
        if self._outcome is None or not self._outcome.survivors:
            self._process.wait()
        self._events.close()
        self._terminal.take_back()
        self._terminal.close()

    def _send(self, message: dict[str, Any]) -> None:
        # Far below PIPE_BUF, so it arrives whole whichever threads and signal handlers write too.
        # A guard that is gone shows in `wait`; one that does not read (stopped) misses it.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._control_fd, json.dumps(message).encode() + b"\n")

    def _next_message(self) -> dict[str, Any] | None:
        # A signal that comes in the instant before a wait begins is handled after it only, so
        # that no wait may be long.
        while not select.select([self._events], [], [], _LONGEST_WAIT_SECONDS)[0]:
            pass
        line = self._events.readline()
        message: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return message

    def _suspend(self, signum: int) -> None:
        """Follows a command that its terminal stopped, until somebody continues us."""
        if not self._terminal.exists or signum not in _JOB_CONTROL_STOPS:
            return
        asks = signum in _ASKING_FOR_TERMINAL
        self._terminal.wanted = self._terminal.wanted or asks
        if not (asks and self._terminal.is_ours()):
            self._terminal.take_back()
            self._resumed = False
            _stop_own_group(signum)
            if self._resumed:
                return  # by SIGCONT; a second time might undo the next Ctrl-Z
        self._resume()

    def _resume(self) -> None:
        """Continues the command, with the terminal if that is ours to lend."""
        if not self._launched:
            return
        self._resumed = True
        if self._terminal.lend():
            self._send({"foreground": True})
        else:
            self._send({"signal": int(signal.SIGCONT)})

    def reap_strangers(self) -> None:
        """Reaps children that we did not start.

        Process 1 of a container gets them, and one that took a shell's place has them.
        """
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):
            # The guard is left to `close`; with it gone, all is over.
            while (found := os.waitid(os.P_ALL, 0, options)) and found.si_pid != self.pid:
                os.waitpid(found.si_pid, os.WNOHANG)

    def _end_orphans(self) -> int:
        """The guard was killed: ends what comes to us, since we are a subreaper too.

        Returns:
            How many processes withstood that.
        """
        self._process.wait()
        give_up_at = time.monotonic() + _GIVE_UP_SECONDS
        while found := _platform.signal_descendants(os.getpid(), [signal.SIGKILL], self._spare):
            for pid, parent in found.items():
                if parent == os.getpid():
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > give_up_at:
                break
            time.sleep(0.005)
        return len(found)


def _exec_text(text: str) -> str:
    """The bytes that exec is to get, as Latin-1, which JSON carries whatever they are."""
    return os.fsencode(text).decode("latin-1")


def _stop_own_group(signum: int) -> None:
    """Stops as if the signal had not been caught: the whole group, which a shell knows as a job.

    The kernel ignores it where no shell could continue us.
    """
    handler = signal.signal(signum, signal.SIG_DFL)
    os.killpg(0, signum)
    signal.signal(signum, handler)


def is_pipe(fd: int) -> bool:
    """Whether this is a pipe, or a socket, which a reader may leave."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


if sys.platform == "win32":
    from holdoff._process_windows import WindowsGuard as Guard
else:
    Guard = PosixGuard
