"""Refreshes in custody: the protocol's table of cases against a provider that misbehaves.

The provider's clock is moved by its own control; the store's instants of a grant are moved back by
as much, since its clock cannot be moved.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
import redis

from holdoff.names import TokenName
from holdoff.policies import Refresh, presets
from holdoff.simulator import Rotation, Seed, Switches, serving
from holdoff.simulator.switches import RefreshInterval
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.custody.duty import Duty
from holdoff_coordinator.custody.grants import Terms
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.custody.outcomes import Failure as Why
from holdoff_coordinator.custody.outcomes import NoProof, boottime_us
from holdoff_coordinator.custody.records import Record, read
from holdoff_coordinator.custody.refreshing import Next, Refresher
from holdoff_coordinator.custody.rules import INTENT_US, PROBE_US, SECOND, TAKEOVER_US, Condition
from holdoff_coordinator.custody.sealing import AccessSecrets, GrantSecrets
from holdoff_coordinator.custody.seals import Seals, binding_of
from holdoff_coordinator.custody.sending import Connected, Reach, Sending
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.policies import Policies
from holdoff_coordinator.scripts import Scripts
from tests.custodian import Custodian, key_directory
from tests.token_urls import PATIENT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from holdoff.policies import Policy
    from tests.conftest import StartValkey

SEED = Seed()
PATH = "/api/oauth2/token"
INTERVAL_SECONDS = 572
GRACE_SECONDS = 1800
NO_GRACE = tuple(rotation for rotation in Rotation if rotation is not Rotation.GRACE)
REPEATABLE = (Rotation.NONE, Rotation.REUSABLE, Rotation.UNTIL_USED)
NO_PROOF_NOT_ACTED_ON = (
    {"fault": "error", "status": 500},
    {"fault": "error", "status": 503},
    {"fault": "error", "status": 302},
    {"fault": "reset"},
    {"fault": "html"},
)
NO_PROOF_ACTED_ON = (
    {"fault": "lost-answer"},
    {"fault": "error-answer", "status": 502},
    {"fault": "html-answer"},
    {"fault": "partial-answer", "without": ["access_token", "refresh_token"]},
)


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


def policy_of(provider: str, rotation: Rotation, *, has_interval: bool) -> Policy:
    """Return Exact Online's policy for a simulated provider with a rule of rotation."""
    exact = presets()["exact-online"]
    fields = {name: getattr(exact.refresh, name) for name in Refresh.__struct_fields__}
    grace = float(GRACE_SECONDS) if rotation is Rotation.GRACE else None
    fields |= {"rotation": str(rotation), "grace": grace}
    if not has_interval:
        fields |= {"interval": 0.0, "margin": 0.0}
    refresh = Refresh(**fields)
    oauth = msgspec.structs.replace(exact.oauth, token_urls=(f"{provider}{PATH}",))
    return msgspec.structs.replace(exact, name="simulated", refresh=refresh, oauth=oauth)


