"""What can be told here of Windows: nothing that is missing there is needed to start."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from holdoff import _job
from holdoff._process import PosixGuard
from holdoff._process_windows import WindowsGuard

# The parts of the standard library and of others that work there are loaded before the change.
LIKE_WINDOWS = """
import asyncio, importlib, importlib.metadata, json, logging, os, pkgutil, signal, ssl, subprocess
import sys, tempfile, tomllib, uuid
import aiohttp, click.shell_completion, google.rpc.status_pb2, grpc, grpc_status, msgspec
import rich.console, rich.live, rich.prompt, rich.table
sys.platform = "win32"
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
there = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
for name in {one for one in dir(signal) if one.startswith("SIG") and "_" not in one} - there:
    delattr(signal, name)
for name in ("fork", "geteuid", "getuid", "killpg", "openpty", "pipe2", "setsid", "uname"):
    delattr(os, name)
"""
RUN_EACH = """
import contextlib, io
from holdoff import _core
from holdoff.cli import main
_core.REPORT_SECONDS = 0.1
ended = {}
for line in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(line.split())
        except SystemExit as end:
            ended[line] = end.code, said.getvalue()
print(json.dumps(ended))
"""
IMPORT_ALL = """
import holdoff
for module in pkgutil.walk_packages(holdoff.__path__, "holdoff."):
    # This guard is not that of Windows, and the tests' coordinator needs more than the client.
    if module.name not in ("holdoff._guard", "holdoff.testing") and "__main__" not in module.name:
        importlib.import_module(module.name)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program where all that Windows does not have is gone."""
    return subprocess.run(
        [sys.executable, "-c", LIKE_WINDOWS + program, *arguments],
        env={**os.environ, "HOLDOFF_ENDPOINT": "127.0.0.1:1", "USERNAME": "ann"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_module_is_imported() -> None:
    """Fails when a module other than the guard needs `fcntl` or a signal as it is imported."""
    done = run(IMPORT_ALL)
    assert (done.returncode, done.stderr) == (0, "")


COMMANDS = {
    "run --help": (0, "Run COMMAND while holding a lease"),
    "run --token apps/a/tokens/t -- no-such": (127, "no-such: command not found"),
    "token list": (69, "no answer from the coordinator"),
    "spool list": (0, "no reports are stored on this host"),
    "budget record apps/a/tokens/t --endpoint x --status 400": (
        69,
        "reports cannot be stored on Windows yet",
    ),
}


@pytest.fixture(scope="module")
def ended() -> dict[str, tuple[int, str]]:
    """How each command ended, and what it said; one process runs them all."""
    done = run(RUN_EACH, *COMMANDS)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_or_say_why_not(ended: dict[str, tuple[int, str]], command: str) -> None:
    """Fails when a command dies of what is missing."""
    expected, says = COMMANDS[command]
    code, said = ended[command]
    assert says in said
    assert code == expected


def test_both_guards_can_be_asked_the_same() -> None:
    """Fails when one of them gets a method, or an argument, that the other has not."""

    def face(guard: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in inspect.getmembers(guard, callable)
            if not name.startswith("_")
        }

    assert face(WindowsGuard) == face(PosixGuard)
    assert {name for name in vars(WindowsGuard) if name.startswith("CAN_")} == {
        name for name in vars(PosixGuard) if name.startswith("CAN_")
    }


class Kernel:
    """Stands for kernel32: notes what is called, and answers."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            answer = self._answers.get(name, 1)
            return answer(*arguments) if callable(answer) else answer

        call.restype = None  # type: ignore[attr-defined] # as functions of ctypes have one
        setattr(self, name, call)
        return call


def test_a_job_is_made_limited_and_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, and everybody in it dies with its last handle.

    Fails when the limit is not set, or set after the process is in the job. Sizes are those of
    64-bit Windows, where 144 bytes are JOBOBJECT_EXTENDED_LIMIT_INFORMATION.
    """
    kernel = Kernel({"CreateJobObjectW": 77, "GetCurrentProcess": -1})
    monkeypatch.setattr(_job, "_kernel", lambda: kernel)
    _job.Job()
    names = [name for name, _ in kernel.calls]
    assert names == [
        "CreateJobObjectW",
        "SetInformationJobObject",
        "GetCurrentProcess",
        "AssignProcessToJobObject",
    ]
    handle, kind, limits, size = kernel.calls[1][1]
    assert (handle.value, kind, size) == (77, 9, 144)
    assert limits._obj.BasicLimitInformation.LimitFlags == 0x2000
    assert [one.value for one in kernel.calls[3][1]] == [77, 2**64 - 1]


def test_who_is_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but ourselves. Fails when the list is read beyond its end, or we would end ourselves."""

    def list_processes(_job: Any, kind: int, found: Any, _size: int, _length: None) -> int:
        assert kind == 3
        for number, pid in enumerate((os.getpid(), 4711, 4712)):
            found._obj.ProcessIdList[number] = pid
        found._obj.NumberOfProcessIdsInList = 3
        return 1

    kernel = Kernel({"QueryInformationJobObject": list_processes})
    monkeypatch.setattr(_job, "_kernel", lambda: kernel)
    assert _job.Job().others() == [4711, 4712]
