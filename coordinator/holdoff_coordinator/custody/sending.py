"""Sends one request to a token URL from a process of its own (`sender`).

    async with Sending(request, spooling=spooling) as sending:
        connected = await sending.connect()
        if isinstance(connected, Connected):
            ...  # store the intent, and read it back
            outcome = await sending.send(deadline_us)

Leaving the block before `send` withdraws the request: no byte of it is sent. If the block is left
while `send` waits, as after a cancellation, the sender continues alone: it reads the answer and
writes it to the spool.

The sender is tied to the thread that starts it, as in `die_with_parent`: use a lasting one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from holdoff_coordinator.custody import outcomes
from holdoff_coordinator.custody.outcomes import (
    Failure,
    NoProof,
    NotSent,
    Outcome,
    boottime_us,
)
from holdoff_coordinator.custody.sender import SIZE_BYTES
from holdoff_coordinator.custody.spool import discard_draft

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from holdoff_coordinator.custody.spool import Spooling

_SECOND = 1_000_000
_SLACK_US = 5 * _SECOND
"""How much later than the sender this side gives up."""
_RUN = (
    "import sys; sys.path += sys.argv[2:]; "
    "from holdoff_coordinator.custody.sender import main; main()"
)
_T = TypeVar("_T")


class Authentication(StrEnum):
    """How the client authenticates at the token URL (RFC 6749, section 2.3.1)."""

    BASIC = "basic"
    BODY = "body"
    QUERY = "query"


@dataclass(frozen=True, slots=True)
class Request:
    """One POST of a form to a token URL.

    Its secrets are zeroed as soon as the sender has them.

    Raises:
        ValueError: The token URL cannot be used; the message says why.
    """

    token_url: str
    client_id: str
    client_secret: bytearray | None = field(repr=False)
    """None for a client that has none."""
    secret_form: Mapping[str, bytearray] = field(repr=False)
    """Fields such as `refresh_token`."""
    form: Mapping[str, str] = field(default_factory=dict)
    """The other fields, such as `grant_type`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Such as `User-Agent` and `Accept`."""
    authentication: Authentication = Authentication.BODY

    def __post_init__(self) -> None:
        where(self.token_url)


@dataclass(frozen=True, slots=True)
class Reach:
    """Where connections may go, and which authorities are trusted; set by the operator."""

    networks: tuple[str, ...] = ()
    """Networks that are allowed although they are not public."""
    plain_http: bool = False
    """Whether plain http is allowed, to loopback addresses."""
    ca_files: tuple[str, ...] = ()
    system_roots: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how large each part may be."""

    connect_us: int = 10 * _SECOND
    """From the start to the end of the TLS handshake."""
    right_us: int = 30 * _SECOND
    """From then to the right to send."""
    unacknowledged_us: int = 20 * _SECOND
    """How long sent data may go unacknowledged (`TCP_USER_TIMEOUT`)."""
    answer_us: int = 30 * _SECOND
    """From the sending to the end of the answer."""
    head_bytes: int = 16 * 1024
    body_bytes: int = 256 * 1024


@dataclass(frozen=True, slots=True)
class Connected:
    """The TLS handshake is done."""

    address: str
    at_us: int


@dataclass(frozen=True, slots=True)
class Where:
    """The parts of a token URL."""

    plain: bool
    host: str
    port: int
    authority: str
    target: str


def where(token_url: str) -> Where:
    """Take a token URL apart.

    Raises:
        ValueError: It cannot be used; the message says why.
    """
    parts = urlsplit(token_url)
    if not token_url.isascii() or not token_url.isprintable() or " " in token_url:
        raise ValueError("a token URL consists of printable ASCII characters without spaces")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("a token URL is https://HOST/PATH")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("a token URL has neither user, password nor fragment")
    plain = parts.scheme == "http"
    port = parts.port or (80 if plain else 443)  # `port` raises ValueError itself
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    authority = parts.netloc
    return Where(plain, parts.hostname, port, authority, target)


def wipe(*secrets: bytearray | None) -> None:
    """Overwrite secrets with zeroes."""
    for secret in secrets:
        if secret is not None:
            secret[:] = bytes(len(secret))


