"""What has to happen after a store was restored from a backup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff_coordinator.scripts import Scripts
from holdoff_coordinator.store import mark_restored

if TYPE_CHECKING:
    from holdoff_coordinator.cluster import StoreClient


async def after_restore(store: StoreClient, quarantine_seconds: float) -> dict[str, float]:
    """Hold back new leases until nothing that the backup does not know of can matter any more.

    Coordinators that run see it at once. Those that start before it is over also hold back apps
    that are made anew, since the backup may not have known them.

    Returns:
        For how many seconds, by app.

    Raises:
        StoreError: The store cannot be used.
        Failure: It cannot, or its records are of a newer release.
    """
    await mark_restored(store, quarantine_seconds)
    scripts = Scripts(store, quarantine_us=round(quarantine_seconds * 1e6))
    held_back: dict[str, float] = {}
    for app in await scripts.apps():
        reply = await scripts.run(
            "quarantine", app, "the store was restored from a backup", "RESTORE"
        )
        held_back[app] = (int(reply.values[0]) - reply.now_us) / 1e6
    return held_back
