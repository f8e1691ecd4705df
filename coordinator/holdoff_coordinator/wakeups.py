"""Wake-ups: what the store's scripts tell at the moment at which it happens.

Each app has a channel, which is a sharded one: in a Cluster a message goes to the nodes of the
app's own shard and to no other, and a replica hears of the apps that somebody waits or holds for
at it. What gets lost, while a connection is made or a slot moves, the hub's ticks make up for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from holdoff_coordinator.cluster import node_of
from holdoff_coordinator.scripts import shard_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from redis.asyncio import Redis
    from redis.asyncio.connection import AbstractConnection

    from holdoff_coordinator.cluster import StoreClient

    Take = Callable[[str, str], Awaitable[None]]

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
"""How often to see whether each app is still heard where it is."""
SILENCE_SECONDS: Final = 2.0
"""A node that says nothing for so long is asked whether it is there."""
CHANNEL: Final = ":wake"
"""What follows the key of an app in the name of its channel."""


class WakeUps:
    """Hears the apps for which somebody waits or holds at this replica.

    Args:
        store: The store.
        channel: What follows the key of an app in the name of the channel.
    """

    def __init__(self, store: StoreClient, channel: str = CHANNEL) -> None:
        self._store = store
        self._channel = channel
        self._wanted: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._heard: set[str] = set()
        self._lines: dict[Redis, _Line] = {}

    @contextlib.contextmanager
    def wanted(self, app: str) -> Iterator[None]:
        """Hear an app for as long as the block lasts."""
        self._wanted[app] += 1
        if self._wanted[app] == 1:
            self._changed.set()
        try:
            yield
        finally:
            self._wanted[app] -= 1
            if not self._wanted[app]:
                del self._wanted[app]

    async def listen_forever(self, take: Take) -> None:
        """Hand on each wake-up, its app and what it says; reconnect for ever."""
        try:
            while True:
                # At once when an app comes, but unhurried when it goes: it often comes again.
                self._heard = {*self._wanted, *(self._heard if self._changed.is_set() else ())}
                self._changed.clear()
                await self._connect(take)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._changed.wait()
        finally:
            for node in [*self._lines]:
                await self._lines.pop(node).close()

    async def _connect(self, take: Take) -> None:
        """Hear each app at the node where it is now, and no other app."""
        apps: defaultdict[Redis, set[str]] = defaultdict(set)
        try:
            for app in self._heard:
                apps[await node_of(self._store, shard_key(app))].add(app)
        except RedisError as error:
            log.debug("wake-ups interrupted", error=type(error).__name__)
            return
        for node in [node for node, line in self._lines.items() if line.ended or node not in apps]:
            await self._lines.pop(node).close()
        for node, some in apps.items():
            line = self._lines[node] = self._lines.get(node) or _Line(node, self._channel)
            try:
                await line.hear(some, take)
            except RedisError as error:
                log.debug("wake-ups interrupted", error=type(error).__name__)
                await self._lines.pop(node).close()


class _Channel(PubSub):
    """A channel that ends with its connection.

    redis-py makes another connection on every error, also where none is to be repeated. Here one
    task reads while another subscribes: both would connect, and one connection would leak.
    """

    async def _reconnect(self, conn: AbstractConnection, *_: Any, **__: Any) -> None:
        await conn.disconnect(nowait=True)


class _Line:
    """The connection to one node on which it tells of the apps that it serves."""

    def __init__(self, node: Redis, suffix: str) -> None:
        self._channel = _Channel(node.connection_pool)
        self._suffix = suffix
        self._apps: set[str] = set()
        self._leaving: Counter[str] = Counter()
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing is heard any more."""
        return self._task is not None and self._task.done()

    async def hear(self, apps: set[str], take: Take) -> None:
        """Hear these apps; one command each, since they have slots of their own."""
        before, self._apps = self._apps, set(apps)
        for app in apps - before:
            await self._channel.ssubscribe(f"{shard_key(app)}{self._suffix}")
        for app in before - apps:
            self._leaving[app] += 1
            await self._channel.sunsubscribe(f"{shard_key(app)}{self._suffix}")
        if self._task is None:
            self._task = asyncio.create_task(self._read(take))

    async def close(self) -> None:
        """Hear nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError):
            await self._channel.aclose()  # type: ignore[no-untyped-call]

    async def _read(self, take: Take) -> None:
        try:
            while True:
                await self._follow(await self._next(), take)
        except RedisError as error:
            log.debug("wake-ups interrupted", error=type(error).__name__)
        except Exception:
            log.exception("a wake-up was not followed")

    async def _next(self) -> Mapping[str, Any]:
        message: Mapping[str, Any] | None
        message = await self._channel.get_message(timeout=SILENCE_SECONDS)
        if message is None:
            await self._channel.ping("there?")
            message = await self._channel.get_message(timeout=SILENCE_SECONDS)
        if message is None:
            raise RedisConnectionError("silent")
        return message

    async def _follow(self, message: Mapping[str, Any], take: Take) -> None:
        if message["type"] not in ("smessage", "sunsubscribe"):
            return
        key = message["channel"].decode().removesuffix(self._suffix)
        app = key.removeprefix("holdoff:{").removesuffix("}")
        if message["type"] == "smessage":
            await take(app, message["data"].decode())
        elif self._leaving[app]:
            self._leaving -= Counter([app])
        else:
            raise RedisConnectionError("moved")  # by the server's word
