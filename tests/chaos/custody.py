"""Tokens in custody, while coordinators and the store are killed and frozen at the worst moments.

For each rotation rule two coordinators refresh a token at a provider of its own. A strike waits
until one of them has the right to a request whose answer takes long, or has just sent it. Then
replica, sender or store are killed or frozen. What the provider reports is judged by the protocol's
table of cases, and the exit code is 1 if a promise was broken:

    PYTHONPATH=. python tests/chaos/custody.py --store sentinel --seconds 864 --seed 17

`--measure failover` measures instead for how long no access token can be had when the store fails
over just as it could be replaced.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from holdoff.simulator import Rotation
from tests.chaos import custody_failover
from tests.chaos.custody_judge import EARLY, Account, broken
from tests.chaos.custody_scene import Pace, scene
from tests.chaos.custody_strikes import STRIKES, strike_at
from tests.chaos.scene import START_SECONDS

if TYPE_CHECKING:
    from tests.chaos.custody_scene import Chain, Scene
    from tests.chaos.custody_strikes import Strike

PACE = Pace(scale=200, shortened=10)
"""Two days are 864 s, an interval is 2.9 s, and the right to a request lasts 10 s."""
ROTATIONS = "none,until-used,single-use,single-use-revokes"
FINAL_SECONDS = 8.0
"""A grant that is dead for so long stays so: no answer comes late."""
say = sys.stdout.write


def run(one: Scene, seconds: float, chance: random.Random) -> bool:
    """Strike for so long, and report; return whether all promises were kept."""
    ends = time.monotonic() + seconds
    struck, hits, steps = Counter[str](), Counter[str](), Counter[str]()
    deck: list[tuple[Chain, Strike]] = []
    while time.monotonic() < ends:
        deck = deck or chance.sample(
            [(aim, strike) for aim in one.chains for strike in STRIKES],
            k=len(one.chains) * len(STRIKES),
        )
        aim, strike = deck.pop()
        hit = strike_at(one, aim, strike, chance)
        struck[strike.name] += 1
        hits[strike.name] += bool(hit)
        steps.update(hit.values())
        told = ", ".join(f"{rotation} {step}" for rotation, step in hit.items()) or "no request"
        say(f"{ends - time.monotonic():5.0f} s left: {strike.name}; hit {told}\n")
        _rest(one, chance.uniform(0.5, 4))
    restored = _recover(one)
    say(f"{struck.total()} strikes, {hits.total()} of them between right and stored answer:\n")
    for name, times in sorted(struck.items()):
        say(f"{times:5} {name}, {hits[name]} of them in time\n")
    say(f"They hit {steps['BEGUN']} requests before the intent, {steps['INTENDED']} after it\n")
    kept = [_report(one, chain, restored.get(chain.rotation)) for chain in one.chains]
    return all(kept)


def _rest(one: Scene, seconds: float) -> None:
    """Let some time pass, until all chains live: authorize again where only that helps."""
    one.wait_until_whole()
    began = time.monotonic()
    while time.monotonic() < began + seconds or any(chain.dead_since for chain in one.chains):
        assert time.monotonic() < began + START_SECONDS, "nobody can authorize"
        for chain in one.chains:
            _authorize_if_dead(one, chain)
        time.sleep(0.1)


def _authorize_if_dead(one: Scene, chain: Chain) -> None:
    condition = one.attempt(chain).condition
    if condition == "READY":
        chain.dead_since = None
    elif chain.dead_since is None:
        chain.dead_since = time.monotonic()
    elif time.monotonic() > chain.dead_since + FINAL_SECONDS:
        say(f"        {chain.rotation} is {condition}: a person authorizes\n")
        chain.authorize()


def _recover(one: Scene) -> dict[Rotation, float]:
    """Return how long after the last fault each chain has an access token."""
    for chain in one.chains:
        chain.provider.ask("faults", "DELETE")
    began = time.monotonic()
    restored: dict[Rotation, float] = {}
    while len(restored) < len(one.chains) and time.monotonic() < began + _bound_seconds(one):
        _rest(one, 0.1)
        now = time.monotonic() - began
        restored |= {
            chain.rotation: restored.get(chain.rotation, now)
            for chain in one.chains
            if chain.job.has_it
        }
    return restored


def _bound_seconds(one: Scene) -> float:
    """Return how long after the last fault there is an access token, also where a person helps."""
    return one.bound_seconds + FINAL_SECONDS


def _report(one: Scene, chain: Chain, restored: float | None) -> bool:
    """Tell what happened to a chain, and judge it."""
    found = chain.provider.ask("report")
    requests, violations = found["token_requests"], found["totals"]["by_rule"]
    account = Account(
        chain.rotation,
        requests["accepted"],
        requests["refused"],
        violations,
        chain.lost,
        chain.outlasted,
        chain.deaths,
        restored,
    )
    say(
        f"{chain.rotation}: {requests['accepted']} requests acted on, {requests['refused']} "
        f"refused, {violations.get(EARLY, 0)} early, {sum(violations.values())} violations; "
        f"{chain.lost} answers lost, {chain.outlasted} held back beyond their right, dead "
        f"{chain.deaths} times; without an access token {chain.job.longest:.1f} s at most, "
        f"{100 * chain.job.share_without:.0f} % in all, and after the last fault "
        f"{'still' if restored is None else f'{restored:.1f} s'}\n"
    )
    if restored is None:
        say(f"{chain.rotation}: {chain.explain()}\n")
    wrong = list(broken(account, _bound_seconds(one)))
    for text in wrong:
        say(f"BROKEN: {chain.rotation}: {text}\n")
    return not wrong


def main() -> bool:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["server", "sentinel", "all"], default="all")
    parser.add_argument("--seconds", type=float, default=120, help="on each store")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))  # noqa: S311
    parser.add_argument("--rotation", default=ROTATIONS, help="one or some, with commas")
    parser.add_argument("--measure", choices=["failover"])
    given = parser.parse_args()
    rotations = [Rotation(one) for one in given.rotation.split(",")]
    if given.measure:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return custody_failover.measure(Path(folder))
    kept = True
    for store in ["server", "sentinel"] if given.store == "all" else [given.store]:
        say(
            f"{os.cpu_count()} cores, store {store}, seed {given.seed}; {given.seconds:.0f} s = "
            f"{given.seconds * PACE.scale / 3600:.1f} simulated hours; interval "
            f"{PACE.interval_seconds:.2f} s, life {PACE.life_seconds:.1f} s, right "
            f"{PACE.takeover_seconds:.1f} s (the coordinator's limits divided by "
            f"{PACE.shortened:g})\n"
        )
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            scene(store, rotations, PACE, Path(folder)) as one,
        ):
            chance = random.Random(given.seed)  # noqa: S311 - it is repeatable on purpose
            kept &= run(one, given.seconds, chance)
    return kept


if __name__ == "__main__":
    sys.exit(not main())
