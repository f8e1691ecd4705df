"""Where an access token may go, and what an answer means. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from holdoff import _calls
from holdoff._answered import block_of, division_of, event_of
from holdoff._recognise import MOST_BODY_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from holdoff.custody.access import Usable
    from holdoff.v1 import budget_pb2, policy_pb2

UNAUTHORIZED: Final = 401
SHORTLY_SECONDS: Final = 2.0
"""How long to wait for another access token if an answer does not prove that this one is dead."""
_PORTS: Final = {"https": 443, "http": 80}
_AUTHORITY = re.compile(r"[A-Za-z0-9._-]++(?::[0-9]{1,5})?+|\[[0-9A-Fa-f:.]++\](?::[0-9]{1,5})?+")
_INVALID_TOKEN = re.compile(r"(?i)\berror\s*+=\s*+\"?invalid_token\b")
_MOST_HEADER_CHARACTERS = 4_000


@dataclass(frozen=True, slots=True)
class Target:
    """The scheme, host and port of a call."""

    scheme: str
    host: str
    """Without brackets."""
    port: int | None
    """None for that of the scheme."""

    @classmethod
    def of(cls, url: str) -> Target | None:
        """Read a URL; None for one that two readers may understand differently."""
        try:
            parts = urlsplit(url)
            if _AUTHORITY.fullmatch(parts.netloc) and parts.hostname and url.isprintable():
                return cls(parts.scheme, parts.hostname, parts.port)
        except ValueError:
            pass
        return None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}"

    def may_have_token(self, api_hosts: Collection[str]) -> bool:
        """Whether an access token may be sent there: over https, or within this host."""
        own_port = _PORTS.get(self.scheme)
        if own_port is None or (self.scheme == "http" and not _is_loopback(self.host)):
            return False
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = self.port or own_port
        names = {f"{host}:{port}".lower(), *([host.lower()] if port == own_port else [])}
        return any(one.lower() in names for one in api_hosts)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy of a token says of its calls."""

    token: str
    policy: policy_pb2.Policy
    job: str

    def header(self, usable: Usable) -> str:
        """Return the value of the header `Authorization`."""
        return f"{self.policy.oauth.authorization_scheme or 'Bearer'} {usable.access_token}"

    def division(self, url: str) -> str:
        """Return the division that a call goes to."""
        return division_of(self.policy, url)

    def needs_body(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether the body says if an answer blocks; a long one does not."""
        length = headers.get("content-length", "0")
        is_short = length.isascii() and length.isdigit() and int(length[:9]) <= MOST_BODY_BYTES
        return is_short and any(
            throttle.body and (not throttle.statuses or status in throttle.statuses)
            for throttle in self.policy.throttles
        )

    def block(
        self,
        url: str,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        sent_age_seconds: float,
    ) -> budget_pb2.Event | None:
        """Describe an answer that blocks or throttles; None for any other."""
        where = _calls.scope(self.token, self.division(url), url)
        return block_of(
            *(self.policy, where, status, headers, body),
            job=self.job,
            sent_age_seconds=sent_age_seconds,
        )

    def event(
        self, url: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> budget_pb2.Event | None:
        """Describe an answer to a call for which no room was taken; None if it is nothing bad."""
        return event_of(self.policy, self.token, url, status, headers, body, self.job)


def patience_seconds(headers: Mapping[str, str], most: float) -> float:
    """Return how long to wait for another access token after a 401.

    RFC 6750, section 3.1: `invalid_token` says that this one is dead. Some providers also answer
    401 for other reasons.
    """
    challenge = headers.get("www-authenticate", "")[:_MOST_HEADER_CHARACTERS]
    return most if _INVALID_TOKEN.search(challenge) else min(most, SHORTLY_SECONDS)
