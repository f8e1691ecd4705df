"""The calls of custody: what to ask, and how to read the answer. No sockets (sans-I/O)."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Literal

from holdoff._calls import Call, Page
from holdoff._core import duration
from holdoff.errors import InvalidRequest
from holdoff.v1 import custody_service_pb2, grant_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

_CUSTODY = "/holdoff.v1.CustodyService"

_CHECK_SECONDS = 30.0
"""Longer than a check takes."""

_EXCHANGE_SECONDS = 120.0
"""Longer than an exchange takes."""

ClientAuthentication = Literal["basic", "body", "query"]
"""Where a client id and secret go in a request: RFC 6749, section 2.3.1, or the URL."""


def put_grant(  # noqa: PLR0913 - the fields of a grant
    token: str,
    *,
    client_id: str,
    refresh_token: str,
    client_secret: str,
    token_url: str,
    api_hosts: Sequence[str],
    client_authentication: ClientAuthentication | None,
    last_refresh_age_seconds: float | None,
    etag: str,
    replace: bool,
) -> Call[Any, grant_pb2.Grant]:
    """Take a grant into custody.

    Raises:
        ValueError: `client_authentication` is none of its words, or both conditions were given.
    """
    age = None if last_refresh_age_seconds is None else duration(last_refresh_age_seconds)
    request = custody_service_pb2.PutGrantRequest(
        grant=_grant(token, client_id, token_url, api_hosts, client_authentication),
        refresh_token=refresh_token,
        client_secret=client_secret,
        last_refresh_age=age,
        request_id=str(uuid.uuid4()),
        **_condition(etag, replace),
    )
    return Call(
        f"{_CUSTODY}/PutGrant",
        request,
        custody_service_pb2.PutGrantResponse,
        lambda response: response.grant,
    )


def begin_authorization(  # noqa: PLR0913 - the fields of a grant
    token: str,
    *,
    redirect_uri: str,
    client_id: str,
    client_secret: str,
    token_url: str,
    api_hosts: Sequence[str],
    client_authentication: ClientAuthentication | None,
    scopes: Sequence[str],
    etag: str,
    replace: bool,
) -> Call[Any, custody_service_pb2.BeginAuthorizationResponse]:
    """Take the right to have a person authorize the app.

    Raises:
        ValueError: `client_authentication` is none of its words, or both conditions were given.
    """
    return Call(
        f"{_CUSTODY}/BeginAuthorization",
        custody_service_pb2.BeginAuthorizationRequest(
            grant=_grant(token, client_id, token_url, api_hosts, client_authentication),
            client_secret=client_secret,
            redirect_uri=redirect_uri,
            scopes=scopes,
            **_condition(etag, replace),
        ),
        custody_service_pb2.BeginAuthorizationResponse,
        lambda response: response,
    )


def complete_authorization(
    token: str, state: str, code: str, error: str
) -> Call[Any, grant_pb2.Grant | None]:
    """Complete or end an authorization.

    Raises:
        ValueError: Not exactly one of `code` and `error` was given.
    """
    if bool(code) == bool(error):
        raise ValueError("give either code or error")
    return Call(
        f"{_CUSTODY}/CompleteAuthorization",
        custody_service_pb2.CompleteAuthorizationRequest(
            name=_name(token), state=state, **({"code": code} if code else {"error": error})
        ),
        custody_service_pb2.CompleteAuthorizationResponse,
        lambda response: response.grant if response.HasField("grant") else None,
        timeout_seconds=_EXCHANGE_SECONDS,
    )


def require_private(is_private: bool) -> None:
    """Refuse to send a secret that others on a network could read.

    Raises:
        InvalidRequest: It would be sent over a network without TLS.
    """
    if not is_private:
        raise InvalidRequest(
            "secrets are sent over a network by TLS only: set HOLDOFF_CA_FILE to the authorities "
            "of the coordinator's certificate"
        )


def get_grant(token: str) -> Call[Any, grant_pb2.Grant]:
    """Read one grant."""
    return Call(
        f"{_CUSTODY}/GetGrant",
        custody_service_pb2.GetGrantRequest(name=_name(token)),
        custody_service_pb2.GetGrantResponse,
        lambda response: response.grant,
    )


def list_grants(parent: str, page_token: str = "") -> Call[Any, Page[grant_pb2.Grant]]:
    """Read a page of grants."""

    def read(response: custody_service_pb2.ListGrantsResponse) -> Page[grant_pb2.Grant]:
        token = response.next_page_token
        return Page(response.grants, list_grants(parent, token) if token else None)

    return Call(
        f"{_CUSTODY}/ListGrants",
        custody_service_pb2.ListGrantsRequest(parent=parent, page_token=page_token),
        custody_service_pb2.ListGrantsResponse,
        read,
    )


def check_grant(token: str) -> Call[Any, custody_service_pb2.CheckGrantResponse]:
    """Check one grant."""
    return Call(
        f"{_CUSTODY}/CheckGrant",
        custody_service_pb2.CheckGrantRequest(name=_name(token)),
        custody_service_pb2.CheckGrantResponse,
        lambda response: response,
        timeout_seconds=_CHECK_SECONDS,
    )


def watch_grant(token: str) -> custody_service_pb2.WatchGrantRequest:
    """Ask for a grant and its changes."""
    return custody_service_pb2.WatchGrantRequest(name=_name(token))


def delete_grant(token: str, etag: str) -> Call[Any, None]:
    """End custody of a token."""
    return Call(
        f"{_CUSTODY}/DeleteGrant",
        custody_service_pb2.DeleteGrantRequest(name=_name(token), etag=etag),
        custody_service_pb2.DeleteGrantResponse,
        lambda _: None,
    )


def trust_grant(token: str, etag: str) -> Call[Any, grant_pb2.Grant]:
    """Say that a grant has the newest refresh token."""
    return Call(
        f"{_CUSTODY}/TrustGrant",
        custody_service_pb2.TrustGrantRequest(name=_name(token), etag=etag),
        custody_service_pb2.TrustGrantResponse,
        lambda response: response.grant,
    )


def rotate_keys(
    key_id: str, validate_only: bool, page_token: str = ""
) -> Call[Any, Page[custody_service_pb2.RotateKeysResponse]]:
    """Encrypt a page of grants with another key; the answer is an item of its own."""

    def read(
        response: custody_service_pb2.RotateKeysResponse,
    ) -> Page[custody_service_pb2.RotateKeysResponse]:
        token = response.next_page_token
        return Page([response], rotate_keys(key_id, validate_only, token) if token else None)

    return Call(
        f"{_CUSTODY}/RotateKeys",
        custody_service_pb2.RotateKeysRequest(
            key_id=key_id, validate_only=validate_only, page_token=page_token
        ),
        custody_service_pb2.RotateKeysResponse,
        read,
    )


def _grant(
    token: str,
    client_id: str,
    token_url: str,
    api_hosts: Sequence[str],
    client_authentication: ClientAuthentication | None,
) -> grant_pb2.Grant:
    word = (client_authentication or "unspecified").upper()
    return grant_pb2.Grant(
        name=_name(token),
        client_id=client_id,
        token_url=token_url,
        api_hosts=api_hosts,
        client_authentication=grant_pb2.ClientAuthentication.Value(f"CLIENT_AUTHENTICATION_{word}"),
    )


def _condition(etag: str, replace: bool) -> dict[str, Any]:
    if etag and replace:
        raise ValueError("give etag or replace, not both")
    return {"etag": etag} if etag else {"replace": True} if replace else {}


def _name(token: str) -> str:
    """Return the name of a token's grant; what is no name is refused by the coordinator."""
    return f"{token}/grant"
