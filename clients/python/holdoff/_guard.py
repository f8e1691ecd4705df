"""The guard: a small process that owns the deadline of a command and ends its whole tree.

The wrapper (W, see ``_process``) starts the guard (G) before it asks for a lease, and hands it the
command when it has one. Three processes stand between the terminal and the command::

    W   holdoff run     in the user's session
    └ G the guard       in a session of its own, child subreaper: owns the deadline
      └ I the init      in W's session, in a group of its own: starts and reaps, nothing else
        └ C the command in W's session, in a group of its own, with W's terminal

I is there for two reasons. The kernel lets a terminal stop a process group only while some parent
of it is in the same session and another group; G, in a session of its own, cannot be that parent.
And under ``--isolate`` I is process 1 of a PID namespace, so that its death is the death of
everything in there. With and without a namespace all else is the same. I has one deadline of its
own: between G's KILL and the fence it sends KILL too, in case W and G are both stopped.

The tree is ended (TERM with CONT, grace, KILL) when the fence is near, when W is gone (its pipe
closes; the parent-death signal is a second channel), when W says so, and when the command itself
has ended but left something behind. KILL comes before the fence in any case, and is repeated until
the kernel says that no child is left: orphans become children of I or G, so that is proof.

If G is killed, I and with it C die by their parent-death signals, a PID namespace dies as a whole,
and W, a subreaper too, ends what is left. G never speaks to the coordinator: it releases nothing.

W may name a file that must not outlive the run, such as one with an access token. W removes it; if
W is gone, G does.

What nobody can promise:

* a process in uninterruptible sleep (a dead NFS server) dies only when its system call ends;
* a frozen host (suspend, a paused VM) runs nothing; the timer counts that time and fires right
  after it, but the tree may run for the first milliseconds too;
* a set-id program drops its parent-death signal and an unprivileged guard may not signal it;
  it is reported as a survivor;
* SIGSTOP to W, G and I at once stops whatever would end C;
* SIGKILL to W and G at once leaves what C had started, unless in a PID namespace, and the file;
* without a namespace, a process that forks *and* leaves its group faster than /proc can be read
  may escape some rounds;
* work that was handed to another daemon (systemd-run, at, docker) is no descendant.

The tree can be paused: STOP to all below I, in rounds for who was forked meanwhile, and at once
when somebody else continues what I is the parent of. Until W resumes it, a CONT that W passes on is
held back, a command that was not launched yet is not started, and the deadline goes on. Being ended
ends the pause, so nothing stays stopped for ever; a signal by which people end jobs ends it too.

Messages are JSON, one a line. W to G: on one pipe the launch, once; on another one ``extend``,
``end``, ``pause``, ``resume``, ``signal``, ``foreground`` and, before the launch, ``remove`` (the
file), each so short that the kernel writes it atomically. G to W: ``ready`` or ``failed``,
``started``, ``stopped``, ``paused``, ``ending``, ``outcome``. Strings for exec are bytes read as
Latin-1, since the encoding of the file system may differ between W and G.

This file is started by its path, with ``-I -S`` for speed and isolation, so it imports nothing
but the standard library, and ``_platform`` and ``_fence`` from its own folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sys

# False at run time: importing `typing` would cost a quarter of the start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from holdoff import _platform
    from holdoff._fence import plan
else:
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    import _platform
    from _fence import plan

WRAPPER_GONE = "wrapper gone"
FENCE = "fence"
INIT_LOST = "guard lost"
INTERRUPTED = "interrupted while paused"

_NS = 10**9
# A pause between two rounds of KILL, and a longer one once it is clear that they don't help.
_KILL_ROUND_NS = _NS // 100
_KILL_ROUND_SLOW_NS = _NS
# Who has survived KILL for this long is reported instead of waited for.
_GIVE_UP_NS = 5 * _NS
# The wait after the first round of STOP; it doubles from round to round, up to the longest.
_STOP_ROUND_NS = _NS // 100
_LONGEST_STOP_ROUND_NS = 5 * _NS

# By these people and service managers end a job. A stopped process would act on none of them.
_INTERRUPTIONS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

# Sent by the kernel when W dies. A real-time signal means nothing to anybody else.
_PARENT_DEATH_SIGNAL = signal.SIGRTMIN if _platform.LINUX else signal.SIGUSR2


class _Lines:
    """The reading end of a pipe that carries JSON messages, one a line."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.open = True
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived; an unfinished one waits for its end."""
        try:
            while self.open:
                data = os.read(self.fd, 65536)
                self.open = bool(data)
                self._rest += data
        except BlockingIOError:
            pass
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]


def _send(fd: int, message: dict[str, Any]) -> None:
    """Writes a message; a reader that is gone, or has let the pipe fill up, misses it."""
    data = json.dumps(message).encode() + b"\n"
    try:
        while data:
            data = data[os.write(fd, data) :]
    except (BrokenPipeError, BlockingIOError):
        pass


def _wake_up_on(*signums: int) -> int:
    """Lets these signals, and no others, through: as bytes to read from the returned pipe."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for signum in signums:
        signal.signal(signum, lambda _signum, _frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signums)
    return reading


