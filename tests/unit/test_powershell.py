"""`clients/powershell/Holdoff.psm1`, as far as it can be looked at where there is no PowerShell.

A parser reads it. Whether it works, only a run in PowerShell 5.1 and 7 would show.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

from holdoff.cli.run import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tree_sitter import Node

FOLDER = Path(__file__).parents[2] / "clients/powershell"
MODULE = (FOLDER / "Holdoff.psm1").read_text(encoding="utf-8")
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
EXPORTED = {"Invoke-WithLease", "Write-HoldoffError", "Write-HoldoffBlocked"}


def tree(text: str) -> Node:
    """Parse."""
    language = Language(tree_sitter_powershell.language())
    return Parser(language).parse(text.encode()).root_node


def nodes(node: Node) -> Iterator[Node]:
    """Yield a node and all below it."""
    yield node
    for child in node.children:
        yield from nodes(child)


def mistakes(text: str) -> list[str]:
    """Return where the parser does not know on."""
    wrong = (one for one in nodes(tree(text)) if one.is_error or one.is_missing)
    return [f"line {one.start_point.row + 1}: {one.type}" for one in wrong]


def code() -> str:
    """Return the module without its comments."""
    return re.sub(r"<#.*?#>|^\s*#.*?$", "", MODULE, flags=re.MULTILINE | re.DOTALL)


def functions() -> dict[str, str]:
    """Return the text of every function by its name."""
    found = [one for one in nodes(tree(MODULE)) if one.type == "function_statement"]
    texts = [(one.text or b"").decode() for one in found]
    return {text.split()[1].partition("(")[0]: text for text in texts}


def test_the_parser_finds_mistakes() -> None:
    """What the next test rests on."""
    assert mistakes(MODULE.replace("[switch] $NoWait,", "[switch $NoWait,"))
    assert mistakes(MODULE.replace("    finally {", "    finally"))


def test_the_module_and_its_page_parse() -> None:
    """Without a mistake, and the module is ASCII, which every PowerShell reads alike.

    Fails when a bracket is left out.
    """
    assert not mistakes(MODULE)
    assert MODULE.isascii()
    blocks = re.findall(r"^```powershell\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks
    assert not [mistake for block in blocks for mistake in mistakes(block)]


def test_it_gives_what_the_page_says() -> None:
    """Its functions, with the parameters that the page names.

    Fails when a parameter gets another name on one side only.
    """
    texts = functions()
    exported = re.findall(r"'([\w-]+)'", MODULE[MODULE.index("Export-ModuleMember") :])
    assert set(exported) == EXPORTED
    for row in re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE):
        name = row.split()[0]
        named = set(re.findall(r"-([A-Z]\w*)\b", row.removeprefix(name)))
        assert named
        assert named <= set(re.findall(r"\$(\w+)", texts[name].partition("\n    )")[0]))


def test_its_options_are_those_of_run() -> None:
    """Fails when an option of `holdoff run` gets another name."""
    options = {option for one in run.params for option in one.opts}
    used = set(re.findall(r"'(--[\w-]+)'", code()))
    assert {"--token", "--wait", "--no-wait", "--job", "--division", "--endpoint"} <= used
    assert used <= options


@pytest.mark.parametrize("newer", [r"\?\?", r"\?\.", r"&&", r"\|\|", r"\s\?\s", r"\bclean\s*\{"])
def test_it_has_nothing_that_windows_powershell_lacks(newer: str) -> None:
    """Operators of PowerShell 7, which 5.1 does not parse.

    Fails when `-or` is written as `||`.
    """
    assert not re.search(newer, code())


@pytest.mark.parametrize("text", [MODULE, PAGE], ids=["module", "page"])
def test_a_windows_user_reads_first_what_was_not_tried(text: str) -> None:
    """Before any line to copy.

    Fails when the warning is taken out or moved down.
    """
    head = text[: text.index("Import-Module")].casefold()
    assert "windows" in head
    assert re.search(r"not tried|never been run", head)
