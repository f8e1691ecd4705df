"""The XML API: a download in pages, and an upload that is read but not kept.

Documents: Exact Online XML API, `eExact-XML.xsd`. A client asks for the next page with the
timestamp of the last one, `ts_d`, in `TSPaging`, until a page is not full (field).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.parsers import expat

from holdoff.simulator.limits import XML_PAGE_SIZE
from holdoff.simulator.literals import at, xml_text
from holdoff.simulator.resources import RESOURCES, Resource

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdoff.simulator.filters import Row

_MOST_DEPTH = 100
_MOST_UPLOADED = 1_000
"""Entities in an upload."""
_MOST_KEY = 100
"""Characters of an entity's key in a message."""
_KEYS = ("code", "number", "entry", "ID")
_SCHEMA = (
    'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
    ' xsi:noNamespaceSchemaLocation="eExact-XML.xsd"'
)
_ERROR, _DONE = 0, 2  # types of messages


@dataclass(frozen=True, slots=True)
class Topic:
    """A kind of document."""

    name: str
    node: str
    """Name of an entity's element."""
    resource: Resource
    """The endpoint of sync with the same entities."""


def _topic(name: str, path: str) -> Topic:
    return Topic(name, name.removesuffix("s"), RESOURCES[f"sync/{path}"])


TOPICS: dict[str, Topic] = {
    topic.name.lower(): topic
    for topic in (
        _topic("Accounts", "crm/accounts"),
        _topic("GLAccounts", "financial/glaccounts"),
        _topic("GLTransactions", "financial/transactionlines"),
        _topic("Invoices", "salesinvoice/salesinvoices"),
        _topic("Items", "logistics/items"),
        _topic("SalesOrders", "salesorder/salesorderheaders"),
    )
}
"""All topics that exist, by their names without case."""


class BadDocumentError(ValueError):
    """A body that is not a document of its topic, or an invalid timestamp."""


def download(topic: Topic, rows: Iterable[Row], ts_paging: str) -> str:
    """Write the page of a topic that comes after a timestamp.

    Raises:
        BadDocumentError: the timestamp cannot be read.
    """
    after = _timestamp(ts_paging)
    page = [row for row in rows if _number(row) > after][:XML_PAGE_SIZE]
    entities = "".join(
        f'<{topic.node} code="{xml_text(str(row["Code"]))}"'
        f' ID="{{{row[topic.resource.key]}}}">'
        f"<Description>{xml_text(str(row.get('Description')))}</Description></{topic.node}>"
        for row in page
    )
    last = f' ts_d="0x{_number(page[-1]):016X}"' if page else ""
    return _document(
        f"<{topic.name}>{entities}</{topic.name}>"
        f'<Topics><Topic code="{topic.name}"{last} count="{len(page)}"'
        f' pagesize="{XML_PAGE_SIZE}"/></Topics><Messages/>'
    )


def upload(topic: Topic, body: bytes | None, now_ms: int) -> str:
    """Read a document and write what became of each of its entities.

    Raises:
        BadDocumentError: it is none of the topic.
    """
    if body is None:
        raise BadDocumentError("The body cannot be read, or is too long.")
    keys = _Reader(topic).read(body)
    return messages(now_ms, *((_DONE, f"{topic.node} processed", topic, key) for key in keys))


def error(text: str, now_ms: int) -> str:
    """Write an error."""
    return messages(now_ms, (_ERROR, text, None, ""))


def messages(now_ms: int, *found: tuple[int, str, Topic | None, str]) -> str:
    """Write messages: type, text, and which entity of which topic they are about."""
    time = at(now_ms).replace(tzinfo=None).isoformat(timespec="seconds")
    written = []
    for kind, text, topic, key in found:
        about = ""
        if topic is not None:
            about = (
                f'<Topic code="{topic.name}" node="{topic.node}">'
                f'<Data keyAlt="{xml_text(key)}"/></Topic>'
            )
        written.append(
            f'<Message type="{kind}">{about}<Date>{time}</Date>'
            f"<Description>{xml_text(text)}</Description></Message>"
        )
    return _document(f"<Messages>{''.join(written)}</Messages>")


class _Reader:
    """Finds the entities of a document: `eExact`, in it the topic, in it the entities."""

    def __init__(self, topic: Topic) -> None:
        self._wanted = ["eExact", topic.name, topic.node]
        self._open: list[str] = []
        self._keys: list[str] = []

    def read(self, body: bytes) -> list[str]:
        """Read a document: the key of each entity, or its number in the document."""
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        try:
            parser.Parse(body, True)
        except (expat.ExpatError, ValueError, LookupError) as failure:
            raise BadDocumentError(f"The XML document is not valid: {failure}") from failure
        return self._keys

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._open and name != self._wanted[0]:
            raise BadDocumentError(f"expected the element {self._wanted[0]}")
        if len(self._open) == _MOST_DEPTH:
            raise BadDocumentError("nested too deeply")
        self._open.append(name)
        if self._open == self._wanted:
            if len(self._keys) == _MOST_UPLOADED:
                raise BadDocumentError(f"more than {_MOST_UPLOADED} entities")
            named = (attributes[key] for key in _KEYS if key in attributes)
            self._keys.append(next(named, str(len(self._keys) + 1))[:_MOST_KEY])

    def _end(self, _name: str) -> None:
        self._open.pop()

    def _refuse_doctype(self, *_: object) -> None:
        raise BadDocumentError("a document type, and with it entities, are not allowed")


def _timestamp(text: str) -> int:
    digits = text.strip().lower().removeprefix("0x")
    if not digits:
        return 0
    if not digits.isalnum() or not digits.isascii() or len(digits) > 16:  # noqa: PLR2004 -- 64 bits
        raise BadDocumentError("TSPaging is not a timestamp")
    try:
        return int(digits, 16)
    except ValueError as failure:
        raise BadDocumentError("TSPaging is not a timestamp") from failure


def _number(row: Row) -> int:
    return int(str(row["Timestamp"]))


def _document(inner: str) -> str:
    return f'<?xml version="1.0" encoding="utf-8"?><eExact {_SCHEMA}>{inner}</eExact>'
