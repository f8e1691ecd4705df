"""The synchronous client: sockets, threads and clocks around `holdoff._core`."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc

from holdoff._core import (
    DEFAULT_TTL_SECONDS,
    HEARTBEAT_SECONDS,
    SECOND,
    Acquisition,
    Renewals,
    Timing,
    duration,
    here,
)
from holdoff._platform import boottime_ns
from holdoff.errors import HoldoffError, LeaseLost, OfferExpired, Unavailable, from_rpc_error
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

log = logging.getLogger("holdoff")

DEFAULT_ENDPOINT = "127.0.0.1:50051"
ENDPOINT_VARIABLE = "HOLDOFF_ENDPOINT"

_OPTIONS = (
    ("grpc.enable_retries", 0),  # what may be repeated is decided in _core
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Find out about dead connections; liveness itself is told by heartbeat messages.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)

RELEASE_SECONDS = 10
"""How long a release is tried while the coordinator is away; then the lease runs out."""

ResponseT = TypeVar("ResponseT")


class Client:
    """A connection to a coordinator; use it as a context manager, or call `close`.

    Args:
        endpoint: `host:port`; by default `HOLDOFF_ENDPOINT`, else 127.0.0.1:50051.
        timeout_seconds: How long a call other than `acquire` may take.
    """

    def __init__(self, endpoint: str | None = None, *, timeout_seconds: float = 10.0) -> None:
        self.endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
        self._timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(self.endpoint, options=_OPTIONS)
        self._leases = lease_service_pb2_grpc.LeaseServiceStub(self._channel)
        self._tokens = token_service_pb2_grpc.TokenServiceStub(self._channel)
        self._admin = admin_service_pb2_grpc.AdminServiceStub(self._channel)
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
        last_fencing_token: int = 0,
        on_waiting: Callable[[lease_pb2.WaitStatus], None] | None = None,
        on_unreachable: Callable[[Unavailable], None] | None = None,
        on_renewed: Callable[[int], None] | None = None,
        on_lost: Callable[[LeaseLost], None] | None = None,
    ) -> HeldLease:
        """Wait for a lease on a token, accept it and keep it renewed.

        Args:
            token: `apps/{app}/tokens/{token}`.
            wait_seconds: How long to wait; 0 answers at once, None waits without limit.
            ttl_seconds: How long the lease lives without a renewal: 1 s to 24 h.
            grace_seconds: Time the holder needs to stop; by default min(10 s, TTL/3).
            job: Name of the job, for listings.
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
            holder=here(job),
            last_fencing_token=max(last_fencing_token, self._fencing_tokens.get(token, 0)),
            began_ns=boottime_ns(),
        )
        while True:
            try:
                with _Conversation(self, acquisition) as conversation:
                    for event in conversation:
                        if isinstance(event, lease_pb2.WaitStatus):
                            if on_waiting:
                                on_waiting(event)
                        elif sent_ns := self._accept(event):
                            self._fencing_tokens[token] = event.lease.fencing_token
                            renewals = Renewals(timing, sent_ns)
                            return HeldLease(self, event, renewals, on_renewed, on_lost)
                raise Unavailable("the coordinator ended the conversation")
            except HoldoffError as error:
                pause = acquisition.failed(error, boottime_ns())
                if on_unreachable and isinstance(error, Unavailable):
                    on_unreachable(error)
                time.sleep(pause)

    def _accept(self, offer: lease_service_pb2.LeaseOffer) -> int | None:
        """Accept an offer; return when that was sent, or None if it was too late.

        Interrupted in the middle it gives the lease back, accepted or not.
        """
        try:
            return self._accept_in_time(offer)
        except HoldoffError:
            raise
        except BaseException:
            with contextlib.suppress(HoldoffError):
                self._release(offer.lease.name, offer.secret, lease_service_pb2.RefreshReport())
            raise

    def _accept_in_time(self, offer: lease_service_pb2.LeaseOffer) -> int | None:
        give_up_ns = boottime_ns() + round(offer.accept_within.ToMicroseconds() * 1e3) + SECOND
        while True:
            sent_ns = boottime_ns()
            try:
                self._renew(offer.lease.name, offer.secret, timeout_seconds=1.0)
                return sent_ns
            except OfferExpired:
                return None
            except Unavailable:
                if boottime_ns() >= give_up_ns:
                    raise
                time.sleep(0.05)

    def _renew(
        self, name: str, secret: str, *, timeout_seconds: float, command_started: bool = False
    ) -> lease_pb2.Lease:
        request = lease_service_pb2.RenewLeaseRequest(
            name=name, secret=secret, command_started=command_started
        )
        return self._call(self._leases.RenewLease, request, timeout_seconds).lease

    def _release(
        self, name: str, secret: str, report: lease_service_pb2.RefreshReport
    ) -> lease_service_pb2.ReleaseLeaseResponse:
        request = lease_service_pb2.ReleaseLeaseRequest(name=name, secret=secret, refresh=report)
        return self._call(self._leases.ReleaseLease, request, timeout_seconds=3.0)

    def get_lease(self, name: str) -> lease_pb2.Lease:
        """Return a lease, also for an hour after its end.

        Raises:
            LeaseNotFound: There is no such lease.
        """
        request = lease_service_pb2.GetLeaseRequest(name=name)
        return self._call(self._leases.GetLease, request).lease

    def list_leases(self, parent: str = "") -> Iterator[lease_pb2.Lease]:
        """Yield the live leases of everything, an app, or a token."""
        request = lease_service_pb2.ListLeasesRequest(parent=parent)
        while True:
            page = self._call(self._leases.ListLeases, request)
            yield from page.leases
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def break_lease(self, name: str, reason: str) -> lease_pb2.Lease:
        """Forbid the renewal of a lease; the cooldown counts from when it ended.

        Args:
            name: `apps/{app}/tokens/{token}/leases/{lease}`.
            reason: Why; the holder is told. At most 200 characters.

        Raises:
            LeaseNotFound: There is no such lease.
            LeaseLost: It has ended already.
        """
        request = admin_service_pb2.BreakLeaseRequest(name=name, reason=reason)
        return self._call(self._admin.BreakLease, request).lease

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
        """
        request = token_service_pb2.CreateTokenRequest(
            token=_token(name, policy, refresh_interval_seconds, refresh_at)
        )
        if isinstance(last_refreshed, str):
            if last_refreshed not in ("never", "unknown"):
                raise ValueError('last_refreshed must be "never", "unknown" or an age in seconds')
            if last_refreshed == "unknown":
                request.last_refresh_unknown = True
        else:
            request.last_refresh_age.CopyFrom(duration(last_refreshed))
        return self._call(self._tokens.CreateToken, request).token

    def update_token(
        self,
        name: str,
        *,
        policy: str | None = None,
        refresh_interval_seconds: float | None = None,
        refresh_at: str | None = None,
    ) -> token_pb2.Token:
        """Change a token; None leaves a setting as it is. No running cooldown is shortened.

        Raises:
            TokenNotFound: There is no such token.
            PolicyNotFound: There is no such policy.
        """
        request = token_service_pb2.UpdateTokenRequest(
            token=_token(name, policy or "", refresh_interval_seconds, refresh_at)
        )
        for field, value in (
            ("policy", policy),
            ("refresh_interval", refresh_interval_seconds),
            ("refresh_at", refresh_at),
        ):
            if value is not None:
                request.update_mask.paths.append(field)
        if not request.update_mask.paths:
            return self.get_token(name)
        return self._call(self._tokens.UpdateToken, request).token

    def get_token(self, name: str) -> token_pb2.Token:
        """Return a token.

        Raises:
            TokenNotFound: There is no such token.
        """
        request = token_service_pb2.GetTokenRequest(name=name)
        return self._call(self._tokens.GetToken, request).token

    def list_tokens(self, parent: str = "") -> Iterator[token_pb2.Token]:
        """Yield all tokens, or those of an app."""
        request = token_service_pb2.ListTokensRequest(parent=parent)
        while True:
            page = self._call(self._tokens.ListTokens, request)
            yield from page.tokens
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Any, ResponseT],
        request: Any,
        timeout_seconds: float | None = None,
    ) -> ResponseT:
        try:
            return method(request, timeout=timeout_seconds or self._timeout_seconds)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.endpoint) from None


class _Conversation:
    """One stream of an acquisition. Leaving it without a lease gives up the place."""

    def __init__(self, client: Client, acquisition: Acquisition) -> None:
        self._client = client
        self._acquisition = acquisition
        self._outbox: queue.SimpleQueue[lease_service_pb2.StreamAcquireLeaseRequest | None] = (
            queue.SimpleQueue()
        )

    def __enter__(self) -> Self:
        first = self._acquisition.request(boottime_ns())
        self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(acquire=first))
        self._stream = self._client._leases.StreamAcquireLease(  # noqa: SLF001
            self._requests(),
            timeout=self._acquisition.stream_timeout_seconds(boottime_ns()),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, HoldoffError):
            # Interrupted: tell the coordinator, and give it a moment to hear of it.
            withdraw = lease_service_pb2.Withdrawal()
            self._outbox.put(lease_service_pb2.StreamAcquireLeaseRequest(withdraw=withdraw))
            give_up_ns = boottime_ns() + SECOND
            while self._stream.is_active() and boottime_ns() < give_up_ns:
                time.sleep(0.01)
        self._outbox.put(None)
        self._stream.cancel()

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

    def __iter__(self) -> Iterator[lease_pb2.WaitStatus | lease_service_pb2.LeaseOffer]:
        try:
            for response in self._stream:
                yield self._acquisition.received(response.event)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._client.endpoint) from None


class HeldLease:
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
        self.name = offer.lease.name
        """`apps/{app}/tokens/{token}/leases/{lease}`."""
        self.fencing_token = offer.lease.fencing_token
        """A number that rises with every lease of the token."""
        self._client = client
        self._secret = offer.secret
        self._renewals = renewals
        self._on_renewed = on_renewed
        self._on_lost = on_lost
        self._lost: LeaseLost | None = None
        self._command_started = False
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

    @property
    def deadline_ns(self) -> int:
        """When all must have stopped unless a renewal comes through, in ns of CLOCK_BOOTTIME."""
        return self._renewals.deadline_ns

    @property
    def remaining_seconds(self) -> float:
        """Time left until the deadline."""
        return (self.deadline_ns - boottime_ns()) / SECOND

    def check(self) -> None:
        """Raise LeaseLost if the lease was lost; call it before anything that needs the lease."""
        with self._changed:
            if self._lost is None:
                self._renewals.check(boottime_ns())
                return
            raise self._lost

    def command_started(self) -> None:
        """Tell the coordinator, soon, that the command under the lease has started.

        Where the policy's `refresh_at` is START, that instant counts as the refresh.
        """
        with self._changed:
            self._command_started = True
            self._renewals.next_ns = 0
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
        report = lease_service_pb2.RefreshReport(saw_every_refresh=saw_every_refresh)
        if last_refresh_age_seconds is not None:
            report.last_refresh_age.CopyFrom(duration(last_refresh_age_seconds))
        try:
            # Also when it was broken: that confirms that nothing runs under it any more.
            self._release_until_deadline(report)
        except HoldoffError:
            if self._lost is None:
                raise
        if self._lost is not None:
            raise self._lost

    def _release_until_deadline(self, report: lease_service_pb2.RefreshReport) -> None:
        """Release; a coordinator that is away only for a moment is not noticed."""
        give_up_ns = min(self.deadline_ns, boottime_ns() + RELEASE_SECONDS * SECOND)
        while True:
            try:
                self._client._release(self.name, self._secret, report)  # noqa: SLF001
                return
            except Unavailable:
                if boottime_ns() >= give_up_ns:
                    raise
                time.sleep(0.2)

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _renew_on(self) -> None:
        try:
            while self._wait_until_due():
                self._renew(started=self._command_started)
        except LeaseLost as error:
            self._lose(error)
        except Exception as error:  # what a callback raised, or a channel closed under us
            log.exception("renewals of %s ended", self.name)
            self._lose(LeaseLost(f"its renewals ended: {error}"))

    def _wait_until_due(self) -> bool:
        """Sleep until the next renewal (True), or until the lease is to be given back (False)."""
        with self._changed:
            while not self._stopped:
                pause_ns = self._renewals.next_ns - boottime_ns()
                if pause_ns <= 0:
                    return True
                # Short, since a wait on the monotonic clock sleeps through a suspend.
                self._changed.wait(min(pause_ns / SECOND, 1.0))
            return False

    def _lose(self, error: LeaseLost) -> None:
        with self._changed:
            self._lost = error
        log.warning("lease %s is lost: %s", self.name, error)
        if self._on_lost:
            self._on_lost(error)

    def _renew(self, *, started: bool) -> None:
        sent_ns = boottime_ns()
        left_seconds = max(0.05, (self.deadline_ns - sent_ns) / SECOND)
        timeout_seconds = min(self._renewals.timing.call_seconds, left_seconds)
        try:
            self._client._renew(  # noqa: SLF001
                self.name, self._secret, timeout_seconds=timeout_seconds, command_started=started
            )
        except HoldoffError as error:
            with self._changed:
                self._renewals.failed(error, boottime_ns())
            log.info("renewal of %s failed, trying again: %s", self.name, error)
            return
        with self._changed:
            self._renewals.succeeded(sent_ns)
            if self._command_started and not started:
                self._renewals.next_ns = 0
        if self._on_renewed:
            self._on_renewed(self.deadline_ns)


def _token(
    name: str, policy: str, refresh_interval_seconds: float | None, refresh_at: str | None
) -> token_pb2.Token:
    if refresh_at not in (None, "end", "start"):
        raise ValueError('refresh_at must be "end" or "start"')
    interval = None if refresh_interval_seconds is None else duration(refresh_interval_seconds)
    return token_pb2.Token(
        name=name,
        policy=policy,
        refresh_interval=interval,
        refresh_at=token_pb2.RefreshAt.Value(f"REFRESH_AT_{(refresh_at or 'unspecified').upper()}"),
    )
