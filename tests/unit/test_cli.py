"""The command line's own share: arguments in, what is printed and the exit code out.

The coordinator is a small one made for these tests, behind a real gRPC server.
"""

# ruff: noqa: D102, N802 - the methods of a servicer are named and described by the service

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from holdoff import errors
from holdoff.cli import exits, main
from holdoff.cli.params import parse_moment
from holdoff.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    lease_pb2,
    lease_service_pb2,
    lease_service_pb2_grpc,
    token_pb2,
    token_service_pb2,
    token_service_pb2_grpc,
)

FINANCE = "apps/exact-nl/tokens/finance"
LONG = f"apps/{'a' * 63}/tokens/{'t' * 63}"
PROGRAM = [sys.executable, "-c", "from holdoff.cli import main; main(prog_name='holdoff')"]
NOON_SECONDS = 1_800_000_000


@dataclass
class Coordinator(
    token_service_pb2_grpc.TokenServiceServicer,
    lease_service_pb2_grpc.LeaseServiceServicer,
    admin_service_pb2_grpc.AdminServiceServicer,
):
    """Answers with what it was given, or with an error, and remembers the requests."""

    tokens: list[token_pb2.Token] = field(default_factory=list)
    leases: list[lease_pb2.Lease] = field(default_factory=list)
    waiters: list[lease_pb2.Waiter] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    failure: status_pb2.Status | None = None

    def _heard(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failure:
            context.abort_with_status(rpc_status.to_status(self.failure))

    def CreateToken(
        self, request: token_service_pb2.CreateTokenRequest, context: grpc.ServicerContext
    ) -> token_service_pb2.CreateTokenResponse:
        self._heard(request, context)
        return token_service_pb2.CreateTokenResponse(token=request.token)

    def UpdateToken(
        self, request: token_service_pb2.UpdateTokenRequest, context: grpc.ServicerContext
    ) -> token_service_pb2.UpdateTokenResponse:
        self._heard(request, context)
        return token_service_pb2.UpdateTokenResponse(token=request.token)

    def GetToken(
        self, request: token_service_pb2.GetTokenRequest, context: grpc.ServicerContext
    ) -> token_service_pb2.GetTokenResponse:
        self._heard(request, context)
        token = next(token for token in self.tokens if token.name == request.name)
        return token_service_pb2.GetTokenResponse(token=token)

    def ListTokens(
        self, request: token_service_pb2.ListTokensRequest, context: grpc.ServicerContext
    ) -> token_service_pb2.ListTokensResponse:
        self._heard(request, context)
        tokens = [token for token in self.tokens if token.name.startswith(request.parent)]
        return token_service_pb2.ListTokensResponse(tokens=tokens)

    def GetLease(
        self, request: lease_service_pb2.GetLeaseRequest, context: grpc.ServicerContext
    ) -> lease_service_pb2.GetLeaseResponse:
        self._heard(request, context)
        lease = next(lease for lease in self.leases if lease.name == request.name)
        return lease_service_pb2.GetLeaseResponse(lease=lease)

    def ListLeases(
        self, request: lease_service_pb2.ListLeasesRequest, context: grpc.ServicerContext
    ) -> lease_service_pb2.ListLeasesResponse:
        self._heard(request, context)
        leases = [lease for lease in self.leases if lease.name.startswith(request.parent)]
        return lease_service_pb2.ListLeasesResponse(leases=leases)

    def ListWaiters(
        self, request: lease_service_pb2.ListWaitersRequest, context: grpc.ServicerContext
    ) -> lease_service_pb2.ListWaitersResponse:
        self._heard(request, context)
        return lease_service_pb2.ListWaitersResponse(waiters=self.waiters)

    def ListLeaseHistory(
        self, request: lease_service_pb2.ListLeaseHistoryRequest, context: grpc.ServicerContext
    ) -> lease_service_pb2.ListLeaseHistoryResponse:
        self._heard(request, context)
        at_ns = request.at_time.ToNanoseconds()
        leases = [
            lease
            for lease in self.leases
            if not at_ns or lease.accept_time.ToNanoseconds() <= at_ns
        ]
        return lease_service_pb2.ListLeaseHistoryResponse(leases=leases)

    def BreakLease(
        self, request: admin_service_pb2.BreakLeaseRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.BreakLeaseResponse:
        self._heard(request, context)
        lease = lease_pb2.Lease()
        lease.CopyFrom(next(lease for lease in self.leases if lease.name == request.name))
        lease.state, lease.break_reason = lease_pb2.LEASE_STATE_BREAKING, request.reason
        return admin_service_pb2.BreakLeaseResponse(lease=lease)


@pytest.fixture
def coordinator() -> Coordinator:
    """A coordinator that knows nothing yet."""
    return Coordinator()  # type: ignore[abstract] # `holdoff run` has tests of its own


@pytest.fixture
def endpoint(coordinator: Coordinator) -> Iterator[str]:
    """Where it listens."""
    server = grpc.server(ThreadPoolExecutor(4))
    token_service_pb2_grpc.add_TokenServiceServicer_to_server(coordinator, server)
    lease_service_pb2_grpc.add_LeaseServiceServicer_to_server(coordinator, server)
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
        # None takes a variable out of the environment.
        variables: dict[str, str | None] = {"HOLDOFF_OUTPUT": None, "TZ": "UTC", **env}
        variables.setdefault("HOLDOFF_ENDPOINT", endpoint)
        return CliRunner(env=variables).invoke(main, args, prog_name="holdoff")

    return run


def a_lease(**changes: Any) -> lease_pb2.Lease:
    """A lease that was accepted 130 s ago and has 110 s left, by a store whose clock is odd."""
    fields: dict[str, Any] = {
        "name": f"{FINANCE}/leases/l-1",
        "state": lease_pb2.LEASE_STATE_ACTIVE,
        "mode": lease_pb2.LEASE_MODE_EXCLUSIVE,
        "holder": lease_pb2.Holder(host="host-a", pid=42, user="etl", job="nightly"),
        "fencing_token": 2**53 + 1,
        "ttl": Duration(seconds=120),
        "accept_time": Timestamp(seconds=NOON_SECONDS - 130),
        "expire_time": Timestamp(seconds=NOON_SECONDS + 110),
        "remaining": Duration(seconds=110),
    }
    return lease_pb2.Lease(**(fields | changes))


def a_token(**changes: Any) -> token_pb2.Token:
    """A token that is cooling."""
    fields: dict[str, Any] = {
        "name": FINANCE,
        "policy": "exact-online",
        "rules": token_pb2.TokenRules(
            refresh_interval=Duration(seconds=572),
            refresh_at=token_pb2.REFRESH_AT_END,
            access_token_life=Duration(seconds=600),
        ),
        "lock_name": "{exact-nl}:finance",
        "wait_reason": lease_pb2.WAIT_REASON_COOLING,
        "cooldown": Duration(seconds=568),
        "not_before_time": Timestamp(seconds=NOON_SECONDS + 568),
        "queue_length": 3,
    }
    return token_pb2.Token(**(fields | changes))


def failure(code: int, reason: str, message: str) -> status_pb2.Status:
    """An error as the coordinator sends it."""
    detail = any_pb2.Any()
    if reason:
        detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="holdoff"))
    return status_pb2.Status(code=code, message=message, details=[detail] if reason else [])


