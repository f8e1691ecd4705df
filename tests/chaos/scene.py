"""What a chaos run plays on: a store of one kind, coordinators before it, and cables in between."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import holdoff
from tests import stores
from tests.cable import Cable
from tests.harness import wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Mapping
    from random import Random

    from tests.chaos.history import Recorder
    from tests.stores import Node, Store

BIN = Path(sys.executable).parent
TTL_SECONDS = 3.0
LONG_TTL_SECONDS = 6.0
"""Of some leases. A clock that drifts has more time to do harm."""
INTERVAL_SECONDS = 1.0
QUARANTINE_SECONDS = LONG_TTL_SECONDS + INTERVAL_SECONDS
SILENCE_MS = 1000
START_SECONDS = 60.0
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")

LEASED = [f"apps/chaos-{app}/tokens/{token}" for app in "ab" for token in ("slow", "quick")]
"""Tokens that leases are taken on; the quick ones have no refresh interval."""
WRAPPED = "apps/chaos-a/tokens/wrapped"
"""The same, for `holdoff run`."""
SHARED = "apps/chaos-b/tokens/shared"
"""The same, also for users of python-redis-lock."""
INTERVALS = {
    token: 0.0 if token.endswith("quick") else INTERVAL_SECONDS
    for token in (*LEASED, WRAPPED, SHARED)
}
COUNTED = "apps/chaos-c/tokens/counted"
"""Errors are reported for it."""
LIMITED = "apps/chaos-c/tokens/limited"
"""Calls are reserved for it."""
TOKENS = [*INTERVALS, COUNTED, LIMITED]
CALLS_MOST, CALLS_WINDOW_SECONDS = 6, 5.0

POLICY = f"""
name = "chaos"
title = "A provider for the chaos run"
[refresh]
interval = "{INTERVAL_SECONDS}s"
access_token_life = "600s"
rotation = "reusable"
[[limit]]
name = "errors"
event = "errors"
most = 1000
window = "1d"
scope = ["app", "token", "division"]
statuses = [400]
[[limit]]
name = "calls"
event = "calls"
most = {CALLS_MOST}
window = "{CALLS_WINDOW_SECONDS}s"
scope = ["app", "token"]
"""

_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
)
FAKETIME = next((path for path in _LIBRARIES if Path(path).exists()), "")
"""The library that fakes a clock (Debian: libfaketime); '' if there is none."""


def faked_clock() -> dict[str, str]:
    """Return variables by which each Valkey takes its clock from `clock` in its own folder.

    Only the wall clock is faked, and only that of Valkey.
    """
    if not FAKETIME:
        return {}
    return {
        "LD_PRELOAD": FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": "./clock",
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_ONLY_CMDS": "valkey-server",
    }


WITH_CHILDREN = """
import json, os, runpy, sys
os.environ.update(json.loads(sys.argv.pop(1)))
runpy.run_module("holdoff_coordinator", run_name="__main__")
"""
"""A coordinator whose children have variables that it does not have itself: gRPC ends when the
library fakes its clock."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server of the store, as faults see it."""

    name: str
    pid: int
    folder: Path
    client: redis.Redis
    node: Node | None = None
    """None for the one that a coordinator started."""

    def set_clock(self, offset_seconds: float) -> None:
        """Let its clock differ from the machine's."""
        fresh = self.folder / "clock.new"
        fresh.write_text(f"{offset_seconds:+.6f}\n")
        fresh.replace(self.folder / "clock")

    def clock_offset(self) -> float:
        """By how much its clock differs."""
        path = self.folder / "clock"
        return float(path.read_text()) if path.exists() else 0.0

    def limit_files(self, limit_bytes: int) -> None:
        """Let no file of it grow beyond a size, as on a disk that is full; -1 takes that back."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


class Coordinator:
    """`holdoff-coordinator serve` behind a cable."""

    def __init__(
        self,
        name: str,
        folder: Path,
        store: list[str],
        environment: Mapping[str, str],
        of_children: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._store = store
        self._environment = environment
        self._of_children = dict(of_children)
        self._log = (folder / f"{name}.log").open("ab")
        self.address = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._all: list[subprocess.Popen[bytes]] = []
        self.cable = Cable("", keeps=False)

    def start(self) -> None:
        """Start a process, on a port of its own, and lead the cable there."""
        self.process, self.address = self.launch()
        self.cable.server = self.address

    def launch(self) -> tuple[subprocess.Popen[bytes], str]:
        """Start a process and return it with its address."""
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", WITH_CHILDREN, json.dumps(self._of_children)),
                *("serve", "--listen", address, *self._store),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **self._environment},
        )
        self._all.append(process)
        return process, address

    def end(self) -> None:
        """End every process that was started."""
        for process in self._all:
            process.kill()
            process.wait()

    def replace(self) -> None:
        """Let a process take over that serves, and never met an app."""
        process, address = self.launch()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: listens(address), 20)
        self.move_to(process, address)

    def move_to(self, process: subprocess.Popen[bytes], address: str) -> None:
        """Let another process take over at once; the present one is told to end."""
        before, self.process, self.address = self.process, process, address
        self.cable.server = address
        self.cable.break_all()
        if before:
            before.terminate()
            reap(before)

    def kill(self) -> None:
        """End the process without a word."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def send(self, signum: signal.Signals) -> None:
        """Send its process a signal."""
        if self.process:
            self.process.send_signal(signum)

    def ensure_running(self) -> None:
        """Start it again if it has ended."""
        if self.process is None or self.process.poll() is not None:
            self.start()


def reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process that was told to end; kill it when that takes too long."""
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def listens(address: str) -> bool:
    """Tell whether something accepts connections."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


class Scene:
    """The whole: what faults act on."""

    def __init__(self, kind: str, folder: Path, record: Recorder, fleet: Any = None) -> None:
        self.kind = kind
        self.folder = folder
        self.record = record
        self.coordinators: list[Coordinator] = []
        self.cables: list[Cable] = []
        """Between coordinators and the store: one a coordinator, or one a server."""
        self.store: Store | None = None
        self.fleet = fleet
        self._clients: dict[str, redis.Redis] = {}

    def note(self, text: str) -> None:
        """Record what a fault does."""
        self.record("note", text=text)

    @property
    def endpoint(self) -> str:
        """Where clients find the coordinators."""
        return ",".join(one.cable.address for one in self.coordinators)

    @property
    def redis_url(self) -> str:
        """Where others than the coordinators find the store."""
        if self.store is None:
            return f"unix://{self._embedded_folder / 'valkey.sock'}"
        return self.store.url

    @property
    def _embedded_folder(self) -> Path:
        return self.folder / "data" / "valkey"

    def targets(self) -> list[Target]:
        """Return the servers of the store that run."""
        if self.store:
            return [
                Target(f"valkey-{number}", one.process.pid, one.folder, self._client(one), one)
                for number, one in enumerate(self.store.nodes, 1)
                if one.process.poll() is None
            ]
        folder, client = self._embedded_folder, self._client(None)
        return [Target("valkey", pid, folder, client) for pid in self._embedded_pids()]

    def _client(self, node: Node | None) -> redis.Redis:
        """Return a client of a server, which soon gives up."""
        name = str(node.port) if node else ""
        if name not in self._clients:
            options: dict[str, Any] = {"socket_timeout": 1, "retry": Retry(NoBackoff(), 0)}
            if node:
                options |= {"host": "127.0.0.1", "port": node.port}
            else:
                options |= {"unix_socket_path": str(self._embedded_folder / "valkey.sock")}
            self._clients[name] = redis.Redis(**options)
        return self._clients[name]

    def _embedded_pids(self) -> list[int]:
        process = self.coordinators[0].process
        if process is None:
            return []
        try:
            path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            return [int(pid) for pid in path.read_text().split()]
        except OSError:
            return []

    def primaries(self) -> list[Target]:
        """Return the servers that take writes."""
        found = []
        for one in self.targets():
            with contextlib.suppress(redis.RedisError):
                if one.client.info("replication")["role"] == "master":
                    found.append(one)
        return found

    def primary_of(self, app: str) -> Target | None:
        """Return the server that has an app."""
        primaries = self.primaries()
        if self.kind != "cluster":
            return primaries[0] if primaries else None
        for one in primaries:
            with contextlib.suppress(redis.RedisError):
                if one.client.exists(f"holdoff:{{{app}}}"):
                    return one
        return None

    def replicas_of(self, primary: Target) -> list[Target]:
        """Return the servers that follow one, and have what it has."""
        ports = {primary.node.public_port, primary.node.port} if primary.node else set()
        found = []
        for one in self.targets():
            with contextlib.suppress(redis.RedisError):
                told: dict[str, Any] = one.client.info("replication")
                if told.get("master_port") in ports and told.get("master_link_status") == "up":
                    found.append(one)
        return found

    def record_trails(self) -> None:
        """Record how long the audit trails are."""
        for app in sorted({token.split("/")[1] for token in INTERVALS}):
            with contextlib.suppress(redis.RedisError):
                if primary := self.primary_of(app):
                    length = primary.client.xlen(f"holdoff:{{{app}}}:audit")
                    self.record("trail", app=app, length=length)

    def restart_dead_servers(self) -> None:
        """Start again the servers of the store that ended."""
        for one in self.store.nodes if self.store else ():
            if one.process.poll() is not None:
                one.restart()

    def heal(self) -> None:
        """Undo whatever a fault left behind, but for the clock."""
        for cable in [*self.cables, *(one.cable for one in self.coordinators)]:
            cable.mend()
            cable.delay_seconds = 0
            cable.flows.set()
            cable.requests_flow.set()
        self.restart_dead_servers()
        for one in self.coordinators:
            one.ensure_running()


