"""The synchronous client: sockets, threads and clocks around `holdoff._core`.

`holdoff.aio` is the same with an event loop in the place of threads.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

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
    Timing,
    Watching,
    acceptance_patience,
    here,
)
from holdoff._endpoint import endpoint_of, target
from holdoff._held import Held
from holdoff._platform import boottime_ns
from holdoff.errors import HoldoffError, LeaseLost, OfferExpired, Unavailable, from_rpc_error
from holdoff.v1 import lease_pb2, lease_service_pb2, lease_service_pb2_grpc, token_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from datetime import datetime
    from types import TracebackType

log = logging.getLogger("holdoff")

ItemT = TypeVar("ItemT")
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
            return self._insist(_calls.renew_lease(offer), patience)
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

    def _items(self, call: _calls.Call[Any, _calls.Page[ItemT]] | None) -> Iterator[ItemT]:
        while call:
            page = self._call(call)
            yield from page.items
            call = page.following

    def _insist(self, call: _calls.Call[Any, Any], patience: Patience) -> int:
        """Repeat a call while it is unavailable; return when the one that was answered was sent."""
        while True:
            sent_ns = boottime_ns()
            try:
                self._call(call)
                return sent_ns
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
