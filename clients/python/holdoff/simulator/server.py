"""The simulated provider as an HTTP server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web

from holdoff.simulator import token_request
from holdoff.simulator.accounting import iso
from holdoff.simulator.answers import MAINTENANCE, MALFORMED, Answer
from holdoff.simulator.api import Request
from holdoff.simulator.faults import AUTH_PATH, TOKEN_PATH, Fault, FaultKind
from holdoff.simulator.limits import DAY_MS, GRACE_MS, SECOND_MS
from holdoff.simulator.oauth import Rotation
from holdoff.simulator.paths import plain
from holdoff.simulator.rules import Provider
from holdoff.simulator.seeds import Seed
from holdoff.simulator.switches import DEFAULTS, Switches

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from aiohttp.typedefs import Handler

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_INJECTED = "injected fault"
_FAULT = web.RequestKey("fault", Fault)
_MOST_ADVANCE_SECONDS = 3_650 * DAY_MS // SECOND_MS
_LAST_ADVANCE_MS = 8000 * 365 * DAY_MS  # before the last year that a date can have


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

    def advance(self, document: object) -> None:
        """Step forward as asked: `{"advance_seconds": 575}`.

        Raises:
            ValueError: the request is wrong; the message names the field and says what it may be.
        """
        seconds: Any = document.get("advance_seconds") if isinstance(document, dict) else None
        if type(seconds) not in (int, float) or not 0 < seconds <= _MOST_ADVANCE_SECONDS:
            most = _MOST_ADVANCE_SECONDS
            raise ValueError(f"advance_seconds: expected a number above 0, at most {most}")
        if self.now_ms() > _LAST_ADVANCE_MS:
            raise ValueError("advance_seconds: the clock is too far ahead")
        self._start_ms += int(seconds * SECOND_MS)


class Server:
    """Turns HTTP requests into questions to a `Provider` and its answers into responses."""

    def __init__(self, provider: Provider, clock: SimulatedClock) -> None:
        self._provider = provider
        self._clock = clock
        self._now_ms = clock.now_ms
        self._stopping = asyncio.Event()

    def application(self) -> web.Application:
        """Make the routes, as Exact Online's paths are, and our own under `/_simulator/`."""
        app = web.Application(middlewares=[self._meet_fault])
        app.add_routes(
            [
                web.get("/_simulator/report", self._report, allow_head=False),
                web.get("/_simulator/seed", self._seed, allow_head=False),
                web.get("/_simulator/faults", self._list_faults, allow_head=False),
                web.post("/_simulator/faults", self._add_fault),
                web.delete("/_simulator/faults", self._clear_faults),
                web.post("/_simulator/clock", self._advance_clock),
                web.route("*", "/{path:(?!_simulator/).*}", self._provider_path),
            ]
        )
        app.on_shutdown.append(self._stop)
        return app

    async def _stop(self, _app: web.Application) -> None:
        self._stopping.set()  # a hang would hold up the end

    @web.middleware
    async def _meet_fault(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let a request meet the fault that was asked for, if there is one."""
        fault = self._provider.fault(
            plain(request.rel_url.raw_path), _agent(request), self._now_ms()
        )
        if fault is None:
            return await handler(request)
        if fault.acted_on:
            request[_FAULT] = fault
            return await handler(request)
        match fault.kind:
            case FaultKind.HANG:
                await self._pass_time(fault.seconds or 0)
            case FaultKind.ERROR:
                return web.Response(
                    status=fault.status or 500, text=_INJECTED, headers=_injected_headers(fault)
                )
            case FaultKind.HTML:
                return await self._send(request, MAINTENANCE, None)
        return _reset(request)

    async def _provider_path(self, request: web.Request) -> web.StreamResponse:
        """Answer at a path of the provider, whose spelling does not count."""
        path = plain(request.rel_url.raw_path).lower()
        for own, method, handler in (
            (TOKEN_PATH, "POST", self._token),
            (AUTH_PATH, "GET", self._authorize),
        ):
            if path == own:
                if request.method != method:
                    raise web.HTTPMethodNotAllowed(request.method, [method])
                return await handler(request)
        return await self._call(request)

    async def _token(self, request: web.Request) -> web.StreamResponse:
        try:
            if request.can_read_body and request.content_type not in _FORMS:
                raise ValueError(request.content_type)  # noqa: TRY301 -- as a form that is wrong
            form = await request.post()
        except Exception:  # noqa: BLE001 - of many kinds, by the content type and its parameters
            return await self._send(request, MALFORMED, request.get(_FAULT))

        fields = [
            (name, value)
            for name, value in (*request.query.items(), *form.items())
            if isinstance(value, str)
        ]
        fault = request.get(_FAULT)
        answer = self._provider.token(
            token_request.read(request.headers.get("Authorization"), fields),
            _agent(request),
            self._now_ms(),
            fault,
        )
        return await self._send_token(request, answer)

    async def _authorize(self, request: web.Request) -> web.StreamResponse:
        answer = self._provider.authorize(request.query, _agent(request), self._now_ms())
        return await self._send_token(request, answer)

    async def _send_token(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        """Send an answer that may have an access token."""
        fault = request.get(_FAULT)
        if fault is not None and fault.kind is FaultKind.HUNG_ANSWER:
            self._provider.sent(answer, self._now_ms())  # the provider knows nothing of the hang
            return await self._send(request, answer, fault)
        try:
            return await self._send(request, answer, fault)
        finally:  # an answer that its client did not wait for counts too
            self._provider.sent(answer, self._now_ms())

    async def _call(self, request: web.Request) -> web.StreamResponse:
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        body: bytes | None
        try:
            body = await request.read()
        except Exception:  # noqa: BLE001 - of many kinds, as too long or wrongly encoded
            body = None
        call = Request(
            path=request.rel_url.raw_path,
            bearer=credentials.strip() if scheme.lower() == "bearer" else "",
            agent=_agent(request),
            query=tuple(request.query.items()),
            method=request.method,
            accept=request.headers.get("Accept", ""),
            content_type=request.headers.get("Content-Type", ""),
            body=body,
            origin=f"{request.scheme}://{request.host}".encode("ascii", "replace").decode(),
        )
        answer = self._provider.call(call, self._now_ms())
        return await self._send(request, answer, request.get(_FAULT), close=body is None)

    async def _send(
        self, request: web.Request, answer: Answer, fault: Fault | None, *, close: bool = False
    ) -> web.StreamResponse:
        """Send an answer to its last byte, or as the fault has it."""
        if fault is not None:
            spoiled = await self._spoil(answer, fault)
            if spoiled is None:
                return _reset(request)
            answer = spoiled
        if isinstance(answer.body, str):
            body, content_type = answer.body, answer.content_type
        else:  # as compact as the provider's
            body, content_type = json.dumps(answer.body, separators=(",", ":")), "application/json"
        data = b"" if request.method == "HEAD" else body.encode(errors="replace")
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        if answer.status != 204:  # noqa: PLR2004 -- HTTP's No Content
            response.headers["Content-Type"] = f"{content_type};charset=utf-8"
            response.content_length = len(data)
        if close or answer is MALFORMED:  # the rest of the body may be as bad
            response.force_close()
        with suppress(ConnectionError):  # its client did not wait for it
            await response.prepare(request)
            if fault is not None and fault.kind is FaultKind.SLOW_BODY:
                for n in range(len(data) - 1):
                    await response.write(data[n : n + 1])
                    await self._pass_time((fault.seconds or 0) / len(data))
                data = data[-1:]
            await response.write_eof(data)
        return response

    async def _spoil(self, answer: Answer, fault: Fault) -> Answer | None:
        """What is sent instead of an answer; None for a reset."""
        match fault.kind:
            case FaultKind.LOST_ANSWER:
                return None
            case FaultKind.HUNG_ANSWER:
                await self._pass_time(fault.seconds or 0)
                return None
            case FaultKind.LATE_ANSWER:
                await self._pass_time(fault.seconds or 0)
            case FaultKind.ERROR_ANSWER:
                return Answer(fault.status or 500, _INJECTED, _injected_headers(fault))
            case FaultKind.HTML_ANSWER:
                return MAINTENANCE
            case FaultKind.PARTIAL_ANSWER:
                return answer.without(fault.without or ())
        return answer

    async def _pass_time(self, seconds: float) -> None:
        """Wait for a simulated time, or until the server stops."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds / self._provider.time_scale):
                await self._stopping.wait()

    async def _report(self, _request: web.Request) -> web.Response:
        return web.json_response(self._provider.report(self._now_ms()))

    async def _seed(self, request: web.Request) -> web.Response:
        base = f"{request.scheme}://{request.host}"
        seeds = [
            {
                "auth_url": f"{base}{AUTH_PATH}",
                "token_url": f"{base}{TOKEN_PATH}",
                "api_url": f"{base}/api/v1",
                "client_id": seed.client_id,
                "client_secret": seed.client_secret,
                "user": seed.user,
                "refresh_token": seed.refresh_token,
                "divisions": seed.divisions,
                "expired_divisions": seed.expired_divisions,
                "scopes": seed.scopes,
            }
            for seed in self._provider.seeds
        ]
        return web.json_response({"seeds": seeds})

    async def _list_faults(self, _request: web.Request) -> web.Response:
        return web.json_response({"pending": self._provider.faults.pending()})

    async def _add_fault(self, request: web.Request) -> web.Response:
        try:
            self._provider.faults.add(Fault.parse(await _document(request)))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return await self._list_faults(request)

    async def _advance_clock(self, request: web.Request) -> web.Response:
        try:
            self._clock.advance(await _document(request))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"time": iso(self._now_ms())})

    async def _clear_faults(self, request: web.Request) -> web.Response:
        self._provider.faults.clear()
        return await self._list_faults(request)


