"""`holdoff quarantine`: which apps give out no new lease, and why; end that."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from holdoff import Client
from holdoff.cli import exits
from holdoff.cli._help import example
from holdoff.cli._voice import confirm
from holdoff.cli.output import (
    NOTHING,
    duration_text,
    emit_json,
    emit_record,
    emit_table,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import Name
from holdoff.names import AppName

if TYPE_CHECKING:
    from holdoff.v1 import lease_pb2


@click.group(epilog=example("holdoff quarantine show"))
def quarantine() -> None:
    """Show and end quarantines: the store may have lost something, so no new lease is granted."""


@quarantine.command(
    "show", epilog=example("holdoff quarantine show", "holdoff quarantine show apps/exact-nl")
)
@click.argument("app", type=Name(AppName), required=False)
@output_option
@click.pass_obj
def show_quarantines(endpoint: str, app: str | None, output: str) -> None:
    """Show the quarantine of APP, or all of them: since when, until when, why, and what is at risk.

    APP is apps/APP. The exit code is 0 also when there is none; with --output json the list
    `quarantines` is then empty.
    """
    with Client(endpoint) as client:
        found = client.list_quarantines(app or "")
    if output == "json":
        emit_json({"quarantines": [resource(one) for one in found]})
    elif not found:
        click.echo(f"{app} is not in quarantine" if app else "no app is in quarantine", err=True)
    elif app:
        _emit(found[0], output)
    else:
        emit_table(("APP", "LEFT", "SINCE", "BECAUSE"), (_row(one) for one in found))


@quarantine.command(
    "end",
    epilog=example("holdoff quarantine end apps/exact-nl --reason 'a planned failover: no loss'"),
)
@click.argument("app", type=Name(AppName))
@click.option("--reason", required=True, help="Why; it is kept, with your name.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
@click.pass_obj
def end_quarantine(endpoint: str, app: str, reason: str, yes: bool, output: str) -> None:
    """End the quarantine of APP, so that new leases are granted at once.

    If the store did lose a lease or a refresh, a token may now be held twice, or refreshed too
    soon. On a terminal the command says what is at risk and asks for a confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            found = client.list_quarantines(app)
            if found and not confirm(f"{app}\n{_question(found[0])}"):
                click.echo("not ended", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        _emit(client.end_quarantine(app, reason), output)


def _question(one: lease_pb2.Quarantine) -> str:
    return (
        f"is in quarantine for another {duration_text(one, 'remaining')}: {one.reason}\n"
        f"The store may have lost: {one.at_risk}.\nEnd it?"
    )


def _row(one: lease_pb2.Quarantine) -> tuple[str, ...]:
    return (one.app, duration_text(one, "remaining"), time_text(one, "start_time"), one.reason)


def _emit(one: lease_pb2.Quarantine, output: str) -> None:
    if output == "json":
        emit_json(resource(one))
        return
    emit_record(
        [
            ("app", one.app),
            ("state", "in quarantine" if one.HasField("remaining") else "ended"),
            ("because", one.reason or NOTHING),
            ("at risk", one.at_risk),
            ("since", time_text(one, "start_time")),
            ("until", time_text(one, "end_time")),
            ("left", duration_text(one, "remaining")),
        ]
    )
