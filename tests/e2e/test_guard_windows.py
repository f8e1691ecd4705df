"""The guard for Windows, run where there is no Windows.

All of it is real but the Job Object, in whose place stand this platform's own means: wrapper,
guard, pipes, threads, the deadline, the command and its children. The few calls of Win32 (`_job`)
are only counted and compared with their declarations, in tests/unit/test_windows.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import holdoff
from holdoff._outcome import Event, GuardError, Stdio
from holdoff._platform import boottime_ns
from holdoff._process_windows import WindowsGuard
from holdoff.v1 import lease_pb2
from tests.e2e.family import Family
from tests.e2e.processes import PROGRAMS
from tests.harness import wait_until

if TYPE_CHECKING:
    from tests.e2e.service import Service

SECOND = 10**9
FOLDER = Path(holdoff.__file__).parent
PROGRAM = (str(PROGRAMS / "windows_guard.py"), str(FOLDER))


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have guards use the stand-in for the job."""
    monkeypatch.setattr(WindowsGuard, "PROGRAM", PROGRAM)


def run(
    *argv: str, fence: float | None = None, grace: float = 0.3, stdio: Stdio | None = None
) -> tuple[Any, list[Event]]:
    """Run a command to its end."""
    events: list[Event] = []
    with WindowsGuard.start(stdio) as guard:
        launch(guard, *argv, fence=fence, grace=grace)
        return guard.wait(events.append), events


def launch(guard: WindowsGuard, *argv: str, fence: float | None = None, grace: float = 0.3) -> None:
    """Launch a command, with a fence so many seconds from now."""
    fence_ns = None if fence is None else boottime_ns() + int(fence * SECOND)
    path = argv[0] if "/" in argv[0] else f"/bin/{argv[0]}"
    guard.launch(path, argv, os.environ, fence_boottime_ns=fence_ns, grace_seconds=grace)