@asynccontextmanager
async def serving(  # noqa: PLR0913 -- each can be left out
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    time_scale: float = 1.0,
    rotation: Rotation = Rotation.UNTIL_USED,
    grace_seconds: float = GRACE_MS / SECOND_MS,
    switches: Switches = DEFAULTS,
    seeds: Iterable[Seed] = (Seed(),),
    tls: Path | None = None,
) -> AsyncIterator[str]:
    """Run a simulated provider and yield its base URL.

    Args:
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        time_scale: simulated seconds in a real one.
        rotation: what happens to a refresh token when it is used.
        grace_seconds: how long a used refresh token remains valid under `Rotation.GRACE`.
        switches: the behaviours where the real one is not known.
        seeds: the grants that exist.
        tls: where to write the certificate of the authority that clients must trust;
            the server then listens on https. It needs `holdoff[simulator]`.

    Raises:
        OSError: the address cannot be listened on, or the file not be written.
        ModuleNotFoundError: `tls` was given, and `cryptography` is not installed.
    """
    context = None
    if tls is not None:
        # Only this needs more than the client does.
        from holdoff._authority import server_context  # noqa: PLC0415

        context = server_context("Holdoff simulator", host, tls)
    clock = SimulatedClock(time_scale)
    provider = Provider(
        seeds,
        start_ms=clock.now_ms(),
        time_scale=time_scale,
        rotation=rotation,
        grace_ms=round(grace_seconds * SECOND_MS),
        switches=switches,
    )
    runner = web.AppRunner(
        Server(provider, clock).application(), access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=context).start()
        bound_port = runner.addresses[0][1]
        scheme = "https" if context else "http"
        yield f"{scheme}://{f'[{host}]' if ':' in host else host}:{bound_port}"
    finally:
        connections = runner.server.connections if runner.server else []
        transports = [one.transport for one in connections if one.transport]
        await runner.cleanup()
        # One with TLS waits for its client to close it too, for longer than the loop may run.
        for transport in transports:
            transport.abort()
        await asyncio.sleep(0)


async def serve_until_signal(
    server: AbstractAsyncContextManager[str], ready: Callable[[str], None]
) -> None:
    """Serve, as `serving` does, until SIGINT or SIGTERM; `ready` is told the base URL.

    Raises:
        OSError: the address cannot be listened on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Not loop.add_signal_handler, which Windows lacks.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    async with server as url:
        ready(url)
        await stop.wait()


def _injected_headers(fault: Fault) -> dict[str, str]:
    """A redirect says where to."""
    is_redirect = 300 <= (fault.status or 500) < 400  # noqa: PLR2004
    return {"Location": "/elsewhere"} if is_redirect else {}


def _reset(request: web.Request) -> web.Response:
    """Reset the connection; aiohttp takes the response that it asks for as not delivered."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        # No lingering: the kernel then closes with RST instead of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


async def _document(request: web.Request) -> object:
    """Read a JSON body.

    Raises:
        ValueError: it is none.
    """
    try:
        return await request.json()
    except Exception as error:  # of many kinds, as too long or nested too deeply
        raise ValueError("the body is not JSON") from error


def _agent(request: web.Request) -> str:
    return request.headers.get("User-Agent", "unknown")
