"""What makes a replica refresh a grant, keep from it, and finish it, against the simulator."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from holdoff_coordinator.custody import duty as duties
from holdoff_coordinator.custody.duty import Duty
from holdoff_coordinator.custody.sending import Reach, Sending
from tests.custodian import key_directory
from tests.integration.test_refreshing import INTERVAL_SECONDS, world
from tests.token_urls import PATIENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import StartValkey


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
