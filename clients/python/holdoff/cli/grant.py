"""`holdoff grant`: put OAuth grants into custody, show, list and delete them; get access tokens."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from holdoff import Client
from holdoff._text import printable
from holdoff.cli import exits
from holdoff.cli._access_wait import POLL_SECONDS, wait_for_access_token
from holdoff.cli._authorizing import REDIRECT_URI, Person
from holdoff.cli._help import example
from holdoff.cli._live import (
    live_output_option,
    live_table,
    show_lines,
    show_table,
    sigterm,
    wants_lines,
)
from holdoff.cli._voice import confirm, say
from holdoff.cli.output import (
    NOTHING,
    emit_json,
    emit_record,
    emit_table,
    enum_text,
    output_option,
    resource,
    time_text,
)
from holdoff.cli.params import Duration, Name
from holdoff.custody.files import AccessTokenFile
from holdoff.durations import format_duration
from holdoff.names import AppName, TokenName
from holdoff.v1 import grant_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from holdoff.cli._live import Part
    from holdoff.custody.calls import ClientAuthentication
    from holdoff.v1 import custody_service_pb2

_MOST_BYTES = 64 * 1024
_SECRET_FILE = click.Path(dir_okay=False, allow_dash=True)


@click.group(epilog=example("holdoff grant list"))
def grant() -> None:
    """Put OAuth grants into custody; show, list and delete them; get access tokens.

    The coordinator keeps them encrypted. No command but `access-token` shows a secret.
    """


@grant.command(
    "put",
    epilog=example(
        "holdoff grant put apps/exact-nl/tokens/finance --client-id ID "
        "--refresh-token-file refresh.token --client-secret-file client.secret",
        "holdoff grant put apps/xero/tokens/main --client-id ID --refresh-token-file - --replace",
    ),
)
@click.argument("token", type=Name(TokenName))
@click.option("--client-id", required=True, help="The OAuth client id.")
@click.option(
    "--refresh-token-file",
    type=_SECRET_FILE,
    metavar="FILE",
    default="-",
    show_default=True,
    help="File with the refresh token; - is the standard input, or a prompt on a terminal.",
)
@click.option(
    "--client-secret-file",
    type=_SECRET_FILE,
    metavar="FILE",
    help="File with the client secret, or -. [default: none: a public client]",
)
@click.option(
    "--token-url", default="", help="Where access tokens are requested. [default: the policy's]"
)
@click.option(
    "--api-host",
    "api_hosts",
    multiple=True,
    metavar="HOST",
    help="A host that an access token may be sent to; repeatable. [default: the policy's]",
)
@click.option(
    "--client-authentication",
    type=click.Choice(["basic", "body", "query"]),
    help="Where the client id and secret go in a request. [default: the policy's first way]",
)
@click.option(
    "--last-refreshed",
    type=Duration(),
    metavar="AGE",
    help="How long ago the last access token was issued. [default: unknown, which starts a full "
    "cooldown]",
)
@click.option("--etag", default="", help="Replace the grant that has this etag, and no other.")
@click.option("--replace", is_flag=True, help="Replace whatever there is.")
@output_option
@click.pass_obj
def put_grant(  # noqa: PLR0913 - one for each option
    endpoint: str,
    token: str,
    *,
    client_id: str,
    refresh_token_file: str,
    client_secret_file: str | None,
    token_url: str,
    api_hosts: tuple[str, ...],
    client_authentication: ClientAuthentication | None,
    last_refreshed: float | None,
    etag: str,
    replace: bool,
    output: str,
) -> None:
    """Take the grant of TOKEN into custody, or replace it.

    The policy of the token says which token URLs and API hosts are allowed; if there is only one,
    it is the default. Secrets come from files or the standard input: arguments and the environment
    are visible to others.
    """
    if etag and replace:
        raise click.UsageError("give --etag or --replace, not both")
    if [refresh_token_file, client_secret_file].count("-") > 1:
        raise click.UsageError(
            "only one secret can come from the standard input: give a file for the other"
        )
    refresh_token = _secret("refresh token", refresh_token_file)
    client_secret = _secret("client secret", client_secret_file) if client_secret_file else ""
    with Client(endpoint) as client:
        put = client.grants.put(
            token,
            client_id=client_id,
            refresh_token=refresh_token,
            client_secret=client_secret,
            token_url=token_url,
            api_hosts=api_hosts,
            client_authentication=client_authentication,
            last_refresh_age_seconds=last_refreshed,
            etag=etag,
            replace=replace,
        )
    _emit(put, output)


@grant.command(
    "authorize",
    epilog=example(
        "holdoff grant authorize apps/exact-nl/tokens/finance",
        "holdoff grant authorize apps/exact-nl/tokens/finance --client-id ID "
        "--client-secret-file client.secret --redirect-uri https://example.com/callback",
    ),
)
@click.argument("token", type=Name(TokenName))
@click.option(
    "--redirect-uri",
    default=REDIRECT_URI,
    show_default=True,
    help="Where the provider sends the browser, as registered for the app.",
)
@click.option(
    "--manual",
    is_flag=True,
    help="Ask for the address that the browser shows afterwards, instead of serving it on this "
    "host. [default: if the redirect URI is not of this host]",
)
@click.option("--client-id", default="", help="The OAuth client id. [default: that in custody]")
@click.option(
    "--client-secret-file",
    type=_SECRET_FILE,
    metavar="FILE",
    help="File with the client secret, or -. [default: that in custody, or none]",
)
@click.option("--token-url", default="", help="[default: that in custody, or the policy's]")
@click.option(
    "--api-host",
    "api_hosts",
    multiple=True,
    metavar="HOST",
    help="A host that an access token may be sent to; repeatable. [default: those in custody, or "
    "the policy's]",
)
@click.option(
    "--client-authentication",
    type=click.Choice(["basic", "body", "query"]),
    help="Where the client id and secret go in a request. [default: that in custody, or the "
    "policy's first way]",
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    help="What the app asks for; repeatable. [default: the policy's]",
)
@click.option("--etag", default="", help="Replace the grant that has this etag, and no other.")
@click.option(
    "--wait",
    type=Duration(),
    default=900.0,
    show_default="15m",
    help="Wait at most this long until the token may be authorized.",
)
@output_option
@click.pass_obj
def authorize(  # noqa: PLR0913 - one for each option
    endpoint: str,
    token: str,
    *,
    redirect_uri: str,
    manual: bool,
    client_id: str,
    client_secret_file: str | None,
    token_url: str,
    api_hosts: tuple[str, ...],
    client_authentication: ClientAuthentication | None,
    scopes: tuple[str, ...],
    etag: str,
    wait: float,
    output: str,
) -> None:
    """Have a person authorize the app, and take the grant into custody.

    The command waits until the token does not cool down, and then prints a URL. Open it in a
    browser, and log on as the user of the token. The provider sends the browser to the redirect
    URI, which the command serves on this host; or paste the address that the browser shows. The
    coordinator exchanges the code. A grant in custody is replaced only when the new one is there.

    Meanwhile, for ten minutes at most, the token is not refreshed. Ctrl-C ends that.
    """
    secret = _secret("client secret", client_secret_file) if client_secret_file else ""
    with Client(endpoint) as client:
        person = Person(client, token, redirect_uri, manual=manual)
        done = person.authorize(
            wait,
            client_id=client_id,
            client_secret=secret,
            token_url=token_url,
            api_hosts=api_hosts,
            client_authentication=client_authentication,
            scopes=scopes,
            etag=etag,
            replace=not etag,
        )
    _emit(done, output)


@grant.command(
    "show",
    epilog=example(
        "holdoff grant show apps/exact-nl/tokens/finance",
        "holdoff grant show apps/exact-nl/tokens/finance --check",
    ),
)
@click.argument("token", type=Name(TokenName))
@click.option(
    "--check", is_flag=True, help="Check instead what a refresh needs, without refreshing."
)
@output_option
@click.pass_obj
def show_grant(endpoint: str, token: str, check: bool, output: str) -> None:
    """Show the grant of TOKEN: whether an access token can be had, and if not, why.

    With --check the coordinator that answers checks what a refresh needs: policy, state, master
    keys, secrets, spool, clock, and whether it can reach the hosts. It connects to them, but sends
    no request. The exit code is 1 if something failed. It takes the role `custodian`.
    """
    with Client(endpoint) as client:
        if not check:
            _emit(client.grants.get(token), output)
            return
        found = client.grants.check(token)
    if output == "json":
        emit_json(resource(found))
    else:
        emit_table(("CHECK", "RESULT", "OF", "FOUND", "REMEDY"), map(_check_row, found.checks))
    if any(one.result == grant_pb2.GRANT_CHECK_RESULT_FAILED for one in found.checks):
        raise click.exceptions.Exit(exits.CHECK_FAILED)


@grant.command("list", epilog=example("holdoff grant list", "holdoff grant list apps/exact-nl"))
@click.argument("parent", type=Name(AppName), required=False)
@output_option
@click.pass_obj
def list_grants(endpoint: str, parent: str | None, output: str) -> None:
    """List grants, all of them or those of the app PARENT (apps/APP)."""
    with Client(endpoint) as client:
        found = list(client.grants.list(parent or ""))
    if output == "json":
        emit_json({"grants": [resource(one) for one in found]})
    elif found:
        emit_table(("TOKEN", "STATE", "UNTIL", "BECAUSE"), map(_row, found))
    else:
        click.echo(f"no grants{f' of {parent}' if parent else ''} in custody", err=True)


@grant.command("delete", epilog=example("holdoff grant delete apps/exact-nl/tokens/finance"))
@click.argument("token", type=Name(TokenName))
@click.option("--etag", default="", help="Only the grant that has this etag.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def delete_grant(endpoint: str, token: str, etag: str, yes: bool) -> None:
    """Delete the grant of TOKEN, with its secrets; the token and its cooldown remain.

    On a terminal the command shows the grant and asks for a confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            found = client.grants.get(token)
            etag = etag or found.etag
            if not confirm(_question(token, found)):
                click.echo("not deleted", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        client.grants.delete(token, etag=etag)
    click.echo(f"deleted: the grant of {token}", err=True)


@grant.command("trust", epilog=example("holdoff grant trust apps/exact-nl/tokens/finance"))
@click.argument("token", type=Name(TokenName))
@click.option("--etag", default="", help="Only the grant that has this etag.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def trust_grant(endpoint: str, token: str, etag: str, yes: bool) -> None:
    """Use the grant of TOKEN again, although the store was restored from a backup.

    After a restore a refresh token in custody may be older than the last refresh: its state is
    `stale`, and it is not sent. Say with this command that it is the newest one. If it is not, the
    provider refuses it, and may revoke the whole grant. To put the newest one: `holdoff grant put`.

    On a terminal the command shows the grant and asks for a confirmation first.
    """
    with Client(endpoint) as client:
        if sys.stdin.isatty() and not yes:
            found = client.grants.get(token)
            etag = etag or found.etag
            if not confirm(_trust_question(token, found)):
                click.echo("not changed", err=True)
                raise click.exceptions.Exit(exits.DECLINED)
        client.grants.trust(token, etag=etag)
    click.echo(f"the grant of {token} is used again", err=True)


@grant.command("rotate-keys", epilog=example("holdoff grant rotate-keys --dry-run"))
@click.option("--key", "key_id", default="", metavar="ID", help="[default: the highest id]")
@click.option("--dry-run", is_flag=True, help="Only show which keys are used.")
@output_option
@click.pass_obj
def rotate_keys(endpoint: str, key_id: str, dry_run: bool, output: str) -> None:
    """Encrypt all grants with another master key, which also encrypts from then on.

    Generate it with `holdoff-coordinator key rotate`, and copy it to every replica. The command can
    be repeated at any time. It lists the keys that are still used, and the grants whose key is
    missing.
    """
    uses: Counter[str] = Counter()
    skipped: list[custody_service_pb2.SkippedGrant] = []
    primary, resealed = "", 0
    with Client(endpoint) as client:
        for page in client.grants.rotate_keys(key_id, validate_only=dry_run):
            primary, resealed = page.primary_key_id, resealed + page.resealed_count
            uses.update({use.key_id: use.grant_count for use in page.key_uses})
            skipped += page.skipped_grants
    uses.setdefault(primary, 0)
    if output == "json":
        emit_json(
            {
                "primary_key_id": primary,
                "resealed_count": resealed,
                "key_uses": [
                    {"key_id": one, "grant_count": count} for one, count in sorted(uses.items())
                ],
                "skipped_grants": [resource(one) for one in skipped],
            }
        )
        return
    if not dry_run:
        click.echo(printable(f"encrypted again with {primary}: {resealed}"), err=True)
    for one in skipped:
        words = f"left as it is: {one.name.removesuffix('/grant')}: {one.message}"
        click.echo(printable(words), err=True)
    emit_table(
        ("KEY", "GRANTS", "ENCRYPTS"),
        ((one, str(uses[one]), "yes" if one == primary else "no") for one in sorted(uses)),
    )


@grant.command(
    "access-token",
    epilog=example("holdoff grant access-token apps/exact-nl/tokens/finance --wait 5m"),
)
@click.argument("token", type=Name(TokenName))
@click.option(
    "--wait",
    type=Duration(),
    default=30.0,
    show_default="30s",
    help="Wait at most this long for an access token.",
)
@click.option("--force", is_flag=True, help="Print it also on a terminal.")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="Write it to this file, and keep that current until the command is ended.",
)
@click.pass_obj
def access_token(endpoint: str, token: str, wait: float, force: bool, file: Path | None) -> None:
    """Print the current access token of TOKEN, for a script.

    It takes the role `gateway`. The token is refreshed if necessary. Get it anew for each run: it
    lives for minutes only, and others use it too. Do not pass it on as an argument, which other
    users of the host can see. On a terminal the standard error shows what a wait is for.

    With --file it goes to a file that only you can read, for programs that read it before each
    call. The file is replaced at each renewal. It is removed when there is no access token, and
    when the command ends.
    """
    if file:
        with Client(endpoint) as client:
            _keep(client, token, file)
    if sys.stdout.isatty() and not force:
        raise click.UsageError(
            "an access token would stay visible on the terminal: redirect the output, or give "
            "--force"
        )
    news: queue.SimpleQueue[object] = queue.SimpleQueue()

    def pause() -> None:
        with contextlib.suppress(queue.Empty):
            news.get(timeout=POLL_SECONDS)

    with Client(endpoint) as client, client.access_token(token, on_renewed=news.put) as access:
        if sys.stderr.isatty():
            wait_for_access_token(access, client.endpoint, wait, pause)
        current = access.current(wait)
    click.echo(current)


def _keep(client: Client, token: str, path: Path) -> NoReturn:
    """Keep the access token of a token in a file, until a signal."""
    try:
        kept = AccessTokenFile(path, say)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--file") from None
    with sigterm() as ended, kept as file, client.access_token(token) as access:
        try:
            file.keep(access, ended)
        except OSError as error:
            raise click.UsageError(f"cannot write {path}: {error.strerror}") from None
    raise click.exceptions.Exit(exits.SIGNAL_BASE + signal.SIGTERM)


@grant.command("watch", epilog=example("holdoff grant watch apps/exact-nl/tokens/finance"))
@click.argument("token", type=Name(TokenName))
@live_output_option
@click.pass_obj
def watch_grant(endpoint: str, token: str, output: str) -> None:
    """Watch the grant of TOKEN: its state, generation, and how long its access token lives.

    On a terminal a live table shows it. Otherwise each line is a JSON document: the grant as it
    is, then after each change. The access token itself is not read, and watching does not count
    as using it. Ctrl-C ends the command.
    """
    with Client(endpoint) as client:
        watched = partial(client.grants.watch, token)
        if wants_lines(output):
            show_lines(watched, lambda response, _: [resource(response.grant)])
        else:
            show_table(client.endpoint, watched, _Board())


class _Board:
    """A grant as a table."""

    nothing = "no grant"

    def __init__(self) -> None:
        self._grant: grant_pb2.Grant | None = None

    def take(self, response: custody_service_pb2.WatchGrantResponse, _: int) -> None:
        """Take in a grant."""
        self._grant = response.grant

    def picture(self, _height: int, _now_ns: int) -> Sequence[Part]:
        """Return a table of one row."""
        return [partial(_table, self._grant)] if self._grant else []


def _table(one: grant_pb2.Grant, *, short: bool) -> Table:
    left = one.expire_time.ToSeconds() - time.time() if one.HasField("expire_time") else 0
    status = one.status
    row = (
        enum_text(status, "state"),
        time_text(status, "since_time"),
        time_text(status, "until_time"),
        str(one.generation),
        format_duration(round(left)) if left > 0 else NOTHING,
        "" if short else status.message,
    )
    headings = ("STATE", "SINCE", "UNTIL", "GENERATION", "LEFT", "BECAUSE")
    return live_table(headings, [row], yielding=("BECAUSE",))


def _secret(what: str, path: str) -> str:
    """Read a secret; no error repeats what is in the file."""
    if path == "-" and sys.stdin.isatty():
        return str(click.prompt(what, hide_input=True, err=True))
    try:
        raw = sys.stdin.buffer.read(_MOST_BYTES) if path == "-" else _start_of(Path(path))
    except OSError as error:
        raise click.UsageError(f"cannot read the {what} from {path}: {error.strerror}") from None
    try:
        return raw.decode("ascii").strip()
    except UnicodeDecodeError:
        pass  # not raised from here: it has the text
    raise click.UsageError(f"the {what} in {path} is not one line of printable ASCII characters")


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES)


