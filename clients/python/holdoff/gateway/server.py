"""The gateway as an HTTP server: it forwards calls one by one, in constant memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import web
from yarl import URL

from holdoff._log import log
from holdoff.auth import _aio_calls
from holdoff.auth._rules import UNAUTHORIZED, Target
from holdoff.errors import HoldoffError
from holdoff.gateway import answers, headers
from holdoff.gateway.answers import Local, Reason
from holdoff.gateway.links import LinkRewriter, has_links
from holdoff.gateway.routing import Call, Refusal, TokenRequest, route
from holdoff.gateway.standins import StandIns

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from types import TracebackType

    import holdoff
    from holdoff.auth._aio_calls import Attempt
    from holdoff.custody.aio_access_tokens import AccessToken
    from holdoff.gateway.routing import Places

MOST_HELD: Final = 256
_MOST_FORM_BYTES: Final = 64 * 1024
_MOST_LOOK_BYTES: Final = 64 * 1024
"""Of an answer, to see whether it blocks."""
_CONNECT_SECONDS: Final = 10.0
_SILENT_SECONDS: Final = 300.0
"""How long an upstream may send nothing."""
_CALL_SECONDS: Final = 600.0
"""Longer than most calls take: one without an answer counts as failed then."""
_NO_ANSWER: Final = 599
_REPEATED: Final = frozenset({"GET", "HEAD"})
_SILENT: Final = logging.getLogger("holdoff.gateway.http")
_SILENT.setLevel(logging.CRITICAL)
"""What cannot be parsed may have secrets: it is answered, and not logged."""
_SKIPPED: Final = frozenset({"User-Agent", "Accept", "Accept-Encoding", "Content-Type"})
"""Headers that aiohttp would add."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a gateway treats calls."""

    hold_seconds: float = 20.0
    """How long a call waits for room and for an access token, before its body is read."""
    job: str = ""
    """Name of the job, for listings."""
    rewrites_links: bool = True
    """Whether links to the next page lead through the gateway. Answers come uncompressed then."""


