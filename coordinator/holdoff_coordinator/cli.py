"""`holdoff-coordinator`: the service's command line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import structlog
from click.exceptions import NoArgsIsHelpError
from pydantic import ValidationError

from holdoff.policies import PolicyError
from holdoff_coordinator.embedded import EmbeddedStore
from holdoff_coordinator.settings import LogFormat, Settings
from holdoff_coordinator.store import StoreError, check, connect, ensure_epoch

# What gRPC's core has to say would stand between the lines of our log, which are JSON. It looks
# at this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from holdoff_coordinator.policies import read_policies
from holdoff_coordinator.server import CannotListenError, Coordinator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from holdoff.policies import Policy

log = structlog.get_logger()

EX_USAGE = 64
EX_CANNOT_SERVE = 69


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


@main.command()
@click.option("--listen", metavar="HOST:PORT", help="Address to serve. [default: 127.0.0.1:50051]")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Directory of the embedded store, for when no store URL is given.",
)
@click.option("--redis-url", metavar="URL", help="Store: redis://, rediss:// or unix://.")
@click.option(
    "--redis-url-file",
    type=click.Path(path_type=Path),
    help="File that holds the store's URL, so that no password shows in the process list.",
)
@click.option(
    "--policy-dir",
    type=click.Path(path_type=Path),
    help="Directory of policies (*.toml) beside the presets.",
)
@click.option("--log-format", type=click.Choice(["auto", "json", "console"]), help="Form of logs.")
@click.option(
    "--quarantine-seconds",
    type=float,
    help="Least time without new leases after the store may have forgotten something.",
)
@click.option("--drain-seconds", type=float, help="Time that open calls get at a stop.")
def serve(**options: Any) -> None:
    """Serve until SIGTERM or SIGINT.

    Every option is also an environment variable: --data-dir is HOLDOFF_DATA_DIR. Without a
    store URL a Valkey of its own is started in the data directory.

    Example: holdoff-coordinator serve --listen 127.0.0.1:50051 --data-dir ./holdoff-data
    """
    try:
        settings = Settings(**{key: value for key, value in options.items() if value is not None})
        store_url = settings.store_url()
        policies = read_policies(settings.policy_dir)
    except PolicyError as error:
        _fail(EX_USAGE, f"{settings.policy_dir}/{error}")
    except (ValidationError, OSError) as error:
        _fail(EX_USAGE, _explain(error))
    except UnicodeDecodeError:
        _fail(EX_USAGE, f"{settings.redis_url_file} holds no text: write the store's URL into it")
    _configure_logs(settings.log_format)
    try:
        asyncio.run(_serve(settings, store_url, policies))
    except (StoreError, CannotListenError) as error:
        _fail(EX_CANNOT_SERVE, str(error))


async def _serve(settings: Settings, store_url: str | None, policies: Mapping[str, Policy]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        embedded = None
        if store_url is None:
            embedded = await stack.enter_async_context(EmbeddedStore(settings.data_dir))
            store_url = embedded.url
        redis = connect(store_url)
        stack.push_async_callback(redis.aclose)
        try:
            for warning in await check(redis):
                log.warning(warning)
            epoch = await ensure_epoch(redis, embedded.read_epoch() if embedded else None)
        except StoreError as error:
            raise (await embedded.explain(error) if embedded else error) from error
        if embedded and not epoch.lost:
            embedded.write_epoch(epoch.epoch)
        coordinator = Coordinator(
            redis,
            store_url=store_url,
            policies=policies,
            epoch=epoch,
            listen=settings.listen,
            quarantine_seconds=settings.quarantine_seconds,
            drain_seconds=settings.drain_seconds,
        )
        await stack.enter_async_context(coordinator)
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

    log.error(
        "the store lost its data: create its tokens again; nothing is granted at first",
        quarantine_seconds=after_seconds,
    )
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
