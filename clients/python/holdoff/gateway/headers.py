"""Which headers pass a proxy (RFC 9110, section 7.6.1). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from multidict import CIMultiDict

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

_HOP_BY_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_OF_THE_GATEWAY: Final = frozenset({"host", "authorization", "expect"})
_MOST_LISTED: Final = 50


def to_upstream(
    headers: CIMultiDictProxy[str], authorization: str, *, is_read: bool = False
) -> CIMultiDict[str]:
    """Return the headers of a call, with the access token in place of the job's own.

    Args:
        headers: As they came.
        authorization: The header with the access token.
        is_read: The gateway reads the answer, which must not be compressed then.
    """
    passed = _passed(headers, _OF_THE_GATEWAY)
    passed["Authorization"] = authorization
    if is_read:
        passed["Accept-Encoding"] = "identity"
    return passed


def to_job(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the headers of an answer."""
    return _passed(headers, frozenset())


def _passed(headers: CIMultiDictProxy[str], without: frozenset[str]) -> CIMultiDict[str]:
    listed = ",".join(headers.getall("Connection", ())).split(",")[:_MOST_LISTED]
    dropped = _HOP_BY_HOP | without | {one.strip().lower() for one in listed}
    # What says how long a body is belongs to the message itself.
    dropped -= {"content-length"}
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )
