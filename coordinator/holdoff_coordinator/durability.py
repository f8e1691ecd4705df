"""How many copies of a change the store must have before the change is acknowledged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisError

from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from redis.asyncio import Redis


@dataclass(frozen=True, slots=True)
class Durability:
    """What the operator asks for; by default nothing beyond the server's own answer."""

    replicas: int = 0
    """So many replicas must have the change."""

    fsync: bool = False
    """They and the primary must have it in their append-only files, on the disk."""

    seconds: float = 0.5
    """How long to wait for that."""

    def __bool__(self) -> bool:
        """Tell whether there is anything to wait for."""
        return self.fsync or self.replicas > 0

    def command(self) -> tuple[str | int, ...]:
        """Return the command that waits for what its connection wrote."""
        limit_ms = max(1, round(self.seconds * 1000))  # 0 would be no limit
        if self.fsync:
            return "WAITAOF", 1, self.replicas, limit_ms
        return "WAIT", self.replicas, limit_ms

    async def run(self, node: Redis, *command: bytes | str | int) -> tuple[Any, bool]:
        """Run a command on a server; return its answer, and whether there are enough copies.

        Both are sent at once and on one connection, since the server waits for what that wrote.
        """
        async with node.pipeline(transaction=False) as pipeline:
            for one in (command, self.command()):
                pipeline.execute_command(*one)
            answer, copies = await pipeline.execute(raise_on_error=False)
        if isinstance(answer, Exception):
            raise answer
        return answer, self._is_met(copies)

    def _is_met(self, copies: Any) -> bool:
        if isinstance(copies, RedisError):
            warn("the store cannot wait for copies", type(copies).__name__, detail=str(copies))
            return False
        local, replicas = copies if self.fsync else (0, copies)
        return bool(local >= self.fsync and replicas >= self.replicas)


NO_COPIES: Final = Durability()
