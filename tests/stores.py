"""Clusters, and primaries with Sentinels, of real servers on free ports of 127.0.0.1.

They are slow to start. A test of a failover asks for servers that are soon missed; others are
not, so that a busy machine makes no failover.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import ssl
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import redis
import trustme
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.retry import Retry

from holdoff_coordinator import embedded
from tests.cable import Cable
from tests.e2e.service import Service
from tests.harness import wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SILENCE_MS = 10_000
SHORT_SILENCE_MS = 1500
"""Time without a sign of life after which a server counts as gone."""
START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running Valkey."""

    url: str
    pid: int


@dataclass(slots=True)
class Node:
    """One server, or one Sentinel."""

    port: int
    process: subprocess.Popen[bytes]
    client: redis.Redis
    folder: Path
    """Where it runs, and keeps its files."""
    launch: Callable[[], subprocess.Popen[bytes]]
    cable: Cable | None = None
    """What stands between it and all others, if anything does."""

    @property
    def address(self) -> str:
        """Where others reach it."""
        return self.cable.address if self.cable else f"127.0.0.1:{self.port}"

    @property
    def public_port(self) -> int:
        """The port of that address."""
        return int(self.address.rpartition(":")[2])

    def restart(self) -> None:
        """Start it again after its end, with the files that it left."""
        self.process = self.launch()

    def run(self, *command: str | int) -> Any:
        """Run a command that redis-py has no method for."""
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait()

    def role(self) -> str:
        """Return what it says that it is."""
        return str(self.client.info("replication")["role"])


