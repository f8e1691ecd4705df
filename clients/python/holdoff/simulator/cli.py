"""The commands of `holdoff simulator`."""

from __future__ import annotations

import asyncio
import json
import ssl
import tempfile
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import click
from click.shell_completion import CompletionItem

from holdoff.simulator import seeds, tables
from holdoff.simulator.faults import FaultKind
from holdoff.simulator.limits import ACCESS_TOKEN_LIFE_MS, DAY_MS, GRACE_MS, SECOND_MS
from holdoff.simulator.oauth import Rotation
from holdoff.simulator.server import serve_until_signal, serving
from holdoff.simulator.switches import DEFAULTS, HELP, SETTINGS, Switches

# Faster than this, an access token would not live for one real second.
_MOST_TIME_SCALE = ACCESS_TOKEN_LIFE_MS / SECOND_MS
_MOST_GRACE_SECONDS = 3650 * DAY_MS / SECOND_MS
_MOST_SEEDS = 100  # apps, and users of each
_ANSWER_SECONDS = 10


class _Unavailable(click.ClickException):
    """An address that does not answer, or cannot be listened on."""

    exit_code = 69


class _Address(click.ParamType[tuple[str, int]]):
    """`HOST:PORT`, an IPv6 host in brackets."""

    name = "host:port"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):  # converted before
            return value
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 -- the last port
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


