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

    They are in $XDG_STATE_HOME/holdoff/spool, separate for each user. A report that the coordinator
    refuses, or that fails three times while others succeed, is set aside there.
    """


@spool.command("list", epilog=example("holdoff spool list", "holdoff spool list --output json"))
@output_option
def list_waiting(output: str) -> None:
    """List the reports that are stored on this host, the oldest first.

    A command that still runs sends its own reports. The next `holdoff run`, `holdoff budget record`
    or `holdoff spool flush` sends the others. Reports that were set aside are listed with the
    reason; `holdoff spool retry` sends them again.
    """
    now, spool = Moment.now(), Spool()
    found = sorted(spool.survey(say), key=lambda one: -one[0].age_ns(now))
    aside = sorted(spool.survey_aside(say), key=lambda one: -one[0].age_ns(now))
    if output == "json":
        emit_json(
            {
                "reports": [
                    {**_document(one, now), "writer_runs": live, "set_aside": ""}
                    for one, live in found
                ]
                + [
                    {
                        **_document(one, now),
                        "writer_runs": False,
                        "set_aside": one.reason,
                        "file": str(path),
                    }
                    for one, path in aside
                ]
            }
        )
    elif found or aside:
        emit_table(
            (
                *("WHEN", "KIND", "STATUS", "COUNT", "TOKEN", "DIVISION", "ENDPOINT", "JOB"),
                "SENT BY",
            ),
            [
                *(_row(one, now, "its command" if live else "flush") for one, live in found),
                *(_row(one, now, f"retry; set aside: {one.reason}") for one, _ in aside),
            ],
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
    _flush(endpoint, Spool())


@spool.command("retry", epilog=example("holdoff spool retry"))
@click.pass_obj
def retry(endpoint: str) -> None:
    """Send again the reports that were set aside, with all others that are stored on this host.

    A report that fails again is set aside again. To discard it, remove its file, which `holdoff
    spool list --output json` names.
    """
    spool = Spool()
    spool.take_back(say)
    _flush(endpoint, spool)


def _flush(endpoint: str, spool: Spool) -> None:
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
            spool,
            client.record_events,
            warn=say,
            probe=client.list_policies,
            on_progress=progress.update,
        )
    dropped = f", {flushed.dropped} dropped" if flushed.dropped else ""
    aside = f", {flushed.set_aside} set aside" if flushed.set_aside else ""
    click.echo(f"{flushed.sent} sent{dropped}{aside}")
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


def _document(waiting: Waiting, now: Moment) -> dict[str, Any]:
    return {
        "time": f"{_happened(waiting, now):%Y-%m-%dT%H:%M:%S.%fZ}",
        **resource(waiting.due(now)),
    }


def _row(waiting: Waiting, now: Moment, sent_by: str) -> Sequence[str]:
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
        sent_by,
    )
