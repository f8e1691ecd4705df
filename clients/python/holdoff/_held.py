"""The part of a held lease that both clients share: all but waiting and sending."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from holdoff import _calls
from holdoff._core import SECOND
from holdoff._platform import boottime_ns

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdoff._core import Renewal, Renewals
    from holdoff.errors import HoldoffError, LeaseLost
    from holdoff.v1 import lease_pb2, lease_service_pb2

log = logging.getLogger("holdoff")


class Held:
    """A lease that this process holds."""

    def __init__(
        self,
        offer: lease_service_pb2.LeaseOffer,
        renewals: Renewals,
        on_renewed: Callable[[int], None] | None,
        on_lost: Callable[[LeaseLost], None] | None,
    ) -> None:
        self.name = offer.lease.name
        """`apps/{app}/tokens/{token}/leases/{lease}`."""
        self.fencing_token = offer.lease.fencing_token
        """A number that rises with every lease of the token."""
        self._offer = offer
        self._renewals = renewals
        self._on_renewed = on_renewed
        self._on_lost = on_lost

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

        It looks at the clock itself, so it also tells when renewals were held up with all else.
        """
        self._renewals.check(boottime_ns())

    def command_started(self) -> None:
        """Tell the coordinator, soon, that the command under the lease has started.

        Where the policy's `refresh_at` is START, that instant counts as the refresh.
        """
        self._renewals.command_started()

    def _renewal_call(self, renewal: Renewal) -> _calls.Call[Any, lease_pb2.Lease]:
        return _calls.renew_lease(self._offer, renewal)

    def _not_renewed(self, error: HoldoffError) -> None:
        self._renewals.failed(error, boottime_ns())
        log.info("renewal of %s failed, trying again: %s", self.name, error)

    def _lose(self, error: LeaseLost) -> None:
        self._renewals.lost = error
        log.warning("lease %s is lost: %s", self.name, error)
        if self._on_lost:
            self._on_lost(error)
