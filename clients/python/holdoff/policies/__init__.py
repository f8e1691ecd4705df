r"""The rules of providers, as files: presets beside this module, and those of operators.

A policy file is TOML. This module says what each field means, and docs/policies.md says it for
operators. A preset's file says where its values come from.

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
from urllib.parse import urlsplit

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
QueryName = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Status = Annotated[int, msgspec.Meta(ge=100, le=599)]
Url = Annotated[str, msgspec.Meta(max_length=2_000)]
OAuthScope = Annotated[str, msgspec.Meta(pattern=r"\A[!#-\[\]-~]{1,500}\Z")]
"""A scope token of RFC 6749, section 3.3."""
Scheme = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}\Z")]

if TYPE_CHECKING:
    Statuses = tuple[int, ...]
else:  # A class of statuses is expanded when it is read.
    Statuses = tuple[Status | Literal["1xx", "2xx", "3xx", "4xx", "5xx"], ...]

_MOST_BITS = 64
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_NAMED = ("limit", "concurrency", "throttle", "refusal")
"""Tables of which there may be several, each with a name."""
_PLACE_GROUPS = frozenset({"url", "division", "endpoint", "token"})
_CODE = re.compile(r"[\w.-]{1,63}")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?(?::[0-9]{1,5})?")


class PolicyError(ValueError):
    """A policy file is wrong; the message says in which line, and what to write."""


class Seconds(float):
    """A duration, in files as `570s`, `9.5m`, `1h` or `30d`."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file; an unknown field is an error."""


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
    early_margin: Seconds | None = None
    """How long before its end an access token may be refreshed, and is no longer given to a job."""
    rotation: Literal[
        "none", "reusable", "until-used", "grace", "single-use", "single-use-revokes"
    ] = "single-use"
    """What becomes of a refresh token that was used.

    `none`: a refresh returns no other one. `reusable`: it stays valid. `until-used`: it stays valid
    until its successor is used. `grace`: it stays valid for a while. `single-use`: it is invalid.
    `single-use-revokes`: it is invalid, and using it again revokes the grant.
    """
    grace: Seconds | None = None
    """How long a used refresh token stays valid: for "grace"; for "until-used" at most."""
    idle_life: Seconds | None = None
    """How long an unused refresh token lives."""
    absolute_life: Seconds | None = None
    """How long a grant lives, however often it is refreshed; then a person must authorize again."""

    def __post_init__(self) -> None:
        if self.rotation == "grace" and not self.grace:
            raise ValueError('`grace` is missing: rotation = "grace" needs it, more than 0s')
        if self.grace is not None and self.rotation not in {"grace", "until-used"}:
            raise ValueError('`grace` belongs to rotation = "grace" or "until-used"')
        for field in ("grace", "idle_life", "absolute_life"):
            if getattr(self, field) == 0:
                raise ValueError(f"`{field}` must be more than 0s: omit it if it is not known")
        if self.idle_life and self.absolute_life and self.idle_life > self.absolute_life:
            raise ValueError("`idle_life` must not be longer than `absolute_life`")
        if self.early_margin is not None:
            earliest = self.interval + self.margin
            if earliest + self.early_margin > self.access_token_life:
                raise ValueError(
                    "`early_margin` is too long: the sum of `interval`, `margin` and "
                    "`early_margin` must not exceed `access_token_life`"
                )


class OAuth(_Table, frozen=True, kw_only=True):
    """How a client asks for an access token, and where and how the token is used."""

    token_urls: tuple[Url, ...] = ()
    """Token endpoints, one for each region; none where they differ for each account."""
    hosts: tuple[str, ...] = ()
    """Hosts of the API, as `host` or `host:port`; none where they differ for each account."""
    client_authentication: tuple[Literal["basic", "body", "query"], ...] = ("basic",)
    """Where the client id and secret go, the preferred way first. RFC 6749 requires "basic"."""
    authorization_urls: tuple[Url, ...] = ()
    """Where a person authorizes an app, one for each region. The one with the host of the token URL
    belongs to it, or the only one."""
    scopes: tuple[OAuthScope, ...] = ()
    """What an app asks a person for by default."""
    authorization_scheme: Scheme = "Bearer"
    """The word before the access token in the header `Authorization`."""

    def __post_init__(self) -> None:
        for number, url in enumerate(self.token_urls):
            if not _is_safe_url(url):
                raise ValueError(
                    f"`token_urls[{number}]` must begin with https://, or with http:// on this "
                    "machine, and have a path, no user, no query and no fragment"
                )
        for number, url in enumerate(self.authorization_urls):
            if not _is_safe_url(url, has_query=True):
                raise ValueError(
                    f"`authorization_urls[{number}]` must begin with https://, or with http:// on "
                    "this machine, and have a path, no user and no fragment"
                )
        for number, host in enumerate(self.hosts):
            if not _HOST.fullmatch(host):
                raise ValueError(
                    f"`hosts[{number}]` must be a host in lower case, or host:port, without "
                    "https:// and path"
                )
        for field in (
            "token_urls",
            "hosts",
            "client_authentication",
            "authorization_urls",
            "scopes",
        ):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"`{field}` must not contain a value twice")
        if not self.client_authentication:
            raise ValueError('`client_authentication` needs "basic", "body" or "query"')


