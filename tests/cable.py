"""A connection to a server that a test can cut, slow down, or hold one direction of."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Cable:
    """Forwards a port of 127.0.0.1 to a server at `host:port` or at a Unix socket's path.

    Use it as a context manager.

    Args:
        server: Where it leads to.
        keeps: Whether `received` is kept.
    """

    def __init__(self, server: str, *, keeps: bool = True) -> None:
        self.server = server
        """Where new connections lead to."""
        self.connections = 0
        """How many were made."""
        self.received = b""
        """What clients sent."""
        self.on_request: Callable[[bytes], None] = lambda _: None
        """Called with what a client sent, before it is passed on."""
        self.flows = threading.Event()
        """While it is clear, answers are held."""
        self.flows.set()
        self.requests_flow = threading.Event()
        """While it is clear, what clients send is held."""
        self.requests_flow.set()
        self.delay_seconds = 0.0
        """How much later everything arrives, in each direction."""
        self._keeps = keeps
        self._is_cut = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.flows.set()
        self.requests_flow.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join(5)

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        with self._lock:
            self._is_cut = True
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._is_cut = False

    def break_all(self) -> None:
        """End all connections; new ones are let through."""
        self.cut()
        self.mend()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                self.connections += 1
                try:
                    outer = self._connect()
                except OSError:
                    inner.close()
                    continue
                with self._lock:
                    self._sockets |= {inner, outer}
                    is_cut = self._is_cut
                if is_cut:
                    inner.close()
                    outer.close()
                for source, sink, requests in ((inner, outer, True), (outer, inner, False)):
                    threading.Thread(
                        target=self._forward, args=(source, sink, requests), daemon=True
                    ).start()

    def _connect(self) -> socket.socket:
        if not self.server.startswith("/"):
            host, _, port = self.server.rpartition(":")
            return socket.create_connection((host, int(port)))
        outer = socket.socket(socket.AF_UNIX)
        outer.connect(self.server)
        return outer

    def _forward(self, source: socket.socket, sink: socket.socket, requests: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                if requests:
                    if self._keeps:
                        self.received += data
                    self.on_request(data)
                    self.requests_flow.wait()
                else:
                    self.flows.wait()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()
