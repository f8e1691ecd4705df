"""Write a man page for every command of both programs, from what their --help says.

Usage: python scripts/manpages.py FOLDER; then `man -M FOLDER holdoff-run`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdoff.cli import exits
from holdoff.cli import main as holdoff
from holdoff.cli._help import examples_of
from holdoff_coordinator.cli import main as coordinator
from holdoff_coordinator.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Terms = tuple[tuple[str, str], ...]

PROGRAMS: dict[str, click.Group] = {"holdoff": holdoff, "holdoff-coordinator": coordinator}

EXITS: dict[str, Terms] = {
    "holdoff": exits.TABLE,
    "holdoff-coordinator": (
        ("0", "stopped by SIGTERM or SIGINT"),
        ("64", "wrong usage, or a setting that cannot be"),
        ("69", "the store, its directory or the address cannot be used"),
    ),
}

ENVIRONMENT: dict[str, Terms] = {
    "holdoff-coordinator": (
        ("HOLDOFF_*", "Every option of a command: --data-dir is HOLDOFF_DATA_DIR."),
    ),
    "holdoff run": (
        ("HOLDOFF_TOKEN", "Given to the command: the token that is held."),
        ("HOLDOFF_LEASE", "Given to the command: the name of its lease."),
        ("HOLDOFF_FENCING_TOKEN", "Given to the command: the fencing token of its lease."),
        ("HOLDOFF_REPORT_KEY", "Given to the command: the key that its HOLDOFF-ERROR lines need."),
        ("XDG_STATE_HOME", "Where the highest fencing tokens are remembered; see FILES."),
    ),
}

FILES: dict[str, Terms] = {
    "holdoff": (
        (
            "~/.local/state/holdoff/fencing/",
            "The highest fencing tokens seen by this user; or under XDG_STATE_HOME.",
        ),
    ),
    "holdoff-coordinator": (
        (
            "/var/lib/holdoff/",
            "The embedded store of root; of others: ~/.local/state, or XDG_STATE_HOME.",
        ),
    ),
}


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Yield a context, and one for every command below it."""
    yield context
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            _, command, _ = group.resolve_command(context, [name])
            assert command is not None, name  # noqa: S101 - the group itself named it
            yield from contexts(click.Context(command, parent=context, info_name=name))


def all_contexts() -> Iterator[click.Context]:
    """Yield a context for every command of both programs."""
    for name, program in PROGRAMS.items():
        yield from contexts(click.Context(program, info_name=name))


def page_name(context: click.Context) -> str:
    """Return the name of a command's page, such as `holdoff-token-create`."""
    return context.command_path.replace(" ", "-")


def page(context: click.Context, date: str) -> str:
    """Write the page of a command.

    Args:
        context: Of the command.
        date: Such as 2026-11-24.
    """
    command, name = context.command, page_name(context)
    program = context.find_root().info_name or ""
    summary = command.get_short_help_str(limit=200).rstrip(".")
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH "{name.upper()}" 1 {date} "Holdoff {version("holdoff")}" "Holdoff manual"',
        *(".SH NAME", f"{_text(name)} \\- {_text(summary)}"),
        *(".SH SYNOPSIS", f".B {_text(context.command_path)}", _text(usage)),
        *(".SH DESCRIPTION", *_description(command)),
        *_terms("OPTIONS", _options(context)),
    ]
    if isinstance(command, click.Group):
        below = [one for one in contexts(context) if one.parent is context]
        lines += _terms(
            "COMMANDS",
            [(f"{page_name(one)}(1)", one.command.get_short_help_str(limit=200)) for one in below],
        )
    lines += _terms("EXIT STATUS", EXITS[program])
    lines += _terms("ENVIRONMENT", _environment(context))
    lines += _terms("FILES", FILES[program])
    if examples := examples_of(command):
        lines += [".SH EXAMPLES", ".nf", *map(_text, examples), ".fi"]
    if context.parent:
        lines += [".SH SEE ALSO", f".BR {_text(page_name(context.parent))} (1)"]
    return "\n".join(lines) + "\n"


def _description(command: click.Command) -> Iterator[str]:
    text = inspect.cleandoc(command.help or "").partition("Example:")[0]
    for number, paragraph in enumerate(re.split(r"\n{2,}", text.strip())):
        if number:
            yield ".PP"
        if paragraph.startswith("\b\n"):
            yield from (".nf", *map(_text, paragraph.splitlines()[1:]), ".fi")
        else:
            yield from map(_text, paragraph.splitlines())


def _options(context: click.Context) -> list[tuple[str, str]]:
    options = (one for one in context.command.get_params(context) if isinstance(one, click.Option))
    return [record for option in options if (record := option.get_help_record(context))]


def _environment(context: click.Context) -> list[tuple[str, str]]:
    """What the command reads, what the whole program reads, and what is said above."""
    program = context.find_root()
    found: dict[str, str] = {}
    for command in (context.command, program.command):
        for param in command.params:
            variable = param.envvar
            if program.info_name == "holdoff-coordinator" and param.name in Settings.model_fields:
                variable = f"HOLDOFF_{param.name.upper()}"
            if isinstance(variable, str) and isinstance(param, click.Option):
                found.setdefault(variable, f"The same as {param.opts[0]}.")
    of_program = ENVIRONMENT.get(program.info_name or "", ()) if not found else ()
    return [*found.items(), *ENVIRONMENT.get(context.command_path, of_program)]


def _terms(heading: str, terms: Sequence[tuple[str, str]]) -> list[str]:
    if not terms:
        return []
    lines = [f".SH {heading}"]
    for term, explanation in terms:
        lines += [".TP", f".B {_text(term)}", _text(" ".join(explanation.split()))]
    return lines


def _text(line: str) -> str:
    """Escape a line for roff: a hyphen stays one that can be copied, no line is a request."""
    escaped = line.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def write(folder: Path) -> list[Path]:
    """Write all pages into `folder`/man1, and return them."""
    # Reproducible where the builder says when it is: https://reproducible-builds.org/specs
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    section = folder / "man1"
    section.mkdir(parents=True, exist_ok=True)
    paths = []
    for context in all_contexts():
        path = section / f"{page_name(context)}.1"
        path.write_text(page(context, f"{now:%Y-%m-%d}"), encoding="utf-8")
        paths.append(path)
    return paths


def main() -> None:
    """Write the pages."""
    folder = Path(sys.argv[1])
    print(f"{len(write(folder))} pages: man -M {folder} holdoff")


if __name__ == "__main__":
    main()
