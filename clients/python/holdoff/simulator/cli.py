"""The command `holdoff simulator`."""

from __future__ import annotations

import asyncio

import click

from holdoff.simulator.rules import ACCESS_TOKEN_LIFE_MS, SECOND_MS, Rotation
from holdoff.simulator.server import serve_until_signal

# Faster than this, an access token would not live for one real second.
_MOST_TIME_SCALE = ACCESS_TOKEN_LIFE_MS / SECOND_MS


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


@click.command()
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
    help="Simulated seconds in a real one.",
)
@click.option(
    "--rotation",
    type=click.Choice([str(rotation) for rotation in Rotation]),
    default=str(Rotation.REUSE),
    show_default=True,
    help="Whether used refresh tokens go on working (reuse) or are refused (strict).",
)
def simulator(listen: tuple[str, int], time_scale: float, rotation: str) -> None:
    """Run a simulated Exact Online to test jobs against.

    Prints one line with its URL. URL/_simulator/seed tells the client id, the
    secret and the first refresh token; URL/_simulator/report who broke which
    rule when. SIGINT and SIGTERM end it.
    """
    host, port = listen
    try:
        asyncio.run(
            serve_until_signal(
                host,
                port,
                time_scale=time_scale,
                rotation=Rotation(rotation),
                ready=lambda url: click.echo(
                    f"simulated Exact Online at {url} (time x {time_scale:g}, rotation {rotation})"
                ),
            )
        )
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}") from error
