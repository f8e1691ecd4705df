"""The guard, with real processes, signals and terminals.

`programs/guard_driver.py` plays the wrapper: it launches a command under a guard as its options
say, and writes what it sees to a report. Everything the command starts carries a mark in its
environment, by which a test finds what is left of it.
"""

import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdoff import _fence, _process
from holdoff._process import CannotRunError, Guard, GuardError, boottime_ns, which
from tests.e2e.family import Family
from tests.e2e.processes import KILL_ROOM_SECONDS, Terminal, library_program, program, python
from tests.harness import at_length, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what only Linux promises")

SECOND = 10**9


@functools.cache
def _may_isolate() -> bool:
    folder = str(Path(_process.__file__).parent)
    probe = (
        "import os, sys; sys.path.append(sys.argv[1]); import _platform as p\n"
        "p.enter_pid_namespace()\n"
        "if (pid := os.fork()) == 0: p.mount_own_proc()\n"
        "else: sys.exit(os.waitpid(pid, 0)[1])"
    )
    command = [sys.executable, "-I", "-S", "-c", probe, folder]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def need_namespace() -> None:
    """Skip a test where the guard cannot make a PID namespace."""
    if not _may_isolate():
        pytest.skip("a PID namespace takes CAP_SYS_ADMIN, which this process has not")


both_modes = pytest.mark.parametrize("isolate", ["never", "always"])


@dataclass
class Run:
    """A driver with its command."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] = field(init=False)
    before: Sequence[str] = ()
    """A command that starts the driver."""

    @property
    def note(self) -> Path:
        """A file for the command to write."""
        return self.folder / "note"

    @property
    def gate(self) -> Path:
        """A FIFO, for a command to wait until the test opens it to write."""
        path = self.folder / "gate"
        if not path.exists():
            os.mkfifo(path)
        return path

    def command(self, argv: list[str], **options: object) -> list[str]:
        """The driver's command line."""
        report = str(self.folder / "report")
        usual = {"isolate": "never", "report": report, "mark": self.mark, "argv": argv}
        settings = usual | options
        if settings["isolate"] == "always" and "unprivileged" not in settings:
            need_namespace()
        return library_program("guard_driver", json.dumps(settings))

    def start(self, argv: list[str], *, popen: Any = None, **options: object) -> None:
        """Start the driver, in a session of its own without a terminal."""
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, **(popen or {})}
        orders = self.folder / "orders"
        os.mkfifo(orders)
        command = [*self.before, *self.command(argv, orders=str(orders), **options)]
        self.process = subprocess.Popen(command, start_new_session=True, **streams)

    def start_family(self, *, stubborn: bool = False, **options: object) -> Family:
        """Start three generations, and wait until they live."""
        family = Family(self.note, stubborn=stubborn)
        self.start(family.command, **options)
        family.await_all()
        wait_until(lambda: len(self.alive()) == 3)  # and no longer who made the last an orphan
        return family

    def start_listener(self, **options: object) -> None:
        """Start a command that notes its signals, and wait until it does."""
        self.start(program("listener", self.note), **options)
        wait_until(self.note.exists)

    def order(self, method: str, *arguments: object) -> None:
        """Have the driver call a method of its guard."""
        with (self.folder / "orders").open("w") as orders:
            orders.write(json.dumps([method, *arguments]) + "\n")

    def finish(self) -> dict[str, Any]:
        """Wait for the driver, and give the outcome it reported."""
        self.process.wait(30)
        return self.outcome

    @property
    def reports(self) -> list[dict[str, Any]]:
        """What the driver reported so far."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "report").read_text()
            return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        return []

    def reported(self, key: str) -> Any:
        """The first value reported under this key; waits for it."""
        return wait_until(lambda: [report[key] for report in self.reports if key in report])[0]

    @property
    def outcome(self) -> dict[str, Any]:
        """The outcome the driver reported."""
        outcome: dict[str, Any] = self.reported("outcome")
        return outcome

    def alive(self) -> list[int]:
        """The living processes that the command started, and itself."""
        return [pid for pid in _pids() if self.mark.encode() in _read(pid, "environ")]

    def heard(self) -> list[int]:
        """The signals that a listener noted."""
        return [int(line.split()[0]) for line in self.note.read_text().splitlines()]

    def stop(self) -> None:
        """Leave nothing behind, whatever the test found."""
        leaks = [report["leak"] for report in self.reports if "leak" in report]
        guards = [report["guard"] for report in self.reports if "guard" in report]
        guards = [pid for pid in guards if b"_guard.py" in _read(pid, "cmdline")]
        if (process := getattr(self, "process", None)) is not None:
            process.kill()
            process.wait()
        for pid in [*leaks, *guards, *self.alive()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def _state(pid: int) -> str:
    return _read(pid, "stat").rpartition(b")")[2].split()[0].decode()


def _init_of(guard: int) -> int:
    """The process between guard and command."""
    (init,) = [pid for pid in _pids() if _parent(pid) == guard]
    return init


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A driver that has not been started."""
    run = Run(tmp_path)
    yield run
    run.stop()


