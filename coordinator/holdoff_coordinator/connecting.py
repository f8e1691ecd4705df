"""From the URL of a store to a client of it.

A server, or the primary that Sentinels name, is a `redis.asyncio.Redis`; a Cluster is a
`cluster.Cluster` of such clients. Nothing here sends anything.
"""

from __future__ import annotations

import asyncio
import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from redis.asyncio import BlockingConnectionPool, Connection, Redis, Sentinel
from redis.asyncio.connection import (
    AbstractConnection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from holdoff_coordinator.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from holdoff_coordinator.cluster import Address, StoreClient


class StoreError(Exception):
    """The store cannot be used; the message says what to do and holds no secret."""


class StoreAwayError(StoreError):
    """The store does not answer now; it may later, as it is."""


@dataclass(frozen=True, slots=True)
class Access:
    """What opens a store, beside its URL: files, which are read again for each connection.

    So a password or a certificate that changed is used without a restart.
    """

    password_file: Path | None = None
    sentinel_password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


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
    """A connection with TLS."""


class _UnixConnection(_Cancellable, UnixDomainSocketConnection):
    """A connection for `unix://`."""


class _PrimaryConnection(_Cancellable, SentinelManagedConnection):
    """A plain connection to the primary that Sentinels name."""


class _PrimaryTlsConnection(_Cancellable, SentinelManagedSSLConnection):
    """The same with TLS."""


class _PrimaryPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary that Sentinels name, for which calls wait as for a server's."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # the client is closed; else only the primary is another one
            await self.sentinel_manager.aclose()


class _Sentinels(Sentinel):
    """Sentinels of which none is forgotten when several calls look for the primary at once.

    redis-py moves the one that answered to the front of a list that all calls share, by an index
    that may be stale by then: one is in it twice, and another gone for as long as the process
    lives (https://github.com/redis/redis-py/pull/4331 tells of the same).
    """

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Ask one after another; raise MasterNotFoundError if none knows the primary."""
        asked = copy.copy(self)
        asked.sentinels = [*self.sentinels]
        address: tuple[str, int] = await Sentinel.discover_master(asked, service_name)
        answered = asked.sentinels[0]
        self.sentinels.sort(key=lambda one: one is not answered)  # that one is asked first
        return address


class _PasswordFile(CredentialProvider):
    """Reads the password when a connection is made."""

    def __init__(self, user: str | None, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RedisConnectionError(
                f"its password cannot be read from {self._path} ({type(error).__name__})"
            ) from error
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


_NO_RETRY: Final[dict[str, Any]] = {
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
    # RESP2: understood by every proxy, and no push messages in between.
    "protocol": 2,
}
_SENTINEL_SECONDS: Final = 1.0
"""How long one Sentinel may take to answer before the next one is asked."""

_SCHEMES: Final = {
    "redis": "server",
    "rediss": "server",
    "unix": "socket",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}
_PATHS: Final = {
    "server": re.compile(r"\d*"),
    "socket": re.compile(r".+"),
    "sentinel": re.compile(r"[\w.-]+(/\d*)?"),
    "cluster": re.compile(r"0?"),
}
_FORMS: Final = {
    "server": "redis://user:password@host:6379/0",
    "socket": "unix:///path/to/socket",
    "sentinel": "redis+sentinel://user:password@host:26379,host:26379/name-of-the-primary/0",
    "cluster": "redis+cluster://user:password@host:6379,host:6379",
}
_DEFAULT_PORTS: Final = {"sentinel": 26379, "cluster": 6379}
_HOST: Final = re.compile(r"(?:\[(?P<v6>[^][]+)\]|(?P<name>[^][:,/?#]+))(?::(?P<port>\d{1,5}))?")
_SENTINEL_OPTIONS: Final = ("username", "password")


def connect(url: str, access: Access | None = None) -> StoreClient:
    """Return a client for the store; nothing is sent before its first command.

    Args:
        url: `redis://`, `rediss://`, `unix://`, or with several hosts `redis+sentinel://` or
            `redis+cluster://` (with TLS `rediss+…`), with redis-py's query options. What the
            scripts rely on (bytes, no retries) cannot be changed by it.
        access: What opens the store beside the URL.

    Raises:
        StoreError: The URL is not one. The message never repeats it: a password with a
            character that should have been escaped may stand anywhere in it.
    """
    access = access or Access()
    kind, tls, hosts, path, options = _read(url)
    options = {**options, **_opened(options, access, tls=tls)}
    if kind == "cluster":
        node = {key: value for key, value in options.items() if key != "db"}
        tcp = _TlsConnection if tls else _TcpConnection

        def client(host: str, port: int) -> Redis:
            return Redis.from_pool(
                _pool(BlockingConnectionPool, tcp, {**node, "host": host, "port": port})
            )

        client(*hosts[0])  # so that an option that cannot be is refused now
        return Cluster(hosts, client)
    if kind == "sentinel":
        return _behind_sentinels(hosts, path, options, access, tls=tls)
    direct = _UnixConnection if kind == "socket" else _TlsConnection if tls else _TcpConnection
    return Redis.from_pool(_pool(BlockingConnectionPool, direct, options))


def describe(client: StoreClient) -> str:
    """Return the store's address for people, without user name and password."""
    if isinstance(client, Cluster):
        return "redis+cluster://" + ",".join(f"{host}:{port}" for host, port in client.seeds)
    pool = client.connection_pool
    options = pool.connection_kwargs
    if isinstance(pool, SentinelConnectionPool):
        known = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
        hosts = ",".join(sorted(f"{one['host']}:{one['port']}" for one in known))
        return f"redis+sentinel://{hosts}/{pool.service_name}"
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    address = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return f"{scheme}://{address}/{options.get('db', 0)}"


def _read(url: str) -> tuple[str, bool, list[Address], str, dict[str, Any]]:
    """Take a URL apart: the kind of the store, whether with TLS, hosts, path and options.

    Raises:
        StoreError: It cannot be.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise StoreError(
            "the store's URL must begin with redis://, rediss:// or unix://, or with "
            "redis+sentinel:// or redis+cluster://"
        )
    kind, tls = _SCHEMES[scheme], scheme.startswith("rediss")
    authority, slash, path_and_query = rest.partition("/")
    if not slash:
        authority, question, query = rest.partition("?")
        path_and_query = question + query
    path, _, query = path_and_query.partition("?")
    if (
        "@" in path_and_query
        or re.search(r"\s", rest)
        or "@" in "".join(re.split(r"[?#]", rest, maxsplit=1)[1:])
        or "#" in path
        or not _PATHS[kind].fullmatch(path)
        or (kind == "socket" and not slash)
    ):
        raise StoreError(
            "the store's URL cannot be read; in a user name or password write every character "
            "other than letters and digits as %XX (@ is %40, / is %2F); it has the form "
            f"{_FORMS[kind]}"
        )
    user, at, named = authority.rpartition("@")
    if kind != "socket" and not named:
        raise StoreError("the store's URL names no host: redis://host:6379/0")
    hosts: list[Address] = []
    if kind in _DEFAULT_PORTS:
        for text in named.split(","):
            match = _HOST.fullmatch(text)
            if not match:
                raise StoreError(
                    f"the store's URL names a host that cannot be read: {_FORMS[kind]}"
                )
            port = int(match["port"] or _DEFAULT_PORTS[kind])
            hosts.append((match["v6"] or match["name"], port))
        database = path.partition("/")[2] if kind == "sentinel" else ""
        url = f"{'rediss' if tls else 'redis'}://{user}{at}host/{database}?{query}"
    try:
        options = dict(parse_url(url))
    except ValueError:
        # The cause may quote the URL, so it is not chained.
        raise StoreError(
            "the store's URL has a port or a query option that cannot be read"
        ) from None
    for name in ("connection_class", *(("host", "port") if hosts else ())):
        options.pop(name, None)
    return kind, tls, hosts, path.partition("/")[0] if kind == "sentinel" else "", options


def _opened(options: dict[str, Any], access: Access, *, tls: bool) -> dict[str, Any]:
    """Return the options that the files make of those of the URL.

    Raises:
        StoreError: They contradict the URL.
    """
    files = {
        "ssl_ca_certs": access.ca_file,
        "ssl_certfile": access.cert_file,
        "ssl_keyfile": access.key_file,
    }
    opened: dict[str, Any] = {key: str(path) for key, path in files.items() if path}
    if opened and not tls:
        raise StoreError("files for TLS with the store need a URL that begins with rediss")
    if access.password_file:
        if options.get("password"):
            raise StoreError("the store's URL has a password, and there is a file of one")
        provider = _PasswordFile(options.get("username"), access.password_file)
        opened |= {"username": None, "password": None, "credential_provider": provider}
    return opened


def _behind_sentinels(
    hosts: list[Address], primary: str, options: dict[str, Any], access: Access, *, tls: bool
) -> Redis:
    own = {name: options.pop(f"sentinel_{name}", None) for name in _SENTINEL_OPTIONS}
    if access.sentinel_password_file:
        own = {"credential_provider": _PasswordFile(own["username"], access.sentinel_password_file)}
    own |= {key: value for key, value in options.items() if key.startswith("ssl_")}
    own |= {"socket_timeout": _SENTINEL_SECONDS, "socket_connect_timeout": _SENTINEL_SECONDS}
    direct = _TlsConnection if tls else _TcpConnection
    sentinels = _Sentinels([])  # type: ignore[no-untyped-call]
    sentinels.sentinels = [
        Redis.from_pool(_pool(BlockingConnectionPool, direct, {**own, "host": host, "port": port}))
        for host, port in hosts
    ]
    options |= {"service_name": primary, "sentinel_manager": sentinels}
    return Redis.from_pool(
        _pool(_PrimaryPool, _PrimaryTlsConnection if tls else _PrimaryConnection, options)
    )


def _pool(
    pool_class: type[BlockingConnectionPool],
    connection_class: type[AbstractConnection],
    options: dict[str, Any],
) -> BlockingConnectionPool:
    """Return the connections of one client.

    Raises:
        StoreError: redis-py refuses an option.
    """
    try:
        pool = pool_class(
            **{
                "max_connections": 128,
                "timeout": 5.0,  # seconds to wait for one of them
                "socket_timeout": 5.0,
                "socket_connect_timeout": 3.0,
                # A PING before a command on a connection that was idle this long (seconds): a
                # peer that vanished without a word then fails the PING, and the command is known
                # to be unsent.
                "health_check_interval": 15,
                **options,
                "connection_class": connection_class,
                "decode_responses": False,
                **_NO_RETRY,
            }
        )
        # Options are looked at only when a connection object is made: make one, connect nothing.
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, RedisError):
        raise StoreError("the store's URL has a query option that redis-py refuses") from None
    return pool