@dataclass
class World:
    """A provider, a store with a grant, and replicas that refresh it."""

    provider: str
    http: aiohttp.ClientSession
    scripts: Scripts
    store: redis.Redis
    policies: Policies
    seals: Seals
    name: TokenName
    folder: Path

    def refresher(self, replica: str = "one", send: Any = None, **options: Any) -> Refresher:
        """Return a replica."""
        folder = self.folder / replica
        folder.mkdir(exist_ok=True)
        make = send or partial(Sending, reach=Reach(plain_http=True), limits=PATIENT)
        return Refresher(
            self.scripts,
            self.policies,
            self.seals,
            replica=replica,
            send=make,
            folder=str(folder),
            **options,
        )

    async def refresh(self, replica: str = "one", **options: Any) -> Next:
        """Refresh once, by a replica that knows nothing of before."""
        return await self.refresher(replica, **options).refresh(self.name)

    async def record(self) -> Record:
        """Read the grant."""
        held = await read(self.scripts, self.name, sealed=True)
        assert held is not None
        return held.record

    async def secrets(self) -> tuple[str, str]:
        """Return refresh token and access token."""
        record = await self.record()
        ring, _ = await self.seals.unlocked()
        binding = binding_of(self.name, record.chain, record.generation, record.public)
        grant = ring.open(base64.b64decode(record.sealed_grant), binding, GrantSecrets)
        access = ""
        if record.sealed_access:
            blob = base64.b64decode(record.sealed_access)
            access = ring.open(blob, binding, AccessSecrets).access_token
        return grant.refresh_token, access

    async def fault(self, fault: dict[str, object]) -> None:
        """Have the next token request go wrong."""
        url = f"{self.provider}/_simulator/faults"
        async with self.http.post(url, json={"path": PATH, **fault}) as response:
            assert response.status == 200, await response.text()

    async def pass_seconds(self, seconds: float) -> None:
        """Let time pass, for the provider and for the grant."""
        url = f"{self.provider}/_simulator/clock"
        async with self.http.post(url, json={"advance_seconds": seconds}) as response:
            assert response.status == 200
        shard = f"holdoff:{{{self.name.app}}}"
        instants = {
            f"{shard}:grant:{self.name.token}": (
                *("refreshed_us", "not_before_us", "expires_us", "idle_us", "first_unproven_us"),
                *("attempt_begun_us", "created_us", "evidence_us"),
            ),
            f"{shard}:token:{self.name.token}": ("last_refresh_us", "not_before_us"),
            shard: ("restored_us", "data_lost_us", "writes_lost_us"),
        }
        for key, fields in instants.items():
            for field in fields:
                if int(self.store.hget(key, field) or 0):
                    self.store.hincrby(key, field, -round(seconds * SECOND))

    async def report(self) -> tuple[int, int, int]:
        """Return how many tokens were issued, how many requests were refused, and violations."""
        async with self.http.get(f"{self.provider}/_simulator/report") as response:
            report = await response.json()
        agents = report["agents"].get("holdoff", {"violations": 0})
        totals = report["token_requests"]
        return totals["accepted"], totals["refused"], agents["violations"]

    def spooled(self, replica: str = "one") -> list[str]:
        """List what lies in the spool of a replica."""
        return sorted(os.listdir(self.folder / replica))  # noqa: PTH208


@contextlib.asynccontextmanager
async def world(
    url: str,
    keys: Path,
    folder: Path,
    rotation: Rotation = Rotation.UNTIL_USED,
    *,
    has_interval: bool = True,
) -> AsyncIterator[World]:
    """Give a grant that was refreshed an hour ago."""
    rule = RefreshInterval.ENFORCED if has_interval else RefreshInterval.EXEMPT
    switches = Switches(refresh_interval=rule)
    async with (
        serving(rotation=rotation, switches=switches) as provider,
        aiohttp.ClientSession() as http,
    ):
        policy = policy_of(provider, rotation, has_interval=has_interval)
        known = {**presets(), policy.name: policy}

        def put() -> str:
            terms = {"loopback_http": True}
            with Custodian(url, keys, terms=terms, policies=known) as custodian:
                token = custodian.token(policy.name)
                custodian.put(
                    token,
                    grant={"client_id": SEED.client_id, "api_hosts": [policy.oauth.hosts[0]]},
                    refresh_token=SEED.refresh_token,
                    client_secret=SEED.client_secret,
                )
                return token

        token = await asyncio.to_thread(put)
        client = connect(url)
        scripts = Scripts(client, quarantine_us=0)
        seals = Seals(scripts, Terms(keys=KeyDirectory(keys).keys).keys)
        name = TokenName.parse(token)
        with redis.Redis.from_url(url) as store:
            try:
                yield World(provider, http, scripts, store, Policies(known), seals, name, folder)
            finally:
                await client.aclose()


