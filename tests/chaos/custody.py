"""Two coordinators refresh one token in custody, and are killed and frozen meanwhile.

Prints what the simulated provider reports, and for how long no access token could be had:

    PYTHONPATH=. python tests/chaos/custody.py --seconds 120 --seed 1

The provider's clock is faster than ours (`SCALE`), and so are the policy's intervals. The time
after which another replica takes over is not: a kill between sending and storing costs some 100 s,
unless the replica returns and finds the answer in its spool.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdoff import Client
from holdoff.errors import HoldoffError
from holdoff.testing import valkey
from tests.custodian import key_directory
from tests.harness import wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent
SCALE = 50
"""The shortest interval of custody is 10 s; Exact Online's is 572 s."""
USERS = 3
TOKEN = "apps/chaos/tokens/custody"
SEED_FILE = """\
[[seeds]]
client_id = "chaos"
client_secret = "secret"
user = "finance@example.com"
refresh_token = "first"
divisions = [535193]
"""
POLICY = """\
like = "exact-online"
name = "simulated"
[refresh]
interval = "{interval}s"
margin = "0.2s"
access_token_life = "{life}s"
early_margin = "0.2s"
rotation = "{rotation}"
[oauth]
token_urls = ["http://{address}/api/oauth2/token"]
hosts = ["{address}"]
"""
say = sys.stdout.write


class Replica:
    """A coordinator that is started again whenever it ends."""

    def __init__(self, folder: Path, number: int, store: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._log = folder / f"{number}.log"
        self._command = [
            *(str(BIN / "holdoff-coordinator"), "serve", "--listen", self.address),
            *("--redis-url", store, "--policy-dir", str(folder / "policies")),
            *("--custody-key-dir", str(folder / "keys"), "--custody-loopback-http"),
            *("--custody-spool-dir", str(folder / f"spool{number}")),
        ]
        self.start()

    def start(self) -> None:
        """Start it."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self._command, stderr=log)

    def suffer(self, chance: random.Random) -> str:
        """Kill or freeze it for some seconds; return what was done."""
        seconds = chance.uniform(0.5, 6)
        if chance.random() < 0.5:
            self.process.kill()
            self.process.wait()
            time.sleep(seconds)
            self.start()
            return f"killed, away for {seconds:.1f} s"
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)
        return f"frozen for {seconds:.1f} s"

    def end(self) -> None:
        """End it for good."""
        self.process.kill()
        self.process.wait()


class User:
    """A job that needs the access token all the time."""

    def __init__(self, endpoint: str) -> None:
        self.longest = self.without = 0.0
        self._endpoint = endpoint
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._use, daemon=True)
        self._thread.start()

    def _use(self) -> None:
        since = time.monotonic()
        with Client(self._endpoint) as client, client.access_token(TOKEN) as access:
            while not self._ended.wait(0.05):
                now = time.monotonic()
                try:
                    access.current(0)
                except HoldoffError:
                    self.longest = max(self.longest, now - since)
                    self.without += 0.05
                else:
                    since = now

    def end(self) -> None:
        """Stop."""
        self._ended.set()
        self._thread.join()


@contextlib.contextmanager
def provider(folder: Path, rotation: str) -> Iterator[str]:
    """Run the simulated provider; give its address."""
    (folder / "seeds.toml").write_text(SEED_FILE)
    address = f"127.0.0.1:{free_port()}"
    command = [str(BIN / "holdoff"), "simulator", "serve", "--listen", address]
    command += ["--time-scale", str(SCALE), "--rotation", rotation]
    process = subprocess.Popen(
        [*command, "--seed-file", str(folder / "seeds.toml")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert address in process.stdout.readline()
        yield address
    finally:
        process.kill()
        process.communicate()


def report(address: str) -> dict[str, Any]:
    """Ask the provider what it saw."""
    with urllib.request.urlopen(f"http://{address}/_simulator/report") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def run(seconds: float, seed: int, rotation: str) -> bool:
    """Run for so long; return whether the provider's rules were kept and the chain lives."""
    chance = random.Random(seed)  # noqa: S311 - it is repeatable on purpose
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = stack.enter_context(provider(folder, rotation))
        (folder / "policies").mkdir()
        (folder / "keys").mkdir()
        times = {"interval": 570 / SCALE, "life": 600 / SCALE}
        policy = POLICY.format(address=address, rotation=rotation, **times)
        (folder / "policies/simulated.toml").write_text(policy)
        key_directory(folder / "keys", "first")
        store, _ = stack.enter_context(valkey())
        replicas = [Replica(folder, number, store) for number in range(2)]
        for one in replicas:
            stack.callback(one.end)
        endpoint = ",".join(one.address for one in replicas)
        with Client(endpoint) as client:
            wait_until(lambda: _created(client))
            client.grants.put(
                TOKEN,
                client_id="chaos",
                client_secret="secret",
                refresh_token="first",
                api_hosts=[address],
                last_refresh_age_seconds=3600,
            )
            users = [User(endpoint) for _ in range(USERS)]
            faults, ends = 0, time.monotonic() + seconds
            while time.monotonic() < ends:
                time.sleep(chance.uniform(1, 12))
                victim = chance.choice(replicas)
                say(f"{ends - time.monotonic():6.0f} s left: {victim.address} ")
                say(f"{victim.suffer(chance)}\n")
                faults += 1
            for user in users:
                user.end()
            with client.access_token(TOKEN) as access:
                lives = bool(access.current(150))
            grant = client.grants.get(TOKEN)
        found = report(address)
        violations = sum(one["violations"] for one in found["agents"].values())
        say(f"{os.cpu_count()} cores, rotation {rotation}, seed {seed}, {seconds:.0f} s = ")
        say(f"{seconds * SCALE / 3600:.1f} simulated hours, {faults} faults\n")
        requests = found["token_requests"]
        say(f"token requests: {requests['accepted']} accepted, {requests['refused']} refused, ")
        say(f"violations {violations}\n")
        longest = max(user.longest for user in users)
        share = sum(user.without for user in users) / USERS / seconds
        say(f"longest time without an access token {longest:.1f} s, {100 * share:.0f} % in all\n")
        say(f"generation {grant.generation}, the chain {'lives' if lives else 'is dead'}\n")
        return lives and not violations


def _created(client: Client) -> bool:
    try:
        client.create_token(TOKEN, policy="simulated")
    except HoldoffError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))  # noqa: S311
    parser.add_argument("--rotation", default="until-used")
    given = parser.parse_args()
    sys.exit(not run(given.seconds, given.seed, given.rotation))