# How a command ends -------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("code", [0, 75, *at_length(1, 2, 3, 4, 255)])
def test_exit_code_passes(run: Run, isolate: str, code: int) -> None:
    """The command's own exit code is the outcome."""
    run.start(["sh", "-c", f"exit {code}"], isolate=isolate)
    outcome = run.finish()
    assert (outcome["exit_code"], outcome["signal"], outcome["ended_by"]) == (code, None, None)
    assert run.process.returncode == code


@both_modes
@pytest.mark.parametrize("signum", [signal.SIGKILL, *at_length(signal.SIGTERM, signal.SIGSEGV)])
def test_signal_is_told(run: Run, isolate: str, signum: int) -> None:
    """A command that a signal ended is told apart from one that exits, as 128 + N."""
    run.start(["sh", "-c", f"ulimit -c 0; kill -{int(signum)} $$"], isolate=isolate)
    outcome = run.finish()
    assert (outcome["exit_code"], outcome["signal"]) == (None, signum)
    assert run.process.returncode == 128 + signum


@pytest.mark.parametrize(
    ("text", "status"),
    [("#!/nonexistent/interpreter\n", 127), ("\0 neither script nor binary", 126)],
)
def test_exec_failure_is_told(run: Run, text: str, status: int) -> None:
    """What only exec itself can find out comes back as 126 or 127 with its text."""
    program = run.folder / "program"
    program.write_text(text)
    program.chmod(0o755)
    run.start([str(program)])
    assert run.finish()["status"] == status
    assert run.outcome["cannot_run"]


def test_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is found as a shell would, or refused with the shell's exit code."""
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "tool").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert which("tool") == str(tmp_path / "tool")
    assert which("/bin/sh") == "/bin/sh"
    for command, code in [("", 127), ("nowhere", 127), ("./nowhere", 127), ("folder", 127)]:
        with pytest.raises(CannotRunError) as caught:
            which(command)
        assert caught.value.exit_code == code
    for command in ("plain", str(tmp_path / "plain"), str(tmp_path)):
        with pytest.raises(CannotRunError) as caught:
            which(command)
        assert caught.value.exit_code == 126


@both_modes
def test_nothing_outlives_the_command(run: Run, isolate: str) -> None:
    """A daemon that a finished command leaves is ended; the exit code stays the command's.

    Fails when the leftovers are not signalled after the command's end.
    """
    trap = f'trap "echo bye >{run.note}; exit" TERM; echo >{run.gate}; while :; do sleep 0.05; done'
    run.start(
        ["sh", "-c", f"setsid sh -c '{trap}' & read _ <{run.gate}; exit 4"],
        isolate=isolate,
        grace=30,
    )
    assert run.finish()["exit_code"] == 4
    assert run.note.read_text() == "bye\n"
    assert not run.alive()


# What a command gets ------------------------------------------------------------------------


