"""The synchronous client: sockets, threads and clocks around `holdoff._core`.

`holdoff.aio` is the same with an event loop in the place of threads.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import queue
import threading
import time
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Self, TypeVar

import grpc

from holdoff import _calls
from holdoff._core import (
    CHANNEL_OPTIONS,
    DEFAULT_TTL_SECONDS,
    HEARTBEAT_SECONDS,
    SECOND,
    WITHDRAWAL_SECONDS,
    Acquisition,
    Patience,
    Renewals,
    Reserving,
    Timing,
    Watching,
    acceptance_patience,
    here,
    report_patience,
    withdrawal_patience,
)
from holdoff._endpoint import endpoint_of, target
from holdoff._guarding import Guarding
from holdoff._held import Held
from holdoff._platform import boottime_ns
from holdoff.errors import HoldoffError, LeaseLost, OfferExpired, Unavailable, from_rpc_error
from holdoff.v1 import (
    budget_pb2,
    lease_pb2,
    lease_service_pb2,
    lease_service_pb2_grpc,
    policy_pb2,
    token_pb2,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType

log = logging.getLogger("holdoff")

ItemT = TypeVar("ItemT")
ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class Client:
    """A connection to a coordinator; use it as a context manager, or call `close`.

    Args:
        endpoint: `host:port`, or several addresses with commas in between, of which the first
            that answers is used; by default `HOLDOFF_ENDPOINT`, else 127.0.0.1:50051.
        timeout_seconds: How long a call other than `acquire` may take.

    Raises:
        ValueError: Several endpoints that are not addresses of one kind.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_seconds: float = 10.0) -> None:
        self.endpoint = endpoint_of(endpoint)
        self._timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(target(self.endpoint), options=CHANNEL_OPTIONS)
        self._leases = lease_service_pb2_grpc.LeaseServiceStub(self._channel)
        self._fencing_tokens: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Leases that are still held run out by themselves."""
        self._channel.close()

    def acquire(  # noqa: PLR0913 - each is part of the question
        self,
        token: str,
        *,
        wait_seconds: float | None = None,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        grace_seconds: float | None = None,
        job: str = "",
        labels: Mapping[str, str] | None = None,
        last_fencing_token: int = 0,
        on_waiting: Callable[[lease_pb2.WaitStatus], None] | None = None,
        on_unreachable: Callable[[Unavailable], None] | None = None,
        on_renewed: Callable[[int], None] | None = None,
        on_lost: Callable[[LeaseLost], None] | None = None,
    ) -> HeldLease:
        """Wait for a lease on a token, accept it and keep it renewed.

        Interrupted in the wait, by Ctrl-C or by what a callback raises, it gives up its place.

        Args:
            token: `apps/{app}/tokens/{token}`.
            wait_seconds: How long to wait; 0 answers at once, None waits without limit.
            ttl_seconds: How long the lease lives without a renewal: 1 s to 24 h.
            grace_seconds: Time the holder needs to stop; by default min(10 s, TTL/3).
            job: Name of the job, for listings.
            labels: What else is worth knowing, for listings. At most 16; keys of lower case
                letters, digits and `._/-`, values of at most 200 characters.
            last_fencing_token: The highest fencing token seen for this token, if it was kept.
            on_waiting: Called with what the request waits for, whenever that changes.
            on_unreachable: Called whenever the coordinator cannot be reached; the wait goes on.
            on_renewed: Called with the new deadline, in ns of CLOCK_BOOTTIME. Runs in the
                renewal's thread, so it must be quick.
            on_lost: Called once if the lease is lost. Runs in the renewal's thread.

        Raises:
            NotGranted: No lease within the wait.
            Unavailable: The coordinator could not be reached within the wait.
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong.
            ValueError: `grace_seconds` is not shorter than `ttl_seconds`.
        """
        timing = Timing.of(ttl_seconds, grace_seconds)
        acquisition = Acquisition(
            token=token,
            ttl_seconds=ttl_seconds,
            wait_seconds=wait_seconds,
            holder=here(job, labels),
            last_fencing_token=max(last_fencing_token, self._fencing_tokens.get(token, 0)),
            began_ns=boottime_ns(),
        )
        while True:
            try:
                with _Conversation(self, acquisition) as conversation:
                    while True:
                        event = conversation.receive()
                        if isinstance(event, lease_pb2.WaitStatus):
                            if on_waiting:
                                on_waiting(event)
                        elif sent_ns := self._accept(event):
                            self._fencing_tokens[token] = event.lease.fencing_token
                            renewals = Renewals(timing, sent_ns)
                            return HeldLease(self, event, renewals, on_renewed, on_lost)
            except HoldoffError as error:
                pause = acquisition.failed(error, boottime_ns())
                if on_unreachable and isinstance(error, Unavailable):
                    on_unreachable(error)
                time.sleep(pause)

    def _accept(self, offer: lease_service_pb2.LeaseOffer) -> int | None:
        """Accept an offer; return when that was sent, or None if it was too late.

        Interrupted in the middle it gives the lease back, accepted or not.
        """
        patience = acceptance_patience(offer, boottime_ns())
        try:
            sent_ns, _ = self._insist(_calls.renew_lease(offer), patience)
            return sent_ns
        except OfferExpired:
            return None
        except HoldoffError:
            raise
        except BaseException:
            with contextlib.suppress(HoldoffError):
                self._call(_calls.release_lease(offer))
            raise

    def get_lease(self, name: str) -> lease_pb2.Lease:
        """Return a lease; an ended one as long as it is in the history of its token.

        Raises:
            LeaseNotFound: There is no such lease.
        """
        return self._call(_calls.get_lease(name))

    def list_leases(self, parent: str = "") -> Iterator[lease_pb2.Lease]:
        """Yield the live leases of everything, an app, or a token."""
        return self._items(_calls.list_leases(parent))

    def list_lease_history(
        self, token: str, *, at: datetime | None = None
    ) -> list[lease_pb2.Lease]:
        """Return the latest leases of a token, the newest first: who ran, when, how it ended.

        Args:
            token: `apps/{app}/tokens/{token}`.
            at: Only the leases that lived then. It needs a time zone.

        Raises:
            TokenNotFound: There is no such token.
            ValueError: `at` has no time zone.
        """
        return self._call(_calls.list_lease_history(token, at))

    def list_waiters(self, token: str) -> list[lease_pb2.Waiter]:
        """Return who waits for a token, in the order of their places.

        Raises:
            TokenNotFound: There is no such token.
        """
        return self._call(_calls.list_waiters(token))

    def get_policy(self, name: str) -> policy_pb2.Policy:
        """Return a policy: what a provider asks.

        Raises:
            PolicyNotFound: There is no such policy.
        """
        return self._call(_calls.get_policy(name))

    def list_policies(self) -> list[policy_pb2.Policy]:
        """Return all policies that the coordinator knows, by name."""
        return self._call(_calls.list_policies())

    def watch_leases(
        self,
        parent: str = "",
        *,
        resume_token: str = "",
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> Generator[lease_service_pb2.WatchLeasesResponse, None, None]:
        """Yield how things stand, then every change, for ever.

        It reconnects by itself and goes on where it was, so that no change is missed. A snapshot
        replaces what was known of its app; one may come at any time. Close the iterator
        to end the watch.

        Args:
            parent: Only this app or token; empty for everything.
            resume_token: The last one that an earlier watch of the same parent yielded.
            on_unreachable: Called whenever the coordinator cannot be reached; the watch goes on.

        Raises:
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong.
        """
        watching = Watching(parent, resume_token)
        while True:
            stream = self._leases.WatchLeases(watching.request())
            try:
                with _translated(self.endpoint):
                    for response in stream:
                        watching.received(response)
                        yield response
                raise Unavailable("the coordinator ended the watch")
            except HoldoffError as error:
                pause = watching.failed(error)
                if on_unreachable and isinstance(error, Unavailable):
                    on_unreachable(error)
            finally:
                stream.cancel()
            time.sleep(pause)

    def break_lease(self, name: str, reason: str) -> lease_pb2.Lease:
        """Forbid the renewal of a lease; the cooldown counts from when it ended.

        Args:
            name: `apps/{app}/tokens/{token}/leases/{lease}`.
            reason: Why; the holder is told. At most 200 characters.

        Raises:
            LeaseNotFound: There is no such lease.
            LeaseLost: It has ended already.
        """
        return self._call(_calls.break_lease(name, reason))

    def create_token(
        self,
        name: str,
        *,
        policy: str = "",
        refresh_interval_seconds: float | None = None,
        refresh_at: str | None = None,
        last_refreshed: str | float = "never",
    ) -> token_pb2.Token:
        """Create a token.

        Args:
            name: `apps/{app}/tokens/{token}`.
            policy: The provider's rules; empty means `exact-online`.
            refresh_interval_seconds: Least time between refreshes, taken exactly; None takes
                the policy's interval and margin.
            refresh_at: "end", "start", or None for what the policy says.
            last_refreshed: "never", "unknown" (starts a full cooldown), or an age in seconds.

        Raises:
            TokenExists: There is such a token.
            PolicyNotFound: There is no such policy.
            ValueError: `refresh_at` or `last_refreshed` is none of these.
        """
        return self._call(
            _calls.create_token(name, policy, refresh_interval_seconds, refresh_at, last_refreshed)
        )

    def update_token(
        self,
        name: str,
        *,
        policy: str | None = None,
        refresh_interval_seconds: float | Literal["policy"] | None = None,
        refresh_at: str | None = None,
    ) -> token_pb2.Token:
        """Change a token; None leaves a setting as it is. No running cooldown is shortened.

        Raises:
            TokenNotFound: There is no such token.
            PolicyNotFound: There is no such policy.
            ValueError: `refresh_at` is neither "end" nor "start".
        """
        return self._call(_calls.update_token(name, policy, refresh_interval_seconds, refresh_at))

    def get_token(self, name: str) -> token_pb2.Token:
        """Return a token.

        Raises:
            TokenNotFound: There is no such token.
        """
        return self._call(_calls.get_token(name))

    def list_tokens(self, parent: str = "") -> Iterator[token_pb2.Token]:
        """Yield all tokens, or those of an app."""
        return self._items(_calls.list_tokens(parent))

    def record_events(
        self, events: Sequence[budget_pb2.Event]
    ) -> list[budget_pb2.EventOutcome.ValueType]:
        """Count events of one app, each once however often it is reported.

        Tried for some seconds while the coordinator is away; the same events may be reported
        again after that.

        Args:
            events: At most 100, each with an id of its own.

        Returns:
            How each was taken, in their order.

        Raises:
            Unavailable: The coordinator could not be told.
            TokenNotFound: There is no such token.
            EventTooOld: An event happened more than a day ago.
            InvalidRequest: An event is wrong; none of them counts.
            TooManyBudgets: The app has too many different scopes.
            TooManyEvents: The app has too many events.
        """
        _, outcomes = self._insist(_calls.record_events(events), report_patience(boottime_ns()))
        return outcomes

    def record_error(  # noqa: PLR0913 - each is part of the event
        self,
        token: str,
        *,
        division: str = "",
        endpoint: str,
        status: int = 0,
        count: int = 1,
        job: str = "",
        age_seconds: float = 0.0,
        event_id: str | None = None,
    ) -> budget_pb2.EventOutcome.ValueType:
        """Count an answer of the provider that was an error.

        Tried for some seconds while the coordinator is away.

        Args:
            token: `apps/{app}/tokens/{token}`; its policy says which errors are limited.
            division: The provider's name of a company; found in the endpoint if that has it.
            endpoint: The path or URL of the call.
            status: HTTP status; 0 when it is not known, which counts.
            count: How often it happened: at most 10,000.
            job: Name of the job, shown with the error.
            age_seconds: How long ago: at most a day.
            event_id: A UUID version 4, for a report that may be repeated; by default a new one.

        Returns:
            Whether it is counted, was counted before, or is not limited.

        Raises:
            Unavailable: The coordinator could not be told.
            TokenNotFound: There is no such token.
            EventTooOld: It happened more than a day ago.
            InvalidRequest: An argument is wrong.
            TooManyBudgets: The app has too many different scopes.
            TooManyEvents: The app has too many events.
            ValueError: `count` is not positive.
        """
        event = _calls.error_event(
            _calls.scope(token, division, endpoint),
            status=status,
            count=count,
            job=job,
            age_seconds=age_seconds,
            event_id=event_id,
        )
        [outcome] = self.record_events([event])
        return outcome

    def get_budget(self, name: str) -> budget_pb2.Budget:
        """Return a budget: how much of a limit is used in one scope.

        Raises:
            BudgetNotFound: There is no such budget, or nothing is left in its window.
        """
        return self._call(_calls.get_budget(name))

    def list_budgets(
        self,
        parent: str = "",
        *,
        token: str = "",
        division: str = "",
        endpoint: str = "",
        state: _calls.BudgetState | None = None,
    ) -> Iterator[budget_pb2.Budget]:
        """Yield the budgets with something in their window, those with the least room first.

        Args:
            parent: Only those of this app, `apps/{app}`; empty for everything.
            token: Only those whose scope has this token.
            division: Only those whose scope has this division.
            endpoint: Only those whose scope has this endpoint.
            state: Only those in this state.

        Raises:
            InvalidRequest: An argument is wrong.
            ValueError: `state` is none of "open", "low" and "spent".
        """
        where = _calls.scope(token, division, endpoint)
        return self._items(_calls.list_budgets(parent, where, state))

    def reset_budget(self, name: str, reason: str) -> budget_pb2.Budget:
        """Make a budget forget what it counted; a late report does not count again.

        Args:
            name: `apps/{app}/budgets/{budget}`.
            reason: Why; it is kept. At most 200 characters.

        Raises:
            BudgetNotFound: There is no such budget, or nothing is left in its window.
        """
        return self._call(_calls.reset_budget(name, reason))

    def reserve(  # noqa: PLR0913 - each is part of the question
        self,
        token: str,
        *,
        division: str = "",
        endpoint: str = "",
        kind: _calls.CallKind = "call",
        count: int = 1,
        ttl_seconds: float = 60.0,
        wait_seconds: float = 0.0,
    ) -> budget_pb2.Reservation:
        """Take room for a call from every budget that it would count in, or from none.

        Commit or cancel it; `budget_guard` does so by itself. Interrupted it gives the room back.

        Args:
            token: `apps/{app}/tokens/{token}`; its policy says what is limited.
            division: The provider's name of a company; found in the endpoint if that has it.
            endpoint: The path or URL of the call.
            kind: "call", or "token_request" for the provider's token endpoint.
            count: How many calls.
            ttl_seconds: When it counts as a call that failed unless it is committed or cancelled
                before: 1 s to 1 h, longer than the call takes.
            wait_seconds: How long to wait for room; 0 answers at once.

        Raises:
            BudgetSpent: There is no room within the wait; `retry_after_seconds` says when.
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong.
            TooManyBudgets: The app has too many different scopes.
            Unavailable: The coordinator could not be reached within the wait, nor for some
                seconds.
            ValueError: `kind` is none of these, or `count` is not positive.
        """
        where = _calls.scope(token, division, endpoint)
        request = _calls.reserve_request(where, kind, count, ttl_seconds)
        reserving = Reserving(request, wait_seconds, boottime_ns())
        try:
            while True:
                try:
                    return reserving.received(self._call(_calls.reserve(request)))
                except HoldoffError as error:
                    time.sleep(reserving.failed(error, boottime_ns()))
        except BaseException as error:
            if reserving.may_stand(error):
                patience = withdrawal_patience(boottime_ns())
                with contextlib.suppress(HoldoffError):
                    self._insist(_calls.give_up(request), patience)
            raise

    def commit(
        self, token: str, reservation_id: str, *, status: int, age_seconds: float = 0.0
    ) -> budget_pb2.Reservation:
        """Say that the call of a reservation was made; a second time changes nothing.

        Tried for some seconds while the coordinator is away.

        Args:
            token: The token that it was reserved for.
            reservation_id: `id` of the reservation.
            status: HTTP status of the answer; 0 when there was none, which counts as an error.
            age_seconds: How long ago the call was made.

        Raises:
            ReservationNotFound: There is no such reservation, or it is long over.
            InvalidRequest: An argument is wrong.
            Unavailable: The coordinator could not be told: it expires, and counts.
        """
        call = _calls.commit(token, reservation_id, status, age_seconds)
        _, reservation = self._insist(call, report_patience(boottime_ns()))
        return reservation

    def cancel(self, token: str, reservation_id: str) -> budget_pb2.Reservation:
        """Say that the call of a reservation was not made, so that its room is given back.

        Tried for some seconds while the coordinator is away. What was committed or has expired
        stays so: look at the `state`.

        Args:
            token: The token that it was reserved for.
            reservation_id: `id` of the reservation.

        Raises:
            ReservationNotFound: There is no such reservation, or it is long over.
            Unavailable: The coordinator could not be told: it expires, and counts.
        """
        call = _calls.cancel(token, reservation_id)
        _, reservation = self._insist(call, report_patience(boottime_ns()))
        return reservation

    def budget_guard(  # noqa: PLR0913 - each is part of the question
        self,
        token: str,
        *,
        division: str = "",
        endpoint: str = "",
        kind: _calls.CallKind = "call",
        count: int = 1,
        ttl_seconds: float = 60.0,
        wait_seconds: float = 0.0,
    ) -> BudgetGuard:
        """Guard a call: room is taken before it, and what became of it is counted.

        ::

            with client.budget_guard(TOKEN, endpoint="/api/v1/1/crm/Accounts") as guard:
                response = requests.get(url, timeout=30)
                guard.status = response.status_code

        Without a status the call counts as answered with 200 where the body ends, and as failed
        where it raises. `guard.cancel()` says that no call was made. As a decorator it gives the
        function a guard of its own, as its first argument, for each time that it runs.

        Args:
            token: `apps/{app}/tokens/{token}`; its policy says what is limited.
            division: The provider's name of a company; found in the endpoint if that has it.
            endpoint: The path or URL of the call.
            kind: "call", or "token_request" for the provider's token endpoint.
            count: How many calls.
            ttl_seconds: When it counts as a call that failed unless the body has ended before:
                1 s to 1 h, longer than the call takes.
            wait_seconds: How long to wait for room on entering; 0 does not wait.

        Raises:
            BudgetSpent: On entering: there is no room within the wait.
            HoldoffError: On entering, as `reserve` does; on leaving if the status is none of
                HTTP. A coordinator that is away then is no error: the call counts as failed.
        """
        reserve = partial(
            self.reserve,
            token,
            division=division,
            endpoint=endpoint,
            kind=kind,
            count=count,
            ttl_seconds=ttl_seconds,
            wait_seconds=wait_seconds,
        )
        return BudgetGuard(self, token, reserve)

    def _items(self, call: _calls.Call[Any, _calls.Page[ItemT]] | None) -> Iterator[ItemT]:
        while call:
            page = self._call(call)
            yield from page.items
            call = page.following

    def _insist(self, call: _calls.Call[Any, ResultT], patience: Patience) -> tuple[int, ResultT]:
        """Repeat a call while it is unavailable; return when it was sent, and its answer."""
        while True:
            sent_ns = boottime_ns()
            try:
                return sent_ns, self._call(call)
            except HoldoffError as error:
                time.sleep(patience.failed(error, boottime_ns()))

    def _call(self, call: _calls.Call[Any, ResultT]) -> ResultT:
        method = self._channel.unary_unary(
            call.method,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.response.FromString,
        )
        with _translated(self.endpoint):
            response = method(call.request, timeout=call.timeout_seconds or self._timeout_seconds)
        return call.read(response)


@contextlib.contextmanager
def _translated(endpoint: str) -> Iterator[None]:
    """Turn gRPC's errors into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, endpoint) from None


