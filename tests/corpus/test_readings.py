"""What jobs print counts as it should: `messages.toml` has real messages with their reading."""

from __future__ import annotations

import pytest

from tests.corpus import Message, messages, read

MESSAGES = messages()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.id)
def test_a_message_is_read_right(message: Message) -> None:
    """Fails when an error is missed, misplaced or invented."""
    assert read(message.text.encode()) == message.counts


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.id)
def test_a_message_from_windows_is_read_right(message: Message) -> None:
    """Fails when the end of a line, or a colour, hides an error."""
    windows = message.text.replace("\n", "\x1b[0m\r\n\x1b[31m")
    assert read(windows.encode()) == message.counts


def test_no_message_is_there_twice() -> None:
    """Fails when two messages have one id, or one text."""
    for values in ([one.id for one in MESSAGES], [one.text for one in MESSAGES]):
        assert len(set(values)) == len(values)
