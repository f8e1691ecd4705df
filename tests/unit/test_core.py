"""The client's decisions: deadlines, retries, renewals. No sockets, no clocks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff import _calls, _core, errors
from holdoff._core import (
    Acquisition,
    BudgetWatching,
    Counted,
    Listening,
    Renewals,
    Watching,
    duration,
)
from holdoff._timing import SECOND, Timing, margin_seconds
from holdoff.v1 import budget_pb2, budget_service_pb2, lease_pb2, lease_service_pb2

ttls = st.floats(1.0, 86_400.0)


@given(ttls)
def test_without_a_grace_there_is_always_room(ttl: float) -> None:
    """Three renewals fit in before TERM, and the deadline lies before the lease's end.

    Fails when the margin is left out of `deadline_ns`.
    """
    timing = Timing.of(ttl)
    deadline_seconds = timing.deadline_ns(0) / SECOND
    assert 0.9 * ttl <= deadline_seconds < ttl
    assert 3 * timing.renew_after_seconds + timing.grace_seconds <= deadline_seconds + 1e-6
    assert timing.renew_after_seconds > 0


@given(ttls, st.floats(0.0, 0.999))
def test_any_grace_shorter_than_the_ttl_is_accepted(ttl: float, share: float) -> None:
    """It is cut where it leaves no room for renewals."""
    assert Timing.of(ttl, ttl * share).renew_after_seconds > 0


def test_a_grace_as_long_as_the_ttl_is_refused() -> None:
    """Only an explicit grace of at least the TTL is refused."""
    with pytest.raises(ValueError, match="shorter"):
        Timing.of(10, 10)


def test_the_margin_covers_clocks_that_drift() -> None:
    """Two clocks that are slewed apart by 0.05 % stay within the margin of a day's TTL."""
    assert margin_seconds(86_400) > 86_400 * 0.0005


@given(st.integers(0, 1000), st.floats(0, 1))
def test_retries_back_off_within_bounds(attempt: int, chance: float) -> None:
    """From 0.05 s to 1 s, whatever the dice say."""
    assert 0.05 <= _core.retry_delay_seconds(attempt, lambda: chance) <= 1.0


def acquisition(wait_seconds: float | None) -> Acquisition:
    """Give a request that began at 0."""
    return Acquisition(
        token="apps/a/tokens/t",
        ttl_seconds=10,
        wait_seconds=wait_seconds,
        holder=lease_pb2.Holder(),
        last_fencing_token=0,
        began_ns=0,
    )


def test_a_reconnection_asks_for_the_rest_of_the_wait_with_the_same_id() -> None:
    """The limit of a wait is not prolonged by a broken stream.

    Fails when `request` sends the wait as it was.
    """
    one = acquisition(60)
    first, second = one.request(0), one.request(45 * SECOND)
    assert first.request_id == second.request_id
    assert second.wait.ToMilliseconds() == 15_000


def test_only_an_unavailable_coordinator_is_asked_again() -> None:
    """Any other error is final."""
    one = acquisition(60)
    assert one.failed(errors.Draining("x", retry_after_seconds=0.2), 0) == 0.2
    with pytest.raises(errors.TokenNotFound):
        one.failed(errors.TokenNotFound("x"), 0)


def test_a_lease_that_was_lost_before_we_had_it_is_asked_for_anew() -> None:
    """Its acceptance was not heard of for as long as it lived; the wait goes on, within its limit.

    Fails when `failed` takes a LeaseLost for final, or asks again with the same request id.
    """
    one = acquisition(60)
    before = one.request(0).request_id
    assert one.failed(errors.LeaseLost("x"), 30 * SECOND) <= 1.0
    assert one.request(30 * SECOND).request_id != before
    with pytest.raises(errors.LeaseLost):
        one.failed(errors.LeaseLost("x"), 61 * SECOND)


