"""`holdoff-coordinator`: the service's command line; `commands` carries it out."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import NoArgsIsHelpError

from holdoff._version import VERSION
from holdoff_coordinator.exits import EX_OUTPUT_LOST, EX_USAGE, fail

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType


class _Group(click.Group):
    """Says in one line what is wrong with the command line, with the exit code of `holdoff`."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except NoArgsIsHelpError as error:
            error.show()
            raise SystemExit(EX_USAGE) from None
        except click.UsageError as error:
            if not standalone_mode:
                raise
            where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            fail(EX_USAGE, f"{error.format_message().rstrip('.')}{where}")
        except OSError as error:
            if error.filename is not None or error.errno != errno.ENOSPC:
                raise
            # What is still buffered must go somewhere, or Python ends with code 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            fail(EX_OUTPUT_LOST, "cannot write the output: its disk is full")
        except click.Abort:  # Ctrl-C before we listen to it
            if not standalone_mode:
                raise
            raise SystemExit(128 + signal.SIGINT) from None
        if standalone_mode:
            raise SystemExit(code if isinstance(code, int) else 0)
        return code


def _commands() -> ModuleType:
    """Import what carries the commands out: help does without gRPC, redis-py and pydantic."""
    # What gRPC's core has to say would stand between the lines of our log, which are JSON. It looks
    # at this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from holdoff_coordinator import commands  # noqa: PLC0415

    return commands


@click.group(cls=_Group)
@click.version_option(VERSION, prog_name="holdoff-coordinator")
def main() -> None:
    """Serve leases on OAuth refresh tokens; manage credentials and keys. State: Valkey or Redis.

    Example: holdoff-coordinator serve --data-dir ./holdoff-data
    """


_STORE_OPTIONS = (
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="Directory of the embedded store, used if no store URL is given. Use the same one in "
        "every command. [default: /var/lib/holdoff for root, else "
        "$XDG_STATE_HOME/holdoff or ~/.local/state/holdoff]",
    ),
    click.option(
        "--redis-url",
        metavar="URL",
        help="Store: redis://HOST:PORT/DB, rediss:// (TLS), unix:///SOCKET, "
        "redis+sentinel://HOST:PORT,HOST:PORT/PRIMARY or redis+cluster://HOST:PORT,HOST:PORT; "
        "the last two with TLS begin with rediss+.",
    ),
    click.option(
        "--redis-url-file",
        type=click.Path(path_type=Path),
        help="File that contains the store's URL, so that no password is in the process list.",
    ),
    click.option(
        "--redis-password-file",
        type=click.Path(path_type=Path),
        help="File that contains the store's password, for a URL without one; reread for each "
        "connection.",
    ),
    click.option(
        "--redis-sentinel-password-file",
        type=click.Path(path_type=Path),
        help="File that contains the password of the Sentinels, if they have one.",
    ),
    click.option(
        "--redis-ca-file",
        type=click.Path(path_type=Path),
        help="Authorities (PEM) for the store's certificate. [default: the system's; or in the "
        "URL ?ssl_ca_certs=FILE]",
    ),
    click.option(
        "--redis-cert-file",
        type=click.Path(path_type=Path),
        help="Client certificate (PEM) for the store. [or in the URL ?ssl_certfile=FILE]",
    ),
    click.option(
        "--redis-key-file",
        type=click.Path(path_type=Path),
        help="Its key (PEM). [or in the URL ?ssl_keyfile=FILE]",
    ),
    click.option(
        "--assume",
        metavar="WORDS",
        help="What to assume about a store that does not report it: noeviction, "
        "fsync=always|everysec|no; separated by commas.",
    ),
    click.option(
        "--quarantine-seconds",
        type=float,
        help="Minimum quarantine: time without new leases after a possible loss of data. "
        "[default: 900]",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["auto", "json", "console"]),
        help="Log format; auto is console on a terminal, else json. [default: auto]",
    ),
)


def _of_the_store(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_STORE_OPTIONS):
        command = option(command)
    return command


