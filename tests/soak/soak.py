"""Many waiters, many tokens, two replicas, for minutes: is every promise kept, and at what cost?

Two `holdoff-coordinator serve` and an external Valkey that fsyncs every write serve 1000 waiters:
five at each of 200 tokens. The tokens are spread over five apps, since an app is what is sharded,
and what a tick or a sweep handles at once; `--apps 1` puts all into one. The waiters sit in
processes of their own and hold real streams; those of one token are at both replicas by turns.

There are two loads. In the *soak* tokens have an interval and leases are held for a moment. In the
short *rush* neither is so: it shows how much the machine can do, beside python-redis-lock on the
same store. Each ends with everybody either served or withdrawn.

Ends with code 1 if a promise was broken, never because something was slow. Run it with `make soak`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
import redis_lock

import holdoff
from holdoff_coordinator.embedded import command
from tests.e2e.service import Service
from tests.soak import load
from tests.soak.load import Load, Log, Seat, Turn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from multiprocessing.queues import SimpleQueue

TOKENS = 200
WAITERS_A_TOKEN = 5
LOAD_PROCESSES = 2
SAMPLE_SECONDS = 0.5
START_SECONDS = 60.0
"""In which load processes must get ready."""
SETTLE_SECONDS = 15.0
PEER_SECONDS = 1.5

KEPT_A_TOKEN = {"token": 1, "history": 1, "lease": 100}
"""Keys that stay for ever, by kind: what ARCHITECTURE.md promises and no more."""
KEPT_AN_APP = {"shard": 1, "tokens": 1, "changes": 1, "audit": 1, "security": 1}

TICKS = os.sysconf("SC_CLK_TCK")
_spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork


def say(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


# What processes use ------------------------------------------------------------------------------


@dataclass(slots=True)
class Usage:
    """What a process used while a load ran."""

    name: str
    pid: int
    megabytes: list[float] = field(default_factory=list)
    """Its resident memory, each `SAMPLE_SECONDS`."""
    cpu_seconds: list[float] = field(default_factory=list)
    sampled_at: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Look at the process; one that has ended is not looked at any more."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            pages = int(stat[21])
            if pages:
                self.cpu_seconds.append((int(stat[11]) + int(stat[12])) / TICKS)
                self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
                self.sampled_at.append(time.monotonic())

    def __str__(self) -> str:
        seconds = self.sampled_at[-1] - self.sampled_at[0]
        share = (self.cpu_seconds[-1] - self.cpu_seconds[0]) / seconds
        first, half, last = (self.megabytes[n] for n in (0, len(self.megabytes) // 2, -1))
        return (
            f"{self.name:<9} {share:>4.0%} of a core; memory {first:.0f} MB at the start, "
            f"{half:.0f} at half, {last:.0f} at the end, peak {max(self.megabytes):.0f}"
        )


def busy_seconds() -> float:
    """Return how long the machine's cores have worked since its start, for whomever."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


# Keys of the store -------------------------------------------------------------------------------


def kind_of(key: str) -> str:
    """Return the kind of a key: the word after its hash tag, or the library's own prefix."""
    if key.startswith("lock"):
        return key.partition(":")[0]
    words = key.partition("}")[2].split(":")
    return words[1] if len(words) > 1 else "shard"


def keys_by_kind(store: redis.Redis) -> tuple[Counter[str], Counter[str]]:
    """Count the keys of apps that stay, and those that expire, by kind."""
    stay: Counter[str] = Counter()
    expire: Counter[str] = Counter()
    cursor = -1
    while cursor:
        cursor, keys = store.scan(max(0, cursor), match="*{*}*", count=1000)
        with store.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.pttl(key)
            for key, left_ms in zip(keys, pipeline.execute(), strict=True):
                (stay if left_ms == -1 else expire)[kind_of(str(key))] += 1
    return stay, expire


@dataclass(frozen=True, slots=True)
class State:
    """What the store says of itself at one instant."""

    time_us: int
    megabytes: float
    """Its data."""
    calls: int
    """Scripts that it ran so far."""
    calls_us: int

    @classmethod
    def of(cls, store: redis.Redis) -> State:
        """Ask it."""
        seconds, microseconds = store.time()
        scripts = store.info("commandstats")["cmdstat_evalsha"]
        return cls(
            time_us=int(seconds) * 1_000_000 + int(microseconds),
            megabytes=store.info("memory")["used_memory"] / 1e6,
            calls=scripts["calls"],
            calls_us=scripts["usec"],
        )