# What is asked of the coordinator


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], token_service_pb2.CreateTokenRequest(token=token_pb2.Token(name=FINANCE))),
        (
            ["--policy", "mine", "--refresh-interval", "9.5m", "--refresh-at", "start"],
            token_service_pb2.CreateTokenRequest(
                token=token_pb2.Token(
                    name=FINANCE,
                    policy="mine",
                    refresh_interval=Duration(seconds=570),
                    refresh_at=token_pb2.REFRESH_AT_START,
                )
            ),
        ),
        (
            ["--refresh-interval", "570ms", "--last-refreshed", "unknown"],
            token_service_pb2.CreateTokenRequest(
                token=token_pb2.Token(name=FINANCE, refresh_interval=Duration(nanos=570_000_000)),
                last_refresh_unknown=True,
            ),
        ),
        (
            ["--last-refreshed", "5m"],
            token_service_pb2.CreateTokenRequest(
                token=token_pb2.Token(name=FINANCE), last_refresh_age=Duration(seconds=300)
            ),
        ),
    ],
)
def test_token_create_asks_for_what_was_typed(
    holdoff: Holdoff, coordinator: Coordinator, options: list[str], expected: Message
) -> None:
    """The options of `token create` arrive in the request, durations exactly."""
    result = holdoff("token", "create", FINANCE, *options)
    assert result.exit_code == 0, result.output
    assert coordinator.requests == [expected]