def _question(token: str, one: grant_pb2.Grant) -> str:
    return (
        f"The grant of {token} with the client id {one.client_id} was put "
        f"{time_text(one, 'create_time')}.\nIts refresh token is nowhere else, unless you kept it: "
        "without it a person must authorize again.\nDelete it?"
    )


def _trust_question(token: str, one: grant_pb2.Grant) -> str:
    return (
        f"The grant of {token} with the client id {one.client_id} was last refreshed "
        f"{time_text(one, 'refresh_time')}.\nIf it was refreshed after that, the provider may "
        "revoke it.\nUse it again?"
    )


def _row(one: grant_pb2.Grant) -> tuple[str, ...]:
    return (
        one.name.removesuffix("/grant"),
        enum_text(one.status, "state"),
        time_text(one.status, "until_time"),
        one.status.message,
    )


def _check_row(one: grant_pb2.GrantCheck) -> tuple[str, ...]:
    return (
        enum_text(one, "subject"),
        enum_text(one, "result"),
        one.target or NOTHING,
        one.message,
        one.remedy or NOTHING,
    )


def _emit(one: grant_pb2.Grant, output: str) -> None:
    if output == "json":
        emit_json(resource(one))
        return
    attempt = one.last_attempt
    emit_record(
        [
            ("token", one.name.removesuffix("/grant")),
            ("state", enum_text(one.status, "state")),
            ("because", one.status.message or NOTHING),
            ("since", time_text(one.status, "since_time")),
            ("until", time_text(one.status, "until_time")),
            ("client id", one.client_id),
            ("token URL", one.token_url),
            *(("API host", host) for host in one.api_hosts),
            ("client authentication", enum_text(one, "client_authentication")),
            ("key", one.key_id),
            ("generation", str(one.generation)),
            ("etag", one.etag),
            ("put", time_text(one, "create_time")),
            ("last refresh", time_text(one, "refresh_time")),
            ("not before", time_text(one, "not_before_time")),
            ("access token expires", time_text(one, "expire_time")),
            ("refresh token expires", time_text(one, "idle_expire_time")),
            ("last request", time_text(attempt, "begin_time")),
            ("its result", attempt.outcome or NOTHING),
        ]
    )
