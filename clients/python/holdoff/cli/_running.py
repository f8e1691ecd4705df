"""One run of a command under a lease: wait, launch, watch, report, release."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Self

import click

from holdoff._outcome import BACKING_OFF
from holdoff._output import LogTail
from holdoff._process import caught_signals
from holdoff._reporting import Reporter, flush_leftovers
from holdoff._spool import Spool
from holdoff.cli import exits
from holdoff.cli._account import Interrupted, now
from holdoff.cli._conduct import Conduct
from holdoff.cli._fencing import last_fencing_token, remember_fencing_token
from holdoff.cli._waiting import WaitDisplay
from holdoff.errors import (
    HoldoffError,
    InvalidRequest,
    LeaseLost,
    LimitReached,
    NotFound,
    Unavailable,
    UnexpectedError,
)
from holdoff.v1 import lease_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from holdoff import Client, HeldLease
    from holdoff._outcome import Event, Outcome
    from holdoff._output import Passage
    from holdoff._process import Guard
    from holdoff.cli._account import Account, Order
    from holdoff.cli._run_token import RunToken
    from holdoff.cli._voice import Voice

REST_SECONDS = 5.0
"""How long the rest of the output is waited for before the lease is given back."""
REPORT_SECONDS = 5.0
"""How long reports are tried before it; then they wait on disk."""
_LOOK_SECONDS = 0.02

# What does not end a process that has not asked for it.
_HARMLESS_SIGNALS = {
    getattr(signal, name, None) for name in ("SIGWINCH", "SIGURG", "SIGCONT", "SIGTSTP")
}

REPORT_KEY = "HOLDOFF_REPORT_KEY"
VARIABLES = (
    *("HOLDOFF_TOKEN", "HOLDOFF_LEASE", "HOLDOFF_FENCING_TOKEN", REPORT_KEY),
    *("HOLDOFF_ACCESS_TOKEN_FILE", "HOLDOFF_GATEWAY_URL"),
)


class _Faults(logging.Handler):
    """Says what the library logs of its own faults; the rest the run says itself."""

    def __init__(self, voice: Voice) -> None:
        super().__init__(logging.ERROR)
        self._voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._voice.say(line)


class Run:
    """One run: wait, launch, watch, report, release."""

    def __init__(
        self, client: Client, guard: Guard, voice: Voice, account: Account, order: Order
    ) -> None:
        self._client = client
        self._guard = guard
        self._timing = order.timing
        self._account = account
        self._scopes = order.scopes
        self._lease: HeldLease | None = None
        self._may_interrupt = False
        self._interrupted_by: int | None = None
        client._interruptible = self._interruptible  # noqa: SLF001 - where it waits
        self._say = voice.say
        self._faults = _Faults(voice)
        self._reporter = Reporter(
            client.record_events, Spool(), warn=self._say, probe=client.list_policies
        )
        # It grants no access, and is valid only for this run: it distinguishes the command's own
        # reports from the same text in data that the command prints.
        self._report_key = os.urandom(16).hex()
        self._conduct = Conduct(
            self._reporter,
            account.token,
            account.job,
            order.when_quiet,
            self._say,
            report_key=self._report_key,
            trust_output=order.trust_output,
            renews_token=bool(order.access_token_file) or order.gateway,
        )
        self._passage: Passage | None = None
        self._log: LogTail | None = None
        self._token: RunToken | None = None
        if order.access_token_file:
            from holdoff.cli._access_token_file import CommandToken  # noqa: PLC0415 - seldom used

            self._token = CommandToken(
                *(client, guard, account.token, order.access_token_file, self._say),
                self._interruptible,
            )
        elif order.gateway:
            from holdoff.cli._gateway import CommandGateway  # noqa: PLC0415 - seldom used

            self._token = CommandGateway(client, account.token, account.job, self._interruptible)

    def __enter__(self) -> Self:
        logging.getLogger("holdoff").addHandler(self._faults)
        threading.Thread(target=self._flush_leftovers, name="flush", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reporter.close(REPORT_SECONDS)
        logging.getLogger("holdoff").removeHandler(self._faults)

    def read_log(self, path: Path) -> None:
        """Look for errors in a log file of the command.

        Raises:
            ValueError: It is no log file.
        """
        self._log = LogTail(path, self._conduct.on_data, self._say)

    def read_output(self, passage: Passage) -> None:
        """Look for errors in what the command writes."""
        passage.start(self._guard, self._conduct.on_data, self._say)
        self._passage = passage

    def _flush_leftovers(self) -> None:
        """Report what earlier runs on this host could not."""
        client = self._client
        flush_leftovers(Spool(), client.record_events, warn=self._say, probe=client.list_policies)

    def run(
        self, path: str, command: Sequence[str], wait: float | None, *, break_glass: bool
    ) -> None:
        """Run the command and fill in the account.

        Raises:
            HoldoffError: There was no lease, or it was lost.
            Interrupted: A signal ended the wait.
        """
        with caught_signals(self._on_signal), self._reaping():
            with self._token or contextlib.nullcontext():
                try:
                    self._acquire(wait, break_glass=break_glass)
                    self._launch(path, command)
                except BaseException:
                    if self._lease:
                        with contextlib.suppress(HoldoffError):
                            self._lease.release(unused=True)
                    raise
                outcome = self._guard.wait(self._on_event)
                self._account.ended_at = now()
            self._see_the_rest()
            self._settle(outcome)

    @contextlib.contextmanager
    def _reaping(self) -> Iterator[None]:
        """Reap meanwhile what others started and this process inherited."""
        if not hasattr(signal, "SIGCHLD"):
            yield
            return
        before = signal.signal(signal.SIGCHLD, lambda *_: self._guard.reap_strangers())
        self._guard.reap_strangers()
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, before)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let a signal end what is done here. One that comes elsewhere waits for the next time.

        So none comes between the acceptance of a lease and the moment at which it is known here.
        """
        self._may_interrupt = True
        try:
            self._interrupt()
            yield
        finally:
            self._may_interrupt = False

    def _interrupt(self) -> None:
        """End the wait if a signal has come.

        Raises:
            Interrupted: One has.
        """
        if self._interrupted_by is not None:
            self._may_interrupt = False  # once is enough
            raise Interrupted(self._interrupted_by)

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

    def _acquire(self, wait: float | None, *, break_glass: bool) -> None:
        """Wait for a lease; run without one if no coordinator answers and the options allow it."""
        began = time.monotonic()
        try:
            self._see_that_it_ends()
            self._await_access_token(began, wait)
            self._acquire_lease(_left(began, wait))
            self._await_access_token(began, wait)  # it may have ended meanwhile
        except Unavailable as error:
            if not break_glass or isinstance(error, LimitReached):  # which is an answer
                raise
            self._say(f"RUNNING WITHOUT A LEASE, because of --if-unreachable run: {error}")
            self._account.reason = str(error)
        self._account.waited_seconds = round(time.monotonic() - began, 3)

    def _await_access_token(self, began: float, wait: float | None) -> None:
        if self._token:
            self._token.wait(_left(began, wait))

    def _acquire_lease(self, wait: float | None) -> None:
        token = self._account.token
        with contextlib.ExitStack() as waiting:
            display = waiting.enter_context(WaitDisplay(token, self._client.endpoint))
            self._lease = lease = self._client.acquire(
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
            with self._interruptible():
                waiting.close()
                remember_fencing_token(token, lease.fencing_token)
        self._account.lease = lease.name
        self._account.lease_mode = "shared" if lease.is_shared else "exclusive"
        self._account.fencing_token = lease.fencing_token

    def _launch(self, path: str, command: Sequence[str]) -> None:
        # One without a name, which no program can ask for, cannot be handed on.
        env = {name: value for name, value in os.environ.items() if name not in ("", *VARIABLES)}
        env["HOLDOFF_TOKEN"] = self._account.token
        env[REPORT_KEY] = self._report_key
        if self._lease:
            env["HOLDOFF_LEASE"] = self._lease.name
            env["HOLDOFF_FENCING_TOKEN"] = str(self._lease.fencing_token)
        if self._token:
            env |= self._token.begin()
        self._conduct.begin(self._guard, self._lease)
        with self._interruptible():
            if self._log:
                self._log.start()
        self._guard.launch(
            path,
            command,
            env,
            fence_boottime_ns=self._lease.deadline_ns if self._lease else None,
            grace_seconds=self._timing.grace_seconds,
        )
        if self._interrupted_by is not None:  # in the very moment of the launch
            self._guard.signal(self._interrupted_by)

    def _on_signal(self, signum: int) -> None:
        if self._guard.signal(signum) or signum in _HARMLESS_SIGNALS:
            return
        self._interrupted_by = signum
        if self._may_interrupt:
            self._interrupt()

    def _on_event(self, event: Event) -> None:
        if event.kind == "started":
            self._account.started_at = now()
            if self._lease:
                self._lease.command_started()
        elif event.kind == "ending" and event.reason == "fence":
            self._say("no renewal succeeded: ending the command before its lease expires")

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
            self._say(
                f"{outcome.survivors} processes survived KILL: the lease stays until it expires"
            )
        elif self._lease:
            try:
                self._lease.release(unused=outcome.cannot_run is not None)
            except (Unavailable, UnexpectedError) as error:
                self._say(f"the lease could not be released, and will expire: {error}")
        if outcome.cannot_run:
            raise outcome.cannot_run
        if outcome.ended_by == BACKING_OFF:
            account.outcome, account.exit_code = "backed_off", exits.NOT_GRANTED
            account.reason = self._conduct.reason
        if outcome.ended_by == "fence":
            raise LeaseLost("no renewal succeeded before the deadline")


def _left(began: float, wait: float | None) -> float | None:
    """Return what is left of a wait."""
    return None if wait is None else max(0.0, wait - (time.monotonic() - began))
