"""Fixtures for every kind of test."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from holdoff_coordinator import embedded


@dataclass(frozen=True, slots=True)
class Server:
    """A running Valkey."""

    url: str
    pid: int


StartValkey = Callable[..., Server]


@pytest.fixture(scope="session")
def start_valkey() -> Iterator[StartValkey]:
    """Start real Valkey servers with the given options; they end with the session.

    Each has a Unix socket in a short directory of its own, so workers never meet. They write
    nothing to disk unless told to.
    """
    with contextlib.ExitStack() as stack:

        def start(*options: str, password: str = "") -> Server:
            home = Path(tempfile.mkdtemp(prefix="holdoff-"))
            stack.callback(shutil.rmtree, home, ignore_errors=True)
            process = subprocess.Popen(
                embedded.command(
                    *("--port", "0", "--unixsocket", "valkey.sock"),
                    *("--save", "", "--appendonly", "no", *options),
                ),
                cwd=home,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            socket = home / "valkey.sock"
            deadline = time.monotonic() + 10
            with redis.Redis(unix_socket_path=str(socket), password=password or None) as client:
                while True:
                    try:
                        client.ping()
                        break
                    except redis.ConnectionError:
                        assert process.poll() is None, "Valkey ended"
                        assert time.monotonic() < deadline, "Valkey does not answer"
                        time.sleep(0.02)
            return Server(url=f"unix://{socket}", pid=process.pid)

        yield start


@pytest.fixture(scope="session")
def valkey(start_valkey: StartValkey) -> Server:
    """Give the session's shared Valkey: tests use keys of their own and never flush."""
    return start_valkey()
