"""The judge of custody's chaos run, on accounts written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdoff.simulator import Rotation
from tests.chaos.custody_judge import EARLY, OLD_TOKEN, Account, broken

FINE = Account(
    Rotation.UNTIL_USED,
    accepted=9,
    refused=0,
    violations={},
    lost=1,
    outlasted=1,
    deaths=0,
    restored_after=3.0,
)
REPEATED = {"refused": 2, "violations": {OLD_TOKEN: 2}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"violations": {EARLY: 1}, "refused": 1}, ["too early"]),
        ({"accepted": 0}, ["no request"]),
        ({"refused": 1}, ["refused"]),
        ({"violations": {"error_limit": 1}}, ["error_limit"]),
        ({"restored_after": None}, ["no access token"]),
        ({"restored_after": 11.0}, ["no access token"]),
        ({"deaths": 1}, ["a person"]),
        (REPEATED, ["old refresh token", "refused"]),
        ({"rotation": Rotation.SINGLE_USE, "deaths": 1, **REPEATED}, []),
        ({"rotation": Rotation.SINGLE_USE, "deaths": 2, **REPEATED}, ["a person"]),
        ({"rotation": Rotation.SINGLE_USE_REVOKES, "deaths": 2, **REPEATED}, []),
        ({"rotation": Rotation.SINGLE_USE, "lost": 0, **REPEATED}, ["old refresh", "refused"]),
    ],
)
def test_what_counts_as_broken(changes: dict[str, object], words: list[str]) -> None:
    """What the table of cases does not allow is named, and nothing else."""
    told = list(broken(replace(FINE, **changes), 10.0))  # type: ignore[arg-type]
    assert len(told) == len(words), told
    for text, word in zip(told, words, strict=True):
        assert word in text
