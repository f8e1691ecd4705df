"""`holdoff run` in the long view: a run, what is left of it, and the run that comes next.

`test_wrapper.py` has the table of its behaviours; here every instant is measured. What a command
notes and what the store says are instants of one clock, since both run on this machine.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis_lock

import holdoff
from holdoff.v1 import lease_pb2
from tests.e2e.family import Family
from tests.e2e.processes import python
from tests.e2e.service import BIN
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.timestamp_pb2 import Timestamp

    from tests.e2e.service import Service

INTERVAL_SECONDS = 0.5


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Give a command of three generations that ignore TERM."""
    return Family(tmp_path / "diary", stubborn=True)


@pytest.fixture
def client(service: Service) -> Iterator[holdoff.Client]:
    """Give a client of the shared coordinator: for a test to look on, faster than a command."""
    with holdoff.Client(service.address) as one:
        yield one


@pytest.fixture
def token(client: holdoff.Client) -> str:
    """Give a token of the shared coordinator."""
    return create_token(client)


def create_token(client: holdoff.Client) -> str:
    """Create a token of an app of its own."""
    name = f"apps/{uuid.uuid4().hex}/tokens/t"
    return client.create_token(name, refresh_interval_seconds=INTERVAL_SECONDS).name


@pytest.fixture
def store(service: Service) -> Iterator[redis.Redis]:
    """Give a plain client of the coordinator's embedded store."""
    with redis.Redis(unix_socket_path=str(service.data_dir / "valkey" / "valkey.sock")) as client:
        yield client


def seconds(instant: Timestamp) -> float:
    """Read an instant of the store's clock as `time.time` does."""
    return instant.ToMicroseconds() / 1e6


def run(service: Service, token: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a run."""
    return service.start_holdoff("run", "--token", token, *arguments, **options)


SHORT = ("--ttl", "3s", "--grace", "0.3s")
"""Options of a run whose lease is to run out."""


def held(client: holdoff.Client, token: str) -> str:
    """Wait until somebody holds the token, and return the lease's name."""
    active = lease_pb2.LEASE_STATE_ACTIVE
    lease = wait_until(
        lambda: next((one for one in client.list_leases(token) if one.state == active), None)
    )
    return str(lease.name)


def lease_of(client: holdoff.Client, process: subprocess.Popen[str]) -> lease_pb2.Lease:
    """Return the lease, ended by now, of a run of ECHO_LEASE."""
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    return client.get_lease(stdout.strip())


ECHO_LEASE = ("--", "sh", "-c", "echo $HOLDOFF_LEASE")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_all_is_gone_before_the_next_lease(
    service: Service, client: holdoff.Client, token: str, family: Family, signum: signal.Signals
) -> None:
    """Promises 1 and 2: a wrapper that is gone counts as a refresh at its lease's last instant.

    Without a PID namespace, which would make it easy. Fails when the guard waits for TERM to be
    obeyed, or when an expired lease cools down from its last renewal.
    """
    first = run(service, token, *SHORT, "--isolate", "never", "--", *family.command)
    family.await_all()
    name = held(client, token)
    first.send_signal(signum)
    second = lease_of(client, run(service, token, *ECHO_LEASE))
    expired = client.get_lease(name)
    assert expired.state == lease_pb2.LEASE_STATE_EXPIRED
    assert family.told() < family.last()
    assert family.ended_before(seconds(expired.expire_time))
    assert seconds(second.create_time) >= seconds(expired.expire_time) + INTERVAL_SECONDS
    assert second.fencing_token > expired.fencing_token
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=30)
    # Once it goes on, a wrapper that was stopped finds out that it has lost its lease.
    assert first.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGSTOP: 79}[signum]


def test_a_break_counts_from_the_confirmation(
    service: Service, client: holdoff.Client, token: str, family: Family
) -> None:
    """A broken lease lives on until its command is gone: only then does the cooldown begin.

    Fails when a break ends the lease at once.
    """
    first = run(service, token, "--grace", "1s", "--", *family.command)
    family.await_all()
    name = held(client, token)
    second = run(service, token, *ECHO_LEASE)
    client.break_lease(name, "test")
    first.communicate(timeout=30)
    assert first.returncode == 79
    after = lease_of(client, second)
    broken = client.get_lease(name)
    assert broken.state == lease_pb2.LEASE_STATE_BROKEN
    assert family.last() < seconds(broken.end_time) <= seconds(broken.expire_time)
    assert seconds(after.create_time) >= seconds(broken.end_time) + INTERVAL_SECONDS


def test_runs_in_a_row_keep_the_interval(
    service: Service, client: holdoff.Client, token: str
) -> None:
    """Promises 2 and 3: three that wait together run an interval apart, with rising numbers.

    Fails when the end of a lease starts no cooldown. How late each starts is printed, not asserted.
    """
    runs = [run(service, token, *ECHO_LEASE) for _ in range(3)]
    leases = sorted((lease_of(client, one) for one in runs), key=lambda one: one.fencing_token)
    for before, after in itertools.pairwise(leases):
        assert after.fencing_token > before.fencing_token
        pause = seconds(after.create_time) - seconds(before.end_time)
        assert pause >= INTERVAL_SECONDS
        late = (pause - INTERVAL_SECONDS) * 1e3
        print(f"granted {late:.1f} ms after the interval")  # noqa: T201 - for `pytest -s`


