"""The protocol's table of cases: what each event comes to under each rule of rotation, and a test.

Prints the table, and fails where a cell has no test:

    python -m tests.custody.table
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from itertools import product

from holdoff.simulator import Rotation

REFRESHING = "tests/integration/test_refreshing.py"
CASES = "tests/integration/test_custody_cases.py"
ALIVE, WAIT, REAUTHORIZE, STALE = "alive", "alive after a wait", "REAUTHORIZE", "STALE"
REFUSED = f"wait; refused: {REAUTHORIZE}"


@dataclass(frozen=True, slots=True)
class Cell:
    """What an event comes to, and the test that shows it with the simulated provider."""

    expected: str
    test: str


def _cells(
    test: str, expected: str, others: dict[Rotation, str] | None = None, parameter: str = "{}"
) -> dict[Rotation, Cell]:
    """Return a row that one test shows, parametrized with the rotation."""
    return {
        rotation: Cell(
            (others or {}).get(rotation, expected), f"{test}[{parameter}]".format(rotation)
        )
        for rotation in Rotation
    }


SINGLE = dict.fromkeys(
    (Rotation.GRACE, Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES), REAUTHORIZE
)
GRACE_REPEATED = Cell(
    "alive at once, within the period",
    f"{CASES}::test_no_proof_of_a_request_that_was_not_acted_on",
)
TABLE: dict[str, dict[Rotation, Cell]] = {
    "not sent": _cells(f"{REFRESHING}::test_not_sent", WAIT),
    "sent, no proof; not acted on": {
        **_cells(f"{REFRESHING}::test_no_proof", WAIT, parameter="{}-error"),
        Rotation.UNTIL_USED: Cell(WAIT, f"{REFRESHING}::test_no_proof[until-used-error0]"),
        Rotation.GRACE: GRACE_REPEATED,
    },
    "sent, no proof; token issued": {
        **_cells(
            f"{REFRESHING}::test_no_proof",
            WAIT,
            dict.fromkeys(SINGLE, REFUSED),
            parameter="{}-lost-answer",
        ),
        # Within the period: test_no_proof_within_a_grace_period.
        Rotation.GRACE: Cell(REFUSED, f"{CASES}::test_no_proof_after_the_grace_period"),
    },
    "answered, crash before stored": _cells(
        f"{REFRESHING}::test_a_crash_before_the_answer_is_stored", ALIVE, parameter="{}-answered"
    ),
    "stored, crash before hand-out": _cells(f"{CASES}::test_a_crash_after_it_was_stored", ALIVE),
    "failover lost the token; a copy": _cells(
        f"{CASES}::test_a_failover_that_lost_an_answer_of_which_a_replica_has_a_copy", ALIVE
    ),
    "failover lost the token; no copy": _cells(
        f"{CASES}::test_a_failover_that_lost_an_answer_of_which_no_copy_is_left",
        WAIT,
        {**SINGLE, Rotation.SINGLE_USE_REVOKES: STALE},
    ),
    "two replicas sent": _cells(
        f"{CASES}::test_two_replicas_sent", ALIVE, {Rotation.SINGLE_USE_REVOKES: REAUTHORIZE}
    ),
    "late answer, unchanged": _cells(
        f"{REFRESHING}::test_a_late_answer", "adopted", parameter="False-{}"
    ),
    "late answer, moved": _cells(
        f"{REFRESHING}::test_a_late_answer", "dropped", parameter="True-{}"
    ),
}


def collected() -> set[str]:
    """Return the tests that there are."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", REFRESHING, CASES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line for line in done.stdout.splitlines() if "::" in line}


def without_a_test(tests: set[str]) -> list[str]:
    """Return the cells that no test shows."""
    return [
        f"{event}, {rotation}"
        for (event, row), rotation in product(TABLE.items(), Rotation)
        if rotation not in row or row[rotation].test not in tests
    ]


def main() -> int:
    """Print the table."""
    for event, row in TABLE.items():
        sys.stdout.write(f"{event}\n")
        for rotation, cell in row.items():
            sys.stdout.write(f"  {rotation:<20}{cell.expected:<34}{cell.test}\n")
    missing = without_a_test(collected())
    sys.stdout.writelines(f"no test: {one}\n" for one in missing)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
