"""`holdoff budget`: what it asks for, what it prints, and what it asks before a reset.

The coordinator is a small one made for these tests, behind a real gRPC server.
"""

# ruff: noqa: D102, N802 - the methods of a servicer are named and described by the service

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from holdoff import _core
from holdoff.cli import exits, main
from holdoff.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    budget_pb2,
    budget_service_pb2,
    budget_service_pb2_grpc,
)

if TYPE_CHECKING:
    from pathlib import Path

FINANCE = "apps/exact-nl/tokens/finance"
NAME = "apps/exact-nl/budgets/errors-k7q2m3ab5cdefghi"
PROGRAM = [sys.executable, "-c", "from holdoff.cli import main; main(prog_name='holdoff')"]


def a_budget(**changes: Any) -> budget_pb2.Budget:
    """A budget that is spent."""
    fields: dict[str, Any] = {
        "name": NAME,
        "limit": "errors",
        "kind": budget_pb2.EVENT_KIND_ERROR,
        "scope": budget_pb2.Scope(
            app="apps/exact-nl", token=FINANCE, division="535193", endpoint="crm/accounts"
        ),
        "state": budget_pb2.BUDGET_STATE_SPENT,
        "used": 8,
        "most": 10,
        "margin": 2,
        "window": Duration(seconds=3600),
        "room_in": Duration(seconds=568),
        "room_time": Timestamp(seconds=1_800_000_568),
        "last_event_time": Timestamp(seconds=1_800_000_000),
    }
    return budget_pb2.Budget(**(fields | changes))


CALLS = a_budget(
    name="apps/exact-nl/budgets/calls-a-minute-a",
    limit="calls-a-minute",
    kind=budget_pb2.EVENT_KIND_CALL,
    scope=budget_pb2.Scope(app="apps/exact-nl", division="535193"),
    state=budget_pb2.BUDGET_STATE_OPEN,
    used=12,
    reserved=3,
    most=60,
    margin=0,
    room=45,
    room_in=None,
)


