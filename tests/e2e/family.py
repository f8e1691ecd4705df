"""A command of three generations, and what they noted: when they lived, and were told to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.e2e.processes import ended_before, program
from tests.harness import wait_until

if TYPE_CHECKING:
    from pathlib import Path


class Family:
    """`programs/family.py` with a diary.

    Args:
        diary: The file to which all append.
        stubborn: Whether they ignore TERM.
    """

    def __init__(self, diary: Path, *, stubborn: bool = False) -> None:
        self._diary = diary
        self.command = program("family", diary, *(["stubborn"] if stubborn else []))

    def notes(self) -> list[tuple[int, float, str]]:
        """Return generation, instant and word of every note."""
        if not self._diary.exists():
            return []
        lines = [line.split() for line in self._diary.read_text().splitlines()]
        return [(int(generation), float(at), word) for generation, at, word in lines]

    def lives(self) -> bool:
        """Tell whether all generations have been seen."""
        return {generation for generation, _, _ in self.notes()} == {1, 2, 3}

    def await_all(self) -> None:
        """Wait until all generations have been seen."""
        wait_until(self.lives)

    def told(self) -> float:
        """Return when the first was told to end."""
        return min(at for _, at, word in self.notes() if word == "TERM")

    def last(self) -> float:
        """Return when one of them was seen last."""
        return max(at for _, at, _ in self.notes())

    def ended_before(self, instant: float) -> bool:
        """Tell whether none was seen at an instant, or later, as far as the machine lets us."""
        stamps = ([at for one, at, _ in self.notes() if one == n] for n in (1, 2, 3))
        return ended_before(instant, *stamps)
