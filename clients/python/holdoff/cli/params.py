"""Types of command-line parameters: durations, times, labels, and names that shells complete."""

from __future__ import annotations

import contextlib
import re
import time
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import click
from click.shell_completion import CompletionItem

from holdoff._text import MOST_LABEL_CHARACTERS, described, printable, quoted
from holdoff.durations import parse_duration
from holdoff.names import AppName, BackOffName, BudgetName, LeaseName, TokenName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdoff.v1 import budget_pb2, lease_pb2, token_pb2

    _Found = lease_pb2.Lease | token_pb2.Token | budget_pb2.Budget | budget_pb2.BackOff

_NAME = re.compile(r"[A-Za-z0-9._/-]+")
"""Names that a shell may complete: no character in them has a meaning for the shell."""
_COMPLETION_SECONDS = 1.0

MOST_LABELS = 16
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
_RANDOM_UUID = 4
_TIME_OF_DAY = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9]))?")


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


class DurationOrPolicy(click.ParamType["float | Literal['policy']"]):
    """A duration, or `policy`, which gives the setting back to the policy."""

    name = "duration|policy"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | Literal["policy"]:
        """Read what was typed."""
        return "policy" if value == "policy" else Duration().convert(value, param, ctx)


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


class Moment(click.ParamType[datetime]):
    """A time that has passed: `03:10`, `2026-11-24T03:10`, or a duration such as `2h ago`."""

    name = "time"

    def convert(
        self, value: str | datetime, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Read what was typed."""
        if isinstance(value, datetime):
            return value
        try:
            return parse_moment(value, datetime.now(UTC))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_moment(text: str, now: datetime) -> datetime:
    """Read a time as people type it, in the local zone where the text names none.

    Args:
        text: A time of day (the latest such time is meant), a date with a time or without one,
            both with an offset if need be, or a duration, which counts back from now.
        now: The time, with its zone.

    Returns:
        The time, with its zone.

    Raises:
        ValueError: If the text is anything else.
    """
    if match := _TIME_OF_DAY.fullmatch(text):
        hour, minute, second = (int(digits or 0) for digits in match.groups())
        today = now.astimezone().replace(tzinfo=None, microsecond=0)
        # Twice a year a time of day comes twice, or not at all: of all that it can mean, the last.
        candidates = [
            (today - timedelta(days=days))
            .replace(hour=hour, minute=minute, second=second, fold=fold)
            .astimezone()
            for days in (0, 1)
            for fold in (0, 1)
        ]
        return max(moment for moment in candidates if moment <= now)
    with contextlib.suppress(ValueError, OverflowError):
        return now - timedelta(seconds=float(parse_duration(text.removesuffix(" ago"))))
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.fromisoformat(text).astimezone()
    raise ValueError(
        f"{quoted(text)} is not a time: write 03:10 (the latest), 2026-11-24T03:10, "
        "2026-11-24T03:10+01:00, or how long ago, such as 2h"
    )


class Label(click.ParamType[tuple[str, str]]):
    """`KEY=VALUE`, as the coordinator takes it."""

    name = "key=value"

    def convert(
        self,
        value: str | tuple[str, str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, str]:
        """Read what was typed."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals:
            self.fail(f"{quoted(value)} is not KEY=VALUE", param, ctx)
        if not _LABEL_KEY.fullmatch(key):
            self.fail(
                f"{quoted(key)} is not a key: write 1 to 63 characters of a-z, 0-9, '.', '_', '/' "
                "and '-', with a letter or digit at both ends",
                param,
                ctx,
            )
        return key, described(text, MOST_LABEL_CHARACTERS)


class EventId(click.ParamType[str]):
    """A random UUID, as the coordinator takes it."""

    name = "uuid"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check what was typed."""
        import uuid  # noqa: PLC0415 - slow to import, and only needed here

        try:
            found = uuid.UUID(value)
        except ValueError:
            found = uuid.UUID(int=0)
        if found.version != _RANDOM_UUID:
            self.fail(
                f"{quoted(value)} is not a UUID of version 4: uuidgen -r makes one", param, ctx
            )
        return str(found)


class Name(click.ParamType[str]):
    """A resource name of one of some kinds, checked before anybody is asked about it."""

    name = "name"

    def __init__(
        self, *kinds: type[AppName | TokenName | LeaseName | BudgetName | BackOffName]
    ) -> None:
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
        from holdoff import Client  # noqa: PLC0415 - slow to import, and only needed here

        del param
        deadline_seconds = time.monotonic() + _COMPLETION_SECONDS
        endpoint = ctx.find_root().params["endpoint"]
        app, slash, _ = incomplete.removeprefix("apps/").partition("/")
        parent = f"apps/{app}" if slash else ""
        offers: dict[str, str] = {}
        # Whatever goes wrong here, the user is typing: say nothing.
        with (
            contextlib.suppress(Exception),
            Client(endpoint, timeout_seconds=_COMPLETION_SECONDS) as client,
        ):
            listing: Iterator[_Found] = client.list_tokens(parent)
            if LeaseName in self._kinds.values():
                listing = client.list_leases(parent)
            elif BudgetName in self._kinds.values():
                listing = client.list_budgets(parent)
            elif BackOffName in self._kinds.values():
                listing = iter(client.list_back_offs(parent))
            for found in takewhile(lambda _: time.monotonic() < deadline_seconds, listing):
                segments = found.name.split("/")
                for slashes in self._kinds:
                    name = "/".join(segments[: slashes + 1])
                    offers[name] = _description(found) if name == found.name else ""
        return [
            CompletionItem(name, help=help_ or None)
            for name, help_ in sorted(offers.items())
            if name.startswith(incomplete) and _NAME.fullmatch(name)
        ]


class PolicyName(click.ParamType[str]):
    """The name of a policy; the coordinator checks it."""

    name = "text"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer what the coordinator knows, if it answers within a second, else the presets."""
        del param
        try:
            from holdoff import Client  # noqa: PLC0415 - slow to import, and only needed here

            endpoint = ctx.find_root().params["endpoint"]
            with Client(endpoint, timeout_seconds=_COMPLETION_SECONDS) as client:
                titles = {policy.name: policy.title for policy in client.list_policies()}
        except Exception:  # noqa: BLE001 - whatever goes wrong here, the user is typing
            from holdoff.policies import presets  # noqa: PLC0415 - seldom needed

            titles = {name: preset.title for name, preset in presets().items()}
        return [
            CompletionItem(name, help=printable(title) or None)
            for name, title in sorted(titles.items())
            if name.startswith(incomplete) and _NAME.fullmatch(name)
        ]


def _description(found: _Found) -> str:
    """What a shell shows beside a name, such as the state of a token or the holder of a lease."""
    # Not at the top: it brings rich along, which `holdoff run` seldom needs.
    from holdoff.cli.output import enum_text, holder_text, state_text  # noqa: PLC0415
    from holdoff.v1 import budget_pb2, lease_pb2  # noqa: PLC0415

    match found:
        case lease_pb2.Lease():
            text = holder_text(found.holder)
        case budget_pb2.Budget(scope=scope):
            place = " ".join(filter(None, (scope.division, scope.endpoint)))
            text = ": ".join(filter(None, (enum_text(found, "state"), place)))
        case budget_pb2.BackOff():
            text = ": ".join(filter(None, (enum_text(found, "state"), found.reason)))
        case _:
            text = state_text(found)
    return printable(text)
