"""`holdoff token`: create, update, show and list tokens."""

import click

from holdoff import Client
from holdoff.cli.output import (
    NOTHING,
    duration_text,
    emit_json,
    emit_record,
    emit_table,
    enum_text,
    holder_text,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import Duration, LastRefreshed, Name
from holdoff.names import AppName, TokenName
from holdoff.v1 import lease_pb2, token_pb2

_interval_option = click.option(
    "--refresh-interval",
    type=Duration(),
    help="Least time between two refreshes, taken exactly; without it, as the policy says.",
)
_refresh_at_option = click.option(
    "--refresh-at",
    type=click.Choice(["end", "start"]),
    help="When a run is taken to refresh; without it, as the policy says.",
)


@click.group()
def token() -> None:
    """Create, update, show and list tokens."""


@token.command("create")
@click.argument("name", type=Name(TokenName))
@click.option("--policy", default="", help="The provider's rules.  [default: exact-online]")
@_interval_option
@_refresh_at_option
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

    Its app needs no creation of its own. Durations are decimals with ms, s, m, h or d.
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


@token.command("update")
@click.argument("name", type=Name(TokenName))
@click.option("--policy", help="The provider's rules.")
@_interval_option
@_refresh_at_option
@output_option
@click.pass_obj
def update_token(  # noqa: PLR0913 - one for each option
    endpoint: str,
    name: str,
    *,
    policy: str | None,
    refresh_interval: float | None,
    refresh_at: str | None,
    output: str,
) -> None:
    """Change the settings that are given of the token NAME.

    A running cooldown or lease is not shortened by it.
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


@token.command("show")
@click.argument("name", type=Name(TokenName))
@output_option
@click.pass_obj
def show_token(endpoint: str, name: str, output: str) -> None:
    """Show the token NAME: its rules, its cooldown, and who holds it."""
    with Client(endpoint) as client:
        _emit(client, client.get_token(name), output)


@token.command("list")
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


def _row(token: token_pb2.Token, lease: lease_pb2.Lease | None) -> tuple[str, ...]:
    return (
        token.name,
        _state(token),
        duration_text(token, "cooldown"),
        holder_text(lease.holder) if lease else NOTHING,
        str(token.queue_length),
    )


def _emit(client: Client, token: token_pb2.Token, output: str) -> None:
    if output == "json":
        emit_json(resource(token))
        return
    # Looked up in the list, since the lease may have ended between the two answers.
    leases = client.list_leases(token.name) if token.lease else ()
    holders = [holder_text(lease.holder) for lease in leases if lease.name == token.lease]
    rules = token.rules
    own_interval = " (its own)" if token.HasField("refresh_interval") else ""
    own_refresh_at = " (its own)" if token.refresh_at else ""
    emit_record(
        [
            ("name", token.name),
            ("state", _state(token)),
            ("cooldown left", duration_text(token, "cooldown")),
            ("holder", holders[0] if holders else NOTHING),
            ("lease", token.lease or NOTHING),
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
        ]
    )


def _state(token: token_pb2.Token) -> str:
    if token.wait_reason == lease_pb2.WAIT_REASON_UNSPECIFIED:
        return "free"
    return enum_text(token, "wait_reason")
