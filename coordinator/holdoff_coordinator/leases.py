"""Handlers of leases: from a request and its caller to events or a response.

They know messages and the store, and nothing of gRPC's calls and streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from holdoff.names import LeaseName, TokenName
from holdoff.v1 import admin_service_pb2, lease_pb2, lease_service_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.failures import Failure, invalid, store_trouble, token_not_found
from holdoff_coordinator.limits import Turns
from holdoff_coordinator.places import as_json, job_hash
from holdoff_coordinator.policies import policy_message
from holdoff_coordinator.records import (
    Standing,
    lease_message,
    record,
    timestamp,
    user_and_host,
    waiter_message,
)
from holdoff_coordinator.scripts import READ_BATCH

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.hub import Hub, Waiter
    from holdoff_coordinator.limits import Limits
    from holdoff_coordinator.places import Place, Places
    from holdoff_coordinator.scripts import Reply, Scripts

log = structlog.get_logger()

LATE_MOST = 3
"""How often to ask while the store is so slow that its answer says nothing."""
STATUS_SECONDS = 15.0
"""A waiter hears from us at least this often."""
ASKING_MOST = 8
"""How many requests for a lease call the store at once, at most half of them of one caller in one
app: each may read a whole queue."""
SILENT_US = 60_000_000
"""A stream whose client is silent this long is closed; its place is not kept longer either."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request for a lease."""

    token: TokenName
    caller: Caller
    request_hash: str
    fingerprints: str
    """Whose request it is and what it asks for: the hash that we write, then those that earlier
    releases wrote for the same."""
    wait_us: int | None
    ttl_us: int
    holder: bytes
    secret: str
    last_fencing_token: int
    places: str
    job: str
    mode: str
    """EXCLUSIVE, SHARED, or empty for the token's own."""

    @property
    def may_queue(self) -> bool:
        """A wait of zero leaves no trace in the queue."""
        return self.wait_us != 0


def check_ask(
    request: lease_service_pb2.AcquireLeaseRequest, caller: Caller, places: Sequence[Place]
) -> Ask:
    """Check a request for a lease, whose scopes are these places.

    The request id is bound to its caller and to what it came with, and the lease's secret is
    derived from it: a retry gets the same secret, and the store holds neither.

    Raises:
        Failure: INVALID_FIELD.
    """
    token = validation.token_name("token", request.token)
    request_id = validation.request_id(request.request_id)
    ttl_us = validation.ttl_us(request.ttl)
    holder = validation.holder(request.holder).SerializeToString(deterministic=True)
    declared = as_json(places)
    bound = [caller.identity.encode(), str(token).encode(), b"%d" % ttl_us, holder]
    # Schema 2 knew no places. What a later release binds too is left out where it is empty.
    mode = _mode(request.mode)
    forms = [[*bound, declared.encode()], *([] if declared else [bound])]
    if mode:
        forms = [[*bound, declared.encode(), mode.encode()]]
    return Ask(
        token=token,
        caller=caller,
        request_hash=_sha256(request_id.encode()),
        fingerprints="\n".join(_sha256(b"\0".join(form)) for form in forms),
        wait_us=(
            validation.microseconds("wait", request.wait) if request.HasField("wait") else None
        ),
        ttl_us=ttl_us,
        holder=holder,
        secret=hmac.new(request_id.encode(), b"holdoff lease secret", "sha256").hexdigest(),
        last_fencing_token=request.last_fencing_token,
        places=declared,
        job=job_hash(request.holder.job),
        mode=mode,
    )


def _mode(mode: lease_pb2.LeaseMode.ValueType) -> str:
    if mode not in lease_pb2.LeaseMode.values():
        raise invalid("mode", "must be LEASE_MODE_EXCLUSIVE or LEASE_MODE_SHARED, or left out")
    word = lease_pb2.LeaseMode.Name(mode).removeprefix("LEASE_MODE_")
    return word if mode else ""


