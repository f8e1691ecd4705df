"""Requests to token URLs, each sent from a process of its own."""

from __future__ import annotations

import asyncio
import base64
import gzip
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import aiohttp
import pytest
import trustme

from holdoff.simulator import Seed, serving
from holdoff_coordinator.custody import sending as sending_module
from holdoff_coordinator.custody import spool
from holdoff_coordinator.custody.outcomes import (
    Answered,
    Failure,
    NoProof,
    NotSent,
    Outcome,
    boottime_us,
)
from holdoff_coordinator.custody.sending import Authentication, Connected, Reach, Sending
from holdoff_coordinator.custody.spool import Spooling
from tests.token_urls import (
    DONE,
    LOOPBACK,
    PATIENT,
    SECOND,
    a_request,
    read_request,
    reset,
    send,
    token_url,
    until,
)

KEY = bytes(range(32))
SEED = Seed()


def failure(outcome: Outcome) -> tuple[type, Failure]:
    """Return what to compare with."""
    assert isinstance(outcome, NotSent | NoProof), outcome
    return type(outcome), outcome.why


def ended(sending: Sending) -> bool:
    """Tell whether the sender ended."""
    assert sending._sender is not None
    return sending._sender.poll() is not None


def answers(folder: Path) -> list[Outcome]:
    """Open what lies in the spool."""
    files = map(Path, spool.answers(str(folder)))
    return [spool.read(file.read_bytes(), unwrapped).outcome for file in files]


def unwrapped(wrapped: bytes) -> bytes:
    """Open the key of a file of the spool, as the keyring would."""
    assert wrapped == b"wrapped"
    return KEY


@pytest.fixture
def spooling(tmp_path: Path) -> Spooling:
    """Return a place for an answer."""
    return Spooling(str(tmp_path / "attempt-1"), bytearray(KEY), b"wrapped")


# Answers -------------------------------------------------------------------------------------


async def test_a_refresh(spooling: Spooling, tmp_path: Path) -> None:
    """The provider's answer arrives whole, and lies in the spool before it is reported."""
    async with serving() as url:
        request = a_request(
            f"{url}/api/oauth2/token",
            client_id=SEED.client_id,
            client_secret=bytearray(SEED.client_secret.encode()),
            secret_form={"refresh_token": bytearray(SEED.refresh_token.encode())},
        )
        before_us = boottime_us()
        outcome = await send(request, spooling=spooling)
    assert isinstance(outcome, Answered)
    assert outcome.received.status == 200
    assert b'"access_token"' in outcome.received.body
    assert before_us < outcome.sent_us < outcome.last_byte_us < boottime_us()
    assert answers(tmp_path) == [outcome]
    assert os.listdir(tmp_path) == ["attempt-1"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"fault": "error", "status": 503}, 503),
        ({"fault": "slow-body", "seconds": 1}, 200),
        ({"fault": "reset"}, Failure.RESET),
        ({"fault": "lost-answer"}, Failure.RESET),
        ({"fault": "hang", "seconds": 600}, Failure.TIMEOUT),
    ],
)
async def test_faults_of_a_provider(fault: dict[str, object], expected: object) -> None:
    """What a provider does is reported as it is, and nothing is sent twice.

    Fails when a fault is met with another request: the provider would have issued a token.
    """
    async with serving() as url, aiohttp.ClientSession() as http:
        path = "/api/oauth2/token"
        async with http.post(f"{url}/_simulator/faults", json=fault | {"path": path}) as response:
            assert response.status == 200
        request = a_request(
            f"{url}{path}",
            form={"grant_type": "refresh_token"},
            client_id=SEED.client_id,
            client_secret=bytearray(SEED.client_secret.encode()),
            secret_form={"refresh_token": bytearray(SEED.refresh_token.encode())},
            headers={"User-Agent": "custody"},
        )
        limits = PATIENT if expected != Failure.TIMEOUT else replace(PATIENT, answer_us=SECOND)
        outcome = await send(request, limits=limits)
        async with http.get(f"{url}/_simulator/report") as response:
            report = await response.json()
    if isinstance(expected, Failure):
        assert failure(outcome) == (NoProof, expected)
    else:
        assert isinstance(outcome, Answered)
        assert outcome.received.status == expected
    counts = report["agents"]["custody"]
    acted_on = fault["fault"] in ("slow-body", "lost-answer")
    assert (counts["faults_injected"], counts["token_requests"]) == (1, int(acted_on))
    assert counts["violations"] == 0


