"""The audit trail: who did what, from where, when and why, as the store keeps it and as our log.

What happens is added by the script in which it happens; calls that are refused, by the coordinator.
Apps, credentials and refusals have streams of their own, each of bounded length.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import structlog

from holdoff.v1 import admin_service_pb2, audit_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.records import audit_message
from holdoff_coordinator.scripts import CREDENTIAL_CHANGES, REFUSALS, audit_key
from holdoff_coordinator.seldom import Seldom

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

_LAST = (1 << 62, 0, "")
_PAGE_TOKEN = re.compile(r"([0-9]{1,18})-([0-9]{1,18})/([a-z0-9{}:-]{1,100})")


class AuditTrail:
    """Lists the trail, logs what this replica adds to it, and adds refusals."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._refusals = Seldom()
        self.on_event: Callable[[Mapping[bytes, bytes]], None] = lambda _: None
        """Called with each entry that this replica added."""
        scripts.on_audit = self._note

    async def list(
        self, request: admin_service_pb2.ListAuditEventsRequest, _: Caller
    ) -> admin_service_pb2.ListAuditEventsResponse:
        """List events, the newest first; each page looks at as many as it may have."""
        parent = validation.parent(request.parent)
        size = validation.page_size(request.page_size)
        before = _read_page_token(request.page_token)
        apps = [parent.app] if parent else await self._scripts.apps()
        streams = [CREDENTIAL_CHANGES, REFUSALS, *map(audit_key, apps)]
        found: list[tuple[tuple[int, int, str], Mapping[bytes, bytes]]] = []
        for stream in streams:
            bound = f"{before[0]}-{before[1]}"
            # One more than the page tells whether there is another; one is where that before ended.
            with self._scripts.sparing(stream, "audit"):
                for entry_id, flat in await self._scripts.audit_trail(stream, bound, size + 2):
                    place = (*map(int, entry_id.split(b"-")), stream)
                    if place < before:
                        found.append((place, flat))  # type: ignore[arg-type] # of three
        found.sort(key=lambda one: one[0], reverse=True)
        events = [audit_message(place[0] * 1000, flat) for place, flat in found[:size]]
        wanted = str(parent or "")
        last = found[size - 1][0] if len(found) > size else None
        return admin_service_pb2.ListAuditEventsResponse(
            events=[
                event
                for event in events
                if (not request.kinds or event.kind in request.kinds)
                and (not wanted or f"{event.resource}/".startswith(f"{wanted}/"))
            ],
            next_page_token=f"{last[0]}-{last[1]}/{last[2]}" if last else "",
        )

    def _note(self, entry_id: bytes, flat: Mapping[bytes, bytes]) -> None:
        _log(entry_id, flat)
        self.on_event(flat)

    async def refused(self, caller: Caller, call: str, where: str, reason: str) -> None:
        """Add a call that was refused, once a minute for the same one."""
        host = caller.peer.rpartition(":")[0]
        more = self._refusals.due((caller.identity, host, call, where, reason))
        if more is None:
            return
        repeated = f", and {more} more like it" if more else ""
        try:
            await self._scripts.refused(
                resource=where,
                identity=caller.identity,
                peer=caller.peer,
                reason=f"{call}: {reason}{repeated}",
            )
        except Failure as failure:
            log.warning("a refusal is not in the audit trail", why=failure.reason, call=call)


def _read_page_token(text: str) -> tuple[int, int, str]:
    if not text:
        return _LAST
    match = _PAGE_TOKEN.fullmatch(text)
    if not match:
        raise validation.unknown_page_token(text)
    return int(match[1]), int(match[2]), match[3]


def _log(entry_id: bytes, flat: Mapping[bytes, bytes]) -> None:
    event = audit_message(int(entry_id.split(b"-")[0]) * 1000, flat)
    facts: dict[str, Any] = {
        "resource": event.resource,
        "identity": event.identity,
        "peer": event.peer,
        "job": event.holder.job,
        "host": event.holder.host,
        "user": event.holder.user,
        "reason": event.reason,
    }
    kind = audit_pb2.AuditKind.Name(event.kind).removeprefix("AUDIT_KIND_")
    words = kind.lower().replace("_", " ")
    log.info(words, audit=kind, **{key: value for key, value in facts.items() if value})