@both_modes
def test_streams_pass_untouched(run: Run, isolate: str) -> None:
    """Stdin, stdout and stderr are the wrapper's own, byte for byte."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    run.start(["sh", "-c", "cat; echo done >&2"], isolate=isolate, popen=pipes)
    data = os.urandom(1 << 20)
    out, err = run.process.communicate(data, timeout=30)
    assert out == data
    assert err == b"done\n"


def test_descriptors(run: Run) -> None:
    """Nothing but the three streams reaches the command, also when the wrapper had others open."""
    show = "import os, sys\nfor fd in os.listdir('/proc/self/fd'): print(fd, file=sys.stderr)"
    with Path(os.devnull).open() as extra:
        popen = {"pass_fds": [extra.fileno()], "stderr": subprocess.PIPE}
        run.start(python(show), popen=popen)
    # 3 is the listing's own.
    assert run.process.communicate(timeout=30)[1] == b"0\n1\n2\n3\n"


def test_closed_stdin(run: Run) -> None:
    """A wrapper that was started without stdin runs its command all the same."""
    command = run.command(["sh", "-c", "cat; exit 3"])
    run.process = subprocess.Popen(["sh", "-c", 'exec "$@" <&-', "sh", *command])
    assert run.finish()["exit_code"] == 3


@both_modes
def test_mask_and_dispositions(run: Run, isolate: str) -> None:
    """The command has the blocked and ignored signals that it would have had without us."""
    show = ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]
    launcher = ["sh", "-c", "trap '' HUP USR2; exec \"$@\"", "sh"]
    expected = subprocess.run([*launcher, *show], stdout=subprocess.PIPE, check=True).stdout
    run.process = subprocess.Popen(
        [*launcher, *run.command(show, isolate=isolate)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert run.process.communicate(timeout=30)[0] == expected
    ignored = int(expected.rpartition(b":")[2], 16)  # whoever ran the tests may ignore more
    assert ignored & 0x801 == 0x801


@both_modes
def test_signals_are_forwarded(run: Run, isolate: str) -> None:
    """Every catchable signal to the wrapper reaches the command, in order, and nothing ends it."""
    run.start_listener(isolate=isolate, grace=0)
    sent = [
        *(signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1),
        *(signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM, signal.SIGCONT, signal.SIGTSTP),
        *(signal.SIGURG, signal.SIGIO, signal.SIGPWR, signal.SIGRTMIN, signal.SIGRTMAX),
    ]
    for count, signum in enumerate(sent, 1):
        run.process.send_signal(signum)
        wait_until(lambda: len(run.heard()) >= count)  # noqa: B023 - called at once
    assert run.heard() == sent


def test_signal_right_after_the_launch(run: Run) -> None:
    """A signal that follows a launch too large for one read does not get ahead of it."""
    run.start(["sleep", "60"], filler=100_000, signal_at_once=signal.SIGTERM)
    assert run.finish()["signal"] == signal.SIGTERM


# Ending the tree ----------------------------------------------------------------------------


@both_modes
def test_wrapper_killed(run: Run, isolate: str) -> None:
    """SIGKILL to the wrapper ends the child, its child and a daemon that called setsid.

    Fails when the guard does not watch its control pipe and drops its parent-death signal.
    """
    run.start_family(isolate=isolate)
    guard = run.reported("guard")
    run.process.kill()
    wait_until(lambda: not run.alive())
    wait_until(lambda: not _read(guard, "cmdline"))


def test_wrapper_killed_before_the_launch(run: Run) -> None:
    """A guard that waits for a lease goes with its wrapper; there was nobody to signal yet."""
    run.start(["true"], never_launch=True)
    assert run.reported("signalled") is False
    guard = run.reported("guard")
    run.process.kill()
    wait_until(lambda: not _read(guard, "cmdline"))


@both_modes
def test_wrapper_lets_go(run: Run, isolate: str) -> None:
    """A wrapper that leaves the guard's context in mid-run has ended the tree by then."""
    run.start(Family(run.note).command, isolate=isolate, abandon=True)
    assert run.process.wait(30) == 3
    assert not run.alive()


def test_wrapper_killed_while_its_pipe_is_held(run: Run) -> None:
    """The parent-death signal tells when somebody else keeps the wrapper's pipe open.

    Fails when the guard does not ask for that signal.
    """
    run.start_family(leak=True)
    run.reported("leak")
    run.process.kill()
    wait_until(lambda: not run.alive())


@both_modes
def test_wrapper_killed_and_term_ignored(run: Run, isolate: str) -> None:
    """A child that ignores TERM gets its grace after the wrapper's death, and then KILL."""
    run.start_listener(isolate=isolate, grace=0.5, fence=90)
    killed_at = time.monotonic()
    run.process.kill()
    wait_until(lambda: sorted(run.heard()) == [signal.SIGTERM, signal.SIGCONT])
    wait_until(lambda: not run.alive())
    assert time.monotonic() - killed_at >= 0.5


@both_modes
def test_wrapper_stopped_past_the_fence(run: Run, isolate: str) -> None:
    """A wrapper that stopped no longer renews: the whole tree is gone before the fence.

    Fails when the guard has no timer of its own.
    """
    family = run.start_family(isolate=isolate, fence=3, grace=2, renew=0.2)
    run.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: _state(run.process.pid) == "T")
    wait_until(lambda: not run.alive())
    fences = [report["fence"] for report in run.reports if "fence" in report]
    assert family.ended_before(_wall_seconds(max(fences)))
    run.process.send_signal(signal.SIGCONT)
    assert run.finish()["ended_by"] == "fence"


def _wall_seconds(at_boottime_ns: int) -> float:
    return time.time() + (at_boottime_ns - boottime_ns()) / SECOND


