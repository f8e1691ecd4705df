"""`holdoff run`: the table of its behaviours, with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.family import Family
from tests.harness import LONG, at_length

if TYPE_CHECKING:
    from tests.e2e.service import Service

BOTH_MODES = pytest.mark.parametrize("isolate", ["never", "auto"])


def alive(mark: str) -> list[int]:
    """Return the processes whose command line has a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def run_options(token: str, *options: str) -> list[str]:
    """Return the beginning of a run's command line."""
    return ["run", "--token", token, *options]


@pytest.fixture
def token(service: Service) -> str:
    """Give a token of the shared coordinator."""
    return service.create_token("t")


@pytest.mark.parametrize("code", [0, 75, *at_length(1, 2, 4, 79, 255)])
def test_the_commands_own_exit_code_passes(service: Service, token: str, code: int) -> None:
    """Data Hub's codes, and those that the wrapper uses itself, arrive untouched."""
    assert service.holdoff(*run_options(token), "--", "sh", "-c", f"exit {code}").returncode == code


def test_a_signal_that_ended_the_command_is_a_number(service: Service, token: str) -> None:
    """128 + N, as shells have it."""
    ended = service.holdoff(*run_options(token), "--", "sh", "-c", "kill -USR1 $$")
    assert ended.returncode == 128 + signal.SIGUSR1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--grace", "2m", "--", "true"], 64, "--grace"),
        (["--wait", "1s", "--no-wait", "--", "true"], 64, "exclude"),
        (["--ttl", "0.5s", "--", "true"], 64, "--ttl"),
        (["--ttl", "25h", "--", "true"], 64, "--ttl"),
        (["--wait", "-1s", "--", "true"], 64, "--wait"),
        (["--token", "apps/E2E/tokens/{}", "--", "true"], 64, "not the id of an app"),
        (["--result-file", "/nonexistent/file", "--", "true"], 64, "--result-file"),
        (["--", "/nonexistent"], 127, "not found"),
        (["--", "/etc/passwd"], 126, "cannot be executed"),
    ],
)
def test_what_cannot_be_is_refused_before_a_lease_is_asked_for(
    service: Service, token: str, options: list[str], code: int, words: str
) -> None:
    """Each with its exit code and a clear word; the token never had a lease."""
    refused = service.invoke(*run_options(token), *options)
    assert refused.exit_code == code
    assert words in refused.stderr
    with service.asked() as client:
        assert client.get_token(token).fencing_token == 0


def test_an_unknown_token_is_refused(service: Service) -> None:
    """77, and how to make it known."""
    refused = service.holdoff(*run_options("apps/e2e/tokens/none"), "--", "true")
    assert refused.returncode == 77
    assert "holdoff token create" in refused.stderr


def test_held_cooling_and_the_limit_of_the_wait(service: Service) -> None:
    """75 for all of them, at once or at the limit."""
    token = service.create_token("slow", "1h")
    holder = service.start_holdoff(*run_options(token), "--", "cat", stdin=subprocess.PIPE)
    service.only_lease(token)
    held = service.holdoff(*run_options(token, "--no-wait"), "--", "true")
    assert (held.returncode, "held" in held.stderr) == (75, True)
    assert service.holdoff(*run_options(token, "--wait", "0.5s"), "--", "true").returncode == 75
    holder.communicate("", timeout=30)
    cooling = service.holdoff(*run_options(token, "--no-wait"), "--", "true")
    assert (cooling.returncode, "cooling" in cooling.stderr) == (75, True)


def test_an_unreachable_coordinator(service: Service, tmp_path: Path) -> None:
    """69 within seconds with --no-wait; --if-unreachable run breaks the glass, loudly."""
    nobody = {**service.environment, "HOLDOFF_ENDPOINT": "127.0.0.1:1"}
    options = run_options("apps/e2e/tokens/any", "--no-wait")
    result = tmp_path / "result.json"
    began = time.monotonic()
    glass = service.start_holdoff(
        *options,
        *("--if-unreachable", "run", "--result-file", str(result)),
        *("--", "sh", "-c", "echo lease=$HOLDOFF_LEASE; exit 3"),
        env=nobody,
    )
    failed = service.holdoff(*options, "--", "true", env=nobody)
    assert failed.returncode == 69
    assert "HOLDOFF_ENDPOINT" in failed.stderr
    stdout, stderr = glass.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert (glass.returncode, stdout) == (3, "lease=\n")
    assert "WITHOUT A LEASE" in stderr
    assert json.loads(result.read_text())["lease"] is None


