"""What makes a replica refresh a grant, keep from it, and finish it, against the simulator."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from holdoff.policies import presets
from holdoff.simulator import Rotation, serving
from holdoff.v1 import admin_service_pb2, budget_pb2, grant_pb2, lease_pb2
from holdoff_coordinator.custody import duty as duties
from holdoff_coordinator.custody import handout
from holdoff_coordinator.custody.duty import Duty
from holdoff_coordinator.custody.rules import SECOND
from holdoff_coordinator.custody.sending import Reach, Sending
from tests.custodian import HOUR, Custodian, key_directory
from tests.integration.test_hand_out import stream
from tests.integration.test_refreshing import INTERVAL_SECONDS, SEED, policy_of, world
from tests.token_urls import PATIENT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from holdoff.policies import Policy
    from tests.conftest import StartValkey

State = grant_pb2.GrantState


@pytest.fixture(scope="module")
def url(start_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_valkey().url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


def slow(begun: asyncio.Event, may_end: asyncio.Event) -> Callable[..., Sending]:
    """Return what makes requests whose answer takes long."""

    class Slow(Sending):
        async def send(self, deadline_us: int) -> Any:
            outcome = await super().send(deadline_us)
            begun.set()
            await may_end.wait()
            return outcome

    return lambda request, **options: Slow(
        request, reach=Reach(plain_http=True), limits=PATIENT, **options
    )


async def test_a_drain_finishes_a_request(
    url: str, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short it is; and nothing else is begun.

    Fails when `--drain-seconds` ends a refresh between its request and the stored answer.
    """
    async with asyncio.timeout(60), world(url, keys, tmp_path) as w:
        begun, may_end = asyncio.Event(), asyncio.Event()
        refresher = w.refresher(send=slow(begun, may_end))
        duty = Duty(w.scripts, refresher)
        with duty.in_use(w.name):
            await begun.wait()
            monkeypatch.setattr(duties, "STORE_SECONDS", 0.0)
            draining = asyncio.create_task(duty.drain(0))
            done, _ = await asyncio.wait([draining], timeout=0.2)
            assert not done
            monkeypatch.setattr(duties, "STORE_SECONDS", 30.0)
            may_end.set()
            await draining
        record = await w.record()
        assert (record.generation, record.attempt_step) == (2, "STORED")
        assert w.spooled() == []
        await w.pass_seconds(INTERVAL_SECONDS)
        assert (await refresher.refresh(w.name)).why == "DRAINING"
        assert await w.report() == (1, 0, 0)


def put(custodian: Custodian, token: str, policy: Policy, **fields: Any) -> None:
    """Put the grant that the simulator knows."""
    custodian.put(
        token,
        grant={"client_id": SEED.client_id, "api_hosts": [policy.oauth.hosts[0]]},
        **{
            "refresh_token": SEED.refresh_token,
            "client_secret": SEED.client_secret,
            "replace": True,
            **fields,
        },
    )


@contextlib.asynccontextmanager
async def replicas(
    url: str, keys: Path, tmp_path: Path
) -> AsyncIterator[tuple[str, Policy, Custodian, Custodian]]:
    """Give a provider and its policy, and two replicas that refresh."""
    async with serving(rotation=Rotation.UNTIL_USED) as provider:
        policy = policy_of(provider, Rotation.UNTIL_USED, has_interval=True)
        known = {**presets(), policy.name: policy}
        with contextlib.ExitStack() as stack:
            found = []
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
                terms = {"loopback_http": True, "spool": tmp_path / name}
                custodian = Custodian(url, keys, terms=terms, policies=known)
                found.append(await asyncio.to_thread(stack.enter_context, custodian))
            try:
                yield provider, policy, found[0], found[1]
            finally:
                await asyncio.to_thread(stack.close)


async def test_what_ends_a_wait_is_followed_at_once(
    url: str, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grant that was replaced at another replica, and a back-off that was cleared there.

    Fails when a replica learns of them only when it looks by itself, which is after an hour here.
    """
    monkeypatch.setattr(duties, "LOOK_AGAIN_SECONDS", 3600.0)
    monkeypatch.setattr(handout, "LOOK_US", 3600_000_000)
    operator = lease_pb2.Holder(user="operator", host="h", job="j")

    def follow(policy: Policy, one: Custodian, two: Custodian) -> None:
        token = two.token(policy.name)
        put(two, token, policy, client_secret="a-wrong-secret-that-nobody-may-read")
        with stream(one, token) as some:
            some.until(State.GRANT_STATE_CONFIGURATION)
            scope = budget_pb2.Scope(app=token.rpartition("/tokens/")[0])
            quiet = admin_service_pb2.SetBackOffRequest(
                scope=scope, length=HOUR, reason="test", holder=operator
            )
            back_off = two.admin.SetBackOff(quiet).back_off
            put(two, token, policy)
            some.until(State.GRANT_STATE_HELD)
            two.admin.ClearBackOff(
                admin_service_pb2.ClearBackOffRequest(
                    name=back_off.name, reason="over", holder=operator
                )
            )
            assert some.token()

    async with replicas(url, keys, tmp_path) as (_, policy, one, two):
        await asyncio.to_thread(follow, policy, one, two)


async def test_the_end_of_what_held_a_token_is_followed(
    url: str, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its state is the same for streams, which have an access token meanwhile."""
    monkeypatch.setattr(duties, "LOOK_AGAIN_SECONDS", 3600.0)
    async with asyncio.timeout(60), world(url, keys, tmp_path) as w:
        shard = f"holdoff:{{{w.name.app}}}"
        seconds, _ = w.store.time()
        w.store.hset(shard, "quarantine_until_us", (seconds + 3600) * SECOND)
        duty = Duty(w.scripts, w.refresher())
        with duty.in_use(w.name):
            while w.name not in duty._held:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0.02)
            w.store.hset(shard, "quarantine_until_us", 0)
            duty.look_at_held(w.name.app)
            while (await w.record()).generation == 1:  # noqa: ASYNC110 - in the store
                await asyncio.sleep(0.05)
        await duty.drain(30)
