"""Seals all grants again with another master key."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from holdoff.names import GrantName, TokenName
from holdoff.v1 import custody_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.custody.records import ReadGrants, ResealGrant, ask, held_of
from holdoff_coordinator.custody.resealing import resealed
from holdoff_coordinator.custody.sealing import SealError, is_key_id
from holdoff_coordinator.failures import invalid
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.grants import Terms
    from holdoff_coordinator.custody.records import Record
    from holdoff_coordinator.custody.sealing import Keyring
    from holdoff_coordinator.custody.seals import Seals
    from holdoff_coordinator.scripts import Scripts


class KeyRotation:
    """Seals all grants again, one page a call.

    Args:
        scripts: The store.
        seals: The master keys of this replica.
        terms: Whether there is custody.
        note: Adds to the audit trail who rotates, the key until now, and the one from then on.
    """

    def __init__(
        self,
        scripts: Scripts,
        seals: Seals,
        terms: Terms,
        note: Callable[[Caller, str, str], Awaitable[None]],
    ) -> None:
        self._note = note
        self._scripts = scripts
        self._seals = seals
        self._terms = terms

    async def rotate(
        self, request: custody_service_pb2.RotateKeysRequest, caller: Caller
    ) -> custody_service_pb2.RotateKeysResponse:
        """Choose the primary key on the first page, and seal the grants of a page with it."""
        size = validation.page_size(request.page_size)
        after = validation.page_token(request.page_token)
        wanted = request.key_id
        if wanted and not is_key_id(wanted):
            raise invalid("key_id", "write 1 to 63 of a-z, 0-9 and -, or leave it out")
        self._terms.require_closed()
        if after is None and not request.validate_only:
            await self._seals.rotate(wanted, partial(self._note, caller))
        ring, _ = await self._seals.unlocked()
        page = custody_service_pb2.RotateKeysResponse(primary_key_id=ring.primary or "")
        uses: Counter[str] = Counter()
        seen, last = 0, ""
        async for name, record in self._records(after or ("", "")):
            if seen == size:
                page.next_page_token = last
                break
            seen, last = seen + 1, str(name)
            is_kept = request.validate_only
            now = record if is_kept else await self._seal(ring, name, record, page)
            if now:
                uses[now.public.key_id] += 1
        for key_id, count in sorted(uses.items()):
            page.key_uses.add(key_id=key_id, grant_count=count)
        return page

    async def _seal(
        self,
        ring: Keyring,
        name: TokenName,
        record: Record | None,
        page: custody_service_pb2.RotateKeysResponse,
    ) -> Record | None:
        """Seal one grant with the primary key; return its record as it is now."""
        while record:
            try:
                changes = resealed(ring, name, record)
            except SealError as error:
                page.skipped_grants.add(
                    name=str(GrantName(name.app, name.token)),
                    key_id=record.public.key_id,
                    message=str(error),
                )
                return record
            if not changes:
                break
            wanted = ResealGrant(
                token=name.token, chain=record.chain, generation=record.generation, **changes
            )
            answer = await ask(self._scripts, name.app, wanted)
            if answer.status == "OK":
                page.resealed_count += 1
                return msgspec.structs.replace(record, **changes)
            # It was put or refreshed meanwhile, with whichever key was primary then.
            record = await self._record(name)
        return record

    async def _record(self, name: TokenName) -> Record | None:
        answer = await ask(self._scripts, name.app, ReadGrants(tokens=(name.token,), sealed=True))
        found = self._scripts.readable(name.app, "tokens", answer.grants, held_of)
        return found[0].record if found else None

    async def _records(self, after: tuple[str, str]) -> AsyncIterator[tuple[TokenName, Record]]:
        """Read all grants after one token, in order."""
        for app in await self._scripts.apps_with("grants"):
            if app < after[0]:
                continue
            last = after[1] if app == after[0] else ""
            while tokens := await self._scripts.tokens(app, last, READ_BATCH, "grants"):
                last = tokens[-1]
                answer = await ask(
                    self._scripts, app, ReadGrants(tokens=tuple(tokens), sealed=True)
                )
                for held in self._scripts.readable(app, "tokens", answer.grants, held_of):
                    yield TokenName(app, held.token), held.record
