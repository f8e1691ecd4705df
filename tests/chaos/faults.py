"""What goes wrong in a chaos run. Each fault begins, lasts for a while, and is over.

A fault says for the judge what it may excuse: that acknowledged writes may be gone (`loses`), that
the store's clock moves (`clock`), that waiters may lose touch (`disturbs`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import redis

import holdoff
from tests.chaos.scene import (
    FAKETIME,
    INTERVAL_SECONDS,
    LEASED,
    START_SECONDS,
    TTL_SECONDS,
    Target,
    listens,
    make_tokens,
    pick,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from random import Random

    from tests.chaos.scene import Scene

ALL = frozenset({"embedded", "server", "sentinel", "cluster"})
EXTERNAL = ALL - {"embedded"}
REPLICATED = frozenset({"sentinel", "cluster"})
PATIENCE_SECONDS = 15.0
LATE_TTL_SECONDS = 20.0
"""Of leases that are to outlive what happens to the store."""

APP = LEASED[0].split("/")[1]
"""The app that a fault of one server is aimed at."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    act: Callable[[Scene, Random], None]
    kinds: frozenset[str] = ALL
    loses: bool = False
    """Acknowledged writes may be gone after it."""
    fails_over: bool = False
    """The same, where another server takes over meanwhile."""
    clock: bool = False
    """It moves the store's clock."""
    disturbs: bool = True
    """Waiters may go unheard, and so be passed over."""

    def flags(self, kind: str) -> dict[str, bool]:
        """Return what the judge may excuse on a kind of store."""
        loses = self.loses or (self.fails_over and kind in REPLICATED)
        return {"loses": loses, "clock": self.clock, "disturbs": self.disturbs}

    def missing(self) -> str:
        """Say what it needs that is not on this machine."""
        if self.clock and not FAKETIME:
            return "libfaketime is not installed (Debian: apt-get install libfaketime)"
        return ""


FAULTS: dict[str, Fault] = {}


def _fault(name: str, kinds: frozenset[str] = ALL, **facts: bool) -> Callable[..., None]:
    def add(act: Callable[[Scene, Random], None]) -> None:
        FAULTS[name] = Fault(name, act, kinds, **facts)

    return add


