"""Where a call goes: its division and endpoint, each in its one normal form."""

from __future__ import annotations

import re
from functools import lru_cache

MOST_PATH_CHARACTERS = 2_000
"""Of a path or URL of which the endpoint is wanted; longer ones are cut."""
MOST_ENDPOINT_CHARACTERS = 200

NO_PATTERN = (re.error, OverflowError, RecursionError)  # as `re.compile` raises them


def find_place(pattern: str, path: str) -> tuple[str, str]:
    """Find a call's (division, endpoint) by the pattern of a policy, each in its one normal form.

    The query goes, OData keys become `()`, and case does not count (`domain.md`, paths). With no
    pattern, or one of another release that does not compile, no division is found.
    """
    path = re.split(r"[?#]", path[:MOST_PATH_CHARACTERS], maxsplit=1)[0]
    division, endpoint = "", path
    compiled = try_compile(pattern) if pattern else None
    if compiled and (match := compiled.search(path)):
        found = match.groupdict()
        division, endpoint = found.get("division") or "", found.get("endpoint") or ""
    return division, normal_endpoint(endpoint)


def normal_endpoint(text: str) -> str:
    """Give an endpoint its normal form: no keys, no case, no slash at either end."""
    text = re.sub(r"\((?:'(?:[^']|'')*'|[^()'])*\)", "()", text)
    return text.strip("/").casefold()[:MOST_ENDPOINT_CHARACTERS].rstrip("/")


@lru_cache
def try_compile(pattern: str, flags: int = 0) -> re.Pattern[str] | None:
    """Compile a regular expression from the API; None if it is none that we know."""
    try:
        return re.compile(pattern, flags)
    except NO_PATTERN:
        return None
