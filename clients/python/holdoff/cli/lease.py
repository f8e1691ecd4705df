"""`holdoff lease`: list, show and break leases."""

import sys
from decimal import Decimal

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
    enum_text,
    held_text,
    holder_text,
    labels_text,
    lease_state_text,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import Name
from holdoff.durations import format_duration
from holdoff.names import AppName, LeaseName, TokenName
from holdoff.v1 import lease_pb2


@click.group(epilog=example("holdoff lease list"))
def lease() -> None:
    """List, show and break leases."""


@lease.command("list", epilog=example("holdoff lease list", "holdoff lease list apps/exact-nl"))
@click.argument("parent", type=Name(AppName, TokenName), required=False)
@output_option
@click.pass_obj
def list_leases(endpoint: str, parent: str | None, output: str) -> None:
    """List the live leases, all of them or those of PARENT.

    PARENT is an app (apps/APP) or a token (apps/APP/tokens/TOKEN).
    """
    with Client(endpoint) as client:
        leases = list(client.list_leases(parent or ""))
    if output == "json":
        emit_json({"leases": [resource(lease) for lease in leases]})
    elif leases:
        headings = ("LEASE", "STATE", "HELD", "LEFT", "HOLDER")
        emit_table(headings, (_row(lease) for lease in leases))
    else:
        click.echo(f"no live leases{f' of {parent}' if parent else ''}", err=True)


@lease.command(
    "show",
    epilog=example("holdoff lease show apps/exact-nl/tokens/finance/leases/1764040200"),
)
@click.argument("name", type=Name(LeaseName))
@output_option
@click.pass_obj
def show_lease(endpoint: str, name: str, output: str) -> None:
    """Show the lease NAME; one that has ended, as long as it is in its token's history.

    NAME is apps/APP/tokens/TOKEN/leases/LEASE.
    """
    with Client(endpoint) as client:
        _emit(client.get_lease(name), output)


@lease.command(
    "break",
    epilog=example(
        "holdoff lease break apps/exact-nl/tokens/finance/leases/1764040200 --reason 'web1 hangs'"
    ),
)
@click.argument("name", type=Name(LeaseName))
@click.option("--reason", required=True, help="Why; shown to the holder.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
@click.pass_obj
def break_lease(endpoint: str, name: str, reason: str, yes: bool, output: str) -> None:
    """Forbid the renewal of the lease NAME, so that its holder has to stop.

    The lease remains until its holder confirms, or until it expires; the token's cooldown counts
    from then. On a terminal the command asks for confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            holder = holder_text(client.get_lease(name).holder)
            if not confirm(f"{name}\nis held by {holder}. Break it?"):
                click.echo("not broken", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        _emit(client.break_lease(name, reason), output)


def _row(lease: lease_pb2.Lease) -> tuple[str, ...]:
    return (
        lease.name,
        lease_state_text(lease),
        held_text(lease),
        duration_text(lease, "remaining"),
        holder_text(lease.holder),
    )


def _emit(lease: lease_pb2.Lease, output: str) -> None:
    if output == "json":
        emit_json(resource(lease))
        return
    holder = lease.holder
    details = (holder.user, f"pid {holder.pid}" if holder.pid else "", holder.client_version)
    who = ", ".join(filter(None, details))
    emit_record(
        [
            ("name", lease.name),
            ("state", lease_state_text(lease)),
            ("because", lease.activity_message or NOTHING),
            ("resumes", time_text(lease, "go_on_time")),
            ("holder", holder_text(holder) + (f" ({who})" if who else "")),
            ("labels", labels_text(holder)),
            ("mode", enum_text(lease, "mode")),
            ("fencing token", str(lease.fencing_token)),
            ("ttl", duration_text(lease, "ttl")),
            ("left", duration_text(lease, "remaining")),
            ("renewed", _renewed_text(lease)),
            ("broken because", lease.break_reason or NOTHING),
            ("offered", time_text(lease, "create_time")),
            ("accepted", time_text(lease, "accept_time")),
            ("command started", time_text(lease, "command_start_time")),
            ("expires", time_text(lease, "expire_time")),
            ("ended", time_text(lease, "end_time")),
        ]
    )


def _renewed_text(lease: lease_pb2.Lease) -> str:
    """When an active lease was renewed last, by the store's clock alone."""
    if lease.state != lease_pb2.LEASE_STATE_ACTIVE:
        return NOTHING
    age_ns = lease.ttl.ToNanoseconds() - lease.remaining.ToNanoseconds()
    return f"{format_duration(Decimal(age_ns) / 10**9)} ago"
