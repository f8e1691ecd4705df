"""The simulated provider as an HTTP server."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web

from holdoff.simulator.rules import Answer, Provider, Rotation, TokenForm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class SimulatedClock:
    """Simulated time: it starts as the wall clock's and runs `time_scale` times as fast."""

    def __init__(self, time_scale: float) -> None:
        self._time_scale = time_scale
        self._start_ms = time.time_ns() // 1_000_000
        self._start_ns = time.monotonic_ns()

    def now_ms(self) -> int:
        """Simulated milliseconds since the epoch."""
        real_ns = time.monotonic_ns() - self._start_ns
        return self._start_ms + int(real_ns * self._time_scale / 1_000_000)


class Server:
    """Turns HTTP requests into questions to a `Provider` and its answers into responses."""

    def __init__(self, provider: Provider, now_ms: Callable[[], int]) -> None:
        self._provider = provider
        self._now_ms = now_ms

    def application(self) -> web.Application:
        """Make the routes, as Exact Online's paths are, and our own under `/_simulator/`."""
        app = web.Application()
        app.add_routes(
            [
                web.post("/api/oauth2/token", self._token),
                web.get("/api/v1/{path:.+}", self._call, allow_head=False),
                web.get("/_simulator/report", self._report, allow_head=False),
                web.get("/_simulator/seed", self._seed, allow_head=False),
            ]
        )
        return app

    async def _token(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()

        def text(name: str) -> str:
            value = form.get(name, "")
            return value if isinstance(value, str) else ""

        fields = TokenForm(
            grant_type=text("grant_type"),
            client_id=text("client_id"),
            client_secret=text("client_secret"),
            refresh_token=text("refresh_token"),
        )
        answer = self._provider.token(fields, _agent(request), self._now_ms())
        response = _response(answer)
        try:
            await response.prepare(request)
            await response.write_eof()
        finally:  # an answer that its client did not wait for counts too
            self._provider.sent(answer, self._now_ms())
        return response

    async def _call(self, request: web.Request) -> web.Response:
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        bearer = credentials.strip() if scheme.lower() == "bearer" else ""
        answer = self._provider.call(
            request.match_info["path"],
            request.query.get("$filter"),
            bearer,
            _agent(request),
            self._now_ms(),
        )
        return _response(answer)

    async def _report(self, _request: web.Request) -> web.Response:
        return web.json_response(self._provider.report(self._now_ms()))

    async def _seed(self, request: web.Request) -> web.Response:
        base = f"{request.scheme}://{request.host}"
        seeds = [
            {
                "token_url": f"{base}/api/oauth2/token",
                "api_url": f"{base}/api/v1",
                "client_id": seed.client_id,
                "client_secret": seed.client_secret,
                "user": seed.user,
                "refresh_token": seed.refresh_token,
                "divisions": seed.divisions,
            }
            for seed in self._provider.seeds
        ]
        return web.json_response({"seeds": seeds})


@asynccontextmanager
async def serving(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    time_scale: float = 1.0,
    rotation: Rotation = Rotation.REUSE,
) -> AsyncIterator[str]:
    """Run a simulated provider with the default seed and yield its base URL.

    Args:
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        time_scale: simulated seconds in a real one.
        rotation: what becomes of a used refresh token.

    Raises:
        OSError: the address cannot be listened on.
    """
    clock = SimulatedClock(time_scale)
    provider = Provider(start_ms=clock.now_ms(), time_scale=time_scale, rotation=rotation)
    runner = web.AppRunner(
        Server(provider, clock.now_ms).application(), access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound_port = runner.addresses[0][1]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound_port}"
    finally:
        await runner.cleanup()


async def serve_until_signal(
    host: str,
    port: int,
    *,
    time_scale: float,
    rotation: Rotation,
    ready: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the base URL.

    Raises:
        OSError: the address cannot be listened on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Not loop.add_signal_handler, which Windows lacks.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    async with serving(host, port, time_scale=time_scale, rotation=rotation) as url:
        ready(url)
        await stop.wait()


def _agent(request: web.Request) -> str:
    return request.headers.get("User-Agent", "unknown")


def _response(answer: Answer) -> web.Response:
    body = json.dumps(answer.body, separators=(",", ":"))  # as compact as the provider's
    return web.json_response(text=body, status=answer.status, headers=answer.headers)
