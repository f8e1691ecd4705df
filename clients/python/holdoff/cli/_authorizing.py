"""The redirect of an authorization, served on this host; or pasted by the person."""

from __future__ import annotations

import hmac
import http.server
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_MOST_CHARACTERS: Final = 20_000
_MOST_FIELDS: Final = 50
_REQUEST_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class CameBack:
    """What the browser brought back: either a code or an error."""

    code: str = ""
    error: str = ""


class NotOursError(ValueError):
    """It does not belong to the authorization; the message says why."""


def came_back(url: str, state: str) -> CameBack:
    """Read the address that the provider sent the browser to.

    Args:
        url: The address, or its query.
        state: The parameter `state` of the authorization.

    Raises:
        NotOursError: It is of another authorization, or has neither a code nor an error.
    """
    query = urlsplit(url).query if "?" in url else url
    try:
        fields = parse_qs(query[:_MOST_CHARACTERS], max_num_fields=_MOST_FIELDS)
    except ValueError:
        fields = {}
    # A field that is there twice may be somebody else's.
    found = {name: values[0] for name, values in fields.items() if len(values) == 1}
    if not hmac.compare_digest(found.get("state", "").encode(), state.encode()):
        raise NotOursError("it is not the answer to this authorization: its `state` is another one")
    if found.get("error"):
        return CameBack(error=found["error"])
    if found.get("code"):
        return CameBack(code=found["code"])
    raise NotOursError("it has neither a code nor an error")


class Redirect:
    """Serves the redirect URI on this host while the context is open.

    Args:
        uri: `http://` with a host of this machine, and a port.
        state: The parameter `state` of the authorization; other requests are refused.

    Raises:
        OSError: The port cannot be opened.
    """

    def __init__(self, uri: str, state: str) -> None:
        parts = urlsplit(uri)
        self._found: CameBack | None = None
        self._done = threading.Event()
        redirect = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = _REQUEST_SECONDS

            def do_GET(self) -> None:
                """Take what comes back."""
                if urlsplit(self.path).path != (parts.path or "/"):
                    return self._say(404, "There is nothing here.")
                try:
                    redirect._found = came_back(self.path, state)
                except NotOursError as error:
                    return self._say(400, f"Refused: {error}.")
                self._say(200, "Done: go back to the terminal. You can close this page.")
                redirect._done.set()
                return None

            def _say(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response_only(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Referrer-Policy", "no-referrer")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Write nothing: the path has the code."""

        host = parts.hostname or ""
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1" if host == "localhost" else host, parts.port or 80), Handler
        )
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self, seconds: float) -> CameBack | None:
        """Return what came back, or None if nothing did in that time."""
        until = time.monotonic() + seconds
        while not self._done.wait(min(_POLL_SECONDS, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                return None
        return self._found
