"""A gateway with all it needs: a client of the coordinator, the token's grant, a port or socket."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import queue
import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

from holdoff import aio
from holdoff.errors import HoldoffError, InvalidRequest
from holdoff.gateway.routing import Places
from holdoff.gateway.server import Gateway, Options

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from holdoff.v1 import grant_pb2

_SECRET_BYTES: Final = 24
DRAIN_SECONDS: Final = 30.0
"""How long calls in flight have at the end."""


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a gateway listens: a port, or a Unix socket that only its owner can open."""

    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if not self.path and not _is_loopback(self.host):
            raise ValueError("a gateway listens on this host only: 127.0.0.1, ::1 or localhost")


@dataclass(frozen=True, slots=True)
class Serving:
    """A gateway that serves."""

    gateway: Gateway
    base: str
    """Where jobs send their calls: scheme, host and port; the socket's path for a Unix socket."""
    secret: str = field(repr=False)
    """First segment of each path; empty for a Unix socket."""
    upstream: str

    @property
    def url(self) -> str:
        """What jobs use in place of `upstream`. It contains the secret."""
        return f"{self.base}/{self.secret}" if self.secret else self.base


@contextlib.asynccontextmanager
async def serving(  # noqa: PLR0913 - what can be chosen
    endpoint: str | None,
    token: str,
    listen: Listen | None = None,
    options: Options | None = None,
    *,
    upstream: str = "",
    secret: str = "",
) -> AsyncIterator[Serving]:
    """Run a gateway while the context is open; leaving it lets calls in flight end.

    Args:
        endpoint: Of the coordinator; None as for `holdoff.Client`.
        token: The token in custody.
        listen: Where; None for any port of this host.
        options: How it treats calls.
        upstream: An API host of the grant, where it has several.
        secret: First segment of each path; empty for a random one.

    Raises:
        HoldoffError: The coordinator refuses, does not answer, or has no grant of the token.
        InvalidRequest: `upstream` is no API host of the grant, or must be given.
        OSError: The port or the socket cannot be opened.
    """
    listen, options = listen or Listen(), options or Options()
    async with aio.Client(endpoint) as client:
        grant = await client.grants.get(token)
        chosen = _upstream(grant, upstream)
        own = "" if listen.path else secret or secrets.token_urlsafe(_SECRET_BYTES)
        places = Places(
            upstream=chosen,
            token_path=urlsplit(grant.token_url).path,
            oauth_paths=await _oauth_paths(client, token),
            secret=own,
        )
        async with (
            client.access_token(token) as access,
            Gateway(client, access, places, options) as gateway,
        ):
            if listen.path:
                await gateway.listen_unix(listen.path)
                base = listen.path
            else:
                scheme = "https" if listen.tls else "http"
                address = await gateway.listen(listen.host, listen.port, listen.tls)
                base = f"{scheme}://{address}"
                gateway.base = f"{base}/{own}"
            try:
                yield Serving(gateway, base, own, chosen)
            finally:
                await gateway.drain(DRAIN_SECONDS)


class GatewayThread:
    """A gateway in a thread, for a program without an event loop.

    Use it as a context manager; inside it `url` is where the gateway serves.

    Args:
        endpoint: Of the coordinator.
        token: The token in custody.
        options: How it treats calls.
        listen: Where; None for any port of this host.
        upstream: An API host of the grant, where it has several.

    Entering it raises what `serving` does.
    """

    def __init__(
        self,
        endpoint: str | None,
        token: str,
        options: Options | None = None,
        listen: Listen | None = None,
        upstream: str = "",
    ) -> None:
        self._serving = serving(endpoint, token, listen, options, upstream=upstream)
        self._ready: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="holdoff-gateway", daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._thread.join()
            raise ready
        self.url = ready
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._serving as one:
                self._ready.put(one.url)
                await self._stop.wait()
        except (HoldoffError, OSError) as error:
            self._ready.put(error)


async def _oauth_paths(client: aio.Client, token: str) -> tuple[str, ...]:
    """Return the paths at which a person authorizes an app."""
    policy = await client.get_policy((await client.get_token(token)).policy)
    return tuple(urlsplit(url).path for url in policy.oauth.authorization_urls)


def _upstream(grant: grant_pb2.Grant, wanted: str) -> str:
    """Return scheme and authority of the API host.

    Raises:
        InvalidRequest: It is none of the grant's, or there are several.
    """
    hosts = list(grant.api_hosts)
    host = wanted.removeprefix("https://").removeprefix("http://").rstrip("/")
    if not host and len(hosts) == 1:
        host = hosts[0]
    if host not in hosts:
        raise InvalidRequest(
            f"give one of the API hosts of the grant with --upstream: {', '.join(hosts)}"
        )
    is_plain = grant.token_url.startswith("http:") and _is_loopback(urlsplit(f"//{host}").hostname)
    return f"{'http' if is_plain else 'https'}://{host}"
