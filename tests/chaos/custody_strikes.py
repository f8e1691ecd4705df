"""What is done to a replica with the right to a request, to its sender, and to the store."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from random import Random

    from holdoff.simulator import Rotation
    from tests.chaos.custody_scene import Attempt, Chain, Replica, Scene
    from tests.stores import Node

SLOW_SECONDS = 1.5
"""How long a provider delays the answer that a strike aims at."""
RECOVERY_SECONDS = 6.0
"""A replica that was killed starts, and looks into its spool every five seconds."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One way to strike."""

    name: str
    replica: str = ""
    """`killed` or `frozen`; empty for neither."""
    with_sender: bool = False
    store: str = ""

    def draw_seconds(self, scene: Scene, chance: Random) -> float:
        """Draw how long it lasts."""
        if self.replica == "frozen":
            longest = scene.pace.interval_seconds + 3
            return scene.pace.takeover_seconds + chance.uniform(1, longest)
        if self.store and len(scene.store.nodes) > 1:
            return chance.uniform(3, 6)  # another server takes over
        return chance.uniform(0.5, 3)


STRIKES = [
    Strike("replica killed", replica="killed"),
    Strike("replica and sender killed", replica="killed", with_sender=True),
    Strike("replica frozen beyond its right", replica="frozen"),
    Strike("replica and sender frozen beyond it", replica="frozen", with_sender=True),
    Strike("store killed", store="killed"),
    Strike("store frozen", store="frozen"),
    Strike("replica and store killed", replica="killed", store="killed"),
]


def strike_at(scene: Scene, aim: Chain, strike: Strike, chance: Random) -> dict[Rotation, str]:
    """Strike between right and stored answer of a chain; return which requests that hit.

    They may be those of other chains, too, and none if no request began. Each is given with how
    far it had got: BEGUN, or INTENDED.
    """
    scene.wait_until_whole()
    _wait_for_request(scene, aim, chance.choice(["BEGUN", "INTENDED"]))
    primary, victim = scene.primary, _victim(scene, scene.attempt(aim))
    seconds, began = strike.draw_seconds(scene, chance), time.monotonic()
    with contextlib.ExitStack() as stack:
        if strike.replica:
            stack.enter_context(_without_replica(victim, strike))
        attempts = {each: scene.attempt(each) for each in scene.chains}
        hit = {
            each: attempt.step
            for each, attempt in attempts.items()
            if attempt.is_under_way and (strike.store or attempt.is_of(victim))
        }
        robbed = [each for each in hit if attempts[each].is_of(victim)] if strike.replica else []
        if strike.store:
            stack.enter_context(_without_store(primary, strike.store))
        time.sleep(seconds)
    lasted = time.monotonic() - began + (RECOVERY_SECONDS if strike.replica == "killed" else 0)
    for each in robbed:
        if hit[each] == "INTENDED":
            each.lost += strike.with_sender
            each.outlasted += not strike.with_sender and lasted > scene.pace.takeover_seconds
    return {each.rotation: step for each, step in hit.items()}


def _wait_for_request(scene: Scene, chain: Chain, step: str) -> None:
    """Wait until a request of a chain, whose answer takes long, got so far; but not for ever."""
    chain.provider.ask("faults", "DELETE")
    slow = SLOW_SECONDS * scene.pace.scale
    chain.provider.ask("faults", "POST", fault="late-answer", seconds=slow)
    before = scene.attempt(chain).id
    give_up = time.monotonic() + scene.bound_seconds
    while time.monotonic() < give_up:
        now = scene.attempt(chain)
        if now.id != before and now.step in {step, "INTENDED"}:
            return
        time.sleep(0.002)


def _victim(scene: Scene, attempt: Attempt) -> Replica:
    """Return the replica that makes a request, or else any."""
    return next((each for each in scene.replicas if attempt.is_of(each)), scene.replicas[0])


def _send(pids: Iterable[int], signum: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@contextlib.contextmanager
def _frozen(pids: list[int]) -> Iterator[None]:
    """Freeze processes inside the block."""
    _send(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        _send(pids, signal.SIGCONT)


@contextlib.contextmanager
def _without_replica(replica: Replica, strike: Strike) -> Iterator[None]:
    """Kill or freeze a replica inside the block."""
    replica.process.send_signal(signal.SIGSTOP)  # it sees no sender end
    senders = replica.senders() if strike.with_sender else []
    if strike.replica == "frozen":
        with _frozen([replica.process.pid, *senders]):
            yield
        return
    _send(senders, signal.SIGKILL)
    replica.end()
    yield
    replica.start()


@contextlib.contextmanager
def _without_store(primary: Node, how: str) -> Iterator[None]:
    """Kill or freeze the primary inside the block."""
    if how == "frozen":
        with _frozen([primary.process.pid]):
            yield
        return
    primary.kill()
    yield
    primary.restart()
