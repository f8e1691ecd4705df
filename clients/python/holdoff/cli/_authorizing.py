"""An authorization by a person: the URL, the browser's way back, and the code."""

from __future__ import annotations

import hmac
import http.server
import signal
import socket
import socketserver
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar
from urllib.parse import parse_qs, urlsplit

import click

from holdoff._text import printable
from holdoff.cli import exits
from holdoff.cli._voice import say
from holdoff.durations import format_duration
from holdoff.errors import HoldoffError, Quarantined, TokenBusy, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, TracebackType

    from holdoff import Client
    from holdoff.v1 import custody_service_pb2, grant_pb2

T = TypeVar("T")

REDIRECT_URI: Final = "http://127.0.0.1:8378/callback"
_LOOPBACK: Final = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
"""Hosts of this machine, and where to listen for them."""
_MOST_CHARACTERS: Final = 20_000
_MOST_FIELDS: Final = 50
_MOST_ERROR_CHARACTERS: Final = 200
_MOST_REQUESTS: Final = 16
"""Of the redirect, at a time."""
_REQUEST_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.2
_LEAST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 5.0
"""Between two attempts: what holds a token may end early."""


@dataclass(frozen=True, slots=True)
class CameBack:
    """What the browser brought back: either a code or an error."""

    code: str = ""
    error: str = ""


class NotOursError(ValueError):
    """It does not belong to the authorization; the message says why."""


