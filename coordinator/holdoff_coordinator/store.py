"""The store as the coordinator meets it: connect, check that it is fit, and know its epoch."""

import asyncio
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

EPOCH_KEY: Final = "holdoff:epoch"
CHECK_SECONDS: Final = 4.5
"""How long the check of a store may take in all."""

_PROBE_KEY: Final = "holdoff:probe"
_OLDEST: Final = (7, 2)  # of Redis and of Valkey alike
_REMEDIES: Final = {
    "MISCONF": "it cannot write to its disk; free space or repair the disk, its log says which",
    "NOREPLICAS": "start its replicas, or lower its min-replicas-to-write",
    "DB index": "end the URL with the number of a database that it has",
}
"""What to do about a refusal that the server words like this."""


class StoreError(Exception):
    """The store cannot be used; the message says what to do and holds no secret."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Which life of the store this is."""

    epoch: str
    """Id that the store was given when it was new; it vanishes with the data."""

    lost: bool
    """Whether the data directory knew another epoch, so that data may be gone."""


class _Cancellable(AbstractConnection):
    """Sends in a way that never swallows the cancellation of the task that sends.

    redis-py sends through `asyncio.wait_for`, which before Python 3.12 drops a cancellation that
    arrives together with the result: every second one, under load. A call whose client has gone
    would then run on, a drain would wait, and a time limit would not hold. Without `wait_for`
    there is also no task to create for each command.
    """

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        if isinstance(command, str):
            command = command.encode()
        try:
            async with asyncio.timeout(self.socket_timeout):
                await self._send_packed_command(
                    [command] if isinstance(command, bytes) else command
                )
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise RedisTimeoutError("Timeout writing to socket") from None
        except OSError as error:
            await self.disconnect(nowait=True)
            raise RedisConnectionError(f"Error while writing to socket: {error}") from error
        except BaseException:
            # Half a command may have been sent: the connection is of no use any more.
            await self.disconnect(nowait=True)
            raise


class _TcpConnection(_Cancellable, Connection):
    """A plain connection."""


class _TlsConnection(_Cancellable, SSLConnection):
    """A connection for `rediss://`."""


class _UnixConnection(_Cancellable, UnixDomainSocketConnection):
    """A connection for `unix://`."""


_CONNECTIONS: Final = {"redis": _TcpConnection, "rediss": _TlsConnection, "unix": _UnixConnection}


def connect(url: str) -> Redis:
    """Return a client for the store; nothing is sent before its first command.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with redis-py's query options. What the
            scripts rely on (bytes, no retries) cannot be changed by it.

    Raises:
        StoreError: The URL is not one. The message never repeats it: a password with a
            character that should have been escaped may stand anywhere in it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _CONNECTIONS:
        raise StoreError("the store's URL must begin with redis://, rediss:// or unix://")
    authority, slash, path_and_query = rest.partition("/")
    path = re.split(r"[?#]", path_and_query, maxsplit=1)[0]
    if (
        "@" in path_and_query
        or re.search(r"[?#].*@|\s", rest)
        or (scheme != "unix" and not re.fullmatch(r"\d*", path))
        or (scheme == "unix" and not (slash and path))
    ):
        raise StoreError(
            "the store's URL cannot be read; in a user name or password write every character "
            "other than letters and digits as %XX (@ is %40, / is %2F), and after the host only "
            "a database number: redis://user:password@host:6379/0, or unix:///path/to/socket"
        )
    if scheme != "unix" and not authority.rpartition("@")[2]:
        raise StoreError("the store's URL names no host: redis://host:6379/0")
    try:
        options: dict[str, Any] = dict(parse_url(url))
    except ValueError:
        # The cause may quote the URL, so it is not chained.
        raise StoreError(
            "the store's URL has a port or a query option that cannot be read"
        ) from None
    pool_options: dict[str, Any] = {
        "max_connections": 64,
        "timeout": 5.0,  # seconds to wait for one of them
        "socket_timeout": 5.0,
        "socket_connect_timeout": 3.0,
        # A PING before a command on a connection that was idle this long (seconds): a peer that
        # vanished without a word then fails the PING, and the command is known to be unsent.
        "health_check_interval": 15,
        **options,
        "connection_class": _CONNECTIONS[scheme],
        # By default redis-py 8 repeats a command up to ten times after *any* lost connection or
        # time-out, also when the server has run it and only the reply was lost. Our scripts
        # decide themselves what a repetition means, so it must be the handlers that repeat, with
        # the same request id and within the caller's deadline. The one thing that the pool still
        # does by itself is safe: an idle connection that the server has closed is replaced
        # before anything is sent. The same policy covers connecting, so that a store that is
        # away is known at once.
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        "decode_responses": False,
        # RESP2: understood by every proxy, and no push messages in between.
        "protocol": 2,
    }
    try:
        pool = BlockingConnectionPool(**pool_options)
        # Options are looked at only when a connection object is made: make one, connect nothing.
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, RedisError):
        raise StoreError("the store's URL has a query option that redis-py refuses") from None
    return Redis.from_pool(pool)


def describe(client: Redis) -> str:
    """Return the store's address for people, without user name and password."""
    pool = client.connection_pool
    options = pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    address = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return f"{scheme}://{address}/{options.get('db', 0)}"


