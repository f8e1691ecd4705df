"""Inputs that were found by `make fuzz`, or that show how inputs look: each passes its check."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.engine import CORPUS, kept, limited
from tests.fuzz.run import TARGETS, target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuzz.engine import Check

FILES = [(name, path) for name in TARGETS for path in kept(name)]


@pytest.fixture(scope="module")
def check_of() -> Iterator[Callable[[str], Check]]:
    """Give the check of a target, which is prepared once."""
    with contextlib.ExitStack() as stack:
        opened: dict[str, Check] = {}

        def check_of(name: str) -> Check:
            if name not in opened:
                opened[name] = stack.enter_context(target(name).opened())
            return opened[name]

        yield check_of


@pytest.mark.parametrize(
    ("name", "path"), FILES, ids=[f"{name}-{path.name}" for name, path in FILES]
)
def test_kept(name: str, path: Path, check_of: Callable[[str], Check]) -> None:
    """An input of the corpus passes the check of its target."""
    data = path.read_bytes()
    check = check_of(name)
    with limited(data):
        check(data)


def test_every_target_has_inputs() -> None:
    """The corpus has a folder for each target and no other."""
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
