"""`holdoff run` in the surroundings that jobs have: odd descriptors, files, names and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdoff import _files
from holdoff._process import CannotRunError, which
from holdoff.v1 import lease_pb2
from tests.e2e.processes import Terminal, ended_before, library_program
from tests.e2e.puppet import Puppet
from tests.e2e.service import BIN
from tests.harness import LONG, at_length, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.service import Service

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

HOLDOFF = str(BIN / "holdoff")


@pytest.fixture
def token(service: Service) -> str:
    """Give a token whose cooldown no test outlasts."""
    return service.create_token("t", "1h")


def cools(service: Service, token: str) -> bool:
    """Tell whether a lease of the token was used."""
    with service.asked() as client:
        return client.get_token(token).HasField("not_before_time")


def held(service: Service, token: str) -> bool:
    """Tell whether somebody holds the token."""
    with service.asked() as client:
        return any(True for _ in client.list_leases(token))


def shell(service: Service, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of bash to its end."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *arguments],
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


# Signals --------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_signal_at_any_moment_after_the_grant_gives_the_lease_back(service: Service) -> None:
    """As nothing ran, without a cooldown; or it reaches the command.

    Fails when what follows the grant is not in the block that gives the lease back, or that gives
    it back as used.
    """
    ended = subprocess.run(
        library_program("signalled_run", service.address, "long" if LONG else "short"),
        env=service.environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    told = json.loads(ended.stdout)
    assert told["tries"] > (400 if LONG else 30)
    assert told["wrong"] == []


def test_a_guard_that_is_killed_in_the_wait_is_no_fault_of_the_command(
    service: Service,
) -> None:
    """70, as nothing ran; and no cooldown. Fails when `GuardLostError` is taken for 126."""
    token = service.create_token("t")
    first = service.start_holdoff("run", "--token", token, "--", "sleep", "60")
    service.only_lease(token)
    second = service.start_holdoff("run", "--token", token, "--", "true")
    service.wait_for_queue(token, 1)
    [guard] = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(guard), signal.SIGKILL)
    first.terminate()
    _, stderr = second.communicate(timeout=30)
    assert (second.returncode, "the guard was killed" in stderr) == (70, True)
    first.communicate(timeout=30)
    with service.asked() as client:
        leases = client.list_lease_history(token)
        assert (
            leases[0].end_time.ToMicroseconds()
            > client.get_token(token).last_refresh_time.ToMicroseconds()
        )


def test_a_command_ends_before_the_next_lease_with_wrapper_and_guard_stopped(
    service: Service, tmp_path: Path
) -> None:
    """The init between guard and command keeps a deadline of its own.

    Fails when `_kill_when_due` does nothing.
    """
    token = service.create_token("t")
    puppet = Puppet(tmp_path)
    options = ("run", "--token", token, "--ttl", "3s", "--isolate", "never")
    process = service.start_holdoff(*options, "--", *puppet.command)
    name = service.only_lease(token)["name"]
    wait_until(lambda: puppet.runs)
    [guard] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, int(guard)):
        os.kill(pid, signal.SIGSTOP)
    try:
        with service.asked() as client:
            expired = lease_pb2.LEASE_STATE_EXPIRED
            wait_until(lambda: client.get_lease(name).state == expired)
            ended = client.get_lease(name).expire_time.ToMicroseconds() / 1e6
        assert puppet.is_gone
        assert ended_before(ended, puppet.runs)
    finally:
        for pid in (int(guard), process.pid):
            os.kill(pid, signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 79
    puppet.close()


# Descriptors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", *at_length("<&-", ">&-", "2>&-")])
def test_closed_descriptors_are_the_null_device(
    service: Service, token: str, tmp_path: Path, closed: str
) -> None:
    """For the command too, and nothing of the wrapper's own takes their place."""
    seen = tmp_path / "seen"
    script = f'"$0" run --token {token} -- sh -c "ls -l /proc/self/fd >{seen}; exit 3" {closed}'
    ended = subprocess.run(
        ["bash", "-c", script, HOLDOFF], env=service.environment, capture_output=True, check=False
    )
    assert ended.returncode == 3, ended.stderr
    links = dict(line.split()[-3::2] for line in seen.read_text().splitlines()[1:])
    if "<" in closed:
        assert links["0"] == "/dev/null"
    assert "anon_inode:[eventpoll]" not in links.values()


