"""The process that sends one request to a token URL, and ends.

Refresh token and client secret are in its memory only while it runs. Its environment is empty;
everything is passed through a socket, its standard input. It imports little, and as late as
possible, since every refresh waits for it.

The conversation, in frames (`sending` is the other side):

1. The request, then each of its secrets in a frame of its own.
2. The sender reports `Connected` after the TLS handshake, or `NotSent` and exits.
3. The right to send, with its deadline. If the input ends instead, the sender exits.
4. The sender reports when it sent the request; then the outcome, and the body of the answer in a
   frame of its own. With a spool, the answer is in it before it is reported.

Until it has the right to send, this process ends when the coordinator ends. After that it reads
the answer, also without a coordinator.

No request is sent after the deadline. The clock is read just before the one write, and a timer
ends this process if it was stopped between the two. One gap remains: the machine is suspended, or
the virtual machine paused, within these microseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

from holdoff_coordinator.custody.outcomes import (
    Answered,
    Failure,
    NoProof,
    NotSent,
    Received,
    body_holder,
    boottime_us,
    document,
)

TYPE_CHECKING = False  # `typing` would cost time
if TYPE_CHECKING:
    import ssl
    from typing import Any

    import h11

    from holdoff_coordinator.custody.outcomes import Outcome
    from holdoff_coordinator.custody.spool import Draft

SIZE_BYTES = 4
MOST_REQUEST_BYTES = 64 * 1024
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # <linux/prctl.h>
_READ_BYTES = 16 * 1024
_SLICE_MS = 1000
"""No wait is longer at a time: it would sleep on after the machine was suspended."""
_MOST_INFORMATIONAL = 16


class _Failed(Exception):  # noqa: N818 -- an outcome
    def __init__(self, why: Failure, detail: str) -> None:
        super().__init__(why.value, detail)
        self.why = why
        self.detail = detail


def main() -> None:
    """Send one request for the process whose id is the argument."""
    _shield(int(sys.argv[1]))
    channel = socket.socket(fileno=os.dup(0))
    with suppress(BrokenPipeError, ConnectionResetError, EOFError):  # the coordinator ended
        _serve(channel)


def _serve(channel: socket.socket) -> None:
    request = json.loads(_frame(channel))
    secrets = {name: _frame(channel) for name in request["secrets"]}
    attempt = _Attempt(channel, request, secrets)
    try:
        attempt.prepare()
        deadline_us = attempt.wait_for_right()
    except _Failed as failed:
        outcome: Outcome = NotSent(failed.why, failed.detail)
    except Exception as error:  # noqa: BLE001 -- the text of an error may contain a secret
        outcome = NotSent(Failure.SENDER, _place(error))
    else:
        outcome = attempt.send(deadline_us)
    attempt.finish(outcome)


class _Attempt:
    """One request, from its connection to its answer."""

    def __init__(
        self, channel: socket.socket, request: dict[str, Any], secrets: dict[str, bytes]
    ) -> None:
        self._channel = channel
        self._request = request
        self._secrets = secrets
        self._limits = request["limits"]
        self._draft: Draft | None = None

    def prepare(self) -> None:
        """Connect, and report it."""
        until_us = boottime_us() + self._limits["connect_us"]
        if path := self._request["spool"]:
            self._open_spool(path)
        connection = _connect(self._request, until_us)
        self._http, data = _written(self._request, self._secrets)
        self._connection, self._data = connection, data
        _tell(
            self._channel,
            {"Connected": {"address": connection.address, "at_us": boottime_us()}},
        )

    def _open_spool(self, path: str) -> None:
        from holdoff_coordinator.custody.spool import Draft, Spooling  # noqa: PLC0415 -- not always

        spooling = Spooling(
            path, bytearray(self._secrets["spool key"]), self._secrets["wrapped key"]
        )
        try:
            self._draft = Draft(spooling, self._limits["body_bytes"])
        except OSError as error:
            raise _Failed(Failure.SPOOL, _text(error)) from None

    def wait_for_right(self) -> int:
        """Wait for the instant until which the request may be sent."""
        until_us = boottime_us() + self._limits["right_us"]
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._connection.fileno(), select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(_slice_ms(until_us))]
            if self._channel.fileno() in ready:
                try:
                    return int(json.loads(_frame(self._channel))["until_us"])
                except (EOFError, ConnectionResetError):
                    raise _Failed(Failure.ABANDONED, "the coordinator withdrew it") from None
            if ready:
                self._connection.expect_silence()
            elif boottime_us() >= until_us:
                raise _Failed(Failure.TIMEOUT, "no right to send in time")

    def send(self, deadline_us: int) -> Outcome:
        """Send the request, once, and read the answer."""
        _prctl(_PR_SET_PDEATHSIG, 0)
        try:
            self._connection.expect_silence()
            data = self._connection.encrypted(self._data)
            self._expect_coordinator()
            sent_us = self._connection.write_once(data, deadline_us)
        except _Failed as failed:
            return NotSent(failed.why, failed.detail)
        _tell(self._channel, {"sent_us": sent_us})
        if self._draft is not None:
            self._draft.load()  # while the provider answers
        answer = _Answer(self._http, self._limits)
        try:
            self._connection.expect_written()
            last_byte_us = answer.read(self._connection, sent_us + self._limits["answer_us"])
        except _Failed as failed:
            return NoProof(
                failed.why, failed.detail, sent_us, self._connection.abort(), answer.started()
            )
        except Exception as error:  # noqa: BLE001 -- as in _serve
            return NoProof(Failure.SENDER, _place(error), sent_us, self._connection.abort())
        self._connection.close()
        return Answered(answer.received, sent_us, last_byte_us)

    def _expect_coordinator(self) -> None:
        with suppress(BlockingIOError):
            if not self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise _Failed(Failure.ABANDONED, "the coordinator withdrew it")

    def finish(self, outcome: Outcome) -> None:
        """Keep an answer in the spool, and report."""
        received = body_holder(outcome)
        spooled = False
        if self._draft is not None:
            if received is None:
                self._draft.discard()
            else:
                with suppress(Exception):  # the answer is reported in any case
                    self._draft.keep(outcome)
                    spooled = True
        _tell(self._channel, {"outcome": document(outcome), "spooled": spooled})
        if received is not None:
            _send_frame(self._channel, received.body)


class _Connection:
    """A TCP connection, with TLS or without, that never waits beyond a given instant."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        self._socket = connection
        self.address = address
        self._tls: ssl.SSLObject | None = None
        self._most_received = sys.maxsize
        self._unwritten = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def expect_connected(self, until_us: int) -> None:
        self._wait(select.POLLOUT, until_us)
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))

    def start_tls(self, context: ssl.SSLContext, host: str, until_us: int) -> None:
        import ssl  # noqa: PLC0415 -- while the connection is made

        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush(until_us)
                if not self._fetch(until_us):
                    raise _Failed(Failure.TLS, "the connection ended in the handshake") from None
            except ssl.SSLCertVerificationError as error:
                self._flush(until_us)  # the alert
                raise _Failed(Failure.TLS, f"certificate: {error.verify_message}") from None
            except ssl.SSLError as error:
                raise _Failed(Failure.TLS, error.reason or "the handshake failed") from None
            else:
                break
        self._flush(until_us)
        self._tls = tls

    def expect_silence(self) -> None:
        """Check that the provider neither ended the connection nor sent any data."""
        with suppress(_WouldWait):
            data = self._read(_NO_WAIT)
            raise _Failed(
                Failure.CLOSED,
                "the provider sent data first" if data else "the provider ended the connection",
            )

    def encrypted(self, data: bytes) -> bytes:
        if self._tls is None:
            return data
        import ssl  # noqa: PLC0415 -- it is loaded

        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise _Failed(Failure.TLS, error.reason or "TLS failed") from None
        return self._outgoing.read()

    def write_once(self, data: bytes, deadline_us: int) -> int:
        """Write in one call, before an instant; return the instant just before it.

        Raises:
            _Failed: Nothing was written.
        """
        left_us = deadline_us - boottime_us()
        if left_us > 0:
            # Ends this process if it is stopped here and continued too late.
            signal.setitimer(signal.ITIMER_REAL, left_us / 1_000_000)
        sent_us = boottime_us()
        if sent_us >= deadline_us:
            raise _Failed(Failure.DEADLINE, "it was too late to send it")
        try:
            self._unwritten = len(data) - self._socket.send(data)
        except OSError as error:
            raise _Failed(Failure.CLOSED, _text(error)) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return sent_us

    def expect_written(self) -> None:
        """Check that the one write took all of the request."""
        if self._unwritten:
            raise _Failed(Failure.CLOSED, "only a part of it could be written")

    def limit(self, most_bytes: int) -> None:
        """Limit what is received from now on, with all its framing."""
        self._most_received = most_bytes

    def read(self, until_us: int) -> bytes:
        """Return what comes next; nothing at the end.

        What is there already is read also after the instant.
        """
        try:
            return self._read(until_us)
        except _WouldWait:
            raise _Failed(Failure.TIMEOUT, "the answer did not come in time") from None

    def _read(self, until_us: int) -> bytes:
        if self._tls is None:
            return self._fetch(until_us)
        import ssl  # noqa: PLC0415 -- it is loaded

        while True:
            try:
                return self._tls.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                self._flush(until_us)
                if not self._fetch(until_us):
                    self._incoming.write_eof()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError:
                raise _Failed(
                    Failure.CLOSED, "the connection ended without an end of TLS"
                ) from None
            except ssl.SSLError as error:
                raise _Failed(Failure.TLS, error.reason or "TLS failed") from None

    def _fetch(self, until_us: int) -> bytes:
        """Receive something, and hand it to TLS where there is TLS."""
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
                break
            except BlockingIOError:
                self._wait(select.POLLIN, until_us)
            except OSError as error:
                raise _Failed(Failure.RESET, _text(error)) from None
        self._most_received -= len(data)
        if self._most_received < 0:
            raise _Failed(Failure.TOO_LARGE, "more was received than an answer may have")
        if hasattr(self, "_incoming"):
            self._incoming.write(data)
        return data

    def _flush(self, until_us: int) -> None:
        """Send what TLS itself produced."""
        data = self._outgoing.read()
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, until_us)
            except OSError as error:
                raise _Failed(Failure.RESET, _text(error)) from None

    def _wait(self, event: int, until_us: int) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        while not poll.poll(_slice_ms(until_us)):
            if boottime_us() >= until_us:
                raise _WouldWait

    def abort(self) -> int:
        """Reset the connection, so that the kernel sends no more of the request; return when."""
        self._socket.close()
        return boottime_us()

    def close(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        self._socket.close()


class _WouldWait(Exception):  # noqa: N818
    """There is nothing to read yet."""


_NO_WAIT = 0
"""An instant that passed."""


class _Answer:
    """An HTTP/1.1 answer as it comes."""

    def __init__(self, http: h11.Connection, limits: dict[str, int]) -> None:
        self._http = http
        self._limits = limits
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._informational = 0

    @property
    def received(self) -> Received:
        return Received(self._status, self._headers, self._body)

    def started(self) -> Received | None:
        return self.received if self._status else None

    def read(self, connection: _Connection, until_us: int) -> int:
        """Read to the end; return when the last byte came.

        Raises:
            _Failed: No whole answer came; what came is kept.
        """
        import h11  # noqa: PLC0415 -- it is loaded

        connection.limit(4 * (self._limits["head_bytes"] + self._limits["body_bytes"]))
        received_us = boottime_us()
        while not isinstance(event := self._next(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = connection.read(until_us)
                received_us = boottime_us()
                self._http.receive_data(data)
            else:
                self._take(event)
        self._decode()
        return received_us

    def _next(self) -> Any:
        import h11  # noqa: PLC0415

        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:  # its text quotes what came
            if error.error_status_hint == 431:  # noqa: PLR2004 -- how h11 says it
                raise _Failed(Failure.TOO_LARGE, "headers beyond the limit") from None
            if self._http.trailing_data[1]:
                raise _Failed(Failure.CLOSED, "the connection ended in the answer") from None
            raise _Failed(Failure.HTTP, "what came is no HTTP/1.1") from None

    def _take(self, event: Any) -> None:
        import h11  # noqa: PLC0415

        if isinstance(event, h11.InformationalResponse):
            self._informational += 1
            if self._informational > _MOST_INFORMATIONAL:
                raise _Failed(Failure.HTTP, f"too many answers of status {event.status_code}")
        elif isinstance(event, h11.Response):
            self._status, self._headers = event.status_code, _headers(event)
        elif isinstance(event, h11.Data):
            room = self._limits["body_bytes"] - len(self._body)
            self._body += event.data[:room]
            if len(event.data) > room:
                raise _Failed(Failure.TOO_LARGE, "a body beyond the limit")
        else:
            raise _Failed(Failure.CLOSED, "the connection ended without an answer")

    def _decode(self) -> None:
        """Undo a compression, which was not asked for."""
        coding = self._headers.get("content-encoding", "").strip().lower()
        if coding not in ("gzip", "x-gzip", "deflate"):
            return
        import zlib  # noqa: PLC0415 -- seldom

        unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # reads both headers
        try:
            body = unpack.decompress(self._body, self._limits["body_bytes"])
        except zlib.error:
            raise _Failed(Failure.HTTP, f"the body is no {coding}") from None
        if unpack.unconsumed_tail:
            raise _Failed(Failure.TOO_LARGE, "a body beyond the limit")
        if not unpack.eof:
            raise _Failed(Failure.HTTP, f"the body is no whole {coding}")
        del self._headers["content-encoding"]
        self._body = bytearray(body)


def _headers(event: h11.Response) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in event.headers:
        key, text = name.decode("ascii"), value.decode("latin-1")
        if key != "set-cookie":
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


def _connect(request: dict[str, Any], until_us: int) -> _Connection:
    """Connect to the first address that answers, and do TLS with it."""
    host, port, plain = request["host"], request["port"], request["plain"]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _Failed(Failure.RESOLVE, _text(error)) from None
    from holdoff_coordinator.custody.addresses import refusal  # noqa: PLC0415 -- as above

    good, why = [], ""
    for family, _, _, _, address in found:
        refused = refusal(str(address[0]), request["networks"], plain=plain)
        why = why or (refused and f"{address[0]} is {refused}")
        if not refused:
            good.append((family, address))
    if not good:
        raise _Failed(Failure.ADDRESS, why)
    last = _Failed(Failure.TIMEOUT, "no connection in time")
    for n, (family, address) in enumerate(good):
        now_us = boottime_us()
        share_us = (until_us - now_us) // (len(good) - n)
        try:
            return _connect_to(request, family, address, now_us + share_us)
        except _Failed as failed:
            last = failed
    raise last


def _connect_to(request: dict[str, Any], family: int, address: Any, until_us: int) -> _Connection:
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    # Closed in any way but a good one, the connection is reset.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MOST_REQUEST_BYTES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        unacknowledged_ms = request["limits"]["unacknowledged_us"] // 1000
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged_ms)
    made = _Connection(connection, f"{address[0]} port {address[1]}")
    try:
        with suppress(BlockingIOError):
            connection.connect(address)
        import h11  # noqa: F401, PLC0415 -- while the connection is made

        context = None if request["plain"] else _context(request)
        made.expect_connected(until_us)
        if context is not None:
            made.start_tls(context, request["host"], until_us)
    except _WouldWait:
        connection.close()
        raise _Failed(Failure.TIMEOUT, f"no connection to {made.address} in time") from None
    except OSError as error:
        connection.close()
        raise _Failed(Failure.CONNECT, f"{made.address}: {_text(error)}") from None
    except _Failed:
        connection.close()
        raise
    return made


def _context(request: dict[str, Any]) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415 -- while the connection is made

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        for path in request["ca_files"]:
            context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise _Failed(Failure.TLS, f"{path}: {_text(error)}") from None
    if request["system_roots"]:
        context.load_default_certs()
    return context


def _written(request: dict[str, Any], secrets: dict[str, bytes]) -> tuple[h11.Connection, bytes]:
    """Return the request as it is written, and what reads its answer."""
    from base64 import b64encode  # noqa: PLC0415 -- after the connection was made
    from urllib.parse import quote_plus, urlencode  # noqa: PLC0415

    import h11  # noqa: PLC0415

    form = dict(request["form"]) | {name: secrets[name] for name in request["secret_fields"]}
    target, headers = request["target"], dict(request["headers"])
    credentials = {"client_id": request["client_id"].encode()}
    if "client secret" in secrets:
        credentials["client_secret"] = secrets["client secret"]
    match request["authentication"]:
        case "basic":
            pair = ":".join(map(quote_plus, credentials.values()))
            headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        case "query":
            target += ("&" if "?" in target else "?") + urlencode(credentials)
        case _:
            form |= credentials
    body = urlencode(form).encode()
    headers |= {
        "Host": request["authority"],
        "Accept-Encoding": "identity",
        "Connection": "close",
        "Content-Type": "application/x-www-form-urlencoded",
        "Content-Length": str(len(body)),
    }
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=request["limits"]["head_bytes"])
    try:
        data = (
            http.send(h11.Request(method="POST", target=target, headers=list(headers.items())))
            + http.send(h11.Data(data=body))
            + http.send(h11.EndOfMessage())
        )
    except (h11.LocalProtocolError, UnicodeEncodeError):  # its text may contain a secret
        raise _Failed(Failure.REQUEST, "it cannot be written in HTTP/1.1") from None
    if len(data) > MOST_REQUEST_BYTES:
        raise _Failed(Failure.REQUEST, f"it is longer than {MOST_REQUEST_BYTES} bytes")
    return http, data


def _shield(parent: int) -> None:
    """Prevent inspection by other processes, and end with the parent."""
    # Other processes of this user cannot read its memory, and it leaves no core dump.
    _prctl(_PR_SET_DUMPABLE, 0)
    # A terminal or a service manager signals the coordinator's children too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the coordinator ended")


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        sys.exit("prctl failed")


def _slice_ms(until_us: int) -> int:
    return min(max((until_us - boottime_us()) // 1000 + 1, 0), _SLICE_MS)


def _frame(channel: socket.socket) -> bytes:
    size = int.from_bytes(_exactly(channel, SIZE_BYTES), "big")
    return _exactly(channel, size)


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = channel.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _tell(channel: socket.socket, message: dict[str, Any]) -> None:
    _send_frame(channel, json.dumps(message).encode())


def _send_frame(channel: socket.socket, data: bytes | bytearray) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        channel.sendall(len(data).to_bytes(SIZE_BYTES, "big"))
        channel.sendall(data)


def _text(error: OSError) -> str:
    """Return the message of a system error, without any data."""
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


def _place(error: BaseException) -> str:
    """Return the type and line of an error, without its text, which may contain a secret."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{type(error).__name__} in line {trace.tb_lineno if trace else 0}"