@contextlib.contextmanager
def scene(
    kind: str, folder: Path, record: Recorder, environment: dict[str, str]
) -> Iterator[Scene]:
    """Start a store of a kind, two coordinators before it, and make the tokens.

    An embedded store has one coordinator: no second one can use its directory.
    """
    policies = folder / "policies"
    policies.mkdir()
    (policies / "chaos.toml").write_text(POLICY)
    environment = {
        **environment,
        "HOLDOFF_POLICY_DIR": str(policies),
        "HOLDOFF_QUARANTINE_SECONDS": str(QUARANTINE_SECONDS),
        "HOLDOFF_DRAIN_SECONDS": "1",
    }
    one = Scene(kind, folder, record)
    with contextlib.ExitStack() as stack:
        urls = _store(one, stack)
        for number in range(1 if kind == "embedded" else 2):
            if kind == "embedded":
                options, of_store = ["--data-dir", str(folder / "data")], faked_clock()
            else:
                options, of_store = ["--redis-url", urls[number]], {}
            coordinator = Coordinator(
                f"coordinator-{number + 1}", folder, options, environment, of_store
            )
            one.coordinators.append(coordinator)
            stack.enter_context(coordinator.cable)
            stack.callback(coordinator.end)
            coordinator.start()
        if not make_tokens(one.endpoint, START_SECONDS):
            raise RuntimeError("the coordinators do not serve")
        yield one


def _store(one: Scene, stack: contextlib.ExitStack) -> list[str]:
    """Start the store; return the URL for each coordinator."""
    of_nodes: dict[str, Any] = {"environment": faked_clock()}
    match one.kind:
        case "embedded":
            return []
        case "server":
            node = stack.enter_context(stores.node(*DURABLE, **of_nodes))
            one.store = stores.Store(f"redis://127.0.0.1:{node.port}/0", [node])
            one.cables = [
                stack.enter_context(Cable(f"127.0.0.1:{node.port}", keeps=False)) for _ in range(2)
            ]
            return [f"redis://{cable.address}/0" for cable in one.cables]
        case "sentinel":
            one.store = stack.enter_context(
                stores.watched(*DURABLE, silence_ms=SILENCE_MS, cabled=True, **of_nodes)
            )
        case "cluster":
            one.store = stack.enter_context(
                stores.cluster(*DURABLE, replicas=3, silence_ms=SILENCE_MS, cabled=True, **of_nodes)
            )
        case _:
            raise ValueError(f"no such kind of store: {one.kind}")
    one.cables = [node.cable for node in one.store.nodes if node.cable]
    return [one.store.url] * 2


def make_tokens(endpoint: str, seconds: float) -> bool:
    """Make all tokens that are not there; tell whether they are, in time."""

    def is_there(token: str) -> bool:
        try:
            client.create_token(
                token, policy="chaos", refresh_interval_seconds=INTERVALS.get(token)
            )
        except holdoff.AlreadyExists:
            return True
        except holdoff.HoldoffError:
            return False
        return True

    give_up = time.monotonic() + seconds
    with holdoff.Client(endpoint) as client:
        return all(
            until(functools.partial(is_there, token), give_up - time.monotonic())
            for token in TOKENS
        )


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait for a condition, for so long at most; tell whether it came true."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        with contextlib.suppress(redis.RedisError, OSError):
            if condition():
                return True
        time.sleep(0.05)
    return False


def pick(chance: Random, least: float, most: float) -> float:
    """Draw a number, rounded so that it reads well."""
    return round(chance.uniform(least, most), 2)
