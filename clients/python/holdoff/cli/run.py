"""`holdoff run`: a command under a lease."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.shell_completion import CompletionItem

from holdoff import Client, HeldLease, HoldoffError, LeaseLost, Unavailable
from holdoff._core import DEFAULT_TTL_SECONDS, Timing
from holdoff._process import CannotRunError, Guard, GuardError, Outcome, caught_signals, which
from holdoff.cli import exits
from holdoff.cli._fencing import last_fencing_token, remember_fencing_token
from holdoff.cli._help import example
from holdoff.cli._waiting import WaitDisplay, say
from holdoff.cli.params import MOST_LABELS, Duration, Label, Name
from holdoff.names import TokenName

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdoff._process import Event, Isolate

LEAST_TTL_SECONDS = 1
MOST_TTL_SECONDS = 24 * 3600

# What does not end a process that has not asked for it.
_HARMLESS_SIGNALS = {signal.SIGWINCH, signal.SIGURG, signal.SIGCONT, signal.SIGTSTP}

VARIABLES = ("HOLDOFF_TOKEN", "HOLDOFF_LEASE", "HOLDOFF_FENCING_TOKEN")


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal ended the wait."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name} while waiting")
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
    """Why there was no lease, or why it was lost."""
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
    endpoint: str,
    token: str,
    wait: float | None,
    no_wait: bool,
    ttl: float,
    grace: float | None,
    job: str,
    labels: Mapping[str, str],
    isolate: Isolate,
    if_unreachable: str,
    result_file: Path | None,
    command: Sequence[str],
) -> None:
    """Run COMMAND while holding a lease on a token.

    COMMAND starts when it is its turn and the token's cooldown has passed. Its input, output,
    signals and exit code pass through. If the lease is lost, all that it started is ended before
    anybody else can be granted a lease, and the exit code is 79.
    """
    if no_wait and wait is not None:
        raise click.UsageError("--wait and --no-wait exclude each other")
    if not LEAST_TTL_SECONDS <= ttl <= MOST_TTL_SECONDS:
        raise click.BadParameter("must be from 1s to 24h", param_hint="--ttl")
    try:
        timing = Timing.of(ttl, grace)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--grace") from None
    if result_file and not result_file.absolute().parent.is_dir():
        raise click.BadParameter("its folder does not exist", param_hint="--result-file")
    account = Account(token=token, job=job, labels=labels, requested_at=_now())
    try:
        path = which(command[0])
        with Client(endpoint) as client, Guard.start(isolate=isolate) as guard:
            one = _Run(client, guard, timing, account)
            one.run(path, command, 0.0 if no_wait else wait, break_glass=if_unreachable == "run")
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
        exits.complain(str(error), exits.remedy_of(error, endpoint))
    if result_file:
        account.write(result_file)
    raise click.exceptions.Exit(account.exit_code)


_OUTCOMES: dict[int, Literal["unreachable", "not_granted", "refused", "lease_lost"]] = {
    exits.UNREACHABLE: "unreachable",
    exits.NOT_GRANTED: "not_granted",
    exits.REFUSED: "refused",
    exits.LEASE_LOST: "lease_lost",
}


class _Run:
    """One run: wait, launch, watch, release."""

    def __init__(self, client: Client, guard: Guard, timing: Timing, account: Account) -> None:
        self._client = client
        self._guard = guard
        self._timing = timing
        self._account = account
        self._lease: HeldLease | None = None

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
                self._lease = self._acquire(wait)
            except Unavailable as error:
                if not break_glass:
                    raise
                say(f"RUNNING WITHOUT A LEASE, as --if-unreachable run says: {error}")
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
        self._settle(outcome)

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
                on_waiting=display.waiting,
                on_unreachable=display.unreachable,
                on_renewed=self._guard.extend,
                on_lost=self._on_lost,
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
            say("no renewal came through: ending the command before its lease runs out")

    def _on_lost(self, error: LeaseLost) -> None:
        say(f"lease lost, ending the command: {error}")
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
            say(f"{outcome.survivors} processes outlived KILL: the lease is left to run out")
        elif self._lease:
            try:
                self._lease.release()
            except Unavailable as error:
                say(f"the lease could not be given back and runs out by itself: {error}")
        if outcome.cannot_run:
            raise outcome.cannot_run
        if outcome.ended_by == "fence":
            raise LeaseLost("no renewal came through before the deadline")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
