"""Exit codes, the same in every command, and what a failed command says."""

import os
import signal
import sys
import traceback
from typing import Final, NoReturn

import click

from holdoff._text import printable

OK: Final = 0
DECLINED: Final = 1
USAGE: Final = 64
UNREACHABLE: Final = 69
INTERNAL: Final = 70
NOT_GRANTED: Final = 75
REFUSED: Final = 77
LEASE_LOST: Final = 79
CANNOT_EXECUTE: Final = 126
COMMAND_NOT_FOUND: Final = 127
SIGNAL_BASE: Final = 128
BROKEN_PIPE: Final = SIGNAL_BASE + 13  # SIGPIPE, a name that Windows does not have

TABLE: Final = (
    ("0", "done; under `run`, 0 to 255 may also be the command's own"),
    (str(DECLINED), "you answered no"),
    (str(USAGE), "wrong usage"),
    (str(UNREACHABLE), "the coordinator, or its store, cannot be reached"),
    (str(INTERNAL), "a fault of Holdoff itself"),
    (str(NOT_GRANTED), "no lease within the wait: held, cooling, queued or quarantined"),
    (str(REFUSED), "refused, or an unknown token, lease or policy"),
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
        errors.Unavailable: UNREACHABLE,
        errors.NotGranted: NOT_GRANTED,
        errors.Refused: REFUSED,
        errors.NotFound: REFUSED,
        errors.AlreadyExists: REFUSED,
        errors.LeaseLost: LEASE_LOST,
        errors.HoldoffError: INTERNAL,
    }
    return next((codes[kind] for kind in type(error).__mro__ if kind in codes), None)


def remedy_of(error: Exception, endpoint: str) -> str:
    """What the user can do about an error of the client library; empty where it says so itself.

    Args:
        error: The error.
        endpoint: Where the coordinator was looked for.
    """
    # Not at the top: this import takes longer than all of `holdoff --help`.
    from holdoff import errors  # noqa: PLC0415

    match error:
        case errors.Unavailable(reason=""):
            return (
                f"does holdoff-coordinator listen at {endpoint}? "
                "If it is elsewhere: --endpoint HOST:PORT, or HOLDOFF_ENDPOINT"
            )
        case errors.LeaseNotFound():
            return "the live ones: holdoff lease list"
        case _:
            return ""


def complain(message: str, remedy: str = "") -> None:
    """Write one line about what went wrong to stderr, and one about what to do if that is known."""
    for line in filter(None, (f"holdoff: {' '.join(message.split())}", remedy)):
        click.echo(printable(line), err=True)


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
        case click.Abort():
            interrupted = isinstance(error.__cause__, KeyboardInterrupt)
            sys.exit(SIGNAL_BASE + signal.SIGINT if interrupted else DECLINED)
        case _:
            # Not Python's own 1, which under `run` would read as a warning of the command.
            traceback.print_exception(error)
            sys.exit(INTERNAL)
