"""Queries of the simulated provider: what they choose, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from holdoff.simulator import literals
from holdoff.simulator.bodies import BadBodyError, read_fields
from holdoff.simulator.filters import BadFilterError, read_filter
from holdoff.simulator.queries import BadQueryError, page, read_query

ID = UUID("5b3debef-9b1c-4bcd-b7ae-003e8d4139df")
ROW: dict[str, Any] = {
    "ID": ID,
    "Code": "17",
    "Name": "It's Acme",
    "Amount": 2.5,
    "Blocked": False,
    "Modified": datetime(2026, 1, 31, 12, tzinfo=UTC),
    "Account": str(ID),  # as a client wrote it
    "Due": "/Date(1767225600000)/",
}


@pytest.mark.parametrize(
    "text",
    [
        f"ID eq guid'{ID}'",
        f"Account eq guid'{str(ID).upper()}'",
        "Name eq 'it''s acme'",
        "Name ne 'x' and (Code eq '17' or Code eq '18')",
        "Amount gt 2 and Amount lt 3.0m and Amount ge 2.5d and Amount le 5L",
        "Blocked eq false",
        "not Blocked",
        "not (Blocked eq true or Code eq '1')",
        "Modified gt datetime'2026-01-31' and Modified lt datetime'2026-02-01T00:00:00'",
        "Modified eq datetime'2026-01-31T13:00:00+01:00'",
        "Due eq datetime'2026-01-01'",
        "substringof('acme',Name) eq true",
        "startswith(tolower(Name), 'it') and endswith(Name,'ACME')",
        "trim(Code) eq '17' and length(Code) eq 2",
        "year(Modified) eq 2026 and month(Modified) eq 1",
        "Missing eq null and Missing ne 'x' and Name ne null",
    ],
)
def test_filter_fits(text: str) -> None:
    """A filter chooses what it describes, and its negation does not."""
    assert read_filter(text)(ROW)
    assert not read_filter(f"not ({text})")(ROW)


@pytest.mark.parametrize(
    "text",
    [
        *("Code eq", "eq 1", "Code is 'x'", "Code eq 'x", "Code eq 'x' and", "(Code eq 'x'"),
        *("Code eq 'x')", "Code eq 1", "Name", "length(Name)", "ID eq 'x'", "Blocked eq 0"),
        *("Modified gt datetime'x'", "ID eq guid'x'", "substringof('x')", "year(Name) eq 1"),
        *("Code eq x'1'", "Code ~ 'x'", "Blocked eq 1e5", "(" * 1000, "not " * 1000),
    ],
)
def test_filter_is_refused(text: str) -> None:
    """What cannot be read or compared is refused, whatever it is."""
    with pytest.raises(BadFilterError):
        read_filter(text)(ROW)


ROWS = [{"ID": n, "Name": "abc"[n % 3], "Size": -n} for n in range(10)]


def chosen(query: str, size: int = 60) -> list[Any]:
    """The keys on a page."""
    options = tuple(tuple(one.split("=", 1)) for one in query.split("&"))
    return [row["ID"] for row in page(ROWS, read_query(options), "ID", size).rows]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("$top=2", [0, 1]),
        ("$top=0", []),
        ("$skip=8", [8, 9]),
        ("$skip=20", []),
        ("$top=2&$skip=3", [3, 4]),
        ("$filter=Size lt -7", [8, 9]),
        ("$filter=", [*range(10)]),
        ("$orderby=Size&$top=2", [9, 8]),
        ("$orderby=Name desc,Size asc&$top=4", [8, 5, 2, 7]),
        ("$orderby=Missing&$top=1", [0]),
        ("$skiptoken=7", [8, 9]),
        ("$orderby=Size&$skiptoken=2", [1, 0]),
        ("$expand=Lines&x=y&$top=1", [0]),
    ],
)
def test_query_chooses(query: str, keys: list[int]) -> None:
    """Each option does its part: filter, order, token, skip, top."""
    assert chosen(query) == keys


@pytest.mark.parametrize(
    "query",
    [
        *("$top=x", "$top=-1", "$top=" + "9" * 5000, "$skip=1.5", "$unknown=1", "$top=1&$top=2"),
        *("$orderby=Name sideways", "$orderby=1", "$select=a b", "$orderby=;", "$inlinecount=some"),
        *("$format=csv", "$skiptoken=nonsense", "$orderby=Size&$skiptoken=99", "$select=<a>"),
    ],
)
def test_query_is_refused(query: str) -> None:
    """An option that is unknown, repeated or wrong is refused."""
    with pytest.raises(BadQueryError):
        chosen(query)


@pytest.mark.parametrize(
    "query", ["", "$orderby=Size desc", "$top=7", "$skip=2", "$filter=ID ne 4"]
)
def test_pages_have_every_entity_once(query: str) -> None:
    """The pages that lead on from each other have what one large page has.

    Fails when a page's query forgets the order, the filter or what is left of `$top`.
    """
    whole = chosen(query) if query else [*range(10)]
    found: list[Any] = []
    options = tuple(tuple(one.split("=", 1)) for one in query.split("&") if one)
    for _ in range(10):
        one = page(ROWS, read_query(options), "ID", 3)  # type: ignore[arg-type]
        found += [row["ID"] for row in one.rows]
        if one.next_query is None:
            break
        decoded = one.next_query.replace("%20", " ")
        options = tuple(tuple(part.split("=", 1)) for part in decoded.split("&"))
    assert found == whole


def test_a_page_goes_on_after_its_last_entity_was_deleted() -> None:
    """A token of a deleted entity leads to the next one."""
    rows = [row for row in ROWS if row["ID"] != 4]
    assert page(rows, read_query((("$skiptoken", "4"),)), "ID", 2).rows == rows[4:6]


def test_a_total_is_of_all_pages() -> None:
    """The number of entities does not depend on the page."""
    query = read_query((("$top", "1"), ("$filter", "ID lt 5"), ("$inlinecount", "allpages")))
    assert page(ROWS, query, "ID", 60).total == 5
    assert query.counted


@pytest.mark.parametrize("value", [ID, 5, "it's"])
def test_a_key_is_read_as_it_was_written(value: object) -> None:
    """A literal that we write is one that we read."""
    assert literals.parse(literals.written(value)) == value


def test_a_text_of_any_characters_is_valid_xml() -> None:
    """Markup is escaped; what XML does not have is replaced."""
    assert literals.xml_text("<a>&\x00\ud800") == "&lt;a&gt;&amp;??"


JSON = "application/json; charset=utf-8"


def test_a_body_has_the_fields() -> None:
    """A JSON object is read; what a client repeats from an answer is left out."""
    assert read_fields(b'{"__metadata": {}, "Name": "x", "Lines": [{"a": 1}]}', JSON) == {
        "Name": "x",
        "Lines": [{"a": 1}],
    }


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"1",
            b"\xff",
            b"[" * 100_000,
            b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}",
        ),
        *(
            b'{"a": NaN}',
            b'{"a": 1e999}',
            b'{"a": ' + b"9" * 5000 + b"}",
            b'{"<a>": 1}',
            b'{"": 1}',
        ),
        b"{" + b",".join(b'"a%d": 1' % n for n in range(301)) + b"}",
    ],
)
def test_a_body_is_refused(body: bytes) -> None:
    """A body that is not a JSON object, or too large, is refused."""
    with pytest.raises(BadBodyError):
        read_fields(body, JSON)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused(kind: str) -> None:
    """Only JSON is read."""
    with pytest.raises(BadBodyError, match="media type"):
        read_fields(b"{}", kind)
