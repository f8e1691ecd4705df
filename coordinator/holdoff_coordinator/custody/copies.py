"""Sealed copies of grants, which are presented to a store that may have lost some. Pure.

The store takes a copy whose generation it does not have; its generations only rise.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from holdoff_coordinator.custody.records import NEVER, EndRefresh
from holdoff_coordinator.custody.rules import Condition
from holdoff_coordinator.custody.sealing import Binding, Keyring, SealError, Secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdoff.names import TokenName
    from holdoff_coordinator.custody.records import Held
    from holdoff_coordinator.custody.sealing import MasterKey

MOST_COPIES: Final = 10_000
"""That a replica keeps; beyond it the oldest is dropped."""
MOST_SEALED_BYTES: Final = 96 * 1024
"""Of a copy that a client keeps."""


class SealedCopy(Secrets, frozen=True):
    """A copy that clients keep, without being able to read or change it."""

    KIND: ClassVar[str] = "copy"
    request: EndRefresh
    at_us: int
    """When it was made, by the store's clock."""

    def again(self, now_us: int) -> EndRefresh:
        """Return what to ask for at an instant of the store's clock.

        The client may have been away for long: this confirms nothing as the newest generation.
        """
        later = self.request.later(max(0, now_us - self.at_us))
        return msgspec.structs.replace(later, confirms=False)


@dataclass(frozen=True, slots=True)
class Copy:
    """A generation of a grant, sealed."""

    request: EndRefresh
    made_us: int
    """When it was made, by our boot clock."""
    is_ours: bool
    """Whether this replica received that answer, so that it measured its age itself."""

    def replaces(self, known: Copy | None) -> bool:
        """Tell whether it is newer than what is known. Our own answer is the better copy."""
        if known is None or self.request.chain != known.request.chain:
            return True
        return self.request.generation > known.request.generation


def copy_of(held: Held, read_us: int) -> Copy | None:
    """Return a copy of a grant as the store has it; None if it may not be the newest one.

    Args:
        held: The grant, with its secrets.
        read_us: When it was read, by our boot clock.
    """
    record = held.record
    is_doubtful = held.reason == "QUARANTINED" or record.condition is not Condition.READY
    if is_doubtful or not record.sealed_grant:
        return None
    request = EndRefresh(
        token=held.token,
        chain=record.chain,
        from_generation=record.generation - 1,
        attempt="" if record.under_way else record.attempt,
        step="STORED",
        result="",
        outcome="an answer that another replica received, presented again",
        condition=record.condition,
        message=record.message,
        generation=record.generation,
        unproven=record.unproven,
        first_unproven_us=record.first_unproven_us,
        not_sent=record.not_sent,
        refreshed_age_us=max(0, held.now_us - record.refreshed_us),
        not_before_in_us=record.not_before_us - held.now_us,
        expires_in_us=max(0, record.expires_us - held.now_us),
        idle_us=record.idle_us - record.refreshed_us if record.idle_us else NEVER,
        sealed_grant=record.sealed_grant,
        sealed_access=record.sealed_access,
        fingerprint=record.fingerprint,
        facts=record.facts,
        restores=True,
    )
    return Copy(request, read_us, is_ours=False)


def seal_copy(name: TokenName, held: Held, keys: Mapping[str, MasterKey]) -> bytes:
    """Return a copy of a grant for clients; empty if there is none to give."""
    copy = copy_of(held, 0)
    if copy is not None:
        ring = Keyring(keys, held.record.public.key_id)
        with contextlib.suppress(SealError):
            sealed = ring.seal(SealedCopy(copy.request, held.now_us), _binding(name))
            if len(sealed) <= MOST_SEALED_BYTES:
                return sealed
    return b""


def open_copy(name: TokenName, sealed: bytes, keys: Mapping[str, MasterKey]) -> SealedCopy:
    """Open what a client kept.

    Raises:
        SealError: Our keys did not seal it, or not for this token.
    """
    return Keyring(keys, None).open(sealed, _binding(name), SealedCopy)


def _binding(name: TokenName) -> Binding:
    """Say what a copy belongs to; chain and generation are in it."""
    return Binding(str(name), "", 0, "", "", ())
