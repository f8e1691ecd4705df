"""Every kind of store that a URL may name, on real servers: opened, judged, followed.

That leases and budgets behave on each as they do on one server, the tests of leases and budgets
show, when HOLDOFF_TEST_STORE names the kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import grpc
import pytest
import redis
from redis.crc import key_slot

from holdoff.v1 import custody_service_pb2
from holdoff_coordinator import hub, store, wakeups
from holdoff_coordinator.scripts import shard_key
from holdoff_coordinator.store import Access, Assumed, StoreError
from holdoff_coordinator.wakeups import WakeUps
from tests import stores
from tests.cable import Cable
from tests.custodian import Custodian, key_directory, refused
from tests.harness import Replica, Waiter, ask, coordinator_command, refusal, wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartValkey
    from tests.stores import Store

SECRET = "sw0rdf1sh"
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
COORDINATOR = str(Path(sys.executable).with_name("holdoff-coordinator"))


@contextlib.asynccontextmanager
async def opened(url: str, **access: Any) -> AsyncIterator[Any]:
    """Give a client of a store."""
    client = store.connect(url, Access(**access))
    try:
        yield client
    finally:
        await client.aclose()


def app_in(node: stores.Node) -> str:
    """Return the name of a new app whose slot a node of a Cluster serves."""
    while True:
        app = uuid.uuid4().hex[:12]
        key = shard_key(app)
        with contextlib.suppress(redis.exceptions.MovedError):
            node.client.exists(key)
            return app


# Opening -------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis+cluster", "redis+sentinel"])
async def test_a_failover_that_loses_writes_is_warned_of(
    three_nodes: Store, watched_primary: Store, url: str
) -> None:
    """Stores with failovers are told to wait for replicas, each of their primaries by name."""
    chosen = three_nodes if "cluster" in url else watched_primary
    async with opened(chosen.url) as client:
        warnings = await store.check(client)
        assert store.describe(client).startswith(f"{url}://127.0.0.1:")
    told = [one for one in warnings if "min-replicas-to-write 1" in one]
    assert len(told) == len(chosen.primaries())
    for primary in three_nodes.nodes if "cluster" in url else ():
        assert any(f":{primary.port}/0" in one for one in told)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis+cluster://127.0.0.1:{single}", "is a single server, whose URL begins with redis:"),
        ("redis+sentinel://127.0.0.1:{sentinel}/other", "reports a running primary of that name"),
        ("redis+sentinel://127.0.0.1:{single}/main", "SENTINEL"),
        ("redis://127.0.0.1:{sentinel}", "redis+sentinel://host:26379/name-of-the-primary"),
        ("redis://127.0.0.1:{member}", "redis+cluster://host:6379,host:6379"),
        ("redis+cluster://127.0.0.1:1,127.0.0.1:2", "is it running"),
        ("redis+sentinel://127.0.0.1:1/main", "are they running"),
    ],
)
async def test_a_url_of_another_kind_is_told(
    three_nodes: Store, watched_primary: Store, url: str, words: str
) -> None:
    """Whoever names a store of another kind than it is reads which URL it has."""
    address = url.format(
        single=watched_primary.nodes[0].port,
        sentinel=watched_primary.sentinels[0].port,
        member=three_nodes.nodes[0].port,
    )
    async with opened(address) as client:
        with pytest.raises(StoreError, match=re.escape(words)):
            await store.check(client)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://127.0.0.1:1",
        "redis+sentinel://127.0.0.1:1/",
        "redis+sentinel://127.0.0.1:1/main/x",
        "redis+cluster://127.0.0.1:1/3",
        "redis+cluster://a:b:c",
        f"redis+cluster://:{SECRET}@127.0.0.1:1,/0",
        f"redis+cluster://:{SECRET}/@127.0.0.1:1",
        f"redis+sentinel://:{SECRET}@127.0.0.1:1/main?{SECRET}=1",
        f"redis+cluster://:{SECRET}@127.0.0.1:1?max_connections={SECRET}",
        "unix://:x@?db=1",
        "redis+postgres://127.0.0.1",
    ],
)
def test_a_url_that_cannot_be_is_refused_without_its_secret(url: str) -> None:
    """A URL of several hosts is refused at once and never repeated."""
    with pytest.raises(StoreError) as caught:
        store.connect(url)
    assert SECRET not in str(caught.value)


async def test_a_cluster_without_all_slots_is_refused() -> None:
    """What nobody serves cannot be used: the number of slots is told."""
    with stores.cluster(primaries=1) as whole:
        whole.nodes[0].run("CLUSTER", "DELSLOTSRANGE", 0, 9)
        async with opened(whole.url) as client:
            with pytest.raises(StoreError, match="10 of its 16384 slots are served by no node"):
                await store.check(client)


# Passwords -----------------------------------------------------------------


async def test_a_password_comes_from_a_file_and_may_change(tmp_path: Path) -> None:
    """A new password in the file is used by the next connection, without a restart.

    Fails when the file is read once.
    """
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    with stores.node(*DURABLE) as server:
        server.client.config_set("requirepass", SECRET)
        url = f"redis://127.0.0.1:{server.port}/0"
        async with opened(url, password_file=file) as client:
            assert await store.check(client) == []
            server.client.config_set("requirepass", f"{SECRET}-2")
            file.write_text(f"{SECRET}-2\n")
            await client.connection_pool.disconnect()
            assert await store.check(client) == []
            file.write_text("wrong")
            await client.connection_pool.disconnect()
            with pytest.raises(StoreError, match="user name and password"):
                await store.check(client)
            file.unlink()
            with pytest.raises(StoreError, match="password cannot be read from"):
                await store.check(client)
        with pytest.raises(StoreError, match="there is a file of one"):
            store.connect(url.replace("127", ":x@127"), Access(password_file=file))


async def test_sentinels_have_a_password_of_their_own(
    watched_primary: Store, tmp_path: Path
) -> None:
    """The Sentinels' user and password come from a file or the URL, and are not the server's."""
    file = tmp_path / "password"
    file.write_text(SECRET)
    for sentinel in watched_primary.sentinels:
        sentinel.run("ACL", "SETUSER", "job", "on", f">{SECRET}", "+@all")
    url = f"{watched_primary.url}?sentinel_username=job"
    async with opened(url, sentinel_password_file=file) as client:
        assert await client.ping()
    async with opened(f"{url}&sentinel_password={SECRET}") as client:
        assert await client.ping()
        assert SECRET not in store.describe(client)
    async with opened(f"{url}&sentinel_password=wrong") as client:
        with pytest.raises(StoreError, match="--redis-sentinel-password-file"):
            await store.check(client)


# TLS -----------------------------------------------------------------------


async def test_no_sentinel_is_forgotten(watched_primary: Store) -> None:
    """Many connections ask for the primary at once while one Sentinel is away; all stay known.

    Fails when calls share the order in which Sentinels are asked, as in redis-py.
    """
    _, *others = watched_primary.sentinels
    away, *there = [free_port(), *(one.port for one in others)]
    hosts = ",".join(f"127.0.0.1:{port}" for port in sorted([away, *there]))
    first = ",".join(f"127.0.0.1:{port}" for port in (away, *there))
    async with opened(f"redis+sentinel://{first}/main") as client:
        await asyncio.gather(*(client.ping() for _ in range(16)))
        assert store.describe(client) == f"redis+sentinel://{hosts}/main"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an authority, and a certificate for 127.0.0.1 from it."""
    folder = tmp_path_factory.mktemp("tls")
    stores.make_certificates(folder)
    return folder


