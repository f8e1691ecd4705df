"""Fixtures of end-to-end tests."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest

from tests.e2e.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartValkey

_numbers = itertools.count()


@pytest.fixture(scope="session")
def _shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service")) as one:
        yield one


@pytest.fixture(scope="session")
def _sturdy_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("sturdy")) as one:
        yield one


@pytest.fixture
def service(_shared_service: Service, tmp_path: Path) -> Iterator[Service]:
    """Give a coordinator process that a worker's tests share.

    Each test has an app and a state folder of its own; none may end the process.
    """
    with lent(_shared_service, tmp_path):
        yield _shared_service


@pytest.fixture
def own_service(_sturdy_service: Service, tmp_path: Path) -> Iterator[Service]:
    """Give a coordinator process that a test may end and start again, with its data as it was."""
    if not _sturdy_service.runs:  # a test failed
        _sturdy_service.start()
    with lent(_sturdy_service, tmp_path):
        yield _sturdy_service


@contextlib.contextmanager
def lent(service: Service, folder: Path) -> Iterator[None]:
    """Let one test use a coordinator that others use later."""
    environment = dict(service.environment)
    service.environment["XDG_STATE_HOME"] = str(folder / "state")
    service.app = f"apps/e{next(_numbers)}"
    yield
    service.end_commands()
    service.environment = environment


@pytest.fixture
def two_replicas(tmp_path: Path, start_valkey: StartValkey) -> Iterator[tuple[Service, Service]]:
    """Give two coordinator processes on one store that fsyncs; a test may treat them roughly."""
    url = start_valkey("--appendonly", "yes", "--appendfsync", "always").url
    with Service(tmp_path / "first", url) as first, Service(tmp_path / "second", url) as second:
        yield first, second
