"""The access token of a run, in a file for its command: waited for, kept current, removed."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Self

import click

from holdoff.cli._access_wait import POLL_SECONDS, wait_for_access_token
from holdoff.custody.files import LOOK_SECONDS, AccessTokenFile
from holdoff.errors import HoldoffError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from holdoff import AccessToken, Client
    from holdoff._process import Guard


class CommandToken:
    """Keeps the access token of a run in a file, from entering to leaving.

    The guard removes the file if this process is killed.

    Args:
        client: Where the coordinator is.
        guard: Of the command, which is not launched yet.
        token: `apps/{app}/tokens/{token}`.
        path: Of the file.
        say: Called with a line for people, also by another thread.
        interruptible: Entered where it waits: a signal handler raises there, and only there.

    Raises:
        click.BadParameter: The path is that of a folder, link, device or FIFO.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a run consists of
        self,
        client: Client,
        guard: Guard,
        token: str,
        path: Path,
        say: Callable[[str], None],
        interruptible: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.path = path.absolute()
        try:
            self._file = AccessTokenFile(self.path, say)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--access-token-file") from None
        self._client = client
        self._guard = guard
        self._token = token
        self._say = say
        self._interruptible = interruptible
        self._news: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._guard.remove_at_end(self.path)
            stack.enter_context(self._file)
            self._file.remove()  # that of a run whose machine crashed
            self._access: AccessToken = stack.enter_context(
                self._client.access_token(self._token, on_renewed=self._news.put)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self, wait_seconds: float | None) -> None:
        """Wait until there is an access token, and show why there is none.

        Raises:
            NoAccessToken: There is none within the wait, or only an operator can help.
            HoldoffError: There is no grant, the caller may not use it, or no coordinator answers.
        """
        wait_for_access_token(self._access, self._client.endpoint, wait_seconds, self._pause)

    def _pause(self) -> None:
        with self._interruptible(), contextlib.suppress(queue.Empty):
            self._news.get(timeout=POLL_SECONDS)

    def keep(self) -> None:
        """Write the file, and keep it current until the end.

        Raises:
            click.BadParameter: It cannot be written.
            HoldoffError: There will be no access token any more.
        """
        try:
            self._file.update(self._access)
        except OSError as error:
            raise click.BadParameter(
                f"cannot write {self.path}: {error.strerror}", param_hint="--access-token-file"
            ) from None
        stop = threading.Event()
        thread = threading.Thread(
            target=self._keep_on, args=(stop,), name="holdoff-access-token-file", daemon=True
        )
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(stop.set)

    def _keep_on(self, stop: threading.Event) -> None:
        said = ""
        while not stop.is_set():
            try:
                self._file.keep(self._access, stop)
            except HoldoffError as error:
                self._file.remove()
                self._say(f"the command gets no access token any more: {error}")
                return
            except OSError as error:
                if said != str(error):
                    said = str(error)
                    self._say(f"the new access token cannot be written to {self.path}: {said}")
                self._file.remove_if_too_old()
                stop.wait(LOOK_SECONDS)