@pytest.mark.parametrize("rotation", Rotation)
async def test_refreshes(rotation: Rotation, url: str, keys: Path, tmp_path: Path) -> None:
    """Under each rule a chain of refreshes keeps the interval, and the spool is empty after each.

    Fails when the next one waits for less than an interval after the last byte of an answer.
    """
    async with world(url, keys, tmp_path, rotation) as w:
        seen = set()
        for generation in (2, 3, 4):
            waits = await w.refresh()
            record = await w.record()
            assert (record.generation, record.attempt_step) == (generation, "STORED"), record
            assert record.not_before_us - record.refreshed_us == INTERVAL_SECONDS * SECOND
            assert 0 < record.expires_us - record.refreshed_us <= 600 * SECOND
            assert waits.why == "COOLING"
            assert waits.wait_us is not None
            assert waits.wait_us <= INTERVAL_SECONDS * SECOND
            assert w.spooled() == []
            seen.add(await w.secrets())
            await w.pass_seconds(INTERVAL_SECONDS)
        assert len({access for _, access in seen}) == 3
        assert len({refresh for refresh, _ in seen}) == (1 if rotation is Rotation.NONE else 3)
        assert await w.report() == (3, 0, 0)
        shard = f"holdoff:{{{w.name.app}}}"
        found: Any = w.store.zrange(f"{shard}:budgets", 0, -1)
        (budget,) = found
        assert w.store.hget(f"{shard}:budget:{budget.decode()}", "used") == b"3"


@pytest.mark.parametrize(
    ("rotation", "fault"),
    [
        *product(NO_GRACE, NO_PROOF_NOT_ACTED_ON[:1]),
        *product([Rotation.UNTIL_USED], NO_PROOF_NOT_ACTED_ON[1:]),
        *product(NO_GRACE, NO_PROOF_ACTED_ON[:1]),
        *product([Rotation.UNTIL_USED], NO_PROOF_ACTED_ON[1:]),
    ],
    ids=lambda one: one["fault"] if isinstance(one, dict) else str(one),
)
async def test_no_proof(
    rotation: Rotation, fault: dict[str, object], url: str, keys: Path, tmp_path: Path
) -> None:
    """The same token is sent again an interval after the end of the right.

    Fails when a request without proof counts when its connection was reset.
    """
    acted_on = fault in NO_PROOF_ACTED_ON
    async with world(url, keys, tmp_path, rotation) as w:
        await w.fault(fault)
        waits = await w.refresh()
        record = await w.record()
        assert (record.generation, record.attempt_step) == (1, "INTENDED")
        assert record.attempt_outcome
        assert waits.why == "REFRESHING"
        await w.pass_seconds(TAKEOVER_US / SECOND)
        # Another replica counts it, and waits.
        waits = await w.refresh("two")
        record = await w.record()
        assert (record.attempt_step, record.unproven) == ("UNPROVEN", 1)
        assert waits.why == "COOLING"
        over_us = record.attempt_begun_us + TAKEOVER_US
        assert record.not_before_us >= over_us + INTERVAL_SECONDS * SECOND
        await w.pass_seconds(1300)  # also of an access token that may have been issued
        await w.refresh("two")
        record = await w.record()
        accepted, refused, violations = await w.report()
        assert violations == 0
        if acted_on and rotation not in REPEATABLE:
            # Refused: only a person can help, and nothing is deleted.
            assert record.condition is Condition.REAUTHORIZE, record
            assert (record.generation, accepted, refused) == (1, 1, 1)
            assert (await w.secrets())[0] == SEED.refresh_token
            assert (await w.refresh("two")).wait_us is None
        else:
            assert record.condition is Condition.READY
            assert (record.generation, record.unproven) == (2, 0)
            assert (accepted, refused) == (1 + acted_on, 0)


