"""Handler of watches: how things stand, then every change.

A watcher is given changes as fast as it takes them, straight from the store's bounded list of
them. So a slow one costs no memory here; if it falls behind the list it gets a fresh snapshot.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

from holdoff.names import TokenName
from holdoff.v1 import lease_pb2, lease_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure, invalid
from holdoff_coordinator.leases import READ_BATCH, token_not_found
from holdoff_coordinator.records import change_message, status_message
from holdoff_coordinator.scripts import Position

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from holdoff.names import AppName
    from holdoff_coordinator.hub import Hub
    from holdoff_coordinator.leases import Caller
    from holdoff_coordinator.scripts import Scripts

LOOK_SECONDS = 0.25
"""How often a watcher looks for changes."""

_RESUME = re.compile(r"([a-z0-9-]{1,63}):([0-9a-f]{0,32}):([0-9]{1,15})")


class Watches:
    """Watch the tokens of everything, of an app, or one token."""

    def __init__(self, scripts: Scripts, hub: Hub) -> None:
        self._scripts = scripts
        self._hub = hub

    async def watch(
        self, request: lease_service_pb2.WatchLeasesRequest, _: Caller
    ) -> AsyncIterator[lease_service_pb2.WatchLeasesResponse]:
        """Say how things stand, then every change; it ends with a `Failure` only.

        Raises:
            Failure: TOKEN_NOT_FOUND, INVALID_FIELD, DRAINING or STORE_UNAVAILABLE.
        """
        parent = validation.parent(request.parent)
        watched = {app: _App(app, at) for app, at in read_resume_token(request.resume_token)}
        if watched:
            yield lease_service_pb2.WatchLeasesResponse(resume_token=request.resume_token)
        if isinstance(parent, TokenName):
            reply = await self._scripts.run("read", parent.app, parent.token)
            if not reply.values[0]:
                raise token_not_found(parent)
        while not self._hub.draining:
            idle = True
            apps = [parent.app] if parent else await self._scripts.apps()
            watched = {app: watched.get(app) or _App(app, None) for app in apps}
            for app in watched.values():
                async for response in self._next(app, parent):
                    idle = False
                    if not response.HasField("snapshot") or response.snapshot.last:
                        response.resume_token = resume_token(watched.values())
                    yield response
            if idle:
                await asyncio.sleep(LOOK_SECONDS)
        raise Failure(
            "DRAINING",
            "this coordinator is shutting down; go on elsewhere with the last resume_token",
            retry_after_seconds=0.2,
        )

    async def _next(
        self, app: _App, parent: AppName | TokenName | None
    ) -> AsyncIterator[lease_service_pb2.WatchLeasesResponse]:
        """Yield what there is about one app now, and move on in it."""
        only = parent.token if isinstance(parent, TokenName) else None
        latest, quarantine_until_us = await self._scripts.position(app.name)
        changes = None
        if app.at == latest and not app.quarantine_moved(quarantine_until_us):
            return
        if app.at and app.at.epoch == latest.epoch and app.at.number < latest.number:
            changes = await self._scripts.changes(app.name, app.at.number)
        if changes is None:
            async for snapshot in self._snapshot(app, only, quarantine_until_us):
                yield lease_service_pb2.WatchLeasesResponse(snapshot=snapshot)
            return
        for number, change in changes:
            token = change["token"].decode()
            app.move(number)
            if (only is None or token == only) and number > app.shown.get(token, 0):
                yield lease_service_pb2.WatchLeasesResponse(change=change_message(app.name, change))

    async def _snapshot(
        self, app: _App, only: str | None, quarantine_until_us: int
    ) -> AsyncIterator[lease_pb2.Snapshot]:
        """Yield how the tokens of an app stand; changes go on from the first part's instant.

        What a later part shows already is noted, so that no change is told twice.
        """
        app.at, app.shown = None, {}
        last_id, start = "", None
        while True:
            tokens = [only] if only else await self._scripts.tokens(app.name, last_id, READ_BATCH)
            reply = await self._scripts.run("read", app.name, *tokens)
            found, number = reply.values[0], int(reply.values[1])
            start, first = start or Position(reply.epoch, number), start is None
            if number > start.number:
                app.shown.update(dict.fromkeys(tokens, number))
            last = only is not None or len(tokens) < READ_BATCH
            if last:
                app.at = start
                app.quarantine_until_us = quarantine_until_us
                left_seconds = (quarantine_until_us - reply.now_us) / 1e6
                app.quarantine_ends = time.monotonic() + left_seconds if left_seconds > 0 else None
            yield lease_pb2.Snapshot(
                app=f"apps/{app.name}",
                tokens=[
                    status_message(TokenName(app.name, entry[0].decode()), entry, reply.now_us)
                    for entry in found
                ],
                first=first,
                last=last,
            )
            if last:
                return
            last_id = tokens[-1]


class _App:
    """How far a watcher has come in an app."""

    def __init__(self, name: str, at: Position | None) -> None:
        self.name = name
        self.at = at
        """None before the end of a snapshot."""
        self.shown: dict[str, int] = {}
        """Up to which change a snapshot showed a token, where that is later than `at`."""
        self.quarantine_until_us: int | None = None
        """As the latest snapshot showed it; None when there was none."""
        self.quarantine_ends: float | None = None
        """The same by our monotonic clock, if it was still to come."""

    def quarantine_moved(self, until_us: int) -> bool:
        """Tell whether a quarantine began or ended, which is no change of any token."""
        if self.quarantine_until_us is None:
            self.quarantine_until_us = until_us
        over = self.quarantine_ends is not None and time.monotonic() > self.quarantine_ends
        return over or until_us != self.quarantine_until_us

    def move(self, number: int) -> None:
        """Go on to a change."""
        assert self.at is not None  # noqa: S101 - changes follow a snapshot
        self.at = Position(self.at.epoch, number)


def resume_token(apps: Iterable[_App]) -> str:
    """Write down where a watcher is."""
    return ",".join(
        f"{app.name}:{app.at.epoch}:{app.at.number}" for app in apps if app.at is not None
    )


def read_resume_token(text: str) -> Iterator[tuple[str, Position]]:
    """Read where a watcher was.

    Raises:
        Failure: INVALID_FIELD.
    """
    for part in filter(None, text.split(",")):
        if (match := _RESUME.fullmatch(part)) is None:
            raise invalid("resume_token", "is not one of ours; leave it out for a new watch")
        yield match[1], Position(match[2], int(match[3]))
