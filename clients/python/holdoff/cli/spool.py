"""`holdoff spool`: reports that wait on this host for a coordinator that was away."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from holdoff import Client
from holdoff._reporting import flush_leftovers
from holdoff._spool import Moment, Spool
from holdoff.cli._help import example
from holdoff.cli._voice import say
from holdoff.cli.output import (
    NOTHING,
    emit_json,
    emit_table,
    enum_text,
    output_option,
    resource,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdoff._spool import Waiting

_MANY = 1000
"""So many take long enough to show how far it is."""


@click.group(epilog=example("holdoff spool list"))
def spool() -> None:
    """Show and send error reports that are stored on this host because no coordinator answered.

    They are in $XDG_STATE_HOME/holdoff/spool, separate for each user.
    """


@spool.command("list", epilog=example("holdoff spool list", "holdoff spool list --output json"))
@output_option
def list_waiting(output: str) -> None:
    """List the reports that are stored on this host, the oldest first.

    A command that still runs sends its own reports. The next `holdoff run` or `holdoff budget
    record` sends the others, or `holdoff spool flush`.
    """
    now = Moment.now()
    found = sorted(Spool().survey(say), key=lambda one: -one[0].age_ns(now))
    if output == "json":
        emit_json({"reports": [_document(waiting, now, live) for waiting, live in found]})
    elif found:
        emit_table(
            (
                *("WHEN", "KIND", "STATUS", "COUNT", "TOKEN", "DIVISION", "ENDPOINT", "JOB"),
                "SENT BY",
            ),
            (_row(waiting, now, live) for waiting, live in found),
        )
    else:
        click.echo("no reports are stored on this host", err=True)


@spool.command("flush", epilog=example("holdoff spool flush"))
@click.pass_obj
def flush(endpoint: str) -> None:
    """Send the reports that are stored on this host; each counts once.

    A command that still runs sends its own reports. A report about a token that the coordinator
    does not know stays stored, since another coordinator may know it. Reports older than a day are
    dropped.
    """
    spool = Spool()
    waiting = _waiting(spool)
    with (
        Client(endpoint) as client,
        click.progressbar(
            length=waiting,
            label="sending reports",
            file=sys.stderr,
            hidden=waiting < _MANY or not sys.stderr.isatty(),
        ) as progress,
    ):
        flushed = flush_leftovers(
            spool, client.record_events, warn=say, on_progress=progress.update
        )
    dropped = f", {flushed.dropped} dropped" if flushed.dropped else ""
    click.echo(f"{flushed.sent} sent{dropped}")
    if live := sum(runs for _, runs in spool.survey(lambda _: None)):
        say(f"{live} reports belong to commands that still run, which send them")
    if flushed.error:
        say(f"{_waiting(spool)} reports stay stored")
        raise flushed.error


def _waiting(spool: Spool) -> int:
    """Count what was left behind."""
    # What is wrong with files is said once, by the flush itself.
    return sum(not live for _, live in spool.survey(lambda _: None))


def _happened(waiting: Waiting, now: Moment) -> datetime:
    age = timedelta(microseconds=waiting.age_ns(now) // 1000)
    return datetime.fromtimestamp(now.wall_ns / 1e9, UTC) - age


def _document(waiting: Waiting, now: Moment, live: bool) -> dict[str, Any]:
    return {
        "time": f"{_happened(waiting, now):%Y-%m-%dT%H:%M:%S.%fZ}",
        "writer_runs": live,
        **resource(waiting.due(now)),
    }


def _row(waiting: Waiting, now: Moment, live: bool) -> Sequence[str]:
    event = waiting.event
    return (
        f"{_happened(waiting, now).astimezone():%Y-%m-%d %H:%M:%S}",
        enum_text(event, "kind"),
        str(event.status or NOTHING),
        str(event.count or 1),
        event.scope.token or NOTHING,
        event.scope.division or NOTHING,
        event.scope.endpoint or NOTHING,
        event.holder.job or NOTHING,
        "its command" if live else "flush",
    )
