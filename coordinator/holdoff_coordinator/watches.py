"""Handler of watches: how things stand, then every change.

A watcher is given changes as fast as it takes them, straight from the store's bounded list of
them. So a slow one costs no memory here; if it falls behind the list it gets a fresh snapshot.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from holdoff.names import BudgetName, TokenName
from holdoff.v1 import budget_pb2, budget_service_pb2, lease_pb2, lease_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure, token_damaged, token_not_found
from holdoff_coordinator.looks import Watcher
from holdoff_coordinator.places import ScopeFilter
from holdoff_coordinator.records import (
    change_message,
    read_back_offs,
    read_budgets,
    status_message,
)
from holdoff_coordinator.resuming import ResumeTokens, sealed_of
from holdoff_coordinator.scripts import READ_BATCH, Position

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from holdoff.names import AppName
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.hub import Hub
    from holdoff_coordinator.limits import Limits
    from holdoff_coordinator.looks import Looks
    from holdoff_coordinator.scripts import Scripts

BUDGET_LOOK_SECONDS = 1.0
"""How soon a budget that is not open is looked at again at the earliest."""


class Watches:
    """Watch the tokens of everything, of an app, or one token."""

    def __init__(self, scripts: Scripts, hub: Hub, looks: Looks, limits: Limits) -> None:
        self._scripts = scripts
        self._hub = hub
        self._looks = looks
        self._limits = limits

    async def watch(
        self, request: lease_service_pb2.WatchLeasesRequest, caller: Caller
    ) -> AsyncGenerator[lease_service_pb2.WatchLeasesResponse, None]:
        """Say how things stand, then every change; it ends with a `Failure` only.

        Raises:
            Failure: TOKEN_NOT_FOUND, INVALID_FIELD, DRAINING or STORE_UNAVAILABLE.
        """
        parent = validation.parent(request.parent)
        sealed = sealed_of(request.resume_token)
        if isinstance(parent, TokenName):
            async with self._limits.reading(caller):
                reply = await self._scripts.run("read", parent.app, parent.token)
            if not reply.values[0]:
                raise token_damaged(parent) if reply.damaged else token_not_found(parent)
        tokens = await ResumeTokens.of_store(self._scripts)
        watched = {app: _App(app, at) for app, at in tokens.read(sealed).items()}
        if watched:
            yield lease_service_pb2.WatchLeasesResponse(resume_token=request.resume_token)
        watcher = Watcher(parent.app if parent else None, caller.knows)
        watched = {name: app for name, app in watched.items() if watcher.concerns(name)}
        ends: dict[str, float] = {}
        """When to look at an app although nothing of it changed."""
        with self._looks.joined(watcher):
            while not self._hub.draining:
                moved = await watcher.moved(min(ends.values(), default=None))
                over = [name for name, at in ends.items() if at <= time.monotonic()]
                for name in sorted({*moved, *over}):
                    app = watched.setdefault(name, _App(name, None))
                    with self._scripts.sparing(name, "app"):
                        async for response in self._next(app, parent, watcher, caller):
                            if not response.HasField("snapshot") or response.snapshot.last:
                                response.resume_token = tokens.write(
                                    (one.name, one.at) for one in watched.values() if one.at
                                )
                            yield response
                    ends.pop(name, None)
                    if app.quarantine_ends is not None:
                        ends[name] = app.quarantine_ends
        raise Failure(
            "DRAINING",
            "this coordinator is shutting down; continue at another one with the last resume_token",
            retry_after_seconds=0.2,
        )

    async def _next(
        self, app: _App, parent: AppName | TokenName | None, watcher: Watcher, caller: Caller
    ) -> AsyncIterator[lease_service_pb2.WatchLeasesResponse]:
        """Yield what there is about one app now, and move on in it."""
        only = parent.token if isinstance(parent, TokenName) else None
        stand = self._looks.stands.get(app.name)
        if stand is None:
            return
        latest, changes = stand.position, None
        moved = app.moved_as_a_whole(stand.quarantine_until_us, stand.back_off_moves)
        if not moved and (app.at == latest or self._is_old(app, latest)):
            return
        if app.at and app.at.epoch == latest.epoch and app.at.number < latest.number:
            async with self._limits.reading(caller):
                changes = await self._looks.changes(app.name, app.at.number)
        if changes is None:
            app.back_off_moves = stand.back_off_moves
            async for snapshot in self._snapshot(app, only, stand.quarantine_until_us, caller):
                yield lease_service_pb2.WatchLeasesResponse(snapshot=snapshot)
            return
        for number, change in changes:
            token = change["token"].decode()
            app.move(number)
            if (only is None or token == only) and number > app.shown.get(token, 0):
                with self._scripts.sparing(app.name, f"tokens/{token}"):
                    yield lease_service_pb2.WatchLeasesResponse(
                        change=change_message(app.name, change)
                    )
        if moved or (app.at and app.at.number < latest.number):
            watcher.stir(app.name)

    def _is_old(self, app: _App, latest: Position) -> bool:
        """Whether the last look at an app is older than the position of a watcher."""
        if app.at is None or app.at.epoch != latest.epoch:
            return False
        return app.at.number > latest.number and self._looks.began <= app.at_since

    async def _snapshot(
        self, app: _App, only: str | None, quarantine_until_us: int, caller: Caller
    ) -> AsyncIterator[lease_pb2.Snapshot]:
        """Yield how the tokens of an app stand; changes go on from the first part's instant.

        What a later part shows already is noted, so that no change is told twice.
        """
        app.at, app.shown = None, {}
        last_id, start = "", None
        while True:
            async with self._limits.reading(caller):
                tokens = (
                    [only] if only else await self._scripts.tokens(app.name, last_id, READ_BATCH)
                )
                reply = await self._scripts.run("read", app.name, *tokens)
            found, number = reply.values[0], int(reply.values[1])
            start, first = start or Position(reply.epoch, number), start is None
            if number > start.number:
                app.shown.update(dict.fromkeys(tokens, number))
            last = only is not None or len(tokens) < READ_BATCH
            if last:
                app.at, app.at_since = start, time.monotonic()
                app.quarantine_until_us = quarantine_until_us
                left_seconds = (quarantine_until_us - reply.now_us) / 1e6
                app.quarantine_ends = time.monotonic() + left_seconds if left_seconds > 0 else None

            def read(entry: Any, now_us: int = reply.now_us) -> lease_pb2.TokenStatus:
                return status_message(TokenName(app.name, entry[0].decode()), entry, now_us)

            yield lease_pb2.Snapshot(
                app=f"apps/{app.name}",
                tokens=self._scripts.readable(app.name, "tokens", found, read),
                first=first,
                last=last,
            )
            if last:
                return
            last_id = tokens[-1]


class BudgetWatches:
    """Watch the budgets and back-offs of everything, or of an app."""

    def __init__(self, scripts: Scripts, hub: Hub, looks: Looks, limits: Limits) -> None:
        self._scripts = scripts
        self._hub = hub
        self._looks = looks
        self._limits = limits

    async def watch(
        self, request: budget_service_pb2.WatchBudgetsRequest, caller: Caller
    ) -> AsyncGenerator[budget_service_pb2.WatchBudgetsResponse, None]:
        """Say how budgets and back-offs stand, then what changed; it ends with a `Failure` only.

        Raises:
            Failure: INVALID_FIELD, DRAINING or STORE_UNAVAILABLE.
        """
        parent = validation.app_parent(request.parent)
        wanted = ScopeFilter(request.scope)
        watched: dict[str, _Budgets] = {}
        told_all = False
        watcher = Watcher(parent.app if parent else wanted.app, caller.knows)
        ends: dict[str, float] = {}
        """When to look at an app although nothing of it changed."""
        with self._looks.joined(watcher):
            while not self._hub.draining:
                moved = await watcher.moved(min(ends.values(), default=None))
                over = [name for name, at in ends.items() if at <= time.monotonic()]
                for name in sorted({*moved, *over}):
                    budgets = watched.setdefault(name, _Budgets(name))
                    with self._scripts.sparing(name, "app"):
                        async for response in self._next(budgets, wanted, caller):
                            yield response
                    ends.pop(name, None)
                    if budgets.look_at:
                        ends[name] = min(budgets.look_at.values())
                if not told_all and watcher.was_shown:
                    told_all = True
                    yield budget_service_pb2.WatchBudgetsResponse(snapshot_end=True)
        raise Failure(
            "DRAINING",
            "this coordinator is shutting down; watch at another one",
            retry_after_seconds=0.2,
        )

    async def _next(
        self, app: _Budgets, wanted: ScopeFilter, caller: Caller
    ) -> AsyncIterator[budget_service_pb2.WatchBudgetsResponse]:
        """Yield what of an app is not as it was told."""
        stand, now = self._looks.stands.get(app.name), time.monotonic()
        if stand and not stand.moves:  # of most apps nothing was ever counted
            app.at, app.back_offs = 0, app.back_offs or {}
            return
        async with self._limits.reading(caller):
            number, ids, moved = await self._scripts.moved(app.name, app.at)
        # What stood at the end of a window, or of a quiet, moves by itself.
        due = [budget for budget, at in app.look_at.items() if at <= now]
        if app.at is None:
            async with self._limits.reading(caller):
                ids = await self._scripts.budgets(app.name)
        app.at = number
        for start in range(0, len(found := sorted({*ids, *due})), READ_BATCH):
            batch = found[start : start + READ_BATCH]
            async with self._limits.reading(caller):
                reply = await self._scripts.run("read_budgets", app.name, *batch)
            budgets = read_budgets(self._scripts, app.name, reply, caller)
            told = [
                one
                for one in budgets
                if wanted.matches(one.scope) and app.is_news(one, reply.now_us)
            ]
            gone = app.gone(batch, {BudgetName.parse(one.name).budget for one in budgets})
            if told or gone:
                yield budget_service_pb2.WatchBudgetsResponse(budgets=[*told, *gone])
        if moved or app.back_offs is None or due:
            async with self._limits.reading(caller):
                reply = await self._scripts.run("read_back_offs", app.name, "", "", "")
            back_offs = read_back_offs(self._scripts, app.name, reply, caller)
            news = app.back_off_news([one for one in back_offs if wanted.matches(one.scope)])
            if news:
                yield budget_service_pb2.WatchBudgetsResponse(back_offs=news)


class _Budgets:
    """What a watcher of budgets knows of an app."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at: int | None = None
        """The number of the latest move that was told; None before the first look."""
        self.look_at: dict[str, float] = {}
        """When to look at a budget again that time alone changes, by our monotonic clock."""
        self.back_offs: dict[str, budget_pb2.BackOff] | None = None
        self._told: dict[str, bytes] = {}

    def is_news(self, budget: budget_pb2.Budget, now_us: int) -> bool:
        """Take in a budget; tell whether the watcher has to hear of it."""
        budget_id = BudgetName.parse(budget.name).budget
        is_open = budget.state == budget_pb2.BUDGET_STATE_OPEN
        if is_open and not budget.used:
            self.look_at.pop(budget_id, None)
        else:
            change_us = budget.room_in.ToMicroseconds()
            if is_open:  # the last event leaves the window
                last_us = budget.last_event_time.ToMicroseconds()
                change_us = last_us + budget.window.ToMicroseconds() - now_us
            change_seconds = max(change_us / 1e6, BUDGET_LOOK_SECONDS)
            self.look_at[budget_id] = time.monotonic() + change_seconds
        facts = budget_pb2.Budget()
        facts.CopyFrom(budget)
        facts.ClearField("room_in")
        told, self._told[budget_id] = self._told.get(budget_id), facts.SerializeToString()
        return told != self._told[budget_id]

    def gone(self, asked: Iterable[str], found: set[str]) -> list[budget_pb2.Budget]:
        """Return those that were told of, and have nothing left in their window."""
        ended = []
        for budget_id in asked:
            if budget_id not in found and (told := self._told.pop(budget_id, None)) is not None:
                self.look_at.pop(budget_id, None)
                last = budget_pb2.Budget.FromString(told)
                last.state, last.used, last.reserved = budget_pb2.BUDGET_STATE_OPEN, 0, 0
                last.room = last.most - last.margin
                last.ClearField("room_time")
                ended.append(last)
        return ended

    def back_off_news(self, back_offs: Iterable[budget_pb2.BackOff]) -> list[budget_pb2.BackOff]:
        """Take in all back-offs; return those that are not as they were told, over ones too."""
        before, self.back_offs = self.back_offs or {}, {one.name: one for one in back_offs}
        news = [
            one
            for name, one in self.back_offs.items()
            if name not in before or _stand(before[name]) != _stand(one)
        ]
        for name in before.keys() - self.back_offs.keys():
            last = before[name]
            last.state = budget_pb2.BACK_OFF_STATE_UNSPECIFIED
            last.ClearField("remaining")
            news.append(last)
        return news


