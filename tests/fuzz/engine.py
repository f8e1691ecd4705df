"""What all targets share: inputs that are mostly valid, edits of them, limits, and the kept corpus.

An input is the content of one file. What a target makes of it depends on nothing else, so that a
kept file repeats a failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy

CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 64 * 1024
HANG_SECONDS = 60.0
"""Nothing takes so long, however busy the machine is."""
_CPU_SECONDS, _CPU_SECONDS_A_BYTE = 1.0, 20e-6
"""CPU time for an input of some size: a hundred times what a correct program takes."""

Check = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Target:
    """A subject, the inputs for it, and the check that every input must pass."""

    inputs: SearchStrategy[bytes]
    opened: Callable[[], AbstractContextManager[Check]]
    """Prepares what inputs are tried on. It may assert something at its end."""


def kept(name: str) -> list[Path]:
    """Return the files of a target's corpus."""
    return sorted((CORPUS / name).glob("*"))


def keep(name: str, data: bytes) -> Path:
    """Add an input to the corpus; return its file."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def limited(data: bytes) -> Iterator[None]:
    """Bound what an input may take: the CPU time of this thread, and end a process that hangs.

    A pattern that backtracks for ever lets no other code of the process run, so a thread of
    faulthandler ends it.
    """
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=2)
    began = time.thread_time()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    check_cpu("the input", time.thread_time() - began, data)


def check_cpu(what: str, seconds: float, data: bytes) -> None:
    """Fail if something took more CPU time than the size of its input allows."""
    allowed = _CPU_SECONDS + len(data) * _CPU_SECONDS_A_BYTE
    assert seconds < allowed, f"{what} took {seconds:.1f} s of CPU time for {len(data)} bytes"


@st.composite
def edited(draw: DrawFn, valid: SearchStrategy[bytes], words: Sequence[bytes]) -> bytes:
    """Draw a valid input, and change it in no, one or several places.

    Args:
        draw: Hypothesis's.
        valid: What to begin with.
        words: What matters to the code that reads it.
    """
    data = draw(valid)
    some = st.binary(max_size=16) | st.sampled_from(words)
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 4)))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 80)))
        match draw(st.sampled_from(("replace", "insert", "remove", "repeat", "cut off"))):
            case "replace":
                data = data[:start] + draw(some) + data[end:]
            case "insert":
                data = data[:start] + draw(some) + data[start:]
            case "remove":
                data = data[:start] + data[end:]
            case "repeat":
                times = draw(st.sampled_from((2, 2, 3, 3, 10, 100, 2000)))
                data = data[:start] + data[start:end] * times + data[end:]
            case _:
                data = data[:start]
    return data[:MOST_BYTES]


def files(name: str, *more: bytes) -> SearchStrategy[bytes]:
    """Draw from a target's corpus, and from some more."""
    return st.sampled_from([*more, *(path.read_bytes() for path in kept(name))])


def spliced(*texts: bytes) -> SearchStrategy[bytes]:
    """Draw lines of several texts, in any order."""
    lines = sorted({line for text in texts for line in text.splitlines()})
    return st.lists(st.sampled_from(lines), max_size=20).map(b"\n".join)
