"""Where a call goes: its division and endpoint, each in its one normal form."""

from __future__ import annotations

import re

from holdoff._patterns import try_compile

MOST_PATH_CHARACTERS = 2_000
"""Of a path or URL of which the endpoint is wanted; longer ones are cut."""
MOST_ENDPOINT_CHARACTERS = 200

_KEY = re.compile(r"\((?:'[^']*+'|[^()']++)*+\)")
"""A key of OData. A quote inside a text is doubled, which reads as two texts side by side."""


def find_place(pattern: str, path: str) -> tuple[str, str]:
    """Find a call's (division, endpoint) by the pattern of a policy, each in its one normal form.

    The query goes, OData keys become `()`, and case does not count (`domain.md`, paths). With no
    pattern, or one of another release that does not compile, no division is found.
    """
    path = re.split(r"[?#]", path[:MOST_PATH_CHARACTERS], maxsplit=1)[0]
    division, endpoint = "", path
    compiled = try_compile(pattern) if pattern else None
    if compiled and (found := compiled.search(path)) is not None:
        division, endpoint = found.get("division", ""), found.get("endpoint", "")
    return division, normal_endpoint(endpoint)


def normal_endpoint(text: str) -> str:
    """Give an endpoint its normal form: no keys, no case, no slash at either end."""
    text = _KEY.sub("()", text[:MOST_PATH_CHARACTERS])
    return text.strip("/").casefold()[:MOST_ENDPOINT_CHARACTERS].rstrip("/")
