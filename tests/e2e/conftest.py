"""Fixtures of end-to-end tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartValkey


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Give a coordinator process that the tests of a worker share, each with tokens of its own."""
    with Service(tmp_path_factory.mktemp("service")) as one:
        yield one


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """Give a coordinator process that a test may treat roughly."""
    with Service(tmp_path) as one:
        yield one


@pytest.fixture
def two_replicas(tmp_path: Path, start_valkey: StartValkey) -> Iterator[tuple[Service, Service]]:
    """Give two coordinator processes on one store that fsyncs; a test may treat them roughly."""
    url = start_valkey("--appendonly", "yes", "--appendfsync", "always").url
    with Service(tmp_path / "first", url) as first, Service(tmp_path / "second", url) as second:
        yield first, second
