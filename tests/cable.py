"""A connection to a server that a test can cut, or hold the answers of."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Cable:
    """Forwards a port of 127.0.0.1 to a server at `host:port` or at a Unix socket's path.

    Use it as a context manager.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self.connections = 0
        """How many were made."""
        self.received = b""
        """What clients sent."""
        self.on_request: Callable[[bytes], None] = lambda _: None
        """Called with what a client sent, before it is passed on."""
        self.flows = threading.Event()
        """While it is clear, answers are held."""
        self.flows.set()
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
        if not self._server.startswith("/"):
            host, _, port = self._server.rpartition(":")
            return socket.create_connection((host, int(port)))
        outer = socket.socket(socket.AF_UNIX)
        outer.connect(self._server)
        return outer

    def _forward(self, source: socket.socket, sink: socket.socket, requests: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if requests:
                    self.received += data
                    self.on_request(data)
                else:
                    self.flows.wait()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()
