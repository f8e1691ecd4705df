"""First aid for operators: what they deploy, list, read in logs and copy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import redis
from click.testing import CliRunner

import holdoff
from holdoff.cli import main
from holdoff.cli._board import Board
from holdoff.v1 import lease_service_pb2
from holdoff_coordinator import leases
from tests.e2e.processes import Terminal
from tests.e2e.service import BIN, Service
from tests.e2e.test_deploy import Hardened
from tests.harness import Replica, Waiter, ask, wait_until

if TYPE_CHECKING:
    from tests.conftest import StartValkey

DOCKERFILE = Path(__file__).parents[2] / "deploy" / "Dockerfile"


class Image(Service):
    """The image's default command, with its environment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        text = DOCKERFILE.read_text(encoding="utf-8")
        found = dict(re.findall("^(ENV|ENTRYPOINT|CMD) (.*)$", text, re.MULTILINE))
        variables = dict(word.split("=", 1) for word in found["ENV"].split())
        del variables["PATH"]
        self.environment |= {
            name: value.replace("/var/lib/holdoff", str(folder))
            for name, value in variables.items()
        }
        self._words: list[str] = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])

    def command(self) -> list[str]:
        """Return the command line, with the health service on a free port."""
        self.environment["HOLDOFF_LISTEN"] = self.address
        program, *words = (word.replace(":50052", ":0") for word in self._words)
        return [str(BIN / program), *words]


@pytest.mark.parametrize("deployed", [Hardened, Image])
def test_a_store_url_wins_over_a_preset_directory(
    deployed: type[Service], tmp_path: Path, start_valkey: StartValkey
) -> None:
    """The unit and the image take an external store by one variable.

    Fails when they preset the directory as if their user had chosen it: exit code 64.
    """
    valkey = start_valkey("--appendonly", "yes")
    one = deployed(tmp_path)
    one.environment["HOLDOFF_REDIS_URL"] = valkey.url
    with one:
        one.create_token("kept-elsewhere")
        with redis.Redis.from_url(valkey.url) as store:
            assert store.exists("holdoff:{e2e}:token:kept-elsewhere")
        assert not list(tmp_path.rglob("epoch"))


def test_names_to_copy_are_whole_in_80_columns(start_valkey: StartValkey) -> None:
    """On a terminal of 80 columns, and in a pipe.

    Fails when a table is folded within a name, or cut.
    """
    with Replica(start_valkey().url) as one, holdoff.Client(one.address) as client:
        app = "apps/exact-online-nl-production"
        token = one.create_token(3600, name=f"{app}/tokens/finance-and-control")
        client.record_error(token, division="535193", endpoint="crm/Accounts", status=400)
        why = "the provider asked us to be quiet for a while, in a mail of this morning"
        back_off = client.set_back_off(token, 60, why, endpoint="salesorder/SalesOrders").name
        lease = one.hold(token, ttl=60, job="nightly invoices").lease.name
        [budget] = [found.name for found in client.list_budgets(app) if found.limit == "errors"]
        shown = {
            ("lease", "list"): [lease],
            ("lease", "show", lease): [lease],
            ("token", "list"): [token],
            ("token", "show", token): [token, lease],
            ("budget", "list"): [budget],
            ("budget", "show", budget): [budget, token],
            ("backoff", "list"): [back_off],
            ("explain", token): [lease, budget, back_off],
            ("audit", app): [lease, back_off],
        }
        for arguments, names in shown.items():
            command = [str(BIN / "holdoff"), "--endpoint", one.address, *arguments]
            piped = CliRunner().invoke(main, command[1:], catch_exceptions=False).stdout
            terminal = Terminal(["env", "COLUMNS=80", "LINES=24", "TERM=xterm", *command])
            screen = terminal.rest()
            for name in names:
                assert name in piped, arguments
                assert name in screen, arguments


def test_the_journal_knows_how_severe_a_line_is(tmp_path: Path, start_valkey: StartValkey) -> None:
    """Standard error of the unit begins each line with its priority where the journal reads it.

    Fails when `journalctl --priority err` would not find why it ended, and when another reader of
    the log, such as a container's, gets more than JSON.
    """

    def log_of(*options: str, journal: bool) -> list[str]:
        written = tmp_path / f"{len(list(tmp_path.iterdir()))}.log"
        with written.open("w") as stream:
            at = os.fstat(stream.fileno())
            ours = f"{at.st_dev}:{at.st_ino}" if journal else "1:1"
            program = str(BIN / "holdoff-coordinator")
            command = [program, "serve", "--listen", "127.0.0.1:0", *options]
            process = subprocess.Popen(
                command, stderr=stream, env={**os.environ, "JOURNAL_STREAM": ours}
            )
            try:
                wait_until(lambda: process.poll() is not None or "serving" in written.read_text())
            finally:
                process.terminate()
                process.wait(timeout=60)
        return written.read_text().splitlines()

    url = ("--redis-url", start_valkey().url)
    lines = log_of(*url, journal=True)
    levels = {"<6>": "info", "<4>": "warning"}
    assert {line[:3] for line in lines} == set(levels)  # it does not fsync
    assert all(json.loads(line[3:])["level"] == levels[line[:3]] for line in lines)
    assert all(json.loads(line) for line in log_of(*url, journal=False))
    [line] = log_of("--redis-url", "nonsense", journal=True)
    assert line.startswith("<3>holdoff-coordinator: ")


