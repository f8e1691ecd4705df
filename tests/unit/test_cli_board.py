"""What `holdoff watch` makes of the messages that it gets, without a terminal or a coordinator."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from holdoff.cli._board import MOST_CHANGES, Board
from holdoff.cli.watch import documents
from holdoff.v1 import lease_pb2, lease_service_pb2

SECOND = 1_000_000_000
FINANCE = "apps/exact-nl/tokens/finance"
STORE_SECONDS = 1_800_000_000
"""What the store's clock says; that of these tests is at 1000 s, and both run at one speed."""
NOW = 1000 * SECOND


def lease(state: lease_pb2.LeaseState.ValueType, **changes: Any) -> lease_pb2.Lease:
    """A lease that was accepted 130 s ago and has 110 s left."""
    fields: dict[str, Any] = {
        "name": f"{FINANCE}/leases/1",
        "state": state,
        "holder": lease_pb2.Holder(host="web1", job="nightly"),
        "accept_time": Timestamp(seconds=STORE_SECONDS - 130),
        "expire_time": Timestamp(seconds=STORE_SECONDS + 110),
        "remaining": Duration(seconds=110),
    }
    return lease_pb2.Lease(**(fields | changes))


HELD = lease_pb2.TokenStatus(
    token=FINANCE,
    wait_reason=lease_pb2.WAIT_REASON_HELD,
    lease=lease(lease_pb2.LEASE_STATE_ACTIVE),
    queue_length=2,
)
COOLING = lease_pb2.TokenStatus(
    token=FINANCE,
    wait_reason=lease_pb2.WAIT_REASON_COOLING,
    cooldown=Duration(seconds=568),
    not_before_time=Timestamp(seconds=STORE_SECONDS + 568),
)


def free(token: str) -> lease_pb2.TokenStatus:
    """A token that nobody wants."""
    return lease_pb2.TokenStatus(token=token)


def snapshot(
    *tokens: lease_pb2.TokenStatus, first: bool = True, last: bool = True
) -> lease_service_pb2.WatchLeasesResponse:
    """A part of a snapshot."""
    part = lease_pb2.Snapshot(app="apps/exact-nl", tokens=tokens, first=first, last=last)
    return lease_service_pb2.WatchLeasesResponse(
        snapshot=part, resume_token="exact-nl:e:7" if last else ""
    )


def change(
    kind: lease_pb2.ChangeKind.ValueType, status: lease_pb2.TokenStatus, at: int = STORE_SECONDS
) -> lease_service_pb2.WatchLeasesResponse:
    """A change."""
    return lease_service_pb2.WatchLeasesResponse(
        change=lease_pb2.Change(kind=kind, time=Timestamp(seconds=at), status=status),
        resume_token="exact-nl:e:8",
    )


def rows(board: Board, now_ns: int = NOW, height: int = 50) -> list[tuple[str, ...]]:
    """What the table shows."""
    return [
        (row.token.removeprefix("apps/"), row.state, row.holder, row.held, row.left, row.waiters)
        for row in board.view(height, now_ns).rows
    ]


def test_times_run_on_by_the_clock_of_the_store() -> None:
    """A lease's age goes up and a cooldown goes down, however wrong the clock here is."""
    board = Board()
    board.take(snapshot(HELD), NOW)
    assert rows(board) == [
        ("exact-nl/tokens/finance", "held", "nightly on web1", "2m10s", "-", "2")
    ]
    board.take(change(lease_pb2.CHANGE_KIND_RELEASED, COOLING), NOW)
    assert rows(board) == [("exact-nl/tokens/finance", "cooling", "-", "-", "9m28s", "-")]
    assert rows(board, NOW + 500 * SECOND)[0][4] == "1m8s"
    assert rows(board, NOW + 600 * SECOND)[0][4] == "0s"


