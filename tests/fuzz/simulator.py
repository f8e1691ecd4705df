"""HTTP of the simulated provider, byte by byte.

An input is what a client sends on one connection. No access token in it is valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from holdoff.simulator.seeds import Seed
from holdoff.simulator.server import serving
from tests.fuzz.engine import Target, edited, files
from tests.fuzz.requests import Log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuzz.engine import Check

ANSWER_SECONDS = 60.0
IDLE_SECONDS = 0.05
"""A request that is not whole has no answer: how long to wait for one. A late one is not seen."""
SEED = Seed()
_FORM = (
    f"grant_type=refresh_token&client_id={SEED.client_id}&client_secret={SEED.client_secret}"
    f"&refresh_token={SEED.refresh_token}"
).encode()
_AUTHORIZE = (
    f"client_id={SEED.client_id}&redirect_uri=http%3A%2F%2Fa%2Fb&response_type=code&state=1"
    f"&user={SEED.user}&code_challenge={'c' * 43}&code_challenge_method=S256"
).encode()
_FAULT = b'{"fault": "error", "count": 2, "status": 503}'
_PARTS = (
    b'--x\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\nrefresh_token\r\n'
    b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n1\r\n--x--\r\n'
)


def _request(line: bytes, body: bytes = b"", *headers: bytes) -> bytes:
    length = [b"Content-Length: %d" % len(body)] if body else []
    head = [line + b" HTTP/1.1", b"Host: simulator", *headers, *length]
    return b"\r\n".join([*head, b"", body])


VALID = [
    _request(b"POST /api/oauth2/token", _FORM, b"Content-Type: application/x-www-form-urlencoded"),
    _request(b"POST /api/oauth2/token", _PARTS, b"Content-Type: multipart/form-data; boundary=x"),
    _request(
        b"GET /api/v1/535193/crm/Accounts?$filter=Code%20eq%20'1'", b"", b"Authorization: Bearer x"
    ),
    _request(b"GET /api/oauth2/auth?" + _AUTHORIZE),
    _request(b"GET /api/v1/current/Me", b"", b"Authorization: Bearer x"),
    _request(b"HEAD /api/v1/535193//CRM/Accounts/$count", b"", b"Accept: application/json"),
    _request(b"POST /api/v1/535193/crm/Accounts", b'{"a": 1}', b"Content-Type: application/json"),
    _request(b"PUT /api/v1/535193/crm/Accounts(guid'1')", b"{}", b"Authorization: Bearer x"),
    _request(b"DELETE /api/v1/beta/535193/crm/Accounts(guid'1')", b"", b"Authorization: Bearer x"),
    _request(b"GET /docs/XMLDownload.aspx?Topic=Items&_Division_=535193&TSPaging=0x1"),
    _request(b"POST /docs/XMLUpload.aspx?Topic=Items", b"<eExact/>", b"Content-Type: text/xml"),
    *(_request(b"GET /_simulator/" + path) for path in (b"report", b"seed", b"faults")),
    _request(b"POST /_simulator/faults", _FAULT, b"Content-Type: application/json"),
    _request(b"DELETE /_simulator/faults"),
    _request(
        b"POST /_simulator/clock", b'{"advance_seconds": 575}', b"Content-Type: application/json"
    ),
]
WORDS = [
    *(b"response_type=token", b"grant_type=authorization_code", b"code=", b"redirect_uri=x:"),
    *(b"Authorization: Basic ", b"Authorization: Basic YTpi\r\n", b"=&", b"code_verifier=a"),
    *(b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xc3", b" ", b"%", b"%00", b"%ff", b"%2e%2e/", b"&"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"Expect: 100-continue\r\n", b"Upgrade: x\r\n"),
    *(b"Content-Type: multipart/form-data; boundary=x\r\n", b"Content-Type: text/plain\r\n"),
    *(b"Content-Type: application/json; charset=nonsense\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"Content-Type: application/x-www-form-urlencoded; charset=utf-16\r\n", b"HTTP/9.9", b"--x"),
    *(
        b'; name="a"',
        b"filename*=UTF-8''%ff",
        b"Content-Transfer-Encoding: base64\r\n",
        b"charset=",
    ),
    *(b"current", b"9" * 30, b"-1", b"'", b"''", b"(", b")", b"guid'1'", b" and ", b"/" * 50),
    *(b'"seconds": 1e400', b'"count": 0', b'"hang"', b"[[[[[[", b"\\ud800", b"NaN", b"null"),
]


@contextlib.contextmanager
def opened() -> Iterator[Check]:
    """Run a simulator; a request is answered, with no 500, and the next one too."""
    log = Log()
    logging.getLogger().addHandler(log)
    ready: SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event, str]] = SimpleQueue()

    async def serve() -> None:
        stop = asyncio.Event()
        # Where time is that fast, a fault that hangs ends at once.
        async with serving(time_scale=1e6) as url:
            ready.put((asyncio.get_running_loop(), stop, url))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    loop, stop, url = ready.get(timeout=ANSWER_SECONDS)
    port = int(url.rpartition(":")[2])

    def check(data: bytes) -> None:
        log.lines.clear()
        answer = exchange(port, data, IDLE_SECONDS)
        # aiohttp logs too what is no HTTP, and was answered with 400, and a client that went away.
        usual = ("aiohttp.http_exceptions", "ConnectionResetError")
        lines = [line for line in log.lines if not any(one in line for one in usual)]
        assert not lines, "the log has: " + "\n".join(lines[:3])
        for status, rest in re.findall(rb"HTTP/1\.[01] (\d{3}) ([^\r]*)", answer):
            injected = b"injected fault" in answer
            assert status < b"500" or injected, f"{status!r} {rest!r}"
        exchange(port, _request(b"DELETE /_simulator/faults", b"", b"Connection: close"))
        report = exchange(port, _request(b"GET /_simulator/report", b"", b"Connection: close"))
        assert report.startswith(b"HTTP/1.1 200 "), "it does not serve any more"

    try:
        yield check
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(ANSWER_SECONDS)
        logging.getLogger().removeHandler(log)
    assert not thread.is_alive(), "it does not stop"


def exchange(port: int, data: bytes, idle_seconds: float = ANSWER_SECONDS) -> bytes:
    """Send some bytes; return what is answered, until the connection ends or is idle."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as connection,
        contextlib.suppress(ConnectionError, TimeoutError),
    ):
        connection.sendall(data)
        connection.settimeout(idle_seconds)
        while piece := connection.recv(65536):
            answer += piece
    return answer


TARGETS = {"simulator": Target(edited(files("simulator", *VALID), WORDS), opened)}