class _Conversation:
    """One stream of an acquisition. Leaving it without a lease gives up the place."""

    def __init__(self, client: Client, acquisition: Acquisition) -> None:
        self._client = client
        self._acquisition = acquisition
        self._outbox: queue.SimpleQueue[lease_service_pb2.StreamAcquireLeaseRequest | None] = (
            queue.SimpleQueue()
        )

    def __enter__(self) -> Self:
        now_ns = boottime_ns()
        first = self._acquisition.request(now_ns)
        self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(acquire=first))
        self._stream = self._client._leases.StreamAcquireLease(  # noqa: SLF001
            self._requests(), timeout=self._acquisition.stream_timeout_seconds(now_ns)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, HoldoffError):
            self._withdraw()
        self._outbox.put(None)
        self._stream.cancel()

    def _withdraw(self) -> None:
        """Give up the place, and give the coordinator a moment to hear of it."""
        withdrawal = lease_service_pb2.Withdrawal()
        self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(withdraw=withdrawal))
        give_up_ns = boottime_ns() + round(WITHDRAWAL_SECONDS * SECOND)
        while self._stream.is_active() and boottime_ns() < give_up_ns:
            time.sleep(0.01)

    def _requests(self) -> Iterator[lease_service_pb2.StreamAcquireLeaseRequest]:
        heartbeat = lease_service_pb2.StreamAcquireLeaseRequest(
            heartbeat=lease_service_pb2.Heartbeat()
        )
        while True:
            try:
                message = self._outbox.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                message = heartbeat
            if message is None:
                return
            yield message

    def receive(self) -> lease_pb2.WaitStatus | lease_service_pb2.LeaseOffer:
        """Return the next event.

        Raises:
            HoldoffError: The request failed, or the conversation did.
        """
        with _translated(self._client.endpoint):
            response = next(self._stream, None)
        if response is None:
            raise Unavailable("the coordinator ended the conversation")
        return self._acquisition.received(response.event)