@pytest.mark.parametrize("authentication", list(Authentication))
async def test_what_is_sent(authentication: Authentication) -> None:
    """The request has the form, and the client's credentials in the place that is asked for."""
    async with token_url(DONE) as served:
        request = served.request(authentication=authentication, headers={"User-Agent": "holdoff"})
        assert isinstance(await send(request), Answered)
    head, _, body = bytes(served.received).decode().partition("\r\n\r\n")
    form = parse_qs(body, strict_parsing=True)
    assert form.pop("refresh_token") == ["old refresh+token"]
    assert form.pop("grant_type") == ["refresh_token"]
    credentials = {"client_id": ["client-1"], "client_secret": ["s3cret&word"]}
    target = head.split()[1]
    if authentication is Authentication.BASIC:
        pair = base64.b64encode(b"client-1:s3cret%26word").decode()
        assert f"Authorization: Basic {pair}" in head
    elif authentication is Authentication.QUERY:
        assert parse_qs(target.partition("?")[2], strict_parsing=True) == credentials
    else:
        assert form == credentials
    assert target.startswith("/token")
    assert ("Authorization" in head) == (authentication is Authentication.BASIC)
    assert "User-Agent: holdoff" in head
    assert f"Content-Length: {len(body)}" in head


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        pytest.param(DONE, 200, b"{}", id="length"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n",
            *(200, b"{}"),
            id="chunked",
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n{}", 200, b"{}", id="until the end"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n{}", 200, b"{}", id="HTTP/1.0"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + DONE, 200, b"{}", id="100"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", id="no content"),
        pytest.param(
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            *(302, b""),
            id="302",
        ),
        pytest.param(
            b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>", 502, b"<html>", id="502"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
            *(200, b"<html>"),
            id="a page",
        ),
    ],
)
async def test_whole_answers(answer: bytes, status: int, body: bytes) -> None:
    """Every answer of HTTP/1.1 is reported as it is; a redirection is not followed."""
    async with token_url(answer) as served:
        outcome = await send(served.request())
    assert isinstance(outcome, Answered)
    assert (outcome.received.status, outcome.received.body) == (status, body)
    assert served.connections == 1


async def test_headers_but_no_cookies() -> None:
    """Headers are reported under names in lower case, repeated ones joined, cookies left out."""
    head = b"Retry-After: 7\r\nX-Limit: a\r\nx-limit: b\r\nSet-Cookie: c=d\r\nContent-Length: 0"
    async with token_url(b"HTTP/1.1 429 Slow Down\r\n" + head + b"\r\n\r\n") as served:
        outcome = await send(served.request())
    assert isinstance(outcome, Answered)
    assert dict(outcome.received.headers) == {
        "retry-after": "7",
        "x-limit": "a, b",
        "content-length": "0",
    }


async def test_an_answer_that_stays_open() -> None:
    """A whole answer is reported although the provider keeps the connection."""
    ended = asyncio.Event()

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(DONE)
        await ended.wait()

    async with token_url(keep) as served:
        assert isinstance(await send(served.request()), Answered)
        ended.set()


async def test_an_answer_in_single_bytes() -> None:
    """An answer may come byte by byte."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for n in range(len(DONE)):
            writer.write(DONE[n : n + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with token_url(drip) as served:
        outcome = await send(served.request())
    assert isinstance(outcome, Answered)
    assert outcome.received.body == b"{}"


async def test_a_compressed_answer() -> None:
    """A compression that was not asked for is undone, so that no token is lost."""
    body = gzip.compress(b'{"access_token":"t"}')
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with token_url(head + body) as served:
        outcome = await send(served.request())
    assert isinstance(outcome, Answered)
    assert outcome.received.body == b'{"access_token":"t"}'
    assert "content-encoding" not in outcome.received.headers


# Not sent ------------------------------------------------------------------------------------


async def test_nothing_listens() -> None:
    """A refused connection is proof that nothing was sent."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        assert failure(await send(a_request(url))) == (NotSent, Failure.CONNECT)