@main.command()
@click.option("--listen", metavar="HOST:PORT", help="Address to serve. [default: 127.0.0.1:50051]")
@click.option(
    "--tls-cert-file",
    type=click.Path(path_type=Path),
    help="Serve TLS with this certificate (PEM, including intermediate certificates).",
)
@click.option("--tls-key-file", type=click.Path(path_type=Path), help="Its key (PEM).")
@click.option(
    "--tls-client-ca-file",
    type=click.Path(path_type=Path),
    help="Require a client certificate of these authorities (PEM). Files for TLS are reread when "
    "they change.",
)
@click.option(
    "--access-file",
    type=click.Path(path_type=Path),
    help="Authenticate every caller, and allow what this file (TOML) grants; reread when it "
    "changes. [default: every caller may do everything]",
)
@click.option(
    "--client-identity",
    metavar="TYPES",
    help="Types of names (SAN) in a client certificate that identify the client, separated by "
    "commas, the preferred one first: dns, email, ip, uri. [default: uri,dns]",
)
@click.option(
    "--insecure",
    is_flag=True,
    default=None,
    help="Allow other addresses than loopback without TLS, or without authentication.",
)
@click.option(
    "--health-listen",
    metavar="HOST:PORT",
    help="Also answer health checks at this address, without TLS.",
)
@click.option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Serve metrics for Prometheus at this address, under /metrics, without TLS.",
)
@_of_the_store
@click.option(
    "--policy-dir",
    type=click.Path(path_type=Path),
    help="Directory of policies (*.toml), in addition to the presets.",
)
@click.option(
    "--custody-key-dir",
    type=click.Path(path_type=Path),
    help="Directory of the master keys that encrypt what is in custody (ID.key, made with `key "
    "generate`); reread when it changes. [default: no custody]",
)
@click.option(
    "--custody-spool-dir",
    type=click.Path(path_type=Path),
    help="Directory of this replica alone, where answers with access tokens lie encrypted until "
    "they are in the store; created if needed. [default: spool in --data-dir]",
)
@click.option(
    "--custody-network",
    metavar="CIDR",
    multiple=True,
    callback=lambda _context, _option, given: ",".join(given) or None,
    help="A network that is not public and that token URLs in custody may be in, such as "
    "10.1.0.0/16; repeatable. In HOLDOFF_CUSTODY_NETWORK, separated by commas. [default: none]",
)
@click.option(
    "--custody-ca-file",
    type=click.Path(path_type=Path),
    help="Authorities (PEM) for the certificates of token URLs in custody, besides those of the "
    "system; reread for each request.",
)
@click.option(
    "--custody-loopback-http",
    is_flag=True,
    default=None,
    help="Allow token URLs in custody that begin with http:// and are on this host, such as a "
    "simulator's.",
)
@click.option(
    "--limit",
    metavar="NAME=N",
    multiple=True,
    callback=lambda _context, _option, given: ",".join(given) or None,
    help="Change a limit on what one caller may use; repeatable. NAME: watches, waits, follows, "
    "access-tokens, calls, calls-per-second, reservations, scope-bytes, connections or streams. In "
    "HOLDOFF_LIMIT, separated by commas.",
)
@click.option(
    "--drain-seconds", type=float, help="Time for open calls to end at a stop. [default: 5]"
)
@click.option(
    "--wait-replicas",
    type=int,
    metavar="N",
    help="Acknowledge a grant, a refresh, a reservation or a report only when so many replicas of "
    "the store have it (WAIT). [default: 0]",
)
@click.option(
    "--wait-fsync",
    is_flag=True,
    default=None,
    help="... and when these and the primary have it on their disks (WAITAOF).",
)
@click.option(
    "--wait-seconds",
    type=float,
    help="How long to wait; then the call fails, and a grant is taken back. [default: 0.5]",
)
def serve(**options: Any) -> None:
    """Serve until SIGTERM or SIGINT.

    Every option is also an environment variable: --data-dir is HOLDOFF_DATA_DIR. Without a
    store URL it starts its own Valkey in the data directory.

    Example: holdoff-coordinator serve --listen 127.0.0.1:50051 --data-dir ./holdoff-data
    """
    _commands().serve(options)


