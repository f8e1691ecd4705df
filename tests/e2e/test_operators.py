"""First aid for operators: what they deploy, list, read in logs and copy."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

import holdoff
from tests.e2e.processes import Terminal
from tests.e2e.service import BIN, Service
from tests.e2e.test_deploy import Hardened
from tests.harness import Replica, wait_until

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
            piped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
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
