"""Checks what a refresh of a grant needs, without refreshing it: no request is sent.

Connections are made as for a refresh, by a `Sending` that is withdrawn once it is connected. A
check is bounded in time and processes, and its answer is given again for a few seconds.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import tempfile
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from holdoff.v1 import custody_service_pb2, grant_pb2
from holdoff_coordinator import validation
from holdoff_coordinator.custody.grants import grant_not_found
from holdoff_coordinator.custody.messages import shown, status_of, time_message
from holdoff_coordinator.custody.outcomes import Failure as Why
from holdoff_coordinator.custody.records import read
from holdoff_coordinator.custody.rules import SECOND
from holdoff_coordinator.custody.sealing import GrantSecrets, Keyring, SealError
from holdoff_coordinator.custody.seals import binding_of
from holdoff_coordinator.custody.sending import Connected, Limits, Request, Sending
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.limits import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdoff.names import TokenName
    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.custody.grants import Terms
    from holdoff_coordinator.custody.records import Held
    from holdoff_coordinator.custody.seals import Seals
    from holdoff_coordinator.custody.sending import Reach
    from holdoff_coordinator.policies import Policies
    from holdoff_coordinator.scripts import Scripts

    Check = grant_pb2.GrantCheck

_Subject = grant_pb2.GrantCheckSubject
_Result = grant_pb2.GrantCheckResult
_State = grant_pb2.GrantState

CONNECT_US: Final = 4 * SECOND
"""How long a connection may take."""
CHECK_SECONDS: Final = 8.0
"""A host that was not connected to by then counts as unreachable."""
SENDERS: Final = 4
"""Connections at once, of all checks of this replica."""
CHECKS: Final = 4
"""Checks at once."""
CHECKS_OF_CALLER: Final = 2
"""Of them, those of one caller."""
FRESH_SECONDS: Final = 5.0
"""The same answer is given for so long."""
_NOTED_CLOCK_SECONDS: Final = 5.0
_WRONG_CLOCK_SECONDS: Final = 60.0
_ROOM_BYTES: Final = Limits().head_bytes + Limits().body_bytes

_REMEDIES: Final = {
    Why.RESOLVE: "check the name, and DNS on the coordinator's host",
    Why.ADDRESS: "secrets go to public addresses only, unless the operator allows others",
    Why.CONNECT: "open the firewall from the coordinator's host to it",
    Why.TIMEOUT: "open the firewall from the coordinator's host to it",
    Why.TLS: "check its certificate, and the authorities that the coordinator's host trusts",
    Why.REQUEST: "put the grant again with another token URL",
    Why.SENDER: "see the log of the coordinator",
}
_PUT: Final = "put the grant again: holdoff grant put {name} --replace"


class GrantChecks:
    """Checks grants for one replica.

    Args:
        scripts: The store.
        policies: What is allowed.
        terms: On what terms grants are in custody here.
        seals: The master keys.
        reach: Where connections may go.
        replica: The name of this replica, for people.
        now: The wall clock, in seconds.
    """

    def __init__(  # noqa: PLR0913 - what a refresh needs
        self,
        scripts: Scripts,
        policies: Policies,
        terms: Terms,
        seals: Seals,
        *,
        reach: Reach,
        replica: str,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._scripts = scripts
        self._policies = policies
        self._terms = terms
        self._seals = seals
        self._reach = reach
        self._replica = replica
        self._now = now
        self._senders = asyncio.Semaphore(SENDERS)
        self._turns = Turns(CHECKS, CHECKS_OF_CALLER, rests=True)
        self._answers: dict[TokenName, tuple[float, custody_service_pb2.CheckGrantResponse]] = {}
        """The latest ones, and when they were made."""

    async def check(
        self, request: custody_service_pb2.CheckGrantRequest, caller: Caller
    ) -> custody_service_pb2.CheckGrantResponse:
        """Check a grant.

        Raises:
            Failure: GRANT_NOT_FOUND or STORE_….
        """
        name = validation.grant_name("name", request.name).token_name
        async with self._turns.taken(caller.account):
            oldest = time.monotonic() - FRESH_SECONDS
            self._answers = {key: one for key, one in self._answers.items() if one[0] > oldest}
            if name not in self._answers:
                self._answers[name] = time.monotonic(), await self._check(name)
            return self._answers[name][1]

    async def _check(self, name: TokenName) -> custody_service_pb2.CheckGrantResponse:
        before = self._now()
        held = await read(self._scripts, name, sealed=True)
        after = self._now()
        if held is None:
            raise grant_not_found(name)
        checks = [
            *self._policy(name, held),
            self._state(name, held),
            *await self._keys(name, held),
            await self._spool(),
            _clock(held, before, after),
            *await self._hosts(held),
        ]
        return custody_service_pb2.CheckGrantResponse(
            replica=self._replica, check_time=time_message(held.now_us), checks=checks
        )

    def _policy(self, name: TokenName, held: Held) -> Sequence[Check]:
        public = held.record.public
        found = []
        try:
            policy = self._policies.find("the token's policy", held.policy)
        except Failure as failure:
            remedy = "give the file of the policy to this coordinator (--policy-dir)"
            return [_failed(_Subject.GRANT_CHECK_SUBJECT_POLICY, failure.message, remedy)]
        oauth = policy.oauth
        if public.token_url not in oauth.token_urls:
            found.append(f"does not have the token URL {public.token_url}")
        others = ", ".join(host for host in public.api_hosts if host not in oauth.hosts)
        if others:
            found.append(f"does not have the API hosts {others}")
        if public.client_authentication not in oauth.client_authentication:
            found.append(f"does not have the authentication {public.client_authentication!r}")
        said = f"the policy {policy.name!r} "
        remedy = f"correct the policy, or {_PUT.format(name=name)}"
        return [
            _failed(_Subject.GRANT_CHECK_SUBJECT_POLICY, said + one, remedy) for one in found
        ] or [_ok(_Subject.GRANT_CHECK_SUBJECT_POLICY, f"{said}allows what was put")]

    def _state(self, name: TokenName, held: Held) -> Check:
        status = status_of(name, shown(held, self._policies), has_key=True)
        words = _State.Name(status.state).removeprefix("GRANT_STATE_").lower()
        check = _ok(_Subject.GRANT_CHECK_SUBJECT_STATE, f"{words}: {status.message}")
        if status.remedy:
            check.result = _Result.GRANT_CHECK_RESULT_FAILED
            check.message = check.message.removesuffix(f": {status.remedy}")
            check.remedy = status.remedy
        elif status.state == _State.GRANT_STATE_HELD:
            check.result = _Result.GRANT_CHECK_RESULT_WARNING
            check.remedy = f"wait, or see what holds it: holdoff explain {name}"
        return check

    async def _keys(self, name: TokenName, held: Held) -> Sequence[Check]:
        record, key_id = held.record, held.record.public.key_id
        keys = self._terms.keys()
        subject, seal = _Subject.GRANT_CHECK_SUBJECT_KEY, _Subject.GRANT_CHECK_SUBJECT_SEAL
        if key_id not in keys:
            why = f"this coordinator does not have the key {key_id!r}"
            remedy = f"copy {key_id}.key to its --custody-key-dir"
            return [_failed(subject, why, remedy, key_id)]
        try:
            await self._seals.unlocked()
        except Failure as failure:
            return [_failed(subject, failure.message, "copy it from another replica", key_id)]
        there = _ok(subject, "this coordinator has the keys", key_id)
        binding = binding_of(name, record.chain, record.generation, record.public)
        try:
            blob = base64.b64decode(record.sealed_grant, validate=True)
            Keyring(keys, None).open(blob, binding, GrantSecrets)
        except (SealError, binascii.Error):
            why = "the secrets cannot be decrypted: their record is damaged"
            remedy = f"restore the store from a backup, or {_PUT.format(name=name)}"
            return [there, _failed(seal, why, remedy, key_id)]
        return [there, _ok(seal, "the secrets can be decrypted", key_id)]

    async def _spool(self) -> Check:
        subject, spool = _Subject.GRANT_CHECK_SUBJECT_SPOOL, self._terms.spool
        if spool is None:
            why = "this coordinator requests no access tokens: it has no spool"
            return _failed(subject, why, "start it with --custody-spool-dir DIR")

        def write() -> None:
            with tempfile.TemporaryFile(dir=spool, prefix=".check-", suffix=".draft") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, _ROOM_BYTES)
                os.fsync(file.fileno())

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            remedy = "free its disk, or let the coordinator's user write to it"
            return _failed(subject, f"it cannot be written: {error.strerror}", remedy, str(spool))
        return _ok(subject, "it can be written", str(spool))

    async def _hosts(self, held: Held) -> Sequence[Check]:
        public = held.record.public
        scheme, authority = urlsplit(public.token_url)[:2]
        urls = {authority: public.token_url}
        urls |= {host: urls.get(host, f"{scheme}://{host}/") for host in public.api_hosts}
        tasks = {host: asyncio.create_task(self._connect(url)) for host, url in urls.items()}
        await asyncio.wait(tasks.values(), timeout=CHECK_SECONDS)
        checks = [_host(_Subject.GRANT_CHECK_SUBJECT_TOKEN_URL, authority, tasks[authority])]
        for host in public.api_hosts:
            check = _host(_Subject.GRANT_CHECK_SUBJECT_API_HOST, host, tasks[host])
            if check.result == _Result.GRANT_CHECK_RESULT_FAILED:
                # Those who use the access token call it, from their own network.
                check.result = _Result.GRANT_CHECK_RESULT_WARNING
                check.remedy = f"only jobs need to reach it; from here: {check.remedy}"
            checks.append(check)
        return checks

    async def _connect(self, url: str) -> tuple[bool, str, str]:
        """Connect, and leave; say whether that worked, what was found, and what to do."""
        async with self._senders:
            try:
                request = Request(url, "", None, {})
                limits = Limits(connect_us=CONNECT_US)
                sending = Sending(request, reach=self._reach, limits=limits)
            except ValueError as error:
                return False, str(error), _REMEDIES[Why.REQUEST]
            async with sending:
                connected = await sending.connect()
        if isinstance(connected, Connected):
            return True, f"connected to {connected.address}", ""
        why = f"{connected.why}: {connected.detail}"
        return False, why, _REMEDIES.get(connected.why, "see the log of the coordinator")


def _host(
    subject: grant_pb2.GrantCheckSubject.ValueType,
    host: str,
    task: asyncio.Task[tuple[bool, str, str]],
) -> Check:
    if not task.done():
        task.cancel()  # which ends its process
        return _failed(subject, "no connection in time", _REMEDIES[Why.TIMEOUT], host)
    is_ok, message, remedy = task.result()
    return _ok(subject, message, host) if is_ok else _failed(subject, message, remedy, host)


def _clock(held: Held, before: float, after: float) -> Check:
    """Compare the wall clock with the store's, which was read between two instants of it."""
    store = held.now_us / 1e6
    off = before - store if before > store else min(0.0, after - store)
    check = _ok(
        _Subject.GRANT_CHECK_SUBJECT_CLOCK,
        f"the coordinator's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the "
        "store's"
        if abs(off) >= 1
        else "the coordinator's clock and the store's agree",
    )
    if abs(off) > _NOTED_CLOCK_SECONDS:
        is_wrong = abs(off) > _WRONG_CLOCK_SECONDS
        check.result = (
            _Result.GRANT_CHECK_RESULT_FAILED if is_wrong else _Result.GRANT_CHECK_RESULT_WARNING
        )
        check.remedy = "set both by NTP"
    return check


def _ok(subject: grant_pb2.GrantCheckSubject.ValueType, message: str, target: str = "") -> Check:
    return grant_pb2.GrantCheck(
        subject=subject,
        target=target,
        result=_Result.GRANT_CHECK_RESULT_OK,
        message=message,
    )


def _failed(
    subject: grant_pb2.GrantCheckSubject.ValueType, message: str, remedy: str, target: str = ""
) -> Check:
    return grant_pb2.GrantCheck(
        subject=subject,
        target=target,
        result=_Result.GRANT_CHECK_RESULT_FAILED,
        message=message,
        remedy=remedy,
    )