def wait_until_settled(store: redis.Redis, apps: Iterable[str]) -> str:
    """Wait until nothing waits and nothing is due; return what is left of it, or ''."""
    give_up = time.monotonic() + SETTLE_SECONDS
    while True:
        left: Counter[str] = Counter()
        for app in apps:
            shard = f"holdoff:{{{app}}}"
            left["queues"] += sum(1 for _ in store.scan_iter(match=f"{shard}:queue:*", count=1000))
            left["tokens due"] += store.zcard(f"{shard}:due")
        if not left.total() or time.monotonic() > give_up:
            return ", ".join(f"{count} {what}" for what, count in left.items() if count)
        time.sleep(0.2)


# Promises ----------------------------------------------------------------------------------------


def broken_promises(log: Log, interval_us: int) -> list[str]:
    """Find what no run may show, whatever its speed; by the store's clock where it has a time."""
    broken = [f"nobody served {waiter}" for waiter in log.stuck]
    if log.places_rose:
        broken.append(f"{log.places_rose} times a waiter was put back in its queue")
    for token, turns in by_token(log.turns).items():
        for before, after in itertools.pairwise(turns):
            if after.fencing <= before.fencing:
                broken.append(f"{token}: fencing token {after.fencing} after {before.fencing}")
            if after.offered_us < before.ended_us:
                broken.append(f"{token}: two leases at once, {before.fencing}, {after.fencing}")
            if after.offered_us < before.ended_us + interval_us:
                early_us = before.ended_us + interval_us - after.offered_us
                broken.append(f"{token}: {after.fencing} came {early_us} µs too early")
        # Who was in the queue before another even asked is served before it.
        queued_at = math.inf
        for turn in reversed(turns):
            if queued_at < turn.asked_at:
                broken.append(f"{token}: {turn.fencing} was served before one that came first")
            if not may_be_passed_over(turn, log):
                queued_at = min(queued_at, turn.queued_at)
    return broken


def may_be_passed_over(turn: Turn, log: Log) -> bool:
    """Tell whether a waiter let an offer lapse, or may have gone unheard for too long."""
    return turn.passed_over or any(
        turn.queued_at < until and since < turn.served_at for since, until in log.stalls
    )


def by_token(turns: Iterable[Turn]) -> dict[str, list[Turn]]:
    """Return the turns of each token in the order in which they were offered."""
    found: defaultdict[str, list[Turn]] = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn.offered_us):
        found[turn.token].append(turn)
    return found


def handovers_ms(turns: Iterable[Turn]) -> tuple[list[float], list[float]]:
    """Return how long after it could be granted each lease was offered, and was accepted."""
    offered, accepted = [], []
    for those in by_token(turns).values():
        for before, after in itertools.pairwise(those):
            free_us = max(before.ended_us, before.not_before_us)
            offered.append((after.offered_us - free_us) / 1e3)
            accepted.append((after.accepted_us - free_us) / 1e3)
    return offered, accepted


# Loads -------------------------------------------------------------------------------------------


