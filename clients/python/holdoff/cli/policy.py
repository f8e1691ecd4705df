"""`holdoff policy`: what providers ask, as the coordinator knows it, and files checked."""

from __future__ import annotations

from pathlib import Path

import click

from holdoff import Client
from holdoff._text import printable
from holdoff.cli import exits
from holdoff.cli._help import example
from holdoff.cli.output import (
    NOTHING,
    choose_output,
    duration_text,
    emit_json,
    emit_record,
    emit_table,
    enum_text,
    output_option,
    resource,
)
from holdoff.cli.params import PolicyName
from holdoff.policies import PolicyError, presets, read_policy
from holdoff.policies.writing import status_words, write_policy
from holdoff.v1 import policy_pb2


@click.group(epilog=example("holdoff policy list"))
def policy() -> None:
    """Show the rules of providers, and check files with rules of your own."""


@policy.command("list", epilog=example("holdoff policy list"))
@output_option
@click.pass_obj
def list_policies(endpoint: str, output: str) -> None:
    """List the policies that the coordinator knows."""
    with Client(endpoint) as client:
        policies = client.list_policies()
    if output == "json":
        emit_json({"policies": [resource(policy) for policy in policies]})
        return
    headings = ("POLICY", "PROVIDER", "INTERVAL", "LIMITS", "FROM")
    emit_table(headings, (_row(policy) for policy in policies))


@policy.command("show", epilog=example("holdoff policy show exact-online"))
@click.argument("name", type=PolicyName())
@choose_output(
    ("table", "json", "toml"), "A table for people, one JSON document, or a file to start from."
)
@click.pass_obj
def show_policy(endpoint: str, name: str, output: str) -> None:
    """Show the policy NAME.

    The output toml is a complete policy file with comments, to start a policy of your own from.
    """
    with Client(endpoint) as client:
        found = client.get_policy(name)
    if output == "json":
        emit_json(resource(found))
        return
    if output == "toml":
        click.echo(write_policy(found), nl=False)
        return
    refresh, block = found.refresh, found.block
    emit_record(
        [
            ("name", found.name),
            ("provider", found.title or NOTHING),
            ("from", _origin(found)),
            ("refresh interval", duration_text(refresh, "interval")),
            ("margin", duration_text(refresh, "margin")),
            ("refresh at", enum_text(refresh, "refresh_at")),
            ("access token life", duration_text(refresh, "access_token_life")),
            ("early margin", duration_text(refresh, "early_margin")),
            ("refresh tokens", enum_text(refresh, "rotation")),
            ("used ones stay valid", duration_text(refresh, "grace")),
            ("idle life", duration_text(refresh, "idle_life")),
            ("absolute life", duration_text(refresh, "absolute_life")),
            *(("token URL", url) for url in found.oauth.token_urls),
            *(("API host", host) for host in found.oauth.hosts),
            ("client authentication", ", ".join(found.oauth.client_authentication) or NOTHING),
            *(("authorization URL", url) for url in found.oauth.authorization_urls),
            ("scopes", " ".join(found.oauth.scopes) or NOTHING),
            ("authorization scheme", found.oauth.authorization_scheme or NOTHING),
            ("longest lease", duration_text(found, "longest_ttl")),
            ("runs at a time", f"{found.most_runs}, of a token in custody"),
            *((f"limit {limit.name}", _limit_text(limit)) for limit in found.limits),
            *(
                (f"concurrency {one.name}", _concurrency_text(one))
                for one in found.concurrency_limits
            ),
            ("block", _block_text(block)),
            *((f"throttle {one.name}", _throttle_text(one)) for one in found.throttles),
            (
                "back-off, a run",
                _WHEN_QUIET.get(found.when_quiet, enum_text(found, "when_quiet")),
            ),
            *(("error in output", pattern) for pattern in found.output.errors),
            *(("scope in output", pattern) for pattern in found.output.places),
            ("codes in output", _codes_text(found.output)),
            ("endpoint path", found.endpoint_path or NOTHING),
            ("division in query", ", ".join(found.division_query) or NOTHING),
        ]
    )


@policy.command("check", epilog=example("holdoff policy check my-provider.toml"))
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
def check_policies(files: tuple[Path, ...]) -> None:
    """Check policy files, without a coordinator.

    Put them into the directory that the coordinator reads with --policy-dir. Patterns are RE2
    regular expressions, without lookaround and backreferences.
    """
    wrong, known = False, set(presets())
    for path in files:
        try:
            found = read_policy(path)
        except (PolicyError, OSError) as error:
            complaint = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        else:
            complaint = ""
            if found.name in known:  # which the coordinator would refuse
                kind = "preset" if found.name in presets() else "policy"
                complaint = f"{path.name}:1: there is a {kind} {found.name} already: rename it"
        if complaint:
            exits.complain(complaint)
            wrong = True
        else:
            known.add(found.name)
            click.echo(printable(f"{path}: policy {found.name}, {len(found.limit)} limits"))
    if wrong:
        raise click.exceptions.Exit(exits.USAGE)


_WHEN_QUIET = {
    policy_pb2.WHEN_QUIET_UNSPECIFIED: "is paused",
    policy_pb2.WHEN_QUIET_PAUSE: "is paused",
    policy_pb2.WHEN_QUIET_FINISH: "may finish",
    policy_pb2.WHEN_QUIET_TERMINATE: "is ended",
}


def _row(policy: policy_pb2.Policy) -> tuple[str, ...]:
    return (
        policy.name,
        policy.title or NOTHING,
        duration_text(policy.refresh, "interval"),
        ", ".join(limit.name for limit in policy.limits) or NOTHING,
        _origin(policy),
    )


def _origin(policy: policy_pb2.Policy) -> str:
    return "preset" if policy.preset else "a file of the operator"


def _limit_text(limit: policy_pb2.Limit) -> str:
    statuses = f" ({', '.join(map(str, status_words(limit.statuses)))})" if limit.statuses else ""
    margin = f", margin {limit.margin}" if limit.margin else ""
    kind = enum_text(limit, "kind")
    return (
        f"{limit.most} {kind}s{statuses} in {duration_text(limit, 'window')} for each "
        f"{' + '.join(limit.scope)}{margin}"
    )


def _concurrency_text(limit: policy_pb2.ConcurrencyLimit) -> str:
    return f"{limit.most} calls at a time for each {' + '.join(limit.scope)}; not enforced yet"


def _block_text(block: policy_pb2.BlockPolicy) -> str:
    return (
        f"{duration_text(block, 'first')} of the {' + '.join(block.scope)}, then times "
        f"{block.factor:g} up to {duration_text(block, 'most')}"
    )


def _throttle_text(throttle: policy_pb2.Throttle) -> str:
    signs = [
        *map(str, status_words(throttle.statuses)),
        *([f"body with {throttle.body}"] if throttle.body else ()),
        *([f"header with {throttle.header}"] if throttle.header else ()),
    ]
    ends = [f"as {' or '.join(throttle.until)} says"] if throttle.until else []
    ends.append(
        f"for {duration_text(throttle, 'length')}" if throttle.HasField("length") else "as a block"
    )
    return f"{', '.join(signs)}: the {' + '.join(throttle.scope)}, {', else '.join(ends)}"


def _codes_text(output: policy_pb2.OutputPolicy) -> str:
    return (
        ", ".join(f"{code} = {status}" for code, status in sorted(output.codes.items())) or NOTHING
    )
