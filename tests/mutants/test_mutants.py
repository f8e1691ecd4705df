"""The list of mutants fits the code: a safeguard that was rewritten needs its mutant rewritten."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.mutants.mutants import MUTANTS, Mutant
from tests.mutants.run import command, stale


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_of_a_mutant_is_there_once(mutant: Mutant) -> None:
    """Fails when a file no longer has the text that a mutant replaces, or has it twice."""
    assert not stale(mutant)
    assert mutant.after != mutant.before
    assert command(mutant.noticed_by)


def test_each_mutant_has_a_name_of_its_own() -> None:
    """ONLY=name picks one."""
    assert Counter(one.name for one in MUTANTS).most_common(1)[0][1] == 1