class HeldLease(Held):
    """A lease that this process holds, renewed in the background until it is released.

    Use it as a context manager: leaving it releases the lease, and raises LeaseLost if it was
    lost in the meantime.
    """

    def __init__(
        self,
        client: Client,
        offer: lease_service_pb2.LeaseOffer,
        renewals: Renewals,
        on_renewed: Callable[[int], None] | None,
        on_lost: Callable[[LeaseLost], None] | None,
    ) -> None:
        super().__init__(offer, renewals, on_renewed, on_lost)
        self._client = client
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._renew_on, name="holdoff-renewal", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.release()
            return
        with contextlib.suppress(HoldoffError):
            self.release()

    def command_started(self) -> None:
        """Tell the coordinator, soon, that the command under the lease has started.

        Where the policy's `refresh_at` is START, that instant counts as the refresh.
        """
        with self._changed:
            super().command_started()
            self._changed.notify()

    def release(
        self, *, last_refresh_age_seconds: float | None = None, saw_every_refresh: bool = False
    ) -> None:
        """End the lease.

        Args:
            last_refresh_age_seconds: Time since the last refresh under this lease.
            saw_every_refresh: The caller saw *every* refresh that was made under this lease;
                without it the end of the lease counts as the last one.

        Raises:
            LeaseLost: The lease was lost before.
            Unavailable: The coordinator could not be told; the lease runs out by itself.
        """
        self._stop()
        call = _calls.release_lease(
            self._offer, last_refresh_age_seconds, saw_every_refresh=saw_every_refresh
        )
        try:
            # Also when it was broken: that confirms that nothing runs under it any more.
            self._client._insist(call, self._renewals.release_patience(boottime_ns()))  # noqa: SLF001
        except HoldoffError:
            if self._renewals.lost is None:
                raise
        if self._renewals.lost is not None:
            raise self._renewals.lost

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _renew_on(self) -> None:
        try:
            while self._sleep_until_due():
                self._renew()
        except LeaseLost as error:
            self._lose(error)
        except Exception as error:  # what a callback raised, or a channel closed under us
            log.exception("renewals of %s ended", self.name)
            self._lose(LeaseLost(f"its renewals ended: {error}"))

    def _sleep_until_due(self) -> bool:
        """Sleep until the next renewal (True), or until the lease is to be given back (False)."""
        with self._changed:
            while not self._stopped:
                pause_seconds = self._renewals.pause_seconds(boottime_ns())
                if pause_seconds <= 0:
                    return True
                self._changed.wait(pause_seconds)
            return False

    def _renew(self) -> None:
        with self._changed:
            renewal = self._renewals.begin(boottime_ns())
        try:
            self._client._call(self._renewal_call(renewal))  # noqa: SLF001
        except HoldoffError as error:
            with self._changed:
                self._not_renewed(error)
            return
        with self._changed:
            self._renewals.succeeded(renewal)
        if self._on_renewed:
            self._on_renewed(self.deadline_ns)


class BudgetGuard(Guarding):
    """Room for one call, taken on entering and settled on leaving: see `Client.budget_guard`."""

    def __init__(
        self, client: Client, token: str, reserve: Callable[[], budget_pb2.Reservation]
    ) -> None:
        super().__init__(token)
        self._client = client
        self._reserve = reserve

    def __enter__(self) -> Self:
        with self._entering():
            self.reservation = self._reserve()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        call = self._settlement(error)
        try:
            self._client._insist(call, report_patience(boottime_ns()))  # noqa: SLF001
        except HoldoffError as lost:
            self._unsettled(lost, error)

    def __call__(
        self, function: Callable[Concatenate[BudgetGuard, ParamsT], ResultT]
    ) -> Callable[ParamsT, ResultT]:
        """Guard every call of a function, which gets the guard as its first argument.

        Raises:
            TypeError: It is a coroutine function; `holdoff.aio` guards those.
        """
        if inspect.iscoroutinefunction(function):
            raise TypeError("a coroutine function needs the guard of holdoff.aio.Client")

        @wraps(function)
        def guarded(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
            with BudgetGuard(self._client, self._token, self._reserve) as guard:
                return function(guard, *args, **kwargs)

        return guarded
