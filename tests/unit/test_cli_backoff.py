"""`holdoff backoff`, `explain` and `budget watch`: what they ask for, and what they print.

The coordinator is a small one made for these tests, behind a real gRPC server.
"""

# ruff: noqa: D102, N802 - the methods of a servicer are named and described by the service

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.text import Text

from holdoff import errors
from holdoff.cli import exits, main
from holdoff.cli._budget_board import BudgetBoard
from holdoff.cli._waiting import WaitDisplay
from holdoff.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    budget_pb2,
    budget_service_pb2,
    budget_service_pb2_grpc,
    lease_pb2,
)
from tests.harness import LONG, wait_until

APP = "apps/exact-nl"
FINANCE = f"{APP}/tokens/finance"
NAME = f"{APP}/backOffs/block-k7q2m3ab5cdefghi"
PROGRAM = [sys.executable, "-c", "from holdoff.cli import main; main(prog_name='holdoff')"]
SECOND = 1_000_000_000


def a_back_off(**changes: Any) -> budget_pb2.BackOff:
    """A block that was met ten minutes ago and lasts an hour."""
    fields: dict[str, Any] = {
        "name": NAME,
        "scope": budget_pb2.Scope(app=APP, token=FINANCE, division="535193"),
        "cause": budget_pb2.BACK_OFF_CAUSE_BLOCKED,
        "state": budget_pb2.BACK_OFF_STATE_QUIET,
        "start_time": Timestamp(seconds=1_800_000_000),
        "end_time": Timestamp(seconds=1_800_003_600),
        "remaining": Duration(seconds=3000),
        "reason": "the provider blocks it: HTTP 429",
        "caused_by": lease_pb2.Holder(job="nightly", host="web2"),
        "status": 429,
        "repeats": 1,
    }
    return budget_pb2.BackOff(**(fields | changes))


def a_budget(**changes: Any) -> budget_pb2.Budget:
    """A budget that is spent."""
    fields: dict[str, Any] = {
        "name": f"{APP}/budgets/errors-1",
        "limit": "errors",
        "kind": budget_pb2.EVENT_KIND_ERROR,
        "scope": budget_pb2.Scope(app=APP, token=FINANCE, division="1", endpoint="crm/accounts"),
        "state": budget_pb2.BUDGET_STATE_SPENT,
        "used": 8,
        "most": 10,
        "margin": 2,
        "room_in": Duration(seconds=568),
    }
    return budget_pb2.Budget(**(fields | changes))


NO = budget_service_pb2.ExplainResponse(
    must_wait=True,
    go_in=Duration(seconds=3000),
    message=f"{FINANCE} must wait for at least 50m: the provider blocks it",
    obstacles=[
        budget_service_pb2.Obstacle(
            reason=lease_pb2.WAIT_REASON_BACKING_OFF,
            message="the provider blocks it:\x1b[2J HTTP 429",
            start_time=Timestamp(seconds=1_800_000_000),
            end_time=Timestamp(seconds=1_800_003_600),
            remaining=Duration(seconds=3000),
            caused_by=lease_pb2.Holder(job="nightly", host="web2"),
            back_off=a_back_off(),
        ),
        budget_service_pb2.Obstacle(
            reason=lease_pb2.WAIT_REASON_HELD,
            message="held by job 'sales' on web1",
            lease=lease_pb2.Lease(name=f"{FINANCE}/leases/7"),
        ),
    ],
    budgets=[a_budget()],
    errors=[
        budget_pb2.RecentError(
            time=Timestamp(seconds=1_800_000_000),
            scope=budget_pb2.Scope(app=APP, token=FINANCE, division="1", endpoint="crm/\u202eX"),
            status=400,
            count=3,
            holder=lease_pb2.Holder(job="nightly", host="web2"),
        )
    ],
)
YES = budget_service_pb2.ExplainResponse(message=f"{FINANCE} may start now")


