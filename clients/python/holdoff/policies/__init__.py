r"""The rules of providers, as files: presets beside this module, and those of operators.

A policy file is TOML. What each field means stands here; where a preset's value comes from, in
its file.

Patterns are RE2 regular expressions (https://github.com/google/re2/wiki/Syntax): a search takes
time in proportion to the text, whatever the pattern. RE2 has no lookahead, lookbehind or
backreferences (`(?=…)`, `(?<!…)`, `\1`); `\d`, `\w`, `\s` and `\b` match only ASCII; `$` matches
the end of the text, as `\z` does. A pattern has at most 2,000 characters. Only the first 2,000
characters of a path, 4,000 of a line or a header, and 64 KiB of a body are searched.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from holdoff import _toml
from holdoff._patterns import PatternError, compile_pattern
from holdoff._places import find_place
from holdoff._text import quoted
from holdoff.durations import parse_duration

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

DEFAULT_POLICY = "exact-online"

ScopeField = Literal["app", "token", "division", "endpoint"]
Id = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9-]{1,63}\Z")]
HeaderName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}\Z")]
Status = Annotated[int, msgspec.Meta(ge=100, le=599)]

_MOST_BITS = 64
_PLACE_GROUPS = frozenset({"url", "division", "endpoint", "token"})
_CODE = re.compile(r"[\w.-]{1,63}")


class PolicyError(ValueError):
    """A policy file is wrong; the message says in which line, and what to write."""


class Seconds(float):
    """A duration, in files as `570s`, `9.5m`, `1h` or `30d`."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file; a field that nobody knows is an error."""


class Refresh(_Table, frozen=True, kw_only=True):
    """When a token may be refreshed, and what becomes of the old one."""

    interval: Seconds
    """Least time between two refreshes; `0s` where the provider has no such rule."""
    margin: Seconds = Seconds(0)
    """Added to the interval unless a token sets an interval of its own."""
    at: Literal["end", "start"] = "end"
    """When a run is taken to refresh: at its last instant, or at its confirmed start."""
    access_token_life: Seconds = Seconds(0)
    """0 where it is not known: a run then always counts as refreshed at its end."""
    rotation: Literal["reusable", "grace", "single-use", "single-use-revokes"] = "single-use"
    """Whether a used refresh token works on: always, for a while, never; or it ends the grant."""
    grace: Seconds | None = None
    """How long a used refresh token works on, where rotation is "grace"."""
    idle_life: Seconds | None = None
    """How long an unused refresh token lives."""

    def __post_init__(self) -> None:
        if (self.grace is not None) != (self.rotation == "grace"):
            raise ValueError('`grace` belongs to rotation = "grace", and only to it')


class Endpoint(_Table, frozen=True, kw_only=True):
    """How a call's division and endpoint are found in its path or URL."""

    path: str
    """A regular expression with the group `endpoint` and, if there are any, `division`."""

    def __post_init__(self) -> None:
        groups = _groups_of("path", self.path)
        if "endpoint" not in groups or groups - {"endpoint", "division"}:
            raise ValueError("`path` needs a group (?P<endpoint>…), and may have (?P<division>…)")


class Limit(_Table, frozen=True, kw_only=True):
    """At most so many events in any window of this length, for each value of the scope."""

    name: Id
    event: Literal["errors", "token_requests", "calls"]
    most: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    window: Seconds
    scope: tuple[ScopeField, ...]
    """For whom is counted; the app always belongs to it."""
    statuses: tuple[Status, ...] = ()
    """HTTP statuses that count as errors."""
    margin: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The part of `most` that is kept free; the budget is low when no more room is left."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        if bool(self.statuses) != (self.event == "errors"):
            raise ValueError('`statuses` belongs to event = "errors", and only to it')
        if self.margin >= self.most:
            raise ValueError("`margin` must be less than `most`")


