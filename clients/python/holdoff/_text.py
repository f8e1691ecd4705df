"""Text from elsewhere, made safe to show on a terminal or in a log, or to keep."""

import re

_LONGEST_QUOTE = 60


def quoted(text: str) -> str:
    """Quote what somebody typed, for an error message.

    Returns:
        The text as `repr` shows it, with all but ASCII escaped, so that nothing in it is obeyed
        by a terminal or looks like another character; cut after 60 characters.
    """
    if len(text) <= _LONGEST_QUOTE:
        return ascii(text)
    return ascii(text[:_LONGEST_QUOTE]) + "..."


def printable(text: str) -> str:
    """Escape what a terminal would obey (control, format and bidi characters), and keep the rest.

    Returns:
        One line of printable characters.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def without_secrets(url: str) -> str:
    """Cut off what may be a secret in a path or URL: its query, fragment, user and password."""
    path = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"//[^/@]*@", "//", path)
