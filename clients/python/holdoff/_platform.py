"""What the platform does differently, in one place.

Both sides of the wrapper use this module: the wrapper itself (``_process``) and the guard
(``_guard``), which imports it without site-packages and without the rest of the package. It
therefore needs nothing but the standard library, and only the parts that load fast.

Linux has everything. macOS has no parent-death signal, no subreaper and no namespaces: there the
guard still ends what it can see (the command's process group and all who have not been orphaned),
but a descendant that left both is not found. Windows has a guard of its own (``_guard_windows``),
with a Job Object instead of all that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time

# False at run time: importing `typing` would cost the guard a quarter of its start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

LINUX = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_CLOCK_BOOTTIME = 7
_TFD_NONBLOCK_CLOEXEC = 0o2004000
_TFD_TIMER_ABSTIME = 1
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MS_SLAVE_REC = 1 << 19 | 0x4000

# On Windows there is no C library of this kind, and nobody who needs it.
_libc = None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)


class UnsupportedPlatformError(RuntimeError):
    """Commands cannot be run under a guard here."""


# A pipe's share of the memory that a user's pipes may have (64 MiB): room for large reads, also
# with a hundred wrappers.
PIPE_BYTES = 256 * 1024


def require_supported() -> None:
    """Refuses a platform on which the guard could not keep its promises.

    Raises:
        UnsupportedPlatformError: On a Linux without /proc.
    """
    if LINUX and not os.path.exists("/proc/self/stat"):  # noqa: PTH110 - pathlib loads slowly
        raise UnsupportedPlatformError("/proc must be mounted to find a command's descendants")


def _call(function: str, *arguments: object) -> int:
    """Calls a function of the C library.

    Raises:
        OSError: When it returned a negative value.
    """
    result: int = getattr(_libc, function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def boottime_ns() -> int:
    """Nanoseconds of a clock that never steps, and runs on while the host is suspended.

    Linux: CLOCK_BOOTTIME. macOS: CLOCK_MONOTONIC (Python's own monotonic clock stops in sleep
    there). Windows: the monotonic clock, which counts sleep.
    """
    if sys.platform == "win32":
        return time.monotonic_ns()
    return time.clock_gettime_ns(_CLOCK_BOOTTIME if LINUX else time.CLOCK_MONOTONIC)


class BootTimer:
    """An alarm at an instant of ``boottime_ns``, for use with ``poll``.

    On Linux it is a timerfd, which also fires right after a resume from suspend, when the instant
    passed in the meantime; a poll with a time-out would sleep on for what it had left.
    """

    def __init__(self) -> None:
        self._at_ns: int | None = None
        self.fd: int | None = None
        if LINUX:
            self.fd = _call("timerfd_create", _CLOCK_BOOTTIME, _TFD_NONBLOCK_CLOEXEC)

    def arm(self, at_ns: int | None) -> None:
        """Sets the instant, in nanoseconds of ``boottime_ns``; None: no alarm."""
        if at_ns == self._at_ns:
            return
        self._at_ns = at_ns
        if self.fd is not None:
            seconds, nanoseconds = divmod(max(at_ns, 1), 10**9) if at_ns is not None else (0, 0)
            value = (ctypes.c_long * 4)(0, 0, seconds, nanoseconds)
            _call("timerfd_settime", self.fd, _TFD_TIMER_ABSTIME, value, None)

    def poll_timeout_ms(self) -> int | None:
        """How long a poll may sleep, where no descriptor wakes it up."""
        if self.fd is not None or self._at_ns is None:
            return None
        # Never long, so that a sleep of the host is noticed soon after it.
        return min(max((self._at_ns - boottime_ns()) // 10**6 + 1, 0), 1000)


def signal_at_parents_death(signum: int) -> None:
    """Has the kernel send this process ``signum`` when the *thread* that forked it ends."""
    if LINUX:
        _call("prctl", _PR_SET_PDEATHSIG, signum, 0, 0, 0)


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process, instead of init's."""
    if LINUX:
        _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def allow_inspection(*, allowed: bool) -> None:
    """Set whether other processes of this user may read our memory and open our descriptors.

    A forked process inherits the setting. Where /proc is mounted with ``hidepid``, a process that
    may not be inspected is hidden from all unprivileged processes.
    """
    if LINUX:
        _call("prctl", _PR_SET_DUMPABLE, int(allowed), 0, 0, 0)


def enter_pid_namespace() -> int:
    """Has the next child of this process be the init of a new PID namespace.

    Returns:
        A descriptor of the namespace so far, for ``leave_pid_namespace``.

    Raises:
        OSError: Where that is not permitted (it takes CAP_SYS_ADMIN) or not possible.
    """
    if not LINUX:
        raise OSError(0, "there are no PID namespaces on this platform")
    namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _CLONE_NEWPID)
    except OSError:
        os.close(namespace)
        raise
    return namespace


def leave_pid_namespace(namespace: int) -> None:
    """Undoes ``enter_pid_namespace``: later children are born in the former namespace."""
    _call("setns", namespace, _CLONE_NEWPID)
    os.close(namespace)


def mount_own_proc() -> None:
    """Shows this process and its descendants their own PID namespace at /proc.

    Mounts that the host makes later still arrive (slave propagation); ours stay here.

    Raises:
        OSError: Where that is not permitted.
    """
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_SLAVE_REC), None)
    _call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), None)


