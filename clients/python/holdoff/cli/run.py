"""`holdoff run`: a command under a lease."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.shell_completion import CompletionItem

from holdoff._outcome import CannotRunError, GuardError, GuardLostError
from holdoff._output import Passage
from holdoff._platform import inherited_descriptors
from holdoff._process import Guard, which
from holdoff._text import MOST_JOB_CHARACTERS, described
from holdoff._timing import DEFAULT_TTL_SECONDS, MOST_WAIT_SECONDS, Timing
from holdoff.cli import exits
from holdoff.cli._account import Account, Interrupted, Order, now
from holdoff.cli._help import example
from holdoff.cli._voice import Voice
from holdoff.cli.params import MOST_LABELS, Duration, Label, Name
from holdoff.durations import format_duration
from holdoff.errors import HoldoffError, NotGranted
from holdoff.names import TokenName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from holdoff._outcome import Isolate
    from holdoff.cli._conduct import WhenQuiet
    from holdoff.cli._running import Run

LEAST_TTL_SECONDS = 1
MOST_TTL_SECONDS = 24 * 3600


def _labels(
    ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, str]]
) -> Mapping[str, str]:
    labels = dict(pairs)
    if len(pairs) > MOST_LABELS or len(labels) < len(pairs):
        raise click.BadParameter(f"give each key once, and at most {MOST_LABELS}", ctx, param)
    return labels


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=example(
        "holdoff run --token apps/exact-nl/tokens/finance --wait 2h -- datahub /file:job.sql",
        "holdoff run --token apps/exact-nl/tokens/finance --job nightly --label run=4711 -- ./job",
    ),
)
@click.option("--token", type=Name(TokenName), required=True, help="The token to hold.")
@click.option("--wait", type=Duration(), help="Wait at most this long. [default: without limit]")
@click.option("--no-wait", is_flag=True, help="Run now or not at all.")
@click.option(
    "--ttl",
    type=Duration(),
    default=DEFAULT_TTL_SECONDS,
    show_default="2m",
    help="How long the lease lasts after each renewal, 1s to 24h.",
)
@click.option(
    "--grace",
    type=Duration(),
    help="Time between TERM and KILL if the lease is lost. [default: 10s, or TTL/3 if less]",
)
@click.option("--job", default="", help="Name of the job, shown in lists of leases and waiters.")
@click.option(
    "--label",
    "labels",
    type=Label(),
    multiple=True,
    callback=_labels,
    metavar="KEY=VALUE",
    help=f"More information about this run, shown with its lease; up to {MOST_LABELS}.",
)
@click.option(
    "--division",
    "divisions",
    multiple=True,
    metavar="DIVISION",
    help="A division that the command will call: it waits while that is backing off.",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="PATH",
    help="An endpoint that it will call, in each division if any are given.",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Look for errors in this file, which the command writes, instead of its output.",
)
@click.option(
    "--read-output/--no-read-output",
    default=True,
    show_default=True,
    help="Look for errors in the command's output, which passes through unchanged.",
)
@click.option(
    "--trust-output",
    is_flag=True,
    help="Also count HOLDOFF-ERROR and HOLDOFF-BLOCKED lines without HOLDOFF_REPORT_KEY.",
)
@click.option(
    "--when-quiet",
    type=click.Choice(["pause", "finish", "terminate"]),
    help="What to do while a scope of the command is backing off. [default: set by the policy]",
)
@click.option(
    "--isolate",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Run the command in a PID namespace of its own.",
)
@click.option(
    "--if-unreachable",
    type=click.Choice(["fail", "run"]),
    default="fail",
    show_default=True,
    help="What to do when no coordinator answers within the wait: `run` runs without a lease.",
)
@click.option(
    "--access-token-file",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="Keep the current access token of a token in custody in this file, for the command.",
)
@click.option(
    "--gateway",
    is_flag=True,
    help="Serve a gateway for the command, whose URL is in HOLDOFF_GATEWAY_URL: its token is in "
    "custody, its calls are counted, and held while they have to wait.",
)
@click.option(
    "--result-file",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="Write a JSON report of the run to this file.",
)
@click.argument(
    "command",
    nargs=-1,
    type=click.UNPROCESSED,
    required=True,
    shell_complete=lambda _ctx, _param, word: [CompletionItem(word, type="file")],
)
@click.pass_obj
def run(  # noqa: PLR0913, PLR0917 - one argument an option
    coordinator: str,
    token: str,
    wait: float | None,
    no_wait: bool,
    ttl: float,
    grace: float | None,
    job: str,
    labels: Mapping[str, str],
    divisions: Sequence[str],
    endpoints: Sequence[str],
    log_file: Path | None,
    read_output: bool,
    trust_output: bool,
    when_quiet: WhenQuiet | None,
    isolate: Isolate,
    if_unreachable: str,
    access_token_file: Path | None,
    gateway: bool,
    result_file: Path | None,
    command: Sequence[str],
) -> None:
    """Run COMMAND while holding a lease on a token.

    COMMAND starts when it is its turn and the token's cooldown has passed. Its input, output,
    signals and exit code pass through. If the lease is lost, all processes that it started are
    ended before another job can get a lease, and the exit code is 79.

    Errors of the provider in its output, or in its log, are counted against the budgets of the
    token. While one of these is spent, or the provider blocks calls, the command is paused, or
    ended with exit code 75. COMMAND can report errors itself, with lines that begin with
    HOLDOFF-ERROR or HOLDOFF-BLOCKED and key=$HOLDOFF_REPORT_KEY.

    With --access-token-file the command starts when there is an access token. It reads the file
    before each call: it is replaced at each renewal, absent while there is no access token, and
    removed at the end. Only its owner can read it.

    With --gateway the command sends its calls to the URL in HOLDOFF_GATEWAY_URL in place of the
    API's, and needs no access token. Its calls are counted there, and not in its output.
    """
    if no_wait and wait is not None:
        raise click.UsageError("--wait and --no-wait exclude each other")
    if wait is not None and wait > MOST_WAIT_SECONDS:
        raise click.BadParameter(
            "must be at most 366d; without it the wait has no limit", param_hint="--wait"
        )
    _require_folders({"--result-file": result_file, "--access-token-file": access_token_file})
    _require_consistent(access_token_file, if_unreachable, log_file, gateway=gateway)
    order = Order(
        coordinator=coordinator,
        timing=_timing(ttl, grace),
        scopes=scopes_of(divisions, endpoints),
        # The gateway holds the calls: the command itself need not be paused.
        when_quiet=when_quiet or ("finish" if gateway else None),
        isolate=isolate,
        log_file=log_file,
        # Of log file and output one is read: Data Hub writes the same errors to both.
        # What the gateway counts is not counted again.
        read_output=read_output and not log_file and not gateway,
        trust_output=trust_output,
        access_token_file=access_token_file,
        gateway=gateway,
    )
    job = described(job, MOST_JOB_CHARACTERS)
    account = Account(token=token, job=job, labels=labels, requested_at=now())
    try:
        path = which(command[0])
        with _started(order, account) as one:
            wait = 0.0 if no_wait else wait
            one.run(path, command, wait, break_glass=if_unreachable == "run")
    except CannotRunError as error:
        account.outcome, account.reason = "cannot_run", str(error)
        account.exit_code = error.exit_code
        exits.complain(str(error), exits.CANNOT_RUN.get(error.exit_code, ""))
    except GuardLostError as error:
        account.reason, account.exit_code = str(error), exits.INTERNAL
        exits.complain(str(error), "start it again")
    except GuardError as error:
        account.outcome, account.reason = "cannot_run", str(error)
        account.exit_code = exits.CANNOT_EXECUTE
        exits.complain(str(error))
    except Interrupted as error:
        account.outcome, account.reason = "interrupted", str(error)
        account.exit_code = exits.SIGNAL_BASE + error.signum
        exits.complain(str(error))
    except HoldoffError as error:
        account.exit_code = exits.code_of(error) or exits.INTERNAL
        account.outcome, account.reason = _OUTCOMES.get(account.exit_code, "failed"), str(error)
        exits.complain(account.reason + _when(error), exits.remedy_of(error, coordinator))
    if result_file:
        account.write(result_file)
    raise click.exceptions.Exit(account.exit_code)


@contextlib.contextmanager
def _started(order: Order, account: Account) -> Iterator[Run]:
    """Start the guard, and what looks for errors.

    Raises:
        GuardError: There is no guard.
        click.BadParameter: The log file is none.
    """
    passed = inherited_descriptors()  # before there are some of our own
    with contextlib.ExitStack() as stack:
        voice = stack.enter_context(Voice())
        # Left when all of the output has been seen, so that its last errors are reported.
        connected = stack.enter_context(contextlib.ExitStack())
        read_output = order.read_output
        if read_output and not Guard.CAN_READ_OUTPUT:
            voice.say("the command's output is not searched for errors here: use --log-file")
            read_output = False
        passage = stack.enter_context(Passage()) if read_output else None
        stdio = passage.stdio if passage else None
        guard = stack.enter_context(Guard.spawn(stdio, order.isolate, passed))
        # Not at the top: they bring gRPC along, and the guard starts meanwhile.
        from holdoff import Client  # noqa: PLC0415
        from holdoff.cli._running import Run  # noqa: PLC0415

        client = connected.enter_context(Client(order.coordinator))
        one = connected.enter_context(Run(client, guard, voice, account, order))
        if order.log_file:
            try:
                one.read_log(order.log_file)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--log-file") from None
        guard.await_ready()
        if passage:
            one.read_output(passage)
        yield one


def _require_consistent(
    access_token_file: Path | None, if_unreachable: str, log_file: Path | None, *, gateway: bool
) -> None:
    """Refuse options of custody that exclude others."""
    if (access_token_file or gateway) and if_unreachable == "run":
        raise click.UsageError(
            "--access-token-file and --gateway exclude --if-unreachable run: a coordinator hands "
            "the access token out"
        )
    if access_token_file and gateway:
        raise click.UsageError("give --access-token-file or --gateway, not both")
    if gateway and log_file:
        raise click.UsageError("--gateway excludes --log-file: the gateway counts the errors")


def _require_folders(files: Mapping[str, Path | None]) -> None:
    for option, file in files.items():
        if file and not os.path.isdir(file.parent):  # noqa: PTH112 - never raises
            raise click.BadParameter("its folder does not exist", param_hint=option)


def _timing(ttl: float, grace: float | None) -> Timing:
    if not LEAST_TTL_SECONDS <= ttl <= MOST_TTL_SECONDS:
        raise click.BadParameter("must be from 1s to 24h", param_hint="--ttl")
    try:
        return Timing.of(ttl, grace)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--grace") from None


_OUTCOMES: dict[int, Literal["unreachable", "not_granted", "refused", "lease_lost"]] = {
    exits.UNREACHABLE: "unreachable",
    exits.NOT_GRANTED: "not_granted",
    exits.REFUSED: "refused",
    exits.LEASE_LOST: "lease_lost",
}


def _when(error: HoldoffError) -> str:
    """Say when to ask again, where that is known; in a quarantine the remedy says it."""
    seconds = error.retry_after_seconds if isinstance(error, NotGranted) else None
    if not seconds or error.reason == "QUARANTINED":
        return ""
    return f"; earliest start in {format_duration(round(seconds, 1))}"


def scopes_of(divisions: Sequence[str], endpoints: Sequence[str]) -> list[tuple[str, str]]:
    """Every endpoint in every division; an empty text where one of them is not known."""
    if not divisions and not endpoints:
        return []
    return list(itertools.product(divisions or [""], endpoints or [""]))
