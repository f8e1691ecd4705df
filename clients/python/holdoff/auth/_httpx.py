"""The adapters for httpx."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from holdoff.auth import _aio_calls, _calls
from holdoff.auth._rules import UNAUTHORIZED, Target

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    import holdoff
    from holdoff.custody import aio_access_tokens

    Attempt = _calls.Attempt | _aio_calls.Attempt


class HttpxAuth(httpx.Auth):
    """Gives calls of a `httpx.Client` the access token of a token in custody.

    A call to an API host of the grant, over https, waits for room in its budgets and for an access
    token; its answer is counted, and makes all callers back off if the provider blocks. Others pass
    unchanged. After a 401, a GET or HEAD without a body is repeated once with another access token.
    It may be used by several threads.

    Args:
        client: Where the coordinator is.
        access: `client.access_token(...)`, which must be open during calls.
        wait_seconds: How long a call waits before it is made.
        call_seconds: Longer than a call takes: one without an answer counts as failed then.
        job: Name of the job, for listings.

    A call raises:
        BudgetSpent: A scope of it backs off, or a budget is spent, for longer than the wait.
        NoAccessToken: There is no access token within the wait.
        HoldoffError: As `client.reserve` and `access.current` do.
    """

    def __init__(
        self,
        client: holdoff.Client,
        access: holdoff.AccessToken,
        *,
        wait_seconds: float = 60.0,
        call_seconds: float = 60.0,
        job: str = "",
    ) -> None:
        self._calls = _calls.Calls(
            client, access, wait_seconds=wait_seconds, call_seconds=call_seconds, job=job
        )

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """Make a call, and once more if its access token is dead."""
        attempt = self._calls.begin(str(request.url), _target(request))
        if attempt is None:
            yield request
            return
        for is_last in (False, True):
            request.headers["Authorization"] = attempt.header
            response = yield request
            own = _own(attempt, response)
            wanted = own is response and attempt.rules.needs_body(own.status_code, own.headers)
            body = own.read() if wanted else b""
            self._calls.end(attempt, own.status_code, own.headers, body)
            if is_last or not _may_repeat(request, response):
                return
            attempt = self._calls.again(attempt, response.headers)
            if attempt is None:
                return

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Refuse: it would stop the event loop."""
        raise TypeError("a httpx.AsyncClient needs AsyncHttpxAuth, with holdoff.aio.Client")
        yield request


class AsyncHttpxAuth(httpx.Auth):
    """Gives calls of a `httpx.AsyncClient` the access token of a token in custody.

    As `HttpxAuth`, with the client of `holdoff.aio`, in its event loop.
    """

    def __init__(
        self,
        client: holdoff.aio.Client,
        access: aio_access_tokens.AccessToken,
        *,
        wait_seconds: float = 60.0,
        call_seconds: float = 60.0,
        job: str = "",
    ) -> None:
        self._calls = _aio_calls.Calls(
            client, access, wait_seconds=wait_seconds, call_seconds=call_seconds, job=job
        )

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """Refuse: there is no event loop."""
        raise TypeError("a httpx.Client needs HttpxAuth, with holdoff.Client")
        yield request

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Make a call, and once more if its access token is dead."""
        attempt = await self._calls.begin(str(request.url), _target(request))
        if attempt is None:
            yield request
            return
        for is_last in (False, True):
            request.headers["Authorization"] = attempt.header
            response = yield request
            own = _own(attempt, response)
            wanted = own is response and attempt.rules.needs_body(own.status_code, own.headers)
            body = await own.aread() if wanted else b""
            await self._calls.end(attempt, own.status_code, own.headers, body)
            if is_last or not _may_repeat(request, response):
                return
            attempt = await self._calls.again(attempt, response.headers)
            if attempt is None:
                return


def _target(request: httpx.Request) -> Target:
    """Return where a request goes, as httpx itself reads it."""
    url = request.url
    return Target(url.scheme, url.raw_host.decode("ascii").strip("[]"), url.port)


def _own(attempt: Attempt, response: httpx.Response) -> httpx.Response:
    """Return the last answer of an API host: a call may have been redirected to another host."""
    hosts = attempt.usable.api_hosts
    hops = (response, *reversed(response.history))
    own = (one for one in hops if _target(one.request).may_have_token(hosts))
    return next(own, response)


def _may_repeat(request: httpx.Request, response: httpx.Response) -> bool:
    has_body = "transfer-encoding" in request.headers or (
        request.headers.get("content-length", "0") != "0"
    )
    return (
        response.status_code == UNAUTHORIZED
        and response.request.url == request.url
        and request.method in {"GET", "HEAD"}
        and not has_body
    )
