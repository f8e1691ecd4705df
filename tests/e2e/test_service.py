"""`holdoff-coordinator serve` as a process: start, stop, die, come back, and be asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import holdoff
from tests.e2e.family import Family
from tests.e2e.service import BIN, Service
from tests.harness import coordinator_command, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_coordinator_back_in_time_is_not_noticed(own_service: Service) -> None:
    """A run whose coordinator was killed and came back within the TTL ends as if nothing was."""
    service = own_service
    token = service.create_token("back")
    options = ("--token", token, "--ttl", "20s", "--grace", "1s")
    run = service.start_holdoff("run", *options, "--", "cat", stdin=subprocess.PIPE)
    lease = service.only_lease(token)["name"]
    service.end(signal.SIGKILL)
    service.start()
    with service.asked() as client:
        before = client.get_lease(lease).expire_time.ToMicroseconds()
        wait_until(lambda: client.get_lease(lease).expire_time.ToMicroseconds() > before)
    _, stderr = run.communicate("", timeout=30)
    assert (run.returncode, stderr) == (0, "")


def test_a_coordinator_that_stays_away_ends_the_run_in_time(
    own_service: Service, tmp_path: Path
) -> None:
    """TERM, then KILL before the end of the lease, exit code 79.

    Fails when `on_renewed` moves the fence without a renewal, or the guard ignores it.
    """
    service = own_service
    token, family = service.create_token("away"), Family(tmp_path / "diary", stubborn=True)
    options = ("--token", token, "--ttl", "3s", "--grace", "0.8s")
    run = service.start_holdoff("run", *options, "--", *family.command)
    family.await_all()
    service.end(signal.SIGKILL)
    latest_end = time.time() + 3
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 79
    assert family.told() < family.last()
    assert family.ended_before(latest_end)
    assert "no renewal succeeded" in stderr
    service.start()


def test_a_killed_coordinator_takes_its_valkey_along(own_service: Service) -> None:
    """The embedded store dies with it, and a restart on the directory works at once.

    Fails when Valkey is started without the parent-death signal.
    """
    service = own_service
    token = service.create_token("kept", "60s")
    with service.asked() as client:
        client.acquire(token).release()
        before = client.get_token(token)
    valkey = service.valkey_pid()
    service.end(signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{valkey}/exe").exists() or _is_zombie(valkey))
    service.start()
    with service.asked() as client:
        after = client.get_token(token)
    for field in ("fencing_token", "not_before_time", "last_refresh_time"):
        assert getattr(after, field) == getattr(before, field)


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_valkey_killed_under_load_loses_nothing(own_service: Service) -> None:
    """Promise 9: leases, places, fencing numbers and cooldowns outlive the store's SIGKILL.

    Fails when the embedded store runs without its append-only file.
    """
    service = own_service
    cooling = service.create_token("cooling", "60s")
    with service.asked() as client:
        client.acquire(cooling).release()
    busy = [service.create_token(f"busy-{number}", "0s") for number in range(3)]
    held = service.create_token("held", "0.2s")
    seen: dict[str, list[int]] = {token: [] for token in busy}
    stop = threading.Event()

    def work(token: str) -> None:
        with holdoff.Client(service.address) as client:
            while not stop.is_set():
                with contextlib.suppress(holdoff.Unavailable):  # a busy machine restarts it slowly
                    lease = client.acquire(token, ttl_seconds=10)
                    seen[token].append(lease.fencing_token)
                    lease.release()

    def more_work_done() -> None:
        before = {token: len(numbers) for token, numbers in seen.items()}

        def done() -> bool:
            for worker in workers:
                assert not worker.done(), worker.exception()
            return all(len(seen[token]) > before[token] + 3 for token in busy)

        wait_until(done, 60)

    with holdoff.Client(service.address) as client, ThreadPoolExecutor() as threads:
        lease = client.acquire(held, ttl_seconds=20)
        waiting = service.start_holdoff("run", "--token", held, "--ttl", "20s", "--", "true")
        service.wait_for_queue(held, 1)
        cooldown = client.get_token(cooling)
        workers = [threads.submit(work, token) for token in busy]
        try:
            for _ in range(2):
                more_work_done()
                os.kill(service.valkey_pid(), signal.SIGKILL)
            more_work_done()
        finally:
            stop.set()
        for worker in workers:
            worker.result(timeout=30)
        lease.check()
        assert client.get_token(cooling).not_before_time == cooldown.not_before_time
        assert client.get_token(held).lease == lease.name
        assert client.get_token(held).queue_length == 1
        lease.release()
    waiting.communicate(timeout=30)
    assert waiting.returncode == 0
    for numbers in seen.values():
        assert numbers == sorted(set(numbers))


def test_a_second_process_gets_a_clear_error(service: Service, tmp_path: Path) -> None:
    """The same directory, or the same port, is refused with the remedy."""

    def refused(listen: str, data_dir: Path) -> str:
        ended = coordinator_command("serve", "--listen", listen, "--data-dir", str(data_dir))
        assert ended.exit_code == 69
        return ended.stderr

    assert "--data-dir" in refused("127.0.0.1:0", service.data_dir)
    assert "--listen" in refused(service.address, tmp_path / "another")


def test_who_connects_before_the_store_is_ready_is_told_so(own_service: Service) -> None:
    """The port opens first; until the store is open, callers are refused with the reason."""
    service = own_service
    service.end(signal.SIGTERM)
    thread = threading.Thread(target=service.start)
    thread.start()
    with holdoff.Client(service.address) as client:

        def is_served() -> bool:
            try:
                return list(client.list_tokens(service.app)) == []
            except holdoff.Unavailable:  # the port is not open yet, or StoreUnavailable
                return False

        wait_until(is_served)
    thread.join()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], ["holdoff.v1.LeaseService", "grpc.reflection.v1.ServerReflection"]),
        (["describe", "holdoff.v1.LeaseService"], ["rpc StreamAcquireLease", "rpc ListLeases"]),
        (["describe", "holdoff.v1.AdminService.SetBackOff"], ["rpc SetBackOff"]),
        (["holdoff.v1.LeaseService/ListLeases"], ["{"]),
        (["grpc.health.v1.Health/Check"], ["SERVING"]),
    ],
)
def test_grpcurl(service: Service, arguments: list[str], words: list[str]) -> None:
    """Promise 10: the service describes itself to any gRPC tool."""
    asked = subprocess.run(
        [str(BIN / "grpcurl"), "-plaintext", service.address, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
    )
    for word in words:
        assert word in asked.stdout


def test_reflection_v1(service: Service) -> None:
    """`buf curl` speaks the new reflection alone."""
    token = service.create_token("reflected")
    asked = subprocess.run(
        [
            *(str(BIN / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
            *("--data", json.dumps({"name": token})),
            f"http://{service.address}/holdoff.v1.TokenService/GetToken",
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
    )
    assert json.loads(asked.stdout)["token"]["name"] == token


def test_a_password_shows_nowhere(tmp_path: Path, start_valkey: Callable[..., object]) -> None:
    """Promise 8: the store's password is in no log and no error.

    Fails when an error repeats the URL.
    """
    valkey = start_valkey("--requirepass", "hunter2-secret", password="hunter2-secret")
    url = valkey.url  # type: ignore[attr-defined]
    secret = tmp_path / "url"
    secret.write_text(url.replace("unix://", "unix://:wrong-hunter2@") + "\n")
    ended = coordinator_command("serve", "--listen", "127.0.0.1:0", "--redis-url-file", str(secret))
    assert ended.exit_code == 69
    assert "password" in ended.stderr
    assert not re.search("hunter2", ended.stderr)
