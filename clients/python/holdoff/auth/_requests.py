"""The adapter for requests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from requests.auth import AuthBase
from requests.cookies import extract_cookies_to_jar

from holdoff.auth._calls import Calls
from holdoff.auth._rules import UNAUTHORIZED, Target

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

    from holdoff import AccessToken, Client
    from holdoff.auth._calls import Attempt


class RequestsAuth(AuthBase):
    """Gives calls of requests the access token of a token in custody.

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
        client: Client,
        access: AccessToken,
        *,
        wait_seconds: float = 60.0,
        call_seconds: float = 60.0,
        job: str = "",
    ) -> None:
        self._calls = Calls(
            client, access, wait_seconds=wait_seconds, call_seconds=call_seconds, job=job
        )

    def __call__(self, r: PreparedRequest) -> PreparedRequest:
        """Wait until the request may be sent; give it the access token."""
        url = r.url or ""
        attempt = self._calls.begin(url, Target.of(url))
        if attempt:
            r.headers["Authorization"] = attempt.header
            r.register_hook("response", partial(self._answered, attempt))
        return r

    def _answered(
        self, attempt: Attempt, response: Response, *_: object, **options: Any
    ) -> Response:
        """Handle the answer to a call, or to a redirect of it."""
        _keep_from_others(attempt, response, response.request)
        if attempt.is_over:
            if _may_have_token(attempt, response.url):
                status, headers = response.status_code, response.headers
                self._calls.report(attempt, response.url, status, headers, _body(attempt, response))
            return response
        self._end(attempt, response)
        if response.status_code != UNAUTHORIZED or not _is_repeatable(response.request):
            return response
        again = self._calls.again(attempt, response.headers)
        return self._repeated(again, response, options) if again else response

    def _end(self, attempt: Attempt, response: Response) -> None:
        status, headers = response.status_code, response.headers
        self._calls.end(attempt, status, headers, _body(attempt, response))

    def _repeated(self, again: Attempt, response: Response, options: Any) -> Response:
        """Send a request once more, as requests' own adapter for Digest does."""
        _ = response.content  # so that the connection can be used again
        response.close()
        request = response.request.copy()
        jar: Any = request._cookies  # noqa: SLF001 - see above
        extract_cookies_to_jar(jar, response.request, response.raw)
        request.prepare_cookies(jar)
        # A redirect is made from the first of the two.
        for one in (response.request, request):
            one.headers["Authorization"] = again.header
        repeated: Response = response.connection.send(request, **options)
        repeated.history.append(response)
        repeated.request = request
        self._end(again, repeated)
        _keep_from_others(again, repeated, response.request, request)
        return repeated


def _may_have_token(attempt: Attempt, url: str) -> bool:
    target = Target.of(url)
    return target is not None and target.may_have_token(attempt.usable.api_hosts)


def _keep_from_others(attempt: Attempt, response: Response, *requests: PreparedRequest) -> None:
    """Take the access token out of what is copied for a redirect to another host."""
    if not response.is_redirect:
        return
    if not _may_have_token(attempt, urljoin(response.url, response.headers["location"])):
        for request in requests:
            request.headers.pop("Authorization", None)


def _body(attempt: Attempt, response: Response) -> bytes:
    """Return the body of an answer if it says whether it blocks."""
    wanted = attempt.rules.needs_body(response.status_code, response.headers)
    return (response.content or b"") if wanted else b""


def _is_repeatable(request: PreparedRequest) -> bool:
    return request.method in {"GET", "HEAD"} and not request.body
