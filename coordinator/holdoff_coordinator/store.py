"""The store as the coordinator meets it: connect, check that it is fit, and know its epoch."""

import asyncio
import contextlib
import re
import uuid
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from holdoff_coordinator.cluster import Cluster, StoreClient, node_of
from holdoff_coordinator.connecting import (
    Access,
    StoreAwayError,
    StoreError,
    connect,
    describe,
)
from holdoff_coordinator.durability import NO_COPIES, Durability
from holdoff_coordinator.scripts import unwrapped

__all__ = [
    "Access",
    "Assumed",
    "Epoch",
    "StoreAwayError",
    "StoreError",
    "check",
    "connect",
    "describe",
    "ensure_epoch",
    "explain",
    "mark_restored",
]

EPOCH_KEY: Final = "holdoff:epoch"
RESTORED_KEY: Final = "holdoff:restored"
"""There while a store that was restored from a backup may have forgotten whole apps."""
CHECK_SECONDS: Final = 4.5
"""How long the check of a store may take in all."""

_KEYS: Final = {
    "~holdoff:*": "holdoff:{probe}:wake",
    "~{holdoff}:*": "{holdoff}:probe",
    "~lock:holdoff:*": "lock:holdoff:{probe}",
    "~lock-signal:holdoff:*": "lock-signal:holdoff:{probe}",
    "~lock:{holdoff:sweeper}": "lock:{holdoff:sweeper}",
    "~lock-signal:{holdoff:sweeper}": "lock-signal:{holdoff:sweeper}",
}
"""Patterns of the keys that we use, and a key of each."""
_PROBE_KEY: Final = _KEYS["~holdoff:*"]  # also the name of a channel
_CHANNELS: Final = "&holdoff:*"
ACCESS: Final = (
    f"resetkeys {' '.join(_KEYS)} resetchannels {_CHANNELS} "
    "+@read +@write +@scripting +@pubsub +@connection +info +time +cluster|slots +cluster|myshardid"
)
"""What our user needs, as ACL SETUSER takes it."""
_OLDEST: Final = (7, 2)  # of Redis and of Valkey alike
_REMEDIES: Final = {
    "MISCONF": "it cannot write to its disk; free space or repair the disk, its log says which",
    "NOREPLICAS": "start its replicas, or lower its min-replicas-to-write",
    "DB index": "end the URL with the number of a database that it has",
    "cluster support disabled": "it is a single server, whose URL begins with redis://",
    "served by no node": "see CLUSTER NODES for what is wrong with the nodes that had them",
}
"""What to do about a refusal that the server words like this."""


