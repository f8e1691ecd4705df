"""`holdoff-coordinator`: the service's command line."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import structlog
from click.exceptions import NoArgsIsHelpError
from pydantic import ValidationError

from holdoff.durations import format_duration, parse_duration
from holdoff.policies import PolicyError
from holdoff_coordinator import tracing
from holdoff_coordinator.access import AccessError
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.embedded import EmbeddedStore
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.gate import AccessFile
from holdoff_coordinator.restore import after_restore
from holdoff_coordinator.settings import LogFormat, Settings
from holdoff_coordinator.store import Access, Assumed, StoreError, check, connect, ensure_epoch
from holdoff_coordinator.tls import Certificates, TlsError

# What gRPC's core has to say would stand between the lines of our log, which are JSON. It looks
# at this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from holdoff_coordinator.policies import read_policies
from holdoff_coordinator.server import CannotListenError, Coordinator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    from holdoff.policies import Policy
    from holdoff_coordinator.cluster import StoreClient
    from holdoff_coordinator.store import Epoch

log = structlog.get_logger()

EX_USAGE = 64
EX_CANNOT_SERVE = 69
_MOST_IDENTITY = 200
_CREDENTIAL_FIELDS = ("id", "identity", "issue_time", "expire_time")


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
            _fail(EX_USAGE, f"{error.format_message().rstrip('.')}{where}")
        except click.Abort:  # Ctrl-C before we listen to it
            if not standalone_mode:
                raise
            raise SystemExit(128 + signal.SIGINT) from None
        if standalone_mode:
            raise SystemExit(code if isinstance(code, int) else 0)
        return code


@click.group(cls=_Group)
@click.version_option(version("holdoff"), prog_name="holdoff-coordinator")
def main() -> None:
    """Give out leases on refresh tokens, backed by Valkey or Redis.

    Example: holdoff-coordinator serve --data-dir ./holdoff-data
    """


_STORE_OPTIONS = (
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="Directory of the embedded store, for when no store URL is given.",
    ),
    click.option(
        "--redis-url",
        metavar="URL",
        help="Store: redis://HOST:PORT/DB, rediss:// (TLS), unix:///SOCKET, "
        "redis+sentinel://HOST:PORT,HOST:PORT/PRIMARY or redis+cluster://HOST:PORT,HOST:PORT; "
        "these two with TLS are rediss+….",
    ),
    click.option(
        "--redis-url-file",
        type=click.Path(path_type=Path),
        help="File that holds the store's URL, so that no password shows in the process list.",
    ),
    click.option(
        "--redis-password-file",
        type=click.Path(path_type=Path),
        help="File that holds the store's password, for a URL without one; read again for each "
        "connection.",
    ),
    click.option(
        "--redis-sentinel-password-file",
        type=click.Path(path_type=Path),
        help="File that holds the password of the Sentinels, if they have one.",
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
        help="Our certificate (PEM) for the store. [or ?ssl_certfile=FILE]",
    ),
    click.option(
        "--redis-key-file",
        type=click.Path(path_type=Path),
        help="Its key (PEM). [or ?ssl_keyfile=FILE]",
    ),
    click.option(
        "--assume",
        metavar="WORDS",
        help="What to believe of a managed store that does not tell: noeviction, "
        "fsync=always|everysec|no; several with commas.",
    ),
    click.option(
        "--quarantine-seconds",
        type=float,
        help="Least time without new leases after the store may have forgotten something.",
    ),
    click.option(
        "--log-format", type=click.Choice(["auto", "json", "console"]), help="Form of logs."
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
    help="Serve TLS with this certificate (PEM, with those between it and its authority).",
)
@click.option("--tls-key-file", type=click.Path(path_type=Path), help="Its key (PEM).")
@click.option(
    "--tls-client-ca-file",
    type=click.Path(path_type=Path),
    help="Serve only clients with a certificate of these authorities (PEM). Files for TLS are read "
    "again when they change.",
)
@click.option(
    "--access-file",
    type=click.Path(path_type=Path),
    help="Ask every caller who it is, and allow what this file (TOML) grants; read again when it "
    "changes. [default: whoever can connect may do everything]",
)
@click.option(
    "--insecure",
    is_flag=True,
    default=None,
    help="Listen beyond loopback without TLS, or without asking who calls.",
)
@click.option(
    "--health-listen",
    metavar="HOST:PORT",
    help="Answer health checks here too, and nothing else; without TLS.",
)
@click.option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Serve metrics for Prometheus here, at /metrics; without TLS.",
)
@_of_the_store
@click.option(
    "--policy-dir",
    type=click.Path(path_type=Path),
    help="Directory of policies (*.toml) beside the presets.",
)
@click.option("--drain-seconds", type=float, help="Time that open calls get at a stop.")
def serve(**options: Any) -> None:
    """Serve until SIGTERM or SIGINT.

    Every option is also an environment variable: --data-dir is HOLDOFF_DATA_DIR. Without a
    store URL a Valkey of its own is started in the data directory.

    Example: holdoff-coordinator serve --listen 127.0.0.1:50051 --data-dir ./holdoff-data
    """
    settings, store = _configured(options)
    try:
        policies = read_policies(settings.policy_dir)
    except PolicyError as error:
        _fail(EX_USAGE, f"{settings.policy_dir}/{error}")
    except OSError as error:
        _fail(EX_USAGE, _explain(error))
    try:
        files = settings.tls()
        certificates = Certificates(files) if files else None
        access = AccessFile(settings.access_file) if settings.access_file else None
    except (TlsError, AccessError) as error:
        _fail(EX_USAGE, str(error))
    except OSError as error:
        _fail(EX_USAGE, _explain(error))
    tracing.start()
    _run(_serve(settings, store, policies, certificates, access))


@main.command("after-restore")
@_of_the_store
def restored(**options: Any) -> None:
    """Hold back new leases after the store was restored from a backup.

    The backup does not know which leases and refreshes came after it. Stop the coordinators,
    restore, call this, and start them: nothing is granted until none of those can matter any
    more, the longest TTL and interval or --quarantine-seconds. Renewals go on.

    Example: holdoff-coordinator after-restore --redis-url redis://store:6379/0
    """
    settings, store = _configured(options)
    _run(_hold_back(settings, store))


@main.group("token", cls=_Group)
def credentials() -> None:
    """Issue, revoke and list credentials: bearer tokens that say who calls.

    What an identity may do stands in the file of --access-file. The commands work on the store, and
    beside coordinators that use it.
    """


@credentials.command("issue")
@click.argument("identity")
@click.option(
    "--expires-in",
    metavar="DURATION",
    default="90d",
    show_default=True,
    help="How long it is valid; `never` for no end.",
)
@_of_the_store
def issue(identity: str, expires_in: str, **options: Any) -> None:
    """Print a new credential. It is shown once: the store keeps a hash of it.

    Example: holdoff-coordinator token issue payroll-jobs --expires-in 90d
    """
    if not 1 <= len(identity) <= _MOST_IDENTITY or not identity.isprintable():
        _fail(EX_USAGE, f"IDENTITY: write 1 to {_MOST_IDENTITY} printable characters")
    try:
        life = 0 if expires_in == "never" else int(parse_duration(expires_in))
    except ValueError as error:
        _fail(EX_USAGE, f"--expires-in: {error}; or never")
    if not life and expires_in != "never":
        _fail(EX_USAGE, "--expires-in: write at least 1s, or never")

    async def work(known: Credentials) -> None:
        credential_id, text, expires = await known.issue(identity, life, _operator())
        click.echo(f"{credential_id} of {identity!r} expires: {_utc(expires)}", err=True)
        click.echo(text)

    _with_credentials(work, options)


@credentials.command("revoke")
@click.argument("credential_id", metavar="ID")
@_of_the_store
def revoke(credential_id: str, **options: Any) -> None:
    """Make a credential invalid; calls with it are refused within five seconds.

    Example: holdoff-coordinator token revoke 6f1b2c3d4e5f
    """

    async def work(known: Credentials) -> None:
        identity = await known.revoke(credential_id, _operator())
        if identity is None:
            raise Failure(
                "INVALID_FIELD",
                "there is no such credential; see: holdoff-coordinator token list",
            )
        click.echo(f"revoked: {credential_id} of {identity!r}")

    _with_credentials(work, options)


@credentials.command("list")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_of_the_store
def list_credentials(output: str, **options: Any) -> None:
    """List credentials: their ids, whose they are, and until when. They themselves are not kept.

    Example: holdoff-coordinator token list --output json
    """

    async def work(known: Credentials) -> None:
        found = [
            {
                "id": credential_id,
                "identity": one.identity,
                "issue_time": _utc(one.issued),
                "expire_time": _utc(one.expires),
            }
            for credential_id, one in await known.list()
        ]
        if output == "json":
            click.echo(json.dumps({"credentials": found}))
            return
        line = "{id:12}  {issue_time:20}  {expire_time:20}  {identity}"
        heads = {key: key.removesuffix("_time").upper() for key in _CREDENTIAL_FIELDS}
        for row in (heads, *found):
            click.echo(line.format(**row))

    _with_credentials(work, options)


def _operator() -> str:
    """Say who is at the keyboard, for the audit trail; in a container the user has no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _utc(seconds: int) -> str:
    if not seconds:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _with_credentials(
    work: Callable[[Credentials], Coroutine[Any, Any, None]], options: Mapping[str, Any]
) -> None:
    """Work on the credentials of a store, also of the embedded one that a coordinator runs."""
    settings, store = _configured(options)

    async def run() -> None:
        running = store.url or await EmbeddedStore(settings.data_dir).running_url()
        if running:
            client = connect(running, store.access)
            try:
                await work(Credentials(client))
            finally:
                await client.aclose()
        else:
            async with store.opened(settings) as (client, _, _):
                await work(Credentials(client))

    _run(run())


