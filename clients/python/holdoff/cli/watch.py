"""`holdoff watch`: how tokens stand and what changes, as it happens."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from holdoff import Client, Unavailable
from holdoff._platform import boottime_ns
from holdoff._text import printable
from holdoff.cli import exits
from holdoff.cli._board import Board, View
from holdoff.cli._help import example
from holdoff.cli._waiting import say
from holdoff.cli.output import UNLIMITED_WIDTH, cell, emit_json_line, resource
from holdoff.cli.params import Name
from holdoff.names import AppName, TokenName
from holdoff.v1 import lease_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.v1 import lease_service_pb2

_TICK_SECONDS = 1.0
_INBOX_SIZE = 1000


@click.command(
    epilog=example(
        "holdoff watch",
        "holdoff watch apps/exact-nl/tokens/finance",
        "holdoff watch apps/exact-nl --output json",
    )
)
@click.argument("parent", type=Name(AppName, TokenName), required=False)
@click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json"]),
    default="table",
    envvar="HOLDOFF_OUTPUT",
    show_envvar=True,
    show_default=True,
    help="A live table, or JSON lines. Without a terminal it is JSON lines anyway.",
)
@click.option("--resume", metavar="TOKEN", default="", help="Go on after this resume_token.")
@click.pass_obj
def watch(endpoint: str, parent: str | None, output: str, resume: str) -> None:
    """Watch all tokens, or PARENT: an app (apps/APP) or a token (apps/APP/tokens/TOKEN).

    On a terminal a live table shows how they stand, and the last changes under it. Ctrl-C ends it.

    Else each line is a JSON document with a `kind`. The lines of kind `snapshot` up to a
    `snapshot_end` say how all tokens of an app stand, and replace what was known of it. The other
    kinds are changes, such as `granted`, `released`, `expired` or `queue_moved`. With the last
    `resume_token` and the same PARENT, --resume misses none; when that is not possible any more a
    fresh snapshot comes.

    While the coordinator cannot be reached, watching goes on trying.
    """
    as_json = output == "json" or not sys.stdout.isatty()
    if resume and not as_json:
        raise click.UsageError("--resume goes with --output json: a table begins with a snapshot")
    with Client(endpoint) as client:
        if as_json:
            _print_lines(client, parent or "", resume)
        else:
            _show_table(client, parent or "")


# JSON lines


def _print_lines(client: Client, parent: str, resume_token: str) -> None:
    said = False

    def unreachable(error: Unavailable) -> None:
        nonlocal said
        if not said:
            say(f"{error}; trying on")
        said = True

    watched = client.watch_leases(parent, resume_token=resume_token, on_unreachable=unreachable)
    with contextlib.closing(watched):
        for response in watched:
            said = False
            for document in documents(response, datetime.now(UTC)):
                emit_json_line(document)


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


# Live table


def _show_table(client: Client, parent: str) -> None:
    """Draw until interrupted.

    Raises:
        HoldoffError: The watch failed for good.
    """
    # Bounded: one who draws slowly is a slow reader, whom the coordinator gives a fresh snapshot.
    inbox: queue.Queue[lease_service_pb2.WatchLeasesResponse | Exception] = queue.Queue(_INBOX_SIZE)

    def listen() -> None:
        try:
            for response in client.watch_leases(parent, on_unreachable=inbox.put):
                inbox.put(response)
        except Exception as error:  # noqa: BLE001 - raised again where somebody sees it
            inbox.put(error)

    screen = _Screen(client.endpoint, f" of {parent}" if parent else "")
    with _ended_by_sigterm(), contextlib.closing(screen), screen.live:
        threading.Thread(target=listen, daemon=True).start()
        while True:
            with contextlib.suppress(queue.Empty):
                screen.take(inbox.get(timeout=_TICK_SECONDS))
                for _ in range(_INBOX_SIZE):
                    screen.take(inbox.get_nowait())
            screen.draw()


class _Screen:
    """The board on a terminal, and since when nobody has answered."""

    def __init__(self, endpoint: str, whose: str) -> None:
        self._endpoint = endpoint
        self._whose = whose
        self._board = Board()
        self._trouble: Unavailable | None = None
        self._since = ""
        self._heard = False
        self._console = Console()
        self._size = self._console.size
        self.live = Live(console=self._console, auto_refresh=False)

    def close(self) -> None:
        """Show the cursor again, also when the end came while the table was being started."""
        self._console.show_cursor()

    def take(self, item: lease_service_pb2.WatchLeasesResponse | Exception) -> None:
        """Take in a message, or that nobody answered.

        Raises:
            Exception: The watch failed for good.
        """
        match item:
            case Unavailable():
                if self._trouble is None:
                    self._since = f"{datetime.now().astimezone():%H:%M:%S}"
                self._trouble = item
            case Exception():
                raise item
            case _:
                self._trouble, self._heard = None, True
                self._board.take(item, boottime_ns())

    def draw(self) -> None:
        """Draw, on a screen that may have another size by now."""
        if self._size != self._console.size:
            # What the terminal made of the old lines is anybody's guess.
            self._size = self._console.size
            self.live.stop()
            self._console.clear()
            self.live.start()
        self.live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        view = self._board.view(self._size.height - (1 if self._trouble else 0), boottime_ns())
        parts: list[Table | Text] = []
        if view.rows:
            parts.append(self._fitted(_table(view), _table(view, short=True)))
        elif self._heard:
            parts.append(_line(f"no tokens{self._whose}"))
        elif not self._trouble:
            parts.append(_line(f"asking {self._endpoint}"))
        if view.more:
            parts.append(_line(f"… and {view.more} more"))
        if view.changes:
            parts += [Text(), self._fitted(_changes(view), _changes(view, short=True))]
        if self._trouble:
            what = self._trouble if self._trouble.reason else f"no answer from {self._endpoint}"
            parts.append(_line(f"since {self._since}: {what}; trying on", "bold red"))
        return Group(*parts)

    def _fitted(self, table: Table, narrower: Table) -> Table:
        unlimited = self._console.options.update(max_width=UNLIMITED_WIDTH)
        needed = Measurement.get(self._console, unlimited, table).maximum
        return table if needed <= self._size.width else narrower


def _table(view: View, *, short: bool = False) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("TOKEN", "STATE", "HOLDER", "HELD", "LEFT", "WAITERS"):
        # Names give way where the terminal is narrow, numbers don't.
        table.add_column(heading, no_wrap=heading not in {"TOKEN", "HOLDER"})
    for row in view.rows:
        name = _short(row.token) if short else row.token
        texts = (name, row.state, row.holder, row.held, row.left, row.waiters)
        table.add_row(*map(_one_line, texts))
    return table


def _changes(view: View, *, short: bool = False) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False, style="dim")
    for index in range(4):
        table.add_column(no_wrap=index < 2)  # noqa: PLR2004 - the time and the kind
    for time, kind, token, details in view.changes:
        name = _short(token) if short else token
        table.add_row(*map(_one_line, (time, kind, name, details)))
    return table


def _short(token: str) -> str:
    name = TokenName.parse(token)
    return f"{name.app}/{name.token}"


def _one_line(value: str) -> Text:
    text = cell(value)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _line(value: str, style: str = "") -> Text:
    return Text(printable(value), style=style, no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Leave a terminal as it was, with a cursor, also after a SIGTERM."""

    def end(signum: int, _: object) -> None:
        raise click.exceptions.Exit(exits.SIGNAL_BASE + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