class Ended(BaseException):
    """A signal came that ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def came_back(url: str, state: str) -> CameBack:
    """Read the address that the provider sent the browser to.

    Args:
        url: The address, or its query.
        state: The parameter `state` of the authorization.

    Raises:
        NotOursError: It is of another authorization, or has neither a code nor an error.
    """
    fields: dict[str, list[str]] = {}
    with suppress(ValueError):
        fields = parse_qs(
            url.rpartition("?")[2].partition("#")[0][:_MOST_CHARACTERS], max_num_fields=_MOST_FIELDS
        )
    if not fields:
        raise NotOursError("it is no address with `code` and `state`: give the whole address")
    # A field that occurs twice may come from another source.
    found = {name: values[0] for name, values in fields.items() if len(values) == 1}
    if not hmac.compare_digest(found.get("state", "").encode("utf-8", "replace"), state.encode()):
        raise NotOursError("it is not the answer to this authorization: its `state` is another one")
    if found.get("error"):
        return CameBack(error=found["error"])
    if found.get("code"):
        return CameBack(code=found["code"])
    raise NotOursError("it has neither a code nor an error")


class Redirect:
    """Serves the redirect URI on this host while the context is open.

    Args:
        uri: `http://` with a host of this machine.

    Raises:
        OSError: The port cannot be opened.
        ValueError: There is no such port.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.path = parts.path or "/"
        self.state = ""
        """Of the authorization; until it is set everything is refused."""
        self.found: CameBack | None = None
        self._done = threading.Event()
        redirect = self

        class Handler(_Handler):
            of = redirect

        address = (_LOOPBACK[parts.hostname or ""], parts.port or 80)
        self._server = _Server(address, Handler)

    def __enter__(self) -> Self:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(_POLL_SECONDS,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, target: str) -> None:
        """Take what comes back.

        Raises:
            NotOursError: It does not belong to the authorization.
        """
        if not self.state:
            raise NotOursError("no authorization has begun")
        self.found = came_back(target, self.state)
        self._done.set()

    def wait(self, seconds: float) -> CameBack | None:
        """Return what came back, or None if nothing did in that time."""
        until = time.monotonic() + seconds
        while not self._done.wait(min(_POLL_SECONDS, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                return None
        return self.found


class _Handler(http.server.BaseHTTPRequestHandler):
    of: Redirect
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        """Take what comes back."""
        if self.path.partition("?")[0] != self.of.path:
            self._say(404, "There is nothing here.")
            return
        try:
            self.of.take(self.path)
        except NotOursError as error:
            self._say(400, f"Refused: {error}.")
        else:
            self._say(200, "Received: the result is in the terminal. You can close this page.")

    def _say(self, status: int, text: str) -> None:
        body = text.encode()
        with suppress(OSError):  # the browser has gone
            self.send_response_only(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing: the path has the code."""


class _Server(http.server.ThreadingHTTPServer):
    """Serves a few requests at a time, and drops the others."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._room = threading.Semaphore(_MOST_REQUESTS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, without a look for a name of this host."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve it in a thread, if there is room."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, *_: object) -> None:
        """Write nothing: a request that breaks is not ours."""


class Person:
    """Has a person authorize the app for a token.

    Args:
        client: Where the coordinator is.
        token: The token.
        redirect_uri: Where the provider sends the browser.
        manual: Ask for the address that the browser shows, also where the URI is of this host.
    """

    def __init__(self, client: Client, token: str, redirect_uri: str, *, manual: bool) -> None:
        self._client = client
        self._token = token
        self._uri = redirect_uri
        self._manual = manual
        with suppress(ValueError):
            parts = urlsplit(redirect_uri)
            is_here = parts.scheme == "http" and parts.hostname in _LOOPBACK
            self._manual = manual or not is_here

    def authorize(self, wait_seconds: float, **grant: Any) -> grant_pb2.Grant:
        """Do all of it; return the grant that is in custody then.

        Args:
            wait_seconds: How long to wait until the token may be authorized.
            grant: What `client.grants.begin_authorization` takes.

        Raises:
            HoldoffError: The coordinator or the provider refuses.
            click.exceptions.Exit: The app was not authorized.
        """
        with ExitStack() as stack:
            stack.enter_context(_ended_by_signals())
            redirect = None if self._manual else stack.enter_context(self._redirect())
            begun = self._once_free(
                wait_seconds,
                lambda: self._client.grants.begin_authorization(
                    self._token, redirect_uri=self._uri, **grant
                ),
            )
            until = time.monotonic() + begun.valid_for.ToMicroseconds() / 1e6
            done: grant_pb2.Grant | None = None
            error = "cancelled"
            try:
                found = self._ask(begun, redirect, until)
                error = found.error or error
                if found.code:
                    done = self._once_free(
                        until - time.monotonic(),
                        lambda: self._client.grants.complete_authorization(
                            self._token, begun.state, code=found.code
                        ),
                    )
            finally:
                if done is None:
                    self._give_up(begun.state, error)
                    say(f"no grant was given ({error}); nothing changed")
        if done is None:
            raise click.exceptions.Exit(exits.REFUSED)
        return done

    def _give_up(self, state: str, error: str) -> None:
        """End the authorization, so that it holds the token no longer."""
        word = "".join(one for one in error if one.isascii() and one.isprintable())
        with suppress(HoldoffError):  # it has ended, or will by itself
            self._client.grants.complete_authorization(
                self._token, state, error=word[:_MOST_ERROR_CHARACTERS] or "error"
            )

    def _redirect(self) -> Redirect:
        try:
            return Redirect(self._uri)
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise click.UsageError(
                f"cannot serve {self._uri}: {why}; end the program that uses the port, or give "
                "--manual"
            ) from None

    def _ask(
        self,
        begun: custody_service_pb2.BeginAuthorizationResponse,
        redirect: Redirect | None,
        until: float,
    ) -> CameBack:
        """Show the URL, and return what comes back."""
        say("open this URL in a browser, and log on as the user of the token:")
        click.echo(printable(begun.authorization_url), err=True)
        if redirect is None:
            return _pasted(begun.state)
        redirect.state = begun.state
        seconds = until - time.monotonic()
        say(f"waiting for the browser at {self._uri}, {format_duration(round(seconds))} at most")
        return redirect.wait(seconds) or CameBack(error="the time is over")

    def _once_free(self, seconds: float, call: Callable[[], T]) -> T:
        """Repeat a call while it cannot be done yet, for some time; say why."""
        until, said = time.monotonic() + seconds, ""
        while True:
            try:
                return call()
            except (TokenBusy, Quarantined, Unavailable) as error:
                left = until - time.monotonic()
                pause = max(_LEAST_PAUSE_SECONDS, error.retry_after_seconds or 0)
                if pause > left:
                    raise
                cause = error.metadata.get("cause", error.reason)
                if cause != said:
                    say(f"waiting for {self._token}, {format_duration(round(pause))}: {error}")
                    said = cause
            time.sleep(min(pause, _LONGEST_PAUSE_SECONDS))


def _pasted(state: str) -> CameBack:
    while True:
        try:
            text = click.prompt(
                "the address that the browser shows then (it is not shown here)",
                hide_input=True,
                err=True,
            )
        except click.Abort:
            raise KeyboardInterrupt from None
        try:
            return came_back(str(text).strip(), state)
        except NotOursError as error:
            say(str(error))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, with their own exit codes."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except Ended as ended:
        raise click.exceptions.Exit(exits.SIGNAL_BASE + ended.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
