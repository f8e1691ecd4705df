"""Budgets through both clients, against a real coordinator, also where answers are lost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import uuid
from typing import TYPE_CHECKING, Self

import msgspec
import pytest

import holdoff
from holdoff import _core, _route, errors
from holdoff.policies import Policy, Seconds, presets
from holdoff.v1 import budget_pb2
from tests.harness import Replica, let_pass, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

    from holdoff._client import BudgetGuard
    from tests.conftest import Server

ACCOUNTS = "/api/v1/535193/crm/Accounts"
QUOTES = "('" + "''" * 28 + "("
"""A key of OData that never ends, and can be read in 2^28 ways."""
COUNTED, KNOWN, NOT_LIMITED = 1, 2, 3


def policy(name: str, window_seconds: float) -> Policy:
    """Exact Online's errors and calls in a window of another length."""
    exact = presets()["exact-online"]
    errors, _, calls, _ = (
        msgspec.structs.replace(limit, window=Seconds(window_seconds)) for limit in exact.limit
    )
    return msgspec.structs.replace(exact, name=name, limit=(errors, calls))


POLICIES = {**presets(), "minutely": policy("minutely", 60)}


@pytest.fixture(scope="module")
def replica(valkey: Server) -> Iterator[Replica]:
    """Give a replica that knows the policies of these tests."""
    with Replica(valkey.url, policies=POLICIES) as one:
        yield one


@pytest.fixture
def client(replica: Replica) -> Iterator[holdoff.Client]:
    """Give a client of it."""
    with holdoff.Client(replica.address) as one:
        yield one


@pytest.fixture
def token(client: holdoff.Client) -> str:
    """Give a token of an app of its own, whose hour takes a minute."""
    return client.create_token(f"apps/{uuid.uuid4()}/tokens/t", policy="minutely").name


def used(client: holdoff.Client, token: str) -> dict[str, tuple[int, int]]:
    """Return what is used and what is reserved of each limit of a token's app."""
    budgets = client.list_budgets(token.partition("/tokens/")[0])
    return {budget.limit: (budget.used, budget.reserved) for budget in budgets}


def has_message(data: bytes) -> bool:
    """Tell whether HTTP/2 frames, of which the first is whole, carry a message: a DATA frame."""
    while len(data) >= 9:
        if data[3] == 0:
            return True
        data = data[9 + int.from_bytes(data[:3], "big") :]
    return False