@dataclass(frozen=True, slots=True)
class Assumed:
    """What an operator knows of a store that does not tell it itself."""

    noeviction: bool = False
    fsync: str = ""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Which life of the store this is."""

    epoch: str
    """Id that the store was given when it was new; it vanishes with the data."""

    lost: bool
    """Whether the data directory knew another epoch, or a backup was restored not long ago, so
    that data may be gone."""


_NOTHING_ASSUMED: Final = Assumed()


async def check(
    client: StoreClient, assumed: Assumed = _NOTHING_ASSUMED, durability: Durability = NO_COPIES
) -> list[str]:
    """Find out whether the store can be relied on; of a Cluster, every primary.

    Asks for what INFO and CONFIG say, and tries every command, pattern of keys and channel that we
    use, since only doing so shows what an access list or a full disk forbids.

    Args:
        client: The store.
        assumed: What to believe where the store does not tell; what it tells counts more.
        durability: How many copies of a change it must have.

    Returns:
        What an operator should be warned of, a sentence or two each; empty if all is well.

    Raises:
        StoreAwayError: The store cannot be reached within `CHECK_SECONDS`, or loads its data.
        StoreError: It refuses us, is too old, is a replica, a Sentinel, or a Cluster where the
            URL says otherwise, may evict keys, or does not accept writes.
    """
    name = describe(client)
    warnings: list[str] = []
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            cluster = isinstance(client, Cluster)
            for node in await client.primaries() if isinstance(client, Cluster) else [client]:
                # A Cluster is many servers: say which of them it is.
                name = describe(node)
                info: dict[str, Any] = await node.info()
                warnings += _judge(name, info, assumed, cluster=cluster)
                warnings += await _judge_fsync(node, name, info, assumed)
                if cluster or isinstance(node.connection_pool, SentinelConnectionPool):
                    warnings += _judge_replicas(name, info)
                if durability:
                    warnings += await _judge_copies(node, name, info, durability)
            name = describe(client)
            await _probe(client, name)
    except TimeoutError:
        raise StoreAwayError(
            f"the store at {name} does not answer within {CHECK_SECONDS} s: is it a Redis or "
            "Valkey server, is it stopped or overloaded, does a firewall drop packets?"
        ) from None
    except RedisError as error:
        raise explain(name, error) from error
    return warnings


async def ensure_epoch(client: StoreClient, file_epoch: str | None) -> Epoch:
    """Return the store's epoch, giving it one if it has none.

    After a loss the store gets a *new* epoch, so the caller must write it to its file only when
    the quarantine that follows is over: until then every restart finds them different again.

    Args:
        client: The store.
        file_epoch: What the data directory remembers; None if it remembers nothing.

    Raises:
        StoreError: The store cannot be used.
    """
    fresh = uuid.uuid4().hex
    try:
        # SET NX GET is one step: of two replicas on a new store, one sets and both learn the same.
        # A store without memory refuses it, even where there is an epoch.
        found: bytes | str | bool | None = await client.get(EPOCH_KEY)
        found = found or await client.set(EPOCH_KEY, fresh, nx=True, get=True)
        restored = bool(await client.exists(RESTORED_KEY))
    except RedisError as error:
        raise explain(describe(client), error) from error
    epoch = found.decode("ascii", "replace") if isinstance(found, bytes) else fresh
    return Epoch(epoch, lost=restored or (file_epoch is not None and file_epoch != epoch))


async def mark_restored(client: StoreClient, seconds: float) -> None:
    """Have coordinators that start within some seconds take the store's data for lost.

    Raises:
        StoreError: The store cannot be used.
    """
    try:
        await client.set(RESTORED_KEY, b"1", px=max(1, round(seconds * 1000)))
    except RedisError as error:
        raise explain(describe(client), error) from error


def explain(name: str, error: RedisError) -> StoreError:
    """Return a driver's error as one that tells an operator what to do.

    Args:
        name: The store as `describe` gives it.
        error: Whatever redis-py raised. Its text comes from the server or the socket and does
            not hold the password.
    """
    error = unwrapped(error)
    text = str(error).rstrip(".")
    match error:
        case AuthenticationError() | AuthorizationError():
            message = (
                f"the store at {name} requires a user name and password other than ours ({text}): "
                "put them into the URL, redis://user:password@host:6379/0"
            )
        case NoPermissionError():
            message = (
                f"the store at {name} refuses our user a command ({text}): what it needs is, for "
                f"ACL SETUSER, {ACCESS}"
            )
        case ReadOnlyError():
            message = (
                f"the store at {name} is read-only: give the URL of the primary, not of a replica"
            )
        case OutOfMemoryError():
            message = f"the store at {name} is out of memory: raise its maxmemory"
        case InvalidResponse():
            message = (
                f"the server at {name} is not Redis or Valkey ({text}): is the address "
                "right, and does it require TLS (rediss://)?"
            )
        case RedisTimeoutError():
            return StoreAwayError(f"the store at {name} does not answer: {text}")
        case BusyLoadingError():
            return StoreAwayError(f"the store at {name} is still loading its data")
        case RedisConnectionError():
            return _unreachable(name, error, text)
        case _:
            remedies = [remedy for sign, remedy in _REMEDIES.items() if sign in text]
            message = ": ".join([f"the store at {name} refuses us ({text})", *remedies])
    return StoreError(message)


def _unreachable(name: str, error: RedisConnectionError, text: str) -> StoreError:
    """Say what to do about a store that does not even listen."""
    if isinstance(error, MasterNotFoundError):
        # Its text shows every client that it asked with, at length.
        return StoreAwayError(
            f"no Sentinel of {name} can be reached, accepts our password, and reports a running "
            "primary of that name: are they running, is their password in "
            "--redis-sentinel-password-file, and what does SENTINEL MASTERS report?"
        )
    if "SSL" in text or "certificate" in text:
        return StoreError(
            f"no TLS with the store at {name} ({text}): write redis:// if it does not use TLS, or "
            "name its authority with --redis-ca-file, or in the URL, ?ssl_ca_certs=FILE"
        )
    return StoreAwayError(
        f"the store at {name} cannot be reached: {text}; is it running, and is the address right?"
    )


def _judge(name: str, info: dict[str, Any], assumed: Assumed, *, cluster: bool) -> list[str]:
    """Judge what INFO says.

    Raises:
        StoreError: The store is unfit.
    """
    # Valkey reports the Redis version that it is compatible with beside its own.
    valkey = info.get("server_name") == "valkey"
    product, version = (
        ("Valkey", info.get("valkey_version")) if valkey else ("Redis", info.get("redis_version"))
    )
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _OLDEST:
        raise StoreError(
            f"the store at {name} is {product} {version}: Redis or Valkey 7.2 or newer is needed"
        )
    # Valkey's own name for it; Redis, and a Valkey that imitates it, say redis_mode.
    match info.get("server_mode", info.get("redis_mode")):
        case "sentinel":
            raise StoreError(
                f"what listens at {name} is a Sentinel: give the URL of the primary that it "
                "watches, or redis+sentinel://host:26379/name-of-the-primary"
            )
        case "cluster" if not cluster:
            raise StoreError(
                f"the store at {name} is a node of a Cluster: give its URL as "
                "redis+cluster://host:6379,host:6379, or that of a server with cluster-enabled no"
            )
    if info.get("loading"):
        raise StoreAwayError(f"the store at {name} is still loading its data")
    if info.get("role") != "master":
        raise StoreError(
            f"the store at {name} is a replica: give the URL of the primary, since a replica "
            "forgets what is written to it"
        )
    # An evicting policy does no harm while maxmemory is 0, but then one CONFIG SET makes leases
    # vanish without a word. noeviction is the default, so somebody chose the other.
    policy = info.get("maxmemory_policy")
    if policy is None and assumed.noeviction:
        return []
    if policy is None:
        warning = (
            f"the store at {name} does not tell its maxmemory-policy: it must be noeviction "
            "(when you know that it is, say --assume noeviction)"
        )
        return [warning]
    if policy != "noeviction":
        raise StoreError(
            f"the store at {name} may evict keys (maxmemory-policy {policy}), and an evicted "
            "lease is granted twice: set maxmemory-policy noeviction, or use a store of its own"
        )
    return []


def _judge_replicas(name: str, info: dict[str, Any]) -> list[str]:
    """Tell what a failover of a primary can lose."""
    if "min_slaves_good_slaves" in info:  # there only if it asks for replicas
        return []
    warning = (
        f"the store at {name} acknowledges writes that no replica has, and continues to do so when "
        "it is cut off: a failover may lose all of them, and a token may be granted twice; set "
        "min-replicas-to-write 1 and min-replicas-max-lag 10"
    )
    return [warning]


async def _judge_copies(
    node: Redis, name: str, info: dict[str, Any], durability: Durability
) -> list[str]:
    """Tell whether a primary can have as many copies as the operator asks for.

    Raises:
        StoreError: It never can.
    """
    if durability.fsync and info.get("aof_enabled") == 0:
        raise StoreError(
            f"the store at {name} keeps no append-only file, for which --wait-fsync waits: set "
            "appendonly yes, also on its replicas, or leave that out"
        )
    command = replace(durability, replicas=0, seconds=0).command()
    try:
        await node.execute_command(*command)  # type: ignore[no-untyped-call]
    except NoPermissionError:
        raise StoreError(
            f"the access list of the store at {name} lacks for our user: +{str(command[0]).lower()}"
            "; --wait-replicas and --wait-fsync need it"
        ) from None
    replicas = [value for key, value in info.items() if re.fullmatch(r"slave\d+", key)]
    online = sum(one["state"] == "online" for one in replicas)
    if online >= durability.replicas:
        return []
    warning = (
        f"the store at {name} has {online} of the {durability.replicas} replicas that "
        "--wait-replicas asks for: nothing is granted until it has them"
    )
    return [warning]


async def _judge_fsync(
    client: Redis, name: str, info: dict[str, Any], assumed: Assumed
) -> list[str]:
    """Tell what a crash of the store's machine can lose."""
    try:
        config = await client.config_get("appendfsync")
    except ResponseError:
        config = {}  # a managed store, which often refuses CONFIG
    if not config and assumed.fsync:
        config = {"appendfsync": assumed.fsync}
    elif not info.get("aof_enabled"):
        warning = (
            f"the store at {name} keeps no append-only file: when it stops, leases, cooldowns and "
            "tokens since its last snapshot are lost; set appendonly yes and appendfsync always"
        )
        return [warning]
    appendfsync = str(config.get("appendfsync", "unknown"))
    if appendfsync == "always":
        return []
    what = {
        "everysec": "up to two seconds of grants, renewals and reports",
        "no": "some half a minute of grants, renewals and reports",
    }.get(appendfsync, "what was acknowledged last, unless it fsyncs every write,")
    warning = (
        f"the store at {name} does not fsync every write, as far as we can see (appendfsync "
        f"{appendfsync}): a crash of its machine loses {what} and a token may be granted twice; "
        "set appendfsync always"
        + ("" if config else ", or when you know that it does, say --assume fsync=always")
    )
    return [warning]


