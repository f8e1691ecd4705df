"""`holdoff watch`: how tokens stand and what changes, as it happens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from holdoff import Client
from holdoff.cli._board import Board, View
from holdoff.cli._help import example
from holdoff.cli._live import (
    line,
    live_output_option,
    live_table,
    one_line,
    show_lines,
    show_table,
    wants_lines,
)
from holdoff.cli.output import resource
from holdoff.cli.params import Name
from holdoff.names import AppName, TokenName
from holdoff.v1 import lease_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from holdoff.cli._live import Part
    from holdoff.v1 import lease_service_pb2


@click.command(
    epilog=example(
        "holdoff watch",
        "holdoff watch apps/exact-nl/tokens/finance",
        "holdoff watch apps/exact-nl --output json",
    )
)
@click.argument("parent", type=Name(AppName, TokenName), required=False)
@live_output_option
@click.option("--resume", metavar="TOKEN", default="", help="Continue after this resume_token.")
@click.pass_obj
def watch(endpoint: str, parent: str | None, output: str, resume: str) -> None:
    """Watch all tokens, or PARENT: an app (apps/APP) or a token (apps/APP/tokens/TOKEN).

    On a terminal a live table shows their state, and the last changes below it. Ctrl-C ends it.

    Otherwise each line is a JSON document with a `kind`. The lines of kind `snapshot` up to a
    `snapshot_end` give the state of all tokens of an app, and replace earlier data about it. The
    other kinds are changes, such as `granted`, `released`, `expired` or `queue_moved`. With the
    last `resume_token` and the same PARENT, --resume misses no change; if that is no longer
    possible, a new snapshot follows.

    While the coordinator cannot be reached, the command retries. What is in custody is watched by
    `holdoff grant watch`.
    """
    as_lines = wants_lines(output)
    if resume and not as_lines:
        raise click.UsageError("--resume goes with --output json: a table begins with a snapshot")
    with Client(endpoint) as client:
        watched = partial(client.watch_leases, parent or "", resume_token=resume)
        if as_lines:
            show_lines(watched, documents)
        else:
            show_table(client.endpoint, watched, _Tokens(f" of {parent}" if parent else ""))


def documents(
    response: lease_service_pb2.WatchLeasesResponse, now: datetime
) -> Iterator[dict[str, Any]]:
    """Yield a message as documents of one token each.

    Args:
        response: The message.
        now: When it came; a snapshot does not say when it was made.
    """
    resumable = {"resume_token": response.resume_token} if response.resume_token else {}
    match response.WhichOneof("event"):
        case "snapshot":
            snapshot, time = response.snapshot, f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"
            for status in snapshot.tokens:
                yield {"kind": "snapshot", "time": time, **resource(status)}
            if snapshot.last:
                yield {"kind": "snapshot_end", "time": time, "app": snapshot.app, **resumable}
        case "change":
            change = response.change
            yield {
                "kind": _kind(change),
                "time": change.time.ToJsonString(),
                **resource(change.status),
                **resumable,
            }
        case _:  # it only says that we are connected again
            return


def _kind(change: lease_pb2.Change) -> str:
    kinds = lease_pb2.ChangeKind.DESCRIPTOR.values_by_number
    if change.kind not in kinds:
        return f"unknown_{change.kind}"
    return kinds[change.kind].name.removeprefix("CHANGE_KIND_").lower()


class _Tokens:
    """The board of tokens, as tables.

    Args:
        whose: Of which app, or that it is one token, for people.
    """

    def __init__(self, whose: str) -> None:
        self.nothing = f"no tokens{whose}"
        self._board = Board()

    def take(self, response: lease_service_pb2.WatchLeasesResponse, now_ns: int) -> None:
        """Take in a message."""
        self._board.take(response, now_ns)

    def picture(self, height: int, now_ns: int) -> Sequence[Part]:
        """Return what fits into so many lines."""
        view = self._board.view(height, now_ns)
        parts: list[Part] = []
        if view.rows:
            parts.append(partial(_table, view))
        if view.more:
            parts.append(line(f"… and {view.more} more"))
        if view.changes:
            parts += [Text(), partial(_changes, view)]
        return parts


def _table(view: View, *, short: bool) -> Table:
    rows = (
        (
            _short(row.token) if short else row.token,
            *(row.state, row.holder, row.held, row.left, row.waiters),
        )
        for row in view.rows
    )
    headings = ("TOKEN", "STATE", "HOLDER", "HELD", "LEFT", "WAITERS")
    return live_table(headings, rows, yielding=("TOKEN", "HOLDER"))


def _changes(view: View, *, short: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False, style="dim")
    for index in range(4):
        table.add_column(no_wrap=index < 2)  # noqa: PLR2004 - the time and the kind
    for time, kind, token, details in view.changes:
        name = _short(token) if short else token
        table.add_row(*map(one_line, (time, kind, name, details)))
    return table


def _short(token: str) -> str:
    name = TokenName.parse(token)
    return f"{name.app}/{name.token}"