class Relay:
    """A way to a server on which answers can get lost: requests always arrive."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.mute = False
        """Keeps answers back."""
        self.cut_next = False
        """Breaks the connection in the place of the next message."""
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(self._server)
                self._sockets += [ours, theirs]
                for source, sink in ((ours, theirs), (theirs, ours)):
                    thread = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        answers = source.getpeername() == self._server
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if answers and self.cut_next and has_message(data):
                    self.cut_next = False
                    break
                if not (answers and self.mute):
                    sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(replica: Replica) -> Iterator[Relay]:
    """Give a way to the replica on which answers can get lost."""
    with Relay(replica.address) as one:
        yield one


def test_an_error_is_counted_once(client: holdoff.Client, token: str) -> None:
    """With an id it counts once however often it is told; how it was taken is said."""
    event_id = str(uuid.uuid4())
    for expected in (COUNTED, KNOWN):
        outcome = client.record_error(
            token, endpoint=ACCOUNTS, status=400, count=2, event_id=event_id
        )
        assert outcome == expected
    assert client.record_error(token, endpoint=ACCOUNTS, status=500) == NOT_LIMITED
    assert client.record_error(token, endpoint="crm/Accounts", division="535193") == COUNTED
    [budget] = client.list_budgets(token.partition("/tokens/")[0])
    assert (budget.used, budget.scope.endpoint) == (3, "crm/Accounts")
    assert client.get_budget(budget.name).used == 3
    assert client.reset_budget(budget.name, "mended").used == 0
    with pytest.raises(errors.BudgetNotFound):
        client.get_budget(f"{budget.name}-x")


@pytest.mark.parametrize(
    "url",
    [
        "/docs/XMLUpload.aspx?Topic=Items&_Division_=535193",
        "https://start.exactonline.nl/docs/xmlupload.aspx?division=535193&sig=sw0rdf1sh#x",
    ],
)
def test_the_division_of_a_query_is_reported(client: holdoff.Client, token: str, url: str) -> None:
    """Calls of the XML API name it there alone. Fails when a client sends no part of the query."""
    assert client.record_error(token, endpoint=url, status=400) == COUNTED
    [budget] = client.list_budgets(token.partition("/tokens/")[0])
    assert (budget.scope.division, budget.scope.endpoint.lower()) == (
        "535193",
        "docs/xmlupload.aspx",
    )


def test_budgets_are_listed_by_what_they_are_about(client: holdoff.Client, token: str) -> None:
    """More than a page of them, the tightest first; filters name one."""
    app = token.partition("/tokens/")[0]
    events = [
        budget_pb2.Event(
            id=str(uuid.uuid4()),
            kind=budget_pb2.EVENT_KIND_ERROR,
            scope=budget_pb2.Scope(token=token, endpoint=f"/api/v1/{number % 2}/crm/E{number}"),
            count=9 if number == 7 else 1,
        )
        for number in range(105)
    ]
    assert client.record_events(events[:100]) == [COUNTED] * 100
    client.record_events(events[100:])
    listed = list(client.list_budgets(app))
    assert len({budget.name for budget in listed}) == 105
    assert listed[0].scope.endpoint == "crm/E7"
    assert [b.name for b in client.list_budgets(app, state="spent")] == [listed[0].name]
    assert [b.name for b in client.list_budgets(endpoint="CRM/E7", token=token)] == [listed[0].name]
    assert len(list(client.list_budgets(app, division="0"))) == 53
    with pytest.raises(ValueError, match="state"):
        client.list_budgets(state="gone")  # type: ignore[arg-type]


def test_a_guard_counts_what_the_body_says(
    client: holdoff.Client, store: redis.Redis, token: str
) -> None:
    """Its status; 200 without one; nobody knows where it raised; nothing if no call was made.

    Fails when `__exit__` commits the same whatever happened.
    """
    with client.budget_guard(token, endpoint=ACCOUNTS) as guard:
        assert used(client, token) == {"errors": (0, 1), "calls-a-minute": (0, 1)}
        guard.status = 404
    assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (1, 0)}
    with client.budget_guard(token, endpoint=ACCOUNTS):
        pass
    assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (2, 0)}
    with (
        pytest.raises(ZeroDivisionError),
        client.budget_guard(token, endpoint=ACCOUNTS, ttl_seconds=30),
    ):
        _ = 1 / 0
    assert used(client, token) == {"errors": (1, 1), "calls-a-minute": (2, 1)}
    # It may have arrived at any moment until it runs out.
    let_pass(store, token, 30)
    wait_until(lambda: used(client, token) == {"errors": (2, 0), "calls-a-minute": (3, 0)})
    with client.budget_guard(token, endpoint=ACCOUNTS) as guard:
        guard.cancel()
    assert used(client, token) == {"errors": (2, 0), "calls-a-minute": (3, 0)}
    with (
        pytest.raises(errors.InvalidRequest),
        client.budget_guard(token, endpoint=ACCOUNTS) as guard,
    ):
        guard.status = 999
    with pytest.raises(ValueError, match="kind"):
        client.reserve(token, kind="error")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count"):
        client.reserve(token, count=0)


def test_a_decorated_function_reserves_for_each_call(client: holdoff.Client, token: str) -> None:
    """Also for calls within calls; what it returns and raises comes through.

    Fails when the calls of a function share a guard.
    """

    @client.budget_guard(token, endpoint=ACCOUNTS)
    def depth(guard: BudgetGuard, left: int, *, status: int) -> int:
        guard.status = status
        if left:
            return depth(left - 1, status=200) + 1
        assert used(client, token)["errors"] == (0, 3)
        return 0

    assert depth(2, status=404) == 2
    assert depth.__name__ == "depth"
    assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (3, 0)}

    async def coroutine(_: BudgetGuard) -> None:
        """Would be counted before it ran."""

    with pytest.raises(TypeError, match=r"holdoff\.aio"):
        client.budget_guard(token)(coroutine)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Note whenever a reservation is refused."""
    noted: list[BaseException] = []
    failed = _core.Reserving.failed

    def note(self: _core.Reserving, error: holdoff.HoldoffError, now_ns: int) -> float:
        noted.append(error)
        return failed(self, error, now_ns)

    monkeypatch.setattr(_core.Reserving, "failed", note)
    return noted