def test_a_command_that_handles_a_signal_decides(service: Service, token: str) -> None:
    """A signal to the wrapper reaches the command, whose exit code stands."""
    decide = (
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])\n"
        "print('ready', flush=True)\n"
        "signal.sigwait([signal.SIGHUP])\n"
        "sys.exit(3)"
    )
    process = run(service, token, "--", *python(decide))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (3, "")


@pytest.mark.parametrize(
    ("command", "outcome", "exit_code", "child"),
    [
        (["sh", "-c", "exit 75"], "exited", 75, (75, None)),
        (["sh", "-c", "kill -9 $$"], "signaled", 137, (None, 9)),
        (["/nonexistent"], "cannot_run", 127, (None, None)),
    ],
)
def test_the_account_tells_whose_exit_code_it_is(  # noqa: PLR0913, PLR0917 - fixtures and a table
    service: Service,
    client: holdoff.Client,
    token: str,
    tmp_path: Path,
    command: list[str],
    outcome: str,
    exit_code: int,
    child: tuple[int | None, int | None],
) -> None:
    """With --result-file a command's 75 is no refusal, and who never ran has no lease."""
    path = tmp_path / "result.json"
    process = run(service, token, "--job", "nightly", "--result-file", str(path), "--", *command)
    process.communicate(timeout=30)
    account = json.loads(path.read_text())
    assert (account["job"], account["token"], account["outcome"]) == ("nightly", token, outcome)
    assert process.returncode == account["exit_code"] == exit_code
    assert (account["child_exit_code"], account["child_signal"]) == child
    if outcome == "cannot_run":
        assert (account["started_at"], account["lease"]) == (None, None)
        assert client.get_token(token).fencing_token == 0
    else:
        assert account["requested_at"] <= account["started_at"] <= account["ended_at"]
        lease = client.get_lease(account["lease"])
        assert lease.state == lease_pb2.LEASE_STATE_RELEASED
        assert lease.fencing_token == account["fencing_token"]


def test_glass_is_not_broken_by_a_refusal(
    service: Service, client: holdoff.Client, token: str, tmp_path: Path
) -> None:
    """--if-unreachable run is for a coordinator that is away, not for one that says no.

    Fails when every error of the client breaks the glass.
    """
    holder = run(service, token, "--", "cat", stdin=subprocess.PIPE)
    held(client, token)
    path = tmp_path / "ran"
    eager = ("--no-wait", "--if-unreachable", "run", "--", "touch", str(path))
    refused = run(service, token, *eager)
    refused.communicate(timeout=30)
    assert (refused.returncode, path.exists()) == (75, False)
    holder.communicate("", timeout=30)


def test_a_nested_run_knows_nothing_of_the_outer(
    service: Service, client: holdoff.Client, token: str
) -> None:
    """A run inside a run has its own variables, and none at all of a lease when it has none.

    Fails when `_launch` only adds to the environment.
    """
    inner = create_token(client)
    nested = f"{BIN / 'holdoff'} run --token {inner} --no-wait"
    names = "$HOLDOFF_TOKEN,$HOLDOFF_LEASE,$HOLDOFF_FENCING_TOKEN,$HOLDOFF_REPORT_KEY"
    show = f"sh -c 'echo {names}'"
    without = f"HOLDOFF_ENDPOINT=127.0.0.1:1 {nested} --if-unreachable run -- {show}"
    process = run(service, token, "--", "sh", "-c", f"{show}; {nested} -- {show}; {without}")
    stdout, stderr = process.communicate(timeout=30)
    outer_one, inner_one, bare = (line.split(",") for line in stdout.splitlines())
    assert outer_one[0] == token, stderr
    assert outer_one[1].startswith(f"{token}/leases/")
    assert inner_one[0] == inner
    assert inner_one[1].startswith(f"{inner}/leases/")
    assert outer_one[2] != inner_one[2] != ""
    assert bare[:3] == [inner, "", ""]
    keys = {outer_one[3], inner_one[3], bare[3]}
    assert len(keys) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


def test_any_signal_ends_a_wait(service: Service, client: holdoff.Client, token: str) -> None:
    """Also one that has no name, as most of the real-time ones.

    Fails when the name is looked up without asking whether there is one.
    """
    holder = run(service, token, "--", "cat", stdin=subprocess.PIPE)
    held(client, token)
    waiter = run(service, token, "--", "true")
    wait_until(lambda: list(client.list_waiters(token)))
    signum = signal.SIGRTMIN + 3
    waiter.send_signal(signum)
    _, stderr = waiter.communicate(timeout=30)
    assert waiter.returncode == 128 + signum
    assert f"ended by signal {signum} while waiting" in stderr
    holder.communicate("", timeout=30)


