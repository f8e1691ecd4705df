"""The values of an entity's fields: as OData writes them in a query, in JSON and in Atom."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html import escape
from uuid import UUID

Value = object
"""None, bool, int, float, str, datetime (UTC), UUID, or what JSON nests of them."""

_NUMBER = re.compile(r"-?\d{1,30}+(?:\.\d{1,30}+)?+[mLdf]?+", re.ASCII | re.IGNORECASE)
_JSON_DATE = re.compile(r"/Date\((-?\d{1,14}+)\)/", re.ASCII)
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None}


def parse(text: str) -> Value:
    """Read a literal such as `guid'…'`, `datetime'2026-01-31'`, `'it''s'`, `5L` or `true`.

    Raises:
        ValueError: it is none.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _NUMBER.fullmatch(text):
        digits = text.rstrip("mMlLdDfF")
        return float(digits) if "." in digits else int(digits)
    prefix, quote, rest = text.partition("'")
    if not quote or not rest.endswith("'"):
        raise ValueError(f"{text!r} is not a literal")
    inner = rest[:-1]
    match prefix.lower():
        case "":
            if "'" in inner.replace("''", ""):
                raise ValueError(f"{text!r} is not a literal")
            return inner.replace("''", "'")
        case "guid":
            return UUID(inner)
        case "datetime" | "datetimeoffset":
            return parse_time(inner)
    raise ValueError(f"{text!r} is not a literal")


def parse_time(text: str) -> datetime:
    """Read a time in ISO 8601 or as JSON has it; without a zone it is UTC.

    Raises:
        ValueError: it is none.
    """
    if found := _JSON_DATE.fullmatch(text):
        return at(int(found[1]))
    time = datetime.fromisoformat(text)
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{text!r} is out of range") from error


def at(time_ms: int) -> datetime:
    """A time in milliseconds since the epoch.

    Raises:
        ValueError: it is out of range.
    """
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC)
    except (OverflowError, OSError) as error:
        raise ValueError(f"{time_ms} ms is out of range") from error


def written(key: Value) -> str:
    """A key as a literal, as it is in an address and in `$skiptoken`."""
    match key:
        case UUID():
            return f"guid'{key}'"
        case int():
            return str(key)
    doubled = str(key).replace("'", "''")
    return f"'{doubled}'"


def json_value(value: Value) -> object:
    """A value as JSON has it."""
    match value:
        case UUID():
            return str(value)
        case datetime():
            return f"/Date({round(value.timestamp() * 1000)})/"
    return value


def element(name: str, value: Value) -> str:
    """A value as a property of an Atom entry; empty for what JSON nests."""
    match value:
        case None:
            return f'<d:{name} m:null="true"/>'
        case dict() | list():
            return ""
        case bool():
            kind, text = "Edm.Boolean", str(value).lower()
        case int():
            kind, text = "Edm.Int32" if abs(value) < 1 << 31 else "Edm.Int64", str(value)
        case float():
            kind, text = "Edm.Double", repr(value)
        case datetime():
            kind, text = "Edm.DateTime", value.replace(tzinfo=None).isoformat()
        case UUID():
            kind, text = "Edm.Guid", str(value)
        case _:
            return f"<d:{name}>{xml_text(str(value))}</d:{name}>"
    return f'<d:{name} m:type="{kind}">{text}</d:{name}>'


def xml_text(text: str) -> str:
    """A text for XML: escaped, and without the characters that XML does not have."""
    return escape(_NOT_IN_XML.sub("?", text))
