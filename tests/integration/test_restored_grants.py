"""Grants after a restore of the store: no refresh token is sent that may be an old one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from holdoff.simulator import Rotation
from holdoff_coordinator.custody.messages import shown
from holdoff_coordinator.custody.records import TrustGrant, ask, read
from holdoff_coordinator.custody.refreshing import Next
from holdoff_coordinator.custody.rules import Condition
from holdoff_coordinator.restore import after_restore
from tests.custodian import key_directory
from tests.integration.test_refreshing import INTERVAL_SECONDS, World, world

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartValkey


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


async def restored(w: World) -> None:
    """Do what an operator does after a restore; no quarantine remains."""
    await after_restore(w.scripts.redis, 0.001)
    await w.pass_seconds(INTERVAL_SECONDS)
    w.store.hset(f"holdoff:{{{w.name.app}}}", "quarantine_until_us", 0)


@pytest.mark.parametrize("rotation", Rotation)
async def test_a_grant_from_a_backup(
    rotation: Rotation, url: str, keys: Path, tmp_path: Path
) -> None:
    """Where refresh tokens rotate it is not sent before an operator says that it is the newest.

    Fails when it is sent, a replica that knows no newer one ends the doubt, or the doubt is not
    shown before the next refresh.
    """
    async with world(url, keys, tmp_path, rotation) as w:
        one = w.refresher()
        await one.refresh(w.name)
        await restored(w)
        held = await read(w.scripts, w.name)
        assert held is not None
        is_lasting = rotation in {Rotation.NONE, Rotation.REUSABLE}
        said = shown(held, w.policies).record
        assert said.condition is (Condition.READY if is_lasting else Condition.STALE)
        assert is_lasting or said.since_us == held.restored_us > held.record.evidence_us
        waits = await w.refresh("two")
        if is_lasting:
            assert (await w.record()).generation == 3
            return
        assert waits == Next(None, "STALE")
        await one.restore(w.name.app)
        assert (await w.record()).condition is Condition.STALE
        assert await w.refresh("two") == Next(None, "STALE")
        assert await w.report() == (1, 0, 0)
        trusted = await ask(w.scripts, w.name.app, TrustGrant(token=w.name.token))
        assert trusted.status == "OK"
        held = await read(w.scripts, w.name)
        assert held is not None
        assert shown(held, w.policies) is held
        # Replicas that notice the restore only now report the same one.
        await w.scripts.run("quarantine", w.name.app, "the store lost its data", "DATA")
        w.store.hset(f"holdoff:{{{w.name.app}}}", "quarantine_until_us", 0)
        await w.refresh("two")
        record = await w.record()
        assert (record.condition, record.generation) == (Condition.READY, 3)
        assert await w.report() == (2, 0, 0)
        # The next restore is another one.
        await restored(w)
        assert await w.refresh("two") == Next(None, "STALE")


async def test_a_replica_has_a_newer_answer(url: str, keys: Path, tmp_path: Path) -> None:
    """The answer that a replica kept is newer than the backup: it ends the doubt."""
    async with world(url, keys, tmp_path) as w:
        key = f"holdoff:{{{w.name.app}}}:grant:{w.name.token}"
        backup = w.store.dump(key)
        assert backup is not None
        one = w.refresher()
        await one.refresh(w.name)
        newest = await w.secrets()
        w.store.restore(key, 0, backup, replace=True)
        await restored(w)
        assert await w.refresh("two") == Next(None, "STALE")
        await one.restore(w.name.app)
        record = await w.record()
        assert (record.condition, record.generation) == (Condition.READY, 2)
        assert await w.secrets() == newest
        await w.pass_seconds(INTERVAL_SECONDS)
        await w.refresh("two")
        assert (await w.record()).generation == 3
        assert await w.report() == (2, 0, 0)


async def test_a_clock_that_jumped_is_no_restore(url: str, keys: Path, tmp_path: Path) -> None:
    """Nothing of a grant expires, so that a store whose clock jumped has the newest one."""
    async with world(url, keys, tmp_path) as w:
        await w.scripts.run("quarantine", w.name.app, "the clock of the store jumped", "EXPIRED")
        w.store.hset(f"holdoff:{{{w.name.app}}}", "quarantine_until_us", 0)
        await w.refresh()
        assert (await w.record()).generation == 2
