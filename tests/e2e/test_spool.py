"""Reports that survive a coordinator that is away, crashes of those who report, and a full disk.

Every event counts exactly once, as `holdoff budget list` tells.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import wait_until

if TYPE_CHECKING:
    from tests.e2e.service import Service

JOB = """
import os, signal, sys
import holdoff
from holdoff import _calls
from holdoff._reporting import Reporter
from holdoff._spool import Spool

token, when, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = holdoff.Client()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def send(events):
    if when == "before":
        die()
    client.record_events(events)
    if when == "after":
        die()

def event():
    return _calls.error_event(_calls.scope(token, "1", "crm/accounts"), status=400, count=1,
                              job="nightly", age_seconds=0.0, event_id=None)

spool = Spool()
if when == "unsent":
    spool.append(*(event() for _ in range(count)))
    die()
reporter = Reporter(send, spool, warn=lambda text: print(text, file=sys.stderr, flush=True))
if when in ("before", "after"):
    reporter.report(*(event() for _ in range(count)))
else:
    for _ in range(count):
        reporter.report(event())
        print("kept", flush=True)
reporter.close(20)
"""


def start_job(service: Service, token: str, when: str, count: int) -> subprocess.Popen[str]:
    """Start a process that reports errors, and dies when it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", JOB, token, when, str(count)],
        env=service.environment,
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
    flushed = service.holdoff("spool", "flush")
    assert flushed.returncode == 0, flushed.stderr
    return flushed.stdout


@pytest.fixture
def token(own_service: Service) -> str:
    """Give a token."""
    return own_service.create_token(f"t-{uuid.uuid4().hex[:12]}")


@pytest.mark.parametrize("when", ["unsent", "before", "after"])
def test_a_killed_reporter_counts_once(own_service: Service, token: str, when: str) -> None:
    """SIGKILL after the report was kept, before it was sent, or after it was counted.

    Fails when an event is only in memory, or is counted again under another id.
    """
    job = start_job(own_service, token, when, 7)
    job.communicate(timeout=30)
    assert job.returncode == -signal.SIGKILL
    assert len(waiting(own_service)) == 7
    assert used(own_service, token) == (7 if when == "after" else 0)
    assert flush(own_service) == "7 sent\n"
    assert used(own_service, token) == 7
    assert flush(own_service) == "0 sent\n"
    assert waiting(own_service) == []


def test_reports_through_every_crash(own_service: Service, token: str) -> None:
    """Jobs are killed while they report, and the coordinator too: what was kept counts once.

    The one report that was being written may count or not: its job never heard of it.
    """
    dice = random.Random(4711)  # noqa: S311 - no secret
    least = most = 0
    for turn in range(4):
        job = start_job(own_service, token, "steadily", 400)
        assert job.stdout is not None
        lines = dice.randrange(20, 300)
        for _ in range(lines):
            assert job.stdout.readline() == "kept\n"
        if turn % 2:
            own_service.end(signal.SIGKILL)
            own_service.start()
        job.kill()
        rest, _ = job.communicate(timeout=30)
        kept = lines + rest.count("kept\n")
        least, most = least + kept, most + kept + 1
        flush(own_service)
    assert least <= used(own_service, token) <= most
    assert waiting(own_service) == []


def test_a_reporter_outlives_a_coordinator(own_service: Service, token: str) -> None:
    """A job goes on while the coordinator is away; when it is back all is sent, and once.

    Fails when a report waits for the coordinator, or is given up.
    """
    own_service.end(signal.SIGKILL)
    job = start_job(own_service, token, "steadily", 50)
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


