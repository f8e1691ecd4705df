"""Reports on disk: what survives, what is bounded, and what a stranger's file may do."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from holdoff import _reporting, _spool
from holdoff._reporting import Flushed, Reporter, flush_leftovers
from holdoff._spool import Moment, Spool, SpoolError, Waiting
from holdoff.cli import main
from holdoff.errors import (
    EventTooOld,
    HoldoffError,
    InvalidField,
    LimitReached,
    NotAllowed,
    TimedOut,
    TokenNotFound,
    TooManyEvents,
    Unavailable,
    UnexpectedError,
)
from holdoff.v1 import budget_pb2
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOKEN = "apps/exact-nl/tokens/finance"
SECOND = 10**9
DAY = 24 * 3600


def an_event(endpoint: str = "crm/accounts", **fields: Any) -> budget_pb2.Event:
    """An error."""
    scope = budget_pb2.Scope(token=fields.pop("token", TOKEN), division="1", endpoint=endpoint)
    defaults = {"kind": budget_pb2.EVENT_KIND_ERROR, "count": 1, "status": 400}
    return budget_pb2.Event(id=str(uuid.uuid4()), scope=scope, **(defaults | fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where reports wait; it is not there yet."""
    return tmp_path / "state" / "holdoff" / "spool"


@pytest.fixture
def spool(folder: Path) -> Iterator[Spool]:
    """A spool, closed after the test."""
    with closing(Spool(folder)) as one:
        yield one


def left_behind(folder: Path, *events: budget_pb2.Event) -> Path:
    """Leave events behind, as a process does that was killed; return their file."""
    before = set(folder.glob("*.jsonl"))
    with closing(Spool(folder)) as writer:
        writer.append(*events)
    [path] = set(folder.glob("*.jsonl")) - before
    return path


def found(folder: Path) -> tuple[list[str], list[str]]:
    """Return the ids of the events that were left behind, and the warnings about them."""
    warnings: list[str] = []
    waiting = [one for one, _ in Spool(folder).survey(warnings.append)]
    return [one.event.id for one in waiting], warnings


class Coordinator:
    """Takes events, and counts each once; it can be away, and refuse some."""

    def __init__(self) -> None:
        self.calls: list[list[budget_pb2.Event]] = []
        self.counted: dict[str, budget_pb2.Event] = {}
        self.error: Exception | None = None
        self.refusals: dict[str, HoldoffError] = {}

    def send(self, events: Sequence[budget_pb2.Event]) -> None:
        """Take events, all or none."""
        self.calls.append(list(events))
        if self.error:
            raise self.error
        for event in events:
            if event.id in self.refusals:
                raise self.refusals[event.id]
        for event in events:
            self.counted.setdefault(event.id, event)


@pytest.fixture
def coordinator() -> Coordinator:
    """A coordinator that is there."""
    return Coordinator()


# On disk


def test_only_its_owner_may_read_it(spool: Spool, folder: Path) -> None:
    """Folders and files are for their owner alone. Fails when the modes are left to the umask."""
    before = os.umask(0)
    try:
        spool.append(an_event())
    finally:
        os.umask(before)
    [path] = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for one in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(one.stat().st_mode) == 0o700