@dataclass(slots=True)
class Store:
    """What a URL names, and the servers behind it."""

    url: str
    nodes: list[Node]
    sentinels: list[Node] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Process id of the first server."""
        return self.nodes[0].process.pid

    def primaries(self) -> list[Node]:
        """Return the servers that live and take writes."""
        living = [node for node in self.nodes if node.process.poll() is None]
        return [node for node in living if node.role() == "master"]


@contextlib.contextmanager
def node(
    *options: str,
    config: str | None = None,
    cabled: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Node]:
    """Run a server on a free port; with a configuration as Sentinel.

    Args:
        options: Of the server.
        config: Of the Sentinel.
        cabled: Whether it tells others the address of a `Cable` that leads to it.
        environment: Variables of its own. Its files are in its working directory.
    """
    port = free_port()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="holdoff-", ignore_cleanup_errors=True)
        )
        cable = stack.enter_context(Cable(f"127.0.0.1:{port}", keeps=False)) if cabled else None
        arguments = ["--port", str(port), "--bind", "127.0.0.1"]
        if config is None:
            # A replica is there at once instead of after five seconds.
            quick = ("--repl-diskless-sync-delay", "0")
            arguments += ["--save", "", "--appendonly", "no", *quick, *options]
            if cable:
                kind = "cluster" if "--cluster-enabled" in options else "replica"
                arguments += [f"--{kind}-announce-port", cable.address.rpartition(":")[2]]
        else:
            settings = Path(folder, "sentinel.conf")
            settings.write_text(f"port {port}\nbind 127.0.0.1\ndir {folder}\n{config}")
            arguments = [str(settings), "--sentinel"]

        def launch() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                embedded.command(*arguments),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C", **environment},
            )

        client = stack.enter_context(redis.Redis("127.0.0.1", port, socket_timeout=5))
        one = Node(port, launch(), client, Path(folder), launch, cable)
        try:
            wait_until(lambda: _answers(one), START_SECONDS)
            yield one
        finally:
            one.kill()


def _answers(one: Node) -> bool:
    assert one.process.poll() is None, "the server ended"
    once = Retry(NoBackoff(), 0)
    with (
        contextlib.suppress(redis.ConnectionError),
        redis.Redis("127.0.0.1", one.port, retry=once) as client,
    ):
        return bool(client.ping())
    return False


@contextlib.contextmanager
def cluster(
    *options: str,
    primaries: int = 3,
    replicas: int = 0,
    silence_ms: int = SILENCE_MS,
    **of_nodes: Any,
) -> Iterator[Store]:
    """Run a Cluster whose primaries share the slots; the first ones have a replica each.

    `of_nodes` is what `node` takes beside the options.
    """
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                node(
                    *("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
                    *("--cluster-node-timeout", str(silence_ms)),
                    *("--cluster-replica-validity-factor", "0", *options),
                    **of_nodes,
                )
            )
            for _ in range(primaries + replicas)
        ]
        for number, one in enumerate(nodes):
            one.run("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < primaries:
                first, end = (16384 * place // primaries for place in (number, number + 1))
                one.run("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            bus = str(one.client.config_get("cluster-port")["cluster-port"])
            nodes[0].run("CLUSTER", "MEET", "127.0.0.1", one.port, bus)
        wait_until(lambda: all(_is_whole(one, len(nodes)) for one in nodes), START_SECONDS)
        for primary, replica in zip(nodes, nodes[primaries:], strict=False):
            replica.run("CLUSTER", "REPLICATE", primary.run("CLUSTER", "MYID"))
            wait_until(functools.partial(_is_linked, replica), START_SECONDS)
        wait_until(
            lambda: all(
                str(one.run("CLUSTER", "NODES")).count("slave") == replicas for one in nodes
            ),
            START_SECONDS,
        )
        hosts = ",".join(one.address for one in nodes)
        yield Store(f"redis+cluster://{hosts}", nodes)


def _is_whole(one: Node, size: int) -> bool:
    state = one.run("CLUSTER INFO")
    return (state["cluster_state"], state["cluster_known_nodes"]) == ("ok", str(size))


def _is_linked(one: Node) -> bool:
    return bool(one.client.info("replication").get("master_link_status") == "up")


@contextlib.contextmanager
def watched(
    *options: str, replicas: int = 2, silence_ms: int = SILENCE_MS, **of_nodes: Any
) -> Iterator[Store]:
    """Run a primary with replicas, and three Sentinels that watch it and know them.

    `of_nodes` is what `node` takes beside the options.
    """
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(node(*options, **of_nodes))
        follow = ("--replicaof", "127.0.0.1", str(primary.public_port))
        followers = [
            stack.enter_context(node(*follow, *options, **of_nodes)) for _ in range(replicas)
        ]
        for one in followers:
            wait_until(functools.partial(_is_linked, one), START_SECONDS)
        config = (
            f"sentinel monitor main 127.0.0.1 {primary.public_port} 2\n"
            f"sentinel down-after-milliseconds main {silence_ms}\n"
            "sentinel failover-timeout main 5000\n"
        )
        sentinels = [stack.enter_context(node(config=config)) for _ in range(3)]
        for one in sentinels:
            # They find each other soon, and mistrust no clock because the machine is busy.
            one.run("SENTINEL", "DEBUG", "PUBLISH-PERIOD", 300, "INFO-PERIOD", 1000)
            one.run("SENTINEL", "DEBUG", "TILT-TRIGGER", 20_000)
        for one in sentinels:
            wait_until(functools.partial(_knows, one, replicas), START_SECONDS)
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        yield Store(f"redis+sentinel://{hosts}/main", [primary, *followers], sentinels)


def _knows(sentinel: Node, replicas: int) -> bool:
    known: Any = sentinel.client.sentinel_master("main")
    slaves: Any = sentinel.client.sentinel_slaves("main")
    return (known["num-slaves"], known["num-other-sentinels"]) == (replicas, 2) and not any(
        one["is_sdown"] for one in slaves
    )


@contextlib.contextmanager
def client_of(url: str) -> Iterator[redis.Redis]:
    """Give a plain client of a store of any kind."""
    scheme, _, rest = url.partition("://")
    hosts, _, primary = rest.partition("/")
    addresses = [(host, int(port)) for host, port in re.findall(r"([\d.]+):(\d+)", hosts)]
    with contextlib.ExitStack() as stack:
        client: Any
        if scheme == "redis+cluster":
            nodes = [ClusterNode(*address) for address in addresses]  # type: ignore[no-untyped-call]
            client = redis.RedisCluster(startup_nodes=nodes)
        elif scheme == "redis+sentinel":
            sentinel: Any = redis.Sentinel(addresses)  # type: ignore[no-untyped-call]
            client = sentinel.master_for(primary)
        else:
            client = redis.Redis.from_url(url)
        stack.callback(client.close)
        yield client


@contextlib.contextmanager
def of_kind(kind: str, folder: Path) -> Iterator[Store | Server]:
    """Give a store of the kind that HOLDOFF_TEST_STORE names."""
    with contextlib.ExitStack() as stack:
        match kind:
            case "embedded":
                service = stack.enter_context(Service(folder))
                socket_path = service.data_dir / "valkey" / "valkey.sock"
                yield Server(f"unix://{socket_path}", service.valkey_pid())
            case "server":
                one = stack.enter_context(node("--appendonly", "yes", "--appendfsync", "always"))
                yield Store(f"redis://127.0.0.1:{one.port}/0", [one])
            case "cluster":
                yield stack.enter_context(cluster())
            case "sentinel":
                yield stack.enter_context(watched())
            case _:
                raise ValueError(f"HOLDOFF_TEST_STORE: no such kind of store: {kind}")


def make_certificates(folder: Path) -> None:
    """Make an authority, and a certificate for 127.0.0.1 that servers and clients may use."""
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    leaf.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    leaf.private_key_pem.write_to_path(folder / "key.pem")


@contextlib.contextmanager
def tls_proxy(port: int, certificates: Path) -> Iterator[int]:
    """Speak TLS in front of a server, for clients that show a certificate; give its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while some := await reader.read(65536):
                writer.write(some)
                await writer.drain()
        writer.close()

    async def serve(outer: asyncio.StreamReader, to_outer: asyncio.StreamWriter) -> None:
        inner, to_inner = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(outer, to_inner), copy(inner, to_outer))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)

    async def end(server: asyncio.Server) -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(10)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        asyncio.run_coroutine_threadsafe(end(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