def test_a_spent_budget_refuses_and_a_wait_outlasts_it(
    client: holdoff.Client, store: redis.Redis, token: str, refused: list[BaseException]
) -> None:
    """Without a wait it is an exception that says until when; with one the body runs then.

    Fails when `wait_seconds` is not looked at, or room is taken that there is not.
    """
    client.record_error(token, endpoint=ACCOUNTS, status=400, count=8)
    with pytest.raises(errors.BudgetSpent) as caught:
        client.budget_guard(token, endpoint=ACCOUNTS).__enter__()
    assert 0 < (caught.value.retry_after_seconds or 0) <= 60.01
    assert len(refused) == 1
    with pytest.raises(errors.BudgetSpent):
        client.reserve(token, endpoint=ACCOUNTS, wait_seconds=0.2)
    refused.clear()

    def pass_the_window() -> None:
        wait_until(lambda: refused)
        let_pass(store, token, 60)

    thread = threading.Thread(target=pass_the_window)
    thread.start()
    with client.budget_guard(token, endpoint=ACCOUNTS, wait_seconds=50):
        assert {type(error) for error in refused} == {errors.BudgetSpent}
    thread.join()


def test_room_that_comes_back_is_taken_at_once(
    client: holdoff.Client, token: str, refused: list[BaseException]
) -> None:
    """Who waits gets the room of a call that ends well, not only that of the next window.

    Fails when a waiter sleeps for all of `retry_after_seconds`, here a minute.
    """
    taken = client.reserve(token, endpoint=ACCOUNTS, count=8)
    got: list[budget_pb2.Reservation] = []
    thread = threading.Thread(
        target=lambda: got.append(client.reserve(token, endpoint=ACCOUNTS, wait_seconds=50))
    )
    thread.start()
    wait_until(lambda: refused)
    assert not got
    client.cancel(token, taken.id)
    thread.join(timeout=20)
    assert len(got) == 1
    assert client.commit(token, got[0].id, status=400).state == 2


def test_lost_answers_count_once(client: holdoff.Client, relay: Relay, token: str) -> None:
    """Of a reservation, of its commit, and of an event: each is asked again, and counts once.

    Fails when a reservation is asked for again with a new id, or a commit is not repeated.
    """
    with holdoff.Client(relay.address) as lossy:
        lossy.get_token(token)  # connects
        relay.cut_next = True
        with lossy.budget_guard(token, endpoint=ACCOUNTS) as guard:
            assert not relay.cut_next
            assert used(client, token)["errors"] == (0, 1)
            guard.status, relay.cut_next = 400, True
        assert not relay.cut_next
        assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (1, 0)}
        relay.cut_next = True
        assert lossy.record_error(token, endpoint=ACCOUNTS, status=400, count=3) == KNOWN
        assert used(client, token)["errors"] == (4, 0)


