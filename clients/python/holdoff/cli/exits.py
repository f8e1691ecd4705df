"""Exit codes, the same in every command, and what a failed command says."""

import errno
import os
import re
import signal
import sys
from typing import Final, NoReturn

import click

from holdoff.cli._voice import write_line
from holdoff.durations import format_duration

OK: Final = 0
DECLINED: Final = 1
CHECK_FAILED: Final = 1
USAGE: Final = 64
UNREACHABLE: Final = 69
INTERNAL: Final = 70
OUTPUT_LOST: Final = 74
NOT_GRANTED: Final = 75
REFUSED: Final = 77
LEASE_LOST: Final = 79
CANNOT_EXECUTE: Final = 126
COMMAND_NOT_FOUND: Final = 127
SIGNAL_BASE: Final = 128
BROKEN_PIPE: Final = SIGNAL_BASE + 13  # SIGPIPE, a name that Windows does not have

TABLE: Final = (
    ("0", "done; under `run`, 0 to 255 may also be the command's own"),
    (str(DECLINED), "you answered no, and nothing was done; `grant show --check` failed"),
    (str(USAGE), "wrong usage"),
    (str(UNREACHABLE), "the coordinator, its store or a simulator cannot be reached"),
    (str(INTERNAL), "a fault of Holdoff itself"),
    (str(OUTPUT_LOST), "the output cannot be written: the disk is full"),
    (
        str(NOT_GRANTED),
        (
            "no lease or access token within the wait: held, cooling, backing off, queued, "
            "quarantined, budget, limit"
        ),
    ),
    (
        str(REFUSED),
        (
            "refused, an unknown token, lease, grant, budget, back-off or policy, or a grant in "
            "custody that an operator must repair"
        ),
    ),
    (str(LEASE_LOST), "the lease was lost"),
    (str(CANNOT_EXECUTE), "the command cannot be executed"),
    (str(COMMAND_NOT_FOUND), "the command was not found"),
    (f"{SIGNAL_BASE}+N", "ended by signal N"),
)


def code_of(error: Exception) -> int | None:
    """The exit code for an error of the client library; None for any other exception."""
    # Not at the top: this import takes longer than all of `holdoff --help`.
    from holdoff import errors  # noqa: PLC0415

    codes: dict[type[Exception], int] = {
        errors.InvalidRequest: USAGE,
        errors.LimitReached: NOT_GRANTED,
        errors.Unavailable: UNREACHABLE,
        errors.NotGranted: NOT_GRANTED,
        errors.Refused: REFUSED,
        errors.NotFound: REFUSED,
        errors.AlreadyExists: REFUSED,
        errors.CustodyOff: REFUSED,
        errors.AuthorizationFailed: REFUSED,
        errors.LeaseLost: LEASE_LOST,
        errors.HoldoffError: INTERNAL,
    }
    if isinstance(error, errors.NoAccessToken) and error.needs_operator:
        return REFUSED  # who retries after NOT_GRANTED would retry for ever
    return next((codes[kind] for kind in type(error).__mro__ if kind in codes), None)


CANNOT_RUN: Final = {
    CANNOT_EXECUTE: "is it executable (chmod +x), and is it a program or does it begin with #!?",
    COMMAND_NOT_FOUND: "is it on the PATH of this user? If not, write its full path; if it is a "
    "script, is the interpreter in its first line (#!) installed?",
}
"""What the user can do about a command that cannot be run."""


def remedy_of(error: Exception, endpoint: str) -> str:
    """What the user can do about an error of the client library; empty where it says so itself.

    Args:
        error: The error.
        endpoint: Where the coordinator was looked for.
    """
    # Not at the top: this import takes longer than all of `holdoff --help`.
    from holdoff import errors  # noqa: PLC0415

    remedy = _REMEDIES.get(getattr(error, "reason", ""), "")
    match error:
        case errors.Unavailable(reason=""):
            remedy = (
                "does holdoff-coordinator listen at {endpoint}? Start one: holdoff-coordinator "
                "serve; if it is elsewhere: --endpoint HOST:PORT, or HOLDOFF_ENDPOINT; if it "
                "serves TLS: HOLDOFF_CA_FILE, and HOLDOFF_CERT_FILE with HOLDOFF_KEY_FILE if it "
                "requires a client certificate"
            )
        case errors.Quarantined(retry_after_seconds=float(seconds)) if seconds:
            remedy += f"; it lasts for at least {format_duration(round(seconds))}"
        case errors.InvalidRequest(reason="") if str(error).startswith("resource exhausted"):
            remedy = "too much for one message (4 MB): list one app or token, not all"
        case errors.UnexpectedError() if str(error).startswith("unimplemented"):
            remedy = "the server at {endpoint} is not a coordinator, or an older one: upgrade it"
    # The message of an error says which token or app it is about.
    name = re.search(r"apps/([a-z0-9-]+)(?:/tokens/[a-z0-9-]+)?", str(error))
    app = name[1] if name else "APP"
    token = name[0] if name and "/tokens/" in name[0] else "TOKEN"
    about = name[0] if name else "TOKEN"
    return remedy.format(token=token, app=app, about=about, endpoint=endpoint)


