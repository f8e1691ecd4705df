"""The border to the store: runs the Lua scripts, and turns its errors into failures.

Every decision is made in a script, with the store's clock. One script a file; before each stand
`common.lua` and the parts that build on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from google.protobuf.message import DecodeError
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from holdoff_coordinator.caller import NOBODY
from holdoff_coordinator.clock import SLACK_US, TOLERANCE_US, StoreClock
from holdoff_coordinator.cluster import Cluster, node_of, sent
from holdoff_coordinator.durability import NO_COPIES
from holdoff_coordinator.failures import CODES, Failure, store_trouble
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from redis.asyncio import Redis
    from redis.asyncio.client import Pipeline

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.cluster import StoreClient
    from holdoff_coordinator.durability import Durability

log = structlog.get_logger()

T = TypeVar("T")

READ_BATCH = 100
"""Records read in one script call, so that no call holds up the store."""
APPS = "holdoff:apps"
"""Index of all apps; written before anything of the app, so that it may name too many."""
CREDENTIAL_CHANGES = "{holdoff}:audit"
"""The audit trail of credentials, access files and custody's keys, in the slot of the first."""
REFUSALS = "{holdoff}:refusals"
"""That of calls that were refused: apart, so that who is refused pushes nothing else out."""
AUDIT_KEPT = 10_000
LOST = "lost"
"""Stands for the epoch of an app whose store is known to have lost its data."""

_BUSY = ("due", "backoffs", "reservations")
"""The keys of an app of which one exists while the sweeper has something to do."""

CUSTODY_SCRIPTS = (
    "begin_authorization",
    "begin_refresh",
    "claim_idle",
    "delete_grant",
    "end_authorization",
    "end_refresh",
    "intend_authorization",
    "intend_refresh",
    "put_grant",
    "read_authorization",
    "read_grants",
    "reseal_grant",
    "trust_grant",
)
"""Scripts in `lua/custody/`, each with one MessagePack map in and one out."""
BUDGET_SCRIPTS = ("commit", "read_budgets", "record_events", "reserve", "reset_budget", "sweep")
SCRIPTS = (
    *BUDGET_SCRIPTS,
    *CUSTODY_SCRIPTS,
    "acquire",
    "break",
    "clear_back_off",
    "create_token",
    "follow",
    "quarantine",
    "quarantine_end",
    "read",
    "read_back_offs",
    "read_history",
    "read_lease",
    "read_quarantine",
    "read_queue",
    "read_shared",
    "release",
    "renew",
    "set_back_off",
    "tick",
    "update_token",
    "upgrade",
    "withdraw",
    "withhold",
)
NEEDS_MEMORY = (
    "acquire",
    "begin_authorization",
    "create_token",
    "put_grant",
    "record_events",
    "reserve",
    "set_back_off",
)
"""Scripts that a store refuses when its memory is full, because they add records. All others read,
free, or change what exists: they run, so that a full store ends no lease."""

LASTING = (
    "begin_authorization",
    "begin_refresh",
    "commit",
    "delete_grant",
    "end_authorization",
    "end_refresh",
    "intend_authorization",
    "intend_refresh",
    "put_grant",
    "record_events",
    "release",
    "renew",
    "reseal_grant",
    "reserve",
    "trust_grant",
)
"""Scripts whose effect the store must have as many copies of as the operator asks for."""


def source(name: str) -> str:
    """Return the text of a script, with what stands before it."""
    before, own = ["common", "backoffs", "leases"], [name]
    if name in (*BUDGET_SCRIPTS, "begin_authorization", "begin_refresh", "intend_authorization"):
        before.append("budgets")
    if name in CUSTODY_SCRIPTS:
        own = ["custody/grants", f"custody/{name}"]
    folder = files("holdoff_coordinator") / "lua"
    flags = "" if name in NEEDS_MEMORY else " flags=allow-oom"
    parts = [(folder / f"{part}.lua").read_text() for part in before]
    parts.append("".join((folder / f"{part}.lua").read_text() for part in own))
    # With the first line, a server refuses a script before it begins, or never because of memory.
    # The last part is in a function, since Lua allows 200 local variables in each.
    return "".join([f"#!lua{flags}\n", *parts[:-1], "return (function() ", parts[-1], "end)()\n"])


