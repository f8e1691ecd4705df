"""What commands print: tables and records for people, JSON for programs."""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypedDict, TypeVar

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from holdoff._text import printable
from holdoff.durations import format_duration
from holdoff.v1 import lease_pb2, token_pb2

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

NOTHING = "-"

_STYLES = {
    "free": "green",
    "held": "cyan",
    "active": "cyan",
    "offered": "cyan",
    "cooling": "yellow",
    "breaking": "yellow",
    "paused": "yellow",
    "renewal late": "red",
    "silent": "yellow",
    "expired": "red",
    "broken": "red",
    "backing off": "red",
    "quarantined": "red",
    "quiet": "red",
    "probing": "yellow",
    "reopening": "yellow",
    "open": "green",
    "low": "yellow",
    "spent": "red",
}

# Wider than any row: without a terminal nothing is cut or wrapped, so that `grep` and `cut` work.
UNLIMITED_WIDTH = 100_000


class _ColumnOptions(TypedDict):
    min_width: int
    no_wrap: bool


def choose_output(formats: Sequence[str], what: str) -> Callable[[FunctionT], FunctionT]:
    """Give a command the option for its output, which is a table by default."""
    return click.option(
        "--output",
        "-o",
        type=click.Choice(formats),
        default="table",
        envvar="HOLDOFF_OUTPUT",
        show_envvar=True,
        show_default=True,
        help=what,
    )


output_option = choose_output(("table", "json"), "A table for people, or one JSON document.")


def emit_json(document: Any) -> None:
    """Print one JSON document, in ASCII and therefore harmless to every terminal."""
    click.echo(json.dumps(document, indent=2))


def emit_json_line(document: Any) -> None:
    """Print one JSON document on a line of its own, at once."""
    click.echo(json.dumps(document))


def resource(message: Message) -> dict[str, Any]:
    """A resource as JSON: snake_case, with the defaults of fields that cannot be absent.

    As in all of protobuf's JSON, 64-bit numbers and durations are strings.
    """
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def emit_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table.

    On a terminal its texts are folded between words. A word is whole in any case, since it may be a
    name to copy: a table that does not fit then is wider than the terminal. Elsewhere nothing is
    folded.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    known = list(rows)
    for heading, *texts in zip(headings, *known, strict=True):
        table.add_column(heading, **_whole_words(heading.replace(" ", "_"), *texts))
    for row in known:
        table.add_row(*map(cell, row))
    _print(table)


def emit_record(fields: Iterable[tuple[str, str]]) -> None:
    """Print one resource, a line for each of its fields that has a value."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    known = [(printable(heading), value) for heading, value in fields if value != NOTHING]
    table.add_column(style="bold", no_wrap=True, min_width=max(len(one) for one, _ in known))
    table.add_column(**_whole_words(*(value for _, value in known)))
    for heading, value in known:
        table.add_row(Text(heading), cell(value))
    _print(table)


def _whole_words(*texts: str) -> _ColumnOptions:
    """How wide a column is at least, and whether it may be narrower than its texts."""
    printed = [printable(text) for text in texts]
    longest = max((cell_len(word) for text in printed for word in text.split()), default=0)
    return {"min_width": longest, "no_wrap": longest == max(map(cell_len, printed))}


def duration_text(message: Message, field: str) -> str:
    """A duration for people, such as `9m28s`; NOTHING where the field is absent."""
    if not message.HasField(field):
        return NOTHING
    return format_duration(Decimal(getattr(message, field).ToNanoseconds()) / 10**9)


def local_times(lease: lease_pb2.Lease, *fields: str) -> list[str]:
    """Times of a lease for a table, in the local zone: the date where it differs from the last."""
    texts, date = [], None
    for field in fields:
        if not lease.HasField(field):  # type: ignore[arg-type] # any of the lease's times
            texts.append(NOTHING)
            continue
        local: datetime = getattr(lease, field).ToDatetime(UTC).astimezone()
        texts.append(f"{local:%H:%M:%S}" if local.date() == date else f"{local:%Y-%m-%d %H:%M:%S}")
        date = local.date()
    return texts


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


def labels_text(holder: lease_pb2.Holder) -> str:
    """A holder's labels, in order; NOTHING where there are none."""
    return ", ".join(f"{key}={text}" for key, text in sorted(holder.labels.items())) or NOTHING


def state_text(token: token_pb2.Token | lease_pb2.TokenStatus) -> str:
    """What a token waits for, in a word: `held`, `cooling`, or `free`."""
    if token.wait_reason == lease_pb2.WAIT_REASON_UNSPECIFIED:
        return "free"
    return enum_text(token, "wait_reason")


def lease_state_text(lease: lease_pb2.Lease) -> str:
    """Where a lease is in its life: of an active one what keeps its holder from going on."""
    runs = (lease_pb2.HOLDER_ACTIVITY_UNSPECIFIED, lease_pb2.HOLDER_ACTIVITY_RUNNING)
    return enum_text(lease, "state" if lease.activity in runs else "activity")


def held_text(lease: lease_pb2.Lease) -> str:
    """How long a lease is or was held, by the store's clock alone: ours may differ from it."""
    if not lease.HasField("accept_time"):
        return NOTHING
    if lease.HasField("end_time"):
        until_ns = lease.end_time.ToNanoseconds()
    else:
        until_ns = lease.expire_time.ToNanoseconds() - lease.remaining.ToNanoseconds()
    return format_duration(Decimal(until_ns - lease.accept_time.ToNanoseconds()) / 10**9)


def cell(value: str) -> Text:
    """Text for a table, harmless whatever is in it, with the colour of the state that it names."""
    return Text(printable(value), style=_STYLES.get(value, ""))


def _print(table: Table) -> None:
    console = Console()
    width = UNLIMITED_WIDTH
    if console.is_terminal:
        unlimited = console.options.update(max_width=UNLIMITED_WIDTH)
        width = max(console.width, Measurement.get(console, unlimited, table).minimum)
    console = Console(width=width)
    # Not printed by rich itself, which ends the process with 1 when its reader has gone away.
    with console.capture() as capture:
        console.print(table, crop=False)
    lines = (line.rstrip() for line in capture.get().splitlines())
    click.echo("\n".join(lines), color=console.is_terminal)
