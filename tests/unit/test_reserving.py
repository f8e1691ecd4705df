"""The client's decisions about budgets: when to ask again, and what to tell of a call."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

from holdoff import errors
from holdoff._core import Reserving, report_patience
from holdoff._guarding import Guarding
from holdoff._timing import SECOND
from holdoff.v1 import budget_pb2, budget_service_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

TOKEN = "apps/a/tokens/t"


def reserving(wait_seconds: float = 0.0) -> Reserving:
    """Give a wish for room that began at 0."""
    return Reserving(budget_service_pb2.ReserveRequest(), wait_seconds, 0)


def spent(retry_after_seconds: float) -> errors.BudgetSpent:
    """Give the answer that there is no room."""
    return errors.BudgetSpent("no room", retry_after_seconds=retry_after_seconds)


def test_a_lost_answer_is_asked_for_with_the_same_id() -> None:
    """An outage changes nothing about the request, and ends after some seconds without a wait."""
    one = reserving()
    reservation_id = one.request.reservation_id
    assert uuid.UUID(reservation_id).version == 4
    assert 0 < one.failed(errors.Unavailable("x"), SECOND) <= 1
    assert one.request.reservation_id == reservation_id
    with pytest.raises(errors.Unavailable):
        one.failed(errors.Unavailable("x"), 4 * SECOND)
    assert reserving(10).failed(errors.Unavailable("x"), 9 * SECOND) <= 1


def test_a_reservation_that_ran_out_is_no_room() -> None:
    """Where the first answer was lost for longer than the TTL, another reservation is made.

    Fails when any answer is taken for room: the call would go above the limit.
    """
    one = reserving()
    first = one.request.reservation_id
    expired = budget_pb2.Reservation(state=budget_pb2.RESERVATION_STATE_EXPIRED)
    with pytest.raises(errors.Unavailable):
        one.received(expired)
    assert one.request.reservation_id != first
    good = budget_pb2.Reservation(state=budget_pb2.RESERVATION_STATE_RESERVED)
    assert one.received(good) is good


def test_who_waits_for_room_looks_now_and_then() -> None:
    """Room comes back sooner than is said where a call ends well; never after the wait.

    Fails when a waiter sleeps until the window is over.
    """
    one = reserving(100)
    pauses = [one.failed(spent(3600), SECOND) for _ in range(20)]
    assert pauses[0] <= 0.5
    assert 2.5 <= pauses[-1] <= 5
    assert one.failed(spent(0.3), SECOND) == 0.3
    assert one.failed(spent(3600), round(99.9 * SECOND)) == pytest.approx(0.1)
    for late in (one, reserving()):
        with pytest.raises(errors.BudgetSpent):
            late.failed(spent(1), 100 * SECOND)


def test_other_errors_are_final() -> None:
    """What is wrong is not asked again."""
    with pytest.raises(errors.TooManyEvents):
        reserving(60).failed(errors.TooManyEvents("x", retry_after_seconds=60), 0)


def test_what_is_refused_took_no_room() -> None:
    """Only after an outage or an interruption there may be room to give back."""
    assert Reserving.may_stand(errors.Unavailable("x"))
    assert Reserving.may_stand(KeyboardInterrupt())
    assert not Reserving.may_stand(spent(1))


def test_reports_are_tried_for_some_seconds() -> None:
    """An outage of five seconds loses no report; a refusal is final at once."""
    patience = report_patience(0)
    assert patience.failed(errors.Unavailable("x"), 4 * SECOND) > 0
    with pytest.raises(errors.Unavailable):
        patience.failed(errors.Unavailable("x"), 5 * SECOND)
    with pytest.raises(errors.ReservationNotFound):
        patience.failed(errors.ReservationNotFound("x"), 0)


@pytest.mark.parametrize(
    ("told", "error", "status"),
    [
        (None, None, 200),
        (404, None, 404),
        (404, OSError(), 404),
        (0, None, 0),
    ],
)
def test_what_the_body_said_is_committed(
    told: int | None, error: Exception | None, status: int
) -> None:
    """The status that was told; else 200 for a body that ended."""
    guard = entered()
    guard.status = told
    assert settled(guard, error) == budget_service_pb2.CommitRequest(
        reservation_id="r", app="apps/a", status=status, age=Duration()
    )


def test_what_nobody_knows_is_left_to_run_out() -> None:
    """Fails when a call that raised is stamped with now: it may arrive later."""
    assert entered()._settlement(TimeoutError()) is None


def settled(guard: Guarding, error: Exception | None) -> Message:
    """Return what the coordinator is told."""
    call = guard._settlement(error)
    assert call is not None
    return call.request


def test_a_call_that_was_not_made_is_cancelled() -> None:
    """Whatever else was said; the next use begins anew."""
    guard = entered()
    guard.status = 200
    guard.cancel()
    assert settled(guard, OSError()) == budget_service_pb2.CancelRequest(
        reservation_id="r", app="apps/a"
    )
    with guard._entering():
        guard.reservation = budget_pb2.Reservation(id="s")
    assert guard.status is None
    request = settled(guard, None)
    assert isinstance(request, budget_service_pb2.CommitRequest)
    assert request.status == 200


def test_a_guard_is_for_one_call_at_a_time() -> None:
    """Entered twice it says so, and one that found no room can be entered again."""
    guard = entered()
    with pytest.raises(RuntimeError, match="in use"), guard._entering():
        pass
    guard._settlement(None)
    with pytest.raises(errors.BudgetSpent), guard._entering():
        raise spent(1)
    with guard._entering():
        pass


def entered() -> Guarding:
    """Give a guard that has room."""
    guard = Guarding(TOKEN)
    with guard._entering():
        guard.reservation = budget_pb2.Reservation(id="r")
    return guard
