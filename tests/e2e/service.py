"""A real coordinator process, and real `holdoff` commands, for end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from click.testing import CliRunner

from holdoff import Client
from holdoff.cli import main
from holdoff.cli.output import resource
from holdoff.durations import parse_duration
from tests.harness import wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from click.testing import Result

BIN = Path(sys.executable).parent


def host_named(name: str) -> list[str]:
    """Return what to put before a command so that it runs, as the same process, on a "host".

    A host is a UTS namespace, which has a name of its own. Where we may not make one, the command
    runs on this host.
    """
    script = 'hostname "$1" && shift && exec "$@"'
    command = ["unshare", "--uts", "sh", "-c", script, "sh", name]
    try:
        possible = subprocess.run([*command, "true"], check=False, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        return []
    return command if possible.returncode == 0 else []


class Service:
    """`holdoff-coordinator serve`, restartable in place: by default with an embedded store.

    Args:
        folder: For all that it writes.
        redis_url: A store to use instead of its own.
        policies: Texts of policies that it knows beside the presets, by name.
    """

    def __init__(
        self, folder: Path, redis_url: str = "", policies: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = folder / "data"
        self._redis_url = redis_url
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(folder / "state"),
        }
        if policies:
            policy_dir = folder / "policies"
            policy_dir.mkdir(parents=True)
            for name, text in policies.items():
                (policy_dir / f"{name}.toml").write_text(text)
            self.environment["HOLDOFF_POLICY_DIR"] = str(policy_dir)
        self.app = "apps/e2e"
        """Where `create_token` makes tokens."""
        self.address = f"127.0.0.1:{free_port()}"  # which is still free when it starts again
        self.log: list[str] = []
        self._commands: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_commands()
        self.end(signal.SIGTERM)

    def end_commands(self) -> None:
        """End those that a failed test left behind; a guard ends what its wrapper ran."""
        while self._commands:
            command = self._commands.pop()
            command.kill()
            command.wait(timeout=40)
            for pipe in filter(None, (command.stdin, command.stdout, command.stderr)):
                pipe.close()

    def start(self) -> None:
        """Start, on the same port and directory as before, and wait until it serves."""
        self.log = []
        self.process = subprocess.Popen(
            self.command(), stderr=subprocess.PIPE, text=True, env=self.environment
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            wait_until(lambda: self._serving() or not self._reader.is_alive())
            line = self._serving()
            assert line, "".join(self.log)
        except AssertionError:  # it may still start, and nothing would end it
            self.process.kill()
            raise
        self.address = json.loads(line)["address"]
        self.environment["HOLDOFF_ENDPOINT"] = self.address

    def command(self) -> list[str]:
        """Return the command line."""
        program = str(BIN / "holdoff-coordinator")
        data_dir = ["--data-dir", str(self.data_dir)]
        store = ["--redis-url", self._redis_url] if self._redis_url else data_dir
        return [program, "serve", "--listen", self.address, *store]

    def _serving(self) -> str:
        return next((one for one in self.log if "serving" in one), "")

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    @property
    def runs(self) -> bool:
        """Whether its process has not ended."""
        return self.process.poll() is None

    def end(self, signum: signal.Signals) -> None:
        """End the process and wait for it."""
        self.process.send_signal(signum)
        self.process.wait(timeout=40)
        self._reader.join(timeout=5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def valkey_pid(self) -> int:
        """Return the process id of its Valkey."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = children.read_text().split()
        return int(pid)

    def start_holdoff(
        self, *arguments: str, host: Sequence[str] = (), **options: Any
    ) -> subprocess.Popen[str]:
        """Start a `holdoff` command, under what `host_named` returned if it runs elsewhere."""
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            [*host, str(BIN / "holdoff"), *arguments],
            **{"env": self.environment, **defaults, **options},
        )
        self._commands.append(process)
        return process

    def holdoff(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a `holdoff` command to its end, in a process of its own."""
        process = self.start_holdoff(*arguments, **options)
        try:
            stdout, stderr = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate(timeout=40)
            raise AssertionError(f"{arguments} does not end; it wrote {said}") from None
        sys.stderr.write(stderr)  # which pytest shows if the test fails
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def invoke(self, *arguments: str, **variables: str | None) -> Result:
        """Run a `holdoff` command in this process, without the time that a new one takes to start.

        Args:
            arguments: Of a command that neither waits nor needs a terminal.
            variables: Of its environment, where it is to differ from ours; None takes one out.
        """
        done = CliRunner().invoke(main, arguments, env={**self.environment, **variables})
        sys.stderr.write(done.stderr)  # which pytest shows if the test fails
        return done

    def json(self, *arguments: str) -> Any:
        """Run a command, in this process, and read its document."""
        shown = self.invoke(*arguments, "--output", "json")
        assert shown.exit_code == 0, shown.stderr
        return json.loads(shown.stdout)

    def asked(self) -> Client:
        """Ask it from this process: a command takes a while to start."""
        return Client(self.address, ca_file=self.environment.get("HOLDOFF_CA_FILE"))

    def create_token(self, name: str, interval: str = "0.3s") -> str:
        """Create a token, in the app of the test."""
        token = f"{self.app}/tokens/{name}"
        with self.asked() as client:
            client.create_token(token, refresh_interval_seconds=float(parse_duration(interval)))
        return token

    def wait_for_queue(self, token: str, length: int) -> None:
        """Wait until so many wait for a token."""
        with self.asked() as client:
            wait_until(lambda: client.get_token(token).queue_length == length)

    def only_lease(self, token: str) -> Any:
        """Wait for a live lease of a token under which the command has started; return it."""

        def started() -> Any:
            leases = map(resource, client.list_leases(token))
            return next((lease for lease in leases if lease.get("command_start_time")), None)

        with self.asked() as client:
            return wait_until(started)
