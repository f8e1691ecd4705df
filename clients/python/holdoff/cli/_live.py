"""What the commands that watch show: a table that follows what comes, or lines of JSON."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import click
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from holdoff import Unavailable
from holdoff._platform import boottime_ns
from holdoff._text import printable
from holdoff.cli import exits
from holdoff.cli._voice import say
from holdoff.cli.output import UNLIMITED_WIDTH, cell, emit_json_line

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

ResponseT = TypeVar("ResponseT")
ResponseT_co = TypeVar("ResponseT_co", covariant=True)
ResponseT_contra = TypeVar("ResponseT_contra", contravariant=True)

_TICK_SECONDS = 1.0
_INBOX_SIZE = 1000

live_output_option = click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json"]),
    default="table",
    envvar="HOLDOFF_OUTPUT",
    show_envvar=True,
    show_default=True,
    help="A live table, or JSON lines. Without a terminal it is JSON lines anyway.",
)


class Draw(Protocol):
    """Draws a table, with shorter texts where the terminal is too narrow for it."""

    def __call__(self, *, short: bool) -> Table: ...


Part: TypeAlias = Text | Draw
"""A line, or a table."""


class Watch(Protocol[ResponseT_co]):
    """Begins a watch."""

    def __call__(
        self, *, on_unreachable: Callable[[Unavailable], None]
    ) -> Generator[ResponseT_co, None, None]: ...


class Board(Protocol[ResponseT_contra]):
    """How all that is watched stands."""

    nothing: str
    """What to say where there is nothing."""

    def take(self, response: ResponseT_contra, now_ns: int, /) -> None:
        """Take in a message that came at this time, of any clock that runs steadily."""

    def picture(self, height: int, now_ns: int, /) -> Sequence[Part]:
        """Return what fits into so many lines, the last of which is the cursor's."""


def wants_lines(output: str) -> bool:
    """Whether lines of JSON are wanted."""
    return output == "json" or not sys.stdout.isatty()


def show_lines(
    watch: Watch[ResponseT],
    documents: Callable[[ResponseT, datetime], Iterable[dict[str, Any]]],
) -> None:
    """Print lines until interrupted, and once that nobody answers.

    Raises:
        HoldoffError: The watch failed for good.
    """
    said = False

    def unreachable(error: Unavailable) -> None:
        nonlocal said
        if not said:
            say(f"{error}; retrying")
        said = True

    with contextlib.closing(watch(on_unreachable=unreachable)) as watched:
        for response in watched:
            said = False
            for document in documents(response, datetime.now(UTC)):
                emit_json_line(document)


def show_table(endpoint: str, watch: Watch[ResponseT], board: Board[ResponseT]) -> None:
    """Draw until interrupted.

    Raises:
        HoldoffError: The watch failed for good.
    """
    # Bounded: one who draws slowly is a slow reader, whom the coordinator does not wait for.
    inbox: queue.Queue[ResponseT | Exception] = queue.Queue(_INBOX_SIZE)

    def listen() -> None:
        try:
            for response in watch(on_unreachable=inbox.put):
                inbox.put(response)
        except Exception as error:  # noqa: BLE001 - raised again where somebody sees it
            inbox.put(error)

    screen = _Screen(endpoint, board)
    with sigterm() as ended, contextlib.closing(screen), screen.live:
        threading.Thread(target=listen, daemon=True).start()
        while not ended.is_set():
            with contextlib.suppress(queue.Empty):
                screen.take(inbox.get(timeout=_TICK_SECONDS))
                for _ in range(_INBOX_SIZE):
                    screen.take(inbox.get_nowait())
            screen.draw()
    raise click.exceptions.Exit(exits.SIGNAL_BASE + signal.SIGTERM)


class _Screen(Generic[ResponseT]):
    """A board on a terminal, and since when nobody has answered."""

    def __init__(self, endpoint: str, board: Board[ResponseT]) -> None:
        self._endpoint = endpoint
        self._board = board
        self._trouble: Unavailable | None = None
        self._since = ""
        self._heard = False
        self._console = Console()
        self._size = self._console.size
        self.live = Live(console=self._console, auto_refresh=False)

    def close(self) -> None:
        """Show the cursor again, also when the end came while the table was being started."""
        self._console.show_cursor()

    def take(self, item: ResponseT | Exception) -> None:
        """Take in a message, or that nobody answered.

        Raises:
            Exception: The watch failed for good.
        """
        if isinstance(item, Unavailable):
            if self._trouble is None:
                self._since = f"{datetime.now().astimezone():%H:%M:%S}"
            self._trouble = item
        elif isinstance(item, Exception):
            raise item
        else:
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
        height = self._size.height - (1 if self._trouble else 0)
        parts = list(self._board.picture(height, boottime_ns()))
        if not parts and self._heard:
            parts.append(line(self._board.nothing))
        elif not parts and not self._trouble:
            parts.append(line(f"asking {self._endpoint}"))
        if self._trouble:
            what = self._trouble if self._trouble.reason else f"no answer from {self._endpoint}"
            parts.append(line(f"since {self._since}: {what}; retrying", "bold red"))
        return Group(*(part if isinstance(part, Text) else self._fitted(part) for part in parts))

    def _fitted(self, draw: Draw) -> Table:
        table = draw(short=False)
        unlimited = self._console.options.update(max_width=UNLIMITED_WIDTH)
        needed = Measurement.get(self._console, unlimited, table).maximum
        return table if needed <= self._size.width else draw(short=True)


def live_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, yielding: Sequence[str]
) -> Table:
    """Make a table of one-line cells.

    Args:
        headings: Of the columns.
        rows: What stands in them.
        yielding: The columns that give way where the terminal is narrow.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=heading not in yielding)
    for row in rows:
        table.add_row(*map(one_line, row))
    return table


def one_line(value: str) -> Text:
    """Text for a cell that is cut where it does not fit."""
    text = cell(value)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def line(value: str, style: str = "") -> Text:
    """A line of its own."""
    return Text(printable(value), style=style, no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """Say that a SIGTERM came, so that the terminal is left as it was, with a cursor.

    An exception out of the handler would come in the midst of whatever is being drawn.
    """
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
