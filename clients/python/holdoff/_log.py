"""Where the library logs. What is logged may come from others, and be shown on a terminal."""

import logging

from holdoff._text import printable_lines

log = logging.getLogger("holdoff")


def _harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable_lines(record.getMessage()), ()
    return True


log.addFilter(_harmless)