def test_record_while_the_coordinator_is_away(own_service: Service, token: str) -> None:
    """The command keeps the report and succeeds; a flush says 69 until the coordinator is back.

    Fails when the report is lost, or a flush that sent nothing succeeds.
    """
    record = ("budget", "record", token, "--division", "1", "--endpoint", "crm/accounts")
    own_service.end(signal.SIGTERM)
    in_vain = own_service.start_holdoff(*record, "--no-spool")
    kept = own_service.holdoff(*record, "--status", "400", "--count", "3")
    assert (kept.returncode, kept.stdout) == (0, ""), kept.stderr
    assert "holdoff spool flush" in kept.stderr
    in_vain.communicate(timeout=40)
    assert in_vain.returncode == 69
    away = own_service.holdoff("spool", "flush")
    assert away.returncode == 69
    assert "1 reports are left" in away.stderr
    own_service.start()
    told = own_service.holdoff(*record, "--status", "400")
    assert (told.returncode, told.stdout) == (0, "counted\n"), told.stderr
    assert used(own_service, token) == 4
    assert flush(own_service) == "0 sent\n"


def test_a_report_of_an_unknown_token_waits(own_service: Service, token: str) -> None:
    """Sent to the wrong coordinator it is not lost; the flush says so, and sends the others.

    Fails when it is dropped, or keeps the others.
    """
    for name in (f"{token}-unknown", token, f"{token}-unknown"):
        start_job(own_service, name, "unsent", 2).communicate(timeout=30)
    flushed = own_service.holdoff("spool", "flush")
    assert (flushed.returncode, flushed.stdout) == (77, "2 sent\n")
    assert "4 reports are left" in flushed.stderr
    assert "holdoff token list" in flushed.stderr
    assert used(own_service, token) == 2
    assert len(waiting(own_service)) == 4


def test_two_that_flush_at_once(own_service: Service, token: str) -> None:
    """They share the files between them: nothing is sent twice, and nothing stays.

    Fails when the lock of a file is not asked, or a file that is gone is taken for one.
    """
    spooled = Path(own_service.environment["XDG_STATE_HOME"], "holdoff", "spool")
    start_job(own_service, token, "unsent", 1).communicate(timeout=30)
    [one] = spooled.iterdir()
    [line] = one.read_text().split()
    start = line.index('"id":"') + 6
    for _ in range(299):
        (spooled / f"{uuid.uuid4().hex}.jsonl").write_text(
            f"{line[:start]}{uuid.uuid4()}{line[start + 36 :]}\n"
        )
    both = [own_service.start_holdoff("spool", "flush") for _ in range(2)]
    sent = [flusher.communicate(timeout=40)[0] for flusher in both]
    assert [flusher.returncode for flusher in both] == [0, 0]
    assert sum(int(text.partition(" ")[0]) for text in sent) == 300
    assert used(own_service, token) == 300
    assert list(spooled.iterdir()) == []


def test_a_full_disk(own_service: Service, token: str, tmp_path: Path) -> None:
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
        pytest.skip("no right to mount in a namespace")
    own_service.environment["XDG_STATE_HOME"] = str(disk)
    command = [*before, sys.executable, "-c", JOB, token, "steadily", "20"]
    job = subprocess.run(
        command,
        env=own_service.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout == "kept\n" * 20
    [complaint] = job.stderr.splitlines()
    assert "No space left on device. Make room, or set XDG_STATE_HOME" in complaint
    assert used(own_service, token) == 20
    own_service.end(signal.SIGTERM)
    record = ("budget", "record", token, "--endpoint", "crm/accounts")
    lost = own_service.holdoff(*record, host=before)
    assert lost.returncode == 69
    assert "could not be kept" in lost.stderr
    assert "--id" in lost.stderr
    own_service.start()


def test_a_killed_writer_lets_go(own_service: Service, token: str) -> None:
    """What a writer holds is sent by others as soon as it is killed, and not before.

    Fails when a file stays locked, or is taken from a writer that lives.
    """
    own_service.end(signal.SIGKILL)
    job = start_job(own_service, token, "steadily", 3)
    wait_until(lambda: len(waiting(own_service)) == 3)
    refused = own_service.holdoff("spool", "flush")
    assert (refused.returncode, refused.stdout) == (0, "0 sent\n")
    assert "3 reports wait in commands that still run" in refused.stderr
    job.kill()
    job.communicate(timeout=20)
    own_service.start()
    assert flush(own_service) == "3 sent\n"
    assert used(own_service, token) == 3
