"""The gateway of a run: its command calls the API through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdoff.cli._run_token import RunToken
from holdoff.gateway.server import Options
from holdoff.gateway.serving import GatewayThread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from holdoff import Client

GATEWAY_URL = "HOLDOFF_GATEWAY_URL"


class CommandGateway(RunToken):
    """Serves a gateway for a command, on a free port and with a secret of this run.

    Args:
        client: Where the coordinator is.
        token: `apps/{app}/tokens/{token}`.
        job: Name of the job, for listings.
        interruptible: Entered where it waits: a signal handler raises there, and only there.
    """

    def __init__(
        self,
        client: Client,
        token: str,
        job: str,
        interruptible: Callable[[], AbstractContextManager[object]],
    ) -> None:
        super().__init__(client, token, interruptible)
        self._gateway = GatewayThread(client.endpoint, token, Options(job=job))

    def begin(self) -> Mapping[str, str]:
        """Start the gateway.

        Raises:
            HoldoffError: The coordinator refuses, or does not answer.
        """
        return {GATEWAY_URL: self._stack.enter_context(self._gateway).url}
