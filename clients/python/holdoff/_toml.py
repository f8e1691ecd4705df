"""TOML files of operators: every error names the line."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

MOST_CHARACTERS = 1_000_000
"""No file of ours is longer."""
_MOST_KEY_CHARACTERS, _MOST_KEY_PARTS = 4_000, 100
"""No key is longer: the time of `tomllib` is that of a table's key times the table's lines."""

_NEXT_PART = re.compile(r"[\"']\s*+\.")
_PLACE = re.compile(r"line (\d+)")


class TomlError(ValueError):
    """A file is not valid TOML."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def decode(raw: bytes) -> str:
    """Read the bytes of a file as text.

    Raises:
        TomlError: They are not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TomlError("is not UTF-8", raw.count(b"\n", 0, error.start) + 1) from None


def read(text: str) -> dict[str, Any]:
    """Parse a document.

    Raises:
        TomlError: It is invalid, too long or nested too deeply, or has a number that is too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise TomlError(f"is longer than {MOST_CHARACTERS} characters", 1)
    for number, line in enumerate(text.split("\n"), 1):
        if _is_too_long(line.partition("=")[0].lstrip()):
            raise TomlError("a key is too long", number)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).partition(" (at ")
        found = _PLACE.match(where)
        raise TomlError(what, int(found[1]) if found else text.count("\n") + 1) from None
    except RecursionError as error:
        raise TomlError("nested too deeply", _line(text, error.__traceback__)) from None
    except ValueError as error:  # of `int`, which reads no more than some thousand digits
        raise TomlError("a number is too long", _line(text, error.__traceback__)) from None


def _is_too_long(key: str) -> bool:
    """Whether a key, or the text in its place, is too long. In quotes it may be a value."""
    if key.startswith("#"):
        return False
    if key.startswith(("'", '"')):
        return len(_NEXT_PART.findall(key)) > _MOST_KEY_PARTS
    return len(key) > _MOST_KEY_CHARACTERS or key.count(".") > _MOST_KEY_PARTS


def _line(text: str, traceback: TracebackType | None) -> int:
    """Find how far the parser got: its innermost function with a position knows it."""
    position = 0
    while traceback:
        found = traceback.tb_frame.f_locals.get("pos")
        position = found if isinstance(found, int) else position
        traceback = traceback.tb_next
    return text.count("\n", 0, position) + 1
