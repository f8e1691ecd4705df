"""What makes a replica refresh a grant, keep from it, and finish it, against the simulator."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import redis

from holdoff.names import TokenName
from holdoff.policies import presets
from holdoff.simulator import Rotation, serving
from holdoff.v1 import (
    admin_service_pb2,
    budget_pb2,
    budget_service_pb2,
    custody_service_pb2,
    grant_pb2,
    lease_pb2,
)
from holdoff_coordinator.backoffs import BackOffs
from holdoff_coordinator.budgets import Budgets
from holdoff_coordinator.caller import NOBODY
from holdoff_coordinator.connecting import connect
from holdoff_coordinator.custody import duty as duties
from holdoff_coordinator.custody import handout
from holdoff_coordinator.custody.copies import seal_copy
from holdoff_coordinator.custody.duty import Duty
from holdoff_coordinator.custody.key_files import KeyDirectory
from holdoff_coordinator.custody.outcomes import Answered, Received, boottime_us
from holdoff_coordinator.custody.records import read
from holdoff_coordinator.custody.rules import SECOND
from holdoff_coordinator.custody.sending import Reach, Sending
from holdoff_coordinator.limits import Limits
from holdoff_coordinator.places import Places
from holdoff_coordinator.replays import Replays
from holdoff_coordinator.scripts import Scripts
from tests.custodian import HOUR, Custodian, key_directory, refused
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
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


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


async def no_grant(_: TokenName) -> None:
    """Explain no grant."""


def answered(status: int, body: bytes = b"{}", retry_after: str = "") -> Callable[..., Sending]:
    """Return what makes requests that are answered with a status at once."""
    headers = {"retry-after": retry_after} if retry_after else {}

    class Answering(Sending):
        async def send(self, deadline_us: int) -> Any:
            del deadline_us
            received = Received(status, headers, body)
            return Answered(received, sent_us=boottime_us(), last_byte_us=boottime_us())

    return lambda request, **options: Answering(
        request, reach=Reach(plain_http=True), limits=PATIENT, **options
    )


async def test_the_provider_s_word_becomes_a_back_off(url: str, keys: Path, tmp_path: Path) -> None:
    """It holds the next request for as long as the provider said, and the errors are counted.

    Fails when a request goes out again after the pause that any refusal causes, or when it then
    waits for a probe, which nobody but a lease would make.
    """
    async with world(url, keys, tmp_path) as w:
        places = Places(w.scripts, w.policies)
        budgets = Budgets(w.scripts, places, Replays(w.scripts, boottime_us), Limits(None))
        report = budgets.record_events
        refused = answered(400, b'{"error": "temporarily_unavailable"}')
        await w.refresh(report=report, send=refused)
        await w.pass_seconds(61)
        asked = answered(429, retry_after="1800")
        await w.refresh(report=report, send=asked)
        await w.pass_seconds(300)
        waits = await w.refresh(report=report)
        assert waits.why == "BACKING_OFF"
        assert waits.wait_us is not None
        assert 1700 * SECOND < waits.wait_us <= 1800 * SECOND
        assert await w.report() == (0, 0, 0)
        request = budget_service_pb2.ListBudgetsRequest(parent=f"apps/{w.name.app}")
        used = {
            (one.limit, one.scope.endpoint): one.used
            for one in (await budgets.list(request, NOBODY)).budgets
        }
        assert used == {("errors", "api/oauth2/token"): 1, ("token-requests", ""): 2}
        (back_off,) = (
            await BackOffs(w.scripts, places, no_grant).list_all(
                budget_service_pb2.ListBackOffsRequest(parent=f"apps/{w.name.app}"), NOBODY
            )
        ).back_offs
        assert (back_off.scope.token, back_off.scope.endpoint, back_off.status) == ("", "", 429)
        # When the pause is over a refresh goes out, without a probe before it.
        key = f"holdoff:{{{w.name.app}}}:backoff:{back_off.name.rpartition('/')[2]}"
        w.store.hset(key, "until_us", (w.store.time()[0] - 1) * SECOND)
        await w.refresh(report=report)
        assert (await w.record()).generation == 2


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


async def test_private_token_urls_with_an_authority_of_their_own(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """A coordinator asks them only where its operator allows that.

    Fails when the networks or the authorities of the options do not reach the sender.
    """
    authority, spool = tmp_path / "authority.pem", tmp_path / "spool"
    spool.mkdir()
    async with serving(rotation=Rotation.UNTIL_USED, tls=authority) as provider:
        policy = policy_of(provider, Rotation.UNTIL_USED, has_interval=True)
        known = {**presets(), policy.name: policy}

        token = f"apps/{uuid.uuid4().hex}/tokens/t"

        def first_outcome(**terms: Any) -> str:
            terms = {"spool": spool, **terms}
            with Custodian(url, keys, terms=terms, policies=known) as custodian:
                if not custodian.list(token.rpartition("/tokens/")[0])[0]:
                    custodian.token(policy.name, token)
                put(custodian, token, policy)
                with stream(custodian, token) as some:
                    while not some.next().HasField("access_token"):
                        if why := custodian.grant(token).last_attempt.outcome:
                            return why
                return "an access token"

        nets = ("127.0.0.0/8",)
        ask = asyncio.to_thread
        assert "a loopback address" in await ask(first_outcome, ca_file=authority)
        assert "tls: certificate" in await ask(first_outcome, networks=nets)
        found = await ask(first_outcome, networks=nets, ca_file=authority)
        assert found.startswith("an access token")


async def test_what_a_client_kept_comes_back(url: str, keys: Path, tmp_path: Path) -> None:
    """After a failover that lost an answer which only a client and a dead replica had.

    Fails when a coordinator takes what it did not seal, or for another token, or an old copy.
    """

    def lose(policy: Policy, one: Custodian, two: Custodian) -> None:
        token = one.token(policy.name)
        name = TokenName.parse(token)
        put(one, token, policy)
        key = f"holdoff:{{{name.app}}}:grant:{name.token}"
        with redis.Redis.from_url(url) as store:
            before: Any = store.dump(key)
            with stream(one, token) as some:
                while not (heard := some.next()).HasField("access_token"):
                    pass
            given = heard.access_token
            after = store.hgetall(key)
            one.stop()
            store.restore(key, 0, before, replace=True)
            asyncio.run(begin_quarantine(url, name))
            with stream(two, token, sealed_copy=given.sealed_copy[:-1] + b"!") as some:
                assert some.next().status.state == State.GRANT_STATE_HELD
            assert two.grant(token).generation == 1
            with stream(two, token, sealed_copy=given.sealed_copy) as some:
                assert some.token() == given.access_token
            found: Any = store.hgetall(key)
            assert found[b"sealed_grant"] == after[b"sealed_grant"]
            assert abs(int(found[b"not_before_us"]) - int(after[b"not_before_us"])) < 5 * SECOND
            store.hset(key, "generation", 3)
            with stream(two, token, sealed_copy=given.sealed_copy) as some:
                some.next()
            assert two.grant(token).generation == 3
            error = refused(ask_with, two, token, b"x" * 98_305)
            assert error.reason == "INVALID_FIELD"

    async with replicas(url, keys, tmp_path) as (_, policy, one, two):
        await asyncio.to_thread(lose, policy, one, two)


async def begin_quarantine(url: str, name: TokenName) -> None:
    """Begin a quarantine, as after a failover."""
    client = connect(url)
    try:
        await Scripts(client, quarantine_us=0).run("quarantine", name.app, "a test", "WRITES")
    finally:
        await client.aclose()


def ask_with(custodian: Custodian, token: str, sealed_copy: bytes) -> Any:
    """Open a stream with a copy; return its first response."""
    request = custody_service_pb2.GetAccessTokenRequest(
        name=f"{token}/grant", sealed_copy=sealed_copy
    )
    return next(iter(custodian.custody.GetAccessToken(request)))


@pytest.mark.parametrize("rotation", [Rotation.UNTIL_USED, Rotation.SINGLE_USE_REVOKES])
async def test_a_client_s_copy_where_an_old_token_revokes_the_grant(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """There it is not taken: the client may have been away while newer tokens were issued."""
    async with world(url, keys, tmp_path, rotation) as w:
        key = f"holdoff:{{{w.name.app}}}:grant:{w.name.token}"
        before = w.store.dump(key)
        await w.refresh()
        held = await read(w.scripts, w.name, sealed=True)
        assert held is not None
        sealed = seal_copy(w.name, held, KeyDirectory(keys).keys())
        assert before is not None
        w.store.restore(key, 0, before, replace=True)
        await w.refresher("two").take(w.name, sealed)
        record = await w.record()
        assert record.generation == (1 if rotation is Rotation.SINGLE_USE_REVOKES else 2)
        assert record.confirmed_us == 0