async def test_no_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent where no process can be started, or where it ends at once."""
    for command in "/nonexistent", "/bin/false":
        monkeypatch.setattr(sending_module, "command", lambda command=command: [command])
        assert failure(await send(a_request("https://host.test/"))) == (NotSent, Failure.SENDER)


async def test_no_such_host() -> None:
    """A host without an address is proof that nothing was sent."""
    outcome = await send(a_request("https://nowhere.invalid/"))
    assert failure(outcome) == (NotSent, Failure.RESOLVE)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"])
async def test_a_private_address(host: str) -> None:
    """An address that is not public is refused, however it is written. No connection is made."""
    async with token_url(DONE) as served:
        url = served.url.replace("http", "https").replace("127.0.0.1", host)
        outcome = await send(a_request(url), reach=Reach())
    assert failure(outcome) == (NotSent, Failure.ADDRESS)
    assert served.connections == 0


async def test_plain_http_stays_on_the_machine() -> None:
    """Plain http goes to loopback addresses only, and only where it is allowed."""
    url = "http://192.0.2.1/"
    assert failure(await send(a_request(url))) == (NotSent, Failure.ADDRESS)
    with pytest.raises(ValueError, match="plain http is not allowed"):
        Sending(a_request(url), reach=Reach(networks=("192.0.2.0/24",)))


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", ["127.0.0.1", "elsewhere.test"])
async def test_certificates(trusted: bool, name: str, tmp_path: Path) -> None:
    """The certificate must be of a trusted authority, and for the host in the URL."""
    authority, stranger = trustme.CA(), trustme.CA()
    (authority if trusted else stranger).cert_pem.write_to_path(tmp_path / "ca.pem")
    reach = Reach(
        networks=("127.0.0.0/8",), ca_files=(str(tmp_path / "ca.pem"),), system_roots=False
    )
    async with token_url(DONE, authority, name) as served:
        outcome = await send(served.request(), reach=reach)
    if trusted and name == "127.0.0.1":
        assert isinstance(outcome, Answered)
        assert outcome.received.body == b"{}"
    else:
        assert failure(outcome) == (NotSent, Failure.TLS)
        assert served.received == b""


@pytest.mark.parametrize("abrupt", [True, False])
async def test_the_end_of_tls(abrupt: bool, tmp_path: Path) -> None:
    """An answer that the end of the connection ends is whole only where TLS ended it too."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 100_000)
        await writer.drain()
        if abrupt:
            writer.transport.abort()

    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    reach = Reach(("127.0.0.0/8",), ca_files=(str(tmp_path / "ca.pem"),), system_roots=False)
    async with token_url(answer, authority, "127.0.0.1") as served:
        outcome = await send(served.request(), reach=reach)
    assert not isinstance(outcome, NotSent)
    assert outcome.received is not None
    if abrupt:
        assert failure(outcome) == (NoProof, Failure.CLOSED)
    else:
        assert isinstance(outcome, Answered)
        assert len(outcome.received.body) == 100_000


