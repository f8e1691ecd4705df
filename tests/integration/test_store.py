"""Connecting to a store, judging it, and its epoch, on real servers."""

import asyncio
import gc
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import redis
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from holdoff_coordinator import store
from holdoff_coordinator.credentials import Credentials
from holdoff_coordinator.scripts import Scripts
from holdoff_coordinator.settings import Settings
from holdoff_coordinator.store import StoreError
from holdoff_coordinator.sweeper import Sweeper
from tests.cable import Cable
from tests.custodian import Custodian, key_directory
from tests.harness import Waiter, ask, wait_until

SECRET = "sw0rdf1sh"
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")

StartValkey = Callable[..., Any]


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Redis]:
    """Connect, and close the connections afterwards."""
    client = store.connect(url)
    assert isinstance(client, Redis)
    try:
        yield client
    finally:
        await client.aclose()


async def refusal(url: str) -> str:
    """Return why the store is refused."""
    async with client_of(url) as client:
        with pytest.raises(StoreError) as caught:
            await store.check(client)
    assert SECRET not in str(caught.value)
    return str(caught.value)


async def test_a_durable_store_passes_in_silence(start_valkey: StartValkey) -> None:
    """A Valkey that fsyncs every write raises neither an error nor a warning."""
    async with client_of(start_valkey(*DURABLE).url) as client:
        assert await store.check(client) == []
        assert await client.keys() == [], "the probe must leave nothing"


async def test_replies_are_bytes_whatever_the_url_says(valkey: Any) -> None:
    """The scripts' replies stay bytes and uncounted retries stay off, also by query option."""
    url = f"{valkey.url}?decode_responses=true&retry_on_timeout=true"
    async with client_of(url) as client:
        await client.set("bytes", b"\xff", px=1000)
        assert await client.get("bytes") == b"\xff"
        assert client.connection_pool.connection_kwargs["retry"].get_retries() == 0


@pytest.mark.parametrize(("fsync", "loss"), [("everysec", "two seconds"), ("no", "half a minute")])
async def test_a_store_that_does_not_fsync_is_warned_of(
    start_valkey: StartValkey, fsync: str, loss: str
) -> None:
    """The warning names the setting and what a crash loses."""
    async with client_of(start_valkey("--appendonly", "yes", "--appendfsync", fsync).url) as client:
        (warning,) = await store.check(client)
    assert f"appendfsync {fsync}" in warning
    assert loss in warning


async def test_a_store_without_a_file_is_warned_of(valkey: Any) -> None:
    """A store without an append-only file forgets everything, and we say so."""
    async with client_of(valkey.url) as client:
        (warning,) = await store.check(client)
    assert "appendonly yes" in warning


async def test_a_store_that_refuses_config_is_warned_of(start_valkey: StartValkey) -> None:
    """A managed store hides appendfsync: we can use it, and say what we could not see."""
    server = start_valkey(*DURABLE, "--rename-command", "CONFIG", "")
    async with client_of(server.url) as client:
        (warning,) = await store.check(client)
    assert "appendfsync unknown" in warning


async def test_a_password_is_asked_for_and_never_shown(start_valkey: StartValkey) -> None:
    """No password and a wrong one are told apart from an unreachable store; the right one works."""
    url = start_valkey(*DURABLE, "--requirepass", SECRET, password=SECRET).url
    path = url.removeprefix("unix://")
    assert "user name and password" in await refusal(url)
    assert "user name and password" in await refusal(f"unix://:{SECRET}x@{path}")
    async with client_of(f"unix://:{SECRET}@{path}") as client:
        assert await store.check(client) == []
        assert store.describe(client) == url


async def test_an_access_list_that_forbids_scripts_is_told(start_valkey: StartValkey) -> None:
    """A user who may write but not run scripts is refused. Fails when the probe runs none."""
    user = f"user job on >{SECRET} ~* &* +@all -@scripting".split()
    path = start_valkey("--" + user[0], *user[1:]).url.removeprefix("unix://")
    message = await refusal(f"unix://job:{SECRET}@{path}")
    assert "eval" in message
    assert "+@scripting" in message


