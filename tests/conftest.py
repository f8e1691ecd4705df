"""Fixtures for every kind of test."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from holdoff import testing


@dataclass(frozen=True, slots=True)
class Server:
    """A running Valkey."""

    url: str
    pid: int


StartValkey = Callable[..., Server]


@pytest.fixture(scope="session")
def start_valkey() -> Iterator[StartValkey]:
    """Start real Valkey servers with the given options; they end with the session.

    Each has a Unix socket in a directory of its own, so workers never meet.
    """
    with contextlib.ExitStack() as stack:
        yield lambda *options, **more: Server(
            *stack.enter_context(testing.valkey(*options, **more))
        )


@pytest.fixture(scope="session")
def valkey(start_valkey: StartValkey) -> Server:
    """Give the session's shared Valkey: tests use keys of their own and never flush."""
    return start_valkey()
