"""Hands out access tokens: one look at the store, and one open copy, for all streams of a token.

Streams that watch a grant are served from the same looks; for them nothing is opened.

A token is looked at when the first stream of it opens, when the store announces a change of its
grant, when its state ends by itself, and now and then, which repairs announcements that were lost.
Streams have no timers: a look that finds something new wakes those of its token.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import structlog

from holdoff.v1 import custody_service_pb2, grant_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.custody.copies import seal_copy
from holdoff_coordinator.custody.grants import grant_not_found
from holdoff_coordinator.custody.messages import grant_message, shown, status_of
from holdoff_coordinator.custody.records import ReadGrants, ask, held_of, read
from holdoff_coordinator.custody.sealing import (
    AccessSecrets,
    KeyMissingError,
    Keyring,
    UnsealableError,
)
from holdoff_coordinator.custody.seals import binding_of
from holdoff_coordinator.failures import STORE_TROUBLES, Failure, token_damaged
from holdoff_coordinator.records import duration
from holdoff_coordinator.scripts import READ_BATCH, boottime_us
from holdoff_coordinator.wakeups import WakeUps

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from holdoff.names import TokenName
    from holdoff.policies import Policy
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.grants import Terms
    from holdoff_coordinator.custody.records import Held
    from holdoff_coordinator.hub import Hub
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

log = structlog.get_logger()

CHANNEL: Final = ":custody"
"""On this channel of an app the scripts of custody announce the tokens whose grant changed."""
TICK_SECONDS: Final = 1.0
"""How often to see which tokens are due for a look."""
LOOK_US: Final = 2_000_000
"""A token without an access token is looked at so often: what prevents one may end unannounced."""
REPAIR_US: Final = 15_000_000
"""One with an access token is looked at so often."""
SOONEST_US: Final = 100_000
"""No look follows another one sooner, except for an announcement."""
MARGIN_US: Final = 10_000_000
"""The early margin, where a policy has none: at most this, and a tenth of the token's life."""


class Users(Protocol):
    """Refreshes the tokens that are in use; also notified when a grant may have changed."""

    def in_use(self, token: TokenName, /) -> AbstractContextManager[object]:
        """Count a token as used for as long as the block lasts."""

    def look(self, token: TokenName, /) -> None:
        """Look at a token, since its grant changed."""

    def present(self, token: TokenName, sealed: bytes, /) -> None:
        """Take in what a client kept of a grant."""

    def look_at_held(self, app: str, /) -> None:
        """Look at the tokens of an app that something else held: it may have ended."""