def test_a_part_of_a_run_waits_for_a_coordinator_too(service: Service, token: str) -> None:
    """It keeps trying until its limit, as any other.

    Fails when the look at the outer lease is not allowed to find nobody.
    """
    away = {"HOLDOFF_LEASE": f"{token}/leases/1", "HOLDOFF_ENDPOINT": "127.0.0.1:1"}
    process = run(service, token, "--wait", "1s", "--", "true", env={**service.environment, **away})
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 69
    assert f"waiting for {token}" in stderr


def test_a_run_does_not_wait_for_the_one_it_is_part_of(service: Service, token: str) -> None:
    """It is refused while the outer run holds the token, and not by what an older run left behind.

    Fails when nobody looks at the lease that the environment names (the inner run waits for the
    outer one, which waits for it), or at whether it is over.
    """
    nested = f"{BIN / 'holdoff'} run --token {token} --wait 10s"
    process = run(service, token, "--", "sh", "-c", f"echo $HOLDOFF_LEASE; {nested} -- true")
    lease, stderr = process.communicate(timeout=30)
    assert process.returncode == 64
    assert f"a run that holds {token} already" in stderr
    for stale in (lease.strip(), f"{token}/leases/77", f"{token}/leases/none"):
        process = run(
            service, token, "--", "true", env={**service.environment, "HOLDOFF_LEASE": stale}
        )
        process.communicate(timeout=30)
        assert process.returncode == 0, stale


def test_a_wait_keeps_trying_until_its_limit(service: Service) -> None:
    """69 at the limit and not before, with one line in the log about it."""
    nobody = {**service.environment, "HOLDOFF_ENDPOINT": "127.0.0.1:1"}
    began = time.monotonic()
    waited = run(service, "apps/e2e/tokens/any", "--wait", "2s", "--", "true", env=nobody)
    _, stderr = waited.communicate(timeout=30)
    assert waited.returncode == 69
    assert time.monotonic() - began >= 2
    assert stderr.count("retrying") == 1


def test_a_coordinator_that_comes_late_is_found(own_service: Service) -> None:
    """A run that was started before its coordinator gets its lease once that is there."""
    service = own_service
    token = service.create_token("late")
    service.end(signal.SIGTERM)
    process = run(service, token, "--wait", "30s", "--", "true")
    assert process.stderr is not None
    assert "retrying" in process.stderr.readline()
    service.start()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_lock_script_and_a_run_exclude_each_other(
    service: Service, client: holdoff.Client, token: str, store: redis.Redis
) -> None:
    """The plain library's lock by the name that `token show` gives, in both directions.

    Fails when `mirror` does not set the library's key.
    """
    lock = redis_lock.Lock(store, service.json("token", "show", token)["lock_name"], expire=30)
    assert lock.acquire(blocking=False)
    refused = run(service, token, "--no-wait", "--", "true")
    refused.communicate(timeout=30)
    assert refused.returncode == 75
    waiting = run(service, token, *ECHO_LEASE)
    wait_until(lambda: client.get_token(token).queue_length == 1)
    before = time.time()
    lock.release()
    lease = lease_of(client, waiting)
    assert seconds(lease.create_time) >= before + INTERVAL_SECONDS
    # Held and cooling are one to the library: its first success comes after both.
    wait_until(lambda: lock.acquire(blocking=False))
    assert time.time() >= seconds(client.get_lease(lease.name).end_time) + INTERVAL_SECONDS
    lock.release()


def test_a_lock_script_asleep_is_woken_when_a_lease_expires(
    service: Service, client: holdoff.Client, token: str, store: redis.Redis
) -> None:
    """The library's blocking acquire without a time-out sleeps until somebody pushes its signal.

    Fails when the end of a cooldown after an expiry pushes none.
    """
    process = run(service, token, *SHORT, "--", "sleep", "60")
    name = held(client, token)
    lock = redis_lock.Lock(store, client.get_token(token).lock_name, expire=30)
    got: list[float] = []

    def sleeper() -> None:
        lock.acquire()
        got.append(time.time())

    thread = threading.Thread(target=sleeper, daemon=True)
    thread.start()
    process.kill()
    process.communicate(timeout=30)
    thread.join(timeout=30)
    assert got
    assert got[0] >= seconds(client.get_lease(name).expire_time) + INTERVAL_SECONDS
    lock.release()


def test_a_release_that_meets_a_fault_changes_no_exit_code(
    service: Service, token: str, store: redis.Redis, tmp_path: Path
) -> None:
    """The fault is reported, and the lease expires. Fails when 70 replaces the command's code."""
    go, record = tmp_path / "go", f"holdoff:{{{token.split('/')[1]}}}:token:t"
    command = 'until [ -e "$0" ]; do sleep 0.05; done; exit 3'
    process = run(service, token, "--", "sh", "-c", command, str(go))
    service.only_lease(token)
    store.rename(record, f"{record}:aside")
    store.set(record, "damaged")
    try:
        go.touch()
        _, told = process.communicate(timeout=60)
    finally:
        store.delete(record)
        store.rename(f"{record}:aside", record)
    assert (process.returncode, "could not be released" in told) == (3, True)
