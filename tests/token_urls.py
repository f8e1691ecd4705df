"""Servers for tests that send requests to token URLs, and what sends them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from holdoff_coordinator.custody.outcomes import NotSent, boottime_us
from holdoff_coordinator.custody.sending import Connected, Limits, Reach, Request, Sending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import trustme

    from holdoff_coordinator.custody.outcomes import Outcome
    from holdoff_coordinator.custody.spool import Spooling

SECOND = 1_000_000
PATIENT = Limits(connect_us=60 * SECOND, right_us=120 * SECOND, answer_us=60 * SECOND)
"""For a busy machine."""
LOOPBACK = Reach(plain_http=True)
DONE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class TokenUrl:
    """A server that answers as a test wants."""

    url: str
    connections: int = 0
    received: bytearray = field(default_factory=bytearray)

    def request(self, **changes: object) -> Request:
        """Return a refresh for it."""
        return a_request(self.url, **changes)


def a_request(url: str, **changes: object) -> Request:
    """Return a refresh."""
    request = Request(
        url,
        "client-1",
        bytearray(b"s3cret&word"),
        {"refresh_token": bytearray(b"old refresh+token")},
        {"grant_type": "refresh_token"},
    )
    return replace(request, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def token_url(
    answer: bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    authority: trustme.CA | None = None,
    name: str = "localhost",
) -> AsyncIterator[TokenUrl]:
    """Serve one conversation: bytes that follow the request and an end, or a function's."""
    conversations: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.add(asyncio.current_task())
        served.connections += 1
        _record(reader, served.received)
        with contextlib.suppress(
            ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            if isinstance(answer, bytes):
                await read_request(reader)
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    context = None
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    scheme = "http" if authority is None else "https"
    served = TokenUrl(f"{scheme}://127.0.0.1:{port}/token")
    try:
        yield served
    finally:
        server.close()
        left = [conversation for conversation in conversations if conversation]
        for conversation in left:
            conversation.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _record(reader: asyncio.StreamReader, received: bytearray) -> None:
    """Note what comes, whether it is read or not."""
    feed: Any = reader.feed_data

    def record(data: bytes) -> None:
        received.extend(data)
        feed(data)

    reader.feed_data = record  # type: ignore[assignment,method-assign]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read one whole request."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
    return head + await reader.readexactly(int(size))


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def until(true: Callable[[], bool]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 -- of other processes
            await asyncio.sleep(0.01)


async def send(
    request: Request,
    *,
    reach: Reach = LOOPBACK,
    limits: Limits = PATIENT,
    spooling: Spooling | None = None,
) -> Outcome:
    """Send a request as soon as its connection stands; what comes of it shows no secret."""
    outcome = await _send(request, reach, limits, spooling)
    shown = repr(outcome) + repr(request)
    assert not any(
        secret in shown for secret in ("s3cret", "old refresh", "old+refresh", "rotated")
    )
    return outcome


async def _send(
    request: Request, reach: Reach, limits: Limits, spooling: Spooling | None
) -> Outcome:
    async with Sending(request, reach=reach, limits=limits, spooling=spooling) as sending:
        connected = await sending.connect()
        if isinstance(connected, NotSent):
            return connected
        assert isinstance(connected, Connected)
        return await sending.send(boottime_us() + 60 * SECOND)