class Gateway:
    """Forwards the calls of jobs with the access token of one token.

    Args:
        client: Where the coordinator is.
        access: `client.access_token(...)`, which must be open.
        places: What it serves.
        options: How it treats calls.
    """

    def __init__(
        self,
        client: holdoff.aio.Client,
        access: AccessToken,
        places: Places,
        options: Options = Options(),
    ) -> None:
        self._places = places
        self._rewrites_links = options.rewrites_links
        self.base = ""
        """What jobs use in place of the upstream; empty where links stay as they are."""
        self._stand_ins = StandIns(access.token, places.upstream)
        self._calls = _aio_calls.Calls(
            client,
            access,
            wait_seconds=options.hold_seconds,
            call_seconds=_CALL_SECONDS,
            job=options.job,
        )
        self._held = self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._session: aiohttp.ClientSession
        self._runner = web.ServerRunner(
            web.Server(
                self._answer,
                handler_cancellation=True,  # a call whose client has gone is not sent
                access_log=None,
                logger=_SILENT,
                auto_decompress=False,
            ),
            handle_signals=False,
        )

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS
            ),
            trust_env=False,
        )
        await self._runner.setup()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        connections = self._runner.server.connections if self._runner.server else []
        transports = [one.transport for one in connections if one.transport]
        await self._runner.cleanup()
        # One with TLS waits for its client to close it too, for longer than the loop may run.
        for transport in transports:
            transport.abort()
        await self._session.close()
        await asyncio.sleep(0)

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> str:
        """Open a port, 0 for any, with or without TLS; return `host:port`.

        Raises:
            OSError: It cannot be opened.
        """
        await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        chosen = self._runner.addresses[-1][1]
        return f"[{host}]:{chosen}" if ":" in host else f"{host}:{chosen}"

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket that only its owner can use.

        Raises:
            OSError: It cannot be opened.
        """
        before = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, path).start()
        finally:
            os.umask(before)

    async def drain(self, seconds: float) -> None:
        """Answer new calls with 503, and wait until those in flight have ended."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._is_draining:
            return _response(answers.refused(Reason.DRAINING))
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._routed(request)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _routed(self, request: web.BaseRequest) -> web.StreamResponse:
        match route(request.method, request.raw_path, request.headers, self._places):
            case Refusal(reason):
                return _response(answers.refused(reason))
            case TokenRequest():
                return await self._token(request)
            case Call(target):
                return await self._call(request, target)

    async def _token(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read(_MOST_FORM_BYTES)
        form = dict(parse_qsl(body.decode("ascii", "replace"), max_num_fields=100))
        return _response(answers.token_answer({**request.query, **form}, self._stand_ins))

    async def _call(self, request: web.BaseRequest, target: str) -> web.StreamResponse:
        bearer = request.headers.get("Authorization", "").partition(" ")[2].strip()
        if bearer and not self._stand_ins.is_ours(bearer):
            return _response(answers.refused(Reason.FOREIGN_TOKEN))
        if self._held >= MOST_HELD:
            return _response(answers.refused(Reason.TOO_MANY_HELD))
        url = self._places.upstream + target
        self._held += 1
        try:
            attempt = await self._calls.begin(url, Target.of(url))
        except HoldoffError as error:
            return _response(answers.not_now(error))
        finally:
            self._held -= 1
        if attempt is None:
            return _response(answers.upstream_failed("this host may not have the access token"))
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await self._forward(request, attempt)

    async def _forward(self, request: web.BaseRequest, attempt: Attempt) -> web.StreamResponse:
        """Make a call, and once more if its access token is dead."""
        may_repeat = request.method in _REPEATED and not request.body_exists
        while True:
            ended = False
            try:
                async with self._session.request(
                    request.method,
                    URL(attempt.url, encoded=True),
                    headers=headers.to_upstream(
                        request.headers, attempt.header, is_read=self._reads_bodies
                    ),
                    data=request.content.iter_any() if request.body_exists else None,
                    allow_redirects=False,
                    skip_auto_headers=_SKIPPED,
                ) as upstream:
                    head = await _head(upstream, attempt)
                    ended = True
                    await self._calls.end(attempt, upstream.status, upstream.headers, head)
                    if upstream.status == UNAUTHORIZED and may_repeat:
                        may_repeat = False
                        again = await self._calls.again(attempt, upstream.headers)
                        if again is not None:
                            attempt = again
                            continue
                    return await self._passed_on(request, upstream, head)
            except (aiohttp.ClientError, TimeoutError) as error:
                if ended:  # half an answer is there already
                    if request.transport is not None:
                        request.transport.abort()
                    raise
                log.info("%s did not answer: %s", self._places.upstream, type(error).__name__)
                return _response(answers.upstream_failed(_short(error)))
            finally:
                if not ended:
                    await asyncio.shield(self._calls.end(attempt, _NO_ANSWER, {}, b""))

    @property
    def _reads_bodies(self) -> bool:
        return self._rewrites_links and self.base != ""

    async def _passed_on(
        self, request: web.BaseRequest, upstream: aiohttp.ClientResponse, head: bytes
    ) -> web.StreamResponse:
        """Send an answer to the job as it comes."""
        passed = headers.to_job(upstream.headers)
        rewriter: LinkRewriter | None = None
        if self._reads_bodies:
            links = LinkRewriter(self._places.upstream, self.base)
            for name in ("Location", "Link"):
                if name in passed:
                    passed[name] = links.header(passed[name])
            if has_links(passed) and request.method != "HEAD":
                rewriter = links
                passed.popall("Content-Length", None)
        response = web.StreamResponse(
            status=upstream.status, reason=upstream.reason, headers=passed
        )
        await response.prepare(request)
        async for part in _parts(upstream, head):
            await response.write(rewriter.part(part) if rewriter else part)
        if rewriter:
            await response.write(rewriter.end())
        await response.write_eof()
        return response


async def _head(upstream: aiohttp.ClientResponse, attempt: Attempt) -> bytes:
    """Read the beginning of an answer, if it may say that the provider blocks."""
    head = b""
    if attempt.rules.needs_body(upstream.status, upstream.headers):
        while len(head) < _MOST_LOOK_BYTES:
            part = await upstream.content.readany()
            if not part:
                break
            head += part
    return head


async def _parts(upstream: aiohttp.ClientResponse, head: bytes) -> AsyncIterator[bytes]:
    if head:
        yield head
    async for part in upstream.content.iter_any():
        yield part


def _response(local: Local) -> web.Response:
    response = web.Response(status=local.status, text=local.body, content_type=None)
    with contextlib.suppress(KeyError):
        del response.headers["Content-Type"]
    response.headers.update(local.headers)
    return response


def _short(error: BaseException) -> str:
    """Say what went wrong, without a path or a query."""
    return {
        "ClientConnectorError": "no connection",
        "ServerDisconnectedError": "it closed the connection",
        "ClientConnectorCertificateError": "its certificate is not trusted",
    }.get(type(error).__name__, type(error).__name__)
