"""Where calls go: divisions and endpoints in their normal form, and what is limited there.

The policy of a token says both; every way in goes through here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

from holdoff._places import folded, normal_endpoint
from holdoff.durations import format_duration
from holdoff.names import AppName
from holdoff.v1 import lease_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import invalid, token_not_found
from holdoff_coordinator.records import record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from holdoff.names import TokenName
    from holdoff.policies import Limit, Policy, ScopeField
    from holdoff.v1 import budget_pb2
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

EXACT_MOST = 1000
"""Limits up to this are counted event by event; larger ones in slices of a 240th window."""
SLICES = 240
MOST_SCOPES = 100
"""Places that a request for a lease may name."""


class Place:
    """Where an event happened, in the normal form of its token's policy.

    What is compared and stored has the folded endpoint; `spelled` is only for people.
    """

    def __init__(self, token: TokenName, policy: Policy, division: str, endpoint: str) -> None:
        self.token = token
        self.policy = policy
        found, self.spelled = policy.place(endpoint)
        self.endpoint = folded(self.spelled)
        self.division = division.strip() or found

    @property
    def pair(self) -> tuple[str, str]:
        """What the scripts call a place."""
        return self.division, self.endpoint

    def specs(self, kind: str, status: int = 0) -> list[dict[str, Any]]:
        """Return the budgets that count an event here, as budgets.lua takes them.

        An error whose status is not known counts in every limit on errors.
        """
        return [
            self._spec(limit)
            for limit in self.policy.limit
            if limit.event == kind and (not status or kind != "errors" or status in limit.statuses)
        ]

    def _spec(self, limit: Limit) -> dict[str, Any]:
        window_us = round(limit.window * 1e6)
        values = self._values(limit.scope)
        wholes = [self._only(division=values["division"])] if all(values.values()) else []
        if values["division"] or values["endpoint"]:
            wholes.append(self._only())
        return {
            "id": scope_id(limit.name, values),
            "limit": limit.name,
            "kind": limit.event.upper().removesuffix("S"),
            "most": limit.most,
            "margin": limit.margin,
            "window_us": window_us,
            "grain_us": 0 if limit.most <= EXACT_MOST else max(1, window_us // SLICES),
            "statuses": list(limit.statuses),
            **values,
            "spelled": self.spelled if values["endpoint"] else "",
            "by": self.token.token,
            "coarser": [{"id": scope_id(limit.name, whole), **whole} for whole in wholes],
        }

    def block(self, throttle: str) -> dict[str, Any]:
        """Return who must be quiet, and how long, after a block met here.

        A throttle that this policy does not know, since it has changed, is a block.
        """
        rules = self.policy.block
        scope, first, factor = rules.scope, rules.first, rules.factor
        for one in self.policy.throttle:
            if one.name == throttle:
                scope = one.scope
                if one.length is not None:
                    first, factor = one.length, 1.0
        values = self._values(scope)
        return {
            "id": scope_id("block", values),
            "reason": throttle,
            "first_us": round(first * 1e6),
            "factor": factor,
            "most_us": round(rules.most * 1e6),
            "forget_us": round(rules.forget_after * 1e6),
            **values,
            "spelled": self.spelled if values["endpoint"] else "",
            "by": self.token.token,
            "own": scope_id("block", self._only()),
        }

    def _only(self, division: str = "") -> dict[str, str]:
        """Return the values of the scope of this token, or of a division of it."""
        return {"token": self.token.token, "division": division, "endpoint": ""}

    def _values(self, scope: Iterable[ScopeField]) -> dict[str, str]:
        return {
            "token": self.token.token if "token" in scope else "",
            "division": self.division if "division" in scope else "",
            "endpoint": self.endpoint if "endpoint" in scope else "",
        }


def scope_id(name: str, values: dict[str, str]) -> str:
    """Make the id of a budget or a back-off.

    Long and free texts make it, so it is a hash; the record has them verbatim.
    """
    digest = hashlib.sha256("\0".join([name, *values.values()]).encode()).digest()
    return f"{name[:46]}-{base64.b32encode(digest[:10]).decode().lower()}"


class Places:
    """Finds places by the policies of their tokens."""

    def __init__(self, scripts: Scripts, policies: Policies) -> None:
        self._scripts = scripts
        self._policies = policies

    async def policy(self, field: str, token: TokenName) -> Policy:
        """Return the policy of a token.

        Raises:
            Failure: TOKEN_NOT_FOUND or POLICY_NOT_FOUND.
        """
        name = await self._scripts.policy(token.app, token.token)
        if name is None:
            raise token_not_found(token)
        return self._policies.find(field, name)

    async def check_ttl(self, token: TokenName, ttl_us: int) -> None:
        """Refuse a TTL that is longer than the policy of a token allows.

        Raises:
            Failure: INVALID_FIELD, TOKEN_NOT_FOUND or POLICY_NOT_FOUND.
        """
        if self._policies.allow_ttl(ttl_us / 1e6):
            return
        policy = await self.policy("token", token)
        if ttl_us / 1e6 > policy.longest_ttl:
            longest = format_duration(policy.longest_ttl)
            raise invalid("ttl", f"must be at most {longest}, says the policy {policy.name}")

    async def find(
        self, field: str, scope: budget_pb2.Scope, known: dict[TokenName, Policy]
    ) -> Place:
        """Check a scope, and find the rules for it: a token's once a batch.

        Raises:
            Failure: INVALID_FIELD, TOKEN_NOT_FOUND or POLICY_NOT_FOUND.
        """
        token = validation.token_name(f"{field}.token", scope.token)
        if scope.app and scope.app != str(AppName(token.app)):
            raise invalid(f"{field}.app", f"is not the app of {token}")
        validation.place(field, scope)
        if token not in known:
            known[token] = await self.policy(f"{field}.token", token)
        return Place(token, known[token], scope.division, scope.endpoint)

    async def declared(self, token: TokenName, scopes: Sequence[budget_pb2.Scope]) -> list[Place]:
        """Check the scopes that a request for a lease names.

        Raises:
            Failure: INVALID_FIELD, TOKEN_NOT_FOUND or POLICY_NOT_FOUND.
        """
        if not scopes:
            return []
        for scope in scopes:
            if scope.token not in ("", str(token)):
                raise invalid("scopes.token", f"must be {token}, or left out")
            if scope.app not in ("", str(AppName(token.app))):
                raise invalid("scopes.app", f"is not the app of {token}")
            validation.place("scopes", scope)
        policy = await self.policy("token", token)
        return [Place(token, policy, scope.division, scope.endpoint) for scope in scopes]

    async def rooms(
        self, token: TokenName, pairs: Sequence[tuple[str, str]]
    ) -> list[lease_service_pb2.ScopeRoom]:
        """Say how many errors each place with an endpoint has room for."""
        pairs = [pair for pair in pairs if pair[1]]
        if not pairs:
            return []
        policy = await self.policy("token", token)
        places = [Place(token, policy, *pair) for pair in pairs]
        specs = [place.specs("errors") for place in places]
        ids = {one["id"] for limits in specs for spec in limits for one in (spec, *spec["coarser"])}
        reply = await self._scripts.run("read_budgets", token.app, *sorted(ids))
        budgets = {entry[0].decode(): record(entry[1]) for entry in reply.values[0]}
        rooms = []
        for place, limits in zip(places, specs, strict=True):
            room = lease_service_pb2.ScopeRoom(
                room=min((_room(spec, budgets) for spec in limits), default=0)
            )
            found = (budgets.get(spec["id"], {}).get("spelled", b"").decode() for spec in limits)
            room.scope.division = place.division
            room.scope.endpoint = next(filter(None, found), place.spelled)
            if limits:
                rooms.append(room)
        return rooms


class ScopeFilter:
    """The scopes that a caller asks for; an empty field matches any.

    Raises:
        Failure: INVALID_FIELD.
    """

    def __init__(self, scope: budget_pb2.Scope) -> None:
        validation.place("scope", scope)
        self._scope = scope
        self._endpoint = folded(normal_endpoint(scope.endpoint))
        self.app: str | None = None
        """The only app that may have such scopes; None if any may."""
        if scope.app:
            app = validation.app_parent(scope.app, "scope.app")
            self.app = app.app if app else None
        elif scope.token:
            self.app = validation.token_name("scope.token", scope.token).app

    def matches(self, scope: budget_pb2.Scope) -> bool:
        """Whether a scope is wanted."""
        wanted = self._scope
        return (
            wanted.app in ("", scope.app)
            and wanted.token in ("", scope.token)
            and wanted.division in ("", scope.division)
            and self._endpoint in ("", folded(scope.endpoint))
        )


def _room(spec: dict[str, Any], budgets: dict[str, dict[str, bytes]]) -> int:
    """Return the least room of a budget and of the coarser ones in which its events may count."""
    found = [budgets.get(one["id"], {}) for one in spec["coarser"]]
    used = [budgets.get(spec["id"], {}), *(budget for budget in found if "coarse" in budget)]
    taken = max(int(one.get("used", b"0")) + int(one.get("reserved", b"0")) for one in used)
    return max(0, int(spec["most"]) - int(spec["margin"]) - taken)


def as_json(places: Iterable[Place]) -> str:
    """Write places as the scripts read them; '' where none was named."""
    pairs = sorted({place.pair for place in places})
    return json.dumps(pairs) if pairs else ""


def job_hash(job: str) -> str:
    """Return what stands for a job's name in keys; '' for none."""
    return hashlib.sha256(job.encode()).hexdigest() if job else ""
