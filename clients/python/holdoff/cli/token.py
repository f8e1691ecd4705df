"""`holdoff token`: create, update, show and list tokens, who waits for one, and who ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from holdoff import Client
from holdoff.cli._help import example
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
    local_times,
    output_option,
    resource,
    state_text,
    time_text,
)
from holdoff.cli.params import (
    Duration,
    DurationOrPolicy,
    LastRefreshed,
    Moment,
    Name,
    PolicyName,
)
from holdoff.errors import GrantNotFound, HoldoffError
from holdoff.names import AppName, TokenName
from holdoff.v1 import lease_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from holdoff.v1 import token_pb2

_SILENT_SECONDS = 5
"""A waiter that was not heard for longer is passed over."""


@click.group(epilog=example("holdoff token list"))
def token() -> None:
    """Create, update, show and list tokens; show their queues and histories."""


@token.command(
    "create",
    epilog=example(
        "holdoff token create apps/exact-nl/tokens/finance",
        "holdoff token create apps/exact-nl/tokens/sales --last-refreshed 5m",
    ),
)
@click.argument("name", type=Name(TokenName))
@click.option(
    "--policy", type=PolicyName(), default="", help="The provider's rules.  [default: exact-online]"
)
@click.option(
    "--refresh-interval",
    type=Duration(),
    help="Minimum time between two refreshes, without a margin. [default: set by the policy]",
)
@click.option(
    "--refresh-at",
    type=click.Choice(["end", "start"]),
    help="When a run counts as a refresh. [default: set by the policy]",
)
@click.option(
    "--last-refreshed",
    type=LastRefreshed(),
    metavar="AGE",
    default="never",
    show_default=True,
    help="How long ago the token was refreshed: a duration, `never`, or `unknown`, which starts a "
    "full cooldown.",
)
@output_option
@click.pass_obj
def create_token(  # noqa: PLR0913 - one for each option
    endpoint: str,
    name: str,
    *,
    policy: str,
    refresh_interval: float | None,
    refresh_at: str | None,
    last_refreshed: str | float,
    output: str,
) -> None:
    """Create the token NAME, such as apps/exact-nl/tokens/finance.

    This also creates its app. Durations are numbers with ms, s, m, h or d.
    """
    with Client(endpoint) as client:
        created = client.create_token(
            name,
            policy=policy,
            refresh_interval_seconds=refresh_interval,
            refresh_at=refresh_at,
            last_refreshed=last_refreshed,
        )
        _emit(client, created, output)


@token.command(
    "update",
    epilog=example(
        "holdoff token update apps/exact-nl/tokens/finance --refresh-interval 600s",
        "holdoff token update apps/exact-nl/tokens/finance --refresh-interval policy",
    ),
)
@click.argument("name", type=Name(TokenName))
@click.option("--policy", type=PolicyName(), help="The provider's rules.")
@click.option(
    "--refresh-interval",
    type=DurationOrPolicy(),
    help="Minimum time between two refreshes, without a margin; `policy` to use the policy's.",
)
@click.option(
    "--refresh-at",
    type=click.Choice(["end", "start", "policy"]),
    help="When a run counts as a refresh; `policy` to use the policy's setting.",
)
@output_option
@click.pass_obj
def update_token(  # noqa: PLR0913 - one for each option
    endpoint: str,
    name: str,
    *,
    policy: str | None,
    refresh_interval: float | Literal["policy"] | None,
    refresh_at: str | None,
    output: str,
) -> None:
    """Change settings of the token NAME.

    This never shortens a running cooldown or lease.
    """
    if policy is None and refresh_interval is None and refresh_at is None:
        raise click.UsageError("nothing to change: give --policy, --refresh-interval, --refresh-at")
    with Client(endpoint) as client:
        updated = client.update_token(
            name,
            policy=policy,
            refresh_interval_seconds=refresh_interval,
            refresh_at=refresh_at,
        )
        _emit(client, updated, output)


@token.command("show", epilog=example("holdoff token show apps/exact-nl/tokens/finance"))
@click.argument("name", type=Name(TokenName))
@output_option
@click.pass_obj
def show_token(endpoint: str, name: str, output: str) -> None:
    """Show the token NAME: its rules, its cooldown, who holds it, and whether it is in custody.

    `holdoff grant show` has more of what is in custody.
    """
    with Client(endpoint) as client:
        token = client.get_token(name)
        custody = _custody(client, name) if output != "json" else ""
        _emit(client, token, output, [("custody", custody)])


@token.command("list", epilog=example("holdoff token list", "holdoff token list apps/exact-nl"))
@click.argument("parent", type=Name(AppName), required=False)
@output_option
@click.pass_obj
def list_tokens(endpoint: str, parent: str | None, output: str) -> None:
    """List tokens, all of them or those of the app PARENT (apps/APP)."""
    with Client(endpoint) as client:
        tokens = list(client.list_tokens(parent or ""))
        if output == "json":
            emit_json({"tokens": [resource(token) for token in tokens]})
            return
        held = any(token.lease for token in tokens)
        leases = {lease.name: lease for lease in client.list_leases(parent or "")} if held else {}
    if tokens:
        headings = ("TOKEN", "STATE", "COOLDOWN", "HOLDER", "WAITERS")
        emit_table(headings, (_row(token, leases.get(token.lease)) for token in tokens))
    else:
        click.echo(f"no tokens{f' of {parent}' if parent else ''}", err=True)


@token.command("queue", epilog=example("holdoff token queue apps/exact-nl/tokens/finance"))
@click.argument("name", type=Name(TokenName))
@output_option
@click.pass_obj
def show_queue(endpoint: str, name: str, output: str) -> None:
    """Show who waits for the token NAME, in order.

    A waiter that is `silent`, not heard from for 5 s, is passed over; after a minute it loses its
    position.
    """
    with Client(endpoint) as client:
        waiters = client.list_waiters(name)
    if output == "json":
        emit_json({"waiters": [resource(waiter) for waiter in waiters]})
    elif waiters:
        headings = ("POSITION", "HOLDER", "PID", "STATE", "WAITED", "HEARD", "LABELS")
        emit_table(headings, (_waiter_row(waiter) for waiter in waiters))
    else:
        click.echo(f"no waiters for {name}", err=True)


@token.command(
    "history",
    epilog=example(
        "holdoff token history apps/exact-nl/tokens/finance",
        "holdoff token history apps/exact-nl/tokens/finance --at 03:10",
        "holdoff token history apps/exact-nl/tokens/finance --at '2h ago' --output json",
    ),
)
@click.argument("name", type=Name(TokenName))
@click.option("--at", type=Moment(), help="Only who held it at this time.")
@output_option
@click.pass_obj
def show_history(endpoint: str, name: str, at: datetime | None, output: str) -> None:
    """Show who held the token NAME, the newest first: the live lease and the last 100.

    TIME is 03:10 (the latest such time), 2026-11-24T03:10, both in local time,
    2026-11-24T03:10+01:00, or how long ago, such as 2h. A lease is shown in full by
    `holdoff lease show NAME/leases/LEASE`.
    """
    with Client(endpoint) as client:
        leases = client.list_lease_history(name, at=at)
        known = leases if leases or at is None else client.list_lease_history(name)
    if output == "json":
        emit_json({"leases": [resource(lease) for lease in leases]})
    elif leases:
        headings = ("FROM", "TO", "HELD", "HOLDER", "ENDED", "LEASE")
        emit_table(headings, (_history_row(lease) for lease in leases))
    elif at is None:
        click.echo(f"no leases of {name} yet", err=True)
    else:
        when = f"{at.astimezone():%Y-%m-%d %H:%M:%S%z}"
        since = f"; the history goes back to {time_text(known[-1], 'accept_time')}" if known else ""
        click.echo(f"no lease of {name} at {when}{since}", err=True)


def _row(token: token_pb2.Token, lease: lease_pb2.Lease | None) -> tuple[str, ...]:
    return (
        token.name,
        state_text(token),
        duration_text(token, "cooldown"),
        holder_text(lease.holder) if lease else NOTHING,
        str(token.queue_length),
    )


def _waiter_row(waiter: lease_pb2.Waiter) -> tuple[str, ...]:
    silent = waiter.heard_age.ToMicroseconds() > _SILENT_SECONDS * 1e6
    return (
        str(waiter.place),
        holder_text(waiter.holder),
        str(waiter.holder.pid or NOTHING),
        "offered" if waiter.offered else "silent" if silent else "waiting",
        duration_text(waiter, "waited"),
        f"{duration_text(waiter, 'heard_age')} ago",
        labels_text(waiter.holder),
    )


def _history_row(lease: lease_pb2.Lease) -> tuple[str, ...]:
    ended = (
        "still held" if lease.state == lease_pb2.LEASE_STATE_ACTIVE else enum_text(lease, "state")
    )
    return (
        *local_times(lease, "accept_time", "end_time"),
        held_text(lease),
        holder_text(lease.holder),
        ": ".join(filter(None, (ended, lease.break_reason))),
        lease.name.rpartition("/")[2],
    )


def _emit(
    client: Client, token: token_pb2.Token, output: str, more: Sequence[tuple[str, str]] = ()
) -> None:
    if output == "json":
        emit_json(resource(token))
        return
    # Looked up in the list, since the lease may have ended between the two answers.
    leases = client.list_leases(token.name) if token.lease else ()
    holders = [lease.holder for lease in leases if lease.name == token.lease]
    rules = token.rules
    own_interval = " (its own)" if token.HasField("refresh_interval") else ""
    own_refresh_at = " (its own)" if token.refresh_at else ""
    emit_record(
        [
            ("name", token.name),
            ("state", state_text(token)),
            ("cooldown left", duration_text(token, "cooldown")),
            ("holder", holder_text(holders[0]) if holders else NOTHING),
            ("labels", labels_text(holders[0]) if holders else NOTHING),
            ("lease", token.lease or NOTHING),
            ("shared leases", str(token.shared_lease_count or NOTHING)),
            ("waiters", str(token.queue_length)),
            ("policy", token.policy or "exact-online"),
            ("refresh interval", duration_text(rules, "refresh_interval") + own_interval),
            ("refresh at", enum_text(rules, "refresh_at") + own_refresh_at),
            ("access token life", duration_text(rules, "access_token_life")),
            ("lock name", token.lock_name or NOTHING),
            ("fencing token", str(token.fencing_token) if token.fencing_token else NOTHING),
            ("last refresh", time_text(token, "last_refresh_time")),
            ("not before", time_text(token, "not_before_time")),
            ("created", time_text(token, "create_time")),
            ("updated", time_text(token, "update_time")),
            *more,
        ]
    )


def _custody(client: Client, name: str) -> str:
    try:
        status = client.grants.get(name).status
    except GrantNotFound:
        return "no"
    except HoldoffError as error:  # the rest is shown
        return f"not known: {error}"
    return f"{enum_text(status, 'state')}: {status.message}"
