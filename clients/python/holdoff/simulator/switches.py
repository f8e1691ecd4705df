"""The rules on which sources disagree or are silent, each a switch with every known behaviour.

The first value of a switch is its default: the strictest, since jobs are tested
against it, or else the one that is seen most. What a switch says of itself is
also its help on the command line.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, get_type_hints


class ErrorWindow(StrEnum):
    """Whether ten errors are allowed in any 60 minutes or in each hour of the clock."""

    SLIDING = "sliding"
    CLOCK_HOUR = "clock-hour"


class UsedAt(StrEnum):
    """When a new refresh token counts as used, under the rotation until-used.

    Either at a refresh or at an API call with the access token that came with
    it, or at a refresh only.
    """

    REFRESH_OR_CALL = "refresh-or-call"
    REFRESH = "refresh"


class OldTokenStatus(StrEnum):
    """The status for an invalid refresh token."""

    UNAUTHORIZED = "401"
    BAD_REQUEST = "400"


class RefreshInterval(StrEnum):
    """Whether the app must wait 570 s between access tokens; support can exempt an app."""

    ENFORCED = "enforced"
    EXEMPT = "exempt"


class EarlyStatus(StrEnum):
    """The status for a refresh that is too early; older reports have 401."""

    BAD_REQUEST = "400"
    UNAUTHORIZED = "401"


class EarlyRefresh(StrEnum):
    """Whether the refusal of a refresh that is too early contains a new refresh token.

    If so, the new one replaces the refused one, as after a refresh.
    """

    ERROR_ONLY = "error-only"
    NEW_TOKEN = "new-token"  # noqa: S105 -- a switch's value


class ExpiresIn(StrEnum):
    """Whether `expires_in` is a string of digits or a number."""

    STRING = "string"
    NUMBER = "number"


class DailyTokenStatus(StrEnum):
    """The status of the 201st token request of a day; 400 counts as an error, 429 does not."""

    TOO_MANY_REQUESTS = "429"
    BAD_REQUEST = "400"


class Consent(StrEnum):
    """Who allows an app at the authorization endpoint.

    Either the user who is chosen on its page or in the parameter user, or
    without a page the first user of the app.
    """

    PAGE = "page"
    AUTO = "auto"


class BlockAnswer(StrEnum):
    """The response to a blocked key: a JSON error, or the page that a blocked address gets."""

    JSON_403 = "403-json"
    HTML_503 = "503-html"


class BlockSchedule(StrEnum):
    """How long a key's blocks last.

    The first lasts an hour; each later one twice as long, twice as long up to a
    day, or also an hour.
    """

    DOUBLING = "doubling"
    DOUBLING_TO_A_DAY = "doubling-to-a-day"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Switches:
    """One behaviour chosen for each open rule."""

    error_window: ErrorWindow = ErrorWindow.SLIDING
    used_at: UsedAt = UsedAt.REFRESH_OR_CALL
    old_token_status: OldTokenStatus = OldTokenStatus.UNAUTHORIZED
    refresh_interval: RefreshInterval = RefreshInterval.ENFORCED
    early_status: EarlyStatus = EarlyStatus.BAD_REQUEST
    early_refresh: EarlyRefresh = EarlyRefresh.ERROR_ONLY
    expires_in: ExpiresIn = ExpiresIn.STRING
    daily_token_status: DailyTokenStatus = DailyTokenStatus.TOO_MANY_REQUESTS
    consent: Consent = Consent.PAGE
    block_answer: BlockAnswer = BlockAnswer.JSON_403
    block_schedule: BlockSchedule = BlockSchedule.DOUBLING

    def set(self, text: str) -> Switches:
        """Set one switch as `NAME=VALUE`, for example `error-window=clock-hour`.

        Raises:
            ValueError: there is no such switch or value; the message lists those there are.
        """
        name, _, value = text.partition("=")
        if name == "old-token-dies":
            raise ValueError(
                "old-token-dies was replaced by --rotation single-use (for 'issue')"
                " and by --rotation until-used with --switch used-at=refresh-or-call|refresh"
            )
        kind = _KINDS.get(name)
        if kind is None:
            raise ValueError(f"{name!r} is none of the switches {', '.join(_KINDS)}")
        if value not in set(kind):
            raise ValueError(f"{name} is one of {', '.join(kind)}, not {value!r}")
        changes: dict[str, Any] = {name.replace("-", "_"): kind(value)}
        return replace(self, **changes)

    def document(self) -> dict[str, str]:
        """The switches by name, as the report has them."""
        return {name.replace("_", "-"): str(value) for name, value in asdict(self).items()}


DEFAULTS = Switches()

_KINDS: dict[str, type[StrEnum]] = {
    name.replace("_", "-"): kind for name, kind in get_type_hints(Switches).items()
}

SETTINGS: tuple[str, ...] = tuple(
    f"{name}={value}" for name, kind in _KINDS.items() for value in kind
)
"""Every `NAME=VALUE` that `Switches.set` takes."""

HELP: tuple[tuple[str, str], ...] = tuple(
    (f"{name}={'|'.join(kind)}", " ".join((inspect.getdoc(kind) or "").split()))
    for name, kind in _KINDS.items()
)
"""Each switch with its values, the default first, and what is open about it."""