@both_modes
def test_fence(run: Run, isolate: str) -> None:
    """TERM comes one grace before the fence, and KILL before it for who ignores TERM.

    Fails when KILL is left out, or comes a grace after the fence.
    """
    family = run.start_family(stubborn=True, isolate=isolate, grace=1)
    fence = boottime_ns() + 3 * SECOND
    run.order("extend", fence)
    outcome = run.finish()
    assert (outcome["ended_by"], outcome["signal"]) == ("fence", signal.SIGKILL)
    assert _wall_seconds(fence) - KILL_ROOM_SECONDS - 1.01 < family.told() < family.last()
    assert family.ended_before(_wall_seconds(fence))
    assert not run.alive()


def test_renewals_move_the_fence(run: Run) -> None:
    """A command outlasts its first fence by far while the wrapper renews."""
    run.start(["sh", "-c", f"read _ <{run.gate}; exit 5"], fence=2, grace=0.3, renew=0.1)
    first = run.reported("fence")
    wait_until(lambda: boottime_ns() > first)
    run.gate.write_text("\n")
    assert run.finish()["exit_code"] == 5


@both_modes
def test_lease_lost(run: Run, isolate: str) -> None:
    """An end that the wrapper asks for gives TERM at once and KILL after the grace."""
    run.start_listener(isolate=isolate, fence=60, grace=0.5)
    run.order("end", "lease lost")
    outcome = run.finish()
    assert (outcome["ended_by"], outcome["signal"]) == ("lease lost", signal.SIGKILL)
    assert sorted(run.heard()) == [signal.SIGTERM, signal.SIGCONT]  # both at once, in any order
    assert {"event": "ending", "reason": "lease lost", "signal": None} in run.reports


@both_modes
def test_stopped_child_acts_on_term(run: Run, isolate: str) -> None:
    """CONT comes with TERM, since a stopped process would act on nothing.

    Fails when CONT is not sent.
    """
    tidy = (
        "import os, signal, sys\n"
        "def tidy(*_): open(sys.argv[1], 'w').close(); sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, tidy)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "signal.pause()"
    )
    run.start(python(tidy, run.note), isolate=isolate, fence=5, grace=2)
    outcome = run.finish()
    assert (outcome["exit_code"], outcome["ended_by"]) == (7, "fence")
    assert run.note.exists()
    assert {"event": "stopped", "reason": None, "signal": signal.SIGSTOP} in run.reports


@both_modes
def test_guard_killed(run: Run, isolate: str) -> None:
    """When the guard itself is killed, the tree goes too, and the wrapper knows.

    Fails when the wrapper is no subreaper (without a namespace), or when the guard's init does
    not die with it (with one).
    """
    run.start_family(isolate=isolate)
    os.kill(run.reported("guard"), signal.SIGKILL)
    assert run.finish()["ended_by"] == "guard lost"
    assert not run.alive()


@both_modes
def test_init_killed(run: Run, isolate: str) -> None:
    """When the process between guard and command is killed, the guard ends the rest."""
    run.start_family(isolate=isolate, grace=0.2)
    guard = run.reported("guard")
    os.kill(_init_of(guard), signal.SIGKILL)
    assert run.finish()["ended_by"] == "guard lost"
    assert not run.alive()


def test_wrapper_and_guard_killed(run: Run) -> None:
    """In a namespace nothing is left even when nobody is there to end it.

    Fails when the namespace's init has no parent-death signal; it is stopped here, so that it
    cannot notice otherwise.
    """
    run.start_family(isolate="always")
    guard = run.reported("guard")
    for pid in (_init_of(guard), run.process.pid):
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _state(pid) == "T")  # noqa: B023 - called at once
    os.kill(guard, signal.SIGKILL)
    wait_until(lambda: not run.alive())


def test_guard_shrugs_signals_off(run: Run) -> None:
    """What a service manager sends to all of a job's processes does not end the guard."""
    run.start(["sh", "-c", f"read _ <{run.gate}; exit 6"])
    guard = run.reported("guard")
    wait_until(lambda: os.getsid(guard) == guard)
    wait_until(run.alive)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTSTP, signal.SIGUSR1):
        os.kill(guard, signum)
    run.gate.write_text("\n")
    assert run.finish()["exit_code"] == 6


@both_modes
def test_forks_do_not_escape(run: Run, isolate: str) -> None:
    """A command whose generations follow each other in half a millisecond is ended all the same.

    Fails when KILL is sent in one round only (without a namespace, most times).
    """
    runner = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for generation in range(400):\n"
        "    if os.fork(): os._exit(0)\n"
        "    os.setsid()\n"
        "    if generation == 20: open(sys.argv[1], 'w').close()\n"
        "signal.pause()\n"
    )
    command = ["sh", "-c", '"$@" & sleep 60', "sh", *python(runner, run.note)]
    run.start(command, isolate=isolate, grace=0)
    wait_until(run.note.exists)
    run.process.kill()
    guard = run.reported("guard")
    wait_until(lambda: not run.alive() and not _read(guard, "cmdline"))