@dataclass(frozen=True, slots=True)
class Stand:
    """What a look showed of a grant. Instants are µs of this machine's boot clock."""

    held: Held
    """The grant as it was read."""
    status: grant_pb2.GrantStatus
    usable_until_us: int
    """From then on no call begins with its access token; 0 if it has none."""
    margin_us: int
    """How much longer that lives."""
    secrets: AccessSecrets | None
    """None if there is no access token, it was not opened, or there is no key for that."""
    look_in_seconds: float
    """How long after the look to look again."""
    sealed_copy: bytes = b""
    """Of the grant, for clients; empty for none."""

    @property
    def version(self) -> tuple[str, int]:
        """Chain and generation, to which an access token belongs."""
        return self.held.record.chain, self.held.record.generation

    @property
    def changes(self) -> tuple[object, ...]:
        """What has to change for those who watch the grant to be told."""
        record, is_usable = self.held.record, self.usable_until_us > 0
        attempt = record.attempt, record.attempt_step
        return *self._said, self.version, is_usable, attempt, self.held.restored_us

    @property
    def news(self) -> tuple[object, ...]:
        """What has to change for a stream of access tokens to be told."""
        version = self.version if self.usable_until_us else None
        return *self._said, version, self.secrets is None

    @property
    def _said(self) -> tuple[object, ...]:
        """What is said of the grant, to people."""
        status = self.status
        # The end of a lease moves with each of its renewals: no news.
        moves = status.state == grant_pb2.GRANT_STATE_HELD
        until_us = 0 if moves else status.until_time.ToMicroseconds()
        return status.state, status.message, until_us

    def is_usable(self, now_us: int) -> bool:
        """Whether calls may begin with its access token."""
        return now_us < self.usable_until_us

    def hands_out(self, now_us: int, had: tuple[str, int] | None) -> bool:
        """Whether to hand out its access token to a stream that had one, or None."""
        return self.is_usable(now_us) and self.secrets is not None and had != self.version

    def response(
        self, now_us: int, had: tuple[str, int] | None, age_us: int
    ) -> custody_service_pb2.GetAccessTokenResponse:
        """Build the response for a stream.

        Args:
            now_us: The instant at which it is sent.
            had: Whose access token the stream had last.
            age_us: How long the stream is open.
        """
        response = custody_service_pb2.GetAccessTokenResponse(
            status=self.status,
            has_access_token=self.is_usable(now_us),
            stream_age=duration(age_us),
        )
        if self.hands_out(now_us, had) and self.secrets:
            response.access_token.access_token = self.secrets.access_token
            response.access_token.generation = self.version[1]
            remaining_us = self.usable_until_us + self.margin_us - now_us
            response.access_token.remaining.CopyFrom(duration(remaining_us))
            response.access_token.early_margin.CopyFrom(duration(self.margin_us))
            response.access_token.api_hosts.extend(self.held.record.public.api_hosts)
            response.access_token.sealed_copy = self.sealed_copy
        return response


def stand_of(  # noqa: PLR0913, PLR0917 - what a look shows, and what was known before it
    name: TokenName,
    held: Held,
    looked_us: int,
    margin_us: int,
    secrets: AccessSecrets | None,
    has_key: bool,
    before: Stand | None,
) -> Stand:
    """Work out how a grant stands. Pure.

    Args:
        name: Of the token.
        held: The grant.
        looked_us: Just before it was read, so that its access token seems older, not younger.
        margin_us: So long before its end an access token is no longer handed out.
        secrets: Its access token, if there is one and it could be opened.
        has_key: Whether this coordinator has the keys of its secrets.
        before: The stand before. A store whose clock goes back makes no access token younger.
    """
    record, version = held.record, (held.record.chain, held.record.generation)
    usable_until_us = 0
    if record.sealed_access:
        usable_until_us = looked_us + record.expires_us - held.now_us - margin_us
        if before and before.version == version:
            usable_until_us = min(usable_until_us, before.usable_until_us)
    is_usable = looked_us < usable_until_us
    # A token within its margin counts as expired, so that the status says what prevents the next.
    expires_us = held.now_us + usable_until_us - looked_us if is_usable else 0
    counted = msgspec.structs.replace(record, expires_us=expires_us)
    status = status_of(name, msgspec.structs.replace(held, record=counted), has_key=has_key)
    look_in_us = REPAIR_US if is_usable and has_key else LOOK_US
    ends = usable_until_us - looked_us, status.until_time.ToMicroseconds() - held.now_us
    look_in_us = min([look_in_us, *(max(one, SOONEST_US) for one in ends if one > 0)])
    return Stand(
        held,
        status,
        usable_until_us if is_usable else 0,
        margin_us,
        secrets if is_usable else None,
        look_in_us / 1e6,
    )


def margin_of(policy: Policy | None) -> int:
    """Return how long before its end (µs) an access token is no longer handed out."""
    refresh = policy.refresh if policy else None
    if refresh and refresh.early_margin is not None:
        return round(refresh.early_margin * 1e6)
    life_us = (refresh.access_token_life or 0) * 1e6 if refresh else 0
    return min(MARGIN_US, round(life_us / 10)) if life_us else MARGIN_US


