"""`holdoff watch`, as lines and as a live table; who waits and who ran, asked of a real service."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from typing import TYPE_CHECKING, Any, Self

import holdoff
from tests.harness import wait_until

if TYPE_CHECKING:
    from tests.e2e.service import Service


class Lines:
    """A `holdoff watch` whose output is a pipe, and what it has printed so far."""

    def __init__(self, service: Service, *arguments: str) -> None:
        self.process = service.start_holdoff("watch", *arguments)
        self.seen: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(json.loads(line))

    def kinds(self) -> list[str]:
        """The kinds of what was printed."""
        return [line["kind"] for line in self.seen]

    def wait_for(self, kind: str) -> dict[str, Any]:
        """Wait for a line of a kind, and return the first."""
        wait_until(lambda: kind in self.kinds())
        return next(line for line in self.seen if line["kind"] == kind)

    def end(self) -> str:
        """Press Ctrl-C, and return what stands on stderr."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=30)
        self._reader.join(timeout=5)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        with self.process.stdout, self.process.stderr:
            # Click begins a new line after "^C".
            return self.process.stderr.read().strip()


def run_once(service: Service, token: str, **facts: Any) -> None:
    """Take a lease, and give it back."""
    with service.asked() as client:
        client.acquire(token, **facts).release()


def test_lines_tell_what_happens(service: Service) -> None:
    """Without a terminal a run is a line of JSON for each change, at once, with all that stands."""
    token = service.create_token("t")
    watch = Lines(service, token)
    assert watch.wait_for("snapshot")["token"] == token
    assert watch.wait_for("snapshot_end")["app"] == service.app
    run_once(service, token, job="nightly", labels={"run": "4711"})
    watch.wait_for("cooling_ended")
    stderr = watch.end()
    assert (watch.process.returncode, stderr) == (130, "")
    changes = watch.kinds()[2:]
    assert [kind for kind in changes if kind != "queue_moved"] == [
        *("granted", "released", "cooling_ended")
    ]
    holder = watch.wait_for("granted")["lease"]["holder"]
    assert (holder["job"], holder["labels"]) == ("nightly", {"run": "4711"})
    assert all(line["time"] and line["token"] == token for line in watch.seen[2:])


def test_a_resumed_watch_misses_nothing(service: Service) -> None:
    """With the last resume_token the next watch begins with what happened in between.

    Fails when --resume is not handed on: a snapshot comes instead.
    """
    token = service.create_token("t")
    watch = Lines(service, token)
    resume_token = watch.wait_for("snapshot_end")["resume_token"]
    watch.end()
    run_once(service, token)
    watch = Lines(service, token, "--resume", resume_token)
    watch.wait_for("released")
    watch.end()
    assert "snapshot" not in watch.kinds()
    assert "granted" in watch.kinds()


def test_lines_go_on_after_a_restart(own_service: Service) -> None:
    """A coordinator that was away is one line on stderr, and no change is missed."""
    service = own_service
    token = service.create_token("away")
    watch = Lines(service, service.app)
    watch.wait_for("snapshot_end")
    service.end(signal.SIGKILL)
    service.start()
    run_once(service, token)
    watch.wait_for("released")
    stderr = watch.end()
    assert stderr.count("retrying") == 1
    assert len(stderr.splitlines()) == 1
    assert watch.kinds().count("snapshot_end") == 1


def test_a_reader_that_goes_away_ends_it_quietly(service: Service) -> None:
    """When nobody reads the lines any more, the next one ends the watch, without a word."""
    token = service.create_token("t")
    watch = service.start_holdoff("watch", token)
    assert watch.stdout is not None
    assert watch.stderr is not None
    assert json.loads(watch.stdout.readline())["token"] == token
    watch.stdout.close()
    run_once(service, token)
    assert watch.wait(timeout=30) == 141
    with watch.stderr:
        assert watch.stderr.read() == ""