def children(parent: int) -> list[int]:
    """The pids of a process's children, zombies included."""
    return [pid for pid, its_parent, _group in _process_table() if its_parent == parent]


def signal_descendants(
    root: int, signums: Iterable[int], spare: Collection[int] = ()
) -> dict[int, int]:
    """Sends each signal in turn to every descendant of a process.

    One pass over the process table may miss a process that is being forked meanwhile; a caller
    who must have all of them repeats it until the kernel says that there are none. A process
    group that consists of descendants alone is signalled as a group, which is atomic: a fork
    cannot slip away from that.

    Args:
        root: The pid of the process whose descendants are meant; itself it is left alone.
        signums: The signals, in order.
        spare: Pids that are left alone, with all below them.

    Returns:
        Each descendant found, zombies included, with its parent.
    """
    below: dict[int, list[int]] = {}
    groups: dict[int, set[int]] = {}
    for pid, parent, group in _process_table():
        below.setdefault(parent, []).append(pid)
        groups.setdefault(group, set()).add(pid)
    found: dict[int, int] = {}
    ancestors = [root]
    while ancestors:
        parent = ancestors.pop()
        pids = [pid for pid in below.get(parent, ()) if pid not in spare]
        found.update(dict.fromkeys(pids, parent))
        ancestors += pids
    # kill(2) reads -1 as everybody and 0 as our own group.
    whole = [group for group, members in groups.items() if group > 1 and members <= found.keys()]
    single = found.keys() - {pid for group in whole for pid in groups[group]}
    for signum in signums:
        for target in [-group for group in whole] + list(single):
            try:
                os.kill(target, signum)
            except (ProcessLookupError, PermissionError):
                continue  # gone, or no longer ours (a set-id program): the caller counts
    return found


def occupy_standard_descriptors() -> None:
    """Opens /dev/null for those of 0, 1 and 2 that are closed: no pipe may become one."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - stdin, stdout, stderr
        pass
    os.close(fd)


def inherited_descriptors() -> list[int]:
    """The inheritable descriptors beyond 0, 1 and 2, which the command gets too."""
    if sys.platform == "win32":
        return []
    inherited = []
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - pathlib loads slowly
        with contextlib.suppress(OSError):  # that of the listing itself
            if int(name) > 2 and os.get_inheritable(int(name)):  # noqa: PLR2004 - stderr
                inherited.append(int(name))
    return inherited


# Without waiting, should it be no file after all; and on Windows byte by byte.
READ_LOG = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_at(fd: int, size: int, position: int) -> bytes:
    """Reads from a file that only this thread reads."""
    if sys.platform == "win32":
        os.lseek(fd, position, os.SEEK_SET)
        return os.read(fd, size)
    return os.pread(fd, size, position)


def block_signals() -> None:
    """Leaves all signals to other threads; Windows sends them to the main thread alone."""
    if sys.platform != "win32":
        import signal  # noqa: PLC0415 - not for the guard, which does this by itself

        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def open_wide_pipe() -> tuple[int, int]:
    """A pipe with room for ``PIPE_BYTES``, where that may be had: its reading and writing end."""
    reading, writing = os.pipe()
    if LINUX:
        import fcntl  # noqa: PLC0415 - not for the guard

        with contextlib.suppress(OSError):  # the user's share may be used up: it works as it is
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


def open_raw_terminal(like: int) -> tuple[int, int]:
    """A pseudo-terminal that hands on what is written to it as it is.

    Args:
        like: A terminal whose settings (the speed, say) and window size it takes over.

    Returns:
        The end to read from, and the end that is a terminal.
    """
    import termios  # noqa: PLC0415 - not for the guard, and not on Windows
    import tty  # noqa: PLC0415

    reading, terminal = os.openpty()
    termios.tcsetattr(terminal, termios.TCSANOW, termios.tcgetattr(like))
    tty.setraw(terminal, termios.TCSANOW)
    copy_window_size(like, reading)
    return reading, terminal


def copy_window_size(source: int, target: int) -> bool:
    """Gives a terminal the window size of another one. Returns whether it had another size."""
    import fcntl  # noqa: PLC0415 - not for the guard, and not on Windows
    import termios  # noqa: PLC0415

    size, before = (fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)) for fd in (source, target))
    if size == before:
        return False
    fcntl.ioctl(target, termios.TIOCSWINSZ, size)
    return True


def _process_table() -> Iterable[tuple[int, int, int]]:
    """All processes that can be seen, as (pid, parent, process group)."""
    return _linux_process_table() if LINUX else _ps_process_table()


def _linux_process_table() -> Iterable[tuple[int, int, int]]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib loads slowly
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{name}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # ended in the meantime
        try:
            # "pid (name) state ppid pgrp …", where the name may hold anything, also ")".
            fields = os.read(fd, 1024).rpartition(b")")[2].split()
        except ProcessLookupError:
            continue
        finally:
            os.close(fd)
        yield int(name), int(fields[1]), int(fields[2])


def _ps_process_table() -> Iterable[tuple[int, int, int]]:
    import subprocess  # noqa: PLC0415 - slow to load, and only needed without /proc

    listing = subprocess.run(
        ["/bin/ps", "-axo", "pid=,ppid=,pgid="], stdout=subprocess.PIPE, check=True
    ).stdout
    for line in listing.splitlines():
        pid, parent, group = line.split()
        yield int(pid), int(parent), int(group)
