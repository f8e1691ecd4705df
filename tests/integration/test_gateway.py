"""A gateway over real sockets: trust, held calls, bad requests and upstreams, large bodies."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import pytest
import requests
from aiohttp import web

import holdoff
from holdoff import testing
from holdoff.gateway.server import Options
from holdoff.gateway.serving import GatewayThread
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOLDOFF = str(Path(sys.executable).with_name("holdoff"))
LARGE_BYTES = 1 << 26


class Upstream:
    """An API in a thread, which answers as a test says."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], int]] = []
        """Method, raw target, headers and length of the body of each request."""
        self.answer: Callable[[web.Request], Any] = lambda _: web.Response(text="ok")
        self.address = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, auto_decompress=False)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        connections = runner.server.connections if runner.server else []
        transports = [one.transport for one in connections if one.transport]
        await runner.cleanup()
        for transport in transports:
            transport.abort()
        await asyncio.sleep(0)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        size = 0
        async for part in request.content.iter_any():
            size += len(part)
        self.seen.append((request.method, request.raw_path, dict(request.headers), size))
        answer = self.answer(request)
        found: web.StreamResponse = await answer if asyncio.iscoroutine(answer) else answer
        return found


@dataclass
class World:
    """A gateway before an upstream of ours."""

    url: str
    upstream: Upstream
    custody: testing.Custody
    client: holdoff.Client

    @property
    def secret(self) -> str:
        """Of the gateway."""
        return self.url.rpartition("/")[2]

    @property
    def port(self) -> int:
        """Of the gateway."""
        return int(self.url.split(":")[2].partition("/")[0])

    def last(self) -> dict[str, str]:
        """Return the headers that came last."""
        return self.upstream.seen[-1][2]


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    """Give a coordinator, an upstream and a gateway that the tests share."""
    with (
        Upstream() as upstream,
        testing.custody(upstream.address) as custody,
        holdoff.Client(custody.endpoint) as client,
        _gateway(custody, upstream) as url,
    ):
        yield World(url, upstream, custody, client)


@contextlib.contextmanager
def _gateway(custody: testing.Custody, upstream: Upstream, **options: Any) -> Iterator[str]:
    thread = GatewayThread(
        custody.endpoint, custody.token, Options(**options), upstream=upstream.address
    )
    with thread as gateway:
        # Until the first access token is there.
        wait_until(lambda: requests.get(f"{gateway.url}/first", timeout=60).status_code != 503)
        upstream.seen.clear()
        yield gateway.url


@pytest.fixture
def world(shared: World) -> World:
    """Give it with an upstream that answers well."""
    shared.upstream.seen.clear()
    shared.upstream.answer = lambda _: web.Response(text="ok")
    return shared


