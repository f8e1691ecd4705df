"""What the commands of `holdoff-coordinator` do."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import click
import structlog
from pydantic import ValidationError

from holdoff._files import create
from holdoff._text import printable, printable_lines
from holdoff.durations import format_duration, parse_duration
from holdoff.policies import PolicyError
from holdoff_coordinator import tracing
from holdoff_coordinator.access import IDENTITY_TYPES, AccessError
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.custody import memory, spool_folder
from holdoff_coordinator.custody.grants import Terms
from holdoff_coordinator.custody.key_files import KeyDirectory, KeyFileError
from holdoff_coordinator.custody.spool_folder import SpoolFolderError, SpoolInUseError
from holdoff_coordinator.embedded import EmbeddedStore
from holdoff_coordinator.exits import EX_CANNOT_SERVE, EX_USAGE, fail
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.gate import AccessFile
from holdoff_coordinator.journal import with_priority
from holdoff_coordinator.limits import LIMITS
from holdoff_coordinator.policies import read_policies
from holdoff_coordinator.restore import after_restore
from holdoff_coordinator.seldom import Seldom
from holdoff_coordinator.server import CannotListenError, Coordinator
from holdoff_coordinator.settings import LogFormat, Settings, is_loopback
from holdoff_coordinator.store import Access, Assumed, StoreError, check, connect, ensure_epoch
from holdoff_coordinator.tls import Certificates, TlsError

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Callable,
        Coroutine,
        Iterator,
        Mapping,
        MutableMapping,
    )
    from pathlib import Path

    from holdoff.policies import Policy
    from holdoff_coordinator.cluster import StoreClient
    from holdoff_coordinator.durability import Durability
    from holdoff_coordinator.store import Epoch

    Options = Mapping[str, Any]  # what was given on the command line, by the name of the setting

log = structlog.get_logger()

_MOST_IDENTITY = 200
_OWN_FILES = 256
"""Open files other than connections of callers; most are connections to the store."""
_CREDENTIAL_FIELDS = ("id", "identity", "issue_time", "expire_time")


def serve(options: Options) -> None:
    """Serve until SIGTERM or SIGINT."""
    settings, store = _configured(options)
    try:
        policies = read_policies(settings.policy_dir)
    except PolicyError as error:
        fail(EX_USAGE, f"{settings.policy_dir}/{error}")
    except OSError as error:
        fail(EX_USAGE, _explain(error))
    try:
        files = settings.tls()
        certificates = Certificates(files) if files else None
        access = AccessFile(settings.access_file) if settings.access_file else None
        if settings.custody_key_dir:
            memory.protect()
        keys = KeyDirectory(settings.custody_key_dir) if settings.custody_key_dir else None
        if settings.custody_ca_file:
            _require_authorities(settings.custody_ca_file)
    except (TlsError, AccessError, KeyFileError) as error:
        fail(EX_USAGE, str(error))
    except OSError as error:
        fail(EX_USAGE, _explain(error))
    tracing.start()
    _run(_serve(settings, store, policies, _Files(certificates, access, keys)))


@contextlib.contextmanager
def _spool_held(spool: Path | None) -> Iterator[None]:
    """Keep other coordinators out of the spool; end the process if one uses it."""
    if spool is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(spool_folder.held(spool))
        except SpoolFolderError as error:
            code = EX_CANNOT_SERVE if isinstance(error, SpoolInUseError) else EX_USAGE
            fail(code, str(error))
        yield


def _require_authorities(path: Path) -> None:
    """Refuse a file without certificates of authorities; end the process then.

    Raises:
        OSError: It cannot be read.
    """
    path.open("rb").close()
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(path)
    except ssl.SSLError:
        fail(EX_USAGE, f"--custody-ca-file: {path} has no certificates (PEM) of authorities")


def hold_back(options: Options) -> None:
    """Hold back new leases after the store was restored from a backup."""
    settings, store = _configured(options)
    _run(_hold_back(settings, store))


def issue(identity: str, expires_in: str, output_file: Path | None, options: Options) -> None:
    """Write a new credential to a new file, or to the standard output."""
    if output_file is None and not sys.stdout.isatty():
        fail(
            EX_USAGE,
            "a credential is secret: write it to a new file that only you can read with "
            "--output-file FILE, or to the standard output with --output-file -",
        )
    if identity.partition(":")[0] in IDENTITY_TYPES:
        fail(EX_USAGE, "IDENTITY: omit the type; only the access file has credential: before it")
    if not 1 <= len(identity) <= _MOST_IDENTITY or not identity.isprintable():
        fail(EX_USAGE, f"IDENTITY: write 1 to {_MOST_IDENTITY} printable characters")
    try:
        life = 0 if expires_in == "never" else int(parse_duration(expires_in))
    except ValueError as error:
        fail(EX_USAGE, f"--expires-in: {error}; or never")
    if not life and expires_in != "never":
        fail(EX_USAGE, "--expires-in: write at least 1s, or never")

    async def work(known: Credentials) -> None:
        with _new_file(output_file) as file:
            credential_id, text, expires = await known.issue(identity, life, _operator())
            click.echo(text, file=file)
        click.echo(f"{credential_id} of {identity!r} expires: {_utc(expires)}", err=True)

    _with_credentials(work, options)


@contextlib.contextmanager
def _new_file(path: Path | None) -> Iterator[TextIO | None]:
    """Create a file that only we can read, and remove it if the work fails; None for `-`."""
    if path is None or str(path) == "-":
        yield None
        return
    try:
        descriptor = create(path)
    except OSError as error:
        fail(EX_USAGE, f"--output-file: cannot create {path}: {error.strerror}")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def revoke(credential_id: str, options: Options) -> None:
    """Make a credential invalid."""

    async def work(known: Credentials) -> None:
        identity = await known.revoke(credential_id, _operator())
        if identity is None:
            raise Failure(
                "INVALID_FIELD",
                "there is no such credential; see: holdoff-coordinator token list",
            )
        click.echo(f"revoked: {credential_id} of {identity!r}")

    _with_credentials(work, options)


def list_credentials(output: str, options: Options) -> None:
    """List credentials, as a table or as JSON."""

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
            click.echo(printable(line.format(**row)))

    _with_credentials(work, options)


def _operator() -> str:
    """Say who is at the keyboard, for the audit trail; in a container the user has no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"operator:{user}@{socket.gethostname()}"


