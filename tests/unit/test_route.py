"""When a client goes to another coordinator, and to which. No sockets, no clocks."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path

import grpc
import pytest

from holdoff import errors
from holdoff._route import MOST_MOVES, MOVE_PAUSE_SECONDS, Route
from holdoff._timing import SECOND
from holdoff_coordinator import server

THREE = "10.0.0.1:1,10.0.0.2:2,10.0.0.3:3"
OF_NO_USE = [
    errors.StoreUnavailable("x"),
    errors.SchemaTooNew("x"),
    errors.Draining("x"),
    errors.Unavailable("the connection broke"),
]


def first_address(route: Route) -> str:
    """Return the address at which the channel of a route begins."""
    return route.target(route.number).removeprefix("ipv4:").partition(",")[0]


def test_grpc_knows_our_options() -> None:
    """Fails when the name of an option is wrong: gRPC ignores it without a word."""
    spec = find_spec("grpc._cython.cygrpc")
    assert spec
    assert spec.origin
    library = Path(spec.origin).read_bytes()
    options = [*Route("coordinator:1").options(), *Route(THREE).options(), *server._OPTIONS]
    assert [name for name, _ in options if name.encode() + b"\0" not in library] == []


def test_clients_begin_anywhere_and_go_round() -> None:
    """Each address is the first of some clients, and each move begins with the next one.

    Fails when all clients begin with the first address.
    """
    firsts = {first_address(Route(THREE, iter([chance]).__next__)) for chance in (0.0, 0.5, 0.9)}
    assert firsts == set(THREE.split(","))
    route = Route(THREE, lambda: 0.5)
    seen: list[str] = []
    for _ in range(3):
        seen.append(first_address(route))
        route.failed(route.number, errors.Draining("x"), 0)
    assert seen == ["10.0.0.2:2", "10.0.0.3:3", "10.0.0.1:1"]
    assert route.target(0) == "ipv4:10.0.0.2:2,10.0.0.3:3,10.0.0.1:1"


@pytest.mark.parametrize("error", OF_NO_USE, ids=lambda error: error.reason or "broken")
def test_a_coordinator_of_no_use_is_left_at_once(error: errors.Unavailable) -> None:
    """One answer is enough, and what failed on the channel before changes nothing more."""
    route = Route(THREE)
    route.answered(0)
    route.failed(0, error, 0)
    assert route.number == 1
    route.failed(0, error, 0)
    assert route.number == 1
    assert route.is_worth_another_try(0, error, 1)
    assert not route.is_worth_another_try(1, error, 1)
    assert not route.is_worth_another_try(0, error, 0)


@pytest.mark.parametrize(
    "error", [errors.LeaseHeld("x"), errors.LeaseLost("x"), errors.WaiterSilent("x")]
)
def test_an_answer_is_no_reason_to_leave(error: errors.HoldoffError) -> None:
    """Whoever refuses is there; it also ends a silence."""
    route = Route(THREE)
    route.failed(0, error, 0)
    route.failed(0, errors.TimedOut("x"), 0)
    route.failed(0, error, 0)
    route.failed(0, errors.TimedOut("x"), 0)
    assert route.number == 0


def test_the_second_call_without_an_answer_leaves() -> None:
    """A channel through which nothing came yet is left after the first.

    Fails when an answer does not end the count.
    """
    route = Route(THREE)
    route.answered(0)
    route.failed(0, errors.TimedOut("x"), 0)
    route.answered(0)
    route.failed(0, errors.TimedOut("x"), 0)
    assert route.number == 0
    route.failed(0, errors.TimedOut("x"), 0)
    assert route.number == 1
    assert not route.is_worth_another_try(0, errors.TimedOut("x"), 1)
    route.failed(1, errors.TimedOut("x"), 0)
    assert route.number == 2


def test_moves_are_few_while_nobody_is_of_use() -> None:
    """Some in a row, then one for each pause, however often calls fail.

    Fails when a client opens a channel for every call that fails.
    """
    route = Route(THREE)
    for tenths in range(round(10 * MOVE_PAUSE_SECONDS * 4)):
        route.failed(route.number, errors.StoreUnavailable("x"), 10**12 + tenths * SECOND // 10)
    assert route.number in range(MOST_MOVES + 3, MOST_MOVES + 5)


def test_a_single_address_may_stand_for_several_coordinators() -> None:
    """A fresh connection to it is made, which may lead to another one."""
    route = Route("10.0.0.1:1")
    route.failed(0, errors.StoreUnavailable("x"), 0)
    assert (route.number, route.target(1), route.tries) == (1, "ipv4:10.0.0.1:1", 2)


def test_options_of_a_channel() -> None:
    """No proxy; connections of its own; a certificate for the first of several, wherever it begins.

    Fails when gRPC's defaults are left: a proxy that the environment names reads the credential.
    """
    for number in range(3):
        route = Route(THREE)
        route.number = number
        assert dict(route.options())["grpc.default_authority"] == "10.0.0.1:1"
    options = dict(Route("coordinator:1").options())
    assert options["grpc.enable_http_proxy"] == 0
    assert options["grpc.use_local_subchannel_pool"] == 1
    assert options["grpc.http2.ping_timeout_ms"] == 5_000
    assert "shuffle" in str(options["grpc.service_config"])
    assert "grpc.default_authority" not in options


async def test_what_grpc_raises_becomes_an_error_of_ours() -> None:
    """A connection that breaks is Unavailable, in whatever way asyncio's gRPC says so.

    Fails when one of them passes: a wait without limit then ends with it.
    """
    broken = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        details="Internal error from Core",
    )
    raised = [
        broken,
        asyncio.InvalidStateError("RPC already finished."),
        grpc.aio.UsageError("Channel is closed."),
        grpc.aio.InternalError("Failed grpc_call_start_batch: 8"),
        asyncio.CancelledError(),  # a call that gRPC itself has cancelled
    ]
    route = Route(THREE)
    for number, error in enumerate(raised):
        with pytest.raises(errors.Unavailable), route.watched(number):
            raise error
        assert route.number == number + 1
    route.number = 7
    with pytest.raises(errors.Unavailable), route.watched(6):
        raise ValueError("Cannot invoke RPC on closed channel!")
    with pytest.raises(ValueError, match="ours"), route.watched(7):
        raise ValueError("a fault of ours")
    route.closed = True
    for error in (broken, ValueError("closed")):
        with pytest.raises(errors.HoldoffError, match="the client was closed"), route.watched(7):
            raise error


async def test_a_task_that_is_cancelled_stays_cancelled() -> None:
    """Its own cancellation is no word of gRPC's."""
    route, began = Route(THREE), asyncio.Event()

    async def call() -> None:
        with route.watched(0):
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert route.number == 0