class Terminal:
    """A terminal, on which a `holdoff watch` draws."""

    def __init__(self, service: Service, *, width: int, height: int) -> None:
        self._ours, theirs = pty.openpty()
        self._theirs = theirs
        self.resize(width, height)
        unset = {"COLUMNS", "LINES", "NO_COLOR", "HOLDOFF_OUTPUT"}
        environment = {
            name: value for name, value in service.environment.items() if name not in unset
        }
        self.process = service.start_holdoff(
            *("watch", service.app),
            stdin=theirs,
            stdout=theirs,
            env={**environment, "TERM": "xterm"},
        )
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stderr is not None
        self.process.kill()
        self.process.wait(timeout=30)
        self.process.stderr.close()
        os.close(self._theirs)  # which ends what is read of the other side
        self._reader.join(timeout=5)
        os.close(self._ours)

    def _read(self) -> None:
        try:
            while chunk := os.read(self._ours, 65536):
                self._shown += chunk
        except OSError:
            return

    def resize(self, width: int, height: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def raw(self) -> str:
        """All that was ever written to it."""
        return self._shown.decode(errors="replace")

    def lines(self) -> list[str]:
        """What stands there now: what came after the last lines were erased."""
        picture = re.split(r"\x1b\[2K|\x1b\[2J", self.raw())[-1]
        return [
            line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", picture).split("\r\n")
        ]

    def wait_for(self, pattern: str) -> None:
        """Wait until a line matches."""
        wait_until(lambda: any(re.search(pattern, line) for line in self.lines()))


def test_the_live_table(own_service: Service) -> None:
    """The table follows a run, an outage and the size of the terminal, and leaves it clean.

    Fails when a watch that is resumed in silence still counts as unreachable.
    """
    service = own_service
    token = service.create_token("finance", "30s")
    with holdoff.Client(service.address) as client:
        for number in range(8):
            client.create_token(f"{service.app}/tokens/idle-{number}")
    with Terminal(service, width=100, height=30) as terminal:
        terminal.wait_for(rf"^{token} +free +- +- +- +-$")
        command = ("run", "--token", token, "--job", "nightly", "--", "cat")
        run = service.start_holdoff(*command, stdin=subprocess.PIPE)
        terminal.wait_for(rf"^{token} +held +nightly on \S+ +[1-9]s +- +-$")
        terminal.wait_for(rf"^[0-9:]+ +granted +{token} +nightly on ")
        run.communicate("", timeout=30)
        terminal.wait_for(rf"^{token} +cooling +- +- +2[0-9]s +-$")

        service.end(signal.SIGKILL)
        terminal.wait_for(rf"^since [0-9:]+: no answer from {service.address}; retrying")
        service.start()
        # Two whole pictures without it.
        wait_until(lambda: terminal.raw().rpartition("retrying")[2].count("TOKEN") > 1)

        terminal.resize(50, 9)
        terminal.wait_for("^… and [5-7] more$")
        assert any(
            line.startswith(f"{service.app.removeprefix('apps/')}/fin") for line in terminal.lines()
        )
        assert max(map(len, terminal.lines())) <= 50
        assert len(terminal.lines()) < 9

        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(timeout=30) == 130
        assert terminal.process.stderr is not None
        assert terminal.process.stderr.read() == "\n"
        wait_until(lambda: terminal.raw().rfind("\x1b[?25h") > terminal.raw().rfind("\x1b[?25l"))


def test_a_table_is_left_clean_by_sigterm(service: Service) -> None:
    """A watch that is ended by SIGTERM shows the cursor again.

    Fails when SIGTERM is left as it is.
    """
    with Terminal(service, width=80, height=24) as terminal:
        wait_until(lambda: "\x1b[?25l" in terminal.raw())
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(timeout=30) == 143
        wait_until(lambda: terminal.raw().rfind("\x1b[?25h") > terminal.raw().rfind("\x1b[?25l"))


def test_queue_and_history_tell_who(service: Service) -> None:
    """Who waits, in order, and who ran at a time, have answers with jobs and labels."""
    token = service.create_token("t")
    command = ("run", "--token", token, "--job", "first", "--", "cat")
    holder = service.start_holdoff(*command, stdin=subprocess.PIPE)
    held = service.only_lease(token)
    waiters = []
    for place, job in enumerate(("second", "third"), start=1):
        options = ("--token", token, "--job", job, "--label", f"run={place}")
        waiters.append(service.start_holdoff("run", *options, "--", "true"))
        service.wait_for_queue(token, place)
    queued = service.json("token", "queue", token)["waiters"]
    assert [(one["place"], one["holder"]["job"], one["holder"]["labels"]) for one in queued] == [
        (1, "second", {"run": "1"}),
        (2, "third", {"run": "2"}),
    ]
    table = service.invoke("token", "queue", token).stdout.splitlines()
    assert [line.split()[1] for line in table[1:]] == ["second", "third"]

    holder.communicate("", timeout=30)
    for waiter in waiters:
        waiter.communicate(timeout=30)
        assert waiter.returncode == 0
    history = service.json("token", "history", token)["leases"]
    assert [lease["holder"]["job"] for lease in history] == ["third", "second", "first"]
    assert {lease["state"] for lease in history} == {"LEASE_STATE_RELEASED"}
    (ran,) = service.json("token", "history", token, "--at", held["accept_time"])["leases"]
    assert ran["name"] == held["name"]
