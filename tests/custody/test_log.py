"""What custody logs: read from its source, so that no line is forgotten."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from holdoff_coordinator import custody

if TYPE_CHECKING:
    from collections.abc import Iterator

LEVELS = {"warning", "error", "exception", "critical"}
ABOUT = {"token", "app", "path", "reason"}
NO_TOKEN = {
    "answers in the spool are not stored yet",
    "the notice of the custody keys was not renewed",
    "a core dump of this process may be written, with secrets",
}
"""These are about all of them."""


def complaints() -> Iterator[tuple[str, str, set[str], bool]]:
    """Yield where custody complains, what it says, the fields of it, and whether it has others."""
    for path in sorted(Path(custody.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            match node.func:
                case ast.Attribute(value=ast.Name(id="log"), attr=attr) if attr in LEVELS:
                    pass
                case ast.Name(id="warn"):
                    pass
                case _:
                    continue
            [event] = [one.value for one in node.args[:1] if isinstance(one, ast.Constant)]
            fields = {one.arg for one in node.keywords if one.arg}
            has_others = any(one.arg is None for one in node.keywords)
            yield f"{path.name}:{node.lineno}", str(event), fields, has_others


def test_each_complaint_says_about_what_and_what_to_do() -> None:
    """Fails when a warning or an error has no remedy, or not what it is about."""
    found = list(complaints())
    assert len(found) > 8
    for where, event, fields, has_others in found:
        assert "remedy" in fields, where
        assert fields & ABOUT or has_others or event in NO_TOKEN, where