def test_the_wait_ends_also_while_nobody_answers() -> None:
    """`--wait` keeps trying until its limit, `--no-wait` for some seconds only."""
    with pytest.raises(errors.Unavailable):
        acquisition(60).failed(errors.Unavailable("x"), 61 * SECOND)
    acquisition(0).failed(errors.Unavailable("x"), 1 * SECOND)
    with pytest.raises(errors.Unavailable):
        acquisition(0).failed(errors.Unavailable("x"), 5 * SECOND)
    acquisition(None).failed(errors.Unavailable("x"), 10**6 * SECOND)


def test_a_limit_is_the_reason_when_the_wait_ends_in_a_call() -> None:
    """A coordinator that refuses because of a limit is there, though its last answer is too late.

    Fails when the time-out of the last call is raised: a command may then run without a lease.
    """
    one = acquisition(0)
    one.failed(errors.LimitReached("x"), 1 * SECOND)
    with pytest.raises(errors.LimitReached):
        one.failed(errors.TimedOut("x"), 5 * SECOND)
    one.failed(errors.Unavailable("x"), 1 * SECOND)
    with pytest.raises(errors.TimedOut):
        one.failed(errors.TimedOut("x"), 5 * SECOND)


def renewals() -> Renewals:
    """Give the renewals of a lease of 10 s that was accepted at 0."""
    return Renewals(Timing.of(10), 0)


@pytest.mark.parametrize("error", [errors.Unavailable("x"), errors.StoreDamaged("x")])
def test_a_fault_says_nothing_until_the_deadline(error: errors.HoldoffError) -> None:
    """A renewal without an answer, or that a fault ended, is tried again until the deadline.

    Fails when `failed` takes the error for a loss, or never looks at the deadline.
    """
    one = renewals()
    one.failed(error, 4 * SECOND)
    assert 4 * SECOND < one.next_ns < 5 * SECOND
    with pytest.raises(errors.LeaseLost):
        one.failed(error, one.deadline_ns)


def test_a_deadline_counts_from_when_the_renewal_was_sent() -> None:
    """Not from its answer, which may come late."""
    one = renewals()
    before = one.deadline_ns
    one.succeeded(one.begin(3 * SECOND))
    assert one.deadline_ns == before + 3 * SECOND


@pytest.mark.parametrize("error", [errors.LeaseBroken("x"), errors.WrongSecret("x")])
def test_a_refused_renewal_is_a_loss(error: errors.HoldoffError) -> None:
    """A refusal is no fault: the coordinator says that the lease cannot be renewed."""
    with pytest.raises(errors.LeaseLost):
        renewals().failed(error, 0)


def test_a_lease_once_lost_stays_lost() -> None:
    """Whatever the clock says."""
    one = renewals()
    one.lost = errors.LeaseBroken("x")
    with pytest.raises(errors.LeaseBroken):
        one.check(0)


def test_the_start_of_the_command_is_told_at_once_and_not_forgotten() -> None:
    """It may fall into a renewal that was sent without it: another follows.

    Fails when `succeeded` does not compare.
    """
    one = renewals()
    under_way = one.begin(3 * SECOND)
    one.command_started()
    assert one.pause_seconds(3 * SECOND) <= 0
    one.succeeded(under_way)
    assert one.pause_seconds(3 * SECOND) <= 0
    second = one.begin(3 * SECOND)
    assert second.command_started
    one.succeeded(second)
    assert one.pause_seconds(3 * SECOND) > 0


