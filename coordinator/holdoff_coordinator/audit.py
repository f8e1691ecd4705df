"""The audit trail: who did what, from where, when and why, as the store keeps it and as our log.

The script that makes a change adds its entry; the coordinator adds refused calls, changes of the
access file, rotations of custody's keys, and hand-outs of access tokens. Operators' actions,
automatic events, credentials and refusals have separate streams of bounded length, so that none
displaces entries of another. Repeated events of one caller become one entry with a count.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from holdoff.v1 import admin_service_pb2, audit_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.records import audit_message
from holdoff_coordinator.scripts import CREDENTIAL_CHANGES, REFUSALS, audit_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from holdoff.names import TokenName
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

FIRST_WINDOW_SECONDS = 60.0
LONGEST_WINDOW_SECONDS = 3600.0
"""Refusals of one caller for one reason are counted for this long, each time twice as long.
Hand-outs of one access token to one caller are counted for an hour."""
MOST_DIFFERENT = 10
"""How many different refusals get their own entries in that time."""
_FLUSH_SECONDS = 1.0
_LAST = (1 << 62, 0, "")
_POWER_OF_TEN = re.compile(rb"10*")
_PLACE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})/([a-z0-9{}:-]{1,100})")


@dataclass(slots=True)
class _Repeated:
    """Repeated events, which are not in the trail yet."""

    stream: str
    window_seconds: float
    until: float
    known: set[tuple[str, ...]] = field(default_factory=set)
    """Those that have their own entry: from where, which call, about what."""
    count: int = 0
    first_us: int = 0
    last: Mapping[str, str] | None = None


class AuditTrail:
    """Lists the trail, logs what this replica adds to it, and adds refusals."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._repeated: dict[tuple[str, ...], _Repeated] = {}
        self.on_event: Callable[[Mapping[bytes, bytes]], None] = lambda _: None
        """Called with each event that this replica saw."""
        scripts.on_audit = self._note

    async def list(
        self, request: admin_service_pb2.ListAuditEventsRequest, _: Caller
    ) -> admin_service_pb2.ListAuditEventsResponse:
        """List events, the newest first; each page looks at as many as it may have."""
        parent = validation.parent(request.parent)
        size = validation.page_size(request.page_size)
        before = _read_page_token(request.page_token)
        apps = [parent.app] if parent else await self._scripts.apps()
        streams = [CREDENTIAL_CHANGES, REFUSALS, *(key for app in apps for key in audit_keys(app))]
        found: list[tuple[tuple[int, int, str], Mapping[bytes, bytes]]] = []
        for stream in streams:
            newest = f"{before[0]}-{before[1]}"
            # One more than the page tells whether there is another; what is older is on none.
            oldest = f"{found[size][0][0]}-{found[size][0][1]}" if len(found) > size else "-"
            # One is where the page before ended.
            with self._scripts.sparing(stream, "audit"):
                for entry in await self._scripts.audit_trail(stream, newest, oldest, size + 2):
                    time_ms, sequence = map(int, entry[0].split(b"-"))
                    place = time_ms, sequence, stream
                    if place < before:
                        found.append((place, entry[1]))
            found = sorted(found, key=lambda one: one[0], reverse=True)[: size + 1]
        events = self._scripts.readable(
            "", "audit", found[:size], lambda one: audit_message(one[0][0] * 1000, one[1])
        )
        wanted, kinds = str(parent or ""), frozenset(request.kinds)
        return admin_service_pb2.ListAuditEventsResponse(
            events=[
                event
                for event in events
                if (not kinds or event.kind in kinds)
                and (not wanted or f"{event.resource}/".startswith(f"{wanted}/"))
            ],
            next_page_token=_page_token(found[size - 1][0]) if len(found) > size else "",
        )

    def _note(self, entry_id: bytes, flat: Mapping[bytes, bytes]) -> None:
        if _POWER_OF_TEN.fullmatch(flat.get(b"count", b"1")):  # else it is one more of many
            _log(entry_id, flat)
        self.on_event(flat)

    async def refused(self, caller: Caller, call: str, where: str, reason: str) -> None:
        """Add a call that was refused; many similar ones are only counted."""
        entry = {
            "kind": "CALL_REFUSED",
            "resource": where,
            "identity": caller.identity,
            "peer": caller.peer,
            "reason": f"{call}: {reason}",
        }
        self.on_event({b"kind": b"CALL_REFUSED", b"resource": b""})
        host = caller.peer.rpartition(":")[0]
        kept = _Repeated(REFUSALS, FIRST_WINDOW_SECONDS, time.monotonic() + FIRST_WINDOW_SECONDS)
        repeated = self._repeated.setdefault((caller.identity, reason), kept)
        await self._repeat(repeated, (host, call, where), entry)

    async def handed_out(self, caller: Caller, token: TokenName) -> None:
        """Add that a caller is given an access token; others within the hour are only counted."""
        entry = {
            "kind": "ACCESS_TOKEN_HANDED_OUT",
            "resource": str(token),
            "identity": caller.identity,
            "peer": caller.peer,
        }
        self.on_event({b"kind": b"ACCESS_TOKEN_HANDED_OUT", b"resource": str(token).encode()})
        _, stream = audit_keys(token.app)
        until = time.monotonic() + LONGEST_WINDOW_SECONDS
        kept = _Repeated(stream, LONGEST_WINDOW_SECONDS, until)
        repeated = self._repeated.setdefault(("", caller.identity, str(token)), kept)
        await self._repeat(repeated, (), entry)

    async def _repeat(
        self, repeated: _Repeated, this: tuple[str, ...], entry: Mapping[str, str]
    ) -> None:
        """Add an event, or count it if there were some like it, or too many."""
        if this not in repeated.known and len(repeated.known) < MOST_DIFFERENT:
            repeated.known.add(this)
            await self._add(repeated.stream, entry)
            return
        repeated.count += 1
        repeated.first_us = repeated.first_us or time.time_ns() // 1000
        repeated.last = entry

    async def access_changed(self, reason: str) -> None:
        """Add that the access file was read again, or cannot be used."""
        self.on_event({b"kind": b"ACCESS_CHANGED", b"resource": b""})
        entry = {"kind": "ACCESS_CHANGED", "resource": "", "reason": reason}
        await self._add(CREDENTIAL_CHANGES, entry)

    async def keys_rotated(self, caller: Caller, before: str, key_id: str) -> None:
        """Add that an operator has grants encrypted with a key, before that is done.

        Raises:
            Failure: STORE_….
        """
        self.on_event({b"kind": b"KEYS_ROTATED", b"resource": b""})
        entry = {
            "kind": "KEYS_ROTATED",
            "resource": f"keys/{key_id}",
            "identity": caller.identity,
            "peer": caller.peer,
            "reason": "again" if before == key_id else f"until now {before!r}",
        }
        entry_id = await self._scripts.add_audit(CREDENTIAL_CHANGES, entry)
        _log(entry_id, {key.encode(): value.encode() for key, value in entry.items()})

    async def flush_forever(self) -> None:
        """Add the counts of events whose time is over."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush(time.monotonic())

    async def flush(self, now: float) -> None:
        """Add the counts of events whose time is over at an instant."""
        for key, one in list(self._repeated.items()):
            if now < one.until:
                continue
            if one.last is None:
                del self._repeated[key]
                continue
            entry = {**one.last, "count": str(one.count), "first_us": str(one.first_us)}
            longer = min(2 * one.window_seconds, LONGEST_WINDOW_SECONDS)
            self._repeated[key] = _Repeated(one.stream, longer, now + longer)
            await self._add(one.stream, entry)

    async def _add(self, stream: str, entry: Mapping[str, str]) -> None:
        try:
            entry_id = await self._scripts.add_audit(stream, entry)
        except Failure as failure:
            log.warning(
                "an event could not be added to the audit trail", why=failure.reason, entry=entry
            )
            return
        _log(entry_id, {key.encode(): value.encode() for key, value in entry.items()})


def _page_token(place: tuple[int, int, str]) -> str:
    text = f"{place[0]}-{place[1]}/{place[2]}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _read_page_token(text: str) -> tuple[int, int, str]:
    if not text:
        return _LAST
    try:
        match = _PLACE.fullmatch(base64.b64decode(text, altchars=b"-_", validate=True).decode())
    except (ValueError, binascii.Error):
        match = None
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
        "count": event.count,
    }
    kind = audit_pb2.AuditKind.Name(event.kind).removeprefix("AUDIT_KIND_")
    words = kind.lower().replace("_", " ")
    log.info(words, audit=kind, **{key: value for key, value in facts.items() if value})
