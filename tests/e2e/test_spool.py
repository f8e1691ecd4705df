"""Reports that survive a coordinator that is away, crashes of those who report, and a full disk.

Every event counts exactly once, as `holdoff budget list` tells.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdoff import _core
from tests.e2e.processes import library_program
from tests.harness import LONG, wait_until

if TYPE_CHECKING:
    from tests.e2e.service import Service

NOBODY = {"HOLDOFF_ENDPOINT": "127.0.0.1:1"}
"""For a process that finds no coordinator."""


def start_job(
    service: Service, token: str, count: int, *, dies: str = "never", **variables: str
) -> subprocess.Popen[str]:
    """Start a process that reports errors, and dies when it is told to."""
    return subprocess.Popen(
        library_program("reporter", token, count, dies),
        env={**service.environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def used(service: Service, token: str) -> int:
    """Return how many errors are counted, in the one scope that the tests use."""
    with service.asked() as client:
        return sum(one.used for one in client.list_budgets(token=token, endpoint="crm/accounts"))


def waiting(service: Service) -> list[Any]:
    """Return what waits on this host."""
    found: list[Any] = service.json("spool", "list")["reports"]
    return found


def flush(service: Service) -> str:
    """Send what was left behind; return what the command said."""
    flushed = service.invoke("spool", "flush")
    assert flushed.exit_code == 0, flushed.stderr
    return flushed.stdout


@pytest.mark.parametrize("when", ["unsent", "before", "after"])
def test_a_killed_reporter_counts_once(service: Service, when: str) -> None:
    """SIGKILL after the report was kept, before it was sent, or after it was counted.

    Fails when an event is only in memory, or is counted again under another id.
    """
    token = service.create_token("t")
    job = start_job(service, token, 7, dies=when)
    job.communicate(timeout=30)
    assert job.returncode == -signal.SIGKILL
    assert len(waiting(service)) == 7
    assert used(service, token) == (7 if when == "after" else 0)
    assert flush(service) == "7 sent\n"
    assert used(service, token) == 7
    assert flush(service) == "0 sent\n"
    assert waiting(service) == []


def test_reports_through_every_crash(own_service: Service) -> None:
    """Jobs are killed while they report, and the coordinator too: what was kept counts once.

    The one report that was being written may count or not: its job never heard of it.
    """
    token = own_service.create_token("t")
    dice = random.Random(4711)  # noqa: S311 - no secret
    most_lines = 300 if LONG else 60
    least = most = 0
    for turn in range(4):
        job = start_job(own_service, token, most_lines + 100)
        assert job.stdout is not None
        lines = dice.randrange(20, most_lines)
        for _ in range(lines):
            assert job.stdout.readline() == "kept\n"
        if turn % 2:
            own_service.end(signal.SIGKILL)
            own_service.start()
        job.kill()
        # Not `communicate`, which knows nothing of what `readline` has read ahead.
        kept = lines + job.stdout.read().count("kept\n")
        job.communicate(timeout=30)
        least, most = least + kept, most + kept + 1
        flush(own_service)
    assert least <= used(own_service, token) <= most
    assert waiting(own_service) == []


def test_a_reporter_outlives_a_coordinator(own_service: Service) -> None:
    """A job goes on while the coordinator is away; when it is back all is sent, and once.

    Fails when a report waits for the coordinator, or is given up.
    """
    token = own_service.create_token("t")
    own_service.end(signal.SIGKILL)
    job = start_job(own_service, token, 50)
    assert job.stdout is not None
    for _ in range(50):
        assert job.stdout.readline() == "kept\n"
    assert {(one["job"], one["live"]) for one in _short(own_service)} == {("nightly", True)}
    own_service.start()
    _, complaints = job.communicate(timeout=30)
    assert (job.returncode, complaints) == (0, "")
    assert used(own_service, token) == 50
    assert waiting(own_service) == []


def _short(service: Service) -> list[dict[str, Any]]:
    return [{"job": one["holder"]["job"], "live": one["writer_runs"]} for one in waiting(service)]


def test_record_while_the_coordinator_is_away(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command keeps the report and succeeds; a flush says 69 until the coordinator is back.

    Fails when the report is lost, or a flush that sent nothing succeeds.
    """
    monkeypatch.setattr(_core, "REPORT_SECONDS", 0.5)
    token = service.create_token("t")
    record = ("budget", "record", token, "--division", "1", "--endpoint", "crm/accounts")
    in_vain = service.invoke(*record, "--no-spool", **NOBODY)
    assert in_vain.exit_code == 69
    kept = service.invoke(*record, "--status", "400", "--count", "3", **NOBODY)
    assert (kept.exit_code, kept.stdout) == (0, ""), kept.stderr
    assert "holdoff spool flush" in kept.stderr
    away = service.invoke("spool", "flush", **NOBODY)
    assert away.exit_code == 69
    assert "1 reports stay stored" in away.stderr
    told = service.invoke(*record, "--status", "400")
    assert (told.exit_code, told.stdout) == (0, "counted\n"), told.stderr
    assert used(service, token) == 4
    assert flush(service) == "0 sent\n"


