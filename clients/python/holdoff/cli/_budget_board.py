"""What `holdoff budget watch` shows, worked out from messages alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.text import Text

from holdoff.cli._budgets import back_off_state_text, optional_holder_text, used_text
from holdoff.cli._live import line, live_table
from holdoff.cli.output import NOTHING, enum_text, resource
from holdoff.durations import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from rich.table import Table

    from holdoff.cli._live import Part
    from holdoff.v1 import budget_pb2, budget_service_pb2

ItemT = TypeVar("ItemT")

_BACK_OFFS = ("BACK-OFF", "LEFT", "SCOPE", "DIVISION", "ENDPOINT", "BY", "WHY")
_BUDGETS = ("BUDGET", "STATE", "USED", "ROOM", "ROOM IN", "SCOPE", "DIVISION", "ENDPOINT")
_YIELDING = ("SCOPE", "DIVISION", "ENDPOINT", "BY", "WHY")


def documents(
    response: budget_service_pb2.WatchBudgetsResponse, now: datetime
) -> Iterator[dict[str, Any]]:
    """Yield a message as documents of one budget or back-off each.

    Args:
        response: The message.
        now: When it came.
    """
    time = f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"
    for back_off in response.back_offs:
        yield {"kind": "back_off", "time": time, "back_off": resource(back_off)}
    for budget in response.budgets:
        yield {"kind": "budget", "time": time, "budget": resource(budget)}
    if response.snapshot_end:
        yield {"kind": "snapshot_end", "time": time}


class BudgetBoard:
    """How back-offs and budgets stand. What comes is as old as the message, so it ages from there.

    Args:
        whose: Of which app or token, for people.
    """

    def __init__(self, whose: str) -> None:
        self.nothing = f"no back-offs, and no budgets in use{whose}"
        self._back_offs: dict[str, tuple[budget_pb2.BackOff, int]] = {}
        self._budgets: dict[str, tuple[budget_pb2.Budget, int]] = {}

    def take(self, response: budget_service_pb2.WatchBudgetsResponse, now_ns: int) -> None:
        """Take in a message that came at this time, of any clock that runs steadily."""
        for back_off in response.back_offs:
            self._back_offs.pop(back_off.name, None)
            if back_off.state:
                self._back_offs[back_off.name] = back_off, now_ns
        for budget in response.budgets:
            self._budgets.pop(budget.name, None)
            if budget.used or budget.reserved:
                self._budgets[budget.name] = budget, now_ns

    def picture(self, height: int, now_ns: int) -> Sequence[Part]:
        """Return what fits into so many lines: back-offs, and the tightest budgets under them."""
        back_offs = sorted(
            self._back_offs.values(),
            key=lambda known: (-known[0].end_time.ToNanoseconds(), known[0].name),
        )
        budgets = sorted(self._budgets.values(), key=lambda known: (known[0].room, known[0].name))
        height -= 1  # the last line is the cursor's
        parts: list[Part] = []
        if back_offs:
            room = height // 2 - 1 if budgets else height
            used, parts = _section(_BACK_OFFS, back_offs, _back_off_texts, room, now_ns)
            height -= used
        if back_offs and budgets:
            parts.append(Text())
            height -= 1
        if budgets:
            parts += _section(_BUDGETS, budgets, _budget_texts, height, now_ns)[1]
        return parts


def _section(
    headings: Sequence[str],
    known: Sequence[tuple[ItemT, int]],
    texts: Callable[[ItemT, int, bool], Sequence[str]],
    height: int,
    now_ns: int,
) -> tuple[int, list[Part]]:
    """Return a table of what fits into so many lines, and how many it takes."""
    most = max(1, height - 1)
    fit = known if len(known) <= most else known[: max(1, most - 1)]

    def draw(*, short: bool) -> Table:
        rows = (texts(item, now_ns - came_ns, short) for item, came_ns in fit)
        return live_table(headings, rows, yielding=_YIELDING)

    more = len(known) - len(fit)
    return 1 + len(fit) + bool(more), [draw, *([line(f"… and {more} more")] if more else [])]


def _back_off_texts(back_off: budget_pb2.BackOff, age_ns: int, short: bool) -> Sequence[str]:
    return (
        back_off_state_text(back_off),
        _left(back_off, "remaining", age_ns),
        *_place(back_off.scope, short),
        optional_holder_text(back_off.caused_by),
        back_off.reason or NOTHING,
    )


def _budget_texts(budget: budget_pb2.Budget, age_ns: int, short: bool) -> Sequence[str]:
    return (
        budget.limit,
        enum_text(budget, "state"),
        used_text(budget),
        str(budget.room),
        _left(budget, "room_in", age_ns),
        *_place(budget.scope, short),
    )


def _left(
    item: budget_pb2.BackOff | budget_pb2.Budget,
    field: Literal["remaining", "room_in"],
    age_ns: int,
) -> str:
    if not item.HasField(field):  # type: ignore[arg-type] # each has one of them
        return NOTHING
    left_ns = getattr(item, field).ToNanoseconds() - age_ns
    return format_duration(max(0, left_ns // 10**9))


def _place(scope: budget_pb2.Scope, short: bool) -> Sequence[str]:
    name = scope.token or scope.app
    if short:
        name = name.removeprefix("apps/").replace("/tokens/", "/")
    return name, scope.division or NOTHING, scope.endpoint or NOTHING
