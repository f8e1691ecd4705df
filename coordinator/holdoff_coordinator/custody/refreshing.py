"""Refreshes of grants, one at a time: the protocol's steps from the right to the stored answer.

    right -> connection -> intent -> request -> answer in the spool -> answer in the store

What follows from each result is decided in `rules` and `results`; the store decides who has the
right, and whether an answer is still to be stored. A request without proof keeps its right until
that ends: only then is it counted, by whichever replica comes by.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import structlog

from holdoff.names import TokenName
from holdoff.v1 import budget_service_pb2
from holdoff_coordinator.caller import NOBODY
from holdoff_coordinator.custody import outcomes, reports, spool
from holdoff_coordinator.custody.answers import Issued, NotSent, Refused, Unproven, Verdict
from holdoff_coordinator.custody.copies import MOST_COPIES, Copy, copy_of, open_copy
from holdoff_coordinator.custody.outcomes import Failure as Why
from holdoff_coordinator.custody.outcomes import boottime_us
from holdoff_coordinator.custody.records import (
    NEVER,
    BeginRefresh,
    EndRefresh,
    Facts,
    IntendRefresh,
    ask,
    read,
)
from holdoff_coordinator.custody.resealing import resealed
from holdoff_coordinator.custody.results import (
    Anchor,
    Attempt,
    has_secrets,
    reading_of,
    rules_of,
    verdict_of,
    without_secrets,
)
from holdoff_coordinator.custody.rules import (
    ANSWER_US,
    INTENT_US,
    LASTING,
    SECOND,
    SEND_US,
    TAKEOVER_US,
    UNACKNOWLEDGED_US,
    Loss,
    Quarantine,
    Rotation,
    Times,
    adopts,
    continues,
    continues_anyway_us,
    due_us,
)
from holdoff_coordinator.custody.sealing import (
    KEY_BYTES,
    AccessSecrets,
    Binding,
    GrantSecrets,
    Keyring,
    SealError,
    SpoolKey,
)
from holdoff_coordinator.custody.seals import binding_of
from holdoff_coordinator.custody.sending import (
    Authentication,
    Connected,
    Limits,
    Request,
    Sending,
    wipe,
)
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.places import Place
from holdoff_coordinator.seldom import warn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from holdoff.policies import Policy
    from holdoff.v1 import budget_pb2
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.outcomes import Outcome
    from holdoff_coordinator.custody.records import Answer, Held, Record
    from holdoff_coordinator.custody.rules import Rules, Standing
    from holdoff_coordinator.custody.sealing import FingerprintKey
    from holdoff_coordinator.custody.seals import Seals
    from holdoff_coordinator.custody.spool import Spooling
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

    Due = Callable[[Standing, Rules, int], int | None]
    """When a grant is due, by the store's clock: `rules.due_us`, or `rules.earliest_us`."""
    AdoptAuthorization = Callable[[TokenName, str, spool.Spooled], Awaitable[None]]
    Report = Callable[[budget_service_pb2.RecordEventsRequest, Caller], Awaitable[object]]
    """`Budgets.record_events` is one."""

log = structlog.get_logger()

LIMITS: Final = Limits(
    connect_us=10 * SECOND,
    right_us=INTENT_US,
    unacknowledged_us=UNACKNOWLEDGED_US,
    answer_us=ANSWER_US,
)
"""Those that `TAKEOVER_US` is made of."""
_BEGIN_TRIES: Final = 3
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 5.0
HEADERS: Final = {"Accept": "application/json", "User-Agent": "holdoff"}


AUTHORIZATION: Final = 0
"""Stands for the generation that secrets of an authorization belong to."""


class Send(Protocol):
    """Makes a request that is not sent yet."""

    def __call__(self, request: Request, *, spooling: Spooling | None) -> Sending:
        """Return it; it raises ValueError where the token URL is not allowed."""


