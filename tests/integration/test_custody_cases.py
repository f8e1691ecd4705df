"""Cells of the protocol's table that need two replicas, or a store that lost an answer.

The rest of the table is in test_refreshing.py; tests/custody/table.py names the test of each cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from holdoff.simulator import Rotation
from holdoff_coordinator.custody.refreshing import Next
from holdoff_coordinator.custody.rules import SECOND, TAKEOVER_US, Condition
from tests.custodian import key_directory
from tests.integration.test_refreshing import (
    INTERVAL_SECONDS,
    REPEATABLE,
    CrashError,
    World,
    dying,
    world,
)

if TYPE_CHECKING:
    from pathlib import Path

    from holdoff_coordinator.custody.refreshing import Refresher
    from tests.conftest import StartValkey

ACCESS_SECONDS = 600
GRACE_SECONDS = 1800


async def report(w: World) -> tuple[int, int, dict[str, int]]:
    """Return tokens issued, requests refused, and the rules that were broken, by the provider.

    The table sends an old refresh token once where it cannot know better: the provider counts that.
    """
    async with w.http.get(f"{w.provider}/_simulator/report") as response:
        found = await response.json()
    broken = {rule: times for rule, times in found["totals"]["by_rule"].items() if times}
    totals = found["token_requests"]
    return totals["accepted"], totals["refused"], broken


OLD_TOKEN_ONCE = {"old_refresh_token": 1}


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


async def lose(w: World) -> Refresher:
    """Have the store lose what a replica stores now, and know that it may; return the replica."""
    key = f"holdoff:{{{w.name.app}}}:grant:{w.name.token}"
    before = w.store.dump(key)
    one = w.refresher()
    await one.refresh(w.name)
    assert before is not None
    w.store.restore(key, 0, before, replace=True)
    await w.pass_seconds(GRACE_SECONDS + ACCESS_SECONDS)
    seconds, _ = w.store.time()
    w.store.hset(f"holdoff:{{{w.name.app}}}", "writes_lost_us", (seconds - 60) * SECOND)
    return one


@pytest.mark.parametrize("rotation", Rotation)
async def test_a_crash_after_it_was_stored(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """Another replica has the access token from the record, and makes no request."""
    async with world(url, keys, tmp_path, rotation) as w:
        await w.refresh()
        assert (await w.refresh("two")).why == "COOLING"
        assert (await w.record()).generation == 2
        assert (await w.secrets())[1]
        assert await w.report() == (1, 0, 0)


@pytest.mark.parametrize("rotation", Rotation)
async def test_two_replicas_sent(rotation: Rotation, url: str, keys: Path, tmp_path: Path) -> None:
    """A replica has an answer that it could not store; another took over and sent too."""
    # A repeat within a grace period is made at once: such providers have no interval.
    has_interval = rotation is not Rotation.GRACE
    async with world(url, keys, tmp_path, rotation, has_interval=has_interval) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying("answered"))
        await w.pass_seconds(TAKEOVER_US / SECOND)
        await w.refresh("two")
        if has_interval:
            await w.pass_seconds(TAKEOVER_US / SECOND + INTERVAL_SECONDS + ACCESS_SECONDS)
            await w.refresh("two")
        record = await w.record()
        repeatable = rotation in (*REPEATABLE, Rotation.GRACE)
        assert await report(w) == ((2, 0, {}) if repeatable else (1, 1, OLD_TOKEN_ONCE))
        if repeatable:
            assert (record.condition, record.generation) == (Condition.READY, 2)
        else:
            assert (record.condition, record.generation) == (Condition.REAUTHORIZE, 1)
        await w.refresher().adopt()
        assert w.spooled() == []
        # The late answer is dropped where another one was stored, and adopted from REAUTHORIZE.
        adopted = await w.record()
        assert (adopted.condition, adopted.generation) == (Condition.READY, 2)
        await w.pass_seconds(INTERVAL_SECONDS + ACCESS_SECONDS)  # no pause of the refusal is left
        await w.refresh("two")
        record = await w.record()
        if rotation is Rotation.SINGLE_USE_REVOKES:  # the repeat revoked the grant
            assert (record.condition, record.generation) == (Condition.REAUTHORIZE, 2)
        else:
            assert (record.condition, record.generation) == (Condition.READY, 3)
        assert "refresh_interval" not in (await report(w))[2]


@pytest.mark.parametrize("rotation", Rotation)
async def test_a_failover_that_lost_an_answer_of_which_no_copy_is_left(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """The old refresh token is tried once, where that cannot revoke the grant."""
    async with world(url, keys, tmp_path, rotation) as w:
        await lose(w)
        waits = await w.refresh("two")
        record = await w.record()
        if rotation is Rotation.SINGLE_USE_REVOKES:
            assert waits == Next(None, "STALE")
            assert await w.report() == (1, 0, 0)
        elif rotation in REPEATABLE:
            assert (record.condition, record.generation) == (Condition.READY, 2)
            assert await w.report() == (2, 0, 0)
        else:
            assert (record.condition, record.generation) == (Condition.REAUTHORIZE, 1)
            assert await report(w) == (1, 1, OLD_TOKEN_ONCE)


@pytest.mark.parametrize("rotation", Rotation)
async def test_a_failover_that_lost_an_answer_of_which_a_replica_has_a_copy(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """The replica stores it again, and the chain continues with the new refresh token."""
    async with world(url, keys, tmp_path, rotation) as w:
        one = await lose(w)
        assert (await w.record()).generation == 1
        await one.restore(w.name.app)
        assert (await w.record()).generation == 2
        await w.pass_seconds(INTERVAL_SECONDS)  # its boot clock was not moved
        await one.refresh(w.name)
        record = await w.record()
        assert (record.condition, record.generation) == (Condition.READY, 3)
        assert await report(w) == (2, 0, {})


async def test_no_proof_after_the_grace_period(url: str, keys: Path, tmp_path: Path) -> None:
    """The token is repeated once, later; it is refused, and a person must authorize."""
    async with world(url, keys, tmp_path, Rotation.GRACE) as w:
        with pytest.raises(CrashError):
            await w.refresh(send=dying("answered"))
        for _ in range(2):
            await w.pass_seconds(GRACE_SECONDS + ACCESS_SECONDS)
            await w.refresh("two")
        record = await w.record()
        assert (record.condition, record.generation) == (Condition.REAUTHORIZE, 1)
        assert await report(w) == (1, 1, OLD_TOKEN_ONCE)


async def test_no_proof_of_a_request_that_was_not_acted_on(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """Within a proven grace period the token is repeated at once."""
    async with world(url, keys, tmp_path, Rotation.GRACE, has_interval=False) as w:
        await w.fault({"fault": "error", "status": 500})
        await w.refresh()
        record = await w.record()
        assert (record.condition, record.generation) == (Condition.READY, 2)
        assert (await report(w))[::2] == (1, {})
