"""Takes out one safeguard at a time, and shows what notices that it is missing.

Works on copies of the tree. A mutant whose text is not there exactly once, and a test that fails
without any mutant, are failures too. `make mutants` runs it; ONLY=words picks mutants by name.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from tests.mutants.mutants import MUTANTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.mutants.mutants import Mutant

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 300
NOTICED = 1
"""Exit code of pytest when a test failed, and of a chaos run that saw a promise broken."""
_FIRST = re.compile(r"^(?:FAILED|ERROR) (\S+)|^ +VIOLATED ([\w-]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Result:
    """What a command said."""

    code: int | None
    """None when it did not end."""
    output: str
    seconds: float

    def notice(self) -> str:
        """Return the first test that failed, or promise that was broken; '' if nothing did."""
        if self.code is None:
            return "a test that does not end"
        found = _FIRST.search(self.output)
        if self.code != NOTICED or not found:
            return ""
        return found[1] or f"chaos: {found[2]}"


class Tree:
    """A copy of what is in version control, and commands that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        for name in listed.stdout.split("\0"):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._python = self._make_environment()

    def _make_environment(self) -> Path:
        """Make a virtual environment with the copy's modules, and all else from the original.

        PYTHONPATH would not do: guards, and other programs of tests, run isolated from it.
        """
        venv.create(self.folder / ".venv", symlinks=True)
        python, original = self.folder / ".venv/bin/python", Path(sys.executable).parent
        paths = sysconfig.get_paths(vars={"base": str(self.folder / ".venv")})
        modules = [self.folder / "clients" / "python", self.folder / "coordinator"]
        rest = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
        Path(paths["purelib"], "copy.pth").write_text("\n".join([*map(str, modules), rest, ""]))
        for program in original.iterdir():
            mine = python.with_name(program.name)
            if program.name in ("holdoff", "holdoff-coordinator"):
                text = program.read_text().replace(str(original / "python"), str(python))
                mine.write_text(text)
                mine.chmod(0o700)
            elif not mine.exists():
                mine.symlink_to(program)
        return python

    def run(self, command: Sequence[str]) -> Result:
        """Run a command in the copy, with its modules."""
        began = time.monotonic()
        process = subprocess.Popen(
            [str(self._python), *command],
            cwd=self.folder,
            env={**os.environ, "PATH": f"{self._python.parent}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        code: int | None
        try:
            output, _ = process.communicate(timeout=LIMIT_SECONDS)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            (output, _), code = process.communicate(), None
        return Result(code, output, time.monotonic() - began)

    def try_out(self, number: int, mutant: Mutant) -> Result:
        """Run what may notice a mutant on the copy with it."""
        path = self.folder / mutant.file
        original = path.read_bytes()
        path.write_text(original.decode().replace(mutant.before, mutant.after))
        # Python takes a compiled file for that of a source by the source's time and size.
        os.utime(path, (number, number))
        try:
            return self.run(command(mutant.noticed_by))
        finally:
            path.write_bytes(original)


def command(noticed_by: str) -> list[str]:
    """Return the command, less Python, that may notice a mutant."""
    words = shlex.split(noticed_by)
    if words[0] == "chaos":
        _, store, fault, seed = words
        options = ["--store", store, "--faults", fault, "--seed", seed, "--seconds", "1"]
        return ["-m", "tests.chaos.run", *options]
    return ["-m", "pytest", "-q", "-x", "-rfE", "--no-header", "-p", "no:cacheprovider", *words]


def stale(mutant: Mutant) -> str:
    """Say what is wrong with the text of a mutant; '' if nothing is."""
    count = (ROOT / mutant.file).read_text().count(mutant.before)
    return "" if count == 1 else f"{mutant.file} has its text {count} times: {mutant.before!r}"


def say(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Try all mutants, or those that are named, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many side by side")
    options = parser.parse_args()
    chosen = [(n, one) for n, one in enumerate(MUTANTS, 1) if options.only in one.name]
    failures = [f"{one.name}: {stale(one)}" for _, one in chosen if stale(one)]
    for failure in failures:
        say(f"STALE {failure}")
    ready = [(number, one) for number, one in chosen if not stale(one)]
    with tempfile.TemporaryDirectory(prefix="holdoff-mutants-") as folder:
        trees: SimpleQueue[Tree] = SimpleQueue()
        for number in range(options.jobs):
            trees.put(Tree(Path(folder, str(number))))

        def on_a_tree(number: int, mutant: Mutant | None, what: str) -> Result:
            tree = trees.get()
            try:
                return tree.try_out(number, mutant) if mutant else tree.run(command(what))
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            sane = {
                what: pool.submit(on_a_tree, 0, None, what)
                for what in dict.fromkeys(one.noticed_by for _, one in ready)
            }
            tried = [(one, pool.submit(on_a_tree, n, one, one.noticed_by)) for n, one in ready]
            say(f"{'mutant':<68} {'seconds':>7}  noticed by")
            for mutant, future in tried:
                without, result = sane[mutant.noticed_by].result(), future.result()
                notice = result.notice()
                if without.code != 0:
                    notice = f"NOT JUDGED: {mutant.noticed_by} fails without it"
                    say(without.output[-3000:])
                elif not notice:
                    notice = f"SURVIVED {mutant.noticed_by} (exit code {result.code})"
                if without.code != 0 or not result.notice():
                    failures.append(mutant.name)
                say(f"{mutant.name:<68} {result.seconds:7.1f}  {notice}")
    say(f"{len(chosen) - len(failures)} of {len(chosen)} mutants were noticed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
