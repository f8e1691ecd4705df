"""Budgets and back-offs as text, for all commands that show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff.cli.output import NOTHING, duration_text, enum_text, holder_text, time_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdoff.v1 import budget_pb2, lease_pb2

BUDGET_HEADINGS = (
    *("LIMIT", "STATE", "USED", "ROOM", "ROOM IN", "DIVISION", "ENDPOINT", "TOKEN", "NAME"),
)
BACK_OFF_HEADINGS = (
    *("STATE", "CAUSE", "LEFT", "DIVISION", "ENDPOINT", "TOKEN", "BY", "WHY", "NAME"),
)
ERROR_HEADINGS = ("TIME", "STATUS", "COUNT", "DIVISION", "ENDPOINT", "TOKEN", "BY")


def budget_row(budget: budget_pb2.Budget) -> Sequence[str]:
    """A budget in a line."""
    return (
        budget.limit,
        enum_text(budget, "state"),
        used_text(budget),
        str(budget.room),
        duration_text(budget, "room_in"),
        *_place(budget.scope),
        budget.name,
    )


def used_text(budget: budget_pb2.Budget) -> str:
    """How much of a budget is used, and of how much."""
    reserved = f"+{budget.reserved}" if budget.reserved else ""
    return f"{budget.used}{reserved}/{budget.most}"


def back_off_row(back_off: budget_pb2.BackOff) -> Sequence[str]:
    """A back-off in a line."""
    return (
        back_off_state_text(back_off),
        enum_text(back_off, "cause"),
        duration_text(back_off, "remaining"),
        *_place(back_off.scope),
        optional_holder_text(back_off.caused_by),
        back_off.reason or NOTHING,
        back_off.name,
    )


def back_off_fields(back_off: budget_pb2.BackOff) -> list[tuple[str, str]]:
    """All of a back-off, a field a line."""
    scope = back_off.scope
    return [
        ("name", back_off.name),
        ("state", back_off_state_text(back_off)),
        ("cause", enum_text(back_off, "cause")),
        ("why", back_off.reason or NOTHING),
        ("left", duration_text(back_off, "remaining")),
        ("until", time_text(back_off, "end_time")),
        ("since", time_text(back_off, "start_time")),
        ("by", optional_holder_text(back_off.caused_by)),
        ("probe", optional_holder_text(back_off.probe)),
        ("HTTP status", str(back_off.status or NOTHING)),
        ("blocks in a row", str(back_off.repeats or NOTHING)),
        ("budget", back_off.budget or NOTHING),
        ("app", scope.app or NOTHING),
        ("token", scope.token or NOTHING),
        ("division", scope.division or NOTHING),
        ("endpoint", scope.endpoint or NOTHING),
    ]


def back_off_state_text(back_off: budget_pb2.BackOff) -> str:
    """How far a back-off is: `quiet`, `probing`, `reopening` or `over`."""
    return enum_text(back_off, "state") if back_off.state else "over"


def error_row(error: budget_pb2.RecentError) -> Sequence[str]:
    """An error in a line."""
    return (
        time_text(error, "time"),
        str(error.status or NOTHING),
        str(error.count or 1),
        *_place(error.scope),
        optional_holder_text(error.holder),
    )


def optional_holder_text(holder: lease_pb2.Holder) -> str:
    """Who it was, short; NOTHING where nobody is named."""
    return holder_text(holder) if holder.job or holder.user or holder.host else NOTHING


def _place(scope: budget_pb2.Scope) -> tuple[str, str, str]:
    return (
        scope.division or NOTHING,
        scope.endpoint or NOTHING,
        scope.token.rpartition("/")[2] or NOTHING,
    )
