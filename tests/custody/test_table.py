"""The protocol's table of cases has a test for each cell."""

from __future__ import annotations

from tests.custody.table import collected, without_a_test


def test_each_cell_has_a_test() -> None:
    """Fails when a rule of rotation has no cell, or the test of a cell is renamed or removed."""
    tests = collected()
    assert without_a_test(tests) == []
    gone = "tests/integration/test_refreshing.py::test_not_sent[grace]"
    assert without_a_test(tests - {gone}) == ["not sent, grace"]