class Leases:
    """Acquire, renew, release, break, get and list leases."""

    def __init__(self, scripts: Scripts, hub: Hub, places: Places, limits: Limits) -> None:
        self._scripts = scripts
        self._hub = hub
        self._places = places
        self._limits = limits
        # So many requests at once delay only calls of their own caller and app.
        self._turns = Turns(ASKING_MOST, ASKING_MOST // 2)
        self._renewing = set[asyncio.Task[lease_service_pb2.RenewLeaseResponse]]()

    async def acquire(
        self, request: lease_service_pb2.AcquireLeaseRequest, caller: Caller, waiter: Waiter
    ) -> AsyncGenerator[lease_service_pb2.AcquireLeaseResponse, None]:
        """Say what the request waits for whenever that changes, then offer the lease.

        The last event is an offer or an error. The place in the queue stays kept when the
        iteration is given up, for a minute.
        """
        try:
            token = validation.token_name("token", request.token)
            places = await self._places.declared(token, request.scopes)
            ask = check_ask(request, caller, places)
            await self._places.check_ttl(token, ask.ttl_us)
            with self._hub.joined(waiter, ask.token, ask.request_hash):
                async for event in self._conversation(ask, waiter):
                    if event.HasField("offer"):
                        await self._complete(event.offer, ask.token, places)
                    yield event
        except Failure as failure:
            yield lease_service_pb2.AcquireLeaseResponse(error=failure.to_status())

    async def _complete(
        self, offer: lease_service_pb2.LeaseOffer, token: TokenName, places: Sequence[Place]
    ) -> None:
        """Put into an offer what its holder needs to count by itself."""
        offer.policy.CopyFrom(policy_message(await self._places.policy("token", token)))
        offer.rooms.extend(
            await self._places.rooms(token, [(one.division, one.spelled) for one in places])
        )

    async def _conversation(
        self, ask: Ask, waiter: Waiter
    ) -> AsyncGenerator[lease_service_pb2.AcquireLeaseResponse, None]:
        began, told, tell_again_at, offered = time.monotonic(), None, 0.0, ""
        wait_seconds = math.inf if ask.wait_us is None else ask.wait_us / 1e6
        waiter.ask()
        while True:
            self._check(waiter)
            if waiter.withdrawn:
                await self._withdraw(ask)
                return
            if waiter.must_ask or waiter.standing is None:
                waiter.must_ask = False
                found = await self._ask(ask, waiter)
                if isinstance(found, lease_service_pb2.LeaseOffer):
                    if found.lease.name != offered:
                        offered = found.lease.name
                        yield lease_service_pb2.AcquireLeaseResponse(offer=found)
                    if found.lease.state != lease_pb2.LEASE_STATE_OFFERED:
                        return
                    # Should the waiter not accept, it waits on when the offer has run out.
                    waiter.standing = told = None
                    await _sleep(waiter, found.accept_within.ToMicroseconds() / 1e6)
                    continue
                waiter.standing, waiter.standing_at = found, time.monotonic()
            standing, now = waiter.standing, time.monotonic()
            if now >= began + wait_seconds:
                await self._withdraw(ask)
                raise standing.to_failure(ask.token)
            if told != standing.signature or now >= tell_again_at:
                told = standing.signature
                # Those who came together are not all told again in the same instant.
                tell_again_at = now + STATUS_SECONDS * random.uniform(0.5, 1.0)  # noqa: S311
                yield lease_service_pb2.AcquireLeaseResponse(waiting=standing.to_status())
            ends_at = began + wait_seconds
            pause = min(ends_at, waiter.ask_at, tell_again_at) - now
            if not await _sleep(waiter, pause):
                waiter.must_ask = time.monotonic() >= min(ends_at, waiter.ask_at)

    def _check(self, waiter: Waiter) -> None:
        """Say why a conversation cannot go on here."""
        if waiter.failure:
            raise waiter.failure
        self._hub.check()
        if waiter.heard_age_us > SILENT_US:
            raise Failure("WAITER_SILENT", "this waiter was not heard from for a minute")

    async def _withdraw(self, ask: Ask) -> None:
        token = ask.token
        await self._scripts.run(
            "withdraw", token.app, token.token, ask.request_hash, ask.fingerprints
        )

    async def _ask(self, ask: Ask, waiter: Waiter) -> Standing | lease_service_pb2.LeaseOffer:
        for _ in range(LATE_MOST):
            reply = await self._acquire(ask, waiter)
            # A script that ran late grants nothing; but only the store was slow: the next one may.
            if reply.status != "WAITING" or not reply.late:
                break
        else:
            if not ask.may_queue:
                raise store_trouble("STORE_UNAVAILABLE")
        if reply.status == "WAITING":
            flat, lease, lease_id = reply.values
            blocking = (
                lease_message(ask.token, lease_id.decode(), record(lease), reply.now_us)
                if lease_id
                else None
            )
            return Standing.read(ask.token.app, flat, reply.now_us, blocking)
        if reply.status == "OFFER":
            lease_id, flat = reply.values
            message = lease_message(ask.token, lease_id.decode(), record(flat), reply.now_us)
            offered = message.state == lease_pb2.LEASE_STATE_OFFERED
            return lease_service_pb2.LeaseOffer(
                lease=message,
                secret=ask.secret,
                accept_within=message.remaining if offered else None,
            )
        if reply.status == "TOO_MANY_SCOPES":
            raise self._limits.refusal("scope-bytes", ask.caller, f" of {ask.token}")
        raise failure_of(reply, ask.token)

    async def _acquire(self, ask: Ask, waiter: Waiter) -> Reply:
        policy = await self._places.policy("token", ask.token)
        async with self._turns.taken((ask.caller.account, ask.token.app)):
            return await self._scripts.run(
                "acquire",
                ask.token.app,
                ask.token.token,
                ask.request_hash,
                ask.fingerprints,
                "1" if ask.may_queue else "0",
                ask.ttl_us,
                ask.holder,
                _sha256(ask.secret.encode()),
                waiter.heard_age_us,
                ask.last_fencing_token,
                ask.places,
                ask.job,
                self._limits.values["scope-bytes"],
                ask.mode,
                policy.most_runs,
            )

    async def renew(
        self, request: lease_service_pb2.RenewLeaseRequest, caller: Caller
    ) -> lease_service_pb2.RenewLeaseResponse:
        """Accept an offer or prolong a lease.

        It runs to its end also when the caller gives up, so that an acceptance that was not
        answered is taken back.
        """
        renewing = asyncio.create_task(self._renew(request, caller))
        self._renewing.add(renewing)
        renewing.add_done_callback(self._renewed)
        return await asyncio.shield(renewing)

    def _renewed(self, renewing: asyncio.Task[lease_service_pb2.RenewLeaseResponse]) -> None:
        self._renewing.discard(renewing)
        if not renewing.cancelled():
            renewing.exception()  # the caller may be gone, and asyncio would log it

    async def _renew(
        self, request: lease_service_pb2.RenewLeaseRequest, caller: Caller
    ) -> lease_service_pb2.RenewLeaseResponse:
        name = validation.lease_name("name", request.name)
        _, age_us = _refresh_report(request.refresh)
        secret_hash = _sha256(validation.secret(request.secret).encode())
        reply = await self._scripts.run(
            "renew",
            name.app,
            name.token,
            name.lease,
            secret_hash,
            "1" if request.command_started else "0",
            age_us,
            "1" if request.command_paused else "0",
            caller=caller,
        )
        lease = _lease(reply, name)
        if not reply.is_lasting:
            await self._withhold(name, secret_hash, reply, reported=bool(age_us))
        return lease_service_pb2.RenewLeaseResponse(lease=lease)

    async def _withhold(
        self, name: LeaseName, secret_hash: str, reply: Reply, *, reported: bool
    ) -> None:
        """Acknowledge no grant and no report of a refresh of which the store has too few copies.

        An acceptance is taken back. For as long as the holder of an acceptance that was not
        acknowledged may try again, the TTL, each renewal counts as one.

        Raises:
            Failure: STORE_NOT_REPLICATED.
        """
        lease = record(reply.values[0])
        accepted_us = int(lease["accepted_us"])
        if accepted_us == reply.now_us:
            await self._scripts.run(
                "withhold", name.app, name.token, name.lease, secret_hash, lease["expires_us"]
            )
        if reported or reply.now_us < accepted_us + int(lease["ttl_us"]):
            raise self._scripts.not_lasting()

    async def release(
        self, request: lease_service_pb2.ReleaseLeaseRequest, caller: Caller
    ) -> lease_service_pb2.ReleaseLeaseResponse:
        """End a lease for its holder."""
        name = validation.lease_name("name", request.name)
        saw_every, age_us = _refresh_report(request.refresh)
        reply = await self._scripts.run_lasting(
            "release",
            name.app,
            name.token,
            name.lease,
            _sha256(validation.secret(request.secret).encode()),
            "1" if saw_every else "0",
            age_us,
            "1" if request.unused else "0",
            caller=caller,
        )
        lease = _lease(reply, name)
        return lease_service_pb2.ReleaseLeaseResponse(
            lease=lease, not_before_time=timestamp(record(reply.values[0]), "not_before_us")
        )

    async def break_(
        self, request: admin_service_pb2.BreakLeaseRequest, caller: Caller
    ) -> admin_service_pb2.BreakLeaseResponse:
        """Forbid the renewal of a lease."""
        name = validation.lease_name("name", request.name)
        reason = validation.reason(request.reason)
        who = user_and_host(validation.holder(request.holder))
        reply = await self._scripts.run(
            "break", name.app, name.token, name.lease, reason, who, caller=caller
        )
        return admin_service_pb2.BreakLeaseResponse(lease=_lease(reply, name))

    async def get(
        self, request: lease_service_pb2.GetLeaseRequest, _: Caller
    ) -> lease_service_pb2.GetLeaseResponse:
        """Return one lease."""
        name = validation.lease_name("name", request.name)
        reply = await self._scripts.run("read_lease", name.app, name.token, name.lease)
        return lease_service_pb2.GetLeaseResponse(lease=_lease(reply, name))

    async def list(
        self, request: lease_service_pb2.ListLeasesRequest, caller: Caller
    ) -> lease_service_pb2.ListLeasesResponse:
        """List live leases, by name of their token."""
        parent = validation.parent(request.parent)
        size = validation.page_size(request.page_size)
        after = validation.page_token(request.page_token)
        leases: list[lease_pb2.Lease] = []
        for app in [parent.app] if parent else await self._scripts.apps_with("due"):
            if isinstance(parent, TokenName):
                tokens = [parent.token]
            else:
                tokens = await self._scripts.busy_tokens(app)
            wanted = [
                token
                for token in tokens
                if (after is None or (app, token) > after) and caller.sees(app, token)
            ]
            for start in range(0, len(wanted), READ_BATCH):
                reply = await self._scripts.run("read", app, *wanted[start : start + READ_BATCH])
                for token_id, _, lease_id, flat, *_, running in reply.values[0]:
                    if not lease_id and not int(running):
                        continue
                    if len(leases) >= size:
                        last = LeaseName.parse(leases[-1].name).token_name
                        return lease_service_pb2.ListLeasesResponse(
                            leases=leases, next_page_token=str(last)
                        )
                    token = TokenName(app, token_id.decode())
                    if not lease_id:
                        leases += await self._shared(token)
                        continue
                    with self._scripts.sparing(app, f"tokens/{token.token}"):
                        leases.append(
                            lease_message(token, lease_id.decode(), record(flat), reply.now_us)
                        )
        return lease_service_pb2.ListLeasesResponse(leases=leases)

    async def _shared(self, token: TokenName) -> Sequence[lease_pb2.Lease]:
        """Return the live shared leases of a token in custody."""
        reply = await self._scripts.run("read_shared", token.app, token.token)

        def read(entry: Any) -> lease_pb2.Lease:
            return lease_message(token, entry[0].decode(), record(entry[1]), reply.now_us)

        return self._scripts.readable(token.app, "leases", reply.values[0], read)

    async def history(
        self, request: lease_service_pb2.ListLeaseHistoryRequest, _: Caller
    ) -> lease_service_pb2.ListLeaseHistoryResponse:
        """List the latest leases of a token, the newest first."""
        name = validation.token_name("parent", request.parent)
        at_us = None
        if request.HasField("at_time"):
            at_us = validation.timestamp_us("at_time", request.at_time)
        reply = await self._scripts.run("read_history", name.app, name.token)
        if reply.status != "OK":
            raise failure_of(reply, name)

        def read(entry: Any) -> lease_pb2.Lease | None:
            lease_id, lease = entry[0].decode(), record(entry[1])
            if at_us is not None:
                ended_us = int(lease.get("ended_us", reply.now_us))
                if not int(lease["accepted_us"]) <= at_us <= ended_us:
                    return None
            return lease_message(name, lease_id, lease, reply.now_us)

        leases = self._scripts.readable(name.app, "leases", reply.values[0], read)
        return lease_service_pb2.ListLeaseHistoryResponse(leases=filter(None, leases))

    async def waiters(
        self, request: lease_service_pb2.ListWaitersRequest, _: Caller
    ) -> lease_service_pb2.ListWaitersResponse:
        """List who waits for a token, in order."""
        name = validation.token_name("parent", request.parent)
        reply = await self._scripts.run("read_queue", name.app, name.token)
        if reply.status != "OK":
            raise failure_of(reply, name)
        return lease_service_pb2.ListWaitersResponse(
            waiters=self._scripts.readable(
                name.app,
                "requests",
                enumerate(reply.values[0], start=1),
                lambda entry: waiter_message(entry[0], record(entry[1]), reply.now_us),
            )
        )


_OVER = {
    "RELEASED": "LEASE_ENDED",
    "EXPIRED": "LEASE_LOST",
    "BROKEN": "LEASE_BROKEN",
    "WITHDRAWN": "OFFER_EXPIRED",
}

_MESSAGES = {
    "TOKEN_EXISTS": "{token} exists already; change it with: holdoff token update {token}",
    "QUEUE_FULL": "too many wait for {token} already",
    "LEASE_NOT_FOUND": "there is no lease {name}, or it ended too long ago to be remembered",
    "WRONG_SECRET": "the secret is not that of {name}: send the one that its offer had",
    "LEASE_ENDED": "{name} has ended; a new request needs a new request id",
    "LEASE_LOST": "{name} ran out before it was renewed: stop what runs under it",
    "LEASE_BROKEN": "{name} was broken: {why}",
    "OFFER_EXPIRED": "{name} was offered, and not accepted in time: the request waits on",
}

_WRONG_MODE = {
    "IN_CUSTODY": (
        "the token is in custody, so that its leases are shared: omit the mode, or ask for "
        "LEASE_MODE_SHARED"
    ),
    "NOT_IN_CUSTODY": (
        "only leases on a token in custody are shared: omit the mode, or put its grant with "
        "`holdoff grant put`"
    ),
}


def failure_of(reply: Reply, name: TokenName | LeaseName) -> Failure:
    """Turn a script's refusal into the failure that the caller gets."""
    reason, why = reply.status, ""
    if reason == "LEASE_OVER":
        reason, why = _OVER[reply.values[0].decode()], reply.values[1].decode()
    elif reason == "LEASE_BROKEN":
        why = reply.values[0].decode()
    elif reason == "LEASE_ENDED" and isinstance(name, TokenName):
        name = LeaseName(name.app, name.token, reply.values[0].decode())
    elif reason == "REQUEST_ID_REUSED":
        message = (
            "request_id: belongs to a request of another caller, or with another token, TTL or "
            "holder; a new request needs a new one"
        )
        return Failure(reason, message, field="request_id")
    elif reason in _WRONG_MODE:
        return invalid("mode", _WRONG_MODE[reason])
    elif reason == "FENCING_TOKEN_TOO_LARGE":
        return invalid("last_fencing_token", "is more than a year ahead of the store's clock")
    return _failure(reason, why, name)


def _failure(reason: str, why: str, name: TokenName | LeaseName) -> Failure:
    token = name.token_name if isinstance(name, LeaseName) else name
    if reason == "TOKEN_NOT_FOUND":
        return token_not_found(token)
    if reason not in _MESSAGES:
        return Failure("INTERNAL", f"unexpected answer of the store: {reason}")
    message = _MESSAGES[reason].format(name=name, token=token, why=why)
    return Failure(reason, message, resource=str(name))


def _lease(reply: Reply, name: LeaseName) -> lease_pb2.Lease:
    if reply.status != "OK":
        raise failure_of(reply, name)
    return lease_message(name.token_name, name.lease, record(reply.values[0]), reply.now_us)


def _refresh_report(report: lease_service_pb2.RefreshReport) -> tuple[bool, str]:
    """Read (saw every refresh, age in µs or '')."""
    if not report.HasField("last_refresh_age"):
        return report.saw_every_refresh, ""
    age = validation.microseconds("refresh.last_refresh_age", report.last_refresh_age)
    return report.saw_every_refresh, str(age)


async def _sleep(waiter: Waiter, seconds: float) -> bool:
    """Sleep until the waiter is stirred (True) or the time has passed (False)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await waiter.stirred.wait()
    stirred = waiter.stirred.is_set()
    waiter.stirred.clear()
    return stirred


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