class _Served:
    """A token for which streams are open at this replica."""

    def __init__(self, name: TokenName) -> None:
        self.name = name
        self.streams = self.users = 0
        """Users are those streams that get the access token."""
        self.callers: Counter[tuple[str, str]] = Counter()
        """The same by identity and host."""
        self.kept, self.used = contextlib.ExitStack(), contextlib.ExitStack()
        """What lasts as long as there is a stream, and a user."""
        self.stand: Stand | None = None
        self.failure: Failure | None = None
        """Why its streams end."""
        self.look_at = 0.0
        """When to look at it again, by our monotonic clock."""
        self.changed = asyncio.Event()
        """Set once: the next change has another one."""

    def take(self, stand: Stand) -> bool:
        """Take in what a look showed; tell whether that is news."""
        if not self.users:  # the last one left during the look
            stand = replace(stand, secrets=None)
        before = self.stand
        is_news = before is None or (before.news, before.changes) != (stand.news, stand.changes)
        self.stand = stand
        if is_news:
            self.wake()
        return is_news

    def fail(self, failure: Failure) -> None:
        """End its streams."""
        self.failure = failure
        self.wake()

    def wake(self) -> None:
        """Make its streams look at how things stand."""
        self.changed.set()
        self.changed = asyncio.Event()