async def _probe(client: StoreClient, name: str) -> None:
    """Write, run a script and delete, as the coordinator will do all day.

    Raises:
        StoreError: The access list forbids something that we need.
    """
    missing = []
    for pattern, key in _KEYS.items():
        try:
            await client.eval("return 1", 1, key)  # refused without the right to read and write it
        except NoPermissionError as error:
            if "access a key" not in str(error):
                raise
            missing.append(pattern)
    if "~holdoff:*" not in missing:
        script = (files("holdoff_coordinator") / "lua" / "probe.lua").read_text()
        missing += [f"+{name.decode()}" for name in await client.eval(script, 1, _PROBE_KEY)]
    missing += await _lacks_to_listen(client)
    if missing:
        raise StoreError(
            f"the access list of the store at {name} lacks for our user: {' '.join(missing)}; what "
            f"it needs is, for ACL SETUSER, {ACCESS}"
        )
    with contextlib.suppress(NoScriptError):
        await client.evalsha("0" * 40, 1, _PROBE_KEY)
    await (await node_of(client, _PROBE_KEY)).ping()
    await client.set(_PROBE_KEY, b"1", px=1000)
    await client.delete(_PROBE_KEY)


async def _lacks_to_listen(client: StoreClient) -> list[str]:
    """Return what it lacks to hear wake-ups."""
    channel = (await node_of(client, _PROBE_KEY)).pubsub()
    try:
        await channel.ssubscribe(_PROBE_KEY)
        await channel.get_message(timeout=1.0)
    except NoPermissionError as error:
        return [_CHANNELS if "access a channel" in str(error) else "+ssubscribe"]
    finally:
        await channel.aclose()  # type: ignore[no-untyped-call]
    return []
