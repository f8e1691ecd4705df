"""The simulator's report as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from holdoff._text import printable
from holdoff.simulator.limits import ERRORS_PER_HOUR

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SHOWN = 10
"""So many violations are told one by one, the latest."""

# Wider than any row: without a terminal nothing is cut or folded, so that `grep` works.
_UNLIMITED_WIDTH = 100_000


def show_report(report: dict[str, Any]) -> None:
    """Print who broke which rule, what each client did, the errors, blocks and faults."""
    violations: int = report["totals"]["violations"]
    faults: dict[str, int] = report["faults"]["injected"]
    parts = [
        _headline(report, violations),
        _table(
            "Broken rules",
            ("rule", "agent", "times"),
            (
                (rule, name, times)
                for name, counts in report["agents"].items()
                for rule, times in counts["violations_by_rule"].items()
            ),
        ),
        _table(
            "What each agent did",
            (
                "agent",
                "refreshes",
                "tokens",
                "calls",
                "answered",
                "errors",
                "blocked",
                "faults",
                "broken",
            ),
            (
                (
                    name,
                    counts["token_requests"],
                    counts["tokens_received"],
                    counts["api_calls"],
                    counts["api_calls_succeeded"],
                    counts["errors"],
                    counts["refused_while_blocked"],
                    counts["faults_injected"],
                    counts["violations"],
                )
                for name, counts in report["agents"].items()
            ),
        ),
        _table(
            f"The latest {_SHOWN} of {violations}" if violations > _SHOWN else "One by one",
            ("call", "time (UTC)", "rule", "agent", "request", "status", "where", "what"),
            (
                (
                    v["call"],
                    _time(v["time"]),
                    v["rule"],
                    v["agent"],
                    f"{v['method']} {v['path']}",
                    v["status"],
                    _where(v),
                    v["detail"],
                )
                for v in report["violations"][-_SHOWN:]
            ),
        ),
        _table(
            "Blocks",
            ("key", "from (UTC)", "to (UTC)", "because of"),
            (
                (b["key"], _time(b["start"]), _time(b["end"]), _where(b["cause"]))
                for b in report["blocks"]
            ),
        ),
        _table(
            f"Counted errors; at most {ERRORS_PER_HOUR} in an hour are allowed",
            ("key", "user", "division", "endpoint", "all", "most in an hour"),
            (
                (
                    *(e[name] for name in ("key", "user", "division", "endpoint", "total")),
                    Text(
                        str(e["most_in_an_hour"]),
                        "red" if e["most_in_an_hour"] > ERRORS_PER_HOUR else "",
                    ),
                )
                for e in report["errors"]
            ),
        ),
        _table("Faults injected", ("fault", "times"), faults.items()),
    ]
    _print(Group(*(part for part in parts if part is not None)))


def show_pending(faults: Sequence[dict[str, Any]]) -> None:
    """Print the faults that were asked for and not yet met."""
    columns = ("fault", "path", "count", "seconds", "status", "without")
    rows = (fault | {"without": ", ".join(fault.get("without", ()))} for fault in faults)
    table = _table("", columns, ([fault.get(name, "") for name in columns] for fault in rows))
    _print(table or Text("no faults are pending"))


def _headline(report: dict[str, Any], violations: int) -> Text:
    tokens, calls = report["token_requests"], report["api_calls"]
    style = "bold red" if violations else "bold green"
    text = Text.assemble(
        (f"{violations} violations", style),
        f" until {_time(report['time'])} UTC; rotation {report['rotation']},"
        f" time x {report['time_scale']:g}\n"
        f"tokens issued: {tokens['accepted']}, refused: {tokens['refused']};"
        f" API calls: {calls['total']}",
    )
    by_status = ", ".join(f"{status}: {n}" for status, n in calls["by_status"].items())
    return text.append(f" ({by_status})\n" if by_status else "\n")


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Table | None:
    """Lay out rows, numbers (also coloured ones) to the right; None without a row."""
    listed = list(rows)
    if not listed:
        return None
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for n, heading in enumerate(headings):
        numbers = all(isinstance(row[n], int | float | Text) for row in listed)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in listed:
        table.add_row(
            *(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row)
        )
    return table


def _where(scope: dict[str, Any]) -> str:
    """A scope in short: what of it is known."""
    return "/".join(scope[name] for name in ("user", "division", "endpoint") if scope[name])


def _time(iso: str) -> str:
    """A time of the report, which is in UTC, without T, fractions and zone."""
    return iso.replace("T", " ").partition(".")[0]


def _print(what: Group | Table | Text) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_UNLIMITED_WIDTH)
    console.print(what)
