"""How long no access token can be had when the store fails over as it could be replaced, and why.

All times are a tenth of Exact Online's: an access token lives 60 s, can be replaced after 57.2 s,
and is not handed out any more from then on. The time limits of the coordinator are a tenth, too.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from holdoff import Client
from holdoff.errors import HoldoffError
from holdoff.simulator import Rotation
from holdoff.v1 import grant_pb2
from tests.chaos.custody_judge import EARLY
from tests.chaos.custody_scene import SILENCE_MS, Pace, scene
from tests.chaos.scene import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.chaos.custody_scene import Scene

PACE = Pace(scale=10, shortened=10)
SLOW_SECONDS = 1.0
"""How long the provider takes for the answer in which the store fails over."""
AHEAD_SECONDS = 0.2
"""So long before the window opens the primary dies."""
LONGEST_SECONDS = 300.0
say = sys.stdout.write


def measure(folder: Path) -> bool:
    """Measure each case; return whether no request was early, and an access token came again."""
    say(
        f"An access token lives {PACE.life_seconds:.0f} s and can be replaced after "
        f"{PACE.interval_seconds:.1f} s; Sentinel waits {SILENCE_MS / 1000:.1f} s for a server\n"
    )
    kept = True
    for wait_replicas, cases in ((1, ("no fault", "opens", "sent")), (0, ("opens",))):
        own = folder / str(wait_replicas)
        own.mkdir()
        with scene("sentinel", [Rotation.UNTIL_USED], PACE, own, wait_replicas) as one:
            for case in cases:
                say(f"\n--wait-replicas {wait_replicas}; {_CASES[case][0]}\n")
                kept &= _one_window(one, _CASES[case][1])
            early = one.chains[0].provider.ask("report")["totals"]["by_rule"].get(EARLY, 0)
            say(f"{early} early requests\n")
            kept &= not early
    return kept


def _one_window(one: Scene, strike: Callable[[Scene, float], None]) -> bool:
    """Tell what happens in the next window; return whether an access token came."""
    one.wait_until_whole()
    chain = one.chains[0]
    endpoint = ",".join(replica.address for replica in one.replicas)
    with Client(endpoint) as client, client.access_token(chain.token) as access:
        before = access.usable(LONGEST_SECONDS).generation
        grant = client.grants.get(chain.token)
        opens = grant.not_before_time.ToNanoseconds() / 1e9
        expires = grant.expire_time.ToNanoseconds() / 1e9
        strike(one, opens)
        without: float | None = None
        told = ""
        while time.time() < opens + LONGEST_SECONDS:
            now = time.time()
            try:
                usable = access.usable(0)
            except HoldoffError:
                without = without or now
                told = _tell(access.status, told, now - opens)
            else:
                if usable.generation > before:
                    since = without or now
                    say(f"{now - opens:+7.2f} s  a new access token\n")
                    late = max(0.0, now - max(since, expires))
                    say(f"without an access token for {now - since:.2f} s, ")
                    say(f"{late:.2f} s of it after the end of the old one\n")
                    if one.primary.process.poll() is not None:
                        one.primary.restart()
                    return True
            time.sleep(0.005)
    say("no access token came\n")
    return False


def _tell(status: Any, told: str, seconds: float) -> str:
    """Tell why there is no access token, if that changed."""
    state = grant_pb2.GrantState.Name(status.state).removeprefix("GRANT_STATE_")
    now = f"{state}: {status.message}"
    if now != told:
        say(f"{seconds:+7.2f} s  {now}\n")
    return now


def _nothing(one: Scene, opens: float) -> None:
    pass


def _as_it_opens(one: Scene, opens: float) -> None:
    time.sleep(max(0.0, opens - AHEAD_SECONDS - time.time()))
    one.primary.kill()
    say(f"{time.time() - opens:+7.2f} s  the primary dies\n")


def _when_sent(one: Scene, opens: float) -> None:
    (chain,) = one.chains
    chain.provider.ask("faults", "POST", fault="late-answer", seconds=SLOW_SECONDS * PACE.scale)
    time.sleep(max(0.0, opens - 1 - time.time()))
    assert until(lambda: one.attempt(chain).step == "INTENDED", PACE.interval_seconds)
    one.primary.kill()
    say(f"{time.time() - opens:+7.2f} s  the primary dies; the answer is under way\n")


_CASES: dict[str, tuple[str, Callable[[Scene, float], None]]] = {
    "no fault": ("no fault, for comparison", _nothing),
    "opens": ("the primary dies just before the window opens", _as_it_opens),
    "sent": ("the primary dies while an answer is under way", _when_sent),
}
