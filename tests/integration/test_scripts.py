"""All scripts, as a server reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import redis

from holdoff_coordinator.scripts import SCRIPTS, source

if TYPE_CHECKING:
    from tests.conftest import StartValkey


def test_all_compile(start_valkey: StartValkey) -> None:
    """Fails when a part has too many local variables, which only those who call it would see."""
    with redis.Redis.from_url(start_valkey().url) as client:
        for name in SCRIPTS:
            client.script_load(source(name))