class Sending:
    """One request and the process that sends it; see the module.

    Args:
        request: What to send.
        reach: Where it may go.
        limits: How long and how large each part may be.
        spooling: Where the answer is kept until it is stored; its key is zeroed like the secrets.

    Raises:
        ValueError: The token URL is one of plain http, which is not allowed.
    """

    def __init__(
        self,
        request: Request,
        *,
        reach: Reach = Reach(),
        limits: Limits = Limits(),
        spooling: Spooling | None = None,
    ) -> None:
        if where(request.token_url).plain and not reach.plain_http:
            raise ValueError("plain http is not allowed")
        self._request, self._reach, self._limits = request, reach, limits
        self._spooling = spooling
        self._sender: subprocess.Popen[bytes] | None = None
        self._right_given = False
        self.sent_us: int | None = None
        """When the request was sent, as soon as it is known."""
        self.spooled = False
        """Whether the answer lies in the spool."""

    @property
    def pid(self) -> int:
        """Process id of the sender, once `connect` was called."""
        return self._sender.pid if self._sender else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._wipe()
        if self._sender is None:
            return
        if not self._right_given:
            self._sender.kill()
        self._channel.close()
        threading.Thread(target=self._reap, args=(self._sender,), daemon=True).start()

    def _reap(self, sender: subprocess.Popen[bytes]) -> None:
        sender.wait()
        if self._spooling is not None:
            discard_draft(self._spooling.path)

    async def connect(self) -> Connected | NotSent:
        """Start a sender, and wait until it is connected."""
        until_us = boottime_us() + self._limits.connect_us + _SLACK_US
        try:
            self._start()
            message = await _until(self._hand_over(), until_us)
        except TimeoutError:
            return NotSent(Failure.TIMEOUT, "no connection in time")
        except OSError as error:
            return NotSent(Failure.SENDER, f"the sending process: {error.strerror}")
        except EOFError:
            return NotSent(Failure.SENDER, "the sending process ended")
        if "Connected" in message:
            return Connected(**message["Connected"])
        outcome = outcomes.parse(message["outcome"], b"")
        if not isinstance(outcome, NotSent):
            raise TypeError(f"{type(outcome).__name__} before anything was sent")
        return outcome

    async def send(self, deadline_us: int) -> Outcome:
        """Have the request sent before an instant, and wait for the answer."""
        self._right_given = True
        until_us = max(deadline_us, boottime_us()) + self._limits.answer_us + _SLACK_US
        try:
            return await _until(self._converse(deadline_us), until_us)
        except TimeoutError:
            detail = "the sending process does not report"
        except (OSError, EOFError):
            detail = "the sending process ended"
        return NoProof(Failure.SENDER, detail, self.sent_us, boottime_us())

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        try:
            # Not by asyncio, which kills a process when its loop ends.
            self._sender = subprocess.Popen(
                command(),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            self._channel.close()
            raise
        finally:
            theirs.close()

    async def _hand_over(self) -> dict[str, Any]:
        secrets = self._secrets()
        head = json.dumps(self._head(list(secrets))).encode()
        await self._write(head)
        for secret in secrets.values():
            await self._write(secret)
        self._wipe()
        return await self._read_message()

    async def _converse(self, deadline_us: int) -> Outcome:
        delivered = False
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # its report may be waiting
                await self._write(json.dumps({"until_us": deadline_us}).encode())
                delivered = True
            message = await self._read_message()
        except (OSError, EOFError):
            if delivered:
                raise
            return NotSent(Failure.SENDER, "the sending process ended")
        if "sent_us" in message:
            self.sent_us = message["sent_us"]
            message = await self._read_message()
        found, self.spooled = message["outcome"], message["spooled"]
        ((_, fields),) = found.items()
        body = await self._read_frame() if "status" in fields else bytearray()
        return outcomes.parse(found, body)

    def _head(self, secrets: list[str]) -> dict[str, Any]:
        request, spooling = self._request, self._spooling
        return {
            **asdict(where(request.token_url)),
            **asdict(self._reach),
            "limits": asdict(self._limits),
            "client_id": request.client_id,
            "authentication": request.authentication.value,
            "form": dict(request.form),
            "secret_fields": list(request.secret_form),
            "headers": dict(request.headers),
            "spool": None if spooling is None else spooling.path,
            "secrets": secrets,
        }

    def _secrets(self) -> dict[str, bytearray | bytes]:
        """Return what is handed over in frames of its own; no field of a form has a space."""
        secrets: dict[str, bytearray | bytes] = dict(self._request.secret_form)
        if self._request.client_secret is not None:
            secrets["client secret"] = self._request.client_secret
        if self._spooling is not None:
            secrets["spool key"] = self._spooling.key
            secrets["wrapped key"] = self._spooling.wrapped_key
        return secrets

    def _wipe(self) -> None:
        wipe(self._request.client_secret, *self._request.secret_form.values())
        if self._spooling is not None:
            wipe(self._spooling.key)

    async def _write(self, data: bytearray | bytes) -> None:
        # Straight to the system: a buffer in between would keep a copy.
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._channel, len(data).to_bytes(SIZE_BYTES, "big"))
        with memoryview(data) as view:
            await loop.sock_sendall(self._channel, view)

    async def _read_message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self._read_frame())
        return message

    async def _read_frame(self) -> bytearray:
        return await self._read_exactly(int.from_bytes(await self._read_exactly(SIZE_BYTES), "big"))

    async def _read_exactly(self, size: int) -> bytearray:
        # Likewise: directly into the result.
        data = bytearray(size)
        with memoryview(data) as view:
            filled = 0
            while filled < size:
                got = await asyncio.get_running_loop().sock_recv_into(self._channel, view[filled:])
                if not got:
                    raise EOFError
                filled += got
        return data


def command() -> list[str]:
    """Return the command that starts a sender; no environment variable changes it."""
    return [sys.executable, "-I", "-S", "-c", _RUN, str(os.getpid()), *_folders()]


@cache
def _folders() -> tuple[str, ...]:
    """Return the folders that the sender imports from, besides the standard library."""
    specs = map(importlib.util.find_spec, ("holdoff_coordinator", "h11", "cryptography"))
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return tuple(dict.fromkeys(str(Path(origin).absolute().parents[1]) for origin in origins))


async def _until(work: Coroutine[Any, Any, _T], until_us: int) -> _T:
    """Wait for something until an instant of the boot clock.

    Raises:
        TimeoutError: It takes longer.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            left_us = max(0, until_us - boottime_us())
            # Never long, since the loop's clock stops while the machine is suspended. Also once
            # when the time is over: what came while this process was stopped is still to be read.
            await asyncio.wait({task}, timeout=min(left_us / _SECOND, 1.0))
            if not left_us and not task.done():
                raise TimeoutError
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