def test_a_change_that_comes_late_is_not_taken_for_new() -> None:
    """After a resume, what happened a minute ago is a minute old.

    Fails when times count from the arrival of a message.
    """
    board = Board()
    board.take(snapshot(HELD), NOW)
    board.take(change(lease_pb2.CHANGE_KIND_RELEASED, COOLING), NOW + 60 * SECOND)
    assert rows(board, NOW + 60 * SECOND)[0][4] == "8m28s"


def test_a_snapshot_may_come_from_another_store() -> None:
    """A snapshot sets the clock anew: after a failover it may be another one."""
    board = Board()
    board.take(snapshot(HELD), NOW)
    board.take(snapshot(COOLING), NOW + 60 * SECOND)
    assert rows(board, NOW + 60 * SECOND)[0][4] == "9m28s"


def test_a_snapshot_replaces_what_was_known_of_its_app() -> None:
    """All parts of a snapshot count, the first forgets, and other apps stay as they are."""
    board = Board()
    board.take(change(lease_pb2.CHANGE_KIND_TOKEN_CREATED, free("apps/other/tokens/t")), NOW)
    board.take(snapshot(free("apps/exact-nl/tokens/a")), NOW)
    board.take(snapshot(free("apps/exact-nl/tokens/b"), last=False), NOW)
    board.take(snapshot(free("apps/exact-nl/tokens/c"), first=False), NOW)
    assert [row[0] for row in rows(board)] == [
        *("exact-nl/tokens/b", "exact-nl/tokens/c", "other/tokens/t")
    ]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            lease_pb2.TokenStatus(
                token=FINANCE,
                wait_reason=lease_pb2.WAIT_REASON_HELD,
                lease=lease(lease_pb2.LEASE_STATE_BREAKING),
            ),
            ("breaking", "nightly on web1", "2m10s", "1m50s", "-"),
        ),
        (
            lease_pb2.TokenStatus(
                token=FINANCE,
                wait_reason=lease_pb2.WAIT_REASON_HELD,
                lease=lease(lease_pb2.LEASE_STATE_OFFERED, accept_time=None),
            ),
            ("offered", "nightly on web1", "-", "-", "-"),
        ),
        (
            lease_pb2.TokenStatus(token=FINANCE, wait_reason=lease_pb2.WAIT_REASON_HELD),
            ("held", "a user of python-redis-lock", "-", "-", "-"),
        ),
        (
            lease_pb2.TokenStatus(
                token=FINANCE,
                wait_reason=lease_pb2.WAIT_REASON_QUARANTINED,
                lease=lease(lease_pb2.LEASE_STATE_ACTIVE),
            ),
            ("quarantined", "nightly on web1", "2m10s", "-", "-"),
        ),
        (
            lease_pb2.TokenStatus(token=FINANCE, wait_reason=99),  # type: ignore[arg-type] # newer
            ("unknown (99)", "-", "-", "-", "-"),
        ),
    ],
)
def test_states_say_who_and_how_long(
    status: lease_pb2.TokenStatus, expected: tuple[str, ...]
) -> None:
    """A row tells what stands in the way, and counts down only what nobody can prolong."""
    board = Board()
    board.take(snapshot(status), NOW)
    (row,) = rows(board)
    assert row[1:] == expected


def test_tokens_in_use_come_first_where_not_all_fit() -> None:
    """On a low screen idle tokens are cut, and counted."""
    board = Board()
    idle = [free(f"apps/exact-nl/tokens/a-{number}") for number in range(20)]
    board.take(snapshot(*idle, HELD), NOW)
    view = board.view(10, NOW)
    assert view.rows[0].token == FINANCE
    # A heading, the rows, "... and N more", and the line of the cursor.
    assert len(view.rows) + 3 == 10
    assert view.more == 21 - len(view.rows)


