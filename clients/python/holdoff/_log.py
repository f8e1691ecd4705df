"""The logger of the library. It escapes control characters: some texts come from other parties."""

import logging

from holdoff._text import printable_lines

log = logging.getLogger("holdoff")


def _harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable_lines(record.getMessage()), ()
    return True


log.addFilter(_harmless)