async def test_no_tls_there() -> None:
    """A server without TLS is proof that nothing was sent."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(DONE)

    async with token_url(talk) as served:
        url = served.url.replace("http", "https")
        outcome = await send(a_request(url), reach=Reach(networks=("127.0.0.0/8",)))
    assert failure(outcome) == (NotSent, Failure.TLS)
    assert b"refresh" not in served.received


async def test_a_silent_handshake() -> None:
    """A handshake that takes too long is given up, and nothing is sent."""

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with token_url(silent) as served:
        url = served.url.replace("http", "https")
        limits = replace(PATIENT, connect_us=1 * SECOND)
        reach = Reach(networks=("127.0.0.0/8",))
        assert failure(await send(a_request(url), reach=reach, limits=limits)) == (
            NotSent,
            Failure.TIMEOUT,
        )


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
async def test_the_provider_ends_the_connection_first(said: bytes) -> None:
    """Where the connection ends before the right to send, nothing is sent."""
    ready = asyncio.Event()

    async def end(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ready.wait()
        writer.write(said)

    async with (
        token_url(end) as served,
        Sending(served.request(), reach=LOOPBACK, limits=PATIENT) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        ready.set()
        await until(lambda: ended(sending))
        assert failure(await sending.send(boottime_us() + 60 * SECOND)) == (
            NotSent,
            Failure.CLOSED,
        )
    assert served.received == b""


async def test_abandoned(spooling: Spooling, tmp_path: Path) -> None:
    """A request that is withdrawn before the right to send it is never sent."""
    async with token_url(DONE) as served:
        async with Sending(
            served.request(), reach=LOOPBACK, limits=PATIENT, spooling=spooling
        ) as sending:
            assert isinstance(await sending.connect(), Connected)
        await until(lambda: ended(sending) and not list(tmp_path.iterdir()))
    assert served.received == b""


async def test_too_late() -> None:
    """A right that is over already is not used."""
    async with (
        token_url(DONE) as served,
        Sending(served.request(), reach=LOOPBACK, limits=PATIENT) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        assert failure(await sending.send(boottime_us() - 1)) == (NotSent, Failure.DEADLINE)
    assert served.received == b""


async def test_frozen_beyond_the_deadline() -> None:
    """A sender that was stopped before the deadline and continued after it sends nothing."""
    async with (
        token_url(DONE) as served,
        Sending(served.request(), reach=LOOPBACK, limits=PATIENT) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        os.kill(sending.pid, signal.SIGSTOP)
        deadline_us = boottime_us() + SECOND // 10
        task = asyncio.create_task(sending.send(deadline_us))
        await until(lambda: boottime_us() > deadline_us)
        os.kill(sending.pid, signal.SIGCONT)
        assert failure(await task) == (NotSent, Failure.DEADLINE)
    assert served.received == b""


STOPPED_BEFORE_THE_WRITE = """
import os, signal, sys
sys.path += sys.argv[2:]
from holdoff_coordinator.custody import sender
clock, write_once, reads = sender.boottime_us, sender._Connection.write_once, []
def read():
    reads.append(clock())
    if len(reads) == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    return reads[-1]
def write(*arguments):
    sender.boottime_us = read
    return write_once(*arguments)
sender._Connection.write_once = write
sender.main()
"""


async def test_frozen_between_clock_and_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that was stopped between its look at the clock and the write.

    Fails when no timer ends the sender at the deadline.
    """
    monkeypatch.setattr(sending_module, "_RUN", STOPPED_BEFORE_THE_WRITE)
    async with (
        token_url(DONE) as served,
        Sending(served.request(), reach=LOOPBACK, limits=PATIENT) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        deadline_us = boottime_us() + 6 * SECOND
        task = asyncio.create_task(sending.send(deadline_us))
        await until(lambda: _state(sending.pid) == "T" and boottime_us() > deadline_us)
        os.kill(sending.pid, signal.SIGCONT)
        assert failure(await task) == (NoProof, Failure.SENDER)
    assert served.received == b""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": {"X-Bad": "a\r\nb"}},
        {"secret_form": {"refresh_token": bytearray(b"x" * 100_000)}},
    ],
)
async def test_what_cannot_be_sent(changes: dict[str, object]) -> None:
    """A request that HTTP cannot express, or that is too large, is not sent."""
    async with token_url(DONE) as served:
        outcome = await send(served.request(**changes))
    assert failure(outcome) == (NotSent, Failure.REQUEST)
    assert served.received == b""