class _Switch(click.ParamType[str]):
    """`NAME=VALUE` of a switch."""

    name = "name=value"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            DEFAULTS.set(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        return [CompletionItem(text) for text in SETTINGS if text.startswith(incomplete)]


class _Rotation(click.Choice[str]):
    """A word for a rotation; the error for a former one names its successor."""

    _FORMER: ClassVar[dict[str, str]] = {"reuse": "reusable", "strict": "single-use"}

    def __init__(self) -> None:
        super().__init__([str(rotation) for rotation in Rotation])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if word := self._FORMER.get(value):
            self.fail(f"{value!r} is now {word!r}", param, ctx)
        return super().convert(value, param, ctx)


class _SeedFile(click.ParamType[tuple[seeds.Seed, ...]]):
    """A file with seeds; in Python the seeds."""

    name = "file"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[seeds.Seed, ...]:
        if isinstance(value, tuple):  # converted before
            return value
        try:
            return seeds.read(Path(value))
        except OSError as error:
            self.fail(f"{value}: {error.strerror}", param, ctx)
        except ValueError as error:
            self.fail(f"{value}: {error}", param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


class _Url(click.ParamType[str]):
    """The base URL of a simulator."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.startswith(("http://", "https://")):
            self.fail(f"{value!r} is not a URL such as http://127.0.0.1:8080", param, ctx)
        return value.rstrip("/")


class _Serve(click.Command):
    """Explains each switch in its help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Switches, the default value first"):
            formatter.write_dl(HELP)
        super().format_epilog(ctx, formatter)


_ca_option = click.option(
    "--ca-file",
    type=click.Path(exists=True, dir_okay=False),
    help="The CA of a simulator that runs with --tls.",
)
_output_option = click.option(
    "--output",
    "-o",
    type=click.Choice(["table", "json"]),
    default="table",
    envvar="HOLDOFF_OUTPUT",
    show_envvar=True,
    show_default=True,
    help="A table for people, or one JSON document.",
)


@click.group(epilog="Example: holdoff simulator serve --listen 127.0.0.1:8080")
def simulator() -> None:
    """Run a simulated provider to test jobs with; show who broke which rule."""


@simulator.command(
    "serve",
    cls=_Serve,
    epilog="Example: holdoff simulator serve --listen 127.0.0.1:8080 --time-scale 60"
    " --rotation single-use --switch error-window=clock-hour --tls --ca-out ca.pem",
)
@click.option(
    "--listen",
    type=_Address(),
    default="127.0.0.1:0",
    show_default=True,
    help="Address to listen on; port 0 picks a free one.",
)
@click.option(
    "--time-scale",
    type=click.FloatRange(min=0, max=_MOST_TIME_SCALE, min_open=True),
    default=1.0,
    show_default=True,
    help="Simulated seconds per real second.",
)
@click.option(
    "--rotation",
    type=_Rotation(),
    default=str(Rotation.UNTIL_USED),
    show_default=True,
    help="How long an old refresh token is valid; see above.",
)
@click.option(
    "--grace",
    "grace_seconds",
    type=click.FloatRange(min=0, max=_MOST_GRACE_SECONDS),
    help="Seconds that a used token remains valid, with --rotation grace.  [default: 1800]",
)
@click.option(
    "--switch",
    "settings",
    type=_Switch(),
    multiple=True,
    help="Choose a behaviour that the provider does not document; see below. Repeatable.",
)
@click.option(
    "--seed-file",
    "seeds_of_file",
    type=_SeedFile(),
    help="Apps and users, as TOML ([[seeds]]) or as the JSON that URL/_simulator/seed returns.",
)
@click.option("--tls", is_flag=True, help="Listen on https, with a certificate made at the start.")
@click.option(
    "--ca-out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the CA that clients must trust.  [default: a temporary file]",
)
@click.option("--apps", type=click.IntRange(1, _MOST_SEEDS), help="Number of apps.  [default: 1]")
@click.option(
    "--users", type=click.IntRange(1, _MOST_SEEDS), help="Number of users of each.  [default: 1]"
)
def serve(  # noqa: PLR0913 -- one for each option
    listen: tuple[str, int],
    *,
    time_scale: float,
    rotation: str,
    grace_seconds: float | None,
    settings: tuple[str, ...],
    seeds_of_file: tuple[seeds.Seed, ...] | None,
    tls: bool,
    ca_out: Path | None,
    apps: int | None,
    users: int | None,
) -> None:
    """Run a simulated Exact Online until SIGINT or SIGTERM.

    Prints one line with its URL. URL/_simulator/seed returns the client ids, the
    secrets and the first refresh tokens. All times are simulated.

    \b
    A newer refresh token replaces an old one. By --rotation the old one is valid
    none                forever: a refresh returns no new one
    reusable            forever: some apps of Exact Online
    until-used          until a newer one is used: Exact Online, Shopify
    grace               for a period after its first use
    single-use          not at all
    single-use-revokes  not at all, and its use revokes all tokens of the chain
    """  # noqa: D301 -- click wants the backspace itself
    if seeds_of_file and (apps or users):
        raise click.UsageError("--seed-file defines the apps and users: omit --apps and --users")
    if grace_seconds is None:
        grace_seconds = GRACE_MS / SECOND_MS
    elif rotation != Rotation.GRACE:
        raise click.UsageError("--grace belongs to --rotation grace")
    if ca_out and not tls:
        raise click.UsageError("--ca-out belongs to --tls")
    host, port = listen
    with ExitStack() as stack:
        if tls and ca_out is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="holdoff-simulator-"))
            ca_out = Path(folder, "ca.pem")
        server = serving(
            host,
            port,
            time_scale=time_scale,
            rotation=Rotation(rotation),
            grace_seconds=grace_seconds,
            switches=reduce(Switches.set, settings, DEFAULTS),
            seeds=seeds_of_file or seeds.many(apps or 1, users or 1),
            tls=ca_out,
        )

        def ready(url: str) -> None:
            ca = f", CA {ca_out}" if tls else ""
            click.echo(
                f"simulated Exact Online at {url} (time x {time_scale:g}, rotation {rotation}{ca})"
            )

        try:
            asyncio.run(serve_until_signal(server, ready))
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"--tls needs the package {error.name}: pip install 'holdoff[simulator]'"
            ) from error
        except OSError as error:
            if error.filename:
                raise click.UsageError(f"--ca-out {error.filename}: {error.strerror}") from error
            reason = (error.strerror or str(error)).rpartition(": ")[2]
            raise _Unavailable(
                f"cannot listen on {host}:{port}: {reason};"
                " choose another address with --listen, port 0 picks a free one"
            ) from error


@simulator.command("report", epilog="Example: holdoff simulator report http://127.0.0.1:8080")
@click.argument("url", type=_Url())
@_ca_option
@_output_option
def report(url: str, ca_file: str | None, output: str) -> None:
    """Show who broke which rule of the simulator at URL.

    It also shows the blocks, and the counted errors.
    """
    document = _ask(url, ca_file, "GET", "report")
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        tables.show_report(document)


