"""Recognises errors and blocks, in what a job prints and in HTTP answers. Pure.

The policy says what counts as either. Besides, any job may print these lines, with the key of its
run (`HOLDOFF_REPORT_KEY` in its environment)::

    HOLDOFF-ERROR key=0123… division=535193 endpoint=crm/Accounts status=400 count=2
    HOLDOFF-BLOCKED key=0123… status=429 retry_after=60

The key is the first field; the others are optional, and values may be in double quotes. An invalid
value is ignored. Such a marker must begin its line. The key shows that it comes from the job,
because data that the job prints cannot contain the key. Without a key it counts only if all of the
output is trusted.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from holdoff._patterns import try_compile
from holdoff._places import MOST_PATH_CHARACTERS, find_place
from holdoff._text import without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from holdoff._patterns import Pattern
    from holdoff.v1 import policy_pb2

MOST_COUNT = 10_000
MOST_SEARCHED = 4_000
"""How many characters of a line or a header are searched."""
MOST_BODY_BYTES = 64 * 1024
MOST_DIVISION_CHARACTERS = 100
LINES_AFTER = 5
"""So many lines after an error's the line with its place may stand. Empty ones do not count."""
LINES_BEFORE = 20
"""So many lines before it a division may have been named, or a few more."""
EPOCH_SECONDS, EPOCH_MILLISECONDS = 10**9, 10**12
"""Numbers from here on are times, not durations."""
MOST_RETRY_SECONDS = 366 * 24 * 3600.0

_MOST_LINE_BYTES = 4 * MOST_SEARCHED  # of UTF-8
_RECENT_LINES = LINES_BEFORE + 1 + LINES_AFTER  # an error's own too, and those after it
_STATUSES = range(100, 600)
_WHAT = {"code", "status"}

_MARKER = re.compile(r"HOLDOFF-(ERROR|BLOCKED)(?: key=([0-9a-f]{1,64}))?(?=\s|\Z)(.*+)")
_FIELD = re.compile(r"(?<!\w)(\w++)=(?:\"([^\"]*+)\"|(\S*+))")
_TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*+[ -/]*+[@-~]")
_COUNT = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")
_STATUS = re.compile(r"[0-9]{3}")


@runtime_checkable
class Headers(Protocol):
    """Headers of an HTTP answer: a dict, or what the libraries for HTTP have instead."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Return pairs of a name and a value; a name may come more than once."""
        ...


@dataclass(frozen=True, slots=True)
class SeenError:
    """An error that a job met, as the coordinator takes it."""

    status: int = 0
    """HTTP status; 0 when it is not known."""
    division: str = ""
    endpoint: str = ""
    """URL or path as it was printed, but for what never counts and may be secret: the query, and
    a password."""
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


