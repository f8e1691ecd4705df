"""A Cluster as one client: each command goes to the node that serves the slot of its key.

redis-py's own client for a Cluster follows ASK, so that a script would run where half of an
app's keys have arrived and take the others for missing; it closes the connections to *all*
nodes, with what is under way on them, at every fifth MOVED and at every CLUSTERDOWN; and it
refuses calls beyond a number, where our pool lets them wait. So here is only the routing; each
node is a client as it is made for a single server, with its own connections, its time limits,
and no retries.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from redis.asyncio import Redis
from redis.commands import AsyncCoreCommands
from redis.crc import key_slot
from redis.event import EventDispatcher
from redis.exceptions import (
    ClusterDownError,
    ClusterError,
    MovedError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

Address = tuple[str, int]
T = TypeVar("T")

SLOTS: Final = 16384
LOOK_SECONDS: Final = 1.0
"""How long one node may take to say who serves what, before the next one is asked."""
_MOST_HOPS: Final = 5


class Cluster(AsyncCoreCommands):
    """All nodes of a Cluster.

    Its commands are those of `redis.asyncio.Redis`, each of which must name its keys right after
    its name, or be an EVAL or EVALSHA; all keys of a command share a slot.

    Args:
        seeds: Nodes to begin with.
        client: Makes the client of one node.
    """

    _event_dispatcher: EventDispatcher
    _is_async_client: Literal[True] = True  # redis-py chooses the types of its answers by it

    def __init__(self, seeds: Sequence[Address], client: Callable[[str, int], Redis]) -> None:
        self._event_dispatcher = EventDispatcher()
        self.seeds = tuple(seeds)
        self._make_client = client
        self._nodes: dict[Address, Redis] = {}
        self._owners: list[Address | None] = []
        self._must_look = True
        self._looking = asyncio.Lock()
        self._ask_next: list[Address] = list(seeds)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command where its key is; it is sent again only if it did not run."""
        name, *rest = args
        key = rest[2] if name in ("EVAL", "EVALSHA") else rest[0]

        async def send(node: Redis) -> Any:
            return await node.execute_command(*args, **options)  # type: ignore[no-untyped-call]

        return await self.sent(key, send)

    async def sent(self, key: bytes | str, send: Callable[[Redis], Awaitable[T]]) -> T:
        """Send to the node that serves a key; again only if the command did not run."""
        slot = key_slot(key.encode() if isinstance(key, str) else key)
        moved = False
        for _ in range(_MOST_HOPS):
            address = await self._owner(slot)
            try:
                answer = await send(self._node(address))
            except MovedError as error:
                # Used for this command: the node that lists all slots may not know it yet.
                self._owners[slot] = (error.host or address[0], error.port)
                moved = True
                continue
            except (RedisConnectionError, RedisTimeoutError, ClusterDownError):
                # Whether it ran is for the caller to find out; where it goes next, for us.
                self._must_look = True
                raise
            self._must_look |= moved  # after a failover other slots have moved, too
            return answer
        raise ClusterError("the nodes of the Cluster disagree about who serves a key")

    async def node_of(self, key: str) -> Redis:
        """Return the client of the node that serves a key."""
        return self._node(await self._owner(key_slot(key.encode())))

    async def primaries(self) -> list[Redis]:
        """Return the clients of all nodes that serve slots.

        Raises:
            ClusterError: Some slots are served by no node.
        """
        self._must_look = True
        await self._look()
        if None in self._owners:
            raise ClusterError(
                f"{self._owners.count(None)} of its {SLOTS} slots are served by no node"
            )
        return [self._node(address) for address in sorted(set(filter(None, self._owners)))]

    def known_nodes(self) -> list[Redis]:
        """Return the clients of the nodes that serve slots, as far as we know; else of all."""
        return [
            self._node(address) for address in set(filter(None, self._owners)) or self._ask_next
        ]

    async def aclose(self) -> None:
        """Close all connections."""
        for node in self._nodes.values():
            await node.aclose()

    async def _owner(self, slot: int) -> Address:
        # Who comes while somebody looks goes on with what was known.
        if self._must_look and not (self._owners and self._looking.locked()):
            await self._look()
        owner = self._owners[slot]
        if owner is None:
            self._must_look = True
            raise ClusterDownError("the slot is served by no node")
        return owner

    async def _execute(self, address: Address, *args: Any, **options: Any) -> Any:
        node = self._node(address)
        return await node.execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def _node(self, address: Address) -> Redis:
        if address not in self._nodes:
            self._nodes[address] = self._make_client(*address)
        return self._nodes[address]

    async def _look(self) -> None:
        """Ask one node after another who serves what; each time another one first."""
        async with self._looking:
            if not self._must_look:
                return
            failure: RedisError = RedisConnectionError("no node answers")
            for address in tuple(self._ask_next):
                self._ask_next.append(self._ask_next.pop(0))
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        answer = await self._execute(address, "CLUSTER", "SLOTS")
                except TimeoutError:
                    failure = RedisTimeoutError(f"{address[0]}:{address[1]} is silent")
                except RedisError as error:
                    failure = error
                else:
                    await self._learn(address, answer)
                    return
            if not self._owners:
                raise failure

    async def _learn(self, asked: Address, answer: Sequence[Any]) -> None:
        owners: list[Address | None] = [None] * SLOTS
        known = dict.fromkeys(self.seeds)
        for first, last, *nodes in answer:
            addresses = [*_addresses(asked, nodes)]
            known.update(dict.fromkeys(addresses))
            owners[first : last + 1] = [addresses[0]] * (last + 1 - first)
        self._owners, self._must_look = owners, False
        self._ask_next = [one for one in self._ask_next if one in known]
        self._ask_next += [one for one in known if one not in self._ask_next]
        for address in [one for one in self._nodes if one not in known]:
            with contextlib.suppress(RedisError, OSError):
                await self._nodes.pop(address).aclose()


def _addresses(asked: Address, nodes: Sequence[Any]) -> Iterator[Address]:
    for host, port, *_ in nodes:
        # A node that does not know its own address leaves it out.
        yield (host.decode() if host not in (None, b"", b"?") else asked[0]), port


StoreClient = Redis | Cluster
"""A client of a store, whichever kind it is."""


async def node_of(store: StoreClient, key: str) -> Redis:
    """Return the client of the node of a store that serves a key."""
    return await store.node_of(key) if isinstance(store, Cluster) else store


async def sent(store: StoreClient, key: str, send: Callable[[Redis], Awaitable[T]]) -> T:
    """Send to the node of a store that serves a key."""
    return await (store.sent(key, send) if isinstance(store, Cluster) else send(store))