@simulator.command(
    "fault",
    epilog="Example: holdoff simulator fault http://127.0.0.1:8080 reset"
    " --count 3 --path /api/oauth2/token",
)
@click.argument("url", type=_Url())
@click.argument(
    "kind",
    metavar="[KIND]",
    type=click.Choice([str(kind) for kind in FaultKind]),
    required=False,
)
@click.option(
    "--path",
    help="Prefix of the request's path.  [default: /api/, for html any, for *-answer the token"
    " endpoint]",
)
@click.option("--count", type=click.IntRange(1), help="How many requests.  [default: 1]")
@click.option("--seconds", type=float, help="Simulated seconds that a fault with a duration lasts.")
@click.option(
    "--status",
    type=click.IntRange(300, 599),
    help="Status of an error, 500 to 599, or of a redirect, 300 to 399.  [default: 500]",
)
@click.option(
    "--without",
    multiple=True,
    help="Field that a partial answer lacks. Repeatable.  [default: access_token]",
)
@click.option("--clear", is_flag=True, help="Discard all pending faults.")
@_ca_option
@_output_option
def fault(
    url: str, kind: str | None, *, clear: bool, ca_file: str | None, output: str, **fields: Any
) -> None:
    """Inject a fault into the next requests to the simulator at URL.

    Without KIND it lists the pending faults.

    \b
    The request has no effect:
    error           a 5xx
    hang            no response, then the connection closes
    reset           the connection is reset
    html            a maintenance page with status 200

    \b
    The request has its effect, for example a token is issued:
    slow-body       the correct response, sent slowly in small pieces
    late-answer     the correct response, later, even if the client is gone
    partial-answer  the correct response without some fields
    lost-answer     the connection is reset before the response
    hung-answer     no response, then the connection closes
    error-answer    a 5xx instead of the response
    html-answer     a maintenance page with status 200 instead of the response
    """  # noqa: D301 -- click wants the backspace itself
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    if kind is None and given:
        raise click.UsageError(f"--{next(iter(given))} needs a KIND of fault")
    if kind and clear:
        raise click.UsageError("--clear takes no KIND: it discards all of them")
    if kind:
        document = _ask(url, ca_file, "POST", "faults", {"fault": kind, **given})
    else:
        document = _ask(url, ca_file, "DELETE" if clear else "GET", "faults")
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        tables.show_pending(document["pending"])


def _ask(
    url: str,
    ca_file: str | None,
    method: str,
    page: str,
    document: dict[str, Any] | None = None,
) -> Any:
    """Ask a simulator.

    Raises:
        click.UsageError: it refused what was asked.
        click.ClickException: it does not answer, or is none.
    """
    try:
        trust = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise click.UsageError(f"--ca-file {ca_file}: it has no certificate") from error

    async def ask() -> tuple[int, Any]:
        limit = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.request(
                method, f"{url}/_simulator/{page}", json=document, ssl=trust
            ) as response,
        ):
            return response.status, await response.json()

    try:
        status, answer = asyncio.run(ask())
    except aiohttp.InvalidURL as error:
        raise click.UsageError(f"{url!r} is not a URL") from error
    except (aiohttp.ContentTypeError, json.JSONDecodeError) as error:
        raise _Unavailable(
            f"the server at {url} is not a simulator; which URL did it print?"
        ) from error
    except aiohttp.ClientConnectorCertificateError as error:
        raise _Unavailable(
            f"the certificate of the simulator at {url} is not trusted;"
            " name the file of --ca-out with --ca-file"
        ) from error
    except TimeoutError as error:
        raise _Unavailable(f"no answer from {url} within {_ANSWER_SECONDS} s") from error
    except aiohttp.ClientError as error:
        raise _Unavailable(
            f"cannot reach a simulator at {url}; does `holdoff simulator serve` run there?"
        ) from error
    if status == 400:  # noqa: PLR2004 -- HTTP's Bad Request
        raise click.UsageError(answer["error"])
    return answer
