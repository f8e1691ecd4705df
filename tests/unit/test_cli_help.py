"""What commands say about themselves: examples that parse, man pages, and what to do next."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import grpc
import pytest
from click.testing import CliRunner

import manpages
from holdoff import errors
from holdoff.cli import exits, main
from holdoff.cli._help import examples_of
from holdoff.v1 import token_service_pb2, token_service_pb2_grpc

CONTEXTS = {context.command_path: context for context in manpages.all_contexts()}
FINANCE = "apps/exact-nl/tokens/finance"


@pytest.mark.parametrize("path", CONTEXTS)
def test_every_help_has_an_example_that_parses(path: str) -> None:
    """The help of every command of both programs has command lines of just that command."""
    context = CONTEXTS[path]
    lines = examples_of(context.command)
    # What a group can do is what its commands can do.
    assert lines or isinstance(context.command, click.Group)
    assert ("Example:" in context.command.get_help(context)) is bool(lines)
    for line in lines:
        assert path in [context.command_path for context in parsed(shlex.split(line))], line


def parsed(words: list[str]) -> Iterator[click.Context]:
    """Parse a command line as its program would, without running it.

    Raises:
        click.UsageError: It is wrong.
    """
    name, args = words[0], words[1:]
    command: click.Command | None = manpages.PROGRAMS[name]
    context = None
    while command:
        context = command.make_context(name, args, parent=context)
        yield context
        # Where groups keep the words that are not theirs.
        args = [*context._protected_args, *context.args]
        if not isinstance(command, click.Group):
            return
        found, command, args = command.resolve_command(context, args) if args else ("", None, [])
        name = found or ""


def test_a_wrong_example_would_be_seen() -> None:
    """The parser of these tests refuses what the program would refuse."""
    for line in ("holdoff tokn", "holdoff token show", f"holdoff token show {FINANCE} --nope"):
        with pytest.raises(click.UsageError):
            list(parsed(shlex.split(line)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The man pages."""
    return manpages.write(tmp_path_factory.mktemp("man"))


@pytest.mark.parametrize(
    "checker",
    [
        ["groff", "-man", "-ww", "-z", "-k", "-Tutf8"],
        ["mandoc", "-T", "lint", "-W", "warning"],
    ],
    ids=lambda command: command[0],
)
def test_man_pages_are_valid(pages: list[Path], checker: list[str]) -> None:
    """Neither groff nor mandoc has a warning for any page."""
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    for path in pages:
        result = subprocess.run(
            [*checker, str(path)], capture_output=True, text=True, timeout=30, check=False
        )
        assert (result.returncode, result.stdout + result.stderr) == (0, ""), path.name


def test_man_pages_tell_all(pages: list[Path]) -> None:
    """There is a page for each command, with every option and every section."""
    by_name = {path.name: path.read_text() for path in pages}
    assert {"holdoff.1", "holdoff-token-history.1", "holdoff-coordinator-serve.1"} <= set(by_name)
    for context in CONTEXTS.values():
        text = by_name[f"{manpages.page_name(context)}.1"]
        for section in ("SYNOPSIS", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES"):
            assert f".SH {section}\n" in text, context.command_path
        for example in examples_of(context.command):
            assert example.replace("-", "\\-") in text.partition(".SH EXAMPLES\n")[2]
        for param in context.command.params:
            for option in param.opts if isinstance(param, click.Option) else ():
                assert option.replace("-", "\\-") in text


# What to do next

# Their messages say it, and know more than could be said for all of a kind.
SAY_IT_THEMSELVES = {
    "CREDENTIAL_EXPIRED",
    "CREDENTIAL_MISSING",
    "CREDENTIAL_REFUSED",
    "CUSTODY_KEY_MISSING",
    "AUTHORIZATION_FAILED",
    "AUTHORIZATION_NOT_FOUND",
    "CUSTODY_OFF",
    "INVALID_FIELD",
    "LIMIT_REACHED",
    "NOT_ALLOWED",
    "POLICY_NOT_FOUND",
    "REQUEST_ID_REUSED",
    "WRONG_SECRET",
}


@pytest.mark.parametrize("reason", errors.BY_REASON)
def test_every_reason_says_what_to_do(reason: str) -> None:
    """Every error says what to do next, or is one of those whose messages do."""
    error = errors.BY_REASON[reason](f"no lease on {FINANCE}", reason=reason)
    remedy = exits.remedy_of(error, "c:1")
    assert bool(remedy) is (reason not in SAY_IT_THEMSELVES)
    assert "{" not in remedy
    for line in re.findall(r"holdoff (?:token|lease|budget|watch)[^;,]*", remedy):
        assert list(parsed(shlex.split(line)))


class Talkative(token_service_pb2_grpc.TokenServiceServicer):
    """Answers with more than a message may hold."""

    def ListTokens(  # noqa: N802 - the service says so
        self, request: token_service_pb2.ListTokensRequest, context: grpc.ServicerContext
    ) -> token_service_pb2.ListTokensResponse:
        """Answer."""
        del request, context
        return token_service_pb2.ListTokensResponse(next_page_token="x" * 5_000_000)


@pytest.mark.parametrize(
    ("service", "remedy"),
    [(Talkative, "list one app or token"), (None, "not a coordinator, or an older one")],
)
def test_errors_of_grpc_say_what_to_do(service: type[Talkative] | None, remedy: str) -> None:
    """An answer that is too long, or a method that is not there, has a remedy too."""
    server = grpc.server(ThreadPoolExecutor(1))
    if service:
        token_service_pb2_grpc.add_TokenServiceServicer_to_server(
            service(),
            server,
        )
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        result = CliRunner().invoke(main, ["--endpoint", endpoint, "token", "list"])
    finally:
        server.stop(None).wait()
    assert remedy in result.stderr.splitlines()[1]


def test_a_remedy_names_the_token() -> None:
    """Commands in a remedy are about the token of the error, and can be copied."""
    error = errors.LeaseHeld(f"no lease on {FINANCE}: held by job 'x' on web1")
    assert f"holdoff watch {FINANCE};" in exits.remedy_of(error, "")


def test_a_remedy_names_the_app() -> None:
    """Also where the error is about something else than a token."""
    error = errors.BudgetNotFound("there is no budget apps/exact-nl/budgets/e-1", reason="")
    assert "holdoff budget list apps/exact-nl" in exits.remedy_of(error, "")


def test_quarantine_says_for_how_long() -> None:
    """What is known of the end of a quarantine is told."""
    error = errors.Quarantined("quarantined", retry_after_seconds=540.2)
    assert "for at least 9m" in exits.remedy_of(error, "")
