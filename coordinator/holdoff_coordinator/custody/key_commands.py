"""What `holdoff-coordinator key` does. No output contains a key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from holdoff._text import printable
from holdoff_coordinator.custody.key_files import KeyFileError, create_key, key_paths, read_key
from holdoff_coordinator.exits import EX_USAGE, fail

if TYPE_CHECKING:
    from pathlib import Path

_NEXT = """\
Next:
1. Copy the new file to the same directory of every replica; they read it without a restart or a
   signal. `holdoff-coordinator key list --key-dir {folder}` shows the same CHECK everywhere.
2. `holdoff grant rotate-keys` encrypts all grants with it. Until then the older key does so.
3. An hour later `holdoff grant rotate-keys --dry-run` shows which keys are still used. Remove a key
   only if no grant uses it, and no backup of the store that you may restore.\
"""
_FIELDS = ("id", "create_time", "check", "problem")


def generate(folder: Path, key_id: str | None) -> None:
    """Write a new key, and print its id."""
    try:
        key = create_key(folder, key_id)
    except KeyFileError as error:
        fail(EX_USAGE, str(error))
    click.echo(key.id)


def rotate(folder: Path, key_id: str | None) -> None:
    """Write a new key, print its id, and say what to do with it."""
    generate(folder, key_id)
    click.echo(_NEXT.format(folder=folder), err=True)


def list_keys(folder: Path, output: str) -> None:
    """List the keys of a directory, as a table or as JSON, also those that cannot be used."""
    try:
        found = [_row(path) for path in key_paths(folder)]
    except KeyFileError as error:
        fail(EX_USAGE, str(error))
    if output == "json":
        click.echo(json.dumps({"keys": found}))
        return
    line = "{id:20}  {create_time:20}  {check:16}  {problem}"
    heads = dict(zip(_FIELDS, ("ID", "CREATED", "CHECK", "PROBLEM"), strict=True))
    for row in (heads, *found):
        click.echo(printable(line.format(**row).rstrip()))


def _row(path: Path) -> dict[str, str]:
    try:
        key = read_key(path)
    except KeyFileError as error:
        return dict(zip(_FIELDS, (path.stem, "", "", str(error)), strict=True))
    return dict(zip(_FIELDS, (key.id, key.created, key.check, ""), strict=True))