_REMEDIES: Final = {
    "LEASE_HELD": "who holds it: holdoff watch {token}; to wait for it: --wait 2h",
    "TOKEN_COOLING": "until when: holdoff token show {token}; to wait for it: --wait 2h",
    "TOKEN_QUEUED": "who is ahead: holdoff token queue {token}; to join the queue: --wait 2h",
    "QUEUE_FULL": "who waits: holdoff token queue {token}; jobs start faster than they end",
    "QUARANTINED": "running jobs continue; an administrator can end it: holdoff quarantine end "
    "apps/{app} --reason WHY",
    "TOKEN_BUSY": "its state: holdoff token show {token}; try again when it is free",
    "GRANT_NOT_FOUND": "grants in custody: holdoff grant list apps/{app}",
    "GRANT_EXISTS": "what it is: holdoff grant show {token}; to replace it: --replace",
    "GRANT_CHANGED": "what it is now: holdoff grant show {token}",
    "GRANT_DUPLICATE": "grants in custody: holdoff grant list apps/{app}",
    "BUDGET_SPENT": "until when: holdoff budget list apps/{app} --state spent",
    "BACKING_OFF": "why, and until when: holdoff explain {about}; to wait for it: --wait 2h",
    "COUNTS_UNKNOWN": "why: holdoff quarantine show {app}; it ends by itself",
    "TOO_MANY_EVENTS": "what is counted: holdoff budget list apps/{app}; the oldest events expire",
    "LEASE_LOST": "what happened: holdoff token history {token}",
    "LEASE_BROKEN": "who has it now: holdoff watch {token}",
    "LEASE_ENDED": "the last leases: holdoff token history {token}",
    "OFFER_EXPIRED": "was this host suspended or offline? Try again",
    "TOKEN_NOT_FOUND": "existing tokens: holdoff token list apps/{app}",
    "LEASE_NOT_FOUND": "live leases: holdoff lease list",
    "BUDGET_NOT_FOUND": "budgets in use: holdoff budget list apps/{app}",
    "BACK_OFF_NOT_FOUND": "current back-offs: holdoff backoff list apps/{app}",
    "QUARANTINE_NOT_FOUND": "apps in quarantine: holdoff quarantine show",
    "RESERVATION_NOT_FOUND": "commit it as the caller, and under the app, that reserved it, within "
    "a day after its window",
    "EVENT_TOO_OLD": "it is outside every window: omit it, or correct its age",
    "TOKEN_EXISTS": "its state: holdoff token show {token}",
    "STORE_UNAVAILABLE": "{endpoint} answers, its Valkey or Redis does not: see the coordinator's "
    "log",
    "STORE_OUT_OF_MEMORY": "the store of {endpoint} is full: raise its maxmemory, or free memory",
    "STORE_READ_ONLY": "the store of {endpoint} is not a primary: give its coordinator the URL of "
    "the primary, or of the Sentinels",
    "STORE_NOT_WRITABLE": "see the log of the store of {endpoint}: is its disk full, are its "
    "replicas down?",
    "STORE_NOT_REPLICATED": "are the replicas of the store of {endpoint} up? Its coordinator waits "
    "for them",
    "STORE_ACCESS_DENIED": "the store of {endpoint} refuses its coordinator: see the coordinator's "
    "log, and in Valkey ACL LOG",
    "STORE_DAMAGED": "the coordinator's log at {endpoint} names the record; no other record is "
    "affected. What to do: deploy/RUNBOOK.md, HoldoffStoreAway",
    "SCHEMA_TOO_NEW": "upgrade the coordinator at {endpoint}, or use a newer one: --endpoint "
    "HOST:PORT",
    "ACCESS_FILE_MISSING": "restore that file, or its permissions, at the coordinator {endpoint}: "
    "it is reread automatically",
    "TOKEN_URL_UNREACHABLE": "what it can reach: holdoff grant show {token} --check",
    "DRAINING": "it stops or restarts, and positions are kept: try again in a moment",
    "WAITER_SILENT": "was this host suspended or offline? Try again: the position is lost",
    "INTERNAL": "a fault of Holdoff: see the coordinator's log at this time, and report it",
}
"""What to do, by reason; the messages of all other reasons say so themselves."""


def complain(message: str, remedy: str = "") -> None:
    """Write one line about what went wrong to stderr, and one about what to do if that is known."""
    for line in filter(None, (f"holdoff: {' '.join(message.split())}", remedy)):
        write_line(line)


def discard_output() -> None:
    """After stdout's reader went away: keep what is still buffered from complaining at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end(error: Exception) -> NoReturn:
    """Report an exception that no command handled, and exit with its code."""
    match error:
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            sys.exit(USAGE)
        case click.UsageError():
            hint = f"more: {error.ctx.command_path} --help" if error.ctx else ""
            complain(error.format_message(), hint)
            sys.exit(USAGE)
        case click.ClickException():
            complain(error.format_message())
            sys.exit(error.exit_code)
        case OSError(filename=None, errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG | errno.EIO):
            discard_output()
            complain(f"cannot write the output: {error.strerror}")
            sys.exit(OUTPUT_LOST)
        case click.Abort():
            interrupted = isinstance(error.__cause__, KeyboardInterrupt)
            sys.exit(SIGNAL_BASE + signal.SIGINT if interrupted else DECLINED)
        case _:
            # Not Python's own 1, which under `run` would read as a warning of the command.
            import traceback  # noqa: PLC0415 - slow to import, and hardly ever needed

            for line in "".join(traceback.format_exception(error)).splitlines():
                write_line(line)
            complain("this is a fault of Holdoff", "report it with all of the lines above")
            sys.exit(INTERNAL)
