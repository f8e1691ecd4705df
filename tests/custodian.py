"""A real coordinator that keeps grants in custody, for tests."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from holdoff._core import duration
from holdoff._status import from_rpc_error
from holdoff.v1 import custody_service_pb2, grant_pb2
from holdoff_coordinator.custody.grants import Terms
from holdoff_coordinator.custody.key_files import KeyDirectory, create_key
from tests.harness import Replica, token_to_create

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdoff import errors

REFRESH_TOKEN = "a-refresh-token-that-nobody-may-read"
CLIENT_SECRET = "a-client-secret-that-nobody-may-read"
HOUR = duration(3600)


def key_directory(folder: Path, *key_ids: str) -> Path:
    """Make keys in a directory that only we can change; return it."""
    folder.chmod(0o700)
    for key_id in key_ids:
        create_key(folder, key_id)
    return folder


class Custodian(Replica):
    """A coordinator with master keys."""

    def __init__(self, url: str, folder: Path, **options: Any) -> None:
        self.folder = folder
        terms = {"keys": KeyDirectory(folder).keys, **options.pop("terms", {})}
        super().__init__(url, custody=Terms(**terms), **options)

    def token(self, policy: str = "xero", name: str = "", **fields: Any) -> str:
        """Create a token of a policy."""
        name = name or f"apps/{uuid.uuid4().hex}/tokens/t"
        request = token_to_create(name, None, **fields)
        request.token.policy = policy
        self.tokens.CreateToken(request)
        return name

    def put(self, token: str, **fields: Any) -> grant_pb2.Grant:
        """Put a grant, refreshed an hour ago by default."""
        return self.custody.PutGrant(request_of(token, **fields)).grant

    def grant(self, token: str) -> grant_pb2.Grant:
        """Read a grant."""
        request = custody_service_pb2.GetGrantRequest(name=f"{token}/grant")
        return self.custody.GetGrant(request).grant

    def list(self, parent: str = "", size: int = 0) -> list[list[str]]:
        """List the names of grants, page by page."""
        pages: list[list[str]] = []
        request = custody_service_pb2.ListGrantsRequest(parent=parent, page_size=size)
        while True:
            answer = self.custody.ListGrants(request)
            pages.append([one.name for one in answer.grants])
            if not answer.next_page_token:
                return pages
            request.page_token = answer.next_page_token

    def delete(self, token: str, etag: str = "") -> None:
        """End custody."""
        self.custody.DeleteGrant(
            custody_service_pb2.DeleteGrantRequest(name=f"{token}/grant", etag=etag)
        )


def request_of(token: str, **fields: Any) -> custody_service_pb2.PutGrantRequest:
    """Build a request with all that the policy xero does not say."""
    grant = {"name": f"{token}/grant", "client_id": "our-client", **fields.pop("grant", {})}
    defaults: dict[str, Any] = {
        "grant": grant_pb2.Grant(**grant),
        "refresh_token": f"{REFRESH_TOKEN}-of-{token}",
        "client_secret": CLIENT_SECRET,
        "last_refresh_age": HOUR,
    }
    return custody_service_pb2.PutGrantRequest(**{**defaults, **fields})


def refused(call: Callable[..., Any], *arguments: Any, **fields: Any) -> errors.HoldoffError:
    """Return the error of a call, which never has a secret."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    error = from_rpc_error(caught.value, "test")
    assert "nobody-may-read" not in f"{error} {error.metadata} {caught.value}"
    return error
