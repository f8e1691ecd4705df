"""Handlers of budgets: which limits an event counts in, and what is left of them.

The policy of the event's token says what is limited; the store counts. They know nothing of gRPC.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import TYPE_CHECKING, Any

import structlog

from holdoff._proof import lease_proof
from holdoff.names import BudgetName, TokenName
from holdoff.v1 import admin_service_pb2, budget_pb2, budget_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure, budget_not_found, invalid
from holdoff_coordinator.places import ScopeFilter, job_hash
from holdoff_coordinator.records import (
    back_off_message,
    back_off_sentence,
    budget_message,
    read_budgets,
    record,
    reservation_message,
    scope_words,
    user_and_host,
)
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.policies import Policy
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.limits import Limits
    from holdoff_coordinator.places import Place, Places
    from holdoff_coordinator.replays import Replays
    from holdoff_coordinator.scripts import Reply, Scripts

log = structlog.get_logger()

LEAST_RETRY_SECONDS = 0.2
"""While a probe is out nobody knows when it ends."""
MOST_EVENTS = 100
MOST_COUNT = 10_000
MOST_AGE_US = 24 * 3600 * 1_000_000
"""An event may be reported this late; budgets.lua keeps ids longer."""

_KINDS = {
    budget_pb2.EVENT_KIND_ERROR: "errors",
    budget_pb2.EVENT_KIND_TOKEN_REQUEST: "token_requests",
    budget_pb2.EVENT_KIND_CALL: "calls",
}
_OUTCOMES = {
    "COUNTED": budget_pb2.EVENT_OUTCOME_COUNTED,
    "KNOWN": budget_pb2.EVENT_OUTCOME_KNOWN,
}


class Budgets:
    """Record, reserve, commit, cancel, get, list and reset."""

    def __init__(self, scripts: Scripts, places: Places, replays: Replays, limits: Limits) -> None:
        self._scripts = scripts
        self._places = places
        self._replays = replays
        self._limits = limits

    async def record_events(
        self, request: budget_service_pb2.RecordEventsRequest, caller: Caller
    ) -> budget_service_pb2.RecordEventsResponse:
        """Count events, each once."""
        if not 0 < len(request.events) <= MOST_EVENTS:
            raise invalid("events", f"must be from 1 to {MOST_EVENTS}")
        apps, entries, limited = set(), [], []
        policies: dict[TokenName, Policy] = {}
        for event in request.events:
            place = await self._places.find("events.scope", event.scope, policies)
            apps.add(place.token.app)
            entry = _entry(event, place)
            if "block" in entry:
                entry["block"] |= await self._authority(event, place, caller)
            limited.append(bool(entry["budgets"] or "block" in entry))
            if limited[-1]:
                entries.append(entry)
        if len(apps) > 1:
            raise invalid("events", "must be of one app")
        [app] = apps
        answers: Iterator[str] = iter(())
        life = ""
        if entries:
            reply = await self._scripts.run_lasting(
                "record_events", app, json.dumps(entries), caller=caller
            )
            answers, life = iter([word.decode() for word in reply.values[0]]), reply.life
        outcomes = []
        for is_limited in limited:
            word = next(answers) if is_limited else ""
            if word == "TOO_MANY_EVENTS":
                raise _too_many(app)
            outcomes.append(_OUTCOMES.get(word, budget_pb2.EVENT_OUTCOME_NOT_LIMITED))
        self._replays.recorded(app, entries)
        log.debug("events recorded", app=app, count=len(outcomes), peer=caller.peer)
        return budget_service_pb2.RecordEventsResponse(outcomes=outcomes, store_life=life)

    async def _authority(
        self, event: budget_pb2.Event, place: Place, caller: Caller
    ) -> dict[str, bool | str]:
        """Say how far a report of a block reaches, in the form that record_events.lua expects.

        A reporter of one token may stop other tokens only with a lease of it, and only briefly.
        """
        app, token = place.token.app, place.token.token
        lease = _lease_key(event, place.token)
        if caller.speaks_for(app):
            return {"for_app": True}
        secret_hash = await self._scripts.secret_hash(app, token, lease) if lease else ""
        proof = lease_proof(secret_hash, event.id)
        is_holder = secret_hash and hmac.compare_digest(proof.encode(), event.lease_proof.encode())
        return {"for_app": False, "lease": lease} if is_holder else {"for_app": False}

    async def reserve(
        self, request: budget_service_pb2.ReserveRequest, caller: Caller
    ) -> budget_service_pb2.ReserveResponse:
        """Take room from every budget that a call would count in, or from none."""
        reservation_id = validation.request_id(request.reservation_id, "reservation_id")
        ttl_us = validation.microseconds(
            "ttl", request.ttl, 3_600_000_000, least_us=validation.LEAST_TTL_US
        )
        count = _count("count", request.count)
        if request.kind not in (budget_pb2.EVENT_KIND_CALL, budget_pb2.EVENT_KIND_TOKEN_REQUEST):
            raise invalid("kind", "must be CALL or TOKEN_REQUEST: an error cannot be reserved")
        place = await self._places.find("scope", request.scope, {})
        specs = place.specs(_KINDS[request.kind]) + place.specs("errors")
        for spec in specs:
            if count > spec["most"] - spec["margin"]:
                raise invalid("count", f"is more than {spec['limit']} ever allows")
        budgets = json.dumps(specs)
        # As earlier releases had it, so that a retry meets the same reservation.
        bound = [
            {key: value for key, value in spec.items() if key not in ("by", "coarser", "spelled")}
            for spec in specs
        ]
        call = (
            _hash(reservation_id),
            _hash(f"{caller.identity}\0{count}\0{ttl_us}\0{json.dumps(bound)}"),
            ttl_us,
            count,
            budgets,
            _hash(caller.identity),
            place.token.token,
            json.dumps(place.pair),
        )
        account, most = _hash(caller.account), self._limits.values["reservations"]
        reply = await self._scripts.run_lasting(
            "reserve", place.token.app, *call, "", account, most, caller=caller
        )
        if reply.status == "BACKING_OFF":
            raise _backing_off(place.token.app, reply, caller)
        if reply.status == "BUDGET_SPENT":
            raise _spent(place.token.app, reply)
        if reply.status == "COUNTS_UNKNOWN":
            raise _unknown(place.token.app, reply)
        if reply.status == "TOO_MANY_RESERVATIONS":
            where = f" in apps/{place.token.app}"
            raise self._limits.refusal("reservations", caller, where)
        reservation = _reservation(reply, place.token.app, reservation_id)
        if reservation.state == budget_pb2.RESERVATION_STATE_RESERVED:
            self._replays.reserved(place.token.app, place.token.token, call)
        return budget_service_pb2.ReserveResponse(reservation=reservation)

    async def commit(
        self, request: budget_service_pb2.CommitRequest, caller: Caller
    ) -> budget_service_pb2.CommitResponse:
        """Say that the call was made."""
        age_us = validation.microseconds("age", request.age, MOST_AGE_US)
        _check_status("status", request.status)
        reservation = await self._settle(request, caller, made=True, age_us=age_us)
        return budget_service_pb2.CommitResponse(reservation=reservation)

    async def cancel(
        self, request: budget_service_pb2.CancelRequest, caller: Caller
    ) -> budget_service_pb2.CancelResponse:
        """Say that the call was not made."""
        reservation = await self._settle(request, caller, made=False)
        return budget_service_pb2.CancelResponse(reservation=reservation)

    async def _settle(
        self,
        request: budget_service_pb2.CommitRequest | budget_service_pb2.CancelRequest,
        caller: Caller,
        *,
        made: bool,
        age_us: int = 0,
    ) -> budget_pb2.Reservation:
        reservation_id = validation.request_id(request.reservation_id, "reservation_id")
        app = validation.app_name("app", request.app).app
        status = request.status if isinstance(request, budget_service_pb2.CommitRequest) else 0
        call = (
            _hash(reservation_id),
            _hash(caller.identity),
            "1" if made else "0",
            age_us,
            status,
        )
        reply = await self._scripts.run_lasting("commit", app, *call, caller=caller)
        reservation = _reservation(reply, app, reservation_id)
        self._replays.settled(app, call, reply)
        return reservation

    async def _read(self, app: str, ids: list[str], caller: Caller) -> list[budget_pb2.Budget]:
        reply = await self._scripts.run("read_budgets", app, *ids)
        return read_budgets(self._scripts, app, reply, caller)

    async def get(
        self, request: budget_service_pb2.GetBudgetRequest, caller: Caller
    ) -> budget_service_pb2.GetBudgetResponse:
        """Return one budget."""
        name = validation.budget_name("name", request.name)
        for budget in await self._read(name.app, [name.budget], caller):
            return budget_service_pb2.GetBudgetResponse(budget=budget)
        raise budget_not_found(str(name))

    async def list(
        self, request: budget_service_pb2.ListBudgetsRequest, caller: Caller
    ) -> budget_service_pb2.ListBudgetsResponse:
        """List budgets, those with the least room first."""
        parent = validation.parent(request.parent)
        if isinstance(parent, TokenName):
            raise invalid("parent", "write apps/{app} and name the token in `scope`")
        size = validation.page_size(request.page_size)
        after = _read_page_token(request.page_token)
        wanted, state = ScopeFilter(request.scope), request.state
        only = parent.app if parent else wanted.app
        found: list[budget_pb2.Budget] = []
        for app in [only] if only else await self._scripts.apps_with("budgets"):
            with self._scripts.sparing(app, "budgets"):
                ids = await self._scripts.budgets(app)
                for start in range(0, len(ids), READ_BATCH):
                    found += await self._read(app, ids[start : start + READ_BATCH], caller)
        matching = [
            budget
            for budget in found
            if wanted.matches(budget.scope)
            and state in (budget_pb2.BUDGET_STATE_UNSPECIFIED, budget.state)
        ]
        matching.sort(key=_order)
        rest = [budget for budget in matching if after is None or _order(budget) > after]
        page, more = rest[:size], len(rest) > size
        return budget_service_pb2.ListBudgetsResponse(
            budgets=page, next_page_token=_page_token(page[-1]) if more else ""
        )

    async def reset(
        self, request: admin_service_pb2.ResetBudgetRequest, caller: Caller
    ) -> admin_service_pb2.ResetBudgetResponse:
        """Make a budget forget what it counted."""
        name = validation.budget_name("name", request.name)
        reason = validation.reason(request.reason)
        who = user_and_host(validation.holder(request.holder)) or caller.identity
        reply = await self._scripts.run(
            "reset_budget", name.app, name.budget, who, reason, caller=caller
        )
        if reply.status != "OK":
            raise budget_not_found(str(name))
        return admin_service_pb2.ResetBudgetResponse(
            budget=budget_message(name.app, reply.values[0], reply.now_us)
        )


def _entry(event: budget_pb2.Event, place: Place) -> dict[str, Any]:
    """An event as record_events.lua takes it."""
    event_id = validation.request_id(event.id, "events.id")
    age_us = validation.microseconds("events.age", event.age)
    if age_us > MOST_AGE_US:
        raise Failure("EVENT_TOO_OLD", "events.age: an event must be reported within a day")
    _check_status("events.status", event.status)
    job, host = validation.holder(event.holder).job, event.holder.host
    count = _count("events.count", event.count)
    entry: dict[str, Any] = {
        "id": _hash(event_id),  # as those of reservations, whose events have their id
        "token": place.token.token,
        "age_us": age_us,
        "count": count,
        "budgets": [],
        "shown": "",
        "cause": {"job": job, "host": host, "user": event.holder.user, "status": event.status},
    }
    if event.kind in (budget_pb2.EVENT_KIND_ERROR, budget_pb2.EVENT_KIND_BLOCK):
        entry["error"] = {
            "place": place.pair,
            "touched": [who for who in (job_hash(job), _lease_key(event, place.token)) if who],
        }
    if event.kind == budget_pb2.EVENT_KIND_BLOCK:
        entry["block"] = {
            **place.block(event.throttle),
            "retry_after_us": _optional_us(event, "retry_after"),
            "sent_age_us": _optional_us(event, "sent_age"),
        }
        return entry
    kind = _KINDS.get(event.kind)
    if kind is None:
        raise invalid("events.kind", "must be ERROR, TOKEN_REQUEST, CALL or BLOCK")
    entry["budgets"] = place.specs(kind, event.status)
    if kind == "errors":
        entry["shown"] = {
            "token": place.token.token,
            "division": place.division,
            "endpoint": place.spelled,
            "status": event.status,
            "count": count,
            "job": job,
            "host": host,
        }
    return entry


def _optional_us(event: budget_pb2.Event, field: str) -> int:
    """Read a Duration of an event; -1 if it is absent."""
    if not event.HasField(field):  # type: ignore[arg-type]
        return -1
    return validation.microseconds(f"events.{field}", getattr(event, field))


def _lease_key(event: budget_pb2.Event, token: TokenName) -> str:
    """Return the id of the lease of an event; '' for none."""
    if not event.lease:
        return ""
    name = validation.lease_name("events.lease", event.lease)
    if name.token_name != token:
        raise invalid("events.lease", f"is no lease of {token}")
    return name.lease


def _check_status(field: str, status: int) -> None:
    if not 0 <= status <= 599:  # noqa: PLR2004 - HTTP's last
        raise invalid(field, "must be an HTTP status, or 0")


def _count(field: str, value: int) -> int:
    if value > MOST_COUNT:
        raise invalid(field, f"must be at most {MOST_COUNT}")
    return value or 1


def _reservation(reply: Reply, app: str, reservation_id: str) -> budget_pb2.Reservation:
    match reply.status:
        case "OK":
            return reservation_message(reservation_id, reply.values, reply.now_us)
        case "RESERVATION_NOT_FOUND":
            raise Failure(
                "RESERVATION_NOT_FOUND",
                f"apps/{app} has no such reservation of this caller, or it has long expired",
            )
        case "RESERVATION_ID_REUSED":
            raise Failure(
                "REQUEST_ID_REUSED",
                "reservation_id: belongs to another reservation; a new one needs a new id",
                field="reservation_id",
            )
        case _:
            raise _too_many(app)


def _too_many(app: str) -> Failure:
    return Failure(
        "TOO_MANY_EVENTS",
        f"a token of apps/{app} has too many events to remember: report several as one, with a "
        "`count`",
        retry_after_seconds=60.0,
    )


def _spent(app: str, reply: Reply) -> Failure:
    """Say which budget stands in the way for longest."""
    budgets = [budget_message(app, entry, reply.now_us) for entry in reply.values[0]]
    last = max(budgets, key=lambda budget: budget.room_time.ToMicroseconds())
    return Failure(
        "BUDGET_SPENT",
        f"the budget {last.limit!r} of {scope_words(last.scope)} has no room: {last.used} used and "
        f"{last.reserved} reserved of {last.most}, margin {last.margin}",
        resource=last.name,
        retry_after_seconds=last.room_in.ToMicroseconds() / 1e6,
    )


def _unknown(app: str, reply: Reply) -> Failure:
    """What the store may have lost counts as spent."""
    return Failure(
        "COUNTS_UNKNOWN",
        f"the store may have lost what was counted for apps/{app}, which therefore counts as spent",
        resource=f"apps/{app}",
        retry_after_seconds=max(LEAST_RETRY_SECONDS, (int(reply.values[0]) - reply.now_us) / 1e6),
    )


def _backing_off(app: str, reply: Reply, caller: Caller) -> Failure:
    """Say what has to end before there may be calls."""
    start_us = int(reply.values[0])
    back_off = back_off_message(app, record(reply.values[1]), reply.now_us, caller)
    return Failure(
        "BACKING_OFF",
        back_off_sentence(back_off),
        resource=back_off.name,
        retry_after_seconds=max(LEAST_RETRY_SECONDS, (start_us - reply.now_us) / 1e6),
    )


def _order(budget: budget_pb2.Budget) -> tuple[int, str]:
    return budget.room, budget.name


def _page_token(budget: budget_pb2.Budget) -> str:
    return f"{budget.room}:{budget.name}"


def _read_page_token(text: str) -> tuple[int, str] | None:
    if not text:
        return None
    room, _, name = text.partition(":")
    if not re.fullmatch(r"[0-9]{1,12}", room):
        raise validation.unknown_page_token(text)
    try:
        return int(room), str(BudgetName.parse(name))
    except ValueError:
        raise validation.unknown_page_token(text) from None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
