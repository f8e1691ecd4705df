"""Sends again what this replica acknowledged of late, when the store may have lost it.

A server that took over, or that began from older data, may lack the last writes. Ids tell it what
it still has, so that each event counts once, however many replicas and clients send it again.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import TYPE_CHECKING, Any

import structlog

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from holdoff_coordinator.scripts import Scripts

    Call = tuple[str | int, ...]
    """The arguments of a script."""

log = structlog.get_logger()

KEPT_US = 5 * 60 * 1_000_000
MOST_KEPT = 10_000
"""So much of each kind is kept of an app; of more, the oldest is left out."""
LOOK_SECONDS = 1.0
LATE_ROUNDS = 10
"""How often a commit is sent whose reservation another replica has to restore first."""
_BATCH = 100
"""Events in one script call, so that none holds up the store."""


class _Kept:
    """What was acknowledged of one app, each with when, by the boot clock."""

    def __init__(self) -> None:
        self.events: deque[tuple[int, str]] = deque(maxlen=MOST_KEPT)
        """As JSON, which takes less room than what it describes."""
        self.reservations: deque[tuple[int, Call]] = deque(maxlen=MOST_KEPT)
        self.settled: deque[tuple[int, Call]] = deque(maxlen=MOST_KEPT)
        """Commits and cancels."""
        self.late: list[tuple[int, Call]] = []
        """Those of them whose reservation the store does not know yet."""
        self.rounds = 0
        """How often they are still to be sent."""

    def forget(self, before_us: int) -> bool:
        """Drop what is older; return whether anything is left."""
        for kept in (self.events, self.reservations, self.settled):
            while kept and kept[0][0] < before_us:
                kept.popleft()
        return bool(self.events or self.reservations or self.settled or self.rounds)


class Replays:
    """Keeps what is acknowledged, and sends it again when the life of its app changes."""

    def __init__(self, scripts: Scripts, boot_us: Callable[[], int]) -> None:
        self._scripts = scripts
        self._boot_us = boot_us
        self._kept: dict[str, _Kept] = {}
        self._due: set[str] = set()
        scripts.on_new_life = self._due.add

    def recorded(self, app: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep events, as record_events.lua took them."""
        at_us, kept = self._boot_us(), self._of(app)
        kept.events.extend((at_us, json.dumps(entry)) for entry in entries)

    def reserved(self, app: str, call: Call) -> None:
        """Keep a reservation, by the arguments of reserve.lua."""
        self._of(app).reservations.append((self._boot_us(), call))

    def settled(self, app: str, call: Call) -> None:
        """Keep a commit or a cancel, by the arguments of commit.lua."""
        self._of(app).settled.append((self._boot_us(), call))

    def _of(self, app: str) -> _Kept:
        return self._kept.setdefault(app, _Kept())

    async def replay_forever(self) -> None:
        """Look each second at the apps with something kept; replay those with another life."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before_us = self._boot_us() - KEPT_US
            self._kept = {app: kept for app, kept in self._kept.items() if kept.forget(before_us)}
            self._due.intersection_update(self._kept)
            if not self._kept:
                continue
            try:
                for app in await self._scripts.changed(self._kept):
                    await self._scripts.run("upgrade", app)  # whose answer tells the new life
            except Failure as failure:
                warn("a store that may have lost events cannot be asked", failure.reason)
            for app, kept in list(self._kept.items()):
                try:
                    if app in self._due:
                        await self._replay(app, kept)
                    elif kept.rounds:
                        await self._settle(app, kept)
                except Failure as failure:
                    self._due.add(app)
                    warn("what a store may have lost cannot be sent again", failure.reason, app=app)

    async def _replay(self, app: str, kept: _Kept) -> None:
        self._due.discard(app)
        events, reservations = list(kept.events), list(kept.reservations)
        kept.late, kept.rounds = list(kept.settled), LATE_ROUNDS
        new_events = new_reservations = 0
        for first in range(0, len(events), _BATCH):
            batch = events[first : first + _BATCH]
            now_us = self._boot_us()
            entries = [_older(json.loads(text), now_us - at_us) for at_us, text in batch]
            reply = await self._scripts.run("record_events", app, json.dumps(entries))
            new_events += reply.values[0].count(b"COUNTED")
        for at_us, call in reservations:
            reply = await self._scripts.run("reserve", app, *call, self._boot_us() - at_us)
            new_reservations += reply.values[2:] == (b"1",)
        await self._settle(app, kept)
        log.info(
            "sent again what the store may have lost",
            app=app,
            events=len(events),
            new_events=new_events,
            reservations=len(reservations),
            new_reservations=new_reservations,
        )

    async def _settle(self, app: str, kept: _Kept) -> None:
        """Send commits and cancels; those whose reservation is not there stay late."""
        late: list[tuple[int, Call]] = []
        for at_us, (reservation, caller, made, age_us, status) in kept.late:
            aged = int(age_us) + self._boot_us() - at_us
            call = (reservation, caller, made, aged, status)
            reply = await self._scripts.run("commit", app, *call)
            if reply.status == "RESERVATION_NOT_FOUND":
                late.append((at_us, (reservation, caller, made, age_us, status)))
        kept.late, kept.rounds = late, kept.rounds - 1 if late else 0


def _older(entry: dict[str, Any], by_us: int) -> dict[str, Any]:
    """Return an event that happened so much longer ago."""
    entry["age_us"] += by_us
    if "block" in entry and entry["block"]["sent_age_us"] >= 0:
        entry["block"]["sent_age_us"] += by_us
    return entry
