"""Exit codes of `holdoff-coordinator`, the same as those of `holdoff`, and its last words."""

from typing import NoReturn

import click

from holdoff._text import printable_lines
from holdoff_coordinator.journal import with_priority

EX_USAGE = 64
EX_CANNOT_SERVE = 69
EX_OUTPUT_LOST = 74


def fail(code: int, message: str) -> NoReturn:
    """Say in one line what is wrong, and exit."""
    click.echo(with_priority("error", f"holdoff-coordinator: {printable_lines(message)}"), err=True)
    raise SystemExit(code)
