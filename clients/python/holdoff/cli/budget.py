"""`holdoff budget`: how much of the provider's limits is used, and where; errors to count."""

from __future__ import annotations

import sys
from functools import partial
from typing import Literal

import click

from holdoff import Client, Unavailable, _calls
from holdoff._platform import boottime_ns
from holdoff._reporting import flush_leftovers
from holdoff._spool import Spool, SpoolError
from holdoff.cli import exits
from holdoff.cli._budget_board import BudgetBoard, documents
from holdoff.cli._budgets import BUDGET_HEADINGS, budget_row
from holdoff.cli._help import example
from holdoff.cli._live import live_output_option, show_lines, show_table, wants_lines
from holdoff.cli._voice import confirm, say
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
    listed with the app alone. Give PATH as the list shows it; case does not matter.
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
        emit_table(BUDGET_HEADINGS, (budget_row(budget) for budget in budgets))
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
    "watch",
    epilog=example(
        "holdoff budget watch",
        "holdoff budget watch apps/exact-nl --division 535193",
        "holdoff budget watch apps/exact-nl --output json",
    ),
)
@click.argument("parent", type=Name(AppName, TokenName), required=False)
@click.option("--division", default="", help="Only of this division.")
@click.option("--endpoint", "path", default="", metavar="PATH", help="Only of this endpoint.")
@live_output_option
@click.pass_obj
def watch_budgets(
    endpoint: str, parent: str | None, *, division: str, path: str, output: str
) -> None:
    """Watch back-offs and budgets in use: all of them or those of PARENT.

    PARENT is an app (apps/APP) or a token (apps/APP/tokens/TOKEN). On a terminal a live table
    shows the back-offs, and below them the budgets, the tightest first. Ctrl-C ends it.

    Otherwise each line is a JSON document with a `kind`: a `budget` or a `back_off` in its new
    state, which replaces earlier data with its name, or `snapshot_end` after the initial ones. A
    budget with nothing `used` or `reserved` is no longer in use, and a back-off whose `state` is
    unspecified is over.

    While the coordinator cannot be reached, the command retries.
    """
    app, tokens, _ = (parent or "").partition("/tokens/")
    with Client(endpoint) as client:
        watch = partial(
            client.watch_budgets,
            app,
            token=parent if parent and tokens else "",
            division=division,
            endpoint=path,
        )
        if wants_lines(output):
            show_lines(watch, documents)
        else:
            board = BudgetBoard(f" of {parent}" if parent else "")
            show_table(client.endpoint, watch, board)


@budget.command(
    "reset",
    epilog=example(
        "holdoff budget reset apps/exact-nl/budgets/errors-k7q2m3ab5cdefghi "
        "--reason 'the job is fixed'"
    ),
)
@click.argument("name", type=Name(BudgetName))
@click.option("--reason", required=True, help="Why; it is shown with the budget.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
@click.pass_obj
def reset_budget(endpoint: str, name: str, reason: str, yes: bool, output: str) -> None:
    """Reset the budget NAME: discard what it counted.

    The provider's own count does not change, so its limit may be reached before ours. On a
    terminal the command asks for confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            found = client.get_budget(name)
            used = f"has {found.used} of {found.most} used in {duration_text(found, 'window')}"
            if not confirm(f"{name}\n{used}. Reset it?"):
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
    help="HTTP status of the response; 0 if it is not known, which is counted too.",
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
    help="Id of the event, so that a repeated report counts once.  [default: new]",
)
@click.option(
    "--no-spool", is_flag=True, help="Fail if the coordinator cannot be reached, and store nothing."
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
    no_spool: bool,
    output: str,
) -> None:
    """Report an error that a job with the token TOKEN got from the provider.

    A division in the path, or in the query of an XML call, is recognised.

    If the coordinator cannot be reached, the report is stored on disk, and the exit code is 0. The
    next `holdoff run` or `holdoff budget record` on this host sends it, or `holdoff spool flush`.
    """
    began_ns = boottime_ns()
    event = _calls.error_event(
        _calls.scope(token, division, path),
        status=status,
        count=count,
        job=job,
        age_seconds=0.0,
        event_id=event_id,
    )
    with Client(endpoint) as client:
        try:
            [outcome] = client.record_events([event])
        except Unavailable as error:
            event.age.FromNanoseconds(boottime_ns() - began_ns)
            if no_spool or not _kept(event, error):
                click.echo(f"to report it again, and count it once: --id {event.id}", err=True)
                raise
            outcome = budget_pb2.EVENT_OUTCOME_UNSPECIFIED
        else:
            flush_leftovers(Spool(), client.record_events, warn=say, probe=client.list_policies)
    kept = outcome == budget_pb2.EVENT_OUTCOME_UNSPECIFIED
    if output == "json":
        name = budget_pb2.EventOutcome.Name(outcome)
        emit_json({"id": event.id, "outcome": name, "spooled": kept})
    elif not kept:
        click.echo(_OUTCOMES.get(outcome, f"an outcome unknown to this client ({outcome})"))


def _kept(event: budget_pb2.Event, away: Unavailable) -> bool:
    """Keep a report for later, and say so; return whether that went well."""
    spool = Spool()
    try:
        spool.append(event)
    except SpoolError as error:
        say(f"the report could not be stored: {error}")
        return False
    finally:
        spool.close()
    say(
        f"{away}; the report is stored: the next `holdoff run` or `holdoff budget record` on this "
        "host sends it, or: holdoff spool flush"
    )
    return True


_OUTCOMES = {
    budget_pb2.EVENT_OUTCOME_COUNTED: "counted",
    budget_pb2.EVENT_OUTCOME_KNOWN: "counted before",
    budget_pb2.EVENT_OUTCOME_NOT_LIMITED: "not counted: no limit of the token's policy is about it",
}


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
            ("margin", str(budget.margin) if budget.margin else NOTHING),
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
            ("reset by", budget.reset_by or NOTHING),
        ]
    )