@pytest.mark.parametrize("height", range(1, 40))
def test_a_view_fits_its_height(height: int) -> None:
    """Whatever the height of the terminal, all fits, but for one row that always stays."""
    board = Board()
    board.take(snapshot(*(free(f"apps/exact-nl/tokens/a-{number}") for number in range(20))), NOW)
    for _ in range(10):
        board.take(change(lease_pb2.CHANGE_KIND_QUEUE_MOVED, HELD), NOW)
    view = board.view(height, NOW)
    lines = 1 + len(view.rows) + bool(view.more) + 1
    lines += 1 + len(view.changes) if view.changes else 0
    assert len(view.rows) + view.more == 21
    assert lines <= max(height, 4)
    assert len(view.changes) <= MOST_CHANGES


def test_the_last_changes_are_told() -> None:
    """The newest change comes first, with its time, and why a lease was broken."""
    board = Board()
    broken = lease_pb2.TokenStatus(
        token=FINANCE, lease=lease(lease_pb2.LEASE_STATE_BROKEN, break_reason="web1 hangs")
    )
    board.take(change(lease_pb2.CHANGE_KIND_QUEUE_MOVED, HELD), NOW)
    board.take(change(lease_pb2.CHANGE_KIND_BROKEN, broken, STORE_SECONDS + 1), NOW)
    local = datetime.fromtimestamp(STORE_SECONDS + 1, UTC).astimezone()
    assert list(board.view(50, NOW).changes) == [
        (f"{local:%H:%M:%S}", "broken", FINANCE, "nightly on web1: web1 hangs"),
        (f"{local.replace(second=local.second - 1):%H:%M:%S}", "queue moved", FINANCE, "2 waiting"),
    ]


def test_documents_are_one_a_token() -> None:
    """A snapshot is a line for each token and one that ends it, from where a watch can go on."""
    now = datetime(2026, 11, 24, 3, 10, tzinfo=UTC)
    part, end = snapshot(HELD, last=False), snapshot(COOLING, first=False)
    lines = [*documents(part, now), *documents(end, now)]
    assert [line["kind"] for line in lines] == ["snapshot", "snapshot", "snapshot_end"]
    assert lines[0]["lease"]["holder"]["job"] == "nightly"
    assert lines[1]["cooldown"] == "568s"
    assert [line.get("resume_token") for line in lines] == [None, None, "exact-nl:e:7"]
    assert {line["time"] for line in lines} == {"2026-11-24T03:10:00.000000Z"}


def test_a_change_is_a_document() -> None:
    """A change has its kind in lower case, the store's time, the status and a place to go on."""
    (line,) = documents(change(lease_pb2.CHANGE_KIND_RENEWED_LATE, HELD), datetime.now(UTC))
    assert line["kind"] == "renewed_late"
    assert line["time"] == "2027-01-15T08:00:00Z"
    assert line["token"] == FINANCE
    assert line["queue_length"] == 2
    assert line["resume_token"] == "exact-nl:e:8"


def test_messages_of_the_future_are_borne() -> None:
    """A kind of change, or of message, that a newer coordinator sends does no harm."""
    newer = change(99, HELD)  # type: ignore[arg-type] # that is the point
    (line,) = documents(newer, datetime.now(UTC))
    assert line["kind"] == "unknown_99"
    board = Board()
    board.take(newer, NOW)
    board.take(lease_service_pb2.WatchLeasesResponse(), NOW)
    assert board.view(50, NOW).changes[0][1] == "unknown (99)"
    assert list(documents(lease_service_pb2.WatchLeasesResponse(), datetime.now(UTC))) == []


def test_an_app_without_any_instant_changes_no_time() -> None:
    """Its snapshot says nothing of the store's clock; that of the others is still known.

    Fails when the times of all tokens become days.
    """
    other = snapshot(free("apps/other/tokens/never"))
    other.snapshot.app = "apps/other"
    board = Board()
    board.take(snapshot(COOLING), NOW)
    board.take(other, NOW)
    assert {row[0]: row[4] for row in rows(board)} == {
        "exact-nl/tokens/finance": "9m28s",
        "other/tokens/never": "-",
    }
