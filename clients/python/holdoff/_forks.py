"""Tells a process from the children that it forks.

A forked child has copies of its parent's leases, connections and files, but none of the threads
that keep them. It may end or change none of them: the parent still owns them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref

from holdoff.errors import HoldoffError

_SWITCH = "GRPC_ENABLE_FORK_SUPPORT"
_START_OTHERWISE = (
    "its parent used gRPC with asyncio before the fork; start processes with `subprocess`, or with "
    "the start method `spawn`"
)

_generation = 0
_never_finalized: weakref.WeakSet[object] = weakref.WeakSet()
_grpc_restarts = True
_grpc_was_used = False
_grpc_is_dead = False


def _count() -> None:
    global _generation, _grpc_is_dead  # noqa: PLW0603 - one for the process
    _generation += 1
    _grpc_is_dead = _grpc_was_used and not _grpc_restarts
    for thing in _never_finalized:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_count)


def leave_to_parent(thing: object) -> None:
    """Keep forked children from finalizing a channel or stream of gRPC.

    The finalizer takes a lock. If a thread of the parent held it during the fork, the child would
    wait for ever when it ends.
    """
    _never_finalized.add(thing)


def import_grpc_for_asyncio() -> None:
    """Import gRPC so that it starts no threads in forked children.

    It restarts its threads there by default, and those of gRPC for asyncio crash many children.
    gRPC reads the switch only at its import: an earlier import, or a value that the user has set,
    takes precedence.
    """
    global _grpc_restarts  # noqa: PLW0603 - one for the process
    if "grpc" in sys.modules or _SWITCH in os.environ:
        return
    os.environ[_SWITCH] = "0"
    try:
        import grpc  # noqa: F401, PLC0415 - it is the purpose
    finally:
        del os.environ[_SWITCH]
    _grpc_restarts = False


def use_grpc() -> None:
    """Note that this process opens a channel.

    Raises:
        HoldoffError: gRPC does not work in this forked child.
    """
    global _grpc_was_used  # noqa: PLW0603 - one for the process
    if _grpc_is_dead:
        raise HoldoffError(f"gRPC does not work in this process: {_START_OTHERWISE}")
    _grpc_was_used = True


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
        """Raise HoldoffError in a forked child, which cannot use the parent's channels."""
        if not self.is_here:
            raise HoldoffError(
                f"this client belongs to process {self.pid}, of which this one is a fork: "
                f"{_START_OTHERWISE if _grpc_is_dead else 'make a client here'}"
            )
