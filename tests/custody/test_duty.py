"""When a replica looks at a grant again."""

from __future__ import annotations

import pytest

from holdoff_coordinator.custody.duty import (
    HELD_SECONDS,
    LOOK_AGAIN_SECONDS,
    UNDER_WAY_SECONDS,
    pause_after,
)
from holdoff_coordinator.custody.refreshing import Next
from holdoff_coordinator.custody.rules import SECOND


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        (Next(28 * SECOND, "COOLING"), 28),
        (Next(0, "DUE"), 0),
        (Next(572 * SECOND, "COOLING"), LOOK_AGAIN_SECONDS),
        (Next(100 * SECOND, "REFRESHING"), UNDER_WAY_SECONDS),
        (Next(SECOND // 2, "REFRESHING"), 0.5),
        (Next(0, "BACKING_OFF"), HELD_SECONDS),
        (Next(3 * SECOND, "BUDGET_SPENT"), 3),
        (Next(3600 * SECOND, "QUARANTINED"), LOOK_AGAIN_SECONDS),
        (Next(None, "REAUTHORIZE"), LOOK_AGAIN_SECONDS),
        (Next(None, "GONE"), LOOK_AGAIN_SECONDS),
    ],
)
def test_when_to_look_again(found: Next, seconds: float) -> None:
    """Exactly when it is due, and otherwise neither in a busy loop nor later than a minute."""
    assert pause_after(found) == seconds
