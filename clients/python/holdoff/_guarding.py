"""What the guards of both clients share: what the body says of its call, and what follows."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from holdoff import _calls
from holdoff._forks import Owner
from holdoff._log import log
from holdoff.errors import HoldoffError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.v1 import budget_pb2


_GOOD_STATUS = 200


class Guarding:
    """Room for one call at a time."""

    def __init__(self, token: str) -> None:
        self.status: int | None = None
        """HTTP status of the answer, for the body to set; 0 when there was none."""
        self.reservation: budget_pb2.Reservation | None = None
        """The room that is taken, from entering to leaving."""
        self._token = token
        self._entered = False
        self._cancelled = False
        self._owner = Owner()

    def cancel(self) -> None:
        """Say that the call was not made, so that its room is released at the end."""
        self._cancelled = True

    @contextlib.contextmanager
    def _entering(self) -> Iterator[None]:
        """Begin anew; if no room is found, it was not entered."""
        if self._entered:
            raise RuntimeError("this guard is in use: each call at the same time needs its own")
        self._entered, self._cancelled, self.status = True, False, None
        try:
            yield
        except BaseException:
            self._entered = False
            raise

    def _settlement(
        self, error: BaseException | None
    ) -> _calls.Call[Any, budget_pb2.Reservation] | None:
        """Return what to tell the coordinator about the call; None where nobody knows.

        The call of a forked child's parent is the parent's to tell of.

        A body that raised, by a time-out say, does not know when its call arrived: what was
        reserved runs out, and counts as an error at that moment, which is later than any.
        """
        if not self._owner.is_here:
            return None
        if self.reservation is None:
            raise RuntimeError("this guard was not entered")
        reservation_id = self.reservation.id
        self._entered, self.reservation = False, None
        if self._cancelled:
            return _calls.cancel(self._token, reservation_id)
        if self.status is None and error is not None:
            return None
        status = _GOOD_STATUS if self.status is None else self.status
        return _calls.commit(self._token, reservation_id, status)

    def _unsettled(self, lost: HoldoffError, error: BaseException | None) -> None:
        """Take in that the coordinator does not know what became of the call.

        The body's own error goes first, and a coordinator that is away must not cost the caller
        the answer that it has: the reservation expires, and counts as a call that failed.

        Raises:
            HoldoffError: What was told is wrong.
        """
        if error is None and not isinstance(lost, Unavailable):
            raise lost
        log.warning(
            "a call under %s counts as failed, since it was not told: %s", self._token, lost
        )