@pytest.mark.parametrize(
    ("without", "named"),
    [
        *((f"~{key}", f"~{key}") for key in ("holdoff:*", "{holdoff}:*", "lock:{holdoff:sweeper}")),
        ("~lock:holdoff:*", "~lock:holdoff:*"),
        ("~lock-signal:holdoff:*", "~lock-signal:holdoff:*"),
        ("&holdoff:*", "&holdoff:*"),
        *(
            (f"-{name}", f"+{name}")
            for name in ("zpopmin", "xadd", "hincrby", "sadd", "ssubscribe")
        ),
        ("-evalsha", "evalsha"),
        ("-ping", "ping"),
        ("-info", "info"),
    ],
)
async def test_what_an_access_list_lacks_is_named(
    start_valkey: StartValkey, without: str, named: str
) -> None:
    """The check names the pattern, channel or command that is missing, and the whole line.

    Fails when the check tries only a few commands on a key of one pattern.
    """
    rules = [rule for rule in store.ACCESS.split() if rule != without]
    rules += [without] if without.startswith("-") else []
    path = start_valkey(*DURABLE, "--user", "job", "on", f">{SECRET}", *rules).url
    message = await refusal(path.replace("unix://", f"unix://job:{SECRET}@"))
    before, _, line = message.partition("for ACL SETUSER, ")
    assert named in before
    assert line == store.ACCESS


async def test_a_pattern_that_may_only_be_read_is_named(start_valkey: StartValkey) -> None:
    """Fails when the check only reads a key of each pattern."""
    rules = store.ACCESS.replace(" ~lock:holdoff:*", " %R~lock:holdoff:*").split()
    path = start_valkey(*DURABLE, "--user", "job", "on", f">{SECRET}", *rules).url
    message = await refusal(path.replace("unix://", f"unix://job:{SECRET}@"))
    assert "lacks for our user: ~lock:holdoff:*;" in message


@pytest.mark.parametrize(
    ("option", "words"),
    [("--maxmemory", "is out of memory"), ("--min-replicas-to-write", "start its replicas")],
)
async def test_a_store_that_takes_no_writes_is_refused(
    start_valkey: StartValkey, option: str, words: str
) -> None:
    """Fails when the check itself writes nothing, as when it judges the store again later."""
    assert words in await refusal(start_valkey(*DURABLE, option, "1").url)


async def test_the_documented_access_list_is_enough(
    start_valkey: StartValkey, tmp_path: Path
) -> None:
    """A coordinator serves as a user with these rights alone.

    Leases, wake-ups, budgets, sweeps, and custody.
    """
    page = (Path(__file__).parents[2] / "docs/operating.md").read_text(encoding="utf-8")
    assert f"ACL SETUSER holdoff on >PASSWORD {store.ACCESS}" in " ".join(
        page.replace("\\\n", " ").split()
    )
    url = start_valkey(*DURABLE, "--user", "job", "on", f">{SECRET}", *store.ACCESS.split()).url
    own = url.replace("unix://", f"unix://job:{SECRET}@")
    async with client_of(own) as client:
        await store.check(client)
        await Credentials(client).issue("job", 60, "test")
    keys = key_directory(tmp_path, "first")
    with Custodian(own, keys) as replica, redis.Redis.from_url(url) as admin:
        kept = replica.token()
        replica.put(kept)
        assert replica.list() == [[f"{kept}/grant"]]
        replica.delete(kept)
        token = replica.create_token(0.2)
        held = replica.hold(token)
        waiter = Waiter(replica, ask(token))
        waiter.waiting()
        replica.release(held)
        replica.renew(waiter.offer())
        wait_until(lambda: admin.exists("lock:{holdoff:sweeper}"))
        waiter.vanish()
        refused = {one["object"] for one in cast("Any", admin.acl_log())}
        assert refused <= {"config|get"}  # without which it only knows less