def test_a_coordinator_with_closed_descriptors_opens_none_in_their_place(tmp_path: Path) -> None:
    """Fails when `holdoff-coordinator` does not occupy them first."""
    script = 'exec "$0" serve --listen 127.0.0.1:0 --data-dir "$1" <&- >&- 2>&-'
    command = ["bash", "-c", script, str(BIN / "holdoff-coordinator"), str(tmp_path / "data")]
    process = subprocess.Popen(command)
    try:
        wait_until((tmp_path / "data" / "epoch").exists)
        links = [str(Path(f"/proc/{process.pid}/fd/{fd}").readlink()) for fd in range(3)]
        assert links == ["/dev/null"] * 3
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_what_a_shell_passes_to_the_command_arrives(service: Service, token: str) -> None:
    """A process substitution is a descriptor. Fails when the guard passes on the first three."""
    script = '"$0" run --token "$1" -- cat <(echo one) <(echo two)'
    ended = subprocess.run(
        ["bash", "-c", script, HOLDOFF, token],
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "one\ntwo\n"), ended.stderr


def test_a_full_disk_is_told_and_changes_no_exit_code(service: Service, token: str) -> None:
    """74 where output is all that was asked for; the command's own where ours is lost."""
    listed = shell(service, f"{HOLDOFF} token list >/dev/full")
    assert (listed.returncode, "No space left" in listed.stderr) == (74, True)
    for command in (HOLDOFF, f"{HOLDOFF}-coordinator"):
        assert shell(service, f"{command} --help >/dev/full").returncode == 74
    script = f"{HOLDOFF} run --token {token} --result-file /nowhere/f -- sh -c 'exit 5' 2>/dev/full"
    assert shell(service, script).returncode == 64
    script = f"{HOLDOFF} run --token {token} --result-file /dev/full -- sh -c 'exit 5' 2>/dev/full"
    assert shell(service, script).returncode == 5


def test_children_that_came_with_the_process_are_reaped(service: Service, token: str) -> None:
    """As process 1 of a container has to, and one that took a shell's place.

    Fails when the wrapper waits for its guard alone.
    """
    script = f"sleep 0.01 & exec {HOLDOFF} run --token {token} -- sleep 30"
    process = subprocess.Popen(["bash", "-c", script], env=service.environment)
    try:
        service.only_lease(token)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 1)
    finally:
        process.terminate()
        process.wait(timeout=30)


# Commands -------------------------------------------------------------------------------------


def test_a_command_that_cannot_be_executed_costs_no_cooldown(
    service: Service, token: str, tmp_path: Path
) -> None:
    """Nothing ran; and the message names the file. Fails when the lease is released as used."""
    for number, text in enumerate([b"#!/no/such/interpreter\n", b"\x7fELF\x02\x01\x01\0no"]):
        program = tmp_path / f"program-{number}"
        program.write_bytes(text)
        program.chmod(0o755)
        ended = service.holdoff("run", "--token", token, "--", str(program))
        assert ended.returncode == (127, 126)[number]
        assert str(program) in ended.stderr
        assert not cools(service, token)
        assert not held(service, token)


def test_a_script_that_names_no_interpreter_is_a_shells(
    service: Service, token: str, tmp_path: Path
) -> None:
    """As everywhere else where commands are started. Fails when ENOEXEC is told at once."""
    program = tmp_path / "script"
    program.write_text('echo "$0 $1"; exit 4\n')
    program.chmod(0o755)
    ended = service.holdoff("run", "--token", token, "--", str(program), "word")
    assert (ended.returncode, ended.stdout) == (4, f"{program} word\n")


def as_nobody(work: Callable[[], int]) -> int:
    """Do something in a child without root's rights; return what it gave."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_folders_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on the PATH is skipped; a path in one is 126, as something may be there."""
    private = tmp_path / "private"
    private.mkdir(mode=0o000)
    monkeypatch.setenv("PATH", f"{private}:/bin")

    def refused(command: str) -> int:
        try:
            which(command)
        except CannotRunError as error:
            return error.exit_code
        return 0

    for folder in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o011)
    assert as_nobody(lambda: refused("sh")) == 0
    assert as_nobody(lambda: refused("no-such-command")) == 127
    assert as_nobody(lambda: refused(str(private / "command"))) == 126
    private.chmod(0o700)


