"""`holdoff backoff`: which scopes must be quiet; make one quiet, and end that."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from holdoff import Client
from holdoff._text import printable
from holdoff.cli import exits
from holdoff.cli._budgets import BACK_OFF_HEADINGS, back_off_fields, back_off_row
from holdoff.cli._help import example
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
    """List, set and end back-offs: pauses on a scope that everybody keeps."""


@backoff.command(
    "list", epilog=example("holdoff backoff list", "holdoff backoff list apps/exact-nl")
)
@click.argument("parent", type=Name(AppName), metavar="[APP]", required=False)
@output_option
@click.pass_obj
def list_back_offs(endpoint: str, parent: str | None, output: str) -> None:
    """List the back-offs that are not over, those that end last first.

    APP is apps/APP; without it all are listed. While a back-off is `quiet` nobody goes; then it is
    `probing`, one goes first; when that went well it is `reopening`, the others follow.
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
        "--endpoint crm/Accounts --reason 'it answers nonsense'",
    ),
)
@click.argument("scope", type=Name(TokenName, AppName), metavar="APP_OR_TOKEN")
@click.option("--for", "length", type=Duration(), required=True, help="How long: 1s to 31d.")
@click.option("--reason", required=True, help="Why; whoever has to wait is told.")
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
    """Make everybody quiet who uses an app (apps/APP) or a token (apps/APP/tokens/TOKEN).

    Jobs that wait go on waiting, and those that run are told. Set again, with the same scope, it
    replaces what was set before; `holdoff backoff clear` ends it sooner.
    """
    with Client(endpoint) as client:
        _emit(client.set_back_off(scope, length, reason, division=division, endpoint=path), output)


@backoff.command(
    "clear",
    epilog=example(
        "holdoff backoff clear apps/exact-nl/backOffs/block-k7q2m3ab5cdefghi "
        "--reason 'the provider says that it is mended'"
    ),
)
@click.argument("name", type=Name(BackOffName))
@click.option("--reason", required=True, help="Why; it is kept, with your name.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
@click.pass_obj
def clear_back_off(endpoint: str, name: str, reason: str, yes: bool, output: str) -> None:
    """End the back-off NAME, whatever it comes from; those who waited go on one after the other.

    A provider that blocks may still do so, and for longer when it is called too soon. On a
    terminal it is asked for a confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            app = str(AppName(BackOffName.parse(name).app))
            found = [one for one in client.list_back_offs(app) if one.name == name]
            if found and not click.confirm(f"{name}\n{_question(found[0])}", err=True):
                click.echo("not ended", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        _emit(client.clear_back_off(name, reason), output)


def _question(back_off: budget_pb2.BackOff) -> str:
    has_left = back_off.HasField("remaining")
    left = f" for another {duration_text(back_off, 'remaining')}" if has_left else ""
    return f"is in force{left}: {printable(back_off.reason)}. End it?"


def _emit(back_off: budget_pb2.BackOff, output: str) -> None:
    if output == "json":
        emit_json(resource(back_off))
    else:
        emit_record(back_off_fields(back_off))
