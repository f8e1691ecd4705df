"""`holdoff explain`: may a job go on now, and if not, why not and until when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from holdoff import Client
from holdoff._text import printable
from holdoff.cli._budgets import (
    BACK_OFF_HEADINGS,
    BUDGET_HEADINGS,
    ERROR_HEADINGS,
    back_off_row,
    back_off_state_text,
    budget_row,
    error_row,
    optional_holder_text,
)
from holdoff.cli._help import example
from holdoff.cli.output import (
    NOTHING,
    duration_text,
    emit_json,
    emit_record,
    emit_table,
    enum_text,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import Name
from holdoff.names import AppName, TokenName

if TYPE_CHECKING:
    from holdoff.v1 import budget_service_pb2, grant_pb2


@click.command(
    epilog=example(
        "holdoff explain apps/exact-nl/tokens/finance",
        "holdoff explain apps/exact-nl/tokens/finance --division 535193 --endpoint crm/Accounts",
        "holdoff explain apps/exact-nl/tokens/finance --job nightly",
    )
)
@click.argument("scope", type=Name(TokenName, AppName), metavar="TOKEN_OR_APP")
@click.option("--division", default="", help="The division that the job calls.")
@click.option(
    "--endpoint", "path", default="", metavar="PATH", help="The path or URL that it calls."
)
@click.option(
    "--job",
    default="",
    help="Its name: without --endpoint, also consider the scopes where jobs of this name caused "
    "errors in the last week.",
)
@output_option
@click.pass_obj
def explain(  # noqa: PLR0913 - one for each option
    endpoint: str, scope: str, *, division: str, path: str, job: str, output: str
) -> None:
    """Show whether a job may start now, and if not, every reason.

    TOKEN_OR_APP is apps/APP/tokens/TOKEN, or apps/APP. The first line says yes or no. Then follow
    the reasons, the last to end first: since when, until when, and who caused it; then back-offs of
    narrower scopes, the budgets with the least room, and the latest errors. For a token in custody
    the command also says how many runs share it, and why there is an access token, or none.

    The exit code is 0 for either answer; with --output json the answer is `must_wait`.
    """
    with Client(endpoint) as client:
        answer = client.explain(scope, division=division, endpoint=path, job=job)
    if output == "json":
        emit_json(resource(answer))
        return
    click.secho(_headline(answer), bold=True, fg="red" if answer.must_wait else "green")
    if answer.HasField("grant"):
        click.echo()
        emit_record(_grant_fields(answer.grant))
    for obstacle in answer.obstacles:
        click.echo()
        emit_record(_fields(obstacle))
    if answer.narrower:
        click.echo("\nAlso backing off, for calls in these scopes:\n")
        emit_table(BACK_OFF_HEADINGS, (back_off_row(one) for one in answer.narrower))
    if answer.budgets:
        click.echo()
        emit_table(BUDGET_HEADINGS, (budget_row(budget) for budget in answer.budgets))
    if answer.errors:
        click.echo()
        emit_table(ERROR_HEADINGS, (error_row(error) for error in answer.errors))


def _headline(answer: budget_service_pb2.ExplainResponse) -> str:
    yes_or_no = "no" if answer.must_wait else "yes"
    return ": ".join(filter(None, (yes_or_no, printable(answer.message))))


def _grant_fields(grant: grant_pb2.GrantExplanation) -> list[tuple[str, str]]:
    """Say why there is an access token, or none, and who uses it."""
    status, attempt = grant.status, grant.last_attempt
    why = status.message.removesuffix(f": {status.remedy}")
    users = [
        f"{user.identity} from {user.host}: {user.streams}"
        if user.streams > 1
        else f"{user.identity} from {user.host}"
        for user in grant.users
    ]
    runs = f"{grant.shared_lease_count} of at most {grant.most_runs} share the token in custody"
    return [
        ("runs", runs),
        ("access token", "yes" if grant.has_access_token else "no"),
        ("state", enum_text(status, "state")),
        ("because", why or NOTHING),
        ("since", time_text(status, "since_time")),
        ("until", time_text(status, "until_time")),
        ("remedy", status.remedy or NOTHING),
        ("last request", time_text(attempt, "begin_time")),
        ("its result", attempt.outcome or NOTHING),
        ("made by", attempt.replica or NOTHING),
        *(("used by", user) for user in users or [NOTHING]),
    ]


def _fields(obstacle: budget_service_pb2.Obstacle) -> list[tuple[str, str]]:
    back_off = obstacle.back_off
    state = NOTHING
    if obstacle.HasField("back_off"):
        state = f"{back_off_state_text(back_off)}, {enum_text(back_off, 'cause')}"
    return [
        ("reason", enum_text(obstacle, "reason")),
        ("what", obstacle.message or NOTHING),
        ("left", duration_text(obstacle, "remaining")),
        ("until", time_text(obstacle, "end_time")),
        ("since", time_text(obstacle, "start_time")),
        ("by", optional_holder_text(obstacle.caused_by)),
        ("state", state),
        ("probe", optional_holder_text(back_off.probe)),
        ("back-off", back_off.name or NOTHING),
        ("lease", obstacle.lease.name or NOTHING),
    ]
