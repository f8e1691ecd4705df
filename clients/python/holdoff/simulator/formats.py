"""What entities, lists and errors look like: JSON, or Atom, which Exact Online answers by default.

Formats: OData version 2, JSON and Atom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff.simulator import literals
from holdoff.simulator.answers import Answer, message
from holdoff.simulator.literals import xml_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdoff.simulator.filters import Row
    from holdoff.simulator.queries import Page, Query
    from holdoff.simulator.resources import Resource

_DATA = "http://schemas.microsoft.com/ado/2007/08/dataservices"
_NAMESPACES = f'xmlns="http://www.w3.org/2005/Atom" xmlns:d="{_DATA}" xmlns:m="{_DATA}/metadata"'
_LONG = frozenset(("HID", "Timestamp"))
"""Fields of the type Edm.Int64, which is a string in JSON."""
_PROLOG = '<?xml version="1.0" encoding="utf-8"?>'


def wants_json(accept: str, format_option: str = "") -> bool:
    """Whether a client gets JSON: it is named before Atom and any XML. `*/*` means Atom."""
    if format_option:
        return format_option != "atom"
    for part in accept.lower().split(","):
        kind = part.partition(";")[0].strip()
        if kind in ("application/json", "text/json"):
            return True
        if kind.endswith("xml"):
            return False
    return False


@dataclass(frozen=True, slots=True)
class Format:
    """Writes answers for a client.

    Args:
        json: whether it gets JSON.
        base: the address of the endpoint, as the client spelled it.
    """

    json: bool
    base: str = ""

    def error(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> Answer:
        """An error."""
        if self.json:
            return Answer(status, message(text), headers or {})
        body = (
            f'{_PROLOG}<error xmlns="{_DATA}/metadata"><code></code>'
            f'<message xml:lang="">{xml_text(text)}</message></error>'
        )
        return Answer(status, body, headers or {}, content_type="application/xml")

    def entity(self, row: Row, resource: Resource, query: Query, status: int = 200) -> Answer:
        """One entity; a new one with the address where it is."""
        headers = {"Location": self._address(row, resource)} if status == 201 else {}  # noqa: PLR2004 -- HTTP's Created
        if self.json:
            return Answer(status, {"d": self._object(row, resource, query)}, headers)
        body = _PROLOG + self._entry(row, resource, query, f" {_NAMESPACES}")
        kind = "application/atom+xml;type=entry"
        return Answer(status, body, headers, content_type=kind)

    def list(self, page: Page, resource: Resource, query: Query) -> Answer:
        """A list of entities, with the address of the next page."""
        next_url = None if page.next_query is None else f"{self.base}?{page.next_query}"
        if self.json:
            return Answer(200, {"d": self._results(page, resource, query, next_url)})
        entries = "".join(self._entry(row, resource, query) for row in page.rows)
        count = f"<m:count>{page.total}</m:count>" if query.counted else ""
        link = f'<link rel="next" href="{xml_text(next_url)}"/>' if next_url else ""
        name = resource.path.rpartition("/")[2]
        body = (
            f'{_PROLOG}<feed {_NAMESPACES}><title type="text">{name}</title>'
            f"<id>{xml_text(self.base)}</id>{count}{entries}{link}</feed>"
        )
        return Answer(200, body, content_type="application/atom+xml;type=feed")

    def _results(
        self, page: Page, resource: Resource, query: Query, next_url: str | None
    ) -> object:
        objects = [self._object(row, resource, query) for row in page.rows]
        limited = query.top is not None and query.top <= resource.page_size
        if limited and query.after is None and not query.counted:
            return objects  # in the form of OData's version 1, which knows no pages
        results: dict[str, object] = {"results": objects}
        if query.counted:
            results["__count"] = str(page.total)
        if next_url:
            results["__next"] = next_url
        return results

    def _object(self, row: Row, resource: Resource, query: Query) -> dict[str, object]:
        metadata = {"uri": self._address(row, resource), "type": _type(resource)}
        fields = {
            name: str(value) if name in _LONG and type(value) is int else literals.json_value(value)
            for name, value in _selected(row, query)
        }
        return {"__metadata": metadata, **fields}

    def _entry(self, row: Row, resource: Resource, query: Query, namespaces: str = "") -> str:
        address = xml_text(self._address(row, resource))
        fields = "".join(
            literals.element(name, value)
            for name, value in _selected(row, query)
            if "/" not in name
        )
        return (
            f"<entry{namespaces}><id>{address}</id><title/>"
            f'<link rel="edit" href="{address}"/>'
            f'<category term="{_type(resource)}" scheme="{_DATA}/scheme"/>'
            f'<content type="application/xml"><m:properties>{fields}</m:properties></content>'
            "</entry>"
        )

    def _address(self, row: Row, resource: Resource) -> str:
        return f"{self.base}({literals.written(row[resource.key])})"


def _type(resource: Resource) -> str:
    return f"Exact.Web.Api.Models.{resource.kind}"


def _selected(row: Row, query: Query) -> Sequence[tuple[str, literals.Value]]:
    """The fields that are wanted; null where the entity has none of a name."""
    if query.select:
        return [(name, row.get(name)) for name in query.select]
    return list(row.items())
