"""Text from elsewhere, made safe to show on a terminal or in a log, or to keep."""

import re

_LONGEST_QUOTE = 60

MOST_JOB_CHARACTERS = 100
MOST_LABEL_CHARACTERS = 200
"""What the coordinator takes."""


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


def printable_lines(text: str) -> str:
    """Do the same to a text of several lines, and keep these."""
    return "\n".join(map(printable, text.split("\n")))


def described(text: str, most: int) -> str:
    """Make a text that only describes something fit to be sent: escaped, and cut if too long."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


_DIVISION = re.compile(r"[?&](_?division_?=[0-9]{1,20})(?![^&])", re.IGNORECASE)


def without_secrets(url: str) -> str:
    """Cut off what may be a secret in a path or URL: its query, fragment, user and password.

    A password may contain an @ that nothing escapes: the host follows the last one.
    """
    path = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"//[^/]*@", "//", path)


def to_report(url: str) -> str:
    """Return what is sent of a path or URL: of its query only the number of a division.

    Some paths have it there alone (`domain.md`, paths of the XML API).
    """
    division = _DIVISION.search(url.partition("#")[0])
    return without_secrets(url) + (f"?{division[1]}" if division else "")
