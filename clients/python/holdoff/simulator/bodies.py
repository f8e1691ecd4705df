"""What a client writes to an entity: a JSON object, within bounds."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Never

if TYPE_CHECKING:
    from holdoff.simulator.literals import Value

_MOST_FIELDS = 300
_MOST_FIELD_NAME = 100
_MOST_DEPTH = 20


class BadBodyError(ValueError):
    """A body that cannot be read, or is too much."""


def read_fields(body: bytes | None, content_type: str) -> dict[str, Value]:
    """Read the fields of an entity.

    Raises:
        BadBodyError: the body is not a JSON object, or exceeds a limit.
    """
    if body is None:
        raise BadBodyError("The body cannot be read, or is too long.")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadBodyError(f"Unsupported media type requested: '{kind}'. Use application/json.")
    try:
        document = json.loads(body, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise BadBodyError("Error processing request stream: nested too deeply.") from error
    except ValueError as error:  # of JSON, of UTF-8, or a number that is too long
        raise BadBodyError("Error processing request stream: it is not JSON.") from error
    if not isinstance(document, dict):
        raise BadBodyError("Error processing request stream: expected a JSON object.")
    fields = {name: value for name, value in document.items() if name != "__metadata"}
    if len(fields) > _MOST_FIELDS:
        raise BadBodyError(f"An entity has at most {_MOST_FIELDS} fields.")
    for name, value in fields.items():
        if not (name.isidentifier() and name.isascii()) or len(name) > _MOST_FIELD_NAME:
            raise BadBodyError(f"The property name {name[:_MOST_FIELD_NAME]!r} is not valid.")
        if _depth(value) > _MOST_DEPTH:
            raise BadBodyError("Error processing request stream: nested too deeply.")
    return fields


def _refuse(constant: str) -> Never:
    raise ValueError(constant)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _depth(value: Value) -> int:
    """How deeply a value is nested; the depth of JSON that could be read is bounded."""
    depth, level = 0, [value]
    while level and depth <= _MOST_DEPTH:
        depth += 1
        inner: list[Value] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        level = inner
    return depth