def test_it_is_on_disk_when_append_returns(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File and folder are fsynced before `append` returns. Fails without either fsync."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    spool.append(an_event())
    [path] = folder.iterdir()
    assert {str(path), str(folder), str(folder.parent)} <= set(synced)
    synced.clear()
    spool.append(an_event())
    assert synced == [str(path)]


def test_what_is_done_is_gone(spool: Spool, folder: Path) -> None:
    """What is done is not read again, and with the last of it the file goes.

    Fails when what is done is not marked, or an empty file stays.
    """
    events = [an_event(), an_event(), an_event()]
    spool.append(*events)
    spool.done([events[1].id])
    assert found(folder)[0] == [events[0].id, events[2].id]
    spool.done([events[0].id, events[2].id])
    assert found(folder) == ([], [])
    spool.append(late := an_event())
    assert found(folder)[0] == [late.id]
    spool.done([late.id])
    spool.close()
    assert list(folder.iterdir()) == []


def test_a_closed_spool_takes_more(spool: Spool, folder: Path) -> None:
    """A report that comes too late waits too, in another file."""
    spool.append(an_event())
    assert spool.close() == (1, 0)
    spool.append(an_event())
    assert len(found(folder)[0]) == 2
    assert spool.waiting()[0].event.id in found(folder)[0]


def test_nothing_but_the_event_is_written(spool: Spool, folder: Path) -> None:
    """A URL loses its query and its user before it is written: they may be secrets.

    Fails when an endpoint is written as it came.
    """
    url = "https://me:sw0rdf1sh@start.exactonline.nl/api/v1/1/crm/Accounts(guid'1')?token=sw0rdf1sh"
    spool.append(an_event(url))
    spool.hold(an_event(url + "#sw0rdf1sh"))
    [path] = folder.iterdir()
    assert "sw0rdf1sh" not in path.read_text()
    for one in spool.waiting():
        assert one.event.scope.endpoint == (
            "https://start.exactonline.nl/api/v1/1/crm/Accounts(guid'1')"
        )
    [document] = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert document.keys() == {"event", "boot", "boot_ns", "wall_ns"}


def test_the_division_of_a_query_is_written(spool: Spool, folder: Path) -> None:
    """Of a query it alone is kept. Fails when it is lost, or anything else is written."""
    spool.append(an_event("/docs/XMLUpload.aspx?token=sw0rdf1sh&Division=7&x=1"))
    [path] = folder.iterdir()
    assert "sw0rdf1sh" not in path.read_text()
    [one] = spool.waiting()
    assert one.event.scope.endpoint == "/docs/XMLUpload.aspx?Division=7"


@pytest.mark.parametrize("cut", [1, 2, 40, 150])
def test_a_torn_line_costs_itself_alone(folder: Path, cut: int) -> None:
    """A last line that was cut off anywhere is left out, without a word; the others are there.

    Fails when the reader stops at it, or takes a part for the whole.
    """
    first, second = an_event(), an_event()
    path = left_behind(folder, first, second)
    path.write_bytes(path.read_bytes()[:-cut])
    assert found(folder) == ([first.id], [])


def test_a_torn_line_does_not_harm_the_next(spool: Spool, folder: Path) -> None:
    """What is written after a line that was cut off, by a full disk, is read.

    Fails when a line does not begin with a newline.
    """
    spool.append(first := an_event())
    [path] = folder.iterdir()
    with path.open("ab") as file:
        file.write(b'\n{"event":{"id":"')
    spool.append(second := an_event())
    ids, warnings = found(folder)
    assert ids == [first.id, second.id]
    assert warnings == []  # of a file whose writer lives, and may be in the middle of a line


def test_a_file_that_is_mostly_done_is_written_anew(spool: Spool, folder: Path) -> None:
    """A file does not grow for ever under a writer that always has something waiting.

    Fails when it is never written anew.
    """
    spool.append(first := an_event())
    for _ in range(40):
        events = [an_event("x" * 200) for _ in range(100)]
        spool.append(*events)
        spool.done([event.id for event in events])
    [path] = folder.iterdir()
    assert path.stat().st_size < 2 * _spool._MOST_LINE
    assert found(folder)[0] == [first.id]
    assert [live for _, live in Spool(folder).survey(print)] == [True]
    spool.close()
    assert [live for _, live in Spool(folder).survey(print)] == [False]


# Time


def test_age_is_worked_out_when_it_is_sent(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a boot the clock that never steps decides, whatever the wall clock did.

    Fails when the age is the one of the report, or is told from the wall clock.
    """
    event = an_event()
    event.age.FromMilliseconds(500)
    event.sent_age.FromMilliseconds(700)
    spool.append(event)
    then = Moment.now()
    monkeypatch.setattr(_spool, "boottime_ns", lambda: then.boot_ns + 90 * SECOND)
    monkeypatch.setattr(time, "time_ns", lambda: then.wall_ns - 3600 * SECOND)
    [waiting] = spool.waiting()
    due = waiting.due(Moment.now())
    assert due.age.ToSeconds() == 90
    assert due.sent_age.ToNanoseconds() - due.age.ToNanoseconds() == SECOND // 5
    assert waiting.event.age.ToMilliseconds() == 500
    assert not waiting.due(Moment.now()).HasField("retry_after")


@pytest.mark.parametrize(("step_seconds", "age_seconds"), [(7200, 7200), (-7200, 0)])
def test_after_a_reboot_the_wall_clock_decides(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: int, age_seconds: int
) -> None:
    """The boot clock began anew; a wall clock that went back makes nothing negative.

    Fails when the boots are not told apart.
    """
    event = an_event()
    left_behind(folder, event)
    wall_ns = Moment.now().wall_ns + step_seconds * SECOND
    monkeypatch.setattr(_spool, "_boot_id", lambda: "another")
    monkeypatch.setattr(_spool, "boottime_ns", lambda: 5 * SECOND)
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns)
    [(waiting, _)] = Spool(folder).survey(print)
    due = waiting.due(Moment.now())
    assert due.age.ToSeconds() == age_seconds
    assert not due.HasField("sent_age")


# What a stranger left there


def test_strange_files_are_skipped(folder: Path, coordinator: Coordinator) -> None:
    """What is no file of ours costs a warning, blocks nobody, and is left as it is.

    Fails when a pipe is read, or a link followed.
    """
    event = an_event()
    target = left_behind(folder, event)
    outside = folder.parent / "outside"
    outside.write_bytes(target.read_bytes().replace(event.id.encode(), str(uuid.uuid4()).encode()))
    (folder / "a-link.jsonl").symlink_to(outside)
    os.mkfifo(folder / "a-pipe.jsonl")
    (folder / "a-folder.jsonl").mkdir()
    with (folder / "huge.jsonl").open("wb") as huge:
        huge.truncate(4 * _spool.MOST_BYTES)
    (folder / "README").write_text("not ours, and nobody's business")
    warnings: list[str] = []
    flushed = flush_leftovers(Spool(folder), coordinator.send, warn=warnings.append)
    assert (flushed.sent, flushed.dropped, flushed.error) == (1, 0, None)
    assert list(coordinator.counted) == [event.id]
    assert sorted(warning.split("/")[-1] for warning in warnings) == [
        "a-folder.jsonl is skipped: Is a directory",
        "a-link.jsonl is skipped: it is a link",
        "a-pipe.jsonl is skipped: it is not a file",
        "huge.jsonl is skipped: it is too large to be ours",
    ]
    assert len(list(folder.iterdir())) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user(folder: Path, spool: Spool, coordinator: Coordinator) -> None:
    """What another user wrote is not sent in our name; in another's folder nothing is kept.

    Fails when the owner is not looked at.
    """
    path = left_behind(folder, an_event())
    os.chown(path, 4711, 4711)
    warnings: list[str] = []
    assert flush_leftovers(Spool(folder), coordinator.send, warn=warnings.append).sent == 0
    assert warnings == [f"{path} is skipped: it belongs to another user"]
    os.chown(folder, 4711, 4711)
    with pytest.raises(SpoolError, match=r"belongs to another user.*XDG_STATE_HOME"):
        spool.append(an_event())


GARBAGE = [
    b"\x00\xff\xfe",
    b"[" * 100_000,
    b'{"event":{"id":"' + b"x" * (2 * _spool._MOST_LINE) + b'"},"boot":"","boot_ns":1,"wall_ns":1}',
    b"{}",
    b"null",
    b'{"done":[[]]}',
    b'{"event":{},"boot":"b","boot_ns":1,"wall_ns":1}',
    b'{"event":{"id":7},"boot":"b","boot_ns":1,"wall_ns":1}',
    b'{"event":{"id":"a","age":"-5s"},"boot":"b","boot_ns":1,"wall_ns":1}',
    b'{"event":{"id":"a","age":"300000000000s"},"boot":"b","boot_ns":1,"wall_ns":1}',
    b'{"event":{"id":"a"},"boot":"b","boot_ns":-1,"wall_ns":1}',
    b'{"event":{"id":"a"},"boot":"b","boot_ns":1,"wall_ns":1' + b"0" * 5000 + b"}",
]


def test_garbage_between_events(folder: Path, coordinator: Coordinator) -> None:
    """Damaged lines cost themselves alone; the file is set aside, and nobody is asked again.

    Fails when one of them ends the reading, or the file goes with what it held.
    """
    events = [an_event() for _ in range(len(GARBAGE) + 1)]
    path = left_behind(folder, *events)
    lines = path.read_bytes().split(b"\n\n")
    mixed = [line for pair in zip(lines, [*GARBAGE, b""], strict=True) for line in pair]
    path.write_bytes(b"\n".join(mixed))
    warnings: list[str] = []
    flushed = flush_leftovers(Spool(folder), coordinator.send, warn=warnings.append)
    assert flushed.sent == len(events)
    [warning] = warnings
    assert f"{len(GARBAGE)} damaged lines" in warning
    assert [one.suffix for one in folder.iterdir()] == [".damaged"]
    assert found(folder) == ([], [])


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["id", "kind", "scope", "count", "age", "holder", "labels", "token"]),
        inner,
        max_size=4,
    ),
    max_leaves=9,
))  # fmt: skip
def test_any_line_is_an_event_or_an_error(content: Any) -> None:
    """Whatever stands in a line, reading it gives something that can be sent, or a ValueError."""
    if not isinstance(content, bytes):
        document = {"event": content, "boot": "b", "boot_ns": 1, "wall_ns": 1}
        content = json.dumps(document).encode()
    try:
        read = _spool._parse(content)
    except ValueError:
        return
    if isinstance(read, Waiting):
        assert read.due(Moment.now()).id


# Where there is no room


def test_a_full_disk_is_said(spool: Spool, folder: Path) -> None:
    """Where no file may grow, `append` says what to do; what was there before stays.

    Fails when a write that came to nothing is taken for one.
    """
    spool.append(first := an_event())
    [path] = folder.iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(SpoolError, match=r"File too large.*Free space, or set XDG_STATE_HOME"):
            spool.append(an_event())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    spool.append(third := an_event())
    assert found(folder)[0] == [first.id, third.id]
    assert [one.event.id for one in spool.waiting()] == [first.id, third.id]


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory is told so; nothing else fails."""
    monkeypatch.setattr(_spool, "state_folder", lambda: (_ for _ in ()).throw(RuntimeError))
    spool = Spool()
    with pytest.raises(SpoolError, match=r"no home directory.*XDG_STATE_HOME"):
        spool.append(an_event())
    assert list(spool.survey(print)) == []
    assert flush_leftovers(spool, print).sent == 0


@pytest.mark.parametrize("bound", [{"MOST_EVENTS": 3}, {"MOST_BYTES": 900}])
def test_more_than_may_wait_are_merged(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch, bound: dict[str, int]
) -> None:
    """At the bound events are counted in with their like, at the later time; others are refused.

    Fails when one is lost, or is counted in with one of another endpoint or status.
    """
    [(name, most)] = bound.items()
    monkeypatch.setattr(_spool, name, most)
    events = [an_event("a"), an_event("b"), an_event("a", status=401)]
    spool.append(*events)
    old = an_event("a", count=4)
    old.age.FromSeconds(600)
    for _ in range(2):
        spool.append(an_event("a"), an_event("b", count=2), old)
    for stranger in (an_event("c"), an_event("a", status=403), an_event("b", count=10_000)):
        with pytest.raises(SpoolError, match="holdoff spool flush"):
            spool.append(stranger)
    spool.close()
    left = [one for one, _ in Spool(folder).survey(print)]
    assert [(one.event.id, one.event.count) for one in left] == [
        (events[0].id, 11),
        (events[1].id, 5),
        (events[2].id, 1),
    ]
    assert all(one.age_ns(Moment.now()) < 60 * SECOND for one in left)


def test_blocks_that_are_merged_keep_their_proof(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of a lease belongs to the id of one event, and stays with it."""
    monkeypatch.setattr(_spool, "MOST_EVENTS", 1)
    block = budget_pb2.EVENT_KIND_BLOCK
    spool.append(first := an_event(kind=block, lease_proof="first"))
    spool.append(an_event(kind=block, lease_proof="second"))
    spool.close()
    left = [one.event for one, _ in Spool(folder).survey(print)]
    assert [(one.id, one.lease_proof) for one in left] == [(first.id, "first")]


def test_what_was_sent_is_not_merged_into(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that may have been counted is as it is: more in it would never count.

    Fails when what is under way may still be counted in with.
    """
    monkeypatch.setattr(_spool, "MOST_EVENTS", 1)
    spool.append(event := an_event())
    assert [one.event.id for one in spool.begin([event.id])] == [event.id]
    with pytest.raises(SpoolError, match="too many reports"):
        spool.append(an_event())


def test_other_writers_files_count(folder: Path, spool: Spool) -> None:
    """The bound is one of the folder. Fails when each writer has it for itself."""
    path = left_behind(folder, an_event())
    with path.open("r+b") as file:
        file.truncate(_spool.MOST_BYTES)
    with pytest.raises(SpoolError, match="too many reports"):
        spool.append(an_event())


# Reporting


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat at once."""
    monkeypatch.setattr(_reporting, "retry_delay_seconds", lambda _: 0.01)
    monkeypatch.setattr(_reporting, "_LATER_SECONDS", 0.01)


def test_reports_arrive(spool: Spool, folder: Path, coordinator: Coordinator) -> None:
    """They are sent at once, in batches of a token, and leave the disk."""
    reporter = Reporter(coordinator.send, spool, warn=pytest.fail)
    events = [an_event(token=f"apps/app-{n % 2}/tokens/t") for n in range(250)]
    reporter.report(*events)
    wait_until(lambda: len(coordinator.counted) == 250)
    reporter.report(late := an_event())
    wait_until(lambda: late.id in coordinator.counted)
    assert reporter.close(5) == 0
    assert list(folder.iterdir()) == []
    for call in coordinator.calls:
        assert len(call) <= 100
        assert len({event.scope.token for event in call}) == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "error",
    [
        Unavailable("away"),
        LimitReached("many"),
        TooManyEvents("full"),
        HoldoffError("what?"),
        ValueError("shut"),
    ],
)
def test_reports_outlast_what_passes(
    spool: Spool, coordinator: Coordinator, error: Exception
) -> None:
    """While the coordinator is away, or has no room, they are kept and sent later.

    Fails when any such error takes events out.
    """
    coordinator.error = error
    reporter = Reporter(coordinator.send, spool, warn=pytest.fail)
    reporter.report(event := an_event())
    wait_until(lambda: len(coordinator.calls) > 3)
    coordinator.error = None
    wait_until(lambda: event.id in coordinator.counted)
    assert reporter.close(5) == 0


@pytest.mark.parametrize(("kind", "is_kept"), [(InvalidField, True), (EventTooOld, False)])
def test_a_bad_report_keeps_no_other(
    spool: Spool, coordinator: Coordinator, kind: type[HoldoffError], *, is_kept: bool
) -> None:
    """What the coordinator refuses for good is taken out of its batch, with one warning.

    What is wrong is set aside, and what is too old can never count. Fails when the batch goes with
    it, or comes again and again.
    """
    warnings: list[str] = []
    events = [an_event() for _ in range(100)]
    for bad in (events[0], events[41], events[42]):
        coordinator.refusals[bad.id] = kind("events.status: no")
    reporter = Reporter(coordinator.send, spool, warn=warnings.append)
    reporter.report(*events)
    wait_until(lambda: not spool.waiting())
    assert reporter.close(5) == 0
    assert len(coordinator.counted) == 97
    [warning] = warnings
    assert "events.status: no" in warning
    assert TOKEN in warning
    assert ("holdoff spool retry" in warning) == is_kept
    aside = {one.event.id for one, _ in spool.survey_aside(pytest.fail)}
    assert aside == ({events[0].id, events[41].id, events[42].id} if is_kept else set())


FAILURES = [UnexpectedError("broken"), TimedOut("no answer")]


@pytest.mark.parametrize("error", FAILURES)
def test_a_report_that_fails_again_and_again_is_set_aside(
    folder: Path, coordinator: Coordinator, error: HoldoffError
) -> None:
    """It blocks nothing, also across runs of `holdoff`, and is reported once with its file.

    Fails when reports behind it wait, when failures are forgotten with the process, or when the
    report is dropped.
    """
    first, bad, last = an_event(), an_event(), an_event(token="apps/other/tokens/t")
    coordinator.refusals[bad.id] = error
    left_behind(folder, first, bad, last)
    left_behind(folder, behind := an_event())
    warnings: list[str] = []

    def flush() -> Flushed:
        return flush_leftovers(
            Spool(folder), coordinator.send, warn=warnings.append, probe=lambda: None
        )

    assert (flush().sent, set(coordinator.counted)) == (2, {last.id, behind.id})
    assert (flush().sent, warnings) == (1, [])
    third = flush()
    assert (third.sent, third.dropped, third.set_aside) == (0, 0, 1)
    assert set(coordinator.counted) == {first.id, last.id, behind.id}
    [path] = folder.iterdir()
    [warning] = warnings
    assert f"is set aside in {path}" in warning
    assert warning.endswith(
        f"{error}; when the cause is fixed, send it again with: holdoff spool retry"
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert flush() == Flushed(0, 0, 0, None)
    assert [(one.event, one.reason) for one, _ in Spool(folder).survey_aside(pytest.fail)] == [
        (bad, str(error))
    ]
    coordinator.refusals.clear()
    Spool(folder).take_back(pytest.fail)
    assert (flush().sent, list(folder.iterdir())) == (1, [])
    assert bad.id in coordinator.counted


@pytest.mark.parametrize("answers_first", [True, False])
def test_a_coordinator_that_is_away_fails_no_report(
    folder: Path, coordinator: Coordinator, *, answers_first: bool
) -> None:
    """However often it gives no answer, a report waits until it answers something.

    Fails when a report is blamed without a probe.
    """
    left_behind(folder, an_event(), an_event())
    coordinator.error = TimedOut("no answer")

    def probe() -> None:
        if not coordinator.calls or not answers_first:
            raise Unavailable("away")
        raise coordinator.error or AssertionError

    for _ in range(9):
        flushed = flush_leftovers(Spool(folder), coordinator.send, warn=pytest.fail, probe=probe)
        assert (flushed.sent, flushed.set_aside) == (0, 0)
    assert len(coordinator.calls) == 1
    coordinator.error = None
    assert flush_leftovers(Spool(folder), coordinator.send, probe=lambda: None).sent == 2


def test_any_answer_to_the_probe_is_one(folder: Path, coordinator: Coordinator) -> None:
    """Fails when a caller that may not list policies never sets a report aside."""
    left_behind(folder, bad := an_event())
    coordinator.refusals[bad.id] = TimedOut("no answer")

    def probe() -> None:
        raise NotAllowed("no role")

    flushed = [
        flush_leftovers(Spool(folder), coordinator.send, warn=lambda _: None, probe=probe)
        for _ in range(3)
    ]
    assert [one.set_aside for one in flushed] == [0, 0, 1]


@pytest.mark.usefixtures("quick")
def test_a_run_sets_its_own_reports_aside(
    spool: Spool, folder: Path, coordinator: Coordinator
) -> None:
    """Fails when a report that breaks the coordinator is sent for as long as the run lasts."""
    warnings: list[str] = []
    bad = an_event()
    coordinator.refusals[bad.id] = UnexpectedError("broken")
    reporter = Reporter(coordinator.send, spool, warn=warnings.append)
    reporter.report(bad, good := an_event())
    wait_until(lambda: warnings)
    assert good.id in coordinator.counted
    assert reporter.close(5) == 0
    assert [path.suffix for path in folder.iterdir()] == [".aside"]


def test_what_is_set_aside_is_bounded(
    spool: Spool, folder: Path, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when reports that are never right fill the disk."""
    monkeypatch.setattr(_spool, "MOST_ASIDE_BYTES", 300)
    events = [an_event() for _ in range(9)]
    coordinator.refusals |= {event.id: InvalidField("no") for event in events}
    spool.append(*events)
    spool.close()
    flushed = flush_leftovers(Spool(folder), coordinator.send, warn=lambda _: None)
    assert (flushed.set_aside + flushed.dropped, flushed.set_aside in (1, 2)) == (9, True)


def test_an_unknown_token_is_told_once(spool: Spool, coordinator: Coordinator) -> None:
    """A batch is of one token, so that a token that is unknown costs one call.

    Fails when each of a hundred is asked for by itself.
    """
    warnings: list[str] = []
    coordinator.error = TokenNotFound(f"no token {TOKEN}")
    reporter = Reporter(coordinator.send, spool, warn=warnings.append)
    reporter.report(*(an_event() for _ in range(100)))
    assert reporter.close(5) == 0
    assert len(coordinator.calls) == 1
    assert len(warnings) == 1


def test_what_is_too_old_is_not_asked_for(
    spool: Spool, folder: Path, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is more than a day old is dropped, with one warning; what is not is sent.

    Fails when thousands of old events are halved down to one, or a day is not a day.
    """
    boot_ns = Moment.now().boot_ns
    spool.append(*(an_event() for _ in range(99)))
    monkeypatch.setattr(_spool, "boottime_ns", lambda: boot_ns + 60 * SECOND)
    spool.append(young := an_event())
    spool.close()
    monkeypatch.setattr(_spool, "boottime_ns", lambda: boot_ns + (DAY + 30) * SECOND)
    warnings: list[str] = []
    flushed = flush_leftovers(Spool(folder), coordinator.send, warn=warnings.append)
    assert (flushed.sent, flushed.dropped, flushed.error) == (1, 99, None)
    assert [[event.id for event in call] for call in coordinator.calls] == [[young.id]]
    [warning] = warnings
    assert warning.endswith("it happened more than a day ago")


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_sent_is_left_on_disk(
    spool: Spool, folder: Path, coordinator: Coordinator
) -> None:
    """`close` tries for as long as it may, says how many are left, and leaves them to others.

    Fails when they go with the reporter, or stay locked.
    """
    warnings: list[str] = []
    coordinator.error = Unavailable("away")
    reporter = Reporter(coordinator.send, spool, warn=warnings.append)
    reporter.report(an_event(), an_event())
    assert reporter.close(0.2) == 2
    assert [warning.split(" and are kept")[0] for warning in warnings] == [
        "2 reports could not be sent"
    ]
    coordinator.error = None
    assert flush_leftovers(Spool(folder), coordinator.send).sent == 2
    assert list(folder.iterdir()) == []


def test_close_does_not_wait_for_a_mute_coordinator(spool: Spool, folder: Path) -> None:
    """A call that never ends holds up nobody. Fails when `close` waits for its thread."""
    mute, called = threading.Event(), threading.Event()

    def send(_: object) -> None:
        called.set()
        mute.wait(30)

    reporter = Reporter(send, spool, warn=lambda _: None)
    reporter.report(an_event())
    assert called.wait(20)
    assert reporter.close(0.05) == 1
    assert len(found(folder)[0]) == 1
    mute.set()


def no_space(*_: object) -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("quick")
def test_without_a_disk_reports_are_sent(
    spool: Spool, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report is better than none: it is sent though it could not be stored, with one warning.

    Fails when a report is given up with the disk, or each one is warned about.
    """
    warnings: list[str] = []
    monkeypatch.setattr(os, "write", no_space)
    reporter = Reporter(coordinator.send, spool, warn=warnings.append)
    events = [an_event(), an_event()]
    for event in events:
        reporter.report(event)
        wait_until(lambda event=event: event.id in coordinator.counted)  # type: ignore[misc]
    [warning] = warnings
    assert "No space left on device. Free space" in warning
    coordinator.error = Unavailable("away")
    reporter.report(an_event())
    assert reporter.close(0.1) == 0
    assert warnings[1:] == ["1 reports could be neither sent nor stored, and are lost"]


# What others left behind


def test_what_a_living_writer_has_is_left_to_it(
    spool: Spool, folder: Path, coordinator: Coordinator
) -> None:
    """Only what nobody holds is sent. Fails when the lock is not asked."""
    spool.append(an_event())
    left_behind(folder, event := an_event())
    assert flush_leftovers(Spool(folder), coordinator.send).sent == 1
    assert list(coordinator.counted) == [event.id]
    assert len(found(folder)[0]) == 1


def test_a_child_does_not_hold_the_file(
    spool: Spool, folder: Path, coordinator: Coordinator
) -> None:
    """A file that a child process has open still, by inheritance, is free once it is closed.

    Fails when the lock is left to the closing of the file.
    """
    spool.append(an_event())
    assert spool._file
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[spool._file._fd]
    ) as child:
        spool.close()
        assert flush_leftovers(Spool(folder), coordinator.send).sent == 1
        child.communicate(b"\n", timeout=20)


def test_two_flushers_share(folder: Path, coordinator: Coordinator) -> None:
    """While one sends a file, another one leaves it alone and takes the next.

    Fails when both send the same.
    """
    for _ in range(2):
        left_behind(folder, an_event())
    inside: list[int] = []

    def send(events: Sequence[budget_pb2.Event]) -> None:
        if not inside:
            inside.append(flush_leftovers(Spool(folder), coordinator.send).sent)
        coordinator.send(events)

    assert flush_leftovers(Spool(folder), send).sent == 1
    assert inside == [1]
    assert len(coordinator.calls) == 2
    assert len(coordinator.counted) == 2
    assert list(folder.iterdir()) == []


def test_a_file_is_not_taken_before_it_is_locked(
    folder: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flusher that comes between the making of a file and its lock costs nothing.

    Fails when the writer does not look whether its file is still there.
    """
    lock = _spool._File.lock
    came: list[bool] = []

    def late(file: _spool._File, *, shared: bool = False) -> bool:
        if not came:
            came.append(True)
            flush_leftovers(Spool(folder), lambda _: None)
        return lock(file, shared=shared)

    monkeypatch.setattr(_spool._File, "lock", late)
    spool.append(event := an_event())
    assert came
    assert found(folder)[0] == [event.id]


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (Unavailable("away"), 1),
        (LimitReached("many"), 1),
        (TooManyEvents("full"), 2),
        (TokenNotFound("-"), 2),
    ],
)
def test_a_flush_that_fails_keeps_them(
    folder: Path, coordinator: Coordinator, error: HoldoffError, calls: int
) -> None:
    """It says why, and nothing is lost; another coordinator may know the token.

    Fails when leftovers of an unknown token are dropped.
    """
    for _ in range(2):
        left_behind(folder, an_event())
    coordinator.error = error
    flushed = flush_leftovers(Spool(folder), coordinator.send)
    assert (flushed.sent, flushed.dropped, flushed.error) == (0, 0, error)
    assert len(coordinator.calls) == calls
    assert len(found(folder)[0]) == 2


def test_a_draft_that_was_left_is_cleared_away(folder: Path, coordinator: Coordinator) -> None:
    """A crash while a file was written anew leaves the file as it was, and no rubbish."""
    event = an_event()
    path = left_behind(folder, event)
    draft = folder / f"{uuid.uuid4().hex}.draft"
    draft.write_bytes(path.read_bytes()[:-30])
    assert flush_leftovers(Spool(folder), coordinator.send).sent == 1
    assert list(folder.iterdir()) == []


# Commands


@pytest.fixture
def holdoff(tmp_path: Path) -> Callable[..., Any]:
    """Run the command line where nobody listens."""
    variables = {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "HOLDOFF_ENDPOINT": "127.0.0.1:1",
        "HOLDOFF_OUTPUT": None,
        "TZ": "UTC",
    }
    return lambda *args: CliRunner(env=variables).invoke(main, args, prog_name="holdoff")


def test_the_list_reads_well(holdoff: Callable[..., Any], folder: Path, spool: Spool) -> None:
    """A line a report, the oldest first, and who will send it; as JSON with everything."""
    assert holdoff("spool", "list").stderr == "no reports are stored on this host\n"
    event = an_event("crm/\x1b[2J", count=3)
    event.age.FromSeconds(60)
    event.holder.job = "nightly"
    spool.append(event)
    left_behind(folder, an_event(status=0))
    result = holdoff("spool", "list")
    assert result.exit_code == 0, result.output
    rows = [[one.strip() for one in row.split("  ") if one] for row in result.stdout.splitlines()]
    assert rows[0] == [
        *("WHEN", "KIND", "STATUS", "COUNT", "TOKEN", "DIVISION", "ENDPOINT", "JOB", "SENT BY"),
    ]
    assert rows[1][1:] == [
        *("error", "400", "3", TOKEN, "1", r"crm/\x1b[2J", "nightly", "its command"),
    ]
    assert rows[2][1:] == ["error", "-", "1", TOKEN, "1", "crm/accounts", "-", "flush"]
    reports = json.loads(holdoff("spool", "list", "-o", "json").stdout)["reports"]
    assert [one["writer_runs"] for one in reports] == [True, False]
    assert [one["set_aside"] for one in reports] == ["", ""]
    assert reports[0]["id"] == event.id
    assert reports[0]["holder"]["job"] == "nightly"
    assert reports[0]["time"] < reports[1]["time"]
    assert float(reports[0]["age"].rstrip("s")) >= 60


def test_the_list_knows_what_was_set_aside(
    holdoff: Callable[..., Any], folder: Path, spool: Spool
) -> None:
    """With the reason, and in JSON the file; `retry` lets it wait again.

    Fails when `list` hides it, or `retry` loses it where no coordinator answers.
    """
    spool.append(event := an_event())
    path = spool.set_aside([event.id], "events.status: no")
    assert "retry; set aside: events.status: no" in holdoff("spool", "list").stdout
    [report] = json.loads(holdoff("spool", "list", "-o", "json").stdout)["reports"]
    assert (report["id"], report["set_aside"]) == (event.id, "events.status: no")
    assert (report["file"], report["writer_runs"]) == (str(path), False)
    assert holdoff("spool", "retry").exit_code == 69
    assert found(folder) == ([event.id], [])


def test_a_flush_without_reports_asks_nobody(holdoff: Callable[..., Any]) -> None:
    """Where nothing waits nobody is asked, and all is well."""
    result = holdoff("spool", "flush")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "0 sent\n", "")
