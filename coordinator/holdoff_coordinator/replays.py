"""Sends again what this replica acknowledged recently, when the store may have lost it.

A server that took over, or that began from older data, may lack the last writes. Ids tell it what
it still has, so that each event counts once, however many replicas and clients send it again.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import structlog

from holdoff_coordinator.failures import Failure
from holdoff_coordinator.records import record
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from holdoff_coordinator.scripts import Reply, Scripts

    Call = tuple[str | int | bytes, ...]
    """The arguments of a script."""

log = structlog.get_logger()

KEPT_US = 5 * 60 * 1_000_000
MOST_KEPT = 10_000
"""How much of each kind is kept for a token; beyond it the oldest is dropped."""
LOOK_SECONDS = 1.0
_BATCH = 100
"""Events in one script call, so that none holds up the store."""


class _Kept:
    """What was acknowledged for one token, each with its time by the boot clock."""

    def __init__(self) -> None:
        self.events: deque[tuple[int, str]] = deque(maxlen=MOST_KEPT)
        """As JSON, which takes less room than what it describes."""
        self.reservations: deque[tuple[int, Call]] = deque(maxlen=MOST_KEPT)
        self.settled: deque[tuple[int, tuple[Call, Call]]] = deque(maxlen=MOST_KEPT)
        """Commits and cancels, each with its reservation, which another replica may have made."""

    def forget(self, before_us: int) -> bool:
        """Drop what is older; return whether anything is left."""
        for kept in (self.events, self.reservations, self.settled):
            while kept and kept[0][0] < before_us:
                kept.popleft()
        return bool(self.events or self.reservations or self.settled)


class Replays:
    """Keeps what is acknowledged, and sends it again when the life of its app changes."""

    def __init__(self, scripts: Scripts, boot_us: Callable[[], int]) -> None:
        self._scripts = scripts
        self._boot_us = boot_us
        self._kept: defaultdict[tuple[str, str], _Kept] = defaultdict(_Kept)
        """By app and token, so that events of one token do not displace those of another."""
        self._due: set[str] = set()
        scripts.on_new_life = self._due.add

    def recorded(self, app: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep events, as record_events.lua took them."""
        at_us = self._boot_us()
        for entry in entries:
            self._kept[app, entry["token"]].events.append((at_us, json.dumps(entry)))

    def reserved(self, app: str, token: str, call: Call) -> None:
        """Keep a reservation, by the arguments of reserve.lua."""
        self._kept[app, token].reservations.append((self._boot_us(), (*call, 0)))

    def settled(self, app: str, call: Call, reply: Reply) -> None:
        """Keep a commit or a cancel, by the arguments and the answer of commit.lua."""
        found = record(reply.values[2])
        reserved_us = int(found["reserved_us"])
        reservation = (
            call[0],
            found["fingerprint"],
            int(found["expires_us"]) - reserved_us,
            *(found[field] for field in ("count", "budgets", "caller", "token", "place")),
            reply.now_us - reserved_us,
        )
        kept = self._kept[app, found["token"].decode()]
        kept.settled.append((self._boot_us(), (call, reservation)))

    async def replay_forever(self) -> None:
        """Look each second at the apps with something kept; replay those with another life."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before_us = self._boot_us() - KEPT_US
            for key, kept in list(self._kept.items()):
                if not kept.forget(before_us):
                    del self._kept[key]
            apps = {app for app, _ in self._kept}
            try:
                for app in await self._scripts.changed(sorted(apps)):
                    await self._scripts.run("upgrade", app)  # whose answer tells the new life
            except Failure as failure:
                warn("a store that may have lost events cannot be asked", failure.reason)
            self._due.intersection_update(apps)
            for app in sorted(self._due):
                self._due.discard(app)
                try:
                    for key in [key for key in self._kept if key[0] == app]:
                        await self._replay(app, self._kept[key])
                except Failure as failure:
                    self._due.add(app)
                    warn("what a store may have lost cannot be sent again", failure.reason, app=app)

    async def _replay(self, app: str, kept: _Kept) -> None:
        events, reservations, settled = [*kept.events], [*kept.reservations], [*kept.settled]
        new_events = new_reservations = 0
        for first in range(0, len(events), _BATCH):
            batch = events[first : first + _BATCH]
            entries = [_older(json.loads(text), self._since(at_us)) for at_us, text in batch]
            reply = await self._scripts.run("record_events", app, json.dumps(entries))
            new_events += reply.values[0].count(b"COUNTED")
        for at_us, call in reservations:
            new_reservations += await self._restore(app, call, self._since(at_us))
        for at_us, (call, reservation) in settled:
            if await self._settle(app, call, self._since(at_us)):
                continue
            new_reservations += await self._restore(app, reservation, self._since(at_us))
            await self._settle(app, call, self._since(at_us))
        log.info(
            "sent again what the store may have lost",
            app=app,
            events=len(events),
            new_events=new_events,
            reservations=len(reservations),
            new_reservations=new_reservations,
            settled=len(settled),
        )

    def _since(self, at_us: int) -> int:
        return self._boot_us() - at_us

    async def _restore(self, app: str, call: Call, by_us: int) -> bool:
        """Send a reservation that is so much older now; return whether it was lost."""
        *rest, age_us = call
        reply = await self._scripts.run("reserve", app, *rest, int(age_us) + by_us)
        return reply.values[2:] == (b"1",)

    async def _settle(self, app: str, call: Call, by_us: int) -> bool:
        """Send a commit or a cancel; return whether the store knows its reservation."""
        reservation, caller, made, age_us, status = call
        aged_us = int(age_us) + by_us
        reply = await self._scripts.run("commit", app, reservation, caller, made, aged_us, status)
        return reply.status == "OK"


def _older(entry: dict[str, Any], by_us: int) -> dict[str, Any]:
    """Return an event that happened so much longer ago."""
    entry["age_us"] += by_us
    if "block" in entry and entry["block"]["sent_age_us"] >= 0:
        entry["block"]["sent_age_us"] += by_us
    return entry
