"""Read the corpus, or the output of a job in a FILE, and print what counts.

Usage: python -m tests.corpus [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.corpus import messages, read


def main() -> None:
    """Print the readings of a file, or the messages of the corpus that are read wrong."""
    say = sys.stdout.write
    if sys.argv[1:]:
        for reading in read(Path(sys.argv[1]).read_bytes()):
            say(f"{reading}\n")
        return
    corpus = messages()
    wrong = [one for one in corpus if read(one.text.encode()) != one.counts]
    for one in wrong:
        say(f"{one.id}\n  right: {one.counts}\n  read:  {read(one.text.encode())}\n")
    say(f"{len(corpus) - len(wrong)} of {len(corpus)} messages are read right\n")


if __name__ == "__main__":
    main()
