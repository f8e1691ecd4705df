"""What commands print: tables and records for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdoff._text import printable
from holdoff.durations import format_duration
from holdoff.v1 import lease_pb2

NOTHING = "-"

_STYLES = {
    "free": "green",
    "held": "cyan",
    "active": "cyan",
    "cooling": "yellow",
    "breaking": "yellow",
    "backing off": "red",
    "quarantined": "red",
}

# Wider than any row: without a terminal nothing is cut or wrapped, so that `grep` and `cut` work.
_UNLIMITED_WIDTH = 100_000

output_option = click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json"]),
    default="table",
    envvar="HOLDOFF_OUTPUT",
    show_envvar=True,
    show_default=True,
    help="A table for people, or one JSON document.",
)


def emit_json(document: Any) -> None:
    """Print one JSON document, in ASCII and therefore harmless to every terminal."""
    click.echo(json.dumps(document, indent=2))


def resource(message: Message) -> dict[str, Any]:
    """A resource as JSON: snake_case, with the defaults of fields that cannot be absent.

    As in all of protobuf's JSON, 64-bit numbers and durations are strings.
    """
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def emit_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, folded to the width of a terminal and as wide as need be without one."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    _print(table)


def emit_record(fields: Iterable[tuple[str, str]]) -> None:
    """Print one resource, a line for each of its fields that has a value."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, value in fields:
        if value != NOTHING:
            table.add_row(heading, _cell(value))
    _print(table)


def duration_text(message: Message, field: str) -> str:
    """A duration for people, such as `9m28s`; NOTHING where the field is absent."""
    if not message.HasField(field):
        return NOTHING
    return format_duration(Decimal(getattr(message, field).ToNanoseconds()) / 10**9)


def time_text(message: Message, field: str) -> str:
    """A time for people, in the local zone with its offset; NOTHING where the field is absent."""
    if not message.HasField(field):
        return NOTHING
    local: datetime = getattr(message, field).ToDatetime(UTC).astimezone()
    return local.isoformat(" ", "seconds")


def enum_text(message: Message, field: str) -> str:
    """An enum's value for people: `LEASE_STATE_ACTIVE` becomes `active`."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    number = getattr(message, field)
    if kind is None or number not in kind.values_by_number:
        return f"unknown ({number})"  # of a newer coordinator
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return kind.values_by_number[number].name.removeprefix(prefix).lower().replace("_", " ")


def holder_text(holder: lease_pb2.Holder) -> str:
    """Who holds a lease, short."""
    return f"{holder.job or holder.user or 'unnamed'} on {holder.host or 'an unnamed host'}"


def _cell(value: str) -> Text:
    return Text(printable(value), style=_STYLES.get(value, ""))


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_UNLIMITED_WIDTH)
    # Not printed by rich itself, which ends the process with 1 when its reader has gone away.
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    click.echo("\n".join(lines), color=console.is_terminal)
