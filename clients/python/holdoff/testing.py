"""A real coordinator for your tests: in this process, on a Valkey that is gone afterwards.

With pytest, in a `conftest.py`::

    pytest_plugins = ["holdoff.testing"]

and in a test::

    def test_my_job(holdoff_endpoint: str, holdoff_token: str) -> None:
        with holdoff.Client(holdoff_endpoint) as client, client.acquire(holdoff_token):
            ...

A program that gets access tokens from custody, with a simulated provider to use them at::

    def test_my_program(holdoff_custody: holdoff.testing.Custody) -> None:
        with holdoff.Client(holdoff_custody.endpoint) as client:
            with client.access_token(holdoff_custody.token) as access:
                ...  # call holdoff_custody.api_url

Without pytest::

    with holdoff.testing.coordinator() as endpoint:
        ...
    with holdoff.testing.custody() as custody:
        ...

It is the one module of `holdoff` that needs the coordinator: `pip install holdoff[coordinator]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from holdoff._client import Client
from holdoff.names import TokenName
from holdoff.simulator import Seed, serving
from holdoff.simulator.faults import AUTH_PATH, TOKEN_PATH

try:
    import msgspec
    import redis
    import structlog
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from holdoff.policies import presets
    from holdoff_coordinator import embedded
    from holdoff_coordinator.custody.grants import Terms
    from holdoff_coordinator.custody.key_files import KeyDirectory, create_key
    from holdoff_coordinator.server import Coordinator
    from holdoff_coordinator.store import Epoch, connect, ensure_epoch
except ModuleNotFoundError as error:
    raise ImportError(
        f"holdoff.testing runs a coordinator, which needs {error.name}: "
        "pip install 'holdoff[coordinator]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.policies import Policy

_START_SECONDS = 20.0
_TOKEN_INTERVAL_SECONDS = 0.1
_LONG_AGO_SECONDS = 3600.0


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


_PASSING = {
    "grant": (
        *("created_us", "refreshed_us", "not_before_us", "expires_us", "idle_us"),
        *("attempt_begun_us", "first_unproven_us"),
    ),
    "token": ("last_refresh_us", "not_before_us"),
    "authorization": ("valid_us", "until_us", "not_before_us", "begun_us"),
}
"""Instants in the records of a token."""


@dataclass(frozen=True, slots=True)
class Custody:
    """A coordinator that has a grant of a simulated provider in custody."""

    endpoint: str
    """Of the coordinator."""
    token: str
    """The token in custody: `apps/{app}/tokens/{token}`."""
    provider: str
    """Base URL of the provider: `http://127.0.0.1:PORT`."""
    seed: Seed
    """Whose grant it is: the client, and the divisions that may be called."""
    _thread: CoordinatorThread
    _store_url: str

    @property
    def api_url(self) -> str:
        """Where a call of the API begins, up to its division."""
        return f"{self.provider}/api/v1"

    def pass_seconds(self, seconds: float) -> None:
        """Let time pass for the provider and the grant, as after 575 s a renewal is due."""
        advance = json.dumps({"advance_seconds": seconds}).encode()
        with urllib.request.urlopen(f"{self.provider}/_simulator/clock", advance):  # noqa: S310
            pass
        name = TokenName.parse(self.token)
        socket = self._store_url.removeprefix("unix://")
        with redis.Redis(unix_socket_path=socket, decode_responses=True) as store:
            for kind, fields in _PASSING.items():
                key = f"holdoff:{{{name.app}}}:{kind}:{name.token}"
                for field in fields:
                    if int(store.hget(key, field) or 0):
                        store.hincrby(key, field, -round(seconds * 1e6))
            store.spublish(f"holdoff:{{{name.app}}}:custody", name.token)
        self._thread.look(name)


@contextlib.contextmanager
def custody(*api_hosts: str) -> Iterator[Custody]:
    """Run a coordinator, and a simulated Exact Online whose token it has in custody.

    The first access token is requested as soon as something uses the token. The provider keeps its
    rules: the next is requested after 572 s, or `Custody.pass_seconds`. Nothing leaves this host.

    Args:
        api_hosts: More hosts that the access token may be sent to, as `host:port`.

    Raises:
        holdoff_coordinator.store.StoreError: There is no Valkey for this platform.
        RuntimeError: Valkey does not start.
    """
    seed = Seed()
    with contextlib.ExitStack() as stack:
        provider = stack.enter_context(_simulator(seed))
        hosts = (provider.partition("//")[2], *api_hosts)
        policy = _simulated(provider, hosts)
        url, _ = stack.enter_context(valkey())
        known = {**presets(), policy.name: policy}
        thread = stack.enter_context(CoordinatorThread(url, custody=True, policies=known))
        token = f"apps/testing/tokens/{uuid.uuid4().hex}"
        with Client(thread.address) as client:
            client.create_token(token, policy=policy.name)
            client.grants.put(
                token,
                client_id=seed.client_id,
                client_secret=seed.client_secret,
                refresh_token=seed.refresh_token,
                api_hosts=hosts,
                last_refresh_age_seconds=_LONG_AGO_SECONDS,
            )
        yield Custody(thread.address, token, provider, seed, thread, url)


@contextlib.contextmanager
def _simulator(seed: Seed) -> Iterator[str]:
    """Run a simulated provider in a thread; give its base URL."""
    ready: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        try:
            async with serving(seeds=(seed,)) as url:
                ready.put(url)
                await stop.wait()
        except OSError as error:
            ready.put(error)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, name="holdoff-simulator", daemon=True)
    thread.start()
    started = ready.get(timeout=_START_SECONDS)
    if isinstance(started, OSError):
        raise started
    try:
        yield started
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=_START_SECONDS)


def _simulated(provider: str, hosts: tuple[str, ...]) -> Policy:
    """Make the policy of a simulated provider: that of Exact Online, with its addresses."""
    exact = presets()["exact-online"]
    oauth = msgspec.structs.replace(
        exact.oauth,
        token_urls=(f"{provider}{TOKEN_PATH}",),
        authorization_urls=(f"{provider}{AUTH_PATH}",),
        hosts=hosts,
    )
    return msgspec.structs.replace(exact, name="simulated", oauth=oauth)


class CoordinatorThread:
    """A coordinator on a given store, in a thread with an event loop of its own.

    Use it as a context manager; inside it the coordinator serves.

    Args:
        store_url: Any that `holdoff-coordinator serve --redis-url` takes.
        epoch: What the store's epoch is said to be.
        custody: Whether it has grants in custody, with a new key and token URLs on this host; or
            on what terms.
        options: What `holdoff_coordinator.server.Coordinator` takes, where it is to differ.
    """

    def __init__(
        self,
        store_url: str,
        *,
        epoch: Epoch | None = None,
        custody: bool | Terms = False,
        **options: Any,
    ) -> None:
        self._store_url = store_url
        self._custody = custody
        self._stack = contextlib.ExitStack()
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
        self._options["custody"] = self._terms()
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
        self._stack.close()

    def look(self, name: TokenName) -> None:
        """Have it see now whether a token in custody is due for a refresh."""
        if refreshes := self.coordinator.refreshes:
            self._loop.call_soon_threadsafe(refreshes.look, name)

    def _terms(self) -> Terms | None:
        """Say on what terms there are grants in custody; None for none."""
        if isinstance(self._custody, Terms) or not self._custody:
            return self._custody or None
        temporary = tempfile.TemporaryDirectory(prefix="holdoff-", ignore_cleanup_errors=True)
        folder = Path(self._stack.enter_context(temporary))
        keys, spool = folder / "keys", folder / "spool"
        create_key(keys)
        spool.mkdir(mode=0o700)
        return Terms(keys=KeyDirectory(keys).keys, loopback_http=True, spool=spool)


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

    @pytest.fixture(scope="session")
    def holdoff_custody() -> Iterator[Custody]:
        """Give a token in custody and its simulated provider, until the session ends."""
        with custody() as given:
            yield given

    @pytest.fixture
    def holdoff_token(holdoff_endpoint: str) -> str:
        """Give the name of a new token that may be refreshed every tenth of a second."""
        name = f"apps/testing/tokens/{uuid.uuid4().hex}"
        with Client(holdoff_endpoint) as client:
            client.create_token(name, refresh_interval_seconds=_TOKEN_INTERVAL_SECONDS)
        return name