class OutputRecogniser:
    r"""Recognises errors in one stream of what a job prints.

    An error's line is followed, within five lines, by those with its URL and division. The first
    endpoint ends the wait for them, as do the line of the next error and ``flush``; if no division
    and no URL was named by then, the last division in the twenty lines before is taken. A line is
    one error at most. A line with a code and one with a status are one error too, if neither has
    the other and no endpoint stands on a line between them: so Data Hub prints it.

    Lines end with ``\n``, ``\r\n`` or, as progress is shown, ``\r``.

    Args:
        policy: Whose patterns are searched for.
        key: The key of this run, which its markers have.
        trust_output: Whether markers without a key count too.
    """

    def __init__(
        self, policy: policy_pb2.Policy, key: str = "", *, trust_output: bool = False
    ) -> None:
        self._key = key
        self._trust_output = trust_output
        self.ignored_markers = False
        """Whether there were markers without a key, which did not count."""
        output = policy.output
        self._errors = _compiled(output.errors)
        self._places = _compiled(output.places)
        self._codes = {code.casefold(): status for code, status in output.codes.items()}
        self._endpoint_path = policy.endpoint_path
        self._division_query = tuple(policy.division_query)
        self._throttle_names = {throttle.name for throttle in policy.throttles}
        self._throttles = {
            status: throttle.name
            for throttle in reversed(policy.throttles)
            if not throttle.body and not throttle.header
            for status in throttle.statuses
        }
        literals = {"holdoff-"}.union(*(_literals_of(one.text) for one in self._errors))
        self._literals = [one.encode() for one in literals]
        self._rest = b""
        self._recent: deque[bytes | str] = deque(maxlen=_RECENT_LINES)
        """The last lines, or the divisions that were found in them."""
        self._open: dict[str, str] | None = None
        """What is known of the error whose place may still follow, by names of groups."""
        self._lines_left = 0

    @property
    def pending(self) -> bool:
        """Whether an error waits for the line with its place."""
        return self._open is not None

    def feed(self, data: bytes) -> list[Seen]:
        """Take in what was printed, cut anywhere; return what is known of it."""
        whole, newline, rest = data.replace(b"\r", b"\n").rpartition(b"\n")
        if not newline:
            self._rest = (self._rest + rest[:_MOST_LINE_BYTES])[:_MOST_LINE_BYTES]
            return []
        whole, self._rest = self._rest + whole, rest[:_MOST_LINE_BYTES]
        return list(self._lines(whole))

    def flush(self) -> list[Seen]:
        """Give up waiting for a place."""
        return list(self._close())

    def finish(self) -> list[Seen]:
        """Take in that nothing more comes."""
        rest, self._rest = self._rest, b""
        return [*self._lines(rest), *self._close()]

    def _lines(self, whole: bytes) -> Iterator[Seen]:
        """Take in whole lines. Those without anything of interest cost next to nothing."""
        lower = whole.lower()
        if self._open is None and not self._may_interest(lower):
            # Seldom more are empty than not.
            last = [line for line in whole.rsplit(b"\n", 3 * _RECENT_LINES)[1:] if line]
            if len(last) < _RECENT_LINES:
                last = [line for line in whole.split(b"\n") if line]
            self._recent.extend(line[:_MOST_LINE_BYTES] for line in last[-_RECENT_LINES:])
            return
        for line, lower_line in zip(whole.split(b"\n"), lower.split(b"\n"), strict=True):
            if not line:
                continue
            if self._open is not None or self._may_interest(lower_line):
                yield from self._line(_readable(line))
            self._recent.append(line[:_MOST_LINE_BYTES])

    def _may_interest(self, lower: bytes) -> bool:
        return any(literal in lower for literal in self._literals)

    def _line(self, line: str) -> Iterator[Seen]:
        if (match := _MARKER.match(line)) and self._counts(match[2] or ""):
            yield from self._close()
            yield self._marked(match[1], match[3])
            return
        error, place = _search(self._errors, line), _search(self._places, line) or {}
        if error is not None:
            error = place | error
            if self._open is not None and _complement(self._open, error):
                self._open = error | self._open
            else:
                yield from self._close()
                self._open = error
            self._lines_left = LINES_AFTER
            if "status" in self._open and self._endpoint():
                yield from self._close()
        elif self._open is not None:
            self._open = place | self._open
            self._lines_left -= 1
            if self._endpoint() or not self._lines_left:
                yield from self._close()

    def _endpoint(self) -> str:
        found = self._open or {}
        return found.get("endpoint") or found.get("url") or ""

    def _recent_division(self) -> str:
        for index in reversed(range(len(self._recent))):
            line = self._recent[index]
            if isinstance(line, bytes):
                found = _search([*self._errors, *self._places], _readable(line)) or {}
                line = self._recent[index] = found.get("division", "")
            if line:
                return line
        return ""

    def _close(self) -> Iterator[Seen]:
        if self._open is None:
            return
        found, endpoint, self._open = self._open, self._endpoint(), None
        status = _status(found.get("status", ""))
        if not status:
            status = self._codes.get(found.get("code", "").casefold(), 0)
        division = found.get("division") or self._division_in(endpoint)
        if "url" not in found or not self._endpoint_path:  # else a call without one, as current/Me
            division = division or self._recent_division()
        yield self._seen(status, division, endpoint, 1)

    def _division_in(self, url: str) -> str:
        return find_place(self._endpoint_path, url, self._division_query)[0]

    def _seen(self, status: int, division: str, endpoint: str, count: int) -> Seen:
        division, endpoint = _clean_division(division), _clean_endpoint(endpoint)
        if throttle := self._throttles.get(status):
            return SeenBlock(status, division, endpoint, None, throttle)
        return SeenError(status, division, endpoint, count)

    def _counts(self, key: str) -> bool:
        """Whether a marker with this key counts. Another key belongs to a nested run."""
        if key:
            return key == self._key
        self.ignored_markers = self.ignored_markers or not self._trust_output
        return self._trust_output

    def _marked(self, kind: str, text: str) -> Seen:
        fields = {name: quoted or plain for name, quoted, plain in _FIELD.findall(text)}
        status = _status(fields.get("status", ""))
        endpoint = fields.get("endpoint", "")
        division = fields.get("division") or self._division_in(endpoint)
        if kind == "ERROR":
            count = fields.get("count", "")
            number = min(int(count), MOST_COUNT) if _COUNT.fullmatch(count) else 1
            return self._seen(status, division, endpoint, number or 1)
        throttle = fields.get("throttle", "")
        return SeenBlock(
            status,
            _clean_division(division),
            _clean_endpoint(endpoint),
            _seconds_until(fields.get("retry_after", ""), None),
            throttle if throttle in self._throttle_names else "",
        )