async def check(client: Redis) -> list[str]:
    """Find out whether the store can be relied on.

    Asks for what INFO and CONFIG say, and writes, runs a script and deletes once, since only
    doing so shows what an access list or a full disk forbids.

    Returns:
        What an operator should be warned of, a sentence or two each; empty if all is well.

    Raises:
        StoreError: The store cannot be reached within `CHECK_SECONDS`, refuses us, is too old,
            is a replica, a Sentinel or a node of a Cluster, may evict keys, or does not accept
            writes.
    """
    name = describe(client)
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            info: dict[str, Any] = await client.info()
            warnings = _judge(name, info)
            warnings += await _judge_fsync(client, name, info)
            await _probe(client)
    except TimeoutError:
        raise StoreError(
            f"the store at {name} does not answer within {CHECK_SECONDS} s: is it a Redis or "
            "Valkey server, is it stopped or overloaded, does a firewall drop packets?"
        ) from None
    except RedisError as error:
        raise explain(name, error) from error
    return warnings


async def ensure_epoch(client: Redis, file_epoch: str | None) -> Epoch:
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
        found = await client.set(EPOCH_KEY, fresh, nx=True, get=True)
    except RedisError as error:
        raise explain(describe(client), error) from error
    epoch = found.decode("ascii", "replace") if isinstance(found, bytes) else fresh
    return Epoch(epoch=epoch, lost=file_epoch is not None and file_epoch != epoch)


def explain(name: str, error: RedisError) -> StoreError:
    """Return a driver's error as one that tells an operator what to do.

    Args:
        name: The store as `describe` gives it.
        error: Whatever redis-py raised. Its text comes from the server or the socket and does
            not hold the password.
    """
    # On a Unix socket redis-py wraps what the server answered to the first PING.
    if type(error) is RedisConnectionError and isinstance(error.__cause__, RedisError):
        error = error.__cause__
    text = str(error).rstrip(".")
    match error:
        case AuthenticationError() | AuthorizationError():
            message = (
                f"the store at {name} wants a user name and password other than ours ({text}): "
                "put them into the URL, redis://user:password@host:6379/0"
            )
        case NoPermissionError():
            message = (
                f"the store at {name} refuses our user a command ({text}): the user needs "
                "+@read +@write +@scripting +@pubsub +@connection +info +time and all keys and "
                "channels; see ACL SETUSER"
            )
        case ReadOnlyError():
            message = (
                f"the store at {name} is read-only: give the URL of the primary, not of a replica"
            )
        case OutOfMemoryError():
            message = f"the store at {name} is out of memory: raise its maxmemory"
        case InvalidResponse():
            message = (
                f"what listens at {name} is no Redis or Valkey server ({text}): is the address "
                "right, and does it want TLS (rediss://)?"
            )
        case RedisTimeoutError():
            message = f"the store at {name} does not answer: {text}"
        case RedisConnectionError() if "SSL" in text or "certificate" in text:
            message = (
                f"no TLS with the store at {name} ({text}): write redis:// if it speaks none, or "
                "name its authority in the URL, ?ssl_ca_certs=FILE"
            )
        case RedisConnectionError():
            message = (
                f"the store at {name} cannot be reached: {text}; is it running, and is the "
                "address right?"
            )
        case _:
            remedies = [remedy for sign, remedy in _REMEDIES.items() if sign in text]
            message = ": ".join([f"the store at {name} refuses us ({text})", *remedies])
    return StoreError(message)


def _judge(name: str, info: dict[str, Any]) -> list[str]:
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
                "watches, which `SENTINEL get-master-addr-by-name` tells"
            )
        case "cluster":
            raise StoreError(
                f"the store at {name} is a node of a Cluster, which cannot be used yet: give the "
                "URL of a server with cluster-enabled no"
            )
    if info.get("loading"):
        raise StoreError(f"the store at {name} is still loading its data: start again afterwards")
    if info.get("role") != "master":
        raise StoreError(
            f"the store at {name} is a replica: give the URL of the primary, since a replica "
            "forgets what is written to it"
        )
    # An evicting policy does no harm while maxmemory is 0, but then one CONFIG SET makes leases
    # vanish without a word. noeviction is the default, so somebody chose the other.
    policy = info.get("maxmemory_policy")
    if policy is None:
        return [f"the store at {name} does not tell its maxmemory-policy: it must be noeviction"]
    if policy != "noeviction":
        raise StoreError(
            f"the store at {name} may evict keys (maxmemory-policy {policy}), and an evicted "
            "lease is granted twice: set maxmemory-policy noeviction, or use a store of its own"
        )
    return []


async def _judge_fsync(client: Redis, name: str, info: dict[str, Any]) -> list[str]:
    """Tell what a crash of the store's machine can lose."""
    if not info.get("aof_enabled"):
        warning = (
            f"the store at {name} keeps no append-only file: when it stops, leases, cooldowns and "
            "tokens since its last snapshot are lost; set appendonly yes and appendfsync always"
        )
        return [warning]
    try:
        config = await client.config_get("appendfsync")
    except ResponseError:
        config = {}  # a managed store, which often refuses CONFIG
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
    )
    return [warning]


async def _probe(client: Redis) -> None:
    """Write, run a script and delete, as the coordinator will do all day."""
    await client.set(_PROBE_KEY, b"1", px=1000)
    await client.eval("return 1", 0)
    await client.delete(_PROBE_KEY)
