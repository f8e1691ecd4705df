"""What the chaos run of custody plays on: a store, two coordinators, and simulated providers.

Time is scaled twice. Provider and policy are faster than in reality (`Pace.scale`). The time limits
of the coordinator (custody/rules.py) would then be long beside an interval, so that a run has few
of them: they are divided, too (`Pace.shortened`), but less, since processes start no faster.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdoff import Client
from holdoff.errors import HoldoffError, QuarantineNotFound
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US
from holdoff_coordinator.scripts import shard_key
from tests import stores
from tests.chaos.scene import BIN, DURABLE, START_SECONDS, until
from tests.custodian import key_directory
from tests.ports import free_port
from tests.stores import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.simulator import Rotation
    from tests.stores import Node

INTERVAL_SECONDS, MARGIN_SECONDS, LIFE_SECONDS = 570, 2, 600
"""Exact Online's: an access token can be replaced in the last 28 s of its life."""
SILENCE_MS = 1000
"""After which Sentinel takes a server for dead."""
USERS = 100
"""Grants at a provider. A chain that only a person could help continues with the next one."""
SLACK_SECONDS = 10.0
"""What starting again, and a busy machine, may add to the bound of the table."""
SHORTENED = """
import runpy, sys
from holdoff_coordinator.custody import rules
divisor = float(sys.argv.pop(1))
for name, value in list(vars(rules).items()):
    if name.endswith("_US"):
        setattr(rules, name, round(value / divisor))
from holdoff_coordinator.custody import results
results.LEAST_INTERVAL_US = round(results.LEAST_INTERVAL_US / divisor)
runpy.run_module("holdoff_coordinator", run_name="__main__")
"""
"""A coordinator with shorter time limits: all of custody/rules.py, and the shortest interval."""
POLICY = """\
like = "exact-online"
name = "{name}"
[refresh]
interval = "{interval:.6f}s"
margin = "{margin:.6f}s"
access_token_life = "{life:.6f}s"
early_margin = "{early:.6f}s"
rotation = "{name}"
[oauth]
token_urls = ["http://{address}/api/oauth2/token"]
hosts = ["{address}"]
[[limit]]  # a day here has many of the provider's
name = "token-requests"
most = 1000000
"""
SEED = """\
[[seeds]]
client_id = "chaos"
client_secret = "secret"
user = "user-{number}@example.com"
refresh_token = "first-{number}"
divisions = [535193]
"""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much faster than in reality time passes."""

    scale: float
    """For the provider and the policy."""
    shortened: float = 1.0
    """For the time limits of the coordinator."""

    @property
    def interval_seconds(self) -> float:
        """Between two requests, with the margin."""
        return (INTERVAL_SECONDS + MARGIN_SECONDS) / self.scale

    @property
    def life_seconds(self) -> float:
        """Of an access token."""
        return LIFE_SECONDS / self.scale

    @property
    def takeover_seconds(self) -> float:
        """How long the right to a request lasts."""
        return TAKEOVER_US / SECOND / self.shortened


class Replica:
    """A coordinator that is started again whenever it ends."""

    def __init__(
        self, folder: Path, number: int, pace: Pace, store_url: str, wait_replicas: int
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._log = folder / f"{number}.log"
        self._command = [
            *(sys.executable, "-c", SHORTENED, str(pace.shortened)),
            *("serve", "--listen", self.address, "--wait-replicas", str(wait_replicas)),
            *("--redis-url", store_url, "--policy-dir", str(folder / "policies")),
            *("--custody-key-dir", str(folder / "keys"), "--custody-loopback-http"),
            *("--custody-spool-dir", str(folder / f"spool{number}")),
        ]
        self.start()

    def start(self) -> None:
        """Start it."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(self._command, stderr=log)

    def end(self) -> None:
        """End it for good."""
        self.process.kill()
        self.process.wait()

    def senders(self) -> list[int]:
        """Return the processes that make its requests."""
        found: list[int] = []
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, path.read_text().split())
        return found


