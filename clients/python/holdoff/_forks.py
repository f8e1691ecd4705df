"""Tells a process from the children that it forks.

A forked child has copies of its parent's leases, connections and files, but none of the threads
that keep them. It may end or change none of them: the parent still owns them.
"""

from __future__ import annotations

import os

from holdoff.errors import HoldoffError

_generation = 0


def _count() -> None:
    global _generation  # noqa: PLW0603 - one for the process
    _generation += 1


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_count)


class Owner:
    """The process that made something."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._generation = _generation

    @property
    def is_here(self) -> bool:
        """Whether this is that process, and no child that it forked."""
        return self._generation == _generation

    def check(self) -> None:
        """Raise HoldoffError in a forked child, in which gRPC does not work."""
        if not self.is_here:
            raise HoldoffError(
                f"this client belongs to process {self.pid}, of which this one is a fork: "
                "make a client here"
            )