def _stand(back_off: budget_pb2.BackOff) -> tuple[object, ...]:
    """What of a back-off has to change for a watcher to hear of it."""
    return back_off.state, back_off.end_time.ToMicroseconds(), back_off.probe.SerializeToString()


class _App:
    """How far a watcher has come in an app."""

    def __init__(self, name: str, at: Position | None) -> None:
        self.name = name
        self.at = at
        """None before the end of a snapshot."""
        self.at_since = time.monotonic()
        self.shown: dict[str, int] = {}
        """Up to which change a snapshot showed a token, where that is later than `at`."""
        self.quarantine_until_us: int | None = None
        """As the latest snapshot showed it; None when there was none."""
        self.back_off_moves = 0
        """How often a back-off had changed when the latest snapshot began."""
        self.quarantine_ends: float | None = None
        """The same by our monotonic clock, if it was still to come."""

    def moved_as_a_whole(self, quarantine_until_us: int, back_off_moves: int) -> bool:
        """Tell whether a quarantine or a back-off began or ended: no change of any one token."""
        if self.quarantine_until_us is None:
            self.quarantine_until_us = quarantine_until_us
            self.back_off_moves = back_off_moves
        over = self.quarantine_ends is not None and time.monotonic() > self.quarantine_ends
        return (
            over
            or quarantine_until_us != self.quarantine_until_us
            or back_off_moves != self.back_off_moves
        )

    def move(self, number: int) -> None:
        """Go on to a change."""
        assert self.at is not None  # noqa: S101 - changes follow a snapshot
        self.at, self.at_since = Position(self.at.epoch, number), time.monotonic()
