"""Metrics of grants in custody: how each of them stands, and what their requests came to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client import Counter, Gauge

from holdoff.names import TokenName
from holdoff.v1 import grant_pb2
from holdoff_coordinator.custody.messages import shown, status_of
from holdoff_coordinator.custody.records import ReadGrants, ask, held_of
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from prometheus_client import CollectorRegistry

    from holdoff_coordinator.custody.handout import HandOuts
    from holdoff_coordinator.custody.records import Held
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

    Reading = tuple[Gauge, tuple[str, ...], float]
    """A gauge, its labels, and its value."""

FRESH_SECONDS = 30.0
"""The grants of an app are not read again so soon: between, their times are worked out."""
FORGOTTEN_SECONDS: Final = 600.0
"""An app that was not read for so long has no grants any more."""
MOST: Final = 10_000
"""Grants of all apps together that are shown one by one."""
RESULTS: Final = [name for name, number in grant_pb2.RefreshResult.items() if number]


class GrantMeasures:
    """Metrics of the grants of all apps.

    Args:
        registry: Where the metrics are registered.
        scripts: Where grants are read.
        policies: Say how long a grant lives, and what becomes of its refresh tokens.
        key_ids: Returns the ids of this replica's master keys.
        hand_outs: Knows who uses a grant here.
        most: Grants of an app that are shown one by one, as far as all together have room.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what is measured, and where
        self,
        registry: CollectorRegistry,
        scripts: Scripts,
        policies: Policies,
        key_ids: Callable[[], Collection[str]],
        hand_outs: HandOuts,
        most: int,
    ) -> None:
        self._scripts = scripts
        self._policies = policies
        self._key_ids = key_ids
        self._hand_outs = hand_outs
        self._most = most
        self._known: dict[str, tuple[float, list[Held], int]] = {}
        """Of each app: when its grants were read, those that are shown, and how many are not."""

        def gauge(name: str, what: str, *more: str) -> Gauge:
            labels = ("app", "token", *more)
            return Gauge(f"holdoff_grant_{name}", what, labels, registry=registry)

        self._refreshes = Counter(
            "holdoff_grant_refreshes",
            "Requests for access tokens whose result this replica stored",
            ["app", "result"],
            registry=registry,
        )
        self._not_shown = Gauge(
            "holdoff_grants_not_shown",
            "Grants in custody beyond those with gauges",
            ["app"],
            registry=registry,
        )
        self._state = gauge("state", "1 for the state in which the grant is", "state")
        self._age = gauge("refresh_age_seconds", "Time since the last access token was issued")
        self._access_left = gauge(
            "access_token_seconds", "Time until the access token expires; 0 if there is none"
        )
        self._refresh_left = gauge(
            "refresh_token_seconds", "Time until the refresh token expires unless it is used"
        )
        self._put_age = gauge("age_seconds", "Time since the grant was put")
        self._life_left = gauge(
            "life_seconds", "Time until the grant ends, however often it is refreshed"
        )
        self._callers = gauge("callers", "Streams of access tokens that are open at this replica")
        self.gauges = (
            *(self._not_shown, self._state, self._age, self._access_left, self._refresh_left),
            *(self._put_age, self._life_left, self._callers),
        )

    def count(self, app: str, event: Mapping[bytes, bytes]) -> None:
        """Count a result that was stored."""
        if result := event.get(b"result"):
            self._refreshes.labels(app, result.decode().lower()).inc()

    async def read(self, app: str) -> list[Reading]:
        """Return how the grants of an app stand.

        Raises:
            Failure: The store does not answer.
        """
        known = self._known.get(app)
        if not known or time.monotonic() - known[0] >= FRESH_SECONDS:
            known = self._known[app] = time.monotonic(), *await self._read(app)
        read_at, shown, not_shown = known
        if not shown and not not_shown:
            del self._known[app]
            return []
        for result in RESULTS:  # so that the first one is an increase
            self._refreshes.labels(app, _label(result))
        passed_us = round((time.monotonic() - read_at) * 1e6)
        found: list[Reading] = [(self._not_shown, (app,), not_shown)]
        for held in shown:
            now = msgspec.structs.replace(held, now_us=held.now_us + passed_us)
            found += self._readings(TokenName(app, held.token), now)
        return found

    async def _read(self, app: str) -> tuple[list[Held], int]:
        oldest = time.monotonic() - FORGOTTEN_SECONDS
        self._known = {key: one for key, one in self._known.items() if one[0] > oldest}
        others = sum(len(shown) for key, (_, shown, _) in self._known.items() if key != app)
        most = min(self._most, MOST - others)
        number = await self._scripts.number_of(app, "grants")
        shown: list[Held] = []
        last, seen = "", 0
        while seen < most:
            batch = min(READ_BATCH, most - seen)
            tokens = await self._scripts.tokens(app, last, batch, "grants")
            if not tokens:
                break
            last, seen = tokens[-1], seen + len(tokens)
            answer = await ask(self._scripts, app, ReadGrants(tokens=tuple(tokens)))
            shown += self._scripts.readable(app, "tokens", answer.grants, held_of)
        return shown, max(0, number - seen)

    def _readings(self, name: TokenName, held: Held) -> list[Reading]:
        held = shown(held, self._policies)
        record, now_us = held.record, held.now_us
        labels = name.app, name.token
        status = status_of(name, held, has_key=record.public.key_id in self._key_ids())
        state = _label(grant_pb2.GrantState.Name(status.state))
        callers = sum(self._hand_outs.callers(name).values())
        found: list[Reading] = [
            (self._state, (*labels, state), 1.0),
            (self._age, labels, _seconds(now_us - record.refreshed_us)),
            (self._access_left, labels, _seconds(record.expires_us - now_us)),
            (self._put_age, labels, _seconds(now_us - record.created_us)),
            (self._callers, labels, callers),
        ]
        if record.idle_us:
            found.append((self._refresh_left, labels, _seconds(record.idle_us - now_us)))
        if life_us := self._life_us(held.policy):
            ends_us = record.created_us + life_us
            found.append((self._life_left, labels, _seconds(ends_us - now_us)))
        return found

    def _life_us(self, policy: str) -> int:
        try:
            life = self._policies.find("the token's policy", policy).refresh.absolute_life
        except Failure:
            return 0
        return round((life or 0) * 1e6)


def _seconds(us: int) -> float:
    return max(0, us) / 1e6


def _label(value: str) -> str:
    """Turn the name of a value of an enum into a label."""
    for prefix in ("GRANT_STATE_", "REFRESH_RESULT_"):
        value = value.removeprefix(prefix)
    return value.lower()
