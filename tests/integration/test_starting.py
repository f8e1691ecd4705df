"""How a coordinator starts before its store, reloads, and hangs up: the whole program."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdoff.v1 import policy_service_pb2, policy_service_pb2_grpc
from holdoff.v1 import token_service_pb2_grpc as tokens_grpc
from holdoff_coordinator import server
from holdoff_coordinator.custody.key_files import create_key
from holdoff_coordinator.scripts import Scripts
from holdoff_coordinator.store import Epoch, StoreAwayError
from tests.cable import Cable
from tests.harness import NO_PROXY, Replica, at_length, refusal, token_to_create, wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.conftest import StartValkey

COORDINATOR = str(Path(sys.executable).with_name("holdoff-coordinator"))
SECRET = "sw0rdf1sh"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


class Program:
    """A coordinator that runs, and its log."""

    def __init__(self, *options: str, **popen: Any) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [COORDINATOR, "serve", "--log-format", "json", "--listen", self.address, *options],
            stderr=subprocess.PIPE,
            text=True,
            **popen,
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            assert SECRET not in line
            with contextlib.suppress(ValueError):
                self.log.append(json.loads(line))

    def __enter__(self) -> Self:
        self.channel = grpc.insecure_channel(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()
        self._thread.join(timeout=5)
        if self.process.stderr:
            self.process.stderr.close()

    def said(self, event: str) -> dict[str, Any]:
        """Return the latest line of the log with an event, once there is one."""

        def found() -> dict[str, Any] | None:
            assert self.process.poll() is None or event in str(self.log), self.log
            return next((one for one in reversed(self.log) if one["event"] == event), None)

        line: dict[str, Any] = wait_until(found, 30.0)
        return line

    def health(self, address: str = "", service: str = "") -> int:
        """Ask for its health."""
        with grpc.insecure_channel(address or self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)

    def create_token(self) -> None:
        """Do something that needs the store."""
        request = token_to_create("apps/start/tokens/t", 1.0)
        tokens_grpc.TokenServiceStub(self.channel).CreateToken(request)

    def ended(self) -> int:
        """Wait until it ends."""
        return self.process.wait(timeout=30)


def test_a_store_that_is_away_is_waited_for(start_valkey: StartValkey) -> None:
    """Meanwhile it says NOT_SERVING and STORE_UNAVAILABLE, and the log what to do.

    Fails when the coordinator ends, or opens its port only when the store is there.
    """
    port, health = free_port(), f"127.0.0.1:{free_port()}"
    url = f"redis://:{SECRET}@127.0.0.1:{port}"
    with Program("--redis-url", url, "--health-listen", health) as program:
        assert (
            "is it running, and is the address right?"
            in program.said("waiting for the store")["reason"]
        )
        assert program.health() == program.health(health) == NOT_SERVING
        assert program.health(service="holdoff.v1.LeaseService") == NOT_SERVING
        assert refusal(program.create_token) == "STORE_UNAVAILABLE"
        start_valkey(
            *f"--port {port} --bind 127.0.0.1 --requirepass {SECRET}".split(), password=SECRET
        )
        program.said("serving")
        assert program.health() == program.health(health) == SERVING
        program.create_token()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://:{SECRET}@a..b:6379", "is the address right?"),
        *at_length(
            ("redis+sentinel://127.0.0.1:1/primary", "SENTINEL MASTERS"),
            ("redis+cluster://127.0.0.1:1", "is the address right?"),
        ),
    ],
)
def test_waiting_ends_with_sigterm(url: str, words: str) -> None:
    """While it waits for its store the coordinator can be stopped like any other."""
    with Program("--redis-url", url) as program:
        assert words in program.said("waiting for the store")["reason"]
        program.process.terminate()
        assert program.ended() == 0


def test_a_store_that_says_nothing_is_waited_for() -> None:
    """Connections are taken, and nothing is ever answered: the log asks about a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}"
        with Program("--redis-url", url) as program:
            assert "firewall" in program.said("waiting for the store")["reason"]
            assert program.health() == NOT_SERVING