@pytest.mark.parametrize("way", ["files", "query"])
async def test_tls_with_a_certificate_of_ours(certificates: Path, way: str) -> None:
    """The store's certificate is checked, ours is shown, and a lease is given over TLS.

    Fails when `connect` drops the files, or takes any certificate.
    """
    ca, cert, key = (certificates / name for name in ("ca.pem", "cert.pem", "key.pem"))
    with stores.node(*DURABLE) as server, stores.tls_proxy(server.port, certificates) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        async with opened(url) as client:
            with pytest.raises(StoreError, match="ssl_ca_certs=FILE"):
                await store.check(client)
        async with opened(url, ca_file=ca) as client:
            with pytest.raises(StoreError, match=r"no TLS with|cannot be reached|does not answer"):
                await store.check(client)
        files = {"ca_file": ca, "cert_file": cert, "key_file": key}
        if way == "query":
            url += f"?ssl_ca_certs={ca}&ssl_certfile={cert}&ssl_keyfile={key}"
            files = {}
        async with opened(url, **files) as client:
            assert await store.check(client) == []
            assert store.describe(client) == f"rediss://127.0.0.1:{port}/0"
        if way == "query":
            with Replica(url) as replica:
                token = await asyncio.to_thread(replica.create_token)
                await asyncio.to_thread(replica.hold, token)