def gone(*pids: int) -> bool:
    """Whether these processes have ended, also those that nobody has asked about yet."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] != "Z":
                return False
    return True


def test_input_output_and_exit_code_pass(tmp_path: Path) -> None:
    """Fails when the guard keeps an end of a pipe, or reports another code."""
    with (
        (tmp_path / "in").open("w+b") as given,
        (tmp_path / "out").open("w+b") as written,
    ):
        given.write(b"hello\n")
        given.seek(0)
        stdio = Stdio(given.fileno(), written.fileno(), 2)
        outcome, events = run("sh", "-c", "cat; exit 7", stdio=stdio)
        written.seek(0)
        assert written.read() == b"hello\n"
    assert (outcome.exit_code, outcome.ended_by, outcome.survivors) == (7, None, 0)
    assert [event.kind for event in events] == ["started"]


def test_the_fence_ends_who_does_not_listen(tmp_path: Path) -> None:
    """All is over before the fence, and the command was asked first.

    Fails when the fence is not kept, or only the command itself is ended.
    """
    family, events = Family(tmp_path / "diary", stubborn=True), list[Event]()
    with WindowsGuard.start() as guard:

        def all_live() -> bool:
            guard.extend(boottime_ns() + 2 * SECOND)
            return family.lives()

        launch(guard, *family.command, fence=2, grace=1)
        wait_until(all_live)
        fence = time.time() + 2
        outcome = guard.wait(events.append)
    assert outcome.ended_by == "fence"
    assert [event.reason for event in events] == [None, "fence"]
    assert family.told() < family.last()
    assert family.ended_before(fence)


def test_renewals_move_the_fence(tmp_path: Path) -> None:
    """Fails when the first fence stays, or an earlier one counts."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with WindowsGuard.start() as guard:
        first = boottime_ns() + 2 * SECOND
        launch(guard, "sh", "-c", f"read _ <{gate}", fence=2)

        def has_passed() -> bool:
            now = boottime_ns()
            guard.extend(now + 2 * SECOND)
            guard.extend(now + SECOND // 100)
            return now > first

        wait_until(has_passed)
        gate.write_text("\n")
        assert guard.wait().exit_code == 0


def test_what_is_left_behind_is_ended(tmp_path: Path) -> None:
    """The lease may be given back when nothing runs any more.

    Fails when the guard waits for the command alone.
    """
    pid = tmp_path / "pid"
    script = f"sleep 60 </dev/null >/dev/null 2>&1 & echo $! >{pid}; exit 3"
    outcome, _ = run("sh", "-c", script)
    assert (outcome.exit_code, outcome.ended_by, outcome.survivors) == (3, None, 0)
    wait_until(lambda: gone(int(pid.read_text())))


def test_an_end_that_was_asked_for() -> None:
    """Softly, with the reason; and before the launch nothing is launched at all.

    Fails when `end` is forgotten before the launch, or gives no reason.
    """
    with WindowsGuard.start() as guard:
        launch(guard, "sleep", "60", grace=5)
        guard.end("lease lost")
        outcome = guard.wait()
        assert (outcome.ended_by, outcome.exit_code) == ("lease lost", None)
    with WindowsGuard.start() as guard:
        guard.end("withdrawn")
        launch(guard, "sleep", "60")
        outcome = guard.wait()
        assert (outcome.ended_by, outcome.status) == ("withdrawn", None)


def test_a_signal_interrupts_the_command(tmp_path: Path) -> None:
    """Ctrl-C at the wrapper is passed on, and what the command makes of it counts.

    Fails when the signal ends the command without asking.
    """
    ready = tmp_path / "ready"
    with WindowsGuard.start() as guard:
        assert not guard.signal(signal.SIGINT)
        script = f"trap 'exit 9' TERM; touch {ready}; while :; do sleep 0.05; done"
        launch(guard, "sh", "-c", script)
        wait_until(ready.exists)
        assert guard.signal(signal.SIGINT)
        outcome = guard.wait()
    assert (outcome.exit_code, outcome.ended_by) == (9, None)


@pytest.mark.parametrize(("name", "code"), [("no-such-command", 127), ("plain", 126)])
def test_what_cannot_be_run(tmp_path: Path, name: str, code: int) -> None:
    """Fails when an error of the start is taken for one of the command."""
    (tmp_path / "plain").write_text("no program")
    outcome, _ = run(str(tmp_path / name))
    assert outcome.cannot_run is not None
    assert outcome.cannot_run.exit_code == code


def test_a_wrapper_that_dies_takes_the_command_with_it(tmp_path: Path) -> None:
    """Fails when the guard does not notice the end of its pipe, or leaves the wrapper's file."""
    pid, file = tmp_path / "pid", tmp_path / "file"
    file.touch()
    source = f"""
import os, pathlib, sys
from holdoff._process_windows import WindowsGuard
WindowsGuard.PROGRAM = {PROGRAM!r}
guard = WindowsGuard.start()
guard.remove_at_end(pathlib.Path({str(file)!r}))
guard.launch("/bin/sh", ["sh", "-c", "echo $$ >{pid}; exec sleep 60"], os.environ,
    fence_boottime_ns=None, grace_seconds=0.2)
guard.wait()
"""
    wrapper = subprocess.Popen([sys.executable, "-c", source])
    command = int(wait_until(lambda: pid.exists() and pid.read_text()))
    assert file.exists()
    wrapper.kill()
    wrapper.wait()
    wait_until(lambda: gone(command) and not file.exists())


def test_a_guard_that_dies_is_told(tmp_path: Path) -> None:
    """Fails when the wrapper waits for an outcome that nobody sends.

    That the command dies with it is the Job Object's doing, and cannot be shown here.
    """
    pid = tmp_path / "pid"
    with WindowsGuard.start() as guard:
        launch(guard, "sh", "-c", f"echo $$ >{pid}; exec sleep 60")
        command = int(wait_until(lambda: pid.exists() and pid.read_text()))
        os.kill(guard.pid, signal.SIGKILL)
        outcome = guard.wait()
    assert outcome.ended_by == "guard lost"
    os.kill(command, signal.SIGKILL)


def test_without_a_job_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a guard without its job goes on, and could not end what it starts."""
    monkeypatch.setattr(WindowsGuard, "PROGRAM", (str(FOLDER / "_guard_windows.py"),))
    with pytest.raises(GuardError, match="there are Job Objects on Windows alone"):
        WindowsGuard.start()


def test_holdoff_run_with_this_guard(service: Service) -> None:
    """A whole run: its lease is given back, and one that must be quiet is ended, not paused.

    Fails when the run asks this guard for what it cannot do.
    """
    source = f"""
import sys
from holdoff._process_windows import WindowsGuard
WindowsGuard.PROGRAM = {PROGRAM!r}
import holdoff.cli.run
holdoff.cli.run.Guard = WindowsGuard
from holdoff.cli import main
main(sys.argv[1:])
"""

    def holdoff_run(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", source, "run", "--token", token, *arguments],
            env=service.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    token = service.create_token("windows", "0.1s")
    for code in (0, 4):
        done = holdoff_run("--", "sh", "-c", f"echo $HOLDOFF_TOKEN; exit {code}")
        stdout, stderr = done.communicate(timeout=40)
        assert (done.returncode, stdout) == (code, f"{token}\n"), stderr
        assert "use --log-file" in stderr
    with holdoff.Client(service.address) as client:
        states = [lease.state for lease in client.list_lease_history(token)]
        assert states == [lease_pb2.LEASE_STATE_RELEASED] * 2
        running = holdoff_run("--when-quiet", "pause", "--", "sleep", "60")
        wait_until(lambda: list(client.list_leases(token)))
        client.set_back_off(token, 60, "the provider asked")
        _, stderr = running.communicate(timeout=40)
        assert running.returncode == 75, stderr
        assert "ending the command" in stderr