@dataclass
class Coordinator(
    budget_service_pb2_grpc.BudgetServiceServicer, admin_service_pb2_grpc.AdminServiceServicer
):
    """Answers with what it was given, and remembers the requests."""

    budgets: list[budget_pb2.Budget] = field(default_factory=list)
    outcome: budget_pb2.EventOutcome.ValueType = budget_pb2.EVENT_OUTCOME_COUNTED
    requests: list[Any] = field(default_factory=list)

    def ListBudgets(
        self, request: budget_service_pb2.ListBudgetsRequest, context: grpc.ServicerContext
    ) -> budget_service_pb2.ListBudgetsResponse:
        del context
        self.requests.append(request)
        return budget_service_pb2.ListBudgetsResponse(budgets=self.budgets)

    def GetBudget(
        self, request: budget_service_pb2.GetBudgetRequest, context: grpc.ServicerContext
    ) -> budget_service_pb2.GetBudgetResponse:
        del context
        self.requests.append(request)
        return budget_service_pb2.GetBudgetResponse(budget=self.budgets[0])

    def ResetBudget(
        self, request: admin_service_pb2.ResetBudgetRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.ResetBudgetResponse:
        del context
        self.requests.append(request)
        reset = a_budget(used=0, room=8, reset_reason=request.reason, room_in=None)
        return admin_service_pb2.ResetBudgetResponse(budget=reset)

    def RecordEvents(
        self, request: budget_service_pb2.RecordEventsRequest, context: grpc.ServicerContext
    ) -> budget_service_pb2.RecordEventsResponse:
        del context
        self.requests.append(request)
        return budget_service_pb2.RecordEventsResponse(outcomes=[self.outcome])


@pytest.fixture
def coordinator() -> Coordinator:
    """A coordinator that knows nothing yet."""
    return Coordinator()  # type: ignore[abstract] # nothing else is asked


@pytest.fixture
def endpoint(coordinator: Coordinator) -> Iterator[str]:
    """Where it listens."""
    server = grpc.server(ThreadPoolExecutor(2))
    budget_service_pb2_grpc.add_BudgetServiceServicer_to_server(coordinator, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


Holdoff = Callable[..., Result]


@pytest.fixture
def state_home(tmp_path: Path) -> Path:
    """Where reports are kept, and nothing else."""
    return tmp_path


@pytest.fixture
def holdoff(endpoint: str, state_home: Path) -> Holdoff:
    """Run the command line against it."""

    def run(*args: str, **env: str) -> Result:
        variables = {
            "HOLDOFF_OUTPUT": None,
            "TZ": "UTC",
            "HOLDOFF_ENDPOINT": endpoint,
            "XDG_STATE_HOME": str(state_home),
            **env,
        }
        return CliRunner(env=variables).invoke(main, args, prog_name="holdoff")

    return run


def test_the_list_reads_well(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A line a budget, in the order of the coordinator, with everything that it is about."""
    coordinator.budgets = [a_budget(), CALLS]
    result = holdoff("budget", "list")
    assert result.exit_code == 0, result.output
    fields = [[one.strip() for one in row.split("  ") if one] for row in result.stdout.splitlines()]
    assert fields == [
        ["LIMIT", "STATE", "USED", "ROOM", "ROOM IN", "DIVISION", "ENDPOINT", "TOKEN", "NAME"],
        ["errors", "spent", "8/10", "0", "9m28s", "535193", "crm/accounts", "finance", NAME],
        ["calls-a-minute", "open", "12+3/60", "45", "-", "535193", "-", "-", CALLS.name],
    ]
    document = json.loads(holdoff("budget", "list", "-o", "json").stdout)
    assert [one["name"] for one in document["budgets"]] == [NAME, CALLS.name]
    assert document["budgets"][0]["room_in"] == "568s"


def test_the_list_asks_for_what_was_typed(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """An app is the parent; a token is that, and a filter; the rest are filters."""
    assert (
        holdoff("budget", "list", "apps/exact-nl").stderr == "no budgets in use of apps/exact-nl\n"
    )
    filters = ["--division", "535193", "--endpoint", "crm/Accounts", "--state", "spent"]
    assert holdoff("budget", "list", FINANCE, *filters).stderr.startswith("no spent budgets")
    everything, one_token = coordinator.requests
    assert everything == budget_service_pb2.ListBudgetsRequest(
        parent="apps/exact-nl", scope=budget_pb2.Scope()
    )
    assert one_token == budget_service_pb2.ListBudgetsRequest(
        parent="apps/exact-nl",
        scope=budget_pb2.Scope(token=FINANCE, division="535193", endpoint="crm/Accounts"),
        state=budget_pb2.BUDGET_STATE_SPENT,
    )


def test_show_tells_people_everything(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A line for every field with a value."""
    coordinator.budgets = [a_budget(reset_reason="it\x1b[2J", reset_time=Timestamp(seconds=1))]
    shown = holdoff("budget", "show", NAME).stdout
    for words in (
        *("8 of 10 errors", "9m28s", "2027-01-15 08:09:28", "1h", FINANCE, "crm/accounts"),
        *("535193", "margin", r"it\x1b[2J", "1970-01-01 00:00:01"),
    ):
        assert words in shown
    assert "reserved" not in shown
    assert json.loads(holdoff("budget", "show", NAME, "-o", "json").stdout)["used"] == "8"


@pytest.mark.parametrize(("answer", "code", "reset"), [("y\n", 0, True), ("n\n", 1, False)])
def test_reset_asks_on_a_terminal(
    coordinator: Coordinator, endpoint: str, answer: str, code: int, reset: bool
) -> None:
    """It says what will be forgotten, and does it after a yes only.

    Fails when the answer is not looked at.
    """
    coordinator.budgets = [a_budget()]
    ours, theirs = pty.openpty()
    command = ["budget", "reset", NAME, "--reason", "mended", "--output", "json"]
    try:
        os.write(ours, answer.encode())
        result = subprocess.run(
            [*PROGRAM, "--endpoint", endpoint, *command],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == code, result.stderr
    assert "has 8 of 10 used in 1h. Reset it?" in result.stderr
    assert ("not reset" in result.stderr) is not reset
    asked = [type(request) for request in coordinator.requests]
    assert (admin_service_pb2.ResetBudgetRequest in asked) is reset
    assert json.loads(result.stdout)["used"] == "0" if reset else result.stdout == ""


def test_reset_does_not_ask_a_script(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Without a terminal it is done at once, and the reason is kept."""
    result = holdoff("budget", "reset", NAME, "--reason", "mended")
    assert result.exit_code == 0, result.output
    [request] = coordinator.requests
    assert (request.name, request.reason) == (NAME, "mended")
    assert request.holder.host
    assert "mended" in result.stdout


def test_record_reports_what_was_typed(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """An error arrives with all of its fields, and an id of its own unless there is one."""
    options = ["--division", "1", "--endpoint", "crm/Accounts", "--status", "400", "--count", "3"]
    event_id = str(uuid.uuid4())
    for more in (["--job", "nightly"], ["--id", event_id.upper()]):
        result = holdoff("budget", "record", FINANCE, *options, *more)
        assert (result.exit_code, result.stdout) == (0, "counted\n"), result.stderr
    first, second = (request.events[0] for request in coordinator.requests)
    assert (first.kind, first.status, first.count) == (budget_pb2.EVENT_KIND_ERROR, 400, 3)
    assert first.scope == budget_pb2.Scope(token=FINANCE, division="1", endpoint="crm/Accounts")
    assert (first.holder.job, first.age) == ("nightly", Duration())
    assert uuid.UUID(first.id).version == 4
    assert second.id == event_id


def test_record_says_how_it_was_taken(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Counted, counted before, or not limited; as JSON with the id."""
    command = ["budget", "record", FINANCE, "--endpoint", "x"]
    coordinator.outcome = budget_pb2.EVENT_OUTCOME_KNOWN
    assert holdoff(*command).stdout == "counted before\n"
    coordinator.outcome = budget_pb2.EVENT_OUTCOME_NOT_LIMITED
    assert holdoff(*command).stdout.startswith("not counted: no limit")
    document = json.loads(holdoff(*command, "-o", "json").stdout)
    assert document["outcome"] == "EVENT_OUTCOME_NOT_LIMITED"
    assert document["id"] == coordinator.requests[-1].events[0].id
    assert document["spooled"] is False
    coordinator.outcome = 9  # type: ignore[assignment] # of a newer coordinator
    assert "unknown" in holdoff(*command).stdout


@pytest.mark.parametrize("no_spool", [True, False])
def test_record_can_be_repeated(
    holdoff: Holdoff, state_home: Path, monkeypatch: pytest.MonkeyPatch, no_spool: bool
) -> None:
    """Where nobody could be told, nor it be kept, the id with which to tell it again is printed.

    Fails when a repetition would count twice.
    """
    monkeypatch.setattr(_core, "REPORT_SECONDS", 0.1)
    if not no_spool:
        (state_home / "holdoff").write_text("where the folder should be")
    command = ["budget", "record", FINANCE, "--endpoint", "x"]
    command += ["--no-spool"] if no_spool else []
    result = holdoff(*command, HOLDOFF_ENDPOINT="127.0.0.1:1")
    assert result.exit_code == exits.UNREACHABLE
    *before, first, _, _ = result.stderr.splitlines()
    assert [line.partition(f"{state_home}")[0] for line in before] == (
        [] if no_spool else ["holdoff: the report could not be stored: "]
    )
    words, _, event_id = first.rpartition(" ")
    assert words == "to report it again, and count it once: --id"
    assert uuid.UUID(event_id).version == 4
    assert no_spool is (list(state_home.iterdir()) == [])


def test_record_is_kept_while_the_coordinator_is_away(
    holdoff: Holdoff, coordinator: Coordinator, state_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exits with 0 and says who sends it: the next record does, with its id and true age.

    Fails when it is sent as if it had just happened, with another id, or by nobody.
    """
    monkeypatch.setattr(_core, "REPORT_SECONDS", 0.3)
    event_id = str(uuid.uuid4())
    options = ["--division", "1", "--endpoint", "x", "--status", "400", "--job", "nightly"]
    command = ["budget", "record", FINANCE, *options, "--id", event_id, "-o", "json"]
    kept = holdoff(*command, HOLDOFF_ENDPOINT="127.0.0.1:1")
    assert kept.exit_code == 0, kept.stderr
    assert json.loads(kept.stdout) == {
        "id": event_id,
        "outcome": "EVENT_OUTCOME_UNSPECIFIED",
        "spooled": True,
    }
    assert "holdoff spool flush" in kept.stderr
    [path] = state_home.rglob("*.jsonl")
    assert float(json.loads(path.read_text())["event"]["age"].rstrip("s")) >= 0.3
    text = holdoff("budget", "record", FINANCE, "--endpoint", "x", HOLDOFF_ENDPOINT="127.0.0.1:1")
    assert (text.exit_code, text.stdout) == (0, "")
    assert holdoff("budget", "record", FINANCE, "--endpoint", "y").stdout == "counted\n"
    events = {event.id: event for one in coordinator.requests for event in one.events}
    assert len(events) == 3
    assert events[event_id].age.ToMilliseconds() >= 300
    assert events[event_id].holder.job == "nightly"
    assert events[event_id].scope.division == "1"
    assert not [path for path in state_home.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "args",
    [
        ["list", NAME],
        ["list", "--state", "gone"],
        ["show", FINANCE],
        ["reset", NAME],
        ["record", FINANCE, "--status", "400"],
        ["record", FINANCE, "--endpoint", "x", "--status", "600"],
        ["record", FINANCE, "--endpoint", "x", "--count", "0"],
        ["record", FINANCE, "--endpoint", "x", "--count", "10001"],
        ["record", FINANCE, "--endpoint", "x", "--id", "7"],
        ["record", FINANCE, "--endpoint", "x", "--id", str(uuid.uuid1())],
        ["record", NAME, "--endpoint", "x"],
    ],
)
def test_wrong_usage_is_64(holdoff: Holdoff, coordinator: Coordinator, args: list[str]) -> None:
    """Wrong usage ends before anything is asked."""
    result = holdoff("budget", *args)
    assert (result.exit_code, result.stdout) == (64, "")
    assert coordinator.requests == []


@pytest.mark.usefixtures("patient_completion")
def test_names_are_completed(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """The budgets of the app that was typed are offered, with where they stand."""
    coordinator.budgets = [a_budget(), CALLS]
    words = ["holdoff", "budget", "show", "apps/exact-nl/budgets/e"]
    typed = {"COMP_WORDS": " ".join(words), "COMP_CWORD": "3"}
    offered = holdoff(_HOLDOFF_COMPLETE="zsh_complete", **typed).stdout.splitlines()
    assert offered == ["plain", NAME, "spent: 535193 crm/accounts"]
    assert coordinator.requests[-1].parent == "apps/exact-nl"
