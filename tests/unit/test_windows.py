"""What can be told here of Windows: nothing that is missing there is needed to start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
RUN = "from holdoff.cli import main; main(sys.argv[1:])"
IMPORT_ALL = """
import holdoff
for module in pkgutil.walk_packages(holdoff.__path__, "holdoff."):
    # The guard never starts there, and the tests' coordinator needs more than the client.
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


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("run --help", 0, "Run COMMAND while holding a lease"),
        ("run --token apps/a/tokens/t -- true", 126, "not supported on Windows yet"),
        ("token list", 69, "no answer from the coordinator"),
        ("spool list", 0, "no reports wait on this host"),
        (
            "budget record apps/a/tokens/t --endpoint x --status 400",
            69,
            "reports cannot wait on disk on Windows yet",
        ),
    ],
)
def test_commands_work_or_say_why_not(arguments: str, code: int, says: str) -> None:
    """Fails when a command dies of what is missing."""
    done = run(RUN, *arguments.split())
    assert says in done.stdout + done.stderr
    assert done.returncode == code