def test_fence_already_passed(run: Run) -> None:
    """Nothing is launched when the fence has passed."""
    run.start(["touch", str(run.note)], fence=-0.001)
    outcome = run.finish()
    assert (outcome["status"], outcome["ended_by"]) == (None, "fence")
    assert not run.note.exists()


def test_end_before_the_launch(run: Run) -> None:
    """An end that overtakes the launch wins."""
    run.start(["touch", str(run.note)], end_at_once="lease lost")
    outcome = run.finish()
    assert (outcome["status"], outcome["ended_by"]) == (None, "lease lost")
    assert not run.note.exists()


@pytest.mark.parametrize("grace", [0.0, 0.3, 0.5, 0.9, 10.0])
def test_plan(grace: float) -> None:
    """TERM comes after half of the time left, KILL after TERM and before the fence."""
    for span in (SECOND // 1000, SECOND, 120 * SECOND):
        term_at, kill_at = _fence.plan(1000, 1000 + span, int(grace * SECOND))
        assert 1000 + span // 2 <= term_at <= kill_at < 1000 + span
        assert kill_at - term_at <= grace * SECOND


# Pausing ------------------------------------------------------------------------------------


def counts(run: Run) -> list[str]:
    """How far the counters are."""
    return [path.read_text() for path in run.folder.glob("note*")]


def all_stopped(run: Run) -> bool:
    """Whether nobody of the command's runs."""
    stats = [stat for pid in run.alive() if (stat := _read(pid, "stat"))]
    return {stat.rpartition(b")")[2].split()[0] for stat in stats} == {b"T"}


def start_counters(run: Run, **options: object) -> None:
    """Start both counters and pause them."""
    run.start(program("counters", run.note), **options)
    # Of the three that were started one is there for an instant only.
    wait_until(lambda: all(counts(run)) and len(counts(run)) == 2 == len(run.alive()))
    run.order("pause")
    wait_until(lambda: all_stopped(run))


@both_modes
def test_pause_and_resume(run: Run, isolate: str) -> None:
    """The whole tree is stopped and goes on, also who left group and session.

    Fails when only the command's group is stopped, or when it is not continued.
    """
    start_counters(run, isolate=isolate)
    before = counts(run)
    run.order("resume")
    wait_until(lambda: all(now != then for now, then in zip(counts(run), before, strict=True)))
    run.order("pause")
    wait_until(lambda: all_stopped(run))


@both_modes
def test_paused_forks_do_not_escape(run: Run, isolate: str) -> None:
    """A child that is born while the process table is read, in a session of its own, stops too.

    Fails when STOP is sent in one round only (most times).
    """
    spawner = (
        "import os, signal, sys, time\n"
        "for number in range(1000):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        while True: signal.pause()\n"
        "    if number == 30: open(sys.argv[1], 'w').close()\n"
        "    time.sleep(0.0005)\n"
    )
    run.start(python(spawner, run.note), isolate=isolate, grace=0)
    wait_until(run.note.exists)
    run.order("pause")
    wait_until(lambda: all_stopped(run))


@both_modes
def test_cont_does_not_end_a_pause(run: Run, isolate: str) -> None:
    """A CONT to the command itself has no lasting effect.

    Fails when who was continued is not stopped again at once.
    """
    start_counters(run, isolate=isolate)
    (command,) = [pid for pid in run.alive() if os.getpgid(pid) == pid]
    began = time.monotonic()
    for _ in range(12):
        os.kill(command, signal.SIGCONT)
        wait_until(lambda: all_stopped(run))
    # Each of these in a round of its own would take 15 s, since rounds become rarer.
    assert time.monotonic() - began < 10
    run.process.send_signal(signal.SIGUSR1)  # waits for the end of the pause
    wait_until(lambda: signal.SIGUSR1 in _pending(command))
    assert all_stopped(run)
    run.order("resume")
    assert run.finish()["signal"] == signal.SIGUSR1


def _pending(pid: int) -> set[int]:
    """The signals that wait for a process to go on."""
    (word,) = [
        line.split()[1] for line in _read(pid, "status").splitlines() if line.startswith(b"ShdPnd")
    ]
    return {signum for signum in signal.valid_signals() if int(word, 16) >> (signum - 1) & 1}


@both_modes
def test_cont_to_the_wrapper_is_held_back(run: Run, isolate: str) -> None:
    """The command hears of one CONT: that of `resume`.

    Fails when the guard passes CONT on in a pause, or heeds a message before those it came after.
    """
    run.start_listener(isolate=isolate, grace=0)
    run.order("pause")
    wait_until(lambda: all_stopped(run))
    guard = run.reported("guard")
    os.kill(guard, signal.SIGSTOP)  # it then reads all that follows at once
    for number in range(1, 4):
        run.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len([one for one in run.reports if "passed_on" in one]) == number)  # noqa: B023
    run.order("resume")
    wait_until(lambda: {"obeyed": "resume"} in run.reports)
    os.kill(guard, signal.SIGCONT)
    wait_until(run.heard)
    run.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: signal.SIGUSR1 in run.heard())
    assert run.heard() == [signal.SIGCONT, signal.SIGUSR1]