SCHEMA = int(re.findall(r"^local SCHEMA = (\d+)", source("read"), re.MULTILINE)[0])
"""The version of all records, from common.lua."""
_KNOWN = ("schema", "epoch", "history", "hold_us", "hold_before_us")
"""Fields of a shard that every answer of its scripts has."""
EACH_MOST = 16
"""How many apps a script runs for at once; the store may write to its disk once for all."""


def digest(name: str) -> str:
    """Return by what the store knows a script."""
    return hashlib.sha1(source(name).encode(), usedforsecurity=False).hexdigest()


def shard_key(app: str) -> str:
    """Return the first key of an app; all keys of an app carry its hash tag."""
    return f"holdoff:{{{app}}}"


def audit_keys(app: str) -> tuple[str, str]:
    """Return the keys of an app's audit trail: operators' actions, and everything else."""
    return f"{shard_key(app)}:security", f"{shard_key(app)}:audit"


def lock_name(app: str, token: str) -> str:
    """Return what to pass to `redis_lock.Lock(client, lock_name)`."""
    return f"{shard_key(app)}:{token}"


def boottime_us() -> int:
    """Read the boot clock, which counts suspended time where the platform has such a clock."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime_ns(clock) // 1000


_FIRST_LOOKS = 3
"""How often a clock is looked at before it is relied on; the quickest answer counts."""
ERRORS_READ = 1000
"""Errors of an app looked through for an explanation."""
ERRING_READ = 20
"""How many tokens of an app are read, if none is named."""
CHANGES_READ = 200
"""Changes of an app read at once."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a reader of an app's changes is: after the change of this number, in this epoch."""

    epoch: str
    number: int


_STAND = ("epoch", "changes", "quarantine_until_us", "back_off_moves", "moves")


@dataclass(frozen=True, slots=True)
class Stand:
    """The state of an app that its watchers compare."""

    position: Position
    """After its latest change of a token."""
    quarantine_until_us: int
    back_off_moves: int
    """How often a back-off changed."""
    moves: int
    """How often a budget or a back-off changed."""

    @classmethod
    def read(cls, values: Sequence[bytes | None]) -> Stand:
        """Read the fields `_STAND` of a shard."""
        epoch, *numbers = values
        number, *others = (int(value or 0) for value in numbers)
        return cls(Position((epoch or b"").decode(), number), *others)


