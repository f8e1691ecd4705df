"""The check of the clocks, which needs no store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from holdoff.v1 import grant_pb2
from holdoff_coordinator.custody.checking import _clock

if TYPE_CHECKING:
    from holdoff_coordinator.custody.records import Held


@pytest.mark.parametrize(
    ("store", "result", "says"),
    [
        (100.0, "OK", "agree"),
        (102.0, "OK", "agree"),
        (96.0, "OK", "4 s ahead of"),
        (90.0, "WARNING", "10 s ahead of"),
        (112.0, "WARNING", "10 s behind"),
        (30.0, "FAILED", "70 s ahead of"),
        (172.0, "FAILED", "70 s behind"),
    ],
)
def test_clocks(store: float, result: str, says: str) -> None:
    """The store was read between 100 s and 102 s: only what lies outside is a difference."""
    held = cast("Held", SimpleNamespace(now_us=round(store * 1e6)))
    check = _clock(held, 100.0, 102.0)
    assert grant_pb2.GrantCheckResult.Name(check.result) == f"GRANT_CHECK_RESULT_{result}"
    assert says in check.message
    assert bool(check.remedy) == (result != "OK")
