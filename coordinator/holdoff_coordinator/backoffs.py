"""Handlers of back-offs: list, set, clear, and explain what stands in the way of a scope."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import structlog

from holdoff._places import folded, normal_endpoint
from holdoff.durations import format_duration
from holdoff.names import AppName, TokenName
from holdoff.v1 import admin_service_pb2, budget_pb2, budget_service_pb2, lease_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure, token_damaged, token_not_found
from holdoff_coordinator.places import job_hash, scope_id
from holdoff_coordinator.records import (
    back_off_message,
    back_off_sentence,
    duration,
    held_words,
    quarantine_message,
    quarantine_show,
    read_back_offs,
    read_budgets,
    record,
    scope_words,
    status_message,
    timestamp,
    user_and_host,
)
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from holdoff.v1 import grant_pb2
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.places import Places
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

LEAST_LENGTH_US = 1_000_000
MOST_LENGTH_US = 31 * 24 * 3600 * 1_000_000
MOST_BACK_OFFS = 1000
MOST_EXPLAINED = 20
"""Budgets, and errors, in an explanation."""


class BackOffs:
    """List, set, clear and explain."""

    def __init__(
        self,
        scripts: Scripts,
        places: Places,
        explain_grant: Callable[[TokenName], Awaitable[grant_pb2.GrantExplanation | None]],
    ) -> None:
        self._scripts = scripts
        self._places = places
        self._explain_grant = explain_grant

    async def list_all(
        self, request: budget_service_pb2.ListBackOffsRequest, caller: Caller
    ) -> budget_service_pb2.ListBackOffsResponse:
        """List the back-offs that are not over, those that end last first."""
        parent = validation.app_parent(request.parent)
        found: list[budget_pb2.BackOff] = []
        for app in [parent.app] if parent else await self._scripts.apps_with("backoffs"):
            found += await self._read(app, caller)
        return budget_service_pb2.ListBackOffsResponse(back_offs=found)

    async def set(
        self, request: admin_service_pb2.SetBackOffRequest, caller: Caller
    ) -> admin_service_pb2.SetBackOffResponse:
        """Make a scope quiet."""
        app, place, spelled = await self._scope("scope", request.scope)
        length_us = validation.microseconds(
            "length", request.length, MOST_LENGTH_US, least_us=LEAST_LENGTH_US
        )
        reason, holder = validation.reason(request.reason), validation.holder(request.holder)
        facts = {
            **place,
            "spelled": spelled,
            "reason": reason,
            **{field: getattr(holder, field) for field in ("user", "host", "job")},
        }
        back_off_id = scope_id("operator", place)
        reply = await self._scripts.run(
            "set_back_off", app, back_off_id, length_us, json.dumps(facts), caller=caller
        )
        back_off = back_off_message(app, record(reply.values[0]), reply.now_us, caller)
        return admin_service_pb2.SetBackOffResponse(back_off=back_off)

    async def clear(
        self, request: admin_service_pb2.ClearBackOffRequest, caller: Caller
    ) -> admin_service_pb2.ClearBackOffResponse:
        """End a back-off."""
        name = validation.back_off_name("name", request.name)
        reason, holder = validation.reason(request.reason), validation.holder(request.holder)
        who = user_and_host(holder) or caller.identity
        reply = await self._scripts.run(
            "clear_back_off", name.app, name.back_off, reason, who, caller=caller
        )
        if reply.status != "OK":
            raise Failure(
                "BACK_OFF_NOT_FOUND", f"there is no {name}, or it is over", resource=str(name)
            )
        return admin_service_pb2.ClearBackOffResponse(
            back_off=back_off_message(name.app, record(reply.values[0]), reply.now_us, caller)
        )

    async def explain(
        self, request: budget_service_pb2.ExplainRequest, caller: Caller
    ) -> budget_service_pb2.ExplainResponse:
        """Say what stands in the way of a scope, and who caused it."""
        app, values, spelled = await self._scope("scope", request.scope)
        validation.printable("job", request.job, 100)
        token = TokenName(app, values["token"]) if values["token"] else None
        pairs = [(values["division"], values["endpoint"])]
        grant = await self._explain_grant(token) if token else None
        obstacles: list[budget_service_pb2.Obstacle] = []
        start_in_us, is_quarantined = 0, True
        if token:
            obstacles, start_in_us, is_quarantined = await self._token_obstacles(token, grant)
        if is_quarantined:
            obstacles += await self._quarantine(app)
        asked = values["token"] or " ", json.dumps(pairs), job_hash(request.job)
        back_offs = await self._read(app, caller, asked)
        obstacles += [_back_off_obstacle(one) for one in back_offs]
        names = {one.name for one in back_offs}
        narrower = [
            one
            for one in await self._read(app, caller)
            if one.name not in names and _concerns(one.scope, request.scope.token, values)
        ]
        obstacles.sort(key=lambda one: -one.remaining.ToMicroseconds())
        budgets = await self._budgets(app, request.scope.token, values, caller)
        errors = await self._errors(app, values)
        scopes = [
            *(one.scope for one in back_offs),
            *(one.scope for one in budgets),
            *(one.scope for one in errors),
        ]
        shown = (one.endpoint for one in scopes if folded(one.endpoint) == values["endpoint"])
        spelled = next(shown, spelled)
        longest = max([start_in_us, *(one.remaining.ToMicroseconds() for one in obstacles)])
        return budget_service_pb2.ExplainResponse(
            must_wait=bool(obstacles),
            go_in=duration(longest) if obstacles else None,
            obstacles=obstacles,
            budgets=budgets,
            errors=errors,
            message=_words(_scope_of(app, values, spelled), obstacles, longest),
            narrower=narrower,
            grant=grant,
        )

    async def _scope(self, field: str, scope: budget_pb2.Scope) -> tuple[str, dict[str, str], str]:
        """Check a scope of an app or a token.

        Returns:
            Its app, its values as they are compared, and its endpoint as it is spelled.
        """
        if scope.token:
            place = await self._places.find(field, scope, {})
            values = {
                "token": place.token.token,
                "division": place.division,
                "endpoint": place.endpoint,
            }
            return place.token.app, values, place.spelled
        app = validation.app_name(f"{field}.app", scope.app).app
        validation.place(field, scope)
        if app not in await self._scripts.apps():
            raise Failure(
                "TOKEN_NOT_FOUND",
                f"apps/{app} has no token; create one: holdoff token create apps/{app}/tokens/…",
                resource=str(AppName(app)),
            )
        spelled = normal_endpoint(scope.endpoint)
        values = {"token": "", "division": scope.division, "endpoint": folded(spelled)}
        return app, values, spelled

    async def _read(
        self, app: str, caller: Caller, asked: tuple[str, str, str] | None = None
    ) -> list[budget_pb2.BackOff]:
        """Read the back-offs that a caller may see, or all that concern what was `asked`."""
        reply = await self._scripts.run("read_back_offs", app, *(asked or ("", "", "")))
        concerned = asked is not None
        found = read_back_offs(self._scripts, app, reply, caller, concerned=concerned)
        return sorted(found, key=lambda one: (-one.end_time.ToMicroseconds(), one.name))

    async def _token_obstacles(
        self, token: TokenName, grant: grant_pb2.GrantExplanation | None
    ) -> tuple[list[budget_service_pb2.Obstacle], int, bool]:
        """What prevents a lease on a token, apart from back-offs and a quarantine.

        How many runs share a token in custody is added to the explanation of its grant.

        Returns:
            The obstacles, the earliest start in µs, and whether a quarantine holds the token, too.
        """
        reply = await self._scripts.run("read", token.app, token.token)
        if not reply.values[0]:
            raise token_damaged(token) if reply.damaged else token_not_found(token)
        [entry] = reply.values[0]
        status, now_us = status_message(token, entry, reply.now_us), reply.now_us
        obstacles = []
        if grant:
            grant.shared_lease_count = status.shared_lease_count
            if status.shared_lease_count >= grant.most_runs > 0:
                obstacles.append(
                    budget_service_pb2.Obstacle(
                        reason=lease_pb2.WAIT_REASON_HELD,
                        message=f"{status.shared_lease_count} runs share the token in custody, as "
                        "many as its policy allows at the same time: the next one starts when one "
                        "of them ends",
                    )
                )
        elif status.HasField("lease"):
            lease = status.lease
            obstacles.append(
                budget_service_pb2.Obstacle(
                    reason=lease_pb2.WAIT_REASON_HELD,
                    message=held_words(lease),
                    start_time=(
                        lease.accept_time if lease.HasField("accept_time") else lease.create_time
                    ),
                    caused_by=lease.holder,
                    lease=lease,
                )
            )
        elif status.wait_reason == lease_pb2.WAIT_REASON_HELD:
            obstacles.append(
                budget_service_pb2.Obstacle(
                    reason=lease_pb2.WAIT_REASON_HELD,
                    message="its lock is held by a python-redis-lock user",
                )
            )
        if status.HasField("cooldown") and not grant:  # in custody it holds up no run
            flat = record(entry[1])
            obstacles.append(
                budget_service_pb2.Obstacle(
                    reason=lease_pb2.WAIT_REASON_COOLING,
                    message="cooling down after the last refresh",
                    start_time=timestamp(flat, "last_refresh_us"),
                    end_time=status.not_before_time,
                    remaining=status.cooldown,
                )
            )
        if status.queue_length:
            obstacles.append(
                budget_service_pb2.Obstacle(
                    reason=lease_pb2.WAIT_REASON_QUEUED,
                    message=f"{_waiters(status.queue_length)}: holdoff token queue {token}",
                )
            )
        is_quarantined = status.wait_reason == lease_pb2.WAIT_REASON_QUARANTINED
        return obstacles, int(entry[6]) - now_us, is_quarantined or not grant

    async def _quarantine(self, app: str) -> list[budget_service_pb2.Obstacle]:
        reply = await self._scripts.run("read_quarantine", app)
        one = quarantine_message(app, record(reply.values[0]), reply.now_us)
        if not one.HasField("remaining"):
            return []
        obstacle = budget_service_pb2.Obstacle(
            reason=lease_pb2.WAIT_REASON_QUARANTINED,
            message=f"quarantined: {one.reason}: {quarantine_show(app)}",
            start_time=one.start_time if one.HasField("start_time") else None,
            end_time=one.end_time,
            remaining=one.remaining,
        )
        return [obstacle]

    async def _budgets(
        self, app: str, token: str, values: dict[str, str], caller: Caller
    ) -> list[budget_pb2.Budget]:
        ids = await self._scripts.budgets(app)
        found: list[budget_pb2.Budget] = []
        for start in range(0, len(ids), READ_BATCH):
            reply = await self._scripts.run("read_budgets", app, *ids[start : start + READ_BATCH])
            found += read_budgets(self._scripts, app, reply, caller)
        found = [one for one in found if _concerns(one.scope, token, values)]
        return sorted(found, key=lambda one: (one.room, one.name))[:MOST_EXPLAINED]

    async def _errors(self, app: str, values: dict[str, str]) -> list[budget_pb2.RecentError]:
        found: list[budget_pb2.RecentError] = []
        for at_us, event in await self._scripts.errors(app, values["token"]):
            facts = json.loads(event)
            where = {**facts, "endpoint": folded(facts["endpoint"])}
            if len(found) < MOST_EXPLAINED and all(
                value in ("", where[field]) for field, value in values.items()
            ):
                found.append(
                    budget_pb2.RecentError(
                        time=timestamp({"at": at_us}, "at"),
                        scope=budget_pb2.Scope(
                            app=f"apps/{app}",
                            token=str(TokenName(app, facts["token"])),
                            division=facts["division"],
                            endpoint=facts["endpoint"],
                        ),
                        status=facts["status"],
                        count=facts["count"],
                        holder=lease_pb2.Holder(job=facts["job"], host=facts["host"]),
                    )
                )
        return found


def _waiters(count: int) -> str:
    return "1 waiter" if count == 1 else f"{count} waiters"


def _scope_of(app: str, values: dict[str, str], spelled: str) -> budget_pb2.Scope:
    return budget_pb2.Scope(
        app=str(AppName(app)),
        token=str(TokenName(app, values["token"])) if values["token"] else "",
        division=values["division"],
        endpoint=spelled,
    )


def _concerns(scope: budget_pb2.Scope, token: str, values: dict[str, str]) -> bool:
    """Whether calls of what is asked for may fall into a scope: no value is another one."""
    return all(
        "" in pair or pair[0] == pair[1]
        for pair in (
            (scope.token, token),
            (scope.division, values["division"]),
            (folded(scope.endpoint), values["endpoint"]),
        )
    )


def _back_off_obstacle(back_off: budget_pb2.BackOff) -> budget_service_pb2.Obstacle:
    return budget_service_pb2.Obstacle(
        reason=lease_pb2.WAIT_REASON_BACKING_OFF,
        message=back_off_sentence(back_off),
        start_time=back_off.start_time,
        end_time=back_off.end_time,
        remaining=back_off.remaining if back_off.HasField("remaining") else None,
        caused_by=back_off.caused_by,
        back_off=back_off,
    )


def _words(
    scope: budget_pb2.Scope, obstacles: Iterable[budget_service_pb2.Obstacle], longest_us: int
) -> str:
    where, reasons = scope_words(scope), [one.message for one in obstacles]
    if not reasons:
        return f"{where} may start now"
    when = f" for at least {format_duration(longest_us / 1e6)}" if longest_us else ""
    return f"{where} must wait{when}: {reasons[0]}"
