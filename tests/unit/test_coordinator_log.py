"""The coordinator's log: harmless on a terminal, and no flood."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import pytest
import structlog

from holdoff_coordinator import commands
from holdoff_coordinator.exits import EX_USAGE, fail

if TYPE_CHECKING:
    from collections.abc import Iterator

EVIL = "\x1b]0;PWNED\x07\x9b2J\u202egnp\u2066\u200b"
OBEYED = {"\x1b]", "\x07", "\x9b", "\u202e", "\u2066", "\u200b"}


@pytest.fixture(params=["console", "json"])
def configured(request: pytest.FixtureRequest) -> Iterator[str]:
    """Configure the log as the coordinator does."""
    before = structlog.get_config()
    commands._configure_logs(request.param)
    yield request.param
    structlog.configure(**before)


def test_a_terminal_is_told_nothing_to_obey(
    configured: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, reasons, keys and exceptions are escaped; a traceback keeps its lines.

    Fails when a text that a caller, the store or a provider chose is logged as it came.
    """
    log = structlog.get_logger()
    event = f"event {EVIL}"
    log.info(event, job=EVIL, **{EVIL: 1})
    try:
        int(EVIL)
    except ValueError:
        log.exception("a fault", reason=[EVIL])
    with pytest.raises(SystemExit):
        fail(EX_USAGE, f"{EVIL}: no such file")
    shown = capsys.readouterr().err
    assert not {one for one in OBEYED if one in shown}, ascii(shown)
    assert shown.count("PWNED") >= 5
    if configured == "console":
        assert "\n  File " in shown


def test_what_libraries_log_with_each_call_is_logged_once_a_minute() -> None:
    """Of many records of one line of a library the first is logged.

    Fails when gRPC's or asyncio's errors are logged as often as a caller can cause them.
    """
    handler = commands._FromLibraries()
    with structlog.testing.capture_logs() as lines:
        for number in range(100):
            try:
                int("x")
            except ValueError:
                error = sys.exc_info()
            for line in (7, 8):
                record = logging.LogRecord(
                    "asyncio", logging.ERROR, "x.py", line, "task %s", (number,), error
                )
                handler.emit(record)
    assert [line["event"] for line in lines] == ["task 0", "task 0"]