def test_files_for_tls_without_tls_are_refused(tmp_path: Path) -> None:
    """Who names an authority and writes redis:// is told, instead of going without TLS."""
    with pytest.raises(StoreError, match="begins with rediss"):
        store.connect("redis://127.0.0.1:1/0", Access(ca_file=tmp_path))


# What a managed store does not tell ------------------------------------------


async def test_what_a_store_does_not_tell_is_assumed(start_valkey: StartValkey) -> None:
    """`--assume` ends the warning where CONFIG is refused, and only there.

    Fails when what is assumed counts more than what the store says.
    """
    always = Assumed(noeviction=True, fsync="always")
    async with opened(start_valkey(*DURABLE, "--rename-command", "CONFIG", "").url) as client:
        (warning,) = await store.check(client)
        assert "--assume fsync=always" in warning
        assert await store.check(client, always) == []
        (warning,) = await store.check(client, Assumed(fsync="everysec"))
        assert "up to two seconds" in warning
    async with opened(start_valkey("--appendonly", "yes").url) as client:
        (warning,) = await store.check(client, always)
        assert "appendfsync everysec" in warning
    async with opened(start_valkey("--maxmemory-policy", "allkeys-lru").url) as client:
        with pytest.raises(StoreError, match="may evict keys"):
            await store.check(client, always)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--assume", "fsync"), "fsync=always"),
        (("--redis-ca-file", "x"), "give redis_url too"),
        (("--wait-replicas", "1"), "give redis_url too"),
        (("--wait-seconds", "5"), "--wait-seconds"),
        (("--redis-url", "rediss://a", "--redis-key-file", "x"), "give redis_cert_file too"),
        (("--redis-url", "redis://a", "--redis-password-file", "/nowhere"), "cannot read /nowhere"),
    ],
)
def test_options_that_make_no_sense_are_told(options: tuple[str, ...], words: str) -> None:
    """A wrong word, or a file for no store, ends the start with the remedy."""
    ended = coordinator_command("serve", *options)
    assert ended.exit_code == 64
    assert words in ended.stderr


# After a restore -------------------------------------------------------------


def test_after_a_restore_nothing_is_granted_at_first(start_valkey: StartValkey) -> None:
    """Known apps are held back at once, and apps made anew by coordinators that start then.

    Fails when `after_restore` leaves out the quarantine, or the mark for those that start.
    """
    url = start_valkey(*DURABLE).url
    with Replica(url) as replica:
        token = replica.create_token(0)
        app = token.partition("/tokens/")[0]
        held = replica.hold(token, ttl=60.0)
        ended = coordinator_command(
            "after-restore", "--redis-url", url, "--quarantine-seconds", "120"
        )
        assert ended.exit_code == 0, ended.stderr
        assert f"{app}: no new lease for 2m" in ended.stdout
        assert "new leases: 1;" in ended.stdout
        replica.renew(held)
        replica.release(held)
        assert refusal(lambda: replica.acquire(token)) == "QUARANTINED"
    lost = asyncio.run(epoch_of(url)).lost
    assert lost
    with Replica(url, epoch=store.Epoch("any", lost=lost)) as replica:
        assert refusal(lambda: replica.acquire(replica.create_token(0))) == "QUARANTINED"


async def epoch_of(url: str) -> store.Epoch:
    """Return what a coordinator that starts learns."""
    async with opened(url) as client:
        return await store.ensure_epoch(client, None)


