"""Recognises errors and blocks, in what a job prints and in HTTP answers. Pure.

What counts as either is the policy's to say; besides, any job may print lines of its own::

    HOLDOFF-ERROR division=535193 endpoint=crm/Accounts status=400 count=2
    HOLDOFF-BLOCKED status=429 retry_after=60

in which every field may be left out, and values may stand in double quotes.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from holdoff.policies import find_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from holdoff.v1 import policy_pb2

MOST_COUNT = 10_000
MOST_LINE_BYTES = 64 * 1024
"""Of a longer line the rest is skipped."""
MOST_SEARCHED = 4_000
"""Characters of a line in which is searched, so that no expression runs for long."""
MOST_BODY_BYTES = 64 * 1024
LINES_AFTER = 5
"""So many lines after an error's the line with its place may stand."""
LINES_BEFORE = 20
"""So many lines before it a division may have been named."""
EPOCH_SECONDS, EPOCH_MILLISECONDS = 10**9, 10**12
"""Numbers from here on are times, not durations."""
MOST_RETRY_SECONDS = 366 * 24 * 3600.0

_NEUTRAL = re.compile(r"HOLDOFF-(ERROR|BLOCKED)\b(.*)")
_FIELD = re.compile(r"(\w+)=(?:\"([^\"]*)\"|(\S*))")


@dataclass(frozen=True, slots=True)
class SeenError:
    """An error that a job met."""

    status: int = 0
    """HTTP status; 0 when it is not known."""
    division: str = ""
    endpoint: str = ""
    """URL or path, as it was printed."""
    count: int = 1


@dataclass(frozen=True, slots=True)
class SeenBlock:
    """An answer that blocks or throttles."""

    status: int = 0
    division: str = ""
    endpoint: str = ""
    retry_after_seconds: float | None = None
    """How long it lasts from now on; None where nobody said."""
    throttle: str = ""
    """Name of the policy's throttle that fits; empty for its block."""


Seen = SeenError | SeenBlock


@dataclass(slots=True)
class _Pending:
    """An error whose place may still follow."""

    status: int
    coded: bool
    division: str = ""
    endpoint: str = ""
    lines_left: int = LINES_AFTER