class Watched:
    """What a watch tells about the holders of one token."""

    def __init__(self, replica: Replica, token: str) -> None:
        request = lease_service_pb2.WatchLeasesRequest(parent=token)
        self._watch = replica.leases.WatchLeases(request)
        self.told: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        board = Board()
        with contextlib.suppress(grpc.RpcError):
            for response in self._watch:
                board.take(response, time.monotonic_ns())
                self.told += [row.state for row in board.view(9, time.monotonic_ns()).rows]

    def close(self) -> None:
        """Watch no more."""
        self._watch.cancel()
        self._thread.join(timeout=30)

    def tells(self, state: str) -> None:
        """Wait until it shows this state."""
        wait_until(lambda: state in self.told, 30)


def shown(one: Replica, *arguments: str) -> str:
    """Return what a command prints."""
    done = CliRunner().invoke(main, ["--endpoint", one.address, *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("state", ["backing off", "paused", "renewal late"])
def test_a_holder_that_does_not_go_on_says_so(state: str, start_valkey: StartValkey) -> None:
    """In `lease list` and `show`, in `watch`, in `explain`, and to who waits for it; and its end.

    Fails when such a lease is as active as any other.
    """
    with Replica(start_valkey().url) as one, holdoff.Client(one.address) as client:
        token, why = one.create_token(0, name="apps/e2e/tokens/t"), "Exact is down"
        offer = one.hold(token, ttl=10 if state == "renewal late" else 600, job="nightly")
        watched, waiter = Watched(one, token), Waiter(one, ask(token))
        watched.tells("held")
        assert waiter.waiting(30).message == "held by job 'nightly'"
        assert " active " in shown(one, "lease", "list")
        if state == "backing off":
            back_off = client.set_back_off(token, 3600, why, endpoint="crm/accounts").name
            assert " active " in shown(one, "lease", "list")  # it did not say that it calls there
            client.clear_back_off(back_off, "test")
            back_off = client.set_back_off("apps/e2e", 3600, why).name
        elif state == "paused":
            one.renew(offer, command_paused=True)
        else:
            why = ""
        watched.tells(state)
        for arguments in (("list",), ("show", offer.lease.name)):
            assert state in shown(one, "lease", *arguments)
        words = {"backing off": "is backing off", "paused": "is paused", "renewal late": "is late"}
        assert words[state] in shown(one, "explain", token)
        wait_until(lambda: words[state] in waiter.last.waiting.message, 30)  # type: ignore[union-attr]
        if state == "backing off":
            assert why in shown(one, "lease", "show", offer.lease.name)
            assert why in shown(one, "explain", token)
            client.clear_back_off(back_off, "test")
        else:
            if state == "renewal late":  # whatever else may hold it back
                back_off = client.set_back_off("apps/e2e", 3600, "Exact is down").name
                assert not one.show(offer.lease.name).activity_message
                client.clear_back_off(back_off, "test")
            one.renew(offer)
        watched.told.clear()
        watched.tells("held")
        assert " active " in shown(one, "lease", "list")
        waiter.vanish()
        watched.close()


def test_a_waiter_behind_a_holder_hears_of_a_block_at_once(
    start_valkey: StartValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it will call must be quiet, and it is told so though it waits for a holder.

    Fails when a waiter hears of that only with the next of the statuses that come anyway.
    """
    monkeypatch.setattr(leases, "STATUS_SECONDS", 3600.0)
    with Replica(start_valkey().url) as one, holdoff.Client(one.address) as client:
        token = one.create_token(0)
        one.hold(token, ttl=600)
        waiter = Waiter(one, ask(token, scopes=[("", "crm/accounts")]))
        waiter.waiting(30)
        client.set_back_off(token, 3600, "it answers nonsense", endpoint="crm/accounts")
        wait_until(lambda: "it answers nonsense" in waiter.last.waiting.message, 30)  # type: ignore[union-attr]
        waiter.vanish()


def test_a_waiters_line_follows_a_block(service: Service, tmp_path: Path) -> None:
    """A run waits for a holder; then what it will call is quiet for an hour: its log says so.

    Fails when the line stays as it was: only the holder in the way, and an early start.
    """
    token = f"apps/{uuid.uuid4()}/tokens/t"
    log = tmp_path / "log"
    with service.asked() as client, log.open("w") as stream:
        client.create_token(token, refresh_interval_seconds=1)
        lease = client.acquire(token, job="other")
        endpoint = ("--endpoint", "crm/accounts")
        run = service.start_holdoff(
            "run", "--token", token, *endpoint, "--", "true", stderr=stream, stdout=stream
        )
        wait_until(lambda: "held by job 'other'" in log.read_text(), 30)
        lease.command_paused(paused=True)
        wait_until(lambda: "whose command is paused" in log.read_text(), 30)
        client.set_back_off(token, 3600, "it answers nonsense", endpoint="crm/accounts")
        wait_until(lambda: "it answers nonsense" in log.read_text(), 30)
        line = log.read_text().splitlines()[-1]
        assert re.search("held by job 'other'.*; and .* paused .*: it answers nonsense", line)
        assert re.search("earliest start in (59m|1h)", line)
        run.terminate()
        run.wait(timeout=30)
        lease.release()
