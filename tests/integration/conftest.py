"""Fixtures for tests against real coordinators on a real Valkey."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import stores
from tests.harness import Replica

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from tests.conftest import Server


@pytest.fixture(scope="session")
def replica(valkey: Server) -> Iterator[Replica]:
    """Give a replica that the tests of a worker share, each with apps of its own."""
    with Replica(valkey.url) as one:
        yield one


@pytest.fixture(scope="session")
def second_replica(valkey: Server, replica: Replica) -> Iterator[Replica]:
    """Give another replica on the same store."""
    del replica
    with Replica(valkey.url) as one:
        yield one


@pytest.fixture
def store(valkey: Server) -> Iterator[redis.Redis]:
    """Give a plain client of the store."""
    with stores.client_of(valkey.url) as client:
        yield client
