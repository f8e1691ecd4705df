"""What the simulated provider answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from holdoff.simulator.grants import Grant


@dataclass(frozen=True, slots=True)
class Answer:
    """What the provider answers."""

    status: int
    body: Mapping[str, object] | str
    """JSON, or the text of a page."""
    headers: Mapping[str, str] = field(default_factory=dict)
    issued_to: Grant | None = None
    """Set when the body carries an access token: `Provider.sent` must follow."""
    content_type: str = "text/html"
    """Of a text."""

    def without(self, names: Collection[str]) -> Answer:
        """The same answer with fields left out of its JSON."""
        if isinstance(self.body, str):
            return self
        body = {name: value for name, value in self.body.items() if name not in names}
        return replace(self, body=body)


MAINTENANCE = Answer(
    200,
    "<!DOCTYPE html><html><head><title>Maintenance</title></head>"
    "<body><h1>Maintenance</h1><p>Please try again later.</p></body></html>",
)
"""The page that is shown instead of any answer, also with this status (field)."""


def message(text: str) -> dict[str, object]:
    """An error of the REST API in OData's form."""
    return {"error": {"code": "", "message": {"lang": "", "value": text}}}


def oauth_error(
    status: int, error: str, description: str, headers: Mapping[str, str] | None = None
) -> Answer:
    """An error of the token endpoint in OAuth's form."""
    return Answer(status, {"error": error, "error_description": description}, headers or {})


MALFORMED = oauth_error(400, "invalid_request", "The request cannot be read.")
"""For a body that is not a form, is too long, or has an unknown encoding."""