class HandOuts:
    """All streams of access tokens of this replica.

    Args:
        scripts: The store.
        hub: Says when streams have to end.
        policies: Say when an access token is too old.
        terms: Whether there is custody, and its keys.
        note: Called with each hand-out, before it.
        users: Refreshes the tokens that are in use; None refreshes none.
        boot_us: The boot clock.
    """

    def __init__(  # noqa: PLR0913 - what it stands between
        self,
        scripts: Scripts,
        hub: Hub,
        policies: Policies,
        terms: Terms,
        note: Callable[[Caller, TokenName], Awaitable[None]],
        *,
        users: Users | None = None,
        boot_us: Callable[[], int] = boottime_us,
    ) -> None:
        self._scripts = scripts
        self._hub = hub
        self._policies = policies
        self._terms = terms
        self._note = note
        self._users = users
        self._boot_us = boot_us
        self._wake_ups = WakeUps(scripts.redis, CHANNEL)
        self._served: defaultdict[str, dict[str, _Served]] = defaultdict(dict)
        """By app and token."""
        self._looking: dict[str, asyncio.Task[None]] = {}
        """Looks that are under way, by app: a slow shard delays its own apps only."""
        hub.on_announcement(self._announced)

    async def hand_out(
        self, request: custody_service_pb2.GetAccessTokenRequest, caller: Caller
    ) -> AsyncGenerator[custody_service_pb2.GetAccessTokenResponse, None]:
        """Hand out the access token of a grant, each renewal, and why there is none.

        Raises:
            Failure: GRANT_NOT_FOUND, CUSTODY_OFF, STORE_…, or DRAINING.
        """
        opened_us = self._boot_us()
        name = validation.grant_name("name", request.name).token_name
        self._terms.require_closed()
        had: tuple[str, int] | None = None
        told: tuple[object, ...] | None = None
        with self._joined(name) as served, self._used(served, caller):
            if request.sealed_copy and self._users:
                self._users.present(name, request.sealed_copy)
            while True:
                stand = await self._next(served, lambda stand: stand.news, told)
                if stand.hands_out(self._boot_us(), had):
                    await self._note(caller, name)
                now_us = self._boot_us()
                response = stand.response(now_us, had, now_us - opened_us)
                told = stand.news
                if response.HasField("access_token"):
                    had = stand.version
                yield response

    async def watch(
        self, request: custody_service_pb2.WatchGrantRequest, _: Caller
    ) -> AsyncGenerator[custody_service_pb2.WatchGrantResponse, None]:
        """Say how a grant stands, then every change.

        Raises:
            Failure: GRANT_NOT_FOUND, STORE_…, or DRAINING.
        """
        name = validation.grant_name("name", request.name).token_name
        told: tuple[object, ...] | None = None
        with self._joined(name) as served:
            while True:
                stand = await self._next(served, lambda stand: stand.changes, told)
                told = stand.changes
                held = shown(stand.held, self._policies)
                grant = grant_message(name, held, self._terms.keys())
                if held is stand.held:
                    grant.status.CopyFrom(stand.status)
                yield custody_service_pb2.WatchGrantResponse(grant=grant)

    async def _next(
        self,
        served: _Served,
        news: Callable[[Stand], tuple[object, ...]],
        told: tuple[object, ...] | None,
    ) -> Stand:
        """Return how a grant stands as soon as that is news.

        Raises:
            Failure: The stream has to end.
        """
        while True:
            self._hub.check()
            if served.failure:
                raise served.failure
            changed, stand = served.changed, served.stand
            if stand is not None and news(stand) != told:
                return stand
            await changed.wait()

    @contextlib.contextmanager
    def _joined(self, name: TokenName) -> Iterator[_Served]:
        """Serve a token for as long as the block lasts."""
        served = self._served[name.app].get(name.token)
        if served is None:
            served = self._served[name.app][name.token] = _Served(name)
            served.kept.enter_context(self._wake_ups.wanted(name.app))
            self._look_soon(name.app)
        served.streams += 1
        try:
            yield served
        finally:
            served.streams -= 1
            if not served.streams:
                self._forget(served)
                served.kept.close()

    @contextlib.contextmanager
    def _used(self, served: _Served, caller: Caller) -> Iterator[None]:
        """Count a token as used for as long as the block lasts, and open its access token."""
        if not served.users:
            if self._users:
                served.used.enter_context(self._users.in_use(served.name))
            served.used.enter_context(self._hub.wake_ups.wanted(served.name.app))
            served.stand = None  # those who only watched had no need to open it
            served.look_at = 0.0
            self._look_soon(served.name.app)
        served.users += 1
        who = caller.identity, caller.peer.rpartition(":")[0]
        served.callers[who] += 1
        try:
            yield
        finally:
            served.users -= 1
            served.callers -= Counter([who])
            if not served.users:
                if served.stand:
                    served.stand = replace(served.stand, secrets=None)
                served.used.close()

    def callers(self, name: TokenName) -> Counter[tuple[str, str]]:
        """Count the streams of a token that get the access token, by identity and host."""
        served = self._served.get(name.app, {}).get(name.token)
        return served.callers if served else Counter()

    def _forget(self, served: _Served) -> None:
        """Let the next stream of a token begin anew."""
        of_app = self._served[served.name.app]
        if of_app.get(served.name.token) is served:
            del of_app[served.name.token]
        if not of_app:
            del self._served[served.name.app]

    async def listen_forever(self) -> None:
        """Look at the tokens whose grant changed."""
        await self._wake_ups.listen_forever(self._woken)

    async def _woken(self, app: str, token: str) -> None:
        served = self._served.get(app, {}).get(token)
        if served:
            served.look_at = 0.0
            self._look_soon(app)

    async def _announced(self, app: str) -> None:
        """Look at the tokens that something held, such as a back-off: it may have ended."""
        for served in self._served.get(app, {}).values():
            if served.stand and served.stand.status.state == grant_pb2.GRANT_STATE_HELD:
                served.look_at = 0.0
        self._look_soon(app)
        if self._users:
            self._users.look_at_held(app)

    async def look_forever(self) -> None:
        """Look at each token that is due; wake all streams if they have to end."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for app, tokens in list(self._served.items()):
                if self._hub.draining or self._hub.store_is_away:
                    for served in tokens.values():
                        served.wake()
                elif self._due(app):
                    self._look_soon(app)

    def _due(self, app: str) -> list[_Served]:
        now = time.monotonic()
        tokens = self._served.get(app, {})
        return [served for served in tokens.values() if served.look_at <= now]

    def _look_soon(self, app: str) -> None:
        """Look at the tokens of an app that are due; a look that is under way does so."""
        if app not in self._looking:
            self._looking[app] = asyncio.create_task(self._look(app))

    async def _look(self, app: str) -> None:
        try:
            while due := self._due(app):
                for start in range(0, len(due), READ_BATCH):
                    await self._look_at(app, due[start : start + READ_BATCH])
        except Exception:
            log.exception(
                "access tokens were not looked at", app=app, remedy="a fault of Holdoff: report it"
            )
            for served in self._served.get(app, {}).values():
                served.look_at = time.monotonic() + LOOK_US / 1e6
        finally:
            del self._looking[app]

    async def _look_at(self, app: str, some: Sequence[_Served]) -> None:
        for served in some:
            served.look_at = math.inf  # a wake-up during the look makes it due again
        looked_us = self._boot_us()
        asked = tuple(served.name.token for served in some)
        try:
            answer = await ask(self._scripts, app, ReadGrants(tokens=asked, sealed=True))
        except Failure as failure:
            self._not_looked(some, failure)
            return
        found = {
            held.token: held
            for held in self._scripts.readable(app, "tokens", answer.grants, held_of)
        }
        for served in some:
            try:
                if held := found.get(served.name.token):
                    stand = await self._stand(served, held, looked_us)
                else:
                    stand = await self._look_alone(served)
            except Failure as failure:
                self._not_looked([served], failure)
                continue
            if served.take(stand) and self._users:
                self._users.look(served.name)
            served.look_at = min(served.look_at, time.monotonic() + stand.look_in_seconds)

    async def _look_alone(self, served: _Served) -> Stand:
        """Look at one token, which tells whether its record is damaged, or there is none.

        Raises:
            Failure: GRANT_NOT_FOUND, STORE_….
        """
        looked_us = self._boot_us()
        held = await read(self._scripts, served.name, sealed=True)
        if held is None:
            raise grant_not_found(served.name)
        return await self._stand(served, held, looked_us)

    def _not_looked(self, some: Sequence[_Served], failure: Failure) -> None:
        """Go on with what is known if the store does not answer; else end the streams."""
        passes = failure.reason in STORE_TROUBLES and failure.retry_after_seconds is not None
        for served in some:
            if passes and served.stand:
                served.look_at = time.monotonic() + LOOK_US / 1e6
                continue
            self._forget(served)
            served.fail(failure)

    async def _stand(self, served: _Served, held: Held, looked_us: int) -> Stand:
        """Say how a grant stands; open its access token unless that was done before.

        Raises:
            Failure: STORE_…; the access token is damaged.
        """
        before = served.stand
        is_known = before and before.version == (held.record.chain, held.record.generation)
        secrets = before.secrets if before and is_known else None
        margin_us = before.margin_us if before and is_known else await self._margin(served.name)
        keys = self._terms.keys()
        has_key = held.record.public.key_id in keys
        sealed_copy = before.sealed_copy if before and is_known else b""
        if held.record.sealed_access and secrets is None and served.users:
            try:
                secrets = _opened(Keyring(keys, None), served.name, held)
                sealed_copy = seal_copy(served.name, held, keys)
            except KeyMissingError:
                has_key = False
        stand = stand_of(served.name, held, looked_us, margin_us, secrets, has_key, before)
        return replace(stand, sealed_copy=sealed_copy)

    async def _margin(self, name: TokenName) -> int:
        policy: Any = await self._scripts.policy(name.app, name.token)
        with contextlib.suppress(Failure):
            return margin_of(self._policies.find("the token's policy", policy or ""))
        return margin_of(None)


def _opened(ring: Keyring, name: TokenName, held: Held) -> AccessSecrets:
    """Open the access token of a grant.

    Raises:
        KeyMissingError: The key that sealed it is not here.
        Failure: STORE_DAMAGED.
    """
    record = held.record
    belongs_to = binding_of(name, record.chain, record.generation, record.public)
    with contextlib.suppress(UnsealableError, binascii.Error):
        sealed = base64.b64decode(record.sealed_access, validate=True)
        return ring.open(sealed, belongs_to, AccessSecrets)
    raise token_damaged(name)
