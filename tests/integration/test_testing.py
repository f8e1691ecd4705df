"""`holdoff.testing`, as a user's tests see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import holdoff
from holdoff import testing
from holdoff_coordinator.server import CannotListenError

CONFTEST = 'pytest_plugins = ["holdoff.testing"]\n'

TESTS = """
from pathlib import Path

import holdoff


def test_a_lease(holdoff_endpoint: str, holdoff_token: str) -> None:
    with holdoff.Client(holdoff_endpoint) as client:
        client.acquire(holdoff_token, wait_seconds=0).release()
        client.acquire(holdoff_token, wait_seconds=5).release()  # the interval is short


async def acquire(endpoint: str, token: str) -> None:
    async with holdoff.aio.Client(endpoint) as client:
        async with await client.acquire(token, wait_seconds=0):
            pass


def test_another_token(holdoff_endpoint: str, holdoff_token: str) -> None:
    import asyncio

    asyncio.run(acquire(holdoff_endpoint, holdoff_token))
    children = Path("/proc/thread-self/children").read_text()
    Path(__file__).with_name("children").write_text(children)


def test_that_fails(holdoff_endpoint: str) -> None:
    raise AssertionError
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, apart from this run of pytest."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


def test_its_fixtures_serve_users_and_leave_no_process(tmp_path: Path) -> None:
    """Leases are real, each token is new, and Valkey is gone after a run that failed, too.

    Fails when `valkey` does not end its process.
    """
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_job.py").write_text(TESTS)
    options = ("-q", "-W", "error", "-p", "no:asyncio", "-p", "no:cacheprovider")
    shown = run(tmp_path, "-m", "pytest", *options)
    assert "2 passed" in shown.stdout, shown.stdout + shown.stderr
    assert "1 failed" in shown.stdout
    assert not shown.stderr
    (pid,) = map(int, (tmp_path / "children").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_works_without_pytest_and_in_silence(tmp_path: Path) -> None:
    """The context manager needs no pytest, and prints nothing."""
    program = """
import sys
sys.modules["pytest"] = None
import holdoff, holdoff.testing
with holdoff.testing.coordinator() as endpoint, holdoff.Client(endpoint) as client:
    client.acquire(client.create_token("apps/a/tokens/t").name, wait_seconds=0).release()
"""
    shown = run(tmp_path, "-c", program)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")


def test_without_the_coordinator_it_says_what_to_install(tmp_path: Path) -> None:
    """A client alone does not have what the coordinator needs."""
    program = 'import sys; sys.modules["redis"] = None; import holdoff.testing'
    shown = run(tmp_path, "-c", program)
    assert "pip install 'holdoff[coordinator]'" in shown.stderr.splitlines()[-1]


def test_a_client_needs_nothing_of_the_coordinator(tmp_path: Path) -> None:
    """Importing `holdoff` is quick, too: gRPC waits until it is asked for.

    Fails when `holdoff/__init__.py` imports the client at once.
    """
    program = """
import sys
import holdoff
assert "grpc" not in sys.modules
holdoff.Client, holdoff.aio.Client, holdoff.errors.LeaseHeld, holdoff.LeaseLost
assert not any(name.startswith(("holdoff_coordinator", "redis")) for name in sys.modules)
assert not set(holdoff.__all__) - {name for name in holdoff.__all__ if hasattr(holdoff, name)}
try:
    holdoff.Nothing
except AttributeError:
    print("good")
"""
    shown = run(tmp_path, "-c", program)
    assert shown.stdout == "good\n", shown.stderr


def test_two_of_them_know_nothing_of_each_other() -> None:
    """Each has a store of its own."""
    with testing.coordinator() as one, testing.coordinator() as other:
        assert one != other
        with holdoff.Client(one) as client:
            client.create_token("apps/a/tokens/t")
        with holdoff.Client(other) as client:
            assert list(client.list_tokens()) == []


def test_a_taken_port_is_said() -> None:
    """The error is the coordinator's own, in the thread of the caller.

    Fails when `CoordinatorThread` does not hand it over.
    """
    with (
        testing.coordinator() as endpoint,
        pytest.raises(CannotListenError),
        testing.coordinator(listen=endpoint),
    ):
        pass


def test_a_valkey_that_does_not_start_is_said() -> None:
    """And not waited for."""
    with pytest.raises(RuntimeError, match="ended"), testing.valkey("--no-such-option", "1"):
        pass


def test_a_stopped_valkey_is_ended_all_the_same() -> None:
    """A test may have left it under SIGSTOP, where SIGTERM alone waits for ever."""
    with testing.valkey() as (_, pid):
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


CUSTODY_TESTS = """
import urllib.request

import holdoff
from holdoff.testing import Custody


def test_a_program_that_asks_for_a_token(holdoff_custody: Custody) -> None:
    with (
        holdoff.Client(holdoff_custody.endpoint) as client,
        client.access_token(holdoff_custody.token) as access,
    ):
        headers = {"Authorization": f"Bearer {access.current(wait_seconds=30)}"}
        call = urllib.request.Request(f"{holdoff_custody.api_url}/current/Me", headers=headers)
        with urllib.request.urlopen(call, timeout=30) as answer:
            assert answer.status == 200
"""


def test_the_example_of_custody_runs(tmp_path: Path) -> None:
    """The fixture gives a token whose access token the provider accepts; the documentation has it.

    Fails when the fixture does not refresh, or the documentation shows another test.
    """
    documented = Path(testing.__file__).parents[3] / "docs" / "python.md"
    assert CUSTODY_TESTS.strip() in documented.read_text()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_custody.py").write_text(CUSTODY_TESTS)
    done = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr


def test_time_passes_for_provider_and_grant() -> None:
    """A renewal is due, which keeps the provider's rules.

    Fails when the time passes for one of them only, or nobody looks at the grant.
    """
    with (
        testing.custody() as custody,
        holdoff.Client(custody.endpoint) as client,
        client.access_token(custody.token) as access,
    ):
        first = access.usable(wait_seconds=30)
        custody.pass_seconds(575)
        second = access.usable(wait_seconds=30, newer_than=first.generation)
        assert second.generation == first.generation + 1
        with urllib.request.urlopen(f"{custody.provider}/_simulator/report") as answer:  # noqa: S310
            report = json.load(answer)
        totals = report["token_requests"]
        assert (totals["accepted"], totals["refused"]) == (2, 0)
