"""Files of custody's spool, and outcomes as they are written into them."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from holdoff_coordinator.custody import spool
from holdoff_coordinator.custody.outcomes import (
    Answered,
    Failure,
    NoProof,
    NotSent,
    Outcome,
    Received,
    document,
    parse,
)
from holdoff_coordinator.custody.spool import Draft, Spooling

if TYPE_CHECKING:
    from pathlib import Path

KEY = bytes(range(32))
RECEIVED = Received(200, {"date": "today"}, b'{"refresh_token":"s3cret"}\n\n')


@pytest.mark.parametrize(
    "outcome",
    [
        NotSent(Failure.CONNECT, "refused"),
        NoProof(Failure.TIMEOUT, "late", 5, 7),
        NoProof(Failure.SENDER, "ended", None, 7),
        NoProof(Failure.CLOSED, "cut off", 5, 7, RECEIVED),
        Answered(RECEIVED, 5, 6),
    ],
)
def test_outcomes_survive(outcome: Outcome) -> None:
    """Every outcome is read as it was written, and shows no body or header."""
    received = None if isinstance(outcome, NotSent) else outcome.received
    assert parse(document(outcome), received.body if received else b"") == outcome
    assert "s3cret" not in repr(outcome)
    assert "today" not in repr(outcome)


def spooled(path: Path) -> bytes:
    """Write an answer into the spool; return what lies there."""
    Draft(Spooling(str(path), bytearray(KEY), b"wrapped"), 1000).keep(Answered(RECEIVED, 5, 6))
    return path.read_bytes()


def test_an_answer_is_read_again(tmp_path: Path) -> None:
    """The key is opened by the coordinator's keys, and the answer by it."""
    data = spooled(tmp_path / "one")
    assert b"s3cret" not in data
    keys = {b"wrapped": KEY}
    found = spool.read(data, keys.__getitem__)
    assert found.outcome == Answered(RECEIVED, 5, 6)
    assert found.of_this_boot()
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    """No byte of a file can be changed, left out or added unnoticed, the wrapped key included."""
    data = spooled(tmp_path / "one")
    for n in range(len(data)):
        with pytest.raises(ValueError, match="spool"):
            spool.read(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :], lambda _: KEY)
        with pytest.raises(ValueError, match="spool"):
            spool.read(data[:n], lambda _: KEY)
    with pytest.raises(ValueError, match="changed"):
        spool.read(data + b"x", lambda _: KEY)


def test_no_answer_is_overwritten_by_half_an_answer(tmp_path: Path) -> None:
    """A draft is no answer, and goes away where nothing came of it."""
    draft = Draft(Spooling(str(tmp_path / "one"), bytearray(KEY), b"wrapped"), 1000)
    assert spool.answers(str(tmp_path)) == []
    draft.discard()
    assert list(tmp_path.iterdir()) == []


def test_drafts_that_were_left(tmp_path: Path) -> None:
    """A draft of a sender that was killed is removed once no sender can live any more."""
    path = tmp_path / "one"
    spooled(path)
    for name in ("old", "new"):
        Draft(Spooling(str(tmp_path / name), bytearray(KEY), b""), 1000)
    long_ago = time.time() - 7200
    os.utime(tmp_path / ".old.draft", (long_ago, long_ago))
    assert spool.answers(str(tmp_path)) == [str(path)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".new.draft", "one"]