class Cluster:
    """A store and two replicas."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        options = ("--port", "0", "--unixsocket", "valkey.sock", "--save", "")
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        self.valkey = subprocess.Popen(
            command(*options, *durable), cwd=folder, stdout=subprocess.DEVNULL
        )
        stack.callback(self.valkey.wait)
        stack.callback(self.valkey.terminate)
        self.url = f"unix://{folder}/valkey.sock"
        while not (folder / "valkey.sock").exists():
            time.sleep(0.01)
        self.store = stack.enter_context(redis.Redis.from_url(self.url, decode_responses=True))
        self.replicas = [
            stack.enter_context(Service(folder / name, self.url)) for name in ("first", "second")
        ]

    def create_tokens(self, apps: Sequence[str], interval_seconds: float) -> list[str]:
        """Create the tokens of a load, spread over apps."""
        tokens = [f"apps/{apps[n % len(apps)]}/tokens/t{n:03}" for n in range(TOKENS)]
        with holdoff.Client(self.replicas[0].address) as client:
            for token in tokens:
                client.create_token(token, refresh_interval_seconds=interval_seconds)
        return tokens

    def usages(self) -> list[Usage]:
        """Return the processes whose use is of interest."""
        replicas = [
            Usage(f"replica {number}", replica.process.pid)
            for number, replica in enumerate(self.replicas, 1)
        ]
        return [*replicas, Usage("Valkey", self.valkey.pid)]

    def logs(self) -> Iterator[dict[str, Any]]:
        """Yield what the replicas logged."""
        for replica in self.replicas:
            yield from (json.loads(line) for line in list(replica.log))


def run_load(
    cluster: Cluster, apps: Sequence[str], *, seconds: float, interval: float, hold: float
) -> list[str]:
    """Run a load, report on it, and return what promises it broke."""
    store = cluster.store
    tokens = cluster.create_tokens(apps, interval)
    work = Load(seconds, hold, patience_seconds=30 + WAITERS_A_TOKEN * (interval + hold))
    seats = [
        Seat(token, cluster.replicas[number % 2].address, leaves=number == 0)
        for token in tokens
        for number in range(WAITERS_A_TOKEN)
    ]
    usages = cluster.usages()
    logs: SimpleQueue[Log] = _spawn.SimpleQueue()
    ready = _spawn.Barrier(LOAD_PROCESSES + 1, timeout=START_SECONDS)
    for number in range(LOAD_PROCESSES):
        process = _spawn.Process(
            target=load.run, args=(seats[number::LOAD_PROCESSES], work, ready, logs), daemon=True
        )
        process.start()
        usages.append(Usage(f"load {number + 1}", process.pid or 0))
    ready.wait()
    before, busy_before, stop_at = State.of(store), busy_seconds(), time.monotonic() + seconds
    while time.monotonic() < stop_at:
        for usage in usages:
            usage.sample()
        time.sleep(SAMPLE_SECONDS)
    after, busy = State.of(store), busy_seconds() - busy_before
    log = Log()
    for _ in range(LOAD_PROCESSES):
        add(log, logs.get())
    left = wait_until_settled(store, apps)

    broken = broken_promises(log, round(interval * 1e6))
    if left:
        broken.append(f"not settled: {left}")
    if idle := set(tokens) - {turn.token for turn in log.turns}:
        broken.append(f"{len(idle)} tokens were never leased")
    report(log, before, after, interval + hold)
    for usage in usages:
        say(f"  {usage}")
        busy -= usage.cpu_seconds[-1] - usage.cpu_seconds[0]
    say(f"  all else on this machine {busy / seconds:.0%} of a core")
    return broken


def add(log: Log, other: Log) -> None:
    """Add what another process saw."""
    log.turns += other.turns
    log.stuck += other.stuck
    log.withdrawn += other.withdrawn
    log.places_rose += other.places_rose
    log.errors += other.errors
    log.stalls += other.stalls
    log.slowest_seconds = max(log.slowest_seconds, other.slowest_seconds)


def report(log: Log, before: State, after: State, turn_seconds: float) -> None:
    """Say how fast it went, what the store did for it, and who waited in vain."""
    seconds = (after.time_us - before.time_us) / 1e6
    ended = sum(before.time_us < turn.ended_us <= after.time_us for turn in log.turns)
    most = f", at most {TOKENS / turn_seconds:.0f} possible" if turn_seconds else ""
    say(f"  {ended / seconds:.0f} leases/s{most}")
    offered, accepted = handovers_ms(log.turns)
    for what, late in (("offered", offered), ("accepted", accepted)):
        say(
            f"  {what} after it could be: p50 {statistics.median(late):.1f} ms, "
            f"p99 {percentile(late, 0.99):.1f} ms, at most {max(late):.0f} ms"
        )
    turns = Counter(turn.token for turn in log.turns).values()
    say(f"  {min(turns)} to {max(turns)} leases a token; {log.withdrawn} waiters withdrew at last")
    passed_over = sum(may_be_passed_over(turn, log) for turn in log.turns)
    say(
        f"  slowest answer to a plain question {log.slowest_seconds * 1e3:.0f} ms; "
        f"{passed_over} waiters had to be, or may have been, passed over"
    )
    for error, times in log.errors.most_common(5):
        say(f"  clients saw {times} times: {error}")
    calls = after.calls - before.calls
    say(
        f"  scripts: {calls / seconds:.0f}/s, {(after.calls_us - before.calls_us) / calls:.0f} µs "
        f"in the mean; data {before.megabytes:.1f} MB at the start, {after.megabytes:.1f} at the "
        f"end: {(after.megabytes - before.megabytes) * 1e3 / max(1, ended):.2f} kB a lease"
    )


def lock_by_turns(url: str, answers: SimpleQueue[float]) -> None:
    """Take and give back a lock of python-redis-lock, over and over."""
    logging.disable()
    taken, give_up = 0, time.monotonic() + PEER_SECONDS
    with redis.Redis.from_url(url) as store:
        while time.monotonic() < give_up:
            with redis_lock.Lock(store, f"peer-{os.getpid()}", expire=10):
                taken += 1
    answers.put(taken / PEER_SECONDS)


def locks_per_second(url: str) -> float:
    """Return what python-redis-lock does without contention, in as many processes as our load."""
    answers: SimpleQueue[float] = _spawn.SimpleQueue()
    for _ in range(LOAD_PROCESSES):
        _spawn.Process(target=lock_by_turns, args=(url, answers), daemon=True).start()
    return sum(answers.get() for _ in range(LOAD_PROCESSES))


def growth(store: redis.Redis, apps: int, tokens: int) -> list[str]:
    """Say what is in the store, and return what stays there for ever and should not."""
    stay, expire = keys_by_kind(store)
    for what, kinds in (("stay", stay), ("expire", expire)):
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        say(f"keys that {what}: {counts}")
    return [
        f"{count} keys of kind {kind} stay for ever, for {tokens} tokens of {apps} apps"
        for kind, count in stay.items()
        if count > KEPT_A_TOKEN.get(kind, 0) * tokens + KEPT_AN_APP.get(kind, 0) * apps
    ]


def main() -> int:
    """Run both loads and the peer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="length of the soak")
    parser.add_argument("--apps", type=int, default=5, help="number of apps")
    parser.add_argument("--interval", type=float, default=1.0, help="refresh interval in seconds")
    parser.add_argument("--hold", type=float, default=0.05, help="how long leases are held")
    options = parser.parse_args()
    say(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.2f}"
    )
    broken: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="holdoff-") as folder,
        contextlib.ExitStack() as stack,
    ):
        cluster = Cluster(Path(folder), stack)
        shape = f"{TOKENS} tokens of {options.apps} apps, {WAITERS_A_TOKEN} waiters each"
        say(
            f"soak: {options.seconds:g} s, {shape}, interval {options.interval:g} s, "
            f"held {options.hold:g} s"
        )
        apps = [f"soak-{number}" for number in range(options.apps)]
        broken += run_load(
            cluster,
            apps,
            seconds=options.seconds,
            interval=options.interval,
            hold=options.hold,
        )
        rush_seconds = max(3.0, options.seconds / 10)
        say(f"rush: {rush_seconds:g} s, {shape}, no interval, not held")
        rush_apps = [f"rush-{number}" for number in range(options.apps)]
        broken += run_load(cluster, rush_apps, seconds=rush_seconds, interval=0, hold=0)
        say(
            f"python-redis-lock, nobody waiting, {LOAD_PROCESSES} processes: "
            f"{locks_per_second(cluster.url):.0f} locks/s"
        )
        broken += growth(cluster.store, 2 * options.apps, 2 * TOKENS)
        for replica in cluster.replicas:
            replica.end(signal.SIGTERM)
        told = Counter((line["level"], line["event"]) for line in cluster.logs())
    for (level, event), times in told.items():
        if level not in {"debug", "info"}:
            say(f"replicas logged {times} times: {level}: {event}")
    say(f"replicas logged {sum(told.values())} lines")
    for promise in broken[:20]:
        say(f"BROKEN: {promise}")
    say(f"{len(broken)} promises broken" if broken else "every promise kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
