"""Fixtures for every kind of test."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import structlog

# What gRPC's core has to say would stand between pytest's lines. It reads this at its import.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from holdoff import testing
from tests import stores
from tests.stores import Server, Store

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

__all__ = ["Server", "StartValkey"]

# The log of a coordinator in a thread is shown with a test that fails. It is no output of a command
# that a test runs in this process meanwhile, for which `sys.stdout` is another one.
structlog.configure(
    logger_factory=structlog.PrintLoggerFactory(os.fdopen(1, "w", buffering=1, closefd=False))
)

StartValkey = Callable[..., Server]

# A signal that is ignored here (`nohup make test`, `make test &`) would be ignored by all processes
# that tests start. One with a handler has its default action there.
for _signum in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, lambda _signum, _frame: None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while modules are imported, nor later among what they made.

    Each worker would spend half of its start on that.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how to repeat each test that failed, with the seed of this run."""
    seed = config.getoption("--hypothesis-seed", None)
    options = f" --hypothesis-seed {seed}" if seed is not None else ""
    for kind in ("failed", "error"):
        for report in terminalreporter.getreports(kind):
            terminalreporter.write_line(f"repeat it: .venv/bin/pytest{options} '{report.nodeid}'")


@contextlib.contextmanager
def _valkeys() -> Iterator[StartValkey]:
    """Start real Valkey servers with the given options, and end them.

    Each has a Unix socket in a directory of its own, so workers never meet.
    """
    with contextlib.ExitStack() as stack:
        yield lambda *options, **more: Server(
            *stack.enter_context(testing.valkey(*options, **more))
        )


@pytest.fixture
def start_valkey() -> Iterator[StartValkey]:
    """Start Valkey servers that end with the test."""
    with _valkeys() as start:
        yield start


@pytest.fixture(scope="module")
def start_shared_valkey() -> Iterator[StartValkey]:
    """Start Valkey servers that end with the module."""
    with _valkeys() as start:
        yield start


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server | Store]:
    """Give the session's shared Valkey: tests use keys of their own and never flush.

    HOLDOFF_TEST_STORE names another kind of store: embedded, server, cluster or sentinel.
    """
    kind = os.environ.get("HOLDOFF_TEST_STORE", "")
    if not kind:
        with _valkeys() as start:
            yield start()
        return
    with stores.of_kind(kind, tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Store]:
    """Give a Cluster of three primaries, which no test may break."""
    with stores.cluster() as store:
        yield store


@pytest.fixture(scope="session")
def watched_primary() -> Iterator[Store]:
    """Give a primary that Sentinels watch, which no test may break."""
    with stores.watched() as store:
        yield store