def test_odd_surroundings_of_a_command(service: Service, token: str, tmp_path: Path) -> None:
    """A working directory that is gone, a variable without a name, names that are not UTF-8."""
    gone = tmp_path / "gone"
    gone.mkdir()
    environment = {os.fsencode(name): os.fsencode(one) for name, one in service.environment.items()}
    environment |= {b"": b"nameless", b"LOGNAME": b"caf\xe9" + 200 * b"x"}
    log = tmp_path / "log"
    log.touch()
    options = [
        *(b"run", b"--token", token.encode(), b"--job", b"caf\xe9", b"--log-file", bytes(log)),
        *(b"--label", b"run=\xe9" + 300 * b"y", b"--", b"sh", b"-c", b"exit 6"),
    ]
    words: list[str | bytes | Path] = ["bash", gone, HOLDOFF, *options]
    ended = subprocess.run(
        ["bash", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', *words],
        env=environment,
        capture_output=True,
        timeout=40,
        check=False,
    )
    assert ended.returncode == 6, ended.stderr
    with service.asked() as client:
        [lease] = client.list_lease_history(token)
    assert lease.holder.job == "caf\\udce9"
    assert lease.holder.user.startswith("caf\\udce9xxx")
    assert len(lease.holder.labels["run"]) == 200


def test_a_place_that_is_not_utf_8_is_wrong_usage(service: Service, token: str) -> None:
    """And is not blamed on anything else."""
    script = f"{HOLDOFF} run --token {token} --division $'caf\\xe9' -- true"
    ended = shell(service, script)
    assert (ended.returncode, "UTF-8" in ended.stderr) == (64, True), ended.stderr


def test_a_locale_without_our_letters(service: Service) -> None:
    """Help and live boards come with question marks. Fails when stdout is strict."""
    latin = {**service.environment, "PYTHONIOENCODING": "iso-8859-1", "TERM": "xterm"}
    helped = service.holdoff("--help", env=latin)
    assert (helped.returncode, "HOST:PORT[,?]" in helped.stdout) == (0, True), helped.stderr
    command = ["env", *(f"{name}={latin[name]}" for name in ("PYTHONIOENCODING", "TERM"))]
    command += [f"HOLDOFF_ENDPOINT={service.address}", HOLDOFF, "budget", "watch", service.app]
    terminal = Terminal(command)
    try:
        terminal.expect(service.app)
    finally:
        terminal.close()


# Files ----------------------------------------------------------------------------------------


def test_a_result_goes_to_what_is_there(service: Service, tmp_path: Path) -> None:
    """A FIFO and a device get it and stay; a link is replaced, and where it led is left alone."""
    result = b'{"exit_code": 0}\n'
    fifo, device, link, victim = (tmp_path / name for name in ("fifo", "null", "link", "victim"))
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    read: list[bytes] = []
    reader.start()
    wait_until(lambda: _written(fifo, result))
    reader.join(timeout=10)
    assert (read, stat.S_ISFIFO(fifo.lstat().st_mode)) == ([result], True)
    with pytest.raises(OSError, match="No such device"):
        _files.write(fifo, result)  # which nobody reads now
    if os.geteuid() == 0:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        _files.write(device, result)
        assert stat.S_ISCHR(device.lstat().st_mode)
    victim.write_text("victim")
    link.symlink_to(victim)
    _files.write(link, result)
    assert (victim.read_text(), link.is_symlink(), link.read_bytes()) == ("victim", False, result)
    assert sorted(one.name for one in tmp_path.iterdir() if one != device) == [
        *("fifo", "link", "victim")
    ]
    # A name of /dev that is a link stays what it is, wherever it leads.
    shown = shell(
        service,
        f'{sys.executable} -c "$1" >{tmp_path}/shown; cat {tmp_path}/shown',
        WRITE_TO_STDOUT,
    )
    assert (shown.stdout, shown.returncode) == ("result\n", 0), shown.stderr
    assert Path("/dev/stdout").is_symlink()


WRITE_TO_STDOUT = """
from pathlib import Path
from holdoff import _files
_files.write(Path("/dev/stdout"), b"result\\n")
"""


def _written(path: Path, data: bytes) -> bool:
    try:
        _files.write(path, data)
    except OSError:  # its reader is not there yet
        return False
    return True


def test_a_result_that_cannot_be_written_changes_no_exit_code(
    service: Service, token: str, tmp_path: Path
) -> None:
    """It is reported; and a FIFO in the fencing folder holds nothing up.

    Fails when a failure to write is raised, or what is in the folder is opened as it is.
    """
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fencing = tmp_path / "state" / "holdoff" / "fencing"
    fencing.mkdir(parents=True)
    name = token.replace("apps/", "").replace("/tokens/", ".")
    os.mkfifo(fencing / name)
    ended = service.holdoff(
        *("run", "--token", token, "--result-file", str(fifo), "--", "sh", "-c", "exit 3"),
        env={**service.environment, "XDG_STATE_HOME": str(tmp_path / "state")},
    )
    assert (ended.returncode, f"cannot write {fifo}" in ended.stderr) == (3, True)