def test_a_report_of_an_unknown_token_waits(service: Service) -> None:
    """Sent to the wrong coordinator it is not lost; the flush says so, and sends the others.

    Fails when it is dropped, or keeps the others.
    """
    token = service.create_token("t")
    for name in (f"{token}-unknown", token, f"{token}-unknown"):
        start_job(service, name, 2, dies="unsent").communicate(timeout=30)
    flushed = service.invoke("spool", "flush")
    assert (flushed.exit_code, flushed.stdout) == (77, "2 sent\n")
    assert "4 reports stay stored" in flushed.stderr
    assert "holdoff token list" in flushed.stderr
    assert used(service, token) == 2
    assert len(waiting(service)) == 4


def test_two_that_flush_at_once(service: Service) -> None:
    """They share the files between them: nothing is sent twice, and nothing stays.

    Fails when the lock of a file is not asked, or a file that is gone is taken for one.
    """
    token = service.create_token("t")
    spooled = Path(service.environment["XDG_STATE_HOME"], "holdoff", "spool")
    start_job(service, token, 1, dies="unsent").communicate(timeout=30)
    [one] = spooled.iterdir()
    [line] = one.read_text().split()
    start = line.index('"id":"') + 6
    for _ in range(299):
        (spooled / f"{uuid.uuid4().hex}.jsonl").write_text(
            f"{line[:start]}{uuid.uuid4()}{line[start + 36 :]}\n"
        )
    both = [service.start_holdoff("spool", "flush") for _ in range(2)]
    sent = [flusher.communicate(timeout=40)[0] for flusher in both]
    assert [flusher.returncode for flusher in both] == [0, 0]
    assert sum(int(text.partition(" ")[0]) for text in sent) == 300
    assert used(service, token) == 300
    assert list(spooled.iterdir()) == []


def test_a_full_disk(service: Service, tmp_path: Path) -> None:
    """Where the disk is full, reports are sent all the same; one that cannot be is said.

    Fails when a report is given up because it cannot be kept.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={4 * os.sysconf('SC_PAGE_SIZE')} none {disk}"
    fill = f"mkdir -p {disk}/holdoff/spool; cat /dev/zero > {disk}/full 2>/dev/null"
    before = [
        *("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",))),
        *("sh", "-c", f'{mount} && {{ {fill}; exec "$@"; }}', "sh"),
    ]
    if subprocess.run([*before, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this process may not mount in a namespace of its own")
    token = service.create_token("t")
    service.environment["XDG_STATE_HOME"] = str(disk)
    record = ("budget", "record", token, "--endpoint", "crm/accounts")
    lost = service.start_holdoff(*record, host=before, env={**service.environment, **NOBODY})
    job = subprocess.run(
        [*before, *library_program("reporter", token, 20, "never")],
        env=service.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout == "kept\n" * 20
    [complaint] = job.stderr.splitlines()
    assert "No space left on device. Free space, or set XDG_STATE_HOME" in complaint
    assert used(service, token) == 20
    _, said = lost.communicate(timeout=30)
    assert lost.returncode == 69
    assert "could not be stored" in said
    assert "--id" in said


def test_a_killed_writer_lets_go(service: Service) -> None:
    """What a writer holds is sent by others as soon as it is killed, and not before.

    Fails when a file stays locked, or is taken from a writer that lives.
    """
    token = service.create_token("t")
    job = start_job(service, token, 3, **NOBODY)
    wait_until(lambda: len(waiting(service)) == 3)
    refused = service.invoke("spool", "flush")
    assert (refused.exit_code, refused.stdout) == (0, "0 sent\n")
    assert "3 reports belong to commands that still run" in refused.stderr
    job.kill()
    job.communicate(timeout=30)
    assert flush(service) == "3 sent\n"
    assert used(service, token) == 3
