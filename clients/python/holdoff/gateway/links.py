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


class LinkRewriter:
    """Rewrites one body, part by part, or the headers of an answer.

    Args:
        upstream: Scheme and authority of the API.
        base: What stands for it: the URL of the gateway.
    """

    def __init__(self, upstream: str, base: str) -> None:
        parts = urlsplit(upstream)
        default = {"https": 443, "http": 80}[parts.scheme]
        port = rf"(?::{default})?" if parts.port is None else ""
        host = re.escape(parts.netloc)
        plain, escaped = f"{parts.scheme}://", f"{parts.scheme}:\\/\\/"
        either = f"(?:{re.escape(plain)}|{re.escape(escaped)}){host}{port}"
        self._origin = re.compile(rf"{either}(?=[/?#]|$)", re.IGNORECASE)
        self._in_body = re.compile(
            (
                r'("(?:__next|@odata\.nextLink)"\s{0,16}:\s{0,16}"|'
                r'<link\b(?=[^<>]{0,300}\brel="next")[^<>]{0,300}?\bhref=")'
                rf'{either}(?=[/?#"\\])'
            ).encode(),
            re.IGNORECASE,
        )
        self._base = base
        self._left = b""

    def header(self, value: str) -> str:
        """Rewrite the header `Location` or `Link`."""
        return self._origin.sub(lambda _: self._base, value)

    def part(self, data: bytes) -> bytes:
        """Take in a part of a body, and return what can be sent of it."""
        text = self._left + data
        done = self._in_body.sub(self._rewritten, text)
        # What is kept may be the beginning of a link. One that was rewritten is no link any more.
        kept = min(_WINDOW_BYTES, len(done))
        self._left = done[len(done) - kept :]
        return done[: len(done) - kept]

    def end(self) -> bytes:
        """Return the rest."""
        rest, self._left = self._left, b""
        return rest

    def _rewritten(self, match: re.Match[bytes]) -> bytes:
        return match[1] + self._base.encode()


def has_links(headers: Mapping[str, str]) -> bool:
    """Tell whether a body may have links that can be read."""
    kind = headers.get("Content-Type", "").partition(";")[0].lower()
    is_plain = headers.get("Content-Encoding", "identity").lower() == "identity"
    return is_plain and any(one in kind for one in _TYPES)
