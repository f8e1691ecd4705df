"""`holdoff backoff`: which scopes must be quiet; make one quiet, and end that."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from holdoff import Client
from holdoff.cli import exits
from holdoff.cli._budgets import BACK_OFF_HEADINGS, back_off_fields, back_off_row
from holdoff.cli._help import example
from holdoff.cli._voice import confirm
from holdoff.cli.output import (
    duration_text,
    emit_json,
    emit_record,
    emit_table,
    output_option,
    resource,
)
from holdoff.cli.params import Duration, Name
from holdoff.names import AppName, BackOffName, TokenName

if TYPE_CHECKING:
    from holdoff.v1 import budget_pb2


@click.group(epilog=example("holdoff backoff list"))
def backoff() -> None:
    """List, set and clear back-offs: pauses on a scope that all callers observe."""


@backoff.command(
    "list", epilog=example("holdoff backoff list", "holdoff backoff list apps/exact-nl")
)
@click.argument("parent", type=Name(AppName), metavar="[APP]", required=False)
@output_option
@click.pass_obj
def list_back_offs(endpoint: str, parent: str | None, output: str) -> None:
    """List the back-offs that are not over, those that end last first.

    APP is apps/APP; without it all are listed. While a back-off is `quiet`, no job starts. Then it
    is `probing`: one job starts. When that succeeds it is `reopening`: the others follow.
    """
    with Client(endpoint) as client:
        back_offs = client.list_back_offs(parent or "")
    if output == "json":
        emit_json({"back_offs": [resource(back_off) for back_off in back_offs]})
    elif back_offs:
        emit_table(BACK_OFF_HEADINGS, (back_off_row(back_off) for back_off in back_offs))
    else:
        click.echo(f"no back-offs{f' of {parent}' if parent else ''}", err=True)


@backoff.command(
    "set",
    epilog=example(
        "holdoff backoff set apps/exact-nl --for 1h --reason 'the provider asked us to'",
        "holdoff backoff set apps/exact-nl/tokens/finance --for 30m --division 535193 "
        "--endpoint crm/Accounts --reason 'it returns wrong data'",
    ),
)
@click.argument("scope", type=Name(TokenName, AppName), metavar="APP_OR_TOKEN")
@click.option("--for", "length", type=Duration(), required=True, help="How long: 1s to 31d.")
@click.option("--reason", required=True, help="Why; shown to all who wait.")
@click.option("--division", default="", help="Only in this division.")
@click.option(
    "--endpoint", "path", default="", metavar="PATH", help="Only for calls of this path or URL."
)
@output_option
@click.pass_obj
def set_back_off(  # noqa: PLR0913 - one for each option
    endpoint: str,
    scope: str,
    *,
    length: float,
    reason: str,
    division: str,
    path: str,
    output: str,
) -> None:
    """Pause all jobs of an app or a token.

    APP_OR_TOKEN is apps/APP or apps/APP/tokens/TOKEN. Waiting jobs keep waiting, and running jobs
    back off. A new back-off replaces an earlier one with the same scope; `holdoff backoff clear`
    ends it early.
    """
    with Client(endpoint) as client:
        _emit(client.set_back_off(scope, length, reason, division=division, endpoint=path), output)


@backoff.command(
    "clear",
    epilog=example(
        "holdoff backoff clear apps/exact-nl/backOffs/block-k7q2m3ab5cdefghi "
        "--reason 'the provider has fixed it'"
    ),
)
@click.argument("name", type=Name(BackOffName))
@click.option("--reason", required=True, help="Why; recorded with your name.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
@click.pass_obj
def clear_back_off(endpoint: str, name: str, reason: str, yes: bool, output: str) -> None:
    """Clear the back-off NAME, whatever its cause.

    The waiting jobs follow one by one. A provider that blocks calls may still do so, and for longer
    if it is called too soon. On a terminal the command asks for confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            app = str(AppName(BackOffName.parse(name).app))
            found = [one for one in client.list_back_offs(app) if one.name == name]
            if found and not confirm(f"{name}\n{_question(found[0])}"):
                click.echo("not cleared", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        _emit(client.clear_back_off(name, reason), output)


def _question(back_off: budget_pb2.BackOff) -> str:
    has_left = back_off.HasField("remaining")
    left = f" for another {duration_text(back_off, 'remaining')}" if has_left else ""
    return f"is in force{left}: {back_off.reason}. Clear it?"


def _emit(back_off: budget_pb2.BackOff, output: str) -> None:
    if output == "json":
        emit_json(resource(back_off))
    else:
        emit_record(back_off_fields(back_off))