@both_modes
def test_wrapper_killed_while_paused(run: Run, isolate: str) -> None:
    """Nothing stays stopped for ever: the tree goes with its wrapper."""
    start_counters(run, isolate=isolate, grace=0.2)
    run.process.kill()
    wait_until(lambda: not run.alive())


@both_modes
def test_guard_killed_while_paused(run: Run, isolate: str) -> None:
    """The tree goes with its guard."""
    start_counters(run, isolate=isolate)
    os.kill(run.reported("guard"), signal.SIGKILL)
    assert run.finish()["ended_by"] == "guard lost"
    assert not run.alive()


@both_modes
def test_end_while_paused(run: Run, isolate: str) -> None:
    """A paused command acts on TERM, and stays awake to do so.

    Fails when CONT is not sent, or when a pause stops who is being ended.
    """
    tidy = (
        "import signal, sys\n"
        "both = {signal.SIGTERM, signal.SIGUSR1}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        "open(sys.argv[1], 'w').close()\n"
        "sys.exit(7 if {signal.sigwait(both), signal.sigwait(both)} == both else 1)"
    )
    run.start(python(tidy, run.note), isolate=isolate, grace=60)
    wait_until(run.note.exists)
    run.order("pause")
    wait_until(lambda: all_stopped(run))
    run.order("end", "budget")
    run.order("pause")
    run.order("signal", int(signal.SIGUSR1))  # comes after that pause
    outcome = run.finish()
    assert (outcome["exit_code"], outcome["ended_by"]) == (7, "budget")


@both_modes
def test_signals_after_the_end_of_a_pause(run: Run, isolate: str) -> None:
    """A command that was paused and is being ended gets signals again (a second Ctrl-C).

    Fails when an end leaves the guard paused.
    """
    run.start_listener(isolate=isolate, grace=60)
    run.order("pause")
    wait_until(lambda: all_stopped(run))
    run.order("end", "budget")
    wait_until(lambda: signal.SIGTERM in run.heard())
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: signal.SIGINT in run.heard())


@both_modes
def test_fence_while_paused(run: Run, isolate: str) -> None:
    """A pause moves no fence."""
    start_counters(run, isolate=isolate, grace=1.5)
    fence = boottime_ns() + 3 * SECOND
    run.order("extend", fence)
    outcome = run.finish()
    assert outcome["ended_by"] == "fence"
    assert outcome["at"] < fence
    assert not run.alive()


@both_modes
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_paused(run: Run, isolate: str, signum: int) -> None:
    """A signal by which people end jobs ends a paused one.

    Fails when it is only passed on: it would be heeded after the pause.
    """
    start_counters(run, isolate=isolate)
    run.process.send_signal(signum)
    outcome = run.finish()
    assert (outcome["signal"], outcome["ended_by"]) == (signum, "interrupted while paused")


def test_paused_before_the_launch(run: Run) -> None:
    """A command that is launched in a pause starts when that is over.

    Fails when it is launched at once.
    """
    note = "import sys, time; open(sys.argv[1], 'w').write(str(time.time())); sys.exit(5)"
    run.start(python(note, run.note), pause_at_once=True)
    run.reported("launched")
    resumed_at = time.time()
    run.order("resume")
    assert run.finish()["exit_code"] == 5
    assert float(run.note.read_text()) > resumed_at


@pytest.mark.parametrize("how", ["end", "fence", "interrupt", "kill"])
def test_paused_before_the_launch_and_ended(run: Run, how: str) -> None:
    """A launch that is held back can be ended at once, and then starts nothing.

    Fails when it takes the grace, or starts the command.
    """
    options = {"pause_at_once": True, "grace": 60}
    run.start(["touch", str(run.note)], fence=1 if how == "fence" else 90, **options)
    guard = run.reported("guard")
    run.reported("launched")
    if how == "end":
        run.order("end", "budget")
    elif how == "interrupt":
        run.process.send_signal(signal.SIGTERM)
    elif how == "kill":
        run.process.kill()
    if how != "kill":
        reasons = {"end": "budget", "interrupt": "interrupted while paused"}
        assert run.finish()["ended_by"] == reasons.get(how, how)
        assert run.outcome["status"] is None
    wait_until(lambda: not _read(guard, "cmdline"))
    assert not run.note.exists()


