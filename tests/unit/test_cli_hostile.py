"""What a hostile coordinator sends to a terminal: nothing that a terminal obeys."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import click
import click.testing
import grpc
import pytest
from click.testing import CliRunner
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from holdoff._log import log
from holdoff.cli import exits, main
from tests.harness import LONG, NO_PROXY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

EVIL = "\x1b]0;PWNED\x07\x9b2J\x1b[31m\u202egnp\u2066\u200b\r\u2028\x00"
OBEYED = {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u200b", "\r", "\u2028", "\x00"}
SERVICES = [
    f"holdoff.v1.{name}Service"
    for name in ("Lease", "Token", "Custody", "Budget", "Policy", "Admin")
]
TOKEN = "apps/a/tokens/t"
LEASE, BUDGET, BACK_OFF = f"{TOKEN}/leases/1", "apps/a/budgets/errors-1", "apps/a/backOffs/b-1"
WHY = ("--reason", "why", "--yes")
COMMANDS: dict[str, tuple[str, ...]] = {
    "audit": (),
    "backoff clear": (BACK_OFF, *WHY),
    "backoff list": (),
    "backoff set": (TOKEN, "--for", "1m", "--reason", "why"),
    "budget list": (),
    "budget record": (TOKEN, "--endpoint", "x", "--no-spool"),
    "budget reset": (BUDGET, *WHY),
    "budget show": (BUDGET,),
    "budget watch": (),
    "explain": (TOKEN,),
    "gateway": ("--token", TOKEN, "--listen", "127.0.0.1:0", "--upstream", "other.example"),
    "grant access-token": (TOKEN, "--wait", "1s"),
    "grant authorize": (TOKEN, "--manual"),
    "grant delete": (TOKEN, "--yes"),
    "grant list": (),
    "grant put": (TOKEN, "--client-id", "id"),
    "grant rotate-keys": (),
    "grant show": (TOKEN,),
    "grant trust": (TOKEN, "--yes"),
    "grant watch": (TOKEN,),
    "lease break": (LEASE, *WHY),
    "lease list": (),
    "lease show": (LEASE,),
    "policy list": (),
    "policy show": ("exact-online",),
    "quarantine end": ("apps/a", *WHY),
    "quarantine show": (),
    "run": ("--token", TOKEN, "--no-wait", "--", "true"),
    "token create": (TOKEN,),
    "token history": (TOKEN,),
    "token list": (),
    "token queue": (TOKEN,),
    "token show": (TOKEN,),
    "token update": (TOKEN, "--refresh-at", "end"),
    "watch": (),
}
"""All commands that a coordinator answers, with what they take."""
ALONE = ("completion", "policy check", "simulator fault", "simulator report", "simulator serve")
SPOOL = ("spool flush", "spool list", "spool retry")
ASKING = {
    "backoff clear",
    "budget reset",
    "grant delete",
    "grant trust",
    "lease break",
    "quarantine end",
}
NAMES = {
    "app": "apps/a",
    "backoff": BACK_OFF,
    "budget": BUDGET,
    "grant": f"{TOKEN}/grant",
    "lease": LEASE,
    "token": TOKEN,
}


def fill(message: Message, *, names: bool, depth: int = 0) -> Message:
    """Put a hostile text into every field; `names` tells whether names are those of things."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type and depth > 5:
            continue
        owner = getattr(message, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            texts = field.message_type.fields_by_name["value"].type == field.TYPE_STRING
            owner[EVIL] = EVIL if texts else 1
        elif field.message_type:
            fill_message(owner.add() if field.is_repeated else owner, names=names, depth=depth + 1)
        elif field.type != field.TYPE_BYTES:
            value = text_of(field, names=names) if field.type == field.TYPE_STRING else 1
            if field.is_repeated:
                owner.append(value)
            else:
                setattr(message, field.name, value)
    return message


def fill_message(message: Any, *, names: bool, depth: int) -> None:
    """Fill a field that is a message; times and durations cannot be hostile."""
    if isinstance(message, timestamp_pb2.Timestamp):
        message.FromJsonString("2027-01-01T00:00:00Z")
    elif isinstance(message, duration_pb2.Duration):
        message.FromSeconds(9)
    else:
        fill(message, names=names, depth=depth)


def text_of(field: Any, *, names: bool) -> str:
    """Choose the text of a field."""
    if field.name == "next_page_token":
        return ""
    if not names:
        return EVIL
    thing = field.containing_type.name.lower() if field.name == "name" else field.name
    return NAMES.get(thing, EVIL)


class Hostile(grpc.GenericRpcHandler):
    """Answers every call as `answers` says."""

    answers = "names"

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Find how a method is answered."""
        service, _, name = details.method.removeprefix("/").rpartition("/")
        method = Default().FindServiceByName(service).methods_by_name[name]

        def reply(context: grpc.ServicerContext) -> Message:
            if self.answers == "error":
                self.fail(context)
            return fill(self.answer(method), names=self.answers == "names")

        def replies(_: object, context: grpc.ServicerContext) -> Iterator[Message]:
            yield reply(context)
            self.fail(context)

        read = GetMessageClass(method.input_type).FromString
        write = GetMessageClass(method.output_type).SerializeToString
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(replies, read, write)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(replies, read, write)
        return grpc.unary_unary_rpc_method_handler(lambda _, context: reply(context), read, write)

    @staticmethod
    def answer(method: MethodDescriptor) -> Message:
        """Make an empty answer of a method."""
        return GetMessageClass(method.output_type)()

    @staticmethod
    def fail(context: grpc.ServicerContext) -> None:
        """Fail with a text, a reason and metadata that are hostile."""
        status = status_pb2.Status(code=7, message=f"{EVIL} {TOKEN}")
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=EVIL, metadata={"k": EVIL}))
        status.details.append(detail)
        context.abort_with_status(rpc_status.to_status(status))


@pytest.fixture(scope="module")
def hostile() -> Iterator[tuple[str, Hostile]]:
    """Give a coordinator that answers with hostile texts, and its address."""
    with ThreadPoolExecutor(20) as threads:
        server = grpc.server(threads, options=NO_PROXY)
        handler = Hostile()
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", handler
        server.stop(None).wait()


def leaves(group: click.Command, path: str = "") -> Iterator[str]:
    """Yield the paths of all commands."""
    if not isinstance(group, click.Group):
        yield path.strip()
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])
        assert command
        yield from leaves(command, f"{path} {name}")


def test_every_command_is_here() -> None:
    """Fails when a command that is new is not given hostile texts."""
    assert sorted(leaves(main)) == sorted([*COMMANDS, *ALONE, *SPOOL])


def rows() -> list[tuple[str, str, str]]:
    """Return each command with each output and, at length, each kind of answer; else with one."""
    outputs = [(command, output) for command in COMMANDS for output in ("table", "json")]
    return [
        (*row, kind)
        for place, row in enumerate([*outputs, ("policy show", "toml")])
        for number, kind in enumerate(("names", "all", "error"))
        if LONG or (place + number) % 3 == 0
    ]


@pytest.mark.parametrize(("command", "output", "answers"), rows())
def test_a_terminal_is_told_nothing_to_obey(  # noqa: PLR0913, PLR0917 - a row of a table
    hostile: tuple[str, Hostile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    output: str,
    answers: str,
) -> None:
    """Every text of an answer, or of an error, is shown escaped, on both streams.

    Fails when a command prints a text of the coordinator as it came.
    """
    address, handler = hostile
    handler.answers = answers
    monkeypatch.setenv("HOLDOFF_OUTPUT", output)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    arguments = ["--endpoint", address, *command.split(), *COMMANDS[command]]
    done = CliRunner().invoke(main, arguments)
    shown = done.stdout + done.stderr
    assert shown
    assert not {one for one in OBEYED if one in shown}, ascii(shown)
    assert "PWNED" in shown or done.exit_code == 0 or command == "run"


@pytest.mark.parametrize("command", sorted(ASKING))
def test_a_question_is_harmless(
    hostile: tuple[str, Hostile], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Before something is broken, cleared or ended its state is shown, escaped.

    Fails when a question repeats what the coordinator said.
    """
    address, handler = hostile
    handler.answers = "names"
    asked: list[str] = []
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda text, **_: asked.append(text))
    arguments = [one for one in COMMANDS[command] if one != "--yes"]
    done = CliRunner().invoke(main, ["--endpoint", address, *command.split(), *arguments])
    assert done.exit_code == exits.DECLINED
    assert asked
    assert not {one for one in OBEYED if one in asked[0]}


def test_completion_offers_no_hostile_name(hostile: tuple[str, Hostile]) -> None:
    """Names that a shell could run are not offered, and descriptions are escaped.

    Fails when a name goes to the command line as it came.
    """
    address, handler = hostile
    for handler.answers in ("names", "all"):
        for command in ("token show", "lease show", "policy show"):
            words = f"holdoff --endpoint {address} {command} "
            done = CliRunner().invoke(
                main,
                prog_name="holdoff",
                env={
                    "_HOLDOFF_COMPLETE": "zsh_complete",
                    "COMP_WORDS": words,
                    "COMP_CWORD": str(len(words.split())),
                },
                args=[],
            )
            assert not {one for one in OBEYED if one in done.stdout}, ascii(done.stdout)


def test_the_log_of_the_library_is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    """Fails when a name of the coordinator's is logged as it came."""
    with caplog.at_level(logging.WARNING, "holdoff"):
        log.warning("lease %s is lost: %s", EVIL, f"{EVIL}\nmore")
    [record] = caplog.records
    assert not {one for one in OBEYED if one in record.getMessage()}
    assert record.getMessage().endswith("\nmore")
