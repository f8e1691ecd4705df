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
from dataclasses import dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from holdoff._patterns import search_for, try_compile
from holdoff._places import MOST_PATH_CHARACTERS, find_place, without_host
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
"""Within this many lines after an error another line may have its place. Empty lines do not count,
and neither do those of a stack trace."""
MOST_FRAMES = 200
"""At most this many lines of a stack trace are skipped."""
LINES_BEFORE = 20
"""A division may have been named within this many lines before an error, or a few more."""
EPOCH_SECONDS, EPOCH_MILLISECONDS = 10**9, 10**12
"""Numbers from here on are times, not durations."""
MOST_RETRY_SECONDS = 366 * 24 * 3600.0
SAME_ERROR_SECONDS = 10.0
"""Equal errors in two streams within this time are one error."""
MOST_REMEMBERED = 200
"""At most this many errors are compared with those of other streams."""

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
_FRAME = re.compile(
    r"\s*+(?:(?:[^\W\d_]{1,3}|\ufffd) [^\s(.:/]++\.[^\s(:]*+ ?\(|#\d++ |--- |\.\.\. \d|Stack trace)"
)
"""A line of a stack trace of .NET, in any language, of Java or of PHP: `  at Name.Of.Method(…)`."""
_INNER = re.compile(r"\s*+(?:--->|Caused by:|Next \S)")
"""The line of another exception for the same error."""
_THROWN = re.compile(r"\s*+(?:\w++[.$\\])++\w++: ")
"""The type of an exception, before its message."""
_TRACEBACK = re.compile(r"  |\t|Traceback \(most recent call last\)")
"""A line of what Python prints before an exception; others indent such lines too."""


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
    """The path as it was printed, whatever the host. The query, which may be secret, is cut off."""
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
    """Name of the policy's throttle that matches; empty for its block."""


Seen = SeenError | SeenBlock


@dataclass(slots=True)
class _Remembered:
    """An error that was counted, and the streams that it was read from."""

    seen: Seen
    """With all that any of the streams says of its place."""
    at_seconds: float
    sources: set[str]


class Duplicates:
    """Finds errors that a job writes to more than one stream, such as its log and the console.

    An error counts once if a stream repeats what another one showed less than ten seconds before.
    Two errors are the same if they differ in nothing but that one lacks a division or an endpoint.
    Each is compared once for each stream: two equal errors of one stream are two errors, and
    remain two if another stream repeats both.
    """

    def __init__(self) -> None:
        self._remembered: deque[_Remembered] = deque(maxlen=MOST_REMEMBERED)

    def is_new(self, source: str, seen: Seen, now_seconds: float) -> bool:
        """Whether no other stream has shown this error, and remember it."""
        for one in self._remembered:
            if (
                source not in one.sources
                and now_seconds - one.at_seconds < SAME_ERROR_SECONDS
                and _may_be_same(one.seen, seen)
            ):
                one.sources.add(source)
                one.seen = replace(
                    seen,
                    division=one.seen.division or seen.division,
                    endpoint=one.seen.endpoint or seen.endpoint,
                )
                return False
        self._remembered.append(_Remembered(seen, now_seconds, {source}))
        return True