class Provider:
    """A simulated provider with a rotation rule."""

    def __init__(self, folder: Path, rotation: Rotation, scale: float) -> None:
        self.rotation = rotation
        self.address = f"127.0.0.1:{free_port()}"
        seeds = folder / "seeds.toml"
        seeds.write_text("".join(SEED.format(number=number) for number in range(USERS)))
        command = [str(BIN / "holdoff"), "simulator", "serve", "--listen", self.address]
        command += ["--time-scale", str(scale), "--rotation", rotation]
        self._process = subprocess.Popen(
            [*command, "--seed-file", str(seeds)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        assert self.address in self._process.stdout.readline()

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def ask(self, page: str, method: str = "GET", **document: Any) -> dict[str, Any]:
        """Ask one of its own pages."""
        request = urllib.request.Request(
            f"http://{self.address}/_simulator/{page}",
            json.dumps(document).encode() if document else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
        return found


class Job:
    """Needs the access token of a token all the time."""

    def __init__(self, endpoint: str, token: str) -> None:
        self.longest = self._without = 0.0
        self._endpoint, self._token, self._began = endpoint, token, time.monotonic()
        self._ended = threading.Event()
        self.has_it = False
        self._thread = threading.Thread(target=self._use, daemon=True)
        self._thread.start()

    def _use(self) -> None:
        last = time.monotonic()
        with Client(self._endpoint) as client, client.access_token(self._token) as access:
            while not self._ended.wait(0.02):
                now = time.monotonic()
                try:
                    access.current(0)
                except HoldoffError:
                    self.has_it = False
                    continue
                if not self.has_it:
                    self.has_it = True
                    self.longest = max(self.longest, now - last)
                    self._without += now - last
                last = now

    @property
    def share_without(self) -> float:
        """The share of its time in which it had none."""
        return self._without / (time.monotonic() - self._began)

    def end(self) -> None:
        """Stop."""
        self._ended.set()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class Attempt:
    """The last request for an access token, as the store has it."""

    id: str
    step: str
    replica: str
    condition: str
    """Of the grant."""

    @property
    def is_under_way(self) -> bool:
        """Whether its right was given, and no answer is stored."""
        return self.step in {"BEGUN", "INTENDED"}

    def is_of(self, replica: Replica) -> bool:
        """Whether a replica makes it."""
        return self.replica.endswith(f":{replica.process.pid}")


class Chain:
    """A token in custody under a rotation rule, and the job that uses it."""

    def __init__(self, client: Client, endpoint: str, provider: Provider) -> None:
        self.rotation, self.provider = provider.rotation, provider
        self.token = f"apps/{self.app}/tokens/custody"
        self.lost = self.outlasted = self.deaths = 0
        self.dead_since: float | None = None
        """When it was found that only a person can help."""
        self._client = client
        assert until(self._is_made, START_SECONDS)
        self._put(0)
        self.job = Job(endpoint, self.token)

    @property
    def app(self) -> str:
        """Its app."""
        return f"chaos-{self.rotation}"

    def _is_made(self) -> bool:
        with contextlib.suppress(HoldoffError):
            self._client.create_token(self.token, policy=self.rotation)
            return True
        return False

    def explain(self) -> str:
        """Say why there is no access token, as the coordinator does."""
        try:
            grant = self._client.grants.get(self.token)
        except HoldoffError as error:
            return str(error)
        attempt = grant.last_attempt
        return f"{grant.status.message}; last attempt of {attempt.replica}: {attempt.outcome}"

    def authorize(self) -> None:
        """Put another grant, as a person does who authorizes again, also in a quarantine."""
        with contextlib.suppress(HoldoffError):
            with contextlib.suppress(QuarantineNotFound):
                self._client.end_quarantine(f"apps/{self.app}", "a grant is put")
            self._put(self.deaths + 1)
            self.deaths += 1
            self.dead_since = None

    def _put(self, number: int) -> None:
        """Put a grant of the provider's, of which no token was requested yet."""
        self._client.grants.put(
            self.token,
            client_id="chaos",
            client_secret="secret",
            refresh_token=f"first-{number}",
            api_hosts=[self.provider.address],
            last_refresh_age_seconds=3600,
            replace=True,
        )


class Scene:
    """The whole."""

    def __init__(
        self, pace: Pace, store: Store, replicas: list[Replica], chains: list[Chain]
    ) -> None:
        self.pace, self.store, self.replicas, self.chains = pace, store, replicas, chains
        self.primary: Node
        """The server that took writes when the store was whole."""
        self.wait_until_whole()

    @property
    def bound_seconds(self) -> float:
        """How long after a fault there is an access token at the latest, by the table of cases.

        A lost answer counts as made at the end of its right. Then the interval passes, and where a
        repeat may revoke the grant also the life of the access token.
        """
        return self.pace.takeover_seconds + self.pace.life_seconds + SLACK_SECONDS

    def attempt(self, chain: Chain) -> Attempt:
        """Read the last request of a chain."""
        key = f"{shard_key(chain.app)}:grant:custody"
        fields = ("attempt", "attempt_step", "attempt_replica", "condition")
        found: Any = self.primary.client.hmget(key, *fields)
        return Attempt(*((one or b"").decode() for one in found))

    def _is_whole(self) -> bool:
        """Tell whether there is one primary that all other servers follow."""
        primaries = self.store.primaries()
        if len(primaries) != 1:
            return False
        told: Any = primaries[0].client.info("replication")
        others = [told.get(f"slave{n}") or {} for n in range(len(self.store.nodes) - 1)]
        self.primary = primaries[0]
        return all(one.get("state") == "online" for one in others)

    def wait_until_whole(self) -> None:
        """Wait until the store can lose a server."""
        assert until(self._is_whole, START_SECONDS), "the store does not recover"


@contextlib.contextmanager
def scene(
    kind: str, rotations: list[Rotation], pace: Pace, folder: Path, wait_replicas: int = 1
) -> Iterator[Scene]:
    """Start everything, and put a grant for each rotation rule."""
    with contextlib.ExitStack() as stack:
        (folder / "policies").mkdir()
        (folder / "keys").mkdir()
        key_directory(folder / "keys", "first")
        providers = []
        for rotation in rotations:
            provider = Provider(folder, rotation, pace.scale)
            stack.callback(provider.end)
            policy = POLICY.format(
                name=rotation,
                address=provider.address,
                interval=INTERVAL_SECONDS / pace.scale,
                margin=MARGIN_SECONDS / pace.scale,
                life=pace.life_seconds,
                early=pace.life_seconds - pace.interval_seconds,
            )
            (folder / f"policies/{rotation}.toml").write_text(policy)
            providers.append(provider)
        if kind == "sentinel":
            copied = ("--min-replicas-to-write", "1") if wait_replicas else ()
            store = stack.enter_context(stores.watched(*DURABLE, *copied, silence_ms=SILENCE_MS))
        else:
            server = stack.enter_context(stores.node(*DURABLE))
            store = Store(f"redis://127.0.0.1:{server.port}/0", [server])
            wait_replicas = 0
        replicas = [Replica(folder, number, pace, store.url, wait_replicas) for number in range(2)]
        for one in replicas:
            stack.callback(one.end)
        endpoint = ",".join(one.address for one in replicas)
        client = stack.enter_context(Client(endpoint))
        chains = [Chain(client, endpoint, one) for one in providers]
        for chain in chains:
            stack.callback(chain.job.end)
        yield Scene(pace, store, replicas, chains)
