"""`holdoff run`: a command under a lease."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import signal
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import click
from click.shell_completion import CompletionItem

from holdoff import (
    Client,
    HeldLease,
    HoldoffError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    NotGranted,
    Unavailable,
)
from holdoff._core import DEFAULT_TTL_SECONDS, Timing
from holdoff._outcome import CannotRunError, GuardError, Outcome
from holdoff._output import LogTail, Passage
from holdoff._process import Guard, caught_signals, which
from holdoff._reporting import Reporter, flush_leftovers
from holdoff._spool import Spool
from holdoff.cli import exits
from holdoff.cli._conduct import ENDED_BY, Conduct
from holdoff.cli._fencing import last_fencing_token, remember_fencing_token
from holdoff.cli._help import example
from holdoff.cli._waiting import WaitDisplay, say
from holdoff.cli.params import MOST_LABELS, Duration, Label, Name
from holdoff.durations import format_duration
from holdoff.names import TokenName
from holdoff.v1 import lease_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from holdoff._outcome import Event, Isolate
    from holdoff.cli._conduct import WhenQuiet

LEAST_TTL_SECONDS = 1
MOST_TTL_SECONDS = 24 * 3600
REST_SECONDS = 5.0
"""How long the rest of the output is waited for before the lease is given back."""
REPORT_SECONDS = 5.0
"""How long reports are tried before it; then they wait on disk."""
_LOOK_SECONDS = 0.02

# What does not end a process that has not asked for it.
_HARMLESS_SIGNALS = {
    getattr(signal, name, None) for name in ("SIGWINCH", "SIGURG", "SIGCONT", "SIGTSTP")
}

VARIABLES = ("HOLDOFF_TOKEN", "HOLDOFF_LEASE", "HOLDOFF_FENCING_TOKEN")


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal ended the wait."""

    def __init__(self, signum: int) -> None:
        # Of the real-time signals only the first and the last have a name.
        known = signum in signal.Signals.__members__.values()
        name = signal.Signals(signum).name if known else f"signal {signum}"
        super().__init__(f"ended by {name} while waiting")
        self.signum = signum


@dataclass(slots=True)
class Account:
    """What happened, for `--result-file`: a child may itself exit with 75 or 79."""

    token: str
    job: str
    labels: Mapping[str, str]
    outcome: Literal[
        "exited",
        "signaled",
        "lease_lost",
        "backed_off",
        "not_granted",
        "unreachable",
        "refused",
        "cannot_run",
        "interrupted",
        "failed",
    ] = "failed"
    exit_code: int = exits.INTERNAL
    """The exit code of `holdoff run`."""
    child_exit_code: int | None = None
    child_signal: int | None = None
    lease: str | None = None
    """Name of the lease; absent when the command ran without one, or did not run."""
    fencing_token: int | None = None
    reason: str = ""
    """Why there was no lease, why it was lost, or why the command had to be quiet."""
    errors_seen: int = 0
    """Errors and blocks seen in what the command wrote."""
    requested_at: str = ""
    started_at: str | None = None
    ended_at: str | None = None
    waited_seconds: float | None = None

    def write(self, path: Path) -> None:
        """Write the account whole or not at all."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            say(f"cannot write {path}: {error.strerror}")
            draft.unlink(missing_ok=True)


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
    help="Life of the lease after each renewal, 1s to 24h.",
)
@click.option(
    "--grace",
    type=Duration(),
    help="Time between TERM and KILL if the lease is lost. [default: 10s, or TTL/3 if less]",
)
@click.option("--job", default="", help="Name of the job, for people who look at leases.")
@click.option(
    "--label",
    "labels",
    type=Label(),
    multiple=True,
    callback=_labels,
    metavar="KEY=VALUE",
    help=f"Something else to know about this run, for people and programs; up to {MOST_LABELS}.",
)
@click.option(
    "--division",
    "divisions",
    multiple=True,
    metavar="DIVISION",
    help="A division that the command will call: it waits while that must be quiet.",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="PATH",
    help="An endpoint that it will call, in each of the divisions if some are given.",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Look for errors in this file that the command writes, and not in its output.",
)
@click.option(
    "--read-output/--no-read-output",
    default=True,
    show_default=True,
    help="Look for errors in the command's output, which passes through unchanged.",
)
@click.option(
    "--when-quiet",
    type=click.Choice(["pause", "finish", "terminate"]),
    help="What to do while a scope of the command must be quiet. [default: as the policy says]",
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
    help="What to do when no coordinator answers within the wait: `run` breaks the glass.",
)
@click.option(
    "--result-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a JSON account of the run to this file.",
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
    when_quiet: WhenQuiet | None,
    isolate: Isolate,
    if_unreachable: str,
    result_file: Path | None,
    command: Sequence[str],
) -> None:
    """Run COMMAND while holding a lease on a token.

    COMMAND starts when it is its turn and the token's cooldown has passed. Its input, output,
    signals and exit code pass through. If the lease is lost, all that it started is ended before
    anybody else can be granted a lease, and the exit code is 79.

    Errors of the provider in its output, or in its log, are counted against the budgets of the
    token. While one of these is spent, or the provider blocks, the command is paused, or ended
    with exit code 75.
    """
    if no_wait and wait is not None:
        raise click.UsageError("--wait and --no-wait exclude each other")
    timing = _timing(ttl, grace)
    if result_file and not result_file.absolute().parent.is_dir():
        raise click.BadParameter("its folder does not exist", param_hint="--result-file")
    account = Account(token=token, job=job, labels=labels, requested_at=_now())
    try:
        path = which(command[0])
        with Client(coordinator) as client:
            one = _Run(client, timing, account, scopes_of(divisions, endpoints), when_quiet)
            with one.started(isolate, log_file, read_output=read_output):
                wait = 0.0 if no_wait else wait
                one.run(path, command, wait, break_glass=if_unreachable == "run")
    except ValueError as error:  # of the log file
        raise click.BadParameter(str(error), param_hint="--log-file") from None
    except CannotRunError as error:
        account.outcome, account.reason = "cannot_run", str(error)
        account.exit_code = error.exit_code
        exits.complain(str(error), exits.CANNOT_RUN.get(error.exit_code, ""))
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


class _Voice:
    """Says what a run has to say in a thread of its own: who reads our stderr may block.

    Nothing waits for that but the end of the run, as `cat` would in our place.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="voice", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.put(None)
        self._thread.join()

    def say(self, message: str) -> None:
        """Say a line, soon."""
        self._lines.put(message)

    def _work(self) -> None:
        for line in iter(self._lines.get, None):
            with contextlib.suppress(OSError):  # nobody reads it any more
                say(line)