@pytest.mark.parametrize("rotation", [Rotation.UNTIL_USED, Rotation.SINGLE_USE_REVOKES])
async def test_rotated_without_an_access_token(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """The refresh token of an incomplete answer continues the chain, an interval later."""
    async with world(url, keys, tmp_path, rotation) as w:
        await w.fault({"fault": "partial-answer"})
        assert (await w.refresh()).why == "COOLING"
        record = await w.record()
        assert (record.generation, record.attempt_step) == (2, "UNPROVEN")
        assert (await w.secrets())[0] != SEED.refresh_token
        await w.pass_seconds(INTERVAL_SECONDS)
        await w.refresh()
        assert (await w.record()).generation == 3
        assert await w.report() == (2, 0, 0)


async def test_no_proof_within_a_grace_period(url: str, keys: Path, tmp_path: Path) -> None:
    """The token is repeated at once, since the provider is known to answer that."""
    async with world(url, keys, tmp_path, Rotation.GRACE, has_interval=False) as w:
        await w.fault({"fault": "lost-answer"})
        await w.refresh()
        record = await w.record()
        assert (record.generation, record.attempt_step, record.unproven) == (2, "STORED", 0)
        assert await w.report() == (2, 0, 0)


@pytest.mark.parametrize("rotation", Rotation)
async def test_not_sent(rotation: Rotation, url: str, keys: Path, tmp_path: Path) -> None:
    """Where the provider cannot be reached, the attempt is cleared and repeated after a pause."""

    def unreachable(request: Any, **options: Any) -> Sending:
        return Sending(
            replace(request, token_url="http://nowhere.invalid/token"),
            reach=Reach(plain_http=True),
            limits=PATIENT,
            **options,
        )

    async with world(url, keys, tmp_path, rotation) as w:
        waits = await w.refresh(send=unreachable)
        record = await w.record()
        assert (record.attempt_step, record.generation) == ("NOT_ISSUED", 1)
        assert (record.condition, record.unproven, record.not_sent) == (Condition.READY, 0, 1)
        assert waits.wait_us is not None
        assert waits.wait_us <= 1 * SECOND
        await w.pass_seconds(1)
        await w.refresh("two")
        assert (await w.record()).generation == 2
        assert await w.report() == (1, 0, 0)


class CrashError(Exception):
    """A replica that is gone."""


class Dying(Sending):
    """A request whose coordinator ends at a step."""

    step = ""

    async def send(self, deadline_us: int) -> Any:
        """Send, and be gone."""
        if self.step == "intended":
            raise CrashError
        outcome = await super().send(deadline_us)
        assert self.spooled
        raise CrashError if self.step == "answered" else AssertionError(outcome)


def dying(step: str) -> Callable[..., Sending]:
    """Return what makes requests whose coordinator ends at a step."""

    def make(request: Any, **options: Any) -> Sending:
        one = Dying(request, reach=Reach(plain_http=True), limits=PATIENT, **options)
        one.step = step
        return one

    return make


@pytest.mark.parametrize(
    ("rotation", "step"), [*product(Rotation, ["answered"]), (Rotation.UNTIL_USED, "intended")]
)
async def test_a_crash_before_the_answer_is_stored(
    rotation: Rotation, step: str, url: str, keys: Path, tmp_path: Path
) -> None:
    """A replica that starts again adopts the answer from its spool; the chain is whole.

    Fails when the spool is not read at the start, or its answer is taken for another generation's.
    """
    async with world(url, keys, tmp_path, rotation) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying(step))
        assert (await w.record()).attempt_step == "INTENDED"
        again = w.refresher()
        if step == "intended":
            assert await again.adopt() is False
            await w.pass_seconds(TAKEOVER_US / SECOND)
            await again.refresh(w.name)
            assert (await w.record()).unproven == 1
            await w.pass_seconds(INTERVAL_SECONDS + TAKEOVER_US / SECOND)
            await again.refresh(w.name)
            assert (await w.record()).generation == 2
            assert await w.report() == (1, 0, 0)
            return
        assert len(w.spooled()) == 1
        assert await again.adopt() is False
        record = await w.record()
        assert (record.generation, record.attempt_step) == (2, "STORED")
        assert record.not_before_us - record.refreshed_us == INTERVAL_SECONDS * SECOND
        assert w.spooled() == []
        await w.pass_seconds(INTERVAL_SECONDS)
        await again.refresh(w.name)
        assert (await w.record()).generation == 3
        assert await w.report() == (2, 0, 0)


