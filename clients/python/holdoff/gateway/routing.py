"""Where a request goes: upstream, to the token endpoint, or nowhere. Pure."""

from __future__ import annotations

import contextlib
import hmac
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from holdoff.gateway.answers import Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_REFUSED_METHODS: Final = frozenset({"CONNECT", "TRACE", "TRACK"})
_MOST_TARGET_CHARACTERS: Final = 8_000
_MOST_HOST_CHARACTERS: Final = 300
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


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
    reason = _trouble(method, target, headers, places)
    if reason:
        return Refusal(reason)
    target = target[len(places.secret) + 1 :] if places.secret else target
    path = _plain(target)
    if path == _plain(places.token_path):
        return TokenRequest() if method == "POST" else Refusal(Reason.OAUTH)
    if path in {_plain(one) for one in places.oauth_paths}:
        return Refusal(Reason.OAUTH)
    return Call(target)


def _trouble(method: str, target: str, headers: Mapping[str, str], places: Places) -> Reason | None:
    """Tell why a request goes nowhere, whatever its path is."""
    found: Mapping[Reason, bool] = {
        Reason.METHOD: method.upper() in _REFUSED_METHODS,
        # absolute-form, `*`, or an authority
        Reason.TARGET: not target.startswith("/") or len(target) > _MOST_TARGET_CHARACTERS,
        # a name that was made to lead here (DNS rebinding)
        Reason.HOST: places.secret != "" and not _is_this_host(headers.get("Host", "")),
        # a web page
        Reason.ORIGIN: "Origin" in headers,
        Reason.SECRET: not _has_secret(target, places.secret),
        Reason.UPGRADE: headers.get("Upgrade", "h2c").lower() != "h2c",
    }
    return next((reason for reason, is_so in found.items() if is_so), None)


def _has_secret(target: str, secret: str) -> bool:
    """Tell whether a target begins with the secret, in constant time."""
    if not secret:
        return True
    first, slash, _ = target[1:].partition("/")
    return slash != "" and hmac.compare_digest(first.encode("utf-8", "replace"), secret.encode())


def _is_this_host(host: str) -> bool:
    """Tell whether a header Host names this machine."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host[:_MOST_HOST_CHARACTERS]}").hostname in _LOOPBACK
    return False


def _plain(target: str) -> str:
    """Return a path as a server may understand it, for comparison."""
    path = target.partition("?")[0]
    return posixpath.normpath(unquote(path)).lower().rstrip("/") or "/"