def test_a_renewal_does_not_outlast_its_lease() -> None:
    """Its time limit shrinks towards the deadline."""
    one = renewals()
    assert one.begin(one.deadline_ns - SECOND // 4).timeout_seconds == pytest.approx(0.25)


def test_two_renewals_without_an_answer_leave_time_for_a_third() -> None:
    """Before TERM: two at one coordinator, and one at the next.

    Fails when a renewal may take as long as the time between two.
    """
    one, now_ns = Renewals(Timing.of(5), 0), 0
    for _ in range(2):
        now_ns = max(now_ns, one.next_ns)
        now_ns += round(one.begin(now_ns).timeout_seconds * SECOND)
        one.failed(errors.TimedOut("x"), now_ns)
    term_ns = one.deadline_ns - round(one.timing.grace_seconds * SECOND)
    assert one.next_ns + SECOND // 2 < term_ns


def test_what_is_slow_gets_more_time() -> None:
    """Each renewal after the second may take twice as long as the one before."""
    one = Renewals(Timing.of(60), 0)
    timeouts = []
    for _ in range(4):
        timeouts.append(one.begin(0).timeout_seconds)
        one.failed(errors.TimedOut("x"), 0)
    assert timeouts == [3, 3, 6, 12]


def test_a_release_is_tried_until_the_lease_would_have_run_out() -> None:
    """But not for long, and only while nobody answers.

    Fails when `Patience.failed` looks at the error alone.
    """
    one = renewals()
    patience = one.release_patience(0)
    assert patience.failed(errors.Unavailable("x"), one.deadline_ns - 1) == 0.2
    for error, now_ns in (
        (errors.Unavailable("x"), one.deadline_ns),
        (errors.WrongSecret("x"), 0),
    ):
        with pytest.raises(type(error)):
            patience.failed(error, now_ns)
    assert Renewals(Timing.of(3600), 0).release_patience(0).until_ns == 10 * SECOND


def test_an_offer_is_accepted_as_long_as_it_stands() -> None:
    """And a second longer, since its answer may be on the way."""
    offer = lease_service_pb2.LeaseOffer(accept_within=_core.duration(3))
    assert _core.acceptance_patience(offer, 0).until_ns == 4 * SECOND


def test_a_watch_goes_on_from_the_last_place_it_was_told() -> None:
    """The middle of a snapshot is no place; the beginning may be given.

    Fails when `received` takes an empty token.
    """
    one = Watching("apps/a", "start")
    assert one.request() == lease_service_pb2.WatchLeasesRequest(
        parent="apps/a", resume_token="start"
    )
    for token, expected in (("", "start"), ("later", "later"), ("", "later")):
        one.received(lease_service_pb2.WatchLeasesResponse(resume_token=token))
        assert one.request().resume_token == expected


def test_a_watch_never_gives_up_but_on_a_final_error() -> None:
    """It backs off, and begins anew after a message."""
    one = Watching("")
    pauses = [one.failed(errors.Unavailable("x")) for _ in range(20)]
    assert pauses[0] < 0.2
    assert 0.5 <= pauses[-1] <= 1.0
    assert one.failed(errors.Draining("x", retry_after_seconds=0.3)) == 0.3
    one.received(lease_service_pb2.WatchLeasesResponse())
    assert one.failed(errors.Unavailable("x")) < 0.2
    with pytest.raises(errors.TokenNotFound):
        one.failed(errors.TokenNotFound("x"))


def test_listening_never_gives_up_but_on_a_final_error() -> None:
    """It connects again while nobody answers, at once when something had come.

    Fails when `received` does not reset the retries.
    """
    one = Listening[int]()
    for _ in range(20):
        assert one.failed(errors.Unavailable("x")) <= 1.0
    assert one.received(7) == 7
    assert one.failed(errors.Unavailable("x")) <= 0.1
    for error in (errors.LeaseBroken("x"), errors.UnexpectedError("unimplemented")):
        with pytest.raises(type(error)):
            one.failed(error)


def budget(name: str, used: int = 1) -> budget_pb2.Budget:
    """Give a budget."""
    return budget_pb2.Budget(name=name, limit="errors", used=used, most=10, margin=2, room=8 - used)


def back_off(name: str, state: int = budget_pb2.BACK_OFF_STATE_QUIET) -> budget_pb2.BackOff:
    """Give a back-off."""
    return budget_pb2.BackOff(name=name, state=state)  # type: ignore[arg-type]


def test_what_went_away_between_two_connections_is_told() -> None:
    """The end of a new snapshot brings what is over, once: budgets empty, back-offs stateless.

    Fails when a budget of a snapshot's earlier part counts as gone, or when what was over before
    is told again.
    """
    one = BudgetWatching("apps/a", budget_pb2.Scope(division="1"))
    response = budget_service_pb2.WatchBudgetsResponse
    assert one.request().parent == "apps/a"
    assert one.request().scope.division == "1"
    one.received(response(budgets=[budget("b1"), budget("b2"), budget("b3")]))
    one.received(response(back_offs=[back_off("o1"), back_off("o2")], snapshot_end=True))
    one.received(response(budgets=[budget("b3", used=0)], back_offs=[back_off("o2", 0)]))

    one.request()
    part = one.received(response(budgets=[budget("b1", used=2)]))
    assert [found.name for found in part.budgets] == ["b1"]
    end = one.received(response(snapshot_end=True))
    assert [(found.name, found.used, found.room) for found in end.budgets] == [("b2", 0, 8)]
    assert [(found.name, found.state) for found in end.back_offs] == [("o1", 0)]

    one.request()
    end = one.received(response(snapshot_end=True))
    assert [found.name for found in end.budgets] == ["b1"]
    assert not end.back_offs


def test_many_events_are_sent_in_their_order() -> None:
    """A request takes a hundred.

    Fails when they are sent as one.
    """
    events = [budget_pb2.Event(id=str(number)) for number in range(250)]
    parts = _calls.parts(events)
    assert [len(part) for part in parts] == [100, 100, 50]
    assert [event.id for part in parts for event in part] == [event.id for event in events]
    assert _calls.parts([]) == []


def test_what_was_counted_is_sent_again_when_the_store_has_another_life() -> None:
    """What is young enough comes again by token, as old as it is now, until that succeeded.

    Fails when the new life is taken for known before what was lost has been sent.
    """
    counted, scope = Counted(), budget_pb2.Scope(token="apps/a/tokens/t")
    first = [budget_pb2.Event(id="1", scope=scope, age=duration(2), sent_age=duration(3))]
    other = [budget_pb2.Event(id="2", scope=budget_pb2.Scope(token="apps/a/tokens/u"))]
    elsewhere = [budget_pb2.Event(id="3", scope=budget_pb2.Scope(app="apps/b"))]
    for events, sent_seconds in ((first, 0), (other, 100), (elsewhere, 100)):
        assert counted.lost(events, "one", sent_seconds * SECOND) == []
        counted.learned(events, "one")
        counted.keep(events, sent_seconds * SECOND)
    assert counted.lost(first, "", 200 * SECOND) == []
    for _ in range(2):
        lost = counted.lost(first, "two", 200 * SECOND)
        assert [[event.id for event in token] for token in lost] == [["1"], ["2"]]
        assert (lost[0][0].age.seconds, lost[0][0].sent_age.seconds) == (202, 203)
        assert (lost[1][0].age.seconds, lost[1][0].HasField("sent_age")) == (100, False)
    counted.learned(first, "two")
    assert counted.lost(first, "two", 200 * SECOND) == []
    late = counted.lost(first, "three", 350 * SECOND)
    assert [[event.id for event in token] for token in late] == [["2"]]


def test_a_block_says_what_is_known_of_it() -> None:
    """What the provider did not say is absent, and not 0, which would mean something.

    Fails when a block without a Retry-After asks for one of no length.
    """
    where = _calls.scope("apps/a/tokens/t", "1", "crm/Accounts")
    known: dict[str, Any] = {"status": 429, "job": "j", "age_seconds": 1.0, "event_id": None}
    bare = _calls.block_event(
        where, retry_after_seconds=None, throttle="", sent_age_seconds=None, **known
    )
    assert (bare.kind, bare.status) == (budget_pb2.EVENT_KIND_BLOCK, 429)
    assert not bare.HasField("retry_after")
    assert not bare.HasField("sent_age")
    full = _calls.block_event(
        where, retry_after_seconds=0, throttle="minute", sent_age_seconds=2.5, **known
    )
    assert full.HasField("retry_after")
    assert (full.throttle, full.sent_age.ToMilliseconds()) == ("minute", 2500)
    assert full.id != bare.id
