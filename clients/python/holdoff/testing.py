"""A real coordinator for your tests: in this process, on a Valkey that is gone afterwards.

With pytest, in a `conftest.py`::

    pytest_plugins = ["holdoff.testing"]

and in a test::

    def test_my_job(holdoff_endpoint: str, holdoff_token: str) -> None:
        with holdoff.Client(holdoff_endpoint) as client, client.acquire(holdoff_token):
            ...

Without pytest::

    with holdoff.testing.coordinator() as endpoint:
        ...

It is the one module of `holdoff` that needs the coordinator: `pip install holdoff[coordinator]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from holdoff._client import Client

try:
    import redis
    import structlog
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from holdoff.policies import presets
    from holdoff_coordinator import embedded
    from holdoff_coordinator.server import Coordinator
    from holdoff_coordinator.store import Epoch, connect, ensure_epoch
except ModuleNotFoundError as error:
    raise ImportError(
        f"holdoff.testing runs a coordinator, which needs {error.name}: "
        "pip install 'holdoff[coordinator]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS = 20.0
_TOKEN_INTERVAL_SECONDS = 0.1


@contextlib.contextmanager
def coordinator(*, listen: str = "127.0.0.1:0") -> Iterator[str]:
    """Run a coordinator and its Valkey for the time of a `with` block; give its endpoint.

    It knows no tokens and keeps nothing. Several may run side by side.

    Args:
        listen: Where, `host:port`; port 0 takes a free one.

    Raises:
        holdoff_coordinator.store.StoreError: There is no Valkey for this platform.
        RuntimeError: Valkey does not start.
        holdoff_coordinator.server.CannotListenError: The port is taken.
    """
    if not structlog.is_configured():  # its default would print every lease
        quiet = structlog.make_filtering_bound_logger(logging.WARNING)
        structlog.configure(wrapper_class=quiet)
    with valkey() as (url, _), CoordinatorThread(url, listen=listen) as thread:
        yield thread.address


class CoordinatorThread:
    """A coordinator on a given store, in a thread with an event loop of its own.

    Use it as a context manager; inside it the coordinator serves.

    Args:
        store_url: Any that `holdoff-coordinator serve --redis-url` takes.
        epoch: What the store's epoch is said to be.
        options: What `holdoff_coordinator.server.Coordinator` takes, where it is to differ.
    """

    def __init__(self, store_url: str, *, epoch: Epoch | None = None, **options: Any) -> None:
        self._store_url = store_url

        self._epoch = epoch
        self._options = {
            "policies": presets(),
            "quarantine_seconds": 2.0,
            "drain_seconds": 0.2,
            "listen": "127.0.0.1:0",
            **options,
        }
        self._ready: queue.SimpleQueue[Coordinator | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()), name="holdoff-coordinator", daemon=True
        )

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        store = connect(self._store_url)
        served = None

        async def open_store() -> Epoch:
            return self._epoch or await ensure_epoch(store, None)

        try:
            options = {"open_store": open_store, **self._options}
            async with Coordinator(store, **options) as served:
                self._ready.put(served)
                await self._stop.wait()
        except Exception as error:
            if served:
                raise
            self._ready.put(error)
        finally:
            await store.aclose()

    def __enter__(self) -> Self:
        self._thread.start()
        started = self._ready.get(timeout=_START_SECONDS)
        if isinstance(started, Exception):
            raise started
        self.coordinator = started
        self.address = started.address
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Drain and stop; a second time does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=_START_SECONDS)


@contextlib.contextmanager
def valkey(*options: str, password: str = "") -> Iterator[tuple[str, int]]:
    """Run a Valkey on a Unix socket in a temporary directory; give its URL and process id.

    It writes nothing to disk unless told to, and dies with this process. On Linux also with the
    *thread* that enters the block, so leave it in the same one.

    Args:
        options: Of valkey-server, such as `--appendonly yes`.
        password: The one that an option sets, if it does.

    Raises:
        holdoff_coordinator.store.StoreError: There is no Valkey for this platform.
        RuntimeError: It does not start.
    """
    with tempfile.TemporaryDirectory(prefix="holdoff-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            embedded.command(
                *("--port", "0", "--unixsocket", "valkey.sock"),
                *("--save", "", "--appendonly", "no", *options),
            ),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the tests: Valkey must outlive their coordinators.
            start_new_session=True,
            # Valkey refuses to start in a locale that the machine does not have.
            env={**os.environ, "LC_ALL": "C"},
        )
        try:
            socket = Path(folder, "valkey.sock")
            _wait_until_it_answers(process, socket, password)
            yield f"unix://{socket}", process.pid
        finally:
            process.kill()  # not SIGTERM: nothing is to be kept, and a test may have stopped it
            process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], socket: Path, password: str) -> None:
    give_up = time.monotonic() + _START_SECONDS
    once = Retry(NoBackoff(), 0)
    with redis.Redis(unix_socket_path=str(socket), password=password or None, retry=once) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError as error:
                if process.poll() is not None:
                    raise RuntimeError(f"Valkey ended with code {process.returncode}") from error
                if time.monotonic() > give_up:
                    raise RuntimeError("Valkey does not answer") from error
                time.sleep(0.02)


try:
    import pytest
except ModuleNotFoundError:
    pass  # `coordinator` does without
else:

    @pytest.fixture(scope="session")
    def holdoff_endpoint() -> Iterator[str]:
        """Give the endpoint of a coordinator that runs until the session ends."""
        with coordinator() as endpoint:
            yield endpoint

    @pytest.fixture
    def holdoff_token(holdoff_endpoint: str) -> str:
        """Give the name of a new token that may be refreshed every tenth of a second."""
        name = f"apps/testing/tokens/{uuid.uuid4().hex}"
        with Client(holdoff_endpoint) as client:
            client.create_token(name, refresh_interval_seconds=_TOKEN_INTERVAL_SECONDS)
        return name