class OutputRecogniser:
    r"""Recognises errors in one stream of what a job prints.

    An error's line is followed, within five lines, by those with its URL and division. The first
    endpoint ends the wait for them, as do the line of the next error and ``flush``; if no division
    and no URL was named by then, the last division in the twenty lines before is taken. A line is
    one error at most. A line with a code and one with a status are one error too, if neither has
    the other and no line between them has an endpoint: Data Hub prints errors in this way. The
    lines of a stack trace are skipped. An inner exception that such a trace names, one whose
    message a logger wrote on the line of the error, and the body of a token endpoint's answer
    after the line with its status, are not counted again.

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
        self._token_url = next(iter(policy.oauth.token_urls), "")
        self._throttle_names = {throttle.name for throttle in policy.throttles}
        self._throttles = {
            status: throttle.name
            for throttle in reversed(policy.throttles)
            if not throttle.body and not throttle.header
            for status in throttle.statuses
        }
        literals = {"holdoff-"}.union(*(_literals_of(one.text) for one in self._errors))
        self._literals = [one.encode() for one in literals]
        self._may_interest = search_for(self._literals)
        self._rest = b""
        self._recent: deque[bytes | str] = deque(maxlen=_RECENT_LINES)
        """The last lines, or the divisions that were found in them."""
        self._open: dict[str, str] | None = None
        """What is known of the error whose place may still follow, by names of groups."""
        self._lines_left = 0
        self._frames_left = 0
        self._complete = False
        """Whether the last lines belong to an error of which everything is known."""
        self._error_line = ""
        """The last line with an error."""

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
        if not self._in_error and not self._may_interest(whole):
            # Seldom more are empty than not.
            last = [line for line in whole.rsplit(b"\n", 3 * _RECENT_LINES)[1:] if line]
            if len(last) < _RECENT_LINES:
                last = [line for line in whole.split(b"\n") if line]
            self._recent.extend(line[:_MOST_LINE_BYTES] for line in last[-_RECENT_LINES:])
            return
        for line in whole.split(b"\n"):
            if not line:
                continue
            if self._in_error or self._may_interest(line):
                text = _readable(line)
                if self._in_error and self._frames_left and _FRAME.match(text):
                    self._frames_left -= 1
                    continue
                yield from self._line(text)
            self._recent.append(line[:_MOST_LINE_BYTES])

    @property
    def _in_error(self) -> bool:
        """Whether the next line may belong to an error."""
        return self._open is not None or self._complete

    def _line(self, line: str) -> Iterator[Seen]:
        if (match := _MARKER.match(line)) and self._counts(match[2] or ""):
            yield from self._close()
            self._complete = False
            yield self._marked(match[1], match[3])
            return
        error, place = _search(self._errors, line), _search(self._places, line) or {}
        if error is not None and self._is_detail(line, place | error):
            if self._complete:
                return
            place = place | error
            error = None
        if error is None and self._complete and self._frames_left and _TRACEBACK.match(line):
            self._frames_left -= 1
            return
        self._complete = False
        if error is not None:
            self._error_line = line
            error = place | error
            if self._open is not None and _complement(self._open, error):
                self._open = error | self._open
            else:
                yield from self._close()
                self._open = error
            self._lines_left, self._frames_left = LINES_AFTER, MOST_FRAMES
        elif self._open is not None:
            self._open = place | self._open
            self._lines_left -= 1
        if self._open is None:
            return
        complete = bool("status" in self._open and self._endpoint(self._open))
        has_place = "url" in self._open or "endpoint" in self._open
        if complete or (error is None and (has_place or not self._lines_left)):
            yield from self._close()
            self._complete = complete

    def _is_detail(self, line: str, found: Mapping[str, str]) -> bool:
        """Whether a line with an error only says more of the one before, whose status is known."""
        if not self._complete and (self._open is None or "status" not in self._open):
            return False
        if _INNER.match(line) or ("token" in found and "status" not in found):
            return True
        # Loggers write a message, and then the exception with its message.
        thrown = _THROWN.match(line)
        if thrown is None or line.strip() == self._error_line.strip():
            return False
        return self._error_line.rstrip().endswith(line[thrown.end() :].rstrip())

    def _endpoint(self, found: Mapping[str, str]) -> str:
        if "token" in found:
            return self._token_url
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
        found, self._open = self._open, None
        status = _status(found.get("status", ""))
        if not status:
            status = self._codes.get(found.get("code", "").casefold(), 0)
        endpoint, division = self._endpoint(found), ""
        if "token" not in found:  # a token request has no division
            division = found.get("division") or self._division_in(endpoint)
            if "url" not in found or not self._endpoint_path:  # else such a call as current/Me
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

    An empty pattern is found in everything, a broken one in nothing.
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


def _may_be_same(one: Seen, other: Seen) -> bool:
    """Whether two streams may have shown one error, perhaps one of them with less detail."""
    for first, second in ((one.division, other.division), (one.endpoint, other.endpoint)):
        if first and second and first.casefold() != second.casefold():
            return False
    return one == replace(other, division=one.division, endpoint=one.endpoint)


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
    """The path of a URL as the coordinator takes it, without what does not belong to it in a text.

    Only the path: the host may be the provider's or a gateway's.
    """
    text = without_secrets(_printable(text)).strip(" \"'.,;:")
    text = without_host(text)
    if text.count(")") > text.count("("):
        text = text.removesuffix(")").rstrip("'")
    return text[:MOST_PATH_CHARACTERS]


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text))


def _literals_of(pattern: str) -> set[str]:
    """Return texts, in lower case, of which one is in everything that a pattern matches.

    The empty text, which is in everything, if none is known.
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