def recognise_answer(
    policy: policy_pb2.Policy,
    status: int,
    headers: Headers | Iterable[tuple[str, str]],
    body: bytes | None = b"",
    *,
    now_epoch_seconds: float,
) -> SeenBlock | None:
    """Recognise an HTTP answer that blocks or throttles, by the policy's throttles in order.

    A time in a header counts from the answer's own `Date`, where it has one. Where no header says
    how long, the group `retry_after` of the throttle's pattern for the body does, in seconds.
    """
    pairs = list(headers.items() if isinstance(headers, Headers) else headers)
    lines = [f"{name}: {value}"[:MOST_SEARCHED] for name, value in pairs]
    text = (body or b"")[:MOST_BODY_BYTES].decode(errors="replace")
    for throttle in policy.throttles:
        if not (throttle.statuses or throttle.body or throttle.header):
            continue  # of a newer release, which recognises it by something else
        if throttle.statuses and status not in throttle.statuses:
            continue
        found = _found(throttle.body, [text])
        if found is None or _found(throttle.header, lines, ignore_case=True) is None:
            continue
        values = {name.casefold(): value for name, value in reversed(pairs)}
        now = _http_date(values.get("date", "")) or now_epoch_seconds
        ends = [_seconds_until(values.get(name.casefold(), ""), now) for name in throttle.until]
        ends.append(_seconds_until(found.get("retry_after", ""), None))
        return SeenBlock(
            status,
            retry_after_seconds=next((end for end in ends if end is not None), None),
            throttle=throttle.name,
        )
    return None


def _seconds_until(text: str, now: float | None) -> float | None:
    """Read what a header says about the end: None if that makes no sense."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        end = float(text)
        if end < EPOCH_SECONDS:
            return end if end <= MOST_RETRY_SECONDS else None
        if end >= EPOCH_MILLISECONDS:
            end /= 1000
    elif (date := _http_date(text)) is not None:
        end = date
    else:
        return None
    return end - now if now is not None and 0 <= end - now <= MOST_RETRY_SECONDS else None


def _http_date(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text[:MOST_DIVISION_CHARACTERS])
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, IndexError, OverflowError, TypeError):
        return None


def _found(
    pattern: str, texts: Iterable[str], *, ignore_case: bool = False
) -> dict[str, str] | None:
    """Return the groups of the first text that a pattern is found in; None if it is in none.

    No pattern is found in everything, a broken one in nothing.
    """
    if not pattern:
        return {}
    compiled = try_compile(pattern, ignore_case=ignore_case)
    matches = (compiled.search(text) for text in texts) if compiled else iter(())
    return next((groups for groups in matches if groups is not None), None)


def _compiled(patterns: Iterable[str]) -> list[Pattern]:
    """Compile what compiles: a newer coordinator may know what we do not."""
    return [one for one in map(try_compile, patterns) if one]


def _search(patterns: Iterable[Pattern], line: str) -> dict[str, str] | None:
    """Return the groups of all patterns that are found, the first one's first; None if none is."""
    found: dict[str, str] | None = None
    for groups in (one.search(line) for one in patterns):
        if groups is not None:
            found = {name: text for name, text in groups.items() if text} | (found or {})
    return found


def _complement(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether one has the code of an error, and the other its status."""
    first, second = _WHAT & one.keys(), _WHAT & other.keys()
    return len(first) == len(second) == 1 and first != second


def _readable(line: bytes) -> str:
    """A line as the patterns see it: not too long, and without colours."""
    text = line[:_MOST_LINE_BYTES].decode(errors="replace")[:MOST_SEARCHED]
    return _TERMINAL_SEQUENCE.sub("", text) if "\x1b" in text else text


def _status(text: str) -> int:
    """Read an HTTP status; 0 for anything else."""
    return int(text) if _STATUS.fullmatch(text) and int(text) in _STATUSES else 0


def _clean_division(text: str) -> str:
    """A division as the coordinator takes it."""
    return _printable(text).strip(" \"',;")[:MOST_DIVISION_CHARACTERS]


def _clean_endpoint(text: str) -> str:
    """A URL or path as the coordinator takes it, without what does not belong to it in a text."""
    text = without_secrets(_printable(text)).strip(" \"'.,;:")
    if text.count(")") > text.count("("):
        text = text.removesuffix(")")
    return text[:MOST_PATH_CHARACTERS]


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text))


def _literals_of(pattern: str) -> set[str]:
    """Return texts, in lower case, of which one is in everything that a pattern fits.

    The empty text, which is in everything, where none is known.
    """
    if "[:" in pattern:  # a class such as [[:alpha:]], which Python reads in another way
        return {""}
    try:
        # Private to the standard library. Should it change, all lines are searched: that is
        # slower, and finds the same.
        from re import _parser  # type: ignore[attr-defined] # noqa: PLC0415

        return _literals(_parser.parse(pattern))
    except Exception:  # noqa: BLE001 - whatever it is
        return {""}


def _literals(parsed: Iterable[tuple[Any, Any]]) -> set[str]:
    candidates, run = [{""}], ""
    for operation, value in parsed:
        match str(operation), value:
            case "LITERAL", int() if chr(value).isascii():
                run += chr(value).lower()
                candidates.append({run})
                continue
            case "SUBPATTERN", (*_, inner):
                candidates.append(_literals(inner))
            case (("MAX_REPEAT" | "MIN_REPEAT"), (int(least), _, inner)) if least:
                candidates.append(_literals(inner))
            case "BRANCH", (_, branches):
                candidates.append(set(chain.from_iterable(map(_literals, branches))))
        run = ""
    return max(candidates, key=lambda texts: min(map(len, texts)))