def test_a_commit_that_nobody_hears_counts_when_it_expires(
    client: holdoff.Client, valkey: Server, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that is away costs the caller neither the answer nor more than some seconds.

    Fails when leaving raises, does not end, or when the reservation's room is given back.
    """
    assert _core.REPORT_SECONDS < 10
    monkeypatch.setattr(_core, "REPORT_SECONDS", 0.5)
    with (
        Replica(valkey.url, policies=POLICIES) as leaving,
        holdoff.Client(leaving.address) as one,
        one.budget_guard(token, endpoint=ACCOUNTS, ttl_seconds=1) as guard,
    ):
        leaving.stop()
        guard.status = 200
    wait_until(lambda: used(client, token)["errors"] == (1, 0))


def test_an_interrupted_reservation_gives_its_room_back(
    client: holdoff.Client, relay: Relay, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that may have been made, and whose answer never came, does not count a minute later.

    Fails when only an answer is taken for a reservation.
    """
    with holdoff.Client(relay.address) as lossy:
        lossy.get_token(token)

        def interrupted(*_: object) -> float:
            raise KeyboardInterrupt

        monkeypatch.setattr(_route.Route, "is_worth_another_try", interrupted)
        relay.cut_next = True
        with pytest.raises(KeyboardInterrupt):
            lossy.reserve(token, endpoint=ACCOUNTS)
    assert not relay.cut_next
    wait_until(lambda: used(client, token).get("errors") == (0, 0))


# The same for asyncio


async def test_asyncio_guards(client: holdoff.Client, replica: Replica, token: str) -> None:
    """A guard as a context and on a coroutine function; errors, refusals and cancellations count.

    Fails when `__aexit__` does not settle.
    """
    async with holdoff.aio.Client(replica.address) as loop:
        async with loop.budget_guard(token, endpoint=ACCOUNTS) as guard:
            guard.status = 401
        assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (1, 0)}

        @loop.budget_guard(token, endpoint=ACCOUNTS)
        async def call(guard: holdoff.aio.BudgetGuard, meanwhile: Callable[[], object]) -> object:
            found = meanwhile()
            await asyncio.sleep(0)
            guard.status = 200
            return found

        assert await asyncio.gather(*(call(lambda: 7) for _ in range(7))) == [7] * 7
        assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (8, 0)}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await call(lambda: limit.reschedule(0))
        # Nobody knows when that call arrived: it counts when it runs out.
        assert used(client, token) == {"errors": (1, 1), "calls-a-minute": (8, 1)}
        outcome = await loop.record_error(token, endpoint=ACCOUNTS, status=400, count=6)
        assert outcome == COUNTED
        with pytest.raises(errors.BudgetSpent):
            await call(lambda: 0)
        [spent] = [one async for one in loop.list_budgets(token=token, state="spent")]
        assert (await loop.get_budget(spent.name)).used == 7
        await loop.reset_budget(spent.name, "mended")
        async with loop.budget_guard(token, endpoint=ACCOUNTS) as guard:
            guard.cancel()
        assert used(client, token)["errors"] == (0, 1)


async def test_asyncio_gives_room_back(client: holdoff.Client, relay: Relay, token: str) -> None:
    """A task that is cancelled before it hears of its reservation takes no room with it.

    Fails when `reserve` does not give up what may have been granted.
    """
    async with holdoff.aio.Client(relay.address) as loop:
        await loop.get_token(token)
        relay.mute = True
        task = asyncio.create_task(loop.reserve(token, endpoint=ACCOUNTS))
        await asyncio.to_thread(wait_until, lambda: used(client, token).get("errors") == (0, 1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: used(client, token).get("errors") == (0, 0))


async def test_asyncio_repeats_what_was_lost(
    client: holdoff.Client, relay: Relay, token: str
) -> None:
    """As the synchronous client does, with the same ids."""
    async with holdoff.aio.Client(relay.address) as loop:
        await loop.get_token(token)
        relay.cut_next = True
        async with loop.budget_guard(token, endpoint=ACCOUNTS) as guard:
            assert used(client, token)["errors"] == (0, 1)
            guard.status, relay.cut_next = 400, True
        assert used(client, token) == {"errors": (1, 0), "calls-a-minute": (1, 0)}


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, token: client.record_error(token, endpoint=QUOTES),
        lambda client, token: list(client.list_budgets(token=token, endpoint=QUOTES)),
        lambda client, token: client.explain(token, endpoint=QUOTES),
        lambda client, token: client.reserve(token, endpoint=QUOTES),
        lambda client, token: client.acquire(
            token, wait_seconds=0, scopes=[("1", QUOTES)]
        ).release(),
    ],
    ids=["record", "list", "explain", "reserve", "acquire"],
)
def test_no_endpoint_stops_the_coordinator(
    client: holdoff.Client, token: str, ask: Callable[[holdoff.Client, str], object]
) -> None:
    """An endpoint of any form is answered at once, and so is the next call.

    Fails, by the time limit of a call, when its normal form takes time exponential in its length.
    """
    ask(client, token)
    assert client.get_token(token).name == token
