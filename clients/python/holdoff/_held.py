"""The part of a held lease that both clients share: all but waiting and sending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdoff import _calls
from holdoff._answered import event_of
from holdoff._core import LONGEST_SLEEP_SECONDS
from holdoff._forks import Owner
from holdoff._log import log
from holdoff._platform import boottime_ns
from holdoff._proof import lease_proof, secret_hash
from holdoff._timing import SECOND
from holdoff.errors import LeaseEnded, LeaseLost
from holdoff.v1 import budget_pb2, lease_pb2, lease_service_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdoff._core import Renewal, Renewals
    from holdoff._recognise import Headers
    from holdoff.errors import HoldoffError


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the holder wants to be told."""

    on_renewed: Callable[[int], None] | None = None
    on_lost: Callable[[LeaseLost], None] | None = None
    on_notice: Callable[[lease_service_pb2.FollowLeaseResponse], None] | None = None


class Held:
    """A lease that this process holds."""

    def __init__(
        self,
        offer: lease_service_pb2.LeaseOffer,
        renewals: Renewals,
        callbacks: Callbacks,
    ) -> None:
        self.name = offer.lease.name
        """`apps/{app}/tokens/{token}/leases/{lease}`."""
        self.fencing_token = offer.lease.fencing_token
        """A number that rises with every lease of the token."""
        self.is_shared = offer.lease.mode == lease_pb2.LEASE_MODE_SHARED
        """Other leases of the token may live at the same time: the token is in custody, and the
        holder does not refresh."""
        self.policy = offer.policy
        """What the provider asks; empty from a coordinator that does not say it."""
        self.notice: lease_service_pb2.FollowLeaseResponse | None = None
        """The latest word of what a holder must do; None where there is none."""
        self.rooms = list(offer.rooms)
        """How many errors each of the scopes named to `acquire` has room for, as last heard."""
        self._offer = offer
        self._renewals = renewals
        self._stopped = False
        """Our own release has begun."""
        self._callbacks = callbacks
        self._owner = Owner()

    @property
    def deadline_ns(self) -> int:
        """When all must have stopped unless a renewal comes through, in ns of CLOCK_BOOTTIME."""
        return self._renewals.deadline_ns

    @property
    def remaining_seconds(self) -> float:
        """Time left until the deadline."""
        return (self.deadline_ns - boottime_ns()) / SECOND

    def check(self) -> None:
        """Raise LeaseLost if the lease was lost; call it before anything that needs the lease.

        It looks at the clock itself, so it also tells when renewals were held up with all else. A
        forked child never has its parent's lease.
        """
        if not self._owner.is_here:
            raise LeaseLost(
                f"the lease belongs to process {self._owner.pid}, of which this one is a fork"
            )
        self._renewals.check(boottime_ns())

    def command_started(self) -> None:
        """Tell the coordinator, soon, that the command under the lease has started.

        Where the policy's `refresh_at` is START, that instant counts as the refresh.
        """
        self._renewals.command_started()

    def command_paused(self, *, paused: bool) -> None:
        """Tell the coordinator, soon, whether the command under the lease is paused.

        It shows where leases are listed.
        """
        self._renewals.command_paused(paused=paused)

    def _renewal_call(self, renewal: Renewal) -> _calls.Call[Any, lease_pb2.Lease]:
        return _calls.renew_lease(self._offer, renewal)

    def _not_renewed(self, error: HoldoffError) -> None:
        self._renewals.failed(error, boottime_ns())
        log.info("renewal of %s failed, trying again: %s", self.name, error)

    def _tell_renewed(self) -> None:
        if self._callbacks.on_renewed and self._renewals.lost is None:
            self._callbacks.on_renewed(self.deadline_ns)

    def _noticed(self, notice: lease_service_pb2.FollowLeaseResponse) -> None:
        """Keep what a holder must do from now on."""
        self.notice = notice
        if notice.rooms:
            self.rooms = list(notice.rooms)

    def _pass_on(self, notice: lease_service_pb2.FollowLeaseResponse) -> None:
        if self._callbacks.on_notice:
            try:
                self._callbacks.on_notice(notice)
            except Exception:
                log.exception("on_notice of %s raised, and is called again", self.name)

    def _unfollowed(self, error: Exception) -> None:
        """Take in that nothing more will be heard; renewals alone tell of a loss from here."""
        self.notice = None
        log.info("%s is not followed: %s", self.name, error)

    def _must_be_quiet(self) -> bool:
        """Whether the last word was to be quiet.

        Raises:
            LeaseLost: The lease was lost, or released.
        """
        self.check()
        if self._stopped:
            raise LeaseEnded("the lease was released")
        run = lease_service_pb2.HOLDER_INSTRUCTION_RUN
        return self.notice is not None and self.notice.instruction != run

    def _event_of(
        self, url: str, status: int, headers: Headers, body: bytes | None
    ) -> budget_pb2.Event | None:
        """Return what an answer of the provider is to the policy; None if it is nothing bad."""
        token, job = self.name.partition("/leases/")[0], self._offer.lease.holder.job
        event = event_of(self.policy, token, url, status, headers, body, job)
        if event is None:
            return None
        self._vouch(event)
        return event

    def _vouch(self, event: budget_pb2.Event) -> None:
        """Name the lease in a report; for a block, also prove that it is held."""
        event.lease = self.name
        if event.kind == budget_pb2.EVENT_KIND_BLOCK:
            event.lease_proof = lease_proof(secret_hash(self._offer.secret), event.id)

    def _lose(self, error: LeaseLost) -> bool:
        """Take in that the lease is gone; return whether that was not known yet."""
        if self._renewals.lost is not None:
            return False
        self._renewals.lost = error
        log.warning("lease %s is lost: %s", self.name, error)
        return True

    def _tell_lost(self, error: LeaseLost) -> None:
        if self._callbacks.on_lost and not self._stopped:
            self._callbacks.on_lost(error)


def pause_seconds(give_up_ns: int | None) -> float:
    """How long to sleep before looking again; 0 or less when it is time to give up."""
    if give_up_ns is None:
        return LONGEST_SLEEP_SECONDS
    return min((give_up_ns - boottime_ns()) / SECOND, LONGEST_SLEEP_SECONDS)