class Refusal(_Table, frozen=True, kw_only=True):
    """How a token endpoint says that it issues nothing, where it differs from RFC 6749."""

    name: Id
    means: Literal["too-early", "dead"]
    """The interval has not passed; or the refresh token is used, revoked or expired."""
    error: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    """The field `error` of the answer, without case."""
    description: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """A text in its `error_description`, without case; empty matches any."""


class Endpoint(_Table, frozen=True, kw_only=True):
    """How a call's division and endpoint are found in its path or URL.

    Host, keys, path parameters (`;x=1`), dots and empty segments are gone by then, and
    percent-encoding is decoded; the path begins with one slash. Case stays.
    """

    path: str
    """A regular expression with the group `endpoint` and, if there are any, `division`."""
    division_query: tuple[QueryName, ...] = ()
    """Names, without case, of parameters of the query that have the division: the first that is
    there counts. Only if `path` does not match."""

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
    statuses: Statuses = ()
    """HTTP statuses that count as errors; "4xx" is all from 400 to 499."""
    margin: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The part of `most` that is kept free; the budget is low when no more room is left."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        _expand_statuses(self)
        if bool(self.statuses) != (self.event == "errors"):
            raise ValueError(
                '`statuses` is required with event = "errors", and not allowed with others'
            )
        if self.margin >= self.most:
            raise ValueError("`margin` must be less than `most`")


class Concurrency(_Table, frozen=True, kw_only=True):
    """At most so many calls at a time, for each value of the scope. Nothing enforces it yet."""

    name: Id
    most: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    scope: tuple[ScopeField, ...]
    """For whom is counted; the app always belongs to it."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)


class Block(_Table, frozen=True, kw_only=True):
    """How long a block lasts if the provider does not say."""

    scope: tuple[ScopeField, ...] = ("app",)
    first: Seconds = Seconds(60)
    """Ours, as all that is not given: most providers publish no such numbers."""
    factor: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    """Each block lasts this many times as long as the one before."""
    most: Seconds = Seconds(3600)
    """The longest block, whatever the provider's answer says."""
    forget_after: Seconds = Seconds(86400)
    """After this time without a block, the next one counts as the first."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        if self.most < self.first:
            raise ValueError("`most` must not be less than `first`")


class Throttle(_Table, frozen=True, kw_only=True):
    """How an answer that blocks or throttles is recognised: all given conditions must match."""

    name: Id
    statuses: Statuses = ()
    """HTTP statuses, as in a limit. Some providers throttle with 200."""
    body: str = ""
    """A regular expression that is found in the body.

    A group `retry_after` has the number of seconds to wait, if no header says how long.
    """
    header: str = ""
    """A regular expression that is found in a line `Name: value` of the headers, without case."""
    scope: tuple[ScopeField, ...] = ("app",)
    """Who must be quiet."""
    until: tuple[HeaderName, ...] = ("Retry-After",)
    """Headers that say when it ends, the first that makes sense counts.

    Seconds, an HTTP date (RFC 9110, section 10.2.3), or seconds or milliseconds since 1970.
    """
    length: Seconds | None = None
    """How long it lasts where the answer does not say, `most` of the block at most; where this is
    not given what the block says, longer each time."""

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        _expand_statuses(self)
        if not (self.statuses or self.body or self.header):
            raise ValueError("a throttle without `statuses`, `body` or `header` matches everything")
        for field, pattern in (("body", self.body), ("header", self.header)):
            known = {"retry_after"} if field == "body" else set[str]()
            if pattern and (extra := _groups_of(field, pattern) - known):
                raise ValueError(f"`{field}` has an unknown group: {quoted(min(extra))}")
        if self.length is not None and not self.length:
            raise ValueError("`length` must be more than 0s")


class Output(_Table, frozen=True, kw_only=True):
    """How errors are recognised in what a job prints: regular expressions, line by line.

    If each contains a fixed text, only lines with one of these texts are searched: other lines cost
    almost nothing.
    """

    errors: tuple[str, ...]
    """A line with an error. A group `status` has its HTTP status, a group `code` one of `codes`;
    with neither the status is not known. The groups of `places` may be there too."""
    places: tuple[str, ...] = ()
    """A line near it that says where: groups `url`, `division` or `endpoint`, or a group `token` if
    the call was to the first of `oauth.token_urls`."""
    codes: dict[str, Any] = {}
    """HTTP statuses of codes, whose case does not count."""

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
    most_runs: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    """How many shared leases on a token in custody may live at the same time."""
    endpoint: Endpoint | None = None
    oauth: OAuth = msgspec.field(default_factory=OAuth)
    refusal: tuple[Refusal, ...] = ()
    limit: tuple[Limit, ...] = ()
    concurrency: tuple[Concurrency, ...] = ()
    block: Block = msgspec.field(default_factory=Block)
    throttle: tuple[Throttle, ...] = ()
    output: Output | None = None
    when_quiet: Literal["pause", "finish", "terminate"] = "pause"
    """What `holdoff run` does with a command while a scope of its job must be quiet."""

    def __post_init__(self) -> None:
        for table in _NAMED:
            names = set[str]()
            for number, one in enumerate(getattr(self, table)):
                if one.name in names:
                    raise ValueError(f"`{table}[{number}].name`: this name is used twice")
                names.add(one.name)
        patterns = self.output.errors + self.output.places if self.output else ()
        if not self.oauth.token_urls and any(
            "token" in compile_pattern(one).groups for one in patterns
        ):
            raise ValueError("`oauth.token_urls` is missing: the group `token` needs one")

    def place(self, path: str) -> tuple[str, str]:
        """Find a call's (division, endpoint) in its path or URL, each in its one normal form."""
        rules = self.endpoint
        return find_place(rules.path, path, rules.division_query) if rules else find_place("", path)