class Block(_Table, frozen=True, kw_only=True):
    """How long a block lasts where the provider does not say."""

    scope: tuple[ScopeField, ...] = ("app",)
    first: Seconds = Seconds(60)
    """Ours, as all that is not given: `domain.md` has no such numbers for most providers."""
    factor: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    """By how much a block is longer than the one before."""
    most: Seconds = Seconds(3600)
    """No block is taken to be longer, whatever the provider's answer says."""
    forget_after: Seconds = Seconds(86400)
    """After so long without a block the next one is a first one."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        if self.most < self.first:
            raise ValueError("`most` must not be less than `first`")


class Throttle(_Table, frozen=True, kw_only=True):
    """How an answer that blocks or throttles is recognised: all that is given must fit."""

    name: Id
    statuses: tuple[Status, ...] = ()
    """Some providers throttle with 200."""
    body: str = ""
    """A regular expression that is found in the body."""
    header: str = ""
    """A regular expression that is found in a line `Name: value` of the headers, without case."""
    scope: tuple[ScopeField, ...] = ("app",)
    """Who must be quiet."""
    until: tuple[HeaderName, ...] = ("Retry-After",)
    """Headers that say when it ends, the first that makes sense counts.

    Seconds, an HTTP date (RFC 9110, section 10.2.3), or seconds or milliseconds since 1970.
    """
    length: Seconds | None = None
    """How long it lasts where no header says, `most` of the block at most; where this is not given
    what the block says, longer each time."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        if not (self.statuses or self.body or self.header):
            raise ValueError("a throttle without `statuses`, `body` or `header` matches everything")
        for field, pattern in (("body", self.body), ("header", self.header)):
            if pattern:
                _groups_of(field, pattern)
        if self.length is not None and not self.length:
            raise ValueError("`length` must be more than 0s")


class Output(_Table, frozen=True, kw_only=True):
    """How errors are recognised in what a job prints: regular expressions, line by line.

    Where all that one fits has some letters in common, only lines with these are searched: it costs
    next to nothing.
    """

    errors: tuple[str, ...]
    """A line with an error. A group `status` has its HTTP status, a group `code` one of `codes`;
    with neither the status is not known. The groups of `places` may be there too."""
    places: tuple[str, ...] = ()
    """A line near it that says where: groups `url`, `division` or `endpoint`, or a group `token` if
    the call was to the token endpoint."""
    codes: dict[str, Any] = {}
    """HTTP statuses of codes, whose case does not count."""
    token_path: Annotated[str, msgspec.Meta(pattern=r"\A(/[!-~]{1,199})?\Z")] = ""
    """The path of the token endpoint, which the group `token` needs."""

    def __post_init__(self) -> None:
        if not self.errors:
            raise ValueError("`errors` needs a regular expression, to recognise errors")
        for number, pattern in enumerate(self.errors):
            field = f"errors[{number}]"
            if extra := _groups_of(field, pattern) - _PLACE_GROUPS - {"status", "code"}:
                raise ValueError(f"`{field}` has an unknown group: {quoted(min(extra))}")
        for number, pattern in enumerate(self.places):
            field = f"places[{number}]"
            groups = _groups_of(field, pattern)
            if not groups or groups - _PLACE_GROUPS:
                raise ValueError(
                    f"`{field}` needs groups (?P<url>…), (?P<division>…), endpoint or token"
                )
        if not self.token_path and any(
            "token" in compile_pattern(one).groups for one in self.errors + self.places
        ):
            raise ValueError('`token_path` is missing: the group `token` needs it, as in "/token"')
        for code, status in self.codes.items():  # of which msgspec would not say the wrong one
            if not _CODE.fullmatch(code):
                raise ValueError(f"`codes` are letters, digits, '.', '_' and '-': {quoted(code)}")
            if type(status) is not int or not 100 <= status <= 599:  # noqa: PLR2004 - HTTP's
                raise ValueError(f"`codes.{code}` must be an HTTP status, 100 to 599")


class Policy(_Table, frozen=True, kw_only=True):
    """What a provider asks of those who use its API."""

    name: Id
    title: str = ""
    refresh: Refresh
    longest_ttl: Seconds = Seconds(86400)
    """The longest TTL of a lease; a loss of data holds back grants for as long, and an interval."""
    endpoint: Endpoint | None = None
    limit: tuple[Limit, ...] = ()
    block: Block = msgspec.field(default_factory=Block)
    throttle: tuple[Throttle, ...] = ()
    output: Output | None = None
    when_quiet: Literal["pause", "finish", "terminate"] = "pause"
    """What `holdoff run` does with a command while a scope of its job must be quiet."""

    def __post_init__(self) -> None:
        for table, named in (("limit", self.limit), ("throttle", self.throttle)):
            names = [one.name for one in named]
            for number, name in enumerate(names):
                if name in names[:number]:
                    raise ValueError(f"`{table}[{number}].name`: this name is used twice")

    def place(self, path: str) -> tuple[str, str]:
        """Find a call's (division, endpoint) in its path or URL, each in its one normal form."""
        return find_place(self.endpoint.path if self.endpoint else "", path)