@contextlib.contextmanager
def _stopped(*pids: int) -> Iterator[None]:
    """Stop processes (SIGSTOP) for a while."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _coordinator_pids(scene: Scene) -> list[int]:
    return [one.process.pid for one in scene.coordinators if one.process]


def _beyond_ttl(chance: Random) -> float:
    return pick(chance, TTL_SECONDS + 0.5, TTL_SECONDS + 3)


# Processes ---------------------------------------------------------------------------------------


@_fault("kill-coordinator")
def _kill_coordinator(scene: Scene, chance: Random) -> None:
    one = chance.choice(scene.coordinators)
    scene.note(f"kill {one.name}")
    one.kill()
    time.sleep(pick(chance, 0, 3))
    one.start()


@_fault("stop-coordinator")
def _stop_coordinator(scene: Scene, chance: Random) -> None:
    with _stopped(chance.choice(_coordinator_pids(scene))):
        time.sleep(_beyond_ttl(chance))


@_fault("restart-coordinators")
def _restart_coordinators(scene: Scene, _chance: Random) -> None:
    for one in scene.coordinators:
        one.send(signal.SIGTERM)
        if one.process:
            one.process.wait()
        one.start()
        until(lambda one=one: listens(one.address), PATIENCE_SECONDS)  # type: ignore[misc]


@_fault("fresh-coordinators", EXTERNAL)
def _fresh_coordinators(scene: Scene, _chance: Random) -> None:
    """Coordinators that never met an app take over from the others."""
    for one in scene.coordinators:
        one.replace()


@_fault("kill-client", disturbs=False)
def _kill_client(scene: Scene, chance: Random) -> None:
    scene.fleet.kill(chance.choice(["sync", "async", "foreign", "counter"]))


@_fault("stop-client", disturbs=False)
def _stop_client(scene: Scene, chance: Random) -> None:
    with _stopped(scene.fleet.victim(chance.choice(["sync", "async", "foreign", "counter"]))):
        time.sleep(_beyond_ttl(chance))


@_fault("kill-wrapper", disturbs=False)
def _kill_wrapper(scene: Scene, chance: Random) -> None:
    for pid in scene.fleet.wrappers("run")[:1]:
        scene.note(f"kill wrapper {pid}")
        os.kill(pid, signal.SIGKILL)
    time.sleep(pick(chance, 0, 1))


@_fault("stop-wrapper", disturbs=False)
def _stop_wrapper(scene: Scene, chance: Random) -> None:
    with _stopped(*scene.fleet.wrappers("run")[:1]):
        time.sleep(_beyond_ttl(chance))


@_fault("kill-guard", disturbs=False)
def _kill_guard(scene: Scene, chance: Random) -> None:
    for pid in scene.fleet.wrappers("guard")[:1]:
        scene.note(f"kill guard {pid}")
        os.kill(pid, signal.SIGKILL)
    time.sleep(pick(chance, 0, 1))


@_fault("stop-guard-and-wrapper", disturbs=False)
def _stop_guard(scene: Scene, chance: Random) -> None:
    with _stopped(*scene.fleet.wrappers("guard")[:1], *scene.fleet.wrappers("run")[:1]):
        time.sleep(_beyond_ttl(chance))


@_fault("kill-store", frozenset({"embedded", "server"}))
def _kill_store(scene: Scene, chance: Random) -> None:
    for one in scene.targets():
        _kill(one)
    time.sleep(pick(chance, 0, 2))
    scene.restart_dead_servers()


@_fault("stop-store", fails_over=True)
def _stop_store(scene: Scene, chance: Random) -> None:
    """A store that hangs; behind Sentinel it is failed over meanwhile."""
    primary = scene.primary_of(APP)
    if primary:
        with _stopped(primary.pid):
            time.sleep(_beyond_ttl(chance))


# The network -------------------------------------------------------------------------------------


@_fault("cut-clients")
def _cut_clients(scene: Scene, chance: Random) -> None:
    one = chance.choice(scene.coordinators)
    one.cable.cut()
    time.sleep(_beyond_ttl(chance))
    one.cable.mend()


@_fault("deaf-coordinator")
def _deaf_coordinator(scene: Scene, chance: Random) -> None:
    """What clients send does not arrive; what is under way back does."""
    one = chance.choice(scene.coordinators)
    one.cable.requests_flow.clear()
    time.sleep(_beyond_ttl(chance))
    one.cable.requests_flow.set()


@_fault("mute-coordinator")
def _mute_coordinator(scene: Scene, chance: Random) -> None:
    """What clients send arrives, and the answers come much later."""
    one = chance.choice(scene.coordinators)
    one.cable.flows.clear()
    time.sleep(_beyond_ttl(chance))
    one.cable.flows.set()


@_fault("lost-replies")
def _lost_replies(scene: Scene, chance: Random) -> None:
    """Requests arrive, answers never do, over and over."""
    for _ in range(3):
        for one in scene.coordinators:
            one.cable.flows.clear()
        time.sleep(pick(chance, 0.2, 0.6))
        for one in scene.coordinators:
            one.cable.break_all()
            one.cable.flows.set()
        time.sleep(0.5)


@_fault("cut-store", EXTERNAL, fails_over=True)
def _cut_store(scene: Scene, chance: Random) -> None:
    """One coordinator loses its store, or all lose one server."""
    cable = chance.choice(scene.cables)
    cable.cut()
    time.sleep(_beyond_ttl(chance))
    cable.mend()


@_fault("mute-store", EXTERNAL, fails_over=True)
def _mute_store(scene: Scene, chance: Random) -> None:
    """Scripts run, and their answers come late or never."""
    cable = chance.choice(scene.cables)
    cable.flows.clear()
    time.sleep(pick(chance, 1, TTL_SECONDS + 2))
    if chance.random() < 0.5:
        cable.break_all()
    cable.flows.set()


@_fault("slow", fails_over=True)
def _slow(scene: Scene, chance: Random) -> None:
    cables = [*scene.cables, *(one.cable for one in scene.coordinators)]
    for cable in cables:
        cable.delay_seconds = pick(chance, 0.01, 0.15)
    time.sleep(pick(chance, 3, 6))
    for cable in cables:
        cable.delay_seconds = 0


# Room --------------------------------------------------------------------------------------------


@_fault("full-memory")
def _full_memory(scene: Scene, chance: Random) -> None:
    servers = scene.targets()
    for one in servers:
        one.client.config_set("maxmemory", 1)
    time.sleep(pick(chance, 2, 5))
    for one in servers:
        one.client.config_set("maxmemory", 0)


@_fault("full-disk", frozenset({"embedded", "server"}))
def _full_disk(scene: Scene, chance: Random) -> None:
    """No file may grow: what a full disk is to Valkey, without a disk to fill (RLIMIT_FSIZE)."""
    for one in scene.targets():
        one.limit_files(1024)
    time.sleep(pick(chance, 1, 4))
    for one in scene.targets():
        with contextlib.suppress(ProcessLookupError):
            one.limit_files(-1)
    scene.restart_dead_servers()


# Failovers ---------------------------------------------------------------------------------------


def _kill(one: Target) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(one.pid, signal.SIGKILL)
    if one.node:
        one.node.process.wait()


@contextlib.contextmanager
def _behind(primary: Target, replicas: list[Target]) -> Iterator[None]:
    """Let replicas miss what happens meanwhile: they are stopped, and nothing is on its way."""
    with _stopped(*(one.pid for one in replicas)):
        primary.client.client_kill_filter(_type="replica")
        yield


def _promoted(scene: Scene, before: Target) -> bool:
    now = scene.primary_of(APP)
    return now is not None and now.pid != before.pid


def _after_failover(scene: Scene, before: Target) -> None:
    """Wait until another server took over, and all others follow."""
    until(lambda: _promoted(scene, before), PATIENCE_SECONDS)
    scene.restart_dead_servers()
    primaries = 1 if scene.kind == "sentinel" else 3
    until(lambda: len(scene.primaries()) == primaries, PATIENCE_SECONDS)


def _order_failover(scene: Scene, replica: Target) -> None:
    """Let a replica take over at once; behind Sentinel any of them."""

    def accepted() -> bool:
        with contextlib.suppress(redis.RedisError):
            if scene.kind == "sentinel" and scene.store:
                scene.store.sentinels[0].run("SENTINEL", "FAILOVER", "main")
                return True
            if replica.node:
                replica.node.run("CLUSTER", "FAILOVER", "TAKEOVER")
                return True
        return False

    until(accepted, PATIENCE_SECONDS)


@_fault("failover", REPLICATED, loses=True)
def _failover(scene: Scene, _chance: Random) -> None:
    """The primary dies, and a replica takes over."""
    primary = scene.primary_of(APP)
    if primary:
        scene.note(f"kill the primary {primary.name}")
        _kill(primary)
        _after_failover(scene, primary)


@_fault("failover-with-loss", REPLICATED, loses=True)
def _failover_with_loss(scene: Scene, chance: Random) -> None:
    """The replicas hear nothing for a while; then the primary dies."""
    primary = scene.primary_of(APP)
    if primary:
        with _behind(primary, scene.replicas_of(primary)):
            time.sleep(pick(chance, 0.5, 3))
            scene.note(f"kill the primary {primary.name}")
            _kill(primary)
        _after_failover(scene, primary)


# The clock ---------------------------------------------------------------------------------------


def _step(scene: Scene, seconds: float, servers: list[Target] | None = None) -> None:
    scene.note(f"the store's clock steps by {seconds:+g} s")
    for one in scene.targets() if servers is None else servers:
        one.set_clock(one.clock_offset() + seconds)


@_fault("step-forward", clock=True)
def _step_forward(scene: Scene, chance: Random) -> None:
    _step(scene, chance.choice([1.5, 5, 60]))


@_fault("step-back", clock=True)
def _step_back(scene: Scene, chance: Random) -> None:
    _step(scene, -chance.choice([1.5, 5, 20]))


@_fault("forward-and-back", clock=True)
def _forward_and_back(scene: Scene, _chance: Random) -> None:
    """An hour forward, until a coordinator has met it, and back."""

    def met() -> bool:
        one = scene.primary_of(APP)
        seen = one.client.hget(f"holdoff:{{{APP}}}", "high_water_us") if one else None
        return float(seen or 0) / 1e6 > time.time() + 1800

    _step(scene, 3600)
    until(met, PATIENCE_SECONDS)
    _step(scene, -3600)


@_fault("step-in-full-memory", clock=True)
def _step_in_full_memory(scene: Scene, chance: Random) -> None:
    """Quarantine begins while no write succeeds."""
    servers = scene.targets()
    for one in servers:
        one.client.config_set("maxmemory", 1)
    _step(scene, -5)
    time.sleep(pick(chance, 3, 4))
    scene.record_trails()
    for one in servers:
        one.client.config_set("maxmemory", 0)


# Data that is gone -------------------------------------------------------------------------------


@_fault("flush", EXTERNAL, loses=True)
def _flush(scene: Scene, _chance: Random) -> None:
    for one in scene.primaries():
        one.client.flushall()
    make_tokens(scene.endpoint, START_SECONDS)


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# Directed: a lease of a dead holder, in an app of its own, is forgotten ---------------------------


def _late_token(scene: Scene, at: Target | None = None) -> str:
    """Make a token of an app of its own, on a server if one is given; return its name."""
    for _ in range(50):
        token = f"apps/late-{uuid.uuid4().hex[:8]}/tokens/quick"
        _make(scene.endpoint, token)
        found = scene.primary_of(token.split("/")[1])
        if at is None or (found and found.pid == at.pid):
            break
    return token


def _make(address: str, token: str) -> None:
    with holdoff.Client(address) as client:
        client.create_token(token, policy="chaos", refresh_interval_seconds=0)


def _take(scene: Scene, address: str, token: str, ttl: float = LATE_TTL_SECONDS) -> None:
    """Take a lease if there is one, and let it run out, as one who dies."""
    with holdoff.Client(address) as client, contextlib.suppress(holdoff.HoldoffError):
        lease = client.acquire(token, wait_seconds=3, ttl_seconds=ttl)
        deadline, fencing = lease.deadline_ns / 1e9, lease.fencing_token
        scene.record("granted", id=lease.name, token=token, fencing=fencing, deadline=deadline)


@contextlib.contextmanager
def _stranger(scene: Scene) -> Iterator[str]:
    """Run one more coordinator, which meets the apps that there are now; give its address."""
    process, address = scene.coordinators[0].launch()
    until(lambda: listens(address), PATIENCE_SECONDS)
    time.sleep(1)
    try:
        yield address
    finally:
        process.kill()
        process.wait()


@_fault("small-steps", clock=True)
def _small_steps(scene: Scene, _chance: Random) -> None:
    """Steps that are each too small to be seen, while leases run out."""
    scene.fleet.kill("sync")
    token = _late_token(scene)
    _take(scene, scene.endpoint, token, ttl=12)
    for _ in range(7):
        _step(scene, 0.9)
        time.sleep(1.2)  # a coordinator looks at the clock in between
    _take(scene, scene.endpoint, token)


@_fault("drift", clock=True)
def _drift(scene: Scene, _chance: Random) -> None:
    """The clock runs a tenth too fast, in steps that are too small to be seen."""
    scene.fleet.kill("sync")
    token = _late_token(scene)
    scene.note("the store's clock runs 10 % fast for 11 s")
    servers = scene.targets()
    began, before = time.monotonic(), [one.clock_offset() for one in servers]
    _take(scene, scene.endpoint, token, ttl=12)
    while (passed := time.monotonic() - began) < 11:
        for one, offset in zip(servers, before, strict=True):
            one.set_clock(offset + passed / 10)
        time.sleep(0.02)
    _take(scene, scene.endpoint, token)


@_fault("step-and-a-stranger", EXTERNAL, clock=True)
def _step_and_stranger(scene: Scene, _chance: Random) -> None:
    """The clock steps, and a coordinator that never met the app is asked first."""
    with _stranger(scene) as address:
        token = _late_token(scene)
        _take(scene, scene.endpoint, token)
        _step(scene, LATE_TTL_SECONDS + INTERVAL_SECONDS)
        _take(scene, address, token)


@_fault("flush-and-a-stranger", EXTERNAL, loses=True)
def _flush_and_stranger(scene: Scene, _chance: Random) -> None:
    """All is gone, and the token is made again at a coordinator that never met its app."""
    with _stranger(scene) as address:
        token = _late_token(scene)
        _take(scene, scene.endpoint, token)
        for target in scene.primaries():
            target.client.flushall()
        _make(address, token)
        _take(scene, address, token)
    make_tokens(scene.endpoint, START_SECONDS)


@_fault("truncated-file", frozenset({"embedded"}), loses=True)
def _truncated_file(scene: Scene, _chance: Random) -> None:
    """The end of the append-only file is gone, as after a crash of the machine, with a grant."""
    [coordinator] = scene.coordinators
    token = _late_token(scene)
    folder = scene.targets()[0].folder
    [path] = folder.glob("appendonlydir/*.incr.aof")
    kept = path.stat().st_size + 100  # in the middle of a command
    _take(scene, scene.endpoint, token)
    coordinator.kill()
    until(lambda: not _is_locked(folder / "lock"), PATIENCE_SECONDS)
    scene.note(f"cut {path.stat().st_size - kept} bytes off {path.name}")
    os.truncate(path, kept)
    coordinator.start()
    until(lambda: listens(coordinator.address), START_SECONDS)
    _take(scene, scene.endpoint, token)


@_fault("two-failovers", REPLICATED, loses=True)
def _two_failovers(scene: Scene, _chance: Random) -> None:
    """Two in a row that no coordinator sees, the first of which loses a grant."""
    primary = scene.primary_of(APP)
    replicas = scene.replicas_of(primary) if primary else []
    if primary is None or not replicas:
        return
    token = _late_token(scene, primary)
    time.sleep(0.5)  # the replicas have the token
    with contextlib.ExitStack() as stack:
        with _behind(primary, replicas):
            _take(scene, scene.endpoint, token)
            stack.enter_context(_stopped(*_coordinator_pids(scene)))
            scene.note(f"kill the primary {primary.name}")
            _kill(primary)
        _order_failover(scene, replicas[0])
        until(lambda: _promoted(scene, primary), PATIENCE_SECONDS)
        middle = scene.primary_of(APP)
        if middle:
            if scene.kind == "cluster":  # there is no other replica
                scene.restart_dead_servers()
            until(lambda: scene.replicas_of(middle), PATIENCE_SECONDS)
            scene.note(f"fail over again, from {middle.name}")
            _order_failover(scene, (scene.replicas_of(middle) or replicas)[0])
            until(lambda: _promoted(scene, middle), PATIENCE_SECONDS)
    _take(scene, scene.endpoint, token)
    _after_failover(scene, primary)