def test_no_call_reaches_a_store_before_it_was_judged(
    start_valkey: StartValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may answer and yet not be fit: callers hear STORE_UNAVAILABLE, and the log tells it once.

    Fails when a coordinator that waits for its store admits callers, logs each look at it, or ends
    when the store is away again before its records were looked at.
    """
    monkeypatch.setattr(server, "WAIT_SECONDS", 0.01)
    address, refused, looks = f"127.0.0.1:{free_port()}", list[str](), itertools.count()

    def create_token() -> None:
        with grpc.insecure_channel(address, NO_PROXY) as channel:
            request = token_to_create("apps/start/tokens/t", 1.0)
            tokens_grpc.TokenServiceStub(channel).CreateToken(request)

    async def open_store() -> Epoch:
        look = next(looks)
        if look < 3:
            refused.append(await asyncio.to_thread(refusal, create_token))
            raise StoreAwayError("it is still loading its data")
        if look == 3:
            cable.cut()
        else:
            cable.mend()
        return Epoch("test", lost=False)

    with (
        Cable(start_valkey().url.removeprefix("unix://")) as cable,
        structlog.testing.capture_logs() as logs,
        Replica(f"redis://{cable.address}", listen=address, open_store=open_store),
    ):
        create_token()
    assert refused == ["STORE_UNAVAILABLE"] * 3
    assert [one["event"] for one in logs].count("waiting for the store") == 2


POLICY = 'name = "ours"\ntitle = "Ours"\n[refresh]\ninterval = "{}s"\nrotation = "reusable"\n'


def test_sighup_reloads(start_valkey: StartValkey, tmp_path: Path) -> None:
    """Policies and keys are read again, a file that is wrong changes nothing, and nothing ends.

    Fails with the system's own way of SIGHUP, which ends the process.
    """
    path = tmp_path / "ours.toml"
    path.write_text(POLICY.format(10))
    keys = tmp_path / "keys"
    create_key(keys, "first")
    store = ("--redis-url", start_valkey().url)
    options = ("--policy-dir", str(tmp_path), "--custody-key-dir", str(keys))
    with Program(*store, *options, start_new_session=True) as program:
        program.said("serving")

        def interval() -> int:
            stub = policy_service_pb2_grpc.PolicyServiceStub(program.channel)
            found = stub.GetPolicy(policy_service_pb2.GetPolicyRequest(name="ours")).policy
            return int(found.refresh.interval.seconds)

        assert interval() == 10
        path.write_text(POLICY.format(20))
        create_key(keys, "second")
        program.process.send_signal(signal.SIGHUP)
        wait_until(lambda: interval() == 20)
        assert program.said("custody keys read again")["keys"] == ["first", "second"]
        path.write_text("name = ")
        program.process.send_signal(signal.SIGHUP)
        assert "ours.toml" in program.said("policies stay as they were")["reason"]
        assert interval() == 20
        program.process.terminate()
        assert program.ended() == 0


def in_terminal(terminal: int, *, nohup: bool) -> Any:
    """Return what makes a child the first of a session at a terminal."""

    def prepare() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    return prepare


@pytest.mark.parametrize("nohup", [False, True])
def test_losing_the_terminal_drains(start_valkey: StartValkey, *, nohup: bool) -> None:
    """Calls that wait are told DRAINING; under nohup it goes on.

    Fails when SIGHUP always means to reload, or always to end.
    """
    ours, theirs = pty.openpty()
    prepare = in_terminal(theirs, nohup=nohup)
    with Program("--redis-url", start_valkey().url, preexec_fn=prepare) as program:
        os.close(theirs)
        program.said("serving")
        os.close(ours)
        if nohup:
            program.process.send_signal(signal.SIGHUP)
            program.said("reloaded")
            assert program.health() == SERVING
        else:
            program.said("draining")
            assert program.ended() == 0


@pytest.mark.parametrize(
    "command", ["token issue me --output-file -", "token list", "after-restore"]
)
def test_no_second_store_is_begun(tmp_path: Path, command: str) -> None:
    """A command for operators refuses a directory without a store, names it, and makes nothing."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    named = ["--data-dir", str(tmp_path / "holdoff")] if os.geteuid() == 0 else []
    ended = subprocess.run(
        [COORDINATOR, *command.split(), *named],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=30,
    )
    assert (ended.returncode, ended.stdout) == (69, "")
    assert f"there is no store in {tmp_path / 'holdoff'}" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_log_names_the_directory(tmp_path: Path) -> None:
    """A coordinator with an embedded store says where it is, and the commands then find it."""
    with Program("--data-dir", str(tmp_path / "data")) as program:
        assert program.said("the store is an embedded one")["data_dir"] == str(tmp_path / "data")
        program.said("serving")
        issue = [
            COORDINATOR,
            "token",
            "issue",
            "me",
            "--output-file",
            "-",
            "--data-dir",
            str(tmp_path / "data"),
        ]
        issued = subprocess.run(issue, capture_output=True, check=True, timeout=30)
        assert issued.stdout
        program.process.terminate()
        assert program.ended() == 0


def test_idle_apps_cost_a_start_nothing(
    start_valkey: StartValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that starts, and sweeps, runs no script of an idle app of this release.

    Fails when each app is upgraded, or touched, by a script of its own, which the store writes to
    its disk: beside 2,000 apps that took 20 s.
    """
    url = start_valkey().url
    with Replica(url) as first:
        busy = first.create_token(0.0).split("/")[1]
        idle = {first.create_token(0.0).split("/")[1] for _ in range(3)}
        first.hold(f"apps/{busy}/tokens/t")
        ran, run = set[str](), Scripts.run  # also of coordinators that other tests share

        async def counted(self: Scripts, name: str, app: str, *args: Any, **options: Any) -> Any:
            ran.add(app)
            return await run(self, name, app, *args, **options)

        monkeypatch.setattr(Scripts, "run", counted)
        with Replica(url):
            first.stop()  # the other one sweeps now
            wait_until(lambda: busy in ran)
        assert not ran & idle
