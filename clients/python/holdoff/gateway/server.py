"""The gateway as an HTTP server: it forwards calls one by one, in constant memory."""

from __future__ import annotations

import asyncio
import contextlib
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
from holdoff.gateway.routing import Call, Refusal, TokenRequest, route
from holdoff.gateway.standins import StandIns

if TYPE_CHECKING:
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
_SKIPPED: Final = frozenset({"User-Agent", "Accept", "Accept-Encoding", "Content-Type"})
"""Headers that aiohttp would add."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a gateway treats calls."""

    hold_seconds: float = 20.0
    """How long a call waits for room and for an access token, before its body is read."""
    job: str = ""
    """Name of the job, for listings."""


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
        self._stand_ins = StandIns(access.token, places.upstream)
        self._calls = _aio_calls.Calls(
            client,
            access,
            wait_seconds=options.hold_seconds,
            call_seconds=_CALL_SECONDS,
            job=options.job,
        )
        self._held = 0
        self._is_draining = False
        self._session: aiohttp.ClientSession
        self._runner = web.ServerRunner(
            web.Server(
                self._answer,
                handler_cancellation=True,  # a call whose client has gone is not sent
                access_log=None,
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
        await self._runner.cleanup()
        await self._session.close()

    async def listen(self, host: str, port: int) -> int:
        """Open a port; return it.

        Raises:
            OSError: It cannot be opened.
        """
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return int(self._runner.addresses[-1][1])

    async def listen_unix(self, path: str) -> None:
        """Open a Unix socket that only its owner can use.

        Raises:
            OSError: It cannot be opened.
        """
        import os  # noqa: PLC0415

        before = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, path).start()
        finally:
            os.umask(before)

    def drain(self) -> None:
        """Answer new calls with 503; those in flight end."""
        self._is_draining = True

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._is_draining:
            return _response(answers.refused(Reason.DRAINING))
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
                    headers=headers.to_upstream(request.headers, attempt.header),
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
                    return await _passed_on(request, upstream, head)
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


async def _passed_on(
    request: web.BaseRequest, upstream: aiohttp.ClientResponse, head: bytes
) -> web.StreamResponse:
    """Send an answer to the job as it comes."""
    response = web.StreamResponse(
        status=upstream.status, reason=upstream.reason, headers=headers.to_job(upstream.headers)
    )
    await response.prepare(request)
    async for part in _parts(upstream, head):
        await response.write(part)
    await response.write_eof()
    return response


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