async def test_a_sweeper_that_stops_without_its_store_logs_no_fault(
    start_valkey: StartValkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails when the error of its last call to the store is dropped, which asyncio then logs."""
    with Cable(start_valkey().url.removeprefix("unix://")) as cable:
        async with client_of(f"redis://{cable.address}/0") as client:
            sweeper = Sweeper(Scripts(client, quarantine_us=0))
            cable.flows.clear()
            sweeping = asyncio.create_task(sweeper.sweep_forever())
            await asyncio.to_thread(wait_until, lambda: cable.received)
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)
            cable.cut()
            await sweeper.stop()
    sweeper._asked = None
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_the_check_tries_every_command() -> None:
    """Fails when a script uses a command that the check of an access list does not try."""
    folder = Path(store.__file__).parent / "lua"
    tried = set(re.findall(r"\{'([A-Z]+)'", (folder / "probe.lua").read_text()))
    used = {
        name
        for script in folder.glob("*.lua")
        for name in re.findall(r"redis\.p?call\('([A-Z]+)'", script.read_text())
    }
    # In a Cluster; without it the scripts only know less.
    assert used - {"CLUSTER"} <= tried


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ("redis_version:7.0.15", "Redis 7.0.15"),
        ("redis_version:6.2.6\r\nserver_name:redict", "Redis 6.2.6"),
        ("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:7.1.9", "Valkey 7.1.9"),
        ("role:master", "Redis None"),
    ],
)
async def test_an_old_server_is_refused(fields: str, named: str) -> None:
    """Versions before 7.2 are refused, Valkey by its own version and not the one it imitates."""
    info = f"# Server\r\n{fields}\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            replies = {b"INFO": f"${len(info)}\r\n{info}\r\n", b"PING": "+PONG\r\n"}
            writer.write(replies.get(words[0], "+OK\r\n").encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        message = await refusal(f"redis://127.0.0.1:{port}")
    assert f"is {named}: Redis or Valkey 7.2 or newer" in message


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{SECRET}@localhost/0",
        f"localhost:6379#{SECRET}",
        f"redis://user:{SECRET}/x@localhost:6379/0",
        f"redis://user:x#{SECRET}@localhost:6379/0",
        f"redis://user:x?{SECRET}@localhost:6379/0",
        f"redis://user:12/{SECRET}@localhost:6379/0",
        f"redis://localhost:{SECRET}",
        f"redis://localhost/{SECRET}",
        f"redis://:{SECRET}@/0",
        f"redis://:{SECRET}@[::1/0",
        f"redis://localhost?health_check_interval={SECRET}",
        f"redis://localhost?nonsense={SECRET}",
        f"unix://{SECRET}",
        "",
    ],
)
async def test_a_url_that_is_none_is_refused_unseen(url: str) -> None:
    """No part of a broken URL is repeated: any part of it may be the password."""
    with pytest.raises(StoreError) as caught:
        store.connect(url)
    assert "URL" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


async def test_a_script_is_never_sent_twice(start_valkey: StartValkey) -> None:
    """A lost reply is an error, not a second run. Fails with redis-py's default of ten retries."""
    server = start_valkey()
    async with client_of(f"{server.url}?socket_timeout=1") as client:
        await client.ping()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(RedisTimeoutError):
                await client.incr("runs")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await asyncio.sleep(0)
        assert int(await client.get("runs") or 0) <= 1
        assert await client.incr("runs") <= 2


async def test_a_cancellation_is_never_swallowed(valkey: Any) -> None:
    """A task that uses the store can be cancelled. Fails with redis-py's own way of sending.

    That is, on Python 3.11, where about half of these cancellations would be lost.
    """

    async def use_for_ever(client: Redis) -> None:
        while True:
            await client.get("no such key")

    async with client_of(valkey.url) as client:
        tasks = [asyncio.create_task(use_for_ever(client)) for _ in range(40)]
        for task in tasks:
            await asyncio.sleep(0.001)
            task.cancel()
        _, pending = await asyncio.wait(tasks, timeout=5)
        for task in pending:
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
    assert not pending


async def test_a_connection_that_the_server_closed_is_replaced(start_valkey: StartValkey) -> None:
    """An idle connection that is gone costs no error, since nothing was sent on it yet."""
    server = start_valkey()
    async with client_of(server.url) as client, client_of(server.url) as other:
        await client.ping()
        await other.client_kill_filter(_type="normal", skipme=True)
        (idle,) = client.connection_pool._available_connections
        assert idle._reader is not None
        async with asyncio.timeout(20):
            while not idle._reader.at_eof():  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.001)
        assert await client.ping()


