"""Grants in custody, for the asyncio client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff._core import Listening
from holdoff.custody import calls

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from holdoff._aio_connection import Connection
    from holdoff.errors import Unavailable
    from holdoff.v1 import custody_service_pb2, grant_pb2


class Grants:
    """The OAuth grants that the coordinator keeps in custody, encrypted.

    No answer has a secret. Tokens are named `apps/{app}/tokens/{token}`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def put(  # noqa: PLR0913 - the fields of a grant
        self,
        token: str,
        *,
        client_id: str,
        refresh_token: str,
        client_secret: str = "",
        token_url: str = "",
        api_hosts: Sequence[str] = (),
        client_authentication: calls.ClientAuthentication | None = None,
        last_refresh_age_seconds: float | None = None,
        etag: str = "",
        replace: bool = False,
    ) -> grant_pb2.Grant:
        """Take the grant of a token into custody, or replace it.

        Args:
            token: The token, which exists.
            client_id: The OAuth client id.
            refresh_token: The OAuth refresh token.
            client_secret: The OAuth client secret; empty for a public client.
            token_url: Where access tokens are requested: one of the policy's token URLs; empty
                for the only one.
            api_hosts: Hosts that an access token may be sent to, from the policy; empty for the
                only one.
            client_authentication: "basic", "body" or "query"; None for the policy's first one.
            last_refresh_age_seconds: How long ago the last access token was issued; None if that
                is not known, so that a full cooldown begins.
            etag: Replace the grant that has this etag, and no other.
            replace: Replace whatever there is.

        Raises:
            GrantExists: There is a grant, and neither `etag` nor `replace` was given.
            GrantChanged: The grant has another etag.
            GrantDuplicate: Another token has this refresh token in custody.
            TokenBusy: A lease on the token lives, or it cools down, or this refresh token is being
                put under another name; `retry_after_seconds` says for how long.
            Quarantined: The app is in quarantine.
            CustodyOff: The coordinator takes nothing into custody.
            CustodyKeyMissing: The coordinator does not have the key that encrypts.
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong, the policy allows several values, or the secrets
                would be sent over a network without TLS.
            ValueError: `client_authentication` is none of these, or both `etag` and `replace` were
                given.
        """
        calls.require_private(self._connection._is_private)  # noqa: SLF001
        call = calls.put_grant(
            token,
            client_id=client_id,
            refresh_token=refresh_token,
            client_secret=client_secret,
            token_url=token_url,
            api_hosts=api_hosts,
            client_authentication=client_authentication,
            last_refresh_age_seconds=last_refresh_age_seconds,
            etag=etag,
            replace=replace,
        )
        return await self._connection._call(call)  # noqa: SLF001

    async def begin_authorization(  # noqa: PLR0913 - the fields of a grant
        self,
        token: str,
        *,
        redirect_uri: str,
        client_id: str = "",
        client_secret: str = "",
        token_url: str = "",
        api_hosts: Sequence[str] = (),
        client_authentication: calls.ClientAuthentication | None = None,
        scopes: Sequence[str] = (),
        etag: str = "",
        replace: bool = False,
    ) -> custody_service_pb2.BeginAuthorizationResponse:
        """Take the right to have a person authorize the app; return the URL for the browser.

        Until `complete_authorization`, or for ten minutes, the token is not refreshed. A later call
        replaces an authorization that was not completed. What is left empty is that of the grant in
        custody, or else the policy's.

        Args:
            token: The token, which exists.
            redirect_uri: Where the provider sends the browser, as registered for the app.
            client_id: The OAuth client id.
            client_secret: The OAuth client secret.
            token_url: Where access tokens are requested: one of the policy's token URLs.
            api_hosts: Hosts that an access token may be sent to, from the policy.
            client_authentication: "basic", "body" or "query".
            scopes: What the app asks for; empty for the policy's.
            etag: Replace the grant that has this etag, and no other.
            replace: Replace whatever there is.

        Raises:
            GrantExists: There is a grant, and neither `etag` nor `replace` was given.
            GrantChanged: The grant has another etag.
            TokenBusy: The token cools down, a lease on it lives, or an access token is being
                requested; `retry_after_seconds` says for how long.
            Quarantined: The app is in quarantine.
            CustodyOff: The coordinator takes nothing into custody, or requests no access tokens.
            CustodyKeyMissing: The coordinator does not have the key that encrypts.
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong, the policy has no authorization URL, or the secret
                would be sent over a network without TLS.
            ValueError: `client_authentication` is none of these, or both `etag` and `replace` were
                given.
        """
        calls.require_private(self._connection._is_private)  # noqa: SLF001
        call = calls.begin_authorization(
            token,
            redirect_uri=redirect_uri,
            client_id=client_id,
            client_secret=client_secret,
            token_url=token_url,
            api_hosts=api_hosts,
            client_authentication=client_authentication,
            scopes=scopes,
            etag=etag,
            replace=replace,
        )
        return await self._connection._call(call)  # noqa: SLF001

    async def complete_authorization(
        self, token: str, state: str, *, code: str = "", error: str = ""
    ) -> grant_pb2.Grant | None:
        """Exchange the code that the provider gave for a grant; or end the authorization.

        It can be repeated after `Unavailable` or `TokenBusy`.

        Args:
            token: The token.
            state: The parameter `state` that came back from the provider.
            code: The parameter `code`.
            error: The parameter `error`, or another word to give the authorization up.

        Returns:
            The grant in custody; None if there is none, which can be only with `error`.

        Raises:
            AuthorizationNotFound: It took too long, or ended.
            AuthorizationFailed: The provider refused the code, or did not answer as it should. The
                old grant is as it was.
            GrantDuplicate: Another token has this refresh token in custody.
            TokenBusy: The code cannot be sent now, and was not.
            InvalidRequest: The state is another one, or the code would be sent over a network
                without TLS.
            ValueError: Not exactly one of `code` and `error` was given.
        """
        calls.require_private(self._connection._is_private)  # noqa: SLF001
        call = calls.complete_authorization(token, state, code, error)
        return await self._connection._call(call)  # noqa: SLF001

    async def get(self, token: str) -> grant_pb2.Grant:
        """Return the grant of a token.

        Raises:
            GrantNotFound: None is in custody.
        """
        return await self._connection._call(calls.get_grant(token))  # noqa: SLF001

    async def check(self, token: str) -> custody_service_pb2.CheckGrantResponse:
        """Check what a refresh of a grant needs, without refreshing it.

        The coordinator that answers connects to the hosts of the grant, but sends no request.

        Raises:
            GrantNotFound: None is in custody.
        """
        return await self._connection._call(calls.check_grant(token))  # noqa: SLF001

    def list(self, parent: str = "") -> AsyncIterator[grant_pb2.Grant]:
        """Yield all grants, or those of an app."""
        return self._connection._items(calls.list_grants(parent))  # noqa: SLF001

    def watch(
        self, token: str, *, on_unreachable: Callable[[Unavailable], None] | None = None
    ) -> AsyncGenerator[custody_service_pb2.WatchGrantResponse, None]:
        """Yield the grant of a token as it is, then after each change, forever.

        It reconnects by itself. That does not count as a use of the token. Close the iterator, with
        `contextlib.aclosing`, or cancel its task, to end the watch.

        Args:
            token: The token.
            on_unreachable: Called whenever the coordinator cannot be reached; the watch continues.

        Raises:
            GrantNotFound: None is in custody, or not any more.
        """
        request = calls.watch_grant(token)
        return self._connection._listen(  # noqa: SLF001
            Listening(),
            lambda line: line.custody.WatchGrant(
                request,
                metadata=self._connection._metadata(),  # noqa: SLF001
            ),
            on_unreachable,
        )

    async def delete(self, token: str, *, etag: str = "") -> None:
        """End custody of a token; its secrets are deleted, and its cooldown continues.

        Args:
            token: The token.
            etag: Only the grant that has this etag; empty for any.

        Raises:
            GrantNotFound: None is in custody.
            GrantChanged: The grant has another etag.
            TokenBusy: An access token is being requested.
        """
        await self._connection._call(calls.delete_grant(token, etag))  # noqa: SLF001

    async def trust(self, token: str, *, etag: str = "") -> grant_pb2.Grant:
        """Say that the refresh token in custody is the newest one, so that it is used again.

        After a restore of the store a grant is not used, because it may be older than the last
        refresh. A provider may revoke the whole grant if an old refresh token is sent.

        Args:
            token: The token.
            etag: Only the grant that has this etag; empty for any.

        Raises:
            GrantNotFound: None is in custody.
            GrantChanged: The grant has another etag.
        """
        return await self._connection._call(calls.trust_grant(token, etag))  # noqa: SLF001

    def rotate_keys(
        self, key_id: str = "", *, validate_only: bool = False
    ) -> AsyncIterator[custody_service_pb2.RotateKeysResponse]:
        """Encrypt all grants with another master key, which also encrypts from then on.

        Yields what was done, page by page. It can be repeated at any time, also after an error.

        Args:
            key_id: The key, which every live replica must have; empty for the one with the highest
                id.
            validate_only: Change nothing, and only tell which keys are used.

        Raises:
            CustodyKeyMissing: A live replica does not have the key.
            CustodyOff: The coordinator takes nothing into custody.
        """
        return self._connection._items(  # noqa: SLF001
            calls.rotate_keys(key_id, validate_only)
        )