def test_token_update_changes_only_what_was_typed(
    holdoff: Holdoff, coordinator: Coordinator
) -> None:
    """Settings that were not typed stay out of the update mask."""
    assert holdoff("token", "update", FINANCE, "--refresh-interval", "0.5").exit_code == 0
    (request,) = coordinator.requests
    assert request.update_mask.paths == ["refresh_interval"]
    assert request.token.refresh_interval == Duration(nanos=500_000_000)


def test_lists_take_a_parent(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Lists of an app or a token ask for just that, and without one for everything."""
    for args in (["token", "list", "apps/a"], ["lease", "list", FINANCE], ["lease", "list"]):
        assert holdoff(*args).exit_code == 0
    assert [request.parent for request in coordinator.requests] == ["apps/a", FINANCE, ""]


def test_lease_break_gives_the_reason(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Without a terminal a lease is broken unasked, and its new state is printed."""
    coordinator.leases = [a_lease()]
    result = holdoff("lease", "break", f"{FINANCE}/leases/l-1", "--reason", "host-a hangs")
    assert result.exit_code == 0
    assert [request.reason for request in coordinator.requests] == ["host-a hangs"]
    assert "breaking" in result.stdout
    assert "host-a hangs" in result.stdout


@pytest.mark.parametrize(
    ("answer", "code", "broken"), [("y\n", 0, True), ("n\n", exits.DECLINED, False)]
)
def test_lease_break_asks_on_a_terminal(
    coordinator: Coordinator, endpoint: str, answer: str, code: int, broken: bool
) -> None:
    """On a terminal a lease is broken after a yes only, and stdout stays one JSON document."""
    coordinator.leases = [a_lease()]
    ours, theirs = pty.openpty()
    command = ["lease", "break", f"{FINANCE}/leases/l-1", "--reason", "x", "--output", "json"]
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
    assert "held by nightly on host-a" in result.stderr
    assert ("not broken" in result.stderr) is not broken
    broke = [r for r in coordinator.requests if isinstance(r, admin_service_pb2.BreakLeaseRequest)]
    assert bool(broke) is broken
    assert json.loads(result.stdout) if broken else result.stdout == ""


def test_token_update_gives_settings_back_to_the_policy(
    holdoff: Holdoff, coordinator: Coordinator
) -> None:
    """`policy` names the setting in the mask and leaves it out of the token."""
    options = ["--refresh-interval", "policy", "--refresh-at", "policy"]
    result = holdoff("token", "update", FINANCE, *options)
    assert result.exit_code == 0, result.output
    (request,) = coordinator.requests
    assert request.update_mask.paths == ["refresh_interval", "refresh_at"]
    assert request.token == token_pb2.Token(name=FINANCE)


# What is printed


def test_json_of_one_is_the_resource(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """`show --output json` prints the resource in snake_case, with its defaults."""
    coordinator.tokens, coordinator.leases = [a_token()], [a_lease()]
    token = json.loads(holdoff("token", "show", FINANCE, "--output", "json").stdout)
    assert token["name"] == FINANCE
    assert token["cooldown"] == "568s"
    assert token["wait_reason"] == "WAIT_REASON_COOLING"
    assert token["rules"]["refresh_interval"] == "572s"
    assert token["lease"] == ""
    assert "last_refresh_time" not in token
    lease = json.loads(holdoff("lease", "show", f"{FINANCE}/leases/l-1", "-o", "json").stdout)
    assert lease["fencing_token"] == str(2**53 + 1)
    assert lease["holder"]["host"] == "host-a"


@pytest.mark.parametrize("kind", ["token", "lease"])
def test_json_of_a_list_is_one_document(
    holdoff: Holdoff, coordinator: Coordinator, kind: str
) -> None:
    """`list --output json` prints one object, also of nothing, and nothing else."""
    result = holdoff(kind, "list", HOLDOFF_OUTPUT="json")
    assert json.loads(result.stdout) == {f"{kind}s": []}
    assert result.stderr == ""
    coordinator.tokens, coordinator.leases = [a_token()], [a_lease()]
    (found,) = json.loads(holdoff(kind, "list", HOLDOFF_OUTPUT="json").stdout)[f"{kind}s"]
    assert found["name"].startswith(FINANCE)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["token", "list"], "no tokens\n"),
        (["lease", "list", "apps/a"], "no live leases of apps/a\n"),
    ],
)
def test_an_empty_table_is_a_line_on_stderr(holdoff: Holdoff, args: list[str], line: str) -> None:
    """Where there is nothing to list a person is told so, and a pipe gets nothing."""
    result = holdoff(*args)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", line)


