"""`holdoff run`: the table of its behaviours, with real processes."""

from __future__ import annotations

import datetime as dt
import json
import os
import pty
import re
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.service import Service

BOTH_MODES = pytest.mark.parametrize("isolate", ["never", "auto"])

# A child, its child, and a grandchild that called setsid; each names itself by `mark`.
TREE = """
mark=$1
sh -c 'while :; do sleep 0.05; done' "$mark" &
setsid sh -c 'while :; do sleep 0.05; done' "$mark" &
echo ready
while :; do sleep 0.05; done
"""


def alive(mark: str) -> list[int]:
    """Return the processes of a marked tree."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def instant(text: str) -> float:
    """Read a time of the JSON output as seconds."""
    return dt.datetime.fromisoformat(text).timestamp()


def run_options(token: str, *options: str) -> list[str]:
    """Return the beginning of a run's command line."""
    return ["run", "--token", token, "--ttl", "2s", *options]


@pytest.fixture
def token(service: Service) -> str:
    """Give a token of the shared coordinator."""
    return service.create_token(uuid.uuid4().hex[:16])


@pytest.mark.parametrize("code", [0, 1, 2, 4, 75, 79, 255])
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
        (["--grace", "2s", "--", "true"], 64, "--grace"),
        (["--wait", "1s", "--no-wait", "--", "true"], 64, "exclude"),
        (["--ttl", "0.5s", "--", "true"], 64, "--ttl"),
        (["--ttl", "25h", "--", "true"], 64, "--ttl"),
        (["--wait", "-1s", "--", "true"], 64, "--wait"),
        (["--token", "apps/E2E/tokens/{}", "--", "true"], 64, "not the id of an app"),
        (["--result-file", "/nonexistent/file", "--", "true"], 64, "--result-file"),
        (["--", "/nonexistent"], 127, "not found"),
        (["--", "/etc/passwd"], 126, "cannot be executed"),
        (["--token", "apps/e2e/tokens/none", "--", "true"], 77, "holdoff token create"),
    ],
)
def test_what_cannot_be_is_refused_before_a_lease_is_asked_for(
    service: Service, token: str, options: list[str], code: int, words: str
) -> None:
    """Each with its exit code and a clear word; the token never had a lease."""
    refused = service.holdoff(*run_options(token), *options)
    assert refused.returncode == code
    assert words in refused.stderr
    assert service.json("token", "show", token)["fencing_token"] == "0"


def test_held_cooling_and_the_limit_of_the_wait(service: Service) -> None:
    """75 for all of them, at once or at the limit."""
    token = service.create_token(uuid.uuid4().hex[:16], "20s")
    holder = service.start_holdoff(*run_options(token), "--", "sleep", "2")
    service.only_lease(token)
    held = service.holdoff(*run_options(token, "--no-wait"), "--", "true")
    assert (held.returncode, "held" in held.stderr) == (75, True)
    began = time.monotonic()
    assert service.holdoff(*run_options(token, "--wait", "0.5s"), "--", "true").returncode == 75
    assert time.monotonic() - began < 5
    holder.communicate(timeout=10)
    cooling = service.holdoff(*run_options(token, "--no-wait"), "--", "true")
    assert (cooling.returncode, "cooling" in cooling.stderr) == (75, True)


