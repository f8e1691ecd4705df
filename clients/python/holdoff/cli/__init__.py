"""The `holdoff` command."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from holdoff import _streams, _tracing
from holdoff._endpoint import DEFAULT_ENDPOINT, ENDPOINT_VARIABLE, CredentialFile, Endpoint, tls_of
from holdoff._text import quoted
from holdoff.cli import exits
from holdoff.cli._help import example

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "run": ("holdoff.cli.run", "Run a command under a lease."),
    "gateway": ("holdoff.cli.gateway", "Forward calls to the API with a token in custody."),
    "watch": ("holdoff.cli.watch", "Watch tokens and leases, live."),
    "token": ("holdoff.cli.token", "Create, update, show and list tokens; queues and history."),
    "grant": ("holdoff.cli.grant", "Put OAuth grants into custody, and get access tokens."),
    "lease": ("holdoff.cli.lease", "Show, list and break leases."),
    "budget": ("holdoff.cli.budget", "Show the use of limits; report errors, and reset budgets."),
    "spool": ("holdoff.cli.spool", "Show and send error reports that are stored on this host."),
    "backoff": ("holdoff.cli.backoff", "List, set and clear back-offs."),
    "quarantine": ("holdoff.cli.quarantine", "Show and end quarantines: no new leases of an app."),
    "explain": ("holdoff.cli.explain", "Show whether a job may start now, and if not, why."),
    "audit": ("holdoff.cli.audit", "Show who did what, from where, when and why."),
    "policy": ("holdoff.cli.policy", "Show the rules of providers; check files of your own."),
    "simulator": ("holdoff.simulator.cli", "A simulated provider, to test jobs against."),
    "completion": ("holdoff.cli.completion", "Print the completion script of a shell."),
}


class _Group(click.Group):
    """Imports a command when it is called, and turns every error into its exit code.

    What is registered are stand-ins with a name and a summary, which is all that help, completion
    and suggestions need; gRPC, aiohttp and rich take far longer to import than those may take.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, (_, summary) in _COMMANDS.items():
            self.add_command(click.Command(name, help=summary))

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        module, _ = _COMMANDS[name]
        return name, getattr(import_module(module), name), rest

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Exit codes"):
            formatter.write_dl(list(exits.TABLE))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            exits.discard_output()
            raise click.exceptions.Exit(exits.BROKEN_PIPE) from error
        except UnicodeEncodeError as error:
            raise click.UsageError(f"{quoted(str(error.object))} is not UTF-8") from None
        except Exception as error:
            code = exits.code_of(error)
            if code is None:
                raise
            exits.complain(str(error), exits.remedy_of(error, ctx.params["endpoint"]))
            raise click.exceptions.Exit(code) from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        _streams.prepare()
        try:
            # Outside of its standalone mode click returns the code of an `Exit`, and leaves
            # errors, to which it would give codes of its own, to us.
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except Exception as error:  # noqa: BLE001 - the last one there is
            exits.end(error)
        sys.exit(code if isinstance(code, int) else exits.OK)


def _checked(_: click.Context, param: click.Parameter, endpoint: str) -> str:
    try:
        Endpoint.parse(endpoint)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from None
    return endpoint


@click.group(
    cls=_Group,
    context_settings={"max_content_width": 100},
    epilog=example("holdoff --endpoint coordinator:50051 watch"),
)
@click.option(
    "--endpoint",
    metavar="HOST:PORT[,…]",
    envvar=ENDPOINT_VARIABLE,
    default=DEFAULT_ENDPOINT,
    show_envvar=True,
    show_default=True,
    callback=_checked,
    help="Where the coordinator listens; or several addresses, separated by commas.",
)
@click.version_option(package_name="holdoff", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, endpoint: str) -> None:
    """Leases on OAuth refresh tokens, so that jobs on many servers run as one.

    To use TLS, set HOLDOFF_CA_FILE to the authorities (PEM) of the coordinator's certificate. Set
    HOLDOFF_CERT_FILE and HOLDOFF_KEY_FILE if it requires a client certificate.
    Set HOLDOFF_CREDENTIAL_FILE to a file with your credential if it authenticates callers.
    """
    try:
        CredentialFile(None, endpoint, tls_of())
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    ctx.with_resource(_tracing.command(f"holdoff {ctx.invoked_subcommand}"))
    ctx.obj = endpoint  # which commands get with `click.pass_obj`