def _configured(options: Mapping[str, Any]) -> tuple[Settings, _Store]:
    """Read what the options and the environment say; end the process if that makes no sense."""
    settings = None
    try:
        settings = Settings(**{key: value for key, value in options.items() if value is not None})
        store = _Store(settings.store_url(), settings.access(), settings.assumed())
    except (ValidationError, OSError) as error:
        _fail(EX_USAGE, _explain(error))
    except UnicodeDecodeError:
        where = settings.redis_url_file if settings else ""
        _fail(EX_USAGE, f"{where} holds no text: write the store's URL into it")
    _configure_logs(settings.log_format)
    return settings, store


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except Failure as failure:
        _fail(EX_CANNOT_SERVE, failure.message)
    except (StoreError, CannotListenError) as error:
        _fail(EX_CANNOT_SERVE, str(error))


@dataclass(frozen=True, slots=True)
class _Store:
    """What to open: the embedded store, or the external one that a URL names."""

    url: str | None
    access: Access
    assumed: Assumed

    @contextlib.asynccontextmanager
    async def opened(
        self, settings: Settings
    ) -> AsyncIterator[tuple[StoreClient, EmbeddedStore | None, Epoch]]:
        """Open it, and judge it."""
        async with contextlib.AsyncExitStack() as stack:
            embedded = None
            if self.url is None:
                embedded = await stack.enter_async_context(EmbeddedStore(settings.data_dir))
            client = connect(embedded.url if embedded else self.url or "", self.access)
            stack.push_async_callback(client.aclose)
            try:
                for warning in await check(client, self.assumed):
                    log.warning(warning)
                epoch = await ensure_epoch(client, embedded.read_epoch() if embedded else None)
            except StoreError as error:
                raise (await embedded.explain(error) if embedded else error) from error
            yield client, embedded, epoch


