"""Examples in the help of commands."""

import click

_HEADING = "Example:"


def example(*lines: str) -> str:
    """An epilog that shows command lines; click leaves them as they are."""
    return "\n".join(("\b", _HEADING, *(f"  {line}" for line in lines)))


def examples_of(command: click.Command) -> list[str]:
    """The command lines that a command's help gives as examples."""
    text = "\n".join(filter(None, (command.help, command.epilog)))
    _, found, rest = text.partition(_HEADING)
    paragraph = rest.strip().split("\n\n")[0]
    return [line.strip() for line in paragraph.splitlines()] if found else []
