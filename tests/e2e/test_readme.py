"""The commands and links of the pages for users, followed as they are printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from tests.e2e.service import BIN
from tests.harness import wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
OPERATING = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "clients/*/*.md", "deploy/**/*.md")
    for page in ROOT.glob(pattern)
)
END = "__ended__"


def commands(heading: str) -> list[str]:
    """Return the commands of a section's console blocks, each with the lines that belong to it.

    A line with a prompt begins a command. It continues after a backslash, and up to the end of a
    here-document (`<<'END'`).
    """
    section = OPERATING.partition(f"\n{heading}\n")[2]
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        lines: Iterator[str] = iter(block.splitlines())
        for line in lines:
            if not line.startswith("$ "):
                continue  # what a command answered
            command = [line.removeprefix("$ ")]
            while command[-1].endswith("\\"):
                command.append(next(lines))
            if here := re.search(r"<<'(\w+)'$", command[-1]):
                while command[-1] != here[1]:
                    command.append(next(lines))
            found.append("\n".join(command))
    return found


class Shell:
    """A fresh shell in an empty directory, in which somebody types one command after the other.

    Only the ports differ from those on the page, and other hosts cannot connect.
    """

    def __init__(self, folder: Path) -> None:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("HOLDOFF_")}
        self._ports = {"50051": str(free_port()), "50052": str(free_port()), "0.0.0.0": "127.0.0.1"}  # noqa: S104
        self.output = ""
        self._process = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            env={**kept, "PATH": f"{BIN}:{kept['PATH']}", "HOME": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)  # the shell, and what it runs
        os.killpg(self._process.pid, signal.SIGHUP)
        self._process.wait(timeout=60)
        self._reader.join(timeout=60)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line

    def run(self, command: str) -> tuple[int, str]:
        """Type a command; return its exit status and what it wrote.

        One in the background has been started when it says that it serves.
        """
        for printed, ours in self._ports.items():
            command = command.replace(printed, ours)
        before = len(self.output)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\necho {END} $?\n")
        self._process.stdin.flush()
        ended = re.compile(rf"^{END} (\d+)$", re.MULTILINE)
        found = wait_until(lambda: ended.search(self.output, before), 60)
        if re.search(r"&( *#.*)?$", command):
            wait_until(lambda: "serving" in self.output[before:], 60)
        return int(found[1]), self.output[before : found.start()]


@pytest.mark.timeout(300)
def test_the_walk_with_tls_ends_with_a_lease(tmp_path: Path) -> None:
    """Followed as it is printed, in a fresh shell, each command succeeds.

    Fails when nobody whom the walk names may create a token, when a file that it uses comes from
    nowhere, and when a command goes to another coordinator than the one that was started.
    """
    typed = commands("## Who may do what") + commands("## Who did that?")
    for step in ("access.toml", "serve", "token issue", "token create", "holdoff run", "audit"):
        assert any(step in command for command in typed), step
    with Shell(tmp_path) as shell:
        for command in typed:
            status, output = shell.run(command)
            assert status == 0, f"{command}\n{output}"
        assert "LEASE_GRANTED" in shell.output
        assert "Traceback" not in shell.output


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Fails when a link names a file or a heading that does not exist."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
