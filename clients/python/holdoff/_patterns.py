r"""Patterns of policies: RE2, whose search takes time in proportion to the text.

Only this module compiles patterns that are not written in our own code. RE2 has no lookahead, no
lookbehind and no backreferences, so that no pattern can make it slow. `\d`, `\w`, `\s` and `\b`
match only ASCII. Its library is imported with the first pattern.

Patterns of our own code use `re`, which is imported anyway. Each of them is linear, which
`tests/unit/test_patterns.py` checks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

MOST_PATTERN_CHARACTERS = 2_000
_MOST_PROGRAM = 10_000
"""Steps that RE2 may take for each character at worst. The largest preset needs 1,900."""
_MOST_MEMORY_BYTES = 8 << 20

_LOOKAROUND = (
    "it has no lookahead or lookbehind: match the text around it too, and name the group that you "
    "need, as in (?P<code>…)"
)
_REFERENCE = "it has no backreferences: write out the alternatives"
_INSTEAD = {
    **dict.fromkeys(("(?=", "(?!", "(?<=", "(?<!"), _LOOKAROUND),
    **dict.fromkeys(("(?P=", *(rf"\{digit}" for digit in range(1, 10))), _REFERENCE),
    "(?>": "it does not backtrack, so it has no atomic groups: write (?:…)",
    "++": "it does not backtrack, so it has no possessive repeats: omit the second +",
    "*+": "it does not backtrack, so it has no possessive repeats: omit the +",
    "?+": "it does not backtrack, so it has no possessive repeats: omit the +",
    r"\Z": r"write \z for the end of the text",
    "(?x": "it has no verbose patterns: omit spaces and comments",
    "{": "repeat at most 1000 times; nested repeats multiply",
}
"""What to write instead, by the beginning of the part that RE2 refuses."""


class PatternError(ValueError):
    """A pattern cannot be used; the message says why, and what to write instead."""


class Pattern:
    """A compiled pattern."""

    def __init__(self, text: str, compiled: Any) -> None:
        self.text = text
        self._search = compiled.search
        self._groups = [(name.decode(), number) for name, number in compiled.groupindex.items()]

    @property
    def groups(self) -> frozenset[str]:
        """The names of its groups."""
        return frozenset(name for name, _ in self._groups)

    def search(self, subject: str) -> dict[str, str] | None:
        """Search a text; return the named groups that took part, None if it is not found."""
        # In bytes it is twice as fast. A text from Python may have half a character.
        match = self._search(subject.encode(errors="replace"))
        if match is None:
            return None
        found = ((name, match[number]) for name, number in self._groups)
        return {name: text.decode(errors="replace") for name, text in found if text is not None}


@lru_cache(256)
def compile_pattern(text: str, *, ignore_case: bool = False) -> Pattern:
    """Compile a pattern of a policy.

    Raises:
        PatternError: RE2 cannot run it, or not in a short time.
    """
    import re2  # noqa: PLC0415 - what needs no patterns is quick to start

    if len(text) > MOST_PATTERN_CHARACTERS:
        raise PatternError(f"it is longer than {MOST_PATTERN_CHARACTERS} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MOST_MEMORY_BYTES
    options.case_sensitive = not ignore_case
    try:
        compiled = re2.compile(text.encode(), options)
    except re2.error as error:
        raise PatternError(_reason(error.args[0])) from None
    except UnicodeEncodeError:
        raise PatternError("it has half of a surrogate pair") from None
    if compiled.programsize > _MOST_PROGRAM:
        raise PatternError("it is too large: use smaller repeats")
    return Pattern(text, compiled)


def try_compile(text: str, *, ignore_case: bool = False) -> Pattern | None:
    """Compile a pattern from the API; None if this release cannot use it."""
    try:
        return compile_pattern(text, ignore_case=ignore_case)
    except PatternError:
        return None


def search_for(texts: Collection[bytes]) -> Callable[[bytes], object]:
    """Return a search for any of some texts, in ASCII and without case; it finds None if none is.

    All are searched for at once: more of them take no more time.
    """
    import re2  # noqa: PLC0415 - as above

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MOST_MEMORY_BYTES
    options.case_sensitive = False
    options.encoding = re2.Options.Encoding.LATIN1
    try:
        return re2.compile(b"|".join(map(re.escape, texts)), options).search  # type: ignore[no-any-return]
    except re2.error:  # too many
        return lambda _: True


def _reason(error: bytes) -> str:
    message = error.decode(errors="replace")
    _, _, refused = message.partition(": ")
    instead = (text for begin, text in _INSTEAD.items() if refused.startswith(begin))
    return f"{message[:200]}; {text}" if (text := next(instead, "")) else message[:200]