def _wait_for(fds: Sequence[int], wake_up_fd: int, timeout_ms: int | None = None) -> None:
    """Sleeps until one of the descriptors is readable, or a signal arrives."""
    poll = select.poll()
    for fd in (*fds, wake_up_fd):
        poll.register(fd, select.POLLIN)
    for fd, _events in poll.poll(timeout_ms):
        if fd == wake_up_fd:
            os.read(fd, 4096)


def _let_go_of(passed: Sequence[int]) -> None:
    """Closes the command's input and output, and whatever else was passed to it."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    for fd in (null, *passed):
        os.close(fd)


class _Init:
    """I: starts the command, reaps, passes signals and the terminal on.

    It decides nothing, except that all has to end when its deadline passes without a later one.
    """

    def __init__(
        self,
        orders_fd: int,
        reports_fd: int,
        ignored: frozenset[int],
        passed: Sequence[int],
    ) -> None:
        self._orders = _Lines(orders_fd)
        self._reports_fd = reports_fd
        self._ignored = ignored
        self._passed = passed
        self._command: int | None = None
        self._timer = _platform.BootTimer()
        self._deadline: int | None = None
        self._kill_at: int | None = None
        """When the next round of KILL is due: at the deadline, and after it until all is gone."""

    def run(self, *, isolated: bool) -> NoReturn:
        """Serves until neither the command nor anything below it is left."""
        _platform.allow_inspection(allowed=True)  # G must find us, also with hidepid
        _platform.signal_at_parents_death(signal.SIGKILL)
        _platform.become_subreaper()
        os.setpgid(0, 0)
        wake_up_fd = _wake_up_on(signal.SIGCHLD)
        if isolated:
            try:
                _platform.mount_own_proc()
            except OSError as error:
                _send(self._reports_fd, {"failed": str(error)})
                os._exit(1)
        _send(self._reports_fd, {"ready": True})
        fds = [self._orders.fd] if self._timer.fd is None else [self._orders.fd, self._timer.fd]
        while self._orders.open and self._reap():
            self._timer.arm(self._kill_at)
            _wait_for(fds, wake_up_fd, self._timer.poll_timeout_ms())
            for order in self._orders.read():
                self._obey(order)
            self._kill_when_due()
        # Without parent-death signals this is how I learns that G was killed.
        if not self._orders.open and self._command is not None:
            self._signal_command(signal.SIGKILL)
        os._exit(0)

    def _kill_when_due(self) -> None:
        now = _platform.boottime_ns()
        if self._deadline is None or self._kill_at is None or now < self._kill_at:
            return
        if self._kill_at == self._deadline:
            _send(self._reports_fd, {"fenced": True})
        _platform.signal_descendants(os.getpid(), [signal.SIGKILL])
        helpless = now - self._deadline > _GIVE_UP_NS
        self._kill_at = now + (_KILL_ROUND_SLOW_NS if helpless else _KILL_ROUND_NS)

    def _obey(self, order: dict[str, Any]) -> None:
        if "launch" in order:
            self._deadline = self._kill_at = order["launch"]["deadline"]
            self._launch(order["launch"])
        elif "deadline" in order:
            self._deadline = self._kill_at = order["deadline"]
        elif "signal" in order:
            self._signal_command(order["signal"])
        elif "resume" in order:
            if order["resume"] and self._command is not None:
                _give_terminal_to(self._command)
            _send(self._reports_fd, {"resumed": True})
        elif "foreground" in order and self._command is not None:
            _give_terminal_to(self._command)
            self._signal_command(signal.SIGCONT)

    def _signal_command(self, signum: int) -> None:
        if self._command is None:
            return
        # When it has ended, or became somebody else's, there is nothing to pass on to.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._command, signum)

    def _launch(self, launch: dict[str, Any]) -> None:
        failure, failing = os.pipe()
        init = os.getpid()
        command = os.fork()
        if command == 0:
            try:
                self._exec(launch, init)
            except OSError as error:
                os.write(failing, str(error.errno).encode())
            finally:
                os._exit(127)
        os.close(failing)
        # Ends at once with the exec, which closes the pipe.
        number = os.read(failure, 16)
        os.close(failure)
        # So that a reader sees the end of the output when the command closes it.
        _let_go_of(self._passed)
        if number:
            os.waitpid(command, 0)
            message = _cannot_run(_exec_bytes(launch["path"]), int(number))
            _send(self._reports_fd, {"cannot_run": [int(number), message]})
            os._exit(0)
        self._command = command
        _send(self._reports_fd, {"started": _platform.boottime_ns()})

    def _exec(self, launch: dict[str, Any], init: int) -> NoReturn:
        """Becomes the command, as if W had started it: same session, mask and dispositions."""
        os.setpgid(0, 0)
        if launch["foreground"]:
            _give_terminal_to(os.getpid())
        _platform.signal_at_parents_death(signal.SIGKILL)
        if os.getppid() != init:
            os._exit(127)  # I died before the line above
        signal.set_wakeup_fd(-1)
        # Signals are blocked until the mask is set, so none is lost between here and the exec.
        for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            wanted = signal.SIG_IGN if signum in self._ignored else signal.SIG_DFL
            signal.signal(signum, wanted)
        argv = [_exec_bytes(word) for word in launch["argv"]]
        env = {_exec_bytes(name): _exec_bytes(value) for name, value in launch["env"].items()}
        # Of the descriptors only 0, 1, 2 and what W was given for the command outlive the exec.
        signal.pthread_sigmask(signal.SIG_SETMASK, launch["mask"])
        path = _exec_bytes(launch["path"])
        try:
            os.execve(path, argv, env)  # noqa: S606 - no shell: that's the point
        except OSError as error:
            if error.errno != errno.ENOEXEC or not _is_script(path):
                raise
        # What every shell does with a script that does not name its interpreter.
        os.execve("/bin/sh", [b"sh", path, *argv[1:]], env)  # noqa: S606 - see above

    def _reap(self) -> bool:
        """Reaps and reports. Returns whether there is, or may yet be, something to wait for."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return self._command is None
            if pid == 0:
                return True
            if os.WIFCONTINUED(status):
                _send(self._reports_fd, {"continued": True})
            elif pid != self._command:
                continue
            elif os.WIFSTOPPED(status):
                _send(self._reports_fd, {"stopped": os.WSTOPSIG(status)})
            else:
                _send(self._reports_fd, {"exited": os.waitstatus_to_exitcode(status)})


