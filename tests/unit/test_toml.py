"""TOML files of operators: what is wrong with one is reported with its line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff import _toml
from holdoff_coordinator.access import AccessError, read_access

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '[[grants]]\nidentities = ["dns:a"]\nrole = "viewer"\nresources = ["*"]\n'

WRONG = [
    ("x = " + "[" * 100_000, "nested too deeply"),
    ("x = " + "{a = " * 100_000, "nested too deeply"),
    ("x = " + "9" * 5_000, "a number is too long"),
    ("x = -1" + "_0" * 5_000, "a number is too long"),
    ("x = ", "Invalid value"),
    (".".join("a" * 500) + " = 1", "a key is too long"),
    (" . ".join(['"a"'] * 500) + " = 1", "a key is too long"),
    (f"[{'a' * 5_000}]", "a key is too long"),
]


@pytest.mark.parametrize(("line", "says"), WRONG)
def test_a_mistake_is_reported_with_its_line(line: str, says: str) -> None:
    """Fails when the parser's RecursionError or ValueError comes through."""
    with pytest.raises(_toml.TomlError, match=says) as caught:
        _toml.read(f"a = 1\n\n{line}\n")
    assert caught.value.line == 3


@pytest.mark.parametrize(("line", "says"), WRONG)
def test_access_files_too(tmp_path: Path, line: str, says: str) -> None:
    """Fails when an access file ends the coordinator, or the reading of its next version."""
    path = tmp_path / "access.toml"
    path.write_text(f"{GOOD}{line}\n")
    with pytest.raises(AccessError) as caught:
        read_access(path)
    assert str(caught.value).startswith(f"{path}:5: {says}")
    path.write_text(GOOD)
    assert len(read_access(path)) == 1
    path.write_bytes(b"# \n\xff")
    with pytest.raises(AccessError, match=":2: is not UTF-8"):
        read_access(path)


def test_long_values_and_comments_are_no_keys() -> None:
    """Fails when a pattern, or a line of dots, is taken for a key."""
    text = f"# {'.' * 9_000}\nx = '{'.' * 9_000}'\ny = [\n'{'a.' * 2_000}=',\n]\n"
    assert _toml.read(text) == {"x": "." * 9_000, "y": [f"{'a.' * 2_000}="]}


@given(st.text("[]{}=ax.\"'\n 9_-#", max_size=80))
def test_any_text_is_a_document_or_an_error(text: str) -> None:
    """Fails when any other exception is raised, or a line that the text does not have."""
    line = 1
    try:
        _toml.read(text)
    except _toml.TomlError as error:
        line = error.line
    assert 1 <= line <= text.count("\n") + 1