@dataclass
class Coordinator(
    budget_service_pb2_grpc.BudgetServiceServicer, admin_service_pb2_grpc.AdminServiceServicer
):
    """Answers with what it was given, and remembers the requests."""

    back_offs: list[budget_pb2.BackOff] = field(default_factory=list)
    answer: budget_service_pb2.ExplainResponse = field(default_factory=lambda: YES)
    connections: list[list[budget_service_pb2.WatchBudgetsResponse]] = field(default_factory=list)
    """What to say on each connection of a watch; the last one stays open."""
    requests: list[Any] = field(default_factory=list)

    def ListBackOffs(
        self, request: budget_service_pb2.ListBackOffsRequest, context: grpc.ServicerContext
    ) -> budget_service_pb2.ListBackOffsResponse:
        del context
        self.requests.append(request)
        return budget_service_pb2.ListBackOffsResponse(back_offs=self.back_offs)

    def SetBackOff(
        self, request: admin_service_pb2.SetBackOffRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.SetBackOffResponse:
        del context
        self.requests.append(request)
        back_off = a_back_off(reason=request.reason, caused_by=request.holder)
        return admin_service_pb2.SetBackOffResponse(back_off=back_off)

    def ClearBackOff(
        self, request: admin_service_pb2.ClearBackOffRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.ClearBackOffResponse:
        del context
        self.requests.append(request)
        back_off = a_back_off(state=0, remaining=None)
        return admin_service_pb2.ClearBackOffResponse(back_off=back_off)

    def Explain(
        self, request: budget_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> budget_service_pb2.ExplainResponse:
        del context
        self.requests.append(request)
        return self.answer

    def WatchBudgets(
        self, request: budget_service_pb2.WatchBudgetsRequest, context: grpc.ServicerContext
    ) -> Iterator[budget_service_pb2.WatchBudgetsResponse]:
        self.requests.append(request)
        yield from self.connections.pop(0)
        if self.connections:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(30)


@pytest.fixture
def coordinator() -> Coordinator:
    """A coordinator that knows nothing yet."""
    return Coordinator()  # type: ignore[abstract] # nothing else is asked


@pytest.fixture
def endpoint(coordinator: Coordinator) -> Iterator[str]:
    """Where it listens."""
    server = grpc.server(ThreadPoolExecutor(4))
    budget_service_pb2_grpc.add_BudgetServiceServicer_to_server(coordinator, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


Holdoff = Callable[..., Result]


@pytest.fixture
def holdoff(endpoint: str) -> Holdoff:
    """Run the command line against it."""

    def run(*args: str, **env: str) -> Result:
        variables = {"HOLDOFF_OUTPUT": None, "TZ": "UTC", "HOLDOFF_ENDPOINT": endpoint, **env}
        return CliRunner(env=variables).invoke(main, args, prog_name="holdoff")

    return run


def cells(line: str) -> list[str]:
    """The fields of a line of a table."""
    return [one.strip() for one in line.split("  ") if one]


# holdoff backoff


def test_the_list_reads_well(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A line a back-off, in the order of the coordinator; hostile text is escaped."""
    coordinator.back_offs = [
        a_back_off(),
        a_back_off(
            name=f"{APP}/backOffs/operator-a",
            scope=budget_pb2.Scope(app=APP),
            cause=budget_pb2.BACK_OFF_CAUSE_OPERATOR,
            state=budget_pb2.BACK_OFF_STATE_PROBING,
            remaining=None,
            reason="quiet\x1b[2J",
            caused_by=lease_pb2.Holder(),
        ),
    ]
    result = holdoff("backoff", "list", APP)
    assert result.exit_code == 0, result.output
    why = "the provider blocks it: HTTP 429"
    assert [cells(line) for line in result.stdout.splitlines()] == [
        ["STATE", "CAUSE", "LEFT", "DIVISION", "ENDPOINT", "TOKEN", "BY", "WHY", "NAME"],
        ["quiet", "blocked", "50m", "535193", "-", "finance", "nightly on web2", why, NAME],
        ["probing", "operator", *"-----", r"quiet\x1b[2J", f"{APP}/backOffs/operator-a"],
    ]
    assert coordinator.requests == [budget_service_pb2.ListBackOffsRequest(parent=APP)]
    document = json.loads(holdoff("backoff", "list", "-o", "json").stdout)
    assert document["back_offs"][0]["remaining"] == "3000s"
    coordinator.back_offs = []
    assert holdoff("backoff", "list", APP).stderr == f"no back-offs of {APP}\n"


@pytest.mark.parametrize("token", [True, False])
def test_set_asks_for_what_was_typed(
    holdoff: Holdoff, coordinator: Coordinator, token: bool
) -> None:
    """An app or a token, a length, a reason, and who wishes it.

    Fails when nobody is named.
    """
    scope = FINANCE if token else APP
    options = ["--for", "1h", "--reason", "mended soon", "--division", "1", "--endpoint", "crm/X"]
    result = holdoff("backoff", "set", scope, *options)
    assert result.exit_code == 0, result.output
    [request] = coordinator.requests
    assert (request.length, request.reason) == (Duration(seconds=3600), "mended soon")
    assert request.scope == budget_pb2.Scope(
        app=APP, token=FINANCE if token else "", division="1", endpoint="crm/X"
    )
    assert request.holder.user
    assert request.holder.host
    for words in ("quiet", "mended soon", "50m", "2027-01-15 09:00:00+00:00", request.holder.user):
        assert words in result.stdout


@pytest.mark.parametrize(("answer", "code", "cleared"), [("y\n", 0, True), ("n\n", 1, False)])
def test_clear_asks_on_a_terminal(
    coordinator: Coordinator, endpoint: str, answer: str, code: int, cleared: bool
) -> None:
    """It says what will end, and ends it after a yes only.

    Fails when the answer is not looked at.
    """
    coordinator.back_offs = [a_back_off()]
    ours, theirs = pty.openpty()
    command = ["backoff", "clear", NAME, "--reason", "mended", "--output", "json"]
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
    assert "is in force for another 50m: the provider blocks it: HTTP 429." in result.stderr
    asked = [type(request) for request in coordinator.requests]
    assert (admin_service_pb2.ClearBackOffRequest in asked) is cleared


def test_clear_does_not_ask_a_script(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Without a terminal it is done at once; the reason, and who did it, are told."""
    result = holdoff("backoff", "clear", NAME, "--reason", "mended")
    assert result.exit_code == 0, result.output
    [request] = coordinator.requests
    assert (request.name, request.reason) == (NAME, "mended")
    assert request.holder.user
    assert re.search(r"^state +over$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "args",
    [
        ["backoff", "list", FINANCE],
        ["backoff", "set", APP, "--reason", "x"],
        ["backoff", "set", APP, "--for", "1h"],
        ["backoff", "set", APP, "--for", "tomorrow", "--reason", "x"],
        ["backoff", "set", NAME, "--for", "1h", "--reason", "x"],
        ["backoff", "clear", NAME],
        ["backoff", "clear", FINANCE, "--reason", "x"],
        ["explain"],
        ["explain", NAME],
        ["budget", "watch", NAME],
    ],
)
def test_wrong_usage_is_64(holdoff: Holdoff, coordinator: Coordinator, args: list[str]) -> None:
    """Wrong usage ends before anything is asked."""
    result = holdoff(*args)
    assert (result.exit_code, result.stdout) == (64, "")
    assert coordinator.requests == []


@pytest.mark.usefixtures("patient_completion")
def test_names_are_completed(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """The back-offs of the app that was typed are offered, with what they are about."""
    coordinator.back_offs = [a_back_off()]
    words = ["holdoff", "backoff", "clear", f"{APP}/backOffs/b"]
    typed = {"COMP_WORDS": " ".join(words), "COMP_CWORD": "3"}
    offered = holdoff(_HOLDOFF_COMPLETE="zsh_complete", **typed).stdout.splitlines()
    assert offered == ["plain", NAME, "quiet: the provider blocks it: HTTP 429"]
    assert coordinator.requests[-1].parent == APP


# holdoff explain


def test_no_is_explained(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """No in the first line, then every reason, the tightest budgets, and the latest errors.

    Fails when hostile text is printed as it is.
    """
    coordinator.answer = NO
    result = holdoff("explain", FINANCE, "--division", "1", "--endpoint", "crm/X", "--job", "j")
    assert result.exit_code == 0, result.output
    assert coordinator.requests == [
        budget_service_pb2.ExplainRequest(
            scope=budget_pb2.Scope(app=APP, token=FINANCE, division="1", endpoint="crm/X"), job="j"
        )
    ]
    first, back_off, lease, budgets, latest = result.stdout.split("\n\n")
    assert first == f"no: {NO.message}"
    assert dict(map(cells, back_off.splitlines())) == {
        "reason": "backing off",
        "what": r"the provider blocks it:\x1b[2J HTTP 429",
        "left": "50m",
        "until": "2027-01-15 09:00:00+00:00",
        "since": "2027-01-15 08:00:00+00:00",
        "by": "nightly on web2",
        "state": "quiet, blocked",
        "back-off": NAME,
    }
    assert dict(map(cells, lease.splitlines())) == {
        "reason": "held",
        "what": "held by job 'sales' on web1",
        "lease": f"{FINANCE}/leases/7",
    }
    assert cells(budgets.splitlines()[1])[:5] == ["errors", "spent", "8/10", "0", "9m28s"]
    assert cells(latest.splitlines()[1]) == [
        *("2027-01-15 08:00:00+00:00", "400", "3", "1", r"crm/\u202eX", "finance"),
        "nightly on web2",
    ]


def test_yes_is_said(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Yes in the first line, and nothing where there is nothing; as JSON for programs."""
    result = holdoff("explain", APP)
    assert (result.exit_code, result.stdout) == (0, f"yes: {YES.message}\n")
    assert coordinator.requests[0].scope == budget_pb2.Scope(app=APP)
    assert json.loads(holdoff("explain", APP, "-o", "json").stdout)["must_wait"] is False
    coordinator.answer = NO
    document = json.loads(holdoff("explain", APP, "-o", "json").stdout)
    assert (document["must_wait"], document["go_in"]) == (True, "3000s")
    assert document["obstacles"][0]["back_off"]["name"] == NAME


# holdoff budget watch


def watched(*items: budget_pb2.BackOff | budget_pb2.Budget, end: bool = False) -> Any:
    """A message to a watcher."""
    return budget_service_pb2.WatchBudgetsResponse(
        back_offs=[one for one in items if isinstance(one, budget_pb2.BackOff)],
        budgets=[one for one in items if isinstance(one, budget_pb2.Budget)],
        snapshot_end=end,
    )


def test_lines_tell_what_changes(coordinator: Coordinator, endpoint: str) -> None:
    """Without a terminal each budget and back-off is a line; a new connection hides nothing.

    Fails when what went away while the coordinator was away is not told.
    """
    coordinator.connections = [
        [watched(a_back_off(), a_budget(), end=True)],
        [watched(a_budget(used=7), end=True)],
    ]
    watch = subprocess.Popen(
        [*PROGRAM, "--endpoint", endpoint, "budget", "watch", FINANCE, "--division", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None
    lines = [json.loads(watch.stdout.readline()) for _ in range(6)]
    watch.send_signal(signal.SIGINT)
    _, stderr = watch.communicate(timeout=20)
    assert watch.returncode == 130
    assert stderr.count("retrying") == 1
    assert [line["kind"] for line in lines] == [
        *("back_off", "budget", "snapshot_end", "back_off", "budget", "snapshot_end"),
    ]
    assert all(line["time"] for line in lines)
    assert lines[1]["budget"]["used"] == "8"
    assert lines[3]["back_off"]["name"] == NAME
    assert lines[3]["back_off"]["state"] == "BACK_OFF_STATE_UNSPECIFIED"
    assert lines[4]["budget"]["used"] == "7"
    assert coordinator.requests[0] == budget_service_pb2.WatchBudgetsRequest(
        parent=APP, scope=budget_pb2.Scope(token=FINANCE, division="1")
    )


def drawn(board: BudgetBoard, now_ns: int, height: int = 20, *, short: bool = False) -> list[str]:
    """What stands on a wide terminal."""
    console = Console(width=400)
    with console.capture() as capture:
        for part in board.picture(height, now_ns):
            console.print(part if isinstance(part, Text) else part(short=short))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_back_offs_stand_above_the_tightest_budgets() -> None:
    """What is left goes down by itself, and what is over is gone.

    Fails when a budget without anything used stays.
    """
    board = BudgetBoard(" of x")
    roomy = a_budget(name=f"{APP}/budgets/b", limit="calls", used=1, room=59, room_in=None)
    board.take(watched(roomy, a_budget(), a_back_off(), end=True), 0)
    lines = drawn(board, 8 * SECOND)
    assert cells(lines[1]) == [
        *("quiet", "49m52s", FINANCE, "535193", "-", "nightly on web2"),
        "the provider blocks it: HTTP 429",
    ]
    assert lines[2] == ""
    assert cells(lines[4]) == [
        *("errors", "spent", "8/10", "0", "9m20s", FINANCE, "1", "crm/accounts")
    ]
    assert cells(lines[5])[:5] == ["calls", "spent", "1/10", "59", "-"]
    assert "exact-nl/finance" in cells(drawn(board, 0, short=True)[1])
    assert cells(drawn(board, 4000 * SECOND)[1])[1] == "0s"

    board.take(watched(a_back_off(state=0), a_budget(used=0)), 9 * SECOND)
    assert [cells(line)[0] for line in drawn(board, 9 * SECOND)] == ["BUDGET", "calls"]
    board.take(watched(a_budget(name=roomy.name, used=0)), 9 * SECOND)
    assert drawn(board, 9 * SECOND) == []


@pytest.mark.parametrize(("back_offs", "budgets"), [(0, 30), (30, 0), (9, 9), (1, 30), (30, 1)])
def test_a_screen_is_never_too_full(back_offs: int, budgets: int) -> None:
    """What does not fit is counted, and the last line is the cursor's."""
    board = BudgetBoard("")
    names = [f"{number:02}" for number in range(30)]
    board.take(watched(*(a_back_off(name=name) for name in names[:back_offs])), 0)
    board.take(watched(*(a_budget(name=name) for name in names[:budgets])), 0)
    for height in range(8, 70) if LONG else (*range(8, 18), 30, 31, 32, 69):
        lines = drawn(board, 0, height)
        assert len(lines) < height
        hidden = sum(int(line.split()[2]) for line in lines if line.startswith("… and "))
        shown = sum(line.startswith(("quiet", "errors")) for line in lines)
        assert hidden + shown == back_offs + budgets


def test_a_live_table_is_drawn(coordinator: Coordinator, endpoint: str) -> None:
    """On a terminal it is a table, in colours, and SIGTERM leaves the cursor there."""
    coordinator.connections = [[watched(a_back_off(), a_budget(), end=True)]]
    ours, theirs = pty.openpty()
    environment = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
    watch = subprocess.Popen(
        [*PROGRAM, "--endpoint", endpoint, "budget", "watch"],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm", "COLUMNS": "150", "LINES": "20"},
    )
    os.close(theirs)
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 65536):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_until(lambda: b"crm/accounts" in shown, 20)
    finally:
        watch.send_signal(signal.SIGTERM)
        assert watch.wait(20) == 143
        reader.join(10)
        os.close(ours)
    assert b"BACK-OFF" in shown
    assert re.search(rb"\x1b\[31mspent", shown)
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


# Waiting, and what to do


def test_a_wait_says_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    """Backing off: the coordinator's words, the earliest start if it is known, and whom to ask.

    Fails when another back-off is not told, or an unknown start reads as none.
    """
    status = lease_pb2.WaitStatus(
        reason=lease_pb2.WAIT_REASON_BACKING_OFF,
        place=1,
        queue_length=3,
        earliest_start_in=Duration(seconds=2592),
        message="backing off: the provider blocks it",
        blocking_back_off=NAME,
    )
    with WaitDisplay(FINANCE, "c:1") as display:
        display.waiting(status)
        display.waiting(status)
        status.blocking_back_off = f"{NAME}x"
        status.ClearField("earliest_start_in")
        display.waiting(status)
    told = (
        f"holdoff: waiting for {FINANCE}, position 1 of 3: backing off: the provider blocks it "
        f"(more: holdoff explain {FINANCE})"
    )
    assert capsys.readouterr().err.splitlines() == [f"{told}; earliest start in 43m12s", told]


@pytest.mark.parametrize("about", [FINANCE, APP])
def test_the_remedy_is_to_ask_why(about: str) -> None:
    """Backing off ends with 75 as the other reasons to wait do, and names who knows more."""
    error = errors.BackingOff(f"{about} must wait", reason="BACKING_OFF")
    assert exits.code_of(error) == exits.NOT_GRANTED
    assert f"holdoff explain {about};" in exits.remedy_of(error, "c:1")
    missing = errors.BackOffNotFound(f"there is no {NAME}", reason="BACK_OFF_NOT_FOUND")
    assert f"holdoff backoff list {APP}" in exits.remedy_of(missing, "c:1")