def test_an_unreachable_coordinator(service: Service, tmp_path: Path) -> None:
    """69 within 5 s with --no-wait; --if-unreachable run breaks the glass, loudly."""
    nobody = {**service.environment, "HOLDOFF_ENDPOINT": "127.0.0.1:1"}
    options = run_options("apps/e2e/tokens/any", "--no-wait")
    began = time.monotonic()
    failed = service.holdoff(*options, "--", "true", env=nobody)
    assert failed.returncode == 69
    assert "HOLDOFF_ENDPOINT" in failed.stderr
    assert time.monotonic() - began < 6
    result = tmp_path / "result.json"
    glass = service.holdoff(
        *options,
        *("--if-unreachable", "run", "--result-file", str(result)),
        *("--", "sh", "-c", "echo lease=$HOLDOFF_LEASE; exit 3"),
        env=nobody,
    )
    assert (glass.returncode, glass.stdout) == (3, "lease=\n")
    assert "WITHOUT A LEASE" in glass.stderr
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
    assert waiter.wait(timeout=10) == 128 + signal.SIGTERM
    assert service.json("token", "show", token)["queue_length"] == 0
    waiter.communicate()
    holder.send_signal(signal.SIGINT)
    assert holder.wait(timeout=10) == 128 + signal.SIGINT
    holder.communicate()


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
        *run_options(token, "--isolate", isolate), "--", "sleep", "2.5", env=outer
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
    run.communicate(timeout=10)
    # 64 hex digits are a secret or a hash of one; a UUID would be the request id.
    assert not re.search(r"\b[0-9a-f]{64}\b", seen)
    assert not re.search(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-", seen)
    assert not re.search(r"\b[0-9a-f]{64}\b", "".join(service.log))


@BOTH_MODES
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_nothing_outlives_a_wrapper_that_is_gone(
    service: Service, isolate: str, signum: signal.Signals
) -> None:
    """Killed, or stopped past the TTL: all is gone before another starts; then an interval later.

    Fails when the guard does not end the tree at the pipe's end, or at the fence.
    """
    token, mark = service.create_token(uuid.uuid4().hex[:16], "0.5s"), uuid.uuid4().hex
    run = service.start_holdoff(
        *run_options(token, "--isolate", isolate), "--", "sh", "-c", TREE, "sh", mark
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    name = service.only_lease(token)["name"]
    run.send_signal(signum)
    after = service.start_holdoff(
        *run_options(token), "--", "sh", "-c", "echo started; read x", stdin=subprocess.PIPE
    )
    assert after.stdout is not None
    assert after.stdout.readline() == "started\n"
    left = [pid for pid in alive(mark) if pid != run.pid and not _is_zombie(pid)]
    assert left == []
    after.communicate("\n", timeout=10)
    expired = instant(service.json("lease", "show", name)["expire_time"])
    started_us = int(service.json("token", "show", token)["fencing_token"])
    assert started_us / 1e6 >= expired + 0.5
    run.send_signal(signal.SIGCONT)
    run.communicate(timeout=10)


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
    broken = service.holdoff("lease", "break", lease, "--reason", "wrong file", "--yes")
    assert broken.returncode == 0, broken.stderr
    _, stderr = run.communicate(timeout=10)
    assert run.returncode == 79
    assert "wrong file" in stderr
    account = json.loads(result.read_text())
    assert (account["outcome"], account["exit_code"]) == ("lease_lost", 79)
    assert account["child_signal"] == signal.SIGTERM


def test_a_long_run_with_the_shortest_ttl(service: Service, token: str) -> None:
    """A TTL of one second is renewed for as long as it takes."""
    assert (
        service.holdoff("run", "--token", token, "--ttl", "1s", "--", "sleep", "3").returncode == 0
    )


def test_jobs_of_one_token_never_overlap(service: Service, token: str, tmp_path: Path) -> None:
    """Promise 1, seen from outside: each run begins after the one before it ended."""
    diary = tmp_path / "diary"
    script = f"echo begin >> {diary}; sleep 0.2; echo end >> {diary}"
    runs = [service.start_holdoff(*run_options(token), "--", "sh", "-c", script) for _ in range(5)]
    for run in runs:
        run.communicate(timeout=40)
        assert run.returncode == 0
    assert diary.read_text().split() == ["begin", "end"] * 5


def test_a_log_gets_a_line_a_change(service: Service) -> None:
    """Without a terminal each change is one line with reason, place and time."""
    token = service.create_token(uuid.uuid4().hex[:16], "1s")
    holder = service.start_holdoff(*run_options(token, "--job", "first"), "--", "sleep", "5")
    service.only_lease(token)
    waited = service.holdoff(*run_options(token), "--", "true")
    holder.communicate(timeout=20)
    lines = waited.stderr.splitlines()
    assert "place 1 of 1: held by job 'first'" in lines[0]
    assert "cooling down" in lines[1]
    assert len(lines) == 2


def test_a_terminal_gets_a_live_line(service: Service) -> None:
    """On a terminal the line counts down, and is gone when the command starts."""
    token = service.create_token(uuid.uuid4().hex[:16], "2s")
    service.holdoff(*run_options(token), "--", "true")
    ours, theirs = pty.openpty()
    terminal = {**service.environment, "TERM": "xterm", "COLUMNS": "80"}
    run = service.start_holdoff(*run_options(token), "--", "true", stderr=theirs, env=terminal)
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    run.communicate(timeout=10)
    assert run.returncode == 0
    assert b"place 1 of 1: cooling down" in shown
    assert b"earliest start in 1s" in shown
