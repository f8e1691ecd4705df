"""Refreshes in quarantine: with evidence they continue, without it they wait."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from holdoff_coordinator.custody.outcomes import boottime_us
from holdoff_coordinator.custody.rules import SECOND, STALE_PRIMARY_US, TAKEOVER_US, Loss
from holdoff_coordinator.custody.sending import Reach, Sending
from tests.custodian import key_directory
from tests.integration.test_refreshing import INTERVAL_SECONDS, World, world
from tests.token_urls import PATIENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdoff_coordinator.custody.refreshing import Refresher
    from tests.conftest import StartValkey


@pytest.fixture(scope="module")
def url(start_shared_valkey: StartValkey) -> str:
    """Give a store of its own: its coordinators share a fingerprint key."""
    return start_shared_valkey().url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with one master key."""
    return key_directory(tmp_path_factory.mktemp("keys"), "first")


async def quarantine(w: World, loss: Loss) -> None:
    """Begin a quarantine, as a script does that finds a loss."""
    why = "NOTHING" if loss is Loss.CLOCK else loss
    await w.scripts.run("quarantine", w.name.app, "a test", why)


def move_quarantine(w: World, seconds: float) -> None:
    """Have it begun earlier; its end stays."""
    shard = f"holdoff:{{{w.name.app}}}"
    for field in ("quarantine_since_us", "writes_lost_us", "data_lost_us", "clock_doubted_us"):
        if int(w.store.hget(shard, field) or 0):
            w.store.hincrby(shard, field, -round(seconds * SECOND))


def replica_of(w: World, passed_us: Callable[[], int]) -> Refresher:
    """Return a replica for whose boot clock some time has passed."""

    class Later(Sending):
        async def send(self, deadline_us: int) -> Any:
            outcome: Any = await super().send(deadline_us - passed_us())
            by_us = passed_us()
            return replace(
                outcome,
                sent_us=outcome.sent_us + by_us,
                last_byte_us=outcome.last_byte_us + by_us,
            )

    return w.refresher(
        "one",
        now_us=lambda: boottime_us() + passed_us(),
        send=partial(Later, reach=Reach(plain_http=True), limits=PATIENT),
    )


@pytest.mark.parametrize("loss", Loss)
async def test_our_own_answer_is_evidence(loss: Loss, url: str, keys: Path, tmp_path: Path) -> None:
    """The replica that received the newest answer continues when the interval is over by its clock.

    Fails when another replica does so too, or this one by the clock of the store.
    """
    passed = 0.0
    async with world(url, keys, tmp_path) as w:
        one = replica_of(w, lambda: round(passed * SECOND))
        assert (await one.refresh(w.name)).why == "COOLING"
        await quarantine(w, loss)
        assert (await one.refresh(w.name)).why == "COOLING"
        await w.pass_seconds(INTERVAL_SECONDS)
        assert (await one.refresh(w.name)).why == "QUARANTINED"
        assert (await w.refresh("two")).why == "QUARANTINED"
        assert (await w.record()).generation == 2
        passed = INTERVAL_SECONDS
        await one.refresh(w.name)
        assert (await w.record()).generation == 3
        assert await w.report() == (2, 0, 0)


async def test_an_intent_that_may_be_lost_is_waited_for(
    url: str, keys: Path, tmp_path: Path
) -> None:
    """Our own answer is no evidence if the store failed over when the next request was due.

    Without evidence it goes on when the last possible request, and the interval, are over.
    """
    passed = 0.0
    async with world(url, keys, tmp_path) as w:
        one = replica_of(w, lambda: round(passed * SECOND))
        await one.refresh(w.name)
        passed = INTERVAL_SECONDS
        await quarantine(w, Loss.WRITES)
        await w.pass_seconds(INTERVAL_SECONDS)
        waits = await one.refresh(w.name)
        assert waits.why == "QUARANTINED"
        assert waits.wait_us is not None
        assert waits.wait_us > (INTERVAL_SECONDS - 60) * SECOND
        move_quarantine(w, (STALE_PRIMARY_US + TAKEOVER_US) / SECOND + INTERVAL_SECONDS)
        await w.refresh("two")
        assert (await w.record()).generation == 3


@pytest.mark.parametrize("loss", Loss)
async def test_copies_are_evidence_after_a_failover(
    loss: Loss, url: str, keys: Path, tmp_path: Path
) -> None:
    """With copies of each intent on servers that may be promoted, any replica continues.

    Fails when that holds after a restore, too, whose data lacks them.
    """
    async with world(url, keys, tmp_path) as w:
        await w.refresh()
        await w.pass_seconds(INTERVAL_SECONDS)
        await quarantine(w, loss)
        waits = await w.refresh("two", is_copied=True)
        goes_on = loss is Loss.WRITES
        assert waits.why == ("COOLING" if goes_on else "QUARANTINED")
        assert await w.report() == (1 + goes_on, 0, 0)


async def test_evidence_is_of_one_quarantine(url: str, keys: Path, tmp_path: Path) -> None:
    """The store gives no right for evidence in a quarantine that is another one by now."""
    async with world(url, keys, tmp_path) as w:
        await w.refresh()
        await w.pass_seconds(INTERVAL_SECONDS)
        await quarantine(w, Loss.WRITES)
        one = w.refresher("one", is_copied=True)
        begin = one._begin

        async def later(*args: object) -> object:
            await quarantine(w, Loss.DATA)
            return await begin(*args)  # type: ignore[arg-type]

        one._begin = later  # type: ignore[method-assign, assignment]
        assert (await one.refresh(w.name)).why == "QUARANTINED"
        assert await w.report() == (1, 0, 0)
