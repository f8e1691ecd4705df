"""A Job Object: what Windows has to end a process with all that it started.

https://learn.microsoft.com/windows/win32/procthread/job-objects
"""

from __future__ import annotations

import ctypes
import os
import sys

# False at run time: importing `typing` would cost the guard a quarter of its start-up time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Values of winnt.h.
_EXTENDED_LIMIT_INFORMATION = 9
_BASIC_PROCESS_ID_LIST = 3
_KILL_ON_JOB_CLOSE = 0x2000
_MOST_PIDS = 4096


class _BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION."""

    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", ctypes.c_uint32),
        ("SchedulingClass", ctypes.c_uint32),
    )


class _ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


class _ProcessIds(ctypes.Structure):
    """JOBOBJECT_BASIC_PROCESS_ID_LIST."""

    _fields_ = (
        ("NumberOfAssignedProcesses", ctypes.c_uint32),
        ("NumberOfProcessIdsInList", ctypes.c_uint32),
        ("ProcessIdList", ctypes.c_size_t * _MOST_PIDS),
    )


def _kernel() -> Any:
    if sys.platform != "win32":
        raise OSError(0, "there are Job Objects on Windows alone")
    return ctypes.WinDLL("kernel32", use_last_error=True)


class Job:
    """A job that this process is in, with all that it will start, and that dies with it.

    Nobody can leave it, and the kernel ends who is left when the last handle of it is closed: ours,
    which nobody inherits. A job within a job, such as that of Task Scheduler, takes Windows 8.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self) -> None:
        self._kernel = _kernel()
        self._kernel.CreateJobObjectW.restype = ctypes.c_void_p
        self._kernel.GetCurrentProcess.restype = ctypes.c_void_p
        handle = self._kernel.CreateJobObjectW(None, None)
        self._check("CreateJobObject", handle)
        self._handle = ctypes.c_void_p(handle)
        limits = _ExtendedLimits()
        limits.BasicLimitInformation.LimitFlags = _KILL_ON_JOB_CLOSE
        self._check(
            "SetInformationJobObject",
            self._kernel.SetInformationJobObject(
                self._handle,
                _EXTENDED_LIMIT_INFORMATION,
                ctypes.byref(limits),
                ctypes.sizeof(limits),
            ),
        )
        ourselves = ctypes.c_void_p(self._kernel.GetCurrentProcess())
        self._check(
            "AssignProcessToJobObject",
            self._kernel.AssignProcessToJobObject(self._handle, ourselves),
        )

    def others(self) -> list[int]:
        """The processes in the job, apart from this one."""
        found = _ProcessIds()
        answered = self._kernel.QueryInformationJobObject(
            self._handle,
            _BASIC_PROCESS_ID_LIST,
            ctypes.byref(found),
            ctypes.sizeof(found),
            None,
        )
        self._check("QueryInformationJobObject", answered)
        pids = found.ProcessIdList[: found.NumberOfProcessIdsInList]
        return [pid for pid in pids if pid != os.getpid()]

    def _check(self, function: str, result: object) -> None:
        if not result and sys.platform == "win32":
            number = ctypes.get_last_error()
            raise OSError(number, f"{function}: {ctypes.FormatError(number).strip()}")