def test_a_restored_directory_is_held_back_too(tmp_path: Path) -> None:
    """The embedded store is started for it, and ended, as a process."""
    (tmp_path / "valkey").mkdir()  # what a backup brought
    command = [COORDINATOR, "after-restore", "--data-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
    assert ended.returncode == 0, ended.stderr
    assert "new leases: 0;" in ended.stdout
    assert not (tmp_path / "valkey" / "valkey.sock").exists()


# Cluster -------------------------------------------------------------------


async def test_a_cluster_serves_apps_wherever_they_are(three_nodes: Store) -> None:
    """Every command finds its node, also when another one is asked first."""
    async with opened(three_nodes.url) as client:
        for node in three_nodes.nodes:
            key = shard_key(app_in(node))
            await client.set(key, b"here", px=5000)
            assert node.client.get(key) == b"here"
            assert await client.get(key) == b"here"


async def test_the_primaries_of_a_cluster_are_those_of_now() -> None:
    """After a failover that one command met, the store is checked at the node that took over.

    Found by chaos (seed 11609): for ever "is a replica", and so for ever in quarantine. Fails when
    `Cluster.primaries` goes on with what it knows, or one MOVED corrects only the slot it is for.
    """
    with stores.cluster(primaries=1, replicas=1) as made:
        before, after = made.nodes
        async with opened(made.url) as client:
            await store.check(client)
            after.run("CLUSTER", "FAILOVER")
            wait_until(lambda: (before.role(), after.role()) == ("slave", "master"))
            await client.set("a key", b"here", px=5000)
            await client.get("another")
            [known] = client.known_nodes()
            assert f":{after.port}/" in store.describe(known)
            await store.check(client)
            before.run("CLUSTER", "FAILOVER")
            wait_until(lambda: (before.role(), after.role()) == ("master", "slave"))
            await store.check(client)


def test_two_replicas_on_a_cluster_sweep_in_turn(three_nodes: Store) -> None:
    """One of them has the library's lock, whose two keys are in one slot; it is left at the end."""
    with stores.client_of(three_nodes.url) as client:
        with Replica(three_nodes.url), Replica(three_nodes.url):
            owner = wait_until(lambda: client.get("lock:{holdoff:sweeper}"))
            wait_until(lambda: client.pttl("lock:{holdoff:sweeper}") > 2500)
            assert client.get("lock:{holdoff:sweeper}") == owner
        assert client.get("lock:{holdoff:sweeper}") is None


def test_an_app_that_is_moved_key_by_key_is_refused(three_nodes: Store) -> None:
    """While only some of its keys have arrived, no script runs, and nothing is made anew.

    Fails when `Cluster` follows ASK.
    """
    here, there = three_nodes.nodes[:2]
    app = app_in(here)
    shard, slot = shard_key(app), key_slot(shard_key(app).encode())
    ids = {node.port: str(node.run("CLUSTER", "MYID"), "ascii") for node in (here, there)}
    with Replica(three_nodes.url) as replica:
        token = replica.create_token(0, name=f"apps/{app}/tokens/t")
        replica.release(replica.hold(token))
        there.run("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[here.port])
        here.run("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[there.port])
        here.run("MIGRATE", "127.0.0.1", there.port, shard, 0, 5000)
        assert refusal(lambda: replica.acquire(token)) == "STORE_UNAVAILABLE"
        assert there.run("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
        while rest := here.run("CLUSTER", "GETKEYSINSLOT", slot, 100):
            here.run("MIGRATE", "127.0.0.1", there.port, "", 0, 5000, "KEYS", *rest)
        for node in (there, here):
            node.run("CLUSTER", "SETSLOT", slot, "NODE", ids[there.port])
        wait_until(lambda: granted(replica, token))
        for node in (there, here):
            wait_until(functools.partial(is_at, node, shard, there.port))


def is_at(node: stores.Node, key: str, port: int) -> bool:
    """Whether a node of a Cluster knows where a key is."""
    try:
        node.client.exists(key)
    except redis.exceptions.MovedError as error:
        return bool(error.port == port)
    return node.port == port


def granted(replica: Replica, token: str) -> bool:
    """Whether a token is free, as the store says in the end."""
    try:
        return replica.acquire(token).HasField("offer")
    except grpc.RpcError:
        return False


async def test_wake_ups_follow_their_app(three_nodes: Store) -> None:
    """What a script tells is heard at whichever node has the app, also after its slot moved.

    Fails when `WakeUps` keeps the node at which it first heard an app.
    """
    here, there = three_nodes.nodes[:2]
    app = app_in(here)
    channel, slot = f"{shard_key(app)}:wake", key_slot(shard_key(app).encode())
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def tell_until_heard(node: stores.Node, word: str) -> None:
        async with asyncio.timeout(30):
            while True:
                await client.exists(channel)  # as ticks do: so the client learns where it is
                node.client.spublish(channel, word)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        while await heard.get() != (app, word):
                            pass
                        return

    async with opened(three_nodes.url) as client:
        wake_ups = WakeUps(client)
        listening = asyncio.create_task(wake_ups.listen_forever(lambda *woken: heard.put(woken)))
        with wake_ups.wanted(app):
            await tell_until_heard(here, "first")
            new = there.run("CLUSTER", "MYID")
            for node in (there, here, three_nodes.nodes[2]):
                node.run("CLUSTER", "SETSLOT", slot, "NODE", new)
            await tell_until_heard(there, "second")
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_wake_ups_leave_no_connection_behind_when_one_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that breaks while another app is added is closed, and another one is made.

    Fails when both tasks of a line reconnect: one of the connections is then never closed.
    """

    def reconnects(cable: Cable) -> bool:
        known = cable.connections
        cable.break_all()
        time.sleep(0.005)
        return cable.connections > known

    monkeypatch.setattr(wakeups, "LOOK_SECONDS", 0.01)
    with (
        stores.node() as node,
        Cable(f"127.0.0.1:{node.port}") as cable,
        contextlib.ExitStack() as wants,
    ):
        async with opened(f"redis://{cable.address}") as client:
            await client.ping()
            wake_ups = WakeUps(client)
            listening = asyncio.create_task(wake_ups.listen_forever(AsyncMock()))
            for _ in range(30):
                for _ in range(5):
                    wants.enter_context(wake_ups.wanted(uuid.uuid4().hex))
                    await asyncio.sleep(0)
                await asyncio.to_thread(wait_until, functools.partial(reconnects, cable))
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
    gc.collect()


def test_a_wake_up_is_heard_by_a_waiter_at_once(
    three_nodes: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the other replica the next waiter is offered the lease, also where no tick tells it."""
    monkeypatch.setattr(hub, "TICK_SECONDS", 3600.0)
    node = three_nodes.nodes[2]
    app = app_in(node)
    with Replica(three_nodes.url) as first, Replica(three_nodes.url) as second:
        token = first.create_token(0, name=f"apps/{app}/tokens/t")
        held = first.hold(token)
        waiter = Waiter(second, ask(token))
        waiter.waiting()
        channel = f"{shard_key(app)}:wake"
        wait_until(lambda: node.run("PUBSUB", "SHARDNUMSUB", channel) == [channel.encode(), 1])
        first.release(held)
        waiter.offer()
        waiter.vanish()


def test_a_node_that_hangs_holds_up_nobody_elsewhere() -> None:
    """Apps at other nodes are served while one node is silent.

    Fails when a look at who serves what waits for the silent node, or its calls take all
    connections.
    """
    options = ("--cluster-require-full-coverage", "no")
    with stores.cluster(*options, silence_ms=stores.SHORT_SILENCE_MS) as three:
        mute, *others = three.nodes
        with Replica(three.url) as replica:
            tokens = {
                node.port: replica.create_token(0, name=f"apps/{app_in(node)}/tokens/t")
                for node in three.nodes
            }
            waiters = [Waiter(replica, ask(tokens[mute.port])) for _ in range(100)]
            waiters[0].offer()
            os.kill(mute.process.pid, signal.SIGSTOP)
            try:
                slowest = 0.0
                until = time.monotonic() + 7.0  # calls to it end after five
                while time.monotonic() < until:
                    for node in others:
                        began = time.monotonic()
                        replica.release(replica.hold(tokens[node.port]))
                        slowest = max(slowest, time.monotonic() - began)
                    time.sleep(0.1)
            finally:
                os.kill(mute.process.pid, signal.SIGCONT)
            assert slowest < 4.5  # a call that waits for the mute node takes five
            for waiter in waiters:
                waiter.vanish()


# Custody -------------------------------------------------------------------


def test_one_grant_under_two_names_in_a_cluster(three_nodes: Store, tmp_path: Path) -> None:
    """It is refused also where the apps are on different nodes, and keys are rotated on all.

    Fails when a script of custody touches keys of two slots.
    """
    folder = key_directory(tmp_path, "first")
    with Custodian(three_nodes.url, folder) as one:
        tokens = [one.token(name=f"apps/{app_in(node)}/tokens/t") for node in three_nodes.nodes]
        secret = {"refresh_token": "one-for-all-that-nobody-may-read"}
        one.put(tokens[0], **secret)
        for token in tokens[1:]:
            assert refused(one.put, token, **secret).reason == "GRANT_DUPLICATE"
            one.put(token)
        key_directory(folder, "second")
        page = one.custody.RotateKeys(custody_service_pb2.RotateKeysRequest())
        assert (page.primary_key_id, page.resealed_count) == ("second", len(tokens))
        one.delete(tokens[0])
        one.put(tokens[1], replace=True, **secret)