def read_policy(path: Path | Traversable) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: It is not a policy; the message begins with `FILE:LINE:`.
        OSError: It cannot be read.
    """
    text = ""
    try:
        text = _toml.decode(path.read_bytes())
        fields = _toml.read(text)
        if "like" in fields:
            fields = _merged(_fields_of_preset(fields.pop("like")), fields)
        return msgspec.convert(fields, Policy, dec_hook=_convert)
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


def _fields_of_preset(name: object) -> dict[str, Any]:
    """Read the fields of the preset that a policy is like."""
    found = [one for one in files("holdoff.policies").iterdir() if one.name == f"{name}.toml"]
    if not isinstance(name, str) or not found:
        raise msgspec.ValidationError("`like` must be the name of a preset")
    fields = _toml.read(_toml.decode(found[0].read_bytes()))
    return _merged(_fields_of_preset(fields.pop("like")), fields) if "like" in fields else fields


def _merged(preset: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Put a file's own fields over those of a preset.

    A table changes single fields, and codes single ones. A limit, concurrency or throttle changes
    those of the one with its name; it comes before those that the file does not name, and errors
    keep its number.
    """
    merged = preset | own
    for table, value in own.items():
        match preset.get(table), value:
            case dict() as before, dict():
                merged[table] = _merged(before, value)
            case [{"name": _}, *_] as before, list():
                named = {one["name"]: one for one in before}
                changed = [_changed(named, one) for one in value]
                names = [one["name"] for one in value if isinstance(one, dict) and "name" in one]
                merged[table] = changed + [one for one in before if one["name"] not in names]
    return merged


def _changed(named: dict[str, Any], own: Any) -> Any:
    name = own.get("name") if isinstance(own, dict) else None
    return named.get(name, {}) | own if isinstance(name, str) else own


@cache
def presets() -> dict[str, Policy]:
    """Return the policies that ship, by name."""
    found = [
        read_policy(entry)
        for entry in files("holdoff.policies").iterdir()
        if entry.name.endswith(".toml")
    ]
    return {policy.name: policy for policy in sorted(found, key=lambda policy: policy.name)}


def _expand_statuses(table: Limit | Throttle) -> None:
    """Replace "4xx" and the like by the statuses of that class."""
    expanded = set[int]()
    given: tuple[int | str, ...] = table.statuses
    for one in given:
        start = int(one[0]) * 100 if isinstance(one, str) else one
        expanded.update(range(start, start + 100) if isinstance(one, str) else [start])
    msgspec.structs.force_setattr(table, "statuses", tuple(sorted(expanded)))


def _is_safe_url(text: str, *, has_query: bool = False) -> bool:
    """Tell whether secrets, or people, may be sent there."""
    try:
        url = urlsplit(text)
        safe = url.scheme == "https" or (url.scheme == "http" and url.hostname in _LOOPBACK)
        return (
            safe
            and bool(url.hostname and url.path)
            and url.geturl() == text
            and (url.port is None or url.port > 0)
            and not (url.username or url.password or url.fragment)
            and (has_query or not url.query)
            and text.isascii()
            and text.isprintable()
            and " " not in text
        )
    except ValueError:
        return False


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