def _utc(seconds: int) -> str:
    if not seconds:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _with_credentials(
    work: Callable[[Credentials], Coroutine[Any, Any, None]], options: Options
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
            async with store.connected(settings, new=False) as (client, embedded):
                await store.judged(client, embedded)
                await work(Credentials(client))

    _run(run())


def _configured(options: Options) -> tuple[Settings, _Store]:
    """Read what the options and the environment say; end the process if that makes no sense."""
    settings = None
    try:
        settings = Settings(**{key: value for key, value in options.items() if value is not None})
        store = _Store(
            settings.store_url(), settings.access(), settings.assumed(), settings.durability()
        )
    except (ValidationError, OSError) as error:
        fail(EX_USAGE, _explain(error))
    except UnicodeDecodeError:
        where = settings.redis_url_file if settings else ""
        fail(EX_USAGE, f"{where} holds no text: write the store's URL into it")
    _configure_logs(settings.log_format)
    return settings, store


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except Failure as failure:
        fail(EX_CANNOT_SERVE, failure.message)
    except (StoreError, CannotListenError) as error:
        fail(EX_CANNOT_SERVE, str(error))
    except Exception:
        log.exception("ended by a fault of Holdoff: please report it")
        raise SystemExit(1) from None


@dataclass(frozen=True, slots=True)
class _Store:
    """What to open: the embedded store, or the external one that a URL names."""

    url: str | None
    access: Access
    assumed: Assumed
    durability: Durability

    @contextlib.asynccontextmanager
    async def connected(
        self, settings: Settings, *, new: bool
    ) -> AsyncIterator[tuple[StoreClient, EmbeddedStore | None]]:
        """Connect to it, starting the embedded one; `new` says whether that may be a new one."""
        async with contextlib.AsyncExitStack() as stack:
            embedded = None
            if self.url is None:
                embedded = EmbeddedStore(settings.data_dir)
                if not new:
                    embedded.expect()
                await stack.enter_async_context(embedded)
                log.info("the store is an embedded one", data_dir=str(settings.data_dir))
            client = connect(embedded.url if embedded else self.url or "", self.access)
            stack.push_async_callback(client.aclose)
            yield client, embedded

    async def judged(self, client: StoreClient, embedded: EmbeddedStore | None) -> Epoch:
        """Judge it, and return its epoch."""
        try:
            for warning in await check(client, self.assumed, self.durability):
                log.warning(warning)
            return await ensure_epoch(client, embedded.read_epoch() if embedded else None)
        except StoreError as error:
            raise (await embedded.explain(error) if embedded else error) from error

    async def opened(
        self, client: StoreClient, embedded: EmbeddedStore | None, quarantine_seconds: float
    ) -> Epoch:
        """Judge it for a coordinator, and have its directory remember its epoch."""
        epoch = await self.judged(client, embedded)
        if epoch.lost:
            log.error(
                "the store lost data: create tokens that are missing again; nothing is granted at "
                "first",
                quarantine_seconds=quarantine_seconds,
            )
        if embedded:
            embedded.opened(epoch.epoch, quarantine_seconds, lost=epoch.lost)
        return epoch


@dataclass(frozen=True, slots=True)
class _Files:
    """Files that are read again when they change; None for those that were not named."""

    certificates: Certificates | None = None
    access: AccessFile | None = None
    custody_keys: KeyDirectory | None = None


async def _hold_back(settings: Settings, store: _Store) -> None:
    async with store.connected(settings, new=False) as (client, embedded):
        await store.judged(client, embedded)
        held_back = await after_restore(client, settings.quarantine_seconds)
    for app, seconds in held_back.items():
        click.echo(f"apps/{app}: no new lease for {format_duration(seconds)}")
    click.echo(
        f"apps that hold back new leases: {len(held_back)}; a coordinator that starts within "
        f"{format_duration(settings.quarantine_seconds)} also does so for new apps"
    )


async def _serve(
    settings: Settings,
    store: _Store,
    policies: Mapping[str, Policy],
    files: _Files,
) -> None:
    stop, outdated = asyncio.Event(), list[Failure]()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def on_outdated(failure: Failure) -> None:
        """Leave the place to the newer coordinator, so that its clients go there."""
        outdated.append(failure)
        stop.set()

    async with contextlib.AsyncExitStack() as stack:
        client, embedded = await stack.enter_async_context(store.connected(settings, new=True))
        # After the embedded store, whose error fits better if its directory is in use.
        stack.enter_context(_spool_held(settings.spool()))
        coordinator = Coordinator(
            client,
            policies=policies,
            open_store=partial(store.opened, client, embedded, settings.quarantine_seconds),
            listen=settings.listen,
            certificates=files.certificates,
            health_listen=settings.health_listen,
            access=files.access,
            client_identity=settings.client_identity.split(","),
            metrics_listen=settings.metrics_listen,
            judge=partial(check, client, store.assumed, store.durability),
            durability=store.durability,
            quarantine_seconds=settings.quarantine_seconds,
            drain_seconds=settings.drain_seconds,
            limits=_with_open_files(settings.limits()),
            custody=_terms(settings, files),
        )
        coordinator.scripts.on_outdated = on_outdated
        if embedded:
            embedded.on_loss = coordinator.scripts.data_is_lost
        _follow_hangups(stop, partial(_reload, settings, coordinator, files))
        if await _before(stop, stack.enter_async_context(coordinator)):
            if dangers := settings.dangers():
                log.warning("insecure: the port can be reached from other hosts", dangers=dangers)
            await stop.wait()
    if outdated:
        raise outdated[0]


def _terms(settings: Settings, files: _Files) -> Terms:
    """Say on what terms grants are taken into custody."""
    keys = files.custody_keys
    if keys and not files.access:
        log.warning(
            "custody without an access file: every user of this host can use the tokens in custody",
            remedy="--access-file",
        )
    return Terms(
        keys.keys if keys else dict,
        is_closed=bool(files.access) or is_loopback(settings.listen),
        loopback_http=settings.custody_loopback_http,
        networks=settings.networks(),
        ca_file=settings.custody_ca_file,
        spool=settings.spool(),
    )


def _with_open_files(limits: dict[str, int]) -> dict[str, int]:
    """Lower the limit on connections to what the system's limit on open files allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    wanted = limits.get("connections", LIMITS["connections"].default)
    possible = max(1, most - _OWN_FILES)
    if most == resource.RLIM_INFINITY or possible >= wanted:
        return limits
    if "connections" in limits:
        log.warning(
            "fewer connections than configured: raise the limit on open files", most=possible
        )
    return {**limits, "connections": possible}


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Do some work and return True, or give it up and return False when we are to stop."""
    tasks = [asyncio.create_task(work), asyncio.create_task(stop.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    working, stopping = tasks
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait([working])
        return False
    working.result()
    return True


def _reload(settings: Settings, coordinator: Coordinator, files: _Files) -> None:
    """Read policies and files again; certificates are read for each new connection."""
    try:
        coordinator.policies.use(read_policies(settings.policy_dir))
    except (PolicyError, OSError) as error:
        log.warning(
            "policies stay as they were", folder=str(settings.policy_dir), reason=str(error)
        )
    if files.access:
        files.access.look()
    if files.custody_keys:
        files.custody_keys.look()
    log.info("reloaded")


def _follow_hangups(stop: asyncio.Event, reload: Callable[[], None]) -> None:
    """On SIGHUP reload, or drain when what hung up is our terminal.

    The kernel sends SIGHUP when a terminal is gone, and we have none from then on. Under `nohup`
    that is to be ignored.
    """
    had_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN

    def hung_up() -> None:
        if had_terminal and not _has_terminal():
            log.warning("the terminal is gone")
            stop.set()
        else:
            reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)


def _has_terminal() -> bool:
    """Tell whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _harmless(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Escape control characters: some texts come from callers, the store and providers."""
    return {
        printable(key): printable_lines(value) if isinstance(value, str) else value
        for key, value in event.items()
    }


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
    """Logs what libraries log, each kind of line at most once a minute.

    A caller can cause some of these lines with each call: gRPC and asyncio log what fails in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seldom = Seldom()

    def emit(self, record: logging.LogRecord) -> None:
        more = self._seldom.due((record.name, record.pathname, record.lineno))
        if more is not None:
            log.log(
                record.levelno,
                record.getMessage(),
                source=record.name,
                exc_info=record.exc_info,
                **({"more_like_it": more} if more else {}),
            )


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
            _harmless,
            structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(),
            lambda _, level, line: with_priority(level, str(line)),
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
