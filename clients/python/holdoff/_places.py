"""Where a call goes: its division, and its endpoint in one normal form.

What a server may read as the same call is one endpoint, so that another spelling gets no budget of
its own. If it is not known how a server reads a path, the reading is taken that counts more calls
as one endpoint. Sources: `domain.md`, paths; RFC 3986, sections 5.2.4 and 6.2.2; OData 4.01, URL
conventions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote_to_bytes

from holdoff._patterns import try_compile

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_PATH_CHARACTERS = 2_000
"""Of a path or URL of which the endpoint is wanted; longer ones are cut."""
MOST_ENDPOINT_CHARACTERS = 200
"""Of an endpoint, also without case; longer ones are cut."""
_MOST_DIVISION_CHARACTERS = 100

_HOST = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*+://[^/\\]*+")
_ENCODED_DOT = re.compile(r"%2[Ee]")
_KEY = re.compile(r"\(|%28")
_CUT_ESCAPE = re.compile(r"%[0-9A-Fa-f]?\Z")


def find_place(pattern: str, url: str, division_query: Iterable[str] = ()) -> tuple[str, str]:
    """Find a call's (division, endpoint), the latter in its normal form, as it was spelled.

    Args:
        pattern: Searched for in the path, whatever the host; the path begins with one slash. With
            none, or one of another release that does not compile, the endpoint is the whole path.
        url: A URL or a path.
        division_query: The names, without case, of query parameters that contain the division.
            They are read if the pattern does not match.
    """
    url = url[:MOST_PATH_CHARACTERS].partition("#")[0]
    path, _, query = url.partition("?")
    path = _normal_path(path)
    compiled = try_compile(pattern) if pattern else None
    if compiled and (found := compiled.search(f"/{path}")) is not None:
        division, endpoint = found.get("division", ""), found.get("endpoint", "")
    else:
        division, endpoint = _division_in(query, division_query), path
    return division[:_MOST_DIVISION_CHARACTERS], _of_entity(endpoint)


def normal_endpoint(text: str) -> str:
    """Give an endpoint its normal form; its case stays, and does not count."""
    return find_place("", text)[1]


def without_host(url: str) -> str:
    """Return a URL from its path on: the host may be the provider's or a gateway's."""
    return _HOST.sub("", url)


def folded(endpoint: str) -> str:
    """Return what endpoints are compared by: the same for all spellings of one."""
    return endpoint.casefold()


def _normal_path(path: str) -> str:
    """Return a path without host, keys, path parameters, dots and empty segments, decoded once.

    Dots are followed before a key is cut, as clients and servers do, and once more after decoding:
    a server may decode first. What follows an entity's key belongs to the entity.
    """
    path = _ENCODED_DOT.sub(".", without_host(path))
    path = _KEY.split("/".join(_segments(path)), maxsplit=1)[0]
    return "/".join(_segments(re.split(r"[?#]", _decoded(path), maxsplit=1)[0]))


def _segments(path: str) -> list[str]:
    found: list[str] = []
    for segment in re.split(r"[/\\]", path):
        name = segment.partition(";")[0].strip(" ")
        if name == "..":
            del found[-1:]
        elif name := name.rstrip(". "):  # which some servers ignore
            found.append(name)
    return found


def _decoded(text: str) -> str:
    """Decode percent-encoding, once; `%`, and what is invalid or not printable, stays encoded."""
    if "%" not in text and text.isprintable():
        return text
    decoded = unquote_to_bytes(text.encode(errors="surrogatepass")).decode(errors="surrogateescape")
    return "".join(one if one.isprintable() and one != "%" else _encoded(one) for one in decoded)


def _encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))


def _division_in(query: str, names: Iterable[str]) -> str:
    given = {name.casefold(): value for name, value in reversed(parse_qsl(query))}
    found = (given.get(name.casefold(), "") for name in names)
    division = next(filter(None, found), "").strip(" ")
    return division if division.isprintable() else ""


def _of_entity(endpoint: str) -> str:
    """Cut off what belongs to an entity, such as `/$count`, and what is too long."""
    endpoint = endpoint.strip("/ ").partition("/$")[0][:MOST_ENDPOINT_CHARACTERS]
    while len(folded(endpoint)) > MOST_ENDPOINT_CHARACTERS:
        endpoint = endpoint[:-1]
    return _CUT_ESCAPE.sub("", endpoint).rstrip("/. ")
