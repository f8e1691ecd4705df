"""Types of command-line parameters: durations, and resource names that the shell completes."""

import contextlib
import time
from itertools import takewhile

import click
from click.shell_completion import CompletionItem

from holdoff import Client
from holdoff.durations import parse_duration
from holdoff.names import AppName, LeaseName, TokenName

_COMPLETION_SECONDS = 1.0


class Duration(click.ParamType[float]):
    """A duration such as `570s` or `9.5m`; in Python a number of seconds."""

    name = "duration"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read what was typed; a default may be a number of seconds already."""
        if isinstance(value, int | float):
            return value
        try:
            return float(parse_duration(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class LastRefreshed(click.ParamType[str | float]):
    """`never`, `unknown`, or an age; in Python the word, or a number of seconds."""

    name = "never|unknown|duration"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | float:
        """Read what was typed."""
        if value in ("never", "unknown"):
            return value
        return Duration().convert(value, param, ctx)


class Name(click.ParamType[str]):
    """A resource name of one of some kinds, checked before anybody is asked about it."""

    name = "name"

    def __init__(self, *kinds: type[AppName | TokenName | LeaseName]) -> None:
        self._kinds = {kind.PATTERN.count("/"): kind for kind in kinds}

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check what was typed."""
        # The number of segments tells which kind was meant.
        kind = self._kinds.get(value.count("/"), next(iter(self._kinds.values())))
        try:
            return str(kind.parse(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the names that the coordinator knows, if it answers within a second."""
        del param
        deadline_seconds = time.monotonic() + _COMPLETION_SECONDS
        endpoint = ctx.find_root().params["endpoint"]
        app, slash, _ = incomplete.removeprefix("apps/").partition("/")
        parent = f"apps/{app}" if slash else ""
        names: set[str] = set()
        # Whatever goes wrong here, the user is typing: say nothing.
        with (
            contextlib.suppress(Exception),
            Client(endpoint, timeout_seconds=_COMPLETION_SECONDS) as client,
        ):
            leases = LeaseName in self._kinds.values()
            listing = client.list_leases(parent) if leases else client.list_tokens(parent)
            found = (resource.name for resource in listing)
            for name in takewhile(lambda _: time.monotonic() < deadline_seconds, found):
                segments = name.split("/")
                names.update("/".join(segments[: slashes + 1]) for slashes in self._kinds)
        return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
