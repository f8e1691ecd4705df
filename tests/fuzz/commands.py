"""Arguments of `holdoff`.

An input is arguments, with NUL between them. The examples in the help of each command are what it
begins with, so that a new command is found by itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import click
from click.testing import CliRunner

from holdoff import testing
from holdoff.cli import _COMMANDS, exits, main
from holdoff.cli._help import examples_of
from tests.fuzz.engine import Target, edited, files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.engine import Check

CODES = {int(code) for code, _ in exits.TABLE if code.isdecimal()} - {exits.INTERNAL}
TOKEN = "apps/exact-nl/tokens/finance"
PARSED = {"run", "watch", "serve", "simulator"}
"""Words of commands that run something else, or for ever: only their arguments are read."""
WORDS = [
    *(b"\0", b"\0--", b"\0-", b"\0\0", b"--help", b"--output\0json", b"--limit\0000", b"\0--at\0"),
    *(
        b"\0--since\0",
        b"\0--for\0",
        b"\0--reason\0",
        b"\0--label\0a=b",
        b"\0--status\0",
        b"=",
        b"/",
    ),
    *(
        b"1e999s",
        b"99999999999999999999",
        b"-1",
        b"0",
        b"9999-12-31T23:59:59Z",
        b"0001-01-01",
        b"@0",
    ),
    *(
        b"2h ago",
        b"03:10",
        b"\xff",
        b"\x1b[2J",
        "\u202e\u0661".encode(),
        b"x" * 5000,
        b"\n",
        b"%s{}",
    ),
    *(
        b"apps/a/tokens/b",
        b"*",
        b"\0--endpoint\0unix:/x",
        b"\0-o\0table",
        b"--wait=1h",
        b"[red]",
        b"'",
    ),
]


def examples(group: click.Group) -> Iterator[list[str]]:
    """Yield the arguments in all examples of a group's commands."""
    context = click.Context(group)
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])
        for line in examples_of(command) if command else ():
            yield shlex.split(line)[1:]
        if isinstance(command, click.Group):
            yield from examples(command)


VALID = [os.fsencode("\0".join(one)) for one in examples(main)]
assert {one.partition(b"\0")[0].decode() for one in VALID} >= set(_COMMANDS)


@contextlib.contextmanager
def opened() -> Iterator[Check]:
    """Give a coordinator; a command ends with a documented code, and without a traceback."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdoff-fuzz-")))
        stack.enter_context(contextlib.chdir(folder))
        environment = {
            "HOLDOFF_ENDPOINT": stack.enter_context(testing.coordinator()),
            "XDG_STATE_HOME": str(folder),
        }
        stack.enter_context(mock.patch.dict(os.environ, environment))
        runner = CliRunner()
        # Of a token that was never held.
        assert runner.invoke(main, ["token", "create", TOKEN]).exit_code == exits.OK

        def check(data: bytes) -> None:
            arguments = os.fsdecode(data).split("\0")
            if PARSED & set(arguments):
                with contextlib.suppress(click.ClickException, click.exceptions.Exit):
                    parse(main, arguments)
                return
            result = runner.invoke(main, arguments, input="y\n")
            assert result.exit_code in CODES, f"{result.exit_code}: {result.output[-3000:]}"
            assert "Traceback" not in result.output
            if result.exit_code == exits.USAGE:
                assert "holdoff: " in result.output or "Usage: " in result.output
            assert "\x1b" not in result.stderr.replace("\x1b[?25", "")

        yield check


def parse(command: click.Command, arguments: list[str]) -> None:
    """Read the arguments of a command, and of the one that it leads to."""
    with contextlib.redirect_stdout(None), command.make_context("x", arguments) as context:
        rest = [*context._protected_args, *context.args]
        if isinstance(command, click.Group) and rest:
            _, found, rest = command.resolve_command(context, rest)
            if found:
                parse(found, rest)


TARGETS = {"commands": Target(edited(files("commands", *VALID), WORDS), opened)}