def raw(world: World, data: bytes) -> bytes:
    """Send bytes, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", world.port), 30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65_536):
            found += part
        return found


def test_the_access_token_goes_upstream_only(world: World) -> None:
    """It replaces what the job sends; the target and the rest stay as they are."""
    headers = {"Cookie": "a=1", "X-Own": "kept", "Accept-Encoding": "identity"}
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=30)
    connection.request("GET", f"/{world.secret}/x%2e/%24a?b=%2C&c", headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert (answer.status, text) == (200, "ok")
    method, target, seen, _ = world.upstream.seen[-1]
    assert (method, target) == ("GET", "/x%2e/%24a?b=%2C&c")
    assert seen["Cookie"] == "a=1"
    assert seen["X-Own"] == "kept"
    assert seen["Host"] == world.upstream.address
    assert seen["Authorization"].startswith("Bearer ")
    assert "holdoff-si." not in seen["Authorization"]
    assert seen["Authorization"].partition(" ")[2] not in str(answer.headers) + text


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/x", {"Authorization": "Bearer foreign"}, 401),
        ("/x", {"Authorization": "Basic Zm9yZWlnbg=="}, 401),
        ("/x", {"Origin": "http://evil.example"}, 403),
        ("/x", {"Host": "evil.example"}, 421),
        ("/x", {"Upgrade": "websocket", "Connection": "Upgrade"}, 501),
    ],
)
def test_what_is_refused(world: World, path: str, headers: dict[str, str], status: int) -> None:
    """Nothing of it reaches the upstream."""
    answer = requests.get(f"{world.url}{path}", headers=headers, timeout=30)
    assert answer.status_code == status
    assert answer.headers["Holdoff-Reason"]
    assert world.upstream.seen == []


def test_a_stand_in_of_another_run_is_refused(world: World) -> None:
    """And one of this run is not."""
    form = {"grant_type": "refresh_token", "refresh_token": "x"}
    with _gateway(world.custody, world.upstream) as other:
        foreign = requests.post(f"{other}/api/oauth2/token", data=form, timeout=30).json()
    own = requests.post(f"{world.url}/api/oauth2/token", data=form, timeout=30).json()
    for answer, status in ((own, 200), (foreign, 401)):
        header = {"Authorization": f"Bearer {answer['access_token']}"}
        assert requests.get(f"{world.url}/x", headers=header, timeout=30).status_code == status


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(500)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
    ids=range(10),
)
def test_bad_requests(world: World, data: bytes) -> None:
    """Smuggling, folded and huge headers, other protocols and targets get a 4xx or nothing."""
    secret = world.secret.encode()
    answer = raw(world, data.replace(b"GET / ", b"GET /" + secret + b"/x "))
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:200]
    assert world.upstream.seen == []


def test_a_dead_access_token_is_not_sent_again(world: World) -> None:
    """A GET is repeated with the next one if there is any; a POST is not."""
    dead = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    with _gateway(world.custody, world.upstream, hold_seconds=0.5) as url:
        world.upstream.answer = lambda _: web.Response(status=401, headers=dead)
        assert requests.get(f"{url}/x", timeout=30).status_code == 401
        assert requests.post(f"{url}/x", data=b"a", timeout=30).status_code == 401
    assert [method for method, *_ in world.upstream.seen] == ["GET", "POST"]


def test_a_scope_that_backs_off(world: World) -> None:
    """The call is held, then answered with 429; it is made when the back-off ends meanwhile."""
    with _gateway(world.custody, world.upstream, hold_seconds=0.3) as url:
        found = world.client.set_back_off(world.custody.token, 60, "maintenance")
        answer = requests.get(f"{url}/x", timeout=30)
        assert (answer.status_code, answer.headers["Holdoff-Reason"]) == (429, "budget")
        assert 50 < int(answer.headers["Retry-After"]) <= 60
        assert world.upstream.seen == []
        held = threading.Thread(
            target=requests.get, args=(f"{world.url}/x",), kwargs={"timeout": 60}
        )
        held.start()
        world.client.clear_back_off(found.name, "over")
        held.join(30)
        wait_until(lambda: len(world.upstream.seen) == 1)


def test_a_block_of_the_provider_holds_the_next_call(world: World) -> None:
    """429 with Retry-After is passed on, and no further call is sent."""
    token = world.custody.token
    with _gateway(world.custody, world.upstream, hold_seconds=0.2) as url:
        world.upstream.answer = lambda _: web.Response(status=429, headers={"Retry-After": "77"})
        first = requests.get(f"{url}/x", timeout=30)
        assert (first.status_code, "Holdoff-Reason" in first.headers) == (429, False)
        wait_until(lambda: [*world.client.list_back_offs(token.partition("/tokens/")[0])])
        second = requests.get(f"{url}/x", timeout=30)
        assert (second.status_code, second.headers["Holdoff-Reason"]) == (429, "budget")
    assert len(world.upstream.seen) == 1
    for one in world.client.list_back_offs(token.partition("/tokens/")[0]):
        world.client.clear_back_off(one.name, "over")


def test_an_upstream_that_is_away(world: World) -> None:
    """502 with the reason; the gateway goes on."""

    async def reset(request: web.Request) -> web.Response:
        assert request.transport
        request.transport.abort()
        return web.Response()

    world.upstream.answer = reset
    answer = requests.get(f"{world.url}/x", timeout=30)
    assert (answer.status_code, answer.headers["Holdoff-Reason"]) == (502, "upstream")
    world.upstream.answer = lambda _: web.Response(text="again")
    assert requests.get(f"{world.url}/x", timeout=30).text == "again"


def test_an_answer_that_breaks_off(world: World) -> None:
    """The job notices: the connection ends before the announced length."""

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport
        request.transport.close()
        return response

    world.upstream.answer = half
    with pytest.raises(requests.RequestException):
        requests.get(f"{world.url}/x", timeout=30)


def test_large_bodies_in_constant_memory(world: World) -> None:
    """Both ways; compressed ones stay so.

    Fails when a body is read before it is passed on.
    """

    async def large(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await response.prepare(request)
        for _ in range(LARGE_BYTES // 65_536):
            await response.write(b"x" * 65_536)
        return response

    world.upstream.answer = large
    process = subprocess.Popen(
        [
            *(HOLDOFF, "--endpoint", world.custody.endpoint, "gateway", "--token"),
            *(world.custody.token, "--listen", "127.0.0.1:0", "--upstream", world.upstream.address),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        url = process.stdout.readline().strip()
        assert requests.get(f"{url}/small", timeout=30, stream=True).status_code == 200
        before = _memory(process.pid)

        def parts() -> Iterator[bytes]:
            for _ in range(LARGE_BYTES // 65_536):
                yield b"y" * 65_536

        size = 0
        with requests.post(f"{url}/x", data=parts(), timeout=60, stream=True) as answer:
            assert answer.headers["Content-Encoding"] == "gzip"
            while part := answer.raw.read(65_536, decode_content=False):
                size += len(part)
        assert size == LARGE_BYTES
        assert world.upstream.seen[-1][3] == LARGE_BYTES
        assert _memory(process.pid) - before < LARGE_BYTES // 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def _memory(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def test_calls_in_flight_end_and_new_ones_are_refused(world: World) -> None:
    """A gateway that ends waits for them."""
    go = threading.Event()

    async def slow(request: web.Request) -> web.Response:
        if request.path == "/slow":
            await asyncio.to_thread(go.wait, 60)
        return web.Response()

    world.upstream.answer = slow
    thread = GatewayThread(
        world.custody.endpoint, world.custody.token, upstream=world.upstream.address
    )
    await asyncio.to_thread(thread.__enter__)
    async with aiohttp.ClientSession() as session:
        late = asyncio.create_task(_text(session, f"{thread.url}/slow"))
        await asyncio.to_thread(wait_until, lambda: world.upstream.seen)
        ending = asyncio.create_task(asyncio.to_thread(thread.__exit__))
        while (found := await _text(session, f"{thread.url}/new"))[0] != 503:
            assert found[0] == 200
        assert found[1] == "draining"
        go.set()
        assert await late == (200, "")
        await ending


async def _text(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as answer:
        return answer.status, answer.headers.get("Holdoff-Reason", "")


def test_the_socket_is_its_owner_s(world: World, tmp_path: Path) -> None:
    """A Unix socket needs no secret; nobody else can open it."""
    path = tmp_path / "gateway.sock"
    process = subprocess.Popen(
        [
            *(HOLDOFF, "--endpoint", world.custody.endpoint, "gateway", "--token"),
            *(world.custody.token, "--listen", f"unix:{path}"),
            *("--upstream", world.upstream.address),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline().strip() == str(path)
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: any\r\nConnection: close\r\n\r\n")
            found = b""
            while part := connection.recv(65_536):
                found += part
        assert found.startswith(b"HTTP/1.1 200")
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_run_with_a_gateway(tmp_path: Path) -> None:
    """Its command calls the API without any token; nothing of the gateway is left at the end."""
    script = 'curl --silent --fail "$HOLDOFF_GATEWAY_URL/api/v1/current/Me" | head -c 200; env'
    with testing.custody() as custody:
        done = subprocess.run(
            [HOLDOFF, "run", "--token", custody.token, "--gateway", "--", "sh", "-c", script],
            env={
                **os.environ,
                "HOLDOFF_ENDPOINT": custody.endpoint,
                "XDG_STATE_HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "<feed" in done.stdout
        report = requests.get(f"{custody.provider}/_simulator/report", timeout=30).json()
    assert report["token_requests"]["accepted"] == 1
    assert report["violations"] == []
    url = next(
        line.partition("=")[2]
        for line in done.stdout.splitlines()
        if line.startswith("HOLDOFF_GATEWAY_URL=")
    )
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "0.0.0.0:8377"], "this host only"),
        (["--listen", "nothing"], "neither HOST:PORT nor unix:PATH"),
        (["--tls", "auto"], "--ca-out belong together"),
        (["--listen", "unix:/x", "--tls", "a,b"], "needs no TLS"),
        (["--tls", "missing.pem,missing.key"], "No such file"),
        (["--upstream", "elsewhere.example"], "--upstream"),
    ],
)
def test_wrong_options(world: World, options: list[str], words: str) -> None:
    """Each is named, with the remedy."""
    done = subprocess.run(
        [
            *(HOLDOFF, "--endpoint", world.custody.endpoint, "gateway"),
            *("--token", world.custody.token, *options),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_url_is_in_a_file(world: World, tmp_path: Path) -> None:
    """So that the secret is in no log; the file is gone at the end."""
    path = tmp_path / "gateway.url"
    process = subprocess.Popen(
        [
            *(HOLDOFF, "--endpoint", world.custody.endpoint, "gateway", "--token"),
            *(world.custody.token, "--listen", "127.0.0.1:0", "--url-file", str(path)),
            *("--upstream", world.upstream.address),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(path.exists)
        url = path.read_text().strip()
        assert path.stat().st_mode & 0o777 == 0o600
        assert requests.get(f"{url}/x", timeout=30).text == "ok"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert url.rpartition("/")[2] not in output
        assert not path.exists()
    finally:
        process.kill()
        process.communicate()