async def test_no_room_in_the_spool(tmp_path: Path) -> None:
    """Nothing is sent where the answer could not be kept."""
    spooling = Spooling(str(tmp_path / "missing" / "a"), bytearray(KEY), b"wrapped")
    async with token_url(DONE) as served:
        outcome = await send(served.request(), spooling=spooling)
    assert failure(outcome) == (NotSent, Failure.SPOOL)
    assert served.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/",
        "https:///token",
        "https://user@host.test/",
        "https://host.test/#part",
        "https://host.test:99999/",
        "https://host.test/a b",
        "https://hóst.test/",
        "https://host.test/\r\nX: y",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    """A token URL with parts that it may not have is refused before anything is started."""
    with pytest.raises(ValueError, match=r"URL|Port"):
        a_request(url)


# No proof ------------------------------------------------------------------------------------


async def test_reset_after_the_request(spooling: Spooling, tmp_path: Path) -> None:
    """A reset after the request proves nothing, and the instant of sending is known."""

    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        reset(writer)

    async with token_url(drop) as served:
        outcome = await send(served.request(), spooling=spooling)
    assert failure(outcome) == (NoProof, Failure.RESET)
    assert isinstance(outcome, NoProof)
    assert outcome.sent_us is not None
    assert outcome.sent_us < outcome.ended_us
    assert served.connections == 1
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_no_answer_in_time() -> None:
    """Silence is given up at the limit, and the connection reset."""
    seen: list[BaseException] = []

    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        try:
            await reader.read()
        except ConnectionResetError as error:
            seen.append(error)

    async with token_url(hang) as served:
        outcome = await send(served.request(), limits=replace(PATIENT, answer_us=SECOND // 10))
        assert failure(outcome) == (NoProof, Failure.TIMEOUT)
        await until(lambda: bool(seen))


@pytest.mark.parametrize(
    ("answer", "why", "status"),
    [
        pytest.param(b"", Failure.CLOSED, None, id="end"),
        pytest.param(b"\x16\x03\x01\x02\x00garbage\r\n\r\n", Failure.HTTP, None, id="garbage"),
        pytest.param(b"SSH-2.0-x\r\n\r\n", Failure.HTTP, None, id="another protocol"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 40_000, Failure.TOO_LARGE, None, id="head"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 300_000, Failure.TOO_LARGE, 200, id="body"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", Failure.CLOSED, 200, id="cut off"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            *(Failure.HTTP, 200),
            id="bad chunk",
        ),
        pytest.param(
            b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + DONE, Failure.HTTP, None, id="informational"
        ),
        pytest.param(b"HTTP/1.1 101 Switch\r\n\r\n", Failure.HTTP, None, id="switch"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
            *(Failure.HTTP, 200),
            id="no gzip",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(10**7)),
            *(Failure.TOO_LARGE, 200),
            id="bomb",
        ),
    ],
)
async def test_bad_answers(answer: bytes, why: Failure, status: int | None) -> None:
    """What is no whole answer proves nothing; the status is reported where one came."""
    async with token_url(answer) as served:
        outcome = await send(served.request())
    assert failure(outcome) == (NoProof, why)
    assert isinstance(outcome, NoProof)
    assert (outcome.received.status if outcome.received else None) == status
    assert served.connections == 1


async def test_half_an_answer_is_kept(spooling: Spooling, tmp_path: Path) -> None:
    """What came of an answer is reported and spooled: it may hold a rotated token."""
    part = b'{"refresh_token":"rotated"'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"
    async with token_url(head + part) as served:
        outcome = await send(served.request(), spooling=spooling)
    assert isinstance(outcome, NoProof)
    assert outcome.received is not None
    assert outcome.received.body == part
    assert answers(tmp_path) == [outcome]


async def test_a_slow_answer() -> None:
    """An answer that drips is given up at the limit, whatever came."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with token_url(drip) as served:
        outcome = await send(served.request(), limits=replace(PATIENT, answer_us=SECOND // 2))
    assert failure(outcome) == (NoProof, Failure.TIMEOUT)


async def test_a_late_answer_of_a_frozen_sender() -> None:
    """An answer that waited for a sender that was stopped is adopted, also after the limit."""
    asked = asyncio.Event()
    go = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        asked.set()
        await go.wait()
        writer.write(DONE)

    limits = replace(PATIENT, answer_us=5 * SECOND)
    async with (
        token_url(answer) as served,
        Sending(served.request(), reach=LOOPBACK, limits=limits) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        task = asyncio.create_task(sending.send(boottime_us() + 60 * SECOND))
        await asked.wait()
        await until(lambda: sending.sent_us is not None)
        os.kill(sending.pid, signal.SIGSTOP)
        go.set()
        late_us = (sending.sent_us or 0) + limits.answer_us
        await until(lambda: boottime_us() > late_us)
        os.kill(sending.pid, signal.SIGCONT)
        outcome = await task
    assert isinstance(outcome, Answered)
    assert outcome.last_byte_us > late_us


async def test_a_sender_that_is_killed() -> None:
    """A sender that dies after the right proves nothing."""

    async def kill(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        os.kill(sending.pid, signal.SIGKILL)

    async with (
        token_url(kill) as served,
        Sending(served.request(), reach=LOOPBACK, limits=PATIENT) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        outcome = await sending.send(boottime_us() + 60 * SECOND)
        assert failure(outcome) == (NoProof, Failure.SENDER)


async def test_a_coordinator_that_was_stopped_beyond_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It still reads what came meanwhile, also if it sees first that the time is over."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    readings = iter([0, SECOND])

    def read_clock() -> int:
        if now_us := next(readings):
            theirs.send(b"1")
        return now_us

    monkeypatch.setattr(sending_module, "boottime_us", read_clock)
    with ours, theirs:
        receives = asyncio.get_running_loop().sock_recv(ours, 1)
        assert await sending_module._until(receives, SECOND // 100) == b"1"


# Leaving early -------------------------------------------------------------------------------


async def test_cancelled_after_the_right(spooling: Spooling, tmp_path: Path) -> None:
    """A cancellation does not lose the answer: the sender keeps it in the spool."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        asked.set()
        await go.wait()
        writer.write(DONE)

    async with token_url(answer) as served:
        task = asyncio.create_task(send(served.request(), spooling=spooling))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert answers(tmp_path) == []
        go.set()
        await until(lambda: bool(answers(tmp_path)))
    (kept,) = answers(tmp_path)
    assert isinstance(kept, Answered)
    assert kept.received.body == b"{}"


STOPPED_BEFORE_THE_SPOOL = """
import os, signal, sys
sys.path += sys.argv[2:]
from holdoff_coordinator.custody import sender, spool
def keep(draft, outcome):
    os.kill(os.getpid(), signal.SIGSTOP)
spool.Draft.keep = keep
sender.main()
"""


async def test_spooled_before_it_is_reported(
    spooling: Spooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is reported that does not lie in the spool yet."""
    monkeypatch.setattr(sending_module, "_RUN", STOPPED_BEFORE_THE_SPOOL)
    async with (
        token_url(DONE) as served,
        Sending(served.request(), reach=LOOPBACK, limits=PATIENT, spooling=spooling) as sending,
    ):
        assert isinstance(await sending.connect(), Connected)
        task = asyncio.create_task(sending.send(boottime_us() + 60 * SECOND))
        await until(lambda: _state(sending.pid) == "T")
        os.kill(sending.pid, signal.SIGKILL)
        assert failure(await task) == (NoProof, Failure.SENDER)


FAILING = """
import sys
sys.path += sys.argv[2:]
from holdoff_coordinator.custody import sender
def written(request, secrets):
    raise ValueError(secrets)
sender._written = written
sender.main()
"""


async def test_an_error_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unexpected error only its kind and place are reported: its text may hold a secret."""
    monkeypatch.setattr(sending_module, "_RUN", FAILING)
    async with token_url(DONE) as served:
        outcome = await send(served.request())
    assert outcome == NotSent(Failure.SENDER, "ValueError in line 6")


async def test_the_secrets_are_zeroed(spooling: Spooling) -> None:
    """The request's secrets and the key of the spool are zeroed."""
    async with token_url(DONE) as served:
        request = served.request()
        assert isinstance(await send(request, spooling=spooling), Answered)
    left = [request.client_secret, *request.secret_form.values(), spooling.key]
    assert not any(any(secret or b"x") for secret in left)
    assert "s3cret" in bytes(served.received).decode()
