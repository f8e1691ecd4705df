"""The guard on Windows: owns the deadline of a command, and ends all that it started.

The wrapper (``_process_windows``) starts it before it asks for a lease, as on other platforms
(``_guard``). The guard is in a Job Object that dies with it, and so is all that it starts:

* it ends everybody in the job when the fence is near, when the wrapper is gone (its pipe closes),
  and when the wrapper says so: first softly, with CTRL_BREAK to the command's process group, and
  after the grace by TerminateProcess, until the job is empty but for itself;
* if the guard is killed, the kernel ends everybody in the job.

A command cannot be paused: Windows has no documented way to. Work that was handed to another
service (Task Scheduler, WMI) is no part of the job.

Messages are JSON, one a line, as in ``_guard``. This file is started by its path, with ``-I -S``,
so it imports nothing but the standard library and its neighbours ``_fence``, ``_job`` and
``_platform``.
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

# False at run time: importing `typing` would cost a quarter of the start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

    from holdoff import _platform
    from holdoff._fence import plan
    from holdoff._job import Job
else:
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    import _platform
    from _fence import plan
    from _job import Job

WRAPPER_GONE = "wrapper gone"
FENCE = "fence"

_NS = 10**9
# Who is left is looked for so often, and who withstands being ended for so long is reported.
_ROUND_NS = _NS // 50
_GIVE_UP_NS = 5 * _NS


class _Guard:
    """Decides. All that happens comes as a message, and instants as the queue's time-out."""

    def __init__(
        self,
        messages: queue.SimpleQueue[dict[str, Any] | None],
        send: Callable[[dict[str, Any]], object],
        job: Job,
    ) -> None:
        self._messages = messages
        self._send = send
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._fence_ns: int | None = None
        self._grace_ns = 0
        self._soft_at: int | None = None
        self._hard_at: int | None = None
        self._ended_by: str | None = None
        self._ending = False
        self._remove: str | None = None
        """A file that must not outlive the run."""

    def run(self) -> None:
        """Serve until the command and all that it started have ended, and say so."""
        while True:
            with contextlib.suppress(queue.Empty):
                self._obey(self._messages.get(timeout=self._sleep_seconds()))
            if self._process is None:
                if self._ended_by == WRAPPER_GONE:
                    return
                continue
            now = _platform.boottime_ns()
            if self._soft_at is not None and now >= self._soft_at and not self._ending:
                self._end(FENCE)
            if self._hard_at is not None and now >= self._hard_at:
                self._terminate()
            if self._status is None:
                continue
            left = self._job.others()
            if left and not self._ending:
                self._end(None)  # it left something behind
            given_up = self._hard_at is not None and now >= self._hard_at + _GIVE_UP_NS
            if not left or given_up:
                self._report(status=self._status, survivors=len(left))
                return

    def _sleep_seconds(self) -> float | None:
        if self._process is None:
            return None
        if self._ending or self._status is not None:
            return _ROUND_NS / _NS
        if self._soft_at is None:
            return None
        return max(0, self._soft_at - _platform.boottime_ns()) / _NS

    def _obey(self, message: dict[str, Any] | None) -> None:
        if message is None:
            self._remove_file()
            self._end(WRAPPER_GONE)
        elif "remove" in message:
            self._remove = message["remove"]
        elif "launch" in message:
            self._launch(message["launch"])
        elif "extend" in message:
            if self._fence_ns is not None and message["extend"] > self._fence_ns:
                self._fence(message["extend"])
        elif "end" in message:
            self._end(message["end"])
        elif "exited" in message:
            self._status = message["exited"]
        elif "signal" in message:
            self._interrupt()

    def _fence(self, fence_ns: int) -> None:
        self._fence_ns = fence_ns
        soft_at, hard_at = plan(_platform.boottime_ns(), fence_ns, self._grace_ns)
        if not self._ending:
            self._soft_at, self._hard_at = soft_at, hard_at

    def _launch(self, launch: dict[str, Any]) -> None:
        self._grace_ns = launch["grace_ns"]
        fence_ns = launch["fence_ns"]
        if fence_ns is not None and fence_ns <= _platform.boottime_ns():
            self._ended_by = self._ended_by or FENCE
        if self._ended_by:
            self._report(status=None)
            sys.exit()
        try:
            self._process = subprocess.Popen(
                launch["argv"],
                executable=launch["path"],
                env=launch["env"],
                # Of its own, so that it can be interrupted without us.
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                start_new_session=os.name == "posix",  # where tests run
            )
        except OSError as error:
            self._report(status=None, cannot_run=[error.errno or 0, error.strerror or str(error)])
            sys.exit()
        self._send({"started": _platform.boottime_ns()})
        if fence_ns is not None:
            self._fence(fence_ns)
        threading.Thread(target=self._wait, args=(self._process,), daemon=True).start()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        self._messages.put({"exited": process.wait()})

    def _end(self, reason: str | None) -> None:
        """End everybody: softly now, and without asking after the grace, but before the fence."""
        if self._ending:
            return
        self._ended_by = reason
        if self._process is None:
            return  # nothing will be launched
        self._ending = True
        if reason:
            self._send({"ending": reason})
        self._interrupt()
        hard_at = _platform.boottime_ns() + self._grace_ns
        self._hard_at = hard_at if self._hard_at is None else min(hard_at, self._hard_at)

    def _interrupt(self) -> None:
        """Ask the command to end; one without a console cannot be asked."""
        if self._process is not None and self._status is None:
            with contextlib.suppress(OSError):
                self._process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))

    def _remove_file(self) -> None:
        path, self._remove = self._remove, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - pathlib loads slowly

    def _terminate(self) -> None:
        for pid in self._job.others():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def _report(
        self, *, status: int | None, cannot_run: list[Any] | None = None, survivors: int = 0
    ) -> None:
        self._remove_file()
        outcome = {
            "status": status,
            "cannot_run": cannot_run,
            "ended_by": self._ended_by,
            "survivors": survivors,
        }
        self._send({"outcome": outcome})


def _read(pipe: BinaryIO, messages: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in pipe:
        messages.put(json.loads(line))
    messages.put(None)


def open_inherited(handle: int, mode: str) -> BinaryIO:
    """Open a pipe that the wrapper let through, and let it through no further."""
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - there alone

        os.set_handle_inheritable(handle, False)
        handle = msvcrt.open_osfhandle(handle, 0 if mode == "wb" else os.O_RDONLY)
    pipe: Any = os.fdopen(handle, mode, buffering=0)
    return pipe  # type: ignore[no-any-return] # `fdopen` cannot tell from a variable mode


def main(make_job: Callable[[], Job] = Job) -> None:
    """Serve the wrapper whose pipes are the arguments."""
    control, events = (
        open_inherited(int(handle), mode)
        for handle, mode in zip(sys.argv[1:], ("rb", "wb"), strict=True)
    )
    # Ctrl-C and Ctrl-Break in our console are for the wrapper, which tells us what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGBREAK"):
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)

    def send(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the wrapper is gone
            events.write(json.dumps(message).encode() + b"\n")

    try:
        job = make_job()
    except OSError as error:
        send({"failed": str(error)})
        return
    messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(control, messages), daemon=True).start()
    send({"ready": {"isolated": True}})
    _Guard(messages, send, job).run()


if __name__ == "__main__":
    main()