def _exec_bytes(text: str) -> bytes:
    return text.encode("latin-1")


def _is_script(path: bytes) -> bool:
    """Whether a file without `#!` may be a shell's: its first line is text, as bash looks at it."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib loads slowly
            return b"\0" not in file.read(256).partition(b"\n")[0]
    except OSError:
        return False


def _cannot_run(path: bytes, number: int) -> str:
    """What to tell about a command that exec refuses."""
    reason = os.strerror(number)
    if number == errno.ENOENT and os.path.exists(path):  # noqa: PTH110 - pathlib loads slowly
        reason = "the interpreter that it needs is not there"
    return f"{os.fsdecode(path)}: {reason}"


def _give_terminal_to(group: int) -> None:
    """Makes a group of this session the foreground group of its terminal (SIGTTOU is blocked)."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return  # it was hung up meanwhile
    try:
        os.tcsetpgrp(terminal, group)
    except OSError:
        pass  # likewise, or the group has ended
    finally:
        os.close(terminal)


class _Guard:
    """G: owns the deadline. See the module's docstring."""

    def __init__(  # noqa: PLR0913, PLR0917 - the arguments of the command line
        self,
        launch_fd: int,
        control_fd: int,
        events_fd: int,
        wrapper: int,
        isolate: str,
        passed: Sequence[int],
    ) -> None:
        self._launch = _Lines(launch_fd)
        self._control = _Lines(control_fd)
        self._events_fd = events_fd
        os.set_blocking(events_fd, False)
        self._wrapper = wrapper
        self._isolate = isolate
        self._passed = passed
        self._timer = _platform.BootTimer()
        self._launched = False
        self._commanded = False
        """I was told to start the command."""
        self._held_launch: dict[str, Any] | None = None
        """What is to be launched when the pause is over."""
        self._paused = False
        self._stop_round_ns = 0
        self._next_stop_at: int | None = None
        self._fence_ns: int | None = None
        self._grace_ns = 0
        self._term_at: int | None = None
        self._kill_at: int | None = None
        """When KILL is due by the fence, or, once the tree is being ended, at the latest."""
        self._next_round_at: int | None = None
        """When the tree is being ended: the next round of KILL."""
        self._ended_by: str | None = None
        self._init_gone = False
        self._started = False
        self._status: int | None = None
        """How the command ended: its exit code, or a signal's number, negative."""
        self._cannot_run: list[Any] | None = None
        self._reported = False
        self._remove: bytes | None = None
        """The file that must not outlive the run."""

    def run(self) -> None:
        """Serves until the tree is gone, or until W gives up before it launched anything."""
        # SIGPIPE and SIGXFSZ are ignored by Python itself, whatever W had.
        ignored = frozenset(
            signum
            for signum in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}
            if signal.getsignal(signum) is signal.SIG_IGN
        )
        # W blocked all signals around our start, so nothing could get through until here.
        wake_up_fd = _wake_up_on(signal.SIGCHLD, _PARENT_DEATH_SIGNAL)
        _platform.signal_at_parents_death(_PARENT_DEATH_SIGNAL)
        _platform.become_subreaper()
        if not self._start_init(ignored):
            return
        os.setsid()
        _let_go_of(self._passed)
        while not self._step():
            self._timer.arm(self._next_alarm())
            channels = [self._launch, self._control, self._reports]
            fds = [channel.fd for channel in channels if channel.open]
            if self._timer.fd is not None:
                fds.append(self._timer.fd)
            _wait_for(fds, wake_up_fd, self._timer.poll_timeout_ms())

    # Starting ------------------------------------------------------------------------------

    def _start_init(self, ignored: frozenset[int]) -> bool:
        """Starts I, in a PID namespace where that is wished and works, and tells W."""
        reason = None
        if self._isolate != "never":
            try:
                namespace = _platform.enter_pid_namespace()
            except OSError as error:
                reason = str(error)
            else:
                reason = self._fork_init(ignored, isolated=True)
                if reason is None:
                    os.close(namespace)
                    _send(self._events_fd, {"ready": {"isolated": True}})
                    return True
                _platform.leave_pid_namespace(namespace)
        if self._isolate != "always":
            reason = self._fork_init(ignored, isolated=False)
            if reason is None:
                _send(self._events_fd, {"ready": {"isolated": False}})
                return True
        _send(self._events_fd, {"failed": reason})
        return False

    def _fork_init(self, ignored: frozenset[int], *, isolated: bool) -> str | None:
        """Forks I and waits until it is ready. Returns why it is not, or None."""
        orders, self._orders_fd = os.pipe()
        reports_fd, reporting = os.pipe()
        self._init = os.fork()
        if self._init == 0:
            for fd in (
                self._launch.fd,
                self._control.fd,
                self._events_fd,
                self._orders_fd,
                reports_fd,
            ):
                os.close(fd)
            _Init(orders, reporting, ignored, self._passed).run(isolated=isolated)
        os.close(orders)
        os.close(reporting)
        self._reports = _Lines(reports_fd)
        select.select([reports_fd], [], [])
        report = (self._reports.read() or [{"failed": "the guard's init process died"}])[0]
        if "ready" in report:
            return None
        os.waitpid(self._init, 0)
        os.close(self._orders_fd)
        os.close(reports_fd)
        return str(report["failed"])

    # One turn of the loop ------------------------------------------------------------------

    def _step(self) -> bool:
        """Takes in all that happened, and acts on it. Returns whether G may end."""
        now = _platform.boottime_ns()
        self._receive(now)
        children_left = self._reap()
        for report in self._reports.read():
            self._take(report)
        wrapper_gone = not self._control.open or os.getppid() != self._wrapper
        if wrapper_gone:
            self._remove_file()
        if not self._launched:
            # W never launches twice, so a closed pipe without a launch means that none will come.
            return wrapper_gone or not self._launch.open or not children_left
        if not children_left:
            self._report_outcome(0)
            return True
        if self._next_round_at is None:
            self._watch(now, wrapper_gone=wrapper_gone)
        elif now >= self._next_round_at:
            self._kill(now)
        return False

    def _watch(self, now: int, *, wrapper_gone: bool) -> None:
        """Ends the tree when there is a reason to; keeps it stopped while it is paused."""
        if wrapper_gone:
            self._end(WRAPPER_GONE, now)
        elif self._term_at is not None and now >= self._term_at:
            self._end(FENCE, now)
        elif self._status is not None or self._cannot_run is not None:
            self._end(None, now)
        elif self._init_gone:
            self._end(INIT_LOST, now)
        elif self._next_stop_at is not None and now >= self._next_stop_at:
            self._stop(now)

    def _receive(self, now: int) -> None:
        control = self._control.read()
        # Read after the other pipe, so that no message that followed the launch comes before it;
        # but an end or a pause that came in time stops it.
        launch = self._launch.read()
        messages = launch + control
        if launch:
            messages.sort(key=lambda message: "end" not in message and "pause" not in message)
        for message in messages:
            if "remove" in message:
                self._remove = _exec_bytes(message["remove"])
            else:
                self._obey(message, now)

    def _next_alarm(self) -> int | None:
        if not self._launched:
            return None
        if self._next_round_at is not None:
            return self._next_round_at
        alarms = (self._term_at, self._next_stop_at)
        return min((at for at in alarms if at is not None), default=None)

    def _obey(self, message: dict[str, Any], now: int) -> None:
        if "launch" in message:
            self._accept(message["launch"], now)
        elif "extend" in message:
            self._set_fence(message["extend"], now)
        elif "end" in message:
            if self._launched:
                self._end(message["end"], now)
            else:
                self._ended_by = message["end"]
        elif "pause" in message:
            self._pause(wanted=message["pause"], now=now)
        elif self._held_launch is not None and "resume" in message and not self._paused:
            self._start_command({**self._held_launch, "foreground": message["resume"]})
            self._held_launch = None
        elif not self._paused:
            _send(self._orders_fd, message)
        elif message.get("signal") in _INTERRUPTIONS:
            self._end(INTERRUPTED, now, message["signal"])
        elif message.get("signal", signal.SIGCONT) != signal.SIGCONT:
            _send(self._orders_fd, message)

    def _accept(self, launch: dict[str, Any], now: int) -> None:
        self._launched = True
        self._grace_ns = launch["grace_ns"]
        self._set_fence(launch["fence_ns"], now)
        if self._fence_ns is not None and now >= self._fence_ns:
            self._ended_by = self._ended_by or FENCE
        if self._ended_by is not None:
            os.kill(self._init, signal.SIGKILL)  # before it has started anything
        elif self._paused:
            self._held_launch = launch
            _send(self._events_fd, {"paused": True})
        else:
            self._start_command(launch)

    def _start_command(self, launch: dict[str, Any]) -> None:
        _send(self._orders_fd, {"launch": {**launch, "deadline": self._init_deadline()}})
        # From here on G never blocks on I.
        os.set_blocking(self._orders_fd, False)
        self._commanded = True

    def _init_deadline(self) -> int | None:
        """When I sends KILL by itself: halfway between ours, which goes first, and the fence."""
        if self._fence_ns is None or self._kill_at is None:
            return None
        return (self._fence_ns + self._kill_at) // 2

    def _set_fence(self, fence_ns: int | None, now: int) -> None:
        if fence_ns is None or self._next_round_at is not None:
            return
        # Renewals come from another thread than the launch, so they may overtake each other.
        self._fence_ns = max(fence_ns, self._fence_ns or 0)
        self._term_at, self._kill_at = plan(now, self._fence_ns, self._grace_ns)
        if self._commanded:
            _send(self._orders_fd, {"deadline": self._init_deadline()})

    def _take(self, report: dict[str, Any]) -> None:
        if "exited" in report:
            self._status = report["exited"]
        elif "cannot_run" in report:
            self._cannot_run = report["cannot_run"]
        elif "fenced" in report:
            self._ended_by = self._ended_by or FENCE
        else:
            self._started = self._started or "started" in report
            if "continued" not in report and "resumed" not in report:
                _send(self._events_fd, report)
            if self._paused and "stopped" not in report:
                self._stop_round_ns = _STOP_ROUND_NS
                self._next_stop_at = _platform.boottime_ns()
            elif "resumed" in report:
                _platform.signal_descendants(self._init, [signal.SIGCONT])

    def _reap(self) -> bool:
        """Reaps I and the orphans that came to G. Returns whether a child is left."""
        while True:
            try:
                pid, _status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            # I by itself ends last, so if any other child is left, it was killed.
            self._init_gone = self._init_gone or pid == self._init

    # Pausing -------------------------------------------------------------------------------

    def _pause(self, *, wanted: bool, now: int) -> None:
        if wanted == self._paused or self._next_round_at is not None:
            return
        self._paused = wanted
        self._stop_round_ns, self._next_stop_at = _STOP_ROUND_NS, None
        # Before it has started, I waits for it and heeds nothing; it is stopped right after that.
        if wanted and self._started:
            self._stop(now)
        # W then takes the terminal, or lends it and says `resume`.
        if self._launched:
            _send(self._events_fd, {"paused": wanted})

    def _stop(self, now: int) -> None:
        """One round of STOP, and another one later for who was forked meanwhile."""
        _platform.signal_descendants(self._init, [signal.SIGSTOP])
        self._next_stop_at = now + self._stop_round_ns
        self._stop_round_ns = min(2 * self._stop_round_ns, _LONGEST_STOP_ROUND_NS)

    # Ending --------------------------------------------------------------------------------

    def _end(self, reason: str | None, now: int, signum: int = signal.SIGTERM) -> None:
        """Sends TERM, and CONT since a stopped process acts on nothing; KILL comes later.

        Args:
            reason: Why; None when the command ended by itself and this is for its leftovers.
            now: The time now, in nanoseconds of ``boottime_ns``.
            signum: What to send instead of TERM.
        """
        if self._next_round_at is not None:
            return
        self._ended_by = self._ended_by or reason
        if reason is not None:
            _send(self._events_fd, {"ending": reason})
        kill_at = now + self._grace_ns
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        self._next_round_at = self._kill_at
        self._paused = False
        if self._held_launch is not None:
            os.kill(self._init, signal.SIGKILL)  # before it has started anything
        _platform.signal_descendants(os.getpid(), [signum, signal.SIGCONT])

    def _kill(self, now: int) -> None:
        """One round of KILL, I included: its children come to G, or its namespace ends."""
        left = _platform.signal_descendants(os.getpid(), [signal.SIGKILL])
        helpless = self._kill_at is not None and now - self._kill_at > _GIVE_UP_NS
        if helpless:
            self._report_outcome(len(left))
        pause = _KILL_ROUND_SLOW_NS if helpless else _KILL_ROUND_NS
        self._next_round_at = _platform.boottime_ns() + pause

    def _remove_file(self) -> None:
        """Removes the file once: another run may use its name after that."""
        path, self._remove = self._remove, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - pathlib loads slowly

    def _report_outcome(self, survivors: int) -> None:
        if self._reported:
            return
        self._reported = True
        self._remove_file()  # W may be killed before it does so, and G ends now
        # What I had to say before it ended.
        while self._reports.open and not survivors:
            for report in self._reports.read():
                self._take(report)
        if self._started and self._status is None and not survivors:
            # I went first, and with it whoever could tell: KILL from us, or by its death.
            self._status = -signal.SIGKILL
            self._ended_by = self._ended_by or INIT_LOST
        _send(
            self._events_fd,
            {
                "outcome": {
                    "status": self._status,
                    "cannot_run": self._cannot_run,
                    "ended_by": self._ended_by,
                    "survivors": survivors,
                }
            },
        )


def main() -> None:
    """Runs the guard: its descriptors, the pid of W and the isolation come as arguments.

    After them come the descriptors that the command is to have beyond the first three.
    """
    # The command has the same user: through /proc it could reach our pipes and move its deadline.
    _platform.allow_inspection(allowed=False)
    launch, control, events, wrapper, isolate, *passed = sys.argv[1:]
    for fd in (launch, control, events):
        os.set_inheritable(int(fd), False)
    _Guard(
        int(launch), int(control), int(events), int(wrapper), isolate, [int(fd) for fd in passed]
    ).run()


if __name__ == "__main__":
    main()