def test_token_list_reads_well(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A table says what each token waits for, for how long, who holds it and how many wait.

    In 80 columns and without escape sequences.
    """
    held = f"{FINANCE}-2"
    coordinator.tokens = [
        a_token(),
        a_token(
            name=held,
            wait_reason=lease_pb2.WAIT_REASON_HELD,
            lease=f"{held}/leases/l-2",
            cooldown=None,
        ),
        a_token(name=f"{FINANCE}-3", wait_reason=0, cooldown=None, queue_length=0),
    ]
    coordinator.leases = [a_lease(name=f"{held}/leases/l-2")]
    lines = holdoff("token", "list").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["TOKEN", "STATE", "COOLDOWN", "HOLDER", "WAITERS"],
        [FINANCE, "cooling", "9m28s", "-", "3"],
        [held, "held", "-", "nightly", "on", "host-a", "3"],
        [f"{FINANCE}-3", "free", "-", "-", "0"],
    ]
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)


def test_lease_list_counts_by_the_clock_of_the_store(
    holdoff: Holdoff, coordinator: Coordinator
) -> None:
    """How long a lease has been held does not depend on the clock of this machine.

    Fails when it is computed from `time.time()`: the store's clock of this test is years off.
    """
    coordinator.leases = [a_lease()]
    heading, row = holdoff("lease", "list").stdout.splitlines()
    assert heading.split() == ["LEASE", "STATE", "HELD", "LEFT", "HOLDER"]
    assert row.split() == [
        *(f"{FINANCE}/leases/l-1", "active", "2m10s", "1m50s"),
        *("nightly", "on", "host-a"),
    ]


def test_show_tells_people_everything(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """`show` has a line for every field with a value, the lock's name included."""
    coordinator.tokens = [a_token(lease=f"{FINANCE}/leases/l-1")]
    coordinator.leases = [a_lease()]
    token = holdoff("token", "show", FINANCE).stdout
    for words in (
        "9m28s",
        "{exact-nl}:finance",
        "9m32s",
        "nightly on host-a",
        "2027-01-15 08:09:28",
    ):
        assert words in token
    assert "last refresh" not in token
    lease = holdoff("lease", "show", f"{FINANCE}/leases/l-1").stdout
    for words in ("nightly on host-a (etl, pid 42)", "1m50s", str(2**53 + 1), "active"):
        assert words in lease


def test_show_tells_labels(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Labels of a holder stand with its lease, and with the token that it holds."""
    holder = lease_pb2.Holder(host="host-a", job="nightly", labels={"run": "4711", "env": "prod"})
    coordinator.leases = [a_lease(holder=holder)]
    coordinator.tokens = [a_token(lease=f"{FINANCE}/leases/l-1")]
    assert "env=prod, run=4711" in holdoff("lease", "show", f"{FINANCE}/leases/l-1").stdout
    assert "env=prod, run=4711" in holdoff("token", "show", FINANCE).stdout


def test_queue_tells_who_waits(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A line for each waiter, in order; one that was not heard for more than 5 s is silent."""
    holder = lease_pb2.Holder(host="web1", job="sales", pid=42, labels={"run": "7"})
    coordinator.waiters = [
        lease_pb2.Waiter(
            place=1,
            holder=holder,
            waited=Duration(seconds=130),
            heard_age=Duration(nanos=500_000_000),
            offered=True,
        ),
        lease_pb2.Waiter(place=2, waited=Duration(seconds=60), heard_age=Duration(seconds=9)),
        lease_pb2.Waiter(place=3, waited=Duration(seconds=1), heard_age=Duration(seconds=1)),
    ]
    rows = [line.split() for line in holdoff("token", "queue", FINANCE).stdout.splitlines()]
    assert rows[0] == ["POSITION", "HOLDER", "PID", "STATE", "WAITED", "HEARD", "LABELS"]
    assert rows[1] == ["1", "sales", "on", "web1", "42", "offered", "2m10s", "0.5s", "ago", "run=7"]
    assert [row[-5:] for row in rows[2:]] == [
        ["silent", "1m", "9s", "ago", "-"],
        ["waiting", "1s", "1s", "ago", "-"],
    ]
    document = json.loads(holdoff("token", "queue", FINANCE, "-o", "json").stdout)
    assert [waiter["place"] for waiter in document["waiters"]] == [1, 2, 3]
    coordinator.waiters = []
    assert holdoff("token", "queue", FINANCE).stderr == f"no waiters for {FINANCE}\n"


def test_history_tells_who_ran(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A line for each lease: from, to, for how long, who, how it ended; the date once a line."""
    times = {
        "accept_time": Timestamp(seconds=NOON_SECONDS),
        "end_time": Timestamp(seconds=NOON_SECONDS + 90),
    }
    coordinator.leases = [
        a_lease(),
        a_lease(
            **times, state=lease_pb2.LEASE_STATE_BROKEN, break_reason="it hangs", remaining=None
        ),
        a_lease(
            accept_time=Timestamp(seconds=NOON_SECONDS - 86_400),
            end_time=Timestamp(seconds=NOON_SECONDS + 60),
            state=lease_pb2.LEASE_STATE_EXPIRED,
        ),
    ]
    heading, *rows = holdoff("token", "history", FINANCE).stdout.splitlines()
    assert heading.split() == ["FROM", "TO", "HELD", "HOLDER", "ENDED", "LEASE"]
    fields = [[one for one in row.split("  ") if one] for row in rows]
    assert [[one.strip() for one in row] for row in fields] == [
        ["2027-01-15 07:57:50", "-", "2m10s", "nightly on host-a", "still held", "l-1"],
        [
            *("2027-01-15 08:00:00", "08:01:30", "1m30s", "nightly on host-a"),
            *("broken: it hangs", "l-1"),
        ],
        [
            *("2027-01-14 08:00:00", "2027-01-15 08:01:00", "1d1m", "nightly on host-a"),
            *("expired", "l-1"),
        ],
    ]
    document = json.loads(holdoff("token", "history", FINANCE, "-o", "json").stdout)
    assert len(document["leases"]) == 3


def test_history_asks_for_a_time(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """`--at` is asked of the coordinator; where it knows of nobody it says how far it remembers."""
    coordinator.leases = [a_lease()]
    result = holdoff("token", "history", FINANCE, "--at", "2020-01-01T03:10+01:00")
    assert coordinator.requests[0].at_time.ToJsonString() == "2020-01-01T02:10:00Z"
    assert result.stdout == ""
    assert "no lease of" in result.stderr
    assert "goes back to 2027-01-15 07:57:50" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("03:10", "2026-11-25T03:10:00"),
        ("03:20:30", "2026-11-24T03:20:30"),
        ("3:15", "2026-11-25T03:15:00"),
        ("2026-11-24T03:10", "2026-11-24T03:10:00"),
        ("2026-11-24 03:10:05", "2026-11-24T03:10:05"),
        ("2026-11-24T03:10Z", "2026-11-24T04:10:00"),
        ("2026-11-24T03:10-05:00", "2026-11-24T09:10:00"),
        ("2h ago", "2026-11-25T01:15:00"),
        ("90s", "2026-11-25T03:13:30"),
    ],
)
def test_times_are_read_as_people_write_them(amsterdam: None, text: str, expected: str) -> None:
    """A time of day is the latest such time, a date is a local one, a duration counts back."""
    del amsterdam
    now = datetime.fromisoformat("2026-11-25T03:15:00+01:00")
    local = parse_moment(text, now).astimezone()
    assert local.replace(tzinfo=None).isoformat() == expected


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        # 02:30 came twice that night: at +02:00, and an hour later at +01:00.
        ("2026-10-25T12:00:00+01:00", "2026-10-25T02:30:00+01:00"),
        ("2026-10-25T02:40:00+02:00", "2026-10-25T02:30:00+02:00"),
    ],
)
def test_a_time_that_comes_twice_is_the_later(amsterdam: None, now: str, expected: str) -> None:
    """In the night when clocks go back, a time of day is the latest that has passed."""
    del amsterdam
    found = parse_moment("02:30", datetime.fromisoformat(now))
    assert found == datetime.fromisoformat(expected)


@pytest.mark.parametrize(
    "text", ["", "yesterday", "24:00", "3:1", "-2h", "2026-13-01", "03:10 ago"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    """What cannot be read is refused, with what to write instead."""
    with pytest.raises(ValueError, match="is not a time: write 03:10"):
        parse_moment(text, datetime.fromisoformat("2026-11-25T03:15:00+01:00"))


@pytest.fixture
def amsterdam(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place with summer time."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Amsterdam")
        time.tzset()
        yield
    time.tzset()


def test_a_state_of_the_future_is_shown(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """A coordinator newer than this client may send states that it does not know."""
    coordinator.leases = [a_lease(state=99)]
    assert "unknown (99)" in holdoff("lease", "list").stdout


def test_names_are_never_cut_in_a_pipe(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """The longest name stands whole in one line.

    Fails when rich takes 80 columns for a pipe, as it does by itself.
    """
    coordinator.tokens = [a_token(name=LONG)]
    coordinator.leases = [a_lease(name=f"{LONG}/leases/l-1")]
    assert f"{LONG}  cooling" in holdoff("token", "list").stdout
    assert f"{LONG}/leases/l-1  active" in holdoff("lease", "list", COLUMNS="80").stdout


def test_what_holders_say_cannot_reach_the_terminal(
    holdoff: Holdoff, coordinator: Coordinator
) -> None:
    """A holder's name with escape sequences or markup is shown, not obeyed.

    Fails when cells are printed as they come: rich drops some control characters, ESC not.
    """
    hostile = "\x1b[2J\x9b31m[red]\u202e\nevil"
    coordinator.leases = [a_lease(holder=lease_pb2.Holder(host="h", job=hostile))]
    table = holdoff("lease", "list").stdout
    assert r"\x1b[2J\x9b31m[red]\u202e\nevil on h" in table
    assert len(table.splitlines()) == 2
    document = holdoff("lease", "list", "-o", "json").stdout
    assert document.isascii()
    assert "\x1b" not in document
    assert json.loads(document)["leases"][0]["holder"]["job"] == hostile


# Errors


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", 64),
        (code_pb2.UNAVAILABLE, "STORE_UNAVAILABLE", 69),
        (code_pb2.UNAVAILABLE, "", 69),
        (code_pb2.INTERNAL, "INTERNAL", 70),
        (code_pb2.UNIMPLEMENTED, "", 70),
        (code_pb2.ABORTED, "LEASE_HELD", 75),
        (code_pb2.ABORTED, "TOKEN_COOLING", 75),
        (code_pb2.UNAVAILABLE, "QUARANTINED", 75),
        (code_pb2.RESOURCE_EXHAUSTED, "BUDGET_SPENT", 75),
        (code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_EVENTS", 75),
        (code_pb2.RESOURCE_EXHAUSTED, "LIMIT_REACHED", 75),
        (code_pb2.NOT_FOUND, "BUDGET_NOT_FOUND", 77),
        (code_pb2.PERMISSION_DENIED, "", 77),
        (code_pb2.NOT_FOUND, "TOKEN_NOT_FOUND", 77),
        (code_pb2.NOT_FOUND, "POLICY_NOT_FOUND", 77),
        (code_pb2.ALREADY_EXISTS, "TOKEN_EXISTS", 77),
        (code_pb2.FAILED_PRECONDITION, "LEASE_LOST", 79),
    ],
)
def test_an_error_is_one_line_and_a_code(
    holdoff: Holdoff, coordinator: Coordinator, code: int, reason: str, exit_code: int
) -> None:
    """An error of the coordinator is text on stderr, also with JSON, and has its exit code."""
    coordinator.failure = failure(code, reason, "it is\n\x1b[31mso")
    result = holdoff("token", "show", FINANCE, "--output", "json")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    first, *remedy = result.stderr.splitlines()
    assert first.startswith("holdoff: ")
    assert r"it is \x1b[31mso" in first
    assert len(remedy) <= 1


def test_every_error_has_an_exit_code() -> None:
    """No error of the library ends a command with the code of a bug, but UnexpectedError."""
    for reason, kind in errors.BY_REASON.items():
        code = exits.code_of(kind(""))
        assert (code == exits.INTERNAL) is issubclass(kind, errors.UnexpectedError), reason
    assert exits.code_of(ValueError()) is None


def test_unreachable_names_the_endpoint(holdoff: Holdoff) -> None:
    """Where nobody listens the message says where it looked, and how to look elsewhere."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{unheard.getsockname()[1]}"
        result = holdoff("token", "list", HOLDOFF_ENDPOINT=endpoint)
    assert result.exit_code == 69
    message, remedy = result.stderr.splitlines()
    assert endpoint in message
    assert f"does holdoff-coordinator listen at {endpoint}?" in remedy
    assert "HOLDOFF_ENDPOINT" in remedy


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["tokn"],
        ["--nope"],
        ["token"],
        ["token", "show"],
        ["token", "show", "exact-nl/finance"],
        ["token", "show", FINANCE, "--output", "yaml"],
        ["token", "create", FINANCE, "--refresh-interval", "-5s"],
        ["token", "create", FINANCE, "--last-refreshed", "yesterday"],
        ["token", "update", FINANCE],
        ["token", "list", FINANCE],
        ["token", "history", FINANCE, "--at", "yesterday"],
        ["watch", "exact-nl"],
        ["run", "--token", FINANCE, "--label", "run", "--", "true"],
        ["run", "--token", FINANCE, "--label", "Run=1", "--", "true"],
        ["run", "--token", FINANCE, "--label", "run-=1", "--", "true"],
        ["run", "--token", FINANCE, "--wait", "367d", "--", "true"],
        ["run", "--token", FINANCE, "--label", "a=1", "--label", "a=2", "--", "true"],
        ["run", "--token", FINANCE, *(f"--label=k{n}=1" for n in range(17)), "--", "true"],
        ["lease", "break", f"{FINANCE}/leases/l-1"],
        ["lease", "show", FINANCE],
    ],
)
def test_wrong_usage_is_64(holdoff: Holdoff, coordinator: Coordinator, args: list[str]) -> None:
    """Wrong usage ends with 64 before anything is asked; click's own 2 is an error of Data Hub."""
    result = holdoff(*args)
    assert result.exit_code == 64
    assert result.stdout == ""
    assert result.stderr
    assert coordinator.requests == []


def test_a_bug_is_70(holdoff: Holdoff, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours shows where it is and ends with 70, since 1 would be a warning of Data Hub."""
    monkeypatch.setattr("holdoff.cli.token.Client.list_tokens", lambda *_: 1 / 0)
    result = holdoff("token", "list")
    assert result.exit_code == 70
    assert "ZeroDivisionError" in result.stderr


def test_ctrl_c_is_130(holdoff: Holdoff, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command ends as a shell expects it of SIGINT."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdoff.cli.token.Client.list_tokens", interrupted)
    assert holdoff("token", "list").exit_code == 128 + signal.SIGINT


def test_a_closed_pipe_is_141_and_silent(coordinator: Coordinator, endpoint: str) -> None:
    """A reader that went away ends the command as SIGPIPE would, without a word."""
    coordinator.tokens = [a_token()]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [*PROGRAM, "--endpoint", endpoint, "token", "list"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


# Help and completion


@pytest.mark.parametrize(
    "command", ["run", "watch", "token", "lease", "budget", "policy", "simulator", "completion"]
)
def test_every_command_has_help(holdoff: Holdoff, command: str) -> None:
    """Every command that the group names can be imported, and explains itself."""
    assert command in holdoff("--help").stdout
    result = holdoff(command, "--help")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Usage: holdoff {command} ")


def test_help_imports_little() -> None:
    """`holdoff --help` is quick: it imports none of the libraries that only commands need."""
    look = (
        "import sys; from holdoff.cli import main; main(['--help'], standalone_mode=False); "
        "print({'rich', 'aiohttp', 're2', 'holdoff.cli.run', 'holdoff.cli.token'} "
        "& set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, timeout=30, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_prints_the_script(holdoff: Holdoff, shell: str) -> None:
    """The script of each shell asks both commands; its help says how to install it."""
    script = holdoff("completion", shell).stdout.replace("'", "").replace(" = ", "=")
    assert f"_HOLDOFF_COMPLETE={shell}_complete" in script
    assert f"_HOLDOFF_COORDINATOR_COMPLETE={shell}_complete" in script
    assert f"holdoff completion {shell}" in holdoff("completion", "--help").stdout


def complete(holdoff: Holdoff, *words: str, **env: str) -> list[str]:
    """What bash is offered for the last word."""
    result = holdoff(
        _HOLDOFF_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(["holdoff", *words]),
        COMP_CWORD=str(len(words)),
        **env,
    )
    assert (result.exit_code, result.stderr) == (0, "")
    return [line.removeprefix("plain,") for line in result.stdout.split()]


def test_completion_offers_names(holdoff: Holdoff, coordinator: Coordinator) -> None:
    """Commands and names are completed, and only the app that was typed is asked for."""
    coordinator.tokens = [a_token(), a_token(name="apps/other/tokens/t")]
    coordinator.leases = [a_lease()]
    assert complete(holdoff, "to") == ["token"]
    assert complete(holdoff, "token", "show", "apps/exact-nl/") == [FINANCE]
    assert coordinator.requests[-1].parent == "apps/exact-nl"
    assert complete(holdoff, "token", "list", "a") == ["apps/exact-nl", "apps/other"]
    assert complete(holdoff, "lease", "show", "apps/") == [f"{FINANCE}/leases/l-1"]
    assert complete(holdoff, "run", "--token", "apps/o") == ["apps/other/tokens/t"]


def test_completion_is_silent_without_a_coordinator(holdoff: Holdoff) -> None:
    """Where a connection is refused, or accepted and never answered, nothing is offered, soon."""
    with contextlib.ExitStack() as stack:
        mute, unheard = (stack.enter_context(socket.socket()) for _ in range(2))
        for listener in (mute, unheard):
            listener.bind(("127.0.0.1", 0))
        mute.listen()
        for listener in (mute, unheard):
            began = time.monotonic()
            endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
            assert complete(holdoff, "token", "show", "apps/", HOLDOFF_ENDPOINT=endpoint) == []
            assert time.monotonic() - began < 20
