"""Where a call goes: its division and endpoint, however the path is spelled.

Case, percent-encoding, empty segments and `;` parameters make no other endpoint. A key,
what follows it, and `/$count` belong to the endpoint of the entity, as does `beta/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from holdoff.simulator.resources import ME, RESOURCES, Resource

if TYPE_CHECKING:
    from collections.abc import Mapping

UPLOAD, DOWNLOAD = "docs/XMLUpload.aspx", "docs/XMLDownload.aspx"
_XML = {path.lower(): path for path in (UPLOAD, DOWNLOAD)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call goes."""

    division: str
    """Empty if the call names none."""
    endpoint: str
    """Spelled as the provider does if it exists, else as the client does."""
    resource: Resource | None = None
    """None if it does not exist, or is none of the REST API."""
    key: str | None = None
    """What is in the parentheses after an entity's name."""
    count: bool = False
    """Whether the number of entities is asked for."""
    metadata: bool = False
    """Whether the description of a service such as `crm` is asked for."""


def plain(path: str) -> str:
    """A path that is decoded once, without empty segments and parameters."""
    return "/" + "/".join(_segments(path))


def locate(path: str, query: Mapping[str, str]) -> Place | None:
    """Find where a call goes; None if that is neither the REST nor the XML API.

    Args:
        path: the path of the URL, from its first slash, as it was sent.
        query: the query, of which the XML API takes the division.
    """
    parts = _segments(path)
    lower = [part.lower() for part in parts]
    if (xml := _XML.get("/".join(lower))) is not None:
        named = {name.lower(): value for name, value in query.items()}
        return Place(named.get("_division_") or named.get("division") or "", xml)
    if lower[:2] != ["api", "v1"] or len(parts) == 2:  # noqa: PLR2004 -- these two
        return None
    return _rest(parts[2:])


def _rest(parts: list[str]) -> Place:
    if parts[0].lower() == "beta":
        parts = parts[1:]
    if "/".join(parts[:1]).lower() == "current":
        division, names = "", parts
    else:
        division, names = "".join(parts[:1]), parts[1:]

    key, beyond = None, False
    for n, name in enumerate(names):
        if "(" in name:
            key = name.partition("(")[2].removesuffix(")")
            beyond = not name.endswith(")") or n + 1 < len(names)
            names = [*names[:n], name.partition("(")[0]]
            break
    option = names[-1].lower() if names else ""
    if option in ("$count", "$metadata"):
        names = names[:-1]
    endpoint = "/".join(names)
    resource = RESOURCES.get(endpoint.lower())
    if resource is not None:
        endpoint = resource.path
        if beyond or (resource is ME) != (not division):
            resource = None
    return Place(division, endpoint, resource, key, option == "$count", option == "$metadata")


def _segments(path: str) -> list[str]:
    parts = (part.partition(";")[0] for part in unquote(path).split("/"))
    return [part for part in parts if part]