@main.command("after-restore")
@_of_the_store
def restored(**options: Any) -> None:
    """Hold back new leases after a restore of the store.

    A backup does not contain the leases and refreshes that came after it. Stop the coordinators,
    restore the backup, run this command, and start the coordinators. No lease is granted for
    --quarantine-seconds, or for the longest TTL plus the longest interval if that is longer.
    Renewals continue. Give the --data-dir or --redis-url of the coordinators; the command never
    creates a store.

    Example: holdoff-coordinator after-restore --redis-url redis://store:6379/0
    """
    _commands().hold_back(options)


@main.group("token", cls=_Group)
def credentials() -> None:
    """Issue, revoke and list credentials of callers.

    A credential is a bearer token with an identity. The file of --access-file defines what an
    identity may do. The commands work directly on the store, also while coordinators use it: give
    them the same --data-dir or --redis-url. They never create a store.

    Example: holdoff-coordinator token issue payroll-jobs --output-file payroll.credential
    """


@credentials.command("issue")
@click.argument("identity")
@click.option(
    "--expires-in",
    metavar="DURATION",
    default="90d",
    show_default=True,
    help="How long it is valid; `never` for no expiry.",
)
@click.option(
    "--output-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the credential to a new file that only you can read; - is the standard output. "
    "[default: the standard output, if it is a terminal]",
)
@_of_the_store
def issue(identity: str, expires_in: str, output_file: Path | None, **options: Any) -> None:
    """Issue a new credential. It is shown only once: the store keeps only a hash of it.

    In the access file its identity is credential:IDENTITY.

    Example: holdoff-coordinator token issue payroll-jobs --output-file payroll.credential
    """
    _commands().issue(identity, expires_in, output_file, options)


@credentials.command("revoke")
@click.argument("credential_id", metavar="ID")
@_of_the_store
def revoke(credential_id: str, **options: Any) -> None:
    """Revoke a credential.

    Calls with it are refused within five seconds.

    Example: holdoff-coordinator token revoke 6f1b2c3d4e5f
    """
    _commands().revoke(credential_id, options)


@credentials.command("list")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_of_the_store
def list_credentials(output: str, **options: Any) -> None:
    """List credentials: their ids, identities and expiry.

    Example: holdoff-coordinator token list --output json
    """
    _commands().list_credentials(output, options)


@main.group("key", cls=_Group)
def keys() -> None:
    """Generate and list master keys, which encrypt what is in custody.

    A key is a file ID.key, which only its owner can read, in the directory that `serve
    --custody-key-dir` names. Every replica needs the same keys. Keep a copy of them, apart from the
    backups of the store: without its key a token must be authorized again.

    Example: holdoff-coordinator key generate --key-dir /etc/holdoff/keys
    """


_KEY_ID = click.argument("key_id", metavar="[ID]", required=False)
_KEY_DIR = click.option(
    "--key-dir",
    type=click.Path(path_type=Path),
    envvar="HOLDOFF_CUSTODY_KEY_DIR",
    required=True,
    help="Directory of the keys. [or in HOLDOFF_CUSTODY_KEY_DIR]",
)


@keys.command("generate")
@_KEY_ID
@_KEY_DIR
def generate_key(key_id: str | None, key_dir: Path) -> None:
    """Write a new random key to a new file, and print its id.

    By default the id is the time. The directory is created if needed. A key is never overwritten.

    Example: holdoff-coordinator key generate --key-dir /etc/holdoff/keys
    """
    _key_commands().generate(key_dir, key_id)


@keys.command("list")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_KEY_DIR
def list_keys(output: str, key_dir: Path) -> None:
    """List keys, and why one cannot be used.

    CHECK is derived from the key, and does not reveal it: equal keys have an equal CHECK.

    Example: holdoff-coordinator key list --key-dir /etc/holdoff/keys
    """
    _key_commands().list_keys(key_dir, output)


@keys.command("rotate")
@_KEY_ID
@_KEY_DIR
def rotate_key(key_id: str | None, key_dir: Path) -> None:
    """Write a new key like `generate`, and explain what to do next.

    Example: holdoff-coordinator key rotate --key-dir /etc/holdoff/keys
    """
    _key_commands().rotate(key_dir, key_id)


def _key_commands() -> ModuleType:
    from holdoff_coordinator.custody import key_commands  # noqa: PLC0415 - only if needed

    return key_commands