def read_policy(path: Path | Traversable) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: It is not a policy; the message begins with `FILE:LINE:`.
        OSError: It cannot be read.
    """
    text = ""
    try:
        text = _toml.decode(path.read_bytes())
        return msgspec.convert(_toml.read(text), Policy, dec_hook=_convert)
    except _toml.TomlError as error:
        raise PolicyError(f"{path.name}:{error.line}: {error}") from None
    except msgspec.ValidationError as error:
        # A field's name in quotes may have anything in it, but what follows it is the last.
        what, _, where = str(error).rpartition(" - at `$")
        what, where = (what, where.removesuffix("`").removeprefix(".")) if what else (where, "")
        # Of a whole table the message says which field it is about.
        if field := _FIELD.match(what):
            where = f"{where}.{field[1]}" if where else field[1]
        place = f"{path.name}:{_line_of(text, where)}: "
        raise PolicyError(place + (f"{where}: " if where else "") + what) from None


@cache
def presets() -> dict[str, Policy]:
    """Return the policies that ship, by name."""
    found = [
        read_policy(entry)
        for entry in files("holdoff.policies").iterdir()
        if entry.name.endswith(".toml")
    ]
    return {policy.name: policy for policy in sorted(found, key=lambda policy: policy.name)}


def _check_scope(scope: tuple[ScopeField, ...]) -> None:
    if "app" not in scope or len(set(scope)) != len(scope):
        raise ValueError('`scope` must name "app", and no field twice')


def _groups_of(field: str, pattern: str) -> set[str]:
    """Check a regular expression, and return the names of its groups."""
    try:
        compiled = compile_pattern(pattern)
    except PatternError as error:
        raise ValueError(f"`{field}` is not a regular expression of RE2: {error}") from None
    if compiled.search("") is not None:
        raise ValueError(f"`{field}` matches everything: make it more specific")
    return set(compiled.groups)


def _convert(kind: type, value: Any) -> Any:
    """Read the types of fields that TOML does not have."""
    if kind is Seconds and isinstance(value, str):
        return Seconds(parse_duration(value))
    # A number in base 16 may have more digits than `str` writes.
    wrong = hex(value) if isinstance(value, int) and value.bit_length() > _MOST_BITS else str(value)
    raise ValueError(f'write a duration such as "570s" or "1h", not {quoted(wrong)}')


_FIELD = re.compile(r"(?:Object contains unknown field )?`([\w.\[\]-]+)`")
_ENTRY = re.compile(
    r"""^[ \t]*(?:(?P<brackets>\[\[?)\s*(?P<table>[\w."'-]+)\s*\]|(?P<key>[\w."'-]+)\s*=)""",
    re.MULTILINE,
)
_VALUE = re.compile(
    r"""\#[^\n]*|(?P<value>\'{3}.*?\'{3}|"{3}.*?"{3}|'[^'\n]*'|"(?:\\.|[^"\\\n])*"|[^\s,\[\]]+)""",
    re.DOTALL,
)


def _line_of(text: str, path: str) -> int:
    """Find the line of a field such as `limit[2].most`; of its table if it is not there."""
    table, counts = "", Counter[str]()
    nearest, start, end = "", 0, 0
    for entry in _ENTRY.finditer(text):
        if name := entry["table"]:
            here = table = name + (f"[{counts[name]}]" if entry["brackets"] == "[[" else "")
            counts[name] += 1
        else:
            here = f"{table}.{entry['key']}".removeprefix(".")
        here = here.replace('"', "").replace("'", "")
        fits = path in {here, here.removesuffix("[0]")} or path.startswith((f"{here}.", f"{here}["))
        if fits and len(here) > len(nearest):
            nearest, start, end = here, entry.start(), entry.end()
    if element := re.fullmatch(r"\[(\d+)\]", path[len(nearest) :]):
        values = [value for value in _VALUE.finditer(text, end) if value["value"]]
        start = values[int(element[1])].start()
    return text.count("\n", 0, start) + 1
