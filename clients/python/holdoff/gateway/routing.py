"""Where a request goes: upstream, to the token endpoint, or nowhere. Pure."""

from __future__ import annotations

import hmac
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from holdoff.gateway.answers import Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_REFUSED_METHODS: Final = frozenset({"CONNECT", "TRACE", "TRACK"})
_MOST_PATH_CHARACTERS: Final = 8_000


@dataclass(frozen=True, slots=True)
class Places:
    """What a gateway serves."""

    upstream: str
    """Scheme and authority of the API host: `https://start.exactonline.nl`."""
    token_path: str
    """Path of the provider's token URL."""
    oauth_paths: Collection[str] = ()
    """Other paths of the provider's OAuth server."""
    secret: str = field(default="", repr=False)
    """First segment of each path; empty on a Unix socket that only its owner can open."""
    hosts: Collection[str] = ()
    """What the header Host may be, in lower case; empty on a Unix socket."""


@dataclass(frozen=True, slots=True)
class Call:
    """Goes upstream."""

    target: str
    """Path and query, exactly as they came."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Is answered like a request to the provider's token URL."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Goes nowhere."""

    reason: Reason


Route = Call | TokenRequest | Refusal


def route(method: str, target: str, headers: Mapping[str, str], places: Places) -> Route:
    """Decide where a request goes.

    Args:
        method: Its method.
        target: Its target, exactly as it came.
        headers: Its headers, by name without case.
        places: What this gateway serves.
    """
    if method.upper() in _REFUSED_METHODS:
        return Refusal(Reason.METHOD)
    if not target.startswith("/"):  # absolute-form, `*`, or an authority
        return Refusal(Reason.TARGET)
    if places.hosts and headers.get("Host", "").lower() not in places.hosts:
        return Refusal(Reason.HOST)  # a name that was made to lead here (DNS rebinding)
    if "Origin" in headers:
        return Refusal(Reason.ORIGIN)  # a web page
    if places.secret:
        secret, slash, rest = target[1:].partition("/")
        is_right = hmac.compare_digest(secret.encode(), places.secret.encode())
        if not is_right or not slash:
            return Refusal(Reason.SECRET)
        target = f"/{rest}"
    if "Upgrade" in headers and headers["Upgrade"].lower() != "h2c":
        return Refusal(Reason.UPGRADE)
    path = _plain(target)
    if path is None:
        return Refusal(Reason.TARGET)
    if path == _plain(places.token_path):
        return TokenRequest() if method == "POST" else Refusal(Reason.OAUTH)
    if path in {_plain(one) for one in places.oauth_paths}:
        return Refusal(Reason.OAUTH)
    return Call(target)


def upstream_of(url: str) -> str:
    """Return scheme and authority of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _plain(target: str) -> str | None:
    """Return a path as a server may understand it, for comparison; None for one too long."""
    path = target.partition("?")[0]
    if len(path) > _MOST_PATH_CHARACTERS:
        return None
    return posixpath.normpath(unquote(path)).lower().rstrip("/") or "/"