def test_terminal_of_a_paused_command(run: Run, shell: Terminal) -> None:
    """Ctrl-Z gives the shell back in a pause, `fg` does not end it, and Ctrl-C ends the job.

    Fails when the wrapper does not take the terminal back for the pause.
    """
    orders = run.folder / "orders"
    os.mkfifo(orders)
    shell.type(prepare(run, program("reader"), orders=str(orders)) + "; echo code $?\n")
    shell.expect("front")
    wrapper = run.reported("wrapper")

    def pause() -> None:
        run.order("pause")
        wait_until(lambda: all_stopped(run))
        wait_until(lambda: _in_front(wrapper))

    pause()
    shell.type("\x1a")
    shell.expect("Stopped")
    shell.type("fg\n")
    shell.expect("run")
    assert all_stopped(run)
    run.order("resume")
    shell.type("hello\n")
    shell.expect("got hello")
    pause()
    shell.type("\x03")
    shell.expect("interrupted")


def _in_front(pid: int) -> bool:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return fields[5] == fields[2]  # the foreground group of its terminal, and its own


# Inspection ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_command_cannot_look_into_its_guard(run: Run) -> None:
    """Without a privilege for that, a command of the same user reaches nothing that the guard has.

    By its pipes in /proc it could move its own deadline. Fails when the guard is dumpable.
    """
    run.start(program("onlooker", run.note), no_tracing=True)
    assert run.finish()["exit_code"] == 0
    found = json.loads(run.note.read_text())
    assert found["guard"] == {"opened": 0, "memory": False}
    assert found["init"]["opened"] > 0  # so that nothing else is why