class _Faults(logging.Handler):
    """Says what the library logs of its own faults; the rest the run says itself."""

    def __init__(self, voice: _Voice) -> None:
        super().__init__(logging.ERROR)
        self._voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._voice.say(line)


class _Run:
    """One run: wait, launch, watch, report, release."""

    def __init__(
        self,
        client: Client,
        timing: Timing,
        account: Account,
        scopes: Sequence[tuple[str, str]],
        when_quiet: WhenQuiet | None,
    ) -> None:
        self._client = client
        self._timing = timing
        self._account = account
        self._scopes = scopes
        self._lease: HeldLease | None = None
        self._voice = _Voice()
        self._say = self._voice.say
        self._reporter = Reporter(client.record_events, Spool(), warn=self._say)
        self._conduct = Conduct(self._reporter, account.token, account.job, when_quiet, self._say)
        self._passage: Passage | None = None
        self._log: LogTail | None = None

    @contextlib.contextmanager
    def started(
        self, isolate: Isolate, log_file: Path | None, *, read_output: bool
    ) -> Iterator[None]:
        """Start the guard, and what looks for errors.

        Of log file and output one is read: Data Hub writes the same errors to both.

        Raises:
            GuardError: There is no guard.
            ValueError: The log file is none.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._voice)
            faults, log = _Faults(self._voice), logging.getLogger("holdoff")
            log.addHandler(faults)
            stack.callback(log.removeHandler, faults)
            stack.callback(self._reporter.close, REPORT_SECONDS)
            if log_file:
                self._log = LogTail(log_file, self._conduct.on_data, self._say)
            elif read_output and not Guard.CAN_READ_OUTPUT:
                self._say("what the command writes is not looked through here: name its --log-file")
            elif read_output:
                self._passage = stack.enter_context(Passage(self._conduct.on_data, self._say))
            stdio = self._passage.stdio if self._passage else None
            self._guard = stack.enter_context(Guard.start(stdio, isolate=isolate))
            if self._passage:
                self._passage.start(self._guard)
            flush = threading.Thread(target=self._flush_leftovers, name="flush", daemon=True)
            flush.start()
            yield

    def _flush_leftovers(self) -> None:
        """Report what earlier runs on this host could not."""
        flush_leftovers(Spool(), self._client.record_events, warn=self._say)

    def run(
        self, path: str, command: Sequence[str], wait: float | None, *, break_glass: bool
    ) -> None:
        """Run the command and fill in the account.

        Raises:
            HoldoffError: There was no lease, or it was lost.
            Interrupted: A signal ended the wait.
        """
        with caught_signals(self._on_signal):
            began = time.monotonic()
            try:
                self._see_that_it_ends()
                self._lease = self._acquire(wait)
            except Unavailable as error:
                if not break_glass:
                    raise
                self._say(f"RUNNING WITHOUT A LEASE, as --if-unreachable run says: {error}")
                self._account.reason = str(error)
            self._account.waited_seconds = round(time.monotonic() - began, 3)
            with contextlib.ExitStack() as stack:
                if self._lease:
                    # Until the launch an interruption gives the lease back.
                    stack.enter_context(self._lease)
                self._launch(path, command)
                stack.pop_all()
            outcome = self._guard.wait(self._on_event)
            self._account.ended_at = _now()
            self._see_the_rest()
        self._settle(outcome)

    def _see_the_rest(self) -> None:
        """See and report the last errors before the lease is given back, whose end is judged."""
        if self._log:
            self._log.finish()
        if self._passage:
            # Who reads our output may block as long as it wants, and the lease must not.
            rest = threading.Thread(target=self._passage.finish, name="rest", daemon=True)
            rest.start()
            rest.join(REST_SECONDS)
        self._conduct.finish()
        self._account.errors_seen = self._conduct.errors
        give_up = time.monotonic() + REPORT_SECONDS
        while self._reporter.idle_since is None and time.monotonic() < give_up:
            time.sleep(_LOOK_SECONDS)

    def _see_that_it_ends(self) -> None:
        """Refuse to wait for the run that this one is a part of.

        Raises:
            click.UsageError: That run holds the token.
        """
        token, outer = self._account.token, os.environ.get("HOLDOFF_LEASE", "")
        if not outer.startswith(f"{token}/leases/"):
            return
        # A coordinator that is away is waited for below.
        with contextlib.suppress(NotFound, InvalidRequest, Unavailable):
            if self._client.get_lease(outer).state == lease_pb2.LEASE_STATE_ACTIVE:
                raise click.UsageError(
                    f"this is part of a run that holds {token} already, and would wait for itself: "
                    "start the command without `holdoff run`"
                )

    def _acquire(self, wait: float | None) -> HeldLease:
        token = self._account.token
        with WaitDisplay(token, self._client.endpoint) as display:
            lease = self._client.acquire(
                token,
                wait_seconds=wait,
                ttl_seconds=self._timing.ttl_seconds,
                grace_seconds=self._timing.grace_seconds,
                job=self._account.job,
                labels=self._account.labels,
                last_fencing_token=last_fencing_token(token),
                scopes=self._scopes,
                on_waiting=display.waiting,
                on_unreachable=display.unreachable,
                on_renewed=self._guard.extend,
                on_lost=self._on_lost,
                on_notice=self._conduct.on_notice,
            )
        remember_fencing_token(token, lease.fencing_token)
        self._account.lease = lease.name
        self._account.fencing_token = lease.fencing_token
        return lease

    def _launch(self, path: str, command: Sequence[str]) -> None:
        env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        env["HOLDOFF_TOKEN"] = self._account.token
        if self._lease:
            env["HOLDOFF_LEASE"] = self._lease.name
            env["HOLDOFF_FENCING_TOKEN"] = str(self._lease.fencing_token)
        self._conduct.begin(self._guard, self._lease)
        if self._log:
            self._log.start()
        self._guard.launch(
            path,
            command,
            env,
            fence_boottime_ns=self._lease.deadline_ns if self._lease else None,
            grace_seconds=self._timing.grace_seconds,
        )

    def _on_signal(self, signum: int) -> None:
        if not self._guard.signal(signum) and signum not in _HARMLESS_SIGNALS:
            raise Interrupted(signum)

    def _on_event(self, event: Event) -> None:
        if event.kind == "started":
            self._account.started_at = _now()
            if self._lease:
                self._lease.command_started()
        elif event.kind == "ending" and event.reason == "fence":
            self._say("no renewal came through: ending the command before its lease runs out")

    def _on_lost(self, error: LeaseLost) -> None:
        self._say(f"lease lost, ending the command: {error}")
        self._guard.end("lease lost")

    def _settle(self, outcome: Outcome) -> None:
        """Give the lease back and fill in the account.

        Raises:
            LeaseLost: The lease was lost, whatever the command itself said.
        """
        account = self._account
        account.child_exit_code, account.child_signal = outcome.exit_code, outcome.signal
        account.outcome = "exited" if outcome.signal is None else "signaled"
        account.exit_code = exits.INTERNAL if outcome.status is None else outcome.status
        if outcome.survivors:
            self._say(f"{outcome.survivors} processes outlived KILL: the lease is left to run out")
        elif self._lease:
            try:
                self._lease.release()
            except Unavailable as error:
                self._say(f"the lease could not be given back and runs out by itself: {error}")
        if outcome.cannot_run:
            raise outcome.cannot_run
        if outcome.ended_by == ENDED_BY:
            account.outcome, account.exit_code = "backed_off", exits.NOT_GRANTED
            account.reason = self._conduct.reason
        if outcome.ended_by == "fence":
            raise LeaseLost("no renewal came through before the deadline")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
