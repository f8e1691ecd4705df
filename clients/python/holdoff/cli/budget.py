"""`holdoff budget`: how much of the provider's limits is used, and where; errors to count."""

from __future__ import annotations

import sys
import uuid
from typing import TYPE_CHECKING, Literal

import click

from holdoff import Client, Unavailable
from holdoff.cli import exits
from holdoff.cli._help import example
from holdoff.cli.output import (
    NOTHING,
    duration_text,
    emit_json,
    emit_record,
    emit_table,
    enum_text,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import EventId, Name
from holdoff.names import AppName, BudgetName, TokenName
from holdoff.v1 import budget_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_COUNT = 10_000


@click.group(epilog=example("holdoff budget list"))
def budget() -> None:
    """Show how much of the provider's limits is used; count errors, and forget them."""


@budget.command(
    "list",
    epilog=example(
        "holdoff budget list",
        "holdoff budget list apps/exact-nl --state spent",
        "holdoff budget list apps/exact-nl/tokens/finance --endpoint crm/Accounts",
    ),
)
@click.argument("parent", type=Name(AppName, TokenName), required=False)
@click.option("--division", default="", help="Only of this division.")
@click.option("--endpoint", "path", default="", metavar="PATH", help="Only of this endpoint.")
@click.option("--state", type=click.Choice(["open", "low", "spent"]), help="Only in this state.")
@output_option
@click.pass_obj
def list_budgets(  # noqa: PLR0913 - one for each option
    endpoint: str,
    parent: str | None,
    *,
    division: str,
    path: str,
    state: Literal["open", "low", "spent"] | None,
    output: str,
) -> None:
    """List budgets in use, the tightest first: all of them or those of PARENT.

    PARENT is an app (apps/APP) or a token (apps/APP/tokens/TOKEN); a budget of the whole app is
    listed with the app alone. PATH is as the list shows it, case does not count.
    """
    app, tokens, _ = (parent or "").partition("/tokens/")
    with Client(endpoint) as client:
        budgets = list(
            client.list_budgets(
                app,
                token=parent if parent and tokens else "",
                division=division,
                endpoint=path,
                state=state,
            )
        )
    if output == "json":
        emit_json({"budgets": [resource(budget) for budget in budgets]})
    elif budgets:
        emit_table(
            ("LIMIT", "STATE", "USED", "ROOM", "ROOM IN", "DIVISION", "ENDPOINT", "TOKEN", "NAME"),
            (_row(budget) for budget in budgets),
        )
    else:
        wanted = " ".join(filter(None, (state, "budgets")))
        click.echo(f"no {wanted} in use{f' of {parent}' if parent else ''}", err=True)


@budget.command(
    "show", epilog=example("holdoff budget show apps/exact-nl/budgets/errors-k7q2m3ab5cdefghi")
)
@click.argument("name", type=Name(BudgetName))
@output_option
@click.pass_obj
def show_budget(endpoint: str, name: str, output: str) -> None:
    """Show the budget NAME: what is used of which limit, for whom, and when there is room."""
    with Client(endpoint) as client:
        _emit(client.get_budget(name), output)


@budget.command(
    "reset",
    epilog=example(
        "holdoff budget reset apps/exact-nl/budgets/errors-k7q2m3ab5cdefghi "
        "--reason 'the job is mended'"
    ),
)
@click.argument("name", type=Name(BudgetName))
@click.option("--reason", required=True, help="Why; it is shown with the budget.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
@click.pass_obj
def reset_budget(endpoint: str, name: str, reason: str, yes: bool, output: str) -> None:
    """Make the budget NAME forget what it counted.

    The provider does not forget: its own limit may be reached sooner than ours then. On a
    terminal it is asked for a confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            found = client.get_budget(name)
            used = f"has {found.used} of {found.most} used in {duration_text(found, 'window')}"
            if not click.confirm(f"{name}\n{used}. Forget them?", err=True):
                click.echo("not reset", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        _emit(client.reset_budget(name, reason), output)


@budget.command(
    "record",
    epilog=example(
        "holdoff budget record apps/exact-nl/tokens/finance --division 535193 "
        "--endpoint crm/Accounts --status 400",
        "holdoff budget record apps/exact-nl/tokens/finance "
        "--endpoint https://start.exactonline.nl/api/v1/535193/crm/Accounts --status 400 --count 3",
    ),
)
@click.argument("token", type=Name(TokenName))
@click.option("--division", default="", help="The provider's name of a company.")
@click.option(
    "--endpoint", "path", required=True, metavar="PATH", help="The path or URL of the call."
)
@click.option(
    "--status",
    type=click.IntRange(0, 599),
    default=0,
    show_default=True,
    help="HTTP status of the answer; 0 when it is not known, which counts.",
)
@click.option(
    "--count",
    type=click.IntRange(1, _MOST_COUNT),
    default=1,
    show_default=True,
    help="How often it happened.",
)
@click.option("--job", default="", help="Name of the job, shown with the error.")
@click.option(
    "--id",
    "event_id",
    type=EventId(),
    help="What names the event, so that it counts once when it is reported again.  [default: new]",
)
@output_option
@click.pass_obj
def record_error(  # noqa: PLR0913 - one for each option
    endpoint: str,
    token: str,
    *,
    division: str,
    path: str,
    status: int,
    count: int,
    job: str,
    event_id: str | None,
    output: str,
) -> None:
    """Count an error that the provider answered to a job with the token TOKEN.

    A division that stands in the path is found there.
    """
    event_id = event_id or str(uuid.uuid4())
    with Client(endpoint) as client:
        try:
            outcome = client.record_error(
                token,
                division=division,
                endpoint=path,
                status=status,
                count=count,
                job=job,
                event_id=event_id,
            )
        except Unavailable:
            click.echo(f"to report it again, and count it once: --id {event_id}", err=True)
            raise
    if output == "json":
        emit_json({"id": event_id, "outcome": budget_pb2.EventOutcome.Name(outcome)})
        return
    click.echo(_OUTCOMES.get(outcome, f"taken in a way unknown to this client ({outcome})"))


_OUTCOMES = {
    budget_pb2.EVENT_OUTCOME_COUNTED: "counted",
    budget_pb2.EVENT_OUTCOME_KNOWN: "counted before",
    budget_pb2.EVENT_OUTCOME_NOT_LIMITED: "not counted: no limit of the token's policy is about it",
}


def _row(budget: budget_pb2.Budget) -> Sequence[str]:
    scope = budget.scope
    return (
        budget.limit,
        enum_text(budget, "state"),
        _used_text(budget),
        str(budget.room),
        duration_text(budget, "room_in"),
        scope.division or NOTHING,
        scope.endpoint or NOTHING,
        scope.token.rpartition("/")[2] or NOTHING,
        budget.name,
    )


def _used_text(budget: budget_pb2.Budget) -> str:
    reserved = f"+{budget.reserved}" if budget.reserved else ""
    return f"{budget.used}{reserved}/{budget.most}"


def _emit(budget: budget_pb2.Budget, output: str) -> None:
    if output == "json":
        emit_json(resource(budget))
        return
    scope = budget.scope
    emit_record(
        [
            ("name", budget.name),
            ("limit", budget.limit),
            ("state", enum_text(budget, "state")),
            ("used", f"{budget.used} of {budget.most} {enum_text(budget, 'kind')}s"),
            ("reserved", str(budget.reserved) if budget.reserved else NOTHING),
            ("in hand", str(budget.margin) if budget.margin else NOTHING),
            ("room", str(budget.room)),
            ("room in", duration_text(budget, "room_in")),
            ("room at", time_text(budget, "room_time")),
            ("window", duration_text(budget, "window")),
            ("app", scope.app or NOTHING),
            ("token", scope.token or NOTHING),
            ("division", scope.division or NOTHING),
            ("endpoint", scope.endpoint or NOTHING),
            ("last event", time_text(budget, "last_event_time")),
            ("last reset", time_text(budget, "reset_time")),
            ("reset because", budget.reset_reason or NOTHING),
        ]
    )
