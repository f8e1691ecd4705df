"""Messages that jobs print, with their right reading; `python -m tests.corpus` reads them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from holdoff._recognise import OutputRecogniser, SeenBlock
from holdoff.policies import presets
from holdoff_coordinator.policies import policy_message

if TYPE_CHECKING:
    from holdoff._recognise import Seen

POLICY = presets()["exact-online"]


@dataclass(frozen=True)
class Reading:
    """An error or a block, at the place that a budget is kept for."""

    status: int = 0
    division: str = ""
    endpoint: str = ""
    count: int = 1
    throttle: str = ""


@dataclass(frozen=True)
class Message:
    """What a job prints, and what counts of it."""

    id: str
    source: str
    text: str
    counts: list[Reading]


def messages() -> list[Message]:
    """Return the corpus."""
    tables = tomllib.loads((Path(__file__).parent / "messages.toml").read_text())["message"]
    return [
        Message(
            table["id"],
            table["source"],
            table["text"],
            [_placed(Reading(**counts)) for counts in table["counts"]],
        )
        for table in tables
    ]


def read(output: bytes) -> list[Reading]:
    """Return what the recogniser counts of an output."""
    recogniser = OutputRecogniser(policy_message(POLICY))
    return [_reading(one) for one in [*recogniser.feed(output), *recogniser.finish()]]


def _reading(seen: Seen) -> Reading:
    if isinstance(seen, SeenBlock):
        return _placed(Reading(seen.status, seen.division, seen.endpoint, 1, seen.throttle))
    return _placed(Reading(seen.status, seen.division, seen.endpoint, seen.count))


def _placed(one: Reading) -> Reading:
    """Put the endpoint into the form that budgets compare."""
    endpoint = POLICY.place(one.endpoint)[1].casefold()
    return Reading(one.status, one.division, endpoint, one.count, one.throttle)