async def _hold_back(settings: Settings, store: _Store) -> None:
    async with store.opened(settings) as (client, _, _):
        held_back = await after_restore(client, settings.quarantine_seconds)
    for app, seconds in held_back.items():
        click.echo(f"apps/{app}: no new lease for {format_duration(seconds)}")
    click.echo(
        f"apps that hold back new leases: {len(held_back)}; a coordinator that starts within "
        f"{format_duration(settings.quarantine_seconds)} also does so for apps that are made anew"
    )


async def _serve(
    settings: Settings,
    store: _Store,
    policies: Mapping[str, Policy],
    certificates: Certificates | None,
    access: AccessFile | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        client, embedded, epoch = await stack.enter_async_context(store.opened(settings))
        coordinator = Coordinator(
            client,
            policies=policies,
            epoch=epoch,
            listen=settings.listen,
            certificates=certificates,
            health_listen=settings.health_listen,
            access=access,
            metrics_listen=settings.metrics_listen,
            judge=partial(check, client, store.assumed),
            quarantine_seconds=settings.quarantine_seconds,
            drain_seconds=settings.drain_seconds,
        )
        if epoch.lost:
            log.error(
                "the store lost data: create tokens that are missing again; nothing is granted "
                "at first",
                quarantine_seconds=settings.quarantine_seconds,
            )
        elif embedded:
            embedded.write_epoch(epoch.epoch)
        await stack.enter_async_context(coordinator)
        if dangers := settings.dangers():
            log.warning("insecure: the port can be reached from other hosts", dangers=dangers)
        if embedded and epoch.lost:
            after_seconds = settings.quarantine_seconds
            await stack.enter_async_context(_remembering(embedded, epoch.epoch, after_seconds))
        await stop.wait()


@contextlib.asynccontextmanager
async def _remembering(
    embedded: EmbeddedStore, epoch: str, after_seconds: float
) -> AsyncIterator[None]:
    """Write the new epoch of a store that lost its data to its directory when that is safe.

    Until it is written, every restart finds the loss again and holds back grants anew.
    """

    async def write() -> None:
        await asyncio.sleep(after_seconds)
        try:
            embedded.write_epoch(epoch)
        except StoreError as error:
            log.warning("the next start will hold back grants again", reason=str(error))

    task = asyncio.create_task(write())
    yield
    task.cancel()


class _Logger:
    """Writes to standard error; once nobody reads that, the service goes on without its logs."""

    def _write(self, message: str) -> None:
        try:
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()
        except OSError:
            # What is still buffered must go somewhere, or Python ends with code 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    debug = info = warning = error = critical = _write


class _FromLibraries(logging.Handler):
    """Makes what libraries log, such as gRPC about a message of garbage, a line of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log.log(record.levelno, record.getMessage(), source=record.name, exc_info=record.exc_info)


def _configure_logs(log_format: LogFormat) -> None:
    """Structured logs on standard error: for people on a terminal, else JSON."""
    logging.basicConfig(handlers=[_FromLibraries()], level=logging.WARNING)
    people = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: _Logger(),
    )


def _explain(error: ValidationError | OSError) -> str:
    if isinstance(error, OSError):
        return f"cannot read {error.filename}: {error.strerror}"
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = str(first["msg"]).removeprefix("Value error, ")
    return f"--{where.replace('_', '-')}: {what}" if where else what


def _fail(code: int, message: str) -> NoReturn:
    click.echo(f"holdoff-coordinator: {message}", err=True)
    raise SystemExit(code)
