"""OData's query options, and the page of entities that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from holdoff.simulator import literals
from holdoff.simulator.filters import read_filter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from holdoff.simulator.filters import Row
    from holdoff.simulator.literals import Value

_OPTIONS = frozenset(
    ("$select", "$filter", "$orderby", "$expand", "$top", "$skip", "$skiptoken")
) | {"$inlinecount", "$format"}
_FORMATS = ("json", "verbose", "atom")
_PAGING = ("$top", "$skip", "$skiptoken")
_MOST = 10**9


class BadQueryError(ValueError):
    """A query option that is unknown or cannot be read."""


@dataclass(frozen=True, slots=True)
class Query:
    """What a client asks for. `$expand` is accepted, and adds nothing."""

    options: tuple[tuple[str, str], ...]
    """All of them, as they were sent."""
    select: tuple[str, ...] = ()
    """The fields that are wanted; all if it is empty."""
    where: Callable[[Row], bool] | None = None
    order: tuple[tuple[str, bool], ...] = ()
    """Fields to sort by, each with whether it descends."""
    top: int | None = None
    skip: int = 0
    after: Value = None
    """The key after which the page begins."""
    counted: bool = False
    """Whether the answer has the number of all entities too."""


@dataclass(frozen=True, slots=True)
class Page:
    """The entities of an answer."""

    rows: Sequence[Row]
    total: int
    """How many entities there are, on all pages."""
    next_query: str | None
    """The query of the next page; None on the last one."""


def read_query(options: tuple[tuple[str, str], ...]) -> Query:
    """Read the options of a query; what does not begin with `$` means nothing.

    Raises:
        BadQueryError: one is unknown, there twice, or wrong.
        BadFilterError: so is the filter.
    """
    given: dict[str, str] = {}
    for name, value in options:
        if name.startswith("$") and name not in _OPTIONS:
            raise BadQueryError(
                f"The query parameter '{name}' begins with a system-reserved '$' character"
                " but is not recognized."
            )
        if name.startswith("$") and name in given:
            raise BadQueryError(
                f"Query parameter '{name}' is specified, but it should be specified exactly once."
            )
        given[name] = value.strip()
    if given.get("$inlinecount", "none") not in ("none", "allpages"):
        raise BadQueryError(
            "Unknown $inlinecount option, only 'allpages' and 'none' are supported."
        )
    if given.get("$format", "json") not in _FORMATS:
        raise BadQueryError(f"Unknown $format, only {', '.join(_FORMATS)} are supported.")
    select = _names(given.get("$select", ""))
    return Query(
        options,
        select=() if "*" in select else select,
        where=read_filter(given["$filter"]) if given.get("$filter") else None,
        order=_order(given.get("$orderby", "")),
        top=_number("$top", given["$top"]) if given.get("$top") else None,
        skip=_number("$skip", given["$skip"]) if given.get("$skip") else 0,
        after=_literal(given["$skiptoken"]) if given.get("$skiptoken") else None,
        counted=given.get("$inlinecount") == "allpages",
    )


def page(rows: Iterable[Row], query: Query, key: str, size: int) -> Page:
    """Choose the entities of a page.

    Args:
        rows: all entities, sorted by the key.
        query: what is asked for.
        key: the name of the key.
        size: how many entities a page has at most.

    Raises:
        BadQueryError: the query's token belongs to another order, or to an entity that was deleted.
        BadFilterError: the filter compares values that cannot be compared.
    """
    found = [row for row in rows if query.where is None or query.where(row)]
    total = len(found)
    for name, descending in reversed(query.order):
        found.sort(key=lambda row: _sortable(row.get(name)), reverse=descending)
    if query.after is not None:
        found = found[_position_after(found, query, key) :]
    found = found[query.skip :]
    wanted = len(found) if query.top is None else min(query.top, len(found))
    shown = found[: min(size, wanted)]
    more = wanted - len(shown)
    return Page(shown, total, _next_query(query, shown[-1][key], len(shown)) if more else None)


def _position_after(found: Sequence[Row], query: Query, key: str) -> int:
    if not query.order:  # the token's own entity may be deleted
        after = _sortable(query.after)
        return sum(_sortable(row[key]) <= after for row in found)
    for n, row in enumerate(found):
        if row[key] == query.after:
            return n + 1
    raise BadQueryError("The entity of the $skiptoken does not exist any more.")


def _next_query(query: Query, last: Value, shown: int) -> str:
    options = [(name, value) for name, value in query.options if name not in _PAGING]
    if query.top is not None:
        options.append(("$top", str(query.top - shown)))
    options.append(("$skiptoken", literals.written(last)))
    return "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in options)


def _quoted(text: str) -> str:
    return quote(text, "$,()'", errors="replace")


def _names(text: str) -> tuple[str, ...]:
    """The fields of a list with commas."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        word = name.replace("/", "_")
        if word != "*" and not (word.isidentifier() and word.isascii()):
            raise BadQueryError(f"Syntax error in '{name}'.")
    return names


def _order(text: str) -> tuple[tuple[str, bool], ...]:
    """The fields to sort by, each optionally with a direction."""
    order = []
    for part in text.split(","):
        name, _, direction = part.strip().partition(" ")
        if direction.strip() not in ("", "asc", "desc"):
            raise BadQueryError(f"Syntax error in $orderby at '{part}'.")
        order += [(field, direction.strip() == "desc") for field in _names(name)]
    return tuple(order)


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(_MOST)):
        raise BadQueryError(f"Incorrect format for {name} argument '{text}'.")
    return int(text)


def _literal(text: str) -> Value:
    try:
        return literals.parse(text)
    except ValueError as error:
        raise BadQueryError(f"Incorrect format for $skiptoken: {error}.") from error


def _sortable(value: Value) -> tuple[str, Value]:
    """A value as one that every other can be compared with."""
    if value is None:
        return "", 0
    if isinstance(value, int | float):
        return "number", value
    if isinstance(value, dict | list):
        return "nested", 0
    return type(value).__name__, value.lower() if isinstance(value, str) else value