def test_a_tree_ends_where_proc_hides_processes(run: Run) -> None:
    """The guard ends all processes although `hidepid` hides those that forbid inspection.

    Fails when the init between guard and command forbids inspection too.
    """
    hide = 'mount -t proc -o hidepid=2,gid=65534 proc /proc && exec "$@"'
    hidden = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    if subprocess.run([*hidden, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("may not mount /proc")
    run.before = hidden
    run.start_family(stubborn=True, no_tracing=True, fence=60)
    run.order("end", "test")
    outcome = run.finish()
    assert (outcome["signal"], outcome["survivors"]) == (signal.SIGKILL, 0)
    assert not run.alive()


# Isolation and start ------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", ["auto", "always"])
def test_isolated(run: Run, isolate: str) -> None:
    """In a namespace the command sees itself and what belongs to it, and no other process."""
    need_namespace()
    popen = {"stdout": subprocess.PIPE}
    run.start(["sh", "-c", "cd /proc; echo $$ [0-9]*"], isolate=isolate, popen=popen)
    assert run.process.communicate(timeout=30)[0] == b"2 1 2\n"
    assert run.reported("isolated") is True


def test_isolation_not_permitted(run: Run) -> None:
    """Without the capability `auto` goes without a namespace."""
    run.start(["sh", "-c", "exit 3"], isolate="auto", unprivileged=True)
    assert run.finish()["exit_code"] == 3
    assert [report["isolated"] for report in run.reports if "isolated" in report] == [False]


def test_isolation_demanded_and_not_permitted(run: Run) -> None:
    """Without the capability `always` fails before anything is launched, and says why."""
    popen = {"stderr": subprocess.PIPE}
    run.start(["touch", str(run.note)], isolate="always", unprivileged=True, popen=popen)
    assert b"GuardError" in (error := run.process.communicate(timeout=30)[1])
    assert b"not permitted" in error
    assert not run.note.exists()


def test_only_from_the_main_thread() -> None:
    """A guard started from a thread would take that thread's end for the wrapper's."""
    errors: list[BaseException] = []

    def start() -> None:
        try:
            Guard.start()
        except GuardError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(errors) == 1


# Terminals ----------------------------------------------------------------------------------


@pytest.fixture
def shell(run: Run) -> Iterator[Terminal]:
    """An interactive shell with job control; `$RUN` and so on are set by `prepare`."""
    del run  # ends after the shell
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"])
    terminal.type("PS1='$ '; stty -echo; echo re''ady\n")
    terminal.expect("ready")
    yield terminal
    terminal.close()


def prepare(run: Run, argv: list[str], **options: object) -> str:
    """A short command line that runs a command under a driver."""
    script = run.folder / "run"
    script.write_text(f"#!/bin/sh\nexec {shlex.join(run.command(argv, **options))}\n")
    script.chmod(0o755)
    return str(script)


@both_modes
def test_terminal_reads_and_interrupts(run: Run, shell: Terminal, isolate: str) -> None:
    """The command owns the terminal: it reads lines, and Ctrl-C goes to it; then the shell again.

    Fails when the command is not made the foreground group.
    """
    shell.type(prepare(run, program("reader"), isolate=isolate) + "; echo code $?\n")
    shell.expect("front")
    shell.type("hello\n")
    shell.expect("got hello")
    shell.type("\x03")
    shell.expect("interrupted")
    shell.expect("code 9")
    shell.type("echo still $((40+2))\n")
    shell.expect("still 42")


@both_modes
def test_terminal_stops_and_continues(run: Run, shell: Terminal, isolate: str) -> None:
    """Ctrl-Z stops the job as the shell sees it, `fg` gives it the terminal again.

    Fails when the guard itself is the command's parent: the kernel then ignores Ctrl-Z.
    """
    shell.type(prepare(run, program("reader"), isolate=isolate) + "\n")
    shell.expect("front")
    for word in ("one", "two"):
        shell.type("\x1a")
        shell.expect("Stopped")
        (command,) = run.alive()
        assert _state(command) == "T"
        shell.type("fg\n")
        shell.type(f"{word}\n")
        shell.expect(f"got {word}")
    wait_until(lambda: shell.foreground() == os.getpgid(command))
    shell.type("\x03")
    shell.expect("interrupted")


def test_terminal_comes_back_to_a_script(run: Run, shell: Terminal) -> None:
    """A script without job control, in the wrapper's own group, reads the terminal afterwards.

    Fails when the wrapper does not take the terminal back.
    """
    command_line = prepare(run, ["echo", "over"])
    shell.type(f"sh -c '{command_line}; read line; echo \"script $line\"'\n")
    shell.expect("over")
    shell.type("reads\n")
    shell.expect("script reads")


def test_terminal_in_the_background(run: Run, shell: Terminal) -> None:
    """A background job that reads is stopped as the shell sees it, and reads after `fg`."""
    shell.type("set -b; " + prepare(run, program("reader")) + " &\n")
    shell.expect("back")
    shell.expect("Stopped")
    shell.type("fg\n")
    shell.type("late\n")
    shell.expect("got late")
    shell.type("\x03")
    shell.expect("interrupted")


def test_terminal_continued_in_the_background(run: Run, shell: Terminal) -> None:
    """`bg` lets the command go on without the terminal, which stays the shell's."""
    command_line = ["sh", "-c", f"echo up; read _ <{run.gate}; echo over"]
    shell.type(prepare(run, command_line) + "\n")
    shell.expect("up")
    shell.type("\x1a")
    shell.expect("Stopped")
    shell.type("bg\n")
    (command,) = run.alive()
    wait_until(lambda: _state(command) != "T")
    shell.type("echo mine $((6*7))\n")
    shell.expect("mine 42")
    run.gate.write_text("\n")
    shell.expect("over")
    shell.type("echo mine $((6*8))\n")
    shell.expect("mine 48")


def test_terminal_in_a_pipeline(run: Run, shell: Terminal) -> None:
    """In a pipeline the neighbour may read the terminal, and Ctrl-C still reaches the command.

    Fails when the command gets the terminal at once, as it does where it is alone.
    """
    interruptible = (
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "print('front' if os.tcgetpgrp(0) == os.getpgrp() else 'back', flush=True)\n"
        "signal.sigwait([signal.SIGINT])\n"
        "print('interrupted')"
    )
    pager = run.folder / "pager"
    pager.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(sys.stdin.readline(), flush=True)\n"
        "print('key', open('/dev/tty').readline(), flush=True)\n"
        "print(sys.stdin.read(), flush=True)\n"
    )
    shell.type(f"{prepare(run, python(interruptible))} | {sys.executable} -I -S {pager}\n")
    shell.expect("back")
    shell.type("pressed\n")
    shell.expect("key pressed")
    shell.type("\x03")
    shell.expect("interrupted")


@both_modes
def test_terminal_without_a_shell(run: Run, isolate: str) -> None:
    """Where no shell could continue it (`ssh -t`, a container), Ctrl-Z does no harm."""
    terminal = Terminal(run.command(program("reader"), isolate=isolate))
    try:
        terminal.expect("front")
        terminal.type("\x1a")
        wait_until(lambda: [report for report in run.reports if report.get("event") == "stopped"])
        terminal.type("again\n")
        terminal.expect("got again")
        terminal.type("\x03")
        terminal.expect("interrupted")
    finally:
        terminal.close()
