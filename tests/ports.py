"""Ports for servers of tests."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Return a port that nothing uses, below those that the system gives to connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