class OutputRecogniser:
    """Recognises errors in one stream of what a job prints.

    An error's line is followed, within five lines, by those with its URL and division; a division
    may also stand in the twenty lines before. A line with a code and one with a status that
    follow each other without a place between them are one error, as Data Hub prints it.
    """

    def __init__(self, policy: policy_pb2.Policy) -> None:
        output = policy.output
        self._errors = list(_compiled(output.errors))
        self._places = list(_compiled(output.places))
        self._codes = dict(output.codes)
        self._endpoint_path = policy.endpoint_path
        self._throttles = {
            status: throttle.name
            for throttle in reversed(policy.throttles)
            if not throttle.body and not throttle.header
            for status in throttle.statuses
        }
        # Found in a text of many lines wherever an error is found in one of them.
        self._hints = [_NEUTRAL, *_compiled(output.errors, re.MULTILINE)]
        self._rest = b""
        self._skipping = False
        self._pending: _Pending | None = None
        self._divisions: deque[str] = deque(maxlen=LINES_BEFORE)

    @property
    def pending(self) -> bool:
        """Whether an error waits for the line with its place."""
        return self._pending is not None

    def feed(self, data: bytes) -> list[Seen]:
        """Take in what was printed, cut anywhere; return what is known of it."""
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            self._skipping = not newline
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        seen = self._lines(whole) if newline else []
        if len(self._rest) > MOST_LINE_BYTES:
            seen += self._line(self._rest)
            self._rest, self._skipping = b"", True
        return seen

    def _lines(self, whole: bytes) -> list[Seen]:
        """Take in whole lines. Those without anything of interest cost next to nothing."""
        if self._pending is None:
            text = whole.decode(errors="replace").replace("\r\n", "\n")
            if not any(one.search(text) for one in self._hints):
                for line in whole.rsplit(b"\n", LINES_BEFORE)[-LINES_BEFORE:]:
                    self._remember(_readable(line))
                return []
        return [one for line in whole.split(b"\n") for one in self._line(line)]

    def _remember(self, line: str) -> None:
        """Remember the division that a line names, or that it names none."""
        self._divisions.append(self._place(line).get("division", ""))

    def flush(self) -> list[Seen]:
        """Give up waiting for a place."""
        return [self._close()] if self._pending else []

    def finish(self) -> list[Seen]:
        """Take in that nothing more comes."""
        rest, self._rest = self._rest, b""
        return [*(self._line(rest) if rest else ()), *self.flush()]

    def _line(self, raw: bytes) -> Iterator[Seen]:
        line = _readable(raw)
        if match := _NEUTRAL.search(line):
            yield from self.flush()
            yield self._neutral(match[1], match[2])
        elif found := next(filter(None, (one.search(line) for one in self._errors)), None):
            yield from self._error(line, found.groupdict())
        elif pending := self._pending:
            place = self._place(line)
            pending.lines_left -= 1
            pending.division = place.get("division") or pending.division
            pending.endpoint = place.get("endpoint") or pending.endpoint
            if pending.endpoint or not pending.lines_left:
                yield self._close()
        self._remember(line)

    def _error(self, line: str, groups: Mapping[str, str | None]) -> Iterator[Seen]:
        code, status = groups.get("code"), groups.get("status")
        number = int(status) if status and status.isdecimal() else self._codes.get(code or "", 0)
        pending, place = self._pending, self._place(line)
        if pending and pending.coded and status and not pending.endpoint:
            pending.status, pending.coded = number, False  # the message of the code before
        else:
            yield from self.flush()
            pending = self._pending = _Pending(number, coded=code is not None and status is None)
        pending.division = place.get("division") or pending.division
        pending.endpoint = place.get("endpoint") or pending.endpoint
        pending.lines_left = LINES_AFTER
        if pending.endpoint and not pending.coded:
            yield self._close()

    def _place(self, line: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for pattern in (*self._errors, *self._places):
            if match := pattern.search(line):
                groups = match.groupdict()
                if value := groups.get("endpoint") or groups.get("url"):
                    found.setdefault("endpoint", value)
                if value := groups.get("division"):
                    found.setdefault("division", value)
        return found

    def _close(self) -> Seen:
        pending, self._pending = self._pending, None
        assert pending is not None  # noqa: S101 - callers looked
        division = pending.division or find_place(self._endpoint_path, pending.endpoint)[0]
        division = division or next(filter(None, reversed(self._divisions)), "")
        return self._seen(pending.status, division, pending.endpoint, 1)

    def _seen(self, status: int, division: str, endpoint: str, count: int) -> Seen:
        if throttle := self._throttles.get(status):
            return SeenBlock(status, division, endpoint, None, throttle)
        return SeenError(status, division, endpoint, count)

    def _neutral(self, kind: str, text: str) -> Seen:
        fields = {name: quoted or plain for name, quoted, plain in _FIELD.findall(text)}
        status = _number(fields.get("status", ""), 599) or 0
        division, endpoint = fields.get("division", ""), fields.get("endpoint", "")
        if kind == "ERROR":
            count = _number(fields.get("count", ""), MOST_COUNT) or 1
            return self._seen(status, division, endpoint, count)
        retry_after = _number(fields.get("retry_after", ""), int(MOST_RETRY_SECONDS))
        return SeenBlock(status, division, endpoint, retry_after, fields.get("throttle", ""))


def recognise_answer(
    policy: policy_pb2.Policy,
    status: int,
    headers: Mapping[str, str],
    body: bytes = b"",
    *,
    now_epoch_seconds: float,
) -> SeenBlock | None:
    """Recognise an HTTP answer that blocks or throttles, by the policy's throttles in order.

    A time in a header counts from the answer's own `Date`, where it has one.
    """
    for throttle in policy.throttles:
        if throttle.statuses and status not in throttle.statuses:
            continue
        text = body[:MOST_BODY_BYTES].decode(errors="replace")
        lines = [f"{name}: {value}" for name, value in headers.items()]
        if not _fits(throttle.body, [text]) or not _fits(throttle.header, lines, re.IGNORECASE):
            continue
        values = {name.casefold(): value for name, value in headers.items()}
        now = _http_date(values.get("date", "")) or now_epoch_seconds
        until = next(
            (values[name.casefold()] for name in throttle.until if name.casefold() in values), ""
        )
        return SeenBlock(
            status, retry_after_seconds=_seconds_until(until, now), throttle=throttle.name
        )
    return None


def _seconds_until(text: str, now: float) -> float | None:
    """Read what a header says about the end: None if that makes no sense."""
    text = text.strip()
    if re.fullmatch(r"\d{1,15}(\.\d{1,9})?", text):
        number = float(text)
        if number >= EPOCH_MILLISECONDS:
            number = number / 1000 - now
        elif number >= EPOCH_SECONDS:
            number -= now
    else:
        date = _http_date(text)
        if date is None:
            return None
        number = date - now
    return number if 0 <= number <= MOST_RETRY_SECONDS else None


def _http_date(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _fits(pattern: str, texts: Iterable[str], flags: int = 0) -> bool:
    """Whether a pattern is found in any of these; none fits, a broken one does not."""
    if not pattern:
        return True
    return any(one.search(text) for one in _compiled([pattern], flags) for text in texts)


def _compiled(patterns: Iterable[str], flags: int = 0) -> Iterator[re.Pattern[str]]:
    """Compile what compiles: a newer coordinator may know what we do not."""
    for pattern in patterns:
        try:
            yield re.compile(pattern, flags)
        except re.error:
            continue


def _readable(raw: bytes) -> str:
    """A line as the expressions see it."""
    return raw[: 4 * MOST_SEARCHED].decode(errors="replace")[:MOST_SEARCHED].rstrip("\r")


def _number(text: str, most: int) -> int | None:
    """Read a number from 1 to `most`, cut to it; None for anything else."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        return None
    return min(int(text), most)