@dataclass(frozen=True, slots=True)
class Life:
    """Which data an app has: another one may lack what was acknowledged before."""

    epoch: str
    history: str
    """Of the server's writes; empty where it does not tell."""

    def differs(self, known: Life) -> bool:
        """Whether it is another one, as far as the store tells."""
        histories = {self.history, known.history} - {""}
        return self.epoch != known.epoch or len(histories) > 1

    @property
    def name(self) -> str:
        """A name for it that tells nothing of the store."""
        return hashlib.sha256(f"{self.epoch}{self.history}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Reply:
    """A script's answer: the store's time in µs, a status word, and what goes with it."""

    now_us: int
    epoch: str
    status: str
    values: tuple[Any, ...]
    damaged: tuple[str, ...] = ()
    """What was left out because its record is damaged."""
    late: bool = False
    """The script took the store's clock for doubtful, and only the store was slow."""
    life: str = ""
    """The name of the life of the app's data."""
    is_lasting: bool = True
    """The store has as many copies of the change as the operator asks for."""


@dataclass(slots=True)
class _Watched:
    """A clock of the store, and how often and when it jumped."""

    clock: StoreClock
    jumps: int = 0
    jump_us: int = 0
    jumped_at_us: int = 0

    def copy(self) -> _Watched:
        """Return another one with the same past."""
        return replace(self, clock=self.clock.copy())


@dataclass(frozen=True, slots=True)
class _Hold:
    """The longest hold of an app that the store told of, and until when it counts (boot µs)."""

    us: int = 0
    until_us: int = 0


class Scripts:
    """Runs scripts on the shards of one store."""

    def __init__(
        self,
        redis: StoreClient,
        *,
        quarantine_us: int,
        boot_us: Callable[[], int] = boottime_us,
        durability: Durability = NO_COPIES,
    ) -> None:
        self.redis = redis
        self._durability = durability
        self.on_audit: Callable[[bytes, dict[bytes, bytes]], None] = lambda *_: None
        """Called with each entry that this replica added to the audit trail."""
        self.on_run: Callable[[str, float], None] = lambda *_: None
        """Called with the name of each script that ran, and how long the store took in seconds."""
        self.on_failure: Callable[[str], None] = lambda _: None
        """Called with the reason whenever the store did not answer, or refused."""
        self.on_damage: Callable[[str, str], None] = lambda *_: None
        """Called with the app and kind of each record that was found damaged."""
        self.on_outdated: Callable[[Failure], None] = lambda _: None
        """Called when a newer coordinator has changed the store's records."""
        self.on_new_life: Callable[[str], None] = lambda _: None
        """Called with an app whose data is not what we know: some of it may be lost."""
        self.jumps = 0
        """How often a clock of the store jumped."""
        self.answers = 0
        """How many scripts the store has run for us."""
        self._lost_until_us = 0
        self._quarantine_us = quarantine_us
        self._boot_us = boot_us
        # Each node of a Cluster has a clock, and an app may move to another node: so we keep one
        # for each app too, which begins with what is known of the node's.
        self._nodes: defaultdict[Redis, _Watched] = defaultdict(
            lambda: _Watched(StoreClock(quarantine_us))
        )
        self._clocks: dict[str, _Watched] = {}
        self._epochs: dict[str, str] = {}
        self._lives: dict[str, Life] = {}
        self._holds: defaultdict[str, _Hold] = defaultdict(_Hold)
        self._keep_us = quarantine_us
        self._cleared: dict[str, int] = {}
        self._histories: set[str] = set()
        self._unmet: set[str] = set()
        """Apps for which no script ran since their server is another one, as far as we know."""
        self._sources = {name: source(name) for name in SCRIPTS}
        self._digests = {name: digest(name) for name in SCRIPTS}

    def data_is_lost(self) -> None:
        """Take what the store does not know for lost, for as long as that may matter."""
        self._epochs.clear()
        self._lost_until_us = self._boot_us() + self._quarantine_us

    def records_are_lost(self, app: str) -> None:
        """Take what the store does not know of an app for lost."""
        self._epochs[app] = LOST

    async def run(
        self, name: str, app: str, *args: bytes | str | int, caller: Caller = NOBODY
    ) -> Reply:
        """Run a script on the shard of an app, for a caller whom the audit trail is to name.

        Raises:
            Failure: STORE_UNAVAILABLE; whether the script ran is then unknown.
        """
        watched = await self._watched(app)
        if self._in_doubt(app, watched):
            jumps = watched.jumps
            why = f"the clock of the store jumped by {watched.jump_us / 1e6:+.3f} s"
            loss = "EXPIRED" if watched.jump_us > SLACK_US else "NOTHING"
            await self._run("quarantine", app, why, loss)
            self._cleared[app] = jumps
            if loss == "EXPIRED":
                self.on_new_life(app)
        return await self._run(name, app, *args, caller=caller)

    def _in_doubt(self, app: str, watched: _Watched) -> bool:
        """Tell whether the clock jumped, not long ago, and the app was not quarantined for it."""
        since_us = self._boot_us() - watched.jumped_at_us
        return self._cleared.get(app, 0) < watched.jumps and since_us < self._safe_us(app)

    def _safe_us(self, app: str) -> int:
        """Return for how long something of the app may matter that the store does not know."""
        hold = self._holds[app]
        return max(self._quarantine_us, hold.us if self._boot_us() < hold.until_us else 0)

    def _learn_hold(self, app: str, hold_us: int) -> None:
        now_us, known = self._boot_us(), self._holds[app]
        if hold_us >= known.us or now_us >= known.until_us:
            self._holds[app] = _Hold(hold_us, now_us + hold_us)
            self._keep_us = max(self._keep_us, hold_us)

    async def _watched(self, app: str) -> _Watched:
        """Return the clock that an app goes by."""
        # Finding out which node it is may take a second, by which an estimate would be wrong.
        node = await self._answer(node_of(self.redis, shard_key(app)))
        if self._nodes[node].clock.read(0, 0) is None:
            for _ in range(_FIRST_LOOKS):
                await self.look_at_clock(node)
        if not isinstance(self.redis, Cluster):
            return self._nodes[node]
        if app not in self._clocks:
            self._clocks[app] = self._nodes[node].copy()
        return self._clocks[app]

    async def look_at_clock(self, node: Redis) -> None:
        """Compare the clock of a node of the store with ours.

        Raises:
            Failure: The node did not answer.
        """
        sent_us = self._boot_us()
        seconds, microseconds = await self._answer(node.time())
        self._observe(self._nodes[node], sent_us, seconds * 1_000_000 + microseconds)

    def _observe(self, watched: _Watched, sent_us: int, store_us: int) -> int:
        """Take in what the store's clock showed; return by how many µs it jumped, or 0."""
        jump_us = watched.clock.observe(sent_us, self._boot_us(), store_us, self._keep_us)
        if jump_us:
            watched.jumps += 1
            watched.jump_us, watched.jumped_at_us = jump_us, self._boot_us()
            self.jumps += 1
            log.error("store clock jumped, grants are held back", jump_seconds=jump_us / 1e6)
        return jump_us

    async def _run(
        self, name: str, app: str, *args: bytes | str | int, caller: Caller = NOBODY
    ) -> Reply:
        watched = await self._watched(app)
        reading = watched.clock.read(self._boot_us(), self._safe_us(app))
        if self._in_doubt(app, watched) and reading:
            reading = replace(reading, estimate_us=0)
        header = (
            str(reading or ""),
            self._epochs.get(app) or (LOST if self._boot_us() < self._lost_until_us else ""),
            uuid.uuid4().hex,
            self._safe_us(app),
            caller.identity,
            caller.peer,
        )
        sent_us = self._boot_us()
        sending = self._evaluate(name, shard_key(app), *header, *args)
        answer, is_lasting = await self._answer(sending)
        self.answers += 1
        self.on_run(name, (self._boot_us() - sent_us) / 1e6)
        now_us = int(answer[0])
        if epoch := answer[1].decode():
            self._epochs[app] = epoch
            self._learn_hold(app, int(answer[2]))
        jump_us = self._observe(watched, sent_us, now_us)
        audited, damaged, history = answer[3]
        life = self._note_life(app, Life(epoch, history.decode()))
        for entry_id, flat in audited:
            self.on_audit(entry_id, dict(zip(flat[::2], flat[1::2], strict=True)))
        things = tuple(thing.decode(errors="replace") for thing, _ in damaged)
        for thing, (_, why) in zip(things, damaged, strict=True):
            self._found_damaged(app, thing, why.decode(errors="replace"))
        off_us = abs(now_us - reading.estimate_us) if reading and reading.estimate_us else 0
        late = off_us > TOLERANCE_US and not jump_us
        status, *values = answer[4:]
        reply = Reply(now_us, epoch, status.decode(), tuple(values), things, late, life, is_lasting)
        if reply.status == "SCHEMA_TOO_NEW":
            found, known = (int(value) for value in reply.values)
            failure = Failure(
                "SCHEMA_TOO_NEW",
                f"the store's records of apps/{app} have schema {found}, and this coordinator "
                f"knows up to {known}: a newer one wrote them; upgrade this one",
                retry_after_seconds=1.0,
            )
            self.on_outdated(failure)
            raise failure
        return reply

    def _note_life(self, app: str, life: Life) -> str:
        """Tell when an app has another life; return the name of the one it has."""
        if not life.epoch:
            return ""
        known = self._lives.get(app, life)
        self._lives[app] = life
        if life.differs(known):
            self.on_new_life(app)
        return life.name

    async def _answer(self, command: Awaitable[Any]) -> Any:
        try:
            return await answered(command)
        except Failure as failure:
            self.on_failure(failure.reason)
            raise

    @contextlib.contextmanager
    def sparing(self, app: str, thing: str) -> Iterator[None]:
        """Go on after the block when it fails because a record is damaged, and report that."""
        try:
            yield
        except Failure as failure:
            if CODES[failure.reason] != CODES["STORE_DAMAGED"]:
                raise
            self._found_damaged(app, thing, failure.message)
        except (ValueError, LookupError, TypeError, DecodeError) as error:
            self._found_damaged(app, thing, repr(error))

    def readable(
        self, app: str, kind: str, entries: Iterable[Any], read: Callable[[Any], T]
    ) -> list[T]:
        """Read records of one kind; those that are damaged are reported and left out."""
        found = []
        for entry in entries:
            with self.sparing(app, kind):
                found.append(read(entry))
        return found

    def _found_damaged(self, app: str, thing: str, why: str) -> None:
        self.on_damage(app, thing.partition("/")[0])
        warn("a record is damaged and left out", f"apps/{app}/{thing}", why=why[:200])

    async def run_lasting(
        self, name: str, app: str, *args: bytes | str | int, caller: Caller = NOBODY
    ) -> Reply:
        """Run one of `LASTING`.

        Raises:
            Failure: STORE_NOT_REPLICATED: it ran, may be lost in a failover, and can be sent again.
        """
        reply = await self.run(name, app, *args, caller=caller)
        if reply.status == "OK" and not reply.is_lasting:
            raise self.not_lasting()
        return reply

    def not_lasting(self) -> Failure:
        """Report that the store has too few copies of a change."""
        reason = "STORE_NOT_REPLICATED"
        warn("store call failed", reason, wanted=" ".join(map(str, self._durability.command())))
        self.on_failure(reason)
        return store_trouble(reason)

    async def _evaluate(self, name: str, key: str, *args: bytes | str | int) -> tuple[Any, bool]:
        """Run a script; return its answer, and whether the store has enough copies."""

        async def send(node: Redis) -> tuple[Any, bool]:
            if name in LASTING and self._durability:
                run = partial(self._durability.run, node)
            else:
                run = partial(_run_alone, node)
            try:
                return await run("EVALSHA", self._digests[name], 1, key, *args)
            except NoScriptError:  # it did not run: the server is new to us, or was restarted
                return await run("EVAL", self._sources[name], 1, key, *args)

        return await sent(self.redis, key, send)

    async def upgrade(self) -> None:
        """Bring all records up to this release, or find that they are of a newer one.

        Every script would do so for its own app; doing it at the start shows trouble early.

        Raises:
            Failure: SCHEMA_TOO_NEW or STORE_UNAVAILABLE.
        """
        is_lost = self._boot_us() < self._lost_until_us
        async for asked, answers, _ in self._asked(
            await self.apps(), lambda node, app: node.hmget(shard_key(app), *_KNOWN)
        ):
            for app, values in zip(asked, answers, strict=True):
                if is_lost or isinstance(values, RedisError) or values[0] != b"%d" % SCHEMA:
                    await self._upgrade(app)
                    continue
                # What its scripts would tell, which may be needed after a loss.
                _, epoch, history, *holds = ((value or b"").decode() for value in values)
                self._epochs[app] = epoch
                self._learn_hold(app, max(int(hold or 0) for hold in holds))
                self._note_life(app, Life(epoch, history))

    async def _upgrade(self, app: str) -> None:
        reply = await self.run("upgrade", app)
        found, now = (int(value) for value in reply.values)
        if found != now:
            log.info("upgraded the records of an app", app=app, from_schema=found, schema=now)

    async def run_each(self, apps: Iterable[str], name: str, *args: bytes | str | int) -> list[str]:
        """Run a script for each of some apps, a few at a time.

        A failure for one app does not affect others; return the apps for which it failed.
        """
        some, failed = asyncio.Semaphore(EACH_MOST), list[str]()

        async def run(app: str) -> None:
            async with some:
                try:
                    await self.run(name, app, *args)
                except Failure as failure:
                    warn(f"{name} failed", failure.reason, app=app)
                    failed.append(app)

        await asyncio.gather(*map(run, apps))
        return failed

    async def stands(self, apps: Iterable[str]) -> dict[str, Stand | Failure]:
        """Return the state of apps, or the error; apps with damaged records are omitted."""
        found: dict[str, Stand | Failure] = {}
        async for asked, answers, _ in self._asked(
            apps, lambda node, app: node.hmget(shard_key(app), *_STAND)
        ):
            for app, values in zip(asked, answers, strict=True):
                try:
                    with self.sparing(app, "app"):
                        found[app] = Stand.read(
                            await self._answer(self.redis.hmget(shard_key(app), *_STAND))
                            if isinstance(values, RedisError)  # another node may serve it now
                            else values
                        )
                except Failure as failure:
                    found[app] = failure
        return found

    async def changes(self, app: str, after: int) -> list[tuple[int, dict[str, bytes]]] | None:
        """Return an app's changes after one number, with theirs; None if some are gone."""
        entries = await self._answer(
            self.redis.xrange(f"{shard_key(app)}:changes", min=str(after + 1), count=CHANGES_READ)
        )
        found = [
            (int(entry_id.partition(b"-")[0]), {key.decode(): value for key, value in flat.items()})
            for entry_id, flat in entries
        ]
        return found if found and found[0][0] == after + 1 else None

    async def busy_apps(self) -> list[str]:
        """List the apps with a token that is not idle, a back-off, or a reservation.

        This asks for one number an app; apps are API keys, of which there are few. Of a server
        that is new to us, apps that last met another one are among them: the next script sees
        whether it took over.
        """
        busy: set[str] = set()
        async for apps, counts, history in self._asked(await self.apps(), _exists(_BUSY)):
            busy.update(app for app, count in zip(apps, counts, strict=True) if count)
            if history not in self._histories:
                self._histories.add(history)
                self._unmet.update(apps)
        async for apps, known, history in self._asked(
            sorted(self._unmet), lambda node, app: node.hget(shard_key(app), "history")
        ):
            for app, one in zip(apps, known, strict=True):
                if isinstance(one, RedisError) or (one and history and one.decode() != history):
                    busy.add(app)
                else:
                    self._unmet.discard(app)
        return sorted(busy)

    async def apps_with(self, *keys: str) -> list[str]:
        """List the apps that have one of some keys, such as `budgets`; one EXISTS for each app.

        Apps for which that is not known are included.
        """
        found: list[str] = []
        async for apps, counts, _ in self._asked(await self.apps(), _exists(keys)):
            found += [app for app, count in zip(apps, counts, strict=True) if count]
        return sorted(found)

    async def apps_due(self, key: str) -> list[str]:
        """List the apps with an entry in an index by time that is due; one ZRANGE for each app."""
        found: list[str] = []
        async for apps, firsts, _ in self._asked(
            await self.apps(),
            lambda node, app: node.zrange(f"{shard_key(app)}:{key}", 0, 0, withscores=True),
        ):
            for app, first in zip(apps, firsts, strict=True):
                if isinstance(first, list) and first and first[0][1] <= await self.now_us(app):
                    found.append(app)
        return found

    async def held_back(self) -> list[str]:
        """List the apps that may be in quarantine."""
        stands = await self.stands(await self.apps())
        return [
            app
            for app, stand in stands.items()
            if isinstance(stand, Failure)
            or stand.quarantine_until_us > await self.now_us(app) - SLACK_US
        ]

    async def now_us(self, app: str) -> int:
        """Estimate the time of an app's store, without asking it."""
        watched = await self._watched(app)
        reading = watched.clock.read(self._boot_us(), 0)
        return reading.estimate_us if reading else 0

    async def changed(self, apps: Iterable[str]) -> list[str]:
        """List those of some apps that have another life than we know; this only reads."""
        found: list[str] = []
        async for asked, epochs, history in self._asked(
            apps, lambda node, app: node.hget(shard_key(app), "epoch")
        ):
            for app, epoch in zip(asked, epochs, strict=True):
                if isinstance(epoch, bytes) and app in self._lives:
                    life = Life(epoch.decode(errors="replace"), history)
                    found += [app] * life.differs(self._lives[app])
        return found

    async def _asked(
        self, apps: Iterable[str], ask: Callable[[Pipeline, str], object]
    ) -> AsyncIterator[tuple[list[str], list[Any], str]]:
        """Ask one thing of each app in one round trip a node; give the node's history, too."""
        by_node: defaultdict[Redis, list[str]] = defaultdict(list)
        for app in apps:
            by_node[await self._answer(node_of(self.redis, shard_key(app)))].append(app)
        for node, its_apps in by_node.items():
            async with node.pipeline(transaction=False) as pipeline:
                for app in its_apps:
                    ask(pipeline, app)
                pipeline.info("replication")
                try:
                    *answers, info = await pipeline.execute(raise_on_error=False)
                except RedisError as error:
                    answers, info = [error] * len(its_apps), {}
            # A node of a Cluster that is down, or serves some no more: what they are asked next
            # finds out about each. A managed store may refuse to tell of its replication.
            history = info.get("master_replid", "") if isinstance(info, dict) else ""
            yield its_apps, answers, history

    async def shared_key(self, name: str, new: bytes) -> bytes:
        """Return a key that all replicas share; store the new one if there is none."""
        found = await self.known_key(name)
        if found is None:  # a full store would refuse the rest
            await self._answer(self.redis.set(_shared(name), new, nx=True))
            found = await self.known_key(name)
        return found or new

    async def known_key(self, name: str) -> bytes | None:
        """Return a key that all replicas share; None if there is none."""
        found: bytes | None = await self._answer(self.redis.get(_shared(name)))
        return found

    async def replace_key(self, name: str, new: bytes) -> None:
        """Replace a key that all replicas share, if there is one."""
        await self._answer(self.redis.set(_shared(name), new, xx=True))

    async def register(self, app: str) -> bool:
        """Put an app into the index of apps; tell whether it was new there."""
        return bool(await self._answer(self.redis.sadd(APPS, app)))

    async def has_records(self, app: str) -> bool:
        """Tell whether the store has records of an app."""
        return bool(await self._answer(self.redis.exists(shard_key(app))))

    async def apps(self) -> list[str]:
        """List all apps, in order."""
        return sorted(app.decode() for app in await self._answer(self.redis.smembers(APPS)))

    async def tokens(self, app: str, after: str, limit: int, index: str = "tokens") -> list[str]:
        """List up to `limit` token ids of an index of an app after the id `after`, in order."""
        first = f"({after}" if after else "-"
        key = f"{shard_key(app)}:{index}"
        found = await self._answer(self.redis.zrangebylex(key, first, "+", start=0, num=limit))
        return [token.decode() for token in found]

    async def number_of(self, app: str, index: str) -> int:
        """Return how many tokens an index of an app has."""
        return int(await self._answer(self.redis.zcard(f"{shard_key(app)}:{index}")))

    async def moved(self, app: str, after: int | None) -> tuple[int, list[str], bool]:
        """Return the number of an app's latest move, and what moved after another number.

        That is the ids of budgets, and whether a back-off did.
        """
        key = shard_key(app)
        number = int(await self._answer(self.redis.hget(key, "moves")) or 0)
        if after is None or number == after:
            return number, [], False
        first = f"({after}" if number > after else "-inf"  # a store that began anew
        found = await self._answer(self.redis.zrange(f"{key}:moved", first, "+inf", byscore=True))
        things = [thing.decode().split(" ") for thing in found]
        return (
            number,
            [name for kind, name in things if kind == "budget"],
            any(kind == "back-off" for kind, _ in things),
        )

    async def budgets(self, app: str) -> list[str]:
        """List the ids of an app's budgets with an event in their window."""
        found = await self._answer(self.redis.zrange(f"{shard_key(app)}:budgets", 0, -1))
        return [budget.decode() for budget in found]

    async def errors(self, app: str, token: str) -> list[tuple[bytes, bytes]]:
        """Return the latest errors, the newest first: the time in µs, and the event as JSON.

        They are those of one token, or else of the tokens of the app with the latest errors.
        """
        key = shard_key(app)
        tokens = [token.encode()] if token else []
        if not token:
            tokens = await self._answer(self.redis.zrange(f"{key}:erring", -ERRING_READ, -1))
        found = []
        for one in tokens:
            stream = f"{key}:errors:{one.decode()}"
            entries = await self._answer(
                self.redis.xrevrange(stream, count=ERRORS_READ // len(tokens))
            )
            found += [(fields[b"at_us"], fields[b"event"]) for _, fields in entries]
        return sorted(found, key=lambda one: -int(one[0])) if len(tokens) > 1 else found

    async def secret_hash(self, app: str, token: str, lease: str) -> str:
        """Return the hash of a lease's secret; empty if there is no such lease."""
        key = f"{shard_key(app)}:lease:{token}:{lease}"
        found = await self._answer(self.redis.hget(key, "secret_hash"))
        return found.decode() if found else ""

    async def audit_trail(
        self, key: str, before: str, after: str, count: int
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return entries of one stream of the trail, the newest first, between two ids."""
        entries: list[tuple[bytes, dict[bytes, bytes]]] = await self._answer(
            self.redis.xrevrange(key, max=before, min=after, count=count)
        )
        return entries

    async def add_audit(self, key: str, entry: Mapping[str, str]) -> bytes:
        """Add an entry to a stream of the trail; return its id."""
        fields: Any = dict(entry)
        added: bytes = await self._answer(
            self.redis.xadd(key, fields, maxlen=AUDIT_KEPT, approximate=True)
        )
        return added

    async def policy(self, app: str, token: str) -> str | None:
        """Return the name of a token's policy; None if there is no such token."""
        found = await self._answer(self.redis.hget(f"{shard_key(app)}:token:{token}", "policy"))
        return None if found is None else found.decode()

    async def busy_tokens(self, app: str) -> list[str]:
        """List the ids of an app's tokens that are leased, offered, or cooling, in order."""
        found = await self._answer(self.redis.zrange(f"{shard_key(app)}:due", 0, -1))
        return sorted(token.decode() for token in found)


def _shared(name: str) -> str:
    return f"{{holdoff}}:{name}"


def _exists(keys: Iterable[str]) -> Callable[[Pipeline, str], object]:
    return lambda node, app: node.exists(*(f"{shard_key(app)}:{key}" for key in keys))


async def _run_alone(node: Redis, *command: bytes | str | int) -> tuple[Any, bool]:
    return await node.execute_command(*command), True  # type: ignore[no-untyped-call]


async def answered(command: Awaitable[Any]) -> Any:
    """Await a command of the store.

    Raises:
        Failure: One of `failures.STORE_TROUBLES`.
    """
    try:
        return await command
    except RedisError as error:
        raise store_failure(error) from error


def store_failure(error: RedisError) -> Failure:
    """Turn the driver's error into ours; its text may name hosts, never a password."""
    reason = _reason_of(error)
    warn("store call failed", reason, error=type(error).__name__, detail=str(error)[:200])
    return store_trouble(reason)


def unwrapped(error: RedisError) -> RedisError:
    """Return what the server said; on a Unix socket redis-py wraps its answer to the first PING."""
    if type(error) is RedisConnectionError and isinstance(error.__cause__, RedisError):
        return error.__cause__
    return error


def _reason_of(error: RedisError) -> str:
    match error := unwrapped(error):
        case OutOfMemoryError():
            return "STORE_OUT_OF_MEMORY"
        case ReadOnlyError():
            return "STORE_READ_ONLY"
        case NoPermissionError() | AuthenticationError() | AuthorizationError():
            return "STORE_ACCESS_DENIED"
        case ResponseError() if str(error).startswith(_DENIED):
            return "STORE_ACCESS_DENIED"
        case ResponseError() if type(error) is ResponseError:  # others are about a Cluster
            word = str(error).partition(" ")[0]
            return _REASONS.get(word, "STORE_UNAVAILABLE" if word.isupper() else "INTERNAL")
    return "STORE_UNAVAILABLE"


_DENIED = ("ACL failure in script", "The user executing the script")
"""How Valkey, and Redis, say that a command in a script is forbidden."""
_REASONS = {
    "WRONGTYPE": "STORE_DAMAGED",
    "MISCONF": "STORE_NOT_WRITABLE",
    "NOREPLICAS": "STORE_NOT_WRITABLE",
}
"""By the first word of what the server says; other words in capitals (LOADING, CLUSTERDOWN) pass
by themselves, and a script that failed begins with none."""
