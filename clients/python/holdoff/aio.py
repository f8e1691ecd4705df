"""The client for asyncio: the names, arguments and promises of `holdoff.Client`.

::

    async with holdoff.aio.Client() as client:
        async with await client.acquire("apps/exact-nl/tokens/finance") as lease:
            ...  # renewed by a task of the event loop
            lease.check()  # raises holdoff.LeaseLost

Everything runs in one event loop, and callbacks are plain functions that it calls. A loop that is
blocked sends no renewals: `HeldLease.check` then says that the lease is lost, in time.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Self, TypeVar

from holdoff._forks import import_grpc_for_asyncio

import_grpc_for_asyncio()  # before the imports below import it

# ruff: noqa: E402
from holdoff import _calls
from holdoff._aio_connection import Connection
from holdoff._aio_lease import Conversation, HeldLease
from holdoff._core import (
    Acquisition,
    BudgetWatching,
    Renewals,
    Reserving,
    Watching,
    acceptance_patience,
    here,
    report_patience,
    withdrawal_patience,
)
from holdoff._endpoint import tls_of
from holdoff._guarding import Guarding
from holdoff._held import Callbacks
from holdoff._platform import boottime_ns
from holdoff._timing import DEFAULT_TTL_SECONDS, Timing
from holdoff.custody.aio_access_tokens import AccessToken, Streams
from holdoff.custody.aio_grants import Grants
from holdoff.errors import HoldoffError, LeaseLost, LeaseNotFound, OfferExpired, Unavailable
from holdoff.v1 import (
    audit_pb2,
    budget_pb2,
    budget_service_pb2,
    lease_pb2,
    lease_service_pb2,
    policy_pb2,
    token_pb2,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Mapping,
        Sequence,
    )
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    from holdoff.custody.access import Usable

__all__ = ["AccessToken", "BudgetGuard", "Client", "HeldLease"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class Client(Connection):
    """A connection to a coordinator; use it as an async context manager, or call `close`.

    It belongs to the event loop in which it is made.

    Args:
        endpoint: `host:port`, or several addresses with commas in between; it begins at any
            of them, and moves to the next when one does not serve. By default `HOLDOFF_ENDPOINT`,
            else 127.0.0.1:50051.
        timeout_seconds: How long a call other than `acquire` may take.
        ca_file: Authorities (PEM) that the coordinator's certificate may come from; by default
            `HOLDOFF_CA_FILE`. Without it there is no TLS.
        cert_file: Our certificate (PEM), where the coordinator asks for one; by default
            `HOLDOFF_CERT_FILE`.
        key_file: Its key (PEM); by default `HOLDOFF_KEY_FILE`.
        credential_file: File with the credential that says who we are, read anew for each call; by
            default `HOLDOFF_CREDENTIAL_FILE`. Over a network it is sent by TLS only.

    Raises:
        RuntimeError: No event loop is running.
        ValueError: That is no endpoint; files that are of no use.
    """

    def __init__(  # noqa: PLR0913 - how to get there, and who we are
        self,
        endpoint: str | None = None,
        *,
        timeout_seconds: float = 10.0,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
        credential_file: str | Path | None = None,
    ) -> None:
        tls = tls_of(ca_file, cert_file, key_file)
        super().__init__(
            endpoint,
            timeout_seconds=timeout_seconds,
            tls=tls,
            credential_file=credential_file,
        )
        self._fencing_tokens: dict[str, int] = {}
        self._access_tokens = Streams(self)

    @property
    def grants(self) -> Grants:
        """The OAuth grants that the coordinator keeps in custody."""
        return Grants(self)

    def access_token(
        self,
        token: str,
        *,
        on_renewed: Callable[[Usable], None] | None = None,
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> AccessToken:
        """Keep the access token of a token in custody current, until it is closed.

        ::

            async with client.access_token("apps/exact-nl/tokens/finance") as access:
                headers = {"Authorization": f"Bearer {await access.current()}"}

        It is renewed in the background, also over other connections. All of one token share one
        stream to the coordinator.

        Args:
            token: `apps/{app}/tokens/{token}`.
            on_renewed: Called with each access token that comes, and before this returns if there
                is one already. Runs in the event loop, so it must be quick.
            on_unreachable: Called whenever the coordinator cannot be reached; it retries.

        Raises:
            InvalidRequest: The access token would be sent over a network without TLS.
        """
        return AccessToken(self._access_tokens, token, on_renewed, on_unreachable)

    async def acquire(  # noqa: PLR0913 - each is part of the question
        self,
        token: str,
        *,
        wait_seconds: float | None = None,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        grace_seconds: float | None = None,
        job: str = "",
        labels: Mapping[str, str] | None = None,
        last_fencing_token: int = 0,
        scopes: Sequence[tuple[str, str]] = (),
        on_waiting: Callable[[lease_pb2.WaitStatus], None] | None = None,
        on_unreachable: Callable[[Unavailable], None] | None = None,
        on_renewed: Callable[[int], None] | None = None,
        on_lost: Callable[[LeaseLost], None] | None = None,
        on_notice: Callable[[lease_service_pb2.FollowLeaseResponse], None] | None = None,
    ) -> HeldLease:
        """Wait for a lease on a token, accept it and keep it renewed.

        Cancelled in the wait it leaves the queue, and releases a lease that was being accepted,
        before it ends. So `asyncio.timeout` around it is safe; `wait_seconds` also gives a reason.

        Args:
            token: `apps/{app}/tokens/{token}`.
            wait_seconds: How long to wait; 0 answers at once, None waits without limit.
            ttl_seconds: How long the lease lives without a renewal: 1 s to 24 h.
            grace_seconds: Time the holder needs to stop; by default min(10 s, TTL/3).
            job: Name of the job, for listings.
            labels: More information, for listings. At most 16; keys of lower case
                letters, digits and `._/-`, values of at most 200 characters.
            last_fencing_token: The highest fencing token seen for this token, if it was kept.
            scopes: Where the job will call, as pairs of a division and an endpoint, such as
                `[("535193", "crm/Accounts")]`: the request waits while these back off, and others
                go first meanwhile. An empty text is an unknown value: it means the scopes where
                jobs of the same name caused errors in the last week. At most 100.
            on_waiting: Called with what the request waits for, whenever that changes.
            on_unreachable: Called whenever the coordinator cannot be reached; the wait continues.
            on_renewed: Called with the new deadline, in ns of CLOCK_BOOTTIME. Runs in the event
                loop, so it must be quick.
            on_lost: Called once if the lease is lost. Runs in the event loop.
            on_notice: Called with what the holder must do, continue or back off, when that changes
                and from time to time. Runs in the event loop, so it must be quick.

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
            scopes=scopes,
        )
        callbacks = Callbacks(on_renewed, on_lost, on_notice)
        while True:
            try:
                async with Conversation(self, acquisition) as conversation:
                    while True:
                        event = await conversation.receive()
                        if isinstance(event, lease_pb2.WaitStatus):
                            if on_waiting:
                                on_waiting(event)
                        elif lease := await self._accept(event, timing, callbacks):
                            self._fencing_tokens[token] = lease.fencing_token
                            return lease
            except HoldoffError as error:
                pause = acquisition.failed(error, boottime_ns())
                if on_unreachable and isinstance(error, Unavailable):
                    on_unreachable(error)
                await asyncio.sleep(pause)

    async def _accept(
        self, offer: lease_service_pb2.LeaseOffer, timing: Timing, callbacks: Callbacks
    ) -> HeldLease | None:
        """Accept an offer; return the lease, or None if there is no such offer any more.

        It ran out, or a failover of the store lost it; the request waits on.

        Interrupted in the middle it gives the lease back unused, accepted or not.
        """
        patience = acceptance_patience(offer, boottime_ns())
        try:
            sent_ns, _ = await self._insist(_calls.renew_lease(offer), patience)
            return HeldLease(self, offer, Renewals(timing, sent_ns), callbacks)
        except (OfferExpired, LeaseNotFound):
            return None
        except HoldoffError:
            raise
        except BaseException:
            release = _calls.release_lease(offer, unused=True)
            patience = withdrawal_patience(boottime_ns())
            with contextlib.suppress(HoldoffError):
                await self._unhindered(lambda: self._insist(release, patience))
            raise

    async def get_lease(self, name: str) -> lease_pb2.Lease:
        """Return a lease; an ended one as long as it is in the history of its token.

        Raises:
            LeaseNotFound: There is no such lease.
        """
        return await self._call(_calls.get_lease(name))

    def list_leases(self, parent: str = "") -> AsyncIterator[lease_pb2.Lease]:
        """Yield the live leases of everything, an app, or a token."""
        return self._items(_calls.list_leases(parent))

    async def list_lease_history(
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
        return await self._call(_calls.list_lease_history(token, at))

    async def list_waiters(self, token: str) -> list[lease_pb2.Waiter]:
        """Return who waits for a token, in the order of their positions.

        Raises:
            TokenNotFound: There is no such token.
        """
        return await self._call(_calls.list_waiters(token))

    async def get_policy(self, name: str) -> policy_pb2.Policy:
        """Return a policy: the rules of a provider.

        Raises:
            PolicyNotFound: There is no such policy.
        """
        return await self._call(_calls.get_policy(name))

    async def list_policies(self) -> list[policy_pb2.Policy]:
        """Return all policies that the coordinator knows, by name."""
        return await self._call(_calls.list_policies())

    def watch_leases(
        self,
        parent: str = "",
        *,
        resume_token: str = "",
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> AsyncGenerator[lease_service_pb2.WatchLeasesResponse, None]:
        """Yield the current state, then every change, forever.

        It reconnects by itself and continues where it was, so that no change is missed. A snapshot
        replaces earlier data about its app; one may come at any time. Close the iterator, with
        `contextlib.aclosing`, or cancel its task, to end the watch.

        Args:
            parent: Only this app or token; empty for everything.
            resume_token: The last one that an earlier watch of the same parent yielded.
            on_unreachable: Called whenever the coordinator cannot be reached; the watch continues.

        Raises:
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong.
        """
        watching = Watching(parent, resume_token)
        return self._listen(
            watching,
            lambda line: line.leases.WatchLeases(watching.request(), metadata=self._metadata()),
            on_unreachable,
        )

    async def break_lease(self, name: str, reason: str) -> lease_pb2.Lease:
        """Forbid the renewal of a lease; the cooldown counts from when it ended.

        Args:
            name: `apps/{app}/tokens/{token}/leases/{lease}`.
            reason: Why; shown to the holder. At most 200 characters.

        Raises:
            LeaseNotFound: There is no such lease.
            LeaseLost: It has ended already.
        """
        return await self._call(_calls.break_lease(name, reason))

    def list_audit_events(
        self, parent: str = "", kinds: Sequence[audit_pb2.AuditKind.ValueType] = ()
    ) -> AsyncIterator[audit_pb2.AuditEvent]:
        """List who did what, the newest first.

        Args:
            parent: `apps/{app}`, a token's name, or everything if empty.
            kinds: Only these; all if empty.

        Raises:
            Refused: This caller is not an admin there.
        """
        return self._items(_calls.list_audit_events(parent, kinds))

    async def create_token(
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
        return await self._call(
            _calls.create_token(name, policy, refresh_interval_seconds, refresh_at, last_refreshed)
        )

    async def update_token(
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
        return await self._call(
            _calls.update_token(name, policy, refresh_interval_seconds, refresh_at)
        )

    async def get_token(self, name: str) -> token_pb2.Token:
        """Return a token.

        Raises:
            TokenNotFound: There is no such token.
        """
        return await self._call(_calls.get_token(name))

    def list_tokens(self, parent: str = "") -> AsyncIterator[token_pb2.Token]:
        """Yield all tokens, or those of an app."""
        return self._items(_calls.list_tokens(parent))

    async def record_events(
        self, events: Sequence[budget_pb2.Event]
    ) -> list[budget_pb2.EventOutcome.ValueType]:
        """Count events of one app, each once however often it is reported.

        Tried for some seconds while the coordinator is away; the same events may be reported
        again after that.

        Args:
            events: Each with an id of its own. They are sent in their order, 100 at a time.

        Returns:
            How each was taken, in their order.

        Raises:
            Unavailable: The coordinator could not be reached.
            TokenNotFound: There is no such token.
            EventTooOld: An event happened more than a day ago.
            InvalidRequest: An event is wrong; none of its hundred counts, nor any after them.
            TooManyEvents: The token has too many events to remember.
        """
        return await self._report(events)

    async def record_error(  # noqa: PLR0913 - each is part of the event
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
            division: The provider's name of a company; by default that in the path.
            endpoint: The path or URL of the call.
            status: HTTP status; 0 when it is not known, which counts.
            count: How often it happened: at most 10,000.
            job: Name of the job, shown with the error.
            age_seconds: How long ago: at most a day.
            event_id: A UUID version 4, for a report that may be repeated; by default a new one.

        Returns:
            Whether it is counted, was counted before, or is not limited.

        Raises:
            Unavailable: The coordinator could not be reached.
            TokenNotFound: There is no such token.
            EventTooOld: It happened more than a day ago.
            InvalidRequest: An argument is wrong.
            TooManyEvents: The token has too many events to remember.
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
        [outcome] = await self.record_events([event])
        return outcome

    async def record_block(  # noqa: PLR0913 - each is part of the event
        self,
        token: str,
        *,
        division: str = "",
        endpoint: str = "",
        status: int = 0,
        retry_after_seconds: float | None = None,
        throttle: str = "",
        job: str = "",
        age_seconds: float = 0.0,
        sent_age_seconds: float | None = None,
        event_id: str | None = None,
    ) -> budget_pb2.EventOutcome.ValueType:
        """Report that the provider refused a call because it blocks or throttles calls.

        All callers in the scope back off from then on. Retried for some seconds while the
        coordinator cannot be reached.

        Args:
            token: `apps/{app}/tokens/{token}`; its policy says which scope backs off, and
                for how long at most.
            division: The provider's name of a company; by default that in the path.
            endpoint: The path or URL of the call.
            status: HTTP status of the answer; 0 when it is not known.
            retry_after_seconds: How long it lasts, as the provider said; None where it said
                nothing, which means what the policy says.
            throttle: The policy's name of the throttle that it was recognised by; empty for its
                block.
            job: Name of the job, shown with the back-off.
            age_seconds: How long ago: at most a day.
            sent_age_seconds: How long ago the refused call was sent, if that is known: one that
                was sent before the last block ended does not make a new one.
            event_id: A UUID version 4, for a report that may be repeated; by default a new one.

        Returns:
            Whether it was taken, was known before, or is not limited.

        Raises:
            Unavailable: The coordinator could not be reached.
            TokenNotFound: There is no such token.
            EventTooOld: It happened more than a day ago.
            InvalidRequest: An argument is wrong.
        """
        event = _calls.block_event(
            _calls.scope(token, division, endpoint),
            status=status,
            retry_after_seconds=retry_after_seconds,
            throttle=throttle,
            job=job,
            age_seconds=age_seconds,
            sent_age_seconds=sent_age_seconds,
            event_id=event_id,
        )
        [outcome] = await self.record_events([event])
        return outcome

    async def get_budget(self, name: str) -> budget_pb2.Budget:
        """Return a budget: how much of a limit is used in one scope.

        Raises:
            BudgetNotFound: There is no such budget, or nothing is left in its window.
        """
        return await self._call(_calls.get_budget(name))

    def list_budgets(
        self,
        parent: str = "",
        *,
        token: str = "",
        division: str = "",
        endpoint: str = "",
        state: _calls.BudgetState | None = None,
    ) -> AsyncIterator[budget_pb2.Budget]:
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

    async def reset_budget(self, name: str, reason: str) -> budget_pb2.Budget:
        """Discard what a budget counted; a late report does not count again.

        Args:
            name: `apps/{app}/budgets/{budget}`.
            reason: Why; recorded. At most 200 characters.

        Raises:
            BudgetNotFound: There is no such budget, or nothing is left in its window.
        """
        return await self._call(_calls.reset_budget(name, reason))

    def watch_budgets(
        self,
        parent: str = "",
        *,
        token: str = "",
        division: str = "",
        endpoint: str = "",
        on_unreachable: Callable[[Unavailable], None] | None = None,
    ) -> AsyncGenerator[budget_service_pb2.WatchBudgetsResponse, None]:
        """Yield all budgets and back-offs, then each that changed, forever.

        Each item replaces earlier data about it: a budget with nothing used or reserved is no
        longer in use, a back-off without a state is over. It reconnects by itself; then all
        current items follow again, and those that ended meanwhile. Close the iterator,
        with `contextlib.aclosing`, or cancel its task, to end the watch.

        Args:
            parent: Only those of this app, `apps/{app}`; empty for everything.
            token: Only those whose scope has this token.
            division: Only those whose scope has this division.
            endpoint: Only those whose scope has this endpoint.
            on_unreachable: Called whenever the coordinator cannot be reached; the watch continues.

        Raises:
            InvalidRequest: An argument is wrong.
        """
        watching = BudgetWatching(parent, _calls.scope(token, division, endpoint))
        return self._listen(
            watching,
            lambda line: line.budgets.WatchBudgets(watching.request(), metadata=self._metadata()),
            on_unreachable,
        )

    async def list_back_offs(self, parent: str = "") -> list[budget_pb2.BackOff]:
        """Return the back-offs that are not over, of everything or an app; the longest first."""
        return await self._call(_calls.list_back_offs(parent))

    async def set_back_off(
        self,
        token_or_app: str,
        length_seconds: float,
        reason: str,
        *,
        division: str = "",
        endpoint: str = "",
    ) -> budget_pb2.BackOff:
        """Make all callers in a scope back off for a time; this user is recorded with it.

        A second time with the same scope replaces the first one.

        Args:
            token_or_app: `apps/{app}`, or `apps/{app}/tokens/{token}`.
            length_seconds: For how long: 1 s to 31 d.
            reason: Why; shown to all who wait. At most 200 characters.
            division: Only in this division.
            endpoint: Only for calls of this endpoint: a path or URL.

        Raises:
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong.
        """
        where = _calls.scope_of(token_or_app, division, endpoint)
        return await self._call(_calls.set_back_off(where, length_seconds, reason))

    async def clear_back_off(self, name: str, reason: str) -> budget_pb2.BackOff:
        """Clear a back-off; its callers resume one by one.

        Args:
            name: `apps/{app}/backOffs/{back_off}`.
            reason: Why; recorded with this user. At most 200 characters.

        Raises:
            BackOffNotFound: There is no such back-off, or it is over.
        """
        return await self._call(_calls.clear_back_off(name, reason))

    async def list_quarantines(self, parent: str = "") -> list[lease_pb2.Quarantine]:
        """Return the quarantines of all apps, or that of an app; those that end last first."""
        return await self._call(_calls.list_quarantines(parent))

    async def end_quarantine(self, app: str, reason: str) -> lease_pb2.Quarantine:
        """End a quarantine, so that new leases are granted at once.

        What the store may have lost is then at risk, as `at_risk` of the quarantine says.

        Args:
            app: `apps/{app}`.
            reason: Why; it is kept, with this user. At most 200 characters.

        Raises:
            QuarantineNotFound: The app is not in quarantine.
        """
        return await self._call(_calls.end_quarantine(app, reason))

    async def explain(
        self, token_or_app: str, *, division: str = "", endpoint: str = "", job: str = ""
    ) -> budget_service_pb2.ExplainResponse:
        """Return whether a job may start now: if not, every reason, until when, and who caused it.

        Args:
            token_or_app: `apps/{app}/tokens/{token}`, or `apps/{app}` for a whole app.
            division: Where it calls.
            endpoint: What it calls: a path or URL.
            job: Its name; without an endpoint, the scopes where jobs of this name caused errors in
                the last week are considered too.

        Raises:
            TokenNotFound: There is no such token.
            InvalidRequest: An argument is wrong.
        """
        return await self._call(
            _calls.explain(_calls.scope_of(token_or_app, division, endpoint), job)
        )

    async def reserve(  # noqa: PLR0913 - each is part of the question
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

        Commit or cancel it; `budget_guard` does so by itself. Cancelled it gives the room back.

        Args:
            token: `apps/{app}/tokens/{token}`; its policy says what is limited.
            division: The provider's name of a company; by default that in the path.
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
            TooManyEvents: The token has too many events to remember.
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
                    return reserving.received(await self._call(_calls.reserve(request)))
                except HoldoffError as error:
                    await asyncio.sleep(reserving.failed(error, boottime_ns()))
        except BaseException as error:
            if reserving.may_stand(error):
                patience = withdrawal_patience(boottime_ns())
                with contextlib.suppress(HoldoffError):
                    await self._unhindered(lambda: self._insist(_calls.give_up(request), patience))
            raise

    async def commit(
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
        _, reservation = await self._insist(call, report_patience(boottime_ns()))
        return reservation

    async def cancel(self, token: str, reservation_id: str) -> budget_pb2.Reservation:
        """Say that the call of a reservation was not made, so that its room is released.

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
        _, reservation = await self._insist(call, report_patience(boottime_ns()))
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

            async with client.budget_guard(TOKEN, endpoint="/api/v1/1/crm/Accounts") as guard:
                async with session.get(url) as response:
                    guard.status = response.status

        Without a status the call counts as answered with 200 where the body ends. Where it raises
        nobody knows when the call arrived: it counts as failed when the reservation runs out.
        `guard.cancel()` says that no call was made. As a decorator it gives the function a guard
        of its own, as its first argument, for each time that it runs.

        Args:
            token: `apps/{app}/tokens/{token}`; its policy says what is limited.
            division: The provider's name of a company; by default that in the path.
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


class BudgetGuard(Guarding):
    """Room for one call, taken on entering and settled on leaving: see `Client.budget_guard`."""

    def __init__(
        self, client: Client, token: str, reserve: Callable[[], Awaitable[budget_pb2.Reservation]]
    ) -> None:
        super().__init__(token)
        self._client = client
        self._reserve = reserve

    async def __aenter__(self) -> Self:
        with self._entering():
            self.reservation = await self._reserve()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        call = self._settlement(error)
        if call is None:
            return
        insist = partial(self._client._insist, call, report_patience(boottime_ns()))  # noqa: SLF001
        try:
            await self._client._unhindered(insist)  # noqa: SLF001
        except HoldoffError as lost:
            self._unsettled(lost, error)

    def __call__(
        self, function: Callable[Concatenate[BudgetGuard, ParamsT], Awaitable[ResultT]]
    ) -> Callable[ParamsT, Coroutine[Any, Any, ResultT]]:
        """Guard every call of a coroutine function, which gets the guard as its first argument."""

        @wraps(function)
        async def guarded(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
            async with BudgetGuard(self._client, self._token, self._reserve) as guard:
                return await function(guard, *args, **kwargs)

        return guarded
