"""`holdoff gateway`: an HTTP proxy that gives calls the access token of a token in custody."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdoff import _files
from holdoff.cli._help import example
from holdoff.cli._voice import say
from holdoff.cli.params import Duration, Name
from holdoff.gateway.server import Options
from holdoff.gateway.serving import Listen, serving
from holdoff.names import TokenName

if TYPE_CHECKING:
    from holdoff.gateway.serving import Serving

_MOST_SECRET_BYTES = 1_000
_LEAST_SECRET_CHARACTERS = 16


@click.command(
    "gateway",
    epilog=example(
        "holdoff gateway --token apps/exact-nl/tokens/finance --url-file /run/jobs/gateway.url",
        "holdoff gateway --token apps/exact-nl/tokens/finance --listen unix:/run/jobs/gateway.sock",
    ),
)
@click.option("--token", type=Name(TokenName), required=True, help="The token in custody.")
@click.option(
    "--listen",
    default="127.0.0.1:8377",
    show_default=True,
    metavar="HOST:PORT|unix:PATH",
    help="Where jobs send their calls: a port of this host, or a Unix socket of its owner alone.",
)
@click.option(
    "--tls",
    metavar="auto|CERT,KEY",
    help="Serve TLS: with a certificate of an authority that is made for this run, which is in "
    "--ca-out, or with a certificate and its key in files. [default: no TLS]",
)
@click.option(
    "--ca-out",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="Where to write what jobs must trust, with --tls auto.",
)
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="File with the secret that begins each path. [default: a random one]",
)
@click.option(
    "--url-file",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="Write the URL for jobs, with the secret, to this file, which only its owner can read. "
    "[default: print it]",
)
@click.option(
    "--upstream",
    default="",
    metavar="HOST",
    help="The API host of the grant that calls go to. [default: the only one]",
)
@click.option(
    "--hold",
    type=Duration(),
    default=20.0,
    show_default="20s",
    help="How long a call waits for room in its budgets, and for an access token.",
)
@click.option(
    "--rewrite-links",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Change links to the next page, so that jobs follow them through the gateway.",
)
@click.option("--job", default="", help="Name of the job, shown where its calls are listed.")
@click.pass_obj
def gateway(  # noqa: PLR0913, PLR0917 - one for each option
    endpoint: str,
    token: str,
    listen: str,
    tls: str | None,
    ca_out: Path | None,
    secret_file: Path | None,
    url_file: Path | None,
    upstream: str,
    hold: float,
    rewrite_links: str,
    job: str,
) -> None:
    """Forward the calls of jobs to the API, with the access token of a token in custody.

    Jobs use the URL that the command prints in place of the API's: they send the same paths, and
    may ask its token endpoint for an access token, which is a stand-in. Each call is counted, and
    held while a budget of it is spent or its scope backs off; then it is answered with 429.

    It takes the role `gateway`. Ctrl-C and TERM let calls in flight end.
    """
    where = _listen(listen, tls, ca_out)
    secret = _secret(secret_file) if secret_file else ""
    try:
        asyncio.run(
            _serve(
                endpoint,
                token,
                where,
                Options(hold, job, rewrites_links=rewrite_links == "auto"),
                upstream,
                secret,
                url_file,
            )
        )
    except OSError as error:
        raise click.UsageError(
            f"cannot listen on {listen}: {error.strerror}; choose another with --listen"
        ) from None


async def _serve(  # noqa: PLR0913, PLR0917 - what it needs
    endpoint: str,
    token: str,
    listen: Listen,
    options: Options,
    upstream: str,
    secret: str,
    url_file: Path | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop.set)
    async with serving(endpoint, token, listen, options, upstream=upstream, secret=secret) as one:
        _show(one, token, url_file, is_known=bool(secret))
        try:
            await stop.wait()
        finally:
            if url_file:
                url_file.unlink(missing_ok=True)  # noqa: ASYNC240 - at the end
            say("the gateway ends: calls in flight may end")


def _show(one: Serving, token: str, url_file: Path | None, *, is_known: bool) -> None:
    say(f"forwarding calls for {token} to {one.upstream}")
    if url_file:
        _files.write(url_file, f"{one.url}\n".encode())
        say(f"serving on {one.base}; the URL for jobs is in {url_file}")
    elif is_known or not one.secret:
        click.echo(one.base)
    else:
        click.echo(one.url)


def _listen(text: str, tls: str | None, ca_out: Path | None) -> Listen:
    if (tls == "auto") != (ca_out is not None):
        raise click.UsageError("--tls auto and --ca-out belong together")
    if text.startswith("unix:"):
        if tls:
            raise click.UsageError("a Unix socket needs no TLS: leave out --tls")
        return Listen(path=text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if colon and port.isdecimal() and int(port) <= 65535:  # noqa: PLR2004 - the last port
            return Listen(host, int(port), tls=_tls(tls, host, ca_out) if tls else None)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from None
    raise click.BadParameter(f"{text!r} is neither HOST:PORT nor unix:PATH", param_hint="--listen")


def _tls(kind: str, host: str, ca_out: Path | None) -> ssl.SSLContext:
    try:
        if ca_out:
            from holdoff._authority import server_context  # noqa: PLC0415 - slow, and an extra

            return server_context("Holdoff gateway", host, ca_out)
        cert, _, key = kind.partition(",")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key or None)
    except ModuleNotFoundError:
        raise click.UsageError(
            "--tls auto needs the package cryptography: pip install 'holdoff[gateway]'"
        ) from None
    except OSError as error:  # of SSL, too
        raise click.UsageError(
            f"--tls: {error.filename or kind}: {error.strerror or error}"
        ) from None
    return context


def _secret(path: Path) -> str:
    """Read the secret; no error repeats it."""
    with path.open("rb") as file:
        raw = file.read(_MOST_SECRET_BYTES)
    text = raw.decode("ascii", "replace").strip()
    if len(text) < _LEAST_SECRET_CHARACTERS or not text.replace("-", "").replace("_", "").isalnum():
        raise click.BadParameter(
            f"the secret in {path} must be at least {_LEAST_SECRET_CHARACTERS} letters, digits, - "
            "and _",
            param_hint="--secret-file",
        )
    return text
