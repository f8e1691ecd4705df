"""`holdoff run --access-token-file`, with real processes, against a coordinator with custody."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import redis

import holdoff
from holdoff.cli import exits
from tests.custodian import Custodian, key_directory
from tests.e2e.processes import python
from tests.e2e.service import BIN
from tests.harness import wait_until
from tests.integration.test_hand_out import ACCESS, Refreshed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import StartValkey

READER = """
import os, sys, time
seen = ""
while True:
    try:
        with open(os.environ["HOLDOFF_ACCESS_TOKEN_FILE"]) as file:
            found = f"{os.fstat(file.fileno()).st_mode & 0o777:o} {file.read()}"
    except FileNotFoundError:
        found = "none\\n"
    if found != seen:
        print(end=found, flush=True)
    seen = found
    time.sleep(0.02)
"""
"""Prints the mode and the content of the file whenever they change."""


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def custodian(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Custodian]:
    """Give a coordinator with a key, which tests share, each with apps of its own."""
    with Custodian(url, key_directory(tmp_path_factory.mktemp("keys"), "first")) as one:
        yield one


@pytest.fixture
def one(custodian: Custodian, url: str) -> Refreshed:
    """Give a grant without an access token."""
    return Refreshed(custodian, url)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give the path of the file."""
    return tmp_path / "access.token"


@pytest.fixture
def start(custodian: Custodian, file: Path, tmp_path: Path) -> Iterator[Any]:
    """Give what starts `holdoff run` with that file; the process is ended after the test."""
    environment = {
        **os.environ,
        "HOLDOFF_ENDPOINT": custodian.address,
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    started: list[subprocess.Popen[str]] = []

    def run(token: str, *arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [BIN / "holdoff", "run", "--token", token, "--access-token-file", file, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=40)


def test_it_waits_for_an_access_token(
    start: Callable[..., subprocess.Popen[str]], one: Refreshed, file: Path
) -> None:
    """It says why there is none; the token is in the file alone, and the file ends with the run.

    Fails when the command starts without a token, or when the token is in its environment.
    """
    file.write_text("of an earlier run")
    process = start(one.token, "--", "sh", "-c", 'env; cat "$HOLDOFF_ACCESS_TOKEN_FILE"')
    assert process.stderr
    assert "no access token: ready since" in process.stderr.readline()
    assert not file.exists()
    access = one.refresh()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == access
    assert out.count(ACCESS) == 1
    assert f"HOLDOFF_ACCESS_TOKEN_FILE={file}" in out.splitlines()
    assert ACCESS not in err
    assert list(file.parent.glob("*token*")) == []


def test_the_file_is_replaced_and_never_too_old(
    start: Callable[..., subprocess.Popen[str]], one: Refreshed, file: Path
) -> None:
    """A renewal replaces it; at the end of its use the token is gone. SIGTERM ends all."""
    first = one.refresh()
    one.begin()
    process = start(one.token, "--", *python(READER))
    assert process.stdout
    assert process.stdout.readline() == f"600 {first}\n"
    second = one.end(life_seconds=63)  # 60 s of it are the policy's early margin
    assert process.stdout.readline() == f"600 {second}\n"
    assert process.stdout.readline() == "none\n"
    process.terminate()
    _, err = process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"there is no access token of {one.token}" in err
    assert not file.exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_file_outlives_the_run(
    start: Callable[..., subprocess.Popen[str]],
    one: Refreshed,
    file: Path,
    signum: signal.Signals,
) -> None:
    """Also if the run is killed: then the guard removes it."""
    one.refresh()
    process = start(one.token, "--ttl", "30s", "--", *python(READER))
    assert process.stdout
    assert process.stdout.readline().startswith("600 ")
    process.send_signal(signum)
    wait_until(lambda: not file.exists())
    process.communicate(timeout=40)
    assert not file.exists()


def test_a_crash_of_the_command_leaves_no_file(
    start: Callable[..., subprocess.Popen[str]], one: Refreshed, file: Path
) -> None:
    """Its exit code passes."""
    one.refresh()
    process = start(
        one.token, "--", "sh", "-c", 'test -s "$HOLDOFF_ACCESS_TOKEN_FILE" && kill -9 $$'
    )
    process.communicate(timeout=60)
    assert (process.returncode, file.exists()) == (128 + signal.SIGKILL, False)


def test_a_pause_may_outlast_an_access_token(
    start: Callable[..., subprocess.Popen[str]], one: Refreshed, custodian: Custodian
) -> None:
    """A paused command finds a new one, so that it is not ended when the one it had expires."""
    one.refresh()
    process = start(one.token, "--", *python(READER))
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline().startswith("600 ")
    with holdoff.Client(custodian.address) as client:
        client.set_back_off(one.token, 3600, "maintenance")  # an access token lives half an hour
        while "the command is paused" not in (line := process.stderr.readline()):
            assert line, "the run has ended"
    assert "access token expires" not in line


def test_what_a_person_must_do_is_said(
    start: Callable[..., subprocess.Popen[str]], one: Refreshed, url: str, file: Path
) -> None:
    """It does not wait for a grant that only a person can repair, nor without a grant."""
    _, app, _, token = one.token.split("/")
    with redis.Redis.from_url(url) as store:
        store.hset(f"holdoff:{{{app}}}:grant:{token}", "condition", "REAUTHORIZE")
    done = {}
    for words in ((one.token,), (f"{one.token}-2",), (one.token, "--if-unreachable", "run")):
        process = start(*words, "--", "echo", "started")
        out, err = process.communicate(timeout=60)
        assert (out, file.exists()) == ("", False)
        done[words] = process.returncode, err
    (dead, missing, wrong) = done.values()
    assert dead[0] == exits.REFUSED
    assert f"holdoff grant authorize {one.token}" in dead[1]
    assert missing[0] == exits.REFUSED
    assert wrong[0] == exits.USAGE


def test_a_signal_ends_the_wait(
    start: Callable[..., subprocess.Popen[str]], one: Refreshed, file: Path
) -> None:
    """Fails when it waits on, or leaves something behind."""
    process = start(one.token, "--", "echo", "started")
    assert process.stderr
    assert "no access token" in process.stderr.readline()
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert "ended by SIGTERM while waiting" in err
    assert not file.exists()


def test_no_wait_does_not_wait(start: Callable[..., subprocess.Popen[str]], one: Refreshed) -> None:
    """It fails as soon as the coordinator has answered, and says why there is no access token."""
    process = start(one.token, "--no-wait", "--", "true")
    _, err = process.communicate(timeout=60)
    assert process.returncode == exits.NOT_GRANTED
    assert f"there is no access token of {one.token}" in err