@dataclass(frozen=True, slots=True)
class Next:
    """What to do after a look at a grant."""

    wait_us: int | None
    """After how long to look again; None where it does not change by itself."""
    why: str
    """Such as DUE, COOLING, REFRESHING or GONE."""


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What stands before an answer in the spool: whose it is, and its key, sealed."""

    binding: Binding
    """Of the grant that the request was made with."""
    begun_us: int
    """When its right began, by the store's clock."""
    sealed_key: bytes


class Refresher:
    """Refreshes grants for one replica.

    Args:
        scripts: The store.
        policies: Where rules come from.
        seals: What opens and seals secrets.
        replica: The name of this replica, for people.
        send: Makes a request; a `Sending` with reach and `LIMITS`.
        folder: The spool of this replica alone; empty for none.
        is_copied: Whether a server that may be promoted has all that is acknowledged.
        report: Records events, as those of a job.
        now_us: The boot clock, as the sender reads it.
    """

    def __init__(  # noqa: PLR0913 - what it works with
        self,
        scripts: Scripts,
        policies: Policies,
        seals: Seals,
        *,
        replica: str,
        send: Send,
        folder: str = "",
        is_copied: bool = False,
        report: Report | None = None,
        now_us: Callable[[], int] = boottime_us,
    ) -> None:
        self._scripts = scripts
        self._policies = policies
        self._seals = seals
        self._replica = replica
        self.send = send
        self.folder = folder
        self._is_copied = is_copied
        self._report = report
        self._now_us = now_us
        self.under_way: set[str] = set()
        self._unreadable: set[str] = set()
        self._copies: dict[TokenName, Copy] = {}
        """The newest generation of each grant that this replica received or read."""
        self._seen: dict[str, tuple[str, int]] = {}
        """The quarantine of an app, and when it was seen first, by our boot clock."""
        self.requests: set[asyncio.Task[Any]] = set()
        """Those that are under way."""
        self.adopt_authorization: AdoptAuthorization | None = None
        """Takes the answer in the spool to the code of an authorization."""
        self._starts_none = False

    def start_none(self) -> None:
        """Begin no request from now on."""
        self._starts_none = True

    async def refresh(self, name: TokenName, due: Due = due_us) -> Next:
        """Request an access token if that is due; return when to look again.

        Cancelled while a request is under way, it leaves the answer in the spool.

        Raises:
            Failure: The store or the policy cannot be read, or a key is missing.
        """
        while True:
            asked_us = self._now_us()
            held = await read(self._scripts, name, sealed=True)
            if held is None:
                return Next(None, "GONE")
            self._keep(name, copy_of(held, asked_us))
            policy = await self._policy(name)
            rules = rules_of(policy, held.interval_us)
            if wait := self._wait(name, held, rules, due):
                return wait
            ring, prints = await self._seals.usable()
            if held.record.public.key_id not in ring.keys:
                return Next(None, "KEY_MISSING")  # the right is for those who can use it
            attempt_id = uuid.uuid4().hex
            answer, anchor = await self._begin(name, held, attempt_id, policy, rules)
            record = answer.grant
            match answer.status:
                case "BEGUN" if record:
                    work = _Work(
                        name, Attempt(name.token, attempt_id, record, rules), anchor, ring, prints
                    )
                    await self._request(work, policy)
                case "LOST" if record:
                    await self._count_lost(name, record, rules, answer)
                case "WAIT":
                    return Next(max(0, answer.until_us - answer.now_us), answer.reason)
                case "GONE":
                    return Next(None, "GONE")
                # CHANGED, STALE: look again

    def _wait(self, name: TokenName, held: Held, rules: Rules, due: Due) -> Next | None:
        """Tell why no access token is requested now, or return None."""
        quarantine = self._quarantine(name.app, held)
        if wait := _not_due(held, rules, due):
            return wait
        if self._starts_none:
            return Next(None, "DRAINING")
        if held.reason == "QUARANTINED":
            return self._wait_in_quarantine(quarantine, name, held, rules)
        if held.reason:
            return Next(max(0, held.until_us - held.now_us), held.reason)
        return None

    async def _policy(self, name: TokenName) -> Policy:
        return self._policies.find(
            "the token's policy", await self._scripts.policy(name.app, name.token) or ""
        )

    # The right ------------------------------------------------------------------------------

    async def _begin(
        self, name: TokenName, held: Held, attempt: str, policy: Policy, rules: Rules
    ) -> tuple[Answer, Anchor]:
        """Ask for the right, again where the answer was lost: it would be ours, unused."""
        record = held.record
        request = BeginRefresh(
            token=name.token,
            chain=record.chain,
            generation=record.generation,
            attempt=attempt,
            replica=self._replica,
            takeover_us=TAKEOVER_US,
            quarantine=held.quarantine if held.reason == "QUARANTINED" else "",
            fears="" if self._is_newest(name, held, rules) else self._fears(rules),
            event=attempt,
            budgets=Place(name, policy, "", "").specs("token_requests"),
        )
        tries = 0
        while True:
            asked_us = self._now_us()
            try:
                answer = await ask(self._scripts, name.app, request)
            except Failure:
                tries += 1
                if tries == _BEGIN_TRIES:
                    raise
                await asyncio.sleep(_FIRST_PAUSE_SECONDS)
            else:
                return answer, Anchor(answer.now_us, asked_us, self._now_us())

    def _fears(self, rules: Rules) -> str:
        """Tell after which loss of the store's a refresh token must not be sent."""
        if rules.rotation in LASTING:
            return ""
        is_revoking = rules.rotation is Rotation.SINGLE_USE_REVOKES
        return "WRITES" if is_revoking and not self._is_copied else "DATA"

    # Quarantine -----------------------------------------------------------------------------

    def _quarantine(self, app: str, held: Held) -> Quarantine | None:
        """Return the quarantine of an app, and remember when it was seen first."""
        if not held.quarantine:
            self._seen.pop(app, None)
            return None
        known, seen_us = self._seen.get(app, ("", 0))
        if known != held.quarantine:
            seen_us = self._now_us()
            self._seen[app] = held.quarantine, seen_us
        began, loss = held.quarantine.split()
        return Quarantine(int(began), Loss(loss), seen_us)

    def _wait_in_quarantine(
        self, quarantine: Quarantine | None, name: TokenName, held: Held, rules: Rules
    ) -> Next | None:
        """Tell why no access token is requested in a quarantine now, or return None."""
        if quarantine is None:
            return Next(max(0, held.until_us - held.now_us), held.reason)
        now_us, over_us = self._now_us(), self._interval_over_us(name, held.record, rules)
        if continues(quarantine, over_us, now_us, is_copied=self._is_copied):
            return None
        left_us = min(held.until_us, continues_anyway_us(quarantine, rules)) - held.now_us
        return Next(left_us, held.reason) if left_us > 0 else None

    def _is_newest(self, name: TokenName, held: Held, rules: Rules) -> bool:
        """Tell whether our own answer proves, in a quarantine, that no newer one was lost."""
        quarantine = self._quarantine(name.app, held)
        over_us = self._interval_over_us(name, held.record, rules)
        return quarantine is not None and continues(
            quarantine, over_us, self._now_us(), is_copied=False
        )

    def _interval_over_us(self, name: TokenName, record: Record, rules: Rules) -> int | None:
        """Return when the interval after the newest answer is over, if we received that answer."""
        copy = self._copies.get(name)
        if copy is None or not copy.is_ours or copy.request.refreshed_age_us == NEVER:
            return None
        ours = copy.request
        newest = (record.chain, record.generation) == (ours.chain, ours.generation)
        is_disputed = record.unproven or (record.under_way and record.attempt != ours.attempt)
        if not newest or is_disputed:
            return None
        last_us = copy.made_us - ours.refreshed_age_us
        return max(last_us + rules.interval_us, copy.made_us + ours.not_before_in_us)

    async def _count_lost(
        self, name: TokenName, record: Record, rules: Rules, answer: Answer
    ) -> None:
        """Count a request whose result is unknown at its last possible moment."""
        reason = record.attempt_outcome or f"replica {record.attempt_replica} reported no result"
        attempt = Attempt(name.token, record.attempt, record, rules)
        times = Times(answer.now_us, sent_us=record.attempt_begun_us, last_us=answer.over_us)
        request, alert = attempt.end(Unproven(reason), times)
        stored = await self._store(name, request)
        _tell(name, stored, request, alert)

    # The request ----------------------------------------------------------------------------

    async def _request(self, work: _Work, policy: Policy) -> None:
        """Send the request, and store what comes of it."""
        attempt = work.attempt.id
        path = f"{self.folder}/{attempt}" if self.folder else ""
        self.under_way.add(attempt)
        try:
            request = asyncio.create_task(self._outcome(work, path))
            self.requests.add(request)
            request.add_done_callback(self.requests.discard)
            outcome = await request
            verdict = work.scrubbed(verdict_of(outcome, reading_of(policy)))
            events = self._events(work, policy, outcome, verdict)
            received = outcomes.body_holder(outcome)
            if received is not None and isinstance(received.body, bytearray):
                wipe(received.body)
            made_us = self._now_us()
            await self._finish(work, verdict, self._times(work, outcome, made_us), made_us)
            await self.record(work.name, events, outcome)
            # A sender that did not report may have spooled an answer, or still do so: see `adopt`.
            if path and not outcomes.is_mute(outcome):
                remove(path)
        finally:
            self.under_way.discard(attempt)

    async def _outcome(self, work: _Work, path: str) -> Outcome:
        record, public = work.attempt.record, work.attempt.record.public
        try:
            secrets = work.ring.open(_blob(record.sealed_grant), work.binding, GrantSecrets)
        except SealError as error:
            return outcomes.NotSent(Why.REQUEST, str(error))
        secret = bytearray(secrets.client_secret.encode()) if secrets.client_secret else None
        try:
            request = Request(
                public.token_url,
                public.client_id,
                secret,
                {"refresh_token": bytearray(secrets.refresh_token.encode())},
                {"grant_type": "refresh_token"},
                HEADERS,
                Authentication(public.client_authentication),
            )
            sending = self.send(request, spooling=work.spooling(path) if path else None)
        except ValueError as error:
            wipe(secret)
            return outcomes.NotSent(Why.REQUEST, str(error))
        del secrets, request
        return await self.sent(sending, partial(self._intend, work))

    async def sent(
        self, sending: Sending, intend: Callable[[], Awaitable[outcomes.NotSent | None]]
    ) -> Outcome:
        """Connect, store the intent, and send.

        Args:
            sending: The request.
            intend: Stores the intent; returns why the request may not be sent, or None.
        """
        async with sending:
            connected = await sending.connect()
            if not isinstance(connected, Connected):
                return connected
            deadline_us = self._now_us() + SEND_US
            if refused := await intend():
                return refused
            return await sending.send(deadline_us)

    async def _intend(self, work: _Work) -> outcomes.NotSent | None:
        """Store the intent; return why the request may not be sent, or None."""
        if self._now_us() > work.anchor.asked_us + INTENT_US:
            return outcomes.NotSent(Why.DEADLINE, "the connection took too long")
        record = work.attempt.record
        request = IntendRefresh(
            token=work.name.token,
            chain=record.chain,
            generation=record.generation,
            attempt=work.attempt.id,
        )
        try:
            answer = await ask(self._scripts, work.name.app, request)
        except Failure as failure:
            return outcomes.NotSent(Why.ABANDONED, f"the intent was not stored: {failure.reason}")
        if answer.status != "OK":
            return outcomes.NotSent(Why.ABANDONED, "the right is another replica's")
        return None

    def _times(self, work: _Work, outcome: Outcome, made_us: int) -> Times:
        """Return the instants of an outcome by the store's clock, at the worst."""
        anchor = work.anchor
        now_us = anchor.latest_us(made_us)
        match outcome:
            case outcomes.NotSent():
                return Times(now_us, now_us, now_us)
            case outcomes.Answered(sent_us=sent, last_byte_us=last):
                return Times(now_us, anchor.earliest_us(sent), anchor.latest_us(last))
            case outcomes.NoProof(sent_us=sent_or_none, ended_us=last):
                sent = anchor.asked_us if sent_or_none is None else sent_or_none
                return Times(now_us, anchor.earliest_us(sent), anchor.latest_us(last))

    def _events(
        self, work: _Work, policy: Policy, outcome: Outcome, verdict: Verdict
    ) -> Sequence[budget_pb2.Event]:
        request = reports.Requested(work.attempt.id, work.attempt.record.public.token_url)
        return self.events(work.name, policy, request, outcome, verdict)

    def events(
        self,
        name: TokenName,
        policy: Policy,
        request: reports.Requested,
        outcome: Outcome,
        verdict: Verdict,
    ) -> Sequence[budget_pb2.Event]:
        """Return what is to be counted of a request, before its body is wiped."""
        return reports.events_of(
            name,
            policy,
            request,
            outcome,
            verdict,
            replica=self._replica,
            epoch_seconds=time.time(),
        )

    async def record(
        self, name: TokenName, events: Sequence[budget_pb2.Event], outcome: Outcome
    ) -> None:
        """Count what the provider answered, and back off if it says so."""
        if not events or self._report is None:
            return
        reports.aged(events, outcome, self._now_us())
        try:
            await self._report(budget_service_pb2.RecordEventsRequest(events=events), NOBODY)
        except Failure as failure:
            warn(
                "an answer of a token URL was not counted",
                failure.reason,
                token=str(name),
                remedy=failure.message,
            )

    # The answer -----------------------------------------------------------------------------

    async def _finish(self, work: _Work, verdict: Verdict, times: Times, made_us: int) -> None:
        """Store what a verdict makes of the grant; `made_us` is `times.now_us` by our clock."""
        attempt = work.attempt
        if isinstance(verdict, Unproven) and not has_secrets(verdict):
            # It may have been answered until its right ends, also if the connection was reset.
            over_us = attempt.record.attempt_begun_us + TAKEOVER_US
            times = replace(times, last_us=max(times.last_us, over_us))
            if not attempt.is_settled(verdict, times):
                request = attempt.note(verdict)
                _tell(work.name, await self._store(work.name, request), request, "")
                return
        sealed = work.sealed(verdict) if has_secrets(verdict) else {}
        request, alert = attempt.end(verdict, times, sealed)
        del verdict
        stored = await self._store(work.name, request, made_us)
        if stored.status == "OK" and sealed:
            again = msgspec.structs.replace(request, restores=True)
            self._keep(work.name, Copy(again, made_us, is_ours=True))
        if stored.status == "MOVED" and attempt.rules.rotation is Rotation.SINGLE_USE_REVOKES:
            alert = "two requests were made with one refresh token, which may revoke the grant"
        _tell(work.name, stored, request, alert)

    async def _store(
        self, name: TokenName, request: EndRefresh, made_us: int | None = None
    ) -> Answer:
        """Store a result; try as long as this process lives."""
        if made_us is None:
            made_us = self._now_us()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await ask(self._scripts, name.app, request.later(self._now_us() - made_us))
            except Failure as failure:
                warn(
                    "an answer of a token URL is not stored yet",
                    failure.reason,
                    token=str(name),
                    remedy=failure.message,
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def reseal(self) -> None:
        """Seal the answers that we keep with the primary key, so that they need no older one.

        Raises:
            Failure: CUSTODY_KEY_MISSING or STORE_….
        """
        if not self._copies:
            return
        ring, _ = await self._seals.unlocked()
        for name, copy in self._copies.items():
            with suppress(SealError):  # its key was removed too early
                again = msgspec.structs.replace(copy.request, **resealed(ring, name, copy.request))
                self._copies[name] = replace(copy, request=again)

    # Copies ---------------------------------------------------------------------------------

    def _keep(self, name: TokenName, copy: Copy | None) -> None:
        """Keep a copy, unless there is a newer one."""
        if copy and copy.replaces(self._copies.get(name)):
            self._copies.pop(name, None)  # so that it is the last one
            self._copies[name] = copy
            if len(self._copies) > MOST_COPIES:
                del self._copies[next(iter(self._copies))]

    def restore(self, app: str) -> Coroutine[None, None, None]:
        """Present what this replica has, after the store may have lost some of an app.

        That is what it has when this is called, not what it reads in the store afterwards. The
        store takes what it does not have; its generations only rise.
        """
        return self._present([one for one in self._copies.items() if one[0].app == app])

    async def _present(self, copies: Sequence[tuple[TokenName, Copy]]) -> None:
        for name, copy in copies:
            if not copy.is_ours and not self._is_sound(name, copy):
                continue
            stored = await self._store(name, copy.request, copy.made_us)
            if stored.status == "GONE" or (
                stored.grant is not None and stored.grant.chain != copy.request.chain
            ):
                self._forget(name, copy)

    async def take(self, name: TokenName, sealed: bytes) -> None:
        """Present what a client kept, if the store lost it.

        Not where an old refresh token revokes the grant: the client may have missed newer ones.

        Raises:
            Failure: STORE_…, CUSTODY_OFF or POLICY_NOT_FOUND.
        """
        try:
            found = open_copy(name, sealed, self._seals.require())
        except SealError as error:
            warn(
                "what a client kept of a grant cannot be used",
                str(error),
                token=str(name),
                remedy="none, if its key was removed or the client changed it",
            )
            return
        held, now_us = await read(self._scripts, name), self._now_us()
        request = found.request
        if held is None or held.record.chain != request.chain:
            return
        policy = await self._policy(name)
        revokes = rules_of(policy, held.interval_us).rotation is Rotation.SINGLE_USE_REVOKES
        if held.record.generation < request.generation and not revokes:
            copy = Copy(found.again(held.now_us), now_us, is_ours=False)
            await self._present([(name, copy)])

    def _forget(self, name: TokenName, copy: Copy) -> None:
        if self._copies.get(name) is copy:
            del self._copies[name]

    def _is_sound(self, name: TokenName, copy: Copy) -> bool:
        """Tell whether our keys sealed a copy, for this token and generation."""
        request = copy.request
        try:
            ring = Keyring(self._seals.require(), None)
            facts = msgspec.json.decode(request.facts, type=Facts)
            binding = binding_of(name, request.chain, request.generation, facts)
            ring.open(_blob(request.sealed_grant), binding, GrantSecrets)
            if request.sealed_access:
                ring.open(_blob(request.sealed_access), binding, AccessSecrets)
        except (Failure, SealError, ValueError, msgspec.MsgspecError) as error:
            warn(
                "a copy of a grant is not presented",
                type(error).__name__,
                token=str(name),
                remedy="holdoff-coordinator key list: compare the keys of the replicas",
            )
            return False
        return True

    # The spool ------------------------------------------------------------------------------

    async def adopt(self) -> bool:
        """Store the answers that a crash left in the spool; tell whether some are left.

        Raises:
            Failure: The store or a policy cannot be read, or keys are missing.
        """
        if not self.folder:
            return False
        paths = await asyncio.to_thread(spool.answers, self.folder)
        left = False
        for path in paths:
            if path in self._unreadable or Path(path).name in self.under_way:
                continue
            try:
                await self._adopt(path)
            except SealError as error:
                left = True
                warn(
                    "an answer in the spool cannot be opened",
                    str(error),
                    path=path,
                    remedy="copy the key that it names to the directory of --custody-key-dir",
                )
            except Failure as failure:
                if failure.reason.startswith("STORE_"):
                    raise
                left = True  # the others need not wait
                warn(
                    "an answer in the spool is not stored yet",
                    failure.reason,
                    path=path,
                    remedy=failure.message,
                )
            except (ValueError, msgspec.MsgspecError) as error:
                self._unreadable.add(path)
                # Not with its traceback, which may show what is in it.
                why = type(error).__name__
                log.error(  # noqa: TRY400
                    "a file in the spool is damaged",
                    path=path,
                    why=why,
                    remedy="keep it elsewhere, and see whether its disk is damaged",
                )
            except FileNotFoundError:
                pass
        return left

    async def _adopt(self, path: str) -> None:
        ring, prints = await self._seals.usable()
        opened: list[Envelope] = []

        def unwrap(wrapped: bytes) -> bytes:
            envelope = msgspec.msgpack.decode(wrapped, type=Envelope)
            opened.append(envelope)
            return ring.open(envelope.sealed_key, envelope.binding, SpoolKey).key

        found = spool.read(await asyncio.to_thread(Path(path).read_bytes), unwrap)
        (envelope,) = opened
        name = TokenName.parse(envelope.binding.resource)
        attempt_id = Path(path).name
        if envelope.binding.generation == AUTHORIZATION:
            if self.adopt_authorization:
                await self.adopt_authorization(name, attempt_id, found)
                remove(path)
            return
        asked_us = self._now_us()
        held = await read(self._scripts, name, sealed=True)
        if held is None or not _concerns(held.record, envelope, attempt_id):
            log.warning(
                "a late answer is dropped: another one was stored",
                token=str(name),
                remedy=f"nothing, while holdoff grant show {name} is ready",
            )
            remove(path)
            return
        anchor = Anchor(held.now_us, asked_us, self._now_us())
        policy = await self._policy(name)
        attempt = Attempt(name.token, attempt_id, held.record, rules_of(policy, held.interval_us))
        work = _Work(name, attempt, anchor, ring, prints)
        made_us = anchor.asked_us
        times = self._times(work, found.outcome, made_us)
        if not found.of_this_boot():
            # Its instants are of another clock. Of the store's, its right is known.
            last_us = min(held.now_us, envelope.begun_us + TAKEOVER_US)
            times = Times(held.now_us, sent_us=envelope.begun_us, last_us=last_us)
        verdict = work.scrubbed(verdict_of(found.outcome, reading_of(policy)))
        if has_secrets(verdict) or (held.record.attempt == attempt_id and held.record.under_way):
            await self._finish(work, verdict, times, made_us)
        if found.of_this_boot():
            await self.record(
                name, self._events(work, policy, found.outcome, verdict), found.outcome
            )
        remove(path)


@dataclass(frozen=True, slots=True)
class _Work:
    """A request, and what it takes to seal its answer."""

    name: TokenName
    attempt: Attempt
    anchor: Anchor
    ring: Keyring
    prints: FingerprintKey | None
    """None if the primary key is missing."""

    @property
    def primary(self) -> str:
        """The key that seals: without the primary key the one that sealed the grant."""
        return self.ring.primary or self.attempt.record.public.key_id

    @property
    def sealing(self) -> Keyring:
        """What seals."""
        return Keyring(self.ring.keys, self.primary)

    @property
    def binding(self) -> Binding:
        """What the secrets of the grant belong to."""
        record = self.attempt.record
        return binding_of(self.name, record.chain, record.generation, record.public)

    def spooling(self, path: str) -> Spooling:
        """Return where the answer goes, with a key that only our master keys open."""
        return spooling_of(self.sealing, self.binding, self.attempt.record.attempt_begun_us, path)

    def scrubbed(self, verdict: Verdict) -> Verdict:
        """Return a verdict whose error does not repeat the secrets of the grant."""
        if not isinstance(verdict, Refused):
            return verdict
        record = self.attempt.record
        try:
            secrets = self.ring.open(_blob(record.sealed_grant), self.binding, GrantSecrets)
        except SealError:
            return replace(verdict, error="an error")
        return without_secrets(verdict, secrets.refresh_token, secrets.client_secret)

    def sealed(self, verdict: Verdict) -> Mapping[str, str]:
        """Return the fields of `EndRefresh` for the next generation."""
        record, public = self.attempt.record, self.attempt.record.public
        next_one = msgspec.structs.replace(self.binding, generation=record.generation + 1)
        old = self.ring.open(_blob(record.sealed_grant), self.binding, GrantSecrets)
        rotated = "" if isinstance(verdict, NotSent) else verdict.refresh_token
        grant = GrantSecrets(rotated or old.refresh_token, old.client_secret)
        access = AccessSecrets(verdict.access_token) if isinstance(verdict, Issued) else None
        if access is None and record.sealed_access:
            with suppress(SealError):  # it expires soon anyway
                access = self.ring.open(_blob(record.sealed_access), self.binding, AccessSecrets)
        ring, fingerprint = self.sealing, record.fingerprint
        if self.prints:
            fingerprint = self.prints.fingerprint(
                public.token_url, public.client_id, grant.refresh_token
            )
        facts = msgspec.structs.replace(public, key_id=self.primary)
        return {
            "sealed_grant": _text(ring.seal(grant, next_one)),
            "sealed_access": _text(ring.seal(access, next_one)) if access else "",
            "fingerprint": fingerprint,
            "facts": msgspec.json.encode(facts).decode(),
        }


def spooling_of(ring: Keyring, binding: Binding, begun_us: int, path: str) -> Spooling:
    """Return where the answer to a request goes, with a key that only master keys open."""
    key = bytearray(os.urandom(KEY_BYTES))
    envelope = Envelope(binding, begun_us, ring.seal(SpoolKey(bytes(key)), binding))
    return spool.Spooling(path, key, msgspec.msgpack.encode(envelope))


def _not_due(held: Held, rules: Rules, due: Due) -> Next | None:
    """Tell why the grant itself is not due, or return None."""
    at_us = due(held.record.standing, rules, held.now_us)
    if at_us is None:
        return Next(None, held.record.condition.value)
    if held.now_us < at_us:
        is_cooling = held.now_us < held.record.not_before_us
        return Next(at_us - held.now_us, "COOLING" if is_cooling else "DUE")
    return None


def _concerns(record: Record, envelope: Envelope, attempt: str) -> bool:
    """Tell whether a late answer is still to be looked at."""
    binding = envelope.binding
    is_ours = record.chain == binding.chain_id and adopts(record.standing, binding.generation)
    return is_ours and (record.attempt != attempt or record.attempt_step != "STORED")


def _tell(name: TokenName, stored: Answer, request: EndRefresh, alert: str) -> None:
    """Log what came of a request, without anything secret."""
    facts = {"token": str(name), "step": request.step, "outcome": request.outcome}
    if stored.status != "OK":
        log.warning(
            "a result is dropped: the grant moved on",
            status=stored.status,
            remedy=f"nothing, while holdoff grant show {name} is ready",
            **facts,
        )
    if alert:
        remedy = f"holdoff grant show {name}; deploy/RUNBOOK.md"
        log.error("custody needs attention", alert=alert, remedy=remedy, **facts)
    elif stored.status == "OK":
        log.info("a request for an access token ended", **facts)


def _blob(text: str) -> bytes:
    return base64.b64decode(text)


def _text(sealed: bytes) -> str:
    return base64.b64encode(sealed).decode()


def remove(path: str) -> None:
    """Remove an answer from the spool."""
    with suppress(OSError):
        Path(path).unlink()