@pytest.mark.parametrize("rotation", Rotation)
@pytest.mark.parametrize("moved", [False, True])
async def test_a_late_answer(
    rotation: Rotation, moved: bool, url: str, keys: Path, tmp_path: Path
) -> None:
    """It is adopted also from REAUTHORIZE, and dropped if another answer was stored meanwhile."""
    async with world(url, keys, tmp_path, rotation) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying("answered"))
        key = f"holdoff:{{{w.name.app}}}:grant:{w.name.token}"
        w.store.hset(key, "condition", "REAUTHORIZE")
        if moved:
            w.store.hset(key, "generation", 2)
        await w.refresher().adopt()
        record = await w.record()
        assert w.spooled() == []
        if moved:
            assert (record.generation, record.condition) == (2, Condition.REAUTHORIZE)
        else:
            assert (record.generation, record.condition) == (2, Condition.READY)


async def test_a_late_answer_after_a_refused_probe(url: str, keys: Path, tmp_path: Path) -> None:
    """The pause of a refused probe ends with the token that it sent; the intervals hold.

    Fails when the late answer is adopted and no refresh follows for an hour, or when one follows
    within an interval of that answer.
    """
    async with world(url, keys, tmp_path, Rotation.GRACE) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying("answered"))
        await w.pass_seconds(TAKEOVER_US / SECOND)
        await w.refresh("two")
        await w.pass_seconds(INTERVAL_SECONDS + TAKEOVER_US / SECOND + GRACE_SECONDS)
        await w.refresh("two")
        refused = await w.record()
        assert (refused.condition, refused.attempt_step) == (Condition.REAUTHORIZE, "NOT_ISSUED")
        assert refused.not_before_us > refused.attempt_begun_us + PROBE_US - SECOND
        _, _, violations = await w.report()
        await w.refresher().adopt()
        record = await w.record()
        assert (record.generation, record.condition) == (2, Condition.READY)
        assert record.refreshed_us >= refused.refreshed_us
        over_us = record.refreshed_us + INTERVAL_SECONDS * SECOND
        assert over_us <= record.not_before_us < refused.not_before_us - PROBE_US // 2
        await w.pass_seconds((record.not_before_us - record.refreshed_us) / SECOND)
        await w.refresh("two")
        assert (await w.record()).generation == 3
        assert await w.report() == (2, 1, violations)


async def test_one_answer_does_not_hold_up_the_others(url: str, keys: Path, tmp_path: Path) -> None:
    """One whose policy is missing stays in the spool, and is stored when the policy is back."""
    async with world(url, keys, tmp_path) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying("answered"))
        known, w.policies = w.policies, Policies(presets())
        assert await w.refresher().adopt()
        assert len(w.spooled()) == 1
        w.policies = known
        assert not await w.refresher().adopt()
        assert (await w.record()).generation == 2
        assert w.spooled() == []


