"""OData's `$filter`: as much of it as clients of Exact Online use.

A field that an entity does not have is null, so that a client may ask for any of the
provider's fields. What cannot be read or compared raises `BadFilterError`.
"""

from __future__ import annotations

import operator
import re
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from holdoff.simulator import literals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from holdoff.simulator.literals import Value

    Row = Mapping[str, Value]
    Term = Callable[[Row], Value]

_TOKEN = re.compile(
    r"\s*+((?:[A-Za-z]{1,20}+)?+'(?:[^']|'')*+'|-?\d++(?:\.\d++)?+[mMlLdDfF]?+|[A-Za-z_][\w/]*+|[(),])",
    re.ASCII,
)
_MOST_DEPTH = 30


class BadFilterError(ValueError):
    """A filter that cannot be read, or that compares what cannot be compared."""


def read_filter(text: str) -> Callable[[Row], bool]:
    """Read a filter: it tells whether an entity is wanted.

    Raises:
        BadFilterError: it cannot be read. The function that is returned raises it too,
            if the values of an entity cannot be compared.
    """
    parser = _Parser(_tokens(text))
    term = parser.disjunction()
    if parser.next():
        raise BadFilterError(f"unexpected {parser.next()!r}")
    return lambda row: _truth(term(row))


def _tokens(text: str) -> list[str]:
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise BadFilterError(f"syntax error at position {position}")
        tokens.append(found[1])
        position = found.end()
    return tokens


class _Parser:
    """Reads terms by recursive descent."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    def next(self) -> str:
        """The next token; empty at the end."""
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def disjunction(self) -> Term:
        """Read terms with `or` between them."""
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise BadFilterError("nested too deeply")
        terms = [self._conjunction()]
        while self._took("or"):
            terms.append(self._conjunction())
        self._depth -= 1
        return terms[0] if len(terms) == 1 else lambda row: any(_truth(t(row)) for t in terms)

    def _conjunction(self) -> Term:
        terms = [self._comparison()]
        while self._took("and"):
            terms.append(self._comparison())
        return terms[0] if len(terms) == 1 else lambda row: all(_truth(t(row)) for t in terms)

    def _comparison(self) -> Term:
        negated = False
        while self._took("not"):
            negated = not negated
        term = self._value()
        if (compare := _COMPARISONS.get(self.next())) is not None:
            self._position += 1
            left, right = term, self._value()
            term = lambda row: _compare(compare, left(row), right(row))  # noqa: E731
        return (lambda row: not _truth(term(row))) if negated else term

    def _value(self) -> Term:
        if self._took("("):
            term = self.disjunction()
            self._expect(")")
            return term
        token = self._take()
        if token in _FUNCTIONS and self._took("("):
            return self._call(token)
        if token[0].isalpha() and "'" not in token and token not in ("true", "false", "null"):
            return lambda row: row.get(token)
        try:
            value = literals.parse(token)
        except ValueError as error:
            raise BadFilterError(str(error)) from error
        return lambda _: value

    def _call(self, name: str) -> Term:
        function, kinds = _FUNCTIONS[name]
        arguments = []
        for n in range(len(kinds)):
            if n:
                self._expect(",")
            arguments.append(self.disjunction())
        self._expect(")")

        def call(row: Row) -> Value:
            values = [argument(row) for argument in arguments]
            if None in values:
                return None
            if not all(map(isinstance, values, kinds)):
                raise BadFilterError(f"{name} takes other types")
            return function(*values)

        return call

    def _take(self) -> str:
        token = self.next()
        if not token:
            raise BadFilterError("unexpected end")
        self._position += 1
        return token

    def _took(self, token: str) -> bool:
        took = self.next() == token
        self._position += took
        return took

    def _expect(self, token: str) -> None:
        if not self._took(token):
            raise BadFilterError(f"expected {token!r}, not {self.next()!r}")


_COMPARISONS: dict[str, Callable[..., bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")
}
_FUNCTIONS: dict[str, tuple[Callable[..., Value], tuple[type, ...]]] = {
    "substringof": (lambda part, text: part.lower() in text.lower(), (str, str)),
    "startswith": (lambda text, part: text.lower().startswith(part.lower()), (str, str)),
    "endswith": (lambda text, part: text.lower().endswith(part.lower()), (str, str)),
    "tolower": (str.lower, (str,)),
    "toupper": (str.upper, (str,)),
    "trim": (str.strip, (str,)),
    "length": (len, (str,)),
    "year": (lambda time: time.year, (datetime,)),
    "month": (lambda time: time.month, (datetime,)),
    "day": (lambda time: time.day, (datetime,)),
}


def _truth(value: Value) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise BadFilterError("an expression is not true or false")


def _compare(compare: Callable[..., bool], left: Value, right: Value) -> bool:
    """Compare as the provider's database does: without case, and null equals only null."""
    if left is None or right is None:
        return compare is operator.ne if left is not right else compare is operator.eq
    left, right = _like(left, right), _like(right, left)
    if _kind(left) is not _kind(right):
        raise BadFilterError("the types cannot be compared")
    return compare(left, right)


def _like(value: Value, other: Value) -> Value:
    """A text that a client wrote to an entity, as what it is compared with; without case."""
    if not isinstance(value, str):
        return value
    try:
        if isinstance(other, UUID):
            return UUID(value)
        if isinstance(other, datetime):
            return literals.parse_time(value)
    except ValueError:
        return value
    return value.lower()


def _kind(value: Value) -> type:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float
    return type(value)