async def test_a_store_that_is_away_is_known_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting is not repeated either: the caller is told and decides."""
    tried = mock.AsyncMock(side_effect=FileNotFoundError)
    monkeypatch.setattr(asyncio, "open_unix_connection", tried)
    async with client_of(f"unix://{tmp_path}/none.sock") as client:
        with pytest.raises(RedisConnectionError):
            await client.ping()
    assert tried.await_count == 1


async def test_two_replicas_on_a_new_store_learn_the_same_epoch(start_valkey: StartValkey) -> None:
    """The epoch is set once, whoever comes first. Fails when SET comes without NX."""
    async with client_of(start_valkey().url) as client:
        seen = await asyncio.gather(*(store.ensure_epoch(client, None) for _ in range(20)))
        assert len(set(seen)) == 1
        assert not seen[0].lost
        assert len(seen[0].epoch) == 32
        assert await store.ensure_epoch(client, seen[0].epoch) == seen[0]


async def test_a_store_that_forgot_its_epoch_is_lost_until_the_file_says_otherwise(
    start_valkey: StartValkey,
) -> None:
    """A vanished or changed epoch means lost data, also at a restart amid the quarantine."""
    async with client_of(start_valkey().url) as client:
        first = await store.ensure_epoch(client, None)
        await client.flushall()
        second = await store.ensure_epoch(client, first.epoch)
        assert second.lost
        assert second.epoch != first.epoch
        assert (await store.ensure_epoch(client, first.epoch)) == second
        assert (await store.ensure_epoch(client, "")).lost, "an emptied file remembers something"
        assert not (await store.ensure_epoch(client, second.epoch)).lost


def test_settings_come_from_the_environment_and_hide_the_url(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The URL is shown neither by the settings nor by an error about them."""
    monkeypatch.setenv("HOLDOFF_REDIS_URL", f"redis://:{SECRET}@localhost/0")
    settings = Settings()
    assert SECRET not in repr(settings)
    assert settings.store_url() == f"redis://:{SECRET}@localhost/0"
    monkeypatch.setenv("HOLDOFF_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="only one of data_dir, redis_url can be given") as caught:
        Settings()
    assert SECRET not in str(caught.value)


def test_the_url_may_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mounted secret is read without its line end, and an empty variable counts as none."""
    (tmp_path / "url").write_text("redis://localhost/0\n", encoding="utf-8")
    monkeypatch.setenv("HOLDOFF_REDIS_URL", "")
    monkeypatch.setenv("HOLDOFF_REDIS_URL_FILE", str(tmp_path / "url"))
    assert Settings().store_url() == "redis://localhost/0"


def test_a_preset_data_directory_is_no_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a unit or an image presets is used without a store URL, and gives way to one."""
    monkeypatch.setenv("HOLDOFF_DEFAULT_DATA_DIR", str(tmp_path))
    assert (Settings().data_dir, Settings().store_url()) == (tmp_path, None)
    url = SecretStr("redis://localhost/0")
    assert Settings(redis_url=url).store_url() == "redis://localhost/0"
    with pytest.raises(ValueError, match="only one of"):
        Settings(data_dir=tmp_path, redis_url=url)


def test_the_data_directory_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's state lies in /var/lib, a user's where XDG says, if that is an absolute path."""
    for name in ("HOLDOFF_DATA_DIR", "HOLDOFF_REDIS_URL", "HOLDOFF_REDIS_URL_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert Settings().data_dir == Path("/state/holdoff")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    assert Settings().data_dir == Path("/home/u/.local/state/holdoff")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Settings().data_dir == Path("/var/lib/holdoff")