def test_a_signal_ends_the_wait_and_gives_up_the_place(service: Service, token: str) -> None:
    """128 + N, and nobody waits any more.

    Fails when `_on_signal` does not raise.
    """
    holder = service.start_holdoff(*run_options(token), "--", "sleep", "30")
    service.only_lease(token)
    waiter = service.start_holdoff(*run_options(token), "--", "true")
    service.wait_for_queue(token, 1)
    waiter.send_signal(signal.SIGTERM)
    waiter.communicate(timeout=30)
    assert waiter.returncode == 128 + signal.SIGTERM
    with service.asked() as client:
        assert client.get_token(token).queue_length == 0
    holder.send_signal(signal.SIGINT)
    holder.communicate(timeout=30)
    assert holder.returncode == 128 + signal.SIGINT


def test_bytes_pass_untouched(service: Service, token: str) -> None:
    """Standard input and output are the command's own."""
    data = os.urandom(300_000)
    process = service.start_holdoff(
        *run_options(token), "--", "cat", stdin=subprocess.PIPE, text=False
    )
    stdout: object = process.communicate(data, timeout=30)[0]  # type: ignore[arg-type]
    assert stdout == data


@BOTH_MODES
def test_no_secret_shows_in_a_process(service: Service, token: str, isolate: str) -> None:
    """Promise 8: arguments and environment hold names, and no secret; ours are set last.

    Fails when `_launch` puts the lease's secret into the environment.
    """
    outer = {**service.environment, "HOLDOFF_LEASE": "stale", "HOLDOFF_FENCING_TOKEN": "1"}
    run = service.start_holdoff(
        *run_options(token, "--isolate", isolate), "--", "cat", env=outer, stdin=subprocess.PIPE
    )
    lease = service.only_lease(token)
    seen, tree = "", [run.pid]
    for pid in tree:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        tree += [int(child) for child in children]
        for part in ("cmdline", "environ"):
            seen += Path(f"/proc/{pid}/{part}").read_bytes().replace(b"\0", b"\n").decode()
    command = Path(f"/proc/{tree[-1]}/environ").read_bytes().decode().split("\0")
    ours = dict(one.split("=", 1) for one in command if one.startswith("HOLDOFF_"))
    assert ours["HOLDOFF_TOKEN"] == token
    assert ours["HOLDOFF_LEASE"] == lease["name"]
    assert ours["HOLDOFF_FENCING_TOKEN"] == lease["fencing_token"]
    run.communicate("", timeout=30)
    # 64 hex digits are a secret or a hash of one; a UUID would be the request id.
    assert not re.search(r"\b[0-9a-f]{64}\b", seen)
    assert not re.search(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-", seen)
    assert not re.search(r"\b[0-9a-f]{64}\b", "".join(service.log))


@pytest.mark.parametrize(
    ("isolate", "signum"),
    [
        ("never", signal.SIGSTOP),
        ("auto", signal.SIGKILL),
        *at_length(("never", signal.SIGKILL), ("auto", signal.SIGSTOP)),
    ],
)
def test_nothing_outlives_a_wrapper_that_is_gone(
    service: Service, tmp_path: Path, isolate: str, signum: signal.Signals
) -> None:
    """Killed, or stopped past the TTL: all is gone before another starts; then an interval later.

    Fails when the guard does not end the tree at the pipe's end, or at the fence.
    """
    token, family = service.create_token("slow", "0.5s"), Family(tmp_path / "diary")
    options = run_options(token, "--ttl", "3s", "--isolate", isolate)
    run = service.start_holdoff(*options, "--", *family.command)
    family.await_all()
    name = service.only_lease(token)["name"]
    run.send_signal(signum)
    after = service.start_holdoff(
        *run_options(token), "--", "sh", "-c", "echo started; read x", stdin=subprocess.PIPE
    )
    assert after.stdout is not None
    assert after.stdout.readline() == "started\n"
    mark = str(tmp_path / "diary")
    left = [pid for pid in alive(mark) if pid != run.pid and not _is_zombie(pid)]
    assert left == []
    after.communicate("\n", timeout=30)
    with service.asked() as client:
        expired_us = client.get_lease(name).expire_time.ToMicroseconds()
        started_us = client.get_token(token).fencing_token
    assert started_us >= expired_us + 500_000
    run.send_signal(signal.SIGCONT)
    run.communicate(timeout=30)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_broken_lease_ends_the_command(service: Service, token: str, tmp_path: Path) -> None:
    """TERM, exit code 79, and the reason in the account."""
    result = tmp_path / "result.json"
    run = service.start_holdoff(
        *run_options(token, "--result-file", str(result)), "--", "sleep", "30"
    )
    lease = service.only_lease(token)["name"]
    broken = service.invoke("lease", "break", lease, "--reason", "wrong file", "--yes")
    assert broken.exit_code == 0, broken.stderr
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 79
    assert "wrong file" in stderr
    account = json.loads(result.read_text())
    assert (account["outcome"], account["exit_code"]) == ("lease_lost", 79)
    assert account["child_signal"] == signal.SIGTERM


def test_a_long_run_with_the_shortest_ttl(service: Service, token: str) -> None:
    """A TTL of one second is renewed for as long as it takes.

    One of some tries must do: a machine may hold up a wrapper for longer than such a lease lives.
    """
    command = ("run", "--token", token, "--ttl", "1s", "--", "sleep", "2.5")
    assert any(service.holdoff(*command).returncode == 0 for _ in range(5))


def test_jobs_of_one_token_never_overlap(service: Service, token: str, tmp_path: Path) -> None:
    """Promise 1, seen from outside: each run begins after the one before it ended."""
    diary = tmp_path / "diary"
    script = f"echo begin >> {diary}; sleep 0.2; echo end >> {diary}"
    many = 5 if LONG else 3
    command = (*run_options(token), "--", "sh", "-c", script)
    runs = [service.start_holdoff(*command) for _ in range(many)]
    for run in runs:
        run.communicate(timeout=40)
        assert run.returncode == 0
    assert diary.read_text().split() == ["begin", "end"] * many


def test_a_log_gets_a_line_a_change(service: Service) -> None:
    """Without a terminal each change is one line with reason, place and time."""
    token = service.create_token("slow", "1s")
    holder = service.start_holdoff(
        *run_options(token, "--job", "first"), "--", "cat", stdin=subprocess.PIPE
    )
    service.only_lease(token)
    waiter = service.start_holdoff(*run_options(token), "--", "true")
    assert waiter.stderr is not None
    assert "position 1 of 1: held by job 'first'" in waiter.stderr.readline()
    holder.communicate("", timeout=30)
    _, stderr = waiter.communicate(timeout=30)
    assert "cooling down" in stderr
    assert len(stderr.splitlines()) == 1


def test_a_terminal_gets_a_live_line(service: Service) -> None:
    """On a terminal the line counts down, and is gone when the command starts."""
    token = service.create_token("slow", "2s")
    ours, theirs = pty.openpty()
    terminal = {**service.environment, "TERM": "xterm", "COLUMNS": "80"}
    shown = b""
    with service.asked() as client:
        lease = client.acquire(token)
        run = service.start_holdoff(*run_options(token), "--", "true", stderr=theirs, env=terminal)
        os.close(theirs)
        while b"position 1 of 1: held by" not in shown:
            shown += os.read(ours, 4096)
        lease.release()
    with contextlib.suppress(OSError):  # how a terminal ends
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    run.communicate(timeout=30)
    assert run.returncode == 0
    assert b"position 1 of 1: cooling down" in shown
    assert re.search(rb"earliest start in [12]s", shown)
