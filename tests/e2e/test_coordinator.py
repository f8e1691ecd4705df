"""The coordinator as a process among clients that go on while it, or its store, comes and goes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

import holdoff
from tests.e2e.service import BIN
from tests.harness import coordinator_command, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.service import Service

COORDINATOR = str(BIN / "holdoff-coordinator")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_waiters_keep_their_places_over_a_restart(
    own_service: Service, tmp_path: Path, signum: signal.Signals
) -> None:
    """Promises 4 and 9: three runs start in the order in which they came, drained or crashed.

    Fails when a client that connects again comes with a new request id.
    """
    service = own_service
    token = service.create_token("order", "0.2s")
    diary = tmp_path / "diary"
    holder = service.start_holdoff(
        *("run", "--token", token, "--ttl", "20s", "--", "cat"), stdin=subprocess.PIPE
    )
    service.only_lease(token)
    waiters: list[subprocess.Popen[str]] = []
    with holdoff.Client(service.address) as client:
        for number in (1, 2, 3):
            command = ("--", "sh", "-c", f"echo {number} >> {diary}")
            waiters.append(service.start_holdoff("run", "--token", token, *command))
            wait_until(lambda: client.get_token(token).queue_length == len(waiters))
    service.end(signum)
    assert service.process.returncode == (0 if signum == signal.SIGTERM else -signum)
    told = [json.loads(line) for line in service.log]
    assert [line["event"] for line in told if line["level"] not in {"info", "warning"}] == []
    service.start()
    holder.communicate("", timeout=30)
    for process in waiters:
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0, stderr
    assert diary.read_text().split() == ["1", "2", "3"]


def test_renewals_and_places_outlive_a_killed_store(own_service: Service) -> None:
    """Promise 9: with the store killed three times under load, holders stay and the queue holds.

    Fails when the embedded store runs without its append-only file.
    """
    service = own_service
    tokens = [service.create_token(f"t{number}", "0.1s") for number in range(3)]
    numbers: list[int] = []
    order: list[int] = []
    errors: list[Exception] = []
    guarded = threading.Lock()

    def wait_in_line(place: int) -> None:
        try:
            with holdoff.Client(service.address) as client:
                lease = client.acquire(tokens[0], ttl_seconds=5)
                with guarded:
                    order.append(place)
                    numbers.append(lease.fencing_token)
                lease.release()
        except Exception as error:  # noqa: BLE001 - a thread tells its test
            errors.append(error)

    with holdoff.Client(service.address) as client:
        renewed: dict[str, int] = dict.fromkeys(tokens, 0)

        def count(token: str) -> Any:
            def one_more(_deadline_ns: int) -> None:
                renewed[token] += 1

            return one_more

        held = [client.acquire(one, ttl_seconds=5, on_renewed=count(one)) for one in tokens]
        threads: list[threading.Thread] = []
        for place in range(3):
            threads.append(threading.Thread(target=wait_in_line, args=(place,)))
            threads[-1].start()
            wait_until(lambda: client.get_token(tokens[0]).queue_length == len(threads))
        for _ in range(3):
            renewed.update(dict.fromkeys(tokens, 0))
            os.kill(service.valkey_pid(), signal.SIGKILL)
            wait_until(lambda: all(renewed.values()))
        for lease in held:
            lease.check()
            lease.release()
        for thread in threads:
            thread.join(timeout=30)
    assert errors == []
    assert order == [0, 1, 2]
    assert numbers == sorted(numbers)
    assert numbers[0] > held[0].fencing_token


def test_a_listing_reads_well_and_tells_no_secret(service: Service) -> None:
    """Promises 8 and 10: `grpcurl` without a request lists who holds what since when."""
    token = service.create_token("listed")
    process = service.start_holdoff(
        *("run", "--token", token, "--job", "nightly", "--", "cat"), stdin=subprocess.PIPE
    )
    service.only_lease(token)
    asked = subprocess.run(
        [BIN / "grpcurl", "-plaintext", service.address, "holdoff.v1.LeaseService/ListLeases"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
    )
    process.communicate("", timeout=30)
    (lease,) = [one for one in json.loads(asked.stdout)["leases"] if token in one["name"]]
    assert lease["state"] == "LEASE_STATE_ACTIVE"
    assert (lease["holder"]["job"], lease["holder"]["pid"]) == ("nightly", str(process.pid))
    assert {"fencing_token", "ttl", "accept_time", "expire_time", "remaining"} <= lease.keys()
    assert not re.search(r"[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-4", json.dumps(lease))
    # Only live leases are listed; one that has ended can still be shown.
    assert service.json("lease", "list", token) == {"leases": []}
    assert service.json("lease", "show", lease["name"])["state"] == "LEASE_STATE_RELEASED"


def test_it_serves_on_when_nobody_reads_its_logs(tmp_path: Path) -> None:
    """A log reader that went away ends neither the service nor its drain; variables are options.

    Fails when a line that cannot be written is an error.
    """
    variables = {"HOLDOFF_LISTEN": "127.0.0.1:0", "HOLDOFF_DATA_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [COORDINATOR, "serve"], env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        process.stderr.close()
        with holdoff.Client(json.loads(line)["address"]) as client:
            assert list(client.list_tokens()) == []
        process.terminate()
        assert process.wait(timeout=30) == 0
        assert (tmp_path / "valkey").is_dir()
    finally:
        process.kill()
        process.wait()


def test_wrong_usage_is_told() -> None:
    """Exit code 64, in one line."""
    both = ("--data-dir", "x", "--redis-url", "redis://127.0.0.1")
    ended = coordinator_command("serve", *both)
    assert ended.exit_code == 64
    assert "only one of" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
