"""`holdoff audit`: who did what, from where, when and why."""

from __future__ import annotations

from datetime import UTC
from itertools import islice, takewhile
from typing import TYPE_CHECKING

import click

from holdoff import Client
from holdoff.cli._help import example
from holdoff.cli.output import (
    NOTHING,
    emit_json,
    emit_table,
    enum_text,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import Moment, Name
from holdoff.names import AppName, TokenName
from holdoff.v1 import audit_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

_KINDS = {
    name.removeprefix("AUDIT_KIND_").lower().replace("_", "-"): number
    for name, number in audit_pb2.AuditKind.items()
    if number
}


@click.command(
    epilog=example(
        "holdoff audit",
        "holdoff audit apps/exact-nl --since 2h",
        "holdoff audit --kind call-refused --kind credential-revoked --output json",
    )
)
@click.argument("parent", type=Name(AppName, TokenName), required=False)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(tuple(_KINDS)),
    multiple=True,
    metavar="KIND",
    help=f"Only entries of this kind; repeatable: {', '.join(_KINDS)}.",
)
@click.option("--since", type=Moment(), help="Only what happened after this time.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Maximum number of entries. [default: 50, or all with --since]",
)
@output_option
@click.pass_obj
def audit(  # noqa: PLR0913 - one for each option
    endpoint: str,
    parent: str | None,
    *,
    kinds: Sequence[str],
    since: datetime | None,
    limit: int | None,
    output: str,
) -> None:
    """Show who did what, from where, when and why, the newest first.

    PARENT is an app (apps/APP) or a token (apps/APP/tokens/TOKEN). Without it all entries are
    shown, including those of credentials and of refused calls. It needs the role admin.
    """
    most = limit if limit or since else 50
    with Client(endpoint) as client:
        events = client.list_audit_events(parent or "", [_KINDS[kind] for kind in kinds])
        if since:
            events = takewhile(lambda one: one.time.ToDatetime(UTC) >= since, events)
        found = list(islice(events, most))
    if output == "json":
        emit_json({"events": [resource(event) for event in found]})
    elif found:
        emit_table(("TIME", "WHAT", "WHO", "RESOURCE", "WHY"), map(_row, found))
    else:
        click.echo(f"no such entries{f' of {parent}' if parent else ''}", err=True)


def _row(event: audit_pb2.AuditEvent) -> Sequence[str]:
    return (
        time_text(event, "time"),
        enum_text(event, "kind") + (f", {event.count} times" if event.count > 1 else ""),
        _who(event),
        event.resource or NOTHING,
        _why(event) or NOTHING,
    )


def _why(event: audit_pb2.AuditEvent) -> str:
    if not event.generation:
        return event.reason
    result = enum_text(event, "result") if event.result else "no answer yet"
    return f"generation {event.generation}, {result}: {event.reason}"


def _who(event: audit_pb2.AuditEvent) -> str:
    """Who it was, as they said themselves, and as the coordinator knows them; or the replica."""
    holder = event.holder
    said = "@".join(filter(None, (holder.job or holder.user, holder.host)))
    known = " from ".join(filter(None, (event.identity, event.peer)))
    return ", ".join(filter(None, (said, known))) or event.replica or NOTHING