async def test_an_answer_of_another_boot(url: str, keys: Path, tmp_path: Path) -> None:
    """After the machine started again, an answer counts when its right ended or now."""
    async with world(url, keys, tmp_path) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying("answered"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("holdoff_coordinator.custody.spool.boot_id", lambda: "another")
            await w.refresher().adopt()
        record = await w.record()
        assert record.generation == 2
        assert record.refreshed_us >= record.attempt_begun_us
        assert record.expires_us <= record.attempt_begun_us + 601 * SECOND


async def test_a_store_that_refuses(url: str, keys: Path, tmp_path: Path) -> None:
    """An answer is stored as soon as the store takes it; its interval began when it came."""

    class Refusing(Scripts):
        refusals = 2

        async def run_lasting(self, name: str, *args: Any, **options: Any) -> Any:
            if name == "end_refresh" and self.refusals:
                self.refusals -= 1
                raise Failure("STORE_UNAVAILABLE", "away")
            return await super().run_lasting(name, *args, **options)

    async with world(url, keys, tmp_path) as w:
        w.scripts = Refusing(w.scripts.redis, quarantine_us=0)
        await w.refresh()
        record = await w.record()
        assert (record.generation, record.attempt_step) == (2, "STORED")
        assert w.spooled() == []
        assert await w.report() == (1, 0, 0)


async def test_two_replicas(url: str, keys: Path, tmp_path: Path) -> None:
    """Many replicas at the instant of a refresh: one request."""
    async with world(url, keys, tmp_path) as w:
        found = await asyncio.gather(*(w.refresh(f"r{n}") for n in range(4)))
        assert {one.why for one in found} <= {"REFRESHING", "COOLING"}
        assert (await w.record()).generation == 2
        assert await w.report() == (1, 0, 0)


async def test_a_sender_that_does_not_report(url: str, keys: Path, tmp_path: Path) -> None:
    """Its answer stays in the spool, and is adopted: no other copy is left of it."""

    class Mute(Sending):
        async def send(self, deadline_us: int) -> Any:
            await super().send(deadline_us)
            return NoProof(Why.SENDER, "no report", self.sent_us, boottime_us())

    mute = partial(Mute, reach=Reach(plain_http=True), limits=PATIENT)
    async with world(url, keys, tmp_path, Rotation.SINGLE_USE) as w:
        await w.refresh(send=mute)
        assert (await w.record()).generation == 1
        await w.refresher().adopt()
        assert (await w.record()).generation == 2
        assert w.spooled() == []
        assert await w.report() == (1, 0, 0)


async def test_a_replica_that_froze_past_its_right(url: str, keys: Path, tmp_path: Path) -> None:
    """A replica that continues after its right ended sends nothing."""
    thawed = asyncio.Event()
    waiting = asyncio.Event()

    class Freezing(Sending):
        async def connect(self) -> Any:
            found = await super().connect()
            assert isinstance(found, Connected)
            waiting.set()
            await thawed.wait()
            return found

    freezing = partial(Freezing, reach=Reach(plain_http=True), limits=PATIENT)
    async with world(url, keys, tmp_path) as w:
        frozen = asyncio.create_task(w.refresh(send=freezing))
        await waiting.wait()
        await w.pass_seconds(TAKEOVER_US / SECOND)
        await w.refresh("two")
        assert (await w.record()).generation == 2
        thawed.set()
        await frozen
        record = await w.record()
        assert (record.generation, record.attempt_replica) == (2, "two")
        assert await w.report() == (1, 0, 0)


async def test_a_replica_that_was_stopped_before_its_intent(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """It sends nothing, also if no other replica took over: its answer would come too late."""
    later_us = 0

    class Slow(Sending):
        async def connect(self) -> Any:
            nonlocal later_us
            found = await super().connect()
            later_us = INTENT_US + 1
            return found

    slow = partial(Slow, reach=Reach(plain_http=True), limits=PATIENT)
    async with world(url, keys, tmp_path) as w:
        one = w.refresher(send=slow, now_us=lambda: boottime_us() + later_us)
        await one.refresh(w.name)
        record = await w.record()
        assert (record.generation, record.attempt_step) == (1, "NOT_ISSUED")
        assert "took too long" in record.attempt_outcome
        assert await w.report() == (0, 0, 0)


@pytest.mark.parametrize("rotation", Rotation)
async def test_a_dead_refresh_token(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """A person must authorize; at most one probe an hour follows, where it can do no harm."""
    async with world(url, keys, tmp_path, rotation) as w:
        await w.pass_seconds(31 * 24 * 3600)
        waits = await w.refresh()
        record = await w.record()
        if rotation in (Rotation.NONE, Rotation.REUSABLE):  # they do not expire
            assert record.generation == 2
            return
        assert (record.condition, record.generation) == (Condition.REAUTHORIZE, 1)
        assert record.message
        if rotation in (Rotation.SINGLE_USE, Rotation.SINGLE_USE_REVOKES):
            assert waits == Next(None, "REAUTHORIZE")
        else:
            assert waits.wait_us is not None
            assert waits.wait_us > PROBE_US - 60 * SECOND
        assert (await w.report())[:2] == (0, 1)


async def test_too_early(url: str, keys: Path, tmp_path: Path) -> None:
    """Another program refreshed: the next request is an interval later."""
    async with world(url, keys, tmp_path) as w:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": SEED.refresh_token,
            "client_id": SEED.client_id,
            "client_secret": SEED.client_secret,
        }
        async with w.http.post(f"{w.provider}{PATH}", data=form) as response:
            assert response.status == 200
        await w.refresh()
        record = await w.record()
        assert (record.attempt_step, record.condition) == ("NOT_ISSUED", Condition.READY)
        assert "too early" in record.attempt_outcome
        assert record.not_before_us - record.attempt_begun_us >= INTERVAL_SECONDS * SECOND
        await w.pass_seconds(INTERVAL_SECONDS)
        await w.refresh()
        assert (await w.record()).generation == 2


async def test_a_wrong_secret(url: str, keys: Path, tmp_path: Path) -> None:
    """Nothing more is sent until an operator puts the right one."""

    def wrong(request: Any, **options: Any) -> Sending:
        request.client_secret[:] = b"x" * len(request.client_secret)
        return Sending(request, reach=Reach(plain_http=True), limits=PATIENT, **options)

    async with world(url, keys, tmp_path) as w:
        assert await w.refresh(send=wrong) == Next(None, "CONFIGURATION")
        assert (await w.record()).condition is Condition.CONFIGURATION


async def test_a_failover_that_lost_the_answer(url: str, keys: Path, tmp_path: Path) -> None:
    """The replica that has the answer stores it again."""
    async with world(url, keys, tmp_path) as w:
        key = f"holdoff:{{{w.name.app}}}:grant:{w.name.token}"
        one = w.refresher()
        before = w.store.dump(key)
        await one.refresh(w.name)
        stored = await w.secrets()
        assert before is not None
        w.store.restore(key, 0, before, replace=True)
        await one.restore(w.name.app)
        assert (await w.record()).generation == 2
        assert await w.secrets() == stored
        await one.restore(w.name.app)
        assert (await w.record()).generation == 2


async def test_a_failover_that_lost_an_answer_of_a_replica_that_is_gone(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """Another replica, which only read the grant, presents it; a copy that was changed it does not.

    Fails when a chain breaks whose answer only the store and the dead replica had.
    """
    async with world(url, keys, tmp_path) as w:
        key = f"holdoff:{{{w.name.app}}}:grant:{w.name.token}"
        before = w.store.dump(key)
        await w.refresh("one")
        stored = await w.secrets()
        two, three = w.refresher("two"), w.refresher("three")
        assert (await two.refresh(w.name)).why == "COOLING"
        sealed = w.store.hget(key, "sealed_grant")
        w.store.hset(key, "sealed_grant", base64.b64encode(b"\1" * 200))
        await three.refresh(w.name)
        w.store.hset(key, "sealed_grant", sealed or "")
        assert before is not None
        w.store.restore(key, 0, before, replace=True)
        await three.restore(w.name.app)
        assert (await w.record()).generation == 1
        presenting = two.restore(w.name.app)
        await two.refresh(w.name, lambda *_: None)  # what it reads now is no newer
        await presenting
        record = await w.record()
        assert record.generation == 2
        assert await w.secrets() == stored
        assert (await two.refresh(w.name)).why == "COOLING"
        assert record.not_before_us - record.refreshed_us >= (INTERVAL_SECONDS - 1) * SECOND
        assert await w.report() == (1, 0, 0)


@pytest.mark.parametrize("rotation", Rotation)
async def test_a_failover_that_may_have_lost_an_answer(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """Where an old token revokes the grant, it is not sent before a replica presents its answer.

    Fails when such a token is sent after a loss, or an answer that a replica has does not help.
    """
    async with world(url, keys, tmp_path, rotation) as w:
        one = w.refresher()
        await one.refresh(w.name)
        await w.pass_seconds(INTERVAL_SECONDS)
        seconds, _ = w.store.time()
        w.store.hset(f"holdoff:{{{w.name.app}}}", "writes_lost_us", (seconds - 60) * SECOND)
        waits = await w.refresh("two")
        if rotation is Rotation.SINGLE_USE_REVOKES:
            assert waits == Next(None, "STALE")
            assert (await w.record()).generation == 2
            await one.restore(w.name.app)
            assert (await w.record()).condition is Condition.READY
            await w.refresh("two")
        assert (await w.record()).generation == 3
        assert await w.report() == (2, 0, 0)


async def test_quarantine_holds_a_refresh(url: str, keys: Path, tmp_path: Path) -> None:
    """Without evidence nothing is requested in quarantine; evidence needs to know when it began."""
    async with world(url, keys, tmp_path) as w:
        shard = f"holdoff:{{{w.name.app}}}"
        seconds, _ = w.store.time()
        w.store.hset(shard, "quarantine_until_us", (seconds + 600) * SECOND)
        waits = await w.refresh()
        assert waits.why == "QUARANTINED"
        assert await w.report() == (0, 0, 0)


async def test_demand(url: str, keys: Path, tmp_path: Path) -> None:
    """A token in use is refreshed at once, and no other one; draining starts none."""
    async with world(url, keys, tmp_path) as w:
        duty = Duty(w.scripts, w.refresher())
        await duty.refresh_idle()
        assert (await w.record()).generation == 1
        with duty.in_use(w.name), duty.in_use(w.name):
            async with asyncio.timeout(60):
                while (await w.record()).generation == 1:  # noqa: ASYNC110 - in the store
                    await asyncio.sleep(0.05)
        await duty.drain(30)
        await w.pass_seconds(INTERVAL_SECONDS)
        with duty.in_use(w.name):
            await asyncio.sleep(0)
            assert not duty._keepers
        assert await w.report() == (1, 0, 0)


async def test_a_grant_that_nothing_uses(url: str, keys: Path, tmp_path: Path) -> None:
    """It is refreshed once at 80 % of the idle life of its refresh token."""
    async with world(url, keys, tmp_path) as w:
        duty = Duty(w.scripts, w.refresher())
        index = f"holdoff:{{{w.name.app}}}:idling"
        record = await w.record()
        (entry,) = w.store.zrange(index, 0, -1, withscores=True)
        assert entry[1] == pytest.approx(
            record.refreshed_us + 0.8 * (record.idle_us - record.refreshed_us)
        )
        for _ in range(2):
            w.store.zadd(index, {w.name.token: 1})
            await duty.refresh_idle()
        # The second time it was not due: the claim only moved it.
        assert (await w.record()).generation == 2
        assert await w.report() == (1, 0, 0)


async def test_a_right_whose_answer_was_lost(url: str, keys: Path, tmp_path: Path) -> None:
    """A replica to which the store gave the right, unheard, asks again and continues."""

    class Losing(Scripts):
        losses = 1

        async def run_lasting(self, name: str, *args: Any, **options: Any) -> Any:
            reply = await super().run_lasting(name, *args, **options)
            if name == "begin_refresh" and self.losses:
                self.losses -= 1
                raise Failure("STORE_UNAVAILABLE", "away")
            return reply

    async with world(url, keys, tmp_path) as w:
        w.scripts = Losing(w.scripts.redis, quarantine_us=0)
        await w.refresh()
        assert (await w.record()).generation == 2
        assert await w.report() == (1, 0, 0)
