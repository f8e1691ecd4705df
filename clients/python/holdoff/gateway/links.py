"""Rewrites the links to the next page, so that clients follow them through the gateway. Pure.

In OData these are `__next` and `@odata.nextLink` in JSON, and `<link rel="next">` in Atom; of the
headers `Location` and `Link`. Nothing else in a body is changed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

_WINDOW_BYTES: Final = 1_024
"""Longer than what is looked for, so that it is found across two parts."""
_TYPES: Final = ("json", "xml")
_IN_BODY = re.compile(
    rb"(?i)"
    rb'("(?:__next|@odata\.nextLink)"\s{0,16}:\s{0,16}"'
    rb'|<link\b(?=[^<>]{0,300}\brel="next")[^<>]{0,300}?\bhref=")'
    rb'(https?:(?://|\\/\\/)[^"\\/?#<>\s]{1,260})(?=[/?#"\\])'
)
"""What stands before a link, and its scheme and authority; JSON may escape its slashes."""
_IN_HEADER = re.compile(r"(?i)https?://[^/?#<>\s\"]{1,260}")


class LinkRewriter:
    """Rewrites one body, part by part, or the headers of an answer.

    Args:
        upstream: Scheme and authority of the API.
        base: What replaces it: the URL of the gateway.
    """

    def __init__(self, upstream: str, base: str) -> None:
        parts = urlsplit(upstream)
        self._origins = {upstream.lower()}
        if parts.port is None:
            self._origins.add(f"{upstream.lower()}:{443 if parts.scheme == 'https' else 80}")
        self._base = base
        self._left = b""

    def header(self, value: str) -> str:
        """Rewrite the header `Location` or `Link`."""
        return _IN_HEADER.sub(
            lambda match: self._base if self._is_upstream(match[0]) else match[0], value
        )

    def part(self, data: bytes) -> bytes:
        """Take in a part of a body, and return what can be sent of it."""
        done = _IN_BODY.sub(self._rewritten, self._left + data)
        # What is kept may be the beginning of a link. One that was rewritten is no link any more.
        kept = min(_WINDOW_BYTES, len(done))
        self._left = done[len(done) - kept :]
        return done[: len(done) - kept]

    def end(self) -> bytes:
        """Return the rest."""
        rest, self._left = self._left, b""
        return rest

    def _rewritten(self, match: re.Match[bytes]) -> bytes:
        origin = match[2].decode("latin-1").replace("\\/", "/")
        return match[1] + self._base.encode() if self._is_upstream(origin) else match[0]

    def _is_upstream(self, origin: str) -> bool:
        return origin.lower() in self._origins


def has_links(headers: Mapping[str, str]) -> bool:
    """Tell whether a body may have links that can be read."""
    kind = headers.get("Content-Type", "").partition(";")[0].lower()
    is_plain = headers.get("Content-Encoding", "identity").lower() == "identity"
    return is_plain and any(one in kind for one in _TYPES)
