"""A command that notes all the time that it runs, and does what a test tells it to do."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.processes import program
from tests.harness import wait_until


class Puppet:
    """A command line to run, and what is known of the one process that runs it."""

    def __init__(self, folder: Path, name: object = "puppet") -> None:
        self._path = folder / f"{name}.stamps"
        self._path.touch()
        self._file = self._path.open()
        self._line = ""
        self._orders = 0
        self._pid = 0
        self._stamps: dict[str, list[float]] = {}
        self.command = program("puppet", self._path)

    def do(self, order: str) -> None:
        """Tell it to do something, if it runs; else as soon as it does."""
        draft = self._path.with_suffix(".draft")
        draft.write_text(order)
        draft.replace(f"{self._path}.{self._orders}")
        self._orders += 1

    def say(self, text: str) -> float:
        """Have it print a line; return when it was about to."""
        self.do(f"say({text!r})")
        return wait_until(lambda: self.told[self._orders - 1 :])[0]  # type: ignore[no-any-return]

    def have_done(self, order: str) -> None:
        """Tell it to do something, and wait until it has."""
        self.do(order)
        wait_until(lambda: len(self._noted("did")) == self._orders)

    def end(self, code: int = 0) -> None:
        """Have it exit."""
        self.do(f"sys.exit({code})")

    @property
    def runs(self) -> list[float]:
        """When it was seen to run, in seconds since 1970 as the store counts them."""
        return self._noted("runs")

    @property
    def told(self) -> list[float]:
        """When it began to do what it was told."""
        return self._noted("told")

    def runs_after(self, instant: float) -> list[float]:
        """When it was seen to run later than that."""
        return [at for at in reversed(self.runs) if at > instant][::-1]

    def _noted(self, word: str) -> list[float]:
        while line := self._file.readline():
            self._line += line
            if self._line.endswith("\n"):
                at, noted = self._line.split()
                self._stamps.setdefault(noted, []).append(float(at))
                self._line = ""
        return self._stamps.setdefault(word, [])

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped, as by SIGSTOP."""
        return self._state() == "T"

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._state() in ("", "Z")

    def _state(self) -> str:
        """Return the state of its process, as /proc has it; empty when there is none."""
        wait_until(lambda: self.runs)
        self._pid = self._pid or self._find()
        try:
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def _find(self) -> int:
        """Find its process, which in a namespace of its own has another id there."""
        command = b"\0".join(word.encode() for word in self.command) + b"\0"
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "cmdline").read_bytes() == command:
                    return int(folder.name)
            except OSError:
                continue
        return -1

    def close(self) -> None:
        """Let go of its notes."""
        self._file.close()
